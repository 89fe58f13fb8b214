"""One flat array for many parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def flatten(
    arrays: Mapping[Any, Any] | Sequence[Any], like: np.ndarray[Any, Any] | None = None
) -> tuple[np.ndarray[Any, Any], Any]:
    """Copy arrays end to end into one new flat array, and return it with views of it in the arrays' shapes.

    Parameters
    ----------
    arrays : dict, list or tuple of arrays
        They may have any shapes but must have one dtype.  They are laid out in the order of the dict or list, without
        padding.
    like : (n,) array, optional
        A flat array made by an earlier call.  The result is then a second array for the gradients, with the same layout
        and dtype, filled with zeros (the values in `arrays` are not copied).

    Returns
    -------
    flat : (n,) array
        A copy of the values; step this one.
    views : dict, list or tuple, like `arrays`
        Views of `flat`: writing to one writes to the other.

    Raises
    ------
    TypeError
        If the dtypes differ or something is not an array.
    ValueError
        If `like` has another size or is not flat.

    Examples
    --------
    >>> flat, p = flatten({"w": np.ones((2, 3)), "b": np.zeros(3)})
    >>> grad, g = flatten(p, like=flat)
    >>> g["b"][:] = 1.0
    >>> grad
    array([0., 0., 0., 0., 0., 0., 1., 1., 1.])
    """
    if not isinstance(arrays, (Mapping, list, tuple)):
        raise TypeError(f"arrays must be a dict, list or tuple of arrays, got {type(arrays).__name__}")
    parts = list(arrays.values()) if isinstance(arrays, Mapping) else list(arrays)
    for i, part in enumerate(parts):
        if not isinstance(part, np.ndarray) or isinstance(part, np.ma.MaskedArray):
            raise TypeError(f"array {i} is a {type(part).__name__}, not a numpy.ndarray; pass np.asarray(x)")
        if part.dtype != parts[0].dtype:
            raise TypeError(f"array {i} has dtype {part.dtype}, array 0 {parts[0].dtype}; convert one with x.astype")
    size = sum(part.size for part in parts)
    if like is None:
        flat = np.concatenate([np.asarray(part).ravel() for part in parts]) if parts else np.empty(0)
    elif not isinstance(like, np.ndarray) or like.shape != (size,):
        raise ValueError(
            f"like must be an array of shape ({size},), the total size of the arrays, got {np.shape(like)}"
        )
    else:
        flat = np.zeros_like(like)
    views, start = [], 0
    for part in parts:
        views.append(flat[start : start + part.size].reshape(part.shape))
        start += part.size
    if isinstance(arrays, Mapping):
        return flat, dict(zip(arrays, views, strict=True))
    return flat, tuple(views) if isinstance(arrays, tuple) else views

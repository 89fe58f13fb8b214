"""Structure and flat: the arrays of a group as the caller cut them, and as one line of elements."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import numpy as np

from .._native import core

Array = np.ndarray[Any, Any]


class Layout:
    """The structure of a group's parameters, and their places in its parameter space."""

    def __init__(self, params: Any, uint16_as: str | None = None) -> None:
        self.keys: Any  # of a dict, each with its array's number; None for a list; () for one bare array
        if isinstance(params, dict):
            self.keys = {key: i for i, key in enumerate(params)}
            self.arrays: tuple[Any, ...] = tuple(params[key] for key in self.keys)
        elif isinstance(params, (list, tuple)):
            self.keys, self.arrays = None, tuple(params)
        else:
            self.keys, self.arrays = (), (params,)
        self._uint16_as = uint16_as
        self.sizes: list[int] = []  # of the arrays, once they are bound
        self.rows: list[int] = []  # their lengths along the first axis

    def given(self) -> Any:
        """The arrays in a structure like the one that they were given in."""
        if self.keys == ():
            return self.arrays[0]
        return list(self.arrays) if self.keys is None else dict(zip(self.keys, self.arrays, strict=True))

    def names(self, place: str) -> list[str]:
        """The names of the arrays in messages: params, params[3], params['w']."""
        if self.keys == ():
            return [place]
        return [f"{place}[{key!r}]" for key in (range(len(self.arrays)) if self.keys is None else self.keys)]

    def arrange(self, items: list[Any]) -> Any:
        """Put a list with one item for each array into the structure of the parameters, read-only."""
        if self.keys == ():
            return items[0]
        return tuple(items) if self.keys is None else MappingProxyType(dict(zip(self.keys, items, strict=True)))

    def parts(self, flat: Array, by_row: bool = False) -> list[Array]:
        """Views of a flat array in the shapes of the parameters; by_row: of one number for each row, (rows, 1, ...)."""
        found, at = [], 0
        for array, size, rows in zip(self.arrays, self.sizes, self.rows, strict=True):
            n, shape = (rows, array.shape[:1] + (1,) * (array.ndim - 1)) if by_row else (size, array.shape)
            found.append(flat[at : at + n].reshape(shape))
            at += n
        return found

    def views(self, flat: Array, by_row: bool = False) -> Any:
        """The same in the structure of the parameters."""
        if self.keys == () and not by_row:  # which users look at in loops
            return flat.reshape(self.arrays[0].shape)
        return self.arrange(self.parts(flat, by_row))

    def long_rows(self) -> list[tuple[int, int, int]]:
        """Of each array whose rows have several elements: its first element, the one after its last, and how many."""
        stops = accumulate(self.sizes)
        found = zip(stops, self.sizes, self.rows, strict=True)
        return [(stop - size, stop, size // rows) for stop, size, rows in found if size > rows]

    def rows_before(self, element: int) -> int:
        """How many rows begin before an element; those of arrays without elements too that lie there."""
        found = 0
        for size, rows in zip(self.sizes, self.rows, strict=True):
            if element < size:
                return found - -element // (size // rows)
            found, element = found + rows, element - size
        return found

    def row_lengths(self) -> list[list[int]]:
        """How long the rows are, in order: [rows, elements of each]; neighbours of one length are counted together."""
        found: list[list[int]] = []
        for size, rows in zip(self.sizes, self.rows, strict=True):
            length = size // max(rows, 1)
            if found and found[-1][1] == length:
                found[-1][0] += rows
            elif rows:
                found.append([rows, length])
        return found

    def match(self, arrays: Any, name: str) -> list[tuple[Array, Array, str]]:
        """(parameter, its partner, the partner's name) for arrays in the structure of the parameters."""
        if isinstance(self.keys, dict):
            if not isinstance(arrays, Mapping) or arrays.keys() != self.keys.keys():
                raise ValueError(
                    f"{name} must be a dict with the keys of the parameters, {', '.join(map(repr, self.keys))}"
                )
            items = [(arrays[key], f"{name}[{key!r}]") for key in self.keys]
        elif self.keys is None:
            given = tuple(arrays) if isinstance(arrays, (list, tuple)) else None
            if given is None or len(given) != len(self.arrays):
                of = "" if given is None else f" of {len(given)}"
                raise ValueError(
                    f"{name} must be a list of {core.counted(len(self.arrays), 'array')}, as the parameters are; got "
                    f"{core.an(type(arrays).__name__)}{of}"
                )
            items = [(array, f"{name}[{i}]") for i, array in enumerate(given)]
        else:
            items = [(arrays, name)]
        for param, (array, label) in zip(self.arrays, items, strict=True):
            plain = type(array) in (np.ndarray, np.memmap)
            if not plain or array.shape != param.shape:
                got = f"shape {array.shape}" if plain else core.an(type(array).__name__)
                raise ValueError(f"{label} must be an array of its parameter's shape, {param.shape}, got {got}")
        return [(param, array, label) for param, (array, label) in zip(self.arrays, items, strict=True)]

    def flat(self, arrays: Any, name: str) -> Array:
        """The elements of arrays in the structure of the parameters, copied into one line."""
        parts = []
        for _, array, _ in self.match(arrays, name):
            part = np.asarray(array).ravel()
            if self.is_bfloat16(array):
                part = (part.view("uint16").astype("uint32") << np.uint32(16)).view("float32")
            parts.append(part)
        return np.concatenate(parts) if parts else np.empty(0)

    def is_bfloat16(self, array: Array) -> bool:
        """Whether an array holds bfloat16, under its own dtype or as uint16."""
        return array.dtype.name == "bfloat16" or (array.dtype == np.uint16 and self._uint16_as == "bfloat16")


def recut(sizes: list[int], new: list[int], counts: dict[str, Array], where: str) -> dict[str, Array]:
    """The counts of a new cut of the same elements: those of the arrays that each new one consists of."""
    if sizes == new:
        return counts
    filled = np.flatnonzero(sizes)
    if not filled.size:
        filled = np.arange(1)
    ends = np.cumsum(sizes)[filled]
    stops = np.cumsum(new)
    starts = stops - new
    first = np.minimum(np.searchsorted(ends, starts, "right"), filled.size - 1)
    last = np.maximum(np.searchsorted(ends, stops, "left"), first)  # an empty array has the count of its neighbour
    last = np.minimum(last, filled.size - 1)
    for i, (a, b) in enumerate(zip(first, last, strict=True)):
        for name, old in counts.items():
            among = old[filled[a : b + 1]]
            if (among != among[0]).any():
                raise ValueError(
                    f"{where}: array {i} here would join saved arrays with different counts ({name} {among.min()} and "
                    f"{among.max()}), but an array has only one; cut the parameters as they "
                    f"were, into sizes {sizes[:10]}{' ...' if len(sizes) > 10 else ''}"
                )
    return {name: old[filled[first]] for name, old in counts.items()}


def flatten(arrays: Mapping[Any, Any] | Sequence[Any], like: Array | None = None) -> tuple[Array, Any]:
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
    >>> import numpy as np
    >>> from adaptive_c import flatten
    >>> flat, p = flatten({"w": np.ones((2, 3)), "b": np.zeros(3)})
    >>> grad, g = flatten(p, like=flat)
    >>> g["b"][:] = 1.0
    >>> grad
    array([0., 0., 0., 0., 0., 0., 1., 1., 1.])
    """
    if not isinstance(arrays, (Mapping, list, tuple)):
        raise TypeError(f"arrays must be a dict, list or tuple of arrays, got {core.an(type(arrays).__name__)}")
    parts = list(arrays.values()) if isinstance(arrays, Mapping) else list(arrays)
    for i, part in enumerate(parts):
        if not isinstance(part, np.ndarray) or isinstance(part, np.ma.MaskedArray):
            raise TypeError(f"array {i} is {core.an(type(part).__name__)}, not a numpy.ndarray; pass np.asarray(x)")
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

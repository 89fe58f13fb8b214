"""What `minimize` is given, checked and in one form: x0, bounds, functions, batches and callback; and its result.

SciPy is imported only for the class of the result.
"""

import inspect
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

import numpy as np

from ._native import Rows, core
from ._run.options import check_bounds

Array = np.ndarray[Any, Any]
Limits = tuple[Array, Array] | None

FINITE_DIFFERENCES = (
    "Finite differences are not offered, because each of many short steps would cost x.size more "
    "evaluations; SciPy makes them: jac=lambda x, *args: scipy.optimize.approx_fprime(x, fun, 1e-8, *args)"
)


def _read(name: str, given: Any) -> Array:
    """An argument as an array.  An error of NumPy or a tensor is raised with the argument's name."""
    if isinstance(given, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be ignored: pass x.data, or x.filled(0)")
    try:
        return np.asarray(given)
    except Exception as error:
        raise TypeError(f"{name} can't be read as an array, got {given!r:.60}: {error}") from error


def _real(name: str, given: Any) -> Array:
    """An argument as an array of real numbers."""
    found = _read(name, given)
    if found.dtype.kind in "fiub":
        return found
    hint = ""
    if found.dtype.kind == "c":
        hint = "; a complex number is two: z.view('float64')"
    elif isinstance(given, Rows):
        hint = "; add the rows to an array of zeros: np.add.at(g, rows.indices, rows.values)"
    elif hasattr(given, "toarray"):
        hint = "; call its toarray()"
    elif isinstance(given, Iterator):
        hint = "; make it a list: list(...)"
    elif isinstance(given, Mapping):
        hint = "; adaptive_c.flatten makes one array of several"
    kind = f"{core.an(type(given).__name__)} of dtype {found.dtype}"
    what = kind if hint or found.ndim else f"{given!r:.60}"
    raise TypeError(f"{name} must be real numbers, got {what}{hint}")


def start(x0: Any) -> Array:
    """A copy of x0 that can be stepped: float32 if x0 is float32, else float64."""
    given = _real("x0", x0)
    x = np.array(given, dtype="float32" if given.dtype == "float32" else "float64", order="C")
    if not x.size:
        raise ValueError("x0 has no elements")
    if not np.isfinite(x).all():
        i = tuple(map(int, np.argwhere(~np.isfinite(x))[0]))
        raise ValueError(f"x0 is {x[i]} at index {i}; start from finite numbers")
    return x


def box(bounds: Any, x: Array) -> tuple[Any, Any] | None:
    """(lo, hi) as the optimizer takes them, of SciPy's Bounds, its pairs, or two sides."""
    if bounds is None:
        return None
    if hasattr(bounds, "lb") and not hasattr(bounds, "A") and not hasattr(bounds, "fun"):  # which constraints have
        sides = [bounds.lb, bounds.ub]
    else:
        sides = list(bounds) if isinstance(bounds, Iterable) else []
        paired = len(sides) == x.size and not (x.ndim > 1 and np.shape(sides[0]) == x.shape)
        pairs = all(isinstance(pair, Iterable) and len(tuple(pair)) == 2 for pair in sides)
        if pairs and paired:
            if x.size == 2:
                _check_two_pairs(bounds, sides)
            sides = [np.reshape([far if end is None else end for end in side], x.shape)
                     for side, far in zip(zip(*sides, strict=True), (-np.inf, np.inf), strict=True)]  # fmt: skip
        elif len(sides) != 2 or (pairs and x.size > 2):
            raise ValueError(
                f"bounds must be None, a Bounds, {x.size} pairs (one for each element of x0, with None for no bound), "
                f"or (lo, hi), each of them None, a number or an array of x0's shape {x.shape}; got {bounds!r}"
            )
    for i, name in enumerate(("lo", "hi")):
        side = _read(f"bounds: {name}", np.inf if sides[i] is None else sides[i])
        if side.dtype.kind not in "fiu":
            raise TypeError(f"bounds: {name} must be real numbers, got {sides[i]!r}")
        if side.shape != x.shape and side.size != 1:
            raise ValueError(f"bounds: {name} must be a number or of x0's shape {x.shape}, got shape {side.shape}")
        if sides[i] is not None:
            sides[i] = np.ascontiguousarray(side) if side.size > 1 else side.item()
    return sides[0], sides[1]


def _check_two_pairs(bounds: Any, pairs: list[Any]) -> None:
    """Refuse two sides, (lo, hi), of two elements, which would be read as two pairs, where they can be told."""
    known = [pair for pair in pairs if pair[0] is not None and pair[1] is not None]
    arrays = not isinstance(bounds, np.ndarray) and all(isinstance(pair, np.ndarray) for pair in pairs)
    no_room = len(known) == 2 and all(isinstance(pair, list) and pair[0] == pair[1] for pair in known)
    if arrays or no_room or any(lo > hi for lo, hi in known):
        raise ValueError(f"bounds={bounds!r} of two elements are read as a pair (lo, hi) for each; if they are the two "
                         "sides lo and hi, say bounds=list(zip(lo, hi)); if they are pairs, scipy.optimize.Bounds(lo, "
                         "hi)")  # fmt: skip


def limits(sides: tuple[Any, Any] | None, x: Array) -> Limits:
    """The sides as the optimizer clamps to them, rounded inward to x's type, as arrays of x's shape."""
    if sides is None:
        return None
    _, rounded = check_bounds(sides, x.dtype.name, "", lambda side, name: side.ravel())
    lo, hi = (np.broadcast_to(side.reshape(x.shape) if np.ndim(side) else side, x.shape) for side in rounded)
    return lo, hi


def _number(f: Any) -> float:
    """What fun returned, as a float."""
    value = _read("the value of fun", None if isinstance(f, tuple) else f)
    if value.size != 1 or value.dtype.kind not in "fiub":
        what = f"an array of shape {value.shape}" if isinstance(f, np.ndarray) else f"{f!r:.60}"
        hint = "; if that is (f, g), say jac=True" if isinstance(f, tuple) else ""
        hint = "; return float(f)" if isinstance(f, (numbers.Real, Decimal)) else hint  # of other kinds than NumPy's
        raise TypeError(f"fun must return one real number, got {what}{hint}")
    return float(value.item())


def _gradient(g: Any, x: Array) -> Array:
    """A gradient as the optimizer takes it; NumPy converts what is not of x's type or layout."""
    found = _real("the gradient", g)
    if found.shape != x.shape and not found.size == x.size == 1:
        raise ValueError(f"the gradient must have the shape of x, {x.shape}, got {found.shape}")
    return np.asarray(found.reshape(x.shape), dtype=x.dtype, order="C")


def evaluator(fun: Any, jac: Any, args: tuple[Any, ...], x: Array) -> Callable[..., tuple[float, Array]]:
    """The function (f, g) of a batch, if there are any, at the live x, which the user's functions can only read."""
    if not (jac is True or callable(jac) or (isinstance(jac, str) and jac == "out")):
        raise ValueError(f"the gradient is needed, and jac={jac!r} does not give one; let fun return (f, g) and say "
                         "jac=True, or give a function as jac, or let fun(x, *args, out=g) fill g and say jac='out'. "
                         f"{FINITE_DIFFERENCES}")  # fmt: skip
    out = None if jac is True or callable(jac) else np.full_like(x, np.nan)  # which shows if fun does not write to it
    seen, dtype, shape = x.view(), x.dtype, x.shape
    seen.flags.writeable = False

    def evaluate(*batch: Any) -> tuple[float, Array]:
        if jac is True:
            pair = fun(seen, *batch, *args)
            try:
                f, g = pair
            except (TypeError, ValueError):
                raise TypeError(f"jac=True says that fun returns (f, g); it returned {pair!r:.60}") from None
        elif out is None:
            f, g = fun(seen, *batch, *args), jac(seen, *batch, *args)
        else:
            f, g = fun(seen, *batch, *args, out=out), out
        if not (type(g) is np.ndarray and g.dtype is dtype and g.shape == shape and g.flags.c_contiguous):
            g = _gradient(g, x)
        return (float(f) if isinstance(f, float) else _number(f)), g

    return evaluate


def items(batches: Any) -> Iterator[tuple[Any]]:
    """The batches, over and over if they can be gone through again; an iterator ends."""
    kind = type(batches)
    if not hasattr(kind, "__iter__") and not hasattr(kind, "__getitem__"):
        hint = "; if it makes them, call it: batches=f()" if callable(batches) else ""
        raise TypeError(f"batches must be iterable, got {batches!r}{hint}")
    n = 0
    while True:
        before = n
        for item in batches:
            n += 1
            yield (item,)
        if not n:
            raise ValueError("batches has no items")
        if n == before:  # an iterator begins where it ended
            return


def reporter(callback: Any) -> Callable[[Array, float], Any] | None:
    """Call back as SciPy does: with a result, if that is the name of the only parameter, else with a copy of x."""
    if callback is None:
        return None
    if not callable(callback):
        raise TypeError(f"callback must be a function, got {callback!r:.60}")
    try:
        names = set(inspect.signature(callback).parameters)
    except (TypeError, ValueError):  # some functions in C have no signature
        names = set()
    if names == {"intermediate_result"}:
        return lambda x, f: callback(intermediate_result=result(x=x.copy(), fun=f))
    return lambda x, f: callback(x.copy())


class _Result(dict[str, Any]):
    """The result where SciPy is not installed: like SciPy's, a dict whose items are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    __setattr__ = dict.__setitem__
    __delattr__ = dict.__delitem__

    def __dir__(self) -> list[str]:
        return list(self)

    def __repr__(self) -> str:
        width = max(map(len, self), default=0)
        lines = (f"{name:>{width}}: " + str(x).replace("\n", "\n" + " " * (width + 2)) for name, x in self.items())
        return "\n".join(lines) or "_Result()"


def result(**fields: Any) -> Any:
    """SciPy's own class, if it is installed."""
    try:
        from scipy.optimize import OptimizeResult
    except ImportError:
        return _Result(fields)
    return OptimizeResult(fields)

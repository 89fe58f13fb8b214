"""The one description of what a run depends on, from which state_dict and save, load_state_dict and load all work.

It is a dict of numbers, strings and lists, but for "arrays" in each of its "groups": flat arrays by name, in the order
of the group's parameter space, so that they fit every cut of it, and the counts of the single arrays.  What is not in
it, the caller gives again: see docs/checkpoints.md.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from . import _scaler
from ._checkpoint import file as _checkpoint
from ._checkpoint.file import Entry
from ._optimizer import _FIXED, Array, Optimizer, ParamGroup
from ._options import _real, check_settings

VERSION = 1
_COUNTS = {"step": "int64", "started": "uint8", "mu_product": "float64", "summed": "uint8"}


# --- describing ------------------------------------------------------------------------------------------------------


def _live(opt: Optimizer, group: ParamGroup, parameters: bool) -> dict[str, Entry]:
    """The arrays of a group by name, as they lie in memory; sums only while some are pending."""
    narrow = {"bfloat16": "bfloat16", "uint8": "uint8"}.get(group["state_dtype"] or "", group._computed)
    found = {}
    if parameters:
        flat = [array.reshape(-1) for array in group._arrays]
        dtype = opt._plan.dtype(group._index)
        found["params"] = Entry(dtype, [x.view("uint16") for x in flat] if dtype == "bfloat16" else flat)
    for name, slot, scales in zip(opt._slots, group._slots, group._scales, strict=True):
        if slot is not None:
            found[name] = Entry("int8" if name == "prev" else narrow, [slot])
        if scales is not None:
            found[f"{name}_scale"] = Entry("float32", [scales])
    sums = group._sums if opt.pending else None
    for name, array in (("master", group._master), ("ema", group._ema), ("sums", sums)):
        if array is not None:
            found[name] = Entry(array.dtype.name, [array])
    return found


def _counts(opt: Optimizer, group: ParamGroup) -> dict[str, Array]:
    """The counts of each array of a group by name."""
    counts = {**group._per_array, "started": np.frombuffer(opt._plan.started(group._index), "uint8")}
    return {**counts, "summed": group._summed} if opt.pending else counts


def _clear_leftovers(opt: Optimizer) -> None:
    """Where an array had no gradient since the last step its sums are of an earlier one, which nobody reads."""
    for group in opt._groups:
        if opt.pending and group._sums is not None:
            stop = np.cumsum([array.size for array in group._arrays])
            for i in np.flatnonzero(group._summed == 0):
                group._sums[stop[i] - group._arrays[i].size : stop[i]] = 0


def _names(group: ParamGroup) -> list[Any] | None:
    """The keys of a dict of parameters, as JSON can hold them."""
    return [key if type(key) in (str, int) else repr(key) for key in group._keys] if group._keys else None


def _described(schedule: Any) -> Any:
    """A schedule, a number, or a pair of them, as JSON can hold it; None for a function of the user's."""
    from . import schedules

    return schedules.plain(schedule)


def _bounds(bounds: Any) -> Any:
    """As JSON can hold them, which has no infinity: None is the same."""
    if bounds is None:
        return None
    if not all(side is None or isinstance(side, (int, float, np.number)) for side in bounds):
        return "arrays"
    sides = [None if side is None else _real("bounds", side) for side in bounds]
    return [None if side is None or math.isinf(side) else side for side in sides]


def _options(group: ParamGroup) -> dict[str, Any]:
    """The numbers that follow no schedule."""
    options = {
        name: value for name, value in group._numbers.items() if name not in _FIXED and name not in group._schedules
    }
    return {**options, "bounds": _bounds(options["bounds"])}


def _group(opt: Optimizer, group: ParamGroup) -> dict[str, Any]:
    """A group without its arrays."""
    return {
        "dtype": opt._plan.dtype(group._index),
        "state_dtype": "float64" if group._computed == "float64" else group["state_dtype"] or "float32",
        "master": group["master"],
        "rounding": group["rounding"],
        "sizes": [array.size for array in group._arrays],
        "names": _names(group),
        "options": _options(group),
        "schedules": {name: _described(x) for name, x in group._schedules.items()},
    }


def _describe(opt: Optimizer) -> dict[str, Any]:
    """A run without its arrays."""
    return {
        "format": "adaptive_c",
        "version": VERSION,
        "class": type(opt).__name__,
        "t": opt.t,
        "skipped_steps": opt.skipped_steps,
        "grad_norm": opt.grad_norm if math.isfinite(opt.grad_norm) else str(opt.grad_norm),  # as JSON can hold it
        "pending": opt.pending,
        "scaler": opt._scaler and opt._scaler.state_dict(),
        "settings": dict(opt._plan.settings),
        "groups": [_group(opt, group) for group in opt._groups],
    }


def state_dict(opt: Optimizer) -> dict[str, Any]:
    with opt._plan.held():
        _clear_leftovers(opt)
        found = _describe(opt)
        for group, about in zip(opt._groups, found["groups"], strict=True):
            arrays = {name: entry.pieces[0] for name, entry in _live(opt, group, False).items()}
            about["arrays"] = {**arrays, **_counts(opt, group)}
    return found


def save(opt: Optimizer, path: Any, format: str | None, parameters: bool) -> None:  # noqa: A002
    if format not in (None, "safetensors"):
        raise ValueError(f"format must be 'safetensors' or None, got {format!r}")
    with opt._plan.held():
        _clear_leftovers(opt)
        arrays: dict[str, Entry] = {}
        for i, group in enumerate(opt._groups):
            counts = {name: Entry(_COUNTS[name], [array]) for name, array in _counts(opt, group).items()}
            arrays |= {f"{i}.{name}": entry for name, entry in {**_live(opt, group, parameters), **counts}.items()}
        _checkpoint.write(path, _describe(opt), arrays)


# --- restoring -------------------------------------------------------------------------------------------------------


class _Given:
    """An array of a state_dict, to be read like one of a file."""

    def __init__(self, array: Array) -> None:
        self.array, self.dtype, self.size = array, array.dtype, array.size

    def read(self, start: int, out: Array) -> None:
        out[...] = self.array[start : start + out.size]


def load_state_dict(opt: Optimizer, d: Any) -> None:
    if isinstance(d, Mapping) and isinstance(d.get("groups"), (list, tuple)):
        groups = []
        for i, group in enumerate(d["groups"]):
            arrays = _get(group, "arrays", Mapping, f"state_dict['groups'][{i}]")
            for name, array in arrays.items():
                if not isinstance(array, np.ndarray) or array.ndim != 1:
                    raise TypeError(f"state_dict['groups'][{i}]['arrays'][{name!r}] must be a flat NumPy array, as "
                                    f"state_dict() gives it; got {type(array).__name__}")  # fmt: skip
            groups.append({**group, "arrays": {name: _Given(array) for name, array in arrays.items()}})
        d = {**d, "groups": groups}
    with opt._plan.held():
        _restore(opt, d, "state_dict", parameters=False)


def load(opt: Optimizer, path: Any, parameters: bool) -> None:
    with opt._plan.held(), _checkpoint.reading(path) as (head, arrays):
        where = str(path)
        for i, group in enumerate(_get(head, "groups", list, where)):
            prefix = f"{i}."
            group["arrays"] = {
                name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)
            }
        _restore(opt, head, where, parameters=parameters)


def _get(d: Any, key: str, kind: Any, where: str) -> Any:
    """d[key], which must be there and of that kind."""
    if not isinstance(d, Mapping):
        raise TypeError(f"{where} must be a dict, as state_dict() gives it; got {type(d).__name__}")
    if key not in d:
        raise ValueError(f"{where} has no {key!r}: it is no state of an adaptive_c optimizer, or not all of it")
    value = d[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{where}[{key!r}] can't be {value!r}")
    return value


def _count(d: Any, key: str, where: str) -> int:
    n: int = _get(d, key, (int, np.integer), where)
    if not 0 <= n < 1 << 62:
        raise ValueError(f"{where}[{key!r}] must be in [0, 2**62), got {n}")
    return int(n)


def _restore(opt: Optimizer, d: Any, where: str, parameters: bool) -> None:
    """Check everything and allocate what is needed, then write."""
    version = _get(d, "version", int, where)
    if _get(d, "format", str, where) != "adaptive_c" or not 1 <= version <= VERSION:
        raise ValueError(f"{where} has format {d['format']!r} {version}; this version reads 'adaptive_c' 1 to {VERSION}"
                         ": use the version of adaptive_c that wrote it, or a later one")  # fmt: skip
    if _get(d, "class", str, where) != type(opt).__name__:
        raise ValueError(f"{where} is of {d['class']}, this optimizer is {type(opt).__name__}")
    groups = _get(d, "groups", (list, tuple), where)
    if len(groups) != len(opt._groups):
        raise ValueError(f"{where} has {len(groups)} parameter groups, this optimizer {len(opt._groups)}")
    t, skipped = _count(d, "t", where), _count(d, "skipped_steps", where)
    grad_norm = _get(d, "grad_norm", (int, float, str), where)
    if isinstance(grad_norm, str) and grad_norm not in ("nan", "inf"):
        raise ValueError(f"{where}['grad_norm'] can't be {grad_norm!r}")
    grad_norm = float(grad_norm)
    pending = _count(d, "pending", where)
    scaler = _get(d, "scaler", (Mapping, type(None)), where)
    if (scaler is None) != (opt._scaler is None):
        has, lacks = ("without", "with") if scaler is None else ("with", "without")
        raise ValueError(
            f"{where} was saved {has} a dynamic loss scale, this optimizer is {lacks}: construct it the same way"
        )
    given = _get(d, "settings", Mapping, where)
    if unknown := given.keys() - opt._plan.settings.keys():
        raise ValueError(f"{where} has the unknown setting {min(unknown)!r}")
    settings = check_settings({**opt._plan.settings, **given}, f"{where}: ")
    opt._plan.check(settings)
    if (settings["loss_scale"] == "dynamic") != (scaler is not None):
        raise ValueError(f"{where} has the loss_scale {settings['loss_scale']!r} and the scaler {scaler!r}")
    if scaler is not None:
        for name in ("scale", "growth_tracker"):
            _get(scaler, name, (int, float), f"{where}['scaler']")
        _scaler.checked(scaler, f"{where}: ")
    work = [
        _check_group(opt, group, about, f"{where}: group {group._index}", parameters, t, pending)
        for group, about in zip(opt._groups, groups, strict=True)
    ]
    for group in opt._groups if pending else ():
        if group._sums is None:
            opt._allocate_sums(group._index)
    opt._plan.write_on()  # from here on nothing is refused
    opt._plan.configure(settings)
    opt.discard()
    if scaler is not None and opt._scaler is not None:
        opt._scaler.load_state_dict(scaler)
    try:
        for write in work:
            write()
        opt._plan.set_counts(t, skipped, grad_norm, pending)
    except BaseException:  # a reading error, Ctrl-C
        opt.discard()
        raise
    opt._plan.write_copies()


def _check_group(
    opt: Optimizer, group: ParamGroup, d: Any, where: str, parameters: bool, t: int, pending: int
) -> Callable[[], None]:
    """Compare a description with a group; what to call to take it over."""
    ours = _group(opt, group)
    for key in ("dtype", "state_dtype", "master", "rounding"):
        what = "parameters are" if key == "dtype" else f"{key} is"
        if _get(d, key, (str, type(None)), where) != ours[key]:
            raise ValueError(f"{where}: its {what} {d[key]!r}, this optimizer's {ours[key]!r}; they can't be converted:"
                             " construct the optimizer as the saved one was")  # fmt: skip
    sizes = [int(size) for size in _get(d, "sizes", (list, tuple), where)]
    _check_cut(sizes, _get(d, "names", (list, tuple, type(None)), where), ours, where)
    arrays = _get(d, "arrays", Mapping, where)
    live = _live(opt, group, parameters)
    live.pop("sums", None)
    wanted = {name: (entry.dtype, entry.size) for name, entry in live.items()}
    if pending:
        wanted["sums"] = np.dtype(group._computed), sum(ours["sizes"])
    _check_arrays(arrays, wanted, d, where, parameters)
    names = [*group._per_array, "started", *(["summed"] if pending else [])]
    counts = {name: _read_count(arrays, name, len(sizes), where) for name in names}
    counts = _recut(sizes, ours["sizes"], counts, where)
    checked = group._checked(_read_options(group, d, where), t, f"{where}: ", group._numbers)

    def write() -> None:
        group._take(checked, t)
        if pending:
            arrays["sums"].read(0, group._sums)
            group._summed[:] = counts["summed"]
        for name, entry in live.items():
            at = 0
            for piece in entry.pieces:
                arrays[name].read(at, piece)
                at += piece.size
        for name, array in group._per_array.items():
            array[:] = counts[name]
        opt._plan.set_started(group._index, counts["started"].tobytes())

    return write


def _check_cut(sizes: list[int], names: Any, ours: dict[str, Any], where: str) -> None:
    if min(sizes, default=0) < 0 or not sizes:
        raise ValueError(f"{where}: its sizes can't be {sizes}")
    if sum(sizes) != sum(ours["sizes"]):
        raise ValueError(f"{where} has {sum(sizes)} elements, this optimizer's {sum(ours['sizes'])}")
    if names is None or ours["names"] is None:
        return
    if list(names) != ours["names"]:
        same = set(names) == {*ours["names"]}
        hint = " (the same in another order, which is the order of the elements)" if same else ""
        raise ValueError(f"{where} has the arrays {', '.join(map(repr, names))}, this optimizer's "
                         f"{', '.join(map(repr, ours['names']))}{hint}")  # fmt: skip
    for name, size, own in zip(names, sizes, ours["sizes"], strict=True):
        if size != own:
            raise ValueError(f"{where}: array {name!r} has {size} elements, this optimizer's {own}")


def _check_arrays(
    arrays: Any, wanted: "dict[str, tuple[np.dtype[Any], int]]", d: Any, where: str, parameters: bool
) -> None:
    names = arrays.keys() - _COUNTS.keys() - (set() if parameters else {"params"})
    if parameters and "params" not in names:
        raise ValueError(
            f"{where} has no parameters: it was saved without; load(path, parameters=False) loads the rest"
        )
    if names != wanted.keys():
        options = _get(d, "options", Mapping, where)
        switches = [f"{k}={options[k]!r}" for k in ("amsgrad", "centered", "momentum", "ema_decay") if k in options]
        raise ValueError(
            f"{where} has the state {', '.join(sorted(names)) or 'none'}, this optimizer's "
            f"{', '.join(sorted(wanted)) or 'none'}; construct it with the options of the saved one"
            + (f" ({', '.join(switches)})" if switches else "")
        )
    for name, (dtype, size) in wanted.items():
        if arrays[name].dtype != dtype or arrays[name].size != size:
            raise ValueError(f"{where}: {name} has {arrays[name].size} elements of {arrays[name].dtype}, this "
                             f"optimizer's {size} of {dtype}")  # fmt: skip


def _read_count(arrays: Any, name: str, n: int, where: str) -> Array:
    if name not in arrays or arrays[name].dtype != _COUNTS[name] or arrays[name].size != n:
        raise ValueError(f"{where} must have {name!r}, {n} numbers of {_COUNTS[name]}, one for each array")
    out = np.empty(n, _COUNTS[name])
    arrays[name].read(0, out)
    if not ((out >= 0) & (out < 1 << 62)).all():
        raise ValueError(f"{where}: {name} must not be negative, NaN or 2**62 and more, got {out.min()} .. {out.max()}")
    return out


def _recut(sizes: list[int], new: list[int], counts: dict[str, Array], where: str) -> dict[str, Array]:
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
                    f"{where}: array {i} here would hold arrays of the saved cut with different counts "
                    f"({name} {among.min()} and {among.max()}), and can have only one; cut the parameters as they "
                    f"were, into sizes {sizes[:10]}{' ...' if len(sizes) > 10 else ''}"
                )
    return {name: old[filled[first]] for name, old in counts.items()}


def _read_options(group: ParamGroup, d: Any, where: str) -> dict[str, Any]:
    """All options of a group, numbers and schedules, as they are to be assigned."""
    given = dict(_get(d, "options", Mapping, where))
    schedules = _get(d, "schedules", Mapping, where)
    known = group._numbers.keys() - {*_FIXED}
    if unknown := (given.keys() | schedules.keys()) - known:
        names = ", ".join(name for name in group._numbers if name in known)
        raise ValueError(f"{where} has the unknown option {min(unknown)!r}; this optimizer has {names}")
    now = _bounds(group._numbers["bounds"])
    bounds = given.pop("bounds", now)
    if bounds == "arrays" and now != "arrays":
        raise ValueError(f"{where} was bounded by arrays, which are not saved: construct the optimizer with them")
    options = {**group._numbers, **given}
    if bounds not in ("arrays", now):
        options["bounds"] = None if bounds is None else tuple(bounds)
    own = group._schedules
    return {**options, **{name: _revived(x, own.get(name), f"{where}: {name}") for name, x in schedules.items()}}


def _revived(given: Any, own: Any, where: str) -> Any:
    """The inverse of `_described`; own: what this optimizer has there."""
    from . import schedules

    try:
        return schedules.revived(given, own)
    except schedules.MissingError:
        raise ValueError(f"{where} followed a function of your own, which is not stored: construct the optimizer with "
                         "it, or assign it, and load again") from None  # fmt: skip
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None

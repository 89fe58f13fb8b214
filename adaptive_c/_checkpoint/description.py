"""The one description of what a run depends on, from which state_dict and save, load_state_dict and load all work.

It is a dict of numbers, strings and lists, but for "arrays" in each of its "groups": flat arrays by name, in the order
of the group's parameter space, so that they fit every cut of it, and the counts of the single arrays.  The caller
gives again what is not in it: see docs/checkpoints.md.
"""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from .. import schedules
from .._native import core
from .._run.group import ParamGroup
from .._run.layout import Array, recut
from .._run.options import OPTIONS, moves, real, whole
from .._run.run import GROWTH_INTERVAL, Run, check_scale
from . import file
from .file import Entry
from .names import decoded, encoded, matches

VERSION = 2  # 1 had the names of a dict's arrays as repr() gives them
_DICT = (dict, Mapping)  # isinstance tells a dict at once, and asks Mapping about anything else
_FIXED = {name for name, option in OPTIONS.items() if option.fixed}
_COUNTS = {"step": "int64", "started": "uint8", "mu_product": "float64", "summed": "uint8"}


# --- describing ------------------------------------------------------------------------------------------------------


def _live(group: ParamGroup, parameters: bool, pending: int) -> dict[str, Entry]:
    """The arrays of a group by name, as far as this process holds them; sums only while some are pending."""
    found = {}
    if parameters:
        flat = _held(group)
        dtype = group.bound.dtype
        found["params"] = Entry(dtype, [x.view("uint16") for x in flat] if dtype == "bfloat16" else flat)
    for name, array in group.store.arrays.items():
        if name != "sums" or pending:
            found[name] = Entry(group.store.kind_of(name), [array])
    if pending:
        end = -group.store.start
        for size, summed in zip(group.layout.sizes, group.store.counts["summed"], strict=True):
            end += size
            if not summed:  # what lies there is of an earlier step
                found["sums"].pieces[0][max(end - size, 0) : max(end, 0)] = 0
    return found


def _held(group: ParamGroup) -> list[Array]:
    """The parameters of a group, flat, as far as their state is in this process."""
    found, at = [], -group.store.start
    for array, size in zip(group.layout.arrays, group.layout.sizes, strict=True):
        found.append(array.reshape(-1)[max(-at, 0) : max(group.store.size - at, 0)])
        at += size
    return found


def _counts(group: ParamGroup, pending: int) -> dict[str, Array]:
    """The counts of each array of a group by name."""
    return {name: array for name, array in group.store.counts.items() if name != "summed" or pending}


def checked_counts(group: ParamGroup, pending: int) -> dict[str, Array]:
    """The same, where no load would refuse what was written into them."""
    counts = _counts(group, pending)
    for name, array in counts.items():
        check_count(name, array, f"param_groups[{group.index}]")
    return counts


def check_count(name: str, counts: Array, where: str) -> None:
    """Raise if one of the counts of a group's arrays is out of range."""
    if _COUNTS[name] != "uint8" and not ((counts >= 0) & (counts < 1 << 62)).all():
        raise ValueError(
            f"{where}: {name} must not be negative, NaN or 2**62 and more, got {counts.min()} .. {counts.max()}"
        )


def _bounds(bounds: Any) -> Any:
    """Bounds in a form that JSON can hold: it has no infinity, so None stands for it."""
    if bounds is None:
        return None
    if not all(side is None or isinstance(side, (int, float, np.number)) for side in bounds):
        return "arrays"
    sides = [None if side is None else real("bounds", side) for side in bounds]
    return [None if side is None or math.isinf(side) else side for side in sides]


def _form(group: ParamGroup) -> dict[str, Any]:
    """What can't change in a group: its formats and its cut."""
    return {
        "dtype": group.bound.dtype,
        "state_dtype": "float64" if group.computed == "float64" else group.options["state_dtype"] or "float32",
        "master": group.options["master"],
        "rounding": group.options["rounding"],
        "row_lengths": group.layout.row_lengths() if group.store.by_row else None,  # where rows have second moments
        "sizes": group.layout.sizes,
        "names": list(group.layout.keys) if group.layout.keys else None,
    }


def _group(group: ParamGroup) -> dict[str, Any]:
    """A group without its arrays."""
    followed = group.schedules
    options = {name: x for name, x in group.options.items() if name not in followed and name not in _FIXED}
    options["bounds"] = _bounds(options["bounds"])
    return {
        **_form(group),
        "options": options,
        "schedules": {name: schedules.plain(x) for name, x in followed.items()},
    }


def describe(run: Run, groups: Sequence[ParamGroup]) -> dict[str, Any]:
    """Describe a run without its arrays.  groups: its own, or those that it is to have."""
    plan = run.plan
    return {
        "format": "adaptive_c",
        "version": VERSION,
        "class": run.rule.label,
        "t": plan.t,
        "skipped_steps": plan.skipped_steps,
        "grad_norm": plan.grad_norm if math.isfinite(plan.grad_norm) else str(plan.grad_norm),  # as JSON can hold it
        "pending": plan.pending,
        "scaler": {"scale": plan.loss_scale, "growth_tracker": plan.growth_tracker} if plan.dynamic else None,
        "settings": {name: x for name, x in plan.settings.items() if not moves(x)},
        "schedules": {name: schedules.plain(x) for name, x in plan.settings.items() if moves(x)},
        "groups": [_group(group) for group in groups],
    }


def state_dict(run: Run) -> dict[str, Any]:
    """All of a run but the parameters, as a dict."""
    with run.guard:
        return held(run)


def held(run: Run) -> dict[str, Any]:
    """All of a run but the parameters, while the caller holds the guard."""
    run.plan.settle()
    found, pending = describe(run, run.groups), run.plan.pending
    for group, about in zip(run.groups, found["groups"], strict=True):
        arrays = {name: group.store.array(name) for name in _live(group, False, pending)}
        about["arrays"] = {**arrays, **checked_counts(group, pending)}
    return found


def contents(run: Run, parameters: bool) -> tuple[dict[str, Any], dict[str, Entry]]:
    """What a file has: a run without its arrays, and the arrays as far as this process holds them."""
    run.plan.settle()
    about, counts = counted(run, run.plan.pending)
    arrays: dict[str, Entry] = {}
    for i, group in enumerate(run.groups):
        live = _live(group, parameters, run.plan.pending)
        if parameters and run.plan.pages is not None:
            kind, pieces = live["params"]
            live["params"] = Entry(kind, [run.plan.pages.slices(piece) for piece in pieces])
        arrays |= {f"{i}.{name}": entry for name, entry in live.items()}
    return about, arrays | counts


def counted(run: Run, pending: int) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Describe a run without its arrays, and return their counts beside it.  pending: how many calls of accumulate."""
    about = {**describe(run, run.groups), "pending": pending}
    counts: dict[str, list[Array]] = {}  # of all groups, one after the other
    for i, group in enumerate(run.groups):
        if (names := about["groups"][i]["names"]) is not None:
            about["groups"][i]["names"] = [encoded(key, f"params of group {i}") for key in names]
        for name, array in checked_counts(group, pending).items():
            counts.setdefault(name, []).append(array)
    return about, {name: Entry(_COUNTS[name], pieces) for name, pieces in counts.items()}


def save(run: Run, path: Any, parameters: bool) -> None:
    """Write a run into one file."""
    with run.guard:
        file.write(path, *contents(run, parameters))


# --- restoring -------------------------------------------------------------------------------------------------------


def _read(array: Any, start: int, out: Array) -> None:
    """Copy elements of an array from a file, or of one from a state_dict."""
    if isinstance(array, file.Stored):
        array.read(start, out)
    else:
        out[...] = array[start : start + out.size]


def load_state_dict(run: Run, d: Any) -> None:
    """Restore a run from the dict that `state_dict` gave."""
    groups = d.get("groups") if isinstance(d, _DICT) else None
    if isinstance(groups, (list, tuple)):
        d = {**d, "groups": (groups := tuple(groups))}  # what is counted and checked is what is used
    for i, group in enumerate(groups if isinstance(groups, tuple) else ()):
        for name, array in _get(group, "arrays", _DICT, f"state_dict['groups'][{i}]").items():
            if not isinstance(array, np.ndarray) or array.ndim != 1:
                raise TypeError(f"state_dict['groups'][{i}]['arrays'][{name!r}] must be a flat NumPy array, as "
                                f"state_dict() gives it; got {type(array).__name__}")  # fmt: skip
    with run.guard:
        complete(run, _prepare(run, d, "state_dict", parameters=False))


def load(run: Run, path: Any, parameters: bool) -> None:
    """Restore a run from a file."""
    with run.guard, file.reading(path) as (head, arrays):
        complete(run, prepare(run, head, arrays, str(path), parameters))


def complete(run: Run, write: Callable[[], None]) -> None:
    """Write what a load has checked into the run."""
    if run.plan.pages is None:
        write()
    else:
        run.plan.conduct(partial(run.plan.pages.load, write))


def prepare(run: Run, head: Any, arrays: Mapping[str, Any], where: str, parameters: bool) -> Callable[..., None]:
    """Check what a file has, and allocate what is needed; what is returned reads it, and writes; see `_prepare`."""
    groups = _get(head, "groups", list, where)
    for group in groups:
        group["arrays"] = {}
        if head.get("version") != 1 and isinstance(group.get("names"), list):
            group["names"] = [decoded(name) for name in group["names"]]
    for label, array in arrays.items():
        index, _, name = label.partition(".")
        if index.isdecimal() and int(index) < len(groups):
            groups[int(index)]["arrays"][name] = array
        elif index in _COUNTS:
            _share_out(index, array, groups, where)
    return _prepare(run, head, where, parameters=parameters)


def _share_out(name: str, stored: Any, groups: tuple[Any, ...], where: str) -> None:
    """Give each group its part of the counts of all of them."""
    counts, at = np.empty(stored.size, stored.dtype), 0
    stored.read(0, counts)
    for group in groups:
        n = len(group["sizes"]) if isinstance(group.get("sizes"), list) else 0
        group["arrays"][name] = counts[at : at + n]
        at += n
    if at != stored.size:
        numbers = core.counted(stored.size, "number")
        raise ValueError(f"{where} has {numbers} in {name!r} for {core.counted(at, 'array')}")


def _get(d: Any, key: str, kind: Any, where: str) -> Any:
    """Return d[key]; raise unless it is there and of that kind.  A list comes as a tuple: what is counted is used."""
    if not isinstance(d, _DICT):
        raise TypeError(f"{where} must be a dict, as state_dict() gives it; got {type(d).__name__}")
    if key not in d:
        raise ValueError(f"{where} has no {key!r}: it is not a complete state of an adaptive_c optimizer")
    value = d[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{where}[{key!r}] can't be {value!r}")
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _count(d: Any, key: str, where: str) -> int:
    """A count of the description, checked."""
    n: int = _get(d, key, (int, np.integer), where)
    if not 0 <= n < 1 << 62:
        raise ValueError(f"{where}[{key!r}] must be in [0, 2**62), got {n}")
    return int(n)


def _prepare(run: Run, d: Any, where: str, parameters: bool) -> Callable[..., None]:
    """Check everything and allocate what is needed; what is returned writes: all, or with False all but the arrays."""
    plan = run.plan
    version = _get(d, "version", int, where)
    if _get(d, "format", str, where) != "adaptive_c" or not 1 <= version <= VERSION:
        raise ValueError(
            f"{where} was written as {d['format']!r}, version {version}; this adaptive_c reads 'adaptive_c', versions "
            f"1 to {VERSION}: use the one that wrote it, or a later one"
        )
    if _get(d, "class", str, where) != run.rule.label:
        raise ValueError(f"{where} is of {d['class']}, this optimizer is {run.rule.label}")
    groups = _get(d, "groups", (list, tuple), where)
    if len(groups) != len(run.groups):
        given = core.counted(len(groups), "parameter group")
        raise ValueError(f"{where} has {given}, this optimizer {len(run.groups)}")
    t, skipped = _count(d, "t", where), _count(d, "skipped_steps", where)
    grad_norm = _get(d, "grad_norm", (int, float, str), where)
    if isinstance(grad_norm, str) and grad_norm not in ("nan", "inf"):
        raise ValueError(f"{where}['grad_norm'] can't be {grad_norm!r}")
    pending = _count(d, "pending", where)
    given = dict(_get(d, "settings", _DICT, where))
    followed = _get({"schedules": {}, **d}, "schedules", _DICT, where)  # files of old versions have none
    if unknown := (given.keys() | followed.keys()) - plan.settings.keys():
        raise ValueError(f"{where} has the unknown setting {min(unknown, key=str)!r}")
    given |= {name: _revived(x, plan.settings[name], f"{where}: {name}") for name, x in followed.items()}
    settings = run.checked({**plan.settings, **given}, where=f"{where}: ", t=t)
    scale, tracker = _read_scaler(run, _get(d, "scaler", (*_DICT, type(None)), where), settings, where)
    work = [
        _check_group(group, about, f"{where}: group {group.index}", version, parameters, t, pending)
        for group, about in zip(run.groups, groups, strict=True)
    ]
    if pending:
        plan.need_sums(plan.groups)
    for group, (changes, _, _) in zip(run.groups, work, strict=True):
        group.bound.make_room(changes)

    def write(all_arrays: bool = True) -> None:  # from here on nothing is refused
        plan.forget()
        plan.configure(settings)
        for group, about, (changes, bounds, counts) in zip(run.groups, groups, work, strict=True):
            group.bound.commit(changes, bounds)
            for name, array in counts.items():
                group.store.counts[name][:] = array
            for name, entry in _live(group, parameters, pending).items() if all_arrays else ():
                at = group.store.place(name)[0]
                for piece in entry.pieces:
                    whole = (piece,) if plan.pages is None else plan.pages.slices(piece)
                    for part in whole if isinstance(piece, np.ndarray) else ():
                        _read(about["arrays"][name], at, part)
                        at += part.size
        if all_arrays and plan.pages is not None:
            plan.pages.fill(lambda i, name, at, out: _read(groups[i]["arrays"][name], at, out))
        plan.set_counts(t, skipped, float(grad_norm), pending, scale, tracker)
        plan.write_copies()

    return write


def _read_scaler(run: Run, scaler: Any, settings: Mapping[str, Any], where: str) -> tuple[float, int]:
    """The loss scale and the growth tracker."""
    if (scaler is None) == run.plan.dynamic:
        has, lacks = ("without", "with") if scaler is None else ("with", "without")
        raise ValueError(
            f"{where} was saved {has} a dynamic loss scale, this optimizer is {lacks}: construct it the same way"
        )
    if (settings["loss_scale"] == "dynamic") != (scaler is not None):
        raise ValueError(f"{where} has the loss_scale {settings['loss_scale']!r} and the scaler {scaler!r}")
    if scaler is None:
        return settings["loss_scale"], 0
    for name in ("scale", "growth_tracker"):
        _get(scaler, name, (int, float), f"{where}['scaler']")
    tracker = whole(f"{where}: growth_tracker", scaler["growth_tracker"])
    if tracker >= GROWTH_INTERVAL:
        raise ValueError(f"{where}: growth_tracker must be in [0, {GROWTH_INTERVAL}), got {tracker}")
    return check_scale(f"{where}: loss_scale", scaler["scale"]), tracker


def _check_group(
    group: ParamGroup, d: Any, where: str, version: int, parameters: bool, t: int, pending: int
) -> tuple[dict[str, Any], Any, dict[str, Array]]:
    """Compare a description with a group; the options to be changed, the bounds among them, and the counts."""
    ours = _form(group)
    for key in ("dtype", "state_dtype", "master", "rounding"):
        what = "parameters are" if key == "dtype" else f"{key} is"
        if _get(d, key, (str, type(None)), where) != ours[key]:
            raise ValueError(f"{where}: its {what} {d[key]!r}, this optimizer's {ours[key]!r}; they can't be converted:"
                             " construct the optimizer as the saved one was")  # fmt: skip
    sizes = _get(d, "sizes", (list, tuple), where)
    for size in sizes:
        if type(size) is bool or not isinstance(size, (int, np.integer)) or size < 0:
            raise ValueError(f"{where}: its sizes can't be {size!r}; they are whole numbers")
    sizes = list(map(int, sizes))
    names = _get(d, "names", (list, tuple, type(None)), where)
    _check_cut(sizes, names, ours, version, where)
    _check_rows(d.get("row_lengths"), ours["row_lengths"], where)  # files of earlier versions don't have it
    arrays = _get(d, "arrays", _DICT, where)
    store = group.store
    wanted = {name: (array.dtype, store.place(name)[1]) for name, array in store.arrays.items() if name != "sums"}
    if parameters:
        wanted["params"] = np.dtype("uint16" if ours["dtype"] == "bfloat16" else ours["dtype"]), group.bound.size
    if pending:
        wanted["sums"] = np.dtype(group.computed), group.bound.size
    _check_arrays(arrays, wanted, d, where, parameters)
    counts = {name: _read_count(arrays, name, len(sizes), where) for name in _counts(group, pending)}
    counts = recut(sizes, ours["sizes"], counts, where)
    changes = _read_options(group, d, where)
    return (*(group.checked(changes, t, f"{where}: ") if changes else ({}, None)), counts)


def _check_cut(sizes: list[int], names: Any, ours: dict[str, Any], version: int, where: str) -> None:
    """Raise if the description's arrays can't be cut into this optimizer's."""
    if not sizes:
        raise ValueError(f"{where}: its sizes can't be {sizes}")
    if sum(sizes) != sum(ours["sizes"]):
        raise ValueError(f"{where} has {core.counted(sum(sizes), 'element')}, this optimizer's {sum(ours['sizes'])}")
    if names is None or ours["names"] is None:
        return
    for name in names:
        if not isinstance(name, Hashable):
            raise ValueError(f"{where}: its names can't be {name!r}")
    own, remedy = ours["names"], "; a list of arrays loads into any names, and from any names into a list"
    if len(names) != len(sizes):
        raise ValueError(f"{where} has {core.counted(len(names), 'name')} for {core.counted(len(sizes), 'array')}")
    if len(names) != len(own) or not all(matches(a, b, version) for a, b in zip(names, own, strict=True)):
        same = len(names) == len(own) and all(any(matches(a, b, version) for b in own) for a in names)
        hint = " (the same in another order, which is the order of the elements)" if same else ""
        raise ValueError(f"{where} has the arrays {', '.join(map(repr, names))}, this optimizer's "
                         f"{', '.join(map(repr, own))}{hint}{remedy}")  # fmt: skip
    for name, size, mine in zip(own, sizes, ours["sizes"], strict=True):
        if size != mine:
            elements = core.counted(size, "element")
            raise ValueError(f"{where}: array {name!r} has {elements}, this optimizer's {mine}{remedy}")


def _check_rows(given: Any, ours: Any, where: str) -> None:
    """Raise if the second moments by row belong to arrays that are cut into other rows."""
    if (given is None) != (ours is None):
        kinds = ["row" if x is not None else "element" for x in (given, ours)]
        raise ValueError(f"{where}: its second_moment is {kinds[0]!r}, this optimizer's {kinds[1]!r}; they can't be "
                         "converted: construct the optimizer as the saved one was")  # fmt: skip
    lengths = [list(x) if isinstance(x, tuple) else x for x in given] if isinstance(given, (list, tuple)) else given
    if lengths != ours:
        raise ValueError(
            f"{where} has second moments of other rows: [rows, elements of each] are {lengths}, this optimizer's {ours}"
        )


def _check_arrays(
    arrays: Any, wanted: "dict[str, tuple[np.dtype[Any], int]]", d: Any, where: str, parameters: bool
) -> None:
    """Raise unless a group has exactly the wanted arrays, each with its dtype and size."""
    names = arrays.keys() - _COUNTS.keys() - (set() if parameters else {"params"})
    if parameters and "params" not in names:
        raise ValueError(
            f"{where} has no parameters: it was saved without; load(path, parameters=False) loads the rest"
        )
    if names != wanted.keys():
        options = _get(d, "options", _DICT, where)
        switches = [f"{k}={options[k]!r}" for k in ("amsgrad", "centered", "momentum", "ema_decay") if k in options]
        raise ValueError(
            f"{where} has the state {', '.join(sorted(map(str, names))) or 'none'}, this optimizer's "
            f"{', '.join(sorted(wanted)) or 'none'}; construct it with the options of the saved one"
            + (f" ({', '.join(switches)})" if switches else "")
        )
    for name, (dtype, size) in wanted.items():
        if arrays[name].dtype != dtype or arrays[name].size != size:
            elements = core.counted(arrays[name].size, "element")
            raise ValueError(
                f"{where}: {name} has {elements} of {arrays[name].dtype}, this optimizer's {size} of {dtype}"
            )


def _read_count(arrays: Any, name: str, n: int, where: str) -> Array:
    """The counts of a group's arrays, checked."""
    if name not in arrays or arrays[name].dtype != _COUNTS[name] or arrays[name].size != n:
        numbers = core.counted(n, "number")
        raise ValueError(f"{where} must have {name!r}, {numbers} of {_COUNTS[name]}, one for each array")
    out = np.empty(n, _COUNTS[name])
    _read(arrays[name], 0, out)
    check_count(name, out, where)
    return out


def _read_options(group: ParamGroup, d: Any, where: str) -> dict[str, Any]:
    """All options of a group, numbers and schedules, as they are to be assigned."""
    given = dict(_get(d, "options", _DICT, where))
    followed = _get(d, "schedules", _DICT, where)
    own = group.options
    if unknown := (given.keys() | followed.keys()) - (own.keys() - _FIXED):
        known = ", ".join(name for name in own if name not in _FIXED)
        raise ValueError(f"{where} has the unknown option {min(unknown, key=str)!r}; this optimizer has {known}")
    now = _bounds(own["bounds"])
    bounds = given.pop("bounds", now)
    bounds = list(bounds) if isinstance(bounds, (list, tuple)) else bounds
    if bounds not in (None, "arrays") and not (isinstance(bounds, list) and len(bounds) == 2):
        raise ValueError(f"{where}: its bounds can't be {bounds!r}")
    if bounds == "arrays" and now != "arrays":
        raise ValueError(
            f"{where} had arrays as bounds, which are not stored: construct the optimizer with the same bounds"
        )
    given = {name: value for name, value in given.items() if not _in_force(value, own[name])}
    if bounds not in ("arrays", now):
        given["bounds"] = None if bounds is None else tuple(bounds)
    return {**given, **{name: _revived(x, own.get(name), f"{where}: {name}") for name, x in followed.items()}}


def _in_force(value: Any, own: Any) -> bool:
    """Whether this plain value is in force already.  Then it needs no check, which saves time with many groups."""
    if isinstance(own, tuple) and isinstance(value, (list, tuple)) and len(value) == len(own):
        return all(map(_in_force, value, own))
    return type(value) is type(own) and type(own) in (float, bool, str, type(None)) and value == own


def _revived(given: Any, own: Any, where: str) -> Any:
    """The inverse of `schedules.plain`; own: what this optimizer has there."""
    try:
        return schedules.revived(given, own)
    except schedules.MissingError:
        raise ValueError(f"{where} followed a function of your own, which can't be stored: construct the optimizer "
                         "with it, or assign it, and load again") from None  # fmt: skip
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None

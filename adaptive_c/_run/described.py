"""Schedules <-> dicts of numbers, strings and lists, which JSON and checkpoints can hold."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from .options import moves

NAMED: dict[str, Any] = {}  # the classes of adaptive_c.schedules, which enters them, by name
OF_SCHEDULES = {"of", "schedules"}  # their arguments that are schedules themselves


class MissingError(ValueError):
    """A function that the user wrote is needed, but none was given."""


def is_ours(cls: Any) -> bool:
    """Whether it is one of the classes of adaptive_c.schedules itself, and not one that a user derived from them."""
    return NAMED.get(cls.__name__) is cls


def plain(value: Any, own: Callable[[Any], None] = lambda own: None) -> Any:
    """A value as a checkpoint holds it: a schedule becomes a dict and a tuple a list.

    For a user's function or schedule class, `own` is called with it and what `own` returns (by default None) is stored.
    """
    if isinstance(value, tuple):
        return [plain(x, own) for x in value]
    if is_ours(type(value)):
        return {"schedule": type(value).__name__, **{f.name: plain(getattr(value, f.name), own) for f in fields(value)}}
    return own(value) if moves(value) else value


def revived(value: Any, own: Any = None, *, schedule: bool = True) -> Any:
    """The inverse of `plain`.

    own: a schedule built like `value`, from which the user's functions are taken.  schedule: whether None stands for
    such a function.
    """
    if isinstance(value, (list, tuple)):
        value = tuple(value)  # what is counted is what is used
        owns = own if isinstance(own, tuple) and len(own) == len(value) else (None,) * len(value)
        return tuple(revived(x, y, schedule=schedule) for x, y in zip(value, owns, strict=True))
    if isinstance(value, Mapping):
        return _built(value, own)
    if value is not None or not schedule:
        return value
    if not moves(own) or is_ours(type(own)):
        raise MissingError("a function of your own is needed in this place")
    return own


def _built(d: Mapping[str, Any], own: Any) -> Any:
    """A schedule from the dict that describes it, checked."""
    name = d.get("schedule")
    if not isinstance(name, str) or name not in NAMED:
        raise ValueError(f"the dict names the schedule {name!r}; there is {', '.join(NAMED)}")
    cls = NAMED[name]
    known = {f.name: f for f in fields(cls)}
    if unknown := [key for key in d if key not in known and key != "schedule"]:
        raise ValueError(f"{name} has no {unknown[0]!r}; it has {', '.join(known)}")
    if missing := [key for key, f in known.items() if key not in d and f.default is MISSING]:
        raise ValueError(f"{name} needs {missing[0]!r}")
    owns = {key: getattr(own, key) for key in known} if type(own) is cls else {}
    return cls(**{key: revived(d[key], owns.get(key), schedule=key in OF_SCHEDULES) for key in known if key in d})

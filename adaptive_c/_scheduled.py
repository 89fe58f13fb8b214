"""Options that follow a schedule: which they are, and their numbers for a step.

A schedule is anything that can be called with the number of applied steps; in the place of a pair, such as betas, it
is a tuple of schedules and numbers, or gives a pair.  Schedules are found by what they can do, not by their class, so
that nobody imports `schedules` who has none.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ._options import CHECKS, _real

Number = float | Callable[[int], float]
Pair = tuple[Number, Number]

# The others are switches, or what is stored and bound at construction.
_PAIRS = {"betas", "etas", "step_sizes"}
MOVABLE = _PAIRS | {"lr", "weight_decay", "eps", "alpha", "rho", "momentum", "dampening", "lr_decay", "momentum_decay",
                    "eta_plus", "eta_minus", "max_rate", "ema_decay"}  # fmt: skip


def moves(value: Any) -> bool:
    """Is this a schedule?  A type is none: number formats come as types, and float(t) is nobody's wish."""
    return callable(value) and not isinstance(value, type)


def schedules_in(options: Mapping[str, Any], cls: Any, where: str) -> dict[str, Any]:
    """Those of the options of a group that are schedules."""
    found = {}
    for name, value in options.items():
        pair = isinstance(value, (tuple, list)) and any(map(moves, value))
        if name in MOVABLE - _PAIRS and not (moves(value) or isinstance(value, (int, float, np.number, type(None)))):
            raise TypeError(f"{where}{name} must be a number, or a schedule such as schedules.cosine(1e-3, 10_000); "
                            f"got {value!r}")  # fmt: skip
        if not pair and not moves(value):
            continue
        if name not in MOVABLE:
            names = ", ".join(name for name in options if name in MOVABLE)
            raise TypeError(f"{where}{name} can't follow a schedule, got {value!r}; what can: {names}")
        if name == "lr" and cls._rule in ("rprop", "supersab"):
            raise ValueError(f"{where}lr of {cls.__name__} is read at an array's first step only and can't follow a "
                             f"schedule, got {value!r}; give a number")  # fmt: skip
        if pair:
            parts = tuple(x if moves(x) else _real(f"{where}{name}[{i}]", x) for i, x in enumerate(value))
            same = isinstance(value, tuple) and all(x is y for x, y in zip(value, parts, strict=True))
            value = value if same else parts  # whoever compares it finds that it was not assigned again
        found[name] = value
    return found


def numbers_at(schedules: Mapping[str, Any], t: int, where: str) -> dict[str, Any]:
    """What schedules say for the step that follows t applied ones, checked."""
    numbers = {}
    for name, schedule in schedules.items():
        label = f"{where}at t={t} {name}"
        try:
            parts = schedule if isinstance(schedule, tuple) else (schedule,)
            values = tuple(part(t) if moves(part) else part for part in parts)
        except Exception as error:
            error.add_note(f"raised by the schedule of {label}: {schedule!r}")
            raise
        value = values if parts is schedule else values[0]
        if value is None:  # which means "off" elsewhere
            raise TypeError(f"{label} must be a number, got None from {schedule!r}")
        numbers[name] = CHECKS[name](label, value)
    return numbers


def observed(schedules: Mapping[str, Any], t: int, metric: float) -> dict[str, Any]:
    """Those of the schedules that have a plateau in them, after a metric with the step that followed t applied ones."""

    def seen(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(map(seen, part))
        return part.observe(t, metric) if getattr(part, "reads_metric", False) else part

    after = {name: seen(schedule) for name, schedule in schedules.items()}
    return {name: schedule for name, schedule in after.items() if _reads(schedule)}


def _reads(schedule: Any) -> bool:
    parts = schedule if isinstance(schedule, tuple) else (schedule,)
    return any(getattr(part, "reads_metric", False) for part in parts)

"""Everything that the page shows follows from its settings: the function, the start, and up to three runs.

They are checked here, whether they come from widgets or from a link, and become a link, Python code, and the courses.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any
from urllib.parse import quote

import numpy as np

from .. import optimizers, schedules
from ..figures.problems import PLANE, Problem, Trace, trace
from .expression import parse

MOST_STEPS = 2000
LANES = ("A", "B", "C")
NUMBERS = ("lr", "beta1", "beta2", "alpha", "rho", "eps", "momentum")  # in the order of the page

# What becomes of the learning rate, given its first or highest value and the number of steps.
SCHEDULES: dict[str, Callable[[float, int], Any]] = {
    "constant": lambda lr, steps: lr,
    "linear": lambda lr, steps: schedules.linear(lr, steps),
    "cosine": lambda lr, steps: schedules.cosine(lr, steps),
    "step": lambda lr, steps: schedules.step(lr, max(steps // 4, 1), gamma=0.5),
    "inverse_sqrt": lambda lr, steps: schedules.inverse_sqrt(lr),
    "one_cycle": lambda lr, steps: schedules.one_cycle(lr, steps),
    "warmup": lambda lr, steps: schedules.warmup(schedules.cosine(lr, steps), max(steps // 10, 1)),
}


@cache
def defaults(rule: str) -> Mapping[str, float]:
    """The numbers of a rule that the page can change, at the rule's defaults."""
    options = {name: p.default for name, p in inspect.signature(getattr(optimizers, rule)).parameters.items()}
    if "betas" in options:
        options["beta1"], options["beta2"] = options["betas"]
    return {name: options[name] for name in NUMBERS if name in options}


def reads_lr_once(rule: str) -> bool:
    """Whether a schedule would change nothing."""
    return "lr" in getattr(optimizers, rule).rule.read_once


@dataclass(frozen=True)
class Lane:
    """One optimizer: the name of its rule, its numbers by name, and the schedule of its learning rate."""

    rule: str
    numbers: Mapping[str, float]
    schedule: str = "constant"

    def __post_init__(self) -> None:
        if self.rule not in optimizers.__all__:
            raise ValueError(f"there is no rule {self.rule!r}; there are {', '.join(optimizers.__all__)}")
        known = defaults(self.rule)
        for name, value in self.numbers.items():
            if name not in known:
                raise ValueError(f"{self.rule} has no {name!r}; it has {', '.join(known)}")
            _finite(f"{self.rule}: {name}", value)
        choices = ["constant"] if reads_lr_once(self.rule) else list(SCHEDULES)
        if self.schedule not in choices:
            raise ValueError(f"{self.rule}: schedule must be one of {', '.join(choices)}, got {self.schedule!r}")
        object.__setattr__(self, "numbers", {**known, **self.numbers})
        getattr(optimizers, self.rule)(np.zeros(2), **self.options(1))  # has the optimizer check the numbers

    def options(self, steps: int) -> dict[str, Any]:
        """The arguments of the optimizer for a run of so many steps."""
        numbers = dict(self.numbers)
        options: dict[str, Any] = {"lr": SCHEDULES[self.schedule](numbers.pop("lr"), steps)}
        if "beta1" in numbers:
            options["betas"] = numbers.pop("beta1"), numbers.pop("beta2")
        return {**options, **numbers}


@dataclass(frozen=True)
class Settings:
    """What the page shows.  Constructing one checks it, and raises ValueError with what is wrong."""

    formula: str = PLANE["bowl"].formula
    start: tuple[float, float] = (-15.0, 20.0)
    window: tuple[tuple[float, float], tuple[float, float]] = ((-20.0, 20.0), (-25.0, 25.0))
    steps: int = 100
    lanes: tuple[Lane | None, ...] = (None, None, None)

    def __post_init__(self) -> None:
        parse(self.formula)
        for i in range(2):
            _finite(f"the start's w{i + 1}", self.start[i])
            low, high = self.window[i]
            if not (_finite("the window", low) < _finite("the window", high) and high - low < math.inf):
                raise ValueError(f"the window of w{i + 1} must go from a lower number to a higher, got {low}, {high}")
        if not isinstance(self.steps, int) or not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"the number of iterations must be 1 to {MOST_STEPS}, got {self.steps!r}")

    @property
    def problem(self) -> Problem:
        function = parse(self.formula)
        return Problem(self.formula, function.value, function.gradient, self.start, self.window)

    def run(self, i: int) -> Trace | None:
        """The course of the optimizer in lane i."""
        lane = self.lanes[i]
        return None if lane is None else trace(lane.rule, self.problem, self.steps, **lane.options(self.steps))

    def query(self) -> str:
        """The settings as the part of a link after the question mark."""
        entries = {
            "f": self.formula, "start": _joined(*self.start), "window": _joined(*self.window[0], *self.window[1]),
            "steps": str(self.steps),
        }  # fmt: skip
        for name, lane in zip(LANES, self.lanes, strict=True):
            if lane is not None:
                numbers = [f"{key}={value!r}" for key, value in lane.numbers.items()]
                entries[name] = ",".join([lane.rule, *numbers, f"schedule={lane.schedule}"])
        return "&".join(f"{key}={quote(value, safe='*/(),=:')}" for key, value in entries.items())

    @classmethod
    def from_query(cls, entries: Mapping[str, str]) -> "Settings":
        """The settings that `query` wrote, split at its & and = and unquoted.  What is missing keeps its default."""
        known = ["f", "start", "window", "steps", *LANES]
        if unknown := [key for key in entries if key not in known]:
            raise ValueError(f"the link has an unknown entry {unknown[0]!r}; there are {', '.join(known)}")
        settings = cls(lanes=tuple(_lane(name, entries[name]) if name in entries else None for name in LANES))
        if "f" in entries:
            settings = replace(settings, formula=entries["f"])
        if "start" in entries:
            settings = replace(settings, start=_numbers("start", entries["start"], 2))
        if "window" in entries:
            left, right, low, high = _numbers("window", entries["window"], 4)
            settings = replace(settings, window=((left, right), (low, high)))
        if "steps" in entries:
            settings = replace(settings, steps=_whole("steps", entries["steps"]))
        return settings

    def code(self) -> str:
        """Python code that makes the same runs, to the last bit."""
        lines = []
        for name, lane in zip(LANES, self.lanes, strict=True):
            if lane is not None:
                arguments = []
                for key, value in lane.options(self.steps).items():
                    shown = repr(value)
                    if isinstance(value, schedules.Schedule):
                        shown = "schedules." + shown.replace("of=", "of=schedules.")
                    arguments.append(f"{key}={shown}")
                lines.append(f"    {name!r}: lambda w: optimizers.{lane.rule}(w, {', '.join(arguments)}),")
        return f"""\
import numpy as np
from adaptive_c import optimizers, schedules
from adaptive_c.explore import parse  # exact gradients of a formula

function = parse({self.formula!r})
runs = {{
{chr(10).join(lines)}
}}
paths, errors = {{}}, {{}}
for name, make in runs.items():
    w = np.array({list(self.start)!r})
    opt = make(w)  # it updates w in place
    path = [w.copy()]
    with np.errstate(all="ignore"):  # a run may diverge
        for _ in range({self.steps}):
            opt.step(function.gradient(w))
            path.append(w.copy())
    paths[name] = np.array(path)  # row t is w after t steps
    errors[name] = function.value(paths[name].T)
    print(name, "ends at", paths[name][-1], "with the error", errors[name][-1])
"""


def _finite(what: str, value: Any) -> float:
    """A finite number, checked."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{what} must be a finite number, got {value!r}")
    return value


def _joined(*numbers: float) -> str:
    """Numbers as a link has them."""
    return ",".join(repr(float(x)) for x in numbers)


def _numbers(what: str, text: str, n: int) -> tuple[Any, ...]:
    """So many numbers of a link, checked."""
    parts = text.split(",")
    if len(parts) != n:
        raise ValueError(f"the link's {what} must have {n} numbers with commas between them, got {text!r}")
    return tuple(_number(what, part) for part in parts)


def _number(what: str, text: str) -> float:
    """A number of a link, checked."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"the link's {what} must be a number, got {text!r}") from None


def _whole(what: str, text: str) -> int:
    """A whole number of a link, checked."""
    number = _number(what, text)
    if not number.is_integer():
        raise ValueError(f"the link's {what} must be a whole number, got {text!r}")
    return int(number)


def _lane(name: str, text: str) -> Lane:
    """An optimizer of a link, checked."""
    rule, *parts = text.split(",")
    pairs = [part.partition("=") for part in parts]
    values = {key: value for key, _, value in pairs}
    if not rule or "" in values or len(values) < len(pairs):
        raise ValueError(
            f"the link's {name} must be a rule and its numbers, each once, as in Adam,lr=0.1; got {text!r}"
        )
    schedule = values.pop("schedule", "constant")
    return Lane(rule, {key: _number(key, value) for key, value in values.items()}, schedule)

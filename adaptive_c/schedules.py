"""Schedules: hyperparameters as functions of the step number.

Pass one in a constructor or a group, ``lr=schedules.cosine(1e-3, 10_000)``, or assign it to
``opt.param_groups[0]["lr"]``.  A schedule is a small immutable object that is called with the number of steps applied
so far, ``opt.t``, which is 0 for the first step.  It is a closed form in that number, so resuming from a checkpoint
needs nothing else, and after its last step it keeps its last value.  Only `plateau` depends on more: on the metrics
that it was shown.  It keeps what it needs of them in its own fields, and each metric replaces it by a new plateau.

Any other function of the step number works as well: ``lr=lambda t: 0.1 / (1 + t)``.

Schedules are computed by plain Python in float64; nothing here needs the compiled core.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, Literal

from ._docstrings import document, import_of
from ._run.described import NAMED
from ._run.described import MissingError as MissingError  # these three are for checkpoints, too
from ._run.described import plain as plain
from ._run.described import revived as revived
from ._run.habits import absent
from ._run.options import moves, real
from ._schedule import Schedule

__all__ = [  # noqa: RUF022  from simple to composed
    "Schedule", "constant", "step", "multistep", "exponential", "linear", "polynomial", "cosine", "cosine_restarts",
    "inverse_sqrt", "one_cycle", "plateau", "warmup", "chain", "from_dict",
]  # fmt: skip


@dataclass(frozen=True, repr=False)
class constant(Schedule):
    """A constant: base at every step.

    >>> constant(0.5)(1000)
    0.5
    """

    base: float

    def __call__(self, step: int) -> float:
        return self.base


@dataclass(frozen=True, repr=False)
class step(Schedule):
    """Stairs: base gamma^floor(t / step_size), multiplied by gamma every step_size steps.  torch: StepLR.

    >>> [step(1.0, 2, gamma=0.5)(t) for t in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """

    base: float
    step_size: int
    gamma: float = 0.1

    def __call__(self, step: int) -> float:
        return self.base * self.gamma ** (step // self.step_size)


@dataclass(frozen=True, repr=False)
class multistep(Schedule):
    """Stairs: base gamma^k, where k milestones have been reached.  torch: MultiStepLR.

    >>> [multistep(1.0, [1, 3], gamma=0.5)(t) for t in range(5)]
    [1.0, 0.5, 0.5, 0.25, 0.25]
    """

    base: float
    milestones: tuple[int, ...] | list[int]
    gamma: float = 0.1

    def __call__(self, step: int) -> float:
        return self.base * self.gamma ** bisect_right(self.milestones, step)


@dataclass(frozen=True, repr=False)
class exponential(Schedule):
    """Exponential decay: base gamma^t.  torch: ExponentialLR.

    >>> [exponential(1.0, 0.5)(t) for t in range(4)]
    [1.0, 0.5, 0.25, 0.125]
    """

    base: float
    gamma: float

    def __call__(self, step: int) -> float:
        return self.base * self.gamma**step


@dataclass(frozen=True, repr=False)
class linear(Schedule):
    """A straight line: base + (end - base) t / steps, up to t = steps.

    torch: LinearLR(opt, a, b, steps) is linear(a lr, steps, end=b lr).

    >>> [linear(1.0, 4)(t) for t in range(6)]
    [1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    """

    base: float
    steps: int
    end: float = 0.0

    def __call__(self, step: int) -> float:
        return self.base + (self.end - self.base) * (step / self.steps) if step < self.steps else self.end


@dataclass(frozen=True, repr=False)
class polynomial(Schedule):
    """A power of what is left: end + (base - end) (1 - t / steps)^power, up to t = steps.

    torch: PolynomialLR, whose end is 0.

    >>> [polynomial(1.0, 2, power=2.0)(t) for t in range(4)]
    [1.0, 0.25, 0.0, 0.0]
    """

    base: float
    steps: int
    power: float = 1.0
    end: float = 0.0

    def __call__(self, step: int) -> float:
        return self.end + (self.base - self.end) * math.pow(1 - min(step, self.steps) / self.steps, self.power)


@dataclass(frozen=True, repr=False)
class cosine(Schedule):
    """Half a period of a cosine: end + (base - end) (1 + cos(pi t / steps)) / 2, up to t = steps.

    torch: CosineAnnealingLR(opt, steps, end), which rises again after its T_max.

    >>> [cosine(1.0, 4)(t) for t in (0, 2, 4, 6)]
    [1.0, 0.5, 0.0, 0.0]
    """

    base: float
    steps: int
    end: float = 0.0

    def __call__(self, step: int) -> float:
        return self.end + (self.base - self.end) * (1 + math.cos(math.pi * (min(step, self.steps) / self.steps))) / 2


@dataclass(frozen=True, repr=False)
class cosine_restarts(Schedule):
    """A cosine from base to end over `steps` steps, then repeated, each time `mult` times as long as the time before.

    torch: CosineAnnealingWarmRestarts(opt, steps, mult, end).

    >>> [cosine_restarts(1.0, 2, mult=2)(t) for t in (0, 2, 4, 6)]
    [1.0, 1.0, 0.5, 1.0]
    """

    base: float
    steps: int
    mult: int = 1
    end: float = 0.0

    def __call__(self, step: int) -> float:
        length = self.steps
        if self.mult == 1:
            step %= length
        while step >= length:
            step, length = step - length, length * self.mult
        return self.end + (self.base - self.end) * (1 + math.cos(math.pi * step / length)) / 2


@dataclass(frozen=True, repr=False)
class inverse_sqrt(Schedule):
    """Linear up to base, then falling as 1 / sqrt(n): base min(n / warmup_steps, sqrt(warmup_steps / n)), n = t + 1.

    This is the schedule of the Transformer ("Noam": Vaswani et al. 2017, section 5.3), where
    base = (d_model warmup_steps)^-0.5.  With warmup_steps = 1 it is base / sqrt(n).  torch does not have it.

    >>> [inverse_sqrt(1.0, 2)(t) for t in (0, 1, 7)]
    [0.5, 1.0, 0.5]
    """

    base: float
    warmup_steps: int = 1

    def __call__(self, step: int) -> float:
        n = step + 1
        return self.base * min(n / self.warmup_steps, math.sqrt(self.warmup_steps / n))


@dataclass(frozen=True, repr=False)
class one_cycle(Schedule):
    """Up from base/div_factor to base, then down to base/div_factor/final_div_factor; pct_start of `steps` go up.

    With three_phase the value rises to base, falls back to its start in as many steps, and then falls to the end.

    torch: OneCycleLR(opt, max_lr=base, total_steps=steps), with the same anneal_strategy, "cos" or "linear", and
    three_phase.  As there, the first phase ends at step pct_start * steps - 1 and the last at steps - 1.  torch's cycle
    of a momentum from high to low to high is ``one_cycle(low, steps, div_factor=low / high, final_div_factor=1.0)``.

    Paper: Smith & Topin 2018, arXiv 1708.07120.

    >>> [round(one_cycle(1.0, 11, pct_start=0.5, anneal_strategy="linear")(t), 4) for t in (0, 4, 5, 10)]
    [0.04, 0.8933, 0.9091, 0.0]
    """

    base: float
    steps: int
    pct_start: float = 0.3
    anneal_strategy: Literal["cos", "linear"] = "cos"
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False

    def __call__(self, step: int) -> float:
        last, up = self.steps - 1, self.pct_start * self.steps - 1
        start = self.base / self.div_factor
        ends = [(up, self.base), (2 * up, start)] if self.three_phase else [(up, self.base)]
        step, begin = min(step, last), 0.0
        for end, value in ends:  # where each phase but the last ends
            if step <= end:
                break
            begin, start = end, value
        else:
            end, value = last, self.base / self.div_factor / self.final_div_factor
        part = (step - begin) / (end - begin) if end != begin else 1.0
        if self.anneal_strategy == "linear":
            return (value - start) * part + start
        return value + (start - value) / 2.0 * (math.cos(math.pi * part) + 1)


@dataclass(frozen=True, repr=False)
class plateau(Schedule):
    """Multiplied by `factor` whenever more than `patience` metrics in a row were no improvement.

    ::

        better: metric < best (1 - threshold)                  mode "max": metric > best (1 + threshold)
                metric < best - threshold, if "abs"                        metric > best + threshold
        after more than patience metrics in a row that were not better:
                value <- max(factor value, min), if that is lower by more than eps;
                the next cooldown metrics don't count

    The metrics are those given to ``opt.step(grads, metric=loss)``, with every step or less often, for example once
    per epoch.  A step without a metric leaves the value alone.  A metric affects the steps after its own.  A
    non-finite metric is no improvement.

    torch: ReduceLROnPlateau, whose min_lr is `min`.

    >>> p = plateau(1.0, factor=0.5, patience=1)
    >>> for loss in (3.0, 2.0, 2.0, 2.0):
    ...     p = p.observe(0, loss)
    >>> p(4), p.best
    (0.5, 2.0)
    """

    base: float
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    _: KW_ONLY
    mode: Literal["min", "max"] = "min"
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: int = 0
    min: float = 0.0
    eps: float = 1e-8
    value: float | None = None
    best: float | None = None
    num_bad_epochs: int = 0
    cooldown_counter: int = 0

    def __call__(self, step: int) -> float:
        return self.base if self.value is None else self.value

    @property
    def reads_metric(self) -> bool:
        return True

    def _is_better(self, metric: float) -> bool:
        if self.best is None or not math.isfinite(metric):
            return math.isfinite(metric)
        sign = 1 if self.mode == "max" else -1
        if self.threshold_mode == "rel":
            return sign * metric > sign * self.best * (1.0 + sign * self.threshold)
        return sign * metric > sign * (self.best + sign * self.threshold)

    def observe(self, step: int, metric: float) -> "plateau":
        metric = metric if type(metric) is float else real("plateau: metric", metric)
        better = self._is_better(metric)
        bad, rest, value = 0 if better else self.num_bad_epochs + 1, self.cooldown_counter, self(step)
        if rest > 0:
            bad, rest = 0, rest - 1
        if bad > self.patience:
            lower = max(value * self.factor, self.min)
            value = lower if value - lower > self.eps else value
            bad, rest = 0, self.cooldown
        best = metric if better else self.best
        if (value, best, bad, rest) == (self.value, self.best, self.num_bad_epochs, self.cooldown_counter):
            return self
        after: plateau = self._with(value=value, best=best, num_bad_epochs=bad, cooldown_counter=rest)
        return after


@dataclass(frozen=True, repr=False)
class warmup(Schedule):
    """Linear from `start` to the first value of another schedule (or a number) in `steps` steps, then that schedule.

    The other schedule begins after the warm-up, at its own step 0.  With start = 0 the first step has the value 0.

    torch: SequentialLR of a LinearLR and the other schedule.

    >>> [warmup(linear(1.0, 2), 4)(t) for t in range(7)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 0.5, 0.0]
    """

    of: Any
    steps: int
    start: float = 0.0

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return float(self.of(step - self.steps))
        return self.start + (float(self.of(0)) - self.start) * (step / self.steps)

    @property
    def reads_metric(self) -> bool:
        return bool(getattr(self.of, "reads_metric", False))

    def observe(self, step: int, metric: float) -> "warmup":
        if step < self.steps or not self.reads_metric:
            return self
        seen = self.of.observe(step - self.steps, metric)
        if seen is self.of:
            return self
        after: warmup = self._with(of=seen) if moves(seen) else replace(self, of=seen)
        return after


@dataclass(frozen=True, repr=False)
class chain(Schedule):
    """Schedules (or numbers) one after another: at each milestone the next one takes over, from its own step 0.

    torch: SequentialLR(opt, schedules, milestones).  ConstantLR(opt, factor, n) is ``chain([factor * lr, lr], [n])``.

    >>> [chain([0.5, linear(1.0, 2)], [2])(t) for t in range(6)]
    [0.5, 0.5, 1.0, 0.5, 0.0, 0.0]
    """

    schedules: tuple[Any, ...] | list[Any]
    milestones: tuple[int, ...] | list[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.milestones) != len(self.schedules) - 1:
            raise ValueError(
                f"chain: {len(self.schedules)} schedules have {len(self.schedules) - 1} milestones between "
                f"them, got {len(self.milestones)}"
            )

    def _part(self, step: int) -> tuple[int, int]:
        """The index of the schedule that is in force at `step`, and the step at which it began."""
        i = bisect_right(self.milestones, step)
        return i, self.milestones[i - 1] if i else 0

    def __call__(self, step: int) -> float:
        i, begin = self._part(step)
        return float(self.schedules[i](step - begin))

    @property
    def reads_metric(self) -> bool:
        return any(getattr(part, "reads_metric", False) for part in self.schedules)

    def observe(self, step: int, metric: float) -> "chain":
        i, begin = self._part(step)
        part = self.schedules[i]
        if not getattr(part, "reads_metric", False):
            return self
        seen = part.observe(step - begin, metric)
        if seen is part:
            return self
        parts = (*self.schedules[:i], seen, *self.schedules[i + 1 :])
        after: chain = self._with(schedules=parts) if moves(seen) else replace(self, schedules=parts)
        return after


NAMED.update({cls.__name__: cls for cls in Schedule.__subclasses__()})  # so far there is none of a user's
for _cls in (Schedule, *NAMED.values()):
    document(_cls, "ARGUMENTS", import_of(__name__, NAMED))


def from_dict(d: Mapping[str, Any]) -> Schedule:
    """Make the schedule that ``to_dict`` described.

    Parameters
    ----------
    d : dict
        The name of a class under "schedule", and its arguments.

    Returns
    -------
    Schedule
        One that is equal to the one described.

    Raises
    ------
    TypeError, ValueError
        If `d` is not such a dict: it has another type, names an unknown schedule, has an unknown entry, lacks one, or
        holds a value out of range.

    Examples
    --------
    >>> from adaptive_c import schedules
    >>> schedules.from_dict({"schedule": "cosine", "base": 1.0, "steps": 100})
    cosine(base=1.0, steps=100)
    """
    if not isinstance(d, Mapping):
        raise TypeError(f"a schedule is described by a dict, got {d!r}")
    schedule: Schedule = revived(d)
    return schedule


def __getattr__(name: str) -> Any:
    raise AttributeError(absent(__name__, name, __all__))

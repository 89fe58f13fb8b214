"""The one table of options: what each may be, whether it may follow a schedule, whether it may change.

One name means one thing in every rule.  `SETTINGS` are the options of an optimizer as a whole, `ARGUMENTS` those of
schedules.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType, NoneType
from typing import Any, NamedTuple

import numpy as np

Check = Callable[[str, Any], Any]


def real(name: str, value: Any) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


@dataclass(frozen=True)
class Number:
    """A finite number in an interval, closed below and open above unless said otherwise."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = True

    def __call__(self, name: str, value: Any) -> float:
        x = real(name, value)
        if self.low < x < self.high or (x == self.low and not self.open_low) or (x == self.high and not self.open_high):
            return x
        raise ValueError(f"{name} must be in {self}, got {value!r}")

    def __str__(self) -> str:
        return f"{'(' if self.open_low else '['}{self.low:g}, {self.high:g}{')' if self.open_high else ']'}"


@dataclass(frozen=True)
class Pair:
    """Two numbers, each in an interval of its own."""

    first: Number
    second: Number
    ascending: bool = False

    def __call__(self, name: str, value: Any) -> tuple[float, float]:
        if not isinstance(value, (tuple, list, np.ndarray)) or len(parts := tuple(value)) != 2:
            raise TypeError(f"{name} must be a pair of numbers, got {value!r}")
        low, high = self.first(f"{name}[0]", parts[0]), self.second(f"{name}[1]", parts[1])
        if self.ascending and low > high:
            raise ValueError(f"{name} must be (smallest, largest), got {value!r}")
        return low, high


class Switch(int):
    """True or False, as `zero_grad` reads: equal to it, printed like it, and callable, as torch's method is."""

    def __call__(self, set_to_none: bool = True) -> None:
        """What torch's users mean, where it is done already; otherwise a TypeError that says what to write."""
        if not self:
            raise TypeError(
                "zero_grad is a setting here, and it is False: with opt.zero_grad = True, each step zeroes its "
                "gradients, and there is nothing to call; or zero your own arrays, grad[...] = 0, because an optimizer "
                "does not hold them"
            )

    def __repr__(self) -> str:
        return repr(bool(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return bool, (bool(self),)


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_, Switch)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


class Choice:
    """One of some words.  hint: what a message adds."""

    def __init__(self, *values: str, hint: str = "") -> None:
        self.values, self.hint = values, hint

    def __call__(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in self.values:
            raise ValueError(f"{name} must be {' or '.join(map(repr, self.values))}, got {value!r}{self.hint}")
        return self.values[self.values.index(value)]


class Format(Choice):
    """A dtype by its name, or anything that NumPy accepts as one."""

    def __call__(self, name: str, value: Any) -> str:
        if not isinstance(value, str):
            with suppress(TypeError):
                value = np.dtype(value).name
        return super().__call__(name, value)


@dataclass(frozen=True)
class OrNone:
    """None, or a value that the check accepts."""

    check: Check

    def __call__(self, name: str, value: Any) -> Any:
        return None if value is None else self.check(name, value)


def anything(name: str, value: Any) -> Any:  # checked where the arrays are known
    return value


def whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{name} must be in [0, 2**64), got {value}")
    return int(value)


def _count(low: int) -> Check:
    def check(name: str, value: Any) -> int:
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value.__index__() < low:
            raise ValueError(f"{name} must be at least {low}, got {value!r}")
        return int(value.__index__())

    return check


def _milestones(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} must be a list of step numbers, got {value!r}")
    steps = tuple(_count(1)(f"{name}[{i}]", x) for i, x in enumerate(value))
    if any(a >= b for a, b in pairwise(steps)):
        raise ValueError(f"{name} must ascend, got {value!r}")
    return steps


def _sum_to_one(name: str, value: Any) -> bool | str:
    if isinstance(value, (bool, np.bool_)):
        return "divide" if value else False
    return str(Choice("divide", "project", hint="; or True, or False")(name, value))


class Option(NamedTuple):
    check: Check
    movable: bool = False  # may follow a schedule
    fixed: bool = False  # can't change once the optimizer is constructed
    shared: bool = False  # of every rule
    tied: bool = False  # whether a number is allowed depends on other options, or on the state that there is
    vanishing: bool = True  # a positive number may round to 0
    optional: bool = False  # None switches it off


_fraction, _positive, _closed = Number(0, 1), Number(0, open_low=True), Number(0, 1, open_high=False)
OPTIONS: dict[str, Option] = {
    "lr": Option(Number(0), movable=True),
    "weight_decay": Option(Number(0), movable=True),
    "eps": Option(Number(0), movable=True, vanishing=False),
    "eps_mode": Option(Choice("outside", "inside", "hat")),
    "betas": Option(Pair(_fraction, _fraction), movable=True),
    "alpha": Option(_closed, movable=True),
    "rho": Option(_closed, movable=True),
    "momentum": Option(Number(0), movable=True, tied=True),
    "dampening": Option(Number(open_low=True), movable=True, tied=True),
    "nesterov": Option(flag),
    "maximize": Option(flag),
    "amsgrad": Option(flag),
    "centered": Option(flag),
    "decoupled_weight_decay": Option(flag),
    "lr_decay": Option(Number(0), movable=True),
    "initial_accumulator_value": Option(Number(0)),
    "momentum_decay": Option(Number(0), movable=True),
    "second_moment": Option(Choice("element", "row"), fixed=True),
    "etas": Option(Pair(Number(0, 1, open_low=True), Number(1, open_low=True)), movable=True),
    "step_sizes": Option(Pair(Number(0), _positive, ascending=True), movable=True, tied=True),
    "eta_plus": Option(Number(1, open_low=True), movable=True),
    "eta_minus": Option(Number(0, 1, open_low=True), movable=True),
    "max_rate": Option(_positive, movable=True),
    "variant": Option(Choice("irprop-", "rprop+", "rprop-")),
    "ema_decay": Option(_closed, movable=True, shared=True, optional=True),
    "bounds": Option(anything, shared=True),
    "sum_to_one": Option(_sum_to_one, shared=True),
    "rows": Option(Choice("lazy", "exact"), shared=True),
    "copy_to": Option(anything, fixed=True, shared=True),
    "state_dtype": Option(Format("float32", "bfloat16", "uint8"), fixed=True, shared=True, optional=True),
    "master": Option(Format("float32"), fixed=True, shared=True, optional=True),
    "rounding": Option(Choice("stochastic", hint="; to nearest, small updates vanish: use master='float32'"),
                       fixed=True, shared=True, optional=True),
}  # fmt: skip
SHARED = tuple(name for name, option in OPTIONS.items() if option.shared)

loss_scale = Number(0, open_low=True)
SETTINGS: dict[str, Check] = {
    "max_grad_norm": OrNone(_positive),
    "norm_over": Choice("all", "group", "array"),
    "max_grad_value": OrNone(_positive),
    "on_nonfinite": OrNone(Choice("ignore", "skip", "raise")),
    "loss_scale": lambda name, value: (
        Choice("dynamic", hint="; or a number")(name, value) if isinstance(value, str) else loss_scale(name, value)
    ),
    "zero_grad": flag,
    "cast": flag,
    "flush_denormals": flag,
    "seed": whole,
}
SCHEDULABLE = "max_grad_norm"  # the setting that may follow a schedule


_finite = Number(open_low=True)
# The arguments of schedules that are no schedules: a name means the same in each of them.
ARGUMENTS: dict[str, Check] = {
    **dict.fromkeys(("base", "start", "end", "min"), _finite),
    **dict.fromkeys(("value", "best"), OrNone(_finite)),
    **dict.fromkeys(("gamma", "power", "threshold", "eps"), Number(0)),
    **dict.fromkeys(("div_factor", "final_div_factor"), Number(0, open_low=True)),
    **dict.fromkeys(("steps", "step_size", "warmup_steps", "mult"), _count(1)),
    **dict.fromkeys(("patience", "cooldown", "num_bad_epochs", "cooldown_counter"), _count(0)),
    "milestones": _milestones,
    "pct_start": Number(0, 1, open_high=False),
    "anneal_strategy": Choice("cos", "linear"),
    "three_phase": flag,
    "mode": Choice("min", "max"),
    "factor": Number(0, 1),
    "threshold_mode": Choice("rel", "abs"),
}


def check_settings(
    settings: Mapping[str, Any], t: int, dtypes: set[str], can_flush: bool, where: str = ""
) -> dict[str, Any]:
    """Every option of the optimizer as a whole, normalised.  t: applied steps.  dtypes: of its groups."""
    checked = {
        name: value if name == SCHEDULABLE and moves(value) else SETTINGS[name](f"{where}{name}", value)
        for name, value in settings.items()
    }
    if moves(checked[SCHEDULABLE]):
        setting_at(SCHEDULABLE, checked[SCHEDULABLE], t, where)
    dynamic = checked["loss_scale"] == "dynamic"
    checked["on_nonfinite"] = checked["on_nonfinite"] or ("skip" if dynamic else "ignore")
    if dynamic and checked["on_nonfinite"] != "skip":
        raise ValueError(
            f"{where}on_nonfinite={checked['on_nonfinite']!r} is refused with loss_scale='dynamic', which finds its "
            "scale by the steps that are skipped; drop it, or say 'skip'"
        )
    if checked["flush_denormals"] and not can_flush:
        raise ValueError("flush_denormals=True is not supported on this processor")
    limit = checked["max_grad_value"]
    if limit and dtypes != {"float64"} and limit <= _SMALLEST["float32"] / 2:
        raise ValueError(f"{where}max_grad_value={limit!r} rounds to 0 in float32")
    return checked


# --- numbers and schedules -------------------------------------------------------------------------------------------

_LARGEST = {dtype: float(np.finfo(dtype).max) for dtype in ("float32", "float64")}
_NORMAL = {dtype: float(np.finfo(dtype).smallest_normal) for dtype in ("float32", "float64")}
_SMALLEST = {dtype: float(np.finfo(dtype).smallest_subnormal) for dtype in ("float32", "float64")}
_PLAIN = {float, bool, str, NoneType}


def moves(value: Any) -> bool:
    """Whether this is a schedule.  A type is none: number formats may be types, and float(t) is no useful schedule."""
    return callable(value) and not isinstance(value, type)


def follows(value: Any) -> bool:
    """Whether an option's value is a schedule, or a pair with a schedule in it."""
    if type(value) in _PLAIN:  # nearly always
        return False
    return moves(value) or (isinstance(value, tuple) and any(map(moves, value)))


def ranges(dtype: str) -> dict[str, tuple[tuple[float, float], ...]]:
    """For each option that may move, and each of its numbers: (low, high), between which no check is needed.

    dtype: the type that the rule computes in.
    """
    found = {}
    for name, option in OPTIONS.items():
        check = option.check
        parts = (check.first, check.second) if isinstance(check, Pair) else (check,)
        if option.movable and not option.tied:
            low = -math.inf if option.vanishing else _NORMAL[dtype]
            found[name] = tuple(
                (max(part.low, low), min(part.high, _LARGEST[dtype])) for part in parts if isinstance(part, Number)
            )
    return found


RANGES = {dtype: ranges(dtype) for dtype in ("float32", "float64")}


def check_option(name: str, value: Any, dtype: str, where: str) -> Any:
    """A plain value of one option, normalised.  dtype: the type that the rule computes in."""
    option = OPTIONS[name]
    if value is None and option.optional:
        return None
    checked = option.check(where + name, value)
    for x in checked if isinstance(checked, tuple) else (checked,):
        if isinstance(option.check, (Number, Pair)) and abs(x) > _LARGEST[dtype]:
            raise ValueError(f"{where}{name}={value!r} is infinite in {dtype}")
        if not option.vanishing and 0 < x <= _SMALLEST[dtype] / 2:
            raise ValueError(
                f"{where}{name}={value!r} rounds to 0 in {dtype}; use 0, or at least {_SMALLEST[dtype]:.2g}"
            )
    return checked


def check_schedule(name: str, value: Any, rule: Any, known: Iterable[str], where: str) -> Any:
    """A schedule where a number may be, or a pair with one: a pair becomes a tuple.  known: all options there are."""
    option = OPTIONS[name]
    if not option.movable:
        names = ", ".join(name for name in known if OPTIONS[name].movable)
        raise TypeError(f"{where}{name} can't follow a schedule, got {value!r}; what can: {names}")
    if name in rule.read_once:
        raise ValueError(f"{where}{name} of {rule.label} is read at an array's first step only and can't follow a "
                         f"schedule, got {value!r}; give a number")  # fmt: skip
    if moves(value):
        return value
    if not isinstance(option.check, Pair):
        raise TypeError(f"{where}{name} must be a number or a schedule, got {value!r}")
    return tuple(x if moves(x) else real(f"{where}{name}[{i}]", x) for i, x in enumerate(value))


def number_at(name: str, value: Any, t: int, dtype: str, where: str) -> Any:
    """The number, or the pair, that a schedule gives for the step that follows t applied ones, checked."""
    return _check_given(name, _given(name, value, t, where), value, dtype, f"{where}at t={t} ")


def setting_at(name: str, schedule: Any, t: int, where: str = "") -> Any:
    """The same for an option of the optimizer as a whole."""
    return check_followed_setting(name, schedule, _given(name, schedule, t, where), t, where)


def check_followed_setting(name: str, schedule: Any, value: Any, t: int, where: str = "") -> Any:
    """What the schedule of an option of the optimizer as a whole gave for the step after t applied ones."""
    label = f"{where}at t={t} "
    return SETTINGS[name](label + name, _number(name, value, schedule, label))


def _given(name: str, value: Any, t: int, where: str) -> Any:
    try:
        return tuple(x(t) if moves(x) else x for x in value) if isinstance(value, tuple) else value(t)
    except Exception as error:
        error.add_note(f"raised by the schedule of {where}at t={t} {name}: {value!r}")
        raise


def _number(name: str, given: Any, schedule: Any, label: str) -> Any:
    if given is None:  # which means "off" elsewhere
        raise TypeError(f"{label}{name} must be a number, got None from {schedule!r}")
    return given


def _check_given(name: str, given: Any, schedule: Any, dtype: str, label: str) -> Any:
    return check_option(name, _number(name, given, schedule, label), dtype, label)


def check_followed(
    options: Mapping[str, Any], name: str, part: int, value: Any, t: int, *, dtype: str, where: str
) -> Any:
    """What a schedule gave for the step after t applied ones, where the core can't tell by itself that it is right.

    options: as they were assigned.  part: which number of a pair it was, if that is made of several schedules.
    """
    own, label = options[name], f"{where}at t={t} "
    if isinstance(own, tuple):
        given = tuple(value if i == part else x(t) if moves(x) else x for i, x in enumerate(own))
        return _check_given(name, given, own, dtype, label)[part]
    number = _check_given(name, value, own, dtype, label)
    check_together({**options, name: number}, label)
    return number


def check_together(options: Mapping[str, Any], where: str) -> None:
    """Check options against each other, after each was checked by itself.  A schedule is checked at each step."""
    if options.get("nesterov"):
        momentum, dampening = options["momentum"], options.get("dampening", 0)
        if not ((follows(momentum) or momentum > 0) and (follows(dampening) or dampening == 0)):
            given = " and ".join(f"{name}={options[name]!r}" for name in ("momentum", "dampening") if name in options)
            raise ValueError(f"{where}nesterov=True needs momentum > 0 and dampening 0, got {given}")
    if options.get("centered") and options.get("second_moment") == "row":
        raise ValueError(f"{where}centered=True is refused with second_moment='row': the mean square of a row less the "
                         "square of one element's mean is no variance; drop one of them")  # fmt: skip
    if options["rows"] == "exact" and options["state_dtype"] == "uint8":
        raise ValueError(f"{where}rows='exact' is refused with state_dtype='uint8', whose blocks of 256 elements are "
                         "encoded as a whole, so that no row catches up alone; use 'bfloat16' or "
                         "rows='lazy'")  # fmt: skip
    if options.get("second_moment") == "row" and options["rows"] == "exact" and options["sum_to_one"]:
        raise ValueError(f"{where}sum_to_one={options['sum_to_one']!r} is refused with rows='exact' and "
                         "second_moment='row' together; drop one of the three")  # fmt: skip


def observed(options: Mapping[str, Any], t: int, metric: float) -> dict[str, Any]:
    """The schedules with a plateau in them, after a metric that came with the step that followed t applied ones."""
    return {name: _seen(value, t, metric) for name, value in options.items()
            if type(value) not in _PLAIN and _reads(value)}  # fmt: skip


def _reads(value: Any) -> bool:
    if isinstance(value, tuple):
        return any(_reads(x) for x in value if type(x) not in _PLAIN)
    return bool(getattr(value, "reads_metric", False))


def _seen(value: Any, t: int, metric: float) -> Any:
    if isinstance(value, tuple):
        return tuple(_seen(x, t, metric) for x in value)
    if not _reads(value):
        return value
    after = value.observe(t, metric)
    if not moves(after):
        raise TypeError(f"observe() of {value!r} must give a schedule, got {after!r}")
    return after


# --- bounds ----------------------------------------------------------------------------------------------------------


def _rounded(exact: Any, dtype: str, inside: float) -> Any:
    """Numbers rounded to dtype in the direction of `inside`, -inf or inf; float32 where dtype is narrower."""
    kind = np.dtype("float32" if dtype == "bfloat16" else dtype)
    with np.errstate(all="ignore"):
        x = np.asarray(exact.astype(kind))
        x = np.where(x > exact if inside < 0 else x < exact, np.nextafter(x, kind.type(inside)), x)
        if dtype == "bfloat16":  # the first half of float32's bits
            head = x.view("uint32") & np.uint32(0xFFFF0000)
            cut = head.view("float32")
            x = np.where(cut > x if inside < 0 else cut < x, (head + np.uint32(0x10000)).view("float32"), cut)
        return x.astype("float32") if kind.itemsize < 4 else x


def check_bounds(bounds: Any, dtype: str, where: str, flat: Callable[[Any, str], Any]) -> tuple[Any, Any]:
    """Bounds as they were given, but copied; and rounded inward to a group's dtype: two numbers, or two flat arrays.

    flat: makes one flat array of a structure of arrays, named in messages.
    """
    if bounds is None:
        return None, (None, None)
    if not isinstance(bounds, (tuple, list)) or len(pair := tuple(bounds)) != 2:
        raise TypeError(f"{where}bounds must be a pair (lo, hi) of numbers, None or arrays, got {bounds!r}")
    sides = []
    for name, side, away in zip(("lo", "hi"), pair, (-np.inf, np.inf), strict=True):
        x = away if side is None else side
        numeric = isinstance(x, (int, float, np.integer, np.floating)) and not isinstance(x, bool)
        exact = np.float64(real(f"{where}bounds {name}", x)) if numeric else flat(x, f"{where}bounds: {name}")
        if exact.dtype.kind not in "fiu":
            raise TypeError(f"{where}bounds: {name} must be numbers, got dtype {exact.dtype}")
        if np.isnan(exact).any():
            raise ValueError(f"{where}bounds: {name} has a NaN")
        sides.append(_rounded(exact, dtype, -away))
    low, high = np.broadcast_arrays(*sides)
    empty = (low > high) | (low == np.inf) | (high == -np.inf)
    if empty.any():
        i = int(np.argmax(empty))
        which = f" at element {i} of the group" if empty.ndim else ""
        raise ValueError(
            f"{where}bounds must have lo <= hi and a number of {dtype} between them; rounded inward they are "
            f"({low.flat[i]}, {high.flat[i]}){which}"
        )
    if low.ndim == 0:
        return copied_bounds(bounds), (low[()], high[()])
    return copied_bounds(bounds), (np.ascontiguousarray(low), np.ascontiguousarray(high))


def copied_bounds(bounds: Any) -> Any:
    """Bounds that the caller can't change any more; a list stays one, to be handed out as a fresh list each time."""
    return list(map(_copied, bounds)) if isinstance(bounds, list) else _copied(bounds)


def picklable(bounds: Any) -> Any:
    """Bounds as they were copied, with a dict where there is a read-only view of one, which can't be pickled."""
    if isinstance(bounds, Mapping):
        return dict(bounds)
    return type(bounds)(map(picklable, bounds)) if isinstance(bounds, (list, tuple)) else bounds


def _copied(side: Any) -> Any:
    if isinstance(side, Mapping):
        return MappingProxyType({name: _copied(x) for name, x in side.items()})
    if isinstance(side, (list, tuple)):
        return tuple(map(_copied, side))
    if isinstance(side, np.ndarray):
        side = side.copy()
        side.flags.writeable = False
    return side

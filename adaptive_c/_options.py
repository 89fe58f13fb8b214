"""The checks of every hyperparameter, by name: one name means one thing in every rule."""

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np

Check = Callable[[str, Any], Any]


def _real(name: str, value: Any) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def number(low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = True) -> Check:
    """A finite number in an interval, closed below and open above unless said otherwise."""
    interval = f"{'(' if open_low else '['}{low:g}, {high:g}{')' if open_high else ']'}"

    def check(name: str, value: Any) -> float:
        x = _real(name, value)
        if not (low < x < high or (x == low and not open_low) or (x == high and not open_high)):
            raise ValueError(f"{name} must be in {interval}, got {value!r}")
        return x

    return check


def pair(first: Check, second: Check) -> Check:
    def check(name: str, value: Any) -> tuple[float, float]:
        if not isinstance(value, (tuple, list, np.ndarray)) or len(value) != 2:
            raise TypeError(f"{name} must be a pair of numbers, got {value!r}")
        return first(f"{name}[0]", value[0]), second(f"{name}[1]", value[1])

    return check


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def choice(*values: str, hint: str = "") -> Check:
    def check(name: str, value: Any) -> str:
        if not isinstance(value, str) or value not in values:
            raise ValueError(f"{name} must be {' or '.join(map(repr, values))}, got {value!r}{hint}")
        return values[values.index(value)]

    return check


def number_format(*values: str) -> Check:
    """A dtype by its name, or anything that NumPy takes for one."""

    def check(name: str, value: Any) -> str:
        if not isinstance(value, str):
            with suppress(TypeError):
                value = np.dtype(value).name
        return str(choice(*values)(name, value))

    return check


def step_sizes(name: str, value: Any) -> tuple[float, float]:
    low, high = pair(number(0), number(0, open_low=True))(name, value)
    if low > high:
        raise ValueError(f"{name} must be (smallest, largest), got {value!r}")
    return low, high


def optional(check: Check) -> Check:
    return lambda name, value: None if value is None else check(name, value)


def anything(name: str, value: Any) -> Any:  # checked where the arrays are known
    return value


def whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not 0 <= value < 1 << 64:
        raise ValueError(f"{name} must be in [0, 2**64), got {value}")
    return int(value)


loss_scale = number(0, open_low=True)

# Options of the optimizer as a whole: keyword arguments of the base class, attributes of the optimizer.
SETTINGS: dict[str, Check] = {
    "max_grad_norm": optional(number(0, open_low=True)),
    "max_grad_value": optional(number(0, open_low=True)),
    "on_nonfinite": optional(choice("ignore", "skip", "raise")),
    "loss_scale": lambda name, value: (
        choice("dynamic", hint="; or a number")(name, value) if isinstance(value, str) else loss_scale(name, value)
    ),
    "zero_grad": flag,
    "flush_denormals": flag,
    "seed": whole,
}

# Options of a group, the rules' and the base class's.
CHECKS: dict[str, Check] = {
    "ema_decay": optional(number(0, 1, open_high=False)),
    "bounds": anything,
    "copy_to": anything,
    "state_dtype": optional(number_format("float32", "bfloat16", "uint8")),
    "master": optional(number_format("float32")),
    "rounding": optional(choice("stochastic", hint="; to nearest, small updates vanish: use master='float32'")),
    "lr": number(0),
    "weight_decay": number(0),
    "eps": number(0),
    "eps_mode": choice("outside", "inside", "hat"),
    "betas": pair(number(0, 1), number(0, 1)),
    "alpha": number(0, 1, open_high=False),
    "rho": number(0, 1, open_high=False),
    "momentum": number(0),
    "dampening": number(-math.inf, open_low=True),
    "nesterov": flag,
    "maximize": flag,
    "amsgrad": flag,
    "centered": flag,
    "decoupled_weight_decay": flag,
    "lr_decay": number(0),
    "initial_accumulator_value": number(0),
    "momentum_decay": number(0),
    "etas": pair(number(0, 1, open_low=True), number(1, open_low=True)),
    "step_sizes": step_sizes,
    "eta_plus": number(1, open_low=True),
    "eta_minus": number(0, 1, open_low=True),
    "max_rate": number(0, open_low=True),
    "variant": choice("irprop-", "rprop+", "rprop-"),
}


def check_settings(settings: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Every option of the optimizer as a whole, normalised."""
    checked = {name: SETTINGS[name](f"{where}{name}", value) for name, value in settings.items()}
    dynamic = checked["loss_scale"] == "dynamic"
    checked["on_nonfinite"] = checked["on_nonfinite"] or ("skip" if dynamic else "ignore")
    if dynamic and checked["on_nonfinite"] != "skip":
        raise ValueError(
            f"{where}on_nonfinite={checked['on_nonfinite']!r} is refused with loss_scale='dynamic', which finds its "
            "scale by the steps that are skipped; drop it, or say 'skip'"
        )
    return checked


def _rounded(exact: Any, dtype: str, inside: float) -> Any:
    """Numbers rounded to dtype in the direction of `inside`, -inf or inf; float32 where dtype is narrower."""
    kind = np.dtype("float32" if dtype == "bfloat16" else dtype)
    with np.errstate(over="ignore"):
        x = np.asarray(exact.astype(kind))
    x = np.where(x > exact if inside < 0 else x < exact, np.nextafter(x, kind.type(inside)), x)
    if dtype == "bfloat16":  # the first half of float32's bits
        head = x.view("uint32") & np.uint32(0xFFFF0000)
        cut = head.view("float32")
        x = np.where(cut > x if inside < 0 else cut < x, (head + np.uint32(0x10000)).view("float32"), cut)
    return x.astype("float32") if kind.itemsize < 4 else x


def inward(bounds: Any, dtype: str, where: str, arrange: Callable[[Any, str], Any]) -> tuple[Any, Any]:
    """The bounds of a group rounded inward to its dtype: two numbers, or two flat arrays made by `arrange`."""
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise TypeError(f"{where}bounds must be a pair (lo, hi) of numbers, None or arrays, got {bounds!r}")
    sides = []
    for name, side, away in zip(("lo", "hi"), bounds, (-np.inf, np.inf), strict=True):
        x = away if side is None else side
        numeric = isinstance(x, (int, float, np.integer, np.floating)) and not isinstance(x, bool)
        exact = np.float64(_real(f"{where}bounds {name}", x)) if numeric else arrange(x, f"{where}bounds: {name}")
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
        return low[()], high[()]
    return np.ascontiguousarray(low), np.ascontiguousarray(high)


def check_options(options: dict[str, Any], dtype: np.dtype[Any], where: str = "") -> dict[str, Any]:
    """Every option of one group, normalised; `where` goes before the names in messages."""
    checked = {name: CHECKS[name](where + name, value) for name, value in options.items()}
    check_together(checked, dtype, where)
    return checked


def check_together(checked: dict[str, Any], dtype: np.dtype[Any], where: str) -> None:
    """What depends on the dtype or on several options, each of which was checked by itself."""
    eps = checked.get("eps", 0.0)
    if eps > float(np.finfo(dtype).max):
        raise ValueError(f"{where}eps={eps!r} is infinite in {dtype}")
    if eps > 0 and dtype.type(eps) == 0:
        raise ValueError(
            f"{where}eps={eps!r} rounds to 0 in {dtype}; use 0, or at least {np.finfo(dtype).smallest_subnormal:.2g}"
        )
    if checked.get("nesterov") and not (checked["momentum"] > 0 and checked.get("dampening", 0) == 0):
        given = " and ".join(f"{name}={checked[name]!r}" for name in ("momentum", "dampening") if name in checked)
        raise ValueError(f"{where}nesterov=True needs momentum > 0 and dampening 0, got {given}")

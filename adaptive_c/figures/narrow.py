"""Narrow state beside float32: the path over a surface, and the loss of a model."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .. import optimizers, schedules
from ..typing import StateDtype
from .palette import BLACK, BLUE, ORANGE
from .picture import WIDTH, Picture, contours, minimum, styled
from .problems import ROSENBROCK, Array, trace

STATES: dict[str, tuple[StateDtype | None, str, Any]] = {
    "float32": (None, BLACK, "-"), "bfloat16": ("bfloat16", BLUE, "--"), "8 bits": ("uint8", ORANGE, "-."),
}  # fmt: skip
STEPS, EVERY = 600, 10


def losses(state_dtype: StateDtype | None) -> Array:
    """The loss of a linear model of 512 float32 weights after every tenth of 600 steps of Adam, in batches of 64."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2048, 512), "float32")
    y = x @ rng.standard_normal(512, "float32") + rng.standard_normal(2048, "float32")
    w = np.zeros(512, "float32")
    opt = optimizers.Adam(w, lr=schedules.cosine(0.05, STEPS), state_dtype=state_dtype)
    out = []
    for t in range(STEPS + 1):
        if t % EVERY == 0:
            out.append(float(((x @ w - y) ** 2).mean() / 2))
        some = slice(t * 64 % 2048, t * 64 % 2048 + 64)
        opt.step((x[some] @ w - y[some]) @ x[some] / 64)
    return np.array(out)


@styled
def narrow() -> Picture:
    """State of 8 bits and of bfloat16 against float32: Adam's path over a surface, and the loss of a model."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    surface, curve, difference = figure.subplots(1, 3)
    contours(surface, ROSENBROCK, power=7)
    minimum(surface, ROSENBROCK)
    rows: list[list[Any]] = []
    results, steps = {}, range(0, STEPS + 1, EVERY)
    for name, (state_dtype, colour, dashes) in STATES.items():
        x = trace("Adam", ROSENBROCK, 300, dtype="float32", lr=0.1, state_dtype=state_dtype)
        surface.plot(*x.w.T, color=colour, linestyle=dashes, linewidth=1.1, label=name)
        surface.plot(*x.w[-1], "o", color=colour, markersize=3.5)
        results[name] = losses(state_dtype)
        curve.plot(steps, results[name], color=colour, linestyle=dashes, label=name)
        rows += [["path", name, t, *map(float, w), float(e)] for t, (w, e) in enumerate(zip(x.w, x.error, strict=True))]
        rows += [["model", name, t, "", "", float(e)] for t, e in zip(steps, results[name], strict=True)]
        if state_dtype:
            difference.plot(steps, 100 * (results[name] / results["float32"] - 1), color=colour, linestyle=dashes)
    surface.set(xlabel="$w_1$", ylabel="$w_2$", title="Adam's path, 300 steps")
    curve.set(yscale="log", xlabel="step", title="loss of a model")
    difference.set(xlabel="step", title="difference from float32, %")
    for axes in (curve, difference):
        axes.grid(visible=True)
    curve.legend()
    return Picture(figure, ("panel", "state", "step", "w1", "w2", "error"), rows)

"""Every rule of the library beside every other: on one surface, and over the learning rate."""

from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .. import optimizers
from .palette import BLUE, GREY, INK, ORANGE, RED
from .picture import COURSE, WIDTH, Picture, contours, minimum, styled
from .problems import ROSENBROCK, Array, trace


def sweep(rule: str, start: Array, rates: Array, steps: int, gradient: Callable[[Array], Array]) -> Array:
    """The courses for many learning rates, as one optimizer with a group for each: (steps + 1, rates, d).

    `gradient` takes weights of the shape (rates, d) and returns their gradients.
    """
    w = np.tile(start, (len(rates), 1))
    opt = getattr(optimizers, rule)([{"params": [x], "lr": float(rate)} for x, rate in zip(w, rates, strict=True)])
    course = [w.copy()]
    with np.errstate(all="ignore"):
        for _ in range(steps):
            opt.step([[g] for g in gradient(w)])
            course.append(w.copy())
    return np.array(course)


def _panels(columns: int, height: float) -> tuple[Figure, list[tuple[Any, str]]]:
    """A figure with axes for each rule of the library."""
    rows = -(-len(optimizers.__all__) // columns)
    figure = Figure(figsize=(WIDTH, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True).flat
    for unused in axes[len(optimizers.__all__) :]:
        unused.set_visible(False)
    return figure, list(zip(axes, optimizers.__all__, strict=False))


# --- one surface -------------------------------------------------------------------------------------------------

RATES = np.array([m * 10.0**k for k in range(-4, 1) for m in (1, 2, 5)])


def best_rate(rule: str, steps: int) -> float:
    """The rate of RATES with the least error at the end, among those whose error never exceeds that of the start."""
    course = sweep(rule, np.array(ROSENBROCK.start), RATES, steps,
                   lambda w: np.ascontiguousarray(ROSENBROCK.gradient(w.T).T))  # fmt: skip
    with np.errstate(all="ignore"):
        error = ROSENBROCK.value(course.transpose(2, 0, 1))
    return float(RATES[np.where((error <= error[0]).all(axis=0), error[-1], np.inf).argmin()])


@styled
def rules() -> Picture:
    """Every rule on Rosenbrock's valley, 300 steps from (-1.2, 1), each with the learning rate that suits it best."""
    steps = 300
    figure, panels = _panels(5, 1.67)
    rows: list[list[Any]] = []
    for axes, rule in panels:
        rate = best_rate(rule, steps)
        x = trace(rule, ROSENBROCK, steps, lr=rate)
        contours(axes, ROSENBROCK, levels=8, power=6, points=80)
        minimum(axes, ROSENBROCK)
        axes.plot(*x.w.T, color=COURSE(0.35), linewidth=0.7)
        axes.scatter(*x.w.T, c=np.arange(steps + 1) / steps, cmap=COURSE, s=3.5, zorder=3, rasterized=True)
        axes.plot(*x.w[0], "o", color="black", markerfacecolor="white", markersize=4.5, zorder=4)
        axes.plot(*x.w[-1], "o", color=RED, markersize=4.5, zorder=4)
        axes.set_title(f"{rule}, lr {rate:g}\nerror {x.error[-1]:.1g}", fontsize=7.5)
        axes.set(xlabel="$w_1$", ylabel="$w_2$", xticks=(-1, 0, 1), yticks=(0, 1, 2))
        axes.label_outer()
        rows += [[rule, rate, t, *map(float, w), float(e)] for t, (w, e) in enumerate(zip(x.w, x.error, strict=True))]
    return Picture(figure, ("rule", "lr", "step", "w1", "w2", "error"), rows)


# --- the learning rate -------------------------------------------------------------------------------------------

NOISE, STEPS = 0.1, 300
LEARNING_RATES = np.geomspace(1e-5, 1e2, 43)


def regression(scales: Array) -> tuple[Callable[[Array], Array], Callable[[Array], Array], float]:
    """Least squares with ten features of these scales: loss and gradient for weights (..., 10), and the least loss."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 10))
    y = x @ rng.standard_normal(10) + NOISE * rng.standard_normal(200)
    x = x * scales
    best, *_ = np.linalg.lstsq(x, y, rcond=None)

    def loss(w: Array) -> Array:
        mean: Array = ((w @ x.T - y) ** 2).mean(axis=-1) / 2
        return mean

    return loss, lambda w: (w @ x.T - y) @ x / len(y), float(loss(best))


FEATURES = {"alike": np.ones(10), "1 to 100": np.geomspace(1, 100, 10)}


@styled
def sensitivity() -> Picture:
    """The loss after 300 steps over the learning rate, for features of one scale and of scales from 1 to 100."""
    figure, panels = _panels(3, 1.52)
    rows: list[list[Any]] = []
    for axes, rule in panels:
        words = []
        for (features, scales), colour, dashes in zip(FEATURES.items(), (BLUE, ORANGE), ("-", "--"), strict=True):
            loss, gradient, least = regression(scales)
            with np.errstate(all="ignore"):
                final = loss(sweep(rule, np.zeros(10), LEARNING_RATES, STEPS, gradient)[-1])
            final = np.where(np.isfinite(final), final, np.inf)
            shown, label = np.minimum(final, 1e3), f"scales of the features: {features}"
            axes.plot(LEARNING_RATES, shown, dashes, color=colour, label=label)
            works = int((final < 2 * least).sum())
            words.append((f"{works / 6:.1f}", INK.get(colour, colour)))
            rows += [[rule, features, float(r), float(f), least] for r, f in zip(LEARNING_RATES, final, strict=True)]
        axes.axhspan(0, 2 * least, color="0.93", zorder=-1)
        axes.axvline(_default(rule), color=GREY, linewidth=0.8, linestyle=":")
        axes.set_title(rule)
        for i, (text, colour) in enumerate(words):
            axes.text(0.86 + 0.14 * i, 1.02, text, transform=axes.transAxes, color=colour, ha="right", fontsize=8)
        axes.set(xscale="log", yscale="log", ylim=(2e-3, 1e2), xlim=(1e-5, 1e2), xlabel="learning rate", ylabel="loss",
                 xticks=(1e-4, 1e-2, 1, 1e2))  # fmt: skip
        axes.label_outer()
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return Picture(figure, ("rule", "features", "lr", "loss", "least_loss"), rows)


def _default(rule: str) -> float:
    """The default learning rate of a rule."""
    rate: float = getattr(optimizers, rule)(np.zeros(1)).param_groups[0]["lr"]
    return rate

"""Courses over a landscape of one weight: a ball that rolls through it, and the quartic of many animations."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .palette import BLACK, BLUE, GREEN, GREY, ORANGE, PALE, RED
from .picture import COURSE, WIDTH, Movie, Picture, styled
from .problems import QUARTIC, RIPPLES, Problem, Trace, trace

COLUMNS = ("panel", "run", "step", "x", "error", "gradient")


def _landscape(axes: Any, problem: Problem, height: tuple[float, float]) -> None:
    """Draw a function of one weight."""
    x = np.linspace(*problem.window[0], 400)
    axes.plot(x, problem.value(x[None]), color=GREY, linewidth=1)
    axes.set(xlim=problem.window[0], ylim=height)


def _rows(panel: str, run: str, x: Trace) -> Iterable[list[Any]]:
    """The numbers of a run, for the CSV file."""
    for t, numbers in enumerate(zip(x.w[:, 0], x.error, x.gradient[:, 0], strict=True)):
        yield [panel, run, t, *map(float, numbers)]


# --- the ball ----------------------------------------------------------------------------------------------------

BALLS: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "sgd": ("gradient descent, lr 0.01: stuck", "SGD", 60, {"lr": 0.01}),
    "momentum": ("momentum 0.9, lr 0.01: passes the hill", "Momentum", 90, {"lr": 0.01}),
    "oscillating": ("gradient descent, lr 0.2: oscillates", "SGD", 40, {"lr": 0.2}),
    "rmsprop": ("RMSprop, lr 0.2: stuck", "RMSprop", 40, {"lr": 0.2, "alpha": 0.9}),
    "adam": ("Adam, lr 0.2: passes the hill", "Adam", 90, {"lr": 0.2}),
    "adagrad": ("AdaGrad, lr 2: oscillates, then settles", "Adagrad", 60, {"lr": 2.0}),
}


def _rolling(title: str, x: Trace) -> Movie:
    """An animation of a ball that takes the steps of a run."""
    figure = Figure(figsize=(5, 3))
    axes = figure.add_axes((0.1, 0.14, 0.87, 0.77))
    _landscape(axes, QUARTIC, (-2.4, 2.4))
    axes.set(title=title, xlabel="x", ylabel="f(x)", xlim=(-2, 2))
    (trail,) = axes.plot([], [], "o", color="#56B4E9", markersize=4, alpha=0.5)
    (ball,) = axes.plot([], [], "o", color=BLUE, markersize=11)
    counter = axes.text(1, 1.02, "", transform=axes.transAxes, ha="right", va="bottom", fontsize=11)

    def show(t: int) -> None:
        trail.set_data(x.w[: t + 1, 0], x.error[: t + 1] + 0.09)
        ball.set_data([x.w[t, 0]], [x.error[t] + 0.09])  # the ball lies on the line
        counter.set_text(f"step {t}")

    steps = len(x.error) - 1
    return Movie(figure, [trail, ball, counter], show, [*range(20), *range(20, steps + 1, 2)], 120)


@styled
def ball() -> Picture:
    """A ball on the quartic, from x = 1.5: stuck in the nearer valley, past the hill, swinging, or settled."""
    figure = Figure(figsize=(WIDTH, 3.9), layout="constrained")
    rows: list[list[Any]] = []
    movies = {}
    for (key, (title, rule, steps, options)), axes in zip(
        BALLS.items(), figure.subplots(2, 3, sharex=True, sharey=True).flat, strict=True
    ):
        x = trace(rule, QUARTIC, steps, (1.5,), **options)
        _landscape(axes, QUARTIC, (-2.4, 2.4))
        dots = axes.scatter(x.w[:, 0], x.error, c=np.arange(steps + 1) / steps, cmap=COURSE, s=14, zorder=3)
        axes.plot(x.w[0, 0], x.error[0], "o", markeredgecolor=BLACK, markerfacecolor="white", markersize=5, zorder=4)
        axes.plot(x.w[-1, 0], x.error[-1], "o", color=RED, markersize=6, zorder=4)
        name, _, outcome = title.partition(": ")
        axes.set_title(f"{name}:\n{outcome}")
        axes.set(xlabel="x", ylabel="f(x)", xlim=(-2, 2))
        axes.label_outer()
        rows += _rows(key, f"{name}", x)
        movies[key] = _rolling(title, x)
    bar = figure.colorbar(dots, ax=figure.axes, ticks=(0, 1), shrink=0.6, aspect=30)
    bar.ax.set_yticklabels(["start", "end"])
    bar.outline.set_visible(False)
    return Picture(figure, COLUMNS, rows, movies)


# --- the quartic -------------------------------------------------------------------------------------------------

_INSIDE = {"lr": 0.1, "eps": 1e-8, "eps_mode": "inside"}
_ADAGRAD = ("AdaGrad", BLUE, "s", 0.1, "Adagrad", _INSIDE)
_RMSPROP = ("RMSprop", GREEN, "^", 0.1, "RMSprop", {**_INSIDE, "alpha": 0.9})
_ADAM = ("Adam", RED, "D", 0.1, "Adam", _INSIDE)
Run = tuple[str, str, str, float, str, Mapping[str, Any]]
# A title, the function, and the runs: label, colour, marker, start, rule, options.
PANELS: dict[str, tuple[str, Problem, tuple[Run, Run]]] = {
    "fixed": ("fixed rates, too large", QUARTIC, (
        ("0.5 from 0.3", ORANGE, "o", 0.3, "SGD", {"lr": 0.5}), ("0.8 from 0.1", BLACK, "v", 0.1, "SGD", {"lr": 0.8}))),
    "small": ("a fixed rate of 0.1", QUARTIC, (
        ("from 0.3", ORANGE, "o", 0.3, "SGD", {"lr": 0.1}), ("from 0.1", BLACK, "v", 0.1, "SGD", {"lr": 0.1}))),
    "adagrad": ("AdaGrad and a fixed rate, 0.1", QUARTIC, (
        _ADAGRAD, ("fixed", BLACK, "v", 0.1, "SGD", {"lr": 0.1}))),
    "rmsprop": ("RMSprop and AdaGrad, 0.1", QUARTIC, (_RMSPROP, _ADAGRAD)),
    "adam": ("RMSprop and Adam, 0.1", QUARTIC, (_RMSPROP, _ADAM)),
    "ripples": ("RMSprop and Adam, 0.05", RIPPLES, (
        (*_RMSPROP[:3], 0.5, "RMSprop", {**_RMSPROP[5], "lr": 0.05}),
        (*_ADAM[:3], 0.5, "Adam", {**_ADAM[5], "lr": 0.05}))),
}  # fmt: skip
HEIGHTS = {QUARTIC.formula: (-2.5, 3.0), RIPPLES.formula: (-1.0, 2.0)}
ANIMATED, LATER = 8, 100  # how many steps are on the landscape, and how many below it


def _stepping(title: str, problem: Problem, runs: Iterable[tuple[Run, Trace]]) -> Movie:
    """An animation of several runs, step by step."""
    figure = Figure(figsize=(5, 3))
    axes = figure.add_axes((0.1, 0.14, 0.87, 0.77))
    _landscape(axes, problem, HEIGHTS[problem.formula])
    axes.set(title=title, xlabel="x", ylabel="f(x)")
    counter = axes.text(1, 1.02, "", transform=axes.transAxes, ha="right", va="bottom", fontsize=11)
    trails, dots = [], []
    for (label, colour, marker, *_), _x in runs:
        trails += axes.plot([], [], marker, color=colour, markersize=5, alpha=0.35)
        dots += axes.plot([], [], marker, color=colour, markersize=9, label=label)
    axes.legend(loc="upper center", ncols=2)
    for dot in dots:
        dot.set_data([], [])

    def show(t: int) -> None:
        for trail, dot, (_, x) in zip(trails, dots, runs, strict=True):
            trail.set_data(x.w[:t, 0], x.error[:t])
            dot.set_data([x.w[t, 0]], [x.error[t]])
        counter.set_text(f"step {t}")

    return Movie(figure, [*trails, *dots, counter], show, range(ANIMATED + 1), 700)


@styled
def quartic() -> Picture:
    """The quartic x^4 - 2 x^2 + x, and a rippled one, with fixed rates, AdaGrad, RMSprop and Adam."""
    figure = Figure(figsize=(WIDTH, 7.2), layout="constrained")
    grid = figure.subplots(4, 3, height_ratios=(1.15, 1, 1.15, 1))
    rows: list[list[Any]] = []
    movies = {}
    for i, (key, (title, problem, runs)) in enumerate(PANELS.items()):
        upper, lower = grid[i // 3 * 2 : i // 3 * 2 + 2, i % 3]
        _landscape(upper, problem, HEIGHTS[problem.formula])
        pairs = []
        for run in runs:
            label, colour, marker, start, rule, options = run
            x = trace(rule, problem, LATER, (start,), **options)
            pairs.append((run, x))
            rows += _rows(key, label, x)
            some = slice(0, ANIMATED + 1)
            upper.plot(x.w[some, 0], x.error[some], marker, color=colour, markersize=4, alpha=0.75, label=label)
            seen = np.where(np.maximum.accumulate(np.nan_to_num(abs(x.w[:, 0]), nan=9)) < 9, x.w[:, 0], np.nan)
            lower.plot(seen, color=colour, linewidth=1, marker=marker, markersize=3, markevery=(0, 12))
        movies[key] = _stepping(title, problem, pairs)
        upper.set_title(title, pad=16)
        upper.set(xlabel="x", ylabel="f(x)" if i % 3 == 0 or problem is RIPPLES else "")
        upper.legend(loc="lower left", bbox_to_anchor=(-0.05, 0.97), ncols=2, columnspacing=0.9, handletextpad=0.1)
        for place in problem.minima:
            lower.axhline(place[0], color=PALE, linewidth=0.7, linestyle=(0, (4, 3)), zorder=0)
        lower.axvspan(0, ANIMATED, color="0.93", zorder=-1)
        lower.set(xlabel="step", ylabel="x" if i % 3 == 0 else "", xlim=(0, LATER))
        lower.set_ylim((-1.6, 1.6) if problem is QUARTIC else (0.2, 0.55))
    return Picture(figure, COLUMNS, rows, movies)

"""Still frames of the explorer: surfaces with a course from dark to bright, the error and the state below them."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .palette import GREEN, ORANGE
from .picture import COURSE, WIDTH, Movie, Picture, contours, minimum, rows_of, styled
from .problems import PLANE, SYMBOLS, WAVES, Problem, Trace, trace

# The name of a problem, and what runs on it: title, rule, steps, options, and the state that is shown.
FRAMES: dict[str, tuple[str, str, int, dict[str, Any], str]] = {
    "bowl": ("RMSprop, lr 0.5", "RMSprop", 80, {"lr": 0.5, "alpha": 0.9, "eps_mode": "inside"}, "square_avg"),
    "waves": ("Adam, lr 0.2", "Adam", 80, {"lr": 0.2}, "exp_avg"),
    "Himmelblau": ("Rprop, lr 0.1", "Rprop", 80, {"lr": 0.1}, "step_size"),
}


def _frame(axes: Any, problem: Problem, x: Trace, state: str) -> list[Any]:
    """Draw into three axes; returns what moves: the course, its marks on the error, and the two lines of the state."""
    surface, error, below = axes
    steps = len(x.error) - 1
    contours(surface, problem, power=3 if problem is not WAVES else 1)
    minimum(surface, problem)
    (line,) = surface.plot(*x.w.T, color=COURSE(0.3), linewidth=0.7)
    dots = surface.scatter(*x.w.T, c=np.arange(steps + 1) / steps, cmap=COURSE, s=8, zorder=3)
    surface.plot(*x.w[0], "o", color="black", markerfacecolor="white", markersize=5, zorder=4)
    surface.set(xlabel="$w_1$", ylabel="$w_2$")
    marks = error.scatter(range(steps + 1), x.error, c=np.arange(steps + 1) / steps, cmap=COURSE, s=5)
    error.set(ylabel="error", xlim=(0, steps))
    if problem is not WAVES:
        error.set_yscale("log")
    moved = [line, dots, marks]
    for i, (colour, dashes) in enumerate(((GREEN, "-"), (ORANGE, "--"))):
        moved += below.plot(x.state[state][:, i], color=colour, linestyle=dashes, label=f"${SYMBOLS[state]}_{i + 1}$")
    below.set(xlabel="step", xlim=(0, steps))
    if state == "square_avg":
        below.set_yscale("log")
    below.legend(loc="best", ncols=2, handlelength=1.5)
    return moved


def _growing(name: str) -> Movie:
    """An animation of surface, error and state that grow step by step."""
    title, rule, steps, options, state = FRAMES[name]
    problem = PLANE[name]
    x = trace(rule, problem, steps, **options)
    figure = Figure(figsize=(4, 5))
    places = {"left": 0.15, "right": 0.97, "bottom": 0.08, "top": 0.94, "hspace": 0.35}
    axes = figure.subplots(3, 1, height_ratios=(2.4, 1, 1), gridspec_kw=places)
    line, dots, marks, *lines = _frame(axes, problem, x, state)
    axes[0].set_title(title)
    counter = axes[0].text(1, 1.02, "", transform=axes[0].transAxes, ha="right", fontsize=11)
    shades = np.arange(steps + 1) / steps

    def show(t: int) -> None:
        some = slice(0, t + 1)
        line.set_data(*x.w[some].T)
        for points, places in ((dots, x.w[some]), (marks, np.stack([np.arange(t + 1), x.error[some]], axis=1))):
            points.set_offsets(places)
            points.set_array(shades[some])
        for i, curve in enumerate(lines):
            curve.set_data(np.arange(t + 1), x.state[state][some, i])
        counter.set_text(f"step {t}")

    return Movie(figure, [line, dots, marks, *lines, counter], show, range(0, steps + 1, 2), 120)


@styled
def explorer() -> Picture:
    """Three settings as the explorer shows them: the course on the error surface, the error, and the state."""
    figure = Figure(figsize=(WIDTH, 5.6), layout="constrained")
    grid = figure.subplots(3, 3, height_ratios=(2.2, 1, 1))
    rows: list[list[Any]] = []
    for i, (name, (title, rule, steps, options, state)) in enumerate(FRAMES.items()):
        problem = PLANE[name]
        x = trace(rule, problem, steps, **options)
        _frame(grid[:, i], problem, x, state)
        grid[0, i].set_title(f"{problem.formula if len(problem.formula) < 30 else name}\n{title}")
        if i:
            for axes in grid[:, i]:
                axes.set_ylabel("")
        table = rows_of(f"{problem.formula}: {title}", x)
        rows += [[*row, *map(float, s)] for row, s in zip(table, x.state[state], strict=True)]
    grid[2, 0].set_ylabel("state")
    columns = ("run", "step", "w1", "w2", "error", "gradient1", "gradient2", "state1", "state2")
    return Picture(figure, columns, rows, {"bowl": _growing("bowl")})

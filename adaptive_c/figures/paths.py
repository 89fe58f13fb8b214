"""Courses of optimizers over surfaces of two weights."""

from dataclasses import replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .palette import BLACK, BLUE, GREEN, INK, ORANGE, RED
from .picture import WIDTH, Picture, contours, minimum, path, rows_of, styled
from .problems import BOWL, RAVINE, trace

COLUMNS = ("run", "step", "w1", "w2", "error", "gradient1", "gradient2")
NEAR = replace(BOWL, window=((-17, 5), (-5, 22)))


@styled
def ravine() -> Picture:
    """A ravine: gradient descent zig-zags between its walls; momentum, RMSprop and Adam beside it."""
    runs: list[tuple[str, str, str, dict[str, Any]]] = [
        ("gradient descent, lr 0.09", BLACK, "SGD", {"lr": 0.09}),
        ("momentum 0.7, lr 0.03", ORANGE, "Momentum", {"lr": 0.03, "momentum": 0.7}),
        ("RMSprop, lr 0.3", BLUE, "RMSprop", {"lr": 0.3, "alpha": 0.9}),
        ("Adam, lr 0.5", RED, "Adam", {"lr": 0.5}),
    ]
    traces = {label: trace(rule, RAVINE, 60, **options) for label, _, rule, options in runs}
    figure = Figure(figsize=(WIDTH, 5.4), layout="constrained")
    grid = figure.add_gridspec(3, 2, height_ratios=(1, 1, 1.15))
    for i, (label, colour, _, _) in enumerate(runs):
        axes = figure.add_subplot(grid[i // 2, i % 2])
        contours(axes, RAVINE)
        minimum(axes, RAVINE)
        path(axes, traces[label], colour)
        axes.set_title(label, color=INK.get(colour, colour))
        axes.tick_params(labelbottom=i >= 2, labelleft=i % 2 == 0)
        axes.set(xlabel="$w_1$" if i >= 2 else "", ylabel="" if i % 2 else "$w_2$")
    axes = figure.add_subplot(grid[2, :])
    for (label, colour, _, _), dashes in zip(runs, ("-", "--", "-.", (0, (1, 1))), strict=True):
        axes.plot(traces[label].error, color=colour, linestyle=dashes, label=label)
    axes.set(yscale="log", xlabel="step", ylabel="error", xlim=(0, 60), ylim=(1e-5, 1e2))
    axes.grid(visible=True)
    axes.legend(loc="lower left")
    return Picture(figure, COLUMNS, [row for label, x in traces.items() for row in rows_of(label, x)])


@styled
def smoothing() -> Picture:
    """RMSprop without memory (beta = 0) goes along eight directions; with beta = 0.9 its path is smooth."""
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    *surfaces, angles = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    runs = ((0.0, GREEN, "o"), (0.9, BLUE, "s"))
    rows: list[list[Any]] = []
    for axes, (beta, colour, marker) in zip(surfaces, runs, strict=True):
        x = trace("RMSprop", NEAR, 40, lr=1.1, alpha=beta, eps_mode="inside")
        contours(axes, NEAR)
        minimum(axes, NEAR)
        path(axes, x, colour)
        axes.set_title(rf"$\beta$ = {beta:g}, lr 1.1", color=colour)
        axes.set(xlabel="$w_1$", ylabel="$w_2$", aspect="equal")
        axes.label_outer()
        downhill = np.degrees(np.arctan2(*-x.update.T[::-1]))
        angles.plot(range(1, 26), downhill[:25], marker, color=colour, markersize=3.5, label=rf"$\beta$ = {beta:g}")
        rows += rows_of(f"beta {beta:g}", x)
    angles.set(xlabel="step", title="direction of each step", yticks=range(-180, 181, 45), ylim=(-190, 190))
    angles.yaxis.set_major_formatter("{x:.0f}°")
    angles.grid(visible=True, axis="y")
    angles.legend(loc="lower left")
    return Picture(figure, COLUMNS, rows)

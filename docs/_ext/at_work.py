"""A picture of a rule at work, drawn from the library's own steps: in a ravine, and with gradients that are given."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from adaptive_c import optimizers
from adaptive_c.figures.palette import BLUE, GREY, RED
from adaptive_c.figures.picture import COURSE, WIDTH, contours, look, minimum, png
from adaptive_c.figures.problems import RAVINE, trace
from adaptive_c.figures.rules import RATES, sweep

STEPS = 60
GRADIENTS = np.repeat([1.0, 0.0, 3.0, -1.0], 10)


def best_rate(rule: str) -> float:
    """Of RATES the one with the least error at the end, among those whose course stays in the picture."""
    course = sweep(rule, np.array(RAVINE.start), RATES, STEPS, lambda w: np.ascontiguousarray(RAVINE.gradient(w.T).T))
    low, high = np.transpose(RAVINE.window)
    with np.errstate(all="ignore"):
        seen = ((course >= low) & (course <= high)).all(axis=(0, 2))
        return float(RATES[np.where(seen, RAVINE.value(course[-1].T), np.inf).argmin()])


def steps(rule: str) -> tuple[np.ndarray, float]:
    """What each of GRADIENTS makes the rule add to a weight, with its default options; and its learning rate."""
    p = np.zeros(1)
    opt = getattr(optimizers, rule)(p)
    lr = opt.param_groups[0]["lr"]
    places = [0.0]
    for g in GRADIENTS:
        opt.step(np.array([g]))
        places.append(p[0])
    return np.diff(places), lr


def draw(rule: str, path: Path) -> None:
    with look():
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        grid = figure.add_gridspec(2, 2, width_ratios=(1.15, 1), height_ratios=(1, 2))
        ravine, given, answer = (
            figure.add_subplot(grid[:, 0]),
            figure.add_subplot(grid[0, 1]),
            figure.add_subplot(grid[1, 1]),
        )

        rate = best_rate(rule)
        x = trace(rule, RAVINE, STEPS, lr=rate)
        contours(ravine, RAVINE)
        minimum(ravine, RAVINE)
        ravine.plot(*x.w.T, color=COURSE(0.35), linewidth=0.8)
        ravine.scatter(*x.w.T, c=np.arange(STEPS + 1) / STEPS, cmap=COURSE, s=7, zorder=3)
        ravine.plot(*x.w[0], "o", color="black", markerfacecolor="white", markersize=5, zorder=4)
        ravine.plot(*x.w[-1], "o", color=RED, markersize=5, zorder=4)
        ravine.set(title=f"{STEPS} steps in a ravine, lr {rate:g}", xlabel="$w_1$", ylabel="$w_2$")

        moved, lr = steps(rule)
        t = np.arange(1, len(moved) + 1)
        given.step(t, GRADIENTS, where="mid", color=GREY)
        given.set(title="gradients that are given", ylabel="gradient", yticks=(-1, 0, 1, 3), xlim=(0, len(t) + 1))
        given.tick_params(labelbottom=False)
        answer.axhline(0, color="0.8", linewidth=0.8)
        answer.bar(t, -moved / lr, width=0.8, color=BLUE)
        answer.set(
            title="the steps that follow, against the gradient", xlabel="step", ylabel="step / lr", xlim=(0, len(t) + 1)
        )
        png(figure, 160).save(path)

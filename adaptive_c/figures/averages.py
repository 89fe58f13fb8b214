"""Moving averages: the weights that they give to the past, and the correction of their start."""

import numpy as np
from matplotlib.figure import Figure

from .. import optimizers
from .palette import BLACK, BLUE, GREY, INK, ORANGE, RED
from .picture import WIDTH, Picture, styled
from .problems import Array


def averages(series: Array, beta: float) -> tuple[Array, Array]:
    """Adam's moving average of a series of gradients after each of them, and what Adam makes of it.

    The second one is the average with bias correction.  It is read off Adam's own steps: with an eps that is beyond
    every gradient, the denominator of a step is eps, and lr takes that away again.
    """
    w, beyond = np.zeros(1), 1e12
    opt = optimizers.Adam(w, lr=beyond, betas=(beta, 0.0), eps=beyond)
    plain, corrected = [], []
    for gradient in series:
        w[:] = 0
        opt.step(np.array([gradient]))
        plain.append(opt.state["exp_avg"][0])
        corrected.append(-w[0])
    return np.array(plain), np.array(corrected)


@styled
def weights() -> Picture:
    """The weight (1 - beta) beta^k that a moving average gives to the gradient of k steps ago."""
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.9))
    first = [averages(np.eye(3)[i], 0.9)[0][-1] for i in range(3)]
    left.bar(range(3), first, color=BLUE, width=0.6)
    for i, (height, text) in enumerate(zip(first, ("0.9 · 0.9 · 0.1", "0.9 · 0.1", "0.1"), strict=True)):
        left.text(i, height + 0.002, f"{height:.3g}", ha="center", color=BLUE, weight="bold")
        left.text(i, 0.003, text, ha="center", va="bottom", color="white", rotation=90)
    left.set(xticks=range(3), xticklabels=("$g_1$", "$g_2$", "$g_3$"), ylim=(0, 0.115), ylabel="weight",
             title=r"the average after three steps, $\beta$ = 0.9")  # fmt: skip
    rows = [["g", 0.9, 2 - i, float(height)] for i, height in enumerate(first)]
    for beta, colour, dashes, marker in ((0.5, ORANGE, "-", "o"), (0.9, BLUE, "--", "s"), (0.99, BLACK, "-.", "^")):
        heights, _ = averages(np.eye(61)[0], beta)
        right.plot(heights, color=colour, linestyle=dashes, marker=marker, markersize=3, markevery=2)
        rows += [["impulse", beta, k, float(x)] for k, x in enumerate(heights)]
    for text, place, colour in (("0.5", (3, 0.17), ORANGE), ("0.9", (11.5, 0.04), BLUE), ("0.99", (46, 0.0082), BLACK)):
        right.annotate(rf"$\beta$ = {text}", place, color=INK.get(colour, colour))
    right.set(yscale="log", ylim=(1e-4, 1), xlim=(-1, 60), xlabel="how many steps ago", title="and after many")
    right.grid(visible=True)
    return Picture(figure, ("series", "beta", "steps_ago", "weight"), rows)


@styled
def bias_correction() -> Picture:
    """Averages that start at 0 are too small at first; Adam divides that out, or its first steps would be too long."""
    steps, b1, b2 = 1000, 0.9, 0.999
    noisy = 1 + 0.3 * np.random.default_rng(3).standard_normal(60)
    plain, corrected = averages(noisy, b1)
    figure = Figure(figsize=(WIDTH, 3.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    t = np.arange(1, 61)
    left.plot(t, noisy, ".", color=GREY, markersize=4, label="gradients, mean 1")
    left.plot(t, plain, "--", color=ORANGE, label="average as it is")
    left.plot(t, corrected, color=BLUE, label=r"divided by 1 - $\beta^t$")
    left.set(xlabel="step t", ylim=(0, 2.15), xlim=(0, 60), title=r"the average of gradients, $\beta$ = 0.9")
    left.legend(loc="upper right")
    rows = [
        ["average", int(i), float(g), float(a), float(b)] for i, g, a, b in zip(t, noisy, plain, corrected, strict=True)
    ]

    w = np.zeros(1)
    opt = optimizers.Adam(w, lr=1.0, betas=(b1, b2))
    taken, without = [], []
    for _ in range(steps):
        w[:] = 0
        opt.step(np.ones(1))
        taken.append(-float(w[0]))
        without.append(float(opt.state["exp_avg"][0] / np.sqrt(opt.state["exp_avg_sq"][0])))
    t = np.arange(1, steps + 1)
    right.plot(t, without, "--", color=ORANGE)
    right.plot(t, taken, color=RED)
    right.set(xscale="log", xlabel="step t", ylabel="length of a step / lr", ylim=(0, 7.5), xlim=(1, steps),
              title="gradients that are all alike")  # fmt: skip
    right.text(11, 6.75, r"$m\,/\sqrt{v}$ as they are", color=INK[ORANGE], ha="center")
    right.text(1.3, 0.35, "Adam: always 1", color=RED)
    for axes in (left, right):
        axes.grid(visible=True)
    rows += [["step", int(i), 1.0, a, b] for i, a, b in zip(t, without, taken, strict=True)]
    return Picture(figure, ("panel", "t", "gradient", "as_it_is", "corrected"), rows)

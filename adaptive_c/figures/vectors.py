"""Single updates: their vectors, and how much RMSprop amplifies or attenuates a gradient."""

from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from .palette import BLACK, BLUE, INK, ORANGE
from .picture import WIDTH, Picture, styled
from .problems import BOWL, Array, amplified, trace


def _arrow(axes: Any, start: Array, end: Array, colour: str, width: float = 1.6) -> None:
    """Draw an arrow."""
    style = {"arrowstyle": "-|>,head_width=.2,head_length=.45", "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops={**style, "color": colour})


def _pair(x: Array, digits: int = 2) -> str:
    """Two numbers as the labels show them."""
    return f"({x[0]:.{digits}f}, {x[1]:.{digits}f})"


@styled
def first_updates() -> Picture:
    """The first two updates of gradient descent and of RMSprop on 3 w1^2 + 10 w2^2, with their vectors."""
    rate, adaptive = 0.001, 0.05
    plain = trace("SGD", BOWL, 2, lr=rate)
    scaled = trace("RMSprop", BOWL, 2, lr=adaptive, alpha=0.9, eps=1e-8, eps_mode="inside")
    figure = Figure(figsize=(WIDTH, 4.3), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.7, 1))
    rows: list[list[Any]] = []
    for name, x, colour in (("gradient descent", plain, BLUE), ("RMSprop", scaled, ORANGE)):
        ink = INK.get(colour, colour)
        left.plot(*x.w.T, "o", color=colour, markersize=5, zorder=3)
        for t in range(2):
            _arrow(left, x.w[t], x.w[t + 1], colour)
        for t in range(3):
            s = x.state["square_avg"][t] if x.state else np.full(2, np.nan)
            v = x.update[t] if t < 2 else np.full(2, np.nan)
            rows.append([name, t, *map(float, (*x.w[t], *x.gradient[t], *s, *v))])
        for t in (1, 2):
            text = f"w({t}) = {_pair(x.w[t])}\n$\\nabla$E(w({t - 1})) = {_pair(x.gradient[t - 1])}"
            if x.state:
                text += f"\ns({t}) = {_pair(x.state['square_avg'][t])}"
            text += f"\nv({t}) = {_pair(x.update[t - 1], 3)}"
            place, ha = {
                ("gradient descent", 1): ((-10, -2), "right"),
                ("gradient descent", 2): ((-10, 12), "right"),
                ("RMSprop", 1): ((6, 34), "left"),
                ("RMSprop", 2): ((10, -8), "left"),
            }[name, t]
            left.annotate(text, x.w[t], place, textcoords="offset points", color=ink, fontsize=7.5, ha=ha, va="center")
        left.plot([], [], "o-", color=colour, label=f"{name}, lr {rate if x is plain else adaptive}")
    left.plot(*plain.w[0], "o", color=BLACK, markersize=6, zorder=4)
    left.annotate(
        f"w(0) = {_pair(plain.w[0], 0)}", plain.w[0], (-9, 4), textcoords="offset points", ha="right", fontsize=7.5
    )
    left.set(xlim=(-15.42, -14.32), ylim=(19.05, 20.13), xlabel="$w_1$", ylabel="$w_2$", title="the first two updates",
             aspect="equal", xticks=np.arange(-15.4, -14.3, 0.2))  # fmt: skip
    left.legend(loc="lower right")

    # The vectors at w(0), each at its own scale: only their directions can be compared.
    for vector, colour, text in (
        (plain.w[0], BLACK, f"w(0) = {_pair(plain.w[0], 0)}"),
        (-plain.gradient[0], BLUE, f"$-\\nabla$E(w(0)) = {_pair(-plain.gradient[0], 0)}"),
        (-scaled.update[0], ORANGE, f"$-$v(1) = {_pair(-scaled.update[0], 3)}, RMSprop"),
    ):
        _arrow(right, np.zeros(2), vector / np.hypot(*vector), colour, 2)
        right.plot([], [], color=colour, linewidth=2, label=text)
    circle = np.linspace(0, 2 * np.pi, 100)
    right.plot(np.cos(circle), np.sin(circle), color="0.88", linewidth=0.8, zorder=0)
    right.axhline(0, color="0.88", linewidth=0.8, zorder=0)
    right.axvline(0, color="0.88", linewidth=0.8, zorder=0)
    right.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), aspect="equal", xticks=[], yticks=[], title="directions at w(0)")
    right.spines[["left", "bottom"]].set_visible(False)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, 0.0))
    return Picture(figure, ("run", "t", "w1", "w2", "gradient1", "gradient2", "s1", "s2", "v1", "v2"), rows)


BETAS = (0.0, 0.5, 0.9, 0.95, 0.99, 1.0)


@styled
def amplification() -> Picture:
    """Where RMSprop makes the second of two gradients longer (red) and where shorter (blue), for several beta."""
    side = np.linspace(-4, 4, 81)
    first, second = np.meshgrid(side, side)
    figure, colours = Figure(figsize=(WIDTH, 4.7), layout="constrained"), colormaps["RdBu_r"].resampled(16)
    grid = figure.subplots(2, 3, sharex=True, sharey=True)
    rows: list[list[Any]] = []
    for axes, beta in zip(grid.flat, BETAS, strict=True):
        c = amplified(beta, first, second)
        image = axes.imshow(c, extent=(-4.05, 4.05, -4.05, 4.05), origin="lower", cmap=colours, vmin=-4, vmax=4)
        if c.min() < 0 < c.max():
            axes.contour(side, side, c, [0], colors="black", linewidths=0.9)
        axes.set(
            title=rf"$\beta$ = {beta:g}", xlabel="$g_1$", ylabel="$g_2$", xticks=range(-4, 5, 2), yticks=range(-4, 5, 2)
        )
        axes.label_outer()
        some = [x[::2, ::2].flat for x in (first, second, c)]  # every second point is enough to draw it again
        rows += [[beta, *map(float, row)] for row in zip(*some, strict=True)]
    bar = figure.colorbar(image, ax=grid, extend="both", shrink=0.85, label="$C_a$: attenuated < 0 < amplified")
    bar.outline.set_visible(False)
    return Picture(figure, ("beta", "g1", "g2", "c"), rows)

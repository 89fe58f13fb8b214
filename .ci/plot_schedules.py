"""Draw docs/schedules.png, the picture of docs/schedules.md, from the schedules of the installed package."""

from pathlib import Path

import matplotlib

matplotlib.use("agg")
import numpy as np
from matplotlib import pyplot

from adaptive_c import schedules as s

DRAWN = [
    "step(1, 250, gamma=0.4)",
    "multistep(1, [300, 700], gamma=0.3)",
    "exponential(1, 0.997)",
    "linear(1, 1000)",
    "polynomial(1, 1000, power=2)",
    "cosine(1, 1000)",
    "cosine_restarts(1, 150, mult=2)",
    "inverse_sqrt(1, 100)",
    "one_cycle(1, 1000)",
    "warmup(cosine(1, 800), 200)",
    "chain([0.3, cosine(1, 700)], [300])",
    "plateau(1, 0.6, patience=60)",
]


def watch(plateau, axes):
    """Draw the values of a plateau that is shown a noisy loss, together with that loss."""
    loss = 0.15 + 0.8 * np.exp(-np.arange(1000) / 120) + 0.02 * np.random.default_rng(1).normal(size=1000)
    values = []
    for t, metric in enumerate(loss):
        values.append(plateau(t))
        plateau = plateau.observe(t, metric)
    axes.plot(loss, color="0.75", lw=0.7)
    axes.text(80, 0.6, "metric", color="0.5", fontsize=8)
    axes.plot(values, color=COLOUR, lw=1.8)


COLOUR = "#1f5fa8"
pyplot.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "0.6",
                        "xtick.color": "0.35", "ytick.color": "0.35", "axes.titlelocation": "left"})  # fmt: skip
figure, grid = pyplot.subplots(4, 3, figsize=(9.6, 7.4), sharex=True, sharey=True, layout="constrained")
for axes, text in zip(grid.flat, DRAWN, strict=True):
    schedule = eval(text, vars(s))
    if schedule.reads_metric:
        watch(schedule, axes)
    else:
        schedule.plot(1000, ax=axes, color=COLOUR, lw=1.8)
    axes.set(title=text, xlabel="", xlim=(0, 1000), ylim=(-0.03, 1.08), xticks=(0, 500, 1000), yticks=(0, 0.5, 1))
    axes.title.set_fontsize(8.5)
    axes.grid(color="0.92", lw=0.8)
    axes.tick_params(length=0)
for axes in grid[-1]:
    axes.set_xlabel("step")
figure.savefig(Path(__file__).parents[1] / "docs" / "schedules.png", dpi=110, metadata={"Software": ""})

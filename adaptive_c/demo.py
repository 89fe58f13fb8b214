"""The demo: trains two models of handwritten digits in NumPy with each optimizer, then times steps of one large array.

The digits are scikit-learn's, 1,797 images of 8 x 8 pixels in ten classes.  All parameters of a model lie in one flat
array, and the optimizer steps that array.
"""

import platform
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table
from sklearn.datasets import load_digits

import adaptive_c as ac

from . import optimizers
from ._native import core, counted, isa
from .figures.palette import BLUE, RED
from .figures.picture import look, png

Array = np.ndarray[Any, Any]
Data = tuple[Array, Array, Array, Array]

# Options that suit both models better than a rule's defaults.  A label begins with the rule's name.
BETTER: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1},
    "SGD, momentum 0.9": {"lr": 0.05, "momentum": 0.9},
    "Momentum, nesterov": {"lr": 0.05, "nesterov": True},
    "Adagrad": {"lr": 0.05},
    "RMSprop": {"lr": 2e-3, "alpha": 0.9},
    "Adam": {"lr": 3e-3},
    "AdamW": {"lr": 3e-3, "weight_decay": 1e-2},
    "Adamax": {"lr": 5e-3},
    "NAdam": {"lr": 3e-3},
    "RAdam": {"lr": 1e-2},
    "Lion": {"lr": 1e-3, "weight_decay": 1e-2},
    "Rprop": {"lr": 1e-2, "step_sizes": (1e-6, 0.02)},
    "SuperSAB": {"lr": 0.3, "max_rate": 1.0},
}
OPTIMIZERS: dict[str, tuple[Callable[..., ac.Optimizer], dict[str, Any]]] = {
    label: (getattr(optimizers, rule), BETTER.get(label, {}))
    for rule in optimizers.__all__
    for label in [label for label in BETTER if label.partition(",")[0] == rule] or [rule]
}
# Rprop and SuperSAB need full batches, and get them.
FULL_BATCH = ("Rprop", "SuperSAB")
BATCH = 64


def digits(seed: int = 0) -> Data:
    """Pixels in [0, 1] and labels of 1,437 images to train on, and of 360 to test with."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    x, y = (images[order] / 16).astype("float32"), labels[order]
    return x[:1437], y[:1437], x[1437:], y[1437:]


def initial(hidden: int | None, seed: int = 0) -> dict[str, Array]:
    """The parameters of softmax regression (hidden=None) or of a perceptron with one hidden layer."""
    rng = np.random.default_rng(seed)
    sizes = [64, 10] if hidden is None else [64, hidden, 10]
    params: dict[str, Array] = {}
    for i, (n, m) in enumerate(pairwise(sizes)):
        scale = np.sqrt(2 / n) if hidden is not None else 0.0
        params[f"w{i}"] = (rng.standard_normal((n, m)) * scale).astype("float32")
        params[f"b{i}"] = np.zeros(m, "float32")
    return params


def forward(p: dict[str, Array], x: Array) -> tuple[Array, Array]:
    """The input of the last layer, and the logarithms of the class probabilities."""
    layers = len(p) // 2
    for i in range(layers - 1):
        x = np.maximum(x @ p[f"w{i}"] + p[f"b{i}"], 0)
    z = x @ p[f"w{layers - 1}"] + p[f"b{layers - 1}"]
    z = z - z.max(axis=1, keepdims=True)
    return x, z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def gradient(p: dict[str, Array], g: dict[str, Array], x: Array, y: Array) -> float:
    """Write the gradient of the mean cross-entropy into g, and return the mean cross-entropy."""
    last, log_probability = forward(p, x)
    loss = -float(log_probability[np.arange(len(y)), y].mean())
    delta = np.exp(log_probability)
    delta[np.arange(len(y)), y] -= 1
    delta /= len(y)
    if "w1" in p:
        g["w1"][...] = last.T @ delta
        g["b1"][...] = delta.sum(axis=0)
        delta = (delta @ p["w1"].T) * (last > 0)
        last = x
    g["w0"][...] = last.T @ delta
    g["b0"][...] = delta.sum(axis=0)
    return loss


def train(name: str, hidden: int | None, data: Data, epochs: int, advance: Callable[[], None], seed: int = 0,
          **more: Any) -> tuple[list[float], float, float]:  # fmt: skip
    """The loss over the training set after each epoch, the accuracy on the test set, and the seconds of a step."""
    x, y, x_test, y_test = data
    flat, p = ac.flatten(initial(hidden, seed))
    grad, g = ac.flatten(p, like=flat)
    cls, options = OPTIMIZERS[name]
    opt = cls(flat, **options, **more)
    rng = np.random.default_rng(seed)
    losses = []
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for i in range(0, len(x), BATCH):  # as many steps for those with full batches
            some = order if name in FULL_BATCH else order[i : i + BATCH]
            gradient(p, g, x[some], y[some])
            opt.step(grad)
        losses.append(-float(forward(p, x)[1][np.arange(len(y)), y].mean()))
        advance()
    accuracy = float((forward(p, x_test)[1].argmax(axis=1) == y_test).mean())
    return losses, accuracy, _seconds(lambda: opt.step(grad))


def _seconds(step: Callable[[], None]) -> float:
    """The seconds of one step when steps follow each other, so that the arrays stay in the cache.

    There are few of them: if one gradient were repeated without end, averages of zeros would decay into denormal
    numbers.
    """
    times = []
    for _ in range(7):
        start = time.perf_counter()
        for _ in range(20):
            step()
        times.append((time.perf_counter() - start) / 20)
    return statistics.median(times)


def one_large_array(n: int, console: Console) -> None:
    """Time AdamW on one flat array, the machine's ceiling for the same bytes, and the same step in NumPy."""
    rng = np.random.default_rng(0)
    p = rng.standard_normal(n, "float32")
    g = rng.random(n, "float32") * np.float32(1e-6)
    opt = ac.AdamW(p)
    states = tuple(opt.state[name] for name in ("exp_avg", "exp_avg_sq"))

    def in_numpy(t: int = 1) -> None:
        m, v = states
        np.multiply(p, 1 - 1e-3 * 1e-2, out=p)
        m *= 0.9
        m += 0.1 * g
        v *= 0.999
        v += (0.001 * g) * g
        np.subtract(p, 1e-3 / (1 - 0.9**t) * m / (np.sqrt(v / (1 - 0.999**t)) + 1e-8), out=p)

    contenders: dict[str, Callable[[], None]] = {
        "adaptive_c": lambda: opt.step(g),
        "ceiling": lambda: core.ceiling((g,), (p, *states)),
        "NumPy": in_numpy,
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for step in contenders.values():
        step()
    for i in range(7):
        for name, step in contenders.items():
            if name == "NumPy" and i >= 2:
                continue
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    ours, by_hand = (statistics.median(times[name]) for name in ("adaptive_c", "NumPy"))
    ceiling = min(times["ceiling"] + times["adaptive_c"])  # medians would let noise put a step above it
    console.print(
        f"\nAdamW on {n:,} float32 elements, {isa}, {counted(ac.get_num_threads(), 'thread')}, {platform.machine()}:\n"
        f"  {ours / n * 1e9:.3f} ns per element, {28 * n / ours / 1e9:.1f} GB/s (28 bytes per element)\n"
        f"  {ceiling / ours:.0%} of the ceiling, the fastest of all passes over the same bytes "
        f"({28 * n / ceiling / 1e9:.1f} GB/s)\n"
        f"  the same step in NumPy: {by_hand / n * 1e9:.3f} ns per element, {by_hand / ours:.1f} times as long"
    )


def picture(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw the loss of each optimizer in its own panel, in front of the losses of all others in grey."""
    looks = {"softmax regression": (BLUE, "-"), "two-layer perceptron": (RED, "--")}
    with look():
        figure = Figure(figsize=(8, 7.2), layout="constrained")
        rows = -(-len(curves) // 4)
        panels = figure.subplots(rows, 4, sharex=True, sharey=True, squeeze=False)
        for axes, (name, losses) in zip(panels.flat, curves.items(), strict=False):
            for others in curves.values():
                for loss in others.values():
                    axes.plot(_steps(loss), loss, color="0.88", linewidth=0.7, zorder=0)
            for model, loss in losses.items():
                colour, dashes = looks[model]
                axes.plot(_steps(loss), loss, color=colour, linestyle=dashes, label=model)
            note = ", full batches" if name in FULL_BATCH else ""
            axes.set_title(f"{name.replace(', nesterov', ', Nesterov')}\nlr {_rate(name):g}{note}", fontsize=8)
            axes.set(yscale="log", xlabel="step", ylabel="cross-entropy", ylim=(3e-4, 3))
            axes.grid(visible=True)
            axes.minorticks_off()
            axes.label_outer()
        for axes in panels.flat[len(curves) :]:
            axes.set_visible(False)
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
        png(figure, 120).save(path, optimize=True)


def _steps(losses: list[float]) -> range:
    """The step after which each loss was found."""
    epoch = -(-1437 // BATCH)
    return range(epoch, epoch * len(losses) + 1, epoch)


def _rate(name: str) -> float:
    """The learning rate of one of the demo's optimizers."""
    cls, options = OPTIMIZERS[name]
    rate: float = cls(np.zeros(1), **options).param_groups[0]["lr"]
    return rate


def run(quick: bool = False, folder: str = ".") -> None:
    """The demo: train two models with every optimizer, step one large array, draw the picture."""
    console = Console()
    data = digits()
    epochs = 8 if quick else 40
    models = {"softmax regression": None, "two-layer perceptron": 64}
    curves: dict[str, dict[str, list[float]]] = {name: {} for name in OPTIMIZERS}
    tables = []
    path = Path(folder, "adaptive-c-demo.png")
    path.parent.mkdir(parents=True, exist_ok=True)  # if this fails, no work is lost yet
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("training", total=len(models) * len(OPTIMIZERS) * epochs)
        for model, hidden in models.items():
            size = sum(array.size for array in initial(hidden).values())
            title = f"{model}, {size:,} parameters, {epochs * -(-len(data[0]) // BATCH)} steps"
            table = Table(
                Column("optimizer", no_wrap=True), "lr", "final loss", "test accuracy", "us per step", title=title
            )
            for column in table.columns[1:]:
                column.justify = "right"
            for name in OPTIMIZERS:
                progress.update(bar, description=f"{model}, {name}")
                losses, accuracy, step = train(name, hidden, data, epochs, lambda: progress.advance(bar))
                table.add_row(name, f"{_rate(name):g}", f"{losses[-1]:.4f}", f"{accuracy:.1%}", f"{step * 1e6:.2f}")
                curves[name][model] = losses
            tables.append(table)
    for table in tables:
        console.print(table)
    picture(curves, path)
    console.print(f"loss curves: {path}")
    one_large_array(1 << (22 if quick else 26), console)

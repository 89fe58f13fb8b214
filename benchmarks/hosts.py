"""How long a step takes inside other programs, with their own optimizer and with this one.

    pip install . adamixture thinc
    python benchmarks/hosts.py [--rounds N] [--threads N] [--cases NAME ...]

Each contender has its own process; they take turns, round after round.  The ratio to the host's own code is formed
within each round.  Medians are shown with intervals that hold the true one with a chance of 95%.

adamixture  its own kernel of Adam for the matrix P of n float64 elements, which moves towards what expectation
            maximisation has given, within bounds; ours is ``opt.step(target=...)`` with the same bounds
thinc       its Adam with the defaults (clipping, averages, weight decay) for its example of MNIST, two hidden layers of
            one width; ours is one optimizer for all arrays
pennylane   a step of gradient descent for two arrays of 12, which is given its learning rate, beside NumPy
calls       how much longer a step of this library takes with ``lr=``, after ``max_grad_norm`` was assigned, and after
            ``rebind`` of one array
"""

import argparse
import importlib.machinery
import importlib.util
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import adaptive_c as ac
from adaptive_c.bench.suite import interval

LR, CLASSES = 0.005, 8


# --- ADAMIXTURE -----------------------------------------------------------------------------------------------------


def matrices(n):
    rng = np.random.default_rng(0)
    return (rng.uniform(0.1, 0.9, (n // CLASSES, CLASSES)) for _ in range(2))


def adamixture_theirs(n, threads):
    spec = importlib.util.find_spec("adamixture")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("pip install adamixture")
    (path,) = Path(spec.submodule_search_locations[0]).glob("src/utils_c/cython/em*.so")  # without its command line
    loader = importlib.machinery.ExtensionFileLoader("em", str(path))
    em = importlib.util.module_from_spec(importlib.util.spec_from_loader("em", loader))
    loader.exec_module(em)
    p, target = matrices(n)
    m, v, t = np.zeros_like(p), np.zeros_like(p), 0

    def step():
        nonlocal t
        t += 1
        em.adamUpdateP(p, target, m, v, LR, 0.8, 0.88, 1e-8, t, *p.shape)

    return step, lambda: p


def adamixture_ours(n, threads):
    p, target = matrices(n)
    opt = ac.Adam(p, lr=LR, betas=(0.8, 0.88), bounds=(1e-5, 1 - 1e-5), n_threads=threads)
    return lambda: opt.step(target=target), lambda: p


# --- thinc ----------------------------------------------------------------------------------------------------------


class ForThinc:
    """The adapter of docs/hosts.md."""

    def __init__(self, model, **options):
        nodes = [(node, name) for node in model.walk() for name in node.param_names if node.has_param(name)]
        self.opt = ac.AdamW({(node.id, name): node.get_param(name) for node, name in nodes}, zero_grad=True, **options)
        self.grads = {}

    def __call__(self, key, weights, gradient, *, lr_scale=1.0):
        self.grads[key] = gradient
        return weights, gradient

    def step_schedules(self):
        self.opt.step({key: self.grads.get(key) for key in self.opt.param_groups[0]["params"]})
        self.grads = {}


def thinc_model(width, make):
    from thinc.api import Relu, Softmax, chain, fix_random_seed

    fix_random_seed(0)
    model = chain(Relu(width), Relu(width), Softmax(10))
    rng = np.random.default_rng(0)
    model.initialize(X=rng.random((2, 784), "float32"), Y=np.eye(10, dtype="float32")[:2])
    optimizer = make(model)
    nodes = [(node, name) for node in model.walk() for name in node.param_names]
    kept = [rng.standard_normal(node.get_param(name).shape, "float32") * 0.1 for node, name in nodes]

    def prepare():  # as a backward pass would
        for (node, name), g in zip(nodes, kept, strict=True):
            node.set_grad(name, g.copy())

    def step():
        model.finish_update(optimizer)
        optimizer.step_schedules()

    return step, lambda: np.concatenate([node.get_param(name).ravel() for node, name in nodes]), prepare


def thinc_theirs(width, threads):
    from thinc.api import Adam

    return thinc_model(width, lambda model: Adam(0.001))


def thinc_ours(width, threads):
    def decay(t):
        return min((2 + t) / (11 + t), 0.9999)

    return thinc_model(width, lambda model: ForThinc(model, lr=0.001, eps_mode="hat", max_grad_norm=1.0,
                                                     norm_over="array", weight_decay=1e-6, ema_decay=decay,
                                                     n_threads=threads))  # fmt: skip


# --- PennyLane ------------------------------------------------------------------------------------------------------


def small():
    return [np.ones(12), np.ones(12)], [np.full(12, 0.1), np.full(12, 0.2)]


def pennylane_theirs(n, threads):
    params, grads = small()

    def step():
        for p, g in zip(params, grads, strict=True):
            p -= 1e-9 * g

    return step, lambda: params[0]


def pennylane_ours(n, threads):
    params, grads = small()
    opt = ac.SGD(params)
    return lambda: opt.step(grads, lr=1e-9), lambda: params[0]


# --- what a step is given or told -----------------------------------------------------------------------------------


def plain(n, threads, **options):
    w, g = np.ones(n), np.full(n, 0.1)
    opt = ac.SGD(w, lr=1e-9, **options)
    return opt, w, g


def step_alone(n, threads, **options):
    opt, w, g = plain(n, threads, **options)
    return lambda: opt.step(g), lambda: w


def clipped_alone(n, threads):
    return step_alone(n, threads, max_grad_norm=1.0)


def with_lr(n, threads):
    opt, w, g = plain(n, threads)
    return lambda: opt.step(g, lr=1e-9), lambda: w


def with_max_grad_norm(n, threads):
    opt, w, g = plain(n, threads, max_grad_norm=1.0)
    limits = itertools.cycle((1.0, 1.5))

    def step():
        opt.max_grad_norm = next(limits)
        opt.step(g)

    return step, lambda: w


def with_rebind(n, threads):
    opt, w, g = plain(n, threads)
    arrays = itertools.cycle((w.copy(), w))

    def step():
        opt.rebind(next(arrays))
        opt.step(g)

    return step, lambda: w


# --- in turn --------------------------------------------------------------------------------------------------------

CASES: dict[str, tuple[Callable, Callable, int, int]] = {  # theirs, ours, size, steps of a round
    "adamixture-4e6": (adamixture_theirs, adamixture_ours, 4_000_000, 8),
    "adamixture-16e6": (adamixture_theirs, adamixture_ours, 16_000_000, 4),
    "thinc-32": (thinc_theirs, thinc_ours, 32, 200),
    "thinc-1024": (thinc_theirs, thinc_ours, 1024, 10),
    "pennylane": (pennylane_theirs, pennylane_ours, 12, 5000),
    "calls: lr=": (step_alone, with_lr, 12, 20_000),
    "calls: max_grad_norm": (clipped_alone, with_max_grad_norm, 12, 20_000),
    "calls: rebind": (step_alone, with_rebind, 12, 20_000),
}
CHECKED = 3  # steps, after which both must have the same parameters


def work(name: str, which: int, threads: int | None) -> None:
    make, size, steps = CASES[name][which], *CASES[name][2:]
    step, params, *prepare = make(size, threads)
    for _ in range(CHECKED):
        for f in (*prepare, step):
            f()
    print(" ".join(map(repr, params().ravel()[:: max(1, params().size // 50)].tolist())), flush=True)
    for _ in sys.stdin:
        seconds = 0.0
        for _ in range(1 if not prepare else steps):
            for f in prepare:
                f()
            start = time.perf_counter()
            for _ in range(1 if prepare else steps):
                step()
            seconds += time.perf_counter() - start
        print(seconds / steps, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        work(given.cases[0], given.worker, given.threads or None)
        return
    for case in given.cases:
        pair = [
            subprocess.Popen(
                [sys.executable, "-P", __file__, "--cases", case, "--worker", str(which), "--threads",
                 str(given.threads)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            )
            for which in (0, 1)
        ]  # fmt: skip
        theirs, ours = (np.array(list(map(float, x.stdout.readline().split()))) for x in pair)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        seconds: list[list[float]] = [[], []]
        for i in range(given.rounds + 1):
            for which in (0, 1) if i % 2 else (1, 0):
                print(file=pair[which].stdin, flush=True)
                took = float(pair[which].stdout.readline())
                if i:  # the first one starts threads
                    seconds[which].append(took)
        if case.startswith("calls"):
            unit, found = " us more", [1e6 * (b - a) for a, b in zip(*seconds, strict=True)]
        else:
            unit, found = "x", [a / b for a, b in zip(*seconds, strict=True)]
        low, high = interval(found)
        theirs, ours = (1e6 * statistics.median(x) for x in seconds)
        print(
            f"{case:20} host's {theirs:11,.2f} us, ours {ours:11,.2f} us: "
            f"{statistics.median(found):.2f}{unit} [{low:.2f}, {high:.2f}]"
        )
        for process in pair:
            process.kill()


if __name__ == "__main__":
    sys.exit(main())

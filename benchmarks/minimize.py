"""What `minimize` costs for each iteration, compared with a loop of opt.step that is written by hand.

python benchmarks/minimize.py [--rounds N] [--threads N] [--cpu] [--cases NAME ...]

Each contender has its own process; they take turns, round after round.  The difference and the ratio to the loop by
hand are formed within each round.  Medians are shown with intervals that hold the true one with a chance of 95%.
--cpu counts the processor's time, for a machine that does other work too; it needs --threads 1.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import adaptive_c as ac
from adaptive_c.bench.suite import interval

LARGE = 1_000_000


def rosenbrock_2(x):
    """In plain Python, because NumPy would take longer than the step: as little as a function can take."""
    a, b = x.item(0), x.item(1)
    c = b - a * a
    return 100 * c * c + (1 - a) ** 2, np.array([-400 * a * c - 2 * (1 - a), 200 * c])


CURVATURE = np.linspace(0.5, 1, LARGE)
SCRATCH = np.empty((2, LARGE - 1))  # so that no memory is allocated, whose cost depends on what was freed before


def quadratic(x, out):
    """Two passes over memory: as little as a function of so many elements can take."""
    np.multiply(CURVATURE, x, out=out)
    return 0.5 * float(out @ x)


def rosenbrock(x, out):
    """Rosenbrock's function in NumPy."""
    a, b = SCRATCH
    np.multiply(x[:-1], x[:-1], out=a)
    np.subtract(x[1:], a, out=a)
    np.subtract(1, x[:-1], out=b)
    f = float(100 * (a @ a) + b @ b)
    out[-1] = 0
    np.multiply(b, -2, out=out[:-1])
    np.multiply(a, x[:-1], out=b)
    b *= 400
    out[:-1] -= b
    a *= 200
    out[1:] += a
    return f


CASES: dict[str, tuple[Callable[..., Any], Any, int, int]] = {  # function, jac, elements, iterations of a round
    "rosenbrock-2": (rosenbrock_2, True, 2, 5000),
    "quadratic-1e6": (quadratic, "out", LARGE, 40),
    "rosenbrock-1e6": (rosenbrock, "out", LARGE, 16),
}
BOUNDS = {"bounds": (-1e3, 1e3)}
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {  # what it is compared with, and its options
    "by hand": ("by hand", {}),
    "by hand, checked": ("by hand", {"on_nonfinite": "skip"}),
    "minimize": ("by hand", {}),
    "minimize, last": ("by hand", {"average": "last"}),
    "minimize, best": ("by hand", {"average": "best"}),
    "minimize, noisy": ("by hand", {"patience": 10**9, "average": "last"}),
    "by hand, bounds": ("by hand, bounds", BOUNDS),
    "minimize, bounds": ("by hand, bounds", BOUNDS),
}


class Timed:
    """A function that notes when its calls 3 and 3 + steps begin; whoever calls it, this costs the same."""

    def __init__(self, fun, steps, clock):
        self.fun, self.steps, self.clock, self.calls, self.times = fun, steps, clock, 0, []

    def __call__(self, *x, **out):
        if self.calls in (3, 3 + self.steps):
            self.times.append(self.clock())
        self.calls += 1
        return self.fun(*x, **out)


def by_hand(fun, jac, x, steps, options):
    opt = ac.Adam(x, **options)
    out = np.zeros_like(x)
    for _ in range(steps + 4):
        if jac is True:
            _, g = fun(x)
            opt.step(g)
        else:
            fun(x, out=out)
            opt.step(out)


def by_minimize(fun, jac, x, steps, options):
    exact = {} if "patience" in options else {"tol": 0}
    ac.minimize(fun, x, jac=jac, maxiter=steps + 4, **exact, **options)


def work(name: str) -> None:
    """The process of a contender: for each case asked for, the seconds of one iteration."""
    loop = by_hand if name.startswith("by hand") else by_minimize
    for line in sys.stdin:
        case, threads, clock = line.split()
        fun, jac, n, steps = CASES[case]
        options = {"lr": 1e-4, "n_threads": int(threads) or None, **CONTENDERS[name][1]}
        timed = Timed(fun, steps, getattr(time, clock))
        loop(timed, jac, np.full(n, 0.5), steps, options)
        print((timed.times[1] - timed.times[0]) / steps, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(given.worker)
        return
    clock = "process_time" if given.cpu else "perf_counter"
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-P", __file__, "--worker", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for name in CONTENDERS
    }
    try:
        for case in given.cases:
            seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
            for i in range(given.rounds + 1):
                order = list(processes) if i % 2 else list(reversed(processes))
                for name in order:
                    process = processes[name]
                    print(case, given.threads, clock, file=process.stdin, flush=True)
                    took = float(process.stdout.readline())
                    if i:  # the first one starts threads and touches memory
                        seconds[name].append(took)
            print(f"{case}: by hand {1e6 * statistics.median(seconds['by hand']):.2f} us an iteration")
            for name, (base, _) in CONTENDERS.items():
                if name == base:
                    continue
                pairs = list(zip(seconds[name], seconds[base], strict=True))
                more, ratio = [1e6 * (a - b) for a, b in pairs], [a / b for a, b in pairs]
                (low, high), (least, most) = interval(more), interval(ratio)
                print(
                    f"  {name:17} {statistics.median(more):+8.2f} us [{low:+.2f}, {high:+.2f}]"
                    f"  {statistics.median(ratio):.3f}x [{least:.3f}, {most:.3f}]"
                )
    finally:
        for process in processes.values():
            process.kill()


if __name__ == "__main__":
    sys.exit(main())

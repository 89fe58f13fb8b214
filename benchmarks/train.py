"""Do narrow numbers train as well?  Test losses of two models, over seeds, for each format of state and parameters.

    pip install . scikit-learn rich
    python benchmarks/train.py [--seeds 5] [--json FILE]

The models are the demo's perceptron on scikit-learn's digits, and a matrix factorisation of 1,000,000 observed entries
of a generated 4,000 x 4,000 matrix of rank 16, with noise.  Both are trained with AdamW and with Adagrad.
"""

import argparse
import json
import math

import numpy as np

import adaptive_c as ac
from adaptive_c import demo, reference

FORMATS = {
    "float32": {},
    "bfloat16 state": {"state_dtype": "bfloat16"},
    "uint8 state": {"state_dtype": "uint8"},
    "bfloat16 parameters, stochastic": {"rounding": "stochastic"},
    "bfloat16 parameters and state": {"rounding": "stochastic", "state_dtype": "bfloat16"},
}


class Model:
    """The float32 arrays that the model computes with, and those that are stepped: the same, or bfloat16 copies."""

    def __init__(self, rule, params, lr, seed, formats):
        self.used = params
        self.stored = params
        if "rounding" in formats:
            self.stored = {k: reference.to_bfloat16(x, reference.NEAREST) for k, x in params.items()}
        self.opt = getattr(ac, rule)(self.stored, lr=lr, seed=seed, uint16_as="bfloat16", **formats)
        self.widen()

    def step(self, grads):
        self.opt.step(grads)
        self.widen()

    def widen(self):
        if self.stored is not self.used:
            for key, x in self.stored.items():
                self.used[key][...] = reference.from_bfloat16(x)


def perceptron(rule, seed, formats):
    x, y, x_test, y_test = demo.digits(seed)
    p = demo.initial(64, seed)
    g = {key: np.zeros_like(value) for key, value in p.items()}
    model = Model(rule, p, {"AdamW": 2e-3, "Adagrad": 0.03}[rule], seed, formats)
    rng = np.random.default_rng(seed)
    for _ in range(15):
        for part in np.array_split(rng.permutation(len(x)), len(x) // 64):
            demo.gradient(p, g, x[part], y[part])
            model.step(g)
    return -float(demo.forward(p, x_test)[1][np.arange(len(y_test)), y_test].mean())


def factorisation(rule, seed, formats, rows=4000, rank=16, entries=1_000_000):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(2, rows, rank)).astype("float32")
    i, j = rng.integers(0, rows, (2, entries))
    y = (a[i] * b[j]).sum(1) / math.sqrt(rank) + 0.1 * rng.standard_normal(entries, "float32")
    u, v = 0.3 * rng.standard_normal((2, rows, rank), "float32")
    model = Model(rule, {"u": u, "v": v}, {"AdamW": 0.02, "Adagrad": 0.3}[rule], seed, formats)
    train = rng.random(entries) < 0.9
    for _ in range(20):
        for part in np.array_split(rng.permutation(np.flatnonzero(train)), 20):
            error = ((u[i[part]] * v[j[part]]).sum(1) - y[part])[:, None]
            gu, gv = np.zeros_like(u), np.zeros_like(v)
            np.add.at(gu, i[part], error * v[j[part]])
            np.add.at(gv, j[part], error * u[i[part]])
            model.step({"u": gu, "v": gv})
    return float(np.mean(((u[i[~train]] * v[j[~train]]).sum(1) - y[~train]) ** 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="runs of each row (5)")
    parser.add_argument("--json", help="a file for the losses")
    arguments = parser.parse_args()
    results = []
    for task in (perceptron, factorisation):
        for rule in ("AdamW", "Adagrad"):
            full = 0.0
            for name, formats in FORMATS.items():
                losses = [task(rule, seed, formats) for seed in range(arguments.seeds)]
                mean = float(np.mean(losses))
                full = full or mean
                results.append({"task": task.__name__, "rule": rule, "format": name, "losses": losses})
                print(f"{task.__name__:14} {rule:8} {name:32} {mean:.5f}  {mean / full - 1:+.2%}", flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    main()

"""Does it matter which steps the other rows take?  A factor model of ratings, trained three ways.

    pip install .
    python benchmarks/rows.py [--ratings 1000000] [--epochs 10] [--seeds 3] [--rule AdamW] [--lr 0.01]

A few users give, and a few items get, most of the ratings, as in any shop.  The model is a product of two tables with
one row for each user and for each item; a step touches the rows of one batch.  These are the ways:

dense   the gradient is a whole table, with zeros in all other rows: each of them moves on and decays
exact   gradients are Rows, with rows="exact": the same numbers, to the last bit
lazy    gradients are Rows, with rows="lazy": a row that has no gradient waits

The script prints the mean squared error on ratings that were held out, epoch by epoch, and the seconds of the steps.
"""

import argparse
import time

import numpy as np

import adaptive_c as ac

RANK, BATCH = 16, 4096
WAYS = ("dense", "exact", "lazy")


def ratings(n, users, items, seed):
    """Users, items, and ratings of variance 1 with noise of variance 0.25; popularity falls with the rank's root."""
    rng = np.random.default_rng(seed)
    pairs = []
    for size in (users, items):
        shares = np.cumsum(np.arange(1, size + 1) ** -0.7)
        pairs.append(rng.permutation(size)[np.searchsorted(shares, rng.random(n) * shares[-1])])
    a, b = rng.normal(size=(users, RANK)), rng.normal(size=(items, RANK))
    y = (a[pairs[0]] * b[pairs[1]]).sum(1) / RANK**0.5 + 0.5 * rng.normal(size=n)
    return *pairs, y.astype("float32")


def train(way, data, sizes, epochs, seed, rule, **options):
    """The held-out error after each epoch, the seconds that steps took, and the tables."""
    i, j, y = data
    rng = np.random.default_rng(seed)
    p = {name: 0.3 * rng.standard_normal((size, RANK), "float32") for name, size in zip("ui", sizes, strict=True)}
    opt = getattr(ac, rule)(p, rows="lazy" if way == "lazy" else "exact", **options)
    g = {name: np.zeros_like(x) for name, x in p.items()}
    test = rng.random(len(y)) < 0.1
    errors, seconds = [], 0.0
    for _ in range(epochs):
        order = rng.permutation(np.flatnonzero(~test))
        for part in np.array_split(order, max(1, len(order) // BATCH)):
            start = time.perf_counter()
            if way == "exact":  # the rows that are about to be read
                opt.catch_up("u", i[part])
                opt.catch_up("i", j[part])
            seconds += time.perf_counter() - start
            u, v = p["u"][i[part]], p["i"][j[part]]
            error = ((u * v).sum(1) - y[part])[:, None]
            grads = {"u": ac.Rows(i[part], error * v), "i": ac.Rows(j[part], error * u)}
            start = time.perf_counter()
            if way == "dense":
                for name, rows in grads.items():
                    g[name][...] = 0
                    np.add.at(g[name], rows.indices, rows.values)
                grads = g
            opt.step(grads)
            seconds += time.perf_counter() - start
        opt.catch_up()  # all rows, before they are evaluated
        errors.append(float(np.mean(((p["u"][i[test]] * p["i"][j[test]]).sum(1) - y[test]) ** 2)))
    return errors, seconds, p


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ratings", type=int, default=1_000_000, help="how many there are (1,000,000)")
    parser.add_argument("--epochs", type=int, default=10, help="how often each is used (10)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each way (3)")
    parser.add_argument("--rule", default="AdamW", help="any rule (AdamW)")
    parser.add_argument("--lr", type=float, default=0.01, help="its learning rate (0.01)")
    parser.add_argument("--weight-decay", type=float, default=0.03, help="and its weight decay (0.03)")
    chosen = parser.parse_args(arguments)
    sizes = max(10, chosen.ratings // 100), max(5, chosen.ratings // 250)
    options = {"lr": chosen.lr, "weight_decay": chosen.weight_decay}
    found = {}
    for way in WAYS:
        runs = [train(way, ratings(chosen.ratings, *sizes, seed), sizes, chosen.epochs, seed, chosen.rule, **options)
                for seed in range(chosen.seeds)]  # fmt: skip
        found[way] = runs
        errors = np.mean([errors for errors, _, _ in runs], 0)
        seconds = np.mean([seconds for _, seconds, _ in runs])
        print(f"{way:6}", *(f"{error:.4f}" for error in errors), f" {seconds:.1f} s", flush=True)
    for (*_, dense), (*_, exact) in zip(found["dense"], found["exact"], strict=True):
        same = all((dense[name] == exact[name]).all() for name in dense)
        print("dense and exact tables are the same" if same else "dense and exact tables DIFFER")
    return found


if __name__ == "__main__":
    main()

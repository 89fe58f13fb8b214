"""Gradients of rows for fuzz.py: what it draws, how twins hand them in, and what a lazy step must leave alone.

Under rows="exact" the first twin is given Rows and the second the dense gradient that they stand for; under "lazy" both
get Rows, in other orders, cuts and forms, and a copy of the first one makes the dense step, which touched rows must equal.
"""

import copy

import numpy as np
from fuzz_twins import DTYPES, PER_ARRAY, bits, nearest, pick

import adaptive_c as ac
from adaptive_c import reference


class Sparse:
    """A gradient of some rows of a segment, with its entries, and dense."""

    def __init__(self, rng, group, size, dtype, change):
        """change: what is done to the values, as numbers."""
        self.length, rows = group.length, size // group.length
        k = int(pick(rng, [0, 1, 2, 5, 40, 100])) if rows else 0
        self.indices = rng.integers(0, min(rows, pick(rng, [2, rows, rows])) or 1, k)
        self.bags, n = np.arange(k), k
        if rng.random() < 0.3:
            n = int(rng.integers(1, 4))
            self.bags = np.sort(rng.integers(0, n, k))
        native = "float64" if group.dtype == "float64" else "float32"
        self.weights = rng.normal(size=k).astype(native) if rng.random() < 0.3 else None
        self.values = nearest(change(rng.normal(size=n * self.length)), DTYPES[dtype]).reshape(n, self.length)
        with np.errstate(all="ignore"):
            self.dense, self.touched = reference.sum_rows(
                (rows, self.length), native, self.indices, self.values[self.bags], weights=self.weights
            )
            self.written_out = self.values[self.bags]
            if self.weights is not None:
                self.written_out = self.weights[:, None] * self.written_out.astype(native)

    def cut(self, rng, start, stop, shape):
        """Rows for an array that has elements start .. stop-1 of the segment."""
        keep = (self.indices * self.length >= start) & (self.indices * self.length < stop)
        indices = (self.indices[keep] - start // self.length).astype(pick(rng, ["int32", "int64"]))
        if rng.random() < 0.5:  # entries written out, and the rows in another order
            order = np.argsort(rng.permutation(stop // self.length + 1)[indices], kind="stable")
            return ac.Rows(indices[order], self.written_out[keep][order].reshape(-1, *shape[1:]))
        offsets = np.searchsorted(self.bags[keep], np.arange(len(self.values))).astype(pick(rng, ["int32", "int64"]))
        weights = None if self.weights is None else self.weights[keep]
        return ac.Rows(indices, self.values.copy().reshape(-1, *shape[1:]), offsets=offsets, weights=weights)


def dense(grads):
    return [[x.dense.reshape(-1) if isinstance(x, Sparse) else x for x in segments] for segments in grads]


class Dense:
    """Before a step that has rows: a copy of a twin, which makes the dense step."""

    def __init__(self, rng, run, twin, grads, extra):
        self.run, self.grads = run, grads
        self.before = self.seen(twin)
        self.other = run.other(rng, twin.values())
        self.other.opt.load_state_dict(copy.deepcopy(twin.opt.state_dict()))
        self.other.opt.step(self.other.dress(rng, dense(grads)), **extra)

    @staticmethod
    def seen(twin):
        """All elements of each group, by name."""
        found = []
        for part, group in zip(twin.parts, twin.opt.state_dict()["groups"], strict=True):
            found.append({name: x.copy() for name, x in group["arrays"].items() if name not in {*PER_ARRAY, "sums"}})
            found[-1]["params"] = part.flat(part.arrays)
            if part.copies is not None:
                found[-1]["copies"] = part.flat(part.copies)
        return found

    def check(self, twin):
        """What was touched, under rows="exact" all rows, had the dense step; everything else is as it was."""
        for group, segments, before, after, whole in zip(
            self.run.groups, self.grads, self.before, self.seen(twin), self.seen(self.other), strict=True
        ):
            if group.options["state_dtype"] == "uint8":
                continue  # a block is encoded as a whole
            lazy = group.options["rows"] == "lazy"
            touched = np.concatenate([
                np.repeat(x.touched, x.length) if lazy and isinstance(x, Sparse) else np.full(size, x is not None)
                for size, x in zip(group.segments, segments, strict=True)])  # fmt: skip
            for name, x in after.items():
                assert bits(x[touched]) == bits(whole[name][touched]), f"{name}: touched rows differ from a dense step"
                assert bits(x[~touched]) == bits(before[name][~touched]), f"{name}: other rows were written"

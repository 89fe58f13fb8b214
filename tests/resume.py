"""Runs that are stopped and resumed in another process: the cases of test_resume.py, and the program that resumes them.

python resume.py FOLDER THREADS CASE CASE ...   loads FOLDER/CASE.in into another cut and steps on, to FOLDER/CASE.npz
"""

import itertools
import sys
from pathlib import Path

import numpy as np
from cases import CASES
from support import build

import adaptive_c as ac

SIZE = 20_003  # several chunks, and enough for several threads
STEPS = 7
# (dtype of parameters, state and what else is narrow)
FORMATS = [
    ("float32", {}),
    ("float64", {}),
    ("float32", {"state_dtype": "bfloat16"}),
    ("float32", {"state_dtype": "uint8"}),
    ("bfloat16", {"master": "float32", "state_dtype": "bfloat16"}),
    ("bfloat16", {"rounding": "stochastic", "state_dtype": "bfloat16"}),
    ("float16", {"rounding": "stochastic", "state_dtype": "uint8"}),
    ("float16", {"master": "float32"}),
    ("bfloat16", {"rounding": "stochastic"}),
]


def fits(name, options, formats):
    narrow = formats.get("state_dtype")
    return not (narrow and (name in ("Rprop", "SuperSAB") or options.get("centered")))


GRID = [
    (i, j) for i, (_, name, options) in enumerate(CASES) for j, (_, f) in enumerate(FORMATS) if fits(name, options, f)
]


def cut(flat, pieces, rng):
    """One flat array, or a list or dict of pieces of one array."""
    if pieces == 1:
        return flat
    ends = [0, *sorted(int(x) for x in rng.integers(0, flat.size, pieces - 1)), flat.size]
    parts = [flat[a:b] for a, b in itertools.pairwise(ends)]
    return parts if pieces < 4 else {"a": parts[0], "b": parts[1], "c": parts[2], "d": parts[3]}


def shaped_as(flat, like):
    """A flat array in the pieces of `like`."""
    arrays = like.values() if isinstance(like, dict) else like if isinstance(like, list) else [like]
    ends = np.cumsum([0, *(a.size for a in arrays)])
    parts = [flat[a:b] for a, b in itertools.pairwise(ends)]
    if isinstance(like, dict):
        return dict(zip(like, parts, strict=True))
    return parts if isinstance(like, list) else parts[0]


class Run:
    """Case `number` over a random cut; what `where` names (the start or the resumed part) differs in all that may."""

    def __init__(self, number, where):
        i, j = GRID[number]
        _, name, options = CASES[i]
        dtype, formats = FORMATS[j]
        rng = np.random.default_rng([number, 0])
        there = np.random.default_rng([number, where])
        self.narrow = dtype in ("float16", "bfloat16")
        start = rng.normal(size=SIZE) * (where == 1)
        stored = "uint16" if dtype == "bfloat16" else dtype
        if dtype == "bfloat16":
            start = (start.astype("float32").view("uint32") >> np.uint32(16)).astype("uint16")
        self.flat, self.grad_dtype = start.astype(stored), "float64" if dtype == "float64" else "float32"
        self.params = cut(self.flat, int(there.integers(1, 6 - where)), there)  # a dict's arrays keep their sizes
        self.copies = np.zeros(SIZE, "float32")
        self.scale = rng.choice([1.0, 256.0, "dynamic"])
        self.scale = "dynamic" if self.scale == "dynamic" else float(self.scale)
        self.wider = number % 3 == 0  # float64 gradients, whatever the parameters are
        self.calls = int(rng.choice([1, 1, 2, 3]))  # micro-batches of a step
        shared = {
            "seed": int(rng.integers(1 << 63)),
            "max_grad_norm": [None, 100.0, ac.schedules.exponential(100.0, 0.9)][rng.integers(3)],
            "norm_over": ["all", "group"][rng.integers(2)],  # the other part has the arrays in another cut
            "max_grad_value": [None, 5.0][rng.integers(2)],
            "on_nonfinite": "skip",
            "loss_scale": self.scale,
            "ema_decay": [None, 0.9][rng.integers(2)],
            "bounds": [None, (-2.0, None)][rng.integers(2)],
            "cast": self.wider,
        }
        self.stop = int(rng.integers(0, STEPS * self.calls + 1))
        self.skip = int(rng.integers(0, STEPS))
        self.change = int(rng.integers(1, STEPS))
        schedules = self.schedules(rng, name, options, shared)
        if where == 2:  # what is saved is to come from the checkpoint
            shared |= {
                "seed": 1,
                "loss_scale": "dynamic" if self.scale == "dynamic" else 3.0,
                "on_nonfinite": None,
                "max_grad_norm": 1.0,
                "norm_over": "array",
                "bounds": (0.0, 0.1),
                "cast": False,
            }
            shared |= {"ema_decay": 0.5} if shared["ema_decay"] else {}
            options = {**options, "lr": 0.7}
        else:
            options = {**options, **schedules}
            shared = {key: value for key, value in shared.items() if key not in options}
        copy_to = shaped_as(self.copies, self.params)
        self.opt = build(name, self.params, options, copy_to=copy_to, uint16_as="bfloat16", **shared, **formats)
        self.gradients = np.random.default_rng([number, 3])
        self.number, self.tick = number, 0
        self.metric = any("plateau" in str(x) for x in schedules.values())

    def schedules(self, rng, name, options, shared):
        """What follows a schedule in this case."""
        s = ac.schedules
        kind = int(rng.integers(5))
        plateau = s.plateau(0.2, factor=0.5, patience=0)
        found = {}
        if name not in ("Rprop", "SuperSAB"):
            lr = [None, s.warmup(s.cosine(0.2, 4), 2), s.chain([plateau, s.exponential(0.1, 0.9)], [3]), plateau]
            found["lr"] = lr[kind] if kind < 4 else None
            if kind in (2, 4) and "betas" in options:
                found["betas"] = (s.linear(0.5, 4, end=0.9), 0.95)
        if kind > 1 and shared["ema_decay"]:
            found["ema_decay"] = s.multistep(0.5, [1, 4], 1.25)
        return {key: value for key, value in found.items() if value is not None}

    def go(self, apply=True):
        """A micro-batch, and the step after the last one."""
        t, call = divmod(self.tick, self.calls)
        self.tick += 1
        g = self.gradients.normal(size=SIZE).astype(self.grad_dtype)
        if (t, call) == (self.skip, 0):
            g[17] = np.inf
        if not apply:
            return
        opt = self.opt
        if t == self.change and call == 0 and "lr" not in opt.param_groups[0].schedules:
            opt.param_groups[0]["lr"] *= 0.5
        g = g * g.dtype.type(opt.loss_scale)
        grads = shaped_as(g.astype("float64") if self.wider else g, self.params)
        metric = {"metric": float(t % 3)} if self.metric else {}
        if self.calls == 1:
            opt.step(grads, **metric)
            return
        opt.accumulate(grads)
        if call == self.calls - 1:
            opt.step(**metric)

    def result(self):
        """All that there is, in flat arrays."""
        found = {"params": self.flat, "copies": self.copies}
        for name, array in self.opt.state_dict()["groups"][0]["arrays"].items():
            found[name] = array if array.size > 4 else array[:1]  # counts: one for each array
        opt, group = self.opt, self.opt.param_groups[0]
        found["numbers"] = np.array([opt.t, opt.skipped_steps, opt.grad_norm, opt.seed, opt.loss_scale, opt.pending])
        found["options"] = np.array(str([v for k, v in group.items() if k not in ("params", "copy_to")]))
        found["whole"] = np.array(str([opt.norm_over, opt.max_grad_norm, opt.max_grad_value, opt.schedules]))
        found["schedules"] = np.array(str({name: group.schedules[name] for name in sorted(group.schedules)}))
        return found


def main():
    folder, threads, numbers = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    ac.set_num_threads(threads)
    for number in map(int, numbers):
        run = Run(number, 2)
        run.opt.load(folder / f"{number}.in")
        for tick in range(STEPS * run.calls):
            run.go(apply=tick >= run.stop)
        np.savez(folder / f"{number}.npz", **run.result())


if __name__ == "__main__":
    main()

"""What fuzz.py draws from, and the twins that it steps: the same numbers, arranged in different ways."""

import inspect
import itertools
import shutil
import tempfile
import weakref

import ml_dtypes
import numpy as np

import adaptive_c as ac

S = ac.schedules
DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "float16")} | {
    "bfloat16": np.dtype(ml_dtypes.bfloat16)
}
RULES = list(ac.optimizers.__all__)
SIZES = [0, 1, 2, 255, 256, 257, 4095, 4096, 4097, 8193, 16_384, 20_000]  # blocks of 256, chunks of 4,096, threads
PER_ARRAY = {"step", "started", "summed", "mu_product"}  # docs/checkpoints.md: a number for each array
LENGTHS = [1, 2, 3, 8, 64, 256]
SUMS = [False, True, "divide", "project"]  # of rows, in groups whose twins have the same rows
MARGIN, CANARY = 64, 0xA5


def leaving(t):
    """A schedule that leaves every range at the step after the third."""
    return 0.1 / (3 - t) if t != 3 else -1.0


def falling(t):
    return 0.1 / (1 + t)


# Values of options by their names.  An option that is not listed keeps its default.
VALUES = {
    "lr": [1e-3, 0.1, 0.0, S.cosine(0.1, 5), S.warmup(S.linear(0.1, 7, end=0.01), 2), S.exponential(0.1, 0.9),
           S.plateau(0.1, factor=0.5, patience=0), S.chain([0.01, S.step(0.1, 2)], [2]), falling, leaving],
    "betas": [(0.9, 0.999), (0.0, 0.5), (0.5, 0.0), (S.linear(0.9, 5, end=0.5), 0.99), [0.8, 0.9]],
    "eps": [1e-8, 1e-3, 0.0, S.constant(1e-6)],
    "weight_decay": [0.0, 0.01, S.linear(0.1, 4, end=0.0)],
    "alpha": [0.99, 0.0, 1.0, S.linear(0.5, 3, end=0.9)],
    "rho": [0.9, 0.0, 1.0, falling],
    "momentum": [0.0, 0.9, S.linear(0.5, 3, end=0.9)],
    "dampening": [0.0, 0.3, -0.5],
    "lr_decay": [0.0, 0.1],
    "momentum_decay": [4e-3, 0.0, 1.0],
    "initial_accumulator_value": [0.0, 0.1],
    "etas": [(0.5, 1.2), (0.9, S.linear(1.5, 4, end=1.1))],
    "step_sizes": [(1e-6, 50.0), (0.0, 0.1)],
    "eta_plus": [1.05, 2.0],
    "eta_minus": [0.5, 0.9],
    "max_rate": [30.0, 0.01],
    "variant": ["irprop-", "rprop+", "rprop-"],
    "eps_mode": ["outside", "inside", "hat"],
    **dict.fromkeys(("nesterov", "maximize", "amsgrad", "centered", "decoupled_weight_decay"), (False, True)),
    "ema_decay": [0.9, 0.0, 1.0, 0.9999, S.linear(0.5, 5, end=0.9)],
}  # fmt: skip
SETTINGS = {
    "max_grad_norm": [None, 1.0, 1e-3, 1e3, S.linear(1.0, 5, end=0.1), falling],
    "norm_over": ["all", "group", "array"],  # the last where twins cut their groups alike
    "max_grad_value": [None, 0.5, 100.0],
    "on_nonfinite": ["ignore", "skip", "raise"],
    "loss_scale": [1.0, 1024.0, 3.0, 0.25],
    "zero_grad": [False, True],
    "cast": [False, True],
    "flush_denormals": [False, False, False, True],
    "seed": [0, 1, 2**64 - 1],
}


def pick(rng, values):
    return values[rng.integers(len(values))]


def bits(x):
    """The bits of an array as bytes, where NaN equals NaN; bfloat16 state comes as uint16."""
    x = np.ascontiguousarray(x).reshape(-1)
    kind = x.view(DTYPES["bfloat16"]) if x.dtype == np.uint16 else x
    if kind.dtype.kind in "fV":
        nan = kind != kind
        if nan.any():
            x = x.copy()
            x[nan] = 0x7FC0 if x.dtype == np.uint16 else np.nan
    return x.dtype.name, x.tobytes()


def leaves(x, path=()):
    """What nested dicts and lists hold, by path, as what can be compared."""
    if isinstance(x, dict):
        for key, value in x.items():
            yield from leaves(value, (*path, key))
    elif isinstance(x, (list, tuple)):
        for i, value in enumerate(x):
            yield from leaves(value, (*path, i))
    else:
        yield path, (x.dtype.name, x.tobytes()) if isinstance(x, np.ndarray) else repr(x)


def differing(a, b):
    return [key for key in {**a, **b} if a.get(key) != b.get(key)]


def in_turn(structure):
    """The arrays of a structure, in the order of the parameters."""
    return list(structure.values()) if hasattr(structure, "keys") else (
        list(structure) if isinstance(structure, (list, tuple)) else [structure])  # fmt: skip


def nearest(x, dtype):
    with np.errstate(all="ignore"):
        return x.astype(dtype)


def draw_options(rng, rule):
    names = [name for name in inspect.signature(getattr(ac, rule).__init__).parameters if name in VALUES]
    assert "lr" in names
    options = {name: pick(rng, VALUES[name]) for name in names if rng.random() < 0.4 and name != "ema_decay"}
    if options.get("nesterov"):
        options |= {"momentum": 0.9} | ({"dampening": 0.0} if rule == "SGD" else {})
    if rule in ("Rprop", "SuperSAB") and callable(options.get("lr")):
        options["lr"] = 0.1
    if rng.random() < 0.2:
        options["ema_decay"] = pick(rng, VALUES["ema_decay"])
    return options


class Group:
    """What the twins share of a group: its numbers, its options, and the segments that have gradients or None."""

    def __init__(self, rng, rule, defaults):
        self.dtype = pick(rng, ["float32"] * 4 + ["float64"] * 2 + ["float16", "bfloat16"])
        size = int(pick(rng, [*SIZES, *rng.integers(3, 600, 8)]))
        self.length = int(pick(rng, LENGTHS)) if rng.random() < 0.4 else 0  # of rows; 0: there are none
        size -= size % max(self.length, 1)
        inner = np.sort(rng.integers(0, size // max(self.length, 1) + 1, rng.integers(0, 3))) * max(self.length, 1)
        self.segments = np.diff([0, *inner, size]).tolist()
        self.ends = np.cumsum([0, *self.segments])
        self.start = nearest(rng.normal(size=size) * 10.0 ** rng.integers(-2, 2), DTYPES[self.dtype])
        self.counts = np.zeros(len(self.segments), int)
        # None is said too: one twin may have this group's options from its constructor, for groups that are added
        usual = inspect.signature(getattr(ac, rule)).parameters["lr"].default
        self.options = {"lr": defaults.get("lr", usual), "ema_decay": defaults.get("ema_decay")}
        for name in self.options:
            if rng.random() < 0.2:
                self.options[name] = pick(rng, VALUES[name][:3])
        self.options |= {"state_dtype": None, "master": None, "rounding": None}
        if self.dtype in ("float16", "bfloat16"):
            self.options |= pick(rng, [{"master": "float32"}, {"rounding": "stochastic"}])
        if self.dtype != "float64" and rng.random() < 0.5:
            wide = rule in ("Rprop", "SuperSAB") or defaults.get("centered")
            self.options["state_dtype"] = "float32" if wide else pick(rng, ["float32", "bfloat16", "uint8", "uint8"])
        exact = self.length and self.options["state_dtype"] != "uint8" and rng.random() < 0.6
        self.options["rows"] = "exact" if exact else "lazy"
        self.simplex = bool(self.length and rng.random() < 0.4)  # all twins have its rows as their last axis
        self.options["sum_to_one"] = pick(rng, SUMS) if self.simplex else False
        self.copies = None
        if rng.random() < 0.3:
            self.copies = "float32" if self.dtype == "float64" else pick(rng, ["float32", "float16", "bfloat16"])
        self.bounds = self.random_bounds(rng) if rng.random() < 0.3 else None

    def random_bounds(self, rng):
        """Numbers, or flat arrays of them."""
        sides = [pick(rng, [None, -1.0, -0.1]), pick(rng, [None, 0.3, 1])]
        if rng.random() < 0.3:
            i = rng.integers(2)
            sides[i] = (rng.random(self.start.size) + 0.5) * (2 * int(i) - 1)
        return tuple(sides)


class Part:
    """A group as one twin has it: its arrays."""

    def __init__(self, rng, group, values, structure, run):
        self.group, self.structure, self.words = group, structure, run.words
        self.pieces, self.owner = [], []  # (start, stop) in the group's space, and the segment, of each array
        for i, (start, stop) in enumerate(itertools.pairwise(group.ends.tolist())):
            n = 0 if structure == "bare" or run.uncut else int(pick(rng, [0, 0, 1, 3]))
            step = max(group.length, 1)
            cuts = np.sort(rng.integers(0, (stop - start) // step + 1, n)) * step + start
            for piece in itertools.pairwise([start, *cuts.tolist(), stop]):
                self.pieces.append(piece)
                self.owner.append(i)
        self.shapes = [self.shape(rng, stop - start, group) for start, stop in self.pieces]
        self.keys = [pick(rng, ["w{}", "w {} ä", "{}"]).format(i) for i in range(len(self.pieces))]
        self.memory, self.arrays = self.place(rng, values)
        self.box = [None, None]
        self.copies = None
        if group.copies:
            self.copy_memory, self.copies = self.place(rng, np.zeros(values.size, DTYPES[group.copies]))

    @staticmethod
    def shape(rng, n, group):
        if length := group.length:
            rows = n // length
            if group.simplex:
                return rows, length
            return pick(rng, [(rows, length), (rows, length, 1)] + [(rows,)] * (length == 1))
        if n == 0:
            return pick(rng, [(0,), (0, 3), (2, 0)])
        if n == 1:
            return pick(rng, [(), (1,), (1, 1)])
        return pick(rng, [(n,), (n // 2, 2), (2, 1, n // 2)]) if n % 2 == 0 else (n,)

    def place(self, rng, values):
        """Arrays within one block of memory, with elements between them that nothing may touch."""
        gaps = rng.integers(0, 4, len(self.pieces)).cumsum() + MARGIN
        dtype = values.dtype
        memory = np.full((values.size + gaps[-1] + MARGIN) * dtype.itemsize, CANARY, np.uint8)
        outside = np.ones(memory.size, bool)
        arrays = []
        for (start, stop), gap, shape in zip(self.pieces, gaps.tolist(), self.shapes, strict=True):
            place = slice((start + gap) * dtype.itemsize, (stop + gap) * dtype.itemsize)
            outside[place] = False
            array = memory[place].view(dtype)
            array[:] = values[start:stop]
            if self.words and dtype == DTYPES["bfloat16"] and rng.random() < 0.5:
                array = array.view(np.uint16)
            arrays.append(array.reshape(shape))
        return (memory, outside), arrays

    def arrange(self, items):
        if self.structure == "dict":
            return dict(zip(self.keys, items, strict=True))
        return items[0] if self.structure == "bare" else {"list": list, "tuple": tuple}[self.structure](items)

    def cut(self, flat):
        return [flat[start:stop].reshape(shape) for (start, stop), shape in zip(self.pieces, self.shapes, strict=True)]

    @staticmethod
    def flat(arrays):
        flat = [x.reshape(-1) for x in arrays]
        return np.concatenate([x.view(DTYPES["bfloat16"]) if x.dtype == np.uint16 else x for x in flat])

    def by_segment(self, numbers):
        """A number for each array as one for each segment, where all of its arrays have the same."""
        found = [None] * len(self.group.segments)
        for i, (start, stop), x in zip(self.owner, self.pieces, np.asarray(numbers).tolist(), strict=True):
            if stop > start:
                assert found[i] in (None, x), "arrays with the same gradients have different counts"
                found[i] = x
        return found

    def bounds(self, pair):
        return pair and tuple(self.arrange(self.cut(x)) if isinstance(x, np.ndarray) else x for x in pair)

    def options(self):
        given = {**self.group.options, "bounds": self.bounds(self.group.bounds)}
        return given if self.copies is None else {**given, "copy_to": self.arrange(self.copies)}


class Twin:
    """An optimizer with its arrays."""

    def __init__(self, rng, run, values, *, alone=None, folder=None):
        """folder: its state is there; "": in a new one."""
        self.run = run
        structures = [pick(rng, ["list", "tuple", "dict"] + (["bare"] * 3 if len(group.segments) == 1 else []))
                      if alone is None else alone for group in run.groups]  # fmt: skip
        self.parts = [Part(rng, group, x, structure, run)
                      for group, x, structure in zip(run.groups, values, structures, strict=True)]  # fmt: skip
        self.structured = len(self.parts) > 1 or bool(rng.random() < 0.3)
        self.n_threads = pick(rng, [None, 1, 2, 3, 4])
        options = {**run.options, **run.settings, "n_threads": self.n_threads}
        if run.words:
            options["uint16_as"] = "bfloat16"
        params = [part.arrange(part.arrays) for part in self.parts]
        if self.structured:
            params = [{"params": x, **part.options()} for x, part in zip(params, self.parts, strict=True)]
        else:
            params, options = params[0], {**options, **self.parts[0].options()}
        if folder is not None:
            if not folder:
                folder = tempfile.mkdtemp()
                weakref.finalize(run, shutil.rmtree, folder, ignore_errors=True)
            options |= {"state_path": folder, "state_memory": run.memory, "state_parameters": run.kept}
        self.folder = folder
        self.opt = getattr(ac, run.rule)(params, **options)

    def values(self):
        return [part.flat(part.arrays) for part in self.parts]

    def per_group(self, x):
        return x if self.structured else [x]

    def dress(self, rng, grads, in_full=False):
        """Gradients of the run in this twin's arrays, as what is passed and (array, what it was).

        in_full: under rows="exact", those of rows as the dense ones that they stand for.
        """
        passed, self.given = [], []
        for part, segments in zip(self.parts, grads, strict=True):
            items = []
            for (start, stop), shape, i in zip(part.pieces, part.shapes, part.owner, strict=True):
                if segments[i] is None:
                    items.append(None)
                    continue
                x, place = segments[i], (start - part.group.ends[i], stop - part.group.ends[i])
                if hasattr(x, "cut"):
                    if not (in_full and part.group.options["rows"] == "exact"):
                        items.append(x.cut(rng, *place, shape))
                        items[-1].values.flags.writeable = self.opt.zero_grad
                        self.given.append((items[-1].values, items[-1].values.copy()))
                        continue
                    x = x.dense.reshape(-1)
                x = x[slice(*place)]
                if x.dtype.itemsize == 2 and rng.random() < 0.3:
                    x = x.astype("float32")
                offset = int(rng.integers(0, 9))
                whole = np.zeros(x.size + offset, x.dtype)
                whole[offset:] = x
                g = whole[offset:]
                if part.words and g.dtype == DTYPES["bfloat16"] and rng.random() < 0.5:
                    g = g.view(np.uint16)
                g = g.reshape(shape)
                if self.opt.cast and rng.random() < 0.5:
                    g = np.stack([g, g], -1)[..., 0]
                if self.opt.cast and g.dtype != np.uint16 and rng.random() < 0.5:
                    g = g.astype("float64")  # which is exact
                g.flags.writeable = self.opt.zero_grad
                self.given.append((g, g.copy()))
                items.append(g)
            passed.append(part.arrange(items))
        return passed if self.structured else passed[0]

    def places(self):
        """Of each part, what names its arrays in calls for one of them."""
        for i, part in enumerate(self.parts):
            keys = part.keys if part.structure == "dict" else range(len(part.pieces))
            yield [(*[i] * self.structured, *[key] * (part.structure != "bare")) for key in keys]

    def step(self, rng, passed, arriving, **extra):
        """A step; where that is possible and wanted one array after the other, in any order."""
        opt = self.opt
        if not arriving or self.folder or opt.max_grad_norm or opt.on_nonfinite != "ignore":
            opt.step(passed, **extra)
            return
        places = [(*place, grad) for own, grads in zip(self.places(), self.per_group(passed), strict=True)
                  for place, grad in zip(own, in_turn(grads), strict=True)]  # fmt: skip
        with opt.stepping(**extra) as now:
            for k in rng.permutation(len(places)):
                now(*places[k])

    def snapshot(self, looking=True):
        """Everything that can be seen, for what must not change.  Looking brings rows up to date."""
        seen = dict(leaves(self.opt.state_dict())) if looking else {}
        for i, part in enumerate(self.parts if looking else ()):
            seen["memory", i] = part.memory[0].tobytes()
            if part.copies is not None:
                seen["copies", i] = part.copy_memory[0].tobytes()
        names = ("t", "skipped_steps", "pending", "grad_norm", "loss_scale", "n_threads", "nbytes")
        return {**seen, **{name: repr(getattr(self.opt, name)) for name in names}}

    def space(self):
        """Everything that the twins share."""
        d = self.opt.state_dict()
        seen = {}
        for i, (part, group) in enumerate(zip(self.parts, d.pop("groups"), strict=True)):
            summed = group["arrays"].get("summed")
            for name, x in group.pop("arrays").items():
                if name in PER_ARRAY:
                    seen[i, name] = repr(part.by_segment(x))
                    continue
                if name == "sums":  # where nothing was added an old sum may lie
                    x = np.where(np.repeat(summed, [stop - start for start, stop in part.pieces]), x, 0)
                seen[i, name] = bits(x)
            seen[i, "params"] = bits(part.flat(part.arrays))
            if part.copies is not None:
                seen[i, "copies"] = bits(part.flat(part.copies))
            own = {name: x for name, x in group.items() if name not in ("sizes", "names")}
            seen |= {(i, *path): x for path, x in leaves(own)}
        return {**seen, **dict(leaves(d))}

"""Calls that must be refused, for fuzz.py: each draws what is wrong and returns its name and the call of a twin."""

import copy
import pickle
import tempfile
from pathlib import Path

import numpy as np
from fuzz_twins import S, pick
from support import misaligned, read_only

import adaptive_c as ac

OPTIONS = [("lr", -1.0), ("lr", "x"), ("lr", None), ("lr", True), ("lr", 10**400), ("lr", np.nan), ("lr", 1j),
           ("lr", lambda t: None), ("lr", S.constant), ("betas", (1.0, 0.9)), ("betas", 0.5), ("maximize", 1),
           ("eps", -1e-8), ("ema_decay", 2.0), ("bounds", (2, 1)), ("bounds", (np.nan, 1)), ("bounds", "ab"),
           ("bounds", (np.ones(3, complex), None)), ("state_dtype", "int8"), ("rounding", "nearest"), ("copy_to", 5),
           ("unknown", 1)]  # fmt: skip
SETTINGS = [("max_grad_norm", 0), ("max_grad_norm", "x"), ("max_grad_value", np.nan), ("on_nonfinite", "no"),
            ("zero_grad", 1), ("flush_denormals", "yes"), ("seed", -1), ("seed", 2**64), ("seed", 0.5), ("n_threads", 0),
            ("n_threads", True), ("n_threads", 5000), ("n_threads", 1.5), ("loss_scale", 0.0), ("loss_scale", np.inf),
            ("loss_scale", True)]  # fmt: skip
T = [-1, 1 << 62, 1.5, None, True, "3"]


def draw(run, rng):
    return pick(rng, [gradient, gradient, structure, argument, option, setting, look, construct, group, entry, file])(
        run, rng
    )


def right(twin):
    """A fitting gradient for each array of each part."""
    wide = [part.group.dtype == "float64" for part in twin.parts]
    return [[np.ones(shape, "float64" if w else "float32") for shape in part.shapes]
            for w, part in zip(wide, twin.parts, strict=True)]  # fmt: skip


def passed(twin, items):
    found = [part.arrange(x) for part, x in zip(twin.parts, items, strict=True)]
    return found if twin.structured else found[0]


GRADIENTS = {
    "shape": lambda x, own: np.ones((*x.shape, 2), x.dtype),
    "integers": lambda x, own: x.astype(np.int32),
    "precision": lambda x, own: x.astype("float32" if x.dtype == np.float64 else "float64"),
    "complex": lambda x, own: x.astype(complex),
    "objects": lambda x, own: x.astype(object),
    "byteswapped": lambda x, own: x.astype(x.dtype.newbyteorder()),
    "masked": lambda x, own: np.ma.array(x),
    "list": lambda x, own: x.tolist(),
    "a number": lambda x, own: 1.0,
    "strided": lambda x, own: np.ones((*x.shape, 2), x.dtype)[..., 0],
    "misaligned": lambda x, own: misaligned(x),
    "the parameter": lambda x, own: own,
}


def gradient(run, rng):
    kind, method, place = (
        pick(rng, list(GRADIENTS)),
        pick(rng, ["step", "accumulate"]),
        int(rng.integers(len(run.groups))),
    )
    if run.groups[place].start.size < 64:  # an empty array is contiguous, aligned, and shares no memory
        kind = "shape"
    if run.twins[0].opt.cast and kind in ("precision", "strided", "misaligned"):  # which are converted then
        kind = "integers"
    zero = run.twins[0].opt.zero_grad and kind != "shape" and rng.random() < 0.3

    def call(twin):
        items = right(twin)
        largest = max(range(len(items[place])), key=lambda i: items[place][i].size)
        x = items[place][largest]
        items[place][largest] = read_only(x) if zero else GRADIENTS[kind](x, twin.parts[place].arrays[largest])
        getattr(twin.opt, method)(passed(twin, items))

    return f"{method}: {'read-only' if zero else kind}", call


class Longer(list):
    """Gives more than it counts."""

    def __iter__(self):
        return iter(list(super().__iter__()) * 3)


class Shorter(list):
    def __iter__(self):
        return iter(())


def structure(run, rng):
    """One array, or one group, more or less; or something else altogether."""
    kinds = ["more", "fewer", "string", "number", "nested", "longer", "shorter"]
    kind, method = pick(rng, kinds), pick(rng, ["step", "accumulate"])

    def call(twin):
        items = right(twin)
        grads = passed(twin, items)
        if kind == "more":
            grads = [*items, items[0]] if twin.structured else [grads, grads]
            grads = [*grads, *[items[0][0]] * len(items[0])]
        elif kind == "fewer":
            grads = []
        elif kind == "nested":
            grads = [[[grads]]]
        elif kind in ("longer", "shorter"):
            grads = (Longer if kind == "longer" else Shorter)(grads if isinstance(grads, (list, tuple)) else [grads])
        else:
            grads = {"string": "gradients", "number": 1.0}[kind]
        getattr(twin.opt, method)(grads)

    return f"{method}: structure, {kind}", call


def argument(run, rng):
    wrong = pick(
        rng, [{"loss_scale": x} for x in (0.0, -1.0, np.nan, np.inf, "x", True)] + [{"metric": "x"}, {"fused": 1}]
    )
    return f"step(**{wrong})", lambda twin: twin.opt.step(passed(twin, right(twin)), **wrong)


def option(run, rng):
    name, value = pick(rng, [*OPTIONS, ("params", [])])
    place = int(rng.integers(len(run.groups)))

    def call(twin):
        twin.opt.param_groups[place][name] = value

    return f"[{name!r}] = {value!r}", call


def setting(run, rng):
    name, value = pick(rng, [*SETTINGS, ("loss_scale", "dynamic"), *(("t", x) for x in T)])
    return f"{name} = {value!r}", lambda twin: setattr(twin.opt, name, value)


def look(run, rng):
    """What there isn't."""
    return pick(rng, [("del", lambda twin: twin.opt.param_groups[0].__delitem__("lr")),
                      ("option", lambda twin: twin.opt.param_groups[0]["unknown"]),
                      ("state", lambda twin: twin.opt.state["unknown"]),
                      ("decoded", lambda twin: twin.opt.decoded_state("step")),
                      ("format", lambda twin: twin.opt.state_dict(format="numpy")),
                      ("pickle", lambda twin: pickle.dumps(twin.opt.param_groups[0])),
                      ("copy", lambda twin: copy.copy(twin.opt))])  # fmt: skip


def construct(run, rng):
    """A second optimizer over the twin's arrays."""
    name, value = pick(rng, [*OPTIONS, *SETTINGS, ("fused", True), ("keep_undo", 1), ("uint16_as", "float16")])

    def call(twin):
        params = [{"params": part.arrange(part.arrays), "ema_decay": 1.0} for part in twin.parts]
        params[-1] |= {name: value} if (name, value) in OPTIONS else {}
        getattr(ac, run.rule)(params, **({"uint16_as": "bfloat16"} | {name: value}))

    return f"{run.rule}({name}={value!r})", call


def group(run, rng):
    """A group that can't be added."""
    x = np.ones(300, "float32")
    kind, spec = pick(rng, [("no params", {"lr": 0.1}), ("empty", {"params": []}), ("no dict", x), ("None", None),
                            ("integers", {"params": np.ones(3, int)}), ("strided", {"params": np.ones(6)[::2]}),
                            ("read-only", {"params": read_only(x.copy())}), ("two dtypes", {"params": [x, np.ones(2)]}),
                            ("twice", {"params": [x, x[10:20]]}), ("misaligned", {"params": misaligned(x)}),
                            ("unknown", {"params": x, "unknown": 1}), ("lr", {"params": x, "lr": -1}),
                            ("copies", {"params": x, "copy_to": np.ones(299, "float32")}),
                            ("copies too", {"params": [x], "copy_to": [np.ones(300, "int8")]}),
                            ("copy is param", {"params": x, "copy_to": x}), ("bounds", {"params": x, "bounds": (1, 0)}),
                            ("formats", {"params": x.astype("float16"), "master": None, "rounding": None})])  # fmt: skip
    return f"add_param_group: {kind}", lambda twin: twin.opt.add_param_group(spec)


ENTRIES = {
    "no t": lambda d: d.pop("t"),
    "no groups": lambda d: d.pop("groups"),
    "no settings": lambda d: d.pop("settings"),
    "t": lambda d: d.update(t=-1),
    "t too": lambda d: d.update(t="1"),
    "pending": lambda d: d.update(pending=-3),
    "version": lambda d: d.update(version=99),
    "class": lambda d: d.update({"class": "Other"}),
    "groups": lambda d: d["groups"].append(d["groups"][0]),
    "groups too": lambda d: d.update(groups=5),
    "no arrays": lambda d: d["groups"][-1].pop("arrays"),
    "no step": lambda d: d["groups"][-1]["arrays"].pop("step"),
    "step": lambda d: d["groups"][-1]["arrays"]["step"].__isub__(1 << 61),
    "step too": lambda d: d["groups"][-1]["arrays"].update(step=d["groups"][-1]["arrays"]["step"].astype("int32")),
    "short": lambda d: d["groups"][-1]["arrays"].update({n: np.append(x, x[:1] if x.size else 0).astype(x.dtype)
                                                         for n, x in d["groups"][-1]["arrays"].items()}),
    "sizes": lambda d: d["groups"][-1]["sizes"].append(7),
    "sizes too": lambda d: d["groups"][-1].update(sizes=["a"]),
    "dtype": lambda d: d["groups"][-1].update(dtype="int8"),
    "lr": lambda d: (d["groups"][-1]["schedules"].pop("lr", None), d["groups"][-1]["options"].update(lr=-1.0)),
    "option": lambda d: d["groups"][-1]["options"].update(unknown=1),
    "schedule": lambda d: d["groups"][-1]["schedules"].update(lr={"type": "unknown"}),
    "setting": lambda d: d["settings"].update(seed=-1),
}  # fmt: skip


def entry(run, rng):
    """A state_dict with a wrong entry."""
    kind = pick(rng, list(ENTRIES))

    def call(twin):
        d = copy.deepcopy(twin.opt.state_dict())
        ENTRIES[kind](d)
        twin.opt.load_state_dict(d)

    return f"load_state_dict: {kind}", call


def file(run, rng):
    """A damaged checkpoint, or one of another optimizer."""
    kind, where = pick(rng, ["cut", "flipped", "noise", "another", "format"]), rng.random()

    def call(twin):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "run.safetensors")
            if kind == "format":
                twin.opt.save(path, format="pickle")
            opt = twin.opt
            if kind == "another":
                opt = ac.AdamW(np.ones(7)) if run.rule != "AdamW" else ac.SGD(np.ones(7))
            opt.save(path)
            data = bytearray(path.read_bytes())
            if kind == "cut":
                del data[int(where * len(data)) :]
            elif kind == "flipped":
                data[int(where * len(data))] ^= 1 << int(where * 8)
            elif kind == "noise":
                data = bytearray(np.random.default_rng(0).bytes(500))
            path.write_bytes(data)
            twin.opt.load(path)

    return f"load: {kind} at {where:.3f}", call

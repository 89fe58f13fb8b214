"""state_dict, load_state_dict, save and load: what they hold, what they refuse, and what a crash leaves."""

import copy
import functools
import json
import os
import pickle
import threading
import tracemalloc

import numpy as np
import pytest
from support import assert_same, assert_same_bits, child, everything, flat, in_another_thread, make, set_scaler

import adaptive_c as ac

# --- state_dict ------------------------------------------------------------------------------------------------------


def test_views_of_the_live_arrays():
    opt = make(state_dtype="uint8", amsgrad=True, ema_decay=0.9)
    d = opt.state_dict()
    (group,) = d["groups"]
    assert d["version"] == 2
    assert (d["class"], d["t"], group["sizes"]) == ("AdamW", 3, [12, 1, 300])
    assert set(group["arrays"]) == {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale",
                                    "max_exp_avg_sq_scale", "ema", "step", "started"}  # fmt: skip
    assert group["arrays"]["exp_avg"].shape == (313,)
    assert np.shares_memory(group["arrays"]["exp_avg"], opt.state["exp_avg"][2])
    assert np.shares_memory(group["arrays"]["ema"], opt.ema[0])
    json.dumps({**d, "groups": [{k: v for k, v in group.items() if k != "arrays"}]})  # the rest is plain


def test_a_large_state_dict_copies_nothing():
    opt = ac.AdamW(np.zeros(1 << 20, "f4"), ema_decay=0.5)
    opt.accumulate(np.ones(1 << 20, "f4"))
    tracemalloc.start()
    d = opt.state_dict()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000
    assert sum(x.nbytes for x in d["groups"][0]["arrays"].values()) > 16 << 20


def test_loaded_in_place_as_a_copy():
    opt, other = make(), make(seed=1, steps=1, lr=0.5)
    live = other.state["exp_avg"][0]
    for p, q in zip(opt.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        q[...] = p
    other.load_state_dict(opt.state_dict())
    assert_same(everything(opt), everything(other))
    assert np.shares_memory(live, other.state["exp_avg"][0])
    assert not np.shares_memory(live, opt.state["exp_avg"][0])
    opt.load_state_dict(opt.state_dict())  # its own views
    assert_same(everything(opt), everything(other))


@pytest.mark.parametrize("kept", ["as it is", "numpy"])
def test_a_state_dict_that_was_kept(kept, tmp_path):
    opt, other = make(), make(steps=0)
    if kept == "numpy":
        d = opt.state_dict()
        np.savez(tmp_path / "a.npz", **d["groups"][0].pop("arrays"))
        (tmp_path / "a.json").write_text(json.dumps(d))
        d = json.loads((tmp_path / "a.json").read_text())
        with np.load(tmp_path / "a.npz") as arrays:
            d["groups"][0]["arrays"] = dict(arrays)
    else:
        d = copy.deepcopy(opt.state_dict())
    other.load_state_dict(d)
    assert_same(opt.state_dict(), other.state_dict())


# --- what comes from where -------------------------------------------------------------------------------------------


def test_everything_is_restored(tmp_path):
    w = {"w": np.arange(6, dtype="f4").reshape(2, 3), 7: np.ones(300, "f4")}
    b = np.ones(5)
    groups = [{"params": w, "lr": 0.1, "state_dtype": "bfloat16", "bounds": (-3, None)},
              {"params": b, "betas": (0.5, 0.75), "ema_decay": 0.5}]  # fmt: skip
    opt = ac.AdamW(groups, seed=2**63 + 1, max_grad_norm=2.0, on_nonfinite="skip", loss_scale=2.0, n_threads=1)
    for g in (1.0, np.nan, 2.0):
        opt.step([{"w": np.full((2, 3), g, "f4"), 7: None if g == 2.0 else np.ones(300, "f4")}, np.ones(5)])
    opt.param_groups[0]["lr"] = 0.3
    path = tmp_path / "a b.ckpt"
    opt.save(path)
    w2, b2 = {"w": np.zeros((3, 2), "f4"), 7: np.zeros((30, 10), "f4")}, np.zeros(5)
    groups = [{"params": w2, "state_dtype": "bfloat16"}, {"params": b2, "ema_decay": 0.25, "maximize": True}]
    other = ac.AdamW(groups, n_threads=3, zero_grad=True)
    other.load(str(path))
    assert_same(everything(opt), everything(other))
    assert (other.t, other.skipped_steps, other.grad_norm) == (2, 1, opt.grad_norm)
    assert other.seed == 2**63 + 1
    assert other.on_nonfinite == "skip"
    assert other.zero_grad == False  # noqa: E712  it is called by torch's users, and so no bool
    assert other.n_threads == 3
    assert other.param_groups[0]["lr"] == 0.3
    assert other.param_groups[0]["bounds"] == (-3.0, None)
    assert other.param_groups[1]["betas"] == (0.5, 0.75)
    assert [int(x) for x in other.state["step"][0].values()] == [2, 1]
    for o, w_, b_ in ((opt, w, b), (other, w2, b2)):
        o.step([{k: np.full(x.shape, 0.5, "f4") for k, x in w_.items()}, np.full(b_.shape, 0.5)])
    assert_same(everything(opt), everything(other))


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_copies_are_written_anew(dtype, tmp_path):
    narrow = {} if dtype in ("float32", "float64") else {"master": "float32"}
    stored = "uint16" if dtype == "bfloat16" else dtype
    ones = (np.full(300, 0x3F80, "uint16") if dtype == "bfloat16" else np.ones(300)).astype(stored)
    grad = np.linspace(-1, 1, 300).astype("f8" if dtype == "float64" else "f4")
    results = []
    for steps in (3, 0):
        copies = np.zeros(300, "f4")
        opt = ac.SGD(ones.copy(), lr=0.1, copy_to=copies, uint16_as="bfloat16", **narrow)
        for _ in range(steps):
            opt.step(grad)
        if steps:
            opt.save(tmp_path / "a")
        else:
            opt.load(tmp_path / "a")
        results.append(copies)
    assert_same_bits(*results)


def test_without_parameters(tmp_path):
    opt, other = make(), make(seed=1, steps=0)
    kept = [p.copy() for p in other.param_groups[0]["params"]]
    opt.save(tmp_path / "a", parameters=False)
    opt.save(tmp_path / "b")
    assert os.path.getsize(tmp_path / "a") < os.path.getsize(tmp_path / "b") - 4 * 313
    with pytest.raises(ValueError, match=r"has no parameters: it was saved without; load\(path, parameters=False\)"):
        other.load(tmp_path / "a")
    for name in "ab":
        other.load(tmp_path / name, parameters=False)
        assert_same(opt.state_dict(), other.state_dict())
        assert_same(kept, list(other.param_groups[0]["params"]))


def test_bounds_that_are_arrays_are_given_again(tmp_path):
    low = np.full(5, 0.5, "f4")
    opt = ac.SGD(np.ones(5, "f4"), lr=0.3, bounds=(low, None))
    opt.step(np.ones(5, "f4"))
    opt.save(tmp_path / "a")
    with pytest.raises(
        ValueError, match="had arrays as bounds, which are not stored: construct the optimizer with the same"
    ):
        ac.SGD(np.ones(5, "f4")).load(tmp_path / "a")
    p = np.zeros(5, "f4")
    other = ac.SGD(p, bounds=(low, None))
    other.load(tmp_path / "a")
    for _ in range(3):
        other.step(np.ones(5, "f4"))
    assert_same_bits(p, low)
    ac.SGD(np.ones(5, "f4")).save(tmp_path / "a")  # the file says: no bounds
    other.load(tmp_path / "a")
    other.step(np.full(5, 1e6, "f4"))
    assert p.max() < 0


def test_the_first_step_of_a_momentum_buffer_is_still_to_come(tmp_path):
    """Steps were counted, but none has written the buffer: PyTorch's rule for the first one applies after loading."""
    results = []
    for resumed in (False, True):
        p = np.ones(4)
        opt = ac.SGD(p, lr=0.1, momentum=0.9, dampening=0.5)
        opt.param_groups[0]["momentum"] = 0.0
        opt.step(np.ones(4))
        opt.param_groups[0]["momentum"] = 0.9
        if resumed:
            opt.save(tmp_path / "a")
            opt = ac.SGD(p, momentum=0.9)
            opt.step(np.ones(4))  # this one has a buffer
            opt.load(tmp_path / "a")
        opt.step(np.ones(4))
        results.append(p)
    assert_same_bits(*results)
    assert results[0][0] == 1 - 0.1 - 0.1


def test_the_first_count_that_is_too_large():
    opt = ac.Adam(np.ones(2))
    saved = opt.state_dict()
    with pytest.raises(ValueError, match=r"\['t'\] must be in \[0, 2\*\*62\)"):
        opt.load_state_dict({**saved, "t": 2**62})
    saved["groups"][0]["arrays"]["step"] = np.array([2**62])
    with pytest.raises(ValueError, match=r"step must not be negative, NaN or 2\*\*62 and more"):
        opt.load_state_dict(saved)


@pytest.mark.parametrize(
    ("name", "wrong"), [("step", -2), ("step", 2**62), ("mu_product", np.nan), ("mu_product", -0.5)]
)
def test_a_count_that_no_load_accepts_is_not_saved(name, wrong, tmp_path):
    opt = ac.NAdam([{"params": np.ones(2)}, {"params": [np.ones(1), np.ones(3)]}])
    opt.step([np.ones(2), [np.ones(1), np.ones(3)]])
    opt.save(tmp_path / "good")
    old, right = (tmp_path / "good").read_bytes(), opt.state[name][1][1].copy()
    ways = {
        "save": lambda: opt.save(tmp_path / "good"),
        "state_dict": opt.state_dict,
        "pickle": lambda: pickle.dumps(opt),
        "deepcopy": lambda: copy.deepcopy(opt),
    }
    opt.state[name][1][1][...] = wrong
    for way in ways.values():
        with pytest.raises(
            ValueError, match=rf"param_groups\[1\]: {name} must not be negative, NaN or 2\*\*62 and more"
        ):
            way()
    assert os.listdir(tmp_path) == ["good"]
    assert (tmp_path / "good").read_bytes() == old
    opt.state[name][1][1][...] = right  # and nothing is held
    for way in ways.values():
        way()
    assert (tmp_path / "good").read_bytes() == old


def test_the_count_of_an_empty_array_does_not_matter_under_another_cut():
    opt = ac.Adam([np.ones(2), np.ones(0), np.ones(2)])
    opt.step([np.ones(2), None, np.ones(2)])
    whole = ac.Adam(np.ones(4))
    whole.load_state_dict(opt.state_dict())
    assert whole.state["step"] == 1


@pytest.mark.parametrize("cls", [ac.AdamW, ac.NAdam])
def test_counts_under_another_cut(cls, tmp_path):
    sizes = (4, 0, 6, 5)
    p = [np.ones(n) for n in sizes]
    opt = cls(p)
    for t in range(3):
        opt.step([np.ones(n) if i != 3 or t == 0 else None for i, n in enumerate(sizes)])
    opt.save(tmp_path / "a")
    for new, steps in (((10, 5), (3, 1)), ((2, 0, 8, 0, 1, 4, 0), (3, 3, 3, 1, 1, 1, 1)), ((4, 0, 6, 5), (3, 3, 3, 1))):
        q = [np.zeros(n) for n in new]
        other = cls(q)
        other.load(tmp_path / "a")
        assert [int(x) for x in other.state["step"]] == list(steps)
        other.step([np.full(n, 0.5) for n in new])
        again = [x.copy() for x in p]
        whole = cls(again)
        whole.load_state_dict(opt.state_dict())
        whole.step([np.full(n, 0.5) for n in sizes])
        assert_same_bits(np.concatenate(again), np.concatenate(q))
    for new in ((15,), (11, 4), (1, 9, 0, 5)[::-1]):
        other = cls([np.zeros(n) for n in new])
        before = everything(other)
        with pytest.raises(ValueError, match=r"different counts \(step 1 and 3\).*cut the parameters as they were"):
            other.load(tmp_path / "a")
        assert_same(before, everything(other))


def test_an_empty_group_and_memory_maps(tmp_path):
    opt = ac.Adam([{"params": np.ones(0, "f4")}, {"params": np.memmap(tmp_path / "m", "f4", "w+", shape=(5,))}])
    opt.step([np.ones(0, "f4"), np.ones(5, "f4")])
    opt.save(tmp_path / "a")
    q = np.memmap(tmp_path / "n", "f4", "w+", shape=(5,))
    other = ac.Adam([{"params": [np.ones(0, "f4"), np.ones(0, "f4")]}, {"params": q}])
    other.load(tmp_path / "a")
    assert q[0] == opt.param_groups[1]["params"][0] != 0
    assert other.t == 1


# --- refusals --------------------------------------------------------------------------------------------------------


def params(*shapes, dtype="f4"):
    return [np.ones(s, dtype) for s in shapes]


OTHERS = {
    "class": (lambda: ac.Adam(params(12, 1, 300)), "is of AdamW, this optimizer is Adam"),
    "groups": (lambda: ac.AdamW([{"params": params(12, 1)}, {"params": params(300)}]), "has 1 parameter group, this optimizer 2"),
    "size": (lambda: ac.AdamW(params(12, 1, 301)), "group 0 has 313 elements, this optimizer's 314"),
    "dtype": (lambda: ac.AdamW(params(12, 1, 300, dtype="f8")), "parameters are 'float32', this optimizer's 'float64'; they can't"),
    "state": (lambda: ac.AdamW(params(313), state_dtype="bfloat16"), "state_dtype is 'float32', this optimizer's 'bfloat16'"),
    "amsgrad": (lambda: ac.AdamW(params(313), amsgrad=True), r"this optimizer's exp_avg, exp_avg_sq, max.*construct it with.*amsgrad=False"),
    "ema": (lambda: ac.AdamW(params(313), ema_decay=0.9), "has the state exp_avg, exp_avg_sq.*this optimizer's ema.*ema_decay=None"),
}  # fmt: skip


@pytest.mark.parametrize("what", OTHERS)
@pytest.mark.parametrize("way", ["dict", "file"])
def test_another_optimizer_is_refused_with_nothing_changed(what, way, tmp_path):
    build, message = OTHERS[what]
    opt, other = make(), build()
    before = everything(other)
    if way != "dict":
        opt.save(tmp_path / "a")
    load = functools.partial(
        *((other.load_state_dict, opt.state_dict()) if way == "dict" else (other.load, tmp_path / "a"))
    )
    with pytest.raises(ValueError, match=message):
        load()
    assert_same(before, everything(other))


def test_narrow_parameters_of_another_kind_are_refused():
    half = ac.Lion(np.ones(5, "f2"), master="float32")
    with pytest.raises(ValueError, match="master is 'float32', this optimizer's None"):
        ac.Lion(np.ones(5, "f2"), rounding="stochastic").load_state_dict(half.state_dict())
    with pytest.raises(ValueError, match="parameters are 'float16', this optimizer's 'bfloat16'"):
        ac.Lion(np.ones(5, "u2"), uint16_as="bfloat16", master="float32").load_state_dict(half.state_dict())


def test_names_of_dicts():
    opt = ac.AdamW({"a": np.ones(3), "b": np.ones(4)})
    for other, message in (
        ({"a": np.ones(3), "c": np.ones(4)}, "has the arrays 'a', 'b', this optimizer's 'a', 'c'"),
        ({"b": np.ones(3), "a": np.ones(4)}, "'a', 'b', this optimizer's 'b', 'a' \\(the same in another order"),
        ({"a": np.ones(4), "b": np.ones(3)}, "array 'a' has 3 elements, this optimizer's 4"),
    ):
        with pytest.raises(ValueError, match=message):
            ac.AdamW(other).load_state_dict(opt.state_dict())
    ac.AdamW([np.ones(7)]).load_state_dict(opt.state_dict())  # a list has no names


WRONG = {
    "format": (["format"], "torch", ValueError, "was written as 'torch', version 2"),
    "newer": (["version"], 3, ValueError, "version 3; this adaptive_c reads 'adaptive_c', versions 1 to 2: use the one"),
    "no version": (["version"], None, ValueError, "has no 'version': it is not a complete state of an adaptive_c optimizer"),
    "t": (["t"], -1, ValueError, r"\['t'\] must be in \[0, 2\*\*62\), got -1"),
    "t kind": (["t"], 1.5, TypeError, r"\['t'\] can't be 1.5"),
    "groups": (["groups"], {}, TypeError, r"\['groups'\] can't be {}"),
    "group": (["groups", 0], 3, TypeError, r"\['groups'\]\[0\] must be a dict"),
    "arrays": (["groups", 0, "arrays"], None, ValueError, "has no 'arrays'"),
    "array": (["groups", 0, "arrays", "exp_avg"], [1.0], TypeError, r"\['exp_avg'\] must be a flat NumPy array.*got list"),
    "array kind": (["groups", 0, "arrays", "exp_avg"], np.ones(313), ValueError, "exp_avg has 313 elements of float64, this"),
    "array gone": (["groups", 0, "arrays", "exp_avg"], None, ValueError, "has the state exp_avg_sq, this optimizer's exp_avg, exp"),
    "array shape": (["groups", 0, "arrays", "exp_avg"], np.ones((313, 1), "f4"), TypeError, "must be a flat"),
    "step": (["groups", 0, "arrays", "step"], np.array([1, 2]), ValueError, "must have 'step', 3 numbers of int64"),
    "step sign": (["groups", 0, "arrays", "step"], np.array([1, -2, 1]), ValueError, "step must not be negative"),
    "sizes": (["groups", 0, "sizes"], [13, -1, 301], ValueError, "sizes can't be"),
    "size kind": (["groups", 0, "sizes"], [12, True, 300], ValueError, "sizes can't be True"),
    "option": (["groups", 0, "options", "lr"], -1.0, ValueError, r"lr must be in \[0, inf\), got -1.0"),
    "unknown option": (["groups", 0, "options", "beta3"], 1.0, ValueError, "unknown option 'beta3'"),
    "setting": (["settings", "seed"], -1, ValueError, r"seed must be in \[0, 2\*\*64\), got -1"),
    "setting limit": (["settings", "max_grad_value"], 1e-50, ValueError, "rounds to 0 in float32"),
    "unknown setting": (["settings", "magic"], 1, ValueError, "unknown setting 'magic'"),
    "bounds": (["groups", 0, "options", "bounds"], [1.0, 0.0], ValueError, "lo <= hi"),
    "schedule": (["groups", 0, "schedules"], {"lr": None}, ValueError, "lr followed a function of your own, which can't be stored: construct"),
    "unknown schedule": (["groups", 0, "schedules"], {"lr": {"schedule": "magic"}}, ValueError, "group 0: lr: the dict names the schedule 'magic'"),
    "schedule kind": (["groups", 0, "schedules"], {"lr": {"schedule": "constant", "base": "1"}}, TypeError, "group 0: lr: .*base"),
    "schedule place": (["groups", 0, "schedules"], {"amsgrad": {"schedule": "constant", "base": 1.0}}, TypeError, "amsgrad can't follow a schedule"),
    "schedule name": (["groups", 0, "schedules"], {"beta3": {"schedule": "constant", "base": 1.0}}, ValueError, "unknown option 'beta3'"),
    "schedule value": (["groups", 0, "schedules"], {"lr": {"schedule": "constant", "base": -1.0}}, ValueError, r"at t=3 lr must be in \[0, inf\), got -1.0"),
    "schedules": (["groups", 0, "schedules"], None, ValueError, "has no 'schedules'"),
    "sums": (["pending"], 1, ValueError, "has the state exp_avg, exp_avg_sq, this optimizer's exp_avg, exp_avg_sq, sums"),
    "dynamic": (["settings", "loss_scale"], "dynamic", ValueError, "has the loss_scale 'dynamic' and the scaler None|on_nonfinite='ignore' is refused"),
    "on_nonfinite": (["settings", "on_nonfinite"], "maybe", ValueError, "state_dict: on_nonfinite must be"),
    "scaler": (["scaler"], {"scale": 1.0}, ValueError, "was saved with a dynamic loss scale, this optimizer is without"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_state_dict_is_refused_with_nothing_changed(what):
    path, value, error, message = WRONG[what]
    opt, other = make(), make(seed=1, steps=1, lr=0.5)
    d = copy.deepcopy(opt.state_dict())
    inner = d
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    before = everything(other)
    with pytest.raises(error, match=message):
        other.load_state_dict(d)
    assert_same(before, everything(other))


class Longer(list):
    """A list that gives more than it counts."""

    def __iter__(self):
        yield from list.__getitem__(self, slice(None))
        yield list.__getitem__(self, -1)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (["groups"], "state_dict has 3 parameter groups, this optimizer 2"),
        (["groups", 0, "sizes"], "state_dict: group 0 has 12 elements, this optimizer's 7|has 3 names|has 3 numbers"),
        (["groups", 0, "names"], "state_dict: group 0 has 3 names for 2 arrays"),
        (["groups", 0, "options", "bounds"], r"group 0: its bounds can't be \[0.5, 3.0, 3.0\]"),
        (
            ["groups", 1, "row_lengths"],
            r"group 1 has second moments of other rows: .* are \[\[2, 3\], \[2, 3\]\], this",
        ),
        (["groups", 0, "schedules", "lr", "schedules"], "group 0: lr: chain: 3 schedules have 2 milestones"),
        (["groups", 0, "schedules", "betas"], "group 0: at t=0 betas must be a pair of numbers"),
    ],
)
def test_lists_that_give_more_than_they_count(path, message):
    def make_one():
        groups = [
            {"params": {"a": np.ones(2), "b": np.ones(5)}, "bounds": (0.5, 3.0)},
            {"params": np.ones((2, 3)), "second_moment": "row"},
        ]
        schedules = ac.schedules.chain([0.5, ac.schedules.linear(1.0, 2)], [2]), (0.9, ac.schedules.constant(0.5))
        return ac.AdamW(groups, lr=schedules[0], betas=schedules[1])

    opt = make_one()
    saved = copy.deepcopy(opt.state_dict())
    inner = saved
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = Longer(inner[path[-1]])
    before = everything(opt)
    with pytest.raises((TypeError, ValueError), match=message):
        opt.load_state_dict(saved)
    assert_same(everything(opt), before)


@pytest.mark.parametrize("wrong", [3, [3], "rows", [[2, 3, 1]]])
def test_row_lengths_that_are_none(wrong):
    opt = ac.AdamW(np.ones((2, 3)), second_moment="row")
    saved = opt.state_dict()
    saved["groups"][0]["row_lengths"] = wrong
    with pytest.raises(ValueError, match="group 0 has second moments of other rows"):
        opt.load_state_dict(saved)


def test_what_is_no_dict():
    for d in (3, None, []):
        with pytest.raises(TypeError, match=r"state_dict must be a dict, as state_dict\(\) gives it"):
            make().load_state_dict(d)
    with pytest.raises(ValueError, match="state_dict has no 'version'"):
        make().load_state_dict({})


def test_not_while_averages_are_in_place(tmp_path):
    opt = make(ema_decay=0.9)
    opt.save(tmp_path / "a")
    d = opt.state_dict()
    with opt.averaged_parameters():
        calls = [
            opt.state_dict,
            lambda: opt.load_state_dict(d),
            lambda: opt.save(tmp_path / "a"),
            lambda: opt.load(tmp_path / "a"),
        ]
        for call in [*calls, lambda: opt.state_dict(format="torch")]:
            with pytest.raises(RuntimeError, match=r"not inside averaged_parameters\(\)"):
                call()
    opt.load(tmp_path / "a")
    opt.step([np.ones((3, 4), "f4"), np.ones((), "f4"), None])  # and nothing is held


# --- schedules, sums, the dynamic loss scale ---------------------------------------------------------------------------


def bumpy(t):
    return 0.25 / (1 + t)


def reloaded(opt, other, way, tmp_path):
    """other, having loaded opt by state_dict or by a file."""
    if way == "dict":
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        opt.save(tmp_path / "a")
        other.load(tmp_path / "a", parameters=False)
    return other


WAYS = pytest.mark.parametrize("way", ["dict", "file"])


@WAYS
def test_schedules_are_the_checkpoints(way, tmp_path):
    s = ac.schedules
    plateau = s.plateau(0.5, factor=0.5, patience=0)
    lr = s.chain([0.1, s.warmup(plateau, 2)], [1])
    opt = make(steps=0, lr=lr, betas=(s.linear(0.5, 4, end=0.9), 0.99), weight_decay=0.1)
    grads = [np.ones((3, 4), "f4"), np.ones((), "f4"), np.ones(300, "f4")]
    for metric in (1.0, 2.0, 3.0, 4.0, 5.0):
        opt.step(grads, metric)
    other = make(steps=1, lr=0.7, weight_decay=s.constant(0.3))
    reloaded(opt, other, way, tmp_path)
    assert other.param_groups[0].schedules == opt.param_groups[0].schedules
    assert other.param_groups[0].schedules["lr"].schedules[1].of.value < 0.5  # what the plateau has seen
    assert other.param_groups[0]["weight_decay"] == 0.1  # no schedule any more
    assert dict(other.param_groups[0].schedules).keys() == {"lr", "betas"}
    for mine, theirs in zip(opt.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        theirs[...] = mine
    for metric in (5.0, 6.0):
        opt.step(grads, metric)
        other.step(grads, metric)
        assert_same(everything(opt), everything(other))


@WAYS
@pytest.mark.parametrize("wrap", [
    lambda f: f, lambda f: ac.schedules.warmup(f, 1), lambda f: ac.schedules.chain([0.5, f], [1]),
])  # fmt: skip
def test_functions_of_the_user_are_given_again(wrap, way, tmp_path):
    opt = make(lr=wrap(bumpy))
    for lr in (0.1, ac.schedules.constant(0.1)):
        other = make(seed=1, steps=1, lr=lr)
        before = everything(other)
        with pytest.raises(
            ValueError, match=r"group 0: lr followed a function of your own, .*: construct .* with it, or assign it"
        ):
            reloaded(opt, other, way, tmp_path)
        assert_same(before, everything(other))
        assert other.param_groups[0]["lr"] == 0.1
        other.param_groups[0]["lr"] = wrap(bumpy)  # the remedy
        reloaded(opt, other, way, tmp_path)
        assert other.param_groups[0]["lr"] == opt.param_groups[0]["lr"] > 0
        assert other.t == 3
    pairs = make(betas=(bumpy, 0.5))
    with pytest.raises(ValueError, match="betas followed a function of your own"):
        reloaded(pairs, make(betas=(0.5, bumpy)), way, tmp_path)
    other = reloaded(pairs, make(steps=1, betas=(bumpy, ac.schedules.constant(0.25))), way, tmp_path)
    assert other.param_groups[0]["betas"] == (bumpy(3), 0.5)


@pytest.mark.parametrize("kept", ["ours", pytest.param("torch", marks=pytest.mark.later("torch"))])
def test_a_schedule_that_is_out_of_range_where_the_checkpoint_is_changes_nothing(kept):
    opt, other = make(lr=lambda t: 0.1), make(seed=1, steps=1, lr=lambda t: 0.1 if t < 3 else -1.0)
    before = everything(other)
    saved = opt.state_dict(format="torch" if kept == "torch" else None)
    with pytest.raises(ValueError, match=r"at t=3 lr must be in \[0, inf\), got -1.0"):
        other.load_state_dict(saved)
    assert_same(before, everything(other))


def test_a_run_at_the_end_of_its_schedule_can_be_saved():
    """The next step would be refused; this state is as good as any."""
    opt = make(lr=lambda t: 0.1 if t < 3 else None)
    assert opt.state_dict()["groups"][0]["schedules"] == {"lr": None}


@WAYS
def test_sums_of_some_arrays(way, tmp_path):
    """Flags go with them; what lies in the sums of the others is of an earlier step and not stored."""

    def run(stop=None):
        opt = make(steps=0, shapes=((5,), (3,), (4,)), loss_scale=4.0)
        twos = [np.full(n, 2.0, "f4") for n in (5, 3, 4)]
        opt.accumulate(twos)
        opt.step()
        opt.accumulate([twos[0], None, None])
        if stop:
            opt = stop(opt)
            twos = twos if len(opt.param_groups[0]["params"]) == 3 else [*np.split(twos[0], [2]), *twos[1:]]
        opt.accumulate([*twos[:-2], None, twos[-1]])
        opt.step()
        return opt

    def reload(shapes):
        def stop(opt):
            other = make(seed=1, steps=0, shapes=shapes)
            for p in other.param_groups[0]["params"]:
                p[...] = 0
            if way == "dict":
                values, at = flat(opt.param_groups[0]["params"]), 0
                for p in other.param_groups[0]["params"]:
                    p[...] = values[at : at + p.size]
                    at += p.size
                other.load_state_dict(copy.deepcopy(opt.state_dict()))
            else:
                opt.save(tmp_path / "a")
                other.load(tmp_path / "a")
            assert other.pending == 1
            return other

        return stop

    straight = everything(run())
    assert_same(straight, everything(run(reload(((5,), (3,), (4,))))))
    finer = everything(run(reload(((2,), (3,), (3,), (4,)))))
    for name in ("exp_avg", "exp_avg_sq"):
        assert_same(straight["groups"][0]["arrays"][name], finer["groups"][0]["arrays"][name], name)
    assert_same(straight["groups"][0]["params"], finer["groups"][0]["params"])

    def stop(opt):
        arrays = opt.state_dict()["groups"][0]["arrays"]
        np.testing.assert_array_equal(arrays["sums"], [2] * 5 + [0] * 7)
        np.testing.assert_array_equal(arrays["summed"], [1, 0, 0])
        reload(((5,), (7,)))(opt)
        other = make(seed=1, steps=2, shapes=((8,), (4,)))
        other.accumulate([np.ones(8, "f4"), None])
        before = everything(other)
        with pytest.raises(
            ValueError, match=r"array 0 here would join saved arrays .*different counts \(summed 0 and 1\)"
        ):
            reloaded(opt, other, way, tmp_path)
        assert_same(before, everything(other))
        return opt

    run(stop)


@WAYS
def test_pending_sums_of_the_loader_are_dropped_and_none_are_made_for_nothing(way, tmp_path):
    opt = make()
    opt.accumulate([np.ones((3, 4), "f4"), None, None])
    opt.discard()
    assert not {"sums", "summed"} & opt.state_dict()["groups"][0]["arrays"].keys()
    other = make(seed=1)
    other.accumulate([None, None, np.ones(300, "f4")])
    reloaded(opt, other, way, tmp_path)
    assert other.pending == 0
    opt.accumulate([np.ones((3, 4), "f4"), None, None])
    opt.step()
    other.accumulate([np.ones((3, 4), "f4"), None, None])
    other.step()
    assert_same(opt.state_dict()["groups"][0]["arrays"], other.state_dict()["groups"][0]["arrays"])
    fresh = reloaded(opt, make(), way, tmp_path)
    assert fresh.nbytes == make().nbytes


@WAYS
def test_the_dynamic_loss_scale(way, tmp_path):
    opt = make(loss_scale="dynamic", steps=0)
    set_scaler(opt, scale=1024.0, growth_tracker=1997)
    grads = [np.ones((3, 4), "f4"), np.ones((), "f4"), np.ones(300, "f4")]
    opt.step(grads)
    other = reloaded(opt, make(seed=1, loss_scale="dynamic"), way, tmp_path)
    assert other.state_dict()["scaler"] == {"scale": 1024.0, "growth_tracker": 1998}
    assert other.on_nonfinite == "skip"
    for want in (1024, 2048):
        other.step(grads)
        assert other.loss_scale == want
    for a, b in ((opt, make(loss_scale=8.0)), (make(loss_scale=8.0), opt)):
        before = everything(b)
        with pytest.raises(
            ValueError, match=r"dynamic loss scale, this optimizer is with.*: construct it the same way"
        ):
            reloaded(a, b, way, tmp_path)
        assert_same(before, everything(b))
    for key, value in (("scale", 0.0), ("scale", "1"), ("growth_tracker", 2000), ("growth_tracker", None)):
        d = copy.deepcopy(opt.state_dict())
        d["scaler"][key] = value
        before = everything(other)
        with pytest.raises((TypeError, ValueError), match=f"state_dict(: loss_)?.*{key}"):
            other.load_state_dict(d)
        assert_same(before, everything(other))


@pytest.mark.parametrize("way", ["dict", pytest.param("torch", marks=pytest.mark.later("torch")), "file"])
def test_nothing_is_undone_behind_a_load(way, tmp_path):
    opt = make(keep_undo=True)
    opt.save(tmp_path / "a")
    opt.step([np.ones((3, 4), "f4"), None, None])
    if way == "file":
        opt.load(tmp_path / "a")
    else:
        opt.load_state_dict(copy.deepcopy(opt.state_dict(format="torch" if way == "torch" else None)))
    before = everything(opt)
    with pytest.raises(ValueError, match="there is no step to undo"):
        opt.rollback()
    opt.step([np.ones((3, 4), "f4"), None, None])
    opt.rollback()
    assert_same(before, everything(opt))


@pytest.mark.later("torch")
def test_pytorchs_state_leaves_schedules_and_drops_sums():
    lr = ac.schedules.exponential(0.5, 0.5)
    opt = make(lr=lr, steps=1)
    theirs = make(steps=3, lr=0.25).state_dict(format="torch")
    opt.accumulate([np.ones((3, 4), "f4"), None, None])
    opt.load_state_dict(theirs)
    assert opt.t == 3
    assert opt.pending == 0
    assert opt.param_groups[0].schedules["lr"] is lr
    assert opt.param_groups[0]["lr"] == 0.0625
    assert opt.state_dict(format="torch")["param_groups"][0]["lr"] == 0.0625


def test_a_group_that_was_added_is_loaded_into_one_that_was_there(tmp_path):
    opt = make(loss_scale="dynamic", shapes=((7,),), keep_undo=True)
    opt.add_param_group({"params": [np.ones(3)], "lr": ac.schedules.constant(0.5)})
    opt.accumulate([[np.ones(7, "f4")], [np.full(3, 65536.0)]])
    opt.save(tmp_path / "a")
    groups = [{"params": [np.zeros(7, "f4")]}, {"params": [np.zeros(3)]}]
    other = ac.AdamW(groups, loss_scale="dynamic")
    other.load(tmp_path / "a")
    opt.step()
    other.step()
    assert_same(everything(opt), everything(other))


@pytest.mark.parametrize("way", ["dict", pytest.param("torch", marks=pytest.mark.later("torch")), "file"])
def test_a_load_is_one_change_to_other_threads(way, tmp_path):
    """Another thread can change nothing between its parts: a load asks the schedules for their numbers, which may wait."""
    seen, loading = [], False

    def lr(t):
        if loading and threading.current_thread() is threading.main_thread():
            in_another_thread(other_thread)
        return 0.1

    options = {"loss_scale": "dynamic", "keep_undo": True, "lr": lr}
    opt, other = make(**options), make(seed=1, steps=1, **options)
    saved = copy.deepcopy(opt.state_dict(format="torch" if way == "torch" else None))
    if way == "file":
        opt.save(tmp_path / "a")
    group = other.param_groups[0]

    def other_thread():
        calls = [
            lambda: other.step([np.ones((3, 4), "f4"), None, None]),
            lambda: other.accumulate([np.ones((3, 4), "f4"), None, None]),
            lambda: group.update(lr=0.25),
            lambda: setattr(other, "loss_scale", 2.0),
            lambda: setattr(other, "max_grad_norm", 2.0),
            lambda: setattr(other, "t", 17),
            lambda: other.add_param_group({"params": np.ones(4, "f4")}),
            other.discard,
            other.rollback,
            other.state_dict,
        ]
        for call in calls:
            with pytest.raises(RuntimeError, match="this optimizer is in use"):
                call()
        seen.append(True)

    loading = True
    if way == "file":
        other.load(tmp_path / "a")
    else:
        other.load_state_dict(saved)
    loading = False
    assert seen
    assert other.t == 3
    group["lr"] = 0.5  # and nothing is held
    assert other.max_grad_norm is None
    other.step([np.ones((3, 4), "f4"), None, None])


@WAYS
def test_what_a_plateau_beside_a_function_has_seen(way, tmp_path):
    """Of a schedule with a function in it all but the function is stored."""
    s = ac.schedules

    def lr(length, function=bumpy):
        return s.warmup(s.chain([function, s.plateau(0.5, factor=0.5, patience=0)], [length]), 1)

    opt = make(steps=0, lr=lr(2))
    for metric in (1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        opt.step([np.ones((3, 4), "f4"), None, None], metric)
    other = reloaded(opt, make(steps=1, lr=lr(77)), way, tmp_path)
    assert other.param_groups[0].schedules == opt.param_groups[0].schedules
    assert other.param_groups[0]["lr"] == opt.param_groups[0]["lr"] == 0.125
    for wrong in (bumpy, s.warmup(bumpy, 1), lr(2, s.constant(0.5)), s.plateau(0.5)):
        other = make(seed=1, steps=1, lr=wrong)
        before = everything(other)
        with pytest.raises(ValueError, match=r"lr followed a function of your own, which can't be stored"):
            reloaded(opt, other, way, tmp_path)
        assert_same(before, everything(other))


def test_bounds_that_no_float_holds(tmp_path):
    opt = make(bounds=(-(10**400), 10**400))
    opt.save(tmp_path / "a")
    other = make(seed=1, bounds=(0.0, 1.0))
    other.load(tmp_path / "a")
    assert other.param_groups[0]["bounds"] == (None, None)


def test_a_refused_load_allocates_nothing():
    opt, other = make(), make(seed=1, steps=1)
    opt.accumulate([np.ones((3, 4), "f4"), None, None])
    d = opt.state_dict()
    d["settings"]["max_grad_value"] = 1e-60
    nbytes = other.nbytes
    with pytest.raises(ValueError, match="max_grad_value=1e-60 rounds to 0 in float32"):
        other.load_state_dict(d)
    assert other.nbytes == nbytes


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's count of a process's memory")
def test_sums_are_allocated_before_anything_changes():
    child("""
import resource, numpy as np, adaptive_c as ac
from support import assert_same, everything
opt, other = (ac.Momentum(np.full(1 << 24, x, "f4"), lr=x, n_threads=1) for x in (0.5, 0.25))
opt.accumulate(np.ones(1 << 24, "f4"))
before, saved = everything(other), opt.state_dict()
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limits = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 25), limits[1]))  # half of what the sums need
try:
    other.load_state_dict(saved)
except MemoryError:
    pass
else:
    raise AssertionError("it had the memory")
finally:
    resource.setrlimit(resource.RLIMIT_AS, limits)
assert_same(before, everything(other))
other.load_state_dict(saved)
assert_same(saved, other.state_dict())
""", PYTHONPATH=os.path.dirname(__file__))  # fmt: skip

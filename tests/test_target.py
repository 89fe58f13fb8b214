"""A target instead of a gradient: the bits of step(p - target), for every rule, format and stage, and its refusals."""

import ml_dtypes
import numpy as np
import pytest
from cases import IDS, PAIRS
from support import assert_same, assert_same_bits, build, everything

import adaptive_c as ac

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
STAGES = {
    "plain": {},
    "all": {"max_grad_norm": 3.0, "max_grad_value": 1.0, "loss_scale": 2.0, "on_nonfinite": "skip", "ema_decay": 0.9,
            "bounds": (-2.0, 2.0), "zero_grad": True},
    "rows": {"sum_to_one": True, "bounds": (1e-3, None), "max_grad_norm": 1.0, "norm_over": "array", "cast": True},
}  # fmt: skip


def arrays(rng, dtype="f4"):
    return {"a": rng.normal(size=5000).astype(dtype), "b": rng.normal(size=(3, 7)).astype(dtype)}


def differences(opt, target):
    """What the gradients are, in plain NumPy: in float32, or float64, from the master copy if there is one."""
    group = opt.param_groups[0]
    p = opt.state["master"] if "master" in opt.state else group["params"]
    kind = "f8" if group["params"]["a"].dtype == "f8" else "f4"
    return {key: None if x is None else p[key].astype(kind) - x.astype(kind) for key, x in target.items()}


@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
@pytest.mark.parametrize("stages", STAGES)
def test_it_has_the_bits_of_the_difference_as_a_gradient(name, options, stages):
    rng = np.random.default_rng(1)
    start = arrays(rng)
    a, b = ({key: x.copy() for key, x in start.items()} for _ in range(2))
    opt, other = (build(name, p, options, **STAGES[stages]) for p in (a, b))
    for i in range(4):
        target = arrays(rng)
        if i == 2:
            target["b"] = None
        before = {key: None if x is None else x.copy() for key, x in target.items()}
        opt.step(target=target)
        other.step(differences(other, target))
        assert_same(target, before)  # zero_grad zeroes gradients alone
    assert_same(everything(opt), everything(other))


FORMATS = [
    ("f8", {}, "f8"),
    ("f4", {"state_dtype": "bfloat16"}, "f2"),
    ("f4", {"state_dtype": "uint8"}, "f4"),
    ("f4", {}, BFLOAT16),
    ("f2", {"rounding": "stochastic"}, "f4"),
    ("f2", {"master": "float32"}, "f2"),
    (BFLOAT16, {"rounding": "stochastic", "state_dtype": "bfloat16"}, BFLOAT16),
    (BFLOAT16, {"rounding": "stochastic", "state_dtype": "uint8"}, "f4"),
    (BFLOAT16, {"master": "float32", "state_dtype": "uint8"}, BFLOAT16),
]


@pytest.mark.parametrize(("dtype", "options", "given"), FORMATS)
@pytest.mark.parametrize("way", ["step", "stepping", "threads", "norm"])
def test_every_format(dtype, options, given, way):
    rng = np.random.default_rng(2)
    start = {"a": rng.normal(size=40_000).astype(dtype), "b": rng.normal(size=(3, 77)).astype(dtype)}
    more = {"max_grad_norm": 1.0, "on_nonfinite": "raise"} if way == "norm" else {}
    a, b = ({key: x.copy() for key, x in start.items()} for _ in range(2))
    opt, other = (ac.AdamW(p, lr=0.1, copy_to=None, ema_decay=0.9, **options, **more) for p in (a, b))
    opt.n_threads = 3 if way == "threads" else 1
    for _ in range(3):
        target = {"a": rng.normal(size=40_000).astype(given), "b": rng.normal(size=(3, 77)).astype(given)}
        g = differences(other, target)
        if way == "stepping":
            with opt.stepping() as now:
                now("b", target=target["b"])
                now("a", target=target["a"])
        else:
            opt.step(target=target)
        other.step(g)
    assert_same(everything(opt), everything(other))


def test_gradients_and_targets_of_one_block():
    """Arrays that share a block of 8-bit state are stepped at the end, each with what it was given."""
    rng = np.random.default_rng(3)
    start = [rng.normal(size=n).astype("f4") for n in (100, 30, 300)]
    opt, other = (ac.Adam([x.copy() for x in start], lr=0.1, state_dtype="uint8") for _ in range(2))
    target, g = [rng.normal(size=x.size).astype("f4") for x in start], rng.normal(size=30).astype("f4")
    with opt.stepping() as now:
        now(2, target=target[2])
        now(1, g)
        now(0, target=target[0])
    other.step([start[0] - target[0], g, start[2] - target[2]])
    assert_same(everything(opt), everything(other))


def test_one_step_of_plain_descent_goes_all_the_way():
    """SGD with lr=1 is the fixed-point iteration; a smaller lr damps it."""
    w, new = np.array([1.0, 2.0]), np.array([5.0, -2.0])
    opt = ac.SGD(w, lr=1.0)
    opt.step(target=new)
    assert (w == new).all()
    opt.step(target=np.zeros(2), lr=0.25)
    assert (w == [3.75, -1.5]).all()


def test_groups_have_targets_each_and_the_norm_is_that_of_the_differences():
    a, b = np.zeros(2), np.zeros(2)
    opt = ac.SGD([{"params": a}, {"params": [b], "lr": 0.5}], lr=1.0, max_grad_norm=100.0)
    opt.step(target=[np.array([3.0, 0.0]), [np.array([0.0, 4.0])]])
    assert opt.grad_norm == 5
    assert (a == [3, 0]).all()
    assert (b == [0, 2]).all()
    opt.step(target=[None, [np.zeros(2)]])
    assert opt.grad_norm == 2
    assert (a == [3, 0]).all()
    assert (b == [0, 1]).all()


def test_rows_that_lag_are_brought_up_before_the_difference_is_taken():
    rng = np.random.default_rng(4)
    start = rng.normal(size=(6, 3)).astype("f4")
    more = {"rows": "exact", "max_grad_norm": 0.5}
    opt, other = (
        ac.Momentum(x, lr=0.1, **kind) for x, kind in ((start.copy(), more), (start.copy(), {**more, "rows": "lazy"}))
    )
    for _ in range(3):
        rows, values = rng.integers(0, 6, 2), rng.normal(size=(2, 3)).astype("f4")
        dense = np.zeros((6, 3), "f4")
        np.add.at(dense, rows, values)
        opt.step(ac.Rows(rows, values))
        other.step(dense)
        target = rng.normal(size=(6, 3)).astype("f4")
        opt.step(target=target)
        other.step(other.param_groups[0]["params"] - target)
    assert_same_bits(opt.param_groups[0]["params"], other.param_groups[0]["params"])
    assert opt.grad_norm == other.grad_norm


def test_it_goes_with_new_arrays_and_an_undo():
    w, v = np.ones(3), np.full(3, 5.0)
    opt = ac.SGD(w, lr=0.5, keep_undo=True)
    opt.step(target=np.full(3, 1.0), params=v)
    assert (v == 3).all()
    opt.rollback()
    assert (v == 5).all()
    assert (w == 1).all()


def test_it_leaves_targets_that_are_read_only_or_shared_alone():
    target = np.full(3, 2.0)
    target.flags.writeable = False
    opt = ac.SGD([np.ones(3), np.zeros(3)], lr=1.0, zero_grad=True)
    opt.step(target=[target, target])
    with opt.stepping() as now:
        now(0, target=target)
    assert (opt.param_groups[0]["params"][1] == 2).all()
    g = [np.ones(3), np.ones(3)]
    opt.step(g)  # and gradients are zeroed as ever
    with opt.stepping() as now:
        now(0, target=target)
        now(1, x := np.ones(3))
    assert not np.any(g)
    assert not x.any()


def params():
    return {"a": np.ones(3, "f4"), "b": np.ones((2, 2), "f4")}


WRONG = {
    "a list": (lambda p: [1, 2], ValueError, "target must be a dict with the keys 'a', 'b' of the parameters"),
    "a key": (lambda p: {"a": p["a"]}, ValueError, "target must be a dict"),
    "a shape": (lambda p: {"a": np.ones(4, "f4"), "b": None}, ValueError, r"target\['a'\] has shape \(4,\), its parameter \(3,\)"),
    "a dtype": (lambda p: {"a": np.ones(3), "b": None}, TypeError, r"target\['a'\] has dtype float64, its parameter float32"),
    "strides": (lambda p: {"a": np.ones(6, "f4")[::2], "b": None}, ValueError, r"target\['a'\] is not C-contiguous"),
    "no array": (lambda p: {"a": 1.0, "b": None}, TypeError, r"target\['a'\] is a float"),
    "the parameters": (lambda p: p, ValueError, r"target\['a'\] shares memory with params\['a'\]; pass a copy"),
    "rows": (lambda p: {"a": None, "b": ac.Rows(np.array([0]), np.ones((1, 2), "f4"))}, TypeError,
             r"target\['b'\] is one of rows, but a target is an array; pass.*Rows\(indices, w\[indices\] - values\)"),
    "infinity": (lambda p: {"a": None, "b": np.array([[1, 2], [np.inf, 3]], "f4")}, ValueError,
                 r"the difference to target\['b'\] is -inf at index \(1, 0\)"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_fit_is_refused_before_anything_is_written(make, error, message):
    p = params()
    opt = ac.Adam(p, on_nonfinite="raise")
    opt.step(params())
    before = everything(opt)
    with pytest.raises(error, match=message):
        opt.step(target=make(p))
    assert_same(everything(opt), before)
    with pytest.raises(ValueError, match=r"grads\['a'\] has shape"):  # gradients are called gradients again
        opt.step({"a": np.ones(5, "f4"), "b": None})


def test_what_it_can_not_go_with():
    w = np.ones(3)
    opt = ac.SGD(w, lr=1.0)
    with pytest.raises(TypeError, match="either grads or a target"):
        opt.step(np.ones(3), target=np.ones(3))
    with opt.stepping() as now, pytest.raises(TypeError, match=r"here it is now\(gradient\); got 2 arguments"):
        now(np.ones(3), target=np.ones(3))
    opt.accumulate(np.ones(3))
    with pytest.raises(ValueError, match="1 accumulated gradient is pending"):
        opt.step(target=np.ones(3))
    opt.discard()
    half = np.ones(3, "f2")
    opt = ac.SGD(half, lr=1.0, master="float32")
    new = np.full(3, 2.0, "f2")
    with pytest.raises(ValueError, match=r"refused with master copies.*call rebind\(params\) before step\(target"):
        opt.step(target=np.zeros(3, "f4"), params=new)
    assert opt.param_groups[0]["params"] is half
    opt.rebind(new)
    opt.step(target=np.zeros(3, "f4"))
    assert not new.any()


@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 1.0}, {"on_nonfinite": "raise"}])
@pytest.mark.parametrize("wrong", ["shape", "count"])
def test_a_refused_target_leaves_the_rollback_of_the_step_before(more, wrong):
    """Rows that lag would be brought up to date for it, after which nothing could be undone: only a step may do that."""
    w = np.ones((4, 2))
    opt = ac.Adam([w, np.ones(2)], lr=0.1, rows="exact", keep_undo=True, **more)
    before = w.copy()
    opt.step([ac.Rows(np.array([1]), np.ones((1, 2))), np.ones(2)])
    stepped = w.copy()
    target, count = np.zeros((4, 3 if wrong == "shape" else 2)), opt.state["step"][1]
    count[...] = -1 if wrong == "count" else 1
    with pytest.raises(ValueError, match=r"has shape" if wrong == "shape" else "the count of steps"):
        opt.step(target=[target, np.zeros(2)])
    assert (w == stepped).all()
    count[...] = 1
    opt.rollback()
    assert (w == before).all()
    opt.step([ac.Rows(np.array([1]), np.ones((1, 2))), np.ones(2)])
    if more:
        with pytest.raises(ValueError, match=r"rows have missed steps, .* call catch_up\(\) before it"):
            opt.step(target=[np.zeros((4, 2)), None])
        opt.catch_up()
    opt.step(target=[np.zeros((4, 2)), None])
    assert opt.t == 2

"""Other arrays instead of the parameters: the state stays, all or nothing, and the bits of a run that goes on."""

import gc
import weakref

import ml_dtypes
import numpy as np
import pytest
from cases import IDS, PAIRS
from support import assert_same, assert_same_bits, build, everything, flat, gradients, held, misaligned, read_only

import adaptive_c as ac

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHARED = {"ema_decay": 0.9, "bounds": (-3.0, 3.0), "max_grad_norm": 50.0, "max_grad_value": 2.0}


def fresh(params):
    """The same numbers in new arrays."""
    if isinstance(params, dict):
        return {key: x.copy() for key, x in params.items()}
    return [fresh(x) for x in params] if isinstance(params, (list, tuple)) else params.copy()


@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
@pytest.mark.parametrize("in_step", [False, True])
def test_a_run_whose_arrays_are_new_at_each_step_has_the_bits_of_one_that_keeps_them(name, options, in_step):
    rng = np.random.default_rng(1)
    start = {"a": rng.normal(size=5000).astype("f4"), "b": rng.normal(size=(3, 7)).astype("f4")}
    copies = [{key: np.zeros_like(x) for key, x in start.items()} for _ in range(2)]
    p = fresh(start)
    opt = build(name, p, options, copy_to=copies[0], **SHARED)
    other = build(name, fresh(start), options, copy_to=copies[1], **SHARED)
    for a, b in zip(gradients(rng, 5000, "f4", 4), gradients(rng, 21, "f4", 4), strict=True):
        g, old = {"a": a, "b": b.reshape(3, 7)}, p
        before, p = fresh(old), fresh(p)
        if in_step:
            opt.step(g, params=p)
        else:
            opt.rebind(p)
            opt.step(g)
        other.step(g)
        assert opt.param_groups[0]["params"]["a"] is p["a"]
        assert_same(old, before)
    assert_same(everything(opt), everything(other))


@pytest.mark.parametrize("structure", ["bare", "list", "dict", "groups"])
def test_every_structure(structure):
    def arrays(x):
        a, b = np.full(3, x), np.full((2, 2), x)
        return {"bare": a, "list": [a, b], "dict": {"a": a, "b": b}, "groups": [a, {"a": b}]}[structure]

    params = [{"params": x} for x in arrays(1.0)] if structure == "groups" else arrays(1.0)
    opt = ac.Momentum(params, lr=0.5)
    opt.step(arrays(1.0))
    new = arrays(4.0)
    opt.rebind(tuple(new) if structure == "list" else new)
    opt.step(arrays(1.0))
    assert (flat(new) == 4 - 0.5 * 1.9).all()
    for group in opt.param_groups:
        assert_same_bits(flat(group["params"]), np.full(flat(group["params"]).size, 4 - 0.5 * 1.9))


def test_the_old_arrays_are_let_go():
    old, new = np.ones(4), np.ones(4)
    opt = ac.Adam(old)
    seen = weakref.ref(old)
    opt.rebind(new)
    del old
    gc.collect()
    assert seen() is None


def test_what_is_bound_already_changes_nothing():
    w, half = np.ones(4), np.zeros(4, "f4")
    opt = ac.SGD([w], lr=0.5, keep_undo=True, copy_to=[half])
    opt.step([np.ones(4)])
    half[:] = 7
    opt.rebind([w])
    assert (half == 7).all()
    opt.rollback()
    assert (w == 1).all()


def test_copies_and_master_copies_are_made_anew():
    for dtype, options in (("f4", {}), ("f8", {}), ("f2", {"master": "float32"}), ("f2", {"rounding": "stochastic"}),
                           (BFLOAT16, {"master": "float32"})):  # fmt: skip
        copy = np.zeros(5000, "f4")
        opt = ac.SGD(np.full(5000, 3.25, dtype), lr=1.0, copy_to=copy, **options)
        opt.step(np.full(5000, 2.0**-20, "f8" if dtype == "f8" else "f4"))
        opt.rebind(np.full(5000, 1.5, dtype))
        assert (copy == 1.5).all()
        if "master" in options:
            assert (opt.state["master"] == 1.5).all()
        w = np.full(5000, 2.5, dtype)
        opt.step(None, params=w)
        assert (copy == 2.5).all()
        opt.step(np.ones(5000, "f8" if dtype == "f8" else "f4"), params=np.full(5000, 4.0, dtype))
        assert (copy == 3).all()
        assert (w == 2.5).all()


def test_averages_sums_and_counts_stay():
    opt = ac.SGD(np.ones(2), lr=1.0, ema_decay=0.5)
    opt.step(np.ones(2))  # to 0, the average to 0.5
    opt.accumulate(np.ones(2))
    w = np.full(2, 3.5)
    opt.rebind(w)
    opt.accumulate(np.zeros(2))
    opt.step()
    assert (w == 3).all()
    assert (opt.ema == 1.75).all()
    assert opt.t == 2


def test_a_step_of_the_old_arrays_can_not_be_undone():
    opt = ac.SGD(np.ones(2), lr=1.0, keep_undo=True)
    opt.step(np.ones(2))
    w = np.full(2, 5.0)
    opt.rebind(w)
    with pytest.raises(ValueError, match="no step to undo"):
        opt.rollback()
    v = np.full(2, 7.0)
    opt.step(np.ones(2), params=v)
    opt.rollback()
    assert (v == 7).all()
    assert (w == 5).all()
    opt.step(np.ones(2))
    assert (v == 6).all()


def test_checkpoints_have_the_new_arrays(tmp_path):
    opt = ac.Adam(np.ones(3), lr=0.1)
    opt.step(np.ones(3))
    w = np.full(3, 5.0)
    opt.rebind(w)
    opt.save(tmp_path / "x", parameters=True)
    v = np.zeros(3)
    ac.Adam(v).load(tmp_path / "x")
    assert (v == 5).all()
    opt.rebind(np.zeros(3))
    opt.load(tmp_path / "x")
    assert (opt.param_groups[0]["params"] == 5).all()


def test_a_group_that_comes_later():
    opt = ac.SGD(np.ones(2), lr=1.0)
    opt.rebind(np.ones(2))
    opt.add_param_group({"params": [np.ones(3)]})
    a, b = np.full(2, 2.0), np.full(3, 3.0)
    opt.rebind([a, [b]])
    opt.step([np.ones(2), [np.ones(3)]])
    assert (a == 1).all()
    assert (b == 2).all()


class Bound:
    """An optimizer with everything that new arrays may collide with."""

    def __init__(self):
        self.copy = [np.zeros(3, "f4"), np.zeros((2, 2), "f4")]
        self.params = [np.ones(3, "f4"), np.ones((2, 2), "f4")]
        self.opt = ac.Adam(self.params, lr=0.5, ema_decay=0.5, copy_to=self.copy)
        self.grads = [np.ones(3, "f4"), np.ones((2, 2), "f4")]
        self.opt.step(self.grads)
        self.opt.accumulate(self.grads)


STATE = r"(params\[0\] and this optimizer's state|this optimizer's state and params\[0\]) share memory"
b = np.ones((2, 2), "f4")
WRONG = {
    "another number": (lambda o: [np.ones(3, "f4")], ValueError, "params must be a list of 2 arrays.*got a list of 1"),
    "a dict": (lambda o: {"a": 1}, ValueError, "params must be a list of 2 arrays"),
    "a shape": (lambda o: [np.ones(4, "f4"), b], ValueError, r"params\[0\] has shape \(4,\), the array whose place.*\(3,\)"),
    "dimensions": (lambda o: [np.ones((3, 1), "f4"), b], ValueError, r"params\[0\] has shape \(3, 1\)"),
    "a dtype": (lambda o: [np.ones(3), b], TypeError, r"params\[0\] has dtype float64, the array whose.*float32"),
    "byte order": (lambda o: [np.ones(3, ">f4"), b], TypeError, r"params\[0\] has dtype >f4 \(byte-swapped\)"),
    "integers": (lambda o: [np.ones(3, "i4"), b], TypeError, r"params\[0\] has dtype int32"),
    "no array": (lambda o: [[1.0, 1.0, 1.0], b], TypeError, r"params\[0\] is a list, not a numpy.ndarray"),
    "none": (lambda o: [None, b], TypeError, r"params\[0\] is a NoneType, not a numpy.ndarray"),
    "read-only": (lambda o: [read_only(np.ones(3, "f4")), b], ValueError, r"params\[0\] is read-only"),
    "strides": (lambda o: [np.ones(6, "f4")[::2], b], ValueError, r"params\[0\] is not C-contiguous"),
    "alignment": (lambda o: [misaligned(np.ones(3, "f4")), b], ValueError, r"params\[0\] is misaligned"),
    "each other": (lambda o: [b.reshape(-1)[1:], b], ValueError, r"params\[1\] and params\[0\] share memory"),
    "state": (lambda o: [o.opt.state["exp_avg"][0], b], ValueError, STATE),
    "the average": (lambda o: [o.opt.ema[0], b], ValueError, STATE),
    "a copy": (lambda o: [o.copy[0], b], ValueError, r"(params\[0\] and copy_to|copy_to\[0\] and params)\[0\] share memory"),
    "sums": (lambda o: [held(o.opt, "sums")[:3], b], ValueError, STATE),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("in_step", [False, True])
def test_what_does_not_fit_is_refused_and_the_old_arrays_stay(make, error, message, in_step):
    own = Bound()
    new, before = make(own), everything(own.opt)
    with pytest.raises(error, match=message):
        own.opt.step(params=new) if in_step else own.opt.rebind(new)
    assert_same(everything(own.opt), before)
    assert own.opt.param_groups[0]["params"][0] is own.params[0]
    own.opt.step()
    assert (own.params[0] != before["groups"][0]["params"][:3]).all()


def test_a_step_that_is_refused_leaves_the_old_arrays_bound():
    copy, w = np.zeros(3, "f2"), np.ones(3, "f4")
    opt = ac.SGD(w, lr=1.0, on_nonfinite="raise", copy_to=copy, keep_undo=True)
    g = np.ones(3, "f4")
    opt.step(g)
    for wrong, more in (
        (np.ones(2, "f4"), {}),
        (np.full(3, np.inf, "f4"), {}),
        (g, {"lr": -1.0}),
        (g, {"metric": 1.0}),
    ):
        new = np.full(3, 5.0, "f4")
        with pytest.raises(ValueError, match=r"shape|inf|lr must|no schedule reads"):
            opt.step(wrong, params=new, **more)
        assert (new == 5).all()
        assert opt.param_groups[0]["params"] is w
        assert (copy == 0).all()
    with pytest.raises(ValueError, match="shares memory with params"):
        opt.step(new, params=new)
    opt.rollback()
    assert (w == 1).all()
    opt.step(g)
    assert (w == 0).all()


def test_a_skipped_step_leaves_the_new_arrays_bound():
    copy, w = np.zeros(3, "f2"), np.full(3, 5.0, "f4")
    opt = ac.SGD(np.ones(3, "f4"), lr=1.0, on_nonfinite="skip", copy_to=copy)
    opt.step(np.full(3, np.nan, "f4"), params=w)
    assert (copy == 5).all()
    opt.step(np.ones(3, "f4"))
    assert (w == 4).all()


def test_the_gradient_may_lie_in_the_old_arrays():
    w, v = np.ones(3), np.full(3, 2.0)
    opt = ac.SGD(w, lr=1.0)
    opt.step(w, params=v)
    assert (v == 1).all()


def test_blocks_and_rows_that_lag_refuse_it():
    w = np.ones((4, 2))
    opt = ac.Momentum(w, lr=1.0, rows="exact", ema_decay=0.5)
    with opt.averaged_parameters(), pytest.raises(RuntimeError, match="averaged_parameters"):
        opt.rebind(w.copy())
    with opt.stepping() as now:
        now(np.ones((4, 2)))
        with pytest.raises(RuntimeError, match="stepping"):
            opt.rebind(w.copy())
    opt.step(ac.Rows(np.array([1]), np.ones((1, 2))))
    for call in (lambda: opt.rebind(w.copy()), lambda: opt.step(np.ones((4, 2)), params=w.copy())):
        with pytest.raises(ValueError, match=r"rows of params have missed steps.*call catch_up\(\)"):
            call()
    opt.catch_up()
    new = w.copy()
    opt.rebind(new)
    opt.step(ac.Rows(np.array([1]), np.ones((1, 2))))
    opt.catch_up()
    dense = ac.Momentum(np.ones((4, 2)), lr=1.0, ema_decay=0.5)
    for rows in ([0, 1, 2, 3], [1], [1]):
        g = np.zeros((4, 2))
        g[rows] = 1
        dense.step(g)
    assert_same_bits(new, dense.param_groups[0]["params"])


def test_threads_and_narrow_numbers_with_new_arrays():
    """Large enough for several threads; the noise of stochastic rounding is that of the place, not of the array."""
    for dtype, options in (
        ("f2", {"rounding": "stochastic"}),
        (BFLOAT16, {"master": "float32"}),
        ("f4", {"state_dtype": "uint8"}),
    ):
        rng = np.random.default_rng(4)
        start = rng.normal(size=40_000).astype(dtype)
        grads = rng.normal(size=(3, 40_000)).astype("f4")
        one, other = (ac.Adam(start.copy(), lr=0.1, n_threads=n, **options) for n in (1, 3))
        for g in grads:
            one.step(g)
            other.step(g, params=other.param_groups[0]["params"].copy())
            if "master" in options:  # begins anew from the narrow numbers
                one.state["master"][:] = one.param_groups[0]["params"].astype("f4")
                other.rebind(other.param_groups[0]["params"].copy())
        assert_same(everything(one), everything(other))

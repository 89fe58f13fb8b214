"""A step array by array, as gradients arrive, is the whole step: the same bits, counts and refusals."""

import sys
import threading

import numpy as np
import pytest
from cases import IDS, PAIRS
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CHUNK, assert_same, break_off, build, everything, gradients, set_scaler, split
from test_formats import allocate, every_format, every_rule, shared
from test_stages import DTYPES

import adaptive_c as ac

SIZE = 2 * CHUNK + 333
CUTS = [5, 250, 260, 4000, 4100, 4100, 4200]
ONE = np.ones(1, "float32")


def step_each(opt, grads, rng, **options):
    """Step the arrays of a list in a random order."""
    with opt.stepping(**options) as now:
        for i in rng.permutation(len(grads)):
            now(i, grads[i])


def check(opt, whole, steps, rng, **options):
    """Steps array by array, and the same as whole ones; every third array has no gradient in the second step."""
    for t, g in enumerate(steps):
        g = [None if t == 1 and i % 3 == 0 else x for i, x in enumerate(g)]
        whole.step([None if x is None else x.copy() for x in g], **options)
        step_each(opt, g, rng, **options)
        assert_same(everything(opt), everything(whole))


@DTYPES
@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
def test_the_bits_of_the_whole_step(name, options, dtype):
    rng = np.random.default_rng(0)
    params = split(rng.normal(size=SIZE).astype(dtype), CUTS)

    def make(n_threads):
        copies = [np.empty(x.shape, "float32") for x in params]
        return build(name, [x.copy() for x in params], options, n_threads=n_threads, ema_decay=0.9, copy_to=copies,
                     bounds=(-2.0, 2.0), max_grad_value=50.0, zero_grad=True)  # fmt: skip

    steps = [split(g, CUTS) for g in gradients(rng, SIZE, dtype, 3)]
    check(make(3), make(2), steps, rng, loss_scale=8.0)
    assert not any(x.any() for x in steps[-1])  # which were zeroed


@every_format
@every_rule
def test_narrow_numbers_have_the_same_bits_although_arrays_share_blocks(name, options, formats):
    rng = np.random.default_rng(1)
    p, _ = allocate(rng, SIZE, formats)

    def make(**more):
        return build(name, split(p, CUTS), options, ema_decay=0.9, seed=5, **more, **shared(formats))

    steps = [split(np.clip(g, -10, 10), CUTS) for g in gradients(rng, SIZE, "float32", 3)]
    check(make(n_threads=3, keep_undo=True), make(), steps, rng)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 700), min_size=1, max_size=12), st.randoms(use_true_random=False), st.booleans())
def test_any_cut_of_eight_bit_state(sizes, random, narrow_grads):
    rng = np.random.default_rng(random.randrange(2**32))
    p = [rng.normal(size=n).astype("float32") for n in sizes]
    opt, whole = (ac.AdamW([x.copy() for x in p], state_dtype="uint8", keep_undo=kept) for kept in (True, False))
    for _ in range(2):
        g = [rng.normal(size=n).astype("float16" if narrow_grads else "float32") for n in sizes]
        g = [None if random.random() < 0.2 else x for x in g]
        whole.step(g)
        step_each(opt, g, rng)
        assert_same(everything(opt), everything(whole))


def test_large_arrays_in_several_threads():
    rng = np.random.default_rng(2)
    n = [70_001, 1, 30_000]
    p = [rng.normal(size=k).astype("float32") for k in n]
    for formats in ({}, {"state_dtype": "uint8"}):
        opts = [ac.AdamW([x.copy() for x in p], n_threads=k, **formats) for k in (1, 2, 3)]
        for opt in opts:
            step_each(opt, [x * 0.1 for x in p], rng)
        assert_same(everything(opts[0]), everything(opts[1]))
        assert_same(everything(opts[0]), everything(opts[2]))


def test_every_structure_has_its_way_to_name_an_array():
    a, b, c = (np.ones(2) for _ in range(3))
    opt = ac.SGD(a, lr=1.0)
    with opt.stepping() as now:
        now(np.ones(2))
    opt = ac.SGD({"b": b}, lr=1.0)
    with opt.stepping() as now:
        now("b", np.ones(2))
    d, e = np.ones(2), np.ones(2)
    opt = ac.SGD([{"params": c}, {"params": [d]}, {"params": {("x", 1): e}}], lr=1.0)
    with opt.stepping() as now:
        now(0, np.ones(2))
        now(np.int64(1), np.int8(0), np.ones(2))
        now(2, ("x", 1), np.ones(2))
    for x in (a, b, c, d, e):
        assert (x == 0).all()
    assert opt.t == 1


def test_what_is_not_named_is_left_alone():
    p = {name: np.ones(3) for name in "abc"}
    opt = ac.Adam(p, lr=0.1, ema_decay=0.5)
    with opt.stepping() as now:
        now("b", np.ones(3))
        now("c", None)
    assert (p["a"] == 1).all()
    assert (p["c"] == 1).all()
    assert (p["b"] < 1).all()
    assert [int(opt.state["step"][name]) for name in "abc"] == [0, 1, 0]
    with opt.stepping():
        pass
    assert opt.t == 1  # a block that stepped nothing is no step


def test_the_numbers_are_those_of_the_beginning_and_the_count_moves_at_the_end():
    asked = []
    p = [np.zeros(1), np.zeros(1)]
    opt = ac.SGD(p, lr=lambda t: asked.append(t) or float(10**t))
    asked.clear()  # the constructor has asked, too
    for t in range(2):
        with opt.stepping() as now:
            assert asked == list(range(t + 1))
            now(0, np.ones(1))
            assert opt.t == t
            now(1, np.ones(1))
        assert opt.t == t + 1
    assert p[0] == p[1] == -11


def test_metric_and_loss_scale_are_those_of_a_step():
    p = np.zeros(1)
    opt = ac.SGD(p, lr=ac.schedules.plateau(1.0, factor=0.5, patience=0))
    for metric in (1.0, 1.0, 1.0):
        with opt.stepping(metric, loss_scale=2.0) as now:
            now(2 * np.ones(1))
    assert p == -2.5  # 1, 1, 0.5: a metric sets the numbers of the steps after its own
    with pytest.raises(ValueError, match=r"no schedule reads metric=1.0"), ac.SGD(p).stepping(1.0):
        pass
    with pytest.raises(TypeError, match="metric must be a number"):
        opt.stepping(np.ones(1))


def test_a_gradient_is_not_held():
    opt = ac.AdamW([np.ones(700, "float32")] * 1 + [np.ones(3, "float32")], state_dtype="uint8")
    grad = np.ones(700, "float32")
    with opt.stepping() as now:
        before = sys.getrefcount(grad)
        now(0, grad)
        assert sys.getrefcount(grad) == before
        grad.resize(0)  # NumPy refuses while a buffer of it is held
        now(1, np.ones(3, "float32"))
    assert opt.t == 1


def test_an_exception_leaves_what_was_stepped():
    rng = np.random.default_rng(3)
    sizes = [300, 300, 300]
    p, g = ([rng.normal(size=n).astype("float32") for n in sizes] for _ in range(2))
    opt, whole = (ac.AdamW([x.copy() for x in p], state_dtype="uint8") for _ in range(2))
    with pytest.raises(LookupError) as raised:
        break_off(opt, g, [0, 2])
    assert raised.value.__notes__ == [
        "inside stepping(), after 2 of 3 arrays were stepped, which stay stepped; for the others this step did not "
        "take place"
    ]
    whole.step([g[0], None, g[2]])
    assert_same(everything(opt), everything(whole))


@pytest.mark.parametrize("formats", [{}, {"state_dtype": "uint8"}])
def test_or_is_undone_with_keep_undo(formats):
    rng = np.random.default_rng(4)
    sizes = [300, 2 * CHUNK, 10, CHUNK - 3]
    p, g = ([rng.normal(size=n).astype("float32") for n in sizes] for _ in range(2))
    lr = ac.schedules.plateau(0.1, factor=0.5, patience=0)
    copies = [np.empty_like(x) for x in p]
    opt = ac.AdamW(p, lr=lr, keep_undo=True, ema_decay=0.5, copy_to=copies, **formats)
    opt.step(g, 1.0)
    before = everything(opt)
    with pytest.raises(LookupError) as raised:
        break_off(opt, g, [2, 1, 3], 1.0)
    assert raised.value.__notes__ == [
        "inside stepping(), after 3 of 4 arrays were stepped, which are as they were before it"
    ]
    assert_same(everything(opt), before)
    with pytest.raises(ValueError, match="there is no step to undo"):
        opt.rollback()
    with opt.stepping(1.0) as now:
        for i in (3, 0, 1):
            now(i, g[i])
    assert opt.t == 2
    opt.rollback()  # a block is one step
    assert_same(everything(opt), before)


def test_a_gradient_that_does_not_fit_changes_nothing_and_the_block_goes_on():
    p = {"a": np.ones(3, "float32"), "b": np.ones(3, "float32")}
    opt = ac.SGD(p, lr=1.0)
    g = np.ones(3, "float32")
    with opt.stepping() as now:
        for key, grad, kind, message in [
            ("a", np.ones(4, "float32"), ValueError, r"grads\['a'\] has shape \(4,\), its parameter \(3,\)"),
            ("a", np.ones(3), TypeError, r"grads\['a'\] has dtype float64, its parameter float32"),
            ("a", p["b"], ValueError, r"grads\['a'\] shares memory with params\['b'\]"),
            ("a", [1, 2, 3], TypeError, r"grads\['a'\] is a list, not a numpy.ndarray"),
            ("c", g, KeyError, r"params has no 'c'; it has 'a', 'b'"),
        ]:
            with pytest.raises(kind, match=message):
                now(key, grad)
        with pytest.raises(TypeError, match=r"here it is now\(key, gradient\); got 1 argument$"):
            now(g)
        with pytest.raises(TypeError, match=r"here it is now\(key, gradient\); got 0 arguments"):
            now()
        now("a", g)
        with pytest.raises(ValueError, match=r"params\['a'\] has had its step in this block; add up"):
            now("a", g)
        opt_t = opt.t
        now("b", g)
    assert opt_t == 0
    assert opt.t == 1
    assert not p["a"].any()
    assert not p["b"].any()
    before = everything(opt)
    step = opt.state_dict()["groups"][0]["arrays"]["step"]  # the live counts
    step[1] = -1
    with opt.stepping() as now, pytest.raises(ValueError, match=r"count of steps of params\['b'\].* is -1"):
        now("b", g)
    assert step.tolist() == [1, -1]
    step[1] = 1
    assert_same(everything(opt), before)


def test_places_that_do_not_exist():
    opt = ac.SGD([{"params": [np.ones(1)]}, {"params": np.ones(1)}])
    g = np.ones(1)
    with opt.stepping() as now:
        for place, kind, message in [
            ((2, 0), IndexError, r"there are 2 groups, 0 .. 1; got 2"),
            ((-1, 0), IndexError, r"there are 2 groups, 0 .. 1; got -1"),
            ((0, 1), IndexError, r"there is 1 array, 0 .. 0; got 1"),
            ((0, 0.0), TypeError, r"named by their index, an integer; got 0.0"),
            ((True, 0), TypeError, r"named by their index, an integer; got True"),
            ((0,), TypeError, r"here it is now\(group, index, gradient\); got 2 arguments"),
            ((1, 0), TypeError, r"here it is now\(group, gradient\); got 3 arguments"),
        ]:
            with pytest.raises(kind, match=message):
                now(*place, g)
    assert opt.t == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_grad_norm": 1.0}, r"refused with max_grad_norm=1.0, which looks at all gradients"),
        ({"on_nonfinite": "skip"}, r"refused with on_nonfinite, which looks at all gradients .*use step\(grads\)$"),
        ({"on_nonfinite": "raise"}, r"refused with on_nonfinite"),
        ({"loss_scale": "dynamic"}, r"a dynamic loss_scale implies it"),
    ],
)
def test_refused_with_options_that_need_all_gradients(options, message):
    p = ONE.copy()
    opt = ac.SGD(p, **options)
    with pytest.raises(ValueError, match=message), opt.stepping():
        pass
    opt.step(ONE)
    assert opt.t == 1


def test_refused_while_sums_are_pending_and_inside_averages():
    opt = ac.SGD(ONE.copy(), ema_decay=0.5)
    opt.accumulate(ONE)
    with pytest.raises(ValueError, match="1 accumulated gradient is pending"), opt.stepping():
        pass
    opt.discard()
    with opt.averaged_parameters(), pytest.raises(RuntimeError, match="not inside averaged_parameters"), opt.stepping():
        pass


INSIDE = {
    "step": lambda opt, path: opt.step(ONE),
    "stepping": lambda opt, path: opt.stepping().__enter__(),
    "accumulate": lambda opt, path: opt.accumulate(ONE),
    "discard": lambda opt, path: opt.discard(),
    "rollback": lambda opt, path: opt.rollback(),
    "t": lambda opt, path: setattr(opt, "t", 3),
    "lr": lambda opt, path: opt.param_groups[0].__setitem__("lr", 5.0),
    "another option": lambda opt, path: opt.param_groups[0].__setitem__("weight_decay", 1),
    "a setting": lambda opt, path: setattr(opt, "zero_grad", True),
    "add_param_group": lambda opt, path: opt.add_param_group({"params": ONE.copy()}),
    "averaged_parameters": lambda opt, path: opt.averaged_parameters().__enter__(),
    "save": lambda opt, path: opt.save(path / "x"),
    "load_state_dict": lambda opt, path: opt.load_state_dict(ac.SGD(ONE.copy(), ema_decay=0.5).state_dict()),
}


@pytest.mark.parametrize("what", INSIDE)
def test_inside_the_block_nothing_else_changes_the_run(what, tmp_path):
    p = ONE.copy()
    opt = ac.SGD(p, lr=0.25, keep_undo=True, ema_decay=0.5)
    with opt.stepping() as now:
        with pytest.raises(RuntimeError, match=r"not inside stepping\(\), whose arrays all take the same step"):
            INSIDE[what](opt, tmp_path)
        now(ONE)
    assert p == 0.75
    opt.step(ONE)  # and after it the optimizer is free
    assert opt.t == 2


def test_outside_the_block_there_is_nothing_to_step():
    opt = ac.SGD(ONE.copy())
    block = opt.stepping()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="can be stepped inside the block"):
            block(ONE)
        with pytest.raises(RuntimeError, match=r"this block is not entered: write `with opt\.stepping"):
            block.__exit__(None, None, None)
        with block as now:
            now(ONE)
    with pytest.raises(RuntimeError, match="not entered"):
        block.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="can be stepped inside the block"):
        now(ONE)
    assert opt.t == 2  # a block may be opened again, which is another step


def test_other_threads_may_step_but_not_two_at_once():
    n, times = 1 << 16, 8
    p = [np.zeros(n, "float32") for _ in range(times)]
    opt = ac.SGD(p, lr=1.0, n_threads=2)
    g = np.ones(n, "float32")
    refused = []

    def work(now, mine):
        for i in mine:
            while True:
                try:
                    now(i, g)
                    break
                except RuntimeError as error:
                    refused.append(str(error))

    with opt.stepping() as now:
        threads = [threading.Thread(target=work, args=(now, range(k, times, 2))) for k in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all((x == -1).all() for x in p)
    assert all("in use" in message for message in refused)


@pytest.mark.parametrize("keep_undo", [True, False])
def test_a_block_that_is_left_while_a_thread_steps_ends_with_that_call(keep_undo):
    inside, on = threading.Event(), threading.Event()

    class Slow(str):
        def __hash__(self):
            inside.set()
            on.wait()
            return super().__hash__()

    p = {"a": np.ones(3, "float32"), "b": np.ones(3, "float32")}
    opt = ac.SGD(p, lr=1.0, keep_undo=keep_undo)
    block = opt.stepping()
    thread = threading.Thread(target=block, args=(Slow("b"), np.ones(3, "float32")))

    def leave():
        with block as now:
            now("a", np.ones(3, "float32"))
            thread.start()
            inside.wait()
            raise LookupError

    with pytest.raises(LookupError) as raised:
        leave()
    with pytest.raises(RuntimeError, match="this optimizer is in use"):
        opt.step(dict.fromkeys(p))
    on.set()
    thread.join()
    assert len(raised.value.__notes__) == 1
    assert opt.t == (0 if keep_undo else 1)
    assert all((x == opt.t ^ 1).all() for x in p.values())
    opt.step({name: np.ones(3, "float32") for name in p})  # it is free again


def test_the_callers_floating_point_mode_is_its_own_between_the_calls():
    smallest = np.array([1e-310])
    opt = ac.SGD([np.ones(1), np.ones(1)], flush_denormals=True)
    with opt.stepping() as now:
        now(0, np.ones(1))
        assert (smallest * 1 == smallest).all()
        now(1, np.ones(1))
    assert (smallest * 1 == smallest).all()


def test_plain_counts_and_a_dynamic_scale_stay_as_they_are():
    opt = ac.SGD(ONE.copy(), loss_scale="dynamic")
    set_scaler(opt, growth_tracker=7)
    before = everything(opt)
    with pytest.raises(ValueError, match="refused with on_nonfinite"), opt.stepping():
        pass
    assert_same(everything(opt), before)

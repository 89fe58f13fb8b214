"""A step undone is a step never made: everything is to the bit as before, and the same step again gives the same bits."""

import copy

import numpy as np
import pytest
from cases import IDS, PAIRS
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CHUNK, assert_same, build, everything, gradients, set_scaler, split, step_range
from test_formats import allocate, every_format, every_rule, shared
from test_stages import DTYPES

import adaptive_c as ac

SIZE = 2 * CHUNK + 333
CUTS = [5, 250, 260, 4000, 4100, 4200]


def check_rule(name, params, make_grads, options, more):
    """Steps of which each but the last is undone and made again, against an optimizer that goes straight on."""
    opt = build(name, [x.copy() for x in params], options, keep_undo=True, n_threads=3, **more())
    straight = build(name, [x.copy() for x in params], options, n_threads=2, **more())
    for t, g in enumerate(make_grads):
        before = everything(opt)
        opt.step([x * 3 for x in g])
        opt.rollback()
        assert_same(everything(opt), before)
        with pytest.raises(
            ValueError, match="there is no step to undo: the last one is undone already, and one before it is not kept"
        ):
            opt.rollback()
        assert_same(everything(opt), before)
        g = [None if t == 1 and i % 2 else x for i, x in enumerate(g)]
        opt.step(g)
        straight.step(g)
        assert_same(everything(opt), everything(straight))


@DTYPES
@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
def test_undone_and_made_again(name, options, dtype):
    rng = np.random.default_rng(0)
    params = split(rng.normal(size=SIZE).astype(dtype), CUTS)

    def more():
        return {"ema_decay": 0.9, "copy_to": [np.empty(x.shape, "float32") for x in params], "max_grad_norm": 2.0}

    check_rule(name, params, [split(g, CUTS) for g in gradients(rng, SIZE, dtype, 4)], options, more)


@every_format
@every_rule
def test_narrow_numbers_too_with_the_noise_they_had(name, options, formats):
    rng = np.random.default_rng(1)
    p, _ = allocate(rng, SIZE, formats)

    def more():
        return {"ema_decay": 0.9, "seed": 5, "copy_to": [np.empty(x.shape, "float16") for x in split(p, CUTS)],
                **shared(formats)}  # fmt: skip

    grads = [split(np.clip(g, -10, 10), CUTS) for g in gradients(rng, SIZE, "float32", 3)]
    check_rule(name, split(p, CUTS), grads, options, more)


@given(
    cuts=st.lists(st.integers(0, 12 * CHUNK + 77), max_size=10),
    missing=st.sets(st.integers(0, 10)),
    n_threads=st.integers(1, 7),
    state=st.sampled_from([None, "bfloat16", "uint8"]),
)
@settings(max_examples=40)
def test_any_cut_any_arrays_without_gradients_any_number_of_threads(cuts, missing, n_threads, state):
    rng = np.random.default_rng(3)
    size = 12 * CHUNK + 77
    parts = split(rng.normal(size=size).astype("float32"), cuts)
    opt = ac.AdamW([{"params": parts, "state_dtype": state}, {"params": rng.normal(size=99)}], lr=0.1, ema_decay=0.5,
                   amsgrad=True, keep_undo=True, n_threads=n_threads)  # fmt: skip
    opt.step([split(rng.normal(size=size).astype("float32"), cuts), rng.normal(size=99)])
    before = everything(opt)
    grads = split(rng.normal(size=size).astype("float32") * 100, cuts)
    opt.step([[None if i in missing else g for i, g in enumerate(grads)], None if 10 in missing else np.ones(99)])
    opt.rollback()
    assert_same(everything(opt), before)


def test_the_first_buffer_is_the_first_again():
    p = np.zeros(3)
    opt = ac.SGD(p, lr=1.0, momentum=0.5, dampening=0.5, keep_undo=True)
    opt.step(np.ones(3))
    opt.rollback()
    assert opt.t == 0
    opt.step(np.full(3, 2.0))
    np.testing.assert_array_equal(p, -2)  # undamped, as an array's first gradient is


def test_a_buffer_that_begins_after_some_steps_begins_again():
    p = np.zeros(3)
    opt = ac.SGD(p, lr=1.0, momentum=0.5, dampening=0.5, keep_undo=True)
    opt.param_groups[0]["momentum"] = 0.0
    opt.step(np.ones(3))
    opt.param_groups[0]["momentum"] = 0.5
    for _ in range(2):
        opt.step(np.ones(3))
        np.testing.assert_array_equal(p, -2)
        opt.rollback()
    np.testing.assert_array_equal(p, -1)


def test_a_skipped_step_is_undone_too_and_one_that_raised_is_none():
    p = np.ones(SIZE, "float32")
    opt = ac.Adam(p, loss_scale="dynamic", keep_undo=True, max_grad_norm=1.0)
    g = np.full_like(p, 2.0**16)
    opt.step(g)
    norm = opt.grad_norm
    before = everything(opt)
    g[3] = np.inf
    opt.step(g)
    assert (opt.skipped_steps, opt.loss_scale, opt.t) == (1, 2.0**15, 1)
    opt.rollback()
    assert_same(everything(opt), before)
    assert opt.grad_norm == norm
    with pytest.raises(ValueError, match="there is no step to undo"):
        opt.rollback()  # the one before can't be undone any more

    p = np.ones(3, "float32")
    opt = ac.Adam(p, on_nonfinite="raise", keep_undo=True)
    before = everything(opt)
    opt.step(np.ones_like(p))
    for bad in (np.full_like(p, np.nan), np.ones(4, "float32")):
        with pytest.raises(ValueError, match=r"is nan|shape"):
            opt.step(bad)
    opt.rollback()
    assert_same(everything(opt), before)


def test_the_dynamic_scale_goes_back_and_grows_again():
    opt = ac.SGD(np.zeros(2, "float32"), loss_scale="dynamic", keep_undo=True)
    set_scaler(opt, scale=8.0, growth_tracker=1999)
    for _ in range(2):
        opt.step(np.ones(2, "float32"))
        assert opt.state_dict()["scaler"] == {"scale": 16.0, "growth_tracker": 0}
        opt.rollback()
        assert opt.state_dict()["scaler"] == {"scale": 8.0, "growth_tracker": 1999}


def test_a_step_without_any_gradient_is_the_last_step_too():
    p = np.zeros(2)
    opt = ac.SGD(p, lr=1.0, keep_undo=True)
    opt.step(np.ones(2))
    opt.step(None)
    opt.rollback()
    np.testing.assert_array_equal(p, -1)
    assert opt.t == 1


def test_what_happened_since_the_step_is_undone_with_it_but_options_stay():
    p = np.zeros(2)
    opt = ac.Adam(p, lr=1.0, keep_undo=True)
    opt.step(np.ones(2))
    before = everything(opt)
    opt.step(np.ones(2))
    p[:] = 7
    opt.t = 50
    opt.param_groups[0]["lr"] = 0.5
    opt.rollback()
    assert opt.param_groups[0]["lr"] == 0.5
    opt.param_groups[0]["lr"] = 1.0
    assert_same(everything(opt), before)


def test_sums_and_zeroed_gradients_do_not_come_back():
    p = np.zeros(SIZE, "float32")
    opt = ac.SGD(p, lr=1.0, keep_undo=True, zero_grad=True)
    g = np.ones_like(p)
    opt.accumulate(g)
    opt.accumulate(np.full_like(p, 3))
    opt.step()
    assert (p == -2).all()
    opt.accumulate(np.ones_like(p))
    with pytest.raises(ValueError, match=r"1 accumulated gradient is pending, .* discard\(\) drops them"):
        opt.rollback()
    opt.discard()
    opt.rollback()
    assert not p.any()
    assert not g.any()
    with pytest.raises(ValueError, match="there are none"):
        opt.step()


def test_refusals():
    p = np.ones(3)
    opt = ac.SGD(p, lr=1.0)
    opt.step(np.ones(3))
    with pytest.raises(ValueError, match=r"construct the optimizer with keep_undo=True"):
        opt.rollback()
    with pytest.raises(TypeError, match="keep_undo must be True or False, got 1"):
        ac.SGD(p, keep_undo=1)
    opt = ac.SGD(p, lr=1.0, ema_decay=0.5, keep_undo=True)
    with pytest.raises(ValueError, match="there is no step to undo"):
        opt.rollback()
    opt.step(np.ones(3))
    with opt.averaged_parameters(), pytest.raises(RuntimeError, match="not inside averaged_parameters"):
        opt.rollback()
    with pytest.raises(ValueError, match="a range can't be stepped with keep_undo"):
        step_range(opt, np.ones(3), lo=0, hi=0)
    with pytest.raises(ValueError, match="a range can't be stepped with keep_undo"):
        step_range(opt, np.ones(3), count=False)  # one piece of several
    opt.rollback()
    np.testing.assert_array_equal(p, 0)  # what it was when the second optimizer began


def test_averages_swapped_in_between_do_no_harm():
    p = np.ones(CHUNK + 5, "float32")
    opt = ac.Adam(p, ema_decay=0.5, keep_undo=True)
    opt.step(np.ones_like(p))
    before = everything(opt)
    opt.step(np.ones_like(p))
    with opt.averaged_parameters():
        pass
    opt.rollback()
    assert_same(everything(opt), before)


def test_its_memory_is_counted():
    p = np.ones(1000, "float32")
    plain = ac.AdamW(p, ema_decay=0.5, state_dtype="uint8")
    opt = ac.AdamW(p, ema_decay=0.5, state_dtype="uint8", keep_undo=True)
    assert p.nbytes + plain.nbytes < opt.nbytes - plain.nbytes < p.nbytes + plain.nbytes + 64


def test_a_step_that_keeps_undo_allocates_nothing_that_lasts():
    import tracemalloc

    p = np.ones(300_000, "float32")
    opt = ac.AdamW(p, keep_undo=True, loss_scale="dynamic")
    g = np.ones_like(p)
    opt.step(g)
    tracemalloc.start()
    opt.step(g)
    opt.accumulate(g)  # the first sums: 1.2 MB
    opt.step()
    opt.accumulate(g)
    tracemalloc.reset_peak()
    opt.discard()
    low = tracemalloc.get_traced_memory()[0]
    opt.accumulate(g)
    opt.step()
    opt.rollback()
    peak = tracemalloc.get_traced_memory()[1] - low
    tracemalloc.stop()
    assert peak < 2000


def test_a_group_that_was_added_is_undone_with_the_others():
    p, q = np.ones(CHUNK + 7, "float32"), np.ones(2 * CHUNK + 3, "float32")
    opt = ac.AdamW(p, lr=0.1, ema_decay=0.5, state_dtype="uint8", loss_scale="dynamic", keep_undo=True, n_threads=3)
    opt.step(np.ones_like(p))
    nbytes = opt.nbytes
    opt.add_param_group({"params": [q], "copy_to": [np.empty_like(q)], "state_dtype": None})
    assert 0 <= opt.nbytes - nbytes - 32 * q.size < 64  # two moments, the average, and these, q and its copy kept
    before = everything(opt)
    with pytest.raises(ValueError, match="there is no step to undo"):
        opt.rollback()  # that step was of one group
    assert_same(everything(opt), before)
    for grads in ([np.ones_like(p), [np.ones_like(q)]], [None, [np.ones_like(q)]], [np.full_like(p, np.inf), [None]]):
        opt.step(grads)
        opt.rollback()
        assert_same(everything(opt), before)
    opt.step([np.full_like(p, np.inf), [None]])
    opt.param_groups[0]["lr"] = 0.2
    assert opt.loss_scale == opt.state_dict()["scaler"]["scale"] == 32768  # one scaler, that of both groups
    set_scaler(opt, scale=8.0)
    assert opt.loss_scale == 8


def test_a_group_that_is_refused_leaves_what_was_kept():
    p = np.ones(CHUNK + 7, "float32")
    opt = ac.AdamW(p, lr=0.1, loss_scale="dynamic", keep_undo=True)
    before = everything(opt)
    opt.step(np.ones_like(p))
    for spec in ({"params": p}, {"params": np.ones(3), "lr": -1.0}, {"params": np.ones(3), "copy_to": np.ones(4)}):
        with pytest.raises(ValueError, match=r"shares? memory|lr must be|shape"):
            opt.add_param_group(spec)
    opt.rollback()
    assert_same(everything(opt), before)


def test_a_step_before_a_load_is_not_undone():
    p = np.zeros(3)
    opt = ac.SGD(p, lr=1.0, keep_undo=True)
    saved = opt.state_dict()
    opt.step(np.ones(3))
    opt.load_state_dict(saved)
    with pytest.raises(ValueError, match="there is no step to undo"):
        opt.rollback()
    np.testing.assert_array_equal(p, -1)


def test_what_a_plateau_made_of_a_metric_is_undone_too():
    def make(**more):
        plateau = ac.schedules.plateau(0.5, factor=0.5, patience=0)
        return ac.AdamW([{"params": np.zeros(2)}, {"params": np.zeros(2), "lr": 1.0, "betas": (plateau, 0.9)}],
                        lr=plateau, **more)  # fmt: skip

    opt, straight = make(keep_undo=True), make()
    grads = [np.ones(2), np.ones(2)]
    for metric in (3.0, 4.0, None, 2.0, 5.0):
        before = opt.param_groups[0].schedules["lr"], opt.param_groups[1].schedules["betas"], opt.param_groups[0]["lr"]
        for wrong in (0.1, 99.0, None):
            opt.step([2 * g for g in grads], wrong)
            opt.rollback()
            assert before == (opt.param_groups[0].schedules["lr"], opt.param_groups[1].schedules["betas"],
                              opt.param_groups[0]["lr"])  # fmt: skip
        opt.step(grads, metric)
        straight.step(grads, metric)
        assert_same(everything(opt), everything(straight))
        assert opt.param_groups[0].schedules == straight.param_groups[0].schedules
    assert opt.param_groups[0]["lr"] == 0.125

    opt.step(grads, 9.0)
    opt.param_groups[0]["lr"] = 0.75  # options keep what was assigned meanwhile
    opt.rollback()
    assert opt.param_groups[0]["lr"] == 0.75
    assert not opt.param_groups[0].schedules
    assert opt.param_groups[1]["betas"] == (0.125, 0.9)
    opt.step(grads, 9.0)  # the metric went to this step
    opt.step([None, None])
    opt.rollback()  # which is of another
    assert opt.param_groups[1]["betas"] == (0.0625, 0.9)


def test_options_that_follow_a_schedule_go_back_with_the_count():
    seen = []
    opt = ac.SGD(np.zeros(2), lr=lambda t: 2.0**-t, keep_undo=True)
    for _ in range(3):
        opt.step(np.ones(2))
        seen.append(opt.param_groups[0]["params"].copy())
        opt.rollback()
        opt.step(np.ones(2))
        np.testing.assert_array_equal(opt.param_groups[0]["params"], seen[-1])
    assert [float(x[0]) for x in seen] == [-1, -1.5, -1.75]


def test_nothing_is_undone_after_a_load_that_broke_off():
    class Broken(np.ndarray):
        def __getitem__(self, key):
            raise OSError("no more")

    opt = ac.Adam(np.zeros(3), keep_undo=True)
    opt.step(np.ones(3))
    state = copy.deepcopy(opt.state_dict())
    state["groups"][0]["arrays"]["exp_avg_sq"] = state["groups"][0]["arrays"]["exp_avg_sq"].view(Broken)
    with pytest.raises(OSError, match="no more"):
        opt.load_state_dict(state)
    with pytest.raises(ValueError, match="there is no step to undo"):
        opt.rollback()


REASONS = {
    "nothing": (lambda opt: None, "none was made since this optimizer was constructed"),
    "twice": (lambda opt: (opt.step(np.ones((4, 2))), opt.rollback()), "the last one is undone already"),
    "a load": (lambda opt: (opt.step(np.ones((4, 2))), opt.load_state_dict(opt.state_dict())), "a load came after"),
    "rebind": (lambda opt: (opt.step(np.ones((4, 2))), opt.rebind(np.ones((4, 2)))), "other arrays took the place"),
    "a group": (
        lambda opt: (opt.step(np.ones((4, 2))), opt.add_param_group({"params": np.ones(2)})),
        "a group was added",
    ),
    "rows": (
        lambda opt: (opt.step(ac.Rows(np.array([1]), np.ones((1, 2)))), opt.catch_up()),
        "rows that had missed steps were brought up to date",
    ),
    "rebind before": (lambda opt: opt.rebind(np.ones((4, 2))), "none was made since this optimizer was constructed"),
    "and more": (
        lambda opt: (opt.step(np.ones((4, 2))), opt.rollback(), opt.rebind(np.ones((4, 2)))),
        "the last one is undone already",
    ),
}


@pytest.mark.parametrize("why", REASONS)
def test_the_refusal_says_why_there_is_nothing_to_undo(why):
    opt = ac.SGD(np.ones((4, 2)), lr=0.1, keep_undo=True, rows="exact")
    call, message = REASONS[why]
    call(opt)
    with pytest.raises(ValueError, match=f"there is no step to undo: {message}"):
        opt.rollback()

"""Sums of micro-batches, the dynamic loss scale, and how they meet what else a step does."""

import numpy as np
import pytest
from cases import IDS, PAIRS
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CHUNK, assert_same_bits, build, gradients, held, race, set_scaler, spec, split
from test_formats import Composition, allocate, every_format, every_rule, shared
from test_stages import DTYPES, norm, to_bfloat16

import adaptive_c as ac

SIZE = 2 * CHUNK + 333
CUTS = [7, 5000, 5001, 9000 - CHUNK]


def total(micro):
    """The specification of the sum: in order, in the type that the rule computes in."""
    s = micro[0].copy()
    for g in micro[1:]:
        s = s + g
    return s


# --- what the step takes -----------------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("calls", [1, 3])
@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
def test_a_step_takes_the_mean_with_the_bits_of_the_composition_by_hand(name, options, calls, dtype):
    rng = np.random.default_rng(0)
    scale, clip, limit = 8.0, 2.0, 0.3
    p = rng.normal(size=SIZE).astype(dtype)
    want, state = p.copy(), {}
    parts = split(p, CUTS)
    opt = build(name, parts, options, loss_scale=scale, max_grad_norm=clip, max_grad_value=limit, zero_grad=True,
                on_nonfinite="raise", n_threads=3)  # fmt: skip
    for t in range(1, 4):
        micro = list(gradients(rng, SIZE, dtype, calls))
        for n, g in enumerate(micro, 1):
            grads = split(g, CUTS)
            opt.accumulate(grads)
            assert opt.pending == n
            assert not any(x.any() for x in grads)  # zero_grad, after the call that read them
        opt.step()
        assert opt.pending == 0
        s = total(micro)
        assert opt.grad_norm == norm([s]) / (scale * calls)
        coefficient = min(clip / (opt.grad_norm + 1e-6), 1.0)
        k = (-1 if options.get("maximize") else 1) * coefficient / (scale * calls)
        used = np.clip(np.dtype(dtype).type(k) * s, -limit, limit).astype(dtype)
        rule = {**options, "maximize": False} if "maximize" in options else options
        want = spec(name)(want, used, state, t, **rule)
        assert_same_bits(np.concatenate(parts), want, f"p, t {t}")
    assert opt.t == 3


@every_format
@every_rule
def test_narrow_parameters_and_state(name, options, formats):
    """Under stochastic rounding too, gradients as narrow as the parameters; their sums are float32."""
    rng = np.random.default_rng(1)
    p, kind = allocate(rng, CHUNK + 333, formats)
    want = Composition(name, options, formats, p, seed=3)
    parts = split(p, [5, 250, 260, 4000])
    opt = build(name, parts, options, seed=3, n_threads=2, **shared(formats))
    for g in gradients(rng, 3 * p.size, "float32", 3):
        micro, wide = [], []
        for x in np.split(g, 3):
            x = np.clip(x, -100, 100)
            stored = to_bfloat16(x) if kind == "bfloat16" else x.astype(kind)
            micro.append(stored)
            wide.append((stored.astype("uint32") << np.uint32(16)).view("float32") if kind == "bfloat16" else
                        stored.astype("float32"))  # fmt: skip
            opt.accumulate(split(stored, [5, 250, 260, 4000]))
        opt.step()
        want.step(total(wide) * np.float32(1 / 3))
        want.check(opt, parts)


def test_a_nan_among_sums_of_bfloat16_and_float32_stays_one():
    """Rounding looks for no NaN where all that comes in is bfloat16.  Sums of both are not."""
    p = np.zeros(600, "uint16")
    opt = ac.SGD(p, momentum=0.5, rounding="stochastic", state_dtype="bfloat16", uint16_as="bfloat16")
    opt.accumulate(np.full(600, 0x7FFFFFFF, "uint32").view("float32"))
    opt.accumulate(np.zeros(600, "uint16"))
    opt.step()
    assert ((p & 0x7FFF) > 0x7F80).all()


@given(
    cuts=st.lists(st.integers(0, 20 * CHUNK + 123), max_size=8),
    kinds=st.lists(st.sampled_from(["float32", "float16", "bfloat16", None]), min_size=1, max_size=5),
    n_threads=st.integers(1, 7),
    zero_grad=st.booleans(),
    flush=st.booleans(),
)
@settings(max_examples=40)
def test_sums_have_the_same_bits_for_threads_and_cuts(cuts, kinds, n_threads, zero_grad, flush):
    size = 20 * CHUNK + 123
    rng = np.random.default_rng(2)
    opt = ac.AdamW([np.ones_like(x) for x in split(np.ones(size, "float32"), cuts)], lr=0.1, n_threads=n_threads,
                   zero_grad=zero_grad, flush_denormals=flush, uint16_as="bfloat16")  # fmt: skip
    s = None
    for kind in kinds:
        if kind is None:
            opt.accumulate([None] * (len(cuts) + 1))
            continue
        x = rng.normal(size=size).astype("float32")
        g = to_bfloat16(x) if kind == "bfloat16" else x.astype(kind)
        wide = (g.astype("uint32") << np.uint32(16)).view("float32") if kind == "bfloat16" else g.astype("float32")
        s = wide if s is None else s + wide
        grads = split(g, cuts)
        opt.accumulate(grads)
        for part, before in zip(grads, split(g, cuts), strict=True):
            assert_same_bits(part, np.zeros_like(before) if zero_grad else before)
    assert opt.pending == len(kinds)
    if s is not None:
        assert_same_bits(held(opt, "sums"), s)
    twin = ac.AdamW(np.ones(size, "float32"), lr=0.1)
    if s is not None:
        twin.step(s * np.float32(1 / len(kinds)) if len(kinds) > 1 else s)
    opt.step()
    assert opt.t == (s is not None)
    assert_same_bits(np.concatenate(opt.param_groups[0]["params"]), twin.param_groups[0]["params"])


def test_none_adds_zero_and_an_array_that_only_had_none_is_left_alone():
    p = [np.zeros(3), np.zeros(2), np.zeros(1)]
    opt = ac.SGD(p, lr=1.0, momentum=0.5)
    opt.accumulate([np.full(3, 4.0), None, None])
    opt.accumulate([None, np.full(2, 8.0), None])
    opt.accumulate([np.full(3, 4.0), None, None])
    opt.accumulate([None, None, None])  # counted: the mean is over all calls
    opt.step()
    np.testing.assert_array_equal(p[0], -2)
    np.testing.assert_array_equal(p[1], -2)
    np.testing.assert_array_equal(p[2], 0)
    assert [int(n) for n in opt.state["step"]] == [1, 1, 0]
    opt.accumulate([None, None, np.ones(1)])  # the sums of the last step are forgotten
    opt.step()
    np.testing.assert_array_equal(p[0], -2)
    np.testing.assert_array_equal(p[2], -1)
    opt.accumulate([None, None, None])
    opt.step()
    assert opt.t == 2  # not a step
    assert opt.pending == 0


@pytest.mark.parametrize("container", ["array", "list", "dict", "groups"])
def test_structures(container):
    w, b = np.zeros((2, 3), "float32"), np.zeros(2)
    params, grads = {
        "array": (w, lambda x: np.full_like(w, x)),
        "list": ([w], lambda x: [np.full_like(w, x)]),
        "dict": ({"w": w}, lambda x: {"w": np.full_like(w, x)}),
        "groups": ([{"params": {"w": w}}, {"params": b, "maximize": True}],
                   lambda x: [{"w": np.full_like(w, x)}, np.full_like(b, x)]),
    }[container]  # fmt: skip
    opt = ac.SGD(params, lr=1.0)
    before = opt.nbytes
    opt.accumulate(grads(1.0))
    assert opt.nbytes == before + w.nbytes + (b.nbytes if container == "groups" else 0)
    if container == "groups":
        assert [held(opt, "sums", group).dtype for group in (0, 1)] == ["float32", "float64"]
    opt.accumulate(grads(2.0))
    opt.step()
    np.testing.assert_array_equal(w, -1.5)
    np.testing.assert_array_equal(b, 1.5 if container == "groups" else 0)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_narrow_gradients_neither_overflow_nor_stagnate(kind):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = ml_dtypes.bfloat16 if kind == "bfloat16" else "float16"
    p = np.zeros(3, "float32")
    opt = ac.SGD(p, lr=1.0)
    micro = np.array([60000 if kind == "float16" else 3e4, 1.0, 2.0**-14], "float32").astype(dtype)
    calls = 3000  # in float16 the first would be infinite, in either the second stop at 2048 or 256
    for _ in range(calls):
        opt.accumulate(micro)
    opt.step()
    np.testing.assert_allclose(p, -micro.astype("float64"), rtol=1e-6)


def test_zero_sized_arrays_and_small_groups():
    p = [np.zeros((0, 3), "float32"), np.ones(2, "float32"), np.zeros(0, "float32")]
    opt = ac.Adam(p, keep_undo=True)
    for _ in range(2):
        opt.accumulate([np.zeros_like(x) for x in p])
        opt.accumulate([np.ones_like(x) for x in p])
        opt.step()
    assert opt.t == 2
    empty = ac.Adam(np.zeros(0), keep_undo=True)
    empty.accumulate(np.zeros(0))
    empty.step()
    empty.rollback()
    assert empty.t == 0


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_a_step_with_the_wrong_source_is_refused():
    p = np.ones(3, "float32")
    opt = ac.SGD(p, lr=1.0)
    with pytest.raises(ValueError, match=r"step\(\) without gradients takes .*; pass grads, or call accumulate"):
        opt.step()
    opt.accumulate(np.ones(3, "float32"))
    for grads in (np.ones(3, "float32"), None):
        with pytest.raises(
            ValueError, match=r"1 accumulated gradient is pending, .*step\(\) takes .*discard\(\) drops"
        ):
            opt.step(grads)
    assert opt.pending == 1
    assert opt.t == 0
    assert (p == 1).all()
    opt.discard()
    opt.discard()  # nothing to drop is fine
    with pytest.raises(ValueError, match="there are none"):
        opt.step()
    opt.step(np.ones(3, "float32"))
    assert (p == 0).all()


@pytest.mark.parametrize("pending", [0, 2])
def test_a_bad_gradient_adds_nothing(pending):
    p = {"a": np.zeros(SIZE, "float32"), "b": np.zeros((2, 3), "float32")}
    opt = ac.SGD(p, zero_grad=True)
    good = {name: np.ones_like(x) for name, x in p.items()}
    for _ in range(pending):
        opt.accumulate({name: x.copy() for name, x in good.items()})
    before = held(opt, "sums").copy() if pending else opt.nbytes
    read_only = np.ones((2, 3), "float32")
    read_only.flags.writeable = False
    for bad, message in [(np.ones((2, 3)), r"grads\['b'\] has dtype float64"), (np.ones(6, "float32"), r"grads\['b'\] has shape"),
                         (p["b"], "shares memory with"), (read_only, "can't be zeroed"), (good["a"][:6].reshape(2, 3), "share memory")]:  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            opt.accumulate({"a": good["a"], "b": bad})
        assert good["a"].all()
    with pytest.raises(ValueError, match="a dict with the keys 'a', 'b'"):
        opt.accumulate({"a": good["a"]})
    assert opt.pending == pending
    if pending:
        assert_same_bits(held(opt, "sums"), before)
        with pytest.raises(ValueError, match="shares memory with this optimizer's state"):
            opt.accumulate({"a": held(opt, "sums")[:SIZE], "b": good["b"]})
    else:
        assert opt.nbytes == before  # no sums were allocated


def test_another_thread_is_refused():
    p = np.zeros(8_000_000, "float32")
    g = np.ones_like(p)
    opt = ac.SGD(p, lr=1.0)
    refused = race(lambda: opt.accumulate(g), threads=2, times=20)
    assert (held(opt, "sums") == 40 - len(refused)).all()
    assert opt.pending == 40 - len(refused)
    assert all("this optimizer is in use" in message for message in refused)


# --- non-finite values -------------------------------------------------------------------------------------------------


def test_a_skipped_step_drops_the_sums():
    p = np.ones(SIZE, "float32")
    opt = ac.Adam(p, on_nonfinite="skip")
    g = np.ones_like(p)
    opt.accumulate(g)
    g[-1] = np.inf
    opt.accumulate(g)
    opt.step()
    assert (opt.skipped_steps, opt.pending, opt.t) == (1, 0, 0)
    assert (p == 1).all()
    g[-1] = 1
    opt.accumulate(g)
    opt.step()
    assert opt.t == 1
    assert np.isfinite(p).all()


def test_a_refused_step_leaves_the_sums_and_discard_drops_them():
    p = [np.ones(SIZE, "float32"), np.ones((2, 3), "float32")]
    opt = ac.Adam(p, on_nonfinite="raise")
    grads = [np.ones_like(x) for x in p]
    grads[1][1, 2] = np.nan
    opt.accumulate(grads)
    opt.accumulate(grads)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"the sum of grads\[1\] is nan at index \(1, 2\); nothing was changed"):
            opt.step()
        assert (opt.pending, opt.t, opt.skipped_steps) == (2, 0, 0)
        assert (held(opt, "sums")[:SIZE] == 2).all()
    opt.on_nonfinite = "ignore"
    opt.discard()
    opt.step(grads)
    assert np.isnan(p[1][1, 2])


def test_the_mean_of_large_gradients():
    """A sum may be larger than its mean: what overflows is the sum's square only where the rule sees it."""
    p = np.zeros(3, "float32")
    opt = ac.Adam(p, on_nonfinite="raise")
    for _ in range(4):
        opt.accumulate(np.full(3, 1e19, "float32"))  # (4e19)^2 is infinite, (1e19)^2 is not
    opt.step()
    assert opt.t == 1
    opt = ac.SGD(np.zeros(3, "float32"), loss_scale=1e44)
    for _ in range(100):
        opt.accumulate(np.ones(3, "float32"))
    with pytest.raises(
        ValueError, match=r"loss_scale=1e\+44, times 100 calls of accumulate\(\), makes gradients times"
    ):
        opt.step()
    assert opt.pending == 100
    wide = ac.SGD(np.zeros(3), loss_scale=1e307)
    for _ in range(100):
        wide.accumulate(np.ones(3))
    with pytest.raises(ValueError, match=r"gradients times 0.0, which float64 can't hold"):  # 100e307 is infinite
        wide.step()


def test_the_scale_of_one_step_of_sums():
    p = np.zeros(2)
    opt = ac.SGD(p, lr=1.0, loss_scale=2.0)
    for scale, want in ((None, -4.0), (4.0, -6.0)):
        opt.accumulate(np.full(2, 4.0))
        opt.accumulate(np.full(2, 12.0))
        opt.step(loss_scale=scale)
        np.testing.assert_array_equal(p, want)


def test_accumulating_inside_averaged_parameters_touches_none_of_them():
    p = np.zeros(3)
    opt = ac.SGD(p, lr=1.0, ema_decay=0.5)
    opt.step(np.ones(3))
    with opt.averaged_parameters():
        opt.accumulate(np.ones(3))
        with pytest.raises(RuntimeError, match="not inside averaged_parameters"):
            opt.step()
    assert opt.pending == 1
    opt.step()
    np.testing.assert_array_equal(p, -2)


# --- the dynamic loss scale --------------------------------------------------------------------------------------------


@pytest.mark.later("torch")
@pytest.mark.parametrize(("start", "n_bad"), [(None, 12), (2.0**124, 2), (2.0**-120, 5)])
def test_the_dynamic_scale_is_pytorchs_step_for_step(start, n_bad):
    import torch

    rng = np.random.default_rng(0)
    bad = np.zeros(6 * 2000 + 500, bool)
    bad[rng.integers(2, 3000, n_bad - 2)] = bad[:2] = True
    bad[6100] = bad[6101] = True
    q = torch.zeros(2, requires_grad=True)
    sgd = torch.optim.SGD([q], lr=0.001)
    scaler = torch.amp.GradScaler("cpu") if start is None else torch.amp.GradScaler("cpu", init_scale=start)
    scaler.scale(torch.zeros(1))
    p = np.zeros(2, "float32")
    opt = ac.SGD(p, lr=0.001, loss_scale="dynamic", n_threads=1)
    if start is not None:
        opt.loss_scale = start
    grown = 0
    for i, overflow in enumerate(bad):
        assert opt.loss_scale == scaler.get_scale(), i
        growth_tracker = scaler.state_dict()["_growth_tracker"]
        assert opt.state_dict()["scaler"] == {"scale": opt.loss_scale, "growth_tracker": growth_tracker}, i
        g = np.array([np.inf if overflow else 1.0, 2.0], "float32") * np.float32(opt.loss_scale)
        before = opt.loss_scale
        opt.step(g)
        grown += opt.loss_scale > before
        q.grad = torch.from_numpy(g.copy())
        scaler.step(sgd)
        scaler.update()
    assert opt.skipped_steps == bad.sum() > 3
    assert grown >= 4
    assert_same_bits(p, q.detach().numpy())


def test_the_dynamic_scale_stays_where_it_and_its_reciprocal_are_normal_numbers():
    p = np.zeros(2, "float32")
    opt = ac.SGD(p, lr=1.0, loss_scale="dynamic")
    for _ in range(400):
        opt.step(np.array([np.nan, 1], "float32"))
    assert opt.loss_scale == 2.0**-126
    assert opt.skipped_steps == 400
    opt.step(np.full(2, 2.0**-126, "float32"))
    np.testing.assert_array_equal(p, -1)
    set_scaler(opt, scale=2.0**126, growth_tracker=1998)
    for _ in range(2):
        opt.step(np.full(2, 2.0**126, "float32"))
    assert opt.state_dict()["scaler"] == {"scale": 2.0**126, "growth_tracker": 0}
    np.testing.assert_array_equal(p, -3)


def test_a_dynamic_scale_that_leaves_no_normal_factor_backs_off():
    """1 / (scale * calls), times the clip coefficient, may be too small where the scale alone is not."""
    p = np.zeros(2, "float32")
    opt = ac.SGD(p, lr=1.0, loss_scale="dynamic", flush_denormals=True)
    opt.loss_scale = 2.0**126
    tried = 0
    while opt.t == 0:
        tried += 1
        for _ in range(4):
            opt.accumulate(np.full(2, opt.loss_scale, "float32"))
        opt.step()
        assert tried < 9
    assert (opt.skipped_steps, opt.loss_scale, opt.t) == (2, 2.0**124, 1)
    np.testing.assert_array_equal(p, -1)
    wide = ac.SGD(np.zeros(2), lr=1.0, loss_scale="dynamic")  # float64 has room
    wide.loss_scale = 2.0**126
    wide.accumulate(np.ones(2))
    wide.accumulate(np.ones(2))
    wide.step()
    assert wide.skipped_steps == 0


def test_the_dynamic_scale_divides_the_mean_and_changes_at_steps_only():
    p = np.zeros(3, "float32")
    opt = ac.SGD(p, lr=1.0, loss_scale="dynamic")
    for g in (1.0, 2.0):
        opt.accumulate(np.full(3, g * opt.loss_scale, "float32"))
    opt.step()
    np.testing.assert_array_equal(p, -1.5)
    opt.accumulate(np.full(3, np.inf, "float32"))
    assert opt.loss_scale == 65536
    opt.step()
    assert opt.loss_scale == 32768
    assert opt.state_dict()["scaler"]["growth_tracker"] == 0
    opt.step(None)  # not a step
    assert opt.state_dict()["scaler"] == {"scale": 32768.0, "growth_tracker": 0}
    np.testing.assert_array_equal(p, -1.5)


def test_a_step_that_is_refused_leaves_the_dynamic_scale():
    opt = ac.SGD(np.zeros(3, "float32"), loss_scale="dynamic")
    with pytest.raises(ValueError, match="shape"):
        opt.step(np.ones(4, "float32"))
    with pytest.raises(ValueError, match=r"loss_scale=8.0 is refused in step: this optimizer's is 'dynamic'"):
        opt.step(np.ones(3, "float32"), loss_scale=8.0)
    assert opt.state_dict()["scaler"] == {"scale": 65536.0, "growth_tracker": 0}
    assert opt.t == 0


def test_the_options_of_the_dynamic_scale():
    p = np.zeros(3, "float32")
    for policy in ("raise", "ignore"):
        with pytest.raises(ValueError, match=f"on_nonfinite='{policy}' is refused with loss_scale='dynamic'"):
            ac.SGD(p, loss_scale="dynamic", on_nonfinite=policy)
    opt = ac.SGD(p, loss_scale="dynamic", on_nonfinite="skip")
    with pytest.raises(ValueError, match="on_nonfinite='raise' is refused with loss_scale='dynamic'"):
        opt.on_nonfinite = "raise"
    assert opt.on_nonfinite == "skip"
    opt.loss_scale = 1024
    opt.max_grad_norm = 1.0  # assigning another option leaves the scale
    assert opt.loss_scale == 1024.0
    opt.step(np.full(3, np.inf, "float32"))
    assert opt.loss_scale == 512.0  # it goes on from what was assigned
    opt.loss_scale = 0.1
    assert opt.loss_scale == float(np.float32(0.1))
    for scale in (0, -1, 2.0**127, 2.0**-127, np.nan):
        with pytest.raises(ValueError, match=r"loss_scale must be in \["):
            opt.loss_scale = scale
    with pytest.raises(ValueError, match="growth_tracker must be in"):
        set_scaler(opt, growth_tracker=2000)
    with pytest.raises(ValueError, match=r"loss_scale is assigned a number, got 'dynamic'; .* in the constructor"):
        opt.loss_scale = "dynamic"
    with pytest.raises(ValueError, match="loss_scale must be 'dynamic', got 'auto'; or a number"):
        ac.SGD(p, loss_scale="auto")
    fixed = ac.SGD(p, loss_scale=4.0)
    assert fixed.loss_scale == 4.0
    assert fixed.on_nonfinite == "ignore"
    assert fixed.state_dict()["scaler"] is None
    fixed.loss_scale = 8
    assert fixed.loss_scale == 8.0


# --- groups that come later, and schedules -----------------------------------------------------------------------------


def test_sums_with_a_group_that_was_added():
    p, q = np.zeros(CHUNK + 7, "float32"), np.zeros(5)
    opt = ac.SGD(p, lr=1.0, loss_scale="dynamic", n_threads=2)
    opt.accumulate(np.full_like(p, 65536))
    for pending in ("1 accumulated gradient is", "2 accumulated gradients are"):
        with pytest.raises(ValueError, match=rf"{pending} pending, which the new group .*; "
                                             r"step\(\) takes their mean, discard\(\) drops them"):  # fmt: skip
            opt.add_param_group({"params": [q]})
        assert len(opt.param_groups) == 1
        opt.accumulate(np.full_like(p, 65536))
    opt.step()
    assert (p == -1).all()
    opt.accumulate(np.full_like(p, 65536))
    sums = held(opt, "sums")
    opt.discard()
    opt.add_param_group({"params": [q], "lr": 0.5})
    assert opt.pending == 0
    for k in (1, 3):
        opt.accumulate([np.full_like(p, k * 65536), [np.full(5, k * 65536.0)]])
    assert np.shares_memory(held(opt, "sums"), sums)
    assert opt.pending == 2
    opt.step()
    assert (p == -3).all()
    np.testing.assert_array_equal(q, -1)
    opt.accumulate([None, [np.full(5, 2 * 65536.0)]])
    opt.step()
    assert (p == -3).all()
    np.testing.assert_array_equal(q, -2)


def test_a_step_from_sums_follows_schedules_and_takes_a_metric():
    p = np.zeros(2)
    opt = ac.SGD([{"params": p}], lr=ac.schedules.plateau(1.0, factor=0.5, patience=0))
    for metric, want in ((1.0, -2), (2.0, -4), (None, -5), (3.0, -6), (4.0, -6.5)):
        for g in (1.0, 3.0):
            opt.accumulate([np.full(2, g)])
        opt.step(metric=metric)
        np.testing.assert_array_equal(p, want)
    with pytest.raises(ValueError, match="there are none"):
        opt.step(metric=5.0)
    assert opt.param_groups[0]["lr"] == 0.125
    opt.accumulate([np.ones(2)])
    with pytest.raises(ValueError, match="1 accumulated gradient is pending"):
        opt.step([np.ones(2)], 5.0)
    opt.step(loss_scale=8.0, metric=0.5)
    np.testing.assert_array_equal(p, -6.5 - 0.125 / 8)


def test_the_first_step_from_sums_has_the_first_numbers():
    p = np.zeros(2)
    opt = ac.SGD(p, lr=ac.schedules.multistep(1.0, [1], 0.5))
    for want in (-1, -1.5):
        opt.accumulate(np.ones(2))
        opt.step()
        np.testing.assert_array_equal(p, want)


def test_a_group_of_empty_arrays_has_sums_like_any_other(tmp_path):
    def build():
        return ac.Adam([{"params": np.ones(3)}, {"params": [np.ones(0), np.ones((2, 0))]}])

    opt, grads = build(), [np.ones(3), [np.ones(0), np.ones((2, 0))]]
    opt.accumulate(grads)
    opt.save(tmp_path / "a")
    for again in (build(), build()):
        again.load(tmp_path / "a")
        assert again.pending == 1
        again.step()
        assert [int(x) for x in (again.state["step"][0], *again.state["step"][1])] == [1, 1, 1]
    opt.step()
    assert [int(x) for x in (opt.state["step"][0], *opt.state["step"][1])] == [1, 1, 1]

"""The stages around the rule: everything but number formats of parameters, gradients and state."""

import functools

import numpy as np
import pytest
from cases import IDS, PAIRS
from support import CHUNK, assert_same_bits, build, gradients, spec, step_range

import adaptive_c as ac

DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


def norm(grads):
    """The specification of the norm: 16 lanes of each block of CHUNK elements, then blocks, in double, in index order."""
    g = np.concatenate([x.ravel() for x in grads]).astype("float64")
    total = 0.0
    for start in range(0, g.size, CHUNK):
        block = np.zeros(CHUNK)
        block[: len(g[start : start + CHUNK])] = g[start : start + CHUNK] ** 2
        lanes = np.zeros(16)
        for row in block.reshape(-1, 16):
            lanes += row
        part = 0.0
        for lane in lanes:
            part += lane
        total += part
    return float(np.sqrt(total))


def to_bfloat16(x):
    """Nearest even, on bits."""
    u = np.asarray(x, "float32").view("uint32").astype("uint64")
    r = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16).astype("uint16")
    return np.where(np.isnan(x), ((u >> 16) | 0x40).astype("uint16"), r)


@functools.cache
def numbers(dtype):
    """Parameters, and the gradient of each of four steps with its norm."""
    rng, size = np.random.default_rng(0), 2 * CHUNK + 333
    p = rng.normal(size=size).astype(dtype)
    return p, [(g, norm([g])) for g in gradients(rng, size, dtype, 4)]


@DTYPES
@pytest.mark.parametrize("cuts", [[], [1], [7, 5000, 5001, 9000]], ids=["one array", "cut", "cut often"])
@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
def test_everything_switched_on_equals_the_composition_by_hand(name, options, dtype, cuts):
    scale, limit, clip, d = 8.0, 0.3, 2.0, 0.9
    lo, hi = -1.0 + 1e-9, 1.1
    p, steps = numbers(dtype)
    want, state, e = p.copy(), {}, p.copy()
    parts = [x.copy() for x in np.split(p, cuts)]
    copies = [np.empty(x.shape, "uint16" if dtype == "float32" else "float32") for x in parts]
    opt = build(name, parts, options, loss_scale=scale, max_grad_norm=clip, max_grad_value=limit, ema_decay=d,
                copy_to=copies, uint16_as="bfloat16", zero_grad=True, bounds=(lo, hi), on_nonfinite="raise",
                n_threads=3)  # fmt: skip
    kind = np.dtype(dtype).type
    lo_in = np.nextafter(kind(lo), kind(9)) if float(kind(lo)) < lo else kind(lo)
    hi_in = np.nextafter(kind(hi), kind(-9)) if float(kind(hi)) > hi else kind(hi)
    for t, (g, length) in enumerate(steps, 1):
        grads = [x.copy() for x in np.split(g, cuts)]
        opt.step(grads)
        assert not any(x.any() for x in grads)
        total = length / scale
        coefficient = min(clip / (total + 1e-6), 1.0)
        k = (-1 if options.get("maximize") else 1) * coefficient / scale
        used = np.clip(g * k, -limit, limit) if k != 1 else g
        want = spec(name)(
            want, used.astype(dtype), state, t, **{**options, **({"maximize": False} if "maximize" in options else {})}
        )
        want = np.minimum(np.maximum(want, lo_in), hi_in)
        e = e - (1 - d) * (e - want)
        assert opt.grad_norm == total
        assert_same_bits(np.concatenate(parts), want, f"p, t {t}")
        assert_same_bits(np.concatenate(opt.ema), e, f"ema, t {t}")
        assert_same_bits(np.concatenate(copies), to_bfloat16(want) if dtype == "float32" else want.astype("float32"))


@DTYPES
def test_the_norm_has_the_same_bits_for_threads_and_cuts(dtype):
    rng = np.random.default_rng(1)
    g = gradients(rng, 9 * CHUNK + 77, dtype, 1)[0]
    want = norm([g])
    for cuts in ([], [1, 2, 3], [CHUNK - 1, CHUNK + 15, 5 * CHUNK + 1]):
        for n in (1, 2, 7):
            parts = [x.copy() for x in np.split(g, cuts)]
            opt = ac.SGD([np.zeros_like(x) for x in parts], max_grad_norm=1.0, n_threads=n)
            assert np.isnan(opt.grad_norm)
            opt.step(parts)
            assert opt.grad_norm == want
    assert want == pytest.approx(np.linalg.norm(g.astype("float64")), rel=1e-12)


def test_the_norm_is_over_all_groups_and_skips_arrays_without_a_gradient():
    opt = ac.SGD([{"params": np.zeros(2)}, {"params": [np.zeros(2, "float32"), np.zeros(1, "float32")], "maximize": True}],
                 lr=1.0, max_grad_norm=1.0)  # fmt: skip
    opt.step([np.array([3.0, 0.0]), [np.array([0.0, 4.0], "float32"), None]])
    assert opt.grad_norm == 5.0
    a, (b, _) = (group["params"] for group in opt.param_groups)
    np.testing.assert_allclose(a, [-0.6, 0], rtol=1e-6)
    np.testing.assert_allclose(b, [0, 0.8], rtol=1e-6)


@pytest.mark.later("torch")
def test_clipping_is_pytorchs():
    import torch

    rng = np.random.default_rng(2)
    for size in (0.01, 100.0):
        p, g = rng.normal(size=50), rng.normal(size=50) * size
        q = torch.tensor(p, requires_grad=True)
        q.grad = torch.tensor(g)
        total = torch.nn.utils.clip_grad_norm_([q], 2.0)
        torch.optim.SGD([q], lr=0.1).step()
        opt = ac.SGD(p, lr=0.1, max_grad_norm=2.0)
        opt.step(g)
        np.testing.assert_allclose(p, q.detach().numpy(), rtol=1e-12)
        assert opt.grad_norm == pytest.approx(float(total), rel=1e-12)


# --- non-finite values -----------------------------------------------------------------------------------------------

BAD = [("nan", np.nan), ("inf", np.inf), ("-inf", -np.inf), ("square overflows", 1e20)]


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("policy", ["skip", "raise"])
@pytest.mark.parametrize("bad", [b[1] for b in BAD], ids=[b[0] for b in BAD])
def test_a_bad_gradient_changes_nothing(bad, policy, clip):
    p = [np.ones(3 * CHUNK, "float32"), np.ones((2, 3), "float32")]
    copies = [np.zeros_like(x) for x in p]
    opt = ac.AdamW(p, on_nonfinite=policy, max_grad_norm=clip, ema_decay=0.5, copy_to=copies)
    grads = [np.ones_like(x) for x in p]
    opt.step(grads)
    before = [x.copy() for x in (*p, *opt.ema, *copies, *opt.state["exp_avg"], *opt.state["exp_avg_sq"])]
    grads[1][1, 2] = bad
    if clip and bad == 1e20:  # the clipped gradient is small: nothing overflows
        opt.step(grads)
        assert np.isfinite(opt.state["exp_avg_sq"][1]).all()
        return
    if policy == "skip":
        opt.step(grads)
        assert opt.skipped_steps == 1
    else:
        with pytest.raises(ValueError, match=r"grads\[1\] is .* at index \(1, 2\).*; nothing was changed"):
            opt.step(grads)
        assert opt.skipped_steps == 0
    after = [*p, *opt.ema, *copies, *opt.state["exp_avg"], *opt.state["exp_avg_sq"]]
    for a, b in zip(after, before, strict=True):
        assert_same_bits(a, b)
    assert opt.t == 1
    assert [int(n) for n in opt.state["step"]] == [1, 1]
    grads[1][1, 2] = 1
    opt.step(grads)
    assert opt.t == 2


def test_policies_in_detail():
    p = np.ones(3)
    opt = ac.SGD(p, lr=0.0)
    opt.step(np.array([np.nan, 1, 1]))  # ignored by default
    assert np.isnan(p[0])
    p = np.ones(3)
    ac.SGD(p, max_grad_norm=1.0).step(
        np.array([np.nan, 1, 1])
    )  # the norm is NaN, too, and as in PyTorch so is all else
    assert np.isnan(p).all()
    q = np.ones(3, "float32")
    opt = ac.SGD(q, lr=1e-20, on_nonfinite="raise")
    opt.step(np.full(3, 1e20, "float32"))  # this rule squares nothing
    with pytest.raises(ValueError, match=r"is 1.*e.*whose square overflows"):
        opt.step(np.full(3, 1e30, "float32"), loss_scale=1e-10)  # infinite once unscaled
    opt = ac.Adam(q, on_nonfinite="raise", max_grad_value=10.0)
    opt.step(np.full(3, 1e30, "float32"))  # clamped, so nothing overflows
    assert np.isfinite(opt.state["exp_avg_sq"]).all()
    opt = ac.Adam(np.ones(3), on_nonfinite="skip", zero_grad=True)
    g = np.array([1, np.inf, 1])
    opt.step(g)
    assert not g.any()  # or what is accumulated into it would stay infinite
    assert opt.skipped_steps == 1
    opt.on_nonfinite = "ignore"
    assert opt.on_nonfinite == "ignore"


def test_the_scale_of_one_step():
    p = np.zeros(2)
    opt = ac.SGD(p, lr=1.0, loss_scale=2.0)
    g = np.array([4.0, 8.0])
    opt.step(g)
    opt.step(g, loss_scale=4.0)
    np.testing.assert_array_equal(p, [-3, -6])
    np.testing.assert_array_equal(g, [4, 8])
    for bad in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"loss_scale must be in \(0, inf\)"):
            opt.step(g, loss_scale=bad)
        with pytest.raises(ValueError, match=r"loss_scale must be in \(0, inf\)"):
            ac.SGD(p, loss_scale=bad)
    np.testing.assert_array_equal(p, [-3, -6])


# --- average, copies, bounds, zero -----------------------------------------------------------------------------------


def test_averaged_parameters():
    p = {"w": np.ones((70_000, 2), "float32"), "b": np.zeros(3, "float32")}
    opt = ac.SGD(p, lr=1.0, ema_decay=0.5)
    opt.step({"w": np.ones_like(p["w"]), "b": None})
    np.testing.assert_array_equal(opt.ema["w"], 0.5)
    with opt.averaged_parameters():
        assert (p["w"] == 0.5).all()
        with pytest.raises(RuntimeError, match="not inside averaged_parameters"):
            opt.step({"w": np.ones_like(p["w"]), "b": None})
        with pytest.raises(RuntimeError, match="not inside averaged_parameters"), opt.averaged_parameters():
            pass
    assert (p["w"] == 0).all()
    with pytest.raises(ZeroDivisionError), opt.averaged_parameters():
        raise ZeroDivisionError
    assert (p["w"] == 0).all()
    assert (opt.ema["w"] == 0.5).all()
    opt.step({"w": np.ones_like(p["w"]), "b": None})
    with pytest.raises(ValueError, match="there is no average"), ac.SGD(np.ones(2)).averaged_parameters():
        pass
    assert ac.SGD(np.ones(2)).ema is None


def test_the_average_of_some_groups_and_its_decay_changed():
    a, b = np.ones(3), np.ones(2)
    opt = ac.SGD([{"params": a, "ema_decay": 0.5}, {"params": b}], lr=1.0)
    opt.step([np.ones(3), np.ones(2)])
    assert opt.ema[1] is None
    np.testing.assert_array_equal(opt.ema[0], 0.5)
    opt.param_groups[0]["ema_decay"] = 0.0
    opt.step([np.ones(3), np.ones(2)])
    np.testing.assert_array_equal(opt.ema[0], a)
    for group, value in ((1, 0.5), (0, None)):
        with pytest.raises(ValueError, match="ema_decay can't come or go"):
            opt.param_groups[group]["ema_decay"] = value
    with pytest.raises(ValueError, match=r"ema_decay must be in \[0, 1\], got 1.5"):
        ac.SGD(a, ema_decay=1.5)


@DTYPES
@pytest.mark.parametrize("decay", [0.9, 0.999, 0.99999])
def test_the_average_of_weights_that_do_not_move_is_exact(decay, dtype):
    p = np.append(np.random.default_rng(0).normal(size=999), -0.0).astype(dtype)
    opt = ac.SGD(p, lr=0.0, ema_decay=decay)
    for _ in range(100):
        opt.step(np.zeros_like(p))
    assert_same_bits(opt.ema, p)


def test_denormals_are_flushed_in_sums_too():
    p = np.zeros(5, "float32")
    try:
        opt = ac.SGD(p, lr=1.0, maximize=True, flush_denormals=True)
    except ValueError:
        pytest.skip("this processor has no such mode")
    opt.accumulate(np.full(5, 3e-38, "float32"))
    opt.accumulate(np.full(5, 1e-39, "float32"))  # nothing is added
    opt.step()
    assert (p == np.float32(1.5e-38)).all()


HARD = np.array([0, -0.0, 1, -1, 65504, 65519.99, 65520, 1e6, -1e9, np.inf, -np.inf, np.nan, 6e-8, 2.98e-8, 2.9802322e-8,
                 2.980233e-8, 8.94e-8, 6.1e-5, 6.097e-5, 6.1035156e-5, 1e-40, -1e-45, 3.4e38, 1.0009766, 1.00048828125,
                 1.00146484375, 1.00390625, 1.01171875], "float32")  # fmt: skip


@pytest.mark.parametrize("kind", ["float16", "uint16", "float32"])
def test_copies_are_rounded_to_nearest_even(kind):
    rng = np.random.default_rng(0)
    p = np.concatenate([HARD, rng.integers(0, 2**32, 200_000, dtype="uint64").astype("uint32").view("float32")])
    copy = np.empty(p.size, kind)
    ac.SGD(p, copy_to=copy, uint16_as="bfloat16")  # written at construction
    with np.errstate(all="ignore"):
        want = to_bfloat16(p) if kind == "uint16" else p.astype(kind)
    if kind == "uint16":
        assert_same_bits(copy, want)
        assert np.isnan((copy[np.isnan(p)].astype("uint32") << 16).view("float32")).all()
    else:
        assert_same_bits(copy, want)


def test_copies_of_bfloat16_arrays():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    p = np.random.default_rng(0).normal(size=1000).astype("float32")
    copy = np.zeros(1000, ml_dtypes.bfloat16)
    opt = ac.SGD(p, lr=0.1, copy_to=copy)
    opt.step(np.ones_like(p))
    np.testing.assert_array_equal(copy.astype("float32"), p.astype(ml_dtypes.bfloat16).astype("float32"))


@pytest.mark.parametrize(
    ("params", "copy", "error", "message"),
    [
        (
            np.ones(3, "float32"),
            np.ones(4, "float16"),
            ValueError,
            r"copy_to must be an array of its parameter's shape, \(3,\), got shape \(4,\)",
        ),
        (np.ones(3, "float32"), [1, 2, 3], ValueError, "copy_to must be an array of its parameter's shape"),
        (np.ones(3, "float32"), np.ones(3), TypeError, "copy_to has dtype float64; copies of a group are all float32"),
        (np.ones(3, "float32"), np.ones(3, "uint16"), TypeError, "uint16_as='bfloat16'"),
        (np.ones(3), np.ones(3, "float16"), TypeError, "copy_to is float16, which is refused for float64 parameters"),
        ([np.ones(3, "float32")], [np.ones(6, "float32")[::2]], ValueError, r"copy_to\[0\] must be C-contiguous"),
        (
            np.ones(3, "float32"),
            np.frombuffer(bytearray(13), "float32", 3, 1),
            ValueError,
            "copy_to must be .* aligned",
        ),
        (
            {"w": np.ones(3, "float32")},
            {"v": np.ones(3, "float32")},
            ValueError,
            "copy_to must be a dict with the keys",
        ),
        ([np.ones(3, "float32")] * 1, np.ones(3, "float32"), ValueError, "copy_to must be a list of 1 array,"),
    ],
)
def test_bad_copies(params, copy, error, message):
    with pytest.raises(error, match=message):
        ac.SGD(params, copy_to=copy)


def test_a_group_that_is_added_has_no_copies_of_the_first():
    p = np.ones(3, "float32")
    opt = ac.SGD(p, lr=1.0, copy_to=np.empty_like(p))
    opt.add_param_group({"params": np.zeros_like(p)})
    assert opt.param_groups[1]["copy_to"] is None
    opt.step([p * 0, p * 1])
    assert (opt.param_groups[0]["copy_to"] == 1).all()


def test_copies_share_no_memory():
    p = np.ones(10, "float32")
    with pytest.raises(ValueError, match="share memory"):
        ac.SGD(p[:5], copy_to=p[:5])
    copy = np.ones(10, "float32")
    opt = ac.SGD(p, copy_to=copy)
    with pytest.raises(ValueError, match="grads shares memory with copy_to"):
        opt.step(copy)
    with pytest.raises(ValueError, match="copy_to can't be changed"):
        opt.param_groups[0]["copy_to"] = np.ones(10, "float32")
    with pytest.raises(ValueError, match="uint16_as must be"):
        ac.SGD(np.ones(2), uint16_as="float16")


@DTYPES
def test_bounds(dtype):
    p = np.zeros(4, dtype)
    opt = ac.SGD(p, lr=1.0, bounds=(-0.1, None))
    opt.step(np.array([1, -1, np.nan, 0], dtype))
    assert p[0] >= -0.1  # rounded inward: the float32 number nearest to -0.1 lies outside
    assert p[0] == pytest.approx(-0.1, rel=1e-6)
    assert p[1] == 1
    assert np.isnan(p[2])
    p[:] = 0
    opt.param_groups[0]["bounds"] = (np.array([-1, -2, -3, 0.0]), 0.5)
    opt.step(np.array([10, 10, 10, -10], dtype))
    np.testing.assert_array_equal(p, np.array([-1, -2, -3, 0.5], dtype))
    opt.param_groups[0]["bounds"] = None
    opt.step(np.array([10, 10, 10, -10], dtype))
    assert p[0] == -11


@pytest.mark.parametrize(
    ("bounds", "message"),
    [((1, 0), "lo <= hi"), ((0.1, 0.1), "lo <= hi and a number of float32 between"), (1.0, "must be a pair"),
     ((float("nan"), 1), "lo has a NaN"), ((0, np.ones(3)), r"bounds: hi must be an array of its parameter's shape, \(2,\)"),
     ((np.array([0.0, 2.0]), np.array([1.0, 1.0])), "lo <= hi"), ((1e39, None), "a number of float32 between"),
     ((np.array(["a", "b"]), 1), "must be numbers"), ((10**400, None), "lo <= hi")],
)  # fmt: skip
def test_bad_bounds(bounds, message):
    p = np.zeros(2, "float32")
    with pytest.raises((ValueError, TypeError), match=message):
        ac.SGD(p, bounds=bounds)
    opt = ac.SGD(p, bounds=(0, 1))
    with pytest.raises((ValueError, TypeError), match=message):
        opt.param_groups[0]["bounds"] = bounds
    assert opt.param_groups[0]["bounds"] == (0, 1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_nan_is_seen_before_and_after_numbers(dtype):
    for at in (0, -1):
        opt = ac.SGD(np.zeros(3 * CHUNK, dtype), on_nonfinite="skip")
        g = np.ones(3 * CHUNK, dtype)
        g[at] = np.nan
        opt.step(g)
        assert (opt.t, opt.skipped_steps) == (0, 1)


def test_zero_grad():
    p = [np.zeros(3 * CHUNK + 5, "float32"), np.zeros(3, "float32")]
    g = [np.ones_like(x) for x in p]
    opt = ac.AdamW(p, zero_grad=True, n_threads=2)
    opt.step([g[0], None])
    assert not g[0].any()
    assert g[1].all()
    g[0].flags.writeable = False
    with pytest.raises(ValueError, match=r"grads\[0\] is read-only and can't be zeroed"):
        opt.step([g[0], None])
    shared = np.ones(6, "float32")
    opt = ac.SGD([np.zeros(3, "float32"), np.zeros(3, "float32")], lr=1.0, zero_grad=True)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"grads\[0\] and grads\[1\] share memory"):
            opt.step([shared[:3], shared[2:5]])
    opt.step([shared[:3], shared[3:]])
    assert not shared.any()
    opt = ac.SGD([np.zeros(4, "float32"), np.zeros(8, "float32"), np.zeros(4, "float32")], zero_grad=True)
    shared = np.ones(8, "float32")
    opt.step([shared[:4], None, shared[4:]])
    with pytest.raises(ValueError, match=r"grads\[1\] and grads\[2\] share memory"):
        opt.step([None, shared, shared[4:]])  # they begin where the others did


def test_flush_denormals_is_scoped():
    tiny = np.full(300_000, 1e-40, "float32")
    for flush in (False, True):
        p = np.zeros_like(tiny)
        opt = ac.SGD(p, lr=1.0, flush_denormals=flush, n_threads=2)
        opt.step(tiny)
        assert (p == 0).all() == flush
        assert np.float32(1e-40) * np.float32(0.5) != 0  # the caller's mode is as it was
    serial = np.zeros(5, "float32")
    ac.SGD(serial, lr=1.0, flush_denormals=True).step(tiny[:5])
    assert not serial.any()
    assert np.float32(1e-40) * np.float32(0.5) != 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"max_grad_norm": 0}, r"max_grad_norm must be in \(0, inf\)"), ({"max_grad_value": -1}, "max_grad_value must be"),
     ({"on_nonfinite": "warn"}, "on_nonfinite must be 'ignore' or 'skip' or 'raise'"), ({"zero_grad": 1}, "zero_grad must be"),
     ({"flush_denormals": None}, "flush_denormals must be")],
)  # fmt: skip
def test_bad_settings(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        ac.SGD(np.ones(2), **options)
    opt = ac.SGD(np.ones(2))
    ((name, value),) = options.items()
    before = getattr(opt, name)
    with pytest.raises((ValueError, TypeError), match=message):
        setattr(opt, name, value)
    assert getattr(opt, name) == before


def test_stages_that_are_off_leave_no_operation_behind():
    """-0.0 and NaN pass a step that multiplies by nothing."""
    p = np.array([-0.0, 1.0], "float32")
    ac.SGD(p, lr=1.0, loss_scale=1.0).step(np.array([0.0, 0.0], "float32"))
    assert np.signbit(p[0])


def test_nothing_is_written_when_a_later_group_is_refused():
    copy = np.full(3, 7.0, "float32")
    for bad in ({"lr": -1.0}, {"copy_to": np.ones(4)}, {"copy_to": copy}):
        with pytest.raises(ValueError, match=r"lr must be|copy_to"):
            ac.SGD([{"params": np.ones(3), "copy_to": copy}, {"params": np.ones(3), **bad}])
        assert (copy == 7).all()


@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
def test_what_would_make_a_moment_infinite_is_skipped(name, options):
    """A rule that squares the gradient must say so: its class says squares=True."""
    g = np.full(3, 1e25, "float32")
    opt = build(name, np.ones(3, "float32"), options)
    opt.step(g)
    infinite = any(not np.isfinite(x).all() for x in opt.state.values())
    opt = build(name, np.ones(3, "float32"), options, on_nonfinite="skip")
    opt.step(g)
    assert opt.skipped_steps == infinite


def test_the_square_is_checked_as_the_sweep_forms_it():
    """fl32(fl32(1/7) g)^2 overflows where (g/7)^2 in double does not."""
    g = np.array([1.291272e20], "float32")
    opt = ac.Adagrad(np.ones(1, "float32"), on_nonfinite="skip", loss_scale=7.0)
    opt.step(g)
    assert opt.skipped_steps == 1
    assert opt.state["sum"][0] == 0


def test_a_norm_that_overflows_and_factors_that_no_float_holds():
    g = np.array([1e200, 1.0])
    opt = ac.AdamW(np.ones(2), on_nonfinite="skip", max_grad_norm=1.0)
    opt.step(g)
    assert (opt.skipped_steps, opt.t, opt.grad_norm) == (1, 0, np.inf)
    opt.on_nonfinite = "raise"
    with pytest.raises(ValueError, match="the norm of the gradients overflows"):
        opt.step(g)
    with pytest.raises(ValueError, match="the norm of the gradients overflows"):
        ac.SGD(np.ones(2), on_nonfinite="raise", max_grad_norm=1.0).step(g)
    for dtype, scale in (("float32", 1e-39), ("float32", 1e60), ("float64", 1e-309)):
        p = np.ones(2, dtype)
        with pytest.raises(ValueError, match=r"loss_scale=.* can't hold; nothing was changed"):
            ac.SGD(p).step(np.zeros(2, dtype), loss_scale=scale)
        assert (p == 1).all()


def test_a_limit_that_rounds_to_0_is_refused_where_a_group_computes_in_float32():
    half = 2.0**-150  # of the smallest number: the largest that rounds to 0
    for params in np.ones(2, "float32"), [{"params": np.ones(2)}, {"params": np.ones(2, "float32")}]:
        for limit in half, 1e-50:
            with pytest.raises(ValueError, match=f"max_grad_value={limit} rounds to 0 in float32"):
                ac.SGD(params, max_grad_value=limit)
        ac.SGD(params, max_grad_value=1.01 * half)
    opt = ac.SGD(np.ones(2), max_grad_value=half)
    with pytest.raises(ValueError, match="rounds to 0 in float32"):
        opt.add_param_group({"params": np.ones(2, "float32")})
    assert len(opt.param_groups) == 1


def test_the_norm_is_nan_where_none_is_taken():
    opt = ac.SGD(np.ones(2), max_grad_norm=1.0)
    opt.step(np.ones(2))
    opt.max_grad_norm = None
    opt.step(np.ones(2))
    assert np.isnan(opt.grad_norm)


def test_bounds_are_the_ones_assigned_and_are_formed_once():
    lo = np.zeros(3)
    p = np.ones(3)
    opt = ac.SGD(p, lr=1.0, bounds=(lo, 5.0))
    lo[:] = 9  # the caller's array is the caller's
    opt.param_groups[0]["lr"] = 2.0
    opt.step(np.ones(3))
    np.testing.assert_array_equal(p, 0)


def test_ranges_with_a_norm():
    n = 2 * CHUNK
    p, q, g = np.ones(n), np.ones(n), np.ones(n)
    whole, pieces = (ac.AdamW(x, max_grad_norm=1.0, on_nonfinite="skip") for x in (p, q))
    whole.step(g)
    step_range(pieces, g, lo=CHUNK, count=False)
    step_range(pieces, g, hi=CHUNK)
    assert_same_bits(q, p)
    g[-1] = np.nan
    step_range(pieces, g, hi=CHUNK, count=False)
    step_range(pieces, g, lo=CHUNK)
    assert pieces.skipped_steps == 1
    assert_same_bits(q, p)
    for one_of_them in {"max_grad_norm": 1.0}, {"on_nonfinite": "skip"}:
        opt = ac.AdamW(np.ones(n), zero_grad=True, **one_of_them)
        with pytest.raises(ValueError, match="a range can't be stepped with zero_grad"):
            step_range(opt, g, hi=CHUNK)


def test_averages_are_not_swapped_under_a_running_step():
    import threading

    p = np.zeros(1 << 22, "float32")
    g = np.ones_like(p)
    opt = ac.SGD(p, lr=1.0, ema_decay=0.5)
    stop, refused = threading.Event(), [0]

    def swap():
        while not stop.is_set():
            try:
                with opt.averaged_parameters():
                    pass
            except RuntimeError:
                refused[0] += 1

    thread = threading.Thread(target=swap)
    thread.start()
    for _ in range(60):
        try:
            opt.step(g)
        except RuntimeError:
            refused[0] += 1
    stop.set()
    thread.join()
    assert (p == p[0]).all()
    assert (opt.ema == opt.ema[0]).all()
    assert p[0] == -opt.t


# --- narrow gradients ------------------------------------------------------------------------------------------------


def narrow(g, kind):
    """A gradient in a narrow format, and the same widened to float32 by other means."""
    if kind == "float16":
        with np.errstate(over="ignore"):
            h = g.astype("float16")
        return h, h.astype("float32")
    h = to_bfloat16(g)
    wide = (h.astype("uint32") << 16).view("float32")
    if kind == "uint16":
        return h, wide
    return h.view(pytest.importorskip("ml_dtypes").bfloat16), wide


@pytest.mark.parametrize("kind", ["float16", "uint16", "ml_dtypes"])
@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
def test_narrow_gradients_equal_the_same_widened(name, options, kind):
    rng = np.random.default_rng(3)
    size = 2 * CHUNK + 77
    p = rng.normal(size=size).astype("float32")
    want = p.copy()
    shared = {"uint16_as": "bfloat16", "max_grad_norm": 3.0, "on_nonfinite": "raise", "n_threads": 2}
    one = build(name, p, options, zero_grad=True, **shared)
    cuts = [5, CHUNK + 1]
    many = build(name, [x.copy() for x in np.split(want, cuts)], options, **shared)
    wide_opt = build(name, want, options, **shared)
    for g in gradients(rng, size, "float32", 3):
        h, wide = narrow(g, kind)
        wide_opt.step(wide)
        many.step([h[:5].copy(), wide[5 : CHUNK + 1].copy(), h[CHUNK + 1 :].copy()])  # formats may differ in a list
        one.step(h)
        assert not h.view("uint16").any()
        assert one.grad_norm == many.grad_norm == wide_opt.grad_norm
        assert_same_bits(p, want)
        assert_same_bits(np.concatenate(many.param_groups[0]["params"]), want)


@pytest.mark.parametrize("kind", ["float16", "uint16"])
def test_every_narrow_number_is_widened_exactly(kind):
    every = np.arange(1 << 16, dtype="uint32").astype("uint16")
    g = every.view("float16") if kind == "float16" else every
    wide = g.astype("float32") if kind == "float16" else (every.astype("uint32") << 16).view("float32")
    for maximize, flush in (True, False), (True, True), (False, False):  # to minimize, nothing but the rule runs
        p = np.zeros(1 << 16, "float32")
        flush = flush and kind == "float16"
        ac.SGD(p, lr=1.0, maximize=maximize, uint16_as="bfloat16", flush_denormals=flush).step(g)
        with np.errstate(invalid="ignore"):  # signalling NaNs
            assert_same_bits(p + 0.0, (wide * np.float32(-1)) * np.float32(-1 if maximize else 1) + 0.0)


def test_narrow_gradients_are_refused_where_they_do_not_fit():
    with pytest.raises(TypeError, match=r"grads has dtype uint16, its parameter float32.*uint16_as='bfloat16'"):
        ac.SGD(np.ones(2, "float32")).step(np.ones(2, "uint16"))
    with pytest.raises(TypeError, match="grads has dtype float16, its parameter float64"):
        ac.SGD(np.ones(2)).step(np.ones(2, "float16"))
    with pytest.raises(ValueError, match=r"grads is nan at index \(1,\)"):
        ac.SGD(np.ones(2, "float32"), on_nonfinite="raise").step(np.array([1, np.nan], "float16"))
    g = np.array([1, np.inf], "float16")
    opt = ac.SGD(np.ones(2, "float32"), on_nonfinite="skip", zero_grad=True)
    opt.step(g)
    assert opt.skipped_steps == 1
    assert not g.any()


def test_a_step_that_raises_leaves_the_last_norm():
    opt = ac.SGD(np.ones(2), on_nonfinite="raise", max_grad_norm=1.0)
    opt.step(np.array([3.0, 4.0]))
    with pytest.raises(ValueError, match="is nan at index"):
        opt.step(np.array([np.nan, 4.0]))
    assert opt.grad_norm == 5.0

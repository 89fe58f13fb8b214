"""cast=True: gradients of other formats and layouts, with the bits of np.ascontiguousarray(g.astype(dtype))."""

import os

import ml_dtypes
import numpy as np
import pytest
from cases import IDS, PAIRS
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_same, assert_same_bits, build, child, everything, misaligned

import adaptive_c as ac

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FORMATS = ["f2", BFLOAT16, "f4", "f8"]
STAGES = {"max_grad_norm": 3.0, "max_grad_value": 1.0, "loss_scale": 2.0, "on_nonfinite": "skip", "ema_decay": 0.9}


def computed(opt):
    return "f8" if opt.param_groups[0]["params"].dtype == "f8" else "f4"


def converted(g, dtype):
    with np.errstate(over="ignore"):
        return np.ascontiguousarray(g.astype(dtype))


def strided(x, way):
    """The same numbers of an array of three dimensions, laid out in another way."""
    if way == "transposed":
        return np.ascontiguousarray(x.T).T
    if way == "reversed":
        return np.ascontiguousarray(x[::-1, :, ::-1])[::-1, :, ::-1]
    if way == "sliced":
        big = np.zeros((x.shape[0] * 2, x.shape[1] + 3, x.shape[2] * 3), x.dtype)
        part = big[::2, 2:-1, ::3]
        part[...] = x
        return part
    if way == "swapped":
        return np.ascontiguousarray(x.swapaxes(0, 1)).swapaxes(0, 1)
    return misaligned(x) if way == "misaligned" else x


WAYS = ["in order", "transposed", "reversed", "sliced", "swapped", "misaligned"]
SHAPE = (7, 30, 41)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("way", WAYS)
def test_every_format_and_layout_has_the_bits_of_a_converted_copy(dtype, kind, way):
    rng = np.random.default_rng(1)
    start = rng.normal(size=SHAPE).astype(dtype)
    opt, other = (ac.Adam(start.copy(), lr=0.1, cast=cast, **STAGES) for cast in (True, False))
    for call in range(4):
        g = strided((rng.normal(size=SHAPE) * 10.0 ** rng.integers(-9, 4, SHAPE)).astype(kind), way)
        before = g.copy()
        if call == 2:
            for part in (opt, other):
                part.accumulate(g if part is opt else converted(g, dtype))
            opt.step()
            other.step()
        else:
            opt.step(g)
            other.step(converted(g, dtype))
        assert_same_bits(g.astype("f8"), before.astype("f8"))
    assert opt.grad_norm == other.grad_norm
    everything_but_cast = [everything(x) for x in (opt, other)]
    for about in everything_but_cast:
        del about["settings"]["cast"]
    assert_same(*everything_but_cast)


@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
def test_every_rule(name, options):
    rng = np.random.default_rng(2)
    start = rng.normal(size=(50, 90)).astype("f4")
    opt, other = (build(name, start.copy(), options, cast=True) for _ in range(2))
    for _ in range(3):
        g = rng.normal(size=(90, 50)).T
        opt.step(g)
        other.step(converted(g, "f4"))
    assert_same(everything(opt), everything(other))


NARROW = [
    ("f4", {"state_dtype": "uint8"}),
    ("f4", {"state_dtype": "bfloat16"}),
    ("f2", {"rounding": "stochastic"}),
    ("f2", {"master": "float32"}),
    (BFLOAT16, {"rounding": "stochastic", "state_dtype": "uint8"}),
    (BFLOAT16, {"master": "float32", "state_dtype": "bfloat16"}),
]


@pytest.mark.parametrize(("dtype", "options"), NARROW)
@pytest.mark.parametrize("way", ["step", "threads", "stepping", "target"])
def test_narrow_numbers_and_blocks_that_arrays_share(dtype, options, way):
    """float32 is what they are converted to: the type that the rule computes in."""
    rng = np.random.default_rng(3)
    shapes = [(300, 70), (5,), (30, 1, 9)]
    start = [rng.normal(size=shape).astype(dtype) for shape in shapes]
    opt, other = (ac.AdamW([x.copy() for x in start], lr=0.1, cast=True, **options) for _ in range(2))
    opt.n_threads = 3 if way == "threads" else 1
    for kind in FORMATS:
        grads = [rng.normal(size=shape[::-1]).astype(kind).T for shape in shapes]
        plain = [converted(g, "f4") for g in grads]
        if way == "stepping":
            with opt.stepping() as now:
                for i in (1, 2, 0):
                    now(i, grads[i])
            other.step(plain)
        elif way == "target":
            opt.step(target=grads)
            other.step(target=plain)
        else:
            opt.step(grads)
            other.step(plain)
    assert_same(everything(opt), everything(other))


@settings(max_examples=60)
@given(data=st.data())
def test_any_view(data):
    """Slices with any steps and order of axes, in one sweep and in ranges of it."""
    draw = data.draw
    base = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    x = np.arange(np.prod(base), dtype=draw(st.sampled_from(["f2", "f4", "f8"]))).reshape(base) % 97
    steps = [draw(st.sampled_from([1, 2, 3, -1, -2])) for _ in base]
    x = x[tuple(slice(None, None, k) for k in steps)].transpose(draw(st.permutations(range(len(base)))))
    if draw(st.booleans()):
        x = np.broadcast_to(x, (3, *x.shape))
    w = np.zeros(x.shape, draw(st.sampled_from(["f4", "f8"])))
    ac.SGD(w, lr=1.0, cast=True).step(x)
    assert_same_bits(w, -converted(x, w.dtype) + 0)


def test_a_large_array_is_read_by_all_threads():
    rng = np.random.default_rng(4)
    x = rng.normal(size=(300, 1000))
    for n_threads in (1, 2, 5):
        w = np.zeros((1000, 300), "f4")
        ac.SGD(w, lr=1.0, cast=True, n_threads=n_threads, on_nonfinite="raise").step(x.T)
        assert_same_bits(w, -converted(x.T, "f4"))


MEMORY = """
import numpy as np, adaptive_c as ac

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

w, g = np.zeros((2048, 2048), "f4"), np.ones((2048, 2048)).T
opt = ac.SGD(w, cast=True, max_grad_norm=1.0, n_threads=2)
small = ac.SGD(np.zeros(1 << 15, "f4"), cast=True, max_grad_norm=1.0, n_threads=2)
small.step(np.ones(1 << 15))  # threads are there
opt.param_groups[0]["params"][...] = 1
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
opt.step(g)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_it_takes_a_chunk_of_memory_for_each_thread():
    """A gradient of 32 MiB in another format and order, which would be 16 MiB when converted."""
    assert float(child(MEMORY)) < 1


def test_numbers_for_arrays_of_one_element():
    params = [np.zeros(()), np.zeros(1), np.zeros((1, 1)), np.zeros(2)]
    opt = ac.SGD(params, lr=1.0, cast=True)
    opt.step([np.float32(2.0), 3.0, np.float64(4.0), None])
    assert [float(p.sum()) for p in params] == [-2, -3, -4, 0]
    opt.step([np.float16(2.0), BFLOAT16.type(3.0), np.float64(4.0), np.ones(2)])
    assert [float(p.sum()) for p in params] == [-4, -6, -8, -2]
    opt.accumulate([1.0, 1.0, 1.0, None])
    opt.step()
    opt.step(target=[5.0, None, np.float32(0.5), None])
    assert [float(p.sum()) for p in params] == [5, -7, 0.5, -2]


def test_rows_of_other_formats():
    rng = np.random.default_rng(5)
    rows, start = np.array([3, 1, 3]), rng.normal(size=(6, 700))
    for dtype in ("f4", "f8"):
        for kind in FORMATS:
            values = rng.normal(size=(3, 700)).astype(kind)
            opt, other = (ac.Adam(start.astype(dtype), cast=True, max_grad_norm=1.0) for _ in range(2))
            for _ in range(2):
                opt.step(ac.Rows(rows, values))
                opt.accumulate(ac.Rows(rows, values))
                opt.step()
                other.step(ac.Rows(rows, converted(values, dtype)))
                other.step(ac.Rows(rows, converted(values, dtype)))
            assert_same(everything(opt), everything(other))


@pytest.mark.parametrize("way", WAYS)
def test_zero_grad_zeroes_them_where_they_lie(way):
    for on_nonfinite, call in (("ignore", "step"), ("ignore", "accumulate"), ("skip", "step")):
        g = strided(np.random.default_rng(6).normal(size=SHAPE), way)
        around = g
        while around.base is not None:
            around = around.base
        around = around.view("u1").reshape(-1).view("u1")
        opt = ac.SGD(np.zeros(SHAPE, "f4"), cast=True, zero_grad=True, on_nonfinite=on_nonfinite)
        if on_nonfinite == "skip":
            g[3, 2, 1] = np.nan
        getattr(opt, call)(g)
        assert not g.any()
        assert opt.skipped_steps == (on_nonfinite == "skip")
        assert not around.any()  # what lies between is 0 from the beginning


def test_zero_grad_leaves_what_lies_between():
    big = np.ones((8, 6))
    opt = ac.SGD(np.zeros((4, 2), "f4"), cast=True, zero_grad=True)
    opt.step(big[::2, 1::3])
    assert big.sum() == 48 - 8
    assert not big[::2, 1::3].any()


def test_zero_grad_refuses_what_it_can_not_zero():
    opt = ac.SGD([np.zeros((3, 3)), np.zeros((3, 3))], cast=True, zero_grad=True)
    own = np.lib.stride_tricks.as_strided(np.ones(8), (3, 3), (8, 8))
    zero = np.lib.stride_tricks.as_strided(np.ones(3), (3, 3), (0, 8))
    x = np.ones((3, 9))
    for grads, message in (
        ([own, None], r"grads\[0\] has elements that share memory"),
        ([None, zero], r"grads\[1\] has elements that share memory"),
        ([np.broadcast_to(1.0, (3, 3)), None], r"grads\[0\] is read-only and can't be zeroed"),
        ([x[:, 2:5], x[:, 4:7]], r"grads\[0\] and grads\[1\] share memory, or one has elements between the other's"),
        ([x[::-1, ::-3], x[::-1, ::-3]], r"grads\[0\] and grads\[1\] share memory"),
        ([x[:, ::3], x[:, 1::3]], r"grads\[0\] and grads\[1\] share memory, or .*; pass a copy of one"),
    ):
        with pytest.raises(ValueError, match=message):
            opt.step(grads)
    assert x.all()
    opt.step([x[:, :3].T.copy().T, np.ones((3, 3)).T])
    opt.zero_grad = False
    opt.step([own, zero])
    one = ac.SGD(np.zeros(1), cast=True, zero_grad=True)
    with pytest.raises(ValueError, match="read-only and can't be zeroed"):
        one.step(2.0)


def test_what_shares_memory_with_the_optimizers_is_refused_from_end_to_end():
    both = np.ones((4, 6))
    opt = ac.SGD(both[2], cast=True)
    flat = both.reshape(-1)
    for g in (flat[::4], flat[::-4], flat[10:16], flat[3:14:2]):  # some elements lie before the parameters
        with pytest.raises(ValueError, match="grads shares memory with params; pass a copy"):
            opt.step(g)
    opt.step(flat[:12:2])  # and these end before them
    opt.step(flat[11::-2])
    assert opt.t == 2


REFUSED = {
    "integers": (lambda: np.ones(3, "i4"), TypeError, r"has dtype int32, its parameter float32; convert it: x.astype\('float32'\)$"),
    "complex": (lambda: np.ones(3, "c8"), TypeError, "has dtype complex64"),
    "bool": (lambda: np.ones(3, "?"), TypeError, "has dtype bool"),
    "byte order": (lambda: np.ones(3, ">f8"), TypeError, "byte-swapped"),
    "long double": (lambda: np.ones(3, "g"), TypeError, "has dtype (longdouble|float128)"),
    "a shape": (lambda: np.ones((2, 3)).T[:, 0:1], ValueError, r"has shape \(3, 1\), its parameter \(3,\)"),
    "a list": (lambda: [1.0, 2.0, 3.0], TypeError, "is a list, not a numpy.ndarray"),
    "a number": (lambda: 1.0, TypeError, r"is a float, not a numpy.ndarray; make it an array"),
    "a whole number": (lambda: 1, TypeError, r"is an int, not a numpy.ndarray; make it an array"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_all_the_same(make, error, message):
    opt = ac.Adam(np.ones(3, "f4"), cast=True)
    before = everything(opt)
    with pytest.raises(error, match=message):
        opt.step(make())
    assert_same(everything(opt), before)


def test_whole_numbers_for_one_element_are_refused():
    opt = ac.SGD(np.zeros(1), cast=True)
    for g, message in (
        (np.int64(2), "has dtype int64"),
        (np.bool_(True), "has dtype bool"),
        (1, "is an int"),
        (True, "a bool"),
    ):
        with pytest.raises(TypeError, match=message):
            opt.step(g)


def test_without_it_the_messages_name_it_and_the_remedy_works():
    cases = [(np.ones(4, "f4"), np.ones(4)), (np.ones(4), np.ones(4, "f4")), (np.ones(4), np.ones(4, "f2")),
             (np.ones(4), np.ones(8)[::2]), (np.ones(4), misaligned(np.ones(4))), (np.ones(1), 2.0),
             (np.ones(1), np.float32(2))]  # fmt: skip
    for w, g in cases:
        opt = ac.SGD(w, lr=0.5)
        for call in (lambda opt=opt, g=g: opt.step(g), lambda opt=opt, g=g: opt.step(target=g)):
            with pytest.raises((TypeError, ValueError), match="construct the optimizer with cast=True"):
                call()
        assert (w == 1).all()
        ac.SGD(w, lr=0.5, cast=True).step(g)
        assert (w == 1 - 0.5 * np.asarray(g)).all()
    with pytest.raises(TypeError) as raised:
        ac.SGD(np.ones(4, "f4")).step(np.ones(4, "i4"))
    assert "cast" not in str(raised.value)


@pytest.mark.parametrize(("dtype", "kind"), [("f4", "f8"), ("f8", "f4")])
def test_sums_keep_denormals_however_they_come(dtype, kind):
    """flush_denormals takes them for 0 where it computes, and a conversion is to change no bit."""
    tiny = np.full(5000, 1e-40, "f4").astype(kind)
    sums = []
    for g in (tiny, tiny.astype(dtype)):
        opt = ac.SGD(np.ones(5000, dtype), cast=True, flush_denormals=True)
        opt.accumulate(g)
        sums.append(opt.state_dict()["groups"][0]["arrays"]["sums"])
    assert_same_bits(*sums)


def test_it_is_a_setting_that_may_change_and_is_saved():
    opt = ac.SGD(np.ones(2, "f4"), cast=True)
    other = ac.SGD(np.ones(2, "f4"))
    assert (opt.cast, other.cast) == (True, False)
    other.load_state_dict(opt.state_dict())
    assert other.cast
    other.step(np.ones(2))
    other.cast = False
    with pytest.raises(TypeError, match="cast=True"):
        other.step(np.ones(2))
    with pytest.raises(TypeError, match="cast must be True or False"):
        ac.SGD(np.ones(2), cast=1)


def test_an_element_that_is_not_finite_is_named_by_its_place():
    g = np.zeros((3, 4))
    g[2, 1] = np.inf
    opt = ac.Adam(np.ones((4, 3), "f4"), cast=True, on_nonfinite="raise")
    with pytest.raises(ValueError, match=r"grads is inf at index \(1, 2\)"):
        opt.step(g.T)
    g[2, 1] = 1e300  # too large for float32
    with pytest.raises(ValueError, match=r"grads is inf at index \(1, 2\)"):
        opt.step(g.T)

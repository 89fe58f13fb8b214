"""sum_to_one: rows of the last axis that are divided by their sums, or projected onto the simplex, after each step."""

import copy
import functools
import math

import numpy as np
import pytest
from cases import IDS, PAIRS
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CHUNK, assert_same, assert_same_bits, build, everything, gradients, spec, step_range
from test_formats import FORMATS, Composition, allocate, shared
from test_stages import to_bfloat16

import adaptive_c as ac

MODES = pytest.mark.parametrize("mode", ["divide", "project"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
# rows of all lengths, from anywhere in a tile of 512 elements and in a block of 256
SHAPES = [(1, 3), (40, 5), (7, 1), (90, 16), (30, 17), (2, 3, 20), (3, 511), (2, 512), (2, 513), (0, 4), (3, 0), (2, 2000),
          (1500, 2), (11,), (4500,)]  # fmt: skip
SIZES = [math.prod(s) for s in SHAPES]


def lanes(rows):
    """Sums as docs/hosts.md says: in double, element i of a row to lane i mod 16, then the lanes in order."""
    n, length = rows.shape
    padded = np.zeros((n, -(-length // 16) * 16))
    padded[:, :length] = rows
    sums, total = np.zeros((n, 16)), np.zeros(n)
    for i in range(0, length, 16):
        sums += padded[:, i : i + 16]
    for lane in sums.T:
        total += lane
    return total


def divided(rows):
    s = lanes(rows).astype(rows.dtype)
    return rows / np.where((s > 0) & np.isfinite(s), s, 1).astype(rows.dtype)[:, None]


def projected(rows):
    finite = np.isfinite(lanes(rows))
    x = rows.astype("float64") - rows.max(1, keepdims=True).astype("float64")
    theta, before = np.full(len(x), -1.0), np.full(len(x), x.shape[1] + 1)
    while True:
        above = x > theta[:, None]
        now = above.sum(1)
        shrunk = finite & (now < before)
        if not shrunk.any():
            break
        found = (lanes(np.where(above, x, 0.0)) - 1) / np.maximum(now, 1)
        theta, before = np.where(shrunk, found, theta), np.where(shrunk, now, before)
    return np.where(finite[:, None], np.maximum(x - theta[:, None], 0.0).astype(rows.dtype), rows)


def summing(x, mode):
    """An array whose rows of the last axis sum to one."""
    if not x.size:
        return x
    with np.errstate(all="ignore"):
        rows = {"divide": divided, "project": projected}[mode](x.reshape(-1, x.shape[-1]))
    return rows.reshape(x.shape)


def flat_summing(flat, mode, shapes=SHAPES):
    parts = np.split(flat, np.cumsum([math.prod(s) for s in shapes])[:-1])
    return np.concatenate([summing(x.reshape(s), mode).ravel() for x, s in zip(parts, shapes, strict=True)])


def parts_of(flat, shapes=SHAPES):
    return [x.reshape(s).copy() for x, s in zip(np.split(flat, np.cumsum([math.prod(s) for s in shapes])[:-1]), shapes,
                                                strict=True)]  # fmt: skip


def flattened(arrays):
    return np.concatenate([x.ravel() for x in arrays])


@functools.cache
def numbers(dtype):
    """Parameters of all shapes, and the gradients of three steps."""
    rng = np.random.default_rng(0)
    return rng.uniform(0.1, 1.0, sum(SIZES)).astype(dtype), gradients(rng, sum(SIZES), dtype, 3)


@MODES
@DTYPES
@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
def test_the_bits_are_those_of_the_composition_by_hand(name, options, dtype, mode):
    p, grads = numbers(dtype)
    want, e, d = p.copy(), p.copy(), 0.9
    parts = parts_of(p)
    states = [{} for _ in parts]
    copies = [np.empty(x.shape, "uint16" if dtype == "float32" else "float32") for x in parts]
    opt = build(name, parts, options, sum_to_one=mode, bounds=(1e-3, 2.0), ema_decay=d, copy_to=copies,
                uint16_as="bfloat16", n_threads=3, max_grad_value=0.3)  # fmt: skip
    kind = np.dtype(dtype).type
    low = np.nextafter(kind(1e-3), kind(1)) if float(kind(1e-3)) < 1e-3 else kind(1e-3)
    for t, g in enumerate(grads, 1):
        opt.step(parts_of(g))
        k = -1 if options.get("maximize") else 1
        g = np.clip(g * kind(k), kind(-0.3), kind(0.3))
        want = flattened([  # array by array, since a second moment may be one of a row
            spec(name)(x, y, part, t, **{**options, **({"maximize": False} if "maximize" in options else {})})
            for x, y, part in zip(parts_of(want), parts_of(g), states, strict=True)
        ])  # fmt: skip
        want = flat_summing(np.minimum(np.maximum(want, low), kind(2.0)), mode)
        e = e - kind(1 - d) * (e - want)
        assert_same_bits(flattened(parts), want, f"p, t {t}")
        assert_same_bits(flattened(opt.ema), e, f"ema, t {t}")
        assert_same_bits(flattened(copies), to_bfloat16(want) if dtype == "float32" else want.astype("float32"))
    for x in parts:
        np.testing.assert_allclose(x.sum(-1, dtype="float64"), np.ones(x.shape[:-1]) if x.size else 0.0, rtol=1e-5)


class Summing(Composition):
    mode = "divide"

    def behind(self, p):
        return flat_summing(np.minimum(np.maximum(p, np.float32(0)), np.float32(2)), self.mode)


@MODES
@pytest.mark.parametrize("formats", FORMATS, ids=[" ".join(f.values()) for f in FORMATS])
@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "SGD"])
def test_narrow_numbers_are_rounded_behind_it(name, formats, mode):
    rng = np.random.default_rng(1)
    size, options = sum(SIZES), {"lr": 0.1} | ({"momentum": 0.9} if name == "SGD" else {})
    p, _ = allocate(rng, size, formats)
    parts = parts_of(p)
    opt = build(name, parts, options, seed=3, n_threads=2, sum_to_one=mode, bounds=(0, 2), **shared(formats))
    want = Summing(name, options, formats, p, seed=3)
    want.mode = mode
    for g in gradients(rng, size, "float32", 3):
        opt.step(parts_of(g))
        want.step(g)
        want.check(opt, parts)


@MODES
@pytest.mark.parametrize("formats", [{}, *FORMATS], ids=str)
def test_threads_and_ranges_and_calls_for_each_array_do_not_change_a_bit(formats, mode):
    shapes = [(CHUNK * 3 // 8, 8), *SHAPES]

    def run(n_threads=1, ranges=False, arraywise=False, batches=False, order=1):
        rng = np.random.default_rng(2)
        size = CHUNK * 3 + sum(SIZES)
        p, _ = allocate(rng, size, formats)
        parts = parts_of(p, shapes)
        opt = ac.AdamW(parts, lr=0.1, n_threads=n_threads, sum_to_one=mode, bounds=(0, None), ema_decay=0.9,
                       **shared(formats))  # fmt: skip
        for g in gradients(rng, size, "float32", 3):
            grads = parts_of(g, shapes)
            if arraywise:
                with opt.stepping() as now:
                    for i in range(len(parts))[::order]:
                        now(i, grads[i])
            elif batches:
                opt.accumulate(grads)
                opt.step()
            elif ranges:
                step_range(opt, grads, lo=CHUNK * 3, count=False)
                step_range(opt, grads, hi=CHUNK * 3)
            else:
                opt.step(grads)
        found = everything(opt)
        for group in found["groups"]:
            group["arrays"].pop("sums", None)
        return found

    want = run()
    for other in (run(2), run(7), run(ranges=True), run(arraywise=True), run(3, arraywise=True, order=-1),
                  run(batches=True)):  # fmt: skip
        assert_same(other, want)


# --- rows of tables ----------------------------------------------------------------------------------------------------

TABLES = [(300, 5), (60, 3, 7), (12, 600), (6, 2, 1100)]


def tables(rng, formats):
    return [allocate(rng, math.prod(s), formats)[0].reshape(s) for s in TABLES]


def row_gradients(rng):
    given, full = [], []
    for s in TABLES:
        i = np.sort(rng.choice(s[0], s[0] // 3, replace=False))
        v = rng.normal(size=(len(i), *s[1:])).astype("float32")
        given.append(ac.Rows(i, v))
        full.append(np.zeros(s, "float32"))
        full[-1][i] = v
    return given, full


@MODES
@pytest.mark.parametrize("formats", [{}, *(f for f in FORMATS if f.get("state_dtype") != "uint8")], ids=str)
@pytest.mark.parametrize("arraywise", [False, True], ids=["whole", "arraywise"])
def test_exact_rows_have_the_bits_of_dense_steps(formats, mode, arraywise):
    rng = np.random.default_rng(3)
    options = {"lr": 0.1, "sum_to_one": mode, "bounds": (0, None), "ema_decay": 0.9, **shared(formats)}
    params = tables(rng, formats)
    dense = ac.AdamW([x.copy() for x in params], **options)
    opts = [ac.AdamW([x.copy() for x in params], rows="exact", n_threads=n, **options) for n in (1, 3)]
    for t in range(8):
        given, full = row_gradients(rng)
        dense.step(full)
        for opt in opts:
            if arraywise:
                with opt.stepping() as now:
                    for i, g in enumerate(given):
                        now(i, full[i] if t == 5 else g)
            else:
                opt.step(full if t == 5 else given)
        if t == 3:
            opts[0].catch_up(2, given[2].indices)
    for opt in opts:
        opt.catch_up()
        for a, b in zip(everything(opt)["groups"], everything(dense)["groups"], strict=True):
            assert_same(a["arrays"], b["arrays"])
            assert_same(a["params"], b["params"])


@MODES
@pytest.mark.parametrize("formats", [{}, *FORMATS], ids=str)
def test_lazy_rows_change_their_own_rows_alone(formats, mode):
    rng = np.random.default_rng(4)
    params = tables(rng, formats)
    options = {"lr": 0.1, "sum_to_one": mode, "bounds": (0, None), **shared(formats)}
    dense, opt = (ac.AdamW([x.copy() for x in params], n_threads=2, **options) for _ in range(2))
    given, full = row_gradients(rng)
    opt.step(given)
    dense.step(full)
    for before, one, other, rows in zip(params, opt.param_groups[0]["params"], dense.param_groups[0]["params"], given,
                                        strict=True):  # fmt: skip
        assert_same_bits(one[rows.indices], other[rows.indices])
        rest = np.setdiff1d(np.arange(len(before)), rows.indices)
        assert_same_bits(one[rest], before[rest])


def test_rows_of_one_dimension_are_refused():
    for rows in ("lazy", "exact"):
        p = np.full(5, 0.2)
        opt = ac.SGD(p, sum_to_one=True, rows=rows)
        for call in (opt.step, opt.accumulate):
            with pytest.raises(
                ValueError, match="grads is one of rows, but sum_to_one makes its parameter, of one dimension"
            ):
                call(ac.Rows(np.array([1]), np.ones(1)))
        assert (p == 0.2).all()
        assert opt.t == 0


def test_missed_steps_are_replayed_with_the_sum_of_their_time():
    rng = np.random.default_rng(5)
    params = tables(rng, {})
    dense = ac.AdamW([x.copy() for x in params], lr=0.1)
    opt = ac.AdamW([x.copy() for x in params], lr=0.1, rows="exact")
    for mode in (False, "project", True, "divide", False):
        for one in (dense, opt):
            one.param_groups[0]["sum_to_one"] = mode
            assert one.param_groups[0]["sum_to_one"] == ("divide" if mode is True else mode)
        for _ in range(2):
            given, full = row_gradients(rng)
            opt.step(given)
            dense.step(full)
    opt.catch_up()
    assert_same(opt.param_groups[0]["params"], dense.param_groups[0]["params"])


# --- what stays as it is -----------------------------------------------------------------------------------------------

ODD = [[0.0, 0.0, 0.0], [-1.0, 0.5, 0.5], [-2.0, 0.5, 0.5], [np.nan, 0.5, 0.5], [np.inf, 0.5, 0.5], [-np.inf, 1.0, 2.0],
       [np.inf, -np.inf, 1.0], [3e38, 3e38, 1.0], [0.0, 0.0, 1e-45], [-0.0, 2.0, 2.0], [3.0, -1.0, 0.0]]  # fmt: skip


@MODES
@DTYPES
def test_odd_rows(mode, dtype):
    with np.errstate(all="ignore"):
        start = np.array(ODD).astype(dtype)
    if dtype == "float64":
        start[7] = [1.7e308, 1.7e308, 1.0]
    p = start.copy()
    ac.SGD(p, lr=0.0, sum_to_one=mode).step(np.zeros_like(p))
    assert_same_bits(p, summing(start, mode))
    kept = {"divide": [0, 1, 2, 3, 4, 5, 6, 7], "project": [3, 4, 5, 6, 7]}[mode]
    kept = [i for i in kept if mode == "divide" or dtype == "float64" or i != 7]  # 6e38 is a finite double
    assert_same_bits(p[kept], start[kept])
    rest = [i for i in range(len(p)) if i not in kept]
    np.testing.assert_allclose(p[rest].sum(1), 1, rtol=1e-6)
    if mode == "project":
        assert (p[rest] >= 0).all()
        np.testing.assert_allclose(p[0], 1 / 3, rtol=1e-6)
        assert p[10].tolist() == [1, 0, 0]


def by_sorting(v):
    """Duchi, Shalev-Shwartz, Singer and Chandra 2008, Figure 1; a common shift changes nothing but the rounding."""
    v = v.astype("longdouble") - v.max()
    u = np.sort(v)[::-1]
    sums = np.cumsum(u)
    j = np.arange(1, v.size + 1)
    rho = np.flatnonzero(u - (sums - 1) / j > 0)[-1]
    return np.maximum(v - (sums[rho] - 1) / (rho + 1), 0)


@settings(max_examples=200)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40), st.sampled_from(["float32", "float64"]))
def test_the_projection_is_the_one_of_duchi(values, dtype):
    p = np.array(values, dtype)
    start = p.copy()
    ac.SGD(p, lr=0.0, sum_to_one="project").step(np.zeros_like(p))
    np.testing.assert_allclose(
        p, by_sorting(start).astype("float64"), rtol=2e-7, atol=1e-6 if dtype == "float32" else 1e-9
    )
    assert_same_bits(p, summing(start, "project"))
    assert abs(p.sum(dtype="float64") - 1) < 1e-6


@MODES
@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e3, 1e30], ids=str)
def test_rows_that_many_chunks_have(scale, mode):
    rng = np.random.default_rng(6)
    p = (rng.exponential(size=(2, 300_003)) * scale).astype("float32")
    want = summing(p, mode)
    for n in (1, 2):
        q = p.copy()
        ac.SGD(q, lr=0.0, sum_to_one=mode, n_threads=n).step(np.zeros_like(q))
        assert_same_bits(q, want)
    np.testing.assert_allclose(want.sum(1, dtype="float64"), 1, rtol=1e-6)
    if mode == "project":
        np.testing.assert_allclose(want[0], by_sorting(p[0]).astype("float64"), rtol=1e-4, atol=1e-12)


# --- with the rest -----------------------------------------------------------------------------------------------------


@MODES
@pytest.mark.parametrize("formats", [{}, *FORMATS], ids=str)
def test_it_is_undone_saved_and_resumed(tmp_path, formats, mode):
    rng = np.random.default_rng(7)
    p, _ = allocate(rng, sum(SIZES), formats)
    options = {"lr": 0.1, "sum_to_one": mode, "bounds": (0, None), **shared(formats)}
    opt = ac.AdamW(parts_of(p), keep_undo=True, **options)
    g = [parts_of(x) for x in gradients(rng, sum(SIZES), "float32", 3)]
    opt.step(g[0])
    before = everything(opt)
    opt.step(g[1])
    opt.rollback()
    assert_same(everything(opt), before)
    opt.save(tmp_path / "x")
    again = ac.AdamW(parts_of(p), lr=0.5, **shared(formats))
    again.load(tmp_path / "x")
    assert again.param_groups[0]["sum_to_one"] == mode
    for one in (opt, again):
        one.step(g[2])
    assert_same(everything(again), everything(opt))


def test_a_block_that_raises_is_undone():
    p, _ = allocate(np.random.default_rng(8), sum(SIZES), {})
    opt = ac.AdamW(parts_of(p), keep_undo=True, state_dtype="uint8", sum_to_one=True)
    before = everything(opt)

    def go():
        with opt.stepping() as now:
            for i in (1, 8, 9):
                now(i, np.ones(SHAPES[i], "float64" if i == 9 else "float32"))

    with pytest.raises(TypeError, match="has dtype float64"):
        go()
    assert_same(everything(opt), before)


def test_groups_and_arrays_without_a_gradient():
    rng = np.random.default_rng(9)
    q, f, other = rng.random((50, 3)), rng.random((700, 11)), rng.random(3)
    start = [x.copy() for x in (q, f, other)]
    opt = ac.SGD([{"params": [q, f], "sum_to_one": True}, {"params": other}], lr=0.1)
    g = rng.random((700, 11))
    opt.step([[None, g], np.ones(3)])
    assert (q == start[0]).all()
    assert_same_bits(f, summing(start[1] - 0.1 * g, "divide"))
    assert_same_bits(other, start[2] - 0.1)


@pytest.mark.parametrize("value", ["softmax", 1, None, 0.5], ids=str)
def test_other_values_are_refused(value):
    opt = ac.SGD(np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"sum_to_one must be 'divide' or 'project', got .*; or True, or False"):
        opt.param_groups[0]["sum_to_one"] = value
    with pytest.raises(ValueError, match="sum_to_one must be"):
        ac.SGD(np.ones((2, 3)), sum_to_one=value)
    assert opt.param_groups[0]["sum_to_one"] is False


def test_arrays_without_a_last_axis_are_refused():
    with pytest.raises(ValueError, match=r"sum_to_one='divide' needs a last axis, and params\['b'\] has no dimensions"):
        ac.SGD({"a": np.ones(3), "b": np.array(1.0)}, sum_to_one=True)
    opt = ac.SGD([{"params": np.ones(3)}, {"params": [np.ones(3), np.array(1.0)]}])
    opt.param_groups[0]["sum_to_one"] = "project"
    with pytest.raises(ValueError, match=r"^param_groups\[1\]: sum_to_one='project' needs .* params\[1\] has no dim"):
        opt.param_groups[1]["sum_to_one"] = "project"
    with pytest.raises(ValueError, match=r"^params\[2\]: sum_to_one='divide' needs a last axis, and params has"):
        opt.add_param_group({"params": np.array(1.0), "sum_to_one": True})
    assert len(opt.param_groups) == 2


def test_a_range_that_cuts_a_row_is_refused():
    p = np.ones((3000, 3))
    opt = ac.SGD(p, sum_to_one=True)
    for lo, hi in ((CHUNK, -1), (0, CHUNK)):
        with pytest.raises(
            ValueError, match="a range can't end within a row that is to sum to one, as element 4096 is"
        ):
            step_range(opt, np.ones_like(p), lo=lo, hi=hi, count=False)
    assert (p == 1).all()


def test_what_it_takes():
    plain = ac.Adam(np.ones((100, 5), "float32"))
    wide = ac.Adam(np.ones((100, 5), "float32"), sum_to_one=True)
    half = {"master": "float32"}, {"rounding": "stochastic"}
    master, rounded = (ac.Adam(np.ones((100, 5), "float16"), sum_to_one=True, **x) for x in half)
    assert wide.nbytes == plain.nbytes
    assert master.nbytes == rounded.nbytes == plain.nbytes + 4 * 500


@pytest.mark.later("torch")
def test_a_tensor_can_not_have_it():
    import torch

    from adaptive_c.torch import SGD

    with pytest.raises(TypeError, match="no argument 'sum_to_one' for tensors: it is for arrays"):
        SGD([torch.nn.Parameter(torch.ones(2, 3))], lr=0.1, sum_to_one=True)


@pytest.mark.parametrize("way", ["load", "assign"])
def test_its_memory_is_there_before_anything_is_written(way, monkeypatch):
    """With stochastic rounding it needs some: a load that switches it on and gets none changes nothing."""
    rng = np.random.default_rng(0)

    def make(lr, mode):
        rows = rng.dirichlet(np.ones(5), 60).astype("float16")
        groups = [{"params": np.ones(7, "float16"), "lr": lr}, {"params": rows, "sum_to_one": mode}]
        made = ac.Adam(groups, rounding="stochastic", keep_undo=True)
        made.step([np.ones(7, "float16"), rng.normal(size=(60, 5)).astype("float16")])
        return made

    saved, opt = make(0.2, True), make(0.1, False)
    before, state, empty = everything(opt), copy.deepcopy(saved.state_dict()), np.empty

    def too_large(shape, *args, **more):
        if shape == 300:
            raise MemoryError
        return empty(shape, *args, **more)

    monkeypatch.setattr(np, "empty", too_large)
    assign = opt.param_groups[1].__setitem__
    call = (lambda: opt.load_state_dict(state)) if way == "load" else (lambda: assign("sum_to_one", True))
    with pytest.raises(MemoryError):
        call()
    monkeypatch.undo()
    assert_same(everything(opt), before)
    opt.rollback()  # there is still what undoes the step
    opt.load_state_dict(state)
    assert opt.param_groups[1]["sum_to_one"] == "divide"

"""Rows: a gradient of a few rows steps these as a dense one would, and leaves everything else alone."""

import copy
import functools
import pickle

import numpy as np
import pytest
from cases import IDS, PAIRS
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    CHUNK,
    assert_same,
    assert_same_bits,
    build,
    child,
    everything,
    gradients,
    random_state,
    spec,
    step_range,
)
from test_formats import allocate, every_format, every_rule, shared

import adaptive_c as ac
from adaptive_c import reference

SHAPES = [(90, 7), (40, 3, 5), (300,), (5, CHUNK + 9), (3000, 8)]


def draw(rng, shape, dtype, k=None, form="plain"):
    """Rows of a random kind: with duplicates, with bags, with weights, in any integer type."""
    k = max(1, shape[0] // 3) if k is None else k
    indices = rng.integers(0, shape[0], k).astype(rng.choice(["int32", "int64"]))
    wide = "float64" if dtype == "float64" else "float32"
    offsets = weights = None
    if form in ("bags", "weighted"):
        offsets = np.concatenate([[0], np.sort(rng.integers(0, k + 1, 4))]).astype(rng.choice(["int32", "int64"]))
    if form in ("weighted", "weights"):
        weights = rng.normal(size=k).astype(wide)
    n = k if offsets is None else len(offsets)
    values = gradients(rng, int(np.prod(shape[1:])) * n, wide, 1)[0].reshape((n, *shape[1:]))
    return ac.Rows(indices, values, offsets=offsets, weights=weights)


def dense(rows, shape, dtype):
    return reference.sum_rows(shape, dtype, rows.indices, rows.values, rows.offsets, rows.weights)


@functools.cache  # the reference sums number by number in Python
def of_every_form(shape, dtype):
    """Rows of each form, with what the reference sums of them; the tests write into none of it."""
    rng = np.random.default_rng(7)
    drawn = [(form, draw(rng, shape, dtype, form=form)) for form in ("plain", "bags", "weights", "weighted")]
    return [(form, rows, *dense(rows, shape, dtype)) for form, rows in drawn]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
def test_rows_have_the_bits_of_the_reference(name, options, dtype):
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        p = rng.normal(size=shape).astype(dtype)
        opt = build(name, p, options, n_threads=3)
        state = random_state(opt, rng)
        want = p.copy()
        for t, (form, rows, g, touched) in enumerate(of_every_form(shape, dtype), 11):
            before = [x.copy() for x in (rows.indices, rows.values)]
            opt.step(rows)
            part = {key: x[touched] if np.ndim(x) else x for key, x in state.items()}
            want[touched] = spec(name)(want[touched], g[touched], part, t, **options)
            for key, x in part.items():
                if np.ndim(state[key]):
                    state[key][touched] = x
                else:
                    state[key] = x
            assert_same_bits(p, want, f"p, {shape}, {form}")
            for key, live in opt.state.items():
                if key not in ("step", "mu_product"):
                    assert_same_bits(live.astype(dtype), np.broadcast_to(state[key], live.shape).astype(dtype), key)
            assert_same([rows.indices, rows.values], before)
        assert opt.t == 14


def check_against_dense(make, shape, steps, formats=None):
    """Steps by rows, and from the same state the dense step of the sums: what is touched has its bits; the rest stays.

    formats: whether state is stored in 8 bits, of which whole blocks of 256 elements may change.
    """
    opt, twin = make(3), make(2)
    for rows, metric in steps:
        twin.load_state_dict(opt.state_dict())
        for to, x in zip(twin.param_groups[0]["params"], opt.param_groups[0]["params"], strict=True):
            np.copyto(to, x)
        before = everything(opt)
        g, touched = dense(rows, shape, "float64" if opt.param_groups[0]["params"][0].dtype == "float64" else "float32")
        opt.step([rows, None], **metric)
        twin.step([g, None], **metric)
        now, whole = everything(opt), everything(twin)
        assert now["t"] == whole["t"]
        assert opt.grad_norm == twin.grad_norm or opt.max_grad_norm is None
        a, b, old = now["groups"][0], whole["groups"][0], before["groups"][0]
        size = int(np.prod(shape))
        mask = np.zeros(len(a["params"]), bool)
        mask[:size] = np.repeat(touched, size // shape[0])
        rows = np.zeros(shape[0] + len(mask) - size, bool)  # of one number for each row; those beside have one element
        rows[: shape[0]] = touched
        blocks = np.repeat(np.logical_or.reduceat(mask, np.arange(0, len(mask), 256)), 256)[: len(mask)]
        flats = {"params": None, "copies": None, **a["arrays"]}
        for key in flats:
            x, y, z = (d[key] if key in ("params", "copies") else d["arrays"][key] for d in (a, b, old))
            if x is not None and len(x) == len(rows):
                assert_same_bits(x[rows], y[rows], key)
                assert_same_bits(x[~rows], z[~rows], f"{key}, which was not touched")
            if x is None or len(x) != len(mask):
                continue
            coded = formats == "uint8" and x.dtype in ("uint8", "int8")
            if not coded:
                assert_same_bits(x[mask], y[mask], key)
            still = ~(blocks if coded else mask)
            assert_same_bits(x[still], z[still], f"{key}, which was not touched")


STAGES = {"max_grad_norm": 0.7, "max_grad_value": 0.5, "bounds": (-1.0, 1.2), "ema_decay": 0.9, "loss_scale": 4.0}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
def test_every_stage_and_an_array_beside(name, options, dtype):
    rng = np.random.default_rng(1)
    shape = (150, 33)
    values = rng.normal(size=shape).astype(dtype), rng.normal(size=50).astype(dtype)

    def make(n_threads):
        p = [x.copy() for x in values]
        return build(name, p, options, n_threads=n_threads, copy_to=[x.astype("float32") for x in p],
                     on_nonfinite="raise", **STAGES)  # fmt: skip

    steps = [(draw(rng, shape, dtype, form=form), {}) for form in ("plain", "bags", "weighted")]
    check_against_dense(make, shape, steps)


@every_format
@every_rule
def test_narrow_numbers(name, options, formats):
    rng = np.random.default_rng(2)
    shape = (120, 40)
    first, _ = allocate(rng, shape[0] * shape[1], formats)
    second, _ = allocate(rng, 77, formats)

    def make(n_threads):
        params = [first.copy().reshape(shape), second.copy()]
        return build(name, params, options, n_threads=n_threads, ema_decay=0.9, seed=3, **shared(formats))

    steps = []
    for form in ("plain", "bags", "weighted"):
        rows = draw(rng, shape, "float32", form=form)
        rows.values.clip(-10, 10, out=rows.values)
        steps.append((rows, {}))
    check_against_dense(make, shape, steps, make(1).param_groups[0]["state_dtype"])


@settings(max_examples=100)
@given(st.data())
def test_any_rows_of_any_table(data):
    """Bits depend neither on threads nor on the order of the rows, but for that of the entries of one row."""
    n, width = data.draw(st.integers(1, 40)), data.draw(st.sampled_from([1, 2, 64, 300, 5000]))
    indices = data.draw(st.lists(st.integers(0, n - 1), max_size=80))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    values = rng.normal(size=(len(indices), width)).astype("float32")
    turn = rng.permutation(n)  # the rows in another order, each with its entries in theirs
    shuffled = np.array(sorted(range(len(indices)), key=lambda j: (turn[indices[j]], j)), int)
    start = rng.normal(size=(n, width)).astype("float32")
    state_dtype = data.draw(st.sampled_from([None, "bfloat16", "uint8"]))
    found = []
    for n_threads, take in ((1, slice(None)), (4, shuffled)):
        p = start.copy()
        opt = ac.AdamW(p, state_dtype=state_dtype, n_threads=n_threads, max_grad_norm=1.0)
        for _ in range(2):
            opt.step(ac.Rows(np.asarray(indices, "int64")[take], np.ascontiguousarray(values[take])))
        found.append(everything(opt))
    assert_same(*found)


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_values_in_narrow_formats(kind):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = {"float16": "float16", "bfloat16": ml_dtypes.bfloat16}[kind]
    rng = np.random.default_rng(3)
    values = rng.normal(size=(6, 5)).astype(dtype)
    indices = np.array([3, 0, 3, 9, 0, 3])
    a, b = np.ones((10, 5), "float32"), np.ones((10, 5), "float32")
    ac.Adam(a).step(ac.Rows(indices, values))
    ac.Adam(b).step(ac.Rows(indices, values.astype("float32")))
    assert_same_bits(a, b)
    if kind == "bfloat16":
        c = np.ones((10, 5), "float32")
        ac.Adam(c, uint16_as="bfloat16").step(ac.Rows(indices, values.view("uint16")))
        assert_same_bits(a, c)


def test_structures_and_counts():
    p = {"table": np.ones((6, 2)), "bias": np.ones(2), "other": np.ones((3, 2))}
    opt = ac.Adam([{"params": p}, {"params": np.ones((4, 1))}], lr=0.1)
    rows = ac.Rows(np.array([5, 1]), np.ones((2, 2)))
    opt.step([{"table": rows, "bias": np.ones(2), "other": None}, ac.Rows(np.array([0]), np.ones((1, 1)))])
    assert (p["table"][[0, 2, 3, 4]] == 1).all()
    assert (p["table"][[1, 5]] < 1).all()
    assert (p["bias"] < 1).all()
    opt.step([{"table": ac.Rows(np.array([], "int32"), np.empty((0, 2))), "bias": None, "other": None}, None])
    assert [int(opt.state["step"][0][name]) for name in p] == [
        2,
        1,
        0,
    ]  # a gradient without rows is a step, as in torch
    assert opt.t == 2


def test_accumulated_rows_are_what_dense_sums_would_be():
    rng = np.random.default_rng(4)
    shape = (50, 6)
    start = rng.normal(size=shape)
    a, b = start.copy(), start.copy()
    opt, whole = ac.SGD([a], lr=0.1, max_grad_norm=3.0), ac.SGD([b], lr=0.1, max_grad_norm=3.0)
    for kinds in (["rows", "rows"], ["rows", "dense", "rows"], ["dense", "rows"], ["rows", None, "rows", "dense"]):
        for kind in kinds:
            if kind == "rows":
                rows = draw(rng, shape, "float64", form="weighted")
                opt.accumulate([rows])
                whole.accumulate([dense(rows, shape, "float64")[0]])
                rows.values[...] = np.nan  # it was copied
            else:
                g = None if kind is None else rng.normal(size=shape)
                opt.accumulate([g])
                whole.accumulate([g])
        opt.step()
        whole.step()
        assert opt.grad_norm == whole.grad_norm
        assert_same_bits(a, b)


def test_accumulated_rows_touch_no_others():
    p = np.ones((5, 2))
    opt = ac.AdamW(p, lr=0.1)
    opt.accumulate(ac.Rows(np.array([1, 3]), np.ones((2, 2))))
    opt.accumulate(ac.Rows(np.array([3]), np.ones((1, 2))))
    assert opt.pending == 2
    opt.step()
    assert (p[[0, 2, 4]] == 1).all()
    assert (p[[1, 3]] < 0.95).all()
    opt.accumulate(ac.Rows(np.array([0]), np.ones((1, 2))))
    opt.discard()
    before = p.copy()
    opt.accumulate(ac.Rows(np.array([2]), np.ones((1, 2))))
    opt.step()
    assert_same_bits(p[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


def test_accumulated_rows_give_way_to_sums_that_are_loaded():
    opt, saved = (ac.SGD([np.ones((5, 2)), np.ones((3, 2))], lr=1.0) for _ in range(2))
    saved.accumulate([np.full((5, 2), 2.0), np.full((3, 2), 3.0)])
    opt.accumulate([ac.Rows(np.array([1]), np.ones((1, 2))), None])
    opt.load_state_dict(saved.state_dict())
    opt.step()
    saved.step()
    assert_same(everything(opt), everything(saved))


def test_a_call_of_accumulate_without_memory_for_sums_leaves_no_rows(monkeypatch):
    opt = ac.SGD([{"params": np.ones((5, 2))}, {"params": np.ones(3)}], lr=1.0, zero_grad=True)
    rows = ac.Rows(np.array([1]), np.ones((1, 2)))

    def refuse(*_, **__):
        raise MemoryError

    with monkeypatch.context() as patch:
        for name in ("empty", "zeros"):
            patch.setattr(np, name, refuse)
        with pytest.raises(MemoryError):
            opt.accumulate([rows, np.ones(3)])
    assert (rows.values == 1).all()
    assert opt.pending == 0
    opt.accumulate([None, np.ones(3)])
    assert opt.state_dict()["pending"] == 1  # refused where rows are pending


def test_a_call_of_accumulate_without_memory_to_join_rows_changes_nothing(monkeypatch):
    """Kept rows become part of a dense sum when a dense gradient comes, which is given again after the error."""
    optimizers = [ac.SGD([np.ones((5, 2)), np.ones((4, 2))], lr=1.0) for _ in range(2)]
    rows = [ac.Rows(np.array([i, 1]), np.full((2, 2), i + 0.5)) for i in range(2)]
    whole = [np.arange(10.0).reshape(5, 2), rows[1]]

    def refuse(*_, **__):
        raise MemoryError

    for opt in optimizers:
        for x in rows:
            opt.accumulate([x, x])
        with monkeypatch.context() as patch:
            patch.setattr(np, "concatenate", refuse)
            if opt is optimizers[0]:
                with pytest.raises(MemoryError):
                    opt.accumulate(whole)
        assert opt.pending == 2
        opt.accumulate(whole)
        opt.step()
    assert_same(*map(everything, optimizers))


@pytest.mark.parametrize("formats", [{}, {"state_dtype": "uint8"}, {"state_dtype": "bfloat16"}])
def test_stepping_has_the_same_bits(formats):
    rng = np.random.default_rng(5)
    shapes = [(33, 7), (20,), (1, 3), (200, 5)]
    params = [rng.normal(size=s).astype("float32") for s in shapes]
    opt, whole = (ac.AdamW([x.copy() for x in params], keep_undo=kept, **formats) for kept in (True, False))
    for _ in range(4):
        grads = [draw(rng, s, "float32", form="weighted") for s in shapes]
        grads[1] = rng.normal(size=20).astype("float32")
        whole.step(grads)
        before = everything(opt)
        for undone in (True, False):
            with opt.stepping() as now:
                for i in rng.permutation(4):
                    now(i, grads[i])
            if undone:
                opt.rollback()
                assert_same(everything(opt), before)
        assert_same(everything(opt), everything(whole))


def test_a_step_by_rows_is_undone():
    rng = np.random.default_rng(6)
    for formats in ({}, {"state_dtype": "uint8"}):
        p = [rng.normal(size=(2000, 9)).astype("float32"), rng.normal(size=5).astype("float32")]
        opt = ac.AdamW(p, keep_undo=True, ema_decay=0.5, copy_to=[x.copy() for x in p], **formats)
        for _ in range(3):
            before = everything(opt)
            rows = draw(rng, (2000, 9), "float32")
            opt.step([rows, None])
            opt.rollback()
            assert_same(everything(opt), before)
            opt.step([rows, np.ones(5, "float32")])


def test_zero_grad_zeroes_the_values():
    for step in (lambda opt, rows: opt.step(rows), lambda opt, rows: opt.accumulate(rows)):
        values = np.ones((2, 3))
        rows = ac.Rows(np.array([0, 0, 1]), values, offsets=np.array([0, 2]))
        p = np.ones((4, 3))
        opt = ac.SGD(p, lr=1.0, zero_grad=True)
        step(opt, rows)
        assert not values.any()
        if opt.pending:
            opt.step()
        assert (p[:2] == [[-1, -1, -1], [0, 0, 0]]).all()
    values = np.array([[np.inf]])
    opt = ac.SGD(np.ones((2, 1)), on_nonfinite="skip", zero_grad=True)
    opt.step(ac.Rows(np.array([1]), values))
    assert opt.skipped_steps == 1
    assert not values.any()


def test_zero_grad_zeroes_the_values_after_the_last_range():
    p = np.zeros((CHUNK, 2))
    rows = ac.Rows(np.array([0, CHUNK // 2 + 1]), np.ones((2, 2)))
    opt = ac.SGD(p, lr=1.0, zero_grad=True)
    step_range(opt, rows, hi=CHUNK, count=False)
    step_range(opt, rows, lo=CHUNK)
    assert (p[rows.indices] == -1).all()
    assert not rows.values.any()


def test_offsets_that_are_written_to_while_they_are_read(monkeypatch):
    offsets = np.array([0, 1])
    rows = ac.Rows(np.array([0, 1]), np.ones((2, 2)), offsets=offsets)
    diff = np.diff

    def interrupted(a, **more):
        offsets[0] = 1 if more else 0
        return diff(a, **more)

    monkeypatch.setattr(np, "diff", interrupted)
    p = np.ones((4, 2))
    with pytest.raises(ValueError, match="grads: its offsets were written to during the call"):
        ac.SGD(p).step(rows)
    assert (p == 1).all()


def test_non_finite_values_are_found_in_the_sums():
    p = np.ones((4, 2), "float32")
    opt = ac.SGD(p, on_nonfinite="raise")
    huge = np.full((2, 2), 3e38, "float32")
    with pytest.raises(ValueError, match=r"grads is inf at index \(3, 0\); nothing was changed"):
        opt.step(ac.Rows(np.array([3, 3]), huge))
    opt.accumulate(ac.Rows(np.array([2]), huge[:1]))
    opt.accumulate(ac.Rows(np.array([2]), huge[:1]))
    with pytest.raises(ValueError, match=r"the sum of grads is inf at index \(2, 0\)"):
        opt.step()
    assert (p == 1).all()


@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 1000])
def test_the_sort_is_stable(k):
    """Sums show the order: float32 has no room for the small one beside a large one."""
    rng = np.random.default_rng(k)
    n = 5_000_000 if k > 500 else 7
    indices = rng.integers(0, 7, k) * (n // 7)
    values = (rng.normal(size=(k, 1)) * 10.0 ** rng.integers(-8, 8, (k, 1))).astype("float32")
    p = np.zeros((n, 1), "float32")
    ac.SGD(p, lr=1.0).step(ac.Rows(indices, values))
    g, _ = reference.sum_rows((n, 1), "float32", indices, values)
    assert_same_bits(p, -g + 0)


def test_many_rows_in_little_memory():
    """A table of more than 2**32 rows, whose pages are touched where the rows are."""
    n = (1 << 32) + 5
    try:
        p = np.zeros(n, "float16")
    except MemoryError:
        pytest.skip("no room for the addresses of 8 GiB")
    rows = np.array([n - 1, 3, 1 << 31, n - 1, (1 << 32) + 1])
    opt = ac.SGD(p, lr=1.0, rounding="stochastic")
    opt.step(ac.Rows(rows, np.arange(1.0, 6.0, dtype="float32")))
    assert [float(p[i]) for i in (3, 1 << 31, (1 << 32) + 1, n - 1, 0, n - 2)] == [-2, -3, -5, -5, 0, 0]


# --- what is refused ---------------------------------------------------------------------------------------------------

ONES = np.ones((2, 3))
TWO = np.array([0, 1])


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (([0, 1], ONES), TypeError, r"indices must be a NumPy array, got a list; pass np.asarray\(x\)"),
        ((np.array([0.0, 1.0]), ONES), TypeError, r"indices must be int32 or int64, got float64"),
        ((TWO.astype("uint8"), ONES), TypeError, r"indices must be int32 or int64, got uint8"),
        ((TWO.astype(">i8"), ONES), TypeError, r"indices must be int32 or int64, got >i8 \(byte-swapped\)"),
        ((TWO[None], ONES), ValueError, r"indices must have one dimension, got shape \(1, 2\)"),
        ((np.arange(4)[::2], ONES), ValueError, r"indices must be C-contiguous; pass np.ascontiguousarray\(x\)"),
        ((TWO, ONES[:1]), ValueError, r"values must have one row for each of the 2 indices, got shape \(1, 3\)"),
        ((TWO, np.float64(1.0)), TypeError, r"values must be a NumPy array, got a float64"),
        ((TWO, np.array(1.0)), ValueError, r"values must have one row for each of the 2 indices, got shape \(\)"),
        ((TWO, np.ones((2, 6))[:, ::2]), ValueError, r"values must be C-contiguous"),
    ],
)
def test_arguments_that_do_not_fit_together(arguments, kind, message):
    with pytest.raises(kind, match=message):
        ac.Rows(*arguments)


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        ({"offsets": np.array([1, 2])}, ValueError, r"offsets\[0\] must be 0, got 1"),
        ({"offsets": np.array([0, 2, 1])}, ValueError, r"offsets must ascend, but offsets\[2\] is 1, after 2"),
        ({"offsets": np.array([0, 3])}, ValueError, r"offsets\[1\] is 3, more than the 2 indices"),
        ({"offsets": np.array([], int)}, ValueError, r"offsets has no bag for the 2 indices"),
        ({"offsets": [0]}, TypeError, r"offsets must be a NumPy array, got a list"),
        (
            {"offsets": np.array([0])},
            ValueError,
            r"values must have one row for each of the 1 bags, got shape \(2, 3\)",
        ),
        ({"weights": np.ones(3)}, ValueError, r"weights must have one number for each of the 2 indices, got 3"),
        ({"weights": np.ones(2, int)}, TypeError, r"weights must be float32 or float64, got int64"),
    ],
)
def test_bags_that_do_not_fit(more, kind, message):
    with pytest.raises(kind, match=message):
        ac.Rows(TWO, ONES, **more)


def test_a_parameter_that_they_do_not_fit():
    p = {"table": np.ones((4, 3)), "scalar": np.array(1.0), "none": np.ones((0, 3))}
    opt = ac.SGD(p, lr=1.0)
    nothing = dict.fromkeys(p)
    for key, rows, kind, message in [
        ("table", ac.Rows(np.array([0, 4, 9]), np.ones((3, 3))), ValueError,
         r"grads\['table'\]: indices\[1\] is 4; the array has 4 rows, 0 .. 3"),
        ("table", ac.Rows(np.array([0, -1], "int32"), ONES), ValueError, r"indices\[1\] is -1; the array has 4 rows"),
        ("table", ac.Rows(TWO, np.ones((2, 2))), ValueError,
         r"grads\['table'\] has values of shape \(2, 2\), its parameter \(4, 3\)"),
        ("table", ac.Rows(TWO, np.ones((2, 3, 1))), ValueError, r"has values of shape \(2, 3, 1\)"),
        ("table", ac.Rows(TWO, ONES.astype("float32")), TypeError, r"has dtype float32, its parameter float64"),
        ("table", ac.Rows(TWO, p["table"][:2]), ValueError, r"grads\['table'\] shares memory with params\['table'\]"),
        ("table", ac.Rows(TWO, ONES, weights=np.ones(2, "float32")), TypeError,
         r"grads\['table'\]: weights are float32, but must be float64"),
        ("scalar", ac.Rows(TWO, np.ones(2)), ValueError, r"is one of rows, but its parameter has no dimensions"),
        ("none", ac.Rows(TWO, ONES), ValueError, r"indices\[0\] is 0; the array has 0 rows"),
    ]:  # fmt: skip
        before = everything(opt)
        for call in (opt.step, opt.accumulate):
            with pytest.raises(kind, match=message):
                call({**nothing, key: rows})
        assert_same(everything(opt), before)
    rows = ac.Rows(TWO, ONES, offsets=TWO.copy())
    rows.offsets[1] = -5  # changed since it was checked
    with pytest.raises(ValueError, match=r"offsets must ascend, but offsets\[1\] is -5, after 0"):
        opt.step({**nothing, "table": rows})
    assert_same(everything(opt), before)


def test_what_it_shows():
    assert repr(ac.Rows(TWO, ONES)) == "Rows(2 indices, values of shape (2, 3), float64)"
    assert repr(ac.Rows(TWO, ONES[:1], offsets=TWO[:1])) == "Rows(2 indices in 1 bags, values of shape (1, 3), float64)"
    assert len(ac.Rows(TWO, ONES)) == 2


@pytest.mark.parametrize("form", ["plain", "bags", "weighted", "weights"])
def test_pickled_and_copied(form):
    """As gradients are sent from one process to another: the same numbers, and a gradient with the same bits."""
    rows = draw(np.random.default_rng(2), (9, 4), "float64", 5, form)
    own = [pickle.loads(pickle.dumps(rows, protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)]
    for again in (*own, copy.deepcopy(rows), copy.copy(rows), joined(rows)):
        assert type(again) is ac.Rows
        for name in ("indices", "values", "offsets", "weights"):
            assert_same(getattr(again, name), getattr(rows, name))
        p, q = np.ones((9, 4)), np.ones((9, 4))
        ac.Adam(p).step(rows)
        ac.Adam(q).step(again)
        assert_same_bits(p, q)
    assert copy.copy(rows).values is rows.values
    assert copy.deepcopy(rows).values is not rows.values
    assert b"adaptive_c._v" not in pickle.dumps(rows)  # another machine may load another build
    assert b"_baseline" not in pickle.dumps(rows)


def joined(rows):
    """What comes back from another process, which has not used an optimizer."""
    sent = pickle.dumps(rows).hex()
    return pickle.loads(
        bytes.fromhex(child(f"import pickle; print(pickle.dumps(pickle.loads(bytes.fromhex('{sent}'))).hex())"))
    )


def test_all_arrays_in_their_order():
    indices, values = np.array([1, 0, 1]), np.ones((2, 4))
    offsets, weights = np.array([0, 2]), np.array([1.0, 2.0, 3.0])
    assert_same_bits(ac.Rows(indices, values, offsets, weights).weights, weights)
    p, q = np.ones((9, 4)), np.ones((9, 4))
    ac.SGD(p).step(ac.Rows(indices, values, offsets))
    ac.SGD(q).step(ac.Rows(indices, values, offsets=offsets))
    assert_same_bits(p, q)
    with pytest.raises(TypeError, match="offsets must be int32 or int64, got float64"):
        ac.Rows(indices, np.ones((3, 4)), weights)

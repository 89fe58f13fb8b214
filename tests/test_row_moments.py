"""second_moment="row": one second moment for each row, the mean of its squared gradient."""

import os
import subprocess
import sys

import numpy as np
import pytest
import test_rollback
import test_stepping
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    CHUNK,
    OTHER_BUILDS,
    assert_same,
    assert_same_bits,
    break_off,
    build,
    everything,
    gradients,
    spec,
    step_range,
)
from test_formats import Composition, allocate, every_format, shared

import adaptive_c as ac
from adaptive_c import reference

# (class, options): each denominator, and each loop with one
RULES = [
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.3}),
    ("Adagrad", {"lr": 0.1, "weight_decay": 0.05, "eps": 1e-3, "eps_mode": "inside", "maximize": True}),
    ("RMSprop", {"lr": 0.1, "alpha": 0.9, "weight_decay": 0.05}),
    ("RMSprop", {"lr": 0.1, "momentum": 0.9, "eps": 1e-3, "eps_mode": "hat"}),
    ("Adam", {"lr": 0.1, "weight_decay": 0.05, "maximize": True}),
    ("Adam", {"lr": 0.1, "amsgrad": True, "eps": 1e-3, "eps_mode": "inside"}),
    ("AdamW", {"lr": 0.1, "weight_decay": 0.05, "eps_mode": "hat"}),
]
every_rule = pytest.mark.parametrize(("name", "options"), [(n, {**o, "second_moment": "row"}) for n, o in RULES],
                                     ids=[f"{n}-{'-'.join(o)}" for n, o in RULES])  # fmt: skip
# Rows of many lengths, which chunks, tiles, vectors and threads cut in every way; rows of one element, and of none.
SHAPES = [(90, 7), (700, 64), (40, 3, 5), (300,), (3, CHUNK + 9), (2, 5 * CHUNK), (1, 20_001), (), (4, 1), (5, 0),
          (0, 5), (30, 999)]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_rule
def test_dense_steps_have_the_bits_of_the_reference(name, options, dtype):
    rng = np.random.default_rng(0)
    params = [np.asarray(rng.normal(size=shape)).astype(dtype) for shape in SHAPES]
    runs = []
    for n_threads in (1, 2, 5):
        own = [x.copy() for x in params]
        runs.append((own, build(name, own, options, n_threads=n_threads)))
    want, states = [x.copy() for x in params], [{} for _ in params]
    for t in range(1, 5):
        grads = [gradients(rng, x.size, dtype, 1)[0].reshape(x.shape) for x in params]
        for _, opt in runs:
            opt.step(grads)
        want = [np.asarray(spec(name)(x, g, s, t, **options)) for x, g, s in zip(want, grads, states, strict=True)]
    for own, opt in runs:
        for j, (x, y) in enumerate(zip(own, want, strict=True)):
            assert_same_bits(x, y, f"{SHAPES[j]}, {opt.n_threads} threads")
        for key in opt.state:
            for j, s in enumerate(states) if key != "step" else ():
                live = opt.state[key][j]
                assert_same_bits(live, np.broadcast_to(s[key], live.shape).astype(dtype), f"{key} {SHAPES[j]}")
        v = next(key for key in opt.state if "sq" in key or key == "sum")
        assert_same(opt.decoded_state(v), opt.state[v])
        assert [x.shape for x in opt.state[v]] == [x.shape[:1] + (1,) * (x.ndim - 1) for x in params]


TALL = [(90, 7), (11, 700), (300,), (3, CHUNK + 9), (2, 3, 100)]  # rows of one piece and of several


def tall(rng, dtype, n=1):
    """n lists of arrays of these shapes."""
    return [[np.asarray(rng.normal(size=shape)).astype(dtype) for shape in TALL] for _ in range(n)]


@pytest.mark.parametrize("level", OTHER_BUILDS)
def test_every_instruction_set_gives_the_same_bits(level, tmp_path):
    script = (
        "import sys, numpy as np; sys.path.insert(0, sys.argv[1])\n"
        "from test_row_moments import some_steps; from adaptive_c import _native\n"
        "assert _native.isa == sys.argv[2]\n"
        "np.savez(sys.argv[3], *some_steps())"
    )
    out = tmp_path / "out.npz"
    subprocess.run([sys.executable, "-c", script, os.path.dirname(__file__), level, out], check=True,
                   env={**os.environ, "ADAPTIVE_C_ISA": level}, cwd=tmp_path)  # fmt: skip
    with np.load(out) as got:
        for i, x in enumerate(some_steps()):
            assert_same_bits(got[f"arr_{i}"], x, f"{level} {i}")


def some_steps():
    found = []
    for name, options in RULES:
        for dtype in ("float32", "float64"):
            rng = np.random.default_rng(1)
            (params,) = tall(rng, dtype)
            opt = build(name, params, {**options, "second_moment": "row"}, n_threads=2)
            for g in tall(rng, dtype, 3):
                opt.step(g)
            found += params
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_moment_is_of_the_gradient_that_the_rule_sees(dtype):
    """Unscaled, clipped and clamped before; the coupled decay is part of it, as the reference has it."""
    rng = np.random.default_rng(2)
    (params,) = tall(rng, dtype)
    opts = [build("Adam", [x.copy() for x in params], {"weight_decay": 0.1, "second_moment": "row"}, n_threads=n, **more)
            for n, more in ((3, {"loss_scale": 4.0, "max_grad_value": 0.05, "max_grad_norm": 20.0}), (1, {}))]  # fmt: skip
    for g in tall(rng, dtype, 3):
        opts[0].step([4 * x for x in g])
        k = np.float64(20.0 / (opts[0].grad_norm + 1e-6)).astype(dtype)
        assert k < 0.5
        opts[1].step([np.clip(k * x, *np.array([-0.05, 0.05], dtype)) for x in g])
        for x, y in zip(*(opt.param_groups[0]["params"] for opt in opts), strict=True):
            assert_same_bits(x, y)


def test_arrays_clipped_by_themselves_and_gradients_that_are_views():
    rng = np.random.default_rng(12)
    (params,) = tall(rng, "float32")
    options = {"weight_decay": 0.1, "second_moment": "row", "max_grad_norm": 1.0}
    whole = ac.Adam([x.copy() for x in params], norm_over="array", cast=True, n_threads=3, **options)
    alone = [ac.Adam(x.copy(), **options) for x in params]
    for g in tall(rng, "float32", 2):
        whole.step([np.asfortranarray(x) for x in g])
        for opt, x in zip(alone, g, strict=True):
            opt.step(x)
    for x, opt in zip(whole.param_groups[0]["params"], alone, strict=True):
        assert_same_bits(x, opt.param_groups[0]["params"])


def test_rows_that_sum_to_one():
    rng = np.random.default_rng(13)
    start = rng.random((40, 700)).astype("float32")
    found = []
    for n_threads, more in ((1, {"sum_to_one": "divide"}), (3, {"sum_to_one": "divide"}), (2, {})):
        p = start / start.sum(1, keepdims=True)
        opt = ac.Adam(p, lr=1e-4, bounds=(1e-9, None), second_moment="row", n_threads=n_threads, **more)
        opt.step(start - 0.5)
        found.append((p, opt.state["exp_avg_sq"]))
    assert_same(found[0], found[1])
    assert_same_bits(found[0][1], found[2][1])
    plain = found[2][0].astype("float64")
    np.testing.assert_allclose(found[0][0], plain / plain.sum(1, keepdims=True), rtol=1e-6)


@every_rule
def test_rows_of_one_element_are_elements(name, options):
    rng = np.random.default_rng(3)
    start = [rng.normal(size=shape) for shape in ((50,), (30, 1), (7, 1, 1), ())]
    found = []
    for kind in ("row", "element"):
        p = [np.asarray(x).copy() for x in start]
        opt = build(name, p, {**options, "second_moment": kind})
        for k in range(3):
            opt.step([np.asarray(x * (k - 1.5)) for x in start])
        found.append((p, opt.state_dict()["groups"][0]["arrays"]))
    assert_same(*found)


class ByRow(Composition):
    """The step of arrays of several shapes put together from the reference."""

    def rule(self, p, g, s):
        at = row = 0
        parts, states = [], []
        for shape in TALL:
            n, rows = int(np.prod(shape)), shape[0]
            part = {key: x[row : row + rows].reshape((rows,) + (1,) * (len(shape) - 1)) if key in self.moments
                    else x[at : at + n].reshape(shape) for key, x in s.items()}  # fmt: skip
            here = slice(at, at + n)
            parts.append(spec(self.name)(p[here].reshape(shape), g[here].reshape(shape), part, self.t, **self.options))
            states.append(part)
            at, row = at + n, row + rows
        s.update({key: np.concatenate([np.ravel(x[key]) for x in states]) for key in states[0]})
        return np.concatenate([x.ravel() for x in parts])

    def put(self, name, x, words):
        if name in self.moments and x.size == self.p.size:  # what it starts at
            x = x[: sum(shape[0] for shape in TALL)]
        super().put(name, x, words)


def cut(flat):
    """Arrays of these shapes from a flat one."""
    ends = np.cumsum([0, *(int(np.prod(shape)) for shape in TALL)])
    return [flat[a:b].reshape(shape).copy() for a, b, shape in zip(ends, ends[1:], TALL, strict=False)]


def narrow(rng, formats):
    p, _ = allocate(rng, sum(int(np.prod(shape)) for shape in TALL), formats)
    return p


@every_format
@every_rule
def test_narrow_numbers_beside_moments_that_are_not(name, options, formats):
    rng = np.random.default_rng(4)
    p = narrow(rng, formats)
    parts = cut(p)
    opt = build(name, parts, options, seed=3, n_threads=2, **shared(formats))
    want = ByRow(name, options, formats, p.copy(), seed=3)
    for g in gradients(rng, p.size, "float32", 3):
        g = g.clip(-10, 10)
        opt.step(cut(g))
        want.step(g)
        want.check(opt, parts)


@every_format
@every_rule
def test_undone_and_stepped_array_by_array(name, options, formats):
    """Arrays share blocks of 8-bit state, and rows lie in blocks of both kinds."""
    rng = np.random.default_rng(5)
    p = narrow(rng, formats)

    def more(**options):
        return {"ema_decay": 0.9, "seed": 5, **shared(formats)}

    grads = [cut(g.clip(-10, 10)) for g in gradients(rng, p.size, "float32", 3)]
    test_rollback.check_rule(name, cut(p), grads, options, more)
    opt = build(name, cut(p), options, n_threads=3, keep_undo=True, **more())
    whole = build(name, cut(p), options, **more())
    test_stepping.check(opt, whole, grads, rng)
    before = everything(opt)
    with pytest.raises(LookupError):
        break_off(opt, grads[0], [1, 3, 0])
    assert_same(everything(opt), before)


@pytest.mark.parametrize("formats", [{"state_dtype": "uint8"}, {}])
def test_rows_within_a_block_of_stepping(formats):
    rng = np.random.default_rng(6)
    (params,) = tall(rng, "float32")
    opt, whole = (ac.Adam([x.copy() for x in params], weight_decay=0.1, second_moment="row", **formats) for _ in "ab")
    for _ in range(3):
        g = [ac.Rows(rng.integers(0, len(x), 5), rng.normal(size=(5, *x.shape[1:])).astype("float32")) for x in params]
        test_stepping.step_each(opt, g, rng)
        whole.step(g)
        assert_same(everything(opt), everything(whole))


# Rows of one piece, of several tiles, and longer than a chunk
@pytest.mark.parametrize("shape", [(40, 64), (9, 1500), (3, 2 * CHUNK + 5), (1, 40_000)], ids=str)
@pytest.mark.parametrize("formats", [{}, {"state_dtype": "bfloat16"}, {"state_dtype": "uint8"}], ids=str)
@every_rule
def test_gradients_of_rows(name, options, shape, formats):
    """Lazy rows have the dense step's bits and leave the others; exact ones have those of dense steps, caught up."""
    rng = np.random.default_rng(7)
    start = rng.normal(size=shape).astype("float32")
    lazy, dense, exact, slow = (start.copy() for _ in range(4))
    opts = [build(name, p, options, n_threads=n, max_grad_value=2.0, ema_decay=0.9, **formats)
            for p, n in ((lazy, 3), (dense, 1))]  # fmt: skip
    if formats.get("state_dtype") != "uint8":
        opts += [build(name, p, options, n_threads=n, rows=rows, **formats)
                 for p, n, rows in ((exact, 3, "exact"), (slow, 1, "lazy"))]  # fmt: skip
    for t in range(6):
        k = 1 if t == 2 else max(1, shape[0] // 2)
        rows = ac.Rows(rng.integers(0, shape[0], k), rng.normal(size=(k, *shape[1:])).astype("float32"))
        g, touched = reference.sum_rows(shape, "float32", rows.indices, rows.values)
        opts[1].load_state_dict(opts[0].state_dict())
        dense[...] = lazy
        before, state = lazy.copy(), opts[0].state_dict()["groups"][0]["arrays"]
        state = {key: x.copy() for key, x in state.items()}
        opts[0].step(rows)
        opts[1].step(g)
        assert_same_bits(lazy[touched], dense[touched])
        assert_same_bits(lazy[~touched], before[~touched])
        for key, x in opts[0].state_dict()["groups"][0]["arrays"].items():
            if len(x) == shape[0]:
                assert_same_bits(x[touched], opts[1].state_dict()["groups"][0]["arrays"][key][touched], key)
                assert_same_bits(x[~touched], state[key][~touched], key)
        for opt, grad in zip(opts[2:], (rows, g), strict=False):
            opt.step(grad)
        if t in (0, 3, 5) and len(opts) > 2:
            opts[2].catch_up(np.arange(shape[0] // 2))
            assert_same_bits(exact[: shape[0] // 2], slow[: shape[0] // 2])
            opts[2].catch_up()
            assert_same(everything(opts[2], "rows"), everything(opts[3], "rows"))


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1, 2, 9, 64, 255, 700, 5000])), min_size=1, max_size=5),
    st.sampled_from([{}, {"state_dtype": "bfloat16"}, {"state_dtype": "uint8"}, {"rows": "exact"}]),
    st.lists(st.sampled_from(["step", "rows", "array by array", "undone", "summed", "loaded"]), min_size=2, max_size=5),
    st.integers(1, 6),
    st.integers(0, 2**32),
)
def test_any_arrays_and_calls(shapes, options, calls, n_threads, seed):
    """Two optimizers with the same gradients, one of which is stepped in all ways and the other by plain dense steps."""
    rng = np.random.default_rng(seed)
    start = [rng.normal(size=shape).astype("float32") for shape in shapes]
    opt, plain = (ac.Adam([x.copy() for x in start], weight_decay=0.1, second_moment="row", n_threads=n, keep_undo=True,
                          **more) for n, more in ((n_threads, options), (1, {**options, "rows": "lazy"})))  # fmt: skip
    for call in calls:
        grads = [rng.normal(size=shape).astype("float32") for shape in shapes]
        rows = [ac.Rows(np.arange(len(x))[::-1].copy(), x[::-1].copy()) for x in grads]
        if options.get("rows") == "exact":  # some of them, and the others have missed the step
            rows = [ac.Rows(i := np.flatnonzero(rng.random(len(x)) < 0.5), x[i]) for x in grads]
            if call in ("rows", "array by array", "undone", "summed"):
                for x, y in zip(grads, rows, strict=True):
                    x[np.setdiff1d(np.arange(len(x)), y.indices)] = 0
        if call == "step":
            opt.step([x.copy() for x in grads])
        elif call == "rows":
            opt.step(rows)
        elif call == "array by array":
            test_stepping.step_each(opt, rows, rng)
        elif call == "undone":
            opt.step([2 * x for x in grads])
            opt.rollback()
            opt.step(rows)
        elif call == "summed":
            opt.accumulate(rows)
            opt.step()
        else:
            saved = opt.state_dict()
            opt.load_state_dict({**saved, "groups": [{**group, "arrays": {name: x.copy() for name, x in
                                                      group["arrays"].items()}} for group in saved["groups"]]})  # fmt: skip
            opt.step(grads)
        plain.step(grads)
    opt.catch_up()
    assert_same(everything(opt, "rows")["groups"][0], everything(plain, "rows")["groups"][0])


def test_exact_rows_are_undone():
    rng = np.random.default_rng(8)
    opt = ac.Adam(rng.normal(size=(9, 1500)), weight_decay=0.1, second_moment="row", rows="exact", keep_undo=True)
    for t in range(4):
        opt.step(ac.Rows(np.array([t, 5]), rng.normal(size=(2, 1500))))
    before = [opt.param_groups[0]["params"].copy(), opt.state["exp_avg_sq"].copy()]
    opt.step(ac.Rows(np.array([0, 8]), rng.normal(size=(2, 1500))))
    opt.rollback()
    assert_same(before, [opt.param_groups[0]["params"], opt.state["exp_avg_sq"]])


def test_sums_of_micro_batches_and_schedules_and_groups():
    rng = np.random.default_rng(9)
    (params,) = tall(rng, "float32")
    lr = ac.schedules.linear(0.1, 9, end=0.01)
    opts = [ac.AdamW([{"params": [x.copy() for x in params]}], lr=lr, second_moment="row") for _ in "ab"]
    for opt in opts:
        opt.add_param_group({"params": np.ones((3, 4)), "second_moment": "element"})
    for g in tall(rng, "float32", 3):
        opts[0].accumulate([g, np.ones((3, 4))])
        opts[0].accumulate([[3 * x for x in g], np.ones((3, 4))])
        opts[0].step()
        opts[1].step([[2 * x for x in g], np.ones((3, 4))])
    assert_same(everything(opts[0])["groups"][0]["params"], everything(opts[1])["groups"][0]["params"])
    assert [x.shape for x in opts[0].state["exp_avg_sq"][0]] == [(90, 1), (11, 1), (300,), (3, 1), (2, 1, 1)]
    assert opts[0].state["exp_avg_sq"][1].shape == (3, 4)
    with pytest.raises(ValueError, match="second_moment can't be changed in the middle of a run"):
        opts[0].param_groups[1]["second_moment"] = "row"


def test_ranges_do_not_cut_rows():
    rng = np.random.default_rng(10)
    p, q = np.ones((600, 64), "float32"), np.ones((600, 64), "float32")
    g = rng.normal(size=p.shape).astype("float32")
    a, b = (ac.Adam(x, second_moment="row") for x in (p, q))
    step_range(a, g, lo=CHUNK, count=False)
    step_range(a, g, hi=CHUNK)
    b.step(g)
    assert_same(everything(a), everything(b))
    opt = ac.Adam([np.ones(5), np.ones((3, 3000))], second_moment="row")
    before = everything(opt)
    with pytest.raises(
        ValueError, match=r"must not cut a row under second_moment='row', but 4096 cuts row 1 of params\[1\]"
    ):
        step_range(opt, [np.ones(5), np.ones((3, 3000))], hi=CHUNK, count=False)
    assert_same(everything(opt), before)
    step_range(opt, [np.ones(5), np.ones((3, 3000))])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_extreme_numbers_have_the_bits_of_the_reference(dtype):
    tiny, huge = np.finfo(dtype).smallest_subnormal, np.finfo(dtype).max / 4
    g = np.ones((7, 20), dtype)
    g[0, 3], g[1, 4], g[2], g[3, 5], g[4], g[5, ::2] = np.nan, np.inf, tiny, huge, 0, -0.0
    p, state = np.ones_like(g), {}
    opt, want = ac.Adam(p, second_moment="row"), p.copy()
    with np.errstate(all="ignore"):
        for t in (1, 2):
            opt.step(g)
            want = reference.adam(want, g, state, t, second_moment="row")
    assert_same_bits(p, want)
    assert_same_bits(opt.state["exp_avg_sq"], state["exp_avg_sq"])
    assert np.isnan(p[0]).all()  # a row with a NaN is one


def test_a_sum_that_overflows_is_no_finite_gradient():
    """In float64 a row's squares may be finite and their sum not."""
    opt = ac.Adagrad(np.ones((2, 50)), second_moment="row", on_nonfinite="skip")
    opt.step(np.full((2, 50), 5e153))
    assert opt.skipped_steps == 1
    opt.step(np.full((2, 50), 5e152))
    assert opt.skipped_steps == 1
    assert np.isfinite(opt.state["sum"]).all()


def test_a_table_of_more_than_two_to_the_31_elements(tmp_path):
    """It is a file without contents, of which a step reads and writes what it touches."""
    n = 2**25 + 3
    table = np.memmap(tmp_path / "table", "float32", "w+", shape=(n, 64))
    opt = ac.Adagrad(table, lr=1.0, second_moment="row", eps=0.0)
    assert opt.state["sum"].nbytes == 4 * n
    opt.step(ac.Rows(np.array([n - 1, 5, n - 2]), np.outer([2, 3, -4], np.ones(64)).astype("float32")))
    assert opt.state["sum"][[5, n - 2, n - 1], 0].tolist() == [9, 16, 4]
    assert table[[5, n - 2, n - 1], 63].tolist() == [-1, 1, -1]
    assert opt.state["sum"].sum() == 29


def test_checkpoints_fit_other_cuts_between_rows(tmp_path):
    rng = np.random.default_rng(11)
    flat = rng.normal(size=(100, 8)).astype("float32")
    g = rng.normal(size=(100, 8)).astype("float32")

    def make(*ends, **options):
        return ac.AdamW([x.copy() for x in np.split(flat, ends)], **{"second_moment": "row", **options})

    opt, other = make(30), make(50, 70)
    opt.step(np.split(g, [30]))
    opt.save(tmp_path / "a")
    other.load(tmp_path / "a")
    for one, ends in ((opt, [30]), (other, [50, 70])):
        one.step(np.split(g, ends))
    assert_same_bits(*(np.concatenate(x.param_groups[0]["params"]) for x in (opt, other)))
    assert_same_bits(*(np.concatenate(x.state["exp_avg_sq"]) for x in (opt, other)))
    before = everything(other)
    for wrong, message in [
        (make(second_moment="element"), "its second_moment is 'row', this optimizer's 'element'; they can't be conv"),
        (
            ac.AdamW(flat.reshape(50, 16).copy(), second_moment="row"),
            r"of other rows: .* are \[\[100, 8\]\], .*\[\[50, 16",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            wrong.load(tmp_path / "a")
        with pytest.raises(ValueError, match=message):
            wrong.load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match="its second_moment is 'element', this optimizer's 'row'"):
        other.load_state_dict(make(50, 70, second_moment="element").state_dict())
    assert_same(everything(other), before)
    with pytest.raises(ValueError, match="PyTorch's AdamW has no second_moment='row', only 'element'"):
        opt.state_dict(format="torch")


def test_what_is_refused():
    with pytest.raises(ValueError, match="centered=True is refused with second_moment='row': the mean square of a row"):
        ac.RMSprop(np.ones((2, 2)), centered=True, second_moment="row")
    opt = ac.RMSprop(np.ones((2, 2)), second_moment="row")
    with pytest.raises(ValueError, match="centered=True is refused"):
        opt.param_groups[0]["centered"] = True
    with pytest.raises(ValueError, match="is refused with rows='exact' and second_moment='row' together"):
        ac.Adam(np.ones((2, 2)), sum_to_one=True, rows="exact", second_moment="row")
    with pytest.raises(ValueError, match="second_moment must be 'element' or 'row', got 'column'"):
        ac.Adam(np.ones(2), second_moment="column")

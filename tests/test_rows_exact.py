"""rows="exact": after catch_up, everything has the bits of dense steps whose other rows were 0."""

import copy

import numpy as np
import pytest
from cases import IDS, PAIRS
from support import assert_same, assert_same_bits, break_off, build, gradients
from support import everything as all_of_it
from test_formats import allocate, every_format, every_rule, shared
from test_rows import dense, draw

import adaptive_c as ac

SHAPE = (60, 37)
STAGES = {"max_grad_norm": 0.7, "max_grad_value": 0.5, "bounds": (-1.0, 1.2), "ema_decay": 0.9, "loss_scale": 4.0}


def steps(rng, dtype, n, dense_at=()):
    """Gradients for a table and an array beside it, as what is passed by rows and what is passed dense."""
    wide = "float64" if dtype == "float64" else "float32"
    for t in range(n):
        beside = None if t % 3 == 1 else gradients(rng, 50, wide, 1)[0]
        if t in dense_at:
            g = gradients(rng, SHAPE[0] * SHAPE[1], wide, 1)[0].reshape(SHAPE)
            yield [g, beside], [g, beside]
        elif t % 5 == 4:
            yield [None, beside], [None, beside]  # is no step of the table
        else:
            rows = draw(rng, SHAPE, wide, 5, form=("plain", "weighted")[t % 2])
            yield [rows, beside], [dense(rows, SHAPE, wide)[0], beside]


def everything(opt):
    return all_of_it(opt, "rows")


def settled(opt):
    opt.catch_up()
    return everything(opt)


def pair(name, values, options, **more):
    """The same optimizer twice: one is stepped by rows, the other one by dense gradients."""
    return [
        build(name, [x.copy() for x in values], options, rows=rows, n_threads=n_threads,
              copy_to=[np.empty(x.shape, "float32") for x in values], **more)
        for rows, n_threads in (("exact", 3), ("lazy", 2))
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
def test_every_rule_and_stage(name, options, dtype):
    rng = np.random.default_rng(0)
    values = rng.normal(size=SHAPE).astype(dtype), rng.normal(size=50).astype(dtype)
    opt, whole = pair(name, values, options, **STAGES)
    for t, (by_rows, g) in enumerate(steps(rng, dtype, 20, dense_at=(0, 12))):
        opt.step(by_rows)
        whole.step(g)
        assert opt.grad_norm == whole.grad_norm
        if t in (1, 6, 19):
            assert_same(settled(opt), everything(whole))


@every_format
@every_rule
def test_narrow_numbers(name, options, formats):
    rng = np.random.default_rng(1)
    values = [allocate(rng, n, formats)[0].reshape(shape) for n, shape in ((SHAPE[0] * SHAPE[1], SHAPE), (50, (50,)))]
    more = {"ema_decay": 0.9, "seed": 5, **shared(formats)}
    if build(name, [values[1]], options, **more).param_groups[0]["state_dtype"] == "uint8":
        with pytest.raises(ValueError, match="rows='exact' is refused with state_dtype='uint8', whose blocks"):
            build(name, list(values), options, rows="exact", **more)
        return
    opt, whole = pair(name, values, options, **more)
    for by_rows, g in steps(rng, "float32", 12, dense_at=(7,)):
        opt.step(by_rows)
        whole.step(g)
    assert_same(settled(opt), everything(whole))


def test_until_then_a_row_has_missed_steps():
    p, q = np.ones((4, 2)), np.ones((4, 2))
    opt, whole = ac.AdamW(p, lr=0.1, rows="exact"), ac.AdamW(q, lr=0.1)
    for i in (0, 1, 0):
        opt.step(ac.Rows(np.array([i]), np.ones((1, 2))))
        g = np.zeros((4, 2))
        g[i] = 1
        whole.step(g)
        assert (p[i] == q[i]).all()  # what has a gradient is up to date
    assert (p[2:] == 1).all()
    assert (q[2:] < 1).all()  # by its decay
    assert not (p[1] == q[1]).all()
    opt.catch_up()
    assert_same_bits(p, q)
    opt.catch_up()
    assert_same_bits(p, q)


@pytest.mark.parametrize("formats", [{}, {"state_dtype": "bfloat16", "n_threads": 3}])
def test_some_rows_catch_up_before_they_are_looked_up(formats):
    rng = np.random.default_rng(8)
    values = rng.normal(size=(400, 60)).astype("float32"), rng.normal(size=50).astype("float32")
    opt, whole = [ac.AdamW([x.copy() for x in values], lr=0.1, rows=rows, **formats) for rows in ("exact", "lazy")]
    table, other = opt.param_groups[0]["params"][0], whole.param_groups[0]["params"][0]
    for _ in range(6):
        indices = rng.integers(0, 400, 300).astype("int32")
        opt.catch_up(0, indices)
        assert_same_bits(table[indices], other[indices])
        rows = ac.Rows(indices[:20], rng.normal(size=(20, 60)).astype("float32"))
        opt.step([rows, None])
        whole.step([dense(rows, (400, 60), "float32")[0], None])
    assert_same(settled(opt), everything(whole))
    before = everything(opt)
    for place, kind, message in [
        ((0, np.array([400])), ValueError, r"^params\[0\]: indices\[0\] is 400; the array has 400 rows"),
        ((2, np.array([0])), IndexError, r"there are 2 arrays"),
        ((np.array([0]),), TypeError, r"here it is catch_up\(index, indices\); got 1 argument$"),
        ((0, [0]), TypeError, r"indices must be a NumPy array"),
    ]:
        with pytest.raises(kind, match=message):
            opt.catch_up(*place)
    assert_same(everything(opt), before)


def changing(opt, t):
    """Assignments in the middle of a run."""
    group = opt.param_groups[0]
    if t == 3:
        group["lr"] = 0.02
        group["weight_decay"] = 0.3
    elif t == 5:
        group["bounds"] = (-0.5, 0.4)
    elif t == 7:
        group["betas"] = (0.5, ac.schedules.linear(0.9, 20, end=0.5))
        opt.flush_denormals = True
    elif t == 9:
        opt.seed = 77
        opt.max_grad_norm = 0.1
    elif t == 11:
        group["maximize"] = True
        group["bounds"] = None
        opt.flush_denormals = False
    elif t == 13:
        opt.t = 5
    elif t == 15:
        group["ema_decay"] = 0.5


@pytest.mark.parametrize("formats", [{}, {"state_dtype": "bfloat16"}])
def test_options_are_replayed_as_they_were(formats):
    rng = np.random.default_rng(2)
    values = rng.normal(size=SHAPE).astype("float32"), rng.normal(size=50).astype("float32")
    lr = ac.schedules.cosine(0.1, 30)
    opt, whole = pair("Adam", values, {"lr": lr, "weight_decay": 0.1}, ema_decay=0.9, bounds=(-1.0, 1.0), **formats)
    for t, (by_rows, g) in enumerate(steps(rng, "float32", 25)):
        for each in (opt, whole):
            changing(each, t)
        opt.step(by_rows)
        whole.step(g)
    assert_same(settled(opt), everything(whole))


def test_reading_and_saving_catch_up_by_themselves(tmp_path):
    rng = np.random.default_rng(3)
    values = rng.normal(size=SHAPE), rng.normal(size=50)

    def run(check):
        opt, whole = pair("AdamW", values, {"lr": 0.1}, ema_decay=0.5)
        for by_rows, g in steps(rng, "float64", 7):
            opt.step(by_rows)
            whole.step(g)
        check(opt, whole)

    def averages(opt, whole):
        with opt.averaged_parameters(), whole.averaged_parameters():
            for a, b in zip(opt.param_groups[0]["params"], whole.param_groups[0]["params"], strict=True):
                assert_same_bits(a, b)
        assert_same(everything(opt), everything(whole))

    def save(opt, whole):
        opt.save(tmp_path / "a")
        new, _ = pair("AdamW", values, {"lr": 0.1}, ema_decay=0.5)
        new.load(tmp_path / "a")
        assert_same(everything(new), everything(whole))
        for by_rows, g in steps(rng, "float64", 4):
            new.step(by_rows)
            whole.step(g)
        assert_same(settled(new), everything(whole))
        whole.save(tmp_path / "b")  # of a lazy run: it loads into an exact one, in the middle of things
        new.step([ac.Rows(np.array([3]), np.ones((1, 37))), None])
        new.load(tmp_path / "b")
        assert_same(settled(new), everything(whole))

    def state_dict(opt, whole):
        assert_same(everything(opt), everything(whole))

    for check in (averages, save, state_dict):
        run(check)


@pytest.mark.parametrize("formats", [{}, {"state_dtype": "bfloat16"}])
def test_undone_and_made_again(formats):
    rng = np.random.default_rng(4)
    values = rng.normal(size=SHAPE).astype("float32"), rng.normal(size=50).astype("float32")
    opt, whole = pair("AdamW", values, {"lr": 0.1}, ema_decay=0.5, keep_undo=True, **formats)
    for t, (by_rows, g) in enumerate(steps(rng, "float32", 14, dense_at=(6,))):
        opt.step([draw(rng, SHAPE, "float32", 9), None])
        opt.rollback()
        if t % 3 == 0:
            opt.step(by_rows)
        else:
            places = [i for i in range(2) if by_rows[i] is not None]
            with pytest.raises(LookupError):
                break_off(opt, by_rows, places)
            with opt.stepping() as now:
                for i in places:
                    now(i, by_rows[i])
        whole.step(g)
    assert_same(settled(opt), everything(whole))
    opt.step(by_rows)
    opt.catch_up()
    with pytest.raises(ValueError, match="there is no step to undo"):
        opt.rollback()


@pytest.mark.parametrize("raises", [True, False])
def test_a_dense_gradient_inside_stepping_is_undone_beside_its_neighbours(raises):
    """Its rows catch up in a chunk that the step of a neighbour has kept already."""
    opt, whole = (
        ac.Adam([np.ones(5, "float32"), np.ones((5, 4), "float32"), np.ones(7, "float32")], lr=0.1, rows=rows,
                ema_decay=0.5, keep_undo=True)
        for rows in ("exact", "lazy")
    )  # fmt: skip
    rows = ac.Rows(np.array([1]), np.ones((1, 4), "float32"))
    g, both = [np.ones(5, "float32"), np.ones((5, 4), "float32")], [0, 1]
    for t in range(4):
        opt.step([None, g[1] if t == 0 else rows, None])
        whole.step([None, g[1] if t == 0 else dense(rows, (5, 4), "float32")[0], None])
    if raises:
        with pytest.raises(LookupError):
            break_off(opt, g, both)
    else:
        with opt.stepping() as now:
            for i in both:
                now(i, g[i])
        opt.rollback()
    assert_same(settled(opt), everything(whole))


def test_counts_may_be_written():
    opt, whole = (ac.Adam(np.ones((5, 4)), lr=0.1, rows=rows) for rows in ("exact", "lazy"))
    for t in range(6):
        if t == 3:
            opt.catch_up()
        if t >= 3:
            opt.state["step"][...] = whole.state["step"][...] = t % 3
        rows = ac.Rows(np.array([t % 2, 3]), np.full((2, 4), t - 2.5))
        opt.step(rows)
        whole.step(dense(rows, (5, 4), "float64")[0])
    assert_same(settled(opt), everything(whole))


def test_accumulated_rows():
    rng = np.random.default_rng(5)
    values = rng.normal(size=SHAPE), rng.normal(size=50)
    opt, whole = pair("AdamW", values, {"lr": 0.1})
    for by_rows, g in steps(rng, "float64", 8):
        for _ in range(2):
            opt.accumulate(by_rows)
            whole.accumulate(g)
        opt.step()
        whole.step()
    assert_same(settled(opt), everything(whole))
    opt.accumulate([ac.Rows(np.array([1]), np.ones((1, 37))), None])
    with pytest.raises(ValueError, match=r"accumulated rows are pending, which can't be saved: step\(\) takes"):
        opt.state_dict()
    opt.discard()
    assert_same(settled(opt), everything(whole))


def test_the_log_has_an_end():
    """After 4,096 steps all rows catch up, with no change of bits, so that memory does not grow with the steps."""
    rng = np.random.default_rng(6)
    p, q = np.ones((3, 2), "float32"), np.ones((3, 2), "float32")
    lr = ac.schedules.cosine(0.1, 5000)
    opt, whole = ac.AdamW(p, lr=lr, rows="exact"), ac.AdamW(q, lr=lr)
    for t in range(4200):
        i = int(rng.integers(0, 2)) if t < 4150 else 2  # the last one is not stepped for long
        g = np.zeros((3, 2), "float32")
        g[i] = rng.normal(size=2)
        opt.step(ac.Rows(np.array([i]), g[i : i + 1]))
        whole.step(g)
        if t == 4095:
            assert (p[2] == 1).all()
        if t == 4096:
            assert (p[2] < 1).all()
    opt.catch_up()
    assert_same_bits(p, q)


def test_several_groups_and_one_dimension():
    rng = np.random.default_rng(7)
    tables = [rng.normal(size=s) for s in ((30, 3), (40,), (9, 700))]
    a, b = ([x.copy() for x in tables] for _ in range(2))
    opt = ac.Adam([{"params": a[0], "rows": "exact"}, {"params": a[1:2], "rows": "exact"}, {"params": a[2]}], lr=0.1)
    whole = ac.Adam([{"params": b[0]}, {"params": b[1:2]}, {"params": b[2]}], lr=0.1)
    for _ in range(9):
        rows = [draw(rng, x.shape, "float64", 4) for x in tables]
        opt.step([rows[0], [rows[1]], None])
        whole.step([dense(rows[0], tables[0].shape, "float64")[0], [dense(rows[1], (40,), "float64")[0]], None])
    opt.catch_up()
    for x, y in zip(a, b, strict=True):
        assert_same_bits(x, y)


def test_the_option():
    opt = ac.SGD(np.ones((2, 2)), rows="exact")
    assert opt.param_groups[0]["rows"] == "exact"
    opt.param_groups[0]["rows"] = "lazy"
    assert opt.param_groups[0]["rows"] == "lazy"
    with pytest.raises(ValueError, match="rows must be 'lazy' or 'exact', got 'dense'"):
        ac.SGD(np.ones((2, 2)), rows="dense")


# --- the option may change ---------------------------------------------------------------------------------------------


def by_rows(rng, n):
    return [ac.Rows(rng.integers(0, 9, 3), rng.normal(size=(3, 2))) for _ in range(n)]


def stepped(opt, grads):
    for g in grads:
        opt.step(g)
    opt.catch_up()
    return opt.param_groups[0]["params"].copy()


@pytest.mark.parametrize("first", ["lazy", "exact"])
@pytest.mark.parametrize("way", ["file", "state_dict", "assigned"])
def test_a_run_goes_on_as_the_one_that_was_saved(first, way, tmp_path):
    """`rows` is an option like others, which a load takes from what was saved; lazy and exact runs differ."""
    second = "exact" if first == "lazy" else "lazy"
    rng = np.random.default_rng(6)
    before, after = by_rows(rng, 5), by_rows(rng, 5)
    start = rng.normal(size=(9, 2))

    def make(rows):
        return ac.AdamW(start.copy(), lr=0.1, rows=rows, keep_undo=True)

    opt, straight, other = make(first), make(first), make(second)
    stepped(opt, before)
    want = stepped(straight, [*before, *after])
    if way == "assigned":
        opt.param_groups[0]["rows"] = second  # and there it goes on as the other kind
        other.load_state_dict(opt.state_dict())
        other.param_groups[0]["params"][...] = opt.param_groups[0]["params"]
        assert_same_bits(stepped(opt, after), stepped(other, after))
        assert not np.array_equal(opt.param_groups[0]["params"], want)
        return
    stepped(other, by_rows(rng, 2))
    for g in by_rows(rng, 2):
        other.step(g)  # rows lag, where it is exact
    if way == "file":
        opt.save(tmp_path / "a")
        other.load(tmp_path / "a")
    else:
        other.load_state_dict(opt.state_dict())
        other.param_groups[0]["params"][...] = opt.param_groups[0]["params"]
    assert other.param_groups[0]["rows"] == first
    assert_same_bits(stepped(other, after), want)


def test_rows_that_lag_catch_up_when_the_option_is_assigned():
    p, q = np.ones((4, 2)), np.ones((4, 2))
    opt, whole = (ac.AdamW(x, lr=0.1, rows="exact", keep_undo=True) for x in (p, q))
    for i in (0, 1):
        for one in (opt, whole):
            one.step(ac.Rows(np.array([i]), np.ones((1, 2))))
    opt.param_groups[0]["rows"] = "lazy"
    whole.catch_up()
    assert_same_bits(p, q)
    with pytest.raises(
        ValueError, match="there is no step to undo: rows that had missed steps were brought up to date"
    ):
        opt.rollback()
    for rows, i in (
        ("lazy", 2),
        ("lazy", 3),
        ("exact", 1),
        ("exact", 2),
        ("lazy", 0),
    ):  # nothing is noted or left behind
        opt.param_groups[0]["rows"] = rows
        before = everything(opt)
        opt.step(ac.Rows(np.array([i]), np.ones((1, 2))))
        opt.rollback()
        assert_same(everything(opt), before)
        opt.step(ac.Rows(np.array([i]), np.ones((1, 2))))


def test_what_rows_may_not_be():
    opt = ac.Adam(np.ones((4, 2), "f4"), state_dtype="uint8")
    with pytest.raises(ValueError, match=r"param_groups\[0\]: rows='exact' is refused with state_dtype='uint8'"):
        opt.param_groups[0]["rows"] = "exact"
    state = copy.deepcopy(opt.state_dict())
    state["groups"][0]["options"]["rows"] = "exact"
    with pytest.raises(ValueError, match="group 0: rows='exact' is refused with state_dtype='uint8'"):
        opt.load_state_dict(state)
    with pytest.raises(ValueError, match=r"param_groups\[0\]: rows must be 'lazy' or 'exact', got 'all'"):
        opt.param_groups[0]["rows"] = "all"
    assert opt.param_groups[0]["rows"] == "lazy"
    del state["groups"][0]["options"]["rows"]  # as files of earlier versions are: the option stays
    exact = ac.Adam(np.ones((4, 2)), rows="exact")
    state = exact.state_dict()
    del state["groups"][0]["options"]["rows"]
    exact.load_state_dict(state)
    assert exact.param_groups[0]["rows"] == "exact"

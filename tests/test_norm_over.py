"""The norm that clips: assigned at each step, over all gradients, each group or each array, and on a schedule."""

import functools

import ml_dtypes
import numpy as np
import pytest
from cases import IDS, PAIRS
from resume import FORMATS
from support import CHUNK, assert_same, build, everything, step_range

import adaptive_c as ac

# --- assigned ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["max_grad_norm", "max_grad_value", "loss_scale"])
@pytest.mark.parametrize("start", [None, 3.0], ids=["after None", "after a number"])
def test_a_number_that_is_assigned_is_checked_and_in_force(name, start):
    start = start or (1.0 if name == "loss_scale" else None)
    p, q = np.zeros(5, "float32"), np.zeros(5, "float32")
    opt, g = ac.SGD(p, lr=1.0, **{name: start}), np.arange(5, dtype="float32")
    for value in (2, 0.5, np.float64(0.25), np.float32(0.5), np.int64(3)):
        setattr(opt, name, value)
        assert type(getattr(opt, name)) is float
        assert getattr(opt, name) == value
        p[:] = q[:] = 0
        opt.step(g)
        ac.SGD(q, lr=1.0, **{name: float(value)}).step(g)
        assert (p == q).all()
        assert p.any()
    for value in (0, 0.0, -1.0, np.nan, np.inf, True, "x", 1 << 2000, [1.0]):
        with pytest.raises((ValueError, TypeError), match=f"{name} must be|in step|assigned a number"):
            setattr(opt, name, value)
        assert getattr(opt, name) == 3


def test_a_limit_that_float32_rounds_to_0_is_refused_however_it_comes():
    wide, narrow = ac.SGD(np.zeros(2), max_grad_value=1.0), ac.SGD(np.zeros(2, "float32"), max_grad_value=1.0)
    wide.max_grad_value = 1e-50
    assert wide.max_grad_value == 1e-50
    with pytest.raises(ValueError, match="rounds to 0 in float32"):
        narrow.max_grad_value = 1e-50
    assert narrow.max_grad_value == 1


def test_switches_that_are_assigned_are_checked_and_in_force():
    g = np.ones(3)
    opt = ac.SGD(np.zeros(3))
    opt.zero_grad = True
    opt.step(g)
    assert not g.any()
    assert opt.zero_grad == True  # noqa: E712  it can be called, and so is no bool
    for value in (1, 0.0, None, "yes"):
        with pytest.raises(TypeError, match="zero_grad must be True or False"):
            opt.zero_grad = value
    opt.zero_grad = False
    g[:] = 1
    opt.step(g)
    assert g.all()


def test_what_is_assigned_while_another_setting_is_checked_is_kept():
    """The seed's check assigns a number, as another thread would in the middle of it; the check is made again."""
    opt = ac.SGD(np.zeros(3), max_grad_norm=1.0)
    assigned = []

    class Seed(int):
        def __le__(self, other):
            if not assigned:
                assigned.append(True)
                opt.max_grad_norm = 2.0
            return int(self) <= other

        def __ge__(self, other):
            return self.__le__(other) or True

    opt.seed = Seed(5)
    assert assigned
    assert opt.max_grad_norm == 2
    assert opt.seed == 5


# --- over what ---------------------------------------------------------------------------------------------------------


def last(x, axis=0):
    """The sum in the order of the elements, one after the other."""
    return np.add.accumulate(x, axis=axis).take(-1, axis=axis)


def squares(grads):
    """As docs/whole_step.md says: 16 lanes of each chunk, then chunks, in double, in the order of the elements."""
    g = np.concatenate([np.zeros(0), *(np.asarray(x, "float64").ravel() for x in grads)])
    chunks = np.zeros((-(-g.size // CHUNK), CHUNK // 16, 16))
    chunks.reshape(-1)[: g.size] = g**2
    return last(last(last(chunks, axis=1), axis=1)) if g.size else 0.0


def norm(*groups):
    """Of arrays of several groups, which are added in order."""
    return float(np.sqrt(sum(map(squares, groups))))


def clipped(grads, most, over, divisor=1.0, shapes=None):
    """The gradients of groups (lists of arrays), each multiplied by the factor of the gradients that it is clipped with.

    An array without a gradient keeps its place in the norm of its group.
    """

    def factor(*groups):
        coefficient = most / (norm(*groups) / divisor + 1e-6)
        return (coefficient if not coefficient > 1 else 1.0) / divisor

    def times(x, k):
        return None if x is None else np.asarray(x.dtype.type(k) * x)

    there = [
        [np.zeros(s) if x is None else x for x, s in zip(*both, strict=True)]
        for both in zip(grads, shapes or SHAPES, strict=True)
    ]
    factors = {
        "all": lambda: [[factor(*there)] * len(group) for group in there],
        "group": lambda: [[factor(group)] * len(group) for group in there],
        "array": lambda: [[factor([x]) for x in group] for group in there],
    }
    ks = factors[over]()
    return [[times(x, k) for x, k in zip(*both, strict=True)] for both in zip(grads, ks, strict=True)]


SHAPES = [[(3, 5), (CHUNK + 77,), ()], [(0,), (2 * CHUNK - 33,), (40, 257)]]
OVER = pytest.mark.parametrize("over", ["all", "group", "array"])


def draw(rng, dtype, t=0):
    grads = [[np.asarray(rng.normal(size=s) * 10.0 ** rng.integers(-3, 3), dtype) for s in shapes] for shapes in SHAPES]
    if t % 3 == 1:
        grads[t % 2][0] = None
    return grads


def groups(options=None, formats=("float32", {})):
    kind, more = formats
    rng = np.random.default_rng(1)
    params = [[np.asarray(rng.normal(size=s), kind) for s in shapes] for shapes in SHAPES]
    return [{"params": group, **(options or {}), **more} for group in params]


def arrays(opt):
    return [x for group in opt.param_groups for x in group["params"]]


@functools.cache
def steps(over):
    """The gradients of some steps, what is left of them after clipping, and their norms: the same for every rule."""
    rng, found = np.random.default_rng(0), []
    for t in range(4):
        grads = draw(rng, "float32", t)
        whole = norm([x for group in grads for x in group if x is not None]) / 2
        found.append((grads, clipped(grads, 0.7, over, 2.0), whole))
    return found


@OVER
@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
def test_the_bits_are_those_of_gradients_that_were_clipped_before(name, options, over):
    opt = build(name, groups(), options, max_grad_norm=0.7, norm_over=over, n_threads=3, loss_scale=2.0)
    twin = build(name, groups(), options)
    for t, (grads, used, whole) in enumerate(steps(over)):
        opt.step(grads)
        twin.step(used)
        assert opt.grad_norm == pytest.approx(whole, rel=1e-12)
        assert_same(arrays(opt), arrays(twin), f"t {t}")
    assert_same(opt.state_dict()["groups"][1]["arrays"], twin.state_dict()["groups"][1]["arrays"])


@OVER
@pytest.mark.parametrize("formats", FORMATS, ids=str)
def test_every_format_and_stage(formats, over):
    kind, more = formats
    rng = np.random.default_rng(2)
    shared = {"max_grad_value": 0.3, "ema_decay": 0.9, "bounds": (-1.0, 1.0), "on_nonfinite": "raise"}
    kind = np.dtype(ml_dtypes.bfloat16) if kind == "bfloat16" else kind
    opt = ac.Adam(
        groups(None, (kind, more)), weight_decay=0.1, max_grad_norm=3.0, norm_over=over, n_threads=2, **shared
    )
    twin = ac.Adam(groups(None, (kind, more)), weight_decay=0.1, **shared)
    for t in range(3):
        grads = draw(rng, "float64" if kind == "float64" else "float16" if t == 1 else "float32", t)
        opt.step(grads)
        wide = [[x if x is None or x.dtype != "float16" else x.astype("float32") for x in group] for group in grads]
        twin.step(clipped(wide, 3.0, over))
        assert_same(arrays(opt), arrays(twin), f"t {t}")
    for a, b in zip(everything(opt)["groups"], everything(twin)["groups"], strict=True):
        assert_same(a["arrays"], b["arrays"])


def test_an_array_that_is_clipped_by_itself_has_the_bits_of_an_optimizer_of_its_own():
    rng = np.random.default_rng(3)
    for n in (1, 2, 3, 7):
        opt = ac.Adam(groups(), max_grad_norm=0.5, norm_over="array", n_threads=n)
        alone = [ac.Adam([x], max_grad_norm=0.5) for group in groups() for x in group["params"]]
        for t in range(2):
            grads = draw(rng, "float32", t)
            opt.step(grads)
            for one, g in zip(alone, [g for group in grads for g in group], strict=True):
                one.step([g])
        assert_same(arrays(opt), [x for one in alone for x in arrays(one)], f"{n} threads")


@pytest.mark.parametrize("rows", ["lazy", "exact"])
@OVER
def test_rows(over, rows):
    rng = np.random.default_rng(4)
    shapes = [(300, 7), (900, 20), (50,)]
    params = [rng.normal(size=s).astype("float32") for s in shapes]
    opt = ac.AdamW([x.copy() for x in params], rows=rows, max_grad_norm=0.5, norm_over=over, n_threads=3, lr=0.1)
    twin = ac.AdamW([x.copy() for x in params], rows=rows, lr=0.1)
    for t in range(6):
        given, full = [], []
        for j, s in enumerate(shapes):
            i = np.sort(rng.choice(s[0], 9 + 20 * j, replace=False))
            v = (rng.normal(size=(len(i), *s[1:])) * 10.0 ** (j - 1)).astype("float32")
            given.append(ac.Rows(i, v))
            full.append(np.zeros(s, "float32"))
            full[-1][i] = v
        opt.step(given)
        used = clipped([full], 0.5, over, shapes=[shapes])[0]
        twin.step([ac.Rows(r.indices, np.ascontiguousarray(x[r.indices])) for r, x in zip(given, used, strict=True)])
        if t == 3:
            opt.step(full), twin.step(clipped([full], 0.5, over, shapes=[shapes])[0])
    opt.catch_up(), twin.catch_up()
    assert_same(arrays(opt), arrays(twin))


@OVER
def test_micro_batches_are_clipped_by_their_mean(over):
    rng = np.random.default_rng(5)
    opt, twin = ac.Adam(groups(), max_grad_norm=0.5, norm_over=over), ac.Adam(groups())
    batches = [draw(rng, "float32") for _ in range(4)]
    for grads in batches:
        opt.accumulate(grads)
    opt.step()
    sums = [[sum(xs[1:], start=xs[0]) for xs in zip(*parts, strict=True)] for parts in zip(*batches, strict=True)]
    twin.step(clipped(sums, 0.5, over, 4.0))
    assert_same(arrays(opt), arrays(twin))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e20], ids=str)
@OVER
def test_what_is_not_finite_reaches_what_it_is_clipped_with(bad, over):
    p = groups()
    before = [[x.copy() for x in group["params"]] for group in p]
    opt = ac.SGD(p, lr=1.0, max_grad_norm=1.0, norm_over=over)
    grads = draw(np.random.default_rng(6), "float32")
    grads[1][2][3, 4] = bad
    opt.step(grads)
    hit = {"all": [0, 1, 2, 4, 5], "group": [4, 5], "array": [5]}[over]
    flat = [x for group in before for x in group]
    for i, (old, new) in enumerate(zip(flat, arrays(opt), strict=True)):
        if np.isnan(bad) and i in hit:
            assert np.isnan(new).all(), i
        elif np.isinf(bad) and i in hit and i != 5:  # an infinite norm: gradients become 0
            assert (new == old).all(), i
        elif i not in hit:
            assert np.isfinite(new).all()
            assert old.size == 0 or (new != old).any(), i
    assert np.isfinite(opt.grad_norm) == (bad == 1e20)


@pytest.mark.parametrize("policy", ["skip", "raise"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e20], ids=str)
@OVER
def test_a_step_that_is_refused_is_refused_as_a_whole(bad, policy, over):
    """1e20 is small once it is clipped, and so is what is clipped with it; by itself a square of it overflows."""
    opt = ac.Adam(groups(), max_grad_norm=1e6, norm_over=over, on_nonfinite=policy, n_threads=3)
    grads = draw(np.random.default_rng(7), "float32")
    grads[1][1][-1] = bad
    before = everything(opt)
    if bad == 1e20:
        opt.step(grads)
        assert opt.t == 1
        return
    if policy == "raise":
        with pytest.raises(ValueError, match=r"grads\[1\]\[1\] is .* at index \(8158,\); nothing was changed"):
            opt.step(grads)
    else:
        opt.step(grads)
        assert opt.skipped_steps == 1
    assert_same({**everything(opt), "skipped_steps": 0, "grad_norm": "nan"}, {**before, "grad_norm": "nan"})


def test_norms_that_overflow_together_clip_each_array_by_itself():
    p = [np.zeros(3), np.zeros(3)]
    grads = [np.full(3, 7e153), np.full(3, 7e153)]
    with pytest.raises(ValueError, match="the norm of the gradients overflows"):
        ac.SGD(p, lr=1.0, max_grad_norm=1.0, on_nonfinite="raise").step(grads)
    opt = ac.SGD(p, lr=1.0, max_grad_norm=1.0, on_nonfinite="raise", norm_over="array")
    opt.step(grads)
    assert opt.grad_norm == np.inf
    np.testing.assert_allclose(np.concatenate(p), -np.full(6, 3**-0.5))
    with pytest.raises(ValueError, match="the norm of the gradients overflows"):
        opt.step([np.full(3, 1e154), np.ones(3)])


def test_a_factor_that_cannot_be_held_names_the_array():
    opt = ac.SGD([np.zeros(2, "float32"), np.zeros(2, "float32")], max_grad_norm=1e-30, norm_over="array")
    with pytest.raises(ValueError, match=r"max_grad_norm=1e-30, with grads\[1\] of norm .* can't hold; nothing"):
        opt.step([np.zeros(2, "float32"), np.full(2, 1e20, "float32")])


def test_it_is_assigned_saved_and_refused(tmp_path):
    opt = ac.Adam(groups(), max_grad_norm=0.5)
    assert opt.norm_over == "all"
    opt.norm_over = "array"
    for value in ("arrays", None, 1):
        with pytest.raises(ValueError, match="norm_over must be 'all' or 'group' or 'array'"):
            opt.norm_over = value
    grads = draw(np.random.default_rng(8), "float32")
    opt.step(grads)
    opt.save(tmp_path / "x")
    again = ac.Adam(groups())
    again.load(tmp_path / "x")
    assert again.norm_over == "array"
    opt.step(grads), again.step(grads)
    assert_same(everything(opt), everything(again))
    with pytest.raises(ValueError, match=r"stepping\(\) is refused with max_grad_norm=0\.5"), opt.stepping():
        pass
    opt.max_grad_norm = None
    with opt.stepping() as now:  # without a norm there is nothing to clip
        now(0, 0, grads[0][0])


def test_a_step_is_undone_and_ranges_are_stepped():
    grads = draw(np.random.default_rng(9), "float32")
    opt = ac.Adam(groups(), max_grad_norm=0.5, norm_over="array", keep_undo=True)
    before = everything(opt)
    opt.step(grads)
    after = everything(opt)
    opt.rollback()
    assert_same(everything(opt), before)
    opt = ac.Adam(groups(), max_grad_norm=0.5, norm_over="array")
    step_range(opt, grads, group=1, lo=CHUNK, count=False)
    step_range(opt, grads, group=0, count=False)
    step_range(opt, grads, group=1, hi=CHUNK)
    assert_same(everything(opt), after)


@pytest.mark.later("torch")
@OVER
def test_it_is_pytorchs_clipping(over):
    import torch

    opt = ac.SGD(groups(), lr=0.1, max_grad_norm=0.5, norm_over=over)
    theirs = [torch.tensor(x.astype("float64"), requires_grad=True) for x in arrays(opt)]
    grads = draw(np.random.default_rng(10), "float32")
    opt.step(grads)
    for p, g in zip(theirs, [g for group in grads for g in group], strict=True):
        p.grad = torch.tensor(g.astype("float64"))
    for part in {"all": [theirs], "group": [theirs[:3], theirs[3:]], "array": [[p] for p in theirs]}[over]:
        torch.nn.utils.clip_grad_norm_(part, 0.5)
    torch.optim.SGD(theirs, lr=0.1).step()
    for p, q in zip(arrays(opt), theirs, strict=True):
        np.testing.assert_allclose(p, q.detach().numpy(), rtol=1e-5, atol=1e-5)


# --- a schedule --------------------------------------------------------------------------------------------------------


def falling(t):
    return 1.0 / (1 + t)


@pytest.mark.parametrize("schedule", [ac.schedules.linear(1.0, 3, end=0.25), falling], ids=["ours", "a function"])
@OVER
def test_a_schedule_gives_the_bits_of_numbers_that_are_assigned(schedule, over):
    rng = np.random.default_rng(11)
    opt = ac.Adam(groups(), max_grad_norm=schedule, norm_over=over)
    twin = ac.Adam(groups(), max_grad_norm=1.0, norm_over=over)
    for t in range(5):
        grads = draw(rng, "float32", t)
        twin.max_grad_norm = schedule(t)
        assert opt.max_grad_norm == schedule(t)
        opt.step(grads)
        twin.step(grads)
        assert_same(arrays(opt), arrays(twin), f"t {t}")
    assert opt.schedules == {"max_grad_norm": schedule}
    opt.t = 1
    assert opt.max_grad_norm == schedule(1)
    opt.max_grad_norm = 0.5
    assert opt.schedules == {}


def test_a_plateau_reads_the_metric_and_is_undone():
    plateau = ac.schedules.plateau(1.0, factor=0.5, patience=0)
    opt = ac.SGD(np.zeros(3), max_grad_norm=plateau, keep_undo=True)
    with pytest.raises(ValueError, match="no schedule reads metric"):
        ac.SGD(np.zeros(3), max_grad_norm=falling).step(np.ones(3), metric=1.0)
    opt.step(np.ones(3), metric=1.0)
    opt.step(np.ones(3), metric=2.0)
    assert opt.max_grad_norm == 0.5
    opt.rollback()
    assert opt.max_grad_norm == 1.0
    assert opt.schedules["max_grad_norm"] == plateau.observe(0, 1.0)
    opt.step(np.ones(3), metric=2.0)
    assert opt.max_grad_norm == 0.5
    result = ac.minimize(
        lambda x: ((x**2).sum(), 2 * x),
        np.ones(3),
        jac=True,
        optimizer=ac.SGD,
        lr=1e-9,
        max_grad_norm=plateau,
        maxiter=3,
    )
    assert result.nit == 3


def test_a_schedule_is_saved_and_resumed(tmp_path):
    rng = np.random.default_rng(12)
    opt = ac.Adam(groups(), max_grad_norm=ac.schedules.chain([ac.schedules.linear(1.0, 3, end=0.5), falling], [4]))
    for t in range(3):
        opt.step(draw(rng, "float32", t))
    opt.save(tmp_path / "x")
    saved = opt.state_dict()
    with pytest.raises(ValueError, match="max_grad_norm followed a function of your own, which can't be stored"):
        ac.Adam(groups()).load(tmp_path / "x")
    start = ac.schedules.chain([ac.schedules.linear(9.0, 3), falling], [4])
    again, third = ac.Adam(groups(), max_grad_norm=start), ac.Adam(groups(), max_grad_norm=start)
    again.load(tmp_path / "x")
    for a, b in zip(arrays(third), arrays(opt), strict=True):
        a[...] = b
    third.load_state_dict(saved)
    assert again.schedules == third.schedules == opt.schedules
    for t in range(4):
        grads = draw(rng, "float32", t)
        for one in (opt, again, third):
            one.step(grads)
    assert_same(everything(again), everything(opt))
    assert_same(everything(third), everything(opt))
    plain = ac.Adam(groups(), max_grad_norm=0.5)
    plain.save(tmp_path / "y")
    again.load(tmp_path / "y")  # a number takes the schedule's place
    assert again.schedules == {}
    assert again.max_grad_norm == 0.5


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, None, "x", True], ids=str)
def test_a_number_out_of_range_changes_nothing(value):
    opt = ac.Adam(groups(), max_grad_norm=lambda t: value if t == 1 else 1.0)
    grads = draw(np.random.default_rng(13), "float32")
    opt.step(grads)
    before = everything(opt)
    with pytest.raises((ValueError, TypeError), match="at t=1 max_grad_norm must be"):
        opt.step(grads)
    with pytest.raises((ValueError, TypeError), match="at t=1 max_grad_norm must be"):
        opt.max_grad_norm  # noqa: B018
    opt.max_grad_norm = 2.0
    assert_same(everything(opt)["groups"], before["groups"])
    opt.step(grads)
    with pytest.raises((ValueError, TypeError), match="at t=2 max_grad_norm must be"):
        opt.max_grad_norm = lambda t: value
    assert opt.max_grad_norm == 2


def test_what_a_schedule_raises_is_passed_on():
    def broken(t):
        return 1.0 / (2 - t)

    opt = ac.SGD(np.zeros(3), max_grad_norm=broken)
    opt.step(np.ones(3))
    opt.step(np.ones(3))
    with pytest.raises(ZeroDivisionError) as error:
        opt.step(np.ones(3))
    assert "the schedule of max_grad_norm: at t=2" in error.value.__notes__[0]
    assert opt.t == 2


def test_a_schedule_of_whole_numbers_and_refusals():
    opt = ac.SGD(np.zeros(3), lr=1.0, max_grad_norm=lambda t: 1 + t)
    opt.step(np.full(3, 100.0))
    assert opt.max_grad_norm == 2
    with pytest.raises(ValueError, match=r"stepping\(\) is refused with max_grad_norm=<function"), opt.stepping():
        pass
    with pytest.raises(TypeError, match="max_grad_value must be a number"):
        opt.max_grad_value = falling
    with pytest.raises(ValueError, match="at t=0 max_grad_norm must be"):
        ac.SGD(np.zeros(3), max_grad_norm=lambda t: -1.0)


@pytest.mark.parametrize("over", ["all", "group", "array"])
@pytest.mark.parametrize(("dtype", "limit", "size"), [("float32", 1e25, 1e22), ("float64", 1e200, 1e160)])
def test_a_gradient_whose_square_overflows_is_skipped_below_the_limit_too(over, dtype, limit, size):
    opt = ac.Adam(np.ones(3, dtype), max_grad_norm=limit, norm_over=over, on_nonfinite="skip")
    opt.step(np.array([size, 0, 0], dtype))
    assert (opt.skipped_steps, opt.t) == (1, 0)

"""A learning rate for one step: the bits of assigning it, checked as lr is, and gone after the step."""

import numpy as np
import pytest
from cases import CASES
from support import assert_same, build, everything, gradients, step_range

import adaptive_c as ac
from adaptive_c import schedules as s

RATES = [0.3, 0.0, 0.01, 1, np.float32(0.2), 7.5]
FOLLOWS = [case for case in CASES if case[1] not in ("Rprop", "SuperSAB")]


def twins(make):
    """Two optimizers of the same kind, one to be told lr at each step, one whose lr is assigned."""
    return make(), make()


def assigned(opt, lr, step):
    """A step with lr as an option, which is what it was before afterwards."""
    options = [group.options["lr"] for group in opt.param_groups]
    for group in opt.param_groups:
        group["lr"] = lr
    step(opt)
    for group, before in zip(opt.param_groups, options, strict=True):
        group["lr"] = before


@pytest.mark.parametrize(("name", "options"), [case[1:] for case in FOLLOWS], ids=[case[0] for case in FOLLOWS])
def test_it_has_the_bits_of_an_option_that_is_assigned(name, options):
    size, rng = 5000, np.random.default_rng(1)
    start, grads = rng.normal(size=size).astype("f4"), gradients(rng, size, "f4", len(RATES))
    told, other = twins(lambda: build(name, start.copy(), options))
    for lr, g in zip(RATES, grads, strict=True):
        told.step(g, lr=lr)
        assigned(other, lr, lambda opt, g=g: opt.step(g))
        for opt in (told, other):  # the option is in force again
            opt.step(g)
            assert opt.param_groups[0]["lr"] == options["lr"]
    assert_same(everything(told), everything(other))


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_after_sums_array_by_array_and_in_ranges(dtype):
    def make():
        rng = np.random.default_rng(2)
        return ac.Adam({"a": rng.normal(size=9000).astype(dtype), "b": rng.normal(size=3).astype(dtype)})

    g = {"a": np.full(9000, 0.5, dtype), "b": np.full(3, -2.0, dtype)}
    told, other = twins(make)
    told.accumulate(g)
    told.step(lr=0.1)
    assigned(other, 0.1, lambda opt: opt.step(g))
    with told.stepping(lr=0.2) as now:
        now("b", g["b"])
        now("a", g["a"])
    assigned(other, 0.2, lambda opt: opt.step(g))
    step_range(told, g, lo=4096, count=False, lr=0.3)
    step_range(told, g, hi=4096, lr=0.3)
    assigned(other, 0.3, lambda opt: opt.step(g))
    step_range(told, g)
    other.step(g)
    assert_same(everything(told), everything(other))


def test_a_schedule_is_overridden_for_this_step_and_goes_on():
    w = np.ones(1)
    opt = ac.SGD(w, lr=s.step(8.0, 2, gamma=0.5))
    moved = []
    for lr in (None, 0.25, None, 0.5, None):
        before = w[0]
        opt.step(np.ones(1), lr=lr)
        moved.append(before - w[0])
    assert moved == [8, 0.25, 4, 0.5, 2]
    assert isinstance(opt.param_groups[0].options["lr"], s.step)


def test_groups_have_one_for_all_or_one_each():
    a, b = np.zeros(2), np.zeros(2)
    opt = ac.SGD([{"params": a, "lr": 4.0}, {"params": [b]}], lr=2.0)
    g = [np.ones(2), [np.ones(2)]]
    for lr, moved in (
        (1.0, (1, 1)),
        ([0.5, None], (0.5, 2)),
        ((None, 8), (4, 8)),
        ([None, None], (4, 2)),
        (None, (4, 2)),
    ):
        a[:] = b[:] = 0
        opt.step(g, lr=lr)
        assert (-a[0], -b[0]) == moved
    with opt.stepping(lr=[0.5, 0.25]) as now:
        a[:] = b[:] = 0
        now(0, g[0])
        now(1, 0, g[1][0])
    assert (-a[0], -b[0]) == (0.5, 0.25)


def test_rows_that_are_replayed_later_take_the_step_with_it():
    def make():
        return ac.Adam(np.ones((6, 3), "f4"), lr=0.1, weight_decay=0.1, rows="exact")

    told, dense = twins(make)
    rng = np.random.default_rng(3)
    for lr in (0.5, None, 0.01, 2.0):
        rows, values = rng.integers(0, 6, 2), rng.normal(size=(2, 3)).astype("f4")
        full = np.zeros((6, 3), "f4")
        np.add.at(full, rows, values)
        told.step(ac.Rows(rows, values), lr=lr)
        dense.step(full, lr=lr)
    told.catch_up()
    assert_same(everything(told), everything(dense))


def test_a_rollback_undoes_it():
    w = np.ones(3)
    opt = ac.SGD(w, lr=1.0, keep_undo=True)
    opt.step(np.ones(3), lr=0.5)
    opt.rollback()
    assert (w == 1).all()
    opt.step(np.ones(3))
    assert (w == 0).all()


WRONG = [
    (-1.0, ValueError, "param_groups[0]: at t=1 lr must be in [0, inf), got -1.0"),
    (np.nan, ValueError, "lr must be in [0, inf), got nan"),
    (1e39, ValueError, "lr=1e+39 is infinite in float32"),
    ("x", TypeError, "lr of a step must be a number, got 'x'"),
    (True, TypeError, "lr must be a number, got True"),
    (
        [0.1],
        TypeError,
        "lr of a step must be a number, got [0.1]; a list of numbers is for parameters that are a list of",
    ),
    (
        s.constant(0.1),
        TypeError,
        "got constant(base=0.1); pass lr=schedule(opt.t), or let all steps follow the schedule",
    ),
    (lambda t: 0.1, TypeError, "opt.param_groups[0]['lr'] = schedule"),
    (np.array([0.1]), TypeError, "lr of a step must be a number, got an ndarray of shape (1,); pass float(lr)"),
    (np.array([0.1, 0.2]), TypeError, "lr of a step must be a number, got an ndarray of shape (2,)"),
]


@pytest.mark.parametrize(("lr", "error", "message"), WRONG, ids=[case[2] for case in WRONG])
@pytest.mark.parametrize("way", ["step", "sums", "stepping"])
def test_what_lr_may_not_be_is_refused_before_anything_is_written(lr, error, message, way):
    w = np.ones(3, "f4")
    opt = ac.SGD(w, lr=0.5)
    opt.step(np.ones(3, "f4"))
    if way == "sums":
        opt.accumulate(np.ones(3, "f4"))
    before = everything(opt)
    calls = {
        "step": lambda: opt.step(np.ones(3, "f4"), lr=lr),
        "sums": lambda: opt.step(lr=lr),
        "stepping": lambda: opt.stepping(lr=lr).__enter__(),
    }
    with pytest.raises(error) as raised:
        calls[way]()
    assert message in str(raised.value)
    assert_same(everything(opt), before)
    opt.discard()
    opt.step(np.ones(3, "f4"))
    assert (w == 0).all()  # with the lr of the option


def test_a_list_that_does_not_fit_the_groups():
    opt = ac.SGD([{"params": np.ones(2)}, {"params": np.ones(2)}], lr=0.5)
    g = [np.ones(2), np.ones(2)]
    for lr in ([0.1], (0.1, 0.2, 0.3)):
        with pytest.raises(
            ValueError, match=f"lr of a step must be a number, or a list of one for each of the 2.*{len(lr)}"
        ):
            opt.step(g, lr=lr)
    with pytest.raises(ValueError, match=r"param_groups\[1\]: at t=0 lr must be in"):
        opt.step(g, lr=[0.1, -0.1])
    opt.step(g)
    assert (opt.param_groups[0]["params"] == 0.5).all()


@pytest.mark.parametrize("name", ["Rprop", "SuperSAB"])
def test_rules_that_read_lr_once_refuse_it(name):
    opt = getattr(ac, name)(np.ones(2))
    for call in (lambda: opt.step(np.ones(2), lr=0.1), lambda: opt.stepping(lr=0.1)):
        with pytest.raises(ValueError, match=f"lr=0.1 is refused in a step: {name} reads lr at an array's first step"):
            call()
    assert opt.t == 0


def test_a_step_that_raises_leaves_the_option_in_force():
    w = np.ones(2)
    opt = ac.SGD(w, lr=0.5, on_nonfinite="raise")
    with pytest.raises(ValueError, match="nothing was changed"):
        opt.step(np.full(2, np.nan), lr=0.25)
    opt.step(np.ones(2))
    assert (w == 0.5).all()
    opt = ac.SGD(w, lr=0.5)
    with pytest.raises(ZeroDivisionError), opt.stepping(lr=0.25) as now:  # noqa: PT012
        now(np.ones(2))
        raise ZeroDivisionError
    opt.step(np.ones(2))
    assert (w == -0.25).all()

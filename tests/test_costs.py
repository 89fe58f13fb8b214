"""What an assignment, a look at the state and a schedule cost, in calls of Python functions: times are no test."""

import numpy as np
import pytest
from support import calls

import adaptive_c as ac

ONE = np.ones((3, 4))


class Assign:
    """Assigns to an option; the call is the first that `calls` sees."""

    def __init__(self, group, name, value):
        self.group, self.name, self.value = group, name, value

    def __call__(self):
        self.group[self.name] = self.value


NUMBERS = [("lr", 0.25), ("weight_decay", 0.5), ("eps", 1e-6), ("ema_decay", 0.75)]


def build(**options):
    return ac.Adam(np.ones((3, 4)), ema_decay=0.5, bounds=(np.zeros((3, 4)), 2.0), **options)


@pytest.mark.parametrize(("name", "value"), NUMBERS)
def test_a_new_number(name, value):
    opt = build()
    group = opt.param_groups[0]
    for x in (value, value / 2, value):
        assert len(calls(Assign(group, name, x))) <= 6
        assert group[name] == x
    opt.step(ONE)
    assert opt.t == 1


@pytest.mark.parametrize(("name", "value"), NUMBERS)
def test_the_number_that_is_in_force(name, value):
    opt = build()
    group = opt.param_groups[0]
    group[name] = value
    assert len(calls(Assign(group, name, value))) <= 1
    assert len(calls(Assign(group, name, float(str(value))))) <= 1  # another object, the same number
    assert group[name] == value


def test_what_is_equal_but_no_such_number_is_checked_as_ever():
    opt = build(lr=1.0)
    group = opt.param_groups[0]
    for wrong in (True, np.True_, "1.0", np.ones(1), 1.0 + 0j):
        with pytest.raises((TypeError, ValueError), match="lr must be a number"):
            group["lr"] = wrong
    with pytest.raises(TypeError, match="amsgrad must be True or False"):
        group["amsgrad"] = 0
    with pytest.raises(KeyError, match="'rate' is not an option"):
        group["rate"] = 1.0
    for fine in (1, np.float32(1.0), np.int64(1)):
        group["lr"] = fine
        assert type(group["lr"]) is float


def test_the_number_that_a_schedule_gives_takes_its_place():
    opt = build(lr=lambda t: 0.25)
    group = opt.param_groups[0]
    opt.step(ONE)
    assert group["lr"] == 0.25
    group["lr"] = 0.25
    assert "lr" not in group.schedules
    group["betas"] = (lambda t: 0.9, 0.999)
    group["betas"] = (0.9, 0.999)
    assert not group.schedules


def test_a_number_beside_a_schedule():
    opt = build(weight_decay=ac.schedules.linear(0.1, 10), lr=0.5)
    group = opt.param_groups[0]
    opt.step(ONE)
    group["lr"] = 0.25
    assert len(calls(Assign(group, "lr", 0.25))) <= 1
    assert group["lr"] == 0.25
    assert group.schedules.keys() == {"weight_decay"}


def test_the_state():
    opt = build()
    opt.step(ONE)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        assert len(calls(lambda name=name: opt.state[name])) <= 4


def plain_step(opt):
    return len(calls(lambda: opt.step(ONE)))


def test_a_plain_step():
    opt = build()
    opt.step(ONE)
    assert plain_step(opt) <= 1


SCHEDULES = {
    "constant": lambda: ac.schedules.constant(0.1),
    "linear": lambda: ac.schedules.linear(0.1, 1000),
    "cosine": lambda: ac.schedules.cosine(0.1, 1000),
    "exponential": lambda: ac.schedules.exponential(0.1, 0.99),
    "step": lambda: ac.schedules.step(0.1, 10),
}


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_of_ours(make):
    plain, opt = build(), build(lr=make())
    for _ in range(3):
        plain.step(ONE)
        opt.step(ONE)
        assert plain_step(opt) <= plain_step(plain) + 2


def test_a_function():
    """It costs its own call beside those of one of ours."""
    plain, opt = build(), build(lr=lambda t: 0.1 / (1 + t))
    for _ in range(3):
        plain.step(ONE)
        opt.step(ONE)
        assert plain_step(opt) <= plain_step(plain) + 3

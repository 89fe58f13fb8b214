"""The norm that clips: assigned at each step, over all gradients, each group or each array, and on a schedule."""

import numpy as np
import pytest

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
        assert type(getattr(opt, name)) is float and getattr(opt, name) == value
        p[:] = q[:] = 0
        opt.step(g)
        ac.SGD(q, lr=1.0, **{name: float(value)}).step(g)
        assert (p == q).all() and p.any()
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
    assert not g.any() and opt.zero_grad is True
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
    assert assigned and opt.max_grad_norm == 2 and opt.seed == 5

"""Counts that users write are checked before a step uses them: no loop in C runs as long as a number says.

What would hang runs in a process of its own, which is ended if it does.
"""

import math

import numpy as np
import pytest
from support import assert_same_bits, child

import adaptive_c as ac
from adaptive_c.reference import power_of_096

RULES = list(ac.optimizers.__all__)
TOP = 1 << 62  # the first count that is too large
BAD = [-1, -2, -(1 << 63), TOP, (1 << 63) - 1]


# Every bad count for every rule, in every structure and in both kinds of step.  Nothing may have been written.
REFUSED = """
import numpy as np, adaptive_c as ac

def everything(opt, params, grads, last):
    count = int(last)
    last[...] = 1  # state_dict refuses a bad count, too
    d = opt.state_dict()["groups"][0]["arrays"]
    found = [x.tobytes() for x in (*params, *grads, *d.values())]
    last[...] = count
    return [*found, count, opt.t, opt.pending, opt.skipped_steps]

for rule, bad in [(rule, bad) for rule in {rules} for bad in {bad}]:
    print(rule, bad, flush=True)
    for wrap, name in ((lambda x: x[0], "params"), (list, "params[1]"), (lambda x: dict(zip("ab", x)), "params['b']")):
        for accumulated in (False, True):
            params = [np.ones(3), np.ones(2)][: 1 if name == "params" else 2]
            grads = [np.ones_like(p) for p in params]
            opt = getattr(ac, rule)(wrap(params), ema_decay=0.5, zero_grad=True)
            opt.step(wrap([g.copy() for g in grads]))
            step = opt.state["step"]
            last = step if name == "params" else step["b"] if name.endswith("'b']") else step[-1]
            last[...] = bad
            if accumulated:
                opt.accumulate(wrap([g.copy() for g in grads]))
            before = everything(opt, params, grads, last)
            for attempt in range(2):
                try:
                    opt.step() if accumulated else opt.step(wrap(grads))
                except ValueError as error:
                    told = str(error)
                    assert name in told and str(bad) in told, told
                else:
                    raise AssertionError("not refused")
                assert everything(opt, params, grads, last) == before
            last[...] = 1
            opt.step() if accumulated else opt.step(wrap(grads))
            assert opt.t == 2 and last == 2
"""


def test_a_bad_count_is_refused_before_the_first_write():
    told = child(REFUSED.format(rules=RULES, bad=BAD)).splitlines()
    assert told == [f"{rule} {bad}" for rule in RULES for bad in BAD]


LARGE = """
import numpy as np, adaptive_c as ac
for rule in {rules}:
    print(rule, flush=True)
    p = np.ones(3)
    opt = getattr(ac, rule)(p)
    opt.step(np.ones(3))
    opt.state["step"][...] = 2**62 - 2
    opt.step(np.ones(3))
    assert opt.state["step"] == 2**62 - 1 and np.isfinite(p).all()
    opt.t = 2**62 - 2
    opt.step(np.ones(3))
    assert opt.t == opt.state["step"] == 2**62 - 1 and np.isfinite(p).all()
"""


def test_the_largest_counts_are_counts_like_others():
    assert child(LARGE.format(rules=RULES)).split() == RULES


AT_ONCE = """
import itertools, sys
import numpy as np, adaptive_c as ac
near = float(np.nextafter(1.0, 0.0))
betas, decays = (0.0, 0.5, 0.9, 0.9999, 1 - 1e-8, near), (0.0, 1e-300, 1e-9, 0.004, 0.02, 1.0, 1e9)
for beta, decay in itertools.product(betas, decays):
    for t in (10**10, 2**62 - 1):
        opt = ac.NAdam(np.ones(3), betas=(beta, 0.999), momentum_decay=decay)
        opt.t = t
        product = float(opt.state["mu_product"])
        assert opt.t == t and 0 <= product < 1, (beta, decay, t, product)
        opt.state["step"][...] = t - 1
        opt.step(np.ones(3))
print("ok")
"""


def test_t_of_nadam_is_set_at_once_whatever_its_numbers_are():
    assert child(AT_ONCE) == "ok\n"


def product(beta, decay, t):
    """By the definition."""
    mu, decayed = 1.0, 1.0
    for k in range(1, t + 1):
        if decayed > 1e-17:  # what is less leaves 1 as it is
            decayed = power_of_096(k * decay)
        mu *= beta * (1.0 - 0.5 * decayed)
    return mu


@pytest.mark.parametrize(
    ("beta", "decay", "t"),
    [
        (0.9, 0.004, 0),
        (0.9, 0.004, 1),
        (0.9, 0.004, 25),  # about 1e-8
        (0.9, 0.004, 60),
        (0.9, 1.0, 1000),
        (0.5, 1e9, 996),  # 2**-996, about 1.5e-300
        (0.999, 0.03, 50_000),
        (0.9999, 1.0, 100_000),
        (1 - 1e-8, 0.1, 100_000),
        (float(np.nextafter(1.0, 0.0)), 1.0, 100_000),
    ],
)
def test_the_product_of_nadam_is_that_of_the_definition(beta, decay, t):
    opt = ac.NAdam(np.ones(3), betas=(beta, 0.999), momentum_decay=decay)
    opt.t = t
    expected = product(beta, decay, t)
    assert expected > 1e-300
    assert float(opt.state["mu_product"]) == pytest.approx(expected, rel=1e-9, abs=0)


@pytest.mark.parametrize(("beta", "decay", "t"), [(0.9, 0.004, 1000), (0.5, 1e9, 997), (0.5, 1e9, 2000), (0.0, 1.0, 1)])
def test_a_product_below_1e_300_is_0(beta, decay, t):
    opt = ac.NAdam(np.ones(3), betas=(beta, 0.999), momentum_decay=decay)
    opt.t = t
    assert product(beta, decay, t) < 1e-300
    assert float(opt.state["mu_product"]) == 0.0


MANY_STEPS = """
import numpy as np, adaptive_c as ac
for t in (10**10, 2 * 10**10, 3 * 10**10):
    opt = ac.NAdam(np.ones(3), betas=(1 - 1e-10, 0.999), momentum_decay=1.0)
    opt.t = t
    print(float(opt.state["mu_product"]))
"""


def test_the_product_of_very_many_steps():
    """From some step on a factor is beta1 alone: the rest is a power."""
    began = product(1.0, 1.0, 2000)
    expected = [began * math.exp(t * 1e10 * math.log1p(-1e-10)) for t in (1, 2, 3)]
    assert [float(line) for line in child(MANY_STEPS).split()] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("t", [1, 3, 40])
def test_a_run_that_begins_at_t_has_the_product_of_one_that_came_there(t):
    came, began = ac.NAdam(np.ones(3)), ac.NAdam(np.ones(3))
    for _ in range(t):
        came.step(np.ones(3))
    began.t = t
    assert float(began.state["mu_product"]) == pytest.approx(float(came.state["mu_product"]), rel=1e-14)


def test_neighbours_of_one_count_have_products_of_their_own():
    """The first array has taken its only step with other betas than the second."""
    grad, p = np.ones(3), [np.zeros(3), np.zeros(3)]
    both = ac.NAdam(p)
    alone = [ac.NAdam(np.zeros(3)) for _ in p]
    for i, beta in enumerate((0.5, 0.9)):
        for opt in both, alone[i]:
            opt.param_groups[0]["betas"] = (beta, 0.999)
        both.step([grad if j == i else None for j in (0, 1)])
        alone[i].step(grad)
    alone[0].param_groups[0]["betas"] = (0.9, 0.999)
    both.step([grad, grad])
    for opt, x, product in zip(alone, p, both.state["mu_product"], strict=True):
        opt.step(grad)
        assert_same_bits(x, opt.param_groups[0]["params"])
        assert_same_bits(product, opt.state["mu_product"])

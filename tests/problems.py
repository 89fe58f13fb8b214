"""The functions that the tests of minimize share, and a loop by hand."""

import numpy as np

import adaptive_c as ac

START = np.array([-1.5, 2.0])


def quartic(x):
    """Least at -1.10715987169, with another minimum at 0.837565435283."""
    return x**4 - 2 * x**2 + x, 4 * x**3 - 4 * x + 1


def bowl(x):
    """((x - 3)^2).sum(), for x of any shape."""
    return ((x - 3) ** 2).sum(), 2 * (x - 3)


def by_hand(fun, x0, steps, optimizer=ac.Adam, **options):
    x = np.array(x0)
    opt = optimizer(x, **options)
    for _ in range(steps):
        opt.step(fun(x)[1])
    return x, opt

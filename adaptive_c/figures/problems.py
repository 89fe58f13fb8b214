"""The problems that are drawn, with exact gradients, and the course of an optimizer over one of them.

A problem is a function of one or two weights.  `trace` runs one of the library's optimizers over it and keeps all that
a picture may want to show.  Only NumPy and the library are needed here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .. import optimizers

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Problem:
    """A function of one or two weights.

    Parameters
    ----------
    formula : str
        The function as one writes it in Python, of w1 and w2.
    value : callable
        It takes weights of the shape (d, ...) and returns the shape (...), for one point and for a grid.
    gradient : callable
        It takes the same and returns the shape (d, ...).
    start : tuple of float
        Where an optimizer starts.
    window : tuple of (float, float)
        What to show of each weight.
    minima : tuple of tuple of float, default ()
        Where the minima are.

    Examples
    --------
    >>> from adaptive_c.figures.problems import BOWL
    >>> BOWL.formula, float(BOWL.value((1.0, 2.0))), BOWL.gradient((1.0, 2.0))
    ('3*w1**2 + 10*w2**2', 43.0, array([ 6., 40.]))
    """

    formula: str
    value: Callable[[Array], Array]
    gradient: Callable[[Array], Array]
    start: tuple[float, ...]
    window: tuple[tuple[float, float], ...]
    minima: tuple[tuple[float, ...], ...] = ()


def _quadratic(a: float, b: float, start: tuple[float, float], window: tuple[tuple[float, float], ...]) -> Problem:
    """The problem a w1**2 + b w2**2."""
    return Problem(
        f"{a:g}*w1**2 + {b:g}*w2**2",
        lambda w: a * w[0] ** 2 + b * w[1] ** 2,
        lambda w: np.stack([2 * a * w[0], 2 * b * w[1]]),
        start, window, ((0.0, 0.0),),
    )  # fmt: skip


BOWL = _quadratic(3, 10, (-15.0, 20.0), ((-20, 20), (-25, 25)))
RAVINE = _quadratic(0.5, 10, (-9.0, 1.6), ((-10, 2), (-2.4, 2.4)))
ROSENBROCK = Problem(
    "(1 - w1)**2 + 100*(w2 - w1**2)**2",
    lambda w: (1 - w[0]) ** 2 + 100 * (w[1] - w[0] ** 2) ** 2,
    lambda w: np.stack([-2 * (1 - w[0]) - 400 * w[0] * (w[1] - w[0] ** 2), 200 * (w[1] - w[0] ** 2)]),
    (-1.2, 1.0), ((-1.8, 1.8), (-0.8, 2.2)), ((1.0, 1.0),),
)  # fmt: skip
WAVES = Problem(
    "sin(w1) + cos(w2)",
    lambda w: np.sin(w[0]) + np.cos(w[1]),
    lambda w: np.stack([np.cos(w[0]), -np.sin(w[1])]),
    (1.2, 0.4), ((-4, 4), (-4.5, 4.5)), ((-np.pi / 2, np.pi), (-np.pi / 2, -np.pi)),
)  # fmt: skip
VALLEYS = Problem(
    "w1**4 - 2*w1**2 + w1 + 2*w2**2",
    lambda w: w[0] ** 4 - 2 * w[0] ** 2 + w[0] + 2 * w[1] ** 2,
    lambda w: np.stack([4 * w[0] ** 3 - 4 * w[0] + 1, 4 * w[1]]),
    (1.6, 1.2), ((-2, 2), (-1.6, 1.6)), ((-1.1071598716887, 0.0), (0.8375654352833, 0.0)),
)  # fmt: skip
HIMMELBLAU = Problem(
    "(w1**2 + w2 - 11)**2 + (w1 + w2**2 - 7)**2",
    lambda w: (w[0] ** 2 + w[1] - 11) ** 2 + (w[0] + w[1] ** 2 - 7) ** 2,
    lambda w: np.stack([4 * w[0] * (w[0] ** 2 + w[1] - 11) + 2 * (w[0] + w[1] ** 2 - 7),
                        2 * (w[0] ** 2 + w[1] - 11) + 4 * w[1] * (w[0] + w[1] ** 2 - 7)]),
    (0.0, -0.5), ((-5, 5), (-5, 5)),
    ((3.0, 2.0), (-2.805118086953, 3.131312518250), (-3.779310253378, -3.283185991286),
     (3.584428340330, -1.848126526964)),
)  # fmt: skip
SADDLE = Problem(
    "w1**2 - w2**2 + w2**4/4",
    lambda w: w[0] ** 2 - w[1] ** 2 + w[1] ** 4 / 4,
    lambda w: np.stack([2 * w[0], w[1] ** 3 - 2 * w[1]]),
    (-1.8, 0.01), ((-2.2, 2.2), (-2.2, 2.2)), ((0.0, 2**0.5), (0.0, -(2**0.5))),
)  # fmt: skip

QUARTIC = Problem(
    "w1**4 - 2*w1**2 + w1",
    lambda w: w[0] ** 4 - 2 * w[0] ** 2 + w[0],
    lambda w: np.stack([4 * w[0] ** 3 - 4 * w[0] + 1]),
    (0.1,), ((-2.5, 2.5),), ((-1.1071598716887,), (0.8375654352833,)),
)  # fmt: skip
RIPPLES = Problem(
    "(w1**2 - 2*w1)**2 + 0.5*sin(12*w1)",
    lambda w: (w[0] ** 2 - 2 * w[0]) ** 2 + 0.5 * np.sin(12 * w[0]),
    lambda w: np.stack([4 * w[0] ** 3 - 12 * w[0] ** 2 + 8 * w[0] + 6 * np.cos(12 * w[0])]),
    (0.5,), ((-1, 3),),
    ((-0.1156496792634,), (0.3713435584,), (0.9114121341,), (1.460251532,), (1.966985087,), (2.396573526,)),
)  # fmt: skip

PLANE = {"bowl": BOWL, "ravine": RAVINE, "Rosenbrock": ROSENBROCK, "waves": WAVES, "two valleys": VALLEYS,
         "Himmelblau": HIMMELBLAU, "saddle": SADDLE}  # fmt: skip
LINE = {"quartic": QUARTIC, "ripples": RIPPLES}


# What the arrays of the optimizers' state are called in formulas.
SYMBOLS = {"square_avg": "s", "exp_avg_sq": "s", "sum": "s", "exp_avg": "m", "momentum_buffer": "b", "step_size": "e",
           "acc_delta": "u", "exp_inf": "u", "prev": "q"}  # fmt: skip


@dataclass(frozen=True)
class Trace:
    """The course of an optimizer: row t of each array is what there is after t steps.

    Parameters
    ----------
    w : (steps + 1, d) array
        The weights.
    error : (steps + 1,) array
        The function there.
    gradient : (steps + 1, d) array
        The gradient there.
    state : dict of (steps + 1, d) arrays
        By the names of the optimizer's state; 0 before the first step.

    Examples
    --------
    >>> from adaptive_c.figures.problems import BOWL, trace
    >>> trace("Adam", BOWL, steps=100).w.shape
    (101, 2)
    """

    w: Array
    error: Array
    gradient: Array
    state: dict[str, Array]

    @property
    def update(self) -> Array:
        """What each step subtracts from the weights, learning rate included: (steps, d)."""
        with np.errstate(all="ignore"):  # of what has diverged
            return -np.diff(self.w, axis=0)


def trace(rule: str, problem: Problem, steps: int, start: tuple[float, ...] | None = None, *,
          dtype: str = "float64", **options: Any) -> Trace:  # fmt: skip
    """Run an optimizer and keep its course.

    Parameters
    ----------
    rule : str
        The name of one of the library's classes.
    problem : Problem
        The function.
    steps : int
        How many steps to make.
    start : tuple of float, optional
        Where to start, by default where the problem says.
    dtype : {"float64", "float32"}, default "float64"
        The type of the weights.
    **options
        Arguments of the class.

    Returns
    -------
    Trace
        The course.  Weights that overflow are kept as infinity or NaN.

    Examples
    --------
    >>> from adaptive_c.figures.problems import BOWL, trace
    >>> course = trace("SGD", BOWL, steps=50, lr=0.05)
    >>> bool(course.error[-1] < 1e-3 * course.error[0])
    True
    """
    w = np.array(problem.start if start is None else start, dtype)
    opt = getattr(optimizers, rule)(w, **options)
    live = {name: array for name, array in opt.state.items() if array.shape == w.shape}  # not the counts
    path, slope = np.empty((steps + 1, w.size)), np.empty((steps + 1, w.size))
    state = {name: np.zeros((steps + 1, w.size)) for name in live}
    with np.errstate(all="ignore"):
        for t in range(steps + 1):
            path[t] = w
            gradient = problem.gradient(w)
            slope[t] = gradient
            if t < steps:
                opt.step(gradient)
                for name, array in live.items():
                    state[name][t + 1] = array
        error = problem.value(path.T)
    return Trace(path, error, slope, state)


def amplified(beta: float, first: Array, second: Array) -> Array:
    """``|v(2)| - |g2|``: how much longer RMSprop's second update is than that gradient, with lr 1, eps 1e-8 inside.

    Parameters
    ----------
    beta : float in [0, 1]
        The decay constant of the running average.
    first : array
        The first gradients.
    second : array of the same shape
        The second gradients.

    Returns
    -------
    array of the same shape
        The difference, negative where RMSprop shortens the step.

    Examples
    --------
    >>> import numpy as np
    >>> from adaptive_c.figures.problems import amplified
    >>> amplified(0.5, np.array([0.1, 10.0]), np.array([0.5, 2.0])).round(2)
    array([ 0.9 , -1.62])
    """
    w = np.zeros(first.shape)
    opt = optimizers.RMSprop(w, lr=1.0, alpha=beta, eps=1e-8, eps_mode="inside")
    opt.step(first)
    before = w.copy()
    opt.step(second)
    return np.abs(before - w) - np.abs(second)

"""`minimize`: a loop around an optimizer, with SciPy's conventions.

tqdm is imported only for progress=True.
"""

import math
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from inspect import signature
from itertools import repeat
from typing import Any, Literal

import numpy as np

from . import _problem as problem
from . import optimizers
from ._optimizer import Optimizer
from ._problem import Array, Limits
from ._run.habits import meant
from ._run.options import real
from .optimizers import Adam
from .typing import Schedulable

SUCCESS, MAXITER, NOT_FINITE, EXHAUSTED, BEHIND, CALLBACK = 0, 1, 3, 4, 5, 99  # SciPy's numbers; 4 and 5 are ours
_MESSAGES = {  # SciPy's sentences
    SUCCESS: "Optimization terminated successfully.",
    MAXITER: "Maximum number of iterations has been exceeded.",
    NOT_FINITE: "NaN result encountered.",
    EXHAUSTED: "The batches are used up.",
    BEHIND: "The last x reached tol, but its average, which is returned, did not; try average='best' or a smaller tol.",
    CALLBACK: "`callback` raised `StopIteration`.",
}
_ELSEWHERE = {
    "maximize": "minimize -fun",
    "loss_scale": "let fun return the gradient itself",
    "method": "say optimizer=Adam, or another class",
    "options": "its items are arguments here: maxiter=100, lr=0.1",
    "gtol": "it is tol here",
    "ftol": "tol is about the gradient; patience is about f",
    "xtol": "tol is about the gradient; patience is about f",
    "maxfun": "maxiter limits the evaluations, too: there is one in each iteration",
    "maxfev": "maxiter limits the evaluations, too: there is one in each iteration",
    "hess": "the optimizers use first derivatives alone",
    "hessp": "the optimizers use first derivatives alone",
    "constraints": "there are only bounds",
    "optimizer": "it is the first argument of scipy_method",
}
_TOL = 1e-5  # as SciPy's gtol
_LARGE = 1 << 16  # elements: beyond, one more pass over x or g costs as much as other parts of an iteration do
_SPARE = 32  # iterations between two copies of a large x, which then cost about 1%


def _whole(name: str, value: Any, least: int) -> int:
    """An integer argument, checked."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def _bar(maxiter: int) -> Any:
    """A progress bar of tqdm."""
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError(
            "progress=True needs tqdm: pip install 'adaptive_c[progress]', or say progress=False"
        ) from None
    return tqdm(total=maxiter)


def _recent(t: int) -> float:
    """The decay of an average over about the last ninth of a run: e <- e + 9/(t + 9) (x - e), t steps after the first.

    It needs neither the length of the run nor to forget where the average began (Shamir & Zhang 2013, eta = 8).
    """
    return t / (t + 9)


def _chosen(average: Any, ema_decay: Any, noisy: bool, window: int) -> Any:
    """Read the argument that says which x is returned: "best", "last", or the decay of an average."""
    if average is not None and ema_decay is not None:
        raise TypeError(f"average={average!r} and ema_decay={ema_decay!r} are one thing; drop one")
    chosen = average if ema_decay is None else ema_decay
    if chosen is None:
        chosen = True if noisy else "best"
    if chosen is False or (isinstance(chosen, str) and chosen not in ("best", "last")):
        raise ValueError(f"average must be 'best', 'last', True, a decay or None, got {chosen!r}")
    if chosen == "best" and noisy and not window:
        raise ValueError("average='best' needs patience, because the lowest value of a noisy function is chance")
    return _recent if chosen is True else chosen


def _reads_metric(opt: Optimizer) -> bool:
    """Whether there is a plateau among its schedules."""
    found = (opt.schedules, opt.param_groups[0].schedules)
    every = (
        part
        for schedules in found
        for value in schedules.values()
        for part in (value if isinstance(value, tuple) else (value,))
    )
    return any(getattr(part, "reads_metric", False) for part in every)


def _element(g: Array, x: Array, limits: Limits, i: int) -> float:
    """The magnitude of element i of the projected gradient.  While it is larger than tol, the largest one is, too."""
    p: float = g.item(i)
    return abs(p) if limits is None else min(abs(p), abs(x.item(i) - limits[p < 0].item(i)))


def _largest(g: Array, x: Array, limits: Limits) -> tuple[float, int]:
    """The largest magnitude in the projected gradient, and where it is; NaN if there is one."""
    p = g if limits is None else np.clip(g, x - limits[1], x - limits[0])
    return max((abs(p.item(i)), int(i)) for i in (p.argmax(), p.argmin()))


def _state(f: float, g: Array, x: Array, limits: Limits) -> str:
    """What the progress bar shows beside the number of iterations."""
    return f"f={f:.6g}, |g|={_largest(g, x, limits)[0]:.2e}"


def _fault(a: Array) -> str:
    """What is wrong with a gradient that was not used, or with an x."""
    if not a.any():  # zero_grad has zeroed it
        return "was not finite"
    if np.isfinite(a).all():
        return "is so large that its square or norm overflows"
    i = tuple(map(int, np.argwhere(~np.isfinite(a))[0]))
    return f"is {a[i]} at index {i}"


def advice(name: str, optimizer: Callable[..., Optimizer] = Adam) -> str:
    """What to write instead of an argument that there is not, in parentheses; nothing if that can't be guessed."""
    if name in _ELSEWHERE:
        return f" ({_ELSEWHERE[name]})"
    known = {*signature(minimize).parameters, *signature(Optimizer).parameters, *signature(optimizer).parameters}
    known -= {"options", "params", "shared"}
    return "" if name in known else meant(name, sorted(known))


def check_class(optimizer: Any) -> None:
    """Refuse what is no class of this library, and no function that may make one of its optimizers."""
    if isinstance(optimizer, type):
        name, right = optimizer.__name__, issubclass(optimizer, Optimizer) and optimizer is not Optimizer
    else:
        name, right = optimizer if isinstance(optimizer, str) else type(optimizer).__name__, callable(optimizer)
    if not right:
        own = {x.lower(): x for x in optimizers.__all__}.get(name.lower(), "Adam")
        raise TypeError(f"optimizer must be a class such as Adam, got {optimizer!r:.60}; say optimizer=adaptive_c."
                        f"{own}, and give its options as arguments beside it")  # fmt: skip


# --- the loop ---------------------------------------------------------------------------------------------------------


def minimize(
    fun: Callable[..., Any],
    x0: Any,
    args: Any = (),
    *,
    optimizer: Callable[..., Optimizer] = Adam,
    jac: Callable[..., Any] | Literal["out"] | bool | None = None,
    bounds: Any = None,
    callback: Callable[..., Any] | None = None,
    tol: float | None = None,
    maxiter: int = 1000,
    batches: Iterable[Any] | None = None,
    average: Literal["best", "last"] | Schedulable | None = None,
    patience: int | None = None,
    progress: bool = False,
    **options: Any,
) -> Any:
    """Minimize a function with an optimizer, as scipy.optimize.minimize does with its methods.

    ::

        while the projected gradient is larger than tol:  f, g = fun(x, *args);  opt.step(g)

    Parameters
    ----------
    fun : callable
        ``fun(x, *args)``, or with batches ``fun(x, batch, *args)``.  What it returns depends on jac.  x is the live
        array, through a view that can't be written: take ``x.copy()`` if you keep it.
    x0 : array_like, float
        Where to start: any shape, also a number.  It is not written.  Everything is float32 if it is float32, else
        float64.  What is outside of the bounds is moved to them.
    args : tuple, default ()
        Further arguments of fun and jac.  Anything else than a tuple is the only one.
    optimizer : class, default Adam
        A class of this library; ``**options`` are the arguments of its constructor.
    jac : True, callable or "out", optional
        True: fun returns (f, g).  A function: it returns g, and fun f.  "out": ``fun(x, *args, out=g)`` fills the array
        g, which is the same in every call, and returns f; then an iteration allocates no array.  g has the shape of x.
        The default, None, is refused: the gradient is needed.
    bounds : None, scipy.optimize.Bounds, sequence of pairs, or (lo, hi), optional
        As in SciPy, one pair (lo, hi) for each element with None for no bound.  Or two sides, each None, a number or an
        array in the shape of x0.  For two elements, two pairs are read as SciPy reads them, one for each element; they
        are refused if they can only be meant as sides: two arrays, or two lists that leave no room as pairs.  Every
        point that fun sees and that is returned is inside; ``keep_feasible`` changes nothing.
    callback : callable, optional
        Called after each iteration, with f at its new point: ``callback(intermediate_result=result)``, where result has
        x and fun, if that is the name of its only parameter, else ``callback(x)``; x is a copy.  StopIteration ends.
    tol : float >= 0, optional
        For an exact function: stop when no element of the projected gradient is larger.  The default is 1e-5.  The
        projected gradient is g, but 0 where the bounds keep x from following -g.  Refused for a noisy function.
    maxiter : int >= 0, default 1000
        The largest number of iterations, which are steps.
    batches : iterable, optional
        The items are passed to fun, one in each iteration.  What can be gone through again, such as a list, is; an
        iterator ends the minimization when it is used up.  It makes the function noisy.
    average : "best", "last", True, float in [0, 1) or schedule, optional
        Which x is returned: the one with the lowest f seen; the last one; or an average of them.  A number or a
        schedule is the average's decay, the optimizer's ``ema_decay``, which may be given by that name too.  True is
        t/(t + 9), an average over about the last ninth of all iterations.  The default is "best" for an exact function
        and True for a noisy one.  If noisy, "best" needs patience, and is the x at the end of the best mean.
    patience : int >= 1, optional
        Stop when the mean of f over this number of iterations is no lower than the lowest of the means before.  It says
        that the function is noisy.
    progress : bool, default False
        Show a bar with f, the norm that tol is about, and the time that is left.  Needs tqdm:
        ``pip install 'adaptive_c[progress]'``.
    **options
        Options of the optimizer: lr, schedules, max_grad_norm, n_threads and so on.  A plateau schedule is shown f.
        ``on_nonfinite="skip"`` goes on after a gradient or f that is not finite, "raise" raises for such a gradient.

    Returns
    -------
    scipy.optimize.OptimizeResult
        Or a dict with the same attributes where SciPy is not installed.  They are x; fun and jac, its value and
        gradient at x (for a noisy function, the recent mean of f, which "best" takes over the best patience iterations,
        and the last gradient); nit, the number of steps; nfev and njev; success, status and message.  status is

        0, success: tol or patience is reached.  1: maxiter is.  3: f or g is not finite; x is the best seen before, and
        always finite.  4: the batches are used up.  5: tol is reached by the last x, but not by the average of an
        exact function, which is returned, with its own fun and jac.  99: the callback raised StopIteration.

    Raises
    ------
    TypeError, ValueError
        If something doesn't fit, and what fun and the callback raise.
    ImportError
        For progress=True without tqdm.

    Notes
    -----
    With more than 65,536 elements, where each further pass over memory is felt, two things are spared unless they are
    asked for.  A copy of x is kept as a candidate for the best only if the last one is 32 iterations old; the last x
    is always one (``average="best"`` keeps each that is better).  And a gradient is not checked before it is used, but
    shows in the next f if it is not finite (``on_nonfinite="raise"`` checks it).

    Examples
    --------
    >>> import numpy as np
    >>> from adaptive_c import minimize
    >>> def f(x):
    ...     return ((x - 3) ** 2).sum(), 2 * (x - 3)
    >>> result = minimize(f, np.zeros(2), jac=True, lr=0.1)
    >>> result.success, result.x.round(4)
    (True, array([3., 3.]))

    Source of the average: Shamir & Zhang 2013 (eta = 8).

    Other libraries: in SciPy x has one dimension, the gradient may be left out, and which x is returned is not defined.
    """
    noisy = batches is not None or patience is not None
    if noisy and tol is not None:
        raise ValueError("tol needs exact gradients, and batches or patience say that they are noisy: drop tol")
    tol = _TOL if tol is None else real("tol", tol)
    if not tol >= 0:
        raise ValueError(f"tol must be at least 0, got {tol!r}")
    maxiter = _whole("maxiter", maxiter, 0)
    window = 0 if patience is None else _whole("patience", patience, 1)
    if not isinstance(progress, (bool, np.bool_)):
        raise TypeError(f"progress must be True or False, got {progress!r}")
    check_class(optimizer)
    for name, hint in _ELSEWHERE.items():
        if name in options:
            raise ValueError(f"{name} can't be given to minimize; {hint}")
    forgiving = options.get("on_nonfinite") == "skip"
    chosen = _chosen(average, options.pop("ema_decay", None), noisy, window)
    averaged = not isinstance(chosen, str)
    if averaged and chosen is not True and not callable(chosen) and not 0 <= real("average", chosen) < 1:
        raise ValueError(f"average must be in [0, 1) where it is a decay, got {chosen!r}; 1 would keep x0")
    if averaged:
        options["ema_decay"] = chosen
    if not callable(fun):
        raise TypeError(f"fun must be a function, got {fun!r}")
    x = problem.start(x0)
    evaluate = problem.evaluator(fun, jac, args if isinstance(args, tuple) else (args,), x)
    draws: Iterator[tuple[Any, ...]] = repeat(()) if batches is None else problem.items(batches)
    report = problem.reporter(callback)
    sides = problem.box(bounds, x)
    limits = problem.limits(sides, x)
    if limits is not None:
        np.clip(x, *limits, out=x)
    options.setdefault("on_nonfinite", "skip" if x.size <= _LARGE else "ignore")
    try:
        opt = optimizer(x, bounds=sides, **options)
    except TypeError as error:
        error.add_note(
            "minimize itself has jac, bounds, callback, tol, maxiter, batches, average, patience and progress"
            + "".join(f"; {name}{advice(name, optimizer)}" for name in options if advice(name, optimizer))
        )
        raise
    if not isinstance(opt, Optimizer):
        check_class(opt)
    if opt.param_groups[0]["params"] is not x:
        raise ValueError(f"optimizer={optimizer!r:.60} must make an optimizer of the array that it is given")
    shown = _reads_metric(opt)
    best_x, best_g, lowest, due = x.copy(), np.full_like(x, np.nan), math.inf, 0
    large = x.size > _LARGE
    spare = _SPARE if large and average != "best" and not window else 1
    status, detail, where, seen, mean, total = MAXITER, [], 0, 0, math.nan, 0.0
    with _bar(maxiter) if progress else nullcontext() as bar:
        for nit, batch in enumerate(draws):
            try:
                f, g = evaluate(*batch)
            except Exception as error:
                if np.isfinite(x).all():
                    if "read-only" in str(error):
                        error.add_note("fun can only read x, which is the live array: write to x.copy()")
                    raise
                f = math.nan  # fun does not take the NaN that a gradient has left in x
            value, over = f, False
            if not math.isfinite(f):
                if not forgiving:
                    status, detail = NOT_FINITE, [f"fun is {f} in iteration {nit}."]
                    if not np.isfinite(x).all():
                        detail = [f"x {_fault(x)} after the step in iteration {nit - 1}; on_nonfinite='raise' checks "
                                  "each gradient."]  # fmt: skip
                    break
            elif noisy:
                mean = f if not seen else mean + (1 - _recent(seen)) * (f - mean)
                seen += 1
                if window:
                    total += f
                    value = math.inf
                    if not seen % window:
                        value, total = total / window, 0.0
                        over = value >= lowest
            if value < lowest and nit >= due:
                if large and not np.isfinite(x).all():  # f does not depend on all of x
                    status, detail = NOT_FINITE, [f"x {_fault(x)} in iteration {nit}, from a step before."]
                    break
                best_x[...], best_g[...], lowest, due = x, g, value, nit + spare
            if report is not None and nit:
                try:
                    report(x, f)
                except StopIteration:
                    status = CALLBACK
                    break
            if over:
                status, detail = SUCCESS, [f"The mean of {window} values of fun no longer falls."]
                break
            if not noisy and _element(g, x, limits, where) <= tol:
                norm, where = _largest(g, x, limits)
                if norm <= tol:
                    status = SUCCESS
                    break
            if bar is not None and bar.update(min(nit, 1)):
                bar.set_postfix_str(_state(mean if noisy else f, g, x, limits), refresh=False)
            if nit == maxiter:
                break
            try:
                if shown:
                    opt.step(g, mean if noisy else f)
                else:
                    opt.step(g)
            except ValueError as error:
                if np.shares_memory(g, x):
                    raise ValueError("the gradient shares memory with x, which the step writes: return a copy of it, "
                                     "such as x.copy()") from error  # fmt: skip
                raise
            if opt.skipped_steps and not forgiving:
                status, detail = NOT_FINITE, [f"The gradient {_fault(g)} in iteration {nit}."]
                break
        else:
            status, nit = EXHAUSTED, nit + 1
        nfev = nit + (status != EXHAUSTED)
        if averaged and status != NOT_FINITE:
            x[...] = opt.ema if limits is None else np.clip(opt.ema, *limits)
            if not noisy:
                f, g = evaluate()
                nfev += 1
                if status == SUCCESS and not _largest(g, x, limits)[0] <= tol:
                    status = BEHIND
        if noisy:
            f = mean
        best = chosen == "best" and lowest < math.inf and (noisy or not f <= lowest)
        finite = math.isfinite(f) and np.isfinite(x).all() and (noisy or np.isfinite(g).all())
        if not finite and not best and status != NOT_FINITE:
            status, detail = NOT_FINITE, ["x, fun or the gradient is not finite at the end."]
        if best or status == NOT_FINITE:
            x, f, g = best_x, lowest if lowest < math.inf else math.nan, best_g
            if not large and not np.isfinite(x).all():  # x has overflowed, and f was lower there
                status, detail = NOT_FINITE, [f"x {_fault(x)} where fun is lowest; x0 is returned."]
                f, g[...] = math.nan, math.nan
                x[...] = problem.start(x0) if limits is None else np.clip(problem.start(x0), *limits)
        if bar is not None:
            bar.set_postfix_str(_state(f, g, x, limits))
    message = " ".join([_MESSAGES[status], *detail])
    return problem.result(message=message, success=status == SUCCESS, status=status, fun=f, x=x, nit=nit,
                          jac=np.array(g), nfev=nfev, njev=nfev)  # fmt: skip

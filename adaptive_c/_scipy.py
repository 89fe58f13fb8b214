"""`scipy_method`: an optimizer as a method of SciPy's minimize."""

import warnings
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import numpy as np

from ._minimize import advice, check_class, minimize
from ._optimizer import Optimizer
from ._problem import FINITE_DIFFERENCES
from .optimizers import Adam


def scipy_method(optimizer: Callable[..., Optimizer] = Adam, **settings: Any) -> Callable[..., Any]:
    """Make a method for ``scipy.optimize.minimize(..., method=)``, also inside basinhopping and dual_annealing.

    Parameters
    ----------
    optimizer : class, default Adam
        A class of this library.  Each call of the method makes a new one, so that its schedules begin anew.
    **settings
        Options of the optimizer (lr ...) and of `minimize` (tol, maxiter, average, patience, progress ...).  What SciPy
        passes in its ``options`` takes precedence; an unknown name there gives an OptimizeWarning, as in SciPy.

    Returns
    -------
    callable
        The method.  It takes what SciPy hands to a custom method: bounds of every form, callbacks of both, tol, and
        ``disp``, which prints the outcome.  ``jac=True`` and a function are the ways to give the gradient.  As with
        SciPy's own first-order methods, hess, hessp and constraints are left alone with a RuntimeWarning.  fun sees
        copies of x.

    Raises
    ------
    TypeError
        If optimizer is no class of this library, or a setting is an option neither of it nor of `minimize`.
    ValueError
        From the method, where there is no gradient.

    Examples
    --------
    >>> from scipy.optimize import minimize, rosen, rosen_der
    >>> from adaptive_c import Adam, scipy_method
    >>> result = minimize(rosen, [-1.2, 1.0], jac=rosen_der, method=scipy_method(Adam, lr=0.03, maxiter=5000))
    >>> result.success, result.x.round(2)
    (True, array([1., 1.]))
    """
    check_class(optimizer)
    for name in settings.keys() - _known(optimizer):
        if name in signature(_method).parameters:
            raise TypeError(f"{name} is an argument of scipy.optimize.minimize: give it there, beside method=")
        raise TypeError(f"scipy_method has no argument {name!r}{advice(name, optimizer)}; it takes the options of the "
                        "optimizer and of minimize")  # fmt: skip
    return partial(_method, optimizer, **settings)


def _method(optimizer: Any, /, fun: Any, x0: Any, args: Any = (), *, jac: Any = None,
            hess: Any = None, hessp: Any = None, bounds: Any = None, constraints: Any = (), callback: Any = None,
            disp: bool = False, **options: Any) -> Any:  # fmt: skip
    """What SciPy's `minimize` calls as its method: SciPy's arguments become those of `minimize`."""
    try:
        from scipy.optimize import OptimizeWarning
    except ImportError:  # it is not SciPy that calls
        raise ImportError(
            "scipy_method needs SciPy: pip install 'adaptive_c[scipy]', or call adaptive_c.minimize"
        ) from None

    label = getattr(optimizer, "__name__", str(optimizer))
    for present, what in (
        (hess is not None, "use Hessian information (hess)"),
        (hessp is not None, "use Hessian-vector product information (hessp)"),
    ):
        if present:
            warnings.warn(f"Method {label} does not {what}.", RuntimeWarning, stacklevel=3)
    if np.any(constraints):
        warnings.warn(f"Method {label} cannot handle constraints.", RuntimeWarning, stacklevel=3)
    known = _known(optimizer)
    if unknown := [name for name in options if name not in known]:
        said = ", ".join(f"{name}{advice(name, optimizer)}" for name in unknown)
        warnings.warn(f"Unknown solver options: {said}", OptimizeWarning, stacklevel=3)
    if type(fun).__name__ == "MemoizeJac" and jac == fun.derivative:
        fun, jac = fun.fun, True  # it would repeat the noise of a noisy function
    if jac is None:
        raise ValueError("the gradient is needed, and SciPy gives none (jac=None, a name or False); let fun return "
                         "(f, g) and say jac=True, or give a function as jac. (jac='out' is adaptive_c.minimize's, and "
                         f"does not get through SciPy.) {FINITE_DIFFERENCES}")  # fmt: skip
    if isinstance(bounds, (list, tuple)):  # as SciPy, take arrays for pairs
        bounds = [tuple(pair) if isinstance(pair, np.ndarray) else pair for pair in bounds]

    def copying(function: Any) -> Any:
        return (lambda x, *rest: function(x.copy(), *rest)) if callable(function) else function

    result = minimize(copying(fun), x0, args, optimizer=optimizer, jac=copying(jac),
                      bounds=bounds, callback=callback,
                      **{name: value for name, value in options.items() if name in known})  # fmt: skip
    if disp:
        print(f"{result.message}\n         Current function value: {result.fun:f}\n"
              f"         Iterations: {result.nit}\n         Function evaluations: {result.nfev}\n"
              f"         Gradient evaluations: {result.njev}")  # fmt: skip
    return result


def _known(optimizer: Any) -> set[str]:
    """The options of `minimize` and of the optimizer, except those that SciPy passes itself."""
    ours, theirs = set(signature(_method).parameters), {"disp"}
    for function in (minimize, Optimizer, optimizer):
        theirs |= set(signature(function).parameters)
    return theirs - (ours - {"disp", "options"}) - {"params", "options", "shared", "unknown"}

"""
A noisy function under SciPy
============================

``scipy_method`` makes an optimizer a method of ``scipy.optimize.minimize``. It is meant for functions whose value and
gradient are noisy, which mislead methods that search along a line.
"""

import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import minimize

import adaptive_c as ac


def noisy(seed):
    """A bowl, measured with an error, and the points at which it was asked for."""
    rng = np.random.default_rng(seed)
    asked = []

    def fun(x):
        asked.append(x.copy())
        return ((x - 3) ** 2).sum() + rng.standard_normal(), 2 * (x - 3) + rng.standard_normal(5)

    return fun, asked


def distances(method, **options):
    """The distances of its points and of its result from the minimum."""
    fun, asked = noisy(seed=0)
    result = minimize(fun, np.zeros(5), jac=True, method=method, **options)
    return np.linalg.norm(np.array(asked) - 3, axis=1), np.linalg.norm(result.x - 3), result


lbfgs, end_lbfgs, result = distances("L-BFGS-B")
print(f"L-BFGS-B: success {result.success}, {result.nfev} evaluations, {end_lbfgs:.2f} from the minimum")

adam, end_adam, result = distances(ac.scipy_method(ac.Adam, lr=0.05, patience=200, maxiter=2000))
print(f"Adam: success {result.success}, {result.nfev} evaluations, {end_adam:.2f} from the minimum")

# %%
# L-BFGS-B takes the noise for a minimum and reports success. Adam's points are moved about by the noise, too, but what
# it returns is their average, which is much nearer. For functions that are smooth and exact, L-BFGS-B is the better
# choice.

plt.style.use("tableau-colorblind10")
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.plot(adam, color="C0", label="Adam, each evaluation")
axes.plot(lbfgs, color="C1", label="L-BFGS-B, each evaluation")
axes.plot(len(adam), end_adam, "o", color="C0", label="Adam, returned")
axes.plot(len(lbfgs), end_lbfgs, "s", color="C1", label="L-BFGS-B, returned")
axes.set(xlabel="evaluation", ylabel="distance from the minimum", yscale="log")
axes.legend()

assert end_adam < end_lbfgs / 3

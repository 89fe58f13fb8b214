"""`scipy_method` under SciPy's minimize, basinhopping and dual_annealing; and results compared with L-BFGS-B's."""

import itertools
import math
import pickle
import warnings

import numpy as np
import pytest
from problems import START, bowl
from support import assert_same_bits, child

import adaptive_c as ac

optimize = pytest.importorskip("scipy.optimize")

ADAM = ac.scipy_method(ac.Adam, lr=0.1)


def value(x):
    return bowl(x)[0]


def slope(x):
    return bowl(x)[1]


def minimize(fun=bowl, x0=START, jac=True, method=ADAM, **given):
    return optimize.minimize(fun, x0, jac=jac, method=method, **given)


# --- against L-BFGS-B --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "most"), [(2, 2_000), (100, 5_000)])
def test_rosenbrock(n, most):
    x0 = np.tile([-1.2, 1.0], n // 2)
    reference = minimize(optimize.rosen, x0, optimize.rosen_der, "L-BFGS-B", options={"maxiter": 15_000})
    ours = minimize(optimize.rosen, x0, optimize.rosen_der, options={"maxiter": most})
    assert (ours.success, ours.status) == (True, 0)
    assert abs(ours.jac).max() <= 1e-5
    assert ours.fun < reference.fun + 1e-9
    np.testing.assert_allclose(ours.x, reference.x, atol=1e-3)
    np.testing.assert_allclose(ours.x, 1, atol=1e-4)
    assert ours.nfev > 5 * reference.nfev  # which is why docs/minimize.md recommends L-BFGS-B here


def q(x):
    return 3 * x[0] ** 2 + 10 * x[1] ** 2, np.array([6 * x[0], 20 * x[1]])


def quartic(x):
    return (x**4 - 2 * x**2 + x).sum(), 4 * x**3 - 4 * x + 1


@pytest.mark.parametrize(
    ("fun", "x0", "box"), [(q, [-15.0, 20.0], None), (q, [-15.0, 20.0], [(-20, -4), (1, 30)]), (quartic, [0.1], None)]
)
def test_the_seeds_functions(fun, x0, box):
    reference = minimize(fun, x0, method="L-BFGS-B", bounds=box)
    ours = minimize(fun, x0, bounds=box, options={"lr": 0.3})
    assert ours.success
    np.testing.assert_allclose(ours.x, reference.x, atol=1e-5)
    assert ours.fun == pytest.approx(reference.fun, abs=1e-9)


def test_least_squares_in_a_box():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200, 30)), rng.normal(size=200)

    def fun(w):
        r = a @ w - b
        return r @ r / 200, 2 / 200 * (a.T @ r)

    bounds = optimize.Bounds(-0.05, 0.05)
    least = optimize.lsq_linear(a, b, bounds=(-0.05, 0.05), tol=1e-14)
    reference = minimize(fun, np.ones(30), method="L-BFGS-B", bounds=bounds, options={"gtol": 1e-7, "ftol": 0})
    ours = minimize(fun, np.ones(30), bounds=bounds, tol=1e-7, options={"lr": 0.01})
    assert ours.success
    assert (abs(ours.x) <= 0.05).all()
    assert 5 < (abs(ours.x) == 0.05).sum() < 30
    for x in (reference.x, least.x):
        np.testing.assert_allclose(ours.x, x, atol=1e-6)


# --- what a method is handed -------------------------------------------------------------------------------------------


def test_the_method_is_minimize():
    points = []
    there = minimize(callback=points.append, options={"maxiter": 30})
    here = ac.minimize(bowl, START, jac=True, lr=0.1, maxiter=30)
    assert type(there) is optimize.OptimizeResult
    assert there.keys() == here.keys()
    for name in here:
        assert_same_bits(np.array(there[name]), np.array(here[name])) if name in ("x", "jac") else None
        assert np.all(there[name] == here[name])
    assert len(points) == 30


def test_what_scipy_hands_on_in_options_takes_precedence():
    method = ac.scipy_method(ac.Adam, lr=0.5, maxiter=3, average="last")
    assert minimize(method=method).nit == 3
    result = minimize(method=method, options={"maxiter": 5, "lr": 0.1, "betas": (0.8, 0.99)})
    expected = ac.minimize(bowl, START, jac=True, lr=0.1, betas=(0.8, 0.99), maxiter=5, average="last")
    assert_same_bits(result.x, expected.x)
    assert minimize(method=ac.scipy_method(lr=0.1)).success  # Adam is the default


def test_tol_arrives_among_the_options():
    loose, tight = minimize(tol=1e-2), minimize(tol=1e-6)
    assert 1e-3 < abs(loose.jac).max() <= 1e-2
    assert abs(tight.jac).max() <= 1e-6
    assert loose.nit < minimize().nit < tight.nit


def test_maxiter_ends_as_scipys_methods_do():
    ours = minimize(options={"maxiter": 3})
    theirs = optimize.minimize(optimize.rosen, START, jac=optimize.rosen_der, method="BFGS", options={"maxiter": 3})
    for name in ("success", "status", "message", "nit"):
        assert ours[name] == theirs[name]


def test_memoize_is_unwrapped():
    """Where x does not change, a noisy function is asked again: SciPy's wrapper would give the old value."""
    values = itertools.count()
    seen = []
    result = minimize(lambda x: (float(next(values)), np.zeros(2)), callback=lambda intermediate_result:
                      seen.append(intermediate_result.fun), options={"maxiter": 5, "patience": 1000, "average": "last"})  # fmt: skip
    assert seen == [1, 2, 3, 4, 5]
    assert (result.nfev, next(values)) == (6, 6)


def test_a_separate_gradient_is_called_as_often():
    calls = []
    result = minimize(lambda x, a: calls.append("f") or value(x) + a, jac=lambda x, a: calls.append("g") or slope(x),
                      args=(5,), options={"maxiter": 4})  # fmt: skip
    assert calls == ["f", "g"] * 5
    assert (result.nfev, result.njev) == (5, 5)
    assert result.fun == value(result.x) + 5


def test_a_function_may_keep_and_write_its_x():
    kept = []

    def fun(x):
        kept.append(x)
        f, g = bowl(x)
        x[:] = np.nan
        return f, g

    assert_same_bits(minimize(fun).x, minimize().x)
    assert_same_bits(minimize(lambda x: fun(x)[0], jac=lambda x: fun(x)[1]).x, minimize().x)
    assert len({id(x) for x in kept}) == len(kept)
    assert minimize(lambda x: (x @ x / 2, x)).success  # the gradient is x itself


def test_x0_is_not_written_and_float32_stays():
    x0 = START.astype("f4")
    result = minimize(x0=x0, tol=1e-3)
    assert (result.x.dtype, result.jac.dtype, result.success) == ("f4", "f4", True)
    assert (x0 == START.astype("f4")).all()
    assert minimize(x0=3).x.shape == (1,)
    with pytest.raises(TypeError, match="fun must be a function, got None"):
        minimize(None, jac=value)


@pytest.mark.parametrize("jac", [None, False, "2-point", "3-point", "cs", "out"])
def test_without_a_gradient_the_remedy_is_said(jac):
    message = r"the gradient is needed, and SciPy gives none.*say jac=True.*jac='out' is adaptive_c.*approx_fprime"
    with pytest.raises(ValueError, match=message):
        minimize(value, jac=jac)


@pytest.mark.parametrize(
    "bounds",
    [optimize.Bounds([-1, -np.inf], [2, np.inf]), [(-1, 2), (None, None)], np.array([[-1, 2], [-np.inf, np.inf]])],
    ids=["Bounds", "pairs", "an array"],
)
def test_bounds(bounds):
    seen = []
    result = minimize(lambda x: seen.append(x[0]) or bowl(x), [5.0, 5.0], bounds=bounds)
    theirs = minimize(x0=[5.0, 5.0], bounds=bounds, method="L-BFGS-B")
    assert result.success
    np.testing.assert_allclose(result.x, theirs.x, atol=1e-5)
    assert max(seen) == seen[0] == 2


def test_callbacks_of_both_forms_and_stop_iteration():
    def of_result(intermediate_result):
        assert intermediate_result.fun == optimize.rosen(intermediate_result.x)
        stop_at(intermediate_result.x)

    def of_x(xk):
        stop_at(xk)

    def stop_at(x):
        points.append(x)
        if len(points) == 4:
            raise StopIteration

    for callback in (of_result, of_x):
        points = []
        ours = minimize(optimize.rosen, jac=optimize.rosen_der, callback=callback)
        assert len({tuple(x) for x in points}) == 4
        points = []
        theirs = minimize(optimize.rosen, jac=optimize.rosen_der, callback=callback, method="BFGS")
        for name in ("success", "status", "message", "nit"):
            assert ours[name] == theirs[name]
    history = []
    minimize(callback=history.append, options={"maxiter": 3})
    assert [x.shape for x in history] == [(2,)] * 3


def test_unknown_options_are_warned_about():
    message = r"Unknown solver options: gtol \(it is tol here\), maxls, ls"
    with pytest.warns(optimize.OptimizeWarning, match=message) as caught:
        result = minimize(options={"gtol": 1e-3, "maxls": 3, "ls": 3, "maxiter": 5})
    assert result.nit == 5
    assert caught[0].filename == __file__
    with pytest.warns(optimize.OptimizeWarning, match=r"optimizer \(it is the first argument of scipy_method\)"):
        minimize(options={"optimizer": ac.SGD, "maxiter": 1})
    for name in ("fun", "params", "options", "shared", "hess"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                minimize(options={name: 3, "maxiter": 1})
            except TypeError as error:
                assert "multiple values" in str(error)  # noqa: PT017  SciPy's own call is refused by Python
            else:
                assert f"options: {name}" in str(caught[0].message)


def test_what_is_not_used_is_warned_about_as_by_l_bfgs_b():
    given = {"hess": lambda x: np.eye(2), "hessp": lambda x, p: p, "constraints": {"type": "eq", "fun": value}}
    for name, what in given.items():
        said = []
        for method in (ADAM, "L-BFGS-B"):
            with pytest.warns(RuntimeWarning) as caught:
                assert minimize(method=method, **{name: what}).success
            said.append(str(caught[0].message).replace("L-BFGS-B", "Adam"))
        assert said[0] == said[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert minimize(constraints=[]).success


def test_disp_prints_the_outcome(capsys):
    result = minimize(options={"disp": True})
    assert (
        capsys.readouterr().out.split()
        == (
            f"Optimization terminated successfully. Current function value: {result.fun:f} Iterations: {result.nit} "
            f"Function evaluations: {result.nfev} Gradient evaluations: {result.njev}"
        ).split()
    )
    minimize()
    ac.scipy_method(disp=False)(bowl, START, jac=True, maxiter=1)
    assert not capsys.readouterr().out


def test_a_method_is_made_of_what_exists():
    for name, said in (("lrr", " .did you mean lr[?]."), ("max_iter", " .did you mean maxiter[?]."), ("xyz", ""),
                       ("gtol", " .it is tol here."), ("params", "")):  # fmt: skip
        with pytest.raises(TypeError, match=rf"scipy_method has no argument '{name}'{said}; it takes the options"):
            ac.scipy_method(ac.Adam, **{name: 1})
    for name in ("fun", "bounds", "jac", "callback", "hess"):
        with pytest.raises(TypeError, match=f"{name} is an argument of scipy.optimize.minimize: give it there"):
            ac.scipy_method(ac.Adam, **{name: 1})
    with pytest.raises(ValueError, match="lr must be in"):
        minimize(method=ac.scipy_method(ac.Adam, lr=-1))


class Adam:
    """As torch's, of the same name."""

    def __init__(self, params, lr):
        raise NotImplementedError


@pytest.mark.parametrize(("wrong", "said"), [
    (Adam, "adaptive_c.Adam"), ("nadam", "adaptive_c.NAdam"), (ac.Lion(np.ones(2)), "adaptive_c.Lion"),
    (None, "adaptive_c.Adam"), (ac.Optimizer, "adaptive_c.Adam"), (ac.schedules.cosine, "adaptive_c.Adam"), (dict, ""),
])  # fmt: skip
def test_what_is_no_class_of_optimizers(wrong, said):
    message = f"optimizer must be a class such as Adam, got .*; say optimizer={said}"
    with pytest.raises(TypeError, match=message):
        ac.minimize(bowl, START, jac=True, optimizer=wrong)
    with pytest.raises(TypeError, match=message):
        ac.scipy_method(wrong)


def test_a_function_may_make_the_optimizer():
    def nesterov(x, **options):
        return ac.SGD(x, momentum=0.5, nesterov=True, **options)

    result = ac.minimize(bowl, START, jac=True, optimizer=nesterov, lr=0.1)
    assert result.success
    with pytest.raises(TypeError, match="optimizer must be a class such as Adam, got 3"):
        ac.minimize(bowl, START, jac=True, optimizer=lambda x, **options: 3)
    with pytest.raises(ValueError, match="must make an optimizer of the array that it is given"):
        ac.minimize(bowl, START, jac=True, optimizer=lambda x, **options: ac.SGD(x.copy(), **options))


def test_bounds_of_two_arrays_are_pairs_as_scipy_reads_them():
    pairs = [np.array([-1.0, 2.0]), np.array([-np.inf, np.inf])]
    np.testing.assert_allclose(minimize(bounds=pairs).x, minimize(bounds=pairs, method="L-BFGS-B").x, atol=1e-5)


def test_a_method_can_be_pickled():
    method = pickle.loads(pickle.dumps(ac.scipy_method(ac.NAdam, lr=0.1, maxiter=4)))
    assert_same_bits(
        minimize(method=method).x, ac.minimize(bowl, START, jac=True, optimizer=ac.NAdam, lr=0.1, maxiter=4).x
    )


def test_each_call_begins_anew():
    """The optimizer's state, its count and its schedules, as in basinhopping's many calls."""
    method = ac.scipy_method(ac.Adam, lr=ac.schedules.cosine(0.3, 20), maxiter=20)
    first, again = minimize(method=method), minimize(method=method)
    assert_same_bits(first.x, again.x)


def test_noise_under_scipy():
    draws = np.random.default_rng(0).normal(3, 1, (500, 2))
    method = ac.scipy_method(ac.Adam, lr=0.1, batches=draws, maxiter=500)
    result = minimize(lambda x, b: (((x - b) ** 2).sum(), 2 * (x - b)), method=method)
    assert (result.status, result.nit) == (1, 500)
    np.testing.assert_allclose(result.x, 3, atol=0.3)


def test_not_finite_under_scipy():
    calls = itertools.count()
    result = minimize(lambda x: (math.nan if next(calls) == 7 else value(x), slope(x)))
    assert (result.success, result.status, result.nit) == (False, 3, 7)
    assert np.isfinite(result.x).all()
    assert result.fun == value(result.x)


# --- global methods ----------------------------------------------------------------------------------------------------


def waves(x):
    """Its least value, about -1.0009, is near -0.195."""
    return np.cos(14.5 * x - 0.3).sum() + (x * (x + 0.2)).sum(), -14.5 * np.sin(14.5 * x - 0.3) + 2 * x + 0.2


@pytest.mark.parametrize("jac", [True, "separate"])
def test_basinhopping(jac):
    fun, gradient = (waves, True) if jac is True else (lambda x: waves(x)[0], lambda x: waves(x)[1])
    local = {"method": ac.scipy_method(ac.Adam, lr=0.01), "jac": gradient}
    result = optimize.basinhopping(fun, [1.0], minimizer_kwargs=local, niter=30, rng=np.random.default_rng(1))
    assert result.minimization_failures == 0
    assert result.x == pytest.approx([-0.1951], abs=1e-3)
    assert result.fun == pytest.approx(-1.000876, abs=1e-5)
    assert result.njev == result.nfev > 31


def test_dual_annealing():
    bounds = [(-5.12, 5.12)] * 2
    calls = []

    def rastrigin(x, a):
        return float((x * x - a * np.cos(2 * np.pi * x)).sum() + a * x.size)

    def gradient(x, a):
        calls.append(x)
        return 2 * x + 2 * np.pi * a * np.sin(2 * np.pi * x)

    local = {"method": ac.scipy_method(ac.Adam, lr=0.01, maxiter=300), "jac": gradient, "bounds": bounds}
    result = optimize.dual_annealing(rastrigin, bounds, args=(10,), minimizer_kwargs=local, maxiter=200, rng=0)
    assert calls
    np.testing.assert_allclose(result.x, 0, atol=1e-4)


def test_a_missing_scipy_is_named():
    """Where the method is called without SciPy's minimize."""
    code = """
import sys; sys.modules["scipy"] = None
import adaptive_c as ac, numpy as np
try:
    ac.scipy_method(ac.Adam, lr=0.1)(lambda x: (x @ x, 2 * x), np.ones(2), jac=True)
except ImportError as error:
    print(error)
"""
    assert child(code) == "scipy_method needs SciPy: pip install 'adaptive_c[scipy]', or call adaptive_c.minimize\n"

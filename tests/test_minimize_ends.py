"""How `minimize` ends: tol, maxiter, what is not finite, callbacks, noise, results and progress."""

import itertools
import math
import re
import sys
import types

import numpy as np
import pytest
from problems import START, bowl, by_hand, quartic
from support import assert_same_bits

import adaptive_c as ac


def broken(at, f=None, g=None, fun=bowl):
    """fun whose value or first element of the gradient is another one in its call number `at`, from 0."""
    calls = itertools.count()

    def broken_fun(x):
        value, gradient = fun(x)
        if next(calls) == at:
            value = value if f is None else f
            if g is not None:
                gradient.flat[0] = g
        return value, gradient

    return broken_fun


# --- the end -----------------------------------------------------------------------------------------------------------


def test_tol_is_the_largest_element_of_the_gradient():
    points = []
    result = ac.minimize(bowl, START, jac=True, lr=0.1, tol=1e-3, callback=points.append, average="last")
    norms = [abs(bowl(x)[1]).max() for x in points]
    assert (result.success, result.status, result.message) == (True, 0, "Optimization terminated successfully.")
    assert norms[-1] == abs(result.jac).max() <= 1e-3
    assert min(norms[:-1]) > 1e-3
    assert (result.nit, result.nfev, result.njev) == (len(points), len(points) + 1, len(points) + 1)
    assert ac.minimize(bowl, START, jac=True, lr=0.1, average="last").nit > result.nit  # the default is 1e-5
    assert abs(ac.minimize(bowl, START, jac=True, lr=0.1).jac).max() <= 1e-5


def test_an_element_that_was_the_largest_does_not_hide_another():
    """The first one is at 0 long before the second, whichever was looked at last."""

    def fun(x):
        return (x**2).sum() / 2, x.copy()

    for x0 in ([1e-9, 5.0], [5.0, 1e-9], [[0.01, 5.0, 2.0]]):
        result = ac.minimize(fun, x0, jac=True, lr=0.05)
        assert result.success
        assert abs(result.x).max() <= 1e-5


def test_at_a_minimum_no_step_is_made():
    result = ac.minimize(bowl, [3.0, 3.0], jac=True)
    assert (result.success, result.nit, result.nfev, result.fun) == (True, 0, 1, 0)
    assert ac.minimize(bowl, [3.0, 3.0], jac=True, tol=0).nit == 0
    assert ac.minimize(bowl, [9.0, 3.0], jac=True, tol=0, bounds=(None, 3)).nit == 0


@pytest.mark.parametrize("maxiter", [0, 1, 7, np.int64(7)])
def test_maxiter(maxiter):
    result = ac.minimize(bowl, START, jac=True, maxiter=maxiter)
    assert (result.success, result.status, result.nit, result.nfev) == (False, 1, maxiter, maxiter + 1)
    assert result.message == "Maximum number of iterations has been exceeded."


def test_the_best_or_the_last():
    """Long steps of gradient descent overshoot: f rises and falls."""
    seen = []

    def fun(x):
        f, g = quartic(x)
        seen.append((float(f), float(x)))
        return f, g

    for average in ("last", "best", None):
        seen.clear()
        result = ac.minimize(fun, 0.3, jac=True, optimizer=ac.SGD, lr=0.5, maxiter=6, average=average)
        assert len(seen) == 7
        assert (result.fun, result.x) == (seen[-1] if average == "last" else min(seen))
        assert seen[-1] != min(seen)
        assert result.jac == quartic(result.x)[1]


def test_of_equal_points_the_last_is_returned():
    result = ac.minimize(lambda x: (1.0, np.ones(2)), START, jac=True, optimizer=ac.SGD, lr=1, maxiter=3)
    assert (result.x == START - 3).all()


@pytest.mark.parametrize("average", [None, "best", "last"])
def test_a_large_x_is_kept_now_and_then_unless_the_best_is_asked_for(average):
    """f falls to call 40, and rises from there."""
    values = iter(np.abs(np.arange(51.0) - 40))
    n = 70_000
    result = ac.minimize(lambda x: (next(values), np.ones(n)), np.zeros(n), jac=True, optimizer=ac.SGD, lr=1,
                         maxiter=50, average=average)  # fmt: skip
    fun, x = {None: (8, -32), "best": (0, -40), "last": (10, -50)}[average]
    assert result.fun == fun
    assert (result.x == x).all()


@pytest.mark.parametrize("average", [None, "last", 0.5])
@pytest.mark.parametrize("n", [2, 70_000])
@pytest.mark.parametrize(
    ("f", "g", "said"),
    [
        (np.nan, None, "fun is nan in iteration 5"),
        (np.inf, None, "fun is inf in iteration 5"),
        (-np.inf, None, "fun is -inf in iteration 5"),
        (None, np.nan, r"The gradient is nan at index \(0,\) in iteration 5"),
        (None, -np.inf, r"The gradient is -inf at index \(0,\) in iteration 5"),
        (None, 1e200, r"so large that its square or norm overflows in iteration 5"),
    ],
)
def test_what_is_not_finite_ends_with_the_best_seen(f, g, said, n, average):
    if n > 2 and g is not None:
        if g == 1e200:
            return  # stated in the docs: not looked at, and the step of that element is 0
        said = r"x is nan at index \(0,\) after the step in iteration 5; on_nonfinite='raise'"
    points = [np.zeros(n)]
    result = ac.minimize(broken(5, f, g), np.zeros(n), jac=True, lr=0.1, callback=points.append, average=average)
    assert (result.success, result.status) == (False, 3)
    assert result.message.startswith("NaN result encountered. ")
    assert re.search(said, result.message)
    assert np.isfinite(result.x).all()
    best = points[5 if n == 2 and f is None else 4] if n == 2 else points[0]
    assert_same_bits(result.x, best)
    assert result.fun == bowl(best)[0]
    assert result.nit == 5 + (n > 2 and g is not None)
    assert result.nfev == result.nit + 1


def test_a_function_that_does_not_take_nan_ends_as_one_that_returns_it():
    fun = broken(5, g=np.nan)

    def strict(x):
        np.asarray_chkfinite(x)
        return fun(x)

    result = ac.minimize(strict, np.zeros(70_000), jac=True, lr=0.1)
    assert (result.status, result.message[:60]) == (3, "NaN result encountered. x is nan at index (0,) after the ste")
    assert (result.x == 0).all()


@pytest.mark.parametrize("end", [{}, {"average": "best"}, {"average": 0.5}, {"maxiter": 8}, {"patience": 4}])
def test_an_x_that_is_not_finite_is_not_returned_though_f_does_not_show_it(end):
    """f leaves elements out that are NaN, as np.nanmean does; or it is finite where x has overflowed."""
    fun = broken(5, g=np.nan)
    result = ac.minimize(lambda x: (float(np.nansum((x - 3) ** 2)), fun(x)[1]), np.zeros(70_000), jac=True, lr=0.1,
                         **{"maxiter": 100, **end})  # fmt: skip
    assert result.status == 3
    assert np.isfinite(result.x).all()
    with np.errstate(all="ignore"):
        result = ac.minimize(lambda x: (-float(np.arctan(x / 1e308).sum()), np.full(2, -1.0)), np.zeros(2), jac=True,
                             optimizer=ac.SGD, lr=1e308, **{"maxiter": 10, **end})  # fmt: skip
    assert result.status == 3
    assert result.x.tolist() == [0, 0]
    assert "x is inf at index (0,)" in result.message


def test_an_average_that_lags_behind_is_no_success():
    """f and g are its own; the message says what helps."""
    for average in (0.999, True):
        result = ac.minimize(bowl, START, jac=True, lr=0.1, average=average)
        assert (result.success, result.status) == (False, 5)
        assert "average='best'" in result.message
        assert abs(result.jac).max() > 1e-5
        assert (result.fun, result.jac.tolist()) == (bowl(result.x)[0], bowl(result.x)[1].tolist())
    result = ac.minimize(bowl, START, jac=True, optimizer=ac.SGD, lr=0.5, average=0.0)  # the last x itself
    assert (result.success, result.status, result.fun) == (True, 0, 0)


def test_a_gradient_that_is_not_finite_in_the_last_steps():
    """No f shows it: the last x is not evaluated where the batches are used up."""
    for average in ("last", None):
        result = ac.minimize(lambda x, batch: broken(0, g=batch)(x), np.zeros(70_000), jac=True, average=average,
                             batches=iter([1.0, np.nan]))  # fmt: skip
        assert (result.status, result.nit, result.nfev) == (3, 2, 2)
        assert np.isfinite(result.x).all()


@pytest.mark.parametrize("average", ["best", "last", 0.5])
@pytest.mark.parametrize(("f", "g"), [(np.nan, None), (None, np.inf)])
def test_what_is_not_finite_at_the_end(f, g, average):
    """No step is made with it, and what is skipped is not returned."""
    at = 5 + (average == 0.5)  # the average is evaluated after all
    result = ac.minimize(
        broken(at, f, g), START, jac=True, lr=0.1, maxiter=5, average=average, on_nonfinite="skip" if f else None
    )
    assert (result.status, result.nit, result.nfev) == ((1 if f and average == "best" else 3), 5, at + 1)
    assert np.isfinite(result.x).all()
    assert np.isfinite(result.fun)


def test_not_finite_from_the_start():
    for n in (2, 70_000):
        result = ac.minimize(broken(0, np.nan), np.ones(n), jac=True)
        assert (result.status, result.nit, result.nfev) == (3, 0, 1)
        assert (result.x == 1).all()
        assert math.isnan(result.fun)


def test_on_nonfinite_of_ones_own():
    for n in (2, 70_000):
        with pytest.raises(ValueError, match=r"grads is nan at index \(0,\)"):
            ac.minimize(broken(5, g=np.nan), np.zeros(n), jac=True, on_nonfinite="raise")
        skipped = ac.minimize(broken(5, np.nan, np.nan), np.zeros(n), jac=True, on_nonfinite="skip", lr=0.1)
        plain = ac.minimize(bowl, np.zeros(n), jac=True, lr=0.1)
        assert (skipped.success, skipped.nit) == (True, plain.nit + 1)
        assert_same_bits(skipped.x, plain.x)


# --- callbacks ---------------------------------------------------------------------------------------------------------


def test_both_forms_of_a_callback():
    seen, results, points = [], [], []

    def fun(x):
        seen.append((x.copy(), bowl(x)[0]))
        return bowl(x)

    def of_result(intermediate_result):
        intermediate_result.x += 100  # a copy
        results.append((intermediate_result.x - 100, intermediate_result["fun"]))

    ac.minimize(fun, START, jac=True, maxiter=5, callback=of_result)
    ac.minimize(fun, START, jac=True, maxiter=5, callback=points.append)
    for (x, f), (x1, f1), point in zip(seen[1:6], results, points, strict=True):
        assert f == f1
        assert_same_bits(x, point)
        np.testing.assert_allclose(x, x1)


def test_a_callback_with_other_parameters_gets_x():
    points = []
    ac.minimize(bowl, START, jac=True, maxiter=2, callback=lambda xk, intermediate_result=None: points.append(xk))
    assert [type(x) for x in points] == [np.ndarray, np.ndarray]


def test_stop_iteration_ends():
    def stop(x):
        points.append(x)
        if len(points) == 4:
            raise StopIteration

    points = []
    result = ac.minimize(bowl, START, jac=True, lr=0.1, callback=stop)
    assert (result.success, result.status, result.nit, result.nfev) == (False, 99, 4, 5)
    assert result.message == "`callback` raised `StopIteration`."
    assert_same_bits(result.x, points[-1])


# --- noise -------------------------------------------------------------------------------------------------------------


def noisy(x, batch):
    return ((x - batch) ** 2).sum(), 2 * (x - batch)


def test_the_bits_of_a_loop_by_hand_over_batches():
    batches = np.random.default_rng(0).normal(3, 1, (7, 2))
    for average in ("last", None):
        x = START.copy()
        opt = ac.Adam(x, lr=0.1, ema_decay=lambda t: t / (t + 9))
        for batch in itertools.islice(itertools.cycle(batches), 20):
            opt.step(noisy(x, batch)[1])
        result = ac.minimize(noisy, START, jac=True, lr=0.1, batches=list(batches), maxiter=20, average=average)
        assert_same_bits(result.x, x if average == "last" else opt.ema)
        assert (result.nit, result.nfev, result.status, result.success) == (20, 21, 1, False)


@pytest.mark.parametrize("again", [list, tuple, np.array], ids=["list", "tuple", "array"])
def test_batches_that_can_be_gone_through_again(again):
    seen = []
    ac.minimize(lambda x, b: seen.append(int(b)) or bowl(x), START, jac=True, batches=again([1, 2, 3]), maxiter=7)
    assert seen == [1, 2, 3, 1, 2, 3, 1, 2]


def test_a_loader_begins_anew():
    class Loader:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(range(3 if self.passes < 3 else 0))

    loader = Loader()
    result = ac.minimize(lambda x, b: bowl(x), START, jac=True, batches=loader)
    assert (loader.passes, result.nit, result.status) == (3, 6, 4)


@pytest.mark.parametrize("once", [iter, lambda x: (b for b in x)], ids=["iterator", "generator"])
def test_batches_that_are_used_up(once):
    result = ac.minimize(lambda x, b: bowl(x), START, jac=True, batches=once([1, 2, 3]), average="last", lr=0.1)
    assert (result.success, result.status, result.message) == (False, 4, "The batches are used up.")
    assert (result.nit, result.nfev) == (3, 3)
    assert_same_bits(result.x, by_hand(bowl, START, 3, lr=0.1)[0])


def test_an_iterator_is_not_read_further_than_needed():
    batches = iter(range(100))
    ac.minimize(lambda x, b: bowl(x), START, jac=True, batches=batches, maxiter=4)
    assert next(batches) == 5


@pytest.mark.parametrize("average", ["best", "last"])
@pytest.mark.parametrize("n", [2, 70_000])
def test_patience_compares_means_of_f(n, average):
    """Windows of 3 with the means 5, 4, 4: the third one is no lower."""
    values = iter([9, 1, 5, 4, 4, 4, 0, 12, 0, 7])
    result = ac.minimize(
        lambda x: (next(values), np.ones(n)), np.zeros(n), jac=True, optimizer=ac.SGD, lr=1, patience=3, average=average
    )
    assert (result.success, result.status, result.nit, result.nfev) == (True, 0, 8, 9)
    assert result.message == "Optimization terminated successfully. The mean of 3 values of fun no longer falls."
    assert (result.x == (-5 if average == "best" else -8)).all()  # -5: where the last value of the best mean was
    if average == "best":
        assert result.fun == 4


def test_patience_stops_where_noise_is_all_there_is():
    rng = np.random.default_rng(1)
    draws = rng.normal([3, -1], 1, (4000, 2))
    result = ac.minimize(noisy, np.zeros(2), jac=True, batches=iter(draws), lr=0.05, patience=200, maxiter=4000)
    assert result.success
    assert 400 < result.nit < 4000
    np.testing.assert_allclose(result.x, [3, -1], atol=0.3)
    assert 1.2 < result.fun < 2.8  # the expected value at the minimum is 2


def test_the_best_before_a_mean_is_known_is_the_last():
    result = ac.minimize(bowl, START, jac=True, patience=100, maxiter=7, average="best", lr=0.1)
    assert_same_bits(result.x, by_hand(bowl, START, 7, lr=0.1)[0])


def test_the_average_is_nearer_than_the_last_on_noise():
    draws = np.random.default_rng(2).normal(3, 1, (3000, 50))
    last, averaged = (
        abs(ac.minimize(noisy, np.zeros(50), jac=True, batches=draws, lr=0.05, maxiter=2999, average=a).x - 3).mean()
        for a in ("last", None)
    )
    assert averaged < last / 2


def test_skipped_batches_do_not_count_in_the_mean():
    values = [2.0, np.nan, 4.0]

    def fun(x, b):
        return b, np.full(2, b)

    result = ac.minimize(fun, START, jac=True, batches=iter(values), on_nonfinite="skip", average="last")
    assert (result.nit, result.status) == (3, 4)
    assert math.isclose(result.fun, 2 + 0.9 * (4 - 2))
    assert ac.minimize(fun, START, jac=True, batches=iter(values), average="last").status == 3


# --- results and progress ----------------------------------------------------------------------------------------------


def test_without_scipy_the_result_behaves_the_same(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    result = ac.minimize(bowl, START, jac=True, maxiter=3)
    assert type(result).__module__.startswith("adaptive_c")
    assert isinstance(result, dict)
    assert set(result) == set(dir(result)) == {"x", "fun", "jac", "nit", "nfev", "njev", "success", "status", "message"}
    assert result.x is result["x"]
    result.more = 3
    assert result["more"] == 3
    del result.more
    with pytest.raises(AttributeError, match="more"):
        result.more  # noqa: B018
    assert "    nit: 3\n" in repr(result)
    assert "message: Maximum number" in repr(result)
    assert repr(type(result)()) == "_Result()"
    seen = []
    ac.minimize(
        bowl, START, jac=True, maxiter=2, callback=lambda intermediate_result: seen.append(intermediate_result.fun)
    )
    assert len(seen) == 2


def test_with_scipy_it_is_scipys():
    optimize = pytest.importorskip("scipy.optimize")
    seen = []
    result = ac.minimize(
        bowl, START, jac=True, maxiter=1, callback=lambda intermediate_result: seen.append(intermediate_result)
    )
    assert type(result) is type(seen[0]) is optimize.OptimizeResult


class Bar:
    """Instead of tqdm's: shows itself in every third update."""

    def __init__(self, total):
        self.total, self.n, self.texts, self.closed = total, 0, [], False
        bars.append(self)

    def update(self, n):
        self.n += n
        return self.n % 3 == 0

    def set_postfix_str(self, text, refresh=True):
        self.texts.append((self.n, text, refresh))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.closed = True


bars: list[Bar] = []


def test_progress_has_f_the_norm_and_the_end(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", types.ModuleType("tqdm"))
    monkeypatch.setitem(sys.modules, "tqdm.auto", types.SimpleNamespace(tqdm=Bar))
    result = ac.minimize(bowl, [3.0, 8.0], jac=True, maxiter=7, progress=True, lr=0.1, bounds=(None, 8))
    bar = bars.pop()
    assert (bar.total, bar.n, bar.closed) == (7, 7, True)
    assert [n for n, _, _ in bar.texts] == [0, 3, 6, 7]
    assert bar.texts[0] == (0, "f=25, |g|=1.00e+01", False)
    assert bar.texts[-1] == (7, f"f={result.fun:.6g}, |g|={abs(result.jac).max():.2e}", True)
    values = iter(range(10))
    result = ac.minimize(lambda x: (next(values), x - 3), START, jac=True, maxiter=3, progress=True, patience=100)
    assert [text.partition(",")[0] for _, text, _ in bars.pop().texts] == ["f=0", "f=2.7", f"f={result.fun:.3g}"]
    with pytest.raises(ZeroDivisionError):
        ac.minimize(lambda x: 1 / 0, START, jac=True, progress=True)
    assert bars.pop().closed


def test_progress_without_tqdm_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match=r"progress=True needs tqdm: pip install 'adaptive_c\[progress\]'"):
        ac.minimize(bowl, START, jac=True, progress=True)


def test_progress_with_tqdm(capsys):
    pytest.importorskip("tqdm")
    result = ac.minimize(bowl, START, jac=True, maxiter=30, progress=True)
    shown = capsys.readouterr().err
    assert "30/30" in shown
    assert f"f={result.fun:.6g}" in shown


# --- data --------------------------------------------------------------------------------------------------------------


def test_logistic_regression_over_mini_batches():
    """The loss over all rows comes within 0.2% of the least, and as many rows are classified rightly."""
    datasets = pytest.importorskip("sklearn.datasets")
    optimize = pytest.importorskip("scipy.optimize")
    x, y = datasets.load_breast_cancer(return_X_y=True)
    x = np.column_stack([(x - x.mean(0)) / x.std(0), np.ones(len(x))])
    sign = 2.0 * y - 1

    def loss(w, rows=slice(None)):
        margin = sign[rows] * (x[rows] @ w)
        f = np.logaddexp(0, -margin).mean() + 5e-3 * w @ w
        return f, -(sign[rows] / (1 + np.exp(margin))) @ x[rows] / len(margin) + 1e-2 * w

    least = optimize.minimize(loss, np.zeros(31), jac=True, method="L-BFGS-B", options={"gtol": 1e-8, "ftol": 0})
    rng = np.random.default_rng(0)
    batches = (rows for _ in range(40) for rows in np.array_split(rng.permutation(len(x)), 18))
    result = ac.minimize(loss, np.zeros(31), jac=True, batches=batches, lr=0.02)
    assert (result.status, result.nit) == (4, 720)
    assert least.fun <= loss(result.x)[0] < 1.002 * least.fun
    assert abs(result.fun / least.fun - 1) < 0.2
    assert ((x @ result.x > 0) == y).mean() == pytest.approx(((x @ least.x > 0) == y).mean(), abs=0.004)

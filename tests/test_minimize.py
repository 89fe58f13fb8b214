"""`minimize`: the bits of a loop written by hand, and every form, end and refusal of SciPy's conventions."""

import math
import re
import tracemalloc
import types
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from problems import START, bowl, by_hand, quartic
from support import assert_same_bits, child

import adaptive_c as ac

# --- functions ---------------------------------------------------------------------------------------------------------


def q(x):
    """The quadratic 3 x0^2 + 10 x1^2, least at (0, 0)."""
    return float(3 * x[0] ** 2 + 10 * x[1] ** 2), np.array([6, 20], x.dtype) * x


# --- the numbers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ac.optimizers.__all__)
def test_the_bits_of_a_loop_by_hand(name, dtype):
    x0 = START.astype(dtype)
    result = ac.minimize(q, x0, jac=True, optimizer=getattr(ac, name), average="last", maxiter=50, tol=0)
    expected, _ = by_hand(q, x0, 50, getattr(ac, name))
    assert_same_bits(result.x, expected)
    assert_same_bits(result.jac, q(expected)[1])
    assert result.fun == q(expected)[0]
    assert (result.nit, result.nfev, result.njev, result.status) == (50, 51, 51, 1)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": ac.schedules.warmup(ac.schedules.cosine(0.1, 30), 5), "betas": (0.9, ac.schedules.linear(0.9, 30))},
        {"lr": 0.1, "max_grad_norm": 1.0, "weight_decay": 0.1, "amsgrad": True},
        {"lr": 0.1, "bounds": (None, 1.5)},
    ],
    ids=lambda options: ",".join(options),
)
def test_the_options_are_the_optimizers(options):
    result = ac.minimize(q, START.clip(None, 1.5), jac=True, average="last", maxiter=40, tol=0, **options)
    assert_same_bits(result.x, by_hand(q, START.clip(None, 1.5), 40, **options)[0])


@pytest.mark.parametrize("name", ["lr", "betas"])
def test_a_plateau_is_shown_f(name):
    def options():
        plateau = ac.schedules.plateau(0.5, factor=0.5, patience=1)
        return {"lr": 0.5, name: plateau if name == "lr" else (plateau, 0.99)}

    x = START.copy()
    opt = ac.Adam(x, **options())
    for _ in range(40):
        f, g = q(x)
        opt.step(g, metric=f)
    result = ac.minimize(q, START, jac=True, average="last", maxiter=40, tol=0, **options())
    assert np.min(opt.param_groups[0][name]) < 0.5
    assert_same_bits(result.x, x)


@pytest.mark.parametrize("average", [0.9, ac.schedules.linear(0.5, 20, end=0.99)])
def test_an_average_is_the_optimizers(average):
    _, opt = by_hand(q, START, 30, lr=0.1, ema_decay=average)
    for said in ({"average": average}, {"ema_decay": average}):
        result = ac.minimize(q, START, jac=True, lr=0.1, maxiter=30, tol=0, **said)
        assert_same_bits(result.x, opt.ema)
        assert (result.fun, result.nit, result.nfev) == (q(opt.ema)[0], 30, 32)
        assert_same_bits(result.jac, q(opt.ema)[1])


def test_average_true_takes_about_the_last_ninth():
    """Against the weights written out: of n points, point k has the share 9/(k + 8) of what came before."""
    points = []
    ac.minimize(q, START, jac=True, lr=0.1, maxiter=90, tol=0, callback=points.append)
    weights = np.array([9 / (k + 8) * np.prod([1 - 9 / (j + 8) for j in range(k + 1, 91)]) for k in range(1, 91)])
    assert math.isclose(weights.sum(), 1)
    assert 0.55 < weights[80:].sum() < 0.7
    result = ac.minimize(q, START, jac=True, lr=0.1, maxiter=90, tol=0, average=True)
    np.testing.assert_allclose(result.x, weights @ points, rtol=1e-13)


# The numbers of the seeds' quadratic and quartic, from float64 recomputation.
SEEDS = [
    (q, [-15.0, 20.0], {"optimizer": ac.SGD, "lr": 0.001}, [-14.1239152532, 16.3414561378], 10),
    (q, [-15.0, 20.0], {"optimizer": ac.RMSprop, "lr": 0.05, "alpha": 0.9, "eps_mode": "inside"},
     [-14.1419905982, 19.1398050031], 10),
    (quartic, 0.1, {"optimizer": ac.RMSprop, "lr": 0.1, "alpha": 0.9, "eps_mode": "inside"}, -1.10715973, 8),
    (quartic, 0.1, {"optimizer": ac.Adagrad, "lr": 0.1, "eps": 1e-8, "eps_mode": "inside"}, -0.445165663, 8),
    (quartic, 0.1, {"optimizer": ac.Adam, "lr": 0.1}, -0.694351316, 8),
]  # fmt: skip


@pytest.mark.parametrize(("fun", "x0", "options", "expected", "steps"), SEEDS)
def test_the_seeds_numbers(fun, x0, options, expected, steps):
    result = ac.minimize(fun, x0, jac=True, average="last", maxiter=steps, tol=0, **options)
    np.testing.assert_allclose(result.x, expected, rtol=0, atol=1e-8)
    assert result.x.shape == np.shape(x0)


@pytest.mark.parametrize(
    ("fun", "x0", "least", "options"),
    [
        (q, [-15.0, 20.0], [0, 0], {"lr": 0.5}),
        (quartic, 0.1, -1.10715987169, {"lr": 0.1}),
        (quartic, 1.5, -1.10715987169, {"lr": 0.2}),  # it rolls through the nearer minimum
        (
            quartic,
            1.5,
            0.837565435283,
            {"lr": 0.2, "optimizer": ac.RMSprop, "alpha": 0.9, "tol": 1e-2, "bounds": (0, None)},
        ),
    ],
)
def test_the_seeds_minima(fun, x0, least, options):
    result = ac.minimize(fun, x0, jac=True, **options)
    assert result.success
    np.testing.assert_allclose(result.x, least, atol=3e-3 if "tol" in options else 2e-6)


# --- what is given -----------------------------------------------------------------------------------------------------


def filled(x, *args, out):
    out[...] = bowl(x)[1]
    return bowl(x)[0]


FORMS = {
    "jac=True": (bowl, True),
    "jac a function": (lambda x: bowl(x)[0], lambda x: bowl(x)[1]),
    "jac='out'": (filled, "out"),
    "lists": (lambda x: [bowl(x)[0], bowl(x)[1].tolist()], True),
    "other layout": (lambda x: (np.array([bowl(x)[0]]), np.asfortranarray(bowl(x)[1])), True),
    "other types": (lambda x: (np.array(bowl(x)[0]), bowl(x)[1].astype(object).astype("longdouble")), True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_function(form):
    fun, jac = FORMS[form]
    x0 = np.arange(6.0).reshape(2, 3)
    result = ac.minimize(fun, x0, jac=jac, lr=0.1, maxiter=20)
    assert_same_bits(result.x, by_hand(bowl, x0, 20, lr=0.1)[0])
    assert_same_bits(result.jac, bowl(result.x)[1])
    assert type(result.fun) is float


@pytest.mark.parametrize("x0", [0.5, 1, [1, 2], (1.0, 2.0), np.array(2.0), np.float32(1.5), np.ones((2, 3), "f4"),
                                np.ones((3, 2), order="F"), np.ones(4, "f2"), np.arange(3), True, np.ones((1, 1))])  # fmt: skip
def test_x0_of_any_shape_and_type_is_not_written(x0):
    before = np.array(x0)
    if isinstance(x0, np.ndarray):
        x0.flags.writeable = False
    seen = []
    result = ac.minimize(lambda x: seen.append((x.shape, x.dtype)) or bowl(x), x0, jac=True, lr=0.1, bounds=(None, 5))
    assert result.success
    np.testing.assert_allclose(result.x, np.full(np.shape(x0), 3), rtol=1e-5)
    dtype = np.dtype("f4" if np.asarray(x0).dtype == "f4" else "f8")
    assert (result.x.shape, result.x.dtype) == (np.shape(x0), dtype)
    assert (result.jac.shape, result.jac.dtype) == (np.shape(x0), dtype)
    assert set(seen) == {(np.shape(x0), dtype)}
    assert_same_bits(np.array(x0), before)


def test_a_gradient_of_one_element_may_have_another_shape():
    for x0, shape in ((0.5, (1,)), ([0.5], ()), ([[0.5]], (1,))):
        result = ac.minimize(lambda x, shape=shape: (bowl(x)[0], bowl(x)[1].reshape(shape)), x0, jac=True, lr=0.1)
        assert result.success
        assert result.jac.shape == np.shape(x0)


def test_args_come_after_x_and_a_batch():
    def fun(x, *rest):
        seen.append(rest)
        return bowl(x)

    for args, batches, expected in ((1, None, (1,)), ((1, 2), None, (1, 2)), ([1], [7], (7, [1])), ((), "a", ("a",))):
        seen = []
        ac.minimize(fun, START, args, jac=True, batches=batches, maxiter=1)
        assert seen == [expected, expected]


def test_both_functions_are_given_args_and_batch():
    result = ac.minimize(lambda x, b, a: a * b * x @ x, START, (2,), jac=lambda x, b, a: 2 * a * b * x, batches=[3, 5],
                         maxiter=4, average="last")  # fmt: skip
    x, opt = START.copy(), None
    opt = ac.Adam(x)
    for b in (3, 5, 3, 5):
        opt.step(4 * b * x)
    assert_same_bits(result.x, x)


def test_the_gradient_that_is_returned_is_the_callers():
    buffer = np.zeros(2)
    result = ac.minimize(lambda x: (1.0, np.subtract(x, 3, out=buffer)), START, jac=True, maxiter=2)
    assert (result.jac == buffer).all()
    assert not np.shares_memory(result.jac, buffer)


def test_x_is_live_and_can_only_be_read():
    kept = []
    result = ac.minimize(lambda x: kept.append(x) or bowl(x), START, jac=True, maxiter=3, average="last")
    assert all((x == result.x).all() for x in kept)

    def writes(x):
        x -= 3
        return bowl(x)

    with pytest.raises(ValueError, match="read-only") as raised:
        ac.minimize(writes, START, jac=True)
    assert raised.value.__notes__ == ["fun can only read x, which is the live array: write to x.copy()"]
    result.x[:] = 0  # what is returned is the caller's
    with pytest.raises(ValueError, match=r"shares memory with x, .*: return a copy of it, such as x.copy\(\)"):
        ac.minimize(lambda x: (x @ x / 2, x), START, jac=True)


@pytest.mark.parametrize("bounds", [None, (None, 1.0), (-1, 1)], ids=str)
def test_a_step_with_out_allocates_no_array(bounds):
    n = 50_000
    peaks = []

    def fun(x, out):
        if len(peaks) < 20:
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.reset_peak()
        np.subtract(x, 3, out=out)
        return 1e6 - len(peaks)

    tracemalloc.start()
    try:
        ac.minimize(fun, np.zeros(n), jac="out", bounds=bounds, maxiter=22)
        base = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert max(np.diff(peaks[3:])) < n  # bytes, of 8 n
    assert base < 30 * n


def test_only_what_is_needed_is_imported():
    script = """
import sys, adaptive_c as ac, numpy as np
ac.minimize, ac.scipy_method(ac.Adam, lr=0.1)
assert not {"scipy", "tqdm"} & {name.partition(".")[0] for name in sys.modules}
sys.modules["scipy"] = sys.modules["tqdm"] = None
print(ac.minimize(lambda x: (x @ x, 2 * x), np.ones(2), jac=True, lr=0.1).success)
"""
    assert child(script) == "True\n"


# --- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "no gradient": ({"jac": None}, ValueError, r"jac=None does not give one; let fun return \(f, g\) and say jac=True"),
    "jac=False": ({"jac": False}, ValueError, "jac=False"),
    "finite differences": ({"jac": "2-point"}, ValueError, "jac='2-point' does not give one.*approx_fprime"),
    "complex step": ({"jac": "cs"}, ValueError, "jac='cs'"),
    "an array": ({"jac": np.ones(2)}, ValueError, "the gradient is needed"),
    "only f": ({"fun": lambda x: 1.0}, TypeError, r"jac=True says that fun returns \(f, g\); it returned 1.0"),
    "three": ({"fun": lambda x: (1.0, x, x)}, TypeError, "it returned"),
    "a pair unasked": ({"jac": lambda x: 2 * x}, TypeError, r"one real number, got \(.*; if that is \(f, g\), say jac=True"),
    "None": ({"fun": lambda x: (None, x * 2)}, TypeError, "one real number, got None"),
    "two values": ({"fun": lambda x: (x * 2, x * 2)}, TypeError, r"got an array of shape \(2,\)"),
    "a complex value": ({"fun": lambda x: (1j, x * 2)}, TypeError, "one real number, got 1j"),
    "another shape": ({"fun": lambda x: (1.0, np.ones((2, 1)))}, ValueError, r"shape of x, \(2,\), got \(2, 1\)"),
    "a complex gradient": ({"fun": lambda x: (1.0, 1j * x)}, TypeError, r"got an ndarray of dtype complex128; .* z.view\('float64'\)"),
    "no gradient at all": ({"fun": lambda x: (1.0, None)}, TypeError, "the gradient must be real numbers, got None"),
    "a pair as the gradient": ({"fun": lambda x: 1.0, "jac": lambda x: (1.0, 2 * x)}, TypeError, r"the gradient can't be read as an array, got \(1.0, arr"),
    "rows": ({"fun": lambda x: (1.0, ac.Rows(np.array([0]), np.ones((1, 1))))}, TypeError, "got a Rows .*; .*np.add.at"),
    "a fraction": ({"fun": lambda x: (Fraction(1, 3), x * 2)}, TypeError, r"got Fraction\(1, 3\); return float\(f\)"),
    "no function": ({"fun": 3}, TypeError, "fun must be a function, got 3"),
    "complex x0": ({"x0": [1j]}, TypeError, "x0 must be real numbers, got a list of dtype complex128; a complex number is two"),
    "strings": ({"x0": ["a"]}, TypeError, "x0 must be real numbers, got a list of dtype <U1"),
    "no x0": ({"x0": None}, TypeError, "x0 must be real numbers, got None"),
    "a dict": ({"x0": {"w": START}}, TypeError, "got a dict of dtype object; adaptive_c.flatten makes one array"),
    "ragged lists": ({"x0": [[1.0], [2.0, 3.0]]}, TypeError, r"x0 can't be read as an array, got \[\[1.0\], \[2.0, 3.0\]\]: "),
    "a mask": ({"x0": np.ma.masked_less([1.0, 2.0], 2)}, TypeError, "x0 is a masked array, whose mask would be ignored: pass x.data"),
    "a masked gradient": ({"fun": lambda x: (1.0, np.ma.masked_less(x, 2))}, TypeError, "the gradient is a masked array"),
    "a generator": ({"x0": iter([1.0])}, TypeError, "got a list_iterator of dtype object; make it a list"),
    "no callback": ({"callback": 5}, TypeError, "callback must be a function, got 5"),
    "progress of a word": ({"progress": "no"}, TypeError, "progress must be True or False, got 'no'"),
    "no elements": ({"x0": []}, ValueError, "x0 has no elements"),
    "NaN": ({"x0": [[1.0], [np.nan]]}, ValueError, r"x0 is nan at index \(1, 0\); start from finite numbers"),
    "an infinity": ({"x0": -np.inf}, ValueError, r"x0 is -inf at index \(\)"),
    "a negative tol": ({"tol": -1}, ValueError, "tol must be at least 0, got -1"),
    "NaN tol": ({"tol": np.nan}, ValueError, "tol must be"),
    "tol of a word": ({"tol": "x"}, TypeError, "tol must be a number"),
    "tol and batches": ({"tol": 1e-3, "batches": [1]}, ValueError, "tol needs exact gradients.*drop tol"),
    "tol and patience": ({"tol": 1e-3, "patience": 3}, ValueError, "tol needs exact gradients"),
    "a negative maxiter": ({"maxiter": -1}, ValueError, "maxiter must be at least 0, got -1"),
    "maxiter of a float": ({"maxiter": 1e3}, TypeError, "maxiter must be an integer, got 1000.0"),
    "no maxiter": ({"maxiter": None}, TypeError, "maxiter must be an integer, got None"),
    "no patience": ({"patience": 0}, ValueError, "patience must be at least 1, got 0"),
    "ascent": ({"maximize": True}, ValueError, "maximize can't be given to minimize; minimize -fun"),
    "a loss scale": ({"loss_scale": 2.0}, ValueError, "loss_scale can't be given"),
    "an unknown option": ({"learning_rate": 1}, TypeError, "Adam has no argument 'learning_rate'"),
    "an odd option": ({"lr": -1}, ValueError, "lr must be in"),
    "an odd average": ({"average": "mean"}, ValueError, "average must be 'best', 'last', True, a decay or None, got 'mean'"),
    "no average": ({"average": False}, ValueError, "average must be"),
    "an odd decay": ({"average": 1.5}, ValueError, r"average must be in \[0"),
    "two averages": ({"average": 0.9, "ema_decay": 0.9}, TypeError, "average=0.9 and ema_decay=0.9 are one thing; drop one"),
    "the best of noise": ({"average": "best", "batches": [1]}, ValueError, "needs patience"),
    "batches of a number": ({"batches": 3}, TypeError, "batches must be iterable, got 3"),
    "a maker of batches": ({"batches": list}, TypeError, r"must be iterable, got .*; if it makes them, call it: batches=f\(\)"),
    "no batches": ({"batches": []}, ValueError, "batches has no items"),
    "an empty iterator": ({"batches": iter([])}, ValueError, "batches has no items"),
    "a constraint as bounds": ({"bounds": types.SimpleNamespace(A=np.eye(2), lb=0, ub=1)}, ValueError, "bounds must be None, a Bounds"),
    "a ragged side": ({"bounds": ([1, [2, 3]], None)}, TypeError, "bounds: lo can't be read as an array"),
    "one bound": ({"bounds": [1]}, ValueError, r"bounds must be None, a Bounds, 2 pairs .*; got \[1\]"),
    "a number as bounds": ({"bounds": 3}, ValueError, "bounds must be None, a Bounds, 2 pairs"),
    "three pairs": ({"bounds": [(0, 1)] * 3}, ValueError, "bounds must be None, a Bounds, 2 pairs"),
    "two pairs for three": ({"x0": np.ones(3), "bounds": [(0, 1)] * 2}, ValueError, r"a Bounds, 3 pairs .*; got \[\(0, 1\), "),
    "two arrays for two": ({"bounds": (np.zeros(2), np.ones(2))}, ValueError, r"two sides lo and hi, say bounds=list\(zip"),
    "pairs without room": ({"bounds": ([0, 0], [1, 1])}, ValueError, "of two elements are read as a pair"),
    "a side of three": ({"bounds": (np.ones(3), None)}, ValueError, r"lo must be a number or of x0's shape \(2,\), got shape \(3,\)"),
    "bounds of words": ({"bounds": ("a", 1)}, TypeError, "bounds: lo must be real numbers, got 'a'"),
    "bounds of NaN": ({"bounds": (0, np.nan)}, ValueError, "bounds hi must be|bounds: hi has a NaN"),
    "crossed bounds": ({"bounds": [(0, 1), (2, 1)]}, ValueError, "of two elements are read as a pair"),
    "more crossed bounds": ({"x0": np.ones(3), "bounds": [(2, 1)] * 3}, ValueError, "bounds must have lo <= hi"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case):
    odd, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        ac.minimize(**{"fun": bowl, "x0": START, "jac": True, **odd})


def test_a_sparse_gradient_is_refused_with_the_remedy():
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match=r"got a csr_array of dtype object; call its toarray\(\)"):
        ac.minimize(lambda x: (1.0, sparse.csr_array([x])), START, jac=True)


def test_the_remedy_for_a_missing_gradient_works_when_it_is_pasted():
    scipy = pytest.importorskip("scipy")
    pytest.importorskip("scipy.optimize")

    def fun(x, a):
        return a * (x - 3) @ (x - 3)

    with pytest.raises(ValueError, match="SciPy makes them: ") as refused:
        ac.minimize(fun, START, 2)
    jac = eval(re.search(r"jac=(lambda.*)", str(refused.value))[1], {"scipy": scipy, "fun": fun})
    result = ac.minimize(fun, START, 2, jac=jac, lr=0.1, tol=1e-4)
    assert result.success
    np.testing.assert_allclose(result.x, 3, rtol=1e-4)


def test_what_the_function_raises_is_raised():
    def fails(x):
        raise FloatingPointError("mine")

    with pytest.raises(FloatingPointError, match="mine"):
        ac.minimize(fails, START, jac=True)

    def stops(x):
        raise StopIteration

    with pytest.raises(StopIteration):
        ac.minimize(stops, START, jac=True)


# --- bounds ------------------------------------------------------------------------------------------------------------

BOUNDS = {
    "Bounds": types.SimpleNamespace(lb=np.array([-1.0, -np.inf]), ub=np.array([2.0, np.inf]), keep_feasible=False),
    "pairs": [(-1, 2), (None, None)],
    "an array of pairs": np.array([[-1, 2], [-np.inf, np.inf]]),
    "sides": ([-1.0, -np.inf], np.array([2.0, np.inf])),
}


@pytest.mark.parametrize("form", BOUNDS)
def test_every_form_of_bounds(form):
    x0 = np.array([5.0, 5.0])
    shape = (2,)
    if form == "sides":  # of two elements they would be pairs
        x0, shape = x0.reshape(2, 1), (2, 1)
        bounds = tuple(np.reshape(side, shape) for side in BOUNDS[form])
    else:
        bounds = BOUNDS[form]
    seen = []
    result = ac.minimize(lambda x: seen.append(x.copy()) or bowl(x), x0, jac=True, bounds=bounds, lr=0.1)
    assert result.success
    np.testing.assert_allclose(result.x.ravel(), [2, 3], rtol=1e-5)
    assert result.x.shape == shape
    assert seen[0].ravel().tolist() == [2, 5]  # x0 is moved
    assert max(x.flat[0] for x in seen) == 2
    assert result.jac.flat[0] == -2  # the gradient itself, not the projected one


@pytest.mark.parametrize("bounds", [(None, 2), [(None, 2)], types.SimpleNamespace(lb=[-np.inf], ub=[2])])
def test_bounds_of_a_number(bounds):
    result = ac.minimize(bowl, 0, jac=True, bounds=bounds, lr=0.1)
    assert (result.success, result.x, result.x.shape) == (True, 2, ())


def test_one_number_bounds_all_elements():
    for bounds in ((None, 2), types.SimpleNamespace(lb=[-np.inf], ub=[2]), [(None, 2)] * 6):
        assert (ac.minimize(bowl, np.zeros((2, 3)), jac=True, bounds=bounds, lr=0.1).x == 2).all()


def test_bounds_are_rounded_inward_for_float32():
    result = ac.minimize(bowl, np.zeros(2, "f4"), jac=True, bounds=(0.1, 0.3), lr=0.1)
    assert result.success
    assert (result.x.astype("f8") <= 0.3).all()
    first = []
    ac.minimize(lambda x: first.append(x.copy()) or bowl(x), np.zeros(2, "f4"), jac=True, bounds=(0.1, 0.3), maxiter=0)
    assert (first[0].astype("f8") >= 0.1).all()


def test_an_average_is_inside_the_bounds():
    result = ac.minimize(bowl, -1, jac=True, bounds=(None, 0.1), average=True, optimizer=ac.SGD, lr=1, maxiter=1)
    assert result.x == 0.1 < -1 + (0.1 - -1)  # which is what e + (x - e) gives
    for hi in np.random.default_rng(0).uniform(0, 1, 20):
        for decay in (0.3, True):
            result = ac.minimize(
                bowl, np.zeros(3), jac=True, bounds=(None, hi), average=decay, lr=0.3, maxiter=60, tol=0
            )
            assert (result.x <= hi).all()
            assert (result.x > hi / 2).all()


box = hnp.arrays("f8", st.integers(1, 6), elements=st.floats(-3, 3, width=16)).flatmap(
    lambda lo: st.tuples(
        st.just(lo),
        *(
            hnp.arrays("f8", lo.shape, elements=st.floats(a, b, width=16))
            for a, b in ((0, 4), (-5, 5), (-4, 4), (0.5, 8))
        ),
    )
)


@settings(max_examples=40)
@given(box)
def test_in_any_box_the_least_of_a_separable_quadratic_is_its_clipped_least(drawn):
    lo, width, least, x0, curvature = drawn

    def fun(x):
        assert (x >= lo).all()
        assert (x <= lo + width).all()
        return (curvature * (x - least) ** 2).sum() / 2, curvature * (x - least)

    result = ac.minimize(fun, x0, jac=True, optimizer=ac.SGD, bounds=list(zip(lo, lo + width, strict=True)), lr=0.1)
    assert result.success
    np.testing.assert_allclose(result.x, least.clip(lo, lo + width), atol=3e-5)
    projected = result.x - (result.x - result.jac).clip(lo, lo + width)
    assert result.fun <= fun(x0.clip(lo, lo + width))[0]
    assert abs(projected).max() < 1.1e-5


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({"method": "Adam"}, "say optimizer=Adam"),
        ({"options": {"maxiter": 3}}, "its items are arguments here"),
        ({"gtol": 1e-3}, "it is tol here"),
        ({"maxfun": 100}, "there is one in each iteration"),
        ({"constraints": ()}, "there are only bounds"),
        ({"hess": None}, "first derivatives alone"),
    ],
)
def test_scipys_other_arguments_are_told_where_they_are(given, hint):
    with pytest.raises(ValueError, match=f"{next(iter(given))} can't be given to minimize; .*{hint}"):
        ac.minimize(lambda x: (0.0, x), [1.0], jac=True, **given)


def test_an_optimizer_has_no_options_argument():
    with pytest.raises(TypeError, match="Adam has no argument 'options'; it has params, lr"):
        ac.Adam(np.ones(2), options={"lr": 1.0})


@pytest.mark.parametrize("average", [1, 1.0, 1.5, -0.1])
def test_a_decay_that_would_keep_x0_is_refused(average):
    with pytest.raises(ValueError, match=r"average must be in \[0, 1\) where it is a decay"):
        ac.minimize(lambda x: (0.0, x), [1.0], jac=True, average=average)


def test_a_gradient_that_fun_does_not_fill_is_noticed():
    def rebinds(x, out):
        out = 2 * x  # noqa: F841  instead of out[...] = 2 * x
        return float(x @ x)

    def adds(x, out):
        out += 2 * x
        return float(x @ x)

    for fun in (rebinds, adds):
        result = ac.minimize(fun, np.ones(2), jac="out", lr=0.1)
        assert (result.success, result.status) == (False, 3)
        assert "The gradient is nan at index (0,) in iteration 0" in result.message


def test_a_gradient_that_was_zeroed_is_not_said_to_be_large():
    result = ac.minimize(lambda x: (1.0, x * np.nan), START, jac=True, zero_grad=True)
    assert (result.status, result.message) == (3, "NaN result encountered. The gradient was not finite in iteration 0.")


def test_an_unknown_argument_is_told_what_minimize_has():
    with pytest.raises(TypeError, match="Adam has no argument 'max_iter'") as raised:
        ac.minimize(lambda x: (0.0, x), [1.0], jac=True, max_iter=3)
    assert "maxiter, batches" in raised.value.__notes__[0]
    assert raised.value.__notes__[0].endswith("; max_iter (did you mean maxiter?)")

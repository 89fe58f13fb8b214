"""Numbers that do not come from reference.py: golden values, hand-worked numbers, identities from the papers."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import adaptive_c as ac
from adaptive_c import reference

GOLDEN = json.loads((Path(__file__).parent / "data" / "update_rules.json").read_text())
CLASS = {"sgd": "SGD", "adagrad": "Adagrad", "rmsprop": "RMSprop", "adadelta": "Adadelta", "adam": "Adam",
         "adamax": "Adamax", "nadam": "NAdam", "radam": "RAdam", "lion": "Lion", "rprop": "Rprop",
         "supersab": "SuperSAB"}  # fmt: skip
NAMES = {"wd": "weight_decay", "mode": "eps_mode", "psi": "momentum_decay", "decoupled": "decoupled_weight_decay"}
NOT_OFFERED = {"amsgrad paper", "amsgrad optax", "nadam optax", "radam paper thr=4 b2=.9"}


def golden_cases():
    for name, case in GOLDEN["cases"].items():
        if case["fn"] not in CLASS or name in NOT_OFFERED:
            continue
        hp = dict(case["hp"])
        cls = "Momentum" if hp.pop("form", "") == "seed" else CLASS[case["fn"]]
        if hp.pop("ams", ""):
            hp["amsgrad"] = True
        hp.pop("strict", None)
        if "b2" in hp:
            hp["betas"] = (0.9, hp.pop("b2"))
        options = {NAMES.get(key, key): value for key, value in hp.items()}
        if cls in ("SGD", "Momentum", "Lion", "Rprop", "SuperSAB"):
            options.setdefault("lr", 0.1)
        yield pytest.param(cls, options, case["trace"], id=name)


def test_all_golden_cases_of_these_rules_are_used():
    assert len(list(golden_cases())) == sum(case["fn"] in CLASS for case in GOLDEN["cases"].values()) - 4 == 35


@pytest.mark.parametrize(("cls", "options", "trace"), list(golden_cases()))
def test_golden_values(cls, options, trace):
    p = np.array(GOLDEN["w0"])
    opt = getattr(ac, cls)(p, **options)
    for g, want in zip(GOLDEN["grads"], trace, strict=True):
        opt.step(np.array(g))
        np.testing.assert_allclose(p, want, rtol=0, atol=1e-12)


OPTAX = json.loads((Path(__file__).parent / "data" / "optax.json").read_text())  # says how it was made


@pytest.mark.parametrize("case", OPTAX["cases"].values(), ids=list(OPTAX["cases"]))
def test_optaxs_values(case):
    """Rules that PyTorch does not have."""
    p = np.array(GOLDEN["w0"])
    opt = getattr(ac, case["class"])(p, **case["options"])
    for g, want in zip(GOLDEN["grads"], case["trace"], strict=True):
        opt.step(np.array(g))
        np.testing.assert_allclose(p, want, rtol=0, atol=1e-12)


# --- the quadratic 3 w1^2 + 10 w2^2 from (-15, 20): N1 to N6 ---------------------------------------------------------


def q_gradient(w):
    return np.array([6.0, 20.0]) * w


def run(opt, p, gradient, steps):
    path = [p.copy()]
    for _ in range(steps):
        opt.step(gradient(p))
        path.append(p.copy())
    return path


def test_n1_n2_gradient_descent_on_the_quadratic():
    p = np.array([-15.0, 20.0])
    np.testing.assert_array_equal(q_gradient(p), [-90, 400])
    path = run(ac.SGD(p, lr=0.001), p, q_gradient, 10)
    np.testing.assert_allclose(path[1], [-14.91, 19.6], rtol=1e-15)
    np.testing.assert_allclose(path[2], [-14.82054, 19.208], rtol=1e-14)
    np.testing.assert_allclose(path[10], [-14.1239152532, 16.3414561378], atol=5e-11)
    assert 3 * p[0] ** 2 + 10 * p[1] ** 2 == pytest.approx(3268.886833, abs=5e-7)


@pytest.mark.parametrize("eps_mode", ["inside", "outside"])
def test_n3_to_n6_rmsprop_on_the_quadratic(eps_mode):
    p = np.array([-15.0, 20.0])
    opt = ac.RMSprop(p, lr=0.05, alpha=0.9, eps=1e-8, eps_mode=eps_mode)
    opt.step(q_gradient(p))
    np.testing.assert_allclose(opt.state["square_avg"], [810, 16000], rtol=1e-14)
    np.testing.assert_allclose(p, [-14.841886117, 19.841886117], atol=1e-9)
    assert 0.05 / math.sqrt(1 - 0.9) == pytest.approx(0.1581138830, abs=5e-11)
    opt.step(q_gradient(p))
    np.testing.assert_allclose(opt.state["square_avg"], [1522.0137006, 30148.0177872], atol=5e-7)
    np.testing.assert_allclose(p, [-14.7277557881, 19.7276105009], atol=5e-10)
    run(opt, p, q_gradient, 8)
    np.testing.assert_allclose(p, [-14.1419905982, 19.1398050031], atol=5e-10)


def test_n5_n6_with_the_path_rounded_to_two_decimals():
    p = np.array([-15.0, 20.0])
    opt = ac.RMSprop(p, lr=0.05, alpha=0.9, eps=1e-8, eps_mode="inside")
    opt.step(q_gradient(p))
    p[:] = p.round(2)
    np.testing.assert_allclose(q_gradient(p), [-89.04, 396.8], rtol=1e-14)
    opt.step(q_gradient(p))
    np.testing.assert_allclose(opt.state["square_avg"], [1521.81216, 30145.024], rtol=1e-14)
    np.testing.assert_allclose(p, [-14.7258766, 19.7257296], atol=5e-8)


# --- RMSprop's smoothing constant at its ends: N7 to N10 -------------------------------------------------------------


def rmsprop_updates(alpha, grads, lr=1.0, eps=1e-8):
    """The update vectors v(t), as minus the change of a parameter."""
    p = np.zeros_like(np.atleast_1d(np.asarray(grads[0], float)))
    opt = ac.RMSprop(p, lr=lr, alpha=alpha, eps=eps, eps_mode="inside")
    out = []
    for g in grads:
        before = p.copy()
        opt.step(np.atleast_1d(np.asarray(g, float)))
        out.append(before - p)
    return out


def test_n7_no_memory_leaves_only_the_eight_directions():
    first, second = rmsprop_updates(0.0, [[-90.0, 400.0], [0.0, 3.0]])
    np.testing.assert_allclose(first, [-1, 1], atol=1e-9)
    np.testing.assert_allclose(second, [0, 1], atol=1e-8)


def test_n8_all_memory_divides_by_the_root_of_eps():
    for update, g in zip(rmsprop_updates(1.0, [[0.5, -2.0], [3.0, 1.0]]), ([0.5, -2.0], [3.0, 1.0]), strict=True):
        np.testing.assert_allclose(update, 1e4 * np.array(g), rtol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9, 0.99])
def test_n9_state_after_two_steps(beta):
    p = np.zeros(1)
    opt = ac.RMSprop(p, alpha=beta)
    opt.step(np.array([3.0]))
    assert opt.state["square_avg"][0] == pytest.approx((1 - beta) * 9, rel=1e-15)
    opt.step(np.array([5.0]))
    assert opt.state["square_avg"][0] == pytest.approx((1 - beta) * (beta * 9 + 25), rel=1e-14)


@pytest.mark.parametrize(
    ("beta", "g1", "g2", "want"),
    [(0.9, 0.1, 0.1, 2.1941513), (0.9, 1, 1, 1.29415728), (0.9, 2, 2, 0.294157324), (0.9, 3, -1, 0.048284831),
     (0.9, -4, 4, -1.70584267), (0.0, 0.1, 0.1, 0.8999995), (0.0, 2, 2, -1.0), (0.99, 1, 1, 6.08881027),
     (1.0, 1, 1, 9999.0)],
)  # fmt: skip
def test_n10_amplification(beta, g1, g2, want):
    update = rmsprop_updates(beta, [g1, g2])[1][0]
    assert abs(update) - abs(g2) == pytest.approx(want, rel=2e-8)


# --- N11 to N13 ------------------------------------------------------------------------------------------------------


def test_n11_the_first_moment_after_three_steps():
    p = np.zeros(3)
    opt = ac.Adam(p)
    for i in range(3):
        opt.step(np.eye(3)[i])
    np.testing.assert_allclose(opt.state["exp_avg"], [0.081, 0.09, 0.1], rtol=1e-14)


def test_n12_a_rate_per_element_turns_the_step_but_still_descends():
    a, b = np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 6.0])
    assert (a * b) @ a / (np.linalg.norm(a * b) * np.linalg.norm(a)) < 1
    cosine = a @ (b * a) / math.sqrt((a @ a) * ((b * a) @ (b * a)))
    assert 78 / math.sqrt(14 * 440) == pytest.approx(0.9938120, abs=5e-8)
    assert cosine < 1
    for name in ("Adagrad", "RMSprop", "Adam", "Adadelta", "Adamax", "Lion"):
        p = np.zeros(3)
        getattr(ac, name)(p).step(a)
        assert p @ a < 0


def test_n13_bias_correction_makes_the_first_step_lr():
    for g in (1e-3, -7.0, 400.0):
        p = np.zeros(1)
        opt = ac.Adam(p, lr=0.1, eps=0.0)
        opt.step(np.array([g]))
        assert opt.state["exp_avg"][0] / (1 - 0.9) == pytest.approx(g, rel=1e-14)
        assert opt.state["exp_avg_sq"][0] / (1 - 0.999) == pytest.approx(g * g, rel=1e-12)
        assert p[0] == pytest.approx(-0.1 * np.sign(g), rel=1e-12)


# --- the quartic x^4 - 2 x^2 + x and its oscillating sister ----------------------------------------------------------


def quartic(x):
    return 4 * x**3 - 4 * x + 1


def oscillating(x):
    return 4 * x**3 - 12 * x**2 + 8 * x + 6 * np.cos(12 * x)


INSIDE = {"eps": 1e-8, "eps_mode": "inside"}


@pytest.mark.parametrize(
    ("cls", "options", "f", "x0", "want"),
    [
        ("SGD", {"lr": 0.5}, quartic, 0.3,
         [0.346, 0.455156528, 0.676882336, 0.910393059, 0.722083381, 0.913255226, 0.716391837, 0.913846194]),
        ("SGD", {"lr": 0.8}, quartic, 0.1, [-0.3832, -2.22937617, 25.2934613, -51676.0851, 4.4159e14]),
        ("SGD", {"lr": 0.1}, quartic, 0.3, [*[None] * 7, 0.489088546]),
        ("SGD", {"lr": 0.1}, quartic, 0.1, [*[None] * 7, -1.10224876]),
        ("Adagrad", {"lr": 0.1, **INSIDE}, quartic, 0.1,
         [1.37055389e-9, -0.0855978661, -0.160970946, -0.228490881, -0.289717964, -0.345742698, -0.397359399,
          -0.445165663]),
        ("RMSprop", {"lr": 0.1, "alpha": 0.9, **INSIDE}, quartic, 0.1,
         [-0.216227723, -0.517925978, -0.774425051, -0.965957392, -1.07273708, -1.10415636, -1.10716224, -1.10715973]),
        ("Adam", {"lr": 0.1, **INSIDE}, quartic, 0.1,
         [1.37055389e-9, -0.0983350982, -0.196142711, -0.294132985, -0.392750698, -0.492266243, -0.592808466,
          -0.694351316]),
        ("RMSprop", {"lr": 0.05, "alpha": 0.9, **INSIDE}, oscillating, 0.5,
         [0.341886117, 0.38482442, 0.362614535, 0.377268055, 0.366573161, 0.37549939, 0.367206095, 0.37579276]),
        ("Adam", {"lr": 0.05, **INSIDE}, oscillating, 0.5,
         [0.45, 0.400961633, 0.356721284, 0.323822975, 0.305548237, 0.300228233, 0.304828779, 0.316624884]),
    ],
)  # fmt: skip
def test_trajectories(cls, options, f, x0, want):
    p = np.array([x0])
    path = run(getattr(ac, cls)(p, **options), p, f, len(want))[1:]
    for got, expected in zip(path, want, strict=True):
        if expected is not None:  # the printed digits: nine significant ones (five for the run that escapes)
            assert got[0] == pytest.approx(expected, rel=6e-9 if abs(expected) < 1e14 else 1e-4, abs=6e-10)


def test_adam_inside_and_outside_agree_to_eight_digits_on_the_quartic():
    paths = []
    for eps_mode in ("inside", "outside"):
        p = np.array([0.1])
        paths.append(run(ac.Adam(p, lr=0.1, eps_mode=eps_mode), p, quartic, 8))
    np.testing.assert_allclose(paths[0], paths[1], rtol=0, atol=1e-8)


def test_adam_leaves_the_local_minimum_where_rmsprop_stays():
    for cls, options, want in (("Adam", {}, -1.10715987), ("RMSprop", {"alpha": 0.9}, 0.8376)):
        p = np.array([1.5])
        run(getattr(ac, cls)(p, lr=0.2, **options), p, quartic, 400)
        assert p[0] == pytest.approx(want, abs=0.11 if cls == "RMSprop" else 1e-3)


def test_amsgrad_finds_the_optimum_of_reddi_et_al_where_adam_does_not():
    """f_t = 4 x if t mod 3 == 1 else -x on [-1, 1]: the optimum is -1."""
    for amsgrad in (False, True):
        p = np.zeros(1)
        opt = ac.Adam(p, betas=(0.0, 1 / 17), eps=0.0, amsgrad=amsgrad)
        for t in range(1, 6001):
            opt.param_groups[0]["lr"] = 0.5 / math.sqrt(t)
            opt.step(np.array([4.0 if t % 3 == 1 else -1.0]))
            np.clip(p, -1, 1, out=p)
        assert (p[0] < -0.9) if amsgrad else (p[0] > 0.9)


# --- identities of the rules -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "options", "size"),
    [("Adagrad", {"lr": 0.1, "eps": 0.0}, 0.1), ("RMSprop", {"lr": 0.1, "alpha": 0.9, "eps": 0.0}, 0.1 / math.sqrt(0.1)),
     ("Adam", {"lr": 0.1, "eps": 0.0}, 0.1), ("Lion", {"lr": 0.1}, 0.1), ("Rprop", {"lr": 0.1}, 0.1),
     ("Yogi", {"lr": 0.1, "eps": 0.0, "initial_accumulator_value": 0.0}, 0.1)],
)  # fmt: skip
def test_the_first_step_has_the_size_of_the_rule(cls, options, size):
    g = np.array([3.0, -1e-3, 400.0])
    p = np.zeros(3)
    getattr(ac, cls)(p, **options).step(g)
    np.testing.assert_allclose(p, -size * np.sign(g), rtol=1e-12)


def test_rprop_signs_do_not_underflow_and_positions_are_the_papers():
    for variant, want in (("irprop-", [0.1, 0.22, 0.364, 0.364, 0.436]), ("rprop+", [0.1, 0.22, 0.364, 0.22, 0.292])):
        p, path = np.zeros(1, "float32"), []
        opt = ac.Rprop(p, lr=0.1, variant=variant)
        for g in (1e-30, 1e-30, 1e-30, -1e-30, 1e-30):
            opt.step(np.array([g], "float32"))
            path.append(-p[0])
        np.testing.assert_allclose(path, want, rtol=1e-6)


def test_supersab_positions_of_the_paper():
    p, path = np.zeros(1), []
    opt = ac.SuperSAB(p, lr=0.1)
    for g in (1.0, 1.0, 1.0, -1.0, 1.0):
        opt.step(np.array([g]))
        path.append(p[0])
    np.testing.assert_allclose(path, [-0.1, -0.295, -0.58075, -0.295, -0.350125], rtol=1e-12)


def test_momentum_and_sgd_part_when_lr_changes():
    for cls, want in (("Momentum", -0.2), ("SGD", -0.119)):
        p = np.zeros(1)
        opt = getattr(ac, cls)(p, lr=0.1, momentum=0.9)
        opt.step(np.ones(1))
        opt.param_groups[0]["lr"] = 0.01
        opt.step(np.ones(1))
        assert p[0] == pytest.approx(want, rel=1e-12)


def test_centered_rmsprop_never_takes_the_root_of_a_negative_number():
    p = np.zeros(1000, "float32")
    opt = ac.RMSprop(p, centered=True, alpha=0.5, eps=1e-8)
    g = np.random.default_rng(0).uniform(0.99, 1.01, 1000).astype("float32")
    for _ in range(200):
        opt.step(g)
        v, a = opt.state["square_avg"], opt.state["grad_avg"]
    assert (v - a * a < 0).any()  # or this test shows nothing
    assert np.isfinite(p).all()


def test_yogi_by_hand():
    p = np.zeros(1)
    ac.Yogi(p).step(np.array([2.0]))  # m = 0.2000009, v = 0.004001: -0.01 * 2.000009 / (sqrt(4.001) + 0.001)
    assert p[0] == pytest.approx(-0.00999379895372072, rel=1e-12)
    p = np.zeros(1)
    opt = ac.Yogi(p, lr=1.0, betas=(0.5, 0.75), eps=0.0, initial_accumulator_value=0.25)
    moments = []
    for g in (0.5, 1.0, 0.1):  # v - g^2 is 0, then below 0, then above
        opt.step(np.array([g]))
        moments.append((opt.state["exp_avg"][0], opt.state["exp_avg_sq"][0]))
    np.testing.assert_allclose(moments, [(0.375, 0.25), (0.6875, 0.5), (0.39375, 0.4975)], rtol=1e-14)
    # steps of 0.75, 0.6875/0.75 / sqrt(0.5/0.4375) and 0.39375/0.875 / sqrt(0.4975/0.578125)
    assert p[0] == pytest.approx(-0.75 - 0.8574631511356948 - 0.4850950536289526, rel=1e-12)


def test_adabelief_by_hand():
    p = np.zeros(1)
    opt = ac.AdaBelief(p, lr=1.0, betas=(0.5, 0.75), eps=0.125)
    moments = []
    for g in (2.0, 4.0):  # g - m is 1, then 1.5
        opt.step(np.array([g]))
        moments.append((opt.state["exp_avg"][0], opt.state["exp_avg_sq"][0]))
    np.testing.assert_allclose(moments, [(1.0, 0.375), (2.5, 0.96875)], rtol=1e-14)
    # m/(1 - 0.5^t) / (sqrt(v/(1 - 0.75^t)) + eps)
    want = -2 / (math.sqrt(1.5) + 0.125) - (2.5 / 0.75) / (math.sqrt(0.96875 / 0.4375) + 0.125)
    assert p[0] == pytest.approx(want, rel=1e-14)
    assert want == pytest.approx(-1.4817615109276148 - 2.0664816683316043, rel=1e-12)


@pytest.mark.parametrize("beta1", [0.5, 0.9])
def test_adabeliefs_first_step_is_longer_than_adams_by_beta1(beta1):
    p = np.zeros(3)
    ac.AdaBelief(p, lr=0.1, betas=(beta1, 0.999), eps=0.0).step(np.array([3.0, -1e-3, 400.0]))
    np.testing.assert_allclose(p, np.array([-0.1, 0.1, -0.1]) / beta1, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("beta2", [0.0, 0.5, 0.999])
def test_yogis_second_moment_is_never_negative(beta2, dtype):
    rng = np.random.default_rng(0)
    p = np.zeros(10_000, dtype)
    opt = ac.Yogi(p, betas=(0.9, beta2), initial_accumulator_value=0.0)
    for k in range(200):
        g = rng.normal(size=p.size) * 10.0 ** rng.integers(-25, 15, p.size)
        v = opt.state["exp_avg_sq"]
        if k % 2:  # just below and at the root of v, where a rounding could take v past 0
            g = np.sqrt(v) * rng.choice([1, 1 - 1e-7, 1 - 1e-3], p.size)
        opt.step(g.astype(dtype))
        assert (v >= 0).all()
    assert np.isfinite(p).all()


FBGEMM = json.loads((Path(__file__).parent / "data" / "fbgemm.json").read_text())  # says how it was made


def test_fbgemms_adagrad_by_row():
    p = (np.arange(16).reshape(4, 4) / 8 - 1).astype("float32")
    opt = ac.Adagrad(p, lr=0.25, eps=1e-3, second_moment="row")
    for t, (rows, want) in enumerate(zip(FBGEMM["rows"], FBGEMM["trace"], strict=True)):
        i, j = np.indices((len(rows), 4))
        opt.step(ac.Rows(np.array(rows), ((-1.0) ** (i + j) * (1 + i + 2 * j + t) / 4).astype("float32")))
        np.testing.assert_allclose(p, want, rtol=0, atol=3e-7)
    assert opt.state["sum"].tolist() == [[x] for x in FBGEMM["moments"]]


def test_moments_by_row_by_hand():
    """The squares of (3, 4) have the mean 12.5, those of (1, 7) 25; those of 1 and 2 by themselves are 1 and 4."""
    grads = [np.array([[3.0, 4.0], [1.0, -7.0]]), np.array([1.0, 2.0])]
    for cls, options, v, steps in [
        (ac.Adagrad, {"eps": 0.0}, 1.0, 1.0),
        (ac.RMSprop, {"eps": 0.0, "alpha": 0.5}, 0.5, 2**0.5),
        (ac.RMSprop, {"eps": 0.0, "alpha": 0.75, "momentum": 0.5}, 0.25, 2.0),
        (ac.Adam, {"eps": 0.0, "betas": (0.5, 0.75)}, 0.25, 1.0),
        (ac.Adam, {"eps": 0.0, "amsgrad": True, "betas": (0.5, 0.75)}, 0.25, 1.0),
        (ac.AdamW, {"eps": 0.0, "betas": (0.0, 0.5), "weight_decay": 0.0}, 0.5, 1.0),
    ]:
        p = [np.zeros((2, 2)), np.zeros(2)]
        opt = cls(p, lr=1.0, second_moment="row", **options)
        opt.step(grads)
        moments = next(x for name, x in opt.state.items() if name in ("sum", "square_avg", "exp_avg_sq"))
        np.testing.assert_allclose(moments[0], [[12.5 * v], [25.0 * v]], rtol=1e-14)
        np.testing.assert_allclose(moments[1], [v, 4 * v], rtol=1e-14)
        np.testing.assert_allclose(p[0], -steps * grads[0] / [[12.5**0.5], [5.0]], rtol=1e-14)
        np.testing.assert_allclose(p[1], [-steps, -steps], rtol=1e-14)


def test_decay_alone_shrinks_by_a_power():
    p = np.ones(1)
    opt = ac.AdamW(p, lr=0.1, weight_decay=0.5)
    for _ in range(10):
        opt.step(np.zeros(1))
    assert p[0] == pytest.approx(0.95**10, rel=1e-14)


def test_the_reference_runs_on_floats_scalars_and_arrays():
    for x in (1.0, np.float32(1.0), np.float64(1.0), np.ones((2, 3)), np.ones(2, "float32")):
        for rule in (reference.adam, reference.rprop, reference.supersab, reference.adadelta, reference.lion):
            state = {}
            y = x
            for t in (1, 2, 3):
                y = rule(y, x * 0.5, state, t)
            assert np.shape(y) == np.shape(x)
            if not isinstance(x, float):
                assert np.asarray(y).dtype == x.dtype

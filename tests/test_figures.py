"""The figures: which files the command writes, and the numbers that are drawn."""

import csv
import os
import subprocess
import sys

import numpy as np
import pytest
from support import needs

from adaptive_c import figures, optimizers
from adaptive_c.__main__ import main
from adaptive_c.figures import problems

needs("matplotlib", "PIL")

ANIMATED = {
    "ball": ("sgd", "momentum", "oscillating", "rmsprop", "adam", "adagrad"),
    "explorer": ("bowl",),
    "quartic": ("fixed", "small", "adagrad", "rmsprop", "adam", "ripples"),
}
DPI = 40  # small, because the pictures' content does not matter here


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """All figures, drawn twice: here, and by a process whose strings hash otherwise and whose user has settings."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    script = f"""
from pathlib import Path
from adaptive_c import figures
for path in figures.draw(list(figures.FIGURES), Path({str(second)!r}), {DPI}):
    print(path)
"""
    settings = tmp_path_factory.mktemp("settings") / "matplotlibrc"
    settings.write_text("font.size: 20\naxes.grid: True\n")
    other = subprocess.Popen(
        [sys.executable, "-P", "-W", "error", "-c", script], stdout=subprocess.PIPE, text=True, cwd="/",
        env={**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "MATPLOTLIBRC": str(settings)},
    )  # fmt: skip
    told = {path.name for path in figures.draw(list(figures.FIGURES), first, DPI)}
    out, _ = other.communicate()
    assert other.returncode == 0
    assert {line.rpartition("/")[2] for line in out.splitlines()} == told
    return first, second


def table(folders, name):
    """The numbers under a figure: the rows as dicts."""
    with (folders[0] / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows, key, **wanted):
    return np.array([float(row[key]) for row in rows if all(row[k] == str(v) for k, v in wanted.items())])


@pytest.mark.parametrize("name", list(figures.FIGURES))
def test_every_file_is_written_and_has_the_same_bytes_in_two_runs(folders, name):
    names = {f"{name}.png", f"{name}.svg", f"{name}.csv", *(f"{name}-{key}.gif" for key in ANIMATED.get(name, ()))}
    for folder in folders:
        written = {path.name for path in folder.iterdir()}
        assert {file for file in written if file.split(".")[0] == name or file.startswith(f"{name}-")} == names
    for file in names:
        first, second = ((folder / file).read_bytes() for folder in folders)
        assert len(first) > 300
        assert first == second, file


def test_the_command_writes_the_named_figures_and_says_which(tmp_path, capsys):
    assert main(["figures", "weights", "--out", str(tmp_path / "new")]) == 0
    paths = [str(tmp_path / "new" / f"weights.{ending}") for ending in ("png", "svg", "csv")]
    assert capsys.readouterr().out.splitlines() == paths
    assert {str(path) for path in (tmp_path / "new").iterdir()} == set(paths)


def test_an_unknown_figure_is_refused_with_the_names_that_there_are(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["figures", "weights", "bowl", "--out", str(tmp_path / "new")])
    assert f"there is no figure 'bowl'; there are {', '.join(figures.FIGURES)}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("module", ["matplotlib", "PIL"])
def test_a_missing_extra_is_named(tmp_path, module):
    (tmp_path / f"{module}.py").write_text(f"raise ModuleNotFoundError(name={module!r})")
    out = subprocess.run([sys.executable, "-m", "adaptive_c", "figures"], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 1
    assert out.stderr == (
        f"adaptive-c figures needs {module}: pip install 'adaptive_c[figures]' (from a clone: '.[figures]')\n"
    )


# --- the problems ------------------------------------------------------------------------------------------------


ALL = {**problems.PLANE, **problems.LINE}


@pytest.mark.parametrize("name", list(ALL))
def test_gradients_are_exact_and_formulas_say_what_is_computed(name):
    problem = ALL[name]
    rng = np.random.default_rng(0)
    d = len(problem.start)
    w = np.stack([rng.uniform(*span, 50) for span in problem.window])
    for i in range(d):  # the derivative along an imaginary step has no cancellation
        step = w.astype(complex)
        step[i] += 1e-200j
        np.testing.assert_allclose(problem.value(step).imag / 1e-200, problem.gradient(w)[i], rtol=1e-12, atol=1e-11)
    names = {"sin": np.sin, "cos": np.cos, **{f"w{i + 1}": w[i] for i in range(d)}}
    np.testing.assert_allclose(eval(problem.formula, names), problem.value(w), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", list(ALL))
def test_minima_are_minima(name):
    problem = ALL[name]
    for point in problem.minima:
        here = np.array(point)
        assert np.abs(problem.gradient(here)).max() < 1e-6
        around = here[:, None] + 0.05 * np.random.default_rng(0).standard_normal((len(point), 50))
        assert problem.value(around).min() > problem.value(here)


def test_a_trace_has_the_numbers_of_each_step():
    x = problems.trace("RMSprop", problems.BOWL, 10, lr=0.05, alpha=0.9, eps_mode="inside")
    assert x.w.shape == x.gradient.shape == x.state["square_avg"].shape == (11, 2)
    np.testing.assert_allclose(x.gradient[0], [-90, 400])
    np.testing.assert_allclose(x.state["square_avg"][1], [810, 16000])
    np.testing.assert_allclose(x.state["square_avg"][2], [1522.0137006, 30148.0177872], atol=5e-7)
    np.testing.assert_allclose(x.w[[1, 2, 10]], [[-14.841886117, 19.841886117], [-14.7277557881, 19.7276105009],
                                                 [-14.1419905982, 19.1398050031]], atol=5e-10)  # fmt: skip
    assert x.error[0] == 4675
    np.testing.assert_allclose(x.update[0], [-0.158113883, 0.158113883], atol=1e-9)


# --- the numbers that are drawn ----------------------------------------------------------------------------------


def test_gradient_descent_zig_zags_in_the_ravine_and_the_others_do_not(folders):
    rows = table(folders, "ravine")
    ways = {run: round(float(np.abs(np.diff(column(rows, "w2", run=run)[:31])).sum()), 1)
            for run in {row["run"] for row in rows}}  # fmt: skip
    assert ways == {"gradient descent, lr 0.09": 14.4, "momentum 0.7, lr 0.03": 5.3, "RMSprop, lr 0.3": 1.6,
                    "Adam, lr 0.5": 4.4}  # fmt: skip


def test_without_memory_there_are_eight_directions(folders):
    rows = table(folders, "smoothing")
    for beta, few in ((0, True), (0.9, False)):
        steps = np.diff([column(rows, key, run=f"beta {beta:g}")[:26] for key in ("w1", "w2")])
        eighths = np.degrees(np.arctan2(*steps[::-1])) / 45
        assert (np.abs(eighths - eighths.round()) < 1e-3).all() == few


def test_the_weights_of_a_moving_average(folders):
    rows = table(folders, "weights")
    np.testing.assert_allclose(column(rows, "weight", series="g"), [0.081, 0.09, 0.1], rtol=1e-11)
    for beta in (0.5, 0.9, 0.99):
        heights = column(rows, "weight", series="impulse", beta=beta)
        np.testing.assert_allclose(heights, (1 - beta) * beta ** np.arange(61), rtol=1e-10)


def test_bias_correction(folders):
    rows = table(folders, "bias-correction")
    t, plain, corrected, gradient = (
        column(rows, key, panel="average") for key in ("t", "as_it_is", "corrected", "gradient")
    )
    np.testing.assert_allclose(corrected, plain / (1 - 0.9**t), rtol=1e-9)
    assert corrected[0] == pytest.approx(gradient[0], rel=1e-9)
    t, plain, corrected = (column(rows, key, panel="step") for key in ("t", "as_it_is", "corrected"))
    np.testing.assert_allclose(corrected, 1, atol=2e-8)
    np.testing.assert_allclose(plain, (1 - 0.9**t) / np.sqrt(1 - 0.999**t), rtol=1e-8)
    assert (t[plain.argmax()], round(plain.max(), 2)) == (12, 6.57)


def test_the_first_two_updates(folders):
    """The textbook numbers of 3 w1^2 + 10 w2^2 from (-15, 20)."""
    rows = table(folders, "first-updates")
    wanted = {
        "gradient descent": {"w1": [-15, -14.91, -14.82054], "w2": [20, 19.6, 19.208], "gradient1": [-90, -89.46, -88.92324],
                             "gradient2": [400, 392, 384.16], "v1": [-0.09, -0.08946], "v2": [0.4, 0.392]},
        "RMSprop": {"w1": [-15, -14.841886117, -14.7277557881], "w2": [20, 19.841886117, 19.7276105009],
                    "s1": [0, 810, 1522.0137006], "s2": [0, 16000, 30148.0177872], "v1": [-0.158113883, -0.1141303289],
                    "v2": [0.158113883, 0.1142756161]},
    }  # fmt: skip
    for run, columns in wanted.items():
        for key, numbers in columns.items():
            found = column(rows, key, run=run)
            np.testing.assert_allclose(found[: len(numbers)], numbers, rtol=1e-9, err_msg=f"{run} {key}")


@pytest.mark.parametrize(
    ("beta", "first", "second", "c"),
    [(0.9, 0.1, 0.1, 2.1941513), (0.9, 1, 1, 1.29415728), (0.9, 2, 2, 0.294157324), (0.9, 3, -1, 0.048284831),
     (0.9, -4, 4, -1.70584267), (0, 0.1, 0.1, 0.8999995), (0, 2, 2, -1), (0.99, 1, 1, 6.08881027), (1, 1, 1, 9999)],
)  # fmt: skip
def test_the_measure_of_amplification(beta, first, second, c):
    assert problems.amplified(beta, np.array([first], float), np.array([second], float))[0] == pytest.approx(
        c, rel=1e-7
    )


def test_amplification_is_zero_on_an_ellipse(folders):
    from adaptive_c.figures import vectors

    rows = table(folders, "amplification")
    assert sorted({float(row["beta"]) for row in rows}) == sorted(vectors.BETAS)
    for beta in vectors.BETAS:
        g1, g2, c = (column(rows, key, beta=f"{beta:g}") for key in ("g1", "g2", "c"))
        some = g2 != 0
        inside = (1 - beta) * (beta * g1**2 + g2**2) + 1e-8
        clear = some & (abs(inside - 1) > 1e-6)
        assert (np.sign(c[clear]) == np.sign(1 - inside[clear])).all()
        assert not c[~some].any()


QUARTIC = {
    ("fixed", "0.5 from 0.3"): [0.346, 0.455156528, 0.676882336, 0.910393059, 0.722083381, 0.913255226, 0.716391837, 0.913846194],
    ("fixed", "0.8 from 0.1"): [-0.3832, -2.22937617, 25.2934613, -51676.0851, 4.4159e14],
    ("adagrad", "AdaGrad"): [1.37055389e-9, -0.0855978661, -0.160970946, -0.228490881, -0.289717964, -0.345742698, -0.397359399, -0.445165663],
    ("rmsprop", "RMSprop"): [-0.216227723, -0.517925978, -0.774425051, -0.965957392, -1.07273708, -1.10415636, -1.10716224, -1.10715973],
    ("adam", "Adam"): [1.37055389e-9, -0.0983350982, -0.196142711, -0.294132985, -0.392750698, -0.492266243, -0.592808466, -0.694351316],
    ("ripples", "RMSprop"): [0.341886117, 0.38482442, 0.362614535, 0.377268055, 0.366573161, 0.37549939, 0.367206095, 0.37579276],
    ("ripples", "Adam"): [0.45, 0.400961633, 0.356721284, 0.323822975, 0.305548237, 0.300228233, 0.304828779, 0.316624884],
}  # fmt: skip


@pytest.mark.parametrize(("panel", "run"), list(QUARTIC))
def test_the_animated_steps(folders, panel, run):
    wanted = QUARTIC[panel, run]
    x = column(table(folders, "quartic"), "x", panel=panel, run=run)
    np.testing.assert_allclose(x[1 : len(wanted) + 1], wanted, rtol=2e-5 if run.startswith("0.8") else 1e-8, atol=1e-16)


def test_a_rate_of_a_tenth_reaches_one_minimum_of_the_quartic_and_not_the_other(folders):
    rows = table(folders, "quartic")
    x = {run: column(rows, "x", panel="small", run=run)[8] for run in ("from 0.3", "from 0.1")}
    assert x == pytest.approx({"from 0.3": 0.489088546, "from 0.1": -1.10224876}, rel=1e-8)


def test_what_happens_after_the_animated_steps(folders):
    rows = table(folders, "quartic")
    x = column(rows, "x", panel="fixed", run="0.5 from 0.3")
    np.testing.assert_allclose(x[-4:], [0.7150, 0.9139] * 2, atol=5e-5)  # two places in turn, and no minimum
    x = column(rows, "x", panel="adam", run="Adam")
    away = np.abs(x - problems.QUARTIC.minima[0][0])
    assert (x.argmin(), round(x.min(), 4)) == (17, -1.3315)
    assert away[76] > 1e-2 > away[77:].max()
    x = problems.trace("RMSprop", problems.QUARTIC, 600, lr=0.1, alpha=0.9, eps_mode="inside").w[400:, 0]
    np.testing.assert_allclose(np.sort(x), [-1.1540552] * 100 + [-1.0540552] * 101, atol=1e-7)
    x = problems.trace("Adam", problems.RIPPLES, 200, lr=0.05, eps_mode="inside").w[-1, 0]
    assert x == pytest.approx(problems.RIPPLES.minima[1][0], abs=2e-4)


def test_where_the_balls_end(folders):
    rows = table(folders, "ball")
    ends = {row["panel"]: round(float(row["x"]), 3) for row in rows}
    assert ends == {
        "sgd": 0.854,
        "momentum": -1.101,
        "oscillating": -1.233,
        "rmsprop": 0.838,
        "adam": -1.126,
        "adagrad": -1.102,
    }
    assert set(ends) == set(ANIMATED["ball"])
    swings = column(rows, "x", panel="oscillating")[-2:]
    np.testing.assert_allclose(swings, [-0.9195, -1.2332], atol=1e-4)


def test_animations_have_a_frame_for_each_step(folders):
    from PIL import Image

    for key in ANIMATED["quartic"]:
        with Image.open(folders[0] / f"quartic-{key}.gif") as movie:
            assert movie.n_frames == 9
    with Image.open(folders[0] / "explorer-bowl.gif") as movie:
        assert movie.n_frames == 41


def test_the_explorers_stills_show_weights_error_and_state(folders):
    rows = [row for row in table(folders, "explorer") if row["run"] == "3*w1**2 + 10*w2**2: RMSprop, lr 0.5"]
    x = problems.trace("RMSprop", problems.BOWL, 80, lr=0.5, alpha=0.9, eps_mode="inside")
    for key, numbers in {
        "w1": x.w[:, 0],
        "w2": x.w[:, 1],
        "error": x.error,
        "state1": x.state["square_avg"][:, 0],
    }.items():
        np.testing.assert_allclose(column(rows, key), numbers, rtol=1e-11)


def test_every_rule_goes_down_the_valley(folders):
    rows = [row for row in table(folders, "rules") if row["step"] == "300"]
    ends = {row["rule"]: (float(row["lr"]), float(f"{float(row['error']):.2g}")) for row in rows}
    assert list(ends) == optimizers.__all__
    assert ends.items() >= {
        "SGD": (0.001, 3.1), "Momentum": (0.001, 0.012), "Adagrad": (0.2, 2.7), "RMSprop": (0.02, 0.85),
        "Adadelta": (5.0, 1.1), "Adam": (0.2, 0.028), "AdamW": (0.2, 0.054), "Adamax": (0.2, 2.0), "NAdam": (0.05, 0.61),
        "RAdam": (0.001, 4.1), "Yogi": (0.2, 0.037), "AdaBelief": (0.2, 0.024), "Lion": (0.01, 0.035),
        "Rprop": (0.002, 0.083), "SuperSAB": (0.0005, 0.031),
    }.items()  # fmt: skip


def test_how_many_learning_rates_work(folders):
    """Of 43 rates, six to a decade: with features of one scale, and with scales from 1 to 100."""
    rows = table(folders, "sensitivity")
    works = {
        rule: tuple(int((column(rows, "loss", rule=rule, features=f) < 2 * column(rows, "least_loss", rule=rule, features=f)).sum())
                    for f in ("alike", "1 to 100"))
        for rule in optimizers.__all__
    }  # fmt: skip
    assert works.items() >= {
        "SGD": (12, 0), "Momentum": (20, 0), "Adagrad": (19, 23), "RMSprop": (6, 5), "Adadelta": (2, 0), "Adam": (24, 29),
        "AdamW": (21, 24), "Adamax": (24, 28), "NAdam": (5, 3), "RAdam": (14, 0), "Yogi": (24, 29), "AdaBelief": (28, 32),
        "Lion": (4, 0), "Rprop": (43, 43), "SuperSAB": (43, 32),
    }.items()  # fmt: skip


def test_narrow_state_takes_nearly_the_path_of_float32(folders):
    rows = table(folders, "narrow")
    for state, apart, above, at_the_end in (("bfloat16", 0.01, 0.003, 1e-4), ("8 bits", 0.08, 0.05, 1e-3)):
        path, same = (
            np.array([column(rows, key, panel="path", state=s) for key in ("w1", "w2")]) for s in (state, "float32")
        )
        loss, equal = (column(rows, "error", panel="model", state=s) for s in (state, "float32"))
        assert 0 < np.abs(path - same).max() < apart
        assert 0 < np.abs(loss / equal - 1).max() < above
        assert abs(loss[-1] / equal[-1] - 1) < at_the_end

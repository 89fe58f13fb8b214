"""The figures: which files the command writes, and the numbers that are drawn."""

import csv
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("PIL")

from adaptive_c import figures
from adaptive_c.__main__ import main
from adaptive_c.figures import problems

ANIMATED = {}
DPI = 40  # small, because the pictures' content does not matter here


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """All figures, drawn twice: by a process of its own, whose strings hash otherwise, and here."""
    first, second = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")
    script = f"""
from pathlib import Path
from adaptive_c import figures
for path in figures.draw(list(figures.FIGURES), Path({str(second)!r}), {DPI}):
    print(path)
"""
    other = subprocess.Popen(
        [sys.executable, "-P", "-W", "error", "-c", script], stdout=subprocess.PIPE, text=True, cwd="/",
        env={**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"},
    )  # fmt: skip
    told = {path.name for path in figures.draw(list(figures.FIGURES), first, DPI)}
    out, _ = other.communicate(timeout=300)
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

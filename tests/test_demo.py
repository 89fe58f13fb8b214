"""The command line and the demo, as a user runs them."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import needs

import adaptive_c as ac

needs("sklearn", "matplotlib", "rich")
SCRIPT = Path(sys.executable).with_name("adaptive-c")


@pytest.fixture(scope="module")
def demo():
    from adaptive_c import demo  # imports scikit-learn: only where it is used

    return demo


def test_quick_demo_leaves_a_picture(demo, tmp_path):
    command = [SCRIPT] if SCRIPT.exists() else [shutil.which("adaptive-c")]
    out = subprocess.run(
        [*command, "demo", "--quick", "--out", tmp_path / "new"], capture_output=True, text=True, cwd=tmp_path
    )
    assert out.returncode == 0, out.stderr
    assert not out.stderr
    for name in demo.OPTIMIZERS:
        assert out.stdout.count(f" {name} ") >= 2  # a row in each table
    for word in ("ns per element", "GB/s", "ceiling", "in NumPy"):
        assert word in out.stdout
    assert (tmp_path / "new" / "adaptive-c-demo.png").read_bytes().startswith(b"\x89PNG")


def test_module_is_the_same_program(tmp_path):
    out = subprocess.run([sys.executable, "-m", "adaptive_c", "config"], capture_output=True, text=True, cwd=tmp_path)
    assert "instruction set" in out.stdout


def test_the_version_is_told(tmp_path):
    out = subprocess.run(
        [sys.executable, "-m", "adaptive_c", "--version"], capture_output=True, text=True, cwd=tmp_path
    )
    assert out.stdout == f"adaptive_c {ac.__version__}\n"


def test_a_missing_extra_is_named(tmp_path):
    (tmp_path / "rich.py").write_text("raise ModuleNotFoundError(name='rich')")
    out = subprocess.run([sys.executable, "-m", "adaptive_c", "demo"], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 1
    assert out.stderr == "adaptive-c demo needs rich: pip install 'adaptive_c[demo]' (from a clone: '.[demo]')\n"


@pytest.mark.parametrize("hidden", [None, 7])
def test_the_demos_gradient_is_the_slope_of_its_loss(demo, hidden):
    rng = np.random.default_rng(0)
    p = {name: rng.normal(size=array.shape) for name, array in demo.initial(hidden).items()}
    g = {name: np.zeros_like(array) for name, array in p.items()}
    x, y = rng.random((20, 64)), rng.integers(0, 10, 20)
    demo.gradient(p, g, x, y)
    for name, array in p.items():
        i = tuple(rng.integers(0, n) for n in array.shape)
        before = array[i]
        losses = []
        for h in (1e-5, -1e-5):
            array[i] = before + h
            losses.append(demo.gradient(p, {k: np.zeros_like(v) for k, v in p.items()}, x, y))
        array[i] = before
        assert g[name][i] == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-5, abs=1e-8)


def test_every_rule_is_shown(demo):
    shown = {cls.__name__ for cls, _ in demo.OPTIMIZERS.values()}
    assert shown == set(ac.optimizers.__all__)
    assert demo.BETTER.keys() <= demo.OPTIMIZERS.keys()


def test_every_optimizer_learns_the_digits(demo):
    for name in demo.OPTIMIZERS:
        losses, accuracy, _ = demo.train(name, 32, demo.digits(), 20, lambda: None)
        assert losses[-1] < 0.5 * losses[0], name
        assert accuracy > 0.85, name

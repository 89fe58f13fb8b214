"""Optimizers shared out among the ranks of an MPI communicator: mpi_ranks.py on 1 to 4 ranks."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed: pip install 'adaptive_c[mpi]'"
)
RANKS = Path(__file__).with_name("mpi_ranks.py")
NAMES = re.findall(r"^def (test_\w+)", RANKS.read_text(), re.M)
# One thread for each of more ranks than processors, whatever the MPI library.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


def launch(n, *command, cwd="/"):
    """Run Python on n ranks."""
    beside = Path(sys.executable).with_name("mpiexec")  # of the wheel
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert mpiexec, "there is mpi4py, but no mpiexec on the path: pip install mpich"
    return subprocess.run([mpiexec, "-n", str(n), sys.executable, *command], capture_output=True, text=True,
                          timeout=120, cwd=cwd, env={**os.environ, **ENVIRONMENT})  # fmt: skip


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def outcome(request, tmp_path_factory):
    """All of it on so many ranks, in one go."""
    return launch(request.param, str(RANKS), str(tmp_path_factory.mktemp("ranks")))


@needs_mpi
@pytest.mark.parametrize("name", NAMES)
def test_ranks(name, outcome):
    result = outcome
    assert f"{name} ok\n" in result.stdout, result.stdout + result.stderr


@needs_mpi
def test_a_rank_that_dies(tmp_path):
    """It ends the others, of which none believes that the step was made; the checkpoint before it is whole."""
    result = launch(3, str(RANKS), str(tmp_path), "dying")
    assert result.returncode != 0
    assert "believes" not in result.stdout
    assert (tmp_path / "before.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


@needs_mpi
def test_threads(tmp_path):
    script = (
        f"import os, runpy, sys; del os.environ['OMP_NUM_THREADS']; sys.argv[1:] = [{str(tmp_path)!r}, 'threads']; "
    )
    script += f"sys.path[:0] = [{str(RANKS.parent)!r}]; runpy.run_path({str(RANKS)!r}, run_name='__main__')"
    result = launch(2, "-c", script)
    assert result.stdout == "threads ok\n", result.stdout + result.stderr


@needs_mpi
def test_the_example_of_the_page(tmp_path):
    page = RANKS.parents[1] / "docs" / "mpi.md"
    if not page.is_file():
        pytest.skip("not in a clone")
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    (tmp_path / "train.py").write_text(block)
    result = launch(2, "-m", "mpi4py", "train.py", cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "run.safetensors").is_file()


def test_without_mpi4py():
    code = "import sys; sys.modules['mpi4py'] = None; import adaptive_c.mpi"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert "ImportError: adaptive_c.mpi needs mpi4py and an MPI library: pip install 'adaptive_c[mpi]'" in result.stderr

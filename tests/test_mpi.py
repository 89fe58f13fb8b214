"""Optimizers shared out among the ranks of an MPI communicator, in programs that run on them: mpi_*.py."""

import contextlib
import functools
import importlib.util
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed: pip install 'adaptive_c[mpi]'"
)
RANKS, DISK, ROLLBACK, KILLS = (
    Path(__file__).with_name(f"mpi_{name}.py") for name in ("ranks", "disk", "rollback", "kills")
)
# One thread for each of more ranks than processors, whatever the MPI library.  Those of MPICH that wait sleep a little,
# where they would keep the others from the processors otherwise: half the time of these tests.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MPIR_CVAR_ENABLE_HEAVY_YIELD": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


def started(n, *command, cwd="/", **variables):
    """Python on n ranks."""
    beside = Path(sys.executable).with_name("mpiexec")  # of the wheel
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    assert mpiexec, "there is mpi4py, but no mpiexec on the path: pip install mpich"
    return subprocess.Popen(
        [mpiexec, "-n", str(n), sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=cwd, env={**os.environ, **ENVIRONMENT, **variables},
    )  # fmt: skip


def launch(n, *command, **more):
    """Run Python on n ranks to its end."""
    with started(n, *command, **more) as process:
        try:
            out, err = process.communicate(timeout=120)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def names_in(script):
    return re.findall(r"^def (test_\w+)", script.read_text(), re.M)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Of a script on so many ranks: all of it in one go."""
    return functools.cache(lambda script, n: launch(n, str(script), str(tmp_path_factory.mktemp("ranks"))))


RUNS = [
    (script, n, name)
    for script, most in ((RANKS, 4), (DISK, 3), (ROLLBACK, 4))
    for n in range(1, most + 1)
    for name in names_in(script)
]


@needs_mpi
@pytest.mark.parametrize(("script", "n", "name"), RUNS, ids=[f"{x.stem}-{n}-{name}" for x, n, name in RUNS])
def test_ranks(script, n, name, outcome):
    result = outcome(script, n)
    assert f"{name} ok\n" in result.stdout, result.stdout + result.stderr


@needs_mpi
def test_a_rank_that_dies(tmp_path):
    """It ends the others, of which none believes that the step was made; the checkpoint before it is whole."""
    result = launch(3, str(RANKS), str(tmp_path), "dying")
    assert result.returncode != 0
    assert "believes" not in result.stdout
    assert (tmp_path / "before.safetensors").read_bytes() == (tmp_path / "expected.safetensors").read_bytes()


@needs_mpi
@pytest.mark.parametrize(
    ("killed", "resumed"), [("killed_between_records", "resumed"), ("rolled_back", "resumed_after_rollback")]
)
def test_a_rank_that_dies_between_two_records(killed, resumed, tmp_path):
    """The others have one that it does not have; all go on from the one before."""
    result = launch(3, str(KILLS), str(tmp_path), killed)
    assert result.returncode != 0
    assert "believes" not in result.stdout
    result = launch(3, str(KILLS), str(tmp_path), resumed)
    assert result.stdout == f"{resumed} ok\n", result.stdout + result.stderr


@needs_mpi
def test_killed_and_resumed_to_the_bit(tmp_path):
    """All ranks at random moments: each time they go on from the last step that was reported, or the one after it."""
    kills, rng, found, reached = 10, random.Random(1), [], 0
    for _ in range(kills):
        with started(2, str(KILLS), str(tmp_path), "going_on", STEPS="2000") as process:
            pids = list(map(int, process.stdout.readline().split()))
            lines = [process.stdout.readline() for _ in range(rng.randint(2, 8))]
            time.sleep(rng.uniform(0, 0.02))
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):  # the launcher kills the others of one that was killed
                    os.kill(pid, signal.SIGKILL)
            lines += process.stdout.read().splitlines()
            said = [tuple(map(int, line.split())) for line in lines if re.fullmatch(r"\d+ \d+\s*", line)]
        assert said, (lines, process.stderr.read())
        assert reached <= said[0][0] <= reached + 1
        found += said
        reached = said[-1][0]
    assert reached >= kills
    result = launch(1, str(KILLS), str(tmp_path), "expected", STEPS=str(reached), RANKS="2")
    want = list(map(int, result.stdout.split()[:-2]))
    assert len(want) == reached + 1
    for t, crc in found:
        assert crc == want[t], f"the parameters of step {t} are others"


@needs_mpi
def test_threads(tmp_path):
    script = (
        f"import os, runpy, sys; del os.environ['OMP_NUM_THREADS']; sys.argv[1:] = [{str(tmp_path)!r}, 'threads']; "
    )
    script += f"sys.path[:0] = [{str(RANKS.parent)!r}]; runpy.run_path({str(RANKS)!r}, run_name='__main__')"
    result = launch(2, "-c", script)
    assert result.stdout == "threads ok\n", result.stdout + result.stderr


@needs_mpi
def test_mpi_that_is_for_one_thread(tmp_path):
    script = "import mpi4py; mpi4py.rc.thread_level = 'funneled'; import numpy as np, adaptive_c as ac; "
    script += f"from adaptive_c.mpi import Sharded; Sharded(ac.AdamW, np.ones(3), state_path={str(tmp_path / 'x')!r})"
    result = launch(1, "-c", script)
    assert "ValueError: state_path needs MPI.THREAD_SERIALIZED, since a step on disk is" in result.stderr, result.stderr
    assert not (tmp_path / "x").exists()


@needs_mpi
def test_the_examples_of_the_page(tmp_path):
    page = RANKS.parents[1] / "docs" / "mpi.md"
    if not page.is_file():
        pytest.skip("not in a clone")
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        (tmp_path / "train.py").write_text(block)
        result = launch(2, "-m", "mpi4py", "train.py", cwd=tmp_path)
        assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "run.safetensors").is_file()
    assert (tmp_path / "state" / "1-of-2" / "record").is_file()


def test_without_mpi4py():
    code = "import sys; sys.modules['mpi4py'] = None; import adaptive_c.mpi"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert "ImportError: adaptive_c.mpi needs mpi4py and an MPI library: pip install 'adaptive_c[mpi]'" in result.stderr

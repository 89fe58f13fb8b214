"""How many threads a step takes and where they run, beside other OpenMP runtimes, under quotas and in forked children."""

import os

import pytest
from test_safety import BIG, child

from adaptive_c import _native

pytestmark = pytest.mark.skipif(not _native.core.openmp(), reason="built without OpenMP: every step is serial")
TORCH = pytest.mark.later("torch")
linux = pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="needs Linux's affinity")
QUOTA = "from adaptive_c import _native; _native.cgroup_quota = lambda: 1.5; ac.set_num_threads(None)"


def told(script="", **env):
    """What show_config says of a large step after a script, in a process of its own."""
    return child(f"import os\nimport adaptive_c as ac\n{script}\nac.show_config()", **env).splitlines()[-1]


def allowed():
    """The processors that a step may use, where no variable says otherwise."""
    return min(len(os.sched_getaffinity(0)), max(1, int(min(_native.cgroup_quota(), 1 << 30))))


def counted(n, noun):
    return f"{n} {noun}" + "s" * (n != 1)


# --- processors ------------------------------------------------------------------------------------------------------

# Prints the number of threads, how many processors they may run on, all together, and why that many.
BESIDE = """
import os
{before}
import adaptive_c as ac, numpy as np
p = np.ones({n}, "float32")
old = set(os.listdir("/proc/self/task"))
opt = ac.SGD(p)
{after}
opt.step(p * 1)
team = set(os.listdir("/proc/self/task")) - old | {{str(os.getpid())}}
masks = [os.sched_getaffinity(int(task)) for task in team]
print(ac.get_num_threads(), len(set.union(*masks)))
ac.show_config()
"""
LIBRARIES = {
    "": "",
    "torch": "import torch",
    "numba": "from numba.np.ufunc import omppool",
    "sklearn": "import sklearn.cluster",  # with a libgomp of its own
    "sklearn, torch": "import sklearn.cluster, torch",  # ours is torch's then, which finds this thread bound
    # that libgomp without the rest of the library, whose import takes more than a second
    "sklearn's OpenMP": "import ctypes, importlib.util; from pathlib import Path\n"
    "path = Path(importlib.util.find_spec('sklearn').origin).parent / 'utils'\n"
    "ctypes.CDLL(str(next(path.glob('_openmp_helpers.*.so'))))",
}


def beside(library, order, **env):
    for name in filter(None, library.removesuffix("'s OpenMP").split(", ")):
        pytest.importorskip(name)
    script = BESIDE.format(n=BIG, **{"before": "", "after": "", order: LIBRARIES[library]})
    out = child(script, **env).splitlines()
    return *map(int, out[0].split()), out[-1].partition(": ")[2]


@linux
@pytest.mark.parametrize(
    ("variable", "value", "library", "order"),
    [
        ("OMP_NUM_THREADS", "", "", "before"),
        ("OMP_PROC_BIND", "false", "sklearn's OpenMP", "before"),
        *[
            pytest.param("OMP_PROC_BIND", "true", library, order, marks=marks)
            for library, marks in (("torch", TORCH), ("numba", ()), ("sklearn", ()))
            for order in ("before", "after")
        ],
        *[
            (variable, value, library, "before")
            for variable, value in (("OMP_PROC_BIND", "spread"), ("OMP_PLACES", "cores"), ("GOMP_CPU_AFFINITY", "all"))
            for library in ("", "sklearn's OpenMP")
        ],
    ],
)
def test_bound_threads_are_as_many_as_processors_and_spread_over_them(variable, value, library, order):
    if value == "all":
        value = " ".join(map(str, sorted(os.sched_getaffinity(0))))
    threads, where, why = beside(library, order, **{variable: value})
    assert threads == allowed()
    assert where >= threads
    if value in ("", "false"):
        assert "affinity" in why or "quota" in why
    else:
        assert f"{variable}={value} binds them to" in why or "quota" in why


@linux
@pytest.mark.parametrize(
    ("variable", "value", "library"),
    [
        ("OMP_PROC_BIND", "primary", ""),
        ("OMP_PLACES", "first", ""),
        ("GOMP_CPU_AFFINITY", "first", "sklearn's OpenMP"),
        pytest.param("OMP_PROC_BIND", "true", "sklearn, torch", marks=TORCH),
    ],
)
def test_where_all_threads_would_share_one_processor_there_is_one(variable, value, library):
    first = min(os.sched_getaffinity(0))
    value = {"first": f"{{{first}}}" if variable == "OMP_PLACES" else str(first)}.get(value, value)
    threads, where, why = beside(library, "before", **{variable: value})
    assert (threads, where) == (1, 1)
    assert "1 processor" in why


@linux
def test_affinity_is_looked_at_again():
    first = min(os.sched_getaffinity(0))
    pinned = f"everywhere = os.sched_getaffinity(0); ac.AdamW; os.sched_setaffinity(0, [{first}])"
    assert "1 thread: 1 processor in this process's affinity" in told(f"{pinned}; ac.set_num_threads(None)")
    unpinned = f"{pinned}; ac.set_num_threads(None); os.sched_setaffinity(0, everywhere); ac.set_num_threads(None)"
    assert f" {counted(allowed(), 'thread')}: " in told(unpinned)
    assert "1 thread: " in told(f"os.sched_setaffinity(0, [{first}])")


# --- OMP_NUM_THREADS, explicit numbers, quotas -----------------------------------------------------------------------


@pytest.mark.parametrize("value", ["3", " 3 ", "3,2", "+3 , 2", "003"])
def test_omp_num_threads_is_obeyed(value):
    assert f" 3 threads: OMP_NUM_THREADS={value}" in told(QUOTA, OMP_NUM_THREADS=value)


@linux
@pytest.mark.parametrize("value", ["", "0", "abc", "-1", "3,0", "3,", "3 2", "0x3", "1_0", "9" * 30])
def test_a_quota_holds_where_omp_num_threads_is_ignored(value):
    line = told(f"os.sched_getaffinity = lambda pid: {{0, 1, 2}}; {QUOTA}", OMP_NUM_THREADS=value)
    assert " 1 thread: cgroup quota of 1.5 processors" in line


@linux
def test_a_quota_that_takes_nothing_away_is_no_reason():
    line = told(f"os.sched_getaffinity = lambda pid: {{0}}; {QUOTA.replace('1.5', '1.0')}", OMP_NUM_THREADS="")
    assert " 1 thread: 1 processor in this process's affinity" in line


def test_a_number_that_is_set_is_told_and_taken_back():
    assert " 5 threads: set_num_threads" in told("ac.set_num_threads(5)", OMP_NUM_THREADS="3")
    assert " 1 thread: set_num_threads" in told("ac.set_num_threads(1)", OMP_NUM_THREADS="3")
    assert " 3 threads: OMP_NUM_THREADS" in told("ac.set_num_threads(5); ac.set_num_threads(None)", OMP_NUM_THREADS="3")


def test_openmps_own_limit_is_told():
    pytest.importorskip("threadpoolctl")
    script = "import threadpoolctl; ac.AdamW; limit = threadpoolctl.threadpool_limits(2, user_api='openmp')"
    assert " 2 threads: OpenMP's own limit (OMP_NUM_THREADS=3)" in told(script, OMP_NUM_THREADS="3")


@pytest.mark.parametrize("variable", ["OMP_THREAD_LIMIT=1", "OMP_MAX_ACTIVE_LEVELS=0"])
def test_limits_that_hold_for_every_team_are_told(variable):
    limit = dict([variable.split("=")])
    assert " 1 thread: " in told(OMP_NUM_THREADS="3", **limit)
    assert " 1 thread: OpenMP's own limit (set_num_threads(3))" in told("ac.set_num_threads(3)", **limit)
    assert " 3 threads: set_num_threads" in told("ac.set_num_threads(3)", OMP_THREAD_LIMIT="3")


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc")
def test_an_explicit_number_is_used_as_given():
    """Seven threads on any machine, under OMP_NUM_THREADS=1 too."""
    script = (
        f"import os, numpy as np, adaptive_c as ac; p = np.ones({BIG}, 'f4'); o = ac.SGD(p, n_threads=7); o.step(p * 1)\n"
        "print(len(os.listdir('/proc/self/task')))"
    )
    before = int(child(script.replace("n_threads=7", "n_threads=1"), OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"))
    assert int(child(script, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")) - before == 6


def quota(tmp_path, files, membership):
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "cgroup").write_text(membership)
    return _native.cgroup_quota(tmp_path / "fs", tmp_path / "cgroup")


def test_less_than_a_processor_is_a_thread():
    script = QUOTA.replace("1.5", "0.5")
    assert child(f"import adaptive_c as ac; {script}; print(ac.get_num_threads())", OMP_NUM_THREADS="") == "1\n"


@pytest.mark.parametrize(
    ("files", "membership", "want"),
    [
        ({"cpu.max": "max 100000\n"}, "0::/\n", float("inf")),
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 1.5),
        ({"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "400000 100000\n"}, "0::/a/b\n", 1.0),
        (
            {"cpu/x/cpu.cfs_quota_us": "200000", "cpu/x/cpu.cfs_period_us": "100000"},
            "4:cpu,cpuacct:/x\n1:name=s:/\n",
            2.0,
        ),
        ({"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, "4:cpu:/x\n", float("inf")),
        ({"cpu.max": "nonsense"}, "0::/\n", float("inf")),
        ({}, "0::/nowhere\n", float("inf")),
    ],
)
def test_cgroup_quotas(tmp_path, files, membership, want):
    assert quota(tmp_path, files, membership) == want


def test_no_cgroup_file_at_all(tmp_path):
    assert _native.cgroup_quota(tmp_path, tmp_path / "none") == float("inf")


# --- forks, and other thread pools -----------------------------------------------------------------------------------

FORK = """
import os, sys, numpy as np
import adaptive_c as ac
def run():
    p = np.ones({n}, "float32"); opt = ac.AdamW(p, {arguments})
    for _ in range(3): opt.step(p * 0.5)
    return p
want = run()                      # the parent has used its threads
pid = os.fork()
if pid == 0:
    {child}
    os._exit(0 if (run() == want).all() and ac.get_num_threads() == {expect} else 1)
assert os.waitpid(pid, 0)[1] == 0
print("ok")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("arguments", ["", "n_threads=2"])
def test_a_forked_child_steps_serially(arguments):
    assert "ok" in child(FORK.format(n=BIG, arguments=arguments, child="pass", expect=1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_between_import_and_first_use_is_serial():
    script = (
        "import os, adaptive_c as ac\npid = os.fork()\n"
        "if pid == 0: os._exit(ac.get_num_threads())\nprint(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert child(script) == "1\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_set_num_threads_in_a_forked_child_is_obeyed():
    script = FORK.format(n=100, arguments="", child="ac.set_num_threads(2)", expect=2)
    assert "ok" in child(script)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("before", ["", "ac.set_num_threads(2)"])
@pytest.mark.parametrize("after", ["ac.set_num_threads(None)", "ac.set_num_threads(2); ac.set_num_threads(None)"])
def test_the_default_of_a_forked_child_is_serial(before, after):
    script = FORK.format(n=BIG, arguments="", child=after, expect=1)
    assert "ok" in child(script.replace("def run", f"{before}\ndef run"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_childs_number_is_not_its_own_childs():
    script = (
        "import os, adaptive_c as ac\nac.set_num_threads(4)\nif os.fork() == 0:\n    ac.set_num_threads(3)\n"
        "    if os.fork() == 0: os._exit(ac.get_num_threads())\n"
        "    os._exit(10 * ac.get_num_threads() + os.waitstatus_to_exitcode(os.wait()[1]))\n"
        "print(os.waitstatus_to_exitcode(os.wait()[1]))"
    )
    assert child(script) == "31\n"


def test_a_multiprocessing_pool_steps():
    script = (
        "import multiprocessing as mp, numpy as np, adaptive_c as ac\n"
        "def work(seed):\n"
        f"    p = np.full({BIG}, seed, 'float32'); opt = ac.Adam(p); opt.step(p * 0.5); return float(p.sum())\n"
        "work(1)\n"
        "if __name__ == '__main__':\n"
        "    with mp.get_context('fork').Pool(2) as pool: print(pool.map(work, range(1, 5)))\n"
    )
    assert child(script).count(",") == 3


@pytest.mark.parametrize("first", ["sklearn.neighbors", pytest.param("torch", marks=TORCH)])
@pytest.mark.parametrize("order", ["before", "after"])
def test_works_beside_other_thread_pools(first, order):
    pytest.importorskip(first)
    other = {
        "torch": "import torch; a = torch.ones(500, 500); (a @ a).sum()",
        "sklearn.neighbors": "from sklearn.cluster import KMeans; import numpy as np; KMeans(3, n_init=1).fit(np.random.rand(999, 5))",
    }[first]
    mine = f"import adaptive_c as ac, numpy as np; p = np.ones({BIG}, 'f4'); o = ac.AdamW(p)\nfor _ in range(5): o.step(p * 1)"
    lines = [other, mine, other, mine] if order == "before" else [mine, other, mine]
    child("\n".join([*lines, "print('ok')"]))

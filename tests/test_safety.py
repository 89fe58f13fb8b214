"""It doesn't hang, doesn't crash, doesn't allocate, and never leaves half a step."""

import contextlib
import os
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
from cases import IDS, PAIRS
from support import CHUNK, assert_same_bits, build, child, race, step_range

import adaptive_c as ac
from adaptive_c import _config

BIG = 300_000  # elements: parallel, without the GIL


FORK = """
import os, sys, numpy as np
{before}
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
    assert "ok" in child(FORK.format(before="", n=BIG, arguments=arguments, child="pass", expect=1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_child_forked_between_import_and_first_use_is_serial():
    script = (
        "import os, adaptive_c as ac\npid = os.fork()\n"
        "if pid == 0: os._exit(ac.get_num_threads())\nprint(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    )
    assert child(script) == "1\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_set_num_threads_in_a_forked_child_is_obeyed():
    script = FORK.format(before="", n=100, arguments="", child="ac.set_num_threads(2)", expect=2)
    assert "ok" in child(script)


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


@pytest.mark.parametrize("first", ["sklearn.neighbors", "torch"])
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


def test_two_threads_stepping_one_optimizer_get_an_error_never_a_corrupted_state():
    p = np.zeros(4_000_000, "float32")
    opt = ac.SGD(p, lr=1.0)
    g = np.ones_like(p)
    refused = race(lambda: opt.step(g), threads=2, times=30)
    assert opt.t == 60 - len(refused)
    assert (p == -opt.t).all()
    assert all("another thread is inside step()" in message for message in refused)


def test_a_slow_schedule_lets_no_second_thread_into_a_step():
    p = np.zeros(4_000_000, "float32")
    opt = ac.SGD(p, lr=lambda step: (time.sleep(0.002), 1.0)[1])
    g = np.ones_like(p)
    refused = race(lambda: opt.step(g), threads=3, times=20)
    assert opt.t == 60 - len(refused)
    assert (p == -opt.t).all()
    told = "another thread is inside step()", "somebody else (another thread"
    assert all(message.startswith(told) for message in refused)


def test_options_assigned_by_another_thread_wait_for_no_step_and_break_none():
    params = [np.ones(100_000, "float32") for _ in range(20)]
    grads = [np.ones_like(p) for p in params]
    opt = ac.SGD(params, lr=0.0)
    stop = threading.Event()

    def toggle():
        while not stop.is_set():
            for value in (0.1, 0.0):
                with contextlib.suppress(RuntimeError):  # a step is under way
                    opt.param_groups[0]["weight_decay"] = value

    thread = threading.Thread(target=toggle)
    thread.start()
    for _ in range(300):
        opt.step(grads)
    stop.set()
    thread.join()
    assert all((p == 1).all() for p in params)


def test_many_threads_with_optimizers_of_their_own():
    results = {}

    def work(i):
        p = np.full(BIG, i, "float32")
        opt = ac.AdamW(p)
        for _ in range(5):
            opt.step(p * 0.1)
        results[i] = p

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, p in results.items():
        q = np.full(BIG, i, "float32")
        opt = ac.AdamW(q)
        for _ in range(5):
            opt.step(q * 0.1)
        assert_same_bits(p, q)


@pytest.mark.parametrize("work", ["step", "construct"])
def test_the_gil_is_released_while_much_is_done(work):
    p = np.ones(30_000_000, "float32")
    opt = ac.AdamW(p, n_threads=1)
    g = p.copy()
    opt.step(g)
    go, came = threading.Event(), threading.Event()
    thread = threading.Thread(target=lambda: (go.wait(), came.set()))
    thread.start()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(
        1000
    )  # Python itself takes the GIL from nobody: the other thread has it only if it is released
    try:
        go.set()
        for _ in range(100):  # on a busy machine it may have to wait for a processor
            opt.step(g) if work == "step" else ac.AdamW(p, n_threads=1)
            if came.is_set():
                break
        released = came.is_set()
    finally:
        sys.setswitchinterval(interval)
    thread.join()
    assert released


def test_ctrl_c_leaves_no_half_counted_step():
    """A real signal, as often as it takes until it has come twenty times while the steps were made."""
    child("""
import signal, threading, time, os, numpy as np, adaptive_c as ac
p = np.zeros(1_000_000, 'float32'); opt = ac.SGD(p, lr=1.0); g = np.ones_like(p)
opt.step(g)
armed, hits = False, 0
def interrupt(number, frame):  # as Python's own handler, but not while the test looks at the result
    global armed
    if armed:
        armed = False
        raise KeyboardInterrupt
signal.signal(signal.SIGINT, interrupt)
def press():
    while hits < 20:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.002)
threading.Thread(target=press, daemon=True).start()
while hits < 20:
    try:
        armed = True
        while True:
            opt.step(g)
    except KeyboardInterrupt:
        hits += 1
    assert (p == -opt.t).all(), (p[0], opt.t)
    assert opt.state['step'] == opt.t
""")


def test_memory_maps(tmp_path):
    for name, data in (("p", np.ones(5000, "float32")), ("g", np.full(5000, 2, "float32"))):
        data.tofile(tmp_path / name)
    p = np.memmap(tmp_path / "p", "float32", "r+")
    g = np.memmap(tmp_path / "g", "float32", "r")
    ac.SGD(p, lr=0.25).step(g)
    p.flush()
    assert (np.fromfile(tmp_path / "p", "float32") == 0.5).all()
    with pytest.raises(ValueError, match="read-only"):
        ac.SGD(g)


def test_the_last_elements_beyond_2_to_the_31():
    """A range beyond 2**31 of arrays whose other pages are never touched, but for those of the state, one byte each."""
    n = 2**31 + 2 * CHUNK + 5
    p, g = np.zeros(n, "float32"), np.zeros(n, "float32")
    g[-3:] = [1, 2, 3]
    opt = ac.Momentum(p, lr=1.0, state_dtype="uint8")
    step_range(opt, g, lo=2**31)
    np.testing.assert_array_equal(p[-4:], [0, -1, -2, -3])
    np.testing.assert_array_equal(opt.state["momentum_buffer"][-4:] != 0, [False, True, True, True])
    step_range(ac.SGD(p, lr=2.0, maximize=True), g, lo=2**31)
    np.testing.assert_array_equal(p[-4:], [0, 1, 2, 3])


@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
def test_a_step_allocates_nothing(name, options):
    p = np.ones(BIG, "float32")
    g = np.ones_like(p)
    opt = build(name, p, options)
    opt.step(g)
    tracemalloc.start()
    opt.step(g)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2000


def test_a_thousand_steps_do_not_grow_the_process():
    script = """
import resource, numpy as np, adaptive_c as ac
p = [np.ones(1000, 'f4') for _ in range(500)]; g = [x * .1 for x in p]; opt = ac.AdamW(p, weight_decay=.1)
for _ in range(50): opt.step(g)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(1000): opt.step(g)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert int(child(script)) < 1000  # KiB


def test_parameters_cannot_be_freed_or_resized_under_the_optimizer():
    p = np.ones(5)
    opt = ac.SGD(p, lr=1.0)
    with pytest.raises(ValueError, match="resize"):
        p.resize(10)
    view = opt.param_groups[0]["params"]
    del p
    opt.step(np.ones(5))
    assert (view == 0).all()


def test_the_buffers_of_gradients_are_released():
    g = np.ones(5)
    opt = ac.SGD(np.ones(5))
    before = sys.getrefcount(g)
    opt.step(g)
    with pytest.raises(ValueError, match="shape"):
        ac.SGD([np.ones(5), np.ones(5)]).step([g, np.ones(4)])
    assert sys.getrefcount(g) == before


def test_importing_and_stepping_sets_no_ftz_or_daz():
    tiny = np.float32(1e-40)
    ac.AdamW(np.ones(BIG, "float32")).step(np.ones(BIG, "float32"))
    assert tiny * np.float32(0.5) != 0
    assert np.array([1e-40], "float32")[0] + np.float32(0) != 0
    p = np.zeros(3, "float32")
    ac.SGD(p, lr=0.5).step(np.full(3, 1e-40, "float32"))
    assert (p != 0).all()


# --- the number of threads -------------------------------------------------------------------------------------------


def cgroup(tmp_path, files, membership):
    for name, text in files.items():
        path = tmp_path / "fs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "cgroup").write_text(membership)
    return _config._cgroup_quota(tmp_path / "fs", tmp_path / "cgroup")


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
    ],
)
def test_cgroup_quotas(tmp_path, files, membership, want):
    assert cgroup(tmp_path, files, membership) == want


def test_no_cgroup_file_at_all(tmp_path):
    assert _config._cgroup_quota(tmp_path, tmp_path / "none") == float("inf")


def test_omp_num_threads_and_affinity_are_obeyed():
    script = "import adaptive_c as ac; print(ac.get_num_threads()); ac.show_config()"
    out = child(script, OMP_NUM_THREADS="3")
    assert out.startswith("3\n")
    assert "3: OMP_NUM_THREADS=3" in out
    if hasattr(os, "sched_setaffinity"):
        out = child(f"import os; os.sched_setaffinity(0, [0]); {script}", OMP_NUM_THREADS="")
        assert out.startswith("1\n")


def test_an_explicit_number_is_used_as_given():
    """Seven threads on any machine, under OMP_NUM_THREADS=1 too."""
    script = (
        f"import os, numpy as np, adaptive_c as ac; p = np.ones({BIG}, 'f4'); o = ac.SGD(p, n_threads=7); o.step(p * 1)\n"
        "print(len(os.listdir('/proc/self/task')))"
    )
    if not os.path.isdir("/proc/self/task") or not _config.core.openmp():
        pytest.skip("needs /proc and OpenMP")
    before = int(child(script.replace("n_threads=7", "n_threads=1"), OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1"))
    assert int(child(script, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")) - before == 6

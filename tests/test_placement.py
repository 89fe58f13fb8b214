"""First touch: what a thread will step it writes first, so that the system places it near that thread's processor."""

import json
import os
import sys

import pytest
from support import child

from adaptive_c import _config

pytestmark = pytest.mark.skipif(
    not (sys.platform == "linux" and os.path.isdir("/proc/self/task") and _config.core.openmp()),
    reason="needs Linux's counts of page faults, and OpenMP",
)

# Without huge pages a page's first write is one fault, of the thread that writes.  Prints, for each thread, its faults
# in the constructor, in the first step, and the bytes of state that it steps.  Those are known by the first step of two
# more optimizers, in each of which the parameters of one group were never written: the thread that steps them has the
# faults.
SCRIPT = """
import ctypes, json, mmap, os, numpy as np, adaptive_c as ac
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE

def faults():
    stats = {{task: open(f"/proc/self/task/{{task}}/stat").read() for task in os.listdir("/proc/self/task")}}
    return {{task: int(stat.rpartition(")")[2].split()[7]) for task, stat in stats.items()}}

def during(work):
    before = faults()
    result = work()
    return result, {{task: n - before.get(task, 0) for task, n in faults().items()}}

def groups(*sizes):
    return [{{"params": np.ones(n, dtype), **more}} for n, (dtype, more) in zip(sizes, {groups})]

def unwritten(like):
    memory = mmap.mmap(-1, like.nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(memory, like.dtype)

params = groups(1_000_003, 600_001)
grads = [np.ones(group["params"].shape, group["params"].dtype) for group in params]
small = groups(10_000, 30_000)
ac.{name}(small, n_threads=3, {options}).step([g[:len(s["params"])] for g, s in zip(grads, small)])  # starts the threads
opt, built = during(lambda: ac.{name}(params, n_threads=3, {options}))
_, stepped = during(lambda: opt.step(grads))
owned = dict.fromkeys(built, 0)
for i, held in enumerate(opt.state_dict()["groups"]):
    probes = [{{**group, "params": group["params"].copy()}} for group in params]
    probes[i]["params"] = unwritten(params[i]["params"])
    twin = ac.{name}(probes, n_threads=3, {options})
    _, faults_of = during(lambda: twin.step(grads))
    for task in owned:
        owned[task] += sum(x.nbytes for x in held["arrays"].values()) * faults_of[task] / sum(faults_of.values())
pages = opt.nbytes / os.sysconf("SC_PAGESIZE")
print(json.dumps([pages, *([n[task] for task in built] for n in (built, stepped, owned))]))
"""


@pytest.mark.parametrize(
    ("name", "options", "groups"),
    [
        ("AdamW", "ema_decay=0.9", [("float32", {}), ("float64", {})]),
        ("Adagrad", "initial_accumulator_value=0.5", [("float64", {}), ("float32", {})]),
        ("Rprop", "", [("float32", {}), ("float32", {})]),
        ("Adam", "state_dtype='uint8'", [("float32", {}), ("float16", {"master": "float32"})]),
    ],
)
def test_pages_are_touched_by_the_threads_that_will_step_them(name, options, groups):
    script = SCRIPT.format(name=name, options=options, groups=groups)
    pages, built, stepped, owned = json.loads(child(script))
    assert sum(n > pages / 12 for n in built) == 3  # by three threads,
    assert abs(sum(built) - pages) < 0.03 * pages + 50  # each page once,
    assert sum(stepped) < 0.02 * pages + 50  # so that the step finds them there;
    for n, wanted in zip(built, owned, strict=True):  # and by those that will step it
        assert abs(n / sum(built) - wanted / sum(owned)) < 0.01

"""Many groups and many arrays: everything is linear in their number.

What is measured is work, not time: Python's calls are counted, and where the core works, a process has a number of
seconds of processor time that is tens of times what a linear program needs and a fraction of what a quadratic one does.
"""

import subprocess
import sys
from collections import defaultdict

import numpy as np
import pytest
from support import calls

import adaptive_c as ac

MANY = {"groups": 20_000, "list": 100_000, "dict": 100_000}


def lists(n):
    return [np.ones(4, "f4") for _ in range(n)]


def groups(n):
    return [{"params": [p]} for p in lists(n)]


# name: what is done with n groups, after what came before
STAGES = {
    "construct": lambda run: run.update(opt=ac.AdamW(groups(run["n"]))),
    "accumulate": lambda run: run["opt"].accumulate(run["grads"]),
    "accumulate again": lambda run: run["opt"].accumulate(run["grads"]),
    "step of the sums": lambda run: run["opt"].step(),
    "step": lambda run: run["opt"].step(run["grads"]),
    "zero_grad": lambda run: (setattr(run["opt"], "zero_grad", True), run["opt"].step(run["grads"])),
    "state": lambda run: run["opt"].state["exp_avg"],
    "state_dict": lambda run: run.update(d=run["opt"].state_dict()),
    "load_state_dict": lambda run: run["opt"].load_state_dict(run["d"]),
    "save": lambda run: run["opt"].save(run["path"] / "a"),
    "load": lambda run: run["opt"].load(run["path"] / "a"),
    "t": lambda run: setattr(run["opt"], "t", 7),
    "repr": lambda run: repr(run["opt"]),
    "nbytes": lambda run: run["opt"].nbytes,
}


def test_python_does_ten_times_the_work_for_ten_times_the_groups(tmp_path):
    counted = []
    for n in (100, 1000):
        run = {"n": n, "grads": [[np.ones(4, "f4")] for _ in range(n)], "path": tmp_path}
        counted.append({name: len(calls(stage, run, built_in=True)) for name, stage in STAGES.items()})
    few, many = counted
    assert {name: (few[name], many[name]) for name in STAGES if many[name] > 10.5 * few[name] + 100} == {}


def test_python_does_ten_times_the_work_for_ten_times_the_arrays(tmp_path):
    counted = []
    for n in (100, 1000):
        run = {"n": n, "grads": lists(n), "path": tmp_path}
        stages = {**STAGES, "construct": lambda run: run.update(opt=ac.AdamW(lists(run["n"])))}
        counted.append({name: len(calls(stage, run, built_in=True)) for name, stage in stages.items()})
    few, many = counted
    assert {name: (few[name], many[name]) for name in STAGES if many[name] > 10.5 * few[name] + 100} == {}


@pytest.mark.later("torch")
def test_the_first_steps_of_tensors_look_at_ten_times_the_state_for_ten_times_the_groups():
    """Each group's state is shown when its tensor is stepped for the first time."""
    torch = pytest.importorskip("torch")
    from adaptive_c.torch import AdamW

    class Counting(defaultdict):
        looked = 0

        def values(self):
            Counting.looked += len(self)
            return super().values()

    counted = []
    for n in (10, 100):
        params = [torch.ones(4, requires_grad=True) for _ in range(n)]
        opt = AdamW([{"params": [p]} for p in params])
        opt.state = Counting(dict)
        for p in params:
            p.grad = torch.ones(4)
        Counting.looked = 0
        opt.step()
        counted.append(Counting.looked)
        assert len(opt.state) == n
    assert counted[0] > 0
    assert counted[1] <= 10 * counted[0]


# Another kind of structure each; every gradient is 1, and so is every parameter at first.
PROGRAM = """
import gc, sys, tempfile, pathlib
import numpy as np, adaptive_c as ac

gc.disable()  # the collector would take as long as the rest

try:
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[2]), int(sys.argv[2]) + 5))
except ImportError:
    pass
n = int(sys.argv[1])
kind = sys.argv[3]

def arrays():
    "n arrays of ones, with gaps between them, and all their numbers in one."
    space = np.ones((n, 8, 1), "f4")
    return [x[:4] for x in space], space[:, :4]

params, p = arrays()
ones, g = arrays()
if kind == "groups":
    wrap = lambda arrays: [[x] for x in arrays]
    build = lambda arrays: ac.AdamW([{"params": [x]} for x in arrays], lr=0.5, weight_decay=0.0)
elif kind == "list":
    wrap = list
    build = lambda arrays: ac.AdamW(arrays, lr=0.5, weight_decay=0.0)
else:
    wrap = lambda arrays: dict(enumerate(arrays))
    build = lambda arrays: ac.AdamW(wrap(arrays), lr=0.5, weight_decay=0.0)
opt = build(params)
opt.accumulate(wrap(ones))
opt.accumulate(wrap(ones))
opt.step()
assert opt.t == 1 and abs(p - 0.5).max() < 1e-6
opt.zero_grad = True
opt.step(wrap(ones))
opt.step(wrap(ones))
assert opt.t == 3 and not g.any()
again, q = arrays()
other = build(again)
with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "a"
    opt.save(path)
    other.load(path)
assert other.t == 3 and (p == q).all() and q.max() < 0.5
other.load_state_dict(opt.state_dict())
other.t = 5
assert len(opt.param_groups) == (n if kind == "groups" else 1)
if kind == "list":
    opt.step(target=ones)
    opt.step(ones, params=again)
    opt.step([ac.Rows(np.array([1]), g[:1]) for g in ones])
    with opt.stepping() as now:
        for i in range(n):
            now(i, ones[i])
    assert opt.t == 7 and opt.decoded_state("exp_avg")[-1].shape == (4, 1)
print("done")
"""


@pytest.mark.parametrize("kind", list(MANY))
def test_many(kind):
    """Linear, it takes about 2 s of a processor (groups: 6 s); quadratic, minutes."""
    line = [sys.executable, "-P", "-c", PROGRAM, str(MANY[kind]), "40", kind]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), f"{done.returncode} (SIGXCPU is -24): {done.stderr}"

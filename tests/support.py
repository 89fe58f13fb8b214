"""What the tests share: optimizers, numbers to give them, and comparisons to the last bit."""

import atexit
import copy
import functools
import gc
import importlib.util
import inspect
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

import adaptive_c as ac
from adaptive_c import _native, reference

CHUNK = 4096  # elements; a piece of a step begins at a multiple of it
# The builds that this machine runs, but for the one that is loaded here, which every test tests.
OTHER_BUILDS = [level for level in _native.LEVELS if level not in (*_native.unused_levels, _native.isa)]


# --- optimizers --------------------------------------------------------------------------------------------------------


def build(name, params, options, **shared):
    return getattr(ac, name)(params, **options, **shared)


def make(seed=0, steps=3, cls=ac.AdamW, shapes=((3, 4), (), (300,)), **options):
    """An optimizer that has made some steps."""
    rng = np.random.default_rng(seed)
    params = [np.asarray(rng.normal(size=s)).astype("f4") for s in shapes]
    opt = cls(params, **options)
    for _ in range(steps):
        opt.step([np.asarray(rng.normal(size=s)).astype("f4") for s in shapes])
    return opt


def spec(name):
    """The reference function of a class."""
    return getattr(reference, name.lower())


def slots(name):
    """The state arrays of a class in the order in which the rounding noise numbers them; not all of them are in use."""
    return tuple(getattr(ac, name).rule.state)


def starts(name, options):
    """What the numbers of each state array of a class are before the first step."""
    defaults = {key: parameter.default for key, parameter in inspect.signature(getattr(ac, name)).parameters.items()}
    return {slot: {**defaults, **options}.get(about.start, 0.0) for slot, about in getattr(ac, name).rule.state.items()}


def step_range(opt, grads, group=-1, lo=0, hi=-1, count=True, **more):
    """Step only the elements lo to hi (-1: the last) of one group (-1: the only one), and count the step or not.

    Ranges have no public door yet.  State that stays on disk will be stepped range by range, and so what a range does
    is tested today.  This is the only place in the tests that reaches into an optimizer.
    """
    opt._run.plan.step(grads, part=(group, lo, hi, count), **more)


def break_off(opt, grads, indices, *metric):
    """A block of stepping that raises after some of its arrays."""
    with opt.stepping(*metric) as now:
        for i in indices:
            now(i, grads[i])
        raise LookupError("where is the next one?")


def set_scaler(opt, **numbers):
    """Give a dynamic loss scale another scale or growth_tracker, as a load does."""
    saved = opt.state_dict()
    opt.load_state_dict({**saved, "scaler": {**saved["scaler"], **numbers}})


def random_state(opt, rng, t=10):
    """Give an optimizer over one flat array a random state at step t; returns it as the reference's dict."""
    state = {}
    opt.t = t
    for name, live in opt.state.items():
        if name == "step":
            continue
        if name == "mu_product":
            state[name] = float(live)
            continue
        coding = opt.rule.state[name].coding
        if coding == "sign":
            live[...] = rng.integers(-1, 2, live.shape)
        elif coding == "signed":
            live[...] = rng.normal(size=live.shape)
        else:  # a mean of squares, a rate
            live[...] = rng.uniform(0.05, 1.0, live.shape)
        state[name] = live.astype(live.dtype if coding != "sign" else opt.param_groups[0]["params"].dtype)
    return state


# --- numbers -----------------------------------------------------------------------------------------------------------


def gradients(rng, size, dtype, n=8):
    """Gradients of mixed size and sign with exact zeros of both signs among them."""
    grads = rng.normal(size=(n, size)) * (10.0 ** np.arange(-6, 3))[rng.integers(0, 9, size=(n, size))]
    grads[rng.random((n, size)) < 0.05] = 0.0
    grads[rng.random((n, size)) < 0.05] = -0.0
    return grads.astype(dtype)


def split(x, cuts):
    """Copies of the parts of a flat array."""
    return [part.copy() for part in np.split(x, sorted(cuts))]


def misaligned(x):
    """A copy of an array at an address that does not suit its type."""
    raw = np.zeros(x.nbytes + 1, "u1")
    out = raw[1:].view(x.dtype).reshape(x.shape)
    out[...] = x
    return out


def read_only(x):
    x.flags.writeable = False
    return x


def arrays_in(x):
    """The arrays of a structure, in order; a None has none."""
    if isinstance(x, (Mapping, list, tuple)):
        return [array for part in (x.values() if isinstance(x, Mapping) else x) for array in arrays_in(part)]
    return [] if x is None else [x]


def flat(x):
    """A copy of the arrays of a structure, one after the other; None without any."""
    arrays = arrays_in(x)
    return np.concatenate([array.ravel() for array in arrays]) if arrays else None


# --- comparisons -------------------------------------------------------------------------------------------------------


def everything(opt, *but):
    """A copy of all that a run holds, the parameters and their copies among it, whatever the structure and the cut.

    but: options that are left out, because the runs that are compared differ in them.
    """
    found = copy.deepcopy(opt.state_dict())
    for group, about in zip(opt.param_groups, found["groups"], strict=True):
        about["options"] = {name: x for name, x in about["options"].items() if name not in but}
        about |= {"params": flat(group["params"]), "copies": flat(group["copy_to"])}
    return found


def held(opt, name, group=0):
    """A flat view of one of the arrays that a group holds, such as "sums" while some are pending; None without it."""
    return opt.state_dict()["groups"][group]["arrays"].get(name)


def assert_same_bits(a, b, what=""):
    """Equal to the last bit, where NaN equals NaN."""
    a, b = np.atleast_1d(np.asarray(a)), np.atleast_1d(np.asarray(b))
    assert a.dtype == b.dtype, (what, a.dtype, b.dtype)
    assert a.shape == b.shape, (what, a.shape, b.shape)
    unsigned = f"u{a.itemsize}"
    differ = (a.view(unsigned) != b.view(unsigned)) & ~((a != a) & (b != b))
    assert not differ.any(), f"{what}: {differ.sum()} of {a.size} differ, first at {np.flatnonzero(differ)[0]}: " \
        f"{a[differ][0]!r} {b[differ][0]!r}"  # fmt: skip


def assert_same(a, b, what=""):
    """Two structures of dicts, lists, arrays and numbers are equal to the last bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), what
        for key in a:
            assert_same(a[key], b[key], f"{what} {key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), what
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{what} {i}")
    elif isinstance(a, np.ndarray):
        assert_same_bits(a, b, what)
    else:
        assert a == b or a != a, what


# --- calls, interrupts, threads and processes --------------------------------------------------------------------------


def watched(look, call, *arguments):
    """Call something under a profiler.  Garbage is not collected meanwhile: hypothesis has a callback of the collector."""
    collects = gc.isenabled()
    gc.disable()
    sys.setprofile(look)
    try:
        call(*arguments)
    finally:
        sys.setprofile(None)
        if collects:
            gc.enable()


def calls(call, *arguments, built_in=False):
    """The names of the functions of Python that run in a call, without its own, and of those in C that Python calls.

    A generator is named each time that it goes on.
    """
    names = []

    def look(frame, event, argument):
        if event == "call":
            names.append(frame.f_code.co_name)
        elif event == "c_call" and built_in:
            names.append(argument.__name__)

    watched(look, call, *arguments)
    return names[1:]


def press():
    raise KeyboardInterrupt


def at(n, call, then=press):
    """Call something, and something else at its n-th place: does it have so many?"""
    places = 0

    def profile(frame, event, argument):
        nonlocal places
        if event in ("call", "c_return"):
            places += 1
            if places == n:
                then()

    watched(profile, call)
    return places >= n


def race(call, threads, times):
    """Call it so often in so many threads at once; what the RuntimeErrors said."""
    refused = []

    def work():
        for _ in range(times):
            try:
                call()
            except RuntimeError as error:
                refused.append(str(error))

    running = [threading.Thread(target=work) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return refused


def in_another_thread(call):
    """What a call returns that another thread makes while this one waits; what it raises is raised here."""
    results = []

    def work():
        try:
            results.append((call(), None))
        except BaseException as error:
            results.append((None, error))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    ((result, error),) = results
    if error is not None:
        raise error
    return result


# Reads orders, and carries each out in a fork: the import of NumPy takes most of the time of a short script.
FORKS = """
import json, os, sys
import numpy
for order in map(json.loads, sys.stdin):
    if not (pid := os.fork()):
        break
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
else:
    sys.exit()
for number, name in enumerate(("/dev/null", *order["files"])):
    os.dup2(os.open(name, os.O_RDONLY if not number else os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
os.environ.clear()
os.environ.update(order["env"])
sys.path[1:1] = [x for x in os.environ.get("PYTHONPATH", "").split(os.pathsep) if x and x not in sys.path]
exec(order["script"])
"""


@functools.cache
def forks():
    """The process that forks, in a group of its own, and the files for what its children print."""
    folder = tempfile.TemporaryDirectory()
    process = subprocess.Popen([sys.executable, "-c", FORKS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                               cwd="/", start_new_session=True)  # fmt: skip

    @atexit.register
    def end():
        process.communicate()
        folder.cleanup()

    return process, [Path(folder.name, name) for name in ("out", "err")]


def child(script, timeout=120, **env):
    """Run a script in a process of its own, outside the source tree, where NumPy is imported; returns what it prints."""
    process, files = forks()
    order = {"script": script, "env": {**os.environ, **env}, "files": list(map(str, files))}
    for file in files:
        file.write_text("")
    try:
        print(json.dumps(order), file=process.stdin, flush=True)
        assert select.select([process.stdout], [], [], timeout)[0], f"it hangs after it has told {files[0].read_text()}"
        code = process.stdout.readline()
        assert code, "the process that forks has ended"
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        forks.cache_clear()
        raise
    out, err = (file.read_text() for file in files)
    assert code == "0\n", out + err
    return out


def needs(*names):
    """Skip a file of tests where these modules are not installed; they are imported by the tests that use them."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}", allow_module_level=True)

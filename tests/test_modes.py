"""The bits of a result don't depend on the floating-point mode that the caller or any thread is in.

Other libraries flush denormals to 0 (FTZ, on the way out; DAZ, on the way in: torch.set_flush_denormal sets both) or
round in another direction.  Whatever is set, everything here runs to nearest with denormals kept, or, with
flush_denormals=True, flushed; on every thread; and afterwards the caller's mode is as it was.
"""

import contextlib
import ctypes
import functools
import itertools
import platform
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from cases import IDS, PAIRS
from support import CHUNK, assert_same_bits, build

import adaptive_c as ac

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or platform.libc_ver()[0] != "glibc",
    reason="knows the mode's word of x86-64 and glibc's fenv_t",
)

FTZ, DAZ, DOWN, UP, TO_ZERO = 0x8000, 0x40, 0x2000, 0x4000, 0x6000  # in MXCSR
MODES = {
    "ftz": FTZ,
    "daz": DAZ,
    "flushing": FTZ | DAZ,
    "upward": UP,
    "downward": DOWN,
    "to zero": TO_ZERO,
    "all": FTZ | DAZ | TO_ZERO,
}
WORDS = FTZ | DAZ | TO_ZERO
N = 20_000  # large enough for several threads


class FEnv(ctypes.Structure):
    """glibc's fenv_t: the environment of the x87 unit, then MXCSR."""

    _fields_ = (("x87", ctypes.c_uint8 * 28), ("mxcsr", ctypes.c_uint32))


@functools.cache
def of_libm():
    return ctypes.CDLL("libm.so.6")


def current():
    """What this thread's mode differs in from the default one."""
    env = FEnv()
    of_libm().fegetenv(ctypes.byref(env))
    return env.mxcsr & WORDS


def change(word):
    libm, env = of_libm(), FEnv()
    libm.fesetround((word & TO_ZERO) >> 3)  # FE_DOWNWARD 0x400, FE_UPWARD 0x800, FE_TOWARDZERO 0xc00
    libm.fegetenv(ctypes.byref(env))
    env.mxcsr = env.mxcsr & ~WORDS | word
    libm.fesetenv(ctypes.byref(env))


@contextlib.contextmanager
def mode(word):
    """This thread in another mode.  Within it only what is tested should compute."""
    change(word)
    try:
        yield
    finally:
        left = current()
        change(0)
    assert left == word, f"the caller's mode was {word:#x} and is {left:#x}"


@functools.cache
def gradients(dtype="f4", n=N, steps=3):
    """Of every size down to denormal numbers, with zeros among them."""
    rng = np.random.default_rng(7)
    low = -44 if dtype == "f4" else -320
    grads = rng.normal(size=(steps, n)) * 10.0 ** rng.integers(low, 3, size=(steps, n))
    grads[rng.random((steps, n)) < 0.05] = 0.0
    return grads.astype(dtype)


def arrays(opt):
    """Every array of an optimizer, and its norm."""
    d = opt.state_dict()["groups"][0]["arrays"]
    found = {**d, "params": opt.param_groups[0]["params"], "norm": np.array(opt.grad_norm)}
    if opt.param_groups[0]["copy_to"] is not None:
        found["copy"] = opt.param_groups[0]["copy_to"]
    return {name: np.array(array) for name, array in found.items()}


def same(a, b, what):
    assert a.keys() == b.keys()
    for name in a:
        assert_same_bits(a[name], b[name], f"{what}: {name}")


def test_the_modes_are_what_they_say():
    small, half, large = np.full(4, 2.0**-126, "f4"), np.float32(0.5), np.float32(2.0**20)
    denormal, ones, threes = np.full(4, 1e-39, "f4"), np.full(4, 1.0), np.full(4, 3.0)
    found = {}
    for name, word in MODES.items():
        with mode(word):
            computed = small * half, denormal * large, ones / threes
        found[name] = computed[0][0] == 0, computed[1][0] == 0, computed[2][0] > 1 / 3
    assert current() == 0
    assert found == {
        "ftz": (True, False, False), "daz": (False, True, False), "flushing": (True, True, False),
        "upward": (False, False, True), "downward": (False, False, False), "to zero": (False, False, False),
        "all": (True, True, False),
    }  # fmt: skip


EXTRAS = [
    ("plain", {"n_threads": 2}),
    ("clipped", {"n_threads": 2, "max_grad_norm": 1.0, "max_grad_value": 0.5, "loss_scale": 3.0, "ema_decay": 0.9, "bounds": (-0.9, 1e-40)}),
    ("checked", {"n_threads": 1, "on_nonfinite": "skip"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
def test_a_step_has_the_same_bits_in_every_mode(name, options):
    grads = gradients()
    start = np.random.default_rng(1).normal(size=N).astype("f4")
    start[::7] *= np.float32(1e-38)  # denormal parameters
    for extra, shared in EXTRAS:
        expected = None
        for label in ("default", "flushing", "upward"):  # every mode: the formats below
            word = MODES.get(label, 0)
            opt = build(name, start.copy(), options, **shared)
            with mode(word):
                for g in grads[:2]:
                    opt.step(g)
            found = arrays(opt)
            expected = found if expected is None else expected
            same(expected, found, f"{extra}, {label}")


FORMATS = {
    "float64": ("f8", {"max_grad_norm": 1.0, "ema_decay": 0.9}),
    "float32 copy of float64": ("f8", {"copy_to": "f4"}),
    "float16 copy": ("f4", {"copy_to": "f2"}),
    "uint8 state": ("f4", {"state_dtype": "uint8", "max_grad_norm": 1.0}),
    "bfloat16 state": ("f4", {"state_dtype": "bfloat16"}),
    "float16, stochastic": ("f2", {"rounding": "stochastic"}),
    "float16, master": ("f2", {"master": "float32", "ema_decay": 0.9}),
}


def build_format(kind, threads, word=0):
    """An optimizer that is constructed in a mode, and its gradients."""
    dtype, options = FORMATS[kind]
    rng = np.random.default_rng(1)
    p = (rng.normal(size=N) * 10.0 ** rng.integers(-44, 1, size=N)).astype(dtype)
    options = {**options, **({"copy_to": np.zeros(N, options["copy_to"])} if "copy_to" in options else {})}
    grads = gradients("f8" if dtype == "f8" else "f4")
    with mode(word):
        opt = ac.AdamW(p, lr=0.1, n_threads=threads, **options)
    return opt, grads


@pytest.mark.parametrize("accumulated", [False, True], ids=["step", "accumulate"])
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_has_the_same_bits_in_every_mode(kind, accumulated):
    expected = None
    for label, word in [("default", 0), *MODES.items()]:
        opt, grads = build_format(kind, 2 if word else 1)
        with mode(word):
            for g in grads[:2]:
                (opt.accumulate if accumulated else opt.step)(g)
            if accumulated:
                opt.step()
        found = arrays(opt)
        expected = found if expected is None else expected
        same(expected, found, label)


@pytest.mark.parametrize("label", ["flushing", "upward"])
@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_no_step_has_the_same_bits_in_every_mode(kind, label):
    """Construction writes copies; so does a load, and state is decoded; averages are put into place."""

    def run(word):
        opt, grads = build_format(kind, 2, word)
        built = arrays(opt)
        other, _ = build_format(kind, 2)
        for g in grads:
            other.step(g)
        with mode(word):
            opt.load_state_dict(other.state_dict())
            decoded = [opt.decoded_state(name) for name in ("exp_avg", "exp_avg_sq")]
        averaged = {}
        if opt.ema is not None:
            with mode(word), opt.averaged_parameters():
                averaged["averaged"] = opt.param_groups[0]["params"].copy()
        loaded = {f"loaded {name}": array for name, array in arrays(opt).items()}
        return {**built, **loaded, **averaged, "m": decoded[0], "v": decoded[1]}

    same(run(0), run(MODES[label]), kind)


@pytest.mark.parametrize("word", MODES.values(), ids=MODES)
def test_constants_are_formed_in_the_default_mode(word):
    def run(word):
        p, g = np.ones(5, "f4"), np.full(5, 0.7, "f4")
        opt = ac.NAdam(p, betas=(0.93, 0.9991), weight_decay=0.07, max_grad_norm=0.3, ema_decay=0.97)
        with mode(word):
            opt.t = 77
            opt.step(g)
            opt.param_groups[0]["bounds"] = (-0.1, 0.2)  # neither of them is a number of float32
            opt.step(g)
        return arrays(opt)

    same(run(0), run(word), "NAdam")


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("word", [0, *MODES.values()], ids=["default", *MODES])
def test_flush_denormals_flushes_whatever_the_mode_is(word, threads):
    g = np.full(N, 1e-39, "f4")
    for flushed in (True, False):
        p = np.zeros(N, "f4")
        opt = ac.SGD(p, lr=1.0, n_threads=threads, flush_denormals=flushed)
        with mode(word):
            opt.step(g)
        assert np.count_nonzero(p) == (0 if flushed else N)
        sums = ac.SGD(np.zeros(N, "f4"), lr=1.0, n_threads=threads, flush_denormals=flushed)
        with mode(word):
            sums.accumulate(g)
            sums.accumulate(g)
            sums.step()
        assert np.count_nonzero(sums.param_groups[0]["params"]) == (0 if flushed else N)


@pytest.mark.parametrize("word", [0, *MODES.values()], ids=["default", *MODES])
def test_the_callers_mode_is_back_after_what_raises(word):
    p = np.zeros(N, "f4")
    bad = np.full(N, np.nan, "f4")
    for flushed in (False, True):
        opt = ac.AdamW(p, on_nonfinite="raise", flush_denormals=flushed, n_threads=2)
        skipping = ac.AdamW(p, on_nonfinite="skip", max_grad_norm=1.0, flush_denormals=flushed, n_threads=2)
        following = ac.AdamW(p, lr=lambda t: 0.1 if t < 1 else -1.0, flush_denormals=flushed)
        following.step(np.zeros(N, "f4"))
        with mode(word):
            for call in (
                lambda opt=opt: opt.step(bad),
                lambda opt=opt: opt.step(np.zeros(3, "f4")),
                lambda opt=following: opt.step(bad),
            ):
                with pytest.raises(ValueError, match=r".") as raised:
                    call()
                assert current() == word, raised.value
            skipping.step(bad)
            skipping.accumulate(bad)
            skipping.discard()


@pytest.mark.parametrize("word", MODES.values(), ids=MODES)
def test_a_python_thread_in_another_mode(word):
    """Modes are a thread's own: two threads step in two modes at once."""
    p, q = np.zeros(N, "f4"), np.zeros(N, "f4")
    g = np.full(N, 1e-39 / 3.0, "f4")
    one, two = (ac.Adam(x, lr=0.1, n_threads=2) for x in (p, q))
    failed = []

    def work():
        try:
            with mode(word):
                for _ in range(20):
                    one.step(g)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    for _ in range(20):
        two.step(g)
    thread.join()
    assert not failed
    same(arrays(two), arrays(one), "another thread")


def test_threads_that_were_begun_in_another_mode_compute_in_the_default_one():
    """A new thread has the mode of the one that makes it: OpenMP's are made by the first large step."""
    for word in (FTZ | DAZ, UP):
        folder = str(Path(__file__).parent)
        code = f"import sys; sys.path.insert(0, {folder!r}); import test_modes as t; t.first_steps_in({word})"
        done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "the same\n"), done.stdout + done.stderr


def test_a_caller_that_wants_signals_of_bad_numbers_gets_none_of_ours():
    """feenableexcept() makes 0/0, an overflow or a division by 0 end the process that computes it."""
    folder = str(Path(__file__).parent)
    code = f"import sys; sys.path.insert(0, {folder!r}); import test_modes as t; t.steps_with_traps()"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "the same\n"), done.stdout + done.stderr


def steps_with_traps():
    libm, every = ctypes.CDLL("libm.so.6"), 0x1D  # invalid, by zero, overflow, underflow
    results = []
    for traps in (0, every):
        p = np.ones(N, "f4")
        opt = ac.AdamW(p, eps=0.0, n_threads=2)
        g = np.zeros_like(p)
        g[:3] = np.nan, np.inf, 1e30
        opt.step(g)
        libm.feenableexcept(traps)
        opt.step(g)
        left = libm.fegetexcept()
        libm.fedisableexcept(every)
        assert left == traps
        results.append(arrays(opt))
    same(*results, "traps")
    print("the same")


def first_steps_in(word):
    """In a process of its own, whose threads are made in that mode."""
    g = gradients(n=4 * CHUNK * 8)
    start = np.random.default_rng(1).normal(size=g.shape[1]).astype("f4")
    results = []
    for threads in (2, 1):
        p = start.copy()
        opt = ac.AdamW(p, lr=0.1, n_threads=threads, max_grad_norm=1.0)
        if threads == 2:
            change(word)
            opt.step(g[0])
            change(0)
        else:
            opt.step(g[0])
        opt.step(g[1])
        results.append(arrays(opt))
    same(*results, "threads")
    print("the same")


@pytest.mark.later("torch")
def test_torch_may_flush_denormals():
    import torch

    if not torch.set_flush_denormal(False):
        pytest.skip("this processor can't")
    results = []
    for flush, threads in itertools.product((False, True), (1, 2)):
        p = np.zeros(N, "f4")
        opt = ac.SGD(p, lr=1.0, n_threads=threads)
        opt.step(np.zeros_like(p))
        g = np.full_like(p, 1e-39)
        torch.set_flush_denormal(flush)
        try:
            opt.step(g)
        finally:
            torch.set_flush_denormal(False)
        results.append(p)
    for p in results:
        assert_same_bits(p, np.full(N, -1e-39, "f4"))

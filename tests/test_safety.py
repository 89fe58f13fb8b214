"""It doesn't hang, doesn't crash, doesn't allocate, and never leaves half a step."""

import contextlib
import sys
import threading
import time
import tracemalloc

import numpy as np
import pytest
from cases import IDS, PAIRS
from support import CHUNK, assert_same_bits, build, child, race, step_range

import adaptive_c as ac

BIG = 300_000  # elements: parallel, without the GIL


def test_two_threads_stepping_one_optimizer_get_an_error_never_a_corrupted_state():
    p = np.zeros(4_000_000, "float32")
    opt = ac.SGD(p, lr=1.0)
    g = np.ones_like(p)
    refused = race(lambda: opt.step(g), threads=2, times=30)
    assert opt.t == 60 - len(refused)
    assert (p == -opt.t).all()
    assert all("this optimizer is in use" in message for message in refused)


def test_a_slow_schedule_lets_no_second_thread_into_a_step():
    p = np.zeros(4_000_000, "float32")
    opt = ac.SGD(p, lr=lambda step: (time.sleep(0.002), 1.0)[1])
    g = np.ones_like(p)
    refused = race(lambda: opt.step(g), threads=3, times=20)
    assert opt.t == 60 - len(refused)
    assert (p == -opt.t).all()
    assert all(message.startswith("this optimizer is in use") for message in refused)


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
    try:
        for _ in range(300):
            opt.step(grads)
    finally:
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
    sys.setswitchinterval(1000)  # Python does not take the GIL away: the other thread has it only if it is released
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

"""Ctrl-C wherever it may come, signal handlers that use the optimizer, and other threads at the worst moments.

Python looks for signals at the entry of a function, behind calls and in loops.  A KeyboardInterrupt is raised at the n-th
of these places that a call comes to, in any module, for every n.
"""

import _thread
import copy
import dis
import gc
import os
import signal
import sys
import threading
import time
import warnings
import weakref
from itertools import count

import numpy as np
import pytest
from test_checkpoint import FORMATS, assert_same, everything, make

import adaptive_c as ac
from adaptive_c import _checkpoint

STRIDES = {"safetensors": 1, "npz": 7}  # zipfile has many places

GRADS = [np.ones((3, 4), "f4"), np.ones((), "f4"), np.ones(300, "f4")]


# Later Pythons trace instructions in another way, and miss some; stress with real signals found them well.
everywhere = pytest.mark.skipif(sys.version_info >= (3, 12), reason="needs the opcode events of Python 3.11")


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    """The destructors of what an interrupt dropped may complain: files that nobody closed, a half made ZipFile."""
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
    with warnings.catch_warnings():  # an interrupt may leave somebody else's filters
        yield
    gc.collect()


def looked_at(before):
    """Does Python look for signals behind this instruction?  None: at the entry of a function."""
    return before is None or before.startswith(("CALL", "JUMP_BACKWARD", "POP_JUMP_BACKWARD"))


def in_destructor(frame):
    """Python itself swallows what is raised there (zipfile has one)."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


def interrupted(call, n):
    """Did a call have an n-th place to be interrupted?  The interrupt must come through, whatever else fails."""
    places, last = 0, {}  # last: of each frame the instruction before this one

    def trace(frame, event, argument):
        nonlocal places
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "return":
            last.pop(id(frame), None)
        if event == "opcode":
            before = last.get(id(frame))
            last[id(frame)] = dis.opname[frame.f_code.co_code[frame.f_lasti]]
            if looked_at(before) and not in_destructor(frame):
                places += 1
                if places == n:
                    raise KeyboardInterrupt
        return trace

    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    assert places < n, "a Ctrl-C was swallowed"
    return False


def descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0


def settles(measure, most):
    """Does a number fall to `most`?  Threads take a moment to end."""
    for _ in range(500):
        gc.collect()  # what a traceback held
        if measure() <= most:
            return True
        time.sleep(0.01)
    return False


@everywhere
@pytest.mark.parametrize("kind", FORMATS)
def test_save(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(_checkpoint, "_PIECE", 1 << 9)  # many pieces
    opt, other = make(), make(seed=1)
    old, new = make(), make(steps=4)
    path = tmp_path / "a"
    opt.save(path, format=kind)
    open_before, threads = descriptors(), _thread._count()
    opt = make(steps=4)
    for n in count(1, STRIDES[kind]):
        old.save(path, format=kind)
        if not interrupted(lambda: opt.save(path, format=kind), n):
            break
        other.load(path)  # it is whole, and the old one or the new
        assert_same(everything(other), everything(old if other.t == 3 else new))
        opt.state_dict()  # and nothing is held
    assert n > 200
    other.load(path)
    assert other.t == 4
    opt.save(path, format=kind)  # removes what is left
    assert os.listdir(tmp_path) == ["a"]
    assert settles(
        descriptors, open_before + 1
    )  # that of the folder, where the interrupt comes right behind its opening
    assert settles(_thread._count, threads)


@everywhere
@pytest.mark.parametrize("way", ["dict", *FORMATS])
def test_load(way, tmp_path, monkeypatch):
    """It is refused or goes on: a second load makes it whole."""
    monkeypatch.setattr(_checkpoint, "_PIECE", 1 << 7)  # the long array is read in two halves
    saved, opt = make(lr=0.5), make(seed=1, steps=1)
    saved.accumulate(GRADS)
    saved.save(tmp_path / "a", format=None if way == "dict" else way)
    d = copy.deepcopy(saved.state_dict())
    load = (lambda: opt.load_state_dict(d)) if way == "dict" else (lambda: opt.load(tmp_path / "a"))
    threads, n = _thread._count(), 0
    for n in count(1, STRIDES.get(way, 1)):
        if not interrupted(load, n):
            break
        loaded = opt.pending  # or not
        opt.accumulate([np.full((3, 4), 2, "f4"), None, None])
        assert opt._groups[0]._sums[0] == 2 + loaded  # nothing is held, and no sum is half restored
        assert list(opt._groups[0]._summed) == [1, loaded, loaded]
        opt.step()
    assert n > 100
    load()
    assert_same(opt.state_dict(), saved.state_dict())
    assert settles(_thread._count, threads)


@everywhere
def test_averaged_parameters():
    opt = make(ema_decay=0.5)
    before, average = everything(opt), opt.ema[0].copy()
    params = opt.param_groups[0]["params"]

    def look():
        with opt.averaged_parameters():
            assert (params[0] == average).all()
            assert opt.t == 3

    for n in count(1):
        done = not interrupted(look, n)
        assert_same(everything(opt), before)
        if done:
            break
    assert n > 5


@everywhere
def test_a_new_group():
    """It is there or it is not, and the other groups are the optimizer's."""
    for n in count(1):
        params = [np.zeros(3) for _ in range(4)]
        opt = ac.SGD([{"params": p} for p in params], lr=0.5)
        done = not interrupted(lambda: opt.add_param_group({"params": np.ones(7, "f4")}), n)  # noqa: B023
        more = len(opt.param_groups) - 4
        assert more in (0, 1)
        for group in opt.param_groups:
            group["lr"] = 0.25
        opt.step([np.ones(3)] * 4 + [None] * more)
        assert all((p == -0.25).all() for p in params)
        if done:
            break
    assert more == 1
    assert n > 50


@everywhere
@pytest.mark.parametrize("what", ["step", "rollback", "assign", "setting"])
def test_a_change_is_whole_or_not_at_all(what):
    """What the optimizer shows is what it steps with, and a metric belongs to its step."""
    lr = ac.schedules.plateau(0.5, factor=0.5, patience=0)
    calls = {
        "step": lambda opt: opt.step(GRADS, metric=2.0),
        "rollback": lambda opt: opt.rollback(),
        "assign": lambda opt: opt.param_groups[0].update(lr=0.125),
        "setting": lambda opt: setattr(opt, "max_grad_norm", 0.5),
    }

    def start():
        opt = make(cls=ac.SGD, lr=0.25 if what == "assign" else lr, keep_undo=True, steps=0, max_grad_norm=1e6)
        opt.step(GRADS, metric=None if what == "assign" else 1.0)
        if what == "rollback":
            opt.step(GRADS, metric=2.0)
        return opt

    ends = []
    for call in (lambda opt: None, calls[what]):
        opt = start()
        call(opt)
        shown = opt.param_groups[0]["lr"], opt.max_grad_norm, opt.t
        opt.step(GRADS)
        ends.append((shown, everything(opt)))
    for n in count(1):
        opt = start()
        done = not interrupted(lambda: calls[what](opt), n)  # noqa: B023
        shown = opt.param_groups[0]["lr"], opt.max_grad_norm, opt.t
        assert shown in (ends[0][0], ends[1][0])
        opt.step(GRADS)
        assert_same(everything(opt), ends[1][1] if shown == ends[1][0] else ends[0][1])
        if done:
            break
    assert shown == ends[1][0]


def test_a_signal_handler_that_saves(tmp_path):
    """It is refused inside a save or a step, with the remedy, and never damages a file."""
    opt, other, told = make(shapes=((50_000,), (), (300,))), make(shapes=((50_000,), (), (300,)), seed=1), []
    opt.save(tmp_path / "a")

    def handler(*_):
        try:
            opt.save(tmp_path / "a")
        except RuntimeError as error:
            told.append(str(error))
            raise

    before = signal.signal(signal.SIGALRM, handler)
    try:
        for i in range(150):
            signal.setitimer(signal.ITIMER_REAL, 1e-4 * (1 + i % 40))
            try:
                for _ in range(3):
                    opt.save(tmp_path / "a")
            except RuntimeError as error:
                assert str(error) in told  # noqa: PT017
            signal.setitimer(signal.ITIMER_REAL, 0)
            other.load(tmp_path / "a")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert told
    assert all("In a signal handler: set a flag there, and act on it after the step" in message for message in told)


def test_nobody_writes_behind_a_load(tmp_path, monkeypatch):
    """Of an array that two threads read the other's half may take longer; an interrupt waits for it."""
    saved, opt = make(shapes=((400,),)), make(seed=1, shapes=((400,),), steps=0)
    saved.save(tmp_path / "a")
    monkeypatch.setattr(_checkpoint, "_PIECE", 1 << 7)
    main, read, late = threading.get_ident(), _checkpoint.Stored._read, []

    def slow(self, raw, at):
        if threading.get_ident() != main:
            os.kill(os.getpid(), signal.SIGALRM)
            time.sleep(0.2)
            late.append(True)
        read(self, raw, at)

    def boom(*_):
        assert not late
        raise KeyboardInterrupt

    monkeypatch.setattr(_checkpoint.Stored, "_read", slow)
    before = signal.signal(signal.SIGALRM, boom)
    try:
        with pytest.raises(KeyboardInterrupt):
            opt.load(tmp_path / "a")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert late == [True]
    monkeypatch.undo()
    opt.load(tmp_path / "a")
    assert_same(everything(opt), everything(saved))


def test_an_error_of_the_other_half_is_told_and_nothing_is_kept(tmp_path, monkeypatch):
    saved, opt = make(shapes=((400,),)), make(seed=1, shapes=((400,),), steps=0)
    saved.save(tmp_path / "a")
    monkeypatch.setattr(_checkpoint, "_PIECE", 1 << 7)
    main, read = threading.get_ident(), _checkpoint.Stored._read

    def failing(self, raw, at):
        if threading.get_ident() != main:
            raise OSError("the disk")
        read(self, raw, at)

    monkeypatch.setattr(_checkpoint.Stored, "_read", failing)
    gc.disable()
    try:
        with pytest.raises(OSError, match="the disk"):
            opt.load(tmp_path / "a")
        gone = weakref.ref(opt._groups[0]._slots[0])
        del opt
        assert gone() is None
    finally:
        gc.enable()


# --- other threads ---------------------------------------------------------------------------------------------------


def in_a_thread(call):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_averages_are_left_whatever_another_thread_does():
    opt = make(ema_decay=0.5)
    before = everything(opt)
    inside, leave = threading.Event(), threading.Event()

    class Slow(list):
        def __iter__(self):  # while gradients are looked at
            inside.set()
            leave.wait(10)
            return super().__iter__()

    thread = threading.Thread(target=lambda: opt.accumulate(Slow(GRADS)))
    with opt.averaged_parameters():
        thread.start()
        inside.wait(10)
    leave.set()
    thread.join()
    assert opt.pending == 1
    opt.discard()
    assert_same(everything(opt), before)


@pytest.mark.parametrize("what", ["step", "assign"])
def test_options_that_are_replaced_while_a_schedule_computes(what):
    """Another thread loads: what was computed from the options before it does not go over them."""
    saved = make(lr=0.5, weight_decay=0.25)
    called = []

    def slow(t):
        if called:
            called.clear()
            in_a_thread(lambda: opt.load_state_dict(saved.state_dict()))
        return 0.001

    opt = make(seed=1, steps=1, lr=slow)
    if what == "step":
        called.append(True)
        with pytest.raises(RuntimeError, match=r"somebody else .* has changed the options of this optimizer meanwhile"):
            opt.step(GRADS)
    else:
        called.append(True)
        with pytest.raises(RuntimeError, match=r"somebody else .* has changed the options of this optimizer meanwhile"):
            opt.param_groups[0]["lr"] = slow
    assert_same(opt.state_dict(), saved.state_dict())
    assert (opt.param_groups[0]["lr"], opt.param_groups[0]["weight_decay"]) == (0.5, 0.25)
    opt.step(GRADS)


@pytest.mark.parametrize("what", ["option", "setting"])
def test_two_assignments_at_once(what, monkeypatch):
    """The second is made from what was there before the first: it is refused, and does not undo it."""
    opt = make()
    group, name = opt.param_groups[0], "check_options" if what == "option" else "check_settings"
    check = getattr(ac._optimizer, name)

    def late(*args):
        monkeypatch.undo()
        in_a_thread(lambda: group.update(eps=0.5) if what == "option" else setattr(opt, "seed", 7))
        return check(*args)

    monkeypatch.setattr(ac._optimizer, name, late)
    second = (lambda: group.update(lr=0.25)) if what == "option" else (lambda: setattr(opt, "max_grad_norm", 1.0))
    with pytest.raises(RuntimeError, match=r"somebody else .* has changed the options"):
        second()
    assert (group["eps"], opt.seed) == ((0.5, 0) if what == "option" else (1e-8, 7))
    assert (group["lr"], opt.max_grad_norm) == (1e-3, None)


def test_a_metric_that_comes_while_a_schedule_computes():
    called = []

    def slow(t):
        if called:
            called.clear()
            in_a_thread(lambda: opt.step(GRADS, metric=2.0))
        return 0.5

    opt = make(steps=0, lr=ac.schedules.plateau(0.5, factor=0.5, patience=0), on_nonfinite="skip")
    opt.step(GRADS, metric=1.0)
    opt.step([np.full((3, 4), np.nan, "f4"), None, None])  # skipped, so that the numbers of this t are there
    called.append(True)
    with pytest.raises(RuntimeError, match=r"somebody else .* has changed the options"):
        opt.param_groups[0]["weight_decay"] = slow
    assert opt.param_groups[0]["lr"] == 0.25


def test_a_schedule_can_change_nothing_while_a_load_asks_it():
    saved = make(lr=lambda t: 0.1)
    tries = []

    def meddling(t):
        if t == 3:
            for call in (opt.discard, lambda: opt.param_groups[0].update(eps=0.5), lambda: setattr(opt, "seed", 7)):
                with pytest.raises(RuntimeError, match="saves or loads it"):
                    call()
                tries.append(t)
        return 0.1

    opt = make(seed=1, steps=1, lr=meddling)
    opt.load_state_dict(saved.state_dict())
    assert tries == [3, 3, 3]
    assert opt.t == 3

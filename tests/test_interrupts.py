"""Ctrl-C wherever it may come, signal handlers that use the optimizer, and other threads at the worst moments.

Python looks for signals where a function is entered and where a call of C returns.  A profile function is called there
too, and what it raises comes out of there like an error of a signal handler.  So a KeyboardInterrupt is raised at the n-th
of these places, for every n, with no signal, no thread and no clock.
"""

import copy
import gc
import operator
import os
import sys
import threading
from contextlib import suppress
from functools import partial
from itertools import count

import numpy as np
import pytest
from support import assert_same, at, child, everything, in_another_thread, make

import adaptive_c as ac
from adaptive_c._checkpoint import file

GRADS = [np.ones((3, 4), "f4"), np.ones((), "f4"), np.ones(300, "f4")]


@pytest.fixture(autouse=True)
def dropped(monkeypatch):
    """What was raised where Python drops it: in destructors, and where the garbage collector runs, which is off here."""
    found = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: found.append(unraisable.exc_type))
    gc.disable()
    yield found
    gc.enable()


def interrupted(call, n, dropped):
    """Press Ctrl-C at the n-th place of a call: does it have so many?  The interrupt must come through."""
    dropped.clear()
    try:
        reached = at(n, call)
    except KeyboardInterrupt:
        return True
    assert not reached or KeyboardInterrupt in dropped, "a Ctrl-C was swallowed"
    return reached


def descriptors():
    return len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beside", [True, False])
def test_save(beside, tmp_path, monkeypatch, dropped):
    """The file is whole, the old one or the new, and one temporary file is left at most, which the next save removes."""
    monkeypatch.setattr(file, "_PIECE", 1 << 9)  # many pieces
    monkeypatch.setattr(os, "fsync", operator.index)  # a place as before, without the wait for a disk
    if not beside:  # without a second thread nothing goes on when the save has ended
        monkeypatch.setattr(file, "_start", lambda f, *args: False)
    path, other = tmp_path / "a", make(seed=1)
    old, new = make(), make(steps=4)
    opens = descriptors()
    for n in count(1, 2 if beside else 1):
        old.save(path)
        assert os.listdir(tmp_path) == ["a"]
        if not interrupted(lambda: new.save(path), n, dropped):
            break
        assert len(os.listdir(tmp_path)) <= 2
        other.load(path)
        assert_same(everything(other), everything(old if other.t == 3 else new))
        if not beside:  # one more where the interrupt comes when the folder has just been opened
            assert descriptors() <= opens + 1
    assert n > 100
    other.load(path)
    assert other.t == 4


@pytest.mark.parametrize("way", ["dict", "file"])
def test_load(way, tmp_path, dropped):
    """A second load makes it whole, and nothing is held."""
    saved, opt = make(lr=0.5), make(seed=1, steps=1)
    saved.accumulate(GRADS)
    saved.save(tmp_path / "a")
    d, want = copy.deepcopy(saved.state_dict()), everything(saved)
    load = (lambda: opt.load_state_dict(d)) if way == "dict" else (lambda: opt.load(tmp_path / "a"))
    opens = descriptors()
    if way == "dict":
        for p, q in zip(opt.param_groups[0]["params"], saved.param_groups[0]["params"], strict=True):
            p[...] = q
    for n in count(1):
        if not interrupted(load, n, dropped):
            break
        assert descriptors() == opens
        load()
        assert_same(everything(opt), want)
        opt.discard()
    assert n > 50
    assert_same(everything(opt), want)


def test_averaged_parameters(dropped):
    opt = make(ema_decay=0.5)
    before, average = everything(opt), opt.ema[0].copy()
    params = opt.param_groups[0]["params"]

    def look():
        with opt.averaged_parameters():
            assert (params[0] == average).all()
            assert opt.t == 3

    for n in count(1):
        reached = interrupted(look, n, dropped)
        assert_same(everything(opt), before)
        if not reached:
            break
    assert n > 3


def test_a_new_group(dropped):
    """It is there or it is not, and the other groups are the optimizer's."""
    for n in count(1):
        params = [np.zeros(3) for _ in range(4)]
        opt = ac.SGD([{"params": p} for p in params], lr=0.5)
        reached = interrupted(lambda: opt.add_param_group({"params": np.ones(7, "f4")}), n, dropped)  # noqa: B023
        more = len(opt.param_groups) - 4
        assert more in (0, 1)
        for group in opt.param_groups:
            group["lr"] = 0.25
        opt.step([np.ones(3)] * 4 + [None] * more)
        assert all((p == -0.25).all() for p in params)
        if not reached:
            break
    assert more == 1
    assert n > 30


CALLS = {
    "step": lambda opt: opt.step(GRADS, metric=2.0),
    "accumulate": lambda opt: opt.accumulate(GRADS),
    "rollback": lambda opt: opt.rollback(),
    "assign": lambda opt: opt.param_groups[0].update(lr=0.125),
    "setting": lambda opt: setattr(opt, "max_grad_norm", 0.5),
}


@pytest.mark.parametrize("what", CALLS)
def test_a_change_is_whole_or_not_at_all(what, dropped):
    """What the optimizer shows is what it steps with, and a metric belongs to its step."""
    lr = ac.schedules.plateau(0.5, factor=0.5, patience=0)

    def start():
        opt = make(cls=ac.SGD, lr=0.25 if what == "assign" else lr, keep_undo=True, steps=0, max_grad_norm=1e6)
        opt.step(GRADS, metric=None if what == "assign" else 1.0)
        if what == "rollback":
            opt.step(GRADS, metric=2.0)
        return opt

    def shown(opt):
        return opt.param_groups[0]["lr"], opt.max_grad_norm, opt.t, opt.pending

    def go_on(opt):
        opt.accumulate(GRADS)
        opt.step()

    ends = []
    for call in (lambda opt: None, CALLS[what]):
        opt = start()
        call(opt)
        before = shown(opt)
        go_on(opt)
        ends.append((before, everything(opt)))
    for n in count(1):
        opt = start()
        reached = interrupted(lambda: CALLS[what](opt), n, dropped)  # noqa: B023
        before = shown(opt)
        assert before in (ends[0][0], ends[1][0])
        go_on(opt)
        assert_same(everything(opt), ends[before == ends[1][0]][1])
        if not reached:
            break
    assert before == ends[1][0]


# --- signal handlers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["step", "save", "load"])
def test_a_signal_handler_that_saves(what, tmp_path):
    """It is refused inside of a step, a save or a load, with the remedy, and never damages a file."""
    path, other = tmp_path / "a", make(seed=1)
    opt = make()
    call = {"step": lambda: opt.step(GRADS), "save": lambda: opt.save(path), "load": lambda: opt.load(path)}[what]
    opt.save(path)
    saved, told = 0, []

    def handler():
        nonlocal saved
        try:
            opt.save(path)
            saved += 1
        except RuntimeError as error:
            told.append(str(error))
            raise

    for n in count(1):
        refused = len(told)
        try:
            if not at(n, call, handler):
                break
            assert len(told) == refused, "the error of a signal handler was swallowed"
        except RuntimeError as error:
            assert str(error) == told[-1]  # noqa: PT017
        if n % 4 == 0:
            other.load(path)
    assert saved  # before the call has begun with its work
    assert told or what == "step"  # which may be one call of the core
    assert all("a signal handler: set a flag, and act on it after the step" in message for message in told)


SIGNALS = """
import signal, numpy as np
for handler in (signal.SIG_IGN, signal.SIG_DFL, signal.default_int_handler, lambda *_: None):
    signal.signal(signal.SIGINT, handler)
    import adaptive_c as ac
    p = np.ones(300_000, "f4")
    opt = ac.AdamW(p, n_threads=2)
    opt.step(p * 2)
    assert signal.getsignal(signal.SIGINT) == handler
"""


def test_signals_are_the_callers():
    child(SIGNALS)


# --- other threads ---------------------------------------------------------------------------------------------------


def test_averages_are_left_whatever_another_thread_does():
    opt = make(ema_decay=0.5)
    before = everything(opt)
    inside, leave = threading.Event(), threading.Event()

    class Slow(list):
        def __iter__(self):  # while gradients are looked at
            inside.set()
            leave.wait(60)
            return super().__iter__()

    refused = []

    def accumulate():
        try:
            opt.accumulate(Slow(GRADS))
        except RuntimeError as error:
            refused.append(error)

    thread = threading.Thread(target=accumulate)
    with opt.averaged_parameters():
        thread.start()
        inside.wait(60)
    leave.set()
    thread.join()
    assert opt.pending == 1 - len(refused)
    opt.discard()
    assert_same(everything(opt), before)


def asked():
    """A schedule of the user's that calls something once, when it is told to."""
    calls = []

    def schedule(t):
        if calls:
            calls.pop()()
        return 0.001

    return calls, schedule


def test_a_load_while_a_step_asks_a_schedule():
    """The step goes first: the load is refused, and leaves nothing."""
    saved, refused = make(lr=0.5, weight_decay=0.25), []
    calls, schedule = asked()
    opt, alone = make(seed=1, steps=1, lr=schedule), make(seed=1, steps=1, lr=lambda t: 0.001)

    def load():
        with pytest.raises(RuntimeError, match="this optimizer is in use"):
            in_another_thread(lambda: opt.load_state_dict(saved.state_dict()))
        refused.append(True)

    calls.append(load)
    opt.step(GRADS)
    alone.step(GRADS)
    assert refused
    assert_same(everything(opt), everything(alone))


def test_a_load_while_an_assignment_asks_a_schedule():
    """The load is whole, and the option is assigned after it: what was checked against older options is checked again."""
    saved = make(lr=0.5, weight_decay=0.25)
    calls, schedule = asked()
    opt, other = make(seed=1, steps=1), make(seed=1, steps=1)
    calls.append(lambda: in_another_thread(lambda: opt.load_state_dict(saved.state_dict())))
    opt.param_groups[0]["lr"] = schedule
    other.load_state_dict(saved.state_dict())
    other.param_groups[0]["lr"] = schedule
    assert_same(everything(opt), everything(other))
    assert opt.param_groups[0]["weight_decay"] == 0.25


def test_two_assignments_at_once():
    """Neither undoes the other."""
    opt = make()
    group = opt.param_groups[0]
    calls, schedule = asked()
    calls.append(lambda: in_another_thread(lambda: group.update(eps=0.5)))
    group["lr"] = schedule
    assert "lr" in group.schedules
    assert group["eps"] == 0.5


def test_an_assignment_at_any_place_of_another_one_counts():
    """What was checked against an option that is not in force any more is checked again."""
    for n in count(1):
        group = make(cls=ac.SGD, lr=0.1, momentum=0.5).param_groups[0]

        def assign(group=group):
            with suppress(ValueError):  # whichever of the two comes second is refused
                group["nesterov"] = True

        reached = True
        with suppress(ValueError):
            reached = at(n, partial(group.update, momentum=0.0), partial(in_another_thread, assign))
        assert group["momentum"] > 0 or not group["nesterov"]
        if not reached:
            break


def test_a_setting_at_any_place_of_another_one_is_not_lost():
    for n in count(1):
        opt = make()
        seed = partial(in_another_thread, partial(setattr, opt, "seed", 7))
        reached = at(n, partial(setattr, opt, "max_grad_norm", 3.0), seed)
        assert (opt.max_grad_norm, opt.seed) == (3.0, 7 if reached else 0)
        if not reached:
            break


def test_a_step_while_an_assignment_asks_a_schedule():
    """A step is not refused because another thread is about to assign, and the metric that comes with it counts."""
    calls, schedule = asked()
    opt = make(steps=0, lr=ac.schedules.plateau(0.5, factor=0.5, patience=0))
    opt.step(GRADS, metric=1.0)
    calls.append(lambda: in_another_thread(lambda: opt.step(GRADS, metric=2.0)))
    opt.param_groups[0]["weight_decay"] = schedule
    assert opt.t == 2
    assert opt.param_groups[0]["lr"] == 0.25
    assert "weight_decay" in opt.param_groups[0].schedules


def test_a_schedule_can_change_nothing_while_a_load_asks_it():
    saved = make(lr=lambda t: 0.1)
    tries = []

    def meddling(t):
        if t == 3:
            for call in (opt.discard, lambda: opt.param_groups[0].update(eps=0.5), lambda: setattr(opt, "seed", 7)):
                with pytest.raises(RuntimeError, match="this optimizer is in use"):
                    call()
                tries.append(t)
        return 0.1

    opt = make(seed=1, steps=1, lr=meddling)
    opt.load_state_dict(saved.state_dict())
    assert tries == [3, 3, 3]
    assert opt.t == 3

"""An optimizer is taken before its schedules run: nothing else steps or changes it until the step is over.

A schedule may be any Python, and while it runs other threads and signal handlers run too.
"""

import contextlib
import copy
import itertools
import signal
import sys
import threading

import numpy as np
import pytest
from support import race

import adaptive_c as ac

LR = [1.0, 10.0, 100.0, 1000.0]
ONE = np.ones(1)


class Hooked:
    """A schedule that does something else, once, in the middle of a step."""

    def __init__(self):
        self.hook = None

    def __call__(self, t):
        if self.hook is not None:
            hook, self.hook = self.hook, None
            hook()
        return LR[t]


def make(**options):
    """An optimizer that has taken one step (whose number the constructor may know), its parameter and its schedule."""
    p, schedule = np.zeros(1), Hooked()
    opt = ac.SGD(p, lr=schedule, ema_decay=0.5, keep_undo=True, **options)
    opt.step(ONE)
    return opt, p, schedule


def in_thread(call):
    """Call it in another thread and wait; what it raises is raised here."""
    raised = []

    def work():
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


CHANGES = {
    "step": lambda opt, path: opt.step(ONE),
    "accumulate": lambda opt, path: opt.accumulate(ONE),
    "rollback": lambda opt, path: opt.rollback(),
    "t": lambda opt, path: setattr(opt, "t", 3),
    "lr": lambda opt, path: opt.param_groups[0].__setitem__("lr", 5.0),
    "another option": lambda opt, path: opt.param_groups[0].__setitem__("weight_decay", 0.5),
    "bounds": lambda opt, path: opt.param_groups[0].__setitem__("bounds", (0.0, 0.0)),
    "a setting": lambda opt, path: setattr(opt, "max_grad_norm", 0.5),
    "add_param_group": lambda opt, path: opt.add_param_group({"params": np.ones(1)}),
    "averaged_parameters": lambda opt, path: opt.averaged_parameters().__enter__(),
    "state_dict": lambda opt, path: opt.state_dict(),
    "load_state_dict": lambda opt, path: opt.load_state_dict(ac.SGD(np.zeros(1), ema_decay=0.5).state_dict()),
    "save": lambda opt, path: opt.save(path),
}


@pytest.mark.parametrize("where", ["in the schedule itself", "in another thread"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_schedule_changes_nothing_of_its_optimizer(what, where, tmp_path):
    opt, p, schedule = make(weight_decay=0.25)
    twin, q, _ = make(weight_decay=0.25)
    run = in_thread if where == "in another thread" else lambda call: call()
    refused = []

    def hook():
        with pytest.raises(RuntimeError) as raised:
            run(lambda: CHANGES[what](opt, tmp_path / "a"))
        refused.append(str(raised.value))

    schedule.hook = hook
    opt.step(ONE)
    twin.step(ONE)
    assert len(refused) == 1
    assert (opt.t, p[0], opt.ema[0]) == (2, q[0], twin.ema[0])
    assert opt.param_groups[0].schedules["lr"] is schedule
    assert not list(tmp_path.iterdir())
    for each in (opt, twin):  # it is free again
        each.step(ONE)
    assert (opt.t, p[0]) == (3, q[0])


def test_a_step_inside_a_schedule_is_refused_and_the_outer_step_uses_its_own_number():
    opt, p, schedule = make()
    inner = []

    def hook():
        with pytest.raises(RuntimeError):
            in_thread(lambda: opt.step(ONE))
        inner.append(True)

    schedule.hook = hook
    opt.step(ONE)
    assert inner
    assert (opt.t, p[0]) == (2, -11.0)
    in_thread(lambda: opt.step(ONE))
    assert (opt.t, p[0]) == (3, -111.0)


def test_a_step_of_accumulated_gradients_is_guarded_too():
    opt, p, schedule = make()
    opt.accumulate(ONE)
    refused = []

    def hook():
        for call in (opt.step, opt.discard):
            with pytest.raises(RuntimeError):
                in_thread(call)
            refused.append(call)

    schedule.hook = hook
    opt.step()
    assert len(refused) == 2
    assert (opt.t, opt.pending, p[0]) == (2, 0, -11.0)


def test_a_refusal_that_a_schedule_lets_through_undoes_nothing_and_leaves_the_optimizer_free():
    opt, p, schedule = make()
    schedule.hook = lambda: opt.step(ONE)
    with pytest.raises(RuntimeError):
        opt.step(ONE)
    assert (opt.t, p[0]) == (1, -1.0)
    opt.step(ONE)
    assert (opt.t, p[0]) == (2, -11.0)


def test_a_call_that_outlasts_the_averages_goes_on_alone():
    """The block ends while `opt.t = 1` runs, which is allowed inside it."""
    opt, p, schedule = make()
    block = opt.averaged_parameters()
    block.__enter__()
    left = []

    def hook():
        block.__exit__(None, None, None)
        left.append(p[0])
        with pytest.raises(RuntimeError, match="this optimizer is in use"):
            in_thread(lambda: opt.step(ONE))

    schedule.hook = hook
    opt.t = 1
    assert left == [-1.0]
    opt.step(ONE)
    assert (opt.t, p[0]) == (2, -11.0)


def test_an_error_of_a_schedule_leaves_the_optimizer_free():
    opt, p, schedule = make()

    def hook():
        raise OverflowError("mine")

    schedule.hook = hook
    with pytest.raises(OverflowError, match="mine"):
        opt.step(ONE)
    assert (opt.t, p[0]) == (1, -1.0)
    opt.step(ONE)
    assert (opt.t, p[0]) == (2, -11.0)


@pytest.fixture
def handler():
    """Installs a handler of SIGUSR1; afterwards the old one is back."""
    old = signal.getsignal(signal.SIGUSR1)
    yield lambda call: signal.signal(signal.SIGUSR1, lambda *_: call())
    signal.signal(signal.SIGUSR1, old)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="needs a signal of our own")
def test_a_signal_handler_that_steps_inside_a_schedule_is_refused(handler):
    opt, p, schedule = make()
    refused = []

    def step():
        try:
            opt.step(ONE)
        except RuntimeError as error:
            refused.append(str(error))

    handler(step)
    schedule.hook = lambda: signal.raise_signal(signal.SIGUSR1)
    opt.step(ONE)
    assert len(refused) == 1
    assert (opt.t, p[0]) == (2, -11.0)

    handler(lambda: opt.step(ONE))  # one that catches nothing: the outer step raises, and has changed nothing
    schedule.hook = lambda: signal.raise_signal(signal.SIGUSR1)
    with pytest.raises(RuntimeError):
        opt.step(ONE)
    assert (opt.t, p[0]) == (2, -11.0)
    opt.step(ONE)
    assert (opt.t, p[0]) == (3, -111.0)


@pytest.mark.parametrize("run", [in_thread, lambda call: call()], ids=["another thread", "the schedule itself"])
def test_reading_inside_a_schedule_works(run):
    p, schedule = np.zeros(1), Hooked()
    opt = ac.Adam(p, lr=schedule, max_grad_norm=1.0)
    opt.step(ONE)
    read = {}

    def look():
        group = opt.param_groups[0]
        read.update(t=opt.t, lr=group["lr"], betas=group["betas"], params=group["params"][0], pending=opt.pending)
        read.update(moment=opt.state["exp_avg"].copy(), step=int(opt.state["step"]), norm=opt.grad_norm)
        read.update(schedule=group.schedules["lr"], skipped=opt.skipped_steps, shown=repr(opt))

    before = (opt.state["exp_avg"].copy(), opt.grad_norm, p[0])
    schedule.hook = lambda: run(look)
    opt.step(ONE)
    assert (read["t"], read["lr"], read["betas"], read["step"]) == (1, 10.0, (0.9, 0.999), 1)
    assert (read["moment"], read["norm"], read["params"]) == before
    assert (read["schedule"], read["pending"], read["skipped"]) == (schedule, 0, 0)
    assert "t=1" in read["shown"]
    assert opt.t == 2


@pytest.fixture
def eager():
    """Threads take turns as often as the interpreter can."""
    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(old)


def number(t):
    return float(2 ** (t % 40))


@pytest.mark.parametrize("way", ["step", "accumulated", "pair"])
def test_steps_of_many_threads_use_the_numbers_of_their_own_steps(way, eager):
    for _ in range(30):
        p, zero = np.zeros(1), (lambda t: 0.0)
        # without a memory Lion's step is lr sign(g)
        opt = ac.Lion(p, lr=number, betas=(zero, zero)) if way == "pair" else ac.SGD(p, lr=number)

        def step(opt=opt):
            if way == "accumulated":
                with contextlib.suppress(ValueError):  # another thread's step has taken the sums
                    opt.accumulate(ONE)
                    opt.step()
            else:
                opt.step(ONE)

        race(step, threads=4, times=60)
        assert p[0] == -sum(map(number, range(opt.t)))


def test_options_assigned_during_steps_of_another_thread_are_whole(eager):
    """lr and the schedule of it change between steps, never within one."""
    for _ in range(10):
        p = np.zeros(1)
        opt = ac.SGD(p, lr=lambda t: 1.0)
        group = opt.param_groups[0]
        choices = itertools.cycle([lambda t: 2.0, 4.0, lambda t: 1.0])

        def assign(group=group, choices=choices):
            group["lr"] = next(choices)

        def step(opt=opt, p=p):
            opt.step(ONE)

        thread = threading.Thread(target=lambda assign=assign: race(assign, threads=1, times=100))
        thread.start()
        race(step, threads=2, times=100)
        thread.join()
        last, t = p[0], opt.t
        assert t <= -last <= 4 * t
        assert last == round(last)
        group["lr"] = 0.5
        opt.step(ONE)
        assert p[0] == last - 0.5


def test_metrics_of_many_threads_are_read_one_at_a_time(eager):
    schedule = ac.schedules.plateau(1024.0, factor=0.5, patience=3)
    for _ in range(10):
        p = np.zeros(1)
        opt = ac.SGD(p, lr=schedule)
        race(lambda opt=opt: opt.step(ONE, metric=1.0), threads=4, times=15)
        q = np.zeros(1)
        alone = ac.SGD(q, lr=schedule)
        for _ in range(opt.t):
            alone.step(ONE, metric=1.0)
        assert p[0] == q[0]
        assert copy.deepcopy(opt.state_dict())["groups"][0]["schedules"] == alone.state_dict()["groups"][0]["schedules"]

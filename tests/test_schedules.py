"""Schedules: their values against PyTorch's, and hyperparameters, groups and metrics that follow them."""

import gc
import inspect
import json
import pickle
import re
import sys
import warnings
import weakref
from dataclasses import MISSING, dataclass, fields
from pathlib import Path

import numpy as np
import pytest
from cases import CASES
from hypothesis import given
from hypothesis import strategies as st
from support import (
    CHUNK,
    arrays_in,
    assert_same,
    assert_same_bits,
    build,
    everything,
    gradients,
    in_another_thread,
    step_range,
)

import adaptive_c as ac
from adaptive_c import optimizers
from adaptive_c import schedules as s

STEPS = 1000


# --- values ----------------------------------------------------------------------------------------------------------


def torch_values(make, key="lr", lr=0.3, metrics=None, steps=STEPS):
    """What torch's schedule gives before each of its steps; key: "lr", or 0 for the first of betas."""
    import torch

    opt = torch.optim.Adam([torch.zeros(1)], lr=lr)
    values = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # opt.step() is not called
        scheduler = make(torch.optim.lr_scheduler, opt)
        for t in range(steps):
            values.append(opt.param_groups[0]["lr"] if key == "lr" else opt.param_groups[0]["betas"][key])
            if t < steps - 1:
                scheduler.step(*(() if metrics is None else (metrics[t],)))
    return values


ONE_CYCLES = [
    {"pct_start": pct, "anneal_strategy": strategy, "three_phase": three, "div_factor": div, "final_div_factor": final}
    for pct, div, final in ((0.3, 25.0, 1e4), (0.45, 7.0, 3.0), (0.0, 25.0, 1e4), (0.7, 10.0, 100.0))
    for strategy in ("cos", "linear")
    for three in (False, True)
]

# (id, our schedule, torch's)
SAME = [
    ("constant", s.constant(0.3), lambda L, o: L.LambdaLR(o, lambda t: 1.0)),
    ("constant-factor", s.chain([0.3 * 0.2, 0.3], [70]), lambda L, o: L.ConstantLR(o, 0.2, 70)),
    ("step", s.step(0.3, 30), lambda L, o: L.StepLR(o, 30)),
    ("step-gamma", s.step(0.3, 7, gamma=0.9), lambda L, o: L.StepLR(o, 7, 0.9)),
    ("multistep", s.multistep(0.3, [10, 11, 500], gamma=0.4), lambda L, o: L.MultiStepLR(o, [10, 11, 500], 0.4)),
    ("exponential", s.exponential(0.3, 0.997), lambda L, o: L.ExponentialLR(o, 0.997)),
    ("linear", s.linear(0.3 * 0.25, 500, end=0.3), lambda L, o: L.LinearLR(o, 0.25, 1.0, 500)),
    ("linear-down", s.linear(0.3, 1001, end=0.03), lambda L, o: L.LinearLR(o, 1.0, 0.1, 1001)),
    ("polynomial", s.polynomial(0.3, 400), lambda L, o: L.PolynomialLR(o, 400)),
    ("polynomial-power", s.polynomial(0.3, 1200, power=2.5), lambda L, o: L.PolynomialLR(o, 1200, 2.5)),
    ("cosine", s.cosine(0.3, 1200, end=0.01), lambda L, o: L.CosineAnnealingLR(o, 1200, 0.01)),
    ("cosine-to-its-end", s.cosine(0.3, STEPS - 1), lambda L, o: L.CosineAnnealingLR(o, STEPS - 1)),
    ("restarts", s.cosine_restarts(0.3, 90, end=0.01), lambda L, o: L.CosineAnnealingWarmRestarts(o, 90, 1, 0.01)),
    ("restarts-mult", s.cosine_restarts(0.3, 7, mult=3), lambda L, o: L.CosineAnnealingWarmRestarts(o, 7, 3)),
    (
        "warmup",
        s.warmup(s.cosine(0.3, 1200), 100, start=0.03),
        lambda L, o: L.SequentialLR(o, [L.LinearLR(o, 0.1, 1.0, 100), L.CosineAnnealingLR(o, 1200)], [100]),
    ),
    (
        "chain",
        s.chain([0.06, s.exponential(0.3, 0.99), s.step(0.3, 40)], [50, 300]),
        lambda L, o: L.SequentialLR(o, [L.ConstantLR(o, 0.2, 10**6), L.ExponentialLR(o, 0.99), L.StepLR(o, 40)], [50, 300]),
    ),
    *(
        (
            "one_cycle-" + "-".join(map(str, options.values())),
            s.one_cycle(0.3, STEPS, **options),
            lambda L, o, options=options: L.OneCycleLR(o, 0.3, STEPS, cycle_momentum=False, **options),
        )
        for options in ONE_CYCLES
    ),
]  # fmt: skip


@pytest.mark.later("torch")
@pytest.mark.parametrize(("ours", "torchs"), [case[1:] for case in SAME], ids=[case[0] for case in SAME])
def test_values_are_torchs(ours, torchs):
    got = [ours(t) for t in range(STEPS)]
    assert all(type(x) is float for x in got)
    np.testing.assert_allclose(got, torch_values(torchs), rtol=1e-12, atol=1e-16)


@pytest.mark.later("torch")
@pytest.mark.parametrize("strategy", ["cos", "linear"])
@pytest.mark.parametrize("three", [False, True])
def test_one_cycle_of_a_momentum_is_torchs(strategy, three):
    ours = s.one_cycle(0.85, STEPS, 0.3, strategy, div_factor=0.85 / 0.95, final_div_factor=1.0, three_phase=three)
    theirs = torch_values(lambda L, o: L.OneCycleLR(o, 0.3, STEPS, anneal_strategy=strategy, three_phase=three), key=0)
    np.testing.assert_allclose([ours(t) for t in range(STEPS)], theirs, rtol=1e-12)


PLATEAUS = [
    {},
    {"factor": 0.5, "patience": 3, "threshold": 0.05},
    {"factor": 0.5, "patience": 0, "mode": "max"},
    {"patience": 2, "threshold": 0.02, "threshold_mode": "abs", "cooldown": 5},
    {"factor": 0.9, "patience": 1, "threshold_mode": "abs", "mode": "max", "min": 0.1},
    {"factor": 0.7, "patience": 2, "cooldown": 1, "eps": 0.02},
    {"factor": 0.999, "patience": 0, "eps": 0.0, "threshold": 0.0},
]


@pytest.mark.later("torch")
@pytest.mark.parametrize("options", PLATEAUS, ids=str)
def test_plateau_is_torchs(options):
    rng = np.random.default_rng(5)
    metrics = (np.exp(-np.arange(STEPS) / 300) + 0.05 * rng.normal(size=STEPS) + 1).tolist()
    metrics[100:110] = [float("nan")] * 10
    theirs = {("min_lr" if key == "min" else key): value for key, value in options.items()}
    want = torch_values(lambda L, o: L.ReduceLROnPlateau(o, **theirs), metrics=metrics)
    assert len(set(want)) > 2
    ours, got = s.plateau(0.3, **options), []
    for t in range(STEPS):
        got.append(ours(t))
        ours = ours.observe(t, metrics[t])
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_metric_that_is_not_finite_is_no_improvement(mode):
    nan, inf = float("nan"), float("inf")
    schedule = s.plateau(1.0, 0.5, patience=1, mode=mode)
    for metric in (nan, inf, -inf, nan):
        schedule = schedule.observe(0, metric)
    assert (schedule(0), schedule.best) == (0.25, None)
    schedule = schedule.observe(0, 3.0).observe(0, inf).observe(0, -inf)
    assert (schedule(0), schedule.best) == (0.125, 3.0)


def test_inverse_sqrt_is_noams():
    d, w = 512, 40
    schedule = s.inverse_sqrt((d * w) ** -0.5, w)
    noam = [d**-0.5 * min(n**-0.5, n * w**-1.5) for n in range(1, STEPS + 1)]
    np.testing.assert_allclose([schedule(t) for t in range(STEPS)], noam, rtol=1e-12)
    assert s.inverse_sqrt(2.0)(3) == 1.0


def test_behind_the_end_the_last_value_stays():
    for schedule, end in [
        (s.linear(1.0, 10, end=0.25), 0.25),
        (s.polynomial(1.0, 10, power=2.0, end=0.25), 0.25),
        (s.cosine(1.0, 10, end=0.25), 0.25),
        (s.one_cycle(1.0, 11, div_factor=2.0, final_div_factor=2.0), 0.25),
        (s.warmup(s.cosine(1.0, 5, end=0.25), 5), 0.25),
        (s.chain([1.0, s.linear(0.5, 5, end=0.25)], [5]), 0.25),
        (s.multistep(1.0, [5, 10], gamma=0.5), 0.25),
    ]:
        assert [schedule(t) for t in (10, 11, 10**6, 2**61)] == [end] * 4, schedule
        assert schedule(9) != end


def test_small_cycles_divide_by_no_zero():
    for steps in (1, 2, 3, 10):
        for three in (False, True):
            for pct in (0.0, 1 / steps, 0.5, 1.0):
                cycle = s.one_cycle(1.0, steps, pct, three_phase=three)
                assert all(0 <= cycle(t) <= 1 for t in range(steps + 2)), cycle


# --- the objects -----------------------------------------------------------------------------------------------------

numbers = st.floats(1e-6, 1e6)
counts = st.integers(1, 10**6)
factors = st.floats(0, 0.99)
milestones = st.lists(counts, max_size=4, unique=True).map(sorted)
leaves = st.one_of(
    st.builds(s.constant, st.floats(allow_nan=False, allow_infinity=False)),
    st.builds(s.step, numbers, counts, factors),
    st.builds(s.multistep, numbers, milestones, factors),
    st.builds(s.exponential, numbers, factors),
    st.builds(s.linear, numbers, counts, numbers),
    st.builds(s.polynomial, numbers, counts, st.floats(0, 5), numbers),
    st.builds(s.cosine, numbers, counts, numbers),
    st.builds(s.cosine_restarts, numbers, counts, st.integers(1, 3), numbers),
    st.builds(s.inverse_sqrt, numbers, counts),
    st.builds(s.one_cycle, numbers, counts, st.floats(0, 1), st.sampled_from(["cos", "linear"]), numbers, numbers,
              st.booleans()),
    st.builds(s.plateau, numbers, factors, st.integers(0, 5), numbers, mode=st.sampled_from(["min", "max"]),
              threshold_mode=st.sampled_from(["rel", "abs"]), cooldown=st.integers(0, 3), min=numbers, eps=numbers,
              value=st.none() | numbers, best=st.none() | numbers, num_bad_epochs=st.integers(0, 5),
              cooldown_counter=st.integers(0, 5)),
)  # fmt: skip
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.builds(s.warmup, inner | numbers, counts, numbers),
        st.lists(inner | numbers, min_size=1, max_size=3).flatmap(
            lambda parts: st.lists(counts, min_size=len(parts) - 1, max_size=len(parts) - 1, unique=True).map(
                lambda steps: s.chain(parts, sorted(steps))
            )
        ),
    ),
    max_leaves=5,
)


@given(schedule=trees, step=st.integers(0, 10**7), metrics=st.lists(st.floats(), max_size=5))
def test_round_trips(schedule, step, metrics):
    """As a dict through JSON, as its own repr, pickled: an equal object with equal values, whatever it has seen."""
    for metric in metrics:
        schedule = schedule.observe(step, metric)
    assert schedule.reads_metric == ("plateau(" in repr(schedule))
    copies = [
        s.from_dict(json.loads(json.dumps(schedule.to_dict(), allow_nan=False))),
        eval(repr(schedule), vars(s)),
        pickle.loads(pickle.dumps(schedule)),
    ]
    for copy in copies:
        assert copy == schedule
        assert hash(copy) == hash(schedule)
        assert copy(step) == schedule(step)
        assert [copy.observe(step, m) for m in metrics] == [schedule.observe(step, m) for m in metrics]


def test_objects_are_values():
    a = s.cosine(0.1, 100)
    assert a == s.cosine(0.1, np.int64(100), end=0)
    assert a != s.cosine(0.1, 101)
    assert a != s.linear(0.1, 100)
    assert repr(a) == "cosine(base=0.1, steps=100)"
    assert repr(s.warmup(0.5, 10)) == "warmup(of=constant(base=0.5), steps=10)"
    assert a.to_dict() == {"schedule": "cosine", "base": 0.1, "steps": 100, "end": 0.0}
    with pytest.raises(AttributeError):
        a.base = 1.0
    milestones = [1, 2]
    b = s.multistep(1.0, milestones)
    milestones.append(3)
    assert b.milestones == (1, 2)


def test_a_function_of_your_own_inside_another_schedule():
    inner = s.warmup(s.chain([lambda t: t * 0.5, 7.0], [4]), 2)
    assert [inner(t) for t in range(8)] == [0, 0, 0, 0.5, 1.0, 1.5, 7, 7]
    assert inner.observe(3, 1.0) is inner
    with pytest.raises(TypeError, match=r"<lambda>.*can't be stored; give it again after loading"):
        inner.to_dict()


class Stairs(s.step):
    """A schedule class of the user's, which from_dict could not make."""


class Foreign:
    def __call__(self, t):
        return 0.5

    def to_dict(self):
        return {"schedule": "constant", "base": 7.0}


@pytest.mark.parametrize("part", [Stairs(0.5, 2), Foreign()])
def test_only_what_from_dict_can_make_is_described(part):
    for schedule in (part, s.warmup(part, 2), s.chain([0.1, s.warmup(part, 2)], [3])):
        if isinstance(schedule, s.Schedule):
            with pytest.raises(TypeError, match="can't be stored; give it again after loading"):
                schedule.to_dict()
        opt = ac.Adam(np.ones(3), lr=schedule, betas=(schedule, 0.5))
        about = opt.state_dict()["groups"][0]["schedules"]
        assert "Foreign" not in str(about)
        assert "Stairs" not in str(about)
        assert about["betas"] == [about["lr"], 0.5]
        assert str(about["lr"]).count("None") == 1  # where the part is
        opt.load_state_dict(opt.state_dict())  # it has them
        assert opt.param_groups[0].schedules["lr"] == schedule


def test_a_plateau_inside_another_schedule_sees_what_comes_in_its_time():
    tree = s.chain([s.warmup(s.plateau(1.0, 0.5, patience=0), 2), s.plateau(8.0, 0.5, patience=0)], [5])
    for t in range(9):
        tree = tree.observe(t, 1.0)
    # steps 2 to 4 are the first plateau's: its best, and two that are no better; 5 to 8 the second's
    assert tree.schedules[0].of(0) == 0.25
    assert tree(9) == 1.0


BAD = [
    (lambda: s.cosine("fast", 10), TypeError, "cosine: base must be a number, got 'fast'"),
    (lambda: s.cosine(float("nan"), 10), ValueError, r"cosine: base must be in \(-inf, inf\), got nan"),
    (lambda: s.cosine(0.1, 0), ValueError, "cosine: steps must be at least 1, got 0"),
    (lambda: s.cosine(0.1, 10.0), TypeError, "cosine: steps must be an integer, got 10.0"),
    (lambda: s.linear(0.1, True), TypeError, "linear: steps must be an integer, got True"),
    (lambda: s.linear(0.1, 10, end=float("inf")), ValueError, "linear: end must be in"),
    (lambda: s.step(0.1, 0), ValueError, "step: step_size must be at least 1"),
    (lambda: s.step(0.1, 5, gamma=-1), ValueError, r"step: gamma must be in \[0, inf\), got -1"),
    (lambda: s.multistep(0.1, 5), TypeError, "multistep: milestones must be a list of step numbers, got 5"),
    (lambda: s.multistep(0.1, [5, 5]), ValueError, r"multistep: milestones must ascend, got \[5, 5\]"),
    (lambda: s.multistep(0.1, [5, 0]), ValueError, r"multistep: milestones\[1\] must be at least 1, got 0"),
    (lambda: s.polynomial(0.1, 5, power=-1.0), ValueError, "polynomial: power must be in"),
    (lambda: s.cosine_restarts(0.1, 5, mult=0), ValueError, "cosine_restarts: mult must be at least 1"),
    (lambda: s.inverse_sqrt(0.1, 0), ValueError, "inverse_sqrt: warmup_steps must be at least 1"),
    (lambda: s.one_cycle(0.1, 5, pct_start=1.5), ValueError, r"one_cycle: pct_start must be in \[0, 1\], got 1.5"),
    (lambda: s.one_cycle(0.1, 5, anneal_strategy="sine"), ValueError, "anneal_strategy must be 'cos' or 'linear', got 'sine'"),
    (lambda: s.one_cycle(0.1, 5, div_factor=0), ValueError, r"div_factor must be in \(0, inf\)"),
    (lambda: s.one_cycle(0.1, 5, three_phase=1), TypeError, "three_phase must be True or False"),
    (lambda: s.plateau(0.1, factor=1.0), ValueError, r"plateau: factor must be in \[0, 1\), got 1.0"),
    (lambda: s.plateau(0.1, patience=-1), ValueError, "plateau: patience must be at least 0"),
    (lambda: s.plateau(0.1, mode="best"), ValueError, "plateau: mode must be 'min' or 'max', got 'best'"),
    (lambda: s.warmup("no", 5), TypeError, "warmup: of must be a number, got 'no'"),
    (lambda: s.chain([], []), TypeError, r"chain: schedules must be a list of schedules, got \[\]"),
    (lambda: s.chain([1.0, "no"], [5]), TypeError, r"chain: schedules\[1\] must be a number"),
    (lambda: s.chain([1.0, 2.0], []), ValueError, "chain: 2 schedules have 1 milestones between them, got 0"),
    (lambda: s.from_dict([1]), TypeError, r"a schedule is described by a dict, got \[1\]"),
    (lambda: s.from_dict({"schedule": "sine"}), ValueError, "names the schedule 'sine'; there is constant, step, "),
    (lambda: s.from_dict({"base": 1.0}), ValueError, "names the schedule None"),
    (lambda: s.from_dict({"schedule": "step", "base": 1.0}), ValueError, "step needs 'step_size'"),
    (lambda: s.from_dict({"schedule": "constant", "base": 1.0, "end": 0}), ValueError, "constant has no 'end'; it has base"),
    (lambda: s.from_dict({"schedule": "constant", "base": "1"}), TypeError, "constant: base must be a number"),
    (lambda: s.from_dict({"schedule": "warmup", "of": {"schedule": "x"}, "steps": 1}), ValueError, "names the schedule 'x'"),
    (lambda: s.cosine(0.1, 5).plot(0), ValueError, "steps must be at least 1, got 0"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), BAD)
def test_bad_schedules(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    from matplotlib import pyplot

    ax = s.cosine(1.0, 100).plot()
    assert s.linear(1.0, 10).plot(20, ax=ax, color="k") is ax
    first, second = ax.lines
    assert list(first.get_ydata()) == [s.cosine(1.0, 100)(t) for t in range(101)]
    assert list(second.get_xdata()) == list(range(20))
    assert ax.get_xlabel() == "step"
    pyplot.close(ax.figure)
    every = [s.constant(1.0), s.step(1.0, 5), s.multistep(1.0, [5, 10]), s.multistep(1.0, []), s.exponential(1.0, 0.9),
             s.cosine_restarts(1.0, 5), s.inverse_sqrt(1.0), s.one_cycle(1.0, 9), s.plateau(1.0), s.warmup(1.0, 5),
             s.chain([1.0, s.cosine(1.0, 5), lambda t: t], [3, 6]), s.cosine(1.0, 10**9)]  # fmt: skip
    for schedule in every:
        ax = schedule.plot()
        assert 3 < len(ax.lines[0].get_xdata()) < 5000
        pyplot.close(ax.figure)


def test_a_class_of_a_users_is_drawn_too():
    class Mine(s.step):  # without its base's arguments
        def __init__(self, rate):
            object.__setattr__(self, "rate", rate)

        def __call__(self, step):
            return self.rate / (1 + step)

    figure = pytest.importorskip("matplotlib.figure").Figure()
    assert len(Mine(0.1).plot(ax=figure.subplots()).lines[0].get_xdata()) == 1000


def test_plot_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="plot needs matplotlib: pip install matplotlib"):
        s.cosine(1.0, 5).plot()


# --- options that follow schedules -----------------------------------------------------------------------------------


def movable(name):
    """The numbers of a rule that can follow a schedule, with their defaults: all but those that are read once."""
    once = {"initial_accumulator_value", *(["lr"] if name in ("Rprop", "SuperSAB") else [])}
    defaults = {
        key: parameter.default for key, parameter in inspect.signature(getattr(ac, name).__init__).parameters.items()
    }
    return {key: x for key, x in defaults.items() if isinstance(x, (tuple, float)) and key not in once}


def falling(x):
    """A schedule, or a pair of them, that falls a little from a default."""
    return tuple(map(falling, x)) if isinstance(x, tuple) else s.linear(x or 0.1, 9, end=0.99 * (x or 0.1))


# (class, fixed options, options that move): all numbers of every rule at once, then some with their own schedules
MOVING = [
    *((name, {}, {key: falling(x) for key, x in movable(name).items()}) for name in optimizers.__all__),
    ("SGD", {"nesterov": True}, {"lr": s.cosine(0.1, 9), "momentum": s.linear(0.9, 9, end=0.5), "weight_decay": s.step(0.1, 3)}),
    ("SGD", {}, {"momentum": s.chain([0.0, 0.9], [4]), "dampening": s.linear(-0.1, 9, end=0.3)}),
    ("Momentum", {}, {"lr": s.one_cycle(0.1, 12), "momentum": lambda t: 0.5 + 0.01 * t}),
    ("Adagrad", {}, {"lr": s.exponential(0.1, 0.9), "lr_decay": s.linear(0.1, 9), "eps": s.exponential(1e-3, 0.5)}),
    ("RMSprop", {}, {"alpha": s.linear(0.9, 9, end=1.0), "momentum": s.multistep(0.9, [3], gamma=0.0)}),
    ("Adadelta", {}, {"rho": s.warmup(0.9, 5), "lr": s.inverse_sqrt(1.0, 4)}),
    ("Adam", {}, {"betas": (s.warmup(0.9, 6, start=0.5), 0.99), "weight_decay": s.polynomial(0.1, 9)}),
    ("AdamW", {"amsgrad": True}, {"betas": (0.9, lambda t: 0.9 + t / 200), "lr": s.cosine_restarts(0.1, 4)}),
    ("Adamax", {}, {"betas": lambda t: (0.9 - t / 100, 0.99), "lr": s.warmup(s.cosine(0.1, 5), 3)}),
    ("NAdam", {}, {"betas": [s.linear(0.9, 9, end=0.8), s.linear(0.99, 9, end=0.9)], "momentum_decay": s.step(0.1, 4)}),
    ("RAdam", {}, {"lr": s.step(0.1, 3), "eps": s.linear(1e-4, 9)}),
    ("Lion", {}, {"lr": s.linear(0.1, 9), "betas": (s.linear(0.9, 9, end=0.8), 0.99), "ema_decay": s.warmup(0.99, 8, start=0.5)}),
    ("Rprop", {}, {"etas": (0.5, s.linear(1.3, 9, end=1.1)), "step_sizes": (1e-6, s.linear(1.0, 9, end=0.1))}),
    ("SuperSAB", {}, {"eta_plus": s.linear(1.3, 9, end=1.1), "eta_minus": s.constant(0.4), "max_rate": s.linear(0.2, 9, end=0.1),
                      "momentum": s.linear(0.9, 9, end=0.1)}),
]  # fmt: skip


def at(value, t):
    if isinstance(value, (tuple, list)):
        return tuple(at(x, t) for x in value)
    return value(t) if callable(value) else value


@pytest.mark.parametrize(("name", "fixed", "moving"), MOVING, ids=[f"{c[0]}-{'-'.join(c[2])}" for c in MOVING])
def test_a_scheduled_run_is_the_run_with_numbers_assigned_by_hand(name, fixed, moving):
    rng = np.random.default_rng(1)
    start = rng.normal(size=300).astype("float32")
    p, q = start.copy(), start.copy()
    follows = build(name, p, {**fixed, **moving})
    # what may be 0 at first must have its state from the start
    by_hand = build(name, q, {**fixed, **{key: at(value, 9) or at(value, 0) for key, value in moving.items()}})
    for t, g in enumerate(gradients(rng, 300, "float32", 12)):
        by_hand.param_groups[0].update({key: at(value, t) for key, value in moving.items()})
        for key in moving:
            assert follows.param_groups[0][key] == by_hand.param_groups[0][key]
        follows.step(g)
        by_hand.step(g)
        assert_same_bits(p, q, f"step {t}")
        for key in follows.state:
            assert_same_bits(follows.state[key], by_hand.state[key], key)
    if "ema_decay" in moving:
        assert_same_bits(follows.ema, by_hand.ema)


def test_every_number_of_every_rule_can_follow_a_schedule():
    moved = {(name, key) for name, _, moving in MOVING for key in moving}
    told = set()  # what the message says that can
    for name in optimizers.__all__:
        with pytest.raises(TypeError, match="maximize can't follow a schedule") as caught:
            build(name, np.ones(3), {"maximize": s.constant(1.0)})
        told |= set(str(caught.value).partition("what can: ")[2].split(", "))
        for key, value in {**movable(name), "ema_decay": 0.5}.items():
            moves = (s.constant(value[0]), value[1]) if isinstance(value, tuple) else s.constant(value)
            group = build(name, np.ones(3), {key: moves}).param_groups[0]
            assert group[key] == value
            assert group.schedules == {key: moves}
    assert {key for _, key in moved} == told


def test_groups_have_schedules_of_their_own():
    p = [np.ones(3), np.ones(3), np.ones(3)]
    opt = ac.SGD(
        [{"params": p[0]}, {"params": p[1], "lr": s.linear(1.0, 4)}, {"params": p[2], "lr": 0.5}],
        lr=s.step(2.0, 1, gamma=0.5),
    )
    rates = []
    for _ in range(3):
        rates.append([group["lr"] for group in opt.param_groups])
        opt.step([np.ones(3), np.ones(3), np.ones(3)])
    assert rates == [[2.0, 1.0, 0.5], [1.0, 0.75, 0.5], [0.5, 0.5, 0.5]]
    assert [x[0] for x in p] == [1 - 3.5, 1 - 2.25, 1 - 1.5]
    assert [dict(group.schedules) for group in opt.param_groups] == [
        {"lr": s.step(2.0, 1, gamma=0.5)}, {"lr": s.linear(1.0, 4)}, {}
    ]  # fmt: skip


def test_assigning_replaces_a_schedule_and_starts_one():
    p = np.zeros(1)
    opt = ac.SGD(p, lr=s.linear(1.0, 4))
    group = opt.param_groups[0]
    opt.step(np.ones(1))
    assert group["lr"] == 0.75
    group["weight_decay"] = 0.0  # another option leaves it alone
    assert group["lr"] == 0.75
    group["lr"] = 0.5
    assert not group.schedules
    opt.step(np.ones(1))
    assert p[0] == -1.5
    assert group["lr"] == 0.5
    group["lr"] = s.linear(1.0, 4)  # of the step number, not of the time since it was assigned
    assert group["lr"] == 0.5
    opt.step(np.ones(1))
    assert group["lr"] == 0.25
    assert "'lr': 0.25" in repr(group)
    assert "SGD(lr=linear(base=1.0, steps=4), momentum=0.0" in repr(opt)
    assert dict(group)["lr"] == 0.25


def test_schedules_follow_applied_steps_and_t():
    opt = ac.Adam([np.ones(2, "float32")], lr=s.linear(1.0, 128), on_nonfinite="skip")
    lr = lambda: opt.param_groups[0]["lr"]  # noqa: E731
    opt.step([np.ones(2, "float32")])
    assert lr() == 1 - 1 / 128
    opt.step([None])
    opt.step([np.full(2, np.nan, "float32")])
    assert lr() == 1 - 1 / 128
    opt.t = 40
    assert lr() == 1 - 40 / 128
    opt.step([np.ones(2, "float32")])
    assert lr() == 1 - 41 / 128
    opt.t = 0
    assert lr() == 1.0


def test_t_and_the_product_of_nadam():
    """Assigning t forms the product from the numbers of that step."""
    opt = ac.NAdam(np.ones(2), betas=(s.linear(0.9, 10, end=0.5), 0.99))
    other = ac.NAdam(np.ones(2), betas=(0.5, 0.99))
    opt.t = other.t = 10
    assert opt.state["mu_product"] == other.state["mu_product"]


def test_pieces_of_a_step_follow_schedules_too():
    p, q = np.ones(3 * CHUNK), np.ones(3 * CHUNK)
    whole, pieces = ac.Adam(p, lr=s.linear(0.5, 4)), ac.Adam(q, lr=s.linear(0.5, 4))
    for t in range(3):
        g = np.full(3 * CHUNK, t - 0.5)
        whole.step(g)
        step_range(pieces, g, lo=CHUNK, count=False)
        step_range(pieces, g, hi=CHUNK)
    assert_same_bits(p, q)


def test_an_optimizer_with_schedules_is_freed_at_once():
    gc.disable()
    try:
        opt = ac.Adam(np.ones(3), lr=s.cosine(0.1, 5))
        opt.step(np.ones(3))
        gone = weakref.ref(opt)
        del opt
        assert gone() is None
        p = np.ones(3)
        opt = ac.Adam(p, lr=s.cosine(0.1, 5))
        opt.add_param_group({"params": np.ones(2)})
        gone = weakref.ref(p)
        group = opt.param_groups[1]
        del p
        del opt
        group["lr"] = s.linear(0.1, 3)  # a group that the user has kept can still be used
        assert group["lr"] == 0.1
        del group
        assert gone() is None  # and with the parameters all that held them
    finally:
        gc.enable()


REFUSED = [
    ("SGD", {"nesterov": s.constant(1.0)}, TypeError, r"nesterov can't follow a schedule, got constant\(base=1.0\); what can: lr, momentum"),
    ("SGD", {"maximize": lambda t: True}, TypeError, "maximize can't follow a schedule"),
    ("Adam", {"eps_mode": lambda t: "inside"}, TypeError, "eps_mode can't follow a schedule"),
    ("Adam", {"state_dtype": lambda t: "uint8"}, TypeError, "state_dtype can't follow a schedule"),
    ("Adam", {"bounds": (s.constant(1.0), None)}, TypeError, "bounds can't follow a schedule"),
    ("Adam", {"copy_to": lambda t: None}, TypeError, "copy_to can't follow a schedule"),
    ("Rprop", {"variant": lambda t: "rprop+"}, TypeError, "variant can't follow a schedule"),
    ("Adagrad", {"initial_accumulator_value": s.constant(1.0)}, TypeError, "initial_accumulator_value can't follow a schedule"),
    ("Rprop", {"lr": s.constant(1.0)}, ValueError, "lr of Rprop is read at an array's first step only and can't follow a schedule"),
    ("SuperSAB", {"lr": s.constant(1.0)}, ValueError, "lr of SuperSAB is read"),
    ("Adam", {"lr": float}, TypeError, r"lr must be a number, or a schedule such as .*\); got <class 'float'>"),
    ("Adam", {"lr": "cosine"}, TypeError, r"lr must be a number, or a schedule such as schedules.cosine\(1e-3, 10_000\); got 'cosine'"),
    ("Adam", {"lr": s.cosine}, TypeError, "lr must be a number, or a schedule such as .*; got <class '.*cosine'>"),
    ("Adam", {"betas": (0.9, float)}, TypeError, r"betas\[1\] must be a number, got <class 'float'>"),
    ("Adam", {"max_grad_value": s.constant(1.0)}, TypeError, "max_grad_value must be a number, got constant"),
    ("Adam", {"lr": s.constant(-1.0)}, ValueError, r"^at t=0 lr must be in \[0, inf\), got -1.0"),
    ("Adam", {"lr": lambda t: "fast"}, TypeError, "at t=0 lr must be a number, got 'fast'"),
    ("Adam", {"ema_decay": lambda t: None}, TypeError, "at t=0 ema_decay must be a number, got None from <function"),
    ("Adam", {"betas": s.constant(0.9)}, TypeError, "at t=0 betas must be a pair of numbers, got 0.9"),
    ("Adam", {"betas": (s.constant(0.9),)}, TypeError, "at t=0 betas must be a pair"),
    ("Adam", {"betas": (0.9, s.constant(1.0))}, ValueError, r"at t=0 betas\[1\] must be in \[0, 1\), got 1.0"),
    ("Adam", {"eps": s.constant(1e-60)}, ValueError, "rounds to 0 in float32"),
    ("SGD", {"nesterov": True, "momentum": s.constant(0.0)}, ValueError, "nesterov=True needs momentum > 0"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "error", "message"), REFUSED)
def test_what_can_not_follow_a_schedule(name, options, error, message):
    p = np.ones(3, "float32")
    with pytest.raises(error, match=message):
        build(name, p, options)
    with pytest.raises(
        error,
        match=re.sub(r"^\^?(at|lr|betas|\w+ can't)", r"params\\[1\\]: \1", message)
        if "max_grad" not in message
        else "unknown",
    ):
        build(name, [{"params": p}, {"params": p.copy(), **options}], {})


def test_a_schedule_of_pairs_gives_a_pair_at_every_step():
    p = np.ones(3, "float32")
    opt = ac.Adam(p, betas=lambda t: (0.9, 0.999) if t == 0 else 0.5)
    opt.step(np.ones(3, "float32"))
    before = p.copy()
    with pytest.raises(TypeError, match=r"at t=1 betas must be a pair of numbers, got 0\.5"):
        opt.step(np.ones(3, "float32"))
    assert_same_bits(p, before)


def test_a_bad_number_of_a_schedule_is_refused_before_the_step():
    p = [np.ones(3, "float32"), np.ones(3, "float32")]
    grads = [np.ones(3, "float32"), np.ones(3, "float32")]
    opt = ac.Adam([{"params": p[0], "lr": s.cosine(0.1, 10)}, {"params": p[1], "lr": lambda t: 0.2 - 0.1 * t}])
    for _ in range(2):
        opt.step(grads)
    opt.param_groups[1]["lr"] = lambda t: 0.25 - 0.1 * t
    opt.step(grads)
    before = [x.copy() for x in p], opt.state["exp_avg"][0].copy()
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^param_groups\[1\]: at t=3 lr must be in \[0, inf\), got -0.0"):
            opt.step(grads)
        with pytest.raises(ValueError, match=r"^param_groups\[1\]: at t=3 lr must be"):
            opt.param_groups[1]["lr"]
    for x, y in zip(p, before[0], strict=True):
        assert_same_bits(x, y)
    assert_same_bits(opt.state["exp_avg"][0], before[1])
    assert opt.t == 3
    with pytest.raises(ValueError, match=r"^param_groups\[1\]: at t=50 lr must be"):
        opt.t = 50
    assert opt.t == 3
    opt.param_groups[1]["lr"] = 0.1  # the remedy
    opt.step(grads)
    assert opt.t == 4


def test_several_bad_numbers_are_mended_one_by_one():
    fails = s.linear(0.2, 2, end=-1.0)
    p, q = np.ones(3), np.ones(3)
    opt, by_hand = ac.SGD(p, lr=fails, momentum=fails), ac.SGD(q, lr=0.2, momentum=0.2)
    group = opt.param_groups[0]
    group["weight_decay"] = lambda t: 0.1 * t
    for each in (opt, by_hand):
        each.step(np.ones(3))
    with pytest.raises(ValueError, match=r"param_groups\[0\]: at t=1 lr must be in \[0, inf\), got -0.3"):
        opt.step(np.ones(3))
    assert "'lr': linear(base=0.2, steps=2, end=-1.0)" in repr(group)
    group["nesterov"] = False  # what has no part in it
    group["lr"] = s.constant(0.5)
    assert group["lr"] == 0.5
    with pytest.raises(ValueError, match=r"param_groups\[0\]: at t=1 momentum must be in"):
        opt.step(np.ones(3))
    group["momentum"] = 0.25
    opt.step(np.ones(3))
    by_hand.param_groups[0].update(lr=0.5, momentum=0.25, weight_decay=0.1)
    by_hand.step(np.ones(3))
    assert_same_bits(p, q)


def test_what_a_schedule_raises_leaves_everything():
    p = np.ones(3)
    opt = ac.SGD(p, lr=s.exponential(0.1, 1e200))
    opt.step(np.zeros(3))
    opt.step(np.zeros(3))
    with pytest.raises(OverflowError) as caught:
        opt.step(np.ones(3))
    assert "at t=2 lr" in caught.value.__notes__[0]
    assert opt.t == 2
    assert (p == 1).all()


@pytest.mark.parametrize(
    ("name", "options", "key", "message"),
    [
        ("Adam", {}, "eps", r"^param_groups\[0\]: at t=2 eps=1e-60 rounds to 0 in float32"),
        (
            "SGD",
            {"nesterov": True},
            "momentum",
            r"^param_groups\[0\]: at t=2 nesterov=True needs momentum > 0 .* momentum=0.0",
        ),
    ],
)
def test_what_depends_on_other_options_is_checked_at_every_step(name, options, key, message):
    p = np.ones(3, "float32")
    opt = build(name, p, {**options, key: s.multistep(1.0 if key == "eps" else 0.9, [2], gamma=0.0)})
    if key == "eps":
        opt.param_groups[0]["eps"] = s.chain([1e-3, 1e-60], [2])
    opt.step(np.ones(3, "float32"))
    opt.step(np.ones(3, "float32"))
    before = p.copy()
    with pytest.raises(ValueError, match=message):
        opt.step(np.ones(3, "float32"))
    assert_same_bits(p, before)
    assert opt.t == 2


def test_an_error_inside_a_function_of_your_own_says_where():
    opt = ac.SGD(np.ones(3), lr=lambda t: [0.1, 0.2][t])
    opt.step(np.ones(3))
    opt.step(np.ones(3))
    with pytest.raises(IndexError) as caught:
        opt.step(np.ones(3))
    assert re.match(r"raised by the schedule of param_groups\[0\]: at t=2 lr: <function", caught.value.__notes__[0])
    assert opt.t == 2


def test_a_schedule_needs_state_whatever_its_truth_value_is():
    p = np.zeros(3)
    opt = ac.SGD(p, lr=1.0, momentum=np.poly1d([0.5]))  # false, as its order is 0
    for _ in range(3):
        opt.step(np.ones(3))
    np.testing.assert_array_equal(p, -(1 + 1.5 + 1.75))


def test_a_schedule_that_would_need_state_in_the_middle_of_a_run_is_refused():
    opt = ac.SGD(np.ones(3))
    with pytest.raises(ValueError, match=r"would need new state \(momentum_buffer\)"):
        opt.param_groups[0]["momentum"] = s.chain([0.0, 0.9], [4])
    with pytest.raises(ValueError, match="ema_decay can't come or go"):
        opt.param_groups[0]["ema_decay"] = s.constant(0.9)
    opt.step(np.ones(3))
    assert ac.SGD(np.ones(3), momentum=s.constant(0.0)).nbytes == 24


@pytest.mark.parametrize("where", ["setting", "group", "pair", "another setting"])
def test_a_schedule_that_assigns_options_is_refused(where):
    """Each of its calls makes what was checked old, so that the check would begin anew without an end."""
    opt = ac.AdamW(np.ones(3), lr=0.5)
    group, calls, assigns = opt.param_groups[0], [], True

    def schedule(t):
        calls.append(t)
        assert len(calls) < 1000, "the check has no end"
        if assigns and where == "setting":
            opt.seed = len(calls)
        elif assigns and where == "another setting":
            opt.zero_grad = len(calls) % 2 == 0
        elif assigns:
            group["maximize"] = True
        return 0.25

    def assign():
        if where == "group":
            group["lr"] = schedule
        elif where == "pair":
            group["betas"] = [schedule, 0.5]
        elif where == "setting":
            opt.max_grad_norm = schedule
        else:
            opt.on_nonfinite = "skip"

    if where == "another setting":
        assigns = False
        opt.max_grad_norm = schedule
        assigns = True
    before = [dict(group.options), opt.max_grad_norm, opt.on_nonfinite]
    with pytest.raises(RuntimeError, match=r"was not assigned: the schedule .* assigns options whenever it is called"):
        assign()
    assigns = False
    after = [dict(group.options), opt.max_grad_norm, opt.on_nonfinite]
    before[0]["maximize"] = group["maximize"]  # which the schedule itself has assigned
    assert after == before
    assign()
    opt.step(np.ones(3))
    assert opt.t == 1


def test_a_schedule_that_assigns_an_option_once_is_assigned():
    opt = ac.SGD(np.ones(3), lr=0.5)

    def schedule(t):
        if opt.seed == 0:
            opt.seed = 7
        return 0.25

    opt.max_grad_norm = schedule
    assert (opt.seed, opt.max_grad_norm) == (7, 0.25)


# --- plateaus and metrics --------------------------------------------------------------------------------------------


def test_a_metric_sets_the_numbers_of_the_steps_after_its_own():
    p = np.zeros(1)
    opt = ac.SGD(p, lr=s.plateau(1.0, 0.5, patience=0))
    for metric, moved in [(3.0, 1.0), (3.0, 1.0), (None, 0.5), (None, 0.5), (2.0, 0.5), (2.5, 0.5), (2.5, 0.25)]:
        before = p[0]
        opt.step(np.ones(1), metric=metric)
        assert before - p[0] == moved, metric
    assert opt.param_groups[0]["lr"] == 0.125
    assert opt.param_groups[0].schedules["lr"].best == 2.0


def test_a_plateau_in_a_pair_goes_back_whatever_else_is_assigned():
    opt = ac.Adam(np.ones(3), betas=(s.plateau(0.9, factor=0.5, patience=0), 0.999), keep_undo=True)
    opt.step(np.ones(3), metric=1.0)
    opt.step(np.ones(3), metric=2.0)
    assert opt.param_groups[0]["betas"] == (0.45, 0.999)
    opt.param_groups[0]["lr"] = 0.1
    opt.rollback()
    assert opt.param_groups[0]["betas"] == (0.9, 0.999)
    opt.step(np.ones(3), metric=2.0)
    opt.param_groups[0]["betas"] = (s.plateau(0.8, patience=0), 0.999)  # but not what is assigned itself
    opt.rollback()
    assert opt.param_groups[0]["betas"] == (0.8, 0.999)


def test_a_schedule_that_was_replaced_is_dropped():
    class Owner:
        def number(self, t):
            return 0.5

    owner = Owner()
    gone = weakref.ref(owner)
    opt = ac.SGD(np.ones(3), lr=s.plateau(0.5))
    opt.param_groups[0]["weight_decay"] = owner.number
    opt.step(np.ones(3), metric=1.0)
    opt.param_groups[0]["weight_decay"] = 0.0
    del owner
    assert gone() is None


@pytest.mark.parametrize(
    ("wrap", "first"),
    [(lambda p: p, 0), (lambda p: s.warmup(p, 2), 2), (lambda p: s.chain([0.5, p], [2]), 2)],
    ids=["plateau", "warmup", "chain"],
)
def test_a_metric_has_nothing_checked_again(wrap, first, monkeypatch):
    """What a plateau makes of itself is valid, and the checks would take many times as long as a step.

    first: the step at which the plateau begins.
    """
    metrics = (3.0, 3.0, 2.0, 1.0, 4.0, 4.0)
    schedule = wrap(s.plateau(1.0, factor=0.5, patience=0, cooldown=1))
    monkeypatch.setattr("adaptive_c._schedule._CHECKS", {})  # a check would be a KeyError
    opt = ac.SGD(np.ones(1), lr=schedule)
    group = opt.param_groups[0]
    for metric in metrics:
        opt.step(np.ones(1), metric=metric)
    after = group.options["lr"]
    monkeypatch.undo()
    for metric in metrics[first:]:
        schedule = s.from_dict(schedule.observe(first, metric).to_dict())
    assert after == schedule
    assert after(first) < 1.0  # it has fallen
    assert (hash(after), repr(after)) == (hash(schedule), repr(schedule))
    assert pickle.loads(pickle.dumps(after)) == schedule


def test_a_metric_asks_no_group_without_a_schedule():
    counted = []
    for n in (1, 50):
        opt = ac.SGD([{"params": np.ones(1)} for _ in range(n)] + [{"params": np.ones(1), "lr": s.plateau(1.0)}])
        grads, count = [np.ones(1)] * (n + 1), 0

        def look(frame, event, argument):
            nonlocal count
            count += event == "call"

        sys.setprofile(look)
        try:
            opt.step(grads, metric=1.0)
        finally:
            sys.setprofile(None)
        counted.append(count)
    assert counted[0] == counted[1] > 0


def test_a_metric_that_changes_nothing_gives_the_same_schedule():
    lowest = s.plateau(1.0, factor=0.5, patience=0, min=1.0, value=1.0, best=2.0)
    for schedule in (lowest, s.warmup(lowest, 1), s.chain([1.0, lowest], [1])):
        assert schedule.observe(1, 3.0) is schedule
        assert schedule.observe(1, 1.0) is not schedule


def test_a_metric_of_another_type_becomes_a_float():
    after = s.plateau(1.0).observe(0, np.float32(0.5)).observe(1, np.int64(-2))
    assert (after.best, type(after.best)) == (-2.0, float)
    with pytest.raises(TypeError, match="plateau: metric must be a number, got '3'"):
        s.plateau(1.0).observe(0, "3")


def test_a_plateau_of_your_own_class_is_made_by_its_constructor():
    @dataclass(frozen=True)
    class own(s.plateau):
        def __post_init__(self):
            super().__post_init__()
            object.__setattr__(self, "doubled", 2 * self(0))

    after = own(1.0, factor=0.5, patience=0).observe(0, 1.0).observe(1, 2.0)
    assert (after.value, after.doubled) == (0.5, 1.0)


def test_every_group_and_element_has_a_plateau_of_its_own():
    given = s.plateau(0.8, 0.5, patience=0)
    params = [{"params": np.ones(1)}, {"params": np.ones(1), "lr": 0.1}, {"params": np.ones(1), "betas": (given, 0.9)}]
    opt = ac.Adam(params, lr=given)
    other = ac.Adam(np.ones(1), lr=given)
    for metric in (1.0, 1.0):
        opt.step([np.ones(1)] * 3, metric=metric)
    assert [group["lr"] for group in opt.param_groups] == [0.4, 0.1, 0.4]
    assert opt.param_groups[2]["betas"] == (0.4, 0.9)
    assert other.param_groups[0]["lr"] == given(0) == 0.8
    opt.param_groups[1]["lr"] = opt.param_groups[0].schedules["lr"]  # going on where another is
    assert opt.param_groups[1]["lr"] == 0.4


def test_a_skipped_step_takes_no_metric():
    opt = ac.SGD([np.ones(1)], lr=s.plateau(1.0, 0.5, patience=0), on_nonfinite="skip")
    opt.step([np.ones(1)], metric=1.0)
    opt.step([np.full(1, np.nan)], metric=2.0)
    opt.step([None], metric=2.0)
    assert opt.param_groups[0]["lr"] == 1.0
    with pytest.raises(ValueError, match="shape"):
        opt.step([np.ones(2)], metric=2.0)
    assert opt.param_groups[0]["lr"] == 1.0
    opt.step([np.ones(1)], metric=2.0)
    assert opt.param_groups[0]["lr"] == 0.5
    opt.step([np.ones(1)], metric=float("nan"))  # no improvement
    assert opt.param_groups[0]["lr"] == 0.25


def test_t_may_go_back_to_where_a_metric_came():
    p = np.zeros(1)
    opt = ac.SGD(p, lr=s.plateau(1.0, 0.5, patience=0))
    opt.step(np.ones(1), metric=1.0)
    opt.step(np.ones(1), metric=1.0)
    opt.t = 1
    opt.step(np.ones(1))
    assert p[0] == -2.5


def test_metrics_that_are_not_read_or_that_are_none():
    p = np.ones(1)
    for opt in (ac.SGD(p), ac.SGD(p, lr=s.cosine(1.0, 5)), ac.SGD(p, lr=lambda t: 1.0)):
        with pytest.raises(ValueError, match=r"no schedule reads metric=0.5: neither .* follows a plateau; drop it"):
            opt.step(np.ones(1), metric=0.5)
        assert opt.t == 0
    opt = ac.SGD(p, lr=s.warmup(s.plateau(1.0), 5))
    for bad in ("low", np.ones(1), True):
        with pytest.raises(TypeError, match="metric must be a number, got"):
            opt.step(np.ones(1), metric=bad)
    assert (p == 1).all()
    opt.step(np.ones(1), np.float32(0.5), loss_scale=2.0)
    assert opt.t == 1


# --- groups that come later ------------------------------------------------------------------------------------------

LATER = [
    *[(case, name, options, {}) for case, name, options in CASES if case in ("sgd-nesterov", "rmsprop-centered-momentum", "nadam", "rprop")],
    ("stages", "AdamW", {"lr": 0.1}, {"ema_decay": 0.9, "bounds": (-2, 2), "max_grad_norm": 1.0, "max_grad_value": 0.5}),
    ("uint8", "AdamW", {"lr": 0.1}, {"state_dtype": "uint8", "seed": 3}),
    ("bfloat16-state", "Adam", {"lr": 0.1, "amsgrad": True}, {"state_dtype": "bfloat16"}),
    ("schedule", "AdamW", {"lr": s.cosine(0.1, 9), "betas": (s.linear(0.9, 9, end=0.5), 0.9)}, {}),
    ("accumulator", "Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.3}, {"state_dtype": "uint8"}),
]  # fmt: skip


@pytest.mark.parametrize("start", ["array", "list", "dict", "groups"])
@pytest.mark.parametrize(("name", "options", "shared"), [c[1:] for c in LATER], ids=[c[0] for c in LATER])
def test_adding_a_group_changes_nothing_for_the_others(name, options, shared, start):
    """The same bits as of an optimizer that had the group from the start, and no gradient for it until then."""
    rng = np.random.default_rng(2)
    arrays = [rng.normal(size=n).astype("float32") for n in (CHUNK + 300, 50, 700)]

    def structure(w, b):
        return {"array": w, "list": [w, b], "dict": {"w": w, "b": b}, "groups": [w, {"b": b}]}[start]

    def optimizer(w, b, *late):
        params = structure(w, b)
        groups = [{"params": x} for x in (params if start == "groups" else [params])]
        return build(
            name, [*groups, {"params": late}] if late else groups if start == "groups" else params, options, **shared
        )

    p, q = ([x.copy() for x in arrays] for _ in range(2))
    opt, both = optimizer(*p[:2]), optimizer(*q)
    for t in range(6):
        *g, g_late = (rng.normal(size=x.size).astype("float32") for x in arrays)
        grads = structure(*g)
        whole = [*(grads if start == "groups" else [grads]), [None if t < 3 else g_late]]
        if t == 3:
            opt.add_param_group({"params": [p[2]]})
        opt.step(grads if t < 3 else whole)
        both.step(whole)
        assert opt.t == both.t == t + 1
    assert not np.array_equal(p[2], arrays[2])
    assert list(opt.state) == list(both.state)
    found = [(p, q), (opt.ema, both.ema), *((opt.state[key], both.state[key]) for key in opt.state)]
    for x, y in found:
        for a, b in zip(arrays_in(x), arrays_in(y), strict=True):
            assert_same_bits(a, b)
    assert [int(n) for n in arrays_in(opt.state["step"])][-1] == 3
    for group, other in zip(opt.param_groups, both.param_groups, strict=True):
        assert {**group, "params": 0} == {**other, "params": 0}
    np.testing.assert_equal(opt.grad_norm, both.grad_norm)


def test_a_new_group_has_options_of_its_own_and_the_constructors():
    p = np.zeros(2, "float32")
    opt = ac.SGD(p, lr=s.linear(1.0, 4), momentum=0.0, n_threads=3, on_nonfinite="skip", copy_to=np.zeros(2, "float32"))
    opt.step(np.full(2, np.nan, "float32"))
    opt.step(np.ones(2, "float32"))
    opt.param_groups[0]["lr"] = 0.5
    copy = np.zeros(1, "float16")
    q, r = np.full(1, 8.0, "float32"), np.zeros(1)
    opt.add_param_group({"params": [q], "lr": 0.25, "copy_to": [copy], "ema_decay": 0.0})
    opt.add_param_group({"params": {"r": r}, "momentum": 0.5})
    assert copy[0] == 8.0
    assert opt.ema[1][0][0] == 8.0
    assert [group["lr"] for group in opt.param_groups] == [0.5, 0.25, 0.75]
    assert (opt.n_threads, opt.skipped_steps, opt.t) == (3, 1, 1)
    opt.step([np.ones(2, "float32"), [np.ones(1, "float32")], {"r": np.ones(1)}])
    assert opt.param_groups[0]["copy_to"][0] == p[0] == -1.5
    assert copy[0] == q[0] == opt.ema[1][0][0] == 7.75
    assert r[0] == -0.75
    assert opt.state["momentum_buffer"][2]["r"][0] == 1.0
    assert opt.state["momentum_buffer"][0] is None
    assert "3 groups" in repr(opt)


def test_narrow_parameters_in_a_new_group():
    opt = ac.Adam(np.ones(3), lr=0.125)
    late = np.full(3, 2.0, "float16")
    opt.add_param_group({"params": late, "master": "float32"})
    assert (opt.state["master"][1] == 2.0).all()
    opt.step([None, np.ones(3, "float16")])
    assert (late == 1.875).all()


def test_names_after_a_group_was_added():
    w, b, c = (np.ones(3, "float32") for _ in range(3))
    opt = ac.AdamW({"w": w, "b": b})
    with pytest.raises(ValueError, match=r"^grads\['b'\] has shape"):
        opt.step({"w": None, "b": np.ones(2, "float32")})
    opt.add_param_group({"params": {"c": c}})
    with pytest.raises(
        ValueError, match=r"^grads must be a list with one entry for each of the 2 parameter groups, got a dict"
    ):
        opt.step({"w": None, "b": None})
    with pytest.raises(ValueError, match=r"^grads\[0\]\['b'\] has shape"):
        opt.step([{"w": None, "b": np.ones(2, "float32")}, {"c": None}])
    with pytest.raises(ValueError, match=r"^grads\[1\] must be a dict with the keys 'c'"):
        opt.step([{"w": None, "b": None}, {"d": None}])
    with pytest.raises(ValueError, match=r"^grads\[1\]\['c'\] shares memory with params\[0\]\['params'\]\['w'\]"):
        opt.step([{"w": None, "b": None}, {"c": w}])
    with pytest.raises(ValueError, match=r"^grads\[1\]\['c'\] shares memory with this optimizer's state"):
        opt.step([{"w": None, "b": None}, {"c": opt.state["exp_avg"][0]["w"]}])
    with pytest.raises(ValueError, match=r"^param_groups\[1\]: lr must be"):
        opt.param_groups[1]["lr"] = -1.0
    assert list(opt.state["exp_avg"][0]) == ["w", "b"]
    assert list(opt.state["step"][1]) == ["c"]
    assert list(opt.decoded_state("exp_avg")[1]) == ["c"]
    assert list(opt.param_groups[1]["params"]) == ["c"]
    assert opt.t == 0


def test_names_from_dicts_in_state_average_and_messages():
    params = {"w": np.ones((2, 3), "float32"), 7: np.ones(4, "float32"), ("a", 1): np.ones((), "float32")}
    grads = {key: np.ones_like(x) for key, x in params.items()}
    opt = ac.AdamW(params, ema_decay=0.9, state_dtype="bfloat16")
    opt.step(dict(reversed(grads.items())))
    for found in (*opt.state.values(), opt.ema, opt.decoded_state("exp_avg"), opt.param_groups[0]["params"]):
        assert list(found) == list(params)
    for name in ("exp_avg", "exp_avg_sq"):
        assert {key: x.shape for key, x in opt.state[name].items()} == {key: x.shape for key, x in params.items()}
    with pytest.raises(ValueError, match=r"grads\[\('a', 1\)\] has shape \(1,\), its parameter \(\)"):
        opt.step({**grads, ("a", 1): np.ones(1, "float32")})
    with pytest.raises(ValueError, match=r"must be a dict with the keys 'w', 7, \('a', 1\) of the parameters"):
        opt.step({"w": None})
    with pytest.raises(ValueError, match=r"copy_to must be a dict with the keys of the parameters, 'w', 7, \('a', 1\)"):
        ac.SGD(params, copy_to={"w": np.ones((2, 3), "float32")})


BAD_GROUPS = [
    ("not a dict", lambda p: np.ones(3), ValueError, r"params\[1\] must be a dict with 'params', as every group is; got an ndarray"),
    ("no params", lambda p: {"lr": 0.1}, ValueError, r"params\[1\] must be a dict with 'params'"),
    ("empty", lambda p: {"params": []}, ValueError, r"params\[1\] is empty"),
    ("unknown option", lambda p: {"params": np.ones(3), "rate": 1}, TypeError, r"params\[1\] has the unknown option 'rate'"),
    ("bad option", lambda p: {"params": np.ones(3), "lr": -1}, ValueError, r"^params\[1\]: lr must be in \[0, inf\), got -1"),
    ("bad schedule", lambda p: {"params": np.ones(3), "lr": s.linear(1.0, 1, end=-1)}, ValueError, r"^params\[1\]: at t=2 lr must be in"),
    ("the same", lambda p: {"params": [np.ones(3), p]}, ValueError, r"params\[0\]\['params'\] and params\[1\]\['params'\]\[1\] share memory"),
    ("dtype", lambda p: {"params": {"a": np.ones(3, int)}}, TypeError, r"params\[1\]\['params'\]\['a'\] has dtype int64"),
    ("strided", lambda p: {"params": np.ones(6)[::2]}, ValueError, r"params\[1\]\['params'\] is not C-contiguous"),
    ("narrow", lambda p: {"params": np.ones(3, "float16")}, ValueError, r"params\[1\]: the parameters are float16"),
    ("copy", lambda p: {"params": np.ones(3), "copy_to": np.ones(2, "float32")}, ValueError, r"params\[1\]\['copy_to'\] must be an array of its"),
    ("copy shared", lambda p: {"params": np.ones(3), "copy_to": p}, TypeError, r"params\[1\]\['copy_to'\] has dtype float64|is float64"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), [b[1:] for b in BAD_GROUPS], ids=[b[0] for b in BAD_GROUPS])
def test_a_bad_new_group_changes_nothing(make, error, message):
    p = np.ones(3)
    opt = ac.Adam(p, lr=s.linear(0.5, 4))
    for _ in range(2):
        opt.step(np.ones(3))
    before, nbytes = everything(opt), opt.nbytes
    for _ in range(2):
        with pytest.raises(error, match=message):
            opt.add_param_group(make(p))
    assert len(opt.param_groups) == 1
    assert opt.nbytes == nbytes
    assert_same(everything(opt), before)
    opt.step(np.ones(3))  # as before: one array
    assert opt.t == opt.state["step"] == 3
    assert opt.param_groups[0]["lr"] == 0.125


def test_a_new_group_that_the_settings_do_not_fit():
    opt = ac.SGD(np.ones(3), max_grad_value=1e-300)
    with pytest.raises(ValueError, match="max_grad_value=1e-300 rounds to 0 in float32"):
        opt.add_param_group({"params": np.ones(3, "float32")})
    assert len(opt.param_groups) == 1


def test_no_group_inside_averaged_parameters():
    opt = ac.SGD(np.ones(3), ema_decay=0.5)
    with (
        opt.averaged_parameters(),
        pytest.raises(RuntimeError, match="not inside averaged_parameters"),
    ):
        opt.add_param_group({"params": np.ones(2)})
    opt.add_param_group({"params": np.ones(2)})
    with opt.averaged_parameters():
        pass


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_a_new_group_is_seen_before_all_of_it(fails):
    """Its schedules are anybody's Python, and so other threads may run while it is made."""
    p, late = np.ones(3), np.ones(2)
    opt = ac.Adam(p, lr=0.5, keep_undo=True)
    opt.step(np.ones(3))
    seen = []

    def other_thread():
        seen.append((len(opt.param_groups), opt.t, opt.state["exp_avg"].shape, opt.nbytes))
        calls = [
            lambda: opt.step(np.ones(3)),
            lambda: setattr(opt, "t", 5),
            opt.rollback,
            opt.state_dict,
            lambda: opt.add_param_group({"params": np.ones(4)}),
            lambda: opt.param_groups[0].update(lr=0.25),
        ]
        for call in calls:
            with pytest.raises(RuntimeError, match="this optimizer is in use"):
                call()

    def schedule(t):
        if not seen:
            in_another_thread(other_thread)
            if fails:
                raise KeyError("no")
        return 0.5

    before, nbytes = everything(opt), opt.nbytes
    if fails:
        with pytest.raises(KeyError):
            opt.add_param_group({"params": late, "lr": schedule})
        assert_same(everything(opt), before)
        opt.rollback()
        opt.step(np.ones(3))
    else:
        opt.add_param_group({"params": late, "lr": schedule})
        opt.step([np.ones(3), np.ones(2)])
        assert opt.state["step"][0] == 2
        np.testing.assert_allclose(late, 0.5, rtol=1e-7)
    assert seen == [(1, 1, (3,), nbytes)]
    assert opt.param_groups[0]["lr"] == 0.5


def test_adding_many_groups_keeps_nothing_of_what_was_before_each():
    p = np.ones(3)
    gc.disable()
    try:
        opt = ac.SGD([{"params": p}], lr=1.0)
        held = sys.getrefcount(p)
        for i in range(50):
            opt.add_param_group({"params": np.full(1, float(i)), "lr": s.constant(1.0)})
        assert sys.getrefcount(p) == held
    finally:
        gc.enable()
    opt.step([np.ones(3)] + [np.ones(1)] * 50)
    assert [group["params"][0] for group in opt.param_groups] == [0.0, *range(-1, 49)]


# --- the page --------------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not (ROOT / "docs" / "schedules.md").is_file(), reason="not in a clone")
def test_the_page_has_every_schedule():
    text = (ROOT / "docs" / "schedules.md").read_text()
    named = {name: getattr(s, name) for name in s.__all__ if isinstance(getattr(s, name), type)}
    for name, cls in named.items():
        if cls is s.Schedule:
            continue
        (row,) = re.findall(rf"^\| `{name}\((.*?)\)` \|", text, re.M)
        shown = [x.partition("=") for x in re.split(r", (?=\w+(?:=|,|$))", row)]
        given = [f for f in fields(cls) if f.name not in ("value", "best", "num_bad_epochs", "cooldown_counter")]
        assert [x[0] for x in shown] == [f.name for f in given]
        assert [eval(x[2]) if x[1] else MISSING for x in shown] == [f.default for f in given]
    assert (ROOT / "docs" / "schedules.png").stat().st_size < 150_000


def test_what_a_plateau_of_your_own_makes_of_a_metric_must_be_a_schedule():
    class Own:
        reads_metric = True

        def __call__(self, t):
            return 0.5

        def observe(self, t, metric):
            return "garbage"

    w = np.zeros(2)
    opt = ac.SGD(w, lr=Own())
    with pytest.raises(TypeError, match="must give a schedule, got 'garbage'"):
        opt.step(np.ones(2), metric=1.0)
    assert (opt.t, w[0]) == (0, 0.0)

"""Schedules: their values against PyTorch's, and hyperparameters, groups and metrics that follow them."""

import json
import pickle
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptive_c as ac
from adaptive_c import schedules as s

STEPS = 1000


# --- values ----------------------------------------------------------------------------------------------------------


def torch_values(make, key="lr", lr=0.3, metrics=None, steps=STEPS):
    """What torch's schedule gives before each of its steps; key: "lr", or 0 for the first of betas."""
    torch = pytest.importorskip("torch")
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


@pytest.mark.parametrize(("ours", "torchs"), [case[1:] for case in SAME], ids=[case[0] for case in SAME])
def test_values_are_torchs(ours, torchs):
    got = [ours(t) for t in range(STEPS)]
    assert all(type(x) is float for x in got)
    np.testing.assert_allclose(got, torch_values(torchs), rtol=1e-12, atol=1e-16)


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
@settings(deadline=None)
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


def test_plot_without_matplotlib(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match="plot needs matplotlib: pip install matplotlib"):
        s.cosine(1.0, 5).plot()

"""Promise 2: the same bits everywhere, and the bits of the reference."""

import functools
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
from cases import CASES, IDS, PAIRS
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CHUNK, OTHER_BUILDS, assert_same_bits, build, gradients, random_state, spec, split, step_range

CASE = dict(zip(IDS, PAIRS, strict=True))
SIZES = [0, 1, 7, 64, CHUNK - 1, CHUNK + 1, 3 * CHUNK + 5]


def assert_same_state(opt, state, dtype, what):
    for key, live in opt.state.items():
        if key == "mu_product":
            assert float(live) == state[key]
        elif key != "step":
            want = np.broadcast_to(np.asarray(state[key], dtype), live.shape)
            assert_same_bits(live.astype(dtype), want, f"{key}, {what}")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
def test_every_step_has_the_bits_of_the_reference(name, options, dtype):
    rng = np.random.default_rng(0)
    for size in SIZES:
        p = rng.normal(size=size).astype(dtype)
        opt = build(name, p, options)
        state = random_state(opt, rng)
        want = p.copy()
        for t, g in enumerate(gradients(rng, size, dtype), 11):
            before = g.copy()
            opt.step(g)
            want = spec(name)(want, g, state, t, **options)
            assert_same_bits(g, before, "the gradient")
            assert_same_bits(p, want, f"p, size {size}, t {t}")
            assert_same_state(opt, state, dtype, f"t {t}")
        assert opt.t == 18


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
def test_the_first_steps_have_the_bits_of_the_reference(name, options, dtype):
    rng = np.random.default_rng(1)
    p = rng.normal(size=100).astype(dtype)
    opt, want, state = build(name, p, options), p.copy(), {}
    for t, g in enumerate(gradients(rng, 100, dtype), 1):
        opt.step(g)
        want = spec(name)(want, g, state, t, **options)
        assert_same_bits(p, want, f"t {t}")


@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
@given(numbers=st.lists(st.floats(width=32), min_size=20, max_size=20))
@settings(max_examples=15)
def test_any_gradient_has_the_bits_of_the_reference(name, options, numbers):
    """Denormals, infinities, NaN, zeros of both signs, huge numbers."""
    p, *grads = np.array(numbers, "float32").reshape(4, 5)
    opt, want, state = build(name, p, options), p.copy(), {}
    with np.errstate(all="ignore"):
        for t, g in enumerate(grads, 1):
            opt.step(g)
            want = spec(name)(want, g, state, t, **options)
            assert_same_bits(p, want, f"t {t}, g {g!r}")
            assert_same_state(opt, state, "float32", f"t {t}, g {g!r}")


def test_a_maximum_that_is_not_a_number_stays_one():
    """amsgrad's maximum takes a NaN from either side only where the reference does."""
    p, state = np.ones(4, "float32"), {}
    want, opt = p.copy(), build("Adam", p, {"amsgrad": True})
    for t, g in enumerate(([1, np.nan, 1, 1], [1, 1, np.nan, 1], [1, 1, 1, np.nan]), 1):
        opt.step(np.array(g, "float32"))
        want = spec("Adam")(want, np.array(g, "float32"), state, t, amsgrad=True)
        assert_same_state(opt, state, "float32", f"t {t}")
    assert_same_bits(p, want)
    opt.state["exp_avg_sq"][:] = 1  # and only the maximum is NaN
    opt.state["max_exp_avg_sq"][:] = np.nan
    state = {k: v.copy() for k, v in opt.state.items() if k != "step"}
    opt.step(np.ones(4, "float32"))
    spec("Adam")(want, np.ones(4, "float32"), state, 4, amsgrad=True)
    assert_same_state(opt, state, "float32", "t 4")


@functools.lru_cache(maxsize=8)
def problem(size, dtype, steps):
    """The first parameters and the gradients of each step."""
    rng = np.random.default_rng(7)
    return rng.normal(size=size).astype(dtype), gradients(rng, size, dtype, steps)


def run(name, options, cuts=None, n_threads=None, ranges=False, steps=3, size=20 * CHUNK + 123, dtype="float32"):
    """Parameters and state after some steps of a fixed problem, the array cut at `cuts` into a list."""
    p, grads = problem(size, dtype, steps)
    opt = build(name, p.copy() if cuts is None else split(p, cuts), options, n_threads=n_threads)
    for g in grads:
        whole = g if cuts is None else split(g, cuts)
        if not ranges:
            opt.step(whole)
            continue
        edges = [*range(0, size, 3 * CHUNK), size]
        pieces = list(itertools.pairwise(edges))
        np.random.default_rng(8).shuffle(pieces)
        for i, (lo, hi) in enumerate(pieces):
            step_range(opt, whole, lo=lo, hi=hi, count=i == len(pieces) - 1)
    out = {"p": opt.param_groups[0]["params"], **opt.state}
    flat = {k: v if cuts is None else np.concatenate([np.atleast_1d(x) for x in v]) for k, v in out.items()}
    return {k: v for k, v in flat.items() if k not in ("step", "mu_product")}


@functools.lru_cache(maxsize=1)  # hypothesis asks again for each of its examples
def uncut(case):
    return run(*CASE[case])


def same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert_same_bits(value, b[key], key)


@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
def test_threads_do_not_change_a_bit(name, options):
    want = run(name, options, n_threads=1)
    for n in (2, 3, 7):
        same(run(name, options, n_threads=n), want)


@pytest.mark.parametrize(("name", "options"), PAIRS, ids=IDS)
def test_ranges_in_any_order_equal_the_whole_step(name, options):
    same(run(name, options, ranges=True), run(name, options))


@pytest.mark.parametrize("case", CASE)
@given(cuts=st.lists(st.integers(0, 20 * CHUNK + 123), max_size=12))
@settings(max_examples=8)
def test_any_cut_of_the_array_gives_the_same_bits(case, cuts):
    same(run(*CASE[case], cuts=sorted(cuts), n_threads=3), uncut(case))


@pytest.mark.parametrize("level", OTHER_BUILDS)
def test_every_instruction_set_gives_the_same_bits(level, tmp_path):
    """Each other build that this machine runs, in a process of its own, against the one loaded here."""
    script = (
        "import sys, json, numpy as np; sys.path.insert(0, sys.argv[1])\n"
        "from test_bits import run; from cases import CASES; from adaptive_c import _native\n"
        "assert _native.isa == sys.argv[2]\n"
        "np.savez(sys.argv[3], **{f'{i}/{d}/{k}': v for i, n, o in CASES for d in ('float32', 'float64')"
        " for k, v in run(n, o, size=9001, dtype=d).items()})"
    )
    out = tmp_path / "out.npz"
    subprocess.run(
        [sys.executable, "-c", script, os.path.dirname(__file__), level, out],
        check=True,
        env={**os.environ, "ADAPTIVE_C_ISA": level},
        cwd=tmp_path,
    )
    with np.load(out) as got:
        for i, name, options in CASES:
            for dtype in ("float32", "float64"):
                for key, value in run(name, options, size=9001, dtype=dtype).items():
                    assert_same_bits(got[f"{i}/{dtype}/{key}"], value, f"{level} {i} {dtype} {key}")


@pytest.mark.parametrize("n", [1, 2, 3, 10, 999, 123456789])
@pytest.mark.parametrize("x", [0.9, 0.999, 0.0, 1.0, 0.123456])
def test_powers_are_those_of_libm_to_rounding(x, n):
    from adaptive_c.reference import power, power_of_096

    assert power(x, n) == pytest.approx(x**n, rel=1e-12, abs=1e-300)
    assert power_of_096(n * 0.004) == pytest.approx(0.96 ** (n * 0.004), rel=1e-12, abs=1e-300)


def test_constants_are_formed_in_double():
    """1 - 0.999 formed in float32 is off by 1.3e-5."""
    import adaptive_c as ac

    p = np.zeros(1, "float32")
    opt = ac.Adam(p)
    opt.step(np.ones(1, "float32"))
    assert opt.state["exp_avg_sq"][0] == np.float32(1 - 0.999)
    assert opt.state["exp_avg_sq"][0] != np.float32(1) - np.float32(0.999)


CONSTANT = [("Adamax", {}, {"exp_avg": 1.1e-6}), ("Yogi", {}, {"exp_avg": 1.1e-6}), ("AdaBelief", {}, {"exp_avg": 1.1e-6}),
            ("SGD", {"momentum": 0.9, "dampening": 0.9}, {"momentum_buffer": 2.4e-7}),
            ("Adam", {}, {"exp_avg": 1.1e-6, "exp_avg_sq": 9.7e-5}), ("NAdam", {}, {"exp_avg": 1.1e-6, "exp_avg_sq": 9.7e-5}),
            ("RAdam", {}, {"exp_avg": 1.1e-6, "exp_avg_sq": 9.7e-5}), ("Adadelta", {}, {"square_avg": 1.1e-6}),
            ("RMSprop", {"centered": True}, {"square_avg": 9.8e-6, "grad_avg": 9.8e-6}), ("Lion", {}, {"exp_avg": 9.8e-6}),
            ("Adam", {"betas": (0.9, 0.9999)}, {"exp_avg_sq": 1.3e-3})]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("name", "options", "bounds"), CONSTANT, ids=lambda x: x if isinstance(x, str) else "")
def test_moments_of_a_constant_gradient_stay_as_near_as_the_docs_say(name, options, bounds, dtype):
    """b and 1 - b, each rounded, don't add up to 1; docs/update_rules.md has these figures."""
    g = np.random.default_rng(0).uniform(1, 2, 64).astype(dtype)
    opt = build(name, np.zeros(64, dtype), {"lr": 0.0, **options}, n_threads=1)
    for _ in range(100_000):
        opt.step(g)
    for key, bound in bounds.items():
        error = opt.state[key] / (g.astype("float64") ** (2 if "sq" in key else 1)) - 1
        if dtype == "float64":
            bound = max(bound * 2.2e-9, 4.6e-5 if "betas" in options else 0)
        assert abs(error).max() <= 1.05 * bound, key


@pytest.mark.parametrize(("calls", "bound"), [(10, 2.3e-7), (100, 1.6e-6), (1000, 1.5e-5)])
def test_the_mean_of_equal_micro_batches_is_as_near_as_the_docs_say(calls, bound):
    for dtype, unit in (("float32", 1.0), ("float64", 2.0**-29)):
        g = np.random.default_rng(1).uniform(1, 2, 1000).astype(dtype)
        p = np.zeros_like(g)
        opt = build("SGD", p, {"lr": 1.0, "maximize": True})
        for _ in range(calls):
            opt.accumulate(g)
        opt.step()
        assert abs(p / g.astype("float64") - 1).max() <= bound * unit * 1.1


def test_cases_are_json():  # the ids and options travel to subprocesses
    json.dumps(CASES)

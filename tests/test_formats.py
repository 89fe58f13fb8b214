"""Narrow numbers: parameters in float16 and bfloat16, state in bfloat16 and 8 bits, and how they are rounded."""

import functools
import hashlib
import json
import math
import os

import numpy as np
import pytest
from cases import IDS, PAIRS
from hypothesis import given, settings
from hypothesis import strategies as st
from support import (
    CHUNK,
    OTHER_BUILDS,
    assert_same_bits,
    build,
    child,
    flat,
    gradients,
    slots,
    spec,
    split,
    starts,
    step_range,
)
from test_stages import norm, to_bfloat16

import adaptive_c as ac
from adaptive_c import optimizers
from adaptive_c import reference as ref

NARROW = [(i, *pair) for i, pair in zip(IDS, PAIRS, strict=True)
          if pair[0] not in ("Rprop", "SuperSAB") and not pair[1].get("centered")]  # fmt: skip
UNSIGNED = {slot for name in optimizers.__all__ for slot, about in getattr(ac, name).rule.state.items()
            if about.coding in ("unsigned", "maximum")}  # fmt: skip
FORMATS = [
    {"state_dtype": "bfloat16"},
    {"state_dtype": "uint8"},
    {"parameters": "bfloat16", "rounding": "stochastic", "state_dtype": "uint8"},
    {"parameters": "bfloat16", "master": "float32", "state_dtype": "bfloat16"},
    {"parameters": "float16", "rounding": "stochastic", "state_dtype": "bfloat16"},
    {"parameters": "float16", "master": "float32"},
]  # fmt: skip
every_format = pytest.mark.parametrize("formats", FORMATS, ids=[" ".join(f.values()) for f in FORMATS])
noise = functools.lru_cache(maxsize=64)(ref.noise)  # the same for all rules, which only read it
every_rule = pytest.mark.parametrize(("name", "options"), [n[1:] for n in NARROW], ids=[n[0] for n in NARROW])


def wide(x, kind):
    return {"float32": lambda: x, "bfloat16": lambda: ref.from_bfloat16(x),
            "float16": lambda: x.view("float16").astype("float32")}[kind]()  # fmt: skip


def narrow(x, kind, words=None):
    """Stored numbers; without words rounded to nearest even."""
    if kind == "float32":
        return x
    if words is None:
        return to_bfloat16(x) if kind == "bfloat16" else x.astype("float16").view("uint16")
    return ref.to_bfloat16(x, words) if kind == "bfloat16" else ref.to_float16(x, words)


def allocate(rng, size, formats):
    kind = formats.get("parameters", "float32")
    p = narrow(rng.normal(size=size).astype("float32"), kind)
    return (p.view("float16") if kind == "float16" else p), kind


def shared(formats):
    return {**{k: v for k, v in formats.items() if k != "parameters"}, "uint16_as": "bfloat16"}


class Composition:
    """The same step put together from the reference: decode, rule, round, encode."""

    def __init__(self, name, options, formats, p, seed=0):
        self.name, self.options, self.formats, self.seed, self.t = name, options, formats, seed, 0
        self.kind = formats.get("parameters", "float32")
        self.p = p.view("uint16") if self.kind != "float32" else p.copy()
        self.master = wide(self.p, self.kind).copy() if "master" in formats else None
        self.state, self.slots = {}, slots(name)
        by_row = options.get("second_moment") == "row"  # these are not narrow
        self.moments = {slot for slot in self.slots if by_row and getattr(ac, name).rule.state[slot].moment}
        for slot, value in starts(name, options).items():
            if value:
                self.put(slot, np.full(p.size, value, "float32"), ref.NEAREST)

    def format_of(self, name):
        return "float32" if name in self.moments else self.formats.get("state_dtype", "float32")

    def put(self, name, x, words):
        kind = self.format_of(name)
        if kind == "float32":
            self.state[name] = x
        elif kind == "bfloat16":
            self.state[name] = ref.to_bfloat16(x, words)
        else:
            self.state[name], self.state[f"{name}_scale"] = ref.to_uint8(x, words, name not in UNSIGNED)

    def get(self, name):
        kind = self.format_of(name)
        x = self.state[name]
        if kind == "bfloat16":
            return ref.from_bfloat16(x)
        return x if kind == "float32" else ref.from_uint8(x, self.state[f"{name}_scale"], name not in UNSIGNED)

    def words(self, quantity):
        return noise(self.p.size, self.seed, self.t, 0, quantity)

    def rule(self, p, g, s):
        return spec(self.name)(p, g, s, self.t, **self.options)

    def step(self, g):
        self.t += 1
        s = {name: self.get(name) for name in self.slots if name in self.state}
        if "mu_product" in self.state:
            s["mu_product"] = self.state["mu_product"]
        # before the first step state is all zeros, but for 8 bits without a sign, where it is the smallest scale
        for name in self.slots if self.t == 1 else ():
            used = name != "max_exp_avg_sq" or self.options.get("amsgrad")
            if self.format_of(name) == "uint8" and name in UNSIGNED and name not in s and used:
                s[name] = np.full(self.p.size, 2.0**-119, "float32")
        p = self.master if self.master is not None else wide(self.p, self.kind)
        p = self.behind(self.rule(p, g, s))
        if self.master is not None:
            self.master, self.p = p, narrow(p, self.kind)
        else:
            self.p = narrow(p, self.kind, self.words(0))
        for slot, name in enumerate(self.slots):
            if name in s:
                self.put(
                    name, s[name].astype("float32"), ref.NEAREST if name == "max_exp_avg_sq" else self.words(1 + slot)
                )
        if "mu_product" in s:
            self.state["mu_product"] = s["mu_product"]

    def behind(self, p):
        """What is done to the parameters between the rule and their rounding: nothing."""
        return p

    def check(self, opt, parts):
        flat = np.concatenate([x.ravel() for x in parts])
        assert_same_bits(flat.view("uint16") if self.kind != "float32" else flat, self.p, f"p, t {self.t}")
        for name, want in self.state.items():
            if name == "mu_product":
                continue
            got = opt.state[name]
            if not name.endswith("_scale"):
                got = np.concatenate([x.ravel() for x in got])
            assert_same_bits(got, want, f"{name}, t {self.t}")
        if self.master is not None:
            assert_same_bits(np.concatenate([x.ravel() for x in opt.state["master"]]), self.master, "master")


def runs(name, options, formats):
    """The steps of two optimizers: each after its step, with what its parameters began with and are now, and the gradient."""
    rng = np.random.default_rng(0)
    for cuts, size in ([], 300), ([5, 250, 260, 4000, 4100, 4200], CHUNK + 333):
        p, _ = allocate(rng, size, formats)
        parts = split(p, cuts)
        opt = build(name, parts, options, seed=3, n_threads=2, **shared(formats))
        for g in gradients(rng, size, "float32", 4):
            opt.step(split(g, cuts))
            yield opt, p, parts, g


@every_format
@every_rule
def test_every_step_has_the_bits_of_the_composition_by_hand(name, options, formats):
    for opt, p, parts, g in runs(name, options, formats):
        if opt.t == 1:
            want = Composition(name, options, formats, p, seed=3)
        with np.errstate(over="ignore"):
            want.step(g)
        want.check(opt, parts)


@every_format
@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "Lion"])
def test_threads_cuts_and_ranges_do_not_change_a_bit(name, formats):
    def run(cuts=(), n_threads=1, ranges=False):
        rng = np.random.default_rng(1)
        size = 9 * CHUNK + 77
        p, _ = allocate(rng, size, formats)
        parts = [x.copy() for x in np.split(p, cuts)]
        opt = getattr(ac, name)(parts, lr=0.1, n_threads=n_threads, max_grad_norm=1.0, **shared(formats))
        for g in gradients(rng, size, "float32", 3):
            pieces = [(CHUNK * 4, -1), (0, CHUNK), (CHUNK, CHUNK * 4)] if ranges else [(0, -1)]
            for i, (lo, hi) in enumerate(pieces):
                step_range(opt, [x.copy() for x in np.split(g, cuts)], lo=lo, hi=hi, count=i == len(pieces) - 1)
        out = [np.concatenate([x.ravel() for x in parts])]
        for key in opt.state:
            if key != "step":
                out.append(opt.state[key] if key.endswith("_scale") else np.concatenate(opt.state[key]))
        return out

    want = run()
    for other in run(n_threads=2), run(n_threads=7), run(ranges=True), run(cuts=[1, 255, 257, 5000, 9000], n_threads=3):
        for a, b in zip(other, want, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("formats", FORMATS[2:4], ids=["stochastic", "master"])
def test_everything_switched_on_with_narrow_numbers(formats):
    """Average, copy and bounds see the weights that are stored: with a master copy that copy, else the narrow ones."""
    rng = np.random.default_rng(2)
    size, cuts, scale = CHUNK + 700, [100, 4500], 8.0
    p, kind = allocate(rng, size, formats)
    parts = [x.copy() for x in np.split(p, cuts)]
    copies = [np.empty(x.shape, "float16") for x in parts]
    opt = ac.AdamW(parts, lr=0.1, loss_scale=scale, max_grad_norm=2.0, ema_decay=0.9, copy_to=copies, zero_grad=True,
                   bounds=(-0.7501, 0.7001), on_nonfinite="raise", **shared(formats))  # fmt: skip
    want = Composition("AdamW", {"lr": 0.1}, formats, p)
    e = wide(want.p, kind).copy()
    lo, hi = -0.75, 0.69921875  # the next numbers of bfloat16 inside
    for t in range(3):
        raw = narrow(rng.normal(size=size).astype("float32"), "bfloat16")
        grads = [x.copy() for x in np.split(raw, cuts)]
        opt.step(grads)
        assert not any(x.any() for x in grads)
        g = wide(raw, "bfloat16")
        total = norm([g]) / scale
        assert opt.grad_norm == total
        want.t += 1
        state = {k: want.get(k) for k in ("exp_avg", "exp_avg_sq")} if t else {}
        if not t and formats["state_dtype"] == "uint8":
            state["exp_avg_sq"] = np.full(size, 2.0**-119, "float32")
        start = want.master if want.master is not None else wide(want.p, kind)
        q = spec("AdamW")(start, g * np.float32(min(2.0 / (total + 1e-6), 1.0) / scale), state, want.t, lr=0.1)
        q = np.minimum(np.maximum(q, np.float32(lo)), np.float32(hi))
        want.p = narrow(q, kind, want.words(0) if want.master is None else None)
        q = q if want.master is not None else wide(want.p, kind)
        want.master = q if want.master is not None else None
        for slot, k in enumerate(("exp_avg", "exp_avg_sq")):
            want.put(k, state[k].astype("float32"), want.words(1 + slot))
        e = e - np.float32(1 - 0.9) * (e - q)
        want.check(opt, parts)
        assert_same_bits(np.concatenate(opt.ema), e)
        assert_same_bits(np.concatenate(copies), q.astype("float16"))


def digests():
    """What each step of test_every_step_has_the_bits_of_the_composition_by_hand leaves: a digest of all its bits."""
    found = {}
    for case, name, options in NARROW:
        for formats in FORMATS:
            for i, (opt, _, parts, _) in enumerate(runs(name, options, formats)):
                for key, x in {"p": parts, **opt.state}.items():
                    what = f"{case}, {' '.join(formats.values())}, step {i}: {key}"
                    found[what] = hashlib.sha256(flat(x).tobytes()).hexdigest()
    return found


@pytest.fixture(scope="module")
def digests_here():
    return digests()


@pytest.mark.parametrize("level", OTHER_BUILDS)
def test_every_instruction_set_gives_the_same_bits(level, digests_here):
    """Each other build that this machine runs has the bits that the build loaded here has, which are the composition's."""
    script = (
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "import json, test_formats as t; from adaptive_c import _native\n"
        f"assert _native.isa == {level!r}\n"
        "for formats in t.FORMATS: t.test_a_run_restored_by_hand_goes_on_with_the_same_bits(formats)\n"
        "for formats in t.FORMATS[2:4]: t.test_everything_switched_on_with_narrow_numbers(formats)\n"
        "print(json.dumps(t.digests()))"
    )
    found = json.loads(child(script, ADAPTIVE_C_ISA=level))
    assert found.keys() == digests_here.keys()
    assert [what for what, bits in found.items() if bits != digests_here[what]] == []


# --- rounding --------------------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(x=st.floats(width=32, allow_nan=False, allow_infinity=False), kind=st.sampled_from(["bfloat16", "float16"]))
def test_stochastic_rounding_goes_to_a_neighbour_with_the_chance_of_its_distance(x, kind):
    x = np.float32(max(min(x, 65504.0), -65504.0) if kind == "float16" else max(min(x, 3.3e38), -3.3e38))
    words = ref.noise(1 << 16, 0, 1, 0, 0)
    got = wide(narrow(np.full(words.size, x), kind, words), kind).astype("float64")
    low, high = got.min(), got.max()
    slack = 2.0**-40 if kind == "float16" else 0.0  # of a chance below 2^-16 nothing is seen here
    assert low - slack <= x <= high + slack
    neighbours = narrow(np.array([low, high], "float32"), kind).astype("int32")
    assert abs(int(neighbours[1]) - int(neighbours[0])) <= 1 or {low, high} == {-0.0, 0.0}
    assert got.mean() == pytest.approx(float(x), abs=(high - low) / 100 + slack)


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_a_number_that_the_format_has_stays_as_it_is(kind):
    p = np.arange(1 << 16, dtype="uint16")
    finite = p[np.isfinite(wide(p, kind))]
    p = finite.copy() if kind == "bfloat16" else finite.view("float16").copy()
    opt = ac.SGD(p, lr=0.0, rounding="stochastic", uint16_as="bfloat16")
    for _ in range(20):
        opt.step(np.zeros(p.shape, "float32"))
    assert_same_bits(p.view("uint16"), finite)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "uint8"])
def test_a_second_moment_near_the_largest_number_stays_finite(state_dtype):
    p, g = np.ones(512, "float32"), np.ones(512, "float32")
    g[5] = 1.815e19  # its square is 3.29e38: above uint8's largest code, below bfloat16's largest number
    opt = ac.RMSprop(p, alpha=0.0, state_dtype=state_dtype, on_nonfinite="raise")
    for _ in range(20):
        opt.step(g)
        assert np.isfinite(opt.decoded_state("square_avg")).all()


def test_noise_is_uniform_and_differs_for_steps_groups_quantities_and_seeds():
    n = 1 << 18
    words = [
        ref.noise(n, *key) / 2**32 for key in [(0, 1, 0, 0), (0, 2, 0, 0), (0, 1, 1, 0), (0, 1, 0, 1), (1, 1, 0, 0)]
    ]
    for w in words:
        counts = np.bincount((w * 64).astype(int), minlength=64)
        assert abs(counts - n / 64).max() < 5 * math.sqrt(n / 64)
        assert abs(np.corrcoef(w[:-1], w[1:])[0, 1]) < 0.1  # the fixed table's
    for i, w in enumerate(words):
        for v in words[:i]:
            assert abs(np.corrcoef(v, w)[0, 1]) < 0.1  # 1024 blocks with a hash each


@settings(max_examples=100)
@given(data=st.data(), signed=st.booleans())
def test_8_bits_keep_what_they_can_and_encode_it_again_unchanged(data, signed):
    size = data.draw(st.integers(1, 600))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    x = (rng.normal(size=size) * 10.0 ** rng.uniform(-data.draw(st.integers(0, 12)), 0, size)).astype("float32")
    x = x if signed else np.abs(x)
    words = ref.noise(size, 1, 2, 3, 1)
    code, scales = ref.to_uint8(x, words, signed)
    y = ref.from_uint8(code, scales, signed)
    floor = np.repeat(scales, 256)[:size] * (1.125 if signed else 1.0)
    assert (abs(y - x) <= np.maximum(abs(x) / 8, floor)).all()
    assert (y[np.abs(x) >= floor] * x[np.abs(x) >= floor] > 0).all()  # the sign stays, and no 0 for what is not small
    again, same_scales = ref.to_uint8(y, ref.noise(size, 5, 5, 5, 1), signed)
    assert_same_bits(again, code)
    assert_same_bits(same_scales, scales)


def test_a_second_moment_far_below_its_block_makes_no_step_without_bound():
    p = np.zeros(256, "float32")
    opt = ac.AdamW(p, lr=1e-3, eps=0.0, weight_decay=0.0, state_dtype="uint8")
    g = np.full(256, 1e-9, "float32")
    g[0] = 1e4
    for _ in range(20):
        before = p.copy()
        opt.step(g)
        assert np.isfinite(p).all()
        assert abs(p - before).max() < 1.1e-3
    g[1:] = 0  # an exactly zero gradient: m / (sqrt(0) + 0) elsewhere
    for _ in range(20):
        opt.step(g)
        assert np.isfinite(p).all()
    assert (opt.decoded_state("exp_avg_sq") > 0).all()


@pytest.mark.parametrize("state_dtype", ["bfloat16", "uint8"])
@pytest.mark.parametrize(
    "bad", [np.uint32(0x7FC00000), np.uint32(0xFFFFFFFF), np.uint32(0x7FFFFFFF), np.uint32(0x7F800000)]
)
def test_what_is_not_finite_stays_visible(bad, state_dtype):
    p, g = np.ones(600, "float32"), np.ones(600, "float32")
    opt = ac.AdamW(p, state_dtype=state_dtype)
    g.view("uint32")[300] = bad
    opt.step(g)
    opt.step(np.ones(600, "float32"))
    for name in ("exp_avg", "exp_avg_sq"):
        x = opt.decoded_state(name)
        assert not np.isfinite(x[300])
        assert np.isfinite(np.delete(x, 300)).all()
    assert np.isnan(p[300])
    assert np.isfinite(np.delete(p, 300)).all()


@pytest.mark.parametrize("kind", ["bfloat16", "float32"])
@pytest.mark.parametrize("bad", [0x7FC0, 0xFFFF, 0x7FFF, 0x7F81, 0x7F80])
def test_what_is_not_finite_stays_visible_in_bfloat16(bad, kind):
    """Where all numbers are bfloat16 the check for NaN is left out; the bits show that nothing needs it."""
    g = np.full(600, 0x3F80, "uint16")
    g[300] = bad
    p = np.full(600, 0x3F80, "uint16")
    opt = ac.AdamW(p, rounding="stochastic", state_dtype="bfloat16", uint16_as="bfloat16")
    for _ in range(30):
        opt.step(g if kind == "bfloat16" else ref.from_bfloat16(g))
        for x in (ref.from_bfloat16(p), opt.decoded_state("exp_avg"), opt.decoded_state("exp_avg_sq")):
            assert not np.isfinite(x[300])
            assert np.isfinite(np.delete(x, 300)).all()


@pytest.mark.parametrize("i", [0, 1])
def test_a_nan_of_float32_stays_visible_beside_gradients_of_bfloat16(i):
    """The check for NaN is left out only where all gradients of a group are bfloat16."""
    parts = [np.full(600, 0x3F80, "uint16") for _ in range(2)]
    opt = ac.AdamW(parts, rounding="stochastic", state_dtype="bfloat16", uint16_as="bfloat16")
    grads = [x.copy() for x in parts]
    grads[i] = np.ones(600, "float32")
    grads[i].view("uint32")[300] = 0x7FFFFFFF  # rounded without that check it would be -0.0
    for _ in range(30):
        opt.step(grads)
        for x in (ref.from_bfloat16(parts[i]), opt.decoded_state("exp_avg")[i], opt.decoded_state("exp_avg_sq")[i]):
            assert not np.isfinite(x[300])
            assert np.isfinite(np.delete(x, 300)).all()


# --- as good as float32 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state_dtype", ["bfloat16", "uint8"])
@pytest.mark.parametrize("name", ["Adam", "RMSprop", "Adadelta", "NAdam", "RAdam"])
def test_a_constant_gradient_fills_the_second_moment_and_its_absence_empties_it(name, state_dtype):
    n, beta2 = 4096, 0.999
    rng = np.random.default_rng(3)
    g = (rng.choice([-1, 1], n) * np.exp(rng.normal(size=n))).astype("float32")
    p = np.zeros(n, "float32")
    options = (
        {"alpha": beta2} if name == "RMSprop" else {"rho": beta2} if name == "Adadelta" else {"betas": (0.9, beta2)}
    )
    opt = getattr(ac, name)(p, lr=1e-3, state_dtype=state_dtype, **options)
    slot = "square_avg" if "square_avg" in opt.state else "exp_avg_sq"
    for _ in range(10_000):
        opt.step(g)
    start = opt.decoded_state(slot) / g**2
    assert start.mean() == pytest.approx(1, rel=0.03)
    for k in range(1, 2001):
        opt.step(np.zeros_like(g))
        if k in (100, 500, 1000, 2000):
            assert (opt.decoded_state(slot) / g**2).mean() == pytest.approx(start.mean() * beta2**k, rel=0.05)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "uint8"])
def test_a_constant_gradient_fills_yogis_second_moment_and_its_absence_leaves_it(state_dtype):
    rng = np.random.default_rng(3)
    g = (rng.choice([-1, 1], 4096) * np.exp(rng.normal(size=4096))).astype("float32")
    p = np.zeros(4096, "float32")
    opt = ac.Yogi(p, betas=(0.9, 0.99), state_dtype=state_dtype)
    first = opt.decoded_state("exp_avg_sq")
    np.testing.assert_allclose(first, 1e-6, rtol=0.06)
    assert (opt.decoded_state("exp_avg") == first).all()
    for _ in range(1000):
        opt.step(g)
    v = opt.decoded_state("exp_avg_sq")
    assert (v / g**2).mean() == pytest.approx(1, rel=0.03)
    for _ in range(1000):
        opt.step(np.zeros_like(g))
    assert (opt.decoded_state("exp_avg_sq") == v).all()


@pytest.mark.parametrize(("state_dtype", "mean", "bound"), [
    ("bfloat16", 2, 0.001), ("bfloat16", 10, 0.004), ("uint8", 2, 0.04), ("uint8", 10, 0.35),
])  # fmt: skip
def test_adabeliefs_second_moment_has_the_rounding_of_the_first_in_it(state_dtype, mean, bound):
    """Its square is added, so steps are shorter and never longer: docs/narrow_numbers.md, when not to."""
    rng = np.random.default_rng(4)
    p = np.zeros((2, 4096), "float32")
    opt, full = ac.AdaBelief(p[0], state_dtype=state_dtype), ac.AdaBelief(p[1])
    for _ in range(1000):
        g = (rng.normal(size=4096) + mean).astype("float32")
        opt.step(g)
        full.step(g)
    v = opt.decoded_state("exp_avg_sq").mean(dtype="float64") / full.state["exp_avg_sq"].mean(dtype="float64")
    assert 1 < v < 1 + bound


@pytest.mark.parametrize(("state_dtype", "longest"), [("bfloat16", 520), ("uint8", 33)])
def test_adabeliefs_steps_under_a_constant_gradient_are_bounded_by_the_rounding(state_dtype, longest):
    g = np.exp(np.random.default_rng(3).normal(size=4096)).astype("float32")
    p = np.zeros_like(g)
    opt = ac.AdaBelief(p, lr=1.0, betas=(0.9, 0.99), state_dtype=state_dtype)
    for _ in range(2000):
        before = p.copy()
        opt.step(g)
    step = np.median(before - p)
    assert longest / 1.3 < step < longest


@pytest.fixture(scope="module")
def thousand_gradients():
    rng = np.random.default_rng(4)
    return [(rng.normal(size=4096) + 0.5).astype("float32") for _ in range(1000)]


@pytest.mark.parametrize("formats", [f for f in FORMATS if "master" not in f], ids=lambda f: " ".join(f.values()))
@pytest.mark.parametrize(("name", "options"), [
    (name, {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9}, "Adam": {"amsgrad": True}}.get(name, {}))
    for name in optimizers.__all__ if any(name == narrow[1] for narrow in NARROW)
])  # fmt: skip
def test_moments_and_path_stay_near_those_of_float32(name, options, formats, thousand_gradients):
    n = 4096
    p, q = np.zeros(n, "float32"), np.zeros(n, "float32")
    stored = (
        p if "parameters" not in formats else np.zeros(n, "float16" if formats["parameters"] == "float16" else "uint16")
    )
    lr = {"SGD": 1e-3, "Lion": 1e-4}.get(name, 1e-3)
    opt = getattr(ac, name)(stored, lr=lr, **options, **shared(formats))
    full = getattr(ac, name)(q, lr=lr, **options)
    for g in thousand_gradients:
        opt.step(g)
        full.step(g)
    for slot in (s for s in full.state if s not in ("step", "mu_product")):
        ratio = opt.decoded_state(slot).mean(dtype="float64") / full.state[slot].mean(dtype="float64")
        # the maxima of docs/narrow_numbers.md; RMSprop's buffer and Adadelta's acc_delta are of steps, as the path is
        bounds = {"exp_inf": 0.03, "max_exp_avg_sq": 0.05, "acc_delta": 0.08}
        bound = 0.02 if (name, slot) == ("RMSprop", "momentum_buffer") else bounds.get(slot, 0.01)
        assert ratio == pytest.approx(1, rel=bound), slot
    got = wide(stored.view("uint16"), formats["parameters"]) if "parameters" in formats else stored
    bound = 0.03 if name == "Adadelta" and "uint8" in formats.values() else 0.02  # docs/narrow_numbers.md: when not to
    assert got.mean(dtype="float64") == pytest.approx(q.mean(dtype="float64"), rel=bound)


def sums(rows, of, n):
    """The sums of the rows of an array that have the same number, of n numbers."""
    return np.stack([np.bincount(rows, column, n) for column in of.T], 1).astype("float32")


@functools.cache  # with float32 for each format that is compared to it
def factorise(name, seed, state_dtype, rows=200, rank=4, entries=20_000, epochs=30, lr=0.02):
    """Test loss of a matrix factorisation from observed entries with noise; the short form of benchmarks/train.py's."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rows, rank)), rng.normal(size=(rows, rank))
    i, j = rng.integers(0, rows, (2, entries))
    y = (a[i] * b[j]).sum(1) / math.sqrt(rank) + 0.1 * rng.normal(size=entries)
    u, v = (0.3 * rng.normal(size=(2, rows, rank))).astype("float32")
    opt = getattr(ac, name)([u, v], lr=lr, state_dtype=state_dtype, seed=seed)
    train = rng.random(entries) < 0.9
    for _ in range(epochs):
        for part in np.array_split(rng.permutation(np.flatnonzero(train)), 20):
            error = ((u[i[part]] * v[j[part]]).sum(1) - y[part]).astype("float32")[:, None]
            opt.step([sums(i[part], error * v[j[part]], rows), sums(j[part], error * u[i[part]], rows)])
    return float(np.mean(((u[i[~train]] * v[j[~train]]).sum(1) - y[~train]) ** 2))


@pytest.mark.parametrize("state_dtype", ["bfloat16", "uint8"])
@pytest.mark.parametrize(("name", "lr"), [("AdamW", 0.02), ("Adagrad", 0.1)])
def test_a_matrix_factorisation_trains_as_well(name, lr, state_dtype):
    losses = [[factorise(name, seed, kind, lr=lr) for seed in range(5)] for kind in (None, state_dtype)]
    full, small = np.mean(losses, axis=1)
    assert small == pytest.approx(full, rel=0.02)


# --- the interface ---------------------------------------------------------------------------------------------------


def hard_blocks(rng, blocks):
    """Blocks of 256 numbers: zeros of both signs, denormals, few or many binades anywhere, and anything at all."""
    x = rng.normal(size=(blocks, 256)) * 10.0 ** rng.uniform(-44, 38, (blocks, 1))
    with np.errstate(over="ignore", under="ignore"):
        x = (x * 10.0 ** -(rng.choice([0, 3, 8, 40], (blocks, 1)) * rng.random((blocks, 256)))).astype("float32")
    x[rng.random(x.shape) < rng.choice([0, 1 / 256, 1 / 3, 1], (blocks, 1), p=[0.3, 0.3, 0.3, 0.1])] *= 0
    x[:3] = np.array([0.0, -0.0, 1e-33], "float32")[:, None]  # all alike
    x[3:6, ::7] = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800000], "uint32").view("float32")[:, None]
    anything = rng.integers(0, 2**32, (blocks // 8, 256), dtype="uint64").astype("uint32")
    x[6 : 6 + blocks // 8] = anything.view("float32")
    return x.ravel()


@pytest.mark.parametrize(
    ("name", "options"), [("SGD", {"momentum": 0.5}), ("Adagrad", {}), ("RMSprop", {"alpha": 0.01})]
)
def test_any_block_is_encoded_as_the_reference_says(name, options):
    """SGD's first momentum is the gradient itself; with a scale that was right before, and one that was not."""
    formats, options = {"state_dtype": "uint8"}, {"lr": 0.0, **options}
    p = np.zeros(400 * 256, "float32")
    want = Composition(name, options, formats, p)
    opt = build(name, p, options, **formats)
    g = hard_blocks(np.random.default_rng(6), 400)
    for x in (g, g, np.roll(g, 256 * 37)):
        opt.step(x)
        with np.errstate(all="ignore"):
            want.step(x)
        for key in want.state:  # decoded, as the sign of a NaN is nowhere promised
            got, expected = (
                (opt.decoded_state(key), want.get(key)) if key in slots(name) else (opt.state[key], want.state[key])
            )
            assert_same_bits(got, expected, f"{key}, t {want.t}")


def test_memory_of_8_bits():
    opt = ac.Adam(np.zeros(1 << 20, "float32"), state_dtype="uint8")
    assert opt.nbytes / (1 << 20) == 2 + 2 * 4 / 256
    assert ac.Adam(np.zeros(1 << 20, "float32"), state_dtype="bfloat16").nbytes == 4 << 20
    assert ac.Adam(np.zeros(1 << 20, "float16"), master="float32").nbytes == 12 << 20
    assert ac.Adam(np.zeros(1 << 20, "float16"), rounding="stochastic", state_dtype="uint8").nbytes < 2.04 * (1 << 20)


def test_state_holds_what_is_stored_and_decoded_state_copies():
    w, b = np.ones((20, 30), "float32"), np.ones(7, "float32")
    opt = ac.AdamW({"w": w, "b": b}, state_dtype="uint8", amsgrad=True)
    opt.step({"w": np.ones_like(w), "b": np.ones_like(b)})
    assert list(opt.state) == ["exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale", "max_exp_avg_sq",
                               "max_exp_avg_sq_scale", "step"]  # fmt: skip
    assert opt.state["exp_avg"]["w"].shape == (20, 30)
    assert opt.state["exp_avg"]["w"].dtype == np.uint8
    assert opt.state["exp_avg_scale"].shape == (3,)
    decoded = opt.decoded_state("exp_avg")
    np.testing.assert_allclose(decoded["w"], 0.1, rtol=0.08)
    assert decoded["b"].dtype == np.float32
    decoded["b"][:] = 7
    assert (opt.decoded_state("exp_avg")["b"] < 1).all()
    for missing in ("exp_avg_scale", "step", "sum"):
        with pytest.raises(KeyError):
            opt.decoded_state(missing)
    full = ac.AdamW([{"params": w}, {"params": np.ones(3)}])
    assert [x.dtype for x in full.decoded_state("exp_avg")] == [np.float32, np.float64]
    assert not np.shares_memory(full.decoded_state("exp_avg")[0], full.state["exp_avg"][0])


def test_groups_of_several_formats():
    f, d, h = np.ones(300, "float32"), np.ones(3), np.ones(300, "float16")
    opt = ac.AdamW(
        [{"params": f, "state_dtype": "uint8"}, {"params": d}, {"params": h, "rounding": "stochastic"}], lr=0.01
    )
    for _ in range(3):
        opt.step([np.ones_like(f), np.ones_like(d), np.ones_like(h)])
    np.testing.assert_allclose(np.concatenate([f, d, h]), 0.97, atol=2e-3)
    assert opt.state["exp_avg"][0].dtype == np.uint8
    assert opt.state["exp_avg_scale"][1] is None


@pytest.mark.parametrize("state_dtype", ["bfloat16", "uint8"])
def test_an_array_without_a_gradient_keeps_its_state_though_it_shares_a_block(state_dtype):
    parts = [np.ones(n, "float32") for n in (100, 50, 500)]
    opt = ac.AdamW(parts, state_dtype=state_dtype)
    rng = np.random.default_rng(5)
    opt.step([rng.uniform(0.5, 2, x.shape).astype("float32") for x in parts])  # none falls below the smallest code
    before = opt.decoded_state("exp_avg"), opt.decoded_state("exp_avg_sq"), [x.copy() for x in parts]
    for _ in range(5):
        opt.step([rng.normal(size=100).astype("float32") * 30, None, None])
    after = opt.decoded_state("exp_avg"), opt.decoded_state("exp_avg_sq"), parts
    for a, b in zip(before, after, strict=True):
        assert_same_bits(a[1], b[1])
        assert_same_bits(a[2], b[2])
    if state_dtype == "uint8":  # but for what a new scale leaves too small
        opt.step([np.full(100, 1e6, "float32"), None, None])
        lifted = opt.decoded_state("exp_avg_sq")
        assert (lifted[1] > after[1][1]).all()
        assert_same_bits(lifted[2][106:], after[1][2][106:])  # other blocks


@pytest.mark.parametrize("state_dtype", ["bfloat16", "uint8"])
def test_an_array_behind_one_without_a_gradient_is_stepped_though_it_shares_a_block(state_dtype):
    found = []
    for first in (None, np.zeros(100, "float32")):  # which leaves the zeros of its state
        parts = [np.ones(n, "float32") for n in (100, 50, 500)]
        opt = ac.SGD(parts, lr=0.1, momentum=0.9, state_dtype=state_dtype, seed=1)
        rng = np.random.default_rng(5)
        for _ in range(3):
            opt.step([first, *(rng.normal(size=x.shape).astype("float32") for x in parts[1:])])
        found.append((*parts, *opt.state["momentum_buffer"]))
    for a, b in zip(*found, strict=True):
        assert_same_bits(a, b)
    assert (found[0][1] != 1).all()


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_copies_of_narrow_parameters_are_what_is_stored(kind):
    p = np.ones(600, "float16" if kind == "float16" else "uint16")
    copy = np.empty(600, "float32")
    opt = ac.SGD(p, lr=1e-3, rounding="stochastic", copy_to=copy, uint16_as="bfloat16")
    for _ in range(3):
        opt.step(np.random.default_rng(0).normal(size=600).astype("float32"))
        assert_same_bits(copy, wide(p.view("uint16"), kind))


def test_narrow_parameters_without_a_gradient_stay_with_their_averages():
    parts = [np.ones(n, "float16") for n in (100, 0, 50, 0, 500)]
    opt = ac.AdamW(parts, rounding="stochastic", state_dtype="uint8", ema_decay=0.5)
    grads = [np.full(x.shape, 0.5, "float16") for x in parts]
    opt.step(grads)
    before = [x.copy() for x in (*parts, *opt.ema)]
    opt.step([grads[0], grads[1], None, grads[3], None])
    for i, (a, b) in enumerate(zip(before, (*parts, *opt.ema), strict=True)):
        if i % 5 in (2, 4):
            assert_same_bits(a, b)
    assert (before[0] != parts[0]).any()


@every_format
def test_a_run_restored_by_hand_goes_on_with_the_same_bits(formats):
    rng = np.random.default_rng(8)
    grads = [rng.normal(size=900).astype("float32") for _ in range(8)]
    p, _ = allocate(rng, 900, formats)
    opt = ac.AdamW(p, lr=0.01, ema_decay=0.9, seed=4, **shared(formats))
    for g in grads[:4]:
        opt.step(g)
    saved = {key: np.array(value) for key, value in opt.state.items()}
    q, ema, t = p.copy(), np.array(opt.ema), opt.t
    again = ac.AdamW(q, lr=0.01, ema_decay=0.9, seed=4, n_threads=2, **shared(formats))
    again.t = t
    again.ema[...] = ema
    for key, value in saved.items():
        again.state[key][...] = value
    for g in grads[4:]:
        opt.step(g)
        again.step(g)
    assert_same_bits(q, p)
    assert_same_bits(again.ema, opt.ema)
    for key in opt.state:
        assert_same_bits(again.state[key], opt.state[key], key)


@pytest.mark.parametrize("choice", [{"master": "float32"}, {"rounding": "stochastic"}], ids=str)
def test_averages_of_narrow_parameters(choice):
    params = [np.ones((40, 30), "float16"), np.full(7, 2, "float16")]
    opt = ac.SGD(params, lr=0.001, ema_decay=0.75, **choice)
    assert opt.ema[0].dtype == np.float32
    for _ in range(5):
        opt.step([np.ones_like(p) for p in params])
    before, averages = [p.copy() for p in params], [e.copy() for e in opt.ema]
    with opt.averaged_parameters():
        for p, e, live in zip(params, averages, opt.ema, strict=True):
            assert_same_bits(p, e.astype("float16"))
            assert_same_bits(live, e)
    for p, b in zip(params, before, strict=True):
        assert_same_bits(p, b)
    opt.step([np.ones_like(p) for p in params])


def test_small_updates_add_up():
    for choice in ({"master": "float32"}, {"rounding": "stochastic"}):
        p = np.ones(4096, "float16")
        opt = ac.SGD(p, lr=1e-5, **choice)
        for _ in range(1000):
            opt.step(np.ones_like(p))
        assert p.mean(dtype="float64") == pytest.approx(0.99, abs=3e-4)  # float16's spacing is 5e-4; to nearest: 1


def test_ml_dtypes_bfloat16():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    a = np.ones(300, ml_dtypes.bfloat16)
    b = a.view("uint16").copy()
    for p, more in (a, {}), (b, {"uint16_as": "bfloat16"}):
        opt = ac.AdamW(p, lr=1e-3, rounding="stochastic", **more)
        for _ in range(5):
            opt.step(p.copy())
    assert_same_bits(a.view("uint16"), b)


def test_the_seed_decides():
    def run(seed):
        p = np.ones(1000, "float16")
        opt = ac.SGD(p, lr=1e-4, rounding="stochastic", seed=seed)
        opt.step(np.ones_like(p))
        return p

    assert_same_bits(run(1), run(1))
    assert (run(1) != run(2)).any()
    assert ac.SGD(np.ones(2), seed=2**64 - 1).seed == 2**64 - 1
    for bad in (-1, 2**64):
        with pytest.raises(ValueError, match=r"seed must be in \[0, 2\*\*64\)"):
            ac.SGD(np.ones(2), seed=bad)
    with pytest.raises(TypeError, match="seed must be an integer"):
        ac.SGD(np.ones(2), seed=1.0)


def test_flushed_denormals_do_not_change_what_is_decoded():
    def run(flush):
        p = np.full(512, 6e-8, "float16")  # denormal in float16, not in float32
        opt = ac.SGD(p, lr=1.0, momentum=0.5, master="float32", state_dtype="uint8", flush_denormals=flush)
        for _ in range(4):
            opt.step(np.full(512, 1.2e-7, "float16"))
        return p, opt.decoded_state("momentum_buffer")

    try:
        flushed = run(True)
    except ValueError:
        pytest.skip("this processor has no such mode")
    for a, b in zip(flushed, run(False), strict=True):
        assert_same_bits(a, b)


REFUSED = [
    (ac.SGD, np.ones(3, "float16"), {}, "small updates vanish when they are rounded to nearest"),
    (ac.SGD, np.ones(3, "float16"), {"master": "float32", "rounding": "stochastic"}, "exclude each other"),
    (ac.SGD, np.ones(3, "float32"), {"master": "float32"}, "master='float32' is for float16 and bfloat16"),
    (ac.SGD, np.ones(3), {"rounding": "stochastic"}, "rounding='stochastic' is for float16 and bfloat16"),
    (ac.SGD, np.ones(3, "float16"), {"rounding": "nearest"}, "rounding must be 'stochastic'"),
    (ac.Adam, np.ones(3), {"state_dtype": "uint8"}, "refused for float64 parameters"),
    (ac.Adam, np.ones(3), {"state_dtype": "float32"}, "refused for float64 parameters"),
    (ac.Adam, np.ones(3, "float32"), {"state_dtype": "int8"}, "state_dtype must be"),
    (ac.Rprop, np.ones(3, "float32"), {"state_dtype": "uint8"}, "refused for Rprop: rounding noise"),
    (ac.SuperSAB, np.ones(3, "float32"), {"state_dtype": "bfloat16"}, "refused for SuperSAB: rounding noise"),
    (ac.RMSprop, np.ones(3, "float32"), {"state_dtype": "uint8", "centered": True}, "refused with centered=True"),
    (ac.RMSprop, np.ones(3, "float32"), {"state_dtype": "bfloat16", "centered": True}, "refused with centered=True"),
]  # fmt: skip


@pytest.mark.parametrize(("cls", "p", "options", "message"), REFUSED, ids=[r[3][:40] for r in REFUSED])
def test_refused_formats(cls, p, options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        cls(p, **options)


def test_bounds_of_bfloat16():
    for bound in (np.full(300, 0x3F00, "uint16"), np.full(300, 0.5, "float32")):
        p = np.full(300, 0x3F80, "uint16")
        opt = ac.SGD(p, lr=10.0, rounding="stochastic", uint16_as="bfloat16", bounds=(bound, None))
        opt.step(np.ones(300, "float32"))
        assert (p == 0x3F00).all()


@pytest.mark.parametrize("sign", [1, -1])
def test_bounds_of_bfloat16_are_rounded_inward_on_either_side_of_zero(sign):
    """To nearest, 0.7512 would be 0.75 and 0.9985 would be 1: both outside."""
    low, high = sorted([sign * 0.7512, sign * 0.9985])
    inside = sorted([sign * 0.75390625, sign * 0.99609375])
    for bounds in (low, high), (np.full(300, low), np.full(300, high)):
        for up, want in enumerate(inside):
            p = np.full(300, 0x3F60 if sign > 0 else 0xBF60, "uint16")  # 0.875
            opt = ac.SGD(p, lr=10.0, maximize=bool(up), rounding="stochastic", uint16_as="bfloat16", bounds=bounds)
            opt.step(np.ones(300, "float32"))
            assert (ref.from_bfloat16(p) == np.float32(want)).all()


def test_formats_can_not_change():
    opt = ac.AdamW(np.ones(3, "float32"), state_dtype="bfloat16")
    for name, value in (("state_dtype", None), ("state_dtype", "uint8"), ("copy_to", np.ones(3, "float32"))):
        with pytest.raises(ValueError, match=f"{name} can't be changed"):
            opt.param_groups[0][name] = value
    opt.param_groups[0]["state_dtype"] = "".join(["bfloat", "16"])  # equal, but another object
    assert ac.AdamW(np.ones(3, "float32"), state_dtype=np.uint8).param_groups[0]["state_dtype"] == "uint8"
    with pytest.raises(TypeError, match="say uint16_as='bfloat16'"):
        ac.SGD(np.ones(3, "uint16"))


@pytest.mark.parametrize("rule", ["AdamW", "RMSprop", "Adadelta"])
def test_second_moments_of_zeros_are_normal_numbers_times_a_beta_too(rule):  # others are slow to compute with
    opt = getattr(ac, rule)(np.ones(300, "float32"), state_dtype="uint8")
    for _ in range(3):
        opt.step(np.zeros(300, "float32"))
    for name in ("exp_avg_sq", "square_avg", "acc_delta"):
        if name in opt.state:
            assert opt.decoded_state(name).min() * 2.0**-7 >= np.finfo("float32").tiny

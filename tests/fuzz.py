"""Random optimizers, stepped, saved, undone and misused at random, held to what the library promises exactly.

    python tests/fuzz.py --count 3000 --seed 0

Each seed is a run of two twins: optimizers over the same numbers, which differ in everything that must not matter
(the cut of the parameter space into arrays, their shapes and places in memory, lists or dicts, the number of threads,
the dtypes that gradients are widened from, memory or disk).  After every call both must hold the same bits, and what a model of a few
lines knows of counts, bounds, copies and gradients must be so.  A call that raises must leave everything as it was.

Only the public interface is used.  A failure prints the seed and the shortest list of calls that still shows it; the
seed of a run that ends the process (a crash, a sanitizer's report, 120 seconds without an end) is the last on stderr.
"""

import argparse
import contextlib
import faulthandler
import sys
import traceback

import numpy as np
from fuzz_calls import REFUSALS, Calls
from fuzz_rows import Dense, Sparse, dense
from fuzz_twins import (
    CANARY,
    DTYPES,
    PER_ARRAY,
    RULES,
    SETTINGS,
    Group,
    Twin,
    bits,
    differing,
    draw_options,
    in_turn,
    leaving,
    nearest,
    pick,
)

# The calls of a run, and how often each is drawn.
CALLS = {"step": 9, "accumulate": 4, "step_sums": 3, "discard": 1, "rollback": 3, "add_group": 1, "averaged": 1,
         "save": 2, "state_dict": 2, "set_t": 1, "assign": 4, "assign_setting": 2, "write": 1, "wrong": 6,
         "catch_up": 2}  # fmt: skip


# How far one rounding may move a number, relatively, with a margin.
ROUNDING = {"float64": 1e-12, "float32": 1e-6, "float16": 2e-3, "bfloat16": 2e-2}


class Run(Calls):
    """One seed: the twins, what is expected of them, and the calls."""

    def __init__(self, seed):
        self.seed, self.log = seed, []
        rng = np.random.default_rng(seed)
        self.rule = pick(rng, RULES)
        self.words = rng.random() < 0.5
        self.strict = rng.random() < 0.3  # under np.seterr(all="raise") the same must happen
        self.options = draw_options(rng, self.rule)
        self._wild = self.options.get("eps") == 0.0
        self.uncut = rng.random() < 0.3  # the arrays of all twins are the segments, and norms of arrays are the same
        self.settings = {name: self.setting(rng, name) for name in SETTINGS if rng.random() < 0.3}
        if rng.random() < 0.15:
            self.settings |= {"loss_scale": "dynamic", "on_nonfinite": "skip"}
        self.dynamic = self.settings.get("loss_scale") == "dynamic"
        self.settings["keep_undo"] = bool(rng.random() < 0.4)
        self.groups = [Group(rng, self.rule, self.options) for _ in range(pick(rng, [1, 1, 2, 3]))]
        self.t = self.skipped = self.pending = 0
        self.summed = self.undo = None  # which segments have sums; what a rollback gives again
        self.sums_bad = self.sums_wild = self.written = self.aside = False  # aside: there are sums of rows
        self.assigned = []
        self.length = int(rng.integers(3, 16))
        self.on_disk = rng.random() < 0.2  # the state of the second twin
        self.memory = pick(rng, [1 << 20, 1 << 23])
        self.kept = bool(rng.random() < 0.7) and not self.settings["keep_undo"]  # parameters too
        for group in self.groups if self.on_disk else ():
            group.options["rows"] = "lazy"
        shown = [
            f"{g.dtype} {g.segments} rows of {g.length} {g.options} copies={g.copies} bounds={g.bounds and 'set'}"
            for g in self.groups
        ]
        self.log.append(f"{self.rule} {self.options} {self.settings}; " + "; ".join(shown))

    def setting(self, rng, name):
        return pick(rng, [x for x in SETTINGS[name] if x != "array" or self.uncut])

    @property
    def wild(self):
        """May parameters become infinite or NaN?  Once they may, they may always: a sum to divide by may be tiny."""
        return self._wild or any(g.dtype == "float16" or g.options["sum_to_one"] for g in self.groups)

    @property
    def exact(self):
        """May rows lag behind?  Looking at the state brings them up to date, so it is done now and then."""
        return any(g.options["rows"] == "exact" for g in self.groups)

    @property
    def looking(self):
        return not self.aside and (self.looks or not self.exact)

    @property
    def hot(self):
        """May a schedule be out of range now?"""
        return self.options.get("lr") is leaving or any(x[-1] is leaving for x in self.assigned)

    def start(self):
        """Build the twins.  Options that exclude each other are refused, with the parameters as they were."""
        rng = np.random.default_rng([self.seed, 0])
        self.looks = True
        values = [group.start for group in self.groups]
        try:
            self.twins = [Twin(rng, self, values, folder=folder) for folder in (None, "" if self.on_disk else None)]
        except REFUSALS as error:
            self.log.append(f"refused: {error}")
            return False
        self.check()
        return True

    def go(self, only=None):
        if not self.start():
            return False
        names = [name for name, weight in CALLS.items() for _ in range(weight)
                 if not (self.on_disk and name == "add_group")]  # fmt: skip
        for i in range(1, self.length + 1):
            rng = np.random.default_rng([self.seed, i])
            name, self.looks = pick(rng, names), i == self.length or rng.random() < 0.3
            if self.exact and self.undo and rng.random() < 0.3:  # before rows are brought up to date
                name = "rollback"
            if only is None or i in only:
                self.log.append(f"{i}: {name}")
                with np.errstate(all="ignore"):
                    getattr(self, name)(rng)
                    self.check()
        return True

    def say(self, *words):
        self.log[-1] += " " + " ".join(map(str, words))

    # --- what must hold after every call ------------------------------------------------------------------------------

    def check(self):
        a, b = (twin.space() if self.looking else {} for twin in self.twins)
        assert not differing(a, b), (
            f"the twins differ in {[(k, a.get(k), b.get(k)) for k in differing(a, b)[:1]]!s:.500}"
        )
        for twin in self.twins:
            opt = twin.opt
            assert (opt.t, opt.skipped_steps, opt.pending) == (self.t, self.skipped, self.pending), "counts"
            assert repr(opt)
            steps = twin.per_group(opt.state["step"])
            stored = opt.state_dict()["groups"] if self.looking else None
            for i, (part, group) in enumerate(zip(twin.parts, self.groups, strict=True)):
                for memory, outside in (part.memory, *([part.copy_memory] if part.copies is not None else [])):
                    assert (memory[outside] == CANARY).all(), "elements between the arrays were written"
                found = part.by_segment(in_turn(steps[i]))
                want = group.counts.tolist()
                assert all(x in (None, n) for x, n in zip(found, want, strict=True)), f"steps {found}, not {want}"
                if stored is None:
                    continue
                self.check_values(twin, part, stored[i]["arrays"])
                for name in set(opt.state) - PER_ARRAY:
                    shown = twin.per_group(opt.state[name])[i]
                    same = shown is None if name not in stored[i]["arrays"] else bits(
                        np.concatenate([np.asarray(x).reshape(-1) for x in in_turn(shown)])
                    ) == bits(stored[i]["arrays"][name])  # fmt: skip
                    assert same, f"state[{name!r}] is not what state_dict() has"

    def check_values(self, twin, part, arrays):
        p = part.flat(part.arrays)
        master = arrays.get("master")
        if master is not None and not self.written:
            assert bits(nearest(master, p.dtype)) == bits(p), "parameters are not their master copy, rounded"
        if part.copies is not None and not (self.written or twin.opt.flush_denormals):
            want = nearest(p if master is None else master, "float32").astype(DTYPES[part.group.copies])
            assert bits(part.flat(part.copies)) == bits(want), "copies are not the parameters, rounded"
        assert self.wild or np.isfinite(p.astype("float64")).all(), "parameters are not finite"

    def both(self, call):
        """Call it with each twin; both must do the same.  Returns the error, after which all is as it was."""
        errors = []
        for twin in self.twins:
            looking = self.looking
            before = twin.snapshot(looking)
            errors.append(None)
            try:
                with np.errstate(all="raise" if self.strict else None):
                    call(twin)
            except REFUSALS as error:
                errors[-1] = error
            changed = differing(before, twin.snapshot(looking)) if errors[-1] else []
            assert not changed, f"{changed} changed, though it raised {errors[-1]!r}"
        assert bool(errors[0]) == bool(errors[1]), f"one twin raised {errors[0]!r}, the other {errors[1]!r}"
        if errors[0]:
            self.say("raised", f"{type(errors[0]).__name__}: {errors[0]!s:.100}")
        return errors[0]

    # --- the calls ----------------------------------------------------------------------------------------------------

    def gradients(self, rng):
        """For each group and segment a flat array or None; is one not finite; may a step overflow?"""
        grads, bad, wild = [], False, False
        for group in self.groups:
            grads.append([])
            for size in group.segments:
                kind = pick(rng, ["normal"] * 12 + ["none"] * 3 + ["zero", "denormal", "huge", "nan", "inf"])
                dtype = "float64" if group.dtype == "float64" else pick(rng, ["float32"] * 3 + ["float16", "bfloat16"])
                huge = {"float16": 50, "float64": 1e160}.get(dtype, 1e30)

                def change(x, kind=kind, huge=huge):
                    x = x * 10.0 ** rng.integers(-4, 3) * (rng.random(x.size) < 0.9)
                    x *= {"zero": -0.0, "denormal": 1e-41, "huge": huge}.get(kind, 1)
                    if x.size and kind in ("nan", "inf"):
                        x[rng.integers(x.size)] = np.nan if kind == "nan" else pick(rng, [np.inf, -np.inf])
                    return x

                if group.length and rng.random() < 0.6:
                    x = Sparse(rng, group, size, dtype, change)
                    kind += " rows" * (kind != "none")
                else:
                    x = nearest(change(rng.normal(size=size)), DTYPES[dtype])
                grads[-1].append(None if kind == "none" else x)
                finite = kind == "none" or np.isfinite(dense(grads[-1:])[0][-1].astype("float64")).all()
                bad |= not finite
                wild |= not finite or kind.startswith("huge")
                self.say(kind)
        return grads, bad, wild

    def dressed(self, rng, grads):
        return {id(twin): twin.dress(rng, grads, twin is self.twins[1]) for twin in self.twins}

    def check_gradients(self, error):
        for twin in self.twins:
            zero = twin.opt.zero_grad and not error
            for now, before in twin.given:
                same = not now.tobytes().strip(b"\0") if zero else now.tobytes() == before.tobytes()
                assert same, "a gradient was written" if not zero else "a gradient was not zeroed"

    def step(self, rng):
        grads, bad, wild = self.gradients(rng)
        extra = {"loss_scale": pick(rng, [2.0, 1e3])} if rng.random() < 0.15 else {}
        if rng.random() < 0.2:
            extra["metric"] = pick(rng, [1.0, 0.5, np.nan, np.inf])
        given = [
            [x is not None and ("rows" if isinstance(x, Sparse) else True) for x in segments] for segments in grads
        ]
        refused = self.pending > 0 or (self.dynamic and "loss_scale" in extra)
        passed = self.dressed(rng, grads)
        arriving = pick(rng, [None, *self.twins])  # this one may step array by array
        sparse = [isinstance(x, Sparse) for segments in grads for x in segments]
        whole = any(sparse) and self.looking and not refused and self.dense_step(rng, grads, extra)
        error = self.stepped(lambda twin: twin.step(rng, passed[id(twin)], twin is arriving, **extra), given, bad, wild,
                             refused, extra)  # fmt: skip
        self.check_gradients(error)
        twin = self.twins[0]
        if whole and not error and self.t > self.before_t:
            whole.check(twin)
        if not error and self.t > self.before_t and not self.dynamic and np.isfinite(twin.opt.grad_norm) and not wild:
            squares = sum(
                float(np.sum(x.astype("float64") ** 2)) for part in dense(grads) for x in part if x is not None
            )
            want = squares**0.5 / extra.get("loss_scale", twin.opt.loss_scale)
            assert abs(twin.opt.grad_norm - want) <= 1e-9 * want, f"norm {twin.opt.grad_norm}, not {want}"
        may_reopen = self.on_disk and not (self.assigned or self.written or self.settings["keep_undo"] or self.hot)
        if may_reopen and not error and self.t > self.before_t:
            self.reopen(rng)

    def dense_step(self, rng, grads, extra):
        with contextlib.suppress(*REFUSALS):
            return Dense(rng, self, self.twins[0], grads, extra)

    def step_sums(self, rng):
        given = self.summed or [[False]]
        error = self.stepped(lambda twin: twin.opt.step(), given, self.sums_bad, self.sums_wild, not self.pending, {})
        if not error:
            self.drop_sums()

    def drop_sums(self):
        self.pending, self.summed, self.sums_bad, self.sums_wild, self.aside = 0, None, False, False, False

    def stepped(self, call, given, bad, wild, refused, extra):
        """A step and what it must do, to counts, bounds and what a rollback will need."""
        opt, self.before_t = self.twins[0].opt, self.t
        policy = opt.on_nonfinite
        refused = refused or (bad and policy == "raise")
        allowed = refused or wild or self.hot or "metric" in extra
        before = [twin.snapshot(self.looking) for twin in self.twins]
        error = self.both(call)
        assert error or not refused, "a step that can't be was made"
        assert not error or allowed, f"a step was refused: {error!r}"
        if error:
            return error
        skipped = opt.skipped_steps - self.skipped
        assert not (bad and policy == "skip") or skipped == 1, "a gradient that is not finite was stepped"
        assert not skipped or (policy == "skip" and wild), "a step was skipped for nothing"
        self._wild |= wild and not skipped
        self.undo = before if self.settings["keep_undo"] else None
        self.undo_t, self.undo_skipped = self.t, self.skipped
        self.undo_counts, self.undo_free = [group.counts.copy() for group in self.groups], True
        self.skipped += skipped
        if not skipped and any(map(any, given)):
            self.t += 1
            for group, segments in zip(self.groups, given, strict=True):
                group.counts += np.array(segments, bool)
            self.check_limits(given)
        return None

    def check_limits(self, given):
        for i, (group, segments) in enumerate(zip(self.groups, given, strict=True)):
            inside = np.repeat([x is True and not self.aside for x in segments], group.segments)
            p = self.twins[0].values()[i].astype("float64")
            if group.options["sum_to_one"]:  # after the bounds
                self.check_sums(group, p[inside].reshape(-1, group.length))
                continue
            for side, sign in zip(group.bounds or (), (-1, 1), strict=False):
                if side is not None:
                    assert not (inside & (sign * (p - side) > 0)).any(), "a parameter is out of its bounds"

    @staticmethod
    def check_sums(group, rows):
        """Rows sum to one, unless that can't be; each number may be off by the rounding of the parameters."""
        project = group.options["sum_to_one"] == "project"
        with np.errstate(all="ignore"):
            sums, sizes = rows.sum(axis=1), abs(rows).sum(axis=1)
            off = ROUNDING[group.dtype] * sizes + 1e-7 * group.length
            can = np.isfinite(sizes) & (project | (sums > off))
            assert (abs(sums - 1) <= off)[can].all(), f"rows sum to {sums[can]}"
            assert not project or (rows[can] >= 0).all(), "a projected row has a negative number"

    def accumulate(self, rng):
        grads, bad, wild = self.gradients(rng)
        passed = self.dressed(rng, grads)
        error = self.both(lambda twin: twin.opt.accumulate(passed[id(twin)]))
        assert not error, f"accumulate was refused: {error!r}"
        self.check_gradients(error)
        self.aside |= any(isinstance(x, Sparse) for segments in grads for x in segments)
        given = [[x is not None for x in segments] for segments in grads]
        old = self.summed or [[False] * len(segments) for segments in given]
        self.summed = [[x or y for x, y in zip(*pair, strict=True)] for pair in zip(old, given, strict=True)]
        self.pending += 1
        self.sums_bad |= bad
        self.sums_wild |= wild

    def discard(self, rng):
        assert not self.both(lambda twin: twin.opt.discard())
        self.drop_sums()

    def rollback(self, rng):
        if self.exact:  # a step is not undone once rows were brought up to date
            try:
                self.twins[0].opt.rollback()
            except REFUSALS as error:
                self.say("raised", error)
                return
            self.twins[1].opt.rollback()
        error = None if self.exact else self.both(lambda twin: twin.opt.rollback())
        assert bool(error) == (self.undo is None or self.pending > 0), f"rollback: {error!r}"
        if error:
            return
        own = {"options", "schedules", "settings", "sums", "summed", "pending", "n_threads", "nbytes"}
        own |= set() if self.dynamic else {"loss_scale"}
        for twin, before in zip(self.twins, self.undo, strict=True):
            after = twin.snapshot(self.looking)
            changed = [
                key for key in differing(before, after) if not own & {key, *key} and key in before and key in after
            ]
            assert not changed or not self.undo_free, f"rollback did not give {changed} again"
        self.t, self.skipped, self.undo = self.undo_t, self.undo_skipped, None
        for group, counts in zip(self.groups, self.undo_counts, strict=True):
            group.counts = counts


def failure(seed, only=None):
    """What is wrong with a seed, as (text, log), or None; the number of optimizers that were refused."""
    run = Run(seed)
    try:
        return None, run, run.go(only)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {error!s:.600} (line {where.lineno})", run, True


def shrink(seed, run, text):
    """The calls that are needed for the failure."""
    calls = list(range(1, run.length + 1))
    for i in list(reversed(calls)):
        fewer = [x for x in calls if x != i]
        again = failure(seed, fewer)[0]
        if again and again.split(":")[0] == text.split(":")[0] and again[-9:] == text[-9:]:
            calls = fewer
    return calls


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--count", type=int, default=3000, help="how many seeds")
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--only", help="the calls of a seed that are made, as 1,4,5")
    options = parser.parse_args(arguments)
    only = options.only and [int(x) for x in options.only.split(",")]
    failures = built = 0
    for seed in range(options.seed, options.seed + options.count):
        print(f"\rseed {seed} ", end="", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(120, exit=True)
        text, run, was_built = failure(seed, only)
        built += was_built
        if text:
            failures += 1
            calls = only or shrink(seed, run, text)
            print(
                f"\nseed {seed}: {text}\npython tests/fuzz.py --count 1 --seed {seed} --only {','.join(map(str, calls))}"
            )
            print(*("    " + line for line in failure(seed, calls)[1].log), sep="\n", flush=True)
    faulthandler.cancel_dump_traceback_later()
    print(f"\n{options.count} seeds, {built} optimizers built, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

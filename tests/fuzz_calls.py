"""Calls of fuzz.py's runs besides steps: groups, averages, checkpoints, options, and what must be refused."""

import contextlib
import copy
import tempfile
from pathlib import Path

import fuzz_wrong
import numpy as np
from fuzz_twins import DTYPES, SETTINGS, SUMS, VALUES, Group, Part, Twin, bits, differing, in_turn, nearest, pick

REFUSALS = (ValueError, TypeError, RuntimeError, KeyError)


class Calls:
    """For a `Run`, which has the twins and what is expected of them."""

    def add_group(self, rng):
        group = Group(rng, self.rule, self.options)
        parts = []

        def add(twin):
            structure = pick(rng, ["list", "tuple", "dict"])
            part = Part(rng, group, group.start, structure, self)
            twin.opt.add_param_group({"params": part.arrange(part.arrays), **part.options()})
            parts.append(part)

        error = self.both(add)
        assert not self.pending or error, "a group was added while sums were pending"
        if not error:
            self.groups.append(group)
            self.undo = self.summed = None
            for twin, part in zip(self.twins, parts, strict=True):
                twin.parts.append(part)
                twin.structured = True

    def up_to_date(self):
        """Before the parameters are read or written."""
        for twin in self.twins:
            twin.opt.catch_up()

    def catch_up(self, rng):
        """One of the twins brings rows up to date: all, or some of an array."""
        twin = pick(rng, self.twins)
        places = [(*place, x) for part, own in zip(twin.parts, twin.places(), strict=True) if part.group.length
                  for place, x in zip(own, part.arrays, strict=True)]  # fmt: skip
        if places and rng.random() < 0.6:
            *place, x = pick(rng, places)
            twin.opt.catch_up(*place, rng.integers(0, len(x) or 1, rng.integers(0, 9) if len(x) else 0))
        else:
            twin.opt.catch_up()

    def averaged(self, rng):
        self.up_to_date()

        def inside(twin):
            before = [x.copy() for x in twin.values()]
            emas = [None if ema is None else [x.copy() for x in in_turn(ema)] for ema in twin.per_group(twin.opt.ema)]
            with twin.opt.averaged_parameters():
                for part, ema, x in zip(twin.parts, emas, before, strict=True):
                    want = x if ema is None else nearest(part.flat(ema), x.dtype)
                    assert bits(part.flat(part.arrays)) == bits(want), "parameters are not their average"
                for call in (
                    twin.opt.step,
                    twin.opt.rollback,
                    twin.opt.state_dict,
                    twin.opt.averaged_parameters().__enter__,
                ):
                    with contextlib.suppress(*REFUSALS):
                        call()
                        raise AssertionError(f"{call} inside averaged_parameters()")
            assert [bits(x) for x in twin.values()] == [bits(x) for x in before], "parameters did not come back"

        has = any(ema is not None for ema in self.twins[0].per_group(self.twins[0].opt.ema))
        assert bool(self.both(inside)) != has

    def other(self, rng, values, folder=None):
        """A new optimizer over another cut of the same numbers, with all that a checkpoint does not hold."""
        twin = Twin(rng, self, values, alone=pick(rng, ["list", "tuple"]), folder=folder)
        for place, name, value in self.assigned:
            with contextlib.suppress(*REFUSALS):
                if place is None:
                    setattr(twin.opt, name, value)
                else:
                    twin.opt.param_groups[place][name] = twin.parts[place].bounds(value) if name == "bounds" else value
        return twin

    def reopen(self, rng):
        """After a step, the twin on disk goes on from its folder, with other arrays."""
        second = self.twins[1]
        values = [np.zeros_like(x) for x in second.values()] if self.kept else second.values()
        second.opt.close()
        self.twins[1] = self.other(rng, values, second.folder)

    def save(self, rng):
        first = self.twins[0]
        if self.refuses_save():
            return
        with_parameters = bool(rng.random() < 0.7)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "run.safetensors")
            first.opt.save(path, parameters=with_parameters)
            values = [np.zeros_like(x) for x in first.values()] if with_parameters else first.values()
            self.replace(rng, values, lambda opt: opt.load(path, parameters=with_parameters))

    def state_dict(self, rng):
        first = self.twins[0]
        if self.refuses_save():
            return
        d = copy.deepcopy(first.opt.state_dict())
        self.replace(rng, first.values(), lambda opt: opt.load_state_dict(d))

    def refuses_save(self):
        """While there are sums of rows; they may have become dense."""
        try:
            self.twins[0].opt.state_dict()
        except REFUSALS:
            assert self.aside, "state_dict was refused"
            return True
        return self.aside

    def replace(self, rng, values, load):
        """The first twin takes its own checkpoint, and a new optimizer, that takes it too, becomes the second."""
        first, second = self.twins[0], self.other(rng, values, "" if self.on_disk else None)
        before = first.snapshot()
        try:
            load(second.opt)
        except REFUSALS:
            assert self.hot, "a checkpoint was refused"
            return
        load(first.opt)
        free = {"sums", "nbytes"} | ({"copies"} if self.written else set())  # copies are written anew
        changed = [key for key in differing(before, first.snapshot()) if not free & {key, *key}]
        assert not changed, f"an optimizer's own checkpoint changed {changed}"
        self.twins, self.undo = [first, second], None

    def set_t(self, rng):
        t = int(pick(rng, [0, 1, 5, 1000, 10**6] + [10**12] * (self.rule != "NAdam")))
        self.say(t)
        error = self.both(lambda twin: setattr(twin.opt, "t", t))
        assert not error or self.hot, f"t was refused: {error!r}"
        if not error:
            self.t = t
            for group in self.groups:
                group.counts[:] = t

    def assign(self, rng):
        place = int(rng.integers(len(self.groups)))
        group = self.groups[place]
        values = {**VALUES, "bounds": None, **({"sum_to_one": SUMS} if group.simplex else {})}
        name = pick(rng, [name for name in self.twins[0].opt.param_groups[place] if name in values])
        value = group.random_bounds(rng) if name == "bounds" else pick(rng, values[name])
        self.say(place, name, value if name != "bounds" else "")

        def call(twin):
            given = value
            if name == "bounds":  # one list, changed and assigned again
                given = twin.parts[place].box
                given[:] = twin.parts[place].bounds(value)
            twin.opt.param_groups[place][name] = given

        if not self.both(call):
            self.assigned.append((place, name, value))
            self._wild |= name == "eps" and value == 0.0
            if name == "bounds":
                group.bounds = value
            elif name == "sum_to_one":
                group.options[name] = value

    def assign_setting(self, rng):
        name = pick(rng, list(SETTINGS))
        value = self.setting(rng, name)
        self.say(name, value)
        if not self.both(lambda twin: setattr(twin.opt, name, value)):
            self.assigned.append((None, name, value))
        self.twins[1].opt.n_threads = pick(rng, [None, 1, 2, 3, 4])

    def write(self, rng):
        """The user changes parameters himself."""
        self.up_to_date()
        for twin in self.twins:
            for part in twin.parts:
                for x in part.arrays:
                    flat = x.view(DTYPES["bfloat16"]) if x.dtype == np.uint16 else x
                    flat *= flat.dtype.type(0.5)
        self.written, self.undo_free = True, False

    def wrong(self, rng):
        """A call that must be refused."""
        name, call = fuzz_wrong.draw(self, rng)
        self.say(name)
        assert self.both(call), f"{name} was not refused"

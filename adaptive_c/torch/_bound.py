"""The groups of a torch optimizer bound as groups of a run of ours, its state as tensors, until something changes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import numpy as np
import torch

from .._checkpoint.torch import restore
from .._native import Rows, checked_threads
from .._run.options import OPTIONS
from .._run.rule import Rule
from .._run.run import Run
from ._signature import ELSEWHERE
from ._state import BESIDE, names_beside, restore_beside, shown, stored_as, to_restore
from ._tensors import Array, Tensor, array, check, gradient, view

FORMATS = ("state_dtype", "master", "rounding", "second_moment")  # how state is stored
REFUSED = ("capturable", "differentiable")
Place = tuple[int, int]  # an address and torch's count of the writes to a tensor
FRESH = {"t": 0, "skipped_steps": 0, "grad_norm": float("nan")}


def plain(name: str, value: Any) -> Any:
    """An option as a run takes it: a number where torch may have a tensor of one, the name of a dtype; no schedule."""
    if value is None or isinstance(value, (int, float)):
        return value
    if isinstance(value, str) and name in OPTIONS and OPTIONS[name].movable:
        raise TypeError(f"{name} must be a number, or a tensor of one; got {value!r}")
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if callable(value):
        raise TypeError(f"{name} can't follow a schedule of adaptive_c here, got {value!r}; give a number, and "
                        "change it before a step, by hand or by one of torch.optim.lr_scheduler")  # fmt: skip
    return tuple(plain(name, x) for x in value) if isinstance(value, (tuple, list)) else value


def moves(value: Any) -> bool:
    """Whether an option may change without being assigned anew, as a tensor may."""
    return isinstance(value, (torch.Tensor, list)) or (isinstance(value, tuple) and any(map(moves, value)))


def _held(state: Any) -> list[Any]:
    """All values that torch's dict of states holds, in one list."""
    return list(chain.from_iterable(map(dict.values, state.values())))


class Form:
    """What a run is made of besides its tensors: the rule, the names of its options, the settings."""

    def __init__(
        self, rule: Rule, defaults: Mapping[str, Any], settings: Mapping[str, Any], watched: tuple[str, ...]
    ) -> None:
        """watched: options that torch has and the rule settles."""
        self.rule, self.settings = rule, settings
        self.defaults = {
            "copy_to": None,
            "sum_to_one": False,
            **{name: plain(name, value) for name, value in defaults.items()},
        }
        self.names = tuple(defaults)
        self.values = itemgetter(*self.names, *watched)

    def options(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The options of one of torch's groups."""
        for name, only in self.rule.fixed.items():
            if group.get(name, only) != only:
                raise ValueError(f"{name}={group[name]!r} is no choice of {self.rule.label}, which has {name}={only!r}")
        for name in REFUSED:
            if group.get(name):
                raise ValueError(f"{name}=True can't be had here: a step is no graph of torch's operations; drop it, "
                                 "or use torch.optim")  # fmt: skip
        options = {name: plain(name, value) for name, value in zip(self.names, self.values(group), strict=False)}
        bounds = options["bounds"]
        numbers = isinstance(bounds, tuple) and all(side is None or isinstance(side, (int, float)) for side in bounds)
        if bounds is not None and not numbers:
            raise TypeError(f"bounds are two numbers for the tensors of a group, or None, got {bounds!r}")
        return options

    def fits(self, options: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
        """Whether a group of the run that was made with the options `now` can take these options over."""
        same = all(options.get(name) == now.get(name) for name in FORMATS)
        there = (options["ema_decay"] is None) == (now["ema_decay"] is None)
        return (
            same
            and there
            and not any(slot.needed(options) and not slot.needed(now) for slot in self.rule.state.values())
        )

    def run(self, groups: list[dict[str, Any]]) -> Run:
        """A run over groups of arrays."""
        run = Run(self.rule, self.defaults, "bfloat16")
        settings = {**self.settings, "loss_scale": 1.0, "cast": False}
        run.plan.n_threads = checked_threads(settings.pop("n_threads"))
        run.start(groups, settings, False)
        return run

    def check_names(self, group: Mapping[str, Any], i: int) -> None:
        """Refuse names in group i that are of the optimizer as a whole, or of the classes over arrays."""
        for name in group:
            if name in self.settings:
                assign = "" if name == "zero_grad" else f", or assign opt.{name}"
                raise ValueError(f"{name} in group {i} is an option of the optimizer as a whole: give it to the "
                                 f"constructor{assign}, and take it out of the group")  # fmt: skip
            if name in ELSEWHERE:
                raise ValueError(f"{name} in group {i} is no option for tensors: {ELSEWHERE[name]}")

    def check(self, groups: list[dict[str, Any]], first: int) -> None:
        """Refuse groups of torch's that can't be stepped: their names first, their tensors, then their options."""
        small = []
        for i, group in enumerate(groups, first):
            self.check_names(group, i)
            for j, p in enumerate(group["params"]):
                check(p, f"parameter {j} of group {i}", group.get("second_moment") == "row")
            options = self.options(group)
            for dtype in {p.dtype: None for p in group["params"]}:
                small.append({"params": [array(x := torch.zeros(1, dtype=dtype, device="cpu"), x)], **options})
        if small:
            self.run(small)


class Part:
    """The tensors of one dtype in one of torch's groups, which are one group of the run."""

    def __init__(self, where: str, params: list[Tensor]) -> None:
        self.where, self.params = where, params
        self.arrays = [array(p, p) for p in params]
        self.direct = all(p.is_contiguous() for p in params)  # then the run takes the gradients as they are
        self.pointers = [p.data_ptr() for p in params]
        self.forms = [(p.shape, p.stride()) for p in params]

        self.views: dict[int, dict[str, Tensor]] = {}  # the state of each tensor that has one, as torch's dict has it

    def attach(self, group: Any, seen: Mapping[Tensor, Place]) -> None:
        """Take the group of the run, once it is there.

        seen: where and in which version parameters with a master copy were when that was written last.
        """
        self.group, self.store = group, group.store
        group.bound.takes_tensors = True
        self.ends = np.cumsum(group.layout.sizes).tolist()
        self.rows = np.cumsum(group.layout.rows).tolist()
        self.steps = torch.zeros(len(self.params), device="cpu")  # what torch has as "step"
        self.shown: Array = self.steps.numpy()
        self.seen = self.steps._version
        places = enumerate(self.params if "master" in self.store.arrays else ())
        self.versions = [seen[p][1] if p in seen and seen[p][0] == self.pointers[j] else -1 for j, p in places]
        beside = names_beside(group.rule) or any(name in self.store.arrays for name in BESIDE)
        self.waiting = list(range(len(self.params))) if self.store.state or beside else []

    def moved(self) -> bool:
        """Do the parameters lie in memory in another way than when they were bound?"""
        here = [p.data_ptr() for p in self.params]
        return here != self.pointers or [(p.shape, p.stride()) for p in self.params] != self.forms

    def gradients(self, copied: list[Tensor]) -> list[Any] | None:
        """The gradients, which the run checks; None if the parameters don't lie where they did."""
        found: list[Any] | None = self.group.bound.gradients_of(self.params)
        return found if self.direct or found is None else self.laid_out(copied)

    def laid_out(self, copied: list[Tensor]) -> list[Array | Rows | None] | None:
        """The gradients as arrays, each checked, and copied where they don't lie as the parameters do.

        copied: takes those that were copied.
        """
        if self.moved():
            return None
        found: list[Array | Rows | None] = []
        for j, p in enumerate(self.params):
            g = gradient(p, f"{self.where}[{j}]")
            if isinstance(g, Rows):
                self.direct = False
                found.append(g)
                continue
            if g is not None and g.data_ptr() != p.grad.data_ptr():
                copied.append(p.grad)
            found.append(None if g is None else array(g, p))
        return found

    # --- counts ------------------------------------------------------------------------------------------------------

    def read_steps(self) -> None:
        """Take over counts that were written into a "step"."""
        if self.steps._version != self.seen:
            good = (self.shown >= 0) & (self.shown < 2.0**62) & (self.shown == np.floor(self.shown))
            if not good.all():
                j = int(np.argmin(good))
                raise ValueError(f"the count of steps of {self.where}[{j}], in state[p]['step'], is "
                                 f"{self.shown[j]}; it must be a whole number in [0, 2**62)")  # fmt: skip
            np.copyto(self.store.counts["step"], self.shown, casting="unsafe")
            self.seen = self.steps._version

    def show_steps(self) -> None:
        """Write the counts of steps into the tensors that torch's users see."""
        np.copyto(self.shown, self.store.counts["step"], casting="unsafe")

    # --- parameters that others write --------------------------------------------------------------------------------

    def notice(self) -> None:
        """Called before parameters with a master copy are stepped: take over what others have written to them."""
        for j, (p, version) in enumerate(zip(self.params, self.versions, strict=False)):
            if p._version != version:
                self.take_written(j)

    def take_written(self, j: int) -> None:
        """Give the master copy of parameter j the values that others have written to the parameter."""
        p = self.params[j].detach()
        master = view(self.store.arrays["master"][self.ends[j] - p.numel() : self.ends[j]], p)
        master.copy_(torch.where(master.to(p.dtype) == p, master, p))
        self.versions[j] = self.params[j]._version

    def note(self) -> None:
        """Called after a step: note the parameters' versions, so that later writes by others are seen."""
        self.versions = [p._version for p in self.params[: len(self.versions)]]

    # --- state as tensors --------------------------------------------------------------------------------------------

    def view(self, j: int) -> dict[str, Tensor]:
        """The state of parameter j as torch's dict of tensors."""
        return shown(self.group.rule, self.store, j, self.params[j], self.ends[j], self.rows[j], self.steps[j])

    def show(self, state: Any) -> bool:
        """Give torch's dict the state of the tensors stepped since the last call; return whether there were any."""
        counts = self.store.counts
        begins = self.group.rule.name == "sgd" and self.store.state  # momentum may begin after the first step
        begun = (counts["started"] if begins else counts["step"]).astype(bool)
        first = [j for j in self.waiting if begun[j]]
        if first:
            with torch.inference_mode(False):  # they outlive the mode
                new = {j: self.view(j) for j in first}
            state.update({self.params[j]: dict(views) for j, views in new.items()})
            self.views |= new
            self.waiting = [j for j in self.waiting if j not in new]
        return bool(first)

    def shows(self, state: Any) -> bool:
        """Whether torch's dict still has the state that it was given, and none where it was given none."""
        given = (state.get(self.params[j], {}) for j in self.views)
        mine = all(own.get(name) is x for own, views in zip(given, self.views.values(), strict=True)
                   for name, x in views.items())  # fmt: skip
        return mine and not any(state.get(self.params[j]) for j in self.waiting)


class Bound:
    """All groups of a torch optimizer, bound."""

    def __init__(
        self,
        form: Form,
        groups: list[dict[str, Any]],
        state: Any,
        counted: Mapping[str, Any],
        seen: Mapping[Tensor, Place],
    ) -> None:
        self.form, self.groups, self.state = form, list(groups), state
        self.parts: list[Part] = []
        self.owners: list[list[Part]] = []  # the parts of each group
        specs = []
        for i, group in enumerate(groups):
            form.check_names(group, i)
            options = form.options(group)
            by_dtype: dict[Any, list[Tensor]] = {}
            for j, p in enumerate(group["params"]):
                check(p, f"parameter {j} of group {i}", group.get("second_moment") == "row")
                by_dtype.setdefault(p.dtype, []).append(p)
            self.owners.append([Part(f"param_groups[{i}]", params) for params in by_dtype.values()])
            specs += [{"params": part.arrays, **options} for part in self.owners[-1]]
            self.parts += self.owners[-1]
        self.run = form.run(specs)
        self.plan = self.run.plan
        for part, run_group in zip(self.parts, self.run.groups, strict=True):
            part.attach(run_group, seen)
        self.params = [tuple(group["params"]) for group in groups]
        self.values = [form.values(group) for group in groups]
        self.moving = [any(map(moves, values)) for values in self.values]
        self.sizes = [len(group) for group in groups]  # when their names were last looked at
        self.made = [form.options(group) for group in groups]  # the options that decided what there is
        self.adopt(counted)

    def adopt(self, counted: Mapping[str, Any]) -> None:
        """Take over what torch's dict of states has, whatever wrote it, and replace it by views of ours."""
        states: dict[int, dict[str, Any]] = {}
        rule, about, first = self.form.rule, [], 0
        given = [{j: x for j, p in enumerate(part.params) if (x := self.state.get(p))} for part in self.parts]
        for part, own in zip(self.parts, given, strict=True):
            states |= {first + j: to_restore(rule, part.store, part.params[j], x) for j, x in own.items()}
            about.append({"params": list(range(first, first + len(part.params)))})
            first += len(part.params)
        if states:
            with self.run.guard:
                restore(self.run, {"param_groups": about, "state": states})
        for part, own in zip(self.parts, given, strict=True):
            part.show_steps()
            views = part.views = {j: part.view(j) for j in own}
            restore_beside(part.store, [(views[j], x) for j, x in own.items()])
            for j, x in own.items():
                for name in [name for name in x if stored_as(name) in part.store.arrays]:
                    del x[name]
                x.update(views[j])
            part.waiting = [j for j in part.waiting if j not in own]
        plan = self.plan
        plan.set_counts(max(plan.t, counted["t"]), counted["skipped_steps"], counted["grad_norm"], 0, 1.0, 0)
        self.held = _held(self.state)

    def seen(self) -> dict[Tensor, Place]:
        """What the next binding must know of parameters with a master copy."""
        return {p: (here, version) for part in self.parts
                for p, here, version in zip(part.params, part.pointers, part.versions, strict=False)}  # fmt: skip

    @contextmanager
    def writing(self, params: list[Tensor]) -> Iterator[None]:
        """A block that writes to parameters.  It takes over what others have written before, and tells torch."""
        for part in self.parts:
            part.notice()
        try:
            yield
        finally:
            torch.autograd.graph.increment_version(params)
            for part in self.parts:
                part.note()

    def counted(self) -> dict[str, Any]:
        """The counts of the plan, which a new binding goes on with."""
        return {name: getattr(self.plan, name) for name in FRESH}

    def fits(self, groups: list[dict[str, Any]], state: Any) -> bool:
        """Are these still the tensors, the memory and the state that are bound?  Options that have changed are taken
        over; those that decide which state there is need a new binding."""
        if state is not self.state or len(groups) != len(self.groups):
            return False
        held = _held(state)
        if len(held) != len(self.held) or not all(map(is_, held, self.held)):
            if not all(part.shows(state) for part in self.parts):
                return False
            self.held = held  # what was added or replaced is none of ours
        for i, group in enumerate(groups):
            params, bound = group["params"], self.params[i]
            if group is not self.groups[i] or len(params) != len(bound) or not all(map(is_, params, bound)):
                return False
            if len(group) != self.sizes[i]:
                self.form.check_names(group, i)
                self.sizes[i] = len(group)
            values = self.form.values(group)
            if (self.moving[i] or values != self.values[i]) and not self.take_over(i, group, values):
                return False
        return True

    def take_over(self, i: int, group: dict[str, Any], values: tuple[Any, ...]) -> bool:
        """Take over the options of torch's group i if its run can have them; else return False."""
        options = self.form.options(group)
        if not self.form.fits(options, self.made[i]):
            return False
        for part in self.owners[i]:
            for name, value in options.items():
                if name not in FORMATS and value != part.group.options[name]:
                    part.group[name] = value
        self.values[i], self.moving[i] = values, any(map(moves, values))
        return True

    def step(self, scale: float) -> bool:
        """Step with the gradients of the tensors; false if the tensors don't lie in memory as they did."""
        parts, plan = self.parts, self.plan
        t = plan.t
        for part in parts:
            part.read_steps()
            part.notice()
        copied: list[Tensor] = []
        grads = [part.gradients(copied) for part in parts]
        if None in grads:
            return False
        refused = False
        try:
            plan.step(grads, scale)
        except (TypeError, ValueError):
            refused = True
        if refused:  # look at each gradient, and copy those that don't lie as their parameters do
            copied.clear()
            grads = [part.laid_out(copied) for part in parts]
            if None in grads:
                return False
            plan.step(grads, scale)
        stepped = [p for part, own in zip(parts, grads, strict=True)
                   for p, g in zip(part.params, own or (), strict=True) if g is not None]  # fmt: skip
        if self.form.settings["zero_grad"]:
            for g in copied:
                g.detach().zero_()
            grads_of = [p.grad for p in stepped if not (p.grad.is_sparse or p.grad.is_inference())]
            torch.autograd.graph.increment_version(grads_of)
        if plan.t != t:
            torch.autograd.graph.increment_version(stepped)
            for part in parts:
                part.note()
            self.show()
        return True

    def show(self) -> None:
        """Give torch's dict what a step has made."""
        shown = False
        for part in self.parts:
            part.show_steps()
            shown |= bool(part.waiting) and part.show(self.state)
        if shown:  # once for all parts: it looks at the state of every tensor
            self.held = _held(self.state)

    def places(self) -> dict[Tensor, tuple[Part, int, int]]:
        """For each tensor: its part, the number of that part, and the number of the tensor in it."""
        return {p: (part, i, j) for i, part in enumerate(self.parts) for j, p in enumerate(part.params)}


class Live:
    """What changes as an optimizer steps.  It is an object so that a wrapper which has the optimizer's class and passes
    on the attributes that it lacks, as those of Lightning do, reads and changes the optimizer's own."""

    def __init__(self, counted: dict[str, Any]) -> None:
        self.counted = counted
        self.bound: Bound | None = None
        self.seen: dict[Tensor, Place] = {}  # by what was bound last
        self.arriving: Any = None  # what steps in backward

    def outside(self, name: str = "", value: Any = None) -> None:
        """Refuse what can't be done while backward steps, and an option that is assigned and can't go with that."""
        if self.arriving is not None:
            self.arriving.check(name, value)

    def unbind(self) -> None:
        """Let the run go; its counts are kept for the next one."""
        if self.bound is not None:
            self.free()
            self.counted, self.seen, self.bound = self.bound.counted(), self.bound.seen(), None

    def free(self) -> None:
        """Refuse what replaces or copies what is bound, while backward steps or averages are the parameters."""
        self.outside()
        if self.bound is not None:
            with self.bound.run.guard:
                pass

"""The face of one parameter group: its options as a dict, checked when they are assigned."""

from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from functools import partial
from itertools import count
from types import MappingProxyType
from typing import Any, Never

import numpy as np

from .._native import core
from .habits import meant, place_of
from .layout import Layout
from .options import (
    OPTIONS,
    RANGES,
    SETTINGS,
    Number,
    check_bounds,
    check_followed,
    check_option,
    check_schedule,
    check_together,
    follows,
    number_at,
)
from .rule import Rule
from .store import Allocate, Store


def check_options(
    rule: Rule, changes: Mapping[str, Any], known: Iterable[str], dtype: str, where: str, t: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of a group, each checked by itself and normalised: as they are, and with the numbers of schedules.

    known: all options there are.  dtype: the type that the rule computes in.  t: applied steps.
    """
    found: dict[str, Any] = {}
    numbers: dict[str, Any] = {}
    for name, value in changes.items():
        if follows(tuple(value) if isinstance(value, list) else value):
            found[name] = check_schedule(name, value, rule, known, where)
            numbers[name] = number_at(name, found[name], t, dtype, where)
            continue
        option = OPTIONS[name]
        numeric = value is None or isinstance(value, (int, float, np.number))
        if option.movable and isinstance(option.check, Number) and not numeric:
            raise TypeError(f"{where}{name} must be a number, or a schedule such as schedules.cosine(1e-3, 10_000); "
                            f"got {value!r}")  # fmt: skip
        found[name] = numbers[name] = check_option(name, value, dtype, where)
    return found, numbers


def check_formats(rule: Rule, options: Mapping[str, Any], dtype: str, where: str) -> None:
    """Refuse number formats that don't go together.  dtype: of the parameters."""
    master, rounding, state = options["master"], options["rounding"], options["state_dtype"]
    if dtype in ("float16", "bfloat16"):
        if master and rounding:
            raise ValueError(
                f"{where}master={master!r} and rounding={rounding!r} exclude each other; drop one (in a group that "
                "inherits it: give None)"
            )
        if not master and not rounding:
            raise ValueError(
                f"{where}the parameters are {dtype}, where small updates vanish when they are rounded to nearest; "
                "say either rounding='stochastic', or master='float32' for a float32 copy to work on"
            )
    elif master or rounding:
        name = "master" if master else "rounding"
        raise ValueError(f"{where}{name}={options[name]!r} is for float16 and bfloat16 parameters; these are "
                         f"{dtype}: drop it, or give their group {name}=None")  # fmt: skip
    if state and dtype == "float64":
        raise ValueError(f"{where}state_dtype={state!r} is refused for float64 parameters, which would be no more "
                         "exact than their state; drop it, or give their group state_dtype=None")  # fmt: skip
    if state in ("bfloat16", "uint8") and rule.narrow_refused:
        raise ValueError(f"{where}state_dtype={state!r} is refused for {rule.label}: {rule.narrow_refused}; "
                         "drop it")  # fmt: skip
    if state in ("bfloat16", "uint8") and options.get("centered"):
        raise ValueError(f"{where}state_dtype={state!r} is refused with centered=True: rounding noise would drive "
                         "square_avg - grad_avg^2 to 0; drop one of them")  # fmt: skip


def check_axes(options: Mapping[str, Any], layout: Layout, where: str) -> None:
    """Refuse arrays that have no last axis, where that is to sum to one."""
    for i, array in enumerate(layout.arrays if options.get("sum_to_one") else ()):
        if array.ndim == 0:
            key = "" if layout.keys == () else f"[{list(layout.keys)[i]!r}]" if layout.keys else f"[{i}]"
            raise ValueError(
                f"{where}sum_to_one={options['sum_to_one']!r} needs a last axis, and params{key} has no dimensions; "
                "put it into a group of its own, without it"
            )


def attempts(what: str, value: Any) -> Iterator[int]:
    """Count the attempts to assign a value, each of which fails if an option is assigned while the value is checked.

    Another thread does that now and then.  A schedule that does it when the check calls it would do it every time.
    """
    yield from range(8)
    if follows(tuple(value) if isinstance(value, list) else value):
        raise RuntimeError(f"{what} was not assigned: the schedule {value!r} assigns options whenever it is called; a "
                           "schedule must only give a number")  # fmt: skip
    yield from count(8)


class ParamGroup(MutableMapping[str, Any]):
    """Arrays that share options.  Assigning an option checks it at once; ``params`` is read-only.

    An option that follows a schedule reads as its number for the next step; `schedules` has the schedules themselves.
    """

    def __init__(
        self,
        rule: Rule,
        plan: Any,
        bound: Any,
        layout: Layout,
        index: int,
        options: dict[str, Any],
        bounds: Any,
        allocate: Allocate,
        held: tuple[int, int],
    ) -> None:
        """options: checked, all but the bounds.  bound: the core's part, which has the arrays already.

        held: the elements whose state is in this process.
        """
        self.layout, self.bound, self.index = layout, bound, index
        self.rule, self._plan = rule, plan
        self.computed = "float64" if bound.dtype == "float64" else "float32"
        self.store = Store(layout, rule, options, self.computed, allocate, held)
        where = f"param_groups[{index}]: "
        bound.follow_by(RANGES[self.computed], partial(check_followed, dtype=self.computed, where=where))
        bound.attach(self.store, self.store.kind)
        shown, in_force = bounds
        bound.commit({**rule.fixed, **options, "bounds": shown}, in_force)
        self._options: dict[str, Any] = bound.options  # as they were assigned
        for name in rule.fixed:
            del self._options[name]

    # --- a dict of options --------------------------------------------------------------------------------------------

    def __getitem__(self, name: str) -> Any:
        if name == "params":
            return self.layout.arrange(list(self.layout.arrays))
        if name not in self._options:
            raise KeyError(self._unknown(name))
        value = self._options[name]
        if follows(value):
            return number_at(name, value, self._plan.t, self.computed, f"param_groups[{self.index}]: ")
        return list(value) if name == "bounds" and isinstance(value, list) else value

    def __setitem__(self, name: str, value: Any) -> None:
        if self.bound.assign(name, value):  # one plain number for another
            return
        if name == "params":
            raise TypeError("params is read-only: an optimizer is bound to its arrays; construct a new one")
        if name not in self._options:
            raise KeyError(self._unknown(name))
        where = f"param_groups[{self.index}]: "
        for _ in attempts(where + name, value):
            if self.bound.commit_if(self.bound.version, *self.checked({name: value}, self._plan.t, where)):
                return
            if name in ("bounds", "sum_to_one", "rows"):  # rows may have missed steps with the old ones
                self._plan.catch_up()
            # or another thread has assigned an option meanwhile

    def __getattr__(self, name: str) -> Never:  # of what a group does not have
        place = self._place_of(name)
        hint = f" (did you mean {place}?)" if place else ""
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{hint}")

    def __setattr__(self, name: str, value: Any) -> None:
        if "_options" in vars(self):  # it is complete
            place = self._place_of(name)
            hint = f"; did you mean {place} = {value!r}?" if place else ""
            raise AttributeError(f"a parameter group has no attribute {name!r} to assign{hint}")
        object.__setattr__(self, name, value)

    def _place_of(self, name: str) -> str:
        """Where a name belongs that is no attribute of a group, in words."""
        held = vars(self)
        return place_of(name, ("params", *held.get("_options", ())), SETTINGS, held.get("index", 0))

    def _unknown(self, name: Any) -> str:
        """The message for a name that is no option of this rule."""
        place = "" if name in self._options else place_of(name, (), SETTINGS)
        hint = meant(name, self._options) or (f" (it is of the optimizer as a whole: {place})" if place else "")
        return f"{name!r} is not an option of {self.rule.label}{hint}; it has {', '.join(self._options)}"

    def checked(self, changes: Mapping[str, Any], t: int, where: str) -> tuple[dict[str, Any], Any]:
        """For `commit`: the changes after t applied steps, normalised, and the bounds if they are among them."""
        bounds, changes = None, dict(changes)
        if "bounds" in changes:
            shown, bounds = check_bounds(changes.pop("bounds"), self.bound.dtype, where, self.layout.flat)
        found, numbers = check_options(self.rule, changes, self._options, self.computed, where, t)
        check_together({**self._options, **numbers}, where)
        check_axes(found, self.layout, where)
        for name, slot in self.rule.state.items():
            if slot.when in found and slot.needed(found) and name not in self.store.arrays:
                raise ValueError(f"{where}{slot.when}={found[slot.when]!r} would need new state ({name}) in the middle "
                                 "of a run; construct a new optimizer with it")  # fmt: skip
        for name, value in found.items():
            if OPTIONS[name].fixed and value is not self._options[name]:
                raise ValueError(
                    f"{where}{name} can't be changed in the middle of a run; construct a new optimizer with it"
                )
        if "ema_decay" in found and (found["ema_decay"] is None) != ("ema" not in self.store.arrays):
            raise ValueError(
                f"{where}ema_decay can't come or go in the middle of a run; 1.0 keeps an average as it is, and a new "
                "optimizer can start one"
            )
        return (found if bounds is None else {**found, "bounds": shown}), bounds

    def __delitem__(self, name: str) -> Never:
        raise TypeError(f"{name!r} can't be removed from a parameter group")

    def __iter__(self) -> Iterator[str]:
        return iter(("params", *self._options))

    def __len__(self) -> int:
        return 1 + len(self._options)

    __eq__ = object.__eq__  # a group is equal to itself: its arrays have no truth value
    __hash__ = object.__hash__

    def __reduce_ex__(self, protocol: Any) -> Never:
        raise TypeError("a parameter group can't be pickled or copied: it belongs to its optimizer; dict(group) has "
                        "its options, opt.save(path) keeps everything")  # fmt: skip

    def __repr__(self) -> str:
        try:
            options = {name: self[name] for name in self._options}
        except Exception:  # the schedule's, which a step will raise
            options = self._options
        return f"{{'params': <{core.counted(len(self.layout.arrays), 'array')}>, {repr(options)[1:]}"

    # --- for the run and for checkpoints ------------------------------------------------------------------------------

    @property
    def options(self) -> Mapping[str, Any]:
        """The options as they were assigned, schedules included."""
        return MappingProxyType(self._options)

    @property
    def schedules(self) -> Mapping[str, Any]:
        """The schedules by the option's name; for a pair a tuple of schedules and numbers."""
        return MappingProxyType({name: value for name, value in self._options.items() if follows(value)})

    def find(self, name: str, decoded: bool = False) -> Any:
        """The live state of this name, or a decoded copy; None if there is none."""
        store = self.store
        if name in store.slots or name == "master":
            if name not in store.arrays:
                return None
            flat = store.decoded(name, self.bound) if decoded else store.arrays[name]
            if not isinstance(flat, np.ndarray):
                flat = store.array(name)
            return self.layout.views(flat, name in store.by_row)
        if name in store.counts:  # a count, or NAdam's product
            counts = store.counts[name]
            if self.layout.keys == ():
                return counts.reshape(())
            return self.layout.arrange([row.reshape(()) for row in counts[:, None]])
        return store.array(name) if name.endswith("_scale") and name in store.arrays else None

    def bind_copies(self, where: str) -> None:
        """Check copy_to and hand it to the core."""
        copies, kind = [], ""
        for param, copy, label in self.layout.match(self._options["copy_to"], where):
            kind_here = "bfloat16" if self.layout.is_bfloat16(copy) else copy.dtype.name
            if kind_here not in ("float32", "bfloat16", "float16") or (kind and kind_here != kind):
                hint = "; say uint16_as='bfloat16' if that is what it holds" if copy.dtype == "uint16" else ""
                raise TypeError(f"{label} has dtype {copy.dtype}; copies of a group are all float32, all bfloat16 or "
                                f"all float16{hint}")  # fmt: skip
            if param.dtype == "float64" and kind_here != "float32":
                raise TypeError(f"{label} is {kind_here}, which is refused for float64 parameters: they would be "
                                "rounded twice; use float32")  # fmt: skip
            flags = copy.flags
            if not (flags.c_contiguous and flags.writeable and flags.aligned and copy.dtype.isnative):
                remedy = "" if flags.writeable else f"; it is read-only: {core.writable(copy)}"
                raise ValueError(f"{label} must be C-contiguous, writable, aligned and in native byte order{remedy}")
            copies.append(copy)
            kind = kind_here
        self.bound.attach_copies(kind, tuple(copies))

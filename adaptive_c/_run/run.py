"""A run: groups of parameters bound to a rule, and the plan that steps them."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import Any

import numpy as np

from .._native import core
from .alone import Alone
from .group import ParamGroup, attempts, check_axes, check_formats, check_options
from .habits import meant
from .layout import Layout
from .options import (
    SCHEDULABLE,
    SETTINGS,
    Number,
    check_bounds,
    check_followed_setting,
    check_settings,
    check_together,
    copied_bounds,
    picklable,
)
from .rule import Rule
from .store import CHUNK, zeros

_SMALLEST_SCALE, _LARGEST_SCALE, GROWTH_INTERVAL = core.SCALE_LIMITS


def check_scale(name: str, value: Any) -> float:
    """Check a dynamic loss scale, and round it to float32, as PyTorch's is."""
    return float(np.float32(Number(_SMALLEST_SCALE, _LARGEST_SCALE, open_high=False)(name, value)))


def shares(
    sizes: Sequence[int], parts: int, uncut: Sequence[Sequence[tuple[int, int, int]]] = ()
) -> tuple[list[int], list[int]]:
    """Groups of these sizes, shared out among processes by whole chunks.

    uncut: of each group, what `Layout.long_rows` gives of rows that no part must cut.

    The positions in the sweep at which the groups begin, and those at which the parts do; each with the end after it.
    """
    starts = [0, *accumulate(-(-n // CHUNK) * CHUNK for n in sizes)]
    chunks = starts[-1] // CHUNK
    cuts = [chunks * part // parts * CHUNK for part in range(parts + 1)]
    if parts > 1 and any(uncut):
        places = np.arange(chunks + 1) * CHUNK
        between = np.ones(places.size, bool)
        for at, arrays in zip(starts, uncut, strict=False):
            for first, last, length in arrays:
                inside = slice((at + first) // CHUNK + 1, -(-(at + last) // CHUNK))
                between[inside] &= (places[inside] - at - first) % length == 0
        places = places[between]
        cuts = places[np.searchsorted(places, cuts, "right") - 1].tolist()
    return starts, cuts


class Run:
    """What every face works on: made once, and extended by groups.

    defaults: the options of a group that does not have its own.  company: the processes each of which holds the state
    of its share and steps that.  pages: what brings state that is not in memory.
    """

    groups: tuple[ParamGroup, ...]

    def __init__(
        self,
        rule: Rule,
        defaults: Mapping[str, Any],
        uint16_as: str | None = None,
        company: Alone | None = None,
        pages: Any = None,
    ) -> None:
        self.rule, self.groups = rule, ()
        self.defaults = {**defaults, "bounds": copied_bounds(defaults["bounds"])}  # for groups that come later, too
        self.plan = core.Plan(core.Guard(), check_followed_setting)
        self._uint16_as, self._pages = uint16_as, pages
        self._company = company or Alone()
        self.plan.combine = self._company.combine
        self.on_disk = pages is not None
        self._checked: dict[str, Any] = {}  # the defaults, by the type that the rule computes in

    @property
    def guard(self) -> Any:
        """``with run.guard:`` is a block in which nothing else steps or changes this run."""
        return self.plan.guard

    def looking(self) -> Any:
        """A ``with`` block that looks at state.  State on disk is read into memory that a step needs, too."""
        return self.guard.inside if self.on_disk else nullcontext()

    @classmethod
    def made_of(cls, rule: Rule, form: Mapping[str, Any]) -> "Run":
        """Make a run from what another run's `form` returned."""
        groups = form["groups"]
        options = {name: value for name, value in groups[0].items() if name != "params"}
        run = cls(rule, options, form["uint16_as"])  # not the defaults, whose schedules may have ended long ago
        run.plan.set_counts(form["t"], 0, math.nan, 0, 1.0, 0)  # at which schedules are asked for a first number
        run.plan.n_threads = form["n_threads"]
        run.start(groups if form["structured"] else groups[0]["params"], form["settings"], form["keep_undo"])
        run.defaults, run._checked = form["defaults"], {}
        return run

    def form(self) -> dict[str, Any]:
        """The arguments that the run was made from, as pickle can take them: arrays, schedules and all options."""
        return {
            "groups": [
                {"params": group.layout.given(), **group.options, "bounds": picklable(group.options["bounds"])}
                for group in self.groups
            ],
            "structured": self.plan.structured,
            "defaults": {**self.defaults, "bounds": picklable(self.defaults["bounds"]), "copy_to": None},
            "settings": dict(self.plan.settings),
            "uint16_as": self._uint16_as,
            "keep_undo": self.plan.keeps_undo,
            "n_threads": self.plan.n_threads,
            "t": self.plan.t,
        }

    def start(self, params: Any, settings: Mapping[str, Any], keep_undo: bool) -> None:
        """Bind the first groups: one of bare parameters, or those of a list of group dicts."""
        params = tuple(params) if isinstance(params, (list, tuple)) else params  # what is counted is what is used
        structured = isinstance(params, tuple) and any(isinstance(item, dict) for item in params)
        specs = params if structured else ({"params": params},)
        wheres = [f"params[{i}]" if structured else "" for i in range(len(specs))]
        with self.guard, self._place():
            bound = [self._bind(spec, where) for spec, where in zip(specs, wheres, strict=True)]
            held = self._share(bound)
            new = [
                self._complete(i, *parts, where, held[i])
                for i, (parts, where) in enumerate(zip(bound, wheres, strict=True))
            ]
            self.plan.configure(self.checked(settings, new))
            self._company.compare(self, new, self._pages)
            if self._pages is not None:
                self._pages.lay_out(new)
                self.plan.pages = self._pages
            self.plan.link([group.bound for group in new], structured, keep_undo, self, tuple(new))
            if self._pages is not None:
                self._pages.begin(self)

    @contextmanager
    def _place(self) -> Iterator[None]:
        """A ``with`` block that closes the folder of the state if the run can't be made."""
        try:
            yield
        except BaseException:
            if self._pages is not None:
                self._pages.close()
            raise

    def add(self, spec: Any) -> None:
        """Add a group; from now on the groups are a list."""
        with self.guard:
            if self._pages is not None:
                raise ValueError(
                    "add_param_group is refused with state_path, whose buckets are cut for the groups that there are: "
                    "construct a new optimizer with all groups, and a new state_path"
                )
            if self.plan.pending:
                raise ValueError(
                    f"{core.pending(self.plan.pending)}, which the new group has no part in; "
                    "step() takes their mean, discard() drops them"
                )
            index = len(self.groups)
            where = f"params[{index}]"
            parts = self._bind(spec, where, copy_to=None)
            group = self._complete(index, *parts, where, (0, parts[2].size))
            self.checked(self.plan.settings, [group])
            self.plan.link([group.bound], True, self.plan.keeps_undo, self, (*self.groups, group))

    def configure(self, name: str, value: Any) -> None:
        """Check and take over an option of the optimizer as a whole."""
        if self.plan.assign(name, value):  # one plain number for another
            return
        for _ in attempts(name, {**self.plan.settings, name: value}[SCHEDULABLE]):
            version = self.plan.version
            if self.plan.configure_if(version, self.checked({**self.plan.settings, name: value})):
                return

    def checked(
        self, settings: Mapping[str, Any], groups: Any = None, where: str = "", t: int | None = None
    ) -> dict[str, Any]:
        """Options of the optimizer as a whole, normalised.  groups, t: those that there are, unless they are given."""
        dtypes = {group.computed for group in groups or self.groups}
        return check_settings(settings, self.plan.t if t is None else t, dtypes, core.can_flush(), where)

    def _bind(self, spec: Any, where: str, **defaults: Any) -> tuple[dict[str, Any], Layout, Any]:
        """A group's options, its layout, and its arrays bound, which checks them."""
        place = where or "params"
        if not isinstance(spec, dict) or "params" not in spec:
            got = f"the keys {', '.join(map(repr, spec))}" if isinstance(spec, dict) else core.an(type(spec).__name__)
            raise ValueError(f"{place} must be a dict with 'params', as every group is; got {got}")
        given = {**defaults, **{name: value for name, value in spec.items() if name != "params"}}
        if unknown := [name for name in given if name not in self.defaults]:
            whole = unknown[0] in SETTINGS
            hint = " (it is of the optimizer as a whole)" if whole else meant(unknown[0], self.defaults)
            raise TypeError(
                f"{place} has the unknown option {unknown[0]!r}{hint}; {self.rule.label} has {', '.join(self.defaults)}"
            )
        layout = Layout(spec["params"], self._uint16_as)
        if not layout.arrays:
            raise ValueError(f"{place} is empty: there is nothing to optimize")
        name = f"{where}['params']" if where else "params"
        if layout.keys is None and all(isinstance(x, (int, float, np.number)) for x in layout.arrays):
            numbers = f"{[float(x) for x in layout.arrays]}" if len(layout.arrays) <= 4 else "x, 'float64'"
            raise TypeError(
                f"{name} is a list of numbers, not of arrays; pass one array, as in w = numpy.array({numbers}), "
                "and keep it, because it is updated in place"
            )
        bound = core.BoundGroup(
            self.guard, self.rule.name, self.rule.squares, layout.keys, layout.arrays, name,
            self._uint16_as == "bfloat16",
        )  # fmt: skip
        layout.sizes, layout.rows, bound.layout = bound.sizes, bound.rows, layout
        return given, layout, bound

    def _share(self, bound: Sequence[tuple[dict[str, Any], Layout, Any]]) -> list[tuple[int, int]]:
        """The elements of each group that this process holds."""
        part, parts = self._company.part
        sizes = [sum(layout.sizes) for _, layout, _ in bound]
        by_row = [given.get("second_moment", self.defaults.get("second_moment")) == "row" for given, _, _ in bound]
        uncut = [layout.long_rows() if rows else [] for rows, (_, layout, _) in zip(by_row, bound, strict=True)]
        self.starts, self.cuts = shares(sizes, parts, uncut)
        if parts == 1:
            return [(0, n) for n in sizes]
        low, high = self.plan.low, self.plan.high = self.cuts[part], self.cuts[part + 1]
        starts = self.starts[:-1]
        return [(min(max(low - at, 0), n), min(max(high - at, 0), n)) for at, n in zip(starts, sizes, strict=True)]

    def _complete(
        self, index: int, given: dict[str, Any], layout: Layout, bound: Any, where: str, held: tuple[int, int]
    ) -> ParamGroup:
        """A group with its state, not yet linked."""
        prefix = f"{where}: " if where else ""
        dtype = "float64" if bound.dtype == "float64" else "float32"
        if dtype not in self._checked:
            self._checked[dtype] = check_options(self.rule, self.defaults, self.defaults, dtype, "", self.plan.t)
        own, own_numbers = check_options(self.rule, given, self.defaults, dtype, prefix, self.plan.t)
        defaults, numbers = self._checked[dtype]
        options = {**defaults, **own}
        check_together({**numbers, **own_numbers}, prefix)
        check_formats(self.rule, options, bound.dtype, prefix)
        check_axes(options, layout, prefix)
        bounds = check_bounds(options["bounds"], bound.dtype, prefix, layout.flat)
        group = ParamGroup(
            self.rule,
            self.plan,
            bound,
            layout,
            index,
            options,
            bounds,
            zeros if self._pages is None else self._pages.allocate,
            held,
        )
        if options["copy_to"] is not None:
            group.bind_copies(f"{where}['copy_to']" if where else "copy_to")
        return group

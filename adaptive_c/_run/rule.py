"""A rule as data: what a run must know of it beside its options."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from .options import follows


class Slot(NamedTuple):
    """A state array of a rule: how narrow state is rounded, and when there is one at all.

    coding: "signed", "unsigned", "maximum" (of numbers that never fall: they are rounded to nearest, since noise would
    push them up) or "sign" (-1, 0 or 1, in int8).  when: the option that switches it on.  start: the option that says
    at which number it starts; 0 otherwise.  moment: it is a second moment, which under second_moment="row" has one
    number for each row, of the type that the rule computes in.
    """

    coding: str
    when: str = ""
    start: str = ""
    moment: bool = False

    def needed(self, options: Mapping[str, Any]) -> bool:
        """Whether it exists with these options.  An option that follows a schedule may be 0 now and larger later."""
        return not self.when or bool(options[self.when]) or follows(options[self.when])


class Rule(NamedTuple):
    """What the class of an optimizer says of its rule."""

    name: str  # in the core and in reference.py
    state: Mapping[str, Slot]  # its state arrays by name
    squares: bool = False  # it squares the gradient, which may overflow
    per_array: Mapping[str, float] = MappingProxyType({})  # numbers kept for each array, and their first value
    read_once: tuple[str, ...] = ()  # options that only an array's first step reads
    fixed: Mapping[str, Any] = MappingProxyType({})  # options that the class settles
    narrow_refused: str = ""  # why its state can't be narrow
    label: str = ""  # the name of the class, for messages and checkpoints

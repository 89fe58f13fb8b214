"""What pickle and deepcopy are given of a run, and how a run is made from it.

They are given the parameters themselves, by which they know that those are the arrays of the host's model: the copy of
an object that holds both has an optimizer that steps the copy's arrays.
"""

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from .._run.layout import Array
from .._run.rule import Rule
from .._run.run import Run
from . import description


def form(run: Run) -> dict[str, Any]:
    """What the run was made from, and its state: live views, which pickle and deepcopy copy at once."""
    with run.guard:
        for name, array in _arrays(run):
            if not _alone(array):
                raise TypeError(
                    f"this optimizer can't be pickled or copied: {name} is a view of memory that belongs to something "
                    "else, and the copy would update arrays that nothing else holds.  Bind an array that owns its "
                    "memory, np.array(x), and let the model use that one.  Or opt.save(path) keeps parameters and "
                    "state: build a new optimizer over arrays of your own and load(path) there (in memory: copy the "
                    "parameters, and new.load_state_dict(opt.state_dict()))"
                )
        if any(group.bound.behind for group in run.groups):  # the arrays may have been pickled before the optimizer
            raise ValueError("rows of this optimizer have missed steps, which can't be pickled or copied: call "
                             "opt.catch_up() before it")  # fmt: skip
        once = np.empty(0)
        return {"made_of": run.form(), "state": description.held(run), "twice": (once, once)}


def torn(form: Mapping[str, Any]) -> bool:
    """Whether the pickler, like joblib's, wrote an array again wherever it met it.

    Then the arrays of the host's model are others than the optimizer's.
    """
    first, second = form["twice"]
    return first is not second


def run_of(rule: Rule, form: Mapping[str, Any]) -> Run:
    """The run from which `form` was made, once its arrays are complete."""
    run = Run.made_of(rule, form["made_of"])
    description.load_state_dict(run, form["state"])
    return run


def _arrays(run: Run) -> Iterator[tuple[str, Array]]:
    """All arrays of the caller that a run writes, with their names in messages."""
    for group in run.groups:
        place = (f"params[{group.index}]['{{}}']" if run.plan.structured else "{}").format
        yield from zip(group.layout.names(place("params")), group.layout.arrays, strict=True)
        if (copies := group.options["copy_to"]) is not None:
            yield from ((name, copy) for _, copy, name in group.layout.match(copies, place("copy_to")))


def _lenders(array: Array) -> list[tuple[Any, int]]:
    """The types of the objects in the chain whose memory an array uses, and how often each is referred to."""
    found: list[tuple[Any, int]] = []
    held: Any = array.base
    while held is not None:
        found.append((type(held), sys.getrefcount(held)))
        held = held.base if isinstance(held, np.ndarray) else held.obj if isinstance(held, memoryview) else None
    return found


_ALONE = _lenders(np.zeros(2).reshape(2, 1))[0][1]  # how often a lender is referred to whose only user is one array


def _alone(array: Array) -> bool:
    """Whether nothing else refers to an array's memory, which is also so if it is a view of an array of its own."""
    kinds = (np.ndarray, memoryview, bytes, bytearray)
    return all(issubclass(kind, kinds) and n <= _ALONE for kind, n in _lenders(array))

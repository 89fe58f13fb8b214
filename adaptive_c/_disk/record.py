"""The record of a folder: counts and options of a run, and where its buckets are.  It is written last.

It is a checkpoint's file, and written as one, without the large arrays, which the buckets have.  Where several
processes have a folder each, for their parts of a run, it also says which part of which run it is of, and how many
records of that run were written before it.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import numpy as np

from .._checkpoint import description, file
from .._run.run import Run
from .away import Away
from .folder import told

VERSION = 1  # of the cut into buckets and of what the record has beside a checkpoint's head


class Origin(NamedTuple):
    """Of which run of several processes a record is, and of whose part."""

    rank: int
    ranks: int
    run: int  # a number that no other run has


class _Loaded(NamedTuple):
    """An array of the record, as `description.prepare` reads it."""

    array: Any

    @property
    def size(self) -> int:
        n: int = self.array.size
        return n

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def read(self, start: int, out: Any) -> None:
        out[...] = self.array[start : start + out.size]


class Found(NamedTuple):
    """The contents of a record, and its path."""

    path: str
    head: dict[str, Any]
    arrays: dict[str, Any]
    cuts: list[int]
    slots: list[int]
    sums: list[int]
    origin: Origin | None
    number: int  # of records of the run that were written before it


def _arrays(groups: Sequence[Any]) -> dict[str, list[Any]]:
    """The kind of each array in buckets, and its size over all processes."""
    return {
        f"{i}.{name}": [str(array.dtype), group.store.place(name)[1]]
        for i, group in enumerate(groups)
        for name, array in group.store.arrays.items()
        if name != "sums"
    }


def identity(path: str) -> Any:
    """A value that changes when another file takes the place of this one."""
    try:
        found = os.stat(path)
    except OSError as error:
        return error.errno
    return found.st_ino, found.st_mtime_ns, found.st_size


def begin(stack: ExitStack, run: Run, path: str, disk: dict[str, Any], kept: Sequence[Any], origin: Any, n: int) -> int:
    """Write a record beside its place, which it takes when the stack is closed.  Returns its size in bytes.

    disk: what `disk_of` gives.  origin, n: see `Found`.
    """
    head, found = description.counted(run, 0)  # sums are in memory only
    head["disk"] = {**disk, "arrays": _arrays(run.groups)}
    if origin is not None:
        head["disk"]["of"] = {**origin._asdict(), "number": n}
    sums = np.array([crc for k in kept for crc in k.sums], "int64")
    found["slots"] = file.Entry("uint8", [np.array([k.slot for k in kept], "uint8")])
    found["sums"] = file.Entry("int64", [sums])
    with told(path, "written"):
        temporary = stack.enter_context(file.replacing(path))
        file.fill(temporary, head, found)
        if origin is not None:  # what may fail does so before another process puts its own into place
            temporary.flush()
            os.fsync(temporary.fileno())
        size: int = temporary.tell()
    return size


def disk_of(cuts: Sequence[int], parameters: bool) -> dict[str, Any]:
    """The part of a record that says how the folder is laid out."""
    return {"version": VERSION, "cuts": list(cuts), "parameters": parameters}


def read(path: str, parameters: bool, part: tuple[int, int] | None) -> Found:
    """Read and verify a record, and refuse one of another version.  part: of several processes, which of how many."""
    with file.reading(path) as (head, stored):
        arrays: dict[str, Any] = {}
        for name, x in stored.items():
            arrays[name] = _Loaded(np.empty(x.size, x.dtype))
            x.read(0, arrays[name].array)
    disk = head.pop("disk", None)
    if not isinstance(disk, Mapping) or disk.get("version") != VERSION:
        version = disk.get("version") if isinstance(disk, Mapping) else None
        raise ValueError(f"{path} has the version {version!r} of state on disk, this adaptive_c has {VERSION}: use "
                         "the one that wrote it, save(path) a checkpoint there, and load(path) it here")  # fmt: skip
    if disk["parameters"] != parameters:
        raise ValueError(f"{path} was written with state_parameters={disk['parameters']!r}: construct the optimizer "
                         "with the same")  # fmt: skip
    of = dict(disk.get("of", {}))
    number = of.pop("number", 0)
    origin = Origin(**of) if of else None
    if (origin and origin[:2]) != part:
        raise ValueError(f"{path} is that of {_whose(origin and origin[:2])}, this is {_whose(part)}: open it as what "
                         "it is, or save(path) a checkpoint there and load(path) it with a new state_path")  # fmt: skip
    slots, sums = (arrays.pop(name).array.tolist() for name in ("slots", "sums"))
    for label, (dtype, size) in disk["arrays"].items():
        arrays[label] = Away(size, dtype)
    return Found(path, head, arrays, disk["cuts"], slots, sums, origin, number)


def _whose(part: tuple[int, int] | None) -> str:
    """Who wrote a record, in words."""
    return "an optimizer that is not Sharded" if part is None else f"rank {part[0]} of {part[1]}"


def fits(found: Found, groups: Sequence[Any]) -> bool:
    """Whether this run has the arrays of a record.  If not, `prepare` refuses it, and says what differs."""
    theirs = {name: [str(x.dtype), x.size] for name, x in found.arrays.items() if isinstance(x, Away)}
    sizes = [sum(group["sizes"]) for group in found.head["groups"]]
    dtypes = [group["dtype"] for group in found.head["groups"]]
    return (
        theirs == _arrays(groups)
        and sizes == [group.bound.size for group in groups]
        and dtypes == [group.bound.dtype for group in groups]
    )


def prepare(run: Run, found: Found) -> Callable[[], None]:
    """Compare a record with a run; what is returned takes over its counts and options."""
    head = json.loads(json.dumps(found.head))
    try:
        write = description.prepare(run, head, found.arrays, found.path, parameters=False)
    except (ValueError, TypeError) as error:
        error.add_note("construct the optimizer as the one whose state this folder has, or give another state_path")
        raise
    return lambda: write(False)

"""The record of a folder: counts and options of a run, and where its buckets are.  It is written last.

It is a checkpoint's file, and written as one, without the large arrays, which the buckets have.
"""

import errno
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from .._checkpoint import description, file
from .._run.run import Run
from .away import Away
from .folder import Folder, told

VERSION = 1  # of the cut into buckets and of what the record has beside a checkpoint's head


class UncertainError(Exception):
    """The record was put into place, but may not survive a power cut; or an interrupt came at that moment."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


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
    """What a record has."""

    path: str
    head: dict[str, Any]
    arrays: dict[str, Any]
    cuts: list[int]
    slots: list[int]
    sums: list[int]


def _arrays(groups: Sequence[Any]) -> dict[str, list[Any]]:
    """The kind and the size of each array in buckets, the parameters apart."""
    return {
        f"{i}.{name}": [str(array.dtype), array.size]
        for i, group in enumerate(groups)
        for name, array in group.store.arrays.items()
        if name != "sums"
    }


def _identity(path: str) -> Any:
    try:
        found = os.stat(path)
    except OSError as error:
        return error.errno
    return found.st_ino, found.st_mtime_ns, found.st_size


def write(run: Run, folder: Folder, cuts: Sequence[int], kept: Sequence[Any], parameters: bool) -> int:
    """Write the record; its bytes.  UncertainError if it failed when the record was in place already."""
    head, found = description.counted(run, 0)  # sums are in memory only
    head["disk"] = {"version": VERSION, "cuts": list(cuts), "parameters": parameters, "arrays": _arrays(run.groups)}
    sums = np.array([crc for k in kept for crc in k.sums], "int64")
    found["slots"] = file.Entry("uint8", [np.array([k.slot for k in kept], "uint8")])
    found["sums"] = file.Entry("int64", [sums])
    before = _identity(folder.record)
    try:
        with told(folder.record, "written"):
            file.write(folder.record, head, found)
            return os.stat(folder.record).st_size
    except BaseException as error:
        if _identity(folder.record) != before:
            raise UncertainError(error) from error
        raise


def read(folder: Folder, parameters: bool) -> Found:
    """Read and verify the record, and refuse one of another version."""
    path = folder.record
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
    slots, sums = (arrays.pop(name).array.tolist() for name in ("slots", "sums"))
    for label, (dtype, size) in disk["arrays"].items():
        arrays[label] = Away(size, dtype)
    return Found(path, head, arrays, disk["cuts"], slots, sums)


def fits(found: Found, groups: Sequence[Any]) -> bool:
    """Has this run the arrays of a record?  Otherwise `prepare` refuses it, and says what differs."""
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


def damaged(path: str) -> OSError:
    return OSError(
        errno.EIO,
        f"{os.strerror(errno.EIO)}: a bucket of the state is damaged: its checksum is not that of the record; load a "
        "checkpoint with a new state_path",
        path,
    )

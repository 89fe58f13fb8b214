"""One file for all ranks: each writes and reads its share of every array.

The file is that of `adaptive_c._checkpoint.file`, so that any number of ranks and the plain optimizer can load it.  All
ranks must see it under the same path.
"""

import os
import zlib
from contextlib import ExitStack
from typing import Any

import numpy as np
from mpi4py import MPI

from .._checkpoint import description, file
from .._run.run import Run
from ._agreement import hashed, texts
from ._ranks import Ranks

_PIECE = 1 << 20  # bytes that are written at a time

Segment = tuple[int, list[Any]]  # where it begins in the file, and the arrays that it consists of


def _segments(run: Run, rank: int, text: bytes, starts: dict[str, int], arrays: dict[str, file.Entry]) -> list[Segment]:
    """What a rank writes: its share of the groups' arrays; the first one also what is no rank's own."""
    found: list[Segment] = [(0, [np.frombuffer(text, "uint8")])] if rank == 0 else []
    for label, entry in arrays.items():
        index, _, name = label.partition(".")
        pieces = list(entry.pieces)
        if index.isdecimal():
            store = run.groups[int(index)].store
            if name == "sums":  # which reach into the next share
                pieces = [entry.pieces[0][: store.size]]
            found.append((starts[label] + store.place(name)[0] * entry.pieces[0].itemsize, pieces))
        elif rank == 0:
            found.append((starts[label], pieces))
    return found


def _write(path: str, segments: list[Segment]) -> list[tuple[int, int, int]]:
    """Write segments to the disk; (place, bytes, CRC-32) of each."""
    found = []
    fd = os.open(path, os.O_WRONLY)
    try:
        for place, pieces in segments:
            at, crc = place, 0
            for read in (part for piece in pieces for part in file.parts_of(piece)):
                memory = read() if callable(read) else read
                for i in range(0, memory.size, _PIECE):
                    part = memoryview(memory[i : i + _PIECE])
                    crc = zlib.crc32(part, crc)
                    while part:
                        n = os.pwrite(fd, part, at)
                        part, at = part[n:], at + n
            found.append((place, at - place, crc))
        os.fsync(fd)
    finally:
        os.close(fd)
    return found


def _crc(comm: Any, own: list[tuple[int, int, int]]) -> int:
    """The CRC-32 of all ranks' segments, which lie one after the other."""
    counts = np.empty(comm.size, "int64")
    comm.Allgather(np.array([3 * len(own)], "int64"), counts)
    found = np.empty((counts.sum() // 3, 3), "int64")
    comm.Allgatherv([np.array(own, "int64").reshape(-1, 3), MPI.INT64_T], [found, counts.tolist(), MPI.INT64_T])
    # Second moments of rows without elements, in a group without elements, are the same on all ranks.
    pieces = sorted({(place, crc, n) for place, n, crc in found.tolist() if n})
    return file.combined({i: (crc, n) for i, (_, crc, n) in enumerate(pieces)})


def save(run: Run, ranks: Ranks, path: Any, parameters: bool) -> None:
    """Write a checkpoint."""
    comm = ranks.comm
    with ExitStack() as stack:
        error: BaseException | None = None
        text, name, end = b"", "", 0
        segments: list[Segment] = []
        try:
            stack.enter_context(run.guard)
            about, arrays = description.contents(run, parameters)
            places = {label: label.partition(".") for label in arrays}
            sizes = {
                label: (entry.kind, run.groups[int(places[label][0])].store.place(places[label][2])[1]
                        if places[label][1] else sum(piece.size for piece in entry.pieces))
                for label, entry in arrays.items()
            }  # fmt: skip
            text, starts = file.header(about, sizes)
            end = starts.pop("end")
            segments = _segments(run, comm.rank, text, starts, arrays)
            if comm.rank == 0:
                temporary = stack.enter_context(file.replacing(path))
                name = temporary.name
        except BaseException as e:
            error = e
        (alike,) = ranks.agree("called save", error, hashed(text))
        if not alike:
            raise ranks.refusal(ValueError("the ranks have different options or counts, or save with and without "
                                           "parameters; nothing was written"))  # fmt: skip
        name = texts(comm, name)[0]
        with ranks.together("written its share"):
            written = _write(name, segments)
        crc = _crc(comm, written)
        with ranks.together("seen the file in its place"):
            if comm.rank == 0:
                temporary.seek(end)
                temporary.write(file.end_line(crc))
            stack.close()


def load(run: Run, ranks: Ranks, path: Any, parameters: bool) -> None:
    """Load a checkpoint, each rank its share."""
    comm = ranks.comm

    def checksum(stored: Any, end: int) -> int:
        """Every rank reads a part."""
        lo, hi = end * comm.rank // comm.size, end * (comm.rank + 1) // comm.size
        crc, error = 0, None
        try:
            crc = file.crc_of(stored, hi, lo)
        except OSError as e:
            error = e
        (alike,) = ranks.agree("called load", error, end)
        if not alike:
            raise ranks.refusal(
                ValueError(f"{path} has another size on another rank; all ranks must see the same file")
            )
        with ranks.messages():
            return _crc(comm, [(lo, hi - lo, crc)])

    with ExitStack() as stack:
        with ranks.together("called load"):
            stack.enter_context(run.guard)
            head, arrays = stack.enter_context(file.reading(path, checksum))
            write = description.prepare(run, head, arrays, str(path), parameters)
        try:
            with ranks.together("read its share"):
                description.complete(run, write)
        except BaseException as error:
            if run.plan.pages is None:  # what it has by now is of no step; on disk, it has ended
                ranks.tear(error)
            raise

"""What the ranks find out of each other before anything is written: errors, and what should be equal."""

import builtins
import hashlib
import json
from contextlib import suppress
from typing import Any

import numpy as np
from mpi4py import MPI


def hashed(*parts: bytes) -> int:
    """62 bits, so that a hash and its negative are integers that MPI can compare."""
    return int.from_bytes(hashlib.blake2b(b"".join(parts), digest_size=8).digest(), "little") >> 2


def texts(comm: Any, text: str) -> list[str]:
    """Every rank's text."""
    raw = np.frombuffer(text.encode(errors="surrogateescape"), "uint8")  # a path may have any bytes
    sizes = np.empty(comm.size, "int64")
    comm.Allgather(np.array([raw.size], "int64"), sizes)
    found = np.empty(sizes.sum(), "uint8")
    comm.Allgatherv([raw, MPI.BYTE], [found, sizes.tolist(), MPI.BYTE])
    return [bytes(part).decode(errors="surrogateescape") for part in np.split(found, np.cumsum(sizes)[:-1])]


def agree(comm: Any, call: str, error: BaseException | None, *same: int) -> tuple[BaseException | None, list[bool]]:
    """What every rank is to raise; and which numbers all ranks have alike, at most two.

    That is the error of the first rank that has one, or one that says that ranks have made different calls.  But a rank
    that has a Ctrl-C raises that.  It is one Allreduce of the same length, whatever the call.
    """
    numbers = [hashed(call.encode()), *same]
    found = np.zeros(7, "int64")
    found[: 2 * len(numbers) + 1] = error is not None, *(y for x in numbers for y in (x, -x))
    comm.Allreduce(MPI.IN_PLACE, found, MPI.MAX)
    together, *alike = [bool(found[2 * i + 1] == -found[2 * i + 2]) for i in range(len(numbers))]
    if found[0]:
        return _first(comm, error), alike
    if not together:
        return ValueError(f"the ranks do not go together: {difference(comm, [call])}; nothing was changed"), alike
    return None, alike


def _first(comm: Any, error: BaseException | None) -> BaseException:
    """The error of the first rank that has one, which keeps its own; so does one that has a Ctrl-C."""
    own = ""
    if error is not None:
        message = str(error.args[0] if len(error.args) == 1 else error)
        arguments: list[Any] = [message]
        if isinstance(error, OSError) and error.errno is not None:
            arguments = [error.errno, error.strerror, *([] if error.filename is None else [str(error.filename)])]
        own = json.dumps([type(error).__name__, message, arguments, *getattr(error, "__notes__", ())])
    said = texts(comm, own)
    rank = next(i for i, text in enumerate(said) if text)
    if error is not None and not isinstance(error, Exception):
        rank = comm.rank
    if rank != comm.rank or error is None:
        name, message, arguments, *notes = json.loads(said[rank])
        kind: Any = getattr(builtins, name, None)
        error = RuntimeError(f"{name}: {message}".removesuffix(": "))
        if isinstance(kind, type) and issubclass(kind, Exception):
            with suppress(TypeError):  # one that takes other arguments
                error = kind(*arguments)
        for note in notes:
            error.add_note(note)
    error.add_note(f"raised on rank {rank} of {comm.size}")
    return error


def difference(comm: Any, lines: list[str]) -> str:
    """The first line in which a rank differs from rank 0."""
    first, *others = (text.split("\n") for text in texts(comm, "\n".join(lines)))
    for rank, other in enumerate(others, 1):
        for i in range(max(len(first), len(other))):
            ours, theirs = (x[i] if i < len(x) else "nothing" for x in (first, other))
            if ours != theirs:
                return f"rank 0 has {ours}, rank {rank} {theirs}"
    return "the ranks differ"

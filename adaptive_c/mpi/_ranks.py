"""The ranks of a communicator as the company of a run: what they do together, all of them do, or none."""

import os
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from mpi4py import MPI

from .._checkpoint import description
from .._disk.record import Found, Origin
from .._run.alone import Alone
from .._run.run import Run
from . import _folders
from ._agreement import agree, difference, hashed

_AGREED = "_all_ranks_raise_it"


class Ranks(Alone):
    """What they agree on.  about: what else must be the same on all ranks, when an optimizer is constructed."""

    shared = True

    def __init__(self, comm: Any, about: list[str]) -> None:
        self.comm, self.part, self._about = comm, (comm.rank, comm.size), about
        self._torn = ""  # what ended a call in the middle
        self._calling = threading.Lock()

    # --- errors ------------------------------------------------------------------------------------------------------

    @contextmanager
    def collective(self) -> Iterator[None]:
        """Around a call that all ranks make: what ends in the middle is of no more use to any."""
        self._check()
        if not self._calling.acquire(blocking=False):  # its messages would be taken for those of the other call
            raise RuntimeError(
                "another call of this optimizer, which the ranks make together, is under way on this rank: call when "
                "it has returned, and not from its progress, a schedule or another thread"
            )
        try:
            with self.messages():
                yield
        finally:
            self._calling.release()

    @contextmanager
    def messages(self) -> Iterator[None]:
        """Around messages: if they end in the middle, it is not known what the others do now."""
        try:
            yield
        except BaseException as error:
            if not agreed(error):
                self.tear(error)
            raise

    def _check(self) -> None:
        if self._torn:
            raise RuntimeError(
                f"an earlier call ended in the middle on this rank ({self._torn}), and its state may be that of no "
                "step: end all ranks, and resume from a checkpoint, or from state_path"
            )

    def tear(self, error: BaseException) -> None:
        """Let nothing go on from here."""
        self._torn = self._torn or f"{type(error).__name__}: {error}".partition("\n")[0]

    def agree(self, what: str, error: BaseException | None = None, *same: int) -> list[bool]:
        """Raise on all ranks what one of them is to raise.  Which numbers have all ranks alike, at most two?"""
        self._check()
        try:
            refusal, alike = agree(self.comm, what, error, *same)
        except BaseException as failure:  # of MPI: what the others do now is not known
            self.tear(failure)
            raise
        if refusal is not None:
            raise self.refusal(refusal)
        return alike

    def refusal(self, error: BaseException) -> BaseException:
        """An error that all ranks raise."""
        setattr(error, _AGREED, True)
        return error

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        error: BaseException | None = None
        try:
            yield
        except BaseException as e:  # a Ctrl-C, too, or the others would wait for this rank
            if agreed(e) or self._torn:
                raise
            error = e
        self.agree(what, error)

    def any(self, here: bool) -> bool:
        (alike,) = self.agree("failed", None, int(here))
        return here or not alike

    # --- numbers -----------------------------------------------------------------------------------------------------

    def combine(self, partial: Any) -> None:
        """Complete the reductions of chunks by those of the other ranks: of each, all ranks but one have 0."""
        self.comm.Allreduce(MPI.IN_PLACE, np.asarray(partial), MPI.SUM)

    # --- the beginning -----------------------------------------------------------------------------------------------

    def compare(self, run: Run, groups: Sequence[Any], pages: Any) -> None:
        """Do all ranks construct the same optimizer, over the same parameters?"""
        on_disk = {"state_path": pages is not None, "state_parameters": pages is not None and pages.parameters}
        self._same([*_lines("", description.describe(run, groups)), *_lines("", on_disk), *self._about])
        if pages is None or not pages.choose():
            self._same([f"values of group {i} with the checksum {_crc(x):08x}" for i, x in enumerate(groups)])

    def _same(self, lines: list[str]) -> None:
        with self.messages():
            (alike,) = self.agree("called the constructor", None, hashed("\n".join(lines).encode()))
            if not alike:
                what = difference(self.comm, lines)
                raise self.refusal(ValueError(f"all ranks must construct the same optimizer, but {what}"))

    # --- folders -----------------------------------------------------------------------------------------------------

    def folder(self, path: Any) -> str:
        if MPI.Query_thread() < MPI.THREAD_SERIALIZED:
            raise ValueError("state_path needs MPI.THREAD_SERIALIZED, since a step on disk is made by a thread of its "
                             "own: leave mpi4py.rc.threads and mpi4py.rc.thread_level as they are")  # fmt: skip
        return _folders.folder(path, *self.part)

    def choose(self, found: list[Found]) -> tuple[Found | None, Origin]:
        """The record that all ranks go on from; no rank has it if they begin anew."""
        with self.messages():
            mine = [_folders.NONE, _folders.NONE, 0]
            for i, x in enumerate(sorted(found, key=lambda x: -x.number)):
                mine[i], mine[2] = x.number, x.origin.run if x.origin else 0
            every = np.empty((self.comm.size, 3), "int64")
            new = np.array([int.from_bytes(os.urandom(8), "little") >> 2], "int64")
            self.comm.Allgather(np.array(mine, "int64"), every)
            self.comm.Bcast(new)
        try:
            number, run = _folders.common(every.tolist(), int(new[0]))
        except ValueError as error:
            raise self.refusal(error) from None
        return next((x for x in found if x.number == number), None), Origin(*self.part, run)


def agreed(error: BaseException) -> bool:
    """Do all ranks raise this?  A second Ctrl-C on this one is raised from what the others raise."""
    return getattr(error, _AGREED, False) or (error.__cause__ is not None and agreed(error.__cause__))


def _crc(group: Any) -> int:
    """A checksum of a group's parameters."""
    crc = 0
    for array in group.layout.arrays:
        crc = zlib.crc32(array.reshape(-1).view("uint8"), crc)
    return crc


def _lines(name: str, value: Any) -> list[str]:
    """A nested dict, one line for each of its values."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return [f"{name}={value!r}"]
    return [line for key, x in items for line in _lines(f"{name}[{key!r}]" if name else str(key), x)]

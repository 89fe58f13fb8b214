"""How gradients get to the ranks that step them, and parameters back: messages of raw bytes, bucket by bucket.

A bucket takes one slice of each rank's share.  What lies in one piece in memory is sent from where it is and received
where it belongs; the rest goes through buffers.  (Derived datatypes would do that too, at a third of the speed: MPICH
copies them through a pipe of its own, and reads plain memory directly from the other process.)
"""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from mpi4py import MPI

from .._native import core
from .._run.run import Run
from .._run.store import CHUNK

_GRADIENTS, _PARAMETERS = 0, 1  # tags
_LARGEST = 1 << 30  # bytes of a message
_ITEMSIZE = {0: 0, 1: 4, 2: 2, 3: 2, 5: 8}  # of a gradient's format in the core; 0: as the rule computes

Runs = list[tuple[int, int]]  # pieces of memory, (address, bytes); address 0: a gap
Piece = tuple[int, int, int]  # (array, its first element, the one after its last)
Addition = tuple[int, int, int, int, bool]  # as `Sharing.add` takes it


class Arrays:
    """All arrays of a run, one after the other, and their places in the sweep."""

    def __init__(self, run: Run) -> None:
        self.starts, self.stops = [], []
        self.places: list[tuple[int, int]] = []  # group, and number in it
        self.itemsize: list[int] = []  # as the rule computes
        self.params: list[list[tuple[int, int]]] = []  # what a step writes: (address, itemsize) of each array
        groups = run.groups
        for i, (group, at) in enumerate(zip(groups, run.starts[:-1], strict=True)):
            copies = group.layout.match(group.options["copy_to"], "") if group.options["copy_to"] is not None else []
            for j, (array, size) in enumerate(zip(group.layout.arrays, group.layout.sizes, strict=True)):
                self.places.append((i, j))
                self.starts.append(at)
                self.stops.append(at + size)
                self.itemsize.append(8 if group.computed == "float64" else 4)
                written = [array, *(copies[j][1:2] if copies else ())]
                self.params.append([(x.__array_interface__["data"][0], x.itemsize) for x in written])
                at += size

    def within(self, first: int, last: int) -> list[Piece]:
        """The pieces between two positions."""
        found = []
        for k in range(bisect_right(self.stops, first), len(self.stops)):
            if self.starts[k] >= last:
                break
            lo, hi = max(first, self.starts[k]), min(last, self.stops[k])
            if lo < hi:
                found.append((k, lo - self.starts[k], hi - self.starts[k]))
        return found


def joined(runs: Runs) -> Runs:
    """Neighbours in memory as one."""
    found: Runs = []
    for address, size in runs:
        if found and found[-1][0] and sum(found[-1]) == address:
            found[-1] = found[-1][0], found[-1][1] + size
        else:
            found.append((address, size))
    return found


class Buffer:
    """Memory for messages, kept from step to step."""

    def __init__(self) -> None:
        self.memory = np.empty(0, "uint8")
        self.address = 0

    def reserve(self, size: int) -> None:
        if self.memory.size < size:
            self.memory = np.empty(size, "uint8")
            self.address = self.memory.__array_interface__["data"][0]


def in_place(runs: Runs) -> bool:
    return len(runs) == 1 and runs[0][0] != 0


class Message(NamedTuple):
    """What goes to, or comes from, another rank; through a buffer from byte `at` on unless it lies in one piece."""

    rank: int
    runs: Runs
    at: int

    @property
    def size(self) -> int:
        return sum(size for _, size in self.runs)

    def memory(self, buffer: Buffer) -> Any:
        address = self.runs[0][0] if in_place(self.runs) else buffer.address + self.at
        return [MPI.memory.fromaddress(address, self.size), MPI.BYTE]

    def carry(self, buffer: Buffer, back: bool) -> None:
        if not in_place(self.runs):
            core.carry_runs(self.runs, buffer.address + self.at, back)


class Mail(NamedTuple):
    """The messages of one bucket."""

    first: int  # the slice of this rank's own share
    last: int
    outgoing: list[Message]
    incoming: list[Message]


Work = list[tuple[Mail, list[list[Addition]]]]  # of each bucket its mail, and what is added of each rank


def placed(parts: list[tuple[int, Runs]]) -> tuple[list[Message], int]:
    """Messages to and from ranks, with a place in the buffer for each that needs one; and the bytes of all of them."""
    found, at = [], 0
    for rank, runs in parts:
        message = Message(rank, joined(runs), at)
        if message.size:
            found.append(message)
            at += 0 if in_place(message.runs) else -(-message.size // 64) * 64
    return found, at


class Exchange:
    """The ranks' shares of a run, cut into buckets.  bucket_bytes: that a rank receives at a time, about."""

    def __init__(self, run: Run, comm: Any, bucket_bytes: int) -> None:
        self.arrays, self.comm, self.rank, self.size = Arrays(run), comm, comm.rank, comm.size
        starts, self.cuts = run.starts, run.cuts
        self.ends = [  # of the sums, which reach a chunk into the next share of the same group
            next((min(b + CHUNK, end) for start, end in pairwise(starts) if a < b and start < b < end), b)
            for a, b in pairwise(self.cuts)
        ]
        itemsize = max(self.arrays.itemsize)
        per_rank = min(bucket_bytes // max(comm.size - 1, 1), _LARGEST) // itemsize
        self.length = max(per_rank // CHUNK, 1) * CHUNK
        longest = max(end - cut for cut, end in zip(self.cuts, self.ends, strict=False))
        self.n_buckets = -(-longest // self.length)
        self.others = [(comm.rank + i) % comm.size for i in range(1, comm.size)]  # rotated: not all to one at a time
        self.buffers = [(Buffer(), Buffer()) for _ in range(2)]  # to send from, to receive into; in turn
        self._sums = [self._pieces(b, self.ends) for b in range(self.n_buckets)]
        self.returns = [self._returned(b) for b in range(self.n_buckets)]

    def slice(self, bucket: int, rank: int, ends: list[int]) -> tuple[int, int]:
        """The positions of a rank's share that are in a bucket; ends: of the shares, or of the sums."""
        first = min(self.cuts[rank] + bucket * self.length, ends[rank])
        return first, min(first + self.length, ends[rank])

    def _pieces(self, bucket: int, ends: list[int]) -> list[list[Piece]]:
        """Of each rank, the pieces of a bucket."""
        return [self.arrays.within(*self.slice(bucket, rank, ends)) for rank in range(self.size)]

    # --- gradients ---------------------------------------------------------------------------------------------------

    def laid_out(self, pieces: list[Piece], kinds: Sequence[int]) -> tuple[list[tuple[Piece, int, int]], int]:
        """Of those pieces for which a rank has gradients: the place in the message, and the itemsize; and the end.

        kinds: the format of each array's gradient.
        """
        found, at = [], 0
        for piece in pieces:
            kind = kinds[piece[0]]
            if kind >= 0:
                itemsize = _ITEMSIZE[kind] or self.arrays.itemsize[piece[0]]
                at = -(-at // itemsize) * itemsize
                found.append((piece, at, itemsize))
                at += (piece[2] - piece[1]) * itemsize
        return found, at

    def gradients(self, given: list[tuple[int, int]], kinds: list[list[int]], before: list[bool]) -> Work:
        """What is to be done in each bucket: its mail, and of each rank what is added to the sums.

        given: of each array the address of this rank's gradient, and its format.  kinds: of each rank, the formats.
        before: of each array, is there a sum already?
        """
        mails = [self._mail(b, given, kinds) for b in range(self.n_buckets)]  # buffers may grow until the last one
        return [(mail, self._additions(b, mail, given, kinds, before)) for b, mail in enumerate(mails)]

    def _mail(self, b: int, given: list[tuple[int, int]], kinds: list[list[int]]) -> Mail:
        outgoing = []
        for rank in self.others:
            runs, end = [], 0
            for (k, lo, hi), at, itemsize in self.laid_out(self._sums[b][rank], kinds[self.rank])[0]:
                if at > end:
                    runs.append((0, at - end))
                runs.append((given[k][0] + lo * itemsize, (hi - lo) * itemsize))
                end = at + (hi - lo) * itemsize
            outgoing.append((rank, runs))
        own = self._sums[b][self.rank]
        incoming = [(rank, [(0, self.laid_out(own, kinds[rank])[1])]) for rank in self.others]
        return self._addressed(b, self.ends, outgoing, incoming)

    def _additions(
        self, b: int, mail: Mail, given: list[tuple[int, int]], kinds: list[list[int]], before: list[bool]
    ) -> list[list[Addition]]:
        places = {message.rank: self.buffers[b % 2][1].address + message.at for message in mail.incoming}
        began, additions = list(before), []
        for rank in range(self.size):
            pieces = []
            for (k, lo, _), at, itemsize in self.laid_out(self._sums[b][self.rank], kinds[rank])[0]:
                start = given[k][0] if rank == self.rank else places[rank] + at - lo * itemsize
                pieces.append((*self.arrays.places[k], start, kinds[rank][k], not began[k]))
                began[k] = True
            additions.append(pieces)
        return additions

    def _addressed(
        self, b: int, ends: list[int], outgoing: list[tuple[int, Runs]], incoming: list[tuple[int, Runs]]
    ) -> Mail:
        """The mail of a bucket, with room in the buffers."""
        (sent, send_size), (received, receive_size) = placed(outgoing), placed(incoming)
        for buffer, size in zip(self.buffers[b % 2], (send_size, receive_size), strict=True):
            buffer.reserve(size)
        return Mail(*self.slice(b, self.rank, ends), sent, received)

    def give(self, mail: Mail, b: int, tag: int = _GRADIENTS) -> tuple[dict[int, Any], list[Any]]:
        """Begin to send and to receive; the requests of what comes, by rank, and of what goes."""
        sent, received = self.buffers[b % 2]
        coming = {x.rank: self.comm.Irecv(x.memory(received), x.rank, tag) for x in mail.incoming}
        packed: Runs = []
        for message in mail.outgoing:
            if message.runs is not packed:  # parameters are the same for all
                message.carry(sent, False)
            packed = message.runs
        return coming, [self.comm.Isend(x.memory(sent), x.rank, tag) for x in mail.outgoing]

    def sum(self, now: Any, work: Work) -> None:
        """Exchange gradients, and add what comes in rank order while the next bucket is under way."""
        under_way = [self.give(mail, b) for b, (mail, _) in enumerate(work[:1])]
        for b, (mail, additions) in enumerate(work):
            coming, going = under_way.pop()
            if b + 1 < len(work):
                under_way.append(self.give(work[b + 1][0], b + 1))
            for rank, pieces in enumerate(additions):
                if rank in coming:
                    coming[rank].Wait()
                if pieces:
                    now.add(mail.first, mail.last, pieces)
            MPI.Request.Waitall(going)

    # --- parameters --------------------------------------------------------------------------------------------------

    def _written(self, pieces: list[Piece]) -> Runs:
        """What a step writes of these pieces: parameters, then their copies."""
        params = self.arrays.params
        most = max((len(params[k]) for k, _, _ in pieces), default=0)
        return [
            (params[k][n][0] + lo * params[k][n][1], (hi - lo) * params[k][n][1])
            for n in range(most)
            for k, lo, hi in pieces
            if n < len(params[k])
        ]

    def _returned(self, b: int) -> Mail:
        ends = self.cuts[1:]
        runs = [self._written(pieces) for pieces in self._pieces(b, ends)]
        own = joined(runs[self.rank])
        mail = self._addressed(b, ends, [(self.rank, own)], [(rank, runs[rank]) for rank in self.others])
        return mail._replace(outgoing=[Message(rank, own, 0) for rank in self.others if own])

    def step(self, now: Any) -> None:
        """Step bucket by bucket, and return what was stepped while the next bucket is stepped.

        now: None only returns what each rank has.
        """
        under_way: list[Any] = []
        if now is not None and now.as_a_whole([mail.first for mail in self.returns]):
            now.step(self.cuts[self.rank], self.cuts[self.rank + 1])
            now = None
        for b, mail in enumerate(self.returns):
            if now is not None:
                now.step(mail.first, mail.last)
            under_way.append((b, self.give(mail, b, _PARAMETERS)))
            if b:
                self._take(*under_way.pop(0))
        for last in under_way:
            self._take(*last)

    def _take(self, b: int, under_way: tuple[dict[int, Any], list[Any]]) -> None:
        coming, going = under_way
        for message in self.returns[b].incoming:
            coming[message.rank].Wait()
            message.carry(self.buffers[b % 2][1], True)
        MPI.Request.Waitall(going)

"""The state of a run on disk, and the memory through which its buckets pass.

Each pass over the buckets reads ahead, does something with one bucket after the other, and writes behind, to the slot
that is not in force.  `commit` makes all that was written count, by one small record.  Passes are made by threads in
which no handler of a signal runs (`Plan.conduct`).
"""

import mmap
import weakref
import zlib
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np

from .._run.run import Run
from .._run.store import CHUNK
from . import record
from .away import Away
from .buckets import PAGE, Bucket, Extent, buckets_of, cuts_of, spaces_of
from .folder import Folder, StoppedError
from .maps import Maps, Slices
from .transfer import Transfer

Array = np.ndarray[Any, Any]
_LARGEST = 64 << 20  # bytes of a bucket
_STREAM = 4  # buffers through which buckets pass that do not stay: two are read, one is stepped, one is written
_AHEAD = 2  # buckets that are read at a time


class Kept(NamedTuple):
    """Where a bucket is on disk, and the checksums of its extents."""

    slot: int
    sums: tuple[int, ...]


class Buffer:
    """Memory for a bucket, from the start of a page on."""

    def __init__(self, size: int) -> None:
        self.bytes: Any = np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8)
        self.address: int = self.bytes.__array_interface__["data"][0]

    def array(self, extent: Extent) -> Any:
        return self.bytes[extent.offset : extent.end]


class Pages:
    """What a run's state is brought by, where it is on disk.  The core calls `sweep`, `step` and `rollback`."""

    slices = Slices  # of parameters, through which a checkpoint reads and writes them

    def __init__(self, path: Any, memory: int, parameters: bool) -> None:
        self.parameters, self.bytes_written = parameters, 0
        self.cuts: Sequence[int] = ()
        self._memory, self._folder = memory, Folder(path)
        self._buckets: list[Bucket] = []
        self._kept: list[Kept] = []  # what is durable
        self._written: dict[int, Kept] = {}  # what a commit makes so
        self._before: dict[int, Kept] = {}  # what the last commit replaced
        self._here: dict[int, Buffer] = {}  # buckets that stay in memory
        self._free: list[Buffer] = []
        self._n_buffers = self._most = self._staying = 0
        self._touched: list[Bucket] = []  # by this pass
        self._uncertain = False  # whether the last record is on disk

    @property
    def stopped(self) -> bool:
        """Is what goes on to end soon, as if it had failed?  The core says so."""
        return self._folder.stopped

    @stopped.setter
    def stopped(self, stopped: bool) -> None:
        self._folder.stopped = stopped

    # --- the beginning ------------------------------------------------------------------------------------------------

    def allocate(self, n: int, dtype: Any, turn: int = 0) -> Any:
        return Away(n, dtype)

    def lay_out(self, groups: Sequence[Any]) -> None:
        """Cut the state of groups into buckets, before anything is written; or as the folder's record has them cut."""
        for group in groups:
            where = f"param_groups[{group.index}]: "
            if group.store.by_row:
                raise ValueError(f"{where}second_moment='row' is refused with state_path, since there is little state "
                                 "then; drop one of them")  # fmt: skip
            if group.options["rows"] == "exact":
                raise ValueError(f"{where}rows='exact' is refused with state_path, which does not keep what rows have "
                                 "missed; use rows='lazy'")  # fmt: skip
        self._layouts = [group.layout for group in groups]
        self._starts = [[0, *accumulate(group.layout.sizes)] for group in groups]
        spaces = spaces_of(groups, self.parameters)
        self._found = record.read(self._folder, self.parameters) if self._folder.has_record() else None
        if self._found is None:
            self.cuts = cuts_of(spaces, min(_LARGEST, self._memory // _STREAM))
        else:
            if not record.fits(self._found, groups):
                return  # `begin` says what differs
            self.cuts = self._found.cuts
        self._buckets = buckets_of(spaces, self.cuts)
        self._share_memory()
        if self._found is None:
            self._folder.create(self._buckets)
            self._kept = [Kept(1, (0,) * len(bucket.extents)) for bucket in self._buckets]
        else:
            self._folder.check_sizes(self._buckets)
            sums = iter(self._found.sums)
            self._kept = [
                Kept(slot, tuple(next(sums) for _ in bucket.extents))
                for slot, bucket in zip(self._found.slots, self._buckets, strict=True)
            ]
        parts: dict[tuple[int, str], list[Callable[[], Array]]] = {}
        for bucket in self._buckets:
            for k, extent in enumerate(bucket.extents):
                parts.setdefault((extent.group, extent.name), []).append(self._reader(bucket, k))
        for i, group in enumerate(groups):
            for name, array in group.store.arrays.items():
                array.bind(partial_list(parts.get((i, name), [])))

    def _share_memory(self) -> None:
        largest = max((bucket.size for bucket in self._buckets), default=0)
        n = len(self._buckets)
        self._most = min(self._memory // max(largest, 1), n)
        if self._most < min(3, n):
            raise ValueError(f"state_memory={self._memory} is too small for the buckets of this state, of {largest} "
                             f"bytes: give at least {min(3, n) * largest}.  Buckets are cut at multiples of {CHUNK} "
                             "elements, but not within rows that sum to one")  # fmt: skip
        self._staying = n if self._most == n else max(self._most - _STREAM, 0)
        self._largest = largest

    def begin(self, run: Run) -> None:
        """Write the first record, or go on from the one that there is.  The caller holds the guard."""
        self._run = weakref.ref(run)
        if self._found is None:
            run.plan.conduct(self.commit)
        else:
            found, self._found = self._found, None
            write = record.prepare(run, found)
            run.plan.conduct(self._bring)
            write()
        self._folder.complete()

    def _bring(self) -> None:
        """Verify all there is, put parameters into place, and keep in memory what stays there."""
        maps = Maps(self._parameters())
        for bucket, buffer in self._pass(self._buckets, True, False, whole=True):
            self._put(bucket, buffer)
            if maps:
                maps.let_go(self._addresses(bucket))

    def _parameters(self) -> list[Any]:
        return [array for layout in self._layouts for array in layout.arrays]

    # --- what the core calls ------------------------------------------------------------------------------------------

    def watch(self, arrays: list[Any]) -> bool:
        """Look for memory maps among the arrays of a call: are there any?"""
        self._maps = Maps(arrays)
        return bool(self._maps)

    def let_go(self, spans: list[tuple[int, int]]) -> None:
        self._maps.let_go(spans)

    def sweep(self, visit: Any, reads: bool, writes: bool) -> None:
        """Have all buckets visited that a sweep has something to do with."""
        if not reads and self._found is not None:
            return  # the first write: it is there already
        wanted = [bucket for bucket in self._buckets if visit.wants(bucket.first, bucket.last)]
        streamed = self.watch(visit.mapped())
        self._touched = []
        for bucket, buffer in self._pass(wanted, reads, writes, visit.report):
            self._touched.append(bucket)
            visit(_places(bucket, buffer), bucket.first, bucket.last, streamed)
            if writes:
                self._take(bucket, buffer)
            if streamed:
                self._maps.let_go(visit.spans(bucket.first, bucket.last))

    def step(self, visit: Any, usable: bool) -> None:
        """Make a step, or count one that is skipped.  If anything fails, nothing has happened, or the run ends."""
        self._touched = []
        try:
            if usable:
                self.sweep(visit, True, True)
            visit.count()
            self.commit()
        except BaseException as error:
            visit.uncount()
            self._recover(visit, error)
            raise

    def rollback(self, visit: Any) -> None:
        """Go back to the slots of the step before."""
        with self.final("a rollback"):
            self._written = dict(self._before)
            for i in self._before:
                self._leave(i)
            visit.undo()
            if self.parameters:
                for bucket, buffer in self._pass([self._buckets[i] for i in self._before], True, False, whole=True):
                    self._put(bucket, buffer)
            visit.take_back()
            self.commit()

    def derive(self, visit: Any) -> None:
        """Make anew what is made of the parameters, which others have replaced."""
        with self.final("a call that replaced the parameters"):
            self.sweep(visit, True, True)
            self.commit()

    @contextmanager
    def final(self, what: str) -> Iterator[None]:
        """For a block that replaces what there is, and after whose failure the run can't go on."""
        try:
            yield
        except BaseException as error:
            error.add_note(self._end(f"{what} failed"))
            raise

    def keep(self) -> None:
        """A step begins that a rollback will undo; what it leaves as it is, is not touched by that."""
        self._before = {}

    def load(self, write: Callable[[], None]) -> None:
        """Make the writes of a load count, of which `fill` is one."""
        with self.final("a load"):
            write()
            self.commit()

    def fill(self, read: Callable[[int, str, int, Array], None]) -> None:
        """Replace all state.  read(group, name, first item, array): gives it."""
        for bucket, buffer in self._pass(self._buckets, False, True):
            for extent in bucket.extents[: bucket.n_state]:
                dtype = self._owner().groups[extent.group].store.arrays[extent.name].dtype
                read(extent.group, extent.name, extent.first, buffer.array(extent).view(dtype))
            self._take(bucket, buffer)

    def commit(self) -> None:
        """Make durable what was written since the last commit, with the counts and options of the run."""
        self._folder.check()
        kept = [self._written.get(i, old) for i, old in enumerate(self._kept)]
        self._uncertain = False
        try:
            self.bytes_written += record.write(self._owner(), self._folder, self.cuts, kept, self.parameters)
        except record.UncertainError as error:
            self._uncertain = True
            raise error.error from None
        self._before = {i: self._kept[i] for i in self._written}
        self._kept, self._written = kept, {}

    def close(self) -> None:
        self._folder.close()
        self._here.clear()
        self._free.clear()

    # --- failures -----------------------------------------------------------------------------------------------------

    def _drop(self) -> None:
        """Forget what was written since the last commit."""
        self._written = {}
        for bucket in self._touched:
            self._leave(bucket.number)

    def _recover(self, visit: Any, error: BaseException) -> None:
        """After a step that failed: bring back what it has changed, or let nothing go on from here."""
        if self._uncertain:
            self._end("it is not known whether the last step is on disk")
            error.add_note(
                "all was stepped, but it is not known whether the step is on disk: a new optimizer with this "
                "state_path starts from what is there"
            )
            return
        self._drop()
        if not self._touched:
            error.add_note("nothing was changed by this step")
            return
        try:
            if visit.keeps():
                visit.undo()
            elif self.parameters:
                self.stopped = False
                for bucket, buffer in self._pass(self._touched, True, False, whole=True):
                    self._put(bucket, buffer)
                    visit.copy(_places(bucket, buffer), bucket.first, bucket.last)
                error.add_note("parameters and state are as the last step left them; what you have assigned to "
                               "parameters since then is undone, too")  # fmt: skip
                return
            else:
                self._end("a step failed when a part of the parameters was stepped")
                error.add_note(f"{len(self._touched)} of {len(self._buckets)} buckets of the parameters are stepped, "
                               "the others not: put those of the last whole step back, and construct a new optimizer "
                               "with this state_path.  With state_parameters=True or keep_undo=True they are put "
                               "back by themselves")  # fmt: skip
                return
        except BaseException:
            self._end("a step failed, and the parameters could not be put back")
            error.add_note("the parameters could not be put back")
            return
        error.add_note("parameters and state are as they were before this step")

    def _end(self, why: str) -> str:
        """Let nothing go on, and the folder be had by another optimizer; what is said of it."""
        text = (f"this optimizer can't go on: {why}.  Its folder holds the last whole step: construct a new optimizer "
                f"with state_path={self._folder.path!r}, over the parameters of that step")  # fmt: skip
        self._owner().plan.end(text)
        self.close()
        return text

    def _leave(self, i: int) -> None:
        """Keep a bucket in memory no longer."""
        if i in self._here:
            self._free.append(self._here.pop(i))

    def _owner(self) -> Run:
        run = self._run()
        assert run is not None  # it makes this call
        return run

    # --- passes -------------------------------------------------------------------------------------------------------

    def _pass(
        self,
        buckets: Sequence[Bucket],
        reads: bool,
        writes: bool,
        report: Callable[[int, int], None] | None = None,
        whole: bool = False,
    ) -> Iterator[tuple[Bucket, Buffer]]:
        """Give one bucket after the other, in memory; what is done with it until the next one is written.

        whole: read the parameters, too.
        """
        self._folder.check()
        ahead: deque[tuple[Bucket, Buffer, Transfer | None]] = deque()
        behind: deque[tuple[Bucket, Buffer, Transfer | None]] = deque()
        todo, done = deque(buckets), 0
        given: tuple[Bucket, Buffer] | None = None

        def finish() -> None:
            nonlocal done
            bucket, buffer, transfer = behind[0]
            if transfer is not None:
                transfer.wait()
            behind.popleft()
            self._keep(bucket, buffer)
            done += 1
            if report is not None:
                report(done, len(buckets))

        def fetch() -> None:
            while todo and len(ahead) < _AHEAD and (buffer := self._buffer(todo[0])) is not None:
                bucket = todo.popleft()
                needed = reads and bucket.number not in self._here
                ahead.append((bucket, buffer, Transfer(self._read, bucket, buffer, whole) if needed else None))

        try:
            while todo or ahead:
                if self.stopped:
                    raise StoppedError
                fetch()
                while not ahead:
                    finish()
                    fetch()
                bucket, buffer, transfer = ahead.popleft()
                given = bucket, buffer
                if transfer is not None:
                    transfer.wait()
                fetch()
                yield bucket, buffer
                given = None
                behind.append((bucket, buffer, Transfer(self._write, bucket, buffer) if writes else None))
                while behind and (behind[0][2] is None or behind[0][2].finished):
                    finish()
            while behind:
                finish()
        finally:
            for _, _, transfer in (*ahead, *behind):
                if transfer is not None:
                    transfer.end()
            left = [(bucket, buffer) for bucket, buffer, _ in (*ahead, *behind)] + ([given] if given else [])
            for bucket, buffer in left:  # after an error
                if self._here.get(bucket.number) is not buffer:
                    self._free.append(buffer)

    def _buffer(self, bucket: Bucket) -> Buffer | None:
        if bucket.number in self._here:
            return self._here[bucket.number]
        if self._free:
            return self._free.pop()
        if self._n_buffers < self._most:
            buffer = Buffer(self._largest)
            self._n_buffers += 1
            return buffer
        return None

    def _keep(self, bucket: Bucket, buffer: Buffer) -> None:
        """After its turn: a bucket stays in memory, or its buffer is free for another one."""
        if bucket.number < self._staying:
            self._here[bucket.number] = buffer
        else:
            self._free.append(buffer)

    def _read(self, bucket: Bucket, buffer: Buffer, whole: bool) -> None:
        """Read a bucket and verify it."""
        kept = self._written.get(bucket.number, self._kept[bucket.number])
        size = bucket.size if whole else bucket.state_size
        if not size:
            return
        self._folder.read(bucket, kept.slot, memoryview(buffer.bytes[:size]))
        self._verify(bucket, buffer, range(len(bucket.extents) if whole else bucket.n_state))

    def _verify(self, bucket: Bucket, buffer: Buffer, extents: Iterable[int]) -> None:
        kept = self._written.get(bucket.number, self._kept[bucket.number])
        for k in extents:
            if zlib.crc32(buffer.array(bucket.extents[k])) != kept.sums[k]:
                raise record.damaged(self._folder.file(bucket))

    def _write(self, bucket: Bucket, buffer: Buffer) -> None:
        """Write a bucket to the slot that is not in force."""
        if not bucket.size:
            return
        sums = tuple(zlib.crc32(buffer.array(extent)) for extent in bucket.extents)
        slot = 1 - self._kept[bucket.number].slot
        self._folder.write(bucket, slot, memoryview(buffer.bytes[: bucket.size]))
        self._written[bucket.number] = Kept(slot, sums)
        self.bytes_written += bucket.size

    # --- arrays -------------------------------------------------------------------------------------------------------

    def _reader(self, bucket: Bucket, k: int) -> Callable[[], Array]:
        """What reads one extent, for a checkpoint or for a look at the state."""
        ours = weakref.ref(self)

        def read() -> Array:
            pages = ours()
            assert pages is not None
            return pages._look(bucket, k)

        return read

    def _look(self, bucket: Bucket, k: int) -> Array:
        """One extent; good until the next one is looked at."""
        buffer = self._here.get(bucket.number)
        if buffer is None:
            if not self._free:  # no pass is under way, so that there is room for one
                self._free.append(Buffer(self._largest))
                self._n_buffers += 1
            buffer = self._free[-1]
            self._folder.check()
            kept, extent = self._written.get(bucket.number, self._kept[bucket.number]), bucket.extents[k]
            start, end = extent.offset // PAGE * PAGE, -(-extent.end // PAGE) * PAGE
            self._folder.read(bucket, kept.slot, memoryview(buffer.bytes[start:end]), start)
            self._verify(bucket, buffer, [k])
        found: Array = buffer.array(bucket.extents[k])
        return found

    def _pairs(self, bucket: Bucket, buffer: Buffer) -> Iterator[tuple[Array, Array]]:
        """The bytes of parameters in a bucket, and those in the caller's arrays."""
        for extent in bucket.extents[bucket.n_state :]:
            mine, at = buffer.array(extent), 0
            starts, arrays = self._starts[extent.group], self._layouts[extent.group].arrays
            first, last = extent.first, extent.first + extent.size
            for i in range(bisect_right(starts, first) - 1, len(arrays)):
                if starts[i] >= last:
                    break
                lo, hi = max(first, starts[i]) - starts[i], min(last, starts[i + 1]) - starts[i]
                theirs = arrays[i].reshape(-1)[lo:hi].view(np.uint8)
                yield mine[at : at + theirs.size], theirs
                at += theirs.size

    def _take(self, bucket: Bucket, buffer: Buffer) -> None:
        """Take the parameters of a bucket, to be written with its state."""
        for mine, theirs in self._pairs(bucket, buffer):
            mine[:] = theirs

    def _put(self, bucket: Bucket, buffer: Buffer) -> None:
        """Put the parameters of a bucket into place."""
        for mine, theirs in self._pairs(bucket, buffer):
            theirs[:] = mine

    def _addresses(self, bucket: Bucket) -> list[tuple[int, int]]:
        found = []
        for _, theirs in self._pairs(bucket, Buffer(1)):
            address = theirs.__array_interface__["data"][0]
            found.append((address, address + theirs.size))
        return found


def partial_list(parts: list[Callable[[], Array]]) -> Callable[[], list[Callable[[], Array]]]:
    return lambda: parts


def _places(bucket: Bucket, buffer: Buffer) -> list[tuple[int, int, int, int]]:
    """Where the state of a bucket is, for the core: (group, number of the array, address, its first item)."""
    return [(x.group, x.number, buffer.address + x.offset, x.first) for x in bucket.extents[: bucket.n_state]]

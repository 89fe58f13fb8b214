"""Passes over buckets, and the memory that they go through.

Each pass reads ahead, gives one bucket after the other, and writes each while the next ones are used, to the slot that
is not in force.  Which buckets stay in memory follows from how many buffers there are.
"""

import contextlib
import mmap
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from .._run.store import CHUNK
from .buckets import PAGE, Bucket, Extent
from .folder import Folder, StoppedError, damaged
from .transfer import Transfer

Array = np.ndarray[Any, Any]
# Buffers through which buckets pass that do not stay: three are read, one is stepped, four are written.  With fewer of
# them, which are larger, the disk waits for checksums: a bucket is read and verified, or summed and written, one after
# the other.
STREAM = 8
_AHEAD = 3  # buckets that are read at a time
_WIPE_ON_FORK = 18  # MADV_WIPEONFORK of Linux, for which mmap has no name


class Kept(NamedTuple):
    """Where a bucket is on disk, and the checksums of its extents."""

    slot: int
    sums: tuple[int, ...]


class Buffer:
    """Memory for a bucket, from the start of a page on.

    It is of large pages where the system has some: a transfer from or to many small ones, which lie anywhere, is cut
    into many more requests, and a disk is slower with them.  Shared memory, the default of `mmap`, has no large pages.
    A forked child gets zeros instead, since the pages that this process goes on to write would otherwise be copied.
    """

    def __init__(self, size: int) -> None:
        memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANON)
        for advice in (mmap.MADV_HUGEPAGE, _WIPE_ON_FORK) if hasattr(mmap, "MADV_HUGEPAGE") else ():
            with contextlib.suppress(OSError):  # a system may be built without them
                memory.madvise(advice)
        self.bytes: Any = np.frombuffer(memory, np.uint8)
        self.address: int = self.bytes.__array_interface__["data"][0]

    def array(self, extent: Extent) -> Any:
        """The bytes of an extent."""
        return self.bytes[extent.offset : extent.end]


class Passes:
    """The buckets of a folder, brought into memory and taken away.

    kept: of each bucket, what is durable.  written: what was written since, by number.
    """

    def __init__(self, folder: Folder, buckets: list[Bucket], kept: list[Kept], memory: int) -> None:
        self.kept, self.written, self.bytes_written = kept, dict[int, Kept](), 0
        self._folder, self._buckets = folder, buckets
        self._here: dict[int, Buffer] = {}  # buckets that stay in memory
        self._free: list[Buffer] = []
        self._n_buffers = 0
        self._largest, n = max((bucket.size for bucket in buckets), default=0), len(buckets)
        self._most = min(memory // max(self._largest, 1), n)
        if self._most < min(3, n):
            raise ValueError(f"state_memory={memory} is too small for the buckets of this state, of {self._largest} "
                             f"bytes: give at least {min(3, n) * self._largest}.  Buckets are cut at multiples of "
                             f"{CHUNK} elements, but not within rows that sum to one, and stay as they were when "
                             "the folder was made")  # fmt: skip
        self._staying = n if self._most == n else max(self._most - STREAM, 0)

    def over(
        self,
        buckets: Sequence[Bucket],
        reads: bool,
        writes: bool,
        report: Callable[[int, int], None] | None = None,
        whole: bool = False,
    ) -> Iterator[tuple[Bucket, Buffer]]:
        """Yield one bucket after another in memory.  What the caller does with it is written afterwards.

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
                if self._folder.stopped:
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

    def leave(self, i: int) -> None:
        """Stop keeping a bucket in memory."""
        if i in self._here:
            self._free.append(self._here.pop(i))

    def close(self) -> None:
        self._here.clear()
        self._free.clear()

    def _buffer(self, bucket: Bucket) -> Buffer | None:
        """The buffer of a bucket, or a free one, or a new one; None if all are in use."""
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
        """After a bucket's turn, keep it in memory, or free its buffer for another one."""
        if bucket.number < self._staying:
            self._here[bucket.number] = buffer
        else:
            self._free.append(buffer)

    def _now(self, bucket: Bucket) -> Kept:
        """Which slot of a bucket is in force, and its checksums."""
        return self.written.get(bucket.number, self.kept[bucket.number])

    def _read(self, bucket: Bucket, buffer: Buffer, whole: bool) -> None:
        """Read a bucket and verify it."""
        size = bucket.size if whole else bucket.state_size
        if not size:
            return
        self._folder.read(bucket, self._now(bucket).slot, memoryview(buffer.bytes[:size]))
        self._verify(bucket, buffer, range(len(bucket.extents) if whole else bucket.n_state))

    def _verify(self, bucket: Bucket, buffer: Buffer, extents: Iterable[int]) -> None:
        """Raise if what was read into a buffer does not have the checksums of the record."""
        sums = self._now(bucket).sums
        for k in extents:
            if zlib.crc32(buffer.array(bucket.extents[k])) != sums[k]:
                raise damaged(self._folder.file(bucket))

    def _write(self, bucket: Bucket, buffer: Buffer) -> None:
        """Write a bucket to the slot that is not in force."""
        if not bucket.size:
            return
        sums = tuple(zlib.crc32(buffer.array(extent)) for extent in bucket.extents)
        slot = 1 - self.kept[bucket.number].slot
        self._folder.write(bucket, slot, memoryview(buffer.bytes[: bucket.size]))
        self.written[bucket.number] = Kept(slot, sums)
        self.bytes_written += bucket.size

    def sync(self) -> None:
        """Make all that was written durable, at the end, because a disk does little else while it syncs."""
        for i in self.written:
            if self._folder.stopped:
                raise StoppedError
            self._folder.sync(self._buckets[i])

    # --- single arrays ------------------------------------------------------------------------------------------------

    def reader(self, bucket: Bucket, k: int) -> Callable[[], Array]:
        """A function that reads one extent, for a checkpoint or for a look at the state."""
        ours = weakref.ref(self)

        def read() -> Array:
            passes = ours()
            assert passes is not None
            return passes._look(bucket, k)

        return read

    def _look(self, bucket: Bucket, k: int) -> Array:
        """Read one extent; it is valid until the next one is read."""
        self._folder.check_process()
        buffer = self._here.get(bucket.number)
        if buffer is None:
            if not self._free:  # no pass is under way, so that there is room for one
                self._free.append(Buffer(self._largest))
                self._n_buffers += 1
            buffer = self._free[-1]
            self._folder.check()
            extent = bucket.extents[k]
            start, end = extent.offset // PAGE * PAGE, -(-extent.end // PAGE) * PAGE
            self._folder.read(bucket, self._now(bucket).slot, memoryview(buffer.bytes[start:end]), start)
            self._verify(bucket, buffer, [k])
        found: Array = buffer.array(bucket.extents[k])
        return found

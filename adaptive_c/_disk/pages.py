"""The state of a run on disk: what is done with its buckets, and what makes that count.

Passes over the buckets write to slots that are not in force; then one small record makes all of it count.  Where
several processes have a part of the run each, they write their records when all have written their buckets.  Passes are
made by threads in which no handler of a signal runs (`Plan.conduct`).
"""

import os
import weakref
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from typing import Any

import numpy as np

from .._run.alone import Alone
from .._run.run import Run
from . import record
from .away import Away
from .buckets import Bucket, buckets_of, cuts_of, spaces_of
from .folder import RECORDS, Folder, told
from .maps import Maps, Slices
from .passes import STREAM, Array, Buffer, Kept, Passes

_LARGEST = 32 << 20  # bytes of a bucket


class Pages:
    """Brings a run's state from disk into memory, bucket by bucket.  The core calls `sweep`, `step` and `rollback`.

    company: the processes that have the other parts of the run; see `Alone`.
    """

    slices = Slices  # of parameters, through which a checkpoint reads and writes them

    def __init__(self, path: Any, memory: int, parameters: bool, company: Alone) -> None:
        self.parameters, self.cuts = parameters, list[int]()
        self._memory, self._company = memory, company
        self._folder = Folder(company.folder(path))
        self._path = os.path.realpath(os.fsdecode(path))
        part = company.part if company.shared else None
        try:
            self._records = [record.read(path, parameters, part) for path in self._folder.records()]
        except BaseException:
            self._folder.close()
            raise
        self._found: record.Found | None = None  # until it is gone on from
        self._origin: record.Origin | None = None
        self._number = -1  # of the record in force
        self._buckets: list[Bucket] = []
        self._passes = Passes(self._folder, [], [], memory)
        self._before: dict[int, Kept] = {}  # what the last record replaced
        self._touched: list[Bucket] = []  # by this pass
        self._uncertain = False  # whether the last record is on disk
        self.ended = False  # nothing goes on from here
        self._recorded = 0  # bytes of records

    @property
    def bytes_written(self) -> int:
        return self._recorded + self._passes.bytes_written

    @property
    def stopped(self) -> bool:
        """Whether the pass that is running must end early, as if it had failed.  The core sets it."""
        return self._folder.stopped

    @stopped.setter
    def stopped(self, stopped: bool) -> None:
        self._folder.stopped = stopped

    # --- the beginning ------------------------------------------------------------------------------------------------

    def allocate(self, n: int, dtype: Any, turn: int = 0) -> Any:
        """Instead of memory for state: an array that knows only its size and how it is read."""
        return Away(n, dtype)

    def lay_out(self, groups: Sequence[Any]) -> None:
        """Cut the state of groups into buckets, before anything is written; if there is a record, as it says."""
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
        found = self._found
        if found is None:
            self.cuts = cuts_of(spaces, min(_LARGEST, self._memory // STREAM))
        elif record.fits(found, groups):
            self.cuts = found.cuts
        else:
            return  # `begin` says what differs
        self._buckets = buckets_of(spaces, self.cuts)
        if found is None:
            kept = [Kept(1, (0,) * len(bucket.extents)) for bucket in self._buckets]
        else:
            sums = iter(found.sums)
            kept = [
                Kept(slot, tuple(next(sums) for _ in bucket.extents))
                for slot, bucket in zip(found.slots, self._buckets, strict=True)
            ]
        self._passes = Passes(self._folder, self._buckets, kept, self._memory)
        if found is None:
            self._create()
        else:
            self._folder.check_sizes(self._buckets)
        parts: dict[tuple[int, str], list[Callable[[], Array]]] = {}
        for bucket in self._buckets:
            for k, extent in enumerate(bucket.extents):
                parts.setdefault((extent.group, extent.name), []).append(self._passes.reader(bucket, k))
        for i, group in enumerate(groups):
            for name, array in group.store.arrays.items():
                array.bind(partial_list(parts.get((i, name), [])))

    def choose(self) -> bool:
        """Choose the state from which the run goes on, and return whether it has parameters."""
        self._found, self._origin = self._company.choose(self._records)
        if self._found is not None:
            self._number = self._found.number
        return self._found is not None and self.parameters

    def _create(self) -> None:
        """Reserve space on the disk for all buckets; if that fails, for none."""
        try:
            with self._company.together("set the space of its state aside"):
                self._folder.create(self._buckets)
        except BaseException:
            self._folder.clear()
            raise

    def begin(self, run: Run) -> None:
        """Write the first record, or go on from the record of the folder.  The caller holds the guard."""
        self._run = weakref.ref(run)
        found, self._found = self._found, None
        if found is None:
            run.plan.conduct(self._first)
        else:
            with self._company.together("gone on from its folder"):
                write = record.prepare(run, found)
                run.plan.conduct(self._bring)
                write()
                for other in self._records:
                    if other.number > found.number:  # another process lacks it
                        self._folder.forget(other.path)
        self._records.clear()
        self._folder.complete()

    def _first(self) -> None:
        """Make the state count that a new optimizer has written."""
        with self._counting():
            pass  # all is written already

    def _bring(self) -> None:
        """Read and verify all buckets, put the parameters into place, and keep the buckets that stay in memory."""
        maps = Maps(self._parameters())
        for bucket, buffer in self._passes.over(self._buckets, True, False, whole=True):
            self._put(bucket, buffer)
            if maps:
                maps.let_go(self._addresses(bucket))

    def _parameters(self) -> list[Any]:
        return [array for layout in self._layouts for array in layout.arrays]

    # --- what the core calls ------------------------------------------------------------------------------------------

    def watch(self, arrays: list[Any]) -> bool:
        """Look for memory maps among the arrays of a call, and return whether there are any."""
        self._maps = Maps(arrays)
        return bool(self._maps)

    def let_go(self, spans: list[tuple[int, int]]) -> None:
        """Give pages of mapped parameters back to the system, at these addresses."""
        self._maps.let_go(spans)

    def sweep(self, visit: Any, reads: bool, writes: bool) -> None:
        """Bring one bucket after another into memory, and have the core visit it, as far as the sweep needs them."""
        if not reads and self._found is not None:
            return  # the first write: it is there already
        wanted = [bucket for bucket in self._buckets if visit.wants(bucket.first, bucket.last)]
        streamed = self.watch(visit.mapped())
        self._touched = []
        for bucket, buffer in self._passes.over(wanted, reads, writes, visit.report):
            self._touched.append(bucket)
            visit(_places(bucket, buffer), bucket.first, bucket.last, streamed)
            if writes:
                self._take(bucket, buffer)
            if streamed:
                self._maps.let_go(visit.spans(bucket.first, bucket.last))

    def step(self, visit: Any, usable: bool) -> None:
        """Make a step, or count one that is skipped.  If it fails, all is put back; if that fails too, the run ends."""
        self._touched = []
        try:
            with self._counting():
                if usable:
                    self.sweep(visit, True, True)
                visit.count()
        except BaseException as error:
            visit.uncount()
            self._recover(visit, error)
            raise

    def rollback(self, visit: Any) -> None:
        """Go back to the slots of the step before."""
        with self.final("a rollback"), self._counting():
            self._passes.written = dict(self._before)
            for i in self._before:
                self._passes.leave(i)
            visit.undo()
            if self.parameters:
                touched = [self._buckets[i] for i in self._before]
                for bucket, buffer in self._passes.over(touched, True, False, whole=True):
                    self._put(bucket, buffer)
            visit.take_back()

    def derive(self, visit: Any) -> None:
        """Form again what is derived from the parameters, after these were replaced."""
        with self.final("a call that replaced the parameters"), self._counting():
            self.sweep(visit, True, True)

    @contextmanager
    def final(self, what: str) -> Iterator[None]:
        """A `with` block that replaces the state.  If it fails, the run can't go on."""
        try:
            yield
        except BaseException as error:
            error.add_note(self._end(f"{what} failed"))
            raise

    def keep(self) -> None:
        """Called before a step that a rollback may undo: forget which slots the last record replaced."""
        self._before = {}

    def load(self, write: Callable[[], None]) -> None:
        """Make a load count.  `write` writes what was loaded; it calls `fill` for the state."""
        with self.final("a load"), self._counting():
            write()

    def fill(self, read: Callable[[int, str, int, Array], None]) -> None:
        """Replace all state.  read(group, name, first item, array) fills the array."""
        for bucket, buffer in self._passes.over(self._buckets, False, True):
            for extent in bucket.extents[: bucket.n_state]:
                dtype = self._owner().groups[extent.group].store.arrays[extent.name].dtype
                read(extent.group, extent.name, extent.first, buffer.array(extent).view(dtype))
            self._take(bucket, buffer)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """A `with` block: what it writes counts, with the run's counts and options, once all of it is on the disks."""
        passes, n = self._passes, self._number + 1
        path = self._folder.name(RECORDS[n % 2 if self._company.shared else 0])
        self._uncertain = False
        with ExitStack() as stack:
            with self._company.together("written its state"):
                yield
                self._folder.check()
                passes.sync()
                kept = [passes.written.get(i, old) for i, old in enumerate(passes.kept)]
                disk = record.disk_of(self.cuts, self.parameters)
                size = record.begin(stack, self._owner(), path, disk, kept, self._origin, n)
            before = record.identity(path)
            try:
                with self._company.together("put its record into place"), told(path, "written"):
                    stack.close()
            except BaseException:
                self._uncertain = self._company.shared or record.identity(path) != before
                raise
        self._number, self._recorded = n, self._recorded + size
        self._before = {i: passes.kept[i] for i in passes.written}
        passes.kept, passes.written = kept, {}

    def close(self) -> None:
        """Release the folder's lock and the buffers."""
        self._folder.close()
        self._passes.close()

    # --- failures -----------------------------------------------------------------------------------------------------

    def _recover(self, visit: Any, error: BaseException) -> None:
        """After a step that failed: put back what it has changed; if that is impossible, end the run."""
        if self._uncertain:
            self._end("it is not known whether the last step is on disk")
            error.add_note(
                "all was stepped, but it is not known whether the step is on disk: a new optimizer with this "
                "state_path starts from what is there"
            )
            return
        self._passes.written = {}
        for bucket in self._touched:
            self._passes.leave(bucket.number)
        try:
            if not self._company.any(bool(self._touched)):
                error.add_note("nothing was changed by this step")
            elif not (visit.keeps() or self.parameters):
                self._end("a step failed when a part of the parameters was stepped")
                error.add_note(f"{len(self._touched)} of {len(self._buckets)} buckets of the parameters are stepped, "
                               "the others not: put those of the last whole step back, and construct a new optimizer "
                               "with this state_path.  With state_parameters=True or keep_undo=True they are put "
                               "back by themselves")  # fmt: skip
            else:
                with self._company.together("put its parameters back"):
                    self._put_back(visit)
                error.add_note("parameters and state are as they were before this step" if visit.keeps() else
                               "parameters and state are as the last step left them; what you have assigned to "
                               "parameters since then is undone, too")  # fmt: skip
        except BaseException:
            self._end("a step failed, and the parameters could not be put back")
            error.add_note("the parameters could not be put back")

    def _put_back(self, visit: Any) -> None:
        """Put back the parameters that were stepped, and their copies."""
        if visit.keeps():
            visit.undo()
            return
        self.stopped = False
        if not self._touched:  # by this process; its folder may be gone
            return
        for bucket, buffer in self._passes.over(self._touched, True, False, whole=True):
            self._put(bucket, buffer)
            visit.copy(_places(bucket, buffer), bucket.first, bucket.last)

    def _end(self, why: str) -> str:
        """End the run, free the folder for another optimizer, and return what to say about it."""
        text = (f"this optimizer can't go on: {why}.  Its folder holds the last whole step: construct a new optimizer "
                f"with state_path={self._path!r}, over the parameters of that step")  # fmt: skip
        self._owner().plan.end(text)
        self.ended = True
        self.close()
        return text

    def _owner(self) -> Run:
        """The run whose state this is."""
        run = self._run()
        assert run is not None  # it makes this call
        return run

    # --- parameters ---------------------------------------------------------------------------------------------------

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
        """Copy the parameters of a bucket into its buffer, to be written with its state."""
        for mine, theirs in self._pairs(bucket, buffer):
            mine[:] = theirs

    def _put(self, bucket: Bucket, buffer: Buffer) -> None:
        """Copy the parameters of a bucket from its buffer into the caller's arrays."""
        for mine, theirs in self._pairs(bucket, buffer):
            theirs[:] = mine

    def _addresses(self, bucket: Bucket) -> list[tuple[int, int]]:
        """Where in memory the bucket's parameters begin and end."""
        found = []
        for _, theirs in self._pairs(bucket, Buffer(1)):
            address = theirs.__array_interface__["data"][0]
            found.append((address, address + theirs.size))
        return found


def partial_list(parts: list[Callable[[], Array]]) -> Callable[[], list[Callable[[], Array]]]:
    """A function without arguments that returns these parts."""
    return lambda: parts


def _places(bucket: Bucket, buffer: Buffer) -> list[tuple[int, int, int, int]]:
    """Where the state of a bucket is, for the core: (group, number of the array, address, its first item)."""
    return [(x.group, x.number, buffer.address + x.offset, x.first) for x in bucket.extents[: bucket.n_state]]

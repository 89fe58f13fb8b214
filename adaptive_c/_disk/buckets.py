"""How the state of a run is cut into buckets, and what lies where in one.

A bucket has all state of a range of positions.  Arrays lie in it one after the other, the parameters last, from the
start of a page on.  Everything here follows from the groups and the cuts, and so does not need to be stored.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise
from typing import Any, NamedTuple

from .._run.store import BLOCK, CHUNK

PAGE = 4096  # bytes: to multiples of it a system reads and writes without a copy
_LINE = 64
_LARGE = 1 << 16  # bytes from which on it counts at which place of a page an array begins


class Extent(NamedTuple):
    """A part of one flat array, in a bucket."""

    group: int
    name: str  # "params" for the parameters
    number: int  # in the core; -1 for the parameters
    first: int  # item, counted from the beginning of the group
    size: int  # items
    itemsize: int
    offset: int  # bytes, in the bucket

    @property
    def nbytes(self) -> int:
        return self.size * self.itemsize

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


class Bucket(NamedTuple):
    """A range of positions, and where its state and its parameters lie in the bucket's file."""

    number: int
    first: int  # position
    last: int
    extents: tuple[Extent, ...]
    n_state: int  # of these are state
    state_size: int  # bytes, whole pages
    size: int  # with the parameters


class Flat(NamedTuple):
    """A flat array of a group: its name, and how its numbers belong to elements."""

    name: str
    number: int
    itemsize: int
    per: int  # elements of the parameter space for one item


class Space(NamedTuple):
    """A group as buckets see it: the elements whose state this process holds, and their flat arrays."""

    position: int  # of the first of them
    start: int  # its number in the group
    size: int
    flats: list[Flat]
    cuts_row: Callable[[int], bool]


def cuts_of(spaces: Sequence[Space], target: int) -> list[int]:
    """The positions between buckets, the first and the last one of all included.

    Buckets have at most `target` bytes, if that is enough for a chunk and for rows that must not be cut.
    """
    spaces = [space for space in spaces if space.size]
    target -= 2 * PAGE  # at most, to the ends of the state and of the bucket
    cuts, room = [spaces[0].position if spaces else 0], target
    for space in spaces:
        at, end = 0, -(-space.size // CHUNK) * CHUNK
        cost = sum(flat.itemsize * CHUNK // flat.per for flat in space.flats)
        gaps = sum(PAGE if space.size * x.itemsize // x.per >= _LARGE else _LINE for x in space.flats)  # at most
        room -= gaps
        while at < end:
            chunks = room // cost if cost else end // CHUNK
            if chunks < 1 and cuts[-1] < space.position + at:
                cuts.append(space.position + at)
                room = target - gaps
                continue
            stop = min(at + max(chunks, 1) * CHUNK, end)
            if stop < end:
                stop = _between_rows(space, at, stop, end)
            room -= (stop - at) // CHUNK * cost
            at = stop
            if at < end:
                cuts.append(space.position + at)
                room = target - gaps
    return [*cuts, _end(spaces[-1]) if spaces else 0]


def _end(space: Space) -> int:
    """The position after the last element."""
    return space.position + -(-space.size // CHUNK) * CHUNK


def _between_rows(space: Space, at: int, stop: int, end: int) -> int:
    """The last place up to `stop` that cuts no row which is to sum to one; if there is none, the first one after it."""
    for place in chain(range(stop, at, -CHUNK), range(stop + CHUNK, end, CHUNK)):
        if not space.cuts_row(space.start + place):
            return place
    return end


def buckets_of(spaces: Sequence[Space], cuts: Sequence[int]) -> list[Bucket]:
    """The buckets between these cuts."""
    starts = [space.position for space in spaces]
    return [_bucket(i, first, last, spaces, starts) for i, (first, last) in enumerate(pairwise(cuts))]


def _bucket(number: int, first: int, last: int, spaces: Sequence[Space], starts: list[int]) -> Bucket:
    """The bucket of the positions from `first` to `last`: its extents are laid out one after another."""
    state: list[Extent] = []
    parameters: list[Extent] = []
    end = 0
    for i, space, lo, hi in _groups(first, last, spaces, starts):
        for turn, flat in enumerate(space.flats):
            if flat.name != "params":
                end = _start(end, (hi - lo) * flat.itemsize // flat.per, turn)
                state.append(_extent(i, flat, space.start, lo, hi, end))
                end = state[-1].end
    state_size = end = -(-end // PAGE) * PAGE
    for i, space, lo, hi in _groups(first, last, spaces, starts):
        for flat in space.flats:
            if flat.name == "params":
                parameters.append(_extent(i, flat, space.start, lo, hi, _start(end, 0, 0)))
                end = parameters[-1].end
    size = -(-end // PAGE) * PAGE
    return Bucket(number, first, last, (*state, *parameters), len(state), state_size, size)


def _groups(first: int, last: int, spaces: Sequence[Space], starts: list[int]) -> Iterator[tuple[int, Space, int, int]]:
    """Each group that has elements between two positions, and the range of these elements."""
    for i in range(max(bisect_right(starts, first) - 1, 0), len(spaces)):
        space = spaces[i]
        if space.position >= last:
            break
        lo, hi = max(first - space.position, 0), min(last - space.position, space.size)
        if lo < hi:
            yield i, space, lo, hi


def _extent(group: int, flat: Flat, start: int, lo: int, hi: int, offset: int) -> Extent:
    """The part of a flat array that belongs to the elements from `lo` to `hi` of a group."""
    first = (start + lo) // flat.per
    return Extent(group, flat.name, flat.number, first, -(-(start + hi) // flat.per) - first, flat.itemsize, offset)


def _start(end: int, size: int, turn: int) -> int:
    """Where the next array begins: on a cache line and, if it is large, each at another place of a page.

    Otherwise the loads of one array would wait for recent stores to another; see `adaptive_c._run.store.zeros`.
    """
    if size < _LARGE:
        return -(-end // _LINE) * _LINE
    return end + (704 * turn - end) % PAGE


def spaces_of(groups: Sequence[Any], parameters: bool) -> list[Space]:
    """The groups as buckets see them.  parameters: whether the buckets have the parameters, too."""
    found, position = [], 0
    for group in groups:
        store = group.store
        flats = [
            Flat(name, group.bound.flat_number(name), array.itemsize, BLOCK if name.endswith("_scale") else 1)
            for name, array in store.arrays.items()
            if name != "sums"
        ]
        if parameters:
            flats.append(Flat("params", -1, group.layout.arrays[0].itemsize, 1))
        before = -(-store.start // CHUNK) * CHUNK  # what other processes have is whole chunks, or all there is
        found.append(Space(position + before, store.start, store.size, flats, group.bound.cuts_row))
        position += -(-group.bound.size // CHUNK) * CHUNK
    return found

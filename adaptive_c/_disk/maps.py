"""Memory maps among the arrays of a call: what was swept over is let go, so that no more of them stays resident."""

import mmap
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

_SLICE = 1 << 20  # elements


class Maps:
    """The maps that lie under some arrays, if they are maps of files whose pages the system can read again."""

    def __init__(self, arrays: list[Any]) -> None:
        found = {}
        for array in arrays:
            if (map_ := _map_of(array)) is not None:
                raw = np.frombuffer(map_, np.uint8)
                found[raw.__array_interface__["data"][0]] = map_, raw.size
        self._maps = sorted((start, size, map_) for start, (map_, size) in found.items())
        self._starts = [start for start, _, _ in self._maps]

    def __bool__(self) -> bool:
        return bool(self._maps)

    def let_go(self, spans: list[tuple[int, int]]) -> None:
        """Take the pages of spans of memory, (first address, address after the last), out of this process.

        What was written stays in the system's own memory, from where it reaches the file.
        """
        for low, high in spans:
            i = bisect_right(self._starts, low) - 1
            if i < 0 or low == high:
                continue
            start, size, map_ = self._maps[i]
            if high <= start + size:
                first = (low - start) // mmap.PAGESIZE * mmap.PAGESIZE
                map_.madvise(mmap.MADV_DONTNEED, first, high - start - first)


class Slices:
    """A flat array, slice by slice; each is let go when the next one is asked for."""

    def __init__(self, array: Any) -> None:
        self.size, self.itemsize = int(array.size), int(array.itemsize)
        self._array, self._maps = array, Maps([array])

    def __iter__(self) -> Iterator[Any]:
        for first in range(0, self.size, _SLICE):
            part = self._array[first : first + _SLICE]
            yield part
            address = part.__array_interface__["data"][0]
            self._maps.let_go([(address, address + part.nbytes)])

    def parts(self) -> list[Callable[[], Any]]:
        """Functions that return one slice each, as bytes.  One more function lets the last slice go."""
        slices = iter(self)
        return [lambda: next(slices, self._array[:0]).view(np.uint8)] * (-(-self.size // _SLICE) + 1)


def _map_of(array: Any) -> mmap.mmap | None:
    """The map that an array is a view of; None where writing to it may not change the file."""
    mode = None
    while isinstance(array, np.ndarray):
        mode = getattr(array, "mode", mode)
        array = array.base
    return array if isinstance(array, mmap.mmap) and mode in ("r", "r+", "w+") else None

"""Memory maps among the arrays of a step: what was swept over is let go, so that no more of them stays resident."""

import mmap
from bisect import bisect_right
from typing import Any

import numpy as np


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
        """Let the pages of spans of memory, (first address, the one after the last), leave this process.

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


def _map_of(array: Any) -> mmap.mmap | None:
    """The map that an array is a view of; none if writing to it does not change the file, or nobody knows."""
    mode = None
    while isinstance(array, np.ndarray):
        mode = getattr(array, "mode", mode)
        array = array.base
    return array if isinstance(array, mmap.mmap) and mode in ("r", "r+", "w+") else None

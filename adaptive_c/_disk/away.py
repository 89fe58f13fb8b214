"""What stands for an array that is not in memory."""

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Away:
    """A flat array on disk: how long it is, and how it is read."""

    def __init__(self, n: int, dtype: Any) -> None:
        self.size, self.dtype = n, np.dtype(dtype)
        self.itemsize, self.nbytes = self.dtype.itemsize, n * self.dtype.itemsize
        self._parts: Callable[[], list[Callable[[], Array]]] = list

    def bind(self, parts: Callable[[], list[Callable[[], Array]]]) -> None:
        """parts: returns functions that read one part each, as bytes; a part is valid until the next one is read."""
        self._parts = parts

    def parts(self) -> list[Callable[[], Array]]:
        """Functions that read the array part by part, in order."""
        return self._parts()

    def read(self) -> Array:
        """Read the whole array into a read-only copy, which can't be mistaken for the state itself."""
        found, at = np.empty(self.size, self.dtype), 0
        raw = found.view(np.uint8)
        for part in self._parts():
            memory = part()
            raw[at : at + memory.size] = memory
            at += memory.size
        found.flags.writeable = False
        return found

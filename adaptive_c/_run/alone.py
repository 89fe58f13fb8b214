"""The processes that share a run: one.  `adaptive_c.mpi` has the counterpart for several."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Alone:
    """A process that has a run, and the folder of its state, for itself."""

    part = 0, 1  # which of how many processes it is
    shared = False
    combine: Any = None  # completes a reduction by what the others have found

    def compare(self, run: Any, groups: Any, pages: Any) -> None:
        """Raise if what was checked differs between the processes.  Nothing has been written yet."""
        if pages is not None:
            pages.choose()

    def together(self, what: str) -> AbstractContextManager[None]:
        """A `with` block that all processes enter: an error of one of them is raised by all at its end."""
        return nullcontext()

    def any(self, here: bool) -> bool:
        """Whether a condition holds in any process."""
        return here

    def folder(self, path: Any) -> Any:
        """The folder of this process's state.  path: the option `state_path`."""
        return path

    def choose(self, found: list[Any]) -> tuple[Any, Any]:
        """Of the records in its folder the one that counts, if one does; and which run its state is of, if others
        have parts of it."""
        return (found[0] if found else None), None

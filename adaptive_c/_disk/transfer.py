"""A call that a thread of its own makes, while the one that asked for it goes on."""

import _thread
from collections.abc import Callable
from typing import Any


def _nothing() -> None:
    """What a thread calls that has nothing to do."""


class Transfer:
    """Make a call beside this thread.  Nothing waits for it when Python ends."""

    def __init__(self, call: Callable[..., None], *args: Any) -> None:
        self.finished = False
        self._call: tuple[Callable[..., None], tuple[Any, ...]] = call, args
        self._error: BaseException | None = None
        self._lock = _thread.allocate_lock()
        self._lock.acquire()
        try:
            _thread.start_new_thread(self._run, ())
        except RuntimeError:  # while Python ends there are no new threads
            self._run()

    def _run(self) -> None:
        """Make the call on the thread, and keep its error for whoever waits."""
        call, args = self._call
        try:
            call(*args)
        except BaseException as error:
            self._error = error
        self._call = _nothing, ()  # what it refers to may go
        self.finished = True
        self._lock.release()

    def end(self) -> BaseException | None:
        """Wait for its end, and return the error that it raised, if it raised one."""
        with self._lock:
            error, self._error = self._error, None
            return error

    def wait(self) -> None:
        """Wait for its end, and raise what it raised."""
        error = self.end()
        if error is not None:
            raise error

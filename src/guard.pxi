# The guard: who may touch a run now?  It is taken first, before a schedule or any other code of the caller is called.
#
# All of it runs under the GIL, and each change of the holder is made in one call of C, between whose lines Python runs
# neither signal handlers nor other threads.  While it is held, its thread computes in the default
# floating-point mode.

cdef enum Holder:
    FREE        # nothing is going on
    STEPPING    # a call of the core: step, accumulate, rollback ...
    HELD        # Python code in a `with` block: a save, a load, a new group
    AVERAGED    # a `with` block in which the averages are in the parameters' place
    ARRAYWISE   # a `with` block that steps array by array
    ENDED       # no call can take it any more


cdef class Guard:
    """Shared by a plan and its groups; ``with guard:`` holds it."""
    cdef Holder holder
    cdef Holder rest     # what it goes back to: FREE, or the block that is open, whatever else goes on in it
    cdef uint64_t mode   # the floating-point mode of the thread that holds it, as it was
    cdef str why         # it ended

    cdef int take(self, Holder holder, Holder block=FREE) except -1:
        """RuntimeError if somebody has it.  block: it may be taken inside this one, too."""
        if self.holder == FREE or self.holder == block:
            self.holder, self.mode = holder, enter_mode(False)
            return 0
        if self.holder == AVERAGED:
            raise RuntimeError("not inside averaged_parameters(), where the parameters are their averages: leave the "
                               "block first")
        if self.holder == ARRAYWISE:
            raise RuntimeError("not inside stepping(), whose arrays all take the same step: leave the block first")
        if self.holder == ENDED:
            raise RuntimeError(self.why)
        raise RuntimeError("this optimizer is in use: another call (step, save, load or the like) has not ended.  From "
                           "another thread: use a lock, or give each thread an optimizer of its own.  From a schedule "
                           "or a signal handler: set a flag, and act on it after the step.  In a forked child: the "
                           "parent was inside a call when it forked; construct a new optimizer")

    cdef void release(self) noexcept:
        leave_mode(self.mode, False)
        self.holder = self.rest

    cdef void leave(self, Holder block) noexcept:
        """At the end of a block, while it or a call inside it holds the guard."""
        self.rest = FREE
        if self.holder == block:
            self.holder = FREE

    cdef void end(self, str why) noexcept:
        """Once it is released, no call can take it any more."""
        self.rest, self.why = ENDED, why

    @property
    def ended(self):
        return self.holder == ENDED

    def __enter__(self):
        self.take(HELD)

    def __exit__(self, *error):
        self.release()

    @property
    def inside(self):
        """``with guard.inside:`` holds it, too, also inside a block in which averages are in the parameters' place."""
        return Inside(self)


cdef class Inside:
    cdef Guard guard

    def __init__(self, Guard guard):
        self.guard = guard

    def __enter__(self):
        self.guard.take(HELD, AVERAGED)

    def __exit__(self, *error):
        self.guard.release()

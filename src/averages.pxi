# Exchanging parameters and their averages.

from cpython.bytearray cimport PyByteArray_AS_STRING


cdef void swap(char* a, char* b, Py_ssize_t size) noexcept:
    cdef char spare[4096]
    cdef Py_ssize_t n
    while size > 0:
        n = min(size, 4096)
        memcpy(spare, a, n)
        memcpy(a, b, n)
        memcpy(b, spare, n)
        a, b, size = a + n, b + n, size - n


cdef Py_ssize_t held(Plan plan, const Group* group, const Array* a, Py_ssize_t* start) noexcept:
    """How many elements of an array have their average in this process; start: the first of them."""
    start[0] = min(max(a.start, plan.low - group.position), a.stop)
    return max(min(a.stop, plan.high - group.position) - start[0], 0)


cdef exchange(Plan plan, bint entering):
    """Exchange parameters and averages.

    Parameters that are narrow are saved apart, since an average is not narrow; so are those whose averages are not in
    memory, where these stay as they are.
    """
    cdef Group* group
    cdef Array* a
    cdef Py_ssize_t i, j, n, size, start, at
    saved = iter(plan.saved)
    for i in range(plan.space.n_groups):
        group = plan.space.groups[i]
        size = native_itemsize(group)
        for j in range(group.n_arrays if group.ema != NULL else 0):
            a = group.arrays + j
            n = held(plan, group, a, &start)
            at = start - a.start
            if not saves_apart(group):
                swap(a.p + at * size, group.ema + start * size, n * size)
                continue
            carry(a.p + at * parameter_itemsize(group), PyByteArray_AS_STRING(next(saved)),
                  n * parameter_itemsize(group), not entering)
            if entering and not group.away:
                narrow(group.format, n, a.p, at, <float*> group.ema + start)
    if entering and plan.pages is not None:
        plan.sweep_all(AVERAGE)


cdef inline bint saves_apart(const Group* group) noexcept:
    return group.ema != NULL and (group.format != NATIVE or group.away)


cdef class Averages:
    """``with plan.averages():`` the parameters are their averages.  Whatever happens, they are back at the end."""
    cdef Plan plan

    def __cinit__(self, Plan plan):
        self.plan = plan

    def __enter__(self):
        cdef Group* group
        cdef Py_ssize_t i, j, start
        cdef Guard guard = self.plan.guard
        guard.take(AVERAGED)
        try:
            bring_up(self.plan)
            self.plan.saved = []
            for i in range(self.plan.space.n_groups):
                group = self.plan.space.groups[i]
                for j in range(group.n_arrays if saves_apart(group) else 0):
                    self.plan.saved.append(bytearray(parameter_itemsize(group)
                                                     * held(self.plan, group, group.arrays + j, &start)))
            guard.rest = AVERAGED
            try:
                exchange(self.plan, True)
                raise_late_alone(self.plan)
            except BaseException:  # averages could not be read, or a signal came meanwhile
                exchange(self.plan, False)
                self.plan.saved, guard.rest = None, FREE
                raise
        finally:
            guard.release()

    def __exit__(self, *error):
        exchange(self.plan, False)  # also while another thread accumulates: it copies, whatever the mode
        self.plan.saved = None
        self.plan.guard.leave(AVERAGED)

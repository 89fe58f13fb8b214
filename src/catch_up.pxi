# rows="exact": bringing rows up to date, all of an array's or some, before they are read or the log is at its end.

cdef str CAUGHT_UP = "rows that had missed steps were brought up to date after the last one"


cdef bint any_lags(Plan plan) noexcept:
    """Have rows of any group missed steps?"""
    cdef Py_ssize_t i
    for i in range(plan.space.n_groups):
        if lags(plan.space.groups[i]):
            return True
    return False


cdef int bring_up(Plan plan) except -1:
    """Replay what rows have missed, on all of them.  A step made before can't be undone then."""
    cdef Group* group
    cdef Py_ssize_t i, j
    if any_lags(plan):
        plan.sweep_all(CATCH_UP)
        plan.lose_step(CAUGHT_UP)
        for i in range(plan.space.n_groups):
            group = plan.space.groups[i]
            for j in range(group.n_arrays):
                if group.arrays[j].behind != NULL:
                    group.arrays[j].behind.n = 0
    return 0


cdef int bring_up_rows(Plan plan, BoundGroup bound, Py_ssize_t i, indices) except -1:
    cdef Group* group = &bound.group
    cdef Array* a = group.arrays + i
    cdef Py_buffer view
    cdef Py_ssize_t k = checked(indices, "indices", INTEGERS, &view)
    if a.ndim == 0:
        raise ValueError(f"{bound.name(i)} has no dimensions, and so no rows")
    a.touched = bind_indices(bound, i, False, indices, view.buf, view.itemsize, k, NULL, NULL)
    if a.behind == NULL or a.behind.n == 0:
        return 0
    expect_gradients(group, False)
    a.g, a.g_format = <const char*> a.touched, NATIVE  # any address says that it takes part
    group.by_rows = plan.space.by_rows = True
    plan.lose_step(CAUGHT_UP)
    bring_up_touched(plan, group, a)
    return 0


cdef int bring_up_touched(Plan plan, const Group* group, Array* a) except -1:
    """Those rows of an array that the gradient, or what stands for it, has."""
    cdef Py_ssize_t j
    plan.run(CATCH_UP, a.touched.n * a.touched.length, group.position + a.start, group.position + a.stop)
    for j in range(a.touched.n):
        a.behind.done[a.touched.rows[j]] = a.behind.made
    return 0


cdef int prepare(Plan plan, Group* group, Py_ssize_t j) except -1:
    """Before an array is stepped under rows="exact"."""
    cdef Array* a = group.arrays + j
    cdef bint by_rows, all_rows = a.touched == NULL
    if a.behind != NULL and a.behind.n > 0 and (all_rows or a.behind.n == LOGGED or group.options.sum_to_one):
        all_rows = all_rows or a.behind.n == LOGGED
        if all_rows:
            by_rows, plan.space.by_rows = plan.space.by_rows, False
            plan.run(CATCH_UP, a.stop - a.start, group.position + a.start, group.position + a.stop)
            plan.space.by_rows, a.behind.n = by_rows, 0
        else:  # in the step's own sweep, two threads may have parts of one row
            bring_up_touched(plan, group, a)
        if plan.guard.rest == ARRAYWISE and group.undo != NULL:
            keep_again(group, a)
        else:
            plan.lose_step(CAUGHT_UP)
    if a.touched != NULL:
        expect_rows(a)
    return 0


cdef int prepare_group(Plan plan, Group* group) except -1:
    cdef Py_ssize_t j
    for j in range(group.n_arrays):
        if group.arrays[j].g != NULL:
            prepare(plan, group, j)
    return 0


cdef int forget_missed(Plan plan) noexcept:
    cdef Group* group
    cdef Py_ssize_t i, j
    for i in range(plan.space.n_groups):
        group = plan.space.groups[i]
        for j in range(group.n_arrays):
            forget_past(group.arrays + j)
    return 0


cdef int finish_rows(Plan plan, Py_ssize_t work, Py_ssize_t first, Py_ssize_t last) except -1:
    """After the sweep of a step: rows that several pieces have are to sum to one, too."""
    cdef const Group* group
    cdef Py_ssize_t i, j, longest = 0
    for i in range(plan.space.n_groups):
        group = plan.space.groups[i]
        for j in range(group.n_arrays if group.options.sum_to_one else 0):
            longest = max(longest, row_length(group.arrays + j))
    if longest > 1:  # at most one row in each piece
        plan.run(FINISH, work // BLOCK * min(longest, BLOCK), first, last)
    return 0

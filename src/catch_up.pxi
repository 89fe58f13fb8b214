# rows="exact": bringing rows up to date, all of an array's or some, before they are read or the log is at its end.


cdef int bring_up(Plan plan) except -1:
    """Replay what rows have missed, on all of them.  A step made before can't be undone then."""
    cdef Group* group
    cdef Py_ssize_t i, j
    cdef bint behind = False
    for i in range(plan.space.n_groups):
        group = plan.space.groups[i]
        for j in range(group.n_arrays):
            behind |= group.arrays[j].behind != NULL and group.arrays[j].behind.n > 0
    if behind:
        plan.sweep_all(CATCH_UP)
        plan.undoable = False
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
    cdef Py_ssize_t j, k = checked(indices, "indices", INTEGERS, &view)
    if a.ndim == 0:
        raise ValueError(f"{bound.name(i)} has no dimensions, and so no rows")
    a.touched = bind_indices(bound, i, False, indices, view.buf, view.itemsize, k, NULL, NULL)
    if a.behind == NULL or a.behind.n == 0:
        return 0
    expect_gradients(group)
    a.g, a.g_format = <const char*> a.touched, NATIVE  # any address says that it takes part
    group.by_rows = plan.space.by_rows = True
    plan.undoable = False
    plan.run(CATCH_UP, a.touched.n * a.touched.length, group.position + a.start, group.position + a.stop)
    for j in range(a.touched.n):
        a.behind.done[a.touched.rows[j]] = a.behind.made
    return 0


cdef int prepare(Plan plan, Group* group, Py_ssize_t j) except -1:
    """Before an array is stepped under rows="exact"."""
    cdef Array* a = group.arrays + j
    cdef bint by_rows
    if a.behind != NULL and a.behind.n > 0 and (a.touched == NULL or a.behind.n == LOGGED):
        by_rows, plan.space.by_rows = plan.space.by_rows, False  # all rows
        plan.run(CATCH_UP, a.stop - a.start, group.position + a.start, group.position + a.stop)
        plan.space.by_rows, a.behind.n = by_rows, 0
        if plan.guard.rest == ARRAYWISE and group.undo != NULL:
            keep_again(group, a)
        else:
            plan.undoable = False
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

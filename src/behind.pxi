# rows="exact": steps that rows have missed are logged, and replayed on a row before it is stepped again.

cdef enum:
    LOGGED = 4096            # steps: when so many are logged, all rows are brought up to date


cdef bint lags(const Group* group) noexcept:
    """Have rows of a group missed steps?"""
    cdef Py_ssize_t i
    for i in range(group.n_arrays):
        if group.arrays[i].behind != NULL and group.arrays[i].behind.n > 0:
            return True
    return False


cdef int forget_past(Array* a) noexcept:
    """Drop what rows have missed."""
    if a.behind != NULL:
        free(a.behind.done)
        free(a.behind.log)
        free(a.behind.kept)
        free(a.behind)
        a.behind = NULL
    return 0


cdef int expect_rows(Array* a) except -1:
    """Before a step by rows: room for what it will note."""
    cdef Behind* behind = a.behind
    if behind == NULL:
        behind = a.behind = <Behind*> calloc(1, sizeof(Behind))
        if behind == NULL:
            raise MemoryError()
        behind.length = a.touched.length
    if behind.done == NULL:
        behind.done = <long long*> calloc(a.shape[0] + 1, sizeof(long long))
    if behind.n == behind.room:
        memory = realloc(behind.log, 2 * (behind.room + 8) * sizeof(Past))
        if memory != NULL:
            behind.log, behind.room = <Past*> memory, 2 * (behind.room + 8)
    if behind.done == NULL or behind.n == behind.room:
        raise MemoryError()
    return 0


cdef int note_past(const Group* group, Array* a, const Step* step, double factor) noexcept:
    """After a step of an array, by rows: these are up to date, and the others have missed it."""
    cdef Behind* behind = a.behind
    cdef Past* past = behind.log + behind.n
    cdef Py_ssize_t i
    past.options, past.step, past.zero = group.options, step[0], factor * 0.0
    memcpy(past.keys, group.keys, sizeof(past.keys))
    behind.n += 1
    behind.made += 1
    for i in range(a.touched.n):
        behind.done[a.touched.rows[i]] = behind.made
    return 0


cdef int keep_past(Array* a) except -1:
    """Before a step by rows, for a rollback."""
    cdef Behind* behind = a.behind
    cdef Py_ssize_t i, n = a.touched.n
    if behind.kept_room < n:
        memory = realloc(behind.kept, 2 * n * sizeof(Py_ssize_t))
        if memory == NULL:
            raise MemoryError()
        behind.kept, behind.kept_room = <Py_ssize_t*> memory, n
    for i in range(a.touched.n):
        behind.kept[2 * i] = a.touched.rows[i]
        behind.kept[2 * i + 1] = behind.done[a.touched.rows[i]]
    behind.n_kept, behind.log_kept = n, behind.n
    return 0


cdef int restore_past(Array* a) noexcept:
    cdef Behind* behind = a.behind
    cdef Py_ssize_t i
    if behind != NULL and behind.n_kept >= 0:
        for i in range(behind.n_kept):
            behind.done[behind.kept[2 * i]] = behind.kept[2 * i + 1]
        behind.made -= behind.n - behind.log_kept
        behind.n = behind.log_kept
    return 0

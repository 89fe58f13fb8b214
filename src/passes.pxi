# What the sweep does beside a step: gradients are added to sums, and what a step is about to overwrite is kept so that
# it can be undone.  These passes know of neither rules nor options, and cost what memory costs.

cdef enum:
    KEPT = 2 * SLOTS + 2     # flat arrays of a group: state and its scales, the master copy, the average

cdef struct Undo:            # a group as it was before the last step
    char* live[KEPT]         # the arrays; NULL where a group has none
    char* kept[KEPT]         # what was in them
    Py_ssize_t itemsize[KEPT]
    Py_ssize_t per[KEPT]     # elements of one item
    char* p                  # the parameters in the order of the parameter space
    char* copies             # and what copy_to had of them
    uint8_t* stepped         # of each array: did it take part?  A chunk without such an array is left out
    uint8_t* started
    long long* t
    double* product          # NULL but for NAdam


cdef void add_segment(const Space* space, const Group* group, const Array* a, floating* s, Py_ssize_t at, Py_ssize_t n,
                      bint first) noexcept nogil:
    """Elements at .. at+n-1 of array a's gradient, added to their sums s, or to nothing if they are the first."""
    cdef floating widened[CHUNK]
    cdef const floating* g = <const floating*> a.g + at
    if a.g_format != NATIVE:
        if first:
            widen(a.g_format, n, s, a.g, at)
        else:
            widen(a.g_format, n, widened, a.g, at)
            add(n, s, widened)
    elif first:
        memcpy(s, g, n * sizeof(floating))
    else:
        add(n, s, g)
    if space.zero_grad:
        memset(<char*> a.g + at * gradient_itemsize(group, a), 0, n * gradient_itemsize(group, a))


cdef void add_elements(const Space* space, const Group* group, Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    cdef Py_ssize_t stop, index = first_array(space, group, start)
    cdef const Array* a
    cdef bint first
    while start < end:
        a = space.arrays + index
        stop = min(a.stop, end)
        if a.g_format != NATIVE or space.zero_grad:  # what goes through a buffer, or is written again, stays in cache
            stop = min(stop, start + CHUNK)
        if a.g != NULL and stop > start:
            first = not group.summed[index - group.first]
            if group.wide:
                add_segment(space, group, a, <double*> group.sums + start, start - a.start, stop - start, first)
            else:
                add_segment(space, group, a, <float*> group.sums + start, start - a.start, stop - start, first)
        start = stop
        index += start == a.stop


cdef void carry(char* live, char* kept, Py_ssize_t size, bint back) noexcept nogil:
    if back:
        memcpy(live, kept, size)
    else:
        memcpy(kept, live, size)


cdef void move_elements(const Space* space, const Group* group, Py_ssize_t start, Py_ssize_t end,
                        bint back) noexcept nogil:
    """All that a group holds for elements start .. end-1, whole chunks or up to its end."""
    cdef const Undo* undo = group.undo
    cdef Py_ssize_t low, stop, index = first_array(space, group, start)
    cdef Py_ssize_t p_size = parameter_itemsize(group), copy_size = 4 if group.copy_format == FLOAT32 else 2
    cdef const Array* a
    cdef int i
    for i in range(KEPT):
        if undo.live[i] != NULL:
            low = start // undo.per[i] * undo.itemsize[i]
            stop = (end + undo.per[i] - 1) // undo.per[i] * undo.itemsize[i]
            carry(undo.live[i] + low, undo.kept[i] + low, stop - low, back)
    while start < end:
        a = space.arrays + index
        stop = min(a.stop, end)
        carry(a.p + (start - a.start) * p_size, undo.p + start * p_size, (stop - start) * p_size, back)
        if group.copy_format != NATIVE:
            carry(a.copy + (start - a.start) * copy_size, undo.copies + start * copy_size, (stop - start) * copy_size,
                  back)
        start = stop
        index += 1


cdef Py_ssize_t parameter_itemsize(const Group* group) noexcept nogil:
    return 2 if group.format != NATIVE else (8 if group.wide else 4)


cdef bint taking_part(const Space* space, const Group* group, Py_ssize_t start) noexcept nogil:
    """Was an array stepped that reaches into the chunk from `start` on?

    Not only the arrays that were stepped change: 8-bit state of their neighbours, in the same block, may.
    """
    cdef Py_ssize_t index = first_array(space, group, start), end = min(start + CHUNK, group.size)
    while index < group.last and space.arrays[index].start < end:
        if group.undo.stepped[index - group.first]:
            return True
        index += 1
    return False


cdef void move_stepped(const Space* space, const Group* group, Py_ssize_t start, Py_ssize_t end,
                       bint back) noexcept nogil:
    """The same for those chunks of start .. end-1 that a step changes, neighbouring ones at once."""
    cdef Py_ssize_t stop
    while start < end:
        stop = start
        while stop < end and taking_part(space, group, stop):
            stop = min(stop + CHUNK, end)
        if stop > start:
            move_elements(space, group, start, stop, back)
        start = stop + CHUNK

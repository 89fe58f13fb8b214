# The first write of all that a group holds, and of the narrow copies of its parameters.
#
# The system puts a page of memory near the processor that first writes to it.  Therefore what a step sweeps is first
# written in such a sweep too, by as many threads.


cdef void start_slot(const Group* group, int slot, Py_ssize_t start, Py_ssize_t n) noexcept nogil:
    """Start (a part of) a block of a state array at its first value."""
    cdef char* s = group.state[slot] + start * group.state_itemsize[slot]
    cdef double value = group.state_start[slot]
    cdef int lowest = SIGNED_LOWEST if group.signed[slot] else UNSIGNED_LOWEST
    cdef float x[BLOCK]
    if group.scales[slot] != NULL:
        group.scales[slot][start // BLOCK] = float_of(<uint32_t> lowest << 23)
    if value == 0:
        memset(s, 0, n * group.state_itemsize[slot])
    elif group.state_format != NATIVE:
        fill(n, x, value)
        encode_block(group, slot, start, n, x, True, group.keys)
    elif group.wide:
        fill(n, <double*> s, value)
    else:
        fill(n, <float*> s, value)


cdef void start_segment(const Group* group, const Piece* piece, const floating* p) noexcept nogil:
    """Start the master copy and the average of one piece at its parameters p."""
    cdef Py_ssize_t n = piece.stop - piece.start
    if group.master != NULL:
        to_float32(n, group.master + piece.start, p)
    if group.ema != NULL:
        memcpy(<floating*> group.ema + piece.start, p, n * sizeof(floating))


cdef void start_group(const Group* group, Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    cdef Piece piece = pieces_from(group, start)
    cdef float widened[BLOCK]
    cdef Py_ssize_t stop, first = start
    cdef int j
    while start < end:
        stop = min(start + BLOCK, end)
        for j in range(SLOTS):
            if group.state[j] != NULL:
                start_slot(group, j, start, stop - start)
        while (group.master != NULL or group.ema != NULL) and next_piece(&piece, stop):
            if group.wide:
                start_segment(group, &piece, <double*> piece.array.p + piece.at)
            elif group.format == NATIVE:
                start_segment(group, &piece, <float*> piece.array.p + piece.at)
            else:
                widen(group.format, piece.stop - piece.start, widened, piece.array.p, piece.at)
                start_segment(group, &piece, widened)
        start = stop
    copy_parameters(group, first, end)


cdef void derive_group(const Group* group, Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    """Of parameters that have taken the place of others: write the master copy and the arrays of copy_to anew."""
    cdef Piece piece = pieces_from(group, start)
    while group.master != NULL and next_piece(&piece, end):
        widen(group.format, piece.stop - piece.start, group.master + piece.start, piece.array.p, piece.at)
    copy_parameters(group, start, end)


cdef void take_averages(const Group* group, Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    """Write the averages into the parameters."""
    cdef Piece piece = pieces_from(group, start)
    cdef Py_ssize_t n, size = native_itemsize(group)
    while group.ema != NULL and next_piece(&piece, end):
        n = piece.stop - piece.start
        if group.format == NATIVE:
            memcpy(piece.array.p + piece.at * size, group.ema + piece.start * size, n * size)
        else:
            narrow(group.format, n, piece.array.p, piece.at, <float*> group.ema + piece.start)


cdef void copy_parameters(const Group* group, Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    """Write the arrays of copy_to, from the parameters or their master copy."""
    cdef Piece piece = pieces_from(group, start)
    cdef float widened[BLOCK]
    cdef Py_ssize_t n
    while group.copy_format != NATIVE and next_piece(&piece, min(piece.stop + BLOCK, end)):
        n = piece.stop - piece.start
        if group.wide:
            narrow(group.copy_format, n, piece.array.copy, piece.at, <double*> piece.array.p + piece.at)
        elif group.master != NULL:
            narrow(group.copy_format, n, piece.array.copy, piece.at, group.master + piece.start)
        elif group.format == NATIVE:
            narrow(group.copy_format, n, piece.array.copy, piece.at, <float*> piece.array.p + piece.at)
        else:
            widen(group.format, n, widened, piece.array.p, piece.at)
            narrow(group.copy_format, n, piece.array.copy, piece.at, widened)

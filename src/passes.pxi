# Micro-batches: gradients are added to sums, beside the step.  The pass knows neither rules nor options.


cdef void add_segment(const Space* space, const Group* group, const Piece* piece, floating* s,
                      bint first) noexcept nogil:
    """Add one piece's gradient to its sums s, or write it there if it is the first."""
    cdef floating widened[CHUNK]
    cdef const Array* a = piece.array
    cdef Py_ssize_t n = piece.stop - piece.start
    cdef const floating* g = <const floating*> a.g + piece.at
    if a.touched != NULL:
        sum_row(piece, <floating*> widened, &g)
    if a.touched == NULL and a.g_format != NATIVE:
        if first:
            widen(a.g_format, n, s, a.g, piece.at)
        else:
            widen(a.g_format, n, widened, a.g, piece.at)
            add(n, s, widened)
    elif first:
        memcpy(s, g, n * sizeof(floating))
    else:
        add(n, s, g)
    if space.zero_grad and a.touched == NULL:
        zero_piece(group, piece)


cdef void add_gradients(const Space* space, const Group* group, Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    cdef Piece piece = pieces_from(group, start)
    cdef bint first
    piece.most = CHUNK  # what goes through a buffer, or is written again, stays in cache
    while next_stepped(&piece, end):
        first = not group.summed[piece.array - group.arrays]
        if group.wide:
            add_segment(space, group, &piece, <double*> group.sums + piece.start, first)
        else:
            add_segment(space, group, &piece, <float*> group.sums + piece.start, first)

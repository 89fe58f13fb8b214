# Micro-batches: gradients are added to sums, beside the step.  The pass knows neither rules nor options.


cdef void add_segment(const Space* space, const Group* group, const Piece* piece, floating* s,
                      bint first) noexcept nogil:
    """Add one piece's gradient to its sums s, or write it there if it is the first."""
    cdef floating buffer[CHUNK]
    cdef floating other[CHUNK]
    cdef Py_ssize_t n = piece.stop - piece.start
    cdef const floating* g = gradient_of(group, piece, s if first else <floating*> buffer, other)
    if not first:
        add(n, s, g)
    elif g != s:
        memcpy(s, g, n * sizeof(floating))
    if space.zero_grad and piece.array.touched == NULL:
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

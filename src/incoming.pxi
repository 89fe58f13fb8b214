# What a call hands in, as the gradient that the stages take: rows summed, narrow numbers widened, targets subtracted.


cdef inline const floating* read_piece(const Piece* piece, floating* out) noexcept nogil:
    """What was handed in for a piece, at most CHUNK elements, as the rule computes: where it lies, or in out."""
    cdef const Array* a = piece.array
    cdef const floating* summed
    if a.touched != NULL:
        sum_row(piece, out, &summed)
        return summed
    if a.g_format != NATIVE:
        widen(a.g_format, piece.stop - piece.start, out, a.g, piece.at)
        return out
    return <const floating*> a.g + piece.at


cdef APART subtract(const Group* group, const Piece* piece, floating* out, const floating* target) noexcept nogil:
    """out <- p - target, for a piece of at most CHUNK elements."""
    cdef floating widened[CHUNK]
    cdef const floating* p = <const floating*> piece.array.p + piece.at
    cdef Py_ssize_t n = piece.stop - piece.start
    if floating is float:
        if group.master != NULL:
            p = group.master + piece.start
        elif group.format != NATIVE:
            widen(group.format, n, widened, piece.array.p, piece.at)
            p = widened
    difference(n, out, p, target)


cdef inline const floating* gradient_of(const Group* group, const Piece* piece, floating* out,
                                        floating* other) noexcept nogil:
    """The gradient of a piece before all stages, where it lies or in one of two buffers.

    The sweep, which has the parameters at hand, forms the difference to a target by itself.
    """
    cdef const floating* g = read_piece(piece, out)
    if group.targets:
        subtract(group, piece, other, g)
        return other
    return g

# What a call hands in, as the gradient that the stages take: rows summed, other formats converted, strided elements
# gathered, targets subtracted.

cdef enum:
    AXES = 64                # more than an array of NumPy's has


cdef APART visit(char* x, int ndim, const Py_ssize_t* shape, const Py_ssize_t* strides, Py_ssize_t itemsize,
                 Py_ssize_t at, Py_ssize_t n, char* out) noexcept nogil:
    """Gather elements at .. at+n-1 of an array, in C order, into out; NULL: zero them where they lie."""
    cdef Py_ssize_t sizes[AXES]
    cdef Py_ssize_t steps[AXES]
    cdef Py_ssize_t index[AXES]
    cdef Py_ssize_t count, i
    cdef int axis, last = 0
    sizes[0] = steps[0] = 1
    for axis in range(ndim):  # neighbouring axes with the same step are one
        if shape[axis] == 1:
            continue
        if steps[last] == strides[axis] * shape[axis] or sizes[last] == 1:
            sizes[last] *= shape[axis]
        else:
            last += 1
            sizes[last] = shape[axis]
        steps[last] = strides[axis]
    for axis in range(last, -1, -1):
        index[axis] = at % sizes[axis]
        at //= sizes[axis]
        x += index[axis] * steps[axis]
    while n > 0:
        count = min(n, sizes[last] - index[last])
        if out == NULL:
            for i in range(count):
                memset(x + i * steps[last], 0, itemsize)
        elif itemsize == 8:
            for i in range(count):
                memcpy(out + 8 * i, x + i * steps[last], 8)
        elif itemsize == 4:
            for i in range(count):
                memcpy(out + 4 * i, x + i * steps[last], 4)
        else:
            for i in range(count):
                memcpy(out + 2 * i, x + i * steps[last], 2)
        if out != NULL:
            out += count * itemsize
        n -= count
        x += count * steps[last]
        index[last] += count
        axis = last
        while axis > 0 and index[axis] == sizes[axis]:
            x += steps[axis - 1] - sizes[axis] * steps[axis]
            index[axis] = 0
            axis -= 1
            index[axis] += 1


cdef APART gather(const Piece* piece, floating* out) noexcept nogil:
    """What was handed in for a piece, at most CHUNK elements, whose elements have strides."""
    cdef double raw[CHUNK]
    cdef const Array* a = piece.array
    cdef Py_ssize_t n = piece.stop - piece.start
    visit(<char*> a.g, a.ndim, a.shape, a.strides, itemsize_of(a.g_format, sizeof(floating)), piece.at, n,
          <char*> out if a.g_format == NATIVE else <char*> raw)
    if a.g_format != NATIVE:
        widen(a.g_format, n, out, <const char*> raw, 0)


cdef void zero_piece(const Group* group, const Piece* piece) noexcept nogil:
    """Zero the gradient of a piece where it lies."""
    cdef const Array* a = piece.array
    cdef Py_ssize_t itemsize = gradient_itemsize(group, a), n = piece.stop - piece.start
    if a.strides != NULL:
        visit(<char*> a.g, a.ndim, a.shape, a.strides, itemsize, piece.at, n, NULL)
    else:
        memset(<char*> a.g + piece.at * itemsize, 0, n * itemsize)


cdef inline const floating* read_piece(const Piece* piece, floating* out) noexcept nogil:
    """What was handed in for a piece, at most CHUNK elements, as the rule computes: where it lies, or in out."""
    cdef const Array* a = piece.array
    cdef const floating* summed
    if a.touched != NULL:
        sum_row(piece, out, &summed)
        return summed
    if a.strides != NULL:
        gather(piece, out)
        return out
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

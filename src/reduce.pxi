# Reductions over all gradients of a step: one read, no write, the same bits for every number of threads and every cut.
#
# Element i of a group's parameter space adds to lane i mod 16 of chunk i // CHUNK, in double; then lanes, chunks and
# groups are added in index order.  An array without a gradient adds nothing.  Where each array is clipped by itself,
# its elements are counted from its own first one, and its chunks are its own: it has the sum of a group of it alone.

cdef enum:
    LANES = 16

cdef void add_squares(Py_ssize_t start, Py_ssize_t n, const floating* g, double* lanes) noexcept nogil:
    """Add the squares of elements start .. start+n-1 of the parameter space to their lanes."""
    cdef Py_ssize_t block, i = 0
    cdef int j
    cdef double x
    cdef double sums[LANES]  # in registers: through `lanes` each sum would wait for the last one's store
    while i < n and (start + i) % LANES:
        x = g[i]
        lanes[(start + i) % LANES] += x * x
        i += 1
    for j in range(LANES):
        sums[j] = lanes[j]
    for block in range((n - i) // LANES):  # counted: gcc makes a block of vectors of no other loop under -fwrapv
        for j in range(LANES):
            sums[j] += <double> g[i + j] * <double> g[i + j]
        i += LANES
    for j in range(LANES):
        lanes[j] = sums[j]
    while i < n:
        x = g[i]
        lanes[(start + i) % LANES] += x * x
        i += 1


cdef uint64_t largest32(Py_ssize_t n, const int32_t* g) noexcept nogil:
    """The largest absolute value as its bits, an integer: NaN above infinity above every number."""
    cdef Py_ssize_t i
    cdef int32_t x, largest = 0
    for i in range(n):
        x = g[i] & 0x7fffffff
        largest = x if x > largest else largest
    return largest


cdef uint64_t largest64(Py_ssize_t n, const uint64_t* g) noexcept nogil:
    cdef Py_ssize_t i
    cdef uint64_t x, largest = 0
    for i in range(n):
        x = g[i] << 1  # without the sign
        largest = x if x > largest else largest
    return largest >> 1


cdef double as_number(uint64_t bits, bint wide) noexcept nogil:
    cdef uint32_t b32 = <uint32_t> bits
    return (<double*> &bits)[0] if wide else (<float*> &b32)[0]


cdef double reduce_chunk(const Group* group, Py_ssize_t start, Py_ssize_t end, Py_ssize_t origin,
                         bint squares) noexcept nogil:
    """The sum of squares, or the largest absolute value, of one chunk's gradients.  origin: where lanes begin."""
    cdef Piece piece = pieces_from(group, start)
    cdef double buffer[CHUNK]
    cdef double other[CHUNK]
    cdef const double* wide
    cdef const float* g
    cdef double lanes[LANES]
    cdef double total = 0
    cdef uint64_t largest = 0
    cdef Py_ssize_t n
    cdef int j
    for j in range(LANES):
        lanes[j] = 0
    while next_stepped(&piece, end):
        n = piece.stop - piece.start
        if group.wide:
            wide = gradient_of(group, &piece, <double*> buffer, <double*> other)
            if squares:
                add_squares(piece.start - origin, n, wide, lanes)
            else:
                largest = max(largest, largest64(n, <const uint64_t*> wide))
        else:
            g = gradient_of(group, &piece, <float*> buffer, <float*> other)
            if squares:
                add_squares(piece.start - origin, n, g, lanes)
            else:
                largest = max(largest, largest32(n, <const int32_t*> g))
    if not squares:
        return as_number(largest, group.wide)
    for j in range(LANES):
        total += lanes[j]
    return total


cdef inline Py_ssize_t chunk_start(const Space* space, const Piece* piece) noexcept nogil:
    """The first element of the chunk in which a piece begins."""
    return piece.start - (piece.at if space.by_array else piece.start) % CHUNK


cdef inline double* partial_of(const Space* space, const Group* group, const Piece* piece,
                               Py_ssize_t start) noexcept nogil:
    """The result for the chunk from `start` on.  The next one's has a higher number: it, or its array, has."""
    cdef Py_ssize_t number = (group.position + start) // CHUNK
    if space.by_array:
        number += group.first + (piece.array - group.arrays)
    return space.partial + number


cdef void reduce_chunks(const Space* space, const Group* group, Py_ssize_t first, Py_ssize_t last,
                        bint squares) noexcept nogil:
    """Reduce each chunk that begins in first .. last-1."""
    cdef Piece piece = pieces_from(group, first)
    cdef Py_ssize_t start, end = min(last + CHUNK, group.size) if space.by_array else last
    while next_stepped(&piece, end):
        start = chunk_start(space, &piece)
        if start >= last:
            return
        piece.stop = min(start + CHUNK, piece.array.stop if space.by_array else end)
        if start >= first:
            partial_of(space, group, &piece, start)[0] = reduce_chunk(
                group, start, piece.stop, piece.array.start if space.by_array else 0, squares)


cdef double reduced(const Space* space, const Group* group, const Array* a, bint squares) noexcept nogil:
    """The sum of squares, or the largest absolute value (NaN if there is one), once all chunks are reduced.

    a: of this array alone; NULL: of the group.
    """
    cdef Piece piece = pieces_from(group, 0 if a == NULL else a.start)
    cdef Py_ssize_t start, end = group.size if a == NULL else a.stop
    cdef double total = 0, part
    while next_stepped(&piece, end):
        start = chunk_start(space, &piece)
        part = partial_of(space, group, &piece, start)[0]
        if squares:
            total += part
        elif not part <= total and total == total:
            total = part
        piece.stop = min(start + CHUNK, end)
    return total

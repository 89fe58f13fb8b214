# Reductions over all gradients of a step: one read, no write, the same bits for every number of threads and every cut.
#
# Element i of a group's parameter space adds to lane i mod 16 of block i // CHUNK, in double; then lanes, blocks and
# groups are added in index order.  An array without a gradient adds nothing.

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


cdef void reduce_chunk(const Space* space, const Group* group, Py_ssize_t chunk, bint squares) noexcept nogil:
    """The sum of squares, or the largest absolute value, of one chunk's gradients, into space.partial[chunk]."""
    cdef Py_ssize_t start = (chunk - group.chunk) * CHUNK, end = min(start + CHUNK, group.size), stop
    cdef Py_ssize_t index = first_array(space, group, start)
    cdef const Array* a
    cdef const char* g
    cdef float wide[CHUNK]
    cdef double lanes[LANES]
    cdef uint64_t largest = 0
    cdef int j
    for j in range(LANES):
        lanes[j] = 0
    while start < end:
        a = space.arrays + index
        stop = min(a.stop, end)
        if a.g != NULL and stop > start:
            g = a.g + (start - a.start) * gradient_itemsize(group, a)
            if a.g_format != NATIVE:
                widen(a.g_format, stop - start, wide, a.g, start - a.start)
                g = <const char*> wide
            if squares and group.wide:
                add_squares(start, stop - start, <const double*> g, lanes)
            elif squares:
                add_squares(start, stop - start, <const float*> g, lanes)
            elif group.wide:
                largest = max(largest, largest64(stop - start, <const uint64_t*> g))
            else:
                largest = max(largest, largest32(stop - start, <const int32_t*> g))
        start = stop
        index += 1
    space.partial[chunk] = as_number(largest, group.wide)
    if squares:
        space.partial[chunk] = 0
        for j in range(LANES):
            space.partial[chunk] += lanes[j]


cdef double reduce_group(const Space* space, const Group* group, bint squares, int n_threads) noexcept nogil:
    """The sum of squares, or the largest absolute value (NaN where there is one), of a group's gradients."""
    cdef Py_ssize_t chunk, end = group.chunk + (group.size + CHUNK - 1) // CHUNK
    cdef double total = 0
    if n_threads <= 1:
        for chunk in range(group.chunk, end):
            reduce_chunk(space, group, chunk, squares)
    else:
        for chunk in prange(group.chunk, end, schedule="static", num_threads=n_threads):
            reduce_chunk(space, group, chunk, squares)
    for chunk in range(group.chunk, end):
        if squares:
            total += space.partial[chunk]
        elif not space.partial[chunk] <= total and total == total:
            total = space.partial[chunk]
    return total

# sum_to_one: rows of the last axis that are distributions.  After the rule and the bounds, each is divided by its sum,
# or projected onto the simplex, in place.
#
# A row that lies in one piece of the sweep is done there, while it is in cache.  Pieces are cut at fixed places, so it
# is known which rows others are; they are finished in a sweep of their own, in which each row has one thread.

cdef enum SumToOne:
    ANY_SUM, DIVIDE, PROJECT


# --- loops over a row ------------------------------------------------------------------------------------------------
#
# Element i of a row adds to lane i mod 16, in double; then the lanes are added in order.  Up to 16 elements that is
# their own order.

cdef double row_sum(Py_ssize_t n, const floating* p) noexcept nogil:
    cdef Py_ssize_t block, i = 0
    cdef int j
    cdef double total = 0
    cdef double sums[LANES]
    if n <= LANES:
        while i < n:
            total += p[i]
            i += 1
        return total
    for j in range(LANES):
        sums[j] = 0
    for block in range((n - i) // LANES):
        for j in range(LANES):
            sums[j] += p[i + j]
        i += LANES
    while i < n:
        sums[i % LANES] += p[i]
        i += 1
    for j in range(LANES):
        total += sums[j]
    return total


cdef double largest(Py_ssize_t n, const floating* p) noexcept nogil:
    """The largest element of a row without a NaN."""
    cdef Py_ssize_t i
    cdef floating x = p[0]
    for i in range(1, n):
        x = p[i] if p[i] > x else x
    return x


cdef Py_ssize_t add_above(Py_ssize_t n, const floating* p, double top, double theta, double* total) noexcept nogil:
    """How many elements of p - top lie above theta; total: their sum."""
    cdef Py_ssize_t block, k = 0, found = 0
    cdef int j
    cdef double x
    cdef double sums[LANES]
    total[0] = 0
    for j in range(LANES if n > LANES else 0):
        sums[j] = 0
    for block in range(n // LANES if n > LANES else 0):
        for j in range(LANES):
            x = p[k + j] - top
            found += x > theta
            sums[j] += x if x > theta else 0
        k += LANES
    while k < n:
        x = p[k] - top
        found += x > theta
        x = x if x > theta else 0  # without a branch, which nothing could predict
        if n > LANES:
            sums[k % LANES] += x
        else:
            total[0] += x
        k += 1
    for j in range(LANES if n > LANES else 0):
        total[0] += sums[j]
    return found


cdef void divide(Py_ssize_t n, floating* p, floating divisor) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = p[i] / divisor


cdef void divide_each(Py_ssize_t n, floating* p, const floating* divisors) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = p[i] / divisors[i]


cdef void cut_off(Py_ssize_t n, floating* p, double top, double theta) noexcept nogil:
    """p <- max(p - top - theta, 0)"""
    cdef Py_ssize_t i
    cdef double x
    for i in range(n):
        x = p[i] - top - theta
        p[i] = <floating> (x if x > 0 else 0)


# --- rows ------------------------------------------------------------------------------------------------------------

cdef inline floating divisor_of(Py_ssize_t n, const floating* p) noexcept nogil:
    """The sum of a row, rounded once; 1, which leaves it as it is, unless that is positive and finite."""
    cdef floating s = <floating> row_sum(n, p)
    return s if s > 0 and s - s == 0 else 1


cdef void project(Py_ssize_t n, floating* p) noexcept nogil:
    """The nearest row of numbers >= 0 whose sum is 1: max(p - theta, 0) (Duchi et al. 2008, eq. 5 and 6).

    theta is found without sorting (Michelot 1986): over the elements above theta, theta <- (sum - 1) / number, until
    none drops out.  That is Newton's method on a convex function, and takes some 50 rounds at most, usually 3 to 6.
    Counted from the largest element, theta starts at -1, below which none can be.
    """
    cdef double top, total, theta = -1
    cdef Py_ssize_t now, before = n + 1
    total = row_sum(n, p)
    if total - total != 0:
        return
    top = largest(n, p)
    now = add_above(n, p, top, theta, &total)
    while now < before:
        theta, before = (total - 1) / now, now
        now = add_above(n, p, top, theta, &total)
    cut_off(n, p, top, theta)


cdef void to_simplex(Py_ssize_t rows, Py_ssize_t length, floating* p, bint projected) noexcept nogil:
    """Rows that lie one after the other: one, or as many as a piece may have."""
    cdef floating divisors[TILE + LANES]
    cdef floating divisor
    cdef Py_ssize_t i
    cdef int j
    if projected or length > LANES or rows == 1:
        for i in range(rows):
            if projected:
                project(length, p + i * length)
            else:
                divide(length, p + i * length, divisor_of(length, p + i * length))
        return
    for i in range(rows):  # for rows that are shorter than vectors, the division is one loop over all of them
        divisor = divisor_of(length, p + i * length)
        for j in range(LANES):
            divisors[i * length + j] = divisor
    divide_each(rows * length, p, divisors)


# --- rows and pieces -------------------------------------------------------------------------------------------------

cdef inline Py_ssize_t row_length(const Array* a) noexcept nogil:
    return a.shape[a.ndim - 1]


cdef inline Py_ssize_t piece_unit(const Group* group) noexcept nogil:
    """Pieces end at multiples of it, in the parameter space."""
    return TILE if group.format == NATIVE and group.state_format == NATIVE else BLOCK


cdef inline void settle(const Group* group, const Piece* piece, floating* p, const Options* o,
                        const uint64_t* keys) noexcept nogil:
    """What follows when the parameters are final: they are rounded, averaged and copied."""
    cdef Py_ssize_t n = piece.stop - piece.start
    if group.format != NATIVE:
        store_parameters(group, piece, p, keys)
    if group.ema != NULL:
        average(n, <floating*> group.ema + piece.start, p, o.ema_decay)
    if group.copy_format != NATIVE:
        narrow(group.copy_format, n, piece.array.copy, piece.at, p)


cdef APART settle_rows(const Group* group, const Piece* piece, floating* p, const Options* o,
                       const uint64_t* keys) noexcept nogil:
    """The same for the rows that a piece has as a whole, once they sum to one.  Parts of others wait."""
    cdef Py_ssize_t length = row_length(piece.array), n = piece.stop - piece.start
    cdef Py_ssize_t head = min((length - piece.at % length) % length, n)
    cdef Py_ssize_t rows = (n - head) // length, tail = head + rows * length
    cdef Piece whole = piece[0]
    if group.unrounded != NULL:
        memcpy(group.unrounded + piece.start, p, head * sizeof(float))
        memcpy(group.unrounded + piece.start + tail, p + tail, (n - tail) * sizeof(float))
    if rows:
        whole.start, whole.at, whole.stop = piece.start + head, piece.at + head, piece.start + tail
        to_simplex(rows, length, p + head, o.sum_to_one == PROJECT)
        settle(group, &whole, p + head, o, keys)


cdef void finish_row(const Group* group, const Array* a, Py_ssize_t at, floating* p, const Options* o,
                     const uint64_t* keys) noexcept nogil:
    """A row that several pieces have, from element `at` of its array on: p, not rounded yet."""
    cdef Py_ssize_t unit = piece_unit(group), begin = a.start + at, end = begin + row_length(a)
    cdef Piece piece
    to_simplex(1, end - begin, p, o.sum_to_one == PROJECT)
    piece.array, piece.at, piece.start, piece.stop = a, at, begin, begin
    while next_in_array(&piece, unit, end):
        settle(group, &piece, p + (piece.start - begin), o, keys)


cdef void finish_row_at(const Group* group, const Array* a, Py_ssize_t at, const Options* o,
                        const uint64_t* keys) noexcept nogil:
    if group.wide:
        finish_row(group, a, at, <double*> a.p + at, o, keys)
    elif group.format == NATIVE:
        finish_row(group, a, at, <float*> a.p + at, o, keys)
    elif group.master != NULL:
        finish_row(group, a, at, group.master + a.start + at, o, keys)
    else:
        finish_row(group, a, at, group.unrounded + a.start + at, o, keys)


cdef void finish_group(const Group* group, Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    """The stepped rows that several pieces have, of which the first border between pieces lies in start .. end-1."""
    cdef Piece piece = pieces_from(group, start)
    cdef Py_ssize_t unit = piece_unit(group), border, begin
    while group.options.sum_to_one and next_stepped(&piece, end):
        border = (piece.start + unit - 1) // unit * unit
        while border < piece.stop:
            begin = border - (border - piece.array.start) % row_length(piece.array)
            if border - unit <= begin < border:
                finish_row_at(group, piece.array, begin - piece.array.start, &group.options, group.keys)
            border += unit


cdef bint cuts_row(const Group* group, Py_ssize_t at) noexcept:
    """Does element `at` of the parameter space lie in the middle of a row that is to sum to one?"""
    cdef Piece piece = pieces_from(group, at)
    return (group.options.sum_to_one and at < group.size
            and (at - piece.array.start) % row_length(piece.array) != 0)

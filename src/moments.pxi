# second_moment="row": the rules where each row of an array has one second moment, the mean of its squared gradient.
#
# The moment is taken of the whole row before any of its elements is stepped.  Then the denominator is one number for
# the row, and the loops are those of rules.pxi with it.  Rows of one element are none of this: they have a second
# moment each, and so the loops of rules.pxi, and their bits.


cdef inline double fold(double* lanes) noexcept nogil:
    """The sum of the lanes, half onto half; with numbers of rounds that gcc knows, so that they stay in registers."""
    cdef int j
    for j in range(LANES // 2):
        lanes[j] += lanes[j + LANES // 2]
    for j in range(LANES // 4):
        lanes[j] += lanes[j + LANES // 4]
    for j in range(LANES // 8):
        lanes[j] += lanes[j + LANES // 8]
    return lanes[0] + lanes[1]


cdef inline double sum_squares(Py_ssize_t n, const floating* g) noexcept nogil:
    """The sum of the squares of at most a chunk of a row, whose element j adds to lane j mod LANES, in double."""
    cdef Py_ssize_t block, i = 0
    cdef int j
    cdef double sums[LANES]
    cdef double rest[LANES]
    for j in range(LANES):
        sums[j] = 0
    for block in range((n - i) // LANES):
        for j in range(LANES):
            sums[j] += <double> g[i + j] * <double> g[i + j]
        i += LANES
    if n - i >= LANES // 2:
        for j in range(LANES // 2):
            sums[j] += <double> g[i + j] * <double> g[i + j]
        i += LANES // 2
    if i < n:
        for j in range(LANES):
            rest[j] = 0
        for j in range(n - i):
            rest[i % LANES + j] = <double> g[i + j] * <double> g[i + j]
        for j in range(LANES):
            sums[j] += rest[j]
    return fold(sums)


cdef inline floating mean_square(Py_ssize_t n, const floating* g) noexcept nogil:
    """The mean of the squares of a row; its chunks are added in order."""
    cdef double total = 0
    cdef Py_ssize_t start = 0
    while start < n:
        total += sum_squares(min(n - start, CHUNK), g + start)
        start += CHUNK
    return <floating> (total / n)


cdef inline void take_moment(Rule rule, floating q, void** s, const Options* o, const Step* k) noexcept nogil:
    """The second moment of a row, after one more mean square q."""
    cdef floating* v = <floating*> s[1 if rule == ADAM else 0]
    cdef floating* x = <floating*> s[2]
    v[0] = v[0] + q if rule == ADAGRAD else <floating> k.b2 * v[0] + <floating> k.c2 * q
    if rule == ADAM and o.amsgrad:
        x[0] = x[0] if v[0] <= x[0] else v[0]


cdef void divided_row(Py_ssize_t n, floating* p, const floating* g, double denominator, const Step* k) noexcept nogil:
    """Adagrad, and RMSprop without momentum."""
    cdef Py_ssize_t i
    cdef floating d = <floating> denominator, lr = <floating> k.lr
    for i in range(n):
        p[i] = p[i] - lr * g[i] / d


cdef void rmsprop_row(Py_ssize_t n, floating* p, const floating* g, floating* b, double denominator,
                      const Step* k) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating bi, d = <floating> denominator, lr = <floating> k.lr, mu = <floating> k.mu
    for i in range(n):
        bi = mu * b[i] + g[i] / d
        b[i] = bi
        p[i] = p[i] - lr * bi


cdef void adam_row(Py_ssize_t n, floating* p, const floating* g, floating* m, double denominator,
                   const Step* k) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating mi, d = <floating> denominator, lr = <floating> k.lr, decay = <floating> k.decay
    cdef floating b1 = <floating> k.b1, c1 = <floating> k.c1
    for i in range(n):
        mi = b1 * m[i] + c1 * g[i]
        p[i] = p[i] * decay - lr * mi / d
        m[i] = mi


cdef void apply_by_row(Rule rule, Py_ssize_t n, floating* p, const floating* g, void** s, const Options* o,
                       const Step* k) noexcept nogil:
    """A rule over elements of one row, whose second moment has been taken."""
    cdef floating* v = <floating*> s[(2 if o.amsgrad else 1) if rule == ADAM else 0]
    cdef floating d = root(v[0] * <floating> k.v_scale + <floating> k.e_in) + <floating> k.e_out
    if rule == ADAM:
        adam_row(n, p, g, <floating*> s[0], d, k)
    elif rule == RMSPROP and o.momentum != 0:
        rmsprop_row(n, p, g, <floating*> s[1], d, k)
    else:
        divided_row(n, p, g, d, k)

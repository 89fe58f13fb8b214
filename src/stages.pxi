# The stages around the rule: short loops over one segment of a chunk, which stays in the core's cache between them.
#
# A stage that changes the gradient reads one buffer and writes another: gcc would find that a loop whose input is its
# output fails the alias check, and would run it unvectorised.  A stage that a call does not need is not run.


# --- before the rule: each writes to out what it makes of g ----------------------------------------------------------

cdef void difference(Py_ssize_t n, floating* out, const floating* p, const floating* target) noexcept nogil:
    """out <- p - target: the gradient of half the squared distance to a target."""
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = p[i] - target[i]


cdef void scale(Py_ssize_t n, floating* out, const floating* g, double factor) noexcept nogil:
    """out <- factor g: unscaling, clipping and maximize together are one constant."""
    cdef Py_ssize_t i
    cdef floating k = <floating> factor
    for i in range(n):
        out[i] = k * g[i]


cdef void clamp_gradient(Py_ssize_t n, floating* out, const floating* g, double limit) noexcept nogil:
    """out <- g, clamped to [-limit, limit].  NaN stays NaN."""
    cdef Py_ssize_t i
    cdef floating x, hi = <floating> limit, lo = -<floating> limit
    for i in range(n):
        x = g[i]
        x = lo if x < lo else x
        out[i] = hi if x > hi else x


cdef void decay_gradient(Py_ssize_t n, floating* out, const floating* g, const floating* p,
                         double weight_decay) noexcept nogil:
    """out <- g + weight_decay p: the coupled decay (L2), which every rule has but AdamW, Lion, Rprop and SuperSAB."""
    cdef Py_ssize_t i
    cdef floating k = <floating> weight_decay
    for i in range(n):
        out[i] = g[i] + k * p[i]


cdef void add(Py_ssize_t n, floating* s, const floating* g) noexcept nogil:
    """s <- s + g, for sums of micro-batches."""
    cdef Py_ssize_t i
    for i in range(n):
        s[i] = s[i] + g[i]


# --- after the rule --------------------------------------------------------------------------------------------------

cdef void bound(Py_ssize_t n, floating* p, double low, double high) noexcept nogil:
    """p <- p, clamped to [low, high], which are numbers of p's type.  NaN stays NaN."""
    cdef Py_ssize_t i
    cdef floating x, lo = <floating> low, hi = <floating> high
    for i in range(n):
        x = p[i]
        x = lo if x < lo else x
        p[i] = hi if x > hi else x


cdef void bound_each(Py_ssize_t n, floating* p, const floating* low, const floating* high) noexcept nogil:
    """The same with bounds for each element."""
    cdef Py_ssize_t i
    cdef floating x
    for i in range(n):
        x = p[i]
        x = low[i] if x < low[i] else x
        p[i] = high[i] if x > high[i] else x


cdef void average(Py_ssize_t n, floating* e, const floating* p, double decay) noexcept nogil:
    """e <- e - (1 - decay) (e - p): exact where e = p, however 1 - decay is rounded."""
    cdef Py_ssize_t i
    cdef floating c = <floating> (1 - decay)
    for i in range(n):
        e[i] = e[i] - c * (e[i] - p[i])

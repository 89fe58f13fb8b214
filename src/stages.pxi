# The stages around the rule: short loops over one segment of a chunk, which stays in the core's cache between them.
# A stage reads one buffer and writes another (a loop whose input is its output would fail its alias check and run
# unvectorised); a stage that a call does not need is not run.

cdef void scale(Py_ssize_t n, floating* out, const floating* g, double factor) noexcept nogil:
    """out <- factor g: unscale, clip and maximize are one constant."""
    cdef Py_ssize_t i
    cdef floating k = <floating> factor
    for i in range(n):
        out[i] = k * g[i]


cdef void decay_gradient(Py_ssize_t n, floating* out, const floating* g, const floating* p,
                         double weight_decay) noexcept nogil:
    """out <- g + weight_decay p: the coupled decay (L2) of every rule but AdamW and Lion."""
    cdef Py_ssize_t i
    cdef floating k = <floating> weight_decay
    for i in range(n):
        out[i] = g[i] + k * p[i]

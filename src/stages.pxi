# The stages around the rule: short loops over one segment of a chunk, which stays in the core's cache between them.
# A stage that changes the gradient reads one buffer and writes another (a loop whose input is its output would fail its
# alias check and run unvectorised); a stage that a call does not need is not run.

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    static inline uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
    static inline float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
    """
    ctypedef int int32_t
    ctypedef unsigned int uint32_t
    ctypedef unsigned short uint16_t
    ctypedef unsigned long long uint64_t
    uint32_t bits_of(float x) nogil
    float float_of(uint32_t u) nogil


# --- before the rule: out <- what it does to g -----------------------------------------------------------------------

cdef void from_bfloat16(Py_ssize_t n, float* out, const uint16_t* g) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = float_of(<uint32_t> g[i] << 16)


cdef void from_float16(Py_ssize_t n, float* out, const uint16_t* g) noexcept nogil:
    """Exact.  Below 2^-14 the fraction counts units of 2^-24."""
    cdef Py_ssize_t i
    cdef uint32_t a
    cdef float x
    for i in range(n):
        a = g[i] & 0x7fff
        x = float_of((a << 13) + (0x70000000 if a >= 0x7c00 else 0x38000000))
        x = <float> <int> a * <float> 5.9604644775390625e-08 if a < 0x400 else x
        out[i] = -x if g[i] & 0x8000 else x


cdef void scale(Py_ssize_t n, floating* out, const floating* g, double factor) noexcept nogil:
    """out <- factor g: unscale, clip and maximize are one constant."""
    cdef Py_ssize_t i
    cdef floating k = <floating> factor
    for i in range(n):
        out[i] = k * g[i]


cdef void clamp_gradient(Py_ssize_t n, floating* out, const floating* g, double limit) noexcept nogil:
    """out <- g, taken into [-limit, limit]; NaN stays NaN."""
    cdef Py_ssize_t i
    cdef floating x, hi = <floating> limit, lo = -<floating> limit
    for i in range(n):
        x = g[i]
        x = lo if x < lo else x
        out[i] = hi if x > hi else x


cdef void decay_gradient(Py_ssize_t n, floating* out, const floating* g, const floating* p,
                         double weight_decay) noexcept nogil:
    """out <- g + weight_decay p: the coupled decay (L2) of every rule but AdamW and Lion."""
    cdef Py_ssize_t i
    cdef floating k = <floating> weight_decay
    for i in range(n):
        out[i] = g[i] + k * p[i]


# --- behind the rule -------------------------------------------------------------------------------------------------

cdef void bound(Py_ssize_t n, floating* p, double low, double high) noexcept nogil:
    """p <- p, taken into [low, high], numbers of p's type; NaN stays NaN."""
    cdef Py_ssize_t i
    cdef floating x, lo = <floating> low, hi = <floating> high
    for i in range(n):
        x = p[i]
        x = lo if x < lo else x
        p[i] = hi if x > hi else x


cdef void bound_each(Py_ssize_t n, floating* p, const floating* low, const floating* high) noexcept nogil:
    """p <- p, taken into [low, high], element by element."""
    cdef Py_ssize_t i
    cdef floating x
    for i in range(n):
        x = p[i]
        x = low[i] if x < low[i] else x
        p[i] = high[i] if x > high[i] else x


cdef void average(Py_ssize_t n, floating* e, const floating* p, double decay) noexcept nogil:
    """e <- decay e + (1 - decay) p."""
    cdef Py_ssize_t i
    cdef floating d = <floating> decay, c = <floating> (1 - decay)
    for i in range(n):
        e[i] = d * e[i] + c * p[i]


cdef void to_float32(Py_ssize_t n, float* out, const floating* p) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = <float> p[i]


cdef void to_bfloat16(Py_ssize_t n, uint16_t* out, const float* p) noexcept nogil:
    """Rounded to nearest even; a NaN stays one."""
    cdef Py_ssize_t i
    cdef uint32_t u, nan
    for i in range(n):
        u = bits_of(p[i])
        nan = (u >> 16) | 0x40
        out[i] = <uint16_t> (nan if (u & 0x7fffffff) > 0x7f800000 else (u + 0x7fff + ((u >> 16) & 1)) >> 16)


cdef void to_float16(Py_ssize_t n, uint16_t* out, const float* p) noexcept nogil:
    """Rounded to nearest even; a NaN stays one, what is too large becomes infinite.

    Below 2^-14, float16's smallest normal number, adding 0.5 leaves the wanted bits at the end of the sum.
    """
    cdef Py_ssize_t i
    cdef uint32_t u, a, normal, small, r
    cdef float x
    for i in range(n):
        x = p[i]
        u = bits_of(x)
        a = u & 0x7fffffff
        normal = (a - 0x38000000 + 0xfff + ((a >> 13) & 1)) >> 13
        small = bits_of((-x if x < 0 else x) + <float> 0.5) - 0x3f000000
        r = normal if a >= 0x38800000 else small
        r = 0x7c00 if a >= 0x477ff000 else r
        r = 0x7e00 if a > 0x7f800000 else r
        out[i] = <uint16_t> (r | ((u >> 16) & 0x8000))

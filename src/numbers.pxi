# What every room below uses of C: integer types, roots, powers, and the floating-point mode.

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    static inline uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
    static inline float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
    """
    ctypedef int int32_t
    ctypedef long long int64_t
    ctypedef unsigned char uint8_t
    ctypedef short int16_t
    ctypedef unsigned int uint32_t
    ctypedef unsigned short uint16_t
    ctypedef unsigned long long uint64_t
    uint32_t bits_of(float x) nogil
    float float_of(uint32_t u) nogil

cdef extern from "math.h" nogil:
    float sqrtf(float)
    double sqrt(double)


cdef extern from *:
    """
    #if defined(__GNUC__)
    #define APART __attribute__((noinline)) void
    #else
    #define APART void
    #endif
    """
    # Return type of functions off the hot path, which are not to take registers from the loops on it.
    ctypedef void APART


cdef inline floating root(floating x) noexcept nogil:
    if floating is float:
        return sqrtf(x)
    else:
        return sqrt(x)


cdef inline floating sign(floating x) noexcept nogil:  # NaN stays NaN
    return <floating> 1 if x > 0 else (<floating> -1 if x < 0 else x - x)


cdef double power(double x, long long n) noexcept nogil:
    """x**n by binary powering: IEEE multiplications only, so every machine gives the same bits.  At most 63 rounds."""
    cdef double y = 1
    while n > 0:
        if n & 1:
            y *= x
        x *= x
        n >>= 1
    return y


cdef double power_of_096(double x) noexcept nogil:
    """0.96**x without libm: an integer power times the Taylor series of exp on [0, 0.041]."""
    if x > 1e5:  # less than any double
        return 0
    cdef long long n = <long long> x
    cdef double y = (x - n) * -0.040821994520255166, s = 1
    cdef int i
    for i in range(9, 0, -1):
        s = 1 + s * y / i
    return power(0.96, n) * s


cdef void fill(Py_ssize_t n, floating* x, double value) noexcept nogil:
    cdef Py_ssize_t i
    cdef floating y = <floating> value
    for i in range(n):
        x[i] = y


# --- the floating-point mode -----------------------------------------------------------------------------------------
#
# Everything is computed in the default mode: rounded to nearest, denormals kept unless flush_denormals asks otherwise,
# no traps.  The caller's mode may be another one (torch.set_flush_denormal, fesetround) and would hold in one thread
# only, so that the bits would depend on the number of threads.

cdef extern from *:
    """
    #if defined(__x86_64__) || defined(_M_X64)
    #include <xmmintrin.h>
    #define CAN_FLUSH 1
    #define STATUS 0x3f  /* the bits that tell what has happened, and are no mode */
    #define DEFAULT_MODE 0x1f80
    #define FLUSHING 0x8040  /* FTZ and DAZ */
    static inline uint64_t read_mode(void) { return _mm_getcsr(); }
    static inline void write_mode(uint64_t mode) { _mm_setcsr((unsigned int)mode); }
    #elif defined(__aarch64__) && defined(__GNUC__)
    #define CAN_FLUSH 1
    #define STATUS 0
    #define DEFAULT_MODE 0
    #define FLUSHING (1 << 24)
    static inline uint64_t read_mode(void) { uint64_t m; __asm__ __volatile__("mrs %0, fpcr" : "=r"(m)); return m; }
    static inline void write_mode(uint64_t mode) { __asm__ __volatile__("msr fpcr, %0" : : "r"(mode)); }
    #else
    #define CAN_FLUSH 0
    #define STATUS 0
    #define DEFAULT_MODE 0
    #define FLUSHING 0
    static inline uint64_t read_mode(void) { return 0; }
    static inline void write_mode(uint64_t mode) { (void)mode; }
    #endif
    """
    const bint CAN_FLUSH
    const uint64_t STATUS, DEFAULT_MODE, FLUSHING
    uint64_t read_mode() nogil
    void write_mode(uint64_t mode) nogil


def can_flush():
    """Does this processor's mode know denormals that are flushed to 0?"""
    return CAN_FLUSH


cdef inline uint64_t enter_mode(bint flush) noexcept nogil:
    """Begin the default mode in this thread; returns the mode to give to `leave_mode`."""
    cdef uint64_t before = read_mode(), wanted = DEFAULT_MODE | (FLUSHING if flush else 0)
    if before & ~STATUS != wanted:  # writing it costs more than reading it
        write_mode(wanted)
    return before


cdef inline void leave_mode(uint64_t before, bint flush) noexcept nogil:
    if before & ~STATUS != DEFAULT_MODE | (FLUSHING if flush else 0):
        write_mode(before)

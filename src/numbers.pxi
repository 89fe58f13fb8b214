# Integer types of known size, and the bits of a float32 as an integer.

cdef extern from *:
    """
    #include <stdint.h>
    #include <string.h>
    static inline uint32_t bits_of(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
    static inline float float_of(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }
    """
    ctypedef int int32_t
    ctypedef unsigned char uint8_t
    ctypedef short int16_t
    ctypedef unsigned int uint32_t
    ctypedef unsigned short uint16_t
    ctypedef unsigned long long uint64_t
    uint32_t bits_of(float x) nogil
    float float_of(uint32_t u) nogil

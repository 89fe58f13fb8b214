# Number formats: how narrow numbers are widened to float32, and how float32 is rounded to them.

# --- widening, which is exact, and rounding to nearest ---------------------------------------------------------------

cdef void from_bfloat16(Py_ssize_t n, float* out, const uint16_t* g) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = float_of(<uint32_t> g[i] << 16)


cdef void from_float16(Py_ssize_t n, float* out, const uint16_t* g) noexcept nogil:
    """Below 2^-14, the smallest normal number of float16, the fraction counts units of 2^-24."""
    cdef Py_ssize_t i
    cdef uint32_t a
    cdef float x
    for i in range(n):
        a = g[i] & 0x7fff
        x = float_of((a << 13) + (0x70000000 if a >= 0x7c00 else 0x38000000))
        x = <float> <int> a * <float> 5.9604644775390625e-08 if a < 0x400 else x
        out[i] = -x if g[i] & 0x8000 else x


cdef void to_float32(Py_ssize_t n, float* out, const floating* p) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = <float> p[i]


cdef void to_float64(Py_ssize_t n, double* out, const float* x) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = x[i]


cdef void to_bfloat16(Py_ssize_t n, uint16_t* out, const float* p) noexcept nogil:
    """Round to nearest even.  NaN stays NaN."""
    cdef Py_ssize_t i
    cdef uint32_t u, nan
    for i in range(n):
        u = bits_of(p[i])
        nan = (u >> 16) | 0x40
        out[i] = <uint16_t> (nan if (u & 0x7fffffff) > 0x7f800000 else (u + 0x7fff + ((u >> 16) & 1)) >> 16)


cdef void to_float16(Py_ssize_t n, uint16_t* out, const float* p) noexcept nogil:
    """Round to nearest even.  NaN stays NaN, and what is too large becomes infinite.

    Below 2^-14, the smallest normal number of float16, adding 0.5 leaves the wanted bits at the end of the sum.
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


# --- stochastic rounding ---------------------------------------------------------------------------------------------
#
# A number between two neighbours of a narrow format is rounded to the upper one with a probability that is its
# distance from the lower one, in units of the distance between the two.  So the mean is right and small changes add up.
#
# The noise is one word for each element: a hash for its block of BLOCK elements of the parameter space, XORed with a
# fixed table.  The argument `noise` points to the table's entry for the first element; the words of a table have as
# many bits as its format cuts off.  With `halves` instead of `noises`, and word 0, the same loops round to nearest.

cdef enum:
    BLOCK = 256
    CUT_BFLOAT16 = 16   # bits of a float32's fraction that the format has no room for
    CUT_FLOAT16 = 24    # more than 13: numbers below its normal ones lose more
    CUT_UINT8 = 20

cdef struct Noises:
    uint32_t bfloat16[BLOCK]
    uint32_t float16[BLOCK]
    uint32_t uint8[BLOCK]

cdef Noises noises
cdef Noises halves


cdef uint64_t mix(uint64_t x) noexcept nogil:
    """The finaliser of SplitMix64 (Steele, Lea & Flood 2014)."""
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL
    return x ^ (x >> 31)


cdef void fill_noises() noexcept:
    """The first 8 bits of the 256 words are a permutation, which balances the roundings of a block."""
    cdef uint32_t word
    cdef int i, j
    cdef uint8_t first[BLOCK]
    for i in range(BLOCK):
        j = mix(i) % (i + 1)
        first[i] = first[j]
        first[j] = i
    for i in range(BLOCK):
        word = <uint32_t> first[i] << 24 | <uint32_t> (mix(i + BLOCK) >> 40)
        noises.bfloat16[i], halves.bfloat16[i] = word >> (32 - CUT_BFLOAT16), 1 << (CUT_BFLOAT16 - 1)
        noises.float16[i], halves.float16[i] = word >> (32 - CUT_FLOAT16), 1 << (CUT_FLOAT16 - 1)
        noises.uint8[i], halves.uint8[i] = word >> (32 - CUT_UINT8), 1 << (CUT_UINT8 - 1)


fill_noises()


cdef uint64_t noise_key(uint64_t seed, uint64_t t, uint64_t group, uint64_t quantity) noexcept nogil:
    """The hash that the noise of a stored quantity starts from at step t: 0 the parameters, 1 + slot a state array."""
    return mix(mix(mix(seed + 0x9e3779b97f4a7c15ULL) + t) + 16 * group + quantity)


cdef uint32_t noise_word(uint64_t key, uint64_t block) noexcept nogil:
    return <uint32_t> (mix(key + block * 0x9e3779b97f4a7c15ULL) >> 32)


cdef void round_head(Py_ssize_t n, uint16_t* out, const float* x, const uint32_t* noise, uint32_t word) noexcept nogil:
    """The upper halves of x + noise are bfloat16.  NaN stays NaN; numbers next to infinity may become infinite."""
    cdef Py_ssize_t i
    cdef float y
    for i in range(n):
        y = x[i] if x[i] == x[i] else float_of(0x7fc00000)
        out[i] = <uint16_t> ((bits_of(y) + (word ^ noise[i])) >> 16)


cdef void round_number(Py_ssize_t n, uint16_t* out, const float* x, const uint32_t* noise,
                       uint32_t word) noexcept nogil:
    """The same a third faster, but a NaN whose fraction is all ones may become 0."""
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = <uint16_t> ((bits_of(x[i]) + (word ^ noise[i])) >> 16)


cdef void round_anything(Py_ssize_t n, uint16_t* out, const float* x, const uint32_t* noise,
                         uint32_t word) noexcept nogil:
    """The same for any number: NaN stays NaN, and finite numbers stay finite."""
    cdef Py_ssize_t i
    cdef int32_t u, a, h
    for i in range(n):
        u = bits_of(x[i])
        a = u & 0x7fffffff
        h = <int32_t> (a + (word ^ noise[i])) >> 16
        h = 0x7f7f if h > 0x7f7f else h
        h = h if a < 0x7f800000 else (0x7f80 if a == 0x7f800000 else 0x7fc0)
        out[i] = <uint16_t> (h | ((u >> 16) & 0x8000))


cdef void round_float16(Py_ssize_t n, uint16_t* out, const float* x, const uint32_t* noise,
                        uint32_t word) noexcept nogil:
    """NaN stays NaN.  Only what rounding to nearest would make infinite becomes infinite.

    Below 2^-14, the smallest normal number of float16, the fraction counts units of 2^-24.
    """
    cdef Py_ssize_t i
    cdef uint32_t u
    cdef int32_t a, above, below, low, high, r, small, up, over, nan, w
    cdef float units
    for i in range(n):
        u = bits_of(x[i])
        w = word ^ noise[i]
        a = u & 0x7fffffff
        above = a - 0x38800000  # masks, all ones where true: so many selects would become branches
        below = above >> 31
        low = 0x38800000 + (above & below)
        high = 0x38800000 + (above & ~below)
        high = 0x477fe000 if high > 0x477fe000 else high
        units = float_of(low) * <float> 16777216
        small = <int32_t> units
        up = <int32_t> ((units - <float> small) * <float> 16777216)
        small = small - ((w - up) >> 31)  # one more where w < up
        r = (high - 0x38000000 + (w >> 11)) >> 13
        r = r + small - 0x400  # one of them is 2^-14, 0x400
        over = (0x477fefff - a) >> 31
        nan = (0x7f800000 - a) >> 31
        r = (r & ~over) | (over & 0x7c00) | (nan & 0x200)
        out[i] = <uint16_t> (r | ((u >> 16) & 0x8000))


# --- 8 bits ----------------------------------------------------------------------------------------------------------
#
# A block of BLOCK elements shares a scale, a power of two.  A code c is a small floating-point number:
#
#   never negative:  scale 2^(c // 8) (1 + c % 8 / 8)
#   signed:          0 for c = 0, the same as above for c < 128; 128 + c stands for the negative
#
# The head of a float32 is its upper 16 bits.  A code that is shifted into place is a head whose exponent is counted
# from that of the scale, so decoding adds the head of the scale.  Most arithmetic is on heads, because twice as many of
# them fit into a register.  Infinity and NaN are coded too: they raise the scale so far that the other elements of
# their block get the smallest code.
#
# Encoding is tried with the block's last scale, which most blocks keep.  A trial rounds, encodes and finds the largest
# head in one loop.  Only a block with numbers below its smallest code needs another loop.  Exact zeros are common, so
# a trial encodes them itself; but adding noise may have made a tiny head of a NaN, so one cheap loop makes sure.

cdef enum:
    SIGNED_RANGE = 15       # binades above the scale
    UNSIGNED_RANGE = 31
    SIGNED_LOWEST = 21      # the exponent field of the smallest scale, 2^-106: 2^20/scale is finite
    UNSIGNED_LOWEST = 8     # 2^-119: times a beta it is still a normal number, and fast
    INFINITE = 0x7f80       # infinity's head
    TINY_HEAD = 0x10        # a smaller head may be what adding noise made of a NaN
    SURELY_ZERO = 20 << 7   # a number that far below the scale becomes 0, whatever the noise
    TINY = 1 << 16          # found by a trial: there are tiny heads
    SMALL = 2 << 16         # found by a trial: there are small numbers, and perhaps tiny heads


cdef void decode_signed(Py_ssize_t n, float* out, const signed char* code, uint32_t scale) noexcept nogil:
    cdef Py_ssize_t i
    cdef uint16_t h, bottom = scale >> 16
    for i in range(n):
        h = <uint16_t> (<uint16_t> (code[i] * 16) & 0x87f0)  # the sign, and the rest shifted to where it belongs
        h = <uint16_t> (h + (bottom if <uint16_t> (h & 0x7fff) > 0 else 0))
        out[i] = float_of(<uint32_t> h << 16)


cdef void decode_unsigned(Py_ssize_t n, float* out, const uint8_t* code, uint32_t scale) noexcept nogil:
    cdef Py_ssize_t i
    cdef uint16_t h, bottom = scale >> 16
    for i in range(n):
        h = <uint16_t> (<uint16_t> (code[i] << 4) + bottom)
        out[i] = float_of(<uint32_t> h << 16)


cdef int try_unsigned(Py_ssize_t n, uint8_t* code, const float* x, const uint32_t* noise, uint32_t word,
                      uint16_t bottom) noexcept nogil:
    """Form the codes under a scale that may be wrong.  Return the largest head; TINY or more if there are tiny ones.

    A number below the smallest code goes up to it: a second moment of 0 would make a step without bound.
    """
    cdef Py_ssize_t i
    cdef uint16_t h
    cdef int16_t size, high = -0x8000
    for i in range(n):
        h = <uint16_t> ((bits_of(x[i]) + (word ^ noise[i])) >> 16)
        size = <int16_t> (h - TINY_HEAD - 0x8000)  # a tiny head comes out as the largest of all
        high = size if size > high else high
        h = h if h > bottom else bottom
        code[i] = <uint8_t> (<uint16_t> (h - bottom) >> 4)
    return high + 0x8000 + TINY_HEAD


cdef int try_signed(Py_ssize_t n, uint8_t* code, const float* x, const uint32_t* noise, uint32_t word,
                    uint16_t bottom) noexcept nogil:
    """Form the codes under a scale that may be wrong.  Return the largest head, or TINY or SMALL.

    round_small must correct the codes of small numbers: they lie below the smallest code, or the noise may have taken
    them from there to it.  The codes of numbers 20 binades further down, zeros among them, are right.
    """
    cdef Py_ssize_t i
    cdef uint16_t h, size, below, lowest = 0xffff, limit = bottom + 31
    cdef int16_t above
    for i in range(n):
        h = <uint16_t> ((bits_of(x[i]) + (word ^ noise[i])) >> 16)
        size = h & 0x7fff
        below = <uint16_t> (limit - size)  # the larger the number the smaller, but those below the limit come first
        lowest = below if below < lowest else lowest
        above = <int16_t> (size - bottom)
        above = above if above > 0 else 0
        code[i] = <uint8_t> ((<uint16_t> above >> 4) | ((h >> 8) & 0x80))
    if lowest > limit:
        return limit + 0x10000 - lowest
    return SMALL if lowest < SURELY_ZERO + 32 else TINY


cdef uint32_t largest_rounded(Py_ssize_t n, const float* x, const uint32_t* noise, uint32_t word) noexcept nogil:
    """The largest absolute value, as bits with the noise added: more than infinity's for a NaN."""
    cdef Py_ssize_t i
    cdef uint32_t a, largest = 0
    for i in range(n):
        a = (bits_of(x[i]) & 0x7fffffff) + (word ^ noise[i])
        largest = a if a > largest else largest
    return largest


cdef uint16_t largest_size(Py_ssize_t n, const uint16_t* head) noexcept nogil:
    """The largest head without sign."""
    cdef Py_ssize_t i
    cdef int16_t h, high = 0
    for i in range(n):
        h = <int16_t> (head[i] & 0x7fff)
        high = h if h > high else high
    return high


cdef void encode_unsigned(Py_ssize_t n, uint8_t* code, const uint16_t* head, uint16_t bottom) noexcept nogil:
    cdef Py_ssize_t i
    cdef uint16_t h
    for i in range(n):
        h = head[i] if head[i] > bottom else bottom
        code[i] = <uint8_t> (<uint16_t> (h - bottom) >> 4)


cdef void encode_signed(Py_ssize_t n, uint8_t* code, const uint16_t* head, uint16_t bottom) noexcept nogil:
    cdef Py_ssize_t i
    cdef int16_t c
    for i in range(n):
        c = <int16_t> ((head[i] & 0x7fff) - bottom)
        c = c if c > 0 else 0
        code[i] = <uint8_t> ((c >> 4) | ((head[i] >> 8) & 0x80))


cdef void round_small(Py_ssize_t n, uint8_t* code, const float* x, const uint32_t* noise, uint32_t word,
                      uint16_t bottom) noexcept nogil:
    """Round what is below the smallest code to it or to 0, by chance: a first moment must stay unbiased."""
    cdef Py_ssize_t i
    cdef int32_t a, low, up, smallest = <int32_t> (bottom + 16) << 16
    cdef float to_noise = <float> 1048576 / float_of(smallest)
    for i in range(n):
        a = bits_of(x[i]) & 0x7fffffff
        low = smallest if a > smallest else a
        up = <int32_t> (word ^ noise[i]) < <int32_t> (float_of(low) * to_noise)
        up = up | <int32_t> ((bits_of(x[i]) >> 24) & 0x80)
        code[i] = <uint8_t> (code[i] if a >= smallest else up)


cdef int scale_head(int largest, bint signed) noexcept nogil:
    """The head of the scale of a block whose largest head this is."""
    cdef int exponent = (largest >> 7) - (SIGNED_RANGE if signed else UNSIGNED_RANGE)
    return max(exponent, <int> (SIGNED_LOWEST if signed else UNSIGNED_LOWEST)) << 7


cdef float encode_uint8(Py_ssize_t n, uint8_t* code, const float* x, bint signed, const uint32_t* noise,
                        uint32_t word, float scale) noexcept nogil:
    """Encode at most one block, whose last scale is given; return its scale."""
    cdef uint16_t head[BLOCK]
    cdef int found, largest, tried = 0, bottom = bits_of(scale) >> 16
    while True:
        if signed:
            found = try_signed(n, code, x, noise, word, <uint16_t> bottom)
        else:
            found = try_unsigned(n, code, x, noise, word, <uint16_t> bottom)
        largest = found if found < TINY else largest_rounded(n, x, noise, word) >> 16
        if largest >= INFINITE:
            break
        tried, bottom = bottom, scale_head(largest, signed)
        if bottom == tried:
            if found == SMALL:
                round_small(n, code, x, noise, word, <uint16_t> bottom)
            return float_of(<uint32_t> bottom << 16)
    round_anything(n, head, x, noise, word)
    bottom = scale_head(largest_size(n, head), signed)
    if signed:
        encode_signed(n, code, head, <uint16_t> bottom)
        round_small(n, code, x, noise, word, <uint16_t> bottom)
    else:
        encode_unsigned(n, code, head, <uint16_t> bottom)
    return float_of(<uint32_t> bottom << 16)

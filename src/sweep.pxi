# The sweep: one parallel loop over the chunks of all groups' parameter spaces.
#
# A group's arrays, concatenated in order, are its parameter space 0 .. n-1.  It is cut into chunks at multiples of
# CHUNK, never at array starts; a chunk is one segment of each array that reaches into it.  Each state quantity is one
# allocation in this order.  Chunks of all groups are numbered through, so that one `prange` covers a whole step.  A
# plain step, which hands nothing from stage to stage, takes an array's neighbouring chunks as one long segment; any
# other goes through a chunk in tiles, whose buffers stay in the first-level cache.

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    #define ADAPTIVE_C_OPENMP _OPENMP
    #else
    #define ADAPTIVE_C_OPENMP 0
    static int omp_get_max_threads(void) { return 1; }
    #endif
    """
    const int ADAPTIVE_C_OPENMP
    int omp_get_max_threads() nogil

from libc.string cimport memset

cdef enum:
    CHUNK = 4096             # elements: 64 KiB of a float32 Adam step, within every core's second-level cache
    TILE = 1024              # elements, whole blocks of them
    SLOTS = 3                # state arrays of the rule that has most
    PARALLEL_FROM = 1 << 14  # elements: from here on a step takes several threads, and runs without the GIL

cdef enum Format:  # NATIVE: as the rule computes, in float64 or float32
    NATIVE, FLOAT32, BFLOAT16, FLOAT16, UINT8

cdef enum Bounds:
    NO_BOUNDS, SAME_BOUNDS, OWN_BOUNDS

cdef struct Array:
    char* p
    const char* g            # NULL: no gradient in this call
    Format g_format
    Py_ssize_t start, stop   # its place in the group's parameter space
    Py_ssize_t step          # which of Space.steps holds its constants
    char* copy               # the array that receives the updated parameters, or NULL
    bint started             # a step has written its state

cdef struct Group:
    Rule rule
    Options options
    bint wide                # computed in float64
    Format format            # of the parameters
    float* master            # their float32 copy, which the rule works on; NULL: narrow ones are rounded stochastically
    Py_ssize_t size          # elements
    Py_ssize_t first, last   # its arrays are Space.arrays[first:last]
    Py_ssize_t chunk         # the number of its first chunk
    char* state[SLOTS]
    Py_ssize_t state_itemsize[SLOTS]
    Format state_format
    float* scales[SLOTS]     # of UINT8 state, one for each block
    bint signed[SLOTS]       # UINT8 state that may be negative
    bint nearest[SLOTS]      # narrow state that isn't rounded stochastically
    long long* t             # applied steps of each array
    double* product          # NAdam's product of mu of each array, else NULL
    bint narrow_grads        # some gradient of this call is float16 or bfloat16
    double squares           # the sum of its gradients' squares, where a norm is taken
    double factor            # of the gradient: -1 to ascend, the clip coefficient, 1 / loss_scale
    char* ema                # the average of the parameters, or NULL
    double ema_decay
    Format copy_format       # NATIVE: there is no copy
    Bounds bounds
    double low, high
    const char* lows
    const char* highs

cdef struct Space:
    Group* groups
    Array* arrays
    Step* steps
    double* partial          # a reduction's result for each chunk
    Py_ssize_t n_groups, n_arrays, n_chunks
    double max_grad_value    # 0: gradients are not clamped
    bint zero_grad, flush_denormals
    uint64_t seed, t         # of the noise


cdef bint staged(const Space* space, const Group* group) noexcept nogil:
    """Does anything but the rule run?  Then what the stages hand on must stay in cache, and a segment in its chunk."""
    return (group.factor != 1 or space.max_grad_value != 0 or group.bounds != NO_BOUNDS or group.ema != NULL
            or group.copy_format != NATIVE or space.zero_grad or group.format != NATIVE or group.state_format != NATIVE
            or group.narrow_grads or (group.options.weight_decay != 0 and not group.options.decoupled))


cdef void run_segment(const Space* space, const Group* group, const Array* a, floating* p, void** s, Py_ssize_t start,
                      Py_ssize_t n) noexcept nogil:
    """The stages over elements start .. start+n-1 of the parameter space, all of them in array a.

    p, s: the parameters and the state of these elements as the rule takes them.
    """
    cdef floating spare[2][TILE]  # a stage reads one and writes the other
    cdef int turn = 0
    cdef Py_ssize_t at = start - a.start
    cdef const floating* g = <const floating*> a.g + at
    cdef const Options* o = &group.options
    if a.g_format != NATIVE:
        widen(a.g_format, n, spare[turn], a.g, at)
        g = spare[turn]
        turn = 1 - turn
    if group.factor != 1:
        scale(n, spare[turn], g, group.factor)
        g = spare[turn]
        turn = 1 - turn
    if space.max_grad_value != 0:
        clamp_gradient(n, spare[turn], g, space.max_grad_value)
        g = spare[turn]
        turn = 1 - turn
    if o.weight_decay != 0 and not o.decoupled:
        decay_gradient(n, spare[turn], g, p, o.weight_decay)
        g = spare[turn]
    apply_rule(group.rule, n, p, g, s, o, space.steps + a.step)
    if group.bounds == SAME_BOUNDS:
        bound(n, p, group.low, group.high)
    elif group.bounds == OWN_BOUNDS:
        bound_each(n, p, <const floating*> group.lows + start, <const floating*> group.highs + start)
    if group.format != NATIVE:
        store_parameters(space, group, a, n, p, start)
    if group.ema != NULL:
        average(n, <floating*> group.ema + start, p, group.ema_decay)
    if group.copy_format != NATIVE:
        copy_segment(group.copy_format, n, a.copy, at, p)
    if space.zero_grad:
        memset(<char*> a.g + at * gradient_itemsize(group, a), 0, n * gradient_itemsize(group, a))


cdef void store_parameters(const Space* space, const Group* group, const Array* a, Py_ssize_t n, floating* p,
                           Py_ssize_t start) noexcept nogil:
    """Round p into the narrow array a; without a master copy, p becomes what was stored."""
    cdef char* out = a.p + 2 * (start - a.start)
    cdef uint64_t key
    cdef uint32_t word
    cdef Py_ssize_t at, size, done = 0
    if floating is float:
        if group.master != NULL:
            copy_segment(group.format, n, out, 0, p)
            return
        key = noise_key(space.seed, space.t, group - space.groups, 0)
        while done < n:
            at = (start + done) % BLOCK
            size = min(n - done, BLOCK - at)
            word = noise_word(key, (start + done) // BLOCK)
            if group.format == BFLOAT16:
                round_head(size, <uint16_t*> out + done, p + done, noises.bfloat16 + at, word >> (32 - CUT_BFLOAT16))
            else:
                round_float16(size, <uint16_t*> out + done, p + done, noises.float16 + at, word >> (32 - CUT_FLOAT16))
            done += size
        if group.ema != NULL or group.copy_format != NATIVE:
            widen(group.format, n, p, out, 0)


cdef void decode_state(const Group* group, int slot, Py_ssize_t start, Py_ssize_t n, float* out) noexcept nogil:
    """State of elements start .. start+n-1, start on a block; for UINT8 block by block."""
    cdef Py_ssize_t i, size, block
    cdef const uint8_t* code = <const uint8_t*> group.state[slot] + start
    cdef const float* scales = group.scales[slot]
    if group.state_format == BFLOAT16:
        from_bfloat16(n, out, <const uint16_t*> group.state[slot] + start)
        return
    for block in range(start // BLOCK, (start + n - 1) // BLOCK + 1):
        i = block * BLOCK - start
        size = min(n - i, BLOCK)
        if group.signed[slot]:
            decode_signed(size, out + i, <const signed char*> code + i, bits_of(scales[block]))
        else:
            decode_unsigned(size, out + i, code + i, bits_of(scales[block]))


cdef void encode_state(const Group* group, int slot, Py_ssize_t start, Py_ssize_t n, const float* x, bint nearest,
                       uint64_t key) noexcept nogil:
    """The inverse; what was decoded comes out as it was, but for numbers that a new scale leaves too small."""
    cdef Py_ssize_t i, size, block
    cdef uint32_t word
    cdef const Noises* noise = &noises
    if nearest:
        noise = &halves
    for block in range(start // BLOCK, (start + n - 1) // BLOCK + 1):
        i = block * BLOCK - start
        size = min(n - i, BLOCK)
        word = 0 if nearest else noise_word(key, block)
        if group.state_format == BFLOAT16:
            round_head(size, <uint16_t*> group.state[slot] + start + i, x + i, noise.bfloat16,
                       word >> (32 - CUT_BFLOAT16))
        else:
            group.scales[slot][block] = encode_block(size, <uint8_t*> group.state[slot] + start + i, x + i,
                                                     group.signed[slot], noise.uint8, word >> (32 - CUT_UINT8))


cdef Py_ssize_t gradient_itemsize(const Group* group, const Array* a) noexcept nogil:
    return 2 if a.g_format != NATIVE else (8 if group.wide else 4)


cdef void widen(Format kind, Py_ssize_t n, floating* out, const char* g, Py_ssize_t at) noexcept nogil:
    if floating is float:  # float64 parameters take no narrow gradients
        if kind == BFLOAT16:
            from_bfloat16(n, out, <const uint16_t*> g + at)
        else:
            from_float16(n, out, <const uint16_t*> g + at)


cdef void copy_segment(Format kind, Py_ssize_t n, char* copy, Py_ssize_t at, const floating* p) noexcept nogil:
    if kind == FLOAT32:
        to_float32(n, <float*> copy + at, p)
    elif floating is float:  # the narrower ones are refused for float64: it would be rounded twice
        if kind == BFLOAT16:
            to_bfloat16(n, <uint16_t*> copy + at, p)
        else:
            to_float16(n, <uint16_t*> copy + at, p)


cdef Py_ssize_t first_array(const Space* space, const Group* group, Py_ssize_t start) noexcept nogil:
    """The first array of the group that ends behind `start`."""
    cdef Py_ssize_t low = group.first, high = group.last - 1, middle
    while low < high:
        middle = (low + high) // 2
        if space.arrays[middle].stop > start:
            high = middle
        else:
            low = middle + 1
    return low


cdef void run_tile(const Space* space, const Group* group, Py_ssize_t start, Py_ssize_t end,
                   Py_ssize_t* index) noexcept nogil:
    """Elements start .. end-1 of one group's parameter space, array by array; index: of the array that holds `start`.

    At most TILE of them, where anything is handed from stage to stage.
    """
    cdef float decoded[SLOTS][TILE]
    cdef float widened[TILE]
    cdef void* s[SLOTS]
    cdef const Array* a
    cdef bint open = False  # narrow state is decoded for the first array that has a gradient
    cdef Py_ssize_t stop, at = start
    cdef int j
    while at < end:
        a = space.arrays + index[0]
        stop = min(a.stop, end)
        if a.g != NULL and stop > at:
            if group.state_format == NATIVE:
                for j in range(SLOTS):
                    s[j] = group.state[j] + at * group.state_itemsize[j]
            else:
                for j in range(SLOTS):
                    if group.state[j] != NULL and not open:
                        decode_state(group, j, start, end - start, decoded[j])
                    s[j] = decoded[j] + (at - start)
                open = True
            if group.wide:
                run_segment(space, group, a, <double*> a.p + (at - a.start), s, at, stop - at)
            elif group.format == NATIVE:
                run_segment(space, group, a, <float*> a.p + (at - a.start), s, at, stop - at)
            elif group.master != NULL:
                run_segment(space, group, a, group.master + at, s, at, stop - at)
            else:
                widen(group.format, stop - at, widened, a.p, at - a.start)
                run_segment(space, group, a, widened, s, at, stop - at)
        at = stop
        index[0] += at == a.stop
    for j in range(SLOTS if open else 0):
        if group.state[j] != NULL:
            encode_state(group, j, start, end - start, decoded[j], group.nearest[j],
                         noise_key(space.seed, space.t, group - space.groups, 1 + j))


cdef void run_group(const Space* space, const Group* group, Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    """Elements start .. end-1 of one group's parameter space, start on a chunk."""
    cdef Py_ssize_t index = first_array(space, group, start), size = TILE if staged(space, group) else end - start
    while start < end:
        run_tile(space, group, start, min(start + size, end), &index)
        start += size


cdef extern from *:
    """
    #if defined(__x86_64__) || defined(_M_X64)
    #include <xmmintrin.h>
    #define CAN_FLUSH 1
    static inline uint64_t flush_denormals(void) {
        unsigned int old = _mm_getcsr();
        _mm_setcsr(old | 0x8040);  /* FTZ and DAZ */
        return old;
    }
    static inline void restore_denormals(uint64_t old) { _mm_setcsr((unsigned int)old); }
    #elif defined(__aarch64__) && defined(__GNUC__)
    #define CAN_FLUSH 1
    static inline uint64_t flush_denormals(void) {
        uint64_t old;
        __asm__ __volatile__("mrs %0, fpcr" : "=r"(old));
        __asm__ __volatile__("msr fpcr, %0" : : "r"(old | (1 << 24)));
        return old;
    }
    static inline void restore_denormals(uint64_t old) { __asm__ __volatile__("msr fpcr, %0" : : "r"(old)); }
    #else
    #define CAN_FLUSH 0
    static inline uint64_t flush_denormals(void) { return 0; }
    static inline void restore_denormals(uint64_t old) { (void)old; }
    #endif
    """
    const bint CAN_FLUSH
    uint64_t flush_denormals() nogil
    void restore_denormals(uint64_t) nogil


cdef void run_chunks(const Space* space, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Group* group
    cdef Py_ssize_t i, start, end
    cdef uint64_t mode = 0
    if space.flush_denormals:
        mode = flush_denormals()
    for i in range(space.n_groups):
        group = space.groups + i
        start = max((first - group.chunk) * CHUNK, 0)
        end = min((last - group.chunk) * CHUNK, group.size)
        if start < end:
            run_group(space, group, start, end)
    if space.flush_denormals:
        restore_denormals(mode)


cdef void sweep(const Space* space, Py_ssize_t first, Py_ssize_t last, int n_threads) noexcept nogil:
    """Each thread takes neighbouring chunks; should the team be smaller than asked for, a thread takes more parts."""
    cdef Py_ssize_t part, n = last - first
    if n_threads <= 1:
        run_chunks(space, first, last)
    else:
        for part in prange(n_threads, schedule="static", num_threads=n_threads):
            run_chunks(space, first + n * part // n_threads, first + n * (part + 1) // n_threads)

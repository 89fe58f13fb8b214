# The sweep: one parallel loop over the chunks of all groups' parameter spaces.
#
# A group's arrays, concatenated in order, are its parameter space 0 .. n-1.  It is cut into chunks at multiples of
# CHUNK, never at array starts; a chunk is one segment of each array that reaches into it.  Each state quantity is one
# allocation in this order.  Chunks of all groups are numbered through, so that one `prange` covers a whole step.  A
# plain step, which hands nothing from stage to stage, takes an array's neighbouring chunks as one long segment.  Where
# stages run, TILE elements pass through all of them; narrow numbers pass block by block: of 8-bit state, a block shares
# a scale.

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

from libc.stdint cimport uintptr_t
from libc.string cimport memcpy, memset

cdef enum:
    CHUNK = 4096             # elements: the unit of the cut into parts and of the reductions
    TILE = 512               # elements that pass through all stages: they stay in the first-level cache between them
    AHEAD = 512              # elements, by which narrow numbers are asked for before their turn
    SLOTS = 3                # state arrays of the rule that has most
    PARALLEL_FROM = 1 << 14  # elements: from here on a step takes several threads, and runs without the GIL

cdef enum Format:  # NATIVE: as the rule computes, in float64 or float32
    NATIVE, FLOAT32, BFLOAT16, FLOAT16, UINT8

cdef enum Work:          # of a sweep: a step, the first write of all that is held, and those of passes.pxi
    STEP, START, ADD, KEEP, RESTORE

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

cdef struct Undo

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
    uint64_t keys[1 + SLOTS]  # of this step's noise: the parameters', then the state's
    long long* t             # applied steps of each array
    double* product          # NAdam's product of mu of each array, else NULL
    bint narrow_grads        # some gradient of this call is float16 or bfloat16
    bint only_bfloat16       # so is all that comes in: the lower half of a NaN is 0, and noise can't overflow it
    double squares           # the sum of its gradients' squares, where a norm is taken
    double factor            # of the gradient: -1 to ascend, the clip coefficient, 1 / loss_scale
    char* ema                # the average of the parameters, or NULL
    double ema_decay
    Format copy_format       # NATIVE: there is no copy
    Bounds bounds
    double low, high
    const char* lows
    const char* highs
    char* sums               # of gradients, as the rule computes; NULL until they are wanted
    uint8_t* summed          # of each array: is there a sum?
    Undo* undo               # NULL: nothing is kept

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
    """Does anything but the rule run?  Then what the stages hand on must stay in cache, tile by tile."""
    return (group.factor != 1 or space.max_grad_value != 0 or group.bounds != NO_BOUNDS or group.ema != NULL
            or group.copy_format != NATIVE or space.zero_grad or group.narrow_grads
            or (group.options.weight_decay != 0 and not group.options.decoupled))


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
    """Round p, of one block, into the narrow array a; without a master copy, p becomes what was stored."""
    cdef char* out = a.p + 2 * (start - a.start)
    cdef Py_ssize_t at = start % BLOCK
    cdef uint32_t word
    if floating is float:
        if group.master != NULL:
            copy_segment(group.format, n, out, 0, p)
            return
        word = noise_word(group.keys[0], start // BLOCK)
        if group.only_bfloat16:
            round_number(n, <uint16_t*> out, p, noises.bfloat16 + at, word >> (32 - CUT_BFLOAT16))
        elif group.format == BFLOAT16:
            round_head(n, <uint16_t*> out, p, noises.bfloat16 + at, word >> (32 - CUT_BFLOAT16))
        else:
            round_float16(n, <uint16_t*> out, p, noises.float16 + at, word >> (32 - CUT_FLOAT16))
        if group.ema != NULL or group.copy_format != NATIVE:
            widen(group.format, n, p, out, 0)


cdef void decode_block(const Group* group, int slot, Py_ssize_t start, Py_ssize_t n, float* out) noexcept nogil:
    """The narrow state of elements start .. start+n-1, (a part of) one block."""
    cdef const char* code = group.state[slot] + start * group.state_itemsize[slot]
    if group.state_format == BFLOAT16:
        from_bfloat16(n, out, <const uint16_t*> code)
    elif group.signed[slot]:
        decode_signed(n, out, <const signed char*> code, bits_of(group.scales[slot][start // BLOCK]))
    else:
        decode_unsigned(n, out, <const uint8_t*> code, bits_of(group.scales[slot][start // BLOCK]))


cdef void encode_block(const Group* group, int slot, Py_ssize_t start, Py_ssize_t n, const float* x,
                       bint nearest) noexcept nogil:
    """The inverse; what was decoded comes out as it was, but for numbers that a new scale leaves too small."""
    cdef char* code = group.state[slot] + start * group.state_itemsize[slot]
    cdef uint32_t word = 0 if nearest else noise_word(group.keys[1 + slot], start // BLOCK)
    cdef const Noises* noise = &noises
    if nearest:
        noise = &halves
    if group.only_bfloat16:
        round_number(n, <uint16_t*> code, x, noise.bfloat16, word >> (32 - CUT_BFLOAT16))
    elif group.state_format == BFLOAT16:
        round_head(n, <uint16_t*> code, x, noise.bfloat16, word >> (32 - CUT_BFLOAT16))
    else:
        group.scales[slot][start // BLOCK] = encode_uint8(n, <uint8_t*> code, x, group.signed[slot], noise.uint8,
                                                          word >> (32 - CUT_UINT8),
                                                          group.scales[slot][start // BLOCK])


cdef extern from *:
    """
    #if defined(__GNUC__)  /* without the empty statement gcc takes a function of prefetches for one without effect */
    #define PREFETCH(p) do { __builtin_prefetch(p); __asm__ __volatile__(""); } while (0)
    #else
    #define PREFETCH(p) ((void)(p))
    #endif
    """
    void PREFETCH(const void*) nogil


cdef void prefetch(const void* p, Py_ssize_t at, Py_ssize_t itemsize) noexcept nogil:
    """Ask for a block of elements from number `at` on, which may lie beyond the array's end.

    Between the stages the processor's own prefetching loses its thread.
    """
    cdef uintptr_t start = <uintptr_t> p + at * itemsize
    cdef Py_ssize_t i
    for i in range(BLOCK * itemsize // 64):
        PREFETCH(<const void*> (start + 64 * i))


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


cdef void run_arrays(const Space* space, const Group* group, Py_ssize_t start, Py_ssize_t end, Py_ssize_t* index,
                     float** decoded) noexcept nogil:
    """Elements start .. end-1 of one group's parameter space, array by array; index: of the array that holds `start`.

    decoded: the state of these elements, or NULL where the rule takes it as it is stored.
    """
    cdef float widened[BLOCK]
    cdef void* s[SLOTS]
    cdef const Array* a
    cdef Py_ssize_t stop, at = start
    cdef int j
    while at < end:
        a = space.arrays + index[0]
        stop = min(a.stop, end)
        if a.g != NULL and stop > at:
            for j in range(SLOTS):
                s[j] = group.state[j] + at * group.state_itemsize[j] if decoded == NULL else decoded[j] + (at - start)
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


cdef extern from *:
    """
    #if defined(__AVX512F__) && defined(__GNUC__) && !defined(__clang__)
    #define WIDE __attribute__((flatten, target("prefer-vector-width=512"))) void
    #else
    #define WIDE void
    #endif
    """
    # What a function returns that is compiled with all that it calls for 512 bits: conversions gain from them, while a
    # rule by itself is faster with the 256 of setup.py, and a wide load would have to wait for two narrow stores.
    ctypedef void WIDE


cdef WIDE run_block(const Space* space, const Group* group, Py_ssize_t start, Py_ssize_t end,
                    Py_ssize_t* index) noexcept nogil:
    """The same for (a part of) a block whose state or parameters are narrow."""
    cdef float buffer[SLOTS][BLOCK]
    cdef float* decoded[SLOTS]
    cdef const Array* a
    cdef Py_ssize_t i = index[0]
    cdef int j
    while True:  # is there nothing to do?
        a = space.arrays + i
        if a.g != NULL and a.stop > max(start, a.start):
            break
        if a.stop >= end:
            index[0] = i + (a.stop == end)
            return
        i += 1
    if group.master != NULL:
        prefetch(group.master, start + AHEAD, 4)
    else:
        prefetch(a.p, start + AHEAD - a.start, 4 if group.format == NATIVE else 2)
    for j in range(SLOTS):
        decoded[j] = buffer[j]
        if group.state[j] != NULL and group.state_format != NATIVE:
            decode_block(group, j, start, end - start, buffer[j])
    run_arrays(space, group, start, end, index, NULL if group.state_format == NATIVE else decoded)
    prefetch(a.g, start + AHEAD - a.start, gradient_itemsize(group, a))
    for j in range(SLOTS):
        if group.state[j] != NULL:
            prefetch(group.state[j], start + AHEAD, group.state_itemsize[j])
            if group.state_format != NATIVE:
                encode_block(group, j, start, end - start, buffer[j], group.nearest[j])


cdef void run_group(const Space* space, const Group* group, Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    """Elements start .. end-1 of one group's parameter space, start on a chunk."""
    cdef Py_ssize_t stop, index = first_array(space, group, start)
    if group.format != NATIVE or group.state_format != NATIVE:
        while start < end:
            stop = min(start + BLOCK, end)
            run_block(space, group, start, stop, &index)
            start = stop
    elif staged(space, group):
        while start < end:
            stop = min(start + TILE, end)
            run_arrays(space, group, start, stop, &index, NULL)
            start = stop
    else:
        run_arrays(space, group, start, end, &index, NULL)


cdef void start_slot(const Group* group, int slot, Py_ssize_t start, Py_ssize_t n) noexcept nogil:
    """(A part of) a block of state begins as zeros, Adagrad's sum as its option says."""
    cdef char* s = group.state[slot] + start * group.state_itemsize[slot]
    cdef double value = group.options.initial if slot == 0 else 0
    cdef int lowest = SIGNED_LOWEST if group.signed[slot] else UNSIGNED_LOWEST
    cdef float x[BLOCK]
    if group.scales[slot] != NULL:
        group.scales[slot][start // BLOCK] = float_of(<uint32_t> lowest << 23)
    if value == 0:
        memset(s, 0, n * group.state_itemsize[slot])
    elif group.state_format != NATIVE:
        fill(n, x, value)
        encode_block(group, slot, start, n, x, True)
    elif group.wide:
        fill(n, <double*> s, value)
    else:
        fill(n, <float*> s, value)


cdef void start_segment(const Group* group, const Array* a, Py_ssize_t at, Py_ssize_t n,
                        const floating* p) noexcept nogil:
    """Elements at .. at+n-1 of array a, whose values are p, into what begins as they are."""
    if group.master != NULL:
        to_float32(n, group.master + a.start + at, p)
    if group.ema != NULL:
        memcpy(<floating*> group.ema + a.start + at, p, n * sizeof(floating))
    if group.copy_format != NATIVE:
        copy_segment(group.copy_format, n, a.copy, at, p)


cdef void start_block(const Space* space, const Group* group, Py_ssize_t start, Py_ssize_t end,
                      Py_ssize_t* index) noexcept nogil:
    """The first write of all that is held for (a part of) a block; index: of the array that holds `start`."""
    cdef float widened[BLOCK]
    cdef const Array* a
    cdef Py_ssize_t at, n
    cdef int j
    for j in range(SLOTS):
        if group.state[j] != NULL:
            start_slot(group, j, start, end - start)
    while start < end and (group.master != NULL or group.ema != NULL or group.copy_format != NATIVE):
        a = space.arrays + index[0]
        at = start - a.start
        n = min(a.stop, end) - start
        if group.wide:
            start_segment(group, a, at, n, <double*> a.p + at)
        elif group.format == NATIVE:
            start_segment(group, a, at, n, <float*> a.p + at)
        else:
            widen(group.format, n, widened, a.p, at)
            start_segment(group, a, at, n, widened)
        start += n
        index[0] += start == a.stop


cdef void start_group(const Space* space, const Group* group, Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    cdef Py_ssize_t stop, index = first_array(space, group, start)
    while start < end:
        stop = min(start + BLOCK, end)
        start_block(space, group, start, stop, &index)
        start = stop


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


cdef void run_chunks(const Space* space, Work work, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Group* group
    cdef Py_ssize_t i, start, end
    cdef uint64_t mode = 0
    cdef bint flush = space.flush_denormals and (work == STEP or work == ADD)  # the others copy
    if flush:
        mode = flush_denormals()
    for i in range(space.n_groups):
        group = space.groups + i
        start = max((first - group.chunk) * CHUNK, 0)
        end = min((last - group.chunk) * CHUNK, group.size)
        if start >= end:
            continue
        if work == STEP:
            run_group(space, group, start, end)
        elif work == START:
            start_group(space, group, start, end)
        elif work == ADD:
            add_elements(space, group, start, end)
        else:
            move_stepped(space, group, start, end, work == RESTORE)
    if flush:
        restore_denormals(mode)


cdef void sweep(const Space* space, Work work, Py_ssize_t first, Py_ssize_t last, int n_threads) noexcept nogil:
    """Each thread takes neighbouring chunks; should the team be smaller than asked for, a thread takes more parts.

    The system puts a page of memory near the processor that first writes to it.  Therefore what a step sweeps is first
    written in such a sweep too, of as many threads.
    """
    cdef Py_ssize_t part, n = last - first
    if n_threads <= 1:
        run_chunks(space, work, first, last)
    else:
        for part in prange(n_threads, schedule="static", num_threads=n_threads):
            run_chunks(space, work, first + n * part // n_threads, first + n * (part + 1) // n_threads)

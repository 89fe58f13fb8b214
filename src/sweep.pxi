# The sweep: one parallel loop over the chunks of all groups' parameter spaces.
#
# A group's arrays, concatenated in order, are its parameter space 0 .. n-1.  It is cut into chunks at multiples of
# CHUNK, never at array starts; a chunk is one segment of each array that reaches into it.  Each state quantity is one
# allocation in this order.  Chunks of all groups are numbered through, so that one `prange` covers a whole step.  A
# plain step, which hands nothing from stage to stage, takes an array's neighbouring chunks as one long segment.

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

cdef enum:
    CHUNK = 4096             # elements: 64 KiB of a float32 Adam step, within every core's second-level cache
    SLOTS = 3                # state arrays of the rule that has most
    PARALLEL_FROM = 1 << 14  # elements: below, waking a second thread costs more than it saves
    UNLOCK_FROM = 1 << 14    # elements: from here on a step runs without the GIL

cdef struct Array:
    char* p
    const char* g            # NULL: no gradient in this call
    Py_ssize_t start, stop   # its place in the group's parameter space
    Py_ssize_t step          # which of Space.steps holds its constants
    bint started             # a step has written its state

cdef struct Group:
    Rule rule
    Options options
    bint wide                # float64
    Py_ssize_t size          # elements
    Py_ssize_t first, last   # its arrays are Space.arrays[first:last]
    Py_ssize_t chunk         # the number of its first chunk
    char* state[SLOTS]
    Py_ssize_t state_itemsize[SLOTS]
    long long* t             # applied steps of each array
    double* product          # NAdam's product of mu of each array, else NULL

cdef struct Space:
    Group* groups
    Array* arrays
    Step* steps
    Py_ssize_t n_groups, n_arrays, n_chunks


cdef bint staged(const Group* group) noexcept nogil:
    """Does anything but the rule run?  Then what the stages hand on must stay in cache, and a segment in its chunk."""
    return group.options.maximize or (group.options.weight_decay != 0 and not group.options.decoupled)


cdef void run_segment(const Group* group, const Array* a, const Step* k, floating* p, Py_ssize_t start,
                      Py_ssize_t n) noexcept nogil:
    """The stages over elements start .. start+n-1 of the parameter space, all of them in array a, which begins at p."""
    cdef floating negated[CHUNK]
    cdef floating decayed[CHUNK]
    cdef const floating* g = <const floating*> a.g + (start - a.start)
    cdef void* s[SLOTS]
    cdef const Options* o = &group.options
    cdef int j
    p += start - a.start
    for j in range(SLOTS):
        s[j] = group.state[j] + start * group.state_itemsize[j]
    if o.maximize:
        scale(n, negated, g, -1)
        g = negated
    if o.weight_decay != 0 and not o.decoupled:
        decay_gradient(n, decayed, g, p, o.weight_decay)
        g = decayed
    apply_rule(group.rule, n, p, g, s, o, k)


cdef void run_group(const Space* space, const Group* group, Py_ssize_t start, Py_ssize_t end) noexcept nogil:
    """Elements start .. end-1 of one group's parameter space, segment by segment."""
    cdef const Array* a
    cdef Py_ssize_t stop, low = group.first, high = group.last - 1, middle
    cdef bint by_chunk = staged(group)
    while low < high:  # the first array that ends behind `start`
        middle = (low + high) // 2
        if space.arrays[middle].stop > start:
            high = middle
        else:
            low = middle + 1
    while start < end:
        a = space.arrays + low
        stop = min(a.stop, end)
        if by_chunk:
            stop = min(stop, (start // CHUNK + 1) * CHUNK)
        if a.g != NULL and stop > start:
            if group.wide:
                run_segment(group, a, space.steps + a.step, <double*> a.p, start, stop - start)
            else:
                run_segment(group, a, space.steps + a.step, <float*> a.p, start, stop - start)
        start = stop
        low += start == a.stop


cdef void run_chunks(const Space* space, Py_ssize_t first, Py_ssize_t last) noexcept nogil:
    cdef const Group* group
    cdef Py_ssize_t i, start, end
    for i in range(space.n_groups):
        group = space.groups + i
        start = max((first - group.chunk) * CHUNK, 0)
        end = min((last - group.chunk) * CHUNK, group.size)
        if start < end:
            run_group(space, group, start, end)


cdef void sweep(const Space* space, Py_ssize_t first, Py_ssize_t last, int n_threads) noexcept nogil:
    """Each thread takes neighbouring chunks; should the team be smaller than asked for, a thread takes more parts."""
    cdef Py_ssize_t part, n = last - first
    if n_threads <= 1:
        run_chunks(space, first, last)
    else:
        for part in prange(n_threads, schedule="static", num_threads=n_threads):
            run_chunks(space, first + n * part // n_threads, first + n * (part + 1) // n_threads)

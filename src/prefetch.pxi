# Asking for memory before its turn, where the processor can't foresee it.

cdef enum:
    AHEAD = 512              # how many elements before their turn narrow numbers are prefetched
    ROWS_AHEAD = 4           # the same for touched rows


cdef extern from *:
    """
    #if defined(__GNUC__)  /* without the empty statement gcc takes a function of prefetches for one without effect */
    #define PREFETCH(p) do { __builtin_prefetch(p); __asm__ __volatile__(""); } while (0)
    #else
    #define PREFETCH(p) ((void)(p))
    #endif
    """
    void PREFETCH(const void*) nogil


cdef inline void prefetch(const void* p, Py_ssize_t at, Py_ssize_t itemsize) noexcept nogil:
    """Ask for a block's elements from number `at` on, which may lie beyond the array's end.

    Between the stages the processor's own prefetching loses its thread.
    """
    cdef uintptr_t start = <uintptr_t> p + at * itemsize
    cdef Py_ssize_t i
    for i in range(itemsize):  # a block of single bytes has four lines
        PREFETCH(<const void*> start)
        PREFETCH(<const void*> (start + 64))
        PREFETCH(<const void*> (start + 128))
        PREFETCH(<const void*> (start + 192))
        start += BLOCK


cdef inline void prefetch_part(const void* p, Py_ssize_t at, Py_ssize_t itemsize, Py_ssize_t n) noexcept nogil:
    """Ask for elements at .. at+n-1."""
    cdef uintptr_t line = <uintptr_t> p + at * itemsize, end = line + n * itemsize
    if p == NULL:
        return
    line &= ~<uintptr_t> 63
    while line < end:
        PREFETCH(<const void*> line)
        line += 64


cdef APART prefetch_row(const Group* group, const Array* a, Py_ssize_t row) noexcept nogil:
    """Ask for an array's touched row of this number, if there is one: where it lies, the processor can't guess."""
    cdef const Touched* touched = a.touched
    cdef Py_ssize_t n = min(touched.length, BLOCK), at
    cdef int j
    if row >= touched.n:
        return
    at = touched.rows[row] * touched.length
    prefetch_part(a.g, touched.entries[touched.first[row]] * touched.length, gradient_itemsize(group, a), n)
    prefetch_part(a.p, at, parameter_itemsize(group), n)
    if a.behind != NULL:
        PREFETCH(a.behind.done + touched.rows[row])
    at += a.start
    for j in range(SLOTS):
        prefetch_part(group.state[j], at, group.state_itemsize[j], n)
        prefetch_part(group.moments[j], a.first_row + touched.rows[row], native_itemsize(group), 1)
    prefetch_part(group.master, at, sizeof(float), n)
    prefetch_part(group.ema, at, native_itemsize(group), n)


cdef inline void prefetch_ahead(const Group* group, const Piece* piece) noexcept nogil:
    """At the beginning of a touched row, ask for one that comes soon."""
    cdef const Touched* touched = piece.array.touched
    if touched != NULL and piece.at == touched.rows[piece.row] * touched.length:
        prefetch_row(group, piece.array, piece.row + ROWS_AHEAD)

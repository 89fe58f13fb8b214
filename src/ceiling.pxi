# The machine's ceiling: a step's memory traffic with next to no arithmetic, for benchmarks and the demo.

cdef inline void touch_loop(Py_ssize_t n, floating* p, const floating* g, floating* a, floating* b, floating* c,
                            signed char* q, int states, bint signs) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        p[i] = p[i] + g[i]
        if states > 0:
            a[i] = a[i] + g[i]
        if states > 1:
            b[i] = b[i] + g[i]
        if states > 2:
            c[i] = c[i] + g[i]
        if signs:
            q[i] = -q[i]

cdef void touch(Py_ssize_t n, floating* p, const floating* g, floating* a, floating* b, floating* c, signed char* q,
                int states) noexcept nogil:
    if q != NULL:
        if states == 1:
            touch_loop(n, p, g, a, b, c, q, 1, True)
        else:
            touch_loop(n, p, g, a, b, c, q, 2, True)
    elif states == 0:
        touch_loop(n, p, g, a, b, c, q, 0, False)
    elif states == 1:
        touch_loop(n, p, g, a, b, c, q, 1, False)
    elif states == 2:
        touch_loop(n, p, g, a, b, c, q, 2, False)
    else:
        touch_loop(n, p, g, a, b, c, q, 3, False)

cdef void touch_all(Py_ssize_t n, floating* p, const floating* g, floating* a, floating* b, floating* c,
                    signed char* q, int states, int n_threads) noexcept nogil:
    cdef Py_ssize_t thread, start, part = ((n + n_threads - 1) // n_threads + 63) & ~63
    for thread in prange(n_threads, schedule="static", num_threads=n_threads):
        start = thread * part
        if start < n:
            touch(min(part, n - start), p + start, g + start, a + start, b + start, c + start,
                  q + start if q != NULL else q, states)


def ceiling(floating[::1] p, const floating[::1] g, tuple states, int n_threads=0):
    """Read g and read and write p and the state arrays once: each thread one plain loop over a part of its own.

    states: up to three flat arrays of p's dtype, and last perhaps one of int8, each as long as p.
    """
    cdef floating[::1] x
    cdef signed char[::1] signs
    cdef floating* s[3]
    cdef signed char* q = NULL
    cdef int n = 0
    if any(len(x) != p.shape[0] for x in (g, *states)):
        raise ValueError("all arrays must be as long as p")
    if p.shape[0] == 0:
        return
    s[0] = s[1] = s[2] = &p[0]
    for state in states:
        if state.dtype == "int8":
            signs = state
            q = &signs[0]
        else:
            x = state
            s[n] = &x[0]
            n += 1
    with nogil:
        touch_all(p.shape[0], &p[0], &g[0], s[0], s[1], s[2], q, n, get_threads(n_threads))

# The machine's ceiling: the memory traffic of a step with next to no arithmetic, for benchmarks and the demo.
#
# Every array is read, or updated (read and written), or only written, and each of them once.  The arrays take turns, 64
# elements at a time: this is as finely interleaved, and as fast, as one loop over all of them would be, but works for
# several arrays of any types.  An update leaves the values as they were, because the key is 0, which the compiler can't
# know; so a step can be timed on the same arrays.

cdef enum Traffic:
    READ, UPDATE, WRITE

cdef enum:
    STREAMS = 8
    INTERLEAVED = 64  # elements

cdef struct Stream:
    char* p
    Py_ssize_t itemsize
    Traffic traffic

cdef uint64_t unread = 0  # receives the sum of what was read, so that the compiler can't leave the reading out


cdef uint64_t read_words(Py_ssize_t n, const uint64_t* x) noexcept nogil:
    cdef Py_ssize_t i
    cdef uint64_t total = 0
    for i in range(n):
        total += x[i]
    return total


cdef void update_words(Py_ssize_t n, uint64_t* x, uint64_t key) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        x[i] = x[i] ^ key


cdef void write_words(Py_ssize_t n, uint64_t* x, uint64_t key) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        x[i] = key


cdef uint64_t move(const Stream* streams, int n_streams, Py_ssize_t start, Py_ssize_t end, uint64_t key) noexcept nogil:
    cdef Py_ssize_t words
    cdef uint64_t* x
    cdef uint64_t total = 0
    cdef int j
    while start < end:
        for j in range(n_streams):
            x = <uint64_t*> (streams[j].p + start * streams[j].itemsize)
            words = min(end - start, INTERLEAVED) * streams[j].itemsize // 8
            if streams[j].traffic == READ:
                total += read_words(words, x)
            elif streams[j].traffic == UPDATE:
                update_words(words, x, key)
            else:
                write_words(words, x, key)
        start += INTERLEAVED
    return total


def ceiling(tuple read, tuple update=(), tuple write=(), int n_threads=0, uint64_t key=0):
    """Read, update and write flat arrays of one length, each thread a part of its own.

    There may be up to 8 arrays, of any types.  With key=0 the updated arrays keep their values; the written ones are
    filled with the key.
    """
    global unread
    cdef Stream streams[STREAMS]
    cdef Py_ssize_t i, part, n
    cdef int n_streams = 0
    cdef uint64_t total = 0
    arrays = [(x, READ) for x in read] + [(x, UPDATE) for x in update] + [(x, WRITE) for x in write]
    if not 0 < len(arrays) <= STREAMS or any([x.size != arrays[0][0].size for x, _ in arrays]):
        raise ValueError(f"the ceiling takes 1 to {STREAMS} arrays of one length")
    for x, traffic in arrays:
        streams[n_streams].p = <char*> address(x)
        streams[n_streams].itemsize = x.itemsize
        streams[n_streams].traffic = traffic
        n_streams += 1
    n = arrays[0][0].size
    n_threads = get_threads(n_threads) if n >= PARALLEL_FROM else 1
    part = ((n + n_threads - 1) // n_threads + CHUNK - 1) // CHUNK * CHUNK
    with nogil:
        if n_threads <= 1:
            total = move(streams, n_streams, 0, n, key)
        else:
            for i in prange(n_threads, schedule="static", num_threads=n_threads):
                total += move(streams, n_streams, i * part, min((i + 1) * part, n), key)
    unread ^= total

# Gradients of a few rows: entries sorted by their rows, and those of a row summed in the order in which they came.

from libc.stdlib cimport realloc

cdef enum:
    DIGIT = 11               # bits of a row's number that one pass of the sort looks at
    FEW = 32                 # entries that are sorted by insertion

ctypedef fused integer:
    int32_t
    int64_t


# --- summing ---------------------------------------------------------------------------------------------------------

cdef void add_weighted(Py_ssize_t n, floating* s, const floating* g, double weight) noexcept nogil:
    """s <- s + w g, rounded twice."""
    cdef Py_ssize_t i
    cdef floating w = <floating> weight
    for i in range(n):
        s[i] = s[i] + w * g[i]


cdef inline bint is_plain(const Piece* piece) noexcept nogil:
    """Is the gradient of a piece of a touched row one row of the values, as it stands there?"""
    cdef const Touched* touched = piece.array.touched
    return (touched.weights == NULL and piece.array.g_format == NATIVE
            and touched.first[piece.row + 1] - touched.first[piece.row] == 1)


cdef APART sum_row(const Piece* piece, floating* out, const floating** g) noexcept nogil:
    """g <- the gradient of a piece of a touched row, at most CHUNK elements: the values, or their sum in out."""
    cdef const Touched* touched = piece.array.touched
    cdef const floating* x
    cdef floating widened[CHUNK]
    cdef Py_ssize_t n = piece.stop - piece.start, column = piece.at - touched.rows[piece.row] * touched.length, at, j
    cdef Py_ssize_t first = touched.first[piece.row], last = touched.first[piece.row + 1]
    cdef double weight
    if is_plain(piece):
        g[0] = <const floating*> piece.array.g + touched.entries[first] * touched.length + column
        return
    for j in range(first, last):
        at = touched.entries[j] * touched.length + column
        x = <const floating*> piece.array.g + at
        if piece.array.g_format != NATIVE:
            widen(piece.array.g_format, n, widened, piece.array.g, at)
            x = widened
        weight = (<floating*> touched.weights)[j] if touched.weights != NULL else 1
        if j > first and touched.weights != NULL:
            add_weighted(n, out, x, weight)
        elif j > first:
            add(n, out, x)
        elif touched.weights != NULL:
            scale(n, out, x, weight)
        else:
            memcpy(out, x, n * sizeof(floating))
    g[0] = out


# --- sorting ---------------------------------------------------------------------------------------------------------

cdef Py_ssize_t pack(Py_ssize_t k, const integer* indices, Py_ssize_t n_rows, int shift, uint64_t* keys) noexcept:
    """keys <- row and number of each entry, in one word; returns the first entry that is out of range, or -1."""
    cdef Py_ssize_t j
    cdef bint outside = False
    for j in range(k):
        outside |= <uint64_t> <int64_t> indices[j] >= <uint64_t> n_rows
        keys[j] = <uint64_t> indices[j] << shift | <uint64_t> j
    j = 0
    while outside and 0 <= indices[j] < n_rows:
        j += 1
    return j if outside else -1


cdef uint64_t* sort_keys(Py_ssize_t k, uint64_t* keys, uint64_t* spare, int low, int high) noexcept:
    """Sort by bits low .. high-1, in one of two buffers, which is returned.  Keys are in order of their lower bits."""
    cdef Py_ssize_t counts[1 << DIGIT]
    cdef Py_ssize_t j, i, total, n
    cdef uint64_t key
    cdef uint64_t* swapped
    cdef uint64_t mask = (1 << DIGIT) - 1
    j = 1
    while j < k and keys[j - 1] < keys[j]:
        j += 1
    if j >= k:
        return keys
    if k <= FEW:
        for j in range(1, k):
            key, i = keys[j], j
            while i > 0 and keys[i - 1] > key:
                keys[i] = keys[i - 1]
                i -= 1
            keys[i] = key
        return keys
    while low < high:
        memset(counts, 0, sizeof(counts))
        for j in range(k):
            counts[keys[j] >> low & mask] += 1
        total = 0
        for j in range(1 << DIGIT):
            n = counts[j]
            counts[j] = total
            total += n
        for j in range(k):
            key = keys[j]
            i = key >> low & mask
            spare[counts[i]] = key
            counts[i] += 1
        swapped, keys, spare = spare, spare, keys
        low += DIGIT
    return keys


cdef int bits_in(uint64_t x) noexcept:
    cdef int n = 0
    while x:
        n, x = n + 1, x >> 1
    return n


cdef int reserve_entries(Touched* touched, Py_ssize_t k) except -1:
    """Room for k entries.  What earlier calls needed stays."""
    if touched.memory == NULL or touched.room < k:
        memory = realloc(touched.memory, (4 * k + 1) * sizeof(uint64_t))
        if memory == NULL:
            raise MemoryError()
        touched.memory, touched.room = memory, k
    return 0


cdef Py_ssize_t sort_entries(Touched* touched, Py_ssize_t k, const integer* indices, Py_ssize_t n_rows,
                             const Py_ssize_t* bags, const void* weights, Py_ssize_t itemsize) noexcept:
    """Fill `touched`, in which there is room; returns the first entry that is out of range, -1 if there is none.

    bags: of each entry its row of the values; NULL: its own number.  weights: of each entry, or NULL.
    """
    cdef uint64_t* memory = <uint64_t*> touched.memory
    cdef uint64_t* keys = memory
    cdef int shift = bits_in(k)
    cdef Py_ssize_t j, entry, row, n = 0, bad = pack(k, indices, n_rows, shift, keys)
    if bad >= 0:
        return bad
    keys = sort_keys(k, keys, memory + k, shift, shift + bits_in(n_rows))
    touched.rows = <Py_ssize_t*> keys  # each is written where the keys up to it have been read
    touched.entries = <Py_ssize_t*> (memory + k if keys == memory else memory)
    touched.weights = <char*> (memory + 2 * k) if weights != NULL else NULL
    touched.first = <Py_ssize_t*> (memory + 3 * k)
    for j in range(k):
        row, entry = <Py_ssize_t> (keys[j] >> shift), <Py_ssize_t> (keys[j] & ((<uint64_t> 1 << shift) - 1))
        if n == 0 or touched.rows[n - 1] != row:
            touched.rows[n], touched.first[n] = row, j
            n += 1
        touched.entries[j] = entry if bags == NULL else bags[entry]
        if weights != NULL:
            memcpy(touched.weights + j * itemsize, <const char*> weights + entry * itemsize, itemsize)
    touched.first[n] = k
    touched.n = n
    return -1


# --- cutting ---------------------------------------------------------------------------------------------------------

cdef enum:
    ROW_COST = 3             # what stepping a row costs besides reading a gradient for it


cdef Py_ssize_t cost_to(const Array* a, Py_ssize_t row) noexcept nogil:
    """The cost of an array's first touched rows, or of a dense one's elements."""
    if a.g == NULL:
        return 0
    if a.touched == NULL:
        return (ROW_COST + 1) * (a.stop - a.start)
    return a.touched.length * (ROW_COST * row + a.touched.first[row])


cdef Py_ssize_t cut_by_rows(const Space* space, Py_ssize_t part, Py_ssize_t n) noexcept nogil:
    """The position where a part of n begins, all of equal cost."""
    cdef const Group* group
    cdef const Array* a
    cdef Py_ssize_t i, j, cost, low, high, middle, total = 0
    for i in range(space.n_groups):
        group = space.groups[i]
        for j in range(group.n_arrays):
            a = group.arrays + j
            total += cost_to(a, a.touched.n if a.touched != NULL else 0)
    total = <Py_ssize_t> (<double> total / n * part)
    for i in range(space.n_groups):
        group = space.groups[i]
        for j in range(group.n_arrays):
            a = group.arrays + j
            cost = cost_to(a, a.touched.n if a.touched != NULL else 0)
            if cost <= total:
                total -= cost
            elif a.touched == NULL:
                return group.position + a.start + total // (ROW_COST + 1)
            else:
                low, high = 0, a.touched.n - 1
                while low < high:  # the first row that ends after it
                    middle = (low + high) // 2
                    if cost_to(a, middle + 1) > total:
                        high = middle
                    else:
                        low = middle + 1
                return group.position + a.start + a.touched.rows[low] * a.touched.length
    return space.end

# Rows: what the caller hands in as a gradient of a few rows, checked.


cdef str INTEGERS = "int32 or int64"
cdef str FLOATS = "float32 or float64"


cdef bint suits(const Py_buffer* view, str kinds) noexcept:
    cdef bint right = kinds is None
    if kinds is INTEGERS:
        right = is_native(view, b"l") or is_native(view, b"i") or is_native(view, b"q")
    elif kinds is FLOATS:
        right = is_native(view, b"f") or is_native(view, b"d")
    return right and view.ndim > 0 and (kinds is None or view.ndim == 1) and PyBuffer_IsContiguous(view, b"C")


cdef Py_ssize_t checked(x, str name, str kinds, Py_buffer* view) except -2:
    """The length of an array in native byte order and C-contiguous, -1 if it has no dimensions.

    kinds: None for values, of any dimensions and types, which the step checks.  A buffer tells all in a tenth of the
    time that the array's attributes take; these are for what does not fit, and for ml_dtypes' bfloat16, which has none.
    view: the buffer, which is released already.
    """
    cdef Py_ssize_t n = -1
    if type(x) is not ndarray and type(x) is not memmap:
        raise TypeError(f"{name} must be a NumPy array, got {an(type(x).__name__)}; pass np.asarray(x)")
    try:
        PyObject_GetBuffer(x, view, PyBUF_FULL_RO)
    except (ValueError, BufferError):
        pass
    else:
        if suits(view, kinds):
            n = view.shape[0]
        PyBuffer_Release(view)
        if n >= 0:
            return n
    if kinds is not None and (x.dtype.name not in kinds.split(" or ") or not x.dtype.isnative):
        raise TypeError(f"{name} must be {kinds}, got {named(x.dtype)}")
    if kinds is not None and x.ndim != 1:
        raise ValueError(f"{name} must have one dimension, got shape {x.shape}")
    if not x.flags.c_contiguous:
        raise ValueError(f"{name} must be C-contiguous; pass np.ascontiguousarray(x)")
    return len(x) if x.ndim else -1


cdef class Rows:
    """Rows(indices, values, offsets=None, weights=None)\n--\n\n\
A gradient of a few rows of an array; all other rows have none.

    It may stand wherever a gradient array may: ``opt.step(Rows(indices, values))``, and in lists, dicts and groups.
    Row i of an array w is ``w[i]``, so that a table of embeddings has the shape (rows, columns).

    Parameters
    ----------
    indices : (k,) array of int32 or int64
        The rows, in any order.  Negative numbers are refused, not counted from the end.
    values : (k, ...) array
        The gradients, each of the shape of one row, in any number format that a gradient may have; C-contiguous.  With
        `offsets` (bags, ...): one row for each bag, which all indices of the bag have in common.
    offsets : (bags,) array of int32 or int64, optional
        Bag b has the entries ``offsets[b]`` up to ``offsets[b + 1]``, the last bag all that follow, as in
        torch.nn.EmbeddingBag.  The first offset is 0, and they ascend; a bag may be empty.
    weights : (k,) array, optional
        A factor for each entry: float64 for float64 parameters, else float32.  For bags whose mean was taken, 1 / size
        of the bag.

    Attributes
    ----------
    indices, values, offsets, weights
        The arrays themselves, or None.

    Raises
    ------
    TypeError, ValueError
        If something does not fit together; the message names the first offender.  What depends on the parameter (the
        shape of a row, the range of the indices) is checked by the step, before anything is written.

    Notes
    -----
    ::

        G[i] = sum over j with indices[j] == i of values[j]                                  without offsets
        G[i] = sum over j with indices[j] == i of weights[j] * values[bag of j]              with offsets

    A row that is named several times is stepped once, with the sum in the order of j, formed in float32 (float64 for
    float64 parameters).

    Nothing is copied: the arrays are read when the step is made, and not written (with zero_grad=True, `values` is
    zeroed).  It can be pickled and copied, with its arrays.

    Examples
    --------
    >>> import numpy as np
    >>> from adaptive_c import Rows, SGD
    >>> table = np.ones((4, 2))
    >>> opt = SGD(table, lr=0.5)
    >>> opt.step(Rows(np.array([3, 0, 3]), np.ones((3, 2))))
    >>> table[:, 0]
    array([0.5, 1. , 1. , 0. ])
    """
    cdef readonly object indices
    cdef readonly object values
    cdef readonly object offsets
    cdef readonly object weights
    cdef Py_ssize_t k, itemsize  # of the indices, when they were last checked
    cdef const void* start

    def __init__(self, indices, values, offsets=None, weights=None):
        self.indices, self.values, self.offsets, self.weights = indices, values, offsets, weights
        self.check()

    cdef int check(self) except -1:
        """That the arrays fit together, at construction and, since somebody may have written to them, at the step."""
        cdef Py_buffer view
        cdef Py_ssize_t n = checked(self.indices, "indices", INTEGERS, &view), bags = n, weights
        self.k, self.start, self.itemsize = n, view.buf, view.itemsize
        if self.offsets is not None:
            bags = checked(self.offsets, "offsets", INTEGERS, &view)
            self.check_offsets(n)
        if self.weights is not None:
            weights = checked(self.weights, "weights", FLOATS, &view)
            if weights != n:
                raise ValueError(f"weights must have one number for each of the {n} indices, got {weights}")
        if checked(self.values, "values", None, &view) != bags:
            wanted = f"{n} indices" if self.offsets is None else f"{bags} bags"
            raise ValueError(f"values must have one row for each of the {wanted}, got shape {self.values.shape}")
        return 0

    cdef int check_offsets(self, Py_ssize_t k) except -1:
        offsets = self.offsets
        if len(offsets) == 0:
            if k:
                raise ValueError(f"offsets has no bag for the {k} indices")
            return 0
        if offsets[0] != 0:
            raise ValueError(f"offsets[0] must be 0, got {offsets[0]}")
        descends = numpy.flatnonzero(numpy.diff(offsets) < 0)
        if len(descends):
            j = int(descends[0]) + 1
            raise ValueError(f"offsets must ascend, but offsets[{j}] is {offsets[j]}, after {offsets[j - 1]}")
        beyond = numpy.flatnonzero(offsets > k)
        if len(beyond):
            raise ValueError(f"offsets[{beyond[0]}] is {offsets[beyond[0]]}, more than the {k} indices")
        return 0

    def __len__(self):
        return len(self.indices)

    def __repr__(self):
        bags = "" if self.offsets is None else f" in {len(self.offsets)} bags"
        return f"Rows({len(self.indices)} indices{bags}, values of shape {self.values.shape}, {self.values.dtype})"


cdef Rows summed_rows(BoundGroup bound, Py_ssize_t i):
    """A copy of a gradient of rows that is bound, each row once."""
    cdef Group* group = &bound.group
    cdef Array* a = group.arrays + i
    cdef Touched* touched = a.touched
    cdef Piece piece = pieces_from(group, a.start)
    cdef Py_ssize_t row, n, at, itemsize = native_itemsize(group)
    cdef char* sums
    cdef const char* g
    indices = numpy.empty(touched.n, "int64")
    values = numpy.empty((touched.n, *bound.arrays[i].shape[1:]), "float64" if group.wide else "float32")
    memcpy(<void*> address(indices), touched.rows, touched.n * sizeof(Py_ssize_t))
    sums = <char*> address(values)
    piece.most = CHUNK
    while next_stepped(&piece, a.stop):
        n = (piece.stop - piece.start) * itemsize
        at = (piece.row - touched.rows[piece.row]) * touched.length + piece.at
        if group.wide:
            sum_row(&piece, <double*> sums + at, <const double**> &g)
        else:
            sum_row(&piece, <float*> sums + at, <const float**> &g)
        if g != sums + at * itemsize:
            memcpy(sums + at * itemsize, g, n)
    return Rows(indices, values)


cdef Rows joined_rows(list parts):
    """The rows of several gradients, one after the other."""
    cdef Rows part
    if len(parts) == 1:
        return parts[0]
    return Rows(numpy.concatenate([part.indices for part in parts]),
                numpy.concatenate([part.values for part in parts]))


cdef Py_ssize_t bind_rows(BoundGroup bound, Py_ssize_t i, Rows rows, Py_ssize_t nbytes) except -1:
    """Sort the rows of a gradient whose values, so many bytes, are bound; returns the number of elements touched."""
    cdef Touched* touched
    cdef Py_ssize_t itemsize = native_itemsize(&bound.group)
    cdef const Py_ssize_t* bags = NULL
    cdef const void* weights = NULL
    rows.check()
    if rows.weights is not None:
        if rows.weights.dtype.itemsize != itemsize:
            raise TypeError(f"{bound.name(i, True)}: weights are {rows.weights.dtype}, but must be float{8 * itemsize} "
                            f"for {bound.dtype} parameters; convert them")
        weights = <const void*> address(rows.weights)
    if rows.offsets is not None:
        sizes = numpy.diff(rows.offsets, append=rows.k)
        of_entries = numpy.repeat(numpy.arange(len(sizes)), sizes)
        if len(of_entries) != rows.k:  # NumPy's functions are Python: another thread may have run
            raise ValueError(f"{bound.name(i, True)}: its offsets were written to during the call")
        bags = <const Py_ssize_t*> address(of_entries)
    touched = bind_indices(bound, i, True, rows.indices, rows.start, rows.itemsize, rows.k, bags, weights)
    touched.nbytes = nbytes
    return touched.n * touched.length


cdef Touched* bind_indices(BoundGroup bound, Py_ssize_t i, bint grad, indices, const void* start, Py_ssize_t itemsize,
                           Py_ssize_t k, const Py_ssize_t* bags, const void* weights) except NULL:
    """Sort k rows of an array, numbers of so many bytes.  Each has a bag and a weight, or these are NULL.

    grad: they are a gradient's; that is what errors call them.
    """
    cdef Array* a = bound.group.arrays + i
    cdef Touched* touched = bound.touched_rows(i)
    cdef Py_ssize_t n_rows = a.shape[0], bad, wide = native_itemsize(&bound.group)
    if bits_in(k) + bits_in(n_rows) > 64:
        raise ValueError(f"{bound.name(i, grad)} has {k} indices into {n_rows} rows, too many for one call")
    touched.length = (a.stop - a.start) // n_rows if n_rows else 0
    reserve_entries(touched, k)
    if itemsize == 4:
        bad = sort_entries(touched, k, <const int32_t*> start, n_rows, bags, weights, wide)
    else:
        bad = sort_entries(touched, k, <const int64_t*> start, n_rows, bags, weights, wide)
    if bad >= 0:
        raise ValueError(f"{bound.name(i, grad)}: indices[{bad}] is {indices[bad]}; the array has {n_rows} rows, "
                         f"0 .. {n_rows - 1}")
    return touched

# The caller's memory: arrays as buffers, what messages call them, and which of them overlap.

from cpython.buffer cimport PyBUF_FULL_RO, PyBuffer_IsContiguous, PyBuffer_Release, PyObject_GetBuffer
from cpython.ref cimport PyObject
from libc.stdlib cimport calloc, free

import sys
from math import prod

import numpy

cdef extern from *:
    """
    typedef struct {  // what an ndarray begins with, in every NumPy since 1.7
        PyObject_HEAD
        char *data;
        int ndim;
        Py_ssize_t *shape, *strides;
        PyObject *base, *dtype;
        int flags;
    } Ndarray;
    static inline void hold(Py_buffer *view, PyObject *x) { Py_INCREF(x); view->obj = x; }
    """
    ctypedef struct Ndarray:
        char* data
        int ndim
        Py_ssize_t* shape
        PyObject* dtype
        int flags

    void hold(Py_buffer* view, object x)

cdef enum:
    IN_ORDER = 0x101         # flags of NumPy's: C-contiguous and aligned
    WRITABLE = 0x400
    SHARED = -0x80000000     # made by broadcasting: NumPy warns who writes to it

cdef object SINGLE = numpy.dtype("f"), DOUBLE = numpy.dtype("d")  # in native byte order, of which there is one object
cdef char HOST_ORDER = ord("<" if sys.byteorder == "little" else ">")  # as a buffer's format says it
cdef object ndarray = numpy.ndarray
cdef object memmap = numpy.memmap
cdef object MaskedArray = numpy.ma.MaskedArray
cdef dict FORMATS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16, "float64": FLOAT64}
cdef str CAST = ", or construct the optimizer with cast=True"


cdef bint looks_like_ndarray(x):
    """Does an array begin with what Ndarray has?"""
    cdef const Ndarray* a = <const Ndarray*> <PyObject*> x
    cdef int i
    return (type(x).__basicsize__ >= sizeof(Ndarray) and <uintptr_t> a.data == x.__array_interface__["data"][0]
            and a.ndim == x.ndim and a.dtype == <PyObject*> x.dtype and a.flags == x.flags.num
            and tuple([a.shape[i] for i in range(a.ndim)]) == x.shape)


# If a NumPy to come has something else there, its arrays are asked for their buffers, as all but the simplest are.
cdef bint KNOWN = looks_like_ndarray(numpy.ones((2, 3), "f")) and looks_like_ndarray(numpy.ones((5, 4))[::2].T)


cdef bint borrow_array(x, Py_buffer* view) noexcept:
    """Fill `view` with the memory of an array of float32 or float64 in order, in a tenth of the time that NumPy takes.

    False if it is another one, of which only NumPy knows what to say.
    """
    cdef const Ndarray* a = <const Ndarray*> <PyObject*> x
    cdef bint single = a.dtype == <PyObject*> SINGLE
    cdef int i
    view.len = view.itemsize = sizeof(float) if single else sizeof(double)
    if (not KNOWN or not (single or a.dtype == <PyObject*> DOUBLE) or a.flags & (IN_ORDER | SHARED) != IN_ORDER
            or <uintptr_t> a.data % <uintptr_t> view.itemsize):
        return False
    for i in range(a.ndim):
        view.len *= a.shape[i]
    view.format = <char*> (b"f" if single else b"d")
    view.buf, view.ndim, view.shape, view.readonly = a.data, a.ndim, a.shape, not a.flags & WRITABLE
    view.strides = view.suboffsets = NULL  # without strides, elements are in order
    view.internal = NULL
    hold(view, x)
    return True


cdef uintptr_t address(array) except? 0:
    cdef Py_buffer view
    try:
        PyObject_GetBuffer(array, &view, PyBUF_FULL_RO)
    except (ValueError, BufferError):  # bfloat16 of ml_dtypes
        return array.__array_interface__["data"][0]
    PyBuffer_Release(&view)
    return <uintptr_t> view.buf


def an(str name):
    """The name of a type with its article: an int, a float; an SGD and an ndarray, which are spelled."""
    cdef bint spelled = (len(name) > 1 and name[:2].isupper()) or name.startswith("ndarray")
    return f"{'an' if name[:1] in ('AEFHILMNORSXn' if spelled else 'aeioAEIO') else 'a'} {name}"


def counted(n, str noun):
    """A number with its noun, in the singular or the plural."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def pending(n):
    """How a message begins that refuses something because of n accumulated gradients."""
    return f"{counted(n, 'accumulated gradient')} {'is' if n == 1 else 'are'} pending"


cdef str describe(x, tuple items=None):
    """What was given where a structure of arrays is wanted; items: those of a list."""
    if items is not None or isinstance(x, (list, tuple)):
        return f"{an(type(x).__name__)} of {len(x if items is None else items)}"
    if isinstance(x, dict):
        return f"a dict with the keys {', '.join(map(repr, x))}" if x else "an empty dict"
    if x is None:
        return "None"
    return f"an array of shape {x.shape}" if type(x) is ndarray else an(type(x).__name__)


def writable(x):
    """What to do about an array that is read-only."""
    while isinstance(x, ndarray):
        if type(x) is memmap and x.mode is not None:  # a copy of one has none
            return ("it is a memory map: pass x.copy(), or open it with mode='r+'; joblib.Parallel maps arrays over 1 "
                    "MB for its workers, and Parallel(max_nbytes=None) sends them instead")
        x = x.base
    return "pass a writable array: x.copy(), or x after x.flags.writeable = True if the memory is yours"


cdef str named(dtype):
    if not hasattr(dtype, "isnative"):  # a tensor's
        return str(dtype)
    return dtype.name if dtype.isnative else f"{dtype.str} (byte-swapped)"


cdef bint is_native(const Py_buffer* view, char code) noexcept:
    """Is the element type `code` ("f" or "d") in native byte order?"""
    cdef const char* f = view.format
    if f[0] == b"@" or f[0] == b"=" or f[0] == HOST_ORDER:
        f += 1
    return f[0] == code and f[1] == 0


cdef str format_of(const Py_buffer* view, bint bfloat16):
    """The name of a number format that parameters may have, or nothing; bfloat16: uint16 stands for it."""
    if bfloat16 and is_native(view, b"H"):
        return "bfloat16"
    return ("float32" if is_native(view, b"f") else "float64" if is_native(view, b"d")
            else "float16" if is_native(view, b"e") else "")


cdef str hint(const Py_buffer* view):
    return "; if it holds bfloat16 numbers, say uint16_as='bfloat16' instead" if is_native(view, b"H") else ""


cdef str remedy(x, param):
    """For what is no array.  param: the parameter whose gradient it should be; None if it should be one itself."""
    cdef bint grad = param is not None
    cdef str module = type(x).__module__.partition(".")[0]
    if isinstance(x, MaskedArray):
        return "the mask would be ignored: pass x.data, or x.filled(0)"
    if module == "torch" and str(getattr(x, "layout", "torch.strided")) != "torch.strided":
        if grad and str(x.layout) == "torch.sparse_coo" and x.sparse_dim() == 1:
            return "pass adaptive_c.Rows(x._indices()[0].numpy(), x._values().numpy()), or x.to_dense().numpy()"
        return "pass x.to_dense().numpy()"
    if module == "torch" and str(getattr(x, "dtype", "")) == "torch.bfloat16":
        return ("pass x.detach().view(torch.uint16).numpy(), which shares a CPU tensor's memory, and construct the "
                "optimizer with uint16_as='bfloat16'")
    if module == "torch" and hasattr(x, "parameters"):
        return "pass [p.detach().numpy() for p in model.parameters()], which share the model's memory"
    if module == "torch":
        return "pass x.detach().numpy(), which shares a CPU tensor's memory"
    if module == "scipy" and hasattr(x, "toarray"):
        return ("pass x.toarray()" + " or, if few rows have elements, adaptive_c.Rows(i, x[i].toarray()) with x = "
                "x.tocsr() and i = numpy.diff(x.indptr).nonzero()[0]" * grad)
    if isinstance(x, (int, float, complex, numpy.generic)):
        if not grad:
            return "make it an array: np.asarray(x, dtype)"
        return f"make it an array: np.full({param.shape}, x, '{param.dtype}')" + (
            CAST if param.size == 1 and isinstance(x, (float, numpy.floating)) else "")
    if isinstance(x, (list, tuple, dict)) and grad:
        return "gradients come in the structure of the parameters, here one array"
    if isinstance(x, (list, tuple, dict)):
        return "parameters are one array, a list or dict of arrays, or a list of group dicts with 'params'"
    if hasattr(x, "__array__") or isinstance(x, (bytearray, memoryview)):
        return "pass np.asarray(x), if that shares its memory"
    if hasattr(x, "__iter__") and not isinstance(x, (str, bytes)):
        return "pass list(x)"
    return "pass arrays"


cdef str lr_remedy(lr):
    """What was given as the learning rate of a step and is no number, and what to give."""
    if callable(lr):
        return (f"{lr!r:.200}; pass lr=schedule(opt.t), or let all steps follow the schedule: "
                "opt.param_groups[0]['lr'] = schedule")
    if hasattr(lr, "shape"):
        return f"{an(type(lr).__name__)} of shape {tuple(lr.shape)}{'; pass float(lr)' if prod(lr.shape) == 1 else ''}"
    return f"{lr!r:.200}; a list of numbers is for parameters that are a list of group dicts, one number for each group"


cdef bint in_order(const Py_buffer* view) noexcept:
    """Do its elements lie one after the other, aligned?"""
    return PyBuffer_IsContiguous(view, b"C") and (<uintptr_t> view.buf % <uintptr_t> view.itemsize == 0
                                                  or view.len == 0)


cdef (uintptr_t, uintptr_t) reach_of(const Py_buffer* view) noexcept:
    """From where to where elements lie that need not be in order, of an array that has some."""
    cdef uintptr_t low = <uintptr_t> view.buf, high = low
    cdef int i
    for i in range(view.ndim):
        if view.strides[i] < 0:
            low += view.strides[i] * (view.shape[i] - 1)
        else:
            high += view.strides[i] * (view.shape[i] - 1)
    return low, high + view.itemsize


cdef bint meets_itself(const Py_buffer* view) noexcept:
    """May two of its elements lie in the same place?  No slice or transposed view of an array that has each once."""
    cdef int i, j
    cdef Py_ssize_t step, other, below
    for i in range(view.ndim):
        step, below = abs(view.strides[i]), view.itemsize - 1
        for j in range(view.ndim):
            other = abs(view.strides[j])
            if view.shape[j] > 1 and (other < step or (other == step and j < i)):
                below += other * (view.shape[j] - 1)
        if view.shape[i] > 1 and step <= below:
            return True
    return False


cdef str copied(str copy, bint grad):
    return copy if grad else f"keep and use {copy}, which is a copy, not the model's memory"


cdef struct Span:
    uintptr_t low, high
    Py_ssize_t group
    Py_ssize_t item      # the number of a parameter; STATE; or COPIES - the number of an array of copy_to

cdef enum:
    STATE = -1
    COPIES = -2


cdef class Spans:
    """The memory that an optimizer holds or updates, in ascending order; no two spans overlap."""
    cdef Span* spans
    cdef Span* others    # room for as many: those after arrays have moved, or those before
    cdef Py_ssize_t n

    def __cinit__(self, Py_ssize_t n=0):
        self.spans, self.others = <Span*> calloc(n + 1, sizeof(Span)), <Span*> calloc(n + 1, sizeof(Span))
        if self.spans == NULL or self.others == NULL:
            raise MemoryError()
        self.n = n

    def __dealloc__(self):
        free(self.spans)
        free(self.others)

    cdef int swap(self) noexcept:
        self.spans, self.others = self.others, self.spans
        return 0

    cdef Spans joined(self, list new):
        """These and new ones, tuples (low, high, group, item)."""
        cdef Spans both = Spans(self.n + len(new))
        cdef Py_ssize_t i, old = 0
        cdef uintptr_t low, high
        new.sort()
        for i, (low, high, group, item) in enumerate(new):
            while old < self.n and self.spans[old].low <= low:
                both.spans[i + old] = self.spans[old]
                old += 1
            both.spans[i + old] = Span(low, high, group, item)
        memcpy(both.spans + len(new) + old, self.spans + old, (self.n - old) * sizeof(Span))
        return both

    cdef Py_ssize_t overlap(self) noexcept:
        """The number of the first span that the next one overlaps, -1 if there is none."""
        cdef Py_ssize_t i
        for i in range(self.n - 1):
            if self.spans[i].high > self.spans[i + 1].low:
                return i
        return -1

    cdef Py_ssize_t find(self, uintptr_t start, Py_ssize_t size) noexcept:
        """The number of the first span that overlaps this memory, -1 if there is none."""
        cdef Py_ssize_t low = 0, high = self.n, middle
        while low < high:  # the first span that ends after `start`
            middle = (low + high) // 2
            if self.spans[middle].high > start:
                high = middle
            else:
                low = middle + 1
        return low if low < self.n and self.spans[low].low < start + size else -1

# Tensors as buffers, through DLPack's table of C functions: address, shape and strides in tens of nanoseconds, without
# an array, and without knowing the library.
#
# A type that has the table offers it as __dlpack_c_exchange_api__ (DLPack 1.3; PyTorch's has it from 2.10 on).

from cpython.exc cimport PyErr_Clear
from cpython.pycapsule cimport PyCapsule_GetPointer

cdef struct DLTensor:
    void* data
    int32_t device_type
    int32_t device_id
    int32_t ndim
    uint8_t code
    uint8_t bits
    uint16_t lanes
    int64_t* shape
    int64_t* strides         # in elements
    uint64_t byte_offset

ctypedef int (*Borrow)(void* tensor, DLTensor* found) noexcept

cdef struct Exchange:
    uint32_t major
    uint32_t minor
    void* before
    void* allocate
    void* from_object
    void* to_object
    Borrow borrow            # shows memory that stays the tensor's
    void* stream

cdef enum:
    ON_CPU = 1
    DIMENSIONS = 64          # more are refused

cdef class Kind:
    """A type: the function that shows its tensors, if there is one."""
    cdef object type
    cdef Borrow borrow
    cdef bint negates        # a tensor of it may stand for its memory's negative

cdef dict kinds = {}
cdef Kind last_kind = Kind()
cdef Py_ssize_t scattered[DIMENSIONS]  # strides of zero, which no buffer with elements in order has


cdef Kind kind_of(type):
    global last_kind
    cdef Kind kind
    cdef Exchange* table
    if type is last_kind.type:
        return last_kind
    if type not in kinds:
        kind = Kind()
        kind.type, kind.negates = type, hasattr(type, "is_neg")
        capsule = getattr(type, "__dlpack_c_exchange_api__", None)
        if capsule is not None:
            table = <Exchange*> PyCapsule_GetPointer(capsule, b"dlpack_exchange_api")
            if table.major == 1:
                kind.borrow = table.borrow
        kinds[type] = kind
    last_kind = <Kind> kinds[type]
    return last_kind


cdef uintptr_t place_of(x) except? 0:
    """The address of a tensor's first element."""
    cdef Kind kind = kind_of(type(x))
    cdef DLTensor t
    if kind.borrow == NULL or kind.borrow(<void*> x, &t) != 0:
        PyErr_Clear()
        return <uintptr_t> x.data_ptr()
    return <uintptr_t> t.data + t.byte_offset


cdef const char* format_of_tensor(const DLTensor* t) noexcept:
    """The format that a buffer has for such elements; "H" for bfloat16, nothing for what can't be stepped."""
    if t.lanes == 1 and t.code == 2:  # floating-point numbers
        return b"f" if t.bits == 32 else b"d" if t.bits == 64 else b"e" if t.bits == 16 else b""
    return b"H" if t.lanes == 1 and t.code == 4 and t.bits == 16 else b""


cdef int borrow(x, Py_buffer* view) except -2:
    """Fill `view` with a tensor's memory: 1 if it holds bfloat16, 0 if something else; -1 if it can't be had."""
    cdef Kind kind = kind_of(type(x))
    cdef DLTensor t
    cdef Py_ssize_t i, n = 1
    if kind.borrow == NULL or (kind.negates and x.is_neg()):
        return -1
    if kind.borrow(<void*> x, &t) != 0:
        PyErr_Clear()
        return -1
    view.format = <char*> format_of_tensor(&t)
    if t.device_type != ON_CPU or t.ndim > DIMENSIONS or view.format[0] == 0:
        return -1
    view.shape, view.strides, view.suboffsets, view.internal = <Py_ssize_t*> t.shape, NULL, NULL, NULL
    for i in range(t.ndim - 1, -1, -1):
        if t.strides != NULL and t.strides[i] != n and t.shape[i] != 1:
            view.strides = scattered
        n *= t.shape[i]
    view.buf, view.ndim, view.readonly, view.itemsize = <char*> t.data + t.byte_offset, t.ndim, False, t.bits // 8
    view.len = n * view.itemsize
    hold(view, x)
    return t.code == 4

# The parameter space: what a sweep walks over, and the one walker.
#
# A group's arrays, concatenated in order, are its parameter space 0 .. n-1.  It is cut into chunks at multiples of
# CHUNK, never at array starts; each state quantity is one allocation in this order.  A sweep walks over the groups one
# after the other, each from a multiple of CHUNK on: an element's place in it is its position.  So one parallel loop
# covers a whole step.

from libc.stdint cimport uintptr_t
from libc.string cimport memcpy, memset

cdef extern from "Python.h":
    const Py_ssize_t PY_SSIZE_T_MAX

cdef enum:
    CHUNK = 4096             # elements: the unit of the cut into parts and of the reductions
    TILE = 512               # elements that pass through all stages: they stay in the first-level cache between them
    SLOTS = 3                # state arrays of the rule that has most
    KEPT = 2 * SLOTS + 2     # flat arrays of a group: state and its scales, the master copy, the average

cdef enum Format:  # NATIVE: as the rule computes, in float64 or float32
    NATIVE, FLOAT32, BFLOAT16, FLOAT16, UINT8, FLOAT64

cdef enum:
    BEGUN = 1                # for Piece.rows_to

cdef enum Bounds:
    NO_BOUNDS, SAME_BOUNDS, OWN_BOUNDS

cdef struct Touched:         # rows of an array that a gradient has, each once
    Py_ssize_t length        # elements of a row
    Py_ssize_t n             # rows
    Py_ssize_t* rows         # their numbers, ascending
    Py_ssize_t* first        # of each its first entry; and the number of all entries
    Py_ssize_t* entries      # ordered by row: which row of the gradient's values
    char* weights            # of each entry, as the rule computes; NULL: 1
    Py_ssize_t nbytes        # of the values
    void* memory             # of all that, with room for so many entries
    Py_ssize_t room

cdef struct Past:            # a step that rows may have missed
    Options options
    Step step
    uint64_t keys[1 + SLOTS]  # of its noise
    double zero              # what became of a gradient of 0: -0 under maximize, NaN if the norm was that

cdef struct Behind:          # of an array under rows="exact": which steps its rows have missed
    Py_ssize_t length        # elements of a row
    long long made           # steps by rows; a count of its own, since users may write to the array's
    long long* done          # what that was when a row was last up to date; it has missed what is logged since
    Past* log                # the array's last n steps
    Py_ssize_t n, room
    Py_ssize_t* kept         # for a rollback: rows, what they had done, and the length of the log
    Py_ssize_t n_kept, kept_room, log_kept

cdef struct Array:
    char* p
    char* replaced           # what p was before this call put another array into its place
    Behind* behind           # NULL: no step by rows was made, or under rows="lazy"
    const char* g            # NULL: no gradient in this call
    Touched* touched         # NULL: it is dense; otherwise g points to the values of rows
    const Py_ssize_t* strides  # of g, in bytes; NULL: its elements lie one after the other
    Format g_format
    int ndim
    Py_ssize_t* shape
    Py_ssize_t start, stop   # its place in the group's parameter space
    Py_ssize_t row_length    # elements of a row that has one second moment; 0: each element has its own
    Py_ssize_t first_row     # the place of its first row among the group's moments
    Py_ssize_t step          # which of Space.steps holds its constants
    double squared, factor   # as a group's, where each array is clipped by itself
    char* copy               # the array that receives the updated parameters, or NULL

cdef struct Undo:            # a group as it was before the last step
    char* kept[KEPT]         # a copy of each of the group's flat arrays
    char* moments[SLOTS]     # and of its second moments by row
    char* p                  # the parameters in the order of the parameter space
    char* copies             # and the contents of copy_to
    uint8_t* chunks          # of each chunk: is it kept?  One that the step does not change is left out
    uint8_t* started
    long long* t
    double* product          # NULL but for NAdam

cdef struct Group:
    Rule rule
    Options options
    bint followed            # some of them follow schedules
    bint squares             # the rule squares the gradient
    bint wide                # computed in float64
    Format format            # of the parameters
    float* master            # their float32 copy, which the rule works on; NULL: narrow ones are rounded stochastically
    Array* arrays
    Py_ssize_t n_arrays
    Py_ssize_t size          # elements
    Py_ssize_t index         # its number among the groups
    Py_ssize_t first         # the number of its first array among those of all groups
    Py_ssize_t position      # of its first element in the sweep
    char* state[SLOTS]
    Py_ssize_t state_itemsize[SLOTS]
    double state_start[SLOTS]  # the value that each element of a state array starts at
    Format state_format
    char* moments[SLOTS]     # state with one number for each row, as the rule computes; it has no `state`
    bint by_moments          # there is some
    Py_ssize_t n_rows        # of all arrays
    Py_ssize_t longest       # elements of the longest row that has one second moment; at least 1
    float* scales[SLOTS]     # of UINT8 state, one for each block
    bint signed[SLOTS]       # UINT8 state that may be negative
    bint nearest[SLOTS]      # narrow state that isn't rounded stochastically
    uint64_t keys[1 + SLOTS]  # of this step's noise: the parameters', then the state's
    long long* t             # applied steps of each array
    uint8_t* started         # of each array: has a step written its state?
    double* product          # NAdam's product of mu of each array, else NULL
    bint targets             # what this call hands in are targets: the gradient is p - target
    bint formed              # some gradient of this call must be formed: it is narrow, or the difference to a target
    bint by_rows             # some gradient of this call is one of rows
    bint only_bfloat16       # so is all that comes in: the lower half of a NaN is 0, and noise can't overflow it
    double squared           # the sum of its gradients' squares, where a norm is taken
    double own_lr            # while a call has another one instead
    double factor            # of the gradient: -1 to ascend, the clip coefficient, 1 / loss_scale
    float* unrounded         # narrow parameters of rows whose parts wait for each other, before rounding, or NULL
    char* ema                # the average of the parameters, or NULL
    Format copy_format       # NATIVE: there is no copy
    Bounds bounds
    double low, high
    const char* lows
    const char* highs
    char* sums               # of gradients, as the rule computes; NULL until they are wanted
    uint8_t* summed          # of each array: is there a sum?
    Undo* undo               # NULL: nothing is kept
    bint away                # state is not in memory: pointers to it are good within a visit only

cdef struct Space:
    Group** groups
    Step* steps
    double* partial          # a reduction's result for each chunk, or for each chunk of each array
    bint by_array            # each array is clipped by itself: reductions and factors are by array
    Py_ssize_t n_groups, n_arrays
    Py_ssize_t end           # of the sweep, a position
    double max_grad_value    # 0: gradients are not clamped
    bint zero_grad, flush_denormals
    bint by_rows             # some gradient of this call is one of rows
    bint begun               # all of them that this sweep reads have been taken
    uint64_t seed, t         # of the noise

cdef struct Piece:           # neighbouring elements of one array
    const Array* array
    Py_ssize_t start, stop   # in the parameter space
    Py_ssize_t at            # of the first one in the array
    Py_ssize_t row           # of the array's touched rows, the one that they lie in
    Py_ssize_t most          # elements that it may have, where it has a gradient
    # Where rows have second moments: 0: it may reach over several rows.  Otherwise it may not, and a row that ends at
    # or before this element of the parameter space has its moment taken when it is reached.  BEGUN: no row has.
    Py_ssize_t rows_to


cdef Piece pieces_from(const Group* group, Py_ssize_t start) noexcept nogil:
    """Where `next_piece` begins, at element `start` of a group's parameter space."""
    cdef Py_ssize_t low = 0, high = group.n_arrays - 1, middle
    cdef Piece piece
    while low < high:  # the first array that ends after `start`
        middle = (low + high) // 2
        if group.arrays[middle].stop > start:
            high = middle
        else:
            low = middle + 1
    piece.array = group.arrays + low
    piece.start = piece.stop = start
    piece.at = start - piece.array.start
    piece.row = -1
    piece.most = PY_SSIZE_T_MAX
    piece.rows_to = 0
    return piece


cdef inline bint next_piece(Piece* piece, Py_ssize_t end) noexcept nogil:
    """Go on to the next elements before `end` that lie in one array; False if there are none."""
    if piece.stop >= end:
        return False
    piece.start = piece.stop
    while piece.array.stop <= piece.start:
        piece.array += 1
        piece.row = -1
    piece.at = piece.start - piece.array.start
    piece.stop = min(piece.array.stop, end)
    return True


cdef inline bint next_in_array(Piece* piece, Py_ssize_t unit, Py_ssize_t end) noexcept nogil:
    """Go on to the next elements before `end` of the same array that lie in one unit; False if there are none."""
    if piece.stop >= end:
        return False
    piece.at += piece.stop - piece.start
    piece.start = piece.stop
    piece.stop = min((piece.start // unit + 1) * unit, end)
    return True


cdef bint next_row(Piece* piece, Py_ssize_t end) noexcept nogil:
    """Go on from the end of a touched row to the whole next one; False where it is not as simple as that."""
    cdef const Touched* touched = piece.array.touched
    cdef Py_ssize_t at
    if (piece.row < 0 or piece.row + 1 >= touched.n or touched.length > piece.most
            or piece.stop != piece.array.start + (touched.rows[piece.row] + 1) * touched.length):
        return False
    at = touched.rows[piece.row + 1] * touched.length
    if piece.array.start + at + touched.length > end:
        return False
    piece.row += 1
    piece.at = at
    piece.start = piece.array.start + at
    piece.stop = piece.start + touched.length
    return True


cdef inline Py_ssize_t row_end(const Piece* piece) noexcept nogil:
    """Where the row ends in which a piece begins, of those with second moments."""
    cdef Py_ssize_t length = piece.array.row_length
    return piece.start + length - piece.at % length


cdef inline bint cuts_moment(const Group* group, Py_ssize_t at) noexcept:
    """Does an element lie in the middle of a row that has one second moment?"""
    cdef Piece piece = pieces_from(group, at)
    return piece.array.row_length != 0 and piece.at % piece.array.row_length != 0


cdef inline void find_moments(const Group* group, const Piece* piece, void** s) noexcept nogil:
    """Where the second moment of a piece's row lies, or its elements' own."""
    cdef Py_ssize_t row = piece.at
    cdef int j
    if piece.array.touched != NULL and piece.row >= 0:
        row = piece.array.touched.rows[piece.row]
    elif piece.array.row_length != 0:
        row = row // piece.array.row_length
    row = (piece.array.first_row + row) * native_itemsize(group)
    for j in range(SLOTS):
        if group.moments[j] != NULL:
            s[j] = group.moments[j] + row


cdef inline bint next_stepped(Piece* piece, Py_ssize_t end) noexcept nogil:
    """The same for elements that have a gradient, at most piece.most; of rows, for those of one row."""
    if piece.array.touched != NULL and next_row(piece, end):
        return True
    while next_piece(piece, end):
        if piece.array.g != NULL and (piece.array.touched == NULL or to_row(piece)):
            if piece.rows_to != 0 and piece.array.row_length != 0:
                piece.stop = min(piece.stop, row_end(piece))
            if piece.stop - piece.start > piece.most:
                piece.stop = piece.start + piece.most
            return True
    return False


cdef bint to_row(Piece* piece) noexcept nogil:
    """Narrow a piece to its next touched row; False if it has none."""
    cdef const Touched* touched = piece.array.touched
    cdef Py_ssize_t middle, high = touched.n, begin
    if piece.row < 0:  # the first one that ends after the piece begins
        piece.row = 0
        while piece.row < high:
            middle = (piece.row + high) // 2
            if (touched.rows[middle] + 1) * touched.length > piece.at:
                high = middle
            else:
                piece.row = middle + 1
    while piece.row < touched.n and (touched.rows[piece.row] + 1) * touched.length <= piece.at:
        piece.row += 1
    if piece.row == touched.n:
        return False
    begin = piece.array.start + touched.rows[piece.row] * touched.length
    if begin >= piece.stop:
        return False
    piece.start = max(piece.start, begin)
    piece.stop = min(piece.stop, begin + touched.length)
    piece.at = piece.start - piece.array.start
    return True


cdef inline double factor_of(const Space* space, const Group* group, const Array* a) noexcept nogil:
    """What the gradient of an array is multiplied by."""
    return a.factor if space.by_array else group.factor


cdef inline Py_ssize_t native_itemsize(const Group* group) noexcept nogil:
    """Bytes of a number as the rule computes."""
    return 8 if group.wide else 4


cdef inline Py_ssize_t parameter_itemsize(const Group* group) noexcept nogil:
    return native_itemsize(group) if group.format == NATIVE else 2


cdef inline Py_ssize_t itemsize_of(Format kind, Py_ssize_t native) noexcept nogil:
    """Bytes of a number of what is handed in.  native: of one as the rule computes."""
    return native if kind == NATIVE else 8 if kind == FLOAT64 else 4 if kind == FLOAT32 else 2


cdef inline Py_ssize_t gradient_itemsize(const Group* group, const Array* a) noexcept nogil:
    return itemsize_of(a.g_format, native_itemsize(group))


cdef inline Py_ssize_t copy_itemsize(const Group* group) noexcept nogil:
    return 4 if group.copy_format == FLOAT32 else 2


cdef inline Py_ssize_t chunks_to(Py_ssize_t end) noexcept nogil:
    """The number of chunks up to an element's number or a position."""
    return (end + CHUNK - 1) // CHUNK


cdef void widen(Format kind, Py_ssize_t n, floating* out, const char* x, Py_ssize_t at) noexcept nogil:
    """Elements at .. at+n-1 of an array of another format."""
    if floating is float:
        if kind == BFLOAT16:
            from_bfloat16(n, out, <const uint16_t*> x + at)
            return
        if kind == FLOAT16:
            from_float16(n, out, <const uint16_t*> x + at)
            return
    convert(kind, n, out, x, at)


cdef APART convert(Format kind, Py_ssize_t n, floating* out, const char* x, Py_ssize_t at) noexcept nogil:
    """The same, at most CHUNK elements, of formats that only gradients under cast=True have: rounded once, if at all.

    Nothing is flushed to 0 here, or sums of what is converted would differ from sums of what comes converted.
    """
    cdef float narrow[CHUNK]
    cdef uint64_t mode = enter_mode(False)
    if floating is float:
        to_float32(n, out, <const double*> x + at)
    elif kind == FLOAT32:
        to_float64(n, out, <const float*> x + at)
    else:
        widen(kind, n, <float*> narrow, x, at)
        to_float64(n, out, narrow)
    leave_mode(mode, False)


cdef void narrow(Format kind, Py_ssize_t n, char* out, Py_ssize_t at, const floating* x) noexcept nogil:
    """Round into elements at .. at+n-1 of an array of another format, to nearest even."""
    if kind == FLOAT32:
        to_float32(n, <float*> out + at, x)
    elif floating is float:  # the narrower formats are refused for float64: it would be rounded twice
        if kind == BFLOAT16:
            to_bfloat16(n, <uint16_t*> out + at, x)
        else:
            to_float16(n, <uint16_t*> out + at, x)

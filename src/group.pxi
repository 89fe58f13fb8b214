# One parameter group, bound: its arrays, its state, and the numbers that are in force.

from cpython.float cimport PyFloat_AS_DOUBLE, PyFloat_Check
from cython cimport no_gc_clear

cdef dict STATE_FORMATS = {"native": NATIVE, "bfloat16": BFLOAT16, "uint8": UINT8}


cdef class Follower:
    """A schedule, and the number that follows it."""
    cdef str name            # of the option
    cdef Py_ssize_t part     # of a pair
    cdef object schedule
    cdef double low, high    # a number between them needs no further check


@no_gc_clear  # the garbage collector sees the arrays; until the end this object relies on them
cdef class BoundGroup:
    """BoundGroup(guard, rule, squares, keys, arrays, where, uint16_is_bfloat16=False)

    guard: that of the plan that it will be part of.  rule: the name of a rule.  squares: it squares the gradient.
    keys: those of a dict of parameters, None for a list, () for one bare array.  arrays: the parameters, a tuple.
    where: what messages call the parameters.
    """
    cdef Guard guard
    cdef Group group
    cdef Undo undo
    cdef readonly tuple arrays
    cdef readonly object keys
    cdef readonly str dtype      # of the parameters: "float64", "float32", "float16" or "bfloat16"
    cdef readonly dict options   # as they were assigned: numbers, schedules, switches
    cdef readonly long long version  # how often they were assigned
    cdef readonly Py_ssize_t beside_nbytes  # of what it keeps beside the store
    cdef str where, where_grads
    cdef bint bare               # one array, in no structure
    cdef bint uint16_is_bfloat16
    cdef dict ranges             # of an option, for each of its numbers (low, high): between them no check is needed
    cdef double lr_low, lr_high  # those of lr
    cdef object check_followed   # what checks the other values that a schedule may give
    cdef list followers
    cdef list keep               # whatever else its pointers point into
    cdef tuple in_force          # the bounds
    cdef tuple copies            # the arrays of copy_to
    cdef list spans              # of the memory that is not in the plan's index yet
    cdef Py_ssize_t* shapes
    cdef Touched** touched       # of each array, where its rows have been sorted; NULL: none ever were
    cdef public bint takes_tensors   # gradients may be tensors
    cdef dict row_sums           # of arrays that were given nothing but rows: what was accumulated, as lists of Rows
    cdef Py_buffer* grads        # held during a call
    cdef Py_ssize_t n_grads
    cdef readonly object store   # what allocates the sums
    cdef public object layout    # whose arrays are the ones that are bound

    def __init__(self, Guard guard, str rule, bint squares, keys, tuple arrays, str where,
                 bint uint16_is_bfloat16=False):
        cdef Py_ssize_t n = len(arrays)
        if self.arrays is not None:
            raise RuntimeError("a group is bound once")
        self.guard, self.arrays, self.keys, self.where, self.where_grads = guard, arrays, keys, where, "grads"
        self.bare, self.uint16_is_bfloat16 = keys == (), uint16_is_bfloat16
        self.options, self.followers, self.keep, self.spans, self.row_sums = {}, [], [], [], {}
        self.copies = ()
        self.group.rule = <Rule> <int> RULES[rule]
        self.group.squares = squares
        self.group.arrays = <Array*> calloc(n + 1, sizeof(Array))
        self.grads = <Py_buffer*> calloc(n + 1, sizeof(Py_buffer))
        if self.group.arrays == NULL or self.grads == NULL:
            raise MemoryError()
        self.bind()

    def __dealloc__(self):
        cdef Py_ssize_t i
        release(self)
        for i in range(self.group.n_arrays if self.touched != NULL else 0):
            if self.touched[i] != NULL:
                free(self.touched[i].memory)
                free(self.touched[i])
        free(self.touched)
        for i in range(self.group.n_arrays):
            forget_past(self.group.arrays + i)
            free(self.group.arrays[i].behind)
        free(self.group.arrays)
        free(self.shapes)
        free(self.grads)

    cdef bind(self):
        """Look at each array as a buffer: what Python says of an array's size may be a subclass's own idea of it."""
        cdef Py_buffer* view
        cdef Py_ssize_t* shape
        cdef Py_ssize_t i, n_views = 0, dimensions = 0
        cdef Array* a
        try:
            for i, param in enumerate(self.arrays):
                bfloat16 = self.view(param, self.grads + i, i, False)
                n_views += 1
                self.check(self.grads + i, format_of(self.grads + i, bfloat16 or self.uint16_is_bfloat16), param, i)
                dimensions += self.grads[i].ndim
            self.shapes = shape = <Py_ssize_t*> calloc(dimensions + 1, sizeof(Py_ssize_t))
            if shape == NULL:
                raise MemoryError()
            for i in range(n_views):
                view, a = self.grads + i, self.group.arrays + i
                a.p, a.ndim, a.shape = <char*> view.buf, view.ndim, shape
                if view.ndim:  # without dimensions there is no shape
                    memcpy(shape, view.shape, view.ndim * sizeof(Py_ssize_t))
                shape += view.ndim
                a.start = self.group.size
                a.stop = self.group.size = a.start + view.len // view.itemsize
                if view.len:
                    self.spans.append((<uintptr_t> a.p, <uintptr_t> a.p + view.len, i))
            self.group.n_arrays = n_views
        finally:  # the tuple of arrays keeps the memory, and the garbage collector sees it
            for i in range(n_views):
                PyBuffer_Release(self.grads + i)

    cdef check(self, const Py_buffer* view, str kind, param, Py_ssize_t i):
        if kind == "" and param.dtype.kind == "c":
            raise TypeError(f"{self.name(i)} has dtype {named(param.dtype)}; parameters are real: pass "
                            f"z.view('float{4 * param.dtype.itemsize}'), which shares the memory of z, and has real "
                            "and imaginary parts in turn along the last axis")
        if kind == "":
            raise TypeError(f"{self.name(i)} has dtype {named(param.dtype)}; parameters are float32, float64, float16 "
                            f"or bfloat16 in native byte order (keep and use x.astype('float32')){hint(view)}")
        if i and kind != self.dtype:
            raise TypeError(f"{self.name(i)} has dtype {param.dtype}, the arrays before it another; put arrays of "
                            "different dtypes into parameter groups of their own")
        self.dtype = kind
        self.group.wide = kind == "float64"
        self.group.format = FORMATS[kind] if kind in ("float16", "bfloat16") else NATIVE
        self.check_updatable(view, param, i)

    cdef int check_updatable(self, const Py_buffer* view, param, Py_ssize_t i) except -1:
        if view.readonly:
            raise ValueError(f"{self.name(i)} is read-only and can't be updated in place; {writable(param)}")
        return self.check_layout(view, i, False)

    cdef Touched* touched_rows(self, Py_ssize_t i) except NULL:
        """Where the rows of an array's gradients are sorted, kept from call to call."""
        if self.touched == NULL:
            self.touched = <Touched**> calloc(self.group.n_arrays, sizeof(Touched*))
        if self.touched != NULL and self.touched[i] == NULL:
            self.touched[i] = <Touched*> calloc(1, sizeof(Touched))
        if self.touched == NULL or self.touched[i] == NULL:
            raise MemoryError()
        return self.touched[i]

    cdef int view(self, x, Py_buffer* view, Py_ssize_t i, bint grad) except -1:
        """Fill `view`; 1 where x is a bfloat16 array of ml_dtypes, seen as uint16, else 0."""
        cdef int found
        if type(x) is ndarray:
            if borrow_array(x, view):
                return 0
        elif grad and self.takes_tensors:
            found = borrow(x, view)
            if found >= 0:
                return found
        if type(x) is not ndarray and (not isinstance(x, ndarray) or isinstance(x, MaskedArray)):
            kind = "" if type(x).__module__ == "builtins" else type(x).__module__ + "."
            raise TypeError(f"{self.name(i, grad)} is {an(kind + type(x).__qualname__)}, not a numpy.ndarray; "
                            f"{remedy(x, self.arrays[i] if grad else None)}")
        try:
            return PyObject_GetBuffer(x, view, PyBUF_FULL_RO)
        except (ValueError, BufferError) as error:
            if x.dtype.name == "bfloat16":
                PyObject_GetBuffer(x.view("uint16"), view, PyBUF_FULL_RO)
                return 1
            raise TypeError(f"{self.name(i, grad)} has dtype {x.dtype}, which can't be used; convert it: "
                            "x.astype('float32')") from error

    cdef int check_layout(self, const Py_buffer* view, Py_ssize_t i, bint grad, bint castable=False) except -1:
        if not PyBuffer_IsContiguous(view, b"C"):
            raise ValueError(f"{self.name(i, grad)} is not C-contiguous; "
                             f"{copied('np.ascontiguousarray(x)', grad)}{CAST if castable else ''}")
        if <uintptr_t> view.buf % <uintptr_t> view.itemsize and view.len:
            raise ValueError(f"{self.name(i, grad)} is misaligned; {copied('x.copy()', grad)}"
                             f"{CAST if castable else ''}")
        return 0

    cdef str name(self, Py_ssize_t i, bint grad=False):
        """What messages call an array: params, params[3], params['w'], params[1]['params'][3], grads ..."""
        part = f"[{i}]" if self.keys is None else "" if self.bare else f"[{list(self.keys)[i]!r}]"
        return self.place_of(grad) + part

    cdef str place_of(self, bint grad):
        if grad and self.group.targets:
            return "target" + self.where_grads[5:]
        return self.where_grads if grad else self.where

    cdef place(self, Py_ssize_t index, bint structured):
        """Tell what messages call its arrays and their gradients, by its number in a list of groups."""
        self.where = f"params[{index}]['params']" if structured else "params"
        self.where_grads = f"grads[{index}]" if structured else "grads"

    cdef str owner(self, Py_ssize_t item):
        """The same for an item of Span."""
        if item == STATE:
            return "this optimizer's state"
        if item >= 0:
            return self.name(item)
        structured = self.where != "params"
        return self.name(COPIES - item).replace("['params']" if structured else "params",
                                                "['copy_to']" if structured else "copy_to", 1)

    @property
    def sizes(self):
        """The number of elements of each array."""
        return [self.group.arrays[i].stop - self.group.arrays[i].start for i in range(self.group.n_arrays)]

    @property
    def rows(self):
        """The number of rows of each array: its elements along the first axis."""
        return [self.group.arrays[i].shape[0] if self.group.arrays[i].ndim else 1 for i in range(self.group.n_arrays)]

    @property
    def size(self):
        """Elements of its parameter space."""
        return self.group.size

    @property
    def behind(self):
        """Have rows missed steps?"""
        return lags(&self.group)

    cdef int refuse_count(self, Py_ssize_t j) except -1:
        raise ValueError(f"the count of steps of {self.name(j)}, in state['step'], is {self.group.t[j]}; it must be "
                         "in [0, 2**62)")

    cdef int refuse_cuts(self, Py_ssize_t lo, Py_ssize_t hi) except -1:
        """Of a range: its ends must not cut a row that has one second moment, which is taken of the whole row."""
        cdef Piece piece
        for at in (lo, hi):
            piece = pieces_from(&self.group, at)
            if piece.array.row_length != 0 and 0 < piece.at < piece.array.stop - piece.array.start and (
                    piece.at % piece.array.row_length):
                raise ValueError(f"lo and hi must not cut a row under second_moment='row', but {at} cuts row "
                                 f"{piece.at // piece.array.row_length} of "
                                 f"{self.name(piece.array - self.group.arrays)}")
        return 0

    # --- what it holds -------------------------------------------------------------------------------------------

    def attach(self, object store, str kind):
        """Take the arrays of a store, and its counts.  kind: of the state, "native", "bfloat16" or "uint8".

        Where a store begins at a later element than the first, pointers point that far before its arrays.
        """
        cdef Group* group = &self.group
        cdef Py_ssize_t i, length, start = store.start
        counts = store.counts
        group.t = <long long*> address(counts["step"])
        group.started = <uint8_t*> address(counts["started"])
        group.summed = <uint8_t*> address(counts["summed"])
        group.product = <double*> address(counts["mu_product"]) if "mu_product" in counts else NULL
        group.state_format = STATE_FORMATS[kind]
        self.store = store
        self.keep.append(counts)
        for i, (name, slot) in enumerate(store.slots.items()):
            group.signed[i], group.nearest[i] = slot.coding == "signed", slot.coding == "maximum"
            group.state_start[i] = store.starts[name]
            x = store.arrays.get(name)
            if x is not None and name in store.by_row:
                group.moments[i] = self.own(x) - <Py_ssize_t> store.first_row * <Py_ssize_t> x.itemsize
                group.by_moments = True
            elif x is not None:
                group.state[i] = self.own(x) - start * <Py_ssize_t> x.itemsize
                group.state_itemsize[i] = x.itemsize
            scales = store.arrays.get(name + "_scale")
            if scales is not None:
                group.scales[i] = <float*> self.own(scales) - start // BLOCK
        group.longest = 1
        for i, rows in enumerate(self.rows):
            length = (group.arrays[i].stop - group.arrays[i].start) // max(rows, 1)
            group.arrays[i].first_row = group.n_rows
            group.arrays[i].row_length = length if group.by_moments and length > 1 else 0
            group.n_rows += rows
            group.longest = max(group.longest, group.arrays[i].row_length)
        if "master" in store.arrays:
            group.master = <float*> self.own(store.arrays["master"]) - start
        if "ema" in store.arrays:
            group.ema = self.own(store.arrays["ema"]) - start * native_itemsize(group)

    def flat_number(self, name):
        """Which of its flat arrays it is: see `flat_array`."""
        if name == "master" or name == "ema":
            return 2 * SLOTS + (name == "ema")
        names = list(self.store.slots)
        return names.index(name) if name in names else SLOTS + names.index(name.removesuffix("_scale"))

    def cuts_row(self, Py_ssize_t at):
        """Does element `at` lie in the middle of a row that is to sum to one?"""
        return cuts_row(&self.group, at)

    cdef char* own(self, array) except? NULL:
        if type(array) is not ndarray:
            self.group.away = True
            return <char*> PY_SSIZE_T_MAX  # so that it is known to be there, whatever is taken from it
        self.keep.append(array)
        if array.size:
            self.spans.append((address(array), address(array) + array.nbytes, STATE))
        return <char*> address(array)

    def gradients_of(self, list tensors):
        """The gradients of tensors whose memory was bound; None if one of them lies elsewhere by now."""
        cdef Py_ssize_t i
        cdef const Array* a
        cdef list found = []
        for i, x in enumerate(tensors):
            a = self.group.arrays + i
            if a.stop > a.start and <char*> place_of(x) != a.p:
                return None
            found.append(x.grad)
        return found

    def attach_copies(self, str kind, tuple copies):
        """Take the arrays that receive the parameters."""
        cdef Py_ssize_t i
        self.copies = copies
        for i, copy in enumerate(copies):
            self.group.arrays[i].copy = <char*> address(copy)
            if copy.size:
                self.spans.append((address(copy), address(copy) + copy.nbytes, COPIES - i))
        self.group.copy_format = FORMATS[kind]

    cdef attach_sums(self):
        cdef Py_ssize_t start = self.store.start
        self.group.sums = self.own(self.store.add_sums()) - start * native_itemsize(&self.group)

    cdef list new_spans(self):
        """The spans for the plan's index, once."""
        found, self.spans = [(low, high, self.group.index, item) for low, high, item in self.spans], []
        return found

    def decode(self, int slot, out, codes, scales):
        """Narrow state into a flat float32 array.  codes, scales: all of this state."""
        cdef Py_ssize_t i, n = out.size
        cdef float* x = <float*> address(out)
        cdef uint64_t mode = enter_mode(False)
        cdef Group group = self.group
        group.state[slot], group.scales[slot] = <char*> address(codes), NULL
        if scales is not None:
            group.scales[slot] = <float*> address(scales)
        for i in range((n + BLOCK - 1) // BLOCK):
            decode_block(&group, slot, i * BLOCK, min(n - i * BLOCK, BLOCK), x + i * BLOCK)
        leave_mode(mode, False)

    def encode(self, int slot, values):
        """The inverse, rounded to nearest."""
        cdef Py_ssize_t i, n = values.size
        cdef float* x = <float*> address(values)
        self.group.only_bfloat16 = False
        for i in range((n + BLOCK - 1) // BLOCK):
            encode_block(&self.group, slot, i * BLOCK, min(n - i * BLOCK, BLOCK), x + i * BLOCK, True,
                         self.group.keys)

    # --- the numbers that are in force ---------------------------------------------------------------------------

    def follow_by(self, dict ranges, check_followed):
        """ranges: of an option, for each of its numbers (low, high); a number between them needs no further check.
        check_followed(options, name, part, value, t): what a schedule gave otherwise, checked."""
        self.ranges, self.check_followed = ranges, check_followed
        self.lr_low, self.lr_high = ranges["lr"][0]

    def commit_if(self, long long version, dict changes, tuple bounds=None):
        """Take over options that were checked against those of this version; False if there are other ones by now.

        So nothing holds the guard while Python checks them, and no step is refused because another thread assigns.
        """
        self.guard.take(HELD, AVERAGED)
        try:
            if version != self.version:
                return False
            if (bounds is not None or "sum_to_one" in changes or "rows" in changes) and lags(&self.group):
                return False  # the steps that rows have missed are replayed within the old limits: catch up first
            self.commit(changes, bounds)
            return True
        finally:
            self.guard.release()

    def commit(self, dict changes, tuple bounds=None):
        """Take over options, already checked: numbers, pairs, switches, and schedules where numbers may be.

        The caller holds the guard.  An option that follows a schedule keeps its last number until a step.  bounds: None
        leaves them as they are; two numbers of the group's dtype, two flat arrays, or None and None.
        """
        cdef double* numbers = &self.group.options.lr
        cdef int* switches = &self.group.options.eps_mode
        cdef Py_ssize_t j
        if self.guard.holder != HELD:
            raise RuntimeError("options are assigned to a parameter group: group[name] = value")
        self.make_room(changes)
        for j in range(self.group.n_arrays if changes.get("rows") == "lazy" else 0):
            forget_past(self.group.arrays + j)  # rows are up to date, and lazy ones miss nothing
        for name, value in changes.items():
            if name in SWITCHES:
                switches[<int> SWITCHES[name]] = WORDS[value] if isinstance(value, str) else value
            elif name in FIELDS:
                for i, x in enumerate(value if isinstance(value, tuple) else (value,)):
                    if isinstance(x, (int, float)):
                        numbers[<int> FIELDS[name] + i] = x
        self.options.update(changes)
        self.version += 1
        self.find_followers()
        if bounds is not None:
            self.set_bounds(bounds)

    def make_room(self, dict changes):
        """Allocate what options take that are about to be committed: only that may fail for want of memory."""
        cdef bint narrow = self.group.format != NATIVE and self.group.master == NULL
        if changes.get("sum_to_one") and narrow and self.group.unrounded == NULL:
            memory = numpy.empty(self.group.size, "float32")
            self.keep.append(memory)
            self.beside_nbytes += memory.nbytes
            self.group.unrounded = <float*> address(memory)

    def assign(self, name, value):
        """Take over one plain number for another, if it needs no further check: False if it does."""
        now = self.options.get(name)
        if not (PyFloat_Check(value) and PyFloat_Check(now)):
            return False
        if value == now:
            return True
        ranges = self.ranges.get(name)
        if ranges is None:
            return False
        cdef double x = value, low, high
        low, high = ranges[0]
        if not low < x < high:
            return False
        self.guard.take(HELD, AVERAGED)
        try:
            self.options[name] = x
            (&self.group.options.lr)[<int> FIELDS[name]] = x
        finally:
            self.guard.release()
        return True

    cdef set_bounds(self, tuple bounds):
        cdef Group* group = &self.group
        low, high = bounds
        if isinstance(low, ndarray):
            group.lows, group.highs, group.bounds = <const char*> address(low), <const char*> address(high), OWN_BOUNDS
        elif low is None:
            group.bounds = NO_BOUNDS
        else:
            group.low, group.high, group.bounds = low, high, SAME_BOUNDS
        self.in_force = bounds

    cdef find_followers(self):
        cdef Follower follower
        self.followers = []
        for name, value in self.options.items():
            if name not in FIELDS or isinstance(value, float):
                continue
            for part, schedule in enumerate(value if isinstance(value, tuple) else (value,)):
                if callable(schedule):
                    follower = Follower.__new__(Follower)
                    follower.name, follower.part, follower.schedule = name, part, schedule
                    ranges = self.ranges.get(name, ())
                    whole = isinstance(value, tuple) or len(ranges) == 1  # otherwise it has to give a pair
                    follower.low, follower.high = ranges[part] if whole and ranges else (1, 0)
                    self.followers.append(follower)
        self.group.followed = len(self.followers) > 0

    cdef int follow(self, long long t) except -1:
        """Have the schedules give the numbers of the step after t applied ones.  They may be any Python code."""
        cdef Follower f
        cdef double* numbers
        cdef double x
        cdef Py_ssize_t i
        for f in self.followers:
            numbers = &self.group.options.lr + <Py_ssize_t> FIELDS[f.name] + f.part
            try:
                value = f.schedule(t)
            except Exception as error:
                error.add_note(f"raised by the schedule of param_groups[{self.group.index}]: at t={t} {f.name}: "
                               f"{f.schedule!r}")
                raise
            if PyFloat_Check(value):
                x = PyFloat_AS_DOUBLE(value)
                if f.low < x < f.high:
                    numbers[0] = x
                    continue
            value = self.check_followed(self.options, f.name, f.part, value, t)
            for i, part in enumerate(value if isinstance(value, tuple) else (value,)):
                numbers[i] = part
        return 0

    cdef double checked_lr(self, lr, long long t) except? -1:
        """A number in place of the group's lr, in the step after t applied ones: checked as that is."""
        if PyFloat_Check(lr) and self.lr_low < PyFloat_AS_DOUBLE(lr) < self.lr_high:
            return PyFloat_AS_DOUBLE(lr)
        if not isinstance(lr, (int, float, numpy.number)):
            raise TypeError(f"lr of a step must be a number, got {lr_remedy(lr)}")
        return self.check_followed(self.options, "lr", 0, lr, t)

    cdef replace(self, dict old, dict new):
        """Replace old schedules by new ones, unless another one was assigned meanwhile."""
        self.options.update({name: x for name, x in new.items() if self.options[name] is old[name]})
        self.version += 1
        self.find_followers()

# The plan binds parameters and state once, so that a step only acquires the gradients, forms the constants, sweeps and
# counts.  Everything is checked before the first write.

from cpython.bytearray cimport PyByteArray_AS_STRING
from cpython.buffer cimport PyBUF_FULL_RO, PyBuffer_IsContiguous, PyBuffer_Release, PyObject_GetBuffer
from cpython.object cimport PyObject_GenericSetAttr
from cpython.pythread cimport PyThread_get_thread_ident
from libc.stdlib cimport calloc, free
from libc.math cimport NAN, fabs, isinf
from libc.string cimport memcmp, memcpy

from weakref import ref

import numpy

cdef extern from *:
    """
    #if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    #define LITTLE_ENDIAN_HOST 0
    #else
    #define LITTLE_ENDIAN_HOST 1
    #endif
    """
    const bint LITTLE_ENDIAN_HOST

cdef object ndarray = numpy.ndarray
cdef object MaskedArray = numpy.ma.MaskedArray

cdef enum OnNonfinite:
    IGNORE, SKIP, RAISE

cdef str rule_names = "sgd momentum adagrad rmsprop adadelta adam adamax nadam radam lion rprop supersab"
cdef dict RULES = {name: i for i, name in enumerate(rule_names.split())}
cdef dict EPS_MODES = {"outside": OUTSIDE, "inside": INSIDE, "hat": HAT}
cdef dict ON_NONFINITE = {"ignore": IGNORE, "skip": SKIP, "raise": RAISE}
cdef dict FORMATS = {"float32": FLOAT32, "bfloat16": BFLOAT16, "float16": FLOAT16}
cdef dict VARIANTS = {"irprop-": IRPROP_MINUS, "rprop+": RPROP_PLUS, "rprop-": RPROP_MINUS}


cdef Options as_options(dict d) except *:
    """An optimizer's options, already checked, as the struct that the rules read."""
    cdef Options o
    o.lr = d["lr"]
    o.weight_decay = d.get("weight_decay", 0)
    o.eps = d.get("eps", 0)
    o.beta1, o.beta2 = d.get("betas") or (d.get("alpha", d.get("rho", 0)), 0)
    o.momentum = d.get("momentum", 0)
    o.dampening = d.get("dampening", 0)
    o.lr_decay = d.get("lr_decay", 0)
    o.momentum_decay = d.get("momentum_decay", 0)
    o.initial = d.get("initial_accumulator_value", 0)
    o.eta_minus, o.eta_plus = d.get("etas") or (d.get("eta_minus", 0), d.get("eta_plus", 0))
    o.step_min, o.step_max = d.get("step_sizes") or (0, d.get("max_rate", 0))
    o.eps_mode = EPS_MODES[d.get("eps_mode", "outside")]
    o.variant = VARIANTS[d.get("variant", "irprop-")]
    o.nesterov = d.get("nesterov", False)
    o.maximize = d.get("maximize", False)
    o.amsgrad = d.get("amsgrad", False)
    o.centered = d.get("centered", False)
    o.decoupled = d.get("decoupled_weight_decay", False)
    return o


cdef uintptr_t address(array) except? 0:
    return array.__array_interface__["data"][0]


cdef str describe(x):
    if isinstance(x, (list, tuple)):
        return f"a {type(x).__name__} of {len(x)}"
    if isinstance(x, dict):
        return f"a dict with the keys {', '.join(map(repr, x))}" if x else "an empty dict"
    return f"{'an array of shape ' + str(x.shape) if type(x) is ndarray else type(x).__name__}"


cdef str named(dtype):
    return dtype.name if dtype.isnative else f"{dtype.str} (byte-swapped)"


cdef bint is_native(const Py_buffer* view, char code) noexcept:
    """Is the element type `code` ("f" or "d") in native byte order?"""
    cdef const char* f = view.format
    if f[0] == b"@" or f[0] == b"=" or f[0] == (b"<" if LITTLE_ENDIAN_HOST else b">"):
        f += 1
    return f[0] == code and f[1] == 0


cdef void swap(char* a, char* b, Py_ssize_t size) noexcept:
    cdef char spare[4096]
    cdef Py_ssize_t n
    while size > 0:
        n = min(size, 4096)
        memcpy(spare, a, n)
        memcpy(a, b, n)
        memcpy(b, spare, n)
        a, b, size = a + n, b + n, size - n


# PyTorch's torch.amp.GradScaler, whose defaults these are.
cdef enum:
    GROWTH_INTERVAL = 2000  # clean steps
cdef double FIRST_SCALE = 65536, SMALLEST_SCALE = 2.0 ** -126, LARGEST_SCALE = 2.0 ** 126
cdef double SMALLEST_NORMAL = 2.0 ** -126  # of float32


def scale_limits():
    """Of a dynamic loss scale: the smallest, the largest, and the clean steps behind which it grows."""
    return SMALLEST_SCALE, LARGEST_SCALE, GROWTH_INTERVAL


cdef struct Counts:  # all that a step counts, beside each array's own
    long long t, skipped_steps, growth_tracker
    double loss_scale, grad_norm


cdef class Plan:
    """Plan(rule, groups, structured=False, uint16_is_bfloat16=False): parameters and state, bound for stepping.

    groups is a list of pairs (keys, arrays): the keys of a dict of parameters, None for a list, () for one bare array.
    structured: the caller gave a list of groups, and gives gradients as a list with one entry per group.
    uint16_is_bfloat16: so are uint16 parameters and gradients taken.
    """
    cdef Space space
    cdef Py_buffer* p_views      # held for the life of the plan, so that no parameter is freed
    cdef Py_buffer* g_views      # held during a step
    cdef Py_ssize_t n_bound, n_acquired
    cdef uintptr_t* memory       # the bounds of all parameters and states: low, high, low, high ... ascending
    cdef Py_ssize_t n_memory
    cdef list owners             # the same with whose it is: (low, high, group, array or -1 for state)
    cdef list keys, keep
    cdef dict bounds             # of each group: held while the sweep may read them
    cdef readonly bint structured
    cdef bint busy               # in a step, or held
    cdef bint retired            # another plan has taken over
    cdef long writer             # the thread that holds it to write a state, 0 where none does
    cdef readonly dict settings
    cdef uint64_t apart          # a hash of gradient buffers that were found not to overlap
    cdef double max_grad_norm
    cdef readonly double loss_scale
    cdef OnNonfinite on_nonfinite
    cdef public int n_threads    # 0: not chosen
    cdef readonly double grad_norm  # of the last step, unscaled and unclipped; NaN if none was taken
    cdef readonly long long skipped_steps
    cdef bint uint16_is_bfloat16
    cdef readonly bint closed      # averaged parameters are in place: no step now
    cdef list aside                # narrow parameters as they were, while their averages are in place
    cdef readonly long long t      # applied steps
    cdef readonly long long pending  # calls of accumulate since the last step
    cdef readonly bint dynamic     # the loss scale is
    cdef readonly long long growth_tracker  # clean steps since the loss scale last changed
    cdef bint zero_grad
    cdef readonly bint keeps_undo, undoable
    cdef Counts before             # the last step
    cdef readonly Py_ssize_t undo_nbytes
    cdef list moved                # by a metric with the last step: each group's schedules before and after
    cdef readonly dict scheduled   # group: a weak reference to what has its schedules, and refers to this plan

    def __cinit__(self, str rule, list groups, bint structured=False, bint uint16_is_bfloat16=False):
        cdef Py_ssize_t n = sum([len(arrays) for _, arrays in groups])
        self.space.groups = <Group*> calloc(len(groups) + 1, sizeof(Group))
        self.space.arrays = <Array*> calloc(n + 1, sizeof(Array))
        self.space.steps = <Step*> calloc(n + 1, sizeof(Step))
        self.p_views = <Py_buffer*> calloc(n + 1, sizeof(Py_buffer))
        self.g_views = <Py_buffer*> calloc(n + 1, sizeof(Py_buffer))
        self.loss_scale = 1
        self.grad_norm = NAN
        if (self.space.groups == NULL or self.space.arrays == NULL or self.space.steps == NULL or self.p_views == NULL
                or self.g_views == NULL):
            raise MemoryError()

    def __init__(self, str rule, list groups, bint structured=False, bint uint16_is_bfloat16=False):
        cdef Py_ssize_t i
        if self.n_bound:
            raise RuntimeError("a plan is bound once")
        self.structured = structured
        self.uint16_is_bfloat16 = uint16_is_bfloat16
        self.keys = [keys for keys, _ in groups]
        self.keep, self.owners, self.bounds, self.scheduled = [], [], {}, {}
        for i in range(len(groups)):
            self.space.groups[i].rule = <Rule> <int> RULES[rule]
            self.bind_group(i, groups[i][1])
        self.index_memory()
        self.space.partial = <double*> calloc(self.space.n_chunks + 1, sizeof(double))
        if self.space.partial == NULL:
            raise MemoryError()

    def __dealloc__(self):
        cdef Py_ssize_t i
        for i in range(self.n_bound):
            PyBuffer_Release(self.p_views + i)
        free(self.space.groups)
        free(self.space.arrays)
        free(self.space.steps)
        free(self.p_views)
        free(self.g_views)
        free(self.memory)
        free(self.space.partial)

    cdef bind_group(self, Py_ssize_t index, tuple params):
        cdef Group* group = self.space.groups + index
        cdef Array* a
        cdef Py_buffer* view
        cdef Py_ssize_t i
        self.space.n_groups += 1
        group.first = group.last = self.n_bound
        group.chunk = self.space.n_chunks
        for i, param in enumerate(params):
            view = self.p_views + self.n_bound
            kind = self.format(view, self.view(param, view, index, i))
            self.n_bound += 1
            if kind == "":
                raise TypeError(f"{self.name(index, i)} has dtype {named(param.dtype)}; parameters are float32, "
                                "float64, float16 or bfloat16 in native byte order (keep and use x.astype('float32'))"
                                + self.hint(view))
            if i and kind != self.dtype(index):
                raise TypeError(f"{self.name(index, i)} has dtype {param.dtype}, the arrays before it another; "
                                "put arrays of different dtypes into parameter groups of their own")
            group.wide = kind == "float64"
            group.format = FORMATS[kind] if kind in ("float16", "bfloat16") else NATIVE
            if view.readonly:
                raise ValueError(f"{self.name(index, i)} is read-only and can't be updated in place; pass a writable "
                                 "array (x.copy(), or x.flags.writeable = True if the memory is yours)")
            self.check_layout(view, index, i, False)
            a = self.space.arrays + group.last
            a.p = <char*> view.buf
            a.start = group.size
            a.stop = group.size = a.start + view.len // view.itemsize
            group.last = self.n_bound
            if view.len:
                self.owners.append((<uintptr_t> a.p, <uintptr_t> a.p + view.len, index, i))
        self.space.n_arrays = group.last
        self.space.n_chunks += (group.size + CHUNK - 1) // CHUNK

    def attach(self, Py_ssize_t index, tuple state, str kind, tuple codings, t, product, master, ema):
        """Give a group its state, flat arrays in the order of the parameter space.

        state: for each of the rule's slots an array, or None, or for "uint8" a pair of codes and scales.  kind: its
        format, "native", "bfloat16" or "uint8".  codings: for each slot "signed", "unsigned" or "maximum".  t: the
        applied steps of each array, int64.  product: NAdam's product of each array, float64, or None.  master: the
        float32 copy of narrow parameters, or None.  ema: their average, or None.
        """
        cdef Group* group = self.space.groups + index
        cdef Py_ssize_t i
        group.t = <long long*> address(t)
        group.product = <double*> address(product) if product is not None else NULL
        group.state_format = {"native": NATIVE, "bfloat16": BFLOAT16, "uint8": UINT8}[kind]
        self.keep.append((t, product))
        for i, (x, coding) in enumerate(zip(state, codings)):
            if x is None or not group.size:
                continue
            group.signed[i], group.nearest[i] = coding == "signed", coding == "maximum"
            if group.state_format == UINT8:
                x, scales = x
                group.scales[i] = <float*> self.own(index, scales)
            group.state[i] = self.own(index, x)
            group.state_itemsize[i] = x.itemsize
        if master is not None and group.size:
            group.master = <float*> self.own(index, master)
        if ema is not None and group.size:
            group.ema = self.own(index, ema)
        self.index_memory()

    cdef char* own(self, Py_ssize_t index, array) except? NULL:
        self.keep.append(array)
        self.owners.append((address(array), address(array) + array.nbytes, index, -1))
        return <char*> address(array)

    def attach_copies(self, Py_ssize_t index, str kind, tuple copies):
        """Give a group the arrays that receive its parameters."""
        cdef Group* group = self.space.groups + index
        cdef Py_ssize_t i
        self.keep.append(copies)
        for i, copy in enumerate(copies):
            self.space.arrays[group.first + i].copy = <char*> address(copy)
            if copy.size:
                self.owners.append((address(copy), address(copy) + copy.nbytes, index, -2 - i))
        self.index_memory()
        group.copy_format = FORMATS[kind]

    def take_over(self, Plan old):
        """Go on where another plan is, held, whose groups are the first of this one: its state, options and counts."""
        memcpy(self.space.groups, old.space.groups, old.space.n_groups * sizeof(Group))
        memcpy(self.space.arrays, old.space.arrays, old.space.n_arrays * sizeof(Array))
        self.keep += old.keep
        self.bounds.update(old.bounds)
        self.scheduled.update(old.scheduled)
        self.owners += [owner for owner in old.owners if owner[3] < 0]  # the parameters are bound already
        self.index_memory()
        self.t, self.n_threads, self.grad_norm = old.t, old.n_threads, old.grad_norm
        self.skipped_steps = old.skipped_steps
        self.dynamic, self.loss_scale, self.growth_tracker = old.dynamic, old.loss_scale, old.growth_tracker
        self.keeps_undo, self.undo_nbytes = old.keeps_undo, old.undo_nbytes  # a step was of fewer groups: no undoing it

    def publish(self, optimizer, dict attributes, groups, Plan old=None):
        """Let an optimizer and its groups have this plan, and what came with it, in place of the old: all at once."""
        for group in groups:
            group._plan = self
        for name, value in attributes.items():
            PyObject_GenericSetAttr(optimizer, name, value)
        if old is not None:
            old.retired = True  # a thread that has looked it up already would step without the new group

    def start(self, Py_ssize_t first=0):
        """The first write of all that is held, and of the copies, from group `first` on.

        Called once nothing can be refused any more.
        """
        cdef Py_ssize_t i, work = 0, chunk = self.space.groups[first].chunk
        for i in range(first, self.space.n_groups):
            work += self.space.groups[i].size
        self.run(START, work, chunk, self.space.n_chunks, self.team(work, self.space.n_chunks - chunk))

    def decode(self, Py_ssize_t index, int slot, out):
        """A group's narrow state into a flat float32 array."""
        cdef Py_ssize_t i, n = out.size
        cdef float* x = <float*> address(out)
        for i in range((n + BLOCK - 1) // BLOCK):
            decode_block(self.space.groups + index, slot, i * BLOCK, min(n - i * BLOCK, BLOCK), x + i * BLOCK)

    def encode(self, Py_ssize_t index, int slot, values, Py_ssize_t start=0):
        """The inverse, rounded to nearest, from element `start` on, in whole blocks of 256 or up to the end."""
        cdef Py_ssize_t i, n = values.size
        cdef float* x = <float*> address(values)
        self.space.groups[index].only_bfloat16 = False
        for i in range((n + BLOCK - 1) // BLOCK):
            encode_block(self.space.groups + index, slot, start + i * BLOCK, min(n - i * BLOCK, BLOCK), x + i * BLOCK,
                         True)

    cdef swap_averages(self, bint entering):
        """Exchange parameters and averages, in one go that nothing interrupts; no step until they are back.

        Narrow parameters are put aside meanwhile: an average is not narrow.
        """
        cdef Group* group
        cdef Array* a
        cdef Py_ssize_t i, j, n, size
        if entering:  # (another thread that accumulates meanwhile is no reason to leave them there)
            self.refuse_while_stepping()
            if self.closed:
                raise RuntimeError("the averages are in place already")
            self.aside = [bytearray(2 * (self.space.arrays[j].stop - self.space.arrays[j].start))
                          for i in range(self.space.n_groups)
                          if self.space.groups[i].format != NATIVE and self.space.groups[i].ema != NULL
                          for j in range(self.space.groups[i].first, self.space.groups[i].last)]
        aside = iter(self.aside)
        self.closed = entering
        for i in range(self.space.n_groups):
            group = self.space.groups + i
            size = 8 if group.wide else 4
            for j in range(group.first, group.last if group.ema != NULL else group.first):
                a = self.space.arrays + j
                n = a.stop - a.start
                if group.format == NATIVE:
                    swap(a.p, group.ema + a.start * size, n * size)
                    continue
                saved = next(aside)
                if entering:
                    memcpy(PyByteArray_AS_STRING(saved), a.p, 2 * n)
                    copy_segment(group.format, n, a.p, 0, <float*> group.ema + a.start)
                else:
                    memcpy(a.p, PyByteArray_AS_STRING(saved), 2 * n)
        if not entering:
            self.aside = None

    def check(self, dict settings):
        """Refuse what doesn't fit this machine or these parameters."""
        cdef Py_ssize_t i
        cdef double limit = settings["max_grad_value"] or 0
        if settings["flush_denormals"] and not CAN_FLUSH:
            raise ValueError("flush_denormals=True is not supported on this processor")
        for i in range(self.space.n_groups):
            if limit and not self.space.groups[i].wide and <float> limit == 0:
                raise ValueError(f"max_grad_value={limit!r} rounds to 0 in float32")

    def configure(self, dict settings, read=None):
        """Take over the options of the optimizer as a whole, already checked."""
        self.refuse_change()
        if read is not None:
            self.refuse_unread(self.settings, read)
        self.check(settings)
        self.settings = settings
        self.max_grad_norm = settings["max_grad_norm"] or 0
        self.space.max_grad_value = settings["max_grad_value"] or 0
        self.on_nonfinite = ON_NONFINITE[settings["on_nonfinite"]]
        if settings["loss_scale"] != "dynamic":
            self.loss_scale = settings["loss_scale"]
        elif not self.dynamic:
            self.dynamic, self.loss_scale = True, FIRST_SCALE
        self.zero_grad = self.space.zero_grad = settings["zero_grad"]
        self.space.flush_denormals = settings["flush_denormals"]
        self.space.seed = settings["seed"]

    cdef index_memory(self):
        cdef Py_ssize_t i
        self.owners.sort()
        self.n_memory = len(self.owners)
        free(self.memory)
        self.memory = <uintptr_t*> calloc(2 * self.n_memory + 1, sizeof(uintptr_t))
        if self.memory == NULL:
            raise MemoryError()
        for i in range(self.n_memory):
            self.memory[2 * i], self.memory[2 * i + 1] = self.owners[i][0], self.owners[i][1]
            if i and self.memory[2 * i] < self.memory[2 * i - 1]:
                raise ValueError(f"{self.owner(i - 1)} and {self.owner(i)} share memory; pass each element once, "
                                 "or copy one of the arrays")

    def size(self, Py_ssize_t group):
        """Elements of a group's parameter space."""
        return self.space.groups[group].size

    def dtype(self, Py_ssize_t group):
        """Of its parameters: "float64", "float32", "float16" or "bfloat16"."""
        cdef Group* g = self.space.groups + group
        if g.format == NATIVE:
            return "float64" if g.wide else "float32"
        return "bfloat16" if g.format == BFLOAT16 else "float16"

    # --- options and counts --------------------------------------------------------------------------------------

    def assign(self, Py_ssize_t index, dict options, tuple bounds=None):
        """Take over the options of one group, already checked.

        bounds: None leaves them as they are; two numbers of the group's dtype, two flat arrays, or None and None.
        """
        cdef Group* group = self.space.groups + index
        cdef Options o = as_options(options)
        self.refuse_change()
        group.options = o
        group.ema_decay = options.get("ema_decay") or 0
        if bounds is None:
            return
        self.bounds[index] = low, high = bounds
        if low is None:
            group.bounds = NO_BOUNDS
        elif isinstance(low, ndarray):
            group.lows, group.highs = <const char*> address(low), <const char*> address(high)
            group.bounds = OWN_BOUNDS
        else:
            group.low, group.high, group.bounds = low, high, SAME_BOUNDS

    def take(self, group, dict numbers, dict schedules, long long t, tuple bounds, read):
        """Options of a group after t steps, already checked: for the rules, and as what the group shows, in one go.

        bounds: as for `assign`.  read: the numbers that the group showed when these were made.
        """
        if not self.writer:
            self.refuse_unread(group._numbers, read)
        self.assign(group._index, {**group._cls._fixed, **numbers}, bounds)
        group._numbers, group._schedules, group._followed = numbers, schedules, t
        if schedules:
            self.scheduled[group._index] = ref(group)
        else:
            self.scheduled.pop(group._index, None)

    cdef int move(self, list moved, bint back) except -1:
        """Put what a metric made of schedules in their place, or them back; not where somebody has assigned another."""
        for i, (before, after) in enumerate(moved):
            if i not in self.scheduled:
                continue
            group = self.scheduled[i]()
            was, now = (after, before) if back else (before, after)
            for name in after:
                if group._schedules.get(name) is was[name]:
                    group._schedules[name] = now[name]
            group._followed, group._numbers = -1, dict(group._numbers)  # see `take`
        return 0

    def set_t(self, long long t):
        """Set every array's count of applied steps.  Above 0 its state counts as written."""
        self.refuse_while_stepping()
        cdef Group* group
        cdef Py_ssize_t i, j
        cdef long long step
        cdef double product
        for i in range(self.space.n_groups):
            group = self.space.groups + i
            product = 1
            if group.product != NULL:
                for step in range(1, t + 1):
                    product *= nadam_mu(&group.options, step)
                    if product < 1e-300:  # 1 - product has long been 1
                        product = 0
                        break
            for j in range(group.last - group.first):
                group.t[j] = t
                self.space.arrays[group.first + j].started = t > 0
                if group.product != NULL:
                    group.product[j] = product
        self.t = t

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def held(self):
        """For a ``with`` block, inside which a state is read or written: nobody can step or change the optimizer."""
        return Block(self, False)

    def averaged(self):
        """For a ``with`` block, inside which the parameters are their averages."""
        return Block(self, True)

    def write_on(self):
        """From here to the end of the block this thread, and no other, may assign, discard and configure.

        A step before it can't be undone any more.
        """
        self.writer = PyThread_get_thread_ident()
        self.undoable = False

    cdef hold(self, bint holding):
        if holding:
            self.refuse_while_stepping()
            if self.closed:
                raise RuntimeError("not inside averaged_parameters(): the parameters are their average there")
        self.busy = holding
        self.writer = 0

    def set_counts(self, long long t, long long skipped_steps, double grad_norm, long long pending):
        """Take over what a restored run has counted; with pending calls of accumulate their sums are attached."""
        cdef Py_ssize_t i
        self.refuse_change()
        for i in range(self.space.n_groups if pending else 0):
            if self.space.groups[i].sums == NULL:
                raise RuntimeError("there are no sums")
        self.t, self.skipped_steps, self.grad_norm, self.pending = t, skipped_steps, grad_norm, pending

    def started(self, Py_ssize_t index):
        """For each array of a group, whether a step has written its state, as bytes of 0 and 1."""
        cdef Group* group = self.space.groups + index
        cdef Py_ssize_t j
        return bytes([self.space.arrays[j].started for j in range(group.first, group.last)])

    def set_started(self, Py_ssize_t index, bytes started):
        cdef Py_ssize_t j
        for j in range(len(started)):
            self.space.arrays[self.space.groups[index].first + j].started = started[j] != 0

    def write_copies(self):
        """Write the arrays of copy_to anew, from the parameters or their master copy."""
        cdef Group* group
        cdef Array* a
        cdef Py_ssize_t i, j, at, n
        cdef float widened[BLOCK]
        for i in range(self.space.n_groups):
            group = self.space.groups + i
            for j in range(group.first, group.last if group.copy_format != NATIVE else group.first):
                a = self.space.arrays + j
                for at in range(0, a.stop - a.start, BLOCK):
                    n = min(a.stop - a.start - at, BLOCK)
                    if group.wide:
                        copy_segment(group.copy_format, n, a.copy, at, <double*> a.p + at)
                    elif group.master != NULL:
                        copy_segment(group.copy_format, n, a.copy, at, group.master + a.start + at)
                    elif group.format == NATIVE:
                        copy_segment(group.copy_format, n, a.copy, at, <float*> a.p + at)
                    else:
                        widen(group.format, n, widened, a.p, at)
                        copy_segment(group.copy_format, n, a.copy, at, widened)

    # --- one step ------------------------------------------------------------------------------------------------

    def step(self, grads=..., double loss_scale=0.0, Py_ssize_t group=-1, Py_ssize_t lo=0, Py_ssize_t hi=-1,
             bint count=True, list moved=None):
        """Step every group, or elements lo .. hi-1 of one group's parameter space.

        grads: without any, the mean of what was accumulated.
        loss_scale: by what gradients are divided in this call; 0 for the optimizer's own.
        lo and hi are multiples of CHUNK or the end (hi=-1).  The pieces of one step are calls with count=False but the
        last: they share a step number, and equal the whole step whatever their order.
        moved: each group's schedules before and after a metric that they take if this step is applied.
        """
        cdef Py_ssize_t first = 0, last = self.space.n_chunks, work
        cdef int n_threads
        cdef bint summed = grads is ..., usable = False
        cdef double norm
        cdef Counts before
        if self.scheduled:  # before the checks: a schedule may be anybody's Python, and other threads run meanwhile
            self.follow()
        self.refuse_while_stepping()
        if summed != (self.pending > 0):
            self.refuse_sums(summed)
        if self.closed:
            raise RuntimeError("no step inside averaged_parameters(): the parameters are their average there")
        if group != -1 or lo != 0 or hi != -1:
            if self.space.zero_grad and (self.max_grad_norm or self.on_nonfinite != IGNORE):
                raise ValueError("a range can't be stepped with zero_grad and a norm or check, which need all of them")
            first, last = self.chunks(group, lo, hi)
        if self.keeps_undo and (last - first < self.space.n_chunks or not count):
            raise ValueError("a range can't be stepped with keep_undo=True, which undoes whole steps")
        self.busy = True
        try:
            work = self.acquire_sums() if summed else self.acquire(grads)
            if self.space.zero_grad:
                self.check_gradients_apart()
            work = min(work, (last - first) * CHUNK)
            n_threads = self.team(work, last - first)
            if self.keeps_undo:
                before = self.counts()
            loss_scale = loss_scale or self.loss_scale
            if work >= 0:
                norm = self.grad_norm
                try:
                    usable = self.inspect(loss_scale * self.pending if summed else loss_scale, n_threads, count)
                except ValueError:
                    self.grad_norm = norm
                    raise
            if self.keeps_undo:
                self.save(before, usable, work, n_threads)
            if usable:
                self.space.t = self.t + 1
                self.form_steps()
                self.run(STEP, work, first, last, n_threads)
                if count:
                    self.count()
                    if moved is not None:
                        self.move(moved, False)
                        self.moved = moved if self.keeps_undo else []
            if self.dynamic and count and work >= 0:
                self.rescale(usable)
            if summed and count:
                self.drop_sums()
        finally:
            self.space.zero_grad = self.zero_grad
            self.release()
            self.busy = False

    cdef int team(self, Py_ssize_t work, Py_ssize_t n_chunks) noexcept:
        """The threads of a sweep over n_chunks with `work` elements to be written."""
        return <int> min(get_threads(self.n_threads), n_chunks) if work >= PARALLEL_FROM else 1

    cdef int run(self, Work what, Py_ssize_t work, Py_ssize_t first, Py_ssize_t last, int n_threads) except -1:
        """Sweep, without the GIL if there is much to do."""
        if work >= PARALLEL_FROM:
            with nogil:
                sweep(&self.space, what, first, last, n_threads)
        else:
            sweep(&self.space, what, first, last, n_threads)
        return 0

    cdef follow(self):
        """Have the numbers of this step assigned where options follow a schedule."""
        for of_group in list(self.scheduled.values()):
            of_group()._follow(self.t)

    cdef (Py_ssize_t, Py_ssize_t) chunks(self, Py_ssize_t group, Py_ssize_t lo, Py_ssize_t hi) except *:
        if group == -1 and self.space.n_groups == 1:
            group = 0
        if not 0 <= group < self.space.n_groups:
            raise ValueError(f"a range needs a group, 0 .. {self.space.n_groups - 1}, got {group}")
        cdef Py_ssize_t size = self.space.groups[group].size, chunk = self.space.groups[group].chunk
        if hi == -1:
            hi = size
        if not (0 <= lo <= hi <= size and (lo % CHUNK == 0 or lo == size) and (hi % CHUNK == 0 or hi == size)):
            raise ValueError(f"lo and hi must be multiples of {CHUNK} or the end, {size}, with lo <= hi; "
                             f"got {lo} and {hi}")
        return chunk + (lo + CHUNK - 1) // CHUNK, chunk + (hi + CHUNK - 1) // CHUNK

    cdef Py_ssize_t acquire(self, grads) except -2:
        """Bind the gradients; returns the number of their elements, -1 where every one is None."""
        cdef Py_ssize_t i, work = -1
        for i in range(self.space.n_groups):
            self.space.groups[i].narrow_grads = False
            self.space.groups[i].only_bfloat16 = (self.space.groups[i].format == BFLOAT16
                                                  and self.space.groups[i].state_format == BFLOAT16
                                                  and self.space.groups[i].master == NULL)
        if not self.structured:
            return self.acquire_group(0, grads, work)
        if not isinstance(grads, (list, tuple)) or len(grads) != self.space.n_groups:
            raise ValueError(f"grads must be a list with one entry for each of the {self.space.n_groups} parameter "
                             f"groups, got {describe(grads)}")
        for i, group_grads in enumerate(tuple(grads)):
            work = self.acquire_group(i, group_grads, work)
        return work

    cdef Py_ssize_t acquire_group(self, Py_ssize_t index, grads, Py_ssize_t work) except -2:
        cdef Py_ssize_t i, n = self.space.groups[index].last - self.space.groups[index].first
        cdef object keys = self.keys[index]
        if keys is None:
            if not isinstance(grads, (list, tuple)) or len(grads) != n:
                raise ValueError(f"{self.place(index, True)} must be a list of {n} arrays, as the parameters are (None "
                                 f"leaves one alone); got {describe(grads)}")
            for i, grad in enumerate(tuple(grads)):  # nobody shortens it meanwhile
                work = self.acquire_array(index, i, grad, work)
        elif keys == ():
            work = self.acquire_array(index, 0, grads, work)
        else:
            if not isinstance(grads, dict) or grads.keys() != keys.keys():
                raise ValueError(f"{self.place(index, True)} must be a dict with the keys {', '.join(map(repr, keys))} "
                                 f"of the parameters (None leaves one alone); got {describe(grads)}")
            for i, key in enumerate(keys):
                work = self.acquire_array(index, i, grads[key], work)
        return work

    cdef Py_ssize_t acquire_array(self, Py_ssize_t index, Py_ssize_t i, grad, Py_ssize_t work) except -2:
        cdef Group* group = self.space.groups + index
        cdef Array* a = self.space.arrays + group.first + i
        cdef Py_buffer* p = self.p_views + group.first + i
        cdef Py_buffer* g = self.g_views + self.n_acquired
        if grad is None:
            return work
        bfloat16 = self.view(grad, g, index, i, True)
        self.n_acquired += 1
        a.g_format = NATIVE
        if not is_native(g, b"d" if group.wide else b"f"):
            kind = "" if group.wide else self.format(g, bfloat16)
            if kind not in FORMATS:
                wanted = "float64" if group.wide else "float32"
                raise TypeError(f"{self.name(index, i, True)} has dtype {named(grad.dtype)}, its parameter "
                                f"{self.dtype(index)}; convert it: x.astype('{wanted}')"
                                + ("" if group.wide else self.hint(g)))
            a.g_format = FORMATS[kind]
            group.narrow_grads = True
        group.only_bfloat16 = group.only_bfloat16 and a.g_format == BFLOAT16
        if g.ndim != p.ndim or (g.ndim and memcmp(g.shape, p.shape, g.ndim * sizeof(Py_ssize_t)) != 0):
            raise ValueError(f"{self.name(index, i, True)} has shape {grad.shape}, its parameter "
                             f"{tuple([p.shape[j] for j in range(p.ndim)])}")
        self.check_layout(g, index, i, True)
        if self.space.zero_grad and g.readonly:
            raise ValueError(f"{self.name(index, i, True)} is read-only and can't be zeroed; pass a writable array, or "
                             "zero_grad=False")
        if g.len:
            self.check_apart(g, index, i)
        a.g = <const char*> g.buf
        return max(work, 0) + a.stop - a.start

    cdef bint inspect(self, double loss_scale, int n_threads, bint count) except -1:
        """Take the norm and look for what is not finite, as asked; set the factors.  False: skip this step.

        loss_scale: by what the gradients are divided; for sums, times their number.
        """
        cdef Group* group
        cdef Py_ssize_t i
        cdef double squares = 0, coefficient = 1, most
        cdef bint usable = True
        self.grad_norm = NAN
        if self.max_grad_norm:
            for i in range(self.space.n_groups):
                with nogil:
                    self.space.groups[i].squares = reduce_group(&self.space, self.space.groups + i, True, n_threads)
                squares += self.space.groups[i].squares
            self.grad_norm = sqrt(squares) / loss_scale
            coefficient = self.max_grad_norm / (self.grad_norm + 1e-6)
            coefficient = 1 if coefficient > 1 else coefficient
        for i in range(self.space.n_groups):
            group = self.space.groups + i
            group.factor = (-1 if group.options.maximize else 1) * coefficient / loss_scale
            if group.factor != 1 and not self.holds_factor(group, coefficient):
                usable = False
                if not self.dynamic:  # which backs off
                    raise ValueError(f"loss_scale={loss_scale / max(self.pending, 1)!r}"
                                     + (f", times {self.pending} calls of accumulate()," if self.pending > 1 else "")
                                     + f" makes gradients times {group.factor!r}, which "
                                     f"{'float64' if group.wide else 'float32'} can't hold; nothing was changed")
            if self.on_nonfinite != IGNORE:
                # the root of the sum of squares bounds every element; only where that is too much a second look is due
                most = sqrt(group.squares) * (1 + 1e-6) if self.max_grad_norm else NAN
                if not self.fits(group, most, loss_scale):
                    with nogil:
                        most = reduce_group(&self.space, group, False, n_threads)
                    if not self.fits(group, most, loss_scale):
                        usable = False
                        if self.on_nonfinite == RAISE:
                            self.complain(i, loss_scale)
        if self.on_nonfinite != IGNORE and self.max_grad_norm and not self.grad_norm - self.grad_norm == 0:
            usable = False  # finite float64 gradients, but too large to be clipped
            if self.on_nonfinite == RAISE:
                raise ValueError("the norm of the gradients overflows; nothing was changed")
        if not usable:
            self.skipped_steps += count
            for i in range(self.n_acquired if self.space.zero_grad else 0):
                memset(self.g_views[i].buf, 0, self.g_views[i].len)  # or what is accumulated would stay infinite
        return usable

    cdef bint holds_factor(self, const Group* group, double coefficient) noexcept:
        """Can a group's type hold its factor?  A dynamic scale goes no further than its normal numbers."""
        cdef double k = fabs(group.factor)
        cdef float narrow = <float> k
        if k == 0:
            return coefficient == 0  # the norm is infinite: not the scale's fault
        if group.wide:
            return not isinf(k)
        return not (narrow == 0 or isinf(narrow) or (self.dynamic and narrow < SMALLEST_NORMAL))

    cdef bint fits(self, const Group* group, double g, double loss_scale) noexcept:
        """Is a gradient's absolute value finite once unscaled, and its square where the rule squares it?

        In the group's type, operation by operation as the sweep has them.
        """
        cdef double limit = self.space.max_grad_value, x
        cdef double factor = group.factor if group.factor >= 0 else -group.factor
        cdef float y
        x = g / loss_scale
        if not (x - x == 0 and (group.wide or not isinf(<float> x))):
            return False
        if group.rule not in (ADAGRAD, RMSPROP, ADADELTA, ADAM, NADAM, RADAM) or factor != factor:
            return True  # the factor is NaN where the norm is: another element is to blame
        if group.wide:
            x = factor * g
            x = limit if limit and x > limit else x
            return not isinf(x * x)
        y = <float> factor * <float> g
        y = <float> limit if limit and y > <float> limit else y
        y = y * y
        return not isinf(y)

    cdef complain(self, Py_ssize_t index, double loss_scale):
        cdef Group* group = self.space.groups + index
        cdef Array* a
        cdef Py_ssize_t i, j
        cdef float narrow
        cdef double x
        for i in range(group.last - group.first):
            a = self.space.arrays + group.first + i
            for j in range(a.stop - a.start if a.g != NULL else 0):
                narrow = (<const float*> a.g)[j] if a.g_format == NATIVE and not group.wide else 0
                if a.g_format != NATIVE:
                    widen(a.g_format, 1, &narrow, a.g, j)
                x = (<const double*> a.g)[j] if group.wide else narrow
                if not self.fits(group, -x if x < 0 else x, loss_scale):
                    shape = [self.p_views[group.first + i].shape[k] for k in range(self.p_views[group.first + i].ndim)]
                    at = tuple([int(k) for k in numpy.unravel_index(j, shape)]) if shape else ()
                    raise ValueError(f"{'the sum of ' if self.pending else ''}{self.name(index, i, True)} is {x} at "
                                     f"index {at}"
                                     f"{'' if x - x != 0 else ', too large for a step'}; nothing was changed")

    cdef int form_steps(self) noexcept:
        """The constants of this step: formed once for neighbouring arrays that have taken the same steps."""
        cdef Group* group
        cdef Array* a
        cdef Array* before
        cdef Py_ssize_t i, j, n = 0
        for i in range(self.space.n_groups):
            group = self.space.groups + i
            if group.format != NATIVE or group.state_format != NATIVE:
                for j in range(1 + SLOTS):
                    group.keys[j] = noise_key(self.space.seed, self.space.t, i, j)
            before = NULL
            for j in range(group.last - group.first):
                a = self.space.arrays + group.first + j
                if a.g == NULL:
                    continue
                if (before == NULL or before.started != a.started
                        or group.t[before - self.space.arrays - group.first] != group.t[j]
                        or (group.product != NULL
                            and group.product[before - self.space.arrays - group.first] != group.product[j])):
                    form_step(group.rule, &group.options, group.t[j] + 1, not a.started or group.t[j] == 0,
                              group.product[j] if group.product != NULL else 1, self.space.steps + n)
                    n += 1
                a.step = n - 1
                before = a
        return 0

    cdef int count(self) noexcept:
        cdef Group* group
        cdef Array* a
        cdef Py_ssize_t i, j
        for i in range(self.space.n_groups):
            group = self.space.groups + i
            for j in range(group.last - group.first):
                a = self.space.arrays + group.first + j
                if a.g != NULL:
                    group.t[j] += 1
                    if group.rule != SGD or group.options.momentum != 0:
                        a.started = True
                    if group.product != NULL:
                        group.product[j] = self.space.steps[a.step].product
        self.t += 1
        return 0

    # --- sums, the dynamic loss scale, undo ----------------------------------------------------------------------

    def accumulate(self, grads, allocate):
        """Add gradients to the sums.  allocate(i): attaches the sums of group i, where there are none yet."""
        cdef Group* group
        cdef Py_ssize_t i, j, work
        self.refuse_while_stepping()
        self.busy = True
        try:
            work = self.acquire(grads)
            if self.space.zero_grad:
                self.check_gradients_apart()
            for i in range(self.space.n_groups):
                if self.space.groups[i].sums == NULL:
                    allocate(i)
            self.run(ADD, work, 0, self.space.n_chunks, self.team(work, self.space.n_chunks))
            for i in range(self.space.n_groups):
                group = self.space.groups + i
                for j in range(group.last - group.first):
                    group.summed[j] |= self.space.arrays[group.first + j].g != NULL
            self.pending += 1
        finally:
            self.release()
            self.busy = False

    def attach_sums(self, Py_ssize_t index, sums, summed):
        """Give a group a flat array for sums, as its rule computes, and a uint8 for each array: is there a sum?"""
        self.keep.append(summed)
        self.space.groups[index].summed = <uint8_t*> address(summed)
        self.space.groups[index].sums = self.own(index, sums)
        self.index_memory()

    def discard(self):
        """Forget the sums."""
        self.refuse_change()
        self.drop_sums()

    cdef int refuse_sums(self, bint summed) except -1:
        if summed:
            raise ValueError("step() without gradients takes the mean of accumulated ones, and there are none; pass "
                             "grads, or call accumulate(grads) before it")
        raise ValueError(f"{self.pending} accumulated gradients are pending, which step(grads) would leave behind; "
                         "step() takes their mean, discard() drops them")

    cdef Py_ssize_t acquire_sums(self) noexcept:
        """Bind the sums as gradients; returns the number of their elements, -1 where there are none."""
        cdef Group* group
        cdef Array* a
        cdef Py_ssize_t i, j, work = -1
        self.space.zero_grad = False  # what was added is zeroed already, and the next sum begins with a write
        for i in range(self.space.n_groups):
            group = self.space.groups + i
            group.narrow_grads = group.only_bfloat16 = False
            for j in range(group.last - group.first):
                if group.summed[j]:
                    a = self.space.arrays + group.first + j
                    a.g = group.sums + a.start * (8 if group.wide else 4)
                    a.g_format = NATIVE
                    work = max(work, 0) + a.stop - a.start
        return work

    cdef int drop_sums(self) noexcept:
        cdef Group* group
        cdef Py_ssize_t i
        self.pending = 0
        for i in range(self.space.n_groups):
            group = self.space.groups + i
            if group.summed != NULL:
                memset(group.summed, 0, group.last - group.first)
        return 0

    def set_scale(self, double scale, long long growth_tracker):
        """Set the dynamic loss scale, already checked, and the clean steps since its last change."""
        self.refuse_change()
        self.loss_scale, self.growth_tracker = scale, growth_tracker

    cdef int rescale(self, bint clean) noexcept:
        """PyTorch's rule: half the scale behind a step that was not usable, twice behind GROWTH_INTERVAL that were."""
        if not clean:
            self.growth_tracker = 0
            self.loss_scale = max(self.loss_scale / 2, SMALLEST_SCALE)
        elif self.growth_tracker + 1 < GROWTH_INTERVAL:
            self.growth_tracker += 1
        else:
            self.growth_tracker = 0
            if self.loss_scale * 2 <= LARGEST_SCALE:
                self.loss_scale *= 2
        return 0

    def keep_undo(self, Py_ssize_t index):
        """From now on keep what a step overwrites of this group.  Once its state is attached."""
        cdef Group* group = self.space.groups + index
        cdef Py_ssize_t i, n = group.last - group.first
        memory = bytearray(sizeof(Undo))  # zeros; a plan that takes over shares them
        cdef Undo* undo = <Undo*> PyByteArray_AS_STRING(memory)
        self.keep.append(memory)
        group.undo = undo
        for i in range(SLOTS):
            self.keep_flat(group, i, group.state[i], group.state_itemsize[i], 1)
            self.keep_flat(group, SLOTS + i, <char*> group.scales[i], 4, BLOCK)
        self.keep_flat(group, 2 * SLOTS, <char*> group.master, 4, 1)
        self.keep_flat(group, 2 * SLOTS + 1, group.ema, 8 if group.wide else 4, 1)
        undo.p = self.twin(group.size * parameter_itemsize(group))
        if group.copy_format != NATIVE:
            undo.copies = self.twin(group.size * (4 if group.copy_format == FLOAT32 else 2))
        undo.stepped, undo.started = <uint8_t*> self.twin(n), <uint8_t*> self.twin(n)
        undo.t = <long long*> self.twin(8 * n)
        undo.product = <double*> self.twin(8 * n) if group.product != NULL else NULL
        self.keeps_undo = True

    cdef int keep_flat(self, Group* group, int i, char* live, Py_ssize_t itemsize, Py_ssize_t per) except -1:
        cdef Undo* undo = group.undo
        if live != NULL:
            undo.live[i], undo.itemsize[i], undo.per[i] = live, itemsize, per
            undo.kept[i] = self.twin((group.size + per - 1) // per * itemsize)
        return 0

    cdef char* twin(self, Py_ssize_t nbytes) except NULL:
        memory = numpy.empty(nbytes, "uint8")
        self.keep.append(memory)
        self.undo_nbytes += nbytes
        return <char*> address(memory)

    cdef Counts counts(self) noexcept:
        cdef Counts now
        now.t, now.skipped_steps, now.growth_tracker = self.t, self.skipped_steps, self.growth_tracker
        now.loss_scale, now.grad_norm = self.loss_scale, self.grad_norm
        return now

    cdef int save(self, Counts before, bint usable, Py_ssize_t work, int n_threads) except -1:
        """Keep what the step is about to overwrite; of one that is skipped, the counts."""
        cdef Group* group
        cdef Undo* undo
        cdef Py_ssize_t i, j, n
        self.undoable, self.moved = False, []
        for i in range(self.space.n_groups):
            group = self.space.groups + i
            undo = group.undo
            n = group.last - group.first
            for j in range(n):
                undo.stepped[j] = usable and self.space.arrays[group.first + j].g != NULL
                undo.started[j] = self.space.arrays[group.first + j].started
            memcpy(undo.t, group.t, 8 * n)
            if undo.product != NULL:
                memcpy(undo.product, group.product, 8 * n)
        if usable:
            self.run(KEEP, work, 0, self.space.n_chunks, n_threads)
        self.before = before
        self.undoable = True
        return 0

    def rollback(self):
        """Undo the last step."""
        cdef Group* group
        cdef Undo* undo
        cdef Py_ssize_t i, j, n, work = 0
        self.refuse_while_stepping()
        if self.closed:
            raise RuntimeError("no rollback inside averaged_parameters(): the parameters are their average there")
        if not self.keeps_undo:
            raise ValueError("rollback() needs what a step overwrote: construct the optimizer with keep_undo=True")
        if not self.undoable:
            raise ValueError("there is no step to undo: rollback() undoes the last step, once")
        if self.pending:
            raise ValueError(f"{self.pending} accumulated gradients are pending, taken behind the step that rollback() "
                             "would undo; discard() drops them")
        self.busy = True
        try:
            for i in range(self.space.n_groups):
                group = self.space.groups + i
                for j in range(group.last - group.first):
                    if group.undo.stepped[j]:
                        work += self.space.arrays[group.first + j].stop - self.space.arrays[group.first + j].start
            self.run(RESTORE, work, 0, self.space.n_chunks, self.team(work, self.space.n_chunks))
            for i in range(self.space.n_groups):
                group = self.space.groups + i
                undo = group.undo
                n = group.last - group.first
                for j in range(n):
                    self.space.arrays[group.first + j].started = undo.started[j]
                memcpy(group.t, undo.t, 8 * n)
                if undo.product != NULL:
                    memcpy(group.product, undo.product, 8 * n)
            self.t, self.skipped_steps, self.grad_norm = self.before.t, self.before.skipped_steps, self.before.grad_norm
            if self.dynamic:
                self.loss_scale, self.growth_tracker = self.before.loss_scale, self.before.growth_tracker
            self.move(self.moved, True)
            self.undoable = False
        finally:
            self.busy = False

    # --- the end of a step ---------------------------------------------------------------------------------------

    cdef int release(self) noexcept:
        cdef Py_ssize_t i
        for i in range(self.n_acquired):
            PyBuffer_Release(self.g_views + i)
        self.n_acquired = 0
        for i in range(self.space.n_arrays):
            self.space.arrays[i].g = NULL
        return 0

    # --- checks --------------------------------------------------------------------------------------------------

    cdef int refuse_while_stepping(self) except -1:
        if self.retired:
            raise RuntimeError("a group was added to this optimizer meanwhile; call it again")
        if self.busy:
            raise RuntimeError("another thread is inside step() of this optimizer, or saves or loads it (in a forked "
                               "child: was, when the process forked); guard it with a lock, or give each thread an "
                               "optimizer of its own.  In a signal handler: set a flag there, and act on it after the "
                               "step")
        return 0

    cdef int refuse_unread(self, now, read) except -1:
        """Options were made from others, read before: those must be there still."""
        if now is not read:
            raise RuntimeError("somebody else (another thread, a signal handler, a schedule) has changed the options "
                               "of this optimizer meanwhile; guard it with a lock, or give each thread an optimizer of "
                               "its own")
        return 0

    cdef int refuse_change(self) except -1:
        return 0 if self.writer and self.writer == PyThread_get_thread_ident() else self.refuse_while_stepping()

    cdef str place(self, Py_ssize_t group, bint grad):
        if self.structured:
            return f"grads[{group}]" if grad else f"params[{group}]['params']"
        return "grads" if grad else "params"

    cdef str name(self, Py_ssize_t group, Py_ssize_t i, bint grad=False):
        """What messages call an array: params, params[3], params['w'], params[1]['params'][3], grads ..."""
        keys = self.keys[group]
        return self.place(group, grad) + (f"[{i}]" if keys is None else "" if keys == () else f"[{list(keys)[i]!r}]")

    cdef str owner(self, Py_ssize_t i):
        _, _, group, array = self.owners[i]
        if array <= -2:
            return self.name(group, -2 - array).replace("['params']" if self.structured else "params",
                                                        "['copy_to']" if self.structured else "copy_to", 1)
        return "this optimizer's state" if array == -1 else self.name(group, array)

    cdef str format(self, Py_buffer* view, bint bfloat16):
        """The name of a number format that parameters may have, or nothing; bfloat16: `view` said so."""
        if bfloat16 or (self.uint16_is_bfloat16 and is_native(view, b"H")):
            return "bfloat16"
        return ("float32" if is_native(view, b"f") else "float64" if is_native(view, b"d")
                else "float16" if is_native(view, b"e") else "")

    cdef str hint(self, Py_buffer* view):
        return "; if it holds bfloat16 numbers, say uint16_as='bfloat16' instead" if is_native(view, b"H") else ""

    cdef int view(self, x, Py_buffer* view, Py_ssize_t group, Py_ssize_t i, bint grad=False) except -1:
        """Fill `view`; 1 where x is a bfloat16 array of ml_dtypes, seen as uint16, else 0."""
        cdef str name, remedy = ""
        if type(x) is not ndarray and (not isinstance(x, ndarray) or isinstance(x, MaskedArray)):
            name = self.name(group, i, grad)
            if isinstance(x, MaskedArray):
                remedy = "the mask would be ignored: pass x.data, or x.filled(0)"
            elif type(x).__module__.partition(".")[0] == "torch":
                remedy = "pass x.detach().numpy(), which shares a CPU tensor's memory"
            elif isinstance(x, (int, float, complex, numpy.generic)):
                remedy = "make it an array: np.asarray(x, dtype)"
            elif isinstance(x, (list, tuple, dict)) and grad:
                remedy = "gradients come in the structure of the parameters, here one array"
            elif isinstance(x, (list, tuple, dict)):
                remedy = "parameters are one array, a list or dict of arrays, or a list of group dicts with 'params'"
            elif hasattr(x, "__array__") or isinstance(x, (bytearray, memoryview)):
                remedy = "pass np.asarray(x), if that shares its memory"
            elif hasattr(x, "__iter__") and not isinstance(x, (str, bytes)):
                remedy = "pass list(x)"
            else:
                remedy = "pass arrays"
            kind = "" if type(x).__module__ == "builtins" else type(x).__module__ + "."
            raise TypeError(f"{name} is a {kind}{type(x).__qualname__}, not a numpy.ndarray; {remedy}")
        try:
            return PyObject_GetBuffer(x, view, PyBUF_FULL_RO)
        except (ValueError, BufferError) as error:
            if x.dtype.name == "bfloat16":
                PyObject_GetBuffer(x.view("uint16"), view, PyBUF_FULL_RO)
                return 1
            raise TypeError(f"{self.name(group, i, grad)} has dtype {x.dtype}, which can't be used; convert it: "
                            "x.astype('float32')") from error

    cdef int check_layout(self, Py_buffer* view, Py_ssize_t group, Py_ssize_t i, bint grad) except -1:
        remedy = "np.ascontiguousarray(x)" if grad else "keep and use np.ascontiguousarray(x), which is a copy"
        if not PyBuffer_IsContiguous(view, b"C"):
            raise ValueError(f"{self.name(group, i, grad)} is not C-contiguous; {remedy}")
        if <uintptr_t> view.buf % <uintptr_t> view.itemsize and view.len:
            raise ValueError(f"{self.name(group, i, grad)} is misaligned; {'' if grad else 'keep and use '}x.copy()")
        return 0

    cdef int check_gradients_apart(self) except -1:
        """Gradients that will be zeroed may not share memory: one's zeros would be another's gradient."""
        cdef uint64_t sign = 14695981039346656037ULL
        cdef Py_ssize_t i
        for i in range(self.n_acquired):  # looked at once for each set of buffers
            sign = (sign ^ <uintptr_t> self.g_views[i].buf) * 1099511628211ULL
            sign = (sign ^ <uint64_t> self.g_views[i].len) * 1099511628211ULL
        if sign == self.apart:
            return 0
        spans = sorted([(<uintptr_t> self.g_views[i].buf, self.g_views[i].len) for i in range(self.n_acquired)])
        for (low, size), (start, _) in zip(spans, spans[1:]):
            if start < low + size:
                raise ValueError("two gradients share memory, which zero_grad=True would zero under the other; "
                                 "pass a copy of one")
        self.apart = sign
        return 0

    cdef int check_apart(self, Py_buffer* g, Py_ssize_t group, Py_ssize_t i) except -1:
        """Refuse a gradient that shares memory with a parameter or with state."""
        cdef uintptr_t start = <uintptr_t> g.buf
        cdef Py_ssize_t low = 0, high = self.n_memory, middle
        while low < high:  # the first interval that ends behind `start`
            middle = (low + high) // 2
            if self.memory[2 * middle + 1] > start:
                high = middle
            else:
                low = middle + 1
        if low < self.n_memory and self.memory[2 * low] < start + g.len:
            raise ValueError(f"{self.name(group, i, True)} shares memory with {self.owner(low)}; pass a copy")
        return 0


cdef class Block:
    """What ``with plan.held()`` and ``with plan.averaged()`` enter and leave.

    In C: so a Ctrl-C comes inside the block, or behind it, and not between the two of them and the block.
    """
    cdef Plan plan
    cdef bint averaged

    def __init__(self, Plan plan, bint averaged):
        self.plan, self.averaged = plan, averaged

    def __enter__(self):
        if self.averaged:
            self.plan.swap_averages(True)
        else:
            self.plan.hold(True)

    def __exit__(self, *error):
        if self.averaged:
            self.plan.swap_averages(False)
        else:
            self.plan.hold(False)

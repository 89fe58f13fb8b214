# The gradients of one call: what the caller hands in, checked against the parameters, or the sums of micro-batches.


cdef Py_ssize_t acquire(Plan plan, grads, bint targets) except -2:
    """Bind the gradients, or targets; returns the number of their elements, -1 where every one is None."""
    cdef Py_ssize_t i, work = -1, count = plan.space.n_groups
    if targets:
        plan.space.zero_grad = False  # they are no gradients
    for i in range(count):
        expect_gradients(plan.space.groups[i], targets)
    if not plan.structured:
        return acquire_group(plan, <BoundGroup> plan.groups[0], grads, work)
    items = parts_of(plan, grads, "target" if targets else "grads")
    for i in range(count):
        work = acquire_group(plan, <BoundGroup> plan.groups[i], items[i], work)
    return work


cdef int expect_gradients(Group* group, bint targets) noexcept:
    """Before those of a call are bound: nothing is known of their formats."""
    group.by_rows = False
    group.targets = group.formed = targets
    group.only_bfloat16 = group.format == BFLOAT16 and group.state_format == BFLOAT16 and group.master == NULL
    return 0


cdef int refuse_sums(Plan plan, bint summed) except -1:
    """summed: the call has no gradients of its own."""
    if summed:
        raise ValueError("step() without gradients takes the mean of accumulated ones, and there are none; pass "
                         "grads, or call accumulate(grads) before it")
    raise ValueError(f"{pending(plan.counts.pending)}, which step(grads) would leave "
                     "unused; step() takes their mean, discard() drops them")


cdef tuple parts_of(Plan plan, x, str what):
    """What was given for each of several groups."""
    cdef Py_ssize_t count = plan.space.n_groups
    items = tuple(x) if isinstance(x, (list, tuple)) else None  # so that what is counted is what is used
    if items is None or len(items) != count:
        raise ValueError(f"{what} must be a list with one entry for each of the {count} parameter groups, "
                         f"got {describe(x, items)}")
    return items


cdef tuple items_of(BoundGroup group, x, bint grad):
    """What was given for each array of a group that is not one bare array."""
    cdef object keys = group.keys
    cdef Py_ssize_t count = group.group.n_arrays
    cdef str where = group.place_of(grad)
    cdef str none = " (None leaves one alone)" if grad else ""
    if keys is None:
        items = tuple(x) if isinstance(x, (list, tuple)) else None
        if items is None or len(items) != count:
            raise ValueError(f"{where} must be a list of {counted(count, 'array')}, as the parameters are{none}; "
                             f"got {describe(x, items)}")
        return items
    if not isinstance(x, dict) or x.keys() != keys.keys():
        raise ValueError(f"{where} must be a dict with the keys {', '.join(map(repr, keys))} of the parameters{none}; "
                         f"got {describe(x)}")
    return tuple([x[key] for key in keys])


cdef Py_ssize_t acquire_group(Plan plan, BoundGroup group, grads, Py_ssize_t work) except -2:
    cdef Py_ssize_t i
    if group.bare:
        return acquire_array(plan, group, 0, grads, work)
    items = items_of(group, grads, True)
    for i in range(group.group.n_arrays):
        work = acquire_array(plan, group, i, items[i], work)
    return work


cdef Py_ssize_t acquire_array(Plan plan, BoundGroup bound, Py_ssize_t i, grad, Py_ssize_t work) except -2:
    cdef Group* group = &bound.group
    cdef Array* a = group.arrays + i
    cdef Py_buffer* g = bound.grads + bound.n_grads
    cdef Py_ssize_t shared, row
    cdef uintptr_t low, high
    if grad is None:
        return work
    if plan.cast and type(grad) is not ndarray:
        grad = as_array(bound, i, grad)
    cdef bint by_rows = type(grad) is Rows
    if by_rows and group.targets:
        raise TypeError(f"{bound.name(i, True)} is one of rows, but a target is an array; pass the gradient itself, "
                        "Rows(indices, w[indices] - values)")
    values = (<Rows> grad).values if by_rows else grad
    cdef bint bfloat16 = bound.view(values, g, i, True)
    bound.n_grads += 1
    a.g_format = NATIVE
    if not is_native(g, b"d" if group.wide else b"f"):
        kind = format_of(g, bfloat16 or bound.uint16_is_bfloat16)
        if kind == "" or (not plan.cast and (group.wide or kind == "float64")):
            wanted = "float64" if group.wide else "float32"
            if getattr(values.dtype, "kind", "") == "c":  # a tensor's has none
                raise TypeError(f"{bound.name(i, True)} has dtype {named(values.dtype)}, its parameter {bound.dtype}, "
                                f"whose gradient is real: pass x.real.astype('{wanted}'); or, where the parameters "
                                f"are the parts of complex numbers, x.view('float{4 * values.dtype.itemsize}')")
            otherwise = CAST if kind and not bound.takes_tensors else "" if group.wide else hint(g)
            raise TypeError(f"{bound.name(i, True)} has dtype {named(values.dtype)}, its parameter {bound.dtype}; "
                            f"convert it: x.astype('{wanted}'){otherwise}")
        a.g_format = FORMATS[kind]
        group.formed = True
    group.only_bfloat16 = group.only_bfloat16 and a.g_format == BFLOAT16
    if by_rows and a.ndim < 2:
        if a.ndim == 0:
            raise ValueError(f"{bound.name(i, True)} is one of rows, but its parameter has no dimensions; pass an "
                             "array")
        if group.options.sum_to_one:
            raise ValueError(f"{bound.name(i, True)} is one of rows, but sum_to_one makes its parameter, of one "
                             "dimension, a single row; pass an array")
    if g.ndim != a.ndim or (g.ndim > by_rows and memcmp(  # of rows the first number may be any
            g.shape + by_rows, a.shape + by_rows, (g.ndim - by_rows) * sizeof(Py_ssize_t)) != 0):
        raise ValueError(f"{bound.name(i, True)} has {'values of ' * by_rows}shape {values.shape}, its parameter "
                         f"{bound.arrays[i].shape}")
    a.strides = NULL
    if plan.cast and not by_rows and not in_order(g):
        a.strides = g.strides if g.ndim else a.shape  # without dimensions neither is read
        group.formed = True
    else:
        bound.check_layout(g, i, True, not (by_rows or bound.takes_tensors))
    if plan.space.zero_grad:
        if g.readonly:
            raise ValueError(f"{bound.name(i, True)} is read-only and can't be zeroed, as zero_grad=True asks; "
                             f"say zero_grad=False, or {writable(values)}")
        if a.strides != NULL and meets_itself(g):
            raise ValueError(f"{bound.name(i, True)} has elements that share memory, and zero_grad=True would zero "
                             "one while it zeroes the other; pass a copy")
    if g.len:
        low, high = <uintptr_t> g.buf, <uintptr_t> g.buf + g.len
        if a.strides != NULL:
            low, high = reach_of(g)
        shared = plan.memory.find(low, high - low)
        if shared >= 0:
            raise ValueError(f"{bound.name(i, True)} shares memory with {plan.owner(shared)}; pass a copy")
    if by_rows:
        work = max(work, 0) + bind_rows(bound, i, <Rows> grad, g.len)
        a.touched = bound.touched[i]
        a.g = <const char*> g.buf
        for row in range(ROWS_AHEAD):  # they come while the constants of the step are formed
            prefetch_row(group, a, row)
        group.by_rows = plan.space.by_rows = True
        return work
    a.g = <const char*> g.buf
    return max(work, 0) + a.stop - a.start


cdef as_array(BoundGroup bound, Py_ssize_t i, grad):
    """A number as the array that the gradient of one element is; anything else as it is."""
    cdef const Array* a = bound.group.arrays + i
    if isinstance(grad, (float, numpy.generic)) and a.stop - a.start == 1:
        grad = numpy.asarray(grad).reshape(bound.arrays[i].shape)
        grad.flags.writeable = False  # it is no place to zero
    return grad


cdef Py_ssize_t acquire_sums(Plan plan) except -2:
    """Bind the sums as gradients; returns the number of their elements, -1 where there are none."""
    cdef Group* group
    cdef BoundGroup bound
    cdef Array* a
    cdef Py_ssize_t i, j, work = -1
    plan.space.zero_grad = False  # what was added is zeroed already, and the next sum begins with a write
    for i in range(plan.space.n_groups):
        group = plan.space.groups[i]
        group.targets = group.formed = group.only_bfloat16 = group.by_rows = False
        for j in range(group.n_arrays):
            if group.summed[j]:
                a = group.arrays + j
                a.g = group.sums + a.start * native_itemsize(group)
                a.g_format = NATIVE
                work = max(work, 0) + a.stop - a.start
    for bound in plan.groups:
        for index, parts in bound.row_sums.items():
            work = acquire_array(plan, bound, index, joined_rows(parts), work)
    return work


cdef bint only_rows(BoundGroup bound) noexcept:
    """Are rows all that a group was given, in this call of accumulate and those before it?"""
    cdef Py_ssize_t i
    for i in range(bound.group.n_arrays):
        if bound.group.arrays[i].g != NULL and bound.group.arrays[i].touched == NULL:
            return False
    return bound.group.by_rows or len(bound.row_sums) > 0


cdef Py_ssize_t put_rows_aside(Plan plan, Py_ssize_t work) except -2:
    """Of a call of accumulate, keep the gradients of rows of arrays that have had no dense one; what is left, is bound.
    """
    cdef BoundGroup bound
    cdef Array* a
    cdef Py_ssize_t i
    cdef list kept = []
    for bound in plan.groups:
        for i in range(bound.group.n_arrays if bound.group.by_rows else 0):
            if bound.group.arrays[i].touched != NULL and not bound.group.summed[i]:
                kept.append((bound, i, summed_rows(bound, i)))
    for bound, i, rows in kept:  # once there was memory for all of them
        a = bound.group.arrays + i
        bound.row_sums.setdefault(i, []).append(rows)
        work -= a.touched.n * a.touched.length
        if plan.space.zero_grad:
            memset(<char*> a.g, 0, a.touched.nbytes)
        a.g, a.touched = NULL, NULL
    return work


cdef list rows_to_add(Plan plan):
    """Before a call of accumulate writes: what was kept of rows of arrays that are given a dense gradient now."""
    cdef BoundGroup bound
    cdef Array* a
    cdef Rows rows
    cdef list found = []
    for bound in plan.groups:
        for i in bound.row_sums:
            a = bound.group.arrays + <Py_ssize_t> i
            if a.g != NULL and a.touched == NULL:
                rows = joined_rows(bound.row_sums[i])
                reserve_entries(bound.touched_rows(i), rows.k)
                found.append((bound, i, rows))
    return found


cdef int add_rows_aside(Plan plan, list found) except -1:
    """Add it to the sums."""
    cdef BoundGroup bound
    cdef Py_ssize_t work = 0
    for bound in plan.groups:
        release(bound)
    for bound, i, rows in found:
        work = acquire_array(plan, bound, i, rows, work)
        del bound.row_sums[i]
    if work:
        plan.run(ADD, work, 0, plan.space.end)
    return 0


cdef int check_apart(Plan plan) except -1:
    """Gradients that will be zeroed may not share memory: the zeros of one would be another's gradient."""
    cdef uint64_t sign = 14695981039346656037ULL
    cdef BoundGroup group
    cdef Py_buffer* g
    cdef uintptr_t low, high
    cdef Py_ssize_t i
    cdef int j
    for group in plan.groups:
        for i in range(group.n_grads):  # looked at once for each set of buffers
            g = group.grads + i
            sign = (sign ^ <uintptr_t> g.buf) * 1099511628211ULL
            sign = (sign ^ <uint64_t> g.len) * 1099511628211ULL
            for j in range(g.ndim if plan.cast and not in_order(g) else 0):
                sign = (sign ^ <uint64_t> g.strides[j]) * 1099511628211ULL
    if sign == plan.apart:
        return 0
    spans = []
    for group in plan.groups:
        for i in range(group.n_grads):
            g = group.grads + i
            if g.len:
                low, high = <uintptr_t> g.buf, <uintptr_t> g.buf + g.len
                if not in_order(g):
                    low, high = reach_of(g)
                spans.append((low, high, group.group.index, i))
    spans.sort()
    for (_, end, a, i), (start, _, b, j) in zip(spans, spans[1:]):
        if start < end:
            raise ValueError(f"{given_name(plan, a, i)} and {given_name(plan, b, j)} share memory, or one has "
                             "elements between the other's, and zero_grad=True might zero what it should not; pass a "
                             "copy of one")
    plan.apart = sign
    return 0


cdef str given_name(Plan plan, Py_ssize_t number, Py_ssize_t n):
    """What messages call the n-th gradient that a group was given; those that are None do not count."""
    cdef BoundGroup bound = plan.groups[number]
    cdef Py_ssize_t i = 0
    while bound.group.arrays[i].g == NULL or n > 0:
        n -= bound.group.arrays[i].g != NULL
        i += 1
    return bound.name(i, True)


cdef int zero_gradients(Plan plan) noexcept:
    """Zero the gradients of a step that is skipped: otherwise what is accumulated in them would stay infinite."""
    cdef BoundGroup group
    cdef Py_buffer* g
    cdef Py_ssize_t i
    for group in plan.groups:
        for i in range(group.n_grads):
            g = group.grads + i
            if in_order(g):
                memset(g.buf, 0, g.len)
            else:
                visit(<char*> g.buf, g.ndim, g.shape, g.strides, g.itemsize, 0, g.len // g.itemsize, NULL)
    return 0


cdef int zero_rows(Plan plan) noexcept:
    """Zero the values of rows, after the sweep: two rows may have the same."""
    cdef Group* group
    cdef Py_ssize_t i, j
    for i in range(plan.space.n_groups if plan.space.by_rows and plan.space.zero_grad else 0):
        group = plan.space.groups[i]
        for j in range(group.n_arrays):
            if group.arrays[j].touched != NULL:
                memset(<char*> group.arrays[j].g, 0, group.arrays[j].touched.nbytes)
    return 0


cdef int release(BoundGroup group) noexcept:
    """Let go of a call's gradients."""
    cdef Py_ssize_t i
    for i in range(group.n_grads):
        PyBuffer_Release(group.grads + i)
    group.n_grads = 0
    for i in range(group.group.n_arrays):
        group.group.arrays[i].g = NULL
        group.group.arrays[i].touched = NULL
        group.group.arrays[i].strides = NULL
    return 0


cdef str there(Py_ssize_t n, str noun):
    return f"there {'is' if n == 1 else 'are'} {counted(n, noun)}"


cdef Py_ssize_t place_index(key, Py_ssize_t n, str noun) except -1:
    if not hasattr(key, "__index__") or isinstance(key, bool):
        raise TypeError(f"{there(n, noun)}, named by their index, an integer; got {key!r}")
    if not 0 <= key < n:
        raise IndexError(f"{there(n, noun)}, 0 .. {n - 1}; got {key}")
    return key


cdef tuple find_array(Plan plan, tuple place, str function, str last):
    """The group and the number of the array that is meant by the arguments of a function, before the last one."""
    cdef BoundGroup bound
    cdef Py_ssize_t number = 0, i = 0, n = len(place) - 1
    if plan.structured and n >= 0:
        number = place_index(place[0], len(plan.groups), "group")
    bound = plan.groups[number]
    if n != plan.structured + (not bound.bare):
        wanted = ["group"] * plan.structured + ([] if bound.bare else ["index" if bound.keys is None else "key"])
        raise TypeError(f"here it is {function}({', '.join(wanted + [last])}); got {counted(n + 1, 'argument')}")
    if bound.bare:
        return bound, 0
    key = place[n - 1]
    if bound.keys is None:
        return bound, place_index(key, bound.group.n_arrays, "array")
    if key not in bound.keys:
        raise KeyError(f"{bound.where} has no {key!r}; it has {', '.join(map(repr, bound.keys))}")
    return bound, bound.keys[key]

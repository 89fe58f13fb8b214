# Which memory a plan works on: groups linked to it, and other arrays put into the place of their parameters.

from libc.stdlib cimport qsort


cdef place_all(list groups, bint structured):
    """Tell groups what messages call them."""
    cdef BoundGroup group
    cdef Py_ssize_t i
    for i, group in enumerate(groups):
        group.place(i, structured)


cdef link_groups(Plan plan, list new, bint structured, bint keeps_undo):
    """Add groups, complete but for the first write, which is made here: all of them, or none if memory overlaps."""
    cdef BoundGroup group
    cdef Space space = plan.space
    cdef Py_ssize_t i, work = 0, first = space.end
    cdef Spans memory
    cdef list groups = plan.groups + new, spans = []
    for i, group in enumerate(new):
        group.group.index, group.group.position = space.n_groups + i, space.end
        group.group.first = space.n_arrays
        space.end += chunks_to(group.group.size) * CHUNK
        space.n_arrays += group.group.n_arrays
        work += group.group.size
        spans += group.new_spans()
        if keeps_undo:
            keep_undo(group, plan.pages is None or not plan.pages.parameters)
    space.n_groups = len(groups)
    memory = plan.memory.joined(spans)
    i = memory.overlap()
    if i >= 0:
        place_all(groups, structured)
        names = [(<BoundGroup> groups[memory.spans[j].group]).owner(memory.spans[j].item) for j in (i, i + 1)]
        place_all(plan.groups, plan.structured)
        raise ValueError(f"{names[0]} and {names[1]} share memory; pass each element once, or copy one of the "
                         "arrays")
    space.groups = <Group**> calloc(space.n_groups + 1, sizeof(Group*))
    space.steps = <Step*> calloc(space.n_arrays + 1, sizeof(Step))
    space.partial = <double*> calloc(space.end // CHUNK + space.n_arrays + 1, sizeof(double))
    if space.groups == NULL or space.steps == NULL or space.partial == NULL:
        free(space.groups)
        free(space.steps)
        free(space.partial)
        raise MemoryError()
    for i, group in enumerate(groups):
        space.groups[i] = &group.group
    if structured != plan.structured:
        place_all(plan.groups, structured)
    for i, group in enumerate(new):
        group.place(plan.space.n_groups + i, structured)
    plan.space, space = space, plan.space
    free(space.groups)
    free(space.steps)
    free(space.partial)
    plan.groups, plan.memory, plan.structured, plan.keeps_undo = groups, memory, structured, keeps_undo
    plan.lose_step("a group was added after the last one")
    plan.run(START, work, first, plan.space.end)


cdef int by_place(const void* a, const void* b) noexcept nogil:
    cdef uintptr_t low = (<const Span*> a).low, other = (<const Span*> b).low
    return (low > other) - (low < other)


cdef int look_at(BoundGroup bound, tuple arrays) except -1:
    """Acquire the buffers of arrays that are to be bound, and compare them with those that are."""
    cdef Py_ssize_t i
    cdef const Array* a
    cdef Py_buffer* view
    for i, x in enumerate(arrays):
        a, view = bound.group.arrays + i, bound.grads + i
        bfloat16 = bound.view(x, view, i, False)
        bound.n_grads += 1
        kind = format_of(view, bfloat16 or bound.uint16_is_bfloat16)
        if kind != bound.dtype:
            raise TypeError(f"{bound.name(i)} has dtype {named(x.dtype)}, the array whose place it is to take "
                            f"{bound.dtype}; the types can't change: construct a new optimizer{hint(view)}")
        if view.ndim != a.ndim or (a.ndim and memcmp(view.shape, a.shape, a.ndim * sizeof(Py_ssize_t)) != 0):
            raise ValueError(f"{bound.name(i)} has shape {x.shape}, the array whose place it is to take "
                             f"{bound.arrays[i].shape}; the shapes can't change: construct a new optimizer")
        bound.check_updatable(view, x, i)
    return 0


cdef int move_spans(Plan plan) except -1:
    """Note that the arrays that were looked at are the memory that the plan works on; refused if some of it overlaps.
    """
    cdef Spans memory = plan.memory
    cdef Span* span
    cdef Py_buffer* view
    cdef Py_ssize_t i
    memory.swap()
    for i in range(memory.n):
        span = memory.spans + i
        span[0] = memory.others[i]
        if span.item >= 0:
            view = (<BoundGroup> plan.groups[span.group]).grads + span.item
            span.low, span.high = <uintptr_t> view.buf, <uintptr_t> view.buf + view.len
    qsort(memory.spans, memory.n, sizeof(Span), by_place)
    i = memory.overlap()
    if i >= 0:
        names = [(<BoundGroup> plan.groups[memory.spans[j].group]).owner(memory.spans[j].item) for j in (i, i + 1)]
        memory.swap()
        raise ValueError(f"{names[0]} and {names[1]} share memory; pass each element once, or a copy of the array")
    return 0


cdef int show(BoundGroup bound, tuple arrays) except -1:
    bound.arrays = bound.layout.arrays = arrays
    return 0


cdef list rebind(Plan plan, params):
    """Put arrays into the place of those that are bound: all of them, or none if anything is wrong.

    Returns what `put_back` needs; None if they are bound already.  Nothing is written: `derive` is to follow.
    """
    cdef BoundGroup bound
    cdef Py_ssize_t i, j, n = plan.space.n_groups
    cdef tuple arrays
    cdef list found = [None] * n  # for each group
    cdef bint same = True
    parts = parts_of(plan, params, "params") if plan.structured else (params,)
    for j in range(n):  # zip would take a third of the time of one array
        bound = plan.groups[j]
        arrays = (parts[j],) if bound.bare else items_of(bound, parts[j], False)
        for i in range(bound.group.n_arrays):
            same = same and arrays[i] is bound.arrays[i]
            if bound.group.arrays[i].behind != NULL and bound.group.arrays[i].behind.n > 0:
                raise ValueError(f"rows of {bound.name(i)} have missed steps, which would be lost; call catch_up() "
                                 "before you copy or replace parameters")
        found[j] = arrays
    if same:
        return None
    try:
        for j in range(n):
            look_at(plan.groups[j], found[j])
        move_spans(plan)
        for j in range(n):
            bound = plan.groups[j]
            arrays = bound.arrays
            show(bound, found[j])
            found[j] = arrays
            for i in range(bound.n_grads):
                bound.group.arrays[i].replaced = bound.group.arrays[i].p
                bound.group.arrays[i].p = <char*> bound.grads[i].buf
    finally:
        for bound in plan.groups:
            release(bound)
    return found


cdef int put_back(Plan plan, list replaced) except -1:
    """Undo a call of `rebind`."""
    cdef BoundGroup bound
    cdef Py_ssize_t i
    plan.memory.swap()
    for bound, arrays in zip(plan.groups, replaced):
        show(bound, arrays)
        for i in range(bound.group.n_arrays):
            bound.group.arrays[i].p = bound.group.arrays[i].replaced
    return 0


cdef int derive(Plan plan) except -1:
    """After `rebind`: write what is made of the parameters.  A step of the arrays before can't be undone any more."""
    cdef Py_ssize_t i
    cdef bint wanted = False
    plan.lose_step("other arrays took the place of the parameters after the last one, by rebind or params=")
    for i in range(plan.space.n_groups):
        wanted |= plan.space.groups[i].master != NULL or plan.space.groups[i].copy_format != NATIVE
    if wanted:
        plan.sweep_all(DERIVE)
    return 0


cdef int refuse_masters(Plan plan) except -1:
    """A target's difference is looked at before the first write, and so before master copies are written anew."""
    cdef BoundGroup bound
    for bound in plan.groups:
        if bound.group.master != NULL:
            raise ValueError("step(target=, params=) is refused with master copies, from which the difference is taken "
                             "and which rebinding writes anew: call rebind(params) before step(target=...)")
    return 0

# Which memory a plan works on: groups linked to it.


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
        space.end += chunks_to(group.group.size) * CHUNK
        space.n_arrays += group.group.n_arrays
        work += group.group.size
        spans += group.new_spans()
        if keeps_undo:
            keep_undo(group)
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
    space.partial = <double*> calloc(space.end // CHUNK + 1, sizeof(double))
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
    plan.undoable = False  # the last step was one of fewer groups
    plan.run(START, work, first, plan.space.end)

# Undoing a step: what it is about to overwrite is kept, at the cost of a copy.

cdef struct Flat:            # one of a group's flat arrays
    char* p                  # NULL where the group has none
    Py_ssize_t itemsize
    Py_ssize_t per           # elements of the parameter space for one item


cdef Flat flat_array(const Group* group, int i) noexcept nogil:
    """Number i of the KEPT flat arrays of a group."""
    if i < SLOTS:
        return Flat(group.state[i], group.state_itemsize[i], 1)
    if i < 2 * SLOTS:
        return Flat(<char*> group.scales[i - SLOTS], sizeof(float), BLOCK)
    if i == 2 * SLOTS:
        return Flat(<char*> group.master, sizeof(float), 1)
    return Flat(group.ema, native_itemsize(group), 1)


cdef void carry(char* live, char* kept, Py_ssize_t size, bint back) noexcept nogil:
    if back:
        memcpy(live, kept, size)
    else:
        memcpy(kept, live, size)


cdef void move_elements(const Group* group, Py_ssize_t start, Py_ssize_t end, bint back) noexcept nogil:
    """All that a group holds for elements start .. end-1, whole chunks or up to its end."""
    cdef const Undo* undo = group.undo
    cdef Piece piece = pieces_from(group, start)
    cdef Py_ssize_t low, size, length, p_size = parameter_itemsize(group), copy_size = copy_itemsize(group)
    cdef Flat flat
    cdef int i
    for i in range(KEPT):
        flat = flat_array(group, i)
        if undo.kept[i] != NULL:
            low = start // flat.per * flat.itemsize
            size = (end + flat.per - 1) // flat.per * flat.itemsize - low
            carry(flat.p + low, undo.kept[i] + low, size, back)
    while next_piece(&piece, end):
        size = piece.stop - piece.start
        if undo.p != NULL:
            carry(piece.array.p + piece.at * p_size, undo.p + piece.start * p_size, size * p_size, back)
        if group.copy_format != NATIVE:
            carry(piece.array.copy + piece.at * copy_size, undo.copies + piece.start * copy_size, size * copy_size,
                  back)
        length = max(piece.array.row_length, 1)  # the rows that begin in it
        low = (piece.at + length - 1) // length
        size = ((piece.at + size + length - 1) // length - low) * native_itemsize(group)
        low = (piece.array.first_row + low) * native_itemsize(group)
        for i in range(SLOTS):
            if group.moments[i] != NULL:
                carry(group.moments[i] + low, undo.moments[i] + low, size, back)


cdef void move_chunks(const Group* group, Py_ssize_t start, Py_ssize_t end, bint back) noexcept nogil:
    """Keep those chunks of start .. end-1 that have a gradient and are not kept yet, or bring back what is kept.

    More than the elements that are stepped changes: 8-bit state of their neighbours in the same block may, too.
    """
    cdef uint8_t* kept = group.undo.chunks
    cdef Piece piece = pieces_from(group, start)
    while start < end if back else next_stepped(&piece, end):
        if not back:
            start = piece.start // CHUNK * CHUNK
        piece.stop = min(start + CHUNK, end)
        if kept[start // CHUNK] == back:
            move_elements(group, start, piece.stop, back)
            kept[start // CHUNK] = True
        start = piece.stop


cdef int keep_again(const Group* group, const Array* a) noexcept:
    """Of chunks that are kept already, keep the elements of one array as they are now: its rows have caught up."""
    cdef Py_ssize_t end, start = a.start
    while start < a.stop:
        end = min((start // CHUNK + 1) * CHUNK, a.stop)
        if group.undo.chunks[start // CHUNK]:
            move_elements(group, start, end, False)
        start = end
    return 0


cdef char* kept_bytes(BoundGroup bound, Py_ssize_t nbytes) except NULL:
    memory = numpy.empty(nbytes, "uint8")
    bound.keep.append(memory)
    bound.beside_nbytes += nbytes
    return <char*> address(memory)


cdef int keep_undo(BoundGroup bound, bint parameters) except -1:
    """Allocate what undoing a step of this group takes, once its state is attached.

    parameters: are they to be kept here?  State that is not in memory is kept elsewhere.

    Where other processes have a part of the state, that is kept there, and pointers point as far before what is kept
    here as those of the group do.
    """
    cdef Group* group = &bound.group
    cdef Undo* undo = &bound.undo
    cdef Py_ssize_t n = group.n_arrays, start = bound.store.start, size = bound.store.size, itemsize
    cdef Flat flat
    cdef int i
    for i in range(KEPT):
        flat = flat_array(group, i)
        if flat.p != NULL and not group.away:
            undo.kept[i] = kept_bytes(bound, (size + flat.per - 1) // flat.per * flat.itemsize)
            undo.kept[i] -= start // flat.per * flat.itemsize
    for i in range(SLOTS):
        if group.moments[i] != NULL:
            itemsize = native_itemsize(group)
            undo.moments[i] = kept_bytes(bound, <Py_ssize_t> bound.store.n_rows * itemsize)
            undo.moments[i] -= <Py_ssize_t> bound.store.first_row * itemsize
    if parameters:
        itemsize = parameter_itemsize(group)
        undo.p = kept_bytes(bound, size * itemsize) - start * itemsize
    if group.copy_format != NATIVE:
        itemsize = copy_itemsize(group)
        undo.copies = kept_bytes(bound, size * itemsize) - start * itemsize
    undo.chunks = <uint8_t*> kept_bytes(bound, chunks_to(group.size))
    undo.started = <uint8_t*> kept_bytes(bound, n)
    undo.t = <long long*> kept_bytes(bound, 8 * n)
    undo.product = <double*> kept_bytes(bound, 8 * n) if group.product != NULL else NULL
    group.undo = undo
    return 0


cdef int move_counts(Group* group, bint back) noexcept:
    cdef Undo* undo = group.undo
    carry(<char*> group.t, <char*> undo.t, 8 * group.n_arrays, back)
    carry(<char*> group.started, <char*> undo.started, group.n_arrays, back)
    if undo.product != NULL:
        carry(<char*> group.product, <char*> undo.product, 8 * group.n_arrays, back)
    return 0


cdef int keep(Plan plan, Counts before, bint usable, Py_ssize_t work) except -1:
    """Keep what the step is about to overwrite; of a step that is skipped, the counts."""
    cdef Group* group
    cdef Py_ssize_t i, j
    plan.gone, plan.moved = "memory ran out when the last one was kept", []
    for i in range(plan.space.n_groups):
        group = plan.space.groups[i]
        memset(group.undo.chunks, 0, chunks_to(group.size))
        move_counts(group, False)
        for j in range(group.n_arrays):
            if group.arrays[j].behind != NULL:
                group.arrays[j].behind.n_kept = -1
                if usable and group.arrays[j].touched != NULL:
                    keep_past(group.arrays + j)
    if usable:
        plan.run(KEEP, work, 0, plan.space.end)
    if plan.pages is not None:
        plan.pages.keep()
    plan.before = before
    plan.gone = None
    return 0


cdef int roll_back(Plan plan, agree) except -1:
    """Undo the last step, once agree(error), if there is one, says that no other process refuses it."""
    cdef bint taken = False
    error = None
    try:
        try:
            plan.guard.take(STEPPING)
            taken = True
            refuse_rollback(plan)
        except BaseException as refusal:
            if agree is None:
                raise
            error = refusal
        if agree is not None:
            agree(error)
        restore(plan)
    finally:
        if taken:
            plan.guard.release()
    return 0


cdef int refuse_rollback(Plan plan) except -1:
    """Refuse to undo the last step where that can't be done."""
    if not plan.keeps_undo:
        raise ValueError("rollback() needs what a step overwrote: construct the optimizer with keep_undo=True")
    if plan.gone is not None:
        raise ValueError(f"there is no step to undo: {plan.gone}")
    if plan.counts.pending:
        raise ValueError(f"{pending(plan.counts.pending)}, taken after the step that "
                         "rollback() would undo; discard() drops them")
    return 0


cdef int restore(Plan plan) except -1:
    """Undo the last step."""
    cdef Group* group
    cdef Py_ssize_t i, j, work = 0
    for i in range(plan.space.n_groups):
        group = plan.space.groups[i]
        for j in range(chunks_to(group.size)):
            work += group.undo.chunks[j] * CHUNK
    if plan.pages is not None:
        conduct(plan, Visit(plan, RESTORE, work).rollback, None)
    else:
        plan.run(RESTORE, work, 0, plan.space.end)
        restore_counts(plan)
    return 0


cdef int restore_counts(Plan plan) except -1:
    """What is counted, as it was before the last step."""
    cdef Group* group
    cdef Py_ssize_t i, j
    for i in range(plan.space.n_groups):
        group = plan.space.groups[i]
        move_counts(group, True)
        for j in range(group.n_arrays):
            restore_past(group.arrays + j)
    if not plan.dynamic:  # a number that was assigned since stays
        plan.before.loss_scale = plan.counts.loss_scale
    plan.counts = plan.before
    for owner, old, new in plan.moved:
        replace_schedules(plan, owner, new, old)
    plan.gone = "the last one is undone already, and one before it is not kept"
    return 0

# A step array by array, as gradients arrive.  It has the bits of the whole step: an array's own elements are stepped at
# once, and blocks of 8-bit state that several arrays share wait for the end, with a copy of their gradients.


cdef class Stepping:
    """``with plan.stepping() as now:`` each call of now(place, gradient) steps one array; the block is one step."""
    cdef Plan plan
    cdef double loss_scale, metric
    cdef object observed, lr
    cdef list moved            # the schedules that the metric changes
    cdef list stepped          # of each group, for each of its arrays: has it had its step?
    cdef dict shared           # gradients of blocks that several arrays share, by group and block
    cdef dict shared_rows      # of rows in such blocks, by group and array
    cdef list unfinished       # arrays of such blocks whose rows are to sum to one, as (group, array)
    cdef bint inside
    cdef bint left             # while another thread was stepping an array
    cdef object error          # with which it was left

    def __cinit__(self, Plan plan, double loss_scale, observed, double metric, lr):
        self.plan, self.loss_scale, self.observed, self.metric, self.lr = plan, loss_scale, observed, metric, lr

    def __enter__(self):
        cdef Plan plan = self.plan
        cdef BoundGroup bound
        cdef Counts before
        plan.guard.take(STEPPING)
        try:
            if plan.pages is not None:
                raise ValueError("stepping() is refused with state_path, since each of its calls would read and write "
                                 "a bucket of the state; use step(grads)")
            if plan.max_grad_norm or plan.on_nonfinite != IGNORE:
                limit = plan.settings["max_grad_norm"]
                needed = "on_nonfinite" if limit is None else f"max_grad_norm={limit!r}"
                raise ValueError(f"stepping() is refused with {needed}, which looks at all gradients before the first "
                                 "array is stepped; use step(grads)" + ("; a dynamic loss_scale implies it"
                                                                        if plan.dynamic else ""))
            plan.follow(plan.counts.t)
            if self.lr is not None:
                take_lr(plan, self.lr)
            if plan.counts.pending:
                refuse_sums(plan, False)
            self.moved = observe(plan, self.observed, self.metric) if self.observed is not None else None
            before = plan.counts
            plan.form_keys()
            inspect(plan, self.loss_scale or plan.counts.loss_scale, 0)
            if plan.keeps_undo:
                keep(plan, before, False, 0)
            self.stepped = [bytearray(bound.group.n_arrays) for bound in plan.groups]
            self.shared, self.shared_rows, self.unfinished = {}, {}, []
            plan.guard.rest, self.inside = ARRAYWISE, True
        finally:
            if self.inside:
                plan.guard.release()
            else:
                plan.release()
        return self

    def __call__(self, *place_and_grad, target=...):
        """now(gradient) for one bare array; before it, the key or index of the array, and before that of its group.

        With target=, that replaces the gradient.
        """
        cdef BoundGroup bound
        cdef Py_ssize_t i
        if not self.inside:
            raise RuntimeError("an array can be stepped inside the block `with opt.stepping() as now:` only")
        if target is not ...:
            place_and_grad += (target,)
        self.plan.guard.take(STEPPING, ARRAYWISE)
        try:
            bound, i = find_array(self.plan, place_and_grad, "now", "gradient")
            grad = place_and_grad[len(place_and_grad) - 1]
            if grad is not None:
                self.step(bound, i, grad, target is not ...)
        finally:
            if self.left:
                self.end()
            else:
                self.plan.guard.release()

    def __exit__(self, kind, error, traceback):
        cdef Guard guard = self.plan.guard
        if not self.inside:
            raise RuntimeError("this block is not entered: write `with opt.stepping() as now:`")
        self.inside, self.error = False, error
        self.left = guard.holder == STEPPING and guard.rest == ARRAYWISE
        if not self.left:  # otherwise the call that is under way ends the block, as nothing else could
            guard.take(STEPPING, ARRAYWISE)
            self.end()

    cdef int end(self) except -1:
        """Finish the step, or undo it, and give the guard back."""
        cdef Plan plan = self.plan
        cdef Py_ssize_t n
        error, self.error, self.left = self.error, None, False
        try:
            n = sum([sum(flags) for flags in self.stepped])
            if error is not None and plan.keeps_undo:
                restore(plan)
            elif n:
                self.finish()
            if error is not None and n:
                outcome = "are as they were before it" if plan.keeps_undo else (
                    "stay stepped; for the others this step did not take place")
                error.add_note(f"inside stepping(), after {n} of {plan.space.n_arrays} arrays were stepped, which "
                               f"{outcome}")
        finally:
            self.shared = self.shared_rows = None
            plan.guard.rest = FREE
            plan.release()
        return 0

    cdef int step(self, BoundGroup bound, Py_ssize_t i, grad, bint targets) except -1:
        cdef Plan plan = self.plan
        cdef Group* group = &bound.group
        cdef Array* a = group.arrays + i
        cdef Py_ssize_t work
        cdef Py_ssize_t lo = a.start // BLOCK * BLOCK, hi = min((a.stop + BLOCK - 1) // BLOCK * BLOCK, group.size)
        cdef uint8_t* stepped = <uint8_t*> PyByteArray_AS_STRING(self.stepped[group.index])
        if stepped[i]:
            raise ValueError(f"{bound.name(i)} has had its step in this block; add up its gradients, and pass the sum")
        expect_gradients(group, targets)
        plan.space.zero_grad = plan.zero_grad and not targets
        try:
            work = acquire_array(plan, bound, i, grad, 0)
            plan.form_step(group, i, 0)
            a.step = 0
            if group.options.exact:
                prepare(plan, group, i)
            if group.undo != NULL and a.behind != NULL and a.touched != NULL:
                keep_past(a)
            if group.undo != NULL:  # chunks that a neighbour has kept excepted
                plan.run(KEEP, work, group.position + a.start // CHUNK * CHUNK,
                         group.position + chunks_to(a.stop) * CHUNK)
            if group.state_format == UINT8:  # the blocks that are its own
                if lo < a.start:
                    lo += BLOCK
                if hi > a.stop:
                    hi = a.stop // BLOCK * BLOCK
                if hi < lo:
                    lo = hi = a.stop
                self.share(bound, i, a.start, lo)
                self.share(bound, i, hi, a.stop)
                plan.space.begun = group.by_moments  # of all rows now: some lie in blocks of both kinds
            if plan.space.begun:
                plan.run(BEGIN, work, group.position + a.start, group.position + a.stop)
            if lo < hi:
                plan.run(STEP, work, group.position + lo, group.position + hi)
            if group.options.sum_to_one and lo <= a.start and hi >= a.stop:
                plan.run(FINISH, work, group.position + a.start, group.position + a.stop)
            elif group.options.sum_to_one:
                self.unfinished.append((group.index, i))
            zero_rows(plan)
            if a.touched != NULL and a.behind != NULL:
                note_past(group, a, plan.space.steps, group.factor)
            stepped[i] = True
        finally:
            a.g, a.touched, a.strides = NULL, NULL, NULL
            plan.space.by_rows, plan.space.zero_grad, plan.space.begun = False, plan.zero_grad, False
            if bound.n_grads:
                PyBuffer_Release(bound.grads)
                bound.n_grads = 0
        return 0

    cdef int share(self, BoundGroup bound, Py_ssize_t i, Py_ssize_t start, Py_ssize_t stop) except -1:
        """Copy the gradient of elements of a block that several arrays share; of rows, all rows."""
        cdef Group* group = &bound.group
        cdef Array* a = group.arrays + i
        cdef Piece piece
        cdef Py_ssize_t block = start // BLOCK
        if start == stop:
            return 0
        copies = self.shared.setdefault((group.index, block), bytearray(BLOCK * sizeof(float)))
        if a.touched != NULL and (group.index, i) not in self.shared_rows:
            self.shared_rows[group.index, i] = summed_rows(bound, i)
        elif a.touched == NULL:
            piece = pieces_from(group, start)
            next_piece(&piece, stop)
            add_segment(&self.plan.space, group, &piece,
                        <float*> PyByteArray_AS_STRING(copies) + (start - block * BLOCK), True)
        return 0

    cdef int finish(self) except -1:
        """Step the shared blocks, and count."""
        cdef Plan plan = self.plan
        cdef Group* group
        cdef Array* a
        cdef Piece piece
        cdef Py_ssize_t i, j, start, stop
        cdef const char* stepped
        cdef const char* g
        for i in range(plan.space.n_groups):
            group = plan.space.groups[i]
            group.targets = group.formed = group.only_bfloat16 = group.by_rows = False
            stepped = PyByteArray_AS_STRING(self.stepped[i])
            for j in range(group.n_arrays):
                if stepped[j]:  # any address says that it takes part
                    group.arrays[j].g, group.arrays[j].g_format = stepped, NATIVE
        for (number, index), rows in self.shared_rows.items():
            acquire_array(plan, plan.groups[number], index, rows, 0)
        plan.form_steps()
        for (number, block), copies in self.shared.items():
            group = plan.space.groups[<Py_ssize_t> number]
            start = <Py_ssize_t> block * BLOCK
            stop = min(start + BLOCK, group.size)
            g = PyByteArray_AS_STRING(copies)
            piece = pieces_from(group, start)
            while next_piece(&piece, stop):
                a = <Array*> piece.array
                if a.g != NULL and a.touched == NULL:
                    a.g = g + (piece.start - start - piece.at) * <Py_ssize_t> sizeof(float)
            plan.space.begun = True
            plan.run(STEP, stop - start, group.position + start, group.position + stop)
            plan.space.begun = False
        for number, index in self.unfinished:
            group = plan.space.groups[<Py_ssize_t> number]
            a = group.arrays + <Py_ssize_t> index
            plan.run(FINISH, a.stop - a.start, group.position + a.start, group.position + a.stop)
        plan.count(self.moved)
        return 0

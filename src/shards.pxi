# A step that several processes take together: each has all parameters, and the state of the positions Plan.low to
# Plan.high.  They give one another gradients before they step, and parameters afterwards; how, is Python's.


cdef (Py_ssize_t, Py_ssize_t) positions(Plan plan, Py_ssize_t group, Py_ssize_t lo, Py_ssize_t hi) except *:
    """The first position of elements lo .. hi-1 of a group (-1: the only one), and the one after the last."""
    if plan.space.zero_grad and (plan.max_grad_norm or plan.on_nonfinite != IGNORE):
        raise ValueError("a range can't be stepped with zero_grad and a norm or check, which need all of them")
    if group == -1 and plan.space.n_groups == 1:
        group = 0
    if not 0 <= group < plan.space.n_groups:
        raise ValueError(f"a range needs a group, 0 .. {plan.space.n_groups - 1}, got {group}")
    cdef Py_ssize_t size = plan.space.groups[group].size, first = plan.space.groups[group].position
    if hi == -1:
        hi = size
    if not (0 <= lo <= hi <= size and (lo % CHUNK == 0 or lo == size) and (hi % CHUNK == 0 or hi == size)):
        raise ValueError(f"lo and hi must be multiples of {CHUNK} or the end, {size}, with lo <= hi; "
                         f"got {lo} and {hi}")
    for at in (lo, hi):
        if cuts_row(plan.space.groups[group], at):
            raise ValueError(f"a range can't end within a row that is to sum to one, as element {at} is")
    (<BoundGroup> plan.groups[group]).refuse_cuts(lo, hi)
    return first + lo, first + chunks_to(hi) * CHUNK


cdef class Sharing:
    """``with plan.sharing(...) as now:`` the processes' gradients are summed and, if asked for, stepped.

    Entering checks all that can be refused and writes nothing.  Then the calls are, in this order: `gradients`, `add`
    for each process and range, `summed`; and to step, `usable`, `keep`, `step` for each range (or `step_paged`, where
    state is not in memory), `finish`.  The guard is held until the block ends; one that was not entered may end, too.
    """
    cdef Plan plan
    cdef object grads, observed, lr
    cdef bint stepping, applied, entered
    cdef double loss_scale, metric, norm_before
    cdef Py_ssize_t work
    cdef list moved

    def __cinit__(self, Plan plan, grads, bint stepping, double loss_scale, observed, double metric, lr):
        self.plan, self.grads, self.stepping = plan, grads, stepping
        self.loss_scale, self.observed, self.metric, self.lr = loss_scale, observed, metric, lr

    def __enter__(self):
        cdef Plan plan = self.plan
        cdef BoundGroup bound
        cdef bint given = self.grads is not ...
        plan.guard.take(STEPPING, FREE if self.stepping else AVERAGED)
        self.entered, plan.told = True, False
        try:
            if self.stepping:
                plan.follow(plan.counts.t)
                if self.lr is not None:
                    take_lr(plan, self.lr)
                if (not given) != (plan.counts.pending > 0):
                    refuse_sums(plan, not given)
                if self.observed is not None:
                    self.moved = observe(plan, self.observed, self.metric)
            if given:
                acquire(plan, self.grads, False)
                if plan.space.zero_grad:
                    check_apart(plan)
                plan.need_sums(plan.groups)
            else:
                acquire_sums(plan)
            for bound in plan.groups:
                self.check(bound)
            if plan.pages is not None:
                refuse_cut_rows(plan)
            if self.stepping:
                plan.form_steps()
        except BaseException:
            self.__exit__()
            raise
        return self

    cdef int check(self, BoundGroup bound) except -1:
        """Refuse what can't be sent from where it lies, and rows that two processes would have a part of."""
        cdef Plan plan = self.plan
        cdef Group* group = &bound.group
        cdef Py_ssize_t i, at
        if group.by_rows:
            raise TypeError("gradients of rows can't be shared with other processes: pass dense ones, or give each "
                            "process a table of its own")
        for i in range(group.n_arrays):
            if group.arrays[i].g != NULL and group.arrays[i].strides != NULL:
                raise ValueError(f"{bound.name(i, True)} is not C-contiguous, as what is sent to other processes must "
                                 "be; pass np.ascontiguousarray(x)")
        for at in (plan.low - group.position, min(plan.high, plan.space.end) - group.position):
            if 0 < at < group.size and cuts_row(group, at):
                raise ValueError(f"sum_to_one={bound.options['sum_to_one']!r}: two processes would share the row that "
                                 f"element {at} of group {group.index} belongs to; shares are cut at multiples of "
                                 f"{CHUNK} elements: use rows whose length divides that, or fewer processes")
        return 0

    def __exit__(self, *error):
        if self.entered:
            self.entered, self.plan.space.zero_grad = False, self.plan.zero_grad
            self.plan.release()

    def options(self):
        """The numbers and switches of groups that are in force in this step, as bytes; and the limit of the norm."""
        cdef Plan plan = self.plan
        cdef Py_ssize_t i
        return b"".join([(<const char*> &plan.space.groups[i].options)[:sizeof(Options)]
                         for i in range(plan.space.n_groups)]), plan.max_grad_norm

    def gradients(self):
        """Of each array (the address of its gradient, its format); 0 where it has none."""
        cdef Plan plan = self.plan
        cdef Group* group
        cdef Array* a
        cdef Py_ssize_t i, j
        cdef list found = []
        for i in range(plan.space.n_groups):
            group = plan.space.groups[i]
            for j in range(group.n_arrays):
                a = group.arrays + j
                found.append((<uintptr_t> a.g, <int> a.g_format if a.g != NULL else -1))
                a.g = NULL
        return found

    def add(self, Py_ssize_t first, Py_ssize_t last, list pieces):
        """Add gradients of one process to the sums of positions first .. last-1.

        pieces: (group, array, where the array's gradient would begin in memory, its format, is it the first one?).
        """
        cdef Plan plan = self.plan
        cdef Array* a
        cdef Py_ssize_t i, j, place
        cdef int kind
        cdef bint begins
        plan.space.zero_grad = False
        for i, j, place, kind, begins in pieces:
            a = plan.space.groups[i].arrays + j
            a.g, a.g_format = <const char*> place, <Format> kind
            plan.space.groups[i].summed[j] = not begins
        plan.run(ADD, last - first if pieces else 0, first, last)
        for i, j, place, kind, begins in pieces:
            plan.space.groups[i].arrays[j].g = NULL

    def summed(self, list flags, Py_ssize_t calls):
        """Say of each array whether there is a sum now, and count the calls of accumulate that were made of it."""
        cdef Plan plan = self.plan
        cdef Py_ssize_t i, j, at = 0
        for i in range(plan.space.n_groups):
            for j in range(plan.space.groups[i].n_arrays):
                plan.space.groups[i].summed[j] = flags[at]
                at += 1
        plan.counts.pending += calls

    def usable(self, bint mean):
        """Form the constants of the step, take the norm and look for non-finite elements: is there something to step?
        """
        cdef Plan plan = self.plan
        self.work = acquire_sums(plan)
        self.applied, self.norm_before = False, plan.counts.grad_norm
        if self.work >= 0:
            plan.form_keys()
            plan.form_steps()
            self.applied = inspect(plan, (self.loss_scale or plan.counts.loss_scale)
                                   * (plan.counts.pending if mean else 1), self.work)
        return self.applied

    def anything(self):
        """Is there a gradient at all?"""
        return self.work >= 0

    def keep(self):
        """Keep what the step will overwrite, if that is wanted, once no process refuses it."""
        cdef Counts before = self.plan.counts
        if self.plan.keeps_undo:
            before.pending, before.grad_norm = 0, self.norm_before
            keep(self.plan, before, self.applied, self.work)

    def as_a_whole(self, list places):
        """Must `step` be called once, since ranges that begin at these positions cut rows that can't be cut?"""
        cdef BoundGroup bound
        cdef Py_ssize_t at
        for bound in self.plan.groups:
            for at in places if bound.group.options.sum_to_one or bound.group.by_moments else ():
                at -= bound.group.position
                if 0 < at < bound.group.size and (cuts_row(&bound.group, at) or cuts_moment(&bound.group, at)):
                    return True
        return False

    def step(self, Py_ssize_t first, Py_ssize_t last):
        """Step positions first .. last-1."""
        self.plan.run(STEP, last - first, first, last)
        finish_rows(self.plan, last - first, first, last)

    def step_paged(self, progress):
        """Step all positions of this process, whose state is brought bucket by bucket, and count the step: all of it,
        or nothing."""
        cdef BoundGroup bound
        cdef bint summing = any([bound.group.options.sum_to_one for bound in self.plan.groups])
        if self.work >= 0:
            step_paged(self.plan, Visit(self.plan, STEP, self.work, summing, self.applied, self.moved),
                       self.norm_before, progress)

    def finish(self):
        """Count the step, unless `step_paged` has done that, and drop the sums."""
        cdef Plan plan = self.plan
        if plan.pages is None:
            if self.applied:
                plan.count(self.moved)
            elif self.work >= 0:
                plan.counts.skipped_steps += 1
            if plan.dynamic and self.work >= 0:
                rescale(&plan.counts, self.applied)
        plan.drop_sums()

    def end(self, progress):
        """After the block: report that all is done, unless that was, and raise what has waited for the end."""
        if progress is not None and not self.plan.told:
            progress(1, 1)
        raise_late(self.plan)

    def drop(self):
        """Leave no sums behind."""
        self.plan.drop_sums()

    def zero(self):
        """Zero this process's gradients, if that was asked for."""
        if self.plan.zero_grad:
            zero_gradients(self.plan)


def carry_runs(list runs, uintptr_t buffer, bint back):
    """Copy runs of memory, each (address, bytes), one after the other into a buffer, or back.  Address 0: a gap."""
    cdef Py_ssize_t size
    cdef uintptr_t place
    for place, size in runs:
        if place:
            carry(<char*> place, <char*> buffer, size, back)
        buffer += size

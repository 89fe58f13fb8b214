# State that is not in memory: a sweep goes over it bucket by bucket, and `Plan.pages`, which Python fills, brings each
# bucket and takes it away.  Here is what a sweep does with one, and how a call waits for all of them.

from _thread import start_new_thread
from queue import SimpleQueue

cdef enum:
    STREAMED = 1 << 20  # elements after which memory maps are let go that are swept over


cdef bint is_paged(Work what, Plan plan) noexcept:
    """Does a sweep read or write what is not in memory?"""
    cdef Py_ssize_t i
    if what == COPY:
        for i in range(plan.space.n_groups):
            if plan.space.groups[i].copy_format != NATIVE and plan.space.groups[i].master != NULL:
                return True
        return False
    return what == START or what == DERIVE or what == AVERAGE


cdef int run_paged(Plan plan, Work what, Py_ssize_t work, Py_ssize_t first, Py_ssize_t last) except -1:
    """A sweep of a plan whose state is not in memory."""
    cdef bint streamed
    if is_paged(what, plan):
        conduct(plan, Visit(plan, what, work).sweep, None)
    elif what == FINISH:  # within a visit
        plan.sweep_range(what, work, first, last)
    else:
        streamed = plan.pages.watch(mapped(plan))
        sweep_streamed(plan, what, work, first, last, streamed)
    return 0


cdef list mapped(Plan plan):
    """What may be memory maps: parameters, gradients and copies."""
    cdef BoundGroup bound
    cdef Py_ssize_t i
    cdef list found = []
    for bound in plan.groups:
        found.extend(bound.arrays)
        for i in range(bound.n_grads):
            if <void*> bound.grads[i].obj != NULL:
                found.append(bound.grads[i].obj)
        found.extend(bound.copies)
    return found


cdef int sweep_streamed(Plan plan, Work what, Py_ssize_t work, Py_ssize_t first, Py_ssize_t last,
                        bint streamed) except -1:
    """Sweep over positions first .. last-1, and let memory maps go after it."""
    cdef Py_ssize_t stop
    while first < last:
        stop = min(first + STREAMED, last) if streamed else last
        plan.sweep_range(what, min(work, stop - first), first, stop)
        if streamed:
            plan.pages.let_go(spans_within(plan, first, stop))
        first = stop
    return 0


cdef list spans_within(Plan plan, Py_ssize_t first, Py_ssize_t last):
    """Where parameters, dense gradients and copies of these positions lie in memory."""
    cdef const Group* group
    cdef const Array* a
    cdef Piece piece
    cdef Py_ssize_t i, start, end, size
    cdef list found = []
    for i in range(plan.space.n_groups):
        group = plan.space.groups[i]
        start, end = max(first - group.position, 0), min(last - group.position, group.size)
        if start >= end:
            continue
        piece = pieces_from(group, start)
        while next_piece(&piece, end):
            a = piece.array
            size = piece.stop - piece.start
            found.append(span_of(a.p, parameter_itemsize(group), piece.at, size))
            if a.g != NULL and a.touched == NULL and a.strides == NULL:
                found.append(span_of(a.g, gradient_itemsize(group, a), piece.at, size))
            if group.copy_format != NATIVE:
                found.append(span_of(a.copy, copy_itemsize(group), piece.at, size))
    return found


cdef tuple span_of(const char* x, Py_ssize_t itemsize, Py_ssize_t at, Py_ssize_t size):
    return <uintptr_t> x + at * itemsize, <uintptr_t> x + (at + size) * itemsize


cdef class Visit:
    """What a call does with the buckets of a plan, in a thread of its own: nothing there is interrupted by a signal.

    usable, moved: of a step, as `Plan.step` has them.
    """
    cdef Plan plan
    cdef Work what
    cdef Py_ssize_t work
    cdef bint summing, usable
    cdef list moved
    cdef bytes before   # the counts of the run, as they were
    cdef list counts    # of each group

    def __init__(self, Plan plan, int what, Py_ssize_t work, bint summing=False, bint usable=True, list moved=None):
        self.plan, self.what, self.work = plan, <Work> what, work
        self.summing, self.usable, self.moved = summing, usable, moved

    def sweep(self):
        """Sweep over all buckets."""
        if self.what == DERIVE:
            self.plan.pages.derive(self)
        else:
            self.plan.pages.sweep(self, self.what != START, self.what == START)

    def step(self):
        """Make a step, or count one that is skipped: all of it, or nothing."""
        self.plan.pages.step(self, self.usable)

    def rollback(self):
        self.plan.pages.rollback(self)

    def wants(self, Py_ssize_t first, Py_ssize_t last):
        """Has this sweep anything to do in positions first .. last-1?"""
        cdef const Group* group
        cdef Piece piece
        cdef Py_ssize_t i, start, end
        if self.what != STEP:
            return True
        for i in range(self.plan.space.n_groups):
            group = self.plan.space.groups[i]
            start, end = max(first - group.position, 0), min(last - group.position, group.size)
            if start < end:
                piece = pieces_from(group, start)
                if next_stepped(&piece, end):
                    return True
        return False

    def mapped(self):
        return mapped(self.plan)

    def __call__(self, list places, Py_ssize_t first, Py_ssize_t last, bint streamed):
        """Sweep over positions first .. last-1, whose state lies at `places`: see `put_places`."""
        put_places(self.plan, places)
        sweep_streamed(self.plan, self.what, min(self.work, last - first), first, last, streamed)
        if self.summing:
            finish_rows(self.plan, min(self.work, last - first), first, last)

    def spans(self, Py_ssize_t first, Py_ssize_t last):
        return spans_within(self.plan, first, last)

    def copy(self, list places, Py_ssize_t first, Py_ssize_t last):
        """Write the arrays of copy_to of these positions anew."""
        put_places(self.plan, places)
        self.plan.sweep_range(COPY, last - first, first, last)

    def report(self, Py_ssize_t done, Py_ssize_t total):
        if self.plan.job is not None:
            (<Job> self.plan.job).tokens.put((done, total))

    def count(self):
        """Count the step, so that `uncount` can undo that."""
        cdef Plan plan = self.plan
        self.before, self.counts = (<char*> &plan.counts)[:sizeof(plan.counts)], counts_of(plan)
        if self.usable:
            plan.count(self.moved)
        else:
            plan.counts.skipped_steps += 1
        if plan.dynamic:
            rescale(&plan.counts, self.usable)

    def uncount(self):
        cdef Plan plan = self.plan
        if self.counts is not None:
            memcpy(&plan.counts, <const char*> self.before, sizeof(plan.counts))
            put_counts(plan, self.counts)
            for owner, old, new in (self.moved or ()) if self.usable else ():
                replace_schedules(plan, owner, new, old)
            self.counts = None

    def undo(self):
        """Bring back the parameters and copies that `keep` has kept."""
        cdef Plan plan = self.plan
        sweep_streamed(plan, RESTORE, plan.space.end, 0, plan.space.end, False)

    def take_back(self):
        """Bring back the counts of the step before."""
        restore_counts(self.plan)

    def keeps(self):
        """Are parameters kept in memory, for a rollback?"""
        return self.plan.keeps_undo and not self.plan.pages.parameters


cdef int step_paged(Plan plan, Visit visit, double norm_before, progress) except -1:
    """The writes of a step, and its counts."""
    try:
        conduct(plan, visit.step, progress)
    except BaseException:
        plan.gone, plan.counts.grad_norm = "the last one failed on the disk", norm_before
        raise
    return 0


cdef list counts_of(Plan plan):
    """What each group counts of its arrays, as bytes."""
    cdef Group* group
    cdef Py_ssize_t i, n
    cdef list found = []
    for i in range(plan.space.n_groups):
        group = plan.space.groups[i]
        n = group.n_arrays
        found.append(((<char*> group.t)[:8 * n], (<char*> group.started)[:n],
                      (<char*> group.product)[:8 * n] if group.product != NULL else b""))
    return found


cdef int put_counts(Plan plan, list counts) except -1:
    cdef Group* group
    cdef Py_ssize_t i
    cdef bytes t, started, product
    for i in range(plan.space.n_groups):
        group = plan.space.groups[i]
        t, started, product = counts[i]
        memcpy(group.t, <const char*> t, len(t))
        memcpy(group.started, <const char*> started, len(started))
        if group.product != NULL:
            memcpy(group.product, <const char*> product, len(product))
    return 0


cdef int put_places(Plan plan, list places) except -1:
    """Say where state is now: each (group, number of its flat array, address, number of the first item there)."""
    cdef Group* group
    cdef Py_ssize_t i, at
    cdef int j
    cdef uintptr_t address
    for i, j, address, at in places:
        group = plan.space.groups[i]
        if j < SLOTS:
            group.state[j] = <char*> address - at * group.state_itemsize[j]
        elif j < 2 * SLOTS:
            group.scales[j - SLOTS] = <float*> address - at
        elif j == 2 * SLOTS:
            group.master = <float*> address - at
        else:
            group.ema = <char*> address - at * native_itemsize(group)
    return 0


cdef int refuse_cut_rows(Plan plan) except -1:
    """Refuse rows that are to sum to one and lie in two buckets."""
    cdef BoundGroup bound
    cdef Py_ssize_t at
    for bound in plan.groups:
        for at in plan.pages.cuts if bound.group.options.sum_to_one else ():
            at -= bound.group.position
            if 0 < at < bound.group.size and cuts_row(&bound.group, at):
                raise ValueError(f"sum_to_one={bound.options['sum_to_one']!r}: the row that element {at} of group "
                                 f"{bound.group.index} belongs to lies in two buckets of the state on disk; say "
                                 "sum_to_one in the constructor, with a new folder, so that buckets are cut between "
                                 "rows")
    return 0


# --- waiting ---------------------------------------------------------------------------------------------------------

cdef class Job:
    """A call that a thread of its own makes."""
    cdef object call, tokens, error

    def __call__(self):
        try:
            self.call()
        except BaseException as error:
            self.error = error
        self.call = None
        self.tokens.put(None)


cdef int conduct(Plan plan, call, progress) except -1:
    """Make a call in a thread of its own, and wait for its end.

    What a handler of a signal raises meanwhile (a Ctrl-C), or progress(done, total), waits until the call has ended, in
    `plan.late`.  The second one of these stops it, as an error would.
    """
    cdef Job job = Job.__new__(Job)
    cdef object late = None
    cdef bint stopped = False
    job.call, job.tokens = call, SimpleQueue()
    plan.job = job
    try:
        start_new_thread(job, ())
    except RuntimeError:  # while Python ends there are no new ones
        job()
    while True:
        try:  # nothing here is Python code, between whose lines a handler could run, but `get` and `progress`
            report = job.tokens.get()
            if report is None:
                break
            if progress is not None:
                done, total = report
                plan.told = True
                progress(done, total)
        except BaseException as error:
            if late is not None:
                plan.pages.stopped = stopped = True
            late, progress = error, None
    plan.job, plan.pages.stopped = None, False
    if job.error is not None:
        error, job.error = job.error, None
        if stopped:
            raise late from error
        raise error
    if late is not None:
        plan.late = late
    return 0


cdef inline int raise_late(Plan plan) except -1:
    """At the end of a call: raise what has waited for it."""
    if plan.late is not None:
        late, plan.late = plan.late, None
        raise late
    return 0


cdef inline int raise_late_alone(Plan plan) except -1:
    """Raise what has waited, unless other processes wait for what this one does next: then `Plan.raise_late` does."""
    if plan.combine is None:
        raise_late(plan)
    return 0

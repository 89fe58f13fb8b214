# The plan: groups linked for stepping.  A step takes the guard, asks the schedules, acquires the gradients, forms the
# constants, sweeps and counts.  Everything is checked before the first write.

from libc.string cimport memcmp

cdef struct Counts:  # all that a step counts, beside the counts of each array
    long long t, skipped_steps, pending, growth_tracker
    double loss_scale, grad_norm


@no_gc_clear  # as the groups are, into which it points
cdef class Plan:
    """Plan(guard, check_followed): no groups yet.

    check_followed(name, schedule, value, t): what the schedule of a setting gave, checked.

    The counts of the run are its attributes: t, applied steps; skipped_steps; pending calls of accumulate; the
    loss_scale, and the growth_tracker of a dynamic one; grad_norm, of the last step, NaN if none was taken.
    """
    cdef readonly Guard guard
    cdef readonly list groups      # of BoundGroup
    cdef readonly bint structured  # the caller gave a list of groups, and gives a list of their gradients
    cdef readonly dict settings
    cdef readonly long long version  # how often they were assigned
    cdef public int n_threads      # 0: not chosen
    cdef public Py_ssize_t low, high  # the positions that this process sweeps; others have the rest
    cdef public object combine     # what completes a reduction by what other processes have found, or None
    cdef public object pages       # what brings state that is not in memory, and takes it away, or None
    cdef object job, late          # that such a call waits for; an exception that waits for the end of this call
    cdef bint told                 # somebody, of the progress of this call
    cdef readonly bint dynamic     # the loss scale is
    cdef readonly bint keeps_undo
    cdef Space space
    cdef Counts counts
    cdef Spans memory
    cdef uint64_t apart            # a hash of gradient buffers that were found not to overlap
    cdef double max_grad_norm
    cdef object norm_schedule      # which it follows, or None
    cdef object check_followed
    cdef NormOver norm_over
    cdef OnNonfinite on_nonfinite
    cdef bint zero_grad, cast
    cdef list saved                # parameters as they were, while their averages are in place, if these are apart
    cdef Counts before             # the last step, with what else undoes it
    cdef list moved                # the schedules that it changed: (group, old, new)
    cdef str gone                  # why there is no step to undo; None: there is one
    cdef bint lr_given             # groups have another lr than their own, until the end of this call

    def __init__(self, Guard guard, check_followed):
        self.guard, self.check_followed, self.groups, self.memory = guard, check_followed, [], Spans()
        self.counts.loss_scale, self.counts.grad_norm = 1, NAN
        self.gone = "none was made since this optimizer was constructed"
        self.low, self.high = 0, PY_SSIZE_T_MAX

    def __dealloc__(self):
        free(self.space.groups)
        free(self.space.steps)
        free(self.space.partial)

    @property
    def t(self):
        return self.counts.t

    @property
    def skipped_steps(self):
        return self.counts.skipped_steps

    @property
    def pending(self):
        return self.counts.pending

    @property
    def loss_scale(self):
        return self.counts.loss_scale

    @property
    def growth_tracker(self):
        return self.counts.growth_tracker

    @property
    def grad_norm(self):
        return self.counts.grad_norm

    @property
    def beside_nbytes(self):
        return sum([group.beside_nbytes for group in self.groups])

    # --- groups and options, while the caller holds the guard ----------------------------------------------------

    def link(self, list new, bint structured, bint keeps_undo, run, tuple groups_shown):
        """Add groups, complete but for the first write, which is made here: all of them, or none if memory overlaps.

        groups_shown: what run.groups is to be from now on.
        """
        link_groups(self, new, structured, keeps_undo)
        run.groups = groups_shown

    def configure(self, dict settings):
        """Take over the options of the optimizer as a whole, already checked."""
        configure(self, settings)

    def set_counts(self, long long t, long long skipped_steps, double grad_norm, long long pending, double loss_scale,
                   long long growth_tracker):
        """Take over what another run has counted."""
        self.counts = Counts(t, skipped_steps, pending, growth_tracker, loss_scale, grad_norm)

    def need_sums(self, list groups):
        """Allocate the sums of those groups that have none yet."""
        cdef BoundGroup group
        cdef list spans = []
        for group in groups:
            if group.group.sums == NULL:
                group.attach_sums()
                spans += group.new_spans()
        if spans:
            self.memory = self.memory.joined(spans)

    def forget(self):
        """Before a load: drop the sums, what rows have missed, and the step that could be undone."""
        self.drop_sums()
        bring_up(self)  # a load may leave the parameters as they are
        forget_missed(self)
        self.lose_step("a load came after the last one")

    def settle(self):
        """Before a save: all rows are up to date, and no sums of rows are pending."""
        cdef BoundGroup bound
        for bound in self.groups:
            if bound.row_sums:
                raise ValueError("accumulated rows are pending, which can't be saved: step() takes their mean, "
                                 "discard() drops them")
        bring_up(self)

    cdef drop_sums(self):
        cdef Group* group
        cdef Py_ssize_t i
        self.counts.pending = 0
        for i in range(self.space.n_groups):
            group = self.space.groups[i]
            memset(group.summed, 0, group.n_arrays)
            (<BoundGroup> self.groups[i]).row_sums.clear()

    def start(self):
        """Write all that is held anew, as at the beginning."""
        self.sweep_all(START)

    def write_copies(self):
        """Write the arrays of copy_to anew, from the parameters or their master copy."""
        self.sweep_all(COPY)

    # --- calls that users make -----------------------------------------------------------------------------------

    def conduct(self, call):
        """Make a call in a thread of its own, which no signal interrupts: what a handler raises comes at its end."""
        conduct(self, call, None)
        raise_late_alone(self)

    def raise_late(self):
        """At the end of a call that several processes make together: raise what has waited for it."""
        raise_late(self)

    def end(self, str why):
        """Let nothing step or change this run any more.  The caller holds the guard."""
        self.guard.end(why)

    def averages(self):
        """For a ``with`` block, inside which the parameters are their averages."""
        return Averages(self)

    def sharing(self, grads, bint stepping, double loss_scale=0.0, observed=None, double metric=0.0, lr=None):
        """For a ``with`` block in which several processes sum gradients and step, each its part.  See `Sharing`."""
        return Sharing(self, grads, stepping, loss_scale, observed, metric, lr)

    def stepping(self, double loss_scale=0.0, observed=None, double metric=0.0, lr=None):
        """For a ``with`` block that is one step, array by array.  The arguments are those of `step`."""
        return Stepping(self, loss_scale, observed, metric, lr)

    def set_t(self, long long t):
        """Set every array's count of applied steps.  Above 0 its state counts as written."""
        cdef Group* group
        cdef Py_ssize_t i, j
        cdef double product
        self.guard.take(STEPPING, AVERAGED)
        try:
            bring_up(self)
            self.follow(t)
            for i in range(self.space.n_groups):
                group = self.space.groups[i]
                product = nadam_product(&group.options, t) if group.product != NULL else 1
                for j in range(group.n_arrays):
                    group.t[j], group.started[j] = t, t > 0
                    if group.product != NULL:
                        group.product[j] = product
            self.counts.t = t
        finally:
            self.guard.release()

    def set_loss_scale(self, double loss_scale):
        """Go on from another dynamic loss scale."""
        self.guard.take(STEPPING, AVERAGED)
        self.counts.loss_scale = loss_scale
        self.guard.release()

    def configure_if(self, long long version, dict settings):
        """Take over settings that were checked with those of this version; False if there are other ones by now."""
        self.guard.take(STEPPING, AVERAGED)
        try:
            if version != self.version:
                return False
            self.configure(settings)
            return True
        finally:
            self.guard.release()

    def assign(self, name, value):
        """Take over one setting, if it is a plain number or switch for another: False if it needs a further check."""
        return assign_setting(self, name, value)

    def catch_up(self, *place_and_indices):
        """Replay what rows have missed: all of them, or those of one array that are named."""
        cdef BoundGroup bound
        cdef Py_ssize_t i
        self.guard.take(STEPPING, AVERAGED)
        try:
            if place_and_indices:
                bound, i = find_array(self, place_and_indices, "catch_up", "indices")
                bring_up_rows(self, bound, i, place_and_indices[len(place_and_indices) - 1])
            else:
                bring_up(self)
        finally:
            self.release()

    def discard(self):
        """Forget the sums."""
        self.guard.take(STEPPING, AVERAGED)
        self.drop_sums()
        self.guard.release()

    def rollback(self, agree=None):
        """Undo the last step.  agree(error): raises what one of the processes that share the run refuses."""
        roll_back(self, agree)
        raise_late_alone(self)

    def accumulate(self, grads):
        """Add gradients to the sums."""
        cdef Group* group
        cdef Py_ssize_t i, j, work
        self.guard.take(STEPPING, AVERAGED)
        try:
            work = acquire(self, grads, False)
            if self.space.zero_grad:
                check_apart(self)
            self.need_sums([bound for bound in self.groups if not only_rows(bound)])
            found = rows_to_add(self)
            work = put_rows_aside(self, work)
            self.run(ADD, work, 0, self.space.end)
            zero_rows(self)
            for i in range(self.space.n_groups):
                group = self.space.groups[i]
                for j in range(group.n_arrays):
                    group.summed[j] |= group.arrays[j].g != NULL
            add_rows_aside(self, found)
            self.counts.pending += 1
        finally:
            self.release()

    def rebind(self, params):
        """Put other arrays into the place of the parameters."""
        self.guard.take(STEPPING)
        try:
            replaced = rebind(self, params)
            if replaced is not None:
                try:
                    derive(self)
                except BaseException:
                    put_back(self, <list> replaced)
                    raise
        finally:
            self.guard.release()
        raise_late(self)

    def step(self, grads=..., double loss_scale=0.0, observed=None, double metric=0.0, lr=None, params=None,
             bint targets=False, progress=None, tuple part=None):
        """Step every group, or a part of one.

        grads: without any, the mean of what was accumulated.
        loss_scale: the divisor of the gradients in this call; 0 for the optimizer's own.
        observed(options, t, metric): the schedules that a metric changes; they take effect if this step is applied.
        lr: that of this step, instead of the groups' own.
        targets: grads are targets, the gradient is p - target.
        params: arrays that take the place of the parameters first, unless the step is refused.
        progress(done, total): is told how many parts of the step are done; there is one where all state is in memory.
        part: (group, lo, hi, count), elements lo .. hi-1 of one group's parameter space (group -1: the only one).  lo
        and hi are multiples of CHUNK or the end (hi -1).  The pieces of one step are calls of which all but the last
        have count=False: they share a step number, and equal the whole step whatever their order.
        """
        cdef Py_ssize_t first = 0, last, work, i
        cdef bint usable = False, count = True, summed = grads is ..., summing = False
        cdef Counts before
        cdef list moved = None
        cdef list replaced = None  # until nothing can be refused any more
        self.guard.take(STEPPING)
        self.told = False
        try:
            if params is not None:
                replaced = rebind(self, params)
                if replaced is not None and targets:
                    refuse_masters(self)
            last = self.space.end
            self.follow(self.counts.t)
            if lr is not None:
                take_lr(self, lr)
            if summed != (self.counts.pending > 0):
                refuse_sums(self, summed)
            if part is not None:
                first, last = positions(self, part[0], part[1], part[2])
                count = part[3]
            if self.keeps_undo and (last - first < self.space.end or not count):
                raise ValueError("a range can't be stepped with keep_undo=True, which undoes whole steps")
            if observed is not None:
                moved = observe(self, observed, metric)
            work = acquire_sums(self) if summed else acquire(self, grads, targets)
            if self.space.zero_grad:
                check_apart(self)
            if self.pages is not None:
                refuse_cut_rows(self)
            work = min(work, last - first)
            before = self.counts
            before.pending = 0
            if work >= 0:
                self.form_keys()
                self.form_steps()
                if targets:
                    before_looking(self)
                usable = inspect(self, (loss_scale or self.counts.loss_scale) * (self.counts.pending if summed else 1),
                                 work)
            if replaced is not None:
                derive(self)
                replaced = None
            if work >= 0 and not usable and self.space.zero_grad:
                zero_gradients(self)
            for i in range(self.space.n_groups if usable else 0):
                summing |= self.space.groups[i].options.sum_to_one != 0
                if self.space.groups[i].options.exact:
                    prepare_group(self, self.space.groups[i])
            if self.keeps_undo:
                keep(self, before, usable, work)
            if self.pages is not None:
                if work >= 0:
                    step_paged(self, Visit(self, STEP, work, summing, usable, moved), before.grad_norm, progress)
            else:
                if usable:
                    self.run(STEP, work, first, last)
                if usable and summing:
                    finish_rows(self, work, first, last)
                if usable and count:
                    self.count(moved)
                elif work >= 0:
                    self.counts.skipped_steps += count
                if self.dynamic and count and work >= 0:
                    rescale(&self.counts, usable)
            if usable and count:
                zero_rows(self)
            if summed and count:
                self.drop_sums()
        finally:
            if replaced is not None:
                put_back(self, replaced)
            self.space.zero_grad = self.zero_grad
            self.release()
        if progress is not None and not self.told:
            progress(1, 1)
        raise_late(self)

    # --- the parts of a call -------------------------------------------------------------------------------------

    cdef int release(self) noexcept:
        cdef Py_ssize_t i
        for i in range(self.space.n_groups):
            release(<BoundGroup> self.groups[i])
        if self.lr_given:
            drop_lr(self)
        self.space.by_rows = False
        self.guard.release()
        return 0

    cdef int lose_step(self, str why) except -1:
        """What came now means that the last step can't be undone any more."""
        if self.gone is None:
            self.gone = why
        return 0

    cdef int follow(self, long long t) except -1:
        cdef Py_ssize_t i
        for i in range(self.space.n_groups):
            if self.space.groups[i].followed:
                (<BoundGroup> self.groups[i]).follow(t)
        if self.norm_schedule is not None:
            self.max_grad_norm = scheduled_norm(self, t)
        return 0

    cdef int run(self, Work what, Py_ssize_t work, Py_ssize_t first, Py_ssize_t last) except -1:
        """Sweep over positions first .. last-1, of which `work` are written."""
        if what != ADD:  # other processes' positions are theirs
            first, last = max(first, self.low), min(last, self.high)
            if first >= last:
                return 0
        if self.pages is not None:
            return run_paged(self, what, work, first, last)
        return self.sweep_range(what, work, first, last)

    cdef int sweep_range(self, Work what, Py_ssize_t work, Py_ssize_t first, Py_ssize_t last) except -1:
        """The same, with all in memory that it needs; without the GIL if elements are many."""
        cdef int n_threads
        if work < PARALLEL_FROM:
            sweep(&self.space, what, first, last, 1)
            return 0
        n_threads = <int> min(get_threads(self.n_threads), chunks_to(last) - first // CHUNK)
        with nogil:
            sweep(&self.space, what, first, last, n_threads)
        return 0

    cdef int sweep_all(self, Work what) except -1:
        return self.run(what, self.space.end, 0, self.space.end)

    cdef int form_steps(self) except -1:
        """The constants of this step: formed once for neighbouring arrays that have taken the same steps."""
        cdef Group* group
        cdef Py_ssize_t i, j, before, n = 0
        for i in range(self.space.n_groups):
            group = self.space.groups[i]
            before = -1
            for j in range(group.n_arrays):
                if group.arrays[j].g == NULL:
                    continue
                if (before < 0 or group.started[before] != group.started[j] or group.t[before] != group.t[j]
                        or (group.product != NULL and group.product[before] != group.product[j])
                        or (group.arrays[before].row_length == 0) != (group.arrays[j].row_length == 0)):
                    self.form_step(group, j, n)
                    n += 1
                group.arrays[j].step = n - 1
                before = j
        return 0

    cdef int form_step(self, Group* group, Py_ssize_t j, Py_ssize_t n) except -1:
        """The constants of this step of one array, as number n of space.steps."""
        if not 0 <= group.t[j] < 1LL << 62:
            (<BoundGroup> self.groups[group.index]).refuse_count(j)
        form_step(group.rule, &group.options, group.t[j] + 1, not group.started[j] or group.t[j] == 0,
                  group.product[j] if group.product != NULL else 1, self.space.steps + n)
        self.space.steps[n].by_row = group.arrays[j].row_length != 0
        return 0

    cdef int form_keys(self) noexcept:
        """The keys of this step's noise."""
        cdef Group* group
        cdef Py_ssize_t i, j
        self.space.t = self.counts.t + 1
        for i in range(self.space.n_groups):
            group = self.space.groups[i]
            if group.format != NATIVE or group.state_format != NATIVE:
                for j in range(1 + SLOTS):
                    group.keys[j] = noise_key(self.space.seed, self.space.t, i, j)
        return 0

    cdef int count(self, list moved) except -1:
        """Count a step of the arrays that have a gradient.  moved: the schedules that it changes."""
        cdef Group* group
        cdef Py_ssize_t i, j
        cdef bint writes
        for i in range(self.space.n_groups):
            group = self.space.groups[i]
            writes = writes_state(group.rule, &group.options)
            for j in range(group.n_arrays):
                if group.arrays[j].g != NULL:
                    if group.arrays[j].touched != NULL and group.arrays[j].behind != NULL:
                        note_past(group, group.arrays + j, self.space.steps + group.arrays[j].step,
                                  factor_of(&self.space, group, group.arrays + j))
                    group.t[j] += 1
                    if writes:
                        group.started[j] = True
                    if group.product != NULL:
                        group.product[j] = self.space.steps[group.arrays[j].step].product
        self.counts.t += 1
        if moved is not None:
            for owner, old, new in moved:
                replace_schedules(self, owner, old, new)
            self.moved = moved
        return 0

    cdef str owner(self, Py_ssize_t i):
        """What messages call a span of memory."""
        return (<BoundGroup> self.groups[self.memory.spans[i].group]).owner(self.memory.spans[i].item)

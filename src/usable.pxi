# Is a step's gradient usable?  Its norm, its non-finite elements, the factor of the gradient, the dynamic loss scale.

from cpython.buffer cimport PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.math cimport INFINITY, NAN, fabs, isinf

cdef enum OnNonfinite:
    IGNORE, SKIP, RAISE

cdef enum NormOver:
    OVER_ALL, OVER_GROUP, OVER_ARRAY

cdef dict ON_NONFINITE = {"ignore": IGNORE, "skip": SKIP, "raise": RAISE}
cdef dict NORM_OVER = {"all": OVER_ALL, "group": OVER_GROUP, "array": OVER_ARRAY}

# The rule and the defaults of PyTorch's torch.amp.GradScaler.
cdef enum:
    GROWTH_INTERVAL = 2000  # clean steps after which the scale grows
cdef double FIRST_SCALE = 65536, SMALLEST_SCALE = 2.0 ** -126, LARGEST_SCALE = 2.0 ** 126
cdef double SMALLEST_NORMAL = 2.0 ** -126  # of float32


# Of a dynamic loss scale: the smallest, the largest, and the number of clean steps after which it grows.
SCALE_LIMITS = SMALLEST_SCALE, LARGEST_SCALE, GROWTH_INTERVAL


cdef bint inspect(Plan plan, double loss_scale, Py_ssize_t work) except -1:
    """Take the norm and look for non-finite elements, as asked; set the factors.  False: skip this step.

    loss_scale: the divisor of the gradients; for sums, times their number.
    """
    cdef Group* group
    cdef Array* a
    cdef Py_ssize_t i, j
    cdef double squares = 0, norm = NAN
    cdef bint usable = True, finite = True, by_array = plan.max_grad_norm != 0 and plan.norm_over == OVER_ARRAY
    cdef bint looked = False   # for the largest values
    plan.space.by_array = by_array
    if plan.max_grad_norm:
        reduce_all(plan, SQUARES, work)
        for i in range(plan.space.n_groups):
            group = plan.space.groups[i]
            for j in range(group.n_arrays if by_array else 0):
                a = group.arrays + j
                a.squared = reduced(&plan.space, group, a, True)
                squares += a.squared
            if not by_array:
                group.squared = reduced(&plan.space, group, NULL, True)
                squares += group.squared
        norm = sqrt(squares) / loss_scale
    for i in range(plan.space.n_groups):
        group = plan.space.groups[i]
        if not by_array:
            usable &= judge(plan, group, NULL, norm, loss_scale, work, &finite, &looked)
        for j in range(group.n_arrays if by_array else 0):
            if group.arrays[j].g != NULL:
                usable &= judge(plan, group, group.arrays + j, norm, loss_scale, work, &finite, &looked)
    if not finite and plan.on_nonfinite != IGNORE:
        usable = False  # finite float64 gradients, but too large to be clipped
        if plan.on_nonfinite == RAISE:
            raise ValueError("the norm of the gradients overflows; nothing was changed")
    plan.counts.grad_norm = norm
    return usable


cdef int before_looking(Plan plan) except -1:
    """Before the differences to a target are looked at, which are differences of parameters that are up to date.

    A step that is not looked at brings rows up to date when nothing can be refused any more.
    """
    if plan.max_grad_norm == 0 and plan.on_nonfinite == IGNORE:
        return 0
    if plan.gone is None and any_lags(plan):
        raise ValueError("rows have missed steps, and this target is looked at, for max_grad_norm or on_nonfinite, "
                         "before its step is made: call catch_up() before it, after which rollback() can't undo the "
                         "last step")
    return bring_up(plan)


cdef int reduce_all(Plan plan, Work what, Py_ssize_t work) except -1:
    """Reduce every chunk; those of other processes come from them."""
    cdef Py_ssize_t n = plan.space.end // CHUNK + plan.space.n_arrays
    if plan.combine is not None:
        memset(plan.space.partial, 0, n * sizeof(double))
    plan.run(what, work, 0, plan.space.end)
    if plan.combine is not None:
        plan.combine(PyMemoryView_FromMemory(<char*> plan.space.partial, n * sizeof(double), PyBUF_WRITE).cast("d"))
    return 0


cdef inline bint judge(Plan plan, Group* group, Array* a, double norm, double loss_scale, Py_ssize_t work,
                       bint* finite, bint* looked) except -1:
    """Set the factor of a group, or of one of its arrays (a); False if its gradients can't be used.

    norm: of all gradients.  finite: becomes False where the norm that clips isn't.
    """
    cdef double squared = group.squared if a == NULL else a.squared
    cdef double coefficient = 1, factor
    cdef bint usable = True
    if plan.max_grad_norm:
        if plan.norm_over != OVER_ALL:
            norm = sqrt(squared) / loss_scale
        finite[0] &= norm - norm == 0
        coefficient = plan.max_grad_norm / (norm + 1e-6)
        coefficient = 1 if coefficient > 1 else coefficient
    factor = (-1 if group.options.maximize else 1) * coefficient / loss_scale
    if a == NULL:
        group.factor = factor
    else:
        a.factor = factor
    if factor != 1 and not holds_factor(plan, group, factor, coefficient):
        usable = False
        if not plan.dynamic:  # which backs off
            refuse_factor(plan, group, a, factor, coefficient, norm, loss_scale)
    if plan.on_nonfinite != IGNORE:
        # the root of the sum of squares bounds every element; only where it is too large a second look is needed
        if not fits(plan, group, factor, sqrt(squared) * (1 + 1e-6) if plan.max_grad_norm else NAN, loss_scale):
            if not looked[0]:
                reduce_all(plan, LARGEST, work)
                looked[0] = True
            if not fits(plan, group, factor, reduced(&plan.space, group, a, False), loss_scale):
                usable = False
                if plan.on_nonfinite == RAISE:
                    complain(plan, group.index, loss_scale)
    return usable


cdef bint holds_factor(Plan plan, const Group* group, double factor, double coefficient) noexcept:
    """Can a group's type hold its factor?  A dynamic scale goes no further than its normal numbers."""
    cdef double k = fabs(factor)
    cdef float narrowed = <float> k
    if k == 0:
        return coefficient == 0  # the norm is infinite: not the scale's fault
    if group.wide:
        return not isinf(k)
    return not (narrowed == 0 or isinf(narrowed) or (plan.dynamic and narrowed < SMALLEST_NORMAL))


cdef refuse_factor(Plan plan, const Group* group, const Array* a, double factor, double coefficient, double norm,
                   double loss_scale):
    cdef str cause = f"loss_scale={loss_scale / max(plan.counts.pending, 1)!r}"
    if plan.counts.pending > 1:
        cause += f", times {plan.counts.pending} calls of accumulate(),"
    if coefficient < 1:
        grads = "gradients" if a == NULL else (<BoundGroup> plan.groups[group.index]).name(a - group.arrays, True)
        cause = f"max_grad_norm={plan.max_grad_norm!r}, with {grads} of norm {norm!r}," + (
            "" if loss_scale == 1 else f" and {cause}")
    raise ValueError(f"{cause} makes gradients times {factor!r}, which {'float64' if group.wide else 'float32'} "
                     "can't hold; nothing was changed")


cdef bint fits(Plan plan, const Group* group, double factor, double g, double loss_scale) noexcept:
    """Is a gradient's absolute value finite once unscaled, and its square, if the rule squares it?

    In the group's type, operation by operation as the sweep has them.
    """
    cdef double limit = plan.space.max_grad_value, x = g / loss_scale
    cdef float y
    factor = fabs(factor)
    if not (x - x == 0 and (group.wide or not isinf(<float> x))):
        return False
    if not group.squares:
        return True
    if group.wide:
        x = factor * g
        x = limit if limit and x > limit else x
        return not isinf(x * x * group.longest)  # the mean over a row is formed from the sum
    y = <float> factor * <float> g
    y = <float> limit if limit and y > <float> limit else y
    y = y * y
    return not isinf(y)


cdef complain(Plan plan, Py_ssize_t index, double loss_scale):
    """Name the first element of a group that doesn't fit, if this process has it."""
    cdef BoundGroup bound = <BoundGroup> plan.groups[index]
    cdef Group* group = &bound.group
    cdef Py_ssize_t end = min(max(plan.high - group.position, 0), group.size)
    cdef Piece piece = pieces_from(group, min(max(plan.low - group.position, 0), end))
    cdef Py_ssize_t i
    cdef double wide[2]
    cdef float narrow[2]
    cdef double x
    piece.most = 1
    while next_stepped(&piece, end):
        if group.wide:
            x = gradient_of(group, &piece, <double*> wide, wide + 1)[0]
        else:
            x = gradient_of(group, &piece, <float*> narrow, narrow + 1)[0]
        if not fits(plan, group, factor_of(&plan.space, group, piece.array), fabs(x), loss_scale):
            i = piece.array - group.arrays
            shape = bound.arrays[i].shape
            at = tuple([int(k) for k in numpy.unravel_index(piece.at, shape)]) if shape else ()
            what = "the sum of " if plan.counts.pending else "the difference to " if group.targets else ""
            raise ValueError(f"{what}{bound.name(i, True)} is {x} at index "
                             f"{at}{'' if x - x != 0 else ', whose square overflows'}; nothing was changed")


cdef int rescale(Counts* counts, bint clean) noexcept:
    """Halve the scale after a step that was not usable, double it after GROWTH_INTERVAL steps that were."""
    if not clean:
        counts.growth_tracker = 0
        counts.loss_scale = max(counts.loss_scale / 2, SMALLEST_SCALE)
    elif counts.growth_tracker + 1 < GROWTH_INTERVAL:
        counts.growth_tracker += 1
    else:
        counts.growth_tracker = 0
        if counts.loss_scale * 2 <= LARGEST_SCALE:
            counts.loss_scale *= 2
    return 0

# Is a step's gradient usable?  Its norm, its non-finite elements, the factor of the gradient, the dynamic loss scale.

from libc.math cimport INFINITY, NAN, fabs, isinf

cdef enum OnNonfinite:
    IGNORE, SKIP, RAISE

cdef dict ON_NONFINITE = {"ignore": IGNORE, "skip": SKIP, "raise": RAISE}

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
    cdef Py_ssize_t i
    cdef double squares = 0, coefficient = 1, most
    cdef bint usable = True, reduced_largest = False
    cdef double norm = NAN
    if plan.max_grad_norm:
        plan.run(SQUARES, work, 0, plan.space.end)
        for i in range(plan.space.n_groups):
            plan.space.groups[i].squared = reduced(&plan.space, plan.space.groups[i], True)
            squares += plan.space.groups[i].squared
        norm = sqrt(squares) / loss_scale
        coefficient = plan.max_grad_norm / (norm + 1e-6)
        coefficient = 1 if coefficient > 1 else coefficient
    for i in range(plan.space.n_groups):
        group = plan.space.groups[i]
        group.factor = (-1 if group.options.maximize else 1) * coefficient / loss_scale
        if group.factor != 1 and not holds_factor(plan, group, coefficient):
            usable = False
            if not plan.dynamic:  # which backs off
                refuse_factor(plan, group, coefficient, norm, loss_scale)
        if plan.on_nonfinite != IGNORE:
            # the root of the sum of squares bounds every element; only where it is too large a second look is needed
            most = sqrt(group.squared) * (1 + 1e-6) if plan.max_grad_norm else NAN
            if not fits(plan, group, most, loss_scale):
                if not reduced_largest:
                    plan.run(LARGEST, work, 0, plan.space.end)
                    reduced_largest = True
                if not fits(plan, group, reduced(&plan.space, group, False), loss_scale):
                    usable = False
                    if plan.on_nonfinite == RAISE:
                        complain(plan, i, loss_scale)
    if plan.on_nonfinite != IGNORE and plan.max_grad_norm and not norm - norm == 0:
        usable = False  # finite float64 gradients, but too large to be clipped
        if plan.on_nonfinite == RAISE:
            raise ValueError("the norm of the gradients overflows; nothing was changed")
    plan.counts.grad_norm = norm
    return usable


cdef bint holds_factor(Plan plan, const Group* group, double coefficient) noexcept:
    """Can a group's type hold its factor?  A dynamic scale goes no further than its normal numbers."""
    cdef double k = fabs(group.factor)
    cdef float narrowed = <float> k
    if k == 0:
        return coefficient == 0  # the norm is infinite: not the scale's fault
    if group.wide:
        return not isinf(k)
    return not (narrowed == 0 or isinf(narrowed) or (plan.dynamic and narrowed < SMALLEST_NORMAL))


cdef refuse_factor(Plan plan, const Group* group, double coefficient, double norm, double loss_scale):
    cdef str cause = f"loss_scale={loss_scale / max(plan.counts.pending, 1)!r}"
    if plan.counts.pending > 1:
        cause += f", times {plan.counts.pending} calls of accumulate(),"
    if coefficient < 1:
        cause = f"max_grad_norm={plan.max_grad_norm!r}, with gradients of norm {norm!r}," + (
            "" if loss_scale == 1 else f" and {cause}")
    raise ValueError(f"{cause} makes gradients times {group.factor!r}, which {'float64' if group.wide else 'float32'} "
                     "can't hold; nothing was changed")


cdef bint fits(Plan plan, const Group* group, double g, double loss_scale) noexcept:
    """Is a gradient's absolute value finite once unscaled, and its square, if the rule squares it?

    In the group's type, operation by operation as the sweep has them.
    """
    cdef double limit = plan.space.max_grad_value, x = g / loss_scale, factor = fabs(group.factor)
    cdef float y
    if not (x - x == 0 and (group.wide or not isinf(<float> x))):
        return False
    if not group.squares:
        return True
    if group.wide:
        x = factor * g
        x = limit if limit and x > limit else x
        return not isinf(x * x)
    y = <float> factor * <float> g
    y = <float> limit if limit and y > <float> limit else y
    y = y * y
    return not isinf(y)


cdef complain(Plan plan, Py_ssize_t index, double loss_scale):
    """Name the first element of a group that doesn't fit."""
    cdef BoundGroup bound = <BoundGroup> plan.groups[index]
    cdef Group* group = &bound.group
    cdef Piece piece = pieces_from(group, 0)
    cdef Py_ssize_t i
    cdef float widened
    cdef double summed, x
    cdef const double* wide
    cdef const float* narrow
    piece.most = 1
    while next_stepped(&piece, group.size):
        if piece.array.touched != NULL:
            if group.wide:
                sum_row(&piece, &summed, &wide)
                x = wide[0]
            else:
                sum_row(&piece, &widened, &narrow)
                x = narrow[0]
        elif piece.array.g_format != NATIVE:
            widen(piece.array.g_format, 1, &widened, piece.array.g, piece.at)
            x = widened
        else:
            x = (<const double*> piece.array.g)[piece.at] if group.wide else (<const float*> piece.array.g)[piece.at]
        if not fits(plan, group, fabs(x), loss_scale):
            i = piece.array - group.arrays
            shape = bound.arrays[i].shape
            at = tuple([int(k) for k in numpy.unravel_index(piece.at, shape)]) if shape else ()
            raise ValueError(f"{'the sum of ' if plan.counts.pending else ''}{bound.name(i, True)} is {x} at index "
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

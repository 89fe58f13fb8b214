# A learning rate that one call has, and no other.


cdef take_lr(Plan plan, lr):
    """Until the end of the call, replace the groups' lr by a number, or each group's by one of a list."""
    cdef BoundGroup group
    cdef Py_ssize_t i, n = plan.space.n_groups
    cdef tuple numbers = tuple(lr) if plan.structured and isinstance(lr, (list, tuple)) else None
    if numbers is not None and len(numbers) != n:
        raise ValueError(f"lr of a step must be a number, or a list of one for each of the {n} parameter groups (None "
                         f"leaves a group its own); got {describe(lr, numbers)}")
    for i in range(plan.space.n_groups):
        group, number = plan.groups[i], lr if numbers is None else numbers[i]
        group.group.own_lr = group.group.options.lr if number is None else group.checked_lr(number, plan.counts.t)
    exchange_lr(plan)  # once all of them are checked
    plan.lr_given = True


cdef int drop_lr(Plan plan) noexcept:
    """Every group has its own again."""
    exchange_lr(plan)
    plan.lr_given = False
    return 0


cdef int exchange_lr(Plan plan) noexcept:
    cdef Group* group
    cdef Py_ssize_t i
    for i in range(plan.space.n_groups):
        group = plan.space.groups[i]
        group.options.lr, group.own_lr = group.own_lr, group.options.lr
    return 0

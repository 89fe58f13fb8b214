# A learning rate that one call has, and no other.


cdef take_lr(Plan plan, lr):
    """Until the end of the call, put a number in the place of the groups' lr, or a list's in that of each."""
    cdef BoundGroup group
    cdef Py_ssize_t i, n = plan.space.n_groups
    cdef list found = []
    numbers = tuple(lr) if plan.structured and isinstance(lr, (list, tuple)) else (lr,) * n
    if len(numbers) != n:
        raise ValueError(f"lr must be a number, or a list of one for each of the {n} parameter groups (None leaves "
                         f"a group its own); got {describe(lr, numbers)}")
    for group, number in zip(plan.groups, numbers):
        found.append(group.group.options.lr if number is None else group.checked_lr(number, plan.counts.t))
    for i in range(plan.space.n_groups):
        plan.space.groups[i].own_lr = plan.space.groups[i].options.lr
        plan.space.groups[i].options.lr = found[i]
    plan.lr_given = True


cdef int drop_lr(Plan plan) noexcept:
    """Every group has its own again."""
    cdef Py_ssize_t i
    for i in range(plan.space.n_groups):
        plan.space.groups[i].options.lr = plan.space.groups[i].own_lr
    plan.lr_given = False
    return 0

# The options of an optimizer as a whole: taken over once they are checked, and one plain number for another at once.
# What a metric makes of schedules, those of groups included.


cdef configure(Plan plan, dict settings):
    """Take over all of them, already checked."""
    if settings["flush_denormals"] != plan.space.flush_denormals:
        bring_up(plan)
    plan.settings = settings
    plan.version += 1
    plan.norm_over = NORM_OVER[settings["norm_over"]]
    limit = settings["max_grad_norm"]
    plan.norm_schedule = limit if callable(limit) else None
    plan.max_grad_norm = INFINITY if callable(limit) else limit or 0  # a step asks the schedule
    plan.space.max_grad_value = settings["max_grad_value"] or 0
    plan.on_nonfinite = ON_NONFINITE[settings["on_nonfinite"]]
    if settings["loss_scale"] != "dynamic":
        plan.counts.loss_scale = settings["loss_scale"]
    elif not plan.dynamic:
        plan.dynamic, plan.counts.loss_scale = True, FIRST_SCALE
    plan.zero_grad = plan.space.zero_grad = settings["zero_grad"]
    plan.cast = settings["cast"]
    plan.space.flush_denormals = settings["flush_denormals"]
    plan.space.seed = settings["seed"]


cdef enum Plain:             # settings of which one plain value may replace another without a further check
    MAX_GRAD_NORM = 1, MAX_GRAD_VALUE, LOSS_SCALE, ZERO_GRAD

cdef dict PLAIN = {"max_grad_norm": MAX_GRAD_NORM, "max_grad_value": MAX_GRAD_VALUE, "loss_scale": LOSS_SCALE,
                   "zero_grad": ZERO_GRAD}


cdef bint assign_setting(Plan plan, name, value) except -1:
    """Take over one plain value for another, if it needs no further check: False if it does."""
    cdef int which = PLAIN.get(name, 0)
    cdef double x = 0
    if which == ZERO_GRAD:
        if not isinstance(value, bool):
            return False
    elif which:
        if type(value) is int and 0 < value < 1 << 53:
            value = float(value)
        if not (PyFloat_Check(value) and PyFloat_Check(plan.settings[name])):  # None and schedules switch more
            return False
        x = value
        # a limit of elements is rounded to their type
        if not (SMALLEST_NORMAL if which == MAX_GRAD_VALUE else 0) < x < INFINITY:
            return False
        value = x
    else:
        return False
    plan.guard.take(STEPPING, AVERAGED)
    plan.settings[name] = value
    plan.version += 1
    if which == MAX_GRAD_NORM:
        plan.max_grad_norm = x
    elif which == MAX_GRAD_VALUE:
        plan.space.max_grad_value = x
    elif which == LOSS_SCALE:
        plan.counts.loss_scale = x
    else:
        plan.zero_grad = plan.space.zero_grad = value
    plan.guard.release()
    return True


cdef double scheduled_norm(Plan plan, long long t) except? -1:
    """What the schedule of max_grad_norm gives for the step after t applied ones."""
    cdef double x
    try:
        value = plan.norm_schedule(t)
    except Exception as error:
        error.add_note(f"raised by the schedule of max_grad_norm: at t={t}: {plan.norm_schedule!r}")
        raise
    if PyFloat_Check(value):
        x = PyFloat_AS_DOUBLE(value)
        if 0 < x < INFINITY:
            return x
    return plan.check_followed("max_grad_norm", plan.norm_schedule, value, t)


cdef list observe(Plan plan, observed, double metric):
    """(group, its old schedules, its new ones) where a metric changes some; None for a group: those of the settings."""
    cdef list moved = []
    cdef BoundGroup group
    cdef Follower f
    for group in plan.groups:
        if not group.followers:
            continue
        new = observed({f.name: group.options[f.name] for f in group.followers}, plan.counts.t, metric)
        if new:
            moved.append((group, {name: group.options[name] for name in new}, new))
    if plan.norm_schedule is not None:
        old = {"max_grad_norm": plan.norm_schedule}
        new = observed(old, plan.counts.t, metric)
        if new:
            moved.append((None, old, new))
    if not moved:
        raise ValueError(f"no schedule reads metric={metric!r}: neither an option of a group nor max_grad_norm follows "
                         "a plateau; drop it, or assign one, such as opt.param_groups[0]['lr'] = "
                         "adaptive_c.schedules.plateau(1e-3)")
    return moved


cdef int replace_schedules(Plan plan, owner, dict old, dict new) except -1:
    """Replace old schedules of a group, or of the settings (None), unless others were assigned meanwhile."""
    if owner is not None:
        (<BoundGroup> owner).replace(old, new)
    elif plan.norm_schedule is old["max_grad_norm"]:
        plan.norm_schedule = plan.settings["max_grad_norm"] = new["max_grad_norm"]
        plan.version += 1
    return 0

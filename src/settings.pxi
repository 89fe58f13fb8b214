# The options of an optimizer as a whole: taken over once they are checked, and one plain number for another at once.


cdef configure(Plan plan, dict settings):
    """Take over all of them, already checked."""
    if settings["flush_denormals"] != plan.space.flush_denormals:
        bring_up(plan)
    plan.settings = settings
    plan.version += 1
    plan.norm_over = NORM_OVER[settings["norm_over"]]
    plan.max_grad_norm = settings["max_grad_norm"] or 0
    plan.space.max_grad_value = settings["max_grad_value"] or 0
    plan.on_nonfinite = ON_NONFINITE[settings["on_nonfinite"]]
    if settings["loss_scale"] != "dynamic":
        plan.counts.loss_scale = settings["loss_scale"]
    elif not plan.dynamic:
        plan.dynamic, plan.counts.loss_scale = True, FIRST_SCALE
    plan.zero_grad = plan.space.zero_grad = settings["zero_grad"]
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

"""Helpers that the tests share."""


def step_range(opt, grads, group=-1, lo=0, hi=-1, count=True):
    """Step a range of the parameter space; the last range of a step counts it."""
    opt._plan.step(grads, group=group, lo=lo, hi=hi, count=count)

"""Steps within the backward pass: each parameter as soon as its gradient is there."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

from .._native import core
from ._bound import Bound, Live, Part
from ._optimizer import Optimizer, parts_of
from ._tensors import Tensor, array, gradient


def in_backward(optimizer: Optimizer) -> "InBackward":
    """From now on, step each parameter as soon as backward has accumulated its gradient, and free that gradient.

    All parameters share the number and the options of one step, which are read when the first gradient arrives, and
    the bits are those of the ordinary step.  The gradients never exist together, so that peak memory falls by nearly
    their size.

    Parameters
    ----------
    optimizer : adaptive_c.torch.Optimizer
        It is used as before: its `step` ends the step that backward has made.

    Returns
    -------
    InBackward
        A handle, whose ``remove()`` goes back to ordinary steps.

    Raises
    ------
    TypeError
        For an optimizer of another kind.
    ValueError
        With max_grad_norm or on_nonfinite, which look at all gradients before the first step; from backward, if a
        parameter gets a second gradient before ``opt.step()``, as several backward passes for one step give it; from
        the first ``opt.step()`` under DistributedDataParallel, which averages gradients after they were used here.
    RuntimeError
        From ``scaler.step(opt)`` of a GradScaler, which learns of an overflow too late; if this optimizer, or another
        one with the same parameters, steps in backward already.

    Notes
    -----
    Other libraries: PyTorch's tutorial makes one optimizer for each parameter.  Each of these counts by itself, and
    schedulers and checkpoints must know all of them.

    Examples
    --------
    >>> import torch
    >>> from adaptive_c.torch import AdamW, in_backward
    >>> model = torch.nn.Linear(3, 1)
    >>> opt = AdamW(model.parameters())
    >>> handle = in_backward(opt)
    >>> for x in torch.ones(2, 5, 3):
    ...     model(x).sum().backward()  # steps, and leaves no gradients
    ...     opt.step()  # the end of this step: the count moves, the state is shown
    >>> opt.t, model.weight.grad
    (2, None)
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"in_backward takes an optimizer of adaptive_c.torch, got {core.an(type(optimizer).__name__)}")
    live, fitting = parts_of(optimizer)
    if live.arriving is not None:
        raise RuntimeError("this optimizer steps in backward already")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if any(isinstance(getattr(hook, "__self__", None), InBackward) for p in params
           for hook in (getattr(p, "_post_accumulate_grad_hooks", None) or {}).values()):  # fmt: skip
        raise RuntimeError("another optimizer steps parameters of this one in backward; end that by remove() of its "
                           "handle, or make the model anew")  # fmt: skip
    for name in _NEED_ALL:
        _check(name, getattr(optimizer, name))
    return InBackward(optimizer, live, fitting, params)


_NEED_ALL = ("max_grad_norm", "on_nonfinite")


def _check(name: str, value: Any) -> None:
    """Raise for an option that needs all gradients before the first step."""
    if name in _NEED_ALL and value not in (None, "ignore"):
        raise ValueError(f"in_backward is refused with {name}={value!r}, which looks at all gradients before the first "
                         "parameter is stepped; drop one of them")  # fmt: skip


class InBackward:
    """An optimizer whose parameters are stepped as their gradients arrive; `in_backward` makes it."""

    def __init__(self, optimizer: Optimizer, live: Live, fitting: Callable[[], Bound], params: list[Tensor]) -> None:
        self._optimizer, self._live, self._fitting = optimizer, live, fitting
        self._block = ExitStack()
        self._now: Any = None  # steps one array; None between two steps
        self._places: dict[Tensor, tuple[Part, int, int]] = {}
        self._hooks = [p.register_post_accumulate_grad_hook(self._arrived) for p in params if p.requires_grad]
        live.arriving = self

    def remove(self) -> None:
        """Go back to steps that `optimizer.step()` takes, after the one that is going on is finished."""
        if self._live.arriving is self:
            self._close()
            self._live.arriving = None
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def check(self, name: str = "", value: Any = None) -> None:
        """Refuse what can't be done while backward has begun a step, and options that can't be assigned at all."""
        if self._now is not None:
            raise RuntimeError("backward has begun a step; end it first: opt.step()")
        _check(name, value)

    def _begin(self) -> None:
        """Open the block of the step, at the first gradient of a backward pass."""
        bound = self._fitting()
        if any(part.moved() for part in bound.parts):
            self._live.unbind()
            bound = self._fitting()
        for part in bound.parts:
            part.read_steps()
        self._places = bound.places()
        self._now = self._block.enter_context(bound.plan.stepping())

    def _arrived(self, p: Tensor) -> None:
        """The hook of a parameter, which is called when its gradient is complete."""
        if self._now is None:
            self._begin()
        part, i, j = self._places[p]
        g = gradient(p, f"{part.where}[{j}]")
        if part.versions and p._version != part.versions[j]:
            part.take_written(j)
        try:
            self._now(i, j, array(g, p) if isinstance(g, torch.Tensor) else g)
        except ValueError as error:
            if "has had its step" in str(error):
                error.add_note(
                    "in_backward steps at each gradient: call the optimizer's step() after each backward, since the "
                    "gradients of several can't be summed.  To go on: opt.zero_grad(), which drops this gradient, then "
                    "opt.step(), which ends the step.  (DistributedDataParallel averages gradients after they are used "
                    "here: with it, take ordinary steps)"
                )
            raise
        p.grad = None
        torch.autograd.graph.increment_version(p)
        if part.versions:
            part.versions[j] = p._version

    def finish(self) -> None:
        """End the step.  Parameters that still have a gradient, such as new ones without a hook, are stepped first."""
        optimizer = self._optimizer
        if "found_inf" in optimizer.__dict__:
            raise RuntimeError("in_backward can't be used with a GradScaler: the parameters were stepped with scaled "
                               "gradients; use bfloat16, which needs no scaler, or drop in_backward")  # fmt: skip
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._arrived(p)
        self._close()

    def _close(self) -> None:
        """Close the block of the step, and show its counts."""
        if self._now is not None:
            self._now = None
            self._block.close()
            self._fitting().show()

"""The methods of an optimizer that step it, or belong to steps."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import numpy as np

from ._run.options import loss_scale as checked_scale
from ._run.options import observed, real
from ._run.rule import Rule
from ._run.run import Run


class Stepping:
    """The methods of every optimizer that step it."""

    rule: ClassVar[Rule]
    _run: Run
    _step: Callable[..., None]

    # without a star: the defaults of keyword-only arguments are looked up in a dict, 30 ns each call; and without two,
    # for a hint about arguments that it lacks, which would take 300 instructions more
    def step(
        self,
        grads: Any = ...,
        metric: float | None = None,
        loss_scale: float | None = None,
        lr: float | Sequence[float | None] | None = None,
        target: Any = ...,
        params: Any = None,
        progress: Callable[[int, int], object] | None = None,
    ) -> None:
        """Update the parameters in place.

        Parameters
        ----------
        grads : the structure of params, optional
            For each array its gradient, of the same shape and C-contiguous, or None to leave the array and its state
            alone.  float64 for float64 parameters; for all others float32, float16 or bfloat16 (ml_dtypes, or uint16
            with uint16_as="bfloat16"), widened as they are read.  For a list of group dicts, a list with one such entry
            per group.  Gradients are only read, unless zero_grad is set.  Without grads: the mean of what was
            accumulated.
        metric : float, optional
            A number for the plateau schedules, such as the loss: with every step, or once in a while.  It sets the
            numbers of the steps after this one; if this one is skipped, it is not taken.
        loss_scale : float, optional
            The divisor of the gradients in this step, instead of the optimizer's own loss_scale.  Refused if that is
            "dynamic".
        lr : float or list of float, optional
            The learning rate of this step: one for all groups or, for a list of groups, a list of one for each, where
            None means the group's own.  It is checked as lr is.  After the step the option and its schedule are what
            they were; the schedule is still called.  Refused for Rprop and SuperSAB, which read lr at an array's first
            step only.
        target : the structure of params, optional
            Instead of grads: the values that the parameters should move to.  The gradient is p - target, formed as it
            is read, in the type that the rule computes in (with a master copy, p is that).  It passes through every
            stage as any other; formats, and None, are as for gradients; `Rows` are refused.  zero_grad leaves targets
            alone.
        params : the structure of params, optional
            Arrays that replace the parameters from this step on, as with `rebind`; a step that is refused leaves the
            old ones bound.
        progress : callable, optional
            ``progress(done, total)`` is called as buckets of the state on disk are done, the last time with done equal
            to total; once, with 1 and 1, where all state is in memory.  What it raises is raised after the step.

        Raises
        ------
        TypeError, ValueError
            If gradients, the target or `params` don't fit (the message names the first); if gradients are given while
            accumulated ones are pending or together with a target, or are missing while there are none; if a schedule's
            number is out of its range, and if no schedule reads the metric; if a count in ``state["step"]`` is not in
            [0, 2**62).  Nothing has changed then.
        Exception
            Whatever a schedule raises, such as OverflowError; nothing has changed then.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import SGD
        >>> p = {"w": np.ones(2), "b": np.zeros(3)}
        >>> opt = SGD(p, lr=0.5)
        >>> opt.step({"w": np.ones(2), "b": None})
        >>> p
        {'w': array([0.5, 0.5]), 'b': array([0., 0., 0.])}
        >>> opt.step(target={"w": np.zeros(2), "b": np.ones(3)}, lr=1.0)
        >>> p
        {'w': array([0., 0.]), 'b': array([1., 1., 1.])}
        """
        if (  # one by one, which is less work for Python than a chain
            loss_scale is None
            and metric is None
            and lr is None
            and params is None
            and progress is None
            and target is ...
        ):
            step = self._step  # and an attribute of the instance is found faster than a method would be
            step(grads)
            return
        targets = target is not ...
        if targets and grads is not ...:
            raise TypeError("a step takes either grads or a target, whose difference to the parameters is the gradient")
        given = target if targets else grads
        if loss_scale is None and metric is None and "lr" not in self.rule.read_once:  # there is nothing to check
            self._step(given, 0.0, None, 0.0, lr, params, targets, progress)
        else:
            self._step(
                given, *one_step(self._run, type(self).__name__, metric, loss_scale, lr), params, targets, progress
            )

    def rebind(self, params: Any) -> None:
        """Replace the parameters by other arrays, which are updated from now on.

        For a program that holds its parameters in new arrays after each step.  State, counts, options, averages, sums
        and the arrays of copy_to stay.  The master copy of narrow parameters and the arrays of copy_to are written
        anew from the new arrays at once.  Each step that follows may also do it, with ``step(grads, params=...)``.
        For arrays that are bound already, nothing is done.

        Parameters
        ----------
        params : the structure of params
            Arrays of the same shapes and dtypes, writable, C-contiguous and aligned.  For a list of group dicts, a list
            with one such entry for each group, as gradients come.

        Raises
        ------
        TypeError, ValueError
            If something differs or can't be updated in place, if arrays share memory with each other or with the
            optimizer's, and if rows of groups with ``rows="exact"`` have missed steps (`catch_up` before you copy the
            parameters).  The old arrays are bound then, all of them.

        Notes
        -----
        `rollback` can no longer undo a step of the old arrays.  The average goes on from what it was.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import SGD
        >>> old, new = np.ones(2), np.zeros(2)
        >>> opt = SGD(old, lr=0.5)
        >>> opt.rebind(new)
        >>> opt.step(np.ones(2))
        >>> old, new
        (array([1., 1.]), array([-0.5, -0.5]))
        """
        self._run.plan.rebind(params)

    def stepping(
        self,
        metric: float | None = None,
        *,
        loss_scale: float | None = None,
        lr: float | Sequence[float | None] | None = None,
    ) -> AbstractContextManager[Callable[..., None]]:
        """A ``with`` block that is one step, array by array, as gradients arrive.

        ::

            with opt.stepping() as now:
                for name, grad in gradients():  # each may be freed before the next one is there
                    now(name, grad)

        Each call updates one array: ``now("w", grad)`` for a dict, ``now(3, grad)`` for a list, ``now(grad)`` for one
        bare array, and with the number of the group before that for a list of groups: ``now(1, "w", grad)``.
        ``now("w", target=x)`` takes a target, as `step` does.  Arrays that are not named, or whose gradient is None,
        are left alone.  The bits are those of one `step` with all the gradients, in any order.  Numbers of schedules
        are taken at the beginning, and t moves at the end, if an array was stepped.  Where arrays share a block of 256
        elements of 8-bit state, its elements are stepped at the end.

        If the block raises, what was stepped stays stepped, as if all the other gradients had been None, and a note on
        the exception says so; with keep_undo=True it is undone instead.  `rollback` undoes the block as one step.

        Parameters
        ----------
        metric : float, optional
            As in `step`.
        loss_scale : float, optional
            As in `step`.
        lr : float or list of float, optional
            As in `step`.

        Returns
        -------
        context manager
            Its value is the function `now`, which may be called in any thread, but not in two at once.  A block that
            is left while another thread is inside `now` ends with that call.

        Raises
        ------
        ValueError
            On entering: with max_grad_norm and with on_nonfinite other than "ignore" (so also with a dynamic
            loss_scale), which need all gradients before the first write; while accumulated gradients are pending.
            From `now`: if the gradient doesn't fit, or the array has had its step in this block.
        KeyError, IndexError, TypeError
            From `now`: if there is no such array, or the arguments are not as above.  Nothing was written then.
        RuntimeError
            From `now` outside of the block.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import SGD
        >>> p = {"w": np.ones(2), "b": np.zeros(3)}
        >>> opt = SGD(p, lr=0.5)
        >>> with opt.stepping() as now:
        ...     now("b", np.ones(3))
        ...     now("w", np.ones(2))
        >>> p, opt.t
        ({'w': array([0.5, 0.5]), 'b': array([-0.5, -0.5, -0.5])}, 1)
        """
        block: AbstractContextManager[Callable[..., None]]
        block = self._run.plan.stepping(*one_step(self._run, type(self).__name__, metric, loss_scale, lr))
        return block

    def accumulate(self, grads: Any) -> None:
        """Add the gradients of a micro-batch to the sums; ``step()`` then uses their mean over all calls.

        Sums are float32 (float64 for float64 parameters), so that float16 and bfloat16 gradients neither overflow nor
        stagnate in them.  The first call allocates them.  Norm, clipping and on_nonfinite apply to the mean, at the
        step.  A step that is skipped drops the sums; a step that raises leaves them, and `discard` drops them.

        Parameters
        ----------
        grads : the structure of params
            As for `step`.  None adds nothing: the array's gradient was 0 in this call.  The step leaves alone an array
            that had None in every call.  zero_grad zeroes the gradients after this call.

        Raises
        ------
        TypeError, ValueError
            If gradients don't fit; the message names the first.  Nothing was added then.

        Notes
        -----
        ::

            s <- s + g                                        s <- g at an array's first gradient
            k = (-1 if maximize) * clip coefficient / (loss_scale * calls),  g' = k s             at the step

        Other libraries: torch sums in the gradient's own type, and does not divide the sum.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import SGD
        >>> w = np.zeros(2)
        >>> opt = SGD(w, lr=1.0)
        >>> opt.accumulate(np.array([1.0, 2.0]))
        >>> opt.accumulate(np.array([3.0, 4.0]))
        >>> opt.step()
        >>> w
        array([-2., -3.])
        """
        self._run.plan.accumulate(grads)

    def discard(self) -> None:
        """Drop what was accumulated, if anything was.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import SGD
        >>> opt = SGD(np.zeros(2))
        >>> opt.accumulate(np.ones(2))
        >>> opt.discard()
        >>> opt.pending
        0
        """
        self._run.plan.discard()

    def catch_up(self, *place_and_indices: Any) -> None:
        """Bring rows up to date, of groups with ``rows="exact"``, in parallel: all of them, or some rows of one array.

        Call it before you read or write parameters or their state: until then, rows have missed the steps since they
        were last stepped.  Saving, `state_dict`, `averaged_parameters` and assigning `t` or bounds do it by themselves.
        After it there is no step to `rollback`, if a row had missed one.

        Parameters
        ----------
        *place_and_indices : optional
            Before you look rows up for the next gradient, those rows are enough: ``catch_up("table", indices)`` for a
            dict, ``catch_up(3, indices)`` for a list, ``catch_up(indices)`` for one bare array, and with the number of
            the group before that for a list of groups.  indices : (k,) array of int32 or int64.

        Raises
        ------
        KeyError, IndexError, TypeError, ValueError
            If there is no such array or row.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import SGD, Rows
        >>> table = np.ones((4, 2))
        >>> opt = SGD(table, lr=0.5, weight_decay=1.0, rows="exact")
        >>> opt.step(Rows(np.array([0]), np.zeros((1, 2))))
        >>> table[:, 0]
        array([0.5, 1. , 1. , 1. ])
        >>> opt.catch_up()
        >>> table[:, 0]
        array([0.5, 0.5, 0.5, 0.5])
        """
        self._run.plan.catch_up(*place_and_indices)

    def rollback(self) -> None:
        """Undo the last call of `step`, once.  Needs ``keep_undo=True`` in the constructor.

        Parameters, state, averages, copies, counts, t, grad_norm, skipped_steps, a dynamic loss scale and the plateau
        schedules that read a metric become, to the bit, what they were before that step.  Whatever was written into
        those arrays since is lost.  A step that was skipped is undone too: its count, and its effect on the loss scale.
        A step that raised does not count as one.  Options that were assigned meanwhile stay.  Gradients that zero_grad
        zeroed and sums that the step used do not come back.

        Raises
        ------
        ValueError
            Without keep_undo, if there is no step to undo or it is undone already, and if gradients were accumulated
            since (`discard` them).

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import SGD
        >>> w = np.ones(2)
        >>> opt = SGD(w, lr=0.5, keep_undo=True)
        >>> opt.step(np.ones(2))
        >>> opt.rollback()
        >>> w, opt.t
        (array([1., 1.]), 0)
        """
        self._run.plan.rollback()


def one_step(
    run: Run, name: str, metric: Any, loss_scale: Any, lr: Any
) -> tuple[float, Callable[..., Any] | None, float, Any]:
    """Check a step's arguments and return loss scale (0: the optimizer's own), metric's observer, metric and lr.

    All are checked but lr, whose range depends on the group.  name: of the optimizer's class.
    """
    if loss_scale is not None and run.plan.dynamic:
        raise ValueError(
            f"loss_scale={loss_scale!r} is refused in step: this optimizer's is 'dynamic'; multiply the loss "
            "by opt.loss_scale, and drop it here"
        )
    if isinstance(metric, (np.ndarray, list, tuple, dict)):
        raise TypeError(f"step takes the gradients alone, not the parameters; metric must be a number, got {metric!r}")
    if lr is not None and "lr" in run.rule.read_once:
        raise ValueError(f"lr={lr!r} is refused in a step: {name} reads lr at an array's first step only; drop it")
    scale = 0.0 if loss_scale is None else checked_scale("loss_scale", loss_scale)
    return (scale, None, 0.0, lr) if metric is None else (scale, observed, real("metric", metric), lr)

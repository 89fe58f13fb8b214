"""How the ranks step a run together: checked on all, exchanged, stepped, and given back."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .._optimizer import Optimizer
from .._run.options import moves
from .._run.run import Run
from ._agreement import difference, hashed
from ._exchange import Exchange
from ._ranks import Ranks, agreed

Progress = Callable[[int, int], object]


class Steps:
    """The calls that use gradients.  mean: of the ranks' gradients, and not their sum."""

    def __init__(self, opt: Optimizer, run: Run, ranks: Ranks, exchange: Exchange, mean: bool) -> None:
        self._opt, self._run, self._ranks, self._exchange, self._mean = opt, run, ranks, exchange, mean
        self._known: Any = None  # places and formats of the last gradients, and how they are exchanged

    def call(self, grads: Any, for_one_step: Callable[[], Any] | None, progress: Progress | None = None) -> None:
        """Add gradients to the sums and, if asked for, step."""
        plan, given, steps = self._run.plan, grads is not ..., for_one_step is not None
        name = f"called {'step' if steps else 'accumulate'} {'with' if given else 'without'} gradients"
        now: Any = None
        error: BaseException | None = None
        same = b""
        places: list[tuple[int, int]] = []
        with self._ranks.collective():
            try:
                one_step = () if for_one_step is None else for_one_step()
                now = plan.sharing(grads, steps, *one_step)
                now.__enter__()
                places = now.gradients() if given else []
                numbers, limit = now.options()
                same = repr((one_step[::2], limit, *self._counted())).encode() + numbers
            except BaseException as e:
                error = e
            try:
                kinds = np.array([kind for _, kind in places], "int8")
                alike, uniform = self._ranks.agree(name, error, hashed(same), hashed(kinds.tobytes()))
                if not alike:
                    raise self._ranks.refusal(self._differing(one_step))
                if given:
                    self._sum(now, places, self._kinds(kinds, uniform))
                if steps:
                    self._step(now, given, progress)
                now.zero()
            finally:
                if now is not None:
                    now.__exit__()
        now.end(progress)

    def _counted(self) -> tuple[Any, ...]:
        plan = self._run.plan
        settings = {name: None if moves(x) else x for name, x in plan.settings.items()}
        return plan.t, plan.pending, plan.skipped_steps, plan.loss_scale, plan.growth_tracker, settings

    def _differing(self, one_step: Any) -> Exception:
        """Say what differs between the ranks, where something does."""
        names = "t", "pending", "skipped_steps", "loss_scale", "growth_tracker"
        lines = [f"loss_scale and metric {one_step[::2]}", f"lr of this step {one_step[3:]!r}"]
        *counts, settings = self._counted()
        lines += [f"{name}={x!r}" for name, x in zip(names, counts, strict=True)]
        lines += [f"{name}={getattr(self._opt, name)!r}" for name in settings]
        for i, group in enumerate(self._run.groups):
            shown = [name for name in group.options if name not in ("bounds", "copy_to")]
            lines += [f"param_groups[{i}][{name!r}]={group[name]!r}" for name in shown]
        what = difference(self._ranks.comm, lines)
        return ValueError(f"the ranks do not go together: {what}; nothing was changed")

    def _kinds(self, own: Any, uniform: bool) -> list[list[int]]:
        """Of every rank, the formats of its gradients."""
        comm = self._ranks.comm
        if uniform:
            return [own.tolist()] * comm.size
        found = np.empty((comm.size, own.size), "int8")
        comm.Allgather(own, found)
        every: list[list[int]] = found.tolist()
        return every

    def _sum(self, now: Any, places: list[tuple[int, int]], kinds: list[list[int]]) -> None:
        """Exchange the gradients, and add them to the sums."""
        plan = self._run.plan
        before = [plan.pending > 0 and bool(x) for group in self._run.groups for x in group.store.counts["summed"]]
        key = places, kinds, before
        if self._known is None or self._known[0] != key:
            self._known = key, self._exchange.gradients(places, kinds, before)
        self._exchange.sum(now, self._known[1])
        after = [old or any(kind[k] >= 0 for kind in kinds) for k, old in enumerate(before)]
        now.summed(after, self._ranks.comm.size)

    def _step(self, now: Any, given: bool, progress: Progress | None) -> None:
        """Step on the sums.  given: those of this call, which are dropped if it is refused."""
        try:
            error, usable = None, False
            try:
                usable = now.usable(self._mean)
            except ValueError as e:  # where one rank has it, all have; but only one can name an element
                error = e
            if error is not None or (not usable and self._opt.on_nonfinite == "raise" and now.anything()):
                self._ranks.agree("looked at the gradients", error)
            now.keep()
            self._apply(now, usable, progress)
        except BaseException as refusal:
            if given and agreed(refusal):
                now.drop()
            raise
        now.finish()

    def _apply(self, now: Any, usable: bool, progress: Progress | None) -> None:
        pages = self._run.plan.pages
        if pages is None:
            if usable:
                self._exchange.step(now)
            return
        try:
            now.step_paged(progress)
        except BaseException as refusal:
            if agreed(refusal) and not pages.ended:  # what each rank has put back, for all
                self._exchange.step(None)
            raise
        if usable:
            self._exchange.step(None)

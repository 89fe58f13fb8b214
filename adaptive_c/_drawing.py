"""A schedule as a line in a plot.  matplotlib is imported when one is drawn."""

from typing import Any

from . import schedules
from ._run.options import ARGUMENTS


def draw(schedule: Any, steps: int | None, ax: Any, line: dict[str, Any]) -> Any:
    """Draw a schedule as a line; `Schedule.plot` calls it."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plot needs matplotlib: pip install matplotlib") from error
    n = ARGUMENTS["steps"]("steps", length(schedule) if steps is None else steps)
    if ax is None:
        _, ax = pyplot.subplots()
    at = range(0, n, max(1, n // 2000))
    ax.plot(at, [schedule(t) for t in at], **line)
    ax.set_xlabel("step")
    return ax


def length(schedule: Any) -> int:
    """The number of steps that are drawn unless another is given."""
    match schedule:
        case schedules.step(step_size=n):
            return 4 * n
        case schedules.multistep(milestones=ends):
            return sum(ends[-1:]) + sum(ends[:1]) or 1000
        case schedules.cosine_restarts(steps=n, mult=mult):
            return n * (1 + mult + mult**2) + 1
        case schedules.inverse_sqrt(warmup_steps=n):
            return 10 * n
        case schedules.one_cycle(steps=n):
            return n
        case schedules.warmup(of=then, steps=n):
            return n + length(then)
        case schedules.chain(schedules=parts, milestones=ends):
            return sum(ends[-1:]) + length(parts[-1])
    return int(getattr(schedule, "steps", 999)) + 1

"""A schedule as a line in a plot.  matplotlib is imported when one is drawn."""

import contextlib
from typing import Any

from ._run.described import NAMED
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
    with contextlib.suppress(AttributeError):  # a user's class may lack what its base has
        match next((name for name, kind in NAMED.items() if isinstance(schedule, kind)), ""):
            case "step":
                return 4 * int(schedule.step_size)
            case "multistep":
                return int(sum(schedule.milestones[-1:]) + sum(schedule.milestones[:1])) or 1000
            case "cosine_restarts":
                return int(schedule.steps * (1 + schedule.mult + schedule.mult**2)) + 1
            case "inverse_sqrt":
                return 10 * int(schedule.warmup_steps)
            case "one_cycle":
                return int(schedule.steps)
            case "warmup":
                return int(schedule.steps) + length(schedule.of)
            case "chain":
                return int(sum(schedule.milestones[-1:])) + length(schedule.schedules[-1])
    return int(getattr(schedule, "steps", 999)) + 1

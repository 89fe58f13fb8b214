"""The base class of schedules, which checks the arguments of all of them."""

from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

from ._run.described import NAMED, is_ours, plain
from ._run.habits import meant
from ._run.options import ARGUMENTS, moves


def _schedule(name: str, value: Any) -> Any:
    """A schedule as it is, and a number as a constant schedule."""
    return value if moves(value) else NAMED["constant"](ARGUMENTS["base"](name, value))


def _schedules(name: str, value: Any) -> tuple[Any, ...]:
    """A list of schedules and numbers, checked."""
    if not isinstance(value, (list, tuple)) or not value:
        raise TypeError(f"{name} must be a list of schedules, got {value!r}")
    return tuple(_schedule(f"{name}[{i}]", x) for i, x in enumerate(value))


_CHECKS = {**ARGUMENTS, "of": _schedule, "schedules": _schedules}


@dataclass(frozen=True, repr=False)
class Schedule:
    """The base of all schedules, which are immutable, compared by value and called with a step number.

    A class of your own is a frozen dataclass too, and has ``__call__(self, step)``.

    Raises
    ------
    TypeError, ValueError
        If an argument has another type or is out of its range.

    Examples
    --------
    >>> from dataclasses import dataclass
    >>> from adaptive_c.schedules import Schedule
    >>> @dataclass(frozen=True)
    ... class halving(Schedule):
    ...     base: float
    ...     def __call__(self, step):
    ...         return self.base / 2**step
    >>> [halving(1.0)(t) for t in range(3)]
    [1.0, 0.5, 0.25]
    """

    def __new__(cls, *args: Any, **arguments: Any) -> "Schedule":
        known = [f.name for f in fields(cls)]  # of which its constructor will need no reminder
        for name in arguments if is_ours(cls) else ():  # a class of a user's may have any
            if name not in known:
                raise TypeError(
                    f"{cls.__name__} has no argument {name!r}{meant(name, known)}; it has {', '.join(known)}"
                )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for f in fields(self):
            value = _CHECKS[f.name](f"{type(self).__name__}: {f.name}", getattr(self, f.name))
            object.__setattr__(self, f.name, value)

    def __call__(self, step: int) -> float:
        """The value for the step that comes after `step` applied steps; 0 gives the value for the first step."""
        raise NotImplementedError

    def __repr__(self) -> str:
        shown = (f for f in fields(self) if f.default is MISSING or getattr(self, f.name) != f.default)
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"

    @property
    def reads_metric(self) -> bool:
        """Whether this schedule is a plateau or contains one."""
        return False

    def observe(self, step: int, metric: float) -> "Schedule":
        """Give the schedule after a metric that came with step number `step`.

        Parameters
        ----------
        step : int
            How many steps were applied before the one with which the metric came.
        metric : float
            For a plateau to compare.

        Returns
        -------
        Schedule
            This one, unless it contains a plateau.

        Examples
        --------
        >>> from adaptive_c import schedules
        >>> after = schedules.plateau(1.0, factor=0.5, patience=0).observe(0, 3.0).observe(1, 4.0)
        >>> after(2)
        0.5
        """
        return self

    def _with(self, **valid: Any) -> Any:
        """A copy with other values of some fields, which are known to be valid: a step has no time for checks."""
        if not is_ours(type(self)):  # a class of a user's may make more of its fields
            return replace(self, **valid)
        copy = object.__new__(type(self))
        object.__setattr__(copy, "__dict__", self.__dict__ | valid)
        return copy

    def to_dict(self) -> dict[str, Any]:
        """Describe the schedule by numbers, strings, lists and dicts, for ``json`` or a checkpoint.

        `from_dict` is the inverse.

        Returns
        -------
        dict
            The name of the class under "schedule", and its arguments.

        Raises
        ------
        TypeError
            If the schedule contains a function or a schedule class of your own: those can't be stored.

        Examples
        --------
        >>> from adaptive_c import schedules
        >>> schedules.linear(1.0, 4).to_dict()
        {'schedule': 'linear', 'base': 1.0, 'steps': 4, 'end': 0.0}
        """

        def refuse(own: Any) -> None:
            raise TypeError(f"{own!r} is no schedule of this module and can't be stored; give it again after loading")

        d: dict[str, Any] = plain(self, refuse)
        return d

    def plot(self, steps: int | None = None, ax: Any = None, **line: Any) -> Any:
        """Draw the values of the first `steps` steps, and return matplotlib's axes.

        A plateau is drawn as a constant, its present value.

        Parameters
        ----------
        steps : int >= 1, optional
            How many to draw; None draws the whole schedule, or a suitable part of one without an end.
        ax : matplotlib.axes.Axes, optional
            Where to draw; None makes new ones.
        **line
            Further arguments of ``ax.plot``.

        Returns
        -------
        matplotlib.axes.Axes
            Where it was drawn.

        Raises
        ------
        ImportError
            If matplotlib is not installed.

        Examples
        --------
        >>> from matplotlib.figure import Figure
        >>> from adaptive_c import schedules
        >>> axes = schedules.cosine(1.0, 100).plot(ax=Figure().subplots(), color="black")
        >>> axes.get_xlabel()
        'step'
        """
        from ._drawing import draw

        return draw(self, steps, ax, line)

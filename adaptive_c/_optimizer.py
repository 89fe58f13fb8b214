"""The face of a run: documentation, and every method a door of a few lines."""

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, ClassVar

from ._docstrings import FullSignature, document
from ._native import checked_threads, counted
from ._run.alone import Alone
from ._run.group import ParamGroup
from ._run.habits import Habits, meant, place_of
from ._run.options import SETTINGS, SHARED, flag, moves
from ._run.rule import Rule
from ._run.run import Run
from ._run.store import State
from ._saving import Saving
from ._settings import CurrentScale, Setting, ZeroGrad
from ._stepping import Stepping
from .typing import (
    Arrays,
    Bounds,
    Group,
    LossScale,
    Master,
    NormOver,
    OnNonfinite,
    Params,
    Path,
    Real,
    Rounding,
    RowsMode,
    Schedulable,
    StateDtype,
    SumToOne,
    Uint16As,
)

_TORCH_ONLY = {"foreach", "fused", "capturable", "differentiable"}


class Optimizer(Habits, Stepping, Saving):
    """Base of all optimizers: binds parameters, holds their state and steps them in place.

    Raises
    ------
    TypeError, ValueError
        If something can't be done in place or is out of range, before the first write.
    OSError
        With state_path, from any method that reads or writes it.
    RuntimeError
        From any method that steps, changes, saves or loads: while another call is inside the optimizer (of another
        thread, or from a schedule or a signal handler); inside `averaged_parameters`, from all but `accumulate`,
        `discard`, `catch_up` and assignments; and inside `stepping`, from all of them.

    Notes
    -----
    Each class in `adaptive_c.optimizers` is a rule, and has options of its own in addition to those listed here.

    Examples
    --------
    >>> import numpy as np
    >>> from adaptive_c import AdamW, Optimizer
    >>> isinstance(AdamW(np.ones(3)), Optimizer)
    True
    """

    __signature__ = FullSignature()
    rule: ClassVar[Rule]
    _company: ClassVar[Alone] = Alone()  # the processes that share the state
    _plain: ClassVar[frozenset[str]] = frozenset(SETTINGS)  # which may be assigned without their descriptors

    max_grad_norm = Setting[float | None, Schedulable | None]()
    norm_over = Setting[NormOver, NormOver]()
    max_grad_value = Setting[float | None, Real | None]()
    on_nonfinite = Setting[OnNonfinite, OnNonfinite | None]()
    loss_scale = CurrentScale()
    zero_grad = ZeroGrad()
    cast = Setting[bool, bool]()
    flush_denormals = Setting[bool, bool]()
    seed = Setting[int, int]()

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        cls._plain -= vars(cls).keys()  # what a class defines anew is asked
        if "rule" in vars(cls):
            document(cls)

    def __init__(
        self,
        params: Params,
        options: dict[str, Any],
        /,
        *,
        n_threads: int | None = None,
        max_grad_norm: Schedulable | None = None,
        norm_over: NormOver = "all",
        max_grad_value: Real | None = None,
        on_nonfinite: OnNonfinite | None = None,
        loss_scale: LossScale = 1.0,
        zero_grad: bool = False,
        cast: bool = False,
        keep_undo: bool = False,
        flush_denormals: bool = False,
        ema_decay: Schedulable | None = None,
        bounds: Bounds | None = None,
        sum_to_one: SumToOne = False,
        rows: RowsMode = "lazy",
        copy_to: Arrays | None = None,
        state_dtype: StateDtype | None = None,
        master: Master | None = None,
        rounding: Rounding | None = None,
        uint16_as: Uint16As | None = None,
        seed: int = 0,
        state_path: Path | None = None,
        state_memory: int | None = None,
        state_parameters: bool = False,
        **unknown: Any,
    ) -> None:
        given = locals()
        settings = {name: given[name] for name in SETTINGS}
        self._own = tuple(options)
        defaults = {**options, **{name: given[name] for name in SHARED}}
        if uint16_as not in (None, "bfloat16"):
            raise ValueError(f"uint16_as must be 'bfloat16' or None, got {uint16_as!r}")
        for name in unknown:
            raise TypeError(f"{type(self).__name__} has no argument {name!r}{meant(name, (*defaults, *settings))}"
                            + ("; drop it: there is one implementation, always fused" if name in _TORCH_ONLY else
                               f"; it has params, {', '.join(defaults)}, n_threads, uint16_as, keep_undo, "
                                 f"state_path, state_memory, state_parameters, {', '.join(SETTINGS)}"))  # fmt: skip
        if (
            isinstance(params, dict)
            and "params" in params
            and (not hasattr(params["params"], "__array_interface__") or any(name in defaults for name in params))
        ):
            raise ValueError("params looks like one group dict; groups come in a list: [{'params': ...}]")
        keeps, threads = flag("keep_undo", keep_undo), checked_threads(n_threads)
        pages = self._pages_of(state_path, state_memory, state_parameters)
        run = Run(self.rule._replace(label=type(self).__name__), defaults, uint16_as, self._company, pages)
        run.plan.n_threads = threads
        run.start(params, settings, keeps)
        self._bind(run)

    def _pages_of(self, path: Any, memory: int | None, parameters: bool) -> Any:
        """The object that brings the state from the folder of `state_path`; None without one."""
        if memory is not None and (isinstance(memory, bool) or not isinstance(memory, int) or memory < 1):
            raise ValueError(f"state_memory must be an integer, a number of bytes from 1 on, got {memory!r}")
        if path is None:
            if flag("state_parameters", parameters) or memory is not None:
                raise ValueError("state_memory and state_parameters are for state on disk: give state_path, too, or "
                                 "drop them")  # fmt: skip
            return None
        from ._disk.pages import Pages

        return Pages(path, 1 << 30 if memory is None else memory, flag("state_parameters", parameters), self._company)

    @property
    def bytes_written(self) -> int:
        """Bytes that this optimizer has written to the folder of `state_path`; 0 without one."""
        pages = self._run.plan.pages
        return 0 if pages is None else int(pages.bytes_written)

    def close(self) -> None:
        """Let go of the folder of `state_path`, so that another optimizer can have it.

        Nothing is left to be written: each step has done that.  Every later call that steps, changes, saves or loads
        raises RuntimeError.  An optimizer that is no longer referred to lets go of the folder by itself.

        Raises
        ------
        RuntimeError
            While another call is inside the optimizer.

        Examples
        --------
        >>> import tempfile
        >>> import numpy as np
        >>> from adaptive_c import AdamW
        >>> folder = tempfile.mkdtemp()
        >>> AdamW(np.ones(3), state_path=folder).close()
        >>> AdamW(np.ones(3), state_path=folder).close()
        """
        plan = self._run.plan
        if not plan.guard.ended:
            with plan.guard:
                plan.end("this optimizer is closed; construct a new one")
        if plan.pages is not None:
            plan.pages.close()

    def _bind(self, run: Run) -> None:
        """Attach the optimizer to a run."""
        self._run, self._state_view = run, State(run)
        self._step = run.plan.step  # bound once: a small step is mostly looking things up

    def add_param_group(self, param_group: Group) -> None:
        """Add a group, as in torch.

        Its arrays start like those of a new optimizer, each with its own count of steps, from 0.  `t` goes on, and with
        it the schedules; state, options and counts of the other groups stay as they are.  Options that the dict does
        not have are those of the constructor, except copy_to.  From now on, gradients are a list with one entry for
        each group, and so are ``state[name]`` and ``ema``.

        Parameters
        ----------
        param_group : dict
            ``params``, and options that differ from the constructor's.

        Raises
        ------
        TypeError, ValueError
            As at construction; also if arrays share memory with others of this optimizer, and while accumulated
            gradients are pending.  Nothing has changed then.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import AdamW
        >>> opt = AdamW(np.ones(3), lr=0.1)
        >>> opt.add_param_group({"params": np.ones(2), "lr": 0.01})
        >>> opt.step([np.ones(3), None])
        >>> [group["lr"] for group in opt.param_groups]
        [0.1, 0.01]
        """
        self._run.add(param_group)

    def decoded_state(self, name: str) -> Any:
        """Decode copies of a state array, in the type that the rule computes in and in the structure of params.

        Parameters
        ----------
        name : str
            The name of an array in `state`.

        Returns
        -------
        structure of arrays
            Of float32; of float64 for float64 parameters.

        Raises
        ------
        KeyError
            If ``state`` does not have the name, or it is not such an array but a scale or a count.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import AdamW
        >>> opt = AdamW(np.ones(3, "float32"), betas=(0.75, 0.999), state_dtype="uint8")
        >>> opt.step(np.ones(3, "float32"))
        >>> opt.state["exp_avg"].dtype, opt.decoded_state("exp_avg")
        (dtype('uint8'), array([0.25, 0.25, 0.25], dtype=float32))
        """
        run = self._run
        names = [name for name in self.rule.state if any(name in group.store.arrays for group in run.groups)]
        if name not in names:
            raise KeyError(f"{name!r} is no state that could be decoded; there is {', '.join(names) or 'none'}")
        with run.looking():
            found = [group.find(name, decoded=True) for group in run.groups]
        return found if run.plan.structured else found[0]

    @property
    def pending(self) -> int:
        """The number of calls of `accumulate` since the last step."""
        n: int = self._run.plan.pending
        return n

    @property
    def ema(self) -> Any:
        """The averages of the parameters, in their structure; None for a group without `ema_decay`.

        They are float32 for narrower parameters.  Inside `averaged_parameters` this holds the weights that were
        exchanged for them, for float32 and float64 parameters.
        """
        with self._run.looking():
            found = [
                group.layout.views(group.store.array("ema")) if "ema" in group.store.arrays else None
                for group in self._run.groups
            ]
        return found if self._run.plan.structured else found[0]

    def averaged_parameters(self) -> AbstractContextManager[None]:
        """A ``with`` block inside which the parameters are their averages; a step in it is refused.

        The parameters are put back at its end, whatever happens.

        Returns
        -------
        context manager
            Its value is None.

        Raises
        ------
        ValueError
            Without `ema_decay`.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c import SGD
        >>> w = np.ones(3)
        >>> opt = SGD(w, lr=0.5, ema_decay=0.75)
        >>> opt.step(w.copy())
        >>> with opt.averaged_parameters():
        ...     print(w)
        [0.875 0.875 0.875]
        >>> w
        array([0.5, 0.5, 0.5])
        """
        if not any("ema" in group.store.arrays for group in self._run.groups):
            raise ValueError("there is no average: construct the optimizer with ema_decay")
        block: AbstractContextManager[None] = self._run.plan.averages()
        return block

    @property
    def grad_norm(self) -> float:
        """The norm of all gradients of the last step, unscaled and unclipped, whatever norm_over is.

        NaN before the first step and without max_grad_norm.
        """
        norm: float = self._run.plan.grad_norm
        return norm

    @property
    def skipped_steps(self) -> int:
        """The number of steps that ``on_nonfinite="skip"`` left out."""
        n: int = self._run.plan.skipped_steps
        return n

    @property
    def schedules(self) -> dict[str, Any]:
        """The schedules of the optimizer as a whole by name: that of max_grad_norm, if it follows one.

        Then ``opt.max_grad_norm`` is the schedule's number for the next step.
        """
        return {name: value for name, value in self._run.plan.settings.items() if moves(value)}

    @property
    def param_groups(self) -> tuple[ParamGroup, ...]:
        """The options of each group, in an object like a dict.

        Assign a number or a schedule to change one: ``opt.param_groups[0]["lr"] = 1e-4``.  An option that follows a
        schedule reads as its number for the next step; ``param_groups[0].schedules`` has the schedules by name.
        """
        return self._run.groups

    if not TYPE_CHECKING:  # or checkers would take any attribute to be assignable

        def __setattr__(self, name, value):  # (a __getattr__ would slow down every step)
            if name in self._plain and self._run.plan.assign(name, value):
                return  # one plain value for another, for which the descriptor would take twice as long
            if name not in SETTINGS and not name.startswith("_") and not hasattr(type(self), name):
                place = place_of(name, self._run.defaults, SETTINGS)
                hint = f"; did you mean {place} = {value!r}?" if place else ""
                raise AttributeError(f"{type(self).__name__} has no attribute {name!r} to assign{hint}")
            object.__setattr__(self, name, value)  # without super(), which takes a tenth of an assignment

    @property
    def state(self) -> State:
        """The live state arrays by name, in the structure of params; the scales of 8-bit state are flat."""
        return self._state_view

    @property
    def t(self) -> int:
        """The number of applied steps.

        A step in which every gradient was None is not counted.  Each array also has its own count, for its bias
        correction (``state["step"]``).  Assigning t sets them all, and t > 0 says that the state is to be used.
        Schedules follow t.
        """
        t: int = self._run.plan.t
        return t

    @t.setter
    def t(self, t: int) -> None:
        if isinstance(t, bool) or not hasattr(t, "__index__"):
            raise TypeError(f"t must be an integer, got {t!r}")
        if not 0 <= t.__index__() < 1 << 62:
            raise ValueError(f"t must be in [0, 2**62), got {t}")
        self._run.plan.set_t(t.__index__())

    @property
    def n_threads(self) -> int | None:
        """The number of threads of a large step; None leaves it to `set_num_threads`."""
        return self._run.plan.n_threads or None

    @n_threads.setter
    def n_threads(self, n: int | None) -> None:
        self._run.plan.n_threads = checked_threads(n)

    @property
    def nbytes(self) -> int:
        """The bytes of state.

        They include averages, scales, master copies, sums of gradients and what keep_undo and sum_to_one keep, and
        state on disk.
        """
        beside: int = self._run.plan.beside_nbytes
        return beside + sum(int(x.nbytes) for group in self._run.groups for x in group.store.arrays.values())

    def __repr__(self) -> str:
        groups = self._run.groups
        options = groups[0].options
        shown = {*self._own, *(name for name in ("state_dtype", "master", "rounding") if options[name])}
        listed = ", ".join(f"{name}={value!r}" for name, value in options.items() if name in shown)
        size = sum(group.bound.size for group in groups)
        dtypes = " and ".join(dict.fromkeys(group.bound.dtype for group in groups))
        more = f", {len(groups)} groups" if len(groups) > 1 else ""
        return f"{type(self).__name__}({listed}, t={self.t}, {counted(size, f'{dtypes} element')}{more})"


document(Optimizer)

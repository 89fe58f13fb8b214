"""The face of a run: documentation, and every method a door of a few lines."""

from contextlib import AbstractContextManager
from typing import Any, ClassVar

from ._native import checked_threads
from ._run.group import ParamGroup
from ._run.habits import Habits, meant, place_of
from ._run.options import SETTINGS, SHARED, Schedulable, flag, moves
from ._run.rule import Rule
from ._run.run import Run
from ._run.store import State
from ._saving import Saving
from ._settings import LossScale, Setting, ZeroGrad
from ._stepping import Stepping

_TORCH_ONLY = {"foreach", "fused", "capturable", "differentiable"}


class Optimizer(Habits, Stepping, Saving):
    """Base of all optimizers: binds parameters, holds their state and steps them in place.

    Parameters
    ----------
    params : array, list or tuple of arrays, dict of arrays, or list of group dicts
        float32, float64, float16 or bfloat16 NumPy arrays of any shape, C-contiguous and writable; memory maps are
        fine.  They are updated where they are.  A group dict has ``params`` and any options that differ from the
        defaults; all arrays of a group have one dtype.  float16 and bfloat16 need `master` or `rounding`.
    the numbers of a rule, and the elements of its pairs
        Each is a number or a schedule: an object of ``adaptive_c.schedules``, or any function of the number of applied
        steps.  Step k uses ``schedule(k - 1)``; a skipped step does not advance it.  Options that are read only once
        can't follow a schedule: the lr of Rprop and SuperSAB, and initial_accumulator_value.
    n_threads : int, optional
        The number of threads of a large step, used as given.  None means the number given to ``set_num_threads``, else
        OMP_NUM_THREADS, else the smaller of CPU affinity and cgroup quota.
    max_grad_norm : float or schedule, optional
        Clip: gradients are multiplied by min(1, max_grad_norm/(norm + 1e-6)).  norm is the 2-norm over the unscaled
        gradients of all groups, unless norm_over says otherwise.  This reads the gradients once more, and does not
        write them.
    norm_over : "all", "group" or "array"
        Over what max_grad_norm clips: all gradients together, as torch's clip_grad_norm_ does; each group by itself; or
        each array by itself, as thinc and Keras' clipnorm do.  A step is skipped or refused as a whole.
    max_grad_value : float, optional
        Clamp every element of the gradient to [-max_grad_value, max_grad_value], after unscaling and clipping.
    loss_scale : float or "dynamic"
        Gradients are divided by it as they are read.  ``step(grads, loss_scale=s)`` sets it for a single step.
        "dynamic" follows torch.amp.GradScaler: it starts at 65536, is halved after a step that was skipped, and doubled
        after 2000 steps in a row that were not.  Multiply the loss by ``opt.loss_scale``, which reads the current one;
        assigning a number continues from there.  It stays within [2**-126, 2**126]; torch's goes to 2**127 and 0.
    on_nonfinite : "ignore", "skip" or "raise"
        What to do with a step whose gradients hold a NaN or an infinity or, if the rule squares them, a number whose
        square overflows the dtype (it would make the second moment infinite forever; a sum of many squares, as
        Adagrad's, still may).  "skip" counts the step in skipped_steps, "raise" names the first such element.  Both
        leave parameters, state, average, copies and counts as they were.  A skipped step still zeroes the gradients if
        zero_grad asks for it.  The default is "ignore"; with a dynamic loss_scale it is "skip", the only one allowed.
    zero_grad : bool
        Zero the gradients after they are used, instead of a call like torch's zero_grad().  They must be writable and
        must not share memory.
    cast : bool
        Take gradients (and targets) as they come: any of float16, bfloat16, float32 and float64 for any parameters,
        C-contiguous or not, aligned or not, and a NumPy or Python float for an array of one element.  They are
        converted as they are read, 4,096 elements at a time in each thread, with the bits of
        ``np.ascontiguousarray(g.astype(dtype))``, dtype being float64 for float64 parameters and float32 for all
        others.  Integers, complex numbers and other byte orders are refused, as ever.  Values of `Rows` may have any
        of the formats, but must be contiguous.
    keep_undo : bool
        Before each step, keep what it overwrites, for `rollback`.  This takes as much memory again as parameters,
        state, averages and copies, and one more pass that copies them.
    flush_denormals : bool
        Treat denormal numbers as 0 in a step (FTZ and DAZ).  This changes bits.  The caller's floating-point mode never
        does: every thread computes in the default mode, or in this one, and the caller's mode is restored.
    ema_decay : float in [0, 1], optional; per group
        Keep an average e of the parameters in `ema`.  It starts at the parameters; after each step of an array,
        e <- e + (1 - ema_decay) (p - e).
    bounds : (lo, hi), optional; per group
        Box constraint: parameters are clamped to it after each step.  Each side is a number, None, or arrays in the
        structure of the group's parameters.  Bounds are copied, and rounded inward to the parameters' dtype.
    sum_to_one : bool, "divide" or "project"; per group
        For arrays whose last axis is a distribution: behind the bounds, "divide" (or True) divides each row of the last
        axis by its sum; a row whose sum is not positive and finite stays as it is.  "project" replaces each row by the
        nearest one of numbers >= 0 whose sum is 1 (Duchi et al. 2008), unless its sum is not finite.
    rows : "lazy" or "exact"; per group
        What a gradient of `Rows` means for the other rows.  "lazy": nothing; they and their state stay as they are.
        "exact": a gradient of 0.  They are brought up to date, to the bits of dense steps, when they are stepped next
        or by `catch_up`, and all at once after each 4,096 steps, by a step that takes longer.  Refused for 8-bit state.
        It may be assigned; all rows catch up then.
    copy_to : array or structure of arrays, optional; per group
        float32, bfloat16 or float16 arrays, in the structure of the group's parameters, that receive the updated
        parameters, rounded to nearest even; they are written at construction too.  Only float32 for float64 parameters.
    state_dtype : "float32", "bfloat16" or "uint8", optional; per group
        The format of the moments.  "uint8" is a code of 8 bits with a scale for each block of 256 elements.  bfloat16
        and uint8 are rounded stochastically.  They are refused for float64 parameters, Rprop, SuperSAB and
        centered=True.  A block may contain elements of two arrays; then the larger second moments may lift the others,
        if those are 40,000 times smaller.
    master : "float32", optional; per group
        For float16 and bfloat16 parameters: the rule works on a float32 copy, ``state["master"]``, and the parameters
        are that copy, rounded to nearest even, after each step.  If you write to the parameters yourself, write to the
        copy too, because the next step starts from it.
    rounding : "stochastic", optional; per group
        For float16 and bfloat16 parameters without a copy: rounded up or down, with probabilities given by the
        distances, so that the mean is exact.
    uint16_as : "bfloat16", optional
        What uint16 arrays hold: parameters, gradients and copy_to.  ml_dtypes.bfloat16 arrays do not need it.
    seed : int in [0, 2**64)
        The seed of stochastic rounding, which is a function of seed, step, group and place, and the same for every
        number of threads.  Give optimizers that are averaged or compared different seeds.

    Attributes
    ----------
    param_groups : list of dict-like
        The options of each group.  Assign a number or a schedule to change one: ``opt.param_groups[0]["lr"] = 1e-4``.
        An option that follows a schedule reads as its number for the next step; ``param_groups[0].schedules`` has the
        schedules by name.
    schedules : dict
        The schedules of the optimizer as a whole by name: that of max_grad_norm, if it follows one.  Then
        ``opt.max_grad_norm`` reads as its number for the next step.
    state : mapping
        The live state arrays by name, in the structure of params; the scales of 8-bit state are flat.
    t : int
        The number of applied steps; a step in which every gradient was None is not counted.  Each array also has its
        own count, for its bias correction (``state["step"]``).  Assigning t sets them all, and t > 0 says that the
        state is to be used.  Schedules follow t.
    ema : structure of arrays
        The averages; None for a group without.  float32 for narrower parameters.  Inside `averaged_parameters` it holds
        the weights that were exchanged for them, for float32 and float64 parameters.
    grad_norm : float
        The norm of all gradients of the last step, unscaled and unclipped, whatever norm_over is; NaN before the first
        step and without max_grad_norm.
    skipped_steps : int
        The number of steps that on_nonfinite="skip" left out.
    pending : int
        The number of calls of `accumulate` since the last step.
    nbytes : int
        Bytes of state, including averages, scales, master copies, sums of gradients and what keep_undo and sum_to_one
        keep.

    Raises
    ------
    TypeError, ValueError
        If something can't be done in place or is out of range, before the first write.
    RuntimeError
        From any method that steps, changes, saves or loads: while another call is inside the optimizer (of another
        thread, or from a schedule or a signal handler); inside `averaged_parameters`, from all but `accumulate`,
        `discard`, `catch_up` and assignments; and inside `stepping`, from all of them.
    """

    rule: ClassVar[Rule]
    _part: ClassVar[tuple[int, int]] = (0, 1)  # which of how many processes, that share the state, this is

    max_grad_norm = Setting()
    norm_over = Setting()
    max_grad_value = Setting()
    on_nonfinite = Setting()
    loss_scale = LossScale()
    zero_grad = ZeroGrad()
    cast = Setting()
    flush_denormals = Setting()
    seed = Setting()

    def __init__(
        self,
        params: Any,
        options: dict[str, Any],
        /,
        *,
        n_threads: int | None = None,
        max_grad_norm: Schedulable | None = None,
        norm_over: str = "all",
        max_grad_value: float | None = None,
        on_nonfinite: str | None = None,
        loss_scale: float | str = 1.0,
        zero_grad: bool = False,
        cast: bool = False,
        keep_undo: bool = False,
        flush_denormals: bool = False,
        ema_decay: Schedulable | None = None,
        bounds: Any = None,
        sum_to_one: bool | str = False,
        rows: str = "lazy",
        copy_to: Any = None,
        state_dtype: str | None = None,
        master: str | None = None,
        rounding: str | None = None,
        uint16_as: str | None = None,
        seed: int = 0,
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
                                 f"{', '.join(SETTINGS)}"))  # fmt: skip
        if (
            isinstance(params, dict)
            and "params" in params
            and (not hasattr(params["params"], "__array_interface__") or any(name in defaults for name in params))
        ):
            raise ValueError("params looks like one group dict; groups come in a list: [{'params': ...}]")
        run = Run(self.rule._replace(label=type(self).__name__), defaults, uint16_as, part=self._part)
        run.plan.n_threads = checked_threads(n_threads)
        run.start(params, settings, flag("keep_undo", keep_undo))
        self._bind(run)

    def _bind(self, run: Run) -> None:
        self._run, self._state_view = run, State(run)
        self._step = run.plan.step  # bound once: a small step is mostly looking things up

    def add_param_group(self, param_group: dict[str, Any]) -> None:
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
        """
        self._run.add(param_group)

    def decoded_state(self, name: str) -> Any:
        """Decoded copies of a state array, in the type that the rule computes in and in the structure of params.

        Raises
        ------
        KeyError
            If ``state`` does not have the name, or it is not such an array but a scale or a count.
        """
        run = self._run
        names = [name for name in self.rule.state if any(name in group.store.arrays for group in run.groups)]
        if name not in names:
            raise KeyError(f"{name!r} is no state that could be decoded; there is {', '.join(names) or 'none'}")
        found = [group.find(name, decoded=True) for group in run.groups]
        return found if run.plan.structured else found[0]

    @property
    def pending(self) -> int:
        n: int = self._run.plan.pending
        return n

    @property
    def ema(self) -> Any:
        averages = [group.store.arrays.get("ema") for group in self._run.groups]
        found = [
            None if x is None else group.layout.views(x) for x, group in zip(averages, self._run.groups, strict=True)
        ]
        return found if self._run.plan.structured else found[0]

    def averaged_parameters(self) -> AbstractContextManager[None]:
        """A ``with`` block inside which the parameters are their averages; a step in it is refused.

        The parameters are put back at its end, whatever happens.
        """
        if not any("ema" in group.store.arrays for group in self._run.groups):
            raise ValueError("there is no average: construct the optimizer with ema_decay")
        block: AbstractContextManager[None] = self._run.plan.averages()
        return block

    @property
    def grad_norm(self) -> float:
        norm: float = self._run.plan.grad_norm
        return norm

    @property
    def skipped_steps(self) -> int:
        n: int = self._run.plan.skipped_steps
        return n

    @property
    def schedules(self) -> dict[str, Any]:
        return {name: value for name, value in self._run.plan.settings.items() if moves(value)}

    @property
    def param_groups(self) -> tuple[ParamGroup, ...]:
        return self._run.groups

    def __setattr__(self, name: str, value: Any) -> None:  # (a __getattr__ would slow down every step)
        if name not in SETTINGS and not name.startswith("_") and not hasattr(type(self), name):
            place = place_of(name, self._run.defaults, SETTINGS)
            hint = f"; did you mean {place} = {value!r}?" if place else ""
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r} to assign{hint}")
        object.__setattr__(self, name, value)  # without super(), which takes a tenth of an assignment

    @property
    def state(self) -> State:
        return self._state_view

    @property
    def t(self) -> int:
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
        return self._run.plan.n_threads or None

    @n_threads.setter
    def n_threads(self, n: int | None) -> None:
        self._run.plan.n_threads = checked_threads(n)

    @property
    def nbytes(self) -> int:
        beside: int = self._run.plan.beside_nbytes
        return beside + sum(x.nbytes for group in self._run.groups for x in group.store.arrays.values())

    def __repr__(self) -> str:
        groups = self._run.groups
        options = groups[0].options
        shown = {*self._own, *(name for name in ("state_dtype", "master", "rounding") if options[name])}
        listed = ", ".join(f"{name}={value!r}" for name, value in options.items() if name in shown)
        size = sum(group.bound.size for group in groups)
        dtypes = " and ".join(dict.fromkeys(group.bound.dtype for group in groups))
        more = f", {len(groups)} groups" if len(groups) > 1 else ""
        return f"{type(self).__name__}({listed}, t={self.t}, {size} {dtypes} elements{more})"

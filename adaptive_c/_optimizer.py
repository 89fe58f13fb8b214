"""What every optimizer is made of: parameters in a structure, options in groups, state, and one call of the plan."""

from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any, ClassVar, Never

import numpy as np

from ._native import checked_threads, core
from ._options import SETTINGS, _real, check_options, check_settings, check_together, flag, inward
from ._options import loss_scale as checked_scale
from ._scaler import LossScaler
from ._scheduled import Number, numbers_at, observed, schedules_in

Array = np.ndarray[Any, Any]
_TORCH_ONLY = {"foreach", "fused", "capturable", "differentiable"}
_BLOCK = 256  # elements of 8-bit state that share a scale
_SHARED = ("ema_decay", "bounds", "copy_to", "state_dtype", "master", "rounding")  # options of every group
_FIXED = ("copy_to", "state_dtype", "master", "rounding")  # those that can't change
# How narrow state is rounded.  What is not listed has a sign.  A maximum that never falls is rounded to nearest: noise
# would push it up.  (Adamax's exp_inf falls, by less than nearest can see.)
_CODINGS = {
    **dict.fromkeys(("exp_avg_sq", "exp_inf", "sum", "square_avg", "acc_delta"), "unsigned"),
    "max_exp_avg_sq": "maximum",
}


class ParamGroup(MutableMapping[str, Any]):
    """Arrays that share options.  Assigning an option checks it at once; ``params`` is read-only.

    An option that follows a schedule reads as its number for the next step; `schedules` has the schedules themselves.
    """

    _plan: Any  # set once all groups are there; the optimizer itself is not kept: a cycle would hold its state alive
    _uint16_as: str | None

    def __init__(self, cls: "type[Optimizer]", where: str, index: int, params: Any, options: dict[str, Any]) -> None:
        self._cls = cls
        self._where = where
        self._index = index
        self._keys: Any  # a dict's keys, None for a list, () for one bare array (or what the plan will refuse as such)
        if isinstance(params, dict):
            self._keys, self._arrays = dict.fromkeys(params), tuple(params.values())
        elif isinstance(params, (list, tuple)):
            self._keys, self._arrays = None, tuple(params)
        else:
            self._keys, self._arrays = (), (params,)
        self._numbers = options  # the plan's; where a schedule moves one, that of the last step
        self._schedules: dict[str, Any] = {}
        self._followed = -1  # the count of steps that the numbers belong to
        self._slots: tuple[Array | None, ...] = ()
        self._scales: tuple[Array | None, ...] = ()
        self._master: Array | None = None
        self._ema: Array | None = None
        self._sums: Array | None = None  # flat, made by the first accumulate; of the arrays that _summed says
        self._summed = np.zeros(len(self._arrays), "uint8")
        self._per_array: dict[str, Array] = {}

    def arrange(self, items: list[Any]) -> Any:
        """One item for each array, in the structure of the parameters; it can't be assigned to by mistake."""
        if self._keys == ():
            return items[0]
        return tuple(items) if self._keys is None else MappingProxyType(dict(zip(self._keys, items, strict=True)))

    def views(self, flat: Array) -> Any:
        """Views of a flat state array in the structure and shapes of the parameters."""
        ends = np.cumsum([0, *(a.size for a in self._arrays)])
        return self.arrange([flat[i : i + a.size].reshape(a.shape) for i, a in zip(ends, self._arrays, strict=False)])

    def _match(self, arrays: Any, name: str) -> list[tuple[Array, Array, str]]:
        """(parameter, its partner, the partner's name) for arrays in the structure of the parameters."""
        if isinstance(self._keys, dict):
            if not isinstance(arrays, Mapping) or arrays.keys() != self._keys.keys():
                raise ValueError(
                    f"{name} must be a dict with the keys of the parameters, {', '.join(map(repr, self._keys))}"
                )
            items = [(arrays[key], f"{name}[{key!r}]") for key in self._keys]
        elif self._keys is None:
            if not isinstance(arrays, (list, tuple)) or len(arrays) != len(self._arrays):
                raise ValueError(f"{name} must be a list of {len(self._arrays)} arrays, as the parameters are")
            items = [(array, f"{name}[{i}]") for i, array in enumerate(arrays)]
        else:
            items = [(arrays, name)]
        for param, (array, label) in zip(self._arrays, items, strict=True):
            if type(array) not in (np.ndarray, np.memmap) or array.shape != param.shape:
                got = f"shape {array.shape}" if type(array) in (np.ndarray, np.memmap) else type(array).__name__
                raise ValueError(f"{label} must be an array of its parameter's shape, {param.shape}, got {got}")
        return [(param, array, label) for param, (array, label) in zip(self._arrays, items, strict=True)]

    def _flat(self, arrays: Any, name: str) -> Array:
        parts = []
        for _, array, _ in self._match(arrays, name):
            part = np.asarray(array).ravel()
            if self._is_bfloat16(array):
                part = (part.view("uint16").astype("uint32") << np.uint32(16)).view("float32")
            parts.append(part)
        return np.concatenate(parts) if parts else np.empty(0)

    def _is_bfloat16(self, array: Array) -> bool:
        return array.dtype.name == "bfloat16" or (array.dtype == np.uint16 and self._uint16_as == "bfloat16")

    def _bind_copies(self) -> None:
        """Check copy_to and hand it to the plan."""
        copies, kind = [], ""
        name = f"{self._where}['copy_to']" if "[" in self._where else "copy_to"
        for param, copy, label in self._match(self._numbers["copy_to"], name):
            kind_here = "bfloat16" if self._is_bfloat16(copy) else copy.dtype.name
            if kind_here not in ("float32", "bfloat16", "float16") or (kind and kind_here != kind):
                hint = "; say uint16_as='bfloat16' if that is what it holds" if copy.dtype == np.uint16 else ""
                raise TypeError(f"{label} has dtype {copy.dtype}; copies of a group are all float32, all bfloat16 or "
                                f"all float16{hint}")  # fmt: skip
            if param.dtype == np.float64 and kind_here != "float32":
                raise TypeError(f"{label} is {kind_here}, which is refused for float64 parameters: they would be "
                                "rounded twice; use float32")  # fmt: skip
            flags = copy.flags
            if not (flags.c_contiguous and flags.writeable and flags.aligned and copy.dtype.isnative):
                raise ValueError(f"{label} must be C-contiguous, writable, aligned and in native byte order")
            copies.append(copy)
            kind = kind_here
        self._plan.attach_copies(self._index, kind, tuple(copies))

    @property
    def schedules(self) -> Mapping[str, Any]:
        """The schedules by the option's name; for a pair a tuple of schedules and numbers."""
        return MappingProxyType(self._schedules)

    @property
    def _options(self) -> dict[str, Any]:
        """All options as plain numbers, those of the next step."""
        return self._numbers_at(self._plan.t) if self._schedules else self._numbers

    def _numbers_at(self, t: int) -> dict[str, Any]:
        where = f"param_groups[{self._index}]: "
        numbers = {**self._numbers, **numbers_at(self._schedules, t, where)}
        check_together(numbers, np.dtype(self._computed), f"{where}at t={t} ")
        return numbers

    def _follow(self, t: int) -> None:
        """Give the plan the numbers for the step after t applied ones.  It asks for them before every step."""
        if self._schedules and t != self._followed:
            read = self._numbers  # a schedule may be anybody's Python, during which other threads run
            self._plan.take(self, self._numbers_at(t), self._schedules, t, None, read)

    def __getitem__(self, name: str) -> Any:
        if name == "params":
            return self.arrange(list(self._arrays))
        if name in self._schedules:
            followed = {name: self._schedules[name]}
            return numbers_at(followed, self._plan.t, f"param_groups[{self._index}]: ")[name]
        return self._numbers[name]

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "params":
            raise TypeError("params is read-only: an optimizer is bound to its arrays; construct a new one")
        if name not in self._numbers:
            raise KeyError(f"{name!r} is not an option of {self._cls.__name__}; it has {', '.join(self._numbers)}")
        t, read = self._plan.t, self._numbers
        where = f"param_groups[{self._index}]: "
        self._take(self._checked({**read, **self._schedules, name: value}, t, where, read, only=name), -1)

    def _checked(self, options: dict[str, Any], t: int, where: str, read: Any, only: str | None = None) -> Any:
        """For `_take`: the options as numbers after t steps, their schedules, bounds for the plan, and `read`.

        read: the numbers that the options were made from.
        only: the schedules of the other options keep their last number, until a step follows them: of several that are
        out of range, each can be mended by itself.
        """
        dtype = self._plan.dtype(self._index)
        schedules = schedules_in(options, self._cls, where)
        followed = {name: schedule for name, schedule in schedules.items() if only in (None, name)}
        numbers = {**{name: self._numbers[name] for name in schedules}, **numbers_at(followed, t, where)}
        options = check_options({**options, **numbers}, np.dtype(self._computed), where)
        if self._slots:
            self._check_changes(options, schedules, where)
        else:
            self._check_formats(options, dtype, where)
        bounds = None  # leave them
        if not self._slots or options["bounds"] is not self._numbers["bounds"]:
            bounds = (None, None)
            if options["bounds"] is not None:
                bounds = inward(options["bounds"], dtype, where, self._flat)
        return options, schedules, bounds, read

    def _take(self, checked: Any, t: int) -> None:
        """t: the count of steps that all of the numbers belong to, -1 for none."""
        options, schedules, bounds, read = checked
        self._plan.take(self, options, schedules, t, bounds, read)

    def _state_names(self, options: Mapping[str, Any], schedules: Mapping[str, Any]) -> tuple[str | None, ...]:
        """The state arrays that are needed: what a schedule moves may be 0 now and on later."""
        return self._cls._state({**options, **dict.fromkeys(schedules, True)})

    @property
    def _computed(self) -> str:
        """The dtype that the rule computes in."""
        return "float64" if self._plan.dtype(self._index) == "float64" else "float32"

    def _check_changes(self, options: dict[str, Any], schedules: dict[str, Any], where: str) -> None:
        for slot, name in zip(self._slots, self._state_names(options, schedules), strict=True):
            if name and slot is None:
                raise ValueError(f"{where}this would need new state ({name}) in the middle of a run; "
                                 "construct a new optimizer with it")  # fmt: skip
        for name in _FIXED:
            if self._numbers[name] is not options[name]:
                raise ValueError(
                    f"{where}{name} can't be changed in the middle of a run; construct a new optimizer with it"
                )
        if (options["ema_decay"] is None) != (self._ema is None):
            raise ValueError(
                f"{where}ema_decay can't come or go in the middle of a run; 1.0 keeps an average as it is, and a new "
                "optimizer can start one"
            )

    def _check_formats(self, options: dict[str, Any], dtype: str, where: str) -> None:
        master, rounding, state = options["master"], options["rounding"], options["state_dtype"]
        if dtype in ("float16", "bfloat16"):
            if master and rounding:
                raise ValueError(
                    f"{where}master={master!r} and rounding={rounding!r} exclude each other; drop one (in a group that "
                    "inherits it: give None)"
                )
            if not master and not rounding:
                raise ValueError(
                    f"{where}the parameters are {dtype}, where small updates vanish when they are rounded to nearest; "
                    "say either rounding='stochastic', or master='float32' for a float32 copy to work on"
                )
        elif master or rounding:
            name = "master" if master else "rounding"
            raise ValueError(f"{where}{name}={options[name]!r} is for float16 and bfloat16 parameters; these are "
                             f"{dtype}: drop it, or give their group {name}=None")  # fmt: skip
        if state and dtype == "float64":
            raise ValueError(f"{where}state_dtype={state!r} is refused for float64 parameters, which would be no more "
                             "exact than their state; drop it, or give their group state_dtype=None")  # fmt: skip
        if state in ("bfloat16", "uint8") and self._cls._rule in ("rprop", "supersab"):
            raise ValueError(f"{where}state_dtype={state!r} is refused for {self._cls.__name__}: rounding noise would "
                             "drown the small factors by which its rates change; drop it")  # fmt: skip
        if state in ("bfloat16", "uint8") and options.get("centered"):
            raise ValueError(f"{where}state_dtype={state!r} is refused with centered=True: rounding noise would drive "
                             "square_avg - grad_avg^2 to 0; drop one of them")  # fmt: skip

    def __delitem__(self, name: str) -> Never:
        raise TypeError(f"{name!r} can't be removed from a parameter group")

    def __iter__(self) -> Iterator[str]:
        return iter(("params", *self._numbers))

    def __len__(self) -> int:
        return 1 + len(self._numbers)

    def __repr__(self) -> str:
        try:
            options = self._options
        except Exception:  # the schedule's, which a step will raise
            options = {**self._numbers, **self._schedules}
        return f"{{'params': <{len(self._arrays)} arrays>, {repr(options)[1:]}"


class State(Mapping[str, Any]):
    """The live state by name, each in the structure of the parameters: views, made when asked for.

    The scales of 8-bit state, one for each block of 256 elements, are one flat array for a group.
    """

    def __init__(self, optimizer: "Optimizer") -> None:
        self._optimizer = optimizer

    def _find(self, group: ParamGroup, name: str) -> Any:
        if name in group._per_array:  # a count, or NAdam's product
            return group.arrange([row.reshape(()) for row in group._per_array[name][:, None]])
        if name == "master" and group._master is not None:
            return group.views(group._master)
        for slot, scales, slot_name in zip(group._slots, group._scales, self._optimizer._slots, strict=True):
            if slot_name == name and slot is not None:
                return group.views(slot)
            if f"{slot_name}_scale" == name:
                return scales
        return None

    def __getitem__(self, name: str) -> Any:
        if not isinstance(name, str) or name not in list(self):
            raise KeyError(f"{name!r} is no state of this optimizer; it has {', '.join(self) or 'none'}")
        found = [self._find(group, name) for group in self._optimizer.param_groups]
        return found if self._optimizer._structured else found[0]

    def __iter__(self) -> Iterator[str]:
        groups = self._optimizer.param_groups
        for i, name in enumerate(self._optimizer._slots):
            if any(group._slots[i] is not None for group in groups):
                yield name
            if any(group._scales[i] is not None for group in groups):
                yield f"{name}_scale"
        if any(group._master is not None for group in groups):
            yield "master"
        yield from groups[0]._per_array

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return f"<state: {', '.join(self)}>"


def _zeros(n: int, dtype: Any, turn: int = 0) -> Array:
    """A flat array whose first element lies on a cache line, its pages not yet touched.

    turn: the arrays of a group that are swept together start at different places of a page (large parameters and
    gradients, at its beginning).  A load would wait for a store whose address has the same last 12 bits.
    """
    raw = np.zeros(n * np.dtype(dtype).itemsize + 4096, np.uint8)
    start = (704 * turn - raw.ctypes.data) % 4096
    return raw[start : start + n * np.dtype(dtype).itemsize].view(dtype)


class _Setting:
    """An option of the optimizer as a whole: checked when it is assigned."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type) -> Any:
        return self if optimizer is None else optimizer._plan.settings[self._name]

    def __set__(self, optimizer: "Optimizer", value: Any) -> None:
        read = optimizer._plan.settings
        optimizer._plan.configure(check_settings({**read, self._name: value}), read)


class _LossScale(_Setting):
    """A number, or of a dynamic scale the current one."""

    def __get__(self, optimizer: Any, owner: type) -> Any:
        return self if optimizer is None else optimizer._plan.loss_scale

    def __set__(self, optimizer: "Optimizer", value: Any) -> None:
        if isinstance(value, str):
            raise ValueError(f"loss_scale is assigned a number, got {value!r}; 'dynamic' is chosen in the constructor")
        if optimizer._scaler is None:
            super().__set__(optimizer, value)
        else:
            optimizer._scaler.scale = value


class Optimizer:
    """Base of all optimizers: binds parameters, holds their state and steps them in place.

    Parameters
    ----------
    params : array, list or tuple of arrays, dict of arrays, or list of group dicts
        float32, float64, float16 or bfloat16 NumPy arrays of any shape, C-contiguous and writable; memory maps are
        fine.  They are updated where they are.  A group dict has ``params`` and any options that differ from the
        defaults; all arrays of a group have one dtype.  float16 and bfloat16 need `master` or `rounding`.
    any number of a rule, or an element of a pair of them
        A number, or a schedule: an object of ``adaptive_c.schedules``, or any function of the number of applied steps.
        Step k uses ``schedule(k - 1)``; a skipped step does not advance it.  Not what is read once: the lr of Rprop and
        SuperSAB, and initial_accumulator_value.
    n_threads : int, optional
        Threads of a large step, used as given.  None: what ``set_num_threads`` says, else OMP_NUM_THREADS, else the
        smaller of CPU affinity and cgroup quota.
    max_grad_norm : float, optional
        Clip: gradients are multiplied by min(1, max_grad_norm/(norm + 1e-6)), norm being the 2-norm over all gradients
        of all groups, unscaled.  The gradient is read once more for it, and not written.
    max_grad_value : float, optional
        Clamp every element of the gradient, unscaled and clipped, into [-max_grad_value, max_grad_value].
    loss_scale : float or "dynamic"
        Gradients are divided by it as they are read.  ``step(grads, loss_scale=s)`` gives one for a single step.
        "dynamic" is the rule of torch.amp.GradScaler: 65536 at first, half of it behind a step that was skipped, twice
        behind 2000 in a row that were not.  Multiply the loss by ``opt.loss_scale``, which reads the current one;
        assigning a number goes on from there.  It stays within [2**-126, 2**126], where torch goes on to 2**127 and 0.
    on_nonfinite : "ignore", "skip" or "raise"; "ignore" unless loss_scale is "dynamic", which is for "skip" alone
        What to do with a step whose gradients hold a NaN or an infinity or, for a rule that squares them, a number
        whose square overflows the dtype (it would make the second moment infinite for ever; Adagrad's sum of many
        squares may still).  "skip" counts it in
        skipped_steps, "raise" names the first such element; either leaves parameters, state, average, copies and counts
        as they were.  A skipped step still zeroes the gradients if zero_grad asks for it.
    zero_grad : bool
        Zero the gradient behind the sweep, in the place of a call of torch's zero_grad().  Gradients must be writable
        then, and share no memory.
    keep_undo : bool
        Before each step keep what it overwrites, for `rollback`: as much memory again as parameters, state, averages
        and copies take, and one more pass that copies them.
    flush_denormals : bool
        Run the threads of a step with denormal numbers taken as 0 (FTZ and DAZ), and restore the mode.  Changes bits.
    ema_decay : float in [0, 1], optional; per group
        Keep an average e of the parameters in `ema`: e starts as the parameters, e <- ema_decay e + (1 - ema_decay) p
        after each step of an array.
    bounds : (lo, hi), optional; per group
        Box constraint: parameters are taken into it after each step.  Numbers, None, or arrays in the structure of the
        group's parameters; rounded inward to their dtype.
    copy_to : array or structure of arrays, optional; per group
        float32, bfloat16 or float16 arrays in the structure of the group's parameters that receive the updated
        parameters, rounded to nearest even; written at construction too.  For float64 parameters float32 only.
    state_dtype : "float32", "bfloat16" or "uint8", optional; per group
        What moments are stored in; "uint8" is a code of 8 bits with a scale for each block of 256 elements.  Both are
        rounded stochastically.  Not for float64 parameters, Rprop, SuperSAB and centered=True.  A block may reach over
        two arrays; there the larger's second moments may lift the other's, if it is 40,000 times smaller.
    master : "float32", optional; per group
        For float16 and bfloat16 parameters: a float32 copy, ``state["master"]``, that the rule works on; the
        parameters are that copy, rounded to nearest even, after each step.  Whoever writes to the parameters himself
        must write to the copy too: the next step begins there.
    rounding : "stochastic", optional; per group
        For float16 and bfloat16 parameters: no copy; up or down with the chance of the distance.
    uint16_as : "bfloat16", optional
        What uint16 arrays hold, parameters, gradients and copy_to (ml_dtypes.bfloat16 arrays need no such word).
    seed : int in [0, 2**64)
        Of the stochastic rounding, a function of seed, step, group and place, the same for every number of threads.
        Optimizers that are averaged or compared want seeds of their own.

    Attributes
    ----------
    param_groups : list of dict-like
        The options of each group; assign a number or a schedule to change them: ``opt.param_groups[0]["lr"] = 1e-4``.
        Where an option follows a schedule, it reads as the number of the next step; ``param_groups[0].schedules`` has
        the schedules by name.
    state : mapping
        The live state arrays by name, in the structure of params (but for the scales of 8-bit state: flat).
    t : int
        Applied steps: not those in which every gradient was None.  Each array has a count of its own, for its bias
        correction (``state["step"]``); assigning t sets them all, and t > 0 says that state is there to be used.
        Schedules follow t.
    ema : structure of arrays
        The averages, None for groups without; float32 for parameters narrower than that.
    grad_norm : float
        The last step's norm, unscaled and unclipped; NaN before the first and without max_grad_norm.
    skipped_steps : int
        Steps left out by on_nonfinite="skip".
    pending : int
        Calls of `accumulate` since the last step.
    nbytes : int
        Bytes of state: averages, scales, master copies, sums of gradients and what keep_undo keeps included.

    Raises
    ------
    TypeError, ValueError
        For anything that can't be done in place or is out of range, before the first write.
    """

    _rule: ClassVar[str]
    _slots: ClassVar[tuple[str, ...]] = ()
    _fixed: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # options that the class settles
    _plan: Any  # of these groups; a new one with each that is added
    _groups: tuple[ParamGroup, ...]
    _scaler: LossScaler | None

    max_grad_norm = _Setting()
    max_grad_value = _Setting()
    on_nonfinite = _Setting()
    loss_scale = _LossScale()
    zero_grad = _Setting()
    flush_denormals = _Setting()
    seed = _Setting()

    def __init__(
        self,
        params: Any,
        options: dict[str, Any],
        *,
        n_threads: int | None = None,
        max_grad_norm: float | None = None,
        max_grad_value: float | None = None,
        on_nonfinite: str | None = None,
        loss_scale: float | str = 1.0,
        zero_grad: bool = False,
        keep_undo: bool = False,
        flush_denormals: bool = False,
        ema_decay: Number | None = None,
        bounds: Any = None,
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
        options = {**options, **{name: given[name] for name in _SHARED}}
        self._defaults = options
        if uint16_as not in (None, "bfloat16"):
            raise ValueError(f"uint16_as must be 'bfloat16' or None, got {uint16_as!r}")
        for name in unknown:
            raise TypeError(f"{type(self).__name__} has no argument {name!r}"
                            + ("; drop it: there is one implementation, always fused" if name in _TORCH_ONLY else
                               f"; it has params, {', '.join(options)}, n_threads, uint16_as, keep_undo, "
                                 f"{', '.join(SETTINGS)}"))  # fmt: skip
        self._structured = isinstance(params, (list, tuple)) and any(isinstance(item, dict) for item in params)
        if isinstance(params, dict) and "params" in params and not isinstance(params["params"], np.ndarray):
            raise ValueError("params looks like one group dict; groups come in a list: [{'params': ...}]")
        self._groups = ()
        self._uint16_as = uint16_as
        if self._structured:
            new = [self._group(f"params[{i}]", i, spec, options) for i, spec in enumerate(params)]
        else:
            new = [self._group("params", 0, {"params": params}, options)]
        plan = self._new_plan(new, structured=self._structured)
        plan.configure(check_settings(settings))
        plan.n_threads = checked_threads(n_threads)
        self._bind(plan, new, flag("keep_undo", keep_undo))
        self._begin(plan, new)

    def _new_plan(self, new: list[ParamGroup], *, structured: bool) -> Any:
        """A plan over the groups there are and new ones."""
        arrays = [(group._keys, group._arrays) for group in (*self._groups, *new)]
        return core.Plan(self._rule, arrays, structured, self._uint16_as == "bfloat16")

    def _bind(self, plan: Any, new: list[ParamGroup], keep_undo: bool) -> None:
        """Check the options of new groups and give them their state."""
        for group in new:
            group._plan, group._uint16_as = plan, self._uint16_as
            where = f"{group._where}: " if "[" in group._where else ""
            group._take(group._checked(group._numbers, plan.t, where, group._numbers), plan.t)
        for group in new:
            self._allocate(plan, group)
            if keep_undo:
                plan.keep_undo(group._index)

    def _begin(self, plan: Any, new: list[ParamGroup], old: Any = None) -> None:
        """The first write; then all that anybody else could see of the new groups, at once."""
        plan.start(len(self._groups))
        scaler = LossScaler(plan) if plan.dynamic else None
        groups = (*self._groups, *new)
        seen = {"_plan": plan, "_groups": groups, "_scaler": scaler, "_structured": plan.structured}
        plan.publish(self, seen, groups, old)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to those that are stepped, as torch has it.

        Its arrays begin like those of a new optimizer, each with a count of steps of its own, from 0; `t`, and with it
        the schedules, goes on, and state, options and counts of the other groups stay as they are.  Options that the
        dict does not have are those of the constructor, but for copy_to.  From now on gradients are a list with one
        entry for each group, and so is what ``state`` and ``ema`` give, if they were not before.

        Parameters
        ----------
        param_group : dict
            ``params``, and options that differ from the constructor's.

        Raises
        ------
        TypeError, ValueError
            As at construction; also for arrays that share memory with others of this optimizer, and while accumulated
            gradients are pending.  Nothing has changed then.
        RuntimeError
            Inside ``averaged_parameters``, or where another thread is inside a step.
        """
        old = self._plan
        with old.held():
            if old.pending:
                raise ValueError(
                    f"{old.pending} accumulated gradients are pending, which the new group has no part in; step() "
                    "takes their mean, discard() drops them"
                )
            index = len(self._groups)
            defaults = {**self._defaults, "copy_to": None}
            group = self._group(f"params[{index}]", index, param_group, defaults)
            plan = self._new_plan([group], structured=True)  # a plan binds its arrays once
            plan.take_over(old)
            plan.configure(old.settings)
            self._bind(plan, [group], plan.keeps_undo)
            self._begin(plan, [group], old)

    def _group(self, where: str, index: int, spec: Any, defaults: dict[str, Any]) -> ParamGroup:
        if not isinstance(spec, dict) or "params" not in spec:
            got = f"the keys {', '.join(map(repr, spec))}" if isinstance(spec, dict) else f"a {type(spec).__name__}"
            raise ValueError(f"{where} must be a dict with 'params', as every group is; got {got}")
        params = spec["params"]
        if isinstance(params, (list, tuple, dict)) and not params:
            raise ValueError(f"{where} is empty: there is nothing to optimize")
        options = {name: value for name, value in spec.items() if name != "params"}
        if unknown := [name for name in options if name not in defaults]:
            raise TypeError(
                f"{where} has the unknown option {unknown[0]!r}; {type(self).__name__} has {', '.join(defaults)}"
            )
        return ParamGroup(type(self), where, index, params, {**defaults, **options})

    def _allocate(self, plan: Any, group: ParamGroup) -> None:
        n = plan.size(group._index)
        kind = "native" if group["state_dtype"] in (None, "float32") else group["state_dtype"]
        dtype = {"native": group._computed, "bfloat16": "uint16", "uint8": "uint8"}[kind]
        names = group._state_names(group, group._schedules)
        group._slots = tuple(
            _zeros(n, "int8" if name == "prev" else dtype, 1 + i) if name else None for i, name in enumerate(names)
        )
        group._scales = tuple(
            _zeros(-(-n // _BLOCK), "float32") if name and kind == "uint8" else None for name in names
        )
        group._per_array = {"step": np.zeros(len(group._arrays), "int64")}
        if self._rule == "nadam":
            group._per_array["mu_product"] = np.ones(len(group._arrays))
        if group["master"]:
            group._master = _zeros(n, "float32", 4)
        if group["ema_decay"] is not None:
            group._ema = _zeros(n, group._computed, 5)
        slots = zip(group._slots, group._scales, strict=True)
        plan.attach(
            group._index,
            tuple((slot, scales) if scales is not None else slot for slot, scales in slots),
            kind,
            tuple(_CODINGS.get(name or "", "signed") for name in names),
            group._per_array["step"],
            group._per_array.get("mu_product"),
            group._master,
            group._ema,
        )
        if group["copy_to"] is not None:
            group._bind_copies()

    @classmethod
    def _state(cls, options: Mapping[str, Any]) -> tuple[str | None, ...]:
        """The state arrays that these options need, None for a slot that they leave unused."""
        return cls._slots

    def decoded_state(self, name: str) -> Any:
        """Copies of a state by its name, decoded: in the type that the rule computes in, in the structure of params.

        Raises
        ------
        KeyError
            For a name that ``state`` does not have, or that is no such array: a scale, a count.
        """
        names = [n for n in self.state if n in self._slots]
        if name not in names:
            raise KeyError(f"{name!r} is no state that could be decoded; there is {', '.join(names) or 'none'}")
        found = [self._decoded(i, self._slots.index(name)) for i in range(len(self._groups))]
        return found if self._structured else found[0]

    def _decoded(self, index: int, slot: int) -> Any:
        group = self._groups[index]
        stored = group._slots[slot]
        if stored is None:
            return None
        if group["state_dtype"] in ("bfloat16", "uint8"):
            flat = np.empty(stored.size, "float32")
            self._plan.decode(index, slot, flat)
        else:
            flat = stored.astype(group._computed)
        return group.views(flat)

    def step(self, grads: Any = ..., metric: float | None = None, *, loss_scale: float | None = None) -> None:
        """Update the parameters in place.

        Parameters
        ----------
        grads : the structure of params
            For each array its gradient, of the same shape and C-contiguous, or None to leave the array and its state
            alone.  float64 for float64 parameters; for all others float32, float16 or bfloat16 (ml_dtypes, or uint16
            under uint16_as="bfloat16"), widened as they are read.  For a list of group dicts, a list with one such
            entry per group.  Read only, but for zero_grad.  Without grads: the mean of what was accumulated.
        metric : float, optional
            What the plateau schedules read, such as a loss: with every step, or with one in a while.  It sets the
            numbers of the steps after this one; if this one is skipped, it is not taken.
        loss_scale : float, optional
            By what the gradients are divided in this step, in the place of the optimizer's own loss_scale.  Refused
            where that is "dynamic".

        Raises
        ------
        TypeError, ValueError
            For gradients that don't fit, with the name of the first, or given while accumulated ones are pending, or
            missing while there are none; for a number of a schedule that is out of its range, and for a metric that
            nobody reads; nothing has changed then.
        RuntimeError
            Where another thread is inside a step of this optimizer.
        Exception
            Whatever a schedule raises, such as OverflowError; nothing has changed then.
        """
        if loss_scale is None and metric is None:
            self._plan.step(grads)
            return
        scale = 0.0
        if loss_scale is not None:
            if self._scaler is not None:
                raise ValueError(
                    f"loss_scale={loss_scale!r} is refused in step: this optimizer's is 'dynamic'; multiply the loss "
                    "by opt.loss_scale, and drop it here"
                )
            scale = checked_scale("loss_scale", loss_scale)
        self._plan.step(grads, scale, moved=None if metric is None else self._observed(metric))

    def _observed(self, metric: Any) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """For each group, the schedules that a metric changes, as they are before and after it."""
        metric, t = _real("metric", metric), self.t
        moved = []
        for group in self._groups:
            before = dict(group._schedules)
            after = observed(before, t, metric)
            moved.append(({name: before[name] for name in after}, after))
        if not any(after for _, after in moved):
            raise ValueError(
                f"metric={metric!r} is read by nobody: it is for a plateau schedule, and no group has one; drop it"
            )
        return moved

    def accumulate(self, grads: Any) -> None:
        """Add the gradients of a micro-batch to the sums; ``step()`` then uses their mean over all calls.

        ::

            s <- s + g                                        s <- g at an array's first gradient
            k = (-1 if maximize) * clip coefficient / (loss_scale * calls),  g' = k s             at the step

        Sums are float32, float64 for float64 parameters: float16 and bfloat16 gradients neither overflow nor stagnate
        in them.  They are allocated by the first call.  Norm, clipping and on_nonfinite are those of the mean, at the
        step.  One that is skipped drops the sums; one that raises leaves them, and `discard` drops them.

        Parameters
        ----------
        grads : the structure of params
            As for `step`.  None adds nothing: the array's gradient was 0 in this call.  An array that had None in every
            call is left alone by the step.  zero_grad zeroes the gradients behind this call.

        Raises
        ------
        TypeError, ValueError
            For gradients that don't fit, with the name of the first; nothing was added then.
        RuntimeError
            Where another thread is inside a step of this optimizer.

        Differs from: torch, which sums in the gradient's own type, and whose sum is not divided.
        """
        self._plan.accumulate(grads, self._allocate_sums)

    def _allocate_sums(self, index: int) -> None:
        group = self._groups[index]
        group._sums = _zeros(self._plan.size(index), group._computed)
        self._plan.attach_sums(index, group._sums, group._summed)

    def discard(self) -> None:
        """Drop what was accumulated, if anything was."""
        self._plan.discard()

    def rollback(self) -> None:
        """Undo the last call of `step`, once.  Needs ``keep_undo=True`` in the constructor.

        Parameters, state, averages, copies, counts, t, grad_norm, skipped_steps, a dynamic loss scale and what plateau
        schedules made of a metric are to the bit what they were before that step; whatever was written into those
        arrays since is lost.  A step that was skipped is undone too: its count, and what it did to the loss scale.  A
        step that raised was none.  Options keep what was assigned meanwhile; gradients that zero_grad zeroed and sums
        that the step used do not come back.

        Raises
        ------
        ValueError
            Without keep_undo, where there is no step to undo or it is undone already, and where gradients were
            accumulated since (`discard` them).
        RuntimeError
            Inside averaged_parameters, and where another thread is inside a step of this optimizer.
        """
        self._plan.rollback()

    @property
    def pending(self) -> int:
        n: int = self._plan.pending
        return n

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self, *, format: str | None = None) -> dict[str, Any]:  # noqa: A002
        """What a run depends on, but for the parameters, as a dict of arrays, numbers and strings.

        The arrays are views, flat, one for each group and state: the next step changes them.  ``copy.deepcopy`` keeps
        them, `save` writes them.

        Parameters
        ----------
        format : "torch", optional
            Make the dict that ``load_state_dict`` of the PyTorch optimizer of this name takes, over the same arrays:
            of tensors that are copies, narrow state decoded.

        Raises
        ------
        ValueError
            For another format, or where PyTorch has no such rule, or not with these options.
        RuntimeError
            Inside averaged_parameters(), and while another thread steps.
        """
        if format not in (None, "torch"):
            raise ValueError(f"format must be 'torch' or None, got {format!r}")
        if format:
            from ._torch import state_dict
        else:
            from ._state import state_dict
        return state_dict(self)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state, in place: what `state_dict` gave, or the state_dict of PyTorch's optimizer of this name.

        Options, schedules, counts and accumulated gradients are the dict's (PyTorch's has no schedules, so that ours
        go on, and no gradients, so that pending ones are dropped); n_threads, copy_to, uint16_as and the structure
        stay.  The parameters may be cut differently, but for PyTorch's.  Put the parameters into place first: copy_to
        is written anew.  There is nothing to `rollback` then.

        Raises
        ------
        TypeError, ValueError
            For what doesn't fit: class, formats, sizes, names of a dict, a cut that merges arrays with different
            counts; for a number of a schedule that is out of its range; for a function of your own that options
            followed, where this optimizer has none in its place.  Nothing has changed then.
        RuntimeError
            Inside averaged_parameters(), and while another thread steps.
        """
        if isinstance(state_dict, Mapping) and "param_groups" in state_dict:
            from ._torch import load_state_dict
        else:
            from ._state import load_state_dict
        load_state_dict(self, state_dict)

    def save(self, path: Any, *, format: str | None = None, parameters: bool = True) -> None:  # noqa: A002
        """Write parameters, state, options and counts into one file, so that `load` goes on as if nothing had been.

        The file is written under another name in the same folder, synced and renamed: at every moment `path` is the
        old checkpoint or the new one.  Beside what is saved it takes a few MiB of memory.

        Parameters
        ----------
        path : str or path-like
            The file's name, used as it is.
        format : "safetensors" or "npz", optional
            None: "npz" if the path ends so, else "safetensors".
        parameters : bool
            Save them too.

        Raises
        ------
        OSError
            Where the file can't be written: what was there before still is.  Where at the end the folder can't be
            synced: the new one is there, but may not survive a power cut.
        ValueError
            For an unknown format, or a path that is a folder or a device.
        RuntimeError
            Inside averaged_parameters(), and while another thread steps.
        """
        from ._state import save

        save(self, path, format, parameters)

    def load(self, path: Any, *, parameters: bool = True) -> None:
        """Take over a checkpoint that `save` wrote, in place.

        The file is verified whole before anything is read from it.  Options, schedules, counts and accumulated
        gradients are the file's; n_threads, copy_to, uint16_as and the structure stay, and copy_to is written anew.
        The parameters may be cut differently: each group needs the same number of elements.  There is nothing to
        `rollback` then.

        Parameters
        ----------
        path : str or path-like
            A file of either format.
        parameters : bool
            Load them too.

        Raises
        ------
        OSError
            Where the file can't be read.
        TypeError, ValueError
            For a damaged or foreign file and for what doesn't fit, as in `load_state_dict`.  Nothing has changed then.
        RuntimeError
            Inside averaged_parameters(), and while another thread steps.
        """
        from ._state import load

        load(self, path, parameters)

    @property
    def ema(self) -> Any:
        found = [None if group._ema is None else group.views(group._ema) for group in self.param_groups]
        return found if self._structured else found[0]

    def averaged_parameters(self) -> AbstractContextManager[None]:
        """Put the averages into the parameters, and the parameters back at the end, whatever happens between.

        A step inside is refused.
        """
        if all(group._ema is None for group in self.param_groups):
            raise ValueError("there is no average: construct the optimizer with ema_decay")
        block: AbstractContextManager[None] = self._plan.averaged()
        return block

    @property
    def grad_norm(self) -> float:
        norm: float = self._plan.grad_norm
        return norm

    @property
    def skipped_steps(self) -> int:
        n: int = self._plan.skipped_steps
        return n

    @property
    def param_groups(self) -> tuple[ParamGroup, ...]:
        return self._groups

    def __setattr__(self, name: str, value: Any) -> None:  # (a __getattr__ would slow down every step)
        if not name.startswith("_") and not hasattr(type(self), name):
            option = name in self._defaults
            hint = f"; options are in the groups: opt.param_groups[0][{name!r}] = {value!r}" if option else ""
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r} to assign{hint}")
        super().__setattr__(name, value)

    @property
    def state(self) -> State:
        return State(self)

    @property
    def t(self) -> int:
        t: int = self._plan.t
        return t

    @t.setter
    def t(self, t: int) -> None:
        if isinstance(t, bool) or not hasattr(t, "__index__"):
            raise TypeError(f"t must be an integer, got {t!r}")
        if not 0 <= t.__index__() < 1 << 62:
            raise ValueError(f"t must be in [0, 2**62), got {t}")
        for group in self._groups:
            group._follow(t.__index__())
        self._plan.set_t(t.__index__())

    @property
    def n_threads(self) -> int | None:
        return self._plan.n_threads or None

    @n_threads.setter
    def n_threads(self, n: int | None) -> None:
        self._plan.n_threads = checked_threads(n)

    @property
    def nbytes(self) -> int:
        held = [(*group._slots, *group._scales, group._master, group._ema, group._sums) for group in self.param_groups]
        undo: int = self._plan.undo_nbytes
        return undo + sum(x.nbytes for arrays in held for x in arrays if x is not None)

    def __repr__(self) -> str:
        first = self.param_groups[0]
        shown = {*self._own, *(name for name in ("state_dtype", "master", "rounding") if first[name])}
        options = {**first._numbers, **first._schedules}
        listed = ", ".join(f"{name}={value!r}" for name, value in options.items() if name in shown)
        groups = range(len(self.param_groups))
        size = sum(self._plan.size(i) for i in groups)
        dtypes = " and ".join(dict.fromkeys(self._plan.dtype(i) for i in groups))
        more = f", {len(groups)} groups" if len(groups) > 1 else ""
        return f"{type(self).__name__}({listed}, t={self.t}, {size} {dtypes} elements{more})"

    def __reduce_ex__(self, protocol: Any) -> Never:
        raise TypeError(
            f"{type(self).__name__} can't be pickled or copied: the copy would update arrays that nobody else holds; "
            "opt.save(path) keeps parameters and state: build a new optimizer over arrays of your own and load(path) "
            "there (in memory: copy the parameters, and new.load_state_dict(opt.state_dict()))"
        )

"""What every optimizer is made of: parameters in a structure, options in groups, state, and one call of the plan."""

from collections.abc import Iterator, Mapping, MutableMapping
from types import MappingProxyType
from typing import Any, ClassVar, Never

import numpy as np

from ._config import checked_threads, core
from ._options import check_options

Array = np.ndarray[Any, Any]
_TORCH_ONLY = {"foreach", "fused", "capturable", "differentiable"}


class ParamGroup(MutableMapping[str, Any]):
    """Arrays that share options.  Assigning an option checks it at once; ``params`` is read-only."""

    def __init__(self, optimizer: "Optimizer", index: int, params: Any, options: dict[str, Any]) -> None:
        self._optimizer = optimizer
        self._index = index
        self._keys: Any  # a dict's keys, None for a list, () for one bare array (or what the plan will refuse as such)
        if isinstance(params, dict):
            self._keys, self._arrays = dict.fromkeys(params), tuple(params.values())
        elif isinstance(params, (list, tuple)):
            self._keys, self._arrays = None, tuple(params)
        else:
            self._keys, self._arrays = (), (params,)
        self._options = options
        self._slots: tuple[Array | None, ...] = ()
        self._per_array: dict[str, Array] = {}

    def arrange(self, items: list[Any]) -> Any:
        """One item for each array, in the structure of the parameters."""
        if self._keys == ():
            return items[0]
        return items if self._keys is None else dict(zip(self._keys, items, strict=True))

    def views(self, flat: Array) -> Any:
        """Views of a flat state array in the structure and shapes of the parameters."""
        ends = np.cumsum([0, *(a.size for a in self._arrays)])
        return self.arrange([flat[i : i + a.size].reshape(a.shape) for i, a in zip(ends, self._arrays, strict=False)])

    def __getitem__(self, name: str) -> Any:
        if name != "params":
            return self._options[name]
        if self._keys == ():
            return self._arrays[0]
        return (
            self._arrays if self._keys is None else MappingProxyType(dict(zip(self._keys, self._arrays, strict=True)))
        )

    def __setitem__(self, name: str, value: Any) -> None:
        if name == "params":
            raise TypeError("params is read-only: an optimizer is bound to its arrays; construct a new one")
        if name not in self._options:
            raise KeyError(
                f"{name!r} is not an option of {type(self._optimizer).__name__}; it has {', '.join(self._options)}"
            )
        self._assign({**self._options, name: value}, f"param_groups[{self._index}]: ")

    def _assign(self, options: dict[str, Any], where: str) -> None:
        optimizer = self._optimizer
        options = check_options(options, np.dtype(optimizer._plan.dtype(self._index)), where)
        for slot, name in zip(self._slots, optimizer._state(options), strict=False):
            if name and slot is None:
                raise ValueError(f"{where}this would need new state ({name}) in the middle of a run; "
                                 "construct a new optimizer with it")  # fmt: skip
        optimizer._plan.assign(self._index, {**optimizer._fixed, **options})
        self._options = options

    def __delitem__(self, name: str) -> Never:
        raise TypeError(f"{name!r} can't be removed from a parameter group")

    def __iter__(self) -> Iterator[str]:
        return iter(("params", *self._options))

    def __len__(self) -> int:
        return 1 + len(self._options)

    def __repr__(self) -> str:
        return f"{{'params': <{len(self._arrays)} arrays>, {repr(self._options)[1:]}"


class State(Mapping[str, Any]):
    """The live state by name, each in the structure of the parameters: views, made when asked for."""

    def __init__(self, optimizer: "Optimizer") -> None:
        self._optimizer = optimizer

    def _find(self, group: ParamGroup, name: str) -> Any:
        if name in group._per_array:  # a count, or NAdam's product: assign opt.t to change them
            return group.arrange([row.reshape(()) for row in _read_only(group._per_array[name])[:, None]])
        for slot, slot_name in zip(group._slots, self._optimizer._slots, strict=True):
            if slot_name == name and slot is not None:
                return group.views(slot)
        return None

    def __getitem__(self, name: str) -> Any:
        if name not in list(self):
            raise KeyError(f"{name!r}; this optimizer has {', '.join(self) or 'no state'}")
        found = [self._find(group, name) for group in self._optimizer.param_groups]
        return found if self._optimizer._structured else found[0]

    def __iter__(self) -> Iterator[str]:
        groups = self._optimizer.param_groups
        slots = (any(group._slots[i] is not None for group in groups) for i in range(len(self._optimizer._slots)))
        yield from (name for name, used in zip(self._optimizer._slots, slots, strict=True) if used)
        yield from groups[0]._per_array

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __repr__(self) -> str:
        return f"<state: {', '.join(self)}>"


def _read_only(array: Array) -> Array:
    view = array.view()
    view.flags.writeable = False
    return view


def _zeros(n: int, dtype: Any) -> Array:
    """A flat array whose first element lies on a cache line, its pages not yet touched."""
    raw = np.zeros(n * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + n * np.dtype(dtype).itemsize].view(dtype)


class Optimizer:
    """Base of all optimizers: binds parameters, holds their state and steps them in place.

    Parameters
    ----------
    params : array, list or tuple of arrays, dict of arrays, or list of group dicts
        float32 or float64 NumPy arrays of any shape, C-contiguous and writable; memory maps are fine.  They are
        updated where they are.  A group dict has ``params`` and any options that differ from the defaults; all arrays
        of a group have one dtype.
    n_threads : int, optional
        Threads of a large step, used as given.  None: what ``set_num_threads`` says, else OMP_NUM_THREADS, else the
        smaller of CPU affinity and cgroup quota.

    Attributes
    ----------
    param_groups : list of dict-like
        The options of each group; assign to change them: ``opt.param_groups[0]["lr"] = 1e-4``.
    state : mapping
        The live state arrays by name, in the structure of params.
    t : int
        Applied steps: not those in which every gradient was None.  Each array has a count of its own, for its bias
        correction (``state["step"]``); assigning t sets them all, and t > 0 says that state is there to be used.
    nbytes : int
        Bytes of state.

    Raises
    ------
    TypeError, ValueError
        For anything that can't be done in place or is out of range, before the first write.
    """

    _rule: ClassVar[str]
    _slots: ClassVar[tuple[str, ...]] = ()
    _fixed: ClassVar[Mapping[str, Any]] = MappingProxyType({})  # options that the class settles

    def __init__(self, params: Any, options: dict[str, Any], *, n_threads: int | None = None, **unknown: Any) -> None:
        for name in unknown:
            raise TypeError(f"{type(self).__name__} has no argument {name!r}"
                            + ("; drop it: there is one implementation, always fused" if name in _TORCH_ONLY else
                               f"; it has params, {', '.join(options)}, n_threads"))  # fmt: skip
        self._structured = isinstance(params, (list, tuple)) and any(isinstance(item, dict) for item in params)
        self.param_groups = [
            self._group(i, spec, options) for i, spec in enumerate(params if self._structured else [{"params": params}])
        ]
        self._plan = core.Plan(self._rule, [(g._keys, g._arrays) for g in self.param_groups], self._structured)
        self.n_threads = n_threads
        for i, group in enumerate(self.param_groups):
            group._assign(group._options, f"params[{i}]: " if self._structured else "")
            self._allocate(i, group)

    def _group(self, index: int, spec: Any, defaults: dict[str, Any]) -> ParamGroup:
        where = f"params[{index}]" if self._structured else "params"
        if not isinstance(spec, dict) or "params" not in spec:
            raise ValueError(
                f"{where} must be a dict with 'params', as the other groups are, got {type(spec).__name__}"
            )
        params = spec["params"]
        if isinstance(params, (list, tuple, dict)) and not params:
            raise ValueError(f"{where} is empty: there is nothing to optimize")
        options = {name: value for name, value in spec.items() if name != "params"}
        if unknown := [name for name in options if name not in defaults]:
            raise TypeError(
                f"{where} has the unknown option {unknown[0]!r}; {type(self).__name__} has {', '.join(defaults)}"
            )
        return ParamGroup(self, index, params, {**defaults, **options})

    def _allocate(self, index: int, group: ParamGroup) -> None:
        n, dtype = self._plan.size(index), self._plan.dtype(index)
        group._slots = tuple(
            _zeros(n, "int8" if name == "prev" else dtype) if name else None for name in self._state(group)
        )
        group._per_array = {"step": np.zeros(len(group._arrays), "int64")}
        if self._rule == "nadam":
            group._per_array["mu_product"] = np.ones(len(group._arrays))
        if initial := group.get("initial_accumulator_value"):
            group._slots[0][:] = initial  # type: ignore[index]
        self._plan.attach(index, group._slots, group._per_array["step"], group._per_array.get("mu_product"))

    def _state(self, options: Mapping[str, Any]) -> tuple[str | None, ...]:
        """The state arrays that these options need, None for a slot that they leave unused."""
        return self._slots

    def step(self, grads: Any) -> None:
        """Update the parameters in place.

        Parameters
        ----------
        grads : the structure of params
            For each array its gradient, of the same shape and dtype and C-contiguous, or None to leave the array and
            its state alone.  For a list of group dicts, a list with one such entry per group.  Read only.

        Raises
        ------
        TypeError, ValueError
            For gradients that don't fit, with the name of the first; nothing has changed then.
        RuntimeError
            Where another thread is inside a step of this optimizer.
        """
        self._plan.step(grads)

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
        self._plan.set_t(t.__index__())

    @property
    def n_threads(self) -> int | None:
        return self._plan.n_threads or None

    @n_threads.setter
    def n_threads(self, n: int | None) -> None:
        self._plan.n_threads = checked_threads(n)

    @property
    def nbytes(self) -> int:
        return sum(slot.nbytes for group in self.param_groups for slot in group._slots if slot is not None)

    def __repr__(self) -> str:
        first = self.param_groups[0]
        options = ", ".join(f"{name}={value!r}" for name, value in first._options.items())
        size = sum(self._plan.size(i) for i in range(len(self.param_groups)))
        more = f", {len(self.param_groups)} groups" if len(self.param_groups) > 1 else ""
        return f"{type(self).__name__}({options}, t={self.t}, {size} {self._plan.dtype(0)} elements{more})"

    def __reduce_ex__(self, protocol: Any) -> Never:
        raise TypeError(
            f"{type(self).__name__} can't be pickled or copied: the copy would update arrays that nobody else holds; "
            "pickle the parameters, dict(opt.state) and opt.t, build a new optimizer over the loaded parameters, "
            "write the state back into its arrays and assign t"
        )

"""The state_dict of PyTorch's optimizers: made from ours, and taken over into ours.

PyTorch's dict has the options of each group and, by number, the state of each tensor.  It says neither which class it
is of nor, for SGD, how many steps were taken.  torch itself is imported only to make one.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from ._optimizer import _SHARED, Array, Optimizer, ParamGroup

_CLASSES = ("SGD", "Adagrad", "RMSprop", "Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Rprop")
# How PyTorch computes, what its schedulers leave behind, names that nothing reads, and the numbers of the tensors.
_DROPPED = {"foreach", "fused", "capturable", "differentiable", "initial_lr", "param_names", "params"}
_ONLY = {"eps_mode": "outside", "variant": "irprop-"}  # the one value that PyTorch has of options that it lacks


def _check_class(opt: Optimizer) -> None:
    name = type(opt).__name__
    if name not in _CLASSES:
        raise ValueError(f"PyTorch has no {name}; it has {', '.join(_CLASSES)}")
    for group in opt._groups:
        for option, only in {**_ONLY, **({"eps_mode": "hat"} if name == "RAdam" else {})}.items():
            if group._numbers.get(option, only) != only:
                raise ValueError(f"param_groups[{group._index}]: PyTorch's {name} has no {option}={group[option]!r}, "
                                 f"only {only!r}")  # fmt: skip


def _slots(opt: Optimizer, group: ParamGroup) -> list[str]:
    """The names of the state arrays that a group has."""
    return [name for name, slot in zip(opt._slots, group._slots, strict=True) if slot is not None]


# --- out -------------------------------------------------------------------------------------------------------------


def state_dict(opt: Optimizer) -> dict[str, Any]:
    _check_class(opt)
    with opt._plan.held():
        import torch

        return _state_dict(opt, torch)


def _state_dict(opt: Optimizer, torch: Any) -> dict[str, Any]:
    # what this version of PyTorch wants to find in a group
    defaults = getattr(torch.optim, type(opt).__name__)([torch.zeros(1, requires_grad=True)]).param_groups[0]
    states: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for group in opt._groups:
        first = sum(len(other["params"]) for other in groups)
        numbers = list(range(first, first + len(group._arrays)))
        ours = {**group._cls._fixed, **group._options}
        groups.append({**{name: ours.get(name, value) for name, value in defaults.items()}, "params": numbers})
        started, steps = opt._plan.started(group._index), group._per_array["step"]
        for j, number in enumerate(numbers):
            if (started[j] and steps[j]) or opt._rule == "adagrad":  # PyTorch makes the others' at the first step
                counts = {name: torch.tensor(float(x[j])) for name, x in group._per_array.items()}
                states[number] = {} if opt._rule == "sgd" else counts
        for name in _slots(opt, group):
            decoded = opt._decoded(group._index, opt._slots.index(name))  # a copy
            for number, (_, array, _) in zip(numbers, group._match(decoded, name), strict=True):
                if number in states:
                    states[number][name] = torch.from_numpy(array)
    return {"state": states, "param_groups": groups}


# --- in --------------------------------------------------------------------------------------------------------------


def load_state_dict(opt: Optimizer, d: Mapping[str, Any]) -> None:
    _check_class(opt)
    with opt._plan.held():
        _restore(opt, d)


def _restore(opt: Optimizer, d: Mapping[str, Any]) -> None:
    """Check everything, then write it."""
    groups, states = d["param_groups"], d.get("state")
    if not isinstance(groups, (list, tuple)) or not isinstance(states, Mapping):
        raise TypeError("state_dict must have a list 'param_groups' and a dict 'state', as PyTorch's optimizers do")
    if len(groups) != len(opt._groups):
        raise ValueError(f"state_dict has {len(groups)} parameter groups, this optimizer {len(opt._groups)}")
    work = [
        _check_group(opt, group, about, states, f"state_dict['param_groups'][{group._index}]")
        for group, about in zip(opt._groups, groups, strict=True)
    ]
    most = max(t for _, _, t in work)
    t = max(opt.t, most) if opt._rule == "sgd" else most
    checked = [
        group._checked(
            {**options, **group._schedules}, t, f"state_dict['param_groups'][{group._index}]: ", group._numbers
        )
        for group, (options, _, _) in zip(opt._groups, work, strict=True)
    ]
    opt._plan.write_on()  # from here on nothing is refused
    opt.discard()
    opt._plan.start()  # master copies and averages, which the dict does not have, begin as the parameters
    for group, found, (_, write, _) in zip(opt._groups, checked, work, strict=True):
        group._take(found, t)
        write()
    opt._plan.set_counts(t, opt.skipped_steps, opt.grad_norm, 0)


def _check_group(
    opt: Optimizer, group: ParamGroup, about: Any, states: Mapping[Any, Any], where: str
) -> tuple[dict[str, Any], Callable[[], None], int]:
    """Compare a group of PyTorch's with ours; its options, what to call for arrays, and the steps that were taken."""
    numbers = about.get("params") if isinstance(about, Mapping) else None
    if not isinstance(numbers, (list, tuple)):
        raise TypeError(f"{where} must be a dict with the list 'params', as PyTorch's optimizers have it")
    if len(numbers) != len(group._arrays):
        raise ValueError(f"{where} has {len(numbers)} tensors, this optimizer's group {len(group._arrays)} arrays; "
                         "PyTorch's state needs the same cut")  # fmt: skip
    options = _read_options(group, about, where)
    names = _slots(opt, group)
    counts, products = group._per_array["step"].copy(), np.ones(len(numbers))
    started = np.zeros(len(numbers), "uint8")
    flats = {name: np.zeros(opt._plan.size(group._index), group._computed) for name in names}
    if opt._rule == "adagrad":
        flats["sum"][:] = options["initial_accumulator_value"]
    at = 0
    for j, (number, param) in enumerate(zip(numbers, group._arrays, strict=True)):
        label = f"state_dict['state'][{number!r}]"
        state = _check_state(opt, states.get(number), {*names, *group._per_array}, label)
        if opt._rule != "sgd":
            counts[j] = _step(state["step"], f"{label}['step']") if state else 0
        elif state:  # it was stepped, PyTorch doesn't say how often
            counts[j] = max(counts[j], 1)
        started[j] = bool(state) and counts[j] > 0
        products[j] = _number(state.get("mu_product", 1.0), f"{label}['mu_product']")
        for name in names if state else ():
            array = _array(state[name], f"{label}[{name!r}]")
            if array.shape != param.shape:
                raise ValueError(f"{label}[{name!r}] has shape {array.shape}, its parameter {param.shape}")
            with np.errstate(over="ignore"):
                flats[name][at : at + param.size] = array.reshape(-1)
        at += param.size

    def write() -> None:
        for name, flat in flats.items():
            slot = opt._slots.index(name)
            if group["state_dtype"] in ("bfloat16", "uint8"):
                opt._plan.encode(group._index, slot, flat)
            else:  # of Rprop's last gradient only the sign counts
                group._slots[slot][:] = np.nan_to_num(np.sign(flat)) if name == "prev" else flat  # type: ignore[index]
        group._per_array["step"][:] = counts
        if "mu_product" in group._per_array:
            group._per_array["mu_product"][:] = products
        opt._plan.set_started(group._index, started.tobytes())

    return options, write, int(counts.max(initial=0))


def _check_state(opt: Optimizer, state: Any, wanted: set[str], where: str) -> dict[str, Any]:
    """The state of one tensor with all that is wanted, or nothing where PyTorch has not stepped it yet."""
    if not isinstance(state, (Mapping, type(None))):
        raise TypeError(f"{where} must be a dict, got {type(state).__name__}")
    found = {name: value for name, value in (state or {}).items() if value is not None}  # SGD's buffer may be None
    wanted = wanted - {"step"} if opt._rule == "sgd" else wanted
    if found and found.keys() != wanted:
        needed = ", ".join(sorted(wanted)) or "none"
        raise ValueError(f"{where} has {', '.join(map(str, found))}, this optimizer needs {needed}: construct it with "
                         "the class and the options of PyTorch's, such as momentum, amsgrad, centered")  # fmt: skip
    return found


def _read_options(group: ParamGroup, about: Mapping[Any, Any], where: str) -> dict[str, Any]:
    options = dict(group._numbers)
    for name, value in about.items():
        if name in _DROPPED or name in group._schedules:  # a schedule of ours goes on
            continue
        if name in group._cls._fixed:
            if value != group._cls._fixed[name]:
                raise ValueError(f"{where} has {name}={value!r}, which {group._cls.__name__} has not: is it of another "
                                 "class?")  # fmt: skip
        elif name in _SHARED or name not in options:
            raise ValueError(f"{where} has {name!r}, which is no option of {group._cls.__name__}: is it of another "
                             "class?  If not, take it out of the dict")  # fmt: skip
        elif isinstance(value, (tuple, list)):
            options[name] = tuple(_number(x, f"{where}[{name!r}]") for x in value)
        else:
            options[name] = value if isinstance(value, bool) else _number(value, f"{where}[{name!r}]")
    return options


def _array(x: Any, where: str) -> Array:
    """A tensor or an array as an array of floats."""
    if type(x).__module__.partition(".")[0] == "torch":
        x = x.detach().cpu()
        x = (x.float() if str(x.dtype) == "torch.bfloat16" else x).numpy()  # NumPy has no bfloat16
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{where} must be a tensor or an array, got {type(x).__name__}")
    x = x.astype("float32") if x.dtype.name == "bfloat16" else x
    if x.dtype.kind not in "fiu":
        raise TypeError(f"{where} must hold real numbers, got dtype {x.dtype}")
    found: Array = x
    return found


def _number(x: Any, where: str) -> float:
    """A number, or a tensor or array of one."""
    if isinstance(x, (int, float)):
        return x
    array = _array(np.asarray(x) if isinstance(x, np.generic) else x, where)
    if array.size != 1:
        raise ValueError(f"{where} must be one number, got shape {array.shape}")
    return float(array.reshape(-1)[0])


def _step(x: Any, where: str) -> int:
    t = _number(x, where)
    if not 0 <= t < 1 << 62 or t != int(t):
        raise ValueError(f"{where} must be a count of steps, got {t}")
    return int(t)

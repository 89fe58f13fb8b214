"""The state_dict of PyTorch's optimizers: made from ours, and taken over into ours.

PyTorch's dict has the options of each group and, by number, the state of each tensor.  It says neither which class it
is of nor, for SGD, how many steps were taken.  torch itself is imported only to make one.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from .._native import counted
from .._run.group import ParamGroup
from .._run.layout import Array
from .._run.options import SHARED
from .._run.rule import Rule
from .._run.run import Run
from .description import check_count, checked_counts

_CLASSES = ("SGD", "Adagrad", "RMSprop", "Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Rprop")
# How PyTorch computes, keys that its schedulers add, names that nothing reads, and the numbers of the tensors.
_DROPPED = {"foreach", "fused", "capturable", "differentiable", "initial_lr", "param_names", "params"}
_ONLY = {
    "eps_mode": "outside",
    "variant": "irprop-",
    "second_moment": "element",
}  # the one value that PyTorch has of options that it lacks


def check_class(rule: Rule, groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse a rule or options that PyTorch does not have."""
    name = rule.label
    if name not in _CLASSES:
        raise ValueError(f"PyTorch has no {name}; it has {', '.join(_CLASSES)}")
    for i, options in enumerate(groups):
        for option, only in {**_ONLY, **({"eps_mode": "hat"} if name == "RAdam" else {})}.items():
            if options.get(option, only) != only:
                raise ValueError(
                    f"param_groups[{i}]: PyTorch's {name} has no {option}={options[option]!r}, only {only!r}"
                )


# --- out -------------------------------------------------------------------------------------------------------------


def state_dict(run: Run) -> dict[str, Any]:
    """A run as the `state_dict` of PyTorch's optimizer of the same rule."""
    check_class(run.rule, [group.options for group in run.groups])
    with run.guard:
        import torch

        run.plan.settle()
        return _state_dict(run, torch)


def _state_dict(run: Run, torch: Any) -> dict[str, Any]:
    """The same, with the guard held."""
    # what this version of PyTorch wants to find in a group
    defaults = getattr(torch.optim, run.rule.label)([torch.zeros(1, requires_grad=True)]).param_groups[0]
    states: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    for group in run.groups:
        first = sum(len(other["params"]) for other in groups)
        numbers = list(range(first, first + len(group.layout.arrays)))
        ours = {**run.rule.fixed, **group}
        groups.append({**{name: ours.get(name, value) for name, value in defaults.items()}, "params": numbers})
        checked = checked_counts(group, 0)
        counts = {name: checked[name] for name in ("step", *run.rule.per_array)}
        started, steps = checked["started"], counts["step"]
        for j, number in enumerate(numbers):
            if (started[j] and steps[j]) or run.rule.name == "adagrad":  # PyTorch makes the others' at the first step
                own = {name: torch.tensor(float(x[j])) for name, x in counts.items()}
                states[number] = {} if run.rule.name == "sgd" else own
        for name in group.store.state:
            decoded = group.layout.views(group.store.decoded(name, group.bound))
            for number, (_, array, _) in zip(numbers, group.layout.match(decoded, name), strict=True):
                if number in states:
                    states[number][name] = torch.from_numpy(array)
    return {"state": states, "param_groups": groups}


# --- in --------------------------------------------------------------------------------------------------------------


def load_state_dict(run: Run, d: Mapping[str, Any]) -> None:
    """Restore a run from the `state_dict` of PyTorch's optimizer of the same rule."""
    if run.plan.pages is not None:
        raise ValueError("PyTorch's state_dict can't be loaded with state_path: load it into an optimizer without, "
                         "save(path) there, and load(path) here")  # fmt: skip
    check_class(run.rule, [group.options for group in run.groups])
    with run.guard:
        restore(run, d)


def restore(run: Run, d: Mapping[str, Any]) -> None:
    """Check everything, then write it.  The caller holds the guard."""
    groups, states = d["param_groups"], d.get("state")
    if not isinstance(groups, (list, tuple)) or not isinstance(states, Mapping):
        raise TypeError("state_dict must have a list 'param_groups' and a dict 'state', as PyTorch's optimizers do")
    groups = tuple(groups)  # what is counted is what is used
    if len(groups) != len(run.groups):
        raise ValueError(f"state_dict has {counted(len(groups), 'parameter group')}, this optimizer {len(run.groups)}")
    work = [
        _check_group(run, group, about, states, f"state_dict['param_groups'][{group.index}]")
        for group, about in zip(run.groups, groups, strict=True)
    ]
    most = max(t for _, _, t in work)
    plan = run.plan
    t = max(plan.t, most) if run.rule.name == "sgd" else most
    checked = [
        group.checked({**options, **group.schedules}, t, f"state_dict['param_groups'][{group.index}]: ")
        for group, (options, _, _) in zip(run.groups, work, strict=True)
    ]
    plan.forget()  # from here on nothing is refused
    plan.start()  # master copies and averages, which the dict does not have, begin as the parameters
    for group, changes, (_, write, _) in zip(run.groups, checked, work, strict=True):
        group.bound.commit(*changes)
        write()
    plan.set_counts(t, plan.skipped_steps, plan.grad_norm, 0, plan.loss_scale, plan.growth_tracker)


def _check_group(
    run: Run, group: ParamGroup, about: Any, states: Mapping[Any, Any], where: str
) -> tuple[dict[str, Any], Callable[[], None], int]:
    """Compare a group of PyTorch's with ours; its options, what to call for arrays, and the steps that were taken."""
    numbers = about.get("params") if isinstance(about, Mapping) else None
    if not isinstance(numbers, (list, tuple)):
        raise TypeError(f"{where} must be a dict with the list 'params', as PyTorch's optimizers have it")
    numbers = tuple(numbers)
    if len(numbers) != len(group.layout.arrays):
        ours = counted(len(group.layout.arrays), "array")
        raise ValueError(f"{where} has {counted(len(numbers), 'tensor')}, this optimizer's group {ours}; PyTorch's "
                         "state needs the same cut")  # fmt: skip
    options = _read_options(group, about, where)
    store, is_sgd = group.store, run.rule.name == "sgd"
    names, per_array = store.state, run.rule.per_array
    counts = {"step": store.counts["step"].copy(), **{name: np.full(len(numbers), x) for name, x in per_array.items()}}
    steps, started = counts["step"], np.zeros(len(numbers), "uint8")
    flats = {name: np.full(store.arrays[name].size, store.starts[name], group.computed) for name in names}
    parts = {name: group.layout.parts(flat, name in store.by_row) for name, flat in flats.items()}
    for j, number in enumerate(numbers):
        label = f"state_dict['state'][{number!r}]"
        state = _check_state(
            states.get(number), {*names, *per_array} if is_sgd else {"step", *names, *per_array}, label
        )
        if not is_sgd:
            steps[j] = _step(state["step"], f"{label}['step']") if state else 0
        elif state:  # it was stepped, PyTorch doesn't say how often
            steps[j] = max(steps[j], 1)
        started[j] = bool(state)
        for name in per_array if state else ():
            counts[name][j] = one_number(state[name], f"{label}[{name!r}]")
        for name in names if state else ():
            array, own = _array(state[name], f"{label}[{name!r}]"), parts[name][j]
            if array.shape != own.shape:
                raise ValueError(f"{label}[{name!r}] has shape {array.shape}, its parameter {own.shape}")
            with np.errstate(all="ignore"):
                own[...] = array

    for name in per_array:
        check_count(name, counts[name], where)

    def write() -> None:
        for slot, name in enumerate(store.slots):
            if name not in flats:
                continue
            if store.kind != "native" and name not in store.by_row:
                group.bound.encode(slot, flats[name])
            elif store.slots[name].coding == "sign":  # of Rprop's last gradient only the sign counts
                store.arrays[name][:] = np.nan_to_num(np.sign(flats[name]))
            else:
                store.arrays[name][:] = flats[name]
        for name, array in {**counts, "started": started}.items():
            store.counts[name][:] = array

    return options, write, int(steps.max(initial=0))


def _check_state(state: Any, wanted: set[str], where: str) -> dict[str, Any]:
    """The state of one tensor with all that is wanted, or nothing where PyTorch has not stepped it yet."""
    if not isinstance(state, (Mapping, type(None))):
        raise TypeError(f"{where} must be a dict, got {type(state).__name__}")
    found = {name: value for name, value in (state or {}).items() if value is not None}  # SGD's buffer may be None
    if found and found.keys() != wanted:
        needed = ", ".join(sorted(wanted)) or "none"
        raise ValueError(f"{where} has {', '.join(map(str, found))}, this optimizer needs {needed}: construct it with "
                         "the class and the options of PyTorch's, such as momentum, amsgrad, centered")  # fmt: skip
    return found


def _read_options(group: ParamGroup, about: Mapping[Any, Any], where: str) -> dict[str, Any]:
    """The options of a group in PyTorch's dict, checked."""
    options: dict[str, Any] = {}
    rule = group.rule
    for name, value in about.items():
        if name in _DROPPED or name in group.schedules:  # a schedule of ours goes on
            continue
        if name in rule.fixed:
            if value != rule.fixed[name]:
                raise ValueError(
                    f"{where} has {name}={value!r}, which {rule.label} does not have: is it of another class?"
                )
        elif name in SHARED or name not in group.options:
            raise ValueError(f"{where} has {name!r}, which is no option of {rule.label}: is it of another class?  "
                             "If not, take it out of the dict")  # fmt: skip
        elif isinstance(value, (tuple, list)):
            options[name] = tuple(one_number(x, f"{where}[{name!r}]") for x in value)
        else:
            options[name] = value if isinstance(value, bool) else one_number(value, f"{where}[{name!r}]")
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


def one_number(x: Any, where: str) -> float:
    """A number, or a tensor or array of one."""
    if isinstance(x, (int, float)):
        return x
    if not isinstance(x, (np.generic, np.ndarray)) and type(x).__module__.partition(".")[0] != "torch":
        raise TypeError(f"{where} must be a number, or a tensor or array of one, got {x!r}")
    array = _array(np.asarray(x) if isinstance(x, np.generic) else x, where)
    if array.size != 1:
        raise ValueError(f"{where} must be one number, got shape {array.shape}")
    return float(array.reshape(-1)[0])


def _step(x: Any, where: str) -> int:
    """A count of steps, which PyTorch keeps as a tensor or a float."""
    t = one_number(x, where)
    if not 0 <= t < 1 << 62 or t != int(t):
        raise ValueError(f"{where} must be a count of steps, got {t}")
    return int(t)

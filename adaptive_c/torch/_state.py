"""The state of one tensor as torch's dict has it: views of a run's flat arrays, and what is taken over from such dicts.

The names are torch's.  8-bit state has names of its own, because torch would take its codes for numbers: the codes,
the scales of the blocks that they lie in, and the place in its block at which the tensor begins.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .. import reference
from .._checkpoint.torch import one_number
from .._run.rule import Rule
from .._run.store import BLOCK, Store
from ._tensors import Tensor, array, laid_out, view

BESIDE = ("master", "ema")  # what torch does not have
_CODED = ("code", "scale", "offset")


def stored_as(name: str) -> str:
    """The array of a run that a name in torch's dict belongs to."""
    return name.removesuffix("_code").removesuffix("_scale").removesuffix("_offset") if isinstance(name, str) else ""


def names_beside(rule: Rule) -> tuple[str, ...]:
    """The names of what torch keeps as one number for each tensor.  Its SGD does not count steps."""
    return () if rule.name == "sgd" else ("step", *rule.per_array)


def check_counts(rule: Rule, states: Mapping[Any, Any]) -> None:
    """Refuse the states of a rule that does not count, for one that does, and counts that are none.

    Otherwise torch's class would miss the count, or fail to convert it without saying where it is.
    """
    for key, state in states.items() if names_beside(rule) else ():
        for name in names_beside(rule):
            if name in state:
                one_number(state[name], f"state_dict['state'][{key!r}][{name!r}]")
        if "step" not in state and any(isinstance(x, torch.Tensor) for x in state.values()):
            raise ValueError(f"state_dict['state'][{key!r}] has {', '.join(map(str, state))} and no 'step', which all "
                             f"of {rule.label} have: is it of another class?")  # fmt: skip


def _row_shape(p: Tensor) -> tuple[int, ...]:
    """The shape of an array with one number for each row of a parameter."""
    return (*p.shape[:1], *(1,) * (p.dim() - 1))


def shown(rule: Rule, store: Store, j: int, p: Tensor, stop: int, row: int, step: Tensor) -> dict[str, Tensor]:
    """The state of tensor j, which ends before element `stop` and `row` of its group: views.  step: its count."""
    start = stop - p.numel()
    found: dict[str, Tensor] = {}
    for name in names_beside(rule):
        found[name] = step if name == "step" else torch.from_numpy(store.counts[name])[j]
    for name in (*store.state, *(x for x in BESIDE if x in store.arrays)):
        if name in store.by_row:
            shape = _row_shape(p)
            found[name] = torch.from_numpy(store.arrays[name][row - math.prod(shape) : row]).view(shape)
            continue
        part = view(store.arrays[name][start:stop], p)
        if name in store.slots and store.kind == "uint8":
            scales = store.arrays[f"{name}_scale"][start // BLOCK : -(-stop // BLOCK)]
            coded = part, torch.from_numpy(scales), torch.tensor(start % BLOCK, device="cpu")
            found |= {f"{name}_{kind}": x for kind, x in zip(_CODED, coded, strict=True)}
        else:
            found[name] = part
    return found


def decoded(rule: Rule, p: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
    """A tensor's state with numbers instead of codes."""
    found = dict(given)
    for name, slot in rule.state.items():
        if f"{name}_code" in found:
            code, scale, offset = (found.pop(f"{name}_{kind}") for kind in _CODED)
            _check_shape(code, p, f"{name}_code")
            at = int(offset)
            flat = np.zeros(at + p.numel(), "uint8")
            flat[at:] = array(laid_out(code, p), p).reshape(-1)
            numbers = reference.from_uint8(flat, scale.numpy(), slot.coding == "signed")[at:]  # type: ignore[no-untyped-call]
            found[name] = view(numbers.astype("float32"), p)
    return found


def to_restore(rule: Rule, store: Store, p: Tensor, given: Mapping[str, Any]) -> dict[str, Any]:
    """What _checkpoint/torch.py takes over of a tensor's state: arrays lie in memory as the tensor does."""
    numbers = decoded(rule, p, given)
    found = {name: numbers[name] for name in names_beside(rule) if name in numbers}
    for name in store.state:
        when = rule.state[name].when
        if when and found and numbers.get(name) is None:
            raise ValueError(f"{when} needs the state {name!r} from the first step on, and this tensor's has "
                             f"{', '.join(map(str, given))}; choose {when} before it, or begin with zeros: "
                             f"opt.state[p][{name!r}] = torch.zeros_like(p) for each p")  # fmt: skip
        if (x := numbers.get(name)) is not None and name in store.by_row:
            if not isinstance(x, torch.Tensor) or x.shape != _row_shape(p):
                raise ValueError(
                    f"the state {name!r} must be a tensor of one number for each row, of shape {_row_shape(p)}, for "
                    f"second_moment='row'; got {f'shape {tuple(x.shape)}' if isinstance(x, torch.Tensor) else x!r}"
                )
            found[name] = x
        elif x is not None:
            _check_shape(x, p, name)
            x = laid_out(x, p)
            found[name] = x if p.is_contiguous() else x.as_strided((x.numel(),), (1,))
    return found


def _check_shape(x: Any, p: Tensor, name: str) -> None:
    """Raise unless a state's tensor has the shape of its parameter."""
    if not isinstance(x, torch.Tensor) or x.shape != p.shape:
        got = f"shape {tuple(x.shape)}" if isinstance(x, torch.Tensor) else type(x).__name__
        raise ValueError(f"the state {name!r} must be a tensor of its parameter's shape, {tuple(p.shape)}; got {got}")


def restore_beside(store: Store, pairs: list[tuple[dict[str, Tensor], Mapping[str, Any]]]) -> None:
    """Take over what torch's format does not have: averages, master copies, and 8-bit state to the bit.

    pairs: of each tensor its views, and what was given.  Codes fit only if they lie in their blocks as they did, and
    if blocks that two tensors share have one scale; otherwise what was encoded anew stays.
    """
    narrow = store.state if store.kind == "uint8" else []
    coded = [f"{name}_{kind}" for name in narrow if name not in store.by_row for kind in _CODED]
    names = [name for name in store.arrays if name in store.slots or name.endswith("_scale")] if coded else []
    before = {name: store.arrays[name].copy() for name in names}

    def same(end: str) -> bool:
        return all(torch.equal(own[name], given[name].to(own[name].dtype)) for own, given in pairs for name in coded
                   if name.endswith(end) and name in given)  # fmt: skip

    fits = same("_offset")
    for own, given in pairs:
        for name in (*BESIDE, *(name for name in coded if fits)):
            x = given.get(name)
            if name in own and x is not None and x.shape == own[name].shape:
                own[name].copy_(x)
    if not same(""):
        for name, x in before.items():
            store.arrays[name][:] = x

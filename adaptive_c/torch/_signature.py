"""The constructors of the classes: torch's arguments in torch's order, then the rule's own and those of all rules."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from .. import Optimizer as Plain
from .._run.habits import meant

SWITCHES = {"foreach": None, "fused": None, "capturable": False, "differentiable": False}  # how torch computes
# Arguments of every class here, with their defaults: of the groups, and of the optimizer as a whole.
GROUP = {"ema_decay": None, "bounds": None, "rows": "lazy", "state_dtype": None, "master": None, "rounding": None}
WHOLE = {"max_grad_norm": None, "norm_over": "all", "max_grad_value": None, "on_nonfinite": None, "zero_grad": False,
         "flush_denormals": False, "seed": 0, "n_threads": None}  # fmt: skip
ELSEWHERE = {
    "loss_scale": "torch.amp.GradScaler scales the loss here",
    "sum_to_one": "it is for arrays, in adaptive_c's own classes",
    "copy_to": "it is for arrays, in adaptive_c's own classes",
    "cast": "a tensor's gradient has its dtype, and any layout",
    "uint16_as": "a tensor says itself that it is bfloat16",
    "keep_undo": "rollback() is for arrays, in adaptive_c's own classes",
    **dict.fromkeys(
        ("state_path", "state_memory", "state_parameters"), "state on disk is for arrays, in adaptive_c's own classes"
    ),
}


def own_options(rule: type[Plain]) -> dict[str, Any]:
    """The options of a rule, without those that all rules share, and their defaults."""
    arguments = inspect.signature(rule.__init__).parameters
    return {name: x.default for name, x in arguments.items() if name not in ("self", "params", "shared")}


def constructor(
    rule: type[Plain], theirs: type | None, construct: Callable[[Any, Mapping[str, Any]], None]
) -> tuple[Any, tuple[str, ...]]:
    """An __init__ with a signature of its own, which hands its arguments to `construct` by name; and torch's names.

    theirs: torch's class of this rule, if it has one.
    """
    only = inspect.Parameter.KEYWORD_ONLY
    ours = {name: x.replace(annotation=x.empty) for name, x in inspect.signature(rule.__init__).parameters.items()}
    del ours["shared"]
    torchs = dict(inspect.signature(vars(theirs)["__init__"]).parameters) if theirs else {}
    arguments = {**torchs} or ours
    more: dict[str, Any] = {**own_options(rule), **({} if theirs else SWITCHES), **GROUP, **WHOLE}
    for name, default in more.items():
        if name not in arguments:
            arguments[name] = inspect.Parameter(name, only, default=default)
    signature = inspect.Signature(list(arguments.values()))

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in kwargs:
            if name in ELSEWHERE:
                raise TypeError(f"{rule.__name__} has no argument {name!r} for tensors: {ELSEWHERE[name]}")
        try:
            given = signature.bind(self, *args, **kwargs)
        except TypeError as error:
            unknown = next((name for name in kwargs if name not in arguments), "")
            hint = meant(unknown, arguments) if unknown else ""
            raise TypeError(f"{rule.__name__}: {error}{hint}; it has {', '.join(list(arguments)[1:])}") from None
        given.apply_defaults()
        construct(self, {name: value for name, value in given.arguments.items() if name != "self"})

    init.__signature__ = signature  # type: ignore[attr-defined]
    init.__name__, init.__qualname__ = "__init__", f"{rule.__name__}.__init__"
    return init, tuple(torchs)[1:]


def example(name: str, text: str) -> str:
    """A rule's example with tensors; that of the text is over arrays, unless it imports what it needs."""
    return (
        text
        if "import" in text
        else f"""\
>>> import torch
>>> from adaptive_c.torch import {name}
>>> model = torch.nn.Linear(3, 2)
>>> opt = {name}(model.parameters())
>>> model(torch.ones(5, 3)).sum().backward()
>>> opt.step()
>>> opt.zero_grad()"""
    )

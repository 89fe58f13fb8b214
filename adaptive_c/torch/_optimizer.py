"""The base of the optimizers for tensors: a torch.optim.Optimizer whose step is a run of ours."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from .. import Optimizer as Plain
from .._checkpoint import torch as format_of_torch
from .._native import checked_threads
from .._run.options import SETTINGS
from ._bound import FRESH, Bound, Form
from ._signature import GROUP, SWITCHES, WHOLE, constructor, docstring, own_options

_FORMATS = ("state_dtype", "master", "rounding")  # how state is stored: the constructor's choice, also after a load
_KEY = "adaptive_c"  # in a state_dict, beside torch's "state" and "param_groups"


class _Setting:
    """An option of the optimizer as a whole: checked when it is assigned."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type) -> Any:
        return self if optimizer is None else optimizer._settings[self._name]

    def __set__(self, optimizer: "Optimizer", value: Any) -> None:
        optimizer._set(self._name, value)


class _Whole:
    """A value of a state_dict that torch's load_state_dict is to leave as it is: it would convert tensors."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Optimizer(torch.optim.Optimizer):
    """Base of all optimizers for tensors."""

    _rule: ClassVar[type[Plain]]
    _torch_names: ClassVar[tuple[str, ...]] = ()  # the arguments of torch's class of this rule
    _step_supports_amp_scaling = True  # GradScaler leaves the gradients scaled, and says by how much
    _bound: Bound | None = None
    _ready = False

    max_grad_norm = _Setting()
    max_grad_value = _Setting()
    on_nonfinite = _Setting()
    flush_denormals = _Setting()
    seed = _Setting()
    n_threads = _Setting()

    def __init_subclass__(cls, rule: type[Plain] | None = None, **more: Any) -> None:
        super().__init_subclass__(**more)
        if rule is not None:
            theirs = getattr(torch.optim, rule.__name__, None)
            cls._rule, cls.__doc__ = rule, docstring(rule)
            cls.__init__, cls._torch_names = constructor(rule, theirs, cls._construct)  # type: ignore[method-assign]

    def _construct(self, given: Mapping[str, Any]) -> None:
        """given: the arguments by name."""
        own = own_options(self._rule)
        self._settings = {name: given[name] for name in WHOLE}
        self._counted = dict(FRESH)
        if self._torch_names:
            super().__init__(**{name: given[name] for name in self._torch_names})
        else:
            super().__init__(given["params"], {name: given[name] for name in (*own, *SWITCHES)})
        more = {name: given[name] for name in (*own, *GROUP) if name not in self.defaults}
        self.defaults.update(more)
        for group in self.param_groups:
            for name, value in more.items():
                group.setdefault(name, value)
        self._start()
        self._form.check(self.param_groups, 0)
        self._ready = True

    def _start(self) -> None:
        rule = self._rule.rule._replace(label=self._rule.__name__)
        self._form = Form(
            rule, {name: self.defaults[name] for name in (*own_options(self._rule), *GROUP)}, self._settings
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if self._ready:
            try:
                self._form.check(self.param_groups[-1:], len(self.param_groups) - 1)
            except Exception:
                del self.param_groups[-1]
                raise

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters from their gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = found_inf = None
        if "found_inf" in self.__dict__:  # set by GradScaler
            scale, found_inf = self.__dict__["grad_scale"], self.__dict__["found_inf"]
        if found_inf is not None and found_inf.item():
            return loss
        scale = 0.0 if scale is None else float(scale)
        bound = self._fitting()
        if not bound.step(scale):
            self._unbind()
            self._fitting().step(scale)
        return loss

    def _fitting(self) -> Bound:
        bound = self._bound
        if bound is None or not bound.fits(self.param_groups, self.state):
            self._unbind()
            self._bound = bound = Bound(self._form, self.param_groups, self.state, self._counted)
        return bound

    def _unbind(self) -> None:
        if self._bound is not None:
            self._counted = self._bound.counted()
            self._bound = None

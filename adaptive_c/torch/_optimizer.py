"""The base of the optimizers for tensors: a torch.optim.Optimizer whose step is a run of ours."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch

from .. import Optimizer as Plain
from .._checkpoint import torch as format_of_torch
from .._native import checked_threads
from .._run.options import SETTINGS
from ._bound import FORMATS, FRESH, Bound, Form
from ._signature import GROUP, SWITCHES, WHOLE, constructor, docstring, own_options
from ._state import BESIDE, decoded

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

    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]
    state: Any
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
        """Update the parameters from their gradients.

        Parameters
        ----------
        closure : callable, optional
            Called first, with gradients enabled: it computes the loss and the gradients.

        Returns
        -------
        loss
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = 0.0  # of the gradients: none
        if "found_inf" in self.__dict__:  # GradScaler calls
            if self.found_inf.item():
                self._zero()
                return loss
            scale = 0.0 if self.grad_scale is None else float(self.grad_scale)
        if not self._fitting().step(scale):
            self._unbind()
            self._fitting().step(scale)
        return loss

    def _zero(self) -> None:
        """With zero_grad=True, what a skipped step leaves of the gradients."""
        if self._settings["zero_grad"]:
            self.zero_grad(set_to_none=False)

    def _fitting(self) -> Bound:
        """What is bound, bound anew if something about it has changed."""
        bound = self._bound
        if bound is None or not bound.fits(self.param_groups, self.state):
            self._unbind()
            self._bound = bound = Bound(self._form, self.param_groups, self.state, self._counted)
        return bound

    def _unbind(self) -> None:
        self._counted, self._bound = self._counts(), None

    def _counts(self) -> dict[str, Any]:
        return self._counted if self._bound is None else self._bound.counted()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self, *, format: str | None = None) -> dict[str, Any]:  # noqa: A002
        """As torch's: tensors that the next step changes, and options.

        Parameters
        ----------
        format : "torch", optional
            Make a dict that holds nothing but what torch's class of this name has, with 8-bit state decoded.
        """
        found: dict[str, Any] = super().state_dict()
        if format is None:
            return {**found, _KEY: self._counts()}
        if format != "torch":
            raise ValueError(f"format must be 'torch' or None, got {format!r}")
        rule = self._form.rule
        format_of_torch.check_class(rule, self.param_groups)
        params = [p for group in self.param_groups for p in group["params"]]
        drop = (self._form.defaults.keys() - set(self._torch_names)) - rule.fixed.keys()
        groups = [{name: x for name, x in group.items() if name not in drop} for group in found["param_groups"]]
        states = {
            number: {name: x for name, x in decoded(rule, params[number], state).items() if name not in BESIDE}
            for number, state in found["state"].items()
        }
        return {"state": states, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state, also one of torch's class of this rule.

        Options become those of the dict, except how numbers are stored: state_dtype, master and rounding are the
        constructor's, and state is converted to them.
        """
        counted = dict(FRESH)

        def keep(optimizer: Any, given: dict[str, Any]) -> dict[str, Any]:
            """The last hook before the load: torch would convert tensors to the parameters' dtype."""
            counted.update(given.get(_KEY, {}))
            return {**given, "state": {key: _Whole(value) for key, value in given["state"].items()}}

        before = self.param_groups, self.state, self._bound, self._counted
        hook = self.register_load_state_dict_pre_hook(keep)
        try:
            super().load_state_dict(state_dict)
            self._bound, self._counted = None, counted
            self._form.check(self.param_groups, 0)
            if self.state:
                self._fitting()
        except BaseException:
            self.param_groups, self.state, self._bound, self._counted = before
            raise
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_settings": self._settings, "_counted": self._counts()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called to unpickle, and by load_state_dict."""
        states = {key: dict(x.value) if isinstance(x, _Whole) else x for key, x in state["state"].items()}
        old = self.__dict__.get("param_groups", [{}] * len(state["param_groups"]))
        super().__setstate__({**state, "state": defaultdict(dict, states)})
        for group, own in zip(self.param_groups, old, strict=True):
            group.update({name: own[name] for name in FORMATS if name in own})
            for name, default in self.defaults.items():
                group.setdefault(name, own.get(name, default))
        if not self._ready:
            self._start()
            self._ready = True

    # --- what the run knows -------------------------------------------------------------------------------------------

    @property
    def t(self) -> int:
        """The number of applied steps."""
        return int(self._counts()["t"])

    @property
    def grad_norm(self) -> float:
        """The norm of the last step's gradients, unscaled and unclipped; NaN without max_grad_norm."""
        return float(self._counts()["grad_norm"])

    @property
    def skipped_steps(self) -> int:
        """The number of steps that on_nonfinite="skip" left out."""
        return int(self._counts()["skipped_steps"])

    @contextmanager
    def averaged_parameters(self) -> Iterator[None]:
        """A ``with`` block inside which the parameters are their averages; a step in it is refused.

        Raises
        ------
        ValueError
            Without ema_decay.
        """
        if all(group["ema_decay"] is None for group in self.param_groups):
            raise ValueError("there is no average: construct the optimizer with ema_decay")
        params = [p for group in self.param_groups for p in group["params"]]
        with self._fitting().plan.averages():
            torch.autograd.graph.increment_version(params)
            try:
                yield
            finally:
                torch.autograd.graph.increment_version(params)

    def _set(self, name: str, value: Any) -> None:
        """Assign an option of the optimizer as a whole."""
        if name == "n_threads":
            number = checked_threads(value)
            if self._bound is not None:
                self._bound.plan.n_threads = number
        elif self._bound is not None:
            self._bound.run.configure(name, value)
        else:
            SETTINGS[name](name, value)
        self._settings[name] = value

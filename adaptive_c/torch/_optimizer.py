"""The base of the optimizers for tensors: a torch.optim.Optimizer whose step is a run of ours."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

import torch

from .. import Optimizer as Plain
from .._checkpoint import torch as format_of_torch
from .._docstrings import DocOfSetting, document
from .._native import checked_threads
from .._run.options import SETTINGS
from .._settings import Setting
from ..typing import NormOver, OnNonfinite
from ._bound import FORMATS, FRESH, REFUSED, Bound, Form, Live, plain
from ._signature import GROUP, SWITCHES, WHOLE, constructor, example, own_options
from ._state import BESIDE, check_counts, decoded
from ._tensors import Tensor

Value = TypeVar("Value")
_KEY = "adaptive_c"  # in a state_dict, beside torch's "state" and "param_groups"


class _Setting(Setting[Value, Value]):
    # An option of the optimizer as a whole: checked when it is assigned.

    __doc__ = DocOfSetting("TENSORS")

    def _read(self, optimizer: Any) -> Any:
        return optimizer._settings[self.name]

    def __set__(self, optimizer: Any, value: Value) -> None:
        optimizer._set(self.name, value)


class _Whole:
    """A value of a state_dict that torch's load_state_dict is to leave as it is: it would convert tensors."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Optimizer(torch.optim.Optimizer):
    """Base of all optimizers for tensors: a torch.optim.Optimizer whose step is a run of ours.

    Parameters
    ----------
    params : iterable of tensors, of (name, tensor) pairs, or of group dicts
        As in torch.
    defaults : dict
        The options that the rule has for itself, and their values, as in torch.

    Raises
    ------
    TypeError, ValueError
        As torch's class does, and if something can't be stepped in place or is out of range.

    Notes
    -----
    Numbers of a rule are read from ``param_groups`` at every step, so that torch's schedulers work, and checked when
    they have changed.

    Examples
    --------
    >>> import torch
    >>> from adaptive_c.torch import AdamW, Optimizer
    >>> isinstance(AdamW([torch.ones(3)]), Optimizer), isinstance(AdamW([torch.ones(3)]), torch.optim.AdamW)
    (True, True)
    """

    defaults: dict[str, Any]
    param_groups: list[dict[str, Any]]
    state: Any
    _rule: ClassVar[type[Plain]]
    _torch_names: ClassVar[tuple[str, ...]] = ()  # the arguments of torch's class of this rule
    _live: Live

    if TYPE_CHECKING:  # each class has a constructor of its own, with torch's arguments in torch's order

        def __init__(self, params: Any, *args: Any, **options: Any) -> None: ...

    max_grad_norm = _Setting[float | None]()
    norm_over = _Setting[NormOver]()
    max_grad_value = _Setting[float | None]()
    on_nonfinite = _Setting[OnNonfinite | None]()
    flush_denormals = _Setting[bool]()
    seed = _Setting[int]()
    n_threads = _Setting[int | None]()

    def __init_subclass__(cls, rule: type[Plain] | None = None, **more: Any) -> None:
        super().__init_subclass__(**more)
        if rule is not None:
            theirs = getattr(torch.optim, rule.__name__, None)
            own: Any = vars(rule)["__doc__"]
            cls._rule, cls.__doc__ = rule, own and own.text
            document(cls, "TENSORS", example)
            cls.__init__, cls._torch_names = constructor(rule, theirs, cls._construct)  # type: ignore[method-assign]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Does GradScaler leave the gradients scaled, and say by how much?  As in torch where fused=True asks for it,
        since clients may want to clip gradients that the scaler has unscaled; where this optimizer clips; and for
        narrow parameters, whose gradients the scaler refuses to unscale."""
        wanted = ("fused", "master", "rounding")
        return (
            self._settings["max_grad_norm"] is not None
            or self._live.arriving is not None  # which refuses a scaler, and says why
            or any(group.get(name) for group in self.param_groups for name in wanted)
        )

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Torch's constructors assign it."""

    def _construct(self, given: Mapping[str, Any]) -> None:
        """given: the arguments by name."""
        own = own_options(self._rule)
        for name in (*own, *GROUP, *WHOLE):
            plain(name, given[name])  # before torch's constructor compares it with numbers
        self._settings = {name: given[name] for name in WHOLE}
        if self._torch_names:
            super().__init__(**{name: given[name] for name in self._torch_names})
        else:
            super().__init__(given["params"], {name: given[name] for name in (*own, *SWITCHES)})
        more = {name: given[name] for name in (*own, *GROUP) if name not in self.defaults}
        self.defaults.update(more)
        for group in self.param_groups:
            for name, value in more.items():
                group.setdefault(name, value)
            for p in group["params"] if group.get("second_moment") == "row" else ():
                self.state.pop(p, None)  # torch's Adagrad has made a sum for each element
        self._start()
        self._form.check(self.param_groups, 0)
        self._live = Live(dict(FRESH))

    def _start(self) -> None:
        """Work out from the class and its defaults how torch's groups become groups of a run."""
        rule = self._rule.rule._replace(label=self._rule.__name__)
        defaults = {name: self.defaults[name] for name in (*own_options(self._rule), *GROUP)}
        settled = tuple(name for name in (*rule.fixed, *REFUSED) if name in self.defaults)
        self._form = Form(rule, defaults, self._settings, settled)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch, and check it.

        Parameters
        ----------
        param_group : dict
            ``params``, and options that differ from the constructor's.

        Raises
        ------
        TypeError, ValueError
            As at construction.  Nothing has changed then.

        Examples
        --------
        >>> import torch
        >>> from adaptive_c.torch import SGD
        >>> opt = SGD([torch.ones(3)], lr=0.1)
        >>> opt.add_param_group({"params": [torch.ones(2)], "lr": 0.01})
        >>> [group["lr"] for group in opt.param_groups]
        [0.1, 0.01]
        """
        if hasattr(self, "_live"):
            self._live.outside()
        super().add_param_group(param_group)
        if hasattr(self, "_live"):  # otherwise the constructor calls, and checks all groups
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
        object
            What the closure returned, or None.

        Examples
        --------
        >>> import torch
        >>> from adaptive_c.torch import SGD
        >>> w = torch.ones(2, requires_grad=True)
        >>> opt = SGD([w], lr=0.5)
        >>> (w**2).sum().backward()
        >>> opt.step()
        >>> w.detach()
        tensor([0., 0.])
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._update_uncompiled()
        else:
            self._update()
        return loss

    def _update(self) -> None:
        """Take a step; if it fails, forget what GradScaler has left for it."""
        try:
            self._take_step()
        except BaseException:
            for name in ("found_inf", "grad_scale"):  # GradScaler deletes them only after a step that is made
                self.__dict__.pop(name, None)
            raise

    def _take_step(self) -> None:
        """Finish the step of a backward pass, or take a new one, with a GradScaler's scale if it makes the call."""
        if self._live.arriving is not None:
            self._live.arriving.finish()
            return
        scale = 0.0  # of the gradients: none
        if "found_inf" in self.__dict__:  # GradScaler calls
            if self.found_inf:  # a tensor, or 0 where no parameter has a gradient
                if self._settings["zero_grad"]:
                    self.zero_grad(set_to_none=False)
                return
            scale = 0.0 if self.grad_scale is None else float(self.grad_scale)
        if not self._fitting().step(scale):
            self._live.unbind()
            self._fitting().step(scale)

    _update_uncompiled = torch._disable_dynamo(
        _update
    )  # it imports torch._dynamo, which takes seconds, when it is called

    def catch_up(self, parameter: Tensor | None = None, indices: Tensor | None = None) -> None:
        """Bring rows up to date, of groups with ``rows="exact"``: all of them, or some rows of a parameter.

        Call it before you read parameters or look rows up; `state_dict` and `averaged_parameters` do it by themselves,
        but a model's own ``state_dict`` does not: ``model.register_state_dict_pre_hook(lambda *args: opt.catch_up())``.

        Parameters
        ----------
        parameter : tensor, optional
            One parameter: ``opt.catch_up(table.weight, words)``.
        indices : tensor, optional
            The rows of it, of any shape.

        Raises
        ------
        TypeError, ValueError
            If there is no such parameter or row.

        Examples
        --------
        >>> import torch
        >>> from adaptive_c.torch import SGD
        >>> table = torch.nn.Embedding.from_pretrained(torch.ones(4, 2), freeze=False, sparse=True)
        >>> opt = SGD(table.parameters(), lr=0.5, weight_decay=1.0, rows="exact")
        >>> (0 * table(torch.tensor([0]))).sum().backward()
        >>> opt.step()
        >>> opt.catch_up()
        >>> table.weight[:, 0].detach()
        tensor([0.5000, 0.5000, 0.5000, 0.5000])
        """
        given = [isinstance(x, torch.Tensor) for x in (parameter, indices)]
        if not all(given) and (parameter is not None or indices is not None):
            raise TypeError(
                "catch_up takes nothing, or a parameter and a tensor of its rows: catch_up(table.weight, words)"
            )
        if parameter is not None and not any(p is parameter for group in self.param_groups for p in group["params"]):
            raise ValueError("catch_up: that tensor is no parameter of this optimizer")
        self._live.outside()
        bound = self._live.bound
        if bound is None:
            return
        if parameter is None or indices is None:
            with bound.writing([]):
                bound.plan.catch_up()
        else:
            _, i, j = bound.places()[parameter]
            with bound.writing([parameter]):
                bound.plan.catch_up(i, j, indices.detach().reshape(-1).contiguous().numpy())

    def _fitting(self) -> Bound:
        """The binding of the tensors, made anew if something about them has changed."""
        bound = self._live.bound
        if bound is None or not bound.fits(self.param_groups, self.state):
            live = self._live
            live.unbind()
            with torch.inference_mode(False):  # the tensors of its state outlive the mode
                bound = Bound(self._form, self.param_groups, self.state, live.counted, live.seen)
            live.bound = bound
        return bound

    def _counts(self) -> dict[str, Any]:
        """The counts of the run, or of the last one."""
        bound = self._live.bound
        return self._live.counted if bound is None else bound.counted()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self, *, format: Literal["torch"] | None = None) -> dict[str, Any]:  # noqa: A002
        """Describe the state as torch does: by tensors that the next step changes, and options.

        Parameters
        ----------
        format : "torch", optional
            Make a dict that holds nothing but what torch's class of this name has, with 8-bit state decoded.

        Returns
        -------
        dict
            What `load_state_dict` takes.

        Raises
        ------
        ValueError
            For another format, or if PyTorch has no such rule, or not with these options.

        Examples
        --------
        >>> import torch
        >>> from adaptive_c.torch import SGD
        >>> opt = SGD([torch.ones(3)], lr=0.1, max_grad_norm=1.0)
        >>> sorted(opt.state_dict()), sorted(opt.state_dict(format="torch"))
        (['adaptive_c', 'param_groups', 'state'], ['param_groups', 'state'])
        """
        self.catch_up()
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

        Parameters
        ----------
        state_dict : dict
            What `state_dict` of this class or torch's gave.

        Raises
        ------
        TypeError, ValueError
            If something does not fit.  Nothing has changed then.

        Examples
        --------
        >>> import torch
        >>> from adaptive_c.torch import SGD
        >>> opt = SGD([torch.ones(3)], lr=0.1)
        >>> opt.load_state_dict(torch.optim.SGD([torch.ones(3)], lr=0.5).state_dict())
        >>> opt.param_groups[0]["lr"]
        0.5
        """
        self._live.free()
        counted = dict(FRESH)

        def keep(optimizer: Any, given: dict[str, Any]) -> dict[str, Any]:
            """The last hook before the load: torch would convert tensors to the parameters' dtype."""
            counted.update(given.get(_KEY, {}))
            check_counts(self._form.rule, given["state"])
            return {**given, "state": {key: _Whole(value) for key, value in given["state"].items()}}

        live = self._live
        before = self.param_groups, self.state, live.bound, live.counted, live.seen
        hook = self.register_load_state_dict_pre_hook(keep)
        try:
            super().load_state_dict(state_dict)
            live.bound, live.counted, live.seen = None, counted, {}
            self._form.check(self.param_groups, 0)
            if self.state:
                self._fitting()
        except BaseException:
            self.param_groups, self.state, live.bound, live.counted, live.seen = before
            raise
        finally:
            hook.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._live.free()
        self.catch_up()
        return {**super().__getstate__(), "_settings": self._settings, "_counted": self._counts()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called to unpickle, and by load_state_dict."""
        states = {key: dict(x.value) if isinstance(x, _Whole) else x for key, x in state["state"].items()}
        old = self.__dict__.get("param_groups", [{}] * len(state["param_groups"]))
        super().__setstate__({**state, "state": defaultdict(dict, states)})
        for group, own in zip(self.param_groups, old, strict=True):
            group.update({name: own[name] for name in (*FORMATS, *REFUSED) if name in own})
            for name, default in self.defaults.items():
                group.setdefault(name, own.get(name, default))
        if not hasattr(self, "_live"):  # unpickled
            self._live = Live(self.__dict__.pop("_counted"))
            self._start()

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

        Yields
        ------
        None
            Nothing.

        Raises
        ------
        ValueError
            Without ema_decay.

        Examples
        --------
        >>> import torch
        >>> from adaptive_c.torch import SGD
        >>> w = torch.ones(2, requires_grad=True)
        >>> opt = SGD([w], lr=0.5, ema_decay=0.75)
        >>> w.sum().backward()
        >>> opt.step()
        >>> with opt.averaged_parameters():
        ...     print(w.detach())
        tensor([0.8750, 0.8750])
        """
        if all(group["ema_decay"] is None for group in self.param_groups):
            raise ValueError("there is no average: construct the optimizer with ema_decay")
        self._live.outside()
        params = [p for group in self.param_groups for p in group["params"]]
        bound = self._fitting()
        with bound.writing(params), bound.plan.averages():
            torch.autograd.graph.increment_version(params)
            yield

    def _set(self, name: str, value: Any) -> None:
        """Assign an option of the optimizer as a whole."""
        plain(name, value)
        self._live.outside(name, value)
        bound = self._live.bound
        if name == "n_threads":
            number = checked_threads(value)
            if bound is not None:
                bound.plan.n_threads = number
        elif bound is not None:
            bound.run.configure(name, value)
        else:
            SETTINGS[name](name, value)
        self._settings[name] = value


document(Optimizer, "TENSORS", example)


def parts_of(optimizer: Optimizer) -> tuple[Live, Callable[[], Bound]]:
    """For steps in backward: what changes as an optimizer steps, and what makes the binding that fits its tensors."""
    return optimizer._live, optimizer._fitting

"""Attributes of an optimizer that are options of it as a whole."""

from typing import Any, Generic, Self, TypeVar, overload

from ._docstrings import DocOfSetting
from ._run.options import Switch, moves, setting_at
from ._run.run import check_scale
from .typing import Real

Got = TypeVar("Got")  # what is read
Given = TypeVar("Given")  # what may be assigned


class Setting(Generic[Got, Given]):
    # An option of the optimizer as a whole: checked when it is assigned; of a schedule the number of the next step.

    __doc__ = DocOfSetting()

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, optimizer: None, owner: type) -> Self: ...

    @overload
    def __get__(self, optimizer: object, owner: type) -> Got: ...

    def __get__(self, optimizer: Any, owner: type) -> Any:
        return self if optimizer is None else self._read(optimizer)

    def _read(self, optimizer: Any) -> Any:
        plan = optimizer._run.plan
        value = plan.settings[self.name]
        return setting_at(self.name, value, plan.t) if moves(value) else value

    def __set__(self, optimizer: Any, value: Given) -> None:
        optimizer._run.configure(self.name, value)


class ZeroGrad(Setting[Switch, bool]):
    # True or False; torch's users call it.

    __doc__ = DocOfSetting()

    def _read(self, optimizer: Any) -> Switch:
        return Switch(super()._read(optimizer))


class CurrentScale(Setting[float, Real]):
    # A number, or of a dynamic scale the current one.

    __doc__ = DocOfSetting()

    def _read(self, optimizer: Any) -> Any:
        return optimizer._run.plan.loss_scale

    def __set__(self, optimizer: Any, value: Real) -> None:
        if isinstance(value, str):
            raise ValueError(f"loss_scale is assigned a number, got {value!r}; 'dynamic' is chosen in the constructor")
        if optimizer._run.plan.dynamic:
            optimizer._run.plan.set_loss_scale(check_scale("loss_scale", value))
        else:
            super().__set__(optimizer, value)

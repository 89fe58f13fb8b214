"""Attributes of an optimizer that are options of it as a whole."""

from typing import Any

from ._run.options import Switch, moves, setting_at
from ._run.run import check_scale


class Setting:
    """An option of the optimizer as a whole: checked when it is assigned; of a schedule the number of the next step."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type) -> Any:
        if optimizer is None:
            return self
        plan = optimizer._run.plan
        value = plan.settings[self._name]
        return setting_at(self._name, value, plan.t) if moves(value) else value

    def __set__(self, optimizer: Any, value: Any) -> None:
        optimizer._run.configure(self._name, value)


class ZeroGrad(Setting):
    """True or False; torch's users call it."""

    def __get__(self, optimizer: Any, owner: type) -> Any:
        value = super().__get__(optimizer, owner)
        return value if optimizer is None else Switch(value)


class LossScale(Setting):
    """A number, or of a dynamic scale the current one."""

    def __get__(self, optimizer: Any, owner: type) -> Any:
        return self if optimizer is None else optimizer._run.plan.loss_scale

    def __set__(self, optimizer: Any, value: Any) -> None:
        if isinstance(value, str):
            raise ValueError(f"loss_scale is assigned a number, got {value!r}; 'dynamic' is chosen in the constructor")
        if optimizer._run.plan.dynamic:
            optimizer._run.plan.set_loss_scale(check_scale("loss_scale", value))
        else:
            super().__set__(optimizer, value)

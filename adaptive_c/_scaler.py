"""The state of a dynamic loss scale."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ._native import core
from ._options import number, whole

_SMALLEST, _LARGEST, _INTERVAL = core.scale_limits()
_scale = number(_SMALLEST, _LARGEST, open_high=False)


class LossScaler:
    """Two plain numbers, which live in the plan: the scale, and the clean steps since it last changed."""

    def __init__(self, plan: Any) -> None:
        self._plan = plan

    @property
    def scale(self) -> float:
        scale: float = self._plan.loss_scale
        return scale

    @scale.setter
    def scale(self, scale: Any) -> None:
        self.load_state_dict({"scale": scale, "growth_tracker": self._plan.growth_tracker})

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "growth_tracker": self._plan.growth_tracker}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._plan.set_scale(*checked(state))


def checked(state: Mapping[str, Any], where: str = "") -> tuple[float, int]:
    """Scale and growth_tracker of a state_dict."""
    scale = _scale(f"{where}loss_scale", state["scale"])
    tracker = whole(f"{where}growth_tracker", state["growth_tracker"])
    if tracker >= _INTERVAL:
        raise ValueError(f"{where}growth_tracker must be in [0, {_INTERVAL}), got {tracker}")
    return float(np.float32(scale)), tracker  # PyTorch's scale is a float32

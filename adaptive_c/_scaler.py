"""The state of a dynamic loss scale."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ._options import number, whole

SMALLEST, LARGEST, INTERVAL = 2.0**-126, 2.0**126, 2000  # as in src/plan.pxi, which has the rule
_scale = number(SMALLEST, LARGEST, open_high=False)


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
        self._set(scale, self._plan.growth_tracker)

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "growth_tracker": self._plan.growth_tracker}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._set(state["scale"], state["growth_tracker"])

    def _set(self, scale: Any, tracker: Any) -> None:
        scale, tracker = _scale("loss_scale", scale), whole("growth_tracker", tracker)
        if tracker >= INTERVAL:
            raise ValueError(f"growth_tracker must be in [0, {INTERVAL}), got {tracker}")
        self._plan.set_scale(float(np.float32(scale)), tracker)  # PyTorch's scale is a float32

"""Adaptive-learning-rate optimizers that update large NumPy arrays in place, at memory speed.

>>> import numpy as np, adaptive_c as ac
>>> w = np.array([1.0, 2.0], "float32")
>>> opt = ac.AdamW(w, lr=0.1, weight_decay=0.0)
>>> opt.step(2 * w)
>>> w
array([0.9, 1.9], dtype=float32)

Names are loaded when they are first used, so that ``import adaptive_c.reference`` needs no compiled extension.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
_IMPORTED_IN = os.getpid()

_HOME = {
    "Optimizer": "_optimizer",
    "Rows": "_native",
    "flatten": "_run.layout",
    "get_num_threads": "_native",
    "minimize": "_minimize",
    "scipy_method": "_scipy",
    "set_num_threads": "_native",
    "show_config": "_native",
}
_SUBMODULES = ("explore", "optimizers", "reference", "schedules", "typing")

if TYPE_CHECKING:
    from . import explore as explore
    from . import optimizers as optimizers
    from . import reference as reference
    from . import schedules as schedules
    from . import typing as typing
    from ._minimize import minimize as minimize
    from ._native import Rows as Rows
    from ._native import get_num_threads as get_num_threads
    from ._native import set_num_threads as set_num_threads
    from ._native import show_config as show_config
    from ._optimizer import Optimizer as Optimizer
    from ._run.layout import flatten as flatten
    from ._scipy import scipy_method as scipy_method
    from .optimizers import *  # noqa: F403


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"adaptive_c.{name}")
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module 'adaptive_c' has no attribute {name!r}")
    rules = importlib.import_module("adaptive_c.optimizers")
    if name == "__all__":
        value: Any = [*rules.__all__, *_HOME, "schedules"]
    elif name in _HOME:
        value = getattr(importlib.import_module(f"adaptive_c.{_HOME[name]}"), name)
    elif name in rules.__all__:
        value = getattr(rules, name)
    else:
        habits = importlib.import_module("adaptive_c._run.habits")
        raise AttributeError(habits.absent("adaptive_c", name, __getattr__("__all__")))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})

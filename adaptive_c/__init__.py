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
    "optimizers": ("SGD", "Momentum", "Adagrad", "RMSprop", "Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam",
                   "Lion", "Rprop", "SuperSAB"),
    "_optimizer": ("Optimizer",),
    "_flatten": ("flatten",),
    "_native": ("get_num_threads", "set_num_threads", "show_config"),
}  # fmt: skip
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [  # noqa: RUF022  the rules in order of increasing complexity, as everywhere
    "SGD",
    "Momentum",
    "Adagrad",
    "RMSprop",
    "Adadelta",
    "Adam",
    "AdamW",
    "Adamax",
    "NAdam",
    "RAdam",
    "Lion",
    "Rprop",
    "SuperSAB",
    "Optimizer",
    "flatten",
    "get_num_threads",
    "schedules",
    "set_num_threads",
    "show_config",
]

if TYPE_CHECKING:
    from . import schedules
    from ._flatten import flatten
    from ._native import get_num_threads, set_num_threads, show_config
    from ._optimizer import Optimizer
    from .optimizers import (
        SGD,
        Adadelta,
        Adagrad,
        Adam,
        Adamax,
        AdamW,
        Lion,
        Momentum,
        NAdam,
        RAdam,
        RMSprop,
        Rprop,
        SuperSAB,
    )


def __getattr__(name: str) -> Any:
    if name == "schedules":
        return importlib.import_module("adaptive_c.schedules")
    if name not in _MODULE:
        raise AttributeError(f"module 'adaptive_c' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"adaptive_c.{_MODULE[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

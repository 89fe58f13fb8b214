"""The explorer, ``adaptive-c explore``: a local page with courses of the optimizers on surfaces that the user chooses.

`parse` makes a function of two weights, with its exact gradient, from a text.  It needs only NumPy; the page needs
Bokeh (the extra ``explore``).
"""

from typing import Any

from .._run.habits import absent
from .expression import Expression, ExpressionError, parse

__all__ = ["Expression", "ExpressionError", "parse"]


def __getattr__(name: str) -> Any:
    raise AttributeError(absent(__name__, name, __all__))

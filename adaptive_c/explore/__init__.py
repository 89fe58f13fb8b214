"""The explorer, ``adaptive-c explore``: a local page with courses of the optimizers on surfaces that the user chooses.

`parse` makes a function of two weights, with its exact gradient, from a text.  It needs only NumPy; the page needs
Bokeh (the extra ``explore``).
"""

from .expression import Expression as Expression
from .expression import ExpressionError as ExpressionError
from .expression import parse as parse

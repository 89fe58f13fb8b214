"""Functions of two weights as one writes them, ``3*w1**2 + 10*w2**2``, with exact gradients.

The text is parsed by Python's ``ast``, and only what is listed here is let through; nothing is ever evaluated or
compiled.  What comes out is a tree of small functions over numbers that are floats, arrays, or dual numbers, which
carry a slope along (forward differentiation).
"""

import ast
import operator
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from ..figures.problems import Array

LENGTH, PARTS = 400, 150  # of a text: its characters, and its parts, which may all lie in each other

Tree = Callable[[Any], Any]  # from the pair of weights to the value


class ExpressionError(ValueError):
    """A text that is no function of two weights that `parse` can read.

    Parameters
    ----------
    position : int
        Where in the text, counted from 1.
    reason : str
        What is wrong there.

    Attributes
    ----------
    position : int
        Where in the text, counted from 1.

    Examples
    --------
    >>> from adaptive_c.explore import ExpressionError, parse
    >>> try:
    ...     parse("w1^2")
    ... except ExpressionError as error:
    ...     print(error)
    position 3: '^' is not allowed; powers are written **, as in w1**2
    """

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"position {position}: {reason}")
        self.position = position


class Dual:
    """A value and its slope along one weight.  What does not depend on that weight stays a plain number."""

    __slots__ = ("slope", "value")
    __array_ufunc__ = None  # so that NumPy leaves operators with its own numbers to this class

    def __init__(self, value: Any, slope: Any) -> None:
        self.value, self.slope = value, slope

    def __neg__(self) -> "Dual":
        return Dual(-self.value, -self.slope)

    def __pos__(self) -> "Dual":
        return self

    def __add__(self, other: Any) -> "Dual":
        if isinstance(other, Dual):
            return _dual(self.value + other.value, self.slope + other.slope, self, other)
        return Dual(self.value + other, self.slope)

    __radd__ = __add__

    def __sub__(self, other: Any) -> "Dual":
        if isinstance(other, Dual):
            return _dual(self.value - other.value, self.slope - other.slope, self, other)
        return Dual(self.value - other, self.slope)

    def __rsub__(self, other: Any) -> "Dual":
        return Dual(other - self.value, -self.slope)

    def __mul__(self, other: Any) -> "Dual":
        if isinstance(other, Dual):
            slope = self.slope * other.value + self.value * other.slope
            return _dual(self.value * other.value, slope, self, other)
        return Dual(self.value * other, self.slope * other)

    __rmul__ = __mul__

    def __truediv__(self, other: Any) -> "Dual":
        if isinstance(other, Dual):
            value = self.value / other.value
            return _dual(value, (self.slope - value * other.slope) / other.value, self, other, pole=other.value == 0)
        return _dual(self.value / other, self.slope / other, self, pole=other == 0)

    def __rtruediv__(self, other: Any) -> "Dual":
        value = other / self.value
        return _dual(value, -value / self.value * self.slope, self, pole=self.value == 0)

    def __pow__(self, other: Any) -> "Dual":
        exponent = other.value if isinstance(other, Dual) else other
        value = self.value**exponent
        along = _chained(value, exponent, _chained(value, self.slope, self.value ** (exponent - 1)))
        if isinstance(other, Dual):
            return _dual(value, along + other.__rpow__(self.value).slope, self, other, pole=self.value == 0)
        return _dual(value, along, self, pole=self.value == 0)

    def __rpow__(self, other: Any) -> "Dual":
        value = other**self.value
        return _dual(value, _chained(value, self.slope, _chained(value, value, np.log(other))), self, pole=other == 0)


def _dual(value: Any, slope: Any, *parts: Dual, pole: Any = False) -> Dual:
    """The result of an operation with these parts.  pole: where it has a pole if its value is infinite there.

    A part that is too large for a float becomes infinite, and so does its slope, although both are finite in truth.  If
    the result is finite nevertheless, as ``1/(1 + exp(w1))`` is for large weights, it no longer changes with that part,
    and its slope is 0.  A pole has no slope, and the slope of what is computed from a pole is not known.
    """
    if isinstance(slope, float) and slope - slope == 0.0:  # a finite number, as most are
        return Dual(value, slope)
    infinite = np.isinf(value)
    lost = np.isnan(slope) & ~_any(np.isnan(part.slope) for part in parts)
    flat = lost & np.isfinite(value) & _any(np.isinf(part.value) for part in parts)
    settled = np.where(flat, 0.0, np.where(lost & infinite, np.inf, slope))
    return Dual(value, np.where(infinite & pole, np.nan, settled)[()])


def _any(conditions: Iterable[Any]) -> Any:
    """Whether any of the conditions holds, element by element."""
    return reduce(operator.or_, conditions)


def _chained(value: Any, factor: Any, derivative: Any) -> Any:
    """A factor times a derivative of a function with this value, by the chain rule: 0 where the factor is 0.

    There the function is constant, though its derivative may be infinite.  Or it has a kink, as ``sqrt(w1**2)`` has at
    0, and is given the slope of ``abs``.  Where there is no finite value, there is no slope either.
    """
    product = factor * derivative
    return product if _known(product) else np.where((factor == 0) & np.isfinite(value), 0.0, product)


def _known(x: Any) -> bool:
    """Whether this is one number, and no NaN: most are, and what others need takes NumPy much longer."""
    return isinstance(x, float) and x == x


# Each function with its derivative, which is given the argument and the value.
FUNCTIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Any, Any], Any]]] = {
    "sin": (np.sin, lambda x, y: np.cos(x)),
    "cos": (np.cos, lambda x, y: -np.sin(x)),
    "tan": (np.tan, lambda x, y: 1 + y * y),
    "asin": (np.arcsin, lambda x, y: 1 / np.sqrt(1 - x * x)),
    "acos": (np.arccos, lambda x, y: -1 / np.sqrt(1 - x * x)),
    "atan": (np.arctan, lambda x, y: 1 / (1 + x * x)),
    "sinh": (np.sinh, lambda x, y: np.cosh(x)),
    "cosh": (np.cosh, lambda x, y: np.sinh(x)),
    "tanh": (np.tanh, lambda x, y: 1 - y * y),
    "exp": (np.exp, lambda x, y: y),
    "log": (np.log, lambda x, y: 1 / x),
    "log10": (np.log10, lambda x, y: 1 / (x * np.log(10))),
    "sqrt": (np.sqrt, lambda x, y: 0.5 / y),
    "abs": (np.abs, lambda x, y: np.sign(x)),
}
NAMES: dict[str, Tree] = {
    "w1": operator.itemgetter(0), "w2": operator.itemgetter(1), "pi": lambda w: np.float64(np.pi),
    "e": lambda w: np.float64(np.e),
}  # fmt: skip
OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.Pow: operator.pow, ast.USub: operator.neg, ast.UAdd: operator.pos,
}  # fmt: skip
# How what others write is written here.
POWERS, PRODUCTS = "powers are written **, as in w1**2", "products are written with *, as in 2*w1"
HINTS = {
    **dict.fromkeys("^\u00b2\u00b3", POWERS), **dict.fromkeys("\u00b7\u00d7", PRODUCTS), "\u2212": "minus is written -",
    "|": "the absolute value is abs(w1)", "=": "write only what stands to the right of it",
    **dict.fromkeys(("x", "y", "X", "Y", "W1", "W2"), "the weights are w1 and w2"),
    "ln": "log is the natural logarithm", "\u03c0": "write pi",
}  # fmt: skip
ALLOWED = f"numbers, {', '.join(NAMES)}, + - * / ** ( ), and {', '.join(FUNCTIONS)}"


def _apply(name: str, x: Any) -> Any:
    """A function of FUNCTIONS of a number or a dual number."""
    function, derivative = FUNCTIONS[name]
    if not isinstance(x, Dual):
        return function(x)
    value = function(x.value)
    return _dual(value, _chained(value, x.slope, derivative(x.value, value)), x, pole=x.value == 0)


@dataclass(frozen=True)
class Expression:
    """A function of two weights and its gradient; `parse` makes it.

    Parameters
    ----------
    text : str
        The function as it was written.
    tree : callable
        From a pair of weights to the value.

    Attributes
    ----------
    text : str
        The function as it was written.
    tree : callable
        From a pair of weights to the value.

    Notes
    -----
    Gradients are found by forward differentiation with dual numbers and are exact up to rounding.  At a kink with two
    slopes, as those of ``abs(w1)`` and ``sqrt(w1**2 + w2**2)`` at 0, the gradient is 0.  It is also 0 where a part is
    too large for a float and the value is finite nevertheless, as that of ``1/(1 + exp(w1))`` is for ``w1 = 800``.

    Examples
    --------
    >>> import numpy as np
    >>> from adaptive_c.explore import parse
    >>> parse("w1*w2").value(np.array([2.0, 3.0]))
    array(6.)
    """

    text: str
    tree: Tree

    def value(self, w: Array) -> Array:
        """The value at one point or at many.

        Parameters
        ----------
        w : array of shape (2, ...)
            The weights.

        Returns
        -------
        array of shape (...)
            The values in float64, NaN where the function has none and infinite where it is too large.

        Raises
        ------
        ValueError
            If `w` has another shape.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c.explore import parse
        >>> parse("sqrt(w1)").value(np.array([[4.0, -1.0], [0.0, 0.0]]))
        array([ 2., nan])
        """
        w = _weights(w)
        out = np.empty(w.shape[1:])
        with np.errstate(all="ignore"):
            out[...] = self.tree(w)
        return out

    def gradient(self, w: Array) -> Array:
        """The gradient at one point or at many.

        Parameters
        ----------
        w : array of shape (2, ...)
            The weights.

        Returns
        -------
        array of shape (2, ...)
            The derivatives along w1 and w2 in float64, NaN or infinite where there are none.

        Raises
        ------
        ValueError
            If `w` has another shape.

        Examples
        --------
        >>> import numpy as np
        >>> from adaptive_c.explore import parse
        >>> parse("3*w1**2 + 10*w2**2").gradient(np.array([-15.0, 20.0]))
        array([-90., 400.])
        """
        w = _weights(w)
        first, second = w[0], w[1]
        out = np.zeros(w.shape)
        with np.errstate(all="ignore"):
            for i, weights in enumerate(((Dual(first, 1.0), second), (first, Dual(second, 1.0)))):
                along = self.tree(weights)
                if isinstance(along, Dual):
                    out[i], along = along.slope, along.value
                if not _known(along):
                    np.copyto(out[i, ...], np.nan, where=np.isnan(along))
        return out


def _weights(w: Any) -> Array:
    """The weights as an array, checked."""
    weights: Array = np.asarray(w, float)
    if weights.shape[:1] != (2,):
        got = f"got the shape {weights.shape}"
        raise ValueError(f"w must have the shape (2, ...), w1 before w2, as np.array([1.0, 2.0]) has; {got}")
    return weights


class _Reader:
    """Turns the nodes of a text into a tree, and counts them."""

    def __init__(self, text: str) -> None:
        self.text, self.parts = text, 0

    def refuse(self, node: ast.expr, reason: str) -> ExpressionError:
        """The error that names a part of the text and where it is."""
        part = self.text[node.col_offset : node.end_col_offset]
        return ExpressionError(node.col_offset + 1, f"{part if len(part) <= 40 else part[:37] + '...'!r} {reason}")

    def read(self, node: ast.expr) -> Tree:
        """A node of Python's syntax tree as a tree of ours; anything that is not allowed is refused."""
        self.parts += 1
        if self.parts > PARTS:
            raise self.refuse(node, f"is too much: the function has more than {PARTS} parts")
        match node:
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return self._number(node, number)
            case ast.Name(id=name) if name in NAMES:
                return NAMES[name]
            case ast.Name(id=name):
                called = f"needs its argument in brackets: {name}(w1)"
                unknown = f"is not known; {HINTS.get(name) or f'there are {ALLOWED}'}"
                raise self.refuse(node, called if name in FUNCTIONS else unknown)
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                call, a, b = OPERATORS[type(op)], self.read(left), self.read(right)
                return lambda w: call(a(w), b(w))
            case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
                sign, x = OPERATORS[type(op)], self.read(operand)
                return lambda w: sign(x(w))
            case ast.Call(func=ast.Name(id=name) as function):
                return self._call(node, function, name)
            case ast.Call(func=function):
                raise self.refuse(function, f"can't be followed by a bracket; {PRODUCTS}")
            case ast.Tuple():
                raise self.refuse(node, "has a comma; decimals are written with a point, as in 1.5")
        raise self.refuse(node, f"is not allowed; there are {ALLOWED}")

    def _number(self, node: ast.expr, number: float) -> Tree:
        """A number of the text, as a constant."""
        try:
            constant = np.float64(number)
        except OverflowError:
            constant = np.float64(np.inf)
        if not np.isfinite(constant):
            raise self.refuse(node, "is too large a number")
        return lambda w: constant

    def _call(self, node: ast.Call, function: ast.Name, name: str) -> Tree:
        """A call of one of FUNCTIONS."""
        if name not in FUNCTIONS:
            hint = PRODUCTS if name in NAMES else HINTS.get(name) or f"there are {', '.join(FUNCTIONS)}"
            raise self.refuse(function, f"is no function here; {hint}")
        if len(node.args) != 1 or node.keywords:
            raise self.refuse(node, f"must have one argument, as in {name}(w1)")
        x = self.read(node.args[0])
        return lambda w: _apply(name, x(w))


def parse(text: str) -> Expression:
    """The function of two weights that a text describes.

    Parameters
    ----------
    text : str
        Numbers, ``w1``, ``w2``, ``pi``, ``e``, ``+ - * / **``, brackets, and the functions sin, cos, tan, asin, acos,
        atan, sinh, cosh, tanh, exp, log, log10, sqrt and abs.  At most 400 characters and 150 parts.

    Returns
    -------
    Expression
        The function, with its exact gradient.

    Raises
    ------
    ExpressionError
        If the text contains anything else, or too much.  The message names the part and says where it is.

    Notes
    -----
    The text is read by a whitelist over Python's syntax tree.  Nothing in it is ever evaluated or compiled.

    Examples
    --------
    >>> import numpy as np
    >>> from adaptive_c.explore import parse
    >>> function = parse("exp(w1) + w2**2")
    >>> function.gradient(np.array([0.0, 3.0]))
    array([1., 6.])
    """
    if not isinstance(text, str):
        raise ExpressionError(1, f"a function is given as a text, got {text!r}")
    text = text.strip()
    if not text:
        raise ExpressionError(1, "there is no function; write one such as 3*w1**2 + 10*w2**2")
    if len(text) > LENGTH:
        raise ExpressionError(LENGTH + 1, f"the function is longer than {LENGTH} characters")
    if odd := re.search(r"[^A-Za-z0-9_ .+\-*/(),]", text):
        hint = HINTS.get(odd[0]) or f"there are {ALLOWED}"
        raise ExpressionError(odd.start() + 1, f"{odd[0]!r} is not allowed; {hint}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of texts such as 1if 1else 2, which are refused below
            node = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise _unreadable(text, error) from None
    return Expression(text, _Reader(text).read(node))


def _unreadable(text: str, error: Exception) -> ExpressionError:
    """The error for a text that Python's parser refuses, in words of this page."""
    end = len(text) + 1
    place = min(getattr(error, "offset", None) or end, end)  # 0 is the end, too
    message, rest = str(getattr(error, "msg", error)), text[place - 1 :]
    if "never closed" in message:
        reason = "this bracket is not closed"
    elif "unmatched" in message:
        reason = "this bracket was not opened"
    elif not rest.strip():
        reason = "the function ends too early"
    else:
        before = re.search(r"(\w+)\s*$", text[: place - 1])
        name = before[1] if before else ""
        hint = f"{name} needs its argument in brackets: {name}(w1)" if name in FUNCTIONS else PRODUCTS
        reason = f"can't read on from {rest[:20]!r}; {hint}"
    return ExpressionError(place, reason)

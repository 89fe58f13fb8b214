"""The names of arrays, which are the keys of a dict of parameters, as JSON can hold them."""

import ast
import math
import re
from typing import Any

import numpy as np


def encoded(key: Any, where: str) -> Any:
    """A key as JSON: keys that are equal in Python get one form.  ValueError for keys that JSON can't give back."""
    if isinstance(key, tuple):
        return [encoded(x, where) for x in key]
    if key is None or isinstance(key, str):
        return None if key is None else str.__str__(key)  # also of an enumeration
    number = canonical(key)
    if isinstance(number, int) or (isinstance(number, float) and math.isfinite(number)):
        return int(number) if number == int(number) else number
    raise ValueError(
        f"{where} has the key {key!r}, which a file can't store so that another process knows it again; name the "
        "arrays by strings, numbers or tuples of them, or give a list of arrays instead of a dict: a checkpoint of a "
        "list of arrays loads into any structure"
    )


def decoded(name: Any) -> Any:
    """A key as it was before it became JSON, which has lists instead of tuples."""
    return tuple(map(decoded, name)) if isinstance(name, list) else name


def matches(name: Any, key: Any, version: int) -> bool:
    """Whether a name from a description is that of the array with this key."""
    name, key = canonical(name), canonical(key)
    if hash(name) == hash(key) and name == key:
        return True
    return version == 1 and isinstance(name, str) and (name == repr(key) or _parsed(name) == key)


def canonical(key: Any) -> Any:
    """A key without NumPy's types: np.float32(0.1) == 0.1 is true, though they are different keys of a dict."""
    if isinstance(key, tuple):
        return tuple(map(canonical, key))
    return key.item() if isinstance(key, np.generic) else key


def _parsed(name: str) -> Any:
    """A key that version 1 stored as its repr(): all but strings and ints.  NumPy 2 has np.int64(3) for NumPy 1's 3."""
    try:
        return ast.literal_eval(re.sub(r"\bnp\.\w+\(([^()]*)\)", r"\1", name))
    except (ValueError, SyntaxError):
        return name

"""The names of arrays, which are the keys of a dict of parameters, as JSON can hold them."""

from typing import Any

import numpy as np


def encoded(key: Any, where: str) -> Any:
    """A key as JSON: keys that are equal in Python get one form.  ValueError for keys that JSON can't tell again."""
    if isinstance(key, tuple):
        return [encoded(x, where) for x in key]
    if key is None or isinstance(key, str):
        return None if key is None else str(key)
    if isinstance(key, (bool, int, float, np.bool_, np.integer, np.floating)) and key == key and abs(key) < np.inf:
        return int(key) if key == int(key) else float(key)
    raise ValueError(
        f"{where} has the key {key!r}, which a file can't hold so that another process finds it again; name the arrays "
        "by strings, numbers or tuples of them, or give a list of arrays instead of a dict: a checkpoint of a list loads "
        "into any structure, too"
    )


def decoded(name: Any) -> Any:
    return tuple(map(decoded, name)) if isinstance(name, list) else name


def matches(name: Any, key: Any, version: int) -> bool:
    """Is this name from a description the name of the array with this key?"""
    if version == 1 and isinstance(name, str):  # strings and ints were stored as they are, anything else by repr()
        plain = key.item() if isinstance(key, np.generic) else key
        return name in ({key} if type(key) is str else {repr(key), repr(plain), f"np.{type(key).__name__}({plain!r})"})
    return bool(type(name) is not list and name == key)

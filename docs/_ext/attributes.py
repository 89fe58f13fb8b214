"""Links from a class's list of attributes to the class that defines them; numpydoc leaves it open which one that is."""

import re
from typing import Any

LINK = re.compile(r":obj:`(\w+) <\.\1>`")


def _linked(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    def home(match: re.Match[str]) -> str:
        owner = next(base for base in thing.__mro__ if match[1] in vars(base))
        return f":obj:`{match[1]} <{name.rpartition('.')[0]}.{owner.__name__}.{match[1]}>`"

    if what == "class":
        lines[:] = [LINK.sub(home, line) for line in lines]


def setup(app: Any) -> dict[str, Any]:
    app.connect("autodoc-process-docstring", _linked, priority=900)  # after numpydoc
    return {"parallel_read_safe": True, "parallel_write_safe": True}

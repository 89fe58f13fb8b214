"""Docstrings that are complete by themselves, in numpydoc's sections, composed when they are read.

A class says in its docstring what is particular to it: a sentence, notes (formula, source, differences), an example.
Everything else is added here from where it is known: parameters from the constructor, `_texts` and the table of
options; attributes from the docstrings of properties; and what a base class says, its errors and its own words about
options.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

from . import _texts
from ._run.options import ARGUMENTS, OPTIONS, SCHEDULABLE, SETTINGS, Choice, Format, Number, OrNone, Pair, flag

Entries = dict[str, tuple[str, str]]  # by name: type, and description
_ORDER = ("Parameters", "Attributes", "Returns", "Raises", "Notes", "Examples")


def _sections(text: str) -> dict[str, str]:
    """The sections of a docstring by their titles; the title of the part before the first one is empty."""
    first, *more = re.split(r"^(\w[\w ]*)\n-{3,}\n", inspect.cleandoc(text), flags=re.M)
    return {"": first.strip("\n"), **{title: part.strip("\n") for title, part in zip(*[iter(more)] * 2, strict=True)}}


def _entries(text: str) -> Entries:
    """The entries of a section that is a list in numpydoc's form, by name."""
    found: Entries = {}
    for head, body in re.findall(r"^(\S.*)\n((?:(?: +.*)?(?:\n|\Z))*)", text.strip("\n") + "\n", re.M):
        names, _, kind = head.partition(" : ")
        found |= dict.fromkeys(names.lower().split(", "), (kind, inspect.cleandoc(body)))
    return found


@cache
def _texts_of(about: str) -> Entries:
    """Of `_texts`.  TENSORS and RULES of the reference have the options, too."""
    said = _entries(getattr(_texts, about))
    return _texts_of("OPTIONS") | said if about in ("TENSORS", "RULES") else said


def _entry(name: str, kind: str, text: str) -> str:
    """One entry of a numpydoc section."""
    body = re.sub("^(?=.)", "    ", text, flags=re.M)
    return f"{name} : {kind}\n{body}" if kind else f"{name}\n{body}"


# --- types -----------------------------------------------------------------------------------------------------------


def _range(number: Number) -> str:
    """The range of a number as a docstring says it: `>= 0`, or `in [0, 1)`."""
    if str(number).endswith("inf)"):
        return f"{'>' if number.open_low else '>='} {number.low:g}" if "-inf" not in str(number) else ""
    return f"in {number}"


def kind(check: Any) -> str:
    """What a check of the table accepts, in words."""
    match check:
        case OrNone():
            return kind(check.check)
        case Number():
            return f"float {_range(check)}".strip()
        case Pair():
            ranges = dict.fromkeys((_range(check.first), _range(check.second)))
            return f"pair of float {' and '.join(ranges)}"
        case Choice():
            words = ", ".join(f'"{word}"' for word in check.values)
            return f"{{{words}}}" + (" or dtype" if isinstance(check, Format) else "")
    return "bool" if check is flag else ""


def _of_option(name: str, rule: Any = None, about: str = "OPTIONS") -> str:
    """The type of an option, and whether it may follow a schedule; for tensors torch has its own."""
    check = OPTIONS[name].check if name in OPTIONS else SETTINGS.get(name)
    read_once = rule.read_once if rule else ()
    moves = name == SCHEDULABLE or (name in OPTIONS and OPTIONS[name].movable and name not in read_once)
    return kind(check) + (" or schedule" if moves and about == "OPTIONS" else "")


# --- docstrings ------------------------------------------------------------------------------------------------------


class Docstring:
    """The docstring of a class, composed of `text` and what is known of the class when it is read.

    about: what its constructor takes, "OPTIONS" of arrays or of "TENSORS", or a schedule's "ARGUMENTS".  example: makes
    of the class's name and the text's example one that is complete.
    """

    def __init__(self, text: str, about: str, example: Callable[[Any, str], str]) -> None:
        self.text, self.about, self.example = text, about, example

    def __get__(self, thing: object, cls: Any) -> str:
        said, found = dict(_texts_of(self.about)), _arranged(self.text)
        for base in reversed(cls.__mro__[1:]):
            if isinstance(doc := vars(base).get("__doc__"), Docstring):
                found |= {title: part for title, part in _sections(doc.text).items() if title == "Raises"}
        said |= _entries(found.get("Parameters", ""))
        found |= {"Parameters": _parameters(cls, said, self.about), "Attributes": _attributes(cls)}
        found["Examples"] = self.example(cls.__name__, found.get("Examples", ""))
        return _joined(found)


def _joined(found: Mapping[str, str]) -> str:
    """A docstring from its sections, in numpydoc's order."""
    titled = (f"{title}\n{'-' * len(title)}\n{found[title]}" for title in _ORDER if found.get(title))
    return "\n\n".join((found[""], *titled)) + "\n"


def _arranged(text: str) -> dict[str, str]:
    """The sections of a class's own text, where the first one has summary, notes and examples."""
    found = _sections(text)
    summary, *rest = found[""].split("\n\n")
    examples = [part for part in rest if part.startswith(">>>")]
    notes = [part for part in rest if not part.startswith(">>>")]
    return {"Notes": "\n\n".join(notes), "Examples": "\n\n".join(examples), **found, "": summary}


def _parameters(thing: Any, said: Entries, about: str) -> str:
    """All that a class or function takes.  An argument without a description is listed too, and a test finds it."""
    found, rule = [], getattr(thing, "rule", None)
    for parameter in inspect.signature(thing).parameters.values():
        name = str(parameter.replace(annotation=parameter.empty, default=parameter.empty))  # with its stars
        shown, text = said.get(f"{thing.__name__.lower()}.{name}") or said.get(name, ("", ""))
        shown = shown or (kind(ARGUMENTS.get(name)) if about == "ARGUMENTS" else _of_option(name, rule, about))
        if parameter.default is None:
            shown += ", optional"
        elif parameter.default is not parameter.empty:
            value = parameter.default
            shown += f', default "{value}"' if isinstance(value, str) else f", default {value!r}"
        if name in OPTIONS and about in ("OPTIONS", "TENSORS"):
            shown += "; per group"
        found.append(_entry(name, shown, text))
    return "\n".join(found)


def _attributes(cls: Any) -> str:
    """The properties of a class in their own words, and in one entry its options that are attributes."""
    found, settings = [], []
    for name in dir(cls):
        attribute = inspect.getattr_static(cls, name)
        if name.startswith("_") or not inspect.isdatadescriptor(attribute):
            continue
        if isinstance(attribute, property):
            returned = attribute.fget.__annotations__.get("return", Any) if attribute.fget else Any
            shown = "" if returned is Any else re.sub(r"\b\w+\.", "", inspect.formatannotation(returned))
            found.append(_entry(name, shown, inspect.getdoc(attribute) or ""))
        else:
            settings.append(name)
    if settings:
        found.append(_entry(", ".join(settings), "", "The options of these names, which may be assigned."))
    return "\n".join(found)


def import_of(module: str, names: Iterable[str]) -> Callable[[str, str], str]:
    """What makes an example complete: the import of all names of a module that are called in it."""

    def complete(name: str, example: str) -> str:
        used = [known for known in names if re.search(rf"\b{known}\(", example)]
        return f">>> from {module} import {', '.join(used)}\n{example}" if used and "import" not in example else example

    return complete


def _of_rule(name: str, example: str) -> str:
    """A rule's example with the imports that it needs."""
    return example if "import" in example else f">>> import numpy as np\n>>> from adaptive_c import {name}\n{example}"


def document(cls: Any, about: str = "OPTIONS", example: Callable[[str, str], str] = _of_rule) -> None:
    """Complete the docstring of a class, and give its methods those of the base class, if there are docstrings."""
    if not cls.__doc__:  # as under -OO
        return
    cls.__doc__ = Docstring(cls.__doc__, about, example)
    for name, x in vars(cls).items():
        base = None if name.startswith("_") else inspect.getattr_static(cls.__mro__[1], name, None)
        if base is not None and (inspect.isfunction(x) or isinstance(x, property)) and not x.__doc__:
            x.__doc__ = base.__doc__


class DocOfSetting:
    """The docstring of an attribute that is an option of the optimizer as a whole, which knows its `name`."""

    def __init__(self, about: str = "OPTIONS") -> None:
        """about: the name of the table of `_texts` that has the option."""
        self._about = about

    def __get__(self, setting: Any, kind_of_setting: object) -> str | None:
        if setting is None:
            return None
        own, text = _texts_of(self._about).get(setting.name, ("", ""))
        return f"The option {setting.name}: {own or _of_option(setting.name, about=self._about)}.\n\n{text}\n"


class FullSignature:
    """The signature of a class whose constructor passes on options of every optimizer: with all of them by name."""

    def __get__(self, thing: object, cls: Any) -> inspect.Signature:
        if not cls.__init__.__module__.startswith(f"{__package__}."):
            raise AttributeError("__signature__")  # a constructor of a user's
        base = next(base for base in cls.__mro__ if "__signature__" in vars(base))
        own, all_have = (list(inspect.signature(x.__init__).parameters.values())[1:] for x in (cls, base))
        found = {x.name: x for x in own if x.kind is not x.VAR_KEYWORD}
        found |= {x.name: x for x in all_have if x.kind is x.KEYWORD_ONLY}
        return inspect.Signature([x.replace(annotation=x.empty) for x in found.values()])  # which would fill a page


def document_rules(module: Mapping[str, Any]) -> None:
    """Complete the docstrings of those functions of the reference that are rules, if there are docstrings."""
    for name, rule in module.items():
        if inspect.isfunction(rule) and rule.__doc__ and [*inspect.signature(rule).parameters][:4] == [*"pgst"]:
            rule.__doc__ = _joined({
                "": rule.__doc__,
                "Parameters": _parameters(rule, _texts_of("RULES"), "RULES"),
                "Returns": "float or array\n    The new parameter.",
                "Notes": "The code is the formula, and the kernels have the same bits.",
                "Examples": f">>> from adaptive_c.reference import {name}\n>>> state = {{}}\n"
                f">>> p = {name}(1.0, 2.0, state, 1)\n>>> p = {name}(p, 2.0, state, 2)\n>>> bool(p < 1.0)\nTrue",
            })  # fmt: skip

"""Every public name has a complete docstring in numpydoc's form, whose examples run.

What is public is walked, so that a new name is looked at by itself.
"""

import ast
import doctest
import importlib
import inspect
import json
import pydoc
import re
import subprocess
import sys
import textwrap

import pytest
from numpydoc.docscrape import NumpyDocString
from numpydoc.validate import ERROR_MSGS, validate

import adaptive_c as ac
from adaptive_c import typing as typed

# All of numpydoc's checks but these: a summary need not be followed by more text (ES01), begin with an infinitive (SS05)
# or name other functions (SA01).
CHECKS = ERROR_MSGS.keys() - {"ES01", "SS05", "SA01"}
MODULES = [
    "adaptive_c",
    "adaptive_c.schedules",
    "adaptive_c.typing",
    "adaptive_c.reference",
    "adaptive_c.figures.problems",
    "adaptive_c.explore",
]
for extra in ("torch", "mpi"):
    try:
        if extra == "mpi":
            import mpi4py

            mpi4py.rc.initialize = False  # this process is no rank of anything
        importlib.import_module(f"adaptive_c.{extra}")
    except ImportError:
        continue
    MODULES.append(f"adaptive_c.{extra}")


def names(module):
    """Those that a module exports."""
    own = [name for name, x in vars(module).items() if getattr(x, "__module__", None) == module.__name__]
    return [name for name in getattr(module, "__all__", own) if not name.startswith("_")]


def members(cls):
    """The public methods, properties and other descriptors that a class has from this library."""
    for base in cls.__mro__:
        for name, x in vars(base).items() if base.__module__.startswith("adaptive_c") else ():
            shown = inspect.isroutine(x) or inspect.isdatadescriptor(x) or isinstance(x, (classmethod, staticmethod))
            own = inspect.getattr_static(cls, name) is x and hasattr(cls, name)
            if shown and own and not name.startswith("_"):
                yield name, x


def walk():
    """Everything public by its name, each thing once."""
    for module in MODULES:
        home = importlib.import_module(module)
        yield module, home
        for name in names(home):
            thing = getattr(home, name)
            if not (inspect.isclass(thing) or inspect.isroutine(thing)):
                continue  # a module, which is in the list; an alias of types or another object, which has no docstring
            yield f"{module}.{name}", thing
            if inspect.isclass(thing):
                yield from ((f"{module}.{name}.{member}", x) for member, x in members(thing))


FIRST = {id(x): name for name, x in reversed(list(walk()))}
THINGS = {name: x for name, x in walk() if FIRST[id(x)] == name}
CALLED = [name for name, x in THINGS.items() if inspect.isclass(x) or inspect.isroutine(x)]


def named(names):
    """A parameter for each; those of the classes for tensors are there if PyTorch is."""
    torch = pytest.mark.later("torch")
    return [pytest.param(name, marks=torch if name.startswith("adaptive_c.torch") else ()) for name in names]


@pytest.mark.parametrize("name", named(THINGS))
def test_the_docstring_is_complete(name):
    """A property needs no example of its own: its class has one.  Nor has a compiled attribute words of its own."""
    if inspect.isgetsetdescriptor(THINGS[name]):
        cls, _, attribute = name.rpartition(".")
        listed = NumpyDocString(inspect.cleandoc(THINGS[cls].__doc__))["Attributes"]
        assert attribute in [part for entry in listed for part in entry.name.split(", ")]
        return
    if inspect.ismodule(THINGS[name]):  # numpydoc fails at one that defines nothing itself
        summary, *more = inspect.cleandoc(THINGS[name].__doc__).split("\n")
        assert summary[0].isupper()
        assert summary.endswith(".")
        assert not more or (more[0] == "" and len(more) > 1)
        return
    found = [f"{code}: {text}" for code, text in validate(name)["errors"] if code in CHECKS]
    assert not [error for error in found if name in CALLED or not error.startswith("EX01")]


@pytest.mark.parametrize("name", named(CALLED))
def test_every_default_is_documented(name):
    try:
        parameters = inspect.signature(THINGS[name]).parameters.values()
    except ValueError:
        pytest.skip("it is made by a compiler, and its signature is not known")
    listed = NumpyDocString(inspect.cleandoc(THINGS[name].__doc__))["Parameters"]
    types = {part: entry.type for entry in listed for part in entry.name.split(", ")}
    for x in parameters:
        if x.default is not x.empty:
            shown = json.dumps(x.default) if isinstance(x.default, str) else getattr(x.default, "__name__", x.default)
            ending = ", optional" if x.default in (None, ...) else f", default {shown}"
            assert types[x.name].removesuffix("; per group").endswith(ending), f"{x.name} : {types[x.name]}"


@pytest.mark.parametrize("name", named(name for name, x in THINGS.items() if hasattr(x, "rule") or hasattr(x, "_rule")))
def test_every_option_has_its_range_or_its_words(name):
    """But for structures of arrays, and one number that may be any."""
    listed = NumpyDocString(inspect.cleandoc(THINGS[name].__doc__))["Parameters"]
    open_ended = {"params", "bounds", "copy_to", "dampening"}
    bare = [x.name for x in listed if not re.search(r'[<>"{]|in [\[(]|bool|str', x.type) and x.name not in open_ended]
    assert len(listed) > 20
    assert not bare


@pytest.mark.parametrize("name", named(name for name in CALLED if inspect.isfunction(THINGS[name])))
def test_what_raises_says_so(name):
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(THINGS[name]))))
    raises = [node for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None]
    assert not raises or "Raises\n" in inspect.getdoc(THINGS[name])


def test_every_alias_of_a_type_is_described():
    assert [name for name in typed.__all__ if name not in typed.__doc__] == []


EXAMPLES = [name for name, thing in THINGS.items() if ">>> " in (thing.__doc__ or "")]
OF_RANKS = [name for name in EXAMPLES if name.startswith("adaptive_c.mpi")]


@pytest.mark.skipif(not OF_RANKS, reason="mpi4py is not installed: pip install 'adaptive_c[mpi]'")
def test_the_examples_of_ranks_run_as_they_stand(tmp_path):
    """In a process that is a rank: the only one."""
    for name in OF_RANKS:
        (tmp_path / name).write_text(inspect.cleandoc(THINGS[name].__doc__))
    command = [sys.executable, "-P", "-m", "doctest", "-o", "FAIL_FAST", *OF_RANKS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", named(name for name in EXAMPLES if name not in OF_RANKS))
def test_the_examples_run_as_they_stand(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = inspect.cleandoc(THINGS[name].__doc__)
    said = []
    test = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    assert not doctest.DocTestRunner(verbose=False).run(test, out=said.append).failed, "".join(said)


def test_help_is_complete_by_itself():
    """What `inspect.getdoc` gives, and with it pydoc, Sphinx and IPython."""
    text = pydoc.plain(pydoc.render_doc(ac.AdamW))
    for part in ("lr : float >= 0 or schedule, default 0.001; per group", "Clip: gradients are multiplied", "Notes",
                 "p <- p (1 - lr weight_decay)\n", "RuntimeError", "skipped_steps : int", "opt = AdamW(p",
                 "state_dtype=None"):  # fmt: skip
        assert part in text
    assert "shared" not in str(inspect.signature(ac.AdamW))
    assert inspect.getdoc(ac.AdamW) in "\n".join(line.removeprefix(" |  ") for line in text.splitlines())
    assert "Multiply the loss by ``opt.loss_scale``" in inspect.getdoc(ac.AdamW.loss_scale)


def test_classes_of_users_have_their_own_docstrings_and_signatures():
    class Plain(ac.AdamW):
        pass

    class Mine(ac.AdamW):
        """Mine."""

        def __init__(self, params, rate, **options):
            super().__init__(params, lr=rate, **options)

    assert Plain.__doc__ is None
    assert inspect.getdoc(Plain) == inspect.getdoc(ac.AdamW)
    assert inspect.signature(Plain) == inspect.signature(ac.AdamW)
    assert (Mine.__doc__, list(inspect.signature(Mine).parameters)) == ("Mine.", ["params", "rate", "options"])


def test_an_interpreter_may_have_no_docstrings():
    script = (
        "import inspect, numpy as np, adaptive_c as ac, adaptive_c.schedules, adaptive_c.typing, adaptive_c.reference\n"
        "assert ac.AdamW.__doc__ is None and ac.Optimizer.__doc__ is None and ac.schedules.cosine.__doc__ is None\n"
        "assert 'seed' in inspect.signature(ac.AdamW).parameters\n"
        "ac.AdamW(np.ones(3)).step(np.ones(3))"
    )
    subprocess.run([sys.executable, "-P", "-OO", "-c", script], check=True)

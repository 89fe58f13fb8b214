"""What type checkers see: they accept right calls and refuse wrong ones, and the types are those of the table of options."""

import ast
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest

import adaptive_c as ac
import adaptive_c.typing as typed
from adaptive_c._run.options import OPTIONS, SETTINGS, SHARED, Pair

RULES = ac.optimizers.__all__
TYPED = Path(__file__).with_name("typed")


# --- the checkers ----------------------------------------------------------------------------------------------------


def run(command, folder):
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def mypy(folder, names):
    """Line numbers, and what is said about each, by the name of the file.  PyTorch is not looked at, which takes long."""
    pytest.importorskip("mypy", reason="mypy is not installed: pip install 'adaptive_c[test]'")
    (folder / "mypy.ini").write_text("[mypy]\n[mypy-torch.*]\nfollow_imports = skip\nignore_missing_imports = True\n")
    done = run([sys.executable, "-P", "-m", "mypy", "--strict", "--no-error-summary", *names], folder)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = {name: {} for name in names}
    for name, line, text in re.findall(r"^(.+?):(\d+): error: (.*)$", done.stdout, re.M):
        found[name].setdefault(int(line), []).append(text)
    return found


def pyright(folder, names):
    """The same of basedpyright, in pyright's standard mode: it brings all that it needs, pyright itself fetches it."""
    program = shutil.which("basedpyright", path=Path(sys.executable).parent) or shutil.which("basedpyright")
    if program is None:
        pytest.skip("basedpyright is not installed: pip install 'adaptive_c[test]'")
    config = {"include": names, "typeCheckingMode": "standard", "pythonPlatform": "Linux"}
    (folder / "pyrightconfig.json").write_text(json.dumps(config))
    done = run([program, "--pythonpath", sys.executable, "--outputjson"], folder)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = {name: {} for name in names}
    for said in json.loads(done.stdout)["generalDiagnostics"]:
        if said["severity"] == "error":
            lines = found[Path(said["file"]).name]
            lines.setdefault(said["range"]["start"]["line"] + 1, []).append(said["message"])
    return found


@pytest.mark.parametrize(
    ("checker", "tensors", "marks"),
    [
        (mypy, (False, True), ("# E",)),
        (pyright, (False,), ("# E", "# E with torch")),
        pytest.param(pyright, (True,), ("# E", "# E with torch"), marks=pytest.mark.later("torch")),
    ],
    ids=["mypy", "pyright", "pyright of tensors"],
)
def test_checkers_refuse_wrong_calls_and_no_right_ones(tmp_path, checker, tensors, marks):
    """Against what is installed, from a folder of its own: the package says by py.typed that it has types."""
    names = sorted(path.name for path in TYPED.glob("*.py") if ("torch" in path.name) in tensors)
    for name in names:
        (tmp_path / name).write_text((TYPED / name).read_text())
    found = checker(tmp_path, names)
    for name in names:
        lines = (TYPED / name).read_text().splitlines()
        wanted = {i for i, line in enumerate(lines, 1) if line.endswith(marks)}
        missed = [lines[i - 1] for i in sorted(wanted - found[name].keys())]
        wrongly = [f"{lines[i - 1]}: {found[name][i]}" for i in sorted(found[name].keys() - wanted)]
        assert not missed, f"{name}: {checker.__name__} accepts {missed}"
        assert not wrongly, f"{name}: {checker.__name__} refuses {wrongly}"


# --- the types and the table of options ------------------------------------------------------------------------------

OF_SHARED, OF_GROUP = get_type_hints(typed.Shared), get_type_hints(typed.Group)
BESIDE = {
    "n_threads",
    "keep_undo",
    "uint16_as",
    "state_path",
    "state_memory",
    "state_parameters",
}  # arguments that no table has, since they stay as they are


def arguments(function):
    """The annotations of a constructor's options."""
    given = inspect.signature(function).parameters.values()
    return {x.name: x.annotation for x in given if x.name not in ("self", "params", "options", "shared", "unknown")}


def same(found, wanted, what):
    missing, more = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    assert not missing, f"{what} lacks {', '.join(sorted(missing))}"
    assert not more, f"{what} has {', '.join(sorted(more))}, which is no option"
    differing = {name: (found[name], x) for name, x in wanted.items() if found[name] != x}
    assert not differing, f"{what} differs: {differing}"


def test_shared_has_the_arguments_of_every_optimizer():
    same(OF_SHARED, arguments(ac.Optimizer.__init__), "adaptive_c.typing.Shared")
    same(dict.fromkeys(OF_SHARED), dict.fromkeys({*SHARED, *SETTINGS, *BESIDE}), "adaptive_c.typing.Shared")


@pytest.mark.parametrize("name", RULES)
def test_a_rules_arguments_have_the_types_of_a_groups_options(name):
    own = arguments(getattr(ac, name).__init__)
    same(own, {option: OF_GROUP.get(option) for option in own}, f"adaptive_c.typing.Group, for {name},")


def test_group_has_every_option_of_a_group():
    same(dict.fromkeys(OF_GROUP), dict.fromkeys({"params", *OPTIONS}), "adaptive_c.typing.Group")
    of_groups = {name: x for name, x in OF_SHARED.items() if name in SHARED}
    same({name: x for name, x in OF_GROUP.items() if name in SHARED}, of_groups, "adaptive_c.typing.Group")


def members(hint):
    """The parts of a union, None left out."""
    parts = [hint] if get_origin(hint) in (Literal, type, np.ndarray) or not get_args(hint) else get_args(hint)
    return [part for part in parts if part is not type(None)]


@pytest.mark.parametrize("name", OPTIONS)
def test_what_may_follow_a_schedule_may_be_a_function_and_a_pair_is_one(name):
    hint = OF_GROUP[name]
    if isinstance(OPTIONS[name].check, Pair):
        assert hint == typed.Pair
    elif OPTIONS[name].movable:
        assert members(hint) == members(typed.Schedulable)
    else:
        assert not any("Callable" in repr(part) for part in members(hint))


def literals(hint):
    return {word for part in members(hint) if get_origin(part) is Literal for word in get_args(part)}


def strings(name):
    """The words that an option takes, which the message about another one lists."""
    cls = next((getattr(ac, rule) for rule in RULES if name in arguments(getattr(ac, rule).__init__)), ac.SGD)
    with pytest.raises((TypeError, ValueError)) as caught:
        cls(np.ones(3, "float32"), **{name: "?"})
    return set(re.findall("'([^']+)'", str(caught.value).partition(", got")[0].partition("; ")[0]))


@pytest.mark.parametrize("name", sorted({*OF_GROUP, *OF_SHARED} - {"params", "state_path"}))  # any word is a path
def test_literals_are_the_words_that_an_option_takes(name):
    assert literals({**OF_GROUP, **OF_SHARED}[name]) == strings(name)


# --- tensors ---------------------------------------------------------------------------------------------------------


def stub():
    """The constructors of adaptive_c.torch as its stub has them: for each class, its arguments without the shared ones."""
    tree = ast.parse(Path(ac.__file__).with_name("torch").joinpath("__init__.pyi").read_text())
    for cls in (node for node in tree.body if isinstance(node, ast.ClassDef)):
        given = cls.body[0].args
        required = len(given.args) - len(given.defaults)
        places = [(x.arg, x.annotation, y) for x, y in zip(given.args, [None] * required + given.defaults, strict=True)]
        words = [(x.arg, x.annotation, y) for x, y in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
        yield cls.name, (places, words)


@pytest.mark.later("torch")
def test_the_stub_has_the_arguments_that_classes_for_tensors_have():
    pytest.importorskip("torch", minversion="2.13")
    door = importlib.import_module("adaptive_c.torch")
    shared = get_type_hints(importlib.import_module("adaptive_c.torch._types").Shared)
    found = dict(stub())
    assert found.keys() == set(door.__all__) - {"Optimizer", "in_backward"}
    for name, kinds in found.items():
        real = list(inspect.signature(getattr(door, name)).parameters.values())
        assert shared.keys() < {x.name for x in real}
        own = [x for x in real if x.name not in shared]
        for listed, is_word in zip(kinds, (False, True), strict=True):
            said = [(x, default and ast.literal_eval(default)) for x, _, default in listed if x != "self"]
            assert said == [(x.name, None if x.default is x.empty else x.default) for x in own
                            if (x.kind is x.KEYWORD_ONLY) == is_word], name  # fmt: skip
            for option, annotation, _ in listed:
                if option in OF_GROUP and option != "params":
                    assert annotated(annotation) == of_tensors(OF_GROUP[option]), (name, option)


def annotated(annotation):
    return {"bool": bool}.get(annotation.id, getattr(typed, annotation.id, annotation.id))


def of_tensors(hint):
    """What the type of an option of arrays is for tensors: a number instead of a schedule."""
    return {typed.Schedulable: "Number", typed.Pair: typed.Pair}.get(hint, hint)

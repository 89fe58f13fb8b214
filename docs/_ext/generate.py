"""What of the site is made of code: written into docs/generated before Sphinx looks for pages.

An API page for every public name; a script of the gallery for every figure; a picture of every rule at work.  PLACES
says which page the site has of a file, so that links to the file lead there.
"""

import ast
import importlib
import importlib.util
import inspect
import re
import shutil
import textwrap
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from at_work import draw
from sphinx_gallery.scrapers import figure_rst

from adaptive_c.figures import FIGURES
from adaptive_c.figures.picture import Picture, look, png

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
GENERATED = DOCS / "generated"
API, GALLERY, SCRIPTS = GENERATED / "api", GENERATED / "gallery", GENERATED / "scripts"
MODULES = ("adaptive_c", "adaptive_c.schedules", "adaptive_c.torch", "adaptive_c.mpi", "adaptive_c.typing",
           "adaptive_c.reference", "adaptive_c.explore", "adaptive_c.figures.problems")  # fmt: skip
METHODS = (FunctionType, classmethod, staticmethod, property)

COPIES = {  # pages that stand elsewhere in the repository
    **{ROOT / name: GENERATED / name.lower() for name in ("CONTRIBUTING.md", "CHANGELOG.md")},
    ROOT / "benchmarks" / "README.md": GENERATED / "benchmarks.md",
}
PLACES = {**COPIES, ROOT / "README.md": DOCS / "index.md"}


def write(path: Path, text: str) -> None:
    """Only if it is new, so that Sphinx reads again what has changed and nothing else."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def titled(title: str, *blocks: str) -> str:
    return "\n\n".join([f"{title}\n{'=' * len(title)}", *blocks]) + "\n"


# --- the API -----------------------------------------------------------------------------------------------------


def public(module: ModuleType) -> list[str]:
    """The names in __all__, or else the functions and classes that the module defines."""
    names = getattr(module, "__all__", None) or [
        name for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__ and callable(thing)
    ]  # fmt: skip
    return [name for name in names if not inspect.ismodule(getattr(module, name))]


def members(cls: type) -> list[str]:
    """A class's public methods and properties that this library defines, without those of its base `Optimizer`."""
    ours = [base for base in cls.__mro__ if base.__module__.partition(".")[0] == "adaptive_c"]
    above = next((base.__mro__ for base in ours if base is not cls and base.__name__ == "Optimizer"), ())
    return [name for owner in ours if owner not in above for name, thing in vars(owner).items()
            if not name.startswith("_") and isinstance(thing, METHODS)]  # fmt: skip


def module_page(name: str) -> None:
    """The page of a module, and a page for each of its names."""
    place = API / f"{name}.rst"
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        write(
            place, titled(name, f"This build of the site has no pages of {name}, which can't be imported:", f"{error}")
        )
        return
    names = public(module)
    if not all(inspect.isclass(getattr(module, x)) or inspect.isroutine(getattr(module, x)) for x in names):
        source = Path(module.__file__ or "").read_text()  # types and other data are best read as they are written
        lines = source.splitlines()[ast.parse(source).body[0].end_lineno :]
        code = textwrap.indent("\n".join(lines), "   ")
        write(place, titled(name, f".. automodule:: {name}", ".. code-block:: python", code))
        return
    table = "\n".join([".. autosummary::", "   :toctree: .", "   :nosignatures:", "", *(f"   {x}" for x in names)])
    write(place, titled(name, f".. automodule:: {name}", table))
    for x in names:
        thing = getattr(module, x)
        directive = f".. auto{'class' if inspect.isclass(thing) else 'function'}:: {x}"
        if inspect.isclass(thing) and members(thing):
            directive += f"\n   :members: {', '.join(members(thing))}"
        more = [f":doc:`Formula, properties and a picture </optimizers/{x}>`"] if is_rule(x) else []
        write(API / f"{name}.{x}.rst", titled(x, *more, f".. currentmodule:: {name}", directive))


def is_rule(name: str) -> bool:
    return (DOCS / "optimizers" / f"{name}.md").is_file()


# --- the gallery -------------------------------------------------------------------------------------------------

NOT_RUN = """
.. note:: This program was not run when the site was built, because {} is missing there.
"""
FIGURE = '''"""
{title}
{rule}

{doc}

:doc:`The page of the figures </figures>` says what it shows.
"""

from adaptive_c.figures import {module}

picture = {module}.{function}()
'''


def missing(script: str) -> str:
    """The first library that a program imports and that is not there."""
    found = re.findall(r"^(?:import|from) (\w+)", script, re.M)
    return next((library for library in found if importlib.util.find_spec(library) is None), "")


def programs() -> list[str]:
    """The scripts that the gallery is built from; returns the names of those that can't be run."""
    idle = []
    for script in sorted((DOCS / "gallery").iterdir()):
        text = script.read_text()
        if script.suffix == ".py" and (library := missing(text)):
            idle.append(script.stem)
            end = text.index('"""', 3)
            text = text[:end] + NOT_RUN.format(library) + text[end:]
        write(SCRIPTS / script.name, text)
        PLACES[script] = GALLERY / ("index.rst" if script.stem == "README" else f"{script.stem}.rst")
    write(SCRIPTS / "figures" / "README.rst", "The figures\n-----------\n\nEach is drawn by running the optimizers.\n")
    for name, module in FIGURES.items():
        function = name.replace("-", "_")
        doc = inspect.cleandoc(getattr(importlib.import_module(f"adaptive_c.figures.{module}"), function).__doc__)
        title = name.replace("-", " ").capitalize()
        text = FIGURE.format(title=title, rule="=" * len(title), doc=doc, module=module, function=function)
        write(SCRIPTS / "figures" / f"plot_{function}.py", text)
    return idle


def pictures(block: Any, variables: dict[str, Any], config: dict[str, Any]) -> str:
    """Save the figures of the library that a block has drawn; they are not known to pyplot."""
    paths = []
    for name, value in list(variables["example_globals"].items()):
        if isinstance(value, Picture):
            paths.append(next(variables["image_path_iterator"]))
            with look():
                png(value.figure, 120).save(paths[-1])
            del variables["example_globals"][name]  # it is shown once
    return figure_rst(paths, config["src_dir"])


# --- the rules at work -----------------------------------------------------------------------------------------------

CAPTION = """
*Left: 60 steps in the ravine 0.5 w1² + 10 w2², dark at the start and bright at the end, with the learning rate (1, 2 or
5 times a power of ten) that ends lowest without leaving the picture. Right: gradients that are given to the rule one by
one, and what it then subtracts from the weight, in units of lr, with its default options.*
"""


def at_work(rule: str) -> str:
    """The picture of a rule for its page, as Markdown."""
    path = GENERATED / "rules" / f"{rule}.png"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(rule, path)
    return f"![{rule} in a ravine, and its answer to gradients](../generated/rules/{path.name})\n{CAPTION}"


# --- at import, which is when Sphinx reads its configuration ---------------------------------------------------------

for source, place in COPIES.items():
    write(place, source.read_text())
idle = programs()
GALLERY_CONFIG: dict[str, Any] = {
    "examples_dirs": "generated/scripts",
    "gallery_dirs": "generated/gallery",
    "within_subsection_order": "FileNameSortKey",
    "filename_pattern": rf"^(?!.*/({'|'.join(idle) or 'none'})\.py)",  # one that fails is an error of the build
    "image_scrapers": ("matplotlib", pictures),
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
}
shutil.rmtree(API, ignore_errors=True)  # there may be pages of names that are gone
for name in MODULES:
    module_page(name)
    path = ROOT.joinpath(*name.split("."))
    PLACES[path / "__init__.py" if path.is_dir() else path.with_suffix(".py")] = API / f"{name}.rst"


def setup(app: Any) -> dict[str, Any]:
    return {"parallel_read_safe": True, "parallel_write_safe": True}

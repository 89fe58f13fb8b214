"""What of the site is made of code: written into docs/generated before Sphinx looks for pages.

An API page for every public name; a script of the gallery for every figure; a picture of every rule at work.  PLACES
says which page the site has of a file, so that links to the file lead there.
"""

import importlib
import inspect
import shutil
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
GENERATED = DOCS / "generated"
API = GENERATED / "api"
MODULES = ("adaptive_c", "adaptive_c.schedules", "adaptive_c.torch", "adaptive_c.mpi", "adaptive_c.typing",
           "adaptive_c.reference", "adaptive_c.figures.problems")  # fmt: skip
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
    return [name for name in names if inspect.isclass(x := getattr(module, name)) or inspect.isroutine(x)]


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
    table = "\n".join([".. autosummary::", "   :toctree: .", "   :nosignatures:", "", *(f"   {x}" for x in names)])
    write(place, titled(name, f".. automodule:: {name}", table))
    for x in names:
        thing = getattr(module, x)
        directive = f".. auto{'class' if inspect.isclass(thing) else 'function'}:: {x}"
        if inspect.isclass(thing) and members(thing):
            directive += f"\n   :members: {', '.join(members(thing))}"
        write(API / f"{name}.{x}.rst", titled(x, f".. currentmodule:: {name}", directive))


# --- the gallery -------------------------------------------------------------------------------------------------

GALLERY: dict[str, Any] = {
    "examples_dirs": [str(DOCS / "gallery")],
    "gallery_dirs": [str(GENERATED / "gallery")],
    "filename_pattern": r"\.py$",  # all are run, and one that fails is a warning, and so an error of the build
    "show_memory": False,
    "show_signature": False,
    "download_all_examples": False,
    "min_reported_time": 1e9,
    "write_computation_times": False,
}
PLACES[DOCS / "gallery" / "README.rst"] = GENERATED / "gallery" / "index.rst"
for script in (DOCS / "gallery").glob("*.py"):
    PLACES[script] = GENERATED / "gallery" / f"{script.stem}.rst"


# --- at import, which is when Sphinx reads its configuration ---------------------------------------------------------

for source, place in COPIES.items():
    write(place, source.read_text())
shutil.rmtree(API, ignore_errors=True)  # there may be pages of names that are gone
for name in MODULES:
    module_page(name)
    path = ROOT.joinpath(*name.split("."))
    PLACES[path / "__init__.py" if path.is_dir() else path.with_suffix(".py")] = API / f"{name}.rst"


def setup(app: Any) -> dict[str, Any]:
    return {"parallel_read_safe": True, "parallel_write_safe": True}

"""The figures of the field, drawn by running the library's optimizers: ``adaptive-c figures [NAME ...] --out FOLDER``.

Each figure is a function of one of the modules here, and is written as PNG and SVG, with the numbers under it as CSV
and, where there is a course to watch, as animations (GIF).  Two runs with the same versions of matplotlib and Pillow
write the same bytes.
"""

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

# The names of the figures, and the module that has the function of each.
FIGURES = {
    "ravine": "paths",
    "ball": "landscape",
    "weights": "averages",
    "first-updates": "vectors",
    "explorer": "stills",
    "amplification": "vectors",
    "smoothing": "paths",
    "quartic": "landscape",
    "bias-correction": "averages",
    "rules": "rules",
    "sensitivity": "rules",
    "narrow": "narrow",
}


def draw(names: Sequence[str], folder: Path, dpi: float = 120) -> Iterator[Path]:
    """Write the files of the named figures, and yield their paths.  Raises ImportError without matplotlib or Pillow."""
    for name in names:
        module = import_module(f"{__name__}.{FIGURES[name]}")
        yield from getattr(module, name.replace("-", "_"))().write(name, folder, dpi)

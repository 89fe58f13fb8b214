"""What the figures share: colours, a picture with its numbers, and how its files get the same bytes in every run."""

import csv
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from PIL import Image

from . import palette
from .problems import Problem, Trace

# As maps of matplotlib: dark to bright by the iteration, and the grounds of contours.
COURSE, GROUND = ListedColormap(palette.COURSE), ListedColormap(palette.GROUND)

STYLE = {
    "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "legend.fontsize": 7.5, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "0.5", "xtick.color": "0.35", "ytick.color": "0.35", "axes.grid": False, "grid.color": "0.9",
    "grid.linewidth": 0.6, "axes.axisbelow": True, "lines.linewidth": 1.4, "legend.frameon": False,
    "axes.titley": 1.0,  # where titles are without it too; each drawing of an axes would find the place again
    "svg.hashsalt": "adaptive_c",  # names in SVG files are random otherwise
}  # fmt: skip
WIDTH = 7.0  # inches: at 100 dots an inch, the width of a page


def look() -> AbstractContextManager[None]:
    """The settings above and matplotlib's own, whatever the user's are."""
    context: AbstractContextManager[None] = style.context(STYLE, after_reset=True)
    return context


@dataclass
class Movie:
    """An animation: `show(t)` moves the artists, which are drawn anew in each frame; the rest is drawn once."""

    figure: Figure
    artists: Sequence[Any]
    show: Callable[[int], None]
    frames: Sequence[int]
    pace: int  # milliseconds for each frame


@dataclass
class Picture:
    """A figure, the numbers under it, and its animations by name."""

    figure: Figure
    columns: Sequence[str]
    rows: Iterable[Sequence[Any]]
    movies: dict[str, Movie] = field(default_factory=dict)

    def write(self, name: str, folder: Path, dpi: float) -> list[Path]:
        """Write NAME.png, NAME.svg, NAME.csv, and NAME-KEY.gif for each movie."""
        paths = [folder / f"{name}.{ending}" for ending in ("png", "svg", "csv")]
        with look():
            for axes in self.figure.axes:
                axes.minorticks_off()  # of logarithmic axes: hundreds, which take longer than all the rest
            layout: Any = self.figure.get_layout_engine()
            layout.execute(self.figure)
            self.figure.set_layout_engine("none")  # keeps the places; finding them takes longer than drawing
            png(self.figure, dpi).save(paths[0], optimize=True)
            FigureCanvasSVG(self.figure).print_svg(paths[1], metadata={"Date": None})  # with images of that dpi
            with paths[2].open("w", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(self.columns)
                writer.writerows([f"{x:.12g}" if isinstance(x, float) else x for x in row] for row in self.rows)
            for key, movie in self.movies.items():
                paths.append(folder / f"{name}-{key}.gif")
                _gif(movie, paths[-1], dpi)
        return paths


def png(figure: Figure, dpi: float) -> Image.Image:
    """The picture with 256 colours, which are enough for it and take a third of the bytes.

    The canvas draws it once.  `savefig` would do so twice, to find a layout first.
    """
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return _image(canvas).quantize(256, dither=Image.Dither.NONE)


def _image(canvas: FigureCanvasAgg) -> Image.Image:
    """What was drawn, as an image of Pillow."""
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _gif(movie: Movie, path: Path, dpi: float) -> None:
    """Write an animation. Each frame draws only what moves."""
    movie.figure.set_dpi(dpi * 0.8)  # each frame counts
    canvas = FigureCanvasAgg(movie.figure)
    for axes in movie.figure.axes:
        axes.minorticks_off()
    for artist in movie.artists:
        artist.set_animated(True)
    canvas.draw()
    ground: Any = canvas.copy_from_bbox(movie.figure.bbox)
    frames: list[Image.Image] = []
    for t in (movie.frames[-1], *movie.frames):  # the last one first: what it shows has all the colours
        movie.show(t)
        canvas.restore_region(ground)
        for artist in movie.artists:
            artist.axes.draw_artist(artist)
        frame = _image(canvas)
        frames.append(frame.quantize(256, dither=Image.Dither.NONE) if not frames else
                      frame.quantize(palette=frames[0], dither=Image.Dither.NONE))  # fmt: skip
    del frames[0]
    times = [movie.pace] * (len(frames) - 1) + [2000]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)


def styled(draw: Callable[[], Picture]) -> Callable[[], Picture]:
    """A figure's function, drawn with that look."""

    def wrapped() -> Picture:
        with look():
            return draw()

    wrapped.__doc__ = draw.__doc__
    return wrapped


def contours(axes: Any, problem: Problem, levels: int = 16, power: float = 3.0, points: int = 120) -> None:
    """The error surface in grey, darker where it is lower, with levels that are closer near its bottom."""
    (left, right), (low, high) = problem.window
    grid = np.stack(np.meshgrid(np.linspace(left, right, points), np.linspace(low, high, points)))
    error = problem.value(grid)
    bottom, top = float(error.min()), float(error.max())
    steps = bottom + (top - bottom) * np.linspace(0, 1, levels + 1) ** power
    axes.contourf(grid[0], grid[1], error, steps, cmap=GROUND).set_rasterized(True)  # SVG files would have a megabyte
    axes.contour(grid[0], grid[1], error, steps, colors="white", linewidths=0.4, linestyles="solid").set_rasterized(
        True
    )
    axes.set(xlim=(left, right), ylim=(low, high))


def path(axes: Any, trace: Trace, colour: str, **more: Any) -> None:
    """The course of two weights, with a ring at its start and a dot at its end."""
    axes.plot(trace.w[:, 0], trace.w[:, 1], **{"color": colour, "marker": ".", "markersize": 3, "linewidth": 1, **more})
    axes.plot(*trace.w[0], "o", color=colour, markerfacecolor="white", markersize=5)
    axes.plot(*trace.w[-1], "o", color=colour, markersize=4)


def minimum(axes: Any, problem: Problem) -> None:
    """Mark the minima of a problem with crosses."""
    for point in problem.minima:
        axes.plot(*point, "+", color="black", markersize=7, zorder=5)


def rows_of(label: str, trace: Trace, *, state: bool = False) -> Iterable[list[Any]]:
    """The rows of a table, one for each step: label, step, weights, error, gradients."""
    for t, (w, error, gradient) in enumerate(zip(trace.w, trace.error, trace.gradient, strict=True)):
        more = [float(x) for array in trace.state.values() for x in array[t]] if state else []
        yield [label, t, *map(float, w), float(error), *map(float, gradient), *more]

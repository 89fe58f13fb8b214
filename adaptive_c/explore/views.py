"""What the page draws: the courses as data, and figures that show them.  Widgets are in page.py."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from bokeh.core.properties import value
from bokeh.models import (
    ColumnDataSource,
    Grid,
    HoverTool,
    Legend,
    LegendItem,
    LinearAxis,
    LinearColorMapper,
    LinearScale,
    LogAxis,
    LogScale,
    Range1d,
    SaveTool,
)
from bokeh.plotting import figure
from bokeh.plotting.contour import contour_data, from_contour

from ..figures.palette import BLUE, COURSE, GREEN, GROUND, RED, Colour, shades
from ..figures.problems import SYMBOLS, Array, Trace
from .settings import LANES, Lane, Settings

WIDTH = 700
SLOTS = 3  # of state arrays that a rule has
GRID = 100  # points along each side of the surface
LEVELS = [-1.0, *np.linspace(0, 1, 17)[1:]]  # of the surface's heights, 0 to 1; the lowest must be above the first

# Each lane's colour, its shades from the first iteration to the last, its mark and the dashes of its lines.
LOOKS: list[tuple[str, tuple[Colour, Colour], str, str]] = [
    (BLUE, (COURSE[0], COURSE[-1]), "circle", "solid"),
    (RED, ((0.42, 0.15, 0.00), (1.00, 0.60, 0.20)), "triangle", "dashed"),
    (GREEN, ((0.00, 0.25, 0.15), (0.25, 0.85, 0.60)), "square", "dotdash"),
]

# Of a course, after t steps; part is t as a part of all steps.
COLUMNS = ("t", "part", "w1", "w2", "error", "g1", "g2", "v1", "v2",
           *(f"state{slot}_{k}" for slot in range(SLOTS) for k in (1, 2)))  # fmt: skip


def hexes(colours: Sequence[Colour]) -> list[str]:
    """Colours as browsers read them."""
    return ["#" + "".join(f"{round(255 * x):02x}" for x in colour) for colour in colours]


def send(source: ColumnDataSource, columns: Mapping[str, Array]) -> None:
    """Give a source these columns.  A browser is sent those that have changed, all in one message."""
    changed = {name: x for name, x in columns.items() if x.tobytes() != source.data[name].tobytes()}
    if changed:
        source.data.update(changed)


class Course:
    """One lane: the course of its optimizer as columns, and how it looks."""

    def __init__(self, i: int) -> None:
        self.name = LANES[i]
        self.colour, ends, self.mark, self.dashes = LOOKS[i]
        self.palette = hexes(shades(*ends))
        self.label = ""
        self.symbols: list[str] = []
        self.hover = HoverTool(visible=False, limit=1)
        self.lost: int | None = None  # the first step after which a weight is no finite number
        self.columns: dict[str, Array] = {}
        self.source = ColumnDataSource({name: np.empty(0) for name in COLUMNS}, name=f"course {self.name}")

    def fill(self, lane: Lane | None, x: Trace | None) -> None:
        """Make the columns of a course.  Where there is nothing to draw they are NaN."""
        if lane is None or x is None:
            self.label, self.symbols, self.lost, self.columns = "", [], None, {}
            return
        self.label = f"{self.name}: {lane.rule}"
        self.symbols = [SYMBOLS.get(name, name) for name in x.state]
        finite = np.isfinite(x.w).all(axis=1)
        self.lost = None if finite.all() else int(finite.argmin())
        w = _kept(x.w, np.abs(x.w) < 1e9)  # beyond it, browsers draw lines that are not there
        update = np.vstack([np.full(2, np.nan), x.update])
        self.columns = {
            "w1": w[:, 0], "w2": w[:, 1], "error": _kept(x.error, np.abs(x.error) < 1e300),
            "g1": x.gradient[:, 0], "g2": x.gradient[:, 1], "v1": update[:, 0], "v2": update[:, 1],
        }  # fmt: skip
        for slot, state in enumerate(x.state.values()):
            for k in (1, 2):
                self.columns[f"state{slot}_{k}"] = _kept(state[:, k - 1], np.abs(state[:, k - 1]) < 1e300)

    def publish(self, steps: int) -> None:
        """Show the course."""
        t, nothing = np.arange(steps + 1), np.full(steps + 1, np.nan)
        send(self.source, {**dict.fromkeys(COLUMNS, nothing), "t": t, "part": t / steps, **self.columns})

    def line(self, f: Any, x: str, y: str, **more: Any) -> Any:
        """Draw a line into figure `f`, through two columns of the course."""
        return f.line(x, y, source=self.source, **{"color": self.colour, **more})

    def marks(self, f: Any, source: ColumnDataSource, size: float) -> Any:
        """The points of a course, dark to bright with the iteration."""
        colour = {"field": "part", "transform": LinearColorMapper(palette=self.palette, low=0, high=1)}
        return f.scatter("w1", "w2", source=source, marker=self.mark, size=size, line_color=None, fill_color=colour)

    @property
    def tooltips(self) -> list[tuple[str, str]]:
        """What is shown beside a point under the mouse."""
        state = [(symbol, f"(@state{slot}_1, @state{slot}_2)") for slot, symbol in enumerate(self.symbols)]
        return [(self.name, "after @t steps"), ("w", "(@w1, @w2)"), ("error", "@error"), ("gradient", "(@g1, @g2)"),
                *state, ("v", "(@v1, @v2)")]  # fmt: skip


def _kept(x: Array, which: Array) -> Array:
    """The numbers where a condition holds, and NaN elsewhere."""
    return np.where(which, x, np.nan)


def fit(axis: Range1d, low: float, high: float) -> None:
    """Have an axis show these values, also after it is reset."""
    axis.update(start=low, end=high, reset_start=low, reset_end=high)


def _spread(low: float, high: float) -> tuple[float, float]:
    """The ends of an axis that shows these values."""
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin


def _legend(items: list[LegendItem], **more: Any) -> Legend:
    """A legend above a figure, whose entries hide and show what they name."""
    return Legend(items=items, click_policy="hide", orientation="horizontal", label_text_font_size="9pt", padding=2,
                  spacing=14, border_line_color=None, glyph_width=26, **more)  # fmt: skip


def slim(axis: Any, standoff: int) -> None:
    """Make an axis that is drawn fast: a browser measures each label of its ticks in every drawing.

    The axis's own label is at a fixed distance.  If it made way for the labels of the ticks, longer ones would have
    the browser lay out the whole page anew.
    """
    axis.ticker.desired_num_ticks = 5
    axis.minor_tick_line_color = None
    axis.axis_label_standoff_mode, axis.axis_label_standoff = "axis", standoff


def framed(name: str, title: str | None = None, **more: Any) -> Any:
    """A figure with its name, which is that of the file too when its picture is saved."""
    f = figure(name=name, title=title, tools="pan,wheel_zoom,reset", **more)
    for axis in f.xaxis:
        slim(axis, 26)
    for axis in f.yaxis:
        slim(axis, 56)
    f.add_tools(SaveTool(filename=f"adaptive-c {name}".replace(" ", "-")))
    return f


class Surface:
    """The error surface in grey, darker where it is lower, with the courses over it."""

    def __init__(self, courses: list[Course]) -> None:
        self.courses = courses
        self.x, self.y = Range1d(-1, 1), Range1d(-1, 1)
        self.figure = framed("surface", width=WIDTH, height=430, x_range=self.x, y_range=self.y, x_axis_label="w1",
                             y_axis_label="w2")  # fmt: skip
        self.figure.background_fill_color = "#F6DED3"  # where the function has no value
        self.figure.center = []  # no grid
        side = np.linspace(-1, 1, 3)
        self.contours = from_contour(side, side, np.outer(side, side) ** 2, LEVELS,
                                     fill_color=hexes(shades(GROUND[0], GROUND[-1], len(LEVELS) - 1)),
                                     line_color="white", line_width=0.7)  # fmt: skip
        self.figure.renderers.append(self.contours)
        self.items = []
        for course in courses:
            line = course.line(self.figure, "w1", "w2", line_width=0.8)
            marks = course.marks(self.figure, course.source, size=6)
            self.items.append(LegendItem(label=value(""), renderers=[line, marks], visible=False))
            course.hover.renderers = [marks]
            self.figure.add_tools(course.hover)
        self.start = self.figure.scatter([0.0], [0.0], size=10, fill_color="white", line_color="black", line_width=1.5)
        self.start.data_source.name = "start"
        self.figure.add_layout(_legend(self.items, name="courses"), "above")

    def show(self, settings: Settings, error: Array | None) -> None:
        """Move to the settings; `error` is the function over the window, None if neither of them has changed."""
        for course, item in zip(self.courses, self.items, strict=True):
            item.label, item.visible = value(course.label), bool(course.label)
            course.hover.tooltips = course.tooltips
        start = {"x": [settings.start[0]], "y": [settings.start[1]]}
        if self.start.data_source.data != start:
            self.start.data_source.data = start
        if error is None:
            return
        for axis, (low, high) in zip((self.x, self.y), settings.window, strict=True):
            if (axis.start, axis.end) != (low, high):
                fit(axis, low, high)
        sides = [np.linspace(*span, GRID) for span in settings.window]
        self.contours.set_data(contour_data(*sides, heights(error), LEVELS))


def grid(settings: Settings) -> Array:
    """The function over the window: (GRID, GRID)."""
    return settings.problem.value(np.stack(np.meshgrid(*(np.linspace(*span, GRID) for span in settings.window))))


def heights(error: Array) -> Any:
    """The error from 0 to 1, its lower parts stretched; masked where it is infinite or NaN."""
    known = np.isfinite(error)
    low, high = (float(error[known].min()), float(error[known].max())) if known.any() else (0.0, 1.0)
    with np.errstate(all="ignore"):  # quarters, because differences of large numbers would overflow
        height = (error / 4 - low / 4) / (high / 4 - low / 4) if low < high else np.full(error.shape, 0.5)
        return np.ma.masked_array(np.clip(height, 0, 1) ** (1 / 3), ~known)


class Errors:
    """The error over the iterations.  Its axis is logarithmic where no error of the surface is negative."""

    def __init__(self, courses: list[Course], iterations: Range1d, surface: Surface) -> None:
        self.courses = courses
        self.figure = f = framed("error", width=WIDTH, height=170, y_axis_type=None, y_range=Range1d(0.1, 1),
                                 x_range=iterations)  # fmt: skip
        self.guides: dict[Any, tuple[Any, Any]] = {}  # the axis and the grid of each scale
        for scale, axis in ((LinearScale, LinearAxis(axis_label="error")), (LogScale, LogAxis(axis_label="error"))):
            slim(axis, 56)
            self.guides[scale] = axis, Grid(dimension=1, axis=axis)
            f.add_layout(axis, "left")
            f.add_layout(self.guides[scale][1])
        for course, item in zip(courses, surface.items, strict=True):
            line = course.line(f, "t", "error", line_dash=course.dashes, line_width=1.6)
            item.renderers[0].js_link("visible", line, "visible")  # the legend of the surface hides both

    def show(self, settings: Settings, bottom: float, top: float) -> None:
        """Fit the axes; bottom and top are those of the error over the window."""
        shown = [course.columns["error"] for course in self.courses if course.columns]
        errors = np.concatenate([*shown, np.empty(0)])
        errors = errors[np.isfinite(errors)]
        first = [float(error[0]) for error in shown]
        limit = max([top, *[abs(x) for x in first if np.isfinite(x)]]) * 10  # what has diverged is not shown whole
        some = errors[errors <= limit]
        scale = LogScale if bottom >= 0 and (not some.size or some.min() >= 0) else LinearScale
        if scale is LogScale:
            some = some[some > 0]
        low, high = (float(some.min()), float(some.max())) if some.size else (0.1, 1.0)
        if scale is LogScale:
            low = 10.0 ** math.floor(math.log10(max(low, high * 1e-16)))  # whole powers, so that it rarely moves
            high = 10.0 ** math.ceil(math.log10(high) + 1e-9)
        else:
            low, high = _spread(low, high)
        fit(self.figure.y_range, low, high)
        if not isinstance(self.figure.y_scale, scale):
            self.figure.y_scale = scale()
        for other, guides in self.guides.items():
            for guide in guides:
                guide.visible = other is scale


_NOTHING = {name: np.full(1, np.nan) for name in ("t", "1", "2")}  # a point, without which legends show no line


class Part:
    """One part of the state of one lane: two lines, for w1 and w2, which have data only while they are shown."""

    def __init__(self, f: Any, course: Course, slot: int) -> None:
        self.course, self.slot = course, slot
        self.source = ColumnDataSource(_NOTHING, name=f"state {course.name}{slot}")
        colour = (course.colour, course.palette[-1], course.palette[0])[slot]
        self.lines = [f.line("t", k, source=self.source, color=colour, line_width=1.6, visible=False,
                             line_dash="solid" if k == "1" else "dotted") for k in ("1", "2")]  # fmt: skip
        self.item = LegendItem(label=value(""), renderers=self.lines, visible=False)

    def fill(self) -> list[Array]:
        """Give the lines their data, or take it away, and return the values."""
        columns = self.course.columns
        first, second = (columns.get(f"state{self.slot}_{k}", _NOTHING[k]) for k in ("1", "2"))
        shown = self.lines[0].visible and first is not _NOTHING["1"]
        send(self.source, {"t": np.arange(len(first)), "1": first, "2": second} if shown else _NOTHING)
        return [self.source.data["1"], self.source.data["2"]]


class State:
    """The optimizers' state over the iterations; the legend switches each part on and off."""

    def __init__(self, courses: list[Course], iterations: Range1d) -> None:
        self.courses = courses
        self.figure = framed("state", width=WIDTH, height=210, y_axis_label="state", x_axis_label="iteration",
                             x_range=iterations, y_range=Range1d(0, 1))  # fmt: skip
        self.parts = [[Part(self.figure, course, slot) for slot in range(SLOTS)] for course in courses]
        self.items = [[part.item for part in parts] for parts in self.parts]
        self.flat = [item for items in self.items for item in items]
        for item in self.flat:
            item.renderers[0].on_change("visible", lambda attr, old, new: self.fill())
        self.figure.add_layout(_legend(self.flat, name="states", ncols=5), "above")

    def show(self) -> None:
        """Bring the legend and the axis up to date with the courses."""
        before = [item.label for item in self.flat]
        for course, items in zip(self.courses, self.items, strict=True):
            for slot, item in enumerate(items):
                used = slot < len(course.symbols)
                s = course.symbols[slot] if used else ""
                item.label, item.visible = value(f"{course.name}: {s}1, {s}2 (dotted)" if used else ""), used
        used_items = [item for item in self.flat if item.visible]
        shown = any(item.renderers[0].visible for item in used_items)
        if used_items and not shown and before != [item.label for item in self.flat]:  # other parts: one to begin with
            for line in used_items[0].renderers:
                line.visible = True
        self.fill()

    def fill(self) -> None:
        """Give each part its data, and fit the axis to what is shown.

        An axis that a browser fits to its data would be drawn twice, before and after it has been fitted.
        """
        values = np.concatenate([column for parts in self.parts for part in parts for column in part.fill()])
        values = values[np.isfinite(values)]
        if values.size:
            fit(self.figure.y_range, *_spread(float(values.min()), float(values.max())))

"""What the page draws: the courses as data, and figures that show them.  Widgets are in page.py."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from bokeh.core.properties import value
from bokeh.models import ColumnDataSource, HoverTool, Legend, LegendItem, LinearColorMapper, Range1d, SaveTool
from bokeh.plotting import figure
from bokeh.plotting.contour import contour_data, from_contour

from ..figures.palette import BLUE, COURSE, GREEN, GROUND, RED, Colour, shades
from ..figures.problems import Array, Trace
from .settings import LANES, Lane, Settings

WIDTH = 700
SLOTS = 3  # of state arrays that a rule has
GRID = 100  # points along each side of the surface
LEVELS = 16

# Each lane's colour, its shades from the first iteration to the last, its mark and the dashes of its lines.
LOOKS: list[tuple[str, tuple[Colour, Colour], str, str]] = [
    (BLUE, (COURSE[0], COURSE[-1]), "circle", "solid"),
    (RED, ((0.42, 0.15, 0.00), (1.00, 0.60, 0.20)), "triangle", "dashed"),
    (GREEN, ((0.00, 0.25, 0.15), (0.25, 0.85, 0.60)), "square", "dotdash"),
]
# What the arrays of the optimizers' state are called in formulas.
SYMBOLS = {"square_avg": "s", "exp_avg_sq": "s", "sum": "s", "exp_avg": "m", "momentum_buffer": "b",
           "step_size": "rate", "acc_delta": "u", "exp_inf": "u", "prev": "sign"}  # fmt: skip


def hexes(colours: Sequence[Colour]) -> list[str]:
    return ["#" + "".join(f"{round(255 * x):02x}" for x in colour) for colour in colours]


class Course:
    """The course of one lane's optimizer, as data that several figures share."""

    def __init__(self, i: int) -> None:
        self.name = LANES[i]
        self.colour, ends, self.mark, self.dashes = LOOKS[i]
        self.shades = LinearColorMapper(palette=hexes(shades(*ends)), low=0, high=1)
        self.source = ColumnDataSource(name=f"course {self.name}")
        self.label = ""
        self.symbols: list[str] = []
        self.hover = HoverTool(visible=False, limit=1)
        self.lost: int | None = None  # the first step after which a weight is no finite number
        self.fill(None, None)

    def fill(self, lane: Lane | None, x: Trace | None) -> None:
        """Put a course into the source, all at once; None empties it."""
        if lane is None or x is None:
            self.label, self.symbols, self.lost = "", [], None
            empty = ("t", "w1", "w2", "error", "positive", "g1", "g2", "v1", "v2")
            self.source.data = {name: np.empty(0) for name in (*empty, *self._slots())}
            return
        self.label = f"{self.name}: {lane.rule}, lr {lane.numbers['lr']:g}"
        self.symbols = [SYMBOLS.get(name, name) for name in x.state]
        finite = np.isfinite(x.w).all(axis=1)
        self.lost = None if finite.all() else int(finite.argmin())
        w = np.where(np.abs(x.w) < 1e9, x.w, np.nan)  # beyond it, browsers draw lines that are not there
        update = np.vstack([np.full(2, np.nan), x.update])
        data = {
            "t": np.arange(len(x.error)), "w1": w[:, 0], "w2": w[:, 1],
            "error": _kept(x.error, np.abs(x.error) < 1e300),
            "positive": _kept(x.error, (x.error > 0) & (x.error < 1e300)), "g1": x.gradient[:, 0],
            "g2": x.gradient[:, 1], "v1": update[:, 0], "v2": update[:, 1],
        }  # fmt: skip
        states = list(x.state.values())
        for slot, name in enumerate(self._slots()):
            column = states[slot // 2][:, slot % 2] if slot // 2 < len(states) else np.full(len(x.error), np.nan)
            data[name] = _kept(column, np.abs(column) < 1e300)
        self.shades.high = max(len(x.error) - 1, 1)
        self.source.data = data

    @staticmethod
    def _slots() -> list[str]:
        """The columns of the state: the components of each array."""
        return [f"state{slot}_{k}" for slot in range(SLOTS) for k in (1, 2)]

    @property
    def tooltips(self) -> list[tuple[str, str]]:
        state = [(symbol, f"(@state{slot}_1, @state{slot}_2)") for slot, symbol in enumerate(self.symbols)]
        return [(self.name, "after @t steps"), ("w", "(@w1, @w2)"), ("error", "@error"), ("gradient", "(@g1, @g2)"),
                *state, ("v", "(@v1, @v2)")]  # fmt: skip


def _kept(x: Array, which: Array) -> Array:
    return np.where(which, x, np.nan)


def _legend(items: list[LegendItem], **more: Any) -> Legend:
    return Legend(items=items, click_policy="hide", orientation="horizontal", label_text_font_size="9pt", padding=2,
                  spacing=14, border_line_color=None, glyph_width=26, **more)  # fmt: skip


def framed(name: str, **more: Any) -> Any:
    """A figure with its name, which is that of the file too when its picture is saved."""
    f = figure(name=name, tools="pan,wheel_zoom,reset", **more)
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
        self.figure.grid.visible = False
        side = np.linspace(-1, 1, 3)
        levels = np.linspace(0, 1, LEVELS + 1)
        self.contours = from_contour(side, side, np.outer(side, side) ** 2, list(levels),
                                     fill_color=hexes(shades(GROUND[0], GROUND[-1], LEVELS)), line_color="white",
                                     line_width=0.7)  # fmt: skip
        self.figure.renderers.append(self.contours)
        self.items = []
        for course in courses:
            line = self.figure.line("w1", "w2", source=course.source, color=course.colour, line_width=0.8)
            marks = self.figure.scatter("w1", "w2", source=course.source, size=6, marker=course.mark, line_color=None,
                                        fill_color={"field": "t", "transform": course.shades})  # fmt: skip
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
        self.start.data_source.data = {"x": [settings.start[0]], "y": [settings.start[1]]}
        if error is None:
            return
        for axis, (low, high) in zip((self.x, self.y), settings.window, strict=True):
            if (axis.start, axis.end) != (low, high):
                axis.start, axis.end = low, high
        sides = [np.linspace(*span, GRID) for span in settings.window]
        self.contours.set_data(contour_data(*sides, heights(error), list(np.linspace(0, 1, LEVELS + 1))))


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
        self.figures = {}
        for kind, column in (("log", "positive"), ("linear", "error")):
            f = framed(f"{kind} error", width=WIDTH, height=170, y_axis_type=kind, y_range=Range1d(0.1, 1),
                       x_range=iterations, y_axis_label="error", visible=kind == "log")  # fmt: skip
            f.yaxis.minor_tick_line_color = None
            f.yaxis.ticker.desired_num_ticks = 5
            for course, item in zip(courses, surface.items, strict=True):
                line = f.line("t", column, source=course.source, color=course.colour, line_dash=course.dashes)
                marks = f.scatter("t", column, source=course.source, size=3, marker=course.mark, line_color=None,
                                  fill_color={"field": "t", "transform": course.shades})  # fmt: skip
                for here in (line, marks):  # the legend of the surface hides the error, too
                    item.renderers[0].js_link("visible", here, "visible")
            self.figures[kind] = f

    def show(self, settings: Settings, bottom: float, top: float) -> None:
        """Fit the axes; bottom and top are those of the error over the window."""
        errors = np.concatenate([course.source.data["error"] for course in self.courses])
        errors = errors[np.isfinite(errors)]
        first = [float(course.source.data["error"][0]) for course in self.courses if course.label]
        limit = max([top, *[abs(x) for x in first if np.isfinite(x)]]) * 10  # what has diverged is not shown whole
        some = errors[errors <= limit]
        kind = "log" if bottom >= 0 and (not some.size or some.min() >= 0) else "linear"
        if kind == "log":
            some = some[some > 0]
        low, high = (float(some.min()), float(some.max())) if some.size else (0.1, 1.0)
        if kind == "log":
            low, high = max(low, high * 1e-16) / 1.5, high * 1.5
        else:
            margin = 0.05 * (high - low) or 0.5
            low, high = low - margin, high + margin
        shown = self.figures[kind]
        shown.y_range.start, shown.y_range.end = low, high
        for f in self.figures.values():
            f.visible = f is shown


class State:
    """The optimizers' state over the iterations, of which the legend switches each part on and off."""

    def __init__(self, courses: list[Course], iterations: Range1d) -> None:
        self.courses = courses
        self.figure = framed("state", width=WIDTH, height=210, y_axis_label="state", x_axis_label="iteration",
                             x_range=iterations)  # fmt: skip
        self.figure.y_range.only_visible = True
        self.items: list[list[LegendItem]] = []
        for course in courses:
            items = []
            for slot in range(SLOTS):
                colour = (course.colour, *course.shades.palette[-1:], *course.shades.palette[:1])[slot]
                lines = [self.figure.line("t", f"state{slot}_{k}", source=course.source, color=colour, line_width=1.6,
                                          line_dash="solid" if k == 1 else "dotted", visible=False)
                         for k in (1, 2)]  # fmt: skip
                items.append(LegendItem(label=value(""), renderers=lines, visible=False))
            self.items.append(items)
        for line in self.items[0][0].renderers:  # one to begin with
            line.visible = True
        flat = [item for items in self.items for item in items]
        self.figure.add_layout(_legend(flat, name="states", ncols=5), "above")

    def show(self) -> None:
        for course, items in zip(self.courses, self.items, strict=True):
            for slot, item in enumerate(items):
                used = slot < len(course.symbols)
                s = course.symbols[slot] if used else ""
                item.label, item.visible = value(f"{course.name}: {s}1, {s}2 (dotted)" if used else ""), used

"""Two closer looks: the first two updates with their vectors, and how much RMSprop lengthens or shortens a gradient."""

import html
from typing import Any

import numpy as np
from bokeh.layouts import column, row
from bokeh.models import (
    Arrow,
    ColorBar,
    ColumnDataSource,
    Div,
    HoverTool,
    LinearColorMapper,
    NormalHead,
    Range1d,
)
from bokeh.palettes import RdBu11, interp_palette
from bokeh.plotting.contour import contour_data, from_contour

from ..figures.palette import BLACK
from ..figures.problems import Trace, amplified
from .views import COLUMNS, Course, framed

ARROW = ("x_start", "y_start", "x_end", "y_end")


def _arrows(f: Any, colour: str, width: float, name: str) -> ColumnDataSource:
    """Arrows in a figure, from the rows of a source."""
    source = ColumnDataSource({key: [] for key in ARROW}, name=name)
    f.add_layout(Arrow(end=NormalHead(size=5 + 3 * width, fill_color=colour, line_color=colour), line_color=colour,
                       line_width=width, source=source, **{key: key for key in ARROW}))  # fmt: skip
    return source


class FirstUpdates:
    """The first two updates of each optimizer, and the directions of the vectors at the start."""

    def __init__(self, courses: list[Course]) -> None:
        self.courses = courses
        self.sources = [ColumnDataSource({name: [] for name in COLUMNS}, name=f"first {x.name}") for x in courses]
        self.x, self.y = Range1d(0, 1), Range1d(0, 1)
        f = framed("first updates", width=470, height=430, x_range=self.x, y_range=self.y, x_axis_label="w1",
                   y_axis_label="w2", title="the first two updates")  # fmt: skip
        turned = framed("directions", frame_width=290, frame_height=290, x_range=(-1.15, 1.15), y_range=(-1.15, 1.15),
                        title="directions at the start, each of length 1")  # fmt: skip
        turned.axis.visible = turned.grid.visible = False
        circle = np.linspace(0, 2 * np.pi, 100)
        turned.line(np.cos(circle), np.sin(circle), color="#dddddd")
        self.steps, self.directions, self.hovers = [], [], []
        self.gradient = _arrows(turned, "#999999", 6, "direction of -gradient")
        self.weights = _arrows(turned, BLACK, 2, "direction of w")
        # The widths are such that one shows under another.
        for course, source, width in zip(courses, self.sources, (4.5, 3, 1.5), strict=True):
            points = course.marks(f, source, size=9)
            self.hovers.append(HoverTool(renderers=[points], visible=False))
            f.add_tools(self.hovers[-1])
            self.steps.append(_arrows(f, course.colour, width, f"updates {course.name}"))
            self.directions.append(_arrows(turned, course.colour, width, f"direction {course.name}"))
        self.numbers = Div(name="first numbers")
        self.layout = column(row(f, turned), self.numbers)

    def show(self, traces: list[Trace | None]) -> None:
        """Draw the first two updates of each run, and write their numbers into the table."""
        some = [x for x in traces if x is not None]
        for i, x in enumerate(traces):
            self.sources[i].data = {name: column[:3] for name, column in self.courses[i].source.data.items()}
            w = np.empty((1, 2)) if x is None else x.w[:3]
            self.hovers[i].tooltips = self.courses[i].tooltips
            self.steps[i].data = dict(zip(ARROW, np.hstack([w[:-1], w[1:]]).T.tolist(), strict=True))
            self.directions[i].data = _unit(np.zeros(2) if x is None else w[1] - w[0])
        if some:
            x = some[0]
            self.gradient.data, self.weights.data = _unit(-x.gradient[0]), _unit(x.w[0])
            points = np.concatenate([x.w[:3] for x in some])
            points = points[(np.abs(points) < 1e9).all(axis=1)]
            for k, axis in enumerate((self.x, self.y) if len(points) else ()):
                low, high = points[:, k].min(), points[:, k].max()
                margin = 0.15 * (high - low) or 0.5
                axis.start, axis.end = float(low - margin), float(high + margin)
        self.numbers.text = _table(self.courses, traces)


def _unit(vector: Any) -> dict[str, list[float]]:
    """An arrow from 0 in the direction of a vector; none where it has none."""
    length = float(np.hypot(*vector))
    ends = (vector / length).tolist() if 0 < length < np.inf else []
    return dict(zip(ARROW, ([0.0] * bool(ends), [0.0] * bool(ends), ends[:1], ends[1:]), strict=True))


def _table(courses: list[Course], traces: list[Trace | None]) -> str:
    """The vectors as numbers."""
    rows = [
        "<tr><th></th><th>t</th><th>w(t)</th><th>gradient at w(t)</th><th>v(t) = w(t-1) - w(t)</th><th>state</th></tr>"
    ]
    for course, x in zip(courses, traces, strict=True):
        for t in range(min(3, len(x.w)) if x is not None else 0):
            assert x is not None
            state = [f"{symbol}({t}) = {_pair(array[t])}"
                     for symbol, array in zip(course.symbols, x.state.values(), strict=True)]  # fmt: skip
            cells = [course.label if t == 0 else "", str(t), _pair(x.w[t]), _pair(x.gradient[t]),
                     _pair(x.update[t - 1]) if t else "", "; ".join(state)]  # fmt: skip
            rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    arrows = "The black arrow points to w(0), and the grey one against the gradient there."
    return f"<table cellpadding=4>{''.join(rows)}</table><p>{arrows}</p>"


def _pair(x: Any) -> str:
    """Two numbers as the table shows them."""
    return f"({x[0]:.6g}, {x[1]:.6g})"


class Amplification:
    """How much RMSprop's second update is longer or shorter than the second gradient, over both gradients."""

    def __init__(self) -> None:
        self.beta: float | None = None  # what is shown
        self.side = np.linspace(-4, 4, 160)
        self.gradients = np.meshgrid(self.side, self.side)
        f = framed("amplification", width=560, height=500, x_range=(-4, 4), y_range=(-4, 4),
                   x_axis_label="g1, the first gradient", y_axis_label="g2, the second gradient")  # fmt: skip
        colours = LinearColorMapper(palette=interp_palette(RdBu11, 128), low=-4, high=4)
        self.source = ColumnDataSource({"c": [np.zeros((2, 2))]}, name="amplified")  # until it is looked at
        image = f.image("c", x=-4, y=-4, dw=8, dh=8, source=self.source, color_mapper=colours)
        f.add_tools(HoverTool(renderers=[image], tooltips=[("(g1, g2)", "($x, $y)"), ("C", "@c")], visible=False))
        f.add_layout(ColorBar(color_mapper=colours, title="C", width=12), "right")
        text = Div(width=700, text="How much longer (red) or shorter (blue) than the second gradient RMSprop's second "
                   "update is: C = |v(2)| - |g2|, with lr 1. Along the black line they are equally long.")  # fmt: skip
        self.zero = from_contour([-4, 4], [-4, 4], np.zeros((2, 2)), [0.0], line_color=BLACK, line_width=1.5)
        f.renderers.append(self.zero)
        self.layout = column(text, f)

    def show(self, beta: Any) -> None:
        """Draw the map for another beta."""
        if beta == self.beta or not isinstance(beta, (int, float)) or not 0 <= beta <= 1:
            return
        self.beta = beta
        c = amplified(beta, *self.gradients)
        self.source.data = {"c": [c]}
        self.zero.set_data(contour_data(self.side, self.side, c, [0.0], want_fill=False))

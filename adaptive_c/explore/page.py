"""The page: widgets, and what follows from their values."""

import html
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from bokeh.document import Document
from bokeh.events import RangesUpdate, Tap
from bokeh.layouts import column, row
from bokeh.models import (
    Button,
    CategoricalSlider,
    CustomJS,
    Div,
    NumericInput,
    PreText,
    Range1d,
    Select,
    Slider,
    TabPanel,
    Tabs,
    TextInput,
)

from .. import optimizers
from ..figures.problems import PLANE, Trace
from .expression import ExpressionError
from .settings import LANES, MOST_STEPS, NUMBERS, SCHEDULES, Lane, Settings, defaults, reads_lr_once
from .updates import Amplification, FirstUpdates
from .views import Course, Errors, State, Surface, grid

# What the sliders offer; a link may hold any number, which is then offered too.
_RATES = [float(f"{digits}e{decade}") for decade in range(-5, 1)
          for digits in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)] + [10.0]  # fmt: skip
_DECAYS = [0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 0.9995, 0.9999]
_EPS = [0.0, 1e-16, 1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0]
OFFERED = {"lr": _RATES, "beta1": _DECAYS, "beta2": _DECAYS, "alpha": [*_DECAYS, 1.0], "rho": [*_DECAYS, 1.0],
           "eps": _EPS, "momentum": _DECAYS}  # fmt: skip
OWN, NONE = "a function of your own", "none"
FIRST = Settings(
    lanes=(Lane("RMSprop", {"lr": 0.5, "alpha": 0.9}), Lane("SGD", {"lr": 0.02}), Lane("Adam", {"lr": 1.0}))
)


class LaneWidgets:
    """The widgets of one optimizer."""

    def __init__(self, name: str) -> None:
        self.rule = Select(title="rule", value=NONE, options=[NONE, *optimizers.__all__], name=f"rule {name}")
        self.numbers = {key: CategoricalSlider(title=key, categories=[repr(x) for x in OFFERED[key]],
                                               value=repr(OFFERED[key][0]), name=f"{key} {name}")
                        for key in NUMBERS}  # fmt: skip
        self.schedule = Select(
            title="schedule of lr", value="constant", options=list(SCHEDULES), name=f"schedule {name}"
        )
        self.layout = column(self.rule, *self.numbers.values(), self.schedule, width=320)

    @property
    def all(self) -> list[Any]:
        return [self.rule, *self.numbers.values(), self.schedule]

    def put(self, lane: Lane | None) -> None:
        """Show a lane."""
        self.rule.value = NONE if lane is None else lane.rule
        for key, slider in self.numbers.items():
            slider.visible = lane is not None and key in lane.numbers
            if lane is not None and slider.visible:
                value = lane.numbers[key]
                slider.categories = [repr(x) for x in sorted({*OFFERED[key], value})]
                slider.value = repr(value)
        self.schedule.visible = lane is not None and not reads_lr_once(lane.rule)
        self.schedule.value = "constant" if lane is None else lane.schedule

    def read(self) -> Lane | None:
        rule = self.rule.value
        if rule == NONE:
            return None
        if rule not in optimizers.__all__:
            raise ValueError(f"there is no rule {rule!r}; there are {', '.join(optimizers.__all__)}")
        numbers = {key: float(self.numbers[key].value) for key in defaults(rule)}
        return Lane(rule, numbers, "constant" if reads_lr_once(rule) else self.schedule.value)


class Page:
    """One visitor's page: `root` is what a document shows."""

    def __init__(self, settings: Settings = FIRST, complaint: str = "") -> None:
        self.settings = settings
        self.traces: list[Trace | None] = [None] * len(LANES)
        self.quiet = False  # while widgets are changed from here
        self.lanes = [LaneWidgets(name) for name in LANES]
        self.ready = Select(title="function", options=[*PLANE, OWN], name="ready")
        self.formula = TextInput(title="E(w1, w2) =", name="formula", width=320)
        self.trouble = Div(name="trouble", visible=False, width=320)  # at the box, about the function
        self.start = [NumericInput(title=f"start: w{i + 1}", mode="float", width=150, name=f"start w{i + 1}")
                      for i in range(2)]  # fmt: skip
        self.steps = Slider(title="iterations", start=1, end=MOST_STEPS, value=1, step=1, name="steps")
        self.notes = Div(name="notes", width=320)  # about everything else
        self.query = TextInput(name="query", visible=False)  # the link's part behind the question mark
        self.code = PreText(name="code", width=900)
        self.beta = Slider(title="beta", start=0, end=1, value=0.9, step=0.01, name="beta", width=400)

        self.courses = [Course(i) for i in range(len(LANES))]
        self.iterations = Range1d(0, 1)
        self.surface = Surface(self.courses)
        self.errors = Errors(self.courses, self.iterations, self.surface)
        self.state, self.first = State(self.courses, self.iterations), FirstUpdates(self.courses)
        self.amplification = Amplification()
        self.root = row(self._controls(), self._views())
        self._put(settings)
        self._wire()
        self._draw(settings, everything=True)
        self.amplification.show(self.beta.value)
        if complaint:
            self._complain(complaint)

    def _controls(self) -> Any:
        link, code = Button(label="copy the link", name="copy link"), Button(label="copy the code", name="copy code")
        copied = "; cb_obj.label = 'copied'; setTimeout(() => { cb_obj.label = label }, 1500)"
        link.js_on_click(CustomJS(args={"query": self.query}, code=
            "const label = 'copy the link'; navigator.clipboard.writeText("
            f"location.origin + location.pathname + '?' + query.value){copied}"))  # fmt: skip
        code.js_on_click(CustomJS(args={"code": self.code}, code=
            f"const label = 'copy the code'; navigator.clipboard.writeText(code.text){copied}"))  # fmt: skip
        self.query.js_on_change("value", CustomJS(code="history.replaceState(null, '', '?' + cb_obj.value)"))
        self.panels = [TabPanel(child=lane.layout, title=name) for name, lane in zip(LANES, self.lanes, strict=True)]
        lanes = Tabs(tabs=self.panels, name="lanes")
        hint = Div(text="A click on the surface moves the start. A click in a legend hides or shows. "
                        "Hover over a point for its numbers.", width=320)  # fmt: skip
        return column(self.ready, self.formula, self.trouble, row(*self.start), self.steps, lanes, self.notes,
                      row(link, code), hint, self.query, width=340)  # fmt: skip

    def _views(self) -> Any:
        panels = {
            "courses": column(self.surface.figure, *self.errors.figures.values(), self.state.figure),
            "first updates": self.first.layout,
            "amplification": column(self.beta, self.amplification.layout),
            "Python": self.code,
        }
        return Tabs(tabs=[TabPanel(child=child, title=title) for title, child in panels.items()], name="views")

    def _wire(self) -> None:
        for lane in self.lanes:
            lane.rule.on_change("value", lambda attr, old, new, lane=lane: self._changed(lane))
            for widget in lane.all[1:]:
                widget.on_change("value", lambda attr, old, new: self._changed())
        for widget in (self.formula, *self.start, self.steps):
            widget.on_change("value", lambda attr, old, new: self._changed())
        self.ready.on_change("value", lambda attr, old, new: self._take(new))
        self.beta.on_change("value", lambda attr, old, new: self.amplification.show(min(max(float(new), 0.0), 1.0)))
        self.surface.figure.on_event(Tap, lambda event: self._begin(event.x, event.y))
        self.surface.figure.on_event(RangesUpdate, self._look)

    # --- from the widgets to the settings, and back -------------------------------------------------------------

    def _read(self) -> Settings:
        start = self.start[0].value, self.start[1].value
        lanes = tuple(lane.read() for lane in self.lanes)
        return Settings(self.formula.value, start, self.settings.window, self.steps.value, lanes)

    def _put(self, settings: Settings) -> None:
        self.quiet = True
        self.formula.value, self.steps.value = settings.formula, settings.steps
        for widget, x in zip(self.start, settings.start, strict=True):
            widget.value = x
        for lane, values in zip(self.lanes, settings.lanes, strict=True):
            lane.put(values)
        self.quiet = False

    # --- what happens -------------------------------------------------------------------------------------------

    def _changed(self, chosen: LaneWidgets | None = None) -> None:
        """A widget has another value; `chosen` is the lane whose rule that is."""
        if self.quiet:
            return
        try:
            if chosen is not None:
                self._choose(chosen)
            settings = self._read()
        except (ValueError, TypeError) as error:
            self._complain(error)
            return
        self._draw(settings)

    def _choose(self, lane: LaneWidgets) -> None:
        """Another rule: its own defaults, but the learning rate as it was, if there was one."""
        rule = lane.rule.value
        if rule in optimizers.__all__:
            before = self.settings.lanes[self.lanes.index(lane)]
            rate = {} if before is None else {"lr": before.numbers["lr"]}
            self.quiet = True
            lane.put(Lane(rule, rate))
            self.quiet = False

    def _take(self, name: Any) -> None:
        """A ready function, with its start and its window."""
        if not self.quiet and name in PLANE:
            problem = PLANE[name]
            (a, b), (x, y) = problem.start, problem.window
            settings = replace(self.settings, formula=problem.formula, start=(a, b), window=(x, y))
            self._put(settings)
            self._draw(settings)

    def _begin(self, x: Any, y: Any) -> None:
        """A click on the surface."""
        try:
            settings = replace(self.settings, start=(float(f"{x:.4g}"), float(f"{y:.4g}")))
        except (ValueError, TypeError):
            return
        self._put(settings)
        self._draw(settings)

    def _look(self, event: RangesUpdate) -> None:
        """The surface was moved or zoomed."""
        try:
            settings = replace(self.settings, window=((event.x0, event.x1), (event.y0, event.y1)))
        except (ValueError, TypeError):
            return
        self._draw(settings)

    def _complain(self, error: object) -> None:
        """Say what is wrong; the last good picture stays."""
        box = self.trouble if isinstance(error, ExpressionError) else self.notes
        box.text = f"<p role=alert style='color: #A33F00; margin: 0'><b>!</b> {html.escape(str(error))}</p>"
        box.visible = True

    def _draw(self, settings: Settings, everything: bool = False) -> None:
        """Make anew what differs from the settings that are shown, and show all of it."""
        old, self.settings = self.settings, settings
        problem = (settings.formula, settings.start, settings.steps)
        same = not everything and problem == (old.formula, old.start, old.steps)
        for i, lane in enumerate(settings.lanes):
            if not same or lane != old.lanes[i]:
                self.traces[i] = settings.run(i)
                self.courses[i].fill(lane, self.traces[i])
        error = None
        if everything or (settings.formula, settings.window) != (old.formula, old.window):
            error = grid(settings)
            finite = error[np.isfinite(error)]
            self.span = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        self.surface.show(settings, error)
        self.errors.show(settings, *self.span)
        self.state.show()
        if everything or settings.steps != old.steps:
            self.iterations.start, self.iterations.end = 0, settings.steps
        self.first.show(self.traces)
        for panel, lane, course in zip(self.panels, settings.lanes, self.courses, strict=True):
            panel.title = course.name if lane is None else f"{course.name}: {lane.rule}"
        self.query.value, self.code.text = settings.query(), settings.code()
        self.quiet = True
        self.ready.value = next((name for name, p in PLANE.items() if p.formula == settings.formula), OWN)
        self.quiet = False
        self.trouble.visible = False
        self.trouble.text = ""
        self.notes.text = "".join(f"<p style='margin: 0'>{html.escape(note)}</p>" for note in self._notes())

    def _notes(self) -> list[str]:
        return [f"{course.name} diverges: after {course.lost} steps its weights are no longer finite numbers."
                for course in self.courses if course.lost is not None]  # fmt: skip


def show(document: Document, arguments: Mapping[str, str]) -> Page:
    """Put a page into a document, in the state that a link's arguments describe."""
    try:
        page = Page(Settings.from_query(arguments) if arguments else FIRST)
    except ValueError as error:
        page = Page(FIRST, f"This link can't be shown: {error}")
    document.title = "adaptive_c explorer"
    document.add_root(page.root)
    return page

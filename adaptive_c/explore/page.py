"""The page: widgets, and what follows from their values."""

import html
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from bokeh.document import Document
from bokeh.events import RangesUpdate, Tap
from bokeh.layouts import column, row
from bokeh.models import (
    Button,
    CategoricalSlider,
    ColumnDataSource,
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
from .views import Course, Errors, State, Surface, fit, grid

# What the sliders offer; a link may hold any number, which is then offered too.
_RATES = [float(f"{digits}e{decade}") for decade in range(-5, 1)
          for digits in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)] + [10.0]  # fmt: skip
_DECAYS = [0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 0.999, 0.9995, 0.9999]
_EPS = [0.0, 1e-16, 1e-12, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0]
OFFERED = {"lr": _RATES, "beta1": _DECAYS, "beta2": _DECAYS, "alpha": [*_DECAYS, 1.0], "rho": [*_DECAYS, 1.0],
           "eps": _EPS, "momentum": _DECAYS}  # fmt: skip
Later = Callable[[Callable[[], None]], Any]
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
        """The optimizer that the widgets describe, checked; None if none is chosen."""
        rule = self.rule.value
        if rule == NONE:
            return None
        if rule not in optimizers.__all__:
            raise ValueError(f"there is no rule {rule!r}; there are {', '.join(optimizers.__all__)}")
        numbers = {key: float(self.numbers[key].value) for key in defaults(rule)}
        return Lane(rule, numbers, "constant" if reads_lr_once(rule) else self.schedule.value)


class Page:
    """One visitor's page: `root` is what a document shows."""

    def __init__(self, settings: Settings = FIRST, complaint: str = "", later: Later = lambda call: call()) -> None:
        self.settings, self.later = settings, later
        self.window: Any = settings.window
        self.traces: list[Trace | None] = [None] * len(LANES)
        self.quiet = False  # while widgets are changed from here
        self.waiting = False  # while there are changes that are not drawn yet
        self.lanes = [LaneWidgets(name) for name in LANES]
        self.ready = Select(title="function", options=[*PLANE, OWN], name="ready")
        self.formula = TextInput(title="E(w1, w2) =", name="formula", width=320)
        self.trouble = Div(name="trouble", visible=False, width=320)  # at the box, about the function
        self.start = [NumericInput(title=f"start: w{i + 1}", mode="float", width=150, name=f"start w{i + 1}")
                      for i in range(2)]  # fmt: skip
        self.steps = Slider(title="iterations", start=1, end=MOST_STEPS, value=1, step=1, name="steps")
        self.notes = Div(name="notes", width=320)  # about everything else
        # The part of the link after the question mark, and the code, for the buttons that copy them.
        self.texts = ColumnDataSource({"query": [""], "code": [""]}, name="texts")
        self.code = PreText(name="code", width=900)
        self.beta = Slider(title="beta", start=0, end=1, value=0.9, step=0.01, name="beta", width=400)

        self.courses = [Course(i) for i in range(len(LANES))]
        self.iterations = Range1d(0, 1)
        self.surface = Surface(self.courses)
        self.errors = Errors(self.courses, self.iterations, self.surface)
        self.state, self.first = State(self.courses, self.iterations), FirstUpdates(self.courses)
        self.amplification = Amplification()
        self.views = self._views()
        self.root = row(self._controls(), self.views, margin=8, styles={"flex-wrap": "wrap"})
        self._put(settings)
        self._wire()
        self._draw(settings, everything=True)
        if complaint:
            self._complain(complaint)

    def _controls(self) -> Any:
        """The left column: everything that can be set."""
        link, code = Button(label="copy the link", name="copy link"), Button(label="copy the code", name="copy code")
        copied = "; cb_obj.label = 'copied'; setTimeout(() => { cb_obj.label = label }, 1500)"
        link.js_on_click(CustomJS(args={"texts": self.texts}, code=
            "const label = 'copy the link'; navigator.clipboard.writeText("
            f"location.origin + location.pathname + '?' + texts.data.query[0]){copied}"))  # fmt: skip
        code.js_on_click(CustomJS(args={"texts": self.texts}, code=
            f"const label = 'copy the code'; navigator.clipboard.writeText(texts.data.code[0]){copied}"))  # fmt: skip
        self.texts.js_on_change("data", CustomJS(code=  # browsers allow a few changes of the address per second
            "clearTimeout(window.address); window.address = setTimeout(() => "
            "history.replaceState(null, '', '?' + cb_obj.data.query[0]), 200)"))  # fmt: skip
        self.panels = [TabPanel(child=lane.layout, title=name) for name, lane in zip(LANES, self.lanes, strict=True)]
        lanes = Tabs(tabs=self.panels, name="lanes")
        hint = Div(width=320, text=
            "Click on the surface to move the start. Hover over a point to see its numbers. Click on an entry of a "
            "legend to hide or show it. Drag the surface to move it; to zoom, switch on the mouse wheel in the tools "
            "beside it.")  # fmt: skip
        return column(self.ready, self.formula, self.trouble, row(*self.start), self.steps, lanes, self.notes,
                      row(link, code), hint, width=340)  # fmt: skip

    def _views(self) -> Any:
        """The tabs on the right."""
        panels = {
            "courses": column(self.surface.figure, self.errors.figure, self.state.figure),
            "first updates": self.first.layout,
            "amplification": column(self.beta, self.amplification.layout),
            "Python": self.code,
        }
        # As wide as the courses at least, whatever the hidden tabs need; in a narrower window below the controls.
        return Tabs(tabs=[TabPanel(child=child, title=title) for title, child in panels.items()], name="views",
                    styles={"flex": "1 1 740px"})  # fmt: skip

    def _wire(self) -> None:
        """Connect the widgets and the surface with what they change."""
        for lane in self.lanes:
            lane.rule.on_change("value", lambda attr, old, new, lane=lane: self._choose(lane))
            for widget in lane.all[1:]:
                widget.on_change("value", lambda attr, old, new: self._changed())
        for widget in (self.formula, *self.start, self.steps, self.beta):
            widget.on_change("value", lambda attr, old, new: self._changed())
        self.views.on_change("active", lambda attr, old, new: self._draw_tab())
        self.ready.on_change("value", lambda attr, old, new: self._take(new))
        self.surface.figure.on_event(Tap, self._begin)
        self.surface.figure.on_event(RangesUpdate, self._look)

    # --- from the widgets to the settings, and back -------------------------------------------------------------

    def _read(self) -> Settings:
        """The settings that the widgets show, checked."""
        start = self.start[0].value, self.start[1].value
        lanes = tuple(lane.read() for lane in self.lanes)
        return Settings(self.formula.value, start, self.window, self.steps.value, lanes)

    def _put(self, settings: Settings) -> None:
        """Have the widgets show these settings."""
        self.window = settings.window
        with self._quietly():
            self.formula.value, self.steps.value = settings.formula, settings.steps
            for widget, x in zip(self.start, settings.start, strict=True):
                widget.value = x
            for lane, values in zip(self.lanes, settings.lanes, strict=True):
                lane.put(values)

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """A block in which changes of widgets call nothing."""
        self.quiet = True
        try:
            yield
        finally:
            self.quiet = False

    # --- what happens -------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        """Called when a value has changed.  All changes that come before the page is drawn are drawn together."""
        if not (self.quiet or self.waiting):
            self.waiting = True
            self.later(self._refresh)

    def _refresh(self) -> None:
        """Draw what the widgets say, or say what is wrong with it."""
        self.waiting = False
        try:
            settings = self._read()
        except (ValueError, TypeError) as error:
            self._complain(error)
            return
        self._draw(settings)

    def _choose(self, lane: LaneWidgets) -> None:
        """Called for another rule: show its own defaults, but keep the learning rate if there was one."""
        rule = lane.rule.value
        if rule in optimizers.__all__ and not self.quiet:
            before = self.settings.lanes[self.lanes.index(lane)]
            with self._quietly():
                lane.put(Lane(rule, {} if before is None else {"lr": before.numbers["lr"]}))
        self._changed()

    def _take(self, name: Any) -> None:
        """Called for a ready function: show it with its start and its window."""
        if name in PLANE and not self.quiet:
            problem = PLANE[name]
            (a, b), (x, y) = problem.start, problem.window
            self._put(replace(self.settings, formula=problem.formula, start=(a, b), window=(x, y)))
            self._changed()

    def _begin(self, event: Tap) -> None:
        """Called for a click on the surface: the start moves there."""
        with self._quietly():
            for widget, x in zip(self.start, (event.x, event.y), strict=True):
                widget.value = float(f"{x:.4g}")
        self._changed()

    def _look(self, event: RangesUpdate) -> None:
        """Called when the surface was moved or zoomed: the function is drawn over the new window."""
        self.window = (event.x0, event.x1), (event.y0, event.y1)
        self._changed()

    def _complain(self, error: object) -> None:
        """Say what is wrong; the last good picture stays."""
        text = f"<p role=alert style='color: #A33F00; margin: 0'><b>!</b> {html.escape(str(error))}</p>"
        self.trouble.visible = isinstance(error, ExpressionError)
        self.trouble.text, self.notes.text = (text, "") if self.trouble.visible else ("", text)

    def _draw(self, settings: Settings, everything: bool = False) -> None:
        """Show other settings: run and draw again only what differs from those that are shown."""
        old, self.settings = self.settings, settings
        problem = (settings.formula, settings.start, settings.steps)
        same = not everything and problem == (old.formula, old.start, old.steps)
        for i, lane in enumerate(settings.lanes):
            if not same or lane != old.lanes[i]:
                self.traces[i] = settings.run(i)
                self.courses[i].fill(lane, self.traces[i])
                self.courses[i].publish(settings.steps)
        error = None
        if everything or (settings.formula, settings.window) != (old.formula, old.window):
            error = grid(settings)
            finite = error[np.isfinite(error)]
            self.span = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
        self.state.show()
        self.errors.show(settings, *self.span)
        if everything or settings.steps != old.steps:
            fit(self.iterations, 0, settings.steps)
        self.surface.show(settings, error)
        self._draw_tab()
        for panel, lane, course in zip(self.panels, settings.lanes, self.courses, strict=True):
            panel.title = course.name if lane is None else f"{course.name}: {lane.rule}"
        self.texts.data = {"query": [settings.query()], "code": [settings.code()]}
        with self._quietly():
            self.ready.value = next((name for name, p in PLANE.items() if p.formula == settings.formula), OWN)
        self.trouble.visible = False
        self.trouble.text = ""
        self.notes.text = "".join(f"<p style='margin: 0'>{html.escape(note)}</p>" for note in self._notes())

    def _draw_tab(self) -> None:
        """Draw the tab that is shown, if it is not the first; a browser takes long to lay out what it hides."""
        match self.views.active:
            case 1:
                self.first.show(self.traces)
            case 2:
                self.amplification.show(self.beta.value)
            case 3:
                self.code.text = self.settings.code()

    def _notes(self) -> list[str]:
        """What the page says about runs that don't go to the end."""
        problem, start = self.settings.problem, np.array(self.settings.start)
        if not (np.isfinite(problem.value(start)) and np.isfinite(problem.gradient(start)).all()):
            place = ", ".join(f"{x:g}" for x in start)
            return [f"At the start ({place}) the function or its gradient is no finite number, so there is no "
                    "course. Click on another place of the surface, or type another start."]  # fmt: skip
        notes = []
        for course, x in zip(self.courses, self.traces, strict=True):
            if x is None or course.lost is None:
                continue
            n = course.lost - 1
            steps = f"{n} step{'s' * (n != 1)}"
            if np.isnan(x.error[n]):
                notes.append(f"{course.name} ends after {steps}, where the function has no value.")
            else:
                notes.append(f"{course.name} diverges: its weights are finite numbers for {steps} only.")
        return notes


def show(document: Document, arguments: Mapping[str, str], later: Later = lambda call: call()) -> Page:
    """Put a page into a document, in the state that a link's arguments describe.

    `later` is given a function to be called after the changes that have already arrived, so that the many changes
    while a slider is dragged are drawn as one.
    """
    settings, complaint = FIRST, ""
    try:
        settings = Settings.from_query(arguments) if arguments else FIRST
    except ValueError as error:
        complaint = f"This link can't be shown: {error}"
    page = Page(settings, complaint, later)
    document.title = "adaptive_c explorer"
    document.add_root(page.root)
    return page

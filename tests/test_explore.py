"""The explorer without a browser: functions as texts, settings, the page's models, and whom the server answers."""

import asyncio
import base64
import math
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from urllib.parse import parse_qsl

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adaptive_c import optimizers
from adaptive_c.__main__ import main
from adaptive_c.explore import ExpressionError, parse
from adaptive_c.explore.expression import FUNCTIONS, LENGTH, PARTS
from adaptive_c.explore.settings import LANES, MOST_STEPS, SCHEDULES, Lane, Settings, defaults, reads_lr_once
from adaptive_c.figures.problems import PLANE, trace

# --- functions as texts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(PLANE))
def test_the_ready_functions_and_their_exact_gradients_are_those_of_the_figures(name):
    problem = PLANE[name]
    w = np.stack([np.random.default_rng(0).uniform(*span, (20, 30)) for span in problem.window])
    function = parse(problem.formula)
    np.testing.assert_allclose(function.value(w), problem.value(w), rtol=1e-13, atol=1e-12)
    np.testing.assert_allclose(function.gradient(w), problem.gradient(w), rtol=1e-13, atol=1e-12)
    one = w[:, 3, 4]
    assert function.gradient(one).shape == (2,)
    np.testing.assert_allclose(function.gradient(one), problem.gradient(one), rtol=1e-13, atol=1e-12)


def test_parse_is_found_in_the_package_without_a_further_import():
    script = "import adaptive_c as ac; print(ac.explore.parse('w1**2').value([3, 0]), ac.typing.__name__)"
    out = subprocess.run([sys.executable, "-P", "-W", "error", "-c", script], capture_output=True, text=True, cwd="/")
    assert (out.stdout, out.stderr) == ("9.0 adaptive_c.typing\n", "")


# Each function's derivative, written by someone else: by complex numbers, a step along the imaginary axis.
@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "abs"])
def test_derivatives_of_the_functions_are_exact(name):
    x = np.random.default_rng(0).uniform(0.05, 0.95, 50)
    function = parse(f"{name}(w1)")
    np.testing.assert_allclose(function.value(np.stack([x, x])), FUNCTIONS[name][0](x), rtol=0)
    slope = FUNCTIONS[name][0](x + 1e-200j).imag / 1e-200
    np.testing.assert_allclose(function.gradient(np.stack([x, x])), [slope, 0 * x], rtol=1e-13)


def test_the_slope_of_abs_is_the_sign():
    w = np.array([[-2.0, 0.0, 3.0], [1.0, 1.0, 1.0]])
    np.testing.assert_array_equal(parse("abs(w1)*w2").gradient(w), [[-1, 0, 1], [2, 0, 3]])


LEAVES = st.sampled_from(["w1", "w2", "pi", "e", "2", "0.5", "3", "1e1"])
TEXTS = st.recursive(LEAVES, lambda inner: st.one_of(
    st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda x: f"({x[0]}{x[1]}{x[2]})"),
    st.tuples(inner, st.sampled_from(["2", "3", "-1", "0.5", "w2"])).map(lambda x: f"{x[0]}**{x[1]}"),
    inner.map(lambda x: f"-({x})"),
    st.tuples(st.sampled_from([name for name in FUNCTIONS if name != "abs"]), inner).map(lambda x: f"{x[0]}({x[1]})"),
), max_leaves=8)  # fmt: skip


@np.errstate(all="ignore")
def slopes(text, w):
    """The gradient by complex numbers: Python itself computes the text, and an imaginary step gives the slope.

    None where it is not to be had: where numbers are too large, and where complex numbers go on though the function has
    no value.
    """
    names = {**{name: f for name, (f, _) in FUNCTIONS.items()}, "pi": np.pi, "e": np.e}
    out = []
    for i in range(2):
        along = [np.complex128(x) for x in w]
        along[i] += 1e-200j
        try:
            value = eval(text, {**names, "w1": np.float64(w[0]), "w2": np.float64(w[1])})
            slope = np.complex128(eval(text, {**names, "w1": along[0], "w2": along[1]})).imag / 1e-200
        except (OverflowError, ZeroDivisionError):
            return None
        if isinstance(value, complex) or not np.isfinite(value) or not abs(slope) < 1e40:
            return None
        assert parse(text).value(np.array(w)) == pytest.approx(value, rel=1e-9)
        out.append(slope)
    return out


@given(TEXTS, st.floats(0.1, 3), st.floats(0.1, 3))
@example("(w1-w1)**2**-1", 1.0, 1.0)
@example("(w1-w1)**w2", 1.0, 1.0)
@example("(w1-w1)**w1", 0.5, 1.0)
@example("(w1-w2)*sqrt(w1-w2)", 1.0, 1.0)
@settings(max_examples=200)
def test_gradients_of_any_function_are_exact(text, w1, w2):
    """Where a part has an infinite slope, as sqrt(w1-w2) where w1 = w2, they may be NaN, but not beside that place."""
    w = [w1, w2]
    gradient, expected = parse(text).gradient(np.array(w)), slopes(text, w)
    if expected and not np.isfinite(gradient).all():
        w = [w1 * 1.01, w2 / 1.02]
        gradient, expected = parse(text).gradient(np.array(w)), slopes(text, w)
    if expected:
        assert gradient == pytest.approx(expected, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("text", "w", "gradient"), [
    ("sqrt(w1**2 + w2**2)", (0, 0), (0, 0)),  # the tip of a cone, as the slope of abs
    ("sqrt(w1)**0", (0, 0), (0, 0)), ("0**w2", (1, 2), (0, 0)), ("w1**w2", (0, 0), (0, -np.inf)),
    ("log(w1) + w2", (-1, 2), (np.nan, np.nan)), ("0/0", (1, 1), (np.nan, np.nan)),
    ("w2*asin(w1)", (2, 0), (np.nan, np.nan)),
    ("log(w1**2)", (0, 1), (np.nan, 0)), ("sqrt(w1)", (0, 1), (np.inf, 0)),
])  # fmt: skip
def test_gradients_where_there_is_a_kink_an_edge_or_no_value(text, w, gradient):
    w = np.array(w, float)
    np.testing.assert_array_equal(parse(text).gradient(w), gradient)
    np.testing.assert_array_equal(parse(text).gradient(np.stack([w] * 3, 1)), np.stack([gradient] * 3, 1))


@pytest.mark.parametrize(("text", "w1"), [
    (text, w1) for part, w1 in [("exp({})", 710), ("exp({})**2", 400), ("sinh({})", -800), ("cosh({})", 800),
                                ("{}**200", 1e100), ("(-{})**3", 1e150), ("9**{}", 900), ("w1**{}", 300),
                                ("exp(exp({}))", 8), ("exp({})*(1000 - w1)", 800), ("exp({})/w1", 900)]
    for text in (f"1/(1 + {part})", f"3/{part}", f"w1/{part}", f"({part})**-1", f"atan({part})", f"tanh({part})",
                 f"exp(-abs({part}))", f"0.5**abs({part})", f"abs({part})**-w1" if w1 > 0 else f"1/{part}")
])  # fmt: skip
def test_gradients_are_0_where_a_part_is_too_large_and_the_value_is_finite(text, w1):
    """The limits are: the values no longer change there.  2 is subtracted, so that the value is not 0 throughout."""
    text = f"{text.format(*['w1'] * 3)} - 2 + w2"
    w = np.array([w1, 0.5])
    assert np.isfinite(parse(text).value(w))
    assert parse(text).gradient(w).tolist() == [0, 1]
    for other in (1.0, w1):  # among points where nothing is too large
        gradient = parse(text).gradient(np.stack([w, [other, 0.5], w], axis=1))
        assert gradient[:, [0, 2]].tolist() == [[0, 0], [1, 1]]
        np.testing.assert_array_equal(gradient[:, 1], parse(text).gradient(np.array([other, 0.5])))


@pytest.mark.parametrize(
    "text", ["1/(1/w1)", "atan(1/w1)", "1/(1 + w1**-2)", "exp(-1/w1**2)", "1/log(w1)", "w1/(1/w1)"]
)
def test_beside_a_pole_no_slope_is_made_up(text):
    """Where w1 is 0 these have the slopes 1, -1, 0, 0, -inf, 0: no rule finds them all, so there is none."""
    w = np.array([0.0, 1.0])
    assert np.isfinite(parse(text).value(w))
    np.testing.assert_array_equal(parse(text).gradient(w), [np.nan, 0])


def test_a_weight_that_plays_no_part_has_the_slope_0_even_where_the_rest_is_infinite():
    assert parse("sqrt(w2)").gradient(np.zeros(2)).tolist() == [0, np.inf]
    assert parse("7").gradient(np.ones((2, 3))).tolist() == [[0] * 3] * 2


def test_weights_may_be_any_numbers_but_two():
    function = parse("w1**-1 + w2**2")
    for w in ([2, 3], (2.0, 3.0), np.array([2, 3]), np.array([2, 3], "float32")):
        assert function.value(w) == 9.5
        assert function.gradient(w).tolist() == [-0.25, 6]
    for wrong in (1.0, [1.0], np.ones(3), np.ones((3, 2)), []):
        for call in (function.value, function.gradient):
            with pytest.raises(ValueError, match=r"w must have the shape \(2, \.\.\.\), w1 before w2, as np\.array"):
                call(wrong)


@pytest.mark.parametrize(("text", "position", "message"), [
    ("w1^2", 3, r"'\^' is not allowed; powers are written \*\*, as in w1\*\*2"),
    ("w1 + foo(w2)", 6, "'foo' is no function here; there are sin, "),
    ("w1 + w3", 6, "'w3' is not known; there are numbers, w1, w2, pi, e, "),
    ("w1\u00b2", 3, r"is not allowed; powers are written \*\*, as in w1\*\*2"),
    ("2\u00d7w1", 2, r"is not allowed; products are written with \*, as in 2\*w1"),
    ("w1 \u2212 2", 4, "is not allowed; minus is written -"),
    ("2*\u03c0", 3, "is not allowed; write pi"),
    ("|w1|", 1, r"the absolute value is abs\(w1\)"),
    ("E = w1**2", 3, "'=' is not allowed; write only what stands to the right of it"),
    ("x**2 + y**2", 1, "'x' is not known; the weights are w1 and w2"),
    ("W1**2", 1, "'W1' is not known; the weights are w1 and w2"),
    ("ln(w1)", 1, "'ln' is no function here; log is the natural logarithm"),
    ("w2(w1 + 1)", 1, r"'w2' is no function here; products are written with \*"),
    ("2(w1 + w2)", 1, r"'2' can't be followed by a bracket; products are written with \*"),
    ("sin(w1)(w2)", 1, r"'sin\(w1\)' can't be followed by a bracket; products"),
    ("1,5*w1", 1, "'1,5\\*w1' has a comma; decimals are written with a point, as in 1.5"),
    ("3*sin w1", 7, r"can't read on from 'w1'; sin needs its argument in brackets: sin\(w1\)"),
    ("2 + sin", 5, r"'sin' needs its argument in brackets: sin\(w1\)"),
    ("sin(w1, w2)", 1, r"'sin\(w1, w2\)' must have one argument, as in sin\(w1\)"),
    ("sin()", 1, "must have one argument"),
    ("w1 +", 5, "the function ends too early"),
    ("(w1", 1, "this bracket is not closed"),
    ("w1)", 3, "this bracket was not opened"),
    ("w1 + 2w2", 6, r"can't read on from '2w2'; products are written with \*, as in 2\*w1"),
    ("w1.real", 1, "'w1.real' is not allowed; there are numbers"),
    ("w1 + 1e999", 6, "'1e999' is too large a number"),
    ("9" * 350, 1, "is too large a number"),
    ("1j", 1, "'1j' is not allowed"),
    ("w1 + True", 6, "'True' is not allowed"),
    ("w1 if w2 else 3", 1, "is not allowed"),
    ("1if 1else 2", 1, "is not allowed"),
    ("w1 % 2", 4, "'%' is not allowed"),
    ("w1 // 2", 1, "'w1 // 2' is not allowed"),
    ("sin(*w1)", 5, "is not allowed"),
    ("not w1", 1, "is not allowed"),
    ("lambda", 7, "the function ends too early"),
    ("__import__('os').system('id')", 12, "\"'\" is not allowed"),
    ("__import__(w1)", 1, "'__import__' is no function here"),
    ("().__class__", 1, "is not allowed"),
    ("w1 := 3", 4, "':' is not allowed"),
    ("[w1]", 1, r"'\[' is not allowed"),
    ("w1\x00", 3, "is not allowed"),
    ("w1\n+w2", 3, "is not allowed"),
    ("w\u2081", 2, "is not allowed"),
    ("", 1, "there is no function; write one such as"),
    ("   ", 1, "there is no function"),
    (None, 1, "a function is given as a text, got None"),
    ("w1+" * 200 + "w1", LENGTH + 1, f"the function is longer than {LENGTH} characters"),
    ("-" * 300 + "w1", PARTS + 1, f"is too much: the function has more than {PARTS} parts"),
    ("(" * 250 + "w1" + ")" * 2, None, "can't read on from"),
    ("(1+1+1+1+1)*" * 20 + "w1", None, f"the function has more than {PARTS} parts"),
])  # fmt: skip
def test_anything_else_gets_a_message_that_names_the_part_and_where_it_is(text, position, message):
    with pytest.raises(ExpressionError, match=message) as caught:
        parse(text)
    assert str(caught.value).startswith(f"position {caught.value.position}: ")
    if position is not None:
        assert caught.value.position == position


@given(st.text("w12e+-*/()., sincoxp^#'\"_[]{}:=\\\n%@!<>0\x00é", max_size=40) | st.text(max_size=40))
@settings(max_examples=300)
def test_no_text_does_anything_but_become_a_function_or_a_message(text):
    try:
        function = parse(text)
    except ExpressionError:
        return
    assert function.value(np.ones((2, 3))).shape == (3,)
    assert function.gradient(np.ones((2, 3))).shape == (2, 3)


def test_as_many_parts_as_there_may_be_can_lie_in_each_other():
    many = PARTS // 2
    assert parse("+".join(["w1"] * many)).gradient(np.ones(2)).tolist() == [many, 0]  # one in the other, from the left
    assert parse("-" * (PARTS - 1) + "w1").gradient(np.ones(2)).tolist() == [-1, 0]
    calls = (LENGTH - 2) // 5
    assert 0 < parse("sin(" * calls + "w1" + ")" * calls).value(np.ones(2)) < 1


def test_huge_powers_are_infinite_and_take_no_time():
    assert parse("9**9**9**9**9**9").value(np.ones(2)) == np.inf
    assert parse("w1**9**9").gradient(np.array([2.0, 2.0])).tolist() == [np.inf, 0]


def test_nothing_is_compiled_or_evaluated(monkeypatch):
    import builtins

    for name in ("eval", "exec"):
        monkeypatch.setattr(builtins, name, lambda *_: pytest.fail("a text was evaluated"))
    real = builtins.compile

    def only_trees(*args, **more):  # ast.parse asks for a tree alone
        import ast

        flags = args[3] if len(args) > 3 else more.get("flags", 0)
        assert flags & ast.PyCF_ONLY_AST
        return real(*args, **more)

    monkeypatch.setattr(builtins, "compile", only_trees)
    assert parse("3*w1**2").gradient(np.ones(2)).tolist() == [6, 0]


# --- settings, links, code ---------------------------------------------------------------------------------------------


def wild(lanes=None):
    """Settings in which nothing is at its default."""
    lanes = lanes or (Lane("Adam", {"lr": 0.1, "beta1": 0.8, "beta2": 0.99, "eps": 1e-6}, "warmup"), None,
                      Lane("SGD", {"lr": 1 / 3, "momentum": 0.7}, "step"))  # fmt: skip
    return Settings("sin(w1) + cos(w2)/3 + 1e-3*w1**2", (1 / 3, -2.5), ((-4, 4.1), (-3.0, 1e-3)), 37, lanes)


def test_a_link_restores_the_settings():
    for s in (Settings(), wild()):
        assert Settings.from_query(dict(parse_qsl(s.query(), strict_parsing=True))) == s


def test_every_rule_and_schedule_can_be_run_linked_and_reproduced_by_the_code(tmp_path):
    """The code that the page offers gives the same bits, and so do the settings from a link."""
    everything = [Lane(rule, {}, schedule) for rule in optimizers.__all__ for schedule in SCHEDULES
                  if schedule == "constant" or not reads_lr_once(rule)]  # fmt: skip
    for i in range(0, len(everything), 3):
        lanes = (*everything[i : i + 3], None, None)[:3]
        s = replace(wild(lanes), steps=12)
        assert Settings.from_query(dict(parse_qsl(s.query()))) == s
        names = {}
        exec(s.code(), names)
        assert names["paths"].keys() == {name for name, lane in zip(LANES, lanes, strict=True) if lane}
        for k, name in enumerate(LANES):
            if lanes[k]:
                x = s.run(k)
                assert names["paths"][name].tobytes() == x.w.tobytes()
                assert names["errors"][name].tobytes() == x.error.tobytes()


def test_the_code_is_a_program(tmp_path):
    (tmp_path / "code.py").write_text(wild().code())
    out = subprocess.run([sys.executable, "-P", "-W", "error", "code.py"], capture_output=True, text=True, cwd=tmp_path)
    assert not out.stderr
    last = wild().run(0).w[-1]
    assert f"A ends at {last} with the error" in out.stdout


def test_a_run_is_a_trace_of_the_library():
    s = Settings(lanes=(Lane("RMSprop", {"lr": 0.05, "alpha": 0.9}), None, None), steps=10)
    x = s.run(0)
    np.testing.assert_allclose(x.state["square_avg"][1], [810, 16000])
    np.testing.assert_allclose(x.w[10], trace("RMSprop", PLANE["bowl"], 10, lr=0.05, alpha=0.9).w[10], rtol=1e-12)
    assert s.run(1) is None


@pytest.mark.parametrize("rule", optimizers.__all__)
def test_the_numbers_of_a_rule_are_its_options_at_their_defaults(rule):
    numbers = defaults(rule)
    group = getattr(optimizers, rule)(np.zeros(2)).param_groups[0]
    for name, value in numbers.items():
        assert value == (group["betas"][int(name[-1]) - 1] if name.startswith("beta") else group[name])
    assert numbers.keys() >= {"lr"}


@pytest.mark.parametrize(("query", "message"), [
    ("x=1", "unknown entry 'x'; there are f, start, window, steps, A, B, C"),
    ("f=w1^2", "powers are written"),
    ("start=1", "the link's start must have 2 numbers with commas between them, got '1'"),
    ("start=1,nan", "the start's w2 must be a finite number, got nan"),
    ("start=1,two", "the link's start must be a number, got 'two'"),
    ("window=0,0,1,2", "the window of w1 must go from a lower number to a higher, got 0.0, 0.0"),
    ("window=0,inf,1,2", "the window must be a finite number, got inf"),
    ("window=-1e308,1e308,0,1", "the window of w1 must go"),
    ("steps=0", f"the number of iterations must be 1 to {MOST_STEPS}, got 0"),
    ("steps=1e9", f"the number of iterations must be 1 to {MOST_STEPS}, got 1000000000"),
    ("steps=2.5", "the link's steps must be a whole number, got '2.5'"),
    ("steps=inf", "the link's steps must be a whole number, got 'inf'"),
    ("A=Adm", "there is no rule 'Adm'; there are SGD, "),
    ("A=__class__", "there is no rule '__class__'"),
    ("A=", "the link's A must be a rule and its numbers, each once, as in Adam,lr=0.1; got ''"),
    ("B=Adam,,", "the link's B must be a rule and its numbers, each once, as in Adam,lr=0.1; got 'Adam,,'"),
    ("C=Adam,lr=1,lr=2", "the link's C must be a rule and its numbers, each once"),
    ("C=Adam,schedule=step,schedule=step", "the link's C must be a rule and its numbers, each once"),
    ("A=Adam,lr", "the link's lr must be a number, got ''"),
    ("A=Adam,alpha=1", "Adam has no 'alpha'; it has lr, beta1, beta2, eps"),
    ("A=Adam,beta1=1", r"betas\[0\] must be in \[0, 1\), got 1.0"),
    ("A=Adam,lr=-1", r"lr must be in \[0, inf\), got -1.0"),
    ("A=Adam,lr=x", "the link's lr must be a number, got 'x'"),
    ("A=Adam,lr=nan", "Adam: lr must be a finite number, got nan"),
    ("A=Adam,schedule=fast", "Adam: schedule must be one of constant, linear, "),
    ("A=Rprop,schedule=cosine", "Rprop: schedule must be one of constant, got 'cosine'"),
])  # fmt: skip
def test_a_wrong_link_gets_a_message(query, message):
    with pytest.raises(ValueError, match=message):
        Settings.from_query(dict(parse_qsl(query, keep_blank_values=True)))


# --- the page, without a browser ---------------------------------------------------------------------------------------


def shown(query=""):
    """The page in the state of a link, and its document."""
    document_module = pytest.importorskip("bokeh.document")
    from adaptive_c.explore import page

    document = document_module.Document()
    return page.show(document, dict(parse_qsl(query, keep_blank_values=True))), document


THREE = "steps=500&A=RMSprop,lr=0.05&B=SGD,lr=0.001&C=Adam,lr=0.1"


def path(page, i=0):
    return np.stack([column(page, i, "w1"), column(page, i, "w2")], axis=1)


def column(page, i, name):
    return page.courses[i].source.data[name]


def test_the_page_shows_the_courses_that_its_settings_describe():
    page, document = shown()
    assert document.title == "adaptive_c explorer"
    for i, lane in enumerate(page.settings.lanes):
        x = page.settings.run(i)
        data = page.courses[i].source.data
        assert path(page, i).tobytes() == x.w.tobytes()
        assert data["error"].tobytes() == x.error.tobytes()
        np.testing.assert_array_equal(np.stack([data["g1"], data["g2"]], axis=1), x.gradient)
        np.testing.assert_array_equal(np.stack([data["v1"][1:], data["v2"][1:]], axis=1), x.update)
        for slot, state in enumerate(x.state.values()):
            np.testing.assert_array_equal(data[f"state{slot}_2"], state[:, 1])
        assert lane.rule in page.surface.items[i].label.value
        tips = dict(page.courses[i].hover.tooltips)
        assert (tips["w"], tips["gradient"], tips["v"]) == ("(@w1, @w2)", "(@g1, @g2)", "(@v1, @v2)")
    assert dict(page.courses[0].hover.tooltips)["s"] == "(@state0_1, @state0_2)"
    assert page.texts.data == {"query": [page.settings.query()], "code": [page.settings.code()]}
    page.views.active = 3
    assert page.code.text == page.settings.code()


@pytest.fixture(scope="module")
def one_page():
    return shown()[0]


@pytest.mark.parametrize("rule", optimizers.__all__)
def test_every_rule_has_its_numbers_and_its_state(rule, one_page):
    page = one_page
    page.lanes[1].rule.value = "Adam" if rule == "SGD" else "SGD"
    lane = page.lanes[1]
    before = page.settings.lanes[1].numbers["lr"]
    lane.rule.value = rule
    assert not page.notes.text
    assert page.settings.lanes[1] == Lane(rule, {"lr": before})  # the learning rate stays
    assert {name for name, slider in lane.numbers.items() if slider.visible} == set(defaults(rule))
    assert lane.schedule.visible != reads_lr_once(rule)
    x = page.traces[1]
    assert len(page.courses[1].symbols) == len(x.state) <= 3
    assert sum(item.visible for item in page.state.items[1]) == len(x.state)
    assert page.panels[1].title == f"B: {rule}"
    lane.rule.value = "none"
    assert page.settings.lanes[1] is None
    assert np.isnan(path(page, 1)).all()
    assert not page.surface.items[1].visible


def test_each_widget_changes_what_it_names():
    page, _ = shown()
    page.lanes[0].numbers["alpha"].value = "0.5"
    page.lanes[0].numbers["eps"].value = "0.1"
    page.lanes[0].numbers["momentum"].value = "0.3"
    page.lanes[0].schedule.value = "cosine"
    page.lanes[2].numbers["beta1"].value = "0.0"
    page.lanes[2].numbers["beta2"].value = "0.5"
    page.lanes[2].numbers["lr"].value = "0.025"
    page.steps.value = 40
    page.start[0].value = 3.5
    page.formula.value = "w1**2 + w2**2/4"
    s = page.settings
    assert s.lanes[0] == Lane("RMSprop", {"lr": 0.5, "alpha": 0.5, "eps": 0.1, "momentum": 0.3}, "cosine")
    assert s.lanes[2] == Lane("Adam", {"lr": 0.025, "beta1": 0.0, "beta2": 0.5})
    assert (s.formula, s.start, s.steps) == ("w1**2 + w2**2/4", (3.5, 20.0), 40)
    for i in range(3):
        assert path(page, i).tobytes() == s.run(i).w.tobytes()
    assert page.ready.value == "a function of your own"
    again, _ = shown(page.texts.data["query"][0])
    assert again.settings == s
    assert again._read() == s  # its widgets show it


def test_a_link_may_hold_numbers_that_no_slider_offers():
    page, _ = shown("A=Adam,lr=0.0123,beta1=0.333&steps=77")
    assert page.lanes[0].numbers["lr"].value == "0.0123"
    assert "0.0123" in page.lanes[0].numbers["lr"].categories
    assert page._read() == page.settings


def test_ready_functions_come_with_their_start_and_window():
    page, _ = shown()
    for name, problem in PLANE.items():
        page.ready.value = name
        s = page.settings
        assert (s.formula, s.start, s.window) == (problem.formula, problem.start, problem.window)
        assert page.formula.value == problem.formula
        assert (page.surface.x.start, page.surface.x.end) == problem.window[0]


def test_what_is_wrong_gets_a_message_in_its_place_and_the_picture_stays():
    page, _ = shown()
    before = [path(page, i).tobytes() for i in range(3)]
    page.formula.value = "w1 + <b>"
    assert "position 6: &#x27;&lt;&#x27; is not allowed" in page.trouble.text
    assert page.trouble.visible
    assert [path(page, i).tobytes() for i in range(3)] == before
    page.formula.value = "w1**2"
    assert not page.trouble.visible
    page.start[0].value = None  # an empty field
    assert "the start&#x27;s w1 must be a finite number, got None" in page.notes.text
    page.start[0].value = 1.0
    assert not page.notes.text


def test_a_wrong_link_shows_the_first_page_and_a_message():
    page, _ = shown("A=Adm")
    assert "This link can&#x27;t be shown: there is no rule &#x27;Adm&#x27;" in page.notes.text
    assert page.settings.lanes[0].rule == "RMSprop"


@pytest.mark.parametrize(("widget", "attribute", "value"), [
    (lambda p: p.lanes[0].rule, "options", ["__class__"]), (lambda p: p.lanes[0].numbers["lr"], "value", "nan"),
    (lambda p: p.lanes[0].numbers["lr"], "value", "x"), (lambda p: p.steps, "value", 10**9),
    (lambda p: p.steps, "value", 3.5),
])  # fmt: skip
def test_a_page_that_was_tampered_with_gets_a_message_too(widget, attribute, value, one_page):
    page = one_page
    before, found = page.settings, widget(page)
    options, right = page.lanes[0].rule.options, found.value
    if attribute == "options":
        page.lanes[0].rule.options = value
        value = value[0]
    assert not page.notes.text
    found.value = value
    assert page.notes.text
    assert page.settings == before
    found.value, page.lanes[0].rule.options = right, options
    assert not page.notes.text
    assert page.settings.lanes[0].rule == "RMSprop"
    assert page.settings.steps == before.steps


def test_what_diverges_or_has_no_value_is_drawn_as_far_as_it_goes():
    page, _ = shown(
        "f=sqrt(w1)%2Bw2**2&start=2,20&window=-1,3,-25,25&steps=400&A=SGD,lr=5&B=SGD,lr=0.01&C=SGD,lr=9e307"
    )
    assert "A ends after 2 steps, where the function has no value" in page.notes.text
    assert "C diverges: its weights are finite numbers for 0 steps only" in page.notes.text
    lost = page.courses[0].lost
    assert np.isfinite(path(page)[: min(lost, 5)]).all()
    error = column(page, 0, "error")
    assert np.isnan(error[-1])
    axis = page.errors.figure.y_range
    assert math.isfinite(axis.start)
    assert math.isfinite(axis.end)
    filled = page.surface.contours.fill_renderer.data_source.data["xs"]
    assert any(len(part) for part in filled)  # where w1 >= 0
    page.formula.value = "log(-1-w1**2)"  # no value anywhere
    assert not page.trouble.visible
    page.formula.value = "exp(exp(w1**2 + 9))"  # infinite nearly everywhere
    page.formula.value = "1e308*w1 - 1e308*w2"
    assert page.settings.formula == "1e308*w1 - 1e308*w2"
    page.formula.value = "5"
    assert page.settings.formula == "5"


def test_a_start_without_a_value_or_a_gradient_is_named():
    page, _ = shown("f=0/0&start=0,2.5&A=SGD,lr=0.1&B=Adam")
    for f in ("0/0", "log(w1)", "sqrt(w1)", "exp(exp(w1**2))"):
        page.start[0].value, page.formula.value = 9.0 if "exp" in f else 0.0, f
        place = "(9, 2.5)" if "exp" in f else "(0, 2.5)"
        assert f"At the start {place} the function or its gradient is no finite number" in page.notes.text, f
        assert "diverges" not in page.notes.text
        page.formula.value = "w1**2"
        assert not page.notes.text


def test_a_flat_bottom_is_part_of_the_surface():
    page, _ = shown("f=abs(w1)-5%2Babs(abs(w1)-5)&window=-10,10,0,10")  # 0 where |w1| <= 5
    drawn = page.surface.contours.fill_renderer.data_source.data
    area = 0.0
    for xs, ys in zip(drawn["xs"][0], drawn["ys"][0], strict=True):
        for i, (x, y) in enumerate(zip(xs, ys, strict=True)):  # the outline, and the holes in it
            area += (1, -1)[i > 0] * abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    assert area >= 0.98 * 10 * 10


def test_one_part_of_the_state_is_shown_to_begin_with_whoever_has_one():
    def visible(page):
        return [item.label.value[:4] for item in page.state.flat if item.visible and item.renderers[0].visible]

    page, _ = shown("A=SGD&B=Adam&C=RMSprop")
    assert visible(page) == ["B: m"]
    for line in page.state.items[1][0].renderers:  # a click on the legend
        line.visible = False
    page.lanes[1].numbers["lr"].value = "0.5"
    assert visible(page) == []
    page.lanes[1].rule.value = "SGD"
    assert visible(page) == ["C: s"]
    page.lanes[2].rule.value = "none"
    assert visible(page) == []


def test_the_state_has_data_only_where_it_is_shown():
    page, _ = shown("steps=30&A=RMSprop,lr=0.5&B=Adam,lr=0.5")
    first, second = page.state.parts[0][0], page.state.parts[1][0]
    state = [page.traces[i].state[name] for i, name in ((0, "square_avg"), (1, "exp_avg"))]
    assert np.stack([first.source.data["1"], first.source.data["2"]], axis=1).tobytes() == state[0].tobytes()
    assert len(second.source.data["t"]) == 1
    assert np.isnan(second.source.data["1"]).all()  # but the legend has a sample, which needs a point
    for line in second.lines:  # a click on the legend
        line.visible = True
    assert second.source.data["t"].tolist() == list(range(31))
    assert np.stack([second.source.data["1"], second.source.data["2"]], axis=1).tobytes() == state[1].tobytes()
    axis, low, high = page.state.figure.y_range, state[1].min(), state[0].max()
    assert low < state[0].min() == 0
    assert (axis.start, axis.end) == pytest.approx((low - 0.05 * (high - low), high + 0.05 * (high - low)))
    for line in second.lines:
        line.visible = False
    assert (axis.start, axis.end) == pytest.approx((-0.05 * high, 1.05 * high))
    for axis in (page.state.figure.y_range, page.errors.figure.y_range, page.iterations):  # the tool that resets them
        assert (axis.reset_start, axis.reset_end) == (axis.start, axis.end)
    assert np.isnan(second.source.data["1"]).tolist() == [True]
    page.lanes[0].rule.value = "none"
    assert np.isnan(first.source.data["1"]).tolist() == [True]


def test_the_error_has_the_axis_of_its_scale():
    from bokeh.models import LinearAxis, LogAxis, LogScale

    page, _ = shown("f=w1**2%2Bw2**2&start=2,2&window=-3,3,-3,3&A=SGD,lr=0.1")
    for formula, log in (("w1**2 + w2**2", True), ("w1**2 - w2**2", False), ("w1**2 + w2**2 + 1", True)):
        page.formula.value = formula
        figure = page.errors.figure
        assert isinstance(figure.y_scale, LogScale) == log
        assert [type(axis) for axis in figure.left if axis.visible] == [LogAxis if log else LinearAxis]
        assert [type(grid.axis) for grid in figure.ygrid if grid.visible] == [LogAxis if log else LinearAxis]


def test_a_slider_costs_one_run_and_one_patch_of_data_and_never_the_surface(monkeypatch):
    """However fast the machine is: what is done for one movement is bounded."""
    page, document = shown(THREE)
    events, steps, grids, sent = [], [], [], []
    document.on_change(lambda event: events.append(getattr(getattr(event, "model", None), "name", None)))
    document.on_change(
        lambda event: sent.extend(event.cols) if getattr(event.model, "name", None) == "course A" else None
    )
    for rule in ("RMSprop", "SGD", "Adam"):
        cls = getattr(optimizers, rule)
        real = cls.step
        monkeypatch.setattr(
            cls, "step", lambda self, *args, real=real, **more: steps.append(1) or real(self, *args, **more)
        )
    from adaptive_c.explore import page as module

    real_grid = module.grid
    monkeypatch.setattr(module, "grid", lambda s: grids.append(1) or real_grid(s))
    page.lanes[0].numbers["lr"].value = "0.08"
    assert len(steps) == 500
    assert [name for name in events if name and name.startswith("course")] == ["course A"]  # the others are as before
    assert len(events) < 12  # an axis has four numbers, with those that the tool for resetting gives it
    assert {"w1", "error", "state0_2"} < set(sent)
    assert not {"t", "state1_1"} & set(sent)  # nor is what is as before
    assert "first A" not in events  # its tab is hidden
    events.clear(), steps.clear()
    page.steps.value = 400
    assert len(steps) == 3 * 400
    assert [name for name in events if name and name.startswith("course")] == ["course A", "course B", "course C"]
    assert len(events) < 15
    assert not grids
    page.formula.value = "w1**2"
    assert len(grids) == 1


def test_what_changes_while_the_page_is_not_drawn_yet_is_drawn_as_one():
    document_module = pytest.importorskip("bokeh.document")
    from adaptive_c.explore import page as module

    waiting = []
    page = module.show(document_module.Document(), dict(parse_qsl(THREE)), waiting.append)

    slider = page.lanes[0].numbers["lr"]
    before = path(page).tobytes()
    for value in slider.categories[10:30]:  # as when it is dragged
        slider.value = value
    page.start[0].value = 3.0
    page.beta.value = 0.5
    assert len(waiting) == 1
    assert path(page).tobytes() == before
    waiting.pop()()
    assert page.settings.lanes[0].numbers["lr"] == float(slider.value)
    assert path(page).tobytes() == page.settings.run(0).w.tobytes()
    assert path(page)[0, 0] == 3.0
    slider.value = slider.categories[5]
    assert len(waiting) == 1


def test_a_click_moves_the_start_and_zooming_draws_the_surface_anew():
    from bokeh.events import RangesUpdate, Tap

    page, _ = shown()
    f = page.surface.figure
    f._trigger_event(Tap(f, sx=1, sy=1, x=3.00001, y=-7.0))
    assert page.settings.start == (3.0, -7.0)
    assert [widget.value for widget in page.start] == [3.0, -7.0]
    assert path(page)[0].tolist() == [3.0, -7.0]
    assert page.surface.start.data_source.data == {"x": [3.0], "y": [-7.0]}
    f._trigger_event(RangesUpdate(f, x0=-1.0, x1=1.0, y0=-2.0, y1=2.0))
    assert page.settings.window == ((-1.0, 1.0), (-2.0, 2.0))
    xs = np.concatenate([np.ravel(part) for part in page.surface.contours.line_renderer.data_source.data["xs"]])
    assert np.nanmax(np.abs(xs)) <= 1
    assert page.settings.start == (3.0, -7.0)


def test_the_first_updates_and_the_amplification_have_the_numbers_of_the_library():
    page, _ = shown("A=SGD,lr=0.001&B=RMSprop,lr=0.05,alpha=0.9")
    page.views.active = 1
    assert "(-14.8205, 19.208)" in page.first.numbers.text
    assert "s(1) = (810, 16000)" in page.first.numbers.text
    arrow = page.first.directions[0].data
    assert (arrow["x_end"][0], arrow["y_end"][0]) == pytest.approx((90 / 410, -400 / 410))
    assert page.first.directions[1].data["x_end"][0] == pytest.approx(0.5**0.5)
    assert page.first.steps[0].data["x_end"] == pytest.approx([-14.91, -14.82054])
    assert not page.first.steps[2].data["x_end"]
    page.views.active = 2
    page.beta.value = 0.0
    side, (c,) = page.amplification.side, page.amplification.source.data["c"]
    i = np.abs(side - 2).argmin()
    assert c[i, i] == pytest.approx(1 - side[i], abs=1e-6)


# --- the server ----------------------------------------------------------------------------------------------------------


def launch():
    """A server in a process of its own, which has its `port`."""
    pytest.importorskip("bokeh")
    process = subprocess.Popen(
        [sys.executable, "-P", "-W", "error", "-m", "adaptive_c", "explore", "--no-browser", "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/",
    )  # fmt: skip
    said = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:(\d+)/", said)
    assert found, said + process.stderr.read()
    process.port = int(found[1])
    return process


@pytest.fixture(scope="module")
def server():
    process = launch()
    yield process
    process.kill()
    process.communicate()


def answer(server, path="/", **headers):
    """The status of a request with these headers, the Host among them, and the body."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as s:
        headers = {"Host": f"127.0.0.1:{server.port}", "Connection": "close", **headers}
        lines = [f"GET {path} HTTP/1.1"] + [f"{key}: {value}" for key, value in headers.items() if value is not None]
        s.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        got = b""
        while b"\r\n\r\n" not in got or headers["Connection"] == "close":
            part = s.recv(1 << 16)
            if not part:
                break
            got += part
    head, _, body = got.partition(b"\r\n\r\n")
    return int(head.split()[1]), body.decode("utf-8", "replace")


def test_the_page_is_served_with_all_that_it_needs(server):
    status, body = answer(server)
    assert status == 200
    assert "adaptive_c explorer" in body
    assert not re.search(r"""(src|href)=["']https?:""", body)  # nothing from elsewhere
    for script in re.findall(r'src="([^"]+)"', body):
        assert answer(server, "/" + script.lstrip("/"))[0] == 200
    assert answer(server, Host=f"localhost:{server.port}")[0] == 200


def sites(port):
    return {
        "another host": {"Host": "evil.example"},
        "another host with this port": {"Host": f"evil.example:{port}"},
        "another port": {"Host": "127.0.0.1:1"},
        "no host": {"Host": None},
        "another origin": {"Origin": "http://evil.example"},
        "another local origin": {"Origin": f"http://127.0.0.1:{port + 1}"},
        "no origin, as of a file": {"Origin": "null"},
        "a script of another site": {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "script"},
        "a frame in another local site": {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Dest": "iframe"},
    }


@pytest.mark.parametrize("who", sites(0))
@pytest.mark.parametrize(
    "path", ["/", "/autoload.js?bokeh-autoload-element=1", "/static/js/bokeh.min.js", "/metadata", "/ws"]
)
def test_other_sites_are_refused(server, who, path):
    headers = sites(server.port)[who]
    status, body = answer(server, path, **headers)
    assert status in ((400, 403) if who == "no host" else (403,))
    assert "Bokeh" not in body


def websocket(server, token, **headers):
    """The status of the opening of a websocket."""
    return answer(server, "/ws", **{
        "Origin": f"http://127.0.0.1:{server.port}", "Connection": "Upgrade", "Upgrade": "websocket",
        "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Protocol": f"bokeh, {token}", **headers,
    })[0]  # fmt: skip


def test_a_websocket_opens_for_the_page_itself_alone(server):
    token = re.search(r'"token":"([^"]+)"', answer(server)[1])[1]
    for headers in sites(server.port).values():
        assert websocket(server, token, **headers) in (400, 403)
    assert websocket(server, token) == 101


def test_a_websocket_that_is_none_of_a_page_is_refused_in_one_line():
    server = launch()
    token = re.search(r'"token":"([^"]+)"', answer(server)[1])[1]

    def coded(content):
        return base64.urlsafe_b64encode(content.encode()).decode().rstrip("=")

    late = coded('{"session_id": "x", "session_expiry": 1}')
    wrong = [coded(x) for x in ("{}", "[]", "3", '{"session_id": "x"}', '{"session_expiry": 1e99}', "{", '"')]
    wrong += ['{"session_id": "x", "session_expiry": "x"}', token[:-5], "x", "\u00ff", "e30.abc"]
    protocols = [None, "other", "bokeh", token, f"other, {token}", f"bokeh, {token}, x", f"bokeh, {late}"]
    for protocol in [*protocols, *[f"bokeh, {x}" for x in wrong]]:
        assert websocket(server, token, **{"Sec-WebSocket-Protocol": protocol}) == 403
    assert answer(server, "/ws")[0] == 403
    assert websocket(server, token) == 101
    server.terminate()  # ends it without a traceback, as Ctrl-C does
    out, err = server.communicate()
    assert (server.returncode, out) == (0, "stopped\n")
    assert all(line.startswith("403 GET /ws (127.0.0.1)") for line in err.splitlines())  # one for each, and no more


class Socket:
    """What a connection of the server needs of a websocket."""

    def __init__(self):
        self.sent, self.nodelay, self.ws_connection = [], False, self

    def set_nodelay(self, value):
        self.nodelay = value

    async def send_message(self, message):
        self.sent.append(message)


def test_all_that_one_change_causes_is_sent_at_once():
    """Otherwise a browser draws some figures twice, and waits for packets that are held back on the way."""
    page, document = shown(THREE)
    from bokeh.application import Application
    from bokeh.protocol import Protocol
    from bokeh.server.session import ServerSession
    from tornado.ioloop import IOLoop

    from adaptive_c.explore.server import LocalTornado

    browser, slider = Socket(), page.lanes[0].numbers["lr"]

    async def move():
        session, tornado = ServerSession("a session", document), LocalTornado({"/": Application()}, 1)
        tornado.initialize(IOLoop.current())
        tornado.new_connection(Protocol(), browser, None, session)
        for value in ("0.08", "0.1"):
            await session.with_document_locked(setattr, slider, "value", value)

    asyncio.run(move())
    assert browser.nodelay
    assert len(browser.sent) == 2
    for message in browser.sent:
        changed = {(event["model"]["id"], event["attr"]) for event in message.content["events"]}
        sources = page.courses[0].source, page.state.parts[0][0].source, page.texts
        assert changed >= {(source.id, "data") for source in sources} | {(page.state.figure.y_range.id, "end")}


def test_a_link_from_elsewhere_may_be_followed(server):
    navigation = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document", "Sec-Fetch-Mode": "navigate"}
    assert answer(server, "/?steps=7", **navigation)[0] == 200


def test_it_listens_on_this_machine_only(server):
    listening = [line.split() for file in ("tcp", "tcp6") if (table := Path("/proc/net", file)).exists()
                 for line in table.read_text().splitlines()]  # fmt: skip
    places = [line[1] for line in listening if line[1].endswith(f":{server.port:04X}") and line[3] == "0A"]
    assert places == [f"0100007F:{server.port:04X}"]  # 127.0.0.1


def test_a_port_that_is_taken_is_named(server, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["explore", "--no-browser", "--port", str(server.port)])
    assert capsys.readouterr().err == (
        f"adaptive-c explore: can't listen on port {server.port}: Address already in use; choose another with --port, "
        "or any free one with --port 0\n"
    )


@pytest.mark.parametrize("port", ["-1", "65536", "x"])
def test_a_wrong_port_is_refused(port, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["explore", "--port", port])
    assert "--port" in capsys.readouterr().err


def test_a_missing_extra_is_named(tmp_path):
    (tmp_path / "bokeh.py").write_text("raise ModuleNotFoundError(name='bokeh')")
    out = subprocess.run([sys.executable, "-m", "adaptive_c", "explore"], capture_output=True, text=True, cwd=tmp_path)
    assert out.returncode == 1
    assert out.stderr == (
        "adaptive-c explore needs bokeh: pip install 'adaptive_c[explore]' (from a clone: '.[explore]')\n"
    )


def test_ctrl_c_ends_it_without_a_traceback():
    server = launch()
    token = re.search(r'"token":"([^"]+)"', answer(server)[1])[1]
    assert websocket(server, token) == 101  # a page that has been open
    server.send_signal(signal.SIGINT)
    out, err = server.communicate()
    assert server.returncode == 0
    assert out == "stopped\n"
    assert err == ""

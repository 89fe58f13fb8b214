"""The explorer without a browser: functions as texts, settings, the page's models, and whom the server answers."""

import subprocess
import sys
from dataclasses import replace
from urllib.parse import parse_qsl

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptive_c import optimizers
from adaptive_c.explore import ExpressionError, parse
from adaptive_c.explore.expression import DEPTH, FUNCTIONS, LENGTH, PARTS
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


@given(TEXTS, st.floats(0.1, 3), st.floats(0.1, 3))
@settings(deadline=None, max_examples=200)
def test_gradients_of_any_function_are_exact(text, w1, w2):
    """Python itself computes the same text with complex numbers, of which an imaginary step gives the slope."""
    function = parse(text)
    names = {name: f for name, (f, _) in FUNCTIONS.items()}
    with np.errstate(all="ignore"):
        for i in range(2):
            w = [np.complex128(w1), np.complex128(w2)]
            w[i] += 1e-200j
            try:
                along = np.complex128(eval(text, {**names, "w1": w[0], "w2": w[1], "pi": np.pi, "e": np.e}))
                value = eval(text, {**names, "w1": np.float64(w1), "w2": np.float64(w2), "pi": np.pi, "e": np.e})
            except (OverflowError, ZeroDivisionError):
                return
            if not (np.isfinite(value) and np.isfinite(along)) or isinstance(value, complex):
                return  # complex numbers go on where these have no value
            assert function.value(np.array([w1, w2])) == pytest.approx(value, rel=1e-9)
            slope = along.imag / 1e-200
            if abs(slope) < 1e100:
                assert function.gradient(np.array([w1, w2]))[i] == pytest.approx(slope, rel=1e-6, abs=1e-9)


def test_a_weight_that_plays_no_part_has_the_slope_0_even_where_the_rest_is_infinite():
    assert parse("sqrt(w2)").gradient(np.zeros(2)).tolist() == [0, np.inf]
    assert parse("7").gradient(np.ones((2, 3))).tolist() == [[0] * 3] * 2


@pytest.mark.parametrize(("text", "position", "message"), [
    ("w1^2", 3, r"'\^' is not allowed; powers are written \*\*, as in w1\*\*2"),
    ("w1 + foo(w2)", 6, "'foo' is no function here; there are sin, "),
    ("w1 + w3", 6, "'w3' is not known; there are numbers, w1, w2, pi, e, "),
    ("2 + sin", 5, r"'sin' needs its argument: sin\(w1\)"),
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
    ("(w1, w2)", 1, "is not allowed"),
    ("sin(w1)(w2)", 1, "is not allowed"),
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
    ("-" * 300 + "w1", DEPTH + 1, f"is too much: the function has parts more than {DEPTH} deep in each other"),
    ("(" * 250 + "w1" + ")" * 2, None, "can't read on from"),
    ("sin(" * 45 + "w1" + ")" * 45, None, f"more than {DEPTH} deep"),
    ("(1+1+1+1+1)*" * 20 + "w1", None, f"the function has more than {PARTS} parts"),
])  # fmt: skip
def test_anything_else_gets_a_message_that_names_the_part_and_where_it_is(text, position, message):
    with pytest.raises(ExpressionError, match=message) as caught:
        parse(text)
    assert str(caught.value).startswith(f"position {caught.value.position}: ")
    if position is not None:
        assert caught.value.position == position


@given(st.text("w12e+-*/()., sincoxp^#'\"_[]{}:=\\\n%@!<>0\x00é", max_size=40) | st.text(max_size=40))
@settings(deadline=None, max_examples=300)
def test_no_text_does_anything_but_become_a_function_or_a_message(text):
    try:
        function = parse(text)
    except ExpressionError:
        return
    assert function.value(np.ones((2, 3))).shape == (3,)
    assert function.gradient(np.ones((2, 3))).shape == (2, 3)


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

"""Names of arrays in checkpoints are the keys of the parameters' dict: keys that are equal are the same name.

What another process could not tell again is refused when it is saved, not when it is loaded.
"""

import copy
import datetime
import enum
import math
import os
import re

import numpy as np
import pytest
from support import assert_same_bits

import adaptive_c as ac


class Side(enum.IntEnum):
    LEFT = 1
    RIGHT = 2


class Label(str):
    __slots__ = ()


class Layer:
    pass


def build(keys, start=1.0):
    return ac.Adam({key: np.full(3, start) for key in keys}, lr=0.1)


def saved(keys):
    opt = build(keys)
    opt.step({key: np.full(3, 1.0 + i) for i, key in enumerate(keys)})
    return opt


def same(opt, other, parameters=True):
    assert opt.t == other.t
    for name in opt.state:
        for a, b in zip(opt.state[name].values(), other.state[name].values(), strict=True):
            assert_same_bits(a, b, name)
    for a, b in zip(*(x.param_groups[0]["params"].values() for x in (opt, other)), strict=True):
        assert not parameters or a.tobytes() == b.tobytes()


EQUAL = {
    "np.int64": ([np.int64(3), np.int64(7)], [3, 7]),
    "np.uint8": ([np.uint8(3), np.uint8(7)], [np.int64(3), np.int32(7)]),
    "np.unique": (list(np.unique([7, 3, 3])), [3, 7]),
    "np.str_": ([np.str_("a"), np.str_("b")], ["a", "b"]),
    "a subclass of str": ([Label("a"), Label("b")], ["a", np.str_("b")]),
    "bool": ([True, False], [1, 0]),
    "np.bool_": ([np.bool_(True), np.bool_(False)], [True, 0]),
    "whole floats": ([1.0, -2.0], [1, -2]),
    "zeros": ([-0.0, 1], [0, 1.0]),
    "np.float64": ([np.float64(3.0), np.float64(0.5)], [3, 0.5]),
    "np.float32": ([np.float32(0.5), np.float32(0.1)], [0.5, float(np.float32(0.1))]),
    "enum": ([Side.LEFT, Side.RIGHT], [1, 2]),
    "large": ([2**70, -(2**70)], [float(2**70), -(2**70)]),
    "tuples": ([(np.int64(1), np.str_("a")), (True, "b")], [(1, "a"), (1.0, "b")]),
    "nested tuples": ([((1, 2), ("x",)), ()], [((np.int64(1), 2.0), (np.str_("x"),)), ()]),
    "mixed": ([1, "1", (1,), "(1,)", 0.5, "0.5"], [1.0, "1", (True,), "(1,)", np.float64(0.5), "0.5"]),
    "strings of any kind": (["", "é\n\"'\\", "\ud800", "\0"], ["", "é\n\"'\\", "\ud800", "\0"]),
}


@pytest.mark.parametrize("way", ["file", "dict"])
@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
@pytest.mark.parametrize("keys", EQUAL.values(), ids=EQUAL)
def test_equal_keys_are_the_same_names(keys, back, way, tmp_path):
    keys, again = reversed(keys) if back else keys
    assert dict.fromkeys(keys) == dict.fromkeys(again)
    opt, other = saved(keys), build(again, 0.0)
    if way == "dict":
        other.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        opt.save(tmp_path / "a")
        other.load(tmp_path / "a")
    same(opt, other, parameters=way != "dict")


DIFFERENT = {
    "a number and its string": ([1, 2], ["1", "2"]),
    "a tuple and its string": ([(1, 2), 3], ["(1, 2)", 3]),
    "a float and its string": ([0.5, 1], ["0.5", 1]),
    "a bool and its string": ([True, 2], ["True", 2]),
    "a tuple and its element": ([(1,), 2], [1, 2]),
    "a tuple of a number, and of a string": ([(1,), 2], [("1",), 2]),
    "flat and nested": ([(1, (2,)), 3], [((1,), 2), 3]),
    "NumPy's name of a number": ([np.int64(3), 1], ["np.int64(3)", 1]),
    "neighbours in float32": ([np.float32(0.1), 1], [0.1, 1]),
    "large neighbours": ([2**70, 1], [2**70 + 1, 1]),
}


@pytest.mark.parametrize("way", ["file", "dict"])
@pytest.mark.parametrize("back", [False, True], ids=["there", "back"])
@pytest.mark.parametrize("keys", DIFFERENT.values(), ids=DIFFERENT)
def test_other_names_are_refused_and_the_message_says_that_a_list_loads(keys, back, way, tmp_path):
    keys, again = reversed(keys) if back else keys
    opt, other = saved(keys), build(again)
    before = copy.deepcopy(other.state_dict())
    opt.save(tmp_path / "a")
    with pytest.raises(ValueError, match=r"(?s)has the arrays .*this optimizer's .*list of arrays"):
        other.load_state_dict(opt.state_dict()) if way == "dict" else other.load(tmp_path / "a")
    assert str(other.state_dict()) == str(before)
    a_list = ac.Adam([np.zeros(3) for _ in keys])  # the remedy
    a_list.load_state_dict(opt.state_dict()) if way == "dict" else a_list.load(tmp_path / "a")
    assert a_list.t == 1
    assert_same_bits(np.concatenate(a_list.state["exp_avg"]), np.concatenate([*opt.state["exp_avg"].values()]))


def test_another_order_and_other_sizes_say_that_a_list_loads_too():
    opt = saved(["a", "b"])
    with pytest.raises(ValueError, match=r"the same in another order.*list of arrays"):
        build(["b", "a"]).load_state_dict(opt.state_dict())
    with pytest.raises(ValueError, match=r"array 'a' has 3 elements, this optimizer's 4.*list of arrays"):
        ac.Adam({"a": np.ones(4), "b": np.ones(2)}).load_state_dict(opt.state_dict())


def function():
    pass


UNSAYABLE = {
    "an object": Layer,
    "a class": lambda: Layer,
    "a function": lambda: function,
    "a frozenset": lambda: frozenset({"a", "b"}),
    "a date": lambda: datetime.date(2024, 2, 29),
    "datetime64": lambda: np.datetime64("2024-02-29"),
    "a tuple of one": lambda: (1, (Layer(),)),
}


@pytest.mark.parametrize("make", UNSAYABLE.values(), ids=UNSAYABLE)
def test_a_key_that_no_file_can_tell_again_is_refused_at_save(make, tmp_path):
    key = make()
    path = tmp_path / "a"
    saved(["a", "b"]).save(path)
    old = path.read_bytes()
    opt = saved(["a", key])
    inner = key[1][0] if isinstance(key, tuple) else key
    with pytest.raises((TypeError, ValueError), match=rf"(?s){re.escape(repr(inner))}.*list of arrays"):
        opt.save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["a"]
    opt.step({"a": np.ones(3), key: np.ones(3)})  # and nothing is held
    a_list = ac.Adam([*opt.param_groups[0]["params"].values()])  # the remedy
    a_list.load_state_dict(opt.state_dict())
    a_list.save(path)
    again = ac.Adam([np.zeros(3), np.zeros(3)])
    again.load(path)
    assert again.t == 2


def test_it_is_the_group_that_is_named(tmp_path):
    opt = ac.Adam([{"params": {"a": np.ones(3)}}, {"params": {Layer: np.ones(3)}}])
    with pytest.raises((TypeError, ValueError), match=r"(params|param_groups)\[1\]|group 1"):
        opt.save(tmp_path / "a")


@pytest.mark.parametrize("make", UNSAYABLE.values(), ids=UNSAYABLE)
def test_in_memory_every_key_is_a_name(make):
    key = make()
    opt = saved(["a", key])
    d = opt.state_dict()
    other = build(["a", key])
    other.load_state_dict(d)
    same(opt, other, parameters=False)
    with pytest.raises(ValueError, match="list of arrays"):
        build(["a", "b"]).load_state_dict(d)


def test_in_memory_objects_are_compared_by_equality():
    opt = saved([frozenset({1, 2}), datetime.date(2024, 2, 29)])
    other = build([frozenset({2, 1}), datetime.date(2024, 2, 29)])
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    same(opt, other, parameters=False)
    with pytest.raises(ValueError, match="list of arrays"):
        build([Layer(), 1]).load_state_dict(saved([Layer(), 1]).state_dict())


# Version 1 wrote what is neither int nor str as its repr, which NumPy 2 changed.
VERSION_1 = {
    "np.int64 under NumPy 1": (["3", "7"], [[np.int64(3), np.int64(7)], [3, 7], ["3", "7"]]),
    "np.int64 under NumPy 2": (["np.int64(3)", "np.int64(7)"], [[np.int64(3), np.int64(7)], [3, 7], [3.0, 7.0]]),
    "np.str_ under NumPy 1": (["'a'", "'b'"], [[np.str_("a"), np.str_("b")], ["a", "b"]]),
    "np.str_ under NumPy 2": (["np.str_('a')", "np.str_('b')"], [[np.str_("a"), np.str_("b")], ["a", "b"]]),
    "int and str": ([3, "a"], [[3, "a"], [np.int64(3), np.str_("a")]]),
    "bool and float": (["True", "0.5"], [[True, 0.5], [1, np.float64(0.5)]]),
    "np.float64 under NumPy 2": (["np.float64(2.0)", "np.float64(0.5)"], [[2.0, 0.5], [2, np.float64(0.5)]]),
    "tuples": (["(1, 'a')", "(2, 'b')"], [[(1, "a"), (2, "b")], [(np.int64(1), np.str_("a")), (2.0, "b")]]),
    "tuples under NumPy 2": (["(np.int64(1), np.str_('a'))", "()"], [[(1, "a"), ()], [(np.int64(1), np.str_("a")), ()]]),
    "infinity in a tuple": (["(inf, 'a')", "b"], [[(math.inf, "a"), "b"], [(np.float64("inf"), np.str_("a")), "b"]]),
    "a frozenset": (["frozenset({1})", "a"], [[frozenset({1}), "a"]]),
}  # fmt: skip


@pytest.mark.parametrize(("names", "readers"), VERSION_1.values(), ids=VERSION_1)
def test_names_of_version_1(names, readers):
    opt = saved(["x", "y"])
    d = copy.deepcopy(opt.state_dict())
    d["version"] = 1
    d["groups"][0]["names"] = names
    for keys in readers:
        other = build(keys)
        other.load_state_dict(d)
        same(opt, other, parameters=False)
    for keys in ([4, 8], ["c", "d"], [(4,), (5,)]):
        with pytest.raises(ValueError, match="list of arrays"):
            build(keys).load_state_dict(d)

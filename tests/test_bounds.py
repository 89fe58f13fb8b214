"""Bounds are copied when they are given: what a group shows is what is in force and what is saved."""

import copy

import numpy as np
import pytest
from support import assert_same_bits

import adaptive_c as ac


def in_force(opt, *params):
    """The upper bounds, as one array: what a step makes of large parameters."""
    for p in params:
        p[...] = 9.0
    zeros = [np.zeros_like(p) for p in params]
    opt.step(zeros[0] if len(zeros) == 1 else zeros)
    return np.concatenate([p.ravel() for p in params])


def build(bounds, dtype="f8"):
    p = np.zeros(3, dtype)
    opt = ac.SGD(p, lr=0.0, bounds=bounds)
    return opt, opt.param_groups[0], p


def test_a_list_that_is_changed_and_assigned_again_is_in_force():
    opt, group, p = build([0.0, 1.0])
    bounds = group["bounds"]
    bounds[1] = 0.25
    group["bounds"] = bounds
    assert group["bounds"] == [0.0, 0.25]
    assert (in_force(opt, p) == 0.25).all()
    bounds[1] = 0.125
    group["bounds"] = bounds
    assert group["bounds"] == [0.0, 0.125]
    assert (in_force(opt, p) == 0.125).all()


def test_a_list_that_is_changed_but_not_assigned_changes_nothing():
    given = [0.0, 1.0]
    opt, group, p = build(given)
    given[1] = 0.5
    assert group["bounds"] == [0.0, 1.0]
    shown = group["bounds"]
    assert type(shown) is list
    shown[:] = [7.0, 8.0]
    assert group["bounds"] == [0.0, 1.0]
    assert group["bounds"] is not group["bounds"]
    group["lr"] = 0.5  # another option takes none of it along
    assert (in_force(opt, p) == 1.0).all()
    group["bounds"] = given = [0.0, 0.75]
    given[1] = 0.5
    assert group["bounds"] == [0.0, 0.75]
    assert (in_force(opt, p) == 0.75).all()


@pytest.mark.parametrize("way", ["file", "dict"])
@pytest.mark.parametrize("assigned", [False, True])
def test_saved_are_the_bounds_in_force(assigned, way, tmp_path):
    opt, group, p = build([0.0, 1.0])
    bounds = group["bounds"]
    bounds[1] = 0.25
    if assigned:
        group["bounds"] = bounds
    q = np.zeros(3)
    again = ac.SGD(q, lr=0.0)
    if way == "dict":
        again.load_state_dict(copy.deepcopy(opt.state_dict()))
    else:
        opt.save(tmp_path / "a")
        again.load(tmp_path / "a")
    expected = 0.25 if assigned else 1.0
    assert tuple(again.param_groups[0]["bounds"]) == (0.0, expected)
    assert (in_force(again, q) == expected).all()
    assert (in_force(opt, p) == expected).all()


def test_a_dict_that_was_loaded_is_the_callers():
    opt, _, _ = build((0.0, 1.0))
    d = copy.deepcopy(opt.state_dict())
    bounds = d["groups"][0]["options"]["bounds"] = [0.0, 0.5]
    again, group, q = build(None)
    again.load_state_dict(d)
    bounds[1] = 0.125
    assert tuple(group["bounds"]) == (0.0, 0.5)
    assert (in_force(again, q) == 0.5).all()
    opt.state_dict()["groups"][0]["options"]["bounds"][1] = 0.125
    assert tuple(opt.param_groups[0]["bounds"]) == (0.0, 1.0)


def test_arrays_are_copied_and_shown_read_only():
    lo, hi = np.zeros(3), np.ones(3)
    opt, group, p = build((lo, hi))
    hi[:] = 0.5
    shown = group["bounds"]
    np.testing.assert_array_equal(shown[1], np.ones(3))
    assert type(shown) is tuple
    assert not np.shares_memory(shown[1], hi)
    assert not shown[1].flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        shown[1][0] = 0.25
    assert lo.flags.writeable
    assert hi.flags.writeable
    assert (in_force(opt, p) == 1.0).all()


def test_the_same_pair_of_changed_arrays_is_in_force_when_it_is_assigned_again():
    lo, hi = np.zeros(3), np.ones(3)
    pair = (lo, hi)
    opt, group, p = build(pair)
    for value in (0.5, 0.25):
        hi[:] = value
        group["bounds"] = pair
        np.testing.assert_array_equal(group["bounds"][1], np.full(3, value))
        assert (in_force(opt, p) == value).all()
    group["bounds"] = group["bounds"]  # what is shown may be assigned
    assert (in_force(opt, p) == 0.25).all()


@pytest.mark.parametrize("structure", [list, tuple, dict])
def test_structures_of_arrays_are_copied(structure):
    params = [np.zeros(3), np.zeros(2)]
    arrays = [np.full(3, 1.0), np.full(2, 2.0)]
    names = ("a", "b")
    wrap = (lambda x: dict(zip(names, x, strict=True))) if structure is dict else structure
    upper = wrap(arrays)
    opt = ac.SGD(wrap(params), lr=0.0, bounds=[None, upper])
    group = opt.param_groups[0]

    def forced():
        for p in params:
            p[...] = 9.0
        opt.step(wrap([np.zeros(3), np.zeros(2)]))
        return np.concatenate(params).tolist()

    def shown():
        side = group["bounds"][1]
        return [side[key] for key in names] if structure is dict else list(side)

    arrays[0][:] = 0.5
    if structure is not tuple:
        upper["b" if structure is dict else 1] = np.full(2, 0.25)
    assert forced() == [1, 1, 1, 2, 2]
    assert [x.tolist() for x in shown()] == [[1, 1, 1], [2, 2]]
    assert not any(x.flags.writeable for x in shown())
    group["bounds"] = [None, upper]
    second = 2 if structure is tuple else 0.25
    assert [x.tolist() for x in shown()] == [[0.5] * 3, [second] * 2]
    assert forced() == [0.5, 0.5, 0.5, second, second]


def test_bounds_compare_by_value():
    """Equal ones are no change, and arrays among them are no obstacle to any other assignment."""
    lo = np.array([-1.0, -2.0, -3.0])
    opt, group, p = build((lo, 1.0))
    for bounds in ((lo.copy(), 1), (lo, np.float32(1.0)), [np.array([-1, -2, -3]), 1.0]):
        group["bounds"] = bounds
        np.testing.assert_array_equal(group["bounds"][0], lo)
        assert group["bounds"][1] == 1.0
        group["lr"] = 0.5
        assert (in_force(opt, p) == 1.0).all()
        p[...] = -9.0
        opt.step(np.zeros(3))
        np.testing.assert_array_equal(p, lo)
    for bounds, expected in (((0.0, 1.0), 1.0), ([0.0, 0.5], 0.5), ((0.0, 0.5), 0.5), ([0, 1], 1.0)):
        group["bounds"] = bounds
        assert list(group["bounds"]) == list(bounds)
        assert type(group["bounds"]) is type(bounds)
        assert (in_force(opt, p) == expected).all()


def test_a_refused_assignment_leaves_what_is_shown_and_in_force():
    given = [0.0, 1.0]
    opt, group, p = build(given)
    given[0] = 2.0
    for wrong in (given, (0.0, np.nan), (0.0, np.ones(2)), (1.0,)):
        with pytest.raises((TypeError, ValueError), match="bounds"):
            group["bounds"] = wrong
        assert group["bounds"] == [0.0, 1.0]
        assert (in_force(opt, p) == 1.0).all()


def test_groups_have_bounds_of_their_own():
    """Also a group that comes later: its default is what the constructor was given."""
    given = [0.0, 1.0]
    p, q, r = np.zeros(2), np.zeros(2), np.zeros(2)
    opt = ac.SGD([{"params": p}, {"params": q}], lr=0.0, bounds=given)
    given[1] = 0.5
    opt.add_param_group({"params": r})
    first, second, third = opt.param_groups
    changed = first["bounds"]
    changed[1] = 0.25
    first["bounds"] = changed
    assert [group["bounds"] for group in (first, second, third)] == [[0.0, 0.25], [0.0, 1.0], [0.0, 1.0]]
    assert in_force(opt, p, q, r).tolist() == [0.25, 0.25, 1, 1, 1, 1]


def test_arrays_for_groups_that_come_later_are_those_of_the_constructor():
    hi = np.ones(2)
    p, q = np.zeros(2), np.zeros(2)
    opt = ac.SGD([{"params": p}], lr=0.0, bounds=(None, hi))
    hi[:] = 0.5
    opt.add_param_group({"params": q})
    assert in_force(opt, p, q).tolist() == [1, 1, 1, 1]


def test_the_dict_of_a_group_shows_the_bounds_in_force():
    _, group, _ = build([0.0, 1.0])
    options = dict(group)
    options["bounds"][1] = 0.5
    assert group["bounds"] == [0.0, 1.0]


@pytest.mark.parametrize("dtype", ["f4", "f8"])
def test_a_resumed_run_with_changed_array_bounds_has_the_bits_of_the_first(dtype, tmp_path):
    hi = np.ones(3, dtype)
    pair = (None, hi)
    opt, group, p = build(pair, dtype)
    hi[:] = 0.1
    group["bounds"] = pair
    opt.save(tmp_path / "a")
    q = np.zeros(3, dtype)
    again = ac.SGD(q, lr=0.0, bounds=(None, hi))
    again.load(tmp_path / "a")
    assert_same_bits(in_force(again, q), in_force(opt, p))
    assert_same_bits(q, hi)


def test_the_options_that_a_group_shows_are_assigned_only_by_the_group():
    opt = ac.SGD(np.zeros(3), lr=0.5)
    with pytest.raises(TypeError):
        opt.param_groups[0].options["lr"] = 5.0
    with pytest.raises(RuntimeError, match=r"group\[name\] = value"):
        opt.param_groups[0].bound.commit({"lr": 5.0})
    opt.param_groups[0]["lr"] = 5.0
    opt.step(np.ones(3))
    assert opt.param_groups[0]["params"][0] == -5.0

"""Lists, tuples and dicts may be subclasses that iterate over more or less than their len() says.

Every sequence is made a tuple once, and that is what is counted: nothing is written beyond what was allocated, and
nothing is left out silently.
"""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import assert_same_bits

import adaptive_c as ac


class Odd(list):
    """A list that iterates over other items than it holds."""

    def __init__(self, held, iterated):
        super().__init__(held)
        self.iterated, self.times = list(iterated), 0

    def __iter__(self):
        self.times += 1
        return iter(self.iterated)


class OddTuple(tuple):
    __slots__ = ()
    iterated = ()

    def __iter__(self):
        return iter(self.iterated)


class Growing(list):
    """Has one more item each time that it is looked at."""

    def __iter__(self):
        items = list(super().__iter__())
        self.append(items[-1])
        return iter(items)


class OddDict(dict):
    """A dict that iterates over other keys than it holds."""

    def __init__(self, held, iterated):
        super().__init__(held)
        self.iterated = dict(iterated)

    def __iter__(self):
        return iter(self.iterated)

    def keys(self):
        return self.iterated.keys()

    def values(self):
        return self.iterated.values()

    def items(self):
        return self.iterated.items()

    def __getitem__(self, key):
        return self.iterated[key]


def odd_tuple(held, iterated):
    found = type("Theirs", (OddTuple,), {"__slots__": (), "iterated": tuple(iterated)})(held)
    assert (len(found), len(list(found))) == (len(held), len(iterated))
    return found


ONE = np.ones(3)
KINDS = {"list": Odd, "tuple": odd_tuple}
COUNTS = [(2, 1), (2, 0)]  # what len() says, which is right, and what comes; too many: at the end of this file


def both_numbers(right, given):
    """Matches a message with both numbers in it."""
    return rf"(?=[\s\S]*\b{right}\b)(?=[\s\S]*\b{given}\b)"


def build():
    params = [np.ones(3), np.ones(3)]
    return ac.SGD(params, lr=1.0), params


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("right", "given"), COUNTS)
@pytest.mark.parametrize("call", ["step", "accumulate"])
def test_gradients(call, right, given, kind):
    opt, params = build()
    grads = KINDS[kind]([ONE] * right, [ONE] * given)
    for _ in range(2):
        with pytest.raises(ValueError, match=both_numbers(right, given)):
            getattr(opt, call)(grads)
        assert (opt.t, opt.pending) == (0, 0)
        assert all((p == 1).all() for p in params)
    opt.step([ONE, ONE])
    assert opt.t == 1
    assert all((p == 0).all() for p in params)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["step", "accumulate"])
def test_it_is_what_comes_that_is_counted(call, kind):
    for held in (0, 1, 3):
        opt, params = build()
        grads = KINDS[kind]([None] * held, [ONE, ONE])
        getattr(opt, call)(grads)
        if call == "accumulate":
            opt.step()
        assert opt.t == 1
        assert all((p == 0).all() for p in params)
        assert getattr(grads, "times", 1) == 1


def test_gradients_that_grow_while_they_are_read():
    opt, params = build()
    grads = Growing([ONE, ONE])
    opt.step(grads)
    assert all((p == 0).all() for p in params)
    assert len(grads) == 3  # looked at once


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("right", "given"), COUNTS)
@pytest.mark.parametrize("call", ["step", "accumulate"])
def test_gradients_of_groups(call, right, given, kind):
    params = [np.ones(3) for _ in range(4)]
    opt = ac.SGD([{"params": params[:2]}, {"params": params[2:]}], lr=1.0)
    pair = [ONE, ONE]
    for grads, where in (
        (KINDS[kind]([pair] * right, [pair] * given), ""),
        ([pair, KINDS[kind](pair, [ONE] * given)], re.escape("grads[1]")),
    ):
        with pytest.raises(ValueError, match=both_numbers(right, given) + rf".*{where}"):
            getattr(opt, call)(grads)
        assert (opt.t, opt.pending) == (0, 0)
        assert all((p == 1).all() for p in params)
    opt.step([pair, pair])
    assert all((p == 0).all() for p in params)


@pytest.mark.parametrize("call", ["step", "accumulate"])
def test_gradients_in_a_dict(call):
    params = {"a": np.ones(3), "b": np.ones(3)}
    opt = ac.SGD(params, lr=1.0)
    right = {"a": ONE, "b": ONE}
    for iterated in ({**right, "c": ONE}, {"a": ONE}, {}, {"a": ONE, "c": ONE}):
        with pytest.raises(ValueError, match="grads must be a dict with the keys 'a', 'b'"):
            getattr(opt, call)(OddDict(right, iterated))
        assert (opt.t, opt.pending) == (0, 0)
    assert all((p == 1).all() for p in params.values())
    getattr(opt, call)(OddDict({}, right))
    if call == "accumulate":
        opt.step()
    assert all((p == 0).all() for p in params.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["constructor", "group", "add_param_group"])
def test_parameters(way, kind):
    """The arrays that come are the parameters, however many are held."""
    for held in (1, 2, 5):
        arrays = [np.ones(3) for _ in range(3)]
        params = KINDS[kind](arrays[:1] * held, arrays)
        if way == "constructor":
            opt = ac.SGD(params, lr=1.0)
        elif way == "group":
            opt = ac.SGD([{"params": np.ones(1)}, {"params": params}], lr=1.0)
        else:
            opt = ac.SGD([{"params": np.ones(1)}], lr=1.0)
            opt.add_param_group({"params": params})
        bound = opt.param_groups[-1]["params"]
        assert len(bound) == 3
        assert all(x is y for x, y in zip(bound, arrays, strict=True))
        grads = [ONE] * 3
        opt.step(grads if way == "constructor" else [None, grads])
        assert all((p == 0).all() for p in arrays)
        with pytest.raises(ValueError, match=both_numbers(3, held)):
            opt.step([ONE] * held if way == "constructor" else [None, [ONE] * held])


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_of_which_none_come(kind):
    params = KINDS[kind]([np.ones(3)], [])
    with pytest.raises(ValueError, match="params is empty"):
        ac.SGD(params)
    with pytest.raises(ValueError, match=r"params\[0\] is empty"):
        ac.SGD([{"params": params}])
    opt, _ = build()
    with pytest.raises(ValueError, match="is empty"):
        opt.add_param_group({"params": params})
    assert len(opt.param_groups) == 1


def test_parameters_in_a_dict():
    arrays = {"a": np.ones(3), "b": np.ones(3)}
    opt = ac.SGD(OddDict({"a": np.ones(1)}, arrays), lr=1.0)
    assert opt.param_groups[0]["params"].keys() == arrays.keys()
    opt.step({"a": ONE, "b": ONE})
    assert all((p == 0).all() for p in arrays.values())


@pytest.mark.parametrize("kind", KINDS)
def test_groups(kind):
    for held in (1, 2, 5):
        arrays = [np.ones(3) for _ in range(3)]
        specs = [{"params": p} for p in arrays]
        opt = ac.SGD(KINDS[kind](specs[:1] * held, specs), lr=1.0)
        assert len(opt.param_groups) == 3
        opt.step([ONE] * 3)
        assert all((p == 0).all() for p in arrays)
    with pytest.raises(ValueError, match="params is empty"):
        ac.SGD(KINDS[kind](specs, []))


def test_groups_and_parameters_that_grow_while_they_are_read():
    """They would share memory with themselves: what was read once is what is bound."""
    p = np.ones(3)
    assert len(ac.SGD(Growing([p])).param_groups[0]["params"]) == 1
    assert len(ac.SGD(Growing([{"params": p}])).param_groups) == 1
    assert len(ac.SGD([{"params": Growing([p])}]).param_groups[0]["params"]) == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [3, 1, 0])
def test_copies(given, kind):
    params = [np.ones(3), np.ones(3)]
    copies = [np.zeros(3, "f4") for _ in range(given)]
    with pytest.raises(ValueError, match=r"copy_to.*" + both_numbers(2, given)):
        ac.SGD(params, copy_to=KINDS[kind](copies[:2], copies) if given >= 2 else KINDS[kind](copies * 2, copies))
    opt = ac.SGD(params[0])
    with pytest.raises(ValueError, match=r"copy_to.*" + both_numbers(2, given)):
        opt.add_param_group({"params": [np.ones(3), np.ones(3)], "copy_to": KINDS[kind]([], copies)})
    copies = [np.zeros(3, "f4") for _ in range(2)]
    opt = ac.SGD(params, lr=0.5, copy_to=KINDS[kind](copies[:1], copies))
    opt.step([ONE, ONE])
    assert all((copy == 0.5).all() for copy in copies)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("given", [3, 1, 0])
def test_bounds(given, kind):
    """Of a pair, and of the arrays in it."""
    params = [np.ones(3), np.ones(3)]
    numbers = [0.0, 2.0, 3.0][:given]
    pair = KINDS[kind]([0.0, 2.0], numbers)
    with pytest.raises((TypeError, ValueError), match="bounds must be a pair"):
        ac.SGD(params, bounds=pair)
    arrays = KINDS[kind]([np.zeros(3)] * 2, [np.zeros(3)] * given)
    with pytest.raises(ValueError, match=r"bounds.*" + both_numbers(2, given)):
        ac.SGD(params, bounds=(arrays, None))
    opt = ac.SGD(params, lr=1.0, bounds=(0.5, None))
    for bounds in (pair, (arrays, None)):
        with pytest.raises((TypeError, ValueError), match="bounds"):
            opt.param_groups[0]["bounds"] = bounds
        assert opt.param_groups[0]["bounds"] == (0.5, None)
    opt.param_groups[0]["bounds"] = KINDS[kind]([0.0], [0.25, None])
    opt.step([ONE, ONE])
    assert all((p == 0.25).all() for p in params)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_of_numbers(kind):
    p = np.ones(3)
    for given in (3, 1, 0):
        betas = KINDS[kind]([0.9, 0.999], [0.9, 0.999, 0.5][:given])
        with pytest.raises((TypeError, ValueError), match="betas must be a pair"):
            ac.Adam(p, betas=betas)
        opt = ac.Adam(p)
        with pytest.raises((TypeError, ValueError), match="betas must be a pair"):
            opt.param_groups[0]["betas"] = betas
        with pytest.raises((TypeError, ValueError), match="betas must be a pair"):
            opt.add_param_group({"params": np.ones(3), "betas": betas})
        assert opt.param_groups[0]["betas"] == (0.9, 0.999)
    opt.param_groups[0]["betas"] = KINDS[kind]([0.9], [0.5, 0.75])
    assert opt.param_groups[0]["betas"] == (0.5, 0.75)
    schedule = ac.schedules.constant(0.5)
    for given in (3, 1):
        with pytest.raises((TypeError, ValueError), match="betas must be a pair"):
            opt.param_groups[0]["betas"] = KINDS[kind]([0.9, schedule], [schedule] * given)
    assert opt.param_groups[0]["betas"] == (0.5, 0.75)
    with pytest.raises((TypeError, ValueError), match="etas must be a pair"):
        ac.Rprop(p, etas=KINDS[kind]([0.5, 1.2], [0.5, 1.2, 1.3]))
    with pytest.raises((TypeError, ValueError), match="step_sizes must be a pair"):
        ac.Rprop(p, step_sizes=KINDS[kind]([1e-6, 50.0], [1e-6]))


def too_many():
    """Gradients of which more come than there is room for.  They are refused before they are walked.

    0-d arrays have the shape of memory that was never used: nothing but the count stops the walk over them.
    """
    for shape, given, call, (kind, make) in itertools.product(
        ((), (3,)), (3, 4000), ("step", "accumulate"), KINDS.items()
    ):
        g, fit = np.ones(shape), [np.ones(shape), np.ones(shape)]
        more = make(fit, [g] * given)
        flat = ac.SGD([np.ones(shape), np.ones(shape)], lr=1.0)
        grouped = ac.AdamW([{"params": [np.ones(shape)]}, {"params": [np.ones(shape), np.ones(shape)]}], keep_undo=True)
        groups = ac.SGD([{"params": [np.ones(shape)]}, {"params": [np.ones(shape)]}], lr=1.0)
        for opt, wrong, right in (
            (flat, more, fit),
            (grouped, [[g], more], [[g], fit]),
            (groups, make([[g], [g]], [[g]] * given), [[g], [g]]),
        ):
            for _ in range(2):
                with pytest.raises(ValueError, match=both_numbers(2, given)):
                    getattr(opt, call)(wrong)
                assert (opt.t, opt.pending) == (0, 0), kind
            opt.step(right)
            assert opt.t == 1
    print("refused")


def test_nothing_is_written_behind_what_was_allocated():
    """In a process of its own, which would end in the middle of anything."""
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_sequences as t; t.too_many()"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "refused\n"), done.stderr


class Lying(np.ndarray):
    """What such an array says of itself is not what its memory is."""

    ndim = property(lambda self: 0)
    size = property(lambda self: 1)


def test_the_memory_of_an_array_counts_and_not_what_it_says_of_itself():
    rng = np.random.default_rng(0)
    params = [rng.normal(size=(5, 4, 3, 2, 1, 2, 1, 2)) for _ in range(50)]
    grads = [rng.normal(size=p.shape) for p in params]
    plain = ac.AdamW([p.copy() for p in params], keep_undo=True)
    lying = ac.AdamW([p.copy().view(Lying) for p in params], keep_undo=True)
    for opt in (plain, lying):
        opt.accumulate(grads)
        opt.step()
        opt.step(grads)
    assert lying.nbytes == plain.nbytes
    for a, b in zip(plain.param_groups[0]["params"], lying.param_groups[0]["params"], strict=True):
        assert_same_bits(a, b.view(np.ndarray))

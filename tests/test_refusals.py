"""Everything is checked before the first write; messages name the array or argument, its value and the remedy."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import misaligned, read_only

import adaptive_c as ac


def ones(*shape, dtype="float32"):
    return np.ones(shape, dtype)


class Tensor:  # what torch's look like from here
    pass


Tensor.__module__ = "torch"

BAD_PARAMS = [
    ("float16", lambda: ones(4, dtype="float16"), ValueError, r"the parameters are float16, .* rounding='stochastic', or"),
    ("longdouble", lambda: ones(4, dtype="longdouble"), TypeError, r"params has dtype float\d+; parameters are float32"),
    ("int", lambda: ones(4, dtype="int64"), TypeError, r"params has dtype int64"),
    ("complex", lambda: ones(4, dtype="complex64"), TypeError, r"params has dtype complex64"),
    ("datetime", lambda: np.zeros(4, "M8[s]"), TypeError, r"params has dtype datetime64\[s\]"),
    ("object", lambda: np.zeros(4, object), TypeError, r"params has dtype"),
    ("record", lambda: np.zeros(4, [("a", "f4")]), TypeError, r"params has dtype"),
    ("byteswapped", lambda: ones(4, dtype=">f4"), TypeError, r"params has dtype >f4 .byte-swapped.; .*native byte order"),
    ("strided", lambda: ones(8)[::2], ValueError, "params is not C-contiguous; keep and use np.ascontiguousarray"),
    ("fortran", lambda: np.asfortranarray(ones(2, 3)), ValueError, "params is not C-contiguous"),
    ("read-only", lambda: read_only(ones(4)), ValueError, "params is read-only"),
    ("broadcast", lambda: np.broadcast_arrays(ones(1, 4), ones(4))[1], ValueError, "params is read-only"),
    ("misaligned", lambda: misaligned(ones(4)), ValueError, "params is misaligned"),
    ("masked", lambda: np.ma.ones(4, "float32"), TypeError, "Masked.*the mask would be ignored"),
    ("float", lambda: 1.0, TypeError, r"params is a float, not a numpy.ndarray; make it an array"),
    ("numpy scalar", lambda: np.float32(1), TypeError, r"params is a numpy.float32"),
    ("generator", lambda: (x for x in [ones(2)]), TypeError, r"params is a generator, not a numpy.ndarray; pass list\(x\)"),
    ("None", lambda: None, TypeError, "params is a NoneType"),
    ("bytearray", lambda: bytearray(4), TypeError, r"params is a bytearray.*np.asarray"),
    ("tensor", Tensor, TypeError, r"torch.Tensor.*x.detach\(\).numpy\(\)"),
    ("a list of numbers", lambda: [1.0, 2], TypeError, r"params is a list of numbers.*w = numpy.array\(\[1.0, 2.0\]\), and keep it"),
    ("many numbers", lambda: (np.float32(1),) * 9, TypeError, r"params is a list of numbers.*numpy.array\(x, 'float64'\)"),
    ("numbers in a group", lambda: [{"params": [1]}], TypeError, r"params\[0\]\['params'\] is a list of numbers.*\(\[1.0\]\)"),
    ("in a list", lambda: [ones(2), 3.0], TypeError, r"params\[1\] is a float"),
    ("in a dict", lambda: {"w": ones(2), "b": ones(4)[::2]}, ValueError, r"params\['b'\] is not C-contiguous"),
    ("in a group", lambda: [{"params": {"w": read_only(ones(4))}}], ValueError, r"params\[0\]\['params'\]\['w'\] is read-only"),
    ("a lone group", lambda: {"params": [ones(2)], "lr": 0.1}, ValueError, r"params looks like one group dict; groups come in a list"),
    ("two dtypes", lambda: [ones(2), ones(2, dtype="float64")], TypeError, r"params\[1\] has dtype float64.*groups of their own"),
    ("empty list", list, ValueError, "params is empty"),
    ("empty dict", dict, ValueError, "params is empty"),
    ("empty group", lambda: [{"params": []}], ValueError, r"params\[0\] is empty"),
    ("a group without params", lambda: [{"lr": 1.0}], ValueError, r"params\[0\] must be a dict with 'params'"),
    ("a group and an array", lambda: [{"params": ones(2)}, ones(2)], ValueError, r"params\[1\] must be a dict with 'params'"),
    ("an unknown group option", lambda: [{"params": ones(2), "rate": 1}], TypeError, r"params\[0\] has the unknown option 'rate'"),
    ("a bad group option", lambda: [{"params": ones(2), "lr": -1}], ValueError, r"params\[0\]: lr must be in \[0, inf\), got -1"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "error", "message"), [b[1:] for b in BAD_PARAMS], ids=[b[0] for b in BAD_PARAMS])
def test_bad_parameters(make, error, message):
    with pytest.raises(error, match=message):
        ac.AdamW(make())


@pytest.mark.parametrize("pair", ["same", "overlapping", "across groups"])
def test_parameters_that_share_memory(pair):
    x = ones(8)
    params = {
        "same": [x, x],
        "overlapping": {"a": x[:5], "b": x[4:]},
        "across groups": [{"params": x}, {"params": [x[2:3]]}],
    }
    with pytest.raises(ValueError, match=r"params.* and params.* share memory; pass each element once"):
        ac.SGD(params[pair])
    ac.SGD([x[:4], x[4:], x[4:4]])  # neighbours, and nothing at all, share none


BAD_GRADS = [
    (
        "float64",
        lambda p: ones(4, dtype="float64"),
        TypeError,
        r"grads has dtype float64, its parameter float32; convert it: x.astype\('float32'\)",
    ),
    ("byteswapped", lambda p: ones(4, dtype=">f4"), TypeError, "grads has dtype >f4"),
    ("shape", lambda p: ones(2, 2), ValueError, r"grads has shape \(2, 2\), its parameter \(4,\)"),
    ("size", lambda p: ones(5), ValueError, r"grads has shape \(5,\), its parameter \(4,\)"),
    ("strided", lambda p: ones(8)[::2], ValueError, r"grads is not C-contiguous; np.ascontiguousarray\(x\)"),
    ("misaligned", lambda p: misaligned(ones(4)), ValueError, r"grads is misaligned; x.copy\(\)"),
    ("masked", lambda p: np.ma.ones(4, "float32"), TypeError, "the mask would be ignored"),
    (
        "list",
        lambda p: [ones(4)],
        TypeError,
        "grads is a list, not a numpy.ndarray; gradients come in the structure of the parameters, here one array",
    ),
    ("float", lambda p: 1.0, TypeError, r"grads is a float.*np.full\(\(4,\), x, 'float32'\)$"),
    ("the parameter", lambda p: p, ValueError, "grads shares memory with params; pass a copy"),
]


@pytest.mark.parametrize(("make", "error", "message"), [b[1:] for b in BAD_GRADS], ids=[b[0] for b in BAD_GRADS])
def test_bad_gradients(make, error, message):
    p = ones(4)
    opt = ac.AdamW(p)
    for _ in range(2):  # and nothing is left behind by the first refusal
        with pytest.raises(error, match=message):
            opt.step(make(p))
        assert (p == 1).all()
        assert opt.t == 0
        assert not opt.state["exp_avg"].any()
    opt.step(ones(4))
    assert opt.t == 1


def test_a_gradient_that_shares_memory_with_state_or_another_parameter():
    p = [ones(100), ones(3, 4), ones(5)]
    opt = ac.AdamW(p)
    with pytest.raises(ValueError, match=r"grads\[0\] shares memory with this optimizer's state"):
        opt.step([opt.state["exp_avg"][0], None, None])
    with pytest.raises(ValueError, match=r"grads\[1\] shares memory with params\[0\]"):
        opt.step([None, p[0][50:62].reshape(3, 4), None])
    grouped = ac.SGD([{"params": {"a": p[0]}}, {"params": p[2]}])
    with pytest.raises(ValueError, match=r"grads\[1\] shares memory with params\[0\]\['params'\]\['a'\]"):
        grouped.step([{"a": None}, p[0][95:]])


def test_a_refused_group_leaves_the_names_that_messages_use():
    p = ones(8)
    opt = ac.SGD(p)
    with pytest.raises(ValueError, match=r"^params\[0\]\['params'\] and params\[1\]\['params'\] share memory"):
        opt.add_param_group({"params": p[2:4]})
    with pytest.raises(ValueError, match=r"^params\[0\]\['params'\] and params\[1\]\['params'\] share memory"):
        opt.add_param_group({"params": p})
    with pytest.raises(ValueError, match=r"^grads shares memory with params; pass a copy"):
        opt.step(p)


def test_gradients_beside_the_parameters_share_none():
    memory = ones(30)
    opt = ac.SGD(memory[10:20], lr=0.0)
    for start in (0, 20):
        opt.step(memory[start : start + 10])
    for start in (1, 19):
        with pytest.raises(ValueError, match="grads shares memory with params"):
            opt.step(memory[start : start + 10])


def test_every_dimension_is_compared():
    opt = ac.SGD(ones(2, 3))
    with pytest.raises(ValueError, match=r"grads has shape \(2, 4\), its parameter \(2, 3\)"):
        opt.step(ones(2, 4))
    with pytest.raises(
        ValueError, match=r"copy_to must be an array of its parameter's shape, \(2, 3\), got shape \(3, 2\)"
    ):
        ac.SGD(ones(2, 3), copy_to=ones(3, 2))


@given(cuts=st.lists(st.integers(0, 60), min_size=2, max_size=8), start=st.integers(0, 60), size=st.integers(0, 60))
def test_overlap_is_found_exactly(cuts, start, size):
    memory = ones(60)
    cuts = sorted(cuts)
    opt = ac.SGD([memory[a:b] for a, b in itertools.pairwise(cuts)] + [ones(size)])
    inside = memory[start : start + size]
    if inside.size != size:
        return
    grads = [None] * (len(cuts) - 1) + [inside]
    overlap = any(max(a, start) < min(b, start + size) for a, b in itertools.pairwise(cuts))
    if overlap:
        with pytest.raises(ValueError, match="shares memory"):
            opt.step(grads)
    else:
        opt.step(grads)


@pytest.mark.parametrize(
    ("params", "grads", "message"),
    [
        ([ones(2), ones(3)], [ones(2)], "grads must be a list of 2 arrays, as the parameters are .*got a list of 1"),
        ([ones(2)], ones(2), r"grads must be a list of 1 array,.*got an array of shape \(2,\)"),
        ([ones(2)], {"a": ones(2)}, "grads must be a list"),
        ([ones(2)], None, "grads must be a list"),
        (
            {"a": ones(2), "b": ones(2)},
            {"a": ones(2)},
            r"grads must be a dict with the keys 'a', 'b'.*None leaves one alone",
        ),
        ({"a": ones(2)}, {"a": ones(2), "c": None}, "got a dict with the keys 'a', 'c'"),
        ({"a": ones(2)}, {"c": ones(2)}, "grads must be a dict with the keys 'a'"),
        ({"a": ones(2)}, [ones(2)], "grads must be a dict"),
        (
            [{"params": ones(2)}, {"params": ones(2)}],
            [ones(2)],
            "one entry for each of the 2 parameter groups, got a list of 1",
        ),
        ([{"params": [ones(2)]}], [ones(2)], r"grads\[0\] must be a list of 1 array,"),
    ],
)
def test_gradients_in_the_wrong_structure(params, grads, message):
    opt = ac.SGD(params)
    with pytest.raises(ValueError, match=message):
        opt.step(grads)
    assert opt.t == 0


def test_a_bad_last_gradient_leaves_the_first_array_untouched():
    p = [ones(5000), ones(3)]
    opt = ac.AdamW(p)
    with pytest.raises(ValueError, match=r"grads\[1\] has shape"):
        opt.step([ones(5000), ones(4)])
    assert (p[0] == 1).all()
    assert not opt.state["exp_avg"][0].any()


BAD_OPTIONS = [
    ("SGD", {"lr": -0.1}, r"lr must be in \[0, inf\), got -0.1"),
    ("SGD", {"momentum": -1}, "momentum must be"),
    ("SGD", {"dampening": float("nan")}, "dampening must be"),
    ("SGD", {"weight_decay": -1}, "weight_decay must be"),
    ("SGD", {"nesterov": True}, "nesterov=True needs momentum > 0 and dampening 0, got momentum=0.0 and dampening=0.0"),
    ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "nesterov=True needs momentum > 0 and dampening 0"),
    ("SGD", {"maximize": "no"}, "maximize must be True or False"),
    ("Momentum", {"nesterov": True, "momentum": 0}, "nesterov=True needs momentum > 0"),
    ("Adagrad", {"lr_decay": -1}, "lr_decay must be"),
    ("Adagrad", {"initial_accumulator_value": -1}, "initial_accumulator_value must be"),
    ("Adagrad", {"eps": 1e-50}, r"eps=1e-50 rounds to 0 in float32; use 0, or at least 1.4e-45"),
    ("Adagrad", {"eps": 2.0**-150}, "rounds to 0 in float32"),  # half the smallest number
    ("RMSprop", {"alpha": 1.1}, r"alpha must be in \[0, 1\], got 1.1"),
    ("RMSprop", {"eps_mode": "in"}, "eps_mode must be 'outside' or 'inside' or 'hat', got 'in'"),
    ("Adadelta", {"rho": -0.1}, r"rho must be in \[0, 1\]"),
    ("Adam", {"betas": (1.0, 0.999)}, r"betas\[0\] must be in \[0, 1\), got 1.0"),
    ("Adam", {"betas": (0.9, float("nan"))}, r"betas\[1\] must be"),
    ("Adam", {"betas": (0.9,)}, "betas must be a pair"),
    ("Adam", {"betas": "ab"}, "betas must be a pair"),
    ("Adam", {"eps": -1e-8}, "eps must be"),
    ("Adam", {"lr": None}, "lr must be a number, got None"),
    ("Adam", {"lr": True}, "lr must be a number, got True"),
    ("Adam", {"lr": 1j}, "lr must be a number"),
    ("Adam", {"lr": 10**400}, "lr must be in"),
    ("Adam", {"betas": {0.1, 0.2}}, "betas must be a pair"),
    ("Adam", {"eps": 1e300}, "is infinite in float32"),
    ("Adam", {"eps_mode": np.zeros(2)}, "eps_mode must be"),
    ("NAdam", {"momentum_decay": -1}, "momentum_decay must be"),
    ("Rprop", {"etas": (1.2, 0.5)}, r"etas\[0\] must be in \(0, 1\), got 1.2"),
    ("Rprop", {"step_sizes": (1.0, 0.1)}, "step_sizes must be .smallest, largest."),
    ("Rprop", {"variant": "plus"}, "variant must be 'irprop-' or"),
    ("SuperSAB", {"eta_plus": 0.9}, r"eta_plus must be in \(1, inf\)"),
    ("SuperSAB", {"eta_minus": 1.5}, r"eta_minus must be in \(0, 1\)"),
    ("SuperSAB", {"max_rate": 0}, r"max_rate must be in \(0, inf\)"),
    ("Adam", {"fused": True}, "Adam has no argument 'fused'; drop it"),
    ("Adam", {"foreach": None}, "drop it"),
    ("Adam", {"capturable": False}, "drop it"),
    ("Adam", {"differentiable": False}, "drop it"),
    (
        "Adam",
        {"learning_rate": 0.1},
        r"Adam has no argument 'learning_rate' \(did you mean lr\?\); it has params, lr, betas",
    ),
    ("Adadelta", {"eps_mode": "inside"}, "Adadelta has no argument 'eps_mode'"),
]


@pytest.mark.parametrize(("cls", "options", "message"), BAD_OPTIONS)
def test_bad_options(cls, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        getattr(ac, cls)(ones(3), **options)


def test_options_at_the_ends_of_their_ranges():
    for cls, options in [("RMSprop", {"alpha": 0}), ("RMSprop", {"alpha": 1}), ("Adadelta", {"rho": 1.0}),
                         ("Adam", {"betas": (0, 0), "eps": 0}), ("Adam", {"betas": [0.9, np.float32(0.5)]}),
                         ("Rprop", {"step_sizes": (0.1, 0.1)}), ("Adagrad", {"eps": 1.01 * 2.0**-150}),
                         ("SGD", {"lr": 0, "nesterov": np.True_, "momentum": np.float64(1)})]:  # fmt: skip
        p = ones(3)
        getattr(ac, cls)(p, **options).step(ones(3))
        assert np.isfinite(p).all()
    ac.Adam(ones(3, dtype="float64"), eps=1e-50)


def test_every_message_is_one_sentence_without_the_machinery():
    """Read aloud: no addresses, no internals."""
    for _, make, error, _ in BAD_PARAMS:
        with pytest.raises(error) as caught:
            ac.AdamW(make())
        assert not re.search(r"0x[0-9a-f]{4}|Py_buffer|\._", str(caught.value)), caught.value
        assert len(str(caught.value)) < 300


# --- memory maps, complex numbers, numbers --------------------------------------------------------------------------


def mapped(tmp_path, mode="r"):
    """As joblib.Parallel hands arrays over 1 MB to its workers."""
    np.save(tmp_path / "x.npy", np.ones((3, 2)))
    return np.load(tmp_path / "x.npy", mmap_mode=mode)


MAPS = {
    "parameters": lambda x: ac.SGD(x),
    "a view": lambda x: ac.SGD([np.ones(2), np.asarray(x)[1:]]),
    "rebound": lambda x: ac.SGD(np.ones((3, 2))).rebind(x),
    "a gradient": lambda x: ac.SGD(np.ones((3, 2)), zero_grad=True).step(x),
    "of rows": lambda x: ac.SGD(np.ones((9, 2)), zero_grad=True).step(ac.Rows(np.array([1, 2, 1]), x)),
    "copies": lambda x: ac.SGD(np.ones((3, 4), "f4"), copy_to=x.view("f4")),
}


@pytest.mark.parametrize("what", MAPS)
def test_read_only_maps(what, tmp_path):
    x = mapped(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"read-only.* it is a memory map: pass x\.copy\(\).*joblib\.Parallel.*Parallel\(max_nbytes=None\)",
    ):
        MAPS[what](x)
    MAPS[what](x.copy())
    MAPS[what](mapped(tmp_path, "r+"))
    x = x.copy()
    x.flags.writeable = False  # no map
    with pytest.raises(
        ValueError, match=r"read-only.* pass a writable array: x\.copy\(\), or x after x\.flags\.writeable = True"
    ):
        MAPS[what](x)


def test_joblib_maps_large_arrays_and_the_remedy_works():
    joblib = pytest.importorskip("joblib")
    x = np.ones(200_000)

    def work(x):
        try:
            ac.SGD(x).step(np.ones_like(x))
        except ValueError as error:
            return str(error)
        return x

    call = joblib.delayed(work)
    (told,) = joblib.Parallel(n_jobs=2)([call(x)])
    assert "params is read-only" in told
    assert "Parallel(max_nbytes=None)" in told
    (stepped,) = joblib.Parallel(n_jobs=2, max_nbytes=None)([call(x)])
    assert (stepped < x).all()


def test_complex_numbers():
    z = np.array([1 + 2j, 3 - 4j])
    with pytest.raises(TypeError, match=r"params has dtype complex128; parameters are real: pass z\.view\('float64'\)"):
        ac.SGD(z)
    with pytest.raises(TypeError, match=r"pass z\.view\('float32'\), which shares the memory of z"):
        ac.SGD(z.astype("c8"))
    opt = ac.SGD(z.view("float64"), lr=1.0)
    with pytest.raises(
        TypeError, match=r"grads has dtype complex128, .*x\.real\.astype\('float64'\); .*x\.view\('float64'\)"
    ):
        opt.step(z.copy())
    opt.step(np.array([1 + 1j, 1 - 1j]).view("float64"))
    assert (z == [0 + 1j, 2 - 3j]).all()
    x = np.ones(2, "f4")
    with pytest.raises(TypeError, match=r"x\.real\.astype\('float32'\)"):
        ac.SGD(x, cast=True).step(z)
    ac.SGD(x, lr=1.0).step(z.real.astype("float32"))
    assert (x == [1, -1]).all()


@pytest.mark.parametrize("cast", [True, False])
def test_a_number_for_an_array(cast):
    """cast=True is advised where it would help, and the array that is advised fits."""
    for x in (np.ones(3, "f4"), np.ones((2, 2)), np.ones(1), np.ones(())):
        opt = ac.SGD([x], cast=cast)
        for number in (1.0, 1, np.float32(1), True):
            if cast and x.size == 1 and isinstance(number, (float, np.floating)):
                opt.step([number])
                continue
            with pytest.raises(TypeError) as caught:
                opt.step([number])
            told = str(caught.value)
            assert told.startswith("grads[0] ")
            assert ("cast=True" in told) == (x.size == 1 and isinstance(number, (float, np.floating)))
            if "np.full" in told:
                opt.step([eval(told[told.index("np.full") :].split(", or ")[0], {"np": np, "x": number})])


def test_articles():
    for x, name in (
        (1, "an int"),
        (1.5, "a float"),
        (range(2), "a range"),
        ((), "a tuple"),
        (iter([]), "a list_iterator"),
    ):
        with pytest.raises((TypeError, ValueError), match=name):
            ac.SGD(np.ones(3)).step(x)
        with pytest.raises((TypeError, ValueError), match=name):
            ac.SGD([np.ones(3)]).step([x])
    with pytest.raises(ValueError, match="got an int"):
        ac.SGD([np.ones(3)]).step(3)
    with pytest.raises(ValueError, match="got None"):
        ac.SGD([np.ones(3)]).step(None)
    with pytest.raises(ValueError, match="got an int"):
        ac.SGD([{"params": np.ones(3)}, 3])
    with pytest.raises(ValueError, match="got an int"):
        ac.SGD([np.ones(3)], copy_to=3)
    with pytest.raises(TypeError, match="got an int"):
        ac.flatten(3)
    with pytest.raises(TypeError, match="array 1 is an int"):
        ac.flatten([np.ones(3), 1])

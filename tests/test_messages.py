"""Messages for odd input: they name the place, and their remedy works when it is pasted.

And what is not odd is accepted: NumPy's error state, zero-size gradients, comparing groups.
"""

import copy
import re
import warnings

import numpy as np
import pytest
from support import assert_same_bits

import adaptive_c as ac


def make(**options):
    opt = ac.AdamW({"a": np.ones(3), "b": np.ones(2)}, **options)
    opt.step({"a": np.ones(3), "b": np.ones(2)})
    return opt


# --- odd state dicts ----------------------------------------------------------------------------------------------


GROUP = ["groups", 0]
OPTIONS = [*GROUP, "options"]
ODD = {
    "a list as a name": ([*GROUP, "names"], [["a"], "b"], "group 0.*(names|arrays).*'a'"),
    "a dict as a name": ([*GROUP, "names"], [{}, "b"], "group 0.*(names|arrays)"),
    "an array as a name": ([*GROUP, "names"], [np.ones(2), "b"], "group 0.*(names|arrays)"),
    "too few names": ([*GROUP, "names"], ["a"], "group 0.*(names|arrays)"),
    "too many names": ([*GROUP, "names"], ["a", "b", "c"], "group 0.*(names|arrays)"),
    "names of a string": ([*GROUP, "names"], "ab", r"group 0.*names"),
    "sizes of None": ([*GROUP, "sizes"], [3, None], "group 0.*sizes.*None"),
    "sizes of strings": ([*GROUP, "sizes"], ["3", "2"], "group 0.*sizes.*'3'"),
    "sizes of floats": ([*GROUP, "sizes"], [3.7, 2.2], "group 0.*sizes.*3.7"),
    "sizes of whole floats": ([*GROUP, "sizes"], [3.0, 2.0], "group 0.*sizes.*3.0"),
    "sizes of bools": ([*GROUP, "sizes"], [True, 4], "group 0.*sizes.*True"),
    "sizes of a string": ([*GROUP, "sizes"], "32", "group 0.*sizes"),
    "sizes of lists": ([*GROUP, "sizes"], [[3], [2]], "group 0.*sizes"),
    "large sizes": ([*GROUP, "sizes"], [10**30, 2], "group 0.*(sizes|elements)"),
    "a size too few": ([*GROUP, "sizes"], [5], "group 0.*(sizes|names|arrays)"),
    "betas of None": ([*OPTIONS, "betas"], None, "group 0.*betas must be a pair of numbers, got None"),
    "betas of one": ([*OPTIONS, "betas"], [0.9], "group 0.*betas must be a pair"),
    "betas of a string": ([*OPTIONS, "betas"], "ab", "group 0.*betas must be a pair"),
    "betas of a dict": ([*OPTIONS, "betas"], {"0": 0.9}, "group 0.*betas must be a pair"),
    "lr of None": ([*OPTIONS, "lr"], None, "group 0.*lr must be a number"),
    "an infinite lr": ([*OPTIONS, "lr"], np.inf, "group 0.*lr must be in"),
    "ema_decay that comes": ([*OPTIONS, "ema_decay"], 0.5, "group 0.*ema_decay can't come or go"),
    "bounds of a number": ([*OPTIONS, "bounds"], 3, "group 0.*bounds"),
    "bounds of a string": ([*OPTIONS, "bounds"], "xy", "group 0.*bounds"),
    "bounds of one": ([*OPTIONS, "bounds"], [1.0], "group 0.*bounds"),
    "bounds of a dict": ([*OPTIONS, "bounds"], {"lo": 0.0, "hi": 1.0}, "group 0.*bounds"),
    "bounds of strings": ([*OPTIONS, "bounds"], ["0", "1"], "group 0.*bounds"),
    "an option without a name": (OPTIONS, {3: 1.0, "zz": 2.0, None: 1}, "group 0.*unknown option"),
    "a list of options": (OPTIONS, [1], "group 0.*options"),
    "a schedule of amsgrad": (
        [*GROUP, "schedules"],
        {"amsgrad": {"schedule": "constant", "base": 1.0}},
        "group 0.*amsgrad can't follow a schedule",
    ),
    "schedules without a name": ([*GROUP, "schedules"], {3: 1.0, None: 2.0}, "group 0.*unknown option"),
    "schedules of None": ([*GROUP, "schedules"], None, "group 0.*schedules"),
    "a schedule of a string": ([*GROUP, "schedules"], {"lr": "cosine"}, "group 0.*lr"),
    "a schedule of a list": ([*GROUP, "schedules"], {"betas": [0.9]}, "group 0.*betas"),
    "an array without a name": ([*GROUP, "arrays", 3], np.ones(3), "group 0|groups.*0"),
    "skipped_steps of a bool": (["skipped_steps"], True, "skipped_steps.*True"),
    "skipped_steps of a float": (["skipped_steps"], 1.0, "skipped_steps.*1.0"),
    "grad_norm of a bool": (["grad_norm"], True, "grad_norm.*True"),
    "grad_norm of another string": (["grad_norm"], "1.5", "grad_norm.*'1.5'"),
    "grad_norm of None": (["grad_norm"], None, "grad_norm.*None"),
    "t of a bool": (["t"], True, "'t'.*True"),
    "t of a string": (["t"], "3", "'t'.*'3'"),
    "a setting without a name": (["settings"], {3: 1, None: 2}, "unknown setting"),
    "settings of None": (["settings"], None, "settings.*None"),
    "a setting of another kind": (["settings", "seed"], "x", "seed must be an integer"),
    "a group of None": (["groups"], [None], r"groups.*0"),
    "a version of a string": (["version"], "1", "version.*'1'"),
    "a class of None": (["class"], None, "class.*None"),
}


@pytest.mark.parametrize(("path", "value", "message"), ODD.values(), ids=ODD)
def test_an_odd_state_dict_is_refused_with_the_place(path, value, message):
    opt = make()
    d = copy.deepcopy(opt.state_dict())
    place = d
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    before = str(opt.state_dict())
    with pytest.raises((TypeError, ValueError), match=rf"(?s)^state_dict.*({message})"):
        opt.load_state_dict(d)
    assert str(opt.state_dict()) == before


def test_what_a_state_dict_may_hold():
    """NumPy's whole numbers, tuples for lists and the norm as a string."""
    opt = make(max_grad_norm=1.0)
    d = copy.deepcopy(opt.state_dict())
    d["groups"][0]["sizes"] = (np.int64(3), np.int32(2))
    d["groups"][0]["names"] = tuple(d["groups"][0]["names"])
    d["groups"] = tuple(d["groups"])
    d["t"], d["skipped_steps"], d["grad_norm"] = np.int64(4), np.int64(2), "inf"
    opt.load_state_dict(d)
    assert (opt.t, opt.skipped_steps, opt.grad_norm) == (4, 2, np.inf)


# --- numbers that the dtype can't hold ----------------------------------------------------------------------------


TOO_LARGE = [
    ("SGD", "lr", 1e39),
    ("SGD", "lr", 3.4028235677973366e38),  # half a unit over the largest: it rounds to infinity
    ("SGD", "weight_decay", 1e39),
    ("Momentum", "lr", 1e39),
    ("Momentum", "momentum", 1e39),
    ("Adagrad", "initial_accumulator_value", 1e39),
    ("RMSprop", "lr", 1e300),
    ("Adam", "lr", 1e39),
    ("Adam", "eps", 1e39),
    ("AdamW", "weight_decay", 1e39),
    ("Lion", "lr", 1e39),
    ("Rprop", "lr", 1e39),
    ("Rprop", "step_sizes", (1e-6, 1e39)),
    ("Rprop", "etas", (0.5, 1e39)),
    ("SuperSAB", "max_rate", 1e39),
    ("SuperSAB", "eta_plus", 1e39),
]


@pytest.mark.parametrize(("name", "option", "value"), TOO_LARGE)
def test_a_number_that_is_infinite_in_the_dtype_is_refused(name, option, value):
    made = getattr(ac, name)
    told = rf"{option}.*infinite in float32"
    for p, formats in (
        (np.ones(3, "f4"), {}),
        (np.ones(3, "f2"), {"rounding": "stochastic"}),
        (np.ones(3, "f2"), {"master": "float32"}),
    ):
        with pytest.raises(ValueError, match=told):
            made(p, **{option: value}, **formats)
        opt = made([{"params": p}], **formats)
        before = opt.param_groups[0][option]
        with pytest.raises(ValueError, match=rf"param_groups\[0\]: .*{told}"):
            opt.param_groups[0][option] = value
        assert opt.param_groups[0][option] == before
        with pytest.raises(ValueError, match=rf"params\[1\].*{told}"):
            opt.add_param_group({"params": np.ones(2, p.dtype), option: value})
        d = copy.deepcopy(opt.state_dict())
        d["groups"][0]["options"][option] = value
        with pytest.raises(ValueError, match=rf"group 0.*{told}"):
            opt.load_state_dict(d)
        opt.step([np.ones(3, "f4")])
        assert np.isfinite(p).all()
    wide = made(np.ones(3), **{option: value})
    assert wide.param_groups[0][option] == value


def test_the_largest_number_is_one():
    largest = float(np.finfo("f4").max)
    p = np.ones(2, "f4")
    opt = ac.SGD(p, lr=largest)
    opt.step(np.zeros(2, "f4"))
    assert (p == 1).all()


def test_a_schedule_that_gives_such_a_number():
    p = np.ones(2, "f4")
    opt = ac.SGD(p, lr=lambda t: 0.5 if t < 1 else 1e39)
    opt.step(np.zeros(2, "f4"))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"t=1.*lr.*infinite in float32"):
            opt.step(np.zeros(2, "f4"))
        assert opt.t == 1
        assert (p == 1).all()
    with pytest.raises(ValueError, match=r"lr.*infinite in float32"):
        ac.SGD(p, lr=ac.schedules.constant(1e39))
    with pytest.raises(ValueError, match=r"t=5.*lr.*infinite in float32"):
        opt.t = 5
    assert opt.t == 1
    opt.param_groups[0]["lr"] = 0.5
    opt.step(np.ones(2, "f4"))
    assert (p == 0.5).all()


@pytest.mark.parametrize("dtype", ["f4", "f2"])
def test_a_norm_that_is_too_small_for_the_dtype_is_what_is_named(dtype):
    p = np.ones(3, dtype)
    opt = ac.SGD(p, lr=1.0, max_grad_norm=1e-46, **({} if dtype == "f4" else {"rounding": "stochastic"}))
    with pytest.raises(ValueError, match=r"max_grad_norm=1e-46") as raised:
        opt.step(np.ones(3, "f4"))
    assert "loss_scale" not in str(raised.value)
    assert opt.t == 0
    assert (p == 1).all()
    opt.max_grad_norm = 1.0
    opt.step(np.ones(3, "f4"))
    assert opt.t == 1


def test_a_loss_scale_that_is_too_large_is_still_what_is_named():
    opt = ac.SGD(np.ones(3, "f4"), lr=1.0)
    with pytest.raises(ValueError, match=r"loss_scale=1e\+60 .*float32 can't hold"):
        opt.step(np.ones(3, "f4"), loss_scale=1e60)
    opt.max_grad_norm = 1.0
    with pytest.raises(ValueError, match="loss_scale=1e"):
        opt.step(np.ones(3, "f4"), loss_scale=1e60)
    assert opt.t == 0


# --- comparing groups ---------------------------------------------------------------------------------------------


def test_groups_are_equal_to_themselves_alone():
    opt = ac.SGD([{"params": np.ones(3)}, {"params": np.ones(3)}])
    first, second = opt.param_groups
    assert first == first
    assert not (first == second)  # noqa: SIM201
    assert first != second
    assert first != dict(first)
    assert opt.param_groups[0] == first
    assert opt.param_groups.index(second) == 1
    assert second in opt.param_groups
    assert {first: "a", second: "b"}[opt.param_groups[1]] == "b"
    assert len({*opt.param_groups, first}) == 2


# --- zero-size gradients ------------------------------------------------------------------------------------------


def test_a_gradient_of_no_elements_shares_no_memory():
    """Wherever it lies: inside another gradient, a parameter or state."""
    p, g = np.ones(10, "f4"), np.ones(10, "f4")
    for zero_grad in (False, True):
        opt = ac.AdamW([p, np.ones(0, "f4")], zero_grad=zero_grad)
        for inside in (g, p, opt.state["exp_avg"][0]):
            for at in (0, 20, 40):
                empty = np.ndarray((0,), "f4", inside, at) if at < 40 else inside[10:]
                assert empty.size == 0
                g[...] = 1
                t = opt.t
                opt.step([g, empty])
                opt.accumulate([g, empty])
                opt.step()
                assert opt.t == t + 2
                assert g.any() != zero_grad
    opt = ac.SGD([p, np.ones(1, "f4")], zero_grad=True)
    with pytest.raises(ValueError, match="share memory"):
        opt.step([g, g[5:6]])


def test_parameters_and_copies_of_no_elements_share_no_memory():
    x, y = np.ones(10, "f4"), np.ones(10, "f4")
    inside = np.ndarray((0,), "f4", x, 20)
    opt = ac.SGD([x, inside], lr=1.0, copy_to=[y, np.ndarray((0,), "f4", y, 20)], bounds=(0.0, None))
    opt.step([np.ones(10, "f4"), np.ones(0, "f4")])
    assert not x.any()
    assert not y.any()


# --- NumPy's error state ------------------------------------------------------------------------------------------


def full(value, dtype="f4"):
    """Without the errors that are the test's own."""
    with np.errstate(all="ignore"):
        return np.full(300, value).astype(dtype)


def exercise(folder):
    """Every kind of call, with numbers that overflow and underflow in float32; what they left."""
    left = []
    for dtype, options in (("f4", {}), ("f8", {}), ("f2", {"rounding": "stochastic"}), ("f2", {"master": "float32"})):
        p = full(1e-5, dtype)
        opt = ac.Adam(p, lr=1e-50, weight_decay=1e-60, ema_decay=1e-300, bounds=(1e-50, 1e300), max_grad_norm=1e-30,
                      copy_to=np.zeros(300, "f4"), **options)  # fmt: skip
        group = opt.param_groups[0]
        g = full(1e-30, "f8" if dtype == "f8" else "f4")
        opt.step(g)
        for bounds in ((-1e300, 1e300), (1e-320, None), (full(-1e-46, "f8"), full(1e39, "f8")), (-1e-42, 1e-42)):
            group["bounds"] = bounds
            opt.step(g)
        opt.accumulate(g)
        opt.step()
        opt.max_grad_value = 1e-30
        group["lr"] = ac.schedules.exponential(1e-30, 1e-10)
        opt.step(g)
        opt.t = 30
        group["betas"] = (1e-50, 1e-60)
        opt.step(g)
        path = folder / f"{dtype}{len(left)}"
        opt.save(path)
        opt.load(path)
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        with opt.averaged_parameters():
            left.append(p.copy())
        left += [p.copy(), opt.decoded_state("exp_avg_sq"), opt.ema.copy(), np.array([opt.t, opt.grad_norm])]
        repr(opt)
    for state_dtype in ("uint8", "bfloat16"):
        p = np.ones(300, "f4")
        opt = ac.Adam(p, state_dtype=state_dtype, on_nonfinite="skip", loss_scale="dynamic", keep_undo=True)
        opt.step(full(1e-30))
        opt.step(full(np.inf))
        opt.rollback()
        opt.step(full(1e38))
        left += [p, opt.decoded_state("exp_avg"), np.array([opt.t, opt.skipped_steps, opt.loss_scale])]
    opt = ac.Adam(np.ones(3, "f4"))  # a state that was float64, as PyTorch's dict may hold it
    d = {
        "state": {0: {"step": np.float64(1), "exp_avg": np.full(3, 1e-50), "exp_avg_sq": np.array([1e-60, 0.0, 1.0])}},
        "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "params": [0]}],
    }
    opt.load_state_dict(d)
    opt.step(np.full(3, 1e-30, "f4"))
    flat, views = ac.flatten({"a": np.full(3, 1e-30, "f4"), "b": np.ones(2, "f4")})
    left += [np.asarray(opt.param_groups[0]["params"]), opt.state["exp_avg"].copy(), flat, views["a"].copy()]
    for wrong, message in (
        ({"eps": 1e-50}, "eps=1e-50 rounds to 0 in float32"),
        ({"eps": 1e300}, "is infinite in float32"),
        ({"bounds": (1e39, 1e40)}, "bounds must have lo <= hi and a number of float32 between them"),
        ({"bounds": (1e-50, 1e-49)}, "bounds must have lo <= hi and a number of float32 between them"),
        ({"max_grad_value": 1e-50}, "max_grad_value=1e-50 rounds to 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ac.Adam(np.ones(3, "f4"), **wrong)
    return left


@pytest.mark.parametrize("state", ["raise", "warn"])
def test_numpys_error_state_changes_nothing(state, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    with np.errstate(all="ignore"):
        expected = exercise(tmp_path / "a")
    with np.errstate(all=state), warnings.catch_warnings():
        warnings.simplefilter("error")
        found = exercise(tmp_path / "b")
        assert set(np.geterr().values()) == {state}
    for i, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert_same_bits(a, b, str(i))


@pytest.mark.later("torch")
def test_torchs_state_under_numpys_error_state():
    import torch

    p = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
    theirs = torch.optim.Adam([p])
    p.grad = torch.full((3,), 1e-25, dtype=torch.float64)
    theirs.step()
    with np.errstate(all="raise"):
        opt = ac.Adam([np.ones(3, "f4")])
        opt.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(opt.state_dict(format="torch"))
    assert opt.t == 1
    assert_same_bits(opt.state["exp_avg"][0], np.full(3, np.float32(1e-26)))


# --- remedies -----------------------------------------------------------------------------------------------------


def refused(error, call):
    with pytest.raises(error) as raised:
        call()
    return str(raised.value)


@pytest.mark.later("torch")
def test_a_bfloat16_tensor():
    import torch

    x = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    told = refused(TypeError, lambda: ac.Adam(x, rounding="stochastic"))
    remedy = "x.detach().view(torch.uint16).numpy()"
    assert remedy in told
    assert "uint16_as='bfloat16'" in told.replace('"', "'")
    opt = ac.SGD(eval(remedy), lr=0.5, rounding="stochastic", uint16_as="bfloat16")
    x.grad = torch.ones(3, dtype=torch.bfloat16)
    told = refused(TypeError, lambda: opt.step(x.grad))
    assert remedy in told
    opt.step(eval(remedy, {"x": x.grad, "torch": torch}))
    assert (x == 0.5).all()  # the model's memory
    listed = refused(TypeError, lambda: ac.Adam([np.ones(3, "f4"), x]))
    assert "params[1]" in listed
    assert remedy in listed
    plain = refused(TypeError, lambda: ac.Adam(torch.ones(3)))
    assert "x.detach().numpy()" in plain
    assert "uint16" not in plain


@pytest.mark.later("torch")
def test_parameters_that_are_not_contiguous():
    """A copy would be stepped, and the model would not notice."""
    import torch

    model = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for x in (model.numpy(), np.ones((4, 4), "f4").T[1:], np.ones(8, "f4")[::2]):
        told = refused(ValueError, lambda x=x: ac.Adam(x))
        assert "not C-contiguous" in told
        assert "copy" in told
        assert "the model's memory" in told
    w = np.ones((2, 3), "f4")
    opt = ac.Adam(w)
    told = refused(ValueError, lambda: opt.step(np.ones((3, 2), "f4").T))
    assert "np.ascontiguousarray(x)" in told  # of a gradient a copy is as good
    assert "the model's memory" not in told


class Sparse:
    """What scipy.sparse's matrices and arrays look like from here."""

    __module__ = "scipy.sparse._csr"

    def __init__(self, x):
        self.x = x

    def toarray(self):
        return self.x

    def __iter__(self):
        return iter(self.x)


def test_a_sparse_gradient():
    w = np.ones((5, 3))
    opt = ac.SGD(w, lr=1.0)
    x = Sparse(np.ones((5, 3)))
    told = refused(TypeError, lambda: opt.step(x))
    assert "x.toarray()" in told
    assert "list(x)" not in told
    opt.step(x.toarray())
    assert not w.any()


@pytest.mark.later("torch")
def test_sparse_gradients_of_scipy_and_torch():
    import torch

    sparse = pytest.importorskip("scipy.sparse")
    w = np.ones((5, 3))
    opt = ac.SGD(w, lr=0.5)
    for x in (sparse.random(5, 3, density=0.3), sparse.csr_array(np.eye(5, 3)), sparse.csc_matrix(np.eye(5, 3))):
        told = refused(TypeError, lambda x=x: opt.step(x))
        assert "x.toarray()" in told
        assert "list(x)" not in told
        opt.step(np.ascontiguousarray(x.toarray()))
        opt.step(rows_by(told, x, w))
    x = torch.eye(5)[:, :3].double().to_sparse()
    told = refused(TypeError, lambda: opt.step(x))
    assert "x.to_dense().numpy()" in told
    assert "Rows" not in told  # its elements are single ones
    opt.step(x.to_dense().numpy())
    with warnings.catch_warnings(action="ignore"):  # torch's, that it is in beta
        rows = x.to_sparse_csr()
    assert "x.to_dense().numpy()" in refused(TypeError, lambda: opt.step(rows))
    table = torch.nn.Embedding(5, 3, sparse=True, dtype=torch.float64)
    table(torch.tensor([3, 0, 3])).sum().backward()
    x = table.weight.grad
    told = refused(TypeError, lambda: opt.step(x))
    assert "x.to_dense().numpy()" in told
    opt.step(rows_by(told, x, w))


def rows_by(told, x, w):
    """The gradient that a message says how to write, which is that of the dense one."""
    code = re.search(r"adaptive_c\.Rows\(.*?\(\)\)", told)[0]
    known = {"adaptive_c": ac, "x": x}
    if found := re.search(r" with x = (.*) and i = (.*)$", told):
        known["x"] = eval(found[1], known)
        known["i"] = eval(found[2], {**known, "numpy": np})
    rows = eval(code, known)
    assert type(rows) is ac.Rows
    dense = x.toarray() if hasattr(x, "toarray") else x.to_dense().numpy()
    one, other = w.copy(), w.copy()
    ac.SGD(one, lr=0.5).step(rows)
    ac.SGD(other, lr=0.5).step(np.ascontiguousarray(dense))
    np.testing.assert_array_equal(one, other)
    return rows


def test_step_takes_the_gradients_alone():
    w, g = np.ones((5, 3)), np.ones((5, 3))
    opt = ac.SGD(w, lr=1.0)
    listed = ac.SGD([w], lr=1.0)
    for call in (lambda: opt.step(w, g), lambda: listed.step([w], [g]), lambda: opt.step({"a": w}, {"a": g})):
        told = refused((TypeError, ValueError), call)
        assert "step takes the gradients alone" in told
        assert len(told) < 400  # not the whole array
    assert (w == 1).all()
    assert opt.t == 0
    assert "metric" in refused(TypeError, lambda: opt.step(g, metric="loss"))


@pytest.mark.parametrize("lr", [1.0, 1.5])
def test_an_equal_value_of_another_kind_is_refused_as_ever(lr):
    opt = ac.SGD(np.ones(2), lr=lr)
    d = copy.deepcopy(opt.state_dict())
    for name, value in (("lr", True), ("lr", np.array([1.0, 2.0])), ("maximize", 0)):
        wrong = copy.deepcopy(d)
        wrong["groups"][0]["options"][name] = value
        with pytest.raises((TypeError, ValueError), match=f"^state_dict: group 0: {name} must be"):
            opt.load_state_dict(wrong)


def test_bounds_of_numbers_replace_bounds_of_arrays():
    opt = ac.SGD(np.zeros(2), bounds=(np.zeros(2), np.ones(2)))
    opt.load_state_dict(ac.SGD(np.zeros(2), bounds=(0.25, 0.5)).state_dict())
    assert opt.param_groups[0]["bounds"] == (0.25, 0.5)
    opt.step(np.zeros(2))
    assert opt.param_groups[0]["params"][0] == 0.25


def test_a_group_dict_that_is_not_in_a_list():
    with pytest.raises(ValueError, match=r"looks like one group dict; groups come in a list"):
        ac.SGD({"params": np.ones(2), "lr": 0.1})


# --- one thing and several ----------------------------------------------------------------------------------------


def told(call, *given, **options):
    """What is said when a call is refused."""
    with pytest.raises((TypeError, ValueError, IndexError)) as caught:
        call(*given, **options)
    return str(caught.value)


def test_one_thing_is_no_plural():
    """Each message with one of what it counts, and with two."""
    for n in (1, 2):
        params = [np.ones(1, "f4") for _ in range(n)]
        grads = [np.ones(1, "f4") for _ in range(n)]
        opt = ac.SGD(params, lr=0.5, keep_undo=True)
        own, other = (ac.SGD([{"params": np.ones(1)} for _ in range(m)]) for m in (3 - n, n))
        opt.step(grads)
        arrays = "1 array" if n == 1 else "2 arrays"
        assert repr(opt).endswith("t=1, 1 float32 element)" if n == 1 else "t=1, 2 float32 elements)")
        assert f"<{arrays}>" in repr(opt.param_groups[0])
        assert f"grads must be a list of {arrays}, as" in told(opt.step, 3)
        assert f"copy_to must be a list of {arrays}, as" in told(ac.SGD, params, copy_to=3)
        assert f"there {'is' if n == 1 else 'are'} {arrays}, 0 .. {n - 1}; got 2" in told(place, opt, 2)
        assert f"got {'1 argument' if n == 1 else '4 arguments'}" in told(place, opt, *range(3 * n - 3))
        groups = "1 parameter group" if n == 1 else "2 parameter groups"
        assert f"state_dict has {groups}, this optimizer {3 - n}" in told(own.load_state_dict, other.state_dict())
        torchs = {"state": {}, "param_groups": [{"params": list(range(3 - n))}]}
        tensors = "1 tensor" if n == 2 else "2 tensors"
        assert f"has {tensors}, this optimizer's group {arrays}; " in told(opt.load_state_dict, torchs)
        longer = {**opt.state_dict(), "groups": [{**opt.state_dict()["groups"][0], "sizes": [1] * (3 - n)}]}
        elements = "1 element" if n == 2 else "2 elements"
        assert f"group 0 has {elements}, this" in told(opt.load_state_dict, longer)
        opt.step(grads)
        for _ in range(n):
            opt.accumulate(grads)
        pending = "1 accumulated gradient is pending, " if n == 1 else "2 accumulated gradients are pending, "
        assert told(opt.step, grads).startswith(pending)
        assert told(opt.rollback).startswith(pending)
        assert told(opt.add_param_group, {"params": np.ones(1)}).startswith(pending)


def place(opt, *key):
    """Step an array of the first group, named by its index, inside a block; without a key the gradient is all."""
    with opt.stepping() as now:
        now(*key, np.ones(1, "f4"))

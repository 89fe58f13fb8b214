"""PyTorch's state_dicts, both ways: one library steps on where the other stopped."""

import copy

import numpy as np
import pytest
from test_torch import CASES, IDS, SHAPES, double  # noqa: F401  the fixture

import adaptive_c as ac

torch = pytest.importorskip("torch", minversion="2.13")

pytestmark = pytest.mark.later("torch")

MORE = [
    ("Rprop", {"lr": 0.1, "maximize": True}),
    ("NAdam", {"lr": 0.1, "momentum_decay": 0.1}),
    ("Adagrad", {"lr": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3}),
]
CASES = [*CASES, *MORE]
IDS = [*IDS, *(f"{name}-more-{i}" for i, (name, _) in enumerate(MORE))]


def close(ours, theirs):
    """1e-11 relative, or of 1e-3: scalars are formed another way, and RAdam's rectification cancels digits."""
    theirs = theirs.detach().numpy()
    assert np.all(np.abs(ours - theirs) <= 1e-11 * (np.abs(theirs) + 1e-3)), (ours, theirs)


def ours(name, options, params):
    """Two groups, the second with options of its own."""
    return getattr(ac, name)([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], **options)


def theirs(name, options, params):
    return getattr(torch.optim, name)([{"params": params[:2]}, {"params": params[2:], "lr": 0.02}], **options)


def run_ours(opt, steps, rng):
    for t in range(steps):
        grads = [np.asarray(rng.normal(size=shape)) for shape in SHAPES]
        opt.step([[grads[0], grads[1] if t % 2 else None], [*grads[2:3], None]])


def run_theirs(opt, params, steps, rng):
    for t in range(steps):
        grads = [np.asarray(rng.normal(size=shape)) for shape in SHAPES]
        for i, (q, g) in enumerate(zip(params, grads, strict=True)):
            q.grad = None if i == 3 or (i == 1 and not t % 2) else torch.tensor(g)
        opt.step()


def start(seed=0):
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.normal(size=shape)) for shape in SHAPES]


def tensors(arrays):
    return [torch.tensor(x, requires_grad=True) for x in arrays]


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("before", [0, 1, 5])
def test_pytorch_steps_on(name, options, before):
    p = start()
    opt = ours(name, options, p)
    run_ours(opt, before, np.random.default_rng(1))
    opt.param_groups[0]["weight_decay" if "weight_decay" in options else "lr"] = 0.03
    q = tensors(p)
    other = theirs(name, {"lr": 0.7}, q)  # its options are the dict's
    other.load_state_dict(opt.state_dict(format="torch"))
    run_ours(opt, 6, np.random.default_rng(2))
    run_theirs(other, q, 6, np.random.default_rng(2))
    for x, y in zip(p, q, strict=True):
        close(x, y)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("before", [0, 1, 5])
def test_we_step_on(name, options, before):
    q = tensors(start())
    other = theirs(name, options, q)
    run_theirs(other, q, before, np.random.default_rng(1))
    other.param_groups[0]["weight_decay" if "weight_decay" in options else "lr"] = 0.03
    torch.optim.lr_scheduler.ConstantLR(other, factor=1.0)  # leaves initial_lr behind
    p = [y.detach().numpy().copy() for y in q]
    switches = {k: v for k, v in options.items() if k in ("momentum", "centered", "amsgrad")}
    opt = ours(name, {"lr": 0.7, **switches}, p)
    opt.load_state_dict(other.state_dict())
    if name != "SGD":
        assert opt.t == before
    run_ours(opt, 6, np.random.default_rng(2))
    run_theirs(other, q, 6, np.random.default_rng(2))
    for x, y in zip(p, q, strict=True):
        close(x, y)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_there_and_back(name, options):
    """Our dict through PyTorch's optimizer into ours: the same bits, and the same dict again."""
    p = start()
    opt = ours(name, options, p)
    run_ours(opt, 4, np.random.default_rng(1))
    q = tensors(p)
    other = theirs(name, options, q)
    other.load_state_dict(opt.state_dict(format="torch"))
    p2 = [x.copy() for x in p]
    back = ours(name, options, p2)
    back.load_state_dict(other.state_dict())
    assert {k: v for k, v in back.param_groups[0].items() if k != "params"} == {
        k: v for k, v in opt.param_groups[0].items() if k != "params"
    }
    for name_ in opt.state:
        if name == "SGD" and name_ == "step":
            continue  # PyTorch's SGD does not count
        for group, group2 in zip(opt.state[name_], back.state[name_], strict=True):
            for x, y in zip(group, group2, strict=True):
                np.testing.assert_array_equal(x, y)
    run_ours(opt, 3, np.random.default_rng(2))
    run_ours(back, 3, np.random.default_rng(2))
    for x, y in zip(p, p2, strict=True):
        np.testing.assert_array_equal(x, y)


def test_every_class_of_both_is_here():
    shared = {name for name in ac.optimizers.__all__ if hasattr(torch.optim, name)}
    assert shared == {name for name, _ in CASES}
    for name in set(ac.optimizers.__all__) - shared:
        with pytest.raises(ValueError, match=f"{name}"):
            getattr(ac, name)(np.ones(3)).state_dict(format="torch")


@pytest.mark.parametrize("name", ["AdamW", "Rprop", "SGD"])
def test_every_key_of_pytorchs_groups_is_there(name):
    opt = ours(name, {"momentum": 0.9} if name == "SGD" else {}, start())
    other = theirs(name, {}, tensors(start()))
    for mine, its in zip(
        opt.state_dict(format="torch")["param_groups"], other.state_dict()["param_groups"], strict=True
    ):
        assert mine.keys() == its.keys()
        assert mine["params"] == its["params"]
        assert all(mine[key] == its[key] for key in ("foreach", "fused", "differentiable") if key in its)


def test_tensors_are_copies():
    p = [np.ones(5)]
    opt = ac.Adam(p)
    opt.step([np.ones(5)])
    d = opt.state_dict(format="torch")
    before = d["state"][0]["exp_avg"].clone()
    opt.step([np.ones(5)])
    assert torch.equal(before, d["state"][0]["exp_avg"])


@pytest.mark.parametrize("state_dtype", ["bfloat16", "uint8"])
def test_narrow_state(state_dtype):
    """Export decodes it; import takes the nearest, so that what came from there goes back unchanged."""
    rng = np.random.default_rng(0)
    shapes = [(300,), (7, 11), (1000,)]
    p = [rng.normal(size=s).astype("f4") for s in shapes]
    opt = ac.AdamW(p, state_dtype=state_dtype)
    for _ in range(3):
        opt.step([rng.normal(size=s).astype("f4") for s in shapes])
    q = [torch.tensor(x, requires_grad=True) for x in p]
    other = torch.optim.AdamW(q)
    other.load_state_dict(opt.state_dict(format="torch"))
    for name in ("exp_avg", "exp_avg_sq"):
        for x, y in zip(opt.decoded_state(name), q, strict=True):
            np.testing.assert_array_equal(x, other.state[y][name].numpy())
    back = ac.AdamW([x.copy() for x in p], state_dtype=state_dtype)
    back.load_state_dict(other.state_dict())
    for name in opt.state:
        np.testing.assert_array_equal(np.concatenate([np.ravel(x) for x in opt.state[name]]),
                                      np.concatenate([np.ravel(x) for x in back.state[name]]), name)  # fmt: skip
    fine = torch.optim.AdamW([torch.tensor(x, requires_grad=True) for x in p])
    for q, g in zip(fine.param_groups[0]["params"], shapes, strict=True):
        q.grad = torch.tensor(rng.normal(size=g).astype("f4"))
    fine.step()
    back.load_state_dict(fine.state_dict())
    for x, q in zip(back.decoded_state("exp_avg"), fine.param_groups[0]["params"], strict=True):
        exact = fine.state[q]["exp_avg"].numpy()
        scale = np.abs(exact) if state_dtype == "bfloat16" else np.maximum(np.abs(exact), 2.0**-8 * np.abs(exact).max())
        assert np.all(np.abs(x - exact) <= 2.0**-4 * scale)  # half a step of three bits of mantissa


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
def test_master_copies_and_averages_begin_anew(kind):
    """PyTorch's dict has none, and those of the construction may be of other numbers."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtype = np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
    q = torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=getattr(torch, kind), requires_grad=True)
    other = torch.optim.AdamW([q])
    q.grad = torch.ones_like(q)
    other.step()
    p, copies = np.zeros(4, dtype), np.zeros(4, "f4")
    opt = ac.AdamW([p], ema_decay=0.5, copy_to=[copies], master=None if kind == "float32" else "float32")
    p[:] = q.detach().float().numpy().astype(dtype)  # written after construction
    opt.load_state_dict(other.state_dict())
    wide = p.astype("f4")
    for held in (opt.ema[0], copies, *([] if kind == "float32" else [opt.state["master"][0]])):
        np.testing.assert_array_equal(held, wide)
    opt.step([np.zeros(4, "f4")])
    assert abs(p.astype("f4") - wide).max() < 0.02  # the run goes on from there


def test_sgd_goes_on_with_our_counts_which_pytorch_does_not_have():
    opt = ac.SGD([np.ones(2), np.ones(2)], lr=1.0, momentum=0.5)
    for grads in ([np.ones(2), None], [np.ones(2), None], [None, np.ones(2)]):
        opt.step(grads)
    opt.load_state_dict(opt.state_dict(format="torch"))
    assert opt.t == 3
    assert [int(n) for n in opt.state["step"]] == [2, 1]


def test_sums_do_not_outlive_the_state_that_is_loaded():
    p = np.zeros(2)
    opt = ac.SGD(p, lr=1.0)
    opt.accumulate(np.ones(2))
    opt.load_state_dict(opt.state_dict(format="torch"))
    assert opt.pending == 0
    opt.accumulate(np.ones(2))
    opt.step()
    np.testing.assert_array_equal(p, -1)


def test_torchs_bfloat16_and_arrays_instead_of_tensors():
    q = [torch.ones(5, dtype=torch.bfloat16, requires_grad=True)]
    other = torch.optim.Adam(q, lr=torch.tensor(0.1))
    q[0].grad = torch.full((5,), 0.5, dtype=torch.bfloat16)
    other.step()
    opt = ac.Adam([np.ones(5, "f4")])
    opt.load_state_dict(other.state_dict())
    np.testing.assert_array_equal(opt.state["exp_avg"][0], other.state[q[0]]["exp_avg"].float().numpy())
    assert opt.param_groups[0]["lr"] == pytest.approx(0.1)
    d = other.state_dict()
    d["state"][0] = {key: x.float().numpy() for key, x in d["state"][0].items()}
    again = ac.Adam([np.ones(5, "f4")])
    again.load_state_dict(d)
    np.testing.assert_array_equal(again.state["exp_avg_sq"][0], opt.state["exp_avg_sq"][0])


def test_the_sign_of_a_gradient_that_was_nan_is_0():
    opt = ac.Rprop([np.ones(3)])
    opt.step([np.ones(3)])
    d = opt.state_dict(format="torch")
    d["state"][0]["prev"] = np.array([np.nan, -2.0, 0.5])
    opt.load_state_dict(d)
    np.testing.assert_array_equal(opt.state["prev"][0], [0, -1, 1])


def stepped(name, options, shapes=((3,), (2, 2))):
    q = [torch.ones(s, requires_grad=True) for s in shapes]
    other = getattr(torch.optim, name)(q, **options)
    for x in q:
        x.grad = torch.ones_like(x)
    other.step()
    return other.state_dict()


def changed(d, path, value):
    d = copy.deepcopy(d)
    inner = d
    for key in path[:-1]:
        inner = inner[key]
    if value is None:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return d


class Longer(list):
    """A list that gives more than it counts."""

    def __iter__(self):
        yield from list.__getitem__(self, slice(None))
        yield list.__getitem__(self, -1)


REFUSED = [
    ("AdamW", {}, ("param_groups", 0, "decoupled_weight_decay"), False, ValueError, "decoupled_weight_decay=False.*another class"),
    ("Adam", {}, ("param_groups", 0, "params"), [0], ValueError, "has 1 tensor, this optimizer's group 2.*same cut"),
    ("Adam", {}, ("param_groups", 0, "params"), Longer([0, 1]), ValueError, "has 3 tensors, this optimizer's group 2.*same cut"),
    ("Adam", {}, ("param_groups",), Longer([{"params": [0, 1]}]), ValueError, "has 2 parameter groups, this optimizer 1"),
    ("Adam", {}, ("param_groups", 0, "layer"), "head", ValueError, "'layer', which is no option of Adam: is it of another"),
    ("Adam", {}, ("param_groups", 0, "lr"), -1.0, ValueError, r"lr must be in \[0, inf\), got -1.0"),
    ("Adam", {}, ("state", 0, "exp_avg"), np.ones(4), ValueError, r"'exp_avg'\] has shape \(4,\), its parameter \(3,\)"),
    ("Adam", {}, ("state", 0, "exp_avg"), "x", TypeError, "must be a tensor or an array, got str"),
    ("Adam", {}, ("state", 0, "exp_avg"), None, ValueError, "has step, exp_avg_sq, this optimizer needs exp_avg, exp_avg_sq"),
    ("Adam", {}, ("state", 1, "step"), 1.5, ValueError, "'step'] must be a count of steps, got 1.5"),
    ("Adam", {}, ("state", 1, "step"), "x", TypeError, r"\[1\]\['step'\] must be a number, or a tensor or array of one, got 'x'"),
    ("Adam", {}, ("param_groups", 0, "lr"), "x", TypeError, r"\['lr'\] must be a number, or a tensor or array of one, got 'x'"),
    ("NAdam", {}, ("state", 1, "mu_product"), np.nan, ValueError, "mu_product must not be negative, NaN or"),
    ("Adam", {"amsgrad": True}, ("param_groups", 0, "lr"), 0.1, ValueError, "would need new state|construct it with"),
    ("Adam", {}, ("state",), 3, TypeError, "a dict 'state'"),
    ("Adam", {}, ("param_groups",), [], ValueError, "has 0 parameter groups, this optimizer 1"),
    ("Adam", {}, ("param_groups", 0), 5, TypeError, "must be a dict with the list 'params'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options", "path", "value", "error", "message"), REFUSED)
def test_refused_with_nothing_changed(name, options, path, value, error, message):
    d = changed(stepped(name, options), path, value)
    p = [np.ones(3), np.ones((2, 2))]
    opt = getattr(ac, name)(p, lr=0.5)
    opt.step([np.ones(3), np.ones((2, 2))])
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(error, match=message):
        opt.load_state_dict(d)
    after = opt.state_dict()
    assert str(before) == str(after)
    for x, y in zip(before["groups"][0]["arrays"].values(), after["groups"][0]["arrays"].values(), strict=True):
        np.testing.assert_array_equal(x, y)


def test_what_pytorch_does_not_have_is_refused():
    with pytest.raises(ValueError, match="PyTorch has no Lion; it has SGD"):
        ac.Lion(np.ones(3)).state_dict(format="torch")
    with pytest.raises(ValueError, match="PyTorch has no SuperSAB"):
        ac.SuperSAB(np.ones(3)).load_state_dict(stepped("Adam", {}))
    with pytest.raises(ValueError, match="PyTorch's Adam has no eps_mode='inside', only 'outside'"):
        ac.Adam(np.ones(3), eps_mode="inside").state_dict(format="torch")
    with pytest.raises(ValueError, match="PyTorch's Rprop has no variant='rprop\\+', only 'irprop-'"):
        ac.Rprop(np.ones(3), variant="rprop+").state_dict(format="torch")
    with pytest.raises(ValueError, match="format must be 'torch' or None, got 'jax'"):
        ac.Adam(np.ones(3)).state_dict(format="jax")


@pytest.mark.parametrize(("name", "wrong"), [("step", -2), ("mu_product", np.nan)])
def test_a_count_that_no_load_accepts_is_not_described(name, wrong):
    opt = ac.NAdam([np.ones(3), np.ones(2)])
    opt.step([np.ones(3), np.ones(2)])
    opt.state[name][1][...] = wrong
    with pytest.raises(ValueError, match=rf"param_groups\[0\]: {name} must not be negative, NaN or 2\*\*62 and more"):
        opt.state_dict(format="torch")


def test_loading_does_not_import_torch():
    import subprocess
    import sys

    code = (
        "import sys, numpy as np, adaptive_c as ac; o = ac.Adam([np.ones(3)]); "
        "o.load_state_dict({'state': {0: {'step': 2, 'exp_avg': np.ones(3), 'exp_avg_sq': np.ones(3)}}, "
        "'param_groups': [{'lr': 0.5, 'params': [0]}]}); assert o.t == 2 and 'torch' not in sys.modules; print('fine')"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/").stdout == "fine\n"

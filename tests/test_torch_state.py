"""Checkpoints of adaptive_c.torch: ours to ours to the bit, torch's to ours and back in the middle of a run."""

import copy
import io
import pickle

import numpy as np
import pytest
from test_checkpoint_torch import CASES, IDS

import adaptive_c as ac

torch = pytest.importorskip("torch", minversion="2.13")
from tensors import double, parameters  # noqa: E402, F401

import adaptive_c.torch as door  # noqa: E402

pytestmark = pytest.mark.later("torch")

NAMES = [name for name in door.__all__ if name not in ("Optimizer", "in_backward")]
SHAPES = [(30, 4), (5,), (), (2, 1, 200)]
BUFFERS = {"SGD": {"momentum": 0.9}, "RMSprop": {"momentum": 0.9, "centered": True}, "Adam": {"amsgrad": True}}
FORMATS = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {"ema_decay": 0.9}),
    "uint8": (torch.float32, {"state_dtype": "uint8", "ema_decay": 0.9}),
    "bfloat16 state": (torch.float32, {"state_dtype": torch.bfloat16}),
    "stochastic": (torch.bfloat16, {"rounding": "stochastic", "state_dtype": "uint8"}),
    "master": (torch.bfloat16, {"master": "float32", "ema_decay": 0.9}),
    "float16": (torch.float16, {"master": "float32"}),
}


def again(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def run(opt, params, steps, seed, leave=()):
    generator = torch.Generator().manual_seed(seed)
    for t in range(steps):
        for i, p in enumerate(params):
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
            p.grad = None if i in leave or (i == 1 and t % 2) else g
        opt.step()


def assert_bits(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def close(ours, theirs):
    """1e-11 relative, or of 1e-3, as in test_checkpoint_torch.py."""
    for x, y in zip(ours, theirs, strict=True):
        assert bool(((x - y).abs() <= 1e-11 * (y.abs() + 1e-3)).all()), (x, y)


# --- ours to ours ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, "SGD without momentum"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_way_to_go_on_has_the_bits_of_the_run(name, form):
    """A file that is read with weights_only, a pickle, a copy: parameters, state, averages, counts."""
    dtype, options = FORMATS[form]
    options = {**options, **BUFFERS.get(name, {})}
    name = name.split()[0]
    if options.get("state_dtype") and (name in ("Rprop", "SuperSAB") or options.get("centered")):
        options = {key: x for key, x in options.items() if key not in ("state_dtype", "centered")}
    p = parameters(SHAPES, dtype)
    opt = getattr(door, name)(p, seed=5, **options)
    run(opt, p, 5, 1, leave=[3])
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    q = again(p)
    loaded = getattr(door, name)(q, seed=5, lr=0.5, **options)
    loaded.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
    ways = [(loaded, q), copy.deepcopy((opt, p)), pickle.loads(pickle.dumps((opt, p)))]
    run(opt, p, 4, 2)
    wanted = opt.state_dict()
    for other, params in ways:
        run(other, params, 4, 2)
        assert_bits(p, params)
        found = other.state_dict()
        assert found["adaptive_c"] == pytest.approx(wanted["adaptive_c"], nan_ok=True)
        for mine, its in zip(wanted["param_groups"], found["param_groups"], strict=True):
            assert mine == its
        assert found["state"].keys() == wanted["state"].keys()
        for number, state in wanted["state"].items():
            assert found["state"][number].keys() == state.keys()
            for key, value in state.items():
                assert found["state"][number][key].dtype is value.dtype
                assert torch.equal(found["state"][number][key], value)
    assert opt.t == 9


def test_settings_go_with_a_copy():
    p = parameters(SHAPES)
    opt = door.AdamW(p, max_grad_norm=0.5, on_nonfinite="skip", seed=7, n_threads=1)
    opt.max_grad_norm = 0.25
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert (other.max_grad_norm, other.on_nonfinite, other.seed, other.n_threads) == (0.25, "skip", 7, 1)
        assert {name for name in vars(other) if name[0] != "_"} == {name for name in vars(opt) if name[0] != "_"}


def test_a_loaded_state_is_a_copy():
    """Neither the dict nor the optimizer that it came from is written."""
    p, q = parameters(SHAPES), parameters(SHAPES)
    opt, other = door.AdamW(p), door.AdamW(q)
    run(opt, p, 2, 1)
    given = opt.state_dict()
    kept = copy.deepcopy(given)
    other.load_state_dict(given)
    run(other, q, 2, 2)
    for number, state in kept["state"].items():
        assert all(torch.equal(given["state"][number][key], value) for key, value in state.items())
    run(opt, p, 2, 2)
    assert opt.state[p[0]]["exp_avg"].data_ptr() != other.state[q[0]]["exp_avg"].data_ptr()


def test_formats_are_the_constructors():
    """A run goes on in narrow state, and back; options become those of the dict."""
    p = parameters(SHAPES, torch.float32)
    opt = door.AdamW(p, lr=0.02)
    run(opt, p, 3, 1)
    narrow = door.AdamW(again(p), state_dtype="uint8")
    narrow.load_state_dict(opt.state_dict())
    assert narrow.param_groups[0]["lr"] == 0.02
    assert narrow.param_groups[0]["state_dtype"] == "uint8"
    assert "exp_avg_code" in narrow.state[narrow.param_groups[0]["params"][0]]
    wide = door.AdamW(again(p))
    wide.load_state_dict(narrow.state_dict())
    for mine, its in zip(opt.state.values(), wide.state.values(), strict=True):
        torch.testing.assert_close(mine["exp_avg"], its["exp_avg"], rtol=0.07, atol=1e-6)
        assert its.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert torch.equal(mine["step"], its["step"])


def test_codes_that_lie_elsewhere_in_their_blocks():
    """Behind another tensor the same codes have other neighbours: they are decoded, and encoded anew."""
    p = parameters([(100,), (300,)], torch.float32)
    opt = door.AdamW(p, state_dtype="uint8")
    run(opt, p, 3, 1)
    before = opt.state_dict(format="torch")["state"][1]
    del opt.state[opt.param_groups[0]["params"].pop(0)]
    p[1].grad = None
    opt.step()
    assert opt.state[p[1]]["exp_avg_sq_offset"] == 0
    after = opt.state_dict(format="torch")["state"][0]
    for key in ("exp_avg", "exp_avg_sq"):
        scale = before[key].abs().max()
        torch.testing.assert_close(after[key] / scale, before[key] / scale, rtol=0.07, atol=1e-4)


def test_codes_whose_shared_block_has_two_scales():
    """Tensors of two runs meet in one block, which has one scale: both are encoded anew."""
    p = parameters([(100,), (50,)], torch.float32)
    dicts = []
    for size in (1.0, 2.0**12):
        opt = door.AdamW(again(p), state_dtype="uint8")
        for q in opt.param_groups[0]["params"]:
            q.grad = torch.linspace(0.5, 1, q.numel(), dtype=torch.float32) * size
        opt.step()
        dicts.append((copy.deepcopy(opt.state_dict()), opt.state_dict(format="torch")["state"]))
    (mixed, wanted), (other, its) = dicts
    mixed["state"][1], wanted[1] = other["state"][1], its[1]
    opt = door.AdamW(p, state_dtype="uint8")
    opt.load_state_dict(mixed)
    found = opt.state_dict(format="torch")["state"]
    for number in (0, 1):
        torch.testing.assert_close(found[number]["exp_avg_sq"], wanted[number]["exp_avg_sq"], rtol=0.07, atol=0)


def test_keys_of_the_users_stay():
    p = parameters(SHAPES)
    opt = door.AdamW(p)
    run(opt, p, 2, 1)
    opt.state[p[0]]["mine"] = "note"
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    run(opt, p, 1, 1)
    assert opt.state[p[0]]["mine"] == "note"
    assert opt.state[p[0]].keys() == {"step", "exp_avg", "exp_avg_sq", "mine"}


def test_names_of_parameters():
    p = parameters(SHAPES)
    opt = door.AdamW([(f"w{i}", x) for i, x in enumerate(p)])
    run(opt, p, 2, 1)
    assert opt.state_dict()["param_groups"][0]["param_names"] == ["w0", "w1", "w2", "w3"]
    q = again(p)
    other = door.AdamW(q)
    other.load_state_dict(opt.state_dict())
    run(opt, p, 1, 2)
    run(other, q, 1, 2)
    assert_bits(p, q)


@pytest.mark.parametrize(("change", "match"), [
    (lambda d: d["state"][0].update(exp_avg=torch.zeros(3)), "the state 'exp_avg' must be a tensor of its parameter's shape"),
    (lambda d: d["state"][0].pop("exp_avg"), "needs exp_avg, exp_avg_sq, step"),
    (lambda d: d["state"][0].update(step=torch.tensor(-1.0)), "count of steps"),
    (lambda d: d["state"][1].update(step=None), r"state_dict\['state'\]\[1\]\['step'\] must be a number, or a tensor or array of one, got None"),
    (lambda d: d["state"][1].update(step="x"), r"\[1\]\['step'\] must be a number, or a tensor or array of one, got 'x'"),
    (lambda d: d["state"][1].update(step=torch.ones(2)), r"\[1\]\['step'\] must be one number, got shape \(2,\)"),
    (lambda d: d["param_groups"][0].update(lr=-1.0), "lr must be in"),
    (lambda d: d["param_groups"].pop(), "different number of parameter groups"),
    (lambda d: d["param_groups"][0]["params"].pop(), "doesn't match the size"),
])  # fmt: skip
def test_a_dict_that_does_not_fit_changes_nothing(change, match):
    p = parameters(SHAPES)
    opt = door.AdamW(p)
    run(opt, p, 2, 1)
    bad = copy.deepcopy(opt.state_dict())
    before = copy.deepcopy(bad)
    change(bad)
    with pytest.raises((ValueError, TypeError), match=match):
        opt.load_state_dict(bad)
    assert not opt._optimizer_load_state_dict_pre_hooks
    q = again(p)
    twin = door.AdamW(q)
    twin.load_state_dict(before)
    run(opt, p, 2, 2)
    run(twin, q, 2, 2)
    assert_bits(p, q)


@pytest.mark.parametrize("name", ["AdamW", "Adagrad", "Lion", "Yogi"])
def test_the_state_of_a_rule_that_does_not_count(name):
    p = parameters(SHAPES)
    theirs = torch.optim.SGD(p, lr=0.1, momentum=0.9)
    run(theirs, p, 1, 1)
    opt = getattr(door, name)(p)
    with pytest.raises(
        ValueError, match=rf"has momentum_buffer and no 'step', .* of {name} have: is it of another class"
    ):
        opt.load_state_dict(theirs.state_dict())
    run(opt, p, 1, 1)
    assert opt.t == 1


# --- torch's ---------------------------------------------------------------------------------------------------------------


def both(name, options, p, q):
    kinds = [(door, p, options), (torch.optim, q, options)]
    return [getattr(kind, name)([{"params": x[:2]}, {"params": x[2:], "lr": 0.02}], **own) for kind, x, own in kinds]


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("before", [0, 1, 5])
def test_torch_steps_on(name, options, before):
    p = parameters(SHAPES)
    q = again(p)
    ours, theirs = both(name, options, p, q)
    run(ours, p, before, 1, leave=[3])
    q = again(p)
    _, theirs = both(name, {"lr": 0.7}, p, q)
    theirs.load_state_dict(copy.deepcopy(ours.state_dict()))
    run(ours, p, 6, 2)
    run(theirs, q, 6, 2)
    close(p, q)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("before", [0, 1, 5])
def test_we_step_on(name, options, before):
    """Into one that was constructed with no option at all: all of them are the dict's, with the state that they need."""
    q = parameters(SHAPES)
    _, theirs = both(name, options, parameters(SHAPES), q)
    run(theirs, q, before, 1, leave=[3])
    p = again(q)
    ours, _ = both(name, {"lr": 0.7}, p, q)
    ours.load_state_dict(theirs.state_dict())
    run(ours, p, 6, 2)
    run(theirs, q, 6, 2)
    close(p, q)


def test_narrow_state_goes_to_torch_decoded():
    p = parameters(SHAPES, torch.float32)
    opt = door.AdamW(p, state_dtype="uint8", ema_decay=0.9, lr=0.03)
    run(opt, p, 3, 1)
    theirs = torch.optim.AdamW(again(p))
    fresh = copy.deepcopy(theirs.state_dict())
    given = opt.state_dict(format="torch")
    assert given.keys() == fresh.keys()
    assert given["param_groups"][0].keys() == fresh["param_groups"][0].keys()
    theirs.load_state_dict(given)
    assert theirs.param_groups[0]["lr"] == 0.03
    plain = ac.AdamW([x.detach().numpy().copy() for x in p], state_dtype="uint8")
    plain.load_state_dict(given)
    for i, q in enumerate(theirs.param_groups[0]["params"]):
        assert theirs.state[q].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for key in ("exp_avg", "exp_avg_sq"):
            mine = plain.decoded_state(key)[i]
            np.testing.assert_array_equal(theirs.state[q][key].numpy(), mine)


def test_what_torch_has_no_place_for():
    with pytest.raises(ValueError, match="PyTorch has no Lion"):
        door.Lion(parameters(SHAPES)).state_dict(format="torch")
    with pytest.raises(ValueError, match="no eps_mode='inside'"):
        door.Adam(parameters(SHAPES), eps_mode="inside").state_dict(format="torch")
    with pytest.raises(ValueError, match="format must be"):
        door.Adam(parameters(SHAPES)).state_dict(format="keras")


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "Rprop"])
def test_older_dicts(name):
    """Options that torch added later are missing in them, and a step was a number."""
    p = parameters(SHAPES)
    opt = getattr(door, name)(p)
    run(opt, p, 2, 1)
    old = copy.deepcopy(opt.state_dict())
    del old["adaptive_c"]
    for group in old["param_groups"]:
        for key in ("maximize", "foreach", "capturable", "differentiable", "fused", "eps_mode", "ema_decay"):
            group.pop(key, None)
    for state in old["state"].values():
        state["step"] = state["step"].item()
    opt.load_state_dict(old)
    run(opt, p, 1, 2)
    assert opt.param_groups[0]["maximize"] is False


def test_a_dict_of_another_machine():
    """capturable=True is how torch computed there; it is no reason to refuse the dict."""
    p, q = parameters(SHAPES), parameters(SHAPES)
    theirs, ours = torch.optim.AdamW(q), door.AdamW(p)
    run(theirs, q, 2, 1)
    given = copy.deepcopy(theirs.state_dict())
    given["param_groups"][0].update(capturable=True, fused=True)
    ours.load_state_dict(given)
    assert ours.param_groups[0]["capturable"] is False
    assert ours.t == 2


def test_state_that_is_given_before_the_first_step():
    """As some tests of torch's do: it is taken over."""
    p, q = parameters(SHAPES), parameters(SHAPES)
    ours, theirs = door.Adam(p), torch.optim.Adam(q)
    for opt in (ours, theirs):
        for x in opt.param_groups[0]["params"]:
            opt.state[x] = {"step": torch.tensor(3.0), "exp_avg": torch.full_like(x, 0.1).detach(),
                            "exp_avg_sq": torch.full_like(x, 0.2).detach()}  # fmt: skip
    run(ours, p, 3, 1)
    run(theirs, q, 3, 1)
    close(p, q)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled", "ignore:TypedStorage is deprecated")
def test_distributed_checkpoints(tmp_path):
    """torch.distributed.checkpoint initialises the state by a step with lr 0, and loads into the tensors in place."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    torch.set_default_dtype(torch.float32)

    def made(kind):
        torch.manual_seed(0)
        m = torch.nn.Linear(5, 4)
        return m, kind.AdamW(m.parameters(), lr=0.01)

    def train(m, opt, steps, seed):
        run(opt, list(m.parameters()), steps, seed)

    results = []
    for kind in (door, torch.optim):
        m, opt = made(kind)
        train(m, opt, 3, 1)
        weights, state = get_state_dict(m, opt)
        folder = tmp_path / kind.__name__
        checkpoint.save({"m": weights, "o": state}, checkpoint_id=folder, no_dist=True)
        m2, opt2 = made(kind)
        weights, state = get_state_dict(m2, opt2)
        both = {"m": weights, "o": state}
        checkpoint.load(both, checkpoint_id=folder, no_dist=True)
        set_state_dict(m2, opt2, model_state_dict=both["m"], optim_state_dict=both["o"])
        train(m, opt, 3, 2)
        train(m2, opt2, 3, 2)
        assert_bits(m.parameters(), m2.parameters())
        results.append(list(m.parameters()))
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)

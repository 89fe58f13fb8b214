"""A step of adaptive_c.torch: what torch, its schedulers and its users expect of one, and the options that it reads."""

import contextlib
import copy
import inspect
import re
import sys
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch", minversion="2.13")
from tensors import Pair, X, Y, backward, model, same  # noqa: E402
from torch.optim import lr_scheduler, optimizer  # noqa: E402

import adaptive_c as ac  # noqa: E402
import adaptive_c.torch as door  # noqa: E402

pytestmark = pytest.mark.later("torch")

# --- step ------------------------------------------------------------------------------------------------------------------


def test_a_step_is_a_function_of_the_class_and_a_bound_method():
    opt = door.AdamW(model().parameters())
    assert inspect.isfunction(type(opt).step)
    assert inspect.ismethod(opt.step)
    assert opt.step.__func__.hooked
    assert list(inspect.signature(opt.step).parameters) == ["closure"]


def test_closures():
    """With gradients enabled, also where they are not; by name and by place; the value is returned."""
    pair = Pair("SGD", lr=0.1)

    def closure(m, opt):
        assert torch.is_grad_enabled()
        return backward(m, opt)

    for call in (lambda opt, c: opt.step(c), lambda opt, c: opt.step(closure=c)):
        with torch.no_grad():
            ours = call(pair.ours, lambda: closure(pair.a, pair.ours))
            theirs = call(pair.theirs, lambda: closure(pair.b, pair.theirs))
        torch.testing.assert_close(ours, theirs)
    same(pair.a, pair.b)
    assert pair.ours.step() is None
    assert pair.ours.step(None) is None


def test_hooks():
    """Of the class, of the instance, before and after; those before may change the arguments."""
    m = model()
    opt, seen = door.AdamW(m.parameters()), []
    before = optimizer.register_optimizer_step_pre_hook(lambda o, args, kwargs: seen.append("all before"))
    after = optimizer.register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append("all after"))
    try:
        opt.register_step_pre_hook(lambda o, args, kwargs: ((o, lambda: seen.append("closure")), {}))
        opt.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
        backward(m, opt)
        opt.step()
    finally:
        before.remove()
        after.remove()
    assert seen == ["all before", "closure", "after", "all after"]


def test_hooks_of_state_dicts():
    opt, seen = door.AdamW(model().parameters()), []
    opt.register_state_dict_pre_hook(lambda o: seen.append("before"))
    opt.register_state_dict_post_hook(lambda o, d: {**d, "mine": 1})
    opt.register_load_state_dict_pre_hook(lambda o, d: seen.append(d.pop("mine")))
    opt.register_load_state_dict_post_hook(lambda o: seen.append("after"))
    opt.load_state_dict(opt.state_dict())
    opt.load_state_dict(opt.state_dict())
    assert seen == ["before", 1, "after"] * 2


def test_a_profiler_sees_the_step():
    m = model()
    opt = door.AdamW(m.parameters())
    backward(m, opt)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
    assert "Optimizer.step#AdamW.step" in {event.key for event in profile.key_averages()}


def test_written_parameters_are_noticed_by_autograd():
    w = torch.nn.Parameter(torch.ones(3))
    left = torch.nn.Parameter(torch.ones(3))
    opt = door.SGD([w, left])
    w.grad, before = torch.ones(3), left._version
    loss = (w**2).sum()
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert left._version == before


def test_gradients_come_and_go():
    """None leaves a tensor alone; zero_grad makes new ones elsewhere, or keeps them where they are."""
    pair = Pair("Adam", lr=0.05)
    first = [next(iter(m.parameters())) for m in (pair.a, pair.b)]
    for t in range(8):
        for m, opt in ((pair.a, pair.ours), (pair.b, pair.theirs)):
            opt.zero_grad(set_to_none=bool(t % 2))
            torch.nn.functional.mse_loss(m(X), Y).backward()
        if t % 3 == 0:
            for p in first:
                p.grad = None
        pair.ours.step()
        pair.theirs.step()
    same(pair.a, pair.b)
    assert pair.ours.state[first[0]]["step"] == 5
    assert pair.ours.t == 8


def test_no_gradient_at_all():
    m = model()
    opt = door.AdamW(m.parameters())
    opt.step()
    assert opt.t == 0
    assert not opt.state
    assert opt.state_dict()["state"] == {}


def test_a_gradient_with_a_graph():
    """create_graph=True leaves gradients that require gradients."""
    p = torch.nn.Parameter(torch.ones(3))
    opt = door.SGD([p], lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a cycle of references
        (p**3).sum().backward(create_graph=True)
    opt.step()
    p.grad = None
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.7))


def test_a_gradient_that_is_a_negative_view():
    p = torch.nn.Parameter(torch.zeros(3))
    opt = door.SGD([p], lr=1.0)
    p.grad = torch._neg_view(torch.ones(3))
    opt.step()
    assert p.tolist() == [1.0, 1.0, 1.0]


def test_gradients_are_held_during_a_step_and_no_longer():
    p = torch.nn.Parameter(torch.zeros(3, 4))
    opt = door.SGD([p])
    for g in (torch.ones(3, 4), torch.ones(4, 3).t(), torch.ones(3, 4).bfloat16(), torch.ones(3, 4).double()):
        p.grad_dtype = None
        p.grad = g
        before = sys.getrefcount(g)
        for _ in range(3):
            with contextlib.suppress(TypeError):  # float64 gradients of float32 parameters
                opt.step()
        assert sys.getrefcount(g) == before
    assert opt.t == 9


def test_gradients_of_another_dtype():
    """bfloat16 gradients of float32 parameters are widened as they are read."""
    p = torch.nn.Parameter(torch.zeros(300))
    p.grad_dtype = None
    opt = door.SGD([p], lr=1.0)
    p.grad = torch.arange(300.0).bfloat16()
    opt.step()
    assert torch.equal(p.detach(), -p.grad.float())


def test_tied_parameters():
    """One tensor under two names comes once, with the sum of its gradients."""
    made = []
    for kind in (door, torch.optim):
        torch.manual_seed(0)
        m = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
        m[1].weight = m[0].weight
        opt = kind.AdamW(m.parameters(), lr=0.01)
        for _ in range(3):
            backward(m, opt)
            opt.step()
        assert len(opt.param_groups[0]["params"]) == 5
        made.append(m)
    same(*made)


# --- options ---------------------------------------------------------------------------------------------------------------


def test_options_are_read_at_every_step():
    """Whoever changes a group's dict, and whatever is put there."""

    def groups(m):
        return [{"params": m[0].parameters(), "lr": 0.02}, {"params": m[2].parameters(), "betas": (0.8, 0.9)}]

    pair = Pair(groups=groups, lr=0.01)
    pair.step(2)
    changes = [("lr", 0.03), ("weight_decay", 0.2), ("betas", (0.7, 0.95)), ("eps", 1e-3), ("maximize", True),
               ("lr", torch.tensor(0.02)), ("lr", 1)]  # fmt: skip
    for name, value in changes:
        for opt in (pair.ours, pair.theirs):
            opt.param_groups[1][name] = value
            opt.param_groups[0]["lr"] *= 0.9
        pair.step()


def test_numbers_that_are_tensors():
    """They may be changed in place."""
    pair = Pair(lr=torch.tensor(0.01), betas=(torch.tensor(0.9), torch.tensor(0.99)))
    for _ in range(3):
        pair.step()
        for opt in (pair.ours, pair.theirs):
            opt.param_groups[0]["lr"].mul_(0.5)
            opt.param_groups[0]["betas"][1].fill_(0.95)


@pytest.mark.parametrize(("name", "value", "error", "match"), [
    ("lr", -1.0, ValueError, "lr must be in"),
    ("lr", float("nan"), ValueError, "lr must be in"),
    ("lr", "0.1", TypeError, "lr must be a number, or a tensor of one; got '0.1'"),
    ("betas", (0.9, 1.0), ValueError, "betas"),
    ("betas", (0.9, lambda t: 0.99), TypeError, "betas can't follow a schedule"),
    ("lr", ac.schedules.cosine(1e-3, 10), TypeError, "lr can't follow a schedule .*lr_scheduler"),
    ("ema_decay", lambda t: 0.9, TypeError, "ema_decay can't follow a schedule"),
    ("decoupled_weight_decay", False, ValueError, "decoupled_weight_decay=False is no choice of AdamW"),
])  # fmt: skip
def test_what_is_refused_in_a_group(name, value, error, match):
    """Before anything is written; and the next step goes on with what is put right."""
    m = model()
    opt = door.AdamW(m.parameters())
    backward(m, opt)
    opt.step()
    before, good = copy.deepcopy(m), opt.param_groups[0][name]
    opt.param_groups[0][name] = value
    with pytest.raises(error, match=match):
        opt.step()
    same(m, before, 0)
    assert opt.t == 1
    opt.param_groups[0][name] = good
    opt.step()
    assert opt.t == 2


def test_state_that_an_option_brings_in_the_middle_of_a_run():
    pair = Pair("SGD", lr=0.1)
    pair.step(2)
    for momentum in (0.9, 0.0, 0.5):
        for opt in (pair.ours, pair.theirs):
            opt.param_groups[0]["momentum"] = momentum
        pair.step(3)


def test_state_that_an_option_needs_from_the_first_step_on():
    """The message says what makes up for it."""
    m = model()
    opt = door.AdamW(m.parameters(), lr=0.01)
    backward(m, opt)
    opt.step()
    before, group = copy.deepcopy(m), opt.param_groups[0]
    group["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad needs the state 'max_exp_avg_sq'") as raised:
        opt.step()
    same(m, before, 0)
    line = re.search("opt.state.*(?= for each p)", str(raised.value))[0]
    for p in m.parameters():
        exec(line, {"opt": opt, "p": p, "torch": torch})
    opt.step()
    assert opt.t == 2
    assert all(torch.equal(x["max_exp_avg_sq"], x["exp_avg_sq"]) for x in opt.state.values())


def test_options_of_the_whole():
    m = model()
    opt = door.AdamW(m.parameters(), max_grad_norm=1.0)
    assert np.isnan(opt.grad_norm)
    backward(m, opt)
    opt.step()
    norm = torch.nn.utils.clip_grad_norm_(m.parameters(), 1e9).item()
    assert opt.grad_norm == pytest.approx(norm, rel=1e-6)
    opt.max_grad_norm = None
    opt.step()
    assert np.isnan(opt.grad_norm)
    opt.n_threads = 1
    with pytest.raises(ValueError, match="max_grad_norm"):
        opt.max_grad_norm = -1.0
    with pytest.raises(ValueError, match="n_threads"):
        opt.n_threads = 0
    assert (opt.max_grad_norm, opt.n_threads) == (None, 1)
    fresh = door.AdamW(m.parameters())
    with pytest.raises(ValueError, match="seed"):
        fresh.seed = -1
    fresh.seed = 3
    assert fresh.seed == 3


SCHEDULERS = {
    "LambdaLR": {"lr_lambda": lambda t: 0.9**t}, "MultiplicativeLR": {"lr_lambda": lambda t: 0.9}, "StepLR": {"step_size": 2},
    "MultiStepLR": {"milestones": [2, 4]}, "ConstantLR": {}, "LinearLR": {}, "ExponentialLR": {"gamma": 0.9},
    "CosineAnnealingLR": {"T_max": 5}, "CosineAnnealingWarmRestarts": {"T_0": 3}, "PolynomialLR": {"total_iters": 6},
    "CyclicLR": {"base_lr": 0.001, "max_lr": 0.02, "step_size_up": 3}, "OneCycleLR": {"max_lr": 0.05, "total_steps": 20},
    "ReduceLROnPlateau": {"patience": 0, "threshold": 0.5}, "SequentialLR": None, "ChainedScheduler": None,
}  # fmt: skip


def scheduler(name, opt):
    if name in ("SequentialLR", "ChainedScheduler"):
        two = [lr_scheduler.LinearLR(opt), lr_scheduler.ExponentialLR(opt, 0.8)]
        return (
            lr_scheduler.ChainedScheduler(two)
            if name == "ChainedScheduler"
            else lr_scheduler.SequentialLR(opt, two, [3])
        )
    return getattr(lr_scheduler, name)(opt, **SCHEDULERS[name])


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)], ids=["number", "tensor"])
def test_schedulers(name, lr):
    """Those that cycle the momentum, too.  A step is seen: no scheduler warns."""
    pair = Pair(lr=lr)
    both = [scheduler(name, opt) for opt in (pair.ours, pair.theirs)]

    rates = []

    def then(loss, *opts):
        rates.append([float(opt.param_groups[0]["lr"]) for opt in opts])
        for each in both:
            each.step(*([loss] if name == "ReduceLROnPlateau" else []))

    pair.step(8, then)
    assert all(a == pytest.approx(b, rel=1e-6) for a, b in rates)
    assert len({a for a, _ in rates}) > 1


def test_every_scheduler_is_here():
    there = {
        name for name, x in vars(lr_scheduler).items() if inspect.isclass(x) and issubclass(x, lr_scheduler.LRScheduler)
    }
    assert there - {"LRScheduler", "_LRScheduler"} == set(SCHEDULERS)
    assert torch.optim.swa_utils.SWALR(door.SGD(model().parameters(), lr=0.1), swa_lr=0.05)

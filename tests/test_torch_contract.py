"""What torch, its schedulers, scalers and wrappers expect of an optimizer, and what its users do to one."""

import copy
import inspect
import subprocess
import sys
import warnings

import numpy as np
import pytest

import adaptive_c as ac

torch = pytest.importorskip("torch", minversion="2.13")
from torch.optim import lr_scheduler, optimizer  # noqa: E402

import adaptive_c.torch as door  # noqa: E402


def model(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    layers = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    with torch.no_grad():
        for p in layers.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return layers.to(dtype)


X = torch.randn(32, 4, generator=torch.Generator().manual_seed(9))
Y = X.sum(1, keepdim=True).sin()


def backward(m, opt, x=X, y=Y):
    opt.zero_grad()
    loss = torch.nn.functional.mse_loss(m(x), y)
    loss.backward()
    return loss


def same(a, b, part=2e-6):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=part, atol=part)


class Pair:
    """A model twice, stepped by ours and by torch's."""

    def __init__(self, name="AdamW", groups=None, **options):
        self.a, self.b = model(), model()
        groups = groups or (lambda m: m.parameters())
        self.ours = getattr(door, name)(groups(self.a), **copy.deepcopy(options))
        self.theirs = getattr(torch.optim, name)(groups(self.b), **copy.deepcopy(options))

    def step(self, n=1, then=lambda loss, *both: None):
        """then(loss, ours, theirs): what is done to both after a step."""
        for _ in range(n):
            losses = [backward(m, opt) for m, opt in ((self.a, self.ours), (self.b, self.theirs))]
            self.ours.step()
            self.theirs.step()
            then(losses[1].item(), self.ours, self.theirs)
        same(self.a, self.b)


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
    ("betas", (0.9, 1.0), ValueError, "betas"),
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


# --- what is bound ---------------------------------------------------------------------------------------------------------


def test_parameters_that_are_replaced():
    """In a group's list, as some wrappers do; the old ones' state goes with its key."""
    pair = Pair()
    pair.step(2)
    for m, opt in ((pair.a, pair.ours), (pair.b, pair.theirs)):
        old, new = m[0].weight, torch.nn.Parameter(m[0].weight.detach() * 2)
        m[0].weight = new
        opt.state[new] = opt.state.pop(old)
        opt.param_groups[0]["params"][0] = new
    pair.step(3)
    for m, opt in ((pair.a, pair.ours), (pair.b, pair.theirs)):
        m[2].weight = opt.param_groups[0]["params"][2] = torch.nn.Parameter(m[2].weight.detach() * 2)
    pair.step(3)


def test_parameters_that_are_cut():
    """Rows of a table go, and their state with them."""
    pair = Pair()
    pair.step(2)
    for m, opt in ((pair.a, pair.ours), (pair.b, pair.theirs)):
        old = m[0].weight
        state = opt.state.pop(old)
        new = torch.nn.Parameter(old.detach()[:, :3].clone())
        opt.state[new] = {key: x[:, :3].clone() if x.dim() else x for key, x in state.items()}
        m[0].weight = opt.param_groups[0]["params"][0] = new
    before = X[:, :3]
    for m, opt in ((pair.a, pair.ours), (pair.b, pair.theirs)):
        for _ in range(3):
            backward(m, opt, before)
            opt.step()
    same(pair.a, pair.b)


@pytest.mark.parametrize("change", [
    lambda p: p.data.clone(),
    lambda p: p.data.t().contiguous().t() if p.dim() == 2 else p.data.clone(),
    lambda p: p.data.as_strided(p.shape, p.stride()[::-1]) if p.shape == (4, 4) else p.data,  # the same address
])  # fmt: skip
def test_data_that_is_replaced(change):
    """p.data = other moves a parameter to other memory, or lays it out otherwise where it is."""
    ps, qs = ([torch.nn.Parameter(torch.arange(16.0).reshape(4, 4) + i)] for i in (0, 0))
    ours, theirs = door.AdamW(ps, lr=0.1), torch.optim.AdamW(qs, lr=0.1)
    for t in range(6):
        for p in (*ps, *qs):
            if t == 3:
                p.data = change(p)
                p.grad = None
            p.grad = torch.empty_like(p).copy_(torch.arange(16.0).reshape(4, 4).sin() + t)
        ours.step()
        theirs.step()
    torch.testing.assert_close(ps[0], qs[0], rtol=1e-6, atol=1e-6)


def test_a_model_that_is_converted():
    """model.double() makes new data of another dtype under the same parameters."""
    pair = Pair()
    pair.step(2)
    pair.a.double()
    pair.b.double()
    for m, opt in ((pair.a, pair.ours), (pair.b, pair.theirs)):
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        for _ in range(3):
            backward(m, opt, X.double(), Y.double())
            opt.step()
    same(pair.a, pair.b)
    assert pair.ours.state[next(iter(pair.a.parameters()))]["exp_avg"].dtype is torch.float64


def test_groups_that_are_added():
    """They start fresh, the others go on; what can't be stepped is refused, and nothing is added."""
    pair = Pair(groups=lambda m: m[0].parameters())
    pair.step(3)
    for m, opt in ((pair.a, pair.ours), (pair.b, pair.theirs)):
        opt.add_param_group({"params": m[2].parameters(), "lr": 0.05})
    pair.step(3)
    assert [group["lr"] for group in pair.ours.param_groups] == [0.001, 0.05]
    with pytest.raises(TypeError, match="parameter 0 of group 2 is complex"):
        pair.ours.add_param_group({"params": [torch.ones(3, dtype=torch.complex64)]})
    with pytest.raises(ValueError, match="lr must be in"):
        pair.ours.add_param_group({"params": [torch.ones(3)], "lr": -1.0})
    with pytest.raises(ValueError, match="more than one parameter group"):
        pair.ours.add_param_group({"params": [pair.a[0].weight]})
    pair.theirs.step()
    pair.ours.step()
    same(pair.a, pair.b)


def test_state_that_is_reset():
    """A new dict, an emptied one, one that lost an entry: where there is none, a tensor starts anew."""
    pair = Pair()
    resets = [
        lambda opt: setattr(opt, "state", type(opt.state)(dict)),
        lambda opt: opt.state.clear(),
        lambda opt: opt.state.pop(opt.param_groups[0]["params"][0]),
    ]
    for reset in resets:
        pair.step(2)
        for opt in (pair.ours, pair.theirs):
            reset(opt)
    pair.step(2)


def test_state_is_live():
    """The tensors are the state: what is written into them is in force, counts too."""
    pair = Pair()
    pair.step(2)
    for opt in (pair.ours, pair.theirs):
        for p in opt.param_groups[0]["params"]:
            opt.state[p]["exp_avg"].mul_(0.5)
            opt.state[p]["exp_avg_sq"][...] = 0.01
            opt.state[p]["step"].fill_(1.0)
    pair.step(2)
    assert {float(state["step"]) for state in pair.ours.state.values()} == {3.0}


def test_a_lazy_layer():
    """Its parameters have no shape until the first forward call."""
    made = []
    for kind in (door, torch.optim):
        torch.manual_seed(0)
        m = torch.nn.Sequential(torch.nn.LazyLinear(16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        opt = kind.AdamW(m.parameters(), lr=0.01)
        for _ in range(3):
            backward(m, opt)
            opt.step()
        made.append(m)
    same(*made)


# --- the whole step ------------------------------------------------------------------------------------------------------


def test_clipping_averaging_and_zeroing():
    """As torch's users write them, call by call."""
    a, b = model(), model()
    ours = door.AdamW(a.parameters(), lr=0.01, max_grad_norm=0.1, max_grad_value=0.05, ema_decay=0.9, zero_grad=True)
    theirs = torch.optim.AdamW(b.parameters(), lr=0.01)
    average = torch.optim.swa_utils.AveragedModel(b, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    average.update_parameters(b)  # starts at the parameters
    for _ in range(5):
        torch.nn.functional.mse_loss(a(X), Y).backward()
        ours.step()
        assert all(not p.grad.any() for p in a.parameters())
        backward(b, theirs)
        torch.nn.utils.clip_grad_norm_(b.parameters(), 0.1)
        torch.nn.utils.clip_grad_value_(b.parameters(), 0.05)
        theirs.step()
        average.update_parameters(b)
    same(a, b)
    weights, version = copy.deepcopy(a), a[0].weight._version
    with ours.averaged_parameters():
        same(a, average.module)
        assert a[0].weight._version > version
        with pytest.raises(RuntimeError, match="averaged_parameters"):
            ours.step()
    same(a, weights, 0)
    with pytest.raises(ValueError, match="ema_decay"), door.AdamW(a.parameters()).averaged_parameters():
        pass


def test_zeroing_what_was_copied():
    """A gradient that lies otherwise than its parameter is copied for the step, and zeroed all the same."""
    p = torch.nn.Parameter(torch.ones(3, 4))
    opt = door.SGD([p], zero_grad=True)
    for _ in range(2):
        p.grad = torch.ones(4, 3).t()
        opt.step()
        assert not p.grad.any()


def test_nonfinite_gradients():
    m = model()
    opt = door.AdamW(m.parameters(), on_nonfinite="skip")
    backward(m, opt)
    m[0].weight.grad[0, 0] = float("nan")
    before = copy.deepcopy(m)
    opt.step()
    same(m, before, 0)
    assert (opt.t, opt.skipped_steps) == (0, 1)
    opt.on_nonfinite = "raise"
    with pytest.raises(ValueError, match=r"grads\[0\]\[0\] is nan at index \(0, 0\)"):
        opt.step()


def test_bounds():
    m = model()
    opt = door.SGD(m.parameters(), lr=10.0, bounds=(-0.1, None))
    for _ in range(3):
        backward(m, opt)
        opt.step()
    assert min(p.min().item() for p in m.parameters()) == pytest.approx(-0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"master": "float32"}, {"rounding": "stochastic"}, {"state_dtype": "uint8"}],
                         ids=["master", "stochastic", "uint8"])  # fmt: skip
def test_narrow_parameters_have_the_bits_of_arrays(dtype, options):
    options = {"rounding": "stochastic", "seed": 3, **options} if "master" not in options else options
    p = [torch.randn(s).to(dtype) for s in ((30, 20), (7,))]
    uint16 = dtype is torch.bfloat16
    arrays = [(x.view(torch.uint16) if uint16 else x).numpy().copy() for x in p]
    p = [torch.nn.Parameter(x) for x in p]
    ours = door.AdamW(p, lr=0.01, **options)
    plain = ac.AdamW(arrays, lr=0.01, uint16_as="bfloat16" if uint16 else None, **options)
    for _ in range(4):
        for x in p:
            x.grad = torch.randn(x.shape).to(dtype)
        ours.step()
        plain.step([(x.grad.view(torch.uint16) if uint16 else x.grad).numpy() for x in p])
    for x, y in zip(p, arrays, strict=True):
        np.testing.assert_array_equal((x.detach().view(torch.uint16) if uint16 else x.detach()).numpy(), y)


def test_narrow_state_is_shown_as_it_is():
    p = torch.nn.Parameter(torch.randn(300))
    opt = door.AdamW([p], state_dtype=torch.bfloat16)
    p.grad = torch.randn(300)
    opt.step()
    assert opt.state[p]["exp_avg"].dtype is torch.bfloat16
    torch.testing.assert_close(opt.state[p]["exp_avg"].float(), 0.1 * p.grad, rtol=0.01, atol=1e-3)
    opt = door.AdamW([p], state_dtype="uint8")
    opt.step()
    assert {key: x.dtype for key, x in opt.state[p].items() if key.startswith("exp_avg_sq")} == {
        "exp_avg_sq_code": torch.uint8, "exp_avg_sq_scale": torch.float32, "exp_avg_sq_offset": torch.int64,
    }  # fmt: skip


# --- GradScaler ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unscale", [False, True])
def test_a_grad_scaler(unscale):
    """It skips a step with an infinity, and lowers its scale."""
    pair = Pair("Adam", lr=0.01)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3) for _ in range(2)]
    for t in range(8):
        for m, opt, scaler in ((pair.a, pair.ours, scalers[0]), (pair.b, pair.theirs, scalers[1])):
            opt.zero_grad()
            scaler.scale(torch.nn.functional.mse_loss(m(X), Y)).backward()
            if t == 4:
                m[0].weight.grad[0, 0] = float("inf")
            if unscale:
                scaler.unscale_(opt)
                torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            scaler.step(opt)
            scaler.update()
        same(pair.a, pair.b)
    assert pair.ours.t == 7
    assert scalers[0].get_scale() == scalers[1].get_scale() != 2.0**10
    assert not hasattr(pair.ours, "grad_scale")
    assert not hasattr(pair.ours, "found_inf")


def test_a_grad_scaler_with_float16_gradients():
    """Torch's own unscaling refuses them; here they are divided as they are read, in float32."""
    p = torch.nn.Parameter(torch.zeros(3, dtype=torch.float16))
    opt = door.SGD([p], lr=1.0, master="float32", zero_grad=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    for wrong in (False, True):
        scaler.scale(p.float().sum() * 2**-10).backward()
        if wrong:
            p.grad[1] = float("inf")
        scaler.step(opt)
        scaler.update()
        assert p.tolist() == [-(2.0**-10)] * 3
        assert not p.grad.any()
    assert scaler.get_scale() == 2.0**14


# --- wrappers --------------------------------------------------------------------------------------------------------------


def test_a_class_made_on_the_fly():
    """Lightning makes one of the optimizer's class and assigns it."""
    m = model()
    opt = door.AdamW(m.parameters())
    opt.__class__ = type("LightningAdamW", (opt.__class__,), {})
    backward(m, opt)
    opt.step()
    assert opt.t == 1
    assert type(opt).__init__ is door.AdamW.__init__


def test_a_subclass():
    class Mine(door.AdamW):
        """Mine."""

        def __init__(self, params, rate):
            super().__init__(params, lr=rate)

        def step(self, closure=None):
            return super().step(closure)

    m = model()
    opt = Mine(m.parameters(), 0.5)
    backward(m, opt)
    opt.step()
    assert opt.t == 1
    assert opt.param_groups[0]["lr"] == 0.5
    assert list(inspect.signature(Mine).parameters) == ["params", "rate"]
    assert Mine.__doc__ == "Mine."
    assert repr(opt).startswith("Mine (\nParameter Group 0\n")


def test_a_compiled_model(tmp_path):
    """The model alone, and the whole function with backward and step, which breaks the graph and runs as ever."""
    pair = Pair(lr=0.01)
    compiled = torch.compile(pair.a, backend="aot_eager")
    for _ in range(3):
        backward(compiled, pair.ours)
        pair.ours.step()
        backward(pair.b, pair.theirs)
        pair.theirs.step()
    same(pair.a, pair.b)

    @torch.compile(backend="eager")
    def train(m, opt):
        opt.zero_grad()
        torch.nn.functional.mse_loss(m(X), Y).backward()
        opt.step()

    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train(pair.a, pair.ours)
        backward(pair.b, pair.theirs)
        pair.theirs.step()
    same(pair.a, pair.b)
    assert pair.ours.t == 6


DDP = """
import sys, torch, torch.distributed as dist
sys.path[:0] = [{tests!r}]
from test_torch_contract import X, Y, backward, model
import adaptive_c.torch as door
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
m = model()
wrapped = torch.nn.parallel.DistributedDataParallel(m)
opt = door.AdamW(wrapped.parameters(), lr=0.01, n_threads=1)
for _ in range(4):
    backward(wrapped, opt, X[rank::2], Y[rank::2])
    opt.step()
torch.save(m.state_dict(), sys.argv[3] + str(rank))
dist.destroy_process_group()
"""


def test_two_processes_of_ddp(tmp_path):
    """Their gradients are views of one bucket; the result is that of one process with the whole batch."""
    from pathlib import Path

    code = DDP.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-P", "-c", code]
    found = [subprocess.Popen([*command, str(rank), str(tmp_path / "meet"), str(tmp_path / "model")],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for rank in range(2)]  # fmt: skip
    for process in found:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    states = [torch.load(tmp_path / f"model{rank}") for rank in range(2)]
    alone = model()
    theirs = torch.optim.AdamW(alone.parameters(), lr=0.01)
    for _ in range(4):
        backward(alone, theirs)
        theirs.step()
    for name, x in alone.state_dict().items():
        assert torch.equal(states[0][name], states[1][name])
        torch.testing.assert_close(states[0][name], x, rtol=1e-5, atol=1e-6)

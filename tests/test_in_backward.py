"""Steps within backward have the bits of ordinary steps, and leave no gradient behind."""

import copy

import pytest

torch = pytest.importorskip("torch", reason="the torch door needs torch")
door = pytest.importorskip("adaptive_c.torch")

pytestmark = pytest.mark.later("torch")
AdamW, in_backward = door.AdamW, door.in_backward


def model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = [torch.nn.Embedding(30, 16), torch.nn.Linear(16, 300), torch.nn.Tanh(), torch.nn.Linear(300, 3)]
    return torch.nn.Sequential(*layers).to(dtype)


def loss_of(net, step):
    x = torch.arange(8) * (step + 1) % 30
    return (net(x) ** 2).mean()


def same(a, b):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"state_dtype": "uint8"},
        {"state_dtype": "bfloat16", "ema_decay": 0.9},
        {"weight_decay": 0.1, "amsgrad": True},
    ],
)
def test_the_bits_of_ordinary_steps(options):
    ours, plain = model(), model()
    opt, ordinary = AdamW(ours.parameters(), **options), AdamW(plain.parameters(), **options)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(x, 0.9) for x in (opt, ordinary)]
    in_backward(opt)
    for step in range(4):
        loss_of(ours, step).backward()
        assert all(p.grad is None for p in ours.parameters())
        opt.step()
        loss_of(plain, step).backward()
        ordinary.step()
        ordinary.zero_grad()
        for schedule in schedules:
            schedule.step()
        same(ours, plain)
        assert opt.t == step + 1
    a, b = opt.state_dict(), ordinary.state_dict()
    assert a["param_groups"] == b["param_groups"]
    for key, state in b["state"].items():
        for name, x in state.items():
            assert torch.equal(a["state"][key][name], x), (key, name)


def test_every_rule():
    for name in door.__all__:
        if name in ("Optimizer", "in_backward"):
            continue
        ours, plain = model(), model()
        opt, ordinary = (getattr(door, name)(x.parameters(), lr=1e-3) for x in (ours, plain))
        in_backward(opt)
        for step in range(2):
            opt.step(lambda net=ours, n=step: loss_of(net, n).backward())
            ordinary.zero_grad()
            ordinary.step(lambda net=plain, n=step: loss_of(net, n).backward())
        same(ours, plain)


def test_the_gradients_never_exist_together():
    """At each hook but the first, every gradient that came before is gone."""
    net = model()
    alive = []
    handle = in_backward(AdamW(net.parameters()))
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(p.grad is not None for p in net.parameters())))
    loss_of(net, 0).backward()
    assert alive == [0] * len(list(net.parameters()))
    handle.remove()
    alive.clear()
    loss_of(net, 0).backward()
    assert max(alive) == len(list(net.parameters()))


def test_frozen_unused_and_new_parameters():
    ours, plain = model(), model()
    opts = []
    for net in (ours, plain):
        net[1].bias.requires_grad_(False)
        opts.append(AdamW(list(net.parameters())[:-1]))
    opt, ordinary = opts
    in_backward(opt)
    for step in range(3):
        if step == 1:
            for net, x in ((ours, opt), (plain, ordinary)):
                x.add_param_group({"params": list(net.parameters())[-1:], "lr": 0.1})
        if step == 2:
            for net in (ours, plain):
                net[1].bias.requires_grad_(True)
        for p in (ours[3].bias, plain[3].bias):
            p.grad = None
        loss_of(ours, step).backward()
        opt.step()
        loss_of(plain, step).backward()
        ordinary.step()
        ordinary.zero_grad()
        same(ours, plain)
    opt.step()  # without any gradient: no step
    assert opt.t == 3


def test_transposed_tied_and_narrow_parameters():
    def make():
        torch.manual_seed(1)
        w = torch.nn.Parameter(torch.randn(5, 7).t())
        n = torch.nn.Parameter(torch.randn(7).to(torch.bfloat16))
        opt = AdamW([{"params": [w]}, {"params": [n], "rounding": "stochastic"}], seed=3)
        return w, n, opt

    (w, n, opt), (v, m, ordinary) = make(), make()
    in_backward(opt)
    for _ in range(3):
        ((w @ w.t()).sum() + (n.float() * w[:, 0]).sum()).backward()  # w is used three times, and stepped once
        opt.step()
        ((v @ v.t()).sum() + (m.float() * v[:, 0]).sum()).backward()
        ordinary.step()
        ordinary.zero_grad()
        assert torch.equal(w, v)
        assert torch.equal(n, m)


def test_sparse_gradients():
    def make():
        torch.manual_seed(2)
        table = torch.nn.Embedding(50, 4, sparse=True)
        return table, AdamW(table.parameters(), lr=0.1)

    (ours, opt), (plain, ordinary) = make(), make()
    in_backward(opt)
    for _ in range(2):
        ours(torch.tensor([3, 9, 3])).sum().backward()
        opt.step()
        plain(torch.tensor([3, 9, 3])).sum().backward()
        ordinary.step()
        ordinary.zero_grad()
        same(ours, plain)


def test_what_is_refused():
    net = model()
    for options, message in [
        ({"max_grad_norm": 1.0}, r"in_backward is refused with max_grad_norm=1.0"),
        ({"on_nonfinite": "skip"}, r"in_backward is refused with on_nonfinite='skip'"),
    ]:
        with pytest.raises(ValueError, match=message):
            in_backward(AdamW(net.parameters(), **options))
    with pytest.raises(TypeError, match=r"takes an optimizer of adaptive_c\.torch, got an SGD"):
        in_backward(torch.optim.SGD(net.parameters(), lr=0.1))
    opt = AdamW(net.parameters())
    handle = in_backward(opt)
    with pytest.raises(RuntimeError, match="steps in backward already"):
        in_backward(opt)
    with pytest.raises(RuntimeError, match=r"another optimizer steps parameters of this one in backward; .*remove\(\)"):
        in_backward(AdamW(net.parameters()))
    loss_of(net, 0).backward()
    with pytest.raises(ValueError, match="has had its step in this block") as raised:
        loss_of(net, 1).backward()
    assert "call the optimizer's step() after each backward" in raised.value.__notes__[0]
    assert "with it, take ordinary steps" in raised.value.__notes__[0]
    net.zero_grad()  # of the gradient that was refused
    opt.step()
    for unscale in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        scaler.scale(loss_of(net, 2)).backward()
        if unscale:
            scaler.unscale_(opt)
        with pytest.raises(RuntimeError, match="can't be used with a GradScaler"):
            scaler.step(opt)
        opt.step()
    handle.remove()
    handle.remove()
    in_backward(AdamW(net.parameters())).remove()
    before = [p.detach().clone() for p in net.parameters()]
    loss_of(net, 3).backward()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    opt.step()
    assert opt.t == 4
    assert not all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_what_is_refused_until_the_step_has_ended():
    net = model()
    opt = AdamW(net.parameters(), ema_decay=0.5)
    in_backward(opt)
    for name, value in (("max_grad_norm", 1.0), ("on_nonfinite", "raise")):
        with pytest.raises(ValueError, match=f"in_backward is refused with {name}={value!r}"):
            setattr(opt, name, value)
    loss_of(net, 0).backward()
    for call in (
        opt.state_dict,
        lambda: opt.load_state_dict({}),
        lambda: copy.deepcopy(opt),
        lambda: opt.averaged_parameters().__enter__(),
        opt.catch_up,
        lambda: opt.add_param_group({"params": [torch.ones(2)]}),
        lambda: setattr(opt, "seed", 1),
    ):
        with pytest.raises(RuntimeError, match=r"backward has begun a step; end it first: opt.step\(\)"):
            call()
    opt.step()
    assert len(opt.state_dict()["state"]) == len(list(net.parameters()))
    opt.seed, opt.on_nonfinite = 1, "ignore"


def test_peak_memory_falls_by_nearly_the_gradients():
    """Counted by what torch's tensors hold at each hook, not by the clock or the system."""
    net = torch.nn.Sequential(*[torch.nn.Linear(200, 200, bias=False) for _ in range(10)])
    total = sum(p.numel() for p in net.parameters()) * 4
    most = {}
    for arriving in (False, True):
        opt = AdamW(net.parameters())
        handle = in_backward(opt) if arriving else None
        held = []

        def look(_, held=held):
            held.append(sum(q.grad.numel() * 4 for q in net.parameters() if q.grad is not None))

        watch = [p.register_post_accumulate_grad_hook(look) for p in net.parameters()]
        net(torch.randn(4, 200)).sum().backward()
        opt.step()
        opt.zero_grad()
        for hook in watch:
            hook.remove()
        if handle:
            handle.remove()
        most[arriving] = max(held)
    assert most == {False: total, True: 0}


def test_it_can_be_removed_in_the_middle_of_a_step():
    net = model()
    opt = AdamW(net.parameters())
    handle = in_backward(opt)
    loss_of(net, 0).backward()
    with pytest.raises(ValueError, match="has had its step in this block"):
        loss_of(net, 1).backward()
    handle.remove()
    assert opt.t == 1
    opt.zero_grad()
    loss_of(net, 2).backward()
    opt.step()
    assert opt.t == 2
    opt.state_dict()


def test_what_is_written_to_narrow_parameters_stays():
    """Also between their gradient's arrival and the end of the step."""
    p = torch.nn.Parameter(torch.linspace(-2, 2, 600).to(torch.bfloat16))
    opt = door.SGD([p], lr=2.0**-12, master="float32")
    in_backward(opt)
    for early in (False, True, False):
        with torch.no_grad():
            p.add_(1)
        want = p.detach().float() - 2.0**-12
        p.sum().backward()
        assert torch.equal(p, want.to(torch.bfloat16))
        if early:
            with torch.no_grad():
                p.add_(1)
            opt.step()
            want = p.detach().float() - 2.0**-12
            p.sum().backward()
        opt.step()
        assert torch.equal(opt.state[p]["master"], want)

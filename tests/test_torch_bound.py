"""What adaptive_c.torch is bound to, and what its users do to that: parameters, groups, state; and the whole step."""

import copy
import pickle

import numpy as np
import pytest

import adaptive_c as ac

torch = pytest.importorskip("torch", minversion="2.13")
from tensors import Pair, X, Y, backward, model, same  # noqa: E402

import adaptive_c.torch as door  # noqa: E402

pytestmark = pytest.mark.later("torch")

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
    """New entries, a new dict, an emptied one, one that lost an entry: without a state, a tensor starts anew."""
    pair = Pair()
    resets = [
        lambda opt: opt.state.update({p: {} for p in opt.param_groups[0]["params"][:2]}),
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


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0, -0.5, 1.5, 2.0**62])
@pytest.mark.parametrize("in_backward", [False, True])
def test_a_count_that_is_none_is_refused_before_the_step(bad, in_backward):
    p = [torch.ones(2, requires_grad=True) for _ in range(3)]
    opt = door.AdamW(p)

    def step():
        sum(x.sum() for x in p).backward()
        opt.step()

    step()
    handle = door.in_backward(opt) if in_backward else None
    opt.state[p[1]]["step"].fill_(bad)
    before = [x.detach().clone() for x in p]
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"the count of steps of param_groups\[0\]\[1\], in state\[p\]\['step'\], is "
        ):
            step()
        assert [x.tolist() for x in p] == [x.tolist() for x in before]
    opt.state[p[1]]["step"].fill_(1.0)
    for x in p:
        x.grad = None
    step()
    assert [float(opt.state[x]["step"]) for x in p] == [2.0, 2.0, 2.0]
    if handle is not None:
        handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_nothing_is_copied(dtype):
    """Parameters, gradients and state stay where they are, and ours are torch's memory in both directions."""
    narrow = dtype.itemsize == 2
    p = torch.nn.Parameter(torch.ones(300, dtype=dtype))
    opt = door.AdamW([p], lr=0.5, zero_grad=True, rounding="stochastic" if narrow else None)
    p.grad = torch.ones_like(p)
    opt.step()
    places = [x.data_ptr() for x in (p, p.grad, *(opt.state[p][name] for name in ("exp_avg", "exp_avg_sq")))]
    assert not p.grad.any()  # the sweep has zeroed torch's own gradient
    assert (p < 1).all()
    with torch.no_grad():
        p.grad.fill_(1)
        p.fill_(4)
        opt.state[p]["exp_avg"].zero_()
        opt.state[p]["exp_avg_sq"].fill_(1e30)
    opt.step()
    assert (p > 3.9).all()  # only the decay of weights is left: what torch has written is in force
    assert (opt.state[p]["exp_avg_sq"] > 1e29).all()
    assert places == [x.data_ptr() for x in (p, p.grad, *(opt.state[p][x] for x in ("exp_avg", "exp_avg_sq")))]


def test_state_tensors_that_are_replaced():
    """They are taken over, and views again after the step; keys of the user's own may come and go."""
    pair = Pair()
    pair.step(2)
    for opt in (pair.ours, pair.theirs):
        first, second, *_ = opt.param_groups[0]["params"]
        opt.state[first]["exp_avg"] = torch.zeros_like(first)
        opt.state[second]["step"] = torch.tensor(1.0)
    pair.step(2)
    p = pair.ours.param_groups[0]["params"][0]
    before = pair.ours.state[p]["exp_avg"].clone()
    for t in range(3):
        pair.ours.state[p]["mine"] = t
        pair.step()
        assert not torch.equal(pair.ours.state[p]["exp_avg"], before)
    assert pair.ours.state[p]["mine"] == 2
    views = pair.ours.state[p]["exp_avg"]
    pair.ours.state[p]["mine"] = 3
    pair.step()
    assert pair.ours.state[p]["exp_avg"] is views  # nothing was bound anew


def test_state_of_a_tensor_that_was_not_stepped_yet():
    p = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    opt = door.Adam(p, lr=0.1)
    p[0].grad = torch.ones(3)
    opt.step()
    opt.state[p[1]].update(step=torch.tensor(1.0), exp_avg=torch.full((3,), 0.1), exp_avg_sq=torch.full((3,), 0.001))
    for x in p:
        x.grad = torch.ones(3)
    opt.step()
    torch.testing.assert_close(opt.state[p[0]]["exp_avg"], opt.state[p[1]]["exp_avg"])
    assert opt.state[p[1]]["step"] == 2


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
        for call in (  # what would make, or go on from, parameters that are averages
            lambda: copy.deepcopy(ours),
            lambda: pickle.dumps(ours),
            lambda: ours.load_state_dict(ours.state_dict()),
        ):
            with pytest.raises(RuntimeError, match="not inside averaged_parameters"):
                call()
        kept = a[0].weight.data
        a[0].weight.data = kept.clone()  # which the next step would bind anew
        backward(a, ours)
        with pytest.raises(RuntimeError, match="not inside averaged_parameters"):
            ours.step()
        a[0].weight.data = kept
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


@pytest.mark.parametrize("option", [{"max_grad_norm": 1.0}, {"on_nonfinite": "skip"}, {"n_threads": 1}])
def test_options_of_the_whole_are_refused_in_a_group(option):
    (name,) = option
    p, q = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    with pytest.raises(ValueError, match=f"{name} in group 0 is an option of the optimizer as a whole"):
        door.AdamW([{"params": [p], **option}])
    opt = door.AdamW([p])
    with pytest.raises(ValueError, match=f"{name} in group 1 is an option of the optimizer as a whole"):
        opt.add_param_group({"params": [q], **option})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize(("name", "value", "match"), [
    ("max_grad_norm", 1.0, "or assign opt.max_grad_norm, and take it out of the group"),
    ("n_threads", 1, "or assign opt.n_threads"),
    ("zero_grad", True, "give it to the constructor, and take it out"),
    ("loss_scale", 8.0, "GradScaler"),
    ("keep_undo", True, "no option for tensors"),
    ("capturable", True, "capturable=True can't be had here"),
])  # fmt: skip
def test_options_without_effect_are_refused_by_the_next_step(bound, name, value, match):
    """Where somebody has put them into a group, before anything is written; and their removal is noticed, too."""
    m = model()
    opt = door.AdamW(m.parameters())
    backward(m, opt)
    if bound:
        opt.step()
    before, group = copy.deepcopy(m), opt.param_groups[0]
    had = group.get(name)
    group[name] = value
    for _ in range(2):
        with pytest.raises(ValueError, match=match):
            opt.step()
    same(m, before, 0)
    group["a tag of one's own"] = 3
    if had is None:
        del group[name]
    else:
        group[name] = had
    opt.step()
    assert opt.t == 1 + bound


# --- parameters that are written, and have a master copy ------------------------------------------------------------------


def narrow(**options):
    p = torch.nn.Parameter(torch.linspace(-2, 2, 600).to(torch.bfloat16))
    opt = door.SGD([p], lr=2.0**-12, master="float32", **options)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        opt.step()  # 2**-12 is less than half a bfloat16's distance for most elements: the copy alone moves
    return p, opt


def replace_data(p, opt):
    p.data = p.data + 1


def replace_parameter(p, opt):
    q = opt.param_groups[0]["params"][0] = torch.nn.Parameter(p.detach() + 1)
    opt.state[q] = opt.state.pop(p)


def load(p, opt):
    layer = torch.nn.Module()
    layer.w = p
    layer.load_state_dict({"w": p.detach() + 1})


def load_both(p, opt):
    """An optimizer's state that belongs to other parameters than those that are there now."""
    state = copy.deepcopy(opt.state_dict())
    load(p, opt)
    opt.load_state_dict(state)


def write(p, opt):
    with torch.no_grad():
        p.add_(1)


def write_and_average(p, opt):
    write(p, opt)
    with opt.averaged_parameters():
        pass


def write_and_catch_up(p, opt):
    write(p, opt)
    opt.catch_up()


@pytest.mark.parametrize("change", [
    write, load, load_both, replace_data, replace_parameter, write_and_average, write_and_catch_up,
])  # fmt: skip
def test_what_is_written_to_narrow_parameters_stays(change):
    """The next step goes on from it, as it does for parameters without a copy."""
    p, opt = narrow(ema_decay=0.5)
    change(p, opt)
    (p,) = opt.param_groups[0]["params"]
    want = p.detach().float() - 0.25
    p.grad = torch.full_like(p, 2.0**10)
    opt.step()
    assert torch.equal(opt.state[p]["master"], want)
    assert torch.equal(p, want.to(torch.bfloat16))


def test_what_is_not_written_to_narrow_parameters_keeps_its_copy():
    """Elements beside those that somebody writes, and all of them where a checkpoint of both is loaded, in any order."""
    p, opt = narrow()
    master = opt.state[p]["master"].clone()
    assert not torch.equal(master, p.float())
    with torch.no_grad():
        p[::2] = 3.0
    p.grad = torch.zeros_like(p)
    opt.step()
    master[::2] = 3.0
    assert torch.equal(opt.state[p]["master"], master)
    opt.state[p]["master"].mul_(2)  # as what is written to the copy itself
    opt.step()
    assert torch.equal(opt.state[p]["master"], master * 2)
    opt.state[p]["master"] = master.clone()
    opt.step()
    assert torch.equal(opt.state[p]["master"], master)
    saved, state = p.detach().clone(), copy.deepcopy(opt.state_dict())
    for first in (0, 1):
        q = torch.nn.Parameter(torch.zeros_like(p))
        other = door.SGD([q], lr=2.0**-12, master="float32")
        if first:
            other.load_state_dict(state)
        with torch.no_grad():
            q.copy_(saved)
        if not first:
            other.load_state_dict(state)
        q.grad = torch.zeros_like(q)
        other.step()
        assert torch.equal(other.state[q]["master"], master)


def test_a_step_in_inference_mode():
    """Its state can be used outside; parameters and gradients that are made there are another matter."""
    pair = Pair()
    with torch.inference_mode():
        inside = torch.nn.Parameter(torch.ones(3))
        for p, q in zip(pair.a.parameters(), pair.b.parameters(), strict=True):
            q.grad = torch.ones(p.shape)
            p.grad = q.grad.clone()
        pair.ours.step()
    for q in pair.b.parameters():
        q.grad = q.grad.clone()
    pair.theirs.step()
    pair.step(2)
    pair.ours.load_state_dict(pair.ours.state_dict())
    pair.step()
    p = torch.nn.Parameter(torch.ones(3))
    zeroing = door.AdamW([p], zero_grad=True)
    with torch.inference_mode():
        p.grad = torch.ones(3)
        zeroing.step()
    assert not p.grad.any()
    with pytest.raises(TypeError, match=r"under torch.inference_mode.*Parameter\(p.clone\(\)\)"):
        door.AdamW([inside])

"""What wraps an optimizer of adaptive_c.torch: scalers, subclasses, compiled models, several processes."""

import inspect
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", minversion="2.13")
from tensors import Pair, X, Y, backward, model, same  # noqa: E402

import adaptive_c.torch as door  # noqa: E402

pytestmark = pytest.mark.later("torch")

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


def test_a_wrapper_with_the_class_and_a_dict_of_its_own():
    """Lightning's, which passes on the attributes that it lacks: what is read and set there is the optimizer's."""

    class Wrapper:
        def __init__(self, inner):
            self.inner = inner
            self.__class__ = type("Wrapped", (Wrapper, type(inner)), {})

        def __getattr__(self, name):
            return getattr(self.inner, name)

    m = model()
    opt = door.AdamW(m.parameters(), max_grad_norm=1.0, ema_decay=0.5)
    wrapper = Wrapper(opt)
    backward(m, opt)
    opt.step()
    assert wrapper.t == opt.t == 1
    assert wrapper.grad_norm == opt.grad_norm > 0
    before = m[0].weight.clone()
    with wrapper.averaged_parameters():
        assert not torch.equal(m[0].weight, before)
    wrapper.on_nonfinite = "skip"
    m[0].weight.grad[0, 0] = float("nan")
    opt.step()
    assert (wrapper.t, wrapper.skipped_steps) == (1, 1)
    with pytest.raises(TypeError, match="complex"):
        wrapper.add_param_group({"params": torch.zeros(2, dtype=torch.complex64)})


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
from tensors import X, Y, backward, model
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
door.in_backward(opt)  # would use the gradients before they are averaged
backward(wrapped, opt)
try:
    opt.step()
except ValueError as error:
    assert "DistributedDataParallel" in error.__notes__[0]
else:
    raise AssertionError("steps of unaveraged gradients")
dist.destroy_process_group()
"""


def test_two_processes_of_ddp(tmp_path):
    """Their gradients are views of one bucket; the result is that of one process with the whole batch."""
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

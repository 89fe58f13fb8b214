"""What the tests of adaptive_c.torch share: a small model, its data, and the same model stepped by both libraries."""

import copy

import pytest
import torch

import adaptive_c.torch as door


@pytest.fixture(autouse=True)
def double():
    """Adagrad's and NAdam's tensors of scalars take torch's default dtype: for the tests of a file that imports this."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def parameters(shapes, dtype=torch.float64):
    """Those of two dimensions are transposed, those of four have their channels last."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    found = [x.t().contiguous().t() if x.dim() == 2 else x for x in found]
    found = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in found]
    return [torch.nn.Parameter(x) for x in found]


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

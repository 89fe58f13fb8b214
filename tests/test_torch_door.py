"""adaptive_c.torch against torch.optim: the same numbers from the same tensors."""

import numpy as np
import pytest
from test_torch import CASES, IDS, SHAPES

torch = pytest.importorskip("torch", minversion="2.13")
import adaptive_c.torch as door  # noqa: E402


@pytest.fixture(autouse=True)
def double():
    """NAdam's tensors of scalars take torch's default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(ours, theirs):
    """|a - b| <= 1e-12 (|b| + 1e-3), as in test_torch.py."""
    ours, theirs = ours.detach(), theirs.detach()
    assert bool(((ours - theirs).abs() <= 1e-12 * (theirs.abs() + 1e-3)).all()), (ours, theirs)


def parameters(seed=0, shapes=SHAPES, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=dtype)) for s in shapes]


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_twelve_steps(name, options):
    """With gradients that are missing now and then, and state by torch's names."""
    p, q = parameters(), parameters()
    ours, theirs = getattr(door, name)(p, **options), getattr(torch.optim, name)(q, **options)
    rng = np.random.default_rng(0)
    for t in range(12):
        for i, (x, y) in enumerate(zip(p, q, strict=True)):
            g = torch.tensor(rng.normal(size=x.shape))
            x.grad, y.grad = (None, None) if i == 0 or (i == 1 and t % 3) else (g, g.clone())
        ours.step()
        theirs.step()
        for x, y in zip(p, q, strict=True):
            close(x, y)
            for key, value in theirs.state[y].items():
                if value is not None and key != "prev":
                    close(ours.state[x][key], value)
            assert ours.state[x].keys() == {k for k, v in theirs.state[y].items() if v is not None}

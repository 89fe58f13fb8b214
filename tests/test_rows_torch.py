"""Rows against torch's sparse gradients, in float64: SparseAdam, Adagrad, SGD, and bags."""

import numpy as np
import pytest

import adaptive_c as ac

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # torch's own optimizers cause it

SHAPE = (50, 6)
CLOSE = {"rtol": 1e-12, "atol": 1e-12}
SAME = {
    "SparseAdam": (lambda p: torch.optim.SparseAdam(p, lr=0.02, betas=(0.8, 0.95)), "Adam",
                   {"lr": 0.02, "betas": (0.8, 0.95), "eps_mode": "hat"}, ["exp_avg", "exp_avg_sq"]),
    "SparseAdam, maximize": (lambda p: torch.optim.SparseAdam(p, eps=1e-3, maximize=True), "Adam",
                             {"eps": 1e-3, "eps_mode": "hat", "maximize": True}, ["exp_avg", "exp_avg_sq"]),
    "Adagrad": (lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.05, initial_accumulator_value=0.2), "Adagrad",
                {"lr": 0.1, "lr_decay": 0.05, "initial_accumulator_value": 0.2}, ["sum"]),
    "SGD": (lambda p: torch.optim.SGD(p, lr=0.3), "SGD", {"lr": 0.3}, []),
}  # fmt: skip


def drawn(rng, k):
    """Indices of which a few rows have many."""
    return np.minimum(rng.geometric(0.08, k), SHAPE[0]) - 1


@pytest.mark.parametrize("name", list(SAME))
def test_the_rules_that_torch_has_for_sparse_gradients(name):
    theirs, rule, options, state = SAME[name]
    rng = np.random.default_rng(0)
    start = rng.normal(size=SHAPE)
    p, q = start.copy(), torch.nn.Parameter(torch.from_numpy(start.copy()))
    opt, other = getattr(ac, rule)(p, **options), theirs([q])
    for k in (30, 1, 0, 80, 7, 40):  # without rows it is a step too, which counts
        indices, values = drawn(rng, k), rng.normal(size=(k, SHAPE[1]))
        opt.step(ac.Rows(indices, values))
        q.grad = torch.sparse_coo_tensor(
            torch.from_numpy(indices)[None], torch.from_numpy(values), SHAPE, check_invariants=True
        )
        other.step()
        np.testing.assert_allclose(p, q.detach().numpy(), **CLOSE)
    for key in state:
        np.testing.assert_allclose(opt.state[key].ravel(), other.state[q][key].numpy().ravel(), **CLOSE)
    assert (p == start).all(axis=1).any()  # some rows have never been touched


@pytest.mark.parametrize(("mode", "weighted"), [("sum", False), ("sum", True), ("mean", False)])
def test_bags(mode, weighted):  # torch takes weights of entries for sums only
    rng = np.random.default_rng(1)
    start = rng.normal(size=SHAPE)
    bag = torch.nn.EmbeddingBag(*SHAPE, mode=mode, sparse=True, dtype=torch.float64)
    bag.weight.data = torch.from_numpy(start.copy())
    p = start.copy()
    opt, other = ac.Adagrad(p, lr=0.1), torch.optim.Adagrad(bag.parameters(), lr=0.1)
    for _ in range(4):
        indices, offsets = drawn(rng, 20), np.array([0, 3, 3, 11, 19])  # the second bag is empty
        factors = rng.normal(size=20) if weighted else None
        g = rng.normal(size=(5, SHAPE[1]))
        out = bag(torch.from_numpy(indices), torch.from_numpy(offsets),
                  None if factors is None else torch.from_numpy(factors))  # fmt: skip
        other.zero_grad()
        out.backward(torch.from_numpy(g))
        other.step()
        sizes = np.diff(offsets, append=20)
        weights = np.repeat(1 / np.maximum(sizes, 1), sizes) if mode == "mean" else factors
        opt.step(ac.Rows(indices, g, offsets=offsets, weights=weights))
        np.testing.assert_allclose(p, bag.weight.detach().numpy(), **CLOSE)

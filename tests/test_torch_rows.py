"""Sparse gradients of torch are stepped as rows, in their own memory."""

import copy

import numpy as np
import pytest

import adaptive_c as ac

torch = pytest.importorskip("torch", reason="the torch door needs torch")
door = pytest.importorskip("adaptive_c.torch")

pytestmark = [
    pytest.mark.later("torch"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning"),
]


def words(step):
    return torch.tensor([3, 9, 3, 0]) + step % 2


def look_up(layer, step):
    """A loss over a few rows, some of them twice."""
    indices = words(step)
    if isinstance(layer, torch.nn.EmbeddingBag):
        weights = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=layer.weight.dtype) if layer.mode == "sum" else None
        return (layer(indices, torch.tensor([0, 3]), per_sample_weights=weights) ** 2).sum()
    return (layer(indices) ** 2).sum()


def layers(kind, dtype):
    for sparse in (True, False):
        torch.manual_seed(0)
        more = {} if kind == "Embedding" else {"mode": kind}
        cls = torch.nn.Embedding if kind == "Embedding" else torch.nn.EmbeddingBag
        yield cls(20, 5, sparse=sparse, dtype=dtype, **more)


@pytest.mark.parametrize("kind", ["Embedding", "sum", "mean"])
@pytest.mark.parametrize("name", ac.optimizers.__all__)
def test_exact_rows_are_the_dense_step(name, kind):
    """Up to the rounding of torch's own sums over rows that are named several times."""
    table, whole = layers(kind, torch.float64)
    opt = getattr(door, name)(table.parameters(), rows="exact", max_grad_norm=2.0)
    dense = getattr(door, name)(whole.parameters(), max_grad_norm=2.0)
    for step in range(5):
        opt.catch_up(table.weight, words(step))  # before they are looked up
        for layer, each in ((table, opt), (whole, dense)):
            each.zero_grad()
            look_up(layer, step).backward()
            each.step()
        assert table.weight.grad.is_sparse
        assert opt.grad_norm == pytest.approx(dense.grad_norm, rel=1e-14)
    opt.catch_up()
    torch.testing.assert_close(table.weight, whole.weight, rtol=1e-12, atol=1e-12)


def test_rows_beside_dense_and_no_gradients_in_one_group():
    torch.manual_seed(0)
    table, linear, unused = torch.nn.Embedding(9, 4, sparse=True), torch.nn.Linear(4, 2), torch.nn.Linear(2, 2)
    params = [*table.parameters(), *linear.parameters(), *unused.parameters()]
    arrays = [p.detach().numpy().copy() for p in params]
    opt, plain = door.AdamW(params, zero_grad=True), ac.AdamW(arrays, lr=1e-3)
    for _ in range(3):
        linear(table(torch.tensor([1, 5, 1]))).sum().backward()
        g = table.weight.grad
        rows = ac.Rows(g._indices()[0].numpy().copy(), g._values().numpy().copy())
        plain.step([rows, *(p.grad.numpy().copy() for p in linear.parameters()), None, None])
        opt.step()
        assert not g._values().any()  # zero_grad zeroes them in place
        opt.zero_grad()
        for p, a in zip(params, arrays, strict=True):
            assert np.array_equal(p.detach().numpy(), a)


def test_bfloat16_tables():
    torch.manual_seed(0)
    table = torch.nn.Embedding(9, 4, sparse=True, dtype=torch.bfloat16)
    before = table.weight.detach().clone()
    opt = door.Adagrad(table.parameters(), lr=0.5, rounding="stochastic")
    table(torch.tensor([1, 5, 1])).float().sum().backward()
    opt.step()
    changed = (table.weight != before).any(1)
    assert changed.nonzero().ravel().tolist() == [1, 5]


def test_a_sparse_gradient_that_does_not_fit():
    p = torch.nn.Parameter(torch.ones(4, 6).t())
    opt = door.SGD([p], lr=1.0)
    p.grad = torch.sparse_coo_tensor([[0]], torch.ones(1, 4), (6, 4))
    with pytest.raises(TypeError, match=r"of contiguous parameters: p.grad = p.grad.to_dense\(\) before the step"):
        opt.step()
    assert (p == 1).all()


@pytest.mark.parametrize("stepped", [False, True])
def test_catch_up_takes_a_parameter_and_its_rows(stepped):
    table = torch.nn.Embedding(9, 4, sparse=True)
    opt = door.AdamW(table.parameters(), rows="exact")
    if stepped:
        table(torch.tensor([1, 5, 1])).sum().backward()
        opt.step()
    for wrong in [(table.weight,), (None, torch.tensor([1])), ("weight", torch.tensor([1])), (table.weight, [1])]:
        with pytest.raises(TypeError, match="catch_up takes nothing, or a parameter and a tensor of its rows"):
            opt.catch_up(*wrong)
    with pytest.raises(ValueError, match="no parameter of this optimizer"):
        opt.catch_up(torch.ones(9, 4), torch.tensor([1]))
    opt.catch_up(table.weight, torch.tensor([[1], [2]]))
    opt.catch_up()


def test_a_copy_of_model_and_optimizer_has_no_rows_that_lag():
    table = torch.nn.Embedding(9, 4, sparse=True, dtype=torch.float64)
    opt = door.AdamW(table.parameters(), lr=0.1, rows="exact")
    for i in (1, 5, 1):
        opt.zero_grad()
        table(torch.tensor([i])).sum().backward()
        opt.step()
    other, same = copy.deepcopy((opt, table))
    opt.catch_up()
    other.catch_up()
    assert torch.equal(same.weight, table.weight)
    assert torch.equal(same.weight, other.param_groups[0]["params"][0])


# --- rows of arrays, against torch's own rules --------------------------------------------------------------------------

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


# --- one second moment for each row -----------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"state_dtype": "uint8"}], ids=str)
@pytest.mark.parametrize(("name", "moment"), [("Adagrad", "sum"), ("RMSprop", "square_avg"), ("Adam", "exp_avg_sq"),
                                              ("AdamW", "exp_avg_sq")])  # fmt: skip
def test_moments_by_row(name, moment, more):
    """Steps are those over arrays; the state is one number for each row, and a checkpoint resumes it."""
    shapes = [(50, 6), (7,), (3, 4, 5)]
    rng = np.random.default_rng(0)
    start = [rng.normal(size=shape).astype("float32") for shape in shapes]
    options = {"lr": 0.1, "second_moment": "row", **more}
    arrays = [x.copy() for x in start]
    plain = getattr(ac, name)(arrays, **options)
    params, other = ([torch.nn.Parameter(torch.tensor(x)) for x in start] for _ in range(2))
    opt = getattr(door, name)(params, **options)
    for t in range(4):
        table = ac.Rows(np.array([3, 9, 3]), rng.normal(size=(3, 6)).astype("float32"))
        dense = [rng.normal(size=shape).astype("float32") for shape in shapes[1:]]
        plain.step([table, *dense])
        params[0].grad = torch.sparse_coo_tensor(table.indices[None], torch.tensor(table.values), (50, 6))
        for p, g in zip(params[1:], dense, strict=True):
            p.grad = torch.tensor(g)
        opt.step()
        if t == 1:  # go on with another optimizer
            resumed = getattr(door, name)(other, **options)
            resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
            for p, q in zip(params, other, strict=True):
                q.data.copy_(p.data)
            params, opt = other, resumed
    for p, x, v in zip(params, arrays, plain.state[moment], strict=True):
        assert np.array_equal(p.detach().numpy(), x)
        assert opt.state[p][moment].shape == v.shape == (*x.shape[:1], *(1,) * (x.ndim - 1))
        assert np.array_equal(opt.state[p][moment].numpy(), v)
    opt.state[params[0]][moment].fill_(7.0)  # it is the state itself
    opt.step()
    assert opt.state[params[0]][moment].min() > 1


def test_moments_by_row_that_do_not_fit():
    table = torch.nn.Parameter(torch.ones(4, 6))
    opt = door.Adam([table], second_moment="row")
    table.grad = torch.ones(4, 6)
    opt.step()
    with pytest.raises(ValueError, match="PyTorch's Adam has no second_moment='row', only 'element'"):
        opt.state_dict(format="torch")
    theirs = torch.optim.Adam([table])
    theirs.step()
    before = copy.deepcopy(opt.state_dict())
    with pytest.raises(
        ValueError, match=r"'exp_avg_sq' must be a tensor of one number for each row, of shape \(4, 1\)"
    ):
        opt.load_state_dict(theirs.state_dict())
    assert torch.equal(before["state"][0]["exp_avg_sq"], opt.state[table]["exp_avg_sq"])
    opt.step()
    turned = torch.nn.Parameter(torch.ones(6, 4).t())
    message = (
        r"parameter 0 of group 0 is not contiguous, and second_moment='row' needs its rows in memory: p.data = p\."
    )
    with pytest.raises(ValueError, match=message):
        door.Adam([turned], second_moment="row")
    opt = door.Adam([torch.nn.Parameter(torch.ones(2, 2))], second_moment="row")
    with pytest.raises(ValueError, match="parameter 0 of group 1 is not contiguous"):
        opt.add_param_group({"params": [turned]})
    opt.add_param_group({"params": [turned], "second_moment": "element"})
    with pytest.raises(ValueError, match="second_moment must be 'element' or 'row', got 'rows'"):
        door.Adagrad([table], second_moment="rows")
    with pytest.raises(TypeError, match="second_moment"):
        door.SGD([table], second_moment="row")

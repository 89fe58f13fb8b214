"""PyTorch on the CPU as a third opinion, in float64."""

import numpy as np
import pytest

import adaptive_c as ac

torch = pytest.importorskip("torch", minversion="2.13")
from tensors import double  # noqa: E402, F401

pytestmark = pytest.mark.later("torch")

# (class in both, options)
CASES = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05, "maximize": True}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.05, "initial_accumulator_value": 0.2}),
    ("Adagrad", {"lr": 0.1, "eps": 1e-2, "maximize": True}),
    ("RMSprop", {"lr": 0.1, "weight_decay": 0.05}),
    ("RMSprop", {"lr": 0.1, "momentum": 0.9, "maximize": True, "eps": 1e-2}),
    ("RMSprop", {"lr": 0.1, "centered": True}),
    ("RMSprop", {"lr": 0.1, "momentum": 0.9, "centered": True, "alpha": 0.9}),
    ("Adadelta", {"lr": 0.5, "rho": 0.8, "weight_decay": 0.05, "maximize": True}),
    ("Adam", {"lr": 0.1, "weight_decay": 0.05}),
    ("Adam", {"lr": 0.1, "amsgrad": True, "maximize": True, "betas": (0.8, 0.95)}),
    ("Adam", {"lr": 0.1, "weight_decay": 0.05, "decoupled_weight_decay": True, "eps": 1e-2}),
    ("AdamW", {"lr": 0.1, "weight_decay": 0.05}),
    ("AdamW", {"lr": 0.1, "weight_decay": 0.05, "amsgrad": True, "maximize": True}),
    ("Adamax", {"lr": 0.1, "weight_decay": 0.05, "maximize": True}),
    ("NAdam", {"lr": 0.1, "weight_decay": 0.05, "momentum_decay": 0.1}),
    ("NAdam", {"lr": 0.1, "weight_decay": 0.05, "decoupled_weight_decay": True, "maximize": True}),
    ("RAdam", {"lr": 0.1, "weight_decay": 0.05, "betas": (0.9, 0.99)}),
    ("RAdam", {"lr": 0.1, "weight_decay": 0.05, "decoupled_weight_decay": True, "eps": 1e-2, "maximize": True}),
    ("Rprop", {"lr": 0.1, "etas": (0.4, 1.3), "step_sizes": (1e-2, 1.0)}),
]
IDS = [f"{name}-{i}" for i, (name, _) in enumerate(CASES)]
SHAPES = [(3, 4), (5,), (), (2, 1, 2)]


def close(ours, theirs):
    """|a - b| <= 1e-12 (|b| + 1e-3): roundings of a dozen operations, and bias corrections formed another way."""
    theirs = theirs.detach().numpy()
    assert np.all(np.abs(ours - theirs) <= 1e-12 * (np.abs(theirs) + 1e-3)), (ours, theirs)


class Both:
    """The same problem in both libraries."""

    def __init__(self, name, options, seed=0, groups=None):
        self.rng = np.random.default_rng(seed)
        self.p = [np.asarray(self.rng.normal(size=shape)) for shape in SHAPES]
        self.q = [torch.tensor(x, requires_grad=True) for x in self.p]
        if groups is None:
            self.ours, self.theirs = getattr(ac, name)(self.p, **options), getattr(torch.optim, name)(self.q, **options)
        else:
            self.ours = getattr(ac, name)([{"params": self.p[:2]}, {"params": self.p[2:], **groups}], **options)
            self.theirs = getattr(torch.optim, name)(
                [{"params": self.q[:2]}, {"params": self.q[2:], **groups}], **options
            )
        self.grouped = groups is not None

    def step(self, leave=()):
        grads = [None if i in leave else np.asarray(self.rng.normal(size=x.shape)) for i, x in enumerate(self.p)]
        for q, g in zip(self.q, grads, strict=True):
            q.grad = None if g is None else torch.tensor(g)
        self.ours.step([grads[:2], grads[2:]] if self.grouped else grads)
        self.theirs.step()
        for x, y in zip(self.p, self.q, strict=True):
            close(x, y)

    def compare_state(self):
        for name in self.ours.state:
            ours = self.ours.state[name]
            for i, (x, q) in enumerate(zip(self.p, self.q, strict=True)):
                theirs = self.theirs.state[q]
                mine = (ours[0] + ours[1])[i] if self.grouped else ours[i]
                if not theirs:  # no gradient yet, or a rule without state
                    assert name != "step" or mine == 0 or isinstance(self.ours, ac.SGD)
                elif name == "prev":  # torch keeps the gradient, which it zeroes where it turned
                    np.testing.assert_array_equal(mine, np.sign(theirs["prev"].numpy()))
                elif name in theirs and theirs[name] is not None:
                    close(mine, theirs[name] if torch.is_tensor(theirs[name]) else torch.tensor(theirs[name]))
                assert mine.shape == (() if name in ("step", "mu_product") else x.shape)


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_twelve_steps(name, options):
    both = Both(name, options)
    for _ in range(12):
        both.step()
        both.compare_state()


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_missing_gradients(name, options):
    """Each array has its own count: one never steps, one every third time, one joins late."""
    both = Both(name, options, seed=1)
    for t in range(12):
        both.step(leave=[0, *([1] if t % 3 else []), *([2] if t < 5 else [])])
        both.compare_state()


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_options_changed_in_the_middle_of_a_run(name, options):
    both = Both(name, options, seed=2)
    changes = {"lr": 0.03, "weight_decay": 0.2, "eps": 1e-3, "betas": (0.7, 0.9), "alpha": 0.5, "rho": 0.5,
               "momentum": 0.5, "maximize": True, "momentum_decay": 0.02, "lr_decay": 0.3, "etas": (0.3, 1.5)}  # fmt: skip
    for key, value in changes.items():
        if key not in both.ours.param_groups[0] or (key == "momentum" and not options.get("momentum")):
            continue
        both.step()
        both.ours.param_groups[0][key] = value
        both.theirs.param_groups[0][key] = value
    for _ in range(4):
        both.step()


def test_momentum_switched_off_before_the_first_step_and_on_again():
    """The first-buffer rule is 'this array has no buffer yet', not 't == 1'."""
    both = Both("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3})
    for momentum in (0.0, 0.9, 0.0, 0.9):
        both.ours.param_groups[0]["momentum"] = both.theirs.param_groups[0]["momentum"] = momentum
        both.step(leave=[1] if momentum else [])
        both.step()


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_groups(name, options):
    groups = {"lr": 0.02, "maximize": not options.get("maximize", False)}
    both = Both(name, options, seed=3, groups=groups)
    for t in range(8):
        both.step(leave=[2] if t % 2 else [])
        both.compare_state()


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_a_nan_in_a_gradient(name, options):
    """It makes the element NaN in both libraries, at the first step and later; torch's Rprop takes it as a 0."""
    ours, zeroed = np.ones(4), np.ones(4)
    theirs = torch.ones(4, requires_grad=True)
    opt, other = getattr(ac, name)(ours, **options), getattr(ac, name)(zeroed, **options)
    third = getattr(torch.optim, name)([theirs], **options)
    for g in ([np.nan, 1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0], [1.0, np.nan, 1.0, -1.0], [1.0, 1.0, 1.0, 1.0]):
        opt.step(np.array(g))
        other.step(np.nan_to_num(g, nan=0.0))
        theirs.grad = torch.tensor(g)
        third.step()
    assert np.isnan(ours).tolist() == [True, True, False, False]
    if name == "Rprop":
        close(zeroed, theirs)
    else:
        assert theirs.isnan().tolist() == [True, True, False, False]
    close(ours[2:], theirs[2:])


def test_every_class_that_both_have_is_here():
    shared = {name for name in ac.optimizers.__all__ if hasattr(torch.optim, name)}
    assert shared == {name for name, _ in CASES}


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_names_and_defaults_are_torchs(name, options):
    import inspect

    ours = inspect.signature(getattr(ac, name)).parameters
    theirs = inspect.signature(getattr(torch.optim, name)).parameters
    implementation = {"foreach", "fused", "capturable", "differentiable"}
    for key, parameter in theirs.items():
        if key not in implementation:
            assert key in ours
            if key == "params":
                continue
            assert float(np.sum(ours[key].default)) == pytest.approx(float(np.sum(parameter.default)), rel=1e-15), key
    positional = [k for k, v in theirs.items() if v.kind == v.POSITIONAL_OR_KEYWORD and k not in implementation]
    assert [k for k in ours if k in positional] == positional

"""adaptive_c.torch against torch.optim: the same numbers from the same tensors, by torch's own tables of inputs."""

import copy
import doctest
import inspect
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from support import child
from test_torch import CASES, IDS

import adaptive_c as ac

torch = pytest.importorskip("torch", minversion="2.13")
from tensors import double, parameters  # noqa: E402, F401

import adaptive_c.torch as door  # noqa: E402

pytestmark = pytest.mark.later("torch")

PAGE = Path(__file__).parents[1] / "docs" / "torch.md"
NAMES = [name for name in door.__all__ if name not in ("Optimizer", "in_backward")]
SHARED = [name for name in NAMES if hasattr(torch.optim, name)]
SHAPES = [(3, 4), (5,), (), (2, 1, 2), (0, 3), (2, 3, 2, 2)]


def close(ours, theirs, part=1e-12):
    """|a - b| <= part (|b| + 1e-3): roundings of a dozen operations, and bias corrections formed another way."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    assert ours.shape == theirs.shape
    assert bool(((ours - theirs).abs() <= part * (theirs.abs() + 1e-3)).all()), (ours, theirs)


def give(p, q, rng, leave=(), alike=False):
    """The same gradients for both: some lie in memory as their parameters do, and all if `alike`, some don't."""
    for i, (x, y) in enumerate(zip(p, q, strict=True)):
        g = torch.tensor(np.asarray(rng.normal(size=x.shape))).to(x.dtype)
        if alike or rng.random() < 0.5:
            g = torch.empty_like(x).copy_(g)
        x.grad, y.grad = (None, None) if i in leave else (g.clone(), g.clone())


@pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
def test_twelve_steps(name, options):
    """With gradients that are missing now and then; state by torch's names, laid out as the parameters are."""
    p, q = parameters(SHAPES), parameters(SHAPES)
    ours, theirs = getattr(door, name)(p, **options), getattr(torch.optim, name)(q, **options)
    rng, part = np.random.default_rng(0), 1e-11 if name == "RAdam" else 1e-12  # its rectification cancels digits
    for t in range(12):
        give(p, q, rng, leave=[1, *([0] if t % 3 else [])])
        ours.step()
        theirs.step()
        for x, y in zip(p, q, strict=True):
            close(x, y, part)
            state = {key: value for key, value in theirs.state[y].items() if value is not None}
            assert ours.state[x].keys() == state.keys()
            for key, value in state.items():
                assert not value.dim() or ours.state[x][key].stride() == x.stride()
                close(ours.state[x][key], value.sign() if key == "prev" else value, part)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in SHARED])
def test_rules_that_torch_does_not_have(name):
    """They have the bits of the class over arrays."""
    p = parameters(SHAPES)
    arrays = [x.detach().numpy().copy() for x in p]
    arrays = [np.ascontiguousarray(x) for x in arrays]
    ours, plain = getattr(door, name)(p, lr=0.05), getattr(ac, name)(arrays, lr=0.05)
    rng = np.random.default_rng(0)
    for _ in range(5):
        give(p, p, rng)
        ours.step()
        plain.step([np.ascontiguousarray(x.grad.numpy()) for x in p])
    for x, y in zip(p, arrays, strict=True):
        np.testing.assert_array_equal(x.detach().numpy(), y)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixed_dtypes_within_a_group(name, dtype):
    mixed = [(torch.float32, torch.float64)[i % 2] for i in range(len(SHAPES))]
    p, q = ([torch.nn.Parameter(x.detach().to(kind)) for x, kind in zip(parameters(SHAPES), mixed, strict=True)]
            for _ in range(2))  # fmt: skip
    ours, theirs = getattr(door, name)(p), getattr(torch.optim, name)(q)
    rng = np.random.default_rng(0)
    for _ in range(4):
        give(p, q, rng)
        ours.step()
        theirs.step()
    for x, y in zip(p, q, strict=True):
        close(x, y, 1e-5 if x.dtype is torch.float32 else 1e-12)


# --- torch's own tables --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def table():
    """The inputs that torch's tests construct its optimizers with, and those that they refuse."""
    pytest.importorskip("expecttest", reason="torch's tables of test inputs import it")
    from torch.testing._internal import common_optimizers

    infos = {info.optim_cls.__name__: info for info in common_optimizers.optim_db}
    assert set(infos) & set(NAMES) == set(SHARED)
    return infos, common_optimizers


@pytest.mark.parametrize("name", SHARED)
def test_the_inputs_of_torchs_tests(name, table):
    infos, module = table
    inputs = module._get_optim_inputs_including_global_cliquey_kwargs("cpu", torch.float64, infos[name])
    assert len(inputs) > 5
    for given in inputs:
        p, q = parameters(SHAPES), parameters(SHAPES)
        if given.kwargs.get("differentiable"):
            with pytest.raises(ValueError, match="differentiable=True"):
                getattr(door, name)(p, **given.kwargs)
            continue
        ours = getattr(door, name)(p, **copy.deepcopy(given.kwargs))
        theirs = getattr(torch.optim, name)(q, **copy.deepcopy(given.kwargs))
        rng = np.random.default_rng(0)
        for _ in range(5):  # torch's fused kernels pair the wrong elements where strides differ
            give(p, q, rng, alike=bool(given.kwargs.get("fused")))
            ours.step()
            theirs.step()
        for x, y in zip(p, q, strict=True):
            close(x, y, 1e-11 if name == "RAdam" else 1e-12)


@pytest.mark.parametrize("name", SHARED)
def test_the_error_inputs_of_torchs_tests(name, table):
    """The same errors; and nothing is left that could be stepped."""
    infos, _ = table
    for error in infos[name].optim_error_inputs_func("cpu", torch.float64):
        given = error.optimizer_error_input
        params = parameters(SHAPES) if given.params is None else given.params
        with pytest.raises(error.error_type, match=error.error_regex):  # warnings are errors here
            getattr(door, name)(params, **given.kwargs)


def raises(kind, match, call):
    with pytest.raises(kind, match=match):
        call()


def one(tensor):
    return door.AdamW([torch.nn.Parameter(tensor)])


def sparse():
    p = torch.nn.Parameter(torch.ones(5, 3))
    p.grad = torch.ones(5, 3).to_sparse()
    door.SGD([p]).step()


def twice():
    p = parameters(SHAPES)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opt = door.AdamW([p, p])
    p.grad = torch.ones_like(p)
    opt.step()


# What can't hold of torch's own tests, by the words in docs/torch.md: a proof that it doesn't, for each.
NOT_HERE = {
    "differentiable=True": lambda: raises(
        ValueError, "drop it", lambda: door.AdamW(parameters(SHAPES), differentiable=True)
    ),
    "capturable=True": lambda: raises(ValueError, "drop it", lambda: door.AdamW(parameters(SHAPES), capturable=True)),
    "complex parameters": lambda: raises(TypeError, "view_as_real", lambda: one(torch.ones(3, dtype=torch.complex64))),
    "sparse gradients of single elements": lambda: raises(TypeError, "2 sparse dimensions.*to_dense", sparse),
    "other devices": lambda: raises(TypeError, "model.cpu", lambda: one(torch.ones(3, device="meta"))),
    "strides with gaps": lambda: raises(ValueError, "contiguous", lambda: one(torch.ones(4, 4)[:, ::2])),
    "one parameter twice": lambda: raises(ValueError, "share memory", twice),
    "Adafactor, ASGD, LBFGS, Muon, SparseAdam": lambda: [
        raises(AttributeError, name, lambda name=name: getattr(door, name))
        for name in ("Adafactor", "ASGD", "LBFGS", "Muon", "SparseAdam")
    ],
}


@pytest.mark.parametrize("what", NOT_HERE)
def test_what_cant_hold_of_torchs_tests(what):
    NOT_HERE[what]()


@pytest.mark.skipif(not PAGE.is_file(), reason="not in a clone")
def test_the_page_lists_what_cant_hold():
    section = PAGE.read_text().partition("\n## What can't hold of torch's own tests\n")[2].partition("\n## ")[0]
    assert re.findall(r"^- \*\*(.*?)\*\*", section, re.M) == list(NOT_HERE)


def test_every_class_of_torchs_tests_is_here_or_listed(table):
    infos, _ = table
    listed = re.findall(r"\w+", next(key for key in NOT_HERE if key.startswith("Adafactor")))
    assert set(infos) - set(NAMES) == set(listed)


# --- the classes ---------------------------------------------------------------------------------------------------------


def test_every_rule_has_a_class():
    assert list(ac.optimizers.__all__) == NAMES
    for name in NAMES:
        cls = getattr(door, name)
        assert issubclass(cls, torch.optim.Optimizer)
        assert (cls.__name__, cls.__qualname__, cls.__module__) == (name, name, "adaptive_c.torch")
        assert issubclass(cls, getattr(torch.optim, name, object))


@pytest.mark.parametrize("name", NAMES)
def test_signatures_and_docstrings(name):
    """Torch's arguments in torch's order with torch's defaults, then ours by keyword; the rule's own text."""
    cls, rule = getattr(door, name), getattr(ac, name)
    signature = list(inspect.signature(cls).parameters.values())
    if name in SHARED:
        theirs = list(inspect.signature(getattr(torch.optim, name)).parameters.values())
        assert signature[: len(theirs)] == theirs
    ours = {x.name for x in signature}
    assert {"state_dtype", "max_grad_norm", "seed", "n_threads", "foreach", "capturable"} - ours <= {"capturable"}
    assert set(inspect.signature(rule.__init__).parameters) - ours == {"self", "shared"}
    assert all(x.kind is x.KEYWORD_ONLY for x in signature if x.name in ("state_dtype", "n_threads", "eps_mode"))
    assert cls.__doc__.startswith(rule.__doc__.splitlines()[0])
    assert "Paper:" in cls.__doc__
    assert "np." not in cls.__doc__
    assert "max_grad_norm" in door.Optimizer.__doc__
    assert cls.max_grad_norm.__doc__.startswith("The option max_grad_norm: float > 0.\n")  # and no schedule of ours
    assert rule.max_grad_norm.__doc__.startswith("The option max_grad_norm: float > 0 or schedule.\n")


def test_positional_arguments_are_torchs():
    p, q = parameters(SHAPES), parameters(SHAPES)
    ours, theirs = (kind.RMSprop(x, 0.1, 0.9, 1e-3, 0.1, 0.5, True) for kind, x in ((door, p), (torch.optim, q)))
    kept = {key: value for key, value in ours.param_groups[0].items() if key in theirs.param_groups[0]}
    assert {**kept, "params": 0} == {**theirs.param_groups[0], "params": 0}


def test_the_example_of_the_module():
    torch.set_default_dtype(torch.float32)
    found = doctest.testmod(door)
    assert found.attempted > 4
    assert not found.failed


def test_a_missing_torch_is_named():
    code = "import sys; sys.modules['torch'] = None\nimport adaptive_c.torch"
    found = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert "pip install 'adaptive_c[torch]'" in found.stderr
    assert "https://download.pytorch.org/whl/cpu" in found.stderr


def test_torch_is_not_imported_by_the_rest():
    code = "import sys, adaptive_c; adaptive_c.AdamW; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)


@pytest.mark.parametrize(("options", "error", "match"), [
    ({"loss_scale": 8.0}, TypeError, "GradScaler"),
    ({"copy_to": None}, TypeError, "arrays"),
    ({"uint16_as": "bfloat16"}, TypeError, "itself"),
    ({"keep_undo": True}, TypeError, "rollback"),
    ({"learning_rate": 0.1}, TypeError, "AdamW: .*learning_rate.*; it has params, lr, betas"),
    ({"lr": ac.schedules.cosine(1e-3, 10)}, TypeError, "lr can't follow a schedule .*lr_scheduler"),
    ({"betas": (0.9, ac.schedules.linear(0.9, 10, end=0.99))}, TypeError, "betas can't follow a schedule"),
    ({"ema_decay": lambda t: t / (t + 9)}, TypeError, "ema_decay can't follow a schedule"),
    ({"max_grad_norm": lambda t: 1.0}, TypeError, "max_grad_norm can't follow a schedule"),
    ({"state_dtype": "int4"}, ValueError, "state_dtype must be"),
    ({"state_dtype": "uint8"}, ValueError, "float64"),
    ({"master": "float32"}, ValueError, "float16 and bfloat16"),
    ({"max_grad_norm": -1.0}, ValueError, "max_grad_norm"),
    ({"ema_decay": 1.5}, ValueError, "ema_decay"),
    ({"bounds": (1.0, 0.0)}, ValueError, "bounds"),
    ({"bounds": (torch.ones(3), None)}, TypeError, "two numbers"),
    ({"n_threads": 0}, ValueError, "n_threads"),
    ({"on_nonfinite": "stop"}, ValueError, "on_nonfinite"),
    ({"eps_mode": "in"}, ValueError, "eps_mode"),
])  # fmt: skip
def test_refused_options(options, error, match):
    with pytest.raises(error, match=match):
        door.AdamW(parameters(SHAPES), **options)


def test_refused_parameters():
    with pytest.raises(ValueError, match="master='float32'"):
        one(torch.ones(3, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="float32, float64"):
        door.AdamW([torch.ones(3, dtype=torch.int32)])
    with pytest.raises(TypeError, match="to_dense"):
        one(torch.ones(3).to_sparse())
    with pytest.raises(ValueError, match="gaps"):
        one(torch.ones(3, 1).expand(3, 4))


def test_refused_parts_of_a_tensor():
    """A DTensor, with the remedy that the message says."""
    distributed = torch.distributed
    if not distributed.is_available():
        pytest.skip("this PyTorch has no torch.distributed")
    from torch.distributed.tensor import DTensor

    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = distributed.init_device_mesh("cpu", (1,))
        p = torch.nn.Parameter(DTensor.from_local(torch.ones(3), mesh))
        with pytest.raises(TypeError, match=r"DTensor, .*; step this process's part: torch.nn.Parameter") as raised:
            door.AdamW([p])
        mine = eval(str(raised.value).rpartition(": ")[2], {"torch": torch, "p": p.detach()})
        assert door.AdamW([mine]).param_groups[0]["params"] == [mine]
    finally:
        distributed.destroy_process_group()


def test_torchs_number_of_threads_caps_ours():
    """Both use one OpenMP runtime, if torch was imported first."""
    code = """
import torch
import adaptive_c.torch, adaptive_c
torch.set_num_threads(1)
print(adaptive_c.get_num_threads())
adaptive_c.set_num_threads(2)
print(adaptive_c.get_num_threads())
"""
    assert child(code, OMP_NUM_THREADS="2") == "1\n2\n"

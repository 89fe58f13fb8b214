"""What is measured: this library, its peers, and NumPy and numba written by hand, all through one small interface.

A contender is a function that takes a `Task` and returns a `Subject`, in a process of its own.  Its decorator says
what must be installed for it, and which formula of adaptive_c.reference its results are checked against.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
LR, DECAY = 1e-3, 1e-2
WHOLE: dict[str, Any] = {"max_grad_norm": 1.0, "ema_decay": 0.999, "zero_grad": True}


@dataclass(frozen=True)
class Task:
    """What a contender steps: the sizes of the arrays, the rule and its options."""

    sizes: tuple[int, ...]
    rule: str = "AdamW"
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "float32"  # of parameters and gradients; "bfloat16" arrays are uint16
    state_dtype: str | None = None
    whole: bool = False  # unscale by 1024, clip to norm 1, step, average, bfloat16 copy, zero the gradient
    copy: bool = True  # the whole step has the copy
    threads: int | None = None
    uneven: bool = False  # a third of the gradients are 0, and the others' sizes spread over 20 binades
    rows: int = 0  # how many indices of rows a step has (see rows.py); 0: the gradients are dense
    spread: str = "unique"  # how these are distributed

    @property
    def elements(self) -> int:
        return sum(self.sizes)

    def arrays(self) -> tuple[list[Array], list[Array]]:
        """Parameters in [0.25, 1) and gradients in +-[0.25, 1), the same in every process."""
        rng = np.random.default_rng(0)
        out: tuple[list[Array], list[Array]] = ([], [])
        for part, arrays in enumerate(out):
            for n in self.sizes:
                x = rng.random(n, "float64" if self.dtype == "float64" else "float32")
                x *= 0.75
                x += 0.25
                if part:
                    x[::2] *= -1
                    if self.uneven:
                        x *= np.exp2(-20 * rng.random(n, "float32"))
                        x[rng.random(n, "float32") < 1 / 3] = 0
                if self.dtype == "bfloat16":
                    x = (x.view("uint32") >> np.uint32(16)).astype("uint16")
                arrays.append(x)
        return out


@dataclass
class Subject:
    """What the process of a contender can be asked to do."""

    step: Callable[[], Any]
    params: Callable[[], list[Array]]  # their present values
    double: Callable[[], Any]  # doubles the gradients of the next steps: constant ones would hide what betas do
    prepare: Callable[[], Any] | None = None  # called before each step, and not timed
    ceiling: Callable[[], Any] | None = None
    bytes: float = 0.0  # how many a step moves for each element


def double(*arrays: Array) -> None:
    """Double each array, in place."""
    for x in arrays:
        if x.dtype == np.uint16:  # bfloat16: adding one to the exponent doubles the number
            x += 0x80
        else:
            x *= 2


@dataclass(frozen=True)
class Contender:
    """A contender's name, how it is made, and what it is checked against."""

    name: str
    build: Callable[[Task], Subject]
    install: str  # the command that installs it
    rule: str = "adamw"  # the function of adaptive_c.reference that it follows
    options: Mapping[str, Any] = field(default_factory=dict)
    bits: int = 32  # the width of its state
    dtype: str | None = None  # the dtype that it steps instead of the task's
    rows: bool = False  # for gradients of rows only
    spread: str | None = None  # how the indices are distributed that it takes instead of the task's


CONTENDERS: dict[str, Contender] = {}
ADAM_HAT = MappingProxyType({"eps_mode": "hat"})  # Adam without weight decay, eps added to the uncorrected root


def contender(name: str, install: str = "", **more: Any) -> Callable[[Callable[[Task], Subject]], Any]:
    """A decorator that enters a contender into CONTENDERS."""

    def register(build: Callable[[Task], Subject]) -> Callable[[Task], Subject]:
        CONTENDERS[name] = Contender(name, build, install, **more)
        return build

    return register


# --- this library ------------------------------------------------------------------------------------------------


@contender("adaptive_c")
def ours(task: Task) -> Subject:
    """This library."""
    import adaptive_c as ac
    from adaptive_c._native import core

    params, grads = task.arrays()
    p: Any
    g: Any
    p, g = (params[0], grads[0]) if len(params) == 1 else (params, grads)
    more: dict[str, Any] = {"state_dtype": task.state_dtype, "uint16_as": "bfloat16", "n_threads": task.threads}
    if task.dtype == "bfloat16":
        more["rounding"] = "stochastic"
    if task.whole:
        copy = (np.empty(params[0].shape, "uint16"),) if task.copy else ()
        more |= {**WHOLE, "loss_scale": 1024.0, "copy_to": copy[0] if copy else None}
    opt = getattr(ac, task.rule)(p, lr=LR, **{**task.options, **more})
    subject = Subject(lambda: opt.step(g), lambda: params, lambda: double(*grads))
    if len(params) > 1:
        return subject
    beside = ("step", "mu_product", "master")  # one number for an array, or no state of the rule
    state = tuple(opt.state[name] for name in opt.state if name not in beside and not name.endswith("_scale"))
    threads = task.threads or 0
    updated = (p, *state)
    subject.bytes = g.itemsize + 2 * sum(x.itemsize for x in updated)
    if task.elements >= 1 << 17:  # for fewer elements the call counts, and memory is not the limit
        subject.ceiling = lambda: core.ceiling((g,), updated, (), threads)
    if task.whole:
        kept = g.copy()
        subject.prepare = lambda: np.copyto(g, kept)
        subject.double = lambda: double(kept)
        # The average is read and written, the copy is written; g is read again for the norm, and zeroed.
        subject.bytes += 2 * opt.ema.itemsize + sum(x.itemsize for x in copy) + 2 * g.itemsize

        def ceiling() -> None:
            core.ceiling((g,), (), (), threads)
            core.ceiling((), (g, *updated, opt.ema), copy, threads)

        subject.ceiling = ceiling if subject.ceiling else None
    return subject


# --- torch and what is built on it -------------------------------------------------------------------------------

TORCH = "pip install torch --index-url https://download.pytorch.org/whl/cpu"


def _tensors(task: Task) -> tuple[Any, list[Any]]:
    """The module torch, and parameters whose gradients are set."""
    import torch

    if task.threads:
        torch.set_num_threads(task.threads)
    params, grads = ([torch.from_numpy(x) for x in part] for part in task.arrays())
    if task.dtype == "bfloat16":
        params, grads = ([x.view(torch.bfloat16) for x in part] for part in (params, grads))
    params = [torch.nn.Parameter(p) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return torch, params


def _subject(torch: Any, params: list[Any], step: Callable[[], Any], **more: Any) -> Subject:
    """A subject for an optimizer of torch's tensors."""

    def twice() -> None:
        for p in params:
            p.grad.mul_(2)

    def as_arrays() -> list[Array]:
        views = (p.detach() for p in params)
        return [(p.view(torch.uint16) if p.dtype is torch.bfloat16 else p).numpy() for p in views]

    return Subject(step, as_arrays, **{"double": twice, **more})


def _torch(name: str, dtype: str | None = None, **kind: bool) -> None:
    """Enter one of the implementations that PyTorch has of its optimizers."""

    @contender(name, TORCH, dtype=dtype)
    def build(task: Task) -> Subject:
        torch, params = _tensors(task)
        return _subject(torch, params, getattr(torch.optim, task.rule)(params, lr=LR, **task.options, **kind).step)


_torch("torch fused", fused=True)
_torch("torch fused float32", "float32", fused=True)
_torch("torch foreach", foreach=True)
_torch("torch for-loop", foreach=False)


@contender("torch, call by call", TORCH)
def torch_whole_step(task: Task) -> Subject:
    """The whole step as PyTorch's users write it."""
    torch, (p,) = _tensors(task)
    g, optimizer = p.grad, torch.optim.AdamW([p], lr=LR, fused=True)
    average, kept = p.detach().clone(), p.grad.clone()
    copy = torch.empty(p.shape if task.copy else 0, dtype=torch.bfloat16)

    def step() -> None:
        with torch.no_grad():
            g.mul_(1 / 1024)
            torch.nn.utils.clip_grad_norm_([p], 1.0)
            optimizer.step()
            average.lerp_(p, 1e-3)
            if task.copy:
                copy.copy_(p)
            g.zero_()

    return _subject(torch, [p], step, prepare=lambda: g.copy_(kept), double=lambda: kept.mul_(2))


@contender("adaptive_c.torch", TORCH)
def drop_in(task: Task) -> Subject:
    """The class for tensors.  In the whole step it is told of the scale as by a GradScaler; it has no copy."""
    torch, params = _tensors(task)
    import adaptive_c.torch as ours

    optimizer = getattr(ours, task.rule)(params, lr=LR, n_threads=task.threads, **task.options,
                                         **(WHOLE if task.whole else {}))  # fmt: skip
    if not task.whole:
        return _subject(torch, params, optimizer.step)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(0.0)
    kept = [p.grad.clone() for p in params]

    def prepare() -> None:
        for p, g in zip(params, kept, strict=True):
            p.grad.copy_(g)

    return _subject(torch, params, optimizer.step, prepare=prepare, double=lambda: [g.mul_(2) for g in kept])


@contender("DeepSpeed CPUAdam", f"{TORCH}; pip install deepspeed (builds its kernel at first use: g++, ninja)")
def deepspeed(task: Task) -> Subject:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    torch, params = _tensors(task)
    return _subject(torch, params, DeepSpeedCPUAdam(params, lr=LR, weight_decay=DECAY).step)


@contender("bitsandbytes AdamW8bit", f"{TORCH}; pip install bitsandbytes", bits=8)
def bitsandbytes(task: Task) -> Subject:
    from bitsandbytes.optim import AdamW8bit

    torch, params = _tensors(task)
    return _subject(torch, params, AdamW8bit(params, lr=LR, weight_decay=DECAY).step)


@contender("torchao AdamW8bit", f"{TORCH}; pip install torchao (compiles at first use: g++)", bits=8)
def torchao(task: Task) -> Subject:
    from torchao.optim import AdamW8bit

    torch, params = _tensors(task)
    return _subject(torch, params, AdamW8bit(params, lr=LR, weight_decay=DECAY).step)


# --- written by hand ---------------------------------------------------------------------------------------------


@contender("NumPy naive")
def numpy_naive(task: Task) -> Subject:
    """AdamW as one would write it first, with a new array for each operation."""
    (p,), (g,) = task.arrays()
    m, v, t = np.zeros_like(p), np.zeros_like(p), 0

    def step() -> None:
        nonlocal m, v, t
        t += 1
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g**2
        m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
        p[...] = p - LR * (m_hat / (np.sqrt(v_hat) + 1e-8) + DECAY * p)

    return Subject(step, lambda: [p], lambda: double(g))


@contender("NumPy in place")
def numpy_in_place(task: Task) -> Subject:
    """AdamW in NumPy without new arrays."""
    (p,), (g,) = task.arrays()
    m, v, x, y = (np.zeros_like(p) for _ in range(4))
    t = 0

    def step() -> None:
        nonlocal t
        t += 1
        np.multiply(m, 0.9, out=m)
        np.multiply(g, 0.1, out=x)
        np.add(m, x, out=m)
        np.multiply(v, 0.999, out=v)
        np.multiply(g, g, out=x)
        np.multiply(x, 0.001, out=x)
        np.add(v, x, out=v)
        np.multiply(v, 1 / (1 - 0.999**t), out=x)
        np.sqrt(x, out=x)
        np.add(x, 1e-8, out=x)
        np.multiply(m, LR / (1 - 0.9**t), out=y)
        np.divide(y, x, out=x)
        np.multiply(p, 1 - LR * DECAY, out=p)
        np.subtract(p, x, out=p)

    return Subject(step, lambda: [p], lambda: double(g))


@contender("numba by hand", "pip install numba")
def numba(task: Task) -> Subject:
    """AdamW as one loop, compiled by numba."""
    if task.threads:
        os.environ["NUMBA_NUM_THREADS"] = str(task.threads)
    from numba import njit, prange

    @njit(parallel=True)  # type: ignore[untyped-decorator]
    def kernel(p: Any, g: Any, m: Any, v: Any, lr: Any, decay: Any, b1: Any, c1: Any, b2: Any, c2: Any, bc2: Any,
               eps: Any) -> None:  # fmt: skip
        for i in prange(p.size):
            m[i] = b1 * m[i] + c1 * g[i]
            v[i] = b2 * v[i] + c2 * g[i] * g[i]
            p[i] = p[i] * decay - lr * m[i] / (np.sqrt(v[i] * bc2) + eps)

    (p,), (g,) = task.arrays()
    m, v, t, f = np.zeros_like(p), np.zeros_like(p), 0, p.dtype.type

    def step() -> None:
        nonlocal t
        t += 1
        kernel(p, g, m, v, f(LR / (1 - 0.9**t)), f(1 - LR * DECAY), f(0.9), f(1 - 0.9), f(0.999), f(1 - 0.999),
               f(1 / (1 - 0.999**t)), f(1e-8))  # fmt: skip

    return Subject(step, lambda: [p], lambda: double(g))


# --- other libraries ---------------------------------------------------------------------------------------------


@contender("optax jitted", "pip install jax optax")
def optax_jitted(task: Task) -> Subject:
    """AdamW of optax, compiled as one function that may overwrite its arguments."""
    import jax
    import optax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_x64", task.dtype == "float64")
    (p0,), (g0,) = task.arrays()
    p, g = jax.numpy.array(p0), jax.numpy.array(g0)
    del p0, g0
    adamw = optax.adamw(LR, weight_decay=DECAY)
    state = jax.jit(adamw.init)(p)

    def update(p: Any, state: Any, g: Any) -> Any:
        change, state = adamw.update(g, state, p)
        return optax.apply_updates(p, change), state

    jitted = jax.jit(update, donate_argnums=(0, 1))

    def step() -> None:
        nonlocal p, state
        p, state = jitted(p, state, g)
        p.block_until_ready()

    def twice() -> None:
        nonlocal g
        g = 2 * g

    return Subject(step, lambda: [np.asarray(p)], twice)


@contender("thinc Adam", "pip install thinc", rule="adam", options=ADAM_HAT)
def thinc(task: Task) -> Subject:
    from thinc.api import Optimizer

    (p,), (g,) = task.arrays()
    opt = Optimizer(LR, beta1=0.9, beta2=0.999, eps=1e-8, L2=0.0, grad_clip=0.0, use_averages=False)
    kept = g.copy()  # because thinc zeroes the gradient
    return Subject(lambda: opt("p", p, g), lambda: [p], lambda: double(kept), prepare=lambda: np.copyto(g, kept))


@contender("scikit-learn Adam", "pip install scikit-learn", rule="adam", options=ADAM_HAT)
def scikit_learn(task: Task) -> Subject:
    from sklearn.neural_network._stochastic_optimizers import AdamOptimizer

    params, grads = task.arrays()
    opt = AdamOptimizer(params, LR, 0.9, 0.999, 1e-8)
    return Subject(lambda: opt.update_params(params, grads), lambda: params, lambda: double(*grads))

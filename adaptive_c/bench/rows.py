"""Gradients of a few rows of a table: the tasks, the contenders, and what they are checked against.

A step has k indices and a gradient for each.  Steps take many sets of indices in turn, so that the rows which they
touch are in no cache, as in any table that is larger than the caches.  The gradients are the same in each step, but
written again before it, as a backward pass would just have written them.
"""

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from .. import reference
from .._native import get_num_threads
from .contenders import ADAM_HAT, DECAY, LR, TORCH, Array, Contender, Subject, Task, contender, double

COLUMNS = 64
EXPONENT = 1.05  # of the Zipf distribution
WARM = 3  # the mean gap of a row times this is how many steps it takes until gaps are as they will be
IN_CACHE = 1 << 13  # elements
CHECKED = 3  # steps that the worker compares with the reference
SIZES = tuple(10**i for i in range(7))  # rows of a step


def plan(large: int) -> Iterator[tuple[str, Task, list[str]]]:
    """Label, task and contenders of each row of the table."""
    n = min(2_000_000, large // 32)
    k = min(8192, n // 4)
    task = Task((n * COLUMNS,), rows=k)
    peers = {
        "AdamW": ["C loop over sorted rows", "torch SparseAdam"],
        "Adagrad": ["torch sparse", "FBGEMM"],
        "SGD": ["torch sparse", "FBGEMM"],
    }
    for rule, names in peers.items():
        yield f"{rule}, {k:,} of {n:,} rows", replace(task, rule=rule), names
    by_row = replace(task, rule="Adagrad", options={"second_moment": "row"})
    yield f'Adagrad, second_moment="row", {k:,} rows', by_row, ["FBGEMM"]
    for spread, what in (("zipf", "Zipf-distributed"), ("half", "half of the indices are one row's")):
        names = ["as many unique rows", "torch SparseAdam"]
        yield f"AdamW, {k:,} indices, {what}", replace(task, spread=spread), names
    exact = replace(task, options={"rows": "exact", "flush_denormals": True})  # moments of rows that wait long vanish
    yield f'AdamW, rows="exact", {k:,} rows', exact, ["dense gradients"]
    for rows in SIZES:
        if rows <= n // 2:
            yield f"AdamW, {rows:,} rows", replace(task, rows=rows), ["torch SparseAdam"] if rows <= 8192 else []


def drawn(task: Task) -> list[Array]:
    """Sets of indices, the same in every process: "unique" random rows, "zipf", or "half" of them one row."""
    n, k, rng = task.elements // COLUMNS, task.rows, np.random.default_rng(1)
    sets = max(4, min(1 << 12, (1 << 20) // k))
    turn = rng.permutation(n)
    if task.spread == "zipf":
        shares = np.cumsum(np.arange(1, n + 1) ** -EXPONENT)
        return [turn[np.searchsorted(shares, rng.random(k) * shares[-1])] for _ in range(sets)]
    out = list(turn[: n // k * k].reshape(-1, k)[:sets])
    out += [rng.choice(n, k, replace=False) for _ in range(sets - len(out))]
    for indices in out if task.spread == "half" else ():
        indices[::2] = turn[-1]
    return out


def arrays(task: Task) -> tuple[Array, Array]:
    """A table with numbers in [0.25, 1), and the gradients of the task's rows in +-[0.25, 1)."""
    rng = np.random.default_rng(0)
    table, values = (rng.random((n, COLUMNS), "float32") for n in (task.elements // COLUMNS, task.rows))
    for x in (table, values):
        x *= 0.75
        x += 0.25
    values[:, ::2] *= -1
    return table, values


def expected(contender: Contender, task: Task) -> tuple[Array, Array, Array]:
    """The rows that the first steps touch, before them, and after them by the reference in float64."""
    table, values = arrays(task)
    sets = drawn(task)[:CHECKED]
    touched = np.unique(np.concatenate(sets))
    before = table[touched].astype("float64")
    own = bool(contender.options)  # whether the contender has a rule of its own
    rule = getattr(reference, contender.rule if own else task.rule.lower())
    exact = task.options.get("rows") == "exact"
    options = {**(contender.options if own else task.options), "lr": LR}
    options = {key: x for key, x in options.items() if key not in ("rows", "flush_denormals")}
    p, state = before.copy(), dict[str, Array]()
    for t, indices in enumerate(sets, 1):
        g = np.zeros_like(p)
        np.add.at(g, np.searchsorted(touched, indices), 2.0 ** (t - 1) * values)
        some = np.isin(touched, indices) | exact
        part: dict[str, Any] = {key: x[some] for key, x in state.items()}
        p[some] = rule(p[some], g[some], part, t, **options)
        for key, x in part.items():
            state.setdefault(key, np.zeros((len(p), *x.shape[1:])))[some] = x
    return touched, before, p


def write(values: Array) -> None:
    """Write the gradients again, which brings them into the cache."""
    np.multiply(values, 1, out=values)


# --- this library ------------------------------------------------------------------------------------------------


def ours(task: Task) -> Subject:
    """This library, with gradients of rows."""
    import adaptive_c as ac

    p, values = arrays(task)
    opt = getattr(ac, task.rule)(p, lr=LR, n_threads=task.threads, **task.options)
    sets = cycle(drawn(task))

    def step() -> None:
        opt.step(ac.Rows(next(sets), values))

    def params() -> list[Array]:
        opt.catch_up()
        return [p]

    subject = Subject(step, params, lambda: double(values), prepare=lambda: write(values))
    if task.options.get("rows") != "exact":
        return subject
    # Each row is stepped or replayed once in a step, on average: a thread's share of this arithmetic, in cache.
    dense = {key: x for key, x in task.options.items() if key != "rows"}
    g = np.ones(IN_CACHE, "float32")
    small = getattr(ac, task.rule)(np.ones_like(g), lr=LR, n_threads=1, **dense)

    def warm() -> None:
        while CHECKED <= opt.t < WARM * len(p) / task.rows:
            step()
        write(values)

    def arithmetic() -> None:
        for _ in range(max(1, p.size // (task.threads or get_num_threads()) // IN_CACHE)):
            small.step(g)

    return replace(subject, prepare=warm, ceiling=arithmetic)


contender("as many unique rows", rows=True, spread="unique")(ours)


@contender("dense gradients", rows=True)
def dense(task: Task) -> Subject:
    """What rows="exact" replaces: a dense step whose gradient is 0 in all other rows."""
    import adaptive_c as ac

    p, values = arrays(task)
    options = {key: x for key, x in task.options.items() if key != "rows"}
    opt = getattr(ac, task.rule)(p, lr=LR, n_threads=task.threads, **options)
    g, sets, last = np.zeros_like(p), cycle(drawn(task)), np.array([], int)

    def fill() -> None:
        nonlocal last
        g[last] = 0
        last = next(sets)
        g[last] = values

    return Subject(lambda: opt.step(g), lambda: [p], lambda: double(values), prepare=fill)


# --- peers -------------------------------------------------------------------------------------------------------


def _torch_sparse(task: Task, make: Callable[[Any, list[Any]], Any]) -> Subject:
    """A subject for an optimizer of torch that takes sparse gradients."""
    import torch

    if task.threads:
        torch.set_num_threads(task.threads)
    table, values = arrays(task)
    p, v = torch.nn.Parameter(torch.from_numpy(table)), torch.from_numpy(values)
    opt = make(torch, [p])
    sets = cycle([torch.from_numpy(indices)[None] for indices in drawn(task)])

    def backward() -> None:
        write(values)
        p.grad = torch.sparse_coo_tensor(next(sets), v, p.shape)

    return Subject(opt.step, lambda: [table], lambda: double(values), prepare=backward)


@contender("torch SparseAdam", TORCH, rule="adam", options=ADAM_HAT, rows=True)
def sparse_adam(task: Task) -> Subject:
    return _torch_sparse(task, lambda torch, params: torch.optim.SparseAdam(params, lr=LR))


@contender("torch sparse", TORCH, rows=True)
def torch_sparse(task: Task) -> Subject:
    return _torch_sparse(task, lambda torch, params: getattr(torch.optim, task.rule)(params, lr=LR, **task.options))


@contender("FBGEMM", f"{TORCH}; pip install --no-deps fbgemm-gpu-cpu (1.8.0 goes with torch 2.13)", rows=True)
def fbgemm(task: Task) -> Subject:
    """The backward pass, which updates the table; its gradients are those of bags of one row."""
    import torch
    from fbgemm_gpu.split_embedding_configs import EmbOptimType
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    if task.threads:
        torch.set_num_threads(task.threads)
    table, values = arrays(task)
    by_row = "ROWWISE_" if task.options.get("second_moment") == "row" else ""
    module = SplitTableBatchedEmbeddingBagsCodegen(
        [(*table.shape, EmbeddingLocation.HOST, ComputeDevice.CPU)], learning_rate=LR, eps=1e-10,
        optimizer=getattr(EmbOptimType, f"EXACT_{by_row}{task.rule.upper()}"),
    )  # fmt: skip
    (weights,) = module.split_embedding_weights()
    weights.copy_(torch.from_numpy(table))
    p = weights.numpy()
    del table
    sets = cycle([torch.from_numpy(indices) for indices in drawn(task)])
    offsets, g = torch.arange(task.rows + 1), torch.from_numpy(values)
    out = None

    def forward() -> None:
        nonlocal out
        write(values)
        out = module(next(sets), offsets)

    def backward() -> None:
        assert out is not None
        out.backward(g)

    return Subject(backward, lambda: [p], lambda: double(values), prepare=forward)


C = """
#include <math.h>
void adamw(long k, long columns, const long long* restrict rows, const float* restrict g, float* restrict p,
           float* restrict m, float* restrict v, double t, int threads)
{
    const float step = LR / (1 - pow(0.9, t)), keep = 1 - LR * DECAY, c = 1 / (1 - pow(0.999, t));
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (long i = 0; i < k; i++) {
        const long at = rows[i] * columns, far = rows[i + 4 < k ? i + 4 : i] * columns;
        for (long j = 0; j < columns; j += 16) {
            __builtin_prefetch(p + far + j);
            __builtin_prefetch(m + far + j);
            __builtin_prefetch(v + far + j);
        }
        #pragma omp simd
        for (long j = 0; j < columns; j++) {
            const float x = g[i * columns + j];
            const float a = 0.9f * m[at + j] + 0.1f * x, b = 0.999f * v[at + j] + 0.001f * x * x;
            m[at + j] = a;
            v[at + j] = b;
            p[at + j] = p[at + j] * keep - step * a / (sqrtf(b * c) + 1e-8f);
        }
    }
}
"""


@contender("C loop over sorted rows", "install gcc or clang, or set CC", rows=True)
def c_loop(task: Task) -> Subject:
    """AdamW by hand, where the work that our step begins with has been done: each row comes once, and in order."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise ImportError("no C compiler here")
    with tempfile.TemporaryDirectory() as folder:
        source, built = Path(folder, "rows.c"), Path(folder, "rows.so")
        source.write_text(C)
        flags = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-shared", "-fPIC",
                 f"-DLR={LR!r}", f"-DDECAY={DECAY!r}"]  # fmt: skip
        subprocess.run([*compiler.split(), *flags, source, "-o", built, "-lm"], check=True)
        adamw = ctypes.CDLL(str(built)).adamw
    adamw.argtypes = [ctypes.c_long] * 2 + [ctypes.c_void_p] * 5 + [ctypes.c_double, ctypes.c_int]
    p, values = arrays(task)
    m, v, g = np.zeros_like(p), np.zeros_like(p), values.copy()
    turns = []
    for indices in drawn(task):
        order = np.argsort(indices, kind="stable")
        turns.append((indices[order], order))
    sets, t, threads = cycle(turns), 0, task.threads or get_num_threads()
    rows = turns[0][0]

    def sort() -> None:
        nonlocal rows
        rows, order = next(sets)
        np.take(values, order, 0, out=g)

    def step() -> None:
        nonlocal t
        t += 1
        adamw(len(rows), COLUMNS, rows.ctypes.data, g.ctypes.data, p.ctypes.data, m.ctypes.data, v.ctypes.data,
              float(t), threads)  # fmt: skip

    return Subject(step, lambda: [p], lambda: double(values), prepare=sort)

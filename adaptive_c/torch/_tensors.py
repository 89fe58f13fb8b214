"""Tensors as the arrays that a run steps: the same memory, or a clear error with the remedy."""

from typing import Any

import numpy as np
import torch

from .._native import Rows, core

Array = np.ndarray[Any, Any]
Tensor = Any  # torch.Tensor
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def check(p: Tensor, name: str, by_row: bool) -> None:
    """Refuse a parameter that can't be stepped in place.  by_row: its rows have second moments."""
    if isinstance(p, torch.nn.parameter.UninitializedTensorMixin):
        return  # of a lazy module: looked at again when it is stepped
    inner = p.detach()
    kind = type(inner)
    if kind.__name__ == "DTensor":
        raise TypeError(f"{name} is a DTensor, which other processes have parts of; step this process's part: "
                        "torch.nn.Parameter(p.to_local())")  # fmt: skip
    if kind is not torch.Tensor:
        raise TypeError(f"{name} is {core.an(kind.__name__)}; parameters are plain tensors: "
                        "torch.nn.Parameter(torch.Tensor(p))")  # fmt: skip
    if p.is_inference():
        raise TypeError(f"{name} was made under torch.inference_mode(), and can't be trained; copy it outside of the "
                        "mode: torch.nn.Parameter(p.clone())")  # fmt: skip
    if inner.layout is not torch.strided:
        raise TypeError(f"{name} has the layout {inner.layout}; parameters are dense: p.to_dense()")
    if inner.device.type != "cpu":
        raise TypeError(f"{name} is on {inner.device}, and this optimizer works on the CPU: move the model there "
                        "before (model.cpu()), or use torch.optim for it")  # fmt: skip
    if inner.is_complex():
        raise TypeError(f"{name} is complex; step its real view: torch.nn.Parameter(torch.view_as_real(p.detach())), "
                        "and torch.view_as_complex of it in the model")  # fmt: skip
    if inner.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {inner.dtype}; parameters are float32, float64, float16 or bfloat16")
    if by_row and not inner.is_contiguous():
        raise ValueError(f"{name} is not contiguous, and second_moment='row' needs its rows in memory: p.data = "
                         "p.data.contiguous()")  # fmt: skip
    if not dense(inner):
        raise ValueError(f"{name} has strides {inner.stride()} with gaps or overlaps for shape {tuple(inner.shape)}; "
                         "make it dense: p.data = p.data.contiguous()")  # fmt: skip


def dense(t: Tensor) -> bool:
    """Whether the elements fill one piece of memory, in whatever order."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def array(t: Tensor, like: Tensor) -> Array:
    """A tensor's memory as an array, which is flat if `like`, dense and of the same strides, is not contiguous."""
    t = t.detach()
    if not like.is_contiguous():
        t = t.as_strided((t.numel(),), (1,))
    found: Array = (t.view(torch.uint16) if t.dtype is torch.bfloat16 else t).numpy()
    return found


def laid_out(t: Tensor, like: Tensor) -> Tensor:
    """The tensor itself if its elements lie in memory as those of `like` do, otherwise a copy in that order."""
    t = t.detach()
    if t.stride() == like.stride() or (t.is_contiguous() and like.is_contiguous()):
        return t
    return torch.empty_strided(like.shape, like.stride(), dtype=t.dtype, device="cpu").copy_(t)


def gradient(p: Tensor, name: str) -> Tensor:
    """The gradient of a parameter, laid out as the parameter is, or its rows; None if there is none."""
    g = p.grad
    if g is None:
        return None
    if g.layout is not torch.strided:
        return _rows(g, p, name)
    if type(g.detach()) is not torch.Tensor or g.device.type != "cpu":
        kind = core.an(type(g).__name__)
        raise TypeError(f"the gradient of {name} is {kind} on {g.device}; it must be a plain CPU tensor")
    if g.shape != p.shape:
        raise ValueError(f"the gradient of {name} has shape {tuple(g.shape)}, the parameter {tuple(p.shape)}")
    return laid_out(g.resolve_neg(), p)


def _rows(g: Tensor, p: Tensor, name: str) -> Rows:
    """A sparse gradient, as those of torch.nn.Embedding(sparse=True), in its own memory; it need not be coalesced."""
    if g.layout is not torch.sparse_coo or g.sparse_dim() != 1 or not p.is_contiguous():
        raise TypeError(f"the gradient of {name} is sparse ({g.layout}, {g.sparse_dim()} sparse dimensions), and can't "
                        "be stepped; sparse gradients are sparse_coo tensors of rows, of contiguous parameters: p.grad "
                        "= p.grad.to_dense() before the step")  # fmt: skip
    if g.shape != p.shape:
        raise ValueError(f"the gradient of {name} has shape {tuple(g.shape)}, the parameter {tuple(p.shape)}")
    values = g._values().contiguous()
    return Rows(g._indices()[0].contiguous().numpy(), array(values, values))


def view(flat: Array, p: Tensor) -> Tensor:
    """A part of a flat array as a tensor with a parameter's shape and strides."""
    t = torch.from_numpy(flat)
    t = t.view(torch.bfloat16) if flat.dtype == np.uint16 else t
    return t.view(p.shape) if p.is_contiguous() else t.as_strided(p.shape, p.stride())

"""The types of what optimizers for tensors are given, for type checkers: `__init__.pyi` has the signatures."""

from collections.abc import Iterable
from typing import Any, TypeAlias, TypedDict

import torch

from ..typing import Master, NormOver, OnNonfinite, Real, Rounding, RowsMode, StateDtype

Params: TypeAlias = (
    Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]
)  # as in torch
Number: TypeAlias = Real | torch.Tensor
Pair: TypeAlias = tuple[Number, Number]


class Shared(TypedDict, total=False):
    """The options that every optimizer for tensors has in addition to torch's."""

    ema_decay: Real | None
    bounds: tuple[Real | None, Real | None] | None
    rows: RowsMode
    state_dtype: StateDtype | torch.dtype | None
    master: Master | torch.dtype | None
    rounding: Rounding | None
    max_grad_norm: Real | None
    norm_over: NormOver
    max_grad_value: Real | None
    on_nonfinite: OnNonfinite | None
    zero_grad: bool
    flush_denormals: bool
    seed: int
    n_threads: int | None

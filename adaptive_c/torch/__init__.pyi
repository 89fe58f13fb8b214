"""The classes with their constructors as type checkers see them; at run time `_signature` makes these."""

from typing import Unpack

import torch

from ..typing import EpsMode, Real, SecondMoment, Variant
from ._in_backward import in_backward as in_backward
from ._optimizer import Optimizer as Optimizer
from ._types import Number, Pair, Params, Shared

__all__ = [
    "SGD",
    "AdaBelief",
    "Adadelta",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "Lion",
    "Momentum",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SuperSAB",
    "Yogi",
    "in_backward",
]

class SGD(Optimizer, torch.optim.SGD):
    def __init__(
        self,
        params: Params,
        lr: Number = 0.001,
        momentum: Number = 0,
        dampening: Number = 0,
        weight_decay: Number = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[Shared],
    ) -> None: ...

class Momentum(Optimizer):
    def __init__(
        self,
        params: Params,
        lr: Number = 0.001,
        momentum: Number = 0.9,
        nesterov: bool = False,
        weight_decay: Number = 0.0,
        maximize: bool = False,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Shared],
    ) -> None: ...

class Adagrad(Optimizer, torch.optim.Adagrad):
    def __init__(
        self,
        params: Params,
        lr: Number = 0.01,
        lr_decay: Number = 0,
        weight_decay: Number = 0,
        initial_accumulator_value: Real = 0,
        eps: Number = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        eps_mode: EpsMode = "outside",
        second_moment: SecondMoment = "element",
        **options: Unpack[Shared],
    ) -> None: ...

class RMSprop(Optimizer, torch.optim.RMSprop):
    def __init__(
        self,
        params: Params,
        lr: Number = 0.01,
        alpha: Number = 0.99,
        eps: Number = 1e-08,
        weight_decay: Number = 0,
        momentum: Number = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        *,
        eps_mode: EpsMode = "outside",
        second_moment: SecondMoment = "element",
        **options: Unpack[Shared],
    ) -> None: ...

class Adadelta(Optimizer, torch.optim.Adadelta):
    def __init__(
        self,
        params: Params,
        lr: Number = 1.0,
        rho: Number = 0.9,
        eps: Number = 1e-06,
        weight_decay: Number = 0,
        foreach: bool | None = None,
        *,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[Shared],
    ) -> None: ...

class Adam(Optimizer, torch.optim.Adam):
    def __init__(
        self,
        params: Params,
        lr: Number = 0.001,
        betas: Pair = (0.9, 0.999),
        eps: Number = 1e-08,
        weight_decay: Number = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        eps_mode: EpsMode = "outside",
        second_moment: SecondMoment = "element",
        **options: Unpack[Shared],
    ) -> None: ...

class AdamW(Optimizer, torch.optim.AdamW):
    def __init__(
        self,
        params: Params,
        lr: Number = 0.001,
        betas: Pair = (0.9, 0.999),
        eps: Number = 1e-08,
        weight_decay: Number = 0.01,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        eps_mode: EpsMode = "outside",
        second_moment: SecondMoment = "element",
        **options: Unpack[Shared],
    ) -> None: ...

class Adamax(Optimizer, torch.optim.Adamax):
    def __init__(
        self,
        params: Params,
        lr: Number = 0.002,
        betas: Pair = (0.9, 0.999),
        eps: Number = 1e-08,
        weight_decay: Number = 0,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        capturable: bool = False,
        **options: Unpack[Shared],
    ) -> None: ...

class NAdam(Optimizer, torch.optim.NAdam):
    def __init__(
        self,
        params: Params,
        lr: Number = 0.002,
        betas: Pair = (0.9, 0.999),
        eps: Number = 1e-08,
        weight_decay: Number = 0,
        momentum_decay: Number = 0.004,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        eps_mode: EpsMode = "outside",
        **options: Unpack[Shared],
    ) -> None: ...

class RAdam(Optimizer, torch.optim.RAdam):
    def __init__(
        self,
        params: Params,
        lr: Number = 0.001,
        betas: Pair = (0.9, 0.999),
        eps: Number = 1e-08,
        weight_decay: Number = 0,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        eps_mode: EpsMode = "hat",
        **options: Unpack[Shared],
    ) -> None: ...

class Yogi(Optimizer):
    def __init__(
        self,
        params: Params,
        lr: Number = 0.01,
        betas: Pair = (0.9, 0.999),
        eps: Number = 0.001,
        weight_decay: Number = 0.0,
        initial_accumulator_value: Real = 1e-06,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        eps_mode: EpsMode = "outside",
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Shared],
    ) -> None: ...

class AdaBelief(Optimizer):
    def __init__(
        self,
        params: Params,
        lr: Number = 0.001,
        betas: Pair = (0.9, 0.999),
        eps: Number = 1e-16,
        weight_decay: Number = 0.0,
        *,
        maximize: bool = False,
        decoupled_weight_decay: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Shared],
    ) -> None: ...

class Lion(Optimizer):
    def __init__(
        self,
        params: Params,
        lr: Number = 0.0001,
        betas: Pair = (0.9, 0.99),
        weight_decay: Number = 0.0,
        maximize: bool = False,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Shared],
    ) -> None: ...

class Rprop(Optimizer, torch.optim.Rprop):
    def __init__(
        self,
        params: Params,
        lr: Number = 0.01,
        etas: Pair = (0.5, 1.2),
        step_sizes: Pair = (1e-06, 50),
        *,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        variant: Variant = "irprop-",
        **options: Unpack[Shared],
    ) -> None: ...

class SuperSAB(Optimizer):
    def __init__(
        self,
        params: Params,
        lr: Number = 0.1,
        eta_plus: Number = 1.05,
        eta_minus: Number = 0.5,
        max_rate: Number = 30.0,
        momentum: Number = 0.9,
        maximize: bool = False,
        *,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        **options: Unpack[Shared],
    ) -> None: ...

"""The optimizers as drop-in replacements for those of torch.optim: one changed line of import.

>>> import torch
>>> from adaptive_c.torch import AdamW
>>> model = torch.nn.Linear(3, 2)
>>> opt = AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
>>> model(torch.ones(5, 3)).sum().backward()
>>> opt.step()
>>> opt.zero_grad()

Every class is a subclass of torch.optim.Optimizer and, where torch has the rule, of torch's class.  It has torch's
arguments in torch's order, and then ours.  Parameters must be on the CPU; they are stepped where they are.
"""

try:
    import torch
except ImportError as error:
    raise ImportError(
        f"adaptive_c.torch needs PyTorch ({error}): pip install 'adaptive_c[torch]'.  On Linux that is the CUDA "
        "build of several GB; the CPU build is enough: pip install torch --index-url https://download.pytorch.org/whl/cpu"
    ) from error

from .. import optimizers as rules
from ._in_backward import in_backward
from ._optimizer import Optimizer

__all__ = [  # noqa: RUF022  as in adaptive_c.optimizers
    "SGD", "Momentum", "Adagrad", "RMSprop", "Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Yogi",
    "AdaBelief", "Lion", "Rprop", "SuperSAB", "Optimizer", "in_backward",
]  # fmt: skip


class SGD(Optimizer, torch.optim.SGD, rule=rules.SGD): ...


class Momentum(Optimizer, rule=rules.Momentum): ...


class Adagrad(Optimizer, torch.optim.Adagrad, rule=rules.Adagrad): ...


class RMSprop(Optimizer, torch.optim.RMSprop, rule=rules.RMSprop): ...


class Adadelta(Optimizer, torch.optim.Adadelta, rule=rules.Adadelta): ...


class Adam(Optimizer, torch.optim.Adam, rule=rules.Adam): ...


class AdamW(Optimizer, torch.optim.AdamW, rule=rules.AdamW): ...


class Adamax(Optimizer, torch.optim.Adamax, rule=rules.Adamax): ...


class NAdam(Optimizer, torch.optim.NAdam, rule=rules.NAdam): ...


class RAdam(Optimizer, torch.optim.RAdam, rule=rules.RAdam): ...


class Yogi(Optimizer, rule=rules.Yogi): ...


class AdaBelief(Optimizer, rule=rules.AdaBelief): ...


class Lion(Optimizer, rule=rules.Lion): ...


class Rprop(Optimizer, torch.optim.Rprop, rule=rules.Rprop): ...


class SuperSAB(Optimizer, rule=rules.SuperSAB): ...

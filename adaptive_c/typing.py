"""The types of what optimizers are given, for annotations of your own and for type checkers.

======================  ===============================================================================================
Array                   a NumPy array
Arrays                  the arrays of one group: one array, a list or tuple of arrays, or a dict of arrays
Params                  the parameters of an optimizer: the arrays of one group, or a list of `Group`
Real                    a number of Python's or NumPy's
Schedulable             a number, an object of `adaptive_c.schedules`, or another function of the step
Pair                    two of these
Bounds                  (lo, hi), each of them a number, None, or arrays in the structure of the parameters
Group, Shared           typed dictionaries of options, for ``list[Group]`` and ``**options: Unpack[Shared]``
======================  ===============================================================================================

A group in a list that is written where it is used needs no annotation.  One that is stored in a variable before does:
``groups: list[Group] = [...]``.  Nothing here is used at run time: the table of options says what an option may be.
"""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, Literal, Required, TypedDict

import numpy as np

__all__ = ["Array", "Arrays", "Bounds", "Group", "Pair", "Params", "Real", "Schedulable", "Shared"]

Array = np.ndarray[Any, Any]
Arrays = Array | Sequence[Array] | Mapping[Any, Array]  # of one group: one array, a list or tuple, or a dict
Real = float | np.floating[Any] | np.integer[Any]
Schedulable = Real | Callable[[int], Real]  # a number, or one of adaptive_c.schedules, or any function of the step
Pair = tuple[Schedulable, Schedulable] | list[float] | list[Schedulable] | Array
Bounds = Sequence[Real | Arrays | None]  # (lo, hi), each a number, None, or arrays in the structure of the parameters

EpsMode = Literal["outside", "inside", "hat"]
SecondMoment = Literal["element", "row"]
Variant = Literal["irprop-", "rprop+", "rprop-"]
NormOver = Literal["all", "group", "array"]
OnNonfinite = Literal["ignore", "skip", "raise"]
LossScale = Real | Literal["dynamic"]
SumToOne = bool | Literal["divide", "project"]
RowsMode = Literal["lazy", "exact"]
Format = np.dtype[Any] | type[Any]  # what NumPy accepts as a dtype; a name is one of those that stand beside it
StateDtype = Literal["float32", "bfloat16", "uint8"] | Format
Master = Literal["float32"] | Format
Rounding = Literal["stochastic"]
Uint16As = Literal["bfloat16"]
Path = str | PathLike[str]


class OfGroups(TypedDict, total=False):
    """The options that every rule has, and that may differ from group to group."""

    ema_decay: Schedulable | None
    bounds: Bounds | None
    sum_to_one: SumToOne
    rows: RowsMode
    copy_to: Arrays | None
    state_dtype: StateDtype | None
    master: Master | None
    rounding: Rounding | None


class Shared(OfGroups, total=False):
    """The options that every optimizer has, for ``**options: Unpack[Shared]``.

    Examples
    --------
    >>> import numpy as np
    >>> from typing import Unpack
    >>> from adaptive_c import AdamW
    >>> from adaptive_c.typing import Params, Shared
    >>> def fast(params: Params, **options: Unpack[Shared]) -> AdamW:
    ...     return AdamW(params, lr=0.1, **options)
    >>> fast(np.ones(3), max_grad_norm=1.0).max_grad_norm
    1.0
    """

    n_threads: int | None
    max_grad_norm: Schedulable | None
    norm_over: NormOver
    max_grad_value: Real | None
    on_nonfinite: OnNonfinite | None
    loss_scale: LossScale
    zero_grad: bool
    cast: bool
    keep_undo: bool
    flush_denormals: bool
    uint16_as: Uint16As | None
    seed: int
    state_path: Path | None
    state_memory: int | None
    state_parameters: bool


class Group(OfGroups, total=False):
    """One group of parameters: ``params``, and the options in which it differs from the optimizer's.

    It has the options of every rule; a rule refuses those that it does not have.

    Examples
    --------
    >>> import numpy as np
    >>> from adaptive_c import AdamW
    >>> from adaptive_c.typing import Group
    >>> groups: list[Group] = [{"params": np.ones(3)}, {"params": np.zeros(3), "weight_decay": 0.0}]
    >>> [group["weight_decay"] for group in AdamW(groups).param_groups]
    [0.01, 0.0]
    """

    params: Required[Arrays]
    lr: Schedulable
    weight_decay: Schedulable
    eps: Schedulable
    eps_mode: EpsMode
    betas: Pair
    alpha: Schedulable
    rho: Schedulable
    momentum: Schedulable
    dampening: Schedulable
    nesterov: bool
    maximize: bool
    amsgrad: bool
    centered: bool
    decoupled_weight_decay: bool
    lr_decay: Schedulable
    initial_accumulator_value: Real
    momentum_decay: Schedulable
    second_moment: SecondMoment
    etas: Pair
    step_sizes: Pair
    eta_plus: Schedulable
    eta_minus: Schedulable
    max_rate: Schedulable
    variant: Variant


Params = Array | Sequence[Array | Group] | Mapping[Any, Array]  # in one sequence: mypy finds the groups then

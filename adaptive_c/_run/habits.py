"""What other libraries call things: hints for messages.  None of these names is accepted."""

from collections.abc import Container, Iterable
from typing import Any, Never

from .options import OPTIONS, SETTINGS


def _table(text: str) -> dict[str, list[str]]:
    """Lines of "theirs theirs: ours ours" as a dict with an entry for each of theirs."""
    rows = [line.split(":") for line in text.split("\n") if line.strip()]
    return {name: ours.split() for theirs, ours in rows for name in theirs.split()}


def _close(name: str, known: Iterable[str], cutoff: float) -> list[str]:
    """The known name that is spelt most like this one, if any is."""
    from difflib import get_close_matches  # here, because an import of adaptive_c is to load little

    return get_close_matches(name, known, 1, cutoff)


# Names of Keras, optax, thinc, scikit-learn, PennyLane and Lightning, and what they may mean, the likeliest first.
_OPTIONS = _table("""
    learning_rate learning_rate_init learn_rate step_size stepsize eta: lr
    beta_1 beta1 b1 beta: betas momentum
    beta_2 beta2 b2: betas alpha rho
    epsilon: eps
    eps_root: eps_mode
    rho: alpha
    alpha: rho lr
    gamma: alpha momentum lr
    decay decay_rate: alpha rho lr_decay lr
    wd l2 L2 weight_decay_rate: weight_decay
    mom mass: momentum
    initial_accumulator accumulator: initial_accumulator_value
    clipnorm grad_clip clip_norm global_clipnorm max_norm gradient_clip_val: max_grad_norm
    clipvalue clip_value gradient_clip_value: max_grad_value
    use_ema ema_momentum use_averages ema_rate: ema_decay
    mu_dtype accumulator_dtype optim_bits: state_dtype
    loss_scale_factor: loss_scale
    random_state rng: seed
    num_threads n_jobs: n_threads
""")
_ARGUMENTS = _table("""
    T_max T_0 total_steps total_iters decay_steps transition_steps first_decay_steps max_iters: steps step_size
    num_training_steps num_warmup_steps warmup_steps: steps warmup_steps
    eta_min end_value lr_min min_value end_learning_rate alpha end_factor: end min
    min_lr: min end
    lr learning_rate initial_learning_rate max_lr base_lr lr_max eta_max peak_value init_value value: base of
    T_mult t_mul: mult
    decay_rate drop: gamma factor
    boundaries lr_steps: milestones
    init_lr warmup_start_lr start_value start_factor: start
    schedulers: schedules
""")
_NOTES = {  # what is said of it beside the name
    **dict.fromkeys(("beta_1 betas", "beta1 betas", "b1 betas"), ", the first of the two, as in betas=(0.9, 0.999)"),
    **dict.fromkeys(("beta_2 betas", "beta2 betas", "b2 betas"), ", the second of the two, as in betas=(0.9, 0.999)"),
    "eps_root eps_mode": "='inside'",
    "clipnorm max_grad_norm": ", with norm_over='array' to clip each array by itself",
    "grad_clip max_grad_norm": ", with norm_over='array' to clip each array by itself",
    "optim_bits state_dtype": "='uint8'",
    **dict.fromkeys(("alpha end", "end_factor end", "start_factor start"), ", which is a rate and no factor"),
    **dict.fromkeys(("decay lr", "decay_rate lr"), ", with a schedule such as lr=lambda t: 1e-3 / (1 + 0.01 * t)"),
}
_STATELESS = "drop it: a schedule is a function of opt.t, and holds no count and no optimizer"
_NO_OPTION = {
    **dict.fromkeys(("last_epoch", "optimizer", "verbose"), _STATELESS),
    "gradient_accumulation_steps": "accumulate(grads) sums gradients, and step() takes their mean",
    **dict.fromkeys(("lr_schedule", "lr_scheduler", "schedule"), "lr takes a schedule"),
}


def meant(name: Any, known: Iterable[str]) -> str:
    """A hint in brackets about an unknown name; nothing if it resembles none of those that are known."""
    known = tuple(known)
    for table in (_OPTIONS, _ARGUMENTS):
        for option in table.get(name, ()) if isinstance(name, str) else ():
            if option in known:
                return f" (did you mean {option}{_NOTES.get(f'{name} {option}', '')}?)"
    if name in _NO_OPTION:
        return f" ({_NO_OPTION[name]})"
    close = _close(str(name), known, 0.75)
    return f" (did you mean {close[0]}?)" if close else ""


# --- names of modules -------------------------------------------------------------------------------------------------

_SCHEDULES = _table("""
    ConstantLR constant_schedule: constant
    StepLR StepDecay: step
    MultiStepLR piecewise_constant_schedule PiecewiseConstantDecay: multistep
    ExponentialLR exponential_decay ExponentialDecay: exponential
    LinearLR linear_schedule: linear
    PolynomialLR polynomial_schedule PolynomialDecay: polynomial
    CosineAnnealingLR cosine_decay_schedule CosineDecay cosine_annealing: cosine
    CosineAnnealingWarmRestarts sgdr_schedule CosineDecayRestarts: cosine_restarts
    get_inverse_sqrt_schedule NoamLR noam: inverse_sqrt
    OneCycleLR cosine_onecycle_schedule: one_cycle
    ReduceLROnPlateau reduce_on_plateau: plateau
    warmup_cosine_decay_schedule get_cosine_schedule_with_warmup get_linear_schedule_with_warmup LinearWarmup: warmup
    SequentialLR join_schedules ChainedScheduler: chain
""")
_FUNCTION = "any function of the step, such as lr=lambda t: 1e-3 / (1 + t)"
_ELSEWHERE = {
    **dict.fromkeys(("LambdaLR", "MultiplicativeLR", "InverseTimeDecay", "CyclicLR"), _FUNCTION),
    **dict.fromkeys(("lr_scheduler", "LRScheduler", "LearningRateScheduler"), "adaptive_c.schedules"),
    "optim": "adaptive_c itself, or adaptive_c.torch for tensors",
    **{name: f"import adaptive_c.{name}, which needs the extra {name!r}" for name in ("torch", "mpi", "figures")},
    **dict.fromkeys(("clip_grad_norm_", "clip_grad_norm", "clip_by_global_norm"), "the option max_grad_norm"),
    **dict.fromkeys(("clip_grad_value_", "clip_grad_value", "clip"), "the option max_grad_value"),
    "GradScaler": "the option loss_scale='dynamic'",
    **dict.fromkeys(("AveragedModel", "ema", "swa_utils"), "the option ema_decay"),
    "MultiSteps": "accumulate(grads), and step() without gradients",
    "SparseAdam": "Adam, with gradients of Rows",
    **dict.fromkeys(("AdaMax", "adamax"), "Adamax"),
    "ASGD": "SGD, with the option ema_decay",
    "apply_updates": "opt.step(grads), which updates the parameters in place",
    "load": "opt.load(path)",
    "save": "opt.save(path)",
}


def absent(module: str, name: str, there: Iterable[str]) -> str:
    """The message of a module that has no such attribute."""
    hint = _ELSEWHERE.get(name)
    if name in _SCHEDULES:
        hint = ("" if module.endswith("schedules") else "schedules.") + _SCHEDULES[name][0]
    if hint is None:
        lower = {known.lower(): known for known in there}
        close = _close(name.lower(), lower, 0.6)
        hint = lower[close[0]] if close else None
    return f"module {module!r} has no attribute {name!r}" + (f" (did you mean {hint}?)" if hint else "")


# --- attributes of optimizers -----------------------------------------------------------------------------------------

_IN_PLACE = "opt.step(grads), which updates the parameters in place"
_ATTRIBUTES = {
    "params": "opt.param_groups[0]['params']",
    "parameters": "opt.param_groups[0]['params']",
    "minimize": "adaptive_c.minimize(fun, x0, jac=True), or opt.step(grads) in a loop of your own",
    "update": _IN_PLACE,
    "apply_gradients": _IN_PLACE,
    "init": "opt.state, which the constructor has made",
    "iterations": "opt.t",
}


def place_of(name: str, options: Container[str], settings: Container[str], group: int = 0) -> str:
    """Where an optimizer has the option of this name, here or in another library; nothing if there is none."""
    for option in (name, *_OPTIONS.get(name, ())):
        if option in options:
            return f"opt.param_groups[{group}][{option!r}]"
        if option in settings:
            return f"opt.{option}"
    return ""


class _Elsewhere:
    """An attribute that is not there: reading it raises an AttributeError that says where it is.

    A __getattr__ would do so for every name, and slow down each step.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, optimizer: Any, owner: type) -> Never:
        if optimizer is None:
            raise AttributeError(f"type object {owner.__name__!r} has no attribute {self._name!r}")
        run = vars(optimizer).get("_run")  # which an optimizer lacks that was unpickled and not used yet
        place = _ATTRIBUTES.get(self._name) or place_of(self._name, run.defaults if run else ("lr",), SETTINGS)
        hint = f" (did you mean {place}?)" if place else ""
        raise AttributeError(f"{owner.__name__!r} object has no attribute {self._name!r}{hint}")


class Habits:
    """Names of other libraries, as attributes that `hasattr` does not find and whose errors say what to use instead."""

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if not isinstance(vars(Habits).get(name), _Elsewhere)]


for _name in {**_ATTRIBUTES, **_OPTIONS, **OPTIONS}:
    setattr(Habits, _name, _Elsewhere(_name))

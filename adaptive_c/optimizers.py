"""The optimizers.  Each names its rule and state, and lists its options with PyTorch's names and defaults.

The formulas are in the symbols of reference.py, which is the specification: p parameter, g gradient, t step number.
A docstring here is what is particular to the rule; `_docstrings` adds every option, with its range and default, and all
that the optimizers have in common.
"""

from typing import Any, Unpack

from ._optimizer import Optimizer
from ._run.rule import Rule, Slot
from .typing import EpsMode, Pair, Params, Real, SecondMoment, Shared, Variant
from .typing import Schedulable as Number

__all__ = [  # noqa: RUF022  in order of increasing complexity, as everywhere
    "SGD", "Momentum", "Adagrad", "RMSprop", "Adadelta", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Yogi",
    "AdaBelief", "Lion", "Rprop", "SuperSAB",
]

_SIGNED, _UNSIGNED, _SIGN = Slot("signed"), Slot("unsigned"), Slot("sign")  # what most state arrays are
_MOMENT = Slot("unsigned", moment=True)
_RATES = "rounding noise would drown the small factors by which its rates change"


def _options(arguments: dict[str, Any]) -> dict[str, Any]:
    """A constructor's own arguments: its locals without the shared ones."""
    return {name: value for name, value in arguments.items() if name not in ("self", "params", "shared", "__class__")}


class SGD(Optimizer):
    """Gradient descent, with momentum as PyTorch has it.

    ::

        p <- p - lr g                                         without momentum
        b <- momentum b + (1 - dampening) g                   b <- g at an array's first step
        p <- p - lr b                                         nesterov: p <- p - lr (g + momentum b)

    State: momentum_buffer, if momentum > 0.

    >>> w = np.ones(3)
    >>> opt = SGD(w, lr=0.1, momentum=0.9)
    >>> opt.step(2 * w)
    >>> w
    array([0.8, 0.8, 0.8])

    Paper: Polyak 1964; Sutskever, Martens, Dahl & Hinton 2013.

    Other libraries: torch computes the same.  Keras has lr inside the velocity, as `Momentum` has here, and lr 0.01.
    optax.sgd has no dampening; its trace starts at 0, which gives the same.
    """

    rule = Rule("sgd", {"momentum_buffer": Slot("signed", when="momentum")})

    def __init__(self, params: Params, lr: Number = 1e-3, momentum: Number = 0.0, dampening: Number = 0.0,
                 weight_decay: Number = 0.0, nesterov: bool = False, *, maximize: bool = False,
                 **shared: Unpack[Shared]) -> None:
        super().__init__(params, _options(locals()), **shared)


class Momentum(Optimizer):
    """Heavy ball with the learning rate inside the velocity.

    ::

        v <- momentum v + lr g
        p <- p - v                                            nesterov: p <- p - (momentum v + lr g)

    State: momentum_buffer, the velocity v.

    >>> w = np.ones(3)
    >>> opt = Momentum(w, lr=0.1, nesterov=True)
    >>> opt.step(2 * w)
    >>> w
    array([0.62, 0.62, 0.62])

    Paper: Polyak 1964; Sutskever, Martens, Dahl & Hinton 2013.

    Other libraries: torch.optim.SGD has lr outside the buffer, which gives the same until lr changes.  Keras's SGD is
    this rule with lr 0.01 and momentum 0.  optax has no such rule.
    """

    rule = Rule("momentum", {"momentum_buffer": _SIGNED})

    def __init__(self, params: Params, lr: Number = 1e-3, momentum: Number = 0.9, nesterov: bool = False,
                 weight_decay: Number = 0.0, maximize: bool = False, **shared: Unpack[Shared]) -> None:
        super().__init__(params, _options(locals()), **shared)


class Adagrad(Optimizer):
    """Steps divided by the root of the sum of all squared gradients.

    ::

        v <- v + g^2                                          v starts at initial_accumulator_value
        p <- p - lr/(1 + (t - 1) lr_decay) g / (sqrt(v) + eps)

    State: sum (v).

    >>> w = np.ones(3)
    >>> opt = Adagrad(w, lr=0.1, eps_mode="inside")
    >>> opt.step(2 * w)
    >>> w
    array([0.9, 0.9, 0.9])

    Paper: Duchi, Hazan & Singer 2011 (eps outside).

    Other libraries: torch computes the same, but has no second_moment; FBGEMM has "row" as EXACT_ROWWISE_ADAGRAD.
    Keras and optax have eps 1e-7 inside the root and an accumulator that starts at 0.1; Keras has lr 1e-3.
    """

    rule = Rule("adagrad", {"sum": Slot("unsigned", start="initial_accumulator_value", moment=True)}, squares=True)

    def __init__(self, params: Params, lr: Number = 1e-2, lr_decay: Number = 0.0, weight_decay: Number = 0.0,
                 initial_accumulator_value: Real = 0.0, eps: Number = 1e-10, *, maximize: bool = False,
                 eps_mode: EpsMode = "outside", second_moment: SecondMoment = "element",
                 **shared: Unpack[Shared]) -> None:
        super().__init__(params, _options(locals()), **shared)


class RMSprop(Optimizer):
    """Steps divided by the root of a running mean of squared gradients.

    ::

        v <- alpha v + (1 - alpha) g^2
        a <- alpha a + (1 - alpha) g                          centered: max(v - a^2, 0) takes the place of v below
        p <- p - lr g / (sqrt(v) + eps)
        b <- momentum b + g / (sqrt(v) + eps),  p <- p - lr b                    with momentum

    State: square_avg (v), and momentum_buffer (b), grad_avg (a) where used.  centered excludes second_moment="row".

    >>> w = np.ones(3)
    >>> opt = RMSprop(w, lr=0.1, alpha=0.75)
    >>> opt.step(2 * w)
    >>> w.round(6)
    array([0.8, 0.8, 0.8])

    Paper: Tieleman & Hinton 2012, lecture 6.5; centered: Graves 2013, equations 38 to 45.

    Other libraries: torch may take the root of a negative v - a^2, which is never below 0 here; all else is the same.
    Keras has rho 0.9, eps 1e-7 inside, and lr 1e-3 inside the momentum.  optax has a decay of 0.9, and eps and lr
    inside.
    """

    rule = Rule("rmsprop", {"square_avg": _MOMENT, "momentum_buffer": Slot("signed", when="momentum"),
                       "grad_avg": Slot("signed", when="centered")}, squares=True)

    def __init__(self, params: Params, lr: Number = 1e-2, alpha: Number = 0.99, eps: Number = 1e-8,
                 weight_decay: Number = 0.0, momentum: Number = 0.0, centered: bool = False, *, maximize: bool = False,
                 eps_mode: EpsMode = "outside", second_moment: SecondMoment = "element",
                 **shared: Unpack[Shared]) -> None:
        super().__init__(params, _options(locals()), **shared)


class Adadelta(Optimizer):
    """Steps in the units of the parameters: the root of the mean squared step over that of the squared gradient.

    ::

        v <- rho v + (1 - rho) g^2
        d  = sqrt(u + eps) / sqrt(v + eps) g
        u <- rho u + (1 - rho) d^2
        p <- p - lr d

    State: square_avg (v), acc_delta (u).

    >>> w = np.ones(3)
    >>> opt = Adadelta(w, rho=0.75)
    >>> opt.step(2 * w)
    >>> w.round(6)
    array([0.998, 0.998, 0.998])

    Paper: Zeiler 2012, Algorithm 1 (rho 0.95, no lr).

    Other libraries: torch and optax compute the same.  Keras has lr 1e-3, rho 0.95 and eps 1e-7.
    """

    rule = Rule("adadelta", {"square_avg": _UNSIGNED, "acc_delta": _UNSIGNED}, squares=True)

    def __init__(self, params: Params, lr: Number = 1.0, rho: Number = 0.9, eps: Number = 1e-6,
                 weight_decay: Number = 0.0, *, maximize: bool = False, **shared: Unpack[Shared]) -> None:
        super().__init__(params, _options(locals()), **shared)


class Adam(Optimizer):
    """Bias-corrected running means of the gradient and of its square.

    ::

        m <- beta1 m + (1 - beta1) g                          v <- beta2 v + (1 - beta2) g^2
        p <- p - lr/(1 - beta1^t) m / (sqrt(v/(1 - beta2^t)) + eps)
        amsgrad: v^ <- max(v^, v) takes the place of v in the last line

    State: exp_avg (m), exp_avg_sq (v), max_exp_avg_sq (v^) with amsgrad.

    >>> w, b = np.ones((2, 3)), np.zeros(3)
    >>> opt = Adam([w, b], lr=0.1)
    >>> opt.step([2 * w, None])
    >>> w[0].round(6), b
    (array([0.9, 0.9, 0.9]), array([0., 0., 0.]))

    Paper: Kingma & Ba 2015, Algorithm 1; Reddi, Kale & Kumar 2018 (whose AMSGrad has no bias correction).

    Other libraries: torch computes the same.  Keras has eps_mode "hat", eps 1e-7 and decoupled weight decay.  optax has
    a second eps_root inside the root; its amsgrad takes the maximum of the corrected v.
    """

    rule = Rule("adam", {"exp_avg": _SIGNED, "exp_avg_sq": _MOMENT,
                       "max_exp_avg_sq": Slot("maximum", when="amsgrad", moment=True)}, squares=True)

    def __init__(self, params: Params, lr: Number = 1e-3, betas: Pair = (0.9, 0.999), eps: Number = 1e-8,
                 weight_decay: Number = 0.0, amsgrad: bool = False, *, maximize: bool = False,
                 decoupled_weight_decay: bool = False, eps_mode: EpsMode = "outside",
                 second_moment: SecondMoment = "element", **shared: Unpack[Shared]) -> None:
        super().__init__(params, _options(locals()), **shared)


class AdamW(Adam):
    """Adam with decoupled weight decay.

    ::

        p <- p (1 - lr weight_decay)
        m <- beta1 m + (1 - beta1) g                          v <- beta2 v + (1 - beta2) g^2
        p <- p - lr/(1 - beta1^t) m / (sqrt(v/(1 - beta2^t)) + eps)
        amsgrad: v^ <- max(v^, v) takes the place of v in the last line

    State: exp_avg (m), exp_avg_sq (v), max_exp_avg_sq (v^) with amsgrad.

    >>> p = {"w": np.ones(3), "b": np.zeros(2)}
    >>> opt = AdamW(p, lr=0.1)
    >>> opt.step({"w": 2 * p["w"], "b": np.ones(2)})
    >>> p["w"].round(6)
    array([0.899, 0.899, 0.899])

    Paper: Loshchilov & Hutter 2019, Algorithm 2, which multiplies the decay by the schedule alone, not by lr.

    Other libraries: torch computes the same.  Keras has weight_decay 4e-3, eps 1e-7 and "hat".  optax has weight_decay
    1e-4.
    """

    rule = Adam.rule._replace(fixed={"decoupled_weight_decay": True})

    def __init__(self, params: Params, lr: Number = 1e-3, betas: Pair = (0.9, 0.999), eps: Number = 1e-8,
                 weight_decay: Number = 1e-2, amsgrad: bool = False, *, maximize: bool = False,
                 eps_mode: EpsMode = "outside", second_moment: SecondMoment = "element",
                 **shared: Unpack[Shared]) -> None:
        Optimizer.__init__(self, params, _options(locals()), **shared)


class Adamax(Optimizer):
    """Adam with the running maximum of the gradient instead of its second moment.

    ::

        m <- beta1 m + (1 - beta1) g                          u <- max(beta2 u, |g| + eps)
        p <- p - lr/(1 - beta1^t) m / u

    State: exp_avg (m), exp_inf (u).  With eps=0, an element whose gradients were all 0 becomes NaN (0/0).

    >>> w = np.ones(3)
    >>> opt = Adamax(w, lr=0.1)
    >>> opt.step(2 * w)
    >>> w.round(6)
    array([0.9, 0.9, 0.9])

    Paper: Kingma & Ba 2015, Algorithm 2 (no eps).

    Other libraries: torch and optax compute the same.  Keras has eps 1e-7, which it adds to u, and lr 1e-3.
    """

    rule = Rule("adamax", {"exp_avg": _SIGNED, "exp_inf": _UNSIGNED})

    def __init__(self, params: Params, lr: Number = 2e-3, betas: Pair = (0.9, 0.999), eps: Number = 1e-8,
                 weight_decay: Number = 0.0, *, maximize: bool = False, **shared: Unpack[Shared]) -> None:
        super().__init__(params, _options(locals()), **shared)


class NAdam(Optimizer):
    """Adam with Nesterov momentum and a schedule of the momentum.

    ::

        m <- beta1 m + (1 - beta1) g                          v <- beta2 v + (1 - beta2) g^2
        mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2)        P_t = mu_1 mu_2 ... mu_t
        x  = mu_t+1/(1 - P_t mu_t+1) m + (1 - mu_t)/(1 - P_t) g
        p <- p - lr x / (sqrt(v/(1 - beta2^t)) + eps)

    State: exp_avg (m), exp_avg_sq (v), and mu_product (P), one number for each array.

    >>> w = np.ones(3)
    >>> opt = NAdam(w, lr=0.1)
    >>> opt.step(2 * w)
    >>> w.round(3)
    array([0.894, 0.894, 0.894])

    Paper: Dozat 2016.

    Other libraries: torch computes the same, though 0.96^x is formed without libm here, for the same bits on every
    machine.  Keras has momentum_decay 1, eps 1e-7 and "hat".  optax.nadam has no schedule of the momentum.
    """

    rule = Rule("nadam", {"exp_avg": _SIGNED, "exp_avg_sq": _UNSIGNED}, per_array={"mu_product": 1.0}, squares=True)

    def __init__(self, params: Params, lr: Number = 2e-3, betas: Pair = (0.9, 0.999), eps: Number = 1e-8,
                 weight_decay: Number = 0.0, momentum_decay: Number = 4e-3, decoupled_weight_decay: bool = False, *,
                 maximize: bool = False, eps_mode: EpsMode = "outside", **shared: Unpack[Shared]) -> None:
        super().__init__(params, _options(locals()), **shared)


class RAdam(Optimizer):
    """Adam whose step is rectified for the variance of its denominator in the first steps.

    ::

        m <- beta1 m + (1 - beta1) g                          v <- beta2 v + (1 - beta2) g^2
        rho = r - 2 t beta2^t/(1 - beta2^t),  r = 2/(1 - beta2) - 1
        rho > 5:    p <- p - lr/(1 - beta1^t) sqrt((rho-4)(rho-2) r / ((r-4)(r-2) rho)) m / D
                    D = (sqrt(v) + eps)/sqrt(1 - beta2^t)     eps_mode "hat"; the others as described above
        otherwise:  p <- p - lr/(1 - beta1^t) m

    State: exp_avg (m), exp_avg_sq (v).

    >>> w = np.ones(3)
    >>> opt = RAdam(w, lr=0.1)
    >>> opt.step(2 * w)
    >>> w
    array([0.8, 0.8, 0.8])

    Paper: Liu et al. 2020, Algorithm 2 (rectified from rho > 4 on, no eps).

    Other libraries: torch computes the same.  The authors' code makes no update until it rectifies.  optax has eps
    outside and rectifies from rho >= 5 on.  Keras has no RAdam.
    """

    rule = Rule("radam", {"exp_avg": _SIGNED, "exp_avg_sq": _UNSIGNED}, squares=True)

    def __init__(self, params: Params, lr: Number = 1e-3, betas: Pair = (0.9, 0.999), eps: Number = 1e-8,
                 weight_decay: Number = 0.0, decoupled_weight_decay: bool = False, *, maximize: bool = False,
                 eps_mode: EpsMode = "hat", **shared: Unpack[Shared]) -> None:
        super().__init__(params, _options(locals()), **shared)


class Yogi(Optimizer):
    """Adam whose second moment moves towards g^2 by (1 - beta2) g^2 in each step, not by a share of the distance.

    ::

        m <- beta1 m + (1 - beta1) g                          v <- v - (1 - beta2) sign(v - g^2) g^2
        p <- p - lr/(1 - beta1^t) m / (sqrt(v/(1 - beta2^t)) + eps)

    State: exp_avg (m), exp_avg_sq (v, never negative); both start at initial_accumulator_value.

    >>> w = np.ones(3)
    >>> opt = Yogi(w, lr=0.1)
    >>> opt.step(2 * w)
    >>> w.round(3)
    array([0.9, 0.9, 0.9])

    Paper: Zaheer, Reddi, Sachan, Kale & Kumar 2018, Algorithm 2 (no bias correction).

    Other libraries: torch and Keras have no Yogi.  optax computes the same; its eps_root is eps_mode "inside" here.
    """

    rule = Rule("yogi", {"exp_avg": Slot("signed", start="initial_accumulator_value"),
                       "exp_avg_sq": Slot("unsigned", start="initial_accumulator_value")}, squares=True)

    def __init__(self, params: Params, lr: Number = 1e-2, betas: Pair = (0.9, 0.999), eps: Number = 1e-3,
                 weight_decay: Number = 0.0, initial_accumulator_value: Real = 1e-6, *, maximize: bool = False,
                 decoupled_weight_decay: bool = False, eps_mode: EpsMode = "outside", **shared: Unpack[Shared]) -> None:
        super().__init__(params, _options(locals()), **shared)


class AdaBelief(Optimizer):
    """Adam whose second moment is of the gradient's distance from its mean: long steps where gradients agree.

    ::

        m <- beta1 m + (1 - beta1) g                          v <- beta2 v + (1 - beta2) (g - m)^2 + eps
        p <- p - lr/(1 - beta1^t) m / (sqrt(v/(1 - beta2^t)) + eps)

    State: exp_avg (m), exp_avg_sq (v).  With beta1 = 0, g - m is always 0.  eps has the size of a square: where Adam
    has 1e-8, this has 1e-16.

    >>> w = np.ones(3)
    >>> opt = AdaBelief(w, lr=0.1)
    >>> opt.step(2 * w)
    >>> w.round(3)
    array([0.889, 0.889, 0.889])

    Paper: Zhuang et al. 2020, Algorithm 2.

    Other libraries: torch and Keras have no AdaBelief.  optax adds an eps_root to v, which may differ from eps.
    The authors' package rectifies the step as RAdam does and decouples the decay unless told not to.  Neither rectify
    nor amsgrad is offered here.
    """

    rule = Rule("adabelief", {"exp_avg": _SIGNED, "exp_avg_sq": _UNSIGNED}, squares=True)

    def __init__(self, params: Params, lr: Number = 1e-3, betas: Pair = (0.9, 0.999), eps: Number = 1e-16,
                 weight_decay: Number = 0.0, *, maximize: bool = False, decoupled_weight_decay: bool = False,
                 **shared: Unpack[Shared]) -> None:
        super().__init__(params, _options(locals()), **shared)


class Lion(Optimizer):
    """Steps of one size in the direction of the sign of an interpolated momentum.

    ::

        p <- p (1 - lr weight_decay) - lr sign(beta1 m + (1 - beta1) g)           sign(0) = 0
        m <- beta2 m + (1 - beta2) g

    State: exp_avg (m).

    >>> w = np.ones(3)
    >>> opt = Lion(w, lr=0.1)
    >>> opt.step(2 * w)
    >>> w
    array([0.9, 0.9, 0.9])

    Paper: Chen et al. 2023, Algorithm 2.

    Other libraries: torch has no Lion.  Keras has lr 1e-3, optax weight_decay 1e-3, and DeepSpeed betas (0.9, 0.999).
    """

    rule = Rule("lion", {"exp_avg": _SIGNED}, fixed={"decoupled_weight_decay": True})

    def __init__(self, params: Params, lr: Number = 1e-4, betas: Pair = (0.9, 0.99),
                 weight_decay: Number = 0.0, maximize: bool = False, **shared: Unpack[Shared]) -> None:
        super().__init__(params, _options(locals()), **shared)


class Rprop(Optimizer):
    """Resilient propagation: only the sign of the gradient counts, and each element has a rate of its own.

    ::

        w  = sign(g) q                                        q: the sign kept from the last step
        e <- clamp(e * (etas[1] if w > 0, etas[0] if w < 0, else 1), *step_sizes)
        p <- p - e s                                          s = sign(g); irprop-: 0 where w < 0
        rprop+: where w < 0, p <- p + e_old q, the last step undone, and s = 0
        q <- s

    State: step_size (e), prev (q, int8).  Meant for full-batch gradients.

    >>> w = np.ones(3)
    >>> opt = Rprop(w, lr=0.1, variant="rprop+")
    >>> opt.step(2 * w)
    >>> w
    array([0.9, 0.9, 0.9])

    Paper: Riedmiller & Braun 1993 (rprop+, first rate 0.1); Igel & Huesken 2003.

    Other libraries: torch's rule is "irprop-".  It multiplies gradients before it takes the sign, which underflows for
    tiny ones, and it takes a NaN as 0, where the parameter becomes NaN here.  optax's rprop lags by one step.  Keras
    has no Rprop.
    """

    rule = Rule("rprop", {"step_size": _UNSIGNED, "prev": _SIGN}, read_once=("lr",), narrow_refused=_RATES)

    def __init__(self, params: Params, lr: Number = 1e-2, etas: Pair = (0.5, 1.2),
                 step_sizes: Pair = (1e-6, 50.0), *, maximize: bool = False, variant: Variant = "irprop-",
                 **shared: Unpack[Shared]) -> None:
        super().__init__(params, _options(locals()), **shared)


class SuperSAB(Optimizer):
    """A rate for each element that grows while the gradient keeps its sign; a change of sign retracts the step.

    ::

        w  = sign(g) q                                        q: the sign kept from the last step
        w >= 0:  e <- min(eta_plus e, max_rate) where w > 0,  v <- momentum v - e g,  p <- p + v,  q <- sign(g)
        w <  0:  e <- eta_minus e,  p <- p - v,  v <- 0,  q <- 0

    State: step_size (e), prev (q, int8), momentum_buffer (v).  Meant for full-batch gradients.

    >>> w = np.ones(3)
    >>> opt = SuperSAB(w, lr=0.1)
    >>> opt.step(2 * w)
    >>> w
    array([0.8, 0.8, 0.8])

    Paper: Tollenaere 1990, Neural Networks 3(5), 561-573, after Reed & Marks, Neural Smithing, 9.5.

    Other libraries: torch, optax and Keras have no SuperSAB.
    """

    rule = Rule("supersab", {"step_size": _UNSIGNED, "prev": _SIGN, "momentum_buffer": _SIGNED}, read_once=("lr",),
                narrow_refused=_RATES)

    def __init__(self, params: Params, lr: Number = 0.1, eta_plus: Number = 1.05, eta_minus: Number = 0.5,
                 max_rate: Number = 30.0, momentum: Number = 0.9, maximize: bool = False,
                 **shared: Unpack[Shared]) -> None:
        super().__init__(params, _options(locals()), **shared)

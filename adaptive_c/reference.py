"""The update rules in plain Python: the specification that the compiled kernels are judged against.

Every rule is a function ``rule(p, g, s, t, **options)``.  ``p`` is the parameter and ``g`` its gradient: a Python
float, a NumPy scalar or a NumPy array of any shape.  ``s`` is a dict that holds the rule's state between calls; an
empty dict is the state before the first step.  ``t`` = 1, 2, ... is the number of the step.  A rule returns the new
parameter and leaves the new state in ``s``; it writes neither ``p`` nor ``g``.

Each constant is formed completely in double (Python's float) before it is combined with ``p``, so float32 arrays are
computed in float32 with constants that were rounded once (for scalars and 0-d arrays this needs numpy >= 2).  Options,
their defaults and the names in ``s`` are PyTorch's where PyTorch has the rule.  The kernels give the same bits as these
functions do when they are evaluated in the same dtype.
"""

import math

import numpy as np

from ._docstrings import document_rules
from ._formats import NEAREST as NEAREST
from ._formats import from_bfloat16, from_uint8, noise, to_bfloat16, to_float16, to_uint8

__all__ = [  # noqa: RUF022  in order of increasing complexity; then the formats
    "sgd", "momentum", "adagrad", "rmsprop", "adadelta", "adam", "adamw", "adamax", "nadam", "radam", "yogi",
    "adabelief", "lion", "rprop", "supersab", "sum_rows", "noise", "to_bfloat16", "from_bfloat16", "to_float16",
    "to_uint8", "from_uint8",
]  # fmt: skip

# --- shared by several rules -------------------------------------------------------------------------------------


def power(x, n):
    """x**n for an integer n >= 0, by repeated squaring: multiplications only, so every machine gives the same bits."""
    y = 1.0
    while n:
        if n & 1:
            y *= x
        x *= x
        n >>= 1
    return y


def power_of_096(x):
    """0.96**x for x >= 0 without libm: an integer power times the Taylor series of exp on [0, 0.041], good to 1e-16."""
    if x > 1e5:  # the result is smaller than any double
        return 0.0
    n = int(x)
    y = (x - n) * -0.040821994520255166  # ln 0.96
    s = 1.0
    for i in range(9, 0, -1):
        s = 1.0 + s * y / i
    return power(0.96, n) * s


def sign(x):
    """1 or -1; 0 where x is zero and NaN where x is NaN, as x - x is."""
    return np.sign(x)


def larger(a, b):
    """The larger of a and b, and b where either of them is NaN."""
    return np.where(b <= a, a, b)


def sum_rows(shape, dtype, indices, values, offsets=None, weights=None):
    """Form the dense gradient that Rows stand for; rows that it does not have are left alone, with their state.

    The entries of a row are added in their order, in dtype.

    Parameters
    ----------
    shape : tuple of int
        That of the parameter.
    dtype : str or dtype
        The type to add in.
    indices : (k,) array of int
        As of `Rows`.
    values : (k, ...) array
        As of `Rows`.
    offsets : (bags,) array of int, optional
        As of `Rows`.
    weights : (k,) array, optional
        As of `Rows`.

    Returns
    -------
    g : array of that shape
        The gradient, 0 in other rows.
    touched : (rows,) array of bool
        Which rows it has.

    Examples
    --------
    >>> import numpy as np
    >>> from adaptive_c import reference
    >>> reference.sum_rows((3, 1), "float64", [2, 2], np.ones((2, 1)))
    (array([[0.],
           [0.],
           [2.]]), array([False, False,  True]))
    """
    g, touched = np.zeros(shape, dtype), np.zeros(shape[0], bool)
    bag = -1
    for j, i in enumerate(indices):
        while offsets is not None and bag + 1 < len(offsets) and offsets[bag + 1] <= j:
            bag += 1
        x = values[j if offsets is None else bag].astype(dtype)
        if weights is not None:
            x = weights[j] * x
        g[i] = g[i] + x if touched[i] else x
        touched[i] = True
    return g, touched


def gradient(p, g, maximize, weight_decay=0.0):
    """The gradient as the rule sees it: negated under maximize, then with coupled weight decay (L2) added."""
    if maximize:
        g = g * -1.0
    if weight_decay:
        g = g + weight_decay * p
    return g


def squared(g, c, second_moment):
    """c g^2; with second_moment "row", c times its mean over each row g[i], of shape (n, 1, ...).

    Element j of a row adds to lane j mod 16 of its chunk j // 4096, in double; then the lanes are added, half onto
    half, and the chunks in order.  A row of one element is that element, and an array of one dimension has such rows.
    """
    shape = np.shape(g)
    n, length = shape[0] if shape else 1, math.prod(shape[1:])
    if second_moment == "element" or length == 1:
        return c * g * g
    x, total = g.reshape(n, length).astype("float64"), np.zeros(n)
    for start in range(0, length, 4096):
        part = x[:, start : start + 4096]
        lanes = np.zeros((n, 16))
        for at in range(0, part.shape[1], 16):
            block = part[:, at : at + 16]
            lanes[:, : block.shape[1]] += block * block
        for half in (8, 4, 2, 1):
            lanes = lanes[:, :half] + lanes[:, half:]
        total += lanes[:, 0]
    return c * (total / max(length, 1)).astype(g.dtype).reshape((n,) + (1,) * (len(shape) - 1))


def denominator(v, eps, eps_mode, bc2=1.0):
    """sqrt(v*c + e_in) + e_out with three constants; bc2 = 1 - beta2^t corrects the bias of v.

    outside  sqrt(v/bc2) + eps             Kingma & Ba 2015 Algorithm 1, PyTorch
    inside   sqrt(v/bc2 + eps)
    hat      (sqrt(v) + eps) / sqrt(bc2)   Kingma & Ba 2015 section 2, Keras
    """
    c = 1.0 / bc2
    e_in = eps if eps_mode == "inside" else 0.0
    e_out = {"outside": eps, "inside": 0.0, "hat": eps / math.sqrt(bc2)}[eps_mode]
    return np.sqrt(v * c + e_in) + e_out


# --- the rules, in order of increasing complexity ----------------------------------------------------------------


def sgd(p, g, s, t, *, lr=1e-3, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False, maximize=False):
    """Gradient descent; with momentum, heavy ball with the learning rate outside the buffer, as in PyTorch."""
    g = gradient(p, g, maximize, weight_decay)
    if momentum == 0:
        return p - lr * g
    b = s.get("momentum_buffer")
    s["momentum_buffer"] = b = +g if b is None else momentum * b + (1.0 - dampening) * g
    return p - lr * (g + momentum * b if nesterov else b)


def momentum(p, g, s, t, *, lr=1e-3, momentum=0.9, nesterov=False, weight_decay=0.0, maximize=False):
    """Heavy ball with the learning rate inside the velocity (Polyak 1964; Sutskever et al. 2013)."""
    g = gradient(p, g, maximize, weight_decay)
    s["momentum_buffer"] = v = momentum * s.get("momentum_buffer", 0.0) + lr * g
    return p - (momentum * v + lr * g if nesterov else v)


def adagrad(p, g, s, t, *, lr=1e-2, lr_decay=0.0, weight_decay=0.0, initial_accumulator_value=0.0, eps=1e-10,
            maximize=False, eps_mode="outside", second_moment="element"):  # fmt: skip
    """Duchi, Hazan & Singer 2011; by row as in FBGEMM."""
    g = gradient(p, g, maximize, weight_decay)
    s["sum"] = v = s.get("sum", initial_accumulator_value) + squared(g, 1.0, second_moment)
    return p - lr / (1.0 + (t - 1) * lr_decay) * g / denominator(v, eps, eps_mode)


def rmsprop(p, g, s, t, *, lr=1e-2, alpha=0.99, eps=1e-8, weight_decay=0.0, momentum=0.0, centered=False,
            maximize=False, eps_mode="outside", second_moment="element"):  # fmt: skip
    """Tieleman & Hinton 2012; centered: Graves 2013, equations 38 to 45."""
    g = gradient(p, g, maximize, weight_decay)
    s["square_avg"] = v = alpha * s.get("square_avg", 0.0) + squared(g, 1.0 - alpha, second_moment)
    if centered:
        s["grad_avg"] = a = alpha * s.get("grad_avg", 0.0) + (1.0 - alpha) * g
        v = v - a * a
        v = np.where(v < 0, 0.0, v)  # rounding may make the difference negative
    if momentum == 0:
        return p - lr * g / denominator(v, eps, eps_mode)
    s["momentum_buffer"] = b = momentum * s.get("momentum_buffer", 0.0) + g / denominator(v, eps, eps_mode)
    return p - lr * b


def adadelta(p, g, s, t, *, lr=1.0, rho=0.9, eps=1e-6, weight_decay=0.0, maximize=False):
    """Zeiler 2012, Algorithm 1; the paper has no lr."""
    g = gradient(p, g, maximize, weight_decay)
    s["square_avg"] = v = rho * s.get("square_avg", 0.0) + (1.0 - rho) * g * g
    u = s.get("acc_delta", np.zeros_like(p))
    dx = np.sqrt(u + eps) / np.sqrt(v + eps) * g
    s["acc_delta"] = rho * u + (1.0 - rho) * dx * dx
    return p - lr * dx


def adam(p, g, s, t, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, amsgrad=False, maximize=False,
         decoupled_weight_decay=False, eps_mode="outside", second_moment="element"):  # fmt: skip
    """Kingma & Ba 2015, Algorithm 1; amsgrad: Reddi, Kale & Kumar 2018 in PyTorch's form."""
    b1, b2 = betas
    g = gradient(p, g, maximize, 0.0 if decoupled_weight_decay else weight_decay)
    s["exp_avg"] = m = b1 * s.get("exp_avg", 0.0) + (1.0 - b1) * g
    s["exp_avg_sq"] = v = b2 * s.get("exp_avg_sq", 0.0) + squared(g, 1.0 - b2, second_moment)
    if amsgrad:
        s["max_exp_avg_sq"] = v = larger(s.get("max_exp_avg_sq", 0.0), v)
    p = p * (1.0 - lr * weight_decay if decoupled_weight_decay else 1.0)
    return p - lr / (1.0 - power(b1, t)) * m / denominator(v, eps, eps_mode, 1.0 - power(b2, t))


def adamw(p, g, s, t, *, weight_decay=1e-2, **options):
    """Loshchilov & Hutter 2019: Adam with the decay p <- p (1 - lr weight_decay) before the step."""
    return adam(p, g, s, t, weight_decay=weight_decay, decoupled_weight_decay=True, **options)


def adamax(p, g, s, t, *, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, maximize=False):
    """Kingma & Ba 2015, Algorithm 2, with eps inside the maximum."""
    b1, b2 = betas
    g = gradient(p, g, maximize, weight_decay)
    s["exp_avg"] = m = b1 * s.get("exp_avg", 0.0) + (1.0 - b1) * g
    s["exp_inf"] = u = larger(b2 * s.get("exp_inf", 0.0), np.abs(g) + eps)
    return p - lr / (1.0 - power(b1, t)) * m / u


def nadam(p, g, s, t, *, lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, momentum_decay=4e-3,
          decoupled_weight_decay=False, maximize=False, eps_mode="outside"):  # fmt: skip
    """Dozat 2016, with the momentum schedule mu_t = beta1 (1 - 0.96^(t momentum_decay) / 2)."""
    b1, b2 = betas
    g = gradient(p, g, maximize, 0.0 if decoupled_weight_decay else weight_decay)
    s["exp_avg"] = m = b1 * s.get("exp_avg", 0.0) + (1.0 - b1) * g
    s["exp_avg_sq"] = v = b2 * s.get("exp_avg_sq", 0.0) + (1.0 - b2) * g * g
    mu = b1 * (1.0 - 0.5 * power_of_096(t * momentum_decay))
    mu_next = b1 * (1.0 - 0.5 * power_of_096((t + 1) * momentum_decay))
    s["mu_product"] = product = s.get("mu_product", 1.0) * mu
    p = p * (1.0 - lr * weight_decay if decoupled_weight_decay else 1.0)
    x = lr * mu_next / (1.0 - product * mu_next) * m + lr * (1.0 - mu) / (1.0 - product) * g
    return p - x / denominator(v, eps, eps_mode, 1.0 - power(b2, t))


def radam(p, g, s, t, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, decoupled_weight_decay=False,
          maximize=False, eps_mode="hat"):  # fmt: skip
    """Liu et al. 2020, Algorithm 2, rectified once rho_t > 5, as in PyTorch (the paper has 4)."""
    b1, b2 = betas
    g = gradient(p, g, maximize, 0.0 if decoupled_weight_decay else weight_decay)
    s["exp_avg"] = m = b1 * s.get("exp_avg", 0.0) + (1.0 - b1) * g
    s["exp_avg_sq"] = v = b2 * s.get("exp_avg_sq", 0.0) + (1.0 - b2) * g * g
    p = p * (1.0 - lr * weight_decay if decoupled_weight_decay else 1.0)
    step_size = lr / (1.0 - power(b1, t))
    bc2 = 1.0 - power(b2, t)
    rho_inf = 2.0 / (1.0 - b2) - 1.0
    rho = rho_inf - 2.0 * t * power(b2, t) / bc2
    if rho <= 5.0:
        return p - step_size * m
    r = math.sqrt((rho - 4.0) * (rho - 2.0) * rho_inf / ((rho_inf - 4.0) * (rho_inf - 2.0) * rho))
    return p - step_size * r * m / denominator(v, eps, eps_mode, bc2)


def yogi(p, g, s, t, *, lr=1e-2, betas=(0.9, 0.999), eps=1e-3, weight_decay=0.0, initial_accumulator_value=1e-6,
         maximize=False, decoupled_weight_decay=False, eps_mode="outside"):  # fmt: skip
    """Zaheer et al. 2018; both moments start at initial_accumulator_value (optax).  v is never negative."""
    b1, b2 = betas
    g = gradient(p, g, maximize, 0.0 if decoupled_weight_decay else weight_decay)
    start, q = np.full_like(p, initial_accumulator_value), g * g
    s["exp_avg"] = m = b1 * s.get("exp_avg", start) + (1.0 - b1) * g
    v = s.get("exp_avg_sq", start)
    s["exp_avg_sq"] = v = v - (1.0 - b2) * sign(v - q) * q
    p = p * (1.0 - lr * weight_decay if decoupled_weight_decay else 1.0)
    return p - lr / (1.0 - power(b1, t)) * m / denominator(v, eps, eps_mode, 1.0 - power(b2, t))


def adabelief(p, g, s, t, *, lr=1e-3, betas=(0.9, 0.999), eps=1e-16, weight_decay=0.0, maximize=False,
              decoupled_weight_decay=False):  # fmt: skip
    """Zhuang et al. 2020, Algorithm 2: eps is added to v, where it stays, and to the root."""
    b1, b2 = betas
    g = gradient(p, g, maximize, 0.0 if decoupled_weight_decay else weight_decay)
    s["exp_avg"] = m = b1 * s.get("exp_avg", 0.0) + (1.0 - b1) * g
    d = g - m
    s["exp_avg_sq"] = v = b2 * s.get("exp_avg_sq", 0.0) + (1.0 - b2) * d * d + eps
    p = p * (1.0 - lr * weight_decay if decoupled_weight_decay else 1.0)
    return p - lr / (1.0 - power(b1, t)) * m / denominator(v, eps, "outside", 1.0 - power(b2, t))


def lion(p, g, s, t, *, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, maximize=False):
    """Chen et al. 2023, Algorithm 2; the decay is decoupled."""
    b1, b2 = betas
    g = gradient(p, g, maximize)
    m = s.get("exp_avg", 0.0)
    p = p * (1.0 - lr * weight_decay) - lr * sign(b1 * m + (1.0 - b1) * g)
    s["exp_avg"] = b2 * m + (1.0 - b2) * g
    return p


def rprop(p, g, s, t, *, lr=1e-2, etas=(0.5, 1.2), step_sizes=(1e-6, 50.0), maximize=False, variant="irprop-"):
    """Riedmiller & Braun 1993 ("rprop+"); Igel & Huesken 2003 ("irprop-", PyTorch's, and "rprop-")."""
    g = gradient(p, g, maximize)
    e, before = s.get("step_size", np.full_like(p, lr)), s.get("prev", 0.0)
    w = sign(g) * before
    now = sign(g) if variant == "rprop-" else np.where(w < 0, 0.0, sign(g))
    s["prev"] = np.where(now == now, now, 0.0)
    s["step_size"] = new = np.clip(np.where(w > 0, etas[1] * e, np.where(w < 0, etas[0] * e, e)), *step_sizes)
    return p + np.where(w < 0, e * before, -(new * now)) if variant == "rprop+" else p - new * now


def supersab(p, g, s, t, *, lr=0.1, eta_plus=1.05, eta_minus=0.5, max_rate=30.0, momentum=0.9, maximize=False):
    """Tollenaere 1990; the stored sign is 0 after a retracted step, as in Rprop+."""
    g = gradient(p, g, maximize)
    e, before = s.get("step_size", np.full_like(p, lr)), s.get("prev", 0.0)
    v = s.get("momentum_buffer", np.zeros_like(p))
    w = sign(g) * before
    now = np.where(w < 0, 0.0, sign(g))
    s["prev"] = np.where(now == now, now, 0.0)
    s["step_size"] = e = np.where(w > 0, np.minimum(eta_plus * e, max_rate), np.where(w < 0, eta_minus * e, e))
    d = np.where(w < 0, -v, momentum * v - e * g)
    s["momentum_buffer"] = np.where(w < 0, 0.0, d)
    return p + d


document_rules(globals())

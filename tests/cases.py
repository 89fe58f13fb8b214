"""The cases that the tests share: every rule, and every switch of it on at least once."""

import threading

import numpy as np

import adaptive_c as ac
from adaptive_c import reference

CHUNK = 4096

# (id, class, options)
CASES = [
    ("sgd", "SGD", {"lr": 0.1}),
    ("sgd-decay-maximize", "SGD", {"lr": 0.1, "weight_decay": 0.05, "maximize": True}),
    ("sgd-momentum", "SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.05}),
    ("sgd-nesterov", "SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    ("momentum", "Momentum", {"lr": 0.1, "weight_decay": 0.05}),
    ("momentum-nesterov", "Momentum", {"lr": 0.1, "momentum": 0.8, "nesterov": True, "maximize": True}),
    ("adagrad", "Adagrad", {"lr": 0.1, "lr_decay": 0.1, "weight_decay": 0.05, "initial_accumulator_value": 0.3}),
    ("adagrad-inside", "Adagrad", {"lr": 0.1, "eps": 1e-3, "eps_mode": "inside", "maximize": True}),
    ("adagrad-hat", "Adagrad", {"lr": 0.1, "eps": 1e-3, "eps_mode": "hat"}),
    ("rmsprop", "RMSprop", {"lr": 0.1, "alpha": 0.9, "weight_decay": 0.05}),
    ("rmsprop-inside", "RMSprop", {"lr": 0.1, "eps": 1e-3, "eps_mode": "inside", "maximize": True}),
    ("rmsprop-hat", "RMSprop", {"lr": 0.1, "eps": 1e-3, "eps_mode": "hat"}),
    ("rmsprop-centered", "RMSprop", {"lr": 0.1, "centered": True, "weight_decay": 0.05}),
    ("rmsprop-momentum", "RMSprop", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}),
    ("rmsprop-centered-momentum", "RMSprop", {"lr": 0.1, "momentum": 0.9, "centered": True, "eps_mode": "inside"}),
    ("adadelta", "Adadelta", {"lr": 0.5, "rho": 0.8, "weight_decay": 0.05, "maximize": True}),
    ("adam", "Adam", {"lr": 0.1}),
    ("adam-decay", "Adam", {"lr": 0.1, "betas": (0.8, 0.95), "weight_decay": 0.05, "maximize": True}),
    ("adam-decoupled", "Adam", {"lr": 0.1, "weight_decay": 0.05, "decoupled_weight_decay": True}),
    ("adam-inside", "Adam", {"lr": 0.1, "eps": 1e-3, "eps_mode": "inside"}),
    ("adam-hat", "Adam", {"lr": 0.1, "eps": 1e-3, "eps_mode": "hat"}),
    ("adam-amsgrad", "Adam", {"lr": 0.1, "amsgrad": True, "weight_decay": 0.05}),
    ("adamw", "AdamW", {"lr": 0.1, "weight_decay": 0.05, "maximize": True}),
    ("adamw-amsgrad", "AdamW", {"lr": 0.1, "weight_decay": 0.05, "amsgrad": True, "eps_mode": "hat"}),
    ("adamax", "Adamax", {"lr": 0.1, "weight_decay": 0.05, "maximize": True}),
    ("nadam", "NAdam", {"lr": 0.1, "weight_decay": 0.05}),
    ("nadam-decoupled", "NAdam", {"lr": 0.1, "momentum_decay": 0.7, "weight_decay": 0.05,
                                  "decoupled_weight_decay": True, "maximize": True, "eps_mode": "inside"}),
    ("radam", "RAdam", {"lr": 0.1, "weight_decay": 0.05}),
    ("radam-early", "RAdam", {"lr": 0.1, "betas": (0.9, 0.6), "eps_mode": "outside"}),
    ("radam-decoupled", "RAdam", {"lr": 0.1, "betas": (0.8, 0.9), "weight_decay": 0.05, "maximize": True,
                                  "decoupled_weight_decay": True, "eps_mode": "inside"}),
    ("lion", "Lion", {"lr": 0.1, "weight_decay": 0.05}),
    ("lion-maximize", "Lion", {"lr": 0.1, "betas": (0.8, 0.95), "maximize": True}),
    ("rprop", "Rprop", {"lr": 0.1}),
    ("rprop-plus", "Rprop", {"lr": 0.1, "variant": "rprop+", "step_sizes": (1e-3, 0.15), "maximize": True}),
    ("rprop-minus", "Rprop", {"lr": 0.1, "variant": "rprop-", "etas": (0.4, 1.3)}),
    ("supersab", "SuperSAB", {"lr": 0.1}),
    ("supersab-rates", "SuperSAB", {"lr": 0.1, "eta_plus": 1.3, "eta_minus": 0.4, "max_rate": 0.15, "momentum": 0.8,
                                    "maximize": True}),
]  # fmt: skip
IDS = [case[0] for case in CASES]
PAIRS = [case[1:] for case in CASES]


def build(name, params, options, **shared):
    return getattr(ac, name)(params, **options, **shared)


def spec(name):
    """The reference function of a class."""
    return getattr(reference, name.lower())


def random_state(opt, rng, t=10):
    """Give an optimizer over one flat array a random state at step t; returns it as the reference's dict."""
    state = {}
    opt.t = t
    for name, live in opt.state.items():
        if name == "step":
            continue
        if name == "mu_product":
            state[name] = float(live)
            continue
        if name == "prev":
            live[...] = rng.integers(-1, 2, live.shape)
        elif name in ("exp_avg", "grad_avg", "momentum_buffer"):
            live[...] = rng.normal(size=live.shape)
        else:  # a mean of squares, a rate
            live[...] = rng.uniform(0.05, 1.0, live.shape)
        state[name] = live.astype(live.dtype if name != "prev" else opt.param_groups[0]["params"].dtype)
    return state


def gradients(rng, size, dtype, n=8):
    """Gradients of mixed size and sign with exact zeros of both signs among them."""
    grads = rng.normal(size=(n, size)) * 10.0 ** rng.integers(-6, 3, size=(n, size))
    grads[rng.random((n, size)) < 0.05] = 0.0
    grads[rng.random((n, size)) < 0.05] = -0.0
    return grads.astype(dtype)


def assert_same_bits(a, b, what=""):
    """Equal to the last bit, where NaN equals NaN."""
    a, b = np.atleast_1d(np.asarray(a)), np.atleast_1d(np.asarray(b))
    assert a.dtype == b.dtype, (what, a.dtype, b.dtype)
    assert a.shape == b.shape, (what, a.shape, b.shape)
    unsigned = f"u{a.itemsize}"
    differ = (a.view(unsigned) != b.view(unsigned)) & ~((a != a) & (b != b))
    assert not differ.any(), f"{what}: {differ.sum()} of {a.size} differ, first at {np.flatnonzero(differ)[0]}: " \
        f"{a[differ][0]!r} {b[differ][0]!r}"  # fmt: skip


def race(call, threads, times):
    """Call it so often in so many threads at once; what the RuntimeErrors said."""
    refused = []

    def work():
        for _ in range(times):
            try:
                call()
            except RuntimeError as error:
                refused.append(str(error))

    running = [threading.Thread(target=work) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return refused

"""The programs of docs/hosts.md: their numbers are those of the hosts' own code."""

import re
from pathlib import Path

import numpy as np
import pytest

import adaptive_c as ac

PAGE = Path(__file__).parents[1] / "docs" / "hosts.md"


def on_the_page(name):
    """What the example that defines a name has defined at its end."""
    if not PAGE.is_file():
        pytest.skip("not in a clone")
    (block,) = (x for x in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if f" {name}" in x)
    found = {}
    exec(compile(block, str(PAGE), "exec"), found)
    return found[name]


# --- expectation maximisation ----------------------------------------------------------------------------------------


def plain_em(texts, words, steps):
    """The textbook's loop for a mixture of multinomials."""
    share = np.full(len(words), 1 / len(words))
    for _ in range(steps):
        belongs = share * np.exp(texts @ np.log(words).T)
        likelihood = np.log(belongs.sum(axis=1)).sum()
        belongs /= belongs.sum(axis=1, keepdims=True)
        share = belongs.mean(axis=0)
        words = belongs.T @ texts
        words = words / words.sum(axis=1, keepdims=True)
    return likelihood, share, words


def test_a_mixture_is_expectation_maximisation():
    """A rate of 1 is EM; with one of 1.5, fewer steps come as far; rows stay distributions with both."""
    mixture = on_the_page("mixture")
    rng = np.random.default_rng(0)
    kinds = rng.dirichlet(np.full(30, 5.0), size=3)
    texts = np.stack([rng.multinomial(40, kinds[k]) for k in rng.choice(3, 500)])
    start = rng.dirichlet(np.full(30, 10.0), size=3)
    for steps in (1, 2, 15):
        for got, want in zip(mixture(texts, start, 1.0, steps), plain_em(texts, start, steps), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)
    best = plain_em(texts, start, 300)[0]
    _, share, words = mixture(texts, start, 1.5, 300)
    assert mixture(texts, start, 1.5, 12)[0] > plain_em(texts, start, 12)[0]
    assert mixture(texts, start, 1.5, 300)[0] == pytest.approx(best, abs=1e-6)
    np.testing.assert_allclose([share.sum(), *words.sum(axis=1)], 1, rtol=1e-12)


# --- federated averaging -----------------------------------------------------------------------------------------------


def adam(s, x, delta, n, eta=0.1, b1=0.9, b2=0.99, tau=1e-9):
    """Flower's FedAdam: a round, counted from 1."""
    s["m"] = b1 * s["m"] + (1 - b1) * delta
    s["v"] = b2 * s["v"] + (1 - b2) * delta * delta
    rate = eta * np.sqrt(1 - b2 ** (n + 1.0)) / (1 - b1 ** (n + 1.0))
    return x + rate * s["m"] / (np.sqrt(s["v"]) + tau)


def yogi(s, x, delta, n, eta=0.01, b1=0.9, b2=0.99, tau=1e-3):
    """Flower's FedYogi, which corrects no bias."""
    s["m"] = b1 * s["m"] + (1 - b1) * delta
    s["v"] = s["v"] - (1 - b2) * delta * delta * np.sign(s["v"] - delta * delta)
    return x + eta * s["m"] / (np.sqrt(s["v"]) + tau)


def adagrad(s, x, delta, n, eta=0.1, tau=1e-9):
    """Flower's FedAdagrad."""
    s["v"] = s["v"] + delta * delta
    return x + eta * delta / (np.sqrt(s["v"]) + tau)


def momentum(s, x, delta, n, rate=0.7, beta=0.9):
    """Flower's FedAvgM."""
    s["m"] = beta * s["m"] - delta if n > 1 else -delta
    return x - rate * s["m"]


STRATEGIES = {
    "FedAdam": (adam, ac.Adam, {"lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-9, "eps_mode": "hat"}, 1),
    "FedYogi": (
        yogi,
        ac.Yogi,
        {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-3, "initial_accumulator_value": 0.0},
        1_000_000,
    ),
    "FedAdagrad": (adagrad, ac.Adagrad, {"lr": 0.1, "eps": 1e-9}, 0),
    "FedAvgM": (momentum, ac.SGD, {"lr": 0.7, "momentum": 0.9}, 0),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_federated_averaging(strategy):
    theirs, cls, options, t = STRATEGIES[strategy]
    rng = np.random.default_rng(0)
    weights = [rng.normal(size=(20, 30)), rng.normal(size=7)]
    expected = [w.copy() for w in weights]
    states = [{"m": np.zeros_like(w), "v": np.zeros_like(w)} for w in weights]
    opt = cls(weights, **options)
    opt.t = t
    for n in range(1, 31):
        mean = [w + 0.3 * (1 - w) + 0.01 * rng.normal(size=w.shape) for w in expected]
        opt.step(target=mean)
        expected = [theirs(s, w, m - w, n) for s, w, m in zip(states, expected, mean, strict=True)]
        for w, x in zip(weights, expected, strict=True):
            np.testing.assert_allclose(w, x, rtol=1e-9, atol=1e-12)


def test_the_page_names_these_strategies():
    if not PAGE.is_file():
        pytest.skip("not in a clone")
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| Fed")]
    assert [row.split("(")[0][2:] for row in rows] == ["FedAdam", "FedYogi", "FedAdagrad", "FedAvgM"]
    for row, (_, cls, options, t) in zip(rows, STRATEGIES.values(), strict=True):
        assert f"`{cls.__name__}(weights, " in row
        assert all(f"{name}=" in row for name in options)
        assert (f"`opt.t = {t:_}`" in row) == (t > 0)


# --- thinc -------------------------------------------------------------------------------------------------------------


@pytest.mark.later("thinc")
@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_the_optimizer_for_thinc_gives_the_numbers_of_thincs(clip):
    from thinc import api as thinc

    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 10)).astype("f4")
    y = np.eye(3, dtype="f4")[(x[:, 0] > 0).astype(int) + (x[:, 1] > 0)]

    def trained(optimizer_of):
        thinc.fix_random_seed(0)
        model = thinc.chain(thinc.Relu(32), thinc.Softmax(3))
        model.initialize(X=x, Y=y)
        optimizer = optimizer_of(model)
        for _ in range(20):
            guess, backprop = model.begin_update(x)
            backprop(guess - y)
            model.finish_update(optimizer)
            optimizer.step_schedules()
        return np.concatenate([node.get_param(name).ravel() for node in model.walk() for name in node.param_names])

    adapter = on_the_page("ForThinc")
    ours = trained(lambda model: adapter(model, lr=0.01, eps_mode="hat", max_grad_norm=clip or None, norm_over="array"))
    theirs = trained(lambda model: thinc.Adam(0.01, grad_clip=clip, L2=0.0, use_averages=False))
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)

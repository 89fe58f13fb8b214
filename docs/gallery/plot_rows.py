"""
Factorisation with rows
=======================

A table of ratings is described by one vector for each user and one for each film. A batch of ratings touches a few rows
of these two tables, and its gradient is given as ``Rows``: a step takes the time of the rows that it touches, however
large the tables are.
"""

import matplotlib.pyplot as plt
import numpy as np

import adaptive_c as ac

rng = np.random.default_rng(0)
users, films, rank = 2_000, 500, 8
true_users, true_films = rng.standard_normal((users, rank)), rng.standard_normal((films, rank))


def ratings(n):
    """Users, films, and the ratings that these users gave to these films."""
    i, j = rng.integers(0, users, n), rng.integers(0, films, n)
    return i, j, (true_users[i] * true_films[j]).sum(1) + 0.1 * rng.standard_normal(n)


held_out = ratings(2_000)

# %%
# Each step takes a batch of 2,048 ratings. A user who occurs twice in it has two rows in the gradient, which are
# summed.


def train(rule, steps=200, **options):
    """The mean squared error on the held-out ratings after every ten steps."""
    start = np.random.default_rng(1)
    p = {"users": 0.1 * start.standard_normal((users, rank)), "films": 0.1 * start.standard_normal((films, rank))}
    opt = rule(p, **options)
    errors = []
    for step in range(steps):
        if step % 10 == 0:
            i, j, rating = held_out
            errors.append(np.mean(((p["users"][i] * p["films"][j]).sum(1) - rating) ** 2))
        i, j, rating = ratings(2_048)
        u, v = p["users"][i], p["films"][j]
        error = ((u * v).sum(1) - rating)[:, None]
        opt.step({"users": ac.Rows(i, error * v), "films": ac.Rows(j, error * u)})
    return errors


runs = {
    "Adagrad": train(ac.Adagrad, lr=0.5),
    "Adagrad, one second moment for each row": train(ac.Adagrad, lr=0.5, second_moment="row"),
    "Adam": train(ac.Adam, lr=0.1),
}

# %%
# With ``second_moment="row"`` the state is an eighth as large, because each row has one number where it had eight.

plt.style.use("tableau-colorblind10")
figure, axes = plt.subplots(figsize=(7, 3.5), layout="constrained")
for (name, errors), dashes in zip(runs.items(), ("-", "--", "-."), strict=True):
    axes.plot(range(0, 200, 10), errors, dashes, label=name)
axes.set(xlabel="step", ylabel="mean squared error", yscale="log")
axes.legend()

assert all(errors[-1] < errors[0] / 5 for errors in runs.values())

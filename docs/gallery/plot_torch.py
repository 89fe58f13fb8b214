"""
A model of PyTorch
==================

``adaptive_c.torch`` has the optimizers as classes of ``torch.optim``. A changed import is enough, and the loss curve
stays the same.
"""

import matplotlib.pyplot as plt
import torch

import adaptive_c.torch


def train(rule):
    """The loss of a small network in each of 150 steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    x = torch.linspace(-3, 3, 64)[:, None]
    y = torch.sin(2 * x)
    opt = rule(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(150):
        opt.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    return losses


theirs, ours = train(torch.optim.AdamW), train(adaptive_c.torch.AdamW)

# %%
# The lines lie on each other. Only roundings differ, because the operations of a step are not done in the same order.

plt.style.use("tableau-colorblind10")
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.plot(theirs, label="torch.optim.AdamW", color="0.75", linewidth=6)
axes.plot(ours, "--", label="adaptive_c.torch.AdamW", color="C0")
axes.set(xlabel="step", ylabel="loss", yscale="log")
axes.legend()

assert abs(theirs[0] - ours[0]) == 0
assert abs(theirs[100] - ours[100]) < 0.01 * theirs[100]
assert ours[-1] < ours[0] / 10

"""
Logistic regression within a box
================================

The weights of a logistic regression are kept between 0 and 2, as one does with rates that can't be negative. ``bounds``
clamps them after each step, within the same pass over memory.
"""

import matplotlib.pyplot as plt
import numpy as np

import adaptive_c as ac

rng = np.random.default_rng(0)
true = np.array([1.5, 0.5, -1.0, 3.0, 0.0])  # two of them lie outside the box
x = rng.standard_normal((2000, 5))
y = rng.random(2000) < 1 / (1 + np.exp(-x @ true))


def fit(**options):
    """The weights after each of 300 steps of Adam, (301, 5)."""
    w = np.full(5, 1.0)
    opt = ac.Adam(w, lr=0.05, **options)
    course = [w.copy()]
    for _ in range(300):
        opt.step(x.T @ (1 / (1 + np.exp(-x @ w)) - y) / len(y))
        course.append(w.copy())
    return np.array(course)


free, boxed = fit(), fit(bounds=(0.0, 2.0))

# %%
# Both runs start at 1. The box, which is grey in the picture, stops three weights at its sides. The other two settle
# where they are best given these three, and not where they are without the box.

plt.style.use("tableau-colorblind10")
figure, panels = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
for axes, course, title in zip(panels, (free, boxed), ("without a box", "bounds=(0, 2)"), strict=True):
    axes.axhspan(0, 2, color="0.93")
    for weight, value, dashes in zip(course.T, true, ("-", "--", "-.", ":", (0, (4, 1, 1, 1, 1, 1))), strict=True):
        axes.plot(weight, label=f"{value:g}", linestyle=dashes)
    axes.set(title=title, xlabel="step")
panels[0].set_ylabel("weight")
panels[1].legend(title="true weight", loc="center left", bbox_to_anchor=(1, 0.5))

assert (boxed[-1] >= 0).all()
assert boxed.max() == 2.0

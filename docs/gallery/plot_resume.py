"""
Resume after a kill
===================

A training program is killed in the middle of its run and started again. It ends with the bits of a run that was never
stopped.

The program takes the numbers of its batches from its input, one in each line. It saves a checkpoint after every ten
steps, and when it is started it loads the last one if there is one.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

PROGRAM = """
import sys
from pathlib import Path
import numpy as np
import adaptive_c as ac

w = np.zeros(10_000, "float32")
opt = ac.AdamW(w, lr=0.02, state_dtype="uint8", ema_decay=0.9)
if Path("run.safetensors").exists():
    opt.load("run.safetensors")  # parameters, state, averages, counts
print(opt.t, flush=True)  # the number of the batch that it needs

for line in sys.stdin:
    rng = np.random.default_rng(int(line))
    gradient = w - 1 - rng.standard_normal(w.size, "float32")
    opt.step(gradient)
    if opt.t % 10 == 0:
        opt.save("run.safetensors")
    print(np.square(w - 1).mean(), flush=True)
np.save("w.npy", w)
"""


def start(folder):
    """The program in a process of its own, and the first batch that it needs."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-P", "-c", PROGRAM], cwd=folder, text=True, stdin=pipe, stdout=pipe)
    return process, int(process.stdout.readline())


def feed(process, batches):
    """Give it batches, one after the other, and return the error after each."""
    errors = []
    for batch in batches:
        print(batch, file=process.stdin, flush=True)
        errors.append(float(process.stdout.readline()))
    return errors


# %%
# One run goes through 100 batches. The other one is killed after 57, which leaves no time for anything to be tidied up.

whole, cut = Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())

process, first = start(whole)
unbroken = feed(process, range(100))
process.communicate()

process, first = start(cut)
before = feed(process, range(57))
process.kill()
process.communicate()
print("it was killed: return code", process.returncode)

# %%
# The second start goes on from the last checkpoint, which has 50 steps, and repeats the seven steps that were lost.

process, first = start(cut)
after = feed(process, range(first, 100))
process.communicate()
print("it went on with batch", first)

same = (whole / "w.npy").read_bytes() == (cut / "w.npy").read_bytes()
print("the weights have the same bits:", same)
assert same
assert first == 50

plt.style.use("tableau-colorblind10")
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.plot(range(100), unbroken, color="0.75", linewidth=6, label="not stopped")
axes.plot(range(57), before, label="until it was killed")
axes.plot(range(first, 100), after, "--", label="after it was started again")
axes.axvline(56, color="0.4", linewidth=0.8)
axes.set(xlabel="step", ylabel="mean squared error of the weights", yscale="log")
axes.legend()

assert np.array_equal(after, unbroken[first:])

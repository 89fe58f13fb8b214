"""Reading tomorrow: a checkpoint of the first version of the format, which every later version must load.

tests/data/checkpoint-v1.* were written by write() below and are never written again; a new version of the format gets
files of its own beside them.
"""

from pathlib import Path

import numpy as np
import pytest

import adaptive_c as ac

DATA = Path(__file__).with_name("data")
# after two more steps, see sums()
KNOWN = {
    "t": 5,
    "skipped_steps": 1,
    "0.exp_avg": 8055414,
    "0.exp_avg_scale": 660,
    "0.exp_avg_sq": 11064620,
    "0.exp_avg_sq_scale": 1808,
    "0.ema": 76400435,
    "0.step": 5,
    "0.started": 1,
    "0.params": 78283277,
    "1.exp_avg": 535542,
    "1.exp_avg_sq": 434899,
    "1.max_exp_avg_sq": 435693,
    "1.step": 41,
    "1.started": 3,
    "1.params": 546531,
    "2.exp_avg": 20796,
    "2.exp_avg_sq": 14010,
    "2.master": 68812,
    "2.step": 5,
    "2.started": 1,
    "2.params": 15989,
}


def gradient(t, n):
    """Exact in every type, and without a random generator, whose numbers may change one day."""
    return ((np.arange(n) * 37 + t * 101) % 256 - 128).astype("f4") / np.float32(64)


def build(start):
    a = np.full((20, 15), start, "f4")
    b = {"w": np.full(7, start), "v": np.full((2, 2), start)}
    c = np.full(9, round(start) * 0x3F80, "u2")  # bfloat16
    groups = [{"params": a, "state_dtype": "uint8", "ema_decay": 0.75},
              {"params": b, "lr": 0.25, "amsgrad": True, "bounds": (-4.0, None)},
              {"params": c, "master": "float32", "state_dtype": "bfloat16"}]  # fmt: skip
    return ac.AdamW(groups, uint16_as="bfloat16", on_nonfinite="skip", max_grad_norm=50.0, seed=12345)


def step(opt, t):
    a, b, c = gradient(t, 300), gradient(t + 1, 11).astype("f8"), gradient(t + 2, 9)
    if t == 1:
        a[7] = np.inf  # skipped
    opt.step([a.reshape(20, 15), {"w": b[:7], "v": None if t == 2 else b[7:].reshape(2, 2)}, c])


def write():
    opt = build(1.0)
    for t in range(4):
        step(opt, t)
    opt.param_groups[0]["lr"] = 0.125
    for kind in ("safetensors", "npz"):
        opt.save(DATA / f"checkpoint-v1.{kind}", format=kind)


def sums(opt):
    """A sum of the bits of every array, each weighted by its place."""
    found = {"t": opt.t, "skipped_steps": opt.skipped_steps}
    for i, group in enumerate(opt.state_dict()["groups"]):
        arrays = {**group["arrays"], "params": np.concatenate([x.ravel() for x in opt.param_groups[i]._arrays])}
        for name, array in arrays.items():
            bits = np.ascontiguousarray(array).view("u1").astype("u8")
            found[f"{i}.{name}"] = int((bits * np.arange(1, bits.size + 1, dtype="u8")).sum())
    return found


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_a_checkpoint_of_version_1_steps_on_to_known_bits(kind):
    opt = build(0.0)
    opt.load(DATA / f"checkpoint-v1.{kind}")
    assert opt.param_groups[0]["lr"] == 0.125
    for t in (4, 5):
        step(opt, t)
    assert sums(opt) == KNOWN


def test_the_frozen_run_is_the_uninterrupted_one():
    opt = build(1.0)
    for t in range(6):
        if t == 4:
            opt.param_groups[0]["lr"] = 0.125
        step(opt, t)
    assert sums(opt) == KNOWN

"""Reading tomorrow: a checkpoint of the first version of the format, which every later version must load.

tests/data/checkpoint-v1.* were written by the save of that time, once in each format, from what begin() below returns.
They are never written again; a new version of the format gets files of its own beside them.
"""

from pathlib import Path

import numpy as np
import pytest
from support import flat

import adaptive_c as ac

DATA = Path(__file__).with_name("data")
# after one and a half more steps, see sums()
KNOWN = {
    "t": 5,
    "skipped_steps": 1,
    "0.exp_avg": 8055414,
    "0.exp_avg_scale": 660,
    "0.exp_avg_sq": 11064620,
    "0.exp_avg_sq_scale": 1808,
    "0.step": 5,
    "0.started": 1,
    "0.params": 77398644,
    "1.exp_avg": 301329,
    "1.exp_avg_sq": 234889,
    "1.max_exp_avg_sq": 240202,
    "1.step": 32,
    "1.started": 3,
    "1.params": 529951,
    "2.exp_avg": 20796,
    "2.exp_avg_sq": 14010,
    "2.master": 80040,
    "2.step": 5,
    "2.started": 1,
    "2.params": 15511,
}
# The files' average was formed as d e + (1 - d) p, which rounds otherwise than e - (1 - d) (e - p) since then.
LOADED_AVERAGE = 78227207
AVERAGES = {"on from the file": 78780325, "uninterrupted": 78770640}


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
    return ac.AdamW(groups, uint16_as="bfloat16", loss_scale="dynamic", max_grad_norm=50.0, seed=12345)


def accumulate(opt, t, half):
    a, b, c = gradient(t, 300) * half, gradient(t + 1, 11).astype("f8") * half, gradient(t + 2, 9) * half
    if t == 1:
        a[7] = np.inf  # skipped
    a, b, c = a * np.float32(opt.loss_scale), b * opt.loss_scale, c * np.float32(opt.loss_scale)
    opt.accumulate([a.reshape(20, 15), {"w": b[:7], "v": None if t in (2, 4) else b[7:].reshape(2, 2)}, c])


def begin():
    """Up to the first micro-batch of the step after t = 4."""
    opt = build(1.0)
    s = ac.schedules
    opt.param_groups[0]["lr"] = s.chain([s.plateau(0.125, factor=0.5, patience=0), s.warmup(0.25, 2)], [4])
    opt.param_groups[1]["betas"] = (s.multistep(0.75, [1, 4], 0.5), 0.75)
    for t in range(4):
        accumulate(opt, t, 0.5)
        accumulate(opt, t, 1.5)
        opt.step(metric=t)
    accumulate(opt, 4, 0.5)
    opt.param_groups[2]["lr"] = 0.0625
    return opt


def finish(opt):
    accumulate(opt, 4, 1.5)
    opt.step(metric=4)
    accumulate(opt, 5, 1.0)
    opt.step(metric=5)


def sums(opt):
    """A sum of the bits of every array, each weighted by its place."""
    found = {"t": opt.t, "skipped_steps": opt.skipped_steps}
    for i, group in enumerate(opt.state_dict()["groups"]):
        arrays = {**group["arrays"], "params": flat(opt.param_groups[i]["params"])}
        for name, array in arrays.items():
            bits = np.ascontiguousarray(array).view("u1").astype("u8")
            found[f"{i}.{name}"] = int((bits * np.arange(1, bits.size + 1, dtype="u8")).sum())
    return found


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_a_checkpoint_of_version_1_steps_on_to_known_bits(kind):
    opt = build(0.0)
    opt.load(DATA / f"checkpoint-v1.{kind}")
    assert (opt.t, opt.pending, opt.skipped_steps, opt.loss_scale) == (3, 1, 1, 32768)
    assert opt.param_groups[0].schedules["lr"].schedules[0].best == 0
    assert [group["lr"] for group in opt.param_groups] == [0.03125, 0.25, 0.0625]
    assert opt.param_groups[1]["betas"] == (0.375, 0.75)
    assert sums(opt)["0.ema"] == LOADED_AVERAGE
    finish(opt)
    assert sums(opt) == KNOWN | {"0.ema": AVERAGES["on from the file"]}


def test_the_frozen_run_is_the_uninterrupted_one():
    opt = begin()
    finish(opt)
    assert sums(opt) == KNOWN | {"0.ema": AVERAGES["uninterrupted"]}

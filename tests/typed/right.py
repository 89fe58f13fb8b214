"""Calls in which a type checker must find nothing; test_typing.py has it look.  It is read, and never run."""

from typing import Unpack

import numpy as np

import adaptive_c as ac
from adaptive_c.typing import Group, Params, Shared

w = np.ones(3, "float32")
matrix: np.ndarray[tuple[int, int], np.dtype[np.float32]] = np.ones((2, 3), "float32")

# parameters
ac.AdamW(w)
ac.AdamW([w, matrix])
ac.AdamW((w, matrix))
ac.AdamW({"w": w, "b": matrix})
ac.AdamW({3: np.zeros(3), "b": matrix})
ac.AdamW(np.memmap("file", "float32"))
ac.AdamW([np.memmap("file", "float32")])
ac.AdamW([{"params": w}, {"params": [w, matrix], "lr": 0.1}, {"params": {"w": w}, "betas": (0.9, 0.99)}])
groups: list[Group] = [{"params": w, "weight_decay": 0.0, "bounds": (0.0, None), "rows": "exact"}]
ac.AdamW(groups)
opt = ac.AdamW(w)
opt.add_param_group({"params": matrix, "eps_mode": "hat", "ema_decay": ac.schedules.linear(0.9, 100)})

# numbers, schedules and pairs
ac.SGD(w, 0.1, 0.9, nesterov=True)
ac.SGD(w, lr=np.float32(0.1), momentum=np.float64(0.9), weight_decay=1)
ac.SGD(w, lr=ac.schedules.warmup(ac.schedules.cosine(1e-3, 1000), 10), momentum=lambda t: 0.9)
ac.Adam(w, betas=(0.9, ac.schedules.constant(0.999)), eps_mode="inside", second_moment="row", amsgrad=True)
ac.Adam(w, betas=[0.9, 0.999])
ac.Rprop(w, etas=(0.5, 1.2), step_sizes=(1e-6, 50), variant="rprop+")
ac.Adagrad(w, initial_accumulator_value=0.1)

# options of every rule
ac.Lion(w, n_threads=None, max_grad_norm=1.0, norm_over="array", max_grad_value=0.5, on_nonfinite="skip")
ac.Yogi(w, loss_scale="dynamic", zero_grad=True, cast=True, keep_undo=True, flush_denormals=True, seed=3)
ac.Yogi(w, state_path="folder", state_memory=1 << 20, state_parameters=True)
ac.AdaBelief(w, ema_decay=0.99, bounds=(None, 1.0), sum_to_one="project", rows="exact", copy_to=np.empty(3, "float16"))
ac.Adam([w, matrix], bounds=([w, matrix], None), copy_to=[w, matrix])
ac.Adam({"w": w}, bounds=[{"w": w}, 1.0], sum_to_one=True)
ac.RAdam(w, state_dtype="uint8", master=None, rounding=None, uint16_as="bfloat16", max_grad_norm=lambda t: 1.0 + t)
ac.NAdam(w, state_dtype=np.dtype("float32"), master="float32")
ac.NAdam(w, state_dtype=np.float32, loss_scale=1024)


def made(params: Params, **options: Unpack[Shared]) -> ac.Optimizer:
    return ac.AdamW(params, lr=1e-3, **options)


made([w], max_grad_norm=1.0)

# attributes
opt.max_grad_norm = 1.0
opt.max_grad_norm = None
opt.max_grad_norm = ac.schedules.constant(1.0)
opt.norm_over = "group"
opt.on_nonfinite = "raise"
opt.loss_scale = 1024
opt.loss_scale *= 2
opt.zero_grad = True
opt.zero_grad()
opt.seed, opt.t, opt.n_threads = 3, 4, 2
opt.param_groups[0]["lr"] = 0.1
number: float = opt.loss_scale + opt.grad_norm
count: int = opt.t + opt.pending + opt.skipped_steps + opt.nbytes + opt.seed
moments = opt.state["exp_avg"]
opt.step(w, lr=0.1, loss_scale=2.0)
opt.step(target=w)
with opt.stepping() as now:
    now(w)
ac.minimize(lambda x, out: 0.0, w, jac="out", average="last")
ac.minimize(lambda x: 0.0, w, jac=lambda x: x, average=0.9)
ac.schedules.plateau(1.0, mode="max", threshold_mode="abs")
opt.state_dict(format="torch")
result = ac.minimize(lambda x: (0.0, x), w, jac=True, lr=0.1)
flat, views = ac.flatten({"w": w})
opt.step(ac.Rows(np.array([0, 1]), matrix, weights=w))

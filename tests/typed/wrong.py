"""Calls that a type checker must refuse, one on each line that ends with E and on no other: see test_typing.py."""

import numpy as np

import adaptive_c as ac
from adaptive_c.typing import Group

w = np.ones(3, "float32")
opt = ac.AdamW(w)

# parameters
ac.AdamW([1.0])  # E
ac.AdamW(1.0)  # E
ac.AdamW("w")  # E
ac.AdamW()  # E
ac.AdamW({"w": 1.0})  # E
ac.AdamW([{"params": w, "lrr": 0.1}])  # E
ac.AdamW([{"lr": 0.1}])  # E
ac.AdamW([{"params": w, "eps_mode": "within"}])  # E
ac.AdamW([{"params": w, "max_grad_norm": 1.0}])  # E
opt.add_param_group({"params": w, "beta": (0.9, 0.99)})  # E
group: Group = {"params": w, "rows": "eager"}  # E

# options of a rule
ac.AdamW(w, learning_rate=0.1)  # E
ac.AdamW(w, lr="0.1")  # E
ac.AdamW(w, lr=None)  # E
ac.AdamW(w, 0.1, (0.9, 0.999, 0.9))  # E
ac.AdamW(w, betas=0.9)  # E
ac.AdamW(w, eps_mode="within")  # E
ac.AdamW(w, second_moment="column")  # E
ac.AdamW(w, amsgrad="yes")  # E
ac.AdamW(w, decoupled_weight_decay=True)  # E
ac.Rprop(w, variant="irprop")  # E
ac.SGD(w, lr=lambda: 0.1)  # E
ac.Momentum(w, dampening=0.1)  # E

# options of every rule
ac.AdamW(w, max_grad_nrom=1.0)  # E
ac.AdamW(w, max_grad_norm="1")  # E
ac.AdamW(w, norm_over="layer")  # E
ac.AdamW(w, on_nonfinite="stop")  # E
ac.AdamW(w, loss_scale="static")  # E
ac.AdamW(w, state_dtype="int8")  # E
ac.AdamW(w, master="float64")  # E
ac.AdamW(w, rounding="nearest")  # E
ac.AdamW(w, uint16_as="float16")  # E
ac.AdamW(w, sum_to_one="divided")  # E
ac.AdamW(w, rows="eager")  # E
ac.AdamW(w, bounds=0.5)  # E
ac.AdamW(w, copy_to="float16")  # E
ac.AdamW(w, zero_grad="no")  # E
ac.AdamW(w, n_threads=2.5)  # E
ac.AdamW(w, seed="3")  # E

# attributes
opt.lr = 0.1  # E
opt.learning_rate = 0.1  # E
opt.max_grad_nrom = 1.0  # E
opt.norm_over = "layer"  # E
opt.loss_scale = "dynamic"  # E
opt.on_nonfinite = "stop"  # E
opt.grad_norm = 1.0  # E
opt.t = "3"  # E
print(opt.lr)  # E
opt.update(w)  # E
opt.step(w, lr="0.1")  # E
opt.state_dict(format="keras")  # E

# what else takes words
ac.minimize(lambda x: 0.0, w, jac="yes")  # E
ac.minimize(lambda x: (0.0, x), w, jac=True, average="mean")  # E
ac.schedules.one_cycle(1.0, 10, anneal_strategy="sine")  # E
ac.schedules.plateau(1.0, mode="lowest")  # E

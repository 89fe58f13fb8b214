"""As wrong.py, for the classes of adaptive_c.torch; and what only a checker refuses that knows PyTorch's classes."""

import torch

from adaptive_c.torch import AdamW, Lion, Rprop, in_backward

w = torch.ones(3, requires_grad=True)
opt = AdamW([w])

AdamW([1.0])  # E with torch
AdamW(3)  # E
AdamW([w], learning_rate=0.1)  # E
AdamW([w], lr="0.1")  # E with torch
AdamW([w], max_grad_nrom=1.0)  # E
AdamW([w], state_dtype="int8")  # E with torch
AdamW([w], eps_mode="within")  # E
AdamW([w], rows="eager")  # E
AdamW([w], loss_scale=2.0)  # E
AdamW([w], bounds=(0, 1, 2))  # E
Lion([w], norm_over="layer")  # E
Lion([w], amsgrad=True)  # E
Rprop([w], variant="irprop")  # E

opt.lr = 0.1  # E with torch
opt.max_grad_nrom = 1.0  # E with torch
opt.norm_over = "layer"  # E
opt.t = 3  # E
opt.rollback()  # E with torch
in_backward(w)  # E with torch

"""As right.py, for the classes of adaptive_c.torch."""

import torch

from adaptive_c.torch import SGD, Adam, AdamW, Lion, Rprop, in_backward

model = torch.nn.Linear(3, 2)
opt = AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0, state_dtype="uint8", foreach=False)
AdamW(model.named_parameters(), 1e-3, (0.9, 0.99), 1e-8, 0.01, True, state_dtype=torch.bfloat16, rows="exact")
SGD([{"params": model.parameters(), "lr": 0.1}], 0.1, 0.9, nesterov=True, bounds=(0, None), rounding="stochastic")
Adam(model.parameters(), lr=torch.tensor(1e-3), eps_mode="hat", second_moment="row", fused=True, master="float32")
Lion([torch.ones(3)], ema_decay=0.99, norm_over="group", on_nonfinite="skip", zero_grad=True, seed=3, n_threads=2)
Rprop([torch.ones(3)], etas=(0.5, 1.2), variant="rprop+", flush_denormals=True, max_grad_value=1.0)

opt.max_grad_norm = None
opt.on_nonfinite = "raise"
opt.n_threads = 4
opt.param_groups[0]["lr"] = 0.1
opt.step()
opt.zero_grad(set_to_none=True)
norm: float = opt.grad_norm
in_backward(opt).remove()
torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10).step()

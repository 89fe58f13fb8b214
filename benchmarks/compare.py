"""The README's figures: this library against torch's fused AdamW, DeepSpeed's CPUAdam and the machine's ceiling.

    pip install . torch
    pip install --no-deps deepspeed && pip install hjson py-cpuinfo pydantic tqdm msgpack einops ninja psutil
    pip install --no-deps bitsandbytes
    python benchmarks/compare.py [sizes] [lists] [whole] [formats] [rules] [--rounds 15] [--json FILE]

Each contender lives in a process of its own (several OpenMP runtimes in one process disturb each other) and holds its
own arrays; the contenders of a row run in turn, round after round, and only ratios between medians of one row count.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import numpy as np

SIZES = [1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 24, 1 << 26]
RULES = [
    ("SGD", {}), ("SGD", {"momentum": 0.9}), ("Momentum", {}), ("Adagrad", {}), ("RMSprop", {}),
    ("RMSprop", {"momentum": 0.9, "centered": True}), ("Adadelta", {}), ("Adam", {}), ("Adam", {"amsgrad": True}),
    ("AdamW", {}), ("Adamax", {}), ("NAdam", {}), ("RAdam", {}), ("Lion", {}), ("Rprop", {}), ("SuperSAB", {}),
]  # fmt: skip


# --- the contenders: functions that take a list of sizes and return a function that takes one step -------------------


def arrays(sizes):
    rng = np.random.default_rng(0)
    return [[rng.random(n, "float32") * np.float32(scale) for n in sizes] for scale in (1.0, 1e-6)]


def ours(sizes, rule="AdamW", options=None):
    import adaptive_c as ac
    from adaptive_c._config import core

    p, g = arrays(sizes)
    p, g = (p[0], g[0]) if len(sizes) == 1 else (p, g)
    opt = getattr(ac, rule)(p, lr=1e-6, **(options or {}))
    if len(sizes) == 1:  # the ceiling is measured in the same process, on the same arrays
        states = tuple(slot for slot in opt.param_groups[0]._slots if slot is not None)
        STEPS["ceiling"] = lambda: core.ceiling(p, g, states)
    return lambda: opt.step(g)


def torch_fused(sizes):
    import torch

    p, g = ([torch.from_numpy(a) for a in part] for part in arrays(sizes))
    for x, y in zip(p, g, strict=True):
        x.requires_grad = True
        x.grad = y
    return torch.optim.AdamW(p, lr=1e-6, fused=True).step


def deepspeed(sizes):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import torch
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    p, g = ([torch.from_numpy(a) for a in part] for part in arrays(sizes))
    p = [torch.nn.Parameter(x) for x in p]
    for x, y in zip(p, g, strict=True):
        x.grad = y
    return DeepSpeedCPUAdam(p, lr=1e-6, weight_decay=0.01).step


def whole_step(sizes):
    import adaptive_c as ac

    (p,), (g,) = arrays(sizes)
    opt = ac.AdamW(p, lr=1e-6, loss_scale=1024.0, max_grad_norm=1.0, ema_decay=0.999, zero_grad=True,
                   copy_to=np.empty(p.shape, "uint16"), uint16_as="bfloat16")  # fmt: skip
    return lambda: opt.step(g)


def torch_whole_step(sizes):
    import torch

    p, g = (torch.from_numpy(part[0]) for part in arrays(sizes))
    p.requires_grad, p.grad = True, g
    opt = torch.optim.AdamW([p], lr=1e-6, fused=True)
    average, copy = p.detach().clone(), torch.empty(p.shape, dtype=torch.bfloat16)

    def step():
        with torch.no_grad():
            p.grad.mul_(1 / 1024)
            torch.nn.utils.clip_grad_norm_([p], 1.0)
            opt.step()
            average.lerp_(p, 1e-3)
            copy.copy_(p)
            p.grad.zero_()

    return step


def narrow(parameters="float32", state=None):
    """AdamW with narrow numbers; parameters and gradients are of one format."""

    def build(sizes):
        import adaptive_c as ac

        (p,), (g,) = arrays(sizes)
        if parameters == "bfloat16":
            p, g = ((x.view("uint32") >> 16).astype("uint16") for x in (p, g))
        rounding = None if parameters == "float32" else "stochastic"
        opt = ac.AdamW(p, lr=1e-6, state_dtype=state, rounding=rounding, uint16_as="bfloat16")
        return lambda: opt.step(g)

    return build


def torch_bfloat16(sizes):
    import torch

    p, g = (torch.from_numpy(part[0]).bfloat16() for part in arrays(sizes))
    p.requires_grad, p.grad = True, g
    return torch.optim.AdamW([p], lr=1e-6, fused=True).step


def bitsandbytes(sizes):
    import torch
    from bitsandbytes.optim import AdamW8bit

    p, g = (torch.from_numpy(part[0]) for part in arrays(sizes))
    p = torch.nn.Parameter(p)
    p.grad = g
    return AdamW8bit([p], lr=1e-6, weight_decay=0.01).step


CONTENDERS = {
    "ours": ours,
    "torch": torch_fused,
    "deepspeed": deepspeed,
    "whole": whole_step,
    "torch whole": torch_whole_step,
    "uint8": narrow(state="uint8"),
    "bfloat16": narrow(state="bfloat16"),
    "all bfloat16": narrow("bfloat16", "bfloat16"),
    "torch bfloat16": torch_bfloat16,
    "bitsandbytes": bitsandbytes,
}
STEPS = {}  # what a contender's process can time


def work():
    """A contender's process: obeys lines of JSON, answers on the real standard output with seconds per step."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to standard error
    for line in sys.stdin:
        order = json.loads(line)
        if "build" in order:
            try:
                STEPS[order["build"]] = CONTENDERS[order["build"]](*order["args"])
                result = list(STEPS)
            except ImportError as error:
                result = f"missing: {error}"
        else:
            step = STEPS[order["time"]]
            step()
            start = time.perf_counter()
            for _ in range(order["repeat"]):
                step()
            result = (time.perf_counter() - start) / order["repeat"]
        print(json.dumps(result), file=answer, flush=True)


class Contender:
    def __init__(self, name):
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def ask(self, **order):
        print(json.dumps(order), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        return json.loads(line) if line else "missing: the process died"


def measure(names, args, n, rounds):
    """Medians in seconds of each contender, the contenders in turn."""
    contenders = [Contender(name) for name in names]
    times = {}
    for contender in contenders:
        steps = contender.ask(build=contender.name, args=args)
        if isinstance(steps, str):
            print(f"  {contender.name}: {steps}")
        else:
            times |= {(contender, step): [] for step in steps}
    repeat = max(2, min(2000, int(2e7 / n)))
    for _ in range(rounds):
        for (contender, step), seconds in times.items():
            time.sleep(0.02)  # until the last one's threads have stopped spinning
            seconds.append(contender.ask(time=step, repeat=repeat))
    for contender in contenders:
        contender.process.stdin.close()
        contender.process.wait()
    return {step: statistics.median(seconds) for (_, step), seconds in times.items()}


def show(label, n, medians):
    mine = next(name for name in medians if name != "ceiling")
    ours = medians[mine]
    ratios = "  ".join(f"{name} {seconds / ours:6.2f}x" for name, seconds in medians.items() if name != mine)
    print(f"{label:34} {ours * 1e6:10.2f} us {ours / n * 1e9:7.3f} ns/element  {ratios}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=["sizes", "lists", "whole", "formats", "rules"],
                        help="sizes, lists, whole, formats or rules; all of them unless named")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each row (15)")
    parser.add_argument("--json", help="a file for the medians, in seconds")
    options = parser.parse_args()
    results = []

    def row(label, names, args, n):
        medians = measure(names, args, n, options.rounds)
        results.append({"label": label, "n": n, **medians})
        show(label, n, medians)

    print("time of one step; x: how many times longer the others take (ceiling: the share of it that we reach)")
    if "sizes" in options.rows:
        for n in SIZES:
            row(f"AdamW float32 {n}", ["ours", "torch", "deepspeed"], [[n]], n)
    if "lists" in options.rows:
        row("AdamW 10,000 x 1,000", ["ours", "torch"], [[1000] * 10000], 10**7)
    if "whole" in options.rows:  # unscale, clip, AdamW, average, bfloat16 copy, zero
        row("whole step float32 67108864", ["whole", "torch whole"], [[1 << 26]], 1 << 26)
    if "formats" in options.rows:
        n = 1 << 26
        row("AdamW uint8 state", ["uint8", "torch"], [[n]], n)
        row("AdamW bfloat16 state", ["bfloat16", "torch"], [[n]], n)
        row("AdamW all bfloat16", ["all bfloat16", "torch", "torch bfloat16"], [[n]], n)
        row(f"AdamW uint8 state {n >> 2}", ["uint8", "torch"], [[n >> 2]], n >> 2)
        row("AdamW uint8 state, bitsandbytes", ["uint8", "bitsandbytes"], [[n]], n)
    if "rules" in options.rows:
        for rule, arguments in RULES:
            label = " ".join([rule, *(f"{k}={v}" for k, v in arguments.items())])
            row(label, ["ours"], [[1 << 26], rule, arguments], 1 << 26)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    work() if sys.argv[1:] == ["--work"] else main()

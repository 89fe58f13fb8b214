"""How fast checkpoints are written and read beside the disk's own sequential speed, and what memory that takes.

python benchmarks/checkpoint.py [--elements N] [--rounds N] [--folder PATH] [--format safetensors|npz]

Each round writes and reads a file of the same size with dd, then a checkpoint of AdamW over N float32 elements, twelve
bytes each: dd with fsync against save, and dd against load, the file's pages dropped from the cache before either.
Medians of the rounds; only the ratios count.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import adaptive_c as ac


def kib(key: str) -> int:
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if key in line)


def seconds(work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def dd(*arguments: str) -> None:
    subprocess.run(["dd", "bs=4M", *arguments], check=True, capture_output=True)


def drop(path: Path) -> None:
    """Take a file's pages out of the cache; they are on the disk."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def grown(work) -> float:
    """By how many MiB the process was larger at its largest than before."""
    Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    work()
    return (kib("VmHWM") - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 26)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path.cwd())
    parser.add_argument("--format", default="safetensors", choices=["safetensors", "npz"])
    options = parser.parse_args()
    path, plain = options.folder / "benchmark.checkpoint", options.folder / "benchmark.plain"
    params = np.ones(options.elements, "f4")
    opt = ac.AdamW(params)
    opt.step(np.random.default_rng(0).standard_normal(options.elements, "f4"))
    print(f"state_dict: {1e3 * statistics.median(seconds(opt.state_dict) for _ in range(21)):.3f} ms")
    count = f"count={12 * options.elements >> 22}"
    times: dict[str, list[float]] = {"dd write": [], "save": [], "dd read": [], "load": []}
    growth: dict[str, float] = {}
    try:
        for _ in range(options.rounds + 1):
            growth["save"] = grown(lambda: times["save"].append(seconds(lambda: opt.save(path, format=options.format))))
            times["dd write"].append(seconds(lambda: dd("if=/dev/zero", f"of={plain}", count, "conv=fsync")))
            drop(plain)
            times["dd read"].append(seconds(lambda: dd(f"if={plain}", "of=/dev/null")))
            plain.unlink()
            drop(path)
            growth["load"] = grown(lambda: times["load"].append(seconds(lambda: opt.load(path))))
        size = os.path.getsize(path) / 1e9
    finally:
        for file in (path, plain):
            file.unlink(missing_ok=True)
    for ours, its in (("save", "dd write"), ("load", "dd read")):
        rounds = list(zip(times[ours][1:], times[its][1:], strict=True))
        ratio = statistics.median(b for _, b in rounds) / statistics.median(a for a, _ in rounds)
        print(
            f"{ours} {options.format}: {size / statistics.median(a for a, _ in rounds):.2f} GB/s, "
            f"{its} {size / statistics.median(b for _, b in rounds):.2f} GB/s; share {ratio:.2f}, "
            f"in single rounds {', '.join(f'{b / a:.2f}' for a, b in rounds)}; {growth[ours]:.1f} MiB of memory"
        )


if __name__ == "__main__":
    sys.exit(main())

"""How fast checkpoints are written and read compared with the disk's own sequential speed, and what memory that takes.

python benchmarks/checkpoint.py [--elements N] [--rounds N] [--folder PATH]

Each round writes and reads a checkpoint of AdamW over N float32 elements, twelve bytes each, and with dd a file of the
same size.  A save is compared with dd with fsync, a load with dd.  The pages of both files are dropped from the cache
before each measurement.  Medians of the rounds are shown; only the ratios count.
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
    """Drop a file's pages from the cache.  They must be on the disk already."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def grown(work) -> float:
    """By how many MiB the process grew at most during the work."""
    Path("/proc/self/clear_refs").write_text("5")
    before = kib("VmRSS")
    work()
    return (kib("VmHWM") - before) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=1 << 26)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--folder", type=Path, default=Path.cwd())
    options = parser.parse_args()
    path, plain, new = (options.folder / f"benchmark.{name}" for name in ("checkpoint", "plain", "new"))
    params = np.ones(options.elements, "f4")
    opt = ac.AdamW(params)
    opt.step(np.random.default_rng(0).standard_normal(options.elements, "f4"))
    print(f"state_dict: {1e3 * statistics.median(seconds(opt.state_dict) for _ in range(21)):.3f} ms")
    count = f"count={12 * options.elements >> 22}"
    times: dict[str, list[float]] = {"dd write": [], "save": [], "dd read": [], "load": []}
    growth: dict[str, float] = {}
    works = {
        "save": lambda: opt.save(path),
        "dd write": lambda: dd("if=/dev/zero", f"of={new}", count, "conv=fsync"),
        "load": lambda: opt.load(path),
        "dd read": lambda: dd(f"if={plain}", "of=/dev/null"),
    }
    try:
        works["save"]()
        works["dd write"]()
        for i in range(options.rounds):
            turn = ("save", "dd write", "load", "dd read") if i % 2 else ("dd write", "save", "dd read", "load")
            for name in turn:  # each of the two writers is as often the first to come after the other one's writes
                if new.exists():
                    new.replace(plain)  # so that dd, like save, frees the overwritten file only afterwards
                time.sleep(1)  # a disk goes on writing, and freeing what was overwritten, after it says that it is done
                drop(plain)
                drop(path)
                growth[name] = grown(lambda work=works[name], its=times[name]: its.append(seconds(work)))
        size = os.path.getsize(path) / 1e9
    finally:
        for file in (path, plain, new):
            file.unlink(missing_ok=True)
    for ours, its in (("save", "dd write"), ("load", "dd read")):
        rounds = list(zip(times[ours], times[its], strict=True))
        ratio = statistics.median(b for _, b in rounds) / statistics.median(a for a, _ in rounds)
        print(
            f"{ours}: {size / statistics.median(a for a, _ in rounds):.2f} GB/s, "
            f"{its} {size / statistics.median(b for _, b in rounds):.2f} GB/s; share {ratio:.2f}, "
            f"in single rounds {', '.join(f'{b / a:.2f}' for a, b in rounds)}; {growth[ours]:.1f} MiB of memory"
        )


if __name__ == "__main__":
    sys.exit(main())

"""A step whose state is on disk, beside a bare copy of the same buckets: how much of what the disk does is left?

    python benchmarks/disk.py --folder /somewhere --elements 268435456

The copy reads and writes the same bytes, at the same places in files of the same size, through as much memory, in as
large pages, with the same syncs, by two threads: one reads ahead, one writes behind.  It computes nothing.  Both take
turns, in processes of their own, since what a disk does changes from minute to minute; the ratio is that of medians.
"""

import argparse
import json
import mmap
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time

BUFFERS = 8  # of the copy, as a step has them
BYTES = {"float32": 8, "bfloat16": 4, "uint8": 2}  # of AdamW's state, for an element


def resident():
    """Bytes of this process in memory now, and the most there ever were."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[1]) * mmap.PAGESIZE
    return now, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def step(folder, elements, state_dtype, memory, steps):
    """Times of steps, bytes of one, and how much memory it took beside parameters, gradients and Python."""
    import numpy as np

    import adaptive_c as ac

    params, grads = np.zeros(elements, "f4"), np.empty(elements, "f4")
    params[:], grads[:] = 1.0, 1e-3
    before = resident()[0]
    opt = ac.AdamW(params, state_path=folder, state_memory=memory, state_dtype=state_dtype)
    opt.step(grads)  # the first one into each file's second half, of which the system learns where it is
    written, seconds = opt.bytes_written, []
    for _ in range(steps):
        start = time.perf_counter()
        opt.step(grads)
        seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "bytes": (opt.bytes_written - written) / steps, "memory": resident()[1] - before}


def transfer(call, path, buffer, offset):
    fd = os.open(path, os.O_RDWR | getattr(os, "O_DIRECT", 0))
    try:
        view, at = memoryview(buffer), 0
        while at < len(view):
            at += call(fd, [view[at : at + (16 << 20)]], offset + at)
    finally:
        os.close(fd)


def sync(path):
    fd = os.open(path, os.O_RDWR)
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def copy(folder, steps):
    """The same files, and what is read and written of each in a step, but nothing between."""
    from concurrent.futures import ThreadPoolExecutor

    paths = sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".bucket"))
    sizes = [os.path.getsize(path) // 2 for path in paths]
    buffers = [mmap.mmap(-1, max(sizes), flags=mmap.MAP_PRIVATE | mmap.MAP_ANON) for _ in range(BUFFERS)]
    for buffer in buffers if hasattr(mmap, "MADV_HUGEPAGE") else ():
        buffer.madvise(mmap.MADV_HUGEPAGE)
    seconds = []
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        for turn in range(steps):
            start = time.perf_counter()
            slot, writes = turn % 2, [None] * len(paths)

            def read(i, slot=slot, writes=writes):
                if i >= BUFFERS and writes[i - BUFFERS] is not None:
                    writes[i - BUFFERS].result()
                transfer(os.preadv, paths[i], memoryview(buffers[i % BUFFERS])[: sizes[i]], slot * sizes[i])

            reads = [reader.submit(read, 0)]
            for i in range(len(paths)):
                reads[i].result()
                writes[i] = writer.submit(transfer, os.pwritev, paths[i], memoryview(buffers[i % BUFFERS])[: sizes[i]],
                                          (1 - slot) * sizes[i])  # fmt: skip
                if i + 1 < len(paths):
                    reads.append(reader.submit(read, i + 1))
            for write in writes:
                write.result()
            for path in paths:
                sync(path)
            seconds.append(time.perf_counter() - start)
    return {"seconds": seconds, "bytes": sum(sizes)}


def run(arguments, what, **more):
    """One process: `step` or `copy`."""
    given = [sys.executable, "-P", __file__, "--as", json.dumps({"what": what, **more})]
    out = subprocess.run(given, capture_output=True, text=True)
    if out.returncode:
        raise SystemExit(out.stderr)
    return json.loads(out.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", default=".", help="on the disk that is asked about")
    parser.add_argument("--elements", type=int, default=1 << 26)
    parser.add_argument("--steps", type=int, default=3, help="in each process")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--state", default="float32,bfloat16,uint8")
    parser.add_argument("--fraction", type=float, default=8, help="state_memory is the state divided by it")
    parser.add_argument("--as", dest="own", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.own:
        own = json.loads(arguments.own)
        print(json.dumps({"step": step, "copy": copy}[own.pop("what")](**own)))
        return
    print(f"AdamW, {arguments.elements} float32 elements, state_memory 1/{arguments.fraction:g} of the state")
    print("state      s/step  s/copy  ratio  GB/s step  GB/s copy  memory asked  taken (MiB)")
    for kind in arguments.state.split(","):
        folder = os.path.join(os.path.abspath(arguments.folder), "adaptive_c-disk-benchmark")
        memory = int(BYTES[kind] * arguments.elements / arguments.fraction)
        shutil.rmtree(folder, ignore_errors=True)
        steps, copies, taken = [], [], 0
        try:
            for _ in range(arguments.turns):
                found = run(arguments, "step", folder=folder, elements=arguments.elements, state_dtype=kind,
                            memory=memory, steps=arguments.steps)  # fmt: skip
                steps += found["seconds"]
                taken = max(taken, found["memory"])
                copied = run(arguments, "copy", folder=folder, steps=arguments.steps)
                copies += copied["seconds"]
                shutil.rmtree(folder)  # whose slots the copy has overwritten
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        a, b, size = statistics.median(steps), statistics.median(copies), copied["bytes"]
        print(f"{kind:9s} {a:7.2f} {b:7.2f}  {b / a:5.2f}  {2 * size / a / 1e9:9.2f}  {2 * size / b / 1e9:9.2f}"
              f"  {memory >> 20:12d}  {taken >> 20:5d}")  # fmt: skip


if __name__ == "__main__":
    main()

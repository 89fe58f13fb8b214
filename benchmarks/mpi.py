"""A step of several ranks: against the same by hand, and against a model of its time.

    pip install '.[mpi]' matplotlib
    python benchmarks/mpi.py [--size 16777216] [--ranks 2] [--rounds 11]      Sharded, and mpi4py's collectives by hand
    python benchmarks/mpi.py --model [--rounds 11] [--picture docs/mpi.png]   the model, on 1 to 4 ranks and beyond

By hand is what one writes with mpi4py: Reduce_scatter of the gradients, a plain step of this rank's range, Allgatherv
of the parameters.  Its sum depends on the number of ranks; that of Sharded does not.  Each contender has processes of
its own; they run in turn, and a ratio is that of neighbours in time.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

STEPS = 5  # of a contender in a round; their median counts
MESSAGES = 1000


# --- on every rank ----------------------------------------------------------------------------------------------------


def work(name, size, bucket):
    """The seconds of a step, and the bytes of state."""
    import resource

    from mpi4py import MPI

    import adaptive_c as ac
    from adaptive_c.mpi import Sharded

    comm = MPI.COMM_WORLD
    p, g = np.ones(size, "float32"), np.full(size, 1e-3, "float32")
    cuts = [size * i // comm.size for i in range(comm.size + 1)]
    counts, lo, hi = np.diff(cuts).tolist(), cuts[comm.rank], cuts[comm.rank + 1]
    if name == "ours":
        opt = Sharded(ac.AdamW, p, comm=comm, n_threads=1, bucket_bytes=bucket)
        step = lambda: opt.step(g)  # noqa: E731
    elif name == "hand":
        opt, mine = ac.AdamW(p[lo:hi], n_threads=1), np.empty(hi - lo, "float32")

        def step():
            comm.Reduce_scatter(g, mine, counts)
            opt.step(mine, loss_scale=float(comm.size))  # their mean
            comm.Allgatherv(MPI.IN_PLACE, [p, counts, cuts[:-1], MPI.FLOAT])
    elif name == "copy":  # what memory moves when all ranks copy at once
        opt, out = None, np.empty(size, "float32")
        step = lambda: np.copyto(out, g)  # noqa: E731
    elif name == "message":  # what messages cost the processor, sent to oneself
        opt, out = None, np.empty(size, "float32")

        def step():
            for _ in range(MESSAGES // 2):
                MPI.Request.Waitall([comm.Irecv([out, MPI.BYTE], comm.rank), comm.Isend([g, MPI.BYTE], comm.rank)])

    seconds = []
    for _ in range(STEPS + 1):
        comm.Barrier()
        start = time.perf_counter()
        step()
        comm.Barrier()
        seconds.append(time.perf_counter() - start)
    if comm.rank == 0:
        state = opt.nbytes if opt is not None else 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps([statistics.median(seconds[1:]), state, peak]))


def run(ranks, name, size, bucket=32 << 20):
    """The seconds of a contender in a round, the bytes of its state on rank 0, and the peak of rank 0's memory."""
    beside = Path(sys.executable).with_name("mpiexec")
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        sys.exit("there is no mpiexec; pip install '.[mpi]' brings one, which lies beside python")
    command = [mpiexec, "-n", str(ranks), sys.executable, str(Path(__file__).resolve()), "--work", name]
    out = subprocess.run([*command, "--size", str(size), "--bucket", str(bucket)], capture_output=True, text=True,
                         check=True, cwd="/", env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    return json.loads(out.stdout.splitlines()[-1])


# --- the model --------------------------------------------------------------------------------------------------------


def expected(n, ranks, link, memory, message, shared=1, bucket=None):
    """The seconds of a step of AdamW in float32: (if nothing overlaps, if everything does).

    link, memory: bytes per second, of a node in each direction, and of its memory.  message: seconds that a message
    takes the processor.  shared: the ranks of a node, which share both; where all ranks are on one node, link is inf.
    """
    others = ranks - 1
    bucket = bucket or max(32 << 20, others * 256 << 10)
    exchanged = n * others / ranks  # elements that a rank gives, and gets, and again of parameters
    network = 2 * 4 * exchanged * shared / link
    # gradients: read by the sender, written by the receiver (which reads the line first), read for the sum; the sum,
    # read and written; parameters: read and written; the share itself: the sum's first write, and AdamW's 28 bytes
    touched = exchanged * (4 + 8 + 4 + 8 + 4 + 8) + n / ranks * (12 + 28)
    buckets = -(-n / ranks // max(bucket / max(others, 1) / 4, 4096))
    overhead = 4 * buckets * others * message
    parts = network, touched * shared / memory, overhead
    return sum(parts), max(parts)


def median(rounds, *contender):
    return statistics.median([run(*contender)[0] for _ in range(rounds)])


def check_model(rounds, picture):
    message = median(rounds, 1, "message", 1 << 12) / MESSAGES
    print(f"a message costs {message * 1e6:.1f} us")
    found = []
    for ranks in (1, 2, 3, 4):
        for size in (1 << 22, 1 << 24):
            memory = ranks * size * 12 / median(rounds, ranks, "copy", size)
            seconds = median(rounds, ranks, "ours", size)
            model = expected(size, ranks, float("inf"), memory, message, shared=ranks)[0]
            found.append((ranks, size, seconds, model))
            print(f"{ranks} ranks, {size:>10,} elements, copying {memory / 1e9:4.1f} GB/s: {seconds * 1e3:6.1f} ms, "
                  f"model {model * 1e3:6.1f} ms, {seconds / model:.2f} times as long", flush=True)  # fmt: skip
    for ranks in (64, 1000):
        slow, fast = expected(10**9, ranks, 12.5e9, 100e9, message)
        print(f"expected: {ranks} ranks, 1e9 elements, 100 Gb/s: {fast:.2f} to {slow:.2f} s")
    if picture:
        draw(picture, message, found)


def draw(path, message, found):
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for size, marker in ((1 << 22, "o"), (1 << 24, "s")):
        ranks, seconds, model = zip(*[(r, s * 1e3, m * 1e3) for r, n, s, m in found if n == size], strict=True)
        left.plot(ranks, seconds, marker, label=f"measured, 2**{size.bit_length() - 1} elements")
        left.plot(ranks, model, "-", color="0.6")
    left.set(title="one machine: measured, and the model (lines)", xlabel="ranks", ylabel="ms per step", ylim=0)
    left.set_xticks([1, 2, 3, 4])
    left.legend()
    ranks = np.unique(np.geomspace(2, 1024, 60).astype(int))
    for gigabits in (25, 100, 400):
        both = [expected(10**9, int(r), gigabits / 8 * 1e9, 100e9, message) for r in ranks]
        slow, fast = zip(*both, strict=True)
        right.fill_between(ranks, fast, slow, alpha=0.35, label=f"{gigabits} Gb/s")
    right.set(title="1e9 float32 parameters, a rank on each node:\nexpected, not measured", xlabel="ranks",
              ylabel="seconds per step", xscale="log", ylim=(0, 4.5))  # fmt: skip
    right.legend(loc="upper left", title="lower edge: all overlaps\nupper edge: nothing does")
    figure.savefig(path, dpi=110)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1 << 24, help="elements (2**24)")
    parser.add_argument("--ranks", type=int, default=2, help="ranks, all on this machine (2)")
    parser.add_argument("--rounds", type=int, default=11, help="how often each contender runs (11)")
    parser.add_argument("--bucket", type=int, default=32 << 20, help="bucket_bytes (32 MiB)")
    parser.add_argument("--model", action="store_true", help="measure the model instead")
    parser.add_argument("--picture", help="draw the model into this file")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.work:
        return work(chosen.work, chosen.size, chosen.bucket)
    if chosen.model:
        return check_model(chosen.rounds, chosen.picture)
    ratios, names = [], ("ours", "hand")
    for i in range(chosen.rounds):
        found = {name: run(chosen.ranks, name, chosen.size, chosen.bucket) for name in names[:: 1 if i % 2 else -1]}
        (ours, state, peak), (hand, _, other) = found["ours"], found["hand"]
        ratios.append(ours / hand)
        print(f"ours {ours * 1e3:.1f} ms, by hand {hand * 1e3:.1f} ms: {ratios[-1]:.2f} times as long; rank 0 has "
              f"{state >> 20} MiB of state; peaks {peak >> 20} and {other >> 20} MiB", flush=True)  # fmt: skip
    ratios.sort()
    print(f"median ratio {statistics.median(ratios):.2f}, from {ratios[0]:.2f} to {ratios[-1]:.2f}")
    return None


if __name__ == "__main__":
    main()

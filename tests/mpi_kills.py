"""Runs of ranks on disk that are killed: what test_mpi.py runs on several ranks, python mpi_kills.py FOLDER NAME."""

import os
import signal
import time
import zlib

import numpy as np
from mpi_disk import MEMORY
from mpi_ranks import COMM, FOLDER, RANK, SIZE, N, cut, main, numbers
from support import assert_same_bits

import adaptive_c as ac
from adaptive_c.mpi import Sharded

LAST = SIZE - 1


def of_killed(flat):
    return Sharded(ac.AdamW, cut(flat), comm=COMM, state_path=FOLDER / "killed", state_memory=2 * MEMORY,
                   state_parameters=True, max_grad_norm=1.0, ema_decay=0.9, lr=0.05, keep_undo=True)  # fmt: skip


def of_killed_alone(flat):
    return ac.AdamW(cut(flat), max_grad_norm=1.0, ema_decay=0.9, lr=0.05, keep_undo=True)


def gradient(t, rank):
    return cut(numbers([t, rank], N))


def expected():
    """The checksum of the parameters after each step, of one process."""
    flat = numbers(0, N)
    opt = of_killed_alone(flat)
    print(zlib.crc32(flat))
    for t in range(int(os.environ["STEPS"])):
        for rank in range(int(os.environ["RANKS"])):
            opt.accumulate(gradient(t, rank))
        opt.step()
        print(zlib.crc32(flat))


def going_on():
    """Go on from the folder; rank 0 says which processes these are, and after each step "t checksum"."""
    flat = numbers(0, N)
    opt = of_killed(flat)
    assert len(set(COMM.allgather((opt.t, zlib.crc32(flat))))) == 1
    pids = COMM.gather(os.getpid())
    if RANK == 0:
        print(*pids, flush=True)
    while opt.t <= int(os.environ["STEPS"]):
        if RANK == 0:
            print(opt.t, zlib.crc32(flat), flush=True)
        opt.step(gradient(opt.t, RANK))


def killed_between_records():
    """The last rank is killed when the others have put their record of the second step into place, and it has not."""
    opt = of_killed(numbers(0, N))
    opt.step(gradient(0, RANK))
    killed_between(lambda: opt.step(gradient(1, RANK)))


def killed_between(call):
    """The same of a call, whose record has the first of the two names."""
    others = [FOLDER / "killed" / f"{rank}-of-{SIZE}" / "record" for rank in range(LAST)]
    was = [path.stat().st_ino for path in others]
    COMM.Barrier()
    replace = os.replace

    def instead(old, new):
        if RANK == LAST:
            while any(path.stat().st_ino == ino for path, ino in zip(others, was, strict=True)):
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGKILL)
        replace(old, new)

    os.replace = instead
    call()
    print("it believes that it has returned", flush=True)


def rolled_back():
    """The third step is undone, when the last rank is killed between the two records of that."""
    opt = of_killed(numbers(0, N))
    for t in range(3):
        opt.step(gradient(t, RANK))
    killed_between(opt.rollback)


def resumed(steps=1):
    """After that, all ranks have the first step, and go on from it."""
    flats = np.zeros(N, "float32"), numbers(0, N)
    opt, alone = of_killed(flats[0]), of_killed_alone(flats[1])
    assert opt.t == steps
    for t in range(steps + 2):
        for rank in range(SIZE):
            alone.accumulate(gradient(t, rank))
        alone.step()
        if t >= steps:
            opt.step(gradient(t, RANK))
        if t >= steps - 1:
            assert_same_bits(*flats)
        if t >= steps:
            alone.rollback()
            opt.rollback()
            assert_same_bits(*flats)
            opt.step(gradient(t, RANK))
            for rank in range(SIZE):
                alone.accumulate(gradient(t, rank))
            alone.step()


def resumed_after_rollback():
    """All ranks have the step that was to be undone."""
    resumed(3)


if __name__ == "__main__":
    for _name in ("fsync", "fdatasync"):  # a kill does not lose what the system has
        setattr(os, _name, lambda fd: None)
    main(globals())

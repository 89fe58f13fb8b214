"""Kills a run on disk again and again: python disk_kills.py folder random count | every.

Each run is a fork of this process, which has loaded everything and started no thread.  It goes on from the folder, whose
steps and parameters must be those of a run in memory: at least what the last one has reported, at most one step more.
"random": killed after a random time.  "every": once at each call by which it changes the disk, from a new folder to
the end of some steps; half of what a call would write is written then.
"""

import functools
import os
import random
import shutil
import signal
import struct
import sys
import time

import disk_steps
import numpy as np

import adaptive_c as ac
import adaptive_c._disk.pages  # here, not in each of the forks

CALLS = (
    "pwritev",
    "pwrite",
    "fdatasync",
    "fsync",
    "replace",
    "posix_fallocate",
    "ftruncate",
    "unlink",
    "mkdir",
    "open",
)
LINE = struct.Struct("qI")  # t, checksum


start, gradients = functools.cache(disk_steps.start), functools.cache(disk_steps.gradients)  # forks have them already


def copies(arrays):
    return [x.copy() for x in arrays]


def expected(steps):
    params = copies(start())
    opt = ac.AdamW(params, n_threads=1, **disk_steps.OPTIONS)
    found = [disk_steps.checksum(params)]
    for t in range(steps):
        opt.step(gradients(t))
        found.append(disk_steps.checksum(params))
    return found


def run(folder, steps, pipe, kill_at):
    """In the child: go on to the end, and report each step; killed at the call of this number."""
    calls = 0

    def watched(call):
        def instead(*args, **kwargs):
            nonlocal calls
            if call.__name__ != "open" or args[1] & os.O_CREAT:
                calls += 1
                if calls == kill_at:
                    if call.__name__ == "pwritev":
                        call(args[0], [args[1][0][: len(args[1][0]) // 8192 * 4096]], args[2])
                    os.kill(os.getpid(), signal.SIGKILL)
                    time.sleep(60)  # the signal comes to another thread first
            if "sync" not in call.__name__:  # a kill does not lose what the system has
                return call(*args, **kwargs)
            return None

        return instead

    for name in CALLS:
        setattr(os, name, watched(getattr(os, name)))
    params = [np.zeros_like(x) for x in start()]
    if not os.path.exists(os.path.join(folder, "record")):
        params = copies(start())
    opt = disk_steps.construct(folder, params)
    while True:
        os.write(pipe, LINE.pack(opt.t, disk_steps.checksum(params)))
        if opt.t == steps:
            return
        opt.step(gradients(opt.t))


def child(folder, steps, kill=None, kill_at=0):
    """One run; what it reported, and whether it reached its end.  kill(pipe): waits until it is to be killed."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(read)
            run(folder, steps, write, kill_at)
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with open(read, "rb", buffering=0) as file:
        found = b""
        if kill is not None:
            found = kill(file)
            os.kill(pid, signal.SIGKILL)
        while more := file.read():
            found += more
        lines = list(LINE.iter_unpack(found))
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), f"a run ended with {code}"
    return lines, code == 0


class Check:
    """What runs of one folder report, held to the run in memory."""

    def __init__(self, want):
        self.want, self.reached = want, 0

    def __call__(self, lines):
        for i, (t, crc) in enumerate(lines):
            assert crc == self.want[t], f"the parameters of step {t} are others"
            if i == 0:
                assert self.reached <= t <= self.reached + 1, f"step {self.reached} was there, it went on from {t}"
            self.reached = t


def at_random(folder, count):
    steps = 40
    want, rng, kills, finished = expected(steps), random.Random(1), 0, 0

    def soon(pipe):
        """After a random time from the beginning on, or, most often, from where it has opened the folder."""
        found = pipe.read(LINE.size) if rng.random() < 0.85 else b""
        time.sleep(rng.uniform(0, 0.03))
        return found

    while True:
        shutil.rmtree(folder, ignore_errors=True)
        check, done = Check(want), False
        while not done:
            lines, done = child(folder, steps, soon if kills < count else None)
            check(lines)
            kills += not done
        finished += 1
        if kills >= count:
            break
    print(f"{kills} kills, {finished} runs to the end")


def at_every_call(folder):
    steps = 2
    want, n, done = expected(steps), 0, False
    while not done:
        n += 1
        shutil.rmtree(folder, ignore_errors=True)
        check = Check(want)
        lines, done = child(folder, steps, kill_at=n)
        check(lines)
        lines, ended = child(folder, steps)
        assert ended, "it was not killed, and did not end"
        check(lines)
    print(f"{n - 1} kills")


if __name__ == "__main__":
    if sys.argv[2] == "random":
        at_random(sys.argv[1], int(sys.argv[3]))
    else:
        at_every_call(sys.argv[1])

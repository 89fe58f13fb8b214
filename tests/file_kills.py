"""Kills writers of a checkpoint, at one place of a save after the other; the next goes on from the file."""

import operator
import os
import signal
from pathlib import Path

import numpy as np
from support import at

import adaptive_c as ac
from adaptive_c._checkpoint import file


def main(folder):
    path, n = Path(folder, "a"), 5000
    grad = np.full(n, -1.0)
    file._PIECE = 1 << 12  # many pieces
    file._start = lambda f, *args: False  # so that every save has the same places
    os.fsync = (
        operator.index
    )  # a place as before, without the wait for a disk: a kill does not lose what the system has

    def fresh():
        p = np.zeros(n)
        return p, ac.SGD(p, lr=1.0, momentum=1.0, n_threads=1)

    p, opt = fresh()
    opt.save(path)
    status = signal.SIGKILL
    last = leftovers = place = 0
    while status == signal.SIGKILL:
        p, opt = fresh()
        opt.load(path)
        # the buffer after step t is -t, so p is 1 + 2 + ... + t: a mixture of two steps would show
        assert opt.t in (last, last + 1)
        assert (p == opt.t * (opt.t + 1) / 2).all()
        if opt.t:
            assert (opt.state["momentum_buffer"] == -opt.t).all()
        last = opt.t
        place += 2
        pid = os.fork()
        if pid == 0:
            try:
                opt.step(grad)
                at(place, lambda: opt.save(path), lambda: os.kill(os.getpid(), signal.SIGKILL))  # noqa: B023
            finally:
                os._exit(0)
        status = os.waitpid(pid, 0)[1]
        leftovers += len(os.listdir(folder)) - 1
    assert status == 0  # it had no such place, and came to its end
    assert leftovers > 20  # killed while a file was being written
    assert last > 0  # and others had been finished
    opt.save(path)

"""A run on disk that goes on from wherever it is, for tests that kill it: python disk_steps.py folder steps [options].

With each step it writes a line, "t checksum of the parameters", so that a test can see how far it got.
"""

import json
import os
import sys
import zlib

import numpy as np

import adaptive_c as ac

SHAPES = ((70, 90), (5000,), (9000,), ())
OPTIONS = {"ema_decay": 0.9, "max_grad_norm": 1.0, "lr": 0.05}


def start():
    rng = np.random.default_rng(0)
    return [np.asarray(rng.normal(size=shape)).astype("f4") for shape in SHAPES]


def gradients(t):
    """Those of step t + 1; some are missing, so that buckets stay as they are in some steps."""
    rng = np.random.default_rng(t + 1)
    grads = [np.asarray(rng.normal(size=shape)).astype("f4") for shape in SHAPES]
    return [None if t % 3 == 1 and i == 2 else g for i, g in enumerate(grads)]


def construct(folder, params, **options):
    return ac.AdamW(params, state_path=folder, state_memory=230_000, state_parameters=True, **OPTIONS, **options)


def checksum(params):
    crc = 0
    for x in params:
        crc = zlib.crc32(np.ascontiguousarray(x), crc)
    return crc


def main(folder, steps, options):
    if options.pop("unsynced", False):  # a kill does not lose what the system has
        os.fsync = os.fdatasync = lambda fd: None
    params = [np.zeros_like(x) for x in start()]
    if not os.path.exists(os.path.join(folder, "record")):
        params = start()
    opt = construct(folder, params, **options)
    print(opt.t, checksum(params), flush=True)
    while opt.t < steps:
        opt.step(gradients(opt.t))
        print(opt.t, checksum(params), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]) if len(sys.argv) > 3 else {})

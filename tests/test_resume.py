"""Resuming is not noticeable: other process, instruction set, number of threads and cut; the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cases import CASES
from resume import FORMATS, GRID, STEPS, Run
from support import assert_same_bits

import adaptive_c as ac
from adaptive_c import _native

BUILDS = [level for level in reversed(_native.LEVELS) if level not in _native.unused_levels]
PLACES = [(BUILDS[0], 1), (BUILDS[-1], 3), (BUILDS[len(BUILDS) // 2], 2)]


@pytest.mark.parametrize("place", range(3), ids=[f"{level}-{threads}" for level, threads in PLACES])
def test_resumed_in_a_new_process(place, tmp_path):
    level, threads = PLACES[place]
    numbers = range(place, len(GRID), len(PLACES))
    expected, seen = {}, set()
    ac.set_num_threads(2)
    for number in numbers:
        run = Run(number, 1)
        for tick in range(STEPS * run.calls + 1):
            if tick == run.stop:
                run.opt.save(tmp_path / f"{number}.in")
                seen |= {*run.opt.param_groups[0].schedules, run.metric and "metric"}
                seen |= {run.opt.pending and "sums", run.opt.loss_scale < 65536 and run.scale}
            if tick < STEPS * run.calls:
                run.go()
        expected[number] = run.result()
    ac.set_num_threads(None)
    assert seen >= {"lr", "betas", "ema_decay", "metric", "sums", "dynamic"}
    program = str(Path(__file__).with_name("resume.py"))
    command = [sys.executable, program, str(tmp_path), str(threads), *map(str, numbers)]
    environment = {**os.environ, "ADAPTIVE_C_ISA": level}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for number, wanted in expected.items():
        with np.load(tmp_path / f"{number}.npz", allow_pickle=False) as found:
            assert set(found.files) == wanted.keys()
            for name, array in wanted.items():
                what = f"case {number}, {CASES[GRID[number][0]][0]} {FORMATS[GRID[number][1]]}: {name}"
                if array.dtype.kind == "U":
                    assert str(found[name]) == str(array), what
                else:
                    assert_same_bits(found[name], array, what)


def test_every_rule_and_format_is_resumed():
    assert {CASES[i][1] for i, _ in GRID} == set(ac.optimizers.__all__)
    assert {j for _, j in GRID} == set(range(len(FORMATS)))

"""Steps of ranks undone, in memory and on disk: what test_mpi.py runs on several ranks, python mpi_rollback.py FOLDER.

It is run as mpi_ranks.py is, and uses what that and mpi_disk.py have.
"""

import copy
import errno
import os

import numpy as np
from mpi_disk import LAST, MEMORY, ctrl_c, disk_pair, failing, fails, grads_of, reopen
from mpi_ranks import RANK, SIZE, N, Pair, bfloat16, cut, main, numbers, refused, table
from support import assert_same_bits

import adaptive_c as ac


def undone(pair, grads, what="", **call):
    """A step is undone, made again, undone again, and another one is made."""
    before = pair.flats[0].copy()
    for _ in range(2):
        pair.step(copy.deepcopy(grads), **call)  # which are zeroed under zero_grad
        pair.check(f"{what}: stepped")
        pair.rollback()
        pair.check(f"{what}: undone")
        assert_same_bits(pair.flats[0], before, what)
    pair.step(copy.deepcopy(grads[::-1]), **call)
    pair.check(f"{what}: another step")


def test_rollback():
    """Of every format and stage, with the bits of one process."""
    cases = [
        ("float32", ac.AdamW, {"max_grad_norm": 1.0, "norm_over": "array", "ema_decay": 0.9}),
        ("float64", ac.NAdam, {"bounds": (-1.0, None), "bucket_bytes": 1}),
        ("float32", ac.Adam, {"state_dtype": "uint8", "amsgrad": True, "on_nonfinite": "skip"}),
        ("bfloat16", ac.AdamW, {"master": "float32", "ema_decay": 0.5, "bucket_bytes": 1}),
        ("float16", ac.Adagrad, {"rounding": "stochastic", "state_dtype": "bfloat16"}),
        ("float32", ac.SGD, {"loss_scale": "dynamic", "zero_grad": True, "momentum": 0.9}),
        ("float32", ac.Rprop, {}),
    ]
    for i, (dtype, cls, options) in enumerate(cases):
        start = numbers(i, N, dtype="float64")
        start = bfloat16(start) if dtype == "bfloat16" else start.astype(dtype)
        pair = Pair(cls, start, copies=i % 2 == 0, keep_undo=True, lr=0.1, **options)
        grads = numbers(i, 3, SIZE, N, dtype="float64" if dtype == "float64" else "float32")
        grads[2, SIZE - 1, N - 1] = np.inf  # for those that look at it
        for each in grads[1:] if "on_nonfinite" in options or "loss_scale" in options else grads[:1]:
            undone(pair, [cut(g) for g in each], f"case {i}")
        pair.rollback()
        ours, theirs = pair.save(f"undone{i}")
        pair.step([cut(g) for g in grads[0].copy()])
        pair.ours.load(theirs)
        pair.theirs.load(ours)
        pair.check("loaded")
        refused(pair.ours.rollback, ValueError, "there is no step to undo: a load came after the last one")
        undone(pair, [cut(g) for g in grads[1]], f"case {i}, loaded")


def test_rollback_of_micro_batches_metrics_and_arrays_left_out():
    lr = ac.schedules.plateau(0.1, patience=0)
    pair = Pair(ac.Adam, lr=lr, keep_undo=True, copies=True)
    grads = numbers(1, 3, SIZE, N)
    pair.step([cut(g) for g in grads[0]], metric=1.0)
    undone(pair, [cut(g) for g in grads[1]], metric=2.0)
    assert pair.ours.param_groups[0]["lr"] == pair.theirs.param_groups[0]["lr"] < 0.1
    pair.rollback()
    pair.accumulate([cut(g) for g in grads[0]])
    pair.accumulate([[None, *cut(g)[1:]] for g in grads[1]])
    pair.theirs.step(metric=0.5)
    pair.ours.step(metric=0.5)
    pair.rollback()
    pair.check("micro-batches")
    some = [[cut(g)[0], None, None, None] for g in grads[2]]
    for flat in pair.flats:
        flat[-1] = 7  # is not undone, since the step does not change it
        flat[0] = 8
    pair.step(some, metric=0.1)
    for flat in pair.flats:
        flat[-2:] = 9
        flat[:2] = 10
    pair.rollback()
    pair.check("some arrays")
    assert pair.flats[0][-1] == 9
    assert pair.flats[0][0] == 8
    pair.step([[None] * 4] * SIZE)
    pair.rollback()
    pair.check("no array")


def test_rollback_of_rows_that_sum_to_one():
    pair = Pair(ac.SGD, numbers(0, 9 * 4096), table, sum_to_one="project", keep_undo=True, bucket_bytes=1)
    for each in numbers(1, 2, SIZE, 9 * 4096):
        undone(pair, [table(g) for g in each])


def test_rollbacks_that_are_refused():
    """On all ranks, whatever the rank that refuses it; and then the step can be undone still."""
    pair, last = Pair(keep_undo=True, ema_decay=0.5, on_nonfinite="raise"), SIZE - 1
    grads = [cut(g) for g in numbers(1, SIZE, N)]
    refused(pair.ours.rollback, ValueError, "none was made since this optimizer was constructed")
    refused(Pair().ours.rollback, ValueError, "construct the optimizer with keep_undo=True")
    start = pair.flats[0].copy()
    pair.step(grads)
    infinite = [*grads[RANK][:3], grads[RANK][3] * np.float32(np.inf if last == RANK else 1)]
    refused(lambda: pair.ours.step(infinite), ValueError, "the sum of grads[3] is")  # which does not count
    with pair.ours.averaged_parameters():
        refused(pair.ours.rollback, RuntimeError, "not inside averaged_parameters")
    pair.accumulate(grads)
    pair.theirs.discard()
    if RANK == 0:
        pair.ours.discard()
    if SIZE > 1:
        said = refused(pair.ours.rollback, ValueError, f"{SIZE} accumulated gradients are pending")
        assert said[1] == f"raised on rank 1 of {SIZE}"
        other = pair.ours.rollback if last == RANK else lambda: pair.ours.step(grads[RANK])
        text = f"rank 0 has called step with gradients, rank {last} called rollback"
        if RANK:
            pair.ours.discard()
        refused(other, ValueError, text)
    pair.check()
    assert not np.array_equal(pair.flats[0], start)
    pair.rollback()
    pair.check()
    assert_same_bits(pair.flats[0], start)
    refused(pair.ours.rollback, ValueError, "the last one is undone already")
    undone(pair, grads)


# --- on disk -------------------------------------------------------------------------------------------------------------


def test_rollback_on_disk():
    """With the parameters in the folders, from which they come back, or without; also once they are opened again."""
    cases = [
        ("float32", ac.AdamW, True, {"max_grad_norm": 1.0, "ema_decay": 0.9, "copies": True}),
        ("float32", ac.Adam, True, {"state_dtype": "uint8", "on_nonfinite": "skip"}),
        ("float32", ac.Adam, False, {"state_dtype": "uint8", "on_nonfinite": "skip"}),
        ("bfloat16", ac.AdamW, False, {"master": "float32", "copies": True, "state_memory": 2 * MEMORY}),
    ]
    for dtype, cls, parameters, options in cases:
        start = bfloat16(numbers(0, N)) if dtype == "bfloat16" else numbers(0, N)
        pair = disk_pair(cls, start, keep_undo=True, parameters=parameters, **options)
        refused(pair.ours.rollback, ValueError, "none was made since this optimizer was constructed")
        for seed in range(2):
            grads = grads_of(seed)
            if seed and "on_nonfinite" in options:
                grads[LAST][3][-1] = np.inf
            undone(pair, grads)
        pair.rollback()
        reopen(pair, parameters)
        pair.check("undone, and gone on")
        refused(pair.ours.rollback, ValueError, "none was made since this optimizer was constructed")
        pair.theirs.step([None] * 4)
        pair.step([[g[0], None, None, None] for g in grads_of(2)])
        pair.rollback()
        pair.check("some arrays")
        pair.accumulate(grads_of(3))
        pair.ours.step()
        pair.theirs.step()
        pair.check()
        reopen(pair, parameters)
        pair.check("stepped again, and gone on")


def test_a_rollback_that_one_rank_can_not_record():
    """It is none on all ranks, whose optimizers end; they go on from the step that was to be undone."""
    for parameters in (True, False):
        pair = disk_pair(keep_undo=True, parameters=parameters)
        for seed, name in enumerate(("fsync", "replace", "fsync", "replace")):  # with either name of a record
            pair.step(grads_of(seed))
            kept = pair.flats[0].copy()
            with failing(name, errno.EIO):
                notes = fails(pair.ours.rollback, "the state on disk can't be written")
            assert any("this optimizer can't go on: a rollback failed" in x for x in notes), notes
            refused(pair.ours.rollback, RuntimeError, "can't go on: a rollback failed")
            pair.flats[0][:] = 0 if parameters else kept
            pair.ours = pair.construct()
            pair.check(f"after {name}")
        pair.step(grads_of(1))
        pair.rollback()
        pair.check()
        reopen(pair, parameters)
        pair.check()


def test_a_disk_that_fails_when_parameters_are_kept():
    """They are put back on all ranks, and the step can be made again; the one before it can't be undone any more."""
    pair = disk_pair(keep_undo=True, parameters=False, copies=True)
    pair.step(grads_of(0))
    for name in ("pwritev", "fdatasync"):
        with failing(name, errno.EIO):
            notes = fails(lambda: pair.ours.step(grads_of(1)[RANK]), os.strerror(errno.EIO))
        assert any("parameters and state are as they were before this step" in x for x in notes), notes
        pair.check(f"after {name}")
        refused(pair.ours.rollback, ValueError, "the last one failed on the disk")
    undone(pair, grads_of(1))


def test_ctrl_c_while_buckets_are_read_for_a_rollback():
    """It waits for the end of what the ranks do together."""
    pair = disk_pair(keep_undo=True)
    pair.step(grads_of(0))
    pair.step(grads_of(1))
    with ctrl_c("preadv"):
        pair.ours.rollback()
    pair.theirs.rollback()
    pair.check()
    undone(pair, grads_of(2))


if __name__ == "__main__":
    for _name in ("fsync", "fdatasync"):  # a kill does not lose what the system has
        setattr(os, _name, lambda fd: None)
    main(globals())

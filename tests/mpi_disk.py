"""State of ranks on disk: what test_mpi.py runs on several ranks, python mpi_disk.py FOLDER [NAME ...].

It is run as mpi_ranks.py is, and uses what that has.
"""

import builtins
import errno
import itertools
import os
import shutil
import signal
import threading
import zlib
from contextlib import contextmanager

import numpy as np
from mpi_ranks import (
    COMM,
    FOLDER,
    RANK,
    SIZE,
    N,
    Pair,
    bfloat16,
    ctrl_c_in,
    cut,
    main,
    numbers,
    refused,
    wrong,
)
from support import assert_same_bits

import adaptive_c as ac
from adaptive_c.mpi import Sharded, _sharded

MEMORY = 200_000  # three buckets of a chunk
COUNT = itertools.count()
LAST = SIZE - 1


def place():
    """A new folder, of the same name on all ranks."""
    return FOLDER / f"state{SIZE}-{next(COUNT)}"


def disk_pair(*args, folder=None, parameters=True, **options):
    return Pair(*args, state_path=folder or place(), state_parameters=parameters,
                **{"state_memory": MEMORY, "lr": 0.1, **options})  # fmt: skip


def grads_of(seed, size=N, make=cut, dtype="float32"):
    """Of each rank."""
    return [make(g) for g in numbers([9, seed], SIZE, size, dtype=dtype)]


def reopen(pair, parameters=True):
    """Another optimizer goes on.  parameters: they have to come from the folders, and what copy_to has of them."""
    pair.ours.close()
    COMM.Barrier()
    if parameters:
        for x in (pair.flats[0], *pair.copies[:1]):
            x[:] = 0
    pair.ours = pair.construct()


@contextmanager
def failing(name, error=errno.ENOSPC, rank=LAST):
    """On one rank, calls of the system of this name fail."""
    call = getattr(os, name)

    def instead(*args, **kwargs):
        raise OSError(error, os.strerror(error))

    if rank == RANK:
        setattr(os, name, instead)
    try:
        yield
    finally:
        setattr(os, name, call)
    COMM.Barrier()


def fails(call, text, rank=LAST):
    """A call fails on all ranks with the same error of one, whose notes may say how far each rank was: these."""
    try:
        call()
    except OSError as error:
        said, notes, kind = str(error), getattr(error, "__notes__", []), (error.errno, error.filename)
    else:
        raise AssertionError(f"it did not fail: {text}")
    assert text in said, said
    everyone = COMM.allgather((said, kind))
    assert everyone == [(said, kind)] * SIZE, everyone
    assert f"raised on rank {rank} of {SIZE}" in notes, notes
    return notes


# --- bits ----------------------------------------------------------------------------------------------------------------


def test_bits_and_resuming():
    """Whatever the formats, the stages and the buckets; and again from the folders after each step."""
    cases = [
        ("float32", ac.AdamW, {"max_grad_norm": 1.0, "norm_over": "array"}),
        ("float64", ac.RAdam, {"bounds": (-1.0, None), "n_threads": 1 + RANK % 2, "state_memory": 2 * MEMORY}),
        ("float32", ac.Adam, {"state_dtype": "uint8", "amsgrad": True, "ema_decay": 0.9, "on_nonfinite": "skip"}),
        ("bfloat16", ac.AdamW, {"master": "float32", "ema_decay": 0.5, "bucket_bytes": 1, "state_memory": 2 * MEMORY}),
        ("float16", ac.NAdam, {"rounding": "stochastic", "state_dtype": "bfloat16", "state_memory": 1 << 30}),
        ("float32", ac.SGD, {"loss_scale": "dynamic", "zero_grad": True}),
    ]
    for i, (dtype, cls, options) in enumerate(cases):
        start = numbers(i, N, dtype="float64")
        start = bfloat16(start) if dtype == "bfloat16" else start.astype(dtype)
        pair = disk_pair(cls, start, copies=i % 2 == 0, parameters=i != 2, **options)
        for seed in range(3):
            grads = grads_of(seed, dtype="float64" if dtype == "float64" else "float32")
            if seed == 1 and ("on_nonfinite" in options or "loss_scale" in options):
                grads[LAST][3][-1] = np.inf
            pair.step(grads)
            pair.check(f"case {i}")
            reopen(pair, i != 2)
            pair.check(f"case {i}, gone on")


def test_rows_that_sum_to_one():
    def rows(length):
        return lambda flat: flat.reshape(-1, length)

    def pair_of(length, n, **options):
        return disk_pair(ac.SGD, numbers(0, n), rows(length), momentum=0.9, **options), grads_of(1, n, rows(length))

    pair, grads = pair_of(2048, 9 * 4096, sum_to_one="project")
    pair.step(grads)
    pair.check()
    pair, grads = pair_of(3 * 8192, SIZE * 3 * 8192)  # the ranks' shares end with a row, but not buckets
    pair.ours.param_groups[0]["sum_to_one"] = "divide"
    refused(lambda: pair.ours.step(grads[RANK]), ValueError, "lies in two buckets of the state on disk")


def test_groups_of_which_ranks_have_no_share():
    def make(flat):
        if flat.dtype != "float64":
            return flat
        made.append([flat[:5000].copy(), flat[5000:15000].astype("float16"), flat[15000:15001].astype("float32")])
        a, b, c = made[-1]
        return [{"params": a, "lr": 0.01}, {"params": b, "master": "float32"}, {"params": c}]

    made = []
    pair = disk_pair(start=numbers(0, N, dtype="float64"), make=make, max_grad_norm=1.0, state_memory=2 * MEMORY)
    for seed in range(2):
        g = numbers(seed, SIZE, N, dtype="float64")
        pair.step([[x[:5000], x[5000:15000].astype("float32"), x[15000:15001].astype("float32")] for x in g])
        pair.check()
    reopen(pair)
    for theirs, ours in zip(*made[1:], strict=True):
        assert_same_bits(ours, theirs)
    pair.flats[0][:] = pair.flats[1]  # of which these are copies
    pair.check()


# --- calls ---------------------------------------------------------------------------------------------------------------


def test_every_call():
    pair = disk_pair(ema_decay=0.5, copies=True, state_memory=2 * MEMORY)
    pair.accumulate(grads_of(0))
    pair.accumulate([[None, *g[1:]] for g in grads_of(1)])
    pair.check()
    ours, theirs = pair.save("ours")
    pair.ours.step()
    pair.theirs.step()
    pair.check()
    with pair.ours.averaged_parameters(), pair.theirs.averaged_parameters():
        assert_same_bits(*pair.flats)
        refused(lambda: pair.ours.step(cut(numbers(1, N))), RuntimeError, "not inside averaged_parameters")
        refused(lambda: pair.ours.save(ours), RuntimeError, "not inside averaged_parameters")
    pair.check("after the averages")
    pair.accumulate(grads_of(2))
    pair.ours.discard()
    pair.theirs.discard()
    pair.ours.load(theirs)
    pair.theirs.load(theirs)
    pair.check("loaded")
    pair.theirs.discard()  # sums are in memory
    reopen(pair)
    pair.check("loaded, and gone on")
    refused(lambda: pair.ours.load(FOLDER / "nowhere"), FileNotFoundError, "")
    pair.step(grads_of(3), loss_scale=2.0, lr=0.3)
    pair.check()
    before = pair.ours.bytes_written
    assert before > 0
    pair.step([[None] * 4] * SIZE)
    assert pair.ours.bytes_written == before
    assert all(not x.flags.writeable for x in pair.ours.state.values())
    pair.check()
    pair.ours.close()
    mine = cut(numbers(1, N))
    for call in (lambda: pair.ours.step(mine), lambda: pair.ours.save(ours), lambda: pair.ours.load(ours)):
        refused(call, RuntimeError, "this optimizer is closed")


def test_progress():
    for pair, on_disk in ((disk_pair(), True), (Pair(lr=0.1), False)):
        seen = []

        def note(done, total, seen=seen):
            seen.append((done, total))

        def bad(done, total):
            raise ZeroDivisionError(done)

        pair.ours.step(grads_of(0)[RANK], progress=note)
        assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
        assert (max(COMM.allgather(len(seen))) > 1) == on_disk
        pair.ours.step([None] * 4, progress=note)
        assert seen[-1] == (1, 1)
        pair.alone(grads_of(0))
        pair.check()
        raised = False
        try:
            pair.ours.step(grads_of(1)[RANK], progress=bad if RANK == LAST else None)
        except ZeroDivisionError:  # when the step is made
            raised = True
        assert raised == (RANK == LAST)
        pair.alone(grads_of(1))
        pair.check()


def test_calls_from_progress():
    """They are refused on this rank, without a message to the others, which are inside the step."""
    pair = disk_pair(ema_decay=0.5)

    def averaged():
        with pair.ours.averaged_parameters():
            pass

    path, mine = FOLDER / f"progress-{SIZE}", cut(numbers(1, N))
    calls = (lambda: pair.ours.save(path), lambda: pair.ours.load(path), averaged, lambda: pair.ours.step(mine),
             lambda: pair.ours.accumulate(mine))  # fmt: skip
    for call in calls:
        said = ""
        try:
            pair.ours.step(
                grads_of(0)[RANK], progress=(lambda done, total, call=call: call()) if RANK == LAST else None
            )
        except RuntimeError as error:
            said = str(error)
        assert ("is under way on this rank: call when it has returned" in said) == (RANK == LAST), said
        pair.alone(grads_of(0))
        pair.check()


def test_an_optimizer_that_is_dropped_lets_go():
    pair = disk_pair()
    refused(pair.construct, BlockingIOError, "another optimizer has the state in this folder")
    pair.ours = None
    COMM.Barrier()
    pair.construct().close()


# --- refusals ------------------------------------------------------------------------------------------------------------


def test_options_that_are_refused():
    """And nothing of it is in the way of a run, once it is right."""
    flat, path = numbers(0, N), place()

    def build(params=flat, state_path=path, **options):
        return Sharded(ac.AdamW, params, comm=COMM, **{"state_path": state_path, "state_parameters": True, **options})

    refused(lambda: build(second_moment="row"), ValueError, "second_moment='row' is refused with state_path")
    refused(lambda: build(rows="exact"), ValueError, "rows='exact' is refused with state_path")
    refused(lambda: build(state_memory=1000), ValueError, "state_memory=1000 is too small")
    refused(lambda: build(state_path=wrong(LAST, path, 3)), TypeError, "state_path must be the path of a folder, got 3")
    refused(lambda: build(state_path=path / "a" / "b"), FileNotFoundError, "there is no such folder to make state_path")
    refused(lambda: build(lr=wrong(LAST, 0.1, -1.0)), ValueError, "lr must be in [0, inf)")
    if SIZE > 1:
        both = f"rank 0 has {{}}, rank {LAST} {{}}".format
        refused(lambda: build(lr=wrong(LAST, 0.1, 0.2)), ValueError, "rank 0 has groups[0]['options']['lr']=0.1")
        refused(lambda: build(wrong(LAST, flat, flat + 1)), ValueError, "values of group 0 with the checksum")
        refused(lambda: build(state_path=wrong(LAST, path, None), state_parameters=False), ValueError,
                both("state_path=True", "state_path=False"))  # fmt: skip
        refused(lambda: build(state_parameters=wrong(LAST, True, False)), ValueError,
                both("state_parameters=True", "state_parameters=False"))  # fmt: skip
    with failing("posix_fallocate"):
        fails(build, "the state needs")
    assert not [x for x in path.rglob("*") if x.name.startswith("record") or x.suffix == ".bucket"]
    COMM.Barrier()
    build().close()


def test_folders_of_others():
    path = place()
    pair = disk_pair(folder=path)
    pair.step(grads_of(0))
    pair.ours.close()
    COMM.Barrier()

    def again(comm=COMM, cls=ac.AdamW, state_path=path, **options):
        return Sharded(cls, cut(numbers(0, N)), comm=comm, state_path=state_path, state_parameters=True, **options)

    refused(lambda: again(cls=ac.Adam), ValueError, "is of AdamW")
    refused(lambda: again(state_dtype="uint8"), ValueError, "its state_dtype is 'float32'")
    refused(lambda: ac.AdamW(cut(numbers(0, N)), state_path=path), ValueError, "has other files in it, such as '")
    refused(lambda: again(state_path=path / f"0-of-{SIZE}"), ValueError, "has other files in it, such as '")
    some, grown = COMM.Split(RANK), path / f"0-of-{SIZE + 1}"
    if RANK == 0:
        shutil.copytree(path / f"0-of-{SIZE}", grown)
    COMM.Barrier()
    refused(again, ValueError, f"has the state of {SIZE + 1} ranks, and these are {SIZE}: start {SIZE + 1}; to go on with "
            f"{SIZE}, save(path) on {SIZE + 1}, and load(path) with a new state_path")  # fmt: skip
    if RANK == 0:
        shutil.rmtree(grown)
    COMM.Barrier()
    try:
        ac.AdamW(cut(numbers(0, N)), state_path=path / f"{RANK}-of-{SIZE}", state_parameters=True)
    except ValueError as error:
        said = str(error)
    assert f"is that of rank {RANK} of {SIZE}, this is an optimizer that is not Sharded: open it as what" in said
    pair.ours = pair.construct()  # all of that left it as it was
    pair.check()
    some.Free()


def test_folders_that_do_not_go_together():
    if SIZE == 1:
        return
    path, other = place(), place()
    mine, aside = path / f"{RANK}-of-{SIZE}", path / f".{RANK}"
    pair = disk_pair(folder=path)
    pair.step(grads_of(0))
    pair.ours.close()
    stranger = disk_pair(folder=other)
    stranger.step(grads_of(0))
    stranger.ours.close()
    COMM.Barrier()

    def with_last(folder):
        """The last rank has another folder, or none."""
        if RANK == LAST:
            shutil.rmtree(mine)
            if folder is not None:
                shutil.copytree(folder, mine)
        COMM.Barrier()

    shutil.copytree(mine, aside)
    with_last(path / f"0-of-{SIZE}")
    refused(pair.construct, ValueError, f"is that of rank 0 of {SIZE}, this is rank {LAST} of {SIZE}")
    with_last(other / mine.name)
    refused(
        pair.construct, ValueError, f"the folder of rank {LAST} is of another run than that of rank 0; give each rank"
    )
    with_last(None)
    refused(
        pair.construct, ValueError, f"rank {LAST} has no state in its folder, and rank 0 has; give each rank its own"
    )
    with_last(aside)
    pair.ours = pair.construct()
    pair.check()
    pair.ours.step(grads_of(1)[RANK])
    pair.ours.close()
    with_last(aside)  # which is that of the step before, as after a kill between two records
    pair.ours = pair.construct()
    pair.check()
    pair.step(grads_of(2))
    pair.check()
    pair.ours.close()
    with_last(aside)
    pair.ours = pair.construct()
    for seed in range(2):
        pair.ours.step(grads_of(seed)[RANK])
    pair.ours.close()
    with_last(aside)
    refused(
        pair.construct, ValueError, f"the folder of rank {LAST} is 2 records behind that of rank 0, and ranks can go"
    )


# --- failures ------------------------------------------------------------------------------------------------------------


def test_a_disk_that_fails_on_one_rank():
    """The step is none, on all ranks, and can be made again."""
    pair = disk_pair(copies=True, max_grad_norm=1.0, lr=ac.schedules.plateau(0.1, patience=0))
    pair.step(grads_of(0), metric=1.0)
    pair.accumulate(grads_of(1))
    for i, (name, error) in enumerate([("pwritev", errno.ENOSPC), ("fdatasync", errno.EIO), ("fsync", errno.ENOSPC)]):
        with failing(name, error):
            notes = fails(lambda: pair.ours.step(metric=3.0), os.strerror(error))
        assert any("parameters and state are as the last step left them" in x for x in notes), notes
        pair.check(f"after {name}")
        if i == 1:
            pair.ours.step(metric=2.0)
            pair.theirs.step(metric=2.0)
            assert pair.ours.param_groups[0]["lr"] == pair.theirs.param_groups[0]["lr"] < 0.1
            pair.accumulate(grads_of(2))
    # given gradients are dropped; what was assigned since the last step is undone on all ranks
    pair.ours.discard()
    pair.theirs.discard()
    kept = pair.flats[0].copy()
    pair.flats[0][:] = 7
    with failing("pwritev"):
        fails(lambda: pair.ours.step(grads_of(3)[RANK]), "No space left")
    assert len(set(COMM.allgather(zlib.crc32(pair.flats[0])))) == 1
    pair.flats[0][:] = kept
    pair.step(grads_of(3))
    pair.check()


def test_a_folder_that_vanishes_on_one_rank():
    """Nothing was changed there, but by the other ranks, which put it back."""
    path = place()
    mine, aside = path / f"{LAST}-of-{SIZE}", path / ".aside"
    pair = disk_pair(folder=path)
    pair.step(grads_of(0))
    if RANK == LAST:
        os.rename(mine, aside)
    notes = fails(lambda: pair.ours.step(grads_of(1)[RANK]), "put the folder back if it was moved")
    if RANK == LAST:
        os.rename(aside, mine)
    assert ("nothing was changed by this step" in notes) == (SIZE == 1), notes
    pair.check()
    pair.step(grads_of(1))
    pair.check()


def test_parameters_that_one_rank_can_not_put_back():
    pair = disk_pair(state_memory=1 << 30)  # so that nothing has to be read before something is changed
    pair.step(grads_of(0))
    with failing("open", errno.EIO):
        notes = fails(lambda: pair.ours.step(grads_of(1)[RANK]), "the state on disk can't be written")
    assert "the parameters could not be put back" in notes, notes
    refused(lambda: pair.ours.step(grads_of(1)[RANK]), RuntimeError, "the parameters could not be put back")
    reopen(pair)
    pair.check()


@contextmanager
def ctrl_c(name, times=1):
    """While the last rank is in calls of the system of this name, for buckets, it gets Ctrl-C so often, and raises it.

    Not for the record, which the thread that gets it reads, too: there it does not wait for the other ranks.
    """

    def is_bucket(fd):
        return any(os.path.samestat(os.fstat(fd), path.stat()) for path in FOLDER.rglob("*.bucket"))

    def pressed(number, frame):
        if len(raised) < times:
            raised.append(1)
            seen.release()
            raise KeyboardInterrupt

    def instead(fd, *args):
        with one:  # two signals at once would be one
            asked = not sent and threading.get_ident() != main_thread and is_bucket(fd)
            for _ in range(times if asked else 0):
                signal.pthread_kill(main_thread, signal.SIGINT)
                while not seen.acquire(timeout=0.1):  # it came just before that thread began to wait
                    signal.pthread_kill(main_thread, signal.SIGINT)
                sent.append(1)
        return call(fd, *args)

    call, sent, raised, one = getattr(os, name), [], [], threading.Lock()
    seen, main_thread = threading.Semaphore(0), threading.get_ident()
    old = signal.signal(signal.SIGINT, pressed)
    if RANK == LAST:
        setattr(os, name, instead)
    interrupted = False
    try:
        yield
    except KeyboardInterrupt:
        interrupted = True
    finally:
        setattr(os, name, call)
        signal.signal(signal.SIGINT, old)
    assert interrupted == (RANK == LAST)


def test_ctrl_c_while_buckets_are_written():
    """It waits for the step to end, on all ranks, and all go on."""
    pair = disk_pair()
    pair.step(grads_of(0))
    with ctrl_c("pwritev"):
        pair.ours.step(grads_of(1)[RANK])
    pair.alone(grads_of(1))
    pair.check()
    pair.step(grads_of(2))
    pair.check()


def test_ctrl_c_in_the_constructor():
    """It waits for the others, too, and lets go of the folder."""
    path = place()
    for name in ("pwritev", "preadv"):  # they begin folders, and go on from them
        opt = None
        with ctrl_c(name):
            opt = Sharded(ac.AdamW, cut(numbers(0, N)), comm=COMM, lr=0.1, state_path=path, state_parameters=True,
                          state_memory=MEMORY)  # fmt: skip
        assert (opt is None) == (RANK == LAST)
        if opt is not None:
            opt.close()
        COMM.Barrier()
    pair = disk_pair(folder=path)
    pair.step(grads_of(0))
    pair.check()


def test_ctrl_c_while_the_record_is_read():
    """It is announced to the other ranks, which have read theirs; the folders stay as they are."""
    pair = disk_pair()
    pair.step(grads_of(0))
    pair.ours.close()
    COMM.Barrier()
    with ctrl_c_in(builtins, "open", lambda path, *args: str(path).endswith("record")):
        pair.ours = pair.construct()
    COMM.Barrier()
    reopen(pair)
    pair.check()


def test_ctrl_c_when_the_optimizers_are_made():
    """All ranks let go of their folders, so that all can try again."""
    pair = disk_pair()
    pair.step(grads_of(0))
    pair.ours.close()
    COMM.Barrier()
    with ctrl_c_in(_sharded, "Exchange"):
        pair.ours = pair.construct()
    COMM.Barrier()
    pair.ours = pair.construct()
    pair.check()


def test_ctrl_c_while_space_is_set_aside():
    path = place()
    with ctrl_c_in(os, "posix_fallocate"):
        disk_pair(folder=path)
    COMM.Barrier()
    assert not list(path.rglob("*.bucket"))
    COMM.Barrier()
    pair = disk_pair(folder=path)
    pair.step(grads_of(0))
    pair.check()


def test_a_second_ctrl_c_while_buckets_are_written():
    """It stops the step on all ranks, which can make it again."""
    n = SIZE * 12 * 4096  # so that each rank has many buckets that are not begun yet
    pair = disk_pair(start=numbers(0, n))
    pair.step(grads_of(0, n))
    with ctrl_c("pwritev", 3):  # when the third one is seen, the second one has been dealt with
        if RANK == LAST:
            pair.ours.step(grads_of(1, n)[RANK])
        else:
            raised = False
            try:
                pair.ours.step(grads_of(1, n)[RANK])
            except RuntimeError as error:
                raised = "a second Ctrl-C came" in str(error)
            assert raised
    pair.check()
    pair.step(grads_of(1, n))
    pair.check()


def test_ctrl_c_while_buckets_are_loaded_or_averaged():
    """It waits for the end of what the ranks do together."""
    n = SIZE * 12 * 4096
    pair, path = disk_pair(start=numbers(0, n), ema_decay=0.5), FOLDER / f"loaded-{SIZE}"
    pair.step(grads_of(0, n))
    pair.ours.save(path)
    pair.step(grads_of(1, n))
    with ctrl_c("pwritev"):
        pair.ours.load(path)
    pair.theirs.load(path)
    pair.check("loaded")
    inside = False
    with ctrl_c("preadv"), pair.ours.averaged_parameters():
        inside = True
    assert inside == (RANK != LAST)
    pair.check("after the averages")
    pair.step(grads_of(2, n))
    pair.check()


def test_a_failure_without_parameters_in_the_folders():
    pair = disk_pair(parameters=False)
    pair.step(grads_of(0))
    kept = pair.flats[0].copy()
    with failing("pwritev"):
        notes = fails(lambda: pair.ours.step(grads_of(1)[RANK]), "No space left")
    assert any("buckets of the parameters are stepped, the others not: put those of the last" in x for x in notes), (
        notes
    )
    refused(lambda: pair.ours.step(grads_of(1)[RANK]), RuntimeError, "can't go on: a step failed")
    refused(lambda: pair.ours.save(FOLDER / "x"), RuntimeError, "can't go on: a step failed")
    pair.flats[0][:] = kept
    pair.ours = pair.construct()
    pair.check()
    pair.step(grads_of(1))
    pair.check()


def lacks(pair, call, rank=LAST):
    """A call after whose writes one rank can't put its record into place: the run ends on all, and they go on."""
    with failing("replace", errno.EIO, rank):
        notes = fails(call, "the state on disk can't be written", rank)
    refused(lambda: pair.ours.step(grads_of(1)[RANK]), RuntimeError, "can't go on")
    pair.flats[0][:] = 0
    pair.ours = pair.construct()
    pair.check("as all have it")
    return notes


def test_a_record_of_a_step_that_one_rank_lacks():
    """They go on from the step before, which is the last one that all have, and forget the one that some had."""
    pair = disk_pair()
    for seed in range(2):  # with either name of a record
        pair.step(grads_of(seed))
        for i, rank in enumerate((LAST, 0, LAST)):
            notes = lacks(pair, lambda i=i: pair.ours.step(grads_of(i + 2)[RANK]), rank)
            assert any("it is not known whether the step is on disk" in x for x in notes), notes
    pair.step(grads_of(3))
    pair.check()
    reopen(pair)
    pair.check()


def test_a_record_of_a_load_that_one_rank_lacks():
    pair = disk_pair()
    pair.ours.save(FOLDER / f"saved-{SIZE}")
    pair.step(grads_of(0))
    lacks(pair, lambda: pair.ours.load(FOLDER / f"saved-{SIZE}"))
    pair.step(grads_of(1))
    pair.check()


def test_a_first_record_that_one_rank_lacks():
    """They begin anew."""
    path = place()
    with failing("replace", errno.EIO):
        fails(lambda: disk_pair(folder=path), "the state on disk can't be written")
    pair = disk_pair(folder=path)
    pair.step(grads_of(0))
    pair.check()
    reopen(pair)
    pair.check()


def test_damage_on_one_rank():
    path = place()
    pair = disk_pair(folder=path)
    pair.ours.close()
    if RANK == LAST:
        for bucket in (path / f"{LAST}-of-{SIZE}").glob("*.bucket"):
            bucket.write_bytes(bytes(x ^ 1 for x in bucket.read_bytes()))
    COMM.Barrier()
    fails(pair.construct, "is damaged")


if __name__ == "__main__":
    for _name in ("fsync", "fdatasync"):  # a kill does not lose what the system has
        setattr(os, _name, lambda fd: None)
    main(globals())

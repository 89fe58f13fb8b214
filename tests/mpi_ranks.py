"""What test_mpi.py runs on several ranks: python mpi_ranks.py FOLDER [NAME ...] runs these functions in turn.

Rank 0 prints "NAME ok" after each.  A rank that fails prints why and ends all of them.
"""

import copy
import json
import os
import signal
import sys
import traceback
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from cases import CASES
from mpi4py import MPI
from resume import FORMATS, fits
from support import assert_same, assert_same_bits

import adaptive_c as ac
from adaptive_c.mpi import Sharded

COMM = MPI.COMM_WORLD
RANK, SIZE = COMM.rank, COMM.size
FOLDER = Path(sys.argv[1])
N = 20_003  # elements: five chunks, the last of them short, so that some of four ranks have one and one has two


def cut(flat):
    """Several arrays; one is empty, and their ends are no multiples of anything."""
    return [flat[:7000], flat[7000:7000], flat[7000:9001].reshape(3, 667), flat[9001:]]


def table(flat):
    return flat.reshape(-1, 2048)


def numbers(seed, *shape, dtype="float32"):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def bfloat16(x):
    return (x.astype("float32").view("uint32") >> np.uint32(16)).astype("uint16")


class Pair:
    """A shared optimizer, and one process that accumulates what the ranks give, in rank order."""

    def __init__(self, cls=ac.AdamW, start=None, make=cut, comm=COMM, copies=False, **options):
        start = numbers(0, N) if start is None else start
        self.flats, self.make, self.comm = (start.copy(), start.copy()), make, comm
        self.copies = [np.zeros(start.size, "float32") for _ in range(2)] if copies else []
        (a, b), options = self.flats, {"uint16_as": "bfloat16", **options}
        to = [{"copy_to": make(x)} for x in self.copies] or [{}, {}]
        self.construct = lambda: Sharded(cls, make(a), comm=comm, **options, **to[0])
        self.ours = self.construct()
        ignored = {"reduction", "bucket_bytes", "state_path", "state_memory", "state_parameters"}
        alone = {name: x for name, x in options.items() if name not in ignored}
        self.theirs = cls(make(b), **alone, **to[1])

    def alone(self, grads, **call):
        """The step of one process.  grads: of each rank."""
        for g in copy.deepcopy(grads):
            self.theirs.accumulate(g)
        self.theirs.step(**call)

    def step(self, grads, **call):
        self.alone(grads, **call)
        self.ours.step(grads[self.comm.rank], **call)

    def accumulate(self, grads):
        for g in grads:
            self.theirs.accumulate(g)
        self.ours.accumulate(grads[self.comm.rank])

    def rollback(self):
        self.theirs.rollback()
        self.ours.rollback()

    def save(self, name):
        """Save both, which gives the same bytes; the two files, for all ranks."""
        ours, theirs = FOLDER / f"{name}-{SIZE}", FOLDER / f"{name}-not-shared-{SIZE}"
        self.ours.save(ours)
        if RANK == 0:
            self.theirs.save(theirs)
            assert ours.read_bytes() == theirs.read_bytes()
        COMM.Barrier()
        return ours, theirs

    def check(self, what=""):
        """Everything is the same: of the state, this rank's share."""
        assert_same_bits(*self.flats, what)
        if self.copies:
            assert_same_bits(*self.copies, f"{what} copies")
        for name in ("t", "skipped_steps", "pending", "grad_norm", "loss_scale"):
            assert_same(getattr(self.ours, name), getattr(self.theirs, name), f"{what} {name}")
        for i, about in enumerate(self.theirs.state_dict()["groups"]):
            lo, hi = self.ours.shares[i]
            for name, array in about["arrays"].items():
                if name in self.ours.state:
                    mine = self.ours.state[name]
                    mine = mine[i] if isinstance(mine, list) else mine
                    per = 256 if name.endswith("_scale") else 1
                    share = array[lo // per : -(-hi // per)]
                    if about["row_lengths"] is not None and array.size == sum(n for n, _ in about["row_lengths"]):
                        share = array[self.rows_in(i, lo, hi)]
                    assert_same_bits(mine, share, f"{what} {name}")

    def rows_in(self, i, lo, hi):
        """Which rows of a group begin in elements lo .. hi-1, and so end there."""
        params = self.theirs.param_groups[i]["params"]
        begins, ends, at = [], [], 0
        for x in [params] if isinstance(params, np.ndarray) else params:
            length = x.size // max(len(x), 1)
            begins += [at + row * length for row in range(len(x))]
            ends += [at + (row + 1) * length for row in range(len(x))]
            at += x.size
        mine = (np.array(begins) >= lo) & (np.array(begins) < hi)
        assert (np.array(ends)[mine] <= hi).all()
        return mine


# --- bits ----------------------------------------------------------------------------------------------------------------


def test_every_bucket_size():
    grads = numbers(1, 3, SIZE, N)
    for bucket_bytes in (1, 5 << 12, 1 << 25):
        pair = Pair(lr=0.1, bucket_bytes=bucket_bytes)
        for each in grads:
            pair.step([cut(g) for g in each])
            pair.check()


def test_every_rule_format_and_stage():
    """Each case of a rule with another format and other stages; ranks with other numbers of threads."""
    stages = [
        {"max_grad_norm": 100.0, "max_grad_value": 2.0},
        {"on_nonfinite": "skip", "ema_decay": 0.9, "bounds": (-2.0, None)},
        {"loss_scale": "dynamic", "max_grad_norm": 1e9},
        {"flush_denormals": True, "zero_grad": True, "loss_scale": 3.0},
        {"max_grad_norm": 1.0, "on_nonfinite": "raise", "bounds": (numbers(3, N) - 4, 4.0)},
        {"max_grad_norm": 10.0, "norm_over": "array", "on_nonfinite": "skip"},
        {"max_grad_norm": lambda t: 1.0 + t, "norm_over": "group"},
    ]
    for i, (case, name, options) in enumerate(CASES):
        dtype, formats = FORMATS[i % len(FORMATS)]
        if not fits(name, options, formats):
            dtype, formats = "float32", {}
        shared = dict(stages[i % len(stages)])
        if isinstance(shared.get("bounds"), tuple) and isinstance(shared["bounds"][0], np.ndarray):
            shared["bounds"] = cut(shared["bounds"][0]), 4.0
        start = numbers(i, N, dtype="float64")
        start = bfloat16(start) if dtype == "bfloat16" else start.astype(dtype)
        pair = Pair(getattr(ac, name), start, copies=i % 2 == 0, bucket_bytes=1 << 14 + i % 8, seed=i,
                    n_threads=1 + RANK % 2 * (i % 10 == 5), **options, **formats, **shared)  # fmt: skip
        grads = numbers(i + 100, 2, SIZE, N, dtype="float64" if dtype == "float64" else "float32")
        if i % 3 == 1:  # the second step is not usable, where that is looked at
            grads[1, SIZE - 1, N - 1] = np.inf
        for each in grads:
            each = each * each.dtype.type(pair.theirs.loss_scale)
            given = [cut(g) for g in each.copy()]
            if shared.get("on_nonfinite") == "raise" and not np.isfinite(each).all():
                continue
            pair.step(given)
            pair.check(case)
            if shared.get("zero_grad"):
                assert not np.concatenate([x.ravel() for x in given[RANK]]).any()


def test_arrays_that_some_ranks_leave_out():
    """With None adds nothing, not even 0, which would make a 0 of a -0; and in formats that differ."""
    pairs = Pair(ac.SGD, momentum=0.9), Pair(ac.Adam)
    given = []
    for rank in range(SIZE):
        g = cut(np.where(numbers(rank, N) > 1, numbers(rank + 9, N), np.float32(-0.0)))
        g[rank % 4] = None
        if g[2] is not None and rank % 2:
            g[2] = g[2].astype("float16")
        if g[0] is not None and rank == 3:
            g[0] = bfloat16(g[0])
        given.append(g)
    no_rank = [[None, None, g[2], None] for g in given]
    for each in (given, given, no_rank, given, [[None] * 4] * SIZE):
        for pair in pairs:
            pair.step(each)
            pair.check()


def test_groups_of_several_types():
    """A dict of float64, float16 rounded by chance, and an array without dimensions; ranks without a share of some."""

    def make(flat):
        if flat.dtype == "float64":
            x = flat
            params = [x[:5000].copy(), x[5000:15000].astype("float16"), x[15000:15001].reshape(()).astype("float32")]
            self_made.append(params)
        else:
            params = flat
        return [
            {"params": {"a": params[0][:100], "b": params[0][100:]}, "lr": 0.01},
            {"params": [params[1]], "rounding": "stochastic", "state_dtype": "uint8"},
            {"params": params[2]},
        ]

    self_made = []
    pair = Pair(start=numbers(0, N, dtype="float64"), make=make, max_grad_norm=1.0, on_nonfinite="skip", lr=0.1)
    for t in range(3):
        given = []
        for rank in range(SIZE):
            g = numbers([t, rank], N, dtype="float64")
            given.append([{"a": g[:100], "b": g[100:5000]}, [g[5000:15000].astype("float32")],
                          g[15000:15001].reshape(()).astype("float32")])  # fmt: skip
        pair.step(given)
        for a, b in zip(*self_made, strict=True):
            assert_same_bits(a, b)
        pair.check()


def test_micro_batches_sums_schedules_and_metrics():
    lr = ac.schedules.chain([ac.schedules.plateau(0.1, patience=0), ac.schedules.linear(0.1, 5)], [3])
    pair = Pair(ac.Adam, lr=lr, max_grad_norm=2.0, on_nonfinite="skip", bucket_bytes=1 << 14)
    grads = numbers(1, 4, 2, SIZE, N)
    for t, (first, second) in enumerate(grads):
        pair.accumulate([cut(g) for g in first])
        pair.check()
        pair.accumulate([cut(g) for g in second])
        pair.ours.step(metric=float(t))
        pair.theirs.step(metric=float(t))
        pair.check()
    pair.accumulate([cut(g) for g in first])
    pair.ours.discard()
    pair.theirs.discard()
    pair.step([cut(g) for g in first], loss_scale=4.0, lr=0.3)
    pair.check()
    summed = Pair(ac.Adam, reduction="sum", max_grad_norm=2.0)
    for g in first:
        summed.theirs.accumulate(cut(g))
    summed.theirs.step(loss_scale=1 / SIZE)
    summed.ours.step(cut(first[RANK]))
    summed.check()


def test_averages_and_copies():
    for dtype, formats in (
        ("float32", {}),
        ("float16", {"master": "float32"}),
        ("bfloat16", {"rounding": "stochastic"}),
    ):
        start = numbers(0, N)
        start = bfloat16(start) if dtype == "bfloat16" else start.astype(dtype)
        pair = Pair(ac.AdamW, start, copies=True, ema_decay=0.5, lr=0.1, **formats)
        pair.check("at the beginning")
        for each in numbers(1, 2, SIZE, N):
            pair.step([cut(g) for g in each])
        with pair.ours.averaged_parameters(), pair.theirs.averaged_parameters():
            assert_same_bits(*pair.flats)
        pair.check(dtype)
    assert "averages are" not in repr(pair.ours)
    assert repr(pair.ours).endswith(f"rank {RANK} of {SIZE})")


def test_rows_that_sum_to_one():
    """Rows that lie in one share, though in several pieces of the sweep; others are refused."""
    for options in ({}, {"state_dtype": "uint8", "ema_decay": 0.5}):
        pair = Pair(ac.SGD, numbers(0, 9 * 4096), table, momentum=0.9, sum_to_one="project", bucket_bytes=1, **options)
        for each in numbers(1, 2, SIZE, 9 * 4096):
            pair.step([table(g) for g in each])
            pair.check()
    pair = Pair(ac.SGD, numbers(0, SIZE * 24576), lambda x: x.reshape(-1, 24576), sum_to_one="divide", bucket_bytes=1)
    pair.step(list(numbers(1, SIZE, SIZE, 24576)))  # buckets cut these
    pair.check()
    if SIZE > 1:
        odd = Pair(ac.SGD, numbers(0, 5 * 4096), lambda x: x.reshape(-1, 1280), sum_to_one="divide")
        refused(lambda: odd.ours.step(np.ones((16, 1280), "float32")), ValueError, "two processes would share the row")
        odd.check()


def test_rows_with_one_second_moment():
    """No share cuts one, though buckets, threads and blocks do; shares of groups that have none are as they were."""

    def tables(flat):
        """Rows of 64, 100 and 3 elements, some of one, none, and one row that is longer than a chunk."""
        ends = np.cumsum([1000 * 64, 300 * 100, 7 * 3, 0, 1500, 6000])
        shapes = (1000, 64), (300, 5, 20), (7, 3), (0, 8), (1500,), (1, 6000)
        return [x.reshape(shape) for x, shape in zip(np.split(flat, ends)[:-1], shapes, strict=True)]

    n = 1000 * 64 + 300 * 100 + 7 * 3 + 1500 + 6000
    cases = [
        (ac.Adagrad, "float32", {"initial_accumulator_value": 0.1, "weight_decay": 0.05}),
        (ac.Adam, "float64", {"amsgrad": True, "max_grad_norm": 1.0, "bucket_bytes": 1}),
        (ac.AdamW, "float32", {"state_dtype": "uint8", "ema_decay": 0.9, "bucket_bytes": 5 << 12}),
        (ac.RMSprop, "bfloat16", {"master": "float32", "momentum": 0.9, "weight_decay": 0.05, "bucket_bytes": 1}),
        (ac.Adagrad, "float16", {"rounding": "stochastic", "bounds": (-1.0, None), "bucket_bytes": 1}),
        (ac.Adagrad, "float32", {"sum_to_one": "project", "bucket_bytes": 1}),
    ]
    for i, (cls, dtype, options) in enumerate(cases):
        start = numbers(i, n, dtype="float64")
        start = bfloat16(start) if dtype == "bfloat16" else start.astype(dtype)
        options = {"second_moment": "row", "lr": 0.1, "keep_undo": i % 2 == 0, "n_threads": 1 + RANK % 2, **options}
        make = (lambda flat: flat[:64000].reshape(-1, 64)) if "sum_to_one" in options else tables
        pair = Pair(cls, start, make, copies=i % 2 == 0, **options)
        kind = "float64" if dtype == "float64" else "float32"
        for each in numbers(i, 2, SIZE, n, dtype=kind):
            pair.step([make(g) for g in each])
            pair.check(f"case {i}")
        if i % 2 == 0:
            pair.rollback()
            pair.check(f"case {i}, undone")
        ours, theirs = pair.save(f"rows{i}")
        for ranks in range(1, SIZE + 1):
            some = COMM.Split(ranks > RANK)
            if ranks > RANK:
                again = Pair(cls, np.zeros_like(start), make, copies=True, comm=some, **options)
                again.ours.load(ours)
                again.theirs.load(theirs)
                again.check("loaded")
                again.step([make(g) for g in numbers(3, ranks, n, dtype=kind)])
                again.check("loaded, and stepped")
            some.Free()


def test_groups_of_which_some_have_one_second_moment_for_each_row():
    """Their shares are of whole rows; one that can't be cut is one rank's."""

    def make(flat):
        return [
            {"params": [flat[:12289], flat[12289 : 12289 + 64 * 300].reshape(300, 64)], "second_moment": "row"},
            {"params": [flat[31489 : 31489 + 96 * 300].reshape(300, 96)], "second_moment": "row"},
            {"params": [flat[60289:].reshape(-1, 5)], "second_moment": "element"},
        ]

    n = 60289 + 5 * 4000
    pair = Pair(ac.Adam, numbers(0, n), make, lr=0.1)
    for seed in range(2):
        pair.step([[group["params"] for group in make(g)] for g in numbers(seed, SIZE, n)])
        pair.check()
    shares = COMM.allgather(pair.ours.shares)
    for i, size in enumerate((31489, 28800, 20000)):
        found = [x[i] for x in shares if x[i][0] < x[i][1]]
        assert [lo for lo, _ in found] + [size] == [0] + [hi for _, hi in found]
    assert all(lo == hi or lo <= 12288 for lo, hi in (x[0] for x in shares))  # rows of 64 from an odd place on
    assert all(lo % (3 * 4096) == 0 or lo == 28800 for lo, _ in (x[1] for x in shares))
    if SIZE == 4:  # of 21 chunks
        assert [x[1] for x in shares] == [(0, 0), (0, 0), (0, 24576), (24576, 28800)], shares


def test_rows_without_elements():
    """Each has a second moment, which is in the file once, wherever the cuts are."""

    def make(flat):
        a, b = flat.reshape(2, 64, 64)
        empty = flat[:0].reshape(5, 0)
        return [{"params": [empty, a, empty.copy(), b, empty.copy()]}, {"params": [empty.copy()]}, {"params": [b + 1]}]

    pair = Pair(ac.Adagrad, numbers(0, 8192), make, second_moment="row", initial_accumulator_value=0.5)
    for name in ("saved", "loaded"):
        ours, theirs = pair.save(f"{name}-ours")
        pair.step([[group["params"] for group in make(g)] for g in numbers(1, SIZE, 8192)])
        pair.ours.load(ours)
        pair.theirs.load(theirs)


def test_gradients_of_other_kinds():
    """float64 for float32 parameters, where that is asked for; those with strides can't be sent."""
    pair = Pair(cast=True, lr=0.1)
    for each in numbers(1, 2, SIZE, N, dtype="float64"):
        given = [cut(g) for g in each]
        given[0][3] = given[0][3].astype("float32")
        pair.step(given)
        pair.check()
    mine = cut(numbers(1, N))
    refused(lambda: pair.ours.step([mine[0], mine[1], np.asfortranarray(mine[2]), mine[3]]), ValueError,
            "grads[2] is not C-contiguous")  # fmt: skip
    pair.check()


def test_memory():
    """Of the state each rank has its share and no more."""
    pair = Pair(ac.Adam, numbers(0, 40 * 4096), make=lambda x: x)
    assert pair.ours.nbytes <= 8 * -(-40 // SIZE) * 4096
    total = np.array([pair.ours.nbytes])
    COMM.Allreduce(MPI.IN_PLACE, total)
    assert total == pair.theirs.nbytes
    pair = Pair(ac.Adam, numbers(0, 40 * 4096), make=lambda x: x, keep_undo=True)
    assert pair.theirs.nbytes >= (8 + 12) * 40 * 4096
    assert pair.ours.nbytes <= (8 + 12) * -(-40 // SIZE) * 4096 + 100  # and what it counts


# --- refusals ------------------------------------------------------------------------------------------------------------


def refused(call, kind, text):
    """All ranks raise the same; what they say."""
    try:
        call()
    except kind as error:
        said = str(error), *getattr(error, "__notes__", ())
    else:
        raise AssertionError(f"not refused: {text}")
    everyone = COMM.allgather(said)
    assert everyone == [said] * SIZE, everyone
    assert text in said[0], said
    return said


def wrong(rank, right, other):
    return other if rank == RANK else right


@contextmanager
def ctrl_c_in(place, name, wanted=lambda *args: True):
    """On the last rank, a Ctrl-C comes in a call of this function: that rank raises it, and the others an error.

    An error that was not announced to the others leaves them waiting, and has no note of it: then the assertion ends
    all of them.
    """
    call, raised = getattr(place, name), None

    def instead(*args, **kwargs):
        if wanted(*args):
            setattr(place, name, call)
            signal.raise_signal(signal.SIGINT)
        return call(*args, **kwargs)

    old = signal.signal(signal.SIGINT, signal.default_int_handler)
    if RANK == SIZE - 1:
        setattr(place, name, instead)
    try:
        yield
    except (KeyboardInterrupt, RuntimeError) as error:
        raised = error
    finally:
        setattr(place, name, call)
        signal.signal(signal.SIGINT, old)
    assert isinstance(raised, KeyboardInterrupt if RANK == SIZE - 1 else RuntimeError), raised
    assert f"raised on rank {SIZE - 1} of {SIZE}" in getattr(raised, "__notes__", ()), "it was not announced"


def test_what_one_rank_refuses_all_raise():
    pair, last = Pair(lr=0.1, max_grad_norm=1.0), SIZE - 1
    grads = [cut(g) for g in numbers(1, SIZE, N)]
    pair.step(grads)
    mine = grads[RANK]
    short = [mine[0][:-1], *mine[1:]]
    said = refused(lambda: pair.ours.step(wrong(last, mine, short)), ValueError, "grads[0] has shape (6999,)")
    assert said[1] == f"raised on rank {last} of {SIZE}"
    refused(lambda: pair.ours.step(wrong(last, mine, "no")), ValueError, "grads must be a list of 4 arrays")
    refused(lambda: pair.ours.step(wrong(last, mine, [*mine[:3], 1.0])), TypeError, "grads[3] is a float")
    refused(lambda: pair.ours.accumulate(wrong(0, mine, short)), ValueError, "grads[0] has shape")
    refused(lambda: pair.ours.step(), ValueError, "there are none")
    refused(lambda: pair.ours.step(mine, wrong(last, None, 1.0)), ValueError, "no schedule reads metric")
    refused(lambda: pair.ours.step(mine, loss_scale=-1.0), ValueError, "loss_scale must be")
    rows = [ac.Rows(np.array([0]), np.ones(1, "float32")), *mine[1:]]
    refused(lambda: pair.ours.step(wrong(last, mine, rows)), TypeError, "gradients of rows")
    pair.check()
    pair.step(grads)
    pair.check()


def test_schedules_that_raise_on_one_rank():
    def schedule(t):
        if t == 1 and RANK == 0 and broken:
            raise OverflowError("too late")
        return 0.1

    broken = [True]
    pair = Pair(lr=schedule)
    grads = [cut(g) for g in numbers(1, SIZE, N)]
    pair.step(grads)
    refused(lambda: pair.ours.step(grads[RANK]), OverflowError, "too late")
    broken.clear()
    pair.check()
    pair.step(grads)
    pair.check()


def test_gradients_that_are_not_finite():
    """The element is named by whoever has it, and all ranks raise that."""
    for bad in (3, N - 1):
        pair = Pair(lr=0.1, on_nonfinite="raise")
        grads = numbers(1, SIZE, N)
        pair.step([cut(g) for g in grads])
        grads[SIZE - 1, bad] = np.nan
        index = bad if bad == 3 else bad - 9001
        refused(lambda: pair.ours.step(cut(grads[RANK])), ValueError,  # noqa: B023
                f"the sum of grads[{0 if bad == 3 else 3}] is nan at index ({index},)")  # fmt: skip
        pair.check()
        pair.step([cut(g) for g in numbers(2, SIZE, N)])
        pair.check()
    small = Pair(loss_scale=1e-30)
    refused(lambda: small.ours.step(cut(grads[RANK]), loss_scale=1e-45), ValueError, "can't hold")
    small.check()


def test_ctrl_c_before_anything_is_exchanged():
    """All ranks raise, nothing has changed, and they go on."""

    class Schedule:
        def __call__(self, t):
            return self.number(t)

        def number(self, t):
            return 0.1

    schedule, path = Schedule(), FOLDER / f"ctrl-c-{SIZE}.safetensors"
    pair = Pair(lr=schedule)
    grads = [cut(g) for g in numbers(1, SIZE, N)]
    pair.step(grads)
    pair.ours.save(path)
    kept = path.read_bytes()
    with ctrl_c_in(schedule, "number"):
        pair.ours.step(grads[RANK])
    pair.check()
    pair.step(grads)
    for place, name in ((json, "dumps"), (os, "pwrite"), (os, "fsync")):
        with ctrl_c_in(place, name):
            pair.ours.save(path)
        assert path.read_bytes() == kept
    for place, name in ((os, "fstat"), (json, "loads")):
        with ctrl_c_in(place, name):
            pair.ours.load(path)
    with ctrl_c_in(schedule, "number"):
        Pair(lr=schedule)
    pair.check()
    pair.step(grads)
    pair.check()
    assert not list(FOLDER.glob(".*.tmp"))


def test_ranks_that_construct_different_optimizers():
    if SIZE == 1:
        return
    flat, last = numbers(0, N), SIZE - 1

    def build(params=flat, cls=ac.AdamW, **options):
        return Sharded(cls, params, comm=COMM, **options)

    cases = [
        (lambda: build(lr=wrong(last, 0.1, 0.2)), "rank 0 has groups[0]['options']['lr']=0.1, rank {} groups[0]['options']['lr']=0.2"),
        (lambda: build(cls=wrong(last, ac.AdamW, ac.Lion)), "rank 0 has class='AdamW', rank {} class='Lion'"),
        (lambda: build(wrong(last, flat, cut(flat))), "sizes"),
        (lambda: build(wrong(last, flat, flat + 1)), "rank 0 has values of group 0 with the checksum"),
        (lambda: build(seed=wrong(last, 0, 1)), "seed"),
        (lambda: build(reduction=wrong(last, "mean", "sum")), "reduction"),
        (lambda: build(bucket_bytes=wrong(last, 1, 2)), "bucket_bytes"),
        (lambda: build(max_grad_norm=wrong(last, None, 2.0)), "max_grad_norm"),
    ]  # fmt: skip
    for case, text in cases:
        refused(case, ValueError, text.format(last))
    refused(lambda: build(lr=wrong(last, 0.1, -1.0)), ValueError, "lr must be in [0, inf)")
    refused(lambda: build(reduction=wrong(last, "mean", "max")), ValueError, "reduction must be")
    refused(lambda: build(wrong(0, flat, flat[::2])), ValueError, "not C-contiguous")
    refused(lambda: build(keep_undo=wrong(last, False, True)), ValueError, "rank 0 has keep_undo=False, rank")
    refused(lambda: build(keep_undo=wrong(last, True, "yes")), TypeError, "keep_undo must be")
    refused(lambda: build(cls="AdamW"), TypeError, "must be the class of an optimizer")
    refused(lambda: build(bucket_bytes=wrong(last, 1, 0)), ValueError, "bucket_bytes must be")
    refused(lambda: copy.deepcopy(build()), TypeError, "can't be pickled or copied")


def test_ranks_that_do_not_go_together():
    if SIZE == 1:
        return
    pair, last = Pair(lr=0.1), SIZE - 1
    grads = [cut(g) for g in numbers(1, SIZE, N)]
    mine = grads[RANK]
    other = pair.ours.accumulate if last == RANK else pair.ours.step
    refused(lambda: other(mine), ValueError, f"rank 0 has called step with gradients, rank {last} called accumulate")
    refused(lambda: pair.ours.step(mine, loss_scale=wrong(last, 1.0, 2.0)), ValueError, "loss_scale and metric")
    refused(lambda: pair.ours.step(mine, lr=wrong(last, 0.1, 0.2)), ValueError, "lr of this step (0.1,)")
    pair.ours.param_groups[0]["lr"] = wrong(last, 0.1, 0.2)
    refused(lambda: pair.ours.step(mine), ValueError, "rank 0 has param_groups[0]['lr']=0.1, rank")
    pair.ours.param_groups[0]["lr"] = 0.1
    pair.ours.max_grad_norm = wrong(last, None, 2.0)
    refused(lambda: pair.ours.step(mine), ValueError, "max_grad_norm=None")
    pair.ours.max_grad_norm = None
    pair.ours.t = wrong(last, 0, 7)
    refused(lambda: pair.ours.step(mine), ValueError, "t=0")
    pair.ours.t = 0
    pair.check()
    pair.step(grads)
    pair.check()


# --- checkpoints ---------------------------------------------------------------------------------------------------------


def test_one_file_for_any_number_of_ranks():
    """Its bytes are those of the plain optimizer's, and every number of ranks goes on from it."""
    formats = [
        ("float32", {}),
        ("float32", {"state_dtype": "uint8", "ema_decay": 0.9}),
        ("bfloat16", {"master": "float32"}),
    ]
    for i, (dtype, options) in enumerate(formats):
        start = bfloat16(numbers(0, N)) if dtype == "bfloat16" else numbers(0, N)
        options = {**options, "max_grad_norm": 1.0, "norm_over": "array", "lr": 0.1}
        pair = Pair(start=start, copies=True, **options)
        for each in numbers(1, 2, SIZE, N):
            pair.step([cut(g) for g in each])
        if i == 1:  # between two micro-batches, of which one array had no gradient
            pair.accumulate([[None, *cut(g)[1:]] for g in numbers(2, SIZE, N)])
        ours, theirs = pair.save(f"ours{i}")
        for ranks in range(1, SIZE + 1):
            some = COMM.Split(ranks > RANK)
            if ranks > RANK:
                again = Pair(start=np.zeros_like(start), copies=True, comm=some, **{**options, "lr": 3.0})
                again.ours.load(ours)
                again.theirs.load(theirs)
                again.check("loaded")
                grads = [cut(g) for g in numbers(3, ranks, N)]
                again.accumulate(grads)
                again.ours.step()
                again.theirs.step()
                again.check("after a step")
            some.Free()
        parts = Pair(start=start, copies=True, **options)
        parts.ours.save(FOLDER / "state.safetensors", parameters=False)
        parts.ours.load(FOLDER / "state.safetensors", parameters=False)
        parts.check("without parameters")
    assert not list(FOLDER.glob(".*.tmp"))


def test_a_path_of_any_bytes():
    folder = FOLDER / os.fsdecode(b"\xff")
    try:
        folder.mkdir(exist_ok=True)
    except OSError:  # macOS has no such names
        return
    pair = Pair(lr=0.1)
    pair.ours.save(folder / "x.safetensors")
    pair.ours.load(folder / "x.safetensors")
    pair.check()


def test_checkpoints_that_are_refused():
    pair, path = Pair(lr=0.1), FOLDER / f"refused-{SIZE}.safetensors"
    pair.step([cut(g) for g in numbers(1, SIZE, N)])
    pair.ours.save(path)
    kept = path.read_bytes()
    COMM.Barrier()
    refused(lambda: pair.ours.save(FOLDER / "nowhere" / "x"), FileNotFoundError, "there is no folder")
    refused(lambda: pair.ours.save(FOLDER), ValueError, "no regular file")
    refused(lambda: pair.ours.load(wrong(SIZE - 1, path, FOLDER / "nowhere")), FileNotFoundError, "")
    if SIZE > 1:
        refused(lambda: pair.ours.save(path, parameters=RANK == 0), ValueError, "with and without parameters")
        refused(lambda: pair.ours.step(cut(numbers(1, N))) if RANK else pair.ours.save(path), ValueError,
                "rank 0 has called save, rank 1 called step with gradients")  # fmt: skip
    refused(lambda: Pair(ac.Adam).ours.load(path), ValueError, "is of AdamW")
    assert path.read_bytes() == kept
    COMM.Barrier()
    if RANK == 0:
        path.write_bytes(kept[:-400] + b"\xff" + kept[-399:])
    COMM.Barrier()
    refused(lambda: pair.ours.load(path), ValueError, "is damaged: its checksum is")
    COMM.Barrier()
    if RANK == 0:
        path.write_bytes(kept[:-1])
    COMM.Barrier()
    refused(lambda: pair.ours.load(path), ValueError, "does not end as a checkpoint")
    pair.check()
    pair.step([cut(g) for g in numbers(2, SIZE, N)])
    pair.check()


# --- failures ------------------------------------------------------------------------------------------------------------


class Failing:
    """A communicator that fails in the middle of an exchange, once so many messages are sent: `fail` is called."""

    def __init__(self, fail):
        self.left, self.fail = None, fail

    def __getattr__(self, name):
        return getattr(COMM, name)

    def Dup(self):  # noqa: N802
        return self

    def Isend(self, *message):  # noqa: N802
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                self.fail()
        return COMM.Isend(*message)


def test_a_call_that_ends_in_the_middle():
    """Whatever comes after it is refused, since it is not known what was stepped."""

    def fail():
        raise MPI.Exception(MPI.ERR_OTHER)

    if SIZE == 1:  # which sends nothing
        return
    comm = Failing(fail)
    pair = Pair(comm=comm)
    grads = [cut(g) for g in numbers(1, SIZE, N)]
    pair.step(grads)
    pair.check()
    comm.left = 0
    refused(lambda: pair.ours.step(grads[RANK]), MPI.Exception, "")
    said = "an earlier call ended in the middle on this rank (Exception: "
    refused(lambda: pair.ours.step(grads[RANK]), RuntimeError, said)
    refused(lambda: pair.ours.accumulate(grads[RANK]), RuntimeError, said)
    refused(lambda: pair.ours.save(FOLDER / "x"), RuntimeError, said)
    refused(lambda: pair.ours.load(FOLDER / "x"), RuntimeError, said)
    assert not (FOLDER / "x").exists()


def dying():
    """After a checkpoint the last rank is killed in the middle of a step.  Not one of all: it ends this program."""
    comm = Failing(lambda: RANK == SIZE - 1 and os.kill(os.getpid(), signal.SIGKILL))
    pair = Pair(comm=comm, bucket_bytes=1)
    grads = [cut(g) for g in numbers(1, SIZE, N)]
    pair.step(grads)
    pair.ours.save(FOLDER / "before.safetensors")
    if RANK == 0:
        pair.theirs.save(FOLDER / "expected.safetensors")
    COMM.Barrier()
    comm.left = 1
    pair.ours.step(grads[RANK])
    print("it believes that it has stepped", flush=True)


def threads():
    """Ranks that may use the same processors share them out.  Not one of all: those are told a number."""
    mine = sorted(os.sched_getaffinity(0))
    sharing = COMM.allgather(mine).count(mine)
    assert Pair().ours.n_threads == (max(1, len(mine) // sharing) if sharing > 1 else None)
    assert Pair(n_threads=3).ours.n_threads == 3


def main(found):
    """Run those that are named, or all tests that are found."""
    wanted = sys.argv[2:] or [name for name in found if name.startswith("test_")]
    for name in wanted:
        try:
            found[name]()
        except BaseException:
            print(f"{name} failed on rank {RANK} of {SIZE}:\n{traceback.format_exc()}", flush=True)
            COMM.Abort(1)
            os._exit(1)  # when several ranks abort at once, MPICH may return from it, and would go on to print "ok"
        COMM.Barrier()
        if RANK == 0:
            print(f"{name} ok", flush=True)


if __name__ == "__main__":
    main(globals())

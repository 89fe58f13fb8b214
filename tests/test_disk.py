"""State on disk: the bits of the optimizer in memory, whatever the rule, the formats, the stages and the buckets."""

import itertools
import os
import re

import ml_dtypes
import numpy as np
import pytest
from cases import IDS, PAIRS
from support import arrays_in, assert_same, assert_same_bits, everything

import adaptive_c as ac

SHAPES = ((90, 70), (257,), (), (9000,), (2, 8192))
MEMORY = 500_000  # a few buckets through few buffers


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """What is tested here does not depend on when the disk has what was written, for which tests need not wait."""
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, lambda fd: None)


def numbers(seed, dtype="f4", shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.normal(size=shape)).astype(dtype) for shape in shapes]


def twins(folder, cls=ac.AdamW, dtype="f4", memory=MEMORY, parameters=False, shapes=SHAPES, **options):
    """The same optimizer in memory and on disk."""
    return (cls(numbers(0, dtype, shapes), **options),
            cls(numbers(0, dtype, shapes), **options, state_path=folder, state_memory=memory,
                state_parameters=parameters))  # fmt: skip


def params(opt):
    return [group["params"] for group in opt.param_groups]


def reopened(opt, folder, memory=MEMORY, over=None, **options):
    """Another optimizer that goes on from the folder of one."""
    given = [x.copy() for x in arrays_in(params(opt))] if over is None else over
    opt.close()
    return type(opt)(given, state_path=folder, state_memory=memory, **options)


def step_both(pair, seed, dtype="f4", **more):
    for opt in pair:
        opt.step(numbers(seed, dtype, [x.shape for x in arrays_in(params(opt))]), **more)


@pytest.mark.parametrize("case", [pair for pair in PAIRS if pair[1].get("second_moment") != "row"],
                         ids=[name for name, pair in zip(IDS, PAIRS, strict=True) if pair[1].get("second_moment") != "row"])  # fmt: skip
def test_every_rule(case, tmp_path):
    name, options = case
    pair = twins(tmp_path / "state", getattr(ac, name), **options)
    for seed in range(4):
        step_both(pair, seed)
        assert_same(*map(everything, pair))


FORMATS = [
    {"dtype": "f8"},
    {"state_dtype": "bfloat16"},
    {"state_dtype": "uint8"},
    {"dtype": ml_dtypes.bfloat16, "master": "float32"},
    {"dtype": ml_dtypes.bfloat16, "rounding": "stochastic", "state_dtype": "bfloat16"},
    {"dtype": "f2", "rounding": "stochastic", "state_dtype": "uint8"},
    {"dtype": "f2", "master": "float32", "state_dtype": "uint8", "ema_decay": 0.9},
    {"dtype": "f8", "ema_decay": 0.9},
]


@pytest.mark.parametrize("parameters", [False, True])
@pytest.mark.parametrize("options", FORMATS, ids=str)
def test_every_format(options, parameters, tmp_path):
    """Again from the folder after each step, with parameters that have to come from there, if they are in it."""
    options = dict(options)
    dtype = options.pop("dtype", "f4")
    grad = "f8" if dtype == "f8" else "f4"
    memory, disk = twins(tmp_path / "state", dtype=dtype, parameters=parameters, amsgrad=True, **options)
    for seed in range(3):
        step_both((memory, disk), seed, grad)
        assert_same(everything(memory), everything(disk))
        over = [np.zeros_like(x) for x in arrays_in(params(disk))] if parameters else None
        disk = reopened(disk, tmp_path / "state", over=over, amsgrad=True, state_parameters=parameters, **options)
        assert_same(everything(memory), everything(disk))


STAGES = [
    {"max_grad_norm": 0.5, "norm_over": "array", "max_grad_value": 0.01},
    {"max_grad_norm": 0.5, "norm_over": "group", "loss_scale": 8.0},
    {"bounds": (-0.1, 0.2), "ema_decay": 0.5},
    {"sum_to_one": "project", "ema_decay": 0.5, "shapes": ((64, 64), (9, 4096), (5, 512))},
    {"sum_to_one": "divide", "dtype": ml_dtypes.bfloat16, "master": "float32", "shapes": ((300, 128), (10, 512))},
    {"sum_to_one": "divide", "dtype": ml_dtypes.bfloat16, "rounding": "stochastic", "shapes": ((300, 128), (10, 512))},
    {"loss_scale": "dynamic", "on_nonfinite": "skip"},
    {"zero_grad": True, "cast": True, "lr": ac.schedules.cosine(0.1, 5)},
]


@pytest.mark.parametrize("options", STAGES, ids=str)
def test_every_stage(options, tmp_path):
    pair = twins(tmp_path / "state", **options)
    for seed in range(4):
        grads = [numbers(seed, shapes=[x.shape for x in arrays_in(params(pair[0]))]) for _ in pair]
        if seed == 2:
            for given in grads:
                given[0].flat[3] = np.inf
        if seed == 2 and "loss_scale" not in options:
            continue
        for opt, given in zip(pair, grads, strict=True):
            opt.step(given)
        assert_same(*map(everything, pair))
        assert_same_bits(*(np.concatenate([x.ravel() for x in given]) for given in grads))


def test_copies(tmp_path):
    copies = [[np.zeros(x.shape, "f2") for x in numbers(0)] for _ in range(2)]
    memory = ac.AdamW(numbers(0), copy_to=copies[0])
    disk = ac.AdamW(numbers(0), copy_to=copies[1], state_path=tmp_path / "state", state_memory=MEMORY)
    for seed in range(2):
        step_both((memory, disk), seed)
        assert_same(everything(memory), everything(disk))
    copies[1][0][:] = 0
    over = [x.copy() for x in arrays_in(params(disk))]
    disk.close()
    disk = ac.AdamW(over, copy_to=copies[1], state_path=tmp_path / "state", state_memory=MEMORY)
    assert_same(everything(memory), everything(disk))


def test_groups_and_gradients_that_are_missing(tmp_path):
    """Groups of different formats share buckets.  What has no gradient is neither read nor written."""

    def made(**more):
        a = numbers(0)
        half = [x.astype("f2") for x in a[:2]]
        return ac.Adam([{"params": a[2:]}, {"params": half, "master": "float32", "state_dtype": "uint8"},
                        {"params": {"w": a[1].astype("f8")}, "lr": 0.1}], ema_decay=0.9, **more)  # fmt: skip

    memory, disk = made(), made(state_path=tmp_path / "state", state_memory=500_000)
    for seed, left in enumerate(itertools.product([False, True], repeat=3)):
        g = numbers(seed)
        grads = [[None if left[0] else g[2], g[3], g[4]], [g[0], None if left[1] else g[1]],
                 {"w": None if left[2] else g[1].astype("f8")}]  # fmt: skip
        for opt in (memory, disk):
            opt.step(grads)
        assert_same(everything(memory), everything(disk))
    before = disk.bytes_written
    disk.step([[None, None, g[4]], [None, None], {"w": None}])
    assert 0 < disk.bytes_written - before < 2 * 8192 * 12 * 2
    before = disk.bytes_written
    disk.step([[None, None, None], [None, None], {"w": None}])
    assert disk.bytes_written == before


@pytest.mark.parametrize("memory", [300_000, 700_000, 10_000_000])
def test_residency(memory, tmp_path):
    """What fits stays in memory, and is written all the same: the folder has each step."""
    plain, disk = twins(tmp_path / "state", memory=memory)
    for seed in range(3):
        step_both((plain, disk), seed)
        disk = reopened(disk, tmp_path / "state", memory)
        assert_same(everything(plain), everything(disk))
    with pytest.raises(ValueError, match=r"state_memory=1000 is too small .* give at least"):
        reopened(disk, tmp_path / "state", 1000)


@pytest.mark.parametrize("options", [{"state_dtype": "float32"}, {"state_dtype": "bfloat16"}, {"state_dtype": "uint8"},
                                     {"ema_decay": 0.5}, {"parameters": True}], ids=str)  # fmt: skip
def test_eight_buckets_fit(options, tmp_path):
    """Three are read, one is stepped, four are written: with fewer, the disk would wait."""
    memory = 1 << 21
    twins(tmp_path / "state", memory=memory, shapes=((1 << 20,), (100_000,)), **options)[1].close()
    sizes = [path.stat().st_size // 2 for path in (tmp_path / "state").glob("*.bucket")]
    assert len(sizes) > 8
    assert max(sizes) <= memory // 8
    assert max(sizes) > memory // 12


@pytest.mark.parametrize("options", [{}, {"state_dtype": "uint8"}], ids=str)
def test_buckets_of_many_groups_are_as_large(options, tmp_path):
    groups = [{"params": np.ones(4096, "f4")} for _ in range(60)]
    memory = 1 << 20
    ac.AdamW(groups, **options, state_path=tmp_path, state_memory=memory).close()
    sizes = [path.stat().st_size // 2 for path in tmp_path.glob("*.bucket")]
    assert memory // 12 < max(sizes) <= memory // 8


def test_progress(tmp_path):
    memory, disk = twins(tmp_path / "state")
    for opt in (memory, disk):
        seen = []
        opt.step(numbers(1), progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
        assert (len(seen) > 1) == (opt is disk)
        opt.step([None] * len(SHAPES), progress=lambda done, total, seen=seen: seen.append((done, total)))
        assert seen[-1] == (1, 1)

        def bad(done, total):
            raise ZeroDivisionError(done)

        with pytest.raises(ZeroDivisionError, match=r"1"):
            opt.step(numbers(2), progress=bad)
    assert_same(everything(memory), everything(disk))


def test_state_is_not_looked_at_in_a_step(tmp_path):
    """It would be read into the memory through which buckets pass."""
    memory, disk = twins(tmp_path / "state", ema_decay=0.9)
    looks = [lambda: disk.state["exp_avg"], lambda: disk.decoded_state("exp_avg"), lambda: disk.ema]

    def look(done, total):
        for call in looks:
            with pytest.raises(RuntimeError, match=r"this optimizer is in use"):
                call()

    memory.step(numbers(1))
    disk.step(numbers(1), progress=look)
    assert_same(everything(memory), everything(disk))


def test_state_is_seen_and_not_written(tmp_path):
    memory, disk = twins(tmp_path / "state", state_dtype="uint8", ema_decay=0.9)
    step_both((memory, disk), 1)
    for name in ("exp_avg", "exp_avg_sq"):
        assert_same_bits(np.concatenate([x.ravel() for x in memory.state[name]]),
                         np.concatenate([x.ravel() for x in disk.state[name]]))  # fmt: skip
        for a, b in zip(memory.decoded_state(name), disk.decoded_state(name), strict=True):
            assert_same_bits(a, b)
    assert_same_bits(memory.state["exp_avg_scale"], disk.state["exp_avg_scale"])
    with pytest.raises(ValueError, match=r"read-only"):
        disk.state["exp_avg"][0][:] = 0
    for a, b in zip(memory.ema, disk.ema, strict=True):
        assert_same_bits(a, b)
    assert disk.nbytes == memory.nbytes
    for opt in (memory, disk):
        before = [x.copy() for x in arrays_in(params(opt))]
        with opt.averaged_parameters():
            opt.state["exp_avg"]
            for a, b in zip(arrays_in(params(opt)), memory.ema if opt is disk else opt.ema, strict=True):
                assert_same_bits(a, b if opt is disk else a)
        assert_same(before, arrays_in(params(opt)))


def test_sums_and_targets(tmp_path):
    memory, disk = twins(tmp_path / "state", max_grad_norm=1.0)
    for opt in (memory, disk):
        opt.accumulate(numbers(1))
        opt.accumulate([None, *numbers(2)[1:]])
        opt.step(lr=0.3)
        opt.step(target=numbers(3))
        opt.rebind(numbers(4))
        opt.step(numbers(5), params=numbers(6))
    assert_same(everything(memory), everything(disk))


def test_rebound_masters(tmp_path):
    memory, disk = twins(tmp_path / "state", dtype="f2", master="float32")
    for opt in (memory, disk):
        opt.rebind(numbers(4, "f2"))
    assert_same(everything(memory), everything(disk))
    disk = reopened(disk, tmp_path / "state", master="float32")
    step_both((memory, disk), 1)
    assert_same(everything(memory), everything(disk))


def test_lazy_rows(tmp_path):
    memory, disk = twins(tmp_path / "state")
    for seed in range(3):
        rng = np.random.default_rng(seed)
        rows = ac.Rows(rng.integers(0, 2, 2), rng.normal(size=(2, 8192)).astype("f4"))
        for opt in (memory, disk):
            opt.step([None, None, None, None, rows])
            opt.accumulate([None, None, None, numbers(seed)[3], rows])
            opt.step()
    assert_same(everything(memory), everything(disk))


@pytest.mark.parametrize("parameters", [False, True])
@pytest.mark.parametrize("grads", ["none", "some", "not finite"])
def test_rollback_of_a_step_that_leaves_something(grads, parameters, tmp_path):
    """What the last step did not touch stays, whatever the step before it did."""
    pair = twins(tmp_path / "state", parameters=parameters, keep_undo=True, on_nonfinite="skip")
    step_both(pair, 1)
    step_both(pair, 2)
    for opt in pair:
        given = [None] * len(SHAPES)
        if grads != "none":
            given[1] = np.full(SHAPES[1], np.inf if grads == "not finite" else 1.0, "f4")
        opt.step(given)
        opt.rollback()
    assert_same(*map(everything, pair))
    step_both(pair, 3)
    assert_same(*map(everything, pair))


@pytest.mark.parametrize("parameters", [False, True])
@pytest.mark.parametrize("more", [{}, {"dtype": "f2", "master": "float32"}])
def test_rollback(parameters, more, tmp_path):
    pair = memory, disk = twins(tmp_path / "state", parameters=parameters, keep_undo=True, **more)
    step_both(pair, 1)
    before = everything(memory)
    step_both(pair, 2)
    for opt in pair:
        opt.rollback()
        assert_same(before, everything(opt))
        with pytest.raises(ValueError, match=r"no step to undo"):
            opt.rollback()
    more = {name: x for name, x in more.items() if name != "dtype"}
    disk = reopened(disk, tmp_path / "state", state_parameters=parameters, keep_undo=True, **more)
    assert_same(everything(memory), everything(disk))
    step_both((memory, disk), 3)
    for opt in (memory, disk):
        opt.step([None, None, None, None, numbers(1)[4]])
        opt.rollback()
    assert_same(everything(memory), everything(disk))


def test_checkpoints(tmp_path):
    """The same bytes as from memory, and in again, on both sides."""
    memory, disk = twins(tmp_path / "state", state_dtype="uint8", ema_decay=0.9)
    step_both((memory, disk), 1)
    memory.save(tmp_path / "a")
    disk.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    other, more = twins(tmp_path / "other", state_dtype="uint8", ema_decay=0.9)
    other.load(tmp_path / "b")
    more.load(tmp_path / "a")
    assert_same(everything(other), everything(more))
    more = reopened(more, tmp_path / "other", state_dtype="uint8", ema_decay=0.9)
    assert_same(everything(memory), everything(more))
    step_both((memory, more), 2)
    more.load_state_dict(memory.state_dict())
    other.load_state_dict(more.state_dict())
    assert_same(other.state_dict(), more.state_dict())


def test_options_are_those_of_the_folder(tmp_path):
    """As with a checkpoint; functions of one's own are given again."""
    _, disk = twins(tmp_path / "state", lr=ac.schedules.cosine(0.1, 10), betas=(lambda t: 0.8 + t / 100, 0.9))
    disk.step(numbers(1))
    disk.param_groups[0]["weight_decay"] = 0.5
    disk.step(numbers(1))
    number, second = disk.param_groups[0]["lr"], disk.param_groups[0]["betas"]
    disk = reopened(disk, tmp_path / "state", lr=3.0, betas=(lambda t: 0.8 + t / 100, 0.9))
    assert (disk.param_groups[0]["lr"], disk.param_groups[0]["betas"]) == (number, second)
    assert disk.param_groups[0]["weight_decay"] == 0.5
    assert disk.t == 2


def test_state_less_and_empty(tmp_path):
    for i, (cls, shapes) in enumerate([(ac.SGD, SHAPES), (ac.SGD, ((0,),)), (ac.AdamW, ((0,), (5,), (0, 3)))]):
        for parameters in (False, True):
            folder = tmp_path / f"{i}{parameters}"
            memory, disk = twins(folder, cls, parameters=parameters, shapes=shapes)
            step_both((memory, disk), 1)
            disk = reopened(disk, folder, state_parameters=parameters)
            step_both((memory, disk), 2)
            assert_same(everything(memory), everything(disk))


def test_memory_maps(tmp_path):
    n = 100_000
    arrays = {}
    for mode, name in itertools.product(("w+",), ("p", "g")):
        arrays[name] = np.memmap(tmp_path / name, "f4", mode, shape=(n,))
        arrays[name][:] = numbers(3, shapes=[(n,)])[0]
    arrays["g"].flush()
    g = np.memmap(tmp_path / "g", "f4", "r", shape=(n,))
    own = np.memmap(tmp_path / "g", "f4", "c", shape=(n,))  # pages that can't be read again
    own[:] = arrays["g"]
    memory = ac.AdamW([np.array(arrays["p"]), np.array(own)], max_grad_norm=1.0)
    disk = ac.AdamW([arrays["p"], own], max_grad_norm=1.0, state_path=tmp_path / "state", state_memory=MEMORY)
    for _ in range(2):
        memory.step([np.array(g), np.array(g)])
        disk.step([g, g.reshape(n)])
    assert_same(everything(memory), everything(disk))


def resident(array):
    """How many bytes of a memory map are in this process."""
    address = array.__array_interface__["data"][0]
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
                inside = int(match[1], 16) <= address < int(match[2], 16)
            elif inside and line.startswith("Rss:"):
                return int(line.split()[1]) << 10
    raise AssertionError("there is no such map")


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="this system does not tell what is resident")
def test_memory_maps_do_not_stay(tmp_path):
    n = 3 << 20
    p, q, g = (np.memmap(tmp_path / name, "f4", "w+", shape=(n,)) for name in "pqg")
    params = [p, q[:12345], q[12345:]]

    def assert_few(call, maps=(p, q)):
        call()
        assert sum(resident(x) for x in maps) < 5 << 20  # a slice of each may stay, and what lies around it
        assert sum(resident(x) for x in maps) < sum(x.nbytes for x in maps) / 2

    disk = ac.AdamW(params, state_path=tmp_path / "state", state_memory=8 << 20, max_grad_norm=1.0)
    g[:] = 1
    assert_few(lambda: disk.step([g, None, None]), (p, g))
    p[:], q[:] = p + 0, 1  # all of them are in memory again
    assert_few(lambda: disk.save(tmp_path / "saved"))
    assert_few(lambda: disk.load(tmp_path / "saved"))
    assert q[0] == q[-1] == 1


def test_an_optimizer_that_is_dropped_lets_go(tmp_path):
    disk = twins(tmp_path / "state")[1]
    with pytest.raises(BlockingIOError, match=f"another optimizer has the state .* process {os.getpid()}; .*close"):
        twins(tmp_path / "state")
    del disk
    twins(tmp_path / "state")[1].close()


@pytest.mark.parametrize(("options", "error", "message"), [
    ({"rows": "exact"}, ValueError, "rows='exact' is refused with state_path.*use rows='lazy'"),
    ({"second_moment": "row"}, ValueError, "second_moment='row' is refused with state_path"),
    ({"state_memory": 0}, ValueError, "state_memory must be an integer, a number of bytes from 1 on, got 0"),
    ({"state_memory": 1.5}, ValueError, "state_memory must be an integer"),
    ({"state_path": 3}, TypeError, "state_path must be the path of a folder, got 3"),
    ({"state_path": ""}, TypeError, "state_path must be the path of a folder, got ''"),
    ({"state_memory": 9000}, ValueError, "state_memory=9000 is too small .* give at least"),
    ({"state_path": None, "state_memory": 9000}, ValueError, "state_memory and state_parameters are for state on disk"),
    ({"state_path": None, "state_parameters": True}, ValueError, "give state_path, too, or drop them"),
])  # fmt: skip
def test_refused(options, error, message, tmp_path):
    with pytest.raises(error, match=message):
        ac.AdamW(numbers(0), **{"state_path": tmp_path / "state", **options})


def test_calls_that_are_refused(tmp_path):
    import copy
    import pickle

    disk = twins(tmp_path / "state")[1]
    for call in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"can't be pickled or copied, since its state is on disk"):
            call(disk)
    with pytest.raises(ValueError, match=r"add_param_group is refused with state_path.*all groups"):
        disk.add_param_group({"params": numbers(1)})
    with (
        pytest.raises(ValueError, match=r"stepping\(\) is refused with state_path.*use step\(grads\)"),
        disk.stepping(),
    ):
        pass
    shapes = ((15_000, 7),)
    disk = twins(tmp_path / "rows", shapes=shapes)[1]
    disk.param_groups[0]["sum_to_one"] = True
    with pytest.raises(ValueError, match=r"lies in two buckets .*say sum_to_one in the constructor"):
        disk.step(numbers(1, shapes=shapes))
    with pytest.raises(ValueError, match=r"too small for the buckets .* not within rows that sum to one"):
        twins(tmp_path / "more rows", shapes=((1,), *shapes), sum_to_one=True)
    disk.close()
    disk.close()
    with pytest.raises(RuntimeError, match=r"this optimizer is closed; construct a new one"):
        disk.step(numbers(1))

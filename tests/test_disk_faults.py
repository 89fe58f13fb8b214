"""State on disk when something goes wrong: kills, errors of the system, damage, other processes, Ctrl-C."""

import errno
import itertools
import json
import mmap
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from disk_steps import OPTIONS, construct, gradients, start
from support import assert_same, at, child, everything, in_another_thread

import adaptive_c as ac
from adaptive_c._checkpoint import file

HERE = Path(__file__).parent
KEEPS = [{"state_parameters": True}, {"keep_undo": True}, {"state_parameters": True, "keep_undo": True}]


def made(folder, params=None, **options):
    return ac.AdamW(start() if params is None else params, state_path=folder,
                    **{"state_memory": 230_000, **OPTIONS, **options})  # fmt: skip


def on_disk(folder, **options):
    """What the folder holds, with parameters that have to come from there."""
    opt = made(folder, [np.zeros_like(x) for x in start()], **options)
    found = everything(opt)
    opt.close()
    return found


def script(name, *arguments):
    return subprocess.Popen([sys.executable, str(HERE / name), *map(str, arguments)], stdout=subprocess.PIPE,
                            stdin=subprocess.PIPE, text=True)  # fmt: skip


# --- kills -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "least"), [(["random", 200], 200), (["every"], 50)])
def test_killed_and_resumed_to_the_bit(how, least, tmp_path):
    with script("disk_kills.py", tmp_path / "state", *how) as process:
        said = process.communicate(timeout=300)[0]
    assert process.returncode == 0
    assert int(re.match(r"(\d+) kills", said)[1]) >= least


# --- errors of the system --------------------------------------------------------------------------------------------


class Fault:
    """Calls of the system of one name, of which the n-th fails, and with `lasting` all that follow until it is mended."""

    def __init__(self, monkeypatch, name, n, error=errno.ENOSPC, lasting=True):
        self.calls, self.mended = 0, False
        call = getattr(os, name)

        def instead(*args, **kwargs):
            self.calls += 1
            if not self.mended and (self.calls >= n if lasting else self.calls == n):
                raise OSError(error, os.strerror(error))
            return call(*args, **kwargs)

        monkeypatch.setattr(os, name, instead)

    def mend(self):
        self.mended = True


@pytest.mark.parametrize("keeps", KEEPS, ids=str)
@pytest.mark.parametrize(("name", "error", "lasting"), [("pwritev", errno.ENOSPC, True), ("fdatasync", errno.EIO, True),
                                                        ("preadv", errno.EIO, False), ("replace", errno.EACCES, True)])  # fmt: skip
def test_a_step_that_fails_is_none(name, error, lasting, keeps, tmp_path, monkeypatch):
    """Wherever it fails: parameters, state, copies and counts are those before it; then the same step can be made."""
    copies = [np.zeros(x.shape, "f2") for x in start()]
    opt = made(tmp_path / "state", copy_to=copies, **keeps)
    memory = ac.AdamW(start(), copy_to=[x.copy() for x in copies], **OPTIONS)
    memory.step(gradients(0))
    opt.step(gradients(0))
    before = everything(opt)
    failed = 0
    for n in itertools.count(1):
        with monkeypatch.context() as patch:
            fault = Fault(patch, name, n, error, lasting)
            try:
                opt.step(gradients(1))
            except OSError as e:
                assert e.errno == error  # noqa: PT017
                assert "state on disk can't be" in str(e)  # noqa: PT017
            else:
                break
            fault.mend()
            failed += 1
            assert_same(before, everything(opt))
            with pytest.raises(ValueError, match=r"keep_undo=True|no step to undo"):
                opt.rollback()
    assert failed >= 1
    memory.step(gradients(1))
    assert_same(everything(memory), everything(opt))
    opt.close()
    if "state_parameters" in keeps:
        assert_same(everything(memory) | {}, on_disk(tmp_path / "state", copy_to=copies, **keeps))


def test_all_that_was_written_is_durable_before_the_record_counts(tmp_path, monkeypatch):
    opt = made(tmp_path / "state")
    dirty, seen = set(), []
    calls = {name: getattr(os, name) for name in ("pwritev", "fdatasync", "replace")}

    def pwritev(fd, *rest):
        dirty.add(os.fstat(fd).st_ino)
        return calls["pwritev"](fd, *rest)

    def fdatasync(fd):
        calls["fdatasync"](fd)
        seen.append(os.fstat(fd).st_ino in dirty)
        dirty.discard(os.fstat(fd).st_ino)

    def replace(*paths):
        assert not dirty
        seen.append("record")
        calls["replace"](*paths)

    for call in (pwritev, fdatasync, replace):
        monkeypatch.setattr(os, call.__name__, call)
    opt.step(gradients(0))
    assert seen[-1] == "record"
    assert seen.count(True) == len(list((tmp_path / "state").glob("*.bucket"))) > 1


@pytest.mark.parametrize("name", ["pwritev", "replace"])
def test_without_parameters_a_failed_step_ends_the_run(name, tmp_path, monkeypatch):
    opt = made(tmp_path / "state")
    opt.step(gradients(0))
    before, params = everything(opt), [x.copy() for x in opt.param_groups[0]["params"]]
    with monkeypatch.context() as patch:
        fault = Fault(patch, name, 1)
        with pytest.raises(OSError, match=r"No space left on device: the state on disk can't be written") as caught:
            opt.step(gradients(1))
        fault.mend()
    assert re.search(r"\d of \d buckets of the parameters are stepped, .* put those of the last whole step back",
                     caught.value.__notes__[0])  # fmt: skip
    for call in (lambda: opt.step(gradients(1)), lambda: opt.save(tmp_path / "x"), opt.rollback, opt.state_dict):
        with pytest.raises(RuntimeError, match=r"can't go on: a step failed .*state_path="):
            call()
    assert_same(before, everything(made(tmp_path / "state", params)))


def test_a_first_read_that_fails_changes_nothing(tmp_path, monkeypatch):
    opt = made(tmp_path / "state", max_grad_norm=None)
    before = everything(opt)
    with monkeypatch.context() as patch:
        fault = Fault(patch, "preadv", 1, errno.EIO)
        with pytest.raises(OSError, match=r"the state on disk can't be read") as caught:
            opt.step(gradients(0))
        fault.mend()
    assert caught.value.__notes__ == ["nothing was changed by this step"]
    assert_same(before, everything(opt))
    opt.step(gradients(0))


@pytest.mark.parametrize("size", [4096, 64_000, 6209])
def test_short_transfers(size, tmp_path, monkeypatch):
    """The system may move fewer bytes than it was asked to."""
    if size % 4096:  # without regard to pages, where they go through the system's memory
        monkeypatch.setattr(os, "open", buffered(os.open))
    for name in ("preadv", "pwritev"):
        monkeypatch.setattr(os, name, short(getattr(os, name), size))
    opt, memory = construct(tmp_path / "state", start()), ac.AdamW(start(), **OPTIONS)
    for t in range(2):
        opt.step(gradients(t))
        memory.step(gradients(t))
    assert_same(everything(memory), everything(opt))


def short(call, size):
    """A preadv or pwritev that moves at most `size` bytes.  A slice of a memoryview stays where its memory is."""
    return lambda fd, buffers, at: call(fd, [memoryview(buffers[0])[:size]], at)


def buffered(call):
    """An os.open of a file system that has no O_DIRECT."""

    def instead(path, flags, *args, **kwargs):
        if flags & getattr(os, "O_DIRECT", 0):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return call(path, flags, *args, **kwargs)

    return instead


@pytest.mark.parametrize("at", ["nothing", "a part of a page"])
def test_a_disk_that_takes_no_more(at, tmp_path, monkeypatch):
    opt = construct(tmp_path / "state", start())
    before, call = everything(opt), os.pwritev
    monkeypatch.setattr(
        os,
        "pwritev",
        lambda fd, buffers, place: (
            call(fd, [buffers[0][: 0 if at == "nothing" else 100]], place) if at == "nothing" else 100
        ),
    )
    with pytest.raises(OSError, match=r"byte \d+: the file takes no more bytes"):
        opt.step(gradients(0))
    assert_same(before, everything(opt))


def test_no_space_at_the_beginning(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        Fault(patch, "posix_fallocate", 2)
        with pytest.raises(OSError, match=r"the state needs \d+ bytes, which are set aside at the beginning"):
            construct(tmp_path / "state", start())
    assert not list((tmp_path / "state").glob("*.bucket"))
    construct(tmp_path / "state", start()).step(gradients(0))


def test_a_record_that_may_be_on_disk_ends_the_run(tmp_path, monkeypatch):
    """The folder can't be synced after the record was renamed: which one a power cut would leave is not known."""
    opt = construct(tmp_path / "state", start())
    memory = ac.AdamW(start(), **OPTIONS)
    with monkeypatch.context() as patch:
        call = os.replace

        def replace(old, new):
            call(old, new)
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        patch.setattr(os, "replace", replace)
        with pytest.raises(OSError, match=r"the state on disk can't be written") as caught:
            opt.step(gradients(0))
    assert "it is not known whether the step is on disk" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match=r"it is not known whether the last step is on disk"):
        opt.step(gradients(0))
    memory.step(gradients(0))
    assert_same(everything(memory), on_disk(tmp_path / "state", state_parameters=True))


@pytest.mark.parametrize(("what", "name"), [("load", "pwritev"), ("load", "replace"), ("rebind", "preadv"),
                                            ("rebind", "pwritev"), ("rebind", "replace"), ("rollback", "preadv"),
                                            ("rollback", "replace")])  # fmt: skip
def test_what_replaces_all_and_fails_ends_the_run(what, name, tmp_path, monkeypatch):
    """Parameters, counts and state would be those of different steps.  The folder has what it had."""
    options = {"keep_undo": True, "state_parameters": True, "master": "float32"}

    def halves(t):
        return [x.astype("f2") for x in (gradients(t) if t else start())]

    opt = made(tmp_path / "state", halves(0), **options)
    opt.step(halves(2))
    opt.save(tmp_path / "saved")
    opt.step(halves(3))
    before = everything(opt)
    call = {"load": lambda: opt.load(tmp_path / "saved"), "rebind": lambda: opt.rebind(halves(0)),
            "rollback": opt.rollback}[what]  # fmt: skip
    with monkeypatch.context() as patch:
        fault = Fault(patch, name, 2 if name == "pwritev" else 1, errno.EIO)
        with pytest.raises(OSError, match=r"the state on disk can't be") as caught:
            call()
        fault.mend()
    assert re.search(r"can't go on: .*state_path=", caught.value.__notes__[0])
    with pytest.raises(RuntimeError, match=r"can't go on: a (load|rollback|call that .*) failed"):
        opt.step(halves(2))
    assert_same(before, everything(made(tmp_path / "state", [np.zeros_like(x) for x in halves(0)], **options)))


def test_another_folder_in_its_place(tmp_path):
    """A run that goes on although its folder was removed, and another one was begun there, writes nothing to that."""
    old = made(tmp_path / "state", state_memory=10_000_000)
    old.step(gradients(0))
    shutil.rmtree(tmp_path / "state")
    new, wanted = construct(tmp_path / "state", start()), everything(old)
    with pytest.raises(FileNotFoundError, match=r"this optimizer's folder was replaced by another one") as caught:
        old.step(gradients(1))
    assert caught.value.__notes__ == ["nothing was changed by this step"]
    assert_same(wanted, everything(old))
    new.close()
    assert on_disk(tmp_path / "state", state_parameters=True)["t"] == 0


@pytest.mark.parametrize("how", ["removed", "moved"])
@pytest.mark.parametrize("memory", [230_000, 10_000_000])
def test_a_folder_that_vanishes(memory, how, tmp_path):
    opt = ac.AdamW(start(), state_path=tmp_path / "state", state_memory=memory, **OPTIONS)
    opt.step(gradients(0))
    before, params = everything(opt), [x.copy() for x in opt.param_groups[0]["params"]]
    shutil.move(tmp_path / "state", tmp_path / "elsewhere")
    if how == "removed":
        (tmp_path / "state").mkdir()
    with pytest.raises(FileNotFoundError, match=r"put the folder back if it was moved") as caught:
        opt.step(gradients(1))
    if how == "removed":
        (tmp_path / "state").rmdir()
    assert str(tmp_path / "state") in str(caught.value)
    shutil.move(tmp_path / "elsewhere", tmp_path / "state")
    assert caught.value.__notes__ == ["nothing was changed by this step"]
    assert_same(before, everything(opt))
    opt.close()
    assert_same(before, everything(ac.AdamW(params, state_path=tmp_path / "state", state_memory=memory, **OPTIONS)))


# --- damage ----------------------------------------------------------------------------------------------------------


def buckets(folder):
    return sorted(folder.glob("*.bucket"))


def flip(path, at):
    with open(path, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 16]))


def in_force(folder, bucket):
    """Where the slot of a bucket begins that is in force."""
    with file.reading(folder / "record") as (_, arrays):
        slots = np.empty(arrays["slots"].size, "uint8")
        arrays["slots"].read(0, slots)
    return int(slots[bucket]) * os.path.getsize(buckets(folder)[bucket]) // 2


def test_flipped_bits(tmp_path):
    """Found when the folder is opened, and by a step while it is in use; never stepped with."""
    folder = tmp_path / "state"
    opt = construct(folder, start())
    opt.step(gradients(0))
    opt.close()
    half = os.path.getsize(buckets(folder)[0]) // 2
    for place in (0, 5000, half // 2):
        flip(buckets(folder)[0], in_force(folder, 0) + place)
        with pytest.raises(OSError, match=r"bucket of the state is damaged: .*load a checkpoint.*000000\.bucket"):
            construct(folder, start())
        flip(buckets(folder)[0], in_force(folder, 0) + place)
    opt = construct(folder, [np.zeros_like(x) for x in start()])
    before = everything(opt)
    opt.step([None] * 4)
    last = len(buckets(folder)) - 1
    place = in_force(folder, last) + 100
    flip(buckets(folder)[last], place)
    with pytest.raises(OSError, match=r"is damaged") as caught:
        opt.step([np.ones_like(x) for x in start()])
    assert caught.value.__notes__[0].startswith("parameters and state are as the last step left them; what you have")
    assert_same(before["t"], opt.t)
    opt.close()
    flip(buckets(folder)[last], place)
    assert_same(before, on_disk(folder, state_parameters=True))


def test_the_other_slot_may_be_anything(tmp_path):
    folder = tmp_path / "state"
    opt = construct(folder, start())
    opt.step(gradients(0))
    before = everything(opt)
    opt.close()
    for i, path in enumerate(buckets(folder)):
        half = os.path.getsize(path) // 2
        with open(path, "r+b") as f:
            f.seek(half - in_force(folder, i))
            f.write(b"\xff" * half)
    assert_same(before, on_disk(folder, state_parameters=True))


def test_a_file_that_is_cut_short(tmp_path):
    folder = tmp_path / "state"
    opt = construct(folder, start())
    os.truncate(buckets(folder)[-1], 5000)
    with pytest.raises(OSError, match=r"the file ends here: it was cut short|can't be read"):
        opt.step(gradients(0))
    opt.close()
    with pytest.raises(OSError, match=r"has 5000 bytes, but must have \d+: it was cut short or replaced"):
        construct(folder, start())
    buckets(folder)[0].unlink()
    with pytest.raises(OSError, match=r"put the folder back|No such file"):
        construct(folder, start())


def test_a_record_that_is_damaged_or_gone(tmp_path):
    folder = tmp_path / "state"
    construct(folder, start()).close()
    size = os.path.getsize(folder / "record")
    for place in (0, 20, size // 2, size - 3):
        flip(folder / "record", place)
        with pytest.raises(ValueError, match=r"record (is damaged|is no checkpoint|does not end)"):
            construct(folder, start())
        flip(folder / "record", place)
    (folder / "begun").touch()  # as if it were killed when the first record was written
    construct(folder, start()).close()
    (folder / "record").unlink()
    with pytest.raises(ValueError, match=r"has buckets of state, but no file 'record', .*empty the folder"):
        construct(folder, start())


def test_other_versions_optimizers_and_formats(tmp_path):
    folder = tmp_path / "state"
    construct(folder, start()).close()

    def refused(message, cls=ac.AdamW, params=None, error=ValueError, **options):
        with pytest.raises(error, match=message) as caught:
            cls(start() if params is None else params, state_path=folder,
                **{"state_parameters": True, "ema_decay": 0.9, **options})  # fmt: skip
        said = "".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
        assert re.search(r"construct the optimizer (with the same|as the one)|use the one that wrote it", said)

    refused("is of AdamW, this optimizer is Adam", ac.Adam)
    refused("its state_dtype is 'float32', this optimizer's 'uint8'", state_dtype="uint8")
    refused("has the state .*, this optimizer's .*max_exp_avg_sq", amsgrad=True)
    refused("has the state .*ema.*construct it with the options", ema_decay=None)
    refused(r"has \d+ elements, this optimizer's 3", params=[np.zeros(3, "f4")])
    refused("its parameters are 'float32', this optimizer's 'float64'", params=[x.astype("f8") for x in start()])
    refused(
        "2 parameter groups|1 parameter group, this optimizer 2",
        params=[{"params": start()[:2]}, {"params": start()[2:]}],
    )
    refused("was written with state_parameters=True: construct the optimizer with the same", state_parameters=False)
    with file.reading(folder / "record") as (head, arrays):
        stored = {}
        for name, x in arrays.items():
            stored[name] = file.Entry(str(x.dtype), [np.empty(x.size, x.dtype)])
            x.read(0, stored[name].pieces[0])
    head["disk"]["version"] = 7
    file.write(folder / "record", head, stored)
    refused("has the version 7 of state on disk, this adaptive_c has 1: use the one that wrote it")


@pytest.mark.parametrize("what", ["file", "other", "parent"])
def test_folders_that_are_none(what, tmp_path):
    path = tmp_path / "state"
    if what == "file":
        path.write_text("")
        error, message = NotADirectoryError, "state_path must be a folder, and this is none"
    elif what == "other":
        path.mkdir()
        (path / "letters.txt").write_text("")
        error, message = ValueError, r"has other files in it, such as 'letters\.txt'; give an empty folder"
    else:
        path = path / "deeper"
        error, message = FileNotFoundError, "there is no such folder to make state_path in"
    with pytest.raises(error, match=message):
        construct(path, start())


# --- other processes -------------------------------------------------------------------------------------------------


def test_two_processes(tmp_path):
    folder = tmp_path / "state"
    with script("disk_steps.py", folder, 10**9, json.dumps({"unsynced": True})) as process:
        assert process.stdout.readline().startswith("0 ")
        with pytest.raises(BlockingIOError, match=f"another optimizer has the state .* in process {process.pid}"):
            construct(folder, start())
        process.kill()
    assert construct(folder, start()).t >= 0


def test_a_forked_child(tmp_path):
    """It has no part in the folder, and does not keep it from others."""
    opt = construct(tmp_path / "state", start(), on_nonfinite="skip")
    opt.step([None] * 4)
    record = (tmp_path / "state" / "record").read_bytes()
    read, write = os.pipe()
    held, release = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = b"stepped"
        try:
            opt.step([np.full_like(x, np.nan) for x in start()])  # which touches no bucket
        except RuntimeError as error:
            said = str(error).encode()
        finally:
            os.write(write, said)
            os.close(release)
            os.read(held, 1)
            os._exit(0)
    assert b"belongs to the process that made it" in os.read(read, 1000)
    assert (tmp_path / "state" / "record").read_bytes() == record
    opt.close()
    construct(tmp_path / "state", start()).close()  # while the child lives
    os.close(release)
    os.waitpid(pid, 0)
    for fd in (read, write, held):
        os.close(fd)


def test_a_forked_child_has_no_copy_of_the_buffers(tmp_path, monkeypatch):
    """Pages that this process goes on to write would be copied for each child, and it can't use them anyway."""
    maps = []

    class Watched(mmap.mmap):
        def __init__(self, *args, **kwargs):
            maps.append(self)

    monkeypatch.setattr(mmap, "mmap", Watched)
    opt = ac.SGD(start(), momentum=0.5, state_path=tmp_path / "state")  # all of its state stays in memory
    opt.step(gradients(0))
    filled = [memory for memory in maps if np.frombuffer(memory, "u1").any()]
    assert sum(map(len, filled)) >= sum(x.nbytes for x in start())
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(write, repr(opt.state["momentum_buffer"]).encode())
        except RuntimeError as error:
            os.write(write, str(error).encode())
        finally:
            os.write(write, b" %d" % sum(np.frombuffer(memory, "u1").any() for memory in filled))
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with open(read, "rb") as told:
        said = told.read()
    assert b"belongs to the process that made it" in said
    assert said.endswith(b" 0")


def test_from_another_thread(tmp_path):
    memory, opt = ac.AdamW(start(), **OPTIONS), construct(tmp_path / "state", start())
    for t in range(2):
        memory.step(gradients(t))
        in_another_thread(lambda t=t: opt.step(gradients(t)))
    assert_same(everything(memory), everything(opt))


# --- interrupts ------------------------------------------------------------------------------------------------------


def test_ctrl_c_at_every_place(tmp_path):
    """A step takes place as a whole or not at all, in memory and on disk; the interrupt comes through at its end."""
    opt, steps = construct(tmp_path / "state", start()), 0
    wanted = [everything(opt)]
    for n in itertools.count(1):
        grads = gradients(0)
        try:
            reached = at(n, lambda grads=grads: opt.step(grads, progress=lambda done, total: None))
        except KeyboardInterrupt:
            reached = True
        if len(wanted) == opt.t:  # one that is not known yet
            memory = ac.AdamW(start(), **OPTIONS)
            for _ in range(opt.t):
                memory.step(gradients(0))
            wanted.append(everything(memory))
        assert_same(wanted[opt.t], everything(opt))
        steps += 1
        if not reached:
            break
    assert steps > 3
    assert opt.t >= 2
    opt.close()
    assert_same(wanted[-1], on_disk(tmp_path / "state", state_parameters=True))


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("name", ["pwritev", "fdatasync"])
@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="there are no such signals")
def test_ctrl_c_while_buckets_are_written(name, times, tmp_path, monkeypatch):
    """The first one waits for the step to end, the second one does not."""
    memory, opt = ac.AdamW(start(), **OPTIONS), construct(tmp_path / "state", start())
    before, main = everything(opt), threading.get_ident()
    call, sent, one, noticed = getattr(os, name), [], threading.Lock(), threading.Event()

    def pressed(number, frame):
        if not noticed.is_set():  # the same one may have been sent again
            noticed.set()
            raise KeyboardInterrupt

    noticed.set()

    def interrupted(*args):
        with one:  # two signals at once would be one
            if len(sent) < times:
                sent.append(1)
                noticed.clear()
                while not noticed.is_set():  # a thread notices none that comes just before it begins to wait
                    signal.pthread_kill(main, signal.SIGINT)
                    noticed.wait(0.05)
        return call(*args)

    old = signal.signal(signal.SIGINT, pressed)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                opt.step(gradients(0))
    finally:
        signal.signal(signal.SIGINT, old)
    if times == 2:
        assert_same(before, everything(opt))
        opt.step(gradients(0))
    memory.step(gradients(0))
    assert_same(everything(memory), everything(opt))


def test_at_exit(tmp_path):
    """Nothing hangs when Python ends, a step that is made then is made, and the folder is kept until then."""
    script = f"""
import atexit, sys; sys.path.insert(0, {str(HERE)!r})
from disk_steps import *
def at_exit():
    opt.step(gradients(1))
    print(opt.t)
    try:
        construct({str(tmp_path / "state")!r}, start())
    except BlockingIOError:
        print("kept")
atexit.register(at_exit)
opt = construct({str(tmp_path / "state")!r}, start())
opt.step(gradients(0))
"""
    assert child(script) == "2\nkept\n"


def test_ctrl_c_at_every_place_of_a_load(tmp_path):
    """It takes place as a whole or not at all."""
    opt, other = construct(tmp_path / "state", start()), made(tmp_path / "other")
    other.step(gradients(2))
    old, new, seen = opt.state_dict(), other.state_dict(), set()
    for n in itertools.count(1):
        try:
            reached = at(n, lambda: opt.load_state_dict(new))
        except KeyboardInterrupt:
            reached = True
        seen.add(opt.t)
        assert_same(new if opt.t else old, opt.state_dict())
        if opt.t:
            opt.load_state_dict(old)
        if not reached:
            break
    assert seen == {0, 1}


def test_ctrl_c_at_every_place_of_a_look(tmp_path):
    """It costs no memory that steps need."""
    opt = construct(tmp_path / "state", start())
    for n in itertools.count(1):
        try:
            reached = at(n, lambda: opt.state["exp_avg"])
        except KeyboardInterrupt:
            reached = True
        if not reached:
            break
    assert n > 10
    opt.step(gradients(0))
    opt.close()

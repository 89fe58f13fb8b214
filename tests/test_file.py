"""The file of a checkpoint: what is in it, what is refused, and what errors, interrupts, kills and lack of memory leave."""

import functools
import io
import json
import os
import stat
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support import assert_same, assert_same_bits, child, everything, flat, make

import adaptive_c as ac
from adaptive_c._checkpoint import file

DATA = Path(__file__).with_name("data")
NPZ = DATA / "checkpoint-v1.npz"  # version 0.1 could write them

# --- files -----------------------------------------------------------------------------------------------------------


def test_the_path_is_used_as_given(tmp_path):
    opt, other = make(), make(seed=1)
    for name in ("a", "b.st", "c d.safetensors"):
        opt.save(tmp_path / name)
        assert (tmp_path / name).read_bytes()[8:].startswith(b"{")
        other.load(os.fsencode(tmp_path / name))
        assert_same(everything(opt), everything(other))
    assert sorted(os.listdir(tmp_path)) == ["a", "b.st", "c d.safetensors"]


def test_no_npz_is_written(tmp_path):
    opt = make()
    message = r"can't be written: checkpoints are safetensors files now.* a path that ends in .safetensors \(load still"
    (tmp_path / "a.npz").write_bytes(b"kept")
    (tmp_path / "link").symlink_to(tmp_path / "a.npz")
    (tmp_path / "link.npz").symlink_to(tmp_path / "b")
    for name in ("a.npz", "link", "link.npz"):
        with pytest.raises(ValueError, match=message):
            opt.save(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["a.npz", "link", "link.npz"]
    assert (tmp_path / "a.npz").read_bytes() == b"kept"


def test_other_programs_read_them(tmp_path):
    safetensors = pytest.importorskip("safetensors")
    opt = make(cls=ac.Lion, state_dtype="bfloat16")
    opt.save(tmp_path / "a")
    with safetensors.safe_open(tmp_path / "a", "np") as found:
        assert json.loads(found.metadata()["adaptive_c"])["class"] == "Lion"
        assert found.get_slice("0.exp_avg").get_dtype() == "BF16"
        assert_same_bits(found.get_tensor("0.params"), flat(opt.param_groups[0]["params"]))


def test_a_checkpoint_has_no_pickle_and_no_time(tmp_path):
    opt = make()
    for name in "ab":
        opt.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    source = "".join(path.read_text() for path in Path(ac.__file__).parent.rglob("*.py"))
    assert "import pickle" not in source
    assert "allow_pickle=True" not in source


def kinds(size):
    """An array of each kind, of several pieces each."""
    rng = np.random.default_rng(0)
    return {
        kind: file.Entry(
            kind, [np.frombuffer(bytearray(rng.bytes(n * dtype.itemsize)), dtype) for n in (size, 0, 1, size // 3)]
        )
        for kind, dtype in ((kind, file._DTYPES[code]) for kind, code in reversed(file._CODES.items()))
    }


@pytest.mark.parametrize("size", [0, 5, 3000])
def test_every_kind_in_pieces_of_any_size(size, tmp_path, monkeypatch):
    """What is written in one way is read in another, and the checksum does not depend on how it was computed."""
    arrays = kinds(size)
    contents = set()
    for piece in (1 << 20, 1 << 10, 96):
        monkeypatch.setattr(file, "_PIECE", piece)
        for start in (file._start, lambda f, *args: False, lambda f, *args: f(*args) is None):  # all summed beside
            monkeypatch.setattr(file, "_start", start)
            file.write(tmp_path / "a", {"x": 1}, arrays)
            contents.add((tmp_path / "a").read_bytes())
    (raw,) = contents
    assert int(raw[-9:-1], 16) == zlib.crc32(raw[:-9] + b"00000000\n")
    with file.reading(tmp_path / "a") as (head, found):
        assert head == {"x": 1}
        assert found.keys() == arrays.keys()
        for name, entry in arrays.items():
            whole, stored = np.concatenate(entry.pieces), found[name]
            assert (stored.dtype, stored.size) == (whole.dtype, whole.size)
            assert stored.offset % whole.itemsize == 0  # as other programs want it, which map the file into memory
            for start, stop in ((0, whole.size), (whole.size // 2, whole.size), (0, 0), (whole.size - 1, whole.size)):
                out = np.empty(stop - start, stored.dtype)
                stored.read(start, out)
                assert out.tobytes() == whole[start:stop].tobytes()


def test_the_number_of_system_calls_does_not_grow_with_the_number_of_arrays(tmp_path, monkeypatch):
    written = []

    class Counting(io.FileIO):
        def write(self, data):
            written.append(len(data))
            return super().write(data)

    def counting(path, mode, buffering=-1):
        return io.BufferedWriter(Counting(path, mode), buffering) if mode == "xb" else open(path, mode, buffering)

    monkeypatch.setattr(file, "open", counting, raising=False)
    arrays = {f"{i}.x": file.Entry("float32", [np.full(3, i, "f4")]) for i in range(20_000)}
    file.write(tmp_path / "a", {}, arrays)
    assert sum(written) == os.path.getsize(tmp_path / "a")
    assert len(written) < 50
    with file.reading(tmp_path / "a") as (_, found):
        out = np.empty(3, "f4")
        for i in range(0, 20_000, 999):
            found[f"{i}.x"].read(0, out)
            assert (out == i).all()


# --- damage ----------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path):
    opt, other = make(shapes=((5,), (3,))), make(seed=1, shapes=((5,), (3,)))
    opt.save(tmp_path / "a")
    before = everything(other)
    rng = np.random.default_rng(0)
    target = tmp_path / "b"
    for raw, step in ((NPZ.read_bytes(), 29), ((tmp_path / "a").read_bytes(), 1)):
        for place in range(0, len(raw), step):
            damaged = bytearray(raw)
            damaged[place] ^= 1 << int(rng.integers(8))
            target.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"is damaged|does not end as|is no checkpoint"):
                other.load(target)
        for size in {*range(0, len(raw), 7 * step), *range(len(raw) - 40, len(raw))}:
            target.write_bytes(raw[:size])
            with pytest.raises(
                ValueError, match=r"does not end as a checkpoint of adaptive_c does: it was cut short|no check"
            ):
                other.load(target)
        target.write_bytes(raw + b"\n")
        with pytest.raises(ValueError, match="does not end as"):
            other.load(target)
    assert_same(before, everything(other))
    target.write_bytes(raw)
    other.load(target)


def test_damage_deep_in_a_large_file_is_noticed(tmp_path):
    opt = ac.Lion(np.ones(3 << 20, "f4"))  # several pieces
    path = tmp_path / "a"
    opt.save(path)
    rng = np.random.default_rng(1)
    before = everything(opt)
    for _ in range(10):
        with open(path, "r+b") as damaged:
            damaged.seek(int(rng.integers(os.path.getsize(path))))
            byte = damaged.read(1)
            damaged.seek(-1, os.SEEK_CUR)
            damaged.write(bytes([byte[0] ^ 16]))
            damaged.flush()
            with pytest.raises(
                ValueError, match=r"is damaged: its checksum is [0-9a-f]{8}, its contents have|no check|not end"
            ):
                opt.load(path)
            damaged.seek(-1, os.SEEK_CUR)
            damaged.write(byte)
    assert_same(before, everything(opt))
    opt.load(path)


def test_a_file_that_is_cut_short_while_it_is_read(tmp_path):
    file.write(tmp_path / "a", {}, {"x": file.Entry("uint8", [np.zeros(10_000, "u1")])})
    with file.reading(tmp_path / "a") as (_, found):
        os.truncate(tmp_path / "a", 5000)
        with pytest.raises(OSError, match="was cut short while it was read; load a whole one before the next step"):
            found["x"].read(0, np.empty(10_000, "u1"))


def reseal(raw):
    """The contents with a checksum that fits them."""
    body = raw[: -file._END_SIZE]
    return body + file._END % zlib.crc32(body + file._END % 0)


def test_foreign_files(tmp_path):
    opt = make()
    before = everything(opt)
    path = tmp_path / "a"
    contents = {"": b"", "text": b"hello, this is no checkpoint", "pickle": b"\x80\x04\x95\x10\x00\x00\x00"}
    for data in contents.values():
        path.write_bytes(data)
        with pytest.raises(
            ValueError, match=r"is no checkpoint: it begins like neither a safetensors file nor an .npz"
        ):
            opt.load(path)
    np.savez(tmp_path / "b.npz", a=np.ones(3))
    with pytest.raises(
        ValueError, match=r"b.npz does not end as a checkpoint of adaptive_c does.*another program wrote it"
    ):
        opt.load(tmp_path / "b.npz")
    numpy = pytest.importorskip("safetensors.numpy")
    numpy.save_file({"a": np.ones(30, "f4")}, tmp_path / "c")
    with pytest.raises(ValueError, match="another program wrote it"):
        opt.load(tmp_path / "c")
    with pytest.raises(FileNotFoundError):
        opt.load(tmp_path / "nothing")
    assert_same(before, everything(opt))


NONSENSE = {
    "{}": "is no checkpoint that this version can read: KeyError",
    "{": "is no checkpoint that this version can read: JSONDecodeError",
    '{"__metadata__":{}}': "is no checkpoint that this version can read: KeyError",
    '{"__metadata__":{"adaptive_c":"{}"},"end":0}': "has no 'groups'",
    '{"__metadata__":{"adaptive_c":"[]"},"end":0}': "must be a dict",
    '{"__metadata__":{"adaptive_c":"{}"},"end":0,"a":{"dtype":"F3","data_offsets":[0,4]}}': "can read: KeyError",
    '{"__metadata__":{"adaptive_c":"{}"},"end":0,"a":{"dtype":"F32","data_offsets":[0,4000]}}': "names data outside of it",
    '{"__metadata__":{"adaptive_c":"{}"},"end":0,"a":{"dtype":"F32","data_offsets":[0,200]}}': "names data outside of it",
    '{"__metadata__":{"adaptive_c":"{}"},"end":0,"a":{"dtype":"F32","data_offsets":[-900,0]}}': "names data outside of it",
}


@pytest.mark.parametrize("header", NONSENSE)
def test_nonsense_with_the_right_checksum(header, tmp_path):
    raw = header.encode()
    (tmp_path / "a").write_bytes(reseal(struct.pack("<Q", len(raw)) + raw + b" " * 100))
    with pytest.raises((ValueError, TypeError), match=NONSENSE[header]):
        make().load(tmp_path / "a")


# --- where it is written ---------------------------------------------------------------------------------------------


def test_where_nothing_can_be_saved(tmp_path):
    opt = make()
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*gone to save in"):
        opt.save(tmp_path / "gone" / "a")
    with pytest.raises(ValueError, match="exists and is no regular file; give another path"):
        opt.save(tmp_path)
    if os.path.exists("/dev/full"):
        with pytest.raises(ValueError, match="no regular file"):
            opt.save("/dev/full")
    assert os.listdir(tmp_path) == []


def test_a_link_stays_a_link(tmp_path):
    opt, other = make(), make(seed=1)
    (tmp_path / "runs").mkdir()
    (tmp_path / "latest").symlink_to(tmp_path / "runs" / "a")
    for _ in range(2):
        opt.save(tmp_path / "latest")
        assert (tmp_path / "latest").is_symlink()
        assert os.listdir(tmp_path / "runs") == ["a"]
    other.load(tmp_path / "latest")
    assert_same(everything(opt), everything(other))


def test_a_folder_that_may_be_written_but_not_listed(tmp_path, monkeypatch):
    """Leftovers are not found there, and the rename can't be synced."""
    opt, real = make(), os.open

    def refused(path, *args):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args)

    monkeypatch.setattr(file.os, "listdir", refused)
    monkeypatch.setattr(file.os, "open", refused)
    opt.save(tmp_path / "a")
    opt.save(tmp_path / "a")
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a"]
    make(seed=1).load(tmp_path / "a")


def limit_files(size):
    """No file may grow beyond this: what a full disk does, done by the system."""
    resource = pytest.importorskip("resource")
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_an_error_while_saving_leaves_the_old_file(call, tmp_path, monkeypatch):
    opt = make()
    opt.save(tmp_path / "a")
    old = (tmp_path / "a").read_bytes()
    opt.step([np.ones((3, 4), "f4"), np.ones((), "f4"), None])

    def full(*args):
        raise OSError(28, "No space left on device")

    if call == "write":
        limit_files(1000)
    else:
        monkeypatch.setattr(file.os, call, full)
    try:
        with pytest.raises(OSError, match=r"No space left|File too large"):
            opt.save(tmp_path / "a")
    finally:
        if call == "write":
            limit_files(-1)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == old
    opt.save(tmp_path / "a")  # and nothing is held


def test_everything_is_on_the_disk_before_the_rename_and_the_rename_at_the_end(tmp_path, monkeypatch):
    calls = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    def note(name, *args):
        if name == "fsync" and stat.S_ISREG(os.fstat(args[0]).st_mode):
            (temporary,) = os.listdir(tmp_path)
            assert (tmp_path / temporary).read_bytes().endswith(b"\n")  # no byte is still to be written
        calls.append("folder" if name == "fsync" and stat.S_ISDIR(os.fstat(args[0]).st_mode) else name)
        return real[name](*args)

    for name in real:
        monkeypatch.setattr(file.os, name, functools.partial(note, name))
    make().save(tmp_path / "a")
    assert calls == ["fsync", "replace", "folder"]


def test_leftovers_are_removed_and_living_writers_left_alone(tmp_path):
    held = file._create_temporary(str(tmp_path))
    dead = tmp_path / ".adaptive_c-0123456789abcdef.tmp"
    others = [".adaptive_c-0123456789abcdef.tmp.bak", "x.tmp"]
    for path in (dead, *(tmp_path / name for name in others)):
        path.write_bytes(b"rest")
    make().save(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == sorted([os.path.basename(held.name), "a", *others])
    held.close()  # as the system does for a killed process
    make().save(tmp_path / "a")
    assert sorted(os.listdir(tmp_path)) == sorted(["a", *others])


def test_a_step_meets_no_checkpoint_half_written(tmp_path, monkeypatch):
    """While a file is written, or read, a step of another thread is refused."""
    opt = make()
    opt.save(tmp_path / "a")
    refused = []

    def try_step(*args):
        with pytest.raises(RuntimeError, match=r"this optimizer is in use"):
            opt.step([np.ones((3, 4), "f4"), None, None])
        refused.append(args)

    fsync, read = os.fsync, file.Stored.read
    monkeypatch.setattr(file.os, "fsync", lambda fd: (try_step(), fsync(fd)))
    opt.save(tmp_path / "a")
    monkeypatch.setattr(
        file.Stored, "read", lambda self, start, out: (out.size == 313 and try_step(), read(self, start, out))
    )
    opt.load(tmp_path / "a")
    assert len(refused) >= 4  # while it was written, and the folder synced, and while each of two states was read


def test_the_json_is_strict(tmp_path):
    def refuse(name):
        raise AssertionError(name)

    opt = make(max_grad_norm=1.0, steps=0, bounds=(-np.inf, 5), betas=(ac.schedules.constant(0.5), np.float32(0.75)))
    for grad in (None, np.inf, np.nan, 1.0):
        if grad is not None:
            with np.errstate(all="ignore"):
                opt.on_nonfinite = "skip"
                opt.step([np.full((3, 4), grad, "f4"), None, None])
        opt.save(tmp_path / "a")
        with file.reading(tmp_path / "a") as (head, _):
            json.loads(json.dumps(head), parse_constant=refuse)
        other = make(seed=1, max_grad_norm=3.0)
        other.load(tmp_path / "a")
        np.testing.assert_equal(other.grad_norm, opt.grad_norm)
        assert other.param_groups[0]["bounds"] == (None, 5.0)
        assert other.param_groups[0]["betas"] == (0.5, 0.75)
    assert opt.grad_norm == np.sqrt(np.float64(12))
    d = opt.state_dict()
    d["grad_norm"] = "-inf"
    with pytest.raises(ValueError, match=r"state_dict\['grad_norm'\] can't be '-inf'"):
        opt.load_state_dict(d)


def test_the_permissions_of_a_file_stay(tmp_path, monkeypatch):
    opt = make()
    opt.save(tmp_path / "a")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o666 & ~umask
    seen, fill = [], file._fill

    def looking(temporary, parts):
        seen.append(stat.S_IMODE(os.fstat(temporary.fileno()).st_mode))
        fill(temporary, parts)

    monkeypatch.setattr(file, "_fill", looking)
    for mode in (0o640, 0o600, 0o604):
        os.chmod(tmp_path / "a", mode)
        opt.save(tmp_path / "a")
        assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == mode
        assert set(seen) == {mode}  # from the first byte on: what is private is never open
        seen.clear()
    os.chmod(tmp_path / "a", 0o444)
    opt.save(tmp_path / "a")
    assert stat.S_IMODE(os.stat(tmp_path / "a").st_mode) == 0o444
    assert set(seen) == {0o644}  # a leftover that can't be opened can't be removed


@pytest.mark.parametrize(("number", "fails"), [(22, False), (95, False), (5, True)])
def test_a_folder_that_can_not_be_synced(number, fails, tmp_path, monkeypatch):
    """Some file systems can't; an error of the disk is told, though the new file is there by then."""
    opt = make()
    opt.save(tmp_path / "a")
    opt.step([np.ones((3, 4), "f4"), None, None])
    fsync = os.fsync

    def failing(fd):
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, "not here")
        fsync(fd)

    monkeypatch.setattr(file.os, "fsync", failing)
    if fails:
        with pytest.raises(OSError, match="not here"):
            opt.save(tmp_path / "a")
    else:
        opt.save(tmp_path / "a")
    monkeypatch.undo()
    other = make(steps=0)
    other.load(tmp_path / "a")
    assert other.t == 4
    assert os.listdir(tmp_path) == ["a"]


# --- the second thread -----------------------------------------------------------------------------------------------

AT_THE_END = """
import atexit, sys, threading
import numpy as np
import adaptive_c as ac

p = np.ones(1 << 22, "f4")  # 50 MB: several pieces
opt = ac.AdamW([p])
opt.step([p * 2])

def last(path):
    opt.save(path)
    opt.load(path)
    opt.step([p * 2])
    opt.save(path)

def later(path):
    threading.main_thread().join()
    last(path)

if sys.argv[1] == "atexit":
    atexit.register(last, sys.argv[2])
else:
    threading.Thread(target=later, args=(sys.argv[2],)).start()
"""


@pytest.mark.parametrize("how", ["atexit", "thread"])
def test_save_and_load_while_the_interpreter_ends(how, tmp_path):
    """There may be no new threads then: a last save by atexit, or by a thread that outlives the main one."""
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END, how, tmp_path / "a"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    other = ac.AdamW([np.zeros(1 << 22, "f4")])
    other.load(tmp_path / "a")
    assert other.t == 2


@pytest.mark.parametrize("when", ["it can't be started", "it dies at once", "it dies later"])
def test_a_second_thread_that_is_not_there(when, tmp_path, monkeypatch):
    """The first one does its work, and waits for nothing."""
    opt, other = make(shapes=((3, 4), (), (30_000,))), make(seed=1, shapes=((3, 4), (), (30_000,)))
    main, left, crc32 = threading.get_ident(), [0 if when == "it dies at once" else 20], zlib.crc32
    died = threading.Event()

    def failing(data, crc=0):
        if threading.get_ident() != main:
            if not left[0]:
                died.set()
                raise MemoryError
            left[0] -= 1
        return crc32(data, crc)

    opt.save(tmp_path / "a")
    opt.step([np.ones((3, 4), "f4"), None, None])
    monkeypatch.setattr(file, "_PIECE", 1 << 10)
    if when == "it can't be started":
        before = threading.stack_size(1 << 46)  # which no system has
        try:
            with pytest.raises(RuntimeError, match="can't start new thread"):
                threading.Thread(target=print).start()
            opt.save(tmp_path / "a")
        finally:
            threading.stack_size(before)
    else:
        start = file._start
        monkeypatch.setattr(file, "_start", lambda f, *args: start(f, *args) and (f != file._sum_up or died.wait(60)))
        monkeypatch.setattr(file, "zlib", SimpleNamespace(crc32=failing))
        monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: None)
        opt.save(tmp_path / "a")
        assert died.is_set()
    monkeypatch.undo()
    other.load(tmp_path / "a")
    assert_same(everything(opt), everything(other))


NO_MEMORY = """
import resource, sys, numpy as np, adaptive_c as ac

def late(*_):
    raise TimeoutError("it waits forever")

p = np.ones(1 << 20, "f4")
opt, other = ac.AdamW(p, n_threads=1), ac.AdamW(np.zeros(1 << 20, "f4"), n_threads=1)
opt.save(sys.argv[1])
other.load(sys.argv[1])  # what is imported late is there
signal.signal(signal.SIGALRM, late)
limits = resource.getrlimit(resource.RLIMIT_AS)
ends = []
for what in ("save", "load"):
    for free in (8, 20, 40, 80, 160, 320, 640, 1280, 2560, 20_000):  # kB that are left
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used, limits[1]))
        hog = []
        try:
            while True:
                hog.append(bytes(4000))
        except MemoryError:
            for _ in range(free // 4):
                hog.pop()
        if free == 20_000:
            resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(60)
        try:
            opt.save(sys.argv[1]) if what == "save" else other.load(sys.argv[1])
            end = what
        except (MemoryError, OSError) as error:
            end = "error"
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        del hog
        ends.append(end)
        other.load(sys.argv[1])
        opt.save(sys.argv[1])
print(*ends)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's count of a process's memory")
def test_where_no_memory_is_left(tmp_path):
    """An error, never a hang, and the file is whole."""
    script = NO_MEMORY.replace("import resource, sys,", "import resource, signal, sys,")
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "a"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    ends = done.stdout.split()
    assert (ends[9], ends[19]) == ("save", "load")
    assert "error" in ends[:9]
    assert "error" in ends[10:19]
    assert os.listdir(tmp_path) == ["a"]


# --- crashes and size ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_killed_writer_leaves_the_old_or_the_new_checkpoint(tmp_path):
    """In a process of its own: each writer is a fork, and a copy of this process would be a copy of all that is tested."""
    child(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        f"import file_kills; file_kills.main({str(tmp_path)!r})"
    )
    assert os.listdir(tmp_path) == ["a"]


MEMORY = """
import sys, numpy as np, adaptive_c as ac

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024

n = 1 << 23
cut = [n // 3, n - n // 3] if sys.argv[1] == "load" else [n]
p = [np.ones(k, "f4") for k in cut]
opt = ac.AdamW(p, ema_decay=0.9)
g = [np.ones(k, "f4") for k in cut]
opt.step(g)
(opt.save if sys.argv[1] == "save" else opt.load)(sys.argv[3])  # threads and modules are there
open("/proc/self/clear_refs", "w").write("5")
before = status("VmRSS")
(opt.save if sys.argv[1] == "save" else opt.load)(sys.argv[2])
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="needs Linux's /proc")
def test_by_pieces(tmp_path):
    """A checkpoint of 128 MiB is written and read with 8 MiB beside the optimizer's own arrays."""
    for what in ("save", "load"):
        command = [sys.executable, "-c", MEMORY, what, str(tmp_path / "a"), str(tmp_path / "warm")]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/")
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) < 8, what
    assert os.path.getsize(tmp_path / "a") > 4 << 25

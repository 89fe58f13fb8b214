"""The file of a checkpoint: written beside its name and renamed, verified whole, read by pieces.

What it holds is _state.py's business: here a file is a dict that JSON can express, and flat arrays by name.

Two formats that other programs read too: safetensors, the dict in its metadata under "adaptive_c", and numpy's .npz,
uncompressed, the dict in checkpoint.json.  Either ends with the line _END, which holds the CRC-32 of the whole file as
it would be with zeros for the CRC: in safetensors the last tensor, in .npz the archive's comment.  safetensors' own
package is not used: it reads whole tensors, or maps the file into memory, where a checkpoint is to be read by pieces.
"""

import _thread
import errno
import json
import os
import re
import stat
import struct
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import cycle
from queue import SimpleQueue
from typing import Any, NamedTuple
from weakref import ref

import numpy as np

try:
    import fcntl
except ImportError:  # no locks: what a killed writer left stays
    fcntl = None  # type: ignore[assignment]

Array = np.ndarray[Any, Any]
FORMATS = ("safetensors", "npz")
_PIECE = 4 << 20  # bytes read or written at a time
_END = b"adaptive_c checkpoint %08x\n"
_END_SIZE = len(_END % 0)
_TEMPORARY = re.compile(r"\.adaptive_c-[0-9a-f]{16}\.tmp")
_CODES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "uint8": "U8",
    "int8": "I8",
}  # of safetensors
_DTYPES = {code: np.dtype("uint16" if kind == "bfloat16" else kind) for kind, code in _CODES.items()}


def _work(calls: "SimpleQueue[Any]", results: "SimpleQueue[Any]", ended: list[bool], end: Any) -> None:
    while (call := calls.get()) is not None:
        f, *args = call
        try:
            results.put((f(*args), None))
        except Exception as error:
            results.put((None, error))
        del call, f, args  # which may refer to the owner, whose end is to end this
    ended.append(True)


class _Beside:
    """Calls, one after the other, in a thread beside this one; in this one where none can be had, as at exit.

    Made of what is one call of C each: whatever a Ctrl-C interrupts, there is no lock to be left behind.  The thread
    ends with this object.
    """

    def __init__(self) -> None:
        self.waiting = 0  # calls whose result nobody took
        self._calls: SimpleQueue[Any] = SimpleQueue()
        self._results: SimpleQueue[Any] = SimpleQueue()
        self._ended: list[bool] = []
        end = ref(self, partial(self._calls.put, None))  # no __del__, which would swallow a Ctrl-C
        try:
            _thread.start_new_thread(_work, (self._calls, self._results, self._ended, end))
            self.alone = False
        except RuntimeError as error:
            if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
                raise  # by a signal handler: the thread was started
            self.alone = True

    def call(self, f: Callable[..., Any], *args: Any) -> None:
        self._calls.put((f, *args))
        self.waiting += 1

    def result(self) -> Any:
        """What the first of the calls that wait returned; or what it raised."""
        self.waiting -= 1
        if self.alone:
            f, *args = self._calls.get()
            return f(*args)
        value, error = self._results.get()
        try:
            if error is not None:
                raise error
        finally:
            del error  # its traceback has this frame
        return value

    def close(self) -> None:
        """Wait until nothing runs here any more, whatever comes meanwhile: that is raised in the end."""
        interrupt = None
        while True:
            try:
                self._calls.put(None)
                while not (self._ended or self.alone):
                    time.sleep(1e-4)
                break
            except BaseException as error:
                interrupt = error
        try:
            if interrupt is not None:
                raise interrupt
        finally:
            del interrupt


class _Crc:
    """The CRC-32 of one piece after the other, taken beside this thread: it lags behind by up to LAG pieces."""

    LAG = 3

    def __init__(self) -> None:
        self._beside, self._value = _Beside(), 0

    def add(self, piece: memoryview) -> None:
        self._beside.call(self._add, piece)
        if self._beside.waiting > self.LAG:
            self._beside.result()

    def _add(self, piece: memoryview) -> None:
        self._value = zlib.crc32(piece, self._value)

    def value(self) -> int:
        while self._beside.waiting:
            self._beside.result()
        return self._value


class Entry(NamedTuple):
    """An array that is to be written: what its elements are, and the flat arrays that it is made of."""

    kind: str
    pieces: Sequence[Array]

    @property
    def size(self) -> int:
        return sum(piece.size for piece in self.pieces)

    @property
    def dtype(self) -> "np.dtype[Any]":
        return _DTYPES[_CODES[self.kind]]


class Stored(NamedTuple):
    """An array in a file."""

    file: Any
    offset: int
    size: int
    dtype: "np.dtype[Any]"

    def read(self, start: int, out: Array) -> None:
        """Elements start .. start+out.size-1 into a flat array of the same dtype."""
        raw, at = out.view("uint8"), self.offset + start * self.dtype.itemsize
        if raw.size < 8 * _PIECE:
            self._read(raw, at)
            return
        half, beside = raw.size // 2, _Beside()
        try:  # the pages are in the cache by now: one thread copies slower than memory is
            beside.call(self._read, raw[half:], at + half)
            self._read(raw[:half], at)
            beside.result()
        finally:  # not before nobody writes there any more
            beside.close()

    def _read(self, raw: Array, at: int) -> None:
        view = raw.data if raw.size else b""
        while len(view):
            n = os.preadv(self.file.fileno(), [view], at)
            if n == 0:
                raise OSError("the checkpoint was cut short while it was read; load a whole one before the next step")
            view, at = view[n:], at + n


# --- writing ---------------------------------------------------------------------------------------------------------


class _Stream:
    """A file that is written from start to end, with the CRC-32 of what was written."""

    def __init__(self, file: Any) -> None:
        self._file, self._crc = file, _Crc()
        self._pushed = self.size = 0

    def write(self, data: Any) -> int:
        whole, fd = memoryview(data), self._file.fileno()
        for i in range(0, len(whole), _PIECE):
            piece = whole[i : i + _PIECE]
            self._crc.add(piece)
            while len(piece):
                n = os.write(fd, piece)
                piece, self.size = piece[n:], self.size + n
            if self.size - self._pushed >= 4 * _PIECE and hasattr(os, "posix_fadvise"):
                # Linux begins to write out what it is told will not be needed, and would else wait for fsync.
                os.posix_fadvise(fd, self._pushed, self.size - self._pushed, os.POSIX_FADV_DONTNEED)
                self._pushed = self.size
        return len(whole)

    def flush(self) -> None:
        pass

    def crc(self) -> int:
        return self._crc.value()


def _bytes(entry: Entry) -> Iterator[memoryview]:
    for flat in entry.pieces:
        raw = flat.view("uint8")
        for i in range(0, raw.size, _PIECE):
            yield raw[i : i + _PIECE].data


def _write_safetensors(stream: _Stream, head: str, arrays: Mapping[str, Entry]) -> None:
    header: dict[str, Any] = {"__metadata__": {"adaptive_c": head}}
    at = 0
    for name, entry in arrays.items():
        end = at + entry.size * entry.dtype.itemsize
        header[name] = {"dtype": _CODES[entry.kind], "shape": [entry.size], "data_offsets": [at, end]}
        at = end
    header["end"] = {"dtype": "U8", "shape": [_END_SIZE], "data_offsets": [at, at + _END_SIZE]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    stream.write(struct.pack("<Q", len(text)) + text)
    for entry in arrays.values():
        for piece in _bytes(entry):
            stream.write(piece)
    stream.write(_END % 0)


def _write_npz(stream: _Stream, head: str, arrays: Mapping[str, Entry]) -> None:
    archive = zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED)  # type: ignore[call-overload]
    try:
        archive.comment = _END % 0
        archive.writestr(zipfile.ZipInfo("checkpoint.json"), head)
        for name, entry in arrays.items():
            member = archive.open(zipfile.ZipInfo(name + ".npy"), "w", force_zip64=True)
            about = {"descr": entry.dtype.str, "fortran_order": False, "shape": (entry.size,)}
            np.lib.format.write_array_header_1_0(member, about)
            for piece in _bytes(entry):
                member.write(piece)
            member.close()
        archive.close()
    finally:
        archive.fp = None  # what was interrupted is not to be completed, neither here nor by a destructor


def _little_endian() -> None:
    if sys.byteorder != "little":
        raise NotImplementedError("checkpoints are written and read on little-endian machines only")


def _lock(fd: int, wait: bool) -> None:
    """Hold a temporary file for as long as its writer lives; OSError where somebody holds it, or nobody can."""
    if fcntl is None:
        raise OSError("there are no locks here")
    fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _remove_leftovers(folder: str) -> None:
    """Remove the temporary files of writers that were killed: those that nobody holds."""
    for name in os.listdir(folder):
        if _TEMPORARY.fullmatch(name):
            path = os.path.join(folder, name)
            # held by a writer, renamed meanwhile, or somebody else's
            with suppress(OSError), open(path, "r+b") as file:
                _lock(file.fileno(), wait=False)
                os.unlink(path)


def _create_temporary(folder: str) -> Any:
    """A file that is closed, and so is a leftover, wherever an error comes."""
    while True:
        path = os.path.join(folder, f".adaptive_c-{os.urandom(8).hex()}.tmp")
        file = open(path, "xb", buffering=0)  # noqa: SIM115
        with suppress(OSError):
            _lock(file.fileno(), wait=True)
        if os.path.exists(path):  # otherwise somebody took it for a leftover before it was locked
            return file
        file.close()


def write(path: Any, head: Mapping[str, Any], arrays: Mapping[str, Entry], format: str | None = None) -> None:  # noqa: A002
    """Write a checkpoint; at every moment `path` is the old file or the new one, whole and on the disk."""
    _little_endian()
    format = format or ("npz" if os.fsdecode(path).endswith(".npz") else "safetensors")  # noqa: A001
    path = os.path.realpath(os.fsdecode(path))
    folder = os.path.dirname(path)
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder} to save in; make it first")
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} is there and no plain file; give another path")
    text = json.dumps(head, allow_nan=False)
    arrays = dict(sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize))  # so that all are aligned
    _remove_leftovers(folder)
    temporary = old = None
    try:
        temporary = _create_temporary(folder)
        mode = None
        with suppress(OSError):  # there is none yet, or no permissions
            mode = stat.S_IMODE(os.stat(path).st_mode)
            os.fchmod(temporary.fileno(), mode | stat.S_IWUSR)  # without which nobody could remove a leftover
            old = open(path, "rb", buffering=0)  # noqa: SIM115
        stream = _Stream(temporary)
        (_write_npz if format == "npz" else _write_safetensors)(stream, text, arrays)
        os.pwrite(temporary.fileno(), _END % stream.crc(), stream.size - _END_SIZE)
        if mode is not None:
            with suppress(OSError):
                os.fchmod(temporary.fileno(), mode)
        os.fsync(temporary.fileno())
        os.replace(temporary.name, path)
        _sync_folder(folder)
    except BaseException:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary.name)
        raise
    finally:
        if temporary is not None:
            temporary.close()
        if old is not None:  # it has no name any more, and to free what it held takes the system a while
            beside = _Beside()
            beside.call(old.close)
            if beside.alone:
                beside.result()


def _sync_folder(folder: str) -> None:
    """The rename, too, is to survive a power cut; some file systems don't know how."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


# --- reading ---------------------------------------------------------------------------------------------------------


def _checksum(file: Any, size: int) -> int:
    """CRC-32 of a file as it was before its own CRC was put in."""
    buffers = [memoryview(bytearray(min(_PIECE, size))) for _ in range(_Crc.LAG + 1)]
    at = 0
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    crc = _Crc()
    for buffer in cycle(buffers):  # this one is filled while the others are summed up
        n = os.preadv(file.fileno(), [buffer[: size - _END_SIZE - at]], at) if at < size - _END_SIZE else 0
        if n == 0:
            break
        crc.add(buffer[:n])
        at += n
    return zlib.crc32(_END % 0, crc.value())


def _parse_safetensors(file: Any) -> tuple[Any, dict[str, Stored]]:
    file.seek(0)
    (n,) = struct.unpack("<Q", file.read(8))
    header = json.loads(file.read(n))
    head = json.loads(header.pop("__metadata__")["adaptive_c"])
    del header["end"]
    found = {}
    for name, about in header.items():
        dtype, (start, end) = _DTYPES[about["dtype"]], about["data_offsets"]
        found[name] = Stored(file, 8 + n + start, (end - start) // dtype.itemsize, dtype)
    return head, found


def _parse_npz(file: Any) -> tuple[Any, dict[str, Stored]]:
    with zipfile.ZipFile(file) as archive:
        head = json.loads(archive.read("checkpoint.json"))
        members = [info for info in archive.infolist() if info.filename != "checkpoint.json"]
    found = {}
    for info in members:  # nothing is compressed, so that arrays can be read in place
        file.seek(info.header_offset + 26)
        file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)  # the name, and what ZIP64 adds
        np.lib.format.read_magic(file)
        (n,), _, dtype = np.lib.format.read_array_header_1_0(file)
        found[info.filename.removesuffix(".npy")] = Stored(file, file.tell(), n, dtype)
    return head, found


@contextmanager
def reading(path: Any) -> Iterator[tuple[Any, dict[str, Stored]]]:
    """The dict and the arrays of a checkpoint, verified from the first byte to the last."""
    _little_endian()
    name = os.fsdecode(path)
    with open(name, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(9)
        if start[:4] == b"PK\x03\x04":
            parse = _parse_npz
        elif start[8:] == b"{":
            parse = _parse_safetensors
        else:
            raise ValueError(f"{name} is no checkpoint: it begins like neither a safetensors file nor an .npz archive")
        file.seek(max(0, size - _END_SIZE))
        end = file.read()
        match = re.fullmatch(re.escape(_END).replace(b"%08x", b"([0-9a-f]{8})"), end)
        if not match:
            raise ValueError(f"{name} does not end as a checkpoint of adaptive_c does: it was cut short, is damaged, "
                             "or another program wrote it")  # fmt: skip
        found = _checksum(file, size)
        if int(match[1], 16) != found:
            raise ValueError(f"{name} is damaged: its checksum is {match[1].decode()}, its contents have {found:08x}; "
                             "nothing was loaded")  # fmt: skip
        try:
            head, arrays = parse(file)
        except (ValueError, KeyError, TypeError, AttributeError, struct.error, zipfile.BadZipFile) as error:
            raise ValueError(f"{name} is no checkpoint that this version can read: {error!r}") from error
        if any(x.offset < 0 or x.size < 0 or x.offset + x.size * x.dtype.itemsize > size for x in arrays.values()):
            raise ValueError(f"{name} is no checkpoint: it names data outside of it")
        yield head, arrays

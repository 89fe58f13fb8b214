"""The file of a checkpoint: written beside its name and renamed, verified as a whole, read in place.

A checkpoint is a dict that JSON can express, the head, and flat arrays by name.  What they mean is not known here.

The format is safetensors, with the head in its metadata under "adaptive_c".  The last tensor of the file is the line
_END, which holds the CRC-32 of the whole file as it would be with zeros for the CRC.  The safetensors package is not
used: it reads whole tensors or maps the file into memory, and it knows no checksum.  The .npz archives that version 0.1
could write, uncompressed and with the head in checkpoint.json and the line _END as the archive's comment, are read too.
"""

import _thread
import errno
import json
import os
import re
import stat
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

try:
    import fcntl
except ImportError:  # without locks, the temporary file of a killed writer stays
    fcntl = None  # type: ignore[assignment]

Array = np.ndarray[Any, Any]
_PIECE = 1 << 20  # bytes that are written, read or summed up at a time
_END = b"adaptive_c checkpoint %08x\n"
_END_SIZE = len(_END % 0)
_TEMPORARY = re.compile(r"\.adaptive_c-[0-9a-f]{16}\.tmp")
_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
          "int64": "I64", "uint8": "U8", "int8": "I8"}  # fmt: skip  # of safetensors
_DTYPES = {code: np.dtype("uint16" if kind == "bfloat16" else kind) for kind, code in _CODES.items()}


class Entry(NamedTuple):
    """An array that is to be written: the kind of its elements, and the flat arrays that it consists of.

    A piece that is not in memory has a size, and `parts` that read it bit by bit, as bytes; each is good until the next
    one is read.
    """

    kind: str
    pieces: Sequence[Any]


class Stored(NamedTuple):
    """An array in a file."""

    file: Any
    offset: int
    size: int
    dtype: "np.dtype[Any]"

    def read(self, start: int, out: Array) -> None:
        """Read the elements from `start` on into a flat array of the same dtype, which says how many."""
        self.file.seek(self.offset + start * self.dtype.itemsize)
        if self.file.readinto(out) < out.nbytes:
            raise OSError("the checkpoint was cut short while it was read; load a whole one before the next step")


def _little_endian() -> None:
    """Raise on a machine that would write the bytes of numbers in another order."""
    if sys.byteorder != "little":
        raise NotImplementedError("checkpoints are written and read on little-endian machines only")


# --- writing ---------------------------------------------------------------------------------------------------------


def write(path: Any, head: Mapping[str, Any], arrays: Mapping[str, Entry]) -> None:
    """Write a checkpoint.  At every moment `path` is the old file or the new one, complete and on the disk."""
    with replacing(path) as temporary:
        fill(temporary, head, arrays)


def fill(temporary: Any, head: Mapping[str, Any], arrays: Mapping[str, Entry]) -> None:
    """Write the bytes of a checkpoint."""
    parts = _parts(head, arrays)
    try:
        _fill(temporary, parts)
    finally:
        parts.clear()  # which ends the second thread where this one was interrupted


@contextmanager
def replacing(path: Any) -> Iterator[Any]:
    """A temporary file to be filled, which takes the place of `path` at the end; it is removed if the block raises."""
    _little_endian()
    name = os.fsdecode(path)
    path = os.path.realpath(name)
    folder = os.path.dirname(path)
    if name.endswith(".npz") or path.endswith(".npz"):
        raise ValueError(f"{name} can't be written: checkpoints are safetensors files now, no .npz archives; give a "
                         "path that ends in .safetensors (load still reads those of earlier builds)")  # fmt: skip
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"there is no folder {folder} to save in; make it first")
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path} exists and is no regular file; give another path")
    _remove_leftovers(folder)
    temporary = _create_temporary(folder)
    old = mode = None
    try:
        with temporary:
            with suppress(OSError):  # there is no old file yet, or its permissions can't be had
                mode = stat.S_IMODE(os.stat(path).st_mode)
                os.fchmod(temporary.fileno(), mode | stat.S_IWUSR)  # without S_IWUSR a leftover could not be removed
                old = open(path, "rb", buffering=0)  # noqa: SIM115
            yield temporary
            if mode is not None:
                with suppress(OSError):
                    os.fchmod(temporary.fileno(), mode)
            temporary.flush()
            os.fsync(temporary.fileno())
            os.replace(temporary.name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary.name)
        raise
    finally:
        # The old file has no name any more, and closing it frees its contents, which takes the system a while.
        if old is not None and not _start(old.close):
            old.close()
    sync_folder(folder)


def header(head: Mapping[str, Any], sizes: Mapping[str, tuple[str, int]]) -> tuple[bytes, dict[str, int]]:
    """What a file begins with, and where each array begins in it, in their order there; "end" is the line _END.

    sizes: of each array the kind of its elements, and their number.
    """
    # JSON, put together as text: a dict for each of many arrays would keep the garbage collector busy.
    lines = [f'"__metadata__":{json.dumps({"adaptive_c": json.dumps(head, allow_nan=False)})}']
    starts, at = {}, 0
    order = sorted(sizes.items(), key=lambda item: -_DTYPES[_CODES[item[1][0]]].itemsize)
    for name, (kind, size) in (*order, ("end", ("uint8", _END_SIZE))):
        code = _CODES[kind]
        starts[name], end = at, at + size * _DTYPES[code].itemsize
        lines.append(f'{json.dumps(name)}:{{"dtype":"{code}","shape":[{size}],"data_offsets":[{at},{end}]}}')
        at = end
    text = f"{{{','.join(lines)}}}".encode()
    text += b" " * (-len(text) % 8)
    text = struct.pack("<Q", len(text)) + text
    return text, {name: start + len(text) for name, start in starts.items()}


def _parts(head: Mapping[str, Any], arrays: Mapping[str, Entry]) -> list[list[Any]]:
    """The bytes of the file up to the line _END, in parts of _PIECE to twice as many bytes, each a list of arrays."""
    sizes = {name: (entry.kind, sum(piece.size for piece in entry.pieces)) for name, entry in arrays.items()}
    text, order = header(head, sizes)
    pieces = [piece for name in order if name != "end" for piece in arrays[name].pieces]
    if not all(isinstance(piece, np.ndarray) for piece in pieces):
        return [[text], *([part] for piece in pieces for part in parts_of(piece))]
    raw = [piece.view(np.uint8) for piece in pieces]
    parts: list[list[Any]] = [[text]]
    room = _PIECE
    for piece in raw:
        for i in range(0, piece.size, _PIECE):
            if room <= 0:
                parts.append([])
                room = _PIECE
            parts[-1].append(piece[i : i + _PIECE])
            room -= len(parts[-1][-1])
    return parts


def parts_of(piece: Any) -> list[Any]:
    """The bytes of a piece in parts; each part is memory, or a function that reads it."""
    return [piece.view(np.uint8)] if isinstance(piece, np.ndarray) else piece.parts()


def _fill(file: Any, parts: list[list[Any]]) -> None:
    """Write the parts and the line _END, and let Linux begin to write them to the disk."""
    sums: dict[int, tuple[int, int]] = {}
    beside = not any(callable(piece) for part in parts for piece in part)  # what is read is read once
    if beside:
        _start(_sum_up, enumerate(parts), sums)
    pushed = 0
    for i, part in enumerate(parts):
        for piece in part:
            memory = piece() if callable(piece) else piece
            file.write(memory)
            if not beside:
                sums[i] = zlib.crc32(memory), len(memory)
        if (size := file.tell()) - pushed >= 16 * _PIECE and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), pushed, size - pushed, os.POSIX_FADV_DONTNEED)
            pushed = size
    _sum_up(reversed(list(enumerate(parts))), sums)
    file.write(end_line(combined(sums)))


def end_line(crc: int) -> bytes:
    """The line _END that follows bytes with this CRC-32."""
    return _END % zlib.crc32(_END % 0, crc)


def _sum_up(parts: Iterable[tuple[int, Iterable[Any]]], sums: dict[int, tuple[int, int]]) -> None:
    """Compute CRC-32 and length of one part after the other, up to one that is there already.

    A second thread begins with the first part, and this one, as soon as it has nothing else to do, with the last.
    Where they meet, all is done.  Neither waits for the other: if the second thread has died, this one goes on.
    """
    for i, part in parts:
        if i in sums:
            break
        crc = n = 0
        for piece in part:
            crc, n = zlib.crc32(piece, crc), n + len(piece)
        sums[i] = crc, n


def combined(sums: dict[int, tuple[int, int]]) -> int:
    """The CRC-32 of all parts, one after the other."""
    crc = 0
    for i in range(len(sums)):
        of_part, n = sums[i]
        crc = _times(crc, _power(n)) ^ of_part
    return crc


def _times(a: int, b: int) -> int:
    """The product of two polynomials modulo that of CRC-32, as CRC-32 has them: bit 31 is the constant coefficient."""
    product = 0
    while a:
        product ^= b if a >> 31 else 0
        a = a << 1 & 0xFFFFFFFF
        b = b >> 1 ^ (0xEDB88320 if b & 1 else 0)
    return product


@lru_cache
def _power(n: int) -> int:
    """What n more bytes multiply the CRC-32 of those before them by: x**(8n)."""
    return _times(_power(n // 2), _power(n - n // 2)) if n > 1 else 1 << 31 - 8 * n


def _start(f: Callable[..., Any], *args: Any) -> bool:
    """Call a function in a thread of its own that nothing waits for.  Returns whether it has begun: not at exit."""
    try:
        _thread.start_new_thread(f, args)
    except (RuntimeError, MemoryError) as error:
        if error.__traceback__ is not None and error.__traceback__.tb_next is not None:
            raise  # by a signal handler: the thread was started
        return False
    return True


def _lock(file: Any, wait: bool) -> None:
    """Hold a temporary file for as long as its writer lives; OSError if another one holds it, or there are no locks."""
    if fcntl is None:
        raise OSError("there are no locks here")
    fcntl.flock(file.fileno(), fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))


def _remove_leftovers(folder: str) -> None:
    """Remove the temporary files of writers that were killed or interrupted, which are those that no writer holds."""
    with suppress(PermissionError):  # the folder may be written but not listed
        for name in os.listdir(folder):
            if _TEMPORARY.fullmatch(name):
                path = os.path.join(folder, name)
                with suppress(OSError), open(path, "r+b") as file:  # held, renamed meanwhile, or another user's
                    _lock(file, wait=False)
                    os.unlink(path)


def _create_temporary(folder: str) -> Any:
    """A new locked file in this folder."""
    while True:
        path = os.path.join(folder, f".adaptive_c-{os.urandom(8).hex()}.tmp")
        file = open(path, "xb", buffering=_PIECE // 8)  # noqa: SIM115
        with suppress(OSError):
            _lock(file, wait=True)
        if os.path.exists(path):  # otherwise another writer took it for a leftover before it was locked
            return file
        file.close()


def sync_folder(folder: str) -> None:
    """Let the rename survive a power cut too, if the file system can do this and the folder may be read."""
    try:
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


# --- reading ---------------------------------------------------------------------------------------------------------


@contextmanager
def reading(path: Any, checksum: Callable[[Any, int], int] | None = None) -> Iterator[tuple[Any, dict[str, Stored]]]:
    """The head and the arrays of a checkpoint, verified from the first byte to the last.

    checksum: gives the CRC-32 of the file's first bytes, as many as it is told.
    """
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
        match = re.fullmatch(re.escape(_END).replace(b"%08x", b"([0-9a-f]{8})"), file.read())
        if not match:
            raise ValueError(f"{name} does not end as a checkpoint of adaptive_c does: it was cut short, is damaged, "
                             "or another program wrote it")  # fmt: skip
        found = end_line((checksum or crc_of)(file, size - _END_SIZE))
        if match[0] != found:
            raise ValueError(f"{name} is damaged: its checksum is {match[1].decode()}, its contents have "
                             f"{found[-9:-1].decode()}; nothing was loaded")  # fmt: skip
        try:
            head, arrays = parse(file)
        except (ValueError, KeyError, TypeError, AttributeError, struct.error, zipfile.BadZipFile) as error:
            raise ValueError(f"{name} is no checkpoint that this version can read: {error!r}") from error
        if any(x.offset < 0 or x.size < 0 or x.offset + x.size * x.dtype.itemsize > size for x in arrays.values()):
            raise ValueError(f"{name} is no checkpoint: it names data outside of it")
        yield head, arrays


def crc_of(file: Any, end: int, begin: int = 0) -> int:
    """CRC-32 of the bytes from `begin` to `end` of a file."""
    step = 4 * _PIECE
    starts = list(range(begin, end, step))
    sums: dict[int, tuple[int, int]] = {}

    def parts(fd: int, starts: Iterable[int]) -> Iterator[tuple[int, Iterator[memoryview]]]:
        buffer = memoryview(bytearray(_PIECE))
        for start in starts:
            yield (start - begin) // step, _pieces(fd, start, min(start + step, end), buffer)

    def beside() -> None:
        with suppress(OSError, ValueError):  # the file is closed already: all is done, and the rest is not wanted
            _sum_up(parts(file.fileno(), starts), sums)

    _start(beside)
    try:
        _sum_up(parts(file.fileno(), reversed(starts)), sums)
    finally:
        starts.clear()  # which ends the second thread where this one was interrupted
    return combined(dict(sums))


def _pieces(fd: int, start: int, stop: int, buffer: memoryview) -> Iterator[memoryview]:
    """The bytes of a range of a file, piece by piece, in a buffer that is used again."""
    while start < stop and (n := os.preadv(fd, [buffer[: stop - start]], start)):
        yield buffer[:n]
        start += n


def _parse_safetensors(file: Any) -> tuple[Any, dict[str, Stored]]:
    """The description and the arrays of a file in the safetensors format; no array is read yet."""
    file.seek(0)
    (n,) = struct.unpack("<Q", file.read(8))

    def stored(d: dict[str, Any]) -> Any:  # at once: a dict for each of many arrays would keep the collector busy
        if "__metadata__" in d or "adaptive_c" in d:
            return d
        dtype, (start, end) = _DTYPES[d["dtype"]], d["data_offsets"]
        return Stored(file, 8 + n + start, (end - start) // dtype.itemsize, dtype)

    header = json.loads(file.read(n), object_hook=stored)
    head = json.loads(header.pop("__metadata__")["adaptive_c"])
    del header["end"]
    return head, header


def _parse_npz(file: Any) -> tuple[Any, dict[str, Stored]]:
    """The same for a file of version 1, which is an uncompressed .npz."""
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

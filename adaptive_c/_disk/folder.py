"""The folder of a run's state: who has it, and the files of its buckets, each with two slots.

A bucket is written to one slot while the other one holds what is durable.  Files are opened for each transfer, so that
one that is gone is missed at once, and their number has no limit.
"""

import contextlib
import errno
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

from .._checkpoint.file import sync_folder
from .buckets import PAGE, Bucket

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

RECORDS = "record", "record-1"  # the second one: of a run of several processes, whose commits use them in turn
_LOCK, _BEGUN = "lock", "begun"  # the second one: buckets are being written for the first time
_PIECE = 16 << 20  # bytes of one call of the system
_DIRECT = getattr(os, "O_DIRECT", 0)
_locks: "weakref.WeakSet[_Lock]" = weakref.WeakSet()


class StoppedError(Exception):
    """Ends a transfer that is no longer wanted."""

    def __init__(self) -> None:
        super().__init__("a second Ctrl-C came")


class _Lock:
    """A file that is locked for as long as this process lives, or this object."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._close = cast(Any, weakref.finalize(self, os.close, self.fd))  # checkers disagree on its attribute
        self._close.atexit = False  # steps may still come when Python ends
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(self.fd, 32, 0).decode(errors="replace").strip()
            self.close()
            raise BlockingIOError(
                errno.EAGAIN,
                f"another optimizer has the state in this folder{f', in process {owner}' if owner else ''}; wait until "
                "that has ended, close() it, or give another state_path",
                os.path.dirname(path),
            ) from None
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, f"{os.getpid()}\n".encode(), 0)
        _locks.add(self)

    def close(self) -> None:
        self._close()


def _after_fork() -> None:
    """A child must not keep a folder locked when its parent has ended."""
    for lock in list(_locks):
        lock.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def told(path: str, what: str) -> Iterator[None]:
    """Add to an error of the system what could not be done with this file, and what to do."""
    try:
        yield
    except OSError as error:
        text = error.strerror or str(error)
        remedy = (
            "free space; the folder holds the last whole step"
            if error.errno in (errno.ENOSPC, errno.EDQUOT)
            else "put the folder back if it was moved, or load a checkpoint with a new state_path"
            if error.errno == errno.ENOENT
            else "the folder holds the last whole step, as far as it can be read"
        )
        number = errno.EIO if error.errno is None else error.errno
        raise OSError(number, f"{text}: the state on disk can't be {what}; {remedy}", path) from error


def made(path: Any) -> str:
    """Make a folder if it is not there yet.  The folder above it must exist."""
    if fcntl is None or not hasattr(os, "preadv"):
        raise NotImplementedError("state_path needs a POSIX system; drop it")
    if not isinstance(path, (str, bytes, os.PathLike)) or not os.fspath(path):
        raise TypeError(f"state_path must be the path of a folder, got {path!r}")
    folder = os.path.realpath(os.fsdecode(path))
    if not os.path.isdir(folder):
        parent = os.path.dirname(folder)
        if not os.path.isdir(parent):
            raise FileNotFoundError(errno.ENOENT, "there is no such folder to make state_path in", parent)
        with contextlib.suppress(FileExistsError):  # another process may do it now
            os.mkdir(folder)
        if not os.path.isdir(folder):
            raise NotADirectoryError(errno.ENOTDIR, "state_path must be a folder, and this is none", folder)
        sync_folder(parent)
    return folder


def check_names(folder: str, known: Callable[[str], object]) -> None:
    """Raise if a folder has files of others in it.  Hidden files don't count."""
    for name in os.listdir(folder):
        if not name.startswith(".") and not known(name):
            raise ValueError(f"state_path: {folder} has other files in it, such as {name!r}; give an empty "
                             "folder, or one that does not exist yet")  # fmt: skip


def damaged(path: str) -> OSError:
    """The error for a bucket whose checksum is wrong."""
    return OSError(
        errno.EIO,
        f"{os.strerror(errno.EIO)}: a bucket of the state is damaged: its checksum is not that of the record; load a "
        "checkpoint with a new state_path",
        path,
    )


def _sync(fd: int) -> None:
    """Wait until a file's bytes are on the disk."""
    getattr(os, "fdatasync", os.fsync)(fd)


class Folder:
    """The folder of a run's state, which this object has locked."""

    def __init__(self, path: Any) -> None:
        self.path = made(path)
        self.stopped = False
        check_names(self.path, lambda name: name in (*RECORDS, _LOCK, _BEGUN) or name.endswith(".bucket"))
        self._pid = os.getpid()
        self._lock: _Lock | None = _Lock(self.name(_LOCK))
        self._flags = os.O_RDWR | os.O_CLOEXEC | (_DIRECT if _DIRECT and self._can_go_direct() else 0)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def name(self, name: str) -> str:
        """The path of a file in the folder."""
        return os.path.join(self.path, name)

    def check_process(self) -> None:
        """Raise unless this is the process that has the folder: a forked child is not."""
        if os.getpid() != self._pid:
            raise RuntimeError("this optimizer's state is on disk and belongs to the process that made it, of which "
                               "this is a forked child; construct another one, with another state_path")  # fmt: skip

    def check(self) -> None:
        """Raise unless this process has the folder, and the folder is still the one that was opened."""
        self.check_process()
        path = self.name(_LOCK)
        with told(path, "found"):
            if self._lock is not None and not os.path.samestat(os.stat(path), os.fstat(self._lock.fd)):
                raise FileNotFoundError(errno.ENOENT, "this optimizer's folder was replaced by another one", path)

    def records(self) -> list[str]:
        """The paths of the records; an empty list if the folder has no state of a run."""
        found = [self.name(name) for name in RECORDS if os.path.exists(self.name(name))]
        names = [name for name in os.listdir(self.path) if name.endswith(".bucket")]
        if names and not found and not os.path.exists(self.name(_BEGUN)):
            raise ValueError(f"{self.path} has buckets of state, but no file {RECORDS[0]!r}, without which they are "
                             "worthless; empty the folder to begin anew (of Sharded, those of all ranks)")  # fmt: skip
        return found

    def forget(self, record: str) -> None:
        """Remove a record that must not count any more."""
        os.unlink(record)
        sync_folder(self.path)

    def _can_go_direct(self) -> bool:
        """Whether the file system can transfer pages without going through the system's cache (O_DIRECT)."""
        import mmap

        path = self.name(f".adaptive_c-{os.getpid()}")
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | _DIRECT, 0o600)
            try:
                page = mmap.mmap(-1, PAGE)
                return os.pwritev(fd, [page], 0) == PAGE and os.preadv(fd, [page], 0) == PAGE
            finally:
                os.close(fd)
        except OSError:
            return False
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)

    # --- files --------------------------------------------------------------------------------------------------------

    def file(self, bucket: Bucket) -> str:
        """The path of a bucket's file."""
        return self.name(f"{bucket.number:06d}.bucket")

    def create(self, buckets: Sequence[Bucket]) -> None:
        """Make the files, and have the system set all of their space aside."""
        os.close(os.open(self.name(_BEGUN), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))
        for record in self.records():
            self.forget(record)
        keep = {os.path.basename(self.file(bucket)) for bucket in buckets if bucket.size}
        for name in os.listdir(self.path):  # of an earlier beginning
            if name.endswith(".bucket") and name not in keep:
                os.unlink(self.name(name))
        try:
            for bucket in buckets:
                if bucket.size:
                    path = self.file(bucket)
                    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
                    try:
                        os.ftruncate(fd, 2 * bucket.size)
                        os.posix_fallocate(fd, 0, 2 * bucket.size)
                    finally:
                        os.close(fd)
        except OSError as error:
            total = sum(2 * bucket.size for bucket in buckets)
            text = os.strerror(error.errno or errno.EIO)
            raise OSError(
                error.errno or errno.EIO,
                f"{text}: the state needs {total} bytes, which are set aside at the beginning; give a state_path with "
                "more space",
                path,
            ) from error
        sync_folder(self.path)

    def clear(self) -> None:
        """Remove the files of all buckets."""
        for name in os.listdir(self.path):
            if name.endswith(".bucket"):
                with contextlib.suppress(OSError):
                    os.unlink(self.name(name))

    def complete(self) -> None:
        """Remove the mark of a beginning, because the folder has a record now."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.name(_BEGUN))

    def check_sizes(self, buckets: Sequence[Bucket]) -> None:
        """Raise if the file of a bucket does not have its two slots."""
        for bucket in buckets:
            if bucket.size:
                with told(self.file(bucket), "read"):
                    found = os.stat(self.file(bucket)).st_size
                if found != 2 * bucket.size:
                    raise OSError(errno.EIO, f"has {found} bytes, but must have {2 * bucket.size}: it was cut short or "
                                  "replaced; load a checkpoint with a new state_path", self.file(bucket))  # fmt: skip

    # --- transfers ----------------------------------------------------------------------------------------------------

    def read(self, bucket: Bucket, slot: int, memory: memoryview, at: int = 0) -> None:
        """Read whole pages of a slot, from byte `at` on."""
        with told(self.file(bucket), "read"), self._opened(bucket) as fd:
            self._move(fd, os.preadv, memory, slot * bucket.size + at, "ends here: it was cut short")
            self._forget(fd, slot * bucket.size + at, len(memory))

    def write(self, bucket: Bucket, slot: int, memory: memoryview) -> None:
        """Write a slot; `sync` makes it durable."""
        with told(self.file(bucket), "written"), self._opened(bucket) as fd:
            self._move(fd, os.pwritev, memory, slot * bucket.size, "takes no more bytes")
            if not self._flags & _DIRECT:  # the system forgets pages only once they are on the disk
                _sync(fd)
            self._forget(fd, slot * bucket.size, len(memory))

    def sync(self, bucket: Bucket) -> None:
        """Make durable what was written of a bucket."""
        with told(self.file(bucket), "written"), self._opened(bucket) as fd:
            _sync(fd)

    @contextlib.contextmanager
    def _opened(self, bucket: Bucket) -> Iterator[int]:
        """A descriptor of a bucket's file, within a `with` block."""
        fd = os.open(self.file(bucket), self._flags)
        try:
            yield fd
        finally:
            os.close(fd)

    def _move(self, fd: int, call: Callable[..., int], memory: memoryview, start: int, at_end: str) -> None:
        """Read or write all of `memory`, piece by piece, so that a stop is noticed in between."""
        at = 0
        while at < len(memory):
            if self.stopped:
                raise StoppedError
            n = call(fd, [memory[at : at + _PIECE]], start + at)
            if n == 0:
                raise OSError(errno.EIO, f"{os.strerror(errno.EIO)}: byte {start + at}: the file {at_end}")
            at += n
            if self._flags & _DIRECT and at % PAGE and at < len(memory):  # the rest must begin with a page
                at -= at % PAGE
                if n < PAGE:
                    raise OSError(errno.EIO, f"{os.strerror(errno.EIO)}: byte {start + at}: the file {at_end}")

    def _forget(self, fd: int, start: int, size: int) -> None:
        """Tell the system not to keep in its cache what is read only once."""
        if not self._flags & _DIRECT and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, start, size, os.POSIX_FADV_DONTNEED)

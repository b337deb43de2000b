"""The one door to disk for what must not be lost: whole files or none, and digests."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dstrain import faults

log = logging.getLogger(__name__)


class HashedFile:
    """A file written once from front to back, with its size and SHA-256; it is durable when the context ends well."""

    def __init__(self, path: Path) -> None:
        self.size = 0
        self._file = path.open("wb")
        self._sha256 = hashlib.sha256()

    def write(self, data: Any) -> None:
        """Append bytes; raises OSError."""
        if faults.reach("write") == "torn":
            self._file.write(memoryview(data)[: len(data) // 2])
            self._file.flush()
            os._exit(137)
        self._file.write(data)
        self._sha256.update(data)
        self.size += memoryview(data).nbytes

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._file.flush()
                faults.reach("write")
                os.fsync(self._file.fileno())
        finally:
            self._file.close()

    @property
    def entry(self) -> tuple[int, str]:
        """Size in bytes, and hex SHA-256."""
        return self.size, self._sha256.hexdigest()


def fsync_dir(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    faults.reach("write")
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_file(path: Path) -> None:
    """Make the content of `path` durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_folder(folder: Path) -> None:
    """Make a folder that must not be there, and durably those above it if they are missing."""
    faults.reach("write")
    missing = [above for above in folder.parents if not above.exists()]
    folder.mkdir(parents=True)
    for above in missing:
        fsync_dir(above.parent)


def move(source: Path, target: Path) -> None:
    """Rename a folder within its folder, durably; `target` must not be there."""
    faults.reach("write")
    source.rename(target)
    fsync_dir(target.parent)


def remove(folder: Path) -> None:
    """Remove a folder with all that is in it."""
    faults.reach("write")
    shutil.rmtree(folder)


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` so that a reader sees the old file or the whole new one, also after a crash."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    try:
        with HashedFile(part) as f:
            f.write(data)
        faults.reach("write")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    fsync_dir(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write one line of JSON for each of `rows`, atomically."""
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def idle() -> None:
    """Do nothing: what long work calls again and again if nobody wants to know that it goes on."""


def append_json_line(path: Path, row: Any) -> None:
    """Add a line of JSON to a file that is made if it is missing."""
    with path.open("a") as f:
        f.write(json.dumps(row) + "\n")


def sha256(path: Path, chunk: int = 1 << 22, busy: Callable[[], None] = idle) -> str:
    """Return the hex SHA-256 of a file, read in pieces of `chunk` bytes; `busy` is called after each."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(chunk):
            digest.update(block)
            busy()
    return digest.hexdigest()


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the lock file at `path`, made if missing, against all other holders on this node, threads included.

    While it is held, waits, or raises BlockingIOError if `wait` is false. The lock goes with the process, however that
    ends; the file stays.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_UN)  # a child forked meanwhile has the descriptor too: closing is not enough
    finally:
        os.close(fd)


@contextmanager
def occupied(folder: Path, owner: str) -> Iterator[None]:
    """Hold `folder` for `owner` alone, a text that others are told; BlockingIOError with the holder's if it is held.

    The lock is the kernel's, so none is left behind by a process that was killed. Where the file system has no locks,
    there is a warning instead.
    """
    path = folder / ".lock"
    try:
        lock = locked(path, wait=False)
        lock.__enter__()
    except BlockingIOError:
        holder = ""
        with suppress(OSError):
            holder = path.read_text(errors="replace").strip()
        raise BlockingIOError(errno.EAGAIN, holder or "another process") from None
    except OSError as e:
        if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
        log.warning("%s has no file locks (%s): see to it that only one run writes there", folder, e.strerror)
        yield
        return
    try:
        path.write_text(owner + "\n")
        yield
    finally:
        lock.__exit__(None, None, None)


def user_cache() -> Path:
    """Return the user's folder for what can be made again (XDG Base Directory Specification); it may not exist yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dstrain"

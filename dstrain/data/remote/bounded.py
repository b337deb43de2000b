"""A folder of files that together stay under a limit, filled by many processes at once.

A file is written to a hidden part that has its full size from the start, so that everyone who counts sees what is still
to come, and renamed when it is whole. Each name has a lock (flock). Locks end with their process, so whoever is killed
leaves nothing that others wait for, and its part is removed by the next one that needs room.
"""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from dstrain.errors import DataError
from dstrain.storage import locked

log = logging.getLogger(__name__)

_TOUCH_S = 60.0  # the use of a file is noted no more often
_GRACE_S = 1.0  # a file that has just come stays for so long, so that who brought it can open it
_POLL_S = 0.05
_QUEUE, _ROOM = "queue", "room"  # locks: of the next one to get room, and of who counts or renames


@dataclass(frozen=True)
class BoundedFolder:
    """Files in `folder` that take at most `limit` bytes, locks in another. The least recently used go first.

    Who has a file open can read on when it goes; its bytes stay on the disk, though not counted, until it is closed.
    """

    folder: Path
    locks: Path
    limit: int

    def has(self, path: Path, size: int) -> bool:
        """Say whether a file is there with its `size`, and note that it is used."""
        try:
            stat = path.stat()
        except FileNotFoundError:
            return False
        if time.time() - stat.st_mtime > _TOUCH_S:
            with suppress(OSError):
                os.utime(path)
        return stat.st_size == size

    def alone(self, name: str) -> AbstractContextManager[None]:
        """Hold the lock of a name against all other threads and processes of the node."""
        return locked(self.locks / name)

    @contextmanager
    def part(self, name: str, size: int, what: str) -> Iterator[Path]:
        """Give a file of `size` bytes to write `what` to, once there is room; the lock of `name` must be held.

        At the end it is gone, unless it was published. Raises DataError if it is larger than the limit or the disk.
        """
        if size > self.limit:
            raise DataError(f"{what} has {size:,} bytes, and the cache may hold {self.limit:,}; raise data.cache_gb")
        part = self.folder / f".{name}.part"
        try:
            part.unlink(missing_ok=True)  # of a process that was killed
            with self.alone(_QUEUE):  # so that no later one takes the room that this one waits for
                waits = False
                while not self._reserve(part, size, what):
                    if not waits:
                        log.info("%s is full of shards that are just being fetched; waiting", self.folder)
                    waits = True
                    time.sleep(_POLL_S)
            yield part
        finally:
            part.unlink(missing_ok=True)

    def publish(self, part: Path, path: Path) -> None:
        """Rename a part that is whole; the file is the last to go."""
        with self.alone(_ROOM):  # who counts would miss it between its two names
            os.utime(part)
            part.replace(path)

    def _reserve(self, part: Path, size: int, what: str) -> bool:
        """Make the part, evicting as many files as must go; False if the room is taken by parts, or by newcomers."""
        with self.alone(_ROOM):
            files, coming = self._contents()
            here = coming + sum(bytes_ for _, bytes_, _ in files)
            free = shutil.disk_usage(self.folder).free
            if size - free > here:
                raise DataError(
                    f"the disk of {self.folder} has {free:,} bytes free, and {what} needs {size:,}; make room there, "
                    "or set data.cache_dir to a folder on a larger disk of this node"
                )
            excess = max(here + size - self.limit, size - free)
            for _, bytes_, path in sorted(file for file in files if abs(time.time() - file[0]) > _GRACE_S):
                if excess <= 0:
                    break
                path.unlink(missing_ok=True)
                excess -= bytes_
            if excess > 0 or shutil.disk_usage(self.folder).free < size:  # a file that is still open keeps its bytes
                return False
            with part.open("xb") as file:
                if size:
                    os.posix_fallocate(file.fileno(), 0, size)
            return True

    def _contents(self) -> tuple[list[tuple[float, int, Path]], int]:
        """List the files (time of last use, bytes, path) and sum up the parts; those of the dead are removed."""
        files, coming = [], 0
        for path in self.folder.iterdir():
            try:
                stat = path.stat()
            except FileNotFoundError:
                continue
            if not path.name.startswith("."):
                files.append((stat.st_mtime, stat.st_size, path))
            elif _is_held(self.locks / path.name.removeprefix(".").removesuffix(".part")):
                coming += stat.st_size
            else:
                path.unlink(missing_ok=True)
        return files, coming


def _is_held(lock: Path) -> bool:
    try:
        with locked(lock, wait=False):
            return False
    except BlockingIOError:
        return True

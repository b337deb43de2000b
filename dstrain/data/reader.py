"""Members of shards by their place: one system call each, and never other bytes than those that were indexed."""

import os
import threading
from collections import OrderedDict
from io import FileIO
from pathlib import Path

import xxhash

from dstrain.data.reasons import BadSample, Reason
from dstrain.data.shards.tar import read_at
from dstrain.errors import DataError

_OPEN = 256  # files kept open


class ShardGone(DataError):
    """There is no shard at the path any more."""


class ShardReader:
    """Reads members of shards; safe to use from several threads."""

    def __init__(self) -> None:
        self._files: OrderedDict[Path, FileIO] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, offset: int, size: int, digest: int) -> bytes:
        """Return the `size` bytes at `offset` of the shard at `path`, whose xxh3_64 must be `digest`.

        Raises BadSample if they are others, DataError if the shard cannot be read (ShardGone if it is not there).
        """
        try:
            file = self._file(path)  # held here, so that it stays open for this read whoever drops it
            data = read_at(file.fileno(), size, offset)
        except OSError as error:
            self.forget(path)
            kind = ShardGone if isinstance(error, FileNotFoundError) else DataError
            raise kind(f"shard {path} cannot be read any more: {error.strerror}") from error
        if len(data) != size or xxhash.xxh3_64_intdigest(data) != digest:
            self.forget(path)  # another file may lie there now
            raise BadSample(Reason.CHANGED, "the bytes in the shard are not those that were indexed")
        return data

    def forget(self, path: Path) -> None:
        """Open the shard anew at the next read."""
        with self._lock:
            self._files.pop(path, None)

    def _file(self, path: Path) -> FileIO:
        with self._lock:
            file = self._files.get(path)
            if file is None:
                file = self._files[path] = FileIO(os.fspath(path))
                if len(self._files) > _OPEN:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(path)
            return file

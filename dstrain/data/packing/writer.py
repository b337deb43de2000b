"""A shard while it is written: a plain tar under a hidden name, which appears under its own when it is whole."""

import io
import tarfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from dstrain.data.shards.catalog import open_index
from dstrain.storage import fsync_dir, fsync_file

MAX_NAME = tarfile.LENGTH_NAME  # bytes of a member's name in a plain tar header
_BLOCK, _RECORD = tarfile.BLOCKSIZE, tarfile.RECORDSIZE


class ShardWriter:
    """Writes one tar; the same members give the same bytes."""

    def __init__(self, path: Path) -> None:
        """Begin the shard that will be at `path`."""
        self.path = path
        self.samples = 0
        self._part = path.with_name(f".{path.name}.part")
        self._tar = tarfile.TarFile(self._part, "w", format=tarfile.USTAR_FORMAT, encoding="utf-8")

    def has_room(self, sizes: Iterable[int], shard_bytes: int) -> bool:
        """Whether the tar would be at most `shard_bytes` long with a sample whose members have `sizes` bytes."""
        full = self._tar.offset + sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for size in sizes) + 2 * _BLOCK
        return -(-full // _RECORD) * _RECORD <= shard_bytes

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample; `members` by extension."""
        for extension, data in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")  # owner and time stay zero
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self.samples += 1

    def publish(self) -> None:
        """Make the shard durable, let it appear, and index it."""
        self._tar.close()
        fsync_file(self._part)
        self._part.replace(self.path)
        fsync_dir(self.path.parent)
        assert open_index(self.path).samples == self.samples, "what is packed can be read"

    def discard(self) -> None:
        """Remove what is written. Does nothing to a shard that is published."""
        self._part.unlink(missing_ok=True)
        with suppress(OSError):  # closing writes the end marker, and the disk may be full
            self._tar.close()

"""`dstrain pack`: pictures and captions into tar shards with their indexes."""

import io
import re
import tarfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dstrain.data.decode import MULTIPLE, load_rgb
from dstrain.data.probe import probe
from dstrain.data.reasons import BadSample, Reason, ranked
from dstrain.data.shards import open_index
from dstrain.data.sources import Item, find_items
from dstrain.errors import DataError
from dstrain.storage import fsync_dir, fsync_file

_EXTENSIONS = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
_SLUG_LENGTH = 60  # with number and extension a name stays under the 100 bytes of a plain tar header


@dataclass(frozen=True)
class Refused:
    """A picture that was not packed."""

    name: str
    reason: Reason
    detail: str


@dataclass
class PackReport:
    """What `pack` wrote and what it refused."""

    shards: list[Path] = field(default_factory=list)
    samples: int = 0
    refused: list[Refused] = field(default_factory=list)

    def summary(self) -> str:
        """Describe the outcome in one line."""
        size = sum(shard.stat().st_size for shard in self.shards)
        refused = f"; refused {len(self.refused)}: {ranked(r.reason for r in self.refused)}" if self.refused else ""
        return f"{self.samples} samples in {len(self.shards)} shards, {size / 1e6:.3g} MB{refused}"


def pack(source: Path, out: Path, *, shard_bytes: int = 1 << 28, shard_samples: int = 10_000) -> PackReport:
    """Pack a folder or a table of captioned pictures (see `find_items`) into `out/shard-000000.tar` and so on.

    A shard is closed before it would pass `shard_bytes` or `shard_samples`. Pictures are stored byte for byte after
    they have been decoded once; those that cannot be used are refused and reported. The same input gives the same
    bytes. A shard appears under its name only when it is whole, and its index with it.
    Raises DataError if there is nothing to pack, or `out` already holds shards.
    """
    items = find_items(source)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.glob("*.tar")):
            raise DataError(f"{out} already holds shards; give an empty folder, or remove them first")
        report = _write(items, out, shard_bytes, shard_samples)
    except OSError as error:
        raise DataError(f"shards cannot be written to {out}: {error.strerror}; give another folder") from error
    if not report.samples:
        reasons = ranked(entry.reason for entry in report.refused)
        raise DataError(f"none of the {len(items)} pictures of {source} can be packed ({reasons})")
    return report


def _write(items: list[Item], out: Path, shard_bytes: int, shard_samples: int) -> PackReport:
    report = PackReport()
    shard: _Shard | None = None
    try:
        for number, item in enumerate(items):
            try:
                key, kind, image, caption = _accept(number, item)
            except BadSample as error:
                report.refused.append(Refused(item.name, error.reason, str(error)))
                continue
            if shard is not None and not shard.has_room(len(image) + len(caption), shard_bytes, shard_samples):
                report.shards.append(shard.publish())
                shard = None
            if shard is None:
                shard = _Shard(out / f"shard-{len(report.shards):06d}.tar")
            shard.add(key, {kind: image, "txt": caption})
            report.samples += 1
        if shard is not None:
            report.shards.append(shard.publish())
    except BaseException:
        if shard is not None:
            shard.discard()
        raise
    return report


def _accept(number: int, item: Item) -> tuple[str, str, bytes, bytes]:
    """Return key, extension, picture and caption of an item that can be trained on; raises BadSample."""
    image, caption = item.read()
    header = probe(image)
    if min(header.size) < MULTIPLE:
        raise BadSample(Reason.IMAGE_TOO_SMALL, f"{header.width} x {header.height} pixels, a side under {MULTIPLE}")
    load_rgb(image, header)
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(item.image).with_suffix("").as_posix()).strip("-")
    key = f"{number:08d}-{slug[-_SLUG_LENGTH:]}"  # the number keeps keys apart and in order
    return key, _EXTENSIONS[header.format], image, caption.encode()


class _Shard:
    """A tar file being written under a hidden name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._part = path.with_name(f".{path.name}.part")
        self._tar = tarfile.TarFile(self._part, "w", format=tarfile.USTAR_FORMAT)
        self._samples = 0

    def has_room(self, data_bytes: int, shard_bytes: int, shard_samples: int) -> bool:
        full = self._tar.offset + data_bytes + 6 * tarfile.BLOCKSIZE  # two headers, two fillings, the end marker
        records = -(-full // tarfile.RECORDSIZE)
        return self._samples < shard_samples and records * tarfile.RECORDSIZE <= shard_bytes

    def add(self, key: str, members: dict[str, bytes]) -> None:
        for kind, data in members.items():
            info = tarfile.TarInfo(f"{key}.{kind}")  # owner and time stay zero: equal input gives equal bytes
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self._samples += 1

    def publish(self) -> Path:
        self._tar.close()
        fsync_file(self._part)
        self._part.replace(self._path)
        fsync_dir(self._path.parent)
        assert len(open_index(self._path).rows) == self._samples, "what is packed can be read"
        return self._path

    def discard(self) -> None:
        self._part.unlink(missing_ok=True)
        with suppress(OSError):  # closing writes the end marker, and the disk may be full
            self._tar.close()

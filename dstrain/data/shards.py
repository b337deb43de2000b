"""Shards and their indexes: which samples a tar file holds, where they lie, and how large they are.

A shard is a tar file whose members are grouped into samples as WebDataset does: the key is the path up to the first dot
of its last part, the rest is the extension. Each shard has one index beside it, `NAME.tar.idx.npz`; it is made when it
is missing or when the tar has another size or time of change, and never trusted beyond what can be checked.
"""

import io
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dstrain.data.captions import CAPTION_KINDS, MAX_CAPTION_BYTES, caption_of, check_length
from dstrain.data.keys import KeyTable
from dstrain.data.probe import MAX_IMAGE_BYTES, check_bytes, probe
from dstrain.data.reasons import BadSample, Reason
from dstrain.data.tar import Kind, Member, members, read_at
from dstrain.errors import DataError
from dstrain.storage import write_atomic

log = logging.getLogger(__name__)

IMAGE_KINDS = ("png", "jpg", "jpeg", "webp")
SIDECAR = ".idx.npz"
_VERSION = 1

ROW = np.dtype(
    [
        ("image_offset", "<i8"),  # bytes from the start of the tar
        ("image_size", "<i8"),
        ("caption_offset", "<i8"),
        ("caption_size", "<i8"),
        ("image_crc", "<u4"),  # CRC-32 of the member, checked at every read
        ("caption_crc", "<u4"),
        ("width", "<i4"),  # pixels, as the picture is meant to be seen
        ("height", "<i4"),
        ("caption_bytes", "<i4"),  # UTF-8 bytes of the caption as it is given out
        ("caption_kind", "<i4"),  # place in CAPTION_KINDS
    ]
)


@dataclass(frozen=True)
class Excluded:
    """A sample that is in a shard and not in the dataset."""

    shard: str  # path
    key: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class ShardIndex:
    """The usable samples of one shard, in the order of the tar: `rows[i]` (dtype ROW) belongs to `keys[i]`."""

    path: Path
    size: int  # of the tar, bytes
    mtime_ns: int
    keys: KeyTable
    rows: np.ndarray
    excluded: list[Excluded]


def open_index(path: Path) -> ShardIndex:
    """Return the index of the shard at `path`: from its sidecar if that is fresh, else made now and written beside it.

    In a folder that cannot be written to, the index stays in memory. Raises DataError if the shard is not a plain tar.
    """
    with _opened(path) as fd:
        index = _load(path, os.fstat(fd))
        if index is not None:
            return index
        index = _build(path, fd)
    try:
        write_atomic(path.with_name(path.name + SIDECAR), _dump(index))
    except OSError as error:
        log.warning("the index of %s stays in memory (%s); it is made again at every start", path, error.strerror)
    return index


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise DataError(f"shard {path} cannot be opened: {error.strerror}") from error
    try:
        yield fd
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


def _build(path: Path, fd: int) -> ShardIndex:
    before = os.fstat(fd)
    excluded: list[Excluded] = []
    groups: dict[str, dict[str, list[Member]]] = {}  # key -> extension -> members
    for member in members(fd, path):
        key, kind = _key_and_kind(member.name)
        if kind not in IMAGE_KINDS + CAPTION_KINDS or member.kind is Kind.FOLDER:
            continue
        if member.kind is Kind.OTHER:
            excluded.append(Excluded(str(path), member.name, Reason.NOT_A_FILE, "a link, a device or a sparse file"))
        elif member.name.startswith("/") or ".." in member.name.split("/"):
            excluded.append(Excluded(str(path), member.name, Reason.UNSAFE_NAME, "the name leaves the shard"))
        else:
            groups.setdefault(key, {}).setdefault(kind, []).append(member)
    keys: list[str] = []
    rows: list[tuple[int, ...]] = []
    for key, kinds in groups.items():
        try:
            rows.append(_row(fd, kinds))
            keys.append(key)
        except BadSample as error:
            excluded.append(Excluded(str(path), key, error.reason, str(error)))
    after = os.fstat(fd)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"shard {path} changed while it was indexed; wait until it is written and start again")
    return ShardIndex(path, after.st_size, after.st_mtime_ns, KeyTable.of(keys), np.array(rows, ROW), excluded)


def _key_and_kind(name: str) -> tuple[str, str]:
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    if not stem or name.startswith("__"):  # WebDataset passes over hidden files and "__meta__" names
        return "", ""
    return folder + slash + stem, extension.lower()


def _row(fd: int, kinds: dict[str, list[Member]]) -> tuple[int, ...]:
    images = [member for kind in IMAGE_KINDS for member in kinds.get(kind, [])]
    caption_kind = next((place for place, kind in enumerate(CAPTION_KINDS) if kind in kinds), None)
    if not images:
        raise BadSample(Reason.NO_IMAGE, "no picture (png, jpg, jpeg, webp) has this key")
    if caption_kind is None:
        raise BadSample(Reason.NO_CAPTION, "no caption (txt, json) has this key")
    captions = kinds[CAPTION_KINDS[caption_kind]]
    if len(images) > 1 or len(captions) > 1:
        raise BadSample(Reason.AMBIGUOUS, f"{len(images)} pictures and {len(captions)} captions have this key")
    (image,), (caption,) = images, captions
    check_bytes(image.size)
    check_length(caption.size)
    image_data = read_at(fd, image.size, image.offset)
    caption_data = read_at(fd, caption.size, caption.offset)
    width, height = probe(image_data).size
    text = caption_of(caption_data, CAPTION_KINDS[caption_kind])
    places = (image.offset, image.size, caption.offset, caption.size)
    return (*places, zlib.crc32(image_data), zlib.crc32(caption_data), width, height, len(text.encode()), caption_kind)


def _dump(index: ShardIndex) -> bytes:
    excluded = [[entry.key, entry.reason, entry.detail] for entry in index.excluded]
    buffer = io.BytesIO()
    np.savez(
        buffer,
        header=np.array([_VERSION, index.size, index.mtime_ns], "<i8"),
        rows=index.rows,
        key_bytes=np.frombuffer(index.keys.blob, np.uint8),
        key_ends=index.keys.ends,
        excluded=np.frombuffer(json.dumps(excluded, ensure_ascii=False).encode(), np.uint8),
    )
    return buffer.getvalue()


def _load(path: Path, tar: os.stat_result) -> ShardIndex | None:
    """Read the sidecar; None if it is missing, stale, damaged, of another version, or says what cannot be."""
    sidecar = path.with_name(path.name + SIDECAR)
    try:
        if sidecar.stat().st_size > 4 * tar.st_size + (1 << 20):
            return None
        with np.load(sidecar, allow_pickle=False) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.zip.infolist()):
                return None  # stored arrays cannot be larger than the file
            if archive["header"].tolist() != [_VERSION, tar.st_size, tar.st_mtime_ns]:
                return None
            rows = archive["rows"]
            keys = KeyTable(archive["key_bytes"].tobytes(), archive["key_ends"])
            excluded = [
                Excluded(str(path), str(key), Reason(reason), str(detail))
                for key, reason, detail in json.loads(archive["excluded"].tobytes())
            ]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, EOFError, MemoryError, zipfile.BadZipFile) as error:
        log.warning("%s is damaged (%s) and is made again", sidecar, error)
        return None
    if rows.dtype != ROW or rows.ndim != 1 or len(rows) != len(keys) or not _plausible(rows, tar.st_size):
        log.warning("%s contradicts its shard and is made again", sidecar)
        return None
    return ShardIndex(path, tar.st_size, tar.st_mtime_ns, keys, rows, excluded)


def _plausible(rows: np.ndarray, tar_size: int) -> bool:
    fits = [
        (rows[f"{part}_offset"] >= 0)
        & (rows[f"{part}_size"] >= 0)
        & (rows[f"{part}_size"] <= limit)
        & (rows[f"{part}_offset"] <= tar_size - rows[f"{part}_size"])
        for part, limit in (("image", MAX_IMAGE_BYTES), ("caption", MAX_CAPTION_BYTES))
    ]
    kinds = (rows["caption_kind"] >= 0) & (rows["caption_kind"] < len(CAPTION_KINDS))
    sizes = (rows["width"] > 0) & (rows["height"] > 0) & (rows["caption_bytes"] > 0)
    return bool(np.all(fits[0] & fits[1] & kinds & sizes))


def find_shards(shards: Sequence[str]) -> list[Path]:
    """Expand tar files, folders of tar files and globs; each entry in sorted order, entries as given, none twice.

    Raises DataError for an entry that names nothing.
    """
    found: dict[Path, None] = {}
    for entry in shards:
        found.update(dict.fromkeys(_expand(entry)))
    if not found:
        raise DataError("no shards are named; give tar files, folders or globs such as shards/*.tar")
    return list(found)


def _expand(entry: str) -> list[Path]:
    if "://" in entry or entry.startswith("pipe:"):
        raise DataError(f"shard {entry!r} is not a local path; copy the shards to a local or mounted folder")
    path = Path(entry).expanduser()
    if path.is_dir():
        tars = sorted(tar for tar in path.glob("*.tar") if not tar.name.startswith("."))
        if not tars:
            raise DataError(f"folder {entry!r} has no .tar files; make shards with `dstrain pack SOURCE --out {entry}`")
        return tars
    if path.is_file():
        return [path]
    first = next((place for place, part in enumerate(path.parts) if set("*?[") & set(part)), None)
    if first is None:
        hint = "; braces are not expanded, write * instead" if "{" in entry else ""
        raise DataError(f"no such shard: {entry!r}{hint} (looked in {Path.cwd()})")
    tars = sorted(tar for tar in Path(*path.parts[:first]).glob(str(Path(*path.parts[first:]))) if tar.is_file())
    if not tars:
        raise DataError(f"no shard matches {entry!r} (looked in {Path.cwd()})")
    return tars

"""From a tar file to its index: every member read once, every sample whole, named and sound by its headers.

Samples are grouped as WebDataset groups them, by adjacent members with one key. What cannot be taken as it is leaves
the sample out, with the reason; damage to the tar itself is an error of the shard.
"""

import json
import logging
import os
import struct
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from dstrain.data.media.captions import MAX_JSON_BYTES, captions_of, check_length
from dstrain.data.media.containers import MAX_VIDEO_BYTES
from dstrain.data.media.encoded import check_encoded_bytes, probe_encoded
from dstrain.data.media.probe import check_bytes, probe
from dstrain.data.reasons import BadSample, Reason
from dstrain.data.shards.arrays import MAX_COLUMNS, PART, ROW
from dstrain.data.shards.index import ShardIndex, make
from dstrain.data.shards.keys import KeyLog
from dstrain.data.shards.names import (
    CAPTIONS,
    UNREAD_IMAGE_KINDS,
    UNREAD_VIDEO_KINDS,
    Content,
    column_of,
    is_safe,
    split,
)
from dstrain.data.shards.tar import Kind, Member, members, read_at
from dstrain.errors import DataError

log = logging.getLogger(__name__)

AGAIN = "the key comes again after another one; the members of a sample must lie together"
BESIDE = "it lies beside a key that comes again, so that the names of their members may have been exchanged"
_ROW = struct.Struct("<IIii")
_PART = struct.Struct("<qqQiiifHHI")
_CHUNK = 1 << 22  # bytes read at once of what may be larger than memory


@dataclass(slots=True)
class Part:
    """One member as it was read. `data` is None for what is not looked into, which is never held whole in memory."""

    column: str
    content: Content
    digest: int  # xxh3_64
    data: bytes | None = None
    width: int = 0
    height: int = 0
    frames: int = 0
    fps: float = 0.0


def scan(path: Path, fd: int) -> ShardIndex:
    """Index the tar file open as `fd`; `path` is its name for messages and the index.

    Raises DataError if it is not a plain tar, is damaged, or changes meanwhile.
    """
    before = os.fstat(fd)
    table = _Table(path)
    group: _Group | None = None
    for member in members(fd, path):
        named = None if member.kind is Kind.FOLDER else split(member.name)
        if named is None:
            continue
        key, extension = named
        if group is None or group.key != key:
            if group is not None:
                table.add(group)
            group = _Group(key)
        if group.fault is None:
            group.take(fd, member, extension, table.column)
    if group is not None:
        table.add(group)
    else:
        log.warning("shard %s holds no samples", path)
    digest = shard_digest(fd)
    after = os.fstat(fd)
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DataError(f"shard {path} changed while it was indexed; wait until it is written and start again")
    return table.index(after, digest)


def read_part(fd: int, member: Member, extension: str) -> Part:
    """Read one member that belongs to a sample; raises BadSample if it cannot be used."""
    if member.kind is Kind.OTHER:
        raise BadSample(Reason.NOT_A_FILE, f"{member.name:.200} is a link, a device or a sparse file")
    if not is_safe(member.name):
        raise BadSample(Reason.UNSAFE_NAME, f"the name {member.name:.200} leaves the shard")
    last = extension.rpartition(".")[2]
    if last in UNREAD_IMAGE_KINDS:
        raise BadSample(Reason.IMAGE_FORMAT, f"{last} is not read; convert {member.name:.200} to png, jpg or webp")
    if last in UNREAD_VIDEO_KINDS:
        raise BadSample(Reason.VIDEO_FORMAT, f"{last} is not read; convert {member.name:.200} to mp4, webm or mkv")
    column, content = column_of(extension)
    if content is Content.OPAQUE or (content is Content.JSON and member.size > MAX_JSON_BYTES):
        return Part(column, content, member_digest(fd, member))
    if content is Content.IMAGE:
        check_bytes(member.size)
    elif content is Content.VIDEO:
        if member.size > MAX_VIDEO_BYTES:
            raise BadSample(Reason.VIDEO_TOO_LARGE, f"{member.size} bytes, more than {MAX_VIDEO_BYTES}")
    elif content is Content.ENCODED:
        check_encoded_bytes(member.size)
    elif content is Content.TXT:
        check_length(member.size)
    data = read_at(fd, member.size, member.offset)
    part = Part(column, content, xxhash.xxh3_64_intdigest(data), data)
    if content is Content.IMAGE:
        (part.width, part.height), part.frames = probe(data).size, 1
    elif content is Content.ENCODED:
        encoded = probe_encoded(data)
        part.width, part.height, part.frames = encoded.width, encoded.height, encoded.frames
    elif content is Content.VIDEO:
        from dstrain.data.media.video import probe_video  # PyAV is loaded only where there are videos

        header = probe_video(data)
        part.width, part.height, part.frames, part.fps = header.width, header.height, header.frames, header.fps
    return part


def caption_bytes(part: Part) -> int:
    """Return the UTF-8 bytes of the longest caption in a "txt" or "json" member; 0 for JSON that holds other things.

    Raises BadSample if it is damaged, empty or too long.
    """
    if part.data is None:
        raise BadSample(Reason.CAPTION_TOO_LONG, f"JSON of more than {MAX_JSON_BYTES} bytes where a caption should be")
    try:
        return max(len(text.encode()) for text in captions_of(part.data, part.content.name.lower()))
    except BadSample as error:
        if error.reason is Reason.NO_CAPTION and _is_json(part.data):
            return 0
        raise


def pieces(fd: int, offset: int, size: int) -> Iterator[bytes]:
    """Yield the `size` bytes at `offset` a few MiB at a time, less only if the file ends."""
    end = offset + size
    while offset < end and (piece := read_at(fd, min(_CHUNK, end - offset), offset)):
        yield piece
        offset += len(piece)


def member_digest(fd: int, member: Member) -> int:
    """Return the xxh3_64 of a member, however large it is."""
    digest = xxhash.xxh3_64()
    for piece in pieces(fd, member.offset, member.size):
        digest.update(piece)
    return digest.intdigest()


def shard_digest(fd: int) -> str:
    """Return the xxh3_128 of a whole file, hexadecimal."""
    digest = xxhash.xxh3_128()
    for piece in pieces(fd, 0, os.fstat(fd).st_size):
        digest.update(piece)
    return digest.hexdigest()


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


class _Group:
    """The members of one sample while they are read."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.fault: BadSample | None = None  # the first
        self.parts = bytearray()
        self._texts: dict[Content, tuple[int, Part]] = {}  # with their places among the parts
        self._columns: set[int] = set()

    def take(self, fd: int, member: Member, extension: str, number: Callable[[str], int]) -> None:
        """Read one member; `number` gives the number of a column."""
        try:
            part = read_part(fd, member, extension)
            column = number(part.column)
            if column in self._columns:
                raise BadSample(Reason.AMBIGUOUS, f"{member.name:.200} is a second member for column {part.column}")
        except BadSample as error:
            self.fault = error
            return
        if part.content in CAPTIONS:
            self._texts[part.content] = (len(self._columns), part)
        self._columns.add(column)
        self.parts += _PART.pack(
            member.offset, member.size, part.digest, part.width, part.height, part.frames, part.fps,
            column, part.content, 0,
        )  # fmt: skip

    def caption(self) -> tuple[int, int]:
        """Return the place of the caption among the parts, -1 if there is none, and its bytes; raises BadSample."""
        kind = next((kind for kind in CAPTIONS if kind in self._texts), None)
        if kind is None:
            return -1, 0
        place, part = self._texts[kind]
        size = caption_bytes(part)
        return (place, size) if size else (-1, 0)


class _Table:
    """The rows of a shard while it is read, packed, so that a million small members take little memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._columns: dict[str, int] = {}
        self._rows, self._parts = bytearray(), bytearray()
        self._keys = KeyLog()  # of all samples
        self._places = array("q")  # of the rows' keys among them
        self._excluded: list[tuple[str, Reason, str]] = []

    def column(self, name: str) -> int:
        """Return the number of a column, a new one if need be."""
        number = self._columns.setdefault(name, len(self._columns))
        if number >= MAX_COLUMNS:
            raise DataError(
                f"{self._path} has more than {MAX_COLUMNS} kinds of members, the last being {name!r:.200}; extensions "
                "begin at the first dot of a name, so pack files with dots in their names again with `dstrain pack`"
            )
        return number

    def add(self, group: _Group) -> None:
        """Take in a sample whose members are all read."""
        self._keys.append(group.key)
        try:
            if group.fault is not None:
                raise group.fault
            caption, size = group.caption()
        except BadSample as error:
            self._excluded.append((group.key, error.reason, str(error)))
            return
        first, count = len(self._parts) // _PART.size, len(group.parts) // _PART.size
        self._places.append(len(self._keys) - 1)
        self._rows += _ROW.pack(first, count, first + caption if caption >= 0 else -1, size)
        self._parts += group.parts

    def index(self, tar: os.stat_result, digest: str) -> ShardIndex:
        """Return what was read as an index."""
        keys, places = self._keys.table(), np.frombuffer(self._places, np.int64)
        rows, parts = np.frombuffer(self._rows, ROW), np.frombuffer(self._parts, PART)
        again, beside = (mask[places] for mask in self._keys.repeated())
        doubtful = again | beside
        if doubtful.any():
            for mask, why in ((again, AGAIN), (beside, BESIDE)):
                names = dict.fromkeys(keys[place] for place in places[mask].tolist())
                self._excluded += [(name, Reason.AMBIGUOUS, why) for name in names]
            parts = parts[~np.repeat(doubtful, rows["count"])]
            places, rows = places[~doubtful], rows[~doubtful]
            first = np.cumsum(rows["count"], dtype=np.int64) - rows["count"]
            rows["caption"] = np.where(rows["caption"] < 0, -1, rows["caption"] - rows["first"] + first)
            rows["first"] = first
        used, parts["column"] = np.unique(parts["column"], return_inverse=True)
        names_ = tuple(self._columns)
        columns = tuple(names_[number] for number in used.tolist())
        return make(self._path, tar, digest, columns, keys.take(places), rows, parts, self._excluded)

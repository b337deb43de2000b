"""Where the members of a tar file lie, read strictly.

`tarfile` and `webdataset` end quietly at a damaged or cut header, which loses samples without a word.
Here every header must have its checksum, every member must lie inside the file, and the end marker must be there.
Nothing is extracted: names are labels, never paths.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from dstrain.errors import DataError

BLOCK = 512
_MAX_RECORD = 1 << 20  # bytes of one pax or long-name record; real ones are under 1 KiB
_MAX_TAIL = 1 << 26  # zero bytes after the end marker; tar pads to 10 KiB
_NO_DATA = frozenset(b"123456")  # links, devices, folders, pipes: their size field counts no bytes
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class Kind(Enum):
    """What a member is; only files are ever read."""

    FILE = "file"
    FOLDER = "folder"
    OTHER = "other"  # links, devices, sparse files


@dataclass(frozen=True, slots=True)
class Member:
    """One member: `size` bytes of data from byte `offset` of the tar file."""

    name: str
    kind: Kind
    offset: int
    size: int


def read_at(fd: int, size: int, offset: int) -> bytes:
    """Read `size` bytes at `offset`; fewer only at the end of the file."""
    data = os.pread(fd, size, offset)
    while 0 < len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def members(fd: int, path: Path) -> Iterator[Member]:
    """Yield the members of the tar file open as `fd` in order; `path` is only for messages.

    Raises DataError if the file is not a plain tar, is truncated or damaged, naming the byte.
    """
    end = os.fstat(fd).st_size
    position = 0
    long_name: bytes | None = None
    pax: dict[bytes, bytes] = {}
    while True:
        block = read_at(fd, BLOCK, position)
        if len(block) < BLOCK:
            raise _damaged(path, position, "it ends without the end-of-archive marker, so it was cut off", block)
        if not any(block):
            if long_name is not None or pax:
                raise _damaged(path, position, "a long-name record has no member", block)
            _check_tail(fd, position + BLOCK, end, path)
            return
        if not _checksum_holds(block):
            raise _damaged(path, position, "the header's checksum is wrong", block)
        kind = block[156]
        size = _number(block[124:136])
        if size is None:
            raise _damaged(path, position, "the size field is not a number", block)
        start = position + BLOCK
        if kind in b"xgLK":
            if size > _MAX_RECORD or start + size > end:
                raise _damaged(path, position, f"a name record claims {size} bytes", block)
            record = read_at(fd, size, start)
            if kind == ord("L"):
                long_name = record.rstrip(b"\0")
            elif kind != ord("K"):  # K is a long link target, and links are not read
                fields = _pax_fields(record)
                if fields is None or (kind == ord("g") and {b"path", b"size"} & fields.keys()):
                    raise _damaged(path, position, "a pax record cannot be understood", block)
                pax = pax if kind == ord("g") else fields
            position = start + _padded(size)
            continue
        if kind == ord("S"):
            raise _damaged(path, position, "it holds a sparse file in the old GNU form", block)
        if b"size" in pax:
            if not pax[b"size"].isdigit() or len(pax[b"size"]) > 18:
                raise _damaged(path, position, "the pax size is not a number", block)
            size = int(pax[b"size"])
        name = pax.get(b"path", long_name if long_name is not None else _short_name(block))
        if kind in _NO_DATA or (kind == 0 and name.endswith(b"/")):
            size = 0
        if start + size > end:
            missing = start + size - end
            raise _damaged(path, position, f"member {_text(name)!r} lacks its last {missing} bytes", block)
        yield Member(_text(name), _kind(kind, name, pax), start, size)
        position = start + _padded(size)
        long_name, pax = None, {}


def _kind(kind: int, name: bytes, pax: dict[bytes, bytes]) -> Kind:
    if kind == ord("5") or (kind == 0 and name.endswith(b"/")):
        return Kind.FOLDER
    sparse = any(field.startswith(b"GNU.sparse") for field in pax)
    return Kind.FILE if kind in b"\x0007" and not sparse else Kind.OTHER


def _damaged(path: Path, position: int, what: str, block: bytes) -> DataError:
    if position:
        return DataError(f"{path} is damaged at byte {position}: {what}; copy or pack it again, or leave it out")
    if not block:
        return DataError(f"{path} is empty (0 bytes), not a tar file; copy or pack it again, or leave it out")
    packed = _COMPRESSED.get(block[:2])
    if packed:
        return DataError(f"{path} is {packed}-compressed; decompress it, samples are read at random places")
    return DataError(f"{path} is not a tar file ({what}); pack pictures and captions into shards with `dstrain pack`")


def _check_tail(fd: int, position: int, end: int, path: Path) -> None:
    if end - position > _MAX_TAIL:
        raise _damaged(path, position, f"{end - position} bytes follow the end-of-archive marker", b"")
    while chunk := read_at(fd, 1 << 20, position):
        if any(chunk):
            raise _damaged(path, position, "data follows the end-of-archive marker", b"")
        position += len(chunk)


def _checksum_holds(block: bytes) -> bool:
    stated = _number(block[148:156])
    rest = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(rest)
    signed = unsigned - 256 * sum(byte > 127 for byte in rest)  # some old writers summed signed bytes
    return stated is not None and stated in (unsigned, signed)


def _number(field: bytes) -> int | None:
    """Read an octal or (GNU, sizes over 8 GiB) base-256 field; None if it is neither, or negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if not digits:
        return 0
    return int(digits, 8) if all(48 <= digit <= 55 for digit in digits) else None


def _pax_fields(record: bytes) -> dict[bytes, bytes] | None:
    """Read the "LENGTH key=value\\n" lines of a pax record; None if it is malformed."""
    fields: dict[bytes, bytes] = {}
    position = 0
    while position < len(record):
        space = record.find(b" ", position, position + 8)
        if space < 0 or not record[position:space].isdigit():
            return None
        stop = position + int(record[position:space])
        key, equals, value = record[space + 1 : stop - 1].partition(b"=")
        if not key or not equals or stop > len(record) or record[stop - 1 : stop] != b"\n":
            return None
        fields[key] = value
        position = stop
    return fields


def _short_name(block: bytes) -> bytes:
    name = block[:100].split(b"\0", 1)[0]
    prefix = block[345:500].split(b"\0", 1)[0] if block[257:263] == b"ustar\0" else b""
    return prefix + b"/" + name if prefix else name


def _text(name: bytes) -> str:
    return name.decode("utf-8", errors="backslashreplace")


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK

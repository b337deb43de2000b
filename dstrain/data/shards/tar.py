"""Where the members of a tar file lie, read strictly.

`tarfile` and `webdataset` end quietly at a damaged or cut header, which loses samples without a word.
Here every header must have its checksum, every member must lie inside the file, and the end marker must be there.
Nothing is extracted: names are labels, never paths.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from dstrain.errors import DataError

BLOCK = 512
_MAX_RECORD = 1 << 20  # bytes of one pax or long-name record; real ones are under 1 KiB
_CHUNK = 1 << 20
_MAX_TAIL = 1 << 26  # zero bytes after the end marker; tar pads to 10 KiB
_NO_DATA = frozenset(b"123456")  # links, devices, folders, pipes: their size field counts no bytes
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZ": "bzip2", b"\xfd7": "xz", b"\x28\xb5": "zstd"}


class TarDamage(DataError):
    """The tar file is damaged.

    position: the byte where. what: how, without the name of the file. resume: from where on another member may follow.
    """

    def __init__(self, message: str, position: int = 0, what: str = "", resume: int = 0) -> None:
        super().__init__(message)
        self.position = position
        self.what = what
        self.resume = resume


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


def regular(path: Path) -> os.stat_result:
    """Return the status of the shard at `path`; raises DataError if it is not there, or not a file."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"shard {path} cannot be opened: {error.strerror}") from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"shard {path} is not a file but a folder, a pipe or a device; give a tar file")
    return status


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open the shard at `path` for reading; raises DataError for it and for failures to read inside the block."""
    regular(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise DataError(f"shard {path} cannot be opened: {error.strerror}") from error
    try:
        yield fd
    except OSError as error:
        raise DataError(f"shard {path} cannot be read: {error.strerror}") from error
    finally:
        os.close(fd)


def read_at(fd: int, size: int, offset: int) -> bytes:
    """Read `size` bytes at `offset`; fewer only at the end of the file."""
    data = os.pread(fd, size, offset)
    while 0 < len(data) < size:
        more = os.pread(fd, size - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def members(fd: int, path: Path, position: int = 0) -> Iterator[Member]:
    """Yield the members of the tar file open as `fd` in order, from byte `position` on; `path` is only for messages.

    Raises TarDamage if the file is not a plain tar, is truncated or damaged, naming the byte.
    """
    end = os.fstat(fd).st_size
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
                long_name = record.removesuffix(b"\0")
                if not long_name or b"\0" in long_name:
                    raise _damaged(path, position, "a long-name record holds no name", block)
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


def next_header(fd: int, position: int) -> int | None:
    """Find the first block at or after byte `position`, a multiple of 512, that is a header by its checksum."""
    while chunk := read_at(fd, _CHUNK, position):
        for block in range(0, len(chunk) - BLOCK + 1, BLOCK):
            digits = chunk[block + 148 : block + 154]
            if digits.strip(b" 01234567\0") == b"" and digits.strip(b" \0"):  # far cheaper than the sum
                header = chunk[block : block + BLOCK]
                if _checksum_holds(header):
                    return position + block
        position += len(chunk)
    return None


def _damaged(path: Path, position: int, what: str, block: bytes) -> TarDamage:
    packed = _COMPRESSED.get(block[:2])
    if position:
        message = f"{path} is damaged at byte {position}: {what}; copy or pack it again, or leave it out"
    elif not block:
        what = "it is empty"
        message = f"{path} is empty (0 bytes), not a tar file; copy or pack it again, or leave it out"
    elif packed:
        what = f"it is {packed}-compressed"
        message = f"{path} is {packed}-compressed; decompress it, samples are read at random places"
    else:
        message = f"{path} is not a tar file ({what}); pack pictures and captions into shards with `dstrain pack`"
    return TarDamage(message, position, what, position + BLOCK)


def _check_tail(fd: int, position: int, end: int, path: Path) -> None:
    what = "data follows the end-of-archive marker"
    if end - position > _MAX_TAIL:
        what = f"{end - position} bytes follow the end-of-archive marker"
    else:
        while (chunk := read_at(fd, _CHUNK, position)) and not any(chunk):
            position += len(chunk)
        if not chunk:
            return
        position += (len(chunk) - len(chunk.lstrip(b"\0"))) // BLOCK * BLOCK
    error = _damaged(path, position, what, b"")
    error.resume = position
    raise error


def _checksum_holds(block: bytes) -> bool:
    stated = _number(block[148:156])
    unsigned = sum(block) - sum(block[148:156]) + 8 * 32  # the field itself counts as spaces
    if stated == unsigned:
        return True
    high = sum(byte > 127 for byte in block[:148] + block[156:])
    return high > 0 and stated == unsigned - 256 * high  # some old writers summed signed bytes


def _number(field: bytes) -> int | None:
    """Read an octal or (GNU, sizes over 8 GiB) base-256 field; None if it is neither, or negative."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip(b" ")
    if not digits:
        return 0
    return None if digits.strip(b"01234567") else int(digits, 8)


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

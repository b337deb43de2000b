"""The index of a shard: which samples a tar file holds, where their members lie, and how large they are.

It is kept beside the tar as `NAME.tar.index`, written once. The file, little-endian:

    bytes 0-31   magic (16 bytes), length of the header (u4), zero (u4), xxh3_64 of the header (u8)
    header       JSON: what planning asks of a whole shard, and the lengths and the xxh3_64 of the body
    body         where each key ends (i8), rows (ROW), parts (PART), the keys (UTF-8), the samples left out (JSON
                 lines of key, reason and detail); each begins at a multiple of 64 bytes

Opening thousands of shards reads thousands of headers; a body is read and checked when it is asked for, and the bodies
used last are kept. They could be mapped, but a file that is written over while it is mapped kills the process.
A sidecar is untrusted: what it says must be possible, and no memory is taken on its word.
"""

import json
import logging
import os
import re
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dstrain.data.reasons import Reason
from dstrain.data.shards.arrays import MAX_COLUMNS, PART, ROW, ColumnStats, column_stats, fault
from dstrain.data.shards.keys import KeyTable
from dstrain.data.shards.tar import read_at
from dstrain.errors import DataError

log = logging.getLogger(__name__)

SIDECAR = ".index"
_MAGIC = b"dstrain index 2\n"
_PREFIX = struct.Struct("<16sIIQ")
_ALIGN = 64
_MAX_HEADER = 1 << 20
_KEPT = 32  # bodies; one of 10,000 samples takes about 1.5 MB


@dataclass(frozen=True)
class Excluded:
    """A sample that is in a shard and not in the dataset."""

    shard: str  # path
    key: str
    reason: Reason
    detail: str


@dataclass(frozen=True)
class _Body:
    keys: KeyTable
    rows: np.ndarray
    parts: np.ndarray
    excluded: list[Excluded]


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of one shard, in the order of the tar: `rows[i]` (dtype ROW) belongs to `keys[i]`.

    A row is a sample with nothing damaged in it; whether a training can use it is decided later. Keys, rows, parts and
    excluded are read when they are asked for, which raises DataError if the sidecar is damaged; the arrays are views of
    the whole body, so copy what is kept for long.
    """

    path: Path  # of the tar
    size: int  # of the tar, bytes
    mtime_ns: int
    digest: str  # xxh3_128 of the whole tar, hexadecimal
    stats: dict[str, ColumnStats]  # by column, in the order of their numbers
    samples: int
    captioned: int  # rows with a caption
    max_caption_bytes: int
    excluded_counts: dict[Reason, int]  # of the samples in `excluded`
    source: Path | bytes = field(repr=False)  # the sidecar, or what would be in it
    _start: int = field(repr=False)  # of the body in the sidecar
    _lengths: tuple[int, ...] = field(repr=False)  # bytes of each of its arrays
    _checksum: int = field(repr=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns; `part["column"]` is a place in them."""
        return tuple(self.stats)

    @property
    def keys(self) -> KeyTable:
        """The keys of the rows."""
        return _body(self).keys

    @property
    def rows(self) -> np.ndarray:
        """One ROW a sample, read-only."""
        return _body(self).rows

    @property
    def parts(self) -> np.ndarray:
        """One PART a member, read-only; those of a row lie together."""
        return _body(self).parts

    @property
    def excluded(self) -> list[Excluded]:
        """The samples that are left out, and why."""
        return list(_body(self).excluded) if self.excluded_counts else []

    def part_of(self, column: str) -> np.ndarray:
        """Return the part number that each row has in `column`, -1 where it has none: int64 [samples]."""
        found = np.full(self.samples, -1, np.int64)
        if column in self.stats:
            numbers = np.flatnonzero(self.parts["column"] == self.columns.index(column))
            found[np.searchsorted(self.rows["first"], numbers, side="right") - 1] = numbers
        return found


def make(
    path: Path,
    tar: os.stat_result,
    digest: str,
    columns: tuple[str, ...],
    keys: KeyTable,
    rows: np.ndarray,
    parts: np.ndarray,
    excluded: Iterable[tuple[str, Reason, str]],
) -> ShardIndex:
    """Make the index of the tar at `path`, in memory; `excluded` are (key, reason, detail)."""
    lines = bytearray()
    counts: Counter[Reason] = Counter()
    for entry in excluded:
        lines += json.dumps(entry, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        counts[entry[1]] += 1
    arrays: list[Any] = [keys.ends.view(np.uint8), rows.view(np.uint8), parts.view(np.uint8), keys.blob, lines]
    body = [piece for array in arrays for piece in (array, b"\0" * (_aligned(len(array)) - len(array)))]
    checksum = xxhash.xxh3_64()
    for piece in body:
        checksum.update(piece)
    header = {
        "size": tar.st_size,
        "mtime_ns": tar.st_mtime_ns,
        "digest": digest,
        "stats": [[name, *astuple(stats)] for name, stats in column_stats(columns, parts).items()],
        "samples": len(rows),
        **_caption_totals(rows),
        "excluded": dict(counts),
        "lengths": [len(array) for array in arrays],
        "checksum": checksum.intdigest(),
    }
    text = json.dumps(header, ensure_ascii=False).encode()
    text = text.ljust(_aligned(_PREFIX.size + len(text)) - _PREFIX.size)
    data = b"".join([_PREFIX.pack(_MAGIC, len(text), 0, xxhash.xxh3_64_intdigest(text)), text, *body])
    return _parse(data, len(data), path, data)


def dump(index: ShardIndex) -> bytes:
    """Return the content of the index's sidecar."""
    return index.source if isinstance(index.source, bytes) else index.source.read_bytes()


def load(sidecar: Path, tar: Path) -> ShardIndex | None:
    """Read the header of a sidecar; `tar` is where its shard lies, which is not looked at.

    None if there is none, it is of another version, or (with a warning) its header is damaged or impossible.
    """
    try:
        fd = os.open(sidecar, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    except OSError as error:
        log.warning("%s cannot be read (%s) and is made again", sidecar, error.strerror)
        return None
    try:
        head = read_at(fd, 4096, 0)
        if head[:14] == _MAGIC[:14] and head[: len(_MAGIC)] != _MAGIC:
            return None
        length = _PREFIX.size + _PREFIX.unpack_from(head)[1]
        if len(head) < length <= _MAX_HEADER:
            head = read_at(fd, length, 0)
        return _parse(head, os.fstat(fd).st_size, tar, sidecar)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        log.warning("%s is damaged (%s) and is made again", sidecar, error)
        return None
    finally:
        os.close(fd)


def _parse(head: bytes, file_size: int, path: Path, source: Path | bytes) -> ShardIndex:
    """Make an index from the start of its file; raises ValueError and the like if it cannot be."""
    magic, length, zero, checksum = _PREFIX.unpack_from(head)
    text = head[_PREFIX.size : _PREFIX.size + length]
    if magic != _MAGIC or zero or len(text) != length or xxhash.xxh3_64_intdigest(text) != checksum:
        raise ValueError("its header does not have its checksum")
    header = json.loads(text)
    start = _PREFIX.size + length
    lengths = tuple(map(_natural, header["lengths"]))
    samples = _natural(header["samples"])
    if (lengths[0], lengths[1], lengths[2] % PART.itemsize) != (8 * samples, ROW.itemsize * samples, 0):
        raise ValueError("its arrays are not of one length")
    if len(lengths) != 5 or start + sum(map(_aligned, lengths)) != file_size or start % _ALIGN:
        raise ValueError("it is cut off, or goes on too long")
    stats = {str(name): _column(*values) for name, *values in header["stats"]}
    if len(stats) != len(header["stats"]) or len(stats) > MAX_COLUMNS:
        raise ValueError("it has columns of one name, or too many")
    if not re.fullmatch("[0-9a-f]{32}", header["digest"]) or type(header["mtime_ns"]) is not int:
        raise ValueError("its shard cannot be")
    return ShardIndex(
        path=path,
        size=_natural(header["size"]),
        mtime_ns=header["mtime_ns"],
        digest=header["digest"],
        stats=stats,
        samples=samples,
        captioned=_natural(header["captioned"]),
        max_caption_bytes=_natural(header["max_caption_bytes"]),
        excluded_counts={Reason(reason): _natural(count) for reason, count in header["excluded"].items()},
        source=source,
        _start=start,
        _lengths=lengths,
        _checksum=header["checksum"],
    )


@lru_cache(maxsize=_KEPT)
def _body(index: ShardIndex) -> _Body:
    """Read the arrays of an index; raises DataError if they are damaged or impossible."""
    try:
        data = memoryview(dump(index))
        end = index._start + sum(map(_aligned, index._lengths))
        if len(data) != end or xxhash.xxh3_64_intdigest(data[index._start :]) != index._checksum:
            raise ValueError("its checksum is wrong")
        arrays, start = [], index._start
        for length in index._lengths:
            arrays.append(data[start : start + length])
            start += _aligned(length)
        keys = KeyTable(bytes(arrays[3]), np.frombuffer(bytes(arrays[0]), "<i8"))
        rows, parts = np.frombuffer(arrays[1], ROW), np.frombuffer(arrays[2], PART)
        what = fault(rows, parts, len(index.stats), index.size)
        if what:
            raise ValueError(what)
        excluded = [_excluded(index.path, *json.loads(line)) for line in bytes(arrays[4]).split(b"\n")[:-1]]
        totals = {"captioned": index.captioned, "max_caption_bytes": index.max_caption_bytes}
        if (_caption_totals(rows), column_stats(index.columns, parts)) != (totals, index.stats):
            raise ValueError("its header says other things than its rows")
        if Counter(entry.reason for entry in excluded) != Counter(index.excluded_counts):
            raise ValueError("its header counts other samples that are left out")
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"the index {index.source!s} is damaged: {error}; delete it, it is made again") from error
    return _Body(keys, rows, parts, excluded)


def _caption_totals(rows: np.ndarray) -> dict[str, int]:
    sizes = rows["caption_bytes"]
    return {"captioned": int(np.count_nonzero(sizes)), "max_caption_bytes": int(sizes.max(initial=0))}


def _column(*values: Any) -> ColumnStats:
    return ColumnStats(*map(_natural, values))


def _excluded(path: Path, key: Any, reason: Any, detail: Any) -> Excluded:
    if not isinstance(key, str) or not isinstance(detail, str):
        raise ValueError("a sample that is left out has no name")
    return Excluded(str(path), key, Reason(reason), detail)


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"it has {value!r:.40} where a number should be")
    return value


def _aligned(length: int) -> int:
    return -(-length // _ALIGN) * _ALIGN

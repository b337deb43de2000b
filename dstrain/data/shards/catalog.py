"""The shards that a user names, and their indexes: made when missing or stale, kept beside the tars."""

import hashlib
import logging
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dstrain.data.remote.urls import is_remote, list_remote
from dstrain.data.shards.index import SIDECAR, ShardIndex, dump, load
from dstrain.data.shards.processes import each
from dstrain.data.shards.scan import scan
from dstrain.data.shards.tar import opened, regular
from dstrain.errors import DataError
from dstrain.storage import locked, write_atomic

log = logging.getLogger(__name__)

_NOT_READ = re.compile(r"(pipe|file|data):", re.IGNORECASE)
_RANGE = re.compile(r"\{(\d{1,18})\.\.(\d{1,18})\}")
_MAX_SHARDS = 1_000_000  # that one entry may name
_LOCKS = 1024  # lock files, shared by all shards


def open_index(path: Path) -> ShardIndex:
    """Return the index of the shard at `path`: from its sidecar if that is fresh, else made now and written beside it.

    In a folder that cannot be written to, the index stays in memory. Raises DataError if the shard is not a plain tar.
    """
    return _fresh(path) or _build(path)


def open_indexes(paths: Sequence[Path], *, workers: int = 1, progress: bool = False) -> list[ShardIndex]:
    """Open the indexes of many shards, in order; the missing and stale ones are made by `workers` processes.

    `progress` shows a bar if stderr is a terminal. Raises DataError for the first shard that cannot be indexed.
    """
    indexes = [_fresh(path) for path in paths]
    missing = [path for path, index in zip(paths, indexes) if index is None]
    made = iter(list(each(_build, missing, workers=workers, label="indexing", progress=progress)))
    return [index if index is not None else next(made) for index in indexes]


def renew_indexes(paths: Sequence[Path], *, workers: int = 1, progress: bool = False) -> list[ShardIndex]:
    """Open indexes as `open_indexes` does, after a look into all that are there: those that are damaged are made anew.

    What `open_indexes` returns raises DataError where such damage is met later.
    """
    for path in paths:
        index = _fresh(path)
        try:
            if index is not None:
                index.rows  # noqa: B018  reads and checks the body
        except DataError as error:
            log.warning("%s", error)
            sidecar_of(path).unlink(missing_ok=True)
    return open_indexes(paths, workers=workers, progress=progress)


def _fresh(path: Path) -> ShardIndex | None:
    tar = regular(path)
    index = load(sidecar_of(path), path)
    return index if index is not None and (index.size, index.mtime_ns) == (tar.st_size, tar.st_mtime_ns) else None


def _build(path: Path) -> ShardIndex:
    """Index a shard, unless another process did while this one waited."""
    with _alone(path):
        index = _fresh(path)
        if index is not None:
            return index
        with opened(path) as fd:
            index = scan(path, fd)
        try:
            write_atomic(sidecar_of(path), dump(index))
        except OSError as error:
            log.warning("the index of %s stays in memory (%s); it is made again at every start", path, error.strerror)
            return index
    return load(sidecar_of(path), path) or index


def sidecar_of(path: Path) -> Path:
    """Return where the index of the shard at `path` lies."""
    return path.with_name(path.name + SIDECAR)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep other processes of this user on this node from indexing the same shard."""
    number = int.from_bytes(hashlib.sha256(os.fsencode(path.resolve())).digest()[:8], "big") % _LOCKS
    folder = Path(tempfile.gettempdir()) / f"dstrain-locks-{os.getuid()}"
    with ExitStack() as held:
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            owned = folder.lstat()
            if stat.S_ISDIR(owned.st_mode) and owned.st_uid == os.getuid():
                held.enter_context(locked(folder / f"{number:04d}"))
        except OSError as error:
            log.debug("%s is indexed without a lock: %s", path, error)  # at worst by several at once
        yield


def find_shards(entries: Sequence[str]) -> list[str]:
    """List the shards that `entries` name: tar files, folders of them, globs, ranges such as a-{000..012}.tar, URLs.

    Entries stay in order, what one entry names is sorted, and a file that is named twice is used once, with a warning.
    Raises DataError for an entry that names nothing, or is neither a path nor an s3, gs, hf, http or https URL.
    """
    found: dict[str, str] = {}  # what it really is -> as it is named
    named = 0
    for entry in entries:
        if not entry:
            raise DataError("an entry of the shards is empty; give a path, or . for the current folder")
        for name in _ranges(entry):
            for shard in list_remote(name) if _is_remote(name) else _local(name):
                named += 1
                found.setdefault(_identity(shard), shard)
    if not found:
        raise DataError("no shards are named; give tar files, folders or globs such as shards/*.tar")
    if len(found) < named:
        log.warning("%d of the %d shards named are there already; each is used once", named - len(found), named)
    return list(found.values())


def find_local(entries: Sequence[str]) -> list[Path]:
    """List the shards that `entries` name, as `find_shards` does; raises DataError for URLs too."""
    for entry in entries:
        if _is_remote(entry):
            raise DataError(f"{entry!r} is remote; run this where the shards lie, or on a copy of them")
    return [Path(shard) for shard in find_shards(entries)]


def _is_remote(entry: str) -> bool:
    if _NOT_READ.match(entry):
        raise DataError(f"shard {entry!r} is not read: give a path, or an s3, gs, hf, http or https URL")
    return is_remote(entry)


def _identity(shard: str) -> str:
    if is_remote(shard):
        return shard
    return os.path.realpath(shard)  # what cannot be opened is found when it is


def _ranges(entry: str) -> list[str]:
    """Expand numeric ranges in braces; numbers have the digits of the longer end if either begins with a zero."""
    match = _RANGE.search(entry)
    if match is None:
        return [entry]
    first, last = match.groups()
    count = int(last) - int(first) + 1
    tails = _ranges(entry[match.end() :])
    if not 0 < count * len(tails) <= _MAX_SHARDS:
        raise DataError(f"{entry!r} names {max(0, count) * len(tails)} shards; a range is {{first..last}}")
    width = max(len(first), len(last)) if first[0] == "0" or last[0] == "0" else 0
    numbers = range(int(first), int(last) + 1)
    return [f"{entry[: match.start()]}{number:0{width}}{tail}" for number in numbers for tail in tails]


def _local(name: str) -> list[str]:
    path = Path(os.path.expanduser(name))  # noqa: PTH111  which leaves an unknown ~name as it is
    if path.is_dir():
        tars = _visible(path.glob("*.tar"))
        if not tars:
            raise DataError(f"folder {name!r} has no .tar files; make shards with `dstrain pack SOURCE --out {name}`")
        return tars
    if os.path.lexists(path):
        return [str(path)]
    first = next((place for place, part in enumerate(path.parts) if set("*?[") & set(part)), None)
    if first is None:
        hint = "; of braces only ranges such as {000..012} are expanded" if "{" in name else ""
        raise DataError(f"no such shard: {name!r}{hint} (looked in {Path.cwd()})")
    tars = _visible(Path(*path.parts[:first]).glob(str(Path(*path.parts[first:]))))
    if not tars:
        raise DataError(f"no shard matches {name!r} (looked in {Path.cwd()})")
    return tars


def _visible(paths: Iterable[Path]) -> list[str]:
    return sorted(str(path) for path in paths if not path.name.startswith(".") and not path.is_dir())

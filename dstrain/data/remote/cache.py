"""Remote shards on the node's own disk: fetched once for all of its processes, checked, and bounded in size.

    FOLDER/shards/     the shards
    FOLDER/indexes/    NAME.index: a shard's own sidecar, as it was downloaded; NAME.here.index: made here, for lack of
                       one or because the downloaded one does not belong to the shard
    FOLDER/locks/      held by who works on a shard

Names are made of a hash of the URL and its last part; that of a shard holds its digest too, so that versions of a file
never stand for one another.
"""

import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import xxhash

from dstrain.data.remote.bounded import BoundedFolder
from dstrain.data.remote.urls import Unreachable, chunks, masked, read_start, retried, size_of
from dstrain.data.shards.index import SIDECAR, ShardIndex, dump, load
from dstrain.data.shards.scan import scan
from dstrain.errors import DataError
from dstrain.storage import write_atomic

log = logging.getLogger(__name__)

_HERE = ".here" + SIDECAR
_FRESH_S = 30.0  # an index compared with the remote one so recently is not compared again: ranks start together
_MAX_SIDECAR = 1 << 30
_MAX_NAME = 80


class Cache:
    """A folder on the node that holds remote shards, used by all processes of the node at once, of several jobs too.

    limit_bytes: what the shards in it may take together, those on their way included. Indexes do not count: they are
    small, and stay.
    """

    def __init__(self, folder: Path, limit_bytes: int) -> None:
        self.folder = folder
        self._indexes = folder / "indexes"
        self._shards = BoundedFolder(folder / "shards", folder / "locks", limit_bytes)
        with self._disk_errors():
            for path in (folder, self._indexes, self._shards.folder, self._shards.locks):
                path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def open_index(self, url: str) -> ShardIndex:
        """Return the index of a remote shard: from its sidecar at `url` + ".index", else the shard is indexed here.

        Its `path` is where `fetch` puts the shard. Raises DataError if the shard cannot be read or is not a plain tar.
        """
        with self._disk_errors(), self._shards.alone(_name(url)):
            index = self._load(url, _HERE) or self._load(url, SIDECAR)
            if index is None or time.time() - _sidecar_of(index).stat().st_mtime > _FRESH_S:
                index = self._renewed(url)
            return index

    def open_indexes(self, urls: Sequence[str], threads: int = 16) -> list[ShardIndex]:
        """Open the indexes of many remote shards at once, in order; the first error stops it."""
        with ThreadPoolExecutor(threads, "dstrain-indexes") as pool:
            return list(pool.map(self.open_index, urls))

    def fetch(self, index: ShardIndex, url: str) -> Path:
        """Return the path of the shard on this node, downloading it if it is not there.

        Others may evict it before it is opened; then it is to be fetched again. Raises DataError if it cannot be read,
        its bytes are not those of `index`, or there is no room for it.
        """
        if self._shards.has(index.path, index.size):
            return index.path
        with self._disk_errors(), self._shards.alone(_name(url)):
            if not self._shards.has(index.path, index.size):
                with self._shards.part(_name(url), index.size, masked(url)) as part:
                    digest = _download(url, part, index.size, index.digest)
                    if digest != index.digest:
                        raise self._mismatch(index, url, part, digest)
                    self._shards.publish(part, index.path)
        return index.path

    def _load(self, url: str, suffix: str) -> ShardIndex | None:
        sidecar = self._indexes / (_name(url) + suffix)
        index = load(sidecar, sidecar)
        return None if index is None else replace(index, path=self._place(url, index))

    def _renewed(self, url: str) -> ShardIndex:
        """Bring the cached index up to date with the remote shard and its sidecar."""
        copy, here = (self._indexes / (_name(url) + suffix) for suffix in (SIDECAR, _HERE))
        size = retried(lambda: size_of(url))
        limit = _MAX_SIDECAR if size is None else min(_MAX_SIDECAR, size // 2 + (1 << 20))  # far more than any takes
        data = _optional(_sidecar_url(url), limit)
        changed = data is not None and not (copy.exists() and copy.read_bytes() == data)
        if data is None:
            copy.unlink(missing_ok=True)
        elif changed:
            write_atomic(copy, data)
            here.unlink(missing_ok=True)
        own = self._load(url, _HERE)
        own = own if own is not None and own.size == size else None
        if data is not None:
            downloaded = self._load(url, SIDECAR)
            fault = _fault(downloaded, size, changed) or ("as was found before" if own else "")
            if downloaded is not None and not fault:
                return _touched(downloaded)
            log.warning("%s does not belong to %s (%s); indexed here", masked(_sidecar_url(url)), masked(url), fault)
        return self._indexed_here(url, size) if own is None else _touched(own)

    def _indexed_here(self, url: str, size: int | None) -> ShardIndex:
        if size is None:
            raise DataError(
                f"{masked(url)} has no index, and its server does not tell how large it is; make its index where it "
                "was packed (`dstrain index`) and put it beside it"
            )
        log.info("%s has no index that fits; all its %s bytes are fetched to make one", masked(url), f"{size:,}")
        with self._shards.part(_name(url), size, masked(url)) as part:
            if not _download(url, part, size):
                raise DataError(f"{masked(url)} did not send the {size:,} bytes that it has; start again")
            return self._scan(url, part)

    def _scan(self, url: str, part: Path) -> ShardIndex:
        """Index a shard that was just downloaded, and keep both."""
        try:
            with part.open("rb") as file:
                index = scan(part, file.fileno())
        except DataError as error:
            raise DataError(str(error).replace(str(part), masked(url))) from None
        path, sidecar = self._place(url, index), self._indexes / (_name(url) + _HERE)
        write_atomic(sidecar, dump(index))
        self._shards.publish(part, path)
        return load(sidecar, path) or replace(index, path=path)

    def _mismatch(self, index: ShardIndex, url: str, part: Path, digest: str) -> DataError:
        """Explain that a shard is not the one that was indexed, and see to it that the next start indexes it anew."""
        found = f"its xxh3_128 is {digest}, not {index.digest}" if digest else f"it does not have {index.size:,} bytes"
        known = self._load(url, _HERE) or self._load(url, SIDECAR)
        if digest and known is not None and known.digest == index.digest:  # else another job has the right one
            with suppress(DataError):
                self._scan(url, part)
        return DataError(
            f"{masked(url)} is not what its index describes: {found}; if it was made anew, make its index anew too "
            "(`dstrain index`) and put both in place, or start again to have it indexed here"
        )

    def _place(self, url: str, index: ShardIndex) -> Path:
        return self._shards.folder / _name(url, index.digest)

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"the cache for remote shards in {self.folder} cannot be used ({error.strerror}); make room there, or "
                "set data.cache_dir to another folder on this node"
            ) from error


def _download(url: str, part: Path, size: int, digest: str = "") -> str:
    """Write a remote file over `part`; returns its xxh3_128, or "" if it does not have `size` bytes.

    Network errors are tried again; so is, once, a transfer that gives another size or `digest`.
    """
    got = ""
    for _ in range(2):
        got = retried(lambda: _receive(url, part, size))
        if got and got == (digest or got):
            break
    return got


def _receive(url: str, part: Path, size: int) -> str:
    digest, count = xxhash.xxh3_128(), 0
    with part.open("r+b") as file, closing(chunks(url)) as stream:
        for chunk in stream:
            count += len(chunk)
            if count > size:
                break
            digest.update(chunk)
            file.write(chunk)
    return digest.hexdigest() if count == size else ""


def _optional(url: str, limit: int) -> bytes | None:
    try:
        return retried(lambda: read_start(url, limit))
    except Unreachable as error:
        if error.missing:
            return None
        raise


def _fault(index: ShardIndex | None, size: int | None, check: bool) -> str:
    """Say why a downloaded sidecar is not used; "" if nothing speaks against it. `check` looks at all of it."""
    if index is None:
        return "it is damaged or of another version"
    if size is not None and index.size != size:
        return f"it describes a tar of {index.size:,} bytes, not {size:,}"
    try:
        if check:
            assert len(index.rows) == index.samples
    except DataError as error:
        return str(error)
    return ""


def _sidecar_of(index: ShardIndex) -> Path:
    assert isinstance(index.source, Path)
    return index.source


def _touched(index: ShardIndex) -> ShardIndex:
    """Note that an index is what the remote shard has now."""
    os.utime(_sidecar_of(index))
    return index


def _sidecar_url(url: str) -> str:
    path, mark, query = url.partition("?" if url.startswith("http") else "\0")
    return path + SIDECAR + mark + query


def _name(url: str, digest: str = "") -> str:
    base = re.sub(r"[^A-Za-z0-9._-]", "_", url.partition("?")[0].rpartition("/")[2])[-_MAX_NAME:]
    return "-".join(filter(None, (sha256(url.encode()).hexdigest()[:16], digest, base)))

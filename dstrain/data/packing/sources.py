"""What there is to pack: a table of pictures and captions, a folder of pictures, or tars that are to be cut anew."""

import glob
import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from dstrain.data.packing.items import FileItem, Item, TarItem
from dstrain.data.packing.tables import NAMES, read_table
from dstrain.data.reader import ShardReader
from dstrain.data.reasons import Reason
from dstrain.data.shards.arrays import MAX_COLUMNS
from dstrain.data.shards.catalog import find_shards, open_indexes
from dstrain.data.shards.index import ShardIndex
from dstrain.data.shards.names import IMAGE_KINDS, UNREAD_IMAGE_KINDS, UNREAD_VIDEO_KINDS, VIDEO_KINDS
from dstrain.errors import DataError

_PACKED_KINDS = frozenset((*IMAGE_KINDS, "jfif", *VIDEO_KINDS))  # .jfif is how some browsers save a JPEG
_BATCH = 256  # items that are looked at in one go


class Items(Protocol):
    """Items by number."""

    def __len__(self) -> int: ...
    def __getitem__(self, place: int, /) -> Item: ...


@dataclass(frozen=True)
class Listing:
    """What is packed: the items in order, and a digest of their names, sizes, captions and columns."""

    items: Items
    digest: str


def find_items(
    source: str | Path,
    *,
    columns: Sequence[str] | None = None,
    base: Path | None = None,
    workers: int = 1,
    progress: bool = False,
) -> Listing:
    """List what is to be packed, in a fixed order. No picture is opened yet.

    A table (.csv, .json, .jsonl), or a folder with a `metadata` table: its rows; see `read_table` for `columns`, and
    `base`, which is the table's own folder unless given.
    A folder: all its pictures (png, jpg, jpeg, jfif, webp) and videos at any depth, by name, with NAME.txt beside
    NAME.png. Hidden files and folders are passed over; files of other picture and video formats, and links to folders,
    are items with a fault, so that they are reported.
    A tar, a folder of tars that has no pictures of its own, or a glob of tars: the samples of their indexes.
    Raises DataError if there is nothing, or it cannot be read.
    """
    path = Path(source).expanduser()
    table = _table_of(path)
    if table is None and (columns is not None or base is not None):
        raise DataError(f"{source} is not a table; file columns and a base folder belong to .csv, .json and .jsonl")
    if "://" in str(source):
        raise DataError(f"{source} is not on this machine; copy it to a local or mounted folder, and pack that")
    if table is not None:
        root = table.parent if base is None else base.expanduser()
        if not root.is_dir():
            raise DataError(f"no such folder: {root}; give the one that the paths of {table} are relative to")
        return _files(read_table(table, root.resolve(), columns), workers, progress)
    if path.is_file():
        return _tars([str(path)], workers, progress)
    if path.is_dir():
        items = _folder(path.resolve())
        readable = any(item.fault is None or item.fault[0] is Reason.NO_CAPTION for item in items)
        if not readable and any(path.glob("*.tar")):
            return _tars([str(path)], workers, progress)
        if not items:
            kinds = ", ".join((*IMAGE_KINDS, *VIDEO_KINDS))
            raise DataError(f"{source} has no pictures or videos ({kinds}), no table and no tars; give their folder")
        return _files(items, workers, progress)
    if glob.has_magic(str(path)) or "{" in str(path):
        return _tars([str(path)], workers, progress)
    raise DataError(
        f"no such source: {source}; give a folder of pictures with .txt captions, a metadata table, or tar shards"
    )


def _table_of(path: Path) -> Path | None:
    if path.is_file():
        return None if path.suffix.lower() == ".tar" else path
    tables = [path / name for name in NAMES if (path / name).is_file()]
    if len(tables) > 1:
        raise DataError(f"{path} has several tables ({', '.join(t.name for t in tables)}); name the one to pack")
    return tables[0] if tables else None


def _files(items: list[FileItem], workers: int, progress: bool) -> Listing:
    batches = [items[first : first + _BATCH] for first in range(0, len(items), _BATCH)]
    surveyed: list[FileItem] = []
    bar = tqdm(total=len(items), desc="listing", unit="sample", leave=False, disable=None if progress else True)
    with bar, ThreadPoolExecutor(workers) as pool:  # what takes long is a network file system
        for batch in pool.map(lambda batch: [item.surveyed() for item in batch], batches):
            surveyed += batch
            bar.update(len(batch))
    digest = hashlib.sha256()
    for item in surveyed:
        caption = item.caption.decode(errors="backslashreplace") if isinstance(item.caption, bytes) else item.caption
        try:
            digest.update(json.dumps([item.name, item.files, item.size, caption, item.fields, item.fault]).encode())
        except RecursionError as error:
            raise DataError(f"{item.name}: its values are nested too deeply") from error
    return Listing(surveyed, digest.hexdigest())


def _folder(root: Path) -> list[FileItem]:
    """List the pictures and videos below `root` by name, and what is like them and not read."""
    media: dict[str, tuple[Reason, str] | None] = {}  # by path relative to root
    captions: dict[str, str] = {}  # path without its extension -> path
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(root / folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    name = folder + entry.name
                    stem, _, kind = name.rpartition(".")
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(name + "/")
                    elif entry.is_symlink() and (root / name).is_dir():
                        media[name] = (Reason.UNSAFE_NAME, "links to folders are not followed; copy or mount it")
                    elif kind.lower() == "txt":
                        captions[stem] = max(name, captions.get(stem, ""))  # rather .txt than .TXT
                    elif fault := _fault(kind.lower()):
                        media[name] = fault
                    elif kind.lower() in _PACKED_KINDS:
                        media[name] = None
        except OSError as error:
            raise DataError(f"folder {root / folder} cannot be read: {error.strerror}; nothing was packed") from error
    items = []
    for name, fault in sorted(media.items()):
        stem = name.rpartition(".")[0]
        if fault is None and stem not in captions:
            fault = (Reason.NO_CAPTION, f"there is no {stem}.txt beside it")
        column = "video" if name.rpartition(".")[2].lower() in VIDEO_KINDS else "image"
        items.append(FileItem(name, root, ((column, name),), caption_file=captions.get(stem, ""), fault=fault))
    return items


def _fault(kind: str) -> tuple[Reason, str] | None:
    if kind in UNREAD_IMAGE_KINDS:
        return Reason.IMAGE_FORMAT, f"{kind} is not read; convert it to png, jpg or webp"
    if kind in UNREAD_VIDEO_KINDS:
        return Reason.VIDEO_FORMAT, f"{kind} is not read; convert it to mp4, mov, webm or mkv"
    return None


def _tars(entries: Sequence[str], workers: int, progress: bool) -> Listing:
    indexes = open_indexes([Path(shard) for shard in find_shards(entries)], workers=workers, progress=progress)
    items = _Rows(indexes)
    if not len(items):
        raise DataError(f"{', '.join(entries)}: the tars hold no samples")
    columns = {column for index in indexes for column in index.columns}
    if len(columns) > MAX_COLUMNS:
        raise DataError(
            f"{', '.join(entries)}: {len(columns)} kinds of members, more than the {MAX_COLUMNS} of a shard; dots in "
            "names begin an extension, so pack the files themselves"
        )
    return Listing(items, hashlib.sha256("".join(index.digest for index in indexes).encode()).hexdigest())


class _Rows:
    """The rows of all indexes in order, those of each followed by the samples that it leaves out."""

    def __init__(self, indexes: Sequence[ShardIndex]) -> None:
        self._indexes = indexes
        self._ends = list(accumulate(index.samples + sum(index.excluded_counts.values()) for index in indexes))
        self._reader = ShardReader()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, place: int) -> TarItem:
        shard = bisect_right(self._ends, place)
        first = self._ends[shard - 1] if shard else 0
        return TarItem(self._indexes[shard], place - first, self._reader)

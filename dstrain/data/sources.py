"""What there is to pack: a folder of pictures with captions beside them, or a table of pictures and captions."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dstrain.data.captions import MAX_CAPTION_BYTES, caption_of, clean
from dstrain.data.probe import MAX_IMAGE_BYTES
from dstrain.data.reasons import BadSample, Reason
from dstrain.data.shards import IMAGE_KINDS
from dstrain.errors import DataError

TABLES = ("metadata.csv", "metadata.json", "metadata.jsonl")
_IMAGE_COLUMNS = ("image", "file_name")
_CAPTION_COLUMNS = ("prompt", "caption", "text")


@dataclass(frozen=True)
class Item:
    """One picture to pack: its name for reports, its file, and its caption (None: in the .txt file beside it)."""

    name: str
    base: Path
    image: str  # relative to base
    caption: Any = None

    def read(self) -> tuple[bytes, str]:
        """Return the bytes of the picture and the caption; raises BadSample."""
        image = self._bytes(self.image, MAX_IMAGE_BYTES)
        if self.caption is None:
            beside = str(Path(self.image).with_suffix(".txt"))
            if not (self.base / beside).exists():
                raise BadSample(Reason.NO_CAPTION, f"there is no {beside} beside it")
            return image, caption_of(self._bytes(beside, MAX_CAPTION_BYTES), "txt")
        if not isinstance(self.caption, str):
            raise BadSample(Reason.NO_CAPTION, f"the caption is {self.caption!r:.40}, not text")
        return image, clean(self.caption)

    def _bytes(self, name: str, limit: int) -> bytes:
        """Read a file of the source, of which more than `limit` bytes will be refused.

        It must lie inside the base folder, also after links are followed.
        """
        if not name or "\0" in name:
            raise BadSample(Reason.MISSING_FILE, "no file is named")
        path = (self.base / name).resolve()
        if not path.is_relative_to(self.base.resolve()):
            raise BadSample(Reason.UNSAFE_NAME, f"{name} lies outside {self.base}")
        try:
            if path.is_file():
                with path.open("rb") as f:
                    return f.read(limit + 1)
        except OSError as error:
            raise BadSample(Reason.MISSING_FILE, f"{name} cannot be read: {error.strerror}") from error
        raise BadSample(Reason.MISSING_FILE, f"there is no file {name}")


def find_items(source: Path) -> list[Item]:
    """List what is to be packed, in a fixed order.

    A folder: its `metadata.csv`, `.json` or `.jsonl` if there is one, else all its pictures (png, jpg, webp) at any
    depth, by name. A table file: its rows, with a column `image` relative to the table's folder, and `prompt`,
    `caption` or `text`. Raises DataError if there is nothing, or the table cannot be read.
    """
    if source.is_file():
        return _table(source)
    if not source.is_dir():
        raise DataError(f"no such source: {source}; give a folder of pictures with .txt captions, or a metadata table")
    tables = [source / name for name in TABLES if (source / name).is_file()]
    if len(tables) > 1:
        raise DataError(f"{source} has several tables ({', '.join(t.name for t in tables)}); name the one to pack")
    if tables:
        return _table(tables[0])
    names = sorted(
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.suffix[1:].lower() in IMAGE_KINDS and not path.name.startswith(".")
    )
    if not names:
        raise DataError(f"{source} has no pictures (png, jpg, jpeg, webp); give the folder that holds them")
    return [Item(name, source, name) for name in names]


def _table(path: Path) -> list[Item]:
    readers = {".csv": _csv, ".json": _json, ".jsonl": _jsonl}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path} is not a table that can be read; give .csv, .json or .jsonl, or a folder of pictures")
    try:
        rows = list(readers[path.suffix.lower()](path))
    except (ValueError, csv.Error, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(f"{path} cannot be read as {path.suffix[1:]}: {error}") from error
    if not rows:
        raise DataError(f"{path} has no rows")
    return [_item(path, number, row) for number, row in enumerate(rows)]


def _item(path: Path, number: int, row: Any) -> Item:
    if not isinstance(row, dict):
        raise DataError(f"{path}, row {number}: {row!r:.40} is not a record with named columns")
    image = next((row[column] for column in _IMAGE_COLUMNS if column in row), None)
    caption = next((row[column] for column in _CAPTION_COLUMNS if column in row), None)
    if image is None or not any(column in row for column in _CAPTION_COLUMNS):
        wanted = f"{' or '.join(_IMAGE_COLUMNS)}, and {' or '.join(_CAPTION_COLUMNS)}"
        raise DataError(f"{path}, row {number}: the columns are {', '.join(map(str, row))}; needed are {wanted}")
    name = image if isinstance(image, str) else ""
    return Item(f"row {number}: {name}", path.parent, name, "" if caption is None else caption)


def _csv(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig", newline="") as f:
        yield from csv.DictReader(f, strict=True)


def _json(path: Path) -> Iterator[Any]:
    value = json.loads(path.read_text(encoding="utf-8-sig"))
    if not isinstance(value, list):
        raise ValueError("the file must be a list of records")
    yield from value


def _jsonl(path: Path) -> Iterator[Any]:
    with path.open(encoding="utf-8-sig") as f:
        for line in f:
            if line.strip():
                yield json.loads(line)

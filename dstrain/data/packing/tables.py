"""DiffSynth's tables of pictures, videos and captions: metadata.csv, .json and .jsonl.

Columns are files, the caption, or further values that are kept with it. A file column holds a path or (json, jsonl) a
list of paths; blank means that the sample has none of it.
"""

import csv
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from dstrain.data.media.captions import is_blank
from dstrain.data.packing.items import FileItem
from dstrain.data.reasons import Reason
from dstrain.data.shards.arrays import MAX_COLUMNS
from dstrain.data.shards.names import IMAGE_KINDS, VIDEO_KINDS
from dstrain.errors import DataError, did_you_mean

NAMES = ("metadata.csv", "metadata.json", "metadata.jsonl")
_MAIN_COLUMNS = ("image", "file_name", "video")
_FILE_ENDINGS = ("_image", "_images", "_video", "_videos", "_mask")
_CAPTION_COLUMNS = ("prompt", "caption", "text")
_SHADOWED = "caption_column"  # where a column "caption" is kept when "prompt" is the caption
MAX_FILE_COLUMNS = MAX_COLUMNS - 2  # beside txt and json
_LABEL = re.compile(r"(?=.{1,40}$)[a-z0-9_-]+(\.[a-z0-9_-]+)*")  # what fits into a member's name
_TAKEN = frozenset(("txt", "json", *IMAGE_KINDS, *VIDEO_KINDS))

csv.field_size_limit(1 << 24)  # what is longer than a caption may be is its row's fault, not the table's

Row = tuple[str, dict[Any, Any]]  # where it stands, and its values by column


def read_table(path: Path, base: Path, columns: Sequence[str] | None) -> list[FileItem]:
    """List the rows of a table; `columns` names the file columns, else `image`, `video`, `edit_image` and such are it.

    `base` is the folder that paths are relative to. Raises DataError if the table cannot be read, or lacks a file
    column or a caption column. What is wrong with a single row is that item's fault. When "prompt" is the caption, a
    column "caption" is kept as "caption_column".
    """
    readers = {".csv": _csv, ".json": _json, ".jsonl": _jsonl}
    kind = path.suffix.lower()
    if kind not in readers:
        raise DataError(
            f"{path} is not a table that can be read; give .csv, .json or .jsonl, a .tar, or a folder of pictures"
        )
    try:
        rows = list(readers[kind](path))
    except (ValueError, csv.Error, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise DataError(f"{path} cannot be read as {kind[1:]}: {error}") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if not rows:
        raise DataError(f"{path} has no rows")
    for place, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{path}, {place}: {row!r:.40} is not a record with named columns")
    present = list(dict.fromkeys(column for _, row in rows for column in row if column is not None))
    labels = _labels(path, present, columns)
    if not any(column in present for column in _CAPTION_COLUMNS):
        raise _lacking(path, present, " or ".join(_CAPTION_COLUMNS))
    items = [_item(base, place, row, labels) for place, row in rows]
    named = {column for item in items for column, _ in item.files}
    if len(named) > MAX_FILE_COLUMNS:
        raise DataError(
            f"{path} has {len(named)} files a sample with its lists; an index has {MAX_FILE_COLUMNS} columns"
        )
    return items


def _labels(path: Path, present: list[str], columns: Sequence[str] | None) -> dict[str, str]:
    """Return the file columns in order, the main ones first, each with the column that it becomes."""
    if columns is None:
        main = [column for column in _MAIN_COLUMNS if column in present]
        if "image" in main and "file_name" in main:
            main.remove("file_name")
        chosen = main + [column for column in present if column.endswith(_FILE_ENDINGS)]
    else:
        chosen = list(columns)
        for column in chosen:
            if column not in present:
                raise DataError(
                    f"{path} has no column {column!r}{did_you_mean(column, present)}; it has {', '.join(present)}"
                )
    if not chosen:
        raise _lacking(path, present, "image, file_name, video, or file columns that are named with --columns")
    labels = {column: "image" if column == "file_name" else column.lower() for column in chosen}
    for column, label in labels.items():
        if not _LABEL.fullmatch(label) or label in _TAKEN or list(labels.values()).count(label) > 1:
            raise DataError(
                f"{path}: {column!r} cannot name a file column; rename it to at most 40 letters, digits, _, - and dots "
                "that neither another file column nor an extension has"
            )
    return labels


def _lacking(path: Path, present: list[str], needed: str) -> DataError:
    return DataError(f"{path}: the columns are {', '.join(present)}; needed is one of {needed}")


def _item(base: Path, place: str, row: dict[Any, Any], labels: dict[str, str]) -> FileItem:
    files: list[tuple[str, str]] = []
    fault: tuple[Reason, str] | None = None
    if None in row:
        fault = (Reason.AMBIGUOUS, "the row has more cells than the table has columns: quote a cell that has commas")
    for column, label in labels.items():
        cell = row.get(column)
        named = [(f"{label}.{n}", path) for n, path in enumerate(cell)] if isinstance(cell, list) else [(label, cell)]
        for name, path in named:
            if path is None or (isinstance(path, str) and is_blank(path)):
                continue
            if isinstance(path, str):
                files.append((name, path))
            elif fault is None:
                fault = (Reason.MISSING_FILE, f"{name} is {path!r:.40}, not a path")
    if not files and fault is None:
        fault = (Reason.MISSING_FILE, f"no file is named under {', '.join(labels)}")
    caption = next((column for column in _CAPTION_COLUMNS if column in row), "")
    if not caption and fault is None:
        fault = (Reason.NO_CAPTION, f"it has none of {', '.join(_CAPTION_COLUMNS)}")
    # pandas writes the numbers of rows in a column without a name
    fields = {column: row[column] for column in row if column and column != caption and column not in labels}
    if "caption" in fields:
        fields[_SHADOWED] = fields.pop("caption")
    name = f"{place}: {files[0][1]}" if files else place
    return FileItem(name, base, tuple(files), row.get(caption), fields=fields, fault=fault)


def _csv(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as f:
        reader = csv.DictReader(f, strict=True)
        try:
            columns = reader.fieldnames or []
            twice = sorted({column for column in columns if columns.count(column) > 1})
            if twice:
                raise ValueError(f"it has several columns {', '.join(map(repr, twice))}")
            for row in reader:
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise ValueError(f"the row after line {reader.line_num}: {error}") from error


def _json(path: Path) -> Iterable[Row]:
    value = json.loads(path.read_text(encoding="utf-8-sig"), parse_constant=_blank_number)
    if not isinstance(value, list):
        raise ValueError("the file must be a list of records")
    return ((f"record {number}", row) for number, row in enumerate(value, 1))


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="\n") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line, parse_constant=_blank_number)
                except json.JSONDecodeError as error:
                    raise ValueError(f"line {number}, character {error.pos + 1}: {error.msg}") from error
                except (ValueError, RecursionError) as error:  # numbers of thousands of digits; nested too deeply
                    raise ValueError(f"line {number}: {error}") from error


def _blank_number(_: str) -> None:
    """pandas writes a blank cell as NaN, which is not JSON."""

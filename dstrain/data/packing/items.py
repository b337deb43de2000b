"""One thing to pack: where its files and captions are, and how they are read. Nothing outside the source is opened."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dstrain.data.media.captions import MAX_CAPTION_BYTES, captions_of, clean_all
from dstrain.data.media.containers import MAX_VIDEO_BYTES
from dstrain.data.media.probe import MAX_IMAGE_BYTES
from dstrain.data.reader import ShardReader
from dstrain.data.reasons import BadSample, Reason
from dstrain.data.shards.index import ShardIndex
from dstrain.data.shards.names import VIDEO_KINDS, Content

_MAX_OPAQUE_BYTES = 1 << 30  # of a member of a tar that is neither picture, video nor text


@dataclass(frozen=True, slots=True)
class Piece:
    """What becomes one member. For pictures and videos `column` is without the extension, for others it is that."""

    column: str
    content: Content
    data: bytes


class Item(Protocol):
    """A sample to be."""

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def size(self) -> int:
        """About how many bytes `read` will return."""

    def read(self) -> tuple[str, list[Piece]]:
        """Return a label for the key, and the parts in order; raises BadSample."""


@dataclass(frozen=True, slots=True)
class FileItem:
    """Files below a folder, and a caption: text, a list of texts, or the content of a .txt file as bytes."""

    name: str
    base: Path  # without links
    files: tuple[tuple[str, str], ...]  # (column, path relative to base); the first gives the key its label
    caption: Any = None
    caption_file: str = ""  # relative to base; `surveyed` reads it into `caption`
    fields: Mapping[str, Any] = field(default_factory=dict)  # further values, kept with the caption
    fault: tuple[Reason, str] | None = None  # known before anything is read
    size: int = 0

    def surveyed(self) -> "FileItem":
        """Return the item with its size, and with the caption that was in a file."""
        caption, fault = self.caption, self.fault
        if self.caption_file and fault is None:
            try:
                caption = self._bytes(self.caption_file, MAX_CAPTION_BYTES)
            except BadSample as error:
                fault = (error.reason, str(error))
        return replace(self, caption=caption, fault=fault, size=sum(self._size(path) for _, path in self.files))

    def read(self) -> tuple[str, list[Piece]]:
        """Return the main file's name and the parts, the caption last; raises BadSample."""
        if self.fault is not None:
            raise BadSample(*self.fault)
        parts = []
        for column, path in self.files:
            content = Content.VIDEO if path.rpartition(".")[2].lower() in VIDEO_KINDS else Content.IMAGE
            parts.append(Piece(column, content, self._bytes(path, _limit(content))))
        return self._label(), [*parts, self._caption()]

    def _label(self) -> str:
        main = Path(self.files[0][1])
        if main.is_absolute():
            main = main.relative_to(self.base) if main.is_relative_to(self.base) else Path(main.name)
        return main.with_suffix("").as_posix()

    def _caption(self) -> Piece:
        texts = _texts(self.caption)
        if len(texts) == 1 and not self.fields:
            return Piece("txt", Content.TXT, texts[0].encode())
        record = {**self.fields, "caption": texts[0] if len(texts) == 1 else texts}
        try:
            data = json.dumps(record, sort_keys=True, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError) as error:
            raise BadSample(Reason.CAPTION_ENCODING, f"its columns cannot be written as JSON: {error}") from error
        if len(data) > MAX_CAPTION_BYTES:
            raise BadSample(
                Reason.CAPTION_TOO_LONG, f"{len(data)} bytes of captions and columns, more than {MAX_CAPTION_BYTES}"
            )
        return Piece("json", Content.JSON, data)

    def _size(self, path: str) -> int:
        try:
            return (self.base / path).stat().st_size
        except (OSError, ValueError):  # `read` says what is wrong
            return 0

    def _bytes(self, name: str, limit: int) -> bytes:
        """Read a file of the source, of which more than `limit` bytes will be refused.

        It must lie inside the base folder, also after links are followed.
        """
        if "\0" in name:
            raise BadSample(Reason.MISSING_FILE, "a file name with a NUL character")
        try:
            path = (self.base / name).resolve()
            if not path.is_relative_to(self.base):
                raise BadSample(Reason.UNSAFE_NAME, f"{name} lies outside {self.base}")
            if path.is_file():
                with path.open("rb") as f:
                    return f.read(min(limit, os.fstat(f.fileno()).st_size) + 1)
        except (OSError, RuntimeError) as error:  # RuntimeError: links that lead in a circle
            why = error.strerror if isinstance(error, OSError) else "its links lead in a circle"
            raise BadSample(Reason.MISSING_FILE, f"{name} cannot be read: {why}") from error
        raise BadSample(Reason.MISSING_FILE, f"there is no file {name}")


@dataclass(frozen=True, slots=True)
class TarItem:
    """A row of a shard's index, or (past the last row) one of the samples that the index leaves out."""

    index: ShardIndex
    row: int
    reader: ShardReader

    @property
    def name(self) -> str:
        """The shard and the key."""
        index = self.index
        key = index.keys[self.row] if self.row < index.samples else index.excluded[self.row - index.samples].key
        return f"{index.path}: {key}"

    @property
    def size(self) -> int:
        """The bytes of its members."""
        return int(self._parts()["size"].sum()) if self.row < self.index.samples else 0

    def read(self) -> tuple[str, list[Piece]]:
        """Return the key and the members; raises BadSample, and DataError if the shard cannot be read."""
        if self.row >= self.index.samples:
            entry = self.index.excluded[self.row - self.index.samples]
            raise BadSample(entry.reason, entry.detail)
        parts = []
        for part in self._parts():
            column, content, size = self.index.columns[part["column"]], Content(part["kind"]), int(part["size"])
            if size > _limit(content):
                raise BadSample(Reason.NOT_A_FILE, f"{column} has {size} bytes, more than {_limit(content)}")
            data = self.reader.read(self.index.path, int(part["offset"]), size, int(part["digest"]))
            parts.append(Piece(column, content, data))
        return self.index.keys[self.row], parts

    def _parts(self) -> np.ndarray:
        row = self.index.rows[self.row]
        return self.index.parts[row["first"] : row["first"] + row["count"]]


def _texts(caption: Any) -> list[str]:
    if isinstance(caption, bytes):
        return captions_of(caption, "txt")
    texts = caption if isinstance(caption, list) else ["" if caption is None else caption]
    if not all(isinstance(text, str) for text in texts):
        raise BadSample(Reason.NO_CAPTION, f"the caption is {caption!r:.40}, not text")
    return clean_all(texts)


def _limit(content: Content) -> int:
    return {Content.IMAGE: MAX_IMAGE_BYTES, Content.VIDEO: MAX_VIDEO_BYTES}.get(content, _MAX_OPAQUE_BYTES)

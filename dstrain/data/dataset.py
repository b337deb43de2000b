"""The rows of all shards together: their sizes for the planner, their bytes for the loader."""

import hashlib
import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dstrain.data.captions import CAPTION_KINDS, caption_of
from dstrain.data.decode import MULTIPLE, target_sizes
from dstrain.data.keys import KeyTable
from dstrain.data.reasons import BadSample, Reason, ranked
from dstrain.data.shards import Excluded, ShardIndex, find_shards, open_index
from dstrain.data.tar import read_at
from dstrain.errors import ConfigError, DataError

_MIN_MAX_PIXELS = MULTIPLE * MULTIPLE
_MAX_TEXT_TOKENS = 1024  # where text encoders cut


class Dataset:
    """Every usable sample of the shards, numbered by row: shards in order, samples as they lie in the tar.

    keys: n strings; image_tokens, caption_bytes, tokens: int64 [n]. `tokens` is what a row costs a pack: one token for
    each 16 x 16 pixels, and an estimate of three bytes a text token with 8 for the template.
    excluded: the samples left out, each with a reason. digest: hex SHA-256 of which samples these are.
    """

    def __init__(self, indexes: Sequence[ShardIndex], max_pixels: int) -> None:
        rows = np.concatenate([index.rows for index in indexes])
        shard = np.repeat(np.arange(len(indexes)), [len(index.rows) for index in indexes])
        keys = KeyTable.concatenate([index.keys for index in indexes])
        widths, heights = target_sizes(rows["width"], rows["height"], max_pixels)
        usable = (widths > 0) & (heights > 0)
        self.max_pixels = max_pixels
        self.shards = [index.path for index in indexes]
        self.excluded = [entry for index in indexes for entry in index.excluded]
        for row in np.flatnonzero(~usable).tolist():
            size = f"{rows['width'][row]} x {rows['height'][row]} pixels, a side under {MULTIPLE} when scaled"
            self.excluded.append(
                Excluded(str(self.shards[shard[row]]), keys[row], Reason.IMAGE_TOO_SMALL, size),
            )
        self.keys = keys if usable.all() else KeyTable.of(keys[row] for row in np.flatnonzero(usable).tolist())
        self._rows, self._shard = rows[usable], shard[usable]
        self._widths, self._heights = widths[usable], heights[usable]
        self.image_tokens = self._widths // MULTIPLE * (self._heights // MULTIPLE)
        self.caption_bytes = self._rows["caption_bytes"].astype(np.int64)
        self.tokens = self.image_tokens + np.minimum(self.caption_bytes // 3, _MAX_TEXT_TOKENS) + 8
        self.digest = self._digest([(index.path.name, index.size) for index in indexes])

    def __len__(self) -> int:
        return len(self._rows)

    def image_size(self, row: int) -> tuple[int, int]:
        """Return (width, height) in pixels that the picture is decoded to."""
        return int(self._widths[row]), int(self._heights[row])

    def shard(self, row: int) -> Path:
        """Return the path of the shard that holds the row."""
        return self.shards[self._shard[row]]

    def read(self, row: int) -> tuple[bytes, str]:
        """Read one sample: the bytes of its picture, and its caption. Safe to call from several threads.

        Raises BadSample if the bytes are not those that were indexed, DataError if the shard cannot be read.
        """
        entry, path = self._rows[row], self.shard(row)
        try:
            fd = os.open(path, os.O_RDONLY)
            try:
                image = read_at(fd, int(entry["image_size"]), int(entry["image_offset"]))
                caption = read_at(fd, int(entry["caption_size"]), int(entry["caption_offset"]))
            finally:
                os.close(fd)
        except OSError as error:
            raise DataError(f"shard {path} cannot be read any more: {error.strerror}") from error
        if zlib.crc32(image) != entry["image_crc"] or zlib.crc32(caption) != entry["caption_crc"]:
            raise BadSample(Reason.CHANGED, "the bytes in the shard are not those that were indexed")
        return image, caption_of(caption, CAPTION_KINDS[entry["caption_kind"]])

    def summary(self) -> str:
        """Describe the dataset in one line for a log: samples, sizes, tokens, and what was left out."""
        pixels = self._widths * self._heights
        left_out = f"; left out {len(self.excluded)}: {_reasons(self.excluded)}" if self.excluded else ""
        return (
            f"{len(self)} samples in {len(self.shards)} shards, "
            f"{pixels.min() / 1e6:.3g} to {pixels.max() / 1e6:.3g} Mpixels, "
            f"{self.tokens.min()} to {self.tokens.max()} tokens (mean {self.tokens.mean():.0f}){left_out}"
        )

    def _digest(self, shards: list[tuple[str, int]]) -> str:
        digest = hashlib.sha256(json.dumps(["dstrain dataset 1", shards]).encode())
        for part in (self.keys.ends, self._rows["image_crc"], self._rows["caption_crc"]):
            digest.update(np.ascontiguousarray(part).tobytes())
        digest.update(self.keys.blob)
        return digest.hexdigest()


def open_dataset(shards: Sequence[str], *, max_pixels: int) -> Dataset:
    """Open tar files, folders of tar files and globs as one dataset, making the indexes that are missing.

    Pictures over `max_pixels` are scaled down when they are decoded. Raises DataError if an entry names nothing, a
    shard is not a plain tar, or no sample can be used; ConfigError for a limit under one token.
    """
    if max_pixels < _MIN_MAX_PIXELS:
        raise ConfigError(f"max_pixels = {max_pixels} is less than one token; give at least {_MIN_MAX_PIXELS}")
    indexes = [open_index(path) for path in find_shards(shards)]
    dataset = Dataset(indexes, max_pixels)
    if not len(dataset):
        reasons = f" (left out: {_reasons(dataset.excluded)})" if dataset.excluded else ""
        raise DataError(
            f"no sample can be used in {len(indexes)} shards, the first being {indexes[0].path}{reasons}; "
            "a sample is a picture (png, jpg, webp) and a caption (txt, json) with one key"
        )
    return dataset


def _reasons(excluded: Sequence[Excluded]) -> str:
    return ranked(entry.reason for entry in excluded)

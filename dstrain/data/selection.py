"""Which samples of a shard a training can use, and the size of each: from the index alone."""

from dataclasses import dataclass, field

import numpy as np

from dstrain.data.media.resolution import MULTIPLE, Resolution
from dstrain.data.media.video import clip_frames
from dstrain.data.reasons import Reason
from dstrain.data.shards.arrays import ColumnStats
from dstrain.data.shards.index import Excluded, ShardIndex
from dstrain.data.shards.keys import KeyTable
from dstrain.data.shards.names import ENCODED, Content
from dstrain.errors import ConfigError

_MAX_TEXT_TOKENS = 1024  # where text encoders cut
_TEMPLATE_TOKENS = 8  # around a prompt
_BYTES_A_TOKEN = 3


@dataclass(frozen=True)
class Clip:
    """How videos are cut: at most `frames` frames (4k + 1), taken at `fps` frames a second (0: as stored)."""

    frames: int = 1
    fps: float = 0.0

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames % 4 != 1:
            raise ConfigError(
                f"frames = {self.frames} is not of the form 4 k + 1, which the VAE takes; give 1, 5, 9, ..."
            )


@dataclass(frozen=True)
class Selected:
    """The usable samples of one shard: n rows, C columns."""

    keys: KeyTable
    places: np.ndarray  # [n] row of the shard's index
    parts: np.ndarray  # [n, C] PART
    captions: np.ndarray  # [n] PART; [0] if no captions are wanted
    widths: np.ndarray  # [n, C] pixels, as trained
    heights: np.ndarray  # [n, C]
    frames: np.ndarray  # [n, C]
    tokens: np.ndarray  # [n]

    def __len__(self) -> int:
        return len(self.places)


@dataclass(frozen=True)
class Wanted:
    """What a sample must have: all `columns` ("image", "video", "edit_image" ...) in sizes that can be used, a caption.

    A column with "video" in its name is a video, "encoded.safetensors" (which stands alone) what encoders made of a
    sample, any other a picture. Encoded samples are taken in the size that they have.

    Its tokens, which it costs a pack, are one for each 16 x 16 pixels (of the first frame and every fourth after it),
    and an estimate of the text's: one for three bytes, at most 1,024, and 8 for the template.
    """

    resolution: Resolution = field(default_factory=Resolution)
    columns: tuple[str, ...] = ("image",)
    captioned: bool = True
    clip: Clip = field(default_factory=Clip)

    def takes_all(self, index: ShardIndex) -> bool:
        """Whether the index's totals prove that every row can be used; False where that needs a look at each."""
        if not set(self.columns) <= {"image", "video", ENCODED}:  # others may hold pictures and videos
            return False
        return (not self.captioned or index.captioned == index.samples) and all(
            column in index.stats
            and index.stats[column].rows == index.samples
            and self._all_fit(column, index.stats[column])
            for column in self.columns
        )

    def _all_fit(self, column: str, s: ColumnStats) -> bool:
        r = self.resolution
        if column == ENCODED:
            return not r.width and s.max_pixels <= r.max_pixels and s.max_frames <= self.clip.frames
        return r.takes_all(s.min_side, s.min_pixels, s.max_pixels)

    def most_tokens(self, index: ShardIndex) -> int:
        """Return a bound on the tokens of the index's rows."""
        stats = [index.stats[column] for column in self.columns if column in index.stats]
        pixels = [
            self.resolution.most_pixels(s.max_pixels) * int(_latent_frames(self._most_frames(s.max_frames)))
            for s in stats
        ]
        return sum(pixels) // MULTIPLE**2 + int(self._text_tokens(index.max_caption_bytes))

    def _most_frames(self, stored: int) -> int:
        """Bound the frames of a clip; resampling may make more than are stored."""
        return self.clip.frames if self.clip.fps and stored > 1 else min(stored, self.clip.frames)

    def select(self, index: ShardIndex) -> Selected:
        """Return the usable rows of an index; the result holds no part of the index's file."""
        parts, widths, heights, frames, usable = self._look(index)
        places = np.flatnonzero(usable)
        parts, widths, heights, frames = parts[places], widths[places], heights[places], frames[places]
        rows = index.rows[places]
        captions = index.parts[rows["caption"]] if self.captioned else index.parts[:0].copy()
        area = widths // MULTIPLE * (heights // MULTIPLE)
        tokens = (area * _latent_frames(frames)).sum(axis=1) + self._text_tokens(rows["caption_bytes"])
        return Selected(index.keys, places, parts, captions, widths, heights, frames, tokens)

    def left_out(self, index: ShardIndex) -> list[Excluded]:
        """List the rows that cannot be used, each with the reason."""
        parts, widths, _, frames, usable = self._look(index)
        return [
            Excluded(
                str(index.path), index.keys[place], *self._why(index, place, parts[place], widths[place], frames[place])
            )
            for place in np.flatnonzero(~usable).tolist()
        ]

    def _look(self, index: ShardIndex) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Return parts, target widths, heights and frames [n, C] of all rows, and whether each can be used [n]."""
        numbers = np.stack([index.part_of(column) for column in self.columns], axis=1)  # [n, C]
        there = numbers >= 0
        parts = np.zeros(numbers.shape, index.parts.dtype)
        parts[there] = index.parts[numbers[there]]
        fits = parts["kind"] == [_content_of(column) for column in self.columns]
        if self.columns == (ENCODED,):
            stays = self.resolution.keeps(parts["width"], parts["height"]) & (parts["frames"] <= self.clip.frames)
            widths, heights, frames = (np.where(stays, parts[name], 0) for name in ("width", "height", "frames"))
        else:
            widths, heights = self.resolution.sizes(parts["width"], parts["height"])
            frames = clip_frames(parts["frames"], parts["fps"], self.clip.frames, self.clip.fps)
        captioned = (index.rows["caption_bytes"] > 0) | (not self.captioned)
        usable = captioned & (fits & (widths > 0) & (frames > 0)).all(axis=1)
        return parts, widths, heights, frames, usable

    def _why(
        self, index: ShardIndex, place: int, parts: np.ndarray, widths: np.ndarray, frames: np.ndarray
    ) -> tuple[Reason, str]:
        for column, part, width, count in zip(self.columns, parts, widths.tolist(), frames.tolist()):
            if not part["size"]:
                return Reason.NO_IMAGE, f"there is no {column}"
            if part["kind"] != _content_of(column):
                return (
                    Reason.NO_IMAGE,
                    f"{column} is no {'video' if _content_of(column) is Content.VIDEO else 'picture'}",
                )
            if not width and column == ENCODED:
                return Reason.ENCODED_SIZE, f"encoded at {part['width']} x {part['height']} pixels: {self._only()}"
            if not width:
                return Reason.IMAGE_TOO_SMALL, f"{column} is {part['width']} x {part['height']} pixels: {self._least()}"
            if not count:
                return Reason.VIDEO_TOO_SHORT, f"{column} has {part['frames']} frames at {part['fps']:g} a second"
        return Reason.NO_CAPTION, "no caption (txt, json) has this key"

    def _least(self) -> str:
        r = self.resolution
        if r.width:
            return f"it does not cover {r.width} x {r.height}"
        return f"under min_pixels = {r.min_pixels}, or a side under {MULTIPLE} within max_pixels = {r.max_pixels}"

    def _only(self) -> str:
        r = self.resolution
        return f"not {r.width} x {r.height}" if r.width else f"more than max_pixels = {r.max_pixels}"

    def _text_tokens(self, caption_bytes: np.ndarray | int) -> np.ndarray:
        if not self.captioned:
            return np.zeros((), np.int64)
        tokens = np.minimum(np.asarray(caption_bytes, np.int64) // _BYTES_A_TOKEN, _MAX_TEXT_TOKENS)
        return np.asarray(tokens + _TEMPLATE_TOKENS)


def _content_of(column: str) -> Content:
    return Content.ENCODED if column == ENCODED else Content.VIDEO if "video" in column else Content.IMAGE


def _latent_frames(frames: np.ndarray | int) -> np.ndarray:
    return np.asarray((np.asarray(frames, np.int64) + 3) // 4)

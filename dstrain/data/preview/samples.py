"""What a dataset looks like: a few samples as training sees them, and figures of all of them from their indexes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

import numpy as np
from PIL import Image

from dstrain.data.dataset import Dataset, File, Raw
from dstrain.data.media.decode import decode
from dstrain.data.media.resolution import Fit
from dstrain.data.media.video import decode_video
from dstrain.data.reasons import BadSample
from dstrain.data.selection import Selected
from dstrain.data.shards.names import Content
from dstrain.errors import printable
from dstrain.rng import Purpose, words

VIDEO_FRAMES = 3  # that are shown of a video: the first, the middle and the last
_LAST = 1 - 2.0**-32  # where the last frame of a video starts, as a share of its length
_LOOKED_AT = 1_000_000  # rows; figures of more would not differ
_BINS = 48
_OCTAVE = 12  # bins of a logarithmic histogram, at most

Size = tuple[int, int, int]  # width and height in pixels, and frames
Scale = Literal["log", "whole", "whole log"]


@dataclass(frozen=True)
class Panel:
    """One file of a sample: its size as it is stored and as it is trained on, and its pictures, or why it has none."""

    column: str
    stored: Size
    trained: Size
    pictures: list[Image.Image]
    fault: str = ""


@dataclass(frozen=True)
class Shown:
    """One sample to look at; of a bad one the panels say what is wrong."""

    shard: str
    key: str
    caption: str
    tokens: int
    panels: list[Panel]

    @property
    def fault(self) -> str:
        """What is wrong with it, "" if nothing is."""
        return next((panel.fault for panel in self.panels if panel.fault), "")


@dataclass(frozen=True)
class Figures:
    """Sizes of the samples that were looked at: all, or those of some shards. n samples, m files (n x columns)."""

    samples: int  # that can be used, in the whole dataset
    shards: int  # that they are in
    looked_at: int  # of the shards
    ratio: np.ndarray  # [m] width / height, as stored
    stored: np.ndarray  # [m] megapixels
    trained: np.ndarray  # [m] megapixels
    tokens: np.ndarray  # [n]
    caption_bytes: np.ndarray  # [n] of the longest caption, in UTF-8


def choose(total: int, count: int, seed: int) -> list[int]:
    """Choose `count` of `total` rows, in order: one at random out of each of as many equal stretches."""
    count = min(count, total)
    rows = []
    for number in range(count):
        first, end = total * number // count, total * (number + 1) // count
        rows.append(first + (words(seed, Purpose.ORDER, number, 0)[0] * (end - first) >> 32))
    return rows


def panel_counts(dataset: Dataset) -> list[int]:
    """Return how many pictures each column of a sample is shown as: one, or the frames of a video."""
    stats = [[index.stats[name] for index in dataset.indexes if name in index.stats] for name in dataset.wanted.columns]
    return [min(VIDEO_FRAMES, max(s.max_frames for s in column)) for column in stats]


def show(dataset: Dataset, rows: Sequence[int], side: int) -> Iterator[Shown]:
    """Read and decode the samples of `rows`, which ascend, scaled from their training size into a square of `side`.

    Raises DataError if a shard cannot be read; what is wrong with a sample is shown.
    """
    ends = np.cumsum(_counts(dataset))
    for number, mine in groupby(rows, lambda row: int(np.searchsorted(ends, row, side="right"))):
        selected = dataset.wanted.select(dataset.indexes[number])
        for row in mine:
            yield _show(dataset, row, selected, row - int(ends[number]) + len(selected), side)


def _show(dataset: Dataset, row: int, selected: Selected, place: int, side: int) -> Shown:
    raw, fault = None, ""
    try:
        raw = dataset.read(row)
    except BadSample as error:
        fault = f"{error.reason}: {error}"
    panels = []
    for c, column in enumerate(dataset.wanted.columns):
        part = selected.parts[place, c]
        stored = int(part["width"]), int(part["height"]), int(part["frames"])
        trained = tuple(int(size[place, c]) for size in (selected.widths, selected.heights, selected.frames))
        assert len(trained) == 3
        pictures, why = ([], fault) if raw is None else _pictures(raw, column, stored[2], dataset, side)
        panels.append(Panel(column, stored, trained, pictures, why))
    caption = raw.captions[0] if raw is not None and raw.captions else ""
    key = selected.keys[int(selected.places[place])]
    return Shown(dataset.shard(row), key, caption, int(selected.tokens[place]), panels)


def _pictures(raw: Raw, column: str, frames: int, dataset: Dataset, side: int) -> tuple[list[Image.Image], str]:
    """Return the pictures of a file, or none and what is wrong with it."""
    try:
        pixels = _decode(raw.files[column], frames, dataset.wanted.resolution.fit)
    except BadSample as error:
        return [], f"{error.reason}: {error}"
    return [_scaled(Image.fromarray(picture), side) for picture in pixels], ""


def _decode(file: File, frames: int, fit: Fit) -> list[np.ndarray]:
    """Decode a picture, or the first, middle and last of all frames of a video, to uint8 [H, W, 3] each."""
    size = file.width, file.height
    if file.content is not Content.VIDEO:
        return [decode(file.data, size, fit=fit).permute(1, 2, 0).numpy()]
    starts = (0.0, 0.5, _LAST) if frames >= VIDEO_FRAMES else (0.0, _LAST)[:frames]
    clips = [decode_video(file.data, size, frames=1, start=start, fit=fit) for start in starts]
    return [clip[0].permute(1, 2, 0).numpy() for clip in clips]


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    return picture.resize(fitted(picture.width, picture.height, side), Image.Resampling.LANCZOS)


def fitted(width: int, height: int, side: int) -> tuple[int, int]:
    """Return the largest size in pixels, of the same proportions, within a square of `side`."""
    scale = side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def measure(dataset: Dataset, most: int = _LOOKED_AT) -> Figures:
    """Measure the usable samples from the indexes of whole shards, evenly chosen: all, or about `most` rows."""
    counts = _counts(dataset)
    chosen = _spread(counts, most).tolist()
    files, samples = [], []
    for index in (dataset.indexes[number] for number in chosen):
        selected = dataset.wanted.select(index)
        width, height = (selected.parts[side].ravel().astype(np.float64) for side in ("width", "height"))
        trained = (selected.widths * selected.heights).ravel()
        files.append(np.stack([width / height, width * height / 1e6, trained / 1e6]))
        samples.append(np.stack([selected.tokens, index.rows["caption_bytes"][selected.places]]))
    shards = int(np.count_nonzero(counts))
    return Figures(len(dataset), shards, len(chosen), *np.concatenate(files, axis=1), *np.concatenate(samples, axis=1))


def histogram_edges(values: np.ndarray, scale: Scale) -> np.ndarray:
    """Return the edges of about 50 bins or fewer that hold all values, of which there is at least one.

    "log": positive numbers; bins of one width in octaves, 1 in the middle of one (if it is in reach).
    "whole": whole numbers, as many of them in each bin. "whole log": at least one in each bin, more in higher ones.
    """
    low, high = values.min(), values.max()
    if scale == "log":
        step = max(1 / _OCTAVE, np.log2(high / low) / _BINS)
        first, last = np.rint(np.log2([low, high]) / step)
        return np.asarray(2 ** (step * (np.arange(first, last + 2) - 0.5)))
    if scale == "whole":
        width = -(-(high - low + 1) // _BINS)
        return np.asarray(np.arange(low, high + width + 1, width) - 0.5)
    return np.asarray(np.unique(np.rint(np.geomspace(low, high + 1, _BINS + 1))) - 0.5)


def histogram(values: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Count the values in each bin, int64 [bins]; those at the outermost edges are inside, whatever the rounding."""
    return np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]


def visible(text: str) -> str:
    r"""Put a text on one line: white space becomes one space, and what cannot be seen is written out, as \x07.

    Joiners stay, because they shape the letters of some scripts.
    """
    return " ".join(printable(word, keep="\u200c\u200d") for word in text.split())


def _counts(dataset: Dataset) -> np.ndarray:
    return np.concatenate([part.counts for part in dataset.parts])


def _spread(counts: np.ndarray, most: int) -> np.ndarray:
    """Choose shards evenly, as many as hold `most` rows together, at least one."""
    usable = np.flatnonzero(counts)
    take = len(usable)
    while True:
        chosen = usable[(2 * np.arange(take) + 1) * len(usable) // (2 * take)]
        rows = int(counts[chosen].sum())
        if rows <= most or take == 1:
            return chosen
        take = max(1, min(take - 1, take * most // rows))

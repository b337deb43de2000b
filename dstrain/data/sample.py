"""One row of a dataset as a training sees it: decoded, cut, mirrored, its caption chosen."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from dstrain.data.dataset import Dataset, File, Raw
from dstrain.data.media.decode import decode
from dstrain.data.media.encoded import decode_encoded
from dstrain.data.media.operators import Operators, SampleRandom
from dstrain.data.media.video import decode_video
from dstrain.data.reasons import BadSample, Reason
from dstrain.data.shards.names import ENCODED, Content
from dstrain.errors import DataError


@dataclass
class Sample:
    """One decoded sample. `row` is the row that was decoded: another than planned if that one was bad."""

    key: str
    shard: str  # path or URL
    row: int
    draw: int  # running number in the global order
    columns: dict[str, Any]  # "image": uint8 [3, H, W]; "video": uint8 [F, 3, H, W]; H and W multiples of 16
    caption: str

    @property
    def image(self) -> Tensor:
        """The picture, uint8 [3, H, W]."""
        image: Tensor = self.columns["image"]
        return image


@dataclass(frozen=True)
class Expected:
    """What encoded samples must be, of which the data itself knows nothing.

    stamp: that of the encoders whose work it must be. fault: says what is wrong with the columns of a sample (tensors
    by name, width and height in pixels), "" if nothing is.
    """

    stamp: str
    fault: Callable[[Mapping[str, Any]], str]


class SampleReader:
    """Reads and decodes rows; safe to use from several threads.

    An encoded sample has its tensors as columns, and the width and height of what was encoded.
    operators, seed: what is drawn for each draw, and from which numbers. background: RGB under alpha.
    pin: put what is decoded into page-locked memory. expected: of encoded samples; needed if the dataset holds such.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        operators: Operators,
        seed: int,
        background: tuple[int, int, int],
        pin: bool = False,
        expected: Expected | None = None,
    ) -> None:
        assert expected is not None or ENCODED not in dataset.wanted.columns, "somebody must know what is encoded"
        self._dataset, self._operators = dataset, operators
        self._seed, self._background, self._pin, self._expected = seed, background, pin, expected

    def __call__(self, row: int, draw: int) -> Sample:
        """Read and decode a row; raises BadSample, or DataError if its shard cannot be read or is of other encoders."""
        return self.decode(self._dataset.read(row), row, draw)

    def decode(self, raw: Raw, row: int, draw: int) -> Sample:
        """Decode what was read of a row; raises as the call does."""
        random = SampleRandom(self._seed, draw)
        columns: dict[str, Any] = {}
        for name, file in raw.files.items():
            if file.content is Content.ENCODED:
                columns |= self._encoded(row, file)
            else:
                columns[name] = self._pixels(file, random)
        if self._pin:
            columns = {name: v.pin_memory() if isinstance(v, Tensor) else v for name, v in columns.items()}
        caption = self._operators.choose(raw.captions, random) if raw.captions else ""
        return Sample(raw.key, self._dataset.shard(row), row, draw, columns, caption)

    def _encoded(self, row: int, file: File) -> dict[str, Any]:
        assert self._expected is not None
        header, tensors = decode_encoded(file.data)
        if header.stamp != self._expected.stamp:
            raise DataError(
                f"shard {self._dataset.shard(row)} was encoded by {header.stamp}, and this training's model is "
                f"{self._expected.stamp}; encode the pictures again with `dstrain encode`, or name the model (and "
                "model.encoder_dtype) that encoded them"
            )
        columns = {**tensors, "width": header.width, "height": header.height}
        if fault := self._expected.fault(columns):
            raise BadSample(Reason.ENCODED_DAMAGED, fault)
        return columns

    def _pixels(self, file: File, random: SampleRandom) -> Tensor:
        wanted, operators = self._dataset.wanted, self._operators
        size, fit = (file.width, file.height), wanted.resolution.fit
        place, flip = operators.place(random), operators.flipped(random)
        if file.content is Content.VIDEO:
            start, fps = operators.start(random), wanted.clip.fps
            return decode_video(
                file.data, size, frames=file.frames, fps=fps, start=start, fit=fit, place=place, flip=flip
            )
        return decode(file.data, size, fit=fit, place=place, background=self._background, flip=flip)


def check_first(dataset: Dataset, read: SampleReader) -> None:
    """Read the first sample of each source: shards of other encoders raise DataError before anything is built."""
    counts = [int(part.counts.sum()) for part in dataset.parts]
    for row in np.cumsum([0, *counts[:-1]]).tolist():
        with suppress(BadSample):  # which the loader counts and replaces
            read(row, draw=0)

"""Which rows of packed tokens belong together: a sample's tokens in one stream, modulated alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Chunks:
    """Segments cut into K chunks of few rows: a kernel's program sums over one of them, and a second kernel over these.

    So gradients of what a segment shares are added up in an order that does not depend on timing.
    """

    bounds: Tensor  # [K, 3] int32: first row, the row behind the last, segment
    starts: Tensor  # [M + 1] int32: segment m has chunks starts[m] up to starts[m + 1]


class Segments:
    """M runs of rows, end to end, of which run m is modulated by row m of the tables.

    A pack of N samples has M = N segments in one stream; where text rows lie in front of image rows in one tensor it
    has M = 2 N, the texts first. Rows of biases and norm weights come one a stream: `streams` of them share M equally.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str, streams: int = 1) -> None:
        """Lay out segments of so many rows each; ValueError unless all have rows and `streams` divides them."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"segments must have at least one row each, got lengths {list(lengths)}")
        if streams < 1 or len(lengths) % streams:
            raise ValueError(f"{len(lengths)} segments cannot be shared equally by {streams} streams")
        self.lengths, self.streams, self.device = tuple(lengths), streams, torch.device(device)
        self.ends = tuple(accumulate(self.lengths))
        of_row = np.repeat(np.arange(len(lengths), dtype=np.int32), self.lengths)
        with torch.inference_mode(False):  # a training may use them later
            self.of_row = torch.from_numpy(of_row).to(device)  # [S] int32
        self._chunks: dict[int, Chunks] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def rows(self) -> int:
        """S, the rows of all segments."""
        return self.ends[-1]

    @property
    def stream_rows(self) -> tuple[int, ...]:
        """Rows of each stream."""
        each = len(self) // self.streams
        return tuple(sum(self.lengths[i : i + each]) for i in range(0, len(self), each))

    def chunks(self, rows: int) -> Chunks:
        """Cut the segments into chunks of at most `rows` rows; a chunk lies in one segment."""
        if rows not in self._chunks:
            bounds, starts = [], [0]
            for m, (end, length) in enumerate(zip(self.ends, self.lengths)):
                bounds += [(a, min(a + rows, end), m) for a in range(end - length, end, rows)]
                starts.append(len(bounds))
            with torch.inference_mode(False):
                made = [torch.tensor(x, dtype=torch.int32).to(self.device) for x in (bounds, starts)]
            self._chunks[rows] = Chunks(*made)
        return self._chunks[rows]

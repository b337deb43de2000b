"""The order of samples without end: a function of the seed and the sizes of the shards, of which any part can be asked.

Nothing is drawn, consumed or remembered. Memory is that of a window, never that of the dataset.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from dstrain.rng import Purpose, shuffled

_WINDOWS = 4  # kept of each source: a batch may reach over an edge, and a run may look one step ahead
_BLOCK = 1 << 16  # draws in which the sources have exactly their shares, when an epoch is longer than that


class SourceOrder:
    """The rows of one source, epoch after epoch, each shuffled in two levels: its shards, then windows of them.

    An epoch holds every row once. A window is the whole shards that make up about `window` rows, in the order of the
    shuffled shards, and its rows are shuffled among each other; up to `window` rows in all, that is a plain shuffle.
    counts: int64 [shards], rows of each shard. Rows are numbered shard after shard.
    """

    def __init__(self, counts: np.ndarray, *, seed: int, window: int, source: int = 0) -> None:
        assert source < 1 << 8
        self.n = int(counts.sum())
        self._counts = counts
        self._starts = np.cumsum(counts) - counts
        self._seed, self._window, self._source = seed, window, source
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()
        self._epoch = lru_cache(maxsize=2)(self._lay_out)

    def rows(self, first: int, count: int) -> np.ndarray:
        """Return the rows at places [first, first + count) of the endless order, int64 [count]."""
        pieces = [np.empty(0, np.int64)]
        while count > 0:
            epoch, place = divmod(first, self.n)
            _, _, starts = self._epoch(epoch)
            number = int(np.searchsorted(starts, place, side="right")) - 1
            offset = place - int(starts[number])
            piece = self._rows_of(epoch, number)[offset : offset + count]
            pieces.append(piece)
            first, count = first + len(piece), count - len(piece)
        return np.concatenate(pieces)

    def shards(self, first: int) -> np.ndarray:
        """Return the shards of the window that place `first` lies in, int64."""
        epoch, place = divmod(first, self.n)
        order, edges, starts = self._epoch(epoch)
        number = int(np.searchsorted(starts, place, side="right")) - 1
        return order[edges[number] : edges[number + 1]]

    def _lay_out(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the shards in their order, where in it windows begin (and end), and the first place of each window."""
        order = shuffled(self._seed, len(self._counts), Purpose.SHARD_ORDER, (epoch, self._source))
        order = order[self._counts[order] > 0]
        counts = self._counts[order]
        starts = np.cumsum(counts) - counts
        edges = np.flatnonzero(np.diff(starts // self._window, prepend=-1))
        return order, np.append(edges, len(order)), starts[edges]

    def _rows_of(self, epoch: int, number: int) -> np.ndarray:
        if (epoch, number) in self._windows:
            self._windows.move_to_end((epoch, number))
            return self._windows[epoch, number]
        order, edges, _ = self._epoch(epoch)
        shards = order[edges[number] : edges[number + 1]]
        ends = np.cumsum(self._counts[shards])
        places = shuffled(self._seed, int(ends[-1]), Purpose.ORDER, (epoch, self._source << 24 | number))
        at = np.searchsorted(ends, places, side="right")
        rows = places + (self._starts[shards] - ends + self._counts[shards])[at]
        self._windows[epoch, number] = rows
        while len(self._windows) > _WINDOWS:
            self._windows.popitem(last=False)
        return rows


class Mixture:
    """Which source each draw comes from: in random order, and in proportion over every block.

    shares: relative amounts, one a source. A block is as many draws as they add up to, or about 65,536 if that is less:
    then what a source is owed over all blocks so far is rounded down, so that at the end of a block no source is behind
    its share by a whole draw. If the shares are the rows of each source (times repeats), a short block is one epoch.
    """

    def __init__(self, shares: Sequence[int], *, seed: int) -> None:
        self._shares = [int(share) for share in shares]
        self._total = sum(self._shares)
        self._size = min(self._total, _BLOCK)
        self._seed = seed
        self._block = lru_cache(maxsize=2)(self._deal)

    def numbers(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for draws [first, first + count), the source of each and its running number in it, int64 [count]."""
        if len(self._shares) == 1:
            return np.zeros(count, np.int64), np.arange(first, first + count)
        block = first // self._size
        while sum(self._begins(block + 1)) <= first:  # rounding down puts a block a few draws before its multiple
            block += 1
        begin = sum(self._begins(block))
        sources, numbers, length = [], [], 0
        while length < first - begin + count:
            source, number = self._block(block)
            sources.append(source)
            numbers.append(number)
            length, block = length + len(source), block + 1
        part = slice(first - begin, first - begin + count)
        return np.concatenate(sources)[part], np.concatenate(numbers)[part]

    def _begins(self, block: int) -> list[int]:
        """Return the running number of each source at which a block begins."""
        return [block * self._size * share // self._total for share in self._shares]

    def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        begins, ends = np.array(self._begins(block)), np.array(self._begins(block + 1))
        edges = np.cumsum(ends - begins)
        slots = shuffled(self._seed, int(edges[-1]), Purpose.SOURCE, (block >> 32, block))
        source = np.searchsorted(edges, slots, side="right")
        number = np.empty_like(source)
        for k in np.flatnonzero(ends > begins).tolist():
            number[source == k] = np.arange(begins[k], ends[k])
        return source, number

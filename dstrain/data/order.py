"""The order of samples without end: a function of the seed and the sizes of the shards, of which any part can be asked.

Nothing is drawn, consumed or remembered. Memory is that of a window, never that of the dataset.
"""

from collections import OrderedDict
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
    """Which source each draw comes from: exactly in proportion over every block, in random order within it.

    shares: relative amounts, one a source. If they add up to at most 65,536 a block is as long as they say, so with
    the rows of each source (times its repeats) a block is one epoch; else a block has 65,536 draws.
    """

    def __init__(self, shares: np.ndarray, *, seed: int) -> None:
        total = int(shares.sum())
        if total > _BLOCK:
            exact = shares * (_BLOCK / total)
            quotas = np.maximum(1, np.floor(exact).astype(np.int64))
            rest = np.argsort(np.floor(exact) - exact, kind="stable")  # the largest remainders first
            quotas[rest[: max(0, _BLOCK - int(quotas.sum()))]] += 1
            quotas[quotas.argmax()] -= max(0, int(quotas.sum()) - _BLOCK)  # what the smallest were given
            shares = quotas
        self.quotas = shares.astype(np.int64)
        self._ends = np.cumsum(self.quotas)
        self._seed = seed
        self._block = lru_cache(maxsize=2)(self._deal)

    def numbers(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for draws [first, first + count), the source of each and its running number in it, int64 [count]."""
        if len(self.quotas) == 1:
            return np.zeros(count, np.int64), np.arange(first, first + count)
        size = int(self._ends[-1])
        blocks = range(first // size, (first + count - 1) // size + 1)
        source, number = (np.concatenate(parts) for parts in zip(*(self._block(block) for block in blocks)))
        begin = first - blocks[0] * size
        return source[begin : begin + count], number[begin : begin + count]

    def _deal(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        slots = shuffled(self._seed, int(self._ends[-1]), Purpose.SOURCE, (block >> 32, block))
        source = np.searchsorted(self._ends, slots, side="right")
        number = np.empty_like(source)
        for k, quota in enumerate(self.quotas.tolist()):
            number[source == k] = block * quota + np.arange(quota)
        return source, number

"""Which samples make up a step, and on which rank and in which micro-step each is computed.

A pure function of (seed, sizes of the shards and their samples, sizes of batch and world, step): nothing is drawn,
consumed or remembered, so a run continues at any step and sees the same global batches on any number of ranks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from dstrain.data.deal import deal
from dstrain.data.order import Mixture, SourceOrder
from dstrain.errors import ConfigError

WINDOW = 1 << 16  # rows shuffled among each other


class Draw(NamedTuple):
    """One sample of a global batch: its running number in the global order, and the row of the dataset it is."""

    draw: int
    row: int


@dataclass(frozen=True)
class Part:
    """One source: the rows of each of its shards, int64 [shards], and its share of the draws."""

    counts: np.ndarray
    share: int


class Rows(Protocol):
    """What a plan must know of a dataset; rows are numbered part after part, shard after shard."""

    @property
    def parts(self) -> Sequence[Part]:
        """The sources."""

    @property
    def max_tokens(self) -> int:
        """Most tokens that a row can have."""

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        """Return the tokens of each of `rows`, int64 [n]."""


class Plan:
    """The order of samples without end, and its packing.

    Step s takes the draws [s G, (s + 1) G). Each source runs through its own epochs (`SourceOrder`), and `Mixture`
    says which source a draw comes from, so every row of a source comes once in each of its epochs.

    attention_length: the tokens at which a sample's attention costs as much as its matrices; None leaves attention out.
    window: rows shuffled among each other; what is read at one time lies in that many rows' shards.
    Raises ConfigError if the rows, the batch, the ranks and the packs do not go together.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        seed: int,
        global_batch_size: int,
        tokens_per_pack: int,
        world_size: int,
        attention_length: int | None = None,
        window: int = WINDOW,
    ) -> None:
        self.n = sum(int(part.counts.sum()) for part in rows.parts)
        if global_batch_size < world_size:
            raise ConfigError(
                f"global_batch_size = {global_batch_size} leaves some of {world_size} ranks without a sample; "
                f"give at least {world_size}, or use fewer ranks"
            )
        if self.n < global_batch_size:
            raise ConfigError(
                f"the shards hold {self.n} usable samples, fewer than global_batch_size = {global_batch_size}; "
                "add samples or make the batch smaller"
            )
        if rows.max_tokens > tokens_per_pack:
            raise ConfigError(
                f"a sample can have {rows.max_tokens} tokens, more than tokens_per_pack = {tokens_per_pack}; give at "
                "least as many, or lower data.max_pixels (or data.width and data.height)"
            )
        if global_batch_size % world_size and 2 * rows.max_tokens > tokens_per_pack:
            raise ConfigError(
                f"global_batch_size = {global_batch_size} is not a multiple of {world_size} ranks, and a rank could be "
                "left without samples in a micro-step; make it a multiple, or give tokens_per_pack = "
                f"{2 * rows.max_tokens}"
            )
        self.global_batch_size = global_batch_size
        self.tokens_per_pack = tokens_per_pack
        self.world_size = world_size
        self.attention_length = attention_length
        self.window = window
        self._rows = rows
        self._mixture = Mixture([part.share for part in rows.parts], seed=seed)
        self._orders = [
            SourceOrder(part.counts, seed=seed, window=window, source=k) for k, part in enumerate(rows.parts)
        ]
        sizes = [order.n for order in self._orders]
        self._first = np.cumsum([0, *sizes[:-1]])

    def batch(self, step: int) -> list[Draw]:
        """Return the global batch of a step, in the global order; the same for every world size."""
        first = step * self.global_batch_size
        rows = self._rows_of(first)
        return [Draw(draw, row) for draw, row in enumerate(rows.tolist(), first)]

    def step(self, step: int) -> list[list[list[Draw]]]:
        """Deal the global batch of a step to micro-steps, and each of those to ranks: `[micro][rank] -> [Draw, ...]`.

        Every pack holds at most `tokens_per_pack`; all ranks have the same number of micro-steps, none of them empty.
        """
        batch = self.batch(step)
        tokens = self._rows.tokens(np.array([row for _, row in batch]))
        dealt = deal(tokens, self.costs(tokens), ranks=self.world_size, capacity=self.tokens_per_pack)
        return [[[batch[place] for place in pack] for pack in micro] for micro in dealt]

    def costs(self, tokens: np.ndarray) -> np.ndarray:
        """Return what samples of so many tokens cost a DiT, int64 [n], in units of no meaning: matrices + attention."""
        if self.attention_length is None:
            return tokens
        return tokens * (self.attention_length + tokens)

    def figures(self, step: int) -> tuple[int, float, float]:
        """Return, of a step: its micro-steps, the share of the token budget used, and by how much the costliest rank
        exceeds the mean, micro-step by micro-step; what the other ranks wait for.
        """
        packs = self.step(step)
        tokens = [[self._rows.tokens(np.array([row for _, row in pack])) for pack in micro] for micro in packs]
        costs = np.array([[self.costs(pack).sum() for pack in micro] for micro in tokens])  # [micros, ranks]
        used = sum(int(pack.sum()) for micro in tokens for pack in micro)
        return (
            len(packs),
            used / (costs.size * self.tokens_per_pack),
            float(costs.max(1).sum() / costs.mean(1).sum()) - 1,
        )

    def shards_ahead(self, step: int) -> list[int]:
        """Return the shards, numbered over all sources, that will be read about a window after `step`."""
        source, number = self._mixture.numbers(step * self.global_batch_size, self.global_batch_size)
        ahead, first = [], 0
        for k, (part, order) in enumerate(zip(self._rows.parts, self._orders)):
            mine = np.flatnonzero(source == k)
            if len(mine):
                ahead += (first + order.shards(int(number[mine[0]]) + self.window)).tolist()
            first += len(part.counts)
        return ahead

    def _rows_of(self, first: int) -> np.ndarray:
        """Return the rows of the draws [first, first + G), int64 [G]."""
        source, number = self._mixture.numbers(first, self.global_batch_size)
        rows = np.empty(self.global_batch_size, np.int64)
        for k, order in enumerate(self._orders):
            mine = np.flatnonzero(source == k)
            if len(mine):  # the numbers of one source run on without a gap, within a block and over its edge
                rows[mine] = order.rows(int(number[mine[0]]), len(mine)) + self._first[k]
        return rows

"""Which samples make up a step, and on which rank and in which micro-step each is computed.

A pure function of (seed, token counts, sizes of batch and world, step): nothing is drawn, consumed or remembered, so a
run continues at any step and sees the same global batches on any number of ranks.
"""

import heapq
from typing import NamedTuple

import numpy as np

from dstrain.errors import ConfigError
from dstrain.rng import shuffled


class Draw(NamedTuple):
    """One sample of a global batch: its running number in the global order, and the row of the dataset it is."""

    draw: int
    row: int


class Plan:
    """The order of samples without end, and its packing.

    Epoch e is `shuffled(seed, e, n)`; the epochs stand end to end, and step s takes places [s G, (s + 1) G) of them, so
    each row comes once an epoch and a batch may reach into the next epoch. tokens: int64 [n], the cost of each row.
    Raises ConfigError if the rows, the batch, the ranks and the packs do not go together.
    """

    def __init__(
        self, tokens: np.ndarray, *, seed: int, global_batch_size: int, tokens_per_pack: int, world_size: int
    ) -> None:
        over = int(np.count_nonzero(tokens > tokens_per_pack))
        if global_batch_size < world_size:
            raise ConfigError(
                f"global_batch_size = {global_batch_size} leaves some of {world_size} ranks without a sample; "
                f"give at least {world_size}, or use fewer ranks"
            )
        if len(tokens) < global_batch_size:
            raise ConfigError(
                f"the shards hold {len(tokens)} usable samples, fewer than global_batch_size = {global_batch_size}; "
                "add samples or make the batch smaller"
            )
        if over:
            raise ConfigError(
                f"{over} of {len(tokens)} samples have more tokens than tokens_per_pack = {tokens_per_pack}; give at "
                f"least {int(tokens.max())}, or lower max_pixels"
            )
        needed = _tokens_for_full_ranks(tokens, global_batch_size, world_size)
        if needed > tokens_per_pack:
            raise ConfigError(
                f"global_batch_size = {global_batch_size} is not a multiple of {world_size} ranks, and a rank could be "
                f"left without samples in a micro-step; make it a multiple, or give tokens_per_pack = {needed}"
            )
        self.n = len(tokens)
        self.tokens = tokens
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.tokens_per_pack = tokens_per_pack
        self.world_size = world_size
        self._orders: dict[int, np.ndarray] = {}  # a batch touches at most two epochs, because n >= G

    def batch(self, step: int) -> list[Draw]:
        """Return the global batch of a step, in the global order; the same for every world size."""
        draws = np.arange(step * self.global_batch_size, (step + 1) * self.global_batch_size)
        epochs, places = np.divmod(draws, self.n)
        wanted = range(int(epochs[0]), int(epochs[-1]) + 1)
        kept = {epoch: order for epoch, order in self._orders.items() if epoch in wanted}
        self._orders = kept | {e: shuffled(self.seed, e, self.n) for e in wanted if e not in kept}
        rows = np.concatenate([self._orders[epoch][places[epochs == epoch]] for epoch in wanted])
        return [Draw(draw, row) for draw, row in zip(draws.tolist(), rows.tolist())]

    def step(self, step: int) -> list[list[list[Draw]]]:
        """Deal the global batch of a step to micro-steps, and each of those to ranks: `[micro][rank] -> [Draw, ...]`.

        The number of micro-steps is the least for which every pack holds at most `tokens_per_pack`, and all ranks have
        the same. The fullest packs come first and those of one micro-step are alike, for under ZeRO-3 every rank
        waits for the slowest. No pack is empty.
        """
        batch = self.batch(step)
        costs = self.tokens[[row for _, row in batch]]
        micros = max(1, -(-int(costs.sum()) // (self.world_size * self.tokens_per_pack)))
        while True:  # ends at G // world_size micro-steps at the latest: __init__ has seen to that
            packs, fullest = _deal(costs, micros * self.world_size)
            if fullest <= self.tokens_per_pack:
                break
            micros += 1
        dealt = [[batch[place] for place in pack] for pack in packs]
        return [dealt[first : first + self.world_size] for first in range(0, len(dealt), self.world_size)]


def _tokens_for_full_ranks(tokens: np.ndarray, batch: int, world_size: int) -> int:
    """Return the budget from which on no pack is ever empty.

    Of G samples for B = G // W * W packs, the first B (longest first) open a pack each, and the j-th of the rest lies
    on a pack no fuller than sample B - j + 1 alone. The worst batch has the longest rows, and each of them twice if it
    can reach into the next epoch.
    """
    packs = batch // world_size * world_size
    rest = np.arange(1, batch - packs + 1)
    longest = np.repeat(np.sort(tokens)[::-1][:batch], 2 if len(tokens) % batch else 1)
    return int(np.max(longest[packs - rest] + longest[packs + rest - 1], initial=0))


def _deal(costs: np.ndarray, bins: int) -> tuple[list[list[int]], int]:
    """Deal items to bins, the longest first into the least loaded (LPT, Graham 1969).

    Returns the places in each bin, fullest bin first, and the load of the fullest. Ties go to the lower number.
    """
    loads = [(0, number) for number in range(bins)]
    packs: list[list[int]] = [[] for _ in range(bins)]
    for place in np.argsort(-costs, kind="stable").tolist():
        load, number = loads[0]
        packs[number].append(place)
        heapq.heapreplace(loads, (load + int(costs[place]), number))
    order = sorted(loads, key=lambda entry: (-entry[0], entry[1]))
    return [sorted(packs[number]) for _, number in order], order[0][0]

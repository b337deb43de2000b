"""What the ranks tell each other in a step, all in one sum: figures, losses by noise level, wishes, and their pace."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dstrain.engine import distributed
from dstrain.engine.distributed import World
from dstrain.tracking.metrics import SIGMA_BINS

_FIGURES = 3  # loss, tokens, FLOPs


@dataclass(frozen=True)
class Wishes:
    """What a rank wants, or in `Agreed` any rank."""

    stop: bool  # after this step
    by_person: bool  # the stop is a person's, who does not want the run to come back by itself
    save: bool  # after this step, since the time has come
    unwritten: bool  # its part of the checkpoint that is being saved


@dataclass(frozen=True)
class Agreed:
    """The sums over all ranks, the same on each."""

    loss: float
    tokens: int
    flops: float
    wishes: Wishes
    bins: Tensor  # [2, SIGMA_BINS]: sums of losses, counts of samples
    own_s: list[float]  # by rank: seconds before the others were waited for

    def metrics(self) -> dict[str, float]:
        """Return the loss by noise level, and who was slowest to get its data ready and by how much."""
        losses, counts = self.bins.tolist()
        by_sigma = {f"loss_sigma_{b}": loss / n for b, (loss, n) in enumerate(zip(losses, counts)) if n}
        slowest = max(self.own_s)
        spread = {"slowest_rank": self.own_s.index(slowest), "rank_spread_s": slowest - min(self.own_s)}
        return by_sigma | (spread if len(self.own_s) > 1 else {})


class StepSums:
    """Adds up a step on this rank."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._figures = torch.zeros(_FIGURES, dtype=torch.float64)
        self._bins = torch.zeros(2, SIGMA_BINS, dtype=torch.float64)

    def add(self, loss: Tensor, tokens: int, flops: float, bins: Tensor) -> None:
        """Add a pack's share of the mean loss, tokens, FLOPs, and `sigma_bins`."""
        self._figures += torch.tensor([float(loss), tokens, flops], dtype=torch.float64)
        self._bins += bins

    def over_ranks(self, own_s: float, wishes: Wishes) -> Agreed:
        """Return the sums over the ranks; collective."""
        paces = torch.zeros(self._world.size, dtype=torch.float64)
        paces[self._world.rank] = own_s
        wanted = torch.tensor([wishes.stop, wishes.by_person, wishes.save, wishes.unwritten], dtype=torch.float64)
        sums = torch.cat([self._figures, wanted, self._bins.flatten(), paces])
        sums = distributed.sum_over_ranks(sums.to(self._world.device)).cpu()
        figures, wanted, bins, paces = sums.split([_FIGURES, len(wanted), self._bins.numel(), self._world.size])
        loss, tokens, flops = figures.tolist()
        return Agreed(loss, int(tokens), flops, Wishes(*(wanted > 0).tolist()), bins.view(2, -1), paces.tolist())

"""Random weights for training from scratch: every element is a function of (seed, tensor name, place).

So a rank can make just its own slice, and a model starts the same at any world size.
"""

import zlib
from math import prod
from typing import Protocol

import torch
from torch import Tensor, nn

from dstrain.rng import Purpose, normal

CHUNK = 1 << 22  # elements made at once, to bound the generator's temporaries


class HasInit(Protocol):
    """A model that says how its tensors start."""

    def initial(self, name: str, shape: torch.Size) -> tuple[float, float]:
        """Return mean and standard deviation of the tensor `name`."""


def initial_slice(model: HasInit, name: str, shape: torch.Size, seed: int, start: int, stop: int) -> Tensor:
    """Return elements [start, stop) of the flattened start value of `name`, fp32, 1-D."""
    mean, std = model.initial(name, shape)
    stop = min(stop, prod(shape))
    values = torch.full((max(stop - start, 0),), mean)
    if std > 0:
        draw = torch.tensor(zlib.crc32(name.encode()))
        for begin in range(start, stop, CHUNK):
            elements = torch.arange(begin, min(begin + CHUNK, stop))
            values[begin - start : begin - start + len(elements)] += std * normal(seed, Purpose.INIT, draw, elements)
    return values


@torch.no_grad()
def initialise(model: nn.Module, seed: int) -> None:
    """Give every parameter of `model` (not on meta, not sharded) its start value."""
    for name, p in model.named_parameters():
        p.copy_(initial_slice(model, name, p.shape, seed, 0, p.numel()).view(p.shape))  # type: ignore[arg-type]

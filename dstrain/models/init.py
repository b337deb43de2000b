"""Random weights for training from scratch: every element is a function of (seed, tensor name, place).

So a rank can make just its own slice, and a model starts the same at any world size.
"""

import zlib
from math import prod

import torch
from torch import Tensor

from dstrain.models.base import DiT
from dstrain.rng import Purpose, normal4

CHUNK = 1 << 20  # elements made at once, to bound the generator's temporaries


def initial_slice(model: DiT, name: str, shape: torch.Size, seed: int, start: int, stop: int) -> Tensor:
    """Return elements [start, stop) of the flattened start value of `name`, fp32, 1-D."""
    mean, std = model.initial(name, shape)
    stop = min(stop, prod(shape))
    values = torch.full((max(stop - start, 0),), mean)
    if std > 0:
        draw = torch.tensor(zlib.crc32(name.encode()))
        for begin in range(start - start % 4, stop, CHUNK):  # a counter makes four numbers at once
            groups = torch.arange(begin // 4, (min(begin + CHUNK, stop) + 3) // 4)
            noise = normal4(seed, Purpose.INIT, draw, groups).flatten()
            first, last = max(begin, start), min(begin + CHUNK, stop)
            values[first - start : last - start] += std * noise[first - begin : last - begin]
    return values


@torch.no_grad()
def initialise(model: DiT, seed: int) -> None:
    """Give every parameter of `model` (not on meta, not sharded) its start value."""
    for name, p in model.named_parameters():
        p.copy_(initial_slice(model, name, p.shape, seed, 0, p.numel()).view(p.shape))

"""What the trainer asks of every family's transformer."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import nn

from dstrain.models.packing import PackLayout


class DiT(nn.Module):
    """A diffusion transformer on packs: a stack of equal blocks that ZeRO-3 gathers one at a time."""

    block_class: ClassVar[type[nn.Module]]
    width: int  # of the residual stream
    depth: int  # blocks
    activation_checkpointing = False  # recompute each block in the backward

    @property
    @abstractmethod
    def attention_length(self) -> int:
        """Tokens of a sample at which attention costs it as much as the matrices do; packs are balanced by it."""

    @abstractmethod
    def forward_flops(self, layout: PackLayout) -> int:
        """Return multiply-adds x 2 of one forward over a pack; training takes three times as much."""

    @abstractmethod
    def initial(self, name: str, shape: torch.Size) -> tuple[float, float]:
        """Return mean and standard deviation of the tensor `name` at the start of training from scratch."""

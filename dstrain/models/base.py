"""What the trainer asks of every family's transformer."""

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import nn

from dstrain.config import Activations
from dstrain.models.packing import PackLayout


class DiT(nn.Module):
    """A diffusion transformer on packs: a stack of equal blocks that ZeRO-3 gathers one at a time."""

    block_class: ClassVar[type[nn.Module]]
    lora_targets: ClassVar[tuple[str, ...]]  # patterns of the layers that get adapters unless the recipe names others
    unused: frozenset[str] = frozenset()  # parameters of the checkpoint that feed nothing: kept, never trained
    width: int  # of the residual stream
    depth: int  # blocks
    kernel: str = "auto"  # the face of what runs between the matmuls: kernels/backend.py
    activations: tuple[Activations, ...] = ("none",)  # what block i keeps for its backward: entry i, repeated

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

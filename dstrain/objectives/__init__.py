"""Objectives: from a pack and the model's velocity to one loss a sample. Each file here registers its own."""

from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from torch import Tensor

from dstrain.registry import Registry

OBJECTIVES: Registry[Any] = Registry("objective")


@dataclass(frozen=True)
class Losses:
    """What an objective says of a pack of N samples; the loss of a global batch is the mean of its `per_sample`."""

    per_sample: Tensor  # [N] fp32, weighted; what is differentiated
    sigmas: Tensor  # [N] fp32
    weights: Tensor  # [N] fp32


for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")

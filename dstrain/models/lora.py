"""Low-rank adapters by PEFT on a transformer that has no memory yet, and where their start values come from.

Outside the module the adapters have plain names: beside `X.weight` there are `X.lora_A.weight` [rank, in],
`X.lora_B.weight` [out, rank] and, with DoRA, `X.lora_magnitude_vector` [out].
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from math import sqrt
from typing import Any, cast

import torch
from torch import Tensor, nn

from dstrain.config import LoraConfig
from dstrain.errors import ConfigError, did_you_mean
from dstrain.kernels.linear import Linear
from dstrain.models.base import DiT
from dstrain.rng import Purpose, normal, uniform_at

A, B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
Fill = Callable[[str, torch.Size, int, int], Tensor]


def target_layers(model: DiT, patterns: Sequence[str]) -> list[str]:
    """Return the names of the Linear layers that `patterns` match, those of the family if there are none.

    A pattern matches a layer's whole name or its end after a dot. Layers that feed nothing are left out. Raises
    ConfigError for a pattern that matches no layer, with the nearest.
    """
    layers = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    chosen = set[str]()
    for pattern in patterns or model.lora_targets:
        found = {n for n in layers if fnmatchcase(n, pattern) or fnmatchcase(n, f"*.{pattern}")}
        if not found:
            ends = {n.split(".", 2)[-1] for n in layers} | set(layers)
            raise ConfigError(
                f"lora.targets: {pattern!r} matches no Linear layer{did_you_mean(pattern, ends)};"
                f" the family's are {', '.join(model.lora_targets)}"
            )
        chosen |= found
    if not (used := [name for name in layers if name in chosen and f"{name}.weight" not in model.unused]):
        raise ConfigError(f"lora.targets: {', '.join(patterns)} match only layers that feed nothing; name others")
    return used


def add_adapters(model: DiT, config: LoraConfig, layers: Sequence[str]) -> None:
    """Put an adapter on each of `layers`, in place; everything else stops training. `model` is on the meta device."""
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    settings = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha or config.rank,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        use_rslora=config.rslora,
        use_dora=config.dora,
        target_modules=list(layers),
        init_lora_weights=False,  # filled like every other parameter
    )
    with torch.device("meta"):
        inject_adapter_in_model(settings, model)
    for name, p in model.named_parameters():
        p.requires_grad_(".lora_" in name)


def as_linear(layer: nn.Module) -> Linear | None:
    """The tensors of a Linear layer, or of one with one LoRA adapter in use, as fused functions take them.

    None if the layer does more and must be called: dropout, DoRA, several adapters, or adapters off or merged.
    """
    if type(layer) is nn.Linear:
        return Linear(layer.weight, layer.bias) if layer.bias is not None else None
    if not (adapter := _only_adapter(layer)) or (base := as_linear(cast(nn.Module, layer.base_layer))) is None:
        return None
    down, up, scale = adapter
    return base._replace(down=down, up=up, scale=scale) if down.dtype == base.weight.dtype else None


def _only_adapter(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """A, B and the scale, where the layer is PEFT's and does W x + scale B A x."""
    from peft.tuners.lora import Linear as PeftLinear

    if type(layer) is not PeftLinear or layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return None
    (name,) = layer.active_adapters
    if name not in layer.lora_A or name in layer.lora_variant or type(layer.lora_dropout[name]) is not nn.Identity:
        return None
    down, up = layer.lora_A[name], layer.lora_B[name]
    return (down.weight, up.weight, layer.scaling[name]) if up.bias is None else None


def plain_name(name: str) -> str:
    """Return a parameter's name without what PEFT put into it."""
    plain = name.replace(".base_layer.", ".").replace(".default.", ".").removesuffix(".default")
    return plain.removesuffix(".weight") if f"{MAGNITUDE}." in plain else plain


def is_adapter(name: str) -> bool:
    """Whether a plain name is an adapter's."""
    return name.endswith((A, B, MAGNITUDE))


def adapter_fill(
    config: LoraConfig, base: Fill, shapes: Mapping[str, torch.Size], seed: int, given: Mapping[str, Tensor]
) -> Fill:
    """Return a fill for a model with adapters: `base` for its own parameters, start values for the adapters'.

    A is uniform in +-1 / sqrt(in) ("kaiming", as PEFT's) or normal with deviation 1 / rank ("gaussian"), each element
    a function of the seed, the name and the place; B is zero, so the model starts as it was; DoRA's magnitude is the
    length of each row of the base weight.

    Args:
        config: rank and init.
        base: gives the base model's parameters.
        shapes: of the base model's parameters, plain names.
        seed: of A.
        given: adapters read from a file, plain names; they take the place of start values.
    """

    def fill(name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        stop = min(stop, shape.numel())
        if not is_adapter(name):
            return base(name, shape, start, stop)
        if name in given:
            return given[name].flatten()[start:stop]
        if name.endswith(B) or stop <= start:
            return torch.zeros(max(0, stop - start))
        if name.endswith(MAGNITUDE):
            weight = name.removesuffix(MAGNITUDE) + ".weight"
            width = shapes[weight][1]
            return base(weight, shapes[weight], start * width, stop * width).float().view(-1, width).norm(dim=1)
        elements = torch.arange(start, stop)
        draw = torch.tensor(zlib.crc32(name.encode()))
        if config.init == "gaussian":
            return normal(seed, Purpose.INIT, draw, elements) / config.rank
        return (2 * uniform_at(seed, Purpose.INIT, draw, elements) - 1) / sqrt(shape[1])

    return fill

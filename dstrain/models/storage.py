"""Frozen weights in 8 or 4 bits: layers that compute with them, and a fill that makes any slice of their bytes.

A weight is flattened and cut into blocks of 64 elements with a scale each (block-wise quantisation: Dettmers et al.,
arXiv 2110.02861). Since no block knows of another, a rank makes its own slice from a slice of the weight.

    int8   w = q * scale, q a whole number from -127 to 127
    fp8    w = q * scale, q a float8 e4m3 up to 448 (Micikevicius et al., arXiv 2209.05433)
    nf4    w = code[q] * scale, two 4-bit q a byte, 16 codes at normal quantiles (Dettmers et al., arXiv 2305.14314)

Bytes are uint8 in all three: casts of a module leave them alone, and every backend can gather them. Scales are bf16 and
rounded before the elements are divided by them, so the elements make up for the rounding, and a cast to bf16 or fp32
changes nothing.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dstrain.errors import ConfigError

Storage = Literal["fp8", "int8", "nf4"]
Fill = Callable[[str, torch.Size, int, int], Tensor]
BLOCK = 64  # elements of a scale
CHUNK = 1 << 20  # elements quantised at once, to bound the fp32 temporaries
SCALE = "_scale"  # what the name of a weight's scales adds to the weight's
PER_BYTE: dict[Storage, int] = {"int8": 1, "fp8": 1, "nf4": 2}  # elements
LARGEST: dict[Storage, float] = {"int8": 127.0, "fp8": 448.0, "nf4": 1.0}  # what a block's largest value becomes
ELEMENTS: dict[Storage, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


class StoredLinear(nn.Linear):
    """A Linear whose weight is frozen bytes.

    `weight` [ceil(out * in / PER_BYTE)] uint8 and `weight_scale` [ceil(out * in / 64)] bf16 are parameters, so ZeRO-3
    partitions them like others. The whole weight lives only inside the product, in the forward and again in the
    backward.
    """

    def __init__(self, layer: nn.Linear, storage: Storage) -> None:
        nn.Module.__init__(self)  # Linear's own would make a whole weight
        self.in_features, self.out_features, self.storage = layer.in_features, layer.out_features, storage
        n, device = layer.weight.numel(), layer.weight.device
        packed = torch.empty(-(-n // PER_BYTE[storage]), dtype=torch.uint8, device=device)
        scales = torch.empty(-(-n // BLOCK), dtype=torch.bfloat16, device=device)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.weight_scale = nn.Parameter(scales, requires_grad=False)
        self.register_parameter("bias", layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return _Product.apply(x, self.bias, self)

    def whole_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in] in `dtype`."""
        shape = torch.Size([self.out_features, self.in_features])
        return dequantise(self.weight, self.weight_scale, self.storage, shape, dtype)


class _Product(torch.autograd.Function):
    """x W^T + b, that keeps the layer for its backward and nothing else.

    Not even the layer's parameters as saved tensors: under ZeRO-3 they are freed in between and gathered again, and
    hooks on saved tensors would take copies.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, layer: StoredLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.whole_weight(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_x, of_bias, _ = ctx.needs_input_grad
        return (
            grad @ ctx.layer.whole_weight(grad.dtype) if of_x else None,
            grad.reshape(-1, grad.shape[-1]).sum(0) if of_bias else None,
            None,
        )


def store_linears(model: nn.Module, names: Iterable[str], storage: Storage) -> None:
    """Make StoredLinear layers of the Linear layers `names`, in place, without their values: `model` is on meta.

    Raises ConfigError if the library of a format is missing.
    """
    if storage == "nf4":
        _bitsandbytes()
    for name in names:
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear, f"{name} is {type(layer).__name__}"
        model.set_submodule(name, StoredLinear(layer, storage))


def stored_fill(fill: Fill, shapes: Mapping[str, torch.Size], storage: Storage) -> Fill:
    """Return a fill for a model with StoredLinear layers: their bytes and scales are made of what `fill` gives.

    Args:
        fill: gives the parameters of the model before `store_linears`.
        shapes: of these. A weight that is asked for in another shape is asked for in bytes.
        storage: the format.
    """

    def filled(name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        weight = name.removesuffix(SCALE)
        whole = shapes.get(weight, shape)
        if shape == whole:
            return fill(name, shape, start, stop)
        scales, n = name != weight, whole.numel()
        size = BLOCK if scales else PER_BYTE[storage]  # elements of an entry
        assert shape.numel() == -(-n // size), f"{name}: {list(shape)} asked for, made of {list(whole)}"
        stop = min(stop, shape.numel())
        last = min(-(-stop * size // BLOCK) * BLOCK, n)
        pieces = [torch.empty(0, dtype=torch.bfloat16 if scales else torch.uint8)]  # a rank's slice can be empty
        for begin in range(start * size // BLOCK * BLOCK, last if start < stop else 0, CHUNK):
            values = fill(weight, whole, begin, min(begin + CHUNK, last))
            piece = block_scales(_blocks(values), storage) if scales else quantise(values, storage)[0]
            pieces.append(piece[max(0, start - begin // size) : stop - begin // size])
        return torch.cat(pieces)

    return filled


def quantise(values: Tensor, storage: Storage) -> tuple[Tensor, Tensor]:
    """Pack elements [n] of a flattened weight, from the edge of a block on.

    Returns bytes uint8 [ceil(n / PER_BYTE)] and scales bf16 [ceil(n / 64)]. Values that are not finite do not become
    finite.
    """
    n, blocks = len(values), _blocks(values)
    scales = block_scales(blocks, storage)
    if storage == "nf4":
        packed, _ = _bitsandbytes().quantize_4bit(blocks, blocksize=BLOCK, quant_type="nf4")
        return packed.flatten()[: -(-n // 2)], scales
    scaled = blocks / torch.where(scales == 0, 1.0, scales.float())[:, None]
    scaled.clamp_(-LARGEST[storage], LARGEST[storage])
    if storage == "int8":
        scaled.round_()
    return scaled.to(ELEMENTS[storage]).view(torch.uint8).flatten()[:n], scales


def block_scales(blocks: Tensor, storage: Storage) -> Tensor:
    """Return the scales [n] bf16 of blocks [n, 64]."""
    return (blocks.abs().amax(dim=1) / LARGEST[storage]).bfloat16()


def _blocks(values: Tensor) -> Tensor:
    """[n] -> [ceil(n / 64), 64] fp32, zeros at the end."""
    return F.pad(values.float(), (0, -len(values) % BLOCK)).view(-1, BLOCK)


def dequantise(packed: Tensor, scales: Tensor, storage: Storage, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Return the weight in its `shape` and `dtype` from its bytes and scales."""
    n = shape.numel()
    if storage == "nf4":
        library = _bitsandbytes()
        flat = torch.Size([2 * len(packed)])
        state = library.QuantState(scales.float(), shape=flat, dtype=dtype, blocksize=BLOCK, quant_type="nf4")
        return library.dequantize_4bit(packed, state).flatten()[:n].view(shape)
    values = packed.view(ELEMENTS[storage]).to(dtype)
    scales = scales.to(dtype)
    full = n // BLOCK
    values[: full * BLOCK].view(-1, BLOCK).mul_(scales[:full, None])
    values[full * BLOCK :].mul_(scales[-1])
    return values.view(shape)


def _bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional as library
    except ImportError as e:
        raise ConfigError(
            f"lora.base: nf4 needs bitsandbytes ({e}): pip install -e '.[quant]', or choose int8 or fp8"
        ) from e
    return library

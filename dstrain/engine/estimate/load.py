"""What is to be trained, in counts: all that an estimate needs to know of a model and of a pack."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from dstrain.models.base import DiT
from dstrain.models.lora import as_linear
from dstrain.models.packing import PackLayout
from dstrain.models.storage import SCALE


@dataclass(frozen=True, kw_only=True)
class Load:
    """A model and the pack that a rank computes at a time."""

    width: int  # D, of the residual streams
    depth: int  # blocks
    frozen: int  # parameters that do not train and are kept as the ds_config says: bf16 or fp32
    trained: int  # parameters that train, adapters among them
    matrices: int  # of the trained ones, those that Muon takes
    stored: int = 0  # bytes of frozen weights that are kept in 8 or 4 bits, and of their scales
    stored_elements: int = 0  # the weights that these bytes stand for
    block: int = 0  # parameters of the largest block
    largest: int = 0  # elements of the largest parameter
    tensors: int = 0  # parameters, counted as tensors
    # (elements of a tensor; all elements in such tensors that are kept as the ds_config says; bytes of the others)
    sizes: tuple[tuple[int, int, int], ...] = ()
    encoder_bytes: float = 0.0  # of VAE and text encoder
    called: bool = False  # whether layers of the blocks are called, not used inside fused pieces
    samples: int = 1  # of a pack
    tokens: int = 0  # of a pack
    flops: int = 0  # of one forward over a pack
    attention_flops: int = 0  # the part of them that grows with the square of the tokens

    @property
    def parameters(self) -> int:
        """All parameters, in whatever form they are kept."""
        return self.frozen + self.trained + self.stored_elements

    def persistent(self, threshold: int, word: int) -> int:
        """Bytes, at `word` a number, of the tensors of at most `threshold` elements: ZeRO-3 keeps them on each rank."""
        return sum(word * elements + kept for size, elements, kept in self.sizes if size <= threshold)

    @property
    def train_flops(self) -> float:
        """FLOPs that a forward and a backward over a pack need: a frozen matrix has no gradient of its own."""
        matrices, share = self.flops - self.attention_flops, min(1.0, self.trained / max(1, self.parameters))
        return matrices * (2 + share) + 3 * self.attention_flops


def load_of(model: DiT, samples: Sequence[tuple[int, int]], *, encoder_bytes: float = 0.0) -> Load:
    """Count a model that is shaped as it trains (on the meta device) and a pack.

    Args:
        model: with its adapters, its low-bit layers, and requires_grad set.
        samples: (image tokens, text tokens) of each sample of the pack, each at least 1.
        encoder_bytes: of VAE and text encoder; 0 = the data are encoded already.
    """
    frozen = trained = matrices = stored = stored_elements = 0
    plain, low = defaultdict[int, int](int), defaultdict[int, int](int)
    named = list(model.named_parameters())
    layers = dict(model.named_modules())
    for name, p in named:
        layer = layers[name.rpartition(".")[0]]
        kept = p.nbytes if p.dtype is torch.uint8 else p.numel() * 2 if name.endswith(SCALE) else 0
        plain[p.numel()] += 0 if kept else p.numel()
        low[p.numel()] += kept
        if p.requires_grad:
            trained += p.numel()
            matrices += p.numel() if p.ndim == 2 else 0
        elif p.dtype is torch.uint8:
            stored += kept
            assert isinstance(layer, nn.Linear)
            stored_elements += layer.in_features * layer.out_features
        elif name.endswith(SCALE):
            stored += kept
        else:
            frozen += p.numel()
    blocks = [m for m in model.modules() if isinstance(m, model.block_class)]
    return Load(
        width=model.width,
        depth=model.depth,
        frozen=frozen,
        trained=trained,
        matrices=matrices,
        stored=stored,
        stored_elements=stored_elements,
        block=max(sum(p.numel() for p in block.parameters()) for block in blocks),
        largest=max(p.numel() for _, p in named),
        tensors=len(named),
        sizes=tuple((size, plain[size], low[size]) for size in sorted(plain)),
        encoder_bytes=encoder_bytes,
        called=any(map(_is_called, blocks)),
        samples=len(samples),
        tokens=sum(image + text for image, text in samples),
        flops=model.forward_flops(_layout(samples, 1)),
        attention_flops=sum(_quadratic(model, sample) for sample in samples),
    )


def _is_called(block: nn.Module) -> bool:
    """Whether a layer does more than fused pieces do: its weight is kept in few bits, its adapter has dropout, .."""
    layers = (m for name, m in block.named_modules() if ".lora_" not in name)
    return any(as_linear(m) is None for m in layers if isinstance(m, nn.Linear) or hasattr(m, "base_layer"))


def _layout(samples: Sequence[tuple[int, int]], scale: int) -> PackLayout:
    return PackLayout.build([[(1, 1, image * scale)] for image, _ in samples], [text * scale for _, text in samples])


def _quadratic(model: DiT, sample: tuple[int, int]) -> int:
    """FLOPs of a sample's attention: k times its tokens take f(k) = a + b k + c k^2: f(4) - 3 f(2) + 2 f(1) = 6 c."""
    one, two, four = (model.forward_flops(_layout([sample], scale)) for scale in (1, 2, 4))
    return (four - 3 * two + 2 * one) // 6

"""Bytes that a Qwen-Image block moves between its matmuls and keeps for the backward, and launches: counted, not timed.

    python benchmarks/block_traffic.py [--out benchmarks/results/block_traffic.json]

A dispatch mode sees every operation of a forward and backward on the meta device, at full size, and adds up the bytes
of the tensors that it reads and writes; matmuls and attention are left out, and views move nothing. A kernel that sums
in two stages counts as two launches, with its partial sums written and read. Exact, and the same on every machine. One
unit is a row of the width, in bf16: 2 D bytes a token. Against diffusers' block.
"""

import argparse
import json
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LEFT_OUT = ("mm", "addmm", "addmm_", "bmm", "baddbmm")  # matmuls; attention is a stand-in that moves nothing
NO_LAUNCH = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "lift_fresh", "alias")
RANK = 64  # of adapters
SAMPLES = {"one sample": [(4096, 512)], "four samples": [(1024, 128)] * 4}


def extent(x: Tensor) -> int:
    """Bytes of memory that a tensor's elements lie in: an expanded dimension is one element wide."""
    steps = [size for size, stride in zip(x.shape, x.stride()) if stride != 0]
    elements = 1
    for size in steps:
        elements *= size
    return elements * x.element_size() if x.numel() else 0


class Traffic(TorchDispatchMode):
    """Counts what the operations under it read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        written = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        mutates = func._schema.is_mutable
        storages = {x.untyped_storage()._cdata for x in read}
        is_view = not mutates and all(x.untyped_storage()._cdata in storages for x in written)
        if name in LEFT_OUT or name in NO_LAUNCH or (is_view and written):
            return result
        if name in ("copy_", "fill_", "zero_"):
            read = read[1:]  # what is overwritten is not read
        self.bytes[name] += sum(map(extent, read)) + sum(map(extent, written))
        self.launches[name] += 1
        if func.namespace == "dstrain" and (sums := partial_sums(name, args)):
            self.bytes[f"{name}: partial sums"] += 2 * 4 * sums
            self.launches[f"{name}: second stage"] += 1
        return result


def partial_sums(name: str, args: Any) -> int:
    """How many fp32 numbers the first stage of a backward leaves to the second."""
    from dstrain.kernels import gelu, qk_norm_rope

    if name == "norm_modulate_backward":
        return 2 * len(args[7]) * args[1].shape[1]
    if name == "gated_norm_modulate_backward":
        return (4 if args[4] else 3) * len(args[11]) * args[2].shape[1]
    if name == "gated_residual_backward":
        return (2 if args[2] else 1) * len(args[5]) * args[1].shape[1]
    if name == "gelu_backward":
        rows, width = args[1].shape
        return -(-rows // gelu.chunk_rows(rows)) * width
    if name == "qk_norm_rope_backward":
        rows, heads, d = args[2].shape
        groups = -(-heads // qk_norm_rope._sizes(args[2], args[10])["HB"])
        size = qk_norm_rope.backward_chunk_rows(rows, groups)
        return 2 * -(-rows // size) * (heads + groups) * d
    return 0


class Attention(torch.autograd.Function):
    """Moves nothing; keeps what flash attention keeps. q, k, v [..., L, H, d] or transposed."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])  # type: ignore[return-value]


def attention(*args: Any, **named: Any) -> Tensor:
    """Take the place of packed_attention and of scaled_dot_product_attention, which is called with names."""
    return Attention.apply(*(args or (named["query"], named["key"], named["value"]))[:3])


def measure(run: Any, parameters: list[Tensor], unit: int) -> dict[str, Any]:
    """Count a forward and a backward of `run`, which returns its results."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage()._cdata for p in parameters}
    alive = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(x)  # else another tensor may get its address
        return x

    forward, backward = Traffic(), Traffic()
    with saved_tensors_hooks(pack, lambda x: x), forward:
        results = run()
    with backward:
        torch.autograd.backward(results, [torch.empty_like(x) for x in results])

    def units(counted: Counter[str]) -> dict[str, float]:
        return {name: round(n / unit, 2) for name, n in counted.most_common()}

    return {
        "traffic": round((forward.bytes.total() + backward.bytes.total()) / unit, 2),
        "kept": round(sum(kept.values()) / unit, 2),
        "launches": forward.launches.total() + backward.launches.total(),
        "forward": {"units": round(forward.bytes.total() / unit, 2), "launches": dict(forward.launches)},
        "backward": {"units": round(backward.bytes.total() / unit, 2), "launches": dict(backward.launches)},
        "units_by_operation": units(forward.bytes + backward.bytes),
    }


def ours(samples: list[tuple[int, int]], kernels: str, dim: int, heads: int, rank: int = 0) -> dict[str, Any]:
    """Count our block, on a pack of samples with so many image and text tokens; with a rank only adapters train."""
    from dstrain.kernels.modulation_ops import norm_chunks, residual_chunks
    from dstrain.models import qwen_image
    from dstrain.models.packing import PackLayout

    d = dim // heads
    side = d // 8 * 3 // 2 * 2  # channels that turn with a row's y, and with its x
    layout = PackLayout.build([[(1, 1, i)] for i, _ in samples], [t for _, t in samples]).to("meta")
    rotary = qwen_image.rotary_table(layout, (d - 2 * side, side, side))
    with torch.device("meta"):
        block = qwen_image.QwenImageBlock(dim, heads, "tanh", last=False).bfloat16()
        if rank:
            adapt(block, rank)
        x = torch.empty(layout.tokens, dim, dtype=torch.bfloat16, requires_grad=True)
        cond = torch.empty(len(samples), dim, dtype=torch.bfloat16, requires_grad=True)
    norm_chunks(layout.segments), residual_chunks(layout.segments)  # made once for all blocks
    with mock.patch.object(qwen_image, "packed_attention", attention):
        return measure(
            lambda: block(x, cond, rotary, layout, kernels), list(block.parameters()), layout.tokens * dim * 2
        )


def adapt(block: torch.nn.Module, rank: int) -> None:
    """Put an adapter on each of the block's layers that have one by default."""
    from peft import LoraConfig, inject_adapter_in_model

    from dstrain.models.qwen_image import LORA_LAYERS

    inject_adapter_in_model(LoraConfig(r=rank, target_modules=list(LORA_LAYERS)), block)
    block.bfloat16()
    for name, p in block.named_parameters():
        p.requires_grad_(".lora_" in name)


def diffusers(samples: list[tuple[int, int]], dim: int, heads: int, rank: int = 0) -> dict[str, Any]:
    """Count diffusers' block on one sample; with a rank only adapters by PEFT train."""
    from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

    ((image, text),) = samples
    with torch.device("meta"):
        block = QwenImageTransformerBlock(dim, heads, dim // heads).bfloat16()
        if rank:
            adapt(block, rank)
        img, txt = (torch.empty(1, n, dim, dtype=torch.bfloat16, requires_grad=True) for n in (image, text))
        temb = torch.empty(1, dim, dtype=torch.bfloat16, requires_grad=True)
        rotary = tuple(torch.empty(n, dim // heads // 2, dtype=torch.complex64) for n in (image, text))
    with mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention):
        return measure(
            lambda: block(img, txt, None, temb, image_rotary_emb=rotary),
            list(block.parameters()),
            (image + text) * dim * 2,
        )


def main() -> None:
    """Count all, print a table, and write the data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=3072)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {}
    for what, rank in {"": 0, ", LoRA": RANK}.items():
        found[f"diffusers, one sample{what}"] = diffusers(SAMPLES["one sample"], args.dim, args.heads, rank)
        for name, samples in SAMPLES.items():
            for kernels in ("reference", "triton"):
                found[f"dstrain {kernels}, {name}{what}"] = ours(samples, kernels, args.dim, args.heads, rank)
    print(f"{'units of 2 D bytes a token':38s} {'moved':>8s} {'kept':>8s} {'launches':>9s}")
    for name, counted in found.items():
        print(f"{name:38s} {counted['traffic']:8.1f} {counted['kept']:8.2f} {counted['launches']:9d}")
    if args.out:
        what = "forward and backward of one block, matmuls and attention left out; units of 2 D bytes a token"
        data = {"what": what, "dim": args.dim, "heads": args.heads, "rank": RANK, "samples": SAMPLES, "counted": found}
        args.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()

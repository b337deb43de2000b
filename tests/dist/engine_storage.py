"""Runs on each rank: adapters on weights in 8 and 4 bits against plain PyTorch on the same, rounded, weights."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from engine_parity import batches, fill, loss_sum, recipe
from torch import nn

from dstrain.config import LoraConfig
from dstrain.engine import distributed
from dstrain.engine.ds_config import complete
from dstrain.engine.engine import Engine, build_engine
from dstrain.models.lora import add_adapters, plain_name, target_layers
from dstrain.models.qwen_image import QwenImageDiT, QwenImageParams
from dstrain.models.storage import StoredLinear, dequantise, quantise, store_linears, stored_fill

# 12 x 12 weights: two and a quarter blocks of 64, so that the halves of two ranks begin inside a block
PARAMS = QwenImageParams(
    num_layers=2, attention_head_dim=6, num_attention_heads=2, joint_attention_dim=48, axes_dims_rope=(2, 2, 2)
)
LORA = LoraConfig(rank=2, alpha=4.0)


def make(kind: str | None) -> QwenImageDiT:
    model = QwenImageDiT(PARAMS)
    model.activations = ("full", "attention")
    layers = target_layers(model, LORA.targets)
    if kind:
        store_linears(model, linears(model), kind)
    add_adapters(model, LORA, layers)
    return model


def linears(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if type(m) is nn.Linear and n.startswith("transformer_blocks.")]


def base_shapes() -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in QwenImageDiT(PARAMS).named_parameters()}


def whole(name: str) -> torch.Tensor:
    shape = base_shapes()[name]
    return fill(name, shape, 0, shape.numel())


def plain_copy(kind: str) -> QwenImageDiT:
    """The model with the rounded weights as ordinary ones."""
    with torch.device("meta"):
        model = make(None)
        rounded = {f"{name}.weight" for name in linears(QwenImageDiT(PARAMS))}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    model.to_empty(device="cpu")
    with torch.no_grad():
        for n, p in model.named_parameters():
            name = plain_name(n)
            values = fill(name, p.shape, 0, p.numel()).view(p.shape)
            if name in rounded:
                values = dequantise(*quantise(values.flatten(), kind), kind, p.shape, torch.float32)
            p.copy_(values)
            p.requires_grad_(n in trained)
    return model


def held(engine: Engine) -> tuple[int, int]:
    """Bytes of stored weights and scales that this rank has as its shards, and as whole tensors."""
    shards = gathered = 0
    for name, p in engine.module.named_parameters():
        if p.dtype == torch.uint8 or name.endswith("_scale"):
            shards += p.ds_tensor.untyped_storage().nbytes() if hasattr(p, "ds_tensor") else 0
            gathered += p.data.untyped_storage().nbytes()
    return shards, gathered


def unchanged(engine: Engine, kind: str) -> bool:
    """Whether the gathered bytes and scales of all layers are those of the whole weights; collective."""
    rounded = base_shapes()
    same, seen = True, 0
    for name, tensor in engine.parameters_gathered():
        weight = name.removesuffix("_scale")
        if weight in rounded and tensor.shape != rounded[weight]:
            packed, scales = quantise(whole(weight), kind)
            want = packed if name == weight else scales
            same &= torch.equal(tensor.to(want.dtype), want) and (name != weight or tensor.dtype == torch.uint8)
            seen += 1
    assert seen == 2 * sum(isinstance(m, StoredLinear) for m in engine.module.modules()) > 0
    return same


def train(cases: dict[str, tuple[dict[str, Any], str, bool]]) -> dict[str, dict[str, Any]]:
    """Two steps per case (ds_config, format, bf16); what was seen, and what plain PyTorch has."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    world, results = distributed.start(), {}
    for case, (ds, kind, bf16) in cases.items():
        config = complete(ds, recipe(8), world_size=world.size, bf16=bf16, path=Path("ds.json"))
        values = stored_fill(fill, base_shapes(), kind)
        engine = build_engine(partial(make, kind), values, config, world.device)
        plain = plain_copy(kind)
        twins = {plain_name(n): p for n, p in plain.named_parameters() if p.requires_grad}
        before = held(engine)
        rows, gaps = [], []
        for step in range(2):
            packs = batches(step, 2, world.size)
            total = sum(len(p[3]) for p in packs)
            ours = torch.zeros(())
            for j in range(2):
                loss = loss_sum(engine, packs[j * world.size + world.rank]) / total
                engine.backward(loss, last=j == 1)
                ours += loss.detach()
            want = sum(loss_sum(plain, p) for p in packs) / total
            plain.zero_grad()
            want.backward()
            if step == 0:  # the weights are still equal to the last bit
                for n, p in engine.module.named_parameters():
                    if p.requires_grad:
                        grad, twin = safe_get_full_grad(p), twins[plain_name(n)].grad
                        gaps.append(float((grad - twin).norm() / twin.norm()))
            engine.step(1.0)
            with torch.no_grad():
                engine(*packs[0])
                for n, p in engine.module.named_parameters():
                    if p.requires_grad:
                        twins[plain_name(n)].copy_(safe_get_full_fp32_param(p))
            rows.append((float(distributed.sum_over_ranks(ours)), want.item()))
        results[case] = {
            "losses": rows,
            "gradients": (len(gaps), max(gaps)),
            "held": (before, held(engine)),
            "expected": expected_bytes(kind, bf16, world.size),
            "unchanged": unchanged(engine, kind),
        }
    return results


def expected_bytes(kind: str, bf16: bool, world: int) -> tuple[int, int]:
    """Bytes of a rank's shards and of the whole tensors; the engine keeps scales in the dtype of the run."""
    with torch.device("meta"):
        model = make(kind)
    sizes = [
        (p.numel(), 1 if p.dtype == torch.uint8 else 2 if bf16 else 4)
        for name, p in model.named_parameters()
        if p.dtype == torch.uint8 or name.endswith("_scale")
    ]
    return sum(-(-n // world) * size for n, size in sizes), sum(n * size for n, size in sizes)

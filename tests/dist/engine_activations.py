"""Runs on each rank: ZeRO-3 under every activation policy, built with plain DeepSpeed calls."""

from typing import Any

import deepspeed
import torch
from deepspeed.utils import set_z3_leaf_modules
from engine_parity import PARAMS, batches, loss_sum

from dstrain.engine import distributed
from dstrain.models import activations
from dstrain.models.qwen_image import QwenImageDiT


def build(keep: tuple[str, ...], frozen: tuple[str, ...], leaf: bool, zero: dict[str, Any]):
    """An engine whose model has noise everywhere, so that every branch has a gradient."""
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, **zero},
    }
    with deepspeed.zero.Init(config_dict_or_path=config):
        model = QwenImageDiT(PARAMS)
    noise = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        p.requires_grad_(name not in model.unused and not name.startswith(frozen))
        values = torch.randn(p.ds_shape, generator=noise) * 0.05
        start = torch.distributed.get_rank() * p.ds_tensor.numel()
        mine = values.flatten()[start : start + p.ds_tensor.numel()]
        p.ds_tensor.data[: len(mine)].copy_(mine)
    if leaf:
        set_z3_leaf_modules(model, [model.block_class])
    model.activations = keep
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(trained, lr=1e-3, eps=1e-4), config=config
    )
    return engine


def train(engine, world: distributed.World, micros: list[int]) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step; before each, a forward without gradient as sampling does it."""
    rows = []
    for step, m in enumerate(micros):
        packs = batches(step, m, world.size)
        with torch.no_grad():
            engine(*packs[0])
        total = torch.zeros(())
        for j in range(m):
            engine.set_gradient_accumulation_boundary(j == m - 1)
            loss = loss_sum(engine, packs[j * world.size + world.rank]) / len(packs)
            engine.backward(loss)
            engine.step()
            total += loss.detach()
        rows.append((float(distributed.sum_over_ranks(total)), float(engine.get_global_grad_norm())))
    return rows


def policies(cases: dict[str, tuple[tuple[str, ...], bool, dict[str, Any]]], keeps: list[tuple[str, ...]]) -> dict:
    """The rows of `train` by case (frozen, leaf blocks, ZeRO's settings) and policy; every stream is copied here."""
    world = distributed.start()
    activations.SMALLEST = 0
    return {name: [train(build(keep, *case), world, [1, 3]) for keep in keeps] for name, case in cases.items()}

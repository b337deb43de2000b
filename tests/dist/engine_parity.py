"""Runs on each rank: the engine against plain PyTorch on the same global batches."""

import math
from pathlib import Path

import torch

from dstrain.config import Recipe, build
from dstrain.engine import distributed
from dstrain.engine.ds_config import complete
from dstrain.engine.engine import build_engine
from dstrain.models.init import initial_slice
from dstrain.models.packing import PackLayout
from dstrain.models.qwen_image import QwenImageDiT, QwenImageParams

PARAMS = QwenImageParams(
    num_layers=3, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=48, axes_dims_rope=(8, 12, 12)
)
SPECS = [(4, 4, 7), (2, 5, 3), (3, 3, 5), (1, 6, 9), (4, 2, 2)]
LR = 3e-3
CLIP = 0.5


def recipe(batch: int) -> Recipe:
    return build(
        Recipe,
        {
            "run_dir": "x",
            "model": {"path": "x"},
            "data": {"shards": ["x"]},
            "batch": {"global_batch_size": batch},
            "train": {"steps": 10},
            # a large eps: gradients that are zero but for rounding must not become whole steps
            "optimizer": {"weight_decay": 0.1, "eps": 1e-4},
        },
        "test",
    )


def make() -> QwenImageDiT:
    model = QwenImageDiT(PARAMS)
    model.activation_checkpointing = True
    return model


def fill(name, shape, start, stop):
    """Seeded start, with noise where adaLN-Zero has zeros, so that every branch has a gradient from step 0."""
    return initial_slice(_Noisy, name, shape, 7, start, stop)


class _Noisy:
    @staticmethod
    def initial(name, shape):
        mean, std = QwenImageDiT.initial(None, name, shape)
        return mean, max(std, 0.03)


def batches(step: int, micros: int, world: int):
    g = torch.Generator().manual_seed(100 + step)
    packs = []
    for i in range(micros * world):
        specs = [SPECS[(i + j + step) % len(SPECS)] for j in range(1 + (i + step) % 3)]
        layout = PackLayout.build([[(1, h, w)] for h, w, _ in specs], [t for *_, t in specs])
        packs.append(
            (
                torch.randn(sum(layout.image_lens), 64, generator=g),
                torch.randn(sum(layout.text_lens), 48, generator=g),
                torch.rand(len(specs), generator=g),
                layout,
            )
        )
    return packs


def loss_sum(model, pack):
    x, c, sigmas, layout = pack
    v = model(x, c, sigmas, layout).float()
    return sum(((p - q) ** 2).mean() for p, q in zip(v.split(layout.image_lens), x.split(layout.image_lens)))


def parity(stages: dict[str, dict], micros: list[int]) -> dict[str, list[tuple[float, ...]]]:
    """Per ds_config: (our loss, plain loss, our grad norm, plain grad norm) a step, then the largest weight gap."""
    world = distributed.start()
    results = {}
    for name, ds in stages.items():
        ds = complete(ds, recipe(8), world_size=world.size, bf16=False, path=Path("ds.json"))
        engine = build_engine(make, fill, ds, world.device)
        plain = make()
        with torch.no_grad():
            for n, p in plain.named_parameters():
                p.copy_(fill(n, p.shape, 0, p.numel()).view(p.shape))
        matrices = [p for p in plain.parameters() if p.ndim > 1]
        vectors = [p for p in plain.parameters() if p.ndim == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=LR, eps=1e-4)
        rows = []
        for step, m in enumerate(micros):
            packs = batches(step, m, world.size)
            total = sum(len(p[3]) for p in packs)
            ours = torch.zeros(())
            for j in range(m):
                loss = loss_sum(engine, packs[j * world.size + world.rank]) / total
                engine.backward(loss, last=j == m - 1)
                ours += loss.detach()
            norm = engine.step(LR)
            with torch.no_grad():  # a forward in between, as sampling does
                engine(*packs[0])
            want = sum(loss_sum(plain, p) for p in packs) / total
            optimizer.zero_grad()
            want.backward()
            for p in plain.parameters():  # the last block's text branch feeds nothing; DeepSpeed decays it all the same
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            want_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), CLIP)
            optimizer.step()
            rows.append((float(distributed.sum_over_ranks(ours)), want.item(), norm, want_norm.item()))
        gap = max(float((p - q).abs().max()) for (_, p), q in zip(engine.parameters_gathered(), plain.parameters()))
        results[name] = [*rows, (gap,)]
        assert all(math.isfinite(x) for x in rows[-1])
    return results

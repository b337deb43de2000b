"""Runs on each rank: the engine against plain PyTorch on the same global batches."""

import math
from functools import partial
from pathlib import Path

import torch

from dstrain.config import LoraConfig, Recipe
from dstrain.engine import distributed
from dstrain.engine.ds_config import complete
from dstrain.engine.engine import build_engine
from dstrain.knobs import build
from dstrain.models.init import initial_slice
from dstrain.models.lora import plain_name
from dstrain.models.packing import PackLayout
from dstrain.models.qwen_image import QwenImageDiT, QwenImageParams
from dstrain.models.trained import choose_trained

PARAMS = QwenImageParams(
    num_layers=3, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=48, axes_dims_rope=(8, 12, 12)
)
SPECS = [(4, 4, 7), (2, 5, 3), (3, 3, 5), (1, 6, 9), (4, 2, 2)]
LR = 3e-3
CLIP = 0.5


def recipe(batch: int, optimizer: str = "adamw") -> Recipe:
    return build(
        Recipe,
        {
            "run_dir": "x",
            "model": {"path": "x"},
            "data": {"shards": ["x"]},
            "batch": {"global_batch_size": batch},
            "train": {"steps": 10},
            # a large eps: gradients that are zero but for rounding must not become whole steps
            "optimizer": {"name": optimizer, "lr": LR, "weight_decay": 0.1, "eps": 1e-4},
        },
        "test",
    )


LORAS = {
    "full": LoraConfig(),
    "lora": LoraConfig(rank=4, alpha=8.0),
    "dora": LoraConfig(rank=3, dora=True, rslora=True, init="gaussian", targets=["attn.to_q", "img_mlp.*"]),
}
PATTERNS = {"blocks": ["transformer_blocks.*", "!*_mod.*"]}


def make(what: str = "full", params: QwenImageParams = PARAMS) -> QwenImageDiT:
    """The model as `what` trains it; "lora triton" is "lora" with the kernels, interpreted.

    With "compiled" behind that the rest goes through torch.compile, that is through Dynamo and AOTAutograd.
    """
    model = QwenImageDiT(params)
    what, kernel, compiled = (*what.split(), "", "")[:3]
    model.kernel = kernel or "reference"
    if compiled:
        for module in (model.time_text_embed, model.img_in, model.txt_in, model.norm_out, model.proj_out):
            module.compile(backend="aot_eager")
    model.activations = ("full", "none", "attention")
    choose_trained(model, PATTERNS.get(what, ["*"]), LORAS.get(what, LORAS["full"]))
    return model


def fill(name, shape, start, stop):
    """Seeded start, with noise where adaLN-Zero and LoRA have zeros: every branch has a gradient from step 0."""
    return initial_slice(_Noisy, name, shape, 7, start, stop)


class _Noisy:
    @staticmethod
    def initial(name, shape):
        if "magnitude" in name:
            return 1.0, 0.1
        mean, std = QwenImageDiT.initial(None, name, shape)
        return mean, max(std, 0.03)


def plain_copy(what: str = "full", params: QwenImageParams = PARAMS) -> QwenImageDiT:
    """The same model as one process has it."""
    with torch.device("meta"):
        model = make(what, params)
    trained = {n: p.requires_grad for n, p in model.named_parameters()}
    model.to_empty(device="cpu")
    model.kernel = "reference"
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(fill(plain_name(n), p.shape, 0, p.numel()).view(p.shape))
            p.requires_grad_(trained[n])
    return model


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


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in trained if (p.ndim > 1) == matrix] for matrix in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LR, eps=1e-4)


def side_by_side(engine, plain, optimizer, micros, world, clip) -> list[tuple[float, float, float, float]]:
    """Steps of the engine and of plain PyTorch on the same batches: (our loss, plain loss, our norm, plain norm)."""
    rows = []
    for step, m in enumerate(micros):
        packs = batches(step, m, world.size)
        total = sum(len(p[3]) for p in packs)
        ours = torch.zeros(())
        for j in range(m):
            loss = loss_sum(engine, packs[j * world.size + world.rank]) / total
            engine.backward(loss, last=j == m - 1)
            ours += loss.detach()
        norm = engine.step(1.0, step)
        with torch.no_grad():  # a forward in between, as sampling does
            engine(*packs[0])
        want = sum(loss_sum(plain, p) for p in packs) / total
        plain.zero_grad()
        want.backward()
        trained = [p for p in plain.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained)
        want_norm = torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        rows.append((float(distributed.sum_over_ranks(ours)), want.item(), norm, want_norm.item()))
    return rows


def gap(engine, plain) -> float:
    """The largest difference of a weight; collective."""
    return max(float((p - q).abs().max()) for (_, p), q in zip(engine.parameters_gathered(), plain.parameters()))


def parity(cases: dict[str, tuple[dict, str]], micros: list[int]) -> dict[str, list[tuple[float, ...]]]:
    """Per case (ds_config, what trains): (our loss, plain loss, our norm, plain norm) a step, then the weight gap."""
    world = distributed.start()
    results = {}
    for name, (ds, what) in cases.items():
        ds = complete(ds, recipe(8), world_size=world.size, bf16=False, path=Path("ds.json"))
        engine = build_engine(partial(make, what), fill, ds, world.device)
        whole = "leaf_module" not in ds["zero_optimization"]
        assert all(block.gathered == whole for block in engine.module.transformer_blocks)
        plain = plain_copy(what)
        optimizer = optimizer_of(plain)
        rows = side_by_side(engine, plain, optimizer, micros, world, CLIP)
        results[name] = [*rows, (gap(engine, plain),)]
        assert all(math.isfinite(x) for x in rows[-1])
    return results

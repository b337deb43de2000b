"""Runs on each rank: a ds_config, an optimizer and what trains, against plain PyTorch on the same global batches."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from deepspeed.runtime.zero.partition_parameters import PartitionedParamStatus
from deepspeed.utils import groups
from engine_parity import PARAMS, fill, gap, make, plain_copy, recipe, side_by_side
from engine_resume import everything, save, steps

from dstrain.engine import distributed
from dstrain.engine.ds_config import complete
from dstrain.engine.engine import Engine, build_engine
from dstrain.engine.state import State

MICROS = [1, 3, 2, 1]  # of a step
# Only pieces of 1 MiB and more go to NVMe: on two ranks, 768 x 768 of fp32.
WIDE = dataclasses.replace(
    PARAMS, num_layers=2, attention_head_dim=128, num_attention_heads=6, axes_dims_rope=(16, 56, 56)
)


class Case(NamedTuple):
    ds: dict
    what: str = "full"
    bf16: bool = False
    optimizer: str = "adamw"
    wide: bool = False
    folder: str = ""  # where to save, and to continue from; "" = no more than the steps


class Followed(NamedTuple):
    """By step: our loss, plain loss, our norm, plain norm. Then the largest weight gap, and how far weights moved.

    How many parameters and sub-groups lay in files after the last step; whether two more steps after a restart had the
    bits of two steps without one.
    """

    steps: list[tuple[float, float, float, float]]
    gap: float
    moved: float
    in_files: tuple[int, int]
    resumed: bool = False


def follow(cases: dict[str, Case]) -> dict[str, Followed]:
    world = distributed.start()
    return {name: _follow(case, world) for name, case in cases.items()}


def _follow(case: Case, world) -> Followed:
    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None  # hpZ's, one a process
    wanted = recipe(8)
    wanted = dataclasses.replace(wanted, optimizer=dataclasses.replace(wanted.optimizer, name=case.optimizer))
    params = WIDE if case.wide else PARAMS
    plain = plain_copy(case.what, params)
    config = complete(
        case.ds,
        wanted,
        world_size=world.size,
        bf16=case.bf16,
        path=Path("ds.json"),
        block=sum(p.numel() for p in plain.transformer_blocks[0].parameters()),
        largest=max(p.numel() for p in plain.parameters()),
    )
    if config["zero_optimization"]["stage"] == 3:
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0  # or all of so small a model would stay
    build = partial(build_engine, partial(make, case.what, params), config=config, device=world.device)
    engine = build(fill)
    if case.bf16:
        with torch.no_grad():
            for p in plain.parameters():
                p.copy_(p.bfloat16())
    start = [p.detach().clone() for p in plain.parameters()]
    optimizer = Plain(plain, wanted.optimizer)
    clip = config["gradient_clipping"] or float("inf")
    rows = side_by_side(engine, plain, optimizer, MICROS, world, clip)
    moved = max(float((p - q).abs().max()) for p, q in zip(plain.parameters(), start))
    found = Followed(rows, gap(engine, plain), moved, _in_files(engine))
    if case.folder:
        return found._replace(resumed=_resumed(engine, build, Path(case.folder), world))
    engine.ds.destroy()
    return found


def _in_files(engine: Engine) -> tuple[int, int]:
    shards = [p.ds_tensor for p in engine.module.parameters() if hasattr(p, "ds_tensor")]
    away = sum(shard.status == PartitionedParamStatus.NOT_AVAILABLE for shard in shards)
    return away, sum(group.fetch is not None for group in engine.master.groups)


def _resumed(engine: Engine, build, folder: Path, world) -> bool:
    """Two steps more, straight and after a restart; the engines follow each other, for they have the same files."""
    path = save(engine, folder, 4, keep=3)
    straight = steps(engine, 4, 6, world)
    end = everything(save(engine, folder, 6, keep=3))
    engine.ds.destroy()
    state = State(path)

    def values(name, shape, start, stop):
        return state.read("weight", name, start, stop) if name in state.shapes else fill(name, shape, start, stop)

    other = build(values)
    other.master.restore(state)
    again = steps(other, 4, 6, world)
    same = everything(save(other, folder, 7, keep=3))
    other.ds.destroy()
    return again == straight and end.keys() == same.keys() and all(torch.equal(end[k], same[k]) for k in end)


class Plain:
    """AdamW by PyTorch, and for Muon's matrices Muon, written from its description."""

    def __init__(self, model, o) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        # DeepSpeed gives Muon every matrix that is no embedding by its name
        muon = [p for n, p in named if o.name == "muon" and p.ndim == 2 and "embed" not in n]
        rest = [p for _, p in named if not any(p is q for q in muon)]
        matrices, vectors = ([p for p in rest if (p.ndim > 1) == matrix] for matrix in (True, False))
        decayed = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW([g for g in decayed if g["params"]], lr=o.lr, eps=o.eps) if rest else None
        self.muon = [(p, torch.zeros_like(p)) for p in muon]
        self.o = o

    @torch.no_grad()
    def step(self) -> None:
        if self.adam:
            self.adam.step()
        for p, momentum in self.muon:
            momentum.lerp_(p.grad, 1 - self.o.momentum)
            update = orthogonal(p.grad.lerp(momentum, self.o.momentum)) * max(1, p.shape[0] / p.shape[1]) ** 0.5
            p.mul_(1 - self.o.muon_lr * self.o.weight_decay).sub_(update, alpha=self.o.muon_lr)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps with the coefficients of Muon (Jordan et al., 2024)."""
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x

"""Runs on each rank: save and continue at every stage and precision, and what a save that fails leaves behind."""

import errno
from pathlib import Path

import torch
from engine_parity import LR, batches, fill, loss_sum, make, recipe

from dstrain.engine import checkpoint, distributed
from dstrain.engine.ds_config import complete
from dstrain.engine.engine import Engine, build_engine
from dstrain.errors import CheckpointError


def build(ds: dict, bf16: bool, world) -> Engine:
    config = complete(ds, recipe(8), world_size=world.size, bf16=bf16, path=Path("ds.json"))
    return build_engine(make, fill, config, world.device)


def steps(engine: Engine, first: int, last: int, world) -> list[str]:
    """Hex losses and norms of the steps [first, last), two micro-steps each."""
    rows = []
    for step in range(first, last):
        packs = batches(step, 2, world.size)
        total = sum(len(p[3]) for p in packs)
        for j in range(2):
            loss = loss_sum(engine, packs[j * world.size + world.rank]) / total
            engine.backward(loss, last=j == 1)
            rows.append(loss.item().hex())
        rows.append(engine.step(LR).hex())
    return rows


def resume(stages: dict[str, tuple[dict, bool]], tmp: str) -> dict[str, bool]:
    """Whether steps 2 and 3 have the same bits after a restart, and the settings of the new config."""
    world = distributed.start()
    results = {}
    for name, (ds, bf16) in stages.items():
        folder = Path(tmp) / name
        engine = build(ds, bf16, world)
        steps(engine, 0, 2, world)
        path = checkpoint.save(engine, folder, 2, {}, keep=2)
        straight = steps(engine, 2, 4, world)
        other = build(ds, bf16, world)
        assert checkpoint.find(folder) == path
        assert checkpoint.load(other, path) == 2
        results[name] = steps(other, 2, 4, world) == straight
        changed = build({**ds, "gradient_clipping": 0.125}, bf16, world)
        changed._settings[0]["weight_decay"] = 0.7
        checkpoint.load(changed, path)
        assert changed.ds.optimizer.param_groups[0]["weight_decay"] == 0.7, name
        assert getattr(changed.ds.optimizer, "clip_grad", 0.125) == 0.125, name
    return results


def full_disk(tmp: str) -> tuple[str, list[str]]:
    """What all ranks are told, and what is left, when one rank's disk is full."""
    world = distributed.start()
    engine = build({"zero_optimization": {"stage": 3}}, False, world)
    folder = Path(tmp) / "checkpoints"
    checkpoint.save(engine, folder, 1, {}, keep=2)
    if world.rank == 1:

        def no_space(state_dict, path):
            raise OSError(errno.ENOSPC, "No space left on device")

        engine.ds.checkpoint_engine.save = no_space
    said = ""
    try:
        checkpoint.save(engine, folder, 2, {}, keep=2)
    except CheckpointError as e:
        said = str(e)
    left = sorted(p.name for p in folder.iterdir())
    return said, left


def bad_gradient(stages: dict[str, dict]) -> dict[str, bool]:
    """Whether a gradient that is not finite on rank 1 leaves every weight as it was."""
    world = distributed.start()
    results = {}
    for name, ds in stages.items():
        engine = build(ds, False, world)
        steps(engine, 0, 1, world)
        before = {n: p.clone() for n, p in engine.parameters_gathered()}
        loss = loss_sum(engine, batches(1, 1, world.size)[world.rank])
        engine.backward(loss * (float("inf") if world.rank == 1 else 1.0), last=True)
        norm = engine.step(LR)
        same = all(torch.equal(p, before[n]) for n, p in engine.parameters_gathered())
        results[name] = same and not torch.isfinite(torch.tensor(norm)).item()
    return results

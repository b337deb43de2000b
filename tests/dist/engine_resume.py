"""Runs on each rank: save and continue at every stage, precision and world size, averages, and failed saves."""

import json
import os
from functools import partial
from pathlib import Path

import torch
from engine_parity import batches, fill, loss_sum, make, recipe

from dstrain.engine import checkpoint, distributed
from dstrain.engine.ds_config import complete
from dstrain.engine.engine import Engine, build_engine
from dstrain.engine.saver import Saver
from dstrain.engine.state import State
from dstrain.errors import CheckpointError

PACKS = 4  # of a step: dealt to ranks and micro-steps, the same at 1, 2 and 4 ranks


def build(
    ds: dict,
    bf16: bool,
    world,
    what: str = "full",
    saved: Path | None = None,
    ema: float = 0.9,
    optimizer: str = "adamw",
) -> Engine:
    config = complete(ds, recipe(8, optimizer), world_size=world.size, bf16=bf16, path=Path("ds.json"))
    state = State(saved) if saved else None

    def values(name, shape, start, stop):
        if state and name in state.shapes:
            return state.read("weight", name, start, stop)
        return fill(name, shape, start, stop)

    engine = build_engine(partial(make, what), values, config, world.device, ema_decay=ema)
    if state:
        engine.master.restore(state)
    return engine


def save(engine: Engine, folder: Path, step: int, keep: int) -> Path:
    saver = Saver(engine.master, folder, keep=keep)
    saver.begin(step, {})
    return saver.commit()


def steps(engine: Engine, first: int, last: int, world) -> list[float]:
    """Losses and norms of the steps [first, last)."""
    rows = []
    for step in range(first, last):
        packs = batches(step, PACKS, 1)
        total = sum(len(p[3]) for p in packs)
        mine = packs[world.rank :: world.size]
        ours = torch.zeros((), dtype=torch.float64)
        for j, pack in enumerate(mine):
            loss = loss_sum(engine, pack) / total
            engine.backward(loss, last=j == len(mine) - 1)
            ours += loss.detach()
        rows += [float(distributed.sum_over_ranks(ours)), engine.step(1.0, step)]
    return rows


def everything(folder: Path) -> dict[str, torch.Tensor]:
    state = State(folder)
    return {
        f"{kind}:{n}": state.read(kind, n) for kind in sorted(state.kinds) for n in state.shapes if state.has(kind, n)
    }


def resume(cases: dict[str, tuple[dict, bool, str]], tmp: str) -> dict[str, list[tuple[bool, bool]]]:
    """After restarts at steps 1 and 2: whether steps up to 4, and weights, moments and averages, have the same bits."""
    world = distributed.start()
    results = {}
    for name, (ds, bf16, what) in cases.items():
        folder = Path(tmp) / name
        engine = build(ds, bf16, world, what)
        rows, saved = [], {}
        for step in range(4):
            rows += steps(engine, step, step + 1, world)
            if step < 2:
                saved[step + 1] = save(engine, folder, step + 1, keep=9)
        end = everything(save(engine, folder, 4, keep=9))
        results[name] = []
        for step, path in saved.items():
            assert checkpoint.damage(path) == ""
            other = build(ds, bf16, world, what, saved=path)
            again = steps(other, step, 4, world)
            same = everything(save(other, folder, 4 + step, keep=9))
            equal = end.keys() == same.keys() and all(torch.equal(end[k], same[k]) for k in end)
            results[name].append((again == rows[2 * step :], equal))
    return results


def other_optimizers(cases: dict[str, tuple[dict, str]], tmp: str) -> dict[str, tuple[list[float], list[float]]]:
    """Per case (ds_config, optimizer): losses and norms of steps 2 and 3, straight and after a restart."""
    world = distributed.start()
    results = {}
    for name, (ds, optimizer) in cases.items():
        engine = build(ds, False, world, optimizer=optimizer)
        steps(engine, 0, 2, world)
        path = save(engine, Path(tmp) / name, 2, keep=3)
        straight = steps(engine, 2, 4, world)
        other = build(ds, False, world, saved=path, optimizer=optimizer)
        results[name] = straight, steps(other, 2, 4, world)
    return results


def run_and_save(ds: dict, what: str, folder: str, first: int, last: int, saved: str = "") -> list[float]:
    """Steps [first, last) from a checkpoint or the start, saved as step `last`."""
    world = distributed.start()
    engine = build(ds, False, world, what, saved=Path(saved) if saved else None)
    rows = steps(engine, first, last, world)
    save(engine, Path(folder), last, keep=3)
    return rows


def averages(stages: dict[str, dict], bf16: bool) -> dict[str, tuple[float, float, bool, bool]]:
    """Per stage: gap of the kept average to one made from gathered weights, gap of what the model computes with inside
    `inference`, whether training goes on with the same bits after it, and whether ZeRO-3's trace is still complete."""
    world = distributed.start()
    results = {}
    for name, ds in stages.items():
        plain = build(ds, bf16, world, ema=0.0)
        undisturbed = steps(plain, 0, 4, world)
        engine = build(ds, bf16, world)
        mean = {n: p.float().clone() for n, p in engine.parameters_gathered()}
        rows = []
        for step in range(4):
            rows += steps(engine, step, step + 1, world)
            decay = min(0.9, (1 + step) / (10 + step))
            for n, p in engine.parameters_gathered():
                mean[n] = decay * mean[n] + (1 - decay) * p.float()
            with engine.inference(), torch.no_grad():
                seen = {n: p.float().clone() for n, p in engine.parameters_gathered()}
                engine(*batches(0, 1, 1)[0])
        kept = {
            f.name: float(
                (engine.master.average[f.name] - mean[f.name].view(-1)[f.start : f.start + f.size]).abs().max()
            )
            for group in engine.master.groups
            for f in group.fragments
            if f.size
        }
        used = max(float((seen[n] - mean[n]).abs().max()) for n in mean)
        coordinator = getattr(getattr(engine.ds.optimizer, "parameter_offload", None), "param_coordinator", None)
        traced = coordinator is None or coordinator.is_complete_trace()
        results[name] = max(kept.values()), used, rows == undisturbed, traced
    return results


def full_disk(tmp: str) -> tuple[str, list[str]]:
    """What all ranks are told, and what is left, when one rank's disk is full."""
    world = distributed.start()
    engine = build({"zero_optimization": {"stage": 3}}, False, world)
    folder = Path(tmp) / "checkpoints"
    save(engine, folder, 1, keep=2)
    if world.rank == 1:
        os.environ["DSTRAIN_FAULTS"] = json.dumps([{"at": "write", "do": "ENOSPC", "nth": 4}])
    said = ""
    try:
        save(engine, folder, 2, keep=2)
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
        norm = engine.step(1.0)
        same = all(torch.equal(p, before[n]) for n, p in engine.parameters_gathered())
        results[name] = same and not torch.isfinite(torch.tensor(norm)).item()
    return results

"""Runs on each rank: faults planted in samples, weights and gradients, and what the second look says of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from engine_parity import batches, fill, make, recipe

from dstrain.data.sample import Sample
from dstrain.diagnosis import Suspect, second_look
from dstrain.engine import distributed
from dstrain.engine.ds_config import complete
from dstrain.engine.engine import Engine, build_engine
from dstrain.engine.master import Fragment, Group
from dstrain.objectives.flow_match import FlowMatch
from dstrain.pipelines.base import Encoded
from dstrain.pipelines.qwen_image import QwenImagePipeline

NAN = float("nan")
MICROS = 2
OBJECTIVE = FlowMatch(seed=3)


class Spoilt(QwenImagePipeline):
    """Its gradient is not finite for the first sample of each pack, though its velocity is."""

    def velocity(self, transformer, x_t, sigmas, condition):
        velocity = super().velocity(transformer, x_t, sigmas, condition)
        if velocity.requires_grad:
            rows = condition.layout.image_sample == 0
            velocity.register_hook(lambda grad: grad.masked_fill(rows[:, None], NAN))
        return velocity


def packs_of(step: int, world: distributed.World) -> list[tuple[list[Sample], Encoded]]:
    """This rank's packs of a step."""
    found = []
    for j in range(MICROS):
        place = j * world.size + world.rank
        x0, embeds, _, layout = batches(step, MICROS, world.size)[place]
        draws = range(1000 * step + 10 * place, 1000 * step + 10 * place + len(layout))
        samples = [Sample(f"sample-{d}", "some/shard.tar", d, d, {}, "") for d in draws]
        found.append((samples, Encoded(embeds, layout, x0)))
    return found


def backward(engine: Engine, pipeline: QwenImagePipeline, packs: list) -> float:
    total = torch.zeros((), dtype=torch.float64)
    for j, (samples, encoded) in enumerate(packs):
        losses = OBJECTIVE(
            lambda x_t, sigmas, encoded=encoded: pipeline.velocity(engine, x_t, sigmas, encoded),
            encoded.x0,
            encoded.layout,
            torch.tensor([s.draw for s in samples]),
        )
        engine.backward(losses.per_sample.sum() / 8, last=j == len(packs) - 1)
        total += losses.per_sample.detach().double().sum()
    return float(distributed.sum_over_ranks(total))


def build(ds: dict, bf16: bool, world: distributed.World, what: str) -> Engine:
    config = complete(ds, recipe(8), world_size=world.size, bf16=bf16, path=Path("ds.json"))
    return build_engine(partial(make, what), fill, config, world.device)


def look(engine: Engine, pipeline: QwenImagePipeline, packs: list, world: distributed.World) -> list[Suspect]:
    return distributed.share(second_look(pipeline, engine, OBJECTIVE, packs, world.rank))


def steps(engine: Engine, world: distributed.World, looks: bool) -> list[Any]:
    """Loss and norm of four steps of which the second is not finite, then all weights."""
    pipeline = QwenImagePipeline(world.device)
    rows: list[Any] = []
    for step in range(4):
        packs = packs_of(step, world)
        if step == 1 and world.rank == 1:
            packs[1][1].x0[0] = NAN
        if looks:
            look(engine, pipeline, packs, world)
        rows.append(backward(engine, pipeline, packs).hex())
        if looks:  # with this step's gradients waiting for the optimizer
            look(engine, pipeline, packs, world)
        rows.append(engine.step(1.0, step).hex())
        if looks:
            look(engine, pipeline, packs, world)
    return [*rows, {name: p.clone() for name, p in engine.parameters_gathered()}]


def undisturbed(cases: dict[str, tuple[dict, bool, str]]) -> dict[str, tuple[list[str], list[str], bool]]:
    """Losses and norms of four steps without and with second looks, and whether the weights have the same bits."""
    world = distributed.start()
    results = {}
    for name, (ds, bf16, what) in cases.items():
        *rows, weights = steps(build(ds, bf16, world, what), world, looks=False)
        *others, other = steps(build(ds, bf16, world, what), world, looks=True)
        results[name] = rows, others, all(torch.equal(weights[n], other[n]) for n in weights)
    return results


def first_of(engine: Engine) -> tuple[Fragment, Group]:
    return next((f, g) for g in engine.master.groups for f in g.fragments if f.size and f.start == 0)


@contextmanager
def spoilt_master(engine: Engine, world: distributed.World) -> Iterator[str]:
    """One element of rank 0's fp32 weights is not finite meanwhile; the name of its parameter."""
    if world.rank != 0:
        yield ""
        return
    f, group = first_of(engine)
    with group.in_memory():
        kept = f.of(group.flat)[0].clone()
        f.of(group.flat)[0] = NAN
        yield f.name
        f.of(group.flat)[0] = kept


def planted(cases: dict[str, tuple[dict, bool, str]]) -> dict[str, dict[str, list[Suspect]]]:
    """Per case and place of a fault: what all ranks found."""
    world = distributed.start()
    results: dict[str, dict[str, list[Suspect]]] = {}
    for name, (ds, bf16, what) in cases.items():
        engine = build(ds, bf16, world, what)
        good, spoilt = QwenImagePipeline(world.device), Spoilt(world.device)
        packs = packs_of(0, world)
        found = {"none": look(engine, good, packs, world)}
        found["gradient"] = look(engine, spoilt if world.rank == 0 else good, packs, world)

        x0 = packs[0][1].x0
        kept = x0.clone()
        if world.rank == 1:
            x0[-1, 3] = NAN  # of the pack's last sample
        found["latents"] = look(engine, good, packs, world)
        x0.copy_(kept)
        if world.rank == 1:
            packs[1][1].prompt_embeds[0, 0] = float("inf")  # of the pack's first sample
        found["text"] = look(engine, good, packs, world)
        packs = packs_of(0, world)

        with spoilt_master(engine, world) as parameter:
            found["master"] = look(engine, good, packs, world)
        found["name"] = distributed.share([parameter] if world.rank == 0 else [])
        if world.rank == 0:
            with torch.no_grad():
                first_of(engine)[0].weight()[0] = NAN
        found["weight"] = look(engine, good, packs, world)
        results[name] = found
    return results

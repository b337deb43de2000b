"""Pictures painted during a training, by the engine as it is: the prompts are dealt to the ranks."""

from pathlib import Path

from PIL import Image

from dstrain.config import SampleConfig
from dstrain.engine import distributed
from dstrain.engine.distributed import World
from dstrain.engine.engine import Engine
from dstrain.pipelines.base import Pipeline
from dstrain.pipelines.sampler import sample, starting_noise
from dstrain.tracking.report import draw_grid


def paint(engine: Engine, pipeline: Pipeline, wanted: SampleConfig, seed: int, folder: Path, world: World) -> Path:
    """Paint `wanted.prompts` into `folder` with the running average if there is one; returns their grid. Collective.

    Picture i is `folder`/000i.png, from noise i of `seed`, whatever the number of ranks. Under ZeRO-3 a forward gathers
    from all ranks, so each makes as many: prompts go through one by one, and a rank that has run out paints its last
    once more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shape = pipeline.shape_of(wanted.height, wanted.width)
    tokens = shape[0] * shape[1] * shape[2]
    with engine.inference():
        for first in range(0, len(wanted.prompts), world.size):
            number = min(first + world.rank, len(wanted.prompts) - 1)
            (image,) = sample(
                pipeline,
                [wanted.prompts[number]],
                height=wanted.height,
                width=wanted.width,
                num_steps=wanted.steps,
                cfg_scale=wanted.cfg,
                noise=[starting_noise(seed, number, tokens, pipeline.token_channels)],
                transformer=engine,
            )
            if number == first + world.rank:
                image.save(folder / f"{number:04d}.png")
    distributed.barrier()
    grid = folder / "grid.png"
    if world.is_main:
        pictures = [Image.open(folder / f"{i:04d}.png") for i in range(len(wanted.prompts))]
        draw_grid(pictures, wanted.prompts, grid, columns=min(8, len(pictures)))
    return grid

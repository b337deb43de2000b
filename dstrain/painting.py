"""Pictures painted during a training, by the engine as it is: the prompts are dealt to the ranks."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from dstrain.config import SampleConfig
from dstrain.engine import distributed
from dstrain.engine.distributed import World
from dstrain.engine.engine import Engine
from dstrain.pipelines.base import Pipeline
from dstrain.pipelines.sampler import sample, starting_noise
from dstrain.tracking.report import draw_grid

log = logging.getLogger(__name__)


def paint(
    engine: Engine,
    pipeline: Pipeline,
    wanted: SampleConfig,
    seed: int,
    folder: Path,
    world: World,
    busy: Callable[[], None],
) -> Path | None:
    """Paint `wanted.prompts` into `folder` with the running average if there is one; returns their grid. Collective.

    What cannot be written is said, and None returned: no picture is worth the run. busy: called at each forward.

    Picture i is `folder`/000i.png, from noise i of `seed`, whatever the number of ranks. Under ZeRO-3 a forward gathers
    from all ranks, so each makes as many: prompts go through one by one, and a rank that has run out paints its last
    once more.
    """

    def transformer(*inputs: Any) -> Tensor:
        busy()
        return engine(*inputs)

    problem = _problem(lambda: folder.mkdir(parents=True, exist_ok=True))
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
                transformer=transformer,
            )
            if number == first + world.rank:
                problem = problem or _problem(lambda: image.save(folder / f"{number:04d}.png"))  # noqa: B023, at once
    grid = folder / "grid.png"
    problems = distributed.share([problem] if problem else [])
    if world.is_main and not problems:
        problem = _problem(lambda: _draw(folder, wanted.prompts, grid))
        problems = [problem] if problem else []
    if world.is_main and problems:
        log.warning("no pictures in %s: %s", folder, problems[0])
    return None if problems else grid


def _draw(folder: Path, prompts: list[str], grid: Path) -> None:
    pictures = [Image.open(folder / f"{i:04d}.png") for i in range(len(prompts))]
    draw_grid(pictures, prompts, grid, columns=min(8, len(pictures)))


def _problem(work: Callable[[], Any]) -> str:
    try:
        work()
    except OSError as e:
        return str(e)
    return ""

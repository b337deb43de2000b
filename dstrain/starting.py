"""What a rank builds before its first step: from the recipe, and from the checkpoint that it continues."""

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from dstrain.continuation import compare
from dstrain.data.loader import Loader
from dstrain.data.media.resolution import colour
from dstrain.data.policy import BadSamples, read_quarantine
from dstrain.engine import checkpoint, distributed
from dstrain.engine.distributed import World
from dstrain.engine.engine import Engine, build_engine
from dstrain.engine.state import State
from dstrain.errors import CheckpointError, printable
from dstrain.job import Job, load_pipeline, make_operators
from dstrain.pipelines.base import Pipeline
from dstrain.pipelines.cache import EncodedCache

log = logging.getLogger(__name__)


def find_start(
    run_dir: Path, resume: str, record: Mapping[str, Any], accepted: Collection[str], busy: Callable[[], None]
) -> Path | None:
    """Return the checkpoint to continue from, if there is one, after checking that it fits; collective.

    Args:
        run_dir: of the run.
        resume: "auto" for its newest undamaged checkpoint, "never", or a checkpoint's folder.
        record: what this run is (continuation.record).
        accepted: keys of the recipe that may differ although that changes what is learned.
        busy: called again and again while files are read.

    Raises:
        CheckpointError: it is damaged or of another run, or there is one with "never".
    """
    folder = run_dir / "checkpoints"
    if resume == "never":
        if any(folder.glob("step-*")):
            raise CheckpointError(f"{folder} holds an earlier run's checkpoints; choose another run_dir")
        return None
    path = checkpoint.find(folder, busy) if resume == "auto" else Path(resume)
    if path is None:
        return None
    if resume != "auto" and (problem := checkpoint.damage(path, busy)):
        raise CheckpointError(f"--resume {resume}: {problem}")
    for line in compare(checkpoint.read_manifest(path), record, accepted, path):
        if distributed.is_main():
            log.warning("%s", line)
    return path


def start_engine(job: Job, path: Path | None, device: torch.device, busy: Callable[[], None]) -> Engine:
    """Build the engine from the recipe's weights, or with the state of the checkpoint `path`; collective.

    busy: called for each parameter that is read.
    """
    recipe, start_values = job.recipe, job.start_values()
    saved = State(path) if path else None
    if saved and saved.shapes != job.trained:
        other = sorted(n for n in {**saved.shapes, **job.trained} if saved.shapes.get(n) != job.trained.get(n))
        raise CheckpointError(
            f"{path}: it holds other parameters than train here, such as {printable(other[0])};"
            " use another checkpoint, or another run_dir"
        )

    def fill(name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
        busy()
        if saved and name in saved.shapes:
            return saved.read("weight", name, start, stop)
        return start_values(name, shape, start, stop)

    ema = recipe.ema
    engine = build_engine(
        job.build_transformer, fill, job.ds_config, device, ema_decay=ema.decay, ema_on_cpu=ema.device == "cpu"
    )
    if saved:
        engine.master.restore(saved, busy=busy)
        if ema.decay and "ema" not in saved.kinds and distributed.is_main():
            log.info("the checkpoint has no average: it begins anew")
    return engine


def load_frozen(job: Job, device: torch.device) -> tuple[Pipeline, EncodedCache]:
    """Load the frozen components that are needed, and make the cache of what they give."""
    recipe, data, operators = job.recipe, job.recipe.data, make_operators(job.recipe.data)
    pipeline = load_pipeline(
        type(job.pipeline),
        recipe,
        device=device,
        dtype=job.encoder_dtype,
        load=job.frozen,
        encoded=job.expected is not None,
        offload=recipe.model.encoders == "offload",
    )
    varying = [
        *(job.dataset.wanted.columns if operators.varies_image else ()),
        *(["prompt"] * operators.varies_caption),
    ]
    return pipeline, EncodedCache(pipeline, data.encoded_cache_mb << 20, varying)


def open_loader(job: Job, world: World) -> Loader:
    """Return what reads this rank's samples."""
    data = job.recipe.data
    return Loader(
        job.dataset,
        job.plan,
        world.rank,
        operators=make_operators(data),
        seed=job.recipe.seed,
        background=colour(data.background),
        workers=data.workers,
        replace=data.bad_samples == "skip",
        pin=world.device.type == "cuda",
        expected=job.expected,
    )


def open_quarantine(job: Job) -> BadSamples:
    """Return the count of bad samples, with those that the run has met before; collective."""
    data, path = job.recipe.data, Path(job.recipe.run_dir) / "bad_samples.jsonl"
    known = distributed.share(list(read_quarantine(path).items()) if distributed.is_main() else [])
    return BadSamples(data.max_bad_samples, data.max_consecutive_bad, path, dict(known))

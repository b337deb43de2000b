"""A run that has been checked: what is refused is refused here, cheaply, before anything heavy is built."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dstrain.config import Recipe, to_dict
from dstrain.data.dataset import Dataset, open_dataset
from dstrain.data.plan import Plan
from dstrain.engine import checkpoint
from dstrain.engine.distributed import has_fast_bf16
from dstrain.engine.ds_config import check_sections, complete, offload, stage, uses_bf16
from dstrain.engine.estimate import estimate
from dstrain.errors import ConfigError
from dstrain.kernels.backend import choose
from dstrain.models.weights import Weights
from dstrain.objectives import OBJECTIVES
from dstrain.pipelines.base import PIPELINES, Pipeline

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Everything that a run was checked with."""

    recipe: Recipe
    ds_config: dict[str, Any]  # completed
    world_size: int
    device: torch.device  # its kind; a rank's own is chosen when the ranks start
    dtype: torch.dtype  # of the trained weights
    dataset: Dataset
    plan: Plan
    pipeline: Pipeline  # without its components
    components: dict[str, Path]  # local folder of each
    shapes: dict[str, torch.Size]  # of the trained parameters
    width: int
    depth: int


def prepare(recipe: Recipe, ds_path: Path, ds_config: dict[str, Any], world_size: int) -> Job:
    """Check recipe, ds_config, output folder, shards and model folder against each other; cheapest checks first.

    Raises ConfigError, DataError or CheckpointError with one sentence that names what is wrong and the way out.
    """
    family = PIPELINES.get(recipe.model.family)
    make_objective(recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        choose(recipe.objective.kernel, device)
    except ValueError as e:
        raise ConfigError(f"objective.kernel: {e}") from None
    bf16 = uses_bf16(ds_config, has_fast_bf16(device))
    config = complete(ds_config, recipe, world_size=world_size, bf16=bf16, path=ds_path)
    checkpoint.check_writable(Path(recipe.run_dir))
    dataset = open_dataset(recipe.data.shards, max_pixels=recipe.data.max_pixels)
    plan = Plan(
        dataset.tokens,
        seed=recipe.seed,
        global_batch_size=recipe.batch.global_batch_size,
        tokens_per_pack=recipe.batch.tokens_per_pack,
        world_size=world_size,
    )
    pipeline = load_pipeline(
        family, recipe, device=torch.device("cpu"), dtype=torch.float32, load=("tokenizer", "scheduler")
    )
    components = {name: pipeline.folder(name) for name in ("transformer", *pipeline.loaders)}
    pipeline.check_fit()
    with torch.device("meta"):
        model = pipeline.build_transformer()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if recipe.model.init == "pretrained":
        Weights(components["transformer"]).check(shapes)
    check_sections(ds_config, ds_path)
    dtype = torch.bfloat16 if bf16 else torch.float32
    return Job(
        recipe, config, world_size, device, dtype, dataset, plan, pipeline, components, shapes, model.width, model.depth
    )


def announce(job: Job) -> None:
    """Log every derived number of the run."""
    recipe, config = job.recipe, job.ds_config
    count = sum(s.numel() for s in job.shapes.values())
    micro = max(len(job.plan.step(s)) for s in range(min(3, recipe.train.steps)))
    word = encoder_dtype(job).itemsize
    frozen = [Weights(folder) for name, folder in job.components.items() if name in ("vae", "text_encoder")]
    need = estimate(
        config,
        parameters=count,
        world_size=job.world_size,
        width=job.width,
        layers=job.depth,
        tokens=min(recipe.batch.tokens_per_pack, int(job.dataset.tokens.sum())),
        encoder_bytes=word * sum(e.shape.numel() for w in frozen for e in w.entries.values()),
        checkpointing=recipe.model.activation_checkpointing,
    )
    samples = recipe.train.steps * recipe.batch.global_batch_size
    moved = [f"{what} on {offload(config, what)}" for what in ("param", "optimizer") if offload(config, what) != "none"]
    dtype = str(job.dtype).removeprefix("torch.")
    clip = config["gradient_clipping"]
    ranks = f"{job.world_size} rank{'s' * (job.world_size > 1)}"
    rows = {
        "data": job.dataset.summary(),
        "model": f"{recipe.model.family} from {job.components['transformer']} ({recipe.model.init} weights)",
        "parameters": f"{count:,} ({count:,} trained) in {job.depth} blocks of width {job.width}",
        "engine": ", ".join(
            [
                f"ZeRO-{stage(config)}",
                *moved,
                dtype,
                f"gradients clipped to {clip:g}" if clip else "no clipping",
                f"{ranks} on {job.device.type}",
            ]
        ),
        "batch": f"{recipe.batch.global_batch_size} samples a step, in packs of at most"
        f" {recipe.batch.tokens_per_pack:,} tokens: about {micro} micro-step{'s' * (micro > 1)} x {ranks}",
        "run": f"{recipe.train.steps} steps = {samples:,} samples = {samples / len(job.dataset):.1f} epochs"
        f" into {recipe.run_dir}",
        "memory": f"about {need.device / 2**30:.2f} GiB on the device and {need.host / 2**30:.2f} GiB in the host"
        " a rank (estimated)",
    }
    for key, value in rows.items():
        log.info("%-10s  %s", key, value)


def encoder_dtype(job: Job) -> torch.dtype:
    """Return the dtype of VAE and text encoder."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32, "auto": job.dtype}[job.recipe.model.encoder_dtype]


def make_objective(recipe: Recipe) -> Any:
    """Build the objective that the recipe names; ConfigError for settings that do not go together."""
    settings = to_dict(recipe)["objective"]
    return OBJECTIVES.get(settings.pop("name"))(seed=recipe.seed, **settings)


def load_pipeline(
    family: type[Pipeline], recipe: Recipe, *, device: torch.device, dtype: torch.dtype, load: tuple[str, ...]
) -> Pipeline:
    """Load the components in `load` of the recipe's model; none checks the folder only."""
    return family.from_pretrained(
        recipe.model.path,
        components=recipe.model.components,
        dtype=dtype,
        device=device,
        load=load,
        gelu=recipe.model.gelu,
        caption_dropout=recipe.data.caption_dropout,
        seed=recipe.seed,
    )

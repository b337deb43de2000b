"""What a run says of itself before it starts."""

import logging

import numpy as np
import torch

from dstrain.engine.ds_rules import offload, stage
from dstrain.engine.estimate import Choice, Estimate, Load, Machine, estimate, load_of
from dstrain.job import Job, count

GIB = 2**30
log = logging.getLogger(__name__)


def load_of_job(job: Job) -> tuple[Load, Choice]:
    """Return the counts that an estimate needs: of the model as it trains, and of the first pack."""
    with torch.device("meta"):
        model = job.build_transformer()
    pack = job.plan.step(0)[0][0]
    tokens = job.dataset.tokens(np.array([row for _, row in pack])).tolist()
    # What of a sample is text is not known before it is read; both kinds of tokens cost the same.
    samples = [(max(1, n - 1), 1) for n in tokens]
    load = load_of(model, samples, encoder_bytes=max(job.encoder_memory()))
    return load, Choice.of(job.recipe, micro_steps=job.plan.figures(0)[0])


def here(job: Job) -> Machine:
    """Return this machine as an estimate takes it, all ranks in one node; its speeds are not known."""
    if job.device.type == "cuda":
        return Machine(gpus=job.world_size, gpu_bytes=float(torch.cuda.get_device_properties(0).total_memory))
    return Machine(gpus=job.world_size, context=0.0, process=0.0, pinned_rounding=False)


def announce(job: Job) -> None:
    """Log every derived number of the run."""
    recipe, config = job.recipe, job.ds_config
    figures = [job.plan.figures(step) for step in range(min(3, recipe.train.steps))]
    micro = max(micros for micros, _, _ in figures)
    used, waiting = (sum(figure[i] for figure in figures) / len(figures) for i in (1, 2))
    samples = recipe.train.steps * recipe.batch.global_batch_size
    moved = [f"{what} on {offload(config, what)}" for what in ("param", "optimizer") if offload(config, what) != "none"]
    dtype = str(job.dtype).removeprefix("torch.")
    clip = config["gradient_clipping"]
    ranks = f"{job.world_size} rank{'s' * (job.world_size > 1)}"
    lora = recipe.lora
    adapters = (
        f" in LoRA adapters of rank {lora.rank} on {dtype if lora.base == 'bf16' else lora.base} weights"
        if lora.rank
        else ""
    )
    rows = {
        "data": job.dataset.summary(),
        "model": f"{recipe.model.family} from {job.components['transformer']} ({recipe.model.init} weights)",
        "parameters": f"{count(job.shapes):,}, {count(job.trained):,} trained{adapters}",
        "encoders": _encoders(job),
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
        f" {recipe.batch.tokens_per_pack:,} tokens: about {micro} micro-step{'s' * (micro > 1)} x {ranks},"
        f" {used:.0%} full, the costliest rank {waiting:.1%} above the mean",
        "run": f"{recipe.train.steps} steps = {samples:,} samples = {samples / len(job.dataset):.1f} epochs"
        f" into {recipe.run_dir}",
        "memory": _memory(_estimate(job)),
    }
    for key, value in rows.items():
        log.info("%-10s  %s", key, value)


def _estimate(job: Job) -> Estimate:
    load, choice = load_of_job(job)
    return estimate(job.ds_config, load, here(job), choice)


def _memory(need: Estimate) -> str:
    """Say what a rank needs, and of what most."""
    parts = sorted(((size, part) for part, size in need.memory.device.items()), reverse=True)
    most = ", ".join(f"{part} {size / GIB:.2f}" for size, part in parts[:4])
    return (
        f"about {need.device / GIB:.2f} GiB on the device ({most}) and {need.host / GIB:.2f} GiB in the host a rank"
        " (estimated; `dstrain estimate` says more)"
    )


def _encoders(job: Job) -> str:
    """Say where the encoders are, and what they take."""
    each = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in job.encoder_sizes().items())
    if not each:
        assert job.expected is not None
        return f"none: the samples were encoded by {job.expected.stamp}"
    where = "in host memory, each on the device only while it is used"
    return f"{each}, {where if job.recipe.model.encoders == 'offload' else 'on the device'}"

"""Everything that can be said of a run before it starts, without a GPU: errors, warnings, and what is in order.

The errors are those that a training would stop with, but for all parts and not only the first. The warnings are of
what would run, and disappoint: disks that fill up, saves that outlast the process group, ranks that wait.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from dstrain.announce import load_of_job
from dstrain.config import Recipe, load_recipe
from dstrain.engine.distributed import has_fast_bf16
from dstrain.engine.ds_config import check_sections, complete, faults, load, uses_bf16
from dstrain.engine.ds_optimizer import settle
from dstrain.engine.ds_rules import idle, offload, stage
from dstrain.engine.ds_sizes import sizes
from dstrain.engine.estimate import Advice, Estimate, advise, estimate
from dstrain.engine.estimate import Machine as EstimateMachine
from dstrain.errors import ConfigError, DstrainError
from dstrain.job import Job, block_size, count, load_pipeline, open_data, prepare, shape_transformer, wanted_samples
from dstrain.models.weights import Weights
from dstrain.pipelines.base import PIPELINES

T = TypeVar("T")
GB = 1e9
GPUS_A_NODE = 8
SHORT = 0.01  # seconds of communication in a step, below which it is not worth a word
NVME = 5e9  # bytes/s of a node's drive, where the ds_config names one
LEVELS = ("error", "warning", "ok")


@dataclass(frozen=True)
class Finding:
    """One line of the result."""

    level: Literal["error", "warning", "ok"]
    text: str


@dataclass(frozen=True)
class Machine:
    """Where the run would be: which need not be where it is checked."""

    ranks: int
    gpu: bool
    gpu_bytes: float = 80e9  # of a GPU
    host_bytes: float = 1000e9  # of a node
    disk: float = 0.5e9  # bytes/s that all ranks together write to run_dir


def check(recipe_path: Path, overrides: list[str], ds_path: Path, machine: Machine) -> list[Finding]:
    """Check a recipe and a ds_config against each other and against what they name; errors come first."""
    found: list[Finding] = []

    def attempt(work: Callable[[], T]) -> T | None:
        try:
            return work()
        except DstrainError as e:
            found.append(Finding("error", str(e)))
            return None

    attempt(_timeout)
    recipe = attempt(lambda: load_recipe(recipe_path, overrides))
    config = attempt(lambda: load(ds_path))
    if config is not None and (wrong := [f"{ds_path}: {fault}" for fault in faults(config)]):
        found += [Finding("error", text) for text in wrong]
        config = None
    if config is not None:
        found += [Finding("warning", f"{ds_path}: {text}") for text in idle(config)]
    if recipe is not None:
        found += [Finding("warning", text) for text in of_recipe(recipe, machine)]
        if not any(finding.level == "error" for finding in found):
            assert config is not None
            if (job := attempt(lambda: prepare(recipe, ds_path, config, machine.ranks, _device(machine)))) is not None:
                found += [Finding("warning", text) for text in of_job(job, machine)]
                found += [Finding("ok", text) for text in summary(job, config)]
                if attempt(job.encoder_memory) is not None and machine.gpu:
                    mine, advice = plan_for(job, machine)
                    found += [Finding("warning", text) for text in of_plan(mine, advice)]
                    need = f"{mine.device / GB:,.1f} GB on a GPU and {mine.node / GB:,.1f} GB in a node's memory"
                    found.append(Finding("ok", f"memory: about {need} (estimated)"))
        if any(finding.level == "error" for finding in found):  # the first of them hides what else there is
            for part in _parts(recipe, ds_path, config, machine):
                attempt(part)
    found = list(dict.fromkeys(found))
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def _device(machine: Machine) -> torch.device:
    return torch.device("cuda" if machine.gpu else "cpu")


def _parts(
    recipe: Recipe, ds_path: Path, config: dict[str, Any] | None, machine: Machine
) -> Iterator[Callable[[], Any]]:
    """Yield the parts of `prepare` that can be wrong each on its own."""
    if config is not None:
        yield lambda: _engine(recipe, ds_path, config, machine)
    if recipe.model.family in PIPELINES:
        family = PIPELINES.get(recipe.model.family)
        yield lambda: open_data(recipe.data, wanted_samples(recipe.data, family.columns()))
        yield lambda: _model(recipe)


def _engine(recipe: Recipe, ds_path: Path, config: dict[str, Any], machine: Machine) -> None:
    bf16 = uses_bf16(config, has_fast_bf16(_device(machine)))
    complete(config, settle(recipe, config, ds_path), world_size=machine.ranks, bf16=bf16, path=ds_path)
    check_sections(config, ds_path, gpu=machine.gpu)


def _model(recipe: Recipe) -> None:
    family = PIPELINES.get(recipe.model.family)
    pipeline = load_pipeline(
        family, recipe, device=torch.device("cpu"), dtype=torch.float32, load=("tokenizer", "scheduler")
    )
    pipeline.check_fit()
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in pipeline.build_transformer().named_parameters()}
        shape_transformer(pipeline, recipe)
    if recipe.model.init == "pretrained":
        Weights(pipeline.folder("transformer")).check(shapes)


def _timeout() -> int:
    """Return the minutes after which a rank that waits for others gives up (DeepSpeed's constant and variable)."""
    text = os.environ.get("DEEPSPEED_TIMEOUT", "10")
    if not text.isdecimal() or not int(text):
        raise ConfigError(f"DEEPSPEED_TIMEOUT = {text!r} is set in the environment; it must be whole minutes, or unset")
    return int(text)


def of_recipe(recipe: Recipe, machine: Machine) -> Iterator[str]:
    """Yield warnings that need the recipe only."""
    o, steps, batch = recipe.optimizer, recipe.train.steps, recipe.batch.global_batch_size
    if recipe.train.save_every > steps:
        yield f"train.save_every = {recipe.train.save_every} is beyond train.steps = {steps}: only the end is saved"
    if o.warmup_steps == steps:
        yield f"optimizer.warmup_steps = {o.warmup_steps} is the whole run: the peak rate is reached at its end only"
    if o.schedule == "wsd" and o.decay_steps > steps - o.warmup_steps:
        left = steps - o.warmup_steps
        yield f"optimizer.decay_steps = {o.decay_steps} is more than the {left} steps after the warm-up"
    if o.schedule != "wsd" and o.decay_steps:
        yield f"optimizer.decay_steps has no effect on schedule {o.schedule!r}; it is for wsd"
    if o.schedule == "constant" and o.min_lr_ratio:
        yield "optimizer.min_lr_ratio has no effect on schedule 'constant'"
    if batch % machine.ranks:
        yield (
            f"batch.global_batch_size = {batch} is not a multiple of {machine.ranks} ranks: some compute a sample more"
            " than others, who wait"
        )
    if not machine.gpu and "offload" in recipe.model.activations:
        yield "model.activations: offload does nothing without a GPU; full keeps as little"
    if not machine.gpu and recipe.model.encoders == "offload":
        yield "model.encoders: offload does nothing without a GPU"
    if recipe.lora.rank and recipe.model.init == "random":
        yield (
            f"lora.rank = {recipe.lora.rank} with model.init random: adapters on random frozen weights learn nothing;"
            " set model.init to pretrained, or lora.rank to 0"
        )
    if recipe.sample.prompts and not recipe.sample.every:
        yield "sample.prompts has no effect without sample.every; give the steps between, or remove it"
    if recipe.data.workers > (cores := os.cpu_count() or 1):
        yield f"data.workers = {recipe.data.workers} threads a rank, and this machine has {cores} cores"


def of_job(job: Job, machine: Machine) -> Iterator[str]:
    """Yield warnings that need what the run was checked with."""
    micros, _, _ = job.plan.figures(0)
    if micros > 1 and stage(job.ds_config) == 0 and job.dtype == torch.bfloat16:
        yield (
            f"zero_optimization.stage 0 adds the gradients of {micros} micro-steps up in bf16, losing the small ones;"
            " use stage 1, which adds in fp32"
        )
    yield from _balance(job)
    yield from _disk(job)
    yield from _save_time(job, machine)


def summary(job: Job, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is in order, and what was filled in."""
    with torch.device("meta"):
        model = job.build_transformer()
    moved = [f"{what} on {where}" for what in ("param", "optimizer") if (where := offload(config, what)) != "none"]
    yield f"engine: {', '.join([f'ZeRO-{stage(config)}', *moved, str(job.dtype).removeprefix('torch.')])}"
    for key, size in sizes(config, block_size(model), 0).items():
        yield f"engine: {key} = {size.elements:,}: {size.why}"
    yield f"model: {count(job.shapes):,} parameters, {count(job.trained):,} trained"
    yield f"data: {job.dataset.summary()}"
    micros, used, _ = job.plan.figures(0)
    yield (
        f"batch: {job.recipe.batch.global_batch_size} samples in {micros} micro-step{'s' * (micros > 1)} on"
        f" {job.world_size} rank{'s' * (job.world_size > 1)}, packs {used:.0%} full"
    )


def _balance(job: Job) -> Iterator[str]:
    figures = [job.plan.figures(step) for step in range(min(3, job.recipe.train.steps))]
    waiting = sum(more for _, _, more in figures) / len(figures)
    if waiting > 0.2:
        yield (
            f"ranks wait for the costliest, which has {waiting:.0%} more to do than the mean; raise"
            " batch.global_batch_size or batch.tokens_per_pack"
        )


def _disk(job: Job) -> Iterator[str]:
    train, run_dir = job.recipe.train, Path(job.recipe.run_dir)
    checkpoint = _checkpoint_bytes(job)
    need = (train.keep_checkpoints + 1) * checkpoint  # a new one is whole before an old one goes
    if train.export:
        need += job.dtype.itemsize * count(job.trained if job.recipe.lora.rank else job.shapes)
    have = sum(
        p.stat().st_size for name in ("checkpoints", "export") for p in (run_dir / name).rglob("*") if p.is_file()
    )
    there = next(folder for folder in (run_dir.absolute(), *run_dir.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free + have < need:
        yield (
            f"run_dir {run_dir} will need {need / GB:,.1f} GB ({train.keep_checkpoints} + 1 checkpoints of"
            f" {checkpoint / GB:,.1f} GB{' and the export' * train.export}), and {free / GB:,.1f} GB are free there"
        )


def _checkpoint_bytes(job: Job) -> int:
    """Three fp32 words a trained parameter: the weight and the two moments; a fourth for the average."""
    return (12 + 4 * (job.recipe.ema.decay > 0)) * count(job.trained)


def _save_time(job: Job, machine: Machine) -> Iterator[str]:
    seconds, minutes = _checkpoint_bytes(job) / machine.disk, _timeout()
    if seconds > 60 * minutes:
        yield (
            f"a checkpoint of {_checkpoint_bytes(job) / GB:,.1f} GB takes {seconds / 60:.0f} minutes at"
            f" {machine.disk / GB:g} GB/s, and ranks that wait give up after {minutes}; set DEEPSPEED_TIMEOUT to more"
            " minutes, or run_dir to a faster disk"
        )


def plan_for(job: Job, machine: Machine) -> tuple[Estimate, Advice]:
    """Estimate the run by the first pack of its first step, and say which ds_config would be best."""
    load, choice = load_of_job(job)
    nodes = -(-machine.ranks // GPUS_A_NODE)
    where = EstimateMachine(
        nodes=nodes,
        gpus=-(-machine.ranks // nodes),
        gpu_bytes=machine.gpu_bytes,
        host_bytes=machine.host_bytes,
        nvme=NVME if "nvme" in (offload(job.ds_config, "param"), offload(job.ds_config, "optimizer")) else 0.0,
    )
    return estimate(job.ds_config, load, where, choice), advise(load, where, choice, job.ds_config)


def of_plan(mine: Estimate, advice: Advice) -> Iterator[str]:
    """Yield warnings of memory, of a ds_config that does more than is needed, and of transfers that are waited for."""
    where, times = mine.machine, mine.traffic.times
    if not mine.fits:
        yield (
            f"about {mine.device / GB:,.1f} GB are needed on a GPU, where {where.fits_gpu / GB:,.1f} are usable, and"
            f" {mine.node / GB:,.1f} GB in a node's memory, where {where.fits_host / GB:,.1f} are; {advice.sentence}"
        )
    elif advice.best is not None and advice.best.estimate.traffic.seconds < 0.95 * mine.traffic.seconds:
        yield (
            f"{advice.best.name} fits too, and its step takes at least {advice.best.estimate.traffic.seconds:.2g} s"
            f" instead of {mine.traffic.seconds:.2g} s by the estimate: what is offloaded or sharded here need not be"
        )
    if times["communication"] > max(times["compute"], SHORT):
        micros = mine.plan.choice.micro_steps
        way = f"batch.tokens_per_pack for fewer micro-steps than {micros}" if micros > 1 else "batch.global_batch_size"
        yield (
            f"a step computes for about {times['compute']:.2g} s and communicates for {times['communication']:.2g} s,"
            f" which that cannot hide; raise {way}"
        )

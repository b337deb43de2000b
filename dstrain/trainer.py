"""The loop, and what is checked before it. Model, objective and data meet here and nowhere else."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dstrain.config import Recipe, to_dict
from dstrain.data.dataset import Dataset, open_dataset
from dstrain.data.loader import Loader, Sample
from dstrain.data.plan import Plan
from dstrain.engine import checkpoint, distributed
from dstrain.engine.distributed import World
from dstrain.engine.ds_config import check_sections, complete, offload, stage, uses_bf16
from dstrain.engine.engine import build_engine
from dstrain.engine.estimate import estimate
from dstrain.engine.export import export
from dstrain.engine.lr import learning_rate
from dstrain.errors import CheckpointError, TrainingHalted
from dstrain.models.base import DiT
from dstrain.models.init import initial_slice
from dstrain.models.weights import Weights
from dstrain.objectives import OBJECTIVES
from dstrain.pipelines.base import PIPELINES, Pipeline
from dstrain.pipelines.cache import EncodedCache
from dstrain.storage import write_json
from dstrain.tracking.metrics import SIGMA_BINS, Throughput, memory, sigma_bins
from dstrain.tracking.tracker import Tracker, open_trackers

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A run that has been checked: everything that can be refused has been, and nothing heavy is built yet."""

    recipe: Recipe
    ds_path: Path
    ds_config: dict[str, Any]
    world_size: int
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
    _objective(recipe)
    # complete() is called again with the real precision; here it is for its checks
    complete(ds_config, recipe, world_size=world_size, bf16=False, block_class="", path=ds_path)
    checkpoint.check_writable(Path(recipe.run_dir))
    dataset = open_dataset(recipe.data.shards, max_pixels=recipe.data.max_pixels)
    plan = Plan(
        dataset.tokens,
        seed=recipe.seed,
        global_batch_size=recipe.batch.global_batch_size,
        tokens_per_pack=recipe.batch.tokens_per_pack,
        world_size=world_size,
    )
    pipeline = _pipeline(family, recipe, device=torch.device("cpu"), dtype=torch.float32, load=())
    components = {name: pipeline.folder(name) for name in ("transformer", *pipeline.loaders)}
    pipeline.check_fit()
    with torch.device("meta"):
        model = pipeline.build_transformer()
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if recipe.model.init == "pretrained":
        Weights(components["transformer"]).check(shapes)
    check_sections(ds_config, ds_path)
    return Job(
        recipe, ds_path, ds_config, world_size, dataset, plan, pipeline, components, shapes, model.width, model.depth
    )


class Trainer:
    """Builds what a job needs on this rank and runs it to the end. Collective throughout."""

    def __init__(self, job: Job, world: World, *, resume: str = "auto") -> None:
        recipe = job.recipe
        self.job, self.recipe, self.world = job, recipe, world
        bf16 = uses_bf16(job.ds_config, distributed.has_fast_bf16(world.device))
        dtype = torch.bfloat16 if bf16 else torch.float32
        encoder = {"bf16": torch.bfloat16, "fp32": torch.float32, "auto": dtype}[recipe.model.encoder_dtype]
        self.pipeline = _pipeline(
            type(job.pipeline), recipe, device=world.device, dtype=encoder, load=tuple(job.pipeline.loaders)
        )
        with torch.device("meta"):
            model = self.pipeline.build_transformer()
        config = complete(
            job.ds_config,
            recipe,
            world_size=world.size,
            bf16=bf16,
            block_class=model.block_class.__name__,
            path=job.ds_path,
        )
        if world.is_main:
            self._announce(config, dtype)
        self.engine = build_engine(self._make, self._fill(), config, world.device)
        self.objective = _objective(recipe)
        self.cache = EncodedCache(self.pipeline, recipe.data.encoded_cache_mb << 20)
        self.throughput = Throughput.of(world.device, world.size)
        self.loader = Loader(
            job.dataset,
            job.plan,
            world.rank,
            workers=recipe.data.workers,
            bad_sample=recipe.data.bad_samples,
            max_bad_samples=recipe.data.max_bad_samples,
            quarantine=Path(recipe.run_dir) / f"bad_samples.rank{world.rank}.jsonl",
        )
        # What must be the same for a checkpoint to be continued exactly.
        self.facts = {
            "world_size": world.size,
            "zero_stage": stage(config),
            "bf16": bf16,
            "seed": recipe.seed,
            "global_batch_size": recipe.batch.global_batch_size,
            "data": job.dataset.digest,
            "parameters": sum(s.numel() for s in job.shapes.values()),
        }
        self.first_step = self._resume(resume)

    def run(self) -> None:
        """Train from the first step that is not done yet to the last, save, and export."""
        recipe, main = self.recipe, self.world.is_main
        run_dir, steps = Path(recipe.run_dir), recipe.train.steps
        if main:
            write_json(run_dir / "recipe.json", to_dict(recipe))
            write_json(run_dir / "ds_config.json", self.engine.config)
        t = recipe.tracking
        name = t.name or run_dir.resolve().name
        tracker = open_trackers(run_dir, t.wandb, t.project, name, to_dict(recipe), self.first_step, main)
        bar = tqdm(total=steps, initial=self.first_step, disable=not main, desc=name, unit="step", dynamic_ncols=True)
        try:
            for step in range(self.first_step, steps):
                stats = self.train_step(step)
                tracker.log(step, stats)
                bar.set_postfix(loss=f"{stats['loss']:.4f}", refresh=False)
                bar.update()
                if (step + 1) % recipe.train.save_every == 0 or step + 1 == steps:
                    self._save(step + 1, tracker)
        finally:
            bar.close()
            tracker.finish()
            self.loader.close()
        if recipe.train.export:
            export(self.engine, run_dir / "export", self.job.components, self.pipeline.index)
            if main:
                log.info("exported to %s (diffusers layout)", run_dir / "export")

    def train_step(self, step: int) -> dict[str, float]:
        """Take one optimizer step on the step's global batch; return its figures, those of all ranks."""
        started, waited = time.perf_counter(), self.loader.wait_s
        total = self.recipe.batch.global_batch_size
        sums = torch.zeros(3 + 2 * SIGMA_BINS, dtype=torch.float64)  # loss, tokens, FLOPs, loss and count by sigma
        encode_s = 0.0
        packs = list(self.loader.step(step))
        for i, samples in enumerate(packs):
            before = time.perf_counter()
            encoded = self.pipeline.pack(self._encode(samples))
            encode_s += time.perf_counter() - before
            draws = torch.tensor([s.draw for s in samples])
            losses = self.objective(
                lambda x_t, sigmas, encoded=encoded: self.pipeline.velocity(self.engine, x_t, sigmas, encoded),
                encoded.x0,
                encoded.layout,
                draws,
            )
            self.engine.backward(losses.per_sample.sum() / total, last=i == len(packs) - 1)
            per_sample = losses.per_sample.detach().double().cpu()
            sums[0] += per_sample.sum() / total
            sums[1] += encoded.layout.tokens
            sums[2] += 3 * self.engine.module.forward_flops(encoded.layout)
            sums[3:] += sigma_bins(per_sample, losses.sigmas.cpu()).flatten()
        sums = distributed.sum_over_ranks(sums.to(self.world.device)).cpu()
        loss, tokens, flops = sums[:3].tolist()
        if not torch.isfinite(sums[0]):
            raise TrainingHalted(
                f"step {step}: the loss is {loss}; no weight was changed by it. The last checkpoint is intact:"
                " lower optimizer.lr or set gradient_clipping in the ds_config, and run the same command again"
            )
        lr = learning_rate(self.recipe.optimizer, step, self.recipe.train.steps)
        before_step = time.perf_counter()
        grad_norm = self.engine.step(lr)
        now = time.perf_counter()
        bin_loss, bin_count = sums[3:].view(2, SIGMA_BINS)
        return {
            "loss": loss,
            "lr": lr,
            "grad_norm": grad_norm,
            "step_s": now - started,
            "data_wait_s": self.loader.wait_s - waited,
            "encode_s": encode_s,
            "optimizer_s": now - before_step,
            "samples_seen": (step + 1) * total,
            "micro_steps": len(packs),
            "tokens": int(tokens),
            **self.throughput(now - started, total, int(tokens), flops),
            **{f"loss_sigma_{b}": float(bin_loss[b] / n) for b, n in enumerate(bin_count.tolist()) if n},
            **memory(self.world.device),
        }

    def _encode(self, samples: list[Sample]) -> dict[str, list[Any]]:
        batch: dict[str, list[Any]] = {
            "image": [s.image for s in samples],
            "prompt": [s.caption for s in samples],
            "draw": [s.draw for s in samples],
        }
        return self.cache.encode([s.row for s in samples], batch)

    def _make(self) -> DiT:
        model = self.pipeline.build_transformer()
        model.activation_checkpointing = self.recipe.model.activation_checkpointing
        return model

    def _fill(self) -> Any:
        if self.recipe.model.init == "pretrained":
            weights = Weights(self.job.components["transformer"])
            return lambda name, shape, start, stop: weights.read(name, start, stop)
        with torch.device("meta"):
            model = self._make()
        return lambda name, shape, start, stop: initial_slice(model, name, shape, self.recipe.seed, start, stop)

    def _resume(self, resume: str) -> int:
        folder = Path(self.recipe.run_dir) / "checkpoints"
        if resume == "never":
            if any(folder.glob("step-*")):
                raise CheckpointError(f"{folder} holds an earlier run's checkpoints; choose another run_dir")
            return 0
        path = checkpoint.find(folder) if resume == "auto" else Path(resume)
        if path is None:
            return 0
        if resume != "auto" and (problem := checkpoint.damage(path)):
            raise CheckpointError(f"--resume {resume}: {problem}")
        checkpoint.check_facts(checkpoint.read_manifest(path), self.facts, path)
        step = checkpoint.load(self.engine, path)
        if self.world.is_main:
            log.info("continuing from %s at step %d of %d", path, step, self.recipe.train.steps)
        return step

    def _save(self, step: int, tracker: Tracker) -> None:
        tracker.sync()
        folder = Path(self.recipe.run_dir) / "checkpoints"
        facts = {**self.facts, "torch": torch.__version__, "recipe": to_dict(self.recipe)}
        path = checkpoint.save(self.engine, folder, step, facts, self.recipe.train.keep_checkpoints)
        if self.world.is_main:
            log.info("saved %s", path)

    def _announce(self, config: dict[str, Any], dtype: torch.dtype) -> None:
        """Say every derived number before the first step."""
        job, recipe, world = self.job, self.recipe, self.world
        count = sum(s.numel() for s in job.shapes.values())
        micro = max(len(job.plan.step(s)) for s in range(3))
        modules = [m for m in vars(self.pipeline).values() if isinstance(m, torch.nn.Module)]
        encoders = sum(p.numel() * p.element_size() for m in modules for p in m.parameters())
        need = estimate(
            config,
            parameters=count,
            world_size=world.size,
            width=job.width,
            layers=job.depth,
            tokens=min(recipe.batch.tokens_per_pack, int(job.dataset.tokens.sum())),
            encoder_bytes=encoders,
            checkpointing=recipe.model.activation_checkpointing,
        )
        samples = recipe.train.steps * recipe.batch.global_batch_size
        where = ", ".join(
            f"{w} on {offload(config, w)}" for w in ("param", "optimizer") if offload(config, w) != "none"
        )
        rows = {
            "data": job.dataset.summary(),
            "model": f"{recipe.model.family} from {job.components['transformer']} ({recipe.model.init} weights)",
            "parameters": f"{count:,} ({count:,} trained), {job.depth} blocks of width {job.width}",
            "engine": f"ZeRO-{stage(config)}{f', {where}' if where else ''}, {str(dtype).removeprefix('torch.')},"
            f" {world.size} rank{'s' * (world.size > 1)} on {world.device.type}",
            "batch": f"{recipe.batch.global_batch_size} samples a step in packs of at most"
            f" {recipe.batch.tokens_per_pack:,} tokens: {micro} micro-step{'s' * (micro > 1)} of {world.size} packs",
            "run": f"{recipe.train.steps} steps = {samples:,} samples = {samples / len(job.dataset):.1f} epochs"
            f" into {recipe.run_dir}",
            "memory": f"about {need.device / 2**30:.2f} GiB on the device and {need.host / 2**30:.2f} GiB in the host"
            " a rank (estimated)",
        }
        for key, value in rows.items():
            log.info("%-10s  %s", key, value)


def _objective(recipe: Recipe) -> Any:
    settings = to_dict(recipe)["objective"]
    return OBJECTIVES.get(settings.pop("name"))(seed=recipe.seed, **settings)


def _pipeline(
    family: type[Pipeline], recipe: Recipe, *, device: torch.device, dtype: torch.dtype, load: tuple[str, ...]
) -> Pipeline:
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

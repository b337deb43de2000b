"""The loop. Model, objective and data meet here and nowhere else."""

import logging
import math
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dstrain.config import to_dict
from dstrain.data.loader import Loader, Pack
from dstrain.data.media.resolution import colour
from dstrain.data.policy import Bad, BadSamples, read_quarantine
from dstrain.data.sample import Sample
from dstrain.engine import checkpoint, distributed
from dstrain.engine.distributed import World
from dstrain.engine.ds_rules import stage
from dstrain.engine.engine import Engine, build_engine
from dstrain.engine.export import export, open_base, open_checkpoint
from dstrain.engine.lr import lr_factor
from dstrain.engine.state import State
from dstrain.errors import CheckpointError, DataError, TrainingHalted
from dstrain.job import Job, count, load_pipeline, make_objective, make_operators
from dstrain.knobs import flat
from dstrain.painting import paint
from dstrain.pipelines.cache import EncodedCache
from dstrain.rng import Purpose, words
from dstrain.storage import write_json
from dstrain.tracking.metrics import SIGMA_BINS, Throughput, memory, sigma_bins
from dstrain.tracking.tracker import Tracker, open_trackers

T = TypeVar("T")
log = logging.getLogger(__name__)


class _DataStop(DataError):
    """The data cannot be gone on with; raised on all ranks at the same place."""


class Trainer:
    """Builds what a job needs on this rank and runs it to the end. Collective throughout."""

    def __init__(self, job: Job, world: World, *, resume: str = "auto") -> None:
        recipe = job.recipe
        self.job, self.recipe, self.world = job, recipe, world
        self._stop = False
        self.pipeline = load_pipeline(
            type(job.pipeline),
            recipe,
            device=world.device,
            dtype=job.encoder_dtype,
            load=job.frozen,
            encoded=job.expected is not None,
            offload=recipe.model.encoders == "offload",
        )
        self.objective = make_objective(recipe)
        data = recipe.data
        operators = make_operators(data)
        varying = [
            *(job.dataset.wanted.columns if operators.varies_image else ()),
            *(["prompt"] * operators.varies_caption),
        ]
        self.cache = EncodedCache(self.pipeline, data.encoded_cache_mb << 20, varying)
        self.throughput = Throughput.of(world.device, world.size)
        # Of a forward's arithmetic, a backward takes as much for the inputs, and once more for weights that train.
        self.passes = 2 + min(1.0, count(job.trained) / count(job.shapes))
        self.loader = Loader(
            job.dataset,
            job.plan,
            world.rank,
            operators=operators,
            seed=recipe.seed,
            background=colour(data.background),
            workers=data.workers,
            replace=data.bad_samples == "skip",
            pin=world.device.type == "cuda",
            expected=job.expected,
        )
        quarantine = Path(recipe.run_dir) / "bad_samples.jsonl"
        known = distributed.share(list(read_quarantine(quarantine).items()) if world.is_main else [])
        self.bad = BadSamples(data.max_bad_samples, data.max_consecutive_bad, quarantine, dict(known))
        self.facts = job.facts
        distributed.check_agreement({**self.facts, **flat(to_dict(recipe))})
        self.saved = self._checkpoint(resume)  # the checkpoint that holds the newest state on disk
        self.engine, self.first_step = self._start()

    def run(self) -> bool:
        """Train what is not done yet, and export; False if a signal stopped it before the end.

        SIGTERM, SIGUSR1 and SIGINT on any rank stop all of them after the same step, with a checkpoint.
        """
        for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(name, self._on_signal)
        recipe, folder = self.recipe, Path(self.recipe.run_dir) / "export"
        todo = recipe.train.steps - self.first_step
        if todo > 0 and not self._train():
            if self.world.is_main:
                log.info("stopped as asked; the same command continues")
            return False
        if todo <= 0 and self.world.is_main:
            log.info("all %d steps are done; more of them: train.steps=N", recipe.train.steps)
        if recipe.train.export and self.world.is_main and (todo > 0 or not folder.is_dir()):
            assert self.saved is not None
            state = open_checkpoint(self.saved, ema=recipe.ema.decay > 0)
            export(state, folder, lambda: open_base(self.pipeline, recipe.model.init, recipe.seed))
            log.info("exported to %s (%s)", folder, "LoRA files" if recipe.lora.rank else "diffusers layout")
        return True

    def _on_signal(self, number: int, frame: Any) -> None:
        self._stop = True  # looked at after the step; a second one does no more

    def _train(self) -> bool:
        """Train to the last step; False if a signal on any rank stopped it before."""
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
                try:
                    stats = self.train_step(step)
                except _DataStop:
                    if step > self.first_step:  # all ranks are here, and the weights are those before the step
                        self._save(step, tracker)
                    raise
                stopping = stats.pop("stopping") > 0
                tracker.log(step, stats)
                bar.set_postfix(loss=f"{stats['loss']:.4f}", refresh=False)
                bar.update()
                if stopping or (step + 1) % recipe.train.save_every == 0 or step + 1 == steps:
                    self._save(step + 1, tracker)
                if stopping and step + 1 < steps:
                    return False
                if recipe.sample.every and ((step + 1) % recipe.sample.every == 0 or step + 1 == steps):
                    folder = run_dir / "samples" / f"step-{step + 1:08d}"
                    grid = paint(self.engine, self.pipeline, recipe.sample, recipe.seed, folder, self.world)
                    tracker.log_image(step, "samples", grid)
        finally:
            bar.close()
            tracker.finish()
            self.loader.close()
        return True

    def train_step(self, step: int) -> dict[str, float]:
        """Take one optimizer step on the step's global batch; return its figures, those of all ranks."""
        started, waited = time.perf_counter(), self.loader.wait_s
        total = self.recipe.batch.global_batch_size
        # Of all ranks: loss, tokens, FLOPs, wish to stop, then losses and counts by sigma.
        sums = torch.zeros(4 + 2 * SIGMA_BINS, dtype=torch.float64)
        encode_s = 0.0
        micro_steps = 0
        if self.recipe.lora.dropout:
            torch.manual_seed(words(self.recipe.seed, Purpose.DROPOUT, step, self.world.rank)[0])
        bad: list[Bad] = []
        for pack, last in _with_last(self.loader.step(step)):
            samples = self._agreed(pack, bad)
            micro_steps += 1
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
            self.engine.backward(losses.per_sample.sum() / total, last=last)
            per_sample = losses.per_sample.detach().double().cpu()
            sums[0] += per_sample.sum() / total
            sums[1] += encoded.layout.tokens
            sums[2] += self.passes * self.engine.module.forward_flops(encoded.layout)
            sums[4:] += sigma_bins(per_sample, losses.sigmas.cpu()).flatten()
        self._count(bad)
        sums[3] = self._stop
        sums = distributed.sum_over_ranks(sums.to(self.world.device)).cpu()
        loss, tokens, flops, stopping = sums[:4].tolist()
        if not torch.isfinite(sums[0]):
            raise TrainingHalted(self._halted(step, f"the loss is {loss}"))
        factor = lr_factor(self.recipe.optimizer, step, self.recipe.train.steps)
        before_step = time.perf_counter()
        grad_norm = self.engine.step(factor, step)
        now = time.perf_counter()
        if not math.isfinite(grad_norm):
            raise TrainingHalted(self._halted(step, f"the gradient norm is {grad_norm}"))
        bin_loss, bin_count = sums[4:].view(2, SIGMA_BINS)
        return {
            "stopping": stopping,
            "loss": loss,
            "lr": self.recipe.optimizer.lr * factor,
            "grad_norm": grad_norm,
            "step_s": now - started,
            "data_wait_s": self.loader.wait_s - waited,
            "encode_s": encode_s,
            "optimizer_s": now - before_step,
            "optimizer_share": (now - before_step) / (now - started),
            "samples_seen": (step + 1) * total,
            "micro_steps": micro_steps,
            "bad_samples": len(self.bad),
            "tokens": int(tokens),
            **self.throughput(now - started, total, int(tokens), flops),
            **{f"loss_sigma_{b}": float(bin_loss[b] / n) for b, n in enumerate(bin_count.tolist()) if n},
            **memory(self.world.device),
        }

    def _agreed(self, pack: Pack, bad: list[Bad]) -> list[Sample]:
        """Return a pack's samples, adding to `bad` those of all ranks; or raise on all what happened on any."""
        found = distributed.share([*pack.bad, *([str(pack.error)] if pack.error else [])])
        bad += [item for item in found if isinstance(item, Bad)]
        errors = [item for item in found if isinstance(item, str)]
        if errors:
            self._count(bad)
            raise _DataStop(errors[0])
        return pack.samples

    def _count(self, bad: list[Bad]) -> None:
        """Count the bad samples of a step, of all its micro-steps: whose draws lie anywhere in the global batch."""
        try:
            self.bad.record(bad, write=self.world.is_main)
        except DataError as error:
            raise _DataStop(str(error)) from None

    def _halted(self, step: int, what: str) -> str:
        return (
            f"step {step}: {what}; no weight was changed by it, and the last checkpoint is intact."
            " Lower optimizer.lr or gradient_clipping (ds_config), or look at the data, and run the same command again"
        )

    def _encode(self, samples: list[Sample]) -> dict[str, list[Any]]:
        columns, prompts, draws = zip(*((s.columns, s.caption, s.draw) for s in samples), strict=True)
        batch = self.pipeline.batch(columns, list(prompts), list(draws))
        return self.cache.encode([s.row for s in samples], batch)

    def _start(self) -> tuple[Engine, int]:
        """Build the engine from the recipe's weights, or those of the checkpoint that is continued; and its step."""
        job, recipe, path = self.job, self.recipe, self.saved
        start_values = job.start_values()
        saved = State(path) if path else None

        def fill(name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
            if saved and name in saved.shapes:
                return saved.read("weight", name, start, stop)
            return start_values(name, shape, start, stop)

        ema = recipe.ema
        engine = build_engine(
            job.build_transformer,
            fill,
            job.ds_config,
            self.world.device,
            ema_decay=ema.decay,
            ema_on_cpu=ema.device == "cpu",
        )
        if path is None or saved is None:
            return engine, 0
        engine.master.restore(saved)
        step = checkpoint.read_manifest(path)["step"]
        checkpoint.set_aside_newer(Path(recipe.run_dir) / "checkpoints", step)
        if ema.decay and "ema" not in saved.kinds and self.world.is_main:
            log.info("the checkpoint has no average: it begins anew")
        if self.world.is_main:
            log.info("continuing from %s at step %d of %d", path, step, recipe.train.steps)
        return engine, step

    def _checkpoint(self, resume: str) -> Path | None:
        """Return the checkpoint to continue from, if there is one, after checking that it fits this run."""
        folder = Path(self.recipe.run_dir) / "checkpoints"
        if resume == "never":
            if any(folder.glob("step-*")):
                raise CheckpointError(f"{folder} holds an earlier run's checkpoints; choose another run_dir")
            return None
        path = checkpoint.find(folder) if resume == "auto" else Path(resume)
        if path is None:
            return None
        if resume != "auto" and (problem := checkpoint.damage(path)):
            raise CheckpointError(f"--resume {resume}: {problem}")
        manifest = checkpoint.read_manifest(path)
        checkpoint.check_facts(manifest, self.facts, path)
        if self.world.is_main:
            then, now = flat(manifest.get("recipe", {})), flat(to_dict(self.recipe))
            for key in sorted(key for key in now if key in then and then[key] != now[key]):
                log.info("changed since the checkpoint: %s = %s, was %s", key, now[key], then[key])
        return path

    def _save(self, step: int, tracker: Tracker) -> None:
        tracker.sync()
        folder = Path(self.recipe.run_dir) / "checkpoints"
        facts = {
            **self.facts,
            "torch": torch.__version__,
            "world_size": self.world.size,
            "zero_stage": stage(self.job.ds_config),
            "recipe": to_dict(self.recipe),
        }
        self.saved = checkpoint.save(self.engine, folder, step, facts, self.recipe.train.keep_checkpoints)
        if self.world.is_main:
            with logging_redirect_tqdm():
                log.info("saved %s", self.saved)


def _with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield each item with whether it is the last."""
    iterator = iter(items)
    item = next(iterator)
    for following in iterator:
        yield item, False
        item = following
    yield item, True

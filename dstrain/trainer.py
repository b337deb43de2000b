"""The loop. Model, objective and data meet here and nowhere else."""

import logging
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from dstrain import faults
from dstrain.agreement import StepSums, Wishes
from dstrain.config import to_dict
from dstrain.continuation import record
from dstrain.data.loader import Pack
from dstrain.data.policy import Bad
from dstrain.data.sample import Sample
from dstrain.engine import checkpoint, distributed
from dstrain.engine.control import Control
from dstrain.engine.distributed import World
from dstrain.engine.export import Read, export, open_base, open_checkpoint
from dstrain.engine.lr import lr_factor
from dstrain.engine.run_folder import occupy
from dstrain.engine.watch import Watch
from dstrain.errors import DataError, TrainingHalted
from dstrain.guards import Guards, Spike
from dstrain.incidents import Computed, Incidents
from dstrain.job import Job, count, make_objective
from dstrain.knobs import flat
from dstrain.painting import paint
from dstrain.pipelines.base import Encoded
from dstrain.rng import Purpose, words
from dstrain.saves import Saves
from dstrain.starting import find_start, load_frozen, open_loader, open_quarantine, start_engine
from dstrain.storage import write_json
from dstrain.tracking.metrics import Throughput, memory
from dstrain.tracking.redact import redact, redact_text
from dstrain.tracking.tracker import open_trackers

T = TypeVar("T")
log = logging.getLogger(__name__)


class _DataStop(DataError):
    """The data cannot be gone on with; raised on all ranks at the same place."""


class Trainer:
    """Builds what a job needs on this rank and runs it to the end. Collective throughout.

    resume: "auto" for the newest undamaged checkpoint of the run, "never", or a checkpoint's folder. accepted: keys of
    the recipe that may differ from the checkpoint's although they change what is learned.
    """

    def __init__(
        self,
        job: Job,
        world: World,
        control: Control,
        watch: Watch,
        *,
        resume: str = "auto",
        accepted: Collection[str] = (),
    ) -> None:
        recipe = job.recipe
        self.job, self.recipe, self.world, self.control, self.watch = job, recipe, world, control, watch
        self.run_dir = Path(recipe.run_dir)
        self.record = record(job, world.size)
        self._agree()
        self.lock = occupy(self.run_dir)
        watch.at("loading")
        path = find_start(self.run_dir, resume, self.record, accepted, watch.busy)
        watch.at("loading the encoders")
        self.pipeline, self.cache = load_frozen(job, world.device)
        self.objective = make_objective(recipe)
        self.loader, self.bad = open_loader(job, world), open_quarantine(job)
        self.guards = Guards(recipe.guard)
        watch.at("building the engine")
        self.engine = start_engine(job, path, world.device, watch.busy)
        self.saves = Saves(self.engine.master, self.run_dir / "checkpoints", recipe.train, path, watch.busy)
        self.incidents = Incidents(recipe, self.guards, self.pipeline, self.engine, self.objective)
        self.throughput = Throughput.of(world.device, world.size)
        # Of a forward's arithmetic, a backward takes as much for the inputs, and once more for weights that train.
        self.passes = 2 + min(1.0, count(job.trained) / count(job.shapes))
        self.first_step = self._go_on_from(path) if path else 0

    def run(self) -> bool:
        """Train what is not done yet, and export; False if it was asked to stop before the end."""
        recipe, folder = self.recipe, self.run_dir / "export"
        todo = recipe.train.steps - self.first_step
        if todo > 0 and not self._train():
            return False
        if todo <= 0 and self.world.is_main:
            log.info("all %d steps are done; more of them: train.steps=N", recipe.train.steps)
        if recipe.train.export and self.world.is_main and (todo > 0 or not folder.is_dir()):
            assert self.saves.newest is not None
            self.watch.at("the export")
            state = open_checkpoint(self.saves.newest, ema=recipe.ema.decay > 0)
            state = replace(state, read=self._heard(state.read))
            export(state, folder, lambda: open_base(self.pipeline, recipe.model.init, recipe.seed))
            log.info("exported to %s (%s)", folder, "LoRA files" if recipe.lora.rank else "diffusers layout")
        if self.world.is_main:
            self.control.forget(self.run_dir)  # a STOP file that came too late
        return True

    def _heard(self, read: Read) -> Read:
        """Let the watch know that something goes on, whenever a tensor is read."""

        def heard(name: str) -> torch.Tensor:
            self.watch.busy()
            return read(name)

        return heard

    def _train(self) -> bool:
        """Train to the last step; False if any rank was asked to stop before."""
        recipe, main = self.recipe, self.world.is_main
        steps, step = recipe.train.steps, self.first_step
        if distributed.share([self.control.reason] if self.control.reason else []):
            self._say_stopped("before its first step; there is nothing to save")
            return False
        if main:
            write_json(self.run_dir / "recipe.json", self.record["recipe"])
            write_json(self.run_dir / "ds_config.json", redact(self.engine.config))
        t = recipe.tracking
        name = redact_text(t.name) or self.run_dir.resolve().name
        self.tracker = open_trackers(self.run_dir, t.wandb, t.project, name, to_dict(recipe), step, main)
        bar = tqdm(total=steps, initial=step, disable=not main, desc=name, unit="step", dynamic_ncols=True)
        try:
            with logging_redirect_tqdm():
                while step < steps:
                    try:
                        stats, wishes, spike = self.train_step(step)
                    except _DataStop:
                        if step > self.first_step:  # all ranks are here, and the weights are those before the step
                            self._save(step, last=True)
                        raise
                    self.control.by_person |= wishes.by_person
                    self.tracker.log(step, stats)
                    bar.set_postfix(loss=f"{stats['loss']:.4f}", refresh=False)
                    bar.update()
                    step += 1
                    if spike and (back := self._go_back(step)) < step:
                        bar.update(back - step)
                        step = back
                        if wishes.stop:
                            self._say_stopped(f"after it went back to step {step} of {steps}")
                            return False
                        continue
                    last = wishes.stop or step == steps
                    if last or wishes.save or step % recipe.train.save_every == 0:
                        self._save(step, last=last)
                    if wishes.stop and step < steps:
                        self._say_stopped(f"after step {step} of {steps}, with a checkpoint")
                        return False
                    if recipe.sample.every and (step % recipe.sample.every == 0 or step == steps):
                        self.watch.at("painting")
                        self.saves.commit()
                        self._paint(step)
        except TrainingHalted:  # on all ranks
            with suppress(TrainingHalted):
                self.saves.commit()
            raise
        finally:
            bar.close()
            self.saves.close()
            self.tracker.finish()
            self.loader.close()
        return True

    def train_step(self, step: int) -> tuple[dict[str, float], Wishes, Spike | None]:
        """Take one optimizer step on the step's global batch.

        Returns its figures, what any rank wants, and the spike for which the step is to be undone; all the same on all
        ranks.
        """
        started, waited = time.perf_counter(), self.loader.wait_s
        self.watch.at(f"step {step}, its data")
        faults.reach("step", step)
        total = self.recipe.batch.global_batch_size
        sums = StepSums(self.world)
        packs: list[Computed] = []
        bad: list[Bad] = []
        encode_s, own_s, back_s = 0.0, 0.0, started
        self._seed(step)
        if faults.reach("weight", step):
            self.engine.master.groups[0].fragments[0].weight().fill_(float("nan"))
        for pack, last in _with_last(self.loader.step(self.guards.skipped.data_step(step))):
            faults.reach("data", step)
            own_s += time.perf_counter() - back_s
            self.watch.at(f"step {step}, micro-step {len(packs)}: ready")
            samples = self._agreed(pack, bad)
            before = time.perf_counter()
            encoded = self.pipeline.pack(self._encode(samples))
            encoded = replace(encoded, x0=faults.spoil("input", encoded.x0, step))
            encode_s += time.perf_counter() - before
            own_s += time.perf_counter() - before
            self.watch.at(f"step {step}, micro-step {len(packs)}: forward and backward")
            losses = self._losses(samples, encoded)
            per_sample = faults.spoil("loss", losses.per_sample, step)
            loss = faults.spoil("grad", per_sample.sum() / total, step)
            # A loss that is not finite makes all gradients so, and then no rank's optimizer moves anything.
            self.engine.backward(loss * torch.where(loss.isfinite(), 1.0, float("nan")), last=last)
            packs.append(Computed(samples, encoded, per_sample.detach().double().cpu(), losses.sigmas.cpu()))
            flops = self.passes * self.engine.module.forward_flops(encoded.layout)
            sums.add(packs[-1].losses.sum() / total, encoded.layout.tokens, flops, packs[-1].bins())
            back_s = time.perf_counter()
            self.watch.at(f"step {step}, micro-step {len(packs) - 1}: done")
        self._count(bad)
        if self.world.is_main:
            self._look_around(time.perf_counter() - started)
        wishes = Wishes(
            bool(self.control.reason),
            self.control.by_person,
            self.world.is_main and self.saves.time_has_come(),
            not self.saves.written,
        )
        self.watch.at(f"step {step}, the sum over the ranks")
        agreed = sums.over_ranks(own_s, wishes)
        self.saves.wait_to_update()
        before_step = time.perf_counter()
        self.watch.at(f"step {step}, the optimizer")
        factor = lr_factor(self.recipe.optimizer, step, self.recipe.train.steps)
        grad_norm = self.engine.step(factor, step)
        now = time.perf_counter()
        if not agreed.wishes.unwritten:
            self.saves.commit()
        self.watch.at(f"step {step}, a look at it")
        self._seed(step)  # what is looked at twice is computed as before
        spike = self.incidents.judge(step, agreed, grad_norm, packs)
        figures = {
            "loss": agreed.loss,
            "lr": self.recipe.optimizer.lr * factor,
            "grad_norm": grad_norm,
            "step_s": now - started,
            "data_wait_s": self.loader.wait_s - waited,
            "encode_s": encode_s,
            "optimizer_s": now - before_step,
            "optimizer_share": (now - before_step) / (now - started),
            "save_s": self.saves.held_s(),
            "samples_seen": (step + 1) * total,
            "micro_steps": len(packs),
            "bad_samples": len(self.bad),
            "updates_left_out": self.guards.nonfinite.total,
            "tokens": agreed.tokens,
            **self.throughput(now - started, total, agreed.tokens, agreed.flops),
            **agreed.metrics(),
            **memory(self.world.device),
        }
        return figures, agreed.wishes, spike

    def _agree(self) -> None:
        """See that all ranks are about to do the same; versions may differ, as on a resume, and are told."""
        versions = self.record["versions"]
        self.record["versions"] = distributed.from_main(versions)
        for rank, theirs in enumerate(distributed.gather(versions)):
            if theirs != self.record["versions"] and self.world.is_main:
                other = {key: f"{v} here {versions[key]}" for key, v in theirs.items() if v != versions[key]}
                log.warning("rank %d has other versions: %s", rank, other)
        distributed.check_agreement(flat(self.record))

    def _seed(self, step: int) -> None:
        if self.recipe.lora.dropout:
            torch.manual_seed(words(self.recipe.seed, Purpose.DROPOUT, step, self.world.rank)[0])

    def _losses(self, samples: list[Sample], encoded: Encoded) -> Any:
        return self.objective(
            lambda x_t, sigmas: self.pipeline.velocity(self.engine, x_t, sigmas, encoded),
            encoded.x0,
            encoded.layout,
            torch.tensor([s.draw for s in samples]),
        )

    def _go_back(self, step: int) -> int:
        """Undo the steps since the newest checkpoint, leaving out their data and a little more; returns its step."""
        self.watch.at("going back")
        self.saves.commit()
        path = self.incidents.go_back(step, self.watch.busy)
        if path is None:
            return step
        self.saves.newest = path
        self.tracker.rewind(checkpoint.step_of(path))
        return checkpoint.step_of(path)

    def _paint(self, step: int) -> None:
        recipe, folder = self.recipe, self.run_dir / "samples" / f"step-{step:08d}"
        grid = paint(self.engine, self.pipeline, recipe.sample, recipe.seed, folder, self.world, self.watch.busy)
        if grid is not None:
            self.tracker.log_image(step - 1, "samples", grid)

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

    def _encode(self, samples: list[Sample]) -> dict[str, list[Any]]:
        columns, prompts, draws = zip(*((s.columns, s.caption, s.draw) for s in samples), strict=True)
        batch = self.pipeline.batch(columns, list(prompts), list(draws))
        return self.cache.encode([s.row for s in samples], batch)

    def _go_on_from(self, path: Path) -> int:
        """Take up the guards where the checkpoint left them; returns its step."""
        manifest = checkpoint.read_manifest(path)
        step: int = manifest["step"]
        self.guards.restore(manifest.get("guards", {}))
        folder = self.run_dir / "checkpoints"
        ours = path.resolve().parent == folder.resolve()
        checkpoint.set_aside_newer(folder, step if ours else -1)  # another run's goes on here: this one's are past
        if self.world.is_main:
            log.info("continuing from %s at step %d of %d", path, step, self.recipe.train.steps)
        return step

    def _look_around(self, step_s: float) -> None:
        """On rank 0: whether there is a STOP file, or the time is up but for this step's end, another, and a save."""
        self.control.look(self.run_dir)
        limit = self.recipe.train.max_minutes * 60
        if limit and time.monotonic() - self.control.started + 2 * step_s + self.saves.longest_s > limit:
            self.control.stop(f"train.max_minutes = {self.recipe.train.max_minutes:g}")

    def _say_stopped(self, where: str) -> None:
        if self.world.is_main:
            self.control.obeyed(self.run_dir)
            reason = self.control.reason or "another rank's signal"
            log.info("stopped by %s %s; the same command continues", reason, where)

    def _save(self, step: int, *, last: bool) -> None:
        self.watch.at(f"step {step}, saving")
        self.tracker.sync()
        self.saves.save(step, {**self.record, "guards": self.guards.state()}, last=last)


def _with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield each item with whether it is the last."""
    iterator = iter(items)
    item = next(iterator)
    for following in iterator:
        yield item, False
        item = following
    yield item, True

"""Steps that went wrong: judged by the guards, explained by a second look, told and written down."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dstrain.agreement import Agreed
from dstrain.config import Recipe
from dstrain.data.sample import Sample
from dstrain.diagnosis import Suspect, report, second_look, suspects
from dstrain.engine import checkpoint, distributed
from dstrain.engine.engine import Engine
from dstrain.engine.state import State
from dstrain.errors import TrainingHalted
from dstrain.guards import Guards, Spike
from dstrain.pipelines.base import Encoded, Pipeline
from dstrain.storage import append_json_line
from dstrain.tracking.metrics import sigma_bins

EVENTS = "events.jsonl"
MOST_SKIPS = 3  # on one checkpoint; then the data is not to blame
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Computed:
    """A pack of this rank, and what came out: losses [N] in fp64 and noise levels [N] of its samples."""

    samples: list[Sample]
    encoded: Encoded
    losses: Tensor
    sigmas: Tensor

    def bins(self) -> Tensor:
        """Return sums of losses and counts by noise level, [2, SIGMA_BINS]."""
        return sigma_bins(self.losses, self.sigmas)


class Incidents:
    """Judges the steps of a run, on all ranks alike, and writes what was wrong into RUN_DIR/events.jsonl."""

    def __init__(self, recipe: Recipe, guards: Guards, pipeline: Pipeline, engine: Engine, objective: Any) -> None:
        self._recipe, self._guards = recipe, guards
        self._pipeline, self._engine, self._objective = pipeline, engine, objective
        self._run_dir = Path(recipe.run_dir)

    def judge(self, step: int, agreed: Agreed, grad_norm: float, packs: Sequence[Computed]) -> Spike | None:
        """Look at a step that is done; return the spike to go back for, if there is one and it is wanted. Collective.

        TrainingHalted if too many steps in a row were left out since their figures were not finite.
        """
        if self._guards.nonfinite.judge(agreed.loss, grad_norm):
            self._not_finite(step, agreed.loss, grad_norm, packs)
            return None
        spike = self._guards.spikes.judge(agreed.bins) if self._recipe.guard.spikes != "off" else None
        if spike is None:
            return None
        samples = [sample for pack in packs for sample in pack.samples]
        losses, sigmas = torch.cat([p.losses for p in packs]), torch.cat([p.sigmas for p in packs])
        found = suspects(distributed.rank(), samples, losses, sigmas, self._guards.spikes.usual())
        _say(self._told(step, str(spike), found))
        return spike if self._recipe.guard.spikes == "skip" else None

    def go_back(self, step: int, busy: Callable[[], None]) -> Path | None:
        """Undo the steps before `step` since the last regular checkpoint, for the spike in the last; return that one.

        Regular are those of every train.save_every steps: others depend on when the run was stopped. The data of the
        steps is left out, and a little more. Returns None if there is no such checkpoint yet. Collective.
        TrainingHalted if that was done for the same checkpoint again and again.
        """
        folder = self._run_dir / "checkpoints"
        path = checkpoint.find(folder, busy, every=self._recipe.train.save_every)
        if path is None:
            _say("there is no checkpoint to go back to yet; the training goes on")
            return None
        manifest, skipped = checkpoint.read_manifest(path), self._guards.skipped
        back: int = manifest["step"]
        skipped.skip(back, step - 1 + self._recipe.guard.skip_steps)
        if sum(start == back for start, _ in skipped.state()) > MOST_SKIPS:
            raise TrainingHalted(
                f"{path}: {MOST_SKIPS} times a spike followed on it; go on from an earlier checkpoint with"
                " --resume PATH, or with a lower optimizer.lr"
            )
        self._guards.restore({**manifest.get("guards", {}), "skipped": skipped.state()})
        self._engine.master.restore(State(path), publish=True, busy=busy)
        checkpoint.set_aside_newer(folder, back)
        _say(f"back to {path}; its steps take the batches from {skipped.data_step(back)} on")
        return path

    def _not_finite(self, step: int, loss: float, grad_norm: float, packs: Sequence[Computed]) -> None:
        name, value = ("gradient norm", grad_norm) if math.isfinite(loss) else ("loss", loss)
        looked_at = [(pack.samples, pack.encoded) for pack in packs]
        found = second_look(self._pipeline, self._engine, self._objective, looked_at, distributed.rank())
        told = self._told(step, f"the {name} is {value}", found, self._recipe.batch.global_batch_size)
        if self._guards.nonfinite.must_halt:
            raise TrainingHalted(f"{told}. No weight was changed by it, and the last checkpoint is intact")
        _say(f"{told}. No weight was changed by it; the training goes on")

    def _told(self, step: int, what: str, found: list[Suspect], samples: int = 0) -> str:
        """Tell all ranks of all suspects, write them down, and return the message."""
        found = distributed.share(found)
        if distributed.is_main():
            rows = [{**asdict(s), "value": str(s.value)} for s in found]  # JSON has no NaN
            append_json_line(self._run_dir / EVENTS, {"step": step, "what": what, "suspects": rows})
        return report(step, what, found, samples)


def _say(text: str) -> None:
    if distributed.is_main():
        log.warning("%s", text)

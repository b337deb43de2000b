"""Where the numbers of a run go: metrics.jsonl always, Weights & Biases when asked."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from dstrain.tracking.jsonl import METRICS_FILE, JsonlTracker
from dstrain.tracking.wandb import WandbTracker, check_mode, resolve_mode


class Tracker(Protocol):
    """What the trainer tells its numbers to."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the metrics of a step; called once a step, with rising steps."""

    def log_image(self, step: int, name: str, path: Path) -> None:
        """Show the picture file `path` under `name` at `step`; called after `log(step, ...)`."""

    def rewind(self, step: int) -> None:
        """Forget what was logged for `step` and later, where it can be forgotten: these steps are taken anew."""

    def sync(self) -> None:
        """Make what was logged durable."""

    def finish(self) -> None:
        """Close; never takes longer than ten seconds. A second call does nothing."""


def open_trackers(
    run_dir: Path,
    mode: str,
    project: str,
    name: str,
    config: Mapping[str, Any],
    first_step: int,
    is_main: bool,
) -> Tracker:
    """Open what the main rank logs to; the other ranks get a tracker that does nothing.

    Args:
        run_dir: folder of the run; receives `metrics.jsonl` and W&B's own files.
        mode: of W&B: "auto" (online when there is a key, else offline), "online", "offline" or "off".
        project: W&B project.
        name: W&B run name.
        config: shown in W&B, with secrets masked.
        first_step: the first step that will be logged; lines of it and of later steps are cut off metrics.jsonl.
        is_main: whether this is the rank that logs.

    Raises:
        ConfigError: `mode` is none of the four (on every rank, so that all stop together).
    """
    check_mode(mode)
    if not is_main:
        return Tee([])
    resolved = resolve_mode(mode)
    jsonl = JsonlTracker(run_dir / METRICS_FILE, first_step=first_step)
    if resolved == "off":
        return jsonl
    return Tee([jsonl, WandbTracker(run_dir, resolved, project, name, config)])


class Tee:
    """Passes everything on to several trackers in turn, or to none."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = trackers

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.log(step, values)

    def log_image(self, step: int, name: str, path: Path) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.log_image(step, name, path)

    def rewind(self, step: int) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.rewind(step)

    def sync(self) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.sync()

    def finish(self) -> None:
        """See Tracker."""
        for tracker in self._trackers:
            tracker.finish()

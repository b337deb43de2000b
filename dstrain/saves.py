"""When a run saves, and what becomes of a save that fails."""

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

from dstrain.config import TrainConfig
from dstrain.engine import checkpoint, distributed
from dstrain.engine.master import Master
from dstrain.engine.saver import Saver
from dstrain.errors import CheckpointError, TrainingHalted

log = logging.getLogger(__name__)


class Saves:
    """Saves of a run into `folder`, its checkpoints. newest: the last one that is complete. Collective throughout."""

    def __init__(
        self, master: Master, folder: Path, config: TrainConfig, newest: Path | None, busy: Callable[[], None]
    ) -> None:
        self.newest = newest
        self.longest_s = 0.0  # that one has taken so far, from its beginning to its commit
        self._folder, self._config, self._master = folder, config, master
        self._saver = Saver(
            master,
            folder,
            keep=config.keep_checkpoints,
            keep_every=config.keep_every,
            regular=config.save_every,
            background=config.async_save,
            busy=busy,
        )
        self._begun = time.monotonic()
        self._failed = 0
        self._held_s = 0.0

    @property
    def written(self) -> bool:
        """Whether this rank has nothing to write any more."""
        return self._saver.written

    def time_has_come(self) -> bool:
        """Whether the last save was long enough ago; by this rank's clock."""
        return 0 < self._config.save_minutes * 60 < time.monotonic() - self._begun

    def held_s(self) -> float:
        """Return the seconds for which saving has held the training up since the last call."""
        held, self._held_s = self._held_s, 0.0
        return held

    def wait_to_update(self) -> None:
        """Wait until the state may change. Not collective."""
        start = time.perf_counter()
        self._master.may_change.wait()
        self._held_s += time.perf_counter() - start

    def save(self, step: int, facts: dict[str, Any], *, last: bool = False) -> None:
        """Save the state after `step` updates; `last` waits for its end. TrainingHalted if that cannot be done."""
        start = time.perf_counter()
        with suppress(TrainingHalted) if last else nullcontext():  # what failed before is no reason not to try now
            self.commit()
        if self.newest == self._folder / checkpoint.name(step):
            return  # nothing has been done since
        self._begun = time.monotonic()
        try:
            self._saver.begin(step, facts)
        except CheckpointError as e:
            self._bear(e, last)
        else:
            if last or not self._saver.in_background:
                self.commit(last=last)
        self._held_s += time.perf_counter() - start

    def commit(self, *, last: bool = False) -> None:
        """Complete the save that has begun, if one has, when all ranks have written."""
        if not self._saver.saving:
            return
        try:
            self.newest = self._saver.commit()
        except CheckpointError as e:
            self._bear(e, last)
            return
        self._failed = 0
        self.longest_s = max(self.longest_s, time.monotonic() - self._begun)
        log.info("saved %s", self.newest)

    def close(self) -> None:
        """Wait for the thread that writes, without completing its save."""
        self._saver.finish()

    def _bear(self, error: CheckpointError, last: bool) -> None:
        """Let a save fail: the next one may not, unless there is none."""
        self._failed += 1
        if last or self._failed > self._config.failed_saves:
            raise TrainingHalted(str(error)) from None
        if distributed.is_main():
            log.warning("%s. The training goes on, and will save again in its turn", error)

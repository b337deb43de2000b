"""What happens to samples that cannot be decoded: counted, written down once, and limits.

Every rank is told of the bad samples of all ranks, in the global order, so that all of them come to the same end.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dstrain.data.reasons import Reason, ranked
from dstrain.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bad:
    """A sample that failed when it was read, for the draw that wanted it (or a replacement)."""

    draw: int
    shard: str
    key: str
    reason: Reason
    detail: str


class BadSamples:
    """The bad samples that a run has met, each counted and written once as a JSON line to `quarantine` (if given).

    limit: different bad samples at which the run stops. consecutive: draws in a row whose sample is bad.
    known: what `read_quarantine` gave; it counts already: a run that continues does not start from nothing.
    """

    def __init__(
        self,
        limit: int,
        consecutive: int,
        quarantine: Path | None = None,
        known: Mapping[tuple[str, str], Reason] | None = None,
    ) -> None:
        self.limit, self.consecutive, self.quarantine = limit, consecutive, quarantine
        self._reasons = dict(known or {})
        self._last, self._run = -1, 0  # the last bad draw, and how many in a row end with it

    def __len__(self) -> int:
        return len(self._reasons)

    def record(self, found: Sequence[Bad], *, write: bool) -> None:
        """Count the bad samples of a whole step, of all ranks; `write` (on one rank) writes the new ones down.

        Raises DataError, the same on every rank, when a limit is passed.
        """
        new, passed = [], ""
        for bad in sorted(found, key=lambda b: b.draw):
            if bad.draw != self._last:
                self._run = self._run + 1 if bad.draw == self._last + 1 else 1
                self._last = bad.draw
            if (bad.shard, bad.key) not in self._reasons:
                self._reasons[bad.shard, bad.key] = bad.reason
                new.append(bad)
            if self._run > self.consecutive:
                passed = (
                    f"{self._run} draws in a row met bad samples, more than data.max_consecutive_bad = "
                    f"{self.consecutive} ({ranked(b.reason for b in found)}), the last being {bad.key!r} of {bad.shard}"
                    f"{self.where()}; check the shards with `dstrain verify`"
                )
            elif len(self._reasons) > self.limit:
                passed = (
                    f"{len(self._reasons)} bad samples are more than data.max_bad_samples = {self.limit} "
                    f"({ranked(self._reasons.values())}){self.where()}; repair the shards or raise the limit"
                )
            if passed:
                break
        if write and new:
            self._write(new)
        if passed:
            raise DataError(passed)

    def where(self) -> str:
        """Say where the bad samples are listed, for the end of a message."""
        return f"; they are listed in {self.quarantine}" if self.quarantine is not None else ""

    def _write(self, new: Sequence[Bad]) -> None:
        for bad in new:
            log.warning("%s: sample %r is bad (%s: %s)", bad.shard, bad.key, bad.reason, bad.detail)
        if self.quarantine is None:
            return
        try:
            self.quarantine.parent.mkdir(parents=True, exist_ok=True)
            with self.quarantine.open("a") as f:
                f.write("".join(json.dumps(asdict(bad)) + "\n" for bad in new))
        except OSError as error:  # the run itself needs no list
            log.warning("%s cannot be written: %s", self.quarantine, error.strerror)


def read_quarantine(path: Path) -> dict[tuple[str, str], Reason]:
    """Read what an earlier run wrote, by (shard, key); a line that is no entry is passed over with a warning."""
    known = {}
    for line in path.read_text("utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            entry = json.loads(line)
            known[str(entry["shard"]), str(entry["key"])] = Reason(entry["reason"])
        except (ValueError, KeyError, TypeError, RecursionError):
            log.warning("%s has a line that is not an entry: %.80r", path, line)
    return known

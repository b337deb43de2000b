"""What happens to samples that cannot be decoded: counted, written down once, and a limit."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from dstrain.data.reasons import Reason, ranked
from dstrain.errors import DataError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Bad:
    """A sample that failed when it was read."""

    shard: str
    key: str
    reason: Reason
    detail: str
    row: int


class BadSamples:
    """The bad samples that this rank has met, by row, each written once as a JSON line to `quarantine` (if given)."""

    def __init__(self, limit: int, quarantine: Path | None) -> None:
        self.limit = limit
        self.quarantine = quarantine
        self.rows: dict[int, Reason] = {}
        self._known = _known(quarantine) if quarantine is not None else set()

    def record(self, bad: Bad, draw: int) -> None:
        """Count a bad sample met at `draw`; raises DataError when there are more different ones than the limit."""
        if bad.row in self.rows:
            return
        self.rows[bad.row] = bad.reason
        log.warning("%s: sample %r is bad (%s: %s)", bad.shard, bad.key, bad.reason, bad.detail)
        if self.quarantine is not None and (bad.shard, bad.key) not in self._known:
            self.quarantine.parent.mkdir(parents=True, exist_ok=True)
            with self.quarantine.open("a") as f:
                f.write(json.dumps({**vars(bad), "draw": draw}) + "\n")
        if len(self.rows) > self.limit:
            raise DataError(
                f"{len(self.rows)} bad samples are more than max_bad_samples = {self.limit} "
                f"({ranked(self.rows.values())}){self.where()}; repair the shards or raise the limit"
            )

    def where(self) -> str:
        """Say where the bad samples are listed, for the end of a message."""
        return f"; they are listed in {self.quarantine}" if self.quarantine is not None else ""


def _known(quarantine: Path) -> set[tuple[str, str]]:
    """Read what an earlier run wrote, so that a run that continues does not write it again."""
    known = set()
    for line in quarantine.read_text().splitlines() if quarantine.exists() else []:
        try:
            entry = json.loads(line)
            known.add((entry["shard"], entry["key"]))
        except (ValueError, KeyError, TypeError):
            log.warning("%s has a line that is not an entry: %.80r", quarantine, line)
    return known

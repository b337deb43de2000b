"""Plans of faults for a run of the tests; dstrain/faults.py does what they say."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FaultPlan:
    """Each method returns a plan with one more fault; rank None is any rank."""

    faults: tuple[dict[str, Any], ...] = ()

    def at(self, point: str, action: str, **when: Any) -> "FaultPlan":
        fault = {"at": point, "do": action} | {key: value for key, value in when.items() if value is not None}
        return FaultPlan((*self.faults, fault))

    def kill_at_write(self, rank: int | None, nth: int, torn: bool = False) -> "FaultPlan":
        return self.at("write", "torn" if torn else "kill", rank=rank, nth=nth)

    def fail_at_write(self, rank: int | None, nth: int | None, error: str) -> "FaultPlan":
        return self.at("write", error, rank=rank, nth=nth)

    def enospc_at_write(self, rank: int | None, nth: int | None) -> "FaultPlan":
        return self.fail_at_write(rank, nth, "ENOSPC")

    def nan(self, rank: int | None, step: int | None, place: str) -> "FaultPlan":
        return self.at(place, "nan", rank=rank, step=step)

    def sleep(self, rank: int | None, point: str, s: float, nth: int | None = None) -> "FaultPlan":
        return self.at(point, "sleep", rank=rank, seconds=s, nth=nth)

    def kill(self, rank: int | None, step: int, point: str = "step") -> "FaultPlan":
        return self.at(point, "kill", rank=rank, step=step)

    def stop(self, rank: int | None, step: int, point: str = "step") -> "FaultPlan":
        return self.at(point, "stop", rank=rank, step=step)

    def environment(self) -> dict[str, str]:
        return {"DSTRAIN_FAULTS": json.dumps(self.faults)}

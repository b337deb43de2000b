"""Faults on purpose, so that tests can see a run survive them. Without DSTRAIN_FAULTS nothing happens here.

DSTRAIN_FAULTS is a JSON list of faults, each {"at": POINT, "do": ACTION} with, as wanted, "rank" (of the process),
"step" (of the training), "nth" (the n-th time that this process is there, from 1), "seconds" (sleep) and "once" (a file
that is made when the fault happens, so that it does not happen again after a restart).

Points: step, data, save, barrier, write, input, loss, grad, weight, preflight. Actions: kill and stop (SIGKILL and
SIGSTOP to itself), exit, sleep, raise, and ENOSPC, EIO, EACCES or another name of `errno`. Done at the place itself are
torn (write half, then exit), nan and spike.
"""

import errno
import json
import os
import signal
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstrain import launched

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "DSTRAIN_FAULTS"
_visits: Counter[str] = Counter()


def reach(point: str, step: int | None = None) -> str:
    """Do what is planned for `point` now; return the action that the caller is to do itself, or ""."""
    if not os.environ.get(VARIABLE):
        return ""
    _visits[point] += 1
    for fault in _plan(os.environ[VARIABLE]):
        if _is_due(fault, point, step):
            return _do(fault)
    return ""


def spoil(point: str, tensor: "Tensor", step: int) -> "Tensor":
    """Return `tensor`, or what a fault that is planned for `point` makes of it: nan, or ten times as much (spike)."""
    return tensor * {"nan": float("nan"), "spike": 10.0}[action] if (action := reach(point, step)) else tensor


@cache
def _plan(text: str) -> list[dict[str, Any]]:
    return list(json.loads(text))


def _is_due(fault: dict[str, Any], point: str, step: int | None) -> bool:
    rank = launched.rank()
    return (
        fault["at"] == point
        and fault.get("rank", rank) == rank
        and fault.get("step", step) == step
        and fault.get("nth", _visits[point]) == _visits[point]
        and not ("once" in fault and Path(fault["once"]).exists())
    )


def _do(fault: dict[str, Any]) -> str:
    action = fault["do"]
    if "once" in fault:
        Path(fault["once"]).touch()
    if action in ("nan", "spike", "torn"):
        return str(action)
    if action == "sleep":
        time.sleep(fault["seconds"])
    elif action == "exit":
        os._exit(1)
    elif action == "raise":
        raise RuntimeError(f"a fault was planned at {fault['at']}")
    elif action in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)
    else:
        raise OSError(getattr(errno, action), os.strerror(getattr(errno, action)))
    return ""

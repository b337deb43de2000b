"""Before a run: is every node there, fit, and heard by the others? Names the node that is not, in seconds.

One process for each rank, started like the training. Each forks a worker, which does what can hang, and only watches
it: so a GPU that never answers is reported by its own node. The watchers meet in a store on the first node, and the
first of them judges: what each node finds about itself (dstrain/engine/health.py); then, if all are fit, the clocks and
a sum over all ranks. DeepSpeed is not needed.
"""

import json
import logging
import multiprocessing
import os
import secrets
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dstrain import faults
from dstrain.engine import health
from dstrain.engine.distributed import environment_world
from dstrain.engine.processes import Stat
from dstrain.errors import ConfigError
from dstrain.storage import write_atomic

CHECKS = ("disks", "GPUs", "arithmetic", "memory errors")
TOGETHER = ("shared run_dir", "meeting", "sum over all ranks", "sum over all GPUs")
CLOCK_WARN, CLOCK_BAD = 1.0, 30.0  # seconds from the first node's
now = time.time
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Report:
    """What a rank's watcher says of its worker: ok, unfit (see `why`), silent, waited for others in vain, or absent."""

    node: str
    state: str
    stage: str = ""
    why: str = ""
    gpus: int = 0
    clock: float = 0.0  # seconds ahead of the first node's


@dataclass(frozen=True)
class Finding:
    """One sentence about a node, or about all of them if `node` is empty."""

    node: str
    text: str
    bad: bool = True


@dataclass(frozen=True)
class Task:
    """What a rank is to check."""

    rank: int
    local_rank: int
    size: int
    run_dir: Path
    gpus: int
    seconds: float  # what a node has to answer


def preflight(run_dir: Path, nodes: Sequence[str], gpus: int, timeout: float, out: Path | None) -> int:
    """Check all nodes, as one of their ranks; returns 0 if the run can start, 1 if not, 2 if no node is to blame.

    `nodes` are their names in the order of ranks, as far as known; `gpus` is how many a node must have; `timeout`
    seconds are what each of two rounds may take. The names of the bad nodes are written to `out`, one a line.
    ConfigError if the launcher's variables are not complete.
    """
    started = time.monotonic()
    rank, local_rank, size = environment_world()
    faults.reach("preflight")
    task = Task(rank, local_rank, size, run_dir, gpus, timeout / 2)
    worker = _Worker(task)  # forked before this process has threads
    try:
        store = _meet(rank, size, timeout)
    except dist.DistError as e:
        worker.end()
        return _without_store(e, nodes, rank, timeout, out)
    try:
        store.set(f"node/{rank}", _node())
        reports, go = _first_round(store, worker, task, nodes, timeout)
        if go:
            reports = _second_round(store, worker, task, go, nodes, timeout)
        if rank == 0:
            findings = judge(reports) + (clocks(reports) if go else [])
            store.set("code", str(_conclude(findings, reports, out, time.monotonic() - started)))
        code = int(store.get("code"))
        store.add("left", 1)
        if rank == 0:
            _wait(store, lambda: store.add("left", 0) >= sum(r.state != "absent" for r in reports), 5.0)
        return code
    except dist.DistError as e:  # the first node is gone in the middle of it
        return _without_store(e, nodes, rank, timeout, out)
    finally:
        worker.end()


def judge(reports: Sequence[Report]) -> list[Finding]:
    """Name who is to blame, from the reports of all ranks of a round; nothing found if all are ok.

    Who waits for others is not to blame, nor is who is silent while another is silent at an earlier stage.
    """
    blamed = [r for r in reports if r.state in ("unfit", "absent")]
    blamed += [r for r in reports if r.state == "silent" and r.stage in CHECKS]
    most = max((r.gpus for r in reports), default=0)
    blamed += [
        replace(r, why=f"{r.gpus} GPUs where others have {most}") for r in reports if r.state == "ok" and r.gpus < most
    ]
    if not blamed and (stuck := [r for r in reports if r.state in ("silent", "waited")]):
        silent = [r for r in stuck if r.state == "silent"]
        first = min((TOGETHER.index(r.stage) for r in silent), default=0)
        blamed = [r for r in silent if TOGETHER.index(r.stage) == first]
        if len(blamed) == len(stuck):  # all of them: then those that do not even run
            blamed = [r for r in blamed if r.why]
        if not blamed:
            stage, why = stuck[0].stage, next((r.why for r in stuck if r.why), "")
            text = f"all nodes answer, but not together: {stage} did not end{why and f' ({why})'}"
            return [Finding("", f"{text}; look at their network, and at NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME")]
    return [Finding(r.node, r.why if r.state != "silent" else _silence(r)) for r in blamed]


def clocks(reports: Sequence[Report]) -> list[Finding]:
    """Compare the clocks with the first node's."""
    return [
        Finding(
            r.node,
            f"its clock is {abs(r.clock):.1f} s {'ahead' if r.clock > 0 else 'behind'}",
            abs(r.clock) > CLOCK_BAD,
        )
        for r in reports
        if abs(r.clock) > CLOCK_WARN
    ]


def _silence(report: Report) -> str:
    return f"{report.stage}: no answer in time{report.why and f' ({report.why})'}"


def _conclude(findings: Sequence[Finding], reports: Sequence[Report], out: Path | None, seconds: float) -> int:
    for finding in dict.fromkeys(findings):
        log.error(
            "preflight: %s: %s%s",
            "bad" if finding.bad else "warning",
            f"{finding.node}: " * bool(finding.node),
            finding.text,
        )
    nodes, bad = ({x.node for x in part} for part in (reports, [f for f in findings if f.bad]))
    if not bad:
        log.info(
            "preflight: %d nodes, %d ranks, %d GPUs a node: fit, in %.1f s",
            len(nodes),
            len(reports),
            reports[0].gpus,
            seconds,
        )
        return 0
    if len(nodes) > 1 and nodes <= bad:
        log.error("preflight: all nodes are bad: it is the job or what they share, not a node")
        return 2
    _write(out, sorted(bad - {""}))
    return 1


def _write(out: Path | None, names: Sequence[str]) -> None:
    if out is not None and names:
        write_atomic(out, "".join(f"{name}\n" for name in names).encode())


def _without_store(e: Exception, nodes: Sequence[str], rank: int, timeout: float, out: Path | None) -> int:
    """The first node is the one to blame, unless its own verdict is there."""
    first = nodes[0] if nodes else os.environ.get("MASTER_ADDR", "")
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    why = str(e).splitlines()[0]
    log.error(
        "preflight: bad: %s: rank %d cannot meet the others at %s within %g s: %s", first, rank, where, timeout, why
    )
    if out is not None and not out.exists():
        _write(out, [first])
    return 1


def _meet(rank: int, size: int, timeout: float) -> dist.TCPStore:
    if "MASTER_ADDR" not in os.environ and size > 1:
        raise ConfigError("MASTER_ADDR is not set; launch/slurm/train.sbatch shows how to set it under srun")
    host, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
    limit = timedelta(seconds=timeout)
    return dist.TCPStore(host, port, is_master=rank == 0, wait_for_workers=False, timeout=limit)


def _first_round(
    store: dist.TCPStore, worker: "_Worker", task: Task, nodes: Sequence[str], timeout: float
) -> tuple[list[Report], dict[str, Any]]:
    """Tell what this node found about itself; the first rank gets all reports, and everyone whether to go on."""
    store.set(f"alone/{task.rank}", json.dumps(asdict(worker.report(task.seconds))))
    reports: list[Report] = []
    if task.rank == 0:
        reports = _gather(store, "alone", task.size, nodes, timeout)
        token = f".preflight-{secrets.token_hex(8)}"
        fit = not judge(reports)
        if fit:
            (task.run_dir / token).touch()
        store.set("go", json.dumps({"token": token, "port": store.port, "clock": now()} if fit else {}))
    store.set_timeout(timedelta(seconds=2 * timeout))
    return reports, json.loads(store.get("go"))


def _second_round(
    store: dist.TCPStore, worker: "_Worker", task: Task, go: dict[str, Any], nodes: Sequence[str], timeout: float
) -> list[Report]:
    """Meet in the process group; returns all reports to the first rank."""
    ahead = now() - go["clock"] if task.rank else 0.0  # all were waiting for this word, so it took no time
    worker.pipe.send(go)
    report = replace(worker.report(task.seconds), clock=ahead)
    store.set(f"together/{task.rank}", json.dumps(asdict(report)))
    if task.rank:
        return []
    reports = _gather(store, "together", task.size, nodes, timeout)
    (task.run_dir / go["token"]).unlink(missing_ok=True)
    return reports


def _gather(store: dist.TCPStore, name: str, size: int, nodes: Sequence[str], timeout: float) -> list[Report]:
    """Return all ranks' reports, of those too that did not send one in time."""
    keys = [f"{name}/{rank}" for rank in range(size)]
    _wait(store, lambda: store.check(keys), timeout)
    reports = []
    for rank, key in enumerate(keys):
        if store.check([key]):
            reports.append(Report(**json.loads(store.get(key))))
        elif store.check([f"node/{rank}"]):
            reports.append(Report(store.get(f"node/{rank}").decode(), "absent", why=f"rank {rank} stopped answering"))
        else:
            node = nodes[rank * len(nodes) // size] if nodes else f"the node of rank {rank}"
            reports.append(Report(node, "absent", why=f"rank {rank} did not answer within {timeout:g} s"))
    return reports


def _wait(store: dist.TCPStore, done: Any, timeout: float) -> None:
    end = time.monotonic() + timeout
    while not done() and time.monotonic() < end:
        time.sleep(0.02)


def _node() -> str:
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


class _Worker:
    """The process that does what can hang, seen from the one that watches it."""

    def __init__(self, task: Task) -> None:
        fork = multiprocessing.get_context("fork")
        self.pipe, theirs = fork.Pipe()
        self.process = fork.Process(target=_work, args=(task, theirs, self.pipe), daemon=True)
        self.process.start()
        theirs.close()

    def report(self, seconds: float) -> Report:
        """Follow the worker until its round is over, for at most `seconds`."""
        end, stage = time.monotonic() + seconds, ""
        try:
            while self.pipe.poll(max(0.0, end - time.monotonic())):
                said: Mapping[str, Any] = self.pipe.recv()
                if "state" in said:
                    return Report(_node(), **said)
                stage = said["stage"]
        except EOFError:
            self.process.join(5)
            return Report(_node(), "unfit", stage, f"{stage}: the check died ({self.process.exitcode})")
        return Report(_node(), "silent", stage, _stuck(self.process.pid))

    def end(self) -> None:
        """Kill it, also where it is stopped."""
        self.process.kill()


def _stuck(pid: int | None) -> str:
    """Say why a process does not run, as far as Linux knows: stopped, or waiting for a device; "" if it does."""
    state = Stat.of(pid).state if pid else ""
    return {"T": "its process is stopped", "D": "its process waits for a device"}.get(state, "")


def _work(task: Task, pipe: Connection, other_end: Connection) -> None:
    other_end.close()  # inherited; while it is open the pipe does not end with the process that watches
    stage, gpus = "", 0

    def enter(name: str) -> None:
        nonlocal stage
        stage = name
        pipe.send({"stage": name})
        faults.reach("preflight")

    try:
        enter("disks")
        if task.local_rank == 0:
            health.check_disks(task.run_dir)
        enter("GPUs")
        gpus = health.check_gpus(task.local_rank, task.gpus)
        device = torch.device("cuda", task.local_rank) if gpus else torch.device("cpu")
        enter("arithmetic")
        health.check_arithmetic(device)
        enter("memory errors")
        health.check_memory_errors(device)
        pipe.send({"state": "ok", "stage": stage, "gpus": gpus})
        go = pipe.recv()
        enter("shared run_dir")
        _see(task.run_dir / go["token"])
        enter("meeting")
        waited = _sum(task, device, go["port"], enter)
        pipe.send({"state": "waited" if waited else "ok", "stage": stage, "gpus": gpus, "why": waited})
    except (EOFError, BrokenPipeError):  # there is no second round, or nobody who watches
        pass
    except health.Unfit as e:
        pipe.send({"state": "unfit", "stage": stage, "gpus": gpus, "why": str(e)})
    except Exception as e:  # a driver may raise anything, and that is what is to be found
        pipe.send(
            {"state": "unfit", "stage": stage, "gpus": gpus, "why": f"{stage}: {type(e).__name__}: {str(e)[:300]}"}
        )


def _see(token: Path) -> None:
    """Look for the file that the first node made."""
    for _ in range(50):
        if token.exists():
            return
        time.sleep(0.1)
    raise health.Unfit(f"{token.parent} is not the folder that the first node sees")


def _sum(task: Task, device: torch.device, port: int, enter: Any) -> str:
    """Sum over all ranks, on the hosts and then on the GPUs; returns how that failed, which may be another's fault."""
    limit = timedelta(seconds=task.seconds * 0.7)
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    store = dist.PrefixStore("group", dist.TCPStore(host, port, is_master=False, timeout=limit))
    try:
        dist.init_process_group("gloo", store=store, rank=task.rank, world_size=task.size, timeout=limit)
        enter(TOGETHER[2])
        _check_sum(torch.device("cpu"), None)
    except RuntimeError as e:
        return str(e).splitlines()[0][:300]
    if device.type == "cuda":
        enter(TOGETHER[3])
        torch.cuda.set_device(device)
        try:
            _check_sum(device, dist.new_group(backend="nccl"))
        except RuntimeError as e:
            return str(e).splitlines()[0][:300]
    return ""


def _check_sum(device: torch.device, group: dist.ProcessGroup | None) -> None:
    part = health.part_of_sum(device)
    total = part.clone()
    dist.all_reduce(total, group=group)
    if not torch.equal(total, part * dist.get_world_size()):
        raise RuntimeError("the sum is wrong")

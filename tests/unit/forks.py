"""Forked processes that stand for the ranks of a run: a process group of gloo, and a state of a few numbers to save.

Only Saver, checkpoints and disk are tested with them; what DeepSpeed holds is tested on its own ranks, in tests/dist.
"""

import hashlib
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dstrain import faults
from dstrain.engine import checkpoint, run_folder
from dstrain.engine.saver import Saver
from dstrain.engine.state import Piece, State

SHAPES = {"w": torch.Size([5, 7]), "bias": torch.Size([9]), "none": torch.Size([0, 3])}
KINDS = {"weight": torch.float32, "exp_avg": torch.bfloat16}


class Held:
    """The state of one rank, as engine.master.Master gives it: its slice of each parameter at `step`."""

    is_on_disk = False

    def __init__(self, step: int, rank: int = 0, world: int = 1, shapes: Mapping[str, torch.Size] = SHAPES) -> None:
        self.optimizer_step = step
        self.may_change = threading.Event()
        self.may_change.set()
        self.values: list[dict[str, torch.Tensor]] = []
        self._pieces: list[Piece] = []
        for number, (name, shape) in enumerate(shapes.items()):
            count = shape.numel()
            first, last = count * rank // world, count * (rank + 1) // world
            whole = torch.arange(count, dtype=torch.float32) + 1000 * step + 100 * number
            self._pieces.append(Piece(name, shape, first, last - first, KINDS))
            self.values.append({kind: whole[first:last].to(dtype, copy=True) for kind, dtype in KINDS.items()})

    def pieces(self) -> list[Piece]:
        return self._pieces

    def tensors(self) -> Iterator[dict[str, torch.Tensor]]:
        yield from self.values


def save(run: Path, step: int, world: int = 1, rank: int = 0, **options: Any) -> Path:
    saver = Saver(Held(step, rank, world), run / "checkpoints", **options)
    saver.begin(step, {"guards": {"x": 0.5}})
    path = saver.commit()
    saver.finish()  # what is old is removed beside the training
    return path


def start(run: Path) -> int:
    """What a run does first: holds its folder, sweeps, and finds where it goes on; returns that step, 0 if nowhere."""
    run_folder.check_writable(run)
    with run_folder.occupy(run):
        path = checkpoint.find(run / "checkpoints")
        if path is None:
            return 0
        step = checkpoint.read_manifest(path)["step"]
        assert path.name == checkpoint.name(step)
        check(path, step)
        return step


def check(path: Path, step: int) -> None:
    """Whether a checkpoint holds exactly the state of `step`, from however many ranks."""
    state, whole = State(path), Held(step)
    assert state.optimizer_step == step
    assert state.shapes == SHAPES
    for piece, values in zip(whole.pieces(), whole.values, strict=True):
        for kind, tensor in values.items():
            assert torch.equal(state.read(kind, piece.name), tensor.float())


def names(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir()) if (run / "checkpoints").exists() else []


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def forked(
    work: Callable[..., Any],
    *args: Any,
    world: int = 1,
    environment: Mapping[str, str] | None = None,
    group: bool = True,
    timeout: float = 60,
) -> list[Any]:
    """Call work(*args, rank=r, world=n) in `world` forked processes with a process group of their own.

    Returns what each gave: its result, the exception that it raised, or the number of the signal, or minus the exit
    code, with which it ended. When one is gone for good, those that wait for it are ended too.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)  # for work that becomes another user
        pids = [_fork(Path(folder), rank, world, group, environment or {}, work, args) for rank in range(world)]
        statuses: dict[int, int] = {}
        end = time.monotonic() + timeout
        while len(statuses) < world:
            for pid in set(pids) - statuses.keys():
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    statuses[pid] = status
                    end = min(end, time.monotonic() + 10) if status else end
            if time.monotonic() > end:
                for pid in set(pids) - statuses.keys():
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)
        return [_result(Path(folder, str(rank)), statuses[pid]) for rank, pid in enumerate(pids)]


def alone(work: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Call work(*args) in one forked process that is a run's only rank; returns its result or raises its error."""
    [result] = forked(lambda *given, rank, world: work(*given), *args, **options)
    if isinstance(result, BaseException):
        raise result
    return result


def _fork(
    folder: Path, rank: int, world: int, group: bool, environment: Mapping[str, str], work: Any, args: tuple[Any, ...]
) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    code = 1
    try:
        faults._visits.clear()
        os.environ.update(environment, RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
        if group:
            store = dist.HashStore() if world == 1 else dist.FileStore(str(folder / "store"), world)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
        try:
            result = work(*args, rank=rank, world=world)
        except Exception as e:
            traceback.print_exc()
            result = e
        (folder / str(rank)).write_bytes(pickle.dumps(result))
        if group and world > 1 and not isinstance(result, RuntimeError):
            dist.barrier()  # nobody leaves while another still talks to it
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _result(path: Path, status: int) -> Any:
    if path.exists():
        return pickle.loads(path.read_bytes())
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else -os.WEXITSTATUS(status)

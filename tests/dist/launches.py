"""Launches of launch/train.py, undisturbed or with planned faults, signals and kills; nothing is left running."""

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from fork_server import fork
from small_runs import ROOT, environment, free_port, in_fp32, prepare_run

from dstrain.engine.checkpoint import committed
from dstrain.engine.state import State

TAG = "DSTRAIN_TEST_RUN"  # in the environment of all processes of a launch, however they are related


class Launch:
    """One launch, of which all processes are known; they are killed when the context ends.

    launcher: bare (the ranks alone, forked, with the variables that a launcher would set; one rank has none), deepspeed
    or torchrun.
    """

    def __init__(
        self,
        recipe: Path,
        *overrides: str,
        ds: str = "zero2",
        ranks: int = 2,
        launcher: str = "bare",
        faults: Sequence[Mapping[str, Any]] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._tag = secrets.token_hex(8)
        self._log = recipe.parent / f"output-{self._tag}.log"
        self._log.touch()
        env = environment() | {TAG: self._tag, **(env or {})}
        if faults:
            env["DSTRAIN_FAULTS"] = json.dumps(list(faults))
        argv = ["--ds_config", in_fp32(ds, recipe.parent), "--config", str(recipe), *overrides]
        bin_dir, port = Path(sys.executable).parent, free_port()
        self.started = time.time()
        self._launcher: subprocess.Popen[bytes] | None = None
        self._ranks: list[int] = []
        if launcher == "bare":
            size = str(ranks)
            world = {"WORLD_SIZE": size, "LOCAL_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            for r in range(ranks):
                which = world | {"RANK": str(r), "LOCAL_RANK": str(r)} if ranks > 1 else {}
                self._ranks.append(fork(env | which, self._log, self._code(r), argv=argv))
            return
        start = {
            "deepspeed": [bin_dir / "deepspeed", f"--num_accelerators={ranks}", f"--master_port={port}"],
            "torchrun": [bin_dir / "torchrun", f"--nproc_per_node={ranks}", f"--master_port={port}"],
        }[launcher]
        with self._log.open("ab") as log:
            self._launcher = subprocess.Popen(
                [*map(str, start), "launch/train.py", *argv],
                env=env,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _code(self, rank: int) -> Path:
        return self._log.with_name(f"code-{self._tag}-{rank}")

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for pid in self.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._launcher:
            self._launcher.wait()

    @property
    def output(self) -> str:
        """What all processes have said so far."""
        return self._log.read_text(errors="replace")

    def alive(self) -> dict[int, str]:
        """Command lines by pid of all processes of the launch, of launchers and orphans too, but not of zombies."""
        if self._ranks:
            return {pid: "launch/train.py" for r, pid in enumerate(self._ranks) if not self._code(r).exists()}
        found = {}
        if self._launcher and self._launcher.poll() is None:
            found[self._launcher.pid] = ""  # it has no environment yet in the moment after its start
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{TAG}={self._tag}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().decode().replace("\0", " ")
            except OSError:  # it has ended, or is another user's
                continue
        return found

    def rank(self, number: int) -> int:
        """Return the pid of a rank."""
        if self._ranks:
            return self._ranks[number]
        for pid, command in self.alive().items():
            environ = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if "launch/train.py" in command and f"RANK={number}".encode() in environ:
                return pid
        raise AssertionError(f"rank {number} is not running\n{self.output[-4000:]}")

    def launcher(self, word: str) -> int:
        """Return the pid of the launcher whose command has `word` before the script."""
        return next(pid for pid, command in self.alive().items() if word in command.partition("launch/train.py")[0])

    def send(self, number: int, *ranks: int) -> None:
        """Send a signal to ranks."""
        for pid in [self.rank(r) for r in ranks]:
            os.kill(pid, number)

    def until(self, what: Callable[[], bool], limit: float = 240) -> None:
        """Wait until something is so; the run must not end before, nor the time."""
        end = time.monotonic() + limit
        while not what():
            assert time.monotonic() < end, f"not within {limit} s\n{self.output[-4000:]}"
            assert self.alive(), f"the run has ended\n{self.output[-4000:]}"
            time.sleep(0.03)

    def until_said(self, text: str, limit: float = 240) -> None:
        """Wait until a process says `text`."""
        self.until(lambda: text in self.output, limit)

    def until_step(self, run_dir: Path, step: int, limit: float = 240) -> None:
        """Wait until this launch has done `step`."""
        path = run_dir / "metrics.jsonl"  # in which an earlier start may have got further than its checkpoint

        def is_done() -> bool:
            return path.is_file() and path.stat().st_mtime > self.started and steps_done(run_dir) > step

        self.until(is_done, limit)

    def ends(self, limit: float = 240) -> list[int]:
        """Wait until no process is left; return the exit codes: the ranks', or the launcher's."""
        end = time.monotonic() + limit
        while self.alive():
            assert time.monotonic() < end, f"not ended within {limit} s: {self.alive()}\n{self.output[-6000:]}"
            time.sleep(0.03)
        if self._launcher:
            return [self._launcher.wait()]
        return [int(self._code(r).read_text()) for r in range(len(self._ranks))]


def launch(recipe: Path, *overrides: str, code: int | None = 0, limit: float = 300, **how: Any) -> str:
    """Launch, wait for the end, and return the output; asserts the exit code of every rank unless it is None."""
    with Launch(recipe, *overrides, **how) as run:
        codes = run.ends(limit)
        output = run.output
    assert code is None or set(codes) == {code}, f"exit codes {codes} instead of {code}\n{output[-6000:]}"
    return output


def rows(run_dir: Path) -> list[dict[str, Any]]:
    """Whole lines of the metrics that have been written so far."""
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.is_file() else []


def steps_done(run_dir: Path) -> int:
    """Number of the next step, by the metrics."""
    return rows(run_dir)[-1]["step"] + 1 if rows(run_dir) else 0


def losses(run_dir: Path) -> dict[int, str]:
    """Hex losses by step; each step must be there once."""
    found = rows(run_dir)
    by_step = {row["step"]: float(row["loss"]).hex() for row in found}
    assert len(by_step) == len(found) and list(by_step) == sorted(by_step), "a step is there twice, or out of order"
    return by_step


def saved(run_dir: Path) -> list[int]:
    """Steps of the complete checkpoints, newest first."""
    return [int(path.name.removeprefix("step-")) for path in committed(run_dir / "checkpoints")]


def assert_same_run(one: Path, other: Path) -> None:
    """Losses of all steps, and weights, moments and averages of the newest checkpoint, are the same bits."""
    assert losses(one) == losses(other)
    a, b = (State(committed(path / "checkpoints")[0]) for path in (one, other))
    assert a.shapes == b.shapes and a.kinds == b.kinds and a.optimizer_step == b.optimizer_step
    assert {"weight", "exp_avg", "exp_avg_sq"} <= a.kinds
    for name in a.shapes:
        for kind in a.kinds:
            assert a.has(kind, name) == b.has(kind, name)
            if a.has(kind, name):
                assert torch.equal(a.read(kind, name), b.read(kind, name)), f"{kind} of {name}"


def undisturbed_run(tmp: Path, *, steps: int, save_every: int) -> tuple[Path, Path]:
    """Train on two ranks that nothing happens to; returns the recipe and the run's folder."""
    train = {"steps": steps, "save_every": save_every, "async_save": "on", "export": False}
    recipe = prepare_run(tmp, train=train, ema={"decay": 0.9})
    launch(recipe)
    return recipe, tmp / "run"

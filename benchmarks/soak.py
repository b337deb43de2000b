"""Two hundred faults on one run, from a seed; then every loss, weight, moment and average is compared, bit by bit.

    python benchmarks/soak.py                # a quarter of an hour on two cores
    python benchmarks/soak.py --events 20 --seed 3

A tiny model trains on two CPU ranks with ZeRO, an average of its weights, and checkpoints that are written beside the
training. Each start of it meets one end (a rank or both killed at a random moment, a signal, a STOP file, a write that
stops half way, a rank that is stopped and must be found, a loss that is not a number, torchrun killed) and often a
fault that it must survive (no space left, an I/O error, a write of two seconds). Then the same command is started
again, until all faults have happened and all steps are done. What counts is what really happened: a fault that a start
did not live to meet is not counted. After every end no process is left and no checkpoint is lost.

The ranks are forked from this process after its imports, which saves five seconds a start; those under torchrun are
not. A second run of the same recipe, which nothing happens to, is what the result is compared with.
"""

import argparse
import importlib.util
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/dist"), str(ROOT / "tests/unit")]
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}

from data.machine import processor  # noqa: E402
from launches import Launch, assert_same_run, saved, steps_done  # noqa: E402
from small_runs import free_port, prepare_run  # noqa: E402

RESULT = ROOT / "benchmarks/results/soak.json"
SAVE_EVERY = 2
LIMIT = 90.0  # seconds for a start and its end
ENDS = {  # and how often
    "kill -9 rank 0": 3, "kill -9 rank 1": 3, "kill -9 both ranks": 3, "SIGTERM": 2, "SIGUSR1": 2, "SIGINT": 1,
    "STOP file": 2, "torn write": 3, "SIGSTOP": 2, "nan": 2, "torchrun killed": 1,
}  # fmt: skip
BORNE = ("ENOSPC", "EIO", "slow write")


@dataclass
class Start:
    """What one start of the run is to meet; `planned` faults by name, each with the file that says it happened."""

    end: str
    step: int
    delay: float
    planned: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def faults(self) -> list[dict[str, Any]]:
        return [fault for faults in self.planned.values() for fault in faults]


def plan(rng: random.Random, first_step: int, marks: Path, number: int) -> Start:
    """Draw what a start that continues at `first_step` meets."""
    end = rng.choices(list(ENDS), list(ENDS.values()))[0]
    start = Start(end, first_step + rng.randint(1, 3), rng.uniform(0, 0.4))

    def mark(name: str) -> str:
        return str(marks / f"{number}-{name.replace(' ', '-')}")

    if end == "torn write":
        rank, nth = rng.randint(0, 1), rng.randint(15, 400)
        # Not every place where something is written has halves; of three in a row one has.
        start.planned[end] = [{"at": "write", "do": "torn", "rank": rank, "nth": nth + i} for i in range(3)]
    elif end == "SIGSTOP":
        point = rng.choice(["step", "data", "save"])
        step = -(-start.step // SAVE_EVERY) * SAVE_EVERY if point == "save" else start.step
        fault = {"at": point, "do": "stop", "rank": rng.randint(0, 1), "step": step, "once": mark(end)}
        start.planned[end] = [fault]
    elif end == "nan":
        place = rng.choice(["input", "loss", "grad"])
        fault = {"at": place, "do": "nan", "rank": rng.randint(0, 1), "step": start.step, "once": mark(end)}
        start.planned[end] = [fault]
    for name in BORNE:
        if rng.random() < 0.25:
            do = {"do": "sleep", "seconds": 2} if name == "slow write" else {"do": name}
            fault = {"at": "write", "rank": rng.randint(0, 1), "nth": rng.randint(1, 300), "once": mark(name), **do}
            start.planned[name] = [fault]
    return start


class Ranks:
    """Two ranks, forked; they are killed when the context ends."""

    def __init__(self, main: Callable[[list[str]], int], argv: list[str], faults: list[dict[str, Any]], log: Path):
        env = {"WORLD_SIZE": "2", "LOCAL_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        env["DSTRAIN_FAULTS"] = json.dumps(faults)
        self.codes: dict[int, int] = {}  # by rank, negative for a signal; of those that have ended
        self._pids = [self._fork(main, argv, env | {"RANK": str(r), "LOCAL_RANK": str(r)}, log) for r in range(2)]

    def _fork(self, main: Callable[[list[str]], int], argv: list[str], env: Mapping[str, str], log: Path) -> int:
        if pid := os.fork():
            return pid
        code = 70
        try:
            os.setsid()
            os.environ.update(env)
            with log.open("ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            code = main(argv)
        finally:
            os._exit(code)

    def send(self, number: int, ranks: list[int]) -> bool:
        """Send a signal to the ranks that are there; whether there is one."""
        there = [r for r in self.alive() if r in ranks]
        for r in there:
            os.kill(self._pids[r], number)
        return bool(there)

    def alive(self) -> list[int]:
        for r, pid in enumerate(self._pids):
            if r not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[r] = os.waitstatus_to_exitcode(status)
        return [r for r in range(2) if r not in self.codes]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        self.send(signal.SIGKILL, [0, 1])
        wait(lambda: not self.alive(), 10, "the ranks cannot be killed")


def wait(until: Callable[[], bool], limit: float, otherwise: str) -> None:
    end = time.monotonic() + limit
    while not until():
        if time.monotonic() > end:
            raise AssertionError(otherwise)
        time.sleep(0.02)


class Chain:
    """The run that all of it happens to."""

    def __init__(self, folder: Path, events: int, steps: int, seed: int) -> None:
        self.rng, self.events, self.steps = random.Random(seed), events, steps
        self.happened: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()
        self.starts = 0
        self.begun = 0.0  # the last start, by the clock of files
        self.marks, self.log, self.run_dir = folder / "marks", folder / "soak.log", folder / "run"
        self.marks.mkdir()
        self.recipe = prepare_run(
            folder,
            batch={"global_batch_size": 4, "tokens_per_pack": 64},
            train={"steps": steps, "save_every": SAVE_EVERY, "async_save": "on", "export": False},
            ema={"decay": 0.9},
            guard={"nonfinite_steps": 0, "hang_minutes": 0.05, "spikes": "off"},
        )
        self.ds = str(ROOT / "ds_configs/zero2.json")
        spec = importlib.util.spec_from_file_location("train", ROOT / "launch/train.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        import deepspeed  # noqa: F401, before the forks

        import dstrain.job
        import dstrain.trainer  # noqa: F401

        self.main: Callable[[list[str]], int] = module.main

    def undisturbed(self) -> Path:
        """Run the recipe once without any fault; returns its folder."""
        other = self.run_dir.with_name("undisturbed")
        with Ranks(self.main, [*self._argv(), f"run_dir={other}"], [], self.log) as ranks:
            wait(lambda: not ranks.alive(), 600 + self.steps, "the undisturbed run does not end")
        assert set(ranks.codes.values()) == {0}, ranks.codes
        return other

    def run(self) -> None:
        """Start again and again until all has happened, then to the end."""
        while self.happened.total() < self.events:
            before = saved(self.run_dir)
            start = plan(self.rng, before[0] if before else 0, self.marks, self.starts)
            assert start.step < self.steps - 1, "the steps are over before the events are: give it more"
            self.starts += 1
            begun, self.begun = time.monotonic(), time.time()
            with self.log.open("a") as log:
                log.write(f"\n=== start {self.starts} from {before[:1]}: {start}\n")
            met = self._torchrun(start) if start.end == "torchrun killed" else self._forked(start)
            self.happened.update(met)
            after = saved(self.run_dir)
            assert not before or after[0] >= before[0], f"a checkpoint is lost: {before}, then {after}"
            assert len(after) >= min(2, len(before)), f"fewer than two checkpoints: {before}, then {after}"
            seconds = time.monotonic() - begun
            print(f"{self.happened.total()} events, step {after[:1]}, {seconds:.1f} s: {', '.join(met)}", flush=True)
        self.starts += 1
        with Ranks(self.main, self._argv(), [], self.log) as ranks:
            wait(lambda: not ranks.alive(), 600 + self.steps, "the last start does not end")
        assert set(ranks.codes.values()) == {0}, ranks.codes

    def _argv(self) -> list[str]:
        return ["--ds_config", self.ds, "--config", str(self.recipe)]

    def _forked(self, start: Start) -> list[str]:
        with Ranks(self.main, self._argv(), start.faults(), self.log) as ranks:
            done = self._act(start, ranks)
            wait(lambda: not ranks.alive(), LIMIT, f"{start}: not ended within {LIMIT:.0f} s, see {self.log}")
        met = [name for name in BORNE if name in start.planned and Path(start.planned[name][0]["once"]).exists()]
        codes = ranks.codes[0], ranks.codes[1]
        self.codes[f"{codes}"] += 1
        if start.end == "torn write":
            done = 137 in codes
        elif start.planned.get(start.end):
            done = Path(start.planned[start.end][0]["once"]).exists()
        expected = {
            "kill -9 rank 0": {(-9, 1)}, "kill -9 rank 1": {(1, -9)}, "kill -9 both ranks": {(-9, -9)},
            "torn write": {(1, 137), (137, 1)}, "SIGSTOP": {(1, -9), (-9, 1)}, "nan": {(1, 1)},
        }.get(start.end, {(75, 75)})  # fmt: skip
        if done and not {"ENOSPC", "EIO"} & set(met):  # they may have ended it first, or failed its last save
            assert codes in expected, f"{start}: exit codes {codes}, see {self.log}"
        assert 0 not in codes, f"{start}: exit codes {codes} before the end, see {self.log}"
        return met + [start.end] * done

    def _act(self, start: Start, ranks: Ranks) -> bool:
        """Do what is done from outside; whether it was."""
        wait(lambda: not ranks.alive() or self._reached(start.step), LIMIT, f"{start}: no step")
        if start.end in start.planned and start.end != "torn write":
            return False
        time.sleep(start.delay)
        who = [start.step % 2] if start.end.startswith("SIG") else [0, 1]
        if start.end == "STOP file":
            if ranks.alive():
                (self.run_dir / "STOP").touch()
            return bool(ranks.alive())
        if start.end == "torn write":  # it may take until a save, and some more
            wait(lambda: not ranks.alive() or self._reached(start.step + 5), LIMIT, f"{start}: no step")
        if start.end.startswith("SIG"):
            return ranks.send(getattr(signal, start.end), who)
        return ranks.send(signal.SIGKILL, [int(w) for w in start.end.split() if w in "01"] or [0, 1])

    def _reached(self, step: int) -> bool:
        """Whether this start has done `step`: the file may still have more of an earlier one."""
        path = self.run_dir / "metrics.jsonl"
        return path.is_file() and path.stat().st_mtime > self.begun and steps_done(self.run_dir) > step

    def _torchrun(self, start: Start) -> list[str]:
        with Launch(self.recipe, ds=self.ds, launcher="torchrun", faults=start.faults()) as run:
            wait(lambda: not run.alive() or self._reached(start.step), LIMIT, f"{start}: no step")
            done = bool(run.alive())
            os.kill(run.launcher("torchrun"), signal.SIGKILL)
            run.ends(LIMIT)
        with self.log.open("a") as log:
            log.write(run.output)
        met = [name for name in BORNE if name in start.planned and Path(start.planned[name][0]["once"]).exists()]
        return met + [start.end] * done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=200)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--folder", type=Path, help="keep all that the runs write here")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="soak-"))
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    chain = Chain(folder, args.events, args.steps, args.seed)
    other = chain.undisturbed()
    undisturbed_s = time.monotonic() - begun
    chain.run()
    assert_same_run(chain.run_dir, other)
    left = [path.name for path in (chain.run_dir / "checkpoints").glob(".*")]
    assert not left, f"left over: {left}"
    result = {
        "machine": processor(),
        "seed": args.seed,
        "events": chain.happened.total(),
        "by_kind": dict(sorted(chain.happened.items())),
        "starts": chain.starts,
        "exit_codes_of_ranks": dict(chain.codes.most_common()),
        "steps": args.steps,
        "undisturbed_s": round(undisturbed_s),
        "wall_s": round(time.monotonic() - begun),
        "result": "losses of all steps, weights, moments and averages equal, bit by bit",
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()

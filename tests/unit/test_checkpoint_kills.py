"""Killed at every place where a save touches the disk: a fresh process finds the old checkpoint or the new one."""

import shutil
import signal
from pathlib import Path

import pytest
from fault_plan import FaultPlan
from forks import alone, check, forked, names, save, start

from dstrain import faults
from dstrain.engine import checkpoint

BEFORE = {  # steps that are saved, and the one that is saved then
    "first save": ((), 2),
    "with retention": ((2, 4), 6),
    "after a crash": ((2, 4), 6),
    "the same step again": ((2, 4), 4),
    "the only one again": ((2,), 2),
}


def prepare(run: Path, case: str) -> Path:
    for step in BEFORE[case][0]:
        alone(save, run, step)
    if case == "after a crash":
        folder = run / "checkpoints"
        shutil.copytree(folder / checkpoint.name(4), folder / ".step-00000006.partial")
        (folder / ".step-00000006.partial" / checkpoint.MANIFEST).unlink()
        shutil.copytree(folder / checkpoint.name(2), folder / f".trash-{checkpoint.name(1)}")
        (run / ".recipe.json.0123456789abcdef.part").write_bytes(b"half")
    return run


def saved(run: Path, step: int, rank: int, world: int) -> int:
    """Save a step; returns how often this rank's process came to a write."""
    save(run, step, world, rank, background="on" if step % 4 else "off")
    return faults._visits["write"]


def recover(run: Path, rank: int, world: int) -> tuple[int, list[str], int, list[str]]:
    """What a fresh process finds, and what there is after its next save."""
    found = start(run) if world == 1 else 0
    left = names(run)
    assert not list(run.glob(".*.part"))
    save(run, found + 10, world, rank)
    return found, left, start(run), names(run)


def kill_everywhere(tmp: Path, case: str, world: int, torn: bool) -> int:
    """Kill each rank at each of its writes, one at a time; returns how many were."""
    steps, step = BEFORE[case]
    base = prepare(tmp / "base", case)
    nothing = FaultPlan().environment()
    shutil.copytree(base, tmp / "undisturbed") if steps else None
    counts = forked(saved, tmp / "undisturbed", step, world=world, environment=nothing)
    old, new = max(steps, default=0), step
    seen = set()
    killed = 0
    for rank, count in enumerate(counts):
        for nth in range(1, count + 1):
            run = tmp / f"{rank}-{nth}"
            shutil.copytree(base, run) if steps else None
            plan = FaultPlan().kill_at_write(rank, nth, torn)
            ends = forked(saved, run, step, world=world, environment=plan.environment())
            if torn and ends[rank] == count:
                continue  # no bytes were written at that place, so none were half written
            assert ends[rank] == (-137 if torn else signal.SIGKILL), (ends, nth)
            [result] = forked(recover, run)
            assert isinstance(result, tuple), (rank, nth, result)
            found, left, then, at_last = result
            assert found in (old, new), (rank, nth)
            assert then == found + 10
            if found:
                assert checkpoint.name(found) in left
            assert all(name.startswith("step-") for name in left), (rank, nth, left)
            assert len(at_last) == (2 if found else 1)
            assert all(name.startswith("step-") for name in at_last)
            seen.add(found)
            killed += 1
            shutil.rmtree(run)
    assert seen == ({old} if torn else {old, new})  # bytes are written before the commit
    return killed


@pytest.mark.parametrize("torn", [False, True], ids=["clean", "torn"])
@pytest.mark.parametrize("case", BEFORE)
def test_one_rank(tmp_path, case, torn):
    assert kill_everywhere(tmp_path, case, 1, torn) >= (8 if torn else 16)


def test_two_ranks(tmp_path):
    assert kill_everywhere(tmp_path, "with retention", 2, False) >= 26


@pytest.mark.soak
@pytest.mark.parametrize("torn", [False, True], ids=["clean", "torn"])
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", BEFORE)
def test_ranks(tmp_path, case, world, torn):
    assert kill_everywhere(tmp_path, case, world, torn) >= (12 if torn else 25)


@pytest.mark.parametrize("case", BEFORE)
def test_undisturbed_it_is_the_new_one(tmp_path, case):
    run = prepare(tmp_path, case)
    step = BEFORE[case][1]
    alone(save, run, step)
    assert alone(start, run) == step
    check(run / "checkpoints" / checkpoint.name(step), step)
    assert set(names(run)) == {checkpoint.name(s) for s in sorted({*BEFORE[case][0], step})[-2:]}

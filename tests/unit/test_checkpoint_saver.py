"""Saving in the background and what is kept: the same bytes, nothing of what came later, errors on all ranks."""

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from fault_plan import FaultPlan
from forks import Held, alone, check, digests, forked, names, save, start

from dstrain.engine import checkpoint
from dstrain.engine import saver as saver_module
from dstrain.engine.saver import Saver
from dstrain.errors import CheckpointError


def background(run: Path, rank: int, world: int) -> list[str]:
    """Three saves; each tensor changes as soon as it may, while the file is not there yet."""
    held = Held(2, rank, world)
    # nothing but the header has been written by then, thanks to the sleep at that write
    saver = Saver(held, run / "checkpoints", background="on", keep=5)
    seen = []
    for step in (2, 4, 6):
        fresh = Held(step, rank, world)
        held.optimizer_step = step
        for values, new in zip(held.values, fresh.values, strict=True):
            for kind in values:
                values[kind].copy_(new[kind])
        saver.begin(step, {"guards": {"x": 0.5}})
        assert saver.saving and saver.in_background
        assert held.may_change.wait(20)
        for values in held.values:
            for tensor in values.values():
                tensor.fill_(float("nan"))
        seen += [] if saver.written else ["changed while it was written"]
        assert saver.commit() == run / "checkpoints" / checkpoint.name(step)
        assert not saver.saving and saver.written and not saver.in_background
    return seen


@pytest.mark.parametrize("world", [1, 2])
def test_the_background_writes_the_same_bytes_and_nothing_of_later(tmp_path, world):
    slow = FaultPlan().sleep(None, "write", 0.02)
    for seen in forked(background, tmp_path / "a", world=world, environment=slow.environment()):
        assert seen == ["changed while it was written"] * 3
    for step in (2, 4, 6):
        forked(lambda step, rank, world: save(tmp_path / "b", step, world, rank, keep=5), step, world=world)
        a, b = (digests(tmp_path / run / "checkpoints" / checkpoint.name(step)) for run in "ab")
        assert a == b
        assert len(a) == world + 1
        check(tmp_path / "a/checkpoints" / checkpoint.name(step), step)


def test_without_the_background_the_state_may_change_when_begin_returns(tmp_path):
    def work() -> tuple[bool, bool, bool]:
        held = Held(2)
        saver = Saver(held, tmp_path)
        saver.begin(2, {})
        seen = (saver.written, saver.in_background, held.may_change.is_set())
        saver.commit()
        return seen

    assert alone(work) == (True, False, True)


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [(2, 0, (9, 10)), (3, 0, (8, 9, 10)), (2, 4, (4, 8, 9, 10)), (2, 5, (5, 9, 10)), (2, 1, range(1, 11))],
)
def test_what_is_kept(tmp_path, keep, every, left):
    def work() -> None:
        for step in range(1, 11):
            save(tmp_path, step, keep=keep, keep_every=every)
            assert len(names(tmp_path)) >= min(step, 2)

    alone(work)
    assert names(tmp_path) == [checkpoint.name(step) for step in left]


def test_another_number_to_keep_from_now_on(tmp_path):
    def work(keep: int, *steps: int) -> list[str]:
        for step in steps:
            save(tmp_path, step, keep=keep)
        return names(tmp_path)

    assert alone(work, 5, 1, 2, 3, 4, 5, 6) == [checkpoint.name(s) for s in (2, 3, 4, 5, 6)]
    assert alone(work, 2, 7) == [checkpoint.name(s) for s in (6, 7)]
    assert alone(work, 4, 8, 9) == [checkpoint.name(s) for s in (6, 7, 8, 9)]
    assert alone(work, 2, 100_000_000) == [checkpoint.name(9), checkpoint.name(100_000_000)]
    assert alone(start, tmp_path) == 100_000_000, "newest by number, not by letters"


def test_one_that_cannot_be_removed_fails_no_save(tmp_path, caplog):
    def work() -> list[str]:
        for step in (2, 4):
            save(tmp_path, step)
        lines: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("dstrain").addHandler(handler)
        real = checkpoint.discard
        checkpoint.discard = lambda path: (_ for _ in ()).throw(OSError(39, "Directory not empty", str(path)))
        save(tmp_path, 6)
        checkpoint.discard = real
        return lines

    [line] = alone(work)
    assert str(tmp_path / "checkpoints" / checkpoint.name(2)) in line
    assert "Directory not empty" in line
    assert alone(start, tmp_path) == 6


def test_a_second_save_waits_for_the_commit_of_the_first(tmp_path):
    def work() -> None:
        saver = Saver(Held(2), tmp_path, background="on")
        saver.begin(2, {})
        with pytest.raises(AssertionError, match="commit the last one first"):
            saver.begin(3, {})
        saver.commit()

    alone(work)


def spoiled(run: Path, mode: str, where: str, rank: int, world: int) -> tuple[str, bool, list[str]]:
    held = Held(2, rank, world)
    if rank == world - 1:
        if where == "number":
            held.values[0]["weight"][-1] = float("inf")
        else:
            held.tensors = lambda: (_ for _ in ()).throw(KeyError("exp_avg"))  # type: ignore[method-assign]
    saver = Saver(held, run / "checkpoints", background=mode)
    try:
        saver.begin(2, {})
        saver.commit()
    except CheckpointError as e:
        return str(e), held.may_change.is_set(), names(run)
    return "", False, []


@pytest.mark.parametrize("where", ["number", "anything"])
@pytest.mark.parametrize("mode", ["off", "on"])
def test_what_a_thread_meets_reaches_all_ranks(tmp_path, mode, where):
    says = "rank 1: weight of 'w' is not finite" if where == "number" else "rank 1: KeyError('exp_avg')"
    for said, may_change, left in forked(spoiled, tmp_path, mode, where, world=2):
        assert says in said
        assert may_change, "the training would wait for ever"
        assert left == []


def test_the_room_is_looked_for_before_a_byte_is_written(tmp_path):
    def work(rank: int, world: int) -> str:
        saver_module._free = lambda folder: 1 << 20
        try:
            save(tmp_path, 2, world, rank)
        except CheckpointError as e:
            return str(e)
        return ""

    for said in forked(work, world=2):
        assert "No space left: it takes 1." in said and "delete something there" in said
        assert names(tmp_path) == []


@pytest.mark.parametrize("mode", ["auto", "on"])
def test_memory_for_the_copy_is_looked_for_only_by_auto(tmp_path, mode):
    def work() -> tuple[bool, bool]:
        saver_module.available_memory = lambda: 100.0
        saver = Saver(Held(2), tmp_path, background=mode)
        saver.begin(2, {})
        seen = saver.in_background
        saver.commit()
        return seen

    assert alone(work) == (mode == "on")


def test_memory_that_is_not_given_stops_the_save_on_all_ranks(tmp_path):
    def work(rank: int, world: int) -> str:
        def none(pieces: Any) -> None:
            raise RuntimeError("can't allocate memory: you tried to allocate 99 bytes")

        if rank == 1:
            saver_module._Copy = none
        try:
            save(tmp_path, 2, world, rank, background="on")
        except CheckpointError as e:
            return str(e)
        return ""

    for said in forked(work, world=2):
        assert "rank 1: can't allocate memory" in said
        assert names(tmp_path) == []


def test_finish_publishes_nothing(tmp_path):
    def work() -> tuple[int, list[str]]:
        saver = Saver(Held(2), tmp_path / "checkpoints", background="on")
        saver.begin(2, {})
        saver.finish()
        return sum(t.name == "dstrain-save" for t in threading.enumerate()), names(tmp_path)

    assert alone(work) == (0, [".step-00000002.partial"])
    assert alone(start, tmp_path) == 0
    assert names(tmp_path) == []


def test_the_manifest_comes_after_the_last_ranks_file(tmp_path):
    for mode in ("off", "on"):
        run = tmp_path / mode
        slow = FaultPlan().sleep(1, "write", 0.4, nth=2)
        begun = time.time()
        forked(
            lambda run, mode, rank, world: save(run, 2, world, rank, background=mode),
            run, mode, world=3, environment=slow.environment(),
        )  # fmt: skip
        path = run / "checkpoints" / checkpoint.name(2)
        times = {p.name: p.stat().st_mtime for p in path.iterdir()}
        assert times[checkpoint.MANIFEST] == max(times.values()) > begun + 0.4
        files = json.loads((path / checkpoint.MANIFEST).read_text())["files"]
        assert sorted(files) == sorted(times.keys() - {checkpoint.MANIFEST})


def test_a_set_of_no_parameters_is_saved_too(tmp_path):
    def work() -> int:
        saver = Saver(Held(2, shapes={"none": torch.Size([0])}), tmp_path, background="on")
        saver.begin(2, {})
        return len(list(saver.commit().iterdir()))

    assert alone(work) == 2

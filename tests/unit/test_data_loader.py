"""The loader: the same samples whatever the workers and ranks, and bad ones replaced by rule."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import SIZES, damage_row, mixed_dataset, picture, sample_members, write_tar

from dstrain.data import Dataset, Loader, Plan, Sample, open_dataset
from dstrain.data.media.decode import decode
from dstrain.data.media.operators import Operators
from dstrain.data.media.resolution import Resolution
from dstrain.data.policy import Bad, BadSamples, read_quarantine
from dstrain.data.reasons import Reason
from dstrain.data.selection import Wanted
from dstrain.errors import DataError

BATCH = 12


def make_plan(dataset: Dataset, world_size: int = 1, batch: int = BATCH) -> Plan:
    return Plan(
        dataset,
        seed=3,
        global_batch_size=batch,
        tokens_per_pack=80,
        world_size=world_size,
        window=8,
        attention_length=90,
    )


def batches(
    dataset: Dataset, steps: range, world_size: int = 1, **options: Any
) -> tuple[list[list[Sample]], list[list[Bad]]]:
    """The global batch of each step, over all ranks, in the global order, and what was bad in each."""
    plan = make_plan(dataset, world_size)
    samples: dict[int, list[Sample]] = {step: [] for step in steps}
    bad: dict[int, list[Bad]] = {step: [] for step in steps}
    for rank in range(world_size):
        loader = Loader(dataset, plan, rank, seed=3, **options)
        for step in steps:
            packs = list(loader.step(step))
            assert [[s.draw for s in pack.samples] for pack in packs] == [
                [d for d, _ in m[rank]] for m in plan.step(step)
            ]
            assert not any(pack.error for pack in packs)
            samples[step] += [sample for pack in packs for sample in pack.samples]
            bad[step] += [item for pack in packs for item in pack.bad]
        loader.close()
    return (
        [sorted(found, key=lambda sample: sample.draw) for found in samples.values()],
        [sorted(found, key=lambda item: item.draw) for found in bad.values()],
    )


def facts(samples: list[list[Sample]]) -> list[tuple[Any, ...]]:
    return [(s.key, s.row, s.draw, s.caption, s.image.numpy().tobytes(), s.image.shape) for b in samples for s in b]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return mixed_dataset(tmp_path / "shards", shards=4, samples=7)


def test_samples_are_those_of_the_plan(dataset: Dataset) -> None:
    plan = make_plan(dataset)
    for step, batch in enumerate(batches(dataset, range(4), workers=2)[0]):
        assert [(sample.draw, sample.row) for sample in batch] == plan.batch(step)
        for sample in batch:
            raw = dataset.read(sample.row)
            number = int(raw.key)
            assert sample.caption == f"caption {number} {'word ' * (number % 7)}".strip() and sample.key == raw.key
            assert sample.shard == dataset.shard(sample.row)
            assert raw.files["image"].data == picture(*SIZES[number % len(SIZES)], seed=number)
            size = raw.files["image"].width, raw.files["image"].height
            assert sample.image.shape == (3, size[1], size[0])
            assert torch.equal(sample.image, decode(raw.files["image"].data, size))


RANDOM = Operators(crop="random", flip=0.5, caption="random", shuffle_tags=True)


@pytest.mark.parametrize("operators", [Operators(), RANDOM], ids=["plain", "random"])
@pytest.mark.parametrize("damaged", [[], [2, 3, 11, 20]], ids=["whole", "damaged"])
def test_neither_workers_nor_world_size_change_anything(
    dataset: Dataset, damaged: list[int], operators: Operators
) -> None:
    for row in damaged:
        damage_row(dataset, row)
    samples, bad = batches(dataset, range(5), workers=0, operators=operators)
    assert any(bad) == bool(damaged)
    for world_size, workers in [(1, 1), (1, 3), (2, 0), (2, 3), (3, 1), (4, 0), (8, 1)]:
        other = batches(dataset, range(5), world_size, workers=workers, operators=operators)
        assert facts(other[0]) == facts(samples), (world_size, workers)
        assert other[1] == bad


def test_random_operators_do_something(dataset: Dataset) -> None:
    assert facts(batches(dataset, range(3), workers=0, operators=RANDOM)[0]) != facts(
        batches(dataset, range(3), workers=0)[0]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_any_step_at_any_time(dataset: Dataset, workers: int) -> None:
    loader = Loader(dataset, make_plan(dataset), 0, workers=workers, seed=3)
    for step in (4, 5, 2, 2, 1000, 0):
        samples = sorted((s for pack in loader.step(step) for s in pack.samples), key=lambda sample: sample.draw)
        assert facts([samples]) == facts(batches(dataset, range(step, step + 1), workers=0)[0])
    next(loader.step(7))  # given up after the first pack
    packs = list(loader.step(8))
    assert [[s.draw for s in pack.samples] for pack in packs] == [
        [d.draw for d in m[0]] for m in make_plan(dataset).step(8)
    ]
    loader.close()


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_reading_ahead_goes_on_while_the_caller_works(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    reads = []

    def counted(self: Dataset, row: int, read: Any = Dataset.read) -> Any:
        reads.append(row)
        return read(self, row)

    monkeypatch.setattr(Dataset, "read", counted)
    plan = make_plan(dataset, batch=4)
    loader = Loader(dataset, plan, 0, workers=workers)
    list(loader.step(0))
    ahead = 8 * workers
    wanted = {row for step in range(1 + ahead // 4) for _, row in plan.batch(step)}
    end = time.monotonic() + 20
    while not wanted <= set(reads) and time.monotonic() < end:
        time.sleep(0.01)
    assert wanted <= set(reads)
    assert len(reads) <= 4 + ahead + 4  # bounded: not the whole dataset
    loader.close()


def test_waiting_is_measured(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(self: Dataset, row: int, read: Any = Dataset.read) -> Any:
        time.sleep(0.01)
        return read(self, row)

    monkeypatch.setattr(Dataset, "read", slow)
    loader = Loader(dataset, make_plan(dataset), 0, workers=0)
    list(loader.step(0))
    assert 0.12 <= loader.wait_s < 1


def test_bad_samples_are_replaced_by_rule(dataset: Dataset) -> None:
    """By the next of the shard that cost no more; the first seven rows are the first shard."""
    bad = {0, 1, 5, 19}
    for row in bad:
        damage_row(dataset, row)
    tokens = dataset.tokens(np.arange(len(dataset)))
    for step, batch in enumerate(batches(dataset, range(10), workers=3)[0]):
        for draw, sample in zip(make_plan(dataset).batch(step), batch, strict=True):
            first = draw.row // 7 * 7
            circle = [first + (draw.row - first + i) % 7 for i in range(7)]
            others = [draw.row, *(row for row in circle[1:] if tokens[row] <= tokens[draw.row])]
            good = [row for row in others if row not in bad]
            if good:
                assert sample.row == good[0]
            assert tokens[sample.row] <= tokens[draw.row]
            assert sample.row not in bad


def test_a_shard_that_is_bad_as_a_whole_is_left_behind(dataset: Dataset) -> None:
    for row in range(7):
        damage_row(dataset, row)
    for batch in batches(dataset, range(5), workers=0)[0]:
        assert all(sample.row >= 7 for sample in batch)


def test_all_bad_is_an_error_that_is_handed_over(dataset: Dataset) -> None:
    for row in range(28):
        damage_row(dataset, row)
    loader = Loader(dataset, make_plan(dataset), 0, workers=2)
    packs = list(loader.step(0))
    assert all("samples one after another are bad (changed" in str(pack.error) for pack in packs)
    assert all(not pack.samples for pack in packs)
    loader.close()


def test_error_policy_names_the_sample(dataset: Dataset) -> None:
    damage_row(dataset, 4)
    loader = Loader(dataset, make_plan(dataset), 0, workers=2, replace=False)
    errors = [pack.error for step in range(4) for pack in loader.step(step) if pack.error]
    assert errors and all(
        "sample '0004' of shard" in str(e) and "set data.bad_samples to 'skip'" in str(e) for e in errors
    )
    loader.close()


def test_a_shard_that_goes_away_is_no_bad_sample(dataset: Dataset) -> None:
    for path in {dataset.shard(row) for row in range(28)}:
        Path(path).unlink()
    loader = Loader(dataset, make_plan(dataset), 0, workers=2)
    assert all("cannot be read any more" in str(pack.error) for pack in loader.step(0))
    loader.close()


def test_a_damaged_index_is_an_error_that_is_handed_over(tmp_path: Path) -> None:
    """Of a shard whose totals were enough when it was opened: its rows are looked at when they are wanted."""
    write_tar(tmp_path / "a.tar", sample_members(12, (64, 64)))
    open_dataset([str(tmp_path / "a.tar")])
    sidecar = tmp_path / "a.tar.index"
    data = bytearray(sidecar.read_bytes())
    data[-70] ^= 0x55
    sidecar.write_bytes(bytes(data))
    dataset = open_dataset([str(tmp_path / "a.tar")])
    loader = Loader(dataset, make_plan(dataset), 0, workers=1)
    (pack,) = loader.step(0)
    assert "is damaged" in str(pack.error) and "delete it" in str(pack.error)
    loader.close()


@pytest.mark.gpu
def test_pinned_pictures_are_copied_without_waiting(dataset: Dataset) -> None:
    loader = Loader(dataset, make_plan(dataset), 0, workers=2, pin=True)
    for pack in loader.step(0):
        for sample in pack.samples:
            assert sample.image.is_pinned()
            assert torch.equal(sample.image.to("cuda", non_blocking=True).cpu(), sample.image)
    loader.close()


def test_several_pictures_a_sample(tmp_path: Path) -> None:
    members = []
    for number in range(6):
        members.append((f"{number}.jpg", picture(48, 32, seed=number, kind="JPEG")))
        if number != 3:
            members.append((f"{number}.edit_image.png", picture(48, 32, seed=100 + number)))
        members.append((f"{number}.json", json.dumps({"caption": ["one", "two"], "url": "http://x/y"}).encode()))
    write_tar(tmp_path / "a.tar", members)
    dataset = open_dataset([str(tmp_path / "a.tar")], Wanted(Resolution(), ("image", "edit_image")))
    assert len(dataset) == 5 and dataset.left_out.counts == {Reason.NO_IMAGE: 1}
    assert dataset.tokens(np.arange(5)).tolist() == [2 * 6 + 8 + 1] * 5
    plan = make_plan(dataset, batch=5)
    flip = Operators(flip=0.5, caption="random")
    loader = Loader(dataset, plan, 0, workers=0, operators=flip)
    plain = Loader(dataset, plan, 0, workers=0)
    captions, turned = set(), set()
    for step in range(8):
        pairs = zip(
            (s for pack in loader.step(step) for s in pack.samples), (s for p in plain.step(step) for s in p.samples)
        )
        for sample, other in pairs:
            flips = [bool((sample.columns[c] == other.columns[c].flip(-1)).all()) for c in ("image", "edit_image")]
            assert flips[0] == flips[1]  # both or neither
            turned.add(flips[0])
            captions.add(sample.caption)
            assert other.caption == "one"
    assert captions == {"one", "two"} and turned == {True, False}


def bad(draw: int, key: str = "", reason: Reason = Reason.CHANGED) -> Bad:
    return Bad(draw, "shard.tar", key or str(draw), reason, "why")


def test_bad_samples_are_written_down_once(tmp_path: Path) -> None:
    quarantine = tmp_path / "run" / "bad_samples.jsonl"
    for _ in range(2):  # a second run, as after a restart, adds nothing
        policy = BadSamples(10, 10, quarantine, read_quarantine(quarantine))
        policy.record([bad(9), bad(2), bad(4, "2")], write=True)
        assert len(policy) == 2
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert lines == [
        {"draw": draw, "shard": "shard.tar", "key": str(draw), "reason": "changed", "detail": "why"} for draw in (2, 9)
    ]
    BadSamples(10, 10, tmp_path / "other.jsonl").record([bad(1)], write=False)
    assert not (tmp_path / "other.jsonl").exists()


def test_too_many_bad_samples(tmp_path: Path) -> None:
    quarantine = tmp_path / "q.jsonl"
    policy = BadSamples(2, 10, quarantine)
    policy.record([bad(1), bad(5)], write=True)
    policy.record([bad(7, "5")], write=True)
    with pytest.raises(
        DataError,
        match=r"3 bad samples are more than data.max_bad_samples = 2 \(changed 2, empty_caption 1\); they are listed",
    ):
        policy.record([bad(12, "c"), bad(9, "b", Reason.EMPTY_CAPTION)], write=True)
    assert [json.loads(line)["key"] for line in quarantine.read_text().splitlines()] == ["1", "5", "b"]
    with pytest.raises(DataError, match="3 bad samples are more"):  # what was met before a restart still counts
        BadSamples(2, 10, quarantine, read_quarantine(quarantine)).record([bad(20, "1")], write=True)


def test_bad_samples_in_a_row_may_span_steps() -> None:
    policy = BadSamples(1000, 3)
    policy.record([bad(1), bad(2), bad(3)], write=False)
    policy.record([bad(5), bad(5, "again"), bad(6)], write=False)  # draw 4 was good; two tries are one draw
    policy.record([bad(7)], write=False)
    with pytest.raises(DataError, match=r"4 draws in a row met bad samples, more than data.max_consecutive_bad = 3"):
        policy.record([bad(9), bad(8)], write=False)


def test_quarantine_with_a_torn_line(tmp_path: Path) -> None:
    (tmp_path / "q.jsonl").write_text('{"shard": "x", "ke\n')
    assert read_quarantine(tmp_path / "q.jsonl") == {}
    policy = BadSamples(10, 10, tmp_path / "q.jsonl")
    policy.record([bad(4)], write=True)
    assert json.loads((tmp_path / "q.jsonl").read_text().splitlines()[1])["draw"] == 4


def test_a_list_that_cannot_be_written_does_not_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    policy = BadSamples(10, 10, tmp_path / "file" / "q.jsonl")
    policy.record([bad(4)], write=True)
    assert len(policy) == 1


def test_what_nobody_expected_is_handed_over_too(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Dataset, row: int) -> Any:
        raise MemoryError("no room")

    monkeypatch.setattr(Dataset, "read", fail)
    for workers in (0, 2):
        loader = Loader(dataset, make_plan(dataset), 0, workers=workers)
        assert all("cannot be read: MemoryError: no room" in str(pack.error) for pack in loader.step(0))
        loader.close()

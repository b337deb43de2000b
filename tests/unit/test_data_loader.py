"""The loader: the same samples whatever the workers and ranks, and bad ones replaced by rule."""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from data_samples import damage_row, mixed_dataset

from dstrain.data import Dataset, Loader, Plan, Sample
from dstrain.data.decode import decode
from dstrain.errors import ConfigError, DataError


def make_plan(dataset: Dataset, world_size: int = 1, batch: int = 6) -> Plan:
    return Plan(dataset.tokens, seed=3, global_batch_size=batch, tokens_per_pack=64, world_size=world_size)


def batches(dataset: Dataset, steps: range, world_size: int = 1, **options: Any) -> list[list[Sample]]:
    """The global batch of each step, over all ranks, in the global order."""
    plan = make_plan(dataset, world_size)
    gathered: dict[int, list[Sample]] = {step: [] for step in steps}
    for rank in range(world_size):
        loader = Loader(dataset, plan, rank, **options)
        for step in steps:
            packs = list(loader.step(step))
            assert [[s.draw for s in pack] for pack in packs] == [[d for d, _ in m[rank]] for m in plan.step(step)]
            gathered[step] += [sample for pack in packs for sample in pack]
        loader.close()
    return [sorted(samples, key=lambda sample: sample.draw) for samples in gathered.values()]


def facts(samples: list[list[Sample]]) -> list[tuple[Any, ...]]:
    return [(s.key, s.row, s.draw, s.caption, s.image.sum().item(), s.image.shape) for batch in samples for s in batch]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return mixed_dataset(tmp_path / "shards")


def test_samples_are_those_of_the_plan(dataset: Dataset) -> None:
    plan = make_plan(dataset)
    for step, batch in enumerate(batches(dataset, range(4), workers=2)):
        assert [(sample.draw, sample.row) for sample in batch] == plan.batch(step)
        for sample in batch:
            data, caption = dataset.read(sample.row)
            assert sample.caption == caption and sample.key == dataset.keys[sample.row]
            assert sample.shard == str(dataset.shard(sample.row))
            assert torch.equal(sample.image, decode(data, dataset.max_pixels))


@pytest.mark.parametrize("damaged", [[], [2, 3, 11]])
def test_neither_workers_nor_world_size_change_anything(dataset: Dataset, damaged: list[int]) -> None:
    for row in damaged:
        damage_row(dataset, row)
    expected = facts(batches(dataset, range(5), workers=0))
    for world_size, workers in [(1, 1), (1, 3), (2, 0), (2, 3), (3, 1), (4, 0)]:
        assert facts(batches(dataset, range(5), world_size, workers=workers)) == expected, (world_size, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_step_at_any_time(dataset: Dataset, workers: int) -> None:
    loader = Loader(dataset, make_plan(dataset), 0, workers=workers)
    for step in (4, 5, 2, 2, 1000, 0):
        samples = sorted((s for pack in loader.step(step) for s in pack), key=lambda sample: sample.draw)
        assert facts([samples]) == facts(batches(dataset, range(step, step + 1), workers=0))
    next(loader.step(7))  # given up after the first pack
    packs = list(loader.step(8))
    assert [[s.draw for s in pack] for pack in packs] == [[d.draw for d in m[0]] for m in make_plan(dataset).step(8)]
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
    plan = make_plan(dataset)
    loader = Loader(dataset, plan, 0, workers=workers)
    list(loader.step(0))
    wanted = sorted(row for step in range(2 if workers else 1) for _, row in plan.batch(step))
    end = time.monotonic() + 20
    while len(reads) < len(wanted) and time.monotonic() < end:
        time.sleep(0.01)
    assert sorted(reads[: len(wanted)]) == wanted or workers > 1  # with more threads reads overtake each other
    assert len(reads) >= len(wanted)
    assert len(reads) <= len(wanted) + 8 * workers + 6  # bounded: not the whole dataset
    loader.close()


def test_waiting_is_measured(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(self: Dataset, row: int, read: Any = Dataset.read) -> Any:
        time.sleep(0.02)
        return read(self, row)

    monkeypatch.setattr(Dataset, "read", slow)
    loader = Loader(dataset, make_plan(dataset), 0, workers=0)
    list(loader.step(0))
    assert 0.12 <= loader.wait_s < 1


def replacement(dataset: Dataset, row: int, bad: set[int]) -> int:
    """The rule, said another way: next of the rows that cost no more, in a circle; then next of the others."""
    others = [(row + i) % len(dataset) for i in range(1, len(dataset))]
    cheap = [other for other in others if dataset.tokens[other] <= dataset.tokens[row]]
    return next(other for other in cheap + [o for o in others if o not in cheap] if other not in bad)


def test_bad_samples_are_replaced_by_rule_and_written_down_once(dataset: Dataset, tmp_path: Path) -> None:
    bad = {0, 1, 5, 19}
    for row in bad:
        damage_row(dataset, row)
    quarantine = tmp_path / "run" / "quarantine.jsonl"
    plan = make_plan(dataset)
    for _ in range(2):  # a second run, as after a restart, adds nothing
        for step, batch in enumerate(batches(dataset, range(10), workers=3, quarantine=quarantine)):
            for draw, sample in zip(plan.batch(step), batch, strict=True):
                row = draw.row if draw.row not in bad else replacement(dataset, draw.row, bad)
                assert (sample.draw, sample.row, sample.key) == (draw.draw, row, dataset.keys[row])
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == sorted(bad)
    for line in lines:
        assert line["reason"] == "changed" and line["key"] == f"{line['row']:04d}" and line["detail"]
        assert line["shard"] == str(dataset.shard(line["row"]))
        step = line["draw"] // plan.global_batch_size
        assert Path(line["shard"]).exists() and line["draw"] in [d.draw for d in plan.batch(step)]


def test_a_replacement_costs_no_more_than_the_sample_it_stands_for(dataset: Dataset) -> None:
    row = int(np.argsort(dataset.tokens, kind="stable")[len(dataset) // 2])
    damage_row(dataset, row)
    for batch in batches(dataset, range(7), workers=0):
        planned = {d.draw: d.row for d in make_plan(dataset).batch(batch[0].draw // 6)}
        for sample in batch:
            assert dataset.tokens[sample.row] <= dataset.tokens[planned[sample.draw]]


@pytest.mark.parametrize("workers", [0, 3])
def test_too_many_bad_samples_stop_the_run_at_the_same_place(dataset: Dataset, tmp_path: Path, workers: int) -> None:
    bad = {1, 4, 9, 12, 17}
    for row in bad:
        damage_row(dataset, row)
    plan = make_plan(dataset)
    loader = Loader(dataset, plan, 0, workers=workers, max_bad_samples=2, quarantine=tmp_path / "q.jsonl")
    with pytest.raises(
        DataError, match=r"3 bad samples are more than max_bad_samples = 2 \(changed 3\); they are listed"
    ):
        for step in range(10):
            list(loader.step(step))
    loader.close()
    met = [d.row for s in range(10) for micro in plan.step(s) for d in micro[0] if d.row in bad]
    assert [json.loads(line)["row"] for line in (tmp_path / "q.jsonl").read_text().splitlines()] == list(
        dict.fromkeys(with_replacements(dataset, met, bad))
    )[:3]


def with_replacements(dataset: Dataset, met: list[int], bad: set[int]) -> list[int]:
    """The bad rows in the order that they are tried: one that replaces a bad row may be bad itself."""
    tried = []
    for row in met:
        seen: set[int] = set()
        candidate = row
        while candidate in bad:
            tried.append(candidate)
            seen.add(candidate)
            candidate = replacement(dataset, row, seen)
    return tried


def test_sixteen_bad_in_a_row_stop_the_run(dataset: Dataset) -> None:
    for row in range(20):
        damage_row(dataset, row)
    loader = Loader(dataset, make_plan(dataset), 0, workers=2, max_bad_samples=1000)
    with pytest.raises(
        DataError, match=r"16 samples one after another are bad \(changed 16\), the last being '\d{4}' of"
    ):
        list(loader.step(0))
    assert len(loader.bad.rows) == 16
    loader.close()


def test_error_policy_names_the_sample(dataset: Dataset, tmp_path: Path) -> None:
    damage_row(dataset, 4)
    loader = Loader(dataset, make_plan(dataset), 0, workers=2, bad_sample="error", quarantine=tmp_path / "q.jsonl")
    with pytest.raises(DataError, match=r"sample '0004' of shard .*shard-000000.tar is bad \(changed: .*'skip'"):
        for step in range(4):
            list(loader.step(step))
    loader.close()


def test_a_shard_that_goes_away_is_no_bad_sample(dataset: Dataset) -> None:
    dataset.shard(0).unlink()
    loader = Loader(dataset, make_plan(dataset), 0, workers=2)
    with pytest.raises(DataError, match="cannot be read any more"):
        list(loader.step(0))
    loader.close()


def test_a_picture_of_another_size_than_indexed_is_bad(dataset: Dataset) -> None:
    """An index that lies about sizes would break the budget of the packs."""
    dataset._widths[:] = 16
    loader = Loader(dataset, make_plan(dataset), 0, workers=0, bad_sample="error")
    with pytest.raises(DataError, match="another size than the index says"):
        list(loader.step(0))


def test_unknown_policy(dataset: Dataset) -> None:
    with pytest.raises(ConfigError, match="bad_sample = 'ignore' is not known; give 'skip' or 'error'"):
        Loader(dataset, make_plan(dataset), 0, bad_sample="ignore")  # type: ignore[arg-type]


def test_quarantine_with_a_torn_line(dataset: Dataset, tmp_path: Path) -> None:
    damage_row(dataset, 4)
    (tmp_path / "q.jsonl").write_text('{"shard": "x", "ke\n')
    batches(dataset, range(4), workers=0, quarantine=tmp_path / "q.jsonl")
    assert json.loads((tmp_path / "q.jsonl").read_text().splitlines()[1])["row"] == 4

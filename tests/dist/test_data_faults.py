"""Bad samples under real ranks: replaced alike at any number of ranks, and when it is too much all stop together."""

import json
import os
from pathlib import Path

import pytest
import yaml
from launches import launch, losses
from small_runs import prepare_run

from dstrain.data.shards.index import load

pytestmark = pytest.mark.dist


def damage(shards: Path, rows: set[int]) -> None:
    """Flip a byte in the pictures of so many samples, as bit rot does: sizes and times stay."""
    first = 0
    for tar in sorted(shards.glob("*.tar")):
        index = load(tar.with_name(tar.name + ".index"), tar)
        assert index is not None
        data, stat = bytearray(tar.read_bytes()), tar.stat()
        for place in (row - first for row in rows if first <= row < first + index.samples):
            part = index.parts[index.part_of("image")[place]]
            data[int(part["offset"]) + int(part["size"]) // 2] ^= 0x55
        tar.write_bytes(bytes(data))
        os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        first += index.samples


def quarantine(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]


def test_bad_samples_are_the_same_at_one_and_two_ranks(tmp_path: Path) -> None:
    recipe = prepare_run(tmp_path)
    rows = {1, 4, 11, 12, 23}
    damage(tmp_path / "shards", rows)
    runs = {ranks: tmp_path / f"run{ranks}" for ranks in (1, 2)}
    for ranks, run in runs.items():
        launch(recipe, f"run_dir={run}", ranks=ranks)
    assert quarantine(runs[1]) == quarantine(runs[2])
    assert {entry["reason"] for entry in quarantine(runs[1])} == {"changed"}
    assert {int(entry["key"].split("-")[0]) for entry in quarantine(runs[1])} == rows
    one, two = ([float.fromhex(loss) for loss in losses(run).values()] for run in runs.values())
    assert one == pytest.approx(two, rel=1e-5)


def test_too_many_bad_samples_stop_all_ranks_with_a_checkpoint(tmp_path: Path) -> None:
    recipe = prepare_run(tmp_path, train={"steps": 4, "save_every": 100})
    damage(tmp_path / "shards", {4, 11, 23})
    run = tmp_path / "run"
    launch(recipe, f"run_dir={tmp_path / 'whole'}")
    met = [entry["draw"] for entry in quarantine(tmp_path / "whole")]
    step = met[-1] // 8
    assert step > 0, "the damage must not all be met in the first step, or there is nothing to save"
    output = launch(recipe, "data.max_bad_samples=2", code=2)
    assert "3 bad samples are more than data.max_bad_samples = 2 (changed 3); they are listed in" in output
    assert "Traceback" not in output
    assert [path.name for path in (run / "checkpoints").iterdir() if not path.name.startswith(".")] == [
        f"step-{step:08d}"
    ]
    launch(recipe, "data.max_bad_samples=3")  # the way out that the message names
    assert losses(run) == losses(tmp_path / "whole")
    assert quarantine(run) == quarantine(tmp_path / "whole")


def test_bad_samples_may_be_an_error(tmp_path: Path) -> None:
    recipe = prepare_run(tmp_path)
    tree = yaml.safe_load(recipe.read_text())
    tree["data"]["bad_samples"] = "error"
    recipe.write_text(yaml.safe_dump(tree))
    damage(tmp_path / "shards", {0, 5, 9, 14, 20})
    output = launch(recipe, code=2)
    assert "is bad (changed: the bytes in the shard are not those that were indexed)" in output
    assert "set data.bad_samples to 'skip'" in output and "Traceback" not in output

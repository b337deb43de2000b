"""Numbers that are not finite, and spikes, on real ranks: no weight is changed by them, and who did it is named."""

import itertools
import json

import pytest
from launches import Launch, assert_same_run, launch, losses, rows, saved
from small_runs import prepare_run

from dstrain.engine.state import State

pytestmark = pytest.mark.dist

TRAIN = {"steps": 4, "save_every": 1, "keep_every": 1, "async_save": "off", "export": False}
ZERO2, ZERO3 = {"stage": 2}, {"stage": 3, "stage3_param_persistence_threshold": 0}  # so that each weight is gathered
DS = {
    "zero2 fp32": {"zero_optimization": ZERO2},
    "zero3 fp32": {"zero_optimization": ZERO3},
    "zero2 bf16": {"bf16": {"enabled": True}, "zero_optimization": ZERO2},
    "zero3 bf16": {"bf16": {"enabled": True}, "zero_optimization": ZERO3},
}
CASES = list(itertools.product(DS, (0, 1), ("input", "loss", "grad", "weight")))
IN_CI = {("zero3 bf16", 1, "input"), ("zero2 fp32", 0, "loss"), ("zero3 fp32", 1, "grad"), ("zero2 bf16", 0, "weight")}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return prepare_run(tmp_path_factory.mktemp("nan"), train=TRAIN)


def events(run_dir):
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


def assert_same_state(one, other):
    a, b = State(one), State(other)
    for kind, name in itertools.product(sorted(a.kinds), a.shapes):
        assert (a.read(kind, name) == b.read(kind, name)).all(), f"{kind} of {name}"


@pytest.mark.parametrize(
    ("ds", "rank", "place"), [case if case in IN_CI else pytest.param(*case, marks=pytest.mark.soak) for case in CASES]
)
def test_an_update_is_left_out_on_all_ranks(recipe, tmp_path, ds, rank, place):
    run_dir, path = tmp_path / "run", tmp_path / "ds.json"
    path.write_text(json.dumps(DS[ds]))
    fault = {"at": place, "do": "nan", "rank": rank, "step": 2}
    lasts = place == "weight" and ds == "zero2 fp32"  # there the model computes with the master weights themselves
    output = launch(recipe, f"run_dir={run_dir}", ds=str(path), faults=[fault], code=None)
    left_out = [row["updates_left_out"] for row in rows(run_dir)]
    assert left_out[:3] == [0, 0, 1], output[-4000:]
    first = events(run_dir)[0]
    assert first["step"] == 2
    suspects = first["suspects"]
    if place == "input":
        assert {s["rank"] for s in suspects} == {rank}
        assert all(s["what"] == "loss" and s["key"] for s in suspects)
        assert suspects[0]["key"] in output
    elif place == "weight":
        (weight,) = [s for s in suspects if s["what"] == "weight"]  # under ZeRO-3 all ranks' losses show it
        assert weight["rank"] == rank and weight["key"] in output
    assert "step 2: " in output and "No weight was changed by it" in output
    if not lasts:
        folder = run_dir / "checkpoints"
        assert_same_state(folder / "step-00000003", folder / "step-00000002")


def test_more_in_a_row_than_are_borne_end_the_run_and_it_can_be_continued(recipe, tmp_path):
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    launch(recipe, f"run_dir={whole}", "ema.decay=0.9")
    fault = {"at": "loss", "do": "nan", "rank": 1, "step": 2}
    argv = [f"run_dir={run_dir}", "ema.decay=0.9", "guard.nonfinite_steps=0"]
    output = launch(recipe, *argv, faults=[fault], code=1)
    assert output.count("dstrain: error: ") == 1 and "Traceback" not in output
    assert saved(run_dir) == [2, 1]
    launch(recipe, *argv)
    assert_same_run(run_dir, whole)


def test_a_spike_is_undone_its_data_left_out_and_a_kill_amid_it_changes_nothing(tmp_path):
    recipe = prepare_run(
        tmp_path,
        batch={"global_batch_size": 16, "tokens_per_pack": 512},
        optimizer={"lr": 1e-5, "warmup_steps": 0, "schedule": "constant"},
        train={"steps": 70, "save_every": 5, "async_save": "on", "export": False},
        guard={"spikes": "skip", "skip_steps": 2},
        ema={"decay": 0.9},
    )
    straight, killed = tmp_path / "run", tmp_path / "killed"

    def spike(first_step: int) -> list[dict]:
        """The batch of step 62 is the culprit, wherever the process began, and not the one that takes its place."""
        return [{"at": "loss", "do": "spike", "step": 62, "nth": 63 - first_step}]

    output = launch(recipe, faults=spike(0))
    assert f"back to {straight / 'checkpoints'}/step-00000060" in output, output[-4000:]
    assert [event["step"] for event in events(straight)] == [62]
    assert {row["micro_steps"] for row in rows(straight)} == {1}, "so the n-th loss is that of the n-th step"
    assert list(losses(straight)) == list(range(70))
    kill = {"at": "step", "do": "kill", "rank": 1, "nth": 63 + 4}  # after it has gone back to 60, in step 63
    with Launch(recipe, f"run_dir={killed}", faults=[*spike(0), kill]) as run:
        assert 0 not in run.ends(), run.output[-4000:]
        assert "back to " in run.output
    assert saved(killed)[0] == 60
    output = launch(recipe, f"run_dir={killed}", faults=spike(60))
    assert "back to " in output
    assert_same_run(killed, straight)

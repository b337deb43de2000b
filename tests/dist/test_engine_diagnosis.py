"""The second look at a step that was not finite names who did it, and leaves no trace in the run."""

import math

import pytest
from ranks import run_ranks

from dstrain.diagnosis import report

CPU = {"device": "cpu"}
CASES = {
    "zero0": ({"zero_optimization": {"stage": 0}}, False, "full"),
    "zero1 bf16": ({"zero_optimization": {"stage": 1}}, True, "full"),
    "zero2": ({"zero_optimization": {"stage": 2}}, False, "full"),
    "zero2 bf16 lora": ({"zero_optimization": {"stage": 2}}, True, "lora"),
    "zero3": ({"zero_optimization": {"stage": 3}}, False, "full"),
    "zero3 lora": ({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}, False, "lora"),
    "zero3 offload bf16": (
        {"zero_optimization": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU, "overlap_comm": True}},
        True,
        "full",
    ),
}


@pytest.mark.dist
def test_a_second_look_changes_no_bit(tmp_path):
    results = run_ranks(2, "engine_diagnosis:undisturbed", tmp_path, CASES)
    for rank in results:
        for name, (rows, others, same_weights) in rank.items():
            finite = [math.isfinite(float.fromhex(x)) for x in rows]
            assert finite == [True, True, False, False, True, True, True, True], name
            assert rows == others, name
            assert same_weights, name


@pytest.mark.dist
def test_what_was_planted_is_named(tmp_path):
    results = run_ranks(2, "engine_diagnosis:planted", tmp_path, CASES)
    assert str(results[0]) == str(results[1]), "all ranks are told the same"
    for name, found in results[0].items():
        keys = {
            place: [(s.rank, s.key, s.what) for s in suspects] for place, suspects in found.items() if place != "name"
        }
        assert keys["none"] == [], name
        assert keys["gradient"] == [(0, "sample-0", "gradient"), (0, "sample-20", "gradient")], name
        # Packs of 1, 2, 3 and 1 samples, dealt to the ranks in turn.
        assert keys["latents"] == [(1, "sample-11", "loss")], name
        assert keys["text"] == [(1, "sample-30", "loss")], name
        (weight,) = found["name"]
        assert keys["master"][0] == (0, weight, "weight"), name
        if not name.startswith("zero0"):  # there the model computes with it
            assert len(keys["master"]) == 1, name
        assert keys["weight"][0] == (0, weight, "weight"), name
        assert "since weights on rank 0" in report(3, "the loss is nan", found["master"])

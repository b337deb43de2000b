"""A rank that is slow to save: the checkpoint is there after its file, not before, whatever the stage."""

import pytest
from ranks import run_ranks

from dstrain.engine.checkpoint import MANIFEST
from dstrain.engine.state import file_name

STAGES = {
    "zero2": {"stage": 2},
    "zero3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero3 persistent": {"stage": 3, "stage3_param_persistence_threshold": 100_000},
}


@pytest.mark.dist
def test_the_checkpoint_comes_after_the_slowest_rank(tmp_path):
    cases = {f"{n} {b}": ({"zero_optimization": z}, b) for n, z in STAGES.items() for b in ("off", "on")}
    for results in run_ranks(2, "engine_saver:slow_rank", tmp_path, cases, str(tmp_path)):
        assert results.keys() == cases.keys()
        for name, (times, damage) in results.items():
            assert times.keys() == {MANIFEST, file_name(0), file_name(1)}, name
            assert times[file_name(1)] > 1.0, f"{name}: rank 1 was not slow"
            assert times[MANIFEST] >= times[file_name(1)], name
            assert damage == "", name

"""Checkpoints of every ZeRO stage on two real ranks, and the ways in which a step or a save can fail."""

import pytest
from ranks import run_ranks
from test_engine_parity import STAGES

pytestmark = pytest.mark.dist


def configs():
    return {n: {"gradient_clipping": 0.5, "zero_optimization": z} for n, z in STAGES.items()}


def test_every_stage_and_precision_continues_with_the_same_bits(tmp_path):
    cases = {f"{n}-{p}": (ds, p == "bf16") for n, ds in configs().items() for p in ("fp32", "bf16")}
    for result in run_ranks(2, "engine_resume:resume", tmp_path, cases, str(tmp_path)):
        assert result == dict.fromkeys(cases, True)


def test_a_full_disk_on_one_rank_stops_all_and_leaves_the_old_checkpoint(tmp_path):
    for said, left in run_ranks(2, "engine_resume:full_disk", tmp_path, str(tmp_path)):
        assert "rank 1" in said
        assert "No space left" in said
        assert "GiB are free" in said
        assert left == ["step-00000001"]


def test_a_gradient_that_is_not_finite_changes_no_weight(tmp_path):
    for result in run_ranks(2, "engine_resume:bad_gradient", tmp_path, configs()):
        assert result == dict.fromkeys(STAGES, True)

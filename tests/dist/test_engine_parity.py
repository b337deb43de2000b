"""ZeRO stages 0 to 3 on two real ranks follow plain PyTorch on the same global batches."""

import pytest
from ranks import run_ranks

CPU = {"device": "cpu"}
STAGES = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero2_offload": {"stage": 2, "offload_optimizer": CPU},
    "zero3": {"stage": 3},
    "zero3_offload": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU, "overlap_comm": True},
}


@pytest.mark.dist
def test_every_stage_follows_plain_pytorch(tmp_path):
    configs = {n: {"gradient_clipping": 0.5, "zero_optimization": z} for n, z in STAGES.items()}
    first, second = run_ranks(2, "engine_parity:parity", tmp_path, configs, [1, 3, 2, 1, 4])
    for name in STAGES:
        *rows, (gap,) = first[name]
        for step, (ours, want, norm, want_norm) in enumerate(rows):
            assert ours == pytest.approx(want, rel=1e-6 if step == 0 else 1e-4), (name, step)
            assert norm == pytest.approx(want_norm, rel=1e-5 if step == 0 else 1e-3), (name, step)
        assert gap < 1e-4, name
        assert [r[2] for r in rows] == [r[2] for r in second[name][:-1]], name

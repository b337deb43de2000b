"""AdamW with moments of 8 bits, and Muon, on two real ranks: each follows its description in plain PyTorch."""

from importlib.util import find_spec

import pytest
from engine_presets import Case
from ranks import run_ranks

CPU = {"device": "cpu"}
ZERO0, ZERO1, ZERO2, ZERO3 = ({"stage": stage} for stage in range(4))
ZERO2_OFFLOAD = ZERO2 | {"offload_optimizer": CPU}
ZERO3_OFFLOAD = ZERO3 | {"offload_optimizer": CPU, "offload_param": CPU}


def cases(optimizer: str, clip: float, *wanted: tuple[dict, str, bool]) -> dict[str, Case]:
    return {
        f"{zero['stage']} {'offload' if 'offload_optimizer' in zero else ''} {what} {'bf16' if bf16 else 'fp32'}": Case(
            {"gradient_clipping": clip, "zero_optimization": zero}, what, bf16, optimizer
        )
        for zero, what, bf16 in wanted
    }


@pytest.mark.dist
def test_adamw_with_moments_of_8_bits(tmp_path):
    if not find_spec("bitsandbytes"):
        pytest.skip("needs bitsandbytes")
    stages = [ZERO0, ZERO1, ZERO2, ZERO2_OFFLOAD, ZERO3, ZERO3_OFFLOAD]
    wanted = [(zero, "full", bf16) for zero in stages for bf16 in (False, True)] + [(ZERO3, "lora", False)]
    for name, found in run_ranks(2, "engine_presets:follow", tmp_path, cases("adamw_8bit", 0.5, *wanted))[0].items():
        for step, (ours, loss, norm, want_norm) in enumerate(found.steps):
            assert ours == pytest.approx(loss, rel=2e-3 if "bf16" in name else 1e-4 if step else 1e-6), (name, step)
            assert norm == pytest.approx(want_norm, rel=1e-2), (name, step)
        # were the moments whole, an fp32 run would be at 1e-7
        assert 1e-5 < found.gap < found.moved / (2 if "bf16" in name else 10), name


@pytest.mark.dist
def test_muon(tmp_path):
    wanted = [(zero, "full", bf16) for zero in (ZERO0, ZERO3, ZERO3_OFFLOAD) for bf16 in (False, True)]
    wanted += [(ZERO3, "lora", False)]
    for name, found in run_ranks(2, "engine_presets:follow", tmp_path, cases("muon", 0.0, *wanted))[0].items():
        for step, (ours, loss, norm, want_norm) in enumerate(found.steps):
            assert ours == pytest.approx(loss, rel=2e-3 if "bf16" in name else 1e-5), (name, step)
            # the gradient's, not that of the orthogonalised update, which is about a hundred times as large
            assert norm == pytest.approx(want_norm, rel=1e-2 if "bf16" in name else 1e-4), (name, step)
        assert found.gap < (found.moved / 2 if "bf16" in name else 1e-5), name

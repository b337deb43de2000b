"""Memory from counts, against the figures that are known."""

import pytest

from dstrain.engine.estimate import estimate

QWEN = {"parameters": 20_430_401_088, "width": 3072, "layers": 60, "encoder_bytes": 0}
GB = 1e9


def run(zero, *, world, tokens=1, checkpointing=True, bf16=True, **model):
    small = {"reduce_bucket_size": 0, "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0}
    config = {"bf16": {"enabled": bf16}, "zero_optimization": {**small, **zero}}
    return estimate(config, world_size=world, tokens=tokens, checkpointing=checkpointing, **{**QWEN, **model})


@pytest.mark.parametrize(("world", "gigabytes"), [(2, 183.9), (4, 91.9), (8, 46.0), (16, 23.0)])
def test_zero3_takes_18_bytes_a_parameter_over_all_ranks(world, gigabytes):
    block = 2 * QWEN["parameters"] / 60  # one gathered block comes on top
    assert (run({"stage": 3}, world=world).device - block) / GB == pytest.approx(gigabytes, rel=0.02)


def test_offload_moves_22_bytes_a_parameter_to_the_host():
    cpu = {"device": "cpu"}
    need = run({"stage": 3, "offload_param": cpu, "offload_optimizer": cpu}, world=1)
    assert need.host / QWEN["parameters"] == pytest.approx(22, rel=0.01)
    assert need.device < 2 * GB


def test_stages_shard_what_they_should():
    needs = [run({"stage": s}, world=8).device / QWEN["parameters"] for s in (0, 1, 2)]
    assert needs == pytest.approx([16, 2 + 4 + 1.5, 2 + (4 + 12) / 8], rel=0.02)


def test_checkpointing_saves_the_known_share():
    kept = [run({"stage": 3}, world=8, tokens=4608, checkpointing=c).device for c in (True, False)]
    assert (kept[1] - kept[0]) / GB == pytest.approx(49.9 - 1.70 - 0.83, rel=0.02)

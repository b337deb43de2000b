"""ZeRO stages 0 to 3 on real ranks follow plain PyTorch on the same global batches, whatever trains."""

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
# Layers are gathered one by one, as with parameters on NVMe: no weight may be used outside its layer's call.
LAYERS = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "leaf_module": {"classes": ["dstrain.models.qwen_image.AdaLayerNormOut"]},
}


def cases(stages, *what):
    return {f"{n} {w}": ({"gradient_clipping": 0.5, "zero_optimization": (STAGES | {"layers": LAYERS})[n]}, w) for w in what for n in stages}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("world", "what", "steps", "stages"),
    [
        (2, ["full"], 6, list(STAGES)),
        (2, ["lora", "dora", "blocks"], 4, ["zero2", "zero3_offload"]),
        (4, ["full"], 4, ["zero3_offload"]),
        (2, ["full triton", "lora triton"], 2, ["zero3_offload"]),
        (2, ["full triton compiled"], 1, ["zero3_offload"]),
        (1, ["full triton"], 1, ["layers"]),
        pytest.param(2, ["full compile"], 4, ["zero3_offload"], marks=pytest.mark.soak),
        pytest.param(2, ["full triton", "lora triton"], 4, ["zero2", "zero3", "zero3_offload"], marks=pytest.mark.soak),
        pytest.param(1, ["full", "lora"], 6, list(STAGES), marks=pytest.mark.soak),
        pytest.param(2, ["full", "lora", "dora", "blocks"], 20, list(STAGES), marks=pytest.mark.soak),
        pytest.param(4, ["full", "lora"], 6, list(STAGES), marks=pytest.mark.soak),
    ],
)
def test_every_stage_follows_plain_pytorch(tmp_path, world, what, steps, stages):
    configs = cases(stages, *what)
    micros = [1, 3, 2, 1, 4, 1, 2, 1, 1, 2, 1, 1, 3, 1, 1, 2, 1, 1, 1, 2][:steps]
    fresh = any("compile" in w for w in what)  # processes that are forked have the compiler switched off
    results = run_ranks(world, "engine_parity:parity", tmp_path, configs, micros, fresh=fresh)
    for name in configs:
        *rows, (gap,) = results[0][name]
        for step, (ours, loss, norm, want_norm) in enumerate(rows):
            assert ours == pytest.approx(loss, rel=1e-6 if step == 0 else 1e-4), (name, step)
            assert norm == pytest.approx(want_norm, rel=1e-5 if step == 0 else 1e-3), (name, step)
        assert gap < 1e-4, name
        for other in results[1:]:
            assert [r[2] for r in rows] == [r[2] for r in other[name][:-1]], name

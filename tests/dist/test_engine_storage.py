"""Adapters on weights in 8 and 4 bits, on real ranks under ZeRO: the gradients are those of the rounded weights."""

from importlib.util import find_spec

import pytest
from ranks import run_ranks

# nothing stays gathered, however small the model
ZERO3 = {
    "stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0,
    "stage3_max_live_parameters": 0, "stage3_prefetch_bucket_size": 0,
}  # fmt: skip
CASES = {
    "zero1": ({"stage": 1}, False),
    "zero3": (ZERO3, False),
    "zero3 offload": (ZERO3 | {"offload_param": {"device": "cpu"}}, False),
    "zero3 persistent": ({"stage": 3, "stage3_param_persistence_threshold": 100_000}, False),
    "zero3 bf16": (ZERO3, True),
}


@pytest.mark.dist
@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_gradients_are_those_of_the_rounded_weights(tmp_path, kind):
    if kind == "nf4" and not find_spec("bitsandbytes"):
        pytest.skip("needs bitsandbytes")
    cases = {
        name: ({"gradient_clipping": 0.5, "zero_optimization": zero}, kind, bf16)
        for name, (zero, bf16) in CASES.items()
    }
    for rank, results in enumerate(run_ranks(2, "engine_storage:train", tmp_path, cases, timeout=280)):
        for name, seen in results.items():
            where = (name, rank)
            rel, most = (5e-3, 0.1) if "bf16" in name else (1e-6, 1e-6)
            for ours, want in seen["losses"]:
                assert ours == pytest.approx(want, rel=rel), where
            count, gap = seen["gradients"]
            assert count == 2 * 12 * 2 - 2 * 2, where  # A and B of 12 layers a block; the last block lacks two
            assert gap < most, where
            assert seen["unchanged"], where
            shards, gathered = seen["expected"]
            if "zero1" in name:
                assert seen["held"] == ((0, gathered), (0, gathered)), where
            else:
                assert seen["held"][0] == (shards, 0), where
                assert seen["held"][1] == (shards, 0) or "persistent" in name, where

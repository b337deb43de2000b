"""ZeRO-3 on two real ranks gives the same losses and gradient norms under every activation policy.

Its linear layer is the default, memory-efficient one, which has made selective checkpointing go wrong elsewhere.
"""

import pytest
from ranks import run_ranks

POLICIES = [("none",), ("attention",), ("full",), ("offload",), ("offload", "none", "attention")]
OUTSIDE = ("img_in", "txt_in", "txt_norm", "time_text_embed", "norm_out", "proj_out")
PREFETCH = {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 10_000_000}
CASES = {
    "all_trained": ((), True, {}),
    "nothing_in_front_of_the_blocks_trains": (OUTSIDE, True, {}),  # a leaf's inputs must have a gradient
    "gathers_inside_and_outside_the_blocks": ((), False, PREFETCH),  # other operations in the recomputation
    "offload": (("img_in",), True, {"offload_param": {"device": "cpu"}, "offload_optimizer": {"device": "cpu"}}),
}


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_every_policy_gives_the_loss_and_gradient_norm_of_none(tmp_path, name):
    for result in run_ranks(2, "engine_activations:policies", tmp_path, {name: CASES[name]}, POLICIES):
        want, *others = result[name]
        assert want[0][1] > 0
        for keep, rows in zip(POLICIES[1:], others, strict=True):
            for got, wanted in zip(rows, want, strict=True):
                assert got == pytest.approx(wanted, rel=1e-6), keep

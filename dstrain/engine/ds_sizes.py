"""The sizes that ZeRO works in, set from the model: what it gathers, reduces and updates at a time.

DeepSpeed's defaults are constants. Its prefetch bucket (5e7 elements) is smaller than one modulation matrix of a 20 B
DiT (5.7e7), so that part of every block would be waited for, and its reduce bucket (5e8) is a gigabyte that a small
model allocates for nothing. The blocks are equal and gathered whole, so a block is the natural unit.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from dstrain.engine.ds_rules import offload, stage

PERSISTENT = 100_000  # DeepSpeed's default: norms and biases stay on each rank, matrices do not
BUCKET = 500_000_000  # DeepSpeed's default; a larger one gains nothing


class Size(NamedTuple):
    """A size in elements, and why it is this one."""

    elements: int
    why: str


def sizes(config: Mapping[str, Any], block: int, largest: int) -> dict[str, Size]:
    """Return the sizes of zero_optimization that `config` leaves open.

    Args:
        config: a ds_config.
        block: elements of one transformer block; 0 = not known, all stays with DeepSpeed's defaults.
        largest: elements of the model's largest tensor.
    """
    zero, level = config.get("zero_optimization", {}), stage(config)
    if not block or not level:
        return {}
    unit = max(block, largest)
    found = {"reduce_bucket_size": Size(min(BUCKET, max(1, largest, block // 2)), "half a block's gradients at a time")}
    if level == 3:
        ratio = (zero.get("offload_optimizer") or {}).get("ratio", 1)
        found |= {
            "stage3_prefetch_bucket_size": Size(unit, "the next block is fetched while one computes"),
            "stage3_max_live_parameters": Size(3 * unit, "the block at work, the next, and what lies between"),
            "stage3_max_reuse_distance": Size(
                unit + unit // 5, "a block that was just recomputed is not gathered again for its backward"
            ),
            "stage3_param_persistence_threshold": Size(PERSISTENT, "norms and biases are never gathered"),
            # Twin-Flow keeps whole tiles on the GPU, so there the tiles must be smaller than its shares.
            "sub_group_size": Size(unit // 2 if ratio < 1 else unit, "a block is updated at a time"),
        }
    if offload(config, "param") == "nvme":  # DeepSpeed has a buffer for each of few, and holds one while it is live
        none = Size(0, "parameters come from NVMe one by one, and go at once")
        found |= dict.fromkeys(
            ("stage3_prefetch_bucket_size", "stage3_max_live_parameters", "stage3_max_reuse_distance"), none
        )
    return {key: size for key, size in found.items() if key not in zero}

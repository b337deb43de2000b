"""What a run will need, from counts alone: bytes of model states and activations per rank."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dstrain.engine.ds_config import offload, stage

# Bytes kept for the backward of one block per token and unit of width, eager bf16: counted over the Qwen-Image block.
BLOCK_ACTIVATION_BYTES = 58.75


@dataclass(frozen=True)
class Estimate:
    """Bytes per rank: on its device, and in host memory (where the device is a CPU, both come from there)."""

    device: float
    host: float


def estimate(
    config: Mapping[str, Any],
    *,
    parameters: int,
    world_size: int,
    width: int,
    layers: int,
    tokens: int,
    encoder_bytes: int,
    checkpointing: bool,
) -> Estimate:
    """Estimate the peak of one rank.

    Counted are weights, gradients, fp32 master weights and the two AdamW moments under the given stage and offload,
    activations of a pack of `tokens` tokens, DeepSpeed's buckets, and the frozen encoders. Not counted: the CUDA
    context (about 0.5 GB), fragmentation, read-ahead.
    """
    level = stage(config)
    word = 2 if config["bf16"]["enabled"] else 4
    share = [parameters / (world_size if level >= needed else 1) for needed in (1, 2, 3)]
    states, gradients, weights = 12 * share[0], (word if level == 0 else 4) * share[1], word * share[2]
    device = host = 0.0
    if offload(config, "optimizer") == "none":
        device += states + gradients
    else:  # fp32 gradients are kept beside the states for the CPU's step
        host += states + 4 * share[0] + gradients
    if offload(config, "param") == "none":
        device += weights
    else:
        host += weights
    block = parameters / max(1, layers)
    zero = config.get("zero_optimization", {})
    if level == 3:
        live = min(zero.get("stage3_max_live_parameters", 1e9), parameters)
        prefetch = min(zero.get("stage3_prefetch_bucket_size", 5e7), parameters)
        device += word * max(block, min(live, 2 * block + prefetch))
    device += word * min(zero.get("reduce_bucket_size", 5e8), parameters)
    scale = word / 2
    kept = layers * 2 * width * tokens + BLOCK_ACTIVATION_BYTES * width * tokens
    device += scale * (kept if checkpointing else layers * BLOCK_ACTIVATION_BYTES * width * tokens)
    return Estimate(device + encoder_bytes, host)

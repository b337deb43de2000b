"""The learning rate of a step, a pure function: nothing to save, nothing to restore."""

import math

from dstrain.config import OptimizerConfig


def learning_rate(o: OptimizerConfig, step: int, steps: int) -> float:
    """Return the rate of optimizer step `step` (from 0) of `steps`: linear warm-up, then constant, linear or cosine.

    The first warm-up step has lr / warmup_steps, and the last step of a decay ends at lr * min_lr_ratio.
    """
    if step < o.warmup_steps:
        return o.lr * (step + 1) / o.warmup_steps
    if o.decay == "constant":
        return o.lr
    done = (step - o.warmup_steps + 1) / max(1, steps - o.warmup_steps)
    left = 1 - done if o.decay == "linear" else (1 + math.cos(math.pi * min(done, 1.0))) / 2
    return o.lr * (o.min_lr_ratio + (1 - o.min_lr_ratio) * max(left, 0.0))

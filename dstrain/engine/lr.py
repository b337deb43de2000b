"""The learning rate of a step, a pure function: nothing to save, nothing to restore."""

import math

from dstrain.config import OptimizerConfig


def lr_factor(o: OptimizerConfig, step: int, steps: int) -> float:
    """Return the share of the peak rate at optimizer step `step` (from 0) of `steps`: warm-up, then the schedule.

    The first warm-up step has 1 / warmup_steps. A decay would reach min_lr_ratio in the step after the last, so that
    none is taken in vain; wsd (warm-up, stable, decay: Hu et al., arXiv 2404.06395) stays at the peak until the last
    `decay_steps`.
    """
    if step < o.warmup_steps:
        return (step + 1) / o.warmup_steps
    if o.schedule == "constant":
        return 1.0
    length = steps - o.warmup_steps
    if o.schedule == "wsd":
        length = min(length, o.decay_steps or -(-steps // 10))
    done = min(max((step - (steps - length)) / max(1, length), 0.0), 1.0)
    left = (1 + math.cos(math.pi * done)) / 2 if o.schedule == "cosine" else 1 - done
    return o.min_lr_ratio + (1 - o.min_lr_ratio) * left

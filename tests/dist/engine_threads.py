"""The gradient of what many tokens pick by index, as modulation is, again and again on several threads."""

import torch

from dstrain.engine import distributed


def gradients(times: int, start: bool) -> int:
    """How many different gradients come out of one computation; `start`: as in a run."""
    if start:
        distributed.start()
    torch.set_num_threads(4)
    torch.manual_seed(0)
    table, rows = torch.randn(3, 512), torch.arange(4096) % 3
    weights = torch.randn(4096, 512)
    seen = set()
    for _ in range(times):
        picked = table.clone().requires_grad_()
        (picked[rows] * weights).sum().backward()
        seen.add(picked.grad.numpy().tobytes())
    return len(seen)

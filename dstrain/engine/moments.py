"""What an optimizer remembers of a flat tensor, in plain numbers: out of it for a checkpoint, and into it again.

AdamW's moments of 8 bits (Dettmers et al., arXiv 2110.02861, by bitsandbytes) leave as fp32 under AdamW's names. Packed
again in the same blocks they have the same bits: a run goes on exactly at its own world size and stage, and to within
the 8 bits at others.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dstrain.errors import ConfigError

PACKED = {"exp_avg": ("state1", "absmax1", "qmap1"), "exp_avg_sq": ("state2", "absmax2", "qmap2")}
BLOCK = 256  # packed elements that share a scale


def adamw_8bit(groups: list[dict[str, Any]], params: Mapping[str, Any]) -> torch.optim.Optimizer:
    """Return AdamW with moments of 8 bits over parameter groups; ConfigError if bitsandbytes is not there."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ConfigError("optimizer.name adamw_8bit needs bitsandbytes: pip install -e '.[quant]'") from None
    return AdamW8bit(groups, lr=params["lr"], betas=tuple(params["betas"]), eps=params["eps"])


def kinds(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, torch.dtype]:
    """Return the names and dtypes of what `tensors` gives, even while the tensors are on NVMe."""
    state = optimizer.state.get(flat, {})
    if "state1" in state:
        return dict.fromkeys(PACKED, torch.float32)
    found = {kind: v for kind, v in state.items() if isinstance(v, Tensor) and v.ndim}
    return {kind: v.dtype for kind, v in found.items() if v.numel() == flat.numel()}


def tensors(optimizer: torch.optim.Optimizer, flat: Tensor) -> dict[str, Tensor]:
    """Return what is remembered for each element of `flat`, e.g. exp_avg and exp_avg_sq, each as long as `flat`."""
    state = optimizer.state.get(flat, {})
    if "state1" not in state:
        return {kind: state[kind].view(-1) for kind in kinds(optimizer, flat)}
    from bitsandbytes.functional import dequantize_blockwise

    found = {}
    for kind, (values, scales, code) in PACKED.items():
        found[kind] = state[values].view(-1)
        if scales in state:  # small tensors are not packed
            found[kind] = dequantize_blockwise(found[kind], absmax=state[scales], code=state[code], blocksize=BLOCK)
    return found


def steps(optimizer: torch.optim.Optimizer, flat: Tensor) -> int:
    """Return how many steps the optimizer has taken with `flat`; 0 if it does not count."""
    return int(optimizer.state.get(flat, {}).get("step", 0))


def empty(optimizer: torch.optim.Optimizer, flat: Tensor) -> Tensor:
    """Return zeros for one of the tensors that `put` takes."""
    fp32 = getattr(optimizer, "fp32_optimizer_states", False) or _is_8bit(optimizer)
    return torch.zeros_like(flat, dtype=torch.float32 if fp32 else flat.dtype).detach().view(-1)


def put(optimizer: Any, flat: Tensor, moments: Mapping[str, Tensor], count: int) -> None:
    """Make the optimizer remember `moments` of `flat`, as after `count` steps; it may keep the tensors themselves."""
    if _is_8bit(optimizer):
        _pack(optimizer, flat, moments)
    state = optimizer.state[flat]
    for kind, moment in moments.items():
        if kind in state:
            state[kind].view(-1).copy_(moment)
        elif not _is_8bit(optimizer):
            state[kind] = moment.view(flat.shape)
    if "exp_avg" in moments:
        on_device = optimizer.param_groups[0].get("fused", False)
        torchs = isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)
        state["step"] = torch.tensor(float(count), device=flat.device if on_device else "cpu") if torchs else count


def _is_8bit(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__name__ == "AdamW8bit"


def _pack(optimizer: Any, flat: Tensor, moments: Mapping[str, Tensor]) -> None:
    from bitsandbytes.functional import quantize_blockwise

    optimizer.init_state(optimizer.param_groups[0], flat, 0, 0)
    state = optimizer.state[flat]
    for kind, (values, scales, code) in PACKED.items():
        packed = moments[kind].to(state[values].device)
        if scales in state:
            packed, found = quantize_blockwise(packed, code=state[code], blocksize=BLOCK)
            state[scales].copy_(found.absmax)
        state[values].view(-1).copy_(packed)

"""What an optimizer remembers of a flat tensor, in plain numbers: out of it for a checkpoint, and into it again.

AdamW's moments of 8 bits (Dettmers et al., arXiv 2110.02861, by bitsandbytes) leave as fp32 under AdamW's names. Packed
again in the same blocks they have the same codes, and scales to an ulp; in others, at another world size or stage, they
are rounded to 8 bits anew.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dstrain.errors import ConfigError

PACKED = {  # where the moment lies, its scales, its code, and that code's name
    "exp_avg": ("state1", "absmax1", "qmap1", "dynamic"),
    "exp_avg_sq": ("state2", "absmax2", "qmap2", "udynamic"),
}
BLOCK = 256  # packed elements that share a scale
LEAST = 4096  # elements of a tensor that is packed


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
    for kind, (values, scales, code, _) in PACKED.items():
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
    state = optimizer.state[flat]
    if _is_8bit(optimizer):
        state.update(_packed(optimizer, flat, moments), step=count)
        return
    for kind, moment in moments.items():
        if kind in state:
            state[kind].view(-1).copy_(moment)
        else:
            state[kind] = moment.view(flat.shape)
    if "exp_avg" in moments:
        on_device = optimizer.param_groups[0].get("fused", False)
        torchs = isinstance(adam_of(optimizer), torch.optim.Adam | torch.optim.AdamW)
        state["step"] = torch.tensor(float(count), device=flat.device if on_device else "cpu") if torchs else count


def adam_of(optimizer: Any) -> Any:
    """Return the optimizer itself, or the Adam to which Muon leaves what is no matrix."""
    return getattr(optimizer, "aux_optimizer", None) or optimizer


def _is_8bit(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__name__ == "AdamW8bit"


def _packed(optimizer: Any, flat: Tensor, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state of bitsandbytes that unpacks to `moments`.

    Its own packing scales by the largest size of a block, but the code for signed numbers ends at -0.993: where that
    largest is negative, packing what was unpacked would come out smaller each time.
    """
    optimizer.fill_qmap()
    state = dict[str, Tensor]()
    for kind, (values, scales, code, name) in PACKED.items():
        moment = moments[kind].to(flat.device)
        if flat.numel() < LEAST:
            state[values] = moment.view(flat.shape)
            continue
        state[code] = optimizer.name2qmap[name].to(flat.device)
        low, high = state[code][0].item(), state[code][-1].item()
        blocks = torch.nn.functional.pad(moment, (0, -len(moment) % BLOCK)).view(-1, BLOCK)
        scale = blocks.amax(1) / high
        if low < 0:
            scale = torch.maximum(scale, blocks.amin(1) / low)
        middles = (state[code][1:] + state[code][:-1]) / 2
        normed = blocks / torch.where(scale > 0, scale, 1.0)[:, None]
        state[values] = torch.bucketize(normed, middles).to(torch.uint8).flatten()[: len(moment)].view(flat.shape)
        state[scales] = scale
    return state

"""Attention over a pack: every token sees its own sample and nothing else. What runs it, one function decides."""

import logging
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from dstrain.models.packing import PackLayout

log = logging.getLogger(__name__)

FLASH_3 = "flash attention 3 (varlen)"
FLASH_2 = "flash attention 2 (varlen)"
SDPA = "scaled_dot_product_attention, a call for each sample length"
HALF = (torch.bfloat16, torch.float16)


@cache
def _flash_3_refusal() -> str:
    """Make flash attention 3 what torch runs for flash attention; say why not, or nothing where it now is."""
    try:
        from torch.nn.attention import activate_flash_attention_impl, current_flash_attention_impl

        active = current_flash_attention_impl()
        if active is None:
            activate_flash_attention_impl("FA3")
        elif active != "FA3":
            return f"{active} was chosen before"
    except Exception as error:  # whatever a build that does not fit raises: there is always version 2
        return str(error) or type(error).__name__
    return ""


@torch.compiler.assume_constant_result
def choose_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """Return which attention runs for such tensors (FLASH_3, FLASH_2 or SDPA), and why; logged once.

    On the meta device half precision counts as on a GPU. The first call on a Hopper GPU activates flash attention 3 in
    torch, for the process, if its package is installed.
    """
    return _choose(device, dtype, head_dim)  # torch.compile looks through a cache, so that this takes two functions


@cache
def _choose(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    if device.type not in ("cuda", "meta"):
        choice = SDPA, f"flash attention does not run on {device.type}"
    elif dtype not in HALF:
        choice = SDPA, f"flash attention does not take {str(dtype).removeprefix('torch.')}"
    elif head_dim > 256 or head_dim % 8:
        choice = SDPA, f"flash attention takes heads of at most 256, in steps of 8, not {head_dim}"
    elif device.type == "meta":
        choice = FLASH_2, "shapes alone, as on a GPU"
    elif (capability := torch.cuda.get_device_capability(device)) < (8, 0):
        choice = SDPA, f"flash attention needs compute capability 8.0, not {capability[0]}.{capability[1]}"
    elif capability[0] != 9:
        choice = FLASH_2, f"version 3 is for compute capability 9.x, not {capability[0]}.{capability[1]}"
    elif refusal := _flash_3_refusal():
        choice = FLASH_2, f"version 3 is not available: {refusal}"
    else:
        choice = FLASH_3, "the GPU is a Hopper and the package is installed"
    name, why = choice
    log.info("attention of %s, heads of %d, on %s: %s (%s)", dtype, head_dim, device.type, name, why)
    return choice


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackLayout) -> Tensor:
    """Bidirectional attention of q, k, v [S, H, D] in joint order; returns [S, H, D].

    Half precision on a GPU runs the variable-length flash kernel. Elsewhere samples of equal length go through
    scaled_dot_product_attention as one batch, so a pack never computes on padding.
    """
    if choose_attention(q.device, q.dtype, q.shape[-1])[0] != SDPA:
        from torch.nn.attention.varlen import varlen_attn

        longest = max(layout.joint_lens)
        out = varlen_attn(q, k, v, layout.cu_seqlens, layout.cu_seqlens, longest, longest)
        assert isinstance(out, Tensor)
        return out
    lengths = set(layout.joint_lens)
    if len(lengths) == 1:  # the samples are a batch as they lie
        return _sdpa(*(x.unflatten(0, (len(layout), *lengths)) for x in (q, k, v)))
    groups = layout.length_groups  # [n, L] each
    outputs = [_sdpa(q[places], k[places], v[places]) for places in groups]
    order = torch.argsort(torch.cat([places.flatten() for places in groups]))
    return torch.cat(outputs)[order]


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[n, L, H, D] each -> [n L, H, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v)  # [n, H, L, D]
    return out.transpose(1, 2).flatten(0, 1)

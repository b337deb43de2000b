"""Attention over a pack: every token sees its own sample and nothing else."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dstrain.models.packing import PackLayout


def packed_attention(q: Tensor, k: Tensor, v: Tensor, layout: PackLayout) -> Tensor:
    """Bidirectional attention of q, k, v [S, H, D] in joint order; returns [S, H, D].

    Half precision on CUDA runs the variable-length flash kernel. Elsewhere samples of equal length go through
    scaled_dot_product_attention as one batch, so a pack never computes on padding.
    """
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn

        longest = max(layout.joint_lens)
        out = varlen_attn(q, k, v, layout.cu_seqlens, layout.cu_seqlens, longest, longest)
        assert isinstance(out, Tensor)
        return out
    outputs = []
    for places in layout.length_groups:  # [n, L]
        qs, ks, vs = (x[places].transpose(1, 2) for x in (q, k, v))  # [n, H, L, D]
        outputs.append(F.scaled_dot_product_attention(qs, ks, vs).transpose(1, 2).flatten(0, 1))
    order = torch.argsort(torch.cat([places.flatten() for places in layout.length_groups]))
    return torch.cat(outputs)[order]

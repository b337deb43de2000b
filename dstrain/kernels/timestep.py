"""Sinusoids of the timestep (Vaswani et al., arXiv:1706.03762), in one launch.

embedding = [cos(scale sigma f_0), .., sin(scale sigma f_0), ..], f_i = base^(-i / h), for i below h = channels / 2.

Frequencies and angles are fp32 numbers, rounded where plain PyTorch rounds them, so that a model sees what it was
trained with. Angles reach 1000 radians, which fp32 knows to 2^-15: that keeps results from the exact ones by up to 9e-5
(measured for 20001 sigmas), here and in PyTorch alike. What lies between is fp64: the fp32 sines and exponentials of a
GPU are coarse far from zero, and a few thousand in fp64 cost nothing.
"""

# mypy: allow-untyped-defs

import math

import torch
from torch import Tensor

from dstrain.kernels.backend import FLOATS, check_tensor, choose, compiled, jit, on_device, tl, triton


def timestep_embedding_reference(
    sigmas: Tensor,
    channels: int = 256,
    scale: float = 1000.0,
    base: float = 10_000.0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`timestep_embedding` in plain PyTorch, for sigmas of any float dtype."""
    sigmas = sigmas.to(torch.promote_types(sigmas.dtype, torch.float32))
    half = channels // 2
    ramp = torch.arange(half, dtype=sigmas.dtype, device=sigmas.device)
    frequencies = torch.exp(-math.log(base) * ramp / half)
    angles = sigmas[:, None] * frequencies * scale  # [N, channels / 2]
    return torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype)


@jit
def _kernel(sigma_ptr, out_ptr, scale, slope, HALF: tl.constexpr, B: tl.constexpr):
    """One sample: `slope` is -log(base)."""
    sample = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, B)
    exponent = ((slope * channel.to(tl.float32)).to(tl.float64) / HALF).to(tl.float32)
    frequency = tl.exp(exponent.to(tl.float64)).to(tl.float32)
    angle = (tl.load(sigma_ptr + sample) * frequency * scale).to(tl.float64)
    row_ptr, mask = out_ptr + sample * (2 * HALF) + channel, channel < HALF
    tl.store(row_ptr, tl.cos(angle).to(tl.float32), mask=mask)
    tl.store(row_ptr + HALF, tl.sin(angle).to(tl.float32), mask=mask)


@torch.library.custom_op("dstrain::timestep_embedding", mutates_args=())
def timestep_embedding_forward(sigmas: Tensor, channels: int, scale: float, base: float, dtype: torch.dtype) -> Tensor:
    """Launch the kernel: sigmas [N] -> [N, channels]."""
    out = torch.empty((len(sigmas), channels), dtype=dtype, device=sigmas.device)
    half = channels // 2
    block = triton.next_power_of_2(half)
    with on_device(sigmas.device):
        _kernel[(len(sigmas),)](sigmas, out, scale, -math.log(base), half, block, num_warps=4)
    return out


@timestep_embedding_forward.register_fake
def _(sigmas: Tensor, channels: int, scale: float, base: float, dtype: torch.dtype) -> Tensor:
    return sigmas.new_empty((len(sigmas), channels), dtype=dtype)


def timestep_embedding(
    sigmas: Tensor,
    channels: int = 256,
    scale: float = 1000.0,
    base: float = 10_000.0,
    dtype: torch.dtype = torch.float32,
    mode: str = "auto",
) -> Tensor:
    """Return [N, channels] in `dtype`, fp32 or bf16: cosines, then sines, of fp32 sigmas [N].

    `mode` is "auto" (Triton on CUDA, the reference elsewhere), "reference", "triton" or "compile"; sigmas that require
    a gradient, which training never wants, get the reference. Raises ValueError that names the argument for a wrong
    shape, dtype, device or stride, for channels that are not an even number of at least 2, and for a base that is not
    positive.
    """
    face = choose(mode, sigmas.device)
    if sigmas.ndim != 1 or len(sigmas) == 0:
        raise ValueError(f"sigmas must have shape [samples], at least 1, got {list(sigmas.shape)}")
    check_tensor("sigmas", sigmas, sigmas.shape, (torch.float32,), sigmas.device)
    if channels < 2 or channels % 2:
        raise ValueError(f"channels must be an even number of at least 2, got {channels}")
    if not base > 0:
        raise ValueError(f"base must be positive, got {base}")
    if dtype not in FLOATS:
        raise ValueError(f"dtype must be float32 or bfloat16, got {str(dtype).removeprefix('torch.')}")
    if face == "triton" and not (sigmas.requires_grad and torch.is_grad_enabled()):
        return timestep_embedding_forward(sigmas, channels, scale, base, dtype)
    reference = compiled(timestep_embedding_reference) if face == "compile" else timestep_embedding_reference
    return reference(sigmas, channels, scale, base, dtype)

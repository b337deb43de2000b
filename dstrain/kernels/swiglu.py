"""SwiGLU: silu(gate) * up, forward and backward in one pass each (Shazeer, arXiv:2002.05202).

Gate and up are [S, F], often the two halves of one projection [S, 2 F], so their rows may lie apart. Their gradients
are made side by side in one [S, 2 F] tensor: who holds the projection has its gradient without joining the halves.
"""

# mypy: allow-untyped-defs

from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.function import once_differentiable

from dstrain.kernels.backend import FLOATS, check_tensor, choose, compiled, jit, on_device, tl, triton
from dstrain.kernels.gelu import sigmoid, tile


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """`swiglu` in plain PyTorch, for any float dtype."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (nnf.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


@jit
def _place(rows, F: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
    """This program's rows [R, 1], columns [1, B] and mask [R, B]."""
    TILES: tl.constexpr = (F + B - 1) // B
    pid = tl.program_id(0)
    row = ((pid // TILES).to(tl.int64) * R + tl.arange(0, R))[:, None]
    column = (pid % TILES * B + tl.arange(0, B))[None, :]
    return row, column, (row < rows) & (column < F)


@jit
def _forward_kernel(
    gate_ptr,
    up_ptr,
    act_ptr,
    gate_stride,
    up_stride,
    rows,
    F: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    row, column, mask = _place(rows, F, R, B)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    s, _rest = sigmoid(gate)
    tl.store(act_ptr + row * F + column, gate * s * up, mask=mask)


@jit
def _backward_kernel(
    dact_ptr,
    gate_ptr,
    up_ptr,
    both_ptr,
    act_ptr,
    gate_stride,
    up_stride,
    rows,
    F: tl.constexpr,
    AGAIN: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    row, column, mask = _place(rows, F, R, B)
    dact = tl.load(dact_ptr + row * F + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask=mask, other=0.0).to(tl.float32)
    s, rest = sigmoid(gate)
    silu = gate * s
    tl.store(both_ptr + row * (2 * F) + column, dact * up * s * (1.0 + gate * rest), mask=mask)
    tl.store(both_ptr + row * (2 * F) + F + column, dact * silu, mask=mask)
    if AGAIN:
        tl.store(act_ptr + row * F + column, silu * up, mask=mask)


@torch.library.custom_op("dstrain::swiglu_forward", mutates_args=())
def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """Launch the forward: gate and up [S, F], whose rows may lie apart; act [S, F] contiguous."""
    rows, width = gate.shape
    act = torch.empty((rows, width), dtype=gate.dtype, device=gate.device)
    R, B = tile(width, 2048)
    with on_device(gate.device):
        _forward_kernel[(triton.cdiv(rows, R) * triton.cdiv(width, B),)](
            gate, up, act, gate.stride(0), up.stride(0), rows, width, R, B, num_warps=4
        )
    return act


@swiglu_forward.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("dstrain::swiglu_backward", mutates_args=())
def swiglu_backward(dact: Tensor, gate: Tensor, up: Tensor, again: bool) -> tuple[Tensor, Tensor]:
    """Launch the backward: [S, 2 F], gradient of gate then of up; and with `again` act [S, F], else 0 elements."""
    rows, width = gate.shape
    both = torch.empty((rows, 2 * width), dtype=gate.dtype, device=gate.device)
    act = torch.empty((rows, width) if again else (0,), dtype=gate.dtype, device=gate.device)
    R, B = tile(width, 2048)
    tensors = dact.contiguous(), gate, up, both, act
    with on_device(gate.device):
        _backward_kernel[(triton.cdiv(rows, R) * triton.cdiv(width, B),)](
            *tensors, gate.stride(0), up.stride(0), rows, width, again, R, B, num_warps=4
        )
    return both, act


@swiglu_backward.register_fake
def _(dact: Tensor, gate: Tensor, up: Tensor, again: bool) -> tuple[Tensor, Tensor]:
    rows, width = gate.shape
    return gate.new_empty(rows, 2 * width), gate.new_empty(gate.shape if again else 0)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dact: Tensor) -> tuple[Tensor, Tensor]:
        both, _ = swiglu_backward(dact, *ctx.saved_tensors, False)
        dgate, dup = both.chunk(2, dim=1)
        return dgate, dup


def swiglu(gate: Tensor, up: Tensor, mode: str = "auto") -> Tensor:
    """Return silu(gate) * up [S, F] in their dtype, contiguous, differentiable in both.

    Both are [S, F], of one dtype, fp32 or bf16; rows may lie apart, elements of a row may not. `mode` as in `gelu`.
    Raises ValueError that names the tensor for a wrong shape, dtype, device or stride.
    """
    face = choose(mode, gate.device)
    if gate.ndim != 2 or gate.numel() == 0:
        raise ValueError(f"gate must have shape [rows, width], both at least 1, got {list(gate.shape)}")
    check_tensor("gate", gate, gate.shape, FLOATS, gate.device, gaps=True)
    check_tensor("up", up, gate.shape, (gate.dtype,), gate.device, gaps=True)
    if face == "triton":
        return _SwiGLU.apply(gate, up)
    return (compiled(swiglu_reference) if face == "compile" else swiglu_reference)(gate, up)

"""Adaptive layer norm over packed rows: norm and modulate, gated residual, and both in one pass over memory.

A DiT's block (Peebles and Xie, arXiv:2212.09748) scales and shifts what it has normed, LN(x) (1 + scale) + shift, and
adds what it computes times a gate. Shift, scale and gate come one row a segment (dstrain.kernels.segments), from tables
[M, D]. The bias of the projection in front of a gate is added here, so that its gradient takes no pass of its own.

x and h are S rows of D columns, in M segments of one or two streams. Every face computes in fp32 (in fp64 for fp64) and
rounds once. The kernels keep what they are given, and two numbers a row, for the backward.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dstrain.kernels import modulation_ops as ops
from dstrain.kernels.backend import FLOATS, check_tensor, choose, compiled
from dstrain.kernels.segments import Chunks, Segments


def norm_modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, of_row: Tensor, eps: float) -> Tensor:
    """`norm_modulate` in plain PyTorch, for any float dtype; of_row [S] is the segment of each row."""
    shift, scale = (_accurate(table)[of_row] for table in (shift, scale))  # [S, D]
    return (F.layer_norm(_accurate(x), x.shape[-1:], eps=eps) * (1 + scale) + shift).to(x.dtype)


def gated_residual_reference(
    x: Tensor, h: Tensor, biases: Sequence[Tensor], gate: Tensor, of_row: Tensor, streams: int
) -> Tensor:
    """`gated_residual` in plain PyTorch, for any float dtype."""
    h = _accurate(h)
    if len(biases) == 1:
        h = h + _accurate(biases[0])
    elif biases:
        h = h + _accurate(torch.stack(list(biases)))[of_row // (len(gate) // streams)]
    return (_accurate(x) + _accurate(gate)[of_row] * h).to(x.dtype)


def gated_norm_modulate_reference(
    x: Tensor,
    h: Tensor,
    biases: Sequence[Tensor],
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    of_row: Tensor,
    streams: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """`gated_norm_modulate` in plain PyTorch, for any float dtype."""
    out = gated_residual_reference(x, h, biases, gate, of_row, streams)
    return out, norm_modulate_reference(out, shift, scale, of_row, eps)


def _accurate(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, index: tuple[Tensor, Tensor, Tensor], eps: float
    ) -> Tensor:
        y, mean, rstd = ops.norm_modulate_forward(x, shift, scale, index[0], eps)
        ctx.save_for_backward(x, mean, rstd, shift, scale, *index)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        tables = any(ctx.needs_input_grad[1:3])
        dx, *grads, _y = ops.norm_modulate_backward(dy, *ctx.saved_tensors, dy.new_empty(0), False, tables)
        return dx, *(grads if tables else (None, None)), None, None


class _GatedNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor,
        gate: Tensor,
        shift: Tensor,
        scale: Tensor,
        index: tuple[Tensor, Tensor, Tensor],
        streams: int,
        eps: float,
        *biases: Tensor,
    ) -> tuple[Tensor, Tensor]:
        tables = gate, shift, scale
        out, y, mean, rstd = ops.gated_norm_modulate_forward(x, h, list(biases), *tables, index[0], streams, eps)
        ctx.save_for_backward(out, h, mean, rstd, *tables, *index, *biases)
        ctx.streams = streams
        return out, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dy: Tensor) -> tuple[Tensor | None, ...]:
        out, h, *rest = ctx.saved_tensors
        rest, biases = rest[:8], rest[8:]
        tables = any(ctx.needs_input_grad[2:])
        dx, dh, dbiases, *grads, _y = ops.gated_norm_modulate_backward(
            dout, dy, out, h, biases, *rest, ctx.streams, False, tables
        )
        if not tables:
            return dx, dh, *[None] * (6 + len(biases))
        return dx, dh, *grads, None, None, None, *dbiases


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        h: Tensor,
        gate: Tensor,
        index: tuple[Tensor, Tensor, Tensor],
        streams: int,
        *biases: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(h, gate, *index, *biases)
        ctx.streams = streams
        return ops.gated_residual_forward(x, h, list(biases), gate, index[0], streams)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        h, gate, of_row, bounds, starts, *biases = ctx.saved_tensors
        tables = any(ctx.needs_input_grad[2:])
        index = of_row, bounds, starts
        dh, dbiases, dgate = ops.gated_residual_backward(dout, h, biases, gate, *index, ctx.streams, tables)
        if not tables:
            return dout, dh, *[None] * (3 + len(biases))
        return dout, dh, dgate, None, None, *dbiases


def norm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, segments: Segments, eps: float = 1e-6, mode: str = "auto"
) -> Tensor:
    """Return LN(x) (1 + scale) + shift, [S, D] like x: a LayerNorm without weights, modulated by its segment's row.

    x is [S, D], fp32 or bf16; shift and scale are [M, D] of the same dtype, their rows may lie apart. All of them are
    differentiable. `mode` is "auto" (Triton on CUDA, reference elsewhere), "reference", "triton" or "compile". Raises
    ValueError that names the tensor for a wrong shape, dtype, device or stride.
    """
    face = choose(mode, x.device)
    check_rows(segments, {"x": x}, {"shift": shift, "scale": scale}, ())
    if face == "triton":
        return _NormModulate.apply(x, shift, scale, chunk_index(segments, ops.norm_chunks), eps)
    function = compiled(norm_modulate_reference) if face == "compile" else norm_modulate_reference
    return function(x, shift, scale, segments.of_row, eps)


def gated_norm_modulate(
    x: Tensor,
    h: Tensor,
    biases: Sequence[Tensor],
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    segments: Segments,
    eps: float = 1e-6,
    mode: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return out = x + gate (h + bias) and y = LN(out) (1 + scale) + shift, both [S, D] like x.

    h is like x, gate like the other tables. `biases` is one [D] for each of one or two streams, or empty. What is
    normed is `out` as it is returned, rounded to x's dtype. The rest as in `norm_modulate`.
    """
    face = choose(mode, x.device)
    check_rows(segments, {"x": x, "h": h}, {"gate": gate, "shift": shift, "scale": scale}, biases)
    if face == "triton":
        index = chunk_index(segments, ops.norm_chunks)
        return _GatedNormModulate.apply(x, h, gate, shift, scale, index, segments.streams, eps, *biases)
    function = compiled(gated_norm_modulate_reference) if face == "compile" else gated_norm_modulate_reference
    return function(x, h, biases, gate, shift, scale, segments.of_row, segments.streams, eps)


def gated_residual(
    x: Tensor, h: Tensor, biases: Sequence[Tensor], gate: Tensor, segments: Segments, mode: str = "auto"
) -> Tensor:
    """Return x + gate (h + bias), [S, D] like x; inputs as in `gated_norm_modulate`."""
    face = choose(mode, x.device)
    check_rows(segments, {"x": x, "h": h}, {"gate": gate}, biases)
    if face == "triton":
        index = chunk_index(segments, ops.residual_chunks)
        return _GatedResidual.apply(x, h, gate, index, segments.streams, *biases)
    function = compiled(gated_residual_reference) if face == "compile" else gated_residual_reference
    return function(x, h, biases, gate, segments.of_row, segments.streams)


def chunk_index(segments: Segments, cut: Callable[[Segments], Chunks]) -> tuple[Tensor, Tensor, Tensor]:
    """What a backward needs of the segments: the segment of each row, and bounds and starts of the chunks."""
    chunks = cut(segments)
    return segments.of_row, chunks.bounds, chunks.starts


def check_rows(
    segments: Segments, rows: dict[str, Tensor], tables: dict[str, Tensor], biases: Sequence[Tensor]
) -> None:
    """Raise ValueError, naming the tensor, unless all fit x, which is among `rows`, and its segments."""
    x = rows["x"]
    if x.ndim != 2 or x.numel() == 0:
        raise ValueError(f"x must have shape [rows, columns], both at least 1, got {list(x.shape)}")
    if segments.rows != len(x):
        raise ValueError(f"x must have the {segments.rows} rows of its segments, got {len(x)}")
    if segments.of_row.device != x.device:
        raise ValueError(f"segments must be on {x.device}, like x, got {segments.of_row.device}")
    check_tensor("x", x, x.shape, FLOATS, x.device)
    for name, tensor in rows.items():
        check_tensor(name, tensor, x.shape, (x.dtype,), x.device)
    for name, tensor in tables.items():
        check_tensor(name, tensor, (len(segments), x.shape[1]), (x.dtype,), x.device, gaps=True)
    if biases and (len(biases) != segments.streams or segments.streams > 2):
        raise ValueError(
            f"biases must be none or one for each of at most two streams, got {len(biases)} for {segments.streams}"
        )
    for stream, bias in enumerate(biases):
        check_tensor(f"biases[{stream}]", bias, x.shape[1:], (x.dtype,), x.device)

"""The three pieces of a two-stream block around its attention, each with its matmuls, keeping little for the backward.

A block on rows x [S, D], text rows in front of image rows, with tables of shifts, scales and gates [M, D]:

    q, k, v, x = modulated_qkv(x)          norm, modulate | Q K V | QK norms, rotary, joint order
    a = attention(q, k, v)
    x, h = gated_mlp_in(x, a)              | out projection | gate, residual, norm, modulate | first matmul of the MLP
    x = gated_mlp_out(x, h)                GELU | second matmul | gate, residual

Between the matmuls one kernel passes over memory. Kept for the backward, in units of a row of D: x, its modulated
norm, q, k, v, a, the out projection, x again, the MLP's hidden row before its GELU (4) and its result: 13. The second
norm and the GELU are made again in passes that read their inputs anyway. Biases are added, and their gradients summed,
in the same passes, but for V's, which its matmul adds. The gradients of what Q, K and V share are added up by the
matmuls that make them.

The weights are used directly: under ZeRO-3 the block must be gathered as one (a leaf module).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dstrain.kernels.backend import check_tensor
from dstrain.kernels.gelu import FORMS, gelu_backward, gelu_forward
from dstrain.kernels.modulation import check_rows, chunk_index
from dstrain.kernels.modulation_ops import (
    gated_norm_modulate_backward,
    gated_norm_modulate_forward,
    gated_residual_backward,
    gated_residual_forward,
    norm_chunks,
    norm_modulate_backward,
    norm_modulate_forward,
    residual_chunks,
)
from dstrain.kernels.qk_norm_rope import qk_norm_rope_backward, qk_norm_rope_forward
from dstrain.kernels.segments import Segments

Streams = Sequence[Tensor]  # one tensor a stream: of weights, biases
Index = tuple[Tensor, Tensor, Tensor]  # of segments: modulation.chunk_index


@dataclass(frozen=True)
class Rotary:
    """Cosines and sines [S, d / 2] fp32 in joint order, and the joint place of each row, or None if that is its own."""

    cos: Tensor
    sin: Tensor
    places: Tensor | None = None  # [S] int64
    rows: Tensor | None = None  # [S] int64, the inverse: the row at each place


def permute_rows(x: Tensor, to: Tensor, back: Tensor) -> Tensor:
    """Return x[to], a permutation of rows whose inverse is `back`; its gradient is gathered too, not added up."""
    return _Permute.apply(x, to, back)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, to: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, to)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


def _matmul(x: Tensor, weights: Streams, rows: Sequence[int], biases: Streams = ()) -> Tensor:
    """Each stream's rows times its weight transposed, in one tensor: [S, in] and [out, in] -> [S, out]."""
    out = x.new_empty(len(x), len(weights[0]))
    for i, (part, into) in enumerate(zip(x.split(list(rows)), out.split(list(rows)))):
        if biases:
            torch.addmm(biases[i], part, weights[i].t(), out=into)
        else:
            torch.mm(part, weights[i].t(), out=into)
    return out


def _grad_x(grads: Sequence[Tensor], weights: Sequence[Streams], rows: Sequence[int]) -> Tensor:
    """The gradient of what several matmuls share: each matmul adds to the result of the one before."""
    out = grads[0].new_empty(len(grads[0]), weights[0][0].shape[1])
    for which, (grad, ws) in enumerate(zip(grads, weights)):
        for part, into, weight in zip(grad.split(list(rows)), out.split(list(rows)), ws):
            if which:
                into.addmm_(part, weight)
            else:
                torch.mm(part, weight, out=into)
    return out


def _grad_weights(grad: Tensor, x: Tensor, rows: Sequence[int], wanted: Sequence[bool]) -> list[Tensor | None]:
    if not any(wanted):
        return [None] * len(wanted)
    parts = zip(grad.split(list(rows)), x.split(list(rows)), wanted)
    return [torch.mm(g.t(), y) if want else None for g, y, want in parts]


def modulated_qkv(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    weights: Sequence[Streams],
    biases: Sequence[Streams],
    norms: Sequence[Streams],
    rotary: Rotary,
    segments: Segments,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v [S, H, d] in joint order, and x for the residual.

    x [S, D]; shift, scale [M, D]; weights and biases of q, k and v, and norms of q and k, one a stream. The x that is
    returned is the one given: what comes back for it joins the gradient in the kernel that writes it anyway.
    """
    check_rows(segments, {"x": x}, {"shift": shift, "scale": scale}, ())
    _check_streams(segments, "weights", weights, x, (x.shape[1], x.shape[1]))
    _check_streams(segments, "biases", biases, x, (x.shape[1],))
    d = norms[0][0].numel()
    _check_streams(segments, "norms", norms, x, (d,))
    if d < 2 or d % 2 or x.shape[1] % d:
        raise ValueError(f"norms must have an even width that divides {x.shape[1]}, got {d}")
    for name, table in (("rotary.cos", rotary.cos), ("rotary.sin", rotary.sin)):
        check_tensor(name, table, (len(x), d // 2), (torch.float32,), x.device)
    for name, index in (("rotary.places", rotary.places), ("rotary.rows", rotary.rows)):
        if index is not None:
            check_tensor(name, index, (len(x),), (torch.int64,), x.device)
    flat = [t for group in (*weights, *biases, *norms) for t in group]
    return _ModulatedQkv.apply(segments, chunk_index(segments, norm_chunks), rotary, eps, x, shift, scale, *flat)


class _ModulatedQkv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        segments: Segments,
        index: Index,
        rotary: Rotary,
        eps: float,
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        *flat: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, rows = segments.streams, segments.stream_rows
        wq, wk, wv, bq, bk, bv, nq, nk = _groups(flat, n)
        y, mean, rstd = norm_modulate_forward(x, shift, scale, segments.of_row, eps)
        d = len(nq[0])
        q, k = (_matmul(y, w, rows).unflatten(1, (-1, d)) for w in (wq, wk))
        places = _or_empty(rotary.places, x)
        q, k, q_rstd, k_rstd = qk_norm_rope_forward(q, k, bq, bk, nq, nk, rotary.cos, rotary.sin, places, rows[0], eps)
        v = _matmul(y, wv, rows, bv)
        if rotary.rows is not None:
            v = v.index_select(0, rotary.rows)
        v = v.unflatten(1, (-1, d))
        ctx.segments, ctx.index, ctx.rotary = segments, index, rotary
        ctx.save_for_backward(x, y, mean, rstd, shift, scale, q, k, q_rstd, k_rstd, *flat)
        return q, k, v, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, residual: Tensor) -> tuple[Tensor | None, ...]:
        x, y, mean, rstd, shift, scale, q, k, q_rstd, k_rstd, *flat = ctx.saved_tensors
        segments, rotary = ctx.segments, ctx.rotary
        n, rows = segments.streams, segments.stream_rows
        wq, wk, wv, bq, _, _, nq, nk = _groups(flat, n)
        wanted = _groups(ctx.needs_input_grad[7:], n)
        bias_dtype = bq[0].dtype if any(wanted[3] + wanted[4]) else None
        dq, dk, *sums = qk_norm_rope_backward(
            dq, dk, q, k, q_rstd, k_rstd, nq, nk, rotary.cos, rotary.sin,
            _or_empty(rotary.places, x), rows[0], bias_dtype, any(wanted[6] + wanted[7]),
        )  # fmt: skip
        dq, dk, dv = dq.flatten(1), dk.flatten(1), dv.flatten(1)
        if rotary.places is not None:
            dv = dv.index_select(0, rotary.places)
        dy = _grad_x((dq, dk, dv), (wq, wk, wv), rows)
        tables = any(ctx.needs_input_grad[5:7])
        dx, dshift, dscale, _ = norm_modulate_backward(
            dy, x, mean, rstd, shift, scale, *ctx.index, residual, False, tables
        )
        dbv = [part.sum(0) if want else None for part, want in zip(dv.split(list(rows)), wanted[5])]
        grads = [_grad_weights(g, y, rows, want) for g, want in zip((dq, dk, dv), wanted)]
        grads += [*map(_each, sums[:2], wanted[3:5]), dbv, *map(_each, sums[2:], wanted[6:])]
        return (
            None,
            None,
            None,
            None,
            dx,
            *_each((dshift, dscale), [tables] * 2),
            *(g for group in grads for g in group),
        )


def gated_mlp_in(
    x: Tensor,
    heads: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    out_weights: Streams,
    out_biases: Streams,
    in_weights: Streams,
    segments: Segments,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return x + gate * out(heads) [S, D], and the first matmul of the MLP on its modulated norm, without bias [S, F].

    x [S, D]; heads [S, D] in the order of x; gate, shift, scale [M, D]; weights and biases one a stream.
    """
    check_rows(segments, {"x": x, "heads": heads}, {"gate": gate, "shift": shift, "scale": scale}, out_biases)
    _check_streams(segments, "out_weights", [out_weights], x, (x.shape[1], x.shape[1]))
    _check_streams(segments, "out_biases", [out_biases], x, (x.shape[1],))
    _check_streams(segments, "in_weights", [in_weights], x, (len(in_weights[0]), x.shape[1]))
    index = chunk_index(segments, norm_chunks)
    return _GatedMlpIn.apply(segments, index, eps, x, heads, gate, shift, scale, *out_weights, *out_biases, *in_weights)


class _GatedMlpIn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        segments: Segments,
        index: Index,
        eps: float,
        x: Tensor,
        heads: Tensor,
        gate: Tensor,
        shift: Tensor,
        scale: Tensor,
        *flat: Tensor,
    ) -> tuple[Tensor, Tensor]:
        n, rows = segments.streams, segments.stream_rows
        out_w, out_b, in_w = _groups(flat, n)
        h = _matmul(heads, out_w, rows)
        x, y, mean, rstd = gated_norm_modulate_forward(x, h, out_b, gate, shift, scale, segments.of_row, n, eps)
        ctx.segments, ctx.index = segments, index
        ctx.save_for_backward(heads, h, x, mean, rstd, gate, shift, scale, *flat)
        return x, _matmul(y, in_w, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, dhidden: Tensor) -> tuple[Tensor | None, ...]:
        heads, h, x, mean, rstd, gate, shift, scale, *flat = ctx.saved_tensors
        segments = ctx.segments
        n, rows = segments.streams, segments.stream_rows
        out_w, out_b, in_w = _groups(flat, n)
        dy = _grad_x((dhidden,), (in_w,), rows)
        want_out, want_bias, want_in = _groups(ctx.needs_input_grad[8:], n)
        tables = any((*ctx.needs_input_grad[5:8], *want_bias))
        dx, dh, dbiases, *dtables, y = gated_norm_modulate_backward(
            dx, dy, x, h, out_b, mean, rstd, gate, shift, scale, *ctx.index, n, any(want_in), tables
        )
        din_w = _grad_weights(dhidden, y, rows, want_in)
        dheads = _grad_x((dh,), (out_w,), rows)
        dout_w = _grad_weights(dh, heads, rows, want_out)
        return None, None, None, dx, dheads, *_each(dtables, [tables] * 3), *dout_w, *_each(dbiases, want_bias), *din_w


def gated_mlp_out(
    x: Tensor,
    hidden: Tensor,
    gate: Tensor,
    hidden_biases: Streams,
    out_weights: Streams,
    out_biases: Streams,
    segments: Segments,
    form: str,
) -> Tensor:
    """Return x + gate * out(GELU(hidden + bias)) [S, D].

    x [S, D]; hidden [S, F]; gate [M, D]; weights and biases one a stream; form of the GELU: "tanh" or "sigmoid".
    """
    if form not in FORMS:
        raise ValueError(f"form must be {' or '.join(FORMS)}, got {form!r}")
    check_rows(segments, {"x": x}, {"gate": gate}, out_biases)
    check_tensor("hidden", hidden, (len(x), len(hidden_biases[0])), (x.dtype,), x.device)
    _check_streams(segments, "hidden_biases", [hidden_biases], x, (hidden.shape[1],))
    _check_streams(segments, "out_weights", [out_weights], x, (x.shape[1], hidden.shape[1]))
    _check_streams(segments, "out_biases", [out_biases], x, (x.shape[1],))
    index = chunk_index(segments, residual_chunks)
    return _GatedMlpOut.apply(segments, index, form, x, hidden, gate, *hidden_biases, *out_weights, *out_biases)


class _GatedMlpOut(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, segments: Segments, index: Index, form: str, x: Tensor, hidden: Tensor, gate: Tensor, *flat: Tensor
    ) -> Tensor:
        n, rows = segments.streams, segments.stream_rows
        hidden_b, out_w, out_b = _groups(flat, n)
        h = _matmul(gelu_forward(hidden, hidden_b, rows[0], form), out_w, rows)
        ctx.segments, ctx.index, ctx.form = segments, index, form
        ctx.save_for_backward(hidden, h, gate, *flat)
        return gated_residual_forward(x, h, out_b, gate, segments.of_row, n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        hidden, h, gate, *flat = ctx.saved_tensors
        segments = ctx.segments
        n, rows = segments.streams, segments.stream_rows
        hidden_b, out_w, out_b = _groups(flat, n)
        want_hidden, want_out, want_bias = _groups(ctx.needs_input_grad[6:], n)
        tables = any((ctx.needs_input_grad[5], *want_bias))
        dh, dbiases, dgate = gated_residual_backward(dx, h, out_b, gate, *ctx.index, n, tables)
        dact = _grad_x((dh,), (out_w,), rows)
        dhidden, dhidden_b, act = gelu_backward(
            dact, hidden, hidden_b, rows[0], ctx.form, any(want_out), any(want_hidden)
        )
        dout_w = _grad_weights(dh, act, rows, want_out)
        return (
            None, None, None, dx, dhidden, *_each((dgate,), [tables]),
            *_each(dhidden_b, want_hidden), *dout_w, *_each(dbiases, want_bias),
        )  # fmt: skip


def _check_streams(
    segments: Segments, name: str, groups: Sequence[Streams], like: Tensor, shape: Sequence[int]
) -> None:
    for group in groups:
        if len(group) != segments.streams:
            raise ValueError(f"{name} must be {segments.streams}, one for each stream, got {len(group)}")
        for tensor in group:
            check_tensor(name, tensor, shape, (like.dtype,), like.device)


def _groups(flat: Sequence[Any], n: int) -> list[list[Any]]:
    return [list(flat[i : i + n]) for i in range(0, len(flat), n)]


def _each(grads: Sequence[Tensor] | Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    """A gradient for each that is wanted: kernels give none of a kind, or all."""
    return [grads[i] if want else None for i, want in enumerate(wanted)]


def _or_empty(index: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.int64) if index is None else index

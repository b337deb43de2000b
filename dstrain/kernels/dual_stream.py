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
matmuls that make them. Layers with low-rank adapters keep r numbers a row besides.

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
from dstrain.kernels.linear import (
    Streams,
    any_wanted,
    biases_of,
    check_linears,
    flat,
    grad_input,
    grad_parameters,
    grouped,
    product,
)
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


def modulated_qkv(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    layers: Sequence[Streams],
    norms: Sequence[Sequence[Tensor]],
    rotary: Rotary,
    segments: Segments,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return q, k, v [S, H, d] in joint order, and x for the residual.

    x [S, D]; shift, scale [M, D]; the layers of q, k and v, and the norms' weights [d] of q and k, one a stream. The x
    that is returned is the one given: what comes back for it joins the gradient in the kernel that writes it anyway.
    """
    n = segments.streams
    check_rows(segments, {"x": x}, {"shift": shift, "scale": scale}, ())
    for group in layers:
        check_linears("layers", group, n, x, (x.shape[1], x.shape[1]))
    d = norms[0][0].numel()
    for pair in norms:
        if len(pair) != n:
            raise ValueError(f"norms must be {n}, one for each stream, got {len(pair)}")
        for weight in pair:
            check_tensor("norms", weight, (d,), (x.dtype,), x.device)
    if d < 2 or d % 2 or x.shape[1] % d:
        raise ValueError(f"norms must have an even width that divides {x.shape[1]}, got {d}")
    for name, table in (("rotary.cos", rotary.cos), ("rotary.sin", rotary.sin)):
        check_tensor(name, table, (len(x), d // 2), (torch.float32,), x.device)
    for name, order in (("rotary.places", rotary.places), ("rotary.rows", rotary.rows)):
        if order is not None:
            check_tensor(name, order, (len(x),), (torch.int64,), x.device)
    tensors, scales = flat(layers)
    index, norms_flat = chunk_index(segments, norm_chunks), [w for pair in norms for w in pair]
    return _ModulatedQkv.apply(segments, index, rotary, eps, scales, x, shift, scale, *norms_flat, *tensors)


class _ModulatedQkv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        segments: Segments,
        index: Index,
        rotary: Rotary,
        eps: float,
        scales: tuple[float, ...],
        x: Tensor,
        shift: Tensor,
        scale: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        n, rows = segments.streams, segments.stream_rows
        nq, nk, layers = list(tensors[:n]), list(tensors[n : 2 * n]), grouped(tensors[2 * n :], scales, n)
        y, mean, rstd = norm_modulate_forward(x, shift, scale, segments.of_row, eps)
        (q, q_lows), (k, k_lows), (v, v_lows) = (
            product(y, group, rows, bias=bias) for group, bias in zip(layers, (False, False, True))
        )
        q, k, v = (t.unflatten(1, (-1, len(nq[0]))) for t in (q, k, v))
        bq, bk = map(biases_of, layers[:2])
        places = _or_empty(rotary.places, x)
        q, k, q_rstd, k_rstd = qk_norm_rope_forward(q, k, bq, bk, nq, nk, rotary.cos, rotary.sin, places, rows[0], eps)
        if rotary.rows is not None:
            v = v.index_select(0, rotary.rows)
        ctx.segments, ctx.index, ctx.rotary, ctx.scales = segments, index, rotary, scales
        lows = *q_lows, *k_lows, *v_lows
        ctx.save_for_backward(x, y, mean, rstd, shift, scale, q, k, q_rstd, k_rstd, *lows, *tensors)
        return q, k, v, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, residual: Tensor) -> tuple[Tensor | None, ...]:
        segments, rotary = ctx.segments, ctx.rotary
        n, rows = segments.streams, segments.stream_rows
        x, y, mean, rstd, shift, scale, q, k, q_rstd, k_rstd, *rest = ctx.saved_tensors
        lows, nq, nk, tensors = rest[: 3 * n], rest[3 * n : 4 * n], rest[4 * n : 5 * n], rest[5 * n :]
        layers, needed = grouped(tensors, ctx.scales, n), ctx.needs_input_grad[5:]
        bq = biases_of(layers[0])
        want_norms, wanted = needed[3 : 3 + 2 * n], grouped(needed[3 + 2 * n :], ctx.scales, n)
        _, want_bias = any_wanted([w for group in wanted[:2] for w in group])
        dq, dk, dbq, dbk, *dnorms = qk_norm_rope_backward(
            dq, dk, q, k, q_rstd, k_rstd, nq, nk, rotary.cos, rotary.sin,
            _or_empty(rotary.places, x), rows[0], bq[0].dtype if want_bias else None, any(want_norms),
        )  # fmt: skip
        grads = dq.flatten(1), dk.flatten(1), dv.flatten(1)
        if rotary.places is not None:
            grads = *grads[:2], grads[2].index_select(0, rotary.places)
        dbv = [part.sum(0) if w.bias else x for part, w in zip(grads[2].split(list(rows)), wanted[2])]
        dy, low_grads = grad_input(grads, layers, rows)
        tables = any(needed[1:3])
        dx, dshift, dscale, _ = norm_modulate_backward(
            dy, x, mean, rstd, shift, scale, *ctx.index, residual, False, tables
        )
        dparameters: list[Tensor | None] = []
        for i, biases in enumerate((dbq, dbk, dbv)):
            kept = lows[i * n : (i + 1) * n]
            dparameters += grad_parameters(grads[i], y, layers[i], rows, kept, low_grads[i], biases, wanted[i])
        dnorms = [norm[i] if want_norms[0] else None for norm in dnorms for i in range(n)]
        return *[None] * 5, dx, *_each((dshift, dscale), [tables] * 2), *dnorms, *dparameters


def gated_mlp_in(
    x: Tensor,
    heads: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    out: Streams,
    mlp_in: Streams,
    segments: Segments,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Return x + gate * out(heads) [S, D], and the first matmul of the MLP on its modulated norm, without bias [S, F].

    x [S, D]; heads [S, D] in the order of x; gate, shift, scale [M, D]; layers one a stream.
    """
    check_rows(segments, {"x": x, "heads": heads}, {"gate": gate, "shift": shift, "scale": scale}, ())
    check_linears("out", out, segments.streams, x, (x.shape[1], x.shape[1]))
    check_linears("mlp_in", mlp_in, segments.streams, x, (len(mlp_in[0].weight), x.shape[1]))
    tensors, scales = flat((out, [layer._replace(bias=None) for layer in mlp_in]))
    index = chunk_index(segments, norm_chunks)
    return _GatedMlpIn.apply(segments, index, eps, scales, x, heads, gate, shift, scale, *tensors)


class _GatedMlpIn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        segments: Segments,
        index: Index,
        eps: float,
        scales: tuple[float, ...],
        x: Tensor,
        heads: Tensor,
        gate: Tensor,
        shift: Tensor,
        scale: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        n, rows = segments.streams, segments.stream_rows
        out, mlp_in = grouped(tensors, scales, n)
        h, out_lows = product(heads, out, rows)
        biases = biases_of(out)
        x, y, mean, rstd = gated_norm_modulate_forward(x, h, biases, gate, shift, scale, segments.of_row, n, eps)
        hidden, in_lows = product(y, mlp_in, rows)
        ctx.segments, ctx.index, ctx.scales = segments, index, scales
        ctx.save_for_backward(heads, h, x, mean, rstd, gate, shift, scale, *out_lows, *in_lows, *tensors)
        return x, hidden

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor, dhidden: Tensor) -> tuple[Tensor | None, ...]:
        segments = ctx.segments
        n, rows = segments.streams, segments.stream_rows
        heads, h, x, mean, rstd, gate, shift, scale, *rest = ctx.saved_tensors
        out_lows, in_lows, tensors = rest[:n], rest[n : 2 * n], rest[2 * n :]
        out, mlp_in = grouped(tensors, ctx.scales, n)
        needed = ctx.needs_input_grad[4:]
        want_out, want_in = grouped(needed[5:], ctx.scales, n)
        (_, want_bias), (again, _) = any_wanted(want_out), any_wanted(want_in)
        tables = any(needed[2:5]) or want_bias
        dy, in_low_grads = grad_input((dhidden,), (mlp_in,), rows)
        biases = biases_of(out)
        dx, dh, dbiases, *dtables, y = gated_norm_modulate_backward(
            dx, dy, x, h, biases, mean, rstd, gate, shift, scale, *ctx.index, n, again, tables
        )
        dheads, out_low_grads = grad_input((dh,), (out,), rows)
        dout = grad_parameters(dh, heads, out, rows, out_lows, out_low_grads[0], dbiases, want_out)
        din = grad_parameters(dhidden, y, mlp_in, rows, in_lows, in_low_grads[0], (), want_in)
        return *[None] * 4, dx, dheads, *_each(dtables, [tables] * 3), *dout, *din


def gated_mlp_out(
    x: Tensor,
    hidden: Tensor,
    gate: Tensor,
    hidden_biases: Sequence[Tensor],
    mlp_out: Streams,
    segments: Segments,
    form: str,
) -> Tensor:
    """Return x + gate * mlp_out(GELU(hidden + bias)) [S, D].

    x [S, D]; hidden [S, F]; gate [M, D]; biases and layers one a stream; form of the GELU: "tanh" or "sigmoid".
    """
    if form not in FORMS:
        raise ValueError(f"form must be {' or '.join(FORMS)}, got {form!r}")
    check_rows(segments, {"x": x}, {"gate": gate}, ())
    check_tensor("hidden", hidden, (len(x), len(hidden_biases[0])), (x.dtype,), x.device)
    if len(hidden_biases) != segments.streams:
        raise ValueError(f"hidden_biases must be {segments.streams}, one for each stream, got {len(hidden_biases)}")
    for bias in hidden_biases:
        check_tensor("hidden_biases", bias, (hidden.shape[1],), (x.dtype,), x.device)
    check_linears("mlp_out", mlp_out, segments.streams, x, (x.shape[1], hidden.shape[1]))
    index = chunk_index(segments, residual_chunks)
    tensors, scales = flat((mlp_out,))
    return _GatedMlpOut.apply(segments, index, form, scales, x, hidden, gate, *hidden_biases, *tensors)


class _GatedMlpOut(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        segments: Segments,
        index: Index,
        form: str,
        scales: tuple[float, ...],
        x: Tensor,
        hidden: Tensor,
        gate: Tensor,
        *tensors: Tensor,
    ) -> Tensor:
        n, rows = segments.streams, segments.stream_rows
        (layers,) = grouped(tensors[n:], scales, n)
        h, lows = product(gelu_forward(hidden, list(tensors[:n]), rows[0], form), layers, rows)
        ctx.segments, ctx.index, ctx.form, ctx.scales = segments, index, form, scales
        ctx.save_for_backward(hidden, h, gate, *lows, *tensors)
        return gated_residual_forward(x, h, biases_of(layers), gate, segments.of_row, n)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor | None, ...]:
        segments = ctx.segments
        n, rows = segments.streams, segments.stream_rows
        hidden, h, gate, *rest = ctx.saved_tensors
        lows, hidden_biases, tensors = rest[:n], rest[n : 2 * n], rest[2 * n :]
        (layers,) = grouped(tensors, ctx.scales, n)
        needed = ctx.needs_input_grad[4:]
        want_hidden, (wanted,) = needed[3 : 3 + n], grouped(needed[3 + n :], ctx.scales, n)
        again, want_bias = any_wanted(wanted)
        tables = needed[2] or want_bias
        biases = biases_of(layers)
        dh, dbiases, dgate = gated_residual_backward(dx, h, biases, gate, *ctx.index, n, tables)
        dact, low_grads = grad_input((dh,), (layers,), rows)
        dhidden, dhidden_b, act = gelu_backward(dact, hidden, hidden_biases, rows[0], ctx.form, again, any(want_hidden))
        dparameters = grad_parameters(dh, act, layers, rows, lows, low_grads[0], dbiases, wanted)
        return *[None] * 4, dx, dhidden, *_each((dgate,), [tables]), *_each(dhidden_b, want_hidden), *dparameters


def _each(grads: Sequence[Tensor] | Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    """A gradient for each that is wanted: kernels give none of a kind, or all."""
    return [grads[i] if want else None for i, want in enumerate(wanted)]


def _or_empty(index: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0, dtype=torch.int64) if index is None else index

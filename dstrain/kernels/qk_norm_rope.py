"""RMSNorm of queries and keys, their rotary embedding, and the order that attention reads, in one launch.

RMSNorm: Zhang and Sennrich, arXiv:1910.07467; rotary embedding of neighbouring channels: Su et al., arXiv:2104.09864.
For every row and head of q and of k, d channels each:
    x = input + bias of its stream      (a Linear's bias: added here, its gradient costs no pass of its own)
    xhat = x / sqrt(mean(x^2) + eps)
    y = xhat * weight of its stream
    output at row places[r] = y with each pair of neighbouring channels turned by the angles of that row

What the backward reads are the outputs, which attention keeps anyway, and 1 / sqrt(..) per row and head: turned back
and divided by the weight, an output is xhat again. Two things follow:
  * A weight nearer to zero than 2^-20 counts as 2^-20 with its sign (0 as +2^-20), here and in the reference: it moves
    an output by less than 1e-6 of xhat, and where a pair's weights are both zero they still have gradients.
  * xhat carries the rounding of the outputs, u = 2^-9 in bf16 and 2^-24 in fp32, of the larger of a pair's channels.
    Where one channel's weight is r times the other's, r < 1, its xhat is off by u / r: noise of mean zero, that the
    weight's gradient averages over all rows and heads. It divides by the weight as Wiener's filter does,
    w / (w^2 + u^2 (w^2 + w'^2)) for a partner w', so that below r = u the value fades to zero where it would be noise.
    The gradient of the input uses xhat only for its share along it, times mean(dy y). Measured in bf16, d = 128: this
    adds 3e-4 of the gradient where weights of a pair differ by up to 4 times, 1.7e-3 (what rounding it to bf16 does
    anyway) at up to 60 times, 1.5e-2 at up to 500 times. The gradient of the smaller weight itself is off by 8 % at 60
    times and lost at 500.
Cosine and sine must belong to one angle, cos^2 + sin^2 = 1, or turning back would not be the inverse.

Letters: S rows, H heads, d channels of a head; one or two streams whose rows lie end to end, each with its parameters.
"""

# mypy: allow-untyped-defs

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dstrain.kernels.backend import FLOATS, check_tensor, choose, compiled, on_device, triton
from dstrain.kernels.qk_norm_rope_kernels import SMALLEST, backward_kernel, forward_kernel, sum_kernel

TILE = 1024  # channels that a program works on at once: 16 bytes of bf16 for each of 128 threads
PROGRAMS = 2048  # that a launch should have, to fill a GPU of 132 processors twice over
SUM_TILE = (64, 32)  # partial sums, and columns, that a program of the second launch reads at once


def qk_norm_rope_reference(
    q: Tensor,
    k: Tensor,
    q_biases: Sequence[Tensor],
    k_biases: Sequence[Tensor],
    q_weights: Sequence[Tensor],
    k_weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    places: Tensor | None,
    stream_rows: Sequence[int],
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`qk_norm_rope` in plain PyTorch, for any float dtype."""
    table = cos[:, None], sin[:, None]  # [S, 1, d / 2]
    rows = list(stream_rows)
    return (
        _norm_rope(q, q_biases, q_weights, table, places, rows, eps),
        _norm_rope(k, k_biases, k_weights, table, places, rows, eps),
    )


def _norm_rope(
    x: Tensor,
    biases: Sequence[Tensor],
    weights: Sequence[Tensor],
    table: tuple[Tensor, Tensor],
    places: Tensor | None,
    stream_rows: list[int],
    eps: float,
) -> Tensor:
    dtype, x = x.dtype, x.to(torch.promote_types(x.dtype, torch.float32))
    streams = []
    for i, part in enumerate(x.split(stream_rows)):
        if biases:
            part = part + biases[i].view(x.shape[1:])
        xhat = part * torch.rsqrt(part.square().mean(dim=-1, keepdim=True) + eps)
        streams.append(xhat * _floored(weights[i].to(x.dtype)))
    y = torch.cat(streams)  # [S, H, d]
    if places is not None:
        y = torch.zeros_like(y).index_copy(0, places, y)
    cos, sin = table
    even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(dtype)


def _floored(weight: Tensor) -> Tensor:
    floor = torch.where(weight < 0, -SMALLEST, SMALLEST).to(weight.dtype)
    floored = torch.where(weight.abs() < SMALLEST, floor, weight)
    # What the floor adds is a constant to the gradient, which passes.
    return weight + (floored - weight).detach()


def _heads_at_once(heads: int, width: int) -> int:
    """Heads of a tile: at most what fills it, and few that do not exist."""
    most = max(1, min(TILE // width, triton.next_power_of_2(heads)))
    exact = heads & -heads  # the largest power of two that divides them
    return min(most, exact) if 4 * exact >= most else most


def _chunk_rows(rows: int, programs: int, least: int, most: int) -> int:
    """Rows of a chunk: enough to be worth reading the parameters for, where there are enough chunks for all."""
    return min(most, max(least, rows * programs // PROGRAMS))


def backward_chunk_rows(rows: int, groups: int) -> int:
    """Rows of a chunk of the backward, which writes sums for each, with so many groups of heads."""
    return _chunk_rows(rows, 2 * groups, least=32, most=128)


def _sizes(q: Tensor, places: Tensor) -> dict[str, Any]:
    heads, d = q.shape[1:]
    width = max(2, triton.next_power_of_2(d))
    return {"H": heads, "D": d, "HB": _heads_at_once(heads, width), "DP": width, "PLACES": places.numel() > 0}


def _ends(tensors: Sequence[Tensor], none: Tensor) -> tuple[Tensor, Tensor]:
    return (tensors[0], tensors[-1]) if tensors else (none, none)


@torch.library.custom_op("dstrain::qk_norm_rope_forward", mutates_args=())
def qk_norm_rope_forward(
    q: Tensor,
    k: Tensor,
    q_biases: Sequence[Tensor],
    k_biases: Sequence[Tensor],
    q_weights: Sequence[Tensor],
    k_weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    places: Tensor,
    first_rows: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward. `places` has 0 elements where rows stay in order; `first_rows` are the first stream's.

    Returns q', k' [S, H, d] in the order of the places, and 1 / rms of q and k, fp32 [S, H], in the order of the rows.
    """
    rows = len(q)
    out = torch.empty_like(q), torch.empty_like(k)
    rstd = [torch.empty(q.shape[:2], dtype=torch.float32, device=q.device) for _ in range(2)]
    sizes = _sizes(q, places)
    groups = triton.cdiv(sizes["H"], sizes["HB"])
    size = _chunk_rows(rows, groups, least=4, most=32)
    chunks = triton.cdiv(first_rows, size) + triton.cdiv(rows - first_rows, size)
    biases = *_ends(q_biases, q), *_ends(k_biases, k)
    weights = *_ends(q_weights, q), *_ends(k_weights, k)
    tensors = q, k, *biases, *weights, cos, sin, places, *out, *rstd
    with on_device(q.device):
        forward_kernel[(chunks * groups,)](
            *tensors, rows, first_rows, size, eps, BIAS=len(q_biases) > 0, **sizes, num_warps=4
        )
    return *out, rstd[0], rstd[1]


@qk_norm_rope_forward.register_fake
def _(q, k, q_biases, k_biases, q_weights, k_weights, cos, sin, places, first_rows, eps):
    rstd = [q.new_empty(q.shape[:2], dtype=torch.float32) for _ in range(2)]
    return torch.empty_like(q), torch.empty_like(k), *rstd


@torch.library.custom_op("dstrain::qk_norm_rope_backward", mutates_args=())
def qk_norm_rope_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q_out: Tensor,
    k_out: Tensor,
    q_rstd: Tensor,
    k_rstd: Tensor,
    q_weights: Sequence[Tensor],
    k_weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    places: Tensor,
    first_rows: int,
    bias_dtype: torch.dtype | None,
    weight_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward, and a second kernel that adds up what the chunks gave for the parameters.

    Returns dq, dk [S, H, d], the gradients of the biases of q and of k [streams, H d] in `bias_dtype`, and of the
    weights [streams, d] in theirs. Without `bias_dtype` or `weight_grads` the tensors in that place have 0 elements.
    """
    rows, wants_bias = len(q_out), bias_dtype is not None
    dx = torch.empty_like(q_out), torch.empty_like(k_out)
    sizes = _sizes(q_out, places)
    width, d, groups = sizes["H"] * sizes["D"], sizes["D"], triton.cdiv(sizes["H"], sizes["HB"])
    size = backward_chunk_rows(rows, groups)
    before = triton.cdiv(first_rows, size)
    chunks = before + triton.cdiv(rows - first_rows, size)
    bias_partial = cos.new_empty((2, chunks, width) if wants_bias else 0)
    weight_partial = cos.new_empty((2, chunks, groups, d) if weight_grads else 0)
    sums = _parameter_grads(q_out, q_weights[0], len(q_weights), bias_dtype, weight_grads)
    outs = dq_out.contiguous(), dk_out.contiguous(), q_out, k_out, q_rstd, k_rstd
    tensors = *outs, *_ends(q_weights, q_out), *_ends(k_weights, k_out), cos, sin, places, *dx
    unit = 2.0**-9 if q_out.dtype == torch.bfloat16 else 2.0**-24
    wants = {"BIAS": wants_bias, "WEIGHT": weight_grads}
    with on_device(q_out.device):
        backward_kernel[(chunks * groups * 2,)](
            *tensors,
            bias_partial,
            weight_partial,
            rows,
            first_rows,
            size,
            chunks,
            **wants,
            **sizes,
            UNIT=unit,
            num_warps=4,
        )
        if wants_bias or weight_grads:
            R, B = SUM_TILE
            tiles = triton.cdiv(width, B) * wants_bias + triton.cdiv(d, B) * weight_grads
            sum_kernel[(2 * len(q_weights) * tiles,)](
                bias_partial, weight_partial, *sums, before, chunks, width, d, groups, **wants, R=R, B=B, num_warps=4
            )
    return *dx, *sums


def _parameter_grads(
    q: Tensor, weight: Tensor, streams: int, bias_dtype: torch.dtype | None, weight_grads: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias_shape = (streams, q.shape[1] * q.shape[2]) if bias_dtype is not None else (0,)
    weight_shape = (streams, q.shape[2]) if weight_grads else (0,)
    biases = [q.new_empty(bias_shape, dtype=bias_dtype or q.dtype) for _ in range(2)]
    return biases[0], biases[1], weight.new_empty(weight_shape), weight.new_empty(weight_shape)


@qk_norm_rope_backward.register_fake
def _(
    dq_out,
    dk_out,
    q_out,
    k_out,
    q_rstd,
    k_rstd,
    q_weights,
    k_weights,
    cos,
    sin,
    places,
    first_rows,
    bias_dtype,
    weight_grads,
):
    sums = _parameter_grads(q_out, q_weights[0], len(q_weights), bias_dtype, weight_grads)
    return torch.empty_like(q_out), torch.empty_like(k_out), *sums


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        places: Tensor,
        first_rows: int,
        eps: float,
        streams: int,
        *parameters: Tensor,
    ) -> tuple[Tensor, Tensor]:
        groups = [list(parameters[i : i + streams]) for i in range(0, len(parameters), streams)]
        *biases, q_weights, k_weights = groups
        q_biases, k_biases = biases or ([], [])
        ctx.first_rows, ctx.bias_dtype = first_rows, q_biases[0].dtype if biases else None
        q_out, k_out, q_rstd, k_rstd = qk_norm_rope_forward(
            q, k, q_biases, k_biases, q_weights, k_weights, cos, sin, places, first_rows, eps
        )
        ctx.save_for_backward(q_out, k_out, q_rstd, k_rstd, cos, sin, places, *q_weights, *k_weights)
        return q_out, k_out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
        q_out, k_out, q_rstd, k_rstd, cos, sin, places, *weights = ctx.saved_tensors
        streams = len(weights) // 2
        wanted = ctx.needs_input_grad[8:]
        wants_bias = any(wanted[: -2 * streams])
        dq, dk, *sums = qk_norm_rope_backward(
            dq_out,
            dk_out,
            q_out,
            k_out,
            q_rstd,
            k_rstd,
            weights[:streams],
            weights[streams:],
            cos,
            sin,
            places,
            ctx.first_rows,
            ctx.bias_dtype if wants_bias else None,
            any(wanted[-2 * streams :]),
        )
        tables = sums if ctx.bias_dtype else sums[2:]
        each = [table[i] if table.numel() else None for table in tables for i in range(streams)]
        parameters = (grad if want else None for grad, want in zip(each, wanted))
        return dq, dk, None, None, None, None, None, None, *parameters


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_biases: Sequence[Tensor],
    k_biases: Sequence[Tensor],
    q_weights: Sequence[Tensor],
    k_weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    places: Tensor | None,
    stream_rows: Sequence[int],
    eps: float = 1e-6,
    mode: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return q', k' [S, H, d]: q and k with biases, normalised, turned, and at their places; see the top of the file.

    Args:
        q, k: [S, H, d] fp32 or bf16, both alike and contiguous, d even: `stream_rows[0]` rows of the first stream,
            then those of the second, if there is one.
        q_biases, k_biases: one [H d] tensor for each stream, or none. Biases share a dtype, fp32 or bf16.
        q_weights, k_weights: one [d] tensor for each stream; they share a dtype.
        cos, sin: [S, d / 2] fp32, cosine and sine of each pair's angle, in the order of the result.
        places: int64 [S], a permutation: row r of q goes to row places[r]. None leaves the order as it is.
        stream_rows: rows of each stream, in order.
        eps: added to the mean square.
        mode: "auto" (Triton on CUDA, the reference elsewhere), "reference", "triton" or "compile".

    Differentiable in q, k, biases and weights. Raises ValueError that names the argument for a wrong shape, dtype,
    device, stride, count or place. Only on CUDA the places are not read, which would mean to wait for them: there a
    row whose place does not exist is written nowhere, and its gradient is NaN.
    """
    face = choose(mode, q.device)
    _check(q, k, q_biases, k_biases, q_weights, k_weights, cos, sin, places, stream_rows)
    args = q, k, q_biases, k_biases, q_weights, k_weights, cos, sin, places, stream_rows, eps
    if face != "triton":
        return (compiled(qk_norm_rope_reference) if face == "compile" else qk_norm_rope_reference)(*args)
    if places is None:
        places = cos.new_empty(0, dtype=torch.int64)
    parameters = *q_biases, *k_biases, *q_weights, *k_weights
    return _QKNormRope.apply(q, k, cos, sin, places, stream_rows[0], eps, len(stream_rows), *parameters)


def _check(
    q: Tensor,
    k: Tensor,
    q_biases: Sequence[Tensor],
    k_biases: Sequence[Tensor],
    q_weights: Sequence[Tensor],
    k_weights: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    places: Tensor | None,
    stream_rows: Sequence[int],
) -> None:
    if q.ndim != 3 or q.numel() == 0 or q.shape[2] % 2:
        raise ValueError(f"q must have shape [rows, heads, d], none empty and d even, got {list(q.shape)}")
    rows, heads, d = q.shape
    check_tensor("q", q, q.shape, FLOATS, q.device)
    check_tensor("k", k, q.shape, (q.dtype,), q.device)
    streams = len(stream_rows)
    if streams not in (1, 2) or min(stream_rows) < 0 or sum(stream_rows) != rows:
        raise ValueError(f"stream_rows must be one or two counts that sum to {rows}, got {list(stream_rows)}")
    has_bias = len(q_biases) > 0 or len(k_biases) > 0
    for name, tensors, count, size in (
        ("q_biases", q_biases, streams * has_bias, heads * d),
        ("k_biases", k_biases, streams * has_bias, heads * d),
        ("q_weights", q_weights, streams, d),
        ("k_weights", k_weights, streams, d),
    ):
        if len(tensors) != count:
            raise ValueError(f"{name} must be {count}, one for each stream, got {len(tensors)}")
        like = (q_biases if name.endswith("biases") else q_weights)[:1]
        for i, tensor in enumerate(tensors):
            check_tensor(f"{name}[{i}]", tensor, (size,), FLOATS, q.device)
            check_tensor(f"{name}[{i}]", tensor, (size,), [t.dtype for t in like], q.device)
    for name, table in (("cos", cos), ("sin", sin)):
        check_tensor(name, table, (rows, d // 2), (torch.float32,), q.device)
        if table.requires_grad:
            raise ValueError(f"{name} must not require a gradient: there is none with respect to angles")
    if places is None:
        return
    check_tensor("places", places, (rows,), (torch.int64,), q.device)
    readable = places.device.type == "cpu" and not torch.compiler.is_compiling()
    if readable and not torch.equal(places.sort().values, torch.arange(rows)):
        raise ValueError(f"places must be a permutation of 0 to {rows - 1}, got {places.tolist()}")

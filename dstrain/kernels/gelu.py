"""GELU of a projection with the bias of its Linear, forward and backward (Hendrycks and Gimpel, arXiv:1606.08415).

act = gelu(h + bias). Both forms in use are x sigmoid(z): "tanh" with z = sqrt(8 / pi) (x + 0.044715 x^3), which is
torch's approximate="tanh", and "sigmoid" with z = 1.702 x. The projection runs without its bias, so that adding it and
summing its gradient cost no pass of their own.

h is [S, F]: the rows of one stream, or those of two, end to end, each with a bias [F] of its own. The gradient of a
bias is a sum over rows: programs sum columns over chunks of rows, a second launch sums these, both in a fixed order.
"""

# mypy: allow-untyped-defs

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.autograd.function import once_differentiable

from dstrain.kernels.backend import FLOATS, check_tensor, choose, compiled, jit, on_device, tl, triton
from dstrain.kernels.stream_chunks import stream_chunk

FORMS = ("tanh", "sigmoid")
SUM_ROWS = 16  # partial sums that a program of the second launch reads at once
# A kernel sees no globals but constants of this type.
LINEAR = tl.constexpr(1.5957691216057308)  # sqrt(8 / pi)
CUBIC = tl.constexpr(1.5957691216057308 * 0.044715)
SLOPE = tl.constexpr(1.702)
FAR = tl.constexpr(64.0)  # beyond it sigmoid(z) is 0 or 1 in fp32, in both forms


def gelu_reference(h: Tensor, biases: Sequence[Tensor] = (), stream_rows: Sequence[int] = (), form: str = "tanh"):
    """`gelu` in plain PyTorch, for any float dtype."""
    x = h.to(torch.promote_types(h.dtype, torch.float32))  # [S, F]
    if biases:
        parts = x.split(list(stream_rows or (len(h),)))
        x = torch.cat([part + bias for part, bias in zip(parts, biases)])
    return (nnf.gelu(x, approximate="tanh") if form == "tanh" else x * torch.sigmoid(1.702 * x)).to(h.dtype)


@jit
def sigmoid(z):
    """sigmoid(z) and 1 - sigmoid(z), both to a few ulp, by an exponential that cannot overflow."""
    e = tl.exp(-tl.abs(z))
    positive = z >= 0
    return tl.where(positive, 1.0, e) / (1.0 + e), tl.where(positive, e, 1.0) / (1.0 + e)


@jit
def _gelu(x, TANH: tl.constexpr):
    """gelu(x) and its derivative."""
    if TANH:
        z = x * (LINEAR + CUBIC * x * x)
        # The square overflows far out, where what it multiplies is zero.
        dz = tl.where(tl.abs(x) > FAR, 0.0, LINEAR + 3.0 * CUBIC * x * x)
    else:
        z = SLOPE * x
        dz = SLOPE
    s, rest = sigmoid(z)
    return x * s, s + x * s * rest * dz


@jit
def _bias(bias0_ptr, bias1_ptr, second, columns, F: tl.constexpr):
    if second:
        bias = tl.load(bias1_ptr + columns, mask=columns < F, other=0.0).to(tl.float32)
    else:
        bias = tl.load(bias0_ptr + columns, mask=columns < F, other=0.0).to(tl.float32)
    return bias


@jit
def _forward_kernel(
    h_ptr,
    bias0_ptr,
    bias1_ptr,
    act_ptr,
    first,
    rows,
    F: tl.constexpr,
    BIAS: tl.constexpr,
    TANH: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    TILES: tl.constexpr = (F + B - 1) // B
    pid = tl.program_id(0)
    start, end, second = stream_chunk(pid // TILES, first, rows, R)
    columns = pid % TILES * B + tl.arange(0, B)
    row = start + tl.arange(0, R)
    mask = (row < end)[:, None] & (columns < F)[None, :]
    offsets = row.to(tl.int64)[:, None] * F + columns[None, :]
    x = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        x += _bias(bias0_ptr, bias1_ptr, second, columns, F)[None, :]
    act, _slope = _gelu(x, TANH)
    tl.store(act_ptr + offsets, act, mask=mask)


@jit
def _backward_kernel(
    dact_ptr,
    h_ptr,
    bias0_ptr,
    bias1_ptr,
    dh_ptr,
    act_ptr,
    partial_ptr,
    first,
    rows,
    size,
    F: tl.constexpr,
    BIAS: tl.constexpr,
    SUMS: tl.constexpr,
    AGAIN: tl.constexpr,
    TANH: tl.constexpr,
    R: tl.constexpr,
    B: tl.constexpr,
):
    """dh of a chunk of rows in B columns, its sum over the rows, and `act` again."""
    TILES: tl.constexpr = (F + B - 1) // B
    pid = tl.program_id(0)
    start, end, second = stream_chunk(pid // TILES, first, rows, size)
    columns = pid % TILES * B + tl.arange(0, B)
    total = tl.zeros((R, B), tl.float32)
    if BIAS:
        bias = _bias(bias0_ptr, bias1_ptr, second, columns, F)[None, :]
    for place in range(start, end, R):
        row = place + tl.arange(0, R)
        mask = (row < end)[:, None] & (columns < F)[None, :]
        offsets = row.to(tl.int64)[:, None] * F + columns[None, :]
        x = tl.load(h_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        dact = tl.load(dact_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if BIAS:
            x += bias
        act, slope = _gelu(x, TANH)
        tl.store(dh_ptr + offsets, dact * slope, mask=mask)
        if AGAIN:
            tl.store(act_ptr + offsets, act, mask=mask)
        if SUMS:
            total += dact * slope
    if SUMS:
        partial = (pid // TILES).to(tl.int64) * F + columns
        tl.store(partial_ptr + partial, tl.sum(total, axis=0), mask=columns < F)


@jit
def _sum_kernel(partial_ptr, out_ptr, before, chunks, F: tl.constexpr, R: tl.constexpr, B: tl.constexpr):
    """Sum the partial sums [K, F] of each stream: the first stream's are the `before` first rows."""
    TILES: tl.constexpr = (F + B - 1) // B
    stream = tl.program_id(0) // TILES
    columns = tl.program_id(0) % TILES * B + tl.arange(0, B)
    start, end = tl.where(stream == 0, 0, before), tl.where(stream == 0, before, chunks)
    total = tl.zeros((R, B), tl.float32)
    for place in range(start, end, R):
        row = place + tl.arange(0, R)
        mask = (row < end)[:, None] & (columns < F)[None, :]
        total += tl.load(partial_ptr + row.to(tl.int64)[:, None] * F + columns[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + stream * F + columns, tl.sum(total, axis=0), mask=columns < F)


def tile(width: int, elements: int) -> tuple[int, int]:
    """Rows and columns of a tile of at most so many elements, in full cache lines where the width has them."""
    columns = min(256, triton.next_power_of_2(width))
    return min(32, elements // columns), columns


def chunk_rows(rows: int) -> int:
    """Rows that one program sums over: up to 256, fewer where there would be too few programs to fill a GPU."""
    return min(256, max(32, 1 << max(0, (rows // 32).bit_length() - 1)))


def _pair(h: Tensor, biases: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    return (biases[0], biases[-1]) if biases else (h, h)


@torch.library.custom_op("dstrain::gelu_forward", mutates_args=())
def gelu_forward(h: Tensor, biases: Sequence[Tensor], first_rows: int, form: str) -> Tensor:
    """Launch the forward: h [S, F], a bias [F] for each stream or none, of which the first has `first_rows` rows."""
    rows, width = h.shape
    act = torch.empty_like(h)
    R, B = tile(width, 4096)
    grid = (triton.cdiv(first_rows, R) + triton.cdiv(rows - first_rows, R)) * triton.cdiv(width, B)
    with on_device(h.device):
        _forward_kernel[(grid,)](
            h, *_pair(h, biases), act, first_rows, rows, width, bool(biases), form == "tanh", R, B, num_warps=4
        )
    return act


@gelu_forward.register_fake
def _(h: Tensor, biases: Sequence[Tensor], first_rows: int, form: str) -> Tensor:
    return torch.empty_like(h)


@torch.library.custom_op("dstrain::gelu_backward", mutates_args=())
def gelu_backward(
    dact: Tensor, h: Tensor, biases: Sequence[Tensor], first_rows: int, form: str, again: bool, sums: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward: dh [S, F], the gradients of the biases [streams, F], and with `again` act [S, F].

    Gradients have the dtype of what they belong to. Without biases or `sums`, and without `again`, the tensor in that
    place has 0 elements.
    """
    rows, width = h.shape
    sums = sums and bool(biases)
    size = chunk_rows(rows)
    before = triton.cdiv(first_rows, size)
    chunks = before + triton.cdiv(rows - first_rows, size)
    dh, act = torch.empty_like(h), torch.empty_like(h) if again else h.new_empty(0)
    partial = torch.empty((chunks, width) if sums else (0,), dtype=torch.float32, device=h.device)
    dbiases = biases[0].new_empty(len(biases), width) if sums else h.new_empty(0)
    R, B = tile(width, 2048)
    flags = {"BIAS": bool(biases), "SUMS": sums, "AGAIN": again, "TANH": form == "tanh", "R": R, "B": B}
    tensors = dact.contiguous(), h, *_pair(h, biases), dh, act, partial
    with on_device(h.device):
        _backward_kernel[(chunks * triton.cdiv(width, B),)](
            *tensors, first_rows, rows, size, width, **flags, num_warps=4
        )
        if sums:
            B = min(64, B)
            grid = (len(biases) * triton.cdiv(width, B),)
            _sum_kernel[grid](partial, dbiases, before, chunks, width, SUM_ROWS, B, num_warps=4)
    return dh, dbiases, act


@gelu_backward.register_fake
def _(
    dact: Tensor, h: Tensor, biases: Sequence[Tensor], first_rows: int, form: str, again: bool, sums: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    dbiases = biases[0].new_empty(len(biases), h.shape[1]) if sums and biases else h.new_empty(0)
    return torch.empty_like(h), dbiases, torch.empty_like(h) if again else h.new_empty(0)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, first_rows: int, form: str, *biases: Tensor) -> Tensor:
        ctx.save_for_backward(h, *biases)
        ctx.first_rows, ctx.form = first_rows, form
        return gelu_forward(h, list(biases), first_rows, form)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dact: Tensor) -> tuple[Tensor | None, ...]:
        h, *biases = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        dh, dbiases, _ = gelu_backward(dact, h, biases, ctx.first_rows, ctx.form, False, any(wanted))
        return dh, None, None, *(dbiases[i] if want else None for i, want in enumerate(wanted))


def gelu(
    h: Tensor,
    biases: Sequence[Tensor] = (),
    stream_rows: Sequence[int] = (),
    form: str = "tanh",
    mode: str = "auto",
) -> Tensor:
    """Return gelu(h + bias) [S, F] in the dtype of h, differentiable in h and the biases.

    h is [S, F] fp32 or bf16, contiguous; `biases` is empty, or holds one [F] fp32 or bf16 tensor for each of the one
    or two streams, whose rows `stream_rows` counts in order (empty: one stream). `form` is "tanh" or "sigmoid"; `mode`
    is "auto" (Triton on CUDA, the reference elsewhere), "reference", "triton" or "compile". Raises ValueError that
    names the argument for a wrong shape, dtype, device, stride or count.
    """
    face = choose(mode, h.device)
    if form not in FORMS:
        raise ValueError(f"form must be {' or '.join(FORMS)}, got {form!r}")
    if h.ndim != 2 or h.numel() == 0:
        raise ValueError(f"h must have shape [rows, width], both at least 1, got {list(h.shape)}")
    check_tensor("h", h, h.shape, FLOATS, h.device)
    stream_rows = tuple(stream_rows) or (len(h),)
    if len(stream_rows) > 2 or min(stream_rows) < 1 or sum(stream_rows) != len(h):
        raise ValueError(f"stream_rows must be one or two counts that sum to {len(h)}, got {list(stream_rows)}")
    if biases and len(biases) != len(stream_rows):
        raise ValueError(f"biases must be one for each of {len(stream_rows)} streams, or none, got {len(biases)}")
    for i, bias in enumerate(biases):
        check_tensor(f"biases[{i}]", bias, (h.shape[1],), FLOATS, h.device)
        check_tensor(f"biases[{i}]", bias, (h.shape[1],), (biases[0].dtype,), h.device)
    if face == "triton":
        return _Gelu.apply(h, stream_rows[0], form, *biases)
    return (compiled(gelu_reference) if face == "compile" else gelu_reference)(h, biases, stream_rows, form)

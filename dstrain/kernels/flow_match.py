"""Flow matching over packed latents: the noised latents, and the velocity error with its gradient.

With x_t = (1 - sigma) x0 + sigma eps the velocity is v = eps - x0 (Liu et al., arXiv:2209.03003; Lipman et al.,
arXiv:2210.02747). The noise eps is never stored: element `e` of the sample with draw number `d` is normal number `e`
of draw `d` (dstrain.rng), so whoever needs it makes it again, and a sample has the same noise in any pack.

Three faces, as in every file here: `*_reference` is plain PyTorch and the meaning; the Triton kernels do the same in one
pass over the latents; `add_noise` and `velocity_loss` check their inputs and pick one.

Packed latents are [I, C]: I tokens of N samples, end to end, sample after sample. The same four tensors say whose a row is:
    sample_index [I] int64   the sample of each row
    first_token  [N] int64   the row at which each sample begins
    token_counts [N] int64   the rows of each sample
    draws        [N] int64   the draw number of each sample
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dstrain.kernels.backend import check_tensor, choose, jit, on_device, tl, triton
from dstrain.rng import TWO_PI, Purpose, normal

FLOATS = (torch.float32, torch.bfloat16)
TILE = 1024  # elements of a program: 8 for each of 128 threads
# Read by the kernels, which can only see globals of this type.
NOISE, ANGLE = tl.constexpr(int(Purpose.NOISE)), tl.constexpr(TWO_PI)


def noise_reference(channels: int, sample_index: Tensor, first_token: Tensor, seed: int, draws: Tensor) -> Tensor:
    """Return the noise of a pack, fp32 [I, C]."""
    token = torch.arange(len(sample_index), device=sample_index.device) - first_token[sample_index]  # [I]
    elements = token[:, None] * channels + torch.arange(channels, device=token.device)  # [I, C]
    return normal(seed, Purpose.NOISE, draws[sample_index][:, None], elements)


def add_noise_reference(
    x0: Tensor, sigmas: Tensor, sample_index: Tensor, first_token: Tensor, seed: int, draws: Tensor
) -> Tensor:
    """`add_noise` in plain PyTorch, for any float dtype."""
    noise = noise_reference(x0.shape[1], sample_index, first_token, seed, draws)  # [I, C]
    sigma = sigmas[sample_index][:, None]  # [I, 1]
    return (1 - sigma) * x0 + sigma * noise


def velocity_loss_reference(
    pred: Tensor,
    x0: Tensor,
    sample_index: Tensor,
    first_token: Tensor,
    token_counts: Tensor,
    seed: int,
    draws: Tensor,
) -> Tensor:
    """`velocity_loss` in plain PyTorch, for any float dtype."""
    noise = noise_reference(x0.shape[1], sample_index, first_token, seed, draws)  # [I, C]
    error = (pred - (noise - x0)).square()  # [I, C], at least fp32 because the noise is
    return torch.stack([sample.mean() for sample in error.split(token_counts.tolist())])  # [N]


@jit
def _tile(
    sample_ptr,
    first_ptr,
    draws_ptr,
    seed,
    tokens,
    samples,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """This program's rows [R], their sample [R] and whether it exists [R], element offsets, mask and noise [R, 4 G].

    A tile's columns are GROUPS whole Philox counters of four normals. A row that does not begin on a counter (CHANNELS
    not a multiple of four) begins up to three columns late, and the columns outside the row are masked.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sample = tl.load(sample_ptr + rows, mask=rows < tokens, other=-1)
    known = (sample >= 0) & (sample < samples)
    token = rows - tl.load(first_ptr + sample, mask=known, other=0)
    draw = tl.load(draws_ptr + sample, mask=known, other=0)[:, None]

    counter = ((token * CHANNELS) // 4)[:, None] + tl.arange(0, GROUPS)[None, :]  # [R, G]
    low, high = (draw & 0xFFFFFFFF).to(tl.uint32), (draw >> 32).to(tl.uint32)  # [R, 1]
    w0, w1, w2, w3 = tl.philox(seed, counter.to(tl.uint32), low * 0 + NOISE, low, high)
    n0, n1 = _box_muller(w0, w1)
    n2, n3 = _box_muller(w2, w3)
    # join adds a fastest axis: joined twice, the four lanes of a counter lie side by side.
    noise = tl.join(tl.join(n0, n2), tl.join(n1, n3)).reshape(ROWS, 4 * GROUPS)
    # The Python side has checked the index wherever that is free; elsewhere a wrong one must not pass as a number.
    noise = tl.where(known[:, None], noise, float("nan"))

    late = (token * (CHANNELS % 4)) % 4
    columns = tl.arange(0, 4 * GROUPS)[None, :] - late[:, None]
    mask = (rows < tokens)[:, None] & (columns >= 0) & (columns < CHANNELS)
    return rows, sample, known, rows[:, None] * CHANNELS + columns, mask, noise


@jit
def _box_muller(radius_word, angle_word):
    radius = tl.sqrt_rn(-2.0 * tl.log(_uniform(radius_word)))
    angle = _uniform(angle_word) * ANGLE
    return radius * tl.cos(angle), radius * tl.sin(angle)


@jit
def _uniform(word):
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23


@jit
def _add_noise_kernel(
    x0_ptr,
    sigma_ptr,
    out_ptr,
    sample_ptr,
    first_ptr,
    draws_ptr,
    seed,
    tokens,
    samples,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    rows, sample, known, offsets, mask, noise = _tile(
        sample_ptr, first_ptr, draws_ptr, seed, tokens, samples, CHANNELS, ROWS, GROUPS
    )
    sigma = tl.load(sigma_ptr + sample, mask=known, other=0.0)[:, None]
    x0 = tl.load(x0_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, (1.0 - sigma) * x0 + sigma * noise, mask=mask)


@jit
def _row_error_kernel(
    pred_ptr,
    x0_ptr,
    out_ptr,
    sample_ptr,
    first_ptr,
    draws_ptr,
    seed,
    tokens,
    samples,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Squared error of each row [I]: partial sums that no other program writes, so there is nothing to race."""
    rows, sample, known, offsets, mask, noise = _tile(
        sample_ptr, first_ptr, draws_ptr, seed, tokens, samples, CHANNELS, ROWS, GROUPS
    )
    x0 = tl.load(x0_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    pred = tl.load(pred_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    error = tl.where(mask, pred - (noise - x0), 0.0)
    tl.store(out_ptr + rows, tl.sum(error * error, axis=1), mask=rows < tokens)


@jit
def _sample_mean_kernel(row_ptr, out_ptr, first_ptr, count_ptr, tokens, CHANNELS: tl.constexpr, ROWS: tl.constexpr):
    """Mean of each sample's elements [N], one program a sample, in a fixed order."""
    sample = tl.program_id(0)
    first, count = tl.load(first_ptr + sample), tl.load(count_ptr + sample)
    last = tl.minimum(first + count, tokens)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        total += tl.load(row_ptr + rows, mask=(rows >= 0) & (rows < last), other=0.0)
    tl.store(out_ptr + sample, tl.sum(total, axis=0) / (count * CHANNELS).to(tl.float32))


@jit
def _velocity_grad_kernel(
    pred_ptr,
    x0_ptr,
    scale_ptr,
    out_ptr,
    sample_ptr,
    first_ptr,
    draws_ptr,
    seed,
    tokens,
    samples,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    rows, sample, known, offsets, mask, noise = _tile(
        sample_ptr, first_ptr, draws_ptr, seed, tokens, samples, CHANNELS, ROWS, GROUPS
    )
    scale = tl.load(scale_ptr + sample, mask=known, other=0.0)[:, None]
    x0 = tl.load(x0_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    pred = tl.load(pred_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = scale * (pred - (noise - x0))
    tl.store(out_ptr + offsets, grad.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    kernel: Any, tensors: tuple[Tensor, ...], index: tuple[Tensor, Tensor, Tensor], seed: int, tokens: int, channels: int
) -> None:
    # C columns touch C / 4 counters where rows begin on one, else as many as C + 3 columns can.
    groups = triton.next_power_of_2(channels // 4 if channels % 4 == 0 else (channels + 2) // 4 + 1)
    rows = max(1, TILE // (4 * groups))
    sizes = {"CHANNELS": channels, "ROWS": rows, "GROUPS": groups}
    with on_device(tensors[0].device):
        kernel[(triton.cdiv(tokens, rows),)](*tensors, *index, seed, tokens, len(index[1]), **sizes)


class _AddNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x0: Tensor, sigmas: Tensor, index: tuple[Tensor, Tensor, Tensor], seed: int) -> Tensor:
        ctx.save_for_backward(sigmas, index[0])
        ctx.dtype = x0.dtype
        x_t = torch.empty_like(x0, dtype=torch.float32)
        _launch(_add_noise_kernel, (x0, sigmas, x_t), index, seed, *x0.shape)
        return x_t

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        sigmas, sample_index = ctx.saved_tensors
        return ((1 - sigmas)[sample_index][:, None] * grad).to(ctx.dtype), None, None, None


class _VelocityLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, pred: Tensor, x0: Tensor, index: tuple[Tensor, Tensor, Tensor], token_counts: Tensor, seed: int
    ) -> Tensor:
        ctx.save_for_backward(pred, x0, *index, token_counts)
        ctx.seed = seed
        tokens, channels = pred.shape
        row_errors = torch.empty(tokens, dtype=torch.float32, device=pred.device)  # [I]
        _launch(_row_error_kernel, (pred, x0, row_errors), index, seed, tokens, channels)
        loss = torch.empty(len(token_counts), dtype=torch.float32, device=pred.device)  # [N]
        with on_device(pred.device):
            _sample_mean_kernel[(len(loss),)](row_errors, loss, index[1], token_counts, tokens, channels, TILE)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        pred, x0, *index, token_counts = ctx.saved_tensors
        scale = grad * 2 / (token_counts * pred.shape[1])  # [N]
        grad_pred = torch.empty_like(pred)
        _launch(_velocity_grad_kernel, (pred, x0, scale, grad_pred), tuple(index), ctx.seed, *pred.shape)
        # The target is eps - x0, so that the error grows with x0 as it does with pred.
        return grad_pred, grad_pred.to(x0.dtype) if ctx.needs_input_grad[1] else None, None, None, None

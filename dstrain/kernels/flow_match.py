"""Flow matching over packed latents: the noised latents, and the velocity error with its gradient.

With x_t = (1 - sigma) x0 + sigma eps the velocity is v = eps - x0 (Liu et al., arXiv:2209.03003; Lipman et al.,
arXiv:2210.02747). The noise eps is never stored: element `e` of the sample with draw number `d` is normal number `e`
of draw `d` (dstrain.rng), so whoever needs it makes it again, and a sample has the same noise in any pack.

Three faces, as in every file here: `*_reference` is plain PyTorch and the meaning; the Triton kernels do the same in
one pass over the latents; `add_noise` and `velocity_loss` check their inputs and pick one.

Packed latents are [I, C]: I tokens of N samples, end to end, sample after sample. Whose a row is, four tensors say:
    sample_index [I] int64   the sample of each row
    first_token  [N] int64   the row at which each sample begins
    token_counts [N] int64   the rows of each sample
    draws        [N] int64   the draw number of each sample
"""

# mypy: allow-untyped-defs

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dstrain import rng
from dstrain.kernels.backend import check_pack, check_tensor, choose, jit, on_device, tl, triton
from dstrain.kernels.philox import normal4
from dstrain.rng import Purpose, seed_key

TILE = 1024  # elements of a program: 8 for each of 128 threads
NOISE = tl.constexpr(int(Purpose.NOISE))


def noise_reference(channels: int, sample_index: Tensor, first_token: Tensor, seed: int, draws: Tensor) -> Tensor:
    """Return the noise of a pack, fp32 [I, C]."""
    token = torch.arange(len(sample_index), device=sample_index.device) - first_token[sample_index]  # [I]
    first = token[:, None] * channels  # [I, 1]
    draw = draws[sample_index][:, None]  # [I, 1]
    if channels % 4 == 0:  # rows are whole counters: the same numbers for a third of the time
        groups = first // 4 + torch.arange(channels // 4, device=token.device)  # [I, C / 4]
        return rng.normal4(seed, Purpose.NOISE, draw, groups).flatten(1)
    return rng.normal(seed, Purpose.NOISE, draw, first + torch.arange(channels, device=token.device))


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
def _tile(sample_ptr, first_ptr, draws_ptr, seed, tokens, samples, C: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """This program's rows [R] and their samples [R], and the element offsets, mask and noise of its tile [R, 4 G].

    A tile's columns are G whole Philox counters of four normals. A row that does not begin on a counter (C not a
    multiple of four) begins up to three columns late, and the columns outside the row are masked.
    """
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    sample = tl.load(sample_ptr + rows, mask=rows < tokens, other=0)
    known = (sample >= 0) & (sample < samples)
    sample = tl.where(known, sample, 0)
    token = rows - tl.load(first_ptr + sample)
    draw = tl.load(draws_ptr + sample)

    group = ((token * C) // 4)[:, None] + tl.arange(0, G)[None, :]  # [R, G]
    noise = normal4(seed, NOISE, draw[:, None], group).reshape(R, 4 * G)
    # The Python side reads the index only where that is free; elsewhere a wrong one must not pass as a number.
    noise = tl.where(known[:, None], noise, float("nan"))

    late = (token * (C % 4)) % 4
    columns = tl.arange(0, 4 * G)[None, :] - late[:, None]
    mask = (rows < tokens)[:, None] & (columns >= 0) & (columns < C)
    return rows, sample, rows[:, None] * C + columns, mask, noise


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
    C: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    _rows, sample, offsets, mask, noise = _tile(sample_ptr, first_ptr, draws_ptr, seed, tokens, samples, C, R, G)
    sigma = tl.load(sigma_ptr + sample)[:, None]
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
    C: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    """Squared error of each row [I]: partial sums that no other program writes, so there is nothing to race."""
    rows, _sample, offsets, mask, noise = _tile(sample_ptr, first_ptr, draws_ptr, seed, tokens, samples, C, R, G)
    x0 = tl.load(x0_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    pred = tl.load(pred_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    error = tl.where(mask, pred - (noise - x0), 0.0)
    tl.store(out_ptr + rows, tl.sum(error * error, axis=1), mask=rows < tokens)


@jit
def _sample_mean_kernel(row_ptr, out_ptr, first_ptr, count_ptr, tokens, C: tl.constexpr, R: tl.constexpr):
    """Mean of each sample's elements [N], one program a sample, in a fixed order."""
    sample = tl.program_id(0)
    first, count = tl.load(first_ptr + sample), tl.load(count_ptr + sample)
    last = tl.minimum(first + count, tokens)
    total = tl.zeros((R,), tl.float32)
    for start in range(first, last, R):
        rows = start + tl.arange(0, R)
        total += tl.load(row_ptr + rows, mask=(rows >= 0) & (rows < last), other=0.0)
    tl.store(out_ptr + sample, tl.sum(total, axis=0) / (count * C).to(tl.float32))


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
    C: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    _rows, sample, offsets, mask, noise = _tile(sample_ptr, first_ptr, draws_ptr, seed, tokens, samples, C, R, G)
    scale = tl.load(scale_ptr + sample)[:, None]
    x0 = tl.load(x0_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    pred = tl.load(pred_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = scale * (pred - (noise - x0))
    tl.store(out_ptr + offsets, grad.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    kernel: Any,
    tensors: tuple[Tensor, ...],
    index: tuple[Tensor, Tensor, Tensor],
    seed: int,
    tokens: int,
    channels: int,
) -> None:
    # C columns touch C / 4 counters where rows begin on one, else as many as C + 3 columns can.
    groups = triton.next_power_of_2(channels // 4 if channels % 4 == 0 else (channels + 2) // 4 + 1)
    rows = max(1, TILE // (4 * groups))
    sizes = {"C": channels, "R": rows, "G": groups}
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


def _reads_index(face: str, x0: Tensor) -> bool:
    return face == "reference" or not x0.is_cuda


def add_noise(
    x0: Tensor,
    sigmas: Tensor,
    sample_index: Tensor,
    first_token: Tensor,
    seed: int,
    draws: Tensor,
    mode: str = "auto",
) -> Tensor:
    """Return x_t = (1 - sigma) x0 + sigma eps, fp32 [I, C], differentiable in x0.

    x0 is [I, C] fp32 or bf16, sigmas [N] fp32; the index is described above. `mode` is "auto" (Triton on CUDA,
    reference elsewhere), "reference" or "triton". Raises ValueError that names the tensor for a wrong shape, dtype,
    device, stride or index. Only the kernels on CUDA do not wait for the index to be read: there, rows whose sample
    does not exist become NaN.
    """
    face = choose(mode, x0.device)
    check_pack({"x0": x0}, sample_index, {"first_token": first_token, "draws": draws}, read=_reads_index(face, x0))
    check_tensor("sigmas", sigmas, draws.shape, (torch.float32,), x0.device)
    if sigmas.requires_grad:
        raise ValueError("sigmas must not require a gradient: there is none with respect to sigma")
    seed_key(seed)
    if face == "reference":
        return add_noise_reference(x0, sigmas, sample_index, first_token, seed, draws)
    return _AddNoise.apply(x0, sigmas, (sample_index, first_token, draws), seed)


def velocity_loss(
    pred: Tensor,
    x0: Tensor,
    sample_index: Tensor,
    first_token: Tensor,
    token_counts: Tensor,
    seed: int,
    draws: Tensor,
    mode: str = "auto",
) -> Tensor:
    """Return each sample's mean squared error of `pred` against eps - x0, fp32 [N], differentiable in pred and x0.

    pred and x0 are [I, C] fp32 or bf16; sums are fp32, in an order that does not depend on timing. `mode` and errors
    as in `add_noise`.
    """
    face = choose(mode, x0.device)
    per_sample = {"first_token": first_token, "token_counts": token_counts, "draws": draws}
    check_pack({"x0": x0, "pred": pred}, sample_index, per_sample, read=_reads_index(face, x0))
    seed_key(seed)
    if face == "reference":
        return velocity_loss_reference(pred, x0, sample_index, first_token, token_counts, seed, draws)
    return _VelocityLoss.apply(pred, x0, (sample_index, first_token, draws), token_counts, seed)

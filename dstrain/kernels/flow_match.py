"""Flow matching over packed latents: the noised latents, and the velocity error with its gradient.

With x_t = (1 - sigma) x0 + sigma eps the velocity is v = eps - x0 (Liu et al., arXiv:2209.03003; Lipman et al.,
arXiv:2210.02747). The noise eps is never stored: element `e` of the sample with draw number `d` is normal number `e`
of draw `d` (dstrain.rng), so whoever needs it makes it again, and a sample has the same noise in any pack.

Three faces, as in every file here: `*_reference` is plain PyTorch and the meaning; torch.compile of it; and Triton
kernels that do the same in one pass over the latents. `add_noise` and `velocity_loss` check their inputs and pick one.

The pass that sums the weighted errors also writes their gradient, for an upstream gradient of one for each sample. The
upstream is known in the backward alone, which scales the rows by it: 1 / (samples of a global batch) most often, and
so exact in bf16 where that is a power of two.

Packed latents are [I, C]: I tokens of N samples, end to end, sample after sample. Whose a row is, four tensors say:
    sample_index [I] int64   the sample of each row
    first_token  [N] int64   the row at which each sample begins
    token_counts [N] int64   the rows of each sample
    draws        [N] int64   the draw number of each sample
"""

# mypy: allow-untyped-defs

from collections.abc import Callable
from functools import cache
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


def squared_error_reference(
    pred: Tensor, x0: Tensor, sample_index: Tensor, first_token: Tensor, seed: int, draws: Tensor
) -> Tensor:
    """Return the squared error of each element [I, C], at least fp32 because the noise is."""
    noise = noise_reference(x0.shape[1], sample_index, first_token, seed, draws)  # [I, C]
    return (pred - (noise - x0)).square()


def velocity_loss_reference(
    pred: Tensor,
    x0: Tensor,
    weights: Tensor,
    sample_index: Tensor,
    first_token: Tensor,
    token_counts: Tensor,
    seed: int,
    draws: Tensor,
    squared_error: Callable[..., Tensor] = squared_error_reference,
) -> Tensor:
    """`velocity_loss` in plain PyTorch, for any float dtype."""
    error = squared_error(pred, x0, sample_index, first_token, seed, draws)  # [I, C]
    return weights * torch.stack([sample.mean() for sample in error.split(token_counts.tolist())])  # [N]


@cache
def _compiled(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # Not dynamic from the start: as a symbol the seed's bits end up in floats, and Inductor's code does not compile.
    return torch.compile(reference)


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
    weight_ptr,
    count_ptr,
    out_ptr,
    grad_ptr,
    sample_ptr,
    first_ptr,
    draws_ptr,
    seed,
    tokens,
    samples,
    GRAD: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    """Squared error of each row [I], partial sums that no other program writes; and the gradient of each element."""
    rows, sample, offsets, mask, noise = _tile(sample_ptr, first_ptr, draws_ptr, seed, tokens, samples, C, R, G)
    x0 = tl.load(x0_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    pred = tl.load(pred_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    error = tl.where(mask, pred - (noise - x0), 0.0)
    tl.store(out_ptr + rows, tl.sum(error * error, axis=1), mask=rows < tokens)
    if GRAD:
        elements = (tl.load(count_ptr + sample) * C).to(tl.float32)
        scale = 2.0 * tl.load(weight_ptr + sample) / elements  # [R]
        tl.store(grad_ptr + offsets, scale[:, None] * error, mask=mask)


@jit
def _sample_mean_kernel(row_ptr, weight_ptr, out_ptr, first_ptr, count_ptr, tokens, C: tl.constexpr, R: tl.constexpr):
    """Weighted mean of each sample's elements [N], one program a sample, in a fixed order."""
    sample = tl.program_id(0)
    first, count = tl.load(first_ptr + sample), tl.load(count_ptr + sample)
    last = tl.minimum(first + count, tokens)
    total = tl.zeros((R,), tl.float32)
    for start in range(first, last, R):
        rows = start + tl.arange(0, R)
        total += tl.load(row_ptr + rows, mask=(rows >= 0) & (rows < last), other=0.0)
    mean = tl.sum(total, axis=0) / (count * C).to(tl.float32)
    tl.store(out_ptr + sample, tl.load(weight_ptr + sample) * mean)


@jit
def _scale_kernel(
    grad_ptr, upstream_ptr, out_ptr, sample_ptr, tokens, samples, C: tl.constexpr, R: tl.constexpr, W: tl.constexpr
):
    """Scale each row by its sample's upstream gradient."""
    rows = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    sample = tl.load(sample_ptr + rows, mask=rows < tokens, other=0)
    # A sample that does not exist has rows of NaN already.
    scale = tl.load(upstream_ptr + sample, mask=(sample >= 0) & (sample < samples), other=0.0)
    columns = tl.arange(0, W)[None, :]
    offsets, mask = rows[:, None] * C + columns, (rows < tokens)[:, None] & (columns < C)
    grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, grad * scale[:, None], mask=mask)


def _launch(kernel: Any, tensors: tuple[Tensor, ...], index: tuple[Tensor, ...], seed: int, **flags: bool) -> None:
    tokens, channels = tensors[0].shape
    # C columns touch C / 4 counters where rows begin on one, else as many as C + 3 columns can.
    groups = triton.next_power_of_2(channels // 4 if channels % 4 == 0 else (channels + 2) // 4 + 1)
    rows = max(1, TILE // (4 * groups))
    sizes = {"C": channels, "R": rows, "G": groups}
    with on_device(tensors[0].device):
        kernel[(triton.cdiv(tokens, rows),)](*tensors, *index, seed, tokens, len(index[1]), **flags, **sizes)


@torch.library.custom_op("dstrain::add_noise_forward", mutates_args=())
def add_noise_forward(
    x0: Tensor, sigmas: Tensor, sample_index: Tensor, first_token: Tensor, draws: Tensor, seed: int
) -> Tensor:
    """Launch `add_noise`; the seed's 64 bits as a signed integer."""
    x_t = torch.empty_like(x0, dtype=torch.float32)
    _launch(_add_noise_kernel, (x0, sigmas, x_t), (sample_index, first_token, draws), seed)
    return x_t


@add_noise_forward.register_fake
def _(x0: Tensor, sigmas: Tensor, sample_index: Tensor, first_token: Tensor, draws: Tensor, seed: int) -> Tensor:
    return torch.empty_like(x0, dtype=torch.float32)


@torch.library.custom_op("dstrain::velocity_loss_forward", mutates_args=())
def velocity_loss_forward(
    pred: Tensor,
    x0: Tensor,
    weights: Tensor,
    sample_index: Tensor,
    first_token: Tensor,
    token_counts: Tensor,
    draws: Tensor,
    seed: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Launch `velocity_loss`: the losses [N], and the gradient of their sum by pred, [I, C] in its dtype.

    Without `with_grad` the gradient has 0 elements. The seed's 64 bits come as a signed integer.
    """
    tokens, channels = pred.shape
    row_errors = torch.empty(tokens, dtype=torch.float32, device=pred.device)  # [I]
    loss = torch.empty_like(weights)  # [N]
    grad = torch.empty_like(pred) if with_grad else pred.new_empty(0)
    tensors = pred, x0, weights, token_counts, row_errors, grad
    _launch(_row_error_kernel, tensors, (sample_index, first_token, draws), seed, GRAD=with_grad)
    with on_device(pred.device):
        _sample_mean_kernel[(len(loss),)](row_errors, weights, loss, first_token, token_counts, tokens, channels, TILE)
    return loss, grad


@velocity_loss_forward.register_fake
def _(
    pred: Tensor,
    x0: Tensor,
    weights: Tensor,
    sample_index: Tensor,
    first_token: Tensor,
    token_counts: Tensor,
    draws: Tensor,
    seed: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(weights), torch.empty_like(pred) if with_grad else pred.new_empty(0)


@torch.library.custom_op("dstrain::velocity_loss_backward", mutates_args=())
def velocity_loss_backward(upstream: Tensor, grad: Tensor, sample_index: Tensor) -> Tensor:
    """Launch the backward: the gradient [I, C] for ones, each row times the upstream gradient [N] of its sample."""
    tokens, channels = grad.shape
    scaled = torch.empty_like(grad)
    width = triton.next_power_of_2(channels)
    rows = max(1, TILE // width)
    upstream = upstream.contiguous()  # that of a sum is one number, expanded
    with on_device(grad.device):
        _scale_kernel[(triton.cdiv(tokens, rows),)](
            grad, upstream, scaled, sample_index, tokens, len(upstream), channels, rows, width
        )
    return scaled


@velocity_loss_backward.register_fake
def _(upstream: Tensor, grad: Tensor, sample_index: Tensor) -> Tensor:
    return torch.empty_like(grad)


class _AddNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x0: Tensor, sigmas: Tensor, sample_index: Tensor, *rest: Any) -> Tensor:
        ctx.save_for_backward(sigmas, sample_index)
        ctx.dtype = x0.dtype
        return add_noise_forward(x0, sigmas, sample_index, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        sigmas, sample_index = ctx.saved_tensors
        return ((1 - sigmas)[sample_index][:, None] * grad).to(ctx.dtype), *(None,) * 5


class _VelocityLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pred: Tensor, x0: Tensor, weights: Tensor, sample_index: Tensor, *rest: Any) -> Tensor:
        loss, grad = velocity_loss_forward(pred, x0, weights, sample_index, *rest, any(ctx.needs_input_grad[:2]))
        ctx.save_for_backward(grad, sample_index)
        ctx.dtype = x0.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad = velocity_loss_backward(upstream, *ctx.saved_tensors)
        # The target is eps - x0, so that the error grows with x0 as it does with pred.
        return grad, grad.to(ctx.dtype) if ctx.needs_input_grad[1] else None, *(None,) * 6


def _signed(seed: int) -> int:
    """Return the 64 bits of a seed as an operator takes them; ValueError unless it is in [0, 2^64)."""
    seed_key(seed)
    return seed - (1 << 64) if seed >> 63 else seed


def _reads_index(face: str, x0: Tensor) -> bool:
    return not x0.is_meta and (face != "triton" or not x0.is_cuda)


def _check_constants(name: str, tensor: Tensor, draws: Tensor, device: torch.device) -> None:
    check_tensor(name, tensor, draws.shape, (torch.float32,), device)
    if tensor.requires_grad:
        raise ValueError(f"{name} must not require a gradient: there is none with respect to {name}")


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
    reference elsewhere), "reference", "triton" or "compile". Raises ValueError that names the tensor for a wrong shape,
    dtype, device, stride or index. Only the kernels on CUDA do not wait for the index to be read: there, rows whose
    sample does not exist become NaN.
    """
    face = choose(mode, x0.device)
    check_pack({"x0": x0}, sample_index, {"first_token": first_token, "draws": draws}, read=_reads_index(face, x0))
    _check_constants("sigmas", sigmas, draws, x0.device)
    signed = _signed(seed)
    if face == "triton":
        return _AddNoise.apply(x0, sigmas, sample_index, first_token, draws, signed)
    reference = _compiled(add_noise_reference) if face == "compile" else add_noise_reference
    return reference(x0, sigmas, sample_index, first_token, seed, draws)


def velocity_loss(
    pred: Tensor,
    x0: Tensor,
    weights: Tensor,
    sample_index: Tensor,
    first_token: Tensor,
    token_counts: Tensor,
    seed: int,
    draws: Tensor,
    mode: str = "auto",
) -> Tensor:
    """Return each sample's weight times its mean squared error of `pred` against eps - x0, fp32 [N].

    Differentiable in pred and x0, which are [I, C] fp32 or bf16; weights [N] are fp32. Sums are fp32, in an order that
    does not depend on timing. `mode` and errors as in `add_noise`.
    """
    face = choose(mode, x0.device)
    per_sample = {"first_token": first_token, "token_counts": token_counts, "draws": draws}
    check_pack({"x0": x0, "pred": pred}, sample_index, per_sample, read=_reads_index(face, x0))
    _check_constants("weights", weights, draws, x0.device)
    signed = _signed(seed)
    if face == "triton":
        return _VelocityLoss.apply(pred, x0, weights, sample_index, first_token, token_counts, draws, signed)
    # How many rows each sample has is the host's to know, so that summing over them is not compiled.
    squared_error = _compiled(squared_error_reference) if face == "compile" else squared_error_reference
    args = pred, x0, weights, sample_index, first_token, token_counts, seed, draws
    return velocity_loss_reference(*args, squared_error)

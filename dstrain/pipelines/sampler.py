"""Pictures from prompts: Euler steps along the flow, with true classifier-free guidance, many prompts in one pack."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from dstrain import rng
from dstrain.errors import ConfigError
from dstrain.models.packing import Shape
from dstrain.objectives.schedule import inference_sigmas
from dstrain.pipelines.base import Pipeline

T = TypeVar("T")
Transformer = Callable[..., Tensor]

MAX_TOKENS = 32_768  # in one forward; a 1024 x 1024 picture with guidance takes about 8,400


@torch.no_grad()
def sample(
    pipeline: Pipeline,
    prompts: Sequence[str],
    *,
    height: int | Sequence[int],
    width: int | Sequence[int],
    negative_prompts: Sequence[str] | None = None,
    num_steps: int = 50,
    cfg_scale: float = 4.0,
    seed: int = 0,
    noise: Sequence[Tensor] | None = None,
    transformer: Transformer | None = None,
    max_tokens: int = MAX_TOKENS,
) -> list[Image.Image]:
    """Paint one picture a prompt.

    Args:
        pipeline: with its frozen components, and its transformer unless `transformer` is given.
        prompts: what to paint.
        height: in pixels, one for all or one a prompt; multiples of 16.
        width: as height.
        negative_prompts: what to steer away from, one a prompt; by default the empty prompt.
        num_steps: Euler steps.
        cfg_scale: strength of the guidance, at least 1; 1 is none and halves the work.
        seed: of the starting noise; picture i has noise i, whatever the others are.
        noise: starting noise [tokens, C] of each picture instead.
        transformer: a training engine, for example. Where its forward is collective, all ranks must make the same call.
        max_tokens: prompts go through in packs of at most so many tokens; a larger picture goes alone.

    Raises:
        ConfigError: a size is no multiple of 16, a list has not one entry a prompt, or a number is out of range.
    """
    if cfg_scale < 1:
        raise ConfigError(f"cfg_scale must be at least 1 (no guidance), got {cfg_scale}")
    heights, widths = (_each(n, v, prompts) for n, v in (("height", height), ("width", width)))
    shapes = [pipeline.shape_of(h, w) for h, w in zip(heights, widths)]
    if noise is None:
        noise = [starting_noise(seed, i, prod(s), pipeline.token_channels) for i, s in enumerate(shapes)]
    against: list[str] = _each("negative_prompts", negative_prompts or "", prompts) if cfg_scale > 1 else []
    embeds = pipeline.embed_prompts([*prompts, *against])  # at once: the encoder may have to be brought
    embeds, negatives = embeds[: len(prompts)], embeds[len(prompts) :] or None
    latents = denoise(
        pipeline,
        transformer or pipeline.transformer,
        embeds,
        negatives,
        shapes,
        _each("noise", noise, prompts),
        num_steps=num_steps,
        cfg_scale=cfg_scale,
        max_tokens=max_tokens,
    )
    return [to_pil(pipeline.decode(x, shape)) for x, shape in zip(latents, shapes)]


@torch.no_grad()
def denoise(
    pipeline: Pipeline,
    transformer: Transformer,
    embeds: Sequence[Tensor],
    negatives: Sequence[Tensor] | None,
    shapes: Sequence[Shape],
    noise: Sequence[Tensor],
    *,
    num_steps: int,
    cfg_scale: float = 1.0,
    max_tokens: int = MAX_TOKENS,
) -> list[Tensor]:
    """Carry starting noise [i, C] of N pictures to clean latents [i, C], fp32.

    `embeds` and `negatives` are prompt embeddings [T_i, d]; `negatives` None means no guidance. The prompt and the
    negative prompt of a picture are two samples of one pack, so a step is one forward.
    """
    for x, shape in zip(noise, shapes, strict=True):
        if x.shape != (prod(shape), pipeline.token_channels):
            raise ConfigError(
                f"noise must be [{prod(shape)}, {pipeline.token_channels}] for {shape} tokens, got {list(x.shape)}"
            )
    costs = [prod(shape) + len(e) for shape, e in zip(shapes, embeds, strict=True)]
    if negatives is not None:
        costs = [cost + prod(s) + len(e) for cost, s, e in zip(costs, shapes, negatives, strict=True)]
    latents = list[Tensor]()
    for pack in _packs(costs, max_tokens):
        guided = [] if negatives is None else negatives[pack]
        latents += _denoise_pack(
            pipeline, transformer, embeds[pack], guided, shapes[pack], noise[pack], num_steps, cfg_scale
        )
    return latents


def _denoise_pack(
    pipeline: Pipeline,
    transformer: Transformer,
    embeds: Sequence[Tensor],
    negatives: Sequence[Tensor],
    shapes: Sequence[Shape],
    noise: Sequence[Tensor],
    num_steps: int,
    cfg_scale: float,
) -> Sequence[Tensor]:
    copies = 2 if negatives else 1
    condition = pipeline.condition([*embeds, *negatives], [*shapes] * copies)
    schedules = [inference_sigmas(num_steps, prod(shape), pipeline.scheduler) for shape in shapes]
    sigmas = torch.stack(schedules, dim=1).to(pipeline.device)  # [num_steps + 1, N]
    x = torch.cat([n.to(pipeline.device, torch.float32) for n in noise])  # [I, C]
    of_sample = condition.layout.image_sample[: len(x)]
    for now, then in pairwise(sigmas):
        v = pipeline.velocity(transformer, x.repeat(copies, 1), now.repeat(copies), condition)
        if negatives:
            cond, uncond = v.chunk(2)
            v = guide(cond, uncond, cfg_scale)
        x = x + (then - now)[of_sample, None] * v
    return x.split(condition.layout.image_lens[: len(shapes)])


def guide(cond: Tensor, uncond: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598) of velocities [I, C], each token rescaled to the norm of `cond`.

    The rescaling is Qwen-Image's; it keeps strong guidance from oversaturating.
    """
    v = uncond + scale * (cond - uncond)
    # An untrained transformer predicts exactly 0: 0 / 0 must not become NaN.
    norm = v.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
    return v * (cond.norm(dim=-1, keepdim=True) / norm)


def starting_noise(seed: int, i: int, tokens: int, channels: int) -> Tensor:
    """Return the noise [tokens, channels] of picture `i`, the same on every machine."""
    elements = torch.arange(tokens * channels)
    return rng.normal(seed, rng.Purpose.SAMPLE, torch.tensor(i), elements).view(tokens, channels)


def to_pil(picture: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] -> 8-bit RGB."""
    return Image.fromarray((picture * 255).round().to("cpu", torch.uint8).permute(1, 2, 0).contiguous().numpy())


def _packs(costs: Sequence[int], max_tokens: int) -> Iterator[slice]:
    start = total = 0
    for i, cost in enumerate(costs):
        if i > start and total + cost > max_tokens:
            yield slice(start, i)
            start, total = i, 0
        total += cost
    if costs:
        yield slice(start, len(costs))


def _each(name: str, value: T | Sequence[T], prompts: Sequence[str]) -> list[T]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * len(prompts)
    if len(value) != len(prompts):
        raise ConfigError(f"{name} has {len(value)} entries for {len(prompts)} prompts")
    return list(value)

"""The sampler against diffusers, the oracle, and its promises about packs, seeds and sizes."""

from math import prod

import numpy as np
import pytest
import torch
from diffusers import QwenImagePipeline as Oracle
from tiny_models import tiny_model_folder

from dstrain.errors import ConfigError
from dstrain.pipelines import PIPELINES
from dstrain.pipelines.sampler import denoise, guide, sample, starting_noise, to_pil

STEPS = 8
PROMPTS = ["a red cat", "blue grass on a red background, in the shape of a cat: " * 3, ""]
NEGATIVES = ["blue", "", "the texture of an assistant"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipeline(folder):
    return PIPELINES.get("qwen_image").from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def oracle(folder):
    pipe = Oracle.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise_for(shapes, seed=5):
    return [starting_noise(seed, i, prod(s), 64) for i, s in enumerate(shapes)]


def paint(pipeline, sizes, cfg_scale, **kwargs):
    """Pictures [3, H, W] in [0, 1], before they are rounded to 8 bits, all prompts in one pack."""
    shapes = [pipeline.shape_of(*size) for size in sizes]
    with torch.no_grad():
        embeds, negatives = pipeline.embed_prompts(PROMPTS), pipeline.embed_prompts(NEGATIVES)
        latents = denoise(
            pipeline,
            pipeline.transformer,
            embeds,
            negatives if cfg_scale > 1 else None,
            shapes,
            noise_for(shapes),
            num_steps=STEPS,
            cfg_scale=cfg_scale,
            **kwargs,
        )
        return [pipeline.decode(x, shape) for x, shape in zip(latents, shapes)]


def oracle_paint(oracle, i, size, noise, cfg_scale, output_type="np"):
    guidance = (
        {"negative_prompt": NEGATIVES[i], "true_cfg_scale": cfg_scale} if cfg_scale > 1 else {"true_cfg_scale": 1.0}
    )
    return oracle(
        PROMPTS[i],
        height=size[0],
        width=size[1],
        num_inference_steps=STEPS,
        latents=noise[None].clone(),
        output_type=output_type,
        **guidance,
    ).images[0]


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
@pytest.mark.parametrize("sizes", [[(64, 64)] * 3, [(48, 96)] * 3, [(32, 32), (96, 16), (16, 80)]])
def test_pictures_equal_diffusers_one_by_one(pipeline, oracle, sizes, cfg_scale):
    got = paint(pipeline, sizes, cfg_scale)
    for i, (size, noise) in enumerate(zip(sizes, noise_for([pipeline.shape_of(*s) for s in sizes]))):
        want = oracle_paint(oracle, i, size, noise, cfg_scale)
        assert want.std() > 0.05
        assert np.abs(got[i].permute(1, 2, 0).numpy() - want).max() < 1e-4  # the promise is 1e-3; measured 2e-5


def test_pictures_would_differ_with_other_guidance_or_noise(pipeline):
    """The parity above has teeth: what it must notice moves the pictures by far more than its tolerance."""
    sizes = [(64, 64)] * 3
    pictures = torch.stack(paint(pipeline, sizes, 4.0))
    for other in (paint(pipeline, sizes, 1.0), paint(pipeline, sizes, 3.9)):
        assert (torch.stack(other) - pictures).abs().amax(dim=(1, 2, 3)).min() > 1e-3


def test_8_bit_pictures_are_those_of_diffusers(pipeline, oracle):
    got = sample(
        pipeline,
        PROMPTS,
        height=32,
        width=[32, 48, 64],
        negative_prompts=NEGATIVES,
        num_steps=STEPS,
        cfg_scale=4.0,
        seed=5,
    )
    for i, (image, width) in enumerate(zip(got, (32, 48, 64))):
        noise = starting_noise(5, i, 2 * width // 16, 64)
        want = oracle_paint(oracle, i, (32, width), noise, 4.0, output_type="pil")
        assert (image.mode, image.size) == (want.mode, want.size) == ("RGB", (width, 32))
        difference = np.asarray(image).astype(int) - np.asarray(want)
        assert np.abs(difference).max() <= 1
        assert (difference != 0).mean() < 0.01


@pytest.mark.parametrize("max_tokens", [1, 90, 10_000])
def test_packs_do_not_change_pictures(pipeline, max_tokens):
    sizes = [(64, 64), (32, 96), (48, 16)]
    want, got = paint(pipeline, sizes, 4.0), paint(pipeline, sizes, 4.0, max_tokens=max_tokens)
    for a, b in zip(want, got, strict=True):
        torch.testing.assert_close(b, a, atol=1e-4, rtol=0)


def test_max_tokens_bounds_every_forward(pipeline):
    seen = []

    def transformer(x, prompt_embeds, sigmas, layout):
        seen.append((layout.tokens, len(layout)))
        return pipeline.transformer(x, prompt_embeds, sigmas, layout)

    kwargs = {"height": 32, "width": 32, "num_steps": 1, "transformer": transformer}
    cost = 2 * (4 + len(pipeline.embed_prompts([""])[0]))
    sample(pipeline, [""] * 5, max_tokens=2 * cost, **kwargs)
    assert seen == [(2 * cost, 4), (2 * cost, 4), (cost, 2)]
    seen.clear()
    sample(pipeline, [""] * 2, max_tokens=cost - 1, cfg_scale=2.0, **kwargs)
    assert seen == [(cost, 2)] * 2  # too large for any pack: alone
    seen.clear()
    sample(pipeline, [""] * 2, cfg_scale=1.0, **kwargs)
    assert seen == [(cost, 2)]  # without guidance half the work


def test_the_seed_decides_and_neighbours_do_not(pipeline):
    kwargs = {"height": 32, "width": 48, "num_steps": 2}
    a, again = (sample(pipeline, PROMPTS, seed=1, **kwargs) for _ in range(2))
    assert all(np.array_equal(x, y) for x, y in zip(a, again))
    first = sample(pipeline, PROMPTS[:1], seed=1, **kwargs)[0]
    assert np.abs(np.asarray(first).astype(int) - np.asarray(a[0])).max() <= 1
    assert not np.array_equal(a[0], sample(pipeline, PROMPTS[:1], seed=2, **kwargs)[0])
    same = sample(pipeline, [""] * 2, seed=1, **kwargs)
    assert not np.array_equal(same[0], same[1])


def test_an_untrained_transformer_gives_a_picture_not_nan(pipeline):
    def zero(x, *_):
        return torch.zeros_like(x)

    shape, noise = (1, 2, 2), torch.randn(4, 64)
    embeds = pipeline.embed_prompts(["", "a"])
    (x,) = denoise(pipeline, zero, embeds[:1], embeds[1:], [shape], [noise], num_steps=3, cfg_scale=4.0)
    assert torch.equal(x, noise)


def test_guidance_keeps_the_norm_of_each_token():
    cond, uncond = torch.randn(7, 64), torch.randn(7, 64)
    v = guide(cond, uncond, 5.0)
    torch.testing.assert_close(v.norm(dim=-1), cond.norm(dim=-1))
    straight = uncond + 5.0 * (cond - uncond)
    torch.testing.assert_close(torch.cosine_similarity(v, straight), torch.ones(7))
    torch.testing.assert_close(guide(cond, uncond, 1.0), cond)


def test_half_precision_samples(folder, pipeline):
    half = PIPELINES.get("qwen_image").from_pretrained(folder, dtype=torch.bfloat16)
    kwargs = {"height": 32, "width": 32, "num_steps": 4, "seed": 3}
    a, b = (np.asarray(sample(p, ["a red cat"], **kwargs)[0]).astype(float) for p in (pipeline, half))
    assert np.abs(a - b).mean() < 3


def test_to_pil_rounds():
    picture = torch.tensor([0.0, 0.5 / 255 + 1e-4, 1.0])[:, None, None].expand(3, 2, 4)
    image = to_pil(picture)
    assert image.size == (4, 2)
    assert image.getpixel((0, 0)) == (0, 1, 255)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"height": 40}, "height 40 .* multiples of 16"),
        ({"width": [32]}, "width has 1 entries for 2 prompts"),
        ({"negative_prompts": ["a"]}, "negative_prompts has 1 entries for 2 prompts"),
        ({"noise": [torch.zeros(4, 64)]}, "noise has 1 entries for 2 prompts"),
        ({"noise": [torch.zeros(4, 64), torch.zeros(16, 4, 4)]}, r"noise must be \[4, 64\] .* got \[16, 4, 4\]"),
        ({"cfg_scale": 0.5}, "cfg_scale must be at least 1"),
        ({"num_steps": 0}, "at least 1, got 0"),
    ],
)
def test_bad_requests_are_refused(pipeline, change, says):
    with pytest.raises(ConfigError, match=says):
        sample(pipeline, ["a", "b"], **{"height": 32, "width": 32, "num_steps": 1, **change})


def test_no_prompts_no_pictures(pipeline):
    assert sample(pipeline, [], height=32, width=32) == []

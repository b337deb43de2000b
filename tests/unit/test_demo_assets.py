"""The bundled demo: small enough to commit, licensed, tokenized as Qwen2.5 does, with a VAE that works."""

import functools
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "launch" / "demo"
MODEL = DEMO / "model"
PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"


@functools.cache
def samples() -> tuple[Tensor, list[str]]:
    """Return the demo's pictures over white, [N, 3, 64, 64] in [-1, 1], and their captions."""
    pictures, captions = {}, {}
    for shard in sorted((DEMO / "shards").glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, kind = Path(member.name).stem, Path(member.name).suffix
                data = tar.extractfile(member).read()
                if kind == ".txt":
                    captions[key] = data.decode().strip()
                elif kind == ".png":
                    picture = Image.open(io.BytesIO(data))
                    white = Image.new("RGBA", picture.size, "white")
                    pictures[key] = np.asarray(Image.alpha_composite(white, picture).convert("RGB"))
    assert pictures.keys() == captions.keys()
    stacked = torch.from_numpy(np.stack([pictures[key] for key in pictures]))  # [N, H, W, 3]
    return stacked.permute(0, 3, 1, 2) / 127.5 - 1, [captions[key] for key in pictures]


@pytest.fixture(scope="module")
def vae() -> AutoencoderKLQwenImage:
    return AutoencoderKLQwenImage.from_pretrained(MODEL / "vae", dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Qwen2Tokenizer:
    return Qwen2Tokenizer.from_pretrained(MODEL / "tokenizer")


@pytest.mark.parametrize(
    ("place", "limit"),
    [(".", 6e6), ("shards", 3e6), ("model/vae", 4e6), ("model/text_encoder", 1.5e6), ("model/tokenizer", 2e5)],
)
def test_size(place: str, limit: float) -> None:
    size = sum(path.stat().st_size for path in (DEMO / place).rglob("*") if path.is_file())
    assert 0 < size <= limit


def test_licences_are_named() -> None:
    text = (DEMO / "ATTRIBUTION.md").read_text()
    for name in ("Twemoji", "CC-BY 4.0", "creativecommons.org/licenses/by/4.0", "Qwen2.5", "Apache License 2.0"):
        assert name in text


def test_pictures_and_captions() -> None:
    pictures, captions = samples()
    assert pictures.shape == (256, 3, 64, 64)
    assert len(set(captions)) == len(captions)
    assert all(caption == caption.lower().strip() and len(caption) < 40 for caption in captions)


@pytest.mark.parametrize("load", [AutoTokenizer, Qwen2Tokenizer])
def test_tokenizer_cuts_like_qwen(load: type) -> None:
    tokenizer = load.from_pretrained(MODEL / "tokenizer")
    assert isinstance(tokenizer, Qwen2Tokenizer)
    assert len(tokenizer(PREFIX).input_ids) == 34
    pieces = tokenizer.convert_ids_to_tokens(tokenizer("a red apple" + SUFFIX).input_ids)
    assert pieces == ["a", "Ġred", "Ġapple", "<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ"]
    assert sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    assert tokenizer.pad_token == "<|endoftext|>"


@pytest.mark.parametrize("text", ["", " ", "Grüße, 漢字 🙂\n\t x", "<|im_end|>", "qzxv" * 50, "\x00\u200d"])
def test_any_text_survives_the_tokenizer(tokenizer: Qwen2Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_text_encoder_fits_the_tokenizer_and_tells_captions_apart(tokenizer: Qwen2Tokenizer) -> None:
    encoder = Qwen2_5_VLForConditionalGeneration.from_pretrained(MODEL / "text_encoder").eval()
    assert encoder.dtype == torch.float32  # as diffusers loads the other parts when no dtype is given
    assert encoder.config.text_config.vocab_size == len(tokenizer)
    for key, token in (("image", "<|image_pad|>"), ("video", "<|video_pad|>"), ("vision_start", "<|vision_start|>")):
        assert getattr(encoder.config, f"{key}_token_id") == tokenizer.convert_tokens_to_ids(token)
    prompts = [PREFIX + caption + SUFFIX for caption in samples()[1]]
    tokens = tokenizer(prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = encoder(**tokens, output_hidden_states=True).hidden_states[-1]
    flat = (hidden * tokens.attention_mask[..., None])[:, 34:].flatten(1)  # [N, T * 128]
    distance = torch.cdist(flat, flat) / flat.norm(dim=1).mean()
    assert distance.fill_diagonal_(torch.inf).min() > 0.3


@torch.no_grad()
def test_vae_reconstructs_pictures_it_was_not_trained_on(vae: AutoencoderKLQwenImage) -> None:
    pictures = samples()[0][::8]
    latents = vae.encode(pictures[:, :, None]).latent_dist.mode()  # [N, 16, 1, 8, 8]
    decoded = vae.decode(latents).sample[:, :, 0]
    psnr = -10 * ((decoded - pictures) / 2).square().mean(dim=(1, 2, 3)).log10()
    stated = json.loads((ROOT / "benchmarks" / "demo_assets" / "results.json").read_text())["vae"]
    assert stated["held_out"]["pictures"] >= 200 and stated["held_out"]["psnr_db"] >= 27
    assert psnr.mean() > 27
    assert abs(psnr.mean() - stated["demo"]["psnr_db"]) < 2  # 32 of the 256 pictures

    mean = torch.tensor(vae.config.latents_mean).view(1, 16, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, 16, 1, 1, 1)
    normalised = (latents - mean) / std
    channels = normalised.std(dim=(0, 2, 3, 4))
    assert channels.min() > 0.7 and channels.max() < 1.4
    assert normalised.mean(dim=(0, 2, 3, 4)).abs().max() < 0.5


@torch.no_grad()
def test_vae_decoder_tolerates_latent_noise(vae: AutoencoderKLQwenImage) -> None:
    pictures = samples()[0][::16]
    latents = vae.encode(pictures[:, :, None]).latent_dist.mode()
    std = torch.tensor(vae.config.latents_std).view(1, 16, 1, 1, 1)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    decoded = vae.decode(latents + 0.1 * std * noise).sample[:, :, 0]
    assert -10 * ((decoded - pictures) / 2).square().mean().log10() > 24


def test_parts_fit_together(vae: AutoencoderKLQwenImage) -> None:
    index = json.loads((MODEL / "model_index.json").read_text())
    assert index["_class_name"] == "QwenImagePipeline" and index["tokenizer"] == ["transformers", "Qwen2Tokenizer"]
    config = QwenImageTransformer2DModel.load_config(MODEL / "transformer")
    assert config["in_channels"] == 4 * vae.config.z_dim and config["out_channels"] == vae.config.z_dim
    encoder = json.loads((MODEL / "text_encoder" / "config.json").read_text())
    assert config["joint_attention_dim"] == encoder["text_config"]["hidden_size"]
    assert sum(config["axes_dims_rope"]) == config["attention_head_dim"]
    assert [path.name for path in (MODEL / "transformer").iterdir()] == ["config.json"]
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(MODEL / "scheduler")
    assert scheduler.config.shift_terminal == 0.02 and scheduler.config.use_dynamic_shifting
    assert scheduler.config.max_shift == 0.9 and scheduler.config.max_image_seq_len == 8192


def test_vae_weights_that_a_picture_cannot_reach_are_zero() -> None:
    weights = load_file(MODEL / "vae" / "diffusion_pytorch_model.safetensors")
    causal = [weight for weight in weights.values() if weight.dim() == 5 and weight.shape[2] == 3]
    assert causal and all(not weight[:, :, :-1].any() for weight in causal)

"""Qwen-Image, text to picture (technical report: arXiv 2508.02324).

The prompt template, the 34 tokens dropped from its front and the patch order are those of the published checkpoint.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from dstrain.errors import CheckpointError, ConfigError
from dstrain.models.packing import PackLayout, Shape
from dstrain.models.qwen_image import QwenImageDiT, QwenImageParams
from dstrain.pipelines.base import PIPELINES, Condition, Encoded, Pipeline
from dstrain.pipelines.components import (
    UNUSED_BY_TEXT,
    check_qwen_image_vae,
    load_qwen_image_vae,
    load_qwen_text_encoder,
    load_scheduler_config,
    load_tokenizer,
    read_json,
)
from dstrain.pipelines.unit import Unit
from dstrain.pipelines.units import CheckShape, DropPrompt, TokenShape

PREFIX = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial"
    " relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"
PREFIX_TOKENS = 34
MAX_PROMPT_TOKENS = 1024
PIXELS_PER_TOKEN = 16  # the VAE's 8 times the patch's 2, in each direction


def patchify(latents: Tensor) -> Tensor:
    """[C, h, w] -> [h/2 * w/2, 4 C]; a token holds (C, 2, 2) in this order."""
    c, h, w = latents.shape
    return latents.view(c, h // 2, 2, w // 2, 2).permute(1, 3, 0, 2, 4).reshape(h // 2 * (w // 2), 4 * c)


def unpatchify(tokens: Tensor, shape: Shape) -> Tensor:
    """[h * w, 4 C] of a picture of `shape` (1, h, w) -> [C, 2 h, 2 w]."""
    _, h, w = shape
    return tokens.view(h, w, -1, 2, 2).permute(2, 0, 3, 1, 4).reshape(-1, 2 * h, 2 * w)


class EncodePrompt(Unit):
    """Prompts to the last hidden states of the text encoder.

    One by one, each distinct text once: an embedding never depends on its neighbours in the batch, not even by
    rounding.
    """

    inputs = ("prompt",)
    outputs = ("prompt_embeds",)
    models = ("text_encoder",)

    def __call__(self, pipeline: "QwenImagePipeline", prompt: list[str]) -> dict[str, list[Any]]:
        """prompt: one text each -> prompt_embeds: [T_i, d] each."""
        embeds = {text: self._embed(pipeline, text) for text in dict.fromkeys(prompt)}
        return {"prompt_embeds": [embeds[text] for text in prompt]}

    def _embed(self, pipeline: "QwenImagePipeline", text: str) -> Tensor:
        tokens = pipeline.tokenizer(
            PREFIX + text + SUFFIX, max_length=PREFIX_TOKENS + MAX_PROMPT_TOKENS, truncation=True, return_tensors="pt"
        )
        ids = tokens.input_ids.to(pipeline.device)  # [1, L]
        hidden = pipeline.text_encoder(input_ids=ids, use_cache=False).last_hidden_state
        return hidden[0, PREFIX_TOKENS:]


class EncodeNullPrompt(Unit):
    """The embedding of the empty prompt, for samples that train without theirs."""

    inputs = ("prompt",)
    outputs = ("null_embeds",)
    models = ("text_encoder",)

    def __init__(self) -> None:
        self._embeds: list[Tensor] = []  # made once: also where prompts vary, so that this runs for every pack

    def __call__(self, pipeline: "QwenImagePipeline", prompt: list[str]) -> dict[str, list[Any]]:
        """prompt: as many entries as samples -> null_embeds: the same [T, d] for each."""
        self._embeds = self._embeds or pipeline.embed_prompts([""])
        return {"null_embeds": self._embeds * len(prompt)}


class EncodeImage(Unit):
    """Pictures to normalised latents: the mean of the VAE's posterior, patchified. One by one, as the prompts are."""

    inputs = ("image",)
    outputs = ("latents",)
    models = ("vae",)

    def __call__(self, pipeline: "QwenImagePipeline", image: list[Tensor]) -> dict[str, list[Any]]:
        """image: uint8 [3, H, W] each -> latents: fp32 [H/16 * W/16, 64] each."""
        mean, std = pipeline.latent_stats
        latents = []
        for picture in image:
            x = picture.to(pipeline.device, non_blocking=True).float() / 127.5 - 1
            z = pipeline.vae.encode(x.to(pipeline.vae.dtype)[None, :, None]).latent_dist.mode()  # [1, C, 1, h, w]
            latents.append(patchify((z[0, :, 0].float() - mean) / std))
        return {"latents": latents}


def load_qwen_tokenizer(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a Qwen2 tokenizer; CheckpointError if it splits the prompt template otherwise: the wrong tokens would go."""
    tokenizer = load_tokenizer(folder, dtype, device)
    if (count := len(tokenizer(PREFIX).input_ids)) != PREFIX_TOKENS:
        raise CheckpointError(
            f"{folder}: splits the front of Qwen-Image's prompt template into {count} tokens, not {PREFIX_TOKENS};"
            " it is not a Qwen2 tokenizer"
        )
    return tokenizer


@PIPELINES.register("qwen_image")
class QwenImagePipeline(Pipeline):
    """Text to picture with Qwen-Image."""

    class_name = "QwenImagePipeline"
    loaders: ClassVar = {
        "vae": load_qwen_image_vae,
        "text_encoder": load_qwen_text_encoder,
        "tokenizer": load_qwen_tokenizer,
        "scheduler": load_scheduler_config,
    }
    unused: ClassVar = {"text_encoder": UNUSED_BY_TEXT}
    given = ("image", "prompt", "draw")
    token_channels = 64

    def units(self, caption_dropout: float, seed: int) -> list[Unit]:
        """Sizes and shapes, latents, embeddings of prompt and no prompt, and the choice between them."""
        return [
            CheckShape(PIXELS_PER_TOKEN),
            TokenShape(),
            EncodeImage(),
            EncodePrompt(),
            EncodeNullPrompt(),
            DropPrompt(caption_dropout, seed),
        ]

    def build_transformer(self) -> QwenImageDiT:
        """Build the DiT of `transformer/config.json`."""
        path = self.folder("transformer") / "config.json"
        return QwenImageDiT(QwenImageParams.from_config(read_json(path), str(path)), gelu=self.gelu)

    def check_fit(self) -> None:
        """Compare widths: prompt embeddings, and latent channels of a 2 x 2 patch."""
        configs = {name: self.folder(name) / "config.json" for name in ("transformer", "text_encoder", "vae")}
        values = {name: read_json(path) for name, path in configs.items()}
        params = QwenImageParams.from_config(values["transformer"], str(configs["transformer"]))
        text = values["text_encoder"]
        hidden = text.get("text_config", {}).get("hidden_size", text.get("hidden_size"))
        for found, wanted, name, key, other in (
            (hidden, params.joint_attention_dim, "text_encoder", "hidden_size", "joint_attention_dim"),
            (values["vae"].get("z_dim", 16) * 4, params.in_channels, "vae", "z_dim x 4", "in_channels"),
        ):
            if found != wanted:
                raise CheckpointError(
                    f"{configs[name]}: {key} {found} does not fit the transformer's {other} {wanted};"
                    " they are of different models"
                )
        for key in ("latents_mean", "latents_std"):
            stats, channels = values["vae"].get(key), values["vae"].get("z_dim", 16)
            fits = isinstance(stats, list) and len(stats) == channels
            if not fits or (key == "latents_std" and min(stats or [0]) <= 0):
                raise CheckpointError(
                    f"{configs['vae']}: {key} must be one number a latent channel (std > 0): {stats!r}"
                )
        check_qwen_image_vae(self.folder("vae"))

    def encoded_fault(self, columns: Mapping[str, Any]) -> str:
        """Latents fp32 [H/16 * W/16, 64], embeddings [T, d] of a text, as long as this model's encoders make them."""
        if missing := [name for name in self.made if name not in columns]:
            return f"it has no {' and no '.join(missing)}"
        latents = columns["latents"]
        shape = (prod(self.shape_of(columns["height"], columns["width"])), self.token_channels)
        if latents.shape != shape or latents.dtype != torch.float32:
            return f"latents are {latents.dtype} {list(latents.shape)}, not fp32 {list(shape)}"
        for name in ("prompt_embeds", "null_embeds"):
            embeds = columns[name]
            if embeds.ndim != 2 or len(embeds) > MAX_PROMPT_TOKENS or embeds.shape[1] != self._text_width:
                return f"{name} are {list(embeds.shape)}, not [at most {MAX_PROMPT_TOKENS}, {self._text_width}]"
        return ""

    @cached_property
    def _text_width(self) -> int:
        path = self.folder("transformer") / "config.json"
        return QwenImageParams.from_config(read_json(path), str(path)).joint_attention_dim

    @cached_property
    def latent_stats(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the VAE's latents, [C, 1, 1] fp32 each."""
        stats = (self.vae.config.latents_mean, self.vae.config.latents_std)
        mean, std = (torch.tensor(s, dtype=torch.float32, device=self.device)[:, None, None] for s in stats)
        return mean, std

    def pack(self, encoded: Mapping[str, list[Any]]) -> Encoded:
        """Pack `latents`, `image_shape` and `condition_embeds` of a batch."""
        condition = self.condition(encoded["condition_embeds"], encoded["image_shape"])
        x0 = torch.cat([x.to(self.device, torch.float32) for x in encoded["latents"]])  # [I, 64]
        return Encoded(condition.prompt_embeds, condition.layout, x0)

    def condition(self, prompt_embeds: Sequence[Tensor], shapes: Sequence[Shape]) -> Condition:
        """prompt_embeds [T_i, d] and shapes (1, h, w), one of each a sample."""
        layout = PackLayout.build([[s] for s in shapes], [len(e) for e in prompt_embeds], self.device)
        return Condition(torch.cat([e.to(self.device) for e in prompt_embeds]), layout)

    def velocity(self, transformer: Callable[..., Tensor], x_t: Tensor, sigmas: Tensor, condition: Condition) -> Tensor:
        """x_t [I, 64], sigmas [N] fp32 -> [I, 64] fp32."""
        return transformer(x_t, condition.prompt_embeds, sigmas, condition.layout).float()

    def embed_prompts(self, prompts: list[str]) -> list[Tensor]:
        """Embed prompts, [T_i, d] each."""
        with self.using("text_encoder"):
            return EncodePrompt()(self, prompts)["prompt_embeds"]

    def shape_of(self, height: int, width: int) -> Shape:
        """Pixels to tokens; ConfigError unless both are positive multiples of 16."""
        if height % PIXELS_PER_TOKEN or width % PIXELS_PER_TOKEN or min(height, width) < PIXELS_PER_TOKEN:
            raise ConfigError(
                f"height {height} and width {width} must be positive multiples of {PIXELS_PER_TOKEN} pixels"
            )
        return 1, height // PIXELS_PER_TOKEN, width // PIXELS_PER_TOKEN

    def decode(self, latents: Tensor, shape: Shape) -> Tensor:
        """latents [h * w, 64] of shape (1, h, w) -> [3, 16 h, 16 w] fp32 in [0, 1]."""
        assert len(latents) == prod(shape), (latents.shape, shape)
        mean, std = self.latent_stats
        z = unpatchify(latents.float(), shape) * std + mean  # [C, 2 h, 2 w]
        with self.using("vae"):
            picture = self.vae.decode(z.to(self.vae.dtype)[None, :, None]).sample[0, :, 0]
        return (picture.float() / 2 + 0.5).clamp(0, 1)

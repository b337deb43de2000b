"""Units that families share."""

from typing import Any

import torch
from torch import Tensor

from dstrain import rng
from dstrain.errors import DataError
from dstrain.pipelines.unit import Unit


class CheckShape(Unit):
    """Refuse pictures that the latents cannot hold, and tell the size of the others, in pixels."""

    inputs = ("image",)
    outputs = ("height", "width")

    def __init__(self, multiple: int = 16) -> None:
        self.multiple = multiple

    def __call__(self, pipeline: Any, image: list[Tensor]) -> dict[str, list[Any]]:
        """image: uint8 [3, H, W] each."""
        for i, picture in enumerate(image):
            if picture.dtype != torch.uint8 or picture.ndim != 3 or len(picture) != 3:
                raise DataError(
                    f"sample {i} of the batch: a picture must be uint8 [3, H, W],"
                    f" got {picture.dtype} {list(picture.shape)}"
                )
            height, width = picture.shape[1:]
            if height % self.multiple or width % self.multiple or not height * width:
                raise DataError(
                    f"sample {i} of the batch: the picture is {height} x {width} pixels (height x width);"
                    f" both must be multiples of {self.multiple}"
                )
        return {"height": [p.shape[1] for p in image], "width": [p.shape[2] for p in image]}


class TokenShape(Unit):
    """The shape of a picture in tokens, from its size in pixels."""

    inputs = ("height", "width")
    outputs = ("image_shape",)

    def __call__(self, pipeline: Any, height: list[int], width: list[int]) -> dict[str, list[Any]]:
        """height, width: pixels of each -> image_shape: (frames, height, width) each."""
        return {"image_shape": [pipeline.shape_of(h, w) for h, w in zip(height, width, strict=True)]}


class DropPrompt(Unit):
    """Classifier-free guidance (Ho & Salimans, arXiv 2207.12598): now and then a sample trains without its prompt.

    It chooses between embeddings, after the encoder, so that what the encoder made can be stored and used again:
    the choice is made anew for every draw, by counter-based randomness.
    """

    inputs = ("prompt_embeds", "null_embeds", "draw")
    outputs = ("condition_embeds",)

    def __init__(self, probability: float, seed: int) -> None:
        self.probability, self.seed = probability, seed

    def __call__(
        self, pipeline: Any, prompt_embeds: list[Tensor], null_embeds: list[Tensor], draw: list[int]
    ) -> dict[str, list[Any]]:
        """prompt_embeds, null_embeds: [T_i, d] each; draw: the running number of each sample in the global order."""
        coins = rng.uniform(self.seed, rng.Purpose.CAPTION_DROPOUT, torch.tensor(draw, dtype=torch.int64))
        chosen = [
            null if coin < self.probability else prompt
            for prompt, null, coin in zip(prompt_embeds, null_embeds, coins.tolist(), strict=True)
        ]
        return {"condition_embeds": chosen}

"""The size that a picture or clip is trained at, from the size that it is stored at."""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dstrain.errors import ConfigError

MULTIPLE = 16  # pixels a token: the VAE divides each side by 8, the DiT's patches by 2
Fit = Literal["scale", "crop"]


@dataclass(frozen=True)
class Resolution:
    """Which pictures are used, and how large. All in pixels; nothing is enlarged unless `upscale` says so.

    Without `width` and `height` the aspect ratio is kept: a picture over `max_pixels` is brought down to it, one under
    `min_pixels` is left out, or enlarged to it with `upscale`; each side is cut to a multiple of 16. With both, every
    picture is brought to exactly that size, and one that does not cover it is left out unless `upscale`.
    fit: "scale" resizes the whole picture, "crop" cuts a window of the target size at full resolution.
    Raises ConfigError for sizes that no picture can have.
    """

    max_pixels: int = 1 << 20
    min_pixels: int = MULTIPLE * MULTIPLE
    width: int = 0
    height: int = 0
    fit: Fit = "scale"
    upscale: bool = False

    def __post_init__(self) -> None:
        if self.max_pixels < MULTIPLE * MULTIPLE:
            raise ConfigError(f"max_pixels = {self.max_pixels} is less than one token; give at least {MULTIPLE**2}")
        if self.min_pixels > self.max_pixels:
            raise ConfigError(f"min_pixels = {self.min_pixels} is more than max_pixels = {self.max_pixels}")
        if (self.width > 0) != (self.height > 0) or self.width % MULTIPLE or self.height % MULTIPLE:
            raise ConfigError(
                f"width = {self.width} and height = {self.height}: give both, as multiples of {MULTIPLE}, or neither"
            )

    def sizes(self, widths: np.ndarray, heights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the target size of each picture: widths and heights, int64 [n]; 0 where it cannot be used.

        Integer arithmetic, so that the planner and the decoder agree on every machine.
        """
        w, h = widths.astype(np.int64), heights.astype(np.int64)
        if self.width:
            usable = ((w >= self.width) & (h >= self.height)) | (self.upscale & (w > 0) & (h > 0))
            return np.where(usable, self.width, 0), np.where(usable, self.height, 0)
        area = w * h
        pixels = np.minimum(area, self.max_pixels)
        if self.upscale:
            pixels = np.where(area > 0, np.maximum(pixels, self.min_pixels), 0)
        else:
            pixels[area < self.min_pixels] = 0
        # w * sqrt(pixels / (w * h)) = sqrt(w * pixels / h); float64 floors exact squares right below 2^52
        width, height = (
            np.where(pixels == area, a, np.sqrt(a * pixels // np.maximum(b, 1)).astype(np.int64))
            for a, b in ((w, h), (h, w))
        )
        width, height = width // MULTIPLE * MULTIPLE, height // MULTIPLE * MULTIPLE
        usable = (width > 0) & (height > 0)
        return np.where(usable, width, 0), np.where(usable, height, 0)

    def keeps(self, widths: np.ndarray, heights: np.ndarray) -> np.ndarray:
        """Whether sizes that pictures have been brought to already can stay, bool [n]."""
        if self.width:
            return (widths == self.width) & (heights == self.height)
        return widths.astype(np.int64) * heights <= self.max_pixels

    def takes_all(self, min_side: int, min_pixels: int, max_pixels: int) -> bool:
        """Whether no picture within these bounds can be left out; False where that would need a look at each."""
        if self.width:
            return min_side >= max(self.width, self.height) or (self.upscale and min_side > 0)
        shrink = min(1.0, (self.max_pixels / max(max_pixels, 1)) ** 0.5)
        return min_pixels >= self.min_pixels and min_side * shrink >= MULTIPLE + 1

    def most_pixels(self, max_pixels: int) -> int:
        """Return a bound on the target size of pictures of at most `max_pixels`."""
        if self.width:
            return self.width * self.height
        return min(self.max_pixels, max(max_pixels, self.min_pixels if self.upscale else 0))


def colour(text: str) -> tuple[int, int, int]:
    """Read "white", "black", "grey" or "#rrggbb" as RGB; ConfigError for anything else."""
    named = {"white": "#ffffff", "black": "#000000", "grey": "#808080", "gray": "#808080"}
    digits = named.get(text.lower(), text)
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", digits):
        raise ConfigError(f"background = {text!r} is not a colour; give white, black, grey or #rrggbb")
    value = int(digits[1:], 16)
    return value >> 16, value >> 8 & 255, value & 255

"""Pictures in another format, quality or size, for shards that are smaller or faster to decode."""

import io
from dataclasses import dataclass
from typing import Literal

from PIL import Image

from dstrain.data.media.decode import UPRIGHT, load_rgb
from dstrain.data.media.probe import Header
from dstrain.data.reasons import BadSample, Reason
from dstrain.errors import ConfigError

FORMATS = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}  # extension -> as Pillow and `Header.format` call it
_MAX_WEBP_SIDE = 16383  # 14 bits, WebP container specification


@dataclass(frozen=True)
class Reencode:
    """How pictures are stored. format: None keeps each one's own. quality: of jpg and webp, 1 to 100.

    max_side: the longest side in pixels; larger pictures are scaled down, none is scaled up; 0 leaves sizes alone.
    Without a format, pictures that are not larger stay byte for byte as they are.
    """

    format: Literal["jpg", "png", "webp"] | None = None
    quality: int = 95
    max_side: int = 0

    def __post_init__(self) -> None:
        if self.format is None and not self.max_side:
            raise ConfigError("nothing to re-encode: give a format, a longest side, or both")
        if not 1 <= self.quality <= 100:
            raise ConfigError(f"quality must be from 1 to 100, not {self.quality}")
        if self.max_side < 0:
            raise ConfigError(f"the longest side must be positive, not {self.max_side}")

    def __call__(self, data: bytes, header: Header) -> bytes:
        """Return a probed picture re-encoded: upright, without metadata; equal input gives equal bytes.

        Transparency is kept in png and webp, and put over white in jpg. Raises BadSample if it cannot be decoded.
        """
        target = FORMATS[self.format] if self.format else header.format
        size = self._size(header)
        if self.format is None and size == header.size:
            load_rgb(data, header)  # proves it good
            return data
        if target == "WEBP" and max(size) > _MAX_WEBP_SIDE:
            raise BadSample(
                Reason.IMAGE_TOO_LARGE, f"{size[0]} x {size[1]} pixels, and webp holds {_MAX_WEBP_SIDE} a side"
            )
        image = _load(data, header, alpha=target != "JPEG")
        stored = size[::-1] if header.turned else size
        if image.size != stored:
            image = image.resize(stored, Image.Resampling.LANCZOS)
        if header.orientation in UPRIGHT:
            image = image.transpose(UPRIGHT[header.orientation])
        return _save(image, target, self.quality)

    def _size(self, header: Header) -> tuple[int, int]:
        width, height = header.size
        longest = max(width, height)
        if not 0 < self.max_side < longest:
            return width, height
        short = max(1, (2 * min(width, height) * self.max_side + longest) // (2 * longest))  # rounded
        return (self.max_side, short) if width == longest else (short, self.max_side)


def _load(data: bytes, header: Header, *, alpha: bool) -> Image.Image:
    """Decode to RGB, or to RGBA if there is transparency and `alpha` wants it; as stored, not upright."""
    image = load_rgb(data, header)
    if alpha and header.format != "JPEG":
        with Image.open(io.BytesIO(data), formats=[header.format]) as stored:
            if stored.has_transparency_data and not stored.mode.startswith(
                "I"
            ):  # 16-bit grey has a conversion of its own
                image = stored.convert("RGBA")
    return image


def _save(image: Image.Image, target: str, quality: int) -> bytes:
    image.info.clear()  # Pillow would write colour profiles and comments from there
    buffer = io.BytesIO()
    image.save(buffer, target, **({} if target == "PNG" else {"quality": quality}))
    return buffer.getvalue()

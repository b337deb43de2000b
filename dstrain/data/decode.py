"""From the bytes of a picture to RGB pixels of the size that the plan counted on."""

import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dstrain.data.probe import Header, probe
from dstrain.data.reasons import BadSample, Reason

MULTIPLE = 16  # pixels a token: the VAE divides each side by 8, the DiT's patches by 2

_UPRIGHT = {  # EXIF orientation -> what makes the stored picture upright (EXIF 2.3, tag 0x0112)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def target_sizes(widths: np.ndarray, heights: np.ndarray, max_pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the size that each picture is trained at: widths and heights in pixels, int64 [n].

    The aspect ratio is kept, a picture over `max_pixels` is scaled down to it, nothing is scaled up, and each side is
    cut to a multiple of 16. A side of 0 means that the picture is too small or too narrow to be used.
    Integer arithmetic, so that the planner and the decoder agree on every machine.
    """
    widths, heights = widths.astype(np.int64), heights.astype(np.int64)
    fits = widths * heights <= max_pixels
    # w * sqrt(max_pixels / (w * h)) = sqrt(w * max_pixels / h); float64 floors exact squares right below 2^52
    scaled = [np.sqrt(a * max_pixels // b).astype(np.int64) for a, b in ((widths, heights), (heights, widths))]
    width, height = np.where(fits, widths, scaled[0]), np.where(fits, heights, scaled[1])
    return width // MULTIPLE * MULTIPLE, height // MULTIPLE * MULTIPLE


def target_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Return (width, height) in pixels that one picture is trained at; raises BadSample if it is too small."""
    widths, heights = target_sizes(np.array([width]), np.array([height]), max_pixels)
    if not widths[0] or not heights[0]:
        raise BadSample(
            Reason.IMAGE_TOO_SMALL,
            f"{width} x {height} pixels have a side under {MULTIPLE} within {max_pixels} pixels in all",
        )
    return int(widths[0]), int(heights[0])


def decode(data: bytes, max_pixels: int) -> Tensor:
    """Decode a PNG, JPEG or WEBP file to uint8 RGB [3, H, W], H and W as `target_size` says.

    Upright by its EXIF orientation, alpha over white, the first frame of an animation. It is resized by the least
    that covers the target, and the centre is kept: less than 16 pixels of the scaled picture are cut away.
    Raises BadSample if the picture is damaged, of another format, or over the limits of `probe`.
    """
    header = probe(data)
    width, height = target_size(*header.size, max_pixels)
    if header.turned:
        width, height = height, width
    image = _cover(load_rgb(data, header), width, height)
    if header.orientation in _UPRIGHT:
        image = image.transpose(_UPRIGHT[header.orientation])
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # [3, H, W]


def load_rgb(data: bytes, header: Header) -> Image.Image:
    """Decode all pixels of a probed picture to mode RGB, as stored (not yet upright); raises BadSample."""
    try:
        with Image.open(io.BytesIO(data), formats=[header.format]) as image:
            if image.size != (header.width, header.height):
                raise BadSample(Reason.IMAGE_DAMAGED, f"its parts disagree about its size: {image.size}")
            image.load()
            return _to_rgb(image)
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # Pillow lets OSError, SyntaxError, ValueError, struct.error and more through
        raise BadSample(Reason.IMAGE_DAMAGED, f"it cannot be decoded: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255
        grey = np.array(image)
        if isinstance(image.info.get("transparency"), int):
            grey[grey == image.info["transparency"]] = 65535
        return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """Scale by the least that covers width x height, keeping the centre; one pass of the resampler."""
    scale = max(width / image.width, height / image.height)
    if scale == 1:  # whole pixels, no resampling
        x, y = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((x, y, x + width, y + height))
    kept_width, kept_height = min(width / scale, image.width), min(height / scale, image.height)
    left, top = (image.width - kept_width) / 2, (image.height - kept_height) / 2
    box = (left, top, left + kept_width, top + kept_height)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)

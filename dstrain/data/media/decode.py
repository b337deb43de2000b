"""From the bytes of a picture to RGB pixels of the size that the plan counted on.

JPEGs are decoded by libjpeg-turbo, whose warnings about damage Pillow does not pass on; PNG, WEBP and CMYK by Pillow.
Pixels are resized by PyTorch's antialiased bicubic filter on uint8, in a fifth of the time that Pillow's Lanczos takes
and 40 to 60 dB from Lanczos in fp64 on photographs.
"""

import io
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from dstrain.data.media.probe import Header, probe
from dstrain.data.media.resolution import MULTIPLE, Fit
from dstrain.data.reasons import BadSample, Reason

RGB = tuple[int, int, int]
WHITE: RGB = (255, 255, 255)
_KEPT = 2  # of a side that is cut, at most this many times what is kept is resized


@dataclass(frozen=True, slots=True)
class Place:
    """Where the window lies in what is cut away: 0 at the left or top, 1 at the right or bottom, 0.5 in the centre."""

    x: float = 0.5
    y: float = 0.5


CENTRE = Place()


_T = Image.Transpose
UPRIGHT = {  # EXIF orientation -> what makes the stored picture upright (EXIF 2.3, tag 0x0112)
    2: _T.FLIP_LEFT_RIGHT,
    3: _T.ROTATE_180,
    4: _T.FLIP_TOP_BOTTOM,
    5: _T.TRANSPOSE,
    6: _T.ROTATE_270,
    7: _T.TRANSVERSE,
    8: _T.ROTATE_90,
}
# The same as mirrored axes of what is stored, then an exchange of the axes.
_MIRROR_X = frozenset({_T.FLIP_LEFT_RIGHT, _T.ROTATE_180, _T.ROTATE_90, _T.TRANSVERSE})
_MIRROR_Y = frozenset({_T.FLIP_TOP_BOTTOM, _T.ROTATE_180, _T.ROTATE_270, _T.TRANSVERSE})
EXCHANGED = frozenset({_T.TRANSPOSE, _T.ROTATE_270, _T.ROTATE_90, _T.TRANSVERSE})


def decode(
    data: bytes,
    size: tuple[int, int],
    *,
    fit: Fit = "scale",
    place: Place = CENTRE,
    background: RGB = WHITE,
    flip: bool = False,
) -> Tensor:
    """Decode a PNG, JPEG or WEBP file to uint8 RGB [3, H, W] where `size` is (W, H); its memory may be channels-last.

    Upright by its EXIF orientation, alpha over `background`, the first frame of an animation, colour profiles ignored.
    fit: "scale" resizes by the least that covers the size and cuts a window out of that; "crop" cuts it out as it is,
    as "scale" does where less than 16 pixels are cut from each side.
    flip: mirrored, left to right, in the end.
    Raises BadSample if the picture is damaged, of another format, over the limits of `probe`, or too small to crop.
    """
    header = probe(data)
    pixels = _load(data, header, background)
    planes = shape(pixels, size, fit, place, UPRIGHT.get(header.orientation), flip)
    # a copy, lest it keep the whole picture; mirrored, the order of memory makes it slow
    return torch.from_numpy(planes.copy(order="C" if min(planes.strides) < 0 else "K"))


def shape(
    pixels: np.ndarray,
    size: tuple[int, int],
    fit: Fit,
    place: Place,
    turn: Image.Transpose | None = None,
    flip: bool = False,
) -> np.ndarray:
    """Turn, resize, cut and mirror uint8 pixels [h, w, 3] as `decode` does; returns uint8 [3, H, W], often a view."""
    planes = _upright(pixels.transpose(2, 0, 1), turn)  # [3, h, w]
    h, w = planes.shape[1:]
    if fit == "scale" and not (0 <= w - size[0] < MULTIPLE and 0 <= h - size[1] < MULTIPLE):
        planes = _cover(planes, *size, place, turn)
    planes = _cut(planes, *size, place)
    return planes[:, :, ::-1] if flip else planes


def load_rgb(data: bytes, header: Header, background: RGB = WHITE) -> Image.Image:
    """Decode all pixels of a probed picture to mode RGB, as stored (not yet upright); raises BadSample."""
    return Image.fromarray(_load(data, header, background))


def _load(data: bytes, header: Header, background: RGB) -> np.ndarray:
    """Decode to uint8 [h, w, 3]."""
    try:
        if header.format != "JPEG":
            return _pillow(data, header, background)
        if header.components == 4:
            simplejpeg.decode_jpeg(data, "CMYK")  # only to see damage; Pillow knows whose inks are inverted
            return _pillow(data, header, background)
        pixels = simplejpeg.decode_jpeg(data, "RGB")  # at full size: scaled by its own means, textures differ visibly
        if pixels.shape != (header.height, header.width, 3):
            raise BadSample(Reason.IMAGE_DAMAGED, f"its parts disagree about its size: {pixels.shape[1::-1]}")
        return pixels
    except (BadSample, MemoryError):
        raise
    except Exception as error:  # Pillow lets OSError, SyntaxError, ValueError, struct.error and more through
        reason = Reason.IMAGE_FORMAT if "subsampling" in str(error) else Reason.IMAGE_DAMAGED
        raise BadSample(reason, f"it cannot be decoded: {error}") from error


def _pillow(data: bytes, header: Header, background: RGB) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=[header.format]) as image:
        if image.size != (header.width, header.height):
            raise BadSample(Reason.IMAGE_DAMAGED, f"its parts disagree about its size: {image.size}")
        image.load()
        return np.array(_to_rgb(image, background))


def _to_rgb(image: Image.Image, background: RGB) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips at 255
        grey = np.array(image)
        pixels = np.repeat((grey >> 8).astype(np.uint8)[..., None], 3, axis=2)
        if isinstance(image.info.get("transparency"), int):
            pixels[grey == image.info["transparency"]] = background
        return Image.fromarray(pixels)
    if image.has_transparency_data:
        below = Image.new("RGBA", image.size, background)
        return Image.alpha_composite(below, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")


def _upright(planes: np.ndarray, turn: Image.Transpose | None) -> np.ndarray:
    planes = planes[:, :: -1 if turn in _MIRROR_Y else 1, :: -1 if turn in _MIRROR_X else 1]
    return planes.transpose(0, 2, 1) if turn in EXCHANGED else planes


def _as_stored(planes: np.ndarray, turn: Image.Transpose | None) -> np.ndarray:
    planes = planes.transpose(0, 2, 1) if turn in EXCHANGED else planes
    return planes[:, :: -1 if turn in _MIRROR_Y else 1, :: -1 if turn in _MIRROR_X else 1]


def _cover(planes: np.ndarray, width: int, height: int, place: Place, turn: Image.Transpose | None) -> np.ndarray:
    """Resize [3, h, w] by the least that covers width x height; where far more would be cut, it is cut before."""
    h, w = planes.shape[1:]
    planes = _cut(planes, min(w, -(-_KEPT * width * h // height)), min(h, -(-_KEPT * height * w // width)), place)
    h, w = planes.shape[1:]
    # the side that binds is exact, the other is rounded to whole pixels
    cover = (max(height, (2 * h * width + w) // (2 * w)), width)
    if width * h < height * w:
        cover = (height, max(width, (2 * w * height + h) // (2 * h)))
    if cover == (h, w):
        return planes
    stored = torch.from_numpy(_as_stored(planes, turn))[None]  # [1, 3, ...]: PyTorch has no negative strides
    stored_cover = cover[::-1] if turn in EXCHANGED else cover
    resized = torch.nn.functional.interpolate(stored, size=stored_cover, mode="bicubic", antialias=True)
    return _upright(resized[0].numpy(), turn)


def _cut(planes: np.ndarray, width: int, height: int, place: Place) -> np.ndarray:
    """Return a window of [3, h, w]; each of its possible places has the same share of [0, 1)."""
    h, w = planes.shape[1:]
    if h < height or w < width:
        raise BadSample(Reason.CHANGED, f"a picture of {w} x {h} pixels has no window of {width} x {height}")
    y, x = min(int(place.y * (h - height + 1)), h - height), min(int(place.x * (w - width + 1)), w - width)
    return planes[:, y : y + height, x : x + width]

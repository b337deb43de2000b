"""Pictures of every kind become the right RGB pixels, or are refused with the right reason."""

import io
import random
import struct
import zlib
from itertools import product

import matplotlib.cbook
import numpy as np
import pytest
import torch
from data_samples import image_bytes, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor

from dstrain.data.media.decode import CENTRE, Place, decode, load_rgb
from dstrain.data.media.probe import MAX_IMAGE_BYTES, MAX_JPEG_SCANS, probe
from dstrain.data.media.resolution import Resolution
from dstrain.data.reasons import BadSample, Reason

LEFT, RIGHT, TOP, BOTTOM = Place(0.0), Place(1.0), Place(y=0.0), Place(y=1.0)


def target(data: bytes, max_pixels: int = 1 << 20) -> tuple[int, int]:
    """The size that a picture is trained at."""
    width, height = probe(data).size
    w, h = Resolution(max_pixels).sizes(np.array([width]), np.array([height]))
    return int(w[0]), int(h[0])


def decoded(data: bytes, max_pixels: int = 1 << 20) -> Tensor:
    return decode(data, target(data, max_pixels))


def refused(data: bytes) -> Reason:
    with pytest.raises(BadSample) as error:
        decode(data, (16, 16))
    return error.value.reason


def hwc(image: Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def photograph() -> Image.Image:
    return Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg")).convert("RGB")


def lanczos(pixels: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize [h, w, 3] in fp64 by the Lanczos kernel with three lobes, stretched when making it smaller."""
    for axis, size in ((0, height), (1, width)):
        stored = pixels.shape[axis]
        stretch = max(stored / size, 1.0)
        centres = (np.arange(size) + 0.5) * stored / size
        x = (np.arange(stored)[None, :] + 0.5 - centres[:, None]) / stretch
        weights = np.where(abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
        weights /= weights.sum(axis=1, keepdims=True)
        pixels = np.moveaxis(np.tensordot(weights, pixels, (1, axis)), 0, axis)
    return pixels.clip(0, 255)


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(np.float64) - b) ** 2))))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, *chunks: bytes) -> bytes:
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + ihdr + b"".join(chunks) + chunk(b"IEND", b"")


# Sizes and windows


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(("width", "height"), [(16, 16), (37, 61), (640, 30), (23, 500), (256, 256), (301, 299)])
def test_the_result_has_the_size_asked_for(kind: str, width: int, height: int) -> None:
    data = picture(width, height, kind=kind)
    for size in (target(data), target(data, 16384), (16, 16), (48, 80), (width, height)):
        image = decode(data, size)
        assert image.dtype == torch.uint8 and image.shape == (3, size[1], size[0])
        assert image.untyped_storage().nbytes() == 3 * size[0] * size[1]  # not a view of the whole picture


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=200, deadline=None)
def test_any_size_is_covered_from_any_place(w: int, h: int, width: int, height: int, x: float, y: float) -> None:
    pixels = np.full((h, w, 3), (10, 130, 250), np.uint8)
    image = decode(image_bytes(Image.fromarray(pixels)), (width, height), place=Place(x, y))
    assert image.shape == (3, height, width)
    assert (hwc(image) == (10, 130, 250)).all()  # nothing from outside the picture


def test_pixels_are_kept_where_less_than_a_token_is_cut() -> None:
    for width, height, x, y in ((48, 50, 0, 1), (63, 64, 8, 0), (79, 79, 8, 8)):
        data = picture(width, height, seed=3)
        pixels = np.asarray(Image.open(io.BytesIO(data)))
        w, h = target(data)
        assert np.array_equal(hwc(decoded(data)), pixels[y : y + h, x : x + w])
    assert np.array_equal(hwc(decode(data, (64, 64), place=Place(0, 1))), pixels[15:, :64])


@pytest.mark.parametrize("upright", [True, False])
def test_scaling_keeps_the_centre(upright: bool) -> None:
    pixels = np.zeros((200, 333, 3), np.uint8)
    pixels[90:110, 156:177] = 255
    pixels = pixels if upright else pixels.transpose(1, 0, 2).copy()
    image = decoded(image_bytes(Image.fromarray(pixels)), 20000)[0].double()
    assert min(image.shape) == 96 and max(image.shape) == 176  # the shorter side is cut
    weight = image / image.sum()
    y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in image.shape), indexing="ij")
    assert abs(float((weight * y).sum()) - image.shape[0] / 2) < 0.6
    assert abs(float((weight * x).sum()) - image.shape[1] / 2) < 0.6


def test_what_is_cut_away_lies_opposite_to_the_place() -> None:
    """A picture of vertical stripes 8 times as wide as high, squared: the place says which part of it remains."""
    stripes = np.repeat(np.arange(256, dtype=np.uint8), 2)[None, :, None].repeat(64, 0).repeat(3, 2)
    data, turned = (image_bytes(Image.fromarray(p)) for p in (stripes, stripes.transpose(1, 0, 2).copy()))
    for place, first, last in ((LEFT, 0, 31), (CENTRE, 112, 143), (RIGHT, 224, 255)):
        image = decode(data, (32, 32), place=place)[0].int()
        assert abs(int(image[9, 0]) - first) <= 2 and abs(int(image[9, -1]) - last) <= 2
        upright = decode(turned, (32, 32), place=Place(place.y, place.x))[0].int()
        assert (upright - image.T).abs().max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_place_and_flip_are_those_of_the_upright_picture(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.random.default_rng(orientation).integers(90, 166, (45, 90, 3), dtype=np.uint8))
    data = image_bytes(stored, exif=exif)
    upright = image_bytes(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    places = [CENTRE, Place(0.0, 0.3), Place(0.9, 1.0)]
    for size, fit, place, flip in product([(32, 32), (16, 48), (64, 16)], ["scale", "crop"], places, [False, True]):
        if fit == "crop" and (size[0] > probe(data).size[0] or size[1] > probe(data).size[1]):
            continue
        image = decode(data, size, fit=fit, place=place, flip=flip).int()
        expected = decode(upright, size, fit=fit, place=place, flip=flip).int()
        assert (image - expected).abs().max() <= (2 if fit == "scale" else 0), (size, fit, place, flip)


def test_flip_mirrors_left_to_right() -> None:
    for data, size in ((picture(80, 70), (80, 64)), (picture(200, 100, kind="JPEG"), (64, 48))):
        assert torch.equal(decode(data, size, flip=True), decode(data, size).flip(-1))


def test_crop_cuts_pixels_as_they_are() -> None:
    data = picture(100, 80, seed=2)
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    for place, x, y in ((CENTRE, 26, 24), (Place(0, 0), 0, 0), (Place(1, 1), 52, 48), (Place(0.999, 0.01), 52, 0)):
        assert np.array_equal(hwc(decode(data, (48, 32), fit="crop", place=place)), pixels[y : y + 32, x : x + 48])
    for size in ((112, 80), (96, 96)):
        with pytest.raises(BadSample, match="no window") as error:
            decode(data, size, fit="crop")
        assert error.value.reason is Reason.CHANGED


def test_every_window_is_equally_likely() -> None:
    """A row of 8 windows of 16 pixels: fractions of [0, 1) in eighths, each window once."""
    data = image_bytes(Image.fromarray(np.arange(23, dtype=np.uint8)[None, :].repeat(16, 0)))
    firsts = [int(decode(data, (16, 16), place=Place(k / 8))[0, 0, 0]) for k in range(8)]
    assert firsts == list(range(8))


def test_a_thin_picture_takes_no_memory_for_what_is_cut() -> None:
    """Covering 512 x 512 with 20,000 x 16 pixels would be 512 x 640,000."""
    assert decode(picture(20000, 16), (512, 512)).shape == (3, 512, 512)


@pytest.mark.parametrize(("width", "height"), [(480, 560), (352, 416), (256, 304), (160, 192)])
def test_resizing_is_near_to_lanczos_in_double_precision(width: int, height: int) -> None:
    data = image_bytes(photograph(), "JPEG", quality=92)
    full = np.asarray(Image.open(io.BytesIO(data)))
    h, w = full.shape[:2]
    cover = (width, int(h * width / w + 0.5)) if width * h >= height * w else (int(w * height / h + 0.5), height)
    expected = lanczos(full.astype(np.float64), *cover)
    y, x = (cover[1] - height + 1) // 2, (cover[0] - width + 1) // 2
    expected = expected[y : y + height, x : x + width]
    assert decibels(hwc(decode(data, (width, height))), expected) > 42


def test_enlarging_covers_the_size() -> None:
    small = photograph().resize((64, 75))
    image = hwc(decode(image_bytes(small), (256, 256)))
    expected = np.asarray(small.resize((256, 300), Image.Resampling.BICUBIC))[22:278]
    assert decibels(image, expected) > 35  # the two have other coefficients


# Modes


def test_alpha_lies_over_white() -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[..., 0], pixels[:16, :, 3], pixels[16:, :, 3] = 200, 255, 0
    pixels[:, 16:, 3] //= 2
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        image = decoded(image_bytes(Image.fromarray(pixels), kind, **options))
        assert image[:, 0, 0].tolist() == [200, 0, 0] and image[:, 31, 31].tolist() == [255, 255, 255]
        half = torch.tensor([255 - 55 * 127 / 255, 255 * 128 / 255, 255 * 128 / 255])
        assert (image[:, 0, 31] - half).abs().max() <= 1


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "LA", "CMYK"])
def test_modes(mode: str) -> None:
    grey = Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 16, 0).repeat(32, 1))  # black over white
    source = grey.convert("RGB").convert(mode)
    image = decoded(image_bytes(source, "JPEG" if mode == "CMYK" else "PNG"))
    assert image.shape == (3, 32, 32)
    assert int(image[:, :14].max()) <= 3 and int(image[:, 18:].min()) >= 252


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    image = decoded(image_bytes(Image.fromarray(ramp)))
    assert torch.equal(image, torch.from_numpy((ramp >> 8).astype(np.uint8)).expand(3, 32, 32))


def test_transparent_colours() -> None:
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.paste(0, (0, 0, 16, 32))
    grey16 = Image.fromarray(np.full((32, 32), 5000, np.uint16))
    for source, options, left, right in [
        (palette, {"transparency": 0}, [255] * 3, [10, 200, 30]),
        (palette, {"transparency": b"\xff\x00"}, [0] * 3, [255] * 3),
        (Image.new("L", (32, 32), 7), {"transparency": 7}, [255] * 3, [255] * 3),
        (Image.new("RGB", (32, 32), (1, 2, 3)), {"transparency": (1, 2, 3)}, [255] * 3, [255] * 3),
        (grey16, {"transparency": 5000}, [255] * 3, [255] * 3),
        (grey16, {}, [19] * 3, [19] * 3),
    ]:
        image = decoded(image_bytes(source, **options))
        assert image[:, 5, 2].tolist() == left and image[:, 5, 30].tolist() == right, (source.mode, options)


@pytest.mark.parametrize("colour", [(0, 0, 0), (9, 130, 200)])
def test_background_lies_under_what_is_transparent(colour: tuple[int, int, int]) -> None:
    clear = Image.new("RGBA", (32, 32), (1, 2, 3, 0))
    grey16 = image_bytes(Image.fromarray(np.full((32, 32), 5000, np.uint16)), transparency=5000)
    for data in (image_bytes(clear), image_bytes(clear, "WEBP", lossless=True), grey16):
        assert (hwc(decode(data, (32, 32), background=colour)) == colour).all()
        assert np.asarray(load_rgb(data, probe(data), colour))[0, 0].tolist() == list(colour)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": "4:2:2"}, {"quality": 20}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_as_pillow_decodes_them(mode: str, options: dict[str, object]) -> None:
    if mode == "CMYK" and "subsampling" in options:
        pytest.skip("Pillow writes a layout that no other program does")
    data = image_bytes(photograph().crop((0, 0, 160, 144)).convert(mode), "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(hwc(decoded(data)), expected)
    assert np.array_equal(np.asarray(load_rgb(data, probe(data))), expected)
    assert probe(data).components == {"RGB": 3, "L": 1, "CMYK": 4}[mode]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker", orientation
    pixels = np.kron(np.arange(12, dtype=np.uint8).reshape(3, 4) * 20, np.ones((16, 16), np.uint8))
    source = Image.fromarray(pixels).convert("RGB")
    data = image_bytes(source, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    assert probe(data).size == expected.shape[1::-1] == ((48, 64) if orientation >= 5 else (64, 48))
    assert np.array_equal(hwc(decoded(data)), expected)


def test_orientation_is_applied_to_scaled_pictures() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = image_bytes(Image.new("RGB", (400, 100)), "JPEG", exif=exif)
    assert decoded(data, 10000).shape == (3, 192, 48)


@pytest.mark.parametrize(
    "exif",
    [
        b"",
        b"II",
        b"XX*\0" + b"\0" * 40,
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\xff\xff\x01\x12\0\x03\0\0\0\x01\0\x63",
    ],
)
def test_nonsense_exif_means_upright(exif: bytes) -> None:
    data = png_of(16, 32, chunk(b"eXIf", exif), chunk(b"IDAT", zlib.compress(b"\0" + b"\0" * 16)))
    assert probe(data).orientation == 1


def test_the_first_exif_block_counts() -> None:
    data = picture(32, 64, kind="JPEG")
    blocks = []
    for orientation in (6, 3):
        exif = Image.Exif()
        exif[0x0112] = orientation
        block = exif.tobytes()
        blocks.append(b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block)
    assert [probe(data[:2] + block + data[2:]).orientation for block in blocks] == [6, 3]
    assert probe(data[:2] + b"".join(blocks) + data[2:]).orientation == 6


def test_animations_give_their_first_frame() -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        data = image_bytes(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert decoded(data)[:, 9, 9].tolist() == [255, 0, 0]


# Refusals


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_truncated_pictures_are_refused_before_decoding(kind: str) -> None:
    data = picture(90, 70, kind=kind)
    for size in [*range(1, 40), *range(40, len(data) - 1, max(1, len(data) // 60))]:
        with pytest.raises(BadSample) as error:
            probe(data[:size])
        assert error.value.reason in (Reason.IMAGE_DAMAGED, Reason.IMAGE_FORMAT)


def test_progressive_jpeg_without_its_last_scans_is_refused() -> None:
    data = image_bytes(Image.open(io.BytesIO(picture(200, 200))), "JPEG", progressive=True)
    last_scan = data.rfind(b"\xff\xda")
    assert last_scan > data.find(b"\xff\xda")
    assert refused(data[:last_scan]) is Reason.IMAGE_DAMAGED


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_damaged_bytes_are_refused_or_seem_whole(kind: str) -> None:
    data = picture(64, 48, kind=kind)
    rng = random.Random(kind)
    bad = 0
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(rng.choice((1, 1, 8))):
            broken[rng.randrange(len(data))] = rng.randrange(256)
        try:
            assert decode(bytes(broken), (64, 48)).shape == (3, 48, 64)
        except BadSample:
            bad += 1
    assert bad >= {"PNG": 290, "JPEG": 150, "WEBP": 20}[kind]  # every PNG chunk has a checksum; WEBP has none


def test_damage_that_a_jpeg_decoder_only_warns_of_is_refused() -> None:
    for mode in ("RGB", "CMYK"):
        data = image_bytes(photograph().convert(mode), "JPEG")
        scan = data.find(b"\xff\xda")
        half = (scan + len(data)) // 2
        for damaged in (
            data[:half] + b"\xff\xd9",  # premature end
            data[:half] + b"\xff\xd9" + data[half:],
            data[:half] + bytes(range(64)) + data[half + 64 :],
            data[:half] + data[half + 1000 :],
        ):
            np.asarray(Image.open(io.BytesIO(damaged)))  # Pillow says nothing
            assert refused(damaged) is Reason.IMAGE_DAMAGED
            with pytest.raises(BadSample):
                load_rgb(damaged, probe(damaged))


def test_bytes_after_a_picture_do_no_harm() -> None:
    data = picture(64, 48, kind="JPEG")
    assert torch.equal(decoded(data + b"and more" * 99), decoded(data))


def test_jpegs_of_rare_kinds_are_refused() -> None:
    data = bytearray(picture(64, 48, kind="JPEG"))
    frame = data.find(b"\xff\xc0")
    for marker, bits in ((0xC3, 8), (0xC5, 8), (0xC9, 8), (0xCA, 8), (0xC1, 12), (0xC0, 12)):
        data[frame + 1], data[frame + 4] = marker, bits
        assert refused(bytes(data)) is Reason.IMAGE_FORMAT
    data = bytearray(image_bytes(photograph(), "JPEG", subsampling="4:4:4"))
    data[data.find(b"\xff\xc0") + 11] = 0x31  # a factor of three, which libjpeg-turbo has no name for
    assert refused(bytes(data)) is Reason.IMAGE_FORMAT


def test_jpegs_of_a_great_many_scans_are_refused() -> None:
    """Each scan costs a pass over the whole picture, and may take only a few bytes."""
    data = image_bytes(photograph(), "JPEG", progressive=True)
    last = data.rfind(b"\xff\xda")
    assert refused(data[:-2] + data[last:-2] * MAX_JPEG_SCANS + b"\xff\xd9") is Reason.IMAGE_TOO_LARGE
    assert decoded(data).shape == (3, 592, 512)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", Reason.IMAGE_FORMAT),
        (b"a text named .jpg", Reason.IMAGE_FORMAT),
        (image_bytes(Image.new("RGB", (32, 32)), "GIF"), Reason.IMAGE_FORMAT),
        (image_bytes(Image.new("RGB", (32, 32)), "BMP"), Reason.IMAGE_FORMAT),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n", Reason.IMAGE_FORMAT),
        (b"\xff\xd8\xff\xd9", Reason.IMAGE_DAMAGED),
        (b"\xff\xd8\xff\xe0\0\0" + b"\0" * 40, Reason.IMAGE_DAMAGED),
        (b"\xff\xd8" + b"\xff" * 100, Reason.IMAGE_DAMAGED),
        (png_of(0, 32, chunk(b"IDAT", b"")), Reason.IMAGE_DAMAGED),
        (png_of(32, 32), Reason.IMAGE_DAMAGED),
        (png_of(32, 32, chunk(b"IDAT", zlib.compress(b"\0" * 90))), Reason.IMAGE_DAMAGED),
        (png_of(32, 32, chunk(b"IDAT", b"not zlib")), Reason.IMAGE_DAMAGED),
        (b"RIFF\x20\0\0\0WEBPVP8L\x05\0\0\0\x2f\0\0\0\0\0" + b"JUNK\x06\0\0\0" + b"\0" * 6, Reason.IMAGE_DAMAGED),
        (b"RIFF\x04\0\0\0WEBP", Reason.IMAGE_DAMAGED),
        (b"\0" * (MAX_IMAGE_BYTES + 1), Reason.IMAGE_TOO_LARGE),
    ],
)
def test_refused_pictures(data: bytes, reason: Reason) -> None:
    assert refused(data) is reason


def test_a_picture_whose_parts_disagree_about_its_size_is_refused() -> None:
    """A small canvas around a large frame would pass the limits by its header alone."""
    frame = image_bytes(Image.new("RGB", (640, 640), "red"), "WEBP", lossless=True)[12:]
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (31).to_bytes(3, "little") * 2 + frame
    webp = b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body
    second = chunk(b"IHDR", struct.pack(">IIBBBBB", 3200, 3200, 8, 0, 0, 0, 0))
    png = png_of(32, 32, second, chunk(b"IDAT", zlib.compress(b"\0" * 3201 * 3200)))
    for data in (webp, png):
        assert probe(data).size == (32, 32)
        assert refused(data) is Reason.IMAGE_DAMAGED

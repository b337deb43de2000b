"""Pictures of every kind become the right RGB pixels, or are refused with the right reason."""

import io
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
import torch
from data_samples import image_bytes, picture
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dstrain.data.decode import decode, target_size, target_sizes
from dstrain.data.probe import MAX_IMAGE_BYTES, probe
from dstrain.data.reasons import BadSample, Reason

ANY = 1 << 20


def refused(data: bytes, max_pixels: int = ANY) -> Reason:
    with pytest.raises(BadSample) as error:
        decode(data, max_pixels)
    return error.value.reason


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, *chunks: bytes) -> bytes:
    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + ihdr + b"".join(chunks) + chunk(b"IEND", b"")


# Sizes


@given(st.integers(1, 1 << 15), st.integers(1, 1 << 15), st.integers(256, 1 << 24))
@settings(max_examples=300, deadline=None)
def test_laws_of_the_target_size(width: int, height: int, max_pixels: int) -> None:
    try:
        w, h = target_size(width, height, max_pixels)
    except BadSample as error:
        scale = min(1.0, (max_pixels / (width * height)) ** 0.5)
        assert error.reason is Reason.IMAGE_TOO_SMALL and min(width, height) * scale < 16.0001
        return
    assert w % 16 == h % 16 == 0 and 16 <= w <= width and 16 <= h <= height  # never upscaled
    assert w * h <= max_pixels
    scale = max(w / width, h / height)
    assert width * scale - w < 16 and height * scale - h < 16  # cut away, in pixels of the scaled picture
    assert target_size(w, h, max_pixels) == (w, h)
    assert target_size(height, width, max_pixels) == (h, w)


def test_target_sizes_is_exact_and_vectorised() -> None:
    widths, heights = np.array([1024, 4096, 1025, 15, 2048, 30000]), np.array([1024, 4096, 1024, 999, 512, 16])
    assert [a.tolist() for a in target_sizes(widths, heights, 1 << 20)] == [
        [1024, 1024, 1024, 0, 2048, 30000 // 16 * 16],
        [1024, 1024, 1008, 992, 512, 16],
    ]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize(("width", "height"), [(16, 16), (37, 61), (640, 30), (23, 500), (256, 256), (301, 299)])
def test_decoded_size_is_the_target_size(kind: str, width: int, height: int) -> None:
    data = picture(width, height, kind=kind)
    for max_pixels in (ANY, 16384):
        image = decode(data, max_pixels)
        assert image.dtype == torch.uint8 and image.is_contiguous()
        assert (image.shape[2], image.shape[1]) == target_size(*probe(data).size, max_pixels)


def test_pixels_are_kept_where_nothing_is_scaled() -> None:
    data = picture(48, 50, seed=3)
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    assert np.array_equal(decode(data, ANY).permute(1, 2, 0).numpy(), pixels[1:49, :, :])


@pytest.mark.parametrize("upright", [True, False])
def test_scaling_keeps_the_centre(upright: bool) -> None:
    pixels = np.zeros((200, 333, 3), np.uint8)
    pixels[90:110, 156:177] = 255
    pixels = pixels if upright else pixels.transpose(1, 0, 2).copy()
    image = decode(image_bytes(Image.fromarray(pixels)), 20000)[0].double()
    assert min(image.shape) == 96 and max(image.shape) == 176  # the shorter side is cut
    weight = image / image.sum()
    y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in image.shape), indexing="ij")
    assert abs(float((weight * y).sum()) - image.shape[0] / 2) < 0.3
    assert abs(float((weight * x).sum()) - image.shape[1] / 2) < 0.3


# Modes


def test_alpha_lies_over_white() -> None:
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[..., 0], pixels[:16, :, 3], pixels[16:, :, 3] = 200, 255, 0
    pixels[:, 16:, 3] //= 2
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True})):
        image = decode(image_bytes(Image.fromarray(pixels), kind, **options), ANY)
        assert image[:, 0, 0].tolist() == [200, 0, 0] and image[:, 31, 31].tolist() == [255, 255, 255]
        half = torch.tensor([255 - 55 * 127 / 255, 255 * 128 / 255, 255 * 128 / 255])
        assert (image[:, 0, 31] - half).abs().max() <= 1


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "LA", "CMYK"])
def test_modes(mode: str) -> None:
    grey = Image.fromarray(np.repeat(np.array([[0], [255]], np.uint8), 16, 0).repeat(32, 1))  # black over white
    source = grey.convert("RGB").convert(mode)
    image = decode(image_bytes(source, "JPEG" if mode == "CMYK" else "PNG"), ANY)
    assert image.shape == (3, 32, 32)
    assert int(image[:, :14].max()) <= 3 and int(image[:, 18:].min()) >= 252


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    image = decode(image_bytes(Image.fromarray(ramp)), ANY)
    assert torch.equal(image, torch.from_numpy((ramp >> 8).astype(np.uint8)).expand(3, 32, 32))


def test_transparent_colours() -> None:
    palette = Image.new("P", (32, 32), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    palette.paste(0, (0, 0, 16, 32))
    grey16 = Image.fromarray(np.full((32, 32), 5000, np.uint16))
    for image, options, left, right in [
        (palette, {"transparency": 0}, [255] * 3, [10, 200, 30]),
        (palette, {"transparency": b"\xff\x00"}, [0] * 3, [255] * 3),
        (Image.new("L", (32, 32), 7), {"transparency": 7}, [255] * 3, [255] * 3),
        (Image.new("RGB", (32, 32), (1, 2, 3)), {"transparency": (1, 2, 3)}, [255] * 3, [255] * 3),
        (grey16, {"transparency": 5000}, [255] * 3, [255] * 3),
        (grey16, {}, [19] * 3, [19] * 3),
    ]:
        decoded = decode(image_bytes(image, **options), ANY)
        assert decoded[:, 5, 2].tolist() == left and decoded[:, 5, 30].tolist() == right, (image.mode, options)


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
    assert np.array_equal(decode(data, ANY).permute(1, 2, 0).numpy(), expected)


def test_orientation_is_applied_to_scaled_pictures() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = image_bytes(Image.new("RGB", (400, 100)), "JPEG", exif=exif)
    assert decode(data, 10000).shape == (3, 192, 48)


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
        assert decode(data, ANY)[:, 9, 9].tolist() == [255, 0, 0]


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
def test_damaged_bytes_are_refused_or_decode_to_the_planned_size(kind: str) -> None:
    data = picture(64, 48, kind=kind)
    rng = random.Random(kind)
    bad = 0
    for _ in range(300):
        broken = bytearray(data)
        for _ in range(rng.choice((1, 1, 8))):
            broken[rng.randrange(len(data))] = rng.randrange(256)
        try:
            size = target_size(*probe(bytes(broken)).size, ANY)
            image = decode(bytes(broken), ANY)
            assert (image.shape[2], image.shape[1]) == size
        except BadSample:
            bad += 1
    assert bad >= (290 if kind == "PNG" else 20)  # every PNG chunk has a checksum


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
        (b"RIFF\x20\0\0\0WEBPVP8L\x05\0\0\0\x2f\0\0\0\0\0" + b"JUNK\x06\0\0\0" + b"\0" * 6, Reason.IMAGE_TOO_SMALL),
        (b"RIFF\x04\0\0\0WEBP", Reason.IMAGE_DAMAGED),
        (picture(15, 400), Reason.IMAGE_TOO_SMALL),
        (picture(1, 1), Reason.IMAGE_TOO_SMALL),
        (b"\0" * (MAX_IMAGE_BYTES + 1), Reason.IMAGE_TOO_LARGE),
    ],
)
def test_refused_pictures(data: bytes, reason: Reason) -> None:
    assert refused(data) is reason


def test_too_narrow_only_when_scaled_down() -> None:
    data = picture(640, 20)
    assert decode(data, ANY).shape == (3, 16, 640)
    assert refused(data, 4096) is Reason.IMAGE_TOO_SMALL


@pytest.mark.parametrize("side", [9000, 13000, 20000])
def test_bombs_are_refused_without_memory(side: int) -> None:
    squeezer = zlib.compressobj(9)
    rows = b"".join(squeezer.compress(b"\0" * (side + 1)) for _ in range(200)) + squeezer.flush()
    webp = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (side - 1).to_bytes(3, "little") * 2
    bombs = [
        png_of(side, side, chunk(b"IDAT", rows)),
        b"\xff\xd8\xff\xc0"
        + struct.pack(">HBHHB", 11, 8, side, side, 1)
        + b"\1\x11\0\xff\xda\0\x08\1\1\0\0\x3f\0\xff\xd9",
        b"RIFF" + struct.pack("<I", len(webp) + 4) + b"WEBP" + webp,
    ]
    tracemalloc.start()
    assert [refused(bomb) for bomb in bombs] == [Reason.IMAGE_TOO_LARGE] * 3
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


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

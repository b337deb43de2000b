"""A menu of pictures and captions as they are met: each pair is used, or left out with the reason written here."""

import io
import itertools
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_samples import image_bytes, picture, write_tar
from PIL import Image
from test_data_decode import chunk, png_of

from dstrain.data.dataset import Dataset, open_dataset
from dstrain.data.media.captions import MAX_CAPTION_BYTES, MAX_JSON_BYTES, captions_of
from dstrain.data.media.decode import decode
from dstrain.data.reasons import BadSample, Reason

# When a fault is noticed: the earliest names the reason.
HEADER, CAPTION, SELECTION, NO_TEXT, PIXELS = range(5)


def _jpeg(image: Image.Image | None = None, **options: object) -> bytes:
    return image_bytes(image or Image.open(io.BytesIO(picture(64, 48))), "JPEG", **options)


def _exif(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def _marked(marker: int, bits: int = 8) -> bytes:
    """A JPEG whose frame header says that it is of another kind."""
    data = bytearray(_jpeg())
    frame = data.find(b"\xff\xc0")
    data[frame + 1], data[frame + 4] = marker, bits
    return bytes(data)


def _with_chunk(kind: bytes, body: bytes) -> bytes:
    return png_of(32, 32, chunk(kind, body), chunk(b"IDAT", zlib.compress(b"\0" * 33 * 32)))


def _vast_jpeg(width: int, height: int) -> bytes:
    frame = struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\1\x11\0"
    return b"\xff\xd8\xff\xc0" + frame + b"\xff\xda\0\x08\1\1\0\0\x3f\0\xff\xd9"


_JPEG, _PNG = _jpeg(quality=95), picture(64, 48)
_HALF = (_JPEG.find(b"\xff\xda") + len(_JPEG)) // 2  # of its pixels
_ANIMATION = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue")]
_PALETTE = Image.new("P", (32, 32), 1)
_PALETTE.putpalette([0, 0, 0, 10, 200, 30])
_RGBA = Image.new("RGBA", (48, 32), (9, 8, 7, 100))

# name: extension, bytes, and the size that it is used at, or why not
PICTURES: dict[str, tuple[str, bytes, tuple[int, int] | tuple[int, Reason]]] = {
    "png": ("png", _PNG, (64, 48)),
    "jpeg": ("jpg", _JPEG, (64, 48)),
    "webp": ("webp", picture(64, 48, kind="WEBP"), (64, 48)),
    "progressive": ("jpg", _jpeg(progressive=True), (64, 48)),
    "grey jpeg": ("jpg", _jpeg(Image.new("L", (32, 32), 7)), (32, 32)),
    "cmyk jpeg": ("jpg", _jpeg(Image.new("CMYK", (32, 48), (9, 8, 7, 6))), (32, 48)),
    "16-bit png": ("png", image_bytes(Image.fromarray(np.full((32, 32), 999, np.uint16))), (32, 32)),
    "palette with alpha": ("png", image_bytes(_PALETTE, transparency=b"\xff\x10"), (32, 32)),
    "alpha": ("png", image_bytes(_RGBA), (48, 32)),
    "grey with alpha": ("png", image_bytes(Image.new("LA", (32, 32), (9, 9))), (32, 32)),
    "one bit": ("png", image_bytes(Image.new("1", (32, 32))), (32, 32)),
    "turned by exif": ("jpg", _jpeg(exif=_exif(6)), (48, 64)),
    "animated png": ("png", image_bytes(_ANIMATION[0], save_all=True, append_images=_ANIMATION[1:]), (32, 32)),
    "animated webp": (
        "webp",
        image_bytes(_ANIMATION[0], "WEBP", save_all=True, append_images=_ANIMATION[1:]),
        (32, 32),
    ),
    "jpeg named png": ("png", _JPEG, (64, 48)),
    "jpeg and more": ("jpg", _JPEG + b"more" * 100, (64, 48)),
    "nonsense exif": ("png", _with_chunk(b"eXIf", b"II*\0\xff\xff\xff\xff"), (32, 32)),
    "colour profile": ("png", image_bytes(_RGBA, icc_profile=b"not a profile"), (48, 32)),
    "1 x 1": ("png", picture(1, 1), (SELECTION, Reason.IMAGE_TOO_SMALL)),
    "1 x 20000": ("png", picture(1, 20000), (SELECTION, Reason.IMAGE_TOO_SMALL)),
    "no bytes": ("jpg", b"", (HEADER, Reason.IMAGE_FORMAT)),
    "text": ("jpg", b"<html>404 not found</html>", (HEADER, Reason.IMAGE_FORMAT)),
    "gif": ("gif", image_bytes(_RGBA, "GIF"), (HEADER, Reason.IMAGE_FORMAT)),
    "gif named png": ("png", image_bytes(_RGBA, "GIF"), (HEADER, Reason.IMAGE_FORMAT)),
    "bmp named jpg": ("jpg", image_bytes(_RGBA, "BMP"), (HEADER, Reason.IMAGE_FORMAT)),
    "tiff named png": ("png", image_bytes(_RGBA, "TIFF"), (HEADER, Reason.IMAGE_FORMAT)),
    "eps": ("png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n", (HEADER, Reason.IMAGE_FORMAT)),
    "psd": ("png", b"8BPS\0\1" + bytes(100), (HEADER, Reason.IMAGE_FORMAT)),
    "svg": ("png", b"<svg xmlns='http://www.w3.org/2000/svg'/>", (HEADER, Reason.IMAGE_FORMAT)),
    "12-bit jpeg": ("jpg", _marked(0xC1, 12), (HEADER, Reason.IMAGE_FORMAT)),
    "arithmetic jpeg": ("jpg", _marked(0xC9), (HEADER, Reason.IMAGE_FORMAT)),
    "lossless jpeg": ("jpg", _marked(0xC3), (HEADER, Reason.IMAGE_FORMAT)),
    "cut jpeg": ("jpg", _JPEG[:_HALF], (HEADER, Reason.IMAGE_DAMAGED)),
    "cut png": ("png", _PNG[: len(_PNG) // 2], (HEADER, Reason.IMAGE_DAMAGED)),
    "png with a wrong sum": ("png", _PNG[:60] + b"\0" + _PNG[61:], (HEADER, Reason.IMAGE_DAMAGED)),
    "jpeg header alone": ("jpg", b"\xff\xd8\xff\xd9", (HEADER, Reason.IMAGE_DAMAGED)),
    "half a jpeg, closed": ("jpg", _JPEG[:_HALF] + b"\xff\xd9", (PIXELS, Reason.IMAGE_DAMAGED)),
    "garbage in a jpeg": ("jpg", _JPEG[:_HALF] + bytes(range(200)) + _JPEG[-2:], (PIXELS, Reason.IMAGE_DAMAGED)),
    "png of too few rows": (
        "png",
        png_of(32, 32, chunk(b"IDAT", zlib.compress(b"\0" * 90))),
        (PIXELS, Reason.IMAGE_DAMAGED),
    ),
    "zTXt bomb": (
        "png",
        _with_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(1 << 26))),
        (PIXELS, Reason.IMAGE_DAMAGED),
    ),
    "iCCP bomb": (
        "png",
        _with_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1 << 26))),
        (PIXELS, Reason.IMAGE_DAMAGED),
    ),
    "vast png header": ("png", png_of(1 << 31, 1 << 31, chunk(b"IDAT", b"")), (HEADER, Reason.IMAGE_TOO_LARGE)),
    "vast jpeg header": ("jpg", _vast_jpeg(65500, 65500), (HEADER, Reason.IMAGE_TOO_LARGE)),
}

# name: extension, bytes, and the captions, or why there are none
CAPTIONS: dict[str, tuple[str, bytes | None, list[str] | tuple[int, Reason]]] = {
    "text": ("txt", b" a caption\n", ["a caption"]),
    "byte order mark": ("txt", "\ufeffa caption".encode(), ["a caption"]),
    "right to left": ("txt", "\u202eتعليق على الصورة".encode(), ["\u202eتعليق على الصورة"]),
    "special tokens": ("txt", b"<|im_end|>\n<|im_start|>system", ["<|im_end|>\n<|im_start|>system"]),
    "emoji": ("txt", "👩‍🚀 on 🌕".encode(), ["👩‍🚀 on 🌕"]),
    "as long as may be": ("txt", b"a" * MAX_CAPTION_BYTES, ["a" * MAX_CAPTION_BYTES]),
    "json": ("json", b'{"key": 7, "caption": "one"}', ["one"]),
    "json text": ("json", b'{"text": "one", "prompt": "two"}', ["one"]),
    "json list": ("json", b'{"caption": [" one", "", "two\\n"]}', ["one", "two"]),
    "json with much else": ("json", json.dumps({"exif": "x" * 99999, "caption": "one"}).encode(), ["one"]),
    "missing": ("", None, (NO_TEXT, Reason.NO_CAPTION)),
    "empty": ("txt", b"", (CAPTION, Reason.EMPTY_CAPTION)),
    "white space": ("txt", " \n\t\u2003\ufeff".encode(), (CAPTION, Reason.EMPTY_CAPTION)),
    "NUL": ("txt", b"a\0b", (CAPTION, Reason.CAPTION_ENCODING)),
    "UTF-16": ("txt", "a caption".encode("utf-16"), (CAPTION, Reason.CAPTION_ENCODING)),
    "invalid UTF-8": ("txt", b"caf\xe9", (CAPTION, Reason.CAPTION_ENCODING)),
    "1 MB": ("txt", b"a" * (1 << 20), (CAPTION, Reason.CAPTION_TOO_LONG)),
    "json number": ("json", b'{"caption": 7}', (NO_TEXT, Reason.NO_CAPTION)),
    "json null": ("json", b'{"caption": null}', (NO_TEXT, Reason.NO_CAPTION)),
    "json nested": ("json", b'{"caption": {"text": "one"}}', (NO_TEXT, Reason.NO_CAPTION)),
    "json mixed list": ("json", b'{"caption": ["one", 2]}', (NO_TEXT, Reason.NO_CAPTION)),
    "json of other things": ("json", b'{"width": 32}', (NO_TEXT, Reason.NO_CAPTION)),
    "json list without object": ("json", b'["one"]', (NO_TEXT, Reason.NO_CAPTION)),
    "json empty list": ("json", b'{"caption": []}', (CAPTION, Reason.EMPTY_CAPTION)),
    "json list of nothing": ("json", b'{"caption": ["", " "]}', (CAPTION, Reason.EMPTY_CAPTION)),
    "json lone surrogate": ("json", b'{"caption": "\\ud800"}', (CAPTION, Reason.CAPTION_ENCODING)),
    "json cut off": ("json", b'{"caption": "one', (CAPTION, Reason.NO_CAPTION)),
    "json too deep": ("json", b"[" * 20000, (CAPTION, Reason.NO_CAPTION)),
    "json of a long number": ("json", b'{"caption": ' + b"9" * 9999 + b"}", (CAPTION, Reason.NO_CAPTION)),
    "json long caption": ("json", json.dumps({"caption": "a" * 70000}).encode(), (CAPTION, Reason.CAPTION_TOO_LONG)),
}
MENU = list(itertools.product(PICTURES, CAPTIONS))


def _expected(picture: str, caption: str) -> tuple[tuple[int, int], list[str]] | Reason:
    size, captions = PICTURES[picture][2], CAPTIONS[caption][2]
    faults = [fault for fault in (size, captions) if isinstance(fault[-1], Reason)]
    return min(faults)[1] if faults else (size, captions)  # type: ignore[return-value, type-var]


def _key(picture: str, caption: str) -> str:
    return f"{list(PICTURES).index(picture):02d}-{list(CAPTIONS).index(caption):02d}"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    members = []
    for picture_name, caption_name in MENU:
        key = _key(picture_name, caption_name)
        members.append((f"{key}.{PICTURES[picture_name][0]}", PICTURES[picture_name][1]))
        extension, data, _ = CAPTIONS[caption_name]
        if data is not None:
            members.append((f"{key}.{extension}", data))
    folder = tmp_path_factory.mktemp("menu")
    write_tar(folder / "menu.tar", members)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dstrain.data.dataset._LISTED", len(MENU))  # all that are left out are kept by name
        return open_dataset([str(folder / "menu.tar")])


def _outcome(dataset: Dataset, row: int) -> tuple[tuple[int, int], list[str]] | Reason:
    raw = dataset.read(row)
    file = raw.files["image"]
    try:
        height, width = decode(file.data, (file.width, file.height)).shape[1:]
    except BadSample as error:
        return error.reason
    return (width, height), raw.captions


def test_every_pair_is_used_or_left_out_for_the_reason_in_the_table(dataset: Dataset) -> None:
    assert len(PICTURES) >= 20 and len(CAPTIONS) >= 12 and len(MENU) >= 240
    outcomes = {dataset.key(row): _outcome(dataset, row) for row in range(len(dataset))}
    left_out = {entry.key: entry.reason for entry in dataset.left_out.first}
    assert len(outcomes) + len(left_out) == len(MENU)
    outcomes |= left_out
    wrong = {pair: outcomes[_key(*pair)] for pair in MENU if outcomes[_key(*pair)] != _expected(*pair)}
    assert not wrong


@pytest.mark.parametrize("name", CAPTIONS)
def test_captions(name: str) -> None:
    extension, data, expected = CAPTIONS[name]
    if data is None:
        return
    if isinstance(expected, list):
        assert captions_of(data, extension) == expected
        return
    with pytest.raises(BadSample) as error:
        captions_of(data, extension)
    assert error.value.reason is expected[1]


def test_limits_of_captions() -> None:
    for data, kind in ((b"a" * (MAX_CAPTION_BYTES + 1), "txt"), (b" " * (MAX_JSON_BYTES + 1), "json")):
        with pytest.raises(BadSample) as error:
            captions_of(data, kind)
        assert error.value.reason is Reason.CAPTION_TOO_LONG


_BOMBS = """
import resource, sys
from pathlib import Path
from dstrain.data.media.captions import captions_of
from dstrain.data.media.decode import decode
from dstrain.data.media.probe import probe
from dstrain.data.reasons import BadSample
from dstrain.data.media.video import probe_video

def attempt(path):
    data = path.read_bytes()
    try:
        if path.suffix == ".json":
            captions_of(data, "json")
        elif path.suffix == ".mp4":
            probe_video(data)
        else:
            probe(data)
            decode(data, (32, 32))
    except BadSample as error:
        return error.reason.value
    return "accepted"

files = sorted(Path(sys.argv[1]).iterdir())
attempt(files[0])  # whatever is loaded at the first use
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in files:
    print(path.name, attempt(path))
print("grown", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


def _video(av: Any, codec: str, pixels: str) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 64, pixels
        for _ in range(5):
            out.mux(stream.encode(av.VideoFrame(64, 64, pixels)))
        out.mux(stream.encode())
    return file.getvalue()


def test_bombs_are_refused_without_memory(tmp_path: Path) -> None:
    """Small files that stand for gigabytes: refused, and the process never grows by 64 MiB."""
    av = pytest.importorskip("av")
    bombs = {"00-good.png": (picture(64, 64), "accepted")}
    for side in (9000, 13000, 20000):
        rows = zlib.compress(bytes((side + 1) * 200), 1)
        bombs[f"{side}.png"] = png_of(side, side, chunk(b"IDAT", rows)), "image_too_large"
        frame = b"VP8X" + struct.pack("<I", 10) + bytes(4) + (side - 1).to_bytes(3, "little") * 2
        bombs[f"{side}.webp"] = b"RIFF" + struct.pack("<I", len(frame) + 4) + b"WEBP" + frame, "image_too_large"
    for width, height in ((65500, 65500), (65535, 1025), (32769, 16)):
        bombs[f"{width}-{height}.jpg"] = _vast_jpeg(width, height), "image_too_large"
    second = chunk(b"IHDR", struct.pack(">IIBBBBB", 8000, 8000, 8, 2, 0, 0, 0))
    bombs["two headers.png"] = png_of(32, 32, second, chunk(b"IDAT", zlib.compress(bytes(1 << 24)))), "image_damaged"
    vast = zlib.compress(bytes(1 << 27), 1)
    for kind in (b"zTXt", b"iCCP"):
        bombs[f"{kind.decode()}.png"] = _with_chunk(kind, b"a\0\0" + vast), "image_damaged"
    bombs["iTXt.png"] = _with_chunk(b"iTXt", b"a\0\1\0\0\0" + vast), "image_damaged"
    bombs["deep.json"] = b'{"caption":' * 90000, "no_caption"
    video = _video(av, "mpeg4", "yuv420p")
    bombs["good.mp4"] = video, "accepted"
    for kind, offset in ((b"stsz", 8), (b"elst", 4)):
        place = video.find(kind) + 4 + offset
        bombs[f"{kind.decode()}.mp4"] = video[:place] + b"\x7f\xff\xff\xff" + video[place + 4 :], "video_too_large"
    video = _video(av, "mjpeg", "yuvj420p")
    place = video.find(b"\xff\xc0") + 5
    bombs["vast frame.mp4"] = video[:place] + struct.pack(">HH", 30000, 30000) + video[place + 4 :], "video_damaged"
    for name, (data, _) in bombs.items():
        (tmp_path / name).write_bytes(data)
    run = subprocess.run(
        [sys.executable, "-c", _BOMBS, str(tmp_path)], capture_output=True, text=True, timeout=100, check=True
    )
    *lines, grown = run.stdout.splitlines()
    assert dict(line.rsplit(" ", 1) for line in lines) == {name: reason for name, (_, reason) in bombs.items()}
    assert int(grown.split()[1]) < 64
    assert not run.stderr

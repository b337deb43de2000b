"""Packing: what goes in comes out, twice the same bytes, what is refused is said, and what is interrupted goes on."""

import errno
import fcntl
import io
import json
import multiprocessing
import os
import signal
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import webdataset
from data_samples import image_bytes, picture, sample_members, write_tar
from PIL import Image, PngImagePlugin

from dstrain import cli
from dstrain.data.packing import ledger as ledger_module
from dstrain.data.packing.items import Piece
from dstrain.data.packing.ledger import Ledger, Refused
from dstrain.data.packing.pack import LOCK, pack
from dstrain.data.packing.reencode import Reencode
from dstrain.data.packing.writer import ShardWriter
from dstrain.data.shards.catalog import open_index
from dstrain.data.shards.index import SIDECAR
from dstrain.data.shards.names import Content
from dstrain.errors import ConfigError, DataError

KINDS = [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("jpeg", "JPEG")]
WRITTEN = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}


def make_folder(folder: Path, count: int = 7) -> Path:
    for number in range(count):
        extension, kind = KINDS[number % 4]
        place = folder / ("a", "b/deep", ".")[number % 3] / f"picture {number}.v2.{extension}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture(32 + number, 64, seed=number, kind=kind))
        place.with_suffix(".txt").write_text(f"  the caption of {number} é\n")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """All that a packing leaves; an index has the time of its tar in it."""
    left = (path for path in sorted(folder.iterdir()) if path.name != LOCK and not path.name.endswith(SIDECAR))
    return {path.name: path.read_bytes() for path in left}


def tars(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in content(folder).items() if name.endswith(".tar")}


def samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """The members of all shards by key and extension, in order."""
    found: dict[str, dict[str, bytes]] = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                file = tar.extractfile(member)
                assert file is not None and extension not in found.get(key, {})
                found.setdefault(key, {})[extension] = file.read()
    return found


def png_of(width: int, height: int, body: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\0\0\0"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def video_bytes(container: str = "mp4", size: tuple[int, int] = (64, 48), frames: int = 5) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream = out.add_stream("libvpx-vp9" if container in ("webm", "matroska") else "libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), number * 40, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- what goes in comes out


def test_round_trip_of_a_folder(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    report = pack(source, tmp_path / "out", shard_samples=3)
    assert [path.name for path in report.shards] == [f"shard-00000{i}.tar" for i in range(3)]
    assert report.samples == 7 and report.refused == [] and "7 samples in 3 shards" in report.summary()
    names = sorted(p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file() and p.suffix != ".txt")
    packed = samples(tmp_path / "out")
    assert len(packed) == len(names) == 7
    for row, (name, (key, members)) in enumerate(zip(names, packed.items())):
        number = int(name.split("picture ")[1][0])
        caption = f"the caption of {number} é".encode()
        assert members == {WRITTEN[KINDS[number % 4][1]]: (source / name).read_bytes(), "txt": caption}
        assert key.startswith(f"{row:08d}-") and key.endswith(f"picture-{number}-v2")
    indexes = [open_index(path) for path in report.shards]
    assert [key for index in indexes for key in index.keys] == list(packed)
    assert all(index.columns == ("image", "txt") and not index.excluded for index in indexes)
    assert all(path.with_name(path.name + SIDECAR).exists() for path in report.shards)


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        source = make_folder(tmp_path / name)
        for number, path in enumerate(sorted(source.rglob("*"), reverse=name == "two")):
            os.utime(path, (number, number))
            path.chmod(0o700 if name == "two" else 0o755)
        pack(source, tmp_path / f"out-{name}", shard_samples=3)
    assert tars(tmp_path / "out-one") == tars(tmp_path / "out-two")
    with tarfile.open(tmp_path / "out-one/shard-000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.uid, m.gid, m.mtime, m.mode, m.uname) for m in members} == {(0, 0, 0, 0o644, "")}
    assert all(not m.pax_headers for m in members)


@pytest.mark.parametrize("reencode", [None, Reencode("webp", 80, 40)], ids=["as they are", "re-encoded"])
def test_the_number_of_workers_changes_nothing(tmp_path: Path, reencode: Reencode | None) -> None:
    source = make_folder(tmp_path / "source", 30)
    (source / "bad.png").write_bytes(b"x")
    (source / "bad.txt").write_text("x")
    results = []
    for workers in (1, 2, 7):
        out = tmp_path / f"out{workers}"
        pack(source, out, shard_samples=4, workers=workers, reencode=reencode)
        results.append(content(out))
    assert len(results[0]) == 8 + 2 and results[0] == results[1] == results[2]


@pytest.mark.parametrize("shard_bytes", [1, 10240, 20480, 30719, 50000])
def test_shards_keep_to_their_size(tmp_path: Path, shard_bytes: int) -> None:
    source = make_folder(tmp_path / "source", 12)
    report = pack(source, tmp_path / "out", shard_bytes=shard_bytes)
    counts = [open_index(path).samples for path in report.shards]
    assert sum(counts) == 12 and min(counts) >= 1
    sizes = [path.stat().st_size for path in report.shards]
    assert all(count == 1 or size <= shard_bytes for count, size in zip(counts, sizes))
    unpacked = [[512 + -(-len(data) // 512) * 512 for data in s.values()] for s in samples(tmp_path / "out").values()]
    start = 0
    for count in counts[:-1]:  # no shard could have taken the next sample too
        taken = sum(sum(sizes) for sizes in unpacked[start : start + count + 1])
        assert -(-(taken + 1024) // 10240) * 10240 > shard_bytes
        start += count


@pytest.mark.parametrize("size", [0, 1, 8191, 8192, 8193, 8703, 8704, 8705, 9216, 9728, 10240])
def test_the_room_in_a_shard_is_known_to_the_byte(tmp_path: Path, size: int) -> None:
    shard = ShardWriter(tmp_path / "a.tar")
    fits = shard.has_room([size], 10240)
    shard.add("x", {"cls": bytes(size)})
    shard.publish()
    assert fits == (shard.path.stat().st_size <= 10240)


def test_the_extension_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.png").write_bytes(picture(32, 32, kind="JPEG"))
    (tmp_path / "in/x.txt").write_text("caption")
    (tmp_path / "in/y.mp4").write_bytes(picture(32, 32, kind="WEBP"))
    (tmp_path / "in/y.txt").write_text("caption")
    pack(tmp_path / "in", tmp_path / "out")
    assert {key: list(members) for key, members in samples(tmp_path / "out").items()} == {
        "00000000-x": ["jpg", "txt"],
        "00000001-y": ["video.webp", "txt"],
    }


def test_videos(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    files = {
        "a.mp4": video_bytes(),
        "b.MOV": video_bytes("mov"),
        "c.webm": video_bytes("webm"),
        "d.mkv": video_bytes("matroska"),
        "e.mp4": b"no video",
        "f.mp4": video_bytes(size=(64, 14)),
    }
    for name, data in files.items():
        (source / name).write_bytes(data)
        (source / name).with_suffix(".txt").write_text(name)
    report = pack(source, tmp_path / "out")
    packed = list(samples(tmp_path / "out").values())
    assert packed == [
        {extension: files[name], "txt": name.encode()}
        for name, extension in (("a.mp4", "mp4"), ("b.MOV", "mov"), ("c.webm", "webm"), ("d.mkv", "mkv"))
    ]
    assert [entry.name for entry in report.refused] == ["e.mp4", "f.mp4"]
    assert report.refused[0].reason.startswith("video_") and report.refused[1].reason == "image_too_small"
    index = open_index(report.shards[0])
    assert index.columns == ("video", "txt") and index.parts["frames"].tolist() == [5, 0] * 4


def test_samples_of_several_columns(tmp_path: Path) -> None:
    pictures = {name: picture(32, 48, seed=seed, kind=kind) for seed, (name, kind) in enumerate(
        [("a.png", "PNG"), ("b.jpg", "JPEG"), ("c.webp", "WEBP"), ("d.png", "PNG")]
    )}  # fmt: skip
    for name, data in pictures.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "bad.png").write_bytes(b"bad")
    (tmp_path / "clip.mp4").write_bytes(video_bytes())
    table = write_jsonl(tmp_path / "metadata.jsonl", [
        {"edit_image": ["b.jpg", "c.webp"], "image": "a.png", "prompt": "one", "weight": 2},
        {"edit_image": "b.jpg", "image": "a.png", "video": "clip.mp4", "prompt": ["two", "zwei"]},
        {"control_image": "d.png", "image": "c.webp", "prompt": "three"},
        {"control_image": "d.png", "prompt": "four"},
        {"edit_image": "bad.png", "image": "a.png", "prompt": "five"},
    ])  # fmt: skip
    report = pack(table, tmp_path / "out")
    assert list(samples(tmp_path / "out").items()) == [
        ("00000000-a", {"png": pictures["a.png"], "edit_image.0.jpg": pictures["b.jpg"],
                        "edit_image.1.webp": pictures["c.webp"], "json": b'{"caption": "one", "weight": 2}'}),
        ("00000001-a", {"png": pictures["a.png"], "mp4": video_bytes(), "edit_image.jpg": pictures["b.jpg"],
                        "json": b'{"caption": ["two", "zwei"]}'}),
        ("00000002-c", {"webp": pictures["c.webp"], "control_image.png": pictures["d.png"], "txt": b"three"}),
        ("00000003-d", {"control_image.png": pictures["d.png"], "txt": b"four"}),
    ]  # fmt: skip
    assert [tuple(vars(entry).values()) for entry in report.refused] == [
        ("line 5: a.png", "image_format", "edit_image: neither PNG, JPEG nor WEBP"),
    ]
    index = open_index(report.shards[0])
    assert set(index.columns) == {
        "image", "video", "edit_image", "edit_image.0", "edit_image.1", "control_image", "json", "txt",
    }  # fmt: skip
    assert index.captioned == index.samples == 4 and not index.excluded


def test_webdataset_reads_what_is_packed(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    rows = [
        {"image": "a/picture 0.v2.png", "edit_image": ["picture 2.v2.webp"], "prompt": "x", "n": 1},
        {"image": "picture 2.v2.webp", "mask_image": "a/picture 0.v2.png", "prompt": "y"},
    ]
    table = write_jsonl(source / "t.jsonl", rows)
    for place, out in ((source, tmp_path / "out"), (table, tmp_path / "out2")):
        report = pack(place, out, shard_samples=4)
        theirs = list(webdataset.WebDataset([str(path) for path in report.shards], shardshuffle=False))
        ours = samples(out)
        assert [sample["__key__"] for sample in theirs] == list(ours)
        for sample, members in zip(theirs, ours.values()):
            assert {name: data for name, data in sample.items() if not name.startswith("__")} == members
    decoded = list(webdataset.WebDataset([str(path) for path in report.shards], shardshuffle=False).decode("pil"))
    assert decoded[0]["edit_image.0.webp"].size == (34, 64) and decoded[0]["json"] == {"caption": "x", "n": 1}
    assert decoded[1]["mask_image.png"].size == (32, 64) and decoded[1]["txt"] == "y"


NAMES = {
    "Ünïcödé ☃.png": "00000000-n-c-d",
    "日本.png": "00000000",
    "x" * 240 + ".png": "00000000-" + "x" * 60,
    "dots.in.many.places.PNG": "00000000-dots-in-many-places",
    "-dash- .png": "00000000-dash",
    "tar.tar.png": "00000000-tar-tar",
    "new\nline.png": "00000000-new-line",
}


@pytest.mark.parametrize("name", NAMES)
def test_keys_are_plain(tmp_path: Path, name: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(picture(32, 32))
    (tmp_path / "in" / name).with_suffix(".txt").write_text("x")
    report = pack(tmp_path / "in", tmp_path / "out")
    assert list(samples(tmp_path / "out")) == [NAMES[name]] and report.refused == []


def test_names_that_are_not_utf8_are_packed_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in").mkdir()
    for name, data in ((b"caf\xe9.png", picture(32, 32)), (b"caf\xe9.txt", b"x"), (b"bad\xe9.gif", b"x")):
        (tmp_path / "in" / os.fsdecode(name)).write_bytes(data)
    assert cli.main(["pack", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    assert "refused bad\\udce9.gif: image_format" in capsys.readouterr().out
    assert list(samples(tmp_path / "out")) == ["00000001-caf"]


def test_long_columns_shorten_the_key(tmp_path: Path) -> None:
    (tmp_path / ("n" * 200 + ".png")).write_bytes(picture(32, 32))
    column = "c" * 34 + "_image"
    pack(write_jsonl(tmp_path / "t.jsonl", [{column: ["n" * 200 + ".png"], "prompt": "x"}]), tmp_path / "out")
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        names = tar.getnames()
    assert len(names[0]) == 100 and names[0].endswith(f"nn.{column}.0.png") and names[1].endswith("nn.txt")


# --- what is refused


def test_refused_pictures_are_reported_with_reasons(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source", 2)
    outside = tmp_path / "outside.png"
    outside.write_bytes(picture(32, 32))
    cases: dict[str, tuple[bytes | Path, bytes | None, str]] = {
        "no_caption.png": (picture(32, 32), None, "no_caption"),
        "empty.png": (picture(32, 32), b"  ", "empty_caption"),
        "latin.png": (picture(32, 32), b"caf\xe9", "caption_encoding"),
        "long.png": (picture(32, 32), b"x" * 70000, "caption_too_long"),
        "small.png": (picture(15, 32), b"x", "image_too_small"),
        "cut.png": (picture(32, 32)[:-9], b"x", "image_damaged"),
        "noise.png": (png_of(32, 32, b"not zlib"), b"x", "image_damaged"),  # only decoding tells
        "gif.png": (image_bytes(Image.new("RGB", (32, 32)), "GIF"), b"x", "image_format"),
        "real.gif": (image_bytes(Image.new("RGB", (32, 32)), "GIF"), b"x", "image_format"),
        "zero.png": (b"", b"x", "image_format"),
        "link.png": (outside, b"x", "unsafe_name"),
        "broken.png": (tmp_path / "nowhere.png", b"x", "unsafe_name"),
        "gone.png": (source / "nowhere.png", b"x", "missing_file"),
    }
    for name, (image, caption, _) in cases.items():
        if isinstance(image, Path):
            (source / name).symlink_to(image)
        else:
            (source / name).write_bytes(image)
        if caption is not None:
            (source / name).with_suffix(".txt").write_bytes(caption)
    report = pack(source, tmp_path / "out")
    assert report.samples == 2
    assert {entry.name: entry.reason for entry in report.refused} == {name: case[2] for name, case in cases.items()}
    assert "refused 13: image_format 3, image_damaged 2, unsafe_name 2, " in report.summary()
    assert all(entry.detail for entry in report.refused)
    listed = [json.loads(line) for line in (tmp_path / "out/refused.jsonl").read_text().splitlines()]
    assert listed == [vars(entry) for entry in report.refused]


def test_nothing_is_left_when_all_are_refused(tmp_path: Path) -> None:
    source = tmp_path / "bare"
    source.mkdir()
    for number in range(5):
        (source / f"{number}.png").write_bytes(picture(32, 32))
    (source / "x.gif").write_bytes(b"x")
    message = (
        r"none of the 6 items of .*bare can be packed \(no_caption 5, image_format 1\), such as "
        r"0.png: there is no 0.txt beside it; 1.png: .*; 2.png: [^;]*; all are in .*out/refused.jsonl"
    )
    for _ in range(2):
        with pytest.raises(DataError, match=message):
            pack(source, tmp_path / "out")
        assert list(content(tmp_path / "out")) == ["refused.jsonl"]
        assert len((tmp_path / "out/refused.jsonl").read_text().splitlines()) == 6
    (source / "3.txt").write_text("a caption")
    assert pack(source, tmp_path / "out").samples == 1


def test_out_must_be_a_new_place_that_can_be_written_to(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    write_tar(tmp_path / "out.tar", sample_members(1))
    (tmp_path / "out").mkdir()
    write_tar(tmp_path / "out/mine.tar", sample_members(1))
    before = content(tmp_path / "out")
    with pytest.raises(DataError, match="out already holds shards; give an empty folder"):
        pack(source, tmp_path / "out")
    assert content(tmp_path / "out") == before
    (tmp_path / "file").write_text("")
    with pytest.raises(
        DataError, match=r"shards cannot be written to .*file/out: Not a directory; when that is mended"
    ):
        pack(source, tmp_path / "file/out")


# --- re-encoding


def encoded(tmp_path: Path, data: bytes, reencode: Reencode) -> tuple[str, Image.Image]:
    """Pack one picture; return its extension and what comes out."""
    (tmp_path / "in").mkdir(exist_ok=True)
    (tmp_path / "in/x.png").write_bytes(data)
    (tmp_path / "in/x.txt").write_text("x")
    number = len(list(tmp_path.glob("out*")))
    pack(tmp_path / "in", tmp_path / f"out{number}", reencode=reencode)
    ((extension, stored), _) = next(iter(samples(tmp_path / f"out{number}").values())).items()
    return extension, Image.open(io.BytesIO(stored))


def error_of(image: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of two pictures of one size, of 255."""
    assert image.size == other.size
    return float(np.abs(np.asarray(image.convert("RGB"), float) - np.asarray(other.convert("RGB"), float)).mean())


def smooth(width: int, height: int, kind: str = "PNG", **options: Any) -> bytes:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], axis=-1)
    return image_bytes(Image.fromarray(pixels.astype(np.uint8)), kind, **options)


@pytest.mark.parametrize("stored", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("wanted", ["png", "jpg", "webp"])
def test_formats(tmp_path: Path, stored: str, wanted: Any) -> None:
    extension, image = encoded(tmp_path, smooth(120, 80, stored), Reencode(wanted, 95))
    assert extension == wanted and image.size == (120, 80)
    assert error_of(image, Image.open(io.BytesIO(smooth(120, 80)))) < 2


def test_quality_and_longest_side(tmp_path: Path) -> None:
    for size, side, expected in [
        ((200, 100), 100, (100, 50)),
        ((100, 333), 100, (30, 100)),
        ((100, 101), 100, (99, 100)),
        ((90, 100), 100, (90, 100)),
    ]:
        _, image = encoded(tmp_path, smooth(*size), Reencode("png", max_side=side))
        assert image.size == expected
        assert error_of(image, Image.open(io.BytesIO(smooth(*expected)))) < 2
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    for kind in ("jpg", "webp"):
        sizes = []
        for quality in (10, 60, 95):
            encoded(tmp_path, image_bytes(noise), Reencode(kind, quality))  # type: ignore[arg-type]
            sizes.append(sum(len(data) for data in next(reversed(list(_all_samples(tmp_path)))).values()))
        assert sizes == sorted(set(sizes))


def _all_samples(folder: Path) -> list[dict[str, bytes]]:
    outs = sorted(folder.glob("out*"), key=lambda path: int(path.name[3:]))
    return [members for out in outs for members in samples(out).values()]


def test_a_longest_side_alone_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    small, large = smooth(90, 60, "JPEG", quality=30), smooth(200, 150, "WEBP")
    for name, data in (("a.jpg", small), ("b.webp", large), ("c.png", png_of(32, 32, b"x"))):
        (source / name).write_bytes(data)
        (source / name).with_suffix(".txt").write_text("x")
    report = pack(source, tmp_path / "out", reencode=Reencode(max_side=100))
    first, second = samples(tmp_path / "out").values()
    assert first["jpg"] == small and Image.open(io.BytesIO(second["webp"])).size == (100, 75)
    assert [entry.reason for entry in report.refused] == ["image_damaged"]  # also what is left as it is was decoded


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("wanted", ["png", "jpg"])
def test_pictures_are_stored_upright(tmp_path: Path, orientation: int, wanted: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = smooth(160, 80, "JPEG", quality=95, exif=exif.tobytes())
    _, image = encoded(tmp_path, data, Reencode(wanted, 95, max_side=80))
    turned = orientation >= 5
    assert image.size == ((40, 80) if turned else (80, 40)) and 0x0112 not in image.getexif()
    from PIL import ImageOps

    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).resize(image.size, Image.Resampling.LANCZOS)
    assert error_of(image, upright) < 2


def test_transparency(tmp_path: Path) -> None:
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[:, :, 0], pixels[:, 30:, 3] = 200, 255  # the left half is clear
    palette = Image.new("P", (60, 40), 0)
    palette.putpalette([200, 0, 0])
    grey = Image.fromarray(pixels[:, :, [0, 3]], "LA")
    for kind in ("png", "webp"):
        for data in (image_bytes(Image.fromarray(pixels)), image_bytes(grey)):
            _, image = encoded(tmp_path, data, Reencode(kind, max_side=30))  # type: ignore[arg-type]
            alpha = np.asarray(image.convert("RGBA"))[:, :, 3]
            assert image.size == (30, 20) and alpha[:, :12].max() == 0 and alpha[:, 18:].min() == 255
    _, image = encoded(tmp_path, image_bytes(palette, transparency=0), Reencode("png"))
    assert np.asarray(image.convert("RGBA"))[:, :, 3].max() == 0
    _, image = encoded(tmp_path, image_bytes(Image.fromarray(pixels)), Reencode("jpg"))
    corner = np.asarray(image)[5, 5]
    assert image.mode == "RGB" and corner.min() > 245  # white, not the red that is hidden there
    assert abs(np.asarray(image)[5, 50].astype(int) - [200, 0, 0]).max() < 12


def test_sixteen_bits_grey_and_cmyk(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (32, 1))
    for kind in ("png", "jpg", "webp"):
        _, image = encoded(tmp_path, image_bytes(Image.fromarray(ramp)), Reencode(kind))  # type: ignore[arg-type]
        assert abs(np.asarray(image.convert("L")).astype(int) - (ramp >> 8)).mean() < 3
    cmyk = image_bytes(Image.open(io.BytesIO(smooth(64, 64))).convert("CMYK"), "JPEG", quality=95)
    _, image = encoded(tmp_path, cmyk, Reencode("png"))
    assert error_of(image, Image.open(io.BytesIO(cmyk)).convert("RGB")) < 3


def test_metadata_is_dropped(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_text("secret", "place and time")
    exif = Image.Exif()
    exif[0x010E] = "secret"
    data = smooth(64, 48, "PNG", pnginfo=text, icc_profile=b"secret profile" * 20, exif=exif, dpi=(72, 72))
    for wanted in ("png", "jpg", "webp"):
        _, image = encoded(tmp_path, data, Reencode(wanted))  # type: ignore[arg-type]
        assert not {"icc_profile", "exif", "secret", "comment", "dpi"} & set(image.info)
        assert b"secret" not in b"".join(_all_samples(tmp_path)[-1].values())
    jpeg = smooth(64, 48, "JPEG", comment=b"secret", icc_profile=b"secret profile" * 20)
    encoded(tmp_path, jpeg, Reencode("jpg"))
    assert b"secret" not in b"".join(_all_samples(tmp_path)[-1].values())


def test_what_cannot_be_re_encoded(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    files = {
        "long.png": smooth(400, 40),
        "wide.png": image_bytes(Image.new("L", (17000, 16))),
        "good.png": smooth(40, 40),
    }
    for name, data in files.items():
        (source / name).write_bytes(data)
        (source / name).with_suffix(".txt").write_text("x")
    report = pack(source, tmp_path / "out", reencode=Reencode("png", max_side=100))
    assert {entry.name: entry.reason for entry in report.refused} == {
        "long.png": "image_too_small",  # 100 x 10
        "wide.png": "image_too_small",
    }
    report = pack(source, tmp_path / "out2", reencode=Reencode("webp"))
    assert [(entry.name, entry.reason) for entry in report.refused] == [("wide.png", "image_too_large")]
    for options in ({}, {"format": "jpg", "quality": 0}, {"format": "jpg", "quality": 101}, {"max_side": -1}):
        with pytest.raises(ConfigError):
            Reencode(**options)  # type: ignore[arg-type]


# --- tars


def test_tars_of_webdataset_are_cut_anew(tmp_path: Path) -> None:
    given: list[dict[str, Any]] = []
    with webdataset.ShardWriter(str(tmp_path / "in-%06d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(10):
            sample = {
                "__key__": f"folder/key{number}",
                "jpg": picture(32, 40, seed=number, kind="JPEG"),
                "edit_image.0.png": picture(32, 32, seed=number),
                "txt": f"caption {number}",
                "json": {"other": number},
                "cls": number,
            }
            writer.write(sample)
            given.append(sample)
    report = pack(f"{tmp_path}/in-*.tar", tmp_path / "out", shard_samples=6)
    assert [open_index(path).samples for path in report.shards] == [6, 4] and report.refused == []
    packed = samples(tmp_path / "out")
    assert list(packed) == [f"{number:08d}-folder-key{number}" for number in range(10)]
    theirs = list(webdataset.WebDataset(sorted(map(str, tmp_path.glob("in-*.tar"))), shardshuffle=False))
    for before, members in zip(theirs, packed.values()):
        assert members == {name: data for name, data in before.items() if not name.startswith("__")}
    index = open_index(report.shards[0])
    assert set(index.columns) == {"image", "edit_image.0", "txt", "json", "cls"} and index.captioned == 6


def test_tars_of_img2dataset_are_cut_anew(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    members: list[tuple[str, bytes]] = []
    for number in range(5):
        key = f"{number:09d}"
        facts = {
            "caption": f"c{number}",
            "url": "https://host/x.jpg",
            "width": 32,
            "height": 40,
            "key": key,
            "exif": "{}",
        }
        members += [
            (f"{key}.jpg", picture(32, 40, seed=number, kind="JPEG")),
            (f"{key}.txt", f"c{number}".encode()),
            (f"{key}.json", json.dumps(facts).encode()),
        ]
    write_tar(tmp_path / "in/00000.tar", members)
    (tmp_path / "in/00000.parquet").write_bytes(b"")
    (tmp_path / "in/00000_stats.json").write_text("{}")
    report = pack(tmp_path / "in", tmp_path / "out")
    packed = samples(tmp_path / "out")
    assert list(packed) == [f"{number:08d}-{number:09d}" for number in range(5)]
    assert [data for sample in packed.values() for data in sample.values()] == [data for _, data in members]
    index = open_index(report.shards[0])
    assert index.samples == index.captioned == 5 and index.max_caption_bytes == 2
    assert index.parts["width"].tolist() == [32, 0, 0] * 5


def test_what_is_wrong_in_tars_is_listed(tmp_path: Path) -> None:
    members = [
        *sample_members(2),
        ("bad.png", png_of(32, 32, b"not zlib")),  # the index cannot tell, decoding can
        ("bad.txt", b"x"),
        ("gif.gif", b"GIF89a"),
        ("tiny.png", picture(15, 15)),
        ("two.png", picture(32, 32)),
        ("two.jpg", picture(32, 32, kind="JPEG")),
        ("film.mov", video_bytes("mov")),
        ("film.txt", b"x"),
        ("long." + "e" * 95, b"x"),
        ("only.npy", b"x"),
    ]
    tar = write_tar(tmp_path / "a.tar", members)
    report = pack(tar, tmp_path / "out")
    assert {entry.name: entry.reason for entry in report.refused} == {
        f"{tar}: bad": "image_damaged",
        f"{tar}: tiny": "image_too_small",
        f"{tar}: long": "unsafe_name",
        f"{tar}: gif": "image_format",
        f"{tar}: two": "ambiguous",
    }
    assert [list(sample) for sample in samples(tmp_path / "out").values()] == [
        ["png", "txt"], ["png", "txt"], ["mov", "txt"], ["npy"],
    ]  # fmt: skip


def test_tars_can_be_re_encoded(tmp_path: Path) -> None:
    tar = write_tar(
        tmp_path / "a.tar", [("x.png", smooth(80, 40)), ("x.edit_image.jpeg", smooth(20, 30)), ("x.cls", b"1")]
    )
    pack(tar, tmp_path / "out", reencode=Reencode("webp", max_side=40))
    (sample,) = samples(tmp_path / "out").values()
    assert list(sample) == ["webp", "edit_image.webp", "cls"]
    assert [Image.open(io.BytesIO(sample[e])).size for e in ("webp", "edit_image.webp")] == [(40, 20), (20, 30)]


def test_shards_of_one_size_from_shards_of_another(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    pack(source, tmp_path / "one", shard_samples=3)
    report = pack(tmp_path / "one", tmp_path / "two", shard_samples=5)
    assert [open_index(path).samples for path in report.shards] == [5, 2]
    assert list(samples(tmp_path / "one").values()) == list(samples(tmp_path / "two").values())
    with pytest.raises(DataError, match=r"one was begun from .*source and this is not the same packing"):
        pack(tmp_path / "one", tmp_path / "one", shard_samples=3)


# --- going on


def test_the_same_call_again_does_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_folder(tmp_path / "source")
    (source / "x.gif").write_bytes(b"x")
    caplog.set_level("INFO")
    first = pack(source, tmp_path / "out", shard_samples=3)
    assert caplog.messages == []
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert pack(source, tmp_path / "out", shard_samples=3, workers=1) == first
    assert caplog.messages == [f"{tmp_path / 'out'} is packed already; nothing is left to do"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times
    assert json.loads((tmp_path / "out/pack.json").read_text())["shards"][1] == {
        "name": "shard-000001.tar", "samples": 3, "bytes": 10240, "first": 3, "next": 6,
    }  # fmt: skip


PLACES: dict[str, tuple[Any, str, bool]] = {  # what dies, and whether before or after it is done
    "a sample": (ShardWriter, "add", False),
    "before a shard": (ShardWriter, "publish", True),
    "after a shard": (ShardWriter, "publish", False),
    "refusals": (ledger_module, "fsync_file", False),
    "manifest": (ledger_module, "write_atomic", True),
    "after the manifest": (Ledger, "add", False),
    "the end": (Ledger, "finish", True),
}


def pack_and_die(place: str, after: int, source: Path, out: Path) -> None:
    """Pack until the call number `after` at a place, and die there as by a power cut."""
    owner, name, before = PLACES[place]
    method = getattr(owner, name)
    calls = 0

    def fatal(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == after and before:
            os.kill(os.getpid(), signal.SIGKILL)
        result = method(*arguments)
        if calls == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, fatal)
    pack(source, out, shard_samples=3, workers=2)


@pytest.mark.parametrize(
    ("place", "after"),
    [("a sample", 8), ("before a shard", 2), ("after a shard", 1), ("after a shard", 2), ("refusals", 2),
     ("manifest", 1), ("manifest", 3), ("after the manifest", 2), ("the end", 1)],
)  # fmt: skip
def test_a_killed_packing_goes_on(tmp_path: Path, place: str, after: int) -> None:
    source = make_folder(tmp_path / "source", 10)
    for number in (0, 4, 5, 9):
        (source / f"picture {number}.gif").write_bytes(b"x")
        (source / f"a/picture {number}.gif").write_bytes(b"x")
    whole = pack(source, tmp_path / "whole", shard_samples=3)
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=pack_and_die, args=(place, after, source, out))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    kept = {path: path.stat().st_ino for path in out.glob("*.tar")}
    assert len(kept) <= 4
    listed = json.loads((out / "pack.json").read_text())["shards"] if (out / "pack.json").exists() else []
    report = pack(source, out, shard_samples=3)
    assert content(out) == content(tmp_path / "whole")
    assert not list(out.glob(".*.part")) and vars(report) == {**vars(whole), "shards": report.shards}
    for entry in listed:  # what was whole is not written again
        assert (out / entry["name"]).stat().st_ino == kept[out / entry["name"]]


def test_what_a_killed_packing_left_half_written_is_removed(begun: tuple[Path, Path]) -> None:
    source, out = begun
    before = content(out)
    for name in (".shard-000009.tar.part", ".pack.json.0123456789abcdef.part"):
        (out / name).write_bytes(b"half")
    pack(source, out, shard_samples=3)
    assert content(out) == before


def test_an_interrupt_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folder(tmp_path / "source", 10)
    pack(source, tmp_path / "whole", shard_samples=2)
    add, calls = ShardWriter.add, 0

    def interrupted(self: ShardWriter, key: str, members: dict[str, bytes]) -> None:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        add(self, key, members)

    monkeypatch.setattr(ShardWriter, "add", interrupted)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        pack(source, out, shard_samples=2)
    assert set(content(out)) == {"pack.json", "shard-000000.tar", "shard-000001.tar"}
    state = json.loads((out / "pack.json").read_text())
    assert (state["next"], state["done"], len(state["shards"])) == (4, False, 2)
    pack(source, out, shard_samples=2)
    assert content(out) == content(tmp_path / "whole")


def test_ctrl_c_at_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_folder(tmp_path / "source")
    monkeypatch.setattr(ShardWriter, "publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(SystemExit) as end:
        cli.main(["pack", str(source), "--out", str(tmp_path / "out")])
    assert end.value.code == 130 and "give the same command again" in capsys.readouterr().out


def test_a_full_disk_leaves_only_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folder(tmp_path / "source")
    pack(source, tmp_path / "whole", shard_samples=2)
    written = 0
    add = tarfile.TarFile.addfile

    def full(self: tarfile.TarFile, *args: Any) -> None:
        nonlocal written
        written += 1
        if written > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", full)
        with pytest.raises(DataError, match=r"cannot be written to .*out: No space left on device"):
            pack(source, tmp_path / "out", shard_samples=2)
    first = "shard-000000.tar"
    assert tars(tmp_path / "out") == {first: tars(tmp_path / "whole")[first]}
    assert not list((tmp_path / "out").glob(".*.part"))
    pack(source, tmp_path / "out", shard_samples=2)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Path, Path]:
    """A source, and where it was packed."""
    source = make_folder(tmp_path / "source")
    pack(source, tmp_path / "out", shard_samples=3)
    return source, tmp_path / "out"


DIFFERENT: dict[str, tuple[dict[str, Any], Callable[[Path], object], str]] = {
    "options": ({"shard_bytes": 1 << 20}, lambda s: None, r"shard_bytes was 268435456, now 1048576"),
    "re-encoding": ({"reencode": Reencode("jpg")}, lambda s: None, r"reencode was None, now \{'format': 'jpg'"),
    "one more": ({}, lambda s: (s / "z.gif").write_bytes(b""), "7 items then, 8 now"),
    "a caption": (
        {},
        lambda s: (s / "a/picture 0.v2.txt").write_text("new"),
        "names, sizes, captions or columns of the",
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_packing_does_not_go_on(begun: tuple[Path, Path], what: str) -> None:
    source, out = begun
    before = content(out)
    options, change, message = DIFFERENT[what]
    change(source)
    with pytest.raises(
        DataError, match=f"out was begun from .*source and this is not the same packing .*{message}"
    ) as e:
        pack(source, out, **{"shard_samples": 3, **options})
    assert "give another folder, or remove this one" in str(e.value) and content(out) == before


def test_the_columns_belong_to_the_packing(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(32, 32))
    table = write_jsonl(tmp_path / "t.jsonl", [{"image": "a.png", "edit_image": "a.png", "prompt": "x"}])
    pack(table, tmp_path / "out")
    with pytest.raises(DataError, match=r"columns was None, now \['image'\]"):
        pack(table, tmp_path / "out", columns=["image"])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is gone": (lambda out: (out / "shard-000001.tar").unlink(), "shard-000001.tar is gone; bring it back"),
    "a shard is cut": (lambda out: os.truncate(out / "shard-000001.tar", 9), "has 9 bytes and was written with 10240"),
    "a tar too many": (
        lambda out: (out / "shard-000003.tar").write_bytes(b""), r"tars of another origin \(shard-000003.tar\)"
    ),
    "no manifest": (lambda out: (out / "pack.json").unlink(), "out already holds shards; give an empty folder"),
    "manifest is cut": (lambda out: os.truncate(out / "pack.json", 50), "pack.json cannot be gone on from"),
    "manifest is a list": (lambda out: (out / "pack.json").write_text("[]"), "pack.json cannot be gone on from"),
    "another version": (lambda out: edit(out, version=9), r"cannot be gone on from \(version 9\)"),
    "shards forgotten": (lambda out: edit(out, shards=[]), "tars of another origin"),
    "shards out of order": (lambda out: edit(out, next=2), "its shards do not follow each other"),
    "another name": (lambda out: replace(out, "shard-000001.tar", "../x.tar"), "its shards have other names"),
    "odd options": (lambda out: edit(out, options=[]), "pack.json cannot be gone on from"),
    "no refusals": (lambda out: (out / "refused.jsonl").unlink(), "cannot be gone on from .*refused.jsonl"),
    "fewer refusals": (lambda out: (out / "refused.jsonl").write_text(""), "refused.jsonl is shorter than it was"),
}  # fmt: skip


def replace(out: Path, old: str, new: str) -> None:
    (out / "pack.json").write_text((out / "pack.json").read_text().replace(old, new))


def edit(out: Path, **values: Any) -> None:
    state = json.loads((out / "pack.json").read_text())
    (out / "pack.json").write_text(json.dumps({**state, **values}))


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_packing_does_not_go_on(tmp_path: Path, what: str) -> None:
    source, out = make_folder(tmp_path / "source"), tmp_path / "out"
    (source / "x.gif").write_bytes(b"")
    pack(source, out, shard_samples=3)
    damage, message = DAMAGE[what]
    damage(out)
    with pytest.raises(DataError, match=message):
        pack(source, out, shard_samples=3)


def test_two_packings_do_not_share_a_folder(begun: tuple[Path, Path]) -> None:
    source, out = begun
    with (out / LOCK).open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(
            DataError, match=r"another process is packing into .*out; wait for it, or give another folder"
        ):
            pack(source, out, shard_samples=3)
    assert pack(source, out, shard_samples=3).samples == 7


# --- speed and memory


class Counted:
    """Items that know how many of them are in flight."""

    def __init__(self, count: int, size: int) -> None:
        self.count, self.size, self.name = count, size, "x"
        self.begun, self.most, self.taken = 0, 0, 0

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> "Counted":
        return self

    def read(self) -> tuple[str, list[Piece]]:
        self.begun += 1
        self.most = max(self.most, self.begun - self.taken)
        return "x", [Piece("cls", Content.OPAQUE, b"x")]


@pytest.mark.parametrize(("size", "bound"), [(1, 12), (100 << 20, 2), (1 << 30, 1)])
def test_what_is_in_flight_is_bounded(size: int, bound: int) -> None:
    items = Counted(50, size)
    for sample in pack_module_samples(items):
        assert not isinstance(sample, Refused)
        items.taken += 1
    assert items.taken == items.begun == 50 and items.most <= bound + 1  # the one that was just given out


def pack_module_samples(items: Counted) -> Iterable[Any]:
    from dstrain.data.packing.pack import _samples

    return _samples(items, 0, None, workers=3)


def test_many_shards_do_not_slow_the_manifest(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, "x", 3000, "x", {})
    (tmp_path / "shard-000000.tar").write_bytes(b"")
    encode, calls = json.dumps, 0

    def counted(value: Any, **options: Any) -> str:
        nonlocal calls
        calls += 1
        return encode(value, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json, "dumps", counted)
        patch.setattr("dstrain.data.packing.ledger.write_atomic", lambda path, data: None)
        for number in range(1000):
            ledger.add(tmp_path / "shard-000000.tar", 3, 3 * number)
    assert calls == 2000


def test_a_bar_only_on_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = make_folder(tmp_path / "source")
    pack(source, tmp_path / "out", progress=True)
    assert capsys.readouterr().err == ""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(sys.stderr), "isatty", lambda self: True, raising=False)
        (source / "x.gif").write_bytes(b"")
        pack(source, tmp_path / "out2", shard_samples=2, progress=True)
    shown = capsys.readouterr().err
    assert "8/8" in shown and "refused=1" in shown and "shards=3" in shown and "sample/s" in shown


# --- the command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "a.png").write_bytes(smooth(100, 60))
    rows = [
        {"control": "a.png", "image": "a.png", "prompt": "x"},
        *({"control": f"{n}.png", "prompt": "x"} for n in range(25)),
    ]
    table = write_jsonl(tmp_path / "t.jsonl", rows)
    out = tmp_path / "out"
    options = ["--columns", "control", "--base", str(source), "--format", "jpg", "--quality", "50", "--max-side", "50"]
    command = ["pack", str(table), "--out", str(out), "--shard-mb", "1", "--workers", "2", *options]
    assert cli.main(command) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "refused line 2: 0.png: missing_file (there is no file 0.png)" and len(shown) == 22
    assert shown[20] == f"all 25 refusals are in {out}/refused.jsonl"
    assert shown[21] == f"{out}: 1 samples in 1 shards, 0.0102 MB; refused 25: missing_file 25"
    (sample,) = samples(out).values()
    assert list(sample) == ["control.jpg", "json"] and Image.open(io.BytesIO(sample["control.jpg"])).size == (50, 30)
    assert cli.main(command) == 0 and capsys.readouterr().out.splitlines() == shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--quality", "50"], "--quality belongs to --format or --max-side"),
        (["--quality", "200", "--format", "jpg"], "quality must be from 1 to 100, not 200"),
        (["--columns", "image"], "is not a table"),
    ],
)
def test_the_command_refuses(
    tmp_path: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_folder(tmp_path / "source")
    assert cli.main(["pack", str(source), "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()

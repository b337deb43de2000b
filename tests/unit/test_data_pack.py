"""Packing: what goes in comes out, twice the same bytes, and what is refused is said."""

import csv
import errno
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest
import webdataset
from data_samples import image_bytes, picture
from PIL import Image
from test_data_decode import chunk, png_of

from dstrain.data import open_dataset, pack
from dstrain.data.shards import SIDECAR
from dstrain.errors import DataError


def make_folder(folder: Path, count: int = 7) -> Path:
    kinds = [("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("jpeg", "JPEG")]
    for number in range(count):
        extension, kind = kinds[number % 4]
        place = folder / ("a", "b/deep", ".")[number % 3] / f"picture {number}.v2.{extension}"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(picture(32 + number, 64, seed=number, kind=kind))
        place.with_suffix(".txt").write_text(f"  the caption of {number} é\n")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.endswith(SIDECAR)}


def test_round_trip_of_a_folder(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    report = pack(source, tmp_path / "out", shard_samples=3)
    assert [path.name for path in report.shards] == [f"shard-00000{i}.tar" for i in range(3)]
    assert report.samples == 7 and report.refused == [] and "7 samples in 3 shards" in report.summary()
    dataset = open_dataset([str(tmp_path / "out")], max_pixels=1 << 20)
    names = sorted(p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file() and p.suffix != ".txt")
    assert len(dataset) == len(names) == 7
    for row, name in enumerate(names):
        number = int(name.split("picture ")[1][0])
        assert dataset.read(row) == ((source / name).read_bytes(), f"the caption of {number} é")
        assert dataset.keys[row].startswith(f"{row:08d}-") and dataset.keys[row].endswith(f"picture-{number}-v2")


def test_webdataset_reads_what_is_packed(tmp_path: Path) -> None:
    pack(make_folder(tmp_path / "source"), tmp_path / "out", shard_samples=4)
    ours = open_dataset([str(tmp_path / "out")], max_pixels=1 << 20)
    shards = [str(path) for path in ours.shards]
    theirs = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
    assert [sample["__key__"] for sample in theirs] == list(ours.keys)
    for row, sample in enumerate(theirs):
        data, caption = ours.read(row)
        extension = next(kind for kind in ("png", "jpg", "webp") if kind in sample)
        assert sample["txt"] == caption
        assert sample[extension].tobytes() == Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        source = make_folder(tmp_path / name)
        for number, path in enumerate(sorted(source.rglob("*"), reverse=name == "two")):
            os.utime(path, (number, number))
            path.chmod(0o700 if name == "two" else 0o755)
        pack(source, tmp_path / f"out-{name}", shard_samples=3)
    assert content(tmp_path / "out-one") == content(tmp_path / "out-two")
    with tarfile.open(tmp_path / "out-one/shard-000000.tar") as tar:
        members = tar.getmembers()
    assert {(m.uid, m.gid, m.mtime, m.mode, m.uname) for m in members} == {(0, 0, 0, 0o644, "")}
    assert all(not m.pax_headers for m in members)


@pytest.mark.parametrize("shard_bytes", [1, 20480, 50000])
def test_shards_keep_to_their_size(tmp_path: Path, shard_bytes: int) -> None:
    source = make_folder(tmp_path / "source", 12)
    report = pack(source, tmp_path / "out", shard_bytes=shard_bytes)
    dataset = open_dataset([str(tmp_path / "out")], max_pixels=1 << 20)
    counts = [sum(dataset.shard(row) == path for row in range(12)) for path in report.shards]
    assert sum(counts) == 12 and min(counts) >= 1
    for path, count in zip(report.shards, counts):
        assert count == 1 or path.stat().st_size <= shard_bytes
    assert len(report.shards) == 12 if shard_bytes == 1 else len(report.shards) < 12


def test_the_extension_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.png").write_bytes(picture(32, 32, kind="JPEG"))
    (tmp_path / "in/x.txt").write_text("caption")
    pack(tmp_path / "in", tmp_path / "out")
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        assert tar.getnames() == ["00000000-x.jpg", "00000000-x.txt"]


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
        "noise.png": (png_of(32, 32, chunk(b"IDAT", b"not zlib")), b"x", "image_damaged"),  # only decoding tells
        "gif.png": (image_bytes(Image.new("RGB", (32, 32)), "GIF"), b"x", "image_format"),
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
    assert "refused 12: image_damaged 2, image_format 2, unsafe_name 2, " in report.summary()
    assert all(entry.detail for entry in report.refused)


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8-sig") as f:
            writer = csv.DictWriter(f, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
@pytest.mark.parametrize(("image", "caption"), [("image", "prompt"), ("file_name", "text"), ("image", "caption")])
def test_tables(tmp_path: Path, suffix: str, image: str, caption: str) -> None:
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "sub/one.png").write_bytes(picture(32, 32, seed=1))
    (source / "two.png").write_bytes(picture(32, 48, seed=2))
    (tmp_path / "outside.png").write_bytes(picture(32, 32))
    rows = [
        {image: "two.png", caption: 'with "quotes", commas\nand lines'},
        {image: "sub/one.png", caption: "first caption"},
        {image: "sub/one.png", caption: "second caption"},
        {image: "sub/../two.png", caption: "inside again"},
        {image: "../outside.png", caption: "x"},
        {image: str(tmp_path / "outside.png"), caption: "x"},
        {image: "https://host/a.png", caption: "x"},
        {image: "two.png", caption: ""},
        {image: "x" * 300 + ".png", caption: "x"},
        {image: "", caption: "x"},
    ]
    table = write_table(source / f"metadata{suffix}", rows)
    by_folder = pack(source, tmp_path / "out")
    assert [(entry.name[:5], entry.reason) for entry in by_folder.refused] == [
        ("row 4", "unsafe_name"),
        ("row 5", "unsafe_name"),
        ("row 6", "missing_file"),
        ("row 7", "empty_caption"),
        ("row 8", "missing_file"),
        ("row 9", "missing_file"),
    ]
    dataset = open_dataset([str(tmp_path / "out")], max_pixels=4096)
    assert [dataset.read(row)[1] for row in range(4)] == [row[caption] for row in rows[:4]]
    assert list(dataset.keys) == ["00000000-two", "00000001-sub-one", "00000002-sub-one", "00000003-sub-two"]
    pack(table, tmp_path / "out2")
    assert content(tmp_path / "out") == content(tmp_path / "out2")


def test_odd_values_in_json_tables_are_refused_by_row(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(32, 32))
    rows = [{"image": ["a.png"], "prompt": "x"}, {"image": "a.png", "prompt": 5}, {"image": "a.png", "prompt": None}]
    rows += [
        {"image": "a\0.png", "prompt": "x"},
        {"image": "a.png", "prompt": "\ud800"},
        {"image": "a.png", "prompt": "ok"},
    ]
    report = pack(write_table(tmp_path / "t.json", rows), tmp_path / "out")
    assert report.samples == 1
    assert [entry.reason for entry in report.refused] == [
        "missing_file", "no_caption", "empty_caption", "missing_file", "caption_encoding",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "a,b\n1,2\n", r"t.csv, row 0: the columns are a, b; needed are image or file_name, and prompt or"),
        ("t.csv", "image\nx.png\n", "needed are"),
        ("t.csv", "image,prompt\n", "t.csv has no rows"),
        ("t.csv", 'image,prompt\na.png,"open\n', "t.csv cannot be read as csv"),
        ("t.json", "{", "t.json cannot be read as json"),
        ("t.json", '{"image": "a"}', "must be a list of records"),
        ("t.json", "[1, 2]", "row 0: 1 is not a record"),
        ("t.json", "[" * 100000, "t.json cannot be read as json"),
        ("t.jsonl", '{"image": "a", "prompt": "b"}\nnonsense', "t.jsonl cannot be read as jsonl"),
        ("t.parquet", "", "t.parquet is not a table that can be read; give .csv, .json or .jsonl"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        pack(tmp_path / name, tmp_path / "out")


def test_table_that_is_not_utf8(tmp_path: Path) -> None:
    for name in ("t.csv", "t.json", "t.jsonl"):
        (tmp_path / name).write_bytes(b"image,prompt\ncaf\xe9,x\n")
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            pack(tmp_path / name, tmp_path / "out")


def test_sources_that_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/a.png").write_bytes(picture(32, 32))
    (tmp_path / "two").mkdir()
    for name in ("metadata.csv", "metadata.json"):
        (tmp_path / "two" / name).write_text("")
    for source, message in [
        ("nowhere", "no such source: .*nowhere; give a folder"),
        ("empty", "empty has no pictures"),
        ("bare", r"none of the 1 pictures of .*bare can be packed \(no_caption 1\)"),
        ("two", r"several tables \(metadata.csv, metadata.json\)"),
    ]:
        with pytest.raises(DataError, match=message):
            pack(tmp_path / source, tmp_path / "out")
    assert not any((tmp_path / "out").glob("*"))


def test_out_must_be_a_new_place_that_can_be_written_to(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "source")
    pack(source, tmp_path / "out")
    before = content(tmp_path / "out")
    with pytest.raises(DataError, match="out already holds shards; give an empty folder"):
        pack(source, tmp_path / "out")
    assert content(tmp_path / "out") == before
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"shards cannot be written to .*file/out: Not a directory"):
        pack(source, tmp_path / "file/out")


def test_a_full_disk_leaves_only_whole_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folder(tmp_path / "source")
    whole = pack(source, tmp_path / "whole", shard_samples=2)
    written = 0
    add = tarfile.TarFile.addfile

    def full(self: tarfile.TarFile, *args: Any) -> None:
        nonlocal written
        written += 1
        if written > 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        add(self, *args)

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    with pytest.raises(DataError, match=r"cannot be written to .*out: No space left on device"):
        pack(source, tmp_path / "out", shard_samples=2)
    assert content(tmp_path / "out") == {whole.shards[0].name: whole.shards[0].read_bytes()}

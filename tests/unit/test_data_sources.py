"""What there is to pack: tables of every form, folders with all that lies in them, tars, and what is wrong in them."""

import csv
import io
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_samples import picture, sample_members, write_tar

from dstrain.data.packing.items import FileItem
from dstrain.data.packing.sources import Listing, find_items
from dstrain.data.reasons import BadSample, Reason
from dstrain.errors import DataError

Parts = dict[str, bytes]


def read(item: Any) -> Parts | str:
    """Column -> bytes of an item, or the reason of its refusal."""
    try:
        return {part.column: part.data for part in item.read()[1]}
    except BadSample as error:
        return str(error.reason)


def faults(listing: Listing) -> list[tuple[str, str, str]]:
    found = []
    for place in range(len(listing.items)):
        try:
            listing.items[place].read()
        except BadSample as error:
            found.append((listing.items[place].name, str(error.reason), str(error)))
    return found


def put(folder: Path, *names: str) -> Path:
    """Write each name as a picture of its own."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content(name))
    return folder


def content(name: str) -> bytes:
    return picture(32, 32, seed=sum(name.encode()))


def write_table(path: Path, rows: list[dict[str, Any]]) -> Path:
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_the_file_columns_of_a_table(tmp_path: Path, suffix: str) -> None:
    put(tmp_path, "a.png", "e.png", "c.png", "m.png", "v.png")
    rows = [
        {"edit_image": "e.png", "image": "a.png", "prompt": " p ", "canny_images": "c.png", "x_mask": "m.png",
         "video": "v.png", "imagery": "no file", "score": "7"},
        {"edit_image": "", "image": "", "prompt": "only a mask", "canny_images": "", "x_mask": "m.png", "video": "",
         "imagery": "", "score": ""},
    ]  # fmt: skip
    items = find_items(write_table(tmp_path / f"metadata{suffix}", rows)).items
    parts = read(items[0])
    assert list(parts) == ["image", "video", "edit_image", "canny_images", "x_mask", "json"]  # the main files first
    assert parts["edit_image"] == content("e.png") and parts["x_mask"] == content("m.png")
    assert parts["json"] == b'{"caption": "p", "imagery": "no file", "score": "7"}'
    assert list(read(items[1])) == ["x_mask", "json"]


def test_lists_of_files_and_of_captions(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png")
    rows: list[dict[str, Any]] = [
        {"image": "a.png", "edit_image": ["b.png", "a.png"], "prompt": ["eins", " zwei é "]},
        {"image": "a.png", "edit_image": ["b.png", None, "", "a.png"], "prompt": ["one", " ", None] [:2]},
        {"image": "a.png", "edit_image": [], "prompt": "plain"},
        {"image": "a.png", "edit_image": None, "prompt": ["", " "]},
        {"image": "a.png", "prompt": []},
        {"image": "a.png", "prompt": ["x", 5]},
        {"image": "a.png", "edit_image": ["b.png", 5], "prompt": "x"},
        {"image": ["a.png"], "prompt": "x"},
        {"image": None, "edit_image": [None], "prompt": "x"},
    ]  # fmt: skip
    items = find_items(write_table(tmp_path / "t.json", rows)).items
    first = read(items[0])
    assert list(first) == ["image", "edit_image.0", "edit_image.1", "json"]
    assert first["json"].decode() == '{"caption": ["eins", "zwei é"]}' and first["edit_image.1"] == content("a.png")
    second = read(items[1])
    assert list(second) == ["image", "edit_image.0", "edit_image.3", "txt"] and second["txt"] == b"one"
    assert list(read(items[2])) == ["image", "txt"] and list(read(items[7])) == ["image.0", "txt"]
    assert [read(items[i]) for i in (3, 4, 5, 6, 8)] == [
        "empty_caption", "empty_caption", "no_caption", "missing_file", "missing_file",
    ]  # fmt: skip


def test_columns_that_are_named(tmp_path: Path) -> None:
    put(tmp_path, "a.png", "b.png", "c.png")
    rows = [{"file_name": "a.png", "left": "b.png", "ctrl.0": "c.png", "text": "x", "w_image": "gone.png"}]
    table = write_table(tmp_path / "t.jsonl", rows)
    parts = read(find_items(table, columns=["left", "file_name", "ctrl.0"]).items[0])
    assert list(parts) == ["left", "image", "ctrl.0", "json"]
    assert json.loads(parts["json"]) == {"caption": "x", "w_image": "gone.png"}
    assert read(find_items(table).items[0]) == "missing_file"
    for columns, message in [
        (["lefft"], r"t.jsonl has no column 'lefft', did you mean 'left'\?; it has file_name, left, ctrl.0, text"),
        ([], "needed is one of image, file_name, video, or file columns that are named with --columns"),
    ]:
        with pytest.raises(DataError, match=message):
            find_items(table, columns=columns)


@pytest.mark.parametrize("column", ["a image", "x/y_image", "txt", "png", "é_image", "a..b_image", "x" * 40 + "_image"])
def test_columns_that_no_member_can_be_called(tmp_path: Path, column: str) -> None:
    table = write_table(tmp_path / "t.jsonl", [{column: "a.png", "image": "a.png", "prompt": "x"}])
    with pytest.raises(DataError, match=r"t.jsonl: '.*' cannot name a file column; rename it"):
        find_items(table, columns=["image", column])


def test_columns_that_differ_in_case_only(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.jsonl", [{"A_image": "a.png", "a_image": "a.png", "prompt": "x"}])
    with pytest.raises(DataError, match="'A_image' cannot name a file column"):
        find_items(table)


def test_further_columns_are_kept_with_the_caption(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    lines = [
        '{"image": "a.png", "prompt": "p", "caption": "c", "text": "t", "n": NaN, "deep": {"b": [1], "a": null}}',
        '{"image": "a.png", "prompt": "p", "n": "\\ud800"}',
        '{"image": "a.png", "prompt": "p", "n": "' + "x" * 70000 + '"}',
        '{"image": "a.png", "prompt": NaN}',
        '{"image": "a.png", "n": 1}',
    ]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    listing = find_items(tmp_path / "t.jsonl")
    kept = b'{"caption": "p", "caption_column": "c", "deep": {"a": null, "b": [1]}, "n": null, "text": "t"}'
    assert read(listing.items[0])["json"] == kept
    assert [fault[:2] for fault in faults(listing)] == [
        ("line 2: a.png", "caption_encoding"),
        ("line 3: a.png", "caption_too_long"),
        ("line 4: a.png", "empty_caption"),
        ("line 5: a.png", "no_caption"),
    ]


def test_a_csv_as_windows_and_pandas_write_it(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    text = ',image,prompt\r\n0,a.png,"two\r\nlines, ""quoted"""\r\n\r\n1,a.png,one,two\r\n2,a.png\r\n3,,x\r\n'
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    listing = find_items(tmp_path / "t.csv")
    assert read(listing.items[0])["txt"] == b'two\r\nlines, "quoted"'  # the column without a name is not kept
    assert faults(listing) == [
        (
            "line 5: a.png",
            "ambiguous",
            "the row has more cells than the table has columns: quote a cell that has commas",
        ),
        ("line 6: a.png", "empty_caption", "the caption is empty"),
        ("line 7", "missing_file", "no file is named under image"),
    ]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "a,b\n1,2\n", "t.csv: the columns are a, b; needed is one of image, file_name, video, or file"),
        ("t.csv", "image\nx.png\n", r"t.csv: the columns are image; needed is one of prompt or caption or text"),
        ("t.csv", "image,prompt\n", "t.csv has no rows"),
        ("t.csv", "", "t.csv has no rows"),
        ("t.csv", "image,prompt,image\na.png,x,b.png\n", "t.csv cannot be read as csv: it has several columns 'image'"),
        ("t.csv", 'image,prompt\na.png,x\na.png,"open\n', "read as csv: the row after line 2: unexpected end"),
        ("t.json", "{", "t.json cannot be read as json"),
        ("t.json", '{"image": "a"}', "must be a list of records"),
        ("t.json", '[{"image": "a", "prompt": "b"}, 2]', "t.json, record 2: 2 is not a record with named columns"),
        ("t.json", "[" * 100000, "t.json cannot be read as json"),
        ("t.jsonl", '\n{"image": "a", "prompt": "b"}\n\n nonsense\n', "as jsonl: line 4, character 2: Expecting value"),
        ("t.jsonl", '{"image": "a", "prompt": "b"}\n\n[1]\n', r"t.jsonl, line 3: \[1\] is not a record"),
        ("t.jsonl", "\n" + "[" * 100000, "t.jsonl cannot be read as jsonl: line 2: maximum recursion depth"),
        ("t.jsonl", '{"image": "a", "prompt": ' + "9" * 5000 + "}", "as jsonl: line 1: Exceeds the limit"),
        ("t.parquet", "", "t.parquet is not a table that can be read; give .csv, .json or .jsonl"),
    ],
)  # fmt: skip
def test_tables_that_cannot_be_read(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        find_items(tmp_path / name)


def test_tables_that_are_not_utf8(tmp_path: Path) -> None:
    for name in ("t.csv", "t.json", "t.jsonl"):
        (tmp_path / name).write_bytes(b"image,prompt\ncaf\xe9,x\n")
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            find_items(tmp_path / name)


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
def test_paths_stay_inside_the_base_folder(tmp_path: Path, suffix: str) -> None:
    put(tmp_path, "in/sub/one.png", "in/two.png", "outside.png")
    (tmp_path / "in/out.png").symlink_to("../outside.png")
    (tmp_path / "in/loop.png").symlink_to("loop.png")
    (tmp_path / "in/inside.png").symlink_to("sub/one.png")
    os.mkfifo(tmp_path / "in/pipe.png")
    paths = [
        "sub/one.png", "sub/../two.png", str(tmp_path / "in/two.png"), "inside.png",
        "../outside.png", str(tmp_path / "outside.png"), "out.png",
        "https://host/a.png", "x" * 300 + ".png", "loop.png", "pipe.png", "sub", "two.png/x.png", "~/a.png", "$HOME",
    ]  # fmt: skip
    rows = [{"image": path, "prompt": "x"} for path in paths]
    listing = find_items(write_table(tmp_path / f"in/t{suffix}", rows))
    assert [reason for _, reason, _ in faults(listing)] == ["unsafe_name"] * 3 + ["missing_file"] * 8
    assert [listing.items[i].read()[0] for i in range(4)] == ["sub/one", "sub/../two", "two", "inside"]
    moved = write_table(tmp_path / f"t{suffix}", rows[:4])
    assert all(isinstance(read(find_items(moved, base=tmp_path / "in").items[i]), dict) for i in range(4))
    assert [read(find_items(moved).items[i]) == "missing_file" for i in range(4)] == [True, True, False, True]
    with pytest.raises(DataError, match=r"no such folder: .*/nowhere; give the one that the paths of"):
        find_items(moved, base=tmp_path / "nowhere")


def test_a_file_name_with_a_nul_character(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.json", [{"image": "a\0.png", "prompt": "x"}])
    assert read(find_items(table).items[0]) == "missing_file"


def make_folder(folder: Path) -> Path:
    names = ["b/Zoë ☃.PNG", "b/deep/x.v2.jpg", "a.jpeg", "c.webp", "d.jfif", "b/film.MP4"]
    put(folder, *names)
    for name in names[1:]:
        (folder / name).with_suffix(".txt").write_text(f"caption of {name}")
    (folder / "b/Zoë ☃.TXT").write_text("upper case")
    return folder


def test_a_folder(tmp_path: Path) -> None:
    source = make_folder(tmp_path)
    listing = find_items(source)
    assert [listing.items[i].name for i in range(6)] == [
        "a.jpeg", "b/Zoë ☃.PNG", "b/deep/x.v2.jpg", "b/film.MP4", "c.webp", "d.jfif",
    ]  # fmt: skip
    assert read(listing.items[1]) == {"image": content("b/Zoë ☃.PNG"), "txt": b"upper case"}
    assert list(read(listing.items[3])) == ["video", "txt"]
    assert faults(listing) == []
    assert [item.size for item in listing.items] == [len(content(item.name)) for item in listing.items]


def test_what_a_folder_holds_besides(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "in")
    put(tmp_path, "outside/x.png")
    put(
        source,
        ".hidden.png",
        ".git/x.png",
        "alone.png",
        "folder.png/x.png",
        "x.gif",
        "b/y.HEIC",
        "z.tiff",
        "v.avi",
        "n.md",
    )
    (source / "folder.png/x.txt").write_text("x")
    (source / "linked").symlink_to(tmp_path / "outside")
    (source / "round").symlink_to(source)
    (source / "loop").symlink_to("loop")
    (source / "loop.png").symlink_to("loop.png")
    (source / "loop.txt").write_text("x")
    (source / "lost.txt").symlink_to("nowhere")
    put(source, "lost.png", "latin.png")
    (source / "latin.txt").write_bytes(b"caf\xe9")
    listing = find_items(source)
    assert [(name, reason) for name, reason, _ in faults(listing)] == [
        ("alone.png", "no_caption"),
        ("b/y.HEIC", "image_format"),
        ("latin.png", "caption_encoding"),
        ("linked", "unsafe_name"),
        ("loop.png", "missing_file"),
        ("lost.png", "missing_file"),
        ("round", "unsafe_name"),
        ("v.avi", "video_format"),
        ("x.gif", "image_format"),
        ("z.tiff", "image_format"),
    ]
    assert len(listing.items) == 6 + 10 + 1
    details = {name: detail for name, _, detail in faults(listing)}
    assert details["alone.png"] == "there is no alone.txt beside it" and "links lead in a circle" in details["loop.png"]
    assert details["x.gif"] == "gif is not read; convert it to png, jpg or webp"


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_folder(tmp_path)
    scandir = os.scandir

    def closed(path: Any) -> Any:
        if Path(path).name == "deep":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match=r"folder .*b/deep cannot be read: Permission denied; nothing was packed"):
        find_items(source)


def test_which_source_it_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    put(tmp_path, "both/a.png", "gifs/a.gif")
    write_tar(tmp_path / "both/a.tar", sample_members(3))
    write_tar(tmp_path / "gifs/a.tar", sample_members(3))
    (tmp_path / "two").mkdir()
    for name in ("metadata.csv", "metadata.json"):
        (tmp_path / "two" / name).write_text("")
    write_tar(tmp_path / "none.tar", [])
    assert len(find_items(tmp_path / "both").items) == 1  # the pictures of a folder, not the archive beside them
    assert len(find_items(tmp_path / "gifs").items) == 3
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("nowhere", {}, "no such source: .*nowhere; give a folder of pictures"),
        ("nowhere/*.tar", {}, r"no shard matches .*nowhere/\*.tar"),
        ("empty", {}, r"empty has no pictures or videos \(png, .*, mkv\), no table and no tars"),
        ("none.tar", {}, "none.tar: the tars hold no samples"),
        ("two", {}, r"several tables \(metadata.csv, metadata.json\)"),
        ("both", {"columns": ["image"]}, "both is not a table; file columns and a base folder belong to .csv"),
        ("both", {"base": tmp_path}, "both is not a table"),
    ]
    for name, options, message in cases:
        with pytest.raises(DataError, match=message):
            find_items(f"{tmp_path}/{name}", **options)
    with pytest.raises(DataError, match=r"s3://bucket/a.tar is not on this machine; copy it"):
        find_items(r"s3://bucket/a.tar")


def test_tars(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    write_tar(tmp_path / "t/b.tar", [*sample_members(2), ("bad.gif", b"x"), ("bad.txt", b"x")])
    write_tar(tmp_path / "t/a.tar", sample_members(3, first=7))
    for source in (tmp_path / "t", f"{tmp_path}/t/*.tar"):
        items = find_items(source).items
        assert [items[i].name for i in range(len(items))] == [
            *(f"{tmp_path}/t/a.tar: {key}" for key in ("0007", "0008", "0009")),
            *(f"{tmp_path}/t/b.tar: {key}" for key in ("0000", "0001", "bad")),
        ]
        label, parts = items[4].read()
        assert label == "0001" and [part.data for part in parts] == [data for _, data in sample_members(1, first=1)]
        assert items[4].size == sum(len(part.data) for part in parts)
        assert read(items[5]) == "image_format"
    assert len(find_items(tmp_path / "t/a.tar").items) == 3


def test_a_tar_that_changes_after_it_was_listed(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", sample_members(2))
    items = find_items(tar).items
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    assert [read(items[0]), len(read(items[1]))] == ["changed", 2]
    item = find_items(tar).items[0]
    tar.unlink()
    with pytest.raises(DataError, match=r"a.tar cannot be read .*No such file"):
        item.read()


CHANGES: dict[str, Callable[[Path], object]] = {
    "a caption": lambda folder: (folder / "c.txt").write_text("another"),
    "a picture's size": lambda folder: (folder / "c.webp").write_bytes(b"x"),
    "one more": lambda folder: put(folder, "new.png"),
    "one less": lambda folder: (folder / "c.webp").unlink(),
    "a name": lambda folder: (folder / "c.webp").rename(folder / "c2.webp"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_sees(tmp_path: Path, change: str) -> None:
    source = make_folder(tmp_path)
    before = find_items(source).digest
    for path in source.rglob("*"):
        os.utime(path, (1, 1))
    assert find_items(source).digest == before  # another copy of the same files is the same
    CHANGES[change](source)
    assert find_items(source).digest != before


def test_more_columns_than_an_index_has(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.json", [{"image": "a.png", "x_images": ["a.png"] * 253, "prompt": "x"}])
    assert len(find_items(table).items) == 1
    write_table(table, [{"image": "a.png", "x_images": ["a.png"] * 254, "prompt": "x"}])
    with pytest.raises(DataError, match=r"t.json has 255 files a sample with its lists; an index has 254 columns"):
        find_items(table)
    (tmp_path / "t").mkdir()
    for number in range(3):
        write_tar(tmp_path / f"t/{number}.tar", [(f"a.{number}.{place}", b"x") for place in range(100)])
    with pytest.raises(DataError, match="300 kinds of members, more than the 256 of a shard; dots in names"):
        find_items(tmp_path / "t")


@pytest.mark.parametrize("depth", range(300, 1100, 50))
def test_values_that_are_nested_deeply(tmp_path: Path, depth: int) -> None:
    put(tmp_path, "a.png")
    deep = "[" * depth + "]" * depth
    (tmp_path / "t.jsonl").write_text(f'{{"image": "a.png", "prompt": "x", "deep": {deep}}}')
    try:
        parts = read(find_items(tmp_path / "t.jsonl").items[0])
    except DataError as error:
        assert depth > 400 and ("recursion" in str(error) or "nested too deeply" in str(error))
    else:
        assert isinstance(parts, str) or deep.encode() in parts["json"]


def test_the_digest_sees_tables_and_tars(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    digests = set()
    for row in (
        {"prompt": "x"},
        {"prompt": "y"},
        {"prompt": "x", "n": 1},
        {"caption": "x", "n": 1},
        {"prompt": ["x", "y"]},
    ):
        digests.add(find_items(write_table(tmp_path / "t.json", [{"image": "a.png", **row}])).digest)
    assert len(digests) == 4  # which of its names the caption's column has changes nothing
    one = find_items(write_tar(tmp_path / "a.tar", sample_members(2))).digest
    assert one != find_items(write_tar(tmp_path / "a.tar", sample_members(2, first=1))).digest


def test_a_hundred_thousand_rows_are_listed_in_seconds(tmp_path: Path) -> None:
    put(tmp_path, "a.png")
    buffer = io.StringIO()
    for number in range(100_000):
        buffer.write(f'{{"image": "b{number}.png", "prompt": "row {number}"}}\n')
    (tmp_path / "t.jsonl").write_text(buffer.getvalue())
    started = time.process_time()
    listing = find_items(tmp_path / "t.jsonl")
    assert len(listing.items) == 100_000 and time.process_time() - started < 15
    assert listing.items[99_999].name == "line 100000: b99999.png"


def test_faults_are_not_read_again(tmp_path: Path) -> None:
    item = FileItem("x", tmp_path, (("image", "a.png"),), caption_file="gone.txt").surveyed()
    assert item.fault == (Reason.MISSING_FILE, "there is no file gone.txt") and item.size == 0

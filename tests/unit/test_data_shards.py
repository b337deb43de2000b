"""Shards and their indexes: what is a sample, what is left out and why, which files an entry names."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import webdataset
import xxhash
from data_samples import picture, sample_members, write_tar
from PIL import Image

from dstrain import cli
from dstrain.data.media.captions import MAX_CAPTION_BYTES, MAX_JSON_BYTES, captions_of
from dstrain.data.media.probe import MAX_IMAGE_BYTES
from dstrain.data.reasons import Reason, ranked
from dstrain.data.shards import catalog as shards
from dstrain.data.shards import processes
from dstrain.data.shards.catalog import find_local, find_shards, open_index, open_indexes, sidecar_of
from dstrain.data.shards.index import ShardIndex
from dstrain.data.shards.names import Content, column_of, split
from dstrain.data.shards.scan import AGAIN, BESIDE
from dstrain.errors import DataError
from dstrain.storage import locked

PNG = picture(32, 32)


def left_out(path: Path) -> dict[str, Reason]:
    return {entry.key: entry.reason for entry in open_index(path).excluded}


def columns(index: ShardIndex) -> dict[str, list[str]]:
    """The columns of each row's members."""
    names = [index.columns[number] for number in index.parts["column"]]
    return {
        key: names[row["first"] : row["first"] + row["count"]] for key, row in zip(index.keys, index.rows, strict=True)
    }


def caption(index: ShardIndex, row: int) -> list[str]:
    part = index.parts[index.rows["caption"][row]]
    data = index.path.read_bytes()[part["offset"] : part["offset"] + part["size"]]
    assert xxhash.xxh3_64_intdigest(data) == part["digest"]
    return captions_of(data, Content(part["kind"]).name.lower())


# What is a sample


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.png", ("a", "png")),
        ("x/y.z/a.b.PNG", ("x/y.z/a", "b.png")),
        ("./a.jpg", ("./a", "jpg")),
        ("a.tar.gz", ("a", "tar.gz")),
        ("a", None),
        ("a.", None),
        (".hidden.png", None),
        ("__meta__.json", None),
        ("", None),
    ],
)
def test_key_and_extension_are_those_of_webdataset(name: str, expected: tuple[str, str] | None) -> None:
    assert split(name) == expected
    theirs = webdataset.tariterators.base_plus_ext(name)
    if expected is not None:
        assert (theirs[0], theirs[1].lower()) == expected
    else:
        assert theirs[0] is None or theirs[1] == "" or name.startswith("__")


@pytest.mark.parametrize(
    ("extension", "expected"),
    [
        ("png", ("image", Content.IMAGE)),
        ("jpeg", ("image", Content.IMAGE)),
        ("mp4", ("video", Content.VIDEO)),
        ("mkv", ("video", Content.VIDEO)),
        ("txt", ("txt", Content.TXT)),
        ("json", ("json", Content.JSON)),
        ("edit_image.webp", ("edit_image", Content.IMAGE)),
        ("edit_image.0.png", ("edit_image.0", Content.IMAGE)),
        ("pose.webm", ("pose", Content.VIDEO)),
        ("en.txt", ("en.txt", Content.OPAQUE)),
        ("meta.json", ("meta.json", Content.OPAQUE)),
        ("npy", ("npy", Content.OPAQUE)),
        ("png.zst", ("png.zst", Content.OPAQUE)),
    ],
)
def test_columns(extension: str, expected: tuple[str, Content]) -> None:
    assert column_of(extension) == expected


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.gif", PNG), ("a.txt", b"caption")], Reason.IMAGE_FORMAT),
        ([("a.png", PNG), ("a.edit.tiff", PNG), ("a.txt", b"caption")], Reason.IMAGE_FORMAT),
        ([("a.AVIF", PNG)], Reason.IMAGE_FORMAT),
        ([("a.avi", PNG), ("a.txt", b"caption")], Reason.VIDEO_FORMAT),
        ([("a.png", PNG), ("a.txt", b"")], Reason.EMPTY_CAPTION),
        ([("a.png", PNG), ("a.txt", b"\xef\xbb\xbf \n\t ")], Reason.EMPTY_CAPTION),
        ([("a.png", PNG), ("a.txt", b"caf\xe9")], Reason.CAPTION_ENCODING),
        ([("a.png", PNG), ("a.txt", "utf-16".encode("utf-16-le"))], Reason.CAPTION_ENCODING),
        ([("a.png", PNG), ("a.txt", b"x" * (MAX_CAPTION_BYTES + 1))], Reason.CAPTION_TOO_LONG),
        ([("a.png", PNG), ("a.txt", b""), ("a.json", b'{"caption": "x"}')], Reason.EMPTY_CAPTION),
        ([("a.png", PNG), ("a.json", b"{")], Reason.NO_CAPTION),
        ([("a.png", PNG), ("a.json", b"[" * 60000)], Reason.NO_CAPTION),
        ([("a.png", PNG), ("a.json", b'{"caption": " "}')], Reason.EMPTY_CAPTION),
        ([("a.png", PNG), ("a.json", b'{"caption": []}')], Reason.EMPTY_CAPTION),
        ([("a.png", PNG), ("a.json", rb'{"caption": "\ud800"}')], Reason.CAPTION_ENCODING),
        ([("a.png", PNG), ("a.json", b" " * (MAX_JSON_BYTES + 1))], Reason.CAPTION_TOO_LONG),
        ([("a.png", PNG), ("a.jpg", picture(32, 32, kind="JPEG")), ("a.txt", b"x")], Reason.AMBIGUOUS),
        ([("a.png", PNG), ("a.txt", b"x"), ("a.png", PNG), ("a.txt", b"y")], Reason.AMBIGUOUS),
        ([("a.png", PNG), ("a.txt", b"x"), ("a.txt", b"y")], Reason.AMBIGUOUS),
        ([("a.png", PNG), ("a.PNG", PNG), ("a.txt", b"x")], Reason.AMBIGUOUS),
        ([("a.png", PNG), ("a.image.png", PNG), ("a.txt", b"x")], Reason.AMBIGUOUS),
        ([("a.edit", b"x"), ("a.edit.png", PNG)], Reason.AMBIGUOUS),
        ([("a.png", b""), ("a.txt", b"x")], Reason.IMAGE_FORMAT),
        ([("a.jpg", b"text"), ("a.txt", b"x")], Reason.IMAGE_FORMAT),
        ([("a.png", PNG[:-5]), ("a.txt", b"x")], Reason.IMAGE_DAMAGED),
        ([("a.png", PNG), ("a.mask.png", PNG[:-5]), ("a.txt", b"x")], Reason.IMAGE_DAMAGED),
    ],
)
def test_left_out(tmp_path: Path, members: list[tuple[str, bytes]], reason: Reason) -> None:
    path = write_tar(tmp_path / "a.tar", [*members, *sample_members(1)])
    assert left_out(path) == {"a": reason}
    assert list(open_index(path).keys) == ["0000"]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([("a.png", PNG)], ["image"]),
        ([("a.txt", b"x")], ["txt"]),
        ([("a.cls", b"5")], ["cls"]),
        ([("a.png", PNG), ("a.json", b'{"url": "http://x"}')], ["image", "json"]),
        ([("a.png", PNG), ("a.json", b'["caption"]')], ["image", "json"]),
        ([("a.png", PNG), ("a.json", b'{"caption": 5}')], ["image", "json"]),
        ([("a.png", PNG), ("a.json", b'{"caption": null, "text": "other"}')], ["image", "json"]),
        ([("a.txt.png", PNG), ("a.x.npy", b"")], ["txt", "x.npy"]),
    ],
)
def test_rows_without_a_caption(tmp_path: Path, members: list[tuple[str, bytes]], expected: list[str]) -> None:
    """Whether something is missed is decided by the training; nothing here is damaged."""
    index = open_index(write_tar(tmp_path / "a.tar", members))
    assert columns(index) == {"a": expected} and not index.excluded_counts
    assert (index.rows["caption"][0] >= 0) == (members == [("a.txt", b"x")])


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("a.txt", "\ufeff  häuser\n".encode(), ["häuser"]),
        ("a.TXT", b"upper", ["upper"]),
        ("a.json", b'{"caption": "from json"}', ["from json"]),
        ("a.json", b'{"text": "t", "prompt": "p", "url": "http://x"}', ["t"]),
        ("a.json", b'{"prompt": ["short", "a longer one", ""]}', ["short", "a longer one"]),
    ],
)
def test_captions(tmp_path: Path, name: str, data: bytes, expected: list[str]) -> None:
    index = open_index(write_tar(tmp_path / "a.tar", [("a.png", PNG), (name, data)]))
    assert caption(index, 0) == expected
    assert index.rows["caption_bytes"].tolist() == [max(len(text.encode()) for text in expected)]


@pytest.mark.parametrize("order", [1, -1])
def test_text_comes_before_json_however_bad(tmp_path: Path, order: int) -> None:
    for number, other in enumerate([b'{"caption": "json"}', b"{", b'{"caption": ""}', b" " * (MAX_JSON_BYTES + 1)]):
        members = [("a.txt", b"text"), ("a.json", other)][::order]
        index = open_index(write_tar(tmp_path / f"{number}.tar", [("a.png", PNG), *members]))
        assert caption(index, 0) == ["text"] and not index.excluded_counts


def test_what_webdataset_passes_over_is_in_nobodys_way(tmp_path: Path) -> None:
    between = [("__meta__.txt", b"x"), ("README", b""), (".a.png", b""), ("x/.DS_Store", b"")]
    path = write_tar(tmp_path / "a.tar", [("a.png", PNG), *between, ("a.txt", b"text"), *between])
    assert columns(open_index(path)) == {"a": ["image", "txt"]} and left_out(path) == {}


@pytest.mark.parametrize(
    ("names", "rows", "again", "beside"),
    [
        (["a.png", "b.png", "a.txt"], [], ["a"], ["b"]),
        (["a.png", "b.png", "a.txt", "b.txt"], [], ["a", "b"], []),
        (["a.png", "a.txt", "b.png", "b.txt", "a.cls", "c.png", "d.png"], ["d"], ["a"], ["b", "c"]),
        (["c.png", "x/a.png", "y/a.png", "a.png", "c.txt"], ["y/a"], ["c"], ["x/a", "a"]),
        (["b.png", "A.png", "a.png", "a.b.png", "c.png", "a.txt"], ["b"], ["a"], ["A", "c"]),
    ],
)
def test_a_key_that_comes_again_is_never_merged(
    tmp_path: Path, names: list[str], rows: list[str], again: list[str], beside: list[str]
) -> None:
    """Nor is what lies beside it believed: two headers that were exchanged make a wrong pair between two halves."""
    index = open_index(write_tar(tmp_path / "a.tar", [(n, PNG if n.endswith("g") else b"x") for n in names]))
    left = [(key, AGAIN) for key in again] + [(key, BESIDE) for key in beside]
    assert [(entry.key, entry.detail) for entry in index.excluded] == left
    assert list(index.keys) == rows and index.excluded_counts == {Reason.AMBIGUOUS: len(left)}
    with tarfile.open(index.path) as tar:
        offsets = [m.offset_data for m in tar if split(m.name)[0] in rows]
    assert index.parts["offset"].tolist() == offsets and len(columns(index)) == len(rows)


def test_exchanged_headers_make_no_wrong_pair(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", sample_members(7))
    with tarfile.open(path) as tar:
        at = {member.name: member.offset for member in tar}
    data = bytearray(path.read_bytes())
    a, b = (slice(at[name], at[name] + 512) for name in ("0002.txt", "0003.txt"))
    data[a], data[b] = data[b], data[a]
    path.write_bytes(data)
    assert left_out(path) == dict.fromkeys(["0001", "0002", "0003", "0004"], Reason.AMBIGUOUS)
    assert list(open_index(path).keys) == ["0000", "0005", "0006"]


def test_a_damaged_sample_that_comes_again(tmp_path: Path) -> None:
    members = [("a.png", b"damaged"), ("x.txt", b""), ("b.png", PNG), ("b.txt", b"x"), ("y.txt", b"")]
    members += [("a.png", PNG), ("a.txt", b"x")]
    index = open_index(write_tar(tmp_path / "a.tar", members))
    assert list(index.keys) == ["b"] and index.rows["caption"].tolist() == [1]
    assert ranked(e.reason for e in index.excluded) == "empty_caption 2, ambiguous 1, image_format 1"


def test_columns_of_left_out_samples_are_not_columns(tmp_path: Path) -> None:
    members = [("a.x", b""), ("a.x", b""), ("b.png", PNG), ("b.txt", b"x"), ("c.y", b""), ("c.gif", b""), ("d.z", b"")]
    index = open_index(write_tar(tmp_path / "a.tar", members))
    assert index.columns == ("image", "txt", "z") and columns(index) == {"b": ["image", "txt"], "d": ["z"]}


def test_too_many_kinds_of_members_are_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"photo 3.{n}.png", PNG) for n in range(300)])
    with pytest.raises(DataError, match=r"more than 256 kinds of members, the last being '256'.*first dot"):
        open_index(path)


def test_sizes_are_as_pictures_are_meant_to_be_seen(tmp_path: Path) -> None:
    turned = Image.new("RGB", (40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "t.jpg", exif=exif)
    path = write_tar(tmp_path / "a.tar", [("a.jpg", (tmp_path / "t.jpg").read_bytes()), ("b.png", picture(48, 20))])
    parts = open_index(path).parts
    assert parts["width"].tolist() == [20, 48] and parts["height"].tolist() == [40, 20]


def video(frames: int, size: tuple[int, int] = (48, 32)) -> bytes:
    av = pytest.importorskip("av")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            pixels = np.full((size[1], size[0], 3), 20 * number, np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        out.mux(stream.encode())
    return buffer.getvalue()


def test_videos(tmp_path: Path) -> None:
    data = video(5)
    members = [("a.mp4", data), ("a.txt", b"x"), ("b.pose.mp4", video(9, (32, 64))), ("b.png", PNG), ("b.txt", b"y")]
    members += [("cut.mp4", data[: len(data) // 2]), ("cut.txt", b"z"), ("text.webm", b"text")]
    index = open_index(write_tar(tmp_path / "a.tar", members))
    assert columns(index) == {"a": ["video", "txt"], "b": ["pose", "image", "txt"]}
    part, pose = index.parts[0], index.parts[2]
    assert (part["width"], part["height"], part["frames"], part["fps"], part["kind"]) == (48, 32, 5, 8, Content.VIDEO)
    assert (pose["width"], pose["height"], pose["frames"]) == (32, 64, 9)
    stats = index.stats["pose"]
    assert (stats.rows, stats.min_frames, stats.max_frames) == (1, 9, 9)
    assert left_out(index.path) == {"cut": Reason.VIDEO_DAMAGED, "text": Reason.VIDEO_FORMAT}


def test_without_pyav_a_shard_of_videos_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.mp4", video(1))])
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"pip install 'dstrain\[video\]'"):
        open_index(path)


def test_pictures_over_the_limits_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("a.png")
    info.size = MAX_IMAGE_BYTES + 1
    with path.open("wb") as file:  # a hole, no bytes on disk
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(512 + -(-info.size // 512) * 512 + 1024)
    assert left_out(path) == {"a": Reason.IMAGE_TOO_LARGE}


def test_shards_of_webdataset_writers_are_read(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "s-%04d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(6):
            image = Image.fromarray(np.full((50, 40, 3), number, np.uint8))
            sample = {"png": image, "edit.png": image, "txt": f"text {number}", "json": {"caption": "no"}, "cls": 5}
            writer.write({"__key__": f"{number:06d}", **sample})
    indexes = open_indexes([Path(name) for name in find_shards([str(tmp_path)])])
    assert [index.samples for index in indexes] == [4, 2]
    for number in range(6):
        index, row = indexes[number // 4], number % 4
        assert index.keys[row] == f"{number:06d}" and caption(index, row) == [f"text {number}"]
        assert sorted(columns(index)[f"{number:06d}"]) == ["cls", "edit", "image", "json", "txt"]


def test_webdataset_groups_the_same_samples(tmp_path: Path) -> None:
    members = [
        (f"{folder}/{n}.{extension}", b"x")
        for folder in ("x", "y.z", "./v")
        for n in range(3)
        for extension in ("txt", "cls", "A.b.npy")
    ]
    path = write_tar(tmp_path / "a.tar", members)
    index = open_index(path)
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert list(index.keys) == [sample["__key__"] for sample in theirs]
    for sample in theirs:
        names = [name for name in sample if not name.startswith("__")]
        assert sorted(columns(index)[sample["__key__"]]) == sorted(names)


@pytest.mark.parametrize("name", ["x/.png", "x/._a.png", "x/.DS_Store"])
def test_hidden_files_are_no_samples_in_any_folder(name: str) -> None:
    assert split(name) is None


# Memory and time


GREEDY = """
import os, resource, sys, time
from pathlib import Path
from dstrain.data.shards.catalog import open_index
open_index(Path(sys.argv[1]))
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
index = open_index(Path(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.perf_counter() - start, index.samples)
"""


def greed(tmp_path: Path, path: Path) -> tuple[float, float, int]:
    """MiB by which the memory of a process grows while it indexes a shard, seconds, samples."""
    small = write_tar(tmp_path / "small.tar", sample_members(2))
    done = subprocess.run(
        [sys.executable, "-c", GREEDY, str(small), str(path)], capture_output=True, text=True, check=True
    )
    grown, seconds, samples = done.stdout.split()
    return int(grown) / 1024, float(seconds), int(samples)


def test_a_large_member_is_not_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    info = tarfile.TarInfo("a.npy")
    info.size = 1 << 29
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(512 + info.size + 1024)
    grown, _, samples = greed(tmp_path, path)
    assert samples == 1 and grown < 32


def test_many_small_members_take_little_memory_and_time(tmp_path: Path) -> None:
    count = 40_000
    block = bytearray(tarfile.TarInfo("0000000.txt").tobuf(tarfile.USTAR_FORMAT))
    block[124:135] = b"%011o" % 1
    with (tmp_path / "a.tar").open("wb") as file:
        for number in range(count):
            block[:7] = b"%07d" % number
            block[148:156] = b" " * 8
            block[148:156] = b"%06o\0 " % sum(block)
            file.write(block + b"x".ljust(512, b"\0"))
        file.write(b"\0" * 1024)
    grown, seconds, samples = greed(tmp_path, tmp_path / "a.tar")
    index = (16 + 48 + 8 + 7) * count / 2**20  # row, part, key
    assert samples == count and seconds < 10
    assert grown < 64 * count / 1e6 + 2 * index + 8, "of a million members: 64 MiB beyond the index and its file"


def test_opening_many_indexes_is_fast(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", sample_members(4))
    open_index(path)
    paths = [tmp_path / f"{number}.tar" for number in range(1000)]
    for copy in paths[1:]:
        copy.hardlink_to(path)
        sidecar_of(copy).hardlink_to(sidecar_of(path))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert len(open_indexes(paths)) == 1000
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5  # 0.06 where nothing else runs


# Sidecars


def test_a_fresh_sidecar_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", sample_members(3))
    built = open_index(path)
    monkeypatch.setattr(shards, "scan", None)  # building again would fail
    assert np.array_equal(open_index(path).parts, built.parts)


@pytest.mark.parametrize("same_size", [True, False])
def test_a_stale_sidecar_is_made_again(tmp_path: Path, same_size: bool) -> None:
    path = write_tar(tmp_path / "a.tar", sample_members(3))
    open_index(path)
    write_tar(path, sample_members(3, first=3) if same_size else sample_members(9, first=3))
    os.utime(path, ns=(1, 1))
    assert list(open_index(path).keys)[:3] == ["0003", "0004", "0005"]
    assert open_index(path).mtime_ns == 1


def test_a_shard_that_grows_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", sample_members(3))
    digest = shards.scan.__globals__["shard_digest"]

    def appended(fd: int) -> str:
        with path.open("ab") as file:
            file.write(b"\0" * 512)
        return digest(fd)

    monkeypatch.setitem(shards.scan.__globals__, "shard_digest", appended)
    with pytest.raises(DataError, match="changed while it was indexed; wait"):
        open_index(path)
    assert list(tmp_path.iterdir()) == [path]


def test_several_threads_may_index_at_once(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", sample_members(8))
    for _ in range(3):
        sidecar_of(path).unlink(missing_ok=True)
        with ThreadPoolExecutor(8) as ranks:
            indexes = list(ranks.map(open_index, [path] * 8))
        assert all(np.array_equal(index.rows, indexes[0].rows) for index in indexes)
    assert sorted(tmp_path.iterdir()) == [path, sidecar_of(path)]


def _open_counting(path: str, log: str) -> None:
    scan = shards.scan

    def counting(path: Path, fd: int) -> ShardIndex:
        with open(log, "a") as file:  # noqa: PTH123
            file.write("x")
        time.sleep(0.3)
        return scan(path, fd)

    shards.scan = counting
    assert open_index(Path(path)).samples == 8


def test_processes_index_a_shard_once(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", sample_members(8))
    context = get_context("fork")
    ranks = [context.Process(target=_open_counting, args=(str(path), str(tmp_path / "log"))) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(30)
        assert rank.exitcode == 0
    assert (tmp_path / "log").read_text() == "x"


def _hold(path: str, ready: str) -> None:
    with locked(Path(path)):
        Path(ready).touch()
        time.sleep(60)


def test_a_lock_goes_with_its_process(tmp_path: Path) -> None:
    holder = get_context("fork").Process(target=_hold, args=(str(tmp_path / "lock"), str(tmp_path / "ready")))
    holder.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    with ThreadPoolExecutor(1) as pool:

        def take() -> float:
            with locked(tmp_path / "lock"):
                return time.perf_counter()

        taken = pool.submit(take)
        time.sleep(0.1)
        assert not taken.done()
        killed = time.perf_counter()
        holder.kill()
        assert 0 <= taken.result(10) - killed < 5
    holder.join()


@pytest.mark.parametrize("where", ["nowhere", "a file", "a link", "a folder that is read-only"])
def test_without_a_folder_for_locks_it_works_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = write_tar(tmp_path / "a.tar", sample_members(2))
    locks = tmp_path / f"dstrain-locks-{os.getuid()}"
    if where == "a link":
        (tmp_path / "elsewhere").mkdir()
        locks.symlink_to(tmp_path / "elsewhere")
    elif where == "a file":
        locks.write_text("")
    elif where.endswith("read-only"):

        def refuse(path: Path) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(shards, "locked", refuse)
    monkeypatch.setattr(shards.tempfile, "gettempdir", lambda: str(tmp_path / ("none" if where == "nowhere" else "")))
    assert open_index(path).samples == 2
    assert where != "a link" or not list((tmp_path / "elsewhere").iterdir())


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(path: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    paths = [write_tar(tmp_path / f"{n}.tar", sample_members(3, first=n)) for n in range(2)]
    monkeypatch.setattr(shards, "write_atomic", read_only)
    assert [index.keys[0] for index in open_indexes(paths)] == ["0000", "0001"]
    assert sorted(tmp_path.iterdir()) == paths
    assert "stays in memory (Permission denied)" in caplog.text


def test_many_shards_are_indexed_by_processes_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "WORTH_BYTES", 0)
    paths = [write_tar(tmp_path / f"{n}.tar", sample_members(2 + n % 3, first=n)) for n in range(7)]
    open_index(paths[3])
    indexes = open_indexes(paths, workers=2, progress=True)
    assert [index.path for index in indexes] == paths
    assert [index.keys[0] for index in indexes] == [f"{n:04d}" for n in range(7)]
    paths[5].write_bytes(b"no tar")
    with pytest.raises(DataError, match=r"5.tar is not a tar file"):
        open_indexes(paths, workers=2, progress=False)


def _die(path: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_an_error_and_no_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "WORTH_BYTES", 0)
    paths = [write_tar(tmp_path / f"{n}.tar", []) for n in range(3)]
    with pytest.raises(DataError, match="a process was killed while testing 3 shards; if memory ran out, take fewer"):
        list(processes.each(_die, paths, workers=2, label="testing", progress=False))


def test_the_command_renews_damaged_indexes_and_lists_what_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    bad = [(f"bad{number:02d}.txt", b"") for number in range(25)]
    path = write_tar(tmp_path / "a.tar", [*bad, ("lone.txt", b"x"), *sample_members(2)])
    good = open_index(path)
    data = sidecar_of(path).read_bytes()
    sidecar_of(path).write_bytes(data[:-1] + b"x")
    report = tmp_path / "report.jsonl"
    assert cli.main(["index", str(path), "--report", str(report), "--workers", "1"]) == 0
    assert sidecar_of(path).read_bytes() == data and "is damaged" in caplog.text
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"left out {path}: bad00: empty_caption (the caption is empty)" and len(lines) == 22
    assert lines[20] == f"and 6 more; {report} lists all" and lines[21].startswith("2 samples in 1 shard")
    entries = [json.loads(line) for line in report.read_text().splitlines()]
    assert entries[:25] == [vars(entry) for entry in good.excluded]
    assert [(entry["key"], entry["reason"]) for entry in entries[25:]] == [("lone", "no_image")]


# What a user names


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("missing.tar", r"no such shard: 'missing.tar' \(looked in"),
        ("missing/*.tar", r"no shard matches 'missing/\*.tar'"),
        ("shard-{0..3}.tar", r"no such shard: 'shard-0.tar'"),
        ("shard-{a,b}.tar", r"of braces only ranges such as \{000..012\} are expanded"),
        ("shard-{3..0}.tar", "names 0 shards; a range is {first..last}"),
        ("s3://b/{0..9999999}.tar", "names 10000000 shards"),
        ("{0..9999}{0..9999}.tar", "names 100000000 shards"),
        ("{0..99999999999999999999}.tar", "no such shard"),
        ("empty", "folder 'empty' has no .tar files; make shards with `dstrain pack SOURCE --out empty`"),
        ("loop.tar", "cannot be opened: Too many levels of symbolic links"),
        ("gone.tar", "gone.tar cannot be opened: No such file"),
        ("nul\0.tar", "no such shard"),
        ("~nobody-is-called-this/a.tar", "no such shard"),
        ("pipe:touch canary", "is not read: give a path, or an s3"),
        ("PIPE:touch canary", "is not read"),
        ("file:a.tar", "is not read"),
        ("file:///etc/passwd", "is not read"),
        ("ftp://host/a.tar", "is not read"),
        ("ssh://host/a.tar", "is not read"),
        ("simplecache::s3://b/a.tar", "'::'"),
    ],
)
def test_errors_name_the_entry_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "loop.tar").symlink_to("loop.tar")
    (tmp_path / "gone.tar").symlink_to("nowhere")
    with pytest.raises(DataError, match=message):
        open_indexes([Path(shard) for shard in find_shards([entry])])
    assert not (tmp_path / "canary").exists()


def test_nothing_named() -> None:
    with pytest.raises(DataError, match="no shards are named"):
        find_shards([])


def test_entries_expand_in_order_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    touch(tmp_path, "x/b.tar", "x/a.tar", "x/.hidden.tar", "y/z/c.tar", "y/d.tar", "x/a.txt")
    (tmp_path / "y/folder.tar").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_shards(["y/**/*.tar", "x"]) == ["y/d.tar", "y/z/c.tar", "x/a.tar", "x/b.tar"]
    assert find_shards([f"{tmp_path}/*/?.tar"]) == [f"{tmp_path}/{name}" for name in ("x/a.tar", "x/b.tar", "y/d.tar")]
    assert not caplog.text
    (tmp_path / "link").symlink_to("x")
    assert find_shards(["y/d.tar", "x", "./x/a.tar", "y/../x/b.tar", "link/a.tar", "x/[ab].tar"]) == [
        "y/d.tar", "x/a.tar", "x/b.tar",
    ]  # fmt: skip
    assert "5 of the 8 shards named are there already; each is used once" in caplog.text


def test_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "a-08.tar", "a-09.tar", "a-10.tar", "b-9.tar", "b-10.tar", "c{x}1.tar", "d0-7.tar", "d1-7.tar")
    assert find_shards(["a-{08..10}.tar"]) == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert find_shards(["b-{9..10}.tar"]) == ["b-9.tar", "b-10.tar"]
    assert find_shards(["c{x}{1..1}.tar", "d{0..1}-{7..7}.tar"]) == ["c{x}1.tar", "d0-7.tar", "d1-7.tar"]
    assert find_shards(["s3://b/{0..1}/{007..008}.tar"]) == [
        f"s3://b/{a}/00{b}.tar" for a in (0, 1) for b in (7, 8)
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"no such shard: 'a-11.tar'"):
        find_shards(["a-{08..11}.tar"])


def test_a_name_with_magic_characters_that_is_there(tmp_path: Path) -> None:
    touch(tmp_path, "a[1].tar", "a1.tar")
    assert find_shards([f"{tmp_path}/a[1].tar"]) == [f"{tmp_path}/a[1].tar"]


def test_pipes_are_named_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    for entry in (str(tmp_path), str(tmp_path / "a.tar"), f"{tmp_path}/*.tar"):
        with pytest.raises(DataError, match=r"a.tar is not a file but a folder, a pipe or a device"):
            open_indexes([Path(name) for name in find_shards([entry])])


def test_urls_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    listed: Callable[[str], list[str]] = lambda url: [f"{url}1.tar", f"{url}2.tar"] if url.endswith("/") else [url]  # noqa: E731
    monkeypatch.setattr(shards, "list_remote", listed)
    assert find_shards(["s3://b/{0..1}.tar", "hf://datasets/x/", "https://h/a.tar?sig=1"]) == [
        "s3://b/0.tar", "s3://b/1.tar", "hf://datasets/x/1.tar", "hf://datasets/x/2.tar", "https://h/a.tar?sig=1",
    ]  # fmt: skip
    with pytest.raises(DataError, match=r"'s3://b/a.tar' is remote; run this where the shards lie"):
        find_local(["s3://b/a.tar"])


def test_home_is_that_of_the_user_and_nothing_else_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a.tar")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_shards(["~/a.tar"]) == [f"{tmp_path}/a.tar"]
    with pytest.raises(DataError, match="no such shard"):
        find_shards(["$HOME/a.tar"])

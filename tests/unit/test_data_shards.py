"""Indexes and datasets: what is in a shard, what is left out and why, and that damage never makes a wrong pair."""

import io
import os
import pickle
import random
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import webdataset
from data_samples import damage_row, mixed_dataset, picture, sample_members, write_tar
from PIL import Image
from test_data_tar import mutate

from dstrain.data import open_dataset, shards
from dstrain.data.decode import decode
from dstrain.data.reasons import BadSample, Reason, ranked
from dstrain.data.shards import ROW, SIDECAR, find_shards, open_index
from dstrain.errors import ConfigError, DataError

PNG = picture(32, 32)


def left_out(path: Path) -> dict[str, Reason]:
    return {entry.key: entry.reason for entry in open_index(path).excluded}


def sidecar(path: Path) -> Path:
    return path.with_name(path.name + SIDECAR)


# What is a sample


def test_index_of_a_sound_shard(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", sample_members(3, (48, 20)))
    index = open_index(path)
    assert list(index.keys) == ["0000", "0001", "0002"] and index.excluded == []
    assert index.rows["width"].tolist() == [48] * 3 and index.rows["height"].tolist() == [20] * 3
    assert index.rows["caption_bytes"].tolist() == [9] * 3
    dataset = open_dataset([str(path)], max_pixels=1 << 20)
    assert dataset.read(1) == (picture(48, 20, seed=1), "caption 1")


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.png", PNG)], Reason.NO_CAPTION),
        ([("a.png", PNG), ("b.txt", b"other")], Reason.NO_CAPTION),
        ([("a.txt", b"caption")], Reason.NO_IMAGE),
        ([("a.gif", PNG), ("a.txt", b"caption")], Reason.NO_IMAGE),
        ([("a.png", PNG), ("a.txt", b"")], Reason.EMPTY_CAPTION),
        ([("a.png", PNG), ("a.txt", b"\xef\xbb\xbf \n\t ")], Reason.EMPTY_CAPTION),
        ([("a.png", PNG), ("a.txt", b"caf\xe9")], Reason.CAPTION_ENCODING),
        ([("a.png", PNG), ("a.txt", "utf-16".encode("utf-16-le"))], Reason.CAPTION_ENCODING),
        ([("a.png", PNG), ("a.txt", b"x" * (1 << 16) + b"x")], Reason.CAPTION_TOO_LONG),
        ([("a.png", PNG), ("a.json", b"{")], Reason.NO_CAPTION),
        ([("a.png", PNG), ("a.json", b"[" * 60000)], Reason.NO_CAPTION),
        ([("a.png", PNG), ("a.json", b'["caption"]')], Reason.NO_CAPTION),
        ([("a.png", PNG), ("a.json", b'{"caption": null, "text": "other"}')], Reason.NO_CAPTION),
        ([("a.png", PNG), ("a.json", b'{"caption": 5}')], Reason.NO_CAPTION),
        ([("a.png", PNG), ("a.json", b'{"caption": " "}')], Reason.EMPTY_CAPTION),
        ([("a.png", PNG), ("a.json", rb'{"caption": "\ud800"}')], Reason.CAPTION_ENCODING),
        ([("a.png", PNG), ("a.jpg", picture(32, 32, kind="JPEG")), ("a.txt", b"x")], Reason.AMBIGUOUS),
        ([("a.png", PNG), ("a.txt", b"x"), ("a.png", PNG), ("a.txt", b"y")], Reason.AMBIGUOUS),
        ([("a.png", PNG), ("a.txt", b"x"), ("a.txt", b"y")], Reason.AMBIGUOUS),
        ([("a.png", PNG), ("a.PNG", PNG), ("a.txt", b"x")], Reason.AMBIGUOUS),
        ([("a.png", b""), ("a.txt", b"x")], Reason.IMAGE_FORMAT),
        ([("a.jpg", b"text"), ("a.txt", b"x")], Reason.IMAGE_FORMAT),
        ([("a.png", PNG[:-5]), ("a.txt", b"x")], Reason.IMAGE_DAMAGED),
    ],
)
def test_left_out(tmp_path: Path, members: list[tuple[str, bytes]], reason: Reason) -> None:
    path = write_tar(tmp_path / "a.tar", [*members, *sample_members(1)])
    assert left_out(path)["a"] is reason
    assert list(open_index(path).keys) == ["0000"]


@pytest.mark.parametrize(
    ("name", "data", "caption"),
    [
        ("a.txt", "\ufeff  häuser\n".encode(), "häuser"),
        ("a.TXT", b"upper", "upper"),
        ("a.json", b'{"caption": "from json"}', "from json"),
        ("a.json", b'{"text": "t", "prompt": "p", "url": "http://x"}', "t"),
        ("a.json", b'{"prompt": "p"}', "p"),
    ],
)
def test_captions(tmp_path: Path, name: str, data: bytes, caption: str) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.png", PNG), (name, data)])
    dataset = open_dataset([str(path)], max_pixels=1024)
    assert dataset.read(0) == (PNG, caption)
    assert dataset.caption_bytes.tolist() == [len(caption.encode())]


def test_text_comes_before_json_and_other_members_are_passed_over(tmp_path: Path) -> None:
    extra = [("a.json", b'{"caption": "json"}'), ("a.cls", b"5"), ("a.pkl", pickle.dumps(1)), ("__meta__.txt", b"x")]
    path = write_tar(
        tmp_path / "a.tar", [("a.png", PNG), ("a.txt", b"text"), *extra, ("README.md", b""), (".x.png", b"")]
    )
    assert open_dataset([str(path)], max_pixels=1024).read(0)[1] == "text"
    assert left_out(path) == {}


def test_pairs_by_key_wherever_the_members_lie(tmp_path: Path) -> None:
    pairs = [(f"{folder}/{name}", f"{folder} {name}") for folder in ("x", "y.z", "./v") for name in ("a", "b")]
    members = [(f"{key}.png", picture(32, 32, seed=i)) for i, (key, _) in enumerate(pairs)]
    members += [(f"{key}.txt", caption.encode()) for key, caption in reversed(pairs)]
    dataset = open_dataset([str(write_tar(tmp_path / "a.tar", members))], max_pixels=1024)
    assert list(dataset.keys) == [key for key, _ in pairs]
    for row, (_, caption) in enumerate(pairs):
        assert dataset.read(row) == (picture(32, 32, seed=row), caption)


def test_hostile_names_and_kinds_are_reported_and_never_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("../secret.png", "/etc/secret.png", "x/../../y.png"):
            info = tarfile.TarInfo(name)
            info.size = len(PNG)
            tar.addfile(info, io.BytesIO(PNG))
        for name, kind in (("s.txt", tarfile.SYMTYPE), ("h.txt", tarfile.LNKTYPE), ("d.png", tarfile.CHRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, str(tmp_path / "secret.txt")
            tar.addfile(info)
        for name, data in [("s.png", PNG), ("h.png", PNG), *sample_members(1)]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    before = sorted(tmp_path.rglob("*"))
    index = open_index(tmp_path / "a.tar")
    assert list(index.keys) == ["0000"]
    reasons = [entry.reason for entry in index.excluded]
    assert ranked(reasons) == "not_a_file 3, unsafe_name 3, no_caption 2"
    assert sorted(tmp_path.rglob("*")) == sorted([*before, sidecar(tmp_path / "a.tar")])


def test_shards_of_webdataset_writers_are_read(tmp_path: Path) -> None:
    with webdataset.ShardWriter(str(tmp_path / "s-%04d.tar"), maxcount=4, verbose=0) as writer:
        for number in range(6):
            picture_ = Image.open(io.BytesIO(picture(40, 50, seed=number)))
            writer.write(
                {"__key__": f"{number:06d}", "png": picture_, "txt": f"text {number}", "json": {"caption": "no"}}
            )
    dataset = open_dataset([str(tmp_path)], max_pixels=1 << 20)
    assert len(dataset) == 6 and len(dataset.shards) == 2
    for row in range(6):
        data, caption = dataset.read(row)
        assert caption == f"text {row}"
        assert np.array_equal(Image.open(io.BytesIO(data)), Image.open(io.BytesIO(picture(40, 50, seed=row))))


# Sidecars


def test_a_fresh_sidecar_is_used_and_says_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [*sample_members(3), ("ü\n.png", PNG), ("b.txt", b"")]
    path = write_tar(tmp_path / "a.tar", members, tarfile.PAX_FORMAT)
    built = open_index(path)
    monkeypatch.setattr(shards, "members", None)  # building again would fail
    loaded = open_index(path)
    assert np.array_equal(built.rows, loaded.rows) and list(built.keys) == list(loaded.keys)
    assert built.excluded == loaded.excluded and len(loaded.excluded) == 2


@pytest.mark.parametrize("same_size", [True, False])
def test_a_stale_sidecar_is_made_again(tmp_path: Path, same_size: bool) -> None:
    path = write_tar(tmp_path / "a.tar", sample_members(3))
    open_index(path)
    write_tar(path, sample_members(3, first=3) if same_size else sample_members(9, first=3))
    os.utime(path, ns=(1, 1))
    index = open_index(path)
    assert list(index.keys)[:3] == ["0003", "0004", "0005"]
    dataset = open_dataset([str(path)], max_pixels=1024)
    assert dataset.read(0) == (picture(32, 32, seed=3), "caption 3")


def resaved(path: Path, **changes: np.ndarray) -> None:
    with np.load(path) as archive:
        arrays = dict(archive) | changes
    np.savez(path, **arrays)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch canary",))


def test_a_sidecar_is_never_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged, contradictory and hostile sidecars are made again, and nothing in them runs."""
    monkeypatch.chdir(tmp_path)
    path = write_tar(tmp_path / "a.tar", sample_members(3))
    rows = open_index(path).rows
    good = sidecar(path).read_bytes()
    changed = []
    for field, value in [
        ("image_offset", 1 << 40),
        ("image_offset", -1),
        ("image_size", 1 << 62),
        ("caption_size", -5),
        ("caption_kind", 7),
        ("width", -3),
        ("height", 0),
    ]:
        wrong = rows.copy()
        wrong[field][1] = value
        changed.append({"rows": wrong})
    changed.append({"rows": rows[:2]})
    changed.append({"rows": np.zeros(3, np.int64)})
    changed.append({"rows": np.array([Payload()] * 3, dtype=object)})
    changed.append({"key_ends": np.array([4, 2, 12])})
    changed.append({"key_ends": np.array([4, 8, 99])})
    changed.append({"excluded": np.frombuffer(b"[[1, 2]]", np.uint8)})
    changed.append({"excluded": np.frombuffer(b'[["k", "no such reason", ""]]', np.uint8)})
    contents = []
    for change in changed:
        sidecar(path).write_bytes(good)
        resaved(sidecar(path), **change)
        contents.append(sidecar(path).read_bytes())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:  # a zip bomb has to be compressed
        archive.writestr("header.npy", b"\0" * 1000)
    contents += [buffer.getvalue(), pickle.dumps(Payload()), b"", good[:-40], good[: len(good) // 2], b"x" * (2 << 20)]
    flipped = bytearray(good)
    flipped[good.index(b"0001")] ^= 1  # in the keys: the zip has a checksum for each array
    contents.append(bytes(flipped))
    for content in contents:
        sidecar(path).write_bytes(content)
        index = open_index(path)
        assert list(index.keys) == ["0000", "0001", "0002"] and np.array_equal(index.rows, rows)
        assert open_index(path).rows.dtype == ROW
        with np.load(sidecar(path)) as archive:
            assert np.array_equal(archive["rows"], rows)  # repaired on disk
    assert not (tmp_path / "canary").exists()


def test_several_ranks_may_index_at_once(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", sample_members(8))
    for _ in range(3):
        sidecar(path).unlink(missing_ok=True)
        with ThreadPoolExecutor(8) as ranks:  # one process number, as in containers on several nodes
            indexes = list(ranks.map(open_index, [path] * 8))
        assert all(np.array_equal(index.rows, indexes[0].rows) for index in indexes)
        assert np.array_equal(open_index(path).rows, indexes[0].rows)
    assert sorted(tmp_path.iterdir()) == [path, sidecar(path)]


def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(path: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    path = write_tar(tmp_path / "a.tar", sample_members(3))
    monkeypatch.setattr(shards, "write_atomic", read_only)
    assert len(open_dataset([str(path)], max_pixels=1024)) == 3
    assert list(tmp_path.iterdir()) == [path]
    assert "stays in memory (Permission denied)" in caplog.text


# Datasets


def test_rows_of_several_shards(tmp_path: Path) -> None:
    dataset = mixed_dataset(tmp_path, shards=3, samples=7, max_pixels=2048)
    assert list(dataset.keys) == [f"{row:04d}" for row in range(21)]
    assert [dataset.shard(row).name[-5] for row in (0, 6, 7, 20)] == ["0", "0", "1", "2"]
    for row in range(21):
        data, caption = dataset.read(row)
        image = decode(data, 2048)
        assert caption.startswith(f"caption {row}") and len(caption) == dataset.caption_bytes[row]
        assert (image.shape[2], image.shape[1]) == dataset.image_size(row)
        assert dataset.image_tokens[row] == image.shape[1] * image.shape[2] // 256
        assert dataset.tokens[row] == dataset.image_tokens[row] + len(caption) // 3 + 8
    assert "21 samples in 3 shards" in dataset.summary()


def test_pictures_too_narrow_for_the_limit_are_left_out(tmp_path: Path) -> None:
    members = [
        ("a.png", picture(320, 20)),
        ("a.txt", b"x"),
        ("b.png", picture(8, 300)),
        ("b.txt", b"x"),
        *sample_members(2),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    wide, tight = (open_dataset([str(path)], max_pixels=limit) for limit in (1 << 20, 1024))
    assert list(wide.keys) == ["a", "0000", "0001"] and list(tight.keys) == ["0000", "0001"]
    assert [(e.key, e.reason) for e in tight.excluded] == [("a", "image_too_small"), ("b", "image_too_small")]
    assert tight.read(0)[1] == "caption 0" and tight.read(1)[1] == "caption 1"
    assert "left out 2: image_too_small 2" in tight.summary()


def test_the_digest_says_which_samples_these_are(tmp_path: Path) -> None:
    def digest(folder: str, members: list[tuple[str, bytes]], name: str = "a.tar") -> str:
        (tmp_path / folder).mkdir()
        write_tar(tmp_path / folder / name, members)
        return open_dataset([str(tmp_path / folder)], max_pixels=1024).digest

    members = sample_members(4)
    base = digest("0", members)
    assert digest("1", members) == base  # another place, another time
    others = [
        digest("2", members, "b.tar"),
        digest("3", members[:-2]),
        digest("4", [*members[2:], *members[:2]]),
        digest("5", [("0009" + name[4:], data) for name, data in members[:2]] + members[2:]),
        digest("6", [(name, data.replace(b"caption 3", b"Caption 3")) for name, data in members]),
        digest("7", [(name, picture(32, 32, 99) if name == "0003.png" else data) for name, data in members]),
    ]
    assert len({base, *others}) == 7


def test_bit_rot_is_seen_at_the_read(tmp_path: Path) -> None:
    dataset = mixed_dataset(tmp_path)
    damage_row(dataset, 3)
    with pytest.raises(BadSample, match="not those that were indexed") as error:
        dataset.read(3)
    assert error.value.reason is Reason.CHANGED
    assert dataset.read(2)[1].startswith("caption 2") and dataset.read(4)[1].startswith("caption 4")


def test_a_shard_that_shrinks_or_goes_is_seen_at_the_read(tmp_path: Path) -> None:
    dataset = mixed_dataset(tmp_path)
    with dataset.shard(0).open("r+b") as f:
        f.truncate(3000)
    with pytest.raises(BadSample):
        dataset.read(9)
    dataset.shard(0).unlink()
    with pytest.raises(DataError, match=r"shard-000000.tar cannot be read any more: No such file"):
        dataset.read(0)


@pytest.mark.parametrize("how", ["truncate", "truncate_block", "flip", "zero", "noise", "duplicate", "delete"])
def test_damage_never_makes_a_wrong_pair(tmp_path: Path, how: str) -> None:
    """A damaged shard is an error or has only right pairs; one damaged after it was indexed gives only right bytes."""
    members = [("pic-" + name, data) for name, data in sample_members(6)]
    path = write_tar(tmp_path / "a.tar", members)
    sound = path.read_bytes()
    indexed = open_dataset([str(path)], max_pixels=1024)
    pictures = [data for name, data in members if name.endswith(".png")]
    captions = [data.decode() for name, data in members if name.endswith(".txt")]
    rng = random.Random(how)
    for _ in range(60):
        path.write_bytes(mutate(sound, how, rng))
        sidecar(path).unlink(missing_ok=True)
        for row in range(6):
            with suppress(DataError):
                assert indexed.read(row) == (pictures[row], captions[row])
        try:
            fresh = open_dataset([str(path)], max_pixels=1024)
        except DataError:
            continue
        for row in range(len(fresh)):
            image, caption = fresh.read(row)
            number = pictures.index(image)  # PNG has checksums: never other pixels
            assert caption == captions[number] or (caption not in captions and how in ("flip", "noise", "zero"))


# What a user names


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("missing.tar", r"no such shard: 'missing.tar' \(looked in"),
        ("missing/*.tar", r"no shard matches 'missing/\*.tar'"),
        ("shard-{0..3}.tar", "braces are not expanded, write \\* instead"),
        ("empty", "folder 'empty' has no .tar files; make shards with `dstrain pack SOURCE --out empty`"),
        ("text.tar", "text.tar is not a tar file .*dstrain pack"),
        ("no_pairs.tar", r"no sample can be used in 1 shards, the first being no_pairs.tar \(left out: no_caption 1\)"),
        ("s3://bucket/a.tar", "is not a local path"),
        ("http://host/a.tar", "is not a local path"),
        ("pipe:touch canary", "is not a local path"),
    ],
)
def test_errors_name_the_entry_and_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.tar").write_text("text")
    write_tar(tmp_path / "no_pairs.tar", [("a.png", PNG)])
    with pytest.raises(DataError, match=message):
        open_dataset([entry], max_pixels=1024)
    assert not (tmp_path / "canary").exists()


def test_nothing_named_and_no_room_for_a_token(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no shards are named"):
        open_dataset([], max_pixels=1024)
    with pytest.raises(ConfigError, match="max_pixels = 255"):
        open_dataset([str(tmp_path)], max_pixels=255)


def test_entries_expand_in_order_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x/b.tar", "x/a.tar", "x/.hidden.tar", "y/z/c.tar", "y/d.tar", "x/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    assert [str(p) for p in find_shards(["y/**/*.tar", "x", "x/[ab].tar", "y/d.tar"])] == [
        "y/d.tar", "y/z/c.tar", "x/a.tar", "x/b.tar",
    ]  # fmt: skip
    assert find_shards([f"{tmp_path}/*/?.tar"]) == [tmp_path / "x/a.tar", tmp_path / "x/b.tar", tmp_path / "y/d.tar"]


def test_members_that_other_readers_would_load_are_never_read(tmp_path: Path) -> None:
    hostile = [
        ("a.pyd", pickle.dumps(Payload())),
        ("a.pth", pickle.dumps(Payload())),
        ("a.npy", pickle.dumps(Payload())),
    ]
    path = write_tar(tmp_path / "a.tar", [("a.png", PNG), ("a.txt", b"x"), *hostile, ("b.url", b"file:///etc/passwd")])
    dataset = open_dataset([str(path)], max_pixels=1024)
    assert dataset.read(0) == (PNG, "x")
    assert list(dataset.keys) == ["a"]
    assert not (Path.cwd() / "canary").exists()

"""The index file: what it says, that it is read lazily, and that nothing in it is believed that cannot be."""

import io
import json
import logging
import os
import pickle
import tarfile
import weakref
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
from data_samples import picture, sample_members, write_tar

from dstrain.data.reasons import Reason
from dstrain.data.shards import index as index_module
from dstrain.data.shards.arrays import PART, ROW
from dstrain.data.shards.catalog import open_index, renew_indexes, sidecar_of
from dstrain.data.shards.index import _PREFIX, SIDECAR, ShardIndex, dump, load, make
from dstrain.data.shards.keys import KeyTable
from dstrain.data.shards.names import Content
from dstrain.errors import DataError


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    members = [*sample_members(3), ("0003.png", picture(40, 20)), ("0003.edit.png", picture(16, 64)), ("bad.txt", b"")]
    return write_tar(tmp_path / "a.tar", members)


def arrays_of(index: ShardIndex) -> dict[str, Any]:
    return {
        "digest": index.digest,
        "columns": index.columns,
        "keys": index.keys,
        "rows": index.rows.copy(),
        "parts": index.parts.copy(),
        "excluded": [(e.key, e.reason, e.detail) for e in index.excluded],
    }


def test_what_it_says(shard: Path) -> None:
    index = open_index(shard)
    status = shard.stat()
    assert (index.path, index.size, index.mtime_ns) == (shard, status.st_size, status.st_mtime_ns)
    assert index.digest == xxhash.xxh3_128_hexdigest(shard.read_bytes())
    assert index.columns == ("image", "txt", "edit") and list(index.stats) == ["image", "txt", "edit"]
    assert (index.samples, index.captioned, index.max_caption_bytes) == (4, 3, 9)
    assert list(index.keys) == ["0000", "0001", "0002", "0003"]
    assert index.rows["caption_bytes"].tolist() == [9, 9, 9, 0] and index.rows["caption"][3] == -1
    assert index.part_of("image").tolist() == [0, 2, 4, 6] and index.part_of("edit").tolist() == [-1, -1, -1, 7]
    assert index.part_of("video").tolist() == [-1] * 4
    image, edit = index.stats["image"], index.stats["edit"]
    assert (image.rows, image.min_side, image.min_pixels, image.max_pixels) == (4, 20, 800, 1024)
    assert (edit.rows, edit.min_side, edit.min_frames, edit.max_frames) == (1, 16, 1, 1)
    assert vars(index.stats["txt"]) == dict.fromkeys(vars(image), 0) | {"rows": 3}
    assert [(e.shard, e.key, e.reason) for e in index.excluded] == [(str(shard), "bad", Reason.EMPTY_CAPTION)]
    assert index.excluded_counts == {Reason.EMPTY_CAPTION: 1}
    assert index.parts["kind"].tolist() == [Content.IMAGE, Content.TXT] * 3 + [Content.IMAGE] * 2


def test_parts_are_where_tarfile_finds_them(shard: Path) -> None:
    index, data = open_index(shard), shard.read_bytes()
    with tarfile.open(shard) as tar:
        expected = [(m.offset_data, m.size) for m in tar][:-1]
    assert list(zip(index.parts["offset"].tolist(), index.parts["size"].tolist())) == expected
    for part, (offset, size) in zip(index.parts, expected):
        assert int(part["digest"]) == xxhash.xxh3_64_intdigest(data[offset : offset + size])


def test_read_back_it_says_the_same(shard: Path) -> None:
    built = open_index(shard)
    loaded = load(sidecar_of(shard), shard)
    assert loaded is not None and loaded.source == sidecar_of(shard)
    assert dump(loaded) == dump(built) == sidecar_of(shard).read_bytes()
    assert np.array_equal(loaded.rows, built.rows) and np.array_equal(loaded.parts, built.parts)
    assert loaded.rows.dtype == ROW and loaded.parts.dtype == PART
    assert list(loaded.keys) == list(built.keys) and loaded.excluded == built.excluded
    assert loaded.stats == built.stats and loaded.excluded_counts == built.excluded_counts
    with pytest.raises(ValueError, match="read-only"):
        loaded.rows["first"] = 0


def test_the_body_is_not_read_before_it_is_asked_for(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_index(shard)
    monkeypatch.setattr(index_module, "dump", lambda index: 1 / 0)
    index = open_index(shard)
    assert index.samples == 4 and index.stats["image"].rows == 4 and replace(index, path=Path("b")).samples == 4
    with pytest.raises(ZeroDivisionError):
        index.rows  # noqa: B018


def test_many_bodies_are_not_kept(tmp_path: Path) -> None:
    indexes = [open_index(write_tar(tmp_path / f"{n}.tar", sample_members(1))) for n in range(50)]
    files = len(list(Path("/proc/self/fd").iterdir()))
    first = [weakref.ref(index.keys) for index in indexes]
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    assert [ref() is not None for ref in first] == [False] * 18 + [True] * 32
    assert [list(index.keys) for index in indexes] == [["0000"]] * 50


def test_it_can_go_to_another_process(shard: Path) -> None:
    index = open_index(shard)
    copy = pickle.loads(pickle.dumps(index))
    assert list(copy.keys) == list(index.keys) and copy.digest == index.digest


def test_a_shard_without_samples(tmp_path: Path) -> None:
    index = open_index(write_tar(tmp_path / "a.tar", []))
    assert (index.samples, index.columns, list(index.keys), index.excluded) == (0, (), [], [])
    assert len(index.rows) == 0 and index.part_of("image").tolist() == []


def test_names_of_any_characters(tmp_path: Path) -> None:
    names = ["ü\n", "\u2028x", "tab\t", "a\\b", "\x85", 'quote"', "空"]
    members = [(f"{name}.txt", b"") for name in names] + [(f"ok{name}.txt", b"x") for name in names]
    path = write_tar(tmp_path / "a.tar", members, tarfile.PAX_FORMAT)
    open_index(path)
    index = open_index(path)
    assert [entry.key for entry in index.excluded] == names
    assert list(index.keys) == ["ok" + name for name in names]


# What cannot be believed


def sealed(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """Change the header of an index and give it the checksum that it should have."""
    magic, length, zero, _ = _PREFIX.unpack_from(data)
    header = json.loads(data[_PREFIX.size : _PREFIX.size + length])
    changed = change(header)
    text = json.dumps(header if changed is None else changed).encode()
    text = text.ljust(-(-(len(text) + _PREFIX.size) // 64) * 64 - _PREFIX.size)
    body = data[_PREFIX.size + length :]
    return _PREFIX.pack(magic, len(text), zero, xxhash.xxh3_64_intdigest(text)) + text + body


HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "not an object": lambda h: [1],
    "null": lambda h: {"size": None},
    "a field is missing": lambda h: h.pop("digest") and None,
    "negative size": lambda h: h.update(size=-1),
    "float size": lambda h: h.update(size=1.0),
    "huge size": lambda h: h.update(size=1 << 80),
    "true": lambda h: h.update(captioned=True),
    "text time": lambda h: h.update(mtime_ns="1"),
    "digest is a path": lambda h: h.update(digest="../../../../etc/passwd"),
    "other number of samples": lambda h: h.update(samples=3),
    "billions of samples": lambda h: h.update(samples=1 << 40, lengths=[1 << 43, 1 << 44, 0, 0, 0]),
    "array past the end": lambda h: h["lengths"].__setitem__(4, 1 << 20),
    "four arrays": lambda h: h["lengths"].pop() and None,
    "six arrays": lambda h: h["lengths"].append(0),
    "parts in pieces": lambda h: h["lengths"].__setitem__(2, h["lengths"][2] - 1),
    "two columns of one name": lambda h: h["stats"].append(h["stats"][0]),
    "many columns": lambda h: h.update(stats=[[str(n), 1, 0, 0, 0, 0.0, 0, 0] for n in range(300)]),
    "column without numbers": lambda h: h["stats"].append(["x"]),
    "column of text": lambda h: h["stats"][0].__setitem__(1, "3"),
    "ratio is no number": lambda h: h["stats"][0].__setitem__(5, float("nan")),
    "unknown reason": lambda h: h.update(excluded={"because": 1}),
    "excluded is a list": lambda h: h.update(excluded=["empty_caption"]),
    "deep": lambda h: h.update(digest=[[[[]]]]),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_cannot_be(case: str, shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = dump(open_index(shard))
    sidecar_of(shard).write_bytes(sealed(good, HEADERS[case]))
    assert load(sidecar_of(shard), shard) is None
    assert f"{sidecar_of(shard)} is damaged" in caplog.text
    assert dump(open_index(shard)) == good == sidecar_of(shard).read_bytes()


def test_the_way_of_changing_headers_is_sound(shard: Path) -> None:
    """What the test above writes is refused for its content, not for its form."""
    good = dump(open_index(shard))
    sidecar_of(shard).write_bytes(sealed(good, lambda header: None))
    index = load(sidecar_of(shard), shard)
    assert index is not None and len(index.rows) == 4


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, ("touch canary",))


def files() -> list[bytes]:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rows.npy", b"\0" * 100_000)
    arrays = io.BytesIO()
    np.save(arrays, np.array([Payload()], dtype=object), allow_pickle=True)
    return [
        b"",
        b"x" * 31,
        b"\0" * 4096,
        os.urandom(5000),
        pickle.dumps(Payload()),
        buffer.getvalue(),
        arrays.getvalue(),
        _PREFIX.pack(b"dstrain index 2\n", 0xFFFFFFFF, 0, 0) + b"x" * 100,
        _PREFIX.pack(b"dstrain index 2\n", 1 << 19, 0, xxhash.xxh3_64_intdigest(b"[" * (1 << 19))) + b"[" * (1 << 19),
    ]


@pytest.mark.parametrize("content", files())
def test_files_that_are_no_index(
    content: bytes, shard: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(shard.parent)
    good = dump(open_index(shard))
    sidecar_of(shard).write_bytes(content)
    assert load(sidecar_of(shard), shard) is None and "damaged" in caplog.text
    assert dump(open_index(shard)) == good
    assert not Path("canary").exists()


def test_other_versions_are_passed_over_without_a_warning(shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = dump(open_index(shard))
    sidecar_of(shard).write_bytes(good.replace(b"dstrain index 2\n", b"dstrain index 3\n"))
    shard.with_name("a.tar.idx.npz").write_bytes(b"of the time before")
    assert load(sidecar_of(shard), shard) is None and not caplog.text
    assert dump(open_index(shard)) == good


def test_any_flipped_bit_is_seen(shard: Path) -> None:
    good = dump(open_index(shard))
    for place in range(0, len(good), 7):
        sidecar_of(shard).write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        index = load(sidecar_of(shard), shard)
        if index is not None:
            with pytest.raises(DataError, match=r"a.tar.index is damaged: its checksum is wrong; delete it"):
                index.rows  # noqa: B018


def test_any_cut_is_seen(shard: Path) -> None:
    good = dump(open_index(shard))
    for length in [*range(0, len(good), 13), len(good) - 1]:
        sidecar_of(shard).write_bytes(good[:length])
        assert load(sidecar_of(shard), shard) is None
    sidecar_of(shard).write_bytes(good + b"\0" * 64)
    assert load(sidecar_of(shard), shard) is None


def test_cut_after_it_was_opened(shard: Path) -> None:
    open_index(shard)
    index = open_index(shard)
    good = sidecar_of(shard).read_bytes()
    for content in (b"", good[: len(good) // 2]):
        sidecar_of(shard).write_bytes(content)
        with pytest.raises(DataError, match="delete it, it is made again"):
            index.keys  # noqa: B018
    sidecar_of(shard).unlink()
    with pytest.raises(DataError, match=r"a\.tar\.index"):
        index.excluded  # noqa: B018


def part(field: str, value: object, number: int = 2) -> Callable[[dict[str, Any]], None]:
    return lambda a: a["parts"][field].__setitem__(number, value)


def row(field: str, value: object, number: int = 1) -> Callable[[dict[str, Any]], None]:
    return lambda a: a["rows"][field].__setitem__(number, value)


BODIES: dict[str, Callable[[dict[str, Any]], None]] = {
    "offset before the tar": part("offset", -1),
    "offset past the tar": part("offset", 1 << 40),
    "offset that overflows": part("offset", (1 << 63) - 1),
    "size past the tar": part("size", 1 << 20),
    "size that overflows": part("size", (1 << 63) - 1),
    "negative size": part("size", -5),
    "no such column": part("column", 3),
    "no such kind": part("kind", 9),
    "padding": part("pad", 1),
    "picture without width": part("width", 0),
    "huge width": part("width", 1 << 30),
    "picture of two frames": part("frames", 2),
    "picture with a frame rate": part("fps", 24.0),
    "caption with a width": part("width", 5, 3),
    "video of no frames": lambda a: (part("kind", Content.VIDEO)(a), part("frames", 0)(a))[0],
    "frame rate is no number": lambda a: (part("kind", Content.VIDEO)(a), part("fps", float("nan"))(a))[0],
    "two members in one column": part("column", 0, 3),
    "caption of another row": row("caption", 1),
    "caption is a picture": row("caption", 2),
    "caption past the parts": row("caption", 99),
    "caption missing": row("caption", -1),
    "caption without bytes": row("caption_bytes", 0),
    "caption of negative bytes": row("caption_bytes", -4),
    "row without members": row("count", 0),
    "row of others' members": row("count", 3),
    "row from elsewhere": row("first", 0),
    "row past the parts": row("first", 1 << 31),
    "fewer rows than members": lambda a: a.update(rows=a["rows"][:3], keys=KeyTable.of(["a", "b", "c"])),
}


@pytest.mark.parametrize("case", BODIES)
def test_a_body_that_cannot_be(case: str, shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Even with every checksum right, what leads out of the shard or contradicts itself is refused."""
    good = open_index(shard)
    arrays = arrays_of(good)
    BODIES[case](arrays)
    index = make(shard, shard.stat(), **arrays)
    sidecar_of(shard).write_bytes(dump(index))
    with pytest.raises(DataError, match=r"index .* is damaged: .*; delete it, it is made again"):
        open_index(shard).parts  # noqa: B018
    (renewed,) = renew_indexes([shard])
    assert np.array_equal(renewed.parts, good.parts) and "a.tar.index is damaged" in caplog.text


@pytest.mark.parametrize(
    ("field", "value"), [("captioned", 2), ("max_caption_bytes", 99), ("excluded", {}), ("excluded", {"no_image": 1})]
)
def test_totals_that_are_not_those_of_the_rows(field: str, value: object, shard: Path) -> None:
    sidecar_of(shard).write_bytes(sealed(dump(open_index(shard)), lambda header: header.update({field: value})))
    with pytest.raises(DataError, match="its header"):
        open_index(shard).keys  # noqa: B018


def test_a_column_smaller_than_its_pictures(shard: Path) -> None:
    sidecar_of(shard).write_bytes(sealed(dump(open_index(shard)), lambda header: header["stats"][0].__setitem__(2, 5)))
    with pytest.raises(DataError, match="other things than its rows"):
        open_index(shard).keys  # noqa: B018


@pytest.mark.parametrize("ends", [[4, 2, 12, 16], [4, 8, 12, 99], [-1, 8, 12, 16], [1 << 62, 8, 12, 16]])
def test_keys_that_overlap(ends: list[int], shard: Path) -> None:
    arrays = arrays_of(open_index(shard))
    arrays["keys"].ends = np.array(ends, np.int64)
    sidecar_of(shard).write_bytes(dump(make(shard, shard.stat(), **arrays)))
    with pytest.raises(DataError, match="key table"):
        open_index(shard).keys  # noqa: B018


@pytest.mark.parametrize("line", ["{}", "[1, 2]", '["k", "no such reason", ""]', '[5, "no_image", ""]', "nonsense", ""])
def test_left_out_samples_that_cannot_be(line: str, shard: Path) -> None:
    arrays = arrays_of(open_index(shard))
    data = dump(make(shard, shard.stat(), **arrays))
    _, length, _, _ = _PREFIX.unpack_from(data)
    lengths = json.loads(data[_PREFIX.size : _PREFIX.size + length])["lengths"]
    last = len(data) - -(-lengths[4] // 64) * 64
    text = (line + "\n").encode()
    body = data[_PREFIX.size + length : last] + text.ljust(64, b"\0")
    changed = sealed(
        data[: _PREFIX.size + length] + body,
        lambda h: h.update(lengths=[*lengths[:4], len(text)], checksum=xxhash.xxh3_64_intdigest(body)),
    )
    sidecar_of(shard).write_bytes(changed)
    with pytest.raises(DataError, match="delete it, it is made again"):
        open_index(shard).excluded  # noqa: B018


def test_a_sidecar_that_is_no_file(shard: Path, caplog: pytest.LogCaptureFixture) -> None:
    for make_other in (lambda p: p.mkdir(), lambda p: os.mkfifo(p), lambda p: p.symlink_to(p.name)):
        sidecar = shard.with_name(shard.name + SIDECAR)
        make_other(sidecar)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert open_index(shard).samples == 4
        assert str(sidecar) in caplog.text
        if sidecar.is_dir():
            sidecar.rmdir()
        else:
            sidecar.unlink()

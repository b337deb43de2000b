"""verify: every damage is found, not only the first, and named by shard, member and byte."""

import json
import os
import tarfile
import time
from pathlib import Path

import pytest
from data_samples import picture, sample_members, write_tar
from test_data_shards import video

from dstrain import cli
from dstrain.data.reasons import Reason
from dstrain.data.shards import processes
from dstrain.data.shards.catalog import open_index, sidecar_of
from dstrain.data.shards.verify import (
    INDEX,
    LOST,
    NO_INDEX,
    STALE_INDEX,
    TAR,
    UNREADABLE,
    Damage,
    verify,
    verify_all,
)

BLOCK = 512


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    path = write_tar(tmp_path / "a.tar", sample_members(6, (40, 40)))
    open_index(path)
    return path


def places(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of each member's data."""
    with tarfile.open(path) as tar:
        return {member.name: (member.offset_data, member.size) for member in tar}


def overwrite(path: Path, *changes: tuple[int, bytes], keep_time: bool = True) -> None:
    status = path.stat()
    with path.open("r+b") as file:
        for offset, data in changes:
            file.seek(offset)
            file.write(data)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flipped(path: Path, *offsets: int) -> None:
    data = path.read_bytes()
    overwrite(path, *((offset, bytes([data[offset] ^ 0x10])) for offset in offsets))


def shown(found: list[Damage]) -> list[tuple[str, str, int]]:
    return [(damage.reason, damage.member, damage.offset) for damage in found]


def test_a_sound_shard(shard: Path) -> None:
    assert verify(shard) == []
    sidecar_of(shard).unlink()
    assert shown(verify(shard)) == [(NO_INDEX, "", 0)]
    assert all(damage.harmless for damage in verify(shard))


def test_every_altered_member_is_named(shard: Path) -> None:
    at = places(shard)
    offsets = [at[name][0] for name in ("0001.png", "0003.txt", "0004.png", "0005.txt")]
    flipped(shard, *(offset + 1 for offset in offsets))
    found = verify(shard)
    assert shown(found) == [
        (Reason.CHANGED, "0001.png", offsets[0]),
        (Reason.CHANGED, "0003.txt", offsets[1]),
        (Reason.CHANGED, "0004.png", offsets[2]),
        (Reason.CHANGED, "0005.txt", offsets[3]),
    ]
    assert str(found[0]).startswith(
        f"{shard}, byte {offsets[0]}: member 0001.png: changed (other bytes than were indexed"
    )
    assert "neither PNG" in found[0].detail and found[1].detail == "other bytes than were indexed"


def test_without_an_index_what_shows_by_itself_is_found(shard: Path) -> None:
    at = places(shard)
    flipped(shard, at["0001.png"][0] + 60, at["0003.txt"][0], at["0004.png"][0])
    overwrite(shard, (at["0005.txt"][0], b"\xff"))
    sidecar_of(shard).unlink()
    assert shown(verify(shard)) == [
        (NO_INDEX, "", 0),
        (Reason.IMAGE_DAMAGED, "0001.png", at["0001.png"][0]),
        (Reason.IMAGE_FORMAT, "0004.png", at["0004.png"][0]),
        (Reason.CAPTION_ENCODING, "0005.txt", at["0005.txt"][0]),
    ]


def test_it_goes_on_after_damaged_headers_and_names_what_is_lost(shard: Path) -> None:
    at = places(shard)
    first, second = at["0001.png"][0] - BLOCK, at["0004.txt"][0] - BLOCK
    flipped(shard, first + 3, second + 130, at["0005.png"][0] + 70)
    size = at["0001.png"][1]
    after = at["0001.txt"][0] - BLOCK
    found = verify(shard)
    assert shown(found) == [
        (TAR, "", first),
        (TAR, "", second),
        (Reason.CHANGED, "0005.png", at["0005.png"][0]),
        (LOST, "0001", at["0001.png"][0]),
        (LOST, "0004", at["0004.txt"][0]),
    ]
    assert found[0].detail == f"the header's checksum is wrong; bytes {first} to {after} cannot be read"
    assert f"image of {size} bytes" in found[3].detail and "txt of 9 bytes" in found[4].detail


def test_a_shard_that_is_cut_off(shard: Path) -> None:
    at = places(shard)
    with shard.open("r+b") as file:
        file.truncate(at["0004.png"][0] + 10)
    found = verify(shard)
    assert shown(found) == [(STALE_INDEX, "", 0), (TAR, "", at["0004.png"][0] - BLOCK)]
    assert f"lacks its last {at['0004.png'][1] - 10} bytes" in found[1].detail
    assert f"of a file of {10240 * 2} bytes" in found[0].detail


def test_a_missing_end_and_a_second_archive(shard: Path, tmp_path: Path) -> None:
    sound = shard.read_bytes()
    end = places(shard)["0005.txt"][0] + BLOCK
    shard.write_bytes(sound[:end])
    assert [d.detail for d in verify(shard) if d.reason == TAR] == [
        "it ends without the end-of-archive marker, so it was cut off"
    ]
    other = write_tar(tmp_path / "b.tar", [("x.png", picture(20, 20)), ("x.txt", b"")])
    shard.write_bytes(sound + other.read_bytes())
    x = len(sound) + places(other)["x.txt"][0]
    assert shown(verify(shard))[1:] == [(TAR, "", len(sound)), (Reason.EMPTY_CAPTION, "x.txt", x)]


def test_bytes_between_the_members(shard: Path) -> None:
    offset, size = places(shard)["0002.txt"]
    flipped(shard, offset + size + 5)
    assert shown(verify(shard)) == [(Reason.CHANGED, "", 0)]
    flipped(shard, offset + size + 5)
    assert verify(shard) == []
    flipped(shard, offset - BLOCK + 155)  # the blank behind the checksum of a header, which readers pass over
    assert shown(verify(shard)) == [(Reason.CHANGED, "", 0)]


def test_what_the_index_leaves_out_is_named_member_by_member(tmp_path: Path) -> None:
    members = [
        ("a.png", picture(20, 20)[:-9]), ("a.txt", b""), ("a.edit.png", b"x"), ("a.json", b"{"),
        ("b.gif", b"GIF89a"), ("b.txt", b"x"),
        ("c.png", picture(20, 20)), ("c.json", b"{"),
        ("d.png", picture(20, 20)), ("d.PNG", picture(20, 20)), ("d.txt", b"x" * (1 << 17)),
        ("../e.png", picture(20, 20)),
        ("a.cls", b"5"),
        ("f.json", b'{"url": ""}'),
    ]  # fmt: skip
    path = write_tar(tmp_path / "a.tar", members)
    open_index(path)
    assert [(damage.reason, damage.member) for damage in verify(path)] == [
        (Reason.IMAGE_DAMAGED, "a.png"),
        (Reason.EMPTY_CAPTION, "a.txt"),
        (Reason.IMAGE_FORMAT, "a.edit.png"),
        (Reason.IMAGE_FORMAT, "b.gif"),
        (Reason.NO_CAPTION, "c.json"),
        (Reason.AMBIGUOUS, "d.PNG"),
        (Reason.CAPTION_TOO_LONG, "d.txt"),
        (Reason.UNSAFE_NAME, "../e.png"),
        *((Reason.AMBIGUOUS, key) for key in ("a", "b", "../e", "a", "f")),
    ]


def test_pictures_are_decoded_in_full(tmp_path: Path) -> None:
    """Damage that only a decoder sees: the headers are sound, and there is no index to compare with."""
    data = bytearray(picture(64, 64, kind="JPEG"))
    data[-40:-2] = b"\xff\xd0" * 19
    path = write_tar(tmp_path / "a.tar", [("a.jpg", bytes(data)), ("a.txt", b"x")])
    assert [d.reason for d in verify(path)] == [NO_INDEX, Reason.IMAGE_DAMAGED]
    assert open_index(path).samples == 1


def test_videos_are_decoded_at_both_ends(tmp_path: Path) -> None:
    data = bytearray(video(9))
    sound = write_tar(tmp_path / "a.tar", [("a.mp4", bytes(data)), ("a.txt", b"x")])
    assert [d.reason for d in verify(sound)] == [NO_INDEX]
    last = data.rindex(b"\0\0\1\xb6", 0, data.rindex(b"moov"))  # the start code of an MPEG-4 picture
    data[last + 5 : last + 12] = b"\xff" * 7
    damaged = write_tar(tmp_path / "b.tar", [("a.mp4", bytes(data)), ("a.txt", b"x")])
    assert open_index(damaged).samples == 1
    assert [(d.reason, d.member) for d in verify(damaged)] == [(Reason.VIDEO_DAMAGED, "a.mp4")]


def test_links_and_devices(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name, kind in (("a.png", tarfile.SYMTYPE), ("b.txt", tarfile.FIFOTYPE), ("folder", tarfile.DIRTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    assert [(d.reason, d.member) for d in verify(path)[1:]] == [("not_a_file", "a.png"), ("not_a_file", "b.txt")]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("time", "it is of another time, and of these bytes; `dstrain index` makes it anew"),
        ("bytes", "it is of another time, and of other bytes; `dstrain index` makes it anew"),
        ("size", "it is of a file of 20480 bytes; `dstrain index` makes it anew"),
    ],
)
def test_a_stale_index_is_said_and_not_used(shard: Path, change: str, expected: str) -> None:
    if change != "time":
        flipped(shard, places(shard)["0003.txt"][0])
    if change == "size":
        with shard.open("ab") as file:
            file.write(b"\0" * 512)
    os.utime(shard, ns=(1, 1))
    (damage,) = verify(shard)
    assert (damage.reason, damage.detail, damage.harmless) == (STALE_INDEX, expected, True)


def test_a_damaged_index_is_damage(shard: Path) -> None:
    data = sidecar_of(shard).read_bytes()
    sidecar_of(shard).write_bytes(data[:-1] + b"x")
    (damage,) = verify(shard)
    assert damage.reason == INDEX and not damage.harmless and "delete it" in damage.detail
    flipped(shard, places(shard)["0003.txt"][0])  # its header still has the digest of the whole
    assert [d.reason for d in verify(shard)] == [INDEX, Reason.CHANGED]
    sidecar_of(shard).write_bytes(data[:100])
    assert [d.reason for d in verify(shard)] == [INDEX]


@pytest.mark.parametrize("kind", ["missing", "pipe", "folder"])
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tar"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    start = time.perf_counter()
    assert [damage.reason for damage in verify(path)] == [UNREADABLE]
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("content", [b"", b"text", b"\x1f\x8b" + b"x" * 2000, b"\0" * 1000])
def test_what_is_no_tar(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    found = [damage for damage in verify(path) if not damage.harmless]
    assert [damage.reason for damage in found][:1] == [TAR]


def test_shards_are_verified_by_processes_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "WORTH_BYTES", 0)
    paths = [write_tar(tmp_path / f"{n}.tar", [(f"{n}.txt", b"" if n % 2 else b"x")]) for n in range(5)]
    found = list(verify_all(paths, workers=2, progress=False))
    assert [[d.member for d in damages if not d.harmless] for damages in found] == [[], ["1.txt"], [], ["3.txt"], []]


def test_the_command(shard: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = write_tar(tmp_path / "b.tar", sample_members(2))
    assert cli.main(["verify", str(tmp_path), "--workers", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{other}, byte 0: no_index (there is none beside it; `dstrain index` makes one)"
    assert lines[-1] == "2 shards, 0 damages in 0 of them; 1 without a fresh index to compare with"
    offset = places(shard)["0003.txt"][0]
    flipped(shard, offset, places(shard)["0004.txt"][0])
    report = tmp_path / "report.jsonl"
    assert cli.main(["verify", str(shard), "--report", str(report), "--workers", "1"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{shard}, byte {offset}: member 0003.txt: changed (other bytes than were indexed)"
    assert lines[-1] == "1 shards, 2 damages in 1 of them"
    assert [json.loads(line)["member"] for line in report.read_text().splitlines()] == ["0003.txt", "0004.txt"]
    assert json.loads(report.read_text().splitlines()[0]) == {
        "shard": str(shard), "offset": offset, "member": "0003.txt", "reason": "changed",
        "detail": "other bytes than were indexed",
    }  # fmt: skip

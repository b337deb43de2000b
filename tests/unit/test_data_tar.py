"""The strict tar reader: it agrees with tarfile on sound files, and sees every damage to a header."""

import gzip
import io
import os
import pickle
import random
import tarfile
from pathlib import Path

import pytest
from data_samples import sample_members, write_tar

from dstrain.data.shards.tar import Kind, Member, TarDamage, members, next_header, opened
from dstrain.errors import DataError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def read(path: Path) -> list[Member]:
    fd = os.open(path, os.O_RDONLY)
    try:
        return list(members(fd, path))
    finally:
        os.close(fd)


def header(name: str = "a.png", size: int = 0, kind: bytes = b"0") -> bytearray:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return bytearray(info.tobuf(tarfile.USTAR_FORMAT))


def sealed(block: bytearray) -> bytes:
    """Give a changed header the checksum that it should have."""
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@pytest.mark.parametrize("format", FORMATS)
def test_agrees_with_tarfile(tmp_path: Path, format: str) -> None:
    names = ["a.png", "./b.txt", "folder/c.jpg", "d" * 99, "empty.txt"]
    if format != "ustar":
        names += ["x/" * 70 + "long.png", "é" * 120 + ".txt", "ü.png"]
    path = write_tar(
        tmp_path / "a.tar",
        [(name, b"z" * (300 * i) * (name != "empty.txt")) for i, name in enumerate(names)],
        FORMATS[format],
    )
    with tarfile.open(path) as tar:
        expected = [Member(m.name, Kind.FILE, m.offset_data, m.size) for m in tar]
    assert read(path) == expected


def test_float_times_of_webdataset_writers(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:  # pax, and a fraction of a second makes it a pax record
        for name in ("a.png", "b.png"):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = 5, 1700000000.25
            tar.addfile(info, io.BytesIO(b"12345"))
    assert [(m.name, m.size) for m in read(tmp_path / "a.tar")] == [("a.png", 5), ("b.png", 5)]


def test_kinds_of_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, kind in [
            ("folder", tarfile.DIRTYPE),
            ("link.png", tarfile.SYMTYPE),
            ("hard.png", tarfile.LNKTYPE),
            ("device.png", tarfile.CHRTYPE),
            ("pipe.png", tarfile.FIFOTYPE),
            ("file.png", tarfile.REGTYPE),
        ]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd" if "k" in name[:4] or name.startswith("hard") else ""
            tar.addfile(info, io.BytesIO(b""))
    kinds = {member.name.strip("/"): member.kind for member in read(tmp_path / "a.tar")}
    assert kinds.pop("folder") is Kind.FOLDER and kinds.pop("file.png") is Kind.FILE
    assert set(kinds.values()) == {Kind.OTHER} and len(kinds) == 4


def test_pax_sparse_is_not_a_file(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}
        tar.addfile(info)
    assert [member.kind for member in read(tmp_path / "a.tar")] == [Kind.OTHER]


END = b"\0" * 1024


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"hello", "is not a tar file"),
        (os.urandom(4096), "is not a tar file"),
        (b"<html>" + b" " * 1000, "is not a tar file.*dstrain pack"),
        (gzip.compress(b"x" * 5000, mtime=0), "is gzip-compressed; decompress"),
        (bytes(header()), "damaged at byte 512: it ends without the end-of-archive marker"),
        (header(size=1000) + b"x" * 600, "'a.png' lacks its last 400 bytes"),
        (sealed(header()[:124] + b"\x80\0\0\0\0\0\1\0\0\0\0\0" + header()[136:]) + END, "lacks its last"),
        (sealed(header()[:124] + b"\xff" * 12 + header()[136:]) + END, "the size field is not a number"),
        (sealed(header()[:124] + b"-0000000005\0" + header()[136:]) + END, "the size field is not a number"),
        (header() + b"\0" * 512 + header() + END, "data follows the end-of-archive marker"),
        (header(kind=b"S") + END, "sparse"),
        (header(kind=b"L", size=5) + b"name\0".ljust(512, b"\0") + END, "a long-name record has no member"),
        (header(kind=b"L", size=9) + b"name\0".ljust(512, b"\0") + header() + END, "a long-name record holds no name"),
        (header(kind=b"L", size=0) + header() + END, "a long-name record holds no name"),
        (header(kind=b"L", size=1 << 30) + END, "a name record claims 1073741824 bytes"),
        (header(kind=b"x", size=9) + b"nonsense\n".ljust(512, b"\0") + END, "a pax record cannot be understood"),
        (header(kind=b"x", size=9) + b"99 a=bcd\n".ljust(512, b"\0") + END, "a pax record cannot be understood"),
        (header(kind=b"x", size=9) + b"1 0 a=bc\n".ljust(512, b"\0") + END, "a pax record cannot be understood"),
        (header(kind=b"g", size=10) + b"10 path=x\n".ljust(512, b"\0") + header() + END, "a pax record cannot be"),
        (header(kind=b"x", size=11) + b"11 size=-1\n".ljust(512, b"\0") + header() + END, "pax size is not a number"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.tar"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


def test_one_zero_block_is_enough_of_an_end(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(header(size=3) + b"abc".ljust(512, b"\0") + b"\0" * 512)
    assert [member.size for member in read(path)] == [3]


def mutate(data: bytes, how: str, rng: random.Random) -> bytes:
    block = rng.randrange(len(data) // 512) * 512
    if how == "truncate":
        return data[: rng.randrange(len(data))]
    if how == "truncate_block":
        return data[:block]
    if how == "flip":
        place = rng.randrange(len(data))
        return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
    if how == "zero":
        return data[:block] + b"\0" * 512 + data[block + 512 :]
    if how == "noise":
        return data[:block] + rng.randbytes(512) + data[block + 512 :]
    if how == "duplicate":
        return data[: block + 512] + data[block:]
    return data[:block] + data[block + 512 :]  # delete


@pytest.mark.parametrize("how", ["truncate", "truncate_block", "flip", "zero", "noise", "duplicate", "delete"])
def test_structural_damage_is_never_silent(tmp_path: Path, how: str) -> None:
    """After any damage the members are the same as before, or it is an error: none is lost, moved or invented."""
    path = write_tar(tmp_path / "a.tar", sample_members(12))
    sound, expected = path.read_bytes(), read(path)
    rng = random.Random(how)
    raised = 0
    for _ in range(150):
        path.write_bytes(mutate(sound, how, rng))
        try:
            assert read(path) == expected
        except DataError:
            raised += 1
    assert raised >= (10 if how in ("flip", "zero", "noise") else 100)


# Beyond the damage


def test_damage_says_where_another_member_may_follow(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", sample_members(2))
    data = bytearray(path.read_bytes())
    data[1024 + 100] ^= 1  # the header of 0000.txt
    path.write_bytes(data)
    with opened(path) as fd:
        with pytest.raises(TarDamage) as raised:
            list(members(fd, path))
        damage = pickle.loads(pickle.dumps(raised.value))  # as it comes back from a process
        assert (damage.position, damage.what) == (1024, "the header's checksum is wrong")
        assert str(damage) == str(raised.value)
        assert next_header(fd, damage.resume) == 2048
        assert [member.name for member in members(fd, path, 2048)] == ["0001.png", "0001.txt"]
        assert next_header(fd, 4096) is None


def test_headers_are_found_far_away_and_not_in_noise(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    noise = random.Random(0).randbytes((1 << 20) + 512 * 7)
    path.write_bytes(header() + noise + b"0" * 2048 + b"\0" * 2048 + header())
    with opened(path) as fd:
        assert next_header(fd, 0) == 0
        assert next_header(fd, 512) == 512 + len(noise) + 4096


def test_a_second_archive_behind_the_first_is_named_by_its_first_block(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(header() + b"\0" * 2048 + header("b.png") + END)
    with opened(path) as fd, pytest.raises(TarDamage, match="damaged at byte 2560: data follows") as raised:
        list(members(fd, path))
    assert raised.value.resume == raised.value.position == 2560


@pytest.mark.parametrize("kind", ["folder", "pipe", "missing", "loop", "link to a pipe"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.tar"
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind != "missing":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("pipe") if kind.startswith("link") else (tmp_path / "pipe").rename(path)
    message = "cannot be opened" if kind in ("missing", "loop") else "is not a file but a folder, a pipe or a device"
    with pytest.raises(DataError, match=rf"a\.tar {message}"), opened(path):
        pass


def test_errors_of_the_disk_name_the_file(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [])
    with pytest.raises(DataError, match=r"a.tar cannot be read: Input/output error"), opened(path):
        raise OSError(5, os.strerror(5))

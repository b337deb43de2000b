"""Damaged and hostile shards: nothing silent, no wrong pair, no hang, no error without a type, nothing run or touched.

Thousands of damaged tars go through the index, the reader and `verify`; then tars, indexes and entries made to do harm.
"""

import gzip
import io
import os
import pickle
import random
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from data_samples import image_bytes, picture, sample_members, write_tar
from PIL import Image

from dstrain.data import open_dataset
from dstrain.data.media.captions import captions_of
from dstrain.data.reader import ShardReader
from dstrain.data.reasons import BadSample, Reason
from dstrain.data.shards.catalog import find_shards, open_index
from dstrain.data.shards.index import ShardIndex
from dstrain.data.shards.names import Content
from dstrain.data.shards.scan import scan
from dstrain.data.shards.tar import opened
from dstrain.data.shards.verify import verify
from dstrain.errors import DataError

BLOCK = 512
SAMPLES = 12
MUTANTS = 120  # of each kind and format
Pairs = dict[str, tuple[bytes, str]]  # key -> picture, caption


def noise(seed: int) -> bytes:
    """A picture of 1 to 2 kB, so that it spans blocks."""
    rng = np.random.default_rng(seed)
    return image_bytes(Image.fromarray(rng.integers(0, 256, (22 + seed % 3, 20, 3), np.uint8)))


def pairs() -> Pairs:
    """Some keys need long-name or pax records."""
    keys = [f"{number:04d}" if number % 3 else f"{'folder/' * 20}{number:04d}" for number in range(SAMPLES)]
    return {key: (noise(number), f"caption {number:02d}") for number, key in enumerate(keys)}


class Shard:
    """A sound shard, its index, and a way to damage the one and keep the other."""

    def __init__(self, path: Path, format: int) -> None:
        self.pairs = pairs()
        members = [
            m for key, (png, txt) in self.pairs.items() for m in ((key + ".png", png), (key + ".txt", txt.encode()))
        ]
        self.path = write_tar(path, members, format)
        self.sound = path.read_bytes()
        self.time = path.stat().st_mtime_ns
        self.index = open_index(path)
        assert self.index.samples == SAMPLES and len(self.index.rows) == SAMPLES
        with tarfile.open(path) as tar:
            self.members = list(tar)
        last = self.members[-1]
        self.end = last.offset_data + -(-last.size // BLOCK) * BLOCK  # of the members; zeros follow
        starts = [member.offset for member in self.members]
        self.headers = [  # with those of long names and pax records, and their data
            block for start, member in zip(starts, self.members) for block in range(start, member.offset_data, BLOCK)
        ]

    def write(self, data: bytes) -> None:
        self.path.write_bytes(data)
        os.utime(self.path, ns=(self.time, self.time))

    def matters(self, mutant: bytes) -> bool:
        """Whether more changed than zeros: those that fill blocks, and those after the first block of the end."""
        end = self.end + BLOCK
        if len(mutant) != len(self.sound) or any(mutant[end:]):
            return mutant[:end] != self.sound[:end] or any(mutant[end:])
        ranges = [(block, BLOCK) for block in self.headers] + [(m.offset_data, m.size) for m in self.members]
        return any(mutant[start : start + size] != self.sound[start : start + size] for start, size in ranges)


@pytest.fixture(scope="module", params=["gnu", "pax"])
def shard(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shard:
    format = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}[request.param]
    return Shard(tmp_path_factory.mktemp(request.param) / "a.tar", format)


def replaced(data: bytes, place: int, new: bytes) -> bytes:
    return data[:place] + new + data[place + len(new) :]


def resealed(block: bytes) -> bytes:
    """Give a header the checksum that it should have."""
    blank = replaced(block, 148, b" " * 8)
    return replaced(blank, 148, b"%06o\0 " % sum(blank))


def flip(data: bytes, rng: random.Random, place: int) -> bytes:
    return replaced(data, place, bytes([data[place] ^ 1 << rng.randrange(8)]))


def some_block(shard: Shard, rng: random.Random) -> int:
    return rng.randrange(shard.end // BLOCK) * BLOCK


def truncate(shard: Shard, rng: random.Random) -> bytes:
    return shard.sound[: rng.randrange(len(shard.sound))]


def flip_header(shard: Shard, rng: random.Random) -> bytes:
    return flip(shard.sound, rng, rng.choice(shard.headers) + rng.randrange(BLOCK))


def flip_data(shard: Shard, rng: random.Random) -> bytes:
    member = rng.choice(shard.members)
    return flip(shard.sound, rng, member.offset_data + rng.randrange(member.size))


def zero_block(shard: Shard, rng: random.Random) -> bytes:
    return replaced(shard.sound, some_block(shard, rng), b"\0" * BLOCK)


def noise_block(shard: Shard, rng: random.Random) -> bytes:
    return replaced(shard.sound, some_block(shard, rng), rng.randbytes(BLOCK))


def duplicate_block(shard: Shard, rng: random.Random) -> bytes:
    block = some_block(shard, rng)
    return shard.sound[: block + BLOCK] + shard.sound[block:]


def delete_block(shard: Shard, rng: random.Random) -> bytes:
    block = some_block(shard, rng)
    return shard.sound[:block] + shard.sound[block + BLOCK :]


def insert_block(shard: Shard, rng: random.Random) -> bytes:
    block = some_block(shard, rng)
    return shard.sound[:block] + rng.randbytes(BLOCK) + shard.sound[block:]


def swap_blocks(shard: Shard, rng: random.Random) -> bytes:
    data, (a, b) = shard.sound, (some_block(shard, rng), some_block(shard, rng))
    if rng.random() < 0.5:  # of one kind, which is likelier to go unseen
        a, b = rng.sample(shard.headers, 2)
    return replaced(replaced(data, a, data[b : b + BLOCK]), b, data[a : a + BLOCK])


def wrong_size(shard: Shard, rng: random.Random) -> bytes:
    """A size that is huge, negative or no number, under a right checksum."""
    member = rng.choice(shard.members)
    block = member.offset_data - BLOCK
    sizes = [
        b"77777777777\0", b"-0000000005\0", b"\xff" * 12, b"\x80" + b"\xff" * 11, b"\x80\0\0\0\0\0\0\2\0\0\0\0",
        b"0x000000005\0", b"%011o\0" % (member.size + BLOCK * rng.randrange(1, 9)), b"1e5\0\0\0\0\0\0\0\0\0",
    ]  # fmt: skip
    return replaced(shard.sound, block, resealed(replaced(shard.sound[block : block + BLOCK], 124, rng.choice(sizes))))


def duplicate_name(shard: Shard, rng: random.Random) -> bytes:
    """One member renamed to another's name under a right checksum, or one written again at the end."""
    short = [member for member in shard.members if len(member.name) < 90]
    one, other = rng.sample(short, 2)
    if rng.random() < 0.5:
        again = shard.sound[one.offset : one.offset_data + -(-one.size // BLOCK) * BLOCK]
        return shard.sound[: shard.end] + again + b"\0" * 1024
    block = one.offset_data - BLOCK
    name = other.name.encode().ljust(100, b"\0")
    return replaced(shard.sound, block, resealed(replaced(shard.sound[block : block + BLOCK], 0, name)))


MUTATORS: list[Callable[[Shard, random.Random], bytes]] = [
    truncate, flip_header, flip_data, zero_block, noise_block, duplicate_block, delete_block, insert_block,
    swap_blocks, wrong_size, duplicate_name,
]  # fmt: skip


def fresh(path: Path) -> ShardIndex | None:
    """The index that is made of the mutant; None if it is refused."""
    try:
        with opened(path) as fd:
            return scan(path, fd)
    except DataError:
        return None


def read(index: ShardIndex, data: bytes, row: int) -> dict[Content, bytes]:
    """The members of a row by kind, from bytes."""
    first, count = int(index.rows["first"][row]), int(index.rows["count"][row])
    parts = index.parts[first : first + count]
    return {Content(part["kind"]): data[part["offset"] : part["offset"] + part["size"]] for part in parts}


def reads(shard: Shard) -> Iterator[tuple[str, Content, bool]]:
    """Read every member by the index from before the damage: (key, kind, whether it was refused). None is wrong."""
    reader = ShardReader()
    for row, key in enumerate(shard.index.keys):
        for kind, expected in read(shard.index, shard.sound, row).items():
            part = shard.index.parts[shard.index.rows["first"][row] + (kind is Content.TXT)]
            try:
                data = reader.read(shard.path, int(part["offset"]), int(part["size"]), int(part["digest"]))
            except BadSample as error:
                assert error.reason is Reason.CHANGED
                yield key, kind, True
            else:
                assert data == expected
                yield key, kind, False


@pytest.mark.parametrize("mutate", MUTATORS)
def test_damage_is_never_silent_and_never_makes_a_wrong_pair(
    shard: Shard, mutate: Callable[[Shard, random.Random], bytes]
) -> None:
    rng = random.Random(mutate.__name__)
    refused = slowest = 0.0
    for _ in range(MUTANTS):
        mutant = mutate(shard, rng)
        shard.write(mutant)
        start = time.perf_counter()
        changed = {(key, kind) for key, kind, bad in reads(shard) if bad}
        index = fresh(shard.path)
        refused += index is None
        for row, key in enumerate(index.keys if index is not None else ()):
            members = read(index, mutant, row)
            if key not in shard.pairs:  # long names have no checksum; one that is spoilt leaves its member alone
                assert len(members) == 1
                continue
            png, txt = shard.pairs[key]
            assert members.get(Content.IMAGE, png).startswith(png), "PNG has checksums, up to its end"
            caption = captions_of(members[Content.TXT], "txt") if Content.TXT in members else [txt]
            # text has no checksum of its own: other bytes are seen by the index from before
            assert caption == [txt] or (key, Content.TXT) in changed
        if shard.matters(mutant):
            found = [damage for damage in verify(shard.path) if not damage.harmless]
            assert found and all(damage.shard == str(shard.path) for damage in found)
            if mutate is flip_data:
                assert changed and [damage.reason for damage in found] == [Reason.CHANGED]
        slowest = max(slowest, time.perf_counter() - start)
    shard.write(shard.sound)
    assert verify(shard.path) == []
    assert slowest < 2
    assert refused >= MUTANTS * {
        flip_data: 0,
        duplicate_name: 0,
        swap_blocks: 0.3,
        zero_block: 0.2,
        noise_block: 0.2,
    }.get(mutate, 0.5)


def test_enough_mutants() -> None:
    assert len(MUTATORS) >= 8 and len(MUTATORS) * MUTANTS * 2 >= 2400


def test_the_check_of_what_matters_sees_filling(shard: Shard) -> None:
    member = shard.members[1]
    assert not shard.matters(replaced(shard.sound, member.offset_data + member.size, b"x"))
    assert shard.matters(replaced(shard.sound, member.offset_data + member.size - 1, b"\0"))
    assert shard.matters(replaced(shard.sound, shard.headers[3] + 400, b"x"))
    assert not shard.matters(shard.sound[: shard.end + BLOCK]) and shard.matters(shard.sound[: shard.end + BLOCK - 1])


def header(name: str = "a.png", size: int = 0, kind: bytes = b"0") -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.USTAR_FORMAT)


def sized(field: bytes, kind: bytes = b"0") -> bytes:
    return resealed(replaced(header(kind=kind), 124, field.ljust(12, b"\0")))


END = b"\0" * 1024
PAX_SIZE = b"28 size=99999999999999999\n"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        END,
        *(random.Random(seed).randbytes(length) for seed, length in enumerate([1, 511, 512, 513, 10240, 99999])),
        gzip.compress(b"x" * 10240, mtime=0),
        b"\xff" * 10240,
        header(),
        header() + END,
        sized(b"\x80\0\0\0\0\0\0\2\0\0\0\0") + END,  # 8 GiB
        sized(b"\x80" + b"\xff" * 11) + END,
        sized(b"\xff" * 12) + END,
        sized(b"-1") + END,
        sized(b"77777777777") + END,
        header(kind=b"S") + END,
        header(kind=b"x", size=1 << 20) + END,
        header(kind=b"x", size=28) + PAX_SIZE.ljust(BLOCK, b"\0") + header() + END,
        header(kind=b"x", size=12) + b"11 path=abc\n".ljust(BLOCK, b"\0") + header() + END,
        header(kind=b"x", size=8) + b"9 path=\n".ljust(BLOCK, b"\0") + header() + END,
        header(kind=b"L", size=0) + header() + END,
        header(kind=b"L", size=1 << 30) + END,
        header(kind=b"L", size=5) + b"a.pn\0".ljust(BLOCK, b"\0") * 3 + END,
        b"".join([header(kind=b"L", size=5) + b"a.pn\0".ljust(BLOCK, b"\0")] * 1000) + END,
        header(kind=b"V") + END,
        header("") + END,
        header("\0") + END,
        header("a.png", 3) + b"abc".ljust(BLOCK, b"\0") + END,
    ],
)
def test_odd_files_are_an_error_or_have_no_rows(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    start = time.perf_counter()
    index = fresh(path)
    assert index is None or index.samples == 0
    assert all(damage.reason for damage in verify(path))
    assert time.perf_counter() - start < 2


def test_claims_of_size_take_no_memory(tmp_path: Path) -> None:
    contents = [
        header(kind=b"x", size=28) + PAX_SIZE.ljust(BLOCK, b"\0") + header() + END,
        sized(b"\x80\0\0\0\0\0\0\1\0\0\0\0", b"x") + END,
        sized(b"\x80\0\0\0\0\0\0\1\0\0\0\0", b"L") + END,
    ]
    for number, content in enumerate(contents):
        with (tmp_path / f"{number}.tar").open("wb") as file:
            file.write(content)
            file.truncate((1 << 33) + (1 << 20))  # 8 GiB, of which no byte is on disk
    code = (
        "import resource, sys; from pathlib import Path; from dstrain.data.shards.catalog import open_index\n"
        "from dstrain.errors import DataError\n"
        "def rss(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = rss()\n"
        "for path in sys.argv[1:]:\n"
        "    try: open_index(Path(path)); print('accepted', path)\n"
        "    except DataError: pass\n"
        "print(rss() - before < 16)"
    )
    paths = [str(tmp_path / f"{number}.tar") for number in range(len(contents))]
    done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("True\n", 0)


# Made to do harm


class Payload:
    """What runs if anything unpickles it."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (str(self.canary), "w"))


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that every payload would make. Sockets cannot be opened, and the folder is the current one."""

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a socket is opened")

    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setattr(os, "system", refuse)
    monkeypatch.setenv("GOPEN_REWRITE", f"run=pipe:touch {tmp_path}/canary ")
    monkeypatch.setenv("SECRET", "secret")
    return tmp_path / "canary"


def payloads(canary: Path) -> list[tuple[str, bytes]]:
    pickled = pickle.dumps(Payload(canary))
    array = io.BytesIO()
    np.save(array, np.array([Payload(canary)], dtype=object), allow_pickle=True)
    npz = io.BytesIO()
    np.savez(npz, a=np.array([Payload(canary)], dtype=object))
    evil = [("pyd", pickled), ("pkl", pickled), ("pickle", pickled), ("pth", pickled), ("pt", pickled)]
    return [*evil, ("npy", array.getvalue()), ("npz", npz.getvalue()), ("ten", pickled), ("cbor", pickled)]


def test_the_payloads_work(tmp_path: Path) -> None:
    """What the next tests must not load does make the canary when it is loaded."""
    for name, data in payloads(tmp_path / "canary"):
        (tmp_path / "canary").unlink(missing_ok=True)
        if name == "npy":
            np.load(io.BytesIO(data), allow_pickle=True)
        elif name == "npz":
            np.load(io.BytesIO(data), allow_pickle=True)["a"]
        else:
            pickle.loads(data)
        assert (tmp_path / "canary").exists()


def exercise(path: Path) -> tuple[ShardIndex, list[bytes], list[str]]:
    """Do with a shard all that a training does, and more: index, read every member, verify, draw samples."""
    index = open_index(path)
    reader = ShardReader()
    data = [reader.read(path, int(p["offset"]), int(p["size"]), int(p["digest"])) for p in index.parts]
    verify(path)
    dataset = open_dataset([str(path)])
    captions = [caption for row in range(len(dataset)) for caption in dataset.read(row).captions]
    return open_index(path), data, captions


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_members_that_other_readers_load_are_bytes(canary: Path) -> None:
    members = [("a.png", picture(32, 32)), ("a.txt", b"x")]
    members += [(f"a.{name}", data) for name, data in payloads(canary)] + [("a.png.pkl", payloads(canary)[1][1])]
    members += [(f"{name}.{name}", data) for name, data in payloads(canary)]
    path = write_tar(Path("a.tar"), members)
    index, data, captions = exercise(path)
    assert data == [content for _, content in members] and captions == ["x"]
    assert index.samples == 1 + len(payloads(canary)) and not index.excluded
    assert not canary.exists() and sorted(snapshot(Path())) == [Path("a.tar"), Path("a.tar.index")]


def test_payloads_in_the_guise_of_pictures_and_captions(canary: Path) -> None:
    pickled = pickle.dumps(Payload(canary))
    bombs = [
        ("eps", b"%!PS-Adobe-3.0 EPSF-3.0\n(canary) (w) file"),
        ("svg", b"<svg onload='x'/>"),
        ("xbm", b"#define x"),
    ]
    members = []
    for number, (extension, data) in enumerate([*bombs, ("pkl", pickled)]):
        members += [(f"{number}.{kind}", data) for kind in ("png", "mp4", "txt", "json")] + [
            (f"x{number}.{extension}", data)
        ]
    path = write_tar(Path("a.tar"), members + sample_members(1))
    index, _, captions = exercise(path)
    assert captions == ["caption 0"] and [key for key in index.keys if key.isdigit()] == ["0000"]
    assert not canary.exists() and len(snapshot(Path())) == 2


NAMES = [
    "../secret.txt", "../../etc/passwd.txt", "/etc/passwd.txt", "x/../../y.txt", "..", "/.txt", "//x.txt",
    "x/..txt/../z.txt", "~/.ssh/id.txt", "$HOME/a.txt", "${SECRET}.txt", "{a,b}.txt", "{0..9}.txt",
    "`touch canary`.txt", "$(touch canary).txt", "pipe:touch canary.txt", "file:///etc/passwd.txt", "http://127.0.0.1/a.txt",
    "https://h/x.png", "s3://b/k.txt", "C:\\windows\\a.txt", "..\\..\\a.txt", "a\nb.txt", "a\x1b[31m.txt", "con.txt",
    "-rf.txt", "%s%n.txt", "{x.__class__}.txt",
]  # fmt: skip


def test_names_are_labels(canary: Path) -> None:
    (canary.parent / "secret.txt").write_text("secret")
    before = snapshot(canary.parent)
    members = [(name, b"text") for name in NAMES]
    path = write_tar(Path("a.tar"), [*members, *sample_members(1)], tarfile.PAX_FORMAT)
    index, data, captions = exercise(path)
    assert set(data) == {b"text", *(content for _, content in sample_members(1))} and captions == ["caption 0"]
    unsafe = [entry.key for entry in index.excluded if entry.reason is Reason.UNSAFE_NAME]
    assert unsafe == ["../secret", "../../etc/passwd", "/etc/passwd", "x/../../y", "//x", "x/..txt/../z"]
    assert {"$HOME/a", "${SECRET}", "{a,b}", "pipe:touch canary", "http://127.0.0.1/a", "~/.ssh/id"} <= {*index.keys}
    after = snapshot(canary.parent)
    assert sorted(after.keys() - before.keys()) == [canary.parent / "run/a.tar", canary.parent / "run/a.tar.index"]
    assert all(after[path] == content for path, content in before.items())


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE", "CONTTYPE", "GNUTYPE_SPARSE"])
def test_members_that_are_no_files_are_never_followed(canary: Path, kind: str) -> None:
    secret = canary.parent / "secret.txt"
    secret.write_text("secret")
    with tarfile.open("a.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        for target in (str(secret), "../secret.txt", "0000.txt", "/dev/zero", "x.txt"):
            info = tarfile.TarInfo(f"{len(tar.members)}.txt")
            info.type, info.linkname, info.devmajor, info.devminor = getattr(tarfile, kind), target, 1, 5
            tar.addfile(info)
        for name, data in sample_members(1):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    if kind == "GNUTYPE_SPARSE":
        with pytest.raises(DataError, match="sparse"):
            open_index(Path("a.tar"))
        return
    index, data, captions = exercise(Path("a.tar"))
    assert captions == ["caption 0"] and list(index.keys) == ["0000"] and b"secret" not in data
    assert {entry.reason for entry in index.excluded} == {
        Reason.EMPTY_CAPTION if kind == "CONTTYPE" else Reason.NOT_A_FILE
    }
    assert not canary.exists() and sorted(snapshot(Path())) == [Path("a.tar"), Path("a.tar.index")]


def test_captions_are_text_whatever_they_say(canary: Path) -> None:
    texts = [
        f"pipe:touch {canary}",
        "file:///etc/passwd",
        "http://127.0.0.1:1/x",
        "{{7*7}}",
        "$HOME ~ {a,b}",
        "__import__('os')",
    ]
    members = []
    for number, text in enumerate(texts):
        json_ = (
            b'{"caption": "%s", "url": "http://127.0.0.1:1/x.png", "__reduce__": 1, "py/object": "os.system"}'
            % text.encode()
        )
        members += [(f"{number}.png", picture(32, 32, number)), (f"{number}.json", json_)]
    _, _, captions = exercise(write_tar(Path("a.tar"), members))
    assert captions == texts and not canary.exists()


ENTRIES = [
    "pipe:touch {canary}", "pipe:cat a.tar", "PIPE:touch {canary}", "file:a.tar", "file:///etc/passwd", "ftp://127.0.0.1/a.tar",
    "data:text/plain,x", "exec://touch {canary}", "gopher://127.0.0.1/", "simplecache::file://a.tar", "ssh://127.0.0.1/a.tar",
    "$(touch {canary}).tar", "`touch {canary}`.tar", "a.tar; touch {canary}", "| touch {canary}", "$HOME/a.tar", "-",
    "", "/dev/zero", "/dev/stdin", "/proc/self/mem", "{{a,b}}.tar", "a.tar\0.txt",
]  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
def test_entries_are_paths_or_known_urls_and_never_commands(canary: Path, entry: str) -> None:
    write_tar(Path("a.tar"), [])
    start = time.perf_counter()
    with pytest.raises(DataError):
        for shard in find_shards([entry.format(canary=canary)]):
            open_index(Path(shard))
    assert time.perf_counter() - start < 1
    assert not canary.exists() and sorted(snapshot(Path())) == [Path("a.tar")]

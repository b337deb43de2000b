"""Damaged checkpoints: each is named and passed over, none is taken, and where all are damaged nothing begins anew."""

import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Held, alone, check, digests, forked, save, start

from dstrain.engine import checkpoint
from dstrain.engine.state import State, file_name, write_state
from dstrain.errors import CheckpointError
from dstrain.storage import sha256

WORLD = 2
Damage = Callable[[Path, random.Random], None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    run = tmp_path_factory.mktemp("base")
    for step in (2, 4):
        forked(lambda step, rank, world: save(run, step, world, rank), step, world=WORLD)
    return run


def some_file(path: Path, draw: random.Random) -> Path:
    return path / draw.choice([file_name(0), file_name(1), checkpoint.MANIFEST])


def flip(path: Path, draw: random.Random) -> None:
    file = some_file(path, draw)
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)


def truncate(path: Path, draw: random.Random) -> None:
    file = some_file(path, draw)
    file.write_bytes(file.read_bytes()[: draw.randrange(file.stat().st_size)])


def zero_block(path: Path, draw: random.Random) -> None:
    file = some_file(path, draw)
    data = bytearray(file.read_bytes())
    begin = draw.randrange(len(data))
    data[begin : begin + 64] = bytes(len(data[begin : begin + 64]))
    file.write_bytes(data)


def longer(path: Path, draw: random.Random) -> None:
    with some_file(path, draw).open("ab") as f:
        f.write(draw.randbytes(draw.randint(1, 100)))


def missing(path: Path, draw: random.Random) -> None:
    some_file(path, draw).unlink()


def extra(path: Path, draw: random.Random) -> None:
    shutil.copy(path / file_name(draw.randrange(2)), path / file_name(draw.choice([2, 3, 17])))


def swapped(path: Path, draw: random.Random) -> None:
    (path / file_name(0)).rename(path / "kept")
    (path / file_name(1)).rename(path / file_name(0))
    (path / "kept").rename(path / file_name(1))


def of_another_step(path: Path, draw: random.Random) -> None:
    file = some_file(path, draw)
    shutil.copy(path.with_name(checkpoint.name(2)) / file.name, file)


def whole_other_step(path: Path, draw: random.Random) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name(checkpoint.name(2)), path)


def manifest_edited(path: Path, draw: random.Random) -> None:
    """One value of the manifest is another, of the same type or not."""
    file = path / checkpoint.MANIFEST
    manifest = json.loads(file.read_text())
    holder: Any = manifest
    while True:
        key = draw.choice(sorted(holder) if isinstance(holder, dict) else range(len(holder)))
        if not isinstance(holder[key], dict | list) or draw.random() < 0.2:
            break
        holder = holder[key]
    other = [None, True, False, 0, 1, 3, -1, 4.0, 1e308, 10**30, "", "4", "../x", [], {}, [1, 2], [[1, 2], 3], {"a": 1}]
    if isinstance(holder[key], int):
        other += [holder[key] + 1, float(holder[key]), str(holder[key])]
    holder[key] = draw.choice([v for v in other if (type(v), v) != (type(holder[key]), holder[key])])
    file.write_text(json.dumps(manifest))


def manifest_key_gone(path: Path, draw: random.Random) -> None:
    file = path / checkpoint.MANIFEST
    manifest = json.loads(file.read_text())
    holder = draw.choice([manifest, manifest, manifest["files"]])
    del holder[draw.choice(sorted(holder))]
    file.write_text(json.dumps(manifest))


def manifest_key_twice(path: Path, draw: random.Random) -> None:
    file = path / checkpoint.MANIFEST
    key = draw.choice(["step", "format", "digest", "files", "guards"])
    file.write_text(file.read_text().replace("{", f'{{"{key}": 2,', 1))


def manifest_other_text(path: Path, draw: random.Random) -> None:
    texts = [
        b"", b"null", b"3", b"[]", b"{}", b'"x"', b"[" * 100_000, b'{"a":' * 50_000, b"\xff\xfe{}", b"\0" * 400,
        b'{"format": 2, "step": ' + b"9" * 5000 + b', "files": {}}', b'{"format": 2, "step": 4, "files": {}}',
        b'{"format": 2, "step": 1e999, "files": {}}', b'{"format": 2, "step": NaN, "files": {}}',
        b'{"format": 2, "step": true, "files": {}}', b'{"format": 2, "step": 4, "files": []}',
        b'{"format": 2, "step": 4, "files": {"rank-00000.safetensors": 3}}', draw.randbytes(300),
    ]  # fmt: skip
    (path / checkpoint.MANIFEST).write_bytes(draw.choice(texts))


DAMAGES: dict[str, Damage] = {
    d.__name__: d
    for d in (
        *(flip, truncate, zero_block, longer, missing, extra, swapped, of_another_step, whole_other_step),
        *(manifest_edited, manifest_key_gone, manifest_key_twice, manifest_other_text),
    )
}


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def damaged_many(base: Path, tmp: Path, damage: Damage, count: int, seed: int) -> list[str]:
    """Damage the newest of two checkpoints again and again; returns what was not noticed, not named, or not mended."""
    draw, wrong = random.Random(f"{damage.__name__} {seed}"), []
    heard = Lines()
    logging.getLogger("dstrain").addHandler(heard)
    good = digests(base / "checkpoints" / checkpoint.name(4))
    for case in range(count):
        folder = tmp / str(case) / "checkpoints"
        shutil.copytree(base / "checkpoints", folder)
        path = folder / checkpoint.name(4)
        for _ in range(100):
            damage(path, draw)
            if digests(path) != good:
                break
        heard.lines.clear()
        found = checkpoint.find(folder)
        if found != folder / checkpoint.name(2):
            wrong.append(f"{case}: took {found}")
        elif not any(str(path) in line for line in heard.lines):
            wrong.append(f"{case}: not named in {heard.lines}")
        check(folder / checkpoint.name(2), 2)
        shutil.rmtree(folder / checkpoint.name(2))
        try:
            wrong.append(f"{case}: alone, took {checkpoint.find(folder)}")
        except CheckpointError as e:
            if "damaged" not in str(e):
                wrong.append(f"{case}: said {e}")
        shutil.rmtree(folder.parent)
    return wrong


@pytest.mark.parametrize("name", DAMAGES)
def test_no_damage_is_silent(base, tmp_path, name):
    assert alone(damaged_many, base, tmp_path, DAMAGES[name], 77, 0) == []


@pytest.mark.soak
@pytest.mark.parametrize("name", DAMAGES)
def test_no_damage_is_silent_in_many(base, tmp_path, name):
    assert alone(damaged_many, base, tmp_path, DAMAGES[name], 1000, 1) == []


def test_every_byte_of_a_manifest_counts(base, tmp_path):
    """But for those of the space between its parts."""
    shutil.copytree(base / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / checkpoint.name(4)
    good = (path / checkpoint.MANIFEST).read_bytes()

    def unnoticed() -> list[tuple[int, int]]:
        found = []
        for place in range(len(good)):
            for bit in (0, 5):
                data = bytearray(good)
                data[place] ^= 1 << bit
                (path / checkpoint.MANIFEST).write_bytes(data)
                if not checkpoint.damage(path):
                    found.append((place, bit))
        return found

    assert all(good[place : place + 1].isspace() for place, bit in alone(unnoticed))


def test_all_ranks_come_to_the_same(base, tmp_path):
    for name in ("flip", "missing", "manifest_other_text"):
        run = tmp_path / name
        shutil.copytree(base, run)
        DAMAGES[name](run / "checkpoints" / checkpoint.name(4), random.Random(3))
        found = forked(lambda run, rank, world: checkpoint.find(run / "checkpoints"), run, world=3)
        assert found == [run / "checkpoints" / checkpoint.name(2)] * 3


@pytest.mark.parametrize("name", ["notes.txt", ".nfs000000000123", "rank-00000.safetensors.bak", "sub/deep.txt"])
def test_strange_files_are_no_damage(base, tmp_path, name):
    shutil.copytree(base, tmp_path / "run")
    stranger = tmp_path / "run/checkpoints" / checkpoint.name(4) / name
    stranger.parent.mkdir(exist_ok=True)
    stranger.write_text("what a colleague thinks of it")
    (tmp_path / "run/checkpoints/step-notes").write_text("x")
    (tmp_path / "run/checkpoints/step-00000009").write_text("a file, no folder")
    assert alone(start, tmp_path / "run") == 4


def test_a_checkpoint_without_a_manifest_is_not_nothing(base, tmp_path):
    shutil.copytree(base, tmp_path / "run")
    for path in (tmp_path / "run/checkpoints").iterdir():
        (path / checkpoint.MANIFEST).unlink()
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        alone(start, tmp_path / "run")
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged"):
        checkpoint.newest(tmp_path / "run/checkpoints")  # what a dry run asks for


def test_checkpoints_that_cannot_be_listed_are_not_nothing(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    for result in forked(lambda rank, world: checkpoint.find(tmp_path / "checkpoints"), world=2):
        assert isinstance(result, CheckpointError)
        assert "cannot be read" in str(result)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["weight", "exp_avg"])
def test_a_number_that_is_not_finite_is_not_read(base, tmp_path, kind, value):
    """Its digest may be right."""
    shutil.copytree(base, tmp_path / "run")
    path = tmp_path / "run/checkpoints" / checkpoint.name(4)
    state = State(path)
    entry = state._slices[kind, "w"][1][1]
    with entry.path.open("r+b") as f:
        f.seek(entry.begin + entry.dtype.itemsize)
        f.write(torch.tensor([value], dtype=entry.dtype).view(torch.uint8).numpy().tobytes())
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["files"][entry.path.name] = [entry.path.stat().st_size, sha256(entry.path)]
    (path / checkpoint.MANIFEST).write_text(json.dumps(checkpoint.sealed(manifest)))
    assert alone(checkpoint.damage, path) == ""
    with pytest.raises(CheckpointError, match=rf"{file_name(1)}: {kind} of 'w' is not finite"):
        State(path).read(kind, "w")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_not_written(tmp_path, value):
    held = Held(2)
    held.values[1]["exp_avg"][3] = value
    with pytest.raises(CheckpointError, match="exp_avg of 'bias' is not finite"):
        write_state(tmp_path / file_name(0), held.pieces(), held.tensors(), 2)


@pytest.mark.parametrize("name", ["a/b", "../x", "/etc/passwd", "..", ""])
def test_a_manifest_names_no_file_elsewhere(base, tmp_path, name):
    shutil.copytree(base, tmp_path / "run")
    path = tmp_path / "run/checkpoints" / checkpoint.name(4)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["files"][name] = [1, "0" * 64]
    (path / checkpoint.MANIFEST).write_text(json.dumps(checkpoint.sealed(manifest)))
    with pytest.raises(CheckpointError, match="not a file of a checkpoint"):
        checkpoint.read_manifest(path)

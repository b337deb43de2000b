"""The state in a checkpoint: out in ragged slices, back whole and by range, and what is damaged refused."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dstrain.engine.state import Piece, State, file_name, write_state
from dstrain.errors import CheckpointError

SHAPES = {
    "blocks.0.weight": torch.Size([7, 5]),
    "blocks.0.bias": torch.Size([11]),
    "scale": torch.Size([]),
    "kernel": torch.Size([2, 3, 1, 3]),
    "nothing": torch.Size([0, 4]),
}
KINDS = {"weight": torch.float32, "exp_avg": torch.bfloat16, "exp_avg_sq": torch.float16, "ema": torch.float32}


def tensors(seed: int = 0) -> dict[str, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: {k: torch.randn(shape.numel(), generator=generator).to(dtype) for k, dtype in KINDS.items()}
        for name, shape in SHAPES.items()
    }


def write(folder: Path, whole: dict[str, dict[str, torch.Tensor]], world: int, step: int = 9, seed: int = 0) -> None:
    """A file a rank; the slices' ends are drawn, so that some are empty and some the whole parameter."""
    draw = random.Random(seed)
    cuts = {
        name: [0, *sorted(draw.randint(0, shape.numel()) for _ in range(world - 1)), shape.numel()]
        for name, shape in SHAPES.items()
    }
    for rank in range(world):
        spans = {name: (cut[rank], cut[rank + 1]) for name, cut in cuts.items()}
        pieces = [Piece(name, SHAPES[name], first, last - first, KINDS) for name, (first, last) in spans.items()]
        data = ({k: t[slice(*spans[name])] for k, t in kinds.items()} for name, kinds in whole.items())
        write_state(folder / file_name(rank), pieces, data, step)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_out_of_any_ranks_and_back_is_exact(tmp_path, world, seed):
    whole = tensors(seed)
    write(tmp_path, whole, world, step=123, seed=seed)
    state = State(tmp_path)
    assert state.shapes == SHAPES
    assert state.kinds == set(KINDS)
    assert state.optimizer_step == 123
    assert not state.has("momentum", "scale")
    draw = random.Random(seed)
    for name, kinds in whole.items():
        for kind, tensor in kinds.items():
            assert state.has(kind, name)
            read = state.read(kind, name)
            assert read.dtype == torch.float32
            assert torch.equal(read, tensor.float())
            for _ in range(8):
                start, stop = draw.randint(0, len(tensor) + 2), draw.randint(0, len(tensor) + 2)
                assert torch.equal(state.read(kind, name, start, stop), tensor[start:stop].float())


def test_the_library_reads_the_files(tmp_path):
    whole = tensors()
    write(tmp_path, whole, 1)
    read = load_file(tmp_path / file_name(0))
    assert len(read) == len(SHAPES) * len(KINDS)
    for key, tensor in read.items():
        kind, _, name = key.partition(":")
        assert torch.equal(tensor, whole[name][kind])


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no rank-\*\.safetensors in it"):
        State(tmp_path)
    write(tmp_path, tensors(), 3)
    (tmp_path / file_name(1)).rename(tmp_path / "kept")
    with pytest.raises(CheckpointError, match=r"has rank-00002.* but no rank-00001"):
        State(tmp_path)
    (tmp_path / "kept").rename(tmp_path / file_name(1))
    (tmp_path / file_name(2)).unlink()
    with pytest.raises(CheckpointError, match=r"ends at \d+ of \d+ elements; a rank's file is missing"):
        State(tmp_path)


def rank_file(folder: Path, rank: int, kept: dict[str, torch.Tensor], slices: Any, step: Any = "1") -> None:
    text = slices if isinstance(slices, str) else json.dumps(slices)
    save_file(kept, folder / file_name(rank), metadata={"slices": text, "optimizer_step": step})


@pytest.mark.parametrize(
    ("starts", "sizes", "says"),
    [
        ((0, 3), (4, 3), "rank-00001.safetensors: weight of 'w' begins at element 3, not 4"),
        ((0, 0), (6, 6), "begins at element 0, not 6"),
        ((0, 4), (3, 2), "begins at element 4, not 3"),
        ((1, 4), (3, 2), "rank-00000.safetensors: weight of 'w' begins at element 1, not 0"),
        ((0, 4), (4, 1), "ends at 5 of 6 elements"),
        ((0, 4), (4, 3), "ends at 7 of 6 elements"),
        ((0, 4), (0, 0), "ends at 0 of 6 elements"),
        ((-2, 2), (4, 4), "has start -2"),
    ],
)
def test_gaps_and_overlaps_are_refused(tmp_path, starts, sizes, says):
    for rank, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        rank_file(tmp_path, rank, {"weight:w": torch.zeros(size)}, {"w": [start, [2, 3]]})
    with pytest.raises(CheckpointError, match=says):
        State(tmp_path)


def test_each_kind_must_be_whole_and_the_weight_there(tmp_path):
    slices = {"w": [0, [2, 3]]}
    rank_file(tmp_path, 0, {"weight:w": torch.zeros(6), "exp_avg:w": torch.zeros(5)}, slices)
    with pytest.raises(CheckpointError, match="exp_avg of 'w' ends at 5 of 6"):
        State(tmp_path)
    for kept in ({"exp_avg:w": torch.zeros(6)}, {}):
        rank_file(tmp_path, 0, kept, slices)
        with pytest.raises(CheckpointError, match="weight of 'w' ends at 0 of 6"):
            State(tmp_path)


def test_ranks_that_differ_in_shape_are_refused(tmp_path):
    rank_file(tmp_path, 0, {"weight:w": torch.zeros(3)}, {"w": [0, [2, 3]]})
    rank_file(tmp_path, 1, {"weight:w": torch.zeros(3)}, {"w": [3, [3, 2]]})
    with pytest.raises(CheckpointError, match=r"rank-00001\.safetensors: 'w' has another shape"):
        State(tmp_path)


@pytest.mark.parametrize(
    "kept",
    [
        {"weight:w": torch.zeros(6, dtype=torch.int32)},
        {"weight:w": torch.zeros(6), "exp_avg:w": torch.zeros(6, dtype=torch.int64)},
        {"weight:w": torch.zeros(2, 3)},
        {"weight:w": torch.zeros(6), "weight:v": torch.zeros(6)},
        {"w": torch.zeros(6)},
    ],
)
def test_tensors_that_are_no_slices_are_refused(tmp_path, kept):
    rank_file(tmp_path, 0, kept, {"w": [0, [2, 3]]})
    with pytest.raises(CheckpointError, match="is not a floating-point slice of a parameter"):
        State(tmp_path)


@pytest.mark.parametrize(
    "slices",
    [
        '{"w": [Infinity, [2, 3]]}',
        '{"w": [NaN, [2, 3]]}',
        '{"w": [0.0, [2, 3]]}',
        '{"w": [false, [2, 3]]}',
        '{"w": ["0", [2, 3]]}',
        '{"w": [0, [-2, -3]]}',
        '{"w": [0, [Infinity]]}',
        '{"w": [0, [NaN]]}',
        '{"w": [0, [6.0]]}',
        '{"w": [0, [' + "9" * 400 + "]]}",
        '{"w": [' + "9" * 5000 + ", [6]]}",
        '{"w": [' + "9" * 400 + ", [6]]}",
        '{"w": [0, [' + ", ".join(["4611686018427387904"] * 300) + "]]}",
        '{"w": [0, [0, ' + "9" * 400 + "]]}",
        '{"w": [0, 6]}',
        '{"w": [0]}',
        '{"w": 3}',
        '{"w": null}',
        '{"v": [0, [6]]}',
        "{}",
        "[3]",
        "3",
        "",
        "[" * 200_000,
    ],
)
def test_hostile_slices_are_refused(tmp_path, slices):
    rank_file(tmp_path, 0, {"weight:w": torch.zeros(6)}, slices)
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors"):
        State(tmp_path)


@pytest.mark.parametrize("step", ["", "-1", "x", "Infinity", "9" * 5000])
def test_hostile_steps_are_refused(tmp_path, step):
    rank_file(tmp_path, 0, {"weight:w": torch.zeros(6)}, {"w": [0, [6]]}, step)
    with pytest.raises(CheckpointError, match="not a part of a checkpoint"):
        State(tmp_path)


@pytest.mark.parametrize("value", ["Infinity", "NaN", "null", "[3]", "{}"])
@pytest.mark.parametrize("key", ["slices", "optimizer_step"])
def test_metadata_that_is_no_text_is_refused(tmp_path, key, value):
    metadata = {"slices": json.dumps({"w": [0, [6]]}), "optimizer_step": "1", key: "HERE"}
    header = {"__metadata__": metadata, "weight:w": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]}}
    text = json.dumps(header).replace('"HERE"', value).encode()
    (tmp_path / file_name(0)).write_bytes(struct.pack("<Q", len(text)) + text + bytes(24))
    with pytest.raises(CheckpointError, match="not a part of a checkpoint"):
        State(tmp_path)


def test_flipped_headers_are_refused_or_read(tmp_path):
    write(tmp_path, tensors(), 2, seed=1)
    path = tmp_path / file_name(1)
    good = path.read_bytes()
    end = 8 + struct.unpack("<Q", good[:8])[0]
    draw = random.Random(0)
    outcomes = {"refused": 0, "read": 0}
    for _ in range(600):
        bad = bytearray(good)
        for _ in range(draw.choice([1, 1, 1, 3])):
            place = draw.randrange(end)
            bad[place] = draw.choice([bad[place] ^ 1 << draw.randrange(8), draw.choice(b'0123456789-eE.[]{}",:')])
        path.write_bytes(bad)
        try:
            state = State(tmp_path)
        except CheckpointError as e:
            outcomes["refused"] += 1
            assert str(tmp_path) in str(e)
            continue
        outcomes["read"] += 1
        for kind in state.kinds:
            for name, shape in state.shapes.items():
                if state.has(kind, name):
                    assert state.read(kind, name).shape == (shape.numel(),)
    assert min(outcomes.values()) > 5, outcomes

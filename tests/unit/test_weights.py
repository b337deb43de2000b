"""Safetensors by the slice and as a stream, against the safetensors library."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dstrain.errors import CheckpointError
from dstrain.models.weights import Weights, WeightsWriter, check_weights, read_header

TENSORS = {
    "a.weight": torch.randn(7, 5),
    "b.weight": torch.randn(3, 4, 2),
    "b.bias": torch.randn(11),
    "c": torch.randn(()),
}
SHAPES = {k: v.shape for k, v in TENSORS.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("max_bytes", [10**9, 100, 1])
def test_stream_out_is_what_the_library_reads(tmp_path, dtype, max_bytes):
    writer = WeightsWriter(tmp_path, SHAPES, dtype, max_bytes)
    for name, tensor in TENSORS.items():
        writer.write(name, tensor)
    writer.close()
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == {10**9: 1, 100: 3 if dtype == torch.float32 else 2, 1: 4}[max_bytes]
    read = {k: v for f in files for k, v in load_file(f).items()}
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[k], TENSORS[k].to(dtype)) for k in TENSORS)
    weights = Weights(tmp_path)
    weights.check(SHAPES)
    assert all(torch.equal(weights.read(k), TENSORS[k].to(dtype).flatten()) for k in TENSORS)
    if len(files) > 1:
        index = json.loads((tmp_path / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(TENSORS)


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_slices_of_all_ranks_make_the_tensor(tmp_path, world):
    save_file(TENSORS, tmp_path / "x.safetensors")
    weights = Weights(tmp_path)
    for name, tensor in TENSORS.items():
        size = -(-tensor.numel() // world)
        parts = [weights.read(name, r * size, (r + 1) * size) for r in range(world)]
        assert torch.equal(torch.cat(parts), tensor.flatten())


def test_order_and_shape_are_held(tmp_path):
    writer = WeightsWriter(tmp_path, SHAPES, torch.float32)
    with pytest.raises(AssertionError, match=r"a\.weight"):
        writer.write("b.bias", TENSORS["b.bias"])
    with pytest.raises(AssertionError, match="not written"):
        writer.close()


def test_each_tensor_has_its_dtype_and_the_files_their_name_and_metadata(tmp_path):
    dtypes = dict(zip(TENSORS, (torch.float32, torch.bfloat16, torch.float16, torch.float32)))
    writer = WeightsWriter(tmp_path, SHAPES, dtypes, 150, stem="x", metadata={"what": "a test"})
    for name, tensor in TENSORS.items():
        writer.write(name, tensor)
    writer.close()
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == ["x-00001-of-00002.safetensors", "x-00002-of-00002.safetensors"]
    index = json.loads((tmp_path / "x.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 35 * 4 + 24 * 2 + 11 * 2 + 4
    for name, tensor in TENSORS.items():
        file = tmp_path / index["weight_map"][name]
        with safe_open(file, "pt") as f:
            assert f.metadata() == {"format": "pt", "what": "a test"}
            assert torch.equal(f.get_tensor(name), tensor.to(dtypes[name]))
            assert f.get_tensor(name).dtype == dtypes[name]
        assert torch.equal(Weights(file).read(name), tensor.to(dtypes[name]).flatten())
        entries, metadata = read_header(file)
        assert entries[name].dtype == dtypes[name]
        assert metadata["what"] == "a test"


def test_file_that_is_cut_short_after_it_was_opened_is_named(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    weights = Weights(tmp_path)
    with (tmp_path / "x.safetensors").open("rb+") as f:
        f.truncate(weights.entries["a.weight"].end - 1)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: was cut short"):
        weights.read("a.weight")


def raw(header: object, size: int = 100) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cut short"),
        (b"1234", "cut short"),
        (struct.pack("<Q", 1 << 60) + b"{}", "cut short"),
        (raw(b"not json"), "damaged"),
        (raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}), "outside"),
        (raw({"a": {"dtype": "F32", "shape": [200], "data_offsets": [0, 800]}}), "outside"),
        (raw({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}), "outside"),
        (raw({"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}), "unreadable"),
        (raw({"a": {"dtype": "F32", "shape": [0, 10**400], "data_offsets": [0, 0]}}), "unreadable"),
        (raw({"a": {"dtype": "Q7", "shape": [2], "data_offsets": [0, 8]}}), "unreadable"),
        (raw({"a": {"shape": [2]}}), "unreadable"),
        (raw({"a": 3}), "unreadable"),
        (raw([{"a": 3}]), "damaged"),
        (raw({"__metadata__": 3}), "damaged"),
        (raw(b"[" * 200_000), "damaged"),
        (raw(b'{"a": ' + b"9" * 5000 + b"}"), "damaged"),
        (raw(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, Infinity]}}'), "unreadable"),
        (raw(b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [NaN, 8]}}'), "unreadable"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, says):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as e:
        Weights(tmp_path)
    assert "x.safetensors" in str(e.value)


def test_table_of_what_does_not_fit(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    wanted = {**SHAPES, "b.bias": torch.Size([12]), "d": torch.Size([1])}
    del wanted["c"]
    with pytest.raises(CheckpointError) as e:
        check_weights(wanted, tmp_path)
    text = str(e.value)
    assert "missing     d  [1]" in text
    assert "unexpected  c  []" in text
    assert "misshapen   b.bias  file [11], model [12]" in text
    assert "3 of 4 tensors" in text


def test_folder_errors(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        Weights(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        Weights(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    with pytest.raises(CheckpointError, match="also in"):
        Weights(tmp_path)
    (tmp_path / "m.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    with pytest.raises(CheckpointError, match="not a file of this folder"):
        Weights(tmp_path)
    (tmp_path / "m.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="not a safetensors index"):
        Weights(tmp_path)


@pytest.mark.parametrize(
    ("index", "says"),
    [
        ("[" * 200_000, "not a safetensors index"),
        ('{"weight_map": {"a": ' + "9" * 5000 + "}}", "not a safetensors index"),
        ('{"weight_map": {"a": 5, "b": "x.safetensors"}}', "not a safetensors index"),
        ('{"weight_map": {"a": ["x.safetensors"]}}', "not a safetensors index"),
        ('{"weight_map": {"a": 5}}', "names 5, which is not a file of this folder"),
        ('{"weight_map": {"a": null}}', "names None, which is not a file of this folder"),
        ('{"weight_map": {"a": ""}}', "not a file of this folder"),
        ('{"weight_map": {"a": ".."}}', "not a file of this folder"),
        ('{"weight_map": {"a": "folder"}}', "not a file of this folder"),
        ('{"weight_map": {"a": "' + "x" * 5000 + '"}}', "not a file of this folder"),
        ('{"weight_map": {"a": "x\\u0000"}}', "not a file of this folder"),
    ],
)
def test_index_that_names_no_files_is_refused(tmp_path, index, says):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    (tmp_path / "folder").mkdir()
    (tmp_path / "m.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=says) as e:
        Weights(tmp_path)
    assert "m.safetensors.index.json" in str(e.value)

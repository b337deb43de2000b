"""Weights in safetensors: read by the slice, written one tensor at a time.

The format (github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header with dtype, shape
and byte range of every tensor, then the bytes. Reading ranges ourselves lets a rank read only its own slices, without a
mapping of the file that would count as its memory; writing as a stream lets a model leave without ever being whole.
"""

import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from torch import Tensor, nn

from dstrain.errors import CheckpointError
from dstrain.storage import fsync_dir, write_json

STEM = "diffusion_pytorch_model"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100 << 20  # bytes; the format's own limit


class Output(Protocol):
    """Where bytes go: an open file, or one that counts them."""

    def write(self, data: Any, /) -> Any:
        """Append bytes."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: where its bytes begin and end, counted from the start of the file."""

    path: Path
    dtype: torch.dtype
    shape: torch.Size
    begin: int
    end: int

    def read(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of the flattened tensor, 1-D in the stored dtype; stop None = to the end."""
        stop = prod(self.shape) if stop is None else min(stop, prod(self.shape))
        if stop <= start:
            return torch.empty(0, dtype=self.dtype)
        size = self.dtype.itemsize
        raw = torch.empty((stop - start) * size, dtype=torch.uint8)
        rest = memoryview(raw.numpy().data)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.begin + start * size)
            while rest:  # one call reads 2 GiB at most
                if not (count := file.readinto(rest)):
                    raise CheckpointError(f"{self.path}: was cut short while it was read")
                rest = rest[count:]
        return raw.view(self.dtype)


class Weights:
    """The tensors of a component folder, or of one file; nothing but headers is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: dict[str, Entry] = {}
        for path in [folder] if folder.is_file() else _files(folder):
            for name, entry in read_header(path)[0].items():
                if name in self.entries:
                    raise CheckpointError(f"{path}: tensor {name!r} is also in {self.entries[name].path.name}")
                self.entries[name] = entry

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of the flattened tensor `name`, 1-D in the stored dtype."""
        return self.entries[name].read(start, stop)

    def check(self, shapes: Mapping[str, torch.Size]) -> None:
        """Raise CheckpointError with a table unless the tensors are exactly those of `shapes`."""
        rows = [f"  missing     {n}  {list(s)}" for n, s in shapes.items() if n not in self.entries]
        rows += [f"  unexpected  {n}  {list(e.shape)}" for n, e in self.entries.items() if n not in shapes]
        rows += [
            f"  misshapen   {n}  file {list(self.entries[n].shape)}, model {list(s)}"
            for n, s in shapes.items()
            if n in self.entries and self.entries[n].shape != s
        ]
        if rows:
            shown = "\n".join(rows[:20]) + (f"\n  ... and {len(rows) - 20} more" if len(rows) > 20 else "")
            raise CheckpointError(
                f"{self.folder}: {len(rows)} of {len(shapes)} tensors do not fit the model that its config.json"
                f" describes; is it another family or size, or an incomplete download?\n{shown}"
            )


def check_weights(shapes: Mapping[str, torch.Size], folder: Path) -> None:
    """Check a folder's tensors against `shapes` from the headers alone; CheckpointError with a table if they differ."""
    Weights(folder).check(shapes)


@torch.no_grad()
def load_full(module: nn.Module, folder: Path, dtype: torch.dtype | None) -> None:
    """Fill every parameter of `module` from `folder`, in `dtype` (None keeps the module's own)."""
    weights = Weights(folder)
    weights.check({name: p.shape for name, p in module.named_parameters()})
    for name, p in module.named_parameters():
        p.data = weights.read(name).view(p.shape).to(p.device, dtype or p.dtype)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise CheckpointError(f"{folder}: two index files, {indexes[0].name} and {indexes[1].name}; remove one")
    if not indexes:
        files = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
        if not files:
            raise CheckpointError(
                f"{folder}: no *.safetensors file; download the weights"
                " (a transformer can train from scratch: model.init: random)"
            )
        return files
    try:
        names = sorted(set(json.loads(indexes[0].read_text())["weight_map"].values()))
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{indexes[0]}: not a safetensors index ({e!r})") from e
    present = {path.name for path in folder.iterdir() if path.is_file()}
    for name in names:
        if name not in present:
            raise CheckpointError(f"{indexes[0]}: names {name!r}, which is not a file of this folder")
    return [folder / name for name in names]


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the tensors of a safetensors file and its metadata; CheckpointError if it is damaged or cut short."""
    size = path.stat().st_size
    with path.open("rb") as f:
        head = f.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 2 <= length <= min(MAX_HEADER, size - 8):
            raise CheckpointError(f"{path}: not a safetensors file, or cut short ({size} bytes)")
        try:
            header: dict[str, Any] = json.loads(f.read(length))
        except (ValueError, RecursionError) as e:
            raise CheckpointError(f"{path}: damaged safetensors header ({e})") from e
    if not isinstance(header, dict) or not isinstance(metadata := header.pop("__metadata__", {}), dict):
        raise CheckpointError(f"{path}: damaged safetensors header (no JSON object)")
    entries = {}
    for name, info in header.items():
        try:
            dtype, shape = DTYPES[info["dtype"]], torch.Size(info["shape"])
            begin, end = (8 + length + int(offset) for offset in info["data_offsets"])
        except (KeyError, TypeError, ValueError, OverflowError) as e:
            raise CheckpointError(f"{path}: tensor {name!r} has an unreadable entry ({e!r})") from e
        if min(shape, default=0) < 0 or max(shape, default=0) >= 1 << 63:  # torch.Size holds any
            raise CheckpointError(f"{path}: tensor {name!r} has an unreadable entry (shape {list(shape)!r:.80})")
        if not 8 + length <= begin <= end <= size or end - begin != prod(shape) * dtype.itemsize:
            raise CheckpointError(f"{path}: tensor {name!r} lies outside the file; it was cut short ({size} bytes)")
        entries[name] = Entry(path, dtype, shape, begin, end)
    return entries, metadata


def write_header(
    file: Output, metadata: Mapping[str, str], tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]]
) -> None:
    """Write what stands in front of the bytes of `tensors` (name, dtype, shape), which must follow in this order."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape in tensors:
        end = offset + prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors start aligned
    file.write(struct.pack("<Q", len(text)) + text)


def write_tensor(file: Output, tensor: Tensor, dtype: torch.dtype) -> None:
    """Write a tensor's bytes in `dtype`."""
    data = tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8)
    file.write(data.numpy().data)


class WeightsWriter:
    """Stream tensors of known names and shapes into sharded safetensors with an index, one at a time, in order.

    Args:
        folder: where the files go; must exist.
        shapes: every tensor that will be written, in the order in which it will be written.
        dtype: the stored dtype, of all tensors or by name.
        max_bytes: a file is closed when the next tensor would make it larger than this.
        stem: of the files' names.
        metadata: texts for the header of every file.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, torch.Size],
        dtype: torch.dtype | Mapping[str, torch.dtype],
        max_bytes: int = 5 * 10**9,
        *,
        stem: str = STEM,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self._stem = folder, stem
        self._metadata = {"format": "pt", **(metadata or {})}
        self._dtypes = dict.fromkeys(shapes, dtype) if isinstance(dtype, torch.dtype) else dict(dtype)
        self._bytes = {name: prod(shape) * self._dtypes[name].itemsize for name, shape in shapes.items()}
        files: list[dict[str, torch.Size]] = [{}]
        room = max_bytes
        for name, shape in shapes.items():
            if self._bytes[name] > room and files[-1]:
                files.append({})
                room = max_bytes
            files[-1][name] = shape
            room -= self._bytes[name]
        count = len(files)
        self._names = [
            f"{stem}.safetensors" if count == 1 else f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors"
            for i in range(count)
        ]
        self._todo = [(i, name, shape) for i, file in enumerate(files) for name, shape in file.items()]
        self._plan = files
        self._next = 0
        self._out: BinaryIO | None = None

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor; its name and shape must be the next of `shapes`."""
        file, expected, shape = self._todo[self._next]
        assert (name, tensor.shape) == (expected, shape), f"expected {expected} {shape}, got {name} {tensor.shape}"
        if self._next == 0 or self._todo[self._next - 1][0] != file:
            self._open(file)
        assert self._out is not None
        write_tensor(self._out, tensor, self._dtypes[name])
        self._next += 1

    def close(self) -> None:
        """Finish the last file and write the index; every tensor must have been written."""
        assert self._next == len(self._todo), f"{len(self._todo) - self._next} tensors were not written"
        self._finish()
        if len(self._plan) > 1:
            index = {
                "metadata": {"total_size": sum(self._bytes.values())},
                "weight_map": {n: self._names[i] for i, file in enumerate(self._plan) for n in file},
            }
            write_json(self.folder / f"{self._stem}.safetensors.index.json", index)
        fsync_dir(self.folder)

    def _open(self, file: int) -> None:
        self._finish()
        self._out = (self.folder / self._names[file]).open("wb")
        tensors = ((name, self._dtypes[name], shape) for name, shape in self._plan[file].items())
        write_header(self._out, self._metadata, tensors)

    def _finish(self) -> None:
        if self._out is not None:
            self._out.flush()
            os.fsync(self._out.fileno())
            self._out.close()
            self._out = None

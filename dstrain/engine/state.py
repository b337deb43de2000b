"""What a checkpoint holds of the trained parameters: fp32 weights, optimizer moments and averages, in slices.

Each rank writes `rank-RRRRR.safetensors` with the elements that it keeps anyway, so nothing is gathered. A tensor
"KIND:PARAMETER" is 1-D; the file's metadata says under "slices" where it begins in the flattened parameter and which
shape that has. Together the ranks' slices cover every parameter once, so a checkpoint of any world size and ZeRO stage
can be read by any other, whole or by range. There is no pickle in it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from dstrain.errors import CheckpointError
from dstrain.models.weights import Entry, read_header, write_header, write_tensor
from dstrain.storage import HashedFile

PATTERN = "rank-*.safetensors"


@dataclass(frozen=True)
class Piece:
    """Elements [start, start + size) of a flattened parameter, and what is kept of them: dtypes by kind."""

    name: str
    shape: torch.Size
    start: int
    size: int
    kinds: Mapping[str, torch.dtype]


def file_name(rank: int) -> str:
    """Return the name of a rank's file."""
    return f"rank-{rank:05d}.safetensors"


def write_state(
    path: Path, pieces: Sequence[Piece], data: Iterable[Mapping[str, Tensor]], optimizer_step: int
) -> tuple[int, str]:
    """Write a rank's pieces and return the file's size and SHA-256; `data` yields the tensors of each piece in turn.

    They are 1-D on any device; one piece is in memory at a time. Raises OSError if the disk is full, CheckpointError if
    a number is not finite.
    """
    metadata = {
        "format": "pt",
        "optimizer_step": str(optimizer_step),
        "slices": json.dumps({p.name: [p.start, list(p.shape)] for p in pieces}),
    }
    with HashedFile(path) as file:
        write_header(
            file, metadata, [(f"{kind}:{p.name}", dtype, [p.size]) for p in pieces for kind, dtype in p.kinds.items()]
        )
        for piece, tensors in zip(pieces, data, strict=True):
            for kind, dtype in piece.kinds.items():
                assert tensors[kind].shape == (piece.size,) and tensors[kind].dtype == dtype
                if piece.size and not torch.stack(torch.aminmax(tensors[kind])).isfinite().all():
                    raise CheckpointError(f"{kind} of {piece.name!r} is not finite")
                write_tensor(file, tensors[kind], dtype)
    return file.entry


class State:
    """The state in a checkpoint folder, read by the slice; nothing but headers is read before it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all ranks' files.

        Raises:
            CheckpointError: there are none, one is missing or unreadable, or the slices of a parameter leave a gap,
                overlap, or have no weight.
        """
        self.folder = folder
        self.shapes: dict[str, torch.Size] = {}
        self.optimizer_step = 0
        self._slices: dict[tuple[str, str], list[tuple[int, Entry]]] = {}  # of (kind, parameter): start and place
        files = sorted(folder.glob(PATTERN))
        if not files:
            raise CheckpointError(f"{folder}: no {PATTERN} in it; it is not a checkpoint of this version")
        for rank, path in enumerate(files):
            if path.name != file_name(rank):
                raise CheckpointError(f"{folder}: has {path.name} but no {file_name(rank)}; use another checkpoint")
            self._add(path)
        for name in self.shapes:
            self._slices.setdefault(("weight", name), [])
        for (kind, name), slices in self._slices.items():
            slices.sort(key=lambda item: item[0])
            end = 0
            for start, entry in slices:
                if start != end:
                    raise CheckpointError(f"{entry.path}: {kind} of {name!r} begins at element {start}, not {end}")
                end += entry.shape[0]
            if end != prod(self.shapes[name]):
                raise CheckpointError(
                    f"{folder}: {kind} of {name!r} ends at {end} of {prod(self.shapes[name])} elements;"
                    " a rank's file is missing or damaged, use another checkpoint"
                )

    @property
    def kinds(self) -> set[str]:
        """What is kept: "weight", and e.g. "exp_avg", "exp_avg_sq", "ema"."""
        return {kind for kind, _ in self._slices}

    def has(self, kind: str, name: str) -> bool:
        """Whether `kind` is kept of parameter `name`."""
        return (kind, name) in self._slices

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Return elements [start, stop) of the flattened parameter `name`, 1-D in fp32; stop None = to the end.

        CheckpointError if one of them is not finite: none was written so.
        """
        stop = prod(self.shapes[name]) if stop is None else min(stop, prod(self.shapes[name]))
        values = torch.empty(max(0, stop - start), dtype=torch.float32)
        for begin, entry in self._slices[kind, name]:
            low, high = max(start, begin), min(stop, begin + entry.shape[0])
            if low < high:
                found = entry.read(low - begin, high - begin).float()
                if not torch.stack(torch.aminmax(found)).isfinite().all():
                    raise CheckpointError(f"{entry.path}: {kind} of {name!r} is not finite; use another checkpoint")
                values[low - start : high - start] = found
        return values

    def _add(self, path: Path) -> None:
        entries, metadata = read_header(path)
        try:
            self.optimizer_step = int(metadata["optimizer_step"])
            slices = {name: (start, torch.Size(s)) for name, (start, s) in json.loads(metadata["slices"]).items()}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as e:
            raise CheckpointError(f"{path}: not a part of a checkpoint ({e!r})") from e
        if self.optimizer_step < 0:
            raise CheckpointError(f"{path}: not a part of a checkpoint (optimizer_step {self.optimizer_step})")
        for name, (start, shape) in slices.items():
            sizes = (start, prod(shape), *shape)
            if type(start) is not int or min(sizes) < 0 or max(sizes) >= 1 << 63:
                raise CheckpointError(
                    f"{path}: the slice of {name!r} has start {start!r:.40} and shape {list(shape)!r:.80}"
                )
            if self.shapes.setdefault(name, shape) != shape:
                raise CheckpointError(f"{path}: {name!r} has another shape here than in the other ranks' files")
        for key, entry in entries.items():
            kind, _, name = key.partition(":")
            if name not in slices or len(entry.shape) != 1 or not entry.dtype.is_floating_point:
                raise CheckpointError(f"{path}: {key!r} is not a floating-point slice of a parameter")
            found = self._slices.setdefault((kind, name), [])
            if entry.shape[0]:  # an empty one may begin where another does
                found.append((slices[name][0], entry))

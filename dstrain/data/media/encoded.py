"""Encoded samples: what a model's encoders made of a picture and its caption, tensors in a safetensors file.

The format (github.com/huggingface/safetensors): 8 bytes little-endian length of the header; a JSON header with dtype,
shape and bytes of each tensor, and strings under "__metadata__"; the tensors, without holes. The strings are width and
height (pixels of what was encoded) and frames as decimal numbers, and stamp: in words, what encoded it.
"""

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from dstrain.data.media.probe import MAX_IMAGE_PIXELS, MAX_IMAGE_SIDE
from dstrain.data.media.resolution import MULTIPLE
from dstrain.data.reasons import BadSample, Reason

MAX_ENCODED_BYTES = 1 << 28  # a picture of 4 Mpixel and 1,024 tokens of text take about 19 MB
_MAX_HEADER = 1 << 16
_MAX_FRAMES = 100_000
_MAX_STAMP = 1000
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class EncodedHeader:
    """What the header says: sizes in pixels, who encoded it, and where each tensor lies."""

    width: int
    height: int
    frames: int
    stamp: str
    tensors: dict[str, tuple[torch.dtype, list[int], int, int]]  # dtype, shape, first and last + 1 byte of the file


def write_encoded(tensors: Mapping[str, Tensor], *, width: int, height: int, frames: int, stamp: str) -> bytes:
    """Return the file with `tensors` (fp32, bf16 or fp16); the same values give the same bytes."""
    metadata = {"width": str(width), "height": str(height), "frames": str(frames), "stamp": stamp}
    header: dict[str, Any] = {"__metadata__": metadata}
    pieces, end = [], 0
    for name in sorted(tensors, key=lambda name: (-tensors[name].itemsize, name)):  # so that each is aligned
        tensor = tensors[name].detach().to("cpu").contiguous()
        pieces.append(tensor.view(-1).view(torch.uint8).numpy().tobytes())
        begin, end = end, end + len(pieces[-1])
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *pieces])


def check_encoded_bytes(size: int) -> None:
    """Raise BadSample if a file of `size` bytes is too large to be read."""
    if size > MAX_ENCODED_BYTES:
        raise BadSample(Reason.ENCODED_SIZE, f"{size} bytes, more than {MAX_ENCODED_BYTES}")


def probe_encoded(data: bytes) -> EncodedHeader:
    """Read the header; raises BadSample unless it is one that `write_encoded` could have written."""
    check_encoded_bytes(len(data))
    length = struct.unpack_from("<Q", data)[0] if len(data) >= 8 else 0
    if not 2 <= length <= min(_MAX_HEADER, len(data) - 8):
        raise _damaged("not a safetensors file, or cut off")
    try:
        header = json.loads(data[8 : 8 + length])
        strings = header.pop("__metadata__")
        width, height, frames = (_number(strings[key]) for key in ("width", "height", "frames"))
        stamp = strings["stamp"]
        tensors = {name: _tensor(name, entry, 8 + length) for name, entry in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(f"its header cannot be ({type(error).__name__}: {error!s:.100})") from error
    if width % MULTIPLE or height % MULTIPLE or max(width, height) > MAX_IMAGE_SIDE or frames > _MAX_FRAMES:
        raise _damaged(f"of {width} x {height} pixels and {frames} frames, which nothing is encoded at")
    if width * height > MAX_IMAGE_PIXELS:
        raise BadSample(Reason.ENCODED_SIZE, f"{width} x {height} pixels, more than {MAX_IMAGE_PIXELS}")
    if not isinstance(stamp, str) or len(stamp) > _MAX_STAMP or not stamp.isprintable():
        raise _damaged("what encoded it is not told")
    place = 8 + length
    for _, _, begin, end in sorted(tensors.values(), key=lambda tensor: tensor[2:]):
        if begin != place:
            raise _damaged("its tensors do not lie end to end")
        place = end
    if place != len(data):
        raise _damaged(f"its tensors end at byte {place} of {len(data)}")
    return EncodedHeader(width, height, frames, stamp, tensors)


def decode_encoded(data: bytes) -> tuple[EncodedHeader, dict[str, Tensor]]:
    """Return the header and the tensors by name, copies; raises BadSample if damaged, or if a value is not finite."""
    header, view = probe_encoded(data), memoryview(data)
    tensors = {}
    for name, (dtype, shape, begin, end) in header.tensors.items():
        tensors[name] = torch.frombuffer(bytearray(view[begin:end]), dtype=dtype).view(shape)
        if not torch.isfinite(tensors[name]).all():
            raise _damaged(f"{name} holds values that are not finite")
    return header, tensors


def _tensor(name: str, entry: dict[str, Any], start: int) -> tuple[torch.dtype, list[int], int, int]:
    dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    if not name.isidentifier() or not 1 <= len(shape) <= 8:
        raise ValueError(f"tensor {name!r:.40} of shape {shape!r:.40}")
    if not all(type(n) is int and 0 <= n <= MAX_ENCODED_BYTES for n in (*shape, begin, end)) or 0 in shape:
        raise ValueError(f"{name} has numbers that cannot be")
    if end - begin != prod(shape) * dtype.itemsize:
        raise ValueError(f"{name} has {end - begin} bytes for shape {shape}")
    return dtype, shape, start + begin, start + end


def _number(text: Any) -> int:
    if not isinstance(text, str) or not text.isascii() or not text.isdigit() or len(text) > 9 or not int(text):
        raise ValueError(f"{text!r:.40} where a size should be")
    return int(text)


def _damaged(what: str) -> BadSample:
    return BadSample(Reason.ENCODED_DAMAGED, what)

"""What tells one encoder from another: its config and a little of each of its tensors, without loading it."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from dstrain.models.weights import Weights
from dstrain.pipelines.components import read_json

_ELEMENTS = 16  # of each tensor; a training changes all of them
_DIGITS = 12
_OF_TOKENIZER = (".json", ".txt", ".jinja", ".model")
_PASSING = ("transformers_version", "dtype", "torch_dtype")  # keys of a config that do not tell what a model computes


def of_encoder(folder: Path, unused: Sequence[str] = ()) -> str:
    """Return hex digits for config.json and the weights of `folder`, but for tensors that begin with one of `unused`.

    Raises CheckpointError if the folder cannot be read.
    """
    config = read_json(folder / "config.json")
    kept = {key: value for key, value in config.items() if key not in _PASSING and not key.startswith("_")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    weights = Weights(folder)
    for name in sorted(name for name in weights.entries if not name.startswith(tuple(unused))):
        entry = weights.entries[name]
        digest.update(f"{name} {entry.dtype} {list(entry.shape)} ".encode())
        digest.update(weights.read(name, 0, _ELEMENTS).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:_DIGITS]


def of_files(folder: Path) -> str:
    """Return hex digits for the names and bytes of a tokenizer's files in `folder`, its chat template among them."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _OF_TOKENIZER):
        digest.update(f"{path.name} {path.stat().st_size} ".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:_DIGITS]

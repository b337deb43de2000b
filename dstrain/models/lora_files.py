"""LoRA files of diffusers, PEFT and ComfyUI: read, written, and turned into each other, one tensor at a time.

All hold, for a layer X with weight [out, in], A [rank, in] and B [out, rank]; DoRA adds the length of each row [out].
They differ in keys, and in where the strength stands, by which B A is multiplied:

| form      | keys                                                          | strength                                |
|-----------|---------------------------------------------------------------|-----------------------------------------|
| diffusers | transformer.X.lora_A.weight, .lora_B.weight                   | PEFT's settings in the file's metadata  |
| peft      | base_model.model.X.lora_A.weight, .lora_B.weight              | adapter_config.json beside the file     |
| comfyui   | diffusion_model.X.lora_A.weight, .lora_B.weight, .alpha       | alpha / rank, alpha a tensor a layer    |

DoRA's tensor is X.lora_magnitude_vector [out], for ComfyUI X.dora_scale [out, 1]. Other spellings are read too:
lora_down and lora_up for A and B, ".default" in front of ".weight", no prefix, and kohya's lora_unet_X with underscores
for the dots of X. Sources: diffusers' `save_lora_adapter`, PEFT's `save_pretrained`, ComfyUI's comfy/lora.py and
comfy/weight_adapter/lora.py, whose norms of DoRA are those of LyCORIS.
"""

import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dstrain.config import LoraConfig
from dstrain.errors import CheckpointError, did_you_mean
from dstrain.models.lora import MAGNITUDE, A, B
from dstrain.models.weights import Entry, WeightsWriter, read_header
from dstrain.storage import write_json

FILES = {
    "diffusers": "pytorch_lora_weights.safetensors",
    "peft": "adapter_model.safetensors",
    "comfyui": "comfyui_lora.safetensors",
}
PREFIXES = {"diffusers": "transformer.", "peft": "base_model.model.", "comfyui": "diffusion_model."}
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")  # underscores follow instead of dots
PEFT_CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"  # diffusers' key in the header
ALPHA = ".alpha"
SUFFIXES = {
    A: re.compile(r"\.(lora_A|lora_down|lora\.down)(\.default)?\.weight$"),
    B: re.compile(r"\.(lora_B|lora_up|lora\.up)(\.default)?\.weight$"),
    MAGNITUDE: re.compile(r"\.(dora_scale|lora_magnitude_vector(\.default)?(\.weight)?)$"),
    ALPHA: re.compile(r"\.alpha$"),
}

T = TypeVar("T")


@dataclass(frozen=True)
class Lora:
    """Adapters under plain names (`X.lora_A.weight`, ...), read when asked for."""

    settings: LoraConfig  # rank, alpha, rslora and dora count
    shapes: Mapping[str, torch.Size]
    dtypes: Mapping[str, torch.dtype]  # as stored
    read: Callable[[str], Tensor]  # a whole tensor, in its shape


def scale(settings: LoraConfig) -> float:
    """Return the factor of B A: alpha / rank, or alpha / sqrt(rank) with rsLoRA (arXiv 2312.03732)."""
    return (settings.alpha or settings.rank) / (math.sqrt(settings.rank) if settings.rslora else settings.rank)


def write_lora(folder: Path, form: str, lora: Lora, dtype: torch.dtype | None = None) -> None:
    """Write the file of `form` ("diffusers", "peft" or "comfyui") into `folder`, which must exist.

    Args:
        folder: receives FILES[form], and adapter_config.json for "peft".
        form: see the head of this module.
        lora: what is written.
        dtype: of the adapters; None leaves them as stored.
    """
    prefix = PREFIXES[form]
    sources: dict[str, str] = {}  # key to plain name
    for name in lora.shapes:
        if form == "comfyui" and name.endswith(A):
            sources[prefix + name.removesuffix(A) + ALPHA] = ALPHA
        sources[prefix + (name.replace(MAGNITUDE, ".dora_scale") if form == "comfyui" else name)] = name
    alpha = torch.tensor(scale(lora.settings) * lora.settings.rank)  # fp32, also where the strength is rsLoRA's
    # A flat dora_scale [out] would be taken for a row by ComfyUI's broadcast.
    column = (1,) if form == "comfyui" else ()
    shapes = {ALPHA: alpha.shape} | {
        name: torch.Size((*shape, *column)) if name.endswith(MAGNITUDE) else shape
        for name, shape in lora.shapes.items()
    }
    dtypes = {ALPHA: alpha.dtype} | {name: dtype or stored for name, stored in lora.dtypes.items()}
    config = _peft_config(lora)
    packed = json.dumps({prefix + key: value for key, value in config.items()}, indent=2, sort_keys=True)
    writer = WeightsWriter(
        folder,
        {key: shapes[name] for key, name in sources.items()},
        {key: dtypes[name] for key, name in sources.items()},
        1 << 62,  # one file, however large
        stem=FILES[form].removesuffix(".safetensors"),
        metadata={METADATA: packed} if form == "diffusers" else {},
    )
    for key, name in sources.items():
        writer.write(key, alpha if name == ALPHA else lora.read(name).view(shapes[name]))
    writer.close()
    if form == "peft":
        write_json(folder / PEFT_CONFIG, config)


def _peft_config(lora: Lora) -> dict[str, Any]:
    s = lora.settings
    alpha = s.alpha or float(s.rank)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": s.rank,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "use_rslora": s.rslora,
        "use_dora": s.dora,
        "bias": "none",
        "target_modules": [name.removesuffix(A) for name in lora.shapes if name.endswith(A)],
    }


def read_lora(path: Path, shapes: Mapping[str, torch.Size]) -> tuple[dict[str, Tensor], LoraConfig]:
    """Read a LoRA as `open_lora` does, whole: its tensors by plain name, and rank, alpha, rslora and dora."""
    lora = open_lora(path, shapes)
    return {name: lora.read(name) for name in lora.shapes}, lora.settings


def open_lora(path: Path, shapes: Mapping[str, torch.Size]) -> Lora:
    """Open the LoRA at `path`, a file of any of the forms or a folder with one, and check it against the model.

    One rank and one strength for all layers: files in which they differ are refused. A file that names no strength has
    strength 1, as diffusers and ComfyUI take it.

    Args:
        path: a safetensors file, or a folder as PEFT, diffusers or `write_lora` writes it.
        shapes: of the model's parameters.

    Raises:
        CheckpointError: the file is missing or damaged, holds something else than LoRA of Linear layers, or does not
            fit the model; names the key, and the nearest layer. `read` raises it for numbers that are not finite.
    """
    file = _find(path)
    entries, metadata = read_header(file)
    layers = {n.removesuffix(".weight"): s for n, s in shapes.items() if n.endswith(".weight") and len(s) == 2}
    flat = {layer.replace(".", "_"): layer for layer in layers}
    found: dict[str, Entry] = {}
    alphas: dict[str, float] = {}
    for key, entry in entries.items():
        layer, part = _parse(file, key, layers, flat)
        if part == ALPHA:
            alphas[layer] = _positive(file, key, entry.read().item() if entry.shape.numel() == 1 else entry.shape)
        elif not entry.dtype.is_floating_point:
            raise CheckpointError(f"{file}: {key!r} is stored in {entry.dtype}; only floating-point LoRAs are read")
        elif found.setdefault(layer + part, entry) is not entry:
            raise CheckpointError(f"{file}: {key!r} is the second tensor for {layer + part!r}")
    if not found:
        raise CheckpointError(f"{file}: no LoRA in it")
    rank, dora = _check_layers(file, found, layers)
    if alphas:
        by_layer = {layer: alphas.get(layer, float(rank)) for layer in _layers_of(found)}
        settings = LoraConfig(rank=rank, alpha=_common(file, "alphas", by_layer), dora=dora)
    else:
        settings = _settings(file, metadata, set(entries), rank, dora)
    plain = {n: torch.Size(e.shape[:1]) if n.endswith(MAGNITUDE) else e.shape for n, e in found.items()}
    return Lora(settings, plain, {n: e.dtype for n, e in found.items()}, lambda n: _finite(n, found[n]).view(plain[n]))


def _finite(name: str, entry: Entry) -> Tensor:
    values = entry.read()
    if not values.float().isfinite().all():  # torch has no isfinite of F8_E4M3
        raise CheckpointError(f"{entry.path}: {name!r} has numbers that are not finite in fp32; the LoRA is damaged")
    return values


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such file or folder; give a LoRA as .safetensors, or the folder with it")
    for name in FILES.values():
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        names = ", ".join(f.name for f in files[:5]) or "no *.safetensors"
        raise CheckpointError(f"{path}: which is the LoRA? There is {names}; name the file")
    return files[0]


def _parse(file: Path, key: str, layers: Mapping[str, Any], flat: Mapping[str, str]) -> tuple[str, str]:
    """Take a key apart into the layer and A, B, MAGNITUDE or ALPHA."""
    part, end = next(((p, m) for p, form in SUFFIXES.items() if (m := form.search(key))), (None, None))
    if part is None or end is None:
        raise CheckpointError(
            f"{file}: {key!r} is no tensor of a LoRA on Linear layers (lora_A and lora_B, or lora_down and lora_up,"
            " with alpha, and dora_scale or lora_magnitude_vector); other kinds of adapters are not read"
        )
    name = key[: end.start()]
    for prefix in FLAT_PREFIXES:
        if name.startswith(prefix):
            layer = flat.get(name.removeprefix(prefix), name.removeprefix(prefix))
            break
    else:
        layer = name
        for prefix in PREFIXES.values():
            layer = layer.removeprefix(prefix)
    if layer not in layers:
        raise CheckpointError(
            f"{file}: {key!r} is for {layer!r}, which is no Linear layer of this model{did_you_mean(layer, layers)};"
            " it is a LoRA of another"
        )
    return layer, part


def _layers_of(found: Mapping[str, Entry]) -> list[str]:
    return list(dict.fromkeys(name.removesuffix(A).removesuffix(B).removesuffix(MAGNITUDE) for name in found))


def _check_layers(file: Path, found: Mapping[str, Entry], layers: Mapping[str, torch.Size]) -> tuple[int, bool]:
    """Check that each layer has all its tensors, in shapes that fit; return the rank, and whether it is DoRA."""
    dora = any(name.endswith(MAGNITUDE) for name in found)
    ranks = {}
    for layer in _layers_of(found):
        out, wide = layers[layer]
        for part in (A, B, *([MAGNITUDE] * dora)):
            if layer + part not in found:
                raise CheckpointError(f"{file}: {layer!r} lacks its {part.split('.')[1]}; the file is incomplete")
        ranks[layer] = rank = next(iter(found[layer + A].shape), 0)
        fitting = {A: ([rank, wide],), B: ([out, rank],), MAGNITUDE: ([out], [out, 1])}
        for part, shapes in fitting.items():
            shape = list(found[layer + part].shape) if layer + part in found else shapes[0]
            if rank == 0 or shape not in shapes:
                raise CheckpointError(
                    f"{file}: {layer + part!r} has shape {shape}, and this model's layer is [{out}, {wide}];"
                    " it is a LoRA of another model or size"
                )
    return _common(file, "ranks", ranks), dora


def _common(file: Path, what: str, values: Mapping[str, T]) -> T:
    """Return the value that all layers have."""
    first: dict[T, str] = {}
    for layer, value in values.items():
        first.setdefault(value, layer)
    if len(first) > 1:
        shown = ", ".join(f"{value} in {layer}" for value, layer in list(first.items())[:3])
        raise CheckpointError(f"{file}: the layers have different {what} ({shown}); bring them to one first")
    return next(iter(first))


def _positive(file: Path, where: str, alpha: Any) -> float:
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not 0 < alpha <= sys.float_info.max:
        raise CheckpointError(f"{file}: {where!r} must be a positive number, not {alpha!r:.40}")
    return float(alpha)


def _settings(file: Path, metadata: Mapping[str, Any], keys: set[str], rank: int, dora: bool) -> LoraConfig:
    """The settings of a file without alphas: from its metadata, from the file beside it, or strength 1."""
    beside = file.parent / PEFT_CONFIG
    peft = all(key.startswith(PREFIXES["peft"]) for key in keys)
    if METADATA in metadata:
        where, text = f"{METADATA} of {file}", metadata[METADATA]
    elif beside.is_file() and (peft or file.name == FILES["peft"]):
        where, text = str(beside), beside.read_text(encoding="utf-8", errors="replace")
    elif peft:
        raise CheckpointError(f"{file}: {PEFT_CONFIG}, which says how strong this LoRA is, is not beside it")
    else:
        return LoraConfig(rank=rank, alpha=float(rank), dora=dora)
    try:
        config = json.loads(text)
        config = {key.removeprefix(PREFIXES["diffusers"]): value for key, value in config.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{where}: not the settings of a LoRA ({e})") from e
    if config.get("r") != rank or bool(config.get("use_dora")) != dora:
        raise CheckpointError(
            f"{where}: rank {config.get('r')!r}{' with DoRA' * bool(config.get('use_dora'))} does not fit the tensors,"
            f" which have rank {rank}{' with DoRA' * dora}"
        )
    alpha = _positive(file, "lora_alpha", config.get("lora_alpha"))
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or any(value != alpha for value in patterns.values()):
        raise CheckpointError(f"{where}: the layers have different alphas (alpha_pattern); bring them to one first")
    return LoraConfig(rank=rank, alpha=alpha, rslora=bool(config.get("use_rslora")), dora=dora)

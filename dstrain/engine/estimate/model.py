"""Which model an estimate is for: a name, a diffusers folder, a config.json or a hub id. No weights are read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from dstrain.errors import CheckpointError, ConfigError, did_you_mean
from dstrain.models.base import DiT
from dstrain.models.qwen_image import QwenImageDiT, QwenImageParams
from dstrain.models.weights import Weights
from dstrain.pipelines.components import HUB_ID, UNUSED_BY_TEXT, ModelSource, read_json, resolve

# Parameters of the published Qwen2.5-VL-7B, without what only sees pictures or writes text, and of the Qwen-Image VAE.
QWEN_IMAGE_ENCODERS = 7_070_619_136 + 126_892_531
CLASSES: Mapping[str, Callable[[Mapping[str, Any], str], DiT]] = {
    "QwenImageTransformer2DModel": lambda config, where: QwenImageDiT(QwenImageParams.from_config(config, where)),
}
NAMES: Mapping[str, tuple[str, int]] = {  # class and parameters of the encoders; the class's defaults are this model
    "qwen-image": ("QwenImageTransformer2DModel", QWEN_IMAGE_ENCODERS),
    "Qwen/Qwen-Image": ("QwenImageTransformer2DModel", QWEN_IMAGE_ENCODERS),
}


def read_model(name: str) -> tuple[DiT, int]:
    """Return the transformer that `name` describes, on the meta device, and how many parameters its encoders have.

    Of a config.json or a hub id, whose encoders are not looked at, the latter is 0.

    Raises:
        ConfigError: there is no such name, folder or file, or it describes a model of no known family.
        CheckpointError: the hub does not give it, or a file cannot be read.
    """
    if name in NAMES:
        kind, encoders = NAMES[name]
        return _build(kind, {}, name), encoders
    path = Path(name).expanduser()
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        return _read(folder / "config.json"), sum(_parameters(path / part) for part in ("vae", "text_encoder"))
    if path.is_file():
        return _read(path), 0
    if not HUB_ID.fullmatch(name) or path.suffix == ".json":
        raise ConfigError(
            f"{name}: no such model folder or config.json, and no known name{did_you_mean(name.lower(), NAMES)}"
            f" (known: {', '.join(NAMES)})"
        )
    try:
        return _read(resolve(ModelSource(name, "transformer/config.json")) / "config.json"), 0
    except CheckpointError as e:
        raise CheckpointError(f"{e}{did_you_mean(name, NAMES)}") from None


def _read(path: Path) -> DiT:
    config = read_json(path)
    return _build(config.get("_class_name", "QwenImageTransformer2DModel"), config, str(path))


def _build(kind: str, config: Mapping[str, Any], where: str) -> DiT:
    if kind not in CLASSES:
        known = ", ".join(CLASSES)
        raise ConfigError(
            f"{where}: _class_name is {kind!r:.80}, which no family reads{did_you_mean(kind, CLASSES)} (known: {known})"
        )
    with torch.device("meta"):
        return CLASSES[kind](config, where)


def _parameters(folder: Path) -> int:
    """Parameters in the files of a component, without what is never loaded; 0 if there are no files."""
    if not folder.is_dir() or not any(folder.glob("*.safetensors")):
        return 0
    entries = Weights(folder).entries.items()
    return sum(entry.shape.numel() for name, entry in entries if not name.startswith(UNUSED_BY_TEXT))

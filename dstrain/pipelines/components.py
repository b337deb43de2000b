"""Where a model's parts lie, on disk or on the Hugging Face hub, and how each kind is loaded: frozen, in eval mode."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import torch
from torch import nn

from dstrain.errors import CheckpointError
from dstrain.models.weights import check_weights, load_full

Loader = Callable[[Path, torch.dtype, torch.device], Any]
M = TypeVar("M", bound=nn.Module)

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
INDEX = "model_index.json"
UNUSED_BY_TEXT = ("visual.", "model.visual.", "lm_head.")  # of Qwen2.5-VL where it only embeds text


@dataclass(frozen=True)
class ModelSource:
    """A folder or a hub id, and which of its files to take.

    `pattern` names a sub-folder ("vae", "vae/") or files in one, as a glob ("vae/*.safetensors"); a name with a dot is
    a file unless a / ends it. It chooses what is fetched from the hub; what is loaded is the whole sub-folder, since
    weights need the config beside them.
    """

    path_or_id: str
    pattern: str = ""

    @classmethod
    def parse(cls, text: str) -> "ModelSource":
        """Read "folder" or "org/name", with or without ":pattern" behind it."""
        path_or_id, _, pattern = text.rpartition(":")
        if not path_or_id or Path(text).expanduser().exists():
            return cls(text)
        return cls(path_or_id, pattern.lstrip("/"))

    def within(self, name: str) -> "ModelSource":
        """Return the source of what lies at `name` in this one's sub-folder."""
        return ModelSource(self.path_or_id, f"{self.sub_folder}/{name}".lstrip("/"))

    @property
    def sub_folder(self) -> str:
        """The folder that the pattern names, or whose files it names; "" is the source itself."""
        path = PurePosixPath(self.pattern)
        folder = path.parent if self._names_files else path
        return "" if folder == PurePosixPath() else str(folder)

    @property
    def globs(self) -> list[str]:
        """The files to fetch: those of the pattern, and the configs and indexes beside them."""
        below = f"{self.sub_folder}/" if self.sub_folder else ""
        return [self.pattern, f"{below}*.json"] if self._names_files else [f"{below}*"]

    @property
    def _names_files(self) -> bool:
        name = PurePosixPath(self.pattern).name
        return not self.pattern.endswith("/") and ("*" in name or "." in name)

    def __str__(self) -> str:
        return f"{self.path_or_id}:{self.pattern}" if self.pattern else self.path_or_id


def resolve(source: ModelSource) -> Path:
    """Return the local folder that holds what `source` names, fetching it from the hub if it is no folder here.

    `HF_HUB_OFFLINE=1` confines the hub to what was fetched before. Raises CheckpointError if nothing is found, with the
    command that fetches it.
    """
    base = Path(source.path_or_id).expanduser()
    hint = "a model folder in diffusers layout is needed"
    if not base.is_dir():
        if not HUB_ID.fullmatch(source.path_or_id):
            raise CheckpointError(f"{source}: no such folder, and not a hub id either (org/name)")
        base = _fetch(source)
        hint = _how_to_fetch(source)
    if source.pattern and not any(base.glob(source.pattern.strip("/"))):
        raise CheckpointError(f"{base / source.pattern}: no such file; {hint}")
    return base / source.sub_folder


def _fetch(source: ModelSource) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.path_or_id, allow_patterns=source.globs))
    except (OSError, ValueError) as e:  # what the hub raises derives from these two
        raise CheckpointError(
            f"{source.path_or_id}: no such folder, and the hub did not give it ({_one_line(e)});"
            f" {_how_to_fetch(source)}"
        ) from e


def _how_to_fetch(source: ModelSource) -> str:
    includes = " ".join(f"--include '{glob}'" for glob in source.globs)
    return f"where there is network, run `hf download {source.path_or_id} {includes}`, or give a local folder"


def _one_line(e: Exception) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def component_folder(name: str, config: str, root: ModelSource | None, override: ModelSource | None) -> Path:
    """Return the local folder of component `name`, whose config file is called `config`.

    It is the sub-folder `name` of the pipeline at `root`, unless `override` says otherwise: its pattern's folder, or
    without pattern itself or its sub-folder `name`. Raises CheckpointError if there is no config file.
    """
    source = override or root
    if source is None:
        raise CheckpointError(f"no source for {name!r}: give a model folder, or name one for this component")
    is_component = override is not None and (
        override.pattern != "" or (Path(override.path_or_id).expanduser() / config).is_file()
    )
    folder = resolve(source if is_component else source.within(f"{name}/"))
    if not (folder / config).is_file():
        raise CheckpointError(f"{folder / config}: no such file; is {folder} a {name} in diffusers layout?")
    return folder


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or raise CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{path}: not a readable JSON file ({e})") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must hold a JSON object, not a {type(value).__name__}")
    return value


def load_module(build: Callable[[], M], folder: Path, dtype: torch.dtype, device: torch.device) -> M:
    """Build a module without its random weights, fill it from `folder` (exactly its tensors), and freeze it."""
    with torch.device("meta"):
        module = build()
    assert not list(module.buffers()), "a buffer would stay uninitialised"
    nn.Module.to(module, dtype)  # not the module's own `to`: diffusers warns there
    load_full(module.to_empty(device=device), folder, dtype)
    return freeze(module)


def freeze(module: M) -> M:
    """Put a module into eval mode, without gradients."""
    return module.requires_grad_(False).eval()


def load_qwen_image_vae(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load an `AutoencoderKLQwenImage` of diffusers; CheckpointError if it is another or incomplete."""
    from diffusers import AutoencoderKLQwenImage as VAE

    path = folder / "config.json"
    config = read_json(path)
    _check_class(path, config.get("_class_name"), VAE.__name__)
    try:
        vae = load_module(lambda: VAE.from_config(config), folder, dtype, device)
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: not a usable config ({_one_line(e)})") from e
    for key in ("latents_mean", "latents_std"):
        if len(vae.config[key]) != vae.config.z_dim:
            raise CheckpointError(f"{path}: {key} has {len(vae.config[key])} values for z_dim {vae.config.z_dim}")
    return vae


def check_qwen_image_vae(folder: Path) -> None:
    """Check the VAE's tensors against its config from the headers alone; CheckpointError with a table."""
    from diffusers import AutoencoderKLQwenImage

    config = read_json(folder / "config.json")
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage.from_config(config)
    check_weights({name: p.shape for name, p in vae.named_parameters()}, folder)


def load_qwen_text_encoder(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load the text model of a `Qwen2_5_VLForConditionalGeneration` of transformers; its vision tower and head stay.

    Raises CheckpointError if it is another or incomplete.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLTextModel
    from transformers.utils.logging import disable_progress_bar

    class TextModel(Qwen2_5_VLTextModel):
        _keys_to_ignore_on_load_unexpected = [f"^{re.escape(start)}" for start in UNUSED_BY_TEXT]  # noqa: RUF012

    disable_progress_bar()  # every rank would draw one
    path = folder / "config.json"
    found = next(iter(read_json(path).get("architectures") or [None]))
    _check_class(path, found, "Qwen2_5_VLForConditionalGeneration")
    load: Any = TextModel.from_pretrained
    options = {"local_files_only": True, "use_safetensors": True}
    newer = {r"^model\.language_model\.": "model."}  # names in newer files to those of the published ones
    try:
        config = Qwen2_5_VLConfig.from_pretrained(folder, local_files_only=True).text_config
        # Mismatched sizes are let through because the report tells their names, and the exception does not.
        model, report = load(
            folder,
            config=config,
            dtype=dtype,
            key_mapping=newer,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
    except (OSError, ValueError, TypeError, SafetensorError, StrictDataclassError) as e:
        raise CheckpointError(f"{folder}: not a loadable text encoder ({_one_line(e)})") from e
    for kind in ("missing", "mismatched"):
        if names := sorted(map(str, report[f"{kind}_keys"])):
            raise CheckpointError(f"{folder}: {len(names)} {kind} tensors in the text encoder: {', '.join(names[:5])}")
    return freeze(model).to(device)


def _check_class(path: Path, found: object, needed: str) -> None:
    if found != needed:
        raise CheckpointError(f"{path}: describes {found!r}, this family needs {needed!r}")


def load_tokenizer(folder: Path, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a tokenizer of transformers, without running code from the folder."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as e:
        raise CheckpointError(f"{folder}: not a loadable tokenizer ({_one_line(e)})") from e


def load_scheduler_config(folder: Path, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Load the scheduler's settings, which are all that the sampler needs of it."""
    return read_json(folder / "scheduler_config.json")

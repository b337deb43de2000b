"""What every family has: its models, the units that prepare a batch, and one velocity for training and sampling."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from dstrain.errors import CheckpointError, ConfigError, did_you_mean
from dstrain.models.base import DiT
from dstrain.models.packing import PackLayout, Shape
from dstrain.models.weights import Weights
from dstrain.pipelines import fingerprint
from dstrain.pipelines.components import (
    INDEX,
    Loader,
    ModelSource,
    component_folder,
    load_module,
    read_json,
    resolve,
)
from dstrain.pipelines.graph import UnitGraph
from dstrain.pipelines.offload import HostModule
from dstrain.pipelines.unit import Unit
from dstrain.registry import Registry

Gelu = Literal["tanh", "sigmoid"]
SIZES = ("width", "height")  # of what was encoded, in pixels: what a batch of encoded samples holds besides tensors
CONFIG_FILES = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}


@dataclass(frozen=True)
class Condition:
    """What the velocity of a pack depends on besides x_t and sigma."""

    prompt_embeds: Tensor  # [T, d]
    layout: PackLayout


@dataclass(frozen=True)
class Encoded(Condition):
    """A pack ready for the objective."""

    x0: Tensor  # [I, C] fp32, patchified latents


class Pipeline(ABC):
    """A family's models and what is done with them. Make one with `from_pretrained`.

    A component that was not loaded is an attribute that does not exist. `transformer` is passed to `velocity`, so that
    training can pass its engine.

    encoders: the components whose work can be stored. made: what they make, tensors by the names of units' outputs.
    graph: what is done with a training batch; with `encoded`, what is left to do where the batch holds `made` already.
    """

    class_name: ClassVar[str]  # `_class_name` of the model_index.json that this family reads
    loaders: ClassVar[Mapping[str, Loader]]  # the frozen components
    unused: ClassVar[Mapping[str, tuple[str, ...]]] = {}  # how names of tensors begin that are stored and not loaded
    given: ClassVar[tuple[str, ...]]  # what a training batch holds: columns of the shards, "prompt" and "draw"
    token_channels: ClassVar[int]  # C, values in one image token

    transformer: nn.Module
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: dict[str, Any]

    def __init__(
        self,
        device: torch.device,
        *,
        gelu: Gelu = "tanh",
        caption_dropout: float = 0.0,
        seed: int = 0,
        encoded: bool = False,
    ) -> None:
        self.device, self.gelu = device, gelu
        units = self.units(caption_dropout, seed)
        self.encoders = tuple(dict.fromkeys(name for unit in units for name in unit.models))
        self.made = tuple(name for unit in units if unit.models for name in unit.outputs)
        self.graph = UnitGraph(units, self.given)
        if encoded:
            self.graph = self.graph.after((*SIZES, *self.made))
        self.root: ModelSource | None = None
        self.index: Path | None = None  # the model_index.json that was read, if there is one
        self._overrides: dict[str, ModelSource] = {}
        self._offloaded: dict[str, HostModule] = {}

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | ModelSource | None,
        *,
        components: Mapping[str, str | ModelSource] | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = "cpu",
        load: Sequence[str] | None = None,
        gelu: Gelu = "tanh",
        caption_dropout: float = 0.0,
        seed: int = 0,
        encoded: bool = False,
        offload: bool = False,
    ) -> Self:
        """Load a pipeline from a diffusers folder or a hub id.

        Args:
            source: the folder or hub id; None if `components` names every component of `load`.
            components: components that come from elsewhere, e.g. {"vae": "org/name:vae/*.safetensors"}.
            dtype: of all weights.
            device: of all weights, and where encoding and sampling run.
            load: the components to load; all by default. Leave "transformer" out where an engine loads it.
            gelu: "tanh" as in diffusers, "sigmoid" as in DiffSynth.
            caption_dropout: share of training samples that lose their prompt, for classifier-free guidance.
            seed: of the choice which.
            encoded: batches hold what the encoders make of a sample, instead of pictures.
            offload: keep the frozen components in host memory while they are not used, see `using`.

        Raises:
            CheckpointError: a folder, config or tensor is missing, damaged or of another family.
            ConfigError: `components` or `load` names what this family does not have.
        """
        pipeline = cls(torch.device(device), gelu=gelu, caption_dropout=caption_dropout, seed=seed, encoded=encoded)
        names = ("transformer", *cls.loaders)
        for name in (*(components or {}), *(load or ())):
            if name not in names:
                raise ConfigError(
                    f"no component {name!r} in {cls.class_name}{did_you_mean(name, names)} (it has {', '.join(names)})"
                )
        pipeline._overrides = {k: _source(v) for k, v in (components or {}).items()}
        if source is not None:
            pipeline.root = _source(source)
            pipeline._check_index(pipeline.root)
        for name in names if load is None else load:
            if name == "transformer":
                folder = pipeline.folder(name)
                part = load_module(pipeline.build_transformer, folder, dtype, pipeline.device)
            else:
                place = torch.device("cpu") if offload else pipeline.device
                part = cls.loaders[name](pipeline.folder(name), dtype, place)
                if offload and isinstance(part, nn.Module):
                    pipeline._offloaded[name] = HostModule(part, pipeline.device)
            setattr(pipeline, name, part)
        return pipeline

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """Return the columns of pictures and videos that a sample of the shards must have."""
        return tuple(name for name in cls.given if name not in ("prompt", "draw"))

    def folder(self, name: str) -> Path:
        """Return the local folder of a component, fetched if it is on the hub; CheckpointError if it has no config."""
        config = CONFIG_FILES.get(name, "config.json")
        return component_folder(name, config, self.root, self._overrides.get(name))

    def _check_index(self, root: ModelSource) -> None:
        path = resolve(root.within(INDEX)) / INDEX
        found = read_json(path).get("_class_name")
        if found != self.class_name:
            raise CheckpointError(f"{path}: _class_name is {found!r}, this family reads {self.class_name!r}")
        self.index = path

    def encode(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        """Run all units, without gradients, on a batch that holds the names of `given` with one entry a sample."""
        with torch.no_grad():
            return self.graph.run(self, batch, self.using)

    def batch(self, columns: Sequence[Mapping[str, Any]], prompts: list[str], draws: list[int]) -> dict[str, list[Any]]:
        """Make a batch of samples: the columns of each, its prompt, and its running number in the global order."""
        names = [name for name in self.graph.given if name not in ("prompt", "draw")]
        return {"prompt": prompts, "draw": draws, **{name: [c[name] for c in columns] for name in names}}

    @contextmanager
    def using(self, *names: str) -> Iterator[None]:
        """Have those of the components on the device meanwhile that are offloaded. Every use of a component is inside.

        Blocks may be nested: a component goes back to host memory at the end of the outermost that names it.
        """
        with ExitStack() as held:
            for name in names:
                if name in self._offloaded:
                    held.enter_context(self._offloaded[name].on_device())
            yield

    def encoder_bytes(self, dtype: torch.dtype) -> dict[str, int]:
        """Return what each encoder takes when loaded in `dtype`, by the headers of its weights; loads nothing."""
        return {
            name: dtype.itemsize * sum(e.shape.numel() for n, e in entries.items() if not n.startswith(skip))
            for name in self.encoders
            for entries, skip in [(Weights(self.folder(name)).entries, self.unused.get(name, ()))]
        }

    def stamp(self, dtype: torch.dtype) -> str:
        """Tell what encodes, in words: the family, its encoders and tokenizer by digests, and their dtype.

        Equal words mean equal tensors of equal samples.
        """
        parts = []
        for name in self.loaders:
            if name in self.encoders:
                parts.append(f"{name} {fingerprint.of_encoder(self.folder(name), self.unused.get(name, ()))}")
            elif name == "tokenizer":
                parts.append(f"{name} {fingerprint.of_files(self.folder(name))}")
        return f"{self.class_name} ({', '.join(parts)}) in {str(dtype).removeprefix('torch.')}"

    @abstractmethod
    def units(self, caption_dropout: float, seed: int) -> list[Unit]:
        """Return the units that turn a training batch into what `pack` takes, in running order."""

    @abstractmethod
    def build_transformer(self) -> DiT:
        """Build the transformer that `folder("transformer")` describes, with fresh weights, on the current device."""

    @abstractmethod
    def check_fit(self) -> None:
        """Raise CheckpointError unless the configs of transformer, text encoder and VAE go together."""

    @abstractmethod
    def encoded_fault(self, columns: Mapping[str, Any]) -> str:
        """Say what is wrong with an encoded sample: tensors by name, width and height in pixels; "" if nothing is."""

    @abstractmethod
    def pack(self, encoded: Mapping[str, list[Any]]) -> Encoded:
        """Lay the encoded samples of a batch end to end, on the pipeline's device."""

    @abstractmethod
    def condition(self, prompt_embeds: Sequence[Tensor], shapes: Sequence[Shape]) -> Condition:
        """Lay prompts [T_i, d] and pictures to come, of `shapes` in tokens, end to end, on the pipeline's device."""

    @abstractmethod
    def velocity(self, transformer: Callable[..., Tensor], x_t: Tensor, sigmas: Tensor, condition: Condition) -> Tensor:
        """Predict eps - x0 for x_t [I, C] at sigmas [N] fp32 -> [I, C] fp32. Training and sampling share it."""

    @abstractmethod
    def embed_prompts(self, prompts: list[str]) -> list[Tensor]:
        """Embed prompts, [T_i, d] each."""

    @abstractmethod
    def shape_of(self, height: int, width: int) -> Shape:
        """Return (frames, height, width) in tokens of a picture in pixels; ConfigError if it does not fit."""

    @abstractmethod
    def decode(self, latents: Tensor, shape: Shape) -> Tensor:
        """Paint the picture of clean latents [i, C] -> [3, H, W] fp32 in [0, 1]."""


def _source(value: str | Path | ModelSource) -> ModelSource:
    return value if isinstance(value, ModelSource) else ModelSource.parse(str(value))


PIPELINES: Registry[Pipeline] = Registry("model family")

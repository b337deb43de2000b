"""The recipe: one typed tree for a run, from YAML and dotted overrides. Imports nothing heavy, so `--help` is instant.

The ds_config owns precision, ZeRO stage, offload and clipping; the recipe owns everything else. No fact is in both.
"""

import dataclasses
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from dstrain.errors import ConfigError, did_you_mean
from dstrain.knobs import build, flat, knob

Activations = Literal["none", "attention", "full", "offload"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how it starts."""

    path: str = knob(..., "diffusers folder or hub id, e.g. Qwen/Qwen-Image")
    family: str = knob("qwen_image", "model family")
    init: Literal["pretrained", "random"] = knob("pretrained", "start from the folder's weights, or from scratch")
    components: dict[str, str] = knob({}, "component from elsewhere, e.g. {vae: org/name:vae/*.safetensors}")
    gelu: Literal["tanh", "sigmoid"] = knob("tanh", "tanh as in diffusers, sigmoid as in DiffSynth")
    activations: list[Activations] = knob(
        ["full"],
        "what a block keeps for its backward: none = everything, attention = the attention's result, full = its inputs"
        " only, offload = these in host memory; a list is repeated over the blocks, e.g. [full, none]",
    )
    kernel: Literal["auto", "reference", "triton", "compile"] = knob(
        "auto",
        "what runs between the matmuls: auto = Triton on GPUs, plain PyTorch elsewhere; compile = torch.compile of"
        " it (but not in blocks whose activations are `attention`)",
    )
    encoders: Literal["resident", "offload"] = knob(
        "resident", "where VAE and text encoder stay between uses: on the device, or in host memory"
    )
    encoder_dtype: Literal["bf16", "fp32", "auto"] = knob("auto", "dtype of VAE and text encoder; auto as the DiT")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Shards that belong together, when there are several sources."""

    shards: list[str] = knob(..., "tar shards: files, folders, globs, ranges {000..012}, or URLs (s3, gs, hf, https)")
    repeat: float = knob(1.0, "how often an epoch holds each sample", low=1e-6, high=1e6)
    weight: float = knob(
        0.0, "share of all samples, relative to the other sources'; 0 = by size and repeat", low=0, high=1e12
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which samples, and how they are read."""

    shards: list[str] = knob([], "tar shards: files, folders, globs, ranges {000..012}, or URLs (s3, gs, hf, https)")
    sources: dict[str, SourceConfig] = knob(
        {},
        "instead of shards: several sources by name, each {shards: [...], repeat: 1.0} or {shards: [...], weight: 0.3}",
    )
    max_pixels: int = knob(
        1024 * 1024, "larger pictures are scaled down to this area, aspect kept", low=256, high=1 << 26
    )
    min_pixels: int = knob(
        256, "smaller pictures are left out, or enlarged to this area with upscale", low=256, high=1 << 26
    )
    width: int = knob(
        0, "with height: bring every picture to exactly this size; 0 = keep the aspect", low=0, high=1 << 13
    )
    height: int = knob(0, "see width", low=0, high=1 << 13)
    fit: Literal["scale", "crop"] = knob("scale", "resize the whole picture, or cut a window at full resolution")
    upscale: bool = knob(False, "enlarge pictures that are too small, instead of leaving them out")
    crop: Literal["centre", "random"] = knob("centre", "which part stays where a picture is cut")
    flip: float = knob(0.0, "share of the samples that are mirrored", low=0, high=1)
    background: str = knob("white", "colour under transparent pictures: white, black, grey or #rrggbb")
    caption: Literal["first", "random"] = knob("first", "of several captions in a JSON: the first, or any")
    shuffle_tags: bool = knob(False, "shuffle the tags of a caption")
    tag_separator: str = knob(",", "what stands between tags (shuffle_tags)")
    keep_tags: int = knob(0, "tags at the front that stay there (shuffle_tags)", low=0, high=1 << 31)
    caption_dropout: float = knob(0.1, "share of captions replaced by '' so that guidance works", low=0, high=1)
    frames: int = knob(1, "most frames of a video, 4 k + 1", low=1, high=100_001)
    fps: float = knob(0.0, "frames a second that a video is resampled to; 0 = as stored", low=0, high=1000)
    shuffle_window: int = knob(
        1 << 16, "samples shuffled among each other; their shards are read at one time", low=1, high=1 << 31
    )
    bad_samples: Literal["skip", "error"] = knob("skip", "what to do with a sample that cannot be used")
    max_bad_samples: int = knob(1000, "stop when the run has met more different ones than this", low=0, high=1 << 62)
    max_consecutive_bad: int = knob(32, "stop when more samples in a row than this are bad", low=0, high=1 << 62)
    workers: int = knob(2, "threads that read and decode ahead, per rank", low=0, high=256)
    cache_dir: str = knob("", "folder on the node for remote shards; empty = dstrain/shards in the user's cache folder")
    cache_gb: float = knob(100.0, "most that the shards in cache_dir take together", low=0.001, high=1e9)
    encoded_cache_mb: int = knob(512, "host memory per rank for encoded samples seen again; 0 = off", low=0)

    def __post_init__(self) -> None:
        if bool(self.shards) == bool(self.sources):
            raise ConfigError("give data.shards or data.sources: the tar shards to train on, in one of them")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How much goes into an optimizer step."""

    global_batch_size: int = knob(..., "samples in an optimizer step, over all ranks", low=1, high=1 << 30)
    tokens_per_pack: int = knob(
        8192, "most tokens (image + text, the text estimated) in one micro-batch of one rank", low=16, high=1 << 31
    )


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is learned. x_t = (1 - sigma) x0 + sigma eps, the model predicts eps - x0."""

    name: str = knob("flow_match", "objective")
    density: Literal["uniform_grid", "uniform", "logit_normal", "mode"] = knob(
        "uniform_grid", "density of sigma; uniform_grid = uniform over the shifted 1000-step grid"
    )
    shift: Literal["constant", "resolution"] = knob("constant", "mu fixed, or growing with the picture's tokens")
    mu: float = knob(0.8, "exponential shift of sigma (constant shift)", low=-10, high=10)
    terminal: float = knob(0.02, "the last sigma of the grid (uniform_grid)", low=1e-6, high=0.5)
    mean: float = knob(0.0, "of the logit (logit_normal)", low=-10, high=10)
    std: float = knob(1.0, "of the logit (logit_normal)", low=1e-3, high=10)
    mode_scale: float = knob(1.29, "scale of the mode density (mode)", low=-1, high=1.75)
    weighting: Literal["none", "bell"] = knob("bell", "weight of the loss over sigma; bell as in DiffSynth")
    kernel: Literal["auto", "reference", "triton", "compile"] = knob("auto", "fused Triton loss or plain PyTorch")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters instead of the weights themselves (Hu et al., arXiv 2106.09685), through PEFT."""

    rank: int = knob(0, "0 = train the weights themselves", low=0, high=1 << 12)
    alpha: float = knob(0.0, "scale is alpha / rank; 0 = rank", low=0, high=1e6)
    dropout: float = knob(0.0, "of the adapters' inputs", low=0, high=0.99)
    rslora: bool = knob(False, "scale alpha / sqrt(rank) (arXiv 2312.03732)")
    dora: bool = knob(False, "train the length of each output's weights besides (arXiv 2402.09353)")
    init: Literal["kaiming", "gaussian"] = knob("kaiming", "of the matrix A; B starts at zero")
    targets: list[str] = knob([], "patterns of layer names, e.g. attn.to_q or *.img_mlp.*; empty = the family's")
    base: Literal["bf16", "fp8", "int8", "nf4"] = knob(
        "bf16", "how the frozen weights under the adapters are kept; bf16 = as the ds_config says"
    )
    path: str = knob("", "start from this LoRA file (PEFT, diffusers or ComfyUI); empty = from nothing")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What moves the weights. With a ds_config that has its own `optimizer` or `scheduler`, leave these out."""

    name: Literal["adamw", "adamw_8bit", "muon"] = knob(
        "adamw", "adamw: DeepSpeed's CPU form with offload, PyTorch's fused form otherwise"
    )
    lr: float = knob(1e-5, "peak learning rate", low=0)
    betas: list[float] = knob([0.9, 0.999], "decay of the two moments")
    eps: float = knob(1e-8, "added to the root of the second moment", low=0)
    weight_decay: float = knob(0.01, "decoupled weight decay; not on norms and biases", low=0)
    momentum: float = knob(0.95, "of the matrices (muon)", low=0, high=0.9999)
    muon_lr: float = knob(0.02, "peak learning rate of the matrices (muon); lr is that of all others", low=0)
    warmup_steps: int = knob(0, "steps of linear warm-up", low=0)
    schedule: Literal["constant", "linear", "cosine", "wsd"] = knob(
        "cosine", "after the warm-up; wsd = constant, then linear over the last decay_steps"
    )
    decay_steps: int = knob(0, "steps of the decay at the end (wsd); 0 = a tenth of the run", low=0)
    min_lr_ratio: float = knob(0.0, "end of the decay, as a share of lr", low=0, high=1)


@dataclass(frozen=True, kw_only=True)
class EmaConfig:
    """An average of the weights over the steps, kept by each rank for its own share."""

    decay: float = knob(0.0, "of the average a step, e.g. 0.9999; 0 = no average", low=0, high=0.9999999)
    device: Literal["auto", "cpu"] = knob("auto", "where it is kept; auto = beside the fp32 weights")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Pictures painted during the training, into RUN_DIR/samples/step-N."""

    every: int = knob(0, "steps between; 0 = none", low=0)
    prompts: list[str] = knob([], "what to paint")
    height: int = knob(1024, "in pixels", low=16, high=1 << 13)
    width: int = knob(1024, "in pixels", low=16, high=1 << 13)
    steps: int = knob(30, "Euler steps", low=1, high=1000)
    cfg: float = knob(4.0, "strength of the guidance; 1 = none", low=1, high=100)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, and what is kept."""

    steps: int = knob(..., "optimizer steps of the whole run", low=1, high=1 << 31)
    parameters: list[str] = knob(
        ["*"], "patterns of the names that train, e.g. transformer_blocks.*; !pattern takes out again (not with lora)"
    )
    max_minutes: float = knob(
        0.0, "stop with a checkpoint within so many minutes, to go on another time; 0 = no limit", low=0
    )
    save_every: int = knob(500, "steps between checkpoints; the last step is always saved", low=1)
    save_minutes: float = knob(0.0, "save as well when the last save was so many minutes ago; 0 = by steps only", low=0)
    keep_checkpoints: int = knob(2, "newest checkpoints to keep", low=2)
    keep_every: int = knob(0, "keep the checkpoints of all multiples of so many steps besides; 0 = none", low=0)
    async_save: Literal["auto", "on", "off"] = knob(
        "auto", "write checkpoints beside the training, from a copy in host memory; auto = where the copy has room"
    )
    failed_saves: int = knob(2, "saves in a row that may fail; one more ends the run", low=0)
    export: bool = knob(True, "write diffusers safetensors at the end")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What is watched, and what happens then."""

    hang_minutes: float = knob(
        10.0, "without any progress on any rank; then the rank that is waited for is named and the run ends", low=0.05
    )
    nonfinite_steps: int = knob(
        3, "steps in a row that are left out because their loss or gradient is not finite; one more ends the run", low=0
    )
    spikes: Literal["off", "warn", "skip"] = knob(
        "warn", "loss far above what is usual at its noise levels: say so, or go back to a checkpoint and skip its data"
    )
    spike_deviations: float = knob(
        5.0, "how far above the median of the last 50 steps is a spike: in robust deviations of the log loss", low=3
    )
    skip_steps: int = knob(10, "batches left out after the one with the spike (spikes: skip)", low=0)


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where the figures go besides RUN_DIR/metrics.jsonl."""

    wandb: Literal["auto", "online", "offline", "off"] = knob("auto", "auto = online with a key, offline without")
    project: str = knob("dstrain", "W&B project")
    name: str = knob("", "W&B run name; empty = the run folder's")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A run."""

    run_dir: str = knob(..., "everything that the run writes goes here")
    seed: int = knob(0, "of noise, timesteps, order and random weights", low=0, high=(1 << 63) - 1)
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    train: TrainConfig
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    stated: typing.ClassVar[frozenset[str]] = frozenset()  # dotted keys that were written down; the rest are defaults

    def __post_init__(self) -> None:
        if self.lora.rank and self.train.parameters != ["*"]:
            raise ConfigError("train.parameters and lora.rank exclude each other: with LoRA only the adapters train")
        if not self.lora.rank and self.lora != LoraConfig():
            raise ConfigError(
                "lora has settings but lora.rank is 0; give the rank of the adapters, or remove the section"
            )
        if self.lora.dora and self.lora.base != "bf16":
            raise ConfigError(
                f"lora.dora needs the base weights as they are; it does not go with lora.base {self.lora.base}"
            )
        if len(self.optimizer.betas) != 2 or not all(0 <= b < 1 for b in self.optimizer.betas):
            raise ConfigError(f"optimizer.betas must be two numbers in [0, 1), not {self.optimizer.betas}")
        if self.optimizer.warmup_steps > self.train.steps:
            raise ConfigError(
                f"optimizer.warmup_steps {self.optimizer.warmup_steps} is beyond train.steps {self.train.steps}"
            )


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a YAML recipe and apply overrides like `train.steps=100`; ConfigError names file, key and value."""
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"{path}: a recipe is a YAML file, this is none")
        tree = yaml.load(path.read_text(), Loader=_UniqueKeys)  # noqa: S506, a SafeLoader
    except FileNotFoundError:
        near = did_you_mean(path.name, (p.name for p in path.parent.glob("*.y*ml"))) if path.parent.is_dir() else ""
        raise ConfigError(f"{path}: no such recipe{near}") from None
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as e:
        raise ConfigError(f"{path}: not a readable YAML recipe: {' '.join(str(e).split())}") from e
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: a recipe is a mapping of sections (model, data, batch, train, ...)")
    for override in overrides:
        _apply(tree, override)
    recipe = build(Recipe, tree, f"{path} with {' '.join(overrides)}" if overrides else str(path))
    object.__setattr__(recipe, "stated", frozenset(flat(tree)))
    return recipe


class _UniqueKeys(yaml.SafeLoader):
    """YAML that refuses a key that stands twice: the first of two `train:` sections would vanish in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """Return the recipe as plain values, defaults filled in."""
    return dataclasses.asdict(recipe)


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise ConfigError(f"override {override!r}: the value is not YAML; quote what has * & [ or {{ in it") from e
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        node = tree.setdefault(parent, {})
        if node is None:
            node = tree[parent] = {}
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {parent!r} is a value, not a section")
        tree = node
    tree[leaf] = value

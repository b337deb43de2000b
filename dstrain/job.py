"""A run that has been checked: what is refused is refused here, cheaply, before anything heavy is built."""

import hashlib
import json
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dstrain.config import DataConfig, Recipe, to_dict
from dstrain.continuation import compare, record
from dstrain.data.dataset import Dataset, Source, open_dataset
from dstrain.data.media.operators import Operators
from dstrain.data.media.resolution import Resolution, colour
from dstrain.data.plan import Plan
from dstrain.data.remote.cache import Cache
from dstrain.data.remote.urls import is_remote
from dstrain.data.sample import Expected, SampleReader, check_first
from dstrain.data.selection import Clip, Wanted
from dstrain.data.shards.names import ENCODED
from dstrain.engine import checkpoint
from dstrain.engine.distributed import has_fast_bf16
from dstrain.engine.ds_config import check_sections, complete, uses_bf16
from dstrain.engine.ds_optimizer import settle
from dstrain.engine.run_folder import check_writable
from dstrain.errors import ConfigError
from dstrain.kernels.backend import choose
from dstrain.models.base import DiT
from dstrain.models.init import initial_slice
from dstrain.models.lora import Fill, plain_name
from dstrain.models.lora_files import read_lora, scale
from dstrain.models.trained import choose_trained, start_values
from dstrain.models.weights import Weights
from dstrain.objectives import OBJECTIVES
from dstrain.pipelines import fingerprint
from dstrain.pipelines.base import PIPELINES, Pipeline
from dstrain.storage import user_cache

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """Everything that a run was checked with."""

    recipe: Recipe
    ds_config: dict[str, Any]  # completed
    world_size: int
    device: torch.device  # its kind; a rank's own is chosen when the ranks start
    dtype: torch.dtype  # of the trained weights
    dataset: Dataset
    plan: Plan
    expected: Expected | None  # of samples that come encoded; None where they are pictures
    pipeline: Pipeline  # without its components
    components: dict[str, Path]  # local folder of each
    adapters: dict[str, torch.Tensor]  # read from lora.path
    shapes: dict[str, torch.Size]  # of the transformer's parameters, as its family has them
    trained: dict[str, torch.Size]  # of what trains: some of these, or adapters

    @property
    def frozen(self) -> tuple[str, ...]:
        """The frozen components to load: no encoder where the samples come encoded, unless pictures are painted."""
        if self.expected is None or self.recipe.sample.every:
            return tuple(self.pipeline.loaders)
        return ("scheduler",)

    @property
    def encoder_dtype(self) -> torch.dtype:
        """The dtype of VAE and text encoder."""
        return encoder_dtype(self.recipe, self.dtype)

    def encoder_sizes(self) -> dict[str, int]:
        """Return the bytes of each encoder that is loaded; none where the samples come encoded."""
        sizes = self.pipeline.encoder_bytes(self.encoder_dtype)
        return {name: size for name, size in sizes.items() if name in self.frozen}

    def encoder_memory(self) -> tuple[int, int]:
        """Return the bytes of the encoders on a rank's device, at most, and in its host memory."""
        loaded = self.encoder_sizes().values()
        if self.recipe.model.encoders == "offload":
            return max(loaded, default=0), sum(loaded)
        return sum(loaded), 0

    def build_transformer(self) -> DiT:
        """Build the transformer as it is trained, on the current device, which should be meta."""
        return shape_transformer(self.pipeline, self.recipe)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be continued, besides keys of the recipe: digests, and a dtype."""
        folders, unused = self.components, self.pipeline.unused
        encoders = {n: fingerprint.of_encoder(folders[n], unused.get(n, ())) for n in self.pipeline.encoders}
        tokenizer = {n: fingerprint.of_files(folders[n]) for n in ("tokenizer",) if n in folders}
        return {
            "dtype": str(self.dtype),
            "data": self.dataset.digest,
            "trained": hashlib.sha256(json.dumps(self.trained).encode()).hexdigest(),
            **({} if self.trained.keys() == self.shapes.keys() else {"base": self._base_digest()}),
            **encoders,
            **tokenizer,
        }

    def _base_digest(self) -> str:
        """SHA-256 of what tells one base model from another without reading it whole: first numbers of each tensor."""
        if self.recipe.model.init == "random":
            return "random"
        entries = Weights(self.components["transformer"]).entries
        stamp = [[n, list(e.shape), e.read(0, 8).double().tolist()] for n, e in sorted(entries.items())]
        return hashlib.sha256(json.dumps(stamp).encode()).hexdigest()

    def check_continuation(self, accepted: Collection[str] = ()) -> list[str]:
        """Return what has changed since the newest checkpoint of run_dir, and may, one line each.

        accepted: keys of the recipe that may differ although they need consent.
        Raises CheckpointError if it belongs to a run that differs from this one.
        """
        path = checkpoint.newest(Path(self.recipe.run_dir) / "checkpoints")
        if path is None:
            return []
        manifest = checkpoint.read_manifest(path)
        changes = compare(manifest, record(self, self.world_size), accepted, path)
        step, steps = manifest["step"], self.recipe.train.steps
        what = "will continue from" if step < steps else "nothing is left to train after"
        log.info("%s %s, step %d of %d", what, path, step, steps)
        return changes

    def start_values(self) -> Fill:
        """Return what every parameter of `build_transformer` starts from; nothing is read before it is asked for."""
        recipe = self.recipe
        if recipe.model.init == "pretrained":
            weights = Weights(self.components["transformer"])

            def base(name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
                return weights.read(name, start, stop)
        else:
            with torch.device("meta"):
                model = self.pipeline.build_transformer()

            def base(name: str, shape: torch.Size, start: int, stop: int) -> torch.Tensor:
                return initial_slice(model, name, shape, recipe.seed, start, stop)

        return start_values(base, self.shapes, recipe.lora, recipe.seed, self.adapters)


def prepare(
    recipe: Recipe, ds_path: Path, ds_config: dict[str, Any], world_size: int, device: torch.device | None = None
) -> Job:
    """Check recipe, ds_config, output folder, shards and model folder against each other; cheapest checks first.

    device: what the ranks compute on; None is what this machine has.

    Raises ConfigError, DataError or CheckpointError with one sentence that names what is wrong and the way out.
    """
    family = PIPELINES.get(recipe.model.family)
    make_objective(recipe)
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for key, mode in (("objective.kernel", recipe.objective.kernel), ("model.kernel", recipe.model.kernel)):
        try:
            choose(mode, device)
        except ValueError as e:
            raise ConfigError(f"{key}: {e}") from None
    recipe = settle(recipe, ds_config, ds_path)
    bf16 = uses_bf16(ds_config, has_fast_bf16(device))
    check_writable(Path(recipe.run_dir))
    wanted = wanted_samples(recipe.data, family.columns())
    dataset = open_data(recipe.data, wanted)
    pipeline = load_pipeline(
        family,
        recipe,
        device=torch.device("cpu"),
        dtype=torch.float32,
        load=("tokenizer", "scheduler"),
        encoded=ENCODED in dataset.wanted.columns,
    )
    components = {name: pipeline.folder(name) for name in ("transformer", *pipeline.loaders)}
    pipeline.check_fit()
    dtype = torch.bfloat16 if bf16 else torch.float32
    expected = _expected(recipe, dataset, pipeline, dtype) if ENCODED in dataset.wanted.columns else None
    with torch.device("meta"):
        model = pipeline.build_transformer()
        trained_model = shape_transformer(pipeline, recipe)
    plan = Plan(
        dataset,
        seed=recipe.seed,
        global_batch_size=recipe.batch.global_batch_size,
        tokens_per_pack=recipe.batch.tokens_per_pack,
        world_size=world_size,
        attention_length=model.attention_length,
        window=recipe.data.shuffle_window,
    )
    shapes = {name: p.shape for name, p in model.named_parameters()}
    trained = {plain_name(name): p.shape for name, p in trained_model.named_parameters() if p.requires_grad}
    if recipe.model.init == "pretrained":
        Weights(components["transformer"]).check(shapes)
    adapters = read_adapters(recipe, shapes, trained)
    _check_sampling(recipe, pipeline)
    config = complete(
        ds_config,
        recipe,
        world_size=world_size,
        bf16=bf16,
        path=ds_path,
        block=block_size(trained_model),
        classes={f"{type(m).__module__}.{type(m).__qualname__}" for m in trained_model.modules()},
    )
    check_sections(ds_config, ds_path, gpu=device.type == "cuda")
    return Job(
        recipe,
        config,
        world_size,
        device,
        dtype,
        dataset,
        plan,
        expected,
        pipeline,
        components,
        adapters,
        shapes,
        trained,
    )


def shape_transformer(pipeline: Pipeline, recipe: Recipe) -> DiT:
    """Build the transformer with what the recipe asks of it, on the current device, which should be meta."""
    model = pipeline.build_transformer()
    model.activations = tuple(recipe.model.activations)
    model.kernel = recipe.model.kernel
    choose_trained(model, recipe.train.parameters, recipe.lora)
    return model


def count(shapes: Mapping[str, torch.Size]) -> int:
    """Return the elements of all tensors."""
    return sum(shape.numel() for shape in shapes.values())


def block_size(model: DiT) -> int:
    """Return the parameters of one block."""
    return max(sum(p.numel() for p in m.parameters()) for m in model.modules() if isinstance(m, model.block_class))


def read_adapters(
    recipe: Recipe, shapes: Mapping[str, torch.Size], trained: Mapping[str, torch.Size]
) -> dict[str, torch.Tensor]:
    """Read the adapters that the recipe starts from, plain names; ConfigError if they are not what it trains."""
    lora = recipe.lora
    if not lora.path:
        return {}
    tensors, found = read_lora(Path(lora.path).expanduser(), shapes)
    theirs = {"rank": found.rank, "dora": found.dora, "scale": round(scale(found), 6)}
    ours = {"rank": lora.rank, "dora": lora.dora, "scale": round(scale(lora), 6)}
    if theirs != ours:
        raise ConfigError(
            f"lora.path {lora.path} holds adapters with {theirs}, and lora.rank, dora, alpha and rslora say {ours};"
            " give lora the same"
        )
    if left_out := sorted({name.partition(".lora_")[0] for name in tensors.keys() - trained.keys()}):
        raise ConfigError(
            f"lora.path {lora.path} holds adapters on {len(left_out)} layers that lora.targets leaves out, such as"
            f" {left_out[0]}; add them to lora.targets"
        )
    log.info("%d of %d adapter tensors start from %s, the others from nothing", len(tensors), len(trained), lora.path)
    return tensors


def _check_sampling(recipe: Recipe, pipeline: Pipeline) -> None:
    wanted = recipe.sample
    if wanted.every and not wanted.prompts:
        raise ConfigError("sample.every is given without sample.prompts; name what is to be painted")
    if wanted.every:
        try:
            pipeline.shape_of(wanted.height, wanted.width)
        except ConfigError as e:
            raise ConfigError(f"sample.height, sample.width: {e}") from None


def _expected(recipe: Recipe, dataset: Dataset, pipeline: Pipeline, dtype: torch.dtype) -> Expected:
    """Return what encoded samples must be; DataError if the first of a source is of other encoders."""
    operators = make_operators(recipe.data)
    operators.check_fixed()
    expected = Expected(pipeline.stamp(encoder_dtype(recipe, dtype)), pipeline.encoded_fault)
    background = colour(recipe.data.background)
    read = SampleReader(dataset, operators=operators, seed=recipe.seed, background=background, expected=expected)
    check_first(dataset, read)
    return expected


def wanted_samples(data: DataConfig, columns: tuple[str, ...]) -> Wanted:
    """Return what a sample must have; ConfigError for sizes that do not go together."""
    try:
        colour(data.background)
        resolution = Resolution(data.max_pixels, data.min_pixels, data.width, data.height, data.fit, data.upscale)
        clip = Clip(data.frames, data.fps)
    except ConfigError as e:
        raise ConfigError(f"data.{e}") from None
    return Wanted(resolution, columns, clip=clip)


def make_operators(data: DataConfig) -> Operators:
    """Return the random choices that the recipe asks for."""
    return Operators(data.crop, data.flip, data.caption, data.shuffle_tags, data.keep_tags, data.tag_separator)


def open_data(data: DataConfig, wanted: Wanted) -> Dataset:
    """Open the shards of a recipe; remote ones through the cache of this node."""
    sources = {name: Source(s.shards, s.repeat, s.weight or None) for name, s in data.sources.items()}
    cache = None
    if any(is_remote(entry) for shards in (data.shards, *(s.shards for s in sources.values())) for entry in shards):
        folder = Path(data.cache_dir).expanduser() if data.cache_dir else user_cache() / "shards"
        cache = Cache(folder, int(data.cache_gb * 1e9))
    workers = os.cpu_count() or 1
    dataset = open_dataset(sources or data.shards, wanted, cache=cache, workers=workers, progress=True, encoded=True)
    if dataset.is_remote:
        size = sum(index.size for index in dataset.indexes)
        window = size * min(1.0, data.shuffle_window / len(dataset))  # on average
        if data.cache_gb * 1e9 < min(size, 2 * window):
            log.warning(
                "data.cache_gb = %g holds less than two windows' shards (about %.3g GB): they will be fetched again and"
                " again; raise it, or lower data.shuffle_window",
                data.cache_gb,
                2 * window / 1e9,
            )
    return dataset


def encoder_dtype(recipe: Recipe, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of VAE and text encoder; `dtype` is that of the trained weights."""
    return {"bf16": torch.bfloat16, "fp32": torch.float32, "auto": dtype}[recipe.model.encoder_dtype]


def make_objective(recipe: Recipe) -> Any:
    """Build the objective that the recipe names; ConfigError for settings that do not go together."""
    settings = to_dict(recipe)["objective"]
    return OBJECTIVES.get(settings.pop("name"))(seed=recipe.seed, **settings)


def load_pipeline(
    family: type[Pipeline],
    recipe: Recipe,
    *,
    device: torch.device,
    dtype: torch.dtype,
    load: tuple[str, ...],
    encoded: bool = False,
    offload: bool = False,
) -> Pipeline:
    """Load the components in `load` of the recipe's model; none checks the folder only."""
    return family.from_pretrained(
        recipe.model.path,
        components=recipe.model.components,
        dtype=dtype,
        device=device,
        load=load,
        gelu=recipe.model.gelu,
        caption_dropout=recipe.data.caption_dropout,
        seed=recipe.seed,
        encoded=encoded,
        offload=offload,
    )

"""What leaves a run: a checkpoint on disk as a diffusers model folder or as LoRA files, written one tensor at a time.

Offline: no process group, no GPU, and never more than one tensor in memory.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from dstrain.config import LoraConfig, ModelConfig
from dstrain.engine.checkpoint import damaged_file, read_manifest
from dstrain.engine.state import State
from dstrain.errors import CheckpointError, ConfigError
from dstrain.knobs import build
from dstrain.models.base import DiT
from dstrain.models.init import initial_slice
from dstrain.models.lora import MAGNITUDE, A, B
from dstrain.models.lora_files import FILES, Lora, scale, write_lora
from dstrain.models.weights import Weights, WeightsWriter
from dstrain.pipelines.base import Pipeline
from dstrain.storage import fsync_dir

log = logging.getLogger(__name__)
Read = Callable[[str], Tensor]  # from a parameter's name to its values, in its shape
FORMS = ("diffusers", "comfyui")  # of a LoRA, unless others are asked for
DTYPES = {str(dtype): dtype for dtype in (torch.bfloat16, torch.float32)}


@dataclass(frozen=True)
class Checkpoint:
    """The trained parameters of a checkpoint, by plain name."""

    path: Path
    model: ModelConfig  # what was trained
    seed: int
    lora: Lora | None  # for a run that trains adapters
    dtype: torch.dtype  # that the run computed with
    shapes: Mapping[str, torch.Size]
    read: Read  # fp32


@dataclass(frozen=True)
class Base:
    """The model that training started from; its weights are not looked at before `reader` is called."""

    pipeline: Pipeline  # without its components
    transformer: DiT  # on meta
    init: str  # as in the recipe
    seed: int

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Of the transformer's parameters."""
        return {name: p.shape for name, p in self.transformer.named_parameters()}

    def reader(self) -> Read:
        """Return what reads the parameters at the start of the training; CheckpointError if the files do not fit."""
        shapes = self.shapes
        if self.init == "random":
            return lambda name: initial_slice(
                self.transformer, name, shapes[name], self.seed, 0, shapes[name].numel()
            ).view(shapes[name])
        weights = Weights(self.pipeline.folder("transformer"))
        weights.check(shapes)
        return lambda name: weights.read(name).view(shapes[name])


def check_files(path: Path) -> None:
    """Read all files of a checkpoint; CheckpointError names one that is not as the manifest says."""
    if problem := damaged_file(path, read_manifest(path)["files"]):
        raise CheckpointError(f"{problem}; the checkpoint is damaged, take another")


def open_checkpoint(path: Path, *, ema: bool | None = None) -> Checkpoint:
    """Open a checkpoint folder; of the tensors, only the files' headers are read.

    Args:
        path: RUN_DIR/checkpoints/step-N.
        ema: take the averaged weights, or not; None takes them where there are any.

    Raises:
        CheckpointError: it is not a checkpoint, is damaged, or holds no averaged weights.
    """
    manifest = read_manifest(path)
    try:
        recipe = manifest["recipe"]
        model = build(ModelConfig, recipe["model"], str(path))
        config = build(LoraConfig, recipe["lora"], str(path))
        seed, dtype = int(recipe["seed"]), DTYPES[manifest["dtype"]]
        for name, (size, _) in manifest["files"].items():
            if not (path / name).is_file() or (path / name).stat().st_size != size:
                raise CheckpointError(f"{path / name} is missing or has not {size} bytes; the checkpoint is damaged")
    except (KeyError, TypeError, ValueError, ConfigError) as e:
        raise CheckpointError(f"{path}: its manifest has no readable recipe ({e!r}); it is of another version") from e
    state = State(path)
    kind = "ema" if ema or (ema is None and "ema" in state.kinds) else "weight"
    if not all(state.has(kind, name) for name in state.shapes):
        raise CheckpointError(f"{path}: no averaged weights in it; the run had ema.decay: 0")

    def read(name: str) -> Tensor:
        return state.read(kind, name).view(state.shapes[name])

    log.info("%s: the %s weights", path, "averaged" if kind == "ema" else "trained")
    lora = Lora(config, state.shapes, dict.fromkeys(state.shapes, torch.float32), read) if config.rank else None
    return Checkpoint(path, model, seed, lora, dtype, state.shapes, read)


def open_base(pipeline: Pipeline, init: str = "pretrained", seed: int = 0) -> Base:
    """Return the model of a pipeline whose components need not be loaded; `init` and `seed` as in the recipe."""
    with torch.device("meta"):
        return Base(pipeline, pipeline.build_transformer(), init, seed)


def export(
    checkpoint: Checkpoint,
    out: Path,
    base: Callable[[], Base],
    *,
    forms: Sequence[str] = FORMS,
    merge: bool = False,
    dtype: torch.dtype | None = None,
) -> None:
    """Write what was trained to `out`: LoRA files for adapters, a diffusers model folder otherwise.

    Args:
        checkpoint: see `open_checkpoint`.
        out: replaced when the new one is complete.
        base: gives the model that was trained; not called where only LoRA is written.
        forms: of the LoRA files.
        merge: write the whole model with the adapters merged into its weights.
        dtype: of what is written; None is the dtype that the run computed with.
    """
    dtype = dtype or checkpoint.dtype
    if checkpoint.lora is not None and not merge:
        write_loras(out, checkpoint.lora, forms, dtype)
        return
    model = base()
    read = merged(checkpoint.lora, model) if checkpoint.lora is not None else trained(checkpoint, model)
    write_model(out, model, read, dtype)


def trained(checkpoint: Checkpoint, base: Base) -> Read:
    """Return what reads the whole model: from the checkpoint what it holds, from the base what was not trained."""
    shapes = base.shapes
    for name, shape in checkpoint.shapes.items():
        if shapes.get(name) != shape:
            here = f"has shape {list(shapes[name])}" if name in shapes else "is not"
            raise CheckpointError(
                f"{checkpoint.path}: {name!r} has shape {list(shape)} and {here} in"
                f" {base.pipeline.folder('transformer')}; give the model that was trained"
            )
    if shapes.keys() <= checkpoint.shapes.keys():
        return checkpoint.read
    frozen = base.reader()
    return lambda name: checkpoint.read(name) if name in checkpoint.shapes else frozen(name)


def merged(lora: Lora, base: Base) -> Read:
    """Return what reads the whole model with the adapters merged in, in fp32 where there is one.

    W + s B A, and with DoRA (arXiv 2402.09353) each row of that brought to the length that was trained.
    """
    for name, shape in lora.shapes.items():
        layer = name.removesuffix(A)
        if layer == name:
            continue
        found, wanted = base.shapes.get(f"{layer}.weight"), torch.Size((lora.shapes[layer + B][0], shape[1]))
        if found != wanted:
            raise CheckpointError(
                f"{base.pipeline.folder('transformer')}: {layer!r} is {list(found) if found else 'missing'}, and the"
                f" adapter was trained on {list(wanted)}; give the model that was trained"
            )
    frozen = base.reader()

    def read(name: str) -> Tensor:
        weight, layer = frozen(name), name.removesuffix(".weight")
        if layer + A not in lora.shapes or layer == name:
            return weight
        weight = weight.float()  # [out, in]
        weight.addmm_(lora.read(layer + B).float(), lora.read(layer + A).float(), alpha=scale(lora.settings))
        if lora.settings.dora:
            lengths = torch.linalg.vector_norm(weight, dim=1)
            weight.mul_((lora.read(layer + MAGNITUDE).float() / lengths)[:, None])
        return weight

    return read


def write_model(out: Path, base: Base, read: Read, dtype: torch.dtype) -> None:
    """Write a model folder that `diffusers` loads, with the transformer from `read`.

    The transformer's config is copied, the other components are hard-linked where the file system can. Raises
    ConfigError if `out` lies inside a component.
    """
    pipeline = base.pipeline
    components = {name: pipeline.folder(name) for name in ("transformer", *pipeline.loaders)}
    for folder in components.values():
        if out.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"{out} lies inside the model's {folder}; give a folder outside it")
    with _partial(out) as partial:
        (partial / "transformer").mkdir()
        shutil.copyfile(components["transformer"] / "config.json", partial / "transformer" / "config.json")
        writer = WeightsWriter(partial / "transformer", base.shapes, dtype)
        for name in tqdm(base.shapes, desc="export", unit="tensor", leave=False, disable=None):
            writer.write(name, read(name))
        writer.close()
        for name, source in components.items():
            if name != "transformer":
                shutil.copytree(source, partial / name, copy_function=_link_or_copy)
        if pipeline.index is not None:
            shutil.copyfile(pipeline.index, partial / pipeline.index.name)
        _put(partial, out)


def write_loras(out: Path, lora: Lora, forms: Sequence[str], dtype: torch.dtype | None) -> None:
    """Write LoRA files of `forms` into the folder `out`; or of one form as `out` itself, if it ends in .safetensors."""
    if lora.settings.dora and "comfyui" in forms:
        log.warning(
            "DoRA: ComfyUI (as of its pull request 15458) divides by the lengths of the base's rows instead of the"
            " adapted ones', and paints a little otherwise than trained; merged weights are exact everywhere"
        )
    with _partial(out) as partial:
        for form in forms:
            write_lora(partial, form, lora, dtype)
        if out.suffix == ".safetensors":
            assert len(forms) == 1 and "peft" not in forms, "one file holds one form"
            _put(partial / FILES[forms[0]], out)
        else:
            _put(partial, out)


@contextmanager
def _partial(out: Path) -> Iterator[Path]:
    """Make a folder beside `out` to write in; what is left of it goes away at the end, however that comes."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put(source: Path, out: Path) -> None:
    if out.is_dir():
        shutil.rmtree(out)
    source.replace(out)
    fsync_dir(out.parent)


def _link_or_copy(source: str, target: str) -> None:
    """Link weights; copy what a person may edit, which must not be the source's own file."""
    if source.endswith(".safetensors"):
        with suppress(OSError):  # another file system, or one without hard links
            os.link(Path(source).resolve(), target)
            return
    shutil.copyfile(source, target)

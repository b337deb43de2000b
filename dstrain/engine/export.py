"""The trained model as a diffusers folder, gathered and written one tensor at a time."""

import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
import torch.distributed as dist

from dstrain.engine.engine import Engine
from dstrain.models.weights import WeightsWriter


def export(engine: Engine, folder: Path, components: Mapping[str, Path], index: Path | None) -> None:
    """Write `folder` as a model folder that `diffusers` loads, with the trained transformer; collective.

    No rank ever holds more than one gathered tensor. Weights are written in the dtype they are trained in.

    Args:
        engine: holds the transformer.
        folder: replaced when the new one is complete.
        components: local folder of every component; the transformer's config is copied from its own, the others are
            hard-linked where the file system can, copied where not.
        index: the model_index.json to copy, if there is one.
    """
    main = dist.get_rank() == 0
    partial = folder.with_name(f".{folder.name}.partial")
    writer = None
    if main:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "transformer").mkdir(parents=True)
        shutil.copyfile(components["transformer"] / "config.json", partial / "transformer" / "config.json")
        dtype = torch.bfloat16 if engine.config["bf16"]["enabled"] else torch.float32
        writer = WeightsWriter(partial / "transformer", engine.shapes(), dtype)
    for name, tensor in engine.parameters_gathered():
        if writer is not None:
            writer.write(name, tensor)
    if writer is not None:
        writer.close()
        for name, source in components.items():
            if name != "transformer":
                shutil.copytree(source, partial / name, copy_function=_link_or_copy)
        if index is not None:
            shutil.copyfile(index, partial / index.name)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    dist.barrier()


def _link_or_copy(source: str, target: str) -> None:
    """Link weights; copy what a person may edit, which must not be the source's own file."""
    if source.endswith(".safetensors"):
        with suppress(OSError):  # another file system, or one without hard links
            os.link(Path(source).resolve(), target)
            return
    shutil.copyfile(source, target)

"""Copy a model folder and give its transformer random weights, to train from scratch or to test with.

The weights follow transformer/config.json and the seed; they are those that `model.init: random` starts from. They are
made and written one tensor at a time, so a model larger than the memory is no trouble.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

from dstrain.commands.arguments import natural
from dstrain.errors import CheckpointError, ConfigError

ABOUT = "copy a model folder, with random transformer weights"
WEIGHTS = (".safetensors", ".bin", ".index.json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", type=Path, help="model folder in diffusers layout")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="the new model folder")
    parser.add_argument("--seed", type=natural, default=0, help="of the weights (%(default)s)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of the weights (%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Write the new folder beside its place and rename it, so that a half-written one is never taken for a model."""
    import torch

    from dstrain.commands.family import family_of

    if not args.model.is_dir():
        raise CheckpointError(f"{args.model}: no such folder; give a model folder in diffusers layout")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        raise ConfigError(f"{args.out} is there already; give a new folder, or remove it first")
    if args.out.resolve().is_relative_to(args.model.resolve()):
        raise ConfigError(f"{args.out} lies inside the model {args.model}; give a folder outside it")
    pipeline = family_of(str(args.model)).from_pretrained(args.model, load=())
    with torch.device("meta"):
        transformer = pipeline.build_transformer()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_name(f".{args.out.name}.part")
    try:
        if part.exists():
            shutil.rmtree(part)
        shutil.copytree(args.model, part, ignore=_left_out(args.model / "transformer"))
        count = _write_random(transformer, part / "transformer", args.seed, args.dtype)
        part.replace(args.out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{args.out}: {count:,} random {args.dtype} parameters from seed {args.seed}")


def _left_out(transformer: Path) -> Any:
    def names(folder: str, entries: list[str]) -> list[str]:
        weights = WEIGHTS if Path(folder) == transformer else ()
        return [name for name in entries if name.startswith(".") or name.endswith(weights)]

    return names


def _write_random(transformer: Any, folder: Path, seed: int, dtype: str) -> int:
    import torch
    from tqdm import tqdm

    from dstrain.models.init import initial_slice
    from dstrain.models.weights import WeightsWriter

    shapes = {name: p.shape for name, p in transformer.named_parameters()}
    writer = WeightsWriter(folder, shapes, {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype])
    for name, shape in tqdm(shapes.items(), unit="tensor", disable=None):
        values = initial_slice(transformer, name, shape, seed, 0, shape.numel())
        writer.write(name, values.view(shape))
    writer.close()
    return sum(shape.numel() for shape in shapes.values())

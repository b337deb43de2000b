"""Paint pictures from prompts with a model folder, as a training's export is one, or with a model of the hub.

    dstrain sample --model runs/demo/export --prompt "a red apple" --out apple.png
    dstrain sample --model runs/demo/export --prompts-file prompts.txt --out pictures/

One prompt can go to a file that ends in .png. Otherwise OUT is a folder, which receives 0000.png, 0001.png, ... and
grid.png with all of them over their prompts. Picture i of a seed has the same noise whatever the other prompts are.
"""

import argparse
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dstrain.commands.arguments import guidance, natural, positive
from dstrain.errors import ConfigError

ABOUT = "paint pictures from prompts"
MAX_COLUMNS = 8

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--model", required=True, help="model folder in diffusers layout, or hub id")
    prompts = parser.add_mutually_exclusive_group(required=True)
    prompts.add_argument("--prompt", action="append", metavar="TEXT", help="what to paint; can be repeated")
    prompts.add_argument("--prompts-file", type=Path, metavar="FILE", help="a text file with one prompt a line")
    parser.add_argument("--out", metavar="FILE.png | FOLDER", type=Path, required=True)
    parser.add_argument("--height", type=positive, default=1024, help="in pixels, a multiple of 16 (%(default)s)")
    parser.add_argument("--width", type=positive, default=1024, help="likewise (%(default)s)")
    parser.add_argument("--steps", type=positive, default=50, help="Euler steps (%(default)s)")
    parser.add_argument("--cfg", type=guidance, default=4.0, help="strength of the guidance, 1 = none (%(default)s)")
    parser.add_argument("--seed", type=natural, default=0, help="of the starting noise (%(default)s)")
    parser.add_argument(
        "--dtype", choices=("auto", "bf16", "fp32"), default="auto", help="auto: bf16 where the hardware multiplies it"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (auto: the GPU if there is one)")


def run(args: argparse.Namespace) -> None:
    """Refuse what can be refused before the model is read, paint, and save."""
    import torch

    from dstrain.commands.device import device_of, dtype_of
    from dstrain.commands.family import family_of
    from dstrain.pipelines.sampler import sample

    prompts = args.prompt or _read_prompts(args.prompts_file)
    _make_room(args.out, len(prompts))
    device = device_of(args.device)
    dtype = dtype_of(args.dtype, device)
    family = family_of(args.model)
    family(torch.device("cpu")).shape_of(args.height, args.width)
    pipeline = family.from_pretrained(args.model, dtype=dtype, device=device)
    log.info(
        "%d x %dx%d pixels, %d steps, on %s in %s", len(prompts), args.width, args.height, args.steps, device, dtype
    )
    images = sample(
        pipeline,
        prompts,
        height=args.height,
        width=args.width,
        num_steps=args.steps,
        cfg_scale=args.cfg,
        seed=args.seed,
    )
    _save(images, prompts, args.out)


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path}: the prompts are not UTF-8 text ({e.reason})") from e
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"{path}: no prompt in it; write one a line")
    return prompts


def _make_room(out: Path, count: int) -> None:
    if out.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif"):
        raise ConfigError(f"--out {out}: pictures are written as .png; name a .png file or a folder")
    if out.suffix.lower() != ".png":
        out.mkdir(parents=True, exist_ok=True)
    elif count > 1:
        raise ConfigError(f"--out {out} is one picture for {count} prompts; give a folder")
    else:
        out.parent.mkdir(parents=True, exist_ok=True)


def _save(images: Sequence[Any], prompts: Sequence[str], out: Path) -> None:
    from dstrain.tracking.report import draw_grid

    if out.suffix.lower() == ".png":
        images[0].save(out)
        print(out)
        return
    for number, image in enumerate(images):
        image.save(out / f"{number:04d}.png")
    draw_grid(images, prompts, out / "grid.png", columns=min(MAX_COLUMNS, math.ceil(math.sqrt(len(images)))))
    print(out / "grid.png")

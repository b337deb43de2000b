"""Encode the pictures and captions of a recipe once, so that its training needs neither VAE nor text encoder.

    dstrain encode --config launch/recipes/NAME.yaml --out encoded/ data.max_pixels=262144
    deepspeed launch/train.py --ds_config ... --config launch/recipes/NAME.yaml data.shards=[encoded/]

Each shard of the data becomes a shard of OUT with its index, or of OUT/SOURCE for each of data.sources; a sample KEY
becomes KEY.encoded.safetensors (latents, embeddings of the prompt and of the empty one, and which encoders made them)
and KEY.txt. Training on them has the same losses, bit for bit, as on the pictures, if the encoders have the dtype that
they would have in training (model.encoder_dtype).

What differs from draw to draw cannot be encoded once, so data.crop: random, data.flip, data.caption: random and
data.shuffle_tags are refused. data.caption_dropout works as ever.
Samples that are damaged are listed in OUT/refused.jsonl. The same command goes on after an interruption. For several
GPUs, start one process for each with a part of the shards and a folder of its own.
"""

import argparse

from dstrain.commands.arguments import path, positive
from dstrain.errors import printable

ABOUT = "encode pictures and captions once, so that training needs no encoders"
SHOWN = 20  # refusals printed; the file has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--config", metavar="RECIPE", type=path, required=True, help="of the training to come")
    parser.add_argument("--out", metavar="FOLDER", type=path, required=True, help="receives shard-000000.tar, ...")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ... (auto: the GPU if there is one)")
    parser.add_argument(
        "--shard-samples", metavar="N", type=positive, default=0, help="most samples a shard (as in the data's shards)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the recipe")


def run(args: argparse.Namespace) -> None:
    """Encode, and print what was written and what was refused."""
    from dstrain.commands.device import device_of, dtype_of
    from dstrain.config import load_recipe
    from dstrain.encoding import encode

    recipe = load_recipe(args.config, args.overrides)
    device = device_of(args.device)
    dtype = dtype_of(recipe.model.encoder_dtype, device)
    try:
        reports = encode(recipe, args.out, device=device, dtype=dtype, shard_samples=args.shard_samples, progress=True)
    except KeyboardInterrupt:
        print("stopped; give the same command again to go on")
        raise SystemExit(130) from None
    for report in reports:
        for entry in report.refused[:SHOWN]:
            print(printable(f"refused {entry.name}: {entry.reason} ({entry.detail})"))
        print(f"{report.shards[0].parent}: {report.summary()}")

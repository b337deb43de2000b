"""Make the missing or stale indexes of shards, and say what the dataset holds.

A shard that another program wrote needs no packing: an index is made beside it, here or at the start of a training.
"""

import argparse

from dstrain.commands.arguments import positive
from dstrain.config import DataConfig

ABOUT = "index tar shards and describe the dataset: samples, sizes, tokens, what is left out"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("shards", metavar="SHARDS", nargs="+", help="tar files, folders of them, or globs")
    default = DataConfig.__dataclass_fields__["max_pixels"].default
    parser.add_argument(
        "--max-pixels", type=positive, default=default, help="as data.max_pixels of the recipe (%(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    """Index, and print the samples that are left out and the summary."""
    from tqdm import tqdm

    from dstrain.data.dataset import open_dataset
    from dstrain.data.shards import find_shards, open_index

    for path in tqdm(find_shards(args.shards), unit="shard", disable=None):
        open_index(path)
    dataset = open_dataset(args.shards, max_pixels=args.max_pixels)
    for entry in dataset.excluded:
        print(f"left out {entry.shard}: {entry.key}: {entry.reason} ({entry.detail})")
    print(dataset.summary())

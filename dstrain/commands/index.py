"""Make the missing, stale and damaged indexes of shards, and say what the dataset holds.

A shard that another program wrote needs no packing: an index is made beside it, here or at the start of a training.
"""

import argparse
import os

from dstrain.commands.arguments import positive, report_file
from dstrain.config import DataConfig
from dstrain.errors import printable

ABOUT = "index tar shards and describe the dataset: samples, sizes, tokens, what is left out"
SHOWN = 20  # samples left out that are printed; --report has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "shards", metavar="SHARDS", nargs="+", help="tar files, folders of them, globs, or {0..9} ranges"
    )
    default = DataConfig.__dataclass_fields__["max_pixels"].default
    parser.add_argument(
        "--max-pixels", type=positive, default=default, help="as data.max_pixels of the recipe (%(default)s)"
    )
    parser.add_argument(
        "--report", metavar="FILE", type=report_file, help="write all samples left out here, as JSON lines"
    )
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes (%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Index, and print the samples that are left out and the summary."""
    from dstrain.data.dataset import Dataset, Source
    from dstrain.data.media.resolution import Resolution
    from dstrain.data.selection import Wanted
    from dstrain.data.shards.catalog import find_local, renew_indexes
    from dstrain.data.shards.names import ENCODED
    from dstrain.errors import DataError
    from dstrain.storage import write_json_lines

    indexes = renew_indexes(find_local(args.shards), workers=args.workers, progress=True)
    columns = [name for name in (ENCODED, "image", "video") if any(name in index.stats for index in indexes)]
    wanted = Wanted(Resolution(max_pixels=args.max_pixels), columns=tuple(columns[:1]) or ("image",))
    left_out = [entry for index in indexes for entry in (*index.excluded, *wanted.left_out(index))]
    for entry in left_out[:SHOWN]:
        print(printable(f"left out {entry.shard}: {entry.key}: {entry.reason} ({entry.detail})"))
    if len(left_out) > SHOWN:
        print(f"and {len(left_out) - SHOWN} more; {args.report or '--report FILE'} lists all")
    if args.report is not None:
        write_json_lines(args.report, map(vars, left_out))
    dataset = Dataset([(Source(args.shards), indexes)], wanted)
    print(dataset.summary())
    if not len(dataset):
        raise DataError("no sample of these shards can be trained on")

"""Pack captioned pictures into tar shards, each with its index.

SOURCE is a folder of pictures (png, jpg, webp) with NAME.txt beside NAME.png, or a table (metadata.csv, .json or
.jsonl with the columns image and prompt). Pictures that cannot be trained on are refused, listed with the reason, and
written to OUT/refused.jsonl; the others are packed all the same.
"""

import argparse
import json
from pathlib import Path

from dstrain.commands.arguments import positive

ABOUT = "pack a folder or table of captioned pictures into tar shards"
SHOWN = 20  # refusals printed; the file has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("source", metavar="SOURCE", type=Path, help="folder of pictures and captions, or a table")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="receives shard-000000.tar, ...")
    parser.add_argument("--shard-samples", type=positive, default=10_000, help="most samples a shard (%(default)s)")
    parser.add_argument("--shard-mb", type=positive, default=256, help="most MiB a shard (%(default)s)")


def run(args: argparse.Namespace) -> None:
    """Pack, and print what was written and what was refused."""
    from dstrain.data.pack import pack
    from dstrain.storage import write_atomic

    report = pack(args.source, args.out, shard_bytes=args.shard_mb << 20, shard_samples=args.shard_samples)
    for entry in report.refused[:SHOWN]:
        print(f"refused {entry.name}: {entry.reason} ({entry.detail})")
    if report.refused:
        listed = args.out / "refused.jsonl"
        write_atomic(listed, "".join(json.dumps(vars(entry)) + "\n" for entry in report.refused).encode())
        print(f"all {len(report.refused)} refusals are in {listed}")
    print(f"{args.out}: {report.summary()}")

"""Read shards through and name every damage: headers, altered bytes, pictures and videos that do not decode, captions.

Bytes are compared with the index beside each shard, so index shards while they are known to be sound. The exit code is
1 if anything is damaged.
"""

import argparse
import os

from dstrain.commands.arguments import positive, report_file
from dstrain.errors import printable

ABOUT = "find every damage in tar shards, by shard, byte and member"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "shards", metavar="SHARDS", nargs="+", help="tar files, folders of them, globs, or {0..9} ranges"
    )
    parser.add_argument(
        "--report", metavar="FILE", type=report_file, help="write what is found here too, as JSON lines"
    )
    parser.add_argument("--workers", type=positive, default=os.cpu_count(), help="processes (%(default)s)")


def run(args: argparse.Namespace) -> int:
    """Verify, print a line for each damage and a summary; return 1 if there is damage."""
    from tqdm import tqdm

    from dstrain.data.shards.catalog import find_local
    from dstrain.data.shards.verify import verify_all
    from dstrain.storage import write_json_lines

    paths = find_local(args.shards)
    found = []
    for damages in verify_all(paths, workers=args.workers, progress=True):
        for damage in damages:
            tqdm.write(printable(str(damage)))
        found += damages
    if args.report is not None:
        write_json_lines(args.report, map(vars, found))
    damaged = {damage.shard for damage in found if not damage.harmless}
    count = sum(not damage.harmless for damage in found)
    unsure = f"; {len(found) - count} without a fresh index to compare with" * (len(found) > count)
    print(f"{len(paths)} shards, {count} damages in {len(damaged)} of them{unsure}")
    return int(count > 0)

"""Pack pictures, videos and captions into tar shards, each with its index.

SOURCE is one of
  a folder  of pictures (png, jpg, webp) and videos (mp4, mov, webm, mkv) at any depth, with NAME.txt beside NAME.png
  a table   as DiffSynth's metadata.csv, .json or .jsonl, or the folder that holds it. The caption is in the column
            prompt, caption or text (json: also a list of captions). Files are in image (or file_name), video, and
            columns that end in _image, _images, _video, _videos or _mask, unless --columns names them. A cell is a
            path, relative to the table or to --base and inside it, or (json) a list of paths, or blank.
            What other columns hold is kept with the caption.
  tars      of WebDataset, img2dataset or dstrain: a .tar, a folder of them, or a quoted glob. They are cut into shards
            of the new size, all members kept, of samples without a caption too.

A sample KEY becomes KEY.png for the column image, KEY.mp4 for video, KEY.edit_image.png or KEY.edit_image.0.png for
others, and KEY.txt with the caption; KEY.json instead if it has several captions or further columns.
Files are stored as they are, unless --format or --max-side re-encodes the pictures: upright, without metadata, the
first frame of an animation, jpg over white; with --max-side alone only the larger ones. The same source gives the same
bytes, whatever --workers is.

What cannot be trained on (damaged, no caption, a side under 16 pixels ...) is refused with a reason, listed in
OUT/refused.jsonl, and the rest is packed. An interrupted packing goes on when the same command is given again: shards
appear only when they are whole, and OUT/pack.json says which are.
"""

import argparse

from dstrain.commands.arguments import given, path, positive
from dstrain.errors import ConfigError, printable

ABOUT = "pack a folder, a table or tars of captioned pictures and videos into tar shards"
SHOWN = 20  # refusals printed; the file has all
QUALITY = 95


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "source", metavar="SOURCE", type=given, help="a folder of pictures and captions, a table, or tars"
    )
    parser.add_argument("--out", metavar="FOLDER", type=path, required=True, help="receives shard-000000.tar, ...")
    parser.add_argument("--shard-mb", metavar="N", type=positive, default=256, help="most MiB a shard (%(default)s)")
    parser.add_argument(
        "--shard-samples", metavar="N", type=positive, default=10_000, help="most samples a shard (%(default)s)"
    )
    parser.add_argument("--columns", metavar="A,B", help="the table's file columns, the main one first")
    parser.add_argument("--base", metavar="FOLDER", type=path, help="what the table's paths are relative to")
    parser.add_argument("--format", choices=("jpg", "png", "webp"), help="re-encode every picture")
    parser.add_argument("--quality", metavar="N", type=positive, help=f"of jpg and webp, 1 to 100 ({QUALITY})")
    parser.add_argument("--max-side", metavar="N", type=positive, help="scale pictures with a longer side down to it")
    parser.add_argument("--workers", metavar="N", type=positive, help="threads (as many as cores, at most 16)")


def run(args: argparse.Namespace) -> None:
    """Pack, and print what was written and what was refused."""
    from dstrain.data.packing.ledger import REFUSED
    from dstrain.data.packing.pack import pack
    from dstrain.data.packing.reencode import Reencode

    reencode = None
    if args.format or args.max_side:
        reencode = Reencode(args.format, args.quality or QUALITY, args.max_side or 0)
    elif args.quality:
        raise ConfigError("--quality belongs to --format or --max-side; pictures are stored as they are without them")
    try:
        report = pack(
            args.source,
            args.out,
            shard_bytes=args.shard_mb << 20,
            shard_samples=args.shard_samples,
            columns=args.columns.split(",") if args.columns else None,
            base=args.base,
            reencode=reencode,
            workers=args.workers,
            progress=True,
        )
    except KeyboardInterrupt:
        print("stopped; give the same command again to go on")
        raise SystemExit(130) from None
    for entry in report.refused[:SHOWN]:
        print(printable(f"refused {entry.name}: {entry.reason} ({entry.detail})"))
    if report.refused:
        print(f"all {len(report.refused)} refusals are in {args.out / REFUSED}")
    print(f"{args.out}: {report.summary()}")

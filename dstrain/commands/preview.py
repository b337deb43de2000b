"""Look at a dataset before training on it: some samples as training sees them, and histograms of all, in one picture.

    dstrain preview shards/ --out preview.png
    dstrain preview shards/ --out preview.png --columns image,edit_image --max-pixels 262144

Under each picture are its size as stored and as trained on; of a video the first, middle and last frame are shown.
Samples that turn out to be bad are drawn as empty frames with the reason. The histograms are of the indexes, of at most
about a million samples. The same figures are printed.
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dstrain.commands.arguments import natural, output_fault, positive
from dstrain.config import DataConfig
from dstrain.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from dstrain.data.preview.samples import Figures
    from dstrain.data.shards.index import ShardIndex

ABOUT = "draw samples of a dataset with their captions, and histograms of their sizes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    default = {name: field.default for name, field in DataConfig.__dataclass_fields__.items()}
    parser.add_argument(
        "shards", metavar="SHARDS", nargs="+", help="tar files, folders of them, globs, or {0..9} ranges"
    )
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="a .png, .jpg, .pdf or .svg file")
    parser.add_argument("--count", metavar="N", type=positive, default=24, help="samples that are shown (%(default)s)")
    parser.add_argument("--seed", metavar="N", type=natural, default=0, help="which samples (%(default)s)")
    parser.add_argument(
        "--max-pixels",
        metavar="N",
        type=positive,
        default=default["max_pixels"],
        help="as data.max_pixels of the recipe (%(default)s)",
    )
    parser.add_argument(
        "--frames", metavar="N", type=positive, default=default["frames"], help="as data.frames (%(default)s)"
    )
    parser.add_argument("--columns", metavar="A,B", help="pictures or videos of a sample (image, or else video)")


def run(args: argparse.Namespace) -> None:
    """Look at the dataset, draw it, and print its figures."""
    from tqdm import tqdm

    from dstrain.data.dataset import Dataset, Source
    from dstrain.data.media.resolution import Resolution
    from dstrain.data.preview.samples import choose, measure, panel_counts, show, visible
    from dstrain.data.preview.sheet import FORMATS, MAX_SAMPLES, Layout, draw_sheet
    from dstrain.data.reasons import ranked
    from dstrain.data.selection import Clip, Wanted
    from dstrain.data.shards.catalog import find_local, open_indexes

    _check_out(args.out, FORMATS)
    if args.count > MAX_SAMPLES:
        raise ConfigError(f"--count {args.count} samples do not fit on one sheet; give at most {MAX_SAMPLES}")
    indexes = open_indexes(find_local(args.shards), workers=os.cpu_count() or 1, progress=True)
    columns = _columns(indexes, args.columns)
    wanted = Wanted(Resolution(args.max_pixels), columns, clip=Clip(args.frames))
    dataset = Dataset([(Source(args.shards), indexes)], wanted)
    out = dataset.left_out.counts
    left_out = f"Left out {out.total():,}: {ranked(out)}" if out else "No sample is left out."
    if not len(dataset):
        raise DataError(
            f"no sample can be used in {_counted(len(indexes), 'shard')}, the first being {indexes[0].path}; "
            f"each needs {' and '.join(columns)} and a caption (left out: {ranked(out) or 'none'})"
        )

    rows = choose(len(dataset), args.count, args.seed)
    layout = Layout.of(len(rows), panel_counts(dataset))
    bar = tqdm(show(dataset, rows, layout.side), "reading", len(rows), unit="sample", leave=False, disable=None)
    samples = list(bar)
    figures = measure(dataset)
    size = _bytes(sum(index.size for index in indexes))
    about = f"{_counted(len(dataset), 'sample')} in {_counted(len(indexes), 'shard')}, {size}  ·  "
    about += f"{len(rows)} of them at random (seed {args.seed}), as training sees them"
    draw_sheet(samples, layout, figures, args.out, title="  ".join(args.shards), about=about, left_out=left_out)

    print(dataset.summary())
    print(table(figures))
    bad = [sample for sample in samples if sample.fault]
    for sample in bad:
        print(f"bad {visible(sample.shard)}: {visible(sample.key)}: {visible(sample.fault)}")
    print(f"{args.out}  {_counted(len(samples), 'sample')}, {len(bad)} of them bad")


def table(figures: "Figures") -> str:
    """Return the figures of the histograms, a line each."""
    from dstrain.data.preview.histograms import number, summary

    lines = [f"{len(figures.tokens):,} samples:".ljust(20) + "".join(f"{n:>10}" for n in "min median mean max".split())]
    values = {
        "aspect ratio": figures.ratio,
        "megapixels, stored": figures.stored,
        "megapixels, trained": figures.trained,
        "tokens": figures.tokens,
        "caption bytes": figures.caption_bytes,
    }
    for name, array in values.items():
        lines.append(name.ljust(20) + "".join(f"{number(value):>10}" for value in summary(array)))
    return "\n".join(lines)


def _check_out(out: Path, formats: Sequence[str]) -> None:
    if out.suffix.lower() not in formats:
        raise ConfigError(f"--out {out}: its kind is not known; give a file that ends in {', '.join(formats)}")
    if fault := output_fault(out):
        raise ConfigError(f"--out {fault}")
    if not os.access(out.parent, os.W_OK):
        raise ConfigError(f"--out {out}: the folder {out.parent} cannot be written to")


def _columns(indexes: Sequence["ShardIndex"], named: str | None) -> tuple[str, ...]:
    """Return the columns to show: those named, or the first there is of image and video."""
    there = list(dict.fromkeys(name for index in indexes for name, stats in index.stats.items() if stats.max_pixels))
    if named is None:
        return tuple(name for name in ("image", "video") if name in there)[:1] or ("image",)
    columns = tuple(dict.fromkeys(name for part in named.split(",") if (name := part.strip())))
    for name in columns:
        if name not in there:
            shown = ", ".join(there) or "none"
            raise ConfigError(
                f"--columns {named}: no picture or video is called {name!r}{did_you_mean(name, there)}; "
                f"there are: {shown}"
            )
    if not columns:
        raise ConfigError("--columns names nothing; give names such as image,edit_image")
    return columns


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"

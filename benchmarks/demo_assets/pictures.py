"""Lay out the demo's pictures and captions as a folder of NAME.png + NAME.txt, ready for `dstrain pack`.

    python pictures.py PACKAGE --out FOLDER

PACKAGE is the npm package emoji-datasource-twitter, `captions.tsv` the choice: 256 emoji that look different
and have different names. Pictures are RGBA, 64 x 64, on a transparent background.
"""

import argparse
import io
import logging
import re
from pathlib import Path

from emoji import read_captions, read_package
from PIL import Image

log = logging.getLogger("pictures")


def png(path: Path) -> bytes:
    """Return a file of the package as it is if it is RGBA, else (a few have a palette) encoded as RGBA."""
    with Image.open(path) as picture:
        assert picture.size == (64, 64), path
        if picture.mode == "RGBA":
            return path.read_bytes()
        buffer = io.BytesIO()
        picture.convert("RGBA").save(buffer, "PNG", optimize=True)
        return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    pictures = {e.name: e.path for e in read_package(args.package) if not e.variant}
    captions = read_captions()
    assert len(set(captions.values())) == len(captions), "two pictures share a caption"
    args.out.mkdir(parents=True, exist_ok=True)
    total = 0
    for name, caption in captions.items():
        stem = re.sub(r"[^a-z0-9]+", "_", caption)
        data = png(pictures[name])
        (args.out / f"{stem}.png").write_bytes(data)
        (args.out / f"{stem}.txt").write_text(caption + "\n")
        total += len(data)
    log.info("%d pictures, %d bytes of PNG", len(captions), total)


if __name__ == "__main__":
    main()

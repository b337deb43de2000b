"""Cut JPEGs of many shapes and sizes out of photographs: what the benchmark of the loaders reads.

    python benchmarks/data/pictures.py PHOTOGRAPHS --out DATA --count 3000

PHOTOGRAPHS is a folder that is searched for the photographs named below. They come with Debian 12:

    apt-get download lomiri-wallpapers-16.04 lomiri-wallpapers-20.04 mate-backgrounds plasma-workspace-wallpapers
    for f in *.deb; do dpkg-deb -x $f PHOTOGRAPHS/${f%%_*}; done

DATA/pictures gets COUNT JPEGs of 0.5 to 2 megapixels, DATA/small four times as many of about 86 kB (near 640 x 640),
each a random window of a photograph, scaled down and saved at quality 90 with a caption of 20 to 200 words beside it.
The same photographs give the same pictures.
"""

import argparse
import logging
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import mix
import numpy as np
from PIL import Image

log = logging.getLogger("pictures")

WORDS = Path(__file__).parent.parent / "demo_assets/words.txt"
PHOTOGRAPHS = (
    # lomiri-wallpapers
    "Bridge_by_Sander_Klootwijk Dragonfly_by_Bolly Picture_0B_by_freespace Picture_1A_by_freespace "
    "Wine_by_Jakkub_Mede aitzgorri_by_Aitzol_Berasategi free_by_Peter_Nerlich friends_by_Aitzol_Berasategi "
    "greentock_by_Peter_Nerlich life_by_Aitzol_Berasategi picosdeeuropa_by_Aitzol_Berasategi "
    "seeding_by_Clements_Engelhardt sunset_by_Aitzol_Berasategi Kleiber_by_Lukas_Baubkus "
    # mate-backgrounds
    "Aqua Blinds Dune Garden GreenMeadow LadyBird RainDrops Storm TwoWings Wood YellowFlower Elephants_3840x2160 "
    # plasma-workspace-wallpapers, where the name is that of a folder
    "BytheWater ColdRipple ColorfulCups EveningGlow FallenLeaf Grey Kite OneStandsOut Path"
).split()
SIZES = {"pictures": (0.5e6, 2e6, 1), "small": (0.36e6, 0.46e6, 4)}  # least and most pixels, pictures for each of COUNT
_SEED = 20


def find(folder: Path) -> list[Path]:
    """Return the photographs in the order of their names above."""
    found = {}
    for path in sorted(folder.rglob("*.jpg")):
        if not path.is_symlink():
            found.setdefault(path.stem, path)
            if path.parent.parent.name == "contents":
                found.setdefault(path.parts[-4], path)
    missing = [name for name in PHOTOGRAPHS if name not in found]
    if missing:
        raise SystemExit(f"{folder} lacks {', '.join(missing)}; see --help for where they come from")
    return [found[name] for name in PHOTOGRAPHS]


def window(image: Image.Image, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Return a random window of the photograph, scaled down to the size, which is made to fit."""
    fit = min(1.0, image.width / width, image.height / height)
    width, height = int(width * fit), int(height * fit)
    most = min(image.width / width, image.height / height)
    zoom = most ** rng.uniform(0.5, 1)  # towards the whole photograph: windows at full size lack fine detail
    left, top = rng.uniform(0, image.width - width * zoom), rng.uniform(0, image.height - height * zoom)
    box = (left, top, min(left + width * zoom, image.width), min(top + height * zoom, image.height))
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def cut(photograph: tuple[int, Path], count: int, out: Path) -> int:
    """Write every picture whose turn falls on this photograph; return their bytes."""
    place, path = photograph
    words = WORDS.read_text().split()
    total = 0
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    for kind, (least, most, times) in SIZES.items():
        for number in range(place, count * times, len(PHOTOGRAPHS)):
            rng = np.random.default_rng([_SEED, times, number])
            (width,), (height,) = mix.sizes(rng, 1, least, most)
            target = out / kind / f"{number:06d}.jpg"
            window(image, int(width), int(height), rng).save(target, quality=90)
            target.with_suffix(".txt").write_text(mix.caption(rng, words))
            total += target.stat().st_size
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for kind in SIZES:
        (args.out / kind).mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(args.workers) as pool:
        total = sum(pool.map(partial(cut, count=args.count, out=args.out), enumerate(find(args.photographs))))
    log.info("%d photographs, %.2f GB of JPEG", len(PHOTOGRAPHS), total / 1e9)


if __name__ == "__main__":
    main()

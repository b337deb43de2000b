"""Read the npm package `emoji-datasource-twitter`: names, pictures, and who is held out."""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

CAPTIONS = Path(__file__).with_name("captions.tsv")


@dataclass(frozen=True)
class Emoji:
    """One picture of the package; a skin tone of a person counts as a `variant`."""

    name: str
    category: str
    path: Path
    variant: bool


def read_package(package: Path) -> list[Emoji]:
    """Return every emoji of the package that has a Twitter picture, in the package's own order."""
    found = []
    for entry in json.loads((package / "emoji.json").read_text()):
        for look in (entry, *entry.get("skin_variations", {}).values()):
            path = package / "img" / "twitter" / "64" / look["image"]
            if look["has_img_twitter"] and path.exists():
                found.append(Emoji(entry["name"].lower(), entry["category"], path, look is not entry))
    return found


def read_captions() -> dict[str, str]:
    """Return the demo's captions by emoji name, in the order of `captions.tsv`."""
    lines = CAPTIONS.read_text().splitlines()[1:]
    return dict(line.split("\t") for line in lines)


def split(emoji: list[Emoji], held_out: int, seed: int) -> tuple[list[Emoji], list[Emoji], list[Emoji]]:
    """Return (demo, held-out, training) emoji; held-out ones are of the demo's kind: no people, no flags."""
    captions = read_captions()
    demo = [e for e in emoji if e.name in captions and not e.variant]
    people = {e.name for e in emoji if e.variant}
    others = [e for e in emoji if e.name not in captions]
    eligible = [e for e in others if e.category not in ("Flags", "Component") and e.name not in people]
    chosen = random.Random(seed).sample(eligible, held_out)
    return demo, chosen, [e for e in others if e not in set(chosen)]


def read_rgba(path: Path) -> np.ndarray:
    """Return a picture as uint8 [H, W, 4]."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGBA"))

"""Look at what the demo's model paints, and count how often it is the right thing.

    python launch/demo/evaluate.py --config launch/recipes/demo.yaml [section.key=value ...]

For training captions spread evenly over the data, one picture each is painted by the exported model, and the training
pictures are ranked by their distance to it (mean squared over RGB at 64 x 64 pixels). Recall at 1 is the share of
captions whose own picture comes first. It says that the model follows its captions; since they are training captions,
it says nothing about new ones. Writes grid.png, loss.png and result.json to RUN_DIR/demo.
"""

import argparse
import logging
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dstrain.config import Recipe, load_recipe
from dstrain.data import Dataset
from dstrain.data.media.decode import decode
from dstrain.errors import DstrainError
from dstrain.job import open_data, wanted_samples
from dstrain.pipelines import PIPELINES
from dstrain.pipelines.sampler import sample, to_pil
from dstrain.storage import write_json
from dstrain.tracking.report import draw_grid, draw_loss_curve

SIDE = 64  # pixels of the pictures that are compared
CAPTIONS = 64
SHOWN = 24  # in the grid
STEPS, CFG, SEED = 20, 3.0, 0

log = logging.getLogger("demo")


def spread(count: int, among: int) -> list[int]:
    """Return `count` places spread evenly over range(among), all of them if there are fewer."""
    count = min(count, among)
    return [i * among // count for i in range(count)]


def read_all(dataset: Dataset) -> tuple[list[Tensor], list[str]]:
    """Return all pictures, uint8 [3, H, W] each, and their captions."""
    pictures, captions = [], []
    for row in range(len(dataset)):
        raw = dataset.read(row)
        image = raw.files["image"]
        pictures.append(decode(image.data, (image.width, image.height)))
        captions.append(raw.captions[0])
    return pictures, captions


def thumbnails(pictures: list[Tensor]) -> Tensor:
    """Uint8 [3, H, W] pictures of any size -> fp32 [n, 3, SIDE, SIDE] in [0, 1]."""
    return torch.cat([F.adaptive_avg_pool2d(p.float()[None] / 255, SIDE) for p in pictures])


def to_tensor(image: Image.Image) -> Tensor:
    """Return an RGB picture as uint8 [3, H, W]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def ranks(samples: Tensor, training: Tensor, right: list[int]) -> tuple[list[int], list[int]]:
    """Return the place (1 = nearest) of each sample's own training picture `right`, and which picture is nearest.

    samples: [k, ...]; training: [n, ...]; by the mean squared distance over everything but the first axis.
    """
    distances = torch.stack([(training - s).square().flatten(1).mean(1) for s in samples])  # [k, n]
    own = distances[torch.arange(len(right)), right]
    # A picture that is as near as the right one counts against it, so a model that paints one thing gains nothing.
    return (distances <= own[:, None]).sum(1).tolist(), distances.argmin(1).tolist()


def paint(recipe: Recipe, prompts: list[str], sizes: list[tuple[int, int]]) -> list[Image.Image]:
    """Paint a picture a prompt with the exported model; sizes are (width, height) in pixels."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipeline = PIPELINES.get(recipe.model.family).from_pretrained(
        Path(recipe.run_dir) / "export", dtype=torch.float32, device=device, gelu=recipe.model.gelu
    )
    widths, heights = zip(*sizes)
    return sample(pipeline, prompts, height=heights, width=widths, num_steps=STEPS, cfg_scale=CFG, seed=SEED)


def evaluate(recipe: Recipe) -> None:
    """Paint, rank, draw and print."""
    started = time.perf_counter()
    run_dir = Path(recipe.run_dir)
    dataset = open_data(recipe.data, wanted_samples(recipe.data, ("image",)))
    pictures, captions = read_all(dataset)
    rows = spread(CAPTIONS, len(dataset))
    prompts = [captions[row] for row in rows]
    log.info("painting %d of the %d training captions ...", len(rows), len(dataset))
    samples = paint(recipe, prompts, [(pictures[row].shape[2], pictures[row].shape[1]) for row in rows])
    places, nearest = ranks(thumbnails([to_tensor(s) for s in samples]), thumbnails(pictures), rows)

    out = run_dir / "demo"
    out.mkdir(parents=True, exist_ok=True)
    shown = spread(SHOWN, len(rows))
    references = [to_pil(pictures[rows[i]] / 255) for i in shown]
    draw_grid([samples[i] for i in shown], [prompts[i] for i in shown], out / "grid.png", 8, references)
    draw_loss_curve(run_dir, out / "loss.png")
    result = {
        "captions": len(rows),
        "training_pictures": len(dataset),
        **{f"recall_at_{at}": sum(place <= at for place in places) / len(rows) for at in (1, 5)},
        **{f"chance_at_{at}": min(1.0, at / len(dataset)) for at in (1, 5)},
        "sampler": {"steps": STEPS, "cfg": CFG, "seed": SEED},
        "seconds": round(time.perf_counter() - started, 1),
        "samples": [
            {"caption": prompt, "place": place, "nearest": captions[row]}
            for prompt, place, row in zip(prompts, places, nearest)
        ],
    }
    write_json(out / "result.json", result)
    say(result, run_dir)


def say(result: dict[str, Any], run_dir: Path) -> None:
    """Print the figures, and where everything lies."""
    for at, what in ((1, "the nearest"), (5, "among the 5 nearest")):
        log.info(
            "the right picture is %s for %.0f of %d captions (chance: %.2f)",
            what,
            result[f"recall_at_{at}"] * result["captions"],
            result["captions"],
            result[f"chance_at_{at}"] * result["captions"],
        )
    where = {
        "pictures": "demo/grid.png",
        "loss curve": "demo/loss.png",
        "figures": "demo/result.json",
        "metrics": "metrics.jsonl",
        "checkpoints": "checkpoints",
        "model": "export",
    }
    for name, path in where.items():
        log.info("%-12s %s", name, run_dir / path)
    command = [str(Path(sys.executable).with_name("dstrain")), "sample", "--model", str(run_dir / "export")]
    command += ["--height", "64", "--width", "64", "--prompt", result["samples"][0]["caption"], "--out", "picture.png"]
    log.info("paint more:  %s", shlex.join(command))


def main() -> int:
    """Read the recipe of the run and evaluate it; exit code 2 when there is nothing to evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the recipe of the run")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as given to the training")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        evaluate(load_recipe(args.config, args.overrides))
    except DstrainError as error:
        log.error("dstrain: error: %s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compare ways of making batches of pictures of all shapes: how much of the token budget is used, and who waits.

    python benchmarks/packing.py --out benchmarks/results/data_packing.json [--photographs FOLDER]

    dstrain         every picture keeps its aspect ratio, samples of any length are packed without padding, and the
                    packs of a micro-step are made to cost the same (dstrain.data.deal)
    crop to bucket  each picture is scaled to cover the nearest of about 17 shapes of one area, sides multiples of 64,
                    and cropped; a rank's batch is of one shape, its captions padded to the longest; each rank draws
                    its own shape; what does not fill a batch is dropped at the end of an epoch
    pad to longest  every picture keeps its aspect ratio, batches in random order, padded to the longest sample

The mix of shapes, sizes (0.25 to 4 megapixels) and caption lengths is that of data/mix.py; with --photographs also the
sizes of the pictures in a folder. A batch of the last two has as many samples as can never exceed the budget.
For each: `budget_used`, the share of the token budget filled with real tokens; `spread` of the costs of the ranks in a
micro-step, by the mean over micro-steps of the costliest (max / mean - 1) and by the range ((max - min) / max);
`useful`, real work over what all ranks take while they wait for the costliest; `pixels_kept` of the scaled picture;
`enlarged` and `dropped` shares of samples. The cost of a sample is tokens + tokens^2 / 18432, the matrices and the
attention of a DiT of width 3072. Global batches are such that a step has about MICROS micro-steps.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from data import mix
from PIL import Image

from dstrain.data.deal import deal
from dstrain.data.media.resolution import Resolution

ATTENTION = 18432  # tokens at which attention costs as much as the matrices: 6 x width
TEMPLATE = 8  # tokens around a caption
CELLS = ((512, 4096), (512, 8192), (1024, 8192), (1024, 16384), (1024, 32768))  # side of the area, tokens a pack
WORLDS = (1, 2, 8, 64, 1024)
_FILL = np.concatenate([np.arange(100, 92, -0.5), np.arange(92, 75, -1)]) / 100  # of the budget, to aim a batch at
_MOST_PACKS = 4096  # of a step; more tell nothing new


@dataclass(frozen=True)
class Samples:
    """What there is to train on: pixels and tokens, int64 [n]."""

    widths: np.ndarray
    heights: np.ndarray
    texts: np.ndarray

    def __len__(self) -> int:
        return len(self.texts)


def synthetic(n: int) -> Samples:
    rng = np.random.default_rng(0)
    return Samples(*mix.sizes(rng, n, 0.25e6, 4e6), mix.caption_tokens(rng, n) + TEMPLATE)


def photographs(folder: Path, n: int) -> Samples:
    rng = np.random.default_rng(1)
    found = []
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".jpg", ".jpeg", ".png", ".webp") and path.is_file() and not path.is_symlink():
            with Image.open(path) as image:
                found.append(image.size)
    chosen = np.array(found)[rng.integers(len(found), size=n)]
    return Samples(chosen[:, 0], chosen[:, 1], mix.caption_tokens(rng, n) + TEMPLATE)


def cost(tokens: np.ndarray) -> np.ndarray:
    return tokens * (ATTENTION + tokens)


def figures(tokens: list[int], costs: list[np.ndarray], real: list[float], budget: int) -> dict[str, float]:
    """Sum up micro-steps: real tokens of all ranks, costs of each rank, real cost of all ranks."""
    most, mean = np.array([c.max() for c in costs]), np.array([c.mean() for c in costs])
    ranks = len(costs[0])
    return {
        "budget_used": sum(tokens) / (len(costs) * ranks * budget),
        "spread_max_over_mean": float(most.sum() / mean.sum() - 1),
        "spread_range": float(np.mean([(c.max() - c.min()) / c.max() for c in costs])),
        "useful": sum(real) / float(most.sum() * ranks),
    }


def packed(samples: Samples, area: int, budget: int, ranks: int, micros: int, steps: int) -> dict[str, Any]:
    """Deal random global batches as dstrain does, of the size that fills its micro-steps best."""
    widths, heights = Resolution(max_pixels=area, min_pixels=256).sizes(samples.widths, samples.heights)
    images = widths * heights // 256
    tokens = images + samples.texts
    costs = cost(tokens)
    scale = np.minimum(1, area / (samples.widths * samples.heights))
    kept = (widths * heights) / (samples.widths * samples.heights * scale)

    def run(batch: int, steps: int) -> dict[str, Any]:
        order = np.random.default_rng(2).permutation(len(samples))
        used, loads, real, counts = [], [], [], []
        for step in range(steps):
            rows = order[np.arange(step * batch, (step + 1) * batch) % len(order)]
            dealt = deal(tokens[rows], costs[rows], ranks=ranks, capacity=budget)
            counts.append(len(dealt))
            for micro in dealt:
                used.append(sum(int(tokens[rows[pack]].sum()) for pack in micro))
                loads.append(np.array([float(costs[rows[pack]].sum()) for pack in micro]))
                real.append(float(loads[-1].sum()))
        return {"global_batch": batch, "micro_steps": float(np.mean(counts)), **figures(used, loads, real, budget)}

    whole = micros * ranks * budget / tokens.mean()
    # a batch that is no multiple of the ranks can be dealt if two samples always fit a pack
    unit = 1 if 2 * tokens.max() <= budget else ranks
    batches = sorted({max(ranks, int(whole * fill) // unit * unit) for fill in _FILL})
    probed = sorted((run(batch, 2) for batch in batches), key=lambda found: -found["budget_used"])
    best = max((run(found["global_batch"], steps) for found in probed[:4]), key=lambda found: found["budget_used"])
    return best | {"pixels_kept": float(kept.mean()), "enlarged": 0.0, "dropped": 0.0}


def buckets(area: int) -> np.ndarray:
    """Return widths and heights of the usual shapes, [n, 2]: multiples of 64, at most `area`, up to 2.5 : 1."""
    side = int(area**0.5)
    shapes = [(width, area // width // 64 * 64) for width in range(side // 2 // 64 * 64, 2 * side + 1, 64)]
    shapes += [(height, width) for width, height in shapes]
    return np.array(sorted({(w, h) for w, h in shapes if max(w, h) <= 2.5 * min(w, h)}))


def batched(
    groups: list[np.ndarray], size: int, ranks: int, steps: int, rng: np.random.Generator
) -> tuple[Iterator[np.ndarray], float]:
    """Cut each group into batches of `size`, in random order, dealt to ranks; also the share of samples dropped."""
    whole = [rng.permutation(group)[: len(group) // size * size].reshape(-1, size) for group in groups]
    batches = rng.permutation(np.concatenate(whole))
    dropped = 1 - batches.size / sum(len(group) for group in groups)
    count = min(steps, len(batches) // ranks)
    return iter(batches[: count * ranks].reshape(count, ranks, size)), dropped


def cropped(samples: Samples, area: int, budget: int, ranks: int, steps: int) -> dict[str, Any]:
    shapes = buckets(area)
    ratio = np.log(samples.widths / samples.heights)
    nearest = np.abs(ratio[:, None] - np.log(shapes[:, 0] / shapes[:, 1])).argmin(axis=1)
    images = shapes.prod(axis=1) // 256
    cover = np.maximum(shapes[nearest, 0] / samples.widths, shapes[nearest, 1] / samples.heights)
    kept = shapes[nearest].prod(axis=1) / (samples.widths * samples.heights * cover**2)
    size = budget // int(images.max() + mix.CAPTION_MOST + TEMPLATE)
    groups = [np.flatnonzero(nearest == shape) for shape in range(len(shapes))]
    rounds, dropped = batched(groups, size, ranks, steps, np.random.default_rng(3))
    used, loads, real = [], [], []
    for rows in rounds:  # [ranks, size]
        image, texts = images[nearest[rows]], samples.texts[rows]
        padded = image + texts.max(axis=1, keepdims=True)
        used.append(int((image + texts).sum()))
        loads.append(cost(padded).sum(axis=1).astype(float))
        real.append(float(cost(image + texts).sum()))
    extra = {"pixels_kept": float(kept.mean()), "enlarged": float((cover > 1).mean()), "dropped": dropped}
    return {"batch": size, "shapes": len(shapes), **figures(used, loads, real, budget), **extra}


def padded(samples: Samples, area: int, budget: int, ranks: int, steps: int) -> dict[str, Any]:
    widths, heights = Resolution(max_pixels=area, min_pixels=256).sizes(samples.widths, samples.heights)
    tokens = widths * heights // 256 + samples.texts
    size = budget // (area // 256 + mix.CAPTION_MOST + TEMPLATE)
    rounds, dropped = batched([np.arange(len(samples))], size, ranks, steps, np.random.default_rng(4))
    used, loads, real = [], [], []
    for rows in rounds:
        used.append(int(tokens[rows].sum()))
        loads.append(size * cost(tokens[rows].max(axis=1)).astype(float))
        real.append(float(cost(tokens[rows]).sum()))
    return {"batch": size, **figures(used, loads, real, budget), "dropped": dropped, "enlarged": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photographs", type=Path, help="a folder whose pictures' sizes are a second mix")
    parser.add_argument("--samples", type=int, default=200_000, help="to draw from (default: 200,000)")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--micros", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--worlds", type=int, nargs="+", default=list(WORLDS))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    mixes = {"synthetic": synthetic(args.samples)}
    if args.photographs:
        mixes["photographs"] = photographs(args.photographs, args.samples)
    rows: list[dict[str, Any]] = []
    for name, samples in mixes.items():
        for side, budget in CELLS:
            for ranks in args.worlds:
                cell = {"mix": name, "max_pixels": side * side, "tokens_per_pack": budget, "ranks": ranks}
                area, micros = side * side, [m for m in args.micros if m * ranks <= _MOST_PACKS]
                methods = {f"dstrain, {m}": packed(samples, area, budget, ranks, m, args.steps) for m in micros}
                methods["crop to bucket"] = cropped(samples, area, budget, ranks, args.steps * 4)
                methods["pad to longest"] = padded(samples, area, budget, ranks, args.steps * 4)
                for method, found in methods.items():
                    rows.append({**cell, "method": method, **found})
                    print(line(rows[-1]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {"samples": args.samples, "steps": args.steps, "attention_length": ATTENTION}
    args.out.write_text(json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    """Show one result in one line."""
    cell = f"{row['mix']:<12}{row['max_pixels'] ** 0.5:>5.0f}^2{row['tokens_per_pack']:>6}{row['ranks']:>5} ranks  "
    batch = row.get("global_batch", row.get("batch", 0))
    shares = f"used {row['budget_used']:6.1%}  spread {row['spread_max_over_mean']:6.1%} / {row['spread_range']:6.1%}  "
    kept = f"kept {row['pixels_kept']:6.1%}" if "pixels_kept" in row else "kept      -"
    rest = f"useful {row['useful']:6.1%}  {kept}  dropped {row['dropped']:5.2%}"
    return f"{cell}{row['method']:<16}batch {batch:>6}  {shares}{rest}"


if __name__ == "__main__":
    main()

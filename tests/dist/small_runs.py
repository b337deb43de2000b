"""Small training runs for the tests: a model folder, shards of ragged pictures, and a recipe."""

import json
import os
import socket
from pathlib import Path

import numpy as np
import yaml
from PIL import Image
from tiny_models import tiny_model_folder

from dstrain.data.packing.pack import pack

ROOT = Path(__file__).parents[2]
SIZES = [(32, 32), (48, 32), (32, 64), (80, 48), (37, 50), (16, 96)]  # width, height


def picture_folder(folder: Path, count: int = 24) -> Path:
    """Pictures of several shapes with captions of several lengths."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        w, h = SIZES[i % len(SIZES)]
        coarse = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((w, h)).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text("a red cat " * (1 + i % 4) + str(i))
    return folder


def prepare_run(tmp: Path, **recipe: object) -> Path:
    """Write model/, shards/ and recipe.yaml into `tmp`; returns the recipe's path."""
    tiny_model_folder(tmp / "model")
    pack(picture_folder(tmp / "pictures"), tmp / "shards", shard_samples=10)
    tree = {
        "run_dir": str(tmp / "run"),
        "seed": 5,
        "model": {"path": str(tmp / "model")},
        "data": {"shards": [str(tmp / "shards")], "workers": 1, "caption_dropout": 0.2},
        "batch": {"global_batch_size": 8, "tokens_per_pack": 64},
        "optimizer": {"lr": 1e-3, "warmup_steps": 1, "schedule": "constant", "eps": 1e-4},
        "train": {"steps": 4, "save_every": 2},
        "tracking": {"wandb": "off"},
        **recipe,
    }
    path = tmp / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def environment() -> dict[str, str]:
    """Of a launch on CPUs; what an outer launcher set is taken out."""
    left_out = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_SIZE")
    env = {k: v for k, v in os.environ.items() if k not in left_out and not k.startswith("SLURM_")}
    return env | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def in_fp32(ds: str, folder: Path) -> str:
    """The path of a shipped ds_config with fp32 weights; any other path as it is.

    The shipped ones say "auto", which is bf16 where the CPU multiplies it, and bf16 agrees to less than tests ask for.
    """
    if ds.endswith(".json"):
        return ds
    path = folder / f"{ds}.json"
    path.write_text(json.dumps(json.loads((ROOT / f"ds_configs/{ds}.json").read_text()) | {"bf16": {"enabled": False}}))
    return str(path)


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

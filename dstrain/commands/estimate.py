"""Say before a run what it needs: memory by part, bytes over each link, the shortest step, the best ds_config.

    dstrain estimate --model qwen-image --gpus 8
    dstrain estimate --model path/to/config.json --gpus 2 --gpu_gb 141 --host_gb 512 --tokens 4096+512 1024+128
    dstrain estimate --config recipe.yaml --ds_config ds_configs/zero3.json --nodes 4 --plot estimate.png

No weights are read and no GPU is used. The time is a floor: what the links and the arithmetic allow, not a forecast.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dstrain.commands.arguments import amount, amount_or_none, positive, report_file, share
from dstrain.errors import ConfigError

if TYPE_CHECKING:
    from dstrain.config import Recipe
    from dstrain.engine.estimate import Advice, Choice, Load, Machine

ABOUT = "say what a run will need: memory, traffic, time, and which ds_config is best"
PIXELS, TEXT = 256, 512  # pixels of an image token; text tokens of a sample that nobody has counted
SPEEDS = {
    "nvlink_gbs": "GB/s of a GPU to the others of its node",
    "network_gbs": "GB/s into a node, all its adapters together: 8 x 400 Gb/s beside eight H100",
    "pcie_gbs": "GB/s of a GPU to host memory, in each direction",
    "dram_gbs": "GB/s of a node's host memory",
    "nvme_gbs": "GB/s of a node's NVMe drives; 0 = none",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="qwen-image, a diffusers folder, a transformer's config.json, or a hub id (the recipe's, or qwen-image)",
    )
    parser.add_argument("--config", metavar="RECIPE", type=Path, help="recipe (YAML): what trains, batch, activations")
    parser.add_argument("--ds_config", metavar="JSON", type=Path, help="DeepSpeed JSON to look at in detail (the best)")
    parser.add_argument("--nodes", metavar="N", type=positive, default=1, help="(%(default)s)")
    parser.add_argument("--gpus", metavar="N", type=positive, default=8, help="of a node (%(default)s)")
    parser.add_argument("--gpu_gb", metavar="GB", type=amount, default=80.0, help="of a GPU (%(default)g)")
    parser.add_argument("--host_gb", metavar="GB", type=amount, default=1000.0, help="of a node (%(default)g)")
    parser.add_argument(
        "--tokens",
        metavar="IMAGE+TEXT",
        type=sample,
        nargs="+",
        help="tokens of each sample in the pack of a rank, e.g. 4096+512 for 1024 x 1024 pixels (one such sample; with"
        " a recipe, as many of its data.max_pixels as its batch.tokens_per_pack holds)",
    )
    parser.add_argument(
        "--micro_steps", metavar="N", type=positive, help="packs of a rank in an optimizer step (1, or by the recipe)"
    )
    parser.add_argument(
        "--activations", choices=("none", "attention", "full", "offload"), nargs="+", help="model.activations (full)"
    )
    parser.add_argument(
        "--encoders", choices=("resident", "offload", "absent"), help="VAE and text encoder; absent = encoded shards"
    )
    defaults = {"nvlink_gbs": 370.0, "network_gbs": 400.0, "pcie_gbs": 50.0, "dram_gbs": 400.0, "nvme_gbs": 0.0}
    for name, about in SPEEDS.items():
        kind = amount if defaults[name] else amount_or_none
        parser.add_argument(f"--{name}", metavar="X", type=kind, default=defaults[name], help=f"{about} (%(default)g)")
    parser.add_argument(
        "--peak_tflops", metavar="X", type=amount, default=989.0, help="of a GPU, dense bf16 (%(default)g)"
    )
    parser.add_argument("--efficiency", metavar="X", type=share, default=0.55, help="share of the peak (%(default)g)")
    parser.add_argument("--json", metavar="FILE.json", type=report_file, help="everything as data")
    parser.add_argument("--plot", metavar="FILE.png", type=report_file, help="memory and time over 1 to 1,024 GPUs")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the recipe")


def run(args: argparse.Namespace) -> None:
    """Print the tables, and write what is asked for."""
    from dstrain.engine.estimate import advise, estimate, table
    from dstrain.engine.estimate.advice import Candidate, counts, scaled

    machine = _machine(args)
    name, load, choice, source = _load(args, machine)
    config = _ds_config(args.ds_config, machine, choice) if args.ds_config else None
    advice = advise(load, machine, choice, config)
    given = (
        Candidate(f"{args.ds_config.stem} (given)", estimate(config, load, machine, choice))
        if config is not None
        else None
    )
    detail = given or advice.best or min(advice.candidates, key=lambda c: c.estimate.device)
    sizes = {m.ranks: m for m in (scaled(machine, count) for count in counts(machine)) if m.ranks <= 1024}
    sizes[machine.ranks] = machine
    rows = [(m, advise(load, m, choice, config)) for _, m in sorted(sizes.items())]
    print("\n".join(table.heading(name, load, machine, source)), end="\n\n")
    print("\n".join(table.parts(detail.name, detail.estimate)), end="\n\n")
    print("\n".join(table.comparison(([given] if given else []) + list(advice.candidates), advice.best)))
    print(f"advice: {advice.sentence}", end="\n\n")
    print("\n".join(table.scaling(rows)))
    if args.json:
        args.json.write_text(json.dumps(_data(name, load, choice, machine, advice, rows, given), indent=1) + "\n")
    if args.plot:
        from dstrain.engine.estimate.plot import draw

        title = f"{name}: {load.parameters / 1e9:.1f} B parameters, {load.trained / 1e9:.3g} B trained,"
        title += f" {load.samples} x {load.tokens // load.samples:,} tokens a rank, {machine.gpu_bytes / 1e9:g} GB GPUs"
        draw(rows, args.plot, title, at=[m.ranks for m, _ in rows].index(machine.ranks))


def sample(text: str) -> tuple[int, int]:
    """IMAGE+TEXT, two whole numbers of at least 1."""
    image, plus, words = text.partition("+")
    if not plus or not all(part.isascii() and part.isdigit() and 0 < int(part) < 1 << 24 for part in (image, words)):
        raise argparse.ArgumentTypeError(f"must be image tokens + text tokens, such as 4096+512, not {text!r:.40}")
    return int(image), int(words)


def _machine(args: argparse.Namespace) -> "Machine":
    from dstrain.engine.estimate import Machine

    return Machine(
        nodes=args.nodes,
        gpus=args.gpus,
        gpu_bytes=args.gpu_gb * 1e9,
        host_bytes=args.host_gb * 1e9,
        **{name.removesuffix("_gbs"): getattr(args, name) * 1e9 for name in SPEEDS},
        peak=args.peak_tflops * 1e12,
        efficiency=args.efficiency,
    )


def _ds_config(path: Path, machine: "Machine", choice: "Choice") -> dict[str, Any]:
    """Read a ds_config and refuse what training would; a folder on an NVMe drive need not be on this machine."""
    from dstrain.engine.ds_config import check_hpz, faults, load
    from dstrain.engine.ds_rules import offload

    config = load(path)
    for fault in faults(config):
        if ".nvme_path" not in fault:
            raise ConfigError(f"{path}: {fault}")
    check_hpz(config, machine.ranks, path)
    if "nvme" in (offload(config, "optimizer"), offload(config, "param")):
        if not machine.nvme:
            raise ConfigError(f"{path} offloads to an NVMe drive; say how fast it is with --nvme_gbs")
        if choice.ema != "none":
            raise ConfigError(f"{path} offloads to an NVMe drive, and ema.decay needs all states in memory; use cpu")
    return config


def _load(args: argparse.Namespace, machine: "Machine") -> tuple[str, "Load", "Choice", str]:
    """Return the model's name, the counts, what the recipe says, and where the pack's samples come from."""
    from dstrain.config import LoraConfig, load_recipe
    from dstrain.engine.estimate import Choice, load_of
    from dstrain.engine.estimate.model import read_model
    from dstrain.models.trained import choose_trained

    if args.overrides and not args.config:
        raise ConfigError(f"{args.overrides[0]!r} overrides a recipe, and none is given; add --config RECIPE")
    recipe = load_recipe(args.config, args.overrides) if args.config else None
    name = args.model or (recipe.model.path if recipe else "qwen-image")
    model, encoders = read_model(name)
    word = 4 if recipe and recipe.model.encoder_dtype == "fp32" else 2
    samples, source = args.tokens or [(4096, 512)], "--tokens" if args.tokens else "4,096 + 512, the default"
    micro_steps, choice = args.micro_steps or 1, Choice()
    if recipe:
        choose_trained(model, recipe.train.parameters, recipe.lora)
        each = -(-recipe.batch.global_batch_size // machine.ranks)  # samples of a rank
        if not args.tokens:
            samples, source = _largest(recipe)
            samples *= max(1, min(each, recipe.batch.tokens_per_pack // sum(samples[0])))
        choice = Choice.of(recipe, micro_steps=args.micro_steps or -(-each // len(samples)))
    else:
        choose_trained(model, ["*"], LoraConfig())
        choice = dataclasses.replace(choice, micro_steps=micro_steps)
    changes = {key: value for key in ("activations", "encoders") if (value := getattr(args, key))}
    if "activations" in changes:
        changes["activations"] = tuple(changes["activations"])
    load = load_of(model, samples, encoder_bytes=word * encoders)
    return name, load, dataclasses.replace(choice, **changes), source


def _largest(recipe: "Recipe") -> tuple[list[tuple[int, int]], str]:
    """Return the largest sample that a pack of the recipe can hold, and what says so."""
    image, text, most = max(1, recipe.data.max_pixels // PIXELS), TEXT, recipe.batch.tokens_per_pack
    key = "data.max_pixels"
    if image + text > most:
        text = min(text, most // 2)
        image, key = most - text, "batch.tokens_per_pack"
    return [(image, text)], f"{image:,} + {text} a sample, by {key}"


def _data(
    name: str,
    load: "Load",
    choice: "Choice",
    machine: "Machine",
    advice: "Advice",
    rows: list[tuple["Machine", "Advice"]],
    given: Any,
) -> dict[str, Any]:
    from dstrain.engine.estimate.table import as_data

    return {
        "model": name,
        "load": dataclasses.asdict(load),
        "choice": dataclasses.asdict(choice),
        "machine": dataclasses.asdict(machine),
        "advice": {"ds_config": advice.best.name if advice.best else None, "sentence": advice.sentence},
        "given": {given.name: as_data(given.estimate)} if given else {},
        "candidates": {c.name: as_data(c.estimate) for c in advice.candidates},
        "scaling": [
            {
                "gpus": m.ranks,
                "best": a.best.name if a.best else None,
                "candidates": {c.name: as_data(c.estimate) for c in a.candidates},
            }
            for m, a in rows
        ],
    }

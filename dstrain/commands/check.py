"""Check a run before it starts: recipe, ds_config, weights, data, disk and timeouts, in seconds and without a GPU.

    dstrain check --config launch/recipes/demo.yaml --ds_config ds_configs/zero2.json --ranks 8 --gpu_gb 80

One line each: error (the training would stop with it), warning (it would run, and disappoint) and ok. The exit code is
2 if there is an error, 0 otherwise.
"""

import argparse
import os
from pathlib import Path

from dstrain.commands.arguments import amount, positive
from dstrain.errors import printable

ABOUT = "check recipe, ds_config, weights, data and disk before a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments; those that a training has are spelt as there."""
    parser.add_argument("--config", metavar="RECIPE", type=Path, required=True, help="recipe (YAML)")
    parser.add_argument("--ds_config", metavar="JSON", type=Path, required=True, help="DeepSpeed JSON")
    ranks = os.environ.get("WORLD_SIZE", os.environ.get("SLURM_NTASKS", "1"))
    parser.add_argument("--ranks", metavar="N", type=positive, default=ranks, help="processes of the run (%(default)s)")
    parser.add_argument(
        "--gpu_gb", metavar="GB", type=amount, help="memory of a GPU, for a run on GPUs that are not in this machine"
    )
    parser.add_argument("--host_gb", metavar="GB", type=amount, help="memory of a node, likewise (1000)")
    parser.add_argument(
        "--disk_gb_s", metavar="N", type=amount, default=0.5, help="GB/s written to run_dir by all (%(default)s)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the recipe")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 2 if one is an error."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed would print on stdout that it guesses so
    from dstrain.checks import Machine, check

    there = torch.cuda.is_available()
    gpu_bytes = torch.cuda.get_device_properties(0).total_memory if there else 0.0
    host_bytes = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) if there else 1000e9
    machine = Machine(
        ranks=args.ranks,
        gpu=there or args.gpu_gb is not None,
        gpu_bytes=args.gpu_gb * 1e9 if args.gpu_gb else gpu_bytes,
        host_bytes=args.host_gb * 1e9 if args.host_gb else host_bytes,
        disk=args.disk_gb_s * 1e9,
    )
    findings = check(args.config, args.overrides, args.ds_config, machine)
    for finding in findings:
        print(f"{finding.level}: " + printable(finding.text, keep="\n").replace("\n", "\n  "))
    return 2 if any(finding.level == "error" for finding in findings) else 0

"""Train: deepspeed launch/train.py --ds_config ds_configs/zero3_offload.json --config launch/recipes/demo.yaml

Runs the same under deepspeed, torchrun, srun and plain python, on GPUs (nccl) and CPUs (gloo).
Exit codes: 0 finished, 75 stopped by a signal (run it again), 1 failed, 2 refused: a recipe, ds_config, shard, model
folder or checkpoint is not usable.
"""

import argparse
import logging
import os
import sys
import textwrap
import warnings
from pathlib import Path

from dstrain.config import Recipe, load_recipe
from dstrain.errors import DstrainError, TrainingHalted
from dstrain.knobs import describe

log = logging.getLogger("dstrain")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line; `--help` lists every key of a recipe."""
    keys = "\n".join(
        textwrap.fill(f"{key} = {default}", 118, initial_indent="  ", subsequent_indent="      ")
        + "\n"
        + textwrap.fill(about, 118, initial_indent="      ", subsequent_indent="      ")
        for key, default, about in describe(Recipe)
    )
    parser = argparse.ArgumentParser(
        description="Train a diffusion transformer.",
        epilog=f"keys of a recipe, with their defaults:\n{keys}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--ds_config", type=Path, required=True, help="DeepSpeed JSON, e.g. ds_configs/zero3_offload.json"
    )
    parser.add_argument("--config", type=Path, required=True, help="recipe, e.g. launch/recipes/demo.yaml")
    parser.add_argument(
        "--resume", default="auto", help="auto (newest checkpoint of run_dir, default), never, or a checkpoint folder"
    )
    parser.add_argument("--dry_run", action="store_true", help="check everything, say what would be done, and stop")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the recipe")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Check, build, run."""
    args = parse(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed calls names that torch has renamed
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(message)s" if rank == 0 else f"[rank {rank}] %(message)s",
    )
    started = False
    try:
        recipe = load_recipe(args.config, args.overrides)
        from dstrain.engine.ds_config import read_ds_config

        ds_config = read_ds_config(args.ds_config)
        from dstrain.announce import announce
        from dstrain.engine import checkpoint, distributed
        from dstrain.job import prepare
        from dstrain.trainer import Trainer

        job = prepare(recipe, args.ds_config, ds_config, distributed.environment_world()[2])
        if args.resume == "auto":
            job.check_continuation()
        elif args.resume != "never":
            checkpoint.read_manifest(Path(args.resume))
        announce(job)
        if not args.dry_run:
            started = True
            world = distributed.start()
            finished = Trainer(job, world, resume=args.resume).run()
            distributed.stop(0 if finished else 75, together=True)
    except DstrainError as e:
        # Before the ranks start, all of a node find the same; after that, an error may be one rank's own.
        if started or int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))) == 0:
            log.error("dstrain: error: %s", e)
        code = 1 if isinstance(e, TrainingHalted) else 2
        if started:
            distributed.stop(code, together=False)
        return code
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train: deepspeed launch/train.py --ds_config ds_configs/zero3_offload.json --config launch/recipes/demo.yaml

Runs the same under deepspeed, torchrun, srun and plain python, on GPUs (nccl) and CPUs (gloo).
Exit codes: 0 finished; 75 stopped as asked, and the same command goes on (SIGTERM, SIGUSR1, SIGINT, a file
RUN_DIR/STOP, train.max_minutes); 1 failed; 2 refused: a recipe, ds_config, shard, model folder or checkpoint is not
usable.
"""

import argparse
import logging
import sys
import textwrap
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from dstrain import launched
from dstrain.config import Recipe, load_recipe
from dstrain.engine.control import Control, outlive_readers
from dstrain.errors import DstrainError, TrainingHalted
from dstrain.knobs import describe
from dstrain.tracking.redact import mask_output

if TYPE_CHECKING:
    from dstrain.engine.distributed import World
    from dstrain.job import Job

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
    parser.add_argument(
        "--accept",
        default="",
        metavar="KEY[,KEY...]",
        help="recipe keys that may differ from the checkpoint's although they change what is learned",
    )
    parser.add_argument("--dry_run", action="store_true", help="check everything, say what would be done, and stop")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the recipe")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Check, build, run."""
    args = parse(argv)
    control = Control()
    control.listen()
    outlive_readers(control)
    warnings.filterwarnings("ignore", category=FutureWarning)  # DeepSpeed calls names that torch has renamed
    rank = launched.rank()
    logging.basicConfig(
        level=logging.INFO if rank == 0 else logging.WARNING,
        format="%(message)s" if rank == 0 else f"[rank {rank}] %(message)s",
    )
    mask_output()
    try:
        recipe = load_recipe(args.config, args.overrides)
        from dstrain.engine.ds_config import read_ds_config

        ds_config = read_ds_config(args.ds_config)
        from dstrain.announce import announce
        from dstrain.continuation import parse_accepted
        from dstrain.engine import checkpoint, distributed
        from dstrain.job import prepare

        accepted = parse_accepted(args.accept)
        job = prepare(recipe, args.ds_config, ds_config, distributed.environment_world()[2])
        if args.resume == "auto":
            changes = job.check_continuation(accepted)
            for line in changes if args.dry_run else ():  # a run says it when it has chosen its checkpoint
                log.warning("%s", line)
        elif args.resume != "never":
            checkpoint.read_manifest(Path(args.resume))
        announce(job)
        if args.dry_run:
            return 0
        world = distributed.start()
    except DstrainError as e:  # all ranks of a node find the same
        if launched.local_rank() == 0:
            log.error("dstrain: error: %s", e)
        return 2
    return train(job, world, control, args.resume, accepted)


def train(job: "Job", world: "World", control: Control, resume: str, accepted: Collection[str]) -> NoReturn:
    """Train with the other ranks, and end this process; an error is said once, by the rank that had it first."""
    from dstrain.engine import distributed
    from dstrain.engine.watch import Watch
    from dstrain.trainer import Trainer

    code = 1
    control.running = True
    watch = Watch(job.recipe.guard.hang_minutes * 60, control.stop)
    try:
        code = 0 if Trainer(job, world, control, watch, resume=resume, accepted=accepted).run() else 75
    except DstrainError as e:
        if watch.is_first_to_say(str(e)):
            log.error("dstrain: error: %s", e)
        code = 1 if isinstance(e, TrainingHalted) else 2
    except Exception as e:
        what = watch.missing()  # what an operation says that others take part in names nobody
        if not what:
            log.exception("dstrain: this rank failed")
        elif watch.is_first_to_say(what):
            log.error("dstrain: error: %s (%s). The last checkpoint is intact; the same command continues", what, e)
    watch.leave(together=code in (0, 75))
    distributed.stop(code, together=False)


if __name__ == "__main__":
    sys.exit(main())

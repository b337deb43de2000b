"""Look at the nodes of a run before it starts: disks, clocks, GPUs, and whether all hear each other. Takes seconds.

    srun --ntasks-per-node=8 dstrain preflight --run_dir runs/mine --gpus 8 --out bad_nodes

One process for each rank, started like the training; launch/slurm/train.sbatch does it. One line for each bad node with
the reason, also for one that never answers. The exit code is 0 if the run can start, 1 if a node is bad, and 2 if all
are, so that it must be the job or what they share.
"""

import argparse
import os
from pathlib import Path

from dstrain.commands.arguments import amount, natural, path, report_file

ABOUT = "find the bad node before a run on several"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--run_dir", metavar="DIR", type=path, required=True, help="where the run will write")
    parser.add_argument("--gpus", metavar="N", type=natural, default=0, help="GPUs that a node must have (%(default)s)")
    parser.add_argument(
        "--nodes",
        metavar="A,B",
        type=_names,
        default=[],
        help="names in the order of ranks, for nodes that never answer",
    )
    parser.add_argument(
        "--timeout", metavar="S", type=amount, default=120.0, help="seconds for each of the two rounds (%(default)g)"
    )
    parser.add_argument("--out", metavar="FILE", type=report_file, help="write the names of bad nodes, one a line")


def run(args: argparse.Namespace) -> int:
    """Check as one of the ranks."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # its stack traces would bury the reason
    from dstrain.engine.distributed import stop
    from dstrain.engine.preflight import preflight

    run_dir: Path = args.run_dir
    code = preflight(run_dir.absolute(), args.nodes, args.gpus, args.timeout, args.out)
    stop(code, together=False)  # not through Python's own end, which would wait for a worker that cannot be killed


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]

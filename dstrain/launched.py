"""Which process this is, by what its launcher set, before anything is imported or joined."""

import os


def rank() -> int:
    """Return this process's number among all: deepspeed's and torchrun's RANK, or SLURM's; 0 without a launcher."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def local_rank() -> int:
    """Return this process's number among those of its node."""
    return int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")))

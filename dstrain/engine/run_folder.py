"""The folder of a run: one run at a time writes there."""

import os
import secrets
import socket
from contextlib import ExitStack
from pathlib import Path

from dstrain.engine import checkpoint, distributed
from dstrain.errors import CheckpointError
from dstrain.storage import occupied


def check_writable(run_dir: Path) -> None:
    """Raise CheckpointError unless files can be made in `run_dir`, which is created if it is not there."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".probe-{secrets.token_hex(8)}"
        probe.write_bytes(b"x")
        probe.unlink(missing_ok=True)
    except OSError as e:
        raise CheckpointError(f"run_dir {run_dir} cannot be written: {e.strerror}; choose another run_dir") from e


def occupy(run_dir: Path) -> ExitStack:
    """Hold `run_dir` against other runs until what is returned is closed, or the process ends; collective.

    What interrupted saves have left is removed. CheckpointError on all ranks if another run holds it.
    """
    lock, error = ExitStack(), ""
    if distributed.is_main():
        job = f", SLURM job {os.environ['SLURM_JOB_ID']}" if "SLURM_JOB_ID" in os.environ else ""
        try:
            lock.enter_context(occupied(run_dir, f"process {os.getpid()} on {socket.gethostname()}{job}"))
            checkpoint.sweep(run_dir / "checkpoints")
            for left_over in run_dir.glob(".*.part"):
                left_over.unlink()
        except BlockingIOError as e:
            error = f"run_dir {run_dir} is in use by {e.strerror}; wait for its end, or choose another run_dir"
        except OSError as e:
            error = f"run_dir {run_dir} cannot be written: {e}; choose another run_dir"
    if errors := distributed.share([error] if error else []):
        raise CheckpointError(errors[0])
    return lock

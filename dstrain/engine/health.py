"""Is this node fit to train? Its disks, its GPUs and their arithmetic; each check raises Unfit with the reason."""

import os
import secrets
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

MIN_FREE = 1 << 30  # bytes: below this not even logs and compiled operators have room
_ECC = "ecc.errors.uncorrected.volatile.total,remapped_rows.pending,remapped_rows.failure"


class Unfit(Exception):
    """This node must not train; the message is the reason."""


def check_disks(run_dir: Path) -> None:
    """Write into `run_dir` and read it back; look for room there and in the folders for what is made on the node."""
    scratch = (Path(tempfile.gettempdir()), Path(os.environ.get("TORCH_EXTENSIONS_DIR", tempfile.gettempdir())))
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for folder in (run_dir, *filter(Path.is_dir, scratch)):
            if (free := shutil.disk_usage(folder).free) < MIN_FREE:
                raise Unfit(f"{folder} has {free / 1e9:.2f} GB free; at least {MIN_FREE / 1e9:.0f} are needed")
        file = run_dir / f".preflight-{secrets.token_hex(8)}"
        data = secrets.token_bytes(1 << 16)
        try:
            with file.open("wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            if file.read_bytes() != data:
                raise Unfit(f"{run_dir} gives back other bytes than were written")
        finally:
            file.unlink(missing_ok=True)
    except OSError as e:
        raise Unfit(f"{e.filename or run_dir}: {e.strerror}") from e


def check_gpus(local_rank: int, expected: int) -> int:
    """Return how many GPUs this node has; Unfit if fewer than `expected`, or none for `local_rank` among several."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < expected:
        raise Unfit(f"{count} GPUs instead of {expected}")
    if count and local_rank >= count:
        raise Unfit(f"no GPU for its task {local_rank}: it has {count}")
    return count


def check_arithmetic(device: torch.device) -> None:
    """Multiply matrices on `device`; Unfit unless every bit is right.

    Their entries are whole numbers, so small that each sum is exact in whatever order it is taken: all devices must
    find the same. The CPU proves a product C = AB by C x = A (B x) with a random x (Freivalds), without computing it.
    """
    size, rounds = (4096, 20) if device.type == "cuda" else (512, 2)
    draw = torch.Generator().manual_seed(0)
    for dtype, depth, bound in ((torch.float32, size, 8), (torch.bfloat16, 256, 1)):
        a = torch.randint(-bound, bound + 1, (size, depth), generator=draw)
        b = torch.randint(-bound, bound + 1, (depth, size), generator=draw)
        x = torch.randint(1 << 20, (size, 1), generator=draw).double()
        left, right = a.to(device, dtype), b.to(device, dtype)
        first = left @ right
        proved = torch.equal(first.cpu().double() @ x, a.double() @ (b.double() @ x))  # all below 2^53
        if not proved or not all(torch.equal(left @ right, first) for _ in range(rounds)):
            raise Unfit(f"{_name(device)} multiplies {str(dtype).removeprefix('torch.')} wrongly")


def check_memory_errors(device: torch.device) -> None:
    """Unfit if nvidia-smi, where there is one, reports memory errors that were not corrected or repairs that wait."""
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--query-gpu={_ECC}", "--format=csv,noheader,nounits", f"--id={uuid}"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except subprocess.TimeoutExpired as e:
        raise Unfit(f"nvidia-smi does not answer for {_name(device)}") from e
    except subprocess.CalledProcessError:  # this nvidia-smi does not know the question
        return
    if fault := memory_fault(said):
        raise Unfit(f"{_name(device)} ({uuid}) {fault}")


def memory_fault(said: str) -> str:
    """Return what nvidia-smi's answer (uncorrected errors, rows to remap, failed remaps) means for the GPU, or ""."""
    uncorrected, pending, failed = ([part.strip().lower() for part in said.split(",")] + [""] * 3)[:3]
    if uncorrected.isdigit() and int(uncorrected):
        return f"has {uncorrected} uncorrected memory errors since its driver started"
    if pending in ("1", "yes"):
        return "has memory rows to remap: it needs a reset"
    return "could not remap bad memory rows" if failed in ("1", "yes") else ""


def part_of_sum(device: torch.device) -> torch.Tensor:
    """Return what each rank gives to a sum over all: whole numbers from 1, 4 MiB of them, on a GPU 64 MiB.

    The sum is exact in fp32 up to 16,000 ranks.
    """
    return (torch.arange(1 << (24 if device.type == "cuda" else 20), device=device) % 1021 + 1).float()


def _name(device: torch.device) -> str:
    return f"GPU {device.index}" if device.type == "cuda" else "the CPU"

"""Who am I: rank, device and process group, the same under deepspeed, torchrun, srun and plain python."""

import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from dstrain import faults
from dstrain.errors import ConfigError

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0


def environment_world() -> tuple[int, int, int]:
    """Return (rank, local_rank, world_size) from the launcher's variables, without starting anything.

    Known are the variables of deepspeed and torchrun, then SLURM's of a job step; none of them means one process.
    ConfigError if only some are set.
    """
    for names in (("RANK", "LOCAL_RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")):
        found = [name for name in names if name in os.environ]
        if len(found) == len(names):
            rank, local_rank, size = (int(os.environ[name]) for name in names)
            return rank, local_rank, size
        if names[0] in found:
            missing = ", ".join(set(names) - set(found))
            raise ConfigError(f"{names[0]} is set but {missing} is not; start with deepspeed, torchrun or srun")
    return 0, 0, 1


def start() -> World:
    """Join the process group (nccl on GPUs, gloo on CPUs) and return this process's place in it."""
    keep_compiled_ops()
    import deepspeed

    rank, local_rank, size = environment_world()
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(size))
    if "MASTER_ADDR" not in os.environ:
        if size > 1:
            raise ConfigError("MASTER_ADDR is not set; launch/slurm/train.sbatch shows how to set it under srun")
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(f"local rank {local_rank} has no GPU: this node has {torch.cuda.device_count()}")
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        # With several threads, gradients of what is picked by index would be added up in the order that they come in.
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Nothing is read before it is written, so nothing need be filled.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        if "OMP_NUM_THREADS" not in os.environ:
            local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", size)))
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // max(1, local_size)))
    deepspeed.init_distributed(verbose=False)
    if device.type == "cpu":
        _forget_shared_memory(rank)
    _Control.group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    return World(rank, local_rank, size, device)


def _forget_shared_memory(rank: int) -> None:
    """Take away the name of DeepSpeed's shared buffer, 69 MB of memory that it would leave behind after every run.

    All ranks of the node have it open by the barrier, and keep it until they end.
    """
    dist.barrier()
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    name = f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"
    Path("/dev/shm", name).unlink(missing_ok=True)  # noqa: S108, shm_open's folder on Linux


class _Control:
    """The group in which ranks talk about the run: on the host, so that no GPU is waited for.

    It has time for the longest save; who makes the others wait without doing anything is found by watch.py.
    """

    group: dist.ProcessGroup | None = None


def gather(item: T) -> list[T]:
    """Return what each rank gives, by rank, to all of them."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, item, group=_Control.group)
    return gathered


def from_main(item: T) -> T:
    """Return what rank 0 gives, to all ranks."""
    holder = [item]
    dist.broadcast_object_list(holder, group=_Control.group)
    return holder[0]


def rank() -> int:
    """Return this process's number among all."""
    return dist.get_rank()


def world_size() -> int:
    """Return how many processes there are."""
    return dist.get_world_size()


def is_main() -> bool:
    """Whether this process writes what is written once."""
    return dist.get_rank() == 0


def share(items: Sequence[T]) -> list[T]:
    """Return what all ranks give, rank by rank, to each of them; one small sum over the ranks if nobody gives any."""
    size = dist.get_world_size()
    count = torch.tensor([len(items)])
    if size > 1:
        dist.all_reduce(count, group=_Control.group)
    if not count.item():
        return []
    return [item for part in gather(list(items)) for item in part]


def stop(code: int, *, together: bool) -> NoReturn:
    """End this process with exit code `code`; `together` waits for the other ranks first.

    Without the interpreter's teardown: there gloo's and DeepSpeed's threads now and then abort a run that is done
    ("terminate called without an active exception"), and the launcher would report it as failed.
    """
    if together and dist.is_initialized():
        barrier()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def keep_compiled_ops() -> None:
    """See to it that DeepSpeed's C++ ops are compiled once for an environment, not again at every other start.

    They are kept in the environment's own folder, since two environments sharing one rebuild each other's; and its
    own ninja comes first, since another version of ninja takes everything for changed.
    """
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
    own = str(Path(sys.executable).parent)
    if os.environ.get("PATH", "").split(os.pathsep)[0] != own:
        os.environ["PATH"] = os.pathsep.join([own, os.environ.get("PATH", "")])
    folder = Path(os.environ["TORCH_EXTENSIONS_DIR"])
    for lock in folder.glob("*/lock"):
        log.warning("%s is there: another run is compiling, or one was killed while it did; then delete it", lock)
    if not torch.cuda.is_available() and not any(folder.glob("*/*.so")):
        log.info("DeepSpeed compiles its C++ operators now, once: one to three minutes")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether `device` multiplies bf16 in hardware; without it a CPU is about ten times slower than in fp32."""
    if device.type == "cuda":  # of another machine, if there is none here
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(flags)


def barrier() -> None:
    """Wait until all ranks are here."""
    faults.reach("barrier")
    dist.barrier(group=_Control.group)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Return the elementwise sum of `values` over all ranks."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raise ConfigError on all ranks unless every rank holds the same facts; it names the fact and the ranks."""
    gathered = gather(dict(facts))
    for key, value in gathered[0].items():
        others = [f"rank {r}: {g.get(key)!r}" for r, g in enumerate(gathered) if g.get(key) != value]
        if others:
            raise ConfigError(
                f"the ranks do not agree on {key}: rank 0: {value!r}, {', '.join(others[:4])}; all nodes must see the"
                " same recipe, shards and model"
            )


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]

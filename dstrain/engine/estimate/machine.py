"""The machine that an estimate is for."""

from dataclasses import dataclass

from dstrain.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Nodes of equal GPUs, their memory in bytes and their links in bytes a second.

    The defaults of links and speeds are assumptions for H100 and H200 servers; measure yours. `efficiency` is the share
    of the peak that matrix products and attention reach together with all that lies between them.
    """

    nodes: int = 1
    gpus: int = 8  # of a node
    gpu_bytes: float = 80e9
    host_bytes: float = 1000e9  # of a node
    nvlink: float = 370e9  # of a GPU, as a collective sees it
    network: float = 400e9  # into a node, all its adapters together: 8 x 400 Gb/s
    pcie: float = 50e9  # of a GPU, in each direction
    dram: float = 400e9  # of a node
    nvme: float = 0.0  # of a node; 0 = it has no drive for this
    peak: float = 989e12  # dense bf16 FLOPs a second
    efficiency: float = 0.55
    context: float = 1e9  # what CUDA and NCCL take of a GPU before anything is allocated
    pinned_rounding: bool = True  # page-locked memory comes in powers of two, as PyTorch's allocator gives it
    process: float = 3e9  # host memory of a rank before the model: Python, PyTorch, CUDA, the loader

    def __post_init__(self) -> None:
        for key in ("nodes", "gpus"):
            if not 1 <= getattr(self, key) <= 1 << 20:
                raise ConfigError(f"{key} must be at least 1 and at most {1 << 20:,}, not {getattr(self, key)}")
        for key in ("gpu_bytes", "host_bytes", "nvlink", "network", "pcie", "dram", "peak", "efficiency"):
            if not 0 < getattr(self, key) < float("inf"):
                raise ConfigError(f"{key} must be above 0 and finite, not {getattr(self, key)}")
        if not 0 <= self.nvme < float("inf"):
            raise ConfigError(f"nvme must be at least 0 and finite, not {self.nvme}")
        if self.efficiency > 1:
            raise ConfigError(f"efficiency is a share of the peak, at most 1, not {self.efficiency}")

    @property
    def ranks(self) -> int:
        """GPUs of all nodes."""
        return self.nodes * self.gpus

    @property
    def fits_gpu(self) -> float:
        """Bytes that parts may add up to on a GPU: the rest is lost to fragmentation (8 %) or taken by CUDA."""
        return (self.gpu_bytes - self.context) / 1.08

    @property
    def fits_host(self) -> float:
        """Bytes that the ranks of a node may add up to in its memory: a tenth is left to the system and its caches."""
        return self.host_bytes * 0.9

"""Speed, memory and the loss by noise level: the numbers of a step that are derived, not measured by the engine."""

import os
import platform
import re
import resource
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dstrain.errors import ConfigError

PEAK_VARIABLE = "DSTRAIN_PEAK_TFLOPS"
GIB = 2**30
SIGMA_BINS = 4

# Peak dense bf16 rate with fp32 accumulation, in TFLOP/s, from the makers' data sheets (which print twice as much,
# for sparse matrices). The entry with the most words that all occur in the device's name counts.
PEAK_TFLOPS = {
    "A100": 312,
    "A800": 312,
    "H100": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H800": 989,
    "H200": 989,
    "H200 NVL": 835,
    "GH200": 989,
    "H20": 148,
    "B200": 2250,
    "GB200": 2500,
    "A10": 125,
    "A40": 150,
    "L4": 121,
    "L40": 181,
    "L40S": 362,
    "RTX A6000": 155,
    "RTX 6000 Ada": 364,
    "RTX 3090": 71,
    "RTX 4090": 165,
    "RTX 5090": 209,
    "MI300X": 1307,
    "MI325X": 1307,
}


def device_name(device: torch.device) -> str:
    """Return the maker's name of a GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def peak_flops(name: str) -> float | None:
    """Return the peak dense bf16 FLOP/s of the device called `name`, or None when it is not known (as on CPUs).

    DSTRAIN_PEAK_TFLOPS overrides the table; ConfigError when it is not a positive number.
    """
    override = os.environ.get(PEAK_VARIABLE)
    if override:
        try:
            tflops = float(override)
        except ValueError:
            tflops = 0.0
        if not 0 < tflops < float("inf"):
            raise ConfigError(f"{PEAK_VARIABLE}={override!r} is not a positive number of TFLOP/s, such as 989")
        return tflops * 1e12
    words = set(re.split(r"[\s-]+", name))
    matches = [entry for entry in PEAK_TFLOPS if words.issuperset(entry.split())]
    if not matches:
        return None
    return PEAK_TFLOPS[max(matches, key=lambda entry: len(entry.split()))] * 1e12


@dataclass(frozen=True)
class Throughput:
    """Turns a step's wall time and work into rates. Samples, tokens and FLOPs are those of the global batch."""

    world_size: int
    peak: float | None  # FLOP/s of one device

    @classmethod
    def of(cls, device: torch.device, world_size: int) -> "Throughput":
        """Make one for `world_size` ranks that each have a device like `device`."""
        return cls(world_size, peak_flops(device_name(device)))

    def __call__(self, step_s: float, samples: int, tokens: int, train_flops: float) -> dict[str, float]:
        """Return samples_per_s and tokens_per_s of all ranks, tflops a device, and mfu where the peak is known.

        `train_flops` is the model's arithmetic, without what checkpointing recomputes: MFU
        (model FLOPs utilisation) as the PaLM paper (arXiv 2204.02311) defines it.
        """
        achieved = train_flops / step_s / self.world_size
        rates = {
            "samples_per_s": samples / step_s,
            "tokens_per_s": tokens / step_s,
            "tflops": achieved / 1e12,
        }
        return rates if self.peak is None else rates | {"mfu": achieved / self.peak}


def memory(device: torch.device) -> dict[str, float]:
    """Return this process's peaks so far: host_rss_gib, and gpu_peak_gib (what tensors held) on a GPU."""
    peaks = {"host_rss_gib": _peak_rss() / GIB}
    if device.type == "cuda":
        peaks["gpu_peak_gib"] = torch.cuda.max_memory_allocated(device) / GIB
    return peaks


def sigma_bins(losses: Tensor, sigmas: Tensor) -> Tensor:
    """Return sums of losses and counts of samples in `SIGMA_BINS` equal ranges of sigma, from clean to noise.

    The loss at a noise level says more than the mean over all levels, which is mostly the luck of the draw. Sums and
    counts, so that they add up over packs and ranks.

    Args:
        losses: [N] per-sample losses.
        sigmas: [N] noise levels in [0, 1].

    Returns:
        [2, SIGMA_BINS] fp64: sums, counts.
    """
    place = (sigmas.float() * SIGMA_BINS).long().clamp(0, SIGMA_BINS - 1)  # [N]
    rows = torch.stack([losses.double(), torch.ones_like(losses, dtype=torch.float64)])  # [2, N]
    return torch.zeros(2, SIGMA_BINS, dtype=torch.float64).index_add(1, place, rows)


def _peak_rss() -> int:
    """Return the peak resident set in bytes.

    VmHWM belongs to the program that runs now; getrusage's peak is inherited from the process that started it.
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) * 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

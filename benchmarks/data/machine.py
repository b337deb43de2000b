"""The machine that figures were measured on."""

from pathlib import Path


def processor() -> str:
    """The processor's name, "" if it is not told."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")

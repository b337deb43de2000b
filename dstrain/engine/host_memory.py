"""How much memory of this host can still be taken."""

from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")  # where a container sees its own (cgroup v2)


def available_memory() -> float:
    """Return the bytes that can be taken without swapping, also by the container's limit; inf where nobody says."""
    return min(_of_the_machine(), _of_the_container())


def _of_the_machine() -> float:
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return float(rows["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return float("inf")


def _of_the_container() -> float:
    try:
        limit, used = ((_CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        return float("inf") if limit == "max" else float(limit) - float(used) + float(stat["inactive_file"])
    except (OSError, KeyError, ValueError):
        return float("inf")

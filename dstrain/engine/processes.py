"""Processes of this host as Linux shows them: whether one is still there, and which ones started this one."""

import os
import re
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path

_LAUNCHER = re.compile(r"(^|/)(deepspeed|torchrun)$|^deepspeed\.launcher|deepspeed/launcher|^torch\.distributed\.")


@dataclass(frozen=True)
class Stat:
    """State (R, S, D, T, Z, X = there is none), parent, and start time as the kernel counts, of a process."""

    state: str
    parent: int = 0
    born: str = ""

    @classmethod
    def of(cls, pid: int) -> "Stat":
        """Look at a process of this host."""
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return cls("X")
        return cls(fields[0], int(fields[1]), fields[19])


@dataclass(frozen=True)
class Process:
    """A process of a host, safe against another that gets its number later."""

    host: str
    pid: int
    born: str  # see Stat
    place: str  # which kernel and which of its containers: hosts may share a name

    @classmethod
    def of(cls, pid: int) -> "Process":
        """Describe a process of this host."""
        return cls(socket.gethostname(), pid, Stat.of(pid).born, _place())

    @property
    def is_here(self) -> bool:
        """Whether it is of this host."""
        return self.place == _place()

    @property
    def alive(self) -> bool:
        """Whether it is there and not a zombie; only for one of this host."""
        stat = Stat.of(self.pid)
        return stat.born == self.born and stat.state not in "ZX"

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def launchers() -> list[Process]:
    """Return the processes above this one that are deepspeed's or torchrun's: they die without telling anybody."""
    found, pid = [], os.getppid()
    while pid > 1:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:4]
        except OSError:
            break
        if not any(_LAUNCHER.search(word) for word in words):
            break
        found.append(Process.of(pid))
        pid = Stat.of(pid).parent
    return found


@cache
def _place() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return socket.gethostname()

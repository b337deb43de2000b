"""Watching over the ranks: who makes the others wait is named, and the run ends instead of hanging.

Each rank's main thread says where it is (`Watch.at`); a thread of it tells a store, kept by rank 0, again and again.
Rank 0 compares. It finds a rank that is silent (stopped, frozen, its node gone) and one whose main thread is behind the
others. The others find by themselves that rank 0 no longer answers, that a process of their own node has died, and that
their launcher has. NCCL would say that something timed out; gloo, that a peer closed the connection.
"""

import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import NoReturn

import torch.distributed as dist

from dstrain.engine import distributed
from dstrain.engine.processes import Process, launchers

log = logging.getLogger(__name__)
GRACE = 3.0  # seconds for ranks to end by themselves after one has


@dataclass(frozen=True)
class _Beat:
    """Where a rank is: tick and progress grow with time and with work; idle: seconds since the last progress."""

    tick: int
    progress: int
    where: str
    idle: float
    left: bool


class Watch:
    """Watches from its creation, which is collective, until `leave`.

    seconds: without progress after which the run ends. on_orphaned: is told when the launcher is gone.
    """

    def __init__(self, seconds: float, on_orphaned: Callable[[str], None]) -> None:
        self._seconds = seconds
        self._interval = min(5.0, max(0.25, seconds / 20))
        self._on_orphaned = on_orphaned
        self._rank, self._size = distributed.rank(), distributed.world_size()
        self._launchers = launchers()
        self._tick, self._progress, self._where, self._moved = 0, 0, "start", time.monotonic()
        self._left = threading.Event()
        self._processes = distributed.gather(Process.of(os.getpid()))
        host, wait, port = os.environ["MASTER_ADDR"], timedelta(seconds=60), 0
        if self._rank == 0:
            self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=wait)
            port = self._store.port
        port = distributed.from_main(port)
        if self._rank:
            self._store = dist.TCPStore(host, port, is_master=False, timeout=wait)
        self._tell()
        distributed.barrier()  # every rank's first beat is there
        self._heard = time.monotonic()  # when the store last answered
        self._beats: dict[int, tuple[int, float]] = {}  # rank 0: each rank's last tick, and when it was new
        for work in (self._talk, self._look):
            threading.Thread(target=work, name="dstrain-watch", daemon=True).start()

    def at(self, where: str) -> None:
        """Say that the main thread has got on, and where it is now; all ranks say the same in turn."""
        self._progress, self._where, self._moved = self._progress + 1, where, time.monotonic()

    def busy(self) -> None:
        """Say that something goes on, in whatever thread."""
        self._moved = time.monotonic()

    def leave(self, *, together: bool) -> None:
        """Stop watching on this rank; `together` waits for the others first, however long rank 0 is busy alone."""
        with suppress(RuntimeError):  # of a store whose keeper has gone first
            if together and self._rank:
                self.at("the end, where rank 0 is waited for")
                while not self._store.check(["end"]):
                    time.sleep(0.1)
            self._left.set()
            self._tell()
            if together and not self._rank:
                self._store.set("end", "")
                end = time.monotonic() + GRACE
                while time.monotonic() < end and not all(beat.left for beat in self._all_beats()):
                    time.sleep(0.02)
        self._left.set()

    def is_first_to_say(self, message: str) -> bool:
        """Whether no other rank has said the same; true if rank 0, who keeps count, no longer answers."""
        try:
            return self._store.add(f"said {message}", 1) == 1
        except RuntimeError:
            return True

    def missing(self) -> str:
        """Say which processes of this host have gone without a word, "" if none has; takes some seconds."""
        end = time.monotonic() + GRACE
        while time.monotonic() < end:
            if self._left.is_set():  # another thread has said why all end, and ends this process
                time.sleep(self._interval + GRACE)
            if gone := self._gone():
                return self._named(gone, "is gone: it was killed or has crashed")
            time.sleep(0.1)
        return ""

    def _tell(self) -> None:
        self._tick += 1
        beat = _Beat(self._tick, self._progress, self._where, time.monotonic() - self._moved, self._left.is_set())
        self._store.set(f"beat{self._rank}", json.dumps(asdict(beat)))

    def _all_beats(self) -> list["_Beat"]:
        return [_Beat(**json.loads(text)) for text in self._store.multi_get([f"beat{r}" for r in range(self._size)])]

    def _talk(self) -> None:
        """Tell where this rank is, and hear whether the run is to end; rank 0 decides."""
        for _ in self._every(self._interval):
            try:
                self._tell()
                if self._rank == 0 and (verdict := self._judge(self._all_beats())):
                    self._store.set("verdict", json.dumps(verdict))
                verdict = json.loads(self._store.get("verdict")) if self._store.check(["verdict"]) else None
            except RuntimeError:
                if not self._left.wait(GRACE):
                    self._end([0], self._named([0], "no longer answers"))
                return
            self._heard = time.monotonic()
            if verdict:  # rank 0 keeps the store until all have heard it, and who hangs has time to show where
                culprits, message = verdict
                self._end(culprits, message, self._interval + 0.5)

    def _every(self, seconds: float) -> Iterator[None]:
        """Yield again and again until this rank leaves.

        If this process itself was stopped for a while and goes on now, all begins anew instead of judging the others.
        """
        last = time.monotonic()
        while not self._left.wait(seconds):
            now = time.monotonic()
            if now - last > self._interval + GRACE + self._seconds / 2:
                self._moved = self._heard = now
                self._beats.clear()
            last = now
            yield

    def _look(self) -> None:
        """See what needs no store, and is seen also when that does not answer."""
        for _ in self._every(min(1.0, self._interval)):
            if not all(launcher.alive for launcher in self._launchers):
                self._launchers = []
                self._on_orphaned("its launcher is gone")
            if time.monotonic() - self._heard > self._seconds:
                self._end([0], self._named([0], f"has been silent for {self._seconds:.0f} s"))
            if (gone := self._gone()) and not self._left.wait(GRACE):
                self._end(gone, self._named(gone, "is gone: it was killed or has crashed"))

    def _judge(self, beats: list["_Beat"]) -> tuple[list[int], str] | None:
        """Return the ranks that are waited for and what to say of them, if it is time."""
        now = time.monotonic()
        for r, beat in enumerate(beats):
            if r not in self._beats or self._beats[r][0] != beat.tick:
                self._beats[r] = beat.tick, now
        here = [r for r, beat in enumerate(beats) if not beat.left]
        if silent := [r for r in here if now - self._beats[r][1] > self._seconds]:
            what = f"has been silent for {self._seconds:.0f} s; it was last at: {beats[silent[0]].where}"
            return silent, self._named(silent, what)
        if not here or min(beats[r].idle for r in here) < self._seconds:
            return None
        least = min(beats[r].progress for r in here)
        behind = [r for r in here if beats[r].progress == least]
        what = f"nothing has moved for {self._seconds:.0f} s"
        if len(behind) == len(here):
            return behind, f"{what}; all ranks are at: {beats[behind[0]].where}"
        return behind, f"{what}: all wait for {self._named(behind, f'which is at: {beats[behind[0]].where}')}"

    def _gone(self) -> list[int]:
        """Ranks of this host whose process has ended without a word."""
        dead = [r for r, process in enumerate(self._processes) if process.is_here and not process.alive]
        if not dead or time.monotonic() - self._heard > 3 * self._interval:  # the store may not answer
            return dead
        with suppress(RuntimeError):
            beats = self._all_beats()
            return [r for r in dead if not beats[r].left]
        return dead

    def _named(self, ranks: list[int], what: str) -> str:
        more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
        return ", ".join(f"rank {r} ({self._processes[r]})" for r in ranks[:4]) + f"{more} {what}"

    def _end(self, culprits: list[int], message: str, pause: float = 0.0) -> NoReturn:
        """End this process, after saying why, and stopped ones of this host, which cannot end themselves."""
        self._left.set()  # that others end now is no news
        others = [r for r in range(self._size) if r not in culprits]
        if self._rank == min(others, default=0):
            log.error(
                "dstrain: error: %s. The run ends; what was saved is intact, and the same command continues",
                message,
            )
        if self._rank in culprits or not others or self._rank == others[0]:
            faulthandler.dump_traceback(sys.__stderr__ or 2)
        time.sleep(pause)
        for process in (self._processes[r] for r in culprits if r != self._rank):
            if process.is_here and process.alive:
                os.kill(process.pid, signal.SIGKILL)
        logging.shutdown()
        os._exit(1)

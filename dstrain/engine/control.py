"""Wishes to stop: signals, a STOP file, a time limit, a launcher that is gone. Seen by one rank, agreed by all.

A thread notes the wish, since a handler waits for the main thread, and that may wait for other ranks; the trainer looks
at it at the end of each step, where one sum over the ranks tells all of them. Imports nothing heavy, so that signals
are caught from the start.
"""

import os
import signal
import sys
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from dstrain import launched

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
STOP_FILE = "STOP"
HOLD_VARIABLE = "DSTRAIN_HOLD_FILE"  # a file that says that a person has stopped the run, not the machine


class Control:
    """What this process has been asked to do."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.reason = ""  # to stop; empty = go on
        self.by_person = False  # who does not want it to come back by itself
        self.running = False  # once the ranks work together, they stop together
        self._signals = Counter[int]()
        self._looked = 0.0

    def listen(self) -> None:
        """Note SIGTERM, SIGUSR1, SIGINT and SIGHUP from now on; the third ends the process without saving."""
        heard, told = os.pipe()
        os.set_blocking(told, False)
        signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup means to outlive it
                signal.signal(number, lambda number, frame: None)
        threading.Thread(target=self._hear, args=(heard,), name="dstrain-signals", daemon=True).start()

    def stop(self, reason: str, *, by_person: bool = False) -> None:
        """Ask for a stop."""
        self.reason, self.by_person = self.reason or reason, self.by_person or by_person

    def look(self, run_dir: Path) -> None:
        """Look for RUN_DIR/STOP, once a second at most; for one rank."""
        if time.monotonic() - self._looked > 1:
            self._looked = time.monotonic()
            if (run_dir / STOP_FILE).exists():
                self.stop(f"{run_dir / STOP_FILE}", by_person=True)

    def obeyed(self, run_dir: Path) -> None:
        """Take away the STOP file, and tell a batch script if a person wanted the stop; by one rank."""
        self.forget(run_dir)
        if self.by_person and (hold := os.environ.get(HOLD_VARIABLE)):
            Path(hold).touch()

    def forget(self, run_dir: Path) -> None:
        """Take away a STOP file that there is no need to obey any more; by one rank."""
        (run_dir / STOP_FILE).unlink(missing_ok=True)

    def _hear(self, heard: int) -> None:
        while number := os.read(heard, 1):
            if number[0] in SIGNALS:
                self._on_signal(number[0])

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        self._signals[number] += 1
        if not self.running:
            _say(f"stopped by {name} before the start; there is nothing to save")
            os._exit(75)
        if self._signals.total() == 1:
            self.stop(name, by_person=number == signal.SIGINT)
            _say(f"{name}: stopping after this step, with a checkpoint; a third one ends it without")
        elif self._signals[number] > 2:  # SLURM sends SIGTERM twice
            _say(f"{name}: ended without saving; what was saved before is intact")
            os._exit(1)


def _say(text: str) -> None:
    """Print at once, where logging could wait for the main thread; rank 0 speaks for all that were told."""
    if launched.rank() == 0:
        with suppress(OSError):
            os.write(2, f"{text}\n".encode())


class Unbroken:
    """A stream that outlives its reader: when that is gone, `control` is asked to stop, and what is written is lost."""

    def __init__(self, stream: TextIO, control: Control) -> None:
        self._stream, self._control = stream, control

    def write(self, text: str) -> int:
        """Write, if anybody reads."""
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._lost()
            return len(text)

    def flush(self) -> None:
        """Flush, if anybody reads."""
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._lost()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lost(self) -> None:
        self._control.stop("nobody reads its output any more")
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


def outlive_readers(control: Control) -> None:
    """Let this process go on when what reads its stdout or stderr, a launcher or a pager, is gone."""
    sys.stdout, sys.stderr = (Unbroken(stream, control) for stream in (sys.stdout, sys.stderr))

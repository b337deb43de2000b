"""Saving while the training goes on: copied between two updates, written by a thread, committed by all ranks at once.

A save begins at the end of a step. From then to the next update nothing changes what is saved, so a thread copies it to
host memory meanwhile, and only then writes the file. Each rank writes what it holds (see state.py) and knows the digest
of it; the checkpoint is there when rank 0, told by all ranks that their files are durable, has renamed its folder.
"""

import logging
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dstrain import faults
from dstrain.engine import checkpoint, distributed
from dstrain.engine.host_memory import available_memory
from dstrain.engine.master import Master
from dstrain.engine.state import Piece, file_name, write_state
from dstrain.errors import CheckpointError, DstrainError
from dstrain.storage import idle, make_folder, write_json

MIB = 2**20
log = logging.getLogger(__name__)


class Saver:
    """Saves the state of a run as folder/step-N and keeps the newest `keep`, besides all multiples of `keep_every`.

    regular: of its multiples the newest is kept as well; it is the one that a run goes back to.
    background: "on" and "auto" write beside the training; "auto" only where every node has memory for the copy.
    busy: called again and again while a file is written, from the thread that does.
    `begin` and `commit` are collective.
    """

    def __init__(
        self,
        master: Master,
        folder: Path,
        *,
        keep: int = 2,
        keep_every: int = 0,
        regular: int = 0,
        background: Literal["auto", "on", "off"] = "off",
        busy: Callable[[], None] = idle,
    ) -> None:
        self._master, self._folder, self._busy = master, folder, busy
        self._keep, self._keep_every, self._regular = keep, keep_every, regular
        self._background = "off" if master.is_on_disk else background
        self._copy: _Copy | None = None
        self._write: _Write | None = None
        self._retiring: threading.Thread | None = None  # removing what is old takes a while
        self._need = 0  # bytes of a checkpoint

    @property
    def saving(self) -> bool:
        """Whether a save has begun that is not committed; the same on all ranks."""
        return self._write is not None

    @property
    def written(self) -> bool:
        """Whether this rank has nothing to write any more, and `commit` would not wait for it."""
        return self._write is None or not self._write.thread.is_alive()

    @property
    def in_background(self) -> bool:
        """Whether the save that has begun is written while the training goes on; the same on all ranks."""
        return self._write is not None and self._write.copied

    def begin(self, step: int, facts: Mapping[str, Any]) -> None:
        """Begin to save the state after `step` updates. The state must not change before `Master.may_change`.

        facts: what goes into the manifest besides.

        Raises:
            CheckpointError: there is no room, or the folder cannot be made; on all ranks.
        """
        assert self._write is None, "commit the last one first"
        faults.reach("save", step)
        partial = self._folder / f".{checkpoint.name(step)}.partial"
        pieces = self._master.pieces()
        size = sum(p.size * dtype.itemsize for p in pieces for dtype in p.kinds.values())
        # Page-locked memory is taken by powers of two.
        room = 1 << (size - 1).bit_length() if torch.cuda.is_available() and size else size
        room = 0 if self._copy else room
        needs = distributed.gather(_Need(size, room, socket.gethostname(), available_memory()))
        self._need = sum(need.size for need in needs)
        background = self._background != "off" and (self._background == "on" or _has_room(needs))
        if not background and self._background == "auto":
            log.info("checkpoints are written while the training waits: the host has no memory for a copy of the state")
            self._background = "off"

        def prepare() -> None:
            if distributed.is_main():
                self.finish()
                checkpoint.sweep(self._folder)
                self._check_space()
                make_folder(partial)
            if background and (self._copy is None or self._copy.pieces != pieces):
                self._copy = None  # before its memory is taken again
                self._copy = _Copy(pieces)

        self._together(step, prepare)
        self._write = _Write(self._master, step, partial, pieces, self._copy if background else None, facts, self._busy)
        if not background:
            self._write.thread.join()

    def commit(self) -> Path:
        """Publish the save that has begun, once all ranks have written; returns its folder.

        Raises:
            CheckpointError: a rank could not write, on all ranks; what is half there is removed, older checkpoints are
                intact.
        """
        assert self._write is not None
        write, self._write = self._write, None
        parts = self._together(write.step, write.result)
        final = self._folder / checkpoint.name(write.step)

        def publish() -> None:
            files = {file: entry for part in parts for file, entry in part.items()}
            manifest = {**write.facts, "format": checkpoint.FORMAT, "step": write.step, "files": files}
            write_json(write.partial / checkpoint.MANIFEST, checkpoint.sealed(manifest))
            checkpoint.publish(write.partial, final)

        self._together(write.step, publish if distributed.is_main() else None)
        if distributed.is_main() and write.copied:
            self._retiring = threading.Thread(
                target=self._retire, args=(write.step,), name="dstrain-retire", daemon=True
            )
            self._retiring.start()
        elif distributed.is_main():
            self._retire(write.step)
        return final

    def finish(self) -> None:
        """Wait for the threads, without publishing what is written."""
        if self._write is not None:
            self._write.thread.join()
        if self._retiring is not None:
            self._retiring.join()

    def _together(self, step: int, work: Callable[[], Any] | None) -> list[Any]:
        """Do a part of the work, and stop on all ranks if it failed on one; returns what each rank's gave."""
        result, error = None, ""
        try:
            result = work() if work else None
        except (OSError, RuntimeError, DstrainError) as e:
            error = f"rank {distributed.rank()}: {e}"
        gathered = distributed.gather((result, error))
        if errors := [e for _, e in gathered if e]:
            if distributed.is_main():
                checkpoint.sweep(self._folder)
            distributed.barrier()  # all ranks leave after the clean-up
            raise CheckpointError(
                f"{self._folder / checkpoint.name(step)}: not saved ({'; '.join(errors[:4])}); older checkpoints are"
                f" intact; one takes {self._need / MIB:,.1f} MiB, and {_free(self._folder) / MIB:,.1f} MiB are free"
            )
        return [r for r, _ in gathered]

    def _check_space(self) -> None:
        need = self._need + self._need // 50 + (1 << 20)  # headers, the manifest, and what the file system takes
        if need > _free(self._folder):
            raise CheckpointError(
                f"No space left: it takes {need / MIB:,.1f} MiB with the least room to spare; delete something there"
            )

    def _retire(self, step: int) -> None:
        try:
            older = [p for p in checkpoint.committed(self._folder) if checkpoint.step_of(p) < step]
        except CheckpointError as e:
            log.warning("old checkpoints stay: %s", e)
            return
        kept = [p for p in older if self._keep_every and checkpoint.step_of(p) % self._keep_every == 0]
        if self._regular and step % self._regular:
            kept += [p for p in older if checkpoint.step_of(p) % self._regular == 0][:1]
        for path in older[self._keep - 1 :]:
            if path not in kept:
                checkpoint.retire(path)


class _Write:
    """One rank's part of a save: `thread` copies, if there is a copy, then writes; `result` says how it ended."""

    def __init__(
        self,
        master: Master,
        step: int,
        partial: Path,
        pieces: Sequence[Piece],
        copy: "_Copy | None",
        facts: Mapping[str, Any],
        busy: Callable[[], None],
    ) -> None:
        self._busy = busy
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self.step, self.partial, self.facts = step, partial, facts
        self._master, self._pieces, self._copy = master, pieces, copy
        self.copied = copy is not None
        self._optimizer_step = master.optimizer_step
        self._entry: tuple[int, str] | None = None
        self._error: BaseException | None = None
        self._ready = torch.cuda.current_stream().record_event() if torch.cuda.is_available() else None
        master.may_change.clear()
        self.thread = threading.Thread(target=self._run, name="dstrain-save", daemon=True)
        self.thread.start()

    @property
    def _file(self) -> Path:
        return self.partial / file_name(distributed.rank())

    def result(self) -> dict[str, tuple[int, str]]:
        """Wait, and return {file name: (size, SHA-256)}; raises what the thread met."""
        self.thread.join()
        if self._error is not None:
            raise self._error
        assert self._entry is not None
        return {self._file.name: self._entry}

    def _counted(self, tensors: Iterator[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
        for item in tensors:
            self._busy()
            yield item

    @torch.no_grad()
    def _run(self) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # a thread of its own begins with the first GPU
            tensors = self._master.tensors()
            if self._copy is not None:
                tensors = self._copy.take(tensors, self._ready)
                self._master.may_change.set()
            self._entry = write_state(self._file, self._pieces, self._counted(tensors), self._optimizer_step)
        except BaseException as e:
            self._error = e if isinstance(e, OSError | RuntimeError | DstrainError) else RuntimeError(repr(e))
        finally:
            self._master.may_change.set()


class _Copy:
    """Host memory for the state of this rank, taken once and used for every save."""

    def __init__(self, pieces: list[Piece]) -> None:
        self.pieces = pieces
        places = [(kind, dtype, piece.size) for piece in pieces for kind, dtype in piece.kinds.items()]
        ends = [0, *accumulate(-(-size * dtype.itemsize // 8) * 8 for _, dtype, size in places)]
        try:  # page-locked, so that the GPU copies beside its work
            memory = torch.empty(ends[-1], dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        except RuntimeError:  # the system does not let us
            memory = torch.empty(ends[-1], dtype=torch.uint8)
        views = (
            memory[begin : begin + size * dtype.itemsize].view(dtype) for begin, (_, dtype, size) in zip(ends, places)
        )
        self._buffers: list[dict[str, Tensor]] = [{kind: next(views) for kind in piece.kinds} for piece in pieces]

    def take(self, tensors: Iterator[dict[str, Tensor]], ready: Any) -> Iterator[dict[str, Tensor]]:
        """Copy the tensors of each piece, which are whole after the CUDA event `ready`; returns the copies."""
        if ready is None:
            self._fill(tensors)
        else:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                self._fill(tensors)
            stream.synchronize()
        return iter(self._buffers)

    def _fill(self, tensors: Iterator[dict[str, Tensor]]) -> None:
        for buffers, found in zip(self._buffers, tensors, strict=True):
            for kind, buffer in buffers.items():
                buffer.copy_(found[kind], non_blocking=True)


@dataclass(frozen=True)
class _Need:
    """What a rank needs for a save: bytes of its file, of memory for a copy that it does not have yet, and where."""

    size: int
    room: int
    host: str
    free: float  # bytes of memory


def _has_room(needs: list[_Need]) -> bool:
    """Whether each host has memory for the copies of its ranks, and a tenth of that to spare."""
    for host in {need.host for need in needs}:
        mine = [need for need in needs if need.host == host]
        wanted = sum(need.room for need in mine)
        if wanted and 1.1 * wanted > min(need.free for need in mine if need.room):
            return False
    return True


def _free(folder: Path) -> int:
    """Bytes that are free where `folder` is, or will be."""
    for place in (folder, *folder.absolute().parents):
        with suppress(OSError):
            return shutil.disk_usage(place).free
    return 0

"""Checkpoints that are whole or not there: staged, digested by all ranks, committed by one rename.

Each rank writes the trained state that it holds as safetensors (see state.py). DeepSpeed's own checkpoints are not
used: its `latest` file is written before all shards are, nothing is synced to disk, its loader unpickles whatever it
finds, and another world size needs a conversion (each seen with DeepSpeed 0.19.8).
"""

import json
import logging
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from dstrain.engine.state import file_name
from dstrain.errors import CheckpointError
from dstrain.storage import fsync_dir, fsync_file, sha256, write_json

if TYPE_CHECKING:
    from dstrain.engine.engine import Engine

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
FORMAT = 2


def save(engine: "Engine", folder: Path, step: int, facts: Mapping[str, Any], keep: int) -> Path:
    """Save the state after `step` optimizer steps as folder/step-N; collective.

    Args:
        engine: what is saved.
        folder: RUN_DIR/checkpoints, the same on all ranks.
        step: optimizer steps done.
        facts: what must agree on resume (see `check_facts`) and what is good to know; goes into the manifest.
        keep: newest checkpoints to keep.

    Raises:
        CheckpointError: a rank could not write, on all ranks; the half-written folder is removed, older checkpoints
            are intact.
    """
    name = f"step-{step:08d}"
    partial, final = folder / f".{name}.partial", folder / name
    main = dist.get_rank() == 0

    def phase(work: Callable[[], Any], everywhere: bool) -> list[Any]:
        """Do one part of the work, and stop on all ranks if it failed on one."""
        result, error = None, ""
        try:
            result = work() if everywhere or main else None
        except (OSError, RuntimeError) as e:
            error = f"rank {dist.get_rank()}: {e}"
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, (result, error))
        if errors := [e for _, e in gathered if e]:
            if main:
                shutil.rmtree(partial, ignore_errors=True)
            dist.barrier()  # all ranks leave after the clean-up
            free = shutil.disk_usage(folder.parent).free / 2**30
            raise CheckpointError(f"{final}: not saved ({'; '.join(errors)}); {free:.2f} GiB are free there")
        return [r for r, _ in gathered]

    def begin() -> None:
        for left_over in folder.glob(".step-*.partial"):
            shutil.rmtree(left_over)
        partial.mkdir(parents=True)

    def commit() -> None:
        manifest = {**facts, "format": FORMAT, "step": step, "files": {n: e for part in parts for n, e in part.items()}}
        write_json(partial / MANIFEST, manifest)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step, passed over on resume
        partial.rename(final)
        fsync_dir(folder)
        for old in [p for p in _committed(folder) if p.name < name][keep - 1 :]:
            shutil.rmtree(old)

    phase(begin, everywhere=False)
    own = partial / file_name(dist.get_rank())
    phase(lambda: engine.master.write(own), everywhere=True)
    # Each rank reads its own file again, so that none is missed where a network drive shows others' late.
    parts = phase(lambda: {own.name: _digest(own)}, everywhere=True)
    phase(commit, everywhere=False)
    return final


def _digest(path: Path) -> tuple[int, str]:
    fsync_file(path)
    return path.stat().st_size, sha256(path)


def find(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint of a run, or None if there are none; collective.

    Damaged ones are named and passed over; CheckpointError if all are damaged, rather than starting over in silence.
    """
    choice: list[Any] = [_committed(folder) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(choice)
    for path in choice[0]:
        problem = damage(path)
        if not problem:
            return path
        if dist.get_rank() == 0:
            log.warning("PASSING OVER a damaged checkpoint: %s; trying the one before", problem)
    if choice[0]:
        raise CheckpointError(f"{folder}: all {len(choice[0])} checkpoints are damaged; remove them to start over")
    return None


def set_aside_newer(folder: Path, step: int) -> None:
    """Hide a run's checkpoints after `step`, lest what goes on from there comes back to the other branch; collective.

    folder: RUN_DIR/checkpoints of the run that goes on; another run's checkpoints are never touched.
    """
    if dist.get_rank() == 0:
        for newer in _committed(folder):
            if newer.name > f"step-{step:08d}":
                hidden = newer.with_name(f".set-aside-{newer.name}")
                number = 1
                while hidden.exists():
                    number += 1
                    hidden = newer.with_name(f".set-aside-{newer.name}-{number}")
                newer.rename(hidden)
                log.warning("%s is newer than what is continued; it is kept as %s", newer, hidden.name)
    dist.barrier()


def newest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of RUN_DIR/checkpoints by its name, undamaged or not; not collective."""
    return next(iter(_committed(folder)), None)


def damage(path: Path) -> str:
    """Return what is wrong with a checkpoint, or ""; collective, each rank digests its share of the files."""
    try:
        manifest = read_manifest(path)
        problem = damaged_file(path, {name: manifest["files"][name] for name in _own_share(sorted(manifest["files"]))})
    except CheckpointError as e:
        problem = str(e)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, problem)
    return next((p for p in gathered if p), "")


def damaged_file(path: Path, files: Mapping[str, tuple[int, str]]) -> str:
    """Return what is wrong with the first file of a checkpoint that is not as its manifest's entry says, or ""."""
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != size:
            return f"{file} has {file.stat().st_size} bytes instead of {size}"
        if sha256(file) != digest:
            return f"{file} has another SHA-256 than its manifest says"
    return ""


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest; CheckpointError if it is not one of ours."""
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text())
        escapes = [n for n in manifest["files"] if Path(n).is_absolute() or ".." in Path(n).parts]
        if manifest["format"] != FORMAT or escapes or not isinstance(manifest["step"], int):
            raise CheckpointError(f"{file}: format {manifest['format']}, this version reads {FORMAT}")
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{file}: not a checkpoint of dstrain ({e})") from e
    return manifest


def check_facts(manifest: Mapping[str, Any], facts: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError if the run that saved `path` differs from this one in one of `facts`.

    Digests among them are not spelt out where something else says what has changed.
    """
    changed = [key for key, value in facts.items() if manifest.get(key) != value]
    if changed:
        plain = [f"{k} was {manifest.get(k)!r}, is {facts[k]!r}" for k in changed if not _is_digest(manifest.get(k))]
        shown = plain or [f"{key} is another" for key in changed]
        raise CheckpointError(
            f"{path}: cannot be continued, since this run differs: {'; '.join(shown)}."
            " Change it back, or choose another run_dir"
        )


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and all(c in "0123456789abcdef" for c in value)


def _committed(folder: Path) -> list[Path]:
    """Checkpoints, newest first."""
    return sorted((p for p in folder.glob("step-*") if (p / MANIFEST).is_file()), reverse=True)


def _own_share(items: list[Any]) -> Iterator[Any]:
    rank, size = dist.get_rank(), dist.get_world_size()
    return (item for i, item in enumerate(items) if i % size == rank)


def check_writable(run_dir: Path) -> None:
    """Raise CheckpointError unless files can be made in `run_dir`, which is created if it is not there."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".probe-{secrets.token_hex(8)}"
        probe.write_bytes(b"x")
        probe.unlink(missing_ok=True)
    except OSError as e:
        raise CheckpointError(f"run_dir {run_dir} cannot be written: {e.strerror}; choose another run_dir") from e

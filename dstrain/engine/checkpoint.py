"""Checkpoints that are whole or not there: staged, digested by all ranks, committed by one rename.

DeepSpeed writes the shards; everything else is ours, because its own `latest` file is written before all shards are,
nothing is synced to disk, and its loader unpickles whatever it finds (each seen in tests of DeepSpeed 0.19.8). Here a
file is opened only after its digest, and only tensors and four harmless types are unpickled.
"""

import json
import logging
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dstrain.engine.engine import Engine
from dstrain.errors import CheckpointError
from dstrain.storage import fsync_dir, fsync_file, sha256, write_json

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
FORMAT = 1


def save(engine: Engine, folder: Path, step: int, facts: Mapping[str, Any], keep: int) -> Path:
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

    def written() -> list[Path]:
        return sorted(p for p in partial.rglob("*") if p.is_file())

    def commit() -> None:
        manifest = {**facts, "format": FORMAT, "step": step, "files": {n: e for part in parts for n, e in part.items()}}
        write_json(partial / MANIFEST, manifest)
        shutil.rmtree(final, ignore_errors=True)  # a damaged one of the same step, passed over on resume
        partial.rename(final)
        fsync_dir(folder)
        for old in [p for p in _committed(folder) if p.name < name][keep - 1 :]:
            shutil.rmtree(old)

    phase(begin, everywhere=False)
    phase(lambda: _write_shards(engine, folder, partial.name), everywhere=True)
    files = phase(written, everywhere=False)[0]  # one listing for all: on a network drive each node may see its own
    parts = phase(lambda: {str(p.relative_to(partial)): _digest(p) for p in _own_share(files)}, everywhere=True)
    phase(commit, everywhere=False)
    return final


def _write_shards(engine: Engine, folder: Path, tag: str) -> None:
    """Let DeepSpeed write. Its barriers must meet on all ranks, so a failed write is raised only after them."""
    writer = engine.ds.checkpoint_engine
    write, errors = writer.save, list[Exception]()

    def save(state_dict: Any, path: str) -> None:
        try:
            write(state_dict, path)
        except (OSError, RuntimeError) as e:
            errors.append(e)

    writer.save = save
    try:
        engine.ds.save_checkpoint(str(folder), tag=tag, save_latest=False, exclude_frozen_parameters=True)
    finally:
        writer.save = write
        for script in folder.glob("zero_to_*.py"):  # DeepSpeed leaves scripts; code has no place here
            script.unlink(missing_ok=True)
    if errors:
        raise errors[0]


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


def set_aside_newer(path: Path) -> None:
    """Hide the checkpoints after `path`: a run that goes on from there must not come back to the other branch."""
    if dist.get_rank() == 0:
        for newer in _committed(path.parent):
            if newer.name > path.name:
                hidden = newer.with_name(f".set-aside-{newer.name}")
                shutil.rmtree(hidden, ignore_errors=True)
                newer.rename(hidden)
                log.warning("%s is newer than what is continued; it is kept as %s", newer, hidden.name)
    dist.barrier()


def damage(path: Path) -> str:
    """Return what is wrong with a checkpoint, or ""; collective, each rank digests its share of the files."""
    problems = []
    try:
        manifest = read_manifest(path)
        for name in _own_share(sorted(manifest["files"])):
            size, digest = manifest["files"][name]
            file = path / name
            if not file.is_file():
                problems.append(f"{file} is missing")
            elif file.stat().st_size != size:
                problems.append(f"{file} has {file.stat().st_size} bytes instead of {size}")
            elif sha256(file) != digest:
                problems.append(f"{file} has another SHA-256 than its manifest says")
    except CheckpointError as e:
        problems.append(str(e))
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, problems)
    return next((p for part in gathered for p in part), "")


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
    """Raise CheckpointError if the run that saved `path` differs from this one in one of `facts`."""
    changed = [f"{k} was {manifest.get(k)!r}, is {v!r}" for k, v in facts.items() if manifest.get(k) != v]
    if changed:
        raise CheckpointError(
            f"{path}: cannot be continued, since this run differs: {'; '.join(changed)}."
            " Change it back, or choose another run_dir"
        )


def load(engine: Engine, path: Path) -> int:
    """Load a checkpoint that `damage` found whole; returns the optimizer steps done. Collective."""
    engine.ds.checkpoint_engine.load = _load_tensors
    loaded, _ = engine.ds.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise CheckpointError(f"{path}: DeepSpeed could not load it")
    engine.apply_settings()  # DeepSpeed brings back those of the run that saved
    return read_manifest(path)["step"]


def _load_tensors(path: str, map_location: Any = None) -> Any:
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address, set]):
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as e:
        raise CheckpointError(
            f"{path}: holds more than tensors, it was tampered with or is another version ({e})"
        ) from e


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

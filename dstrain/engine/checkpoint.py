"""Checkpoints that are whole or not there: finding, verifying and removing them. saver.py writes them.

Each rank's trained state is one safetensors file (see state.py); the manifest has the digest of each, and a folder
becomes a checkpoint by being renamed. DeepSpeed's own checkpoints are not used: its `latest` file is written before all
shards are, nothing is synced to disk, its loader unpickles whatever it finds, and another world size needs a conversion
(each seen with DeepSpeed 0.19.8).
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dstrain.engine import distributed
from dstrain.errors import CheckpointError
from dstrain.storage import move, remove, sha256

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
FORMAT = 2


def name(step: int) -> str:
    """Return the name of the folder of a checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's name says."""
    return int(path.name.removeprefix("step-"))


def sweep(folder: Path) -> None:
    """Remove what interrupted saves and removals left in RUN_DIR/checkpoints; by one process, when none saves there."""
    for left_over in [*folder.glob(".step-*.partial"), *folder.glob(".trash-*")]:
        remove(left_over)


def discard(path: Path) -> None:
    """Remove a checkpoint; it stops being one before the first of its files goes."""
    trash = path.with_name(f".trash-{path.name}")
    move(path, trash)
    remove(trash)


def find(folder: Path) -> Path | None:
    """Return the newest undamaged checkpoint of a run, or None if there are none; collective.

    Damaged ones are named and passed over; CheckpointError if all are damaged, rather than starting over in silence.
    """
    paths = distributed.from_main(committed(folder) if distributed.is_main() else [])
    for path in paths:
        problem = damage(path)
        if not problem:
            return path
        if distributed.is_main():
            log.warning("PASSING OVER a damaged checkpoint: %s; trying the one before", problem)
    if paths:
        raise CheckpointError(f"{folder}: all {len(paths)} checkpoints are damaged; remove them to start over")
    return None


def set_aside_newer(folder: Path, step: int) -> None:
    """Hide a run's checkpoints after `step`, lest what goes on from there comes back to the other branch; collective.

    folder: RUN_DIR/checkpoints of the run that goes on; another run's checkpoints are never touched.
    """
    if distributed.is_main():
        for newer in committed(folder):
            if newer.name > name(step):
                hidden = newer.with_name(f".set-aside-{newer.name}")
                number = 1
                while hidden.exists():
                    number += 1
                    hidden = newer.with_name(f".set-aside-{newer.name}-{number}")
                move(newer, hidden)
                log.warning("%s is newer than what is continued; it is kept as %s", newer, hidden.name)
    distributed.barrier()


def newest(folder: Path) -> Path | None:
    """Return the newest complete checkpoint of RUN_DIR/checkpoints by its name, undamaged or not; not collective."""
    return next(iter(committed(folder)), None)


def damage(path: Path) -> str:
    """Return what is wrong with a checkpoint, or ""; collective, each rank digests its share of the files."""
    try:
        manifest = read_manifest(path)
        problem = damaged_file(path, {name: manifest["files"][name] for name in _own_share(sorted(manifest["files"]))})
    except CheckpointError as e:
        problem = str(e)
    return next((p for p in distributed.gather(problem) if p), "")


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


def committed(folder: Path) -> list[Path]:
    """Return the complete checkpoints of RUN_DIR/checkpoints, undamaged or not, newest first."""
    found = (p for p in folder.glob("step-*") if p.name[5:].isdecimal() and (p / MANIFEST).is_file())
    return sorted(found, key=step_of, reverse=True)


def _own_share(items: list[Any]) -> Iterator[Any]:
    return iter(items[distributed.rank() :: distributed.world_size()])

"""Checkpoints that are whole or not there: finding, verifying and removing them. saver.py writes them.

Each rank's trained state is one safetensors file (see state.py); the manifest has the digest of each, and a folder
becomes a checkpoint by being renamed. DeepSpeed's own checkpoints are not used: its `latest` file is written before all
shards are, nothing is synced to disk, its loader unpickles whatever it finds, and another world size needs a conversion
(each seen with DeepSpeed 0.19.8).
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from dstrain.engine import distributed
from dstrain.engine.state import PATTERN
from dstrain.errors import CheckpointError, DstrainError
from dstrain.storage import idle, move, remove, sha256

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
FORMAT = 2
MAX_MANIFEST = 64 << 20  # bytes; real ones have some thousand
T = TypeVar("T")


def name(step: int) -> str:
    """Return the name of the folder of a checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's name says."""
    return int(path.name.removeprefix("step-"))


def sweep(folder: Path) -> None:
    """Remove what interrupted saves and removals left in RUN_DIR/checkpoints; by one process, when none saves there.

    A checkpoint that was to be replaced, and was not, is back. What cannot be removed is named, and stays.
    """
    for replaced in folder.glob(".replaced-step-*"):
        final = replaced.with_name(replaced.name.removeprefix(".replaced-"))
        with _cleaning(replaced):
            if final.exists():
                remove(replaced)
            else:
                move(replaced, final)
    for left_over in [*folder.glob(".step-*.partial"), *folder.glob(".trash-*")]:
        with _cleaning(left_over):
            remove(left_over)


def publish(partial: Path, final: Path) -> None:
    """Make a whole folder a checkpoint by renaming it; one of that name is there until it is, or again after `sweep`.

    Raises OSError.
    """
    replaced = final.with_name(f".replaced-{final.name}")
    if final.exists():
        move(final, replaced)
    move(partial, final)
    if replaced.exists():
        with _cleaning(replaced):
            remove(replaced)


def retire(path: Path) -> None:
    """Discard a checkpoint that is not needed any more, or say why that cannot be done."""
    with _cleaning(path):
        discard(path)


def discard(path: Path) -> None:
    """Remove a checkpoint; it stops being one before the first of its files goes."""
    trash = path.with_name(f".trash-{path.name}")
    move(path, trash)
    remove(trash)


def find(folder: Path, busy: Callable[[], None] = idle, every: int = 1) -> Path | None:
    """Return the newest undamaged checkpoint of a run, or None if there are none; collective.

    every: only of multiples of so many steps. busy: called again and again while files are read.

    Damaged ones are named and passed over; CheckpointError if all are damaged or the folder cannot be read, rather than
    starting over in silence.
    """
    paths = _on_main(lambda: [path for path in committed(folder) if step_of(path) % every == 0])
    say = log.warning if distributed.is_main() else log.debug
    return _first_good(folder, paths, lambda path: damage(path, busy), say)


def set_aside_newer(folder: Path, step: int) -> None:
    """Hide a run's checkpoints after `step`, lest what goes on from there comes back to the other branch; collective.

    folder: RUN_DIR/checkpoints of the run that goes on; another run's checkpoints are never touched.
    """

    def work() -> None:
        for newer in committed(folder):
            if step_of(newer) > step:
                hidden = newer.with_name(f".set-aside-{newer.name}")
                number = 1
                while hidden.exists():
                    number += 1
                    hidden = newer.with_name(f".set-aside-{newer.name}-{number}")
                move(newer, hidden)
                log.warning("%s is newer than what is continued; it is kept as %s", newer, hidden.name)

    _on_main(work)


def newest(folder: Path) -> Path | None:
    """Return the newest checkpoint of RUN_DIR/checkpoints by what is seen without reading its files; not collective.

    CheckpointError if there are only ones that are seen to be damaged.
    """
    return _first_good(folder, committed(folder), _seen_damage, log.info)


def _first_good(
    folder: Path, paths: list[Path], problem_of: Callable[[Path], str], say: Callable[[str, str], None]
) -> Path | None:
    """Return the first of `paths` without a problem, None if there are none; CheckpointError if all have one."""
    for path in paths:
        if not (problem := problem_of(path)):
            return path
        say("PASSING OVER a damaged checkpoint: %s; trying the one before", problem)
    if paths:
        raise CheckpointError(f"{folder}: all {len(paths)} checkpoints are damaged; remove them to start over")
    return None


def _seen_damage(path: Path) -> str:
    try:
        return _misfit(path, read_manifest(path))
    except (CheckpointError, OSError) as e:
        return str(e)


def damage(path: Path, busy: Callable[[], None] = idle) -> str:
    """Return what is wrong with a checkpoint, or ""; collective, each rank digests its share of the files."""
    try:
        manifest = read_manifest(path)
        files = manifest["files"]
        problem = _misfit(path, manifest)
        problem = problem or damaged_file(path, {name: files[name] for name in _own_share(sorted(files))}, busy)
    except (CheckpointError, OSError) as e:
        problem = str(e)
    return next((p for p in distributed.gather(problem) if p), "")


def _misfit(path: Path, manifest: Mapping[str, Any]) -> str:
    """Return what does not go together in a checkpoint, as far as names and sizes tell, or ""."""
    files = manifest["files"]
    if "digest" not in manifest:
        return f"{path / MANIFEST} has no digest of itself"
    if _is_step(path) and step_of(path) != manifest["step"]:
        return f"{path / MANIFEST} is that of step {manifest['step']}"
    if extra := sorted(found.name for found in path.glob(PATTERN) if found.name not in files):
        return f"{path / extra[0]} is not of this checkpoint: its manifest does not name it"
    return next((wrong for name, (size, _) in files.items() if (wrong := _missized(path / name, size))), "")


def _missized(file: Path, size: int) -> str:
    if not file.is_file():
        return f"{file} is missing"
    found = file.stat().st_size
    return "" if found == size else f"{file} has {found} bytes instead of {size}"


def damaged_file(path: Path, files: Mapping[str, tuple[int, str]], busy: Callable[[], None] = idle) -> str:
    """Return what is wrong with the first file of a checkpoint that is not as its manifest's entry says, or ""."""
    for name, (size, digest) in files.items():
        file = path / name
        if wrong := _missized(file, size):
            return wrong
        if sha256(file, busy=busy) != digest:
            return f"{file} has another SHA-256 than its manifest says"
    return ""


def sealed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return a manifest with the digest of all that it says, as it is to be written."""
    plain = json.loads(json.dumps(manifest))
    return {**plain, "digest": _digest(plain)}


def read_manifest(path: Path) -> dict[str, Any]:
    """Read a checkpoint's manifest; CheckpointError if it is not one of ours, or not as it was written."""
    file = path / MANIFEST
    try:
        if not file.is_file() or file.stat().st_size > MAX_MANIFEST:
            what = "too large for a manifest" if file.is_file() else "no such file"
            raise CheckpointError(f"{path}: not a checkpoint of dstrain ({file.name}: {what})")
        manifest = json.loads(file.read_text("utf-8"), object_pairs_hook=_without_duplicates)
        if manifest["format"] != FORMAT or type(manifest["format"]) is not int:
            raise CheckpointError(f"{file}: format {manifest['format']!r:.40}, this version reads {FORMAT}")
        if manifest.get("digest", digest := _digest(manifest)) != digest:
            raise CheckpointError(f"{file} has another SHA-256 than it says of itself")
        if type(manifest["step"]) is not int or manifest["step"] < 0:
            raise CheckpointError(f"{file}: step {manifest['step']!r:.40} is no number of a step")
        for name, entry in manifest["files"].items():
            size, digest = entry
            plain = Path(name).name == name and Path(name).match(PATTERN)
            if not plain or type(size) is not int or not isinstance(digest, str):
                raise CheckpointError(f"{file}: not a file of a checkpoint: {name!r:.80} {entry!r:.80}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{file}: not a checkpoint of dstrain ({e!r:.300})") from e
    return manifest


def committed(folder: Path) -> list[Path]:
    """Return the checkpoints of RUN_DIR/checkpoints, damaged or not, newest first.

    A folder without a manifest is one too: saving never leaves any, so it has lost it. Raises CheckpointError if they
    cannot be listed.
    """
    try:
        return sorted((p for p in folder.iterdir() if _is_step(p) and p.is_dir()), key=step_of, reverse=True)
    except FileNotFoundError:
        return []
    except OSError as e:
        raise CheckpointError(f"{folder} cannot be read: {e}") from e


def _own_share(items: list[Any]) -> Iterator[Any]:
    return iter(items[distributed.rank() :: distributed.world_size()])


def _is_step(path: Path) -> bool:
    number = path.name.removeprefix("step-")
    return number != path.name and number.isdecimal() and number.isascii()


def _digest(manifest: Mapping[str, Any]) -> str:
    said = {key: value for key, value in manifest.items() if key != "digest"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a key stands twice")
    return found


@contextmanager
def _cleaning(path: Path) -> Iterator[None]:
    """Clean up, for which no save and no run fails."""
    try:
        yield
    except OSError as e:
        log.warning("%s cannot be cleaned up: %s", path, e)


def _on_main(work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and return its result on all ranks, or raise CheckpointError on all; collective."""
    result, error = None, ""
    if distributed.is_main():
        try:
            result = work()
        except (OSError, DstrainError) as e:
            error = str(e)
    result, error = distributed.from_main((result, error))
    if error:
        raise CheckpointError(error)
    return result  # type: ignore[return-value]  # None only where work gives it

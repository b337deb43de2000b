"""metrics.jsonl, the truth about a run: one JSON object a line, one line a step, in order, without gaps."""

import json
import math
import os
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

from dstrain.errors import DataError
from dstrain.storage import fsync_dir, write_atomic

METRICS_FILE = "metrics.jsonl"


class JsonlTracker:
    """Writes a line a step, synchronously; only the main rank has one.

    JSON has no NaN: a number that is not finite stands there as the string "nan", "inf" or "-inf", so that every
    JSON parser reads every line, and `float(value)` gives it back.
    """

    def __init__(self, path: Path, *, first_step: int) -> None:
        """Open `path` for appending; what an earlier run wrote for `first_step` and later is cut off first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._open(first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append the line of `step`; it has reached the operating system when this returns."""
        record = {"step": step} | {name: _plain(value) for name, value in values.items()}
        self._file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        self._file.flush()

    def log_image(self, step: int, name: str, path: Path) -> None:
        """Do nothing: the picture is a file of the run folder already."""

    def rewind(self, step: int) -> None:
        """Cut off the lines of `step` and later."""
        self.finish()
        self._open(step)

    def sync(self) -> None:
        """Make all lines durable. Call it before a checkpoint is committed."""
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Make all lines durable and close the file; a second call does nothing."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _open(self, first_step: int) -> None:
        _cut_back(self._path, first_step)
        self._file = self._path.open("ab")
        fsync_dir(self._path.parent)


def read_metrics(source: Path) -> list[dict[str, float]]:
    """Read the lines of a metrics file, or of the one in a run folder, with numbers that are not finite as floats.

    A half-written last line, as a running or a killed job leaves it, is passed over. DataError when the file is
    missing, empty, or has a line that is not a step's metrics.
    """
    path = source / METRICS_FILE if source.is_dir() else source
    try:
        data = path.read_bytes()
    except OSError as e:
        raise DataError(
            f"{path}: cannot read the metrics ({e.strerror}); name a run folder that holds a {METRICS_FILE}"
        ) from e
    lines = data.split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        record = _parse(line)
        if record is not None:
            records.append({name: _number(path, number, name, value) for name, value in record.items()})
        elif line.strip() and number < len(lines):
            raise DataError(f"{path}:{number}: not a step's metrics; remove the line or draw another run")
    if not records:
        raise DataError(f"{path}: no step has been logged yet; let the run finish its first step")
    return records


def _cut_back(path: Path, first_step: int) -> None:
    """Keep the whole lines of steps before `first_step`, in a new file that replaces the old one at once."""
    if not path.exists():
        return
    data = path.read_bytes()
    whole_lines = data.split(b"\n")[:-1]
    records = [(line, _parse(line)) for line in whole_lines]
    kept = b"".join(line + b"\n" for line, record in records if record and record["step"] < first_step)
    if kept != data:
        write_atomic(path, kept)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _plain(value: float) -> float | str:
    """Turn numbers of any library into what JSON can hold."""
    if isinstance(value, Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _number(path: Path, line: int, name: str, value: Any) -> float:
    if isinstance(value, int | float):
        return value
    try:
        return float(value)
    except (TypeError, ValueError):
        raise DataError(f"{path}:{line}: {name} is {value!r}, not a number") from None

"""Kinds of command line arguments that argparse does not know."""

import argparse
from pathlib import Path


def positive(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(1, text)


def natural(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(0, text)


def guidance(text: str) -> float:
    """A finite number of at least 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 1 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 1 (1 = no guidance), not {text!r}")
    return value


def amount(text: str) -> float:
    """A finite number above 0."""
    return _number(text, 0.0, float("inf"), "a finite number above 0")


def amount_or_none(text: str) -> float:
    """A finite number of at least 0."""
    return _number(text, -5e-324, float("inf"), "a finite number of at least 0")


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    return _number(text, 0.0, 1.0 + 1e-12, "a number above 0 and at most 1")


def _number(text: str, above: float, below: float, what: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not above < value < below:
        raise argparse.ArgumentTypeError(f"must be {what}, not {text!r:.40}")
    return value


def _at_least(low: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {low}, and below 2^63, not {text!r:.40}")
    return value


def given(text: str) -> str:
    """A path or URL; empty, as an unset variable of a shell leaves it, would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the path is empty")
    return text


def path(text: str) -> Path:
    """A path that is not empty."""
    return Path(given(text))


def report_file(text: str) -> Path:
    """A file to write, in a folder that is there; one that is replaced must be a plain file."""
    file = path(text)
    if fault := output_fault(file):
        raise argparse.ArgumentTypeError(fault)
    return file


def output_fault(file: Path) -> str:
    """Say why `file` cannot be written, or must not be replaced; "" if it can."""
    if file.is_symlink() or (file.exists() and not file.is_file()):
        return f"{file} is {'a folder' if file.is_dir() else 'not a plain file'}; name a file"
    if not file.parent.is_dir():
        return f"{file}: there is no folder {file.parent}; make it first"
    return ""

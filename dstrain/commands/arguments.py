"""Kinds of command line arguments that argparse does not know."""

import argparse


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


def _at_least(low: int, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value < 1 << 63:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least {low}, not {text!r}")
    return value

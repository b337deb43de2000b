"""The errors that a user can meet. Each message says what, where, and what to do about it."""

import difflib
from collections.abc import Iterable


class DstrainError(Exception):
    """Base of every error that is the input's fault: the commands print its message and exit with code 2."""


class ConfigError(DstrainError):
    """A recipe, a ds_config or a command line asks for something that cannot be done."""


class DataError(DstrainError):
    """A shard, a picture or a caption cannot be used."""


class CheckpointError(DstrainError):
    """A model folder or a training checkpoint is missing, damaged or of another kind."""


class TrainingHalted(DstrainError):
    """A guard stopped the run; what was saved before is intact."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ", did you mean 'x'?" for the known name nearest to `name`, or ""."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f", did you mean {near[0]!r}?" if near else ""


def printable(text: str, keep: str = "") -> str:
    r"""Write out what a terminal would not show, or would obey, as \x07, but for the characters in `keep`.

    For names and messages that come from data.
    """
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)

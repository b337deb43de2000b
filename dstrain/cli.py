"""The `dstrain` command. A subcommand is a file of dstrain/commands/ with ABOUT, add_arguments(parser) and run(args).

Those files import what is heavy inside `run`, so that help and misuse are answered at once.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from errno import EDQUOT, EFBIG, EIO, ENOSPC, EROFS
from importlib import import_module
from io import TextIOWrapper

from dstrain import __version__
from dstrain.errors import DstrainError

COMMANDS = "pack index verify preview encode init check estimate preflight sample export report".split()
_DISK = (ENOSPC, EDQUOT, EFBIG, EIO, EROFS)
ABOUT = "Prepare data and models for dstrain, paint pictures, and look at runs. Training: launch/train.py."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code: its own or 0, or 2 with one sentence on stderr for bad input."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # file names may be in another encoding than the terminal
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    overrides = [text for text in rest if "=" in text and not text.startswith("-")]
    if rest and (len(overrides) < len(rest) or not hasattr(args, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if overrides:  # argparse takes positional arguments only in one piece
        args.overrides = [*args.overrides, *overrides]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        code = args.run(args) or 0
        sys.stdout.flush()
        return code
    except DstrainError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        return _refuse("stopped", 130)
    except BrokenPipeError:  # whoever read the output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.filename is None and error.errno not in _DISK:  # neither a file that the user named, nor their disk
            raise
        return _refuse(f"{error.filename or 'what is to be written'}: {error.strerror}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dstrain", description=ABOUT)
    parser.add_argument("--version", action="version", version=f"dstrain {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        module = import_module(f"dstrain.commands.{name}")
        command = commands.add_parser(
            name,
            help=module.ABOUT,
            description=f"{module.__doc__}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _refuse(message: str, code: int = 2) -> int:
    print(f"dstrain: error: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

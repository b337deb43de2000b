"""The `dstrain` command. A subcommand is a file of dstrain/commands/ with ABOUT, add_arguments(parser) and run(args).

Those files import what is heavy inside `run`, so that help and misuse are answered at once.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from importlib import import_module

from dstrain import __version__
from dstrain.errors import DstrainError

COMMANDS = ("pack", "index", "verify", "preview", "init", "sample", "report")
ABOUT = "Prepare data and models for dstrain, paint pictures, and look at runs. Training: launch/train.py."


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return the exit code: its own or 0, or 2 with one sentence on stderr for bad input."""
    args = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        return args.run(args) or 0
    except DstrainError as error:
        return _refuse(str(error))
    except OSError as error:
        if error.filename is None:  # not a file that the user named
            raise
        return _refuse(f"{error.filename}: {error.strerror}")


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


def _refuse(message: str) -> int:
    print(f"dstrain: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())

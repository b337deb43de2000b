"""For the batch script: print the run_dir of a training with these arguments, or end with 2 if they are refused."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from train import parse

from dstrain.config import load_recipe
from dstrain.errors import DstrainError


def main() -> int:
    """Print the absolute path."""
    args = parse()
    try:
        print(Path(load_recipe(args.config, args.overrides).run_dir).absolute())
    except DstrainError as e:
        print(f"dstrain: error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

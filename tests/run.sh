#!/usr/bin/env bash
# Makes the environment and runs all tests that this machine can run:  bash tests/run.sh [PYTEST ARGUMENT ...]
#
#   bash tests/run.sh tests/unit/test_cli.py      one file
#   bash tests/run.sh -m soak                     the long matrices of faults
#   bash tests/run.sh -m slurm                    a real two-node SLURM on this host (root on Debian or Ubuntu)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export DSTRAIN_EXTRAS="test"
source launch/setup.sh

exec python -m pytest -m "not slurm and not soak" -n logical --maxprocesses 4 "$@"

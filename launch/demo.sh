#!/usr/bin/env bash
# dstrain in one command: makes the environment, trains a small Qwen-Image-shaped model on 256 emoji under DeepSpeed
# ZeRO-3 with CPU offload, and shows what it paints.
#
#   bash launch/demo.sh [section.key=value ...]      e.g. train.steps=50 run_dir=runs/short
#
# Safe to run again: a run that was broken off goes on where it was; a finished one is only evaluated again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh

deepspeed launch/train.py --ds_config ds_configs/zero3_offload.json --config launch/recipes/demo.yaml "$@"
python launch/demo/evaluate.py --config launch/recipes/demo.yaml "$@"

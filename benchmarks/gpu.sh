#!/usr/bin/env bash
# Everything that wants a GPU, on one machine that has one: correctness of what only runs there, then the figures.
#
#   bash benchmarks/gpu.sh [RESULTS FOLDER]      about twenty-five minutes; 16 of Qwen-Image's 60 blocks need 80 GB
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export DSTRAIN_EXTRAS="test bench"
source launch/setup.sh
out="${1:-benchmarks/results}"
mkdir -p "$out"

python -m pytest -m gpu tests

name="$(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1 | tr ' /' '__')"
python benchmarks/fused_kernels.py --out "$out/$name-kernels.json" --plot "$out/$name-kernels.png"
step() { # name of the figure, ds_config, arguments
    deepspeed --num_accelerators 1 benchmarks/train_step.py --ds_config "ds_configs/$2.json" \
        --out "$out/$name-$1.json" "${@:3}"
}
step 4096-zero3 zero3 --layers 8 --image_tokens 4096 --text_tokens 512
for keep in none attention offload; do
    step "4096-zero3-$keep" zero3 --layers 8 --image_tokens 4096 --text_tokens 512 --activations "$keep"
done
step 1024x4-zero3 zero3 --layers 8 --image_tokens 1024 --text_tokens 128 --samples 4
step 4096-zero3_offload zero3_offload --layers 16 --image_tokens 4096 --text_tokens 512
python benchmarks/train_step.py --layers 4 --image_tokens 4096 --text_tokens 512 --out "$out/$name-4096-plain.json"
python benchmarks/activation_memory.py --width 3072 --layers 12 --image_side 64 --text 512 \
    --out "$out/$name-activation_memory.json"
python benchmarks/storage_formats.py --out "$out/$name-storage_formats.json"

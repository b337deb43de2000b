"""Peak memory and time of a forward and a backward under each `model.activations`, beside the bytes that are predicted.

    python benchmarks/activation_memory.py --out benchmarks/results/activation_memory.json
    python benchmarks/activation_memory.py --width 3072 --layers 12 --image_side 64 --text 512    # on a GPU, in bf16

Each case runs in a process of its own. On the CPU (fp32) the peak is the growth of the process (VmHWM less VmRSS before
the pass, with a heap that gives freed memory back at once) and the time is the processor's; on a GPU (bf16) they are
the allocator's and the wall's. Gradients of the parameters are there before. A stack is measured at two depths: their
difference is what a block costs, free of what the pass needs once. On the CPU, "offload" runs the code of the GPU, but
its copies lie in the same memory: what it saves shows on a GPU only.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from data.machine import processor

from dstrain.models.packing import PackLayout
from dstrain.models.qwen_image import QwenImageDiT, QwenImageParams
from dstrain.storage import write_json

POLICIES = ["none", "attention", "full", "offload"]
HEAD = 64  # width of a head
# Values a channel and token that are kept of a block without recomputation, by benchmarks/block_traffic.py: in bf16 by
# the kernels, which a GPU runs, in fp32 by plain autograd.
NONE = {True: 13.05, False: 28.07}


def predicted(keep: str, width: int, tokens: int, bf16: bool) -> float:
    """Bytes that one more block keeps on the device."""
    item = 2 if bf16 else 4
    inputs = item * width * tokens
    result = (item * width + 4 * width // HEAD) * tokens  # and the logarithms of the sums, fp32 a head
    away = 0 if bf16 else inputs
    return {
        "none": NONE[bf16] * item * width * tokens,
        "attention": inputs + result,
        "full": inputs,
        "offload": away,
    }[keep]


def status(field: str) -> int:
    """A size from this process's /proc entry, in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def measure(keep: str, width: int, layers: int, side: int, text: int, passes: int) -> dict[str, float]:
    """Peak bytes of the first pass above what was there, and the fastest pass's seconds."""
    gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if gpu else ("cpu", torch.float32)
    torch.manual_seed(0)
    params = QwenImageParams(
        num_layers=layers,
        attention_head_dim=HEAD,
        num_attention_heads=width // HEAD,
        joint_attention_dim=64,
        axes_dims_rope=(16, 24, 24),
    )
    with torch.device(device):
        model = QwenImageDiT(params).to(dtype)
    model.activations = (keep,)
    for p in model.parameters():
        p.grad = torch.ones_like(p)  # written to, so that it is there
    layout = PackLayout.build([[(1, side, side)]], [text], device)
    inputs = [torch.randn(n, 64, device=device) for n in (side * side, text)]
    sigmas = torch.tensor([0.5], device=device)

    def run() -> None:
        model(*inputs, sigmas, layout).float().square().mean().backward()
        if gpu:
            torch.cuda.synchronize()

    if gpu:
        before = torch.cuda.memory_allocated()
        run()
        peak = torch.cuda.max_memory_allocated() - before
    else:
        before = status("VmRSS")
        run()
        peak = status("VmHWM") - before
    clock = time.perf_counter if gpu else time.process_time
    seconds = []
    for _ in range(passes):
        start = clock()
        run()
        seconds.append(clock() - start)
    return {"peak": peak, "seconds": min(seconds, default=0.0)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--width", type=int, default=512, help="channels, a multiple of 64 (%(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="blocks; half of them too (%(default)s)")
    parser.add_argument("--image_side", type=int, default=44, help="tokens on a side of the picture (%(default)s)")
    parser.add_argument("--text", type=int, default=112, help="tokens of the caption (%(default)s)")
    parser.add_argument("--passes", type=int, default=1, help="that are timed, the fastest counts (%(default)s)")
    parser.add_argument("--case", choices=POLICIES, help="measure this one, here")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case, args.width, args.layers, args.image_side, args.text, args.passes)))
        return

    tokens, bf16 = args.image_side**2 + args.text, torch.cuda.is_available()
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    rows = []
    for keep in POLICIES:

        def case(layers: int, passes: int, keep: str = keep) -> dict[str, float]:
            sizes = {"layers": layers, "width": args.width, "image_side": args.image_side, "text": args.text}
            flags = [f"--{name}={value}" for name, value in {**sizes, "passes": passes, "case": keep}.items()]
            argv = [sys.executable, __file__, *flags]
            return json.loads(subprocess.run(argv, check=True, capture_output=True, text=True, env=env).stdout)

        deep, shallow = case(args.layers, args.passes), case(args.layers // 2, 0)
        block = predicted(keep, args.width, tokens, bf16)
        once = predicted("none", args.width, tokens, bf16) if keep != "none" else 0
        rows.append(
            {
                "activations": keep,
                "peak_mb": deep["peak"] / 1e6,
                "predicted_mb": (args.layers * block + once) / 1e6,
                "block_mb": (deep["peak"] - shallow["peak"]) / (args.layers - args.layers // 2) / 1e6,
                "predicted_block_mb": block / 1e6,
                "seconds": deep["seconds"],
            }
        )
        print(
            "{activations:<10} peak {peak_mb:7.0f} MB (predicted {predicted_mb:7.0f}), a block {block_mb:6.1f} MB "
            "(predicted {predicted_block_mb:6.1f}), {seconds:6.2f} s".format(**rows[-1])
        )
    if args.out:
        machine = {
            "device": torch.cuda.get_device_name() if bf16 else processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        sizes = {
            "dtype": "bf16" if bf16 else "fp32",
            "layers": args.layers,
            "tokens": tokens,
            "width": args.width,
        }
        write_json(args.out, {"machine": machine, "sizes": sizes, "rows": rows})


if __name__ == "__main__":
    main()

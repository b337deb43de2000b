"""Compare formats of frozen weights: what rounding costs, how many bytes, and what unpacking costs a product.

    python benchmarks/storage_formats.py --out benchmarks/results/storage_formats.json [--weights FOLDER]

Errors, for each format, of a weight [1536, 1536]: relative to its root mean square (`weight`), of the products with
random inputs relative to the exact ones (`product`), and the largest relative to the largest weight (`worst`). `fp32
scales` is what `weight` would be with scales in fp32 instead of bf16. Weights:

    normal          independent normal numbers, as at the start of training
    heavy tails     Student's t with 4 degrees of freedom
    outlier inputs  normal, the weights of 1 input in 100 ten times as large
    rows of scales  normal, the deviation of each output log-uniform over four orders of magnitude
    low rank        rank 16 and a tenth of noise
    trained         with --weights: the matrices of a folder of safetensors, end to end

Times, for a square layer of the width of Qwen-Image: unpacking alone, and forward and backward of the layer over some
tokens, beside the same of an ordinary frozen Linear. Each is the least of several, measured in turns, since another
process can only make one slower. On the CPU one thread in fp32; with a GPU also there, in bf16.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from data.machine import processor
from torch import Tensor, nn

from dstrain.models.storage import BLOCK, ELEMENTS, LARGEST, StoredLinear, dequantise, quantise
from dstrain.models.weights import Weights

FORMATS = ["int8", "fp8"] + ["nf4"] * bool(find_spec("bitsandbytes"))
SIDE, WIDTH = 1536, 3072
TOKENS = {"cpu": (64, 512, 2048), "cuda": (256, 4096, 32768)}


def weights(folder: Path | None) -> Iterator[tuple[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    normal = torch.randn(SIDE, SIDE, generator=g)
    yield "normal", normal
    chi = sum(torch.randn(SIDE, SIDE, generator=g) ** 2 for _ in range(4))
    yield "heavy tails", normal * (4 / chi).sqrt()
    yield "outlier inputs", normal * torch.where(torch.arange(SIDE) % 100 == 50, 10.0, 1.0)
    yield "rows of scales", normal * 10 ** (4 * torch.rand(SIDE, 1, generator=g) - 4)
    left, right = torch.randn(SIDE, 16, generator=g), torch.randn(16, SIDE, generator=g)
    yield "low rank", left @ right / 4 + normal / 10
    if folder:
        found = Weights(folder)
        matrices = [found.read(n).float() for n, e in found.entries.items() if len(e.shape) == 2 and min(e.shape) > 63]
        flat = torch.cat(matrices)[: 1 << 24]
        yield "trained", flat[: len(flat) // SIDE * SIDE].view(-1, SIDE)


def errors(weight: Tensor, kind: str) -> dict[str, float]:
    packed, scales = quantise(weight.flatten(), kind)
    back = dequantise(packed, scales, kind, weight.shape, torch.float32)
    x = torch.randn(256, SIDE, generator=torch.Generator().manual_seed(1))
    exact = x @ weight.T
    return {
        "weight": float((back - weight).norm() / weight.norm()),
        "fp32 scales": float((with_fp32_scales(weight, packed, kind) - weight).norm() / weight.norm()),
        "product": float((x @ back.T - exact).norm() / exact.norm()),
        "worst": float((back - weight).abs().max() / weight.abs().max()),
        "bytes": (packed.nbytes + scales.nbytes) / weight.numel(),
    }


def with_fp32_scales(weight: Tensor, packed: Tensor, kind: str) -> Tensor:
    blocks = weight.reshape(-1, BLOCK)
    largest = blocks.abs().amax(1)
    if kind == "nf4":
        return dequantise(packed, largest, kind, weight.shape, torch.float32)
    scales = (largest / LARGEST[kind])[:, None]
    scaled = (blocks / scales).round() if kind == "int8" else blocks / scales
    return (scaled.to(ELEMENTS[kind]).float() * scales).view_as(weight)


def stored_layer(linear: nn.Linear, kind: str) -> StoredLinear:
    layer = StoredLinear(linear, kind)
    packed, scales = quantise(linear.weight.detach().cpu().flatten(), kind)
    layer.weight.copy_(packed)
    layer.weight_scale.copy_(scales)
    return layer


def least(calls: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, float]:
    """Milliseconds of each, measured in turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            synchronise(device)
            begin = time.perf_counter()
            call()
            synchronise(device)
            best[name] = min(best[name], 1e3 * (time.perf_counter() - begin))
    return best


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def times(device: str, dtype: torch.dtype, repeats: int) -> list[dict[str, object]]:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, WIDTH, device=device, dtype=dtype).requires_grad_(False)
    with torch.no_grad():
        layers = {kind: stored_layer(linear, kind) for kind in FORMATS}
    unpack = least({k: lambda m=m: m.whole_weight(dtype) for k, m in layers.items()}, device, repeats)
    rows = []
    for tokens in TOKENS[device]:
        x = torch.randn(tokens, WIDTH, device=device, dtype=dtype, requires_grad=True)
        step = {k: lambda m=m, x=x: m(x).sum().backward() for k, m in {"linear": linear, **layers}.items()}
        took = least(step, device, repeats)
        for kind in FORMATS:
            rows.append(
                {
                    "device": device,
                    "dtype": str(dtype).removeprefix("torch."),
                    "format": kind,
                    "tokens": tokens,
                    "unpack_ms": unpack[kind],
                    "layer_ms": took[kind],
                    "linear_ms": took["linear"],
                    "ratio": took[kind] / took["linear"],
                }
            )
            print("{device} {dtype:8} {format:5} {tokens:6} tokens: unpack {unpack_ms:7.2f} ms, forward and backward "
                  "{layer_ms:8.2f} ms, of a Linear {linear_ms:8.2f} ms: {ratio:.2f}".format(**rows[-1]))  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--weights", type=Path, help="folder of safetensors with trained matrices")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each time (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, weight in weights(args.weights):
        for kind in FORMATS:
            rows.append({"weights": name, "format": kind, **errors(weight, kind)})
            print("{weights:15} {format:5} weight {weight:.5f} ({fp32 scales:.5f} with fp32 scales), product "
                  "{product:.5f}, worst {worst:.5f}, {bytes:.4f} bytes".format(**rows[-1]))  # fmt: skip
    timings = times("cpu", torch.float32, args.repeats)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    if gpu:
        timings += times("cuda", torch.bfloat16, 4 * args.repeats)
    if args.out:
        machine = {"cpu": processor() or platform.machine(), "gpu": gpu, "torch": torch.__version__}
        args.out.write_text(json.dumps({"machine": machine, "errors": rows, "times": timings}, indent=1) + "\n")


if __name__ == "__main__":
    main()

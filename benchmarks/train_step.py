"""Measure one training step of a Qwen-Image DiT of any depth and width, and print the figures as JSON.

    deepspeed benchmarks/train_step.py --ds_config ds_configs/zero3_offload.json --layers 2 --image_tokens 1024
    torchrun --nproc_per_node 8 benchmarks/train_step.py --ds_config ds_configs/zero3.json --layers 60
    python benchmarks/train_step.py --layers 2 --heads 4          # plain PyTorch, what the engine is compared with

Every figure is the median, least and greatest of the repeats after the warm-up. The step is timed as a whole, without
a synchronisation inside; its parts are timed in repeats of their own, since waiting for the device between them takes
away overlap, so their sum can exceed the step. Latents and prompt embeddings are random and ready: reading data and
encoding are not in it.
"""

import argparse
import json
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch import distributed as dist

from dstrain.config import Recipe
from dstrain.engine import distributed, ds_config
from dstrain.engine.engine import build_engine
from dstrain.knobs import build
from dstrain.models.packing import PackLayout
from dstrain.models.qwen_image import QwenImageDiT, QwenImageParams
from dstrain.tracking.metrics import Throughput, device_name, memory


@dataclass
class Pack:
    """One micro-batch of one rank. N samples, T text tokens, I image tokens."""

    latents: Tensor  # [I, in_channels], noisy
    prompt_embeds: Tensor  # [T, joint_attention_dim]
    sigmas: Tensor  # [N]
    target: Tensor  # [I, patch_size**2 * out_channels], the velocity
    layout: PackLayout


class Engine(Protocol):
    """What is timed. `step` is called once a step, after the backwards of all its micro-steps."""

    def forward(self, pack: Pack) -> Tensor:
        """Return the scalar loss of a pack."""

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add to the gradients; `last` marks the last micro-step of the step."""

    def step(self) -> None:
        """Clip, step the optimizer, clear the gradients."""


class PlainEngine:
    """PyTorch alone, in fp32, on one process: AdamW with clipping."""

    def __init__(self, model: QwenImageDiT, micro_steps: int) -> None:
        self.model, self.micro_steps = model, micro_steps
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def forward(self, pack: Pack) -> Tensor:
        velocity = self.model(pack.latents, pack.prompt_embeds, pack.sigmas, pack.layout)
        return F.mse_loss(velocity.float(), pack.target)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        (loss / self.micro_steps).backward()

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


class ShardedEngine:
    """The training engine under a ds_config, with random weights."""

    def __init__(self, args: argparse.Namespace, params: QwenImageParams) -> None:
        world = distributed.start()
        self.scale = 1 / (args.micro_steps * world.size)
        recipe = build(
            Recipe,
            {
                "run_dir": "unused",
                "model": {"path": "unused", "init": "random"},
                "data": {"shards": ["unused"]},
                "batch": {"global_batch_size": args.micro_steps * args.samples * world.size},
                "train": {"steps": 1},
            },
            "benchmark",
        )
        config = ds_config.complete(
            ds_config.read_ds_config(args.ds_config),
            recipe,
            world_size=world.size,
            bf16=ds_config.uses_bf16(ds_config.read_ds_config(args.ds_config), distributed.has_fast_bf16(world.device)),
            path=args.ds_config,
        )

        def make() -> QwenImageDiT:
            model = QwenImageDiT(params)
            model.activations = (args.activations,)
            return model

        def fill(name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
            return torch.randn(stop - start) * shape[-1] ** -0.5

        self.engine = build_engine(make, fill, config, world.device)

    def forward(self, pack: Pack) -> Tensor:
        velocity = self.engine(pack.latents, pack.prompt_embeds, pack.sigmas, pack.layout)
        return F.mse_loss(velocity.float(), pack.target)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.engine.backward(loss * self.scale, last=last)

    def step(self) -> None:
        self.engine.step(1.0)


def make_engine(args: argparse.Namespace, params: QwenImageParams, device: torch.device) -> Engine:
    """Build what is timed: the training engine under `args.ds_config`, or plain PyTorch without one."""
    if args.ds_config is None:
        torch.manual_seed(0)
        model = QwenImageDiT(params).to(device)
        model.activations = (args.activations,)
        return PlainEngine(model, args.micro_steps)
    return ShardedEngine(args, params)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--ds_config", type=Path, help="DeepSpeed JSON; without it plain PyTorch is measured")
    add("--layers", type=positive, default=2, help="blocks; they are alike, so few measure many (default: 2 of 60)")
    add("--heads", type=positive, default=24, help="attention heads (default: 24, as published)")
    add("--head_dim", type=positive, default=128, help="channels of a head, a multiple of 32 (default: 128)")
    add("--text_dim", type=positive, default=3584, help="channels of a prompt embedding (default: 3584)")
    add("--image_tokens", type=positive, default=1024, help="a sample's; 1024 is 512 x 512 pixels (default: 1024)")
    add("--text_tokens", type=positive, default=128, help="a sample's (default: 128)")
    add("--samples", type=positive, default=1, help="samples of a pack, on every rank (default: 1)")
    add("--micro_steps", type=positive, default=1, help="packs of a step, on every rank (default: 1)")
    add("--activations", choices=("none", "attention", "full", "offload"), default="full", help="what a block keeps")
    add("--warmup", type=positive, default=3, help="steps before the clock runs (default: 3)")
    add("--repeats", type=positive, default=10, help="steps that are timed, twice (default: 10)")
    add("--out", type=Path, help="write the JSON to this file as well")
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    args = parser.parse_args(argv)
    if args.head_dim % 32:
        parser.error(f"--head_dim {args.head_dim} is not a multiple of 32")
    return args


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return value


def model_params(args: argparse.Namespace) -> QwenImageParams:
    """Split the channels of a head over (frame, height, width) in the published proportion 16 : 56 : 56."""
    side = args.head_dim * 7 // 16
    return QwenImageParams(
        num_layers=args.layers,
        num_attention_heads=args.heads,
        attention_head_dim=args.head_dim,
        joint_attention_dim=args.text_dim,
        axes_dims_rope=(args.head_dim - 2 * side, side, side),
    )


def random_pack(args: argparse.Namespace, params: QwenImageParams, device: torch.device, seed: int) -> Pack:
    tokens, texts = args.image_tokens * args.samples, args.text_tokens * args.samples
    height = max(h for h in range(1, math.isqrt(args.image_tokens) + 1) if args.image_tokens % h == 0)
    shape = (1, height, args.image_tokens // height)
    layout = PackLayout.build([[shape]] * args.samples, [args.text_tokens] * args.samples, device)
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    return Pack(
        latents=normal(tokens, params.in_channels),
        prompt_embeds=normal(texts, params.joint_attention_dim),
        sigmas=torch.rand(args.samples, generator=generator).to(device),
        target=normal(tokens, params.patch_size**2 * params.out_channels),
        layout=layout,
    )


def measure(
    engine: Engine, packs: Sequence[Pack], warmup: int, repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Return seconds of every repeat: step_s, and in separate repeats forward_s, backward_s, optimizer_s."""
    seconds: dict[str, list[float]] = {"step_s": [], "forward_s": [], "backward_s": [], "optimizer_s": []}
    for _ in range(warmup):
        whole_step(engine, packs)
    for _ in range(repeats):
        start = now(device)
        whole_step(engine, packs)
        seconds["step_s"].append(now(device) - start)
    for _ in range(repeats):
        forward = backward = 0.0
        for pack in packs:
            t0 = now(device)
            loss = engine.forward(pack)
            t1 = now(device)
            engine.backward(loss, last=pack is packs[-1])
            t2 = now(device)
            forward, backward = forward + t1 - t0, backward + t2 - t1
        engine.step()
        seconds["optimizer_s"].append(now(device) - t2)
        seconds["forward_s"].append(forward)
        seconds["backward_s"].append(backward)
    return seconds


def whole_step(engine: Engine, packs: Sequence[Pack]) -> None:
    for pack in packs:
        engine.backward(engine.forward(pack), last=pack is packs[-1])
    engine.step()


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def machine(device: torch.device) -> dict[str, Any]:
    """Describe what the figures were measured on."""
    return {
        "device": device_name(device),
        "processor": device_name(torch.device("cpu")),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "deepspeed": version("deepspeed"),
        "dstrain": version("dstrain"),
    }


def report(
    args: argparse.Namespace, params: QwenImageParams, seconds: dict[str, list[float]], device: torch.device
) -> dict[str, Any]:
    """Turn the seconds of this rank, whose collectives all ranks share, into the figures of the whole job."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    with torch.device("meta"):
        model = QwenImageDiT(params)
    layout = random_pack(args, params, torch.device("cpu"), seed=0).layout
    packs = args.micro_steps * world_size
    work = (packs * args.samples, packs * layout.tokens, packs * 3 * model.forward_flops(layout))
    throughput = Throughput.of(device, world_size)
    rates = [throughput(step, *work) for step in seconds["step_s"]]
    return {
        "engine": "plain PyTorch, fp32" if args.ds_config is None else f"DeepSpeed, {args.ds_config}",
        "world_size": world_size,
        "workload": {k: v for k, v in vars(args).items() if k not in ("ds_config", "out", "local_rank")},
        "model": asdict(params) | {"parameters": sum(p.numel() for p in model.parameters())},
        "step": dict(zip(("samples", "tokens", "train_flops"), work, strict=True)),
        **{name: summary([rate[name] for rate in rates]) for name in rates[0]},
        **{name: summary(values) for name, values in seconds.items()},
        **worst_memory(device, world_size),
        "machine": machine(device),
    }


def worst_memory(device: torch.device, world_size: int) -> dict[str, float]:
    """Return the peak of the rank that needed most."""
    peaks: list[dict[str, float]] = [memory(device)]
    if world_size > 1:
        peaks = [{}] * world_size
        dist.all_gather_object(peaks, memory(device))
    return {name: round(max(peak[name] for peak in peaks), 3) for name in peaks[0]}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    rank, local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    params = model_params(args)
    engine = make_engine(args, params, device)
    packs = [random_pack(args, params, device, seed=rank * args.micro_steps + k) for k in range(args.micro_steps)]
    seconds = measure(engine, packs, args.warmup, args.repeats, device)
    figures = json.dumps(report(args, params, seconds, device), indent=2)
    if rank == 0:
        sys.stdout.write(figures + "\n")
        if args.out:
            args.out.write_text(figures + "\n")
    if dist.is_initialized():
        distributed.stop(0, together=True)


if __name__ == "__main__":
    main()

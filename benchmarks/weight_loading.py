"""Measure how a checkpoint gets into a ZeRO-3 engine: bytes, memory and time on two ranks, against usual ways.

    python benchmarks/weight_loading.py             # some minutes on two quiet cores; 2 GB of disk, 8 GB of memory

The checkpoint has the shapes of Qwen-Image at its published width, with 3 of its 60 blocks: 2.1 GB of random bf16 in
several files, written to a temporary folder (TMPDIR says where; it should be a disk). Ways to load it:

    dstrain            `fill_partitioned` and `Engine`, as training does it: a rank reads its own slices only
    from_pretrained    diffusers' `from_pretrained` on every rank; then `deepspeed.initialize` partitions
    rank0              diffusers' `from_config` inside `deepspeed.zero.Init`; then rank 0 reads tensor after tensor, and
                       `GatheredParameters` sends them to the others
    zero_init          `from_pretrained` inside `deepspeed.zero.Init`
    zero_init_whole    the same with low_cpu_mem_usage=False
    zero_init_ignore   the same with ignore_mismatched_sizes=True besides, as the error of the way before asks for

All end as a DeepSpeed engine of stage 3 with the same JSON. Only the output layer trains, as if with LoRA, so that the
optimizer's memory, the same for all, does not hide what loading takes. The ways take turns, each time in fresh
processes under the `deepspeed` launcher; the page cache holds the files. Afterwards every rank compares its partition
with the files; a way that fails, or loads other values, is not tried again, and its figures are left out.

Of each way, for the module alone (`loaded`) and with DeepSpeed's engine (`engine`), the worse rank's:

    seconds      from a barrier, libraries imported
    cpu_seconds  of processor, with waiting for the other rank where that keeps a core busy
    read         bytes that went through read(2), over the files' bytes (rchar of /proc/self/io)
    mapped       bytes of the files that were mapped into memory, over the files' bytes; read when they are touched
    peak         growth of resident memory at its peak, over a partition's bytes (VmHWM)
    anonymous    the same without pages of mapped files, which the kernel can take back; sampled every 5 ms
"""

import argparse
import json
import os
import re
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trainer_overhead import at_least, launch

from dstrain.models.qwen_image import QwenImageDiT, QwenImageParams
from dstrain.models.weights import Weights, WeightsWriter

ROOT = Path(__file__).parents[1]
WORLD, FILES = 2, 5
TRAINED = "proj_out."
PAGE = os.sysconf("SC_PAGE_SIZE")


def write_checkpoint(folder: Path, layers: int, heads: int) -> int:
    """Write random weights as diffusers has them, a tensor at a time; return the bytes of the files."""
    with torch.device("meta"):
        model = QwenImageDiT(QwenImageParams(num_layers=layers, num_attention_heads=heads))
    shapes = {name: p.shape for name, p in model.named_parameters()}
    size = 2 * sum(shape.numel() for shape in shapes.values())
    writer = WeightsWriter(folder, shapes, torch.bfloat16, max_bytes=-(-size // FILES))
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        writer.write(name, torch.empty(shape, dtype=torch.bfloat16).uniform_(-0.05, 0.05, generator=generator))
    writer.close()
    config = {"_class_name": "QwenImageTransformer2DModel", "num_layers": layers, "num_attention_heads": heads}
    (folder / "config.json").write_text(json.dumps(config))
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


Stages = Iterator[Any]  # the module, then DeepSpeed's engine


def with_dstrain(folder: Path, config: dict[str, Any]) -> Stages:
    from dstrain.engine.engine import Engine, fill_partitioned

    settings = json.loads((folder / "config.json").read_text())
    with torch.device("meta"):
        module = QwenImageDiT(QwenImageParams.from_config(settings))
    only_output_trains(module)
    weights = Weights(folder)
    weights.check({name: p.shape for name, p in module.named_parameters()})

    def fill(name: str, shape: torch.Size, start: int, stop: int) -> Tensor:
        return weights.read(name, start, stop)

    fill_partitioned(module, fill, config, torch.bfloat16)
    yield module
    one_gather_a_block(module)
    yield Engine(module, config).ds


def with_from_pretrained(folder: Path, config: dict[str, Any]) -> Stages:
    from diffusers import QwenImageTransformer2DModel

    module = QwenImageTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16)
    yield only_output_trains(module)
    yield initialize(module, config)


def with_zero_init(folder: Path, config: dict[str, Any], **options: bool) -> Stages:
    import deepspeed
    from diffusers import QwenImageTransformer2DModel

    with deepspeed.zero.Init(config_dict_or_path=config):
        module = QwenImageTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16, **options)
    yield only_output_trains(module)
    yield initialize(module, config)


def with_rank0(folder: Path, config: dict[str, Any]) -> Stages:
    import deepspeed
    from diffusers import QwenImageTransformer2DModel
    from safetensors import safe_open

    settings = QwenImageTransformer2DModel.load_config(folder)
    with deepspeed.zero.Init(config_dict_or_path=config):
        module = QwenImageTransformer2DModel.from_config(settings)
    with ExitStack() as stack:
        tensors = dict[str, Any]()
        if torch.distributed.get_rank() == 0:
            for path in folder.glob("*.safetensors"):
                file = stack.enter_context(safe_open(path, "pt"))
                tensors |= dict.fromkeys(file.keys(), file)
        for name, p in module.named_parameters():
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0):
                if tensors:
                    p.data.copy_(tensors[name].get_tensor(name))
        yield only_output_trains(module)
    yield initialize(module, config)


WAYS: Mapping[str, Callable[[Path, dict[str, Any]], Stages]] = {
    "dstrain": with_dstrain,
    "from_pretrained": with_from_pretrained,
    "rank0": with_rank0,
    "zero_init": with_zero_init,
    "zero_init_whole": partial(with_zero_init, low_cpu_mem_usage=False),
    "zero_init_ignore": partial(with_zero_init, low_cpu_mem_usage=False, ignore_mismatched_sizes=True),
}


def only_output_trains(module: torch.nn.Module) -> torch.nn.Module:
    for name, p in module.named_parameters():
        p.requires_grad_(name.startswith(TRAINED))
    return module


def one_gather_a_block(module: Any) -> None:
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(module, [type(module.transformer_blocks[0])])


def initialize(module: torch.nn.Module, config: dict[str, Any]) -> Any:
    import deepspeed

    one_gather_a_block(module)
    trained = [p for p in module.parameters() if p.requires_grad]
    return deepspeed.initialize(model=module, model_parameters=trained, config=config)[0]


class Watch:
    """What this process has read and held since it was made."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self._resident, self._read = status("VmRSS"), bytes_read()
        self._anonymous = self._peak = anonymous()
        self._mapped = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        self._start, self._cpu = time.perf_counter(), time.process_time()

    def _sample(self) -> None:
        while not self._done.wait(0.005):
            self._peak = max(self._peak, anonymous())

    def figures(self, folder: Path) -> dict[str, float]:
        """Return bytes, and seconds, up to now."""
        seconds, cpu = time.perf_counter() - self._start, time.process_time() - self._cpu
        found = {
            "seconds": seconds,
            "cpu_seconds": cpu,
            "read": bytes_read() - self._read,
            "peak": status("VmHWM") - self._resident,
        }
        self._peak, self._mapped = max(self._peak, anonymous()), max(self._mapped, mapped(folder))
        return found | {"mapped": self._mapped, "anonymous": self._peak - self._anonymous}

    def close(self) -> None:
        self._done.set()
        self._thread.join()


def status(key: str) -> int:
    """A figure of this process in bytes."""
    found = re.search(rf"^{key}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def bytes_read() -> int:
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    assert found is not None
    return int(found[1])


def anonymous() -> int:
    """Resident bytes that are no file's: /proc/self/statm is short, as reading it counts as reading."""
    _, resident, shared, *_ = Path("/proc/self/statm").read_text().split()
    return (int(resident) - int(shared)) * PAGE


def mapped(folder: Path) -> int:
    """Bytes of the folder's files that are mapped now."""
    total = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if f"{folder.resolve()}/" in line:
            begin, end = line.split(maxsplit=1)[0].split("-")
            total += int(end, 16) - int(begin, 16)
    return total


def wrong_elements(module: Any, folder: Path, rank: int) -> int:
    """Count the elements of this rank's partition that are not the files'."""
    weights, wrong = Weights(folder), 0
    for name, p in module.named_parameters():
        shard = p.ds_tensor
        if p.ds_shape != weights.entries[name].shape:
            wrong += shard.numel()
            continue
        mine = weights.read(name, rank * shard.numel(), (rank + 1) * shard.numel())
        wrong += int((shard.data[: len(mine)] != mine).sum())
    return wrong


def work(args: argparse.Namespace) -> None:
    """Load in one way on this rank; the first one writes what all have found."""
    from importlib.metadata import version

    from diffusers import QwenImageTransformer2DModel  # noqa: F401, its import is not what is measured
    from diffusers.utils.logging import disable_progress_bar
    from train_step import machine

    from dstrain.config import Recipe
    from dstrain.engine import distributed
    from dstrain.engine.ds_config import complete
    from dstrain.knobs import build

    warnings.filterwarnings("ignore", category=FutureWarning)
    disable_progress_bar()
    recipe = build(
        Recipe,
        {
            "run_dir": "unused",
            "model": {"path": "unused"},
            "data": {"shards": ["unused"]},
            "batch": {"global_batch_size": WORLD},
            "train": {"steps": 1},
        },
        "benchmark",
    )
    world = distributed.start()
    zero = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 1 << 20}}
    config = complete(zero, recipe, world_size=world.size, bf16=True, path=Path("benchmark.json"))
    distributed.barrier()
    watch, found, error = Watch(), dict[str, Any](), ""
    try:
        stages = WAYS[args.way](args.folder, config)
        module = next(stages)
        found["loaded"] = watch.figures(args.folder)
        engine = next(stages)
        found["engine"] = watch.figures(args.folder)
        watch.close()
        wrong = wrong_elements(engine.module, args.folder, world.rank)
        assert engine.module is module
        if wrong:
            held = sum(p.ds_tensor.numel() for p in module.parameters())
            error = f"no error, but {wrong:,} of this rank's {held:,} values are not the files'"
    except Exception as e:  # of diffusers or DeepSpeed, which is then the result
        error = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    every = distributed.share([found | {"error": error}])
    if world.is_main:
        versions = {"diffusers": version("diffusers"), "safetensors": version("safetensors")}
        result = {"ranks": every, "machine": machine(world.device) | versions}
        args.out.write_text(json.dumps(result))
    distributed.stop(0, together=True)


def summary(rounds: Sequence[Sequence[dict[str, Any]]], file_size: int, world: int) -> dict[str, Any]:
    """Turn the figures of all rounds, of all ranks each, into medians and spreads of the worse rank's.

    Bytes read and mapped are given of the files' bytes, memory of a rank's share of them.
    """
    if error := failure(rounds):
        return {"error": error}
    units: dict[str, float] = {"seconds": 1, "cpu_seconds": 1, "read": file_size, "mapped": file_size}
    units |= dict.fromkeys(("peak", "anonymous"), file_size / world)
    return {
        stage: {
            key: spread([max(rank[stage][key] for rank in ranks) / unit for ranks in rounds])
            for key, unit in units.items()
        }
        for stage in ("loaded", "engine")
    }


def failure(rounds: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Return the first error of any rank, "" if there is none."""
    return next((rank["error"] for ranks in rounds for rank in ranks if rank["error"]), "")


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def against(rounds: Mapping[str, Sequence[Sequence[dict[str, Any]]]]) -> dict[str, dict[str, float]]:
    """Seconds of every other way over dstrain's in the same round, up to DeepSpeed's engine."""

    def seconds(ranks: Sequence[dict[str, Any]]) -> float:
        return max(rank["engine"]["seconds"] for rank in ranks)

    return {
        way: spread([seconds(theirs) / seconds(ours) for theirs, ours in zip(found, rounds["dstrain"], strict=True)])
        for way, found in rounds.items()
        if way != "dstrain" and not failure(found)
    }


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--rounds", type=at_least(1), default=3, help="of all ways in turn (default: %(default)s)")
    add("--layers", type=at_least(1), default=3, help="blocks, 0.68 GB each at full width (default: %(default)s)")
    add("--heads", type=at_least(1), default=24, help="of 128 channels (default: %(default)s, as published)")
    add("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    add("--out", type=Path, default=ROOT / "benchmarks/results/weight_loading.json", help="default: %(default)s")
    add("--way", choices=WAYS, help=argparse.SUPPRESS)  # on the ranks
    add("--folder", type=Path, help=argparse.SUPPRESS)
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.way:
        work(args)
    load = os.getloadavg()[0]
    rounds: dict[str, list[Any]] = {way: [] for way in args.ways}
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp, "checkpoint")
        folder.mkdir()
        size = write_checkpoint(folder, args.layers, args.heads)
        for _ in range(args.rounds):
            for way, found in rounds.items():
                if failure(found):
                    continue
                for path in folder.glob("*.safetensors"):
                    read_through(path)
                out = Path(tmp, "figures.json")
                launch(Path(__file__), ["--way", way, "--folder", folder, "--out", out], Path(tmp, "log"), ranks=WORLD)
                figures = json.loads(out.read_text())
                found.append(figures["ranks"])
        files = len(list(folder.glob("*.safetensors")))
    result = {
        "file_bytes": size,
        "files": files,
        "world_size": WORLD,
        "rounds": args.rounds,
        "layers": args.layers,
        "heads": args.heads,
        "trains": TRAINED,
        "page_cache": "warm",
        "load_before": load,
        "machine": figures["machine"],
        "ways": {way: summary(found, size, WORLD) for way, found in rounds.items()},
        "seconds_over_dstrain": against(rounds) if "dstrain" in rounds else {},
    }
    for way, found in result["ways"].items():
        print(describe(way, found))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


def read_through(path: Path) -> None:
    """Bring a file into the page cache."""
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(1 << 22)
        while file.readinto(buffer):
            pass


def describe(way: str, found: dict[str, Any]) -> str:
    """One line of figures."""
    if "error" in found:
        return f"{way}: {found['error']}"
    of = {stage: {key: value["median"] for key, value in found[stage].items()} for stage in ("loaded", "engine")}
    return f"{way}: " + "; ".join(
        f"{stage} {f['seconds']:.2f} s, of processor {f['cpu_seconds']:.2f} s, read {f['read']:.3f} and mapped"
        f" {f['mapped']:.2f} of the files,"
        f" peak {f['peak']:.2f} and anonymous {f['anonymous']:.2f} partitions"
        for stage, f in of.items()
    )


if __name__ == "__main__":
    main()

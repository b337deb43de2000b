"""Measure what the trainer adds to a bare DeepSpeed loop: the same model, the same packs, the same ds_config.

    python benchmarks/trainer_overhead.py                # some minutes on two quiet cores

The driver starts the `deepspeed` launcher with two CPU ranks (gloo, one thread each) for every ds_config. On each rank
one process holds both:

    trainer   `Trainer.train_step` and what the training loop does after it, on the demo's pictures and recipe: loader,
              encoded samples from the cache, noise, objective, sums over the ranks, metrics, metrics.jsonl, bar
    bare      plain `deepspeed.zero.Init` and `deepspeed.initialize` with the same JSON and one gather a block, and a
              loop of forward, weighted squared error, backward and step. What it is fed lies ready in memory: the
              noised latents, embeddings, layouts, targets and weights that the trainer makes of the same samples

The demo's transformer is made wider, so that a step takes as long as steps that people wait for do; fixed costs are a
larger share of a shorter one. Before the clock runs, the trainer goes through all steps once with an engine that only
notes what it is given: that warms the cache and makes the bare loop's packs. Then both take every step, in turns (a
pair is trainer, bare; the next one bare, trainer), each timed from a barrier. Samples that are read ahead in a
trainer's step are waited for inside its time. Both start from the same weights, and their losses are compared at every
step: they are to do the same work.

The trainer's steps with the engine that only notes are timed as well, before the pairs (`without_engine`): what the
overhead is made of but for the engine's own, with little noise.

A pair's overhead is trainer / bare - 1, of wall time (of the slower rank) and of processor time (of both, with all
threads, and with waiting for the other rank, which keeps a core busy). `others_cores` is what the rest of the machine
kept busy meanwhile: where that is not near 0, the machine was shared and the figures are not worth much.
"""

import argparse
import copy
import json
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
ROOT = Path(__file__).parents[1]
DS_CONFIGS = [ROOT / "ds_configs/zero2.json", ROOT / "ds_configs/zero3_offload.json"]
SAME_WEIGHTS, SAME_RUN = 1e-5, 1e-3  # relative difference of the losses: of the first step, of any
PARTS = ("data_wait_s", "encode_s", "optimizer_s", "log_s", "read_ahead_s")


@dataclass(frozen=True)
class Pack:
    """A micro-batch of the bare loop. I image tokens."""

    inputs: tuple[Any, ...]  # of the model: x_t, prompt embeddings, sigmas, layout
    target: Tensor  # [I, C], the velocity
    scale: Tensor  # [I, 1], what a squared error counts in the loss of the global batch


class Recorder:
    """Stands where the trainer has its engine, and computes nothing: notes what the model would be given."""

    def __init__(self, module: Any) -> None:
        self.module, self.inputs = module, list[tuple[Any, ...]]()

    def __call__(self, *inputs: Any) -> Tensor:
        self.inputs.append(inputs)
        return torch.zeros_like(inputs[0])

    def backward(self, loss: Tensor, *, last: bool) -> None: ...

    def step(self, lr_factor: float, steps_done: int) -> float:
        return 0.0


def record(trainer: Any, steps: int) -> list[list[Pack]]:
    """Return this rank's packs of each step, as the trainer makes them; the trainer's weights stay as they are."""
    from dstrain.kernels.flow_match import noise_reference

    engine, objective, total = trainer.engine, trainer.objective, trainer.recipe.batch.global_batch_size
    made: list[Pack] = []

    def noting(velocity: Callable[..., Tensor], x0: Tensor, layout: Any, draws: Tensor) -> Any:
        losses = objective(velocity, x0, layout, draws)
        sample = layout.image_sample
        noise = noise_reference(x0.shape[1], sample, layout.first_image_token, objective.seed, draws)
        elements = torch.tensor(layout.image_lens) * x0.shape[1]  # [N]
        scale = (losses.weights / elements / total)[sample][:, None]
        made.append(Pack(recorder.inputs[-1], noise - x0, scale))
        return losses

    packs = []
    trainer.engine, trainer.objective = recorder, _ = Recorder(engine.module), noting
    for step in range(steps):
        trainer.train_step(step)
        packs.append(made[:])
        made.clear()
    trainer.engine, trainer.objective = engine, objective
    return packs


def without_engine(trainer: Any, steps: int) -> list[dict[str, float]]:
    """Return this rank's seconds of each step with nothing computed in it."""
    engine = trainer.engine
    trainer.engine = Recorder(engine.module)
    seconds = [timed(partial(trainer.train_step, step))[1] for step in range(steps)]
    trainer.engine = engine
    return seconds


class Bare:
    """The loop that one would write with DeepSpeed alone."""

    def __init__(self, job: Any, world_size: int) -> None:
        import deepspeed
        from deepspeed.utils import set_z3_leaf_modules

        config = copy.deepcopy(job.ds_config)
        partitioned = config["zero_optimization"]["stage"] == 3
        with deepspeed.zero.Init(config_dict_or_path=config, enabled=partitioned):
            model = job.build_transformer()
        values = job.start_values()
        for name, p in model.named_parameters():
            shape = job.shapes[name]
            with deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=partitioned):
                p.data.copy_(values(name, shape, 0, shape.numel()).view(shape))
        if partitioned:
            set_z3_leaf_modules(model, [model.block_class])
        trained = [p for p in model.parameters() if p.requires_grad]
        self.engine = deepspeed.initialize(model=model, model_parameters=trained, config=config)[0]
        self.world_size = world_size

    def step(self, packs: Sequence[Pack]) -> tuple[Tensor, float]:
        """Return this rank's part of the loss, and the seconds of the optimizer."""
        losses = []
        for pack in packs:
            last = pack is packs[-1]
            self.engine.set_gradient_accumulation_boundary(last)
            velocity = self.engine(*pack.inputs)
            loss = ((velocity.float() - pack.target).square() * pack.scale).sum()
            self.engine.backward(loss * self.world_size)
            losses.append(loss.detach())
            before = time.perf_counter()
            self.engine.step()
        return torch.stack(losses).sum(), time.perf_counter() - before


class Looped:
    """A step of the trainer with what its loop does besides."""

    def __init__(self, trainer: Any, steps: int) -> None:
        from tqdm import tqdm

        from dstrain.tracking.tracker import open_trackers

        self.trainer, main = trainer, trainer.world.is_main
        self.tracker = open_trackers(Path(trainer.recipe.run_dir), "off", "", "", {}, 0, main)
        self.bar = tqdm(total=steps, disable=not main, unit="step", dynamic_ncols=True)

    def step(self, step: int) -> dict[str, float]:
        """Return the step's figures, and the seconds of what follows it."""
        stats = self.trainer.train_step(step)
        before = time.perf_counter()
        stats.pop("stopping")
        self.tracker.log(step, stats)
        self.bar.set_postfix(loss=f"{stats['loss']:.4f}", refresh=False)
        self.bar.update()
        logged = time.perf_counter()
        for coming in self.trainer.loader._queue:
            wait(coming.futures)
        return stats | {"log_s": logged - before, "read_ahead_s": time.perf_counter() - logged}

    def close(self) -> None:
        self.bar.close()
        self.tracker.finish()
        self.trainer.loader.close()


def timed(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """Run `work` on all ranks from the same moment; return what it gives, and this rank's wall and processor time."""
    from dstrain.engine import distributed

    distributed.barrier()
    cpu, wall = time.process_time(), time.perf_counter()
    result = work()
    return result, {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def work(args: argparse.Namespace) -> None:
    """Measure on this rank; the first one writes what all have found."""
    import psutil
    from train_step import machine

    from dstrain.config import load_recipe
    from dstrain.engine import distributed
    from dstrain.engine.ds_config import read_ds_config
    from dstrain.job import prepare
    from dstrain.trainer import Trainer

    warnings.filterwarnings("ignore", category=FutureWarning)
    folder, ds_path = args.worker, args.ds_config[0]
    recipe = load_recipe(ROOT / "launch/recipes/demo.yaml", overrides(args, folder))
    config = read_ds_config(ds_path) | {"bf16": {"enabled": False}}  # so that the losses can be compared
    job = prepare(recipe, ds_path, config, distributed.environment_world()[2])
    world = distributed.start()
    trainer = Trainer(job, world, resume="never")
    steps = args.warmup + args.pairs
    packs, alone = record(trainer, steps), without_engine(trainer, steps)
    looped, bare = Looped(trainer, steps), Bare(job, world.size)

    rows, begin = [], None
    for step in range(steps):
        if step == args.warmup:
            begin = time.perf_counter(), time.process_time(), machine_seconds(psutil.cpu_times())
        found: dict[str, Any] = {"without_engine": alone[step]}
        for name in ("trainer", "bare") if step % 2 == 0 else ("bare", "trainer"):
            if name == "trainer":
                stats, seconds = timed(partial(looped.step, step))
                found[name] = seconds | {part: stats[part] for part in PARTS}
            else:
                (part, optimizer_s), seconds = timed(partial(bare.step, packs[step]))
                found[name] = seconds | {"optimizer_s": optimizer_s}
        loss = float(distributed.sum_over_ranks(part.double()))
        found["losses"] = [stats["loss"], loss]
        found["micro_steps"], found["tokens"] = stats["micro_steps"], stats["tokens"]
        rows.append(found)
    assert begin is not None
    elapsed = time.perf_counter() - begin[0]
    mine = time.process_time() - begin[1]
    busy = machine_seconds(psutil.cpu_times()) - begin[2]
    ranks: list[dict[str, Any]] = distributed.share([{"rows": rows, "cpu_s": mine}])
    looped.close()
    if world.is_main:
        figures = {
            "ranks": [r["rows"] for r in ranks],
            "others_cores": max(0.0, busy - sum(r["cpu_s"] for r in ranks)) / elapsed,
            "parameters": sum(shape.numel() for shape in job.shapes.values()),
            "dtype": str(job.dtype).removeprefix("torch."),
            "ds_config": job.ds_config,
            "machine": machine(world.device),
        }
        (folder / "figures.json").write_text(json.dumps(figures))
    distributed.stop(0, together=True)


def machine_seconds(times: Any) -> float:
    """Processor time of the whole machine so far."""
    return times.user + times.nice + times.system + times.irq + times.softirq + times.steal


def overrides(args: argparse.Namespace, folder: Path) -> list[str]:
    """What differs from the demo's recipe."""
    return [
        f"run_dir={folder / 'run'}",
        f"model.path={folder / 'model'}",
        f"batch.global_batch_size={args.batch}",
        f"batch.tokens_per_pack={args.tokens}",
        "objective.weighting=bell",
        "optimizer.lr=1e-4",
        "optimizer.schedule=constant",  # one rate from the first step on, as in the bare loop
        "optimizer.warmup_steps=0",
        f"train.steps={args.warmup + args.pairs}",
        "tracking.wandb=off",
    ]


def summary(figures: dict[str, Any], warmup: int) -> dict[str, Any]:
    """Turn the rows of all ranks into medians and spreads; RuntimeError if the two did not do the same work."""
    per_step = list(zip(*figures["ranks"], strict=True))  # [step][rank]
    gaps = [abs(a - b) / abs(b) for a, b in (rows[0]["losses"] for rows in per_step)]
    if not gaps[0] <= SAME_WEIGHTS or not all(gap <= SAME_RUN for gap in gaps):
        raise RuntimeError(f"trainer and bare loop do not do the same: their losses differ by {gaps}")
    steps = per_step[warmup:]
    timings = ("trainer", "bare", "without_engine")
    wall = {name: [max(rank[name]["wall_s"] for rank in step) for step in steps] for name in timings}
    cpu = {name: [sum(rank[name]["cpu_s"] for rank in step) for step in steps] for name in timings}

    def parts(name: str, keys: Sequence[str]) -> dict[str, float]:
        return {k: statistics.median(statistics.mean(r[name][k] for r in step) for step in steps) for k in keys}

    ours, theirs = parts("trainer", PARTS), parts("bare", ("optimizer_s",))
    return {
        "pairs": len(steps),
        "overhead_wall": overhead(wall["trainer"], wall["bare"]),
        "overhead_cpu": overhead(cpu["trainer"], cpu["bare"]),
        "step_s": {name: quartiles(values) for name, values in wall.items()},
        "cpu_s": {name: quartiles(values) for name, values in cpu.items()},
        "added_s": quartiles([a - b for a, b in zip(wall["trainer"], wall["bare"])]),
        "trainer_parts_s": ours,
        "bare_parts_s": theirs,
        "loss_gap": {"first": gaps[0], "largest": max(gaps)},
        "micro_steps": statistics.mean(step[0]["micro_steps"] for step in steps),
        "tokens": statistics.mean(step[0]["tokens"] for step in steps),
        **{k: v for k, v in figures.items() if k not in ("ranks", "machine")},
    }


def quartiles(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def overhead(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """ours / theirs - 1 of each pair: median, quartiles, and the 95 % interval of the median (bootstrap)."""
    ratios = [a / b - 1 for a, b in zip(ours, theirs, strict=True)]
    pick = random.Random(0)
    medians = sorted(statistics.median(pick.choices(ratios, k=len(ratios))) for _ in range(2000))
    return quartiles(ratios) | {"ci_low": medians[50], "ci_high": medians[1949]}


def launch(script: Path, arguments: Sequence[object], log: Path, *, ranks: int = 2, timeout: float = 600) -> None:
    """Run `script` on CPU ranks under the deepspeed launcher; RuntimeError with the end of its output if it fails."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}
    deepspeed = Path(sys.executable).parent / "deepspeed"
    argv = [deepspeed, "--num_accelerators", ranks, "--master_port", port, script, *arguments]
    with (
        log.open("wb") as out,
        subprocess.Popen(
            [str(a) for a in argv], cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        ) as process,
    ):
        try:
            code = process.wait(timeout)
        except BaseException:  # an interrupt, too
            os.killpg(process.pid, signal.SIGKILL)  # the launcher and its ranks
            raise
    if code:
        raise RuntimeError(f"{script.name} ended with {code}\n{log.read_text(errors='replace')[-4000:]}")


def make_model(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Copy the demo's model folder with a larger transformer; return the transformer's config."""
    shutil.copytree(ROOT / "launch/demo/model", folder)
    path = folder / "transformer/config.json"
    config = json.loads(path.read_text()) | {"num_layers": args.layers, "num_attention_heads": args.heads}
    path.write_text(json.dumps(config, indent=2))
    return config


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--ds_config", type=Path, nargs="+", default=DS_CONFIGS, help="default: zero2 and zero3_offload")
    add("--pairs", type=at_least(2), default=40, help="of timed steps (default: %(default)s)")
    add("--warmup", type=at_least(1), default=5, help="pairs before the clock runs (default: %(default)s)")
    add("--layers", type=at_least(1), default=4, help="of the transformer; the demo has 4 (default: %(default)s)")
    add("--heads", type=at_least(1), default=8, help="of 64 channels; the demo has 4 (default: %(default)s)")
    add("--batch", type=at_least(2), default=32, help="samples of a step, of both ranks (default: %(default)s)")
    add("--tokens", type=at_least(16), default=256, help="most of a pack (default: %(default)s)")
    add("--out", type=Path, default=ROOT / "benchmarks/results/trainer_overhead.json", help="default: %(default)s")
    add("--worker", type=Path, help=argparse.SUPPRESS)  # the driver's folder, on the ranks
    add("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    return parser.parse_args(argv)


def at_least(low: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is less than {low}")
        return value

    return number


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.worker:
        work(args)
    names = ("pairs", "warmup", "layers", "heads", "batch", "tokens")
    result: dict[str, Any] = {"workload": {k: getattr(args, k) for k in names}, "load_before": os.getloadavg()[0]}
    for ds_config in args.ds_config:
        with tempfile.TemporaryDirectory() as tmp:
            folder = Path(tmp)
            result["model"] = make_model(args, folder / "model")
            options = [text for name in names for text in (f"--{name}", getattr(args, name))]
            launch(Path(__file__), [*options, "--ds_config", ds_config.resolve(), "--worker", folder], folder / "log")
            figures = json.loads((folder / "figures.json").read_text())
        found = summary(figures, args.warmup)
        result |= {ds_config.stem: found, "machine": figures["machine"]}
        print(describe(ds_config.stem, found))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


def describe(name: str, found: dict[str, Any]) -> str:
    """One line of figures."""
    wall, cpu, step = found["overhead_wall"], found["overhead_cpu"], found["step_s"]
    return (
        f"{name}: a step {step['bare']['median']:.3f} s bare, {step['trainer']['median']:.3f} s in the trainer;"
        f" overhead {wall['median']:+.1%} of wall time ({wall['low']:+.1%} to {wall['high']:+.1%},"
        f" median {wall['ci_low']:+.1%} to {wall['ci_high']:+.1%}), {cpu['median']:+.1%} of processor time, of which"
        f" {found['cpu_s']['without_engine']['median'] / found['cpu_s']['bare']['median']:.1%} outside the engine;"
        f" others kept {found['others_cores']:.2f} cores busy"
    )


if __name__ == "__main__":
    main()

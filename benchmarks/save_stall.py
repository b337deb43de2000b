"""What a save of 1 GB of state costs the training loop: beside the training, before it, and DeepSpeed's own.

    python benchmarks/save_stall.py --out benchmarks/results/save_stall.json

The same steps are taken again and again, with no save, with one in the background (train.async_save: on), one written
while the loop waits (off), and one by DeepSpeed's `save_checkpoint`, in turn, in one process group. For each: the time
of all steps with the save in it, and the time for which the loop was held in saving. One rank with one thread leaves a
core for the thread that writes, as machines with GPUs have; with --ranks 2 both cores of a small machine compute.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from train_step import ShardedEngine, machine, model_params, parse_args, positive, random_pack, whole_step

MODES = ("none", "background", "waiting", "deepspeed")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--ranks", type=positive, default=1)
    add("--rounds", type=positive, default=7)
    add("--steps", type=positive, default=8, help="steps of a measurement; the save begins before the first")
    add("--heads", type=positive, default=9, help="of 64 channels; 2 blocks of 9 heads make 1 GB of state")
    add("--tokens", type=positive, default=512, help="of a rank's pack")
    add("--out", type=Path)
    add("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return, by mode, seconds of the steps and seconds held, round by round; and bytes of a checkpoint."""
    from dstrain.engine import distributed
    from dstrain.engine.saver import Saver

    fixed = "--ds_config ds_configs/zero3.json --layers 2 --head_dim 64 --text_tokens 64 --text_dim 512"
    workload = parse_args([*fixed.split(), "--heads", str(args.heads), "--image_tokens", str(args.tokens - 64)])
    params = model_params(workload)
    sharded = ShardedEngine(workload, params)
    engine, device = sharded.engine, sharded.engine.ds.device
    packs = [random_pack(workload, params, device, seed=distributed.rank())]
    for _ in range(2):
        whole_step(sharded, packs)
    savers = {
        name: Saver(engine.master, folder / name, background="on" if name == "background" else "off")
        for name in ("background", "waiting")
    }
    seconds: dict[str, list[float]] = {mode: [] for mode in MODES}
    held: dict[str, list[float]] = {mode: [] for mode in MODES}
    step = 0
    for turn in range(args.rounds + 1):
        for mode in MODES:
            os.sync()
            distributed.barrier()
            start, waited, saver = time.perf_counter(), 0.0, savers.get(mode)

            def timed(work: Any, *values: Any) -> float:
                before = time.perf_counter()
                work(*values)
                return time.perf_counter() - before

            if saver:
                waited += timed(saver.begin, step, {})
            elif mode == "deepspeed":
                waited += timed(engine.ds.save_checkpoint, str(folder / mode), f"step-{turn}")
            for _ in range(args.steps):
                for pack in packs:
                    sharded.backward(sharded.forward(pack), last=pack is packs[-1])
                waited += timed(engine.master.may_change.wait)
                sharded.step()
                step += 1
                if saver and saver.saving and all(distributed.gather(saver.written)):
                    waited += timed(saver.commit)
            taken = time.perf_counter() - start
            if saver and saver.saving:  # the steps were over before the disk
                saver.commit()
            if turn:  # the first takes the memory of the copy
                seconds[mode].append(taken)
                held[mode].append(waited)
            if mode == "deepspeed":
                shutil.rmtree(folder / mode)
    size = sum(p.stat().st_size for p in max((folder / "waiting").glob("step-*")).iterdir())
    return {"seconds": seconds, "held": held, "bytes": size, "machine": machine(device)}


def summary(values: Sequence[float]) -> dict[str, float]:
    low, _, high = quantiles(values, n=4)
    return {"median": round(median(values), 4), "quartiles": [round(low, 4), round(high, 4)]}  # type: ignore[dict-item]


def report(args: argparse.Namespace, found: dict[str, Any]) -> dict[str, Any]:
    seconds, held = found["seconds"], found["held"]
    write = held["waiting"]
    modes = {}
    for mode in MODES:
        more = [t - none for t, none in zip(seconds[mode], seconds["none"])]
        modes[mode] = {
            "steps_s": summary(seconds[mode]),
            "held_s": summary(held[mode]),
            "held_share_of_the_waiting_save": summary([h / w for h, w in zip(held[mode], write)]),
            "longer_than_no_save_s": summary(more),
            "longer_share_of_the_waiting_save": summary([m / w for m, w in zip(more, write)]),
        }
    return {
        "what": "one save in so many steps, side by side in turn; fp32, ZeRO-3",
        "ranks": args.ranks,
        "steps": args.steps,
        "rounds": args.rounds,
        "checkpoint_gb": round(found["bytes"] / 1e9, 3),
        "modes": modes,
        "machine": found["machine"],
    }


def main() -> None:
    args = arguments()
    if args.worker:
        from dstrain.engine import distributed

        found = measure(args, args.worker)
        if distributed.is_main():
            (args.worker / "found.json").write_text(json.dumps(found))
        distributed.stop(0, together=True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(args.ranks)}
        shared |= {"OMP_NUM_THREADS": "1", "LOCAL_SIZE": str(args.ranks)}
        ranks = [
            subprocess.Popen(
                [sys.executable, __file__, *sys.argv[1:], "--worker", folder],
                env=os.environ | shared | {"RANK": str(r), "LOCAL_RANK": str(r)},
            )
            for r in range(args.ranks)
        ]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            sys.exit("a rank failed")
        figures = json.dumps(report(args, json.loads(Path(folder, "found.json").read_text())), indent=2)
    sys.stdout.write(figures + "\n")
    if args.out:
        args.out.write_text(figures + "\n")


if __name__ == "__main__":
    main()

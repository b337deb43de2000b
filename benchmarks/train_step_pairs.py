"""Compare train_step.py under a ds_config with plain PyTorch: pairs of runs in turn, and the ratio with its spread.

    python benchmarks/train_step_pairs.py --pairs 5 --out benchmarks/results/NAME.json -- --layers 4 --heads 4 ...

What follows `--` goes to both. Plain PyTorch is what a step costs without an engine, in fp32 on one process; the engine
is DeepSpeed's, with its hooks, partitioning and CPU optimizer. The ratio is plain / engine of the median step times.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ds_config", type=Path, nargs="+", default=[HERE.parent / "ds_configs/zero3_offload.json"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("workload", nargs="*")
    args = parser.parse_args()
    runs: dict[str, list[dict]] = {"plain": [], **{c.stem: [] for c in args.ds_config}}
    configs = {c.stem: c for c in args.ds_config}
    for _ in range(args.pairs):
        for name in runs:
            runs[name].append(measure(configs.get(name), args.workload))
            print(name, f"{runs[name][-1]['step_s']['median']:.4f} s", file=sys.stderr)
    plain = [r["step_s"]["median"] for r in runs["plain"]]
    result = {"plain": {"step_s": plain}, "machine": runs["plain"][0]["machine"], "model": runs["plain"][0]["model"]}
    result["workload"] = runs["plain"][0]["workload"]
    for name in configs:
        steps = [r["step_s"]["median"] for r in runs[name]]
        ratios = [p / s for p, s in zip(plain, steps)]
        result[name] = {
            "step_s": steps,
            "speed_against_plain": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "host_rss_gib": max(r["host_rss_gib"] for r in runs[name]),
        }
        print(
            name, {k: round(v, 3) for k, v in result[name]["speed_against_plain"].items()}, "of plain PyTorch's speed"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


def measure(ds_config: Path | None, workload: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        argv = [sys.executable, str(HERE / "train_step.py"), "--out", str(out), *workload]
        if ds_config:
            argv += ["--ds_config", str(ds_config)]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        return json.loads(out.read_text())


if __name__ == "__main__":
    main()

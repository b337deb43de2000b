"""What planning costs a rank: time a step and memory, up to a billion samples and 1,024 ranks.

    python benchmarks/planning.py --out benchmarks/results/data_planning.json

Each row runs in a process of its own. The dataset is synthetic (shards of 10,000 rows, samples of 1,000 to 5,095
tokens): no index is read, so this is the plan alone. `first_ms` is the first step that is asked for, in the middle of
an epoch; `mean_ms` and `max_ms` are of the steps that follow, which reach into the next windows.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from data.machine import processor

from dstrain.data.plan import Part, Plan
from dstrain.storage import write_json

SHARD = 10_000
CASES = [(10**6, 8, 256), (10**7, 64, 1024), (10**8, 256, 2048), (10**9, 1024, 4096)]  # samples, ranks, global batch


class Rows:
    """Samples that are nothing but their tokens, computed from their number."""

    def __init__(self, samples: int) -> None:
        self.parts = [Part(np.full(samples // SHARD, SHARD), samples)]
        self.max_tokens = 5095

    def tokens(self, rows: np.ndarray) -> np.ndarray:
        return 1000 + rows * 2654435761 % 4096


def measure(samples: int, ranks: int, batch: int, steps: int) -> dict[str, float]:
    """Plan `steps` steps from the middle of an epoch on, in this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    plan = Plan(
        Rows(samples),
        seed=0,
        global_batch_size=batch,
        tokens_per_pack=32_768,
        world_size=ranks,
        attention_length=18_432,
    )
    middle = samples // 2 // batch
    plan.step(middle)
    first = time.perf_counter() - start
    times = []
    for step in range(middle + 1, middle + 1 + steps):
        start = time.perf_counter()
        plan.step(step)
        times.append(1e3 * (time.perf_counter() - start))
    micros, used, waiting = plan.figures(middle)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "samples": samples,
        "ranks": ranks,
        "global_batch_size": batch,
        "first_ms": 1e3 * first,
        "mean_ms": float(np.mean(times)),
        "median_ms": float(np.median(times)),
        "max_ms": max(times),
        "peak_mb": peak / 1024,
        "imports_mb": before / 1024,
        "micro_steps": micros,
        "budget_used": used,
        "costliest_rank_over_mean": waiting,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--steps", type=int, default=200, help="steps measured a case (%(default)s)")
    parser.add_argument("--case", type=int, nargs=3, metavar=("SAMPLES", "RANKS", "BATCH"), help="measure one, here")
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(*args.case, args.steps)))
        return
    rows = []
    for case in CASES:
        argv = [sys.executable, __file__, "--steps", str(args.steps), "--case", *map(str, case)]
        rows.append(json.loads(subprocess.run(argv, check=True, capture_output=True, text=True).stdout))
        print(
            "{samples:>13,} samples {ranks:>5} ranks, batch {global_batch_size:>5}: first {first_ms:6.1f} ms, mean "
            "{mean_ms:5.1f} ms, max {max_ms:6.1f} ms a step, {peak_mb:4.0f} MB".format(**rows[-1])
        )
    if args.out:
        machine = {
            "cpu": processor() or platform.machine(),
            "python": platform.python_version(),
            "numpy": np.__version__,
        }
        write_json(args.out, {"machine": machine, "rows": rows})


if __name__ == "__main__":
    main()

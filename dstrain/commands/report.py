"""Draw the loss curve of a run and say in a few lines how it went. Works while the run is going on."""

import argparse
from pathlib import Path
from typing import Any

ABOUT = "draw the loss curve of a run, and sum it up"
RATES = {"samples_per_s": "samples/s", "tokens_per_s": "tokens/s", "mfu": "MFU"}
PEAKS = {"host_rss_gib": "GiB host (main rank)", "gpu_peak_gib": "GiB GPU"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="folder of a run, or its metrics.jsonl")
    parser.add_argument("--out", metavar="FILE.png", type=Path, help="the curve (RUN_DIR/loss.png)")


def run(args: argparse.Namespace) -> None:
    """Draw, and print the summary."""
    from dstrain.tracking.jsonl import read_metrics
    from dstrain.tracking.report import draw_loss_curve

    folder = args.run_dir.parent if args.run_dir.is_file() else args.run_dir
    out = args.out or folder / "loss.png"
    draw_loss_curve(args.run_dir, out)
    print(summary(read_metrics(args.run_dir)))
    print(f"curve   {out}")


def summary(records: list[dict[str, float]]) -> str:
    """Sum up the metrics of a run, a topic a line; topics that were not logged are left out.

    The loss is the mean over a tenth of the run at either end; rates are medians, since a step can wait for the disk.
    """
    import numpy as np

    def values(name: str) -> Any:
        found = np.array([record[name] for record in records if name in record], dtype=float)
        return found[np.isfinite(found)]

    lines = [f"steps   {len(records):,} ({records[0]['step']:,} to {records[-1]['step']:,})"]
    seconds = round(values("step_s").sum())
    if seconds:
        lines.append(f"time    {seconds // 3600} h {seconds // 60 % 60:02d} min {seconds % 60:02d} s")
    loss = values("loss")
    tenth = max(1, len(loss) // 10)
    lines.append(f"loss    {loss[:tenth].mean():.4g} at the start, {loss[-tenth:].mean():.4g} at the end")
    for topic, names, over in (("speed", RATES, np.median), ("memory", PEAKS, np.max)):
        found = [f"{over(values(name)):,.4g} {unit}" for name, unit in names.items() if len(values(name))]
        if found:
            lines.append(f"{topic:<8}{', '.join(found)}")
    return "\n".join(lines)

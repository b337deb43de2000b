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
    parser.add_argument(
        "--same_as", metavar="RUN_DIR", type=Path, help="say whether this run has the same bits; exit code 1 if not"
    )
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
    if args.same_as is not None:
        differs, text = compared(args.run_dir, args.same_as)
        print(f"bits    {text}")
        if differs:
            raise SystemExit(1)


def compared(run: Path, other: Path) -> tuple[bool, str]:
    """Return whether two runs differ, and in what: losses and gradient norms of common steps, then checkpoints."""
    from dstrain.engine import checkpoint
    from dstrain.tracking.jsonl import read_metrics

    ours, theirs = ({int(row["step"]): row for row in read_metrics(path)} for path in (run, other))
    common = sorted(ours.keys() & theirs.keys())
    for step in common:
        for name in ("loss", "grad_norm"):
            a, b = (float(rows[step].get(name, "nan")) for rows in (ours, theirs))
            if a.hex() != b.hex():
                return True, f"{name} of step {step} is {a!r}, in {other} {b!r}"
    names = [{p.name: p for p in checkpoint.committed(path / "checkpoints")} for path in (run, other)]
    shared = sorted(names[0].keys() & names[1].keys())
    for name in shared:
        files = [checkpoint.read_manifest(found[name])["files"] for found in names]
        if files[0] != files[1]:
            return True, f"the weights or moments of {name} differ from those in {other}"
    if not common:
        return True, f"no step is in both this run and {other}"
    return False, f"the same as in {other}: {len(common)} steps, checkpoints {', '.join(shared) or 'none in common'}"


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

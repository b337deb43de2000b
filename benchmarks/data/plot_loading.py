"""Draw what data_loading.py has measured.

python benchmarks/data/plot_loading.py benchmarks/results/data_loading.json     # writes data_loading.png beside it
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

_OURS, _OTHER, _BARE = "#1f6f8b", "#b8c4cc", "#e0a458"
TITLES = {
    ("raw_jpeg", "0"): "JPEGs of 86 kB, not decoded",
    ("raw_latent", "0"): "latents of 2.4 MB",
    ("decoded", "1"): "decoded to 512², 1 worker",
    ("decoded", "2"): "decoded to 512², 2 workers",
}


def bars(axes: Axes, rows: dict[str, Any], title: str) -> None:
    """Draw the median of each loader, and the least and greatest."""
    rows = {name: row for name, row in rows.items() if "error" not in row}
    names = sorted(rows, key=lambda name: rows[name]["median"])
    for place, name in enumerate(names):
        row = rows[name]
        colour = _OURS if name.startswith("dstrain") else _BARE if name.startswith("bare") else _OTHER
        error = [[row["median"] - row["min"]], [row["max"] - row["median"]]]
        axes.barh(place, row["median"], color=colour, xerr=error, error_kw={"lw": 1, "ecolor": "#555"})
        axes.text(row["max"] * 1.02, place, f" {row['median']:,.0f}", va="center", fontsize=8)
    labels = {name: name.replace(", dstrain", ", our decode") for name in names}
    labels |= {"dstrain, dstrain": "dstrain", "bare, dstrain": "bare loop"}
    axes.set_yticks(range(len(names)), [labels[name] for name in names], fontsize=8)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlim(0, max(row["max"] for row in rows.values()) * 1.18)
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel("samples a second", fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def lines(axes: Axes, loaders: dict[str, Any]) -> None:
    """Draw the seconds to the first sample over the place of an epoch."""
    for name, parts in loaders.items():
        rows = {part: row for part, row in parts.items() if "error" not in row}
        seconds = [row["first_s"]["median"] for row in rows.values()]
        count = next(iter(rows.values()))["samples"]
        style = {"color": _OURS, "lw": 2.5} if name == "dstrain" else {"lw": 1.2}
        axes.plot([100 * float(part) for part in rows], seconds, marker="o", ms=4, label=f"{name}, {count:,}", **style)
    axes.set_yscale("log")
    axes.set_title("resumed in an epoch of so many samples", fontsize=10, loc="left")
    axes.set_xlabel("% of the epoch behind", fontsize=8)
    axes.set_ylabel("seconds to the first sample", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.spines[["top", "right"]].set_visible(False)


def main() -> None:
    source = Path(sys.argv[1])
    result = json.loads(source.read_text())
    cases = result["cases"]
    panels = [(case, workers) for case, workers in TITLES if case in cases]
    count = len(panels) + ("resume" in cases)
    figure, grid = plt.subplots(-(-count // 2), 2, figsize=(10, 3.1 * -(-count // 2)), squeeze=False)
    for axes, (case, workers) in zip(grid.flat, panels):
        bars(axes, cases[case][workers], TITLES[case, workers])
    if "resume" in cases:
        lines(grid.flat[len(panels)], cases["resume"])
    for axes in list(grid.flat)[count:]:
        axes.axis("off")
    machine = result["machine"]
    figure.suptitle(f"{machine['processor']}, {machine['cores']} cores; median and range of the rounds", fontsize=9)
    figure.tight_layout()
    figure.savefig(source.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()

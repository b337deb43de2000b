"""Draw what packing.py has measured, for pictures of up to 1024^2 pixels.

python benchmarks/data/plot_packing.py benchmarks/results/data_packing.json     # writes data_packing.png beside it
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PANELS = {
    "budget_used": "share of the token budget used",
    "spread_max_over_mean": "costliest rank over the mean",
    "useful": "real work in the time of all ranks",
}


def main() -> None:
    source = Path(sys.argv[1])
    rows = [row for row in json.loads(source.read_text())["rows"] if row["mix"] == "synthetic"]
    rows = [row for row in rows if row["max_pixels"] == 1 << 20]
    budgets = sorted({row["tokens_per_pack"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    worlds = sorted({row["ranks"] for row in rows})
    figure, grid = plt.subplots(len(PANELS), len(budgets), figsize=(11, 7.5), sharex=True, sharey="row", squeeze=False)
    for axes_row, (name, title) in zip(grid, PANELS.items()):
        for axes, budget in zip(axes_row, budgets):
            for method in methods:
                mine = [r for r in rows if r["tokens_per_pack"] == budget and r["method"] == method]
                ours = method.startswith("dstrain")
                label = f"{method} micro-steps" if ours else method
                style = {"lw": 2.2, "ls": "-"} if ours else {"lw": 1.2, "ls": "--"}
                axes.plot(
                    [worlds.index(r["ranks"]) for r in mine],
                    [r[name] for r in mine],
                    marker="o",
                    ms=3,
                    label=label,
                    **style,
                )
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        axes_row[0].set_ylabel(title, fontsize=8)
    for axes, budget in zip(grid[0], budgets):
        axes.set_title(f"{budget:,} tokens a pack", fontsize=10)
    for axes in grid[-1]:
        axes.set_xticks(range(len(worlds)), [str(world) for world in worlds])
        axes.set_xlabel("ranks", fontsize=8)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.savefig(source.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()

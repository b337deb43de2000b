"""The picture of an estimate: memory of a GPU by part, and the floor of the step's time, over the number of GPUs."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from dstrain.engine.estimate.advice import Advice, Candidate
from dstrain.engine.estimate.machine import Machine

INK, GREY, FAINT = "#1f2430", "#6b7280", "#d9dde3"
COLOURS = {
    "weights": "#2563c9",
    "gradients": "#e07b39",
    "master weights": "#5aa9a0",
    "optimizer": "#8b5fbf",
    "EMA": "#c94f7c",
    "activations": "#d8a31a",
    "encoders": "#7a8699",
    "gathered blocks": "#9cc4f2",
    "buckets": "#f0b994",
    "passing gradients": "#b5651d",
    "fp32 at step()": "#4b5563",
}
LINES = ("#2563c9", "#e07b39", "#5aa9a0", "#8b5fbf", "#c94f7c", "#d8a31a", "#4b5563", "#0f766e", "#991b1b")


def draw(rows: Sequence[tuple[Machine, Advice]], out: Path, title: str, at: int) -> None:
    """Draw one PNG.

    Args:
        rows: numbers of GPUs, rising, each with its candidates.
        out: file to write.
        title: what the estimate is for.
        at: which of the rows the middle panel shows.
    """
    figure = Figure(figsize=(16, 6.6), dpi=100)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 0.95, 1))
    figure.subplots_adjust(left=0.04, right=0.83, top=0.83, bottom=0.36, wspace=0.16)
    figure.text(0.04, 0.93, title, size=17, weight="bold", color=INK)
    shown = [_shown(advice) for _, advice in rows]
    names = [f"{machine.ranks:,}" for machine, _ in rows]
    _stack(left, names, shown)
    left.set_title("GB of a GPU with the best ds_config (faint: none fits)", size=11, color=INK, loc="left")
    left.set_xlabel("GPUs", color=INK)
    for place, c in enumerate(shown):
        if not c.estimate.fits:
            left.axvspan(place - 0.5, place + 0.5, color="white", alpha=0.65, zorder=3, linewidth=0)
    machine, advice = rows[at]
    _stack(middle, [c.name for c in advice.candidates], advice.candidates)
    middle.set_title(
        f"GB of a GPU, by ds_config on {machine.ranks:,} GPU{'s' * (machine.ranks > 1)}", size=11, color=INK, loc="left"
    )
    for label in middle.get_xticklabels():
        label.set(rotation=50, ha="right", rotation_mode="anchor")
    for axes, some in ((left, shown), (middle, advice.candidates)):
        limit = machine.gpu_bytes / 1e9
        tallest = max(c.estimate.device / 1e9 for c in some)
        axes.set_ylim(0, min(3 * limit, max(1.15 * limit, 1.05 * tallest)))
        axes.axhline(limit, color=INK, linewidth=1.4, zorder=4)
        axes.axhline(machine.fits_gpu / 1e9, color=INK, linewidth=1, linestyle=":", zorder=4)
        axes.text(
            0.99, limit, f"{limit:,.0f} GB ", transform=axes.get_yaxis_transform(), ha="right", va="bottom", zorder=5
        )
    _times(right, rows)
    handles, labels = [], list[str]()
    for axes in (left, middle):
        for handle, label in zip(*axes.get_legend_handles_labels()):
            if label not in labels:
                handles.append(handle)
                labels.append(label)
    figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.035, 0.005), ncols=9, frameon=False, fontsize=10)
    figure.savefig(out)


def _shown(advice: Advice) -> Candidate:
    return advice.best or min(advice.candidates, key=lambda c: c.estimate.device)


def _stack(axes: Axes, names: Sequence[str], candidates: Sequence[Candidate]) -> None:
    bottom = [0.0] * len(names)
    for part, colour in COLOURS.items():
        sizes = [c.estimate.memory.device.get(part, 0.0) / 1e9 for c in candidates]
        if any(sizes):
            axes.bar(range(len(names)), sizes, bottom=bottom, label=part, color=colour, width=0.74)
            bottom = [b + s for b, s in zip(bottom, sizes)]
    axes.set_xticks(range(len(names)), names)
    _tidy(axes)


def _times(axes: Axes, rows: Sequence[tuple[Machine, Advice]]) -> None:
    names = list(dict.fromkeys(_kind(c) for _, advice in rows for c in advice.candidates))
    for name, colour in zip(names, LINES):
        found = [(m.ranks, c.estimate) for m, advice in rows for c in advice.candidates if _kind(c) == name]
        axes.plot([n for n, _ in found], [e.traffic.seconds for _, e in found], color=colour, linewidth=1.2, alpha=0.45)
        fits = [(n, e) for n, e in found if e.fits]
        axes.plot(
            [n for n, _ in fits],
            [e.traffic.seconds for _, e in fits],
            color=colour,
            linewidth=2.4,
            marker="o",
            markersize=5,
            label=name,
        )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks([m.ranks for m, _ in rows], [f"{m.ranks:,}" for m, _ in rows])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if str(value)[0] in "25" else ""))
    axes.set_title("Floor of the step's time in seconds (dots: it fits)", size=11, color=INK, loc="left")
    axes.set_xlabel("GPUs", color=INK)
    axes.legend(frameon=False, fontsize=10, loc="upper left", bbox_to_anchor=(1.01, 1.03))
    _tidy(axes)


def _kind(c: Candidate) -> str:
    return c.name.split(" ")[0] + " ratio" if "ratio" in c.name else c.name


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=GREY, labelsize=10, which="both")
    axes.grid(axis="y", color=FAINT, linewidth=0.7)
    axes.set_axisbelow(True)

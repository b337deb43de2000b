"""Four histograms of a dataset: shape, resolution, tokens and captions."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dstrain.data.preview.samples import Figures, histogram, histogram_edges

HEIGHT = 560  # pixels that the four take
INK, GREY, FAINT, BLUE = "#1f2430", "#6b7280", "#d9dde3", "#2563c9"
_MARGIN, _GAP, _LEFT = 24, 40, 52  # pixels: at the sides, between two, for the numbers at the left of each
_TOP, _BELOW = 52, 44  # pixels: for the title over each, for its labels
_TICK = 34  # pixels that the label of a ratio takes
_LONG_TAIL = 10  # times the median; where captions are longer, the axis is logarithmic
_RATIOS = ("1:1", "3:2", "2:3", "16:9", "9:16", "4:3", "3:4", "2:1", "1:2", "3:1", "1:3", "4:1", "1:4", "8:1", "1:8")


def draw_histograms(figure: Figure, figures: Figures, top: int) -> None:
    """Draw four histograms two by two over the width of a figure of 72 dpi, from `top` pixels below its upper edge."""
    width, height = (float(side) * 72 for side in figure.get_size_inches())
    cell = (width - 2 * _MARGIN - _GAP) / 2
    box = cell - _LEFT, HEIGHT / 2 - _TOP - _BELOW  # of the axes
    places = [(column, row) for row in (0, 1) for column in (0, 1)]
    for (column, row), draw in zip(places, (_ratios, _resolutions, _tokens, _captions)):
        x = _MARGIN + _LEFT + column * (cell + _GAP)
        y = top + row * HEIGHT / 2 + _TOP + box[1]
        axes = figure.add_axes((x / width, 1 - y / height, box[0] / width, box[1] / height))
        _plain(axes)
        draw(axes, figures, box[0])


def _ratios(axes: Axes, figures: Figures, width: float) -> None:
    edges = histogram_edges(figures.ratio, "log")
    _bars(axes, edges, histogram(figures.ratio, edges))
    axes.set_xscale("log")
    low, high = min(edges[0], 0.45), max(edges[-1], 1 / 0.45)
    axes.set_xlim(low, high)
    ticks: dict[float, str] = {}
    for name in _RATIOS:
        w, h = map(int, name.split(":"))
        apart = [abs(np.log(w / h / other)) / np.log(high / low) * width for other in ticks]
        if low <= w / h <= high and min(apart, default=_TICK) >= _TICK:
            ticks[w / h] = name
    _ticks(axes, ticks)
    _titles(axes, "Aspect ratio, as stored", figures.ratio, f"width : height of {len(figures.ratio):,} files")


def _resolutions(axes: Axes, figures: Figures, width: float) -> None:
    edges = histogram_edges(np.concatenate([figures.stored, figures.trained]), "log")
    _bars(axes, edges, histogram(figures.trained, edges), "as trained on")
    axes.stairs(histogram(figures.stored, edges), edges, color=INK, linewidth=1.3, label="as stored")
    axes.legend(
        loc="lower right",
        bbox_to_anchor=(1, 1),  # over the axes
        borderaxespad=1.1,
        ncols=2,
        frameon=False,
        fontsize=12,
        labelcolor=GREY,
        handlelength=1.2,
        columnspacing=1.2,
    )
    _log_axis(axes, edges)
    _titles(axes, "Resolution", figures.trained, f"megapixels of {len(figures.trained):,} files", "as trained on: ")


def _tokens(axes: Axes, figures: Figures, width: float) -> None:
    edges = histogram_edges(figures.tokens, "whole")
    _bars(axes, edges, histogram(figures.tokens, edges))
    mean = float(figures.tokens.mean())
    axes.axvline(mean, color=INK, linewidth=1.3, linestyle=(0, (4, 3)))
    right = mean < (edges[0] + edges[-1]) / 2
    axes.annotate(
        f"mean {number(mean)}",
        (mean, 1),
        xycoords=("data", "axes fraction"),
        xytext=(6 if right else -6, -3),
        textcoords="offset points",
        ha="left" if right else "right",
        va="top",
        size=12,
        color=INK,
    )
    _whole_axis(axes)
    _titles(axes, "Tokens a sample", figures.tokens, "tokens of picture and text, which packs are filled with")


def _captions(axes: Axes, figures: Figures, width: float) -> None:
    long_tail = figures.caption_bytes.max() > _LONG_TAIL * np.median(figures.caption_bytes)
    edges = histogram_edges(figures.caption_bytes, "whole log" if long_tail else "whole")
    _bars(axes, edges, histogram(figures.caption_bytes, edges))
    if long_tail:
        _log_axis(axes, edges)
    else:
        _whole_axis(axes)
    _titles(axes, "Caption length", figures.caption_bytes, "bytes of UTF-8")


def _bars(axes: Axes, edges: np.ndarray, counts: np.ndarray, label: str = "") -> None:
    axes.bar(
        edges[:-1], counts, np.diff(edges), align="edge", color=BLUE, edgecolor="white", linewidth=0.5, label=label
    )


def _whole_axis(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _log_axis(axes: Axes, edges: np.ndarray) -> None:
    """Make the horizontal axis logarithmic, wider than the bars, with ticks at round numbers."""
    pad = max(1.04, (10 * edges[0] / edges[-1]) ** 0.5)  # a decade at least
    low, high = max(edges[0], 1e-9) / pad, edges[-1] * pad
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    decades = 10.0 ** np.arange(np.floor(np.log10(low)), np.ceil(np.log10(high)) + 1)
    ticks = decades if high / low > 1e4 else np.outer(decades, (1, 2, 5)).ravel()
    ticks = ticks[(ticks >= low) & (ticks <= high)]
    _ticks(axes, {tick: f"{tick:,.6g}" for tick in ticks.tolist()})


def _ticks(axes: Axes, labels: dict[float, str]) -> None:
    axes.set_xticks(list(labels), list(labels.values()))
    axes.set_xticks([], minor=True)


def _titles(axes: Axes, title: str, values: np.ndarray, unit: str, of: str = "") -> None:
    four = zip(("min", "median", "mean", "max"), summary(values))
    figures = "   ".join(f"{name} {number(value)}" for name, value in four)
    above: dict[str, Any] = {"xy": (0, 1), "xycoords": "axes fraction", "textcoords": "offset points", "va": "baseline"}
    axes.annotate(title, xytext=(0, 24), size=14, weight="bold", color=INK, **above)
    axes.annotate(of + figures, xytext=(0, 7), size=12, color=GREY, **above)
    axes.set_xlabel(unit, size=12, color=GREY)
    axes.set_ylim(0, 1.12 * axes.dataLim.y1)


def _plain(axes: Axes) -> None:
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=12, colors=GREY, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def summary(values: np.ndarray) -> tuple[float, float, float, float]:
    """Return min, median, mean and max."""
    return float(values.min()), float(np.median(values)), float(values.mean()), float(values.max())


def number(value: float) -> str:
    """Write a number with three digits, or all of those before the point."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"

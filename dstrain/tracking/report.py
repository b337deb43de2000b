"""Pictures of a run: its loss curve, and grids of what it paints."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from dstrain.errors import DataError
from dstrain.tracking.jsonl import read_metrics

WIDTH = 1200  # pixels of both pictures, so that a README shows them sharp
MARGIN, GAP, LINE = 16, 14, 19  # pixels: around the grid, between its pictures, between lines of a caption
INK, GREY, FAINT, BLUE = "#1f2430", "#6b7280", "#d9dde3", "#2563c9"


def draw_loss_curve(source: Path, out: Path) -> None:
    """Draw the loss (raw faint, smoothed bold) and the learning rate of a run folder or metrics file into a PNG.

    Raises:
        DataError: the metrics are missing, empty, damaged, or hold no finite loss.
    """
    records = read_metrics(source)
    steps = np.array([r["step"] for r in records])  # [n]
    loss = np.array([r.get("loss", np.nan) for r in records])
    rate = np.array([r.get("lr", np.nan) for r in records])
    if not np.isfinite(loss).any():
        raise DataError(f"{source}: none of its {len(records)} steps has a finite loss; there is no curve to draw")
    smooth = smoothed(loss, half_width=max(1, len(loss) // 60))

    figure = Figure(figsize=(WIDTH / 100, 5.4), dpi=100)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    figure.subplots_adjust(left=0.075, right=0.93, top=0.86, bottom=0.105, hspace=0.12)
    figure.text(0.075, 0.945, "Training loss", size=18, weight="bold", color=INK)
    figure.text(0.075, 0.895, _summary(records, loss), size=13, color=GREY)

    dots = "o" if len(steps) <= 40 else None  # a line through one point is invisible
    top.plot(steps, loss, color=BLUE, alpha=0.25, linewidth=1, marker=dots, markersize=4)
    top.plot(steps, smooth, color=BLUE, linewidth=2.4)
    top.set_ylim(*_limits(loss, smooth))
    last = np.flatnonzero(np.isfinite(smooth))[-1]
    top.annotate(
        f"{smooth[last]:.3g}",
        (steps[last], smooth[last]),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        size=13,
        weight="bold",
        color=BLUE,
        annotation_clip=False,
    )
    top.set_ylabel("loss", size=13, color=INK)
    bottom.plot(steps, rate, color=GREY, linewidth=1.6, marker=dots, markersize=3)
    if np.isfinite(rate).any() and np.nanmax(rate) > 0:
        peak = float(np.nanmax(rate))
        bottom.set_ylim(0, 1.15 * peak)
        bottom.set_yticks([0, peak], ["0", np.format_float_scientific(peak, 1, trim="-", exp_digits=1)])
    bottom.set_ylabel("lr", size=13, color=INK)
    bottom.set_xlabel("step", size=13, color=INK)
    bottom.set_xlim(steps[0] - (len(steps) == 1), steps[-1] + (len(steps) == 1))
    bottom.xaxis.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 2.5, 5, 10]))
    bottom.xaxis.set_major_formatter("{x:,.0f}")
    for axes in (top, bottom):
        _plain_axes(axes)
    figure.savefig(out, format="png")


def draw_grid(
    images: Sequence[Image.Image],
    captions: Sequence[str],
    out: Path,
    columns: int,
    references: Sequence[Image.Image] | None = None,
) -> None:
    """Write a PNG of the pictures in rows of `columns`, each with its caption under it.

    With `references` (one training picture for each), every sample stands above its training picture, and the two
    are named at the left. Pictures keep their proportions and are scaled into a square of the column's width.
    """
    assert images and len(images) == len(captions) and len(images) == len(references or images)
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 15)
    left = MARGIN + (30 if references else 0)  # room for the names of the layers
    cell = (WIDTH - left - MARGIN - (columns - 1) * GAP) // columns
    places = [left + column * (cell + GAP) for column in range(columns)]
    layers = [("sample", images), ("training", references)] if references else [("", images)]
    strips = []
    for first in range(0, len(images), columns):
        row = slice(first, first + columns)
        strips += [_picture_strip(layer[row], places, cell, name, font) for name, layer in layers]
        strips.append(_caption_strip(captions[row], places, cell, font))
    canvas = Image.new("RGB", (WIDTH, 2 * MARGIN - GAP + sum(strip.height for strip in strips)), "white")
    y = MARGIN
    for strip in strips:
        canvas.paste(strip, (0, y))
        y += strip.height
    canvas.save(out, format="PNG")


def _picture_strip(
    images: Sequence[Image.Image], places: list[int], cell: int, name: str, font: ImageFont.FreeTypeFont
) -> Image.Image:
    """Set pictures side by side on one base line, with the name of the layer written upwards at the left."""
    pictures = [_fit(image, cell) for image in images]
    height = max(picture.height for picture in pictures)
    strip = Image.new("RGB", (WIDTH, height + 6), "white")
    draw = ImageDraw.Draw(strip)
    for picture, place in zip(pictures, places):
        x, y = place + (cell - picture.width) // 2, height - picture.height
        strip.paste(picture, (x, y))
        draw.rectangle((x, y, x + picture.width - 1, y + picture.height - 1), outline=FAINT)
    if name:
        label = Image.new("RGB", (round(font.getlength(name)) + 2, 20), "white")
        ImageDraw.Draw(label).text((1, 1), name, font=font, fill=GREY)
        upward = label.transpose(Image.Transpose.ROTATE_90)
        strip.paste(upward, (MARGIN, (height - upward.height) // 2))
    return strip


def _caption_strip(captions: Sequence[str], places: list[int], cell: int, font: ImageFont.FreeTypeFont) -> Image.Image:
    wrapped = [_wrap(caption, font, cell) for caption in captions]
    strip = Image.new("RGB", (WIDTH, LINE * max(len(lines) for lines in wrapped) + GAP), "white")
    draw = ImageDraw.Draw(strip)
    for lines, place in zip(wrapped, places):
        for number, line in enumerate(lines):
            draw.text((place + cell / 2, number * LINE), line, font=font, fill=INK, anchor="ma")
    return strip


def smoothed(values: np.ndarray, half_width: int) -> np.ndarray:
    """Smooth [n] values by three running means of 2 half_width + 1, nearly a Gaussian; NaN and inf are left out."""
    finite = np.isfinite(values)
    total, weight = np.where(finite, values, 0.0), finite.astype(float)
    for _ in range(3):
        total, weight = _running_sum(total, half_width), _running_sum(weight, half_width)
    return np.divide(total, weight, out=np.full(len(values), np.nan), where=weight > 0.5)


def _running_sum(values: np.ndarray, half_width: int) -> np.ndarray:
    sums = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    return sums[np.minimum(place + half_width + 1, len(values))] - sums[np.maximum(place - half_width, 0)]


def _limits(loss: np.ndarray, smooth: np.ndarray) -> tuple[float, float]:
    """Keep nearly all of the raw curve in view and both ends of the smoothed one; spikes may leave the picture."""
    finite = loss[np.isfinite(loss)]
    ends = smooth[np.isfinite(smooth)][[0, -1]]
    low, high = min(*ends, np.quantile(finite, 0.005)), max(*ends, np.quantile(finite, 0.995))
    pad = 0.06 * (high - low) or 0.5 * abs(high) or 1.0
    return (max(0.0, low - pad) if finite.min() >= 0 else low - pad), high + pad


def _summary(records: list[dict[str, float]], loss: np.ndarray) -> str:
    seconds = round(sum(r.get("step_s", 0.0) for r in records))
    minutes, s = divmod(seconds, 60)
    hours, m = divmod(minutes, 60)
    parts = [f"{len(records):,} step{'s' if len(records) != 1 else ''}"]
    if seconds:
        parts.append(f"{hours} h {m:02d} min" if hours else f"{m} min {s:02d} s" if m else f"{s} s")
    if samples := records[-1].get("samples_seen"):
        parts.append(f"{samples:,.0f} samples")
    if broken := int((~np.isfinite(loss)).sum()):
        parts.append(f"{broken:,} without a finite loss")
    return "  ·  ".join(parts)


def _plain_axes(axes: Axes) -> None:
    axes.grid(color=FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=12, colors=GREY, length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _fit(image: Image.Image, side: int) -> Image.Image:
    """Scale into a square, on white where the picture is transparent."""
    scale = side / max(image.size)
    size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    scaled = image.convert("RGBA").resize(size, Image.Resampling.LANCZOS)
    return Image.alpha_composite(Image.new("RGBA", size, "white"), scaled).convert("RGB")


def _wrap(caption: str, font: ImageFont.FreeTypeFont, width: int, most: int = 3) -> list[str]:
    """Break a caption into at most `most` lines that fit; words wider than a line are broken too."""
    lines = [""]
    for word in caption.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last.rstrip() + "…"]
    return lines

"""A contact sheet of a dataset over histograms of it, in one picture file."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, fontManager
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path

from dstrain.data.preview.histograms import FAINT, GREY, INK, draw_histograms
from dstrain.data.preview.histograms import HEIGHT as HISTOGRAMS_HEIGHT
from dstrain.data.preview.samples import Figures, Panel, Shown, fitted, visible
from dstrain.storage import write_atomic

FORMATS = (".png", ".jpg", ".pdf", ".svg")
MAX_SAMPLES = 144  # on a sheet; pictures of 2^16 pixels height cannot be written
WIDTH = 1200  # pixels, so that a README shows it sharp
MARGIN, GAP, NARROW_GAP, LINE = 24, 16, 4, 16  # pixels; the narrow gap is between pictures of one sample
RED = "#b42318"
_MOST_PICTURES = 6  # side by side
_MOST_SIDE = 280
_CAPTION_LINES = 3
_MOST_CHARACTERS = 600  # of a caption, that are looked at
_FONT = "DejaVu Sans"
_PLACEHOLDER = "#f6f7f9"
_TIMES = "\N{MULTIPLICATION SIGN}"
# Fonts with the characters that DejaVu lacks, of which some are installed on most desktops.
_FURTHER_FONTS = ("CJK", "Source Han Sans", "WenQuanYi", "YaHei", "PingFang", "Hiragino Sans", "Droid Sans Fallback")


@dataclass(frozen=True)
class Layout:
    """How `count` samples stand on a sheet: so many in a row, each with its columns of so many pictures of a `side`."""

    per_row: int
    side: int
    columns: tuple[int, ...]

    @classmethod
    def of(cls, count: int, columns: Sequence[int]) -> "Layout":
        """Fill the width, with rows of nearly one length."""
        pictures = sum(columns)
        per_row = max(1, _MOST_PICTURES // pictures)
        per_row = ceil(count / ceil(count / per_row))
        cell = (WIDTH - 2 * MARGIN - (per_row - 1) * GAP) // per_row
        return cls(per_row, min(_MOST_SIDE, (cell - (pictures - 1) * NARROW_GAP) // pictures), tuple(columns))

    @property
    def cell(self) -> int:
        """Width of a sample in pixels."""
        return self.span(sum(self.columns))

    def span(self, pictures: int) -> int:
        """Width of so many pictures in pixels."""
        return pictures * (self.side + NARROW_GAP) - NARROW_GAP


def draw_sheet(
    samples: Sequence[Shown], layout: Layout, figures: Figures, out: Path, *, title: str, about: str, left_out: str
) -> None:
    """Draw the samples, the histograms below them, and at the bottom what is not in them; the suffix is the format.

    Raises OSError if the file cannot be written.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a character that no font has; a box stands for it
        canvas = _Canvas()
        canvas.line(visible(title), 22, INK, 34, weight="bold")
        canvas.line(about, 13, GREY, 34)
        for first in range(0, len(samples), layout.per_row):
            _draw_row(canvas, samples[first : first + layout.per_row], layout)
        looked_at = f"{len(figures.tokens):,} of {figures.samples:,} samples: those of {figures.looked_at:,} of "
        looked_at += f"{figures.shards:,} shards, evenly chosen"
        canvas.y += GAP
        whole = figures.looked_at == figures.shards
        canvas.line(f"All {figures.samples:,} samples" if whole else looked_at, 16, INK, 28, weight="bold")
        top = canvas.y
        canvas.y += HISTOGRAMS_HEIGHT
        for line in canvas.wrapped(left_out, WIDTH - 2 * MARGIN, 13, most=4):
            canvas.line(line, 13, GREY, 20)
        canvas.y += MARGIN
        draw_histograms(canvas.finish(), figures, top)
        _save(canvas.figure, out)


def _save(figure: Figure, out: Path) -> None:
    data = io.BytesIO()
    figure.savefig(data, format=out.suffix[1:].lower())
    write_atomic(out, data.getvalue())


def _draw_row(canvas: "_Canvas", samples: Sequence[Shown], layout: Layout) -> None:
    """Draw samples side by side: their pictures on one base line, then sizes, caption, and tokens with the key."""
    boxes = [fitted(*panel.trained[:2], layout.side) for sample in samples for panel in sample.panels]
    base = canvas.y + max(height for _, height in boxes)
    below = base + LINE * (2 if len(layout.columns) > 1 else 1)  # the sizes; over them the columns' names
    bottom = below
    for place, sample in enumerate(samples):
        left = MARGIN + place * (layout.cell + GAP)
        x = left
        for panel, pictures in zip(sample.panels, layout.columns):
            _draw_panel(canvas, panel, x, base, layout.side)
            if len(layout.columns) > 1:
                canvas.text(x, base + LINE, visible(panel.column), 11, INK, layout.span(pictures))
            canvas.text(x, below, _sizes(panel), 11, GREY, layout.span(pictures))
            x += layout.span(pictures) + NARROW_GAP
        y = below + LINE + 2
        for line in canvas.wrapped(visible(sample.caption[:_MOST_CHARACTERS]), layout.cell, 12, _CAPTION_LINES):
            canvas.text(left, y, line, 12, INK)
            y += LINE
        canvas.text(left, y, f"{sample.tokens:,} tokens · {visible(sample.key)}", 11, GREY, layout.cell)
        bottom = max(bottom, y)
    canvas.y = bottom + GAP + 4


def _draw_panel(canvas: "_Canvas", panel: Panel, left: float, base: float, side: int) -> None:
    """Draw the pictures of a file side by side, or an empty frame with the reason."""
    for picture in panel.pictures:
        width, height = picture.size
        canvas.axes.imshow(picture, extent=(left, left + width, base, base - height), interpolation="nearest")
        canvas.frame(left, base - height, width, height, "none")
        left += width + NARROW_GAP
    if panel.fault:
        width, height = fitted(*panel.trained[:2], side)
        y = base - height
        canvas.frame(left, y, width, height, _PLACEHOLDER)
        lines = canvas.wrapped(visible(panel.fault), width - 12, 11, most=max(1, (height - 8) // LINE))
        for number, line in enumerate(lines, 1):
            canvas.text(left + 6, y + number * LINE, line, 11, RED)


def _sizes(panel: Panel) -> str:
    """Say how large a file is stored and trained on; a video's frames are counted too."""
    stored, trained = ([f"{w} {_TIMES} {h}", f"{n} frames"] for w, h, n in (panel.stored, panel.trained))
    parts = 1 if panel.stored[2] == 1 else 2
    texts = dict.fromkeys(", ".join(texts[:parts]) for texts in (stored, trained))
    return " → ".join(texts)


class _Canvas:
    """A figure to draw on in pixels from the top left, `y` being how far it is filled; its height is set at the end."""

    def __init__(self) -> None:
        self.figure = Figure(dpi=72)  # so that a point is a pixel
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.y = MARGIN
        installed = {font.name for font in fontManager.ttflist}
        further = sorted(name for name in installed if any(part in name for part in _FURTHER_FONTS))
        self._family = [_FONT, *further]

    def _font(self, text: str, size: int, weight: str = "normal") -> FontProperties:
        if text.isascii():
            return FontProperties(family=_FONT, size=size, weight=weight)
        return FontProperties(family=self._family, size=size)  # not all of them are there in bold

    def text(
        self, x: float, y: float, text: str, size: int, colour: str, width: int = WIDTH, weight: str = "normal"
    ) -> None:
        """Write a text with its base line at `y`, cut where it is wider than `width`."""
        font = self._font(text, size, weight)
        text = _cut(text, width, font)
        self.axes.text(x, y, text, fontproperties=font, color=colour, va="baseline", parse_math=False)

    def line(self, text: str, size: int, colour: str, height: int, weight: str = "normal") -> None:
        """Write a line of the sheet."""
        self.text(MARGIN, self.y + size, text, size, colour, WIDTH - 2 * MARGIN, weight)
        self.y += height

    def wrapped(self, text: str, width: int, size: int, most: int) -> list[str]:
        """Break a text into at most `most` lines that fit; words wider than a line are broken too."""
        font = self._font(text, size)
        lines = [""]
        for word in text.split():
            joined = f"{lines[-1]} {word}".strip()
            if _width(joined, font) <= width:
                lines[-1] = joined
                continue
            if lines[-1]:
                lines.append("")
            for character in word:
                if lines[-1] and _width(lines[-1] + character, font) > width:
                    lines.append("")
                lines[-1] += character
                if len(lines) > most:
                    return [*lines[: most - 1], _cut(f"{lines[most - 1]}…", width, font)]
        return lines

    def frame(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """Draw a rectangle with a thin edge."""
        self.axes.add_patch(Rectangle((x, y), width, height, edgecolor=FAINT, facecolor=fill, linewidth=1))

    def finish(self) -> Figure:
        """Give the figure its height."""
        self.figure.set_size_inches(WIDTH / 72, self.y / 72)
        self.axes.set_xlim(0, WIDTH)
        self.axes.set_ylim(self.y, 0)
        self.axes.set_aspect("auto")
        self.axes.axis("off")
        return self.figure


def _width(text: str, font: FontProperties) -> float:
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]


def _cut(text: str, width: int, font: FontProperties) -> str:
    """Shorten a text until it fits, with an ellipsis."""
    if _width(text, font) <= width:
        return text
    low, high = 0, len(text)  # so many characters fit, so many do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if _width(f"{text[:middle]}…", font) <= width else (low, middle)
    return f"{text[:low].rstrip(' …')}…"

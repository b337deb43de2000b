"""preview: its figures are the dataset's, its sheet shows what training sees, and nothing in a sample stops it."""

import io
import json
import logging
import re
import warnings
import zlib
from fractions import Fraction
from html import unescape
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from data_samples import damage_row, image_bytes, mixed_dataset, picture, sample_members, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dstrain import cli
from dstrain.data.dataset import Dataset, open_dataset
from dstrain.data.media.resolution import Resolution
from dstrain.data.preview import samples as preview
from dstrain.data.preview.samples import Figures, Shown, choose, histogram, histogram_edges, measure, show, visible
from dstrain.data.preview.sheet import MARGIN, WIDTH, Layout, draw_sheet
from dstrain.data.selection import Clip, Wanted


def plain(width: int, height: int, colour: tuple[int, int, int]) -> bytes:
    return image_bytes(Image.new("RGB", (width, height), colour))


def damaged(data: bytes) -> bytes:
    """A PNG whose pixels cannot be decoded, which shows only when that is tried: all checksums are right."""
    start = data.index(b"IDAT")
    size = int.from_bytes(data[start - 4 : start], "big")
    chunk = b"IDAT" + b"\xff" * size
    return data[:start] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + data[start + size + 8 :]


def texts(svg: bytes) -> list[str]:
    found = re.findall(r"<text[^>]*>(.*?)</text>", svg.decode(), re.DOTALL)
    return [unescape(text).replace("\N{MULTIPLICATION SIGN}", "x") for text in found]


def drawn(samples: list[Shown], columns: list[int], figures: Figures, out: Path, left_out: str = "") -> bytes:
    layout = Layout.of(len(samples), columns)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_sheet(samples, layout, figures, out, title="shards", about="a few", left_out=left_out)
    return out.read_bytes()


def sheet_texts(dataset: Dataset, out: Path, left_out: str = "") -> list[str]:
    """The texts of a sheet of all samples."""
    columns = preview.panel_counts(dataset)
    side = Layout.of(len(dataset), columns).side
    return texts(drawn(list(show(dataset, range(len(dataset)), side)), columns, measure(dataset), out, left_out))


def test_samples_are_chosen_evenly_by_the_seed_alone() -> None:
    assert choose(1000, 24, seed=3) == choose(1000, 24, seed=3)
    assert choose(1000, 24, seed=3) != choose(1000, 24, seed=4)
    assert choose(5, 24, seed=0) == [0, 1, 2, 3, 4]
    met: set[int] = set()
    for seed in range(300):
        rows = choose(50, 7, seed)
        met.update(rows)
        assert all(50 * n // 7 <= row < 50 * (n + 1) // 7 for n, row in enumerate(rows))
    assert met == set(range(50))
    assert all(0 <= row < 10**9 for row in choose(10**9, 144, seed=1))


def test_figures_are_those_of_the_dataset(tmp_path: Path) -> None:
    dataset = mixed_dataset(tmp_path / "s", max_pixels=2048)
    figures = measure(dataset)
    sizes = [(32, 32), (64, 48), (48, 96), (17, 40), (100, 33)] * 4
    assert np.allclose(figures.ratio, [w / h for w, h in sizes], rtol=1e-12)
    assert np.allclose(figures.stored * 1e6, [w * h for w, h in sizes], rtol=1e-12)
    raws = [dataset.read(row) for row in range(len(dataset))]
    trained = [raw.files["image"].width * raw.files["image"].height for raw in raws]
    assert np.allclose(figures.trained * 1e6, trained, rtol=1e-12) and max(trained) <= 2048
    assert figures.tokens.tolist() == dataset.tokens(np.arange(20)).tolist()
    assert figures.caption_bytes.tolist() == [len(raw.captions[0].encode()) for raw in raws]
    assert (figures.samples, figures.shards, figures.looked_at) == (20, 2, 2)


def test_figures_leave_out_what_the_dataset_leaves_out(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [("lone.png", picture(64, 96)), *sample_members(2, (48, 32))])
    figures = measure(open_dataset([str(shard)]))
    assert figures.ratio.tolist() == [1.5, 1.5] and figures.samples == 2


def test_of_many_rows_whole_shards_are_looked_at_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, count in enumerate([3, 1, 4, 1, 5, 9, 2, 6]):
        members = sample_members(count, (32 + 16 * number, 32), first=100 * number)
        write_tar(tmp_path / f"{number}.tar", members)
    dataset = open_dataset([str(tmp_path)])
    opened: list[str] = []
    select = Wanted.select
    monkeypatch.setattr(Wanted, "select", lambda self, index: opened.append(index.path.stem) or select(self, index))
    for most in (1, 2, 5, 9, 16, 30, 31):
        opened.clear()
        figures = measure(dataset, most)
        assert len(figures.tokens) <= most or figures.looked_at == 1
        assert len(opened) == figures.looked_at and sorted(set(opened)) == opened
        widths = {32 + 16 * int(name) for name in opened}
        assert set(np.rint(figures.ratio * 32).astype(int).tolist()) == widths
        assert (figures.samples, figures.shards) == (31, 8)
    assert figures.looked_at == 8
    measure(dataset, 16)
    gaps = np.diff([int(name) for name in opened[8:]])
    assert len(gaps) >= 2 and gaps.max() - gaps.min() <= 1


def test_histograms_have_the_bins_that_they_should() -> None:
    values = np.array([25, 25, 26, 29])
    edges = histogram_edges(values, "whole")
    assert edges.tolist() == [24.5, 25.5, 26.5, 27.5, 28.5, 29.5]
    assert histogram(values, edges).tolist() == [2, 1, 0, 0, 1]
    wide = histogram_edges(np.array([100, 1099]), "whole")
    assert set(np.diff(wide)) == {21} and wide[0] == 99.5 and wide[-1] >= 1099.5 and len(wide) == 49

    ratios = np.array([1.0, 1.02, 0.98, 2.0, 0.5])
    edges = histogram_edges(ratios, "log")
    counts = histogram(ratios, edges)
    assert np.allclose(np.diff(np.log2(edges)), 1 / 12) and len(counts) == 25
    assert (counts[0], counts[12], counts[24], counts.sum()) == (1, 3, 1, 5)
    assert np.allclose(edges[12] * edges[13], 1)  # 1 in the middle

    tail = np.array([1, 2, 3, 50_000])
    edges = histogram_edges(tail, "whole log")
    assert edges[:4].tolist() == [0.5, 1.5, 2.5, 3.5] and edges[-1] == 50_000.5
    assert histogram(tail, edges)[[0, 1, 2, -1]].tolist() == [1, 1, 1, 1]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 1 << 31), min_size=1, max_size=30), st.sampled_from(["log", "whole", "whole log"]))
def test_histograms_count_every_value(numbers: list[int], scale: preview.Scale) -> None:
    values = np.array(numbers) / (1000 if scale == "log" else 1)
    edges = histogram_edges(values if scale == "log" else np.array(numbers), scale)
    assert (np.diff(edges) > 0).all() and len(edges) <= 52
    assert histogram(values, edges).sum() == len(numbers)
    assert edges[0] <= values.min() * (1 + 1e-9) and values.max() * (1 - 1e-9) <= edges[-1]


def test_pictures_are_decoded_at_their_training_size_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = mixed_dataset(tmp_path / "s", max_pixels=2048)
    sizes: list[tuple[int, int]] = []
    decode = preview.decode
    monkeypatch.setattr(
        preview, "decode", lambda data, size, **options: sizes.append(size) or decode(data, size, **options)
    )
    samples = list(show(dataset, [1, 2, 13], side=100))
    assert [sample.key for sample in samples] == ["0001", "0002", "0013"]
    assert [sample.tokens for sample in samples] == dataset.tokens(np.array([1, 2, 13])).tolist()
    assert [sample.caption for sample in samples] == [dataset.read(row).captions[0] for row in (1, 2, 13)]
    assert [sample.panels[0].stored for sample in samples] == [(64, 48, 1), (48, 96, 1), (17, 40, 1)]
    assert [sample.panels[0].trained for sample in samples] == [(48, 32, 1), (32, 64, 1), (16, 32, 1)]
    assert sizes == [(48, 32), (32, 64), (16, 32)]
    assert [sample.panels[0].pictures[0].size for sample in samples] == [preview.fitted(*size, 100) for size in sizes]
    assert all(not sample.fault for sample in samples)


def test_a_picture_on_the_sheet_is_the_one_in_the_shard(tmp_path: Path) -> None:
    colours = [(200, 30, 120), (20, 140, 60)]
    members = [
        member
        for number, colour in enumerate(colours)
        for member in ((f"{number}.png", plain(64, 32, colour)), (f"{number}.txt", b"a plain picture"))
    ]
    dataset = open_dataset([str(write_tar(tmp_path / "a.tar", members))])
    layout = Layout.of(2, [1])
    samples = list(show(dataset, [0, 1], layout.side))
    data = drawn(samples, [1], measure(dataset), tmp_path / "sheet.png")
    assert drawn(samples, [1], measure(dataset), tmp_path / "again.png") == data
    sheet = Image.open(io.BytesIO(data)).convert("RGB")
    assert sheet.width == WIDTH and 700 < sheet.height < 1100
    pixels = np.array(sheet)
    for number, colour in enumerate(colours):
        y, x = np.nonzero((pixels == colour).all(axis=2))
        assert abs(len(y) - layout.side * layout.side // 2) < 4 * layout.side  # all but the edge
        assert MARGIN + number * layout.cell <= x.min() and x.max() < MARGIN + number * (layout.cell + 16) + layout.cell


def test_a_sheet_says_sizes_tokens_captions_and_what_is_left_out(tmp_path: Path) -> None:
    dataset = mixed_dataset(tmp_path / "s", shards=1, samples=5, max_pixels=2048)
    shown = sheet_texts(dataset, tmp_path / "sheet.svg", "Left out 3: no_caption 3")
    assert "64 x 48 → 48 x 32" in shown and "17 x 40 → 16 x 32" in shown
    assert "32 x 32" in shown  # stored as it is trained on
    assert "caption 0" in shown and "caption 2 word word" in shown
    tokens = dataset.tokens(np.arange(5)).tolist()
    assert all(f"{count} tokens · {row:04d}" in shown for row, count in enumerate(tokens))
    assert "All 5 samples" in shown and "Left out 3: no_caption 3" in shown
    assert f"mean {np.mean(tokens):.3g}" in shown
    assert {"Aspect ratio, as stored", "Resolution", "Tokens a sample", "Caption length", "bytes of UTF-8"} <= {*shown}


def test_a_sheet_of_a_part_says_so(tmp_path: Path) -> None:
    dataset = mixed_dataset(tmp_path / "s", shards=3, samples=4)
    samples = list(show(dataset, [0], 100))
    shown = texts(drawn(samples, [1], measure(dataset, 4), tmp_path / "sheet.svg"))
    assert "4 of 12 samples: those of 1 of 3 shards, evenly chosen" in shown


@pytest.mark.parametrize("kind", ["png", "jpg", "pdf", "svg"])
def test_every_format_is_what_its_name_says(kind: str, tmp_path: Path) -> None:
    dataset = mixed_dataset(tmp_path / "s", shards=1, samples=2)
    data = drawn(list(show(dataset, [0], 100)), [1], measure(dataset), tmp_path / f"sheet.{kind}")
    start = {"png": b"\x89PNG\r\n", "jpg": b"\xff\xd8\xff", "pdf": b"%PDF-", "svg": b"<?xml"}[kind]
    assert data.startswith(start) and [path.name for path in tmp_path.glob("*sheet*")] == [f"sheet.{kind}"]


def test_a_bad_sample_is_an_empty_frame_with_its_reason(tmp_path: Path) -> None:
    members = [
        *sample_members(2, (64, 64)),
        ("half.png", picture(64, 64)),
        ("half.edit.png", picture(96, 64)),
        ("half.txt", b"one of two"),
        ("pixels.png", damaged(picture(64, 64))),
        ("pixels.txt", b"whose pixels are damaged"),
    ]
    dataset = open_dataset([str(write_tar(tmp_path / "a.tar", members))])
    damage_row(dataset, 1)
    samples = list(show(dataset, range(4), 180))
    assert [sample.fault.split(":")[0] for sample in samples] == ["", "changed", "", "image_damaged"]
    assert [len(sample.panels[0].pictures) for sample in samples] == [1, 0, 1, 0]
    assert samples[1].caption == "" and samples[3].caption == "whose pixels are damaged"
    assert samples[1].panels[0].stored == (64, 64, 1) and samples[1].key == "0001"
    shown = " ".join(texts(drawn(samples, [1], measure(dataset), tmp_path / "sheet.svg")))
    assert "changed: the bytes" in shown and "image_damaged: it cannot be" in shown
    png = np.array(Image.open(io.BytesIO(drawn(samples, [1], measure(dataset), tmp_path / "sheet.png"))).convert("RGB"))
    assert (png == (0xF6, 0xF7, 0xF9)).all(axis=2).sum() > 180 * 180  # of the two frames


def test_one_bad_file_of_a_sample_leaves_the_other(tmp_path: Path) -> None:
    members = [("a.png", picture(64, 64)), ("a.edit.png", damaged(picture(96, 64))), ("a.txt", b"two files")]
    wanted = Wanted(Resolution(), ("image", "edit"))
    dataset = open_dataset([str(write_tar(tmp_path / "a.tar", members))], wanted)
    (sample,) = show(dataset, [0], 100)
    assert [panel.column for panel in sample.panels] == ["image", "edit"]
    assert [len(panel.pictures) for panel in sample.panels] == [1, 0]
    assert sample.fault.startswith("image_damaged") and not sample.panels[0].fault
    figures = measure(dataset)
    assert figures.ratio.tolist() == [1.0, 1.5] and len(figures.tokens) == 1
    shown = texts(drawn([sample], [1, 1], figures, tmp_path / "sheet.svg"))
    assert {"image", "edit", "64 x 64", "96 x 64", "two files"} <= {*shown}


ODD = {
    "chinese": ("一只红色的苹果放在木桌上" * 40, "一只红色"),
    "emoji": ("🍎 apple 👩\u200d👩\u200d👧 family", "🍎 apple"),
    "right to left": ("תפוח אדום على الطاولة", "תפוח"),
    "mathematics": ("costs $5 or $x_1^{2$ or \\frac{1}{2}", "costs $5 or $x_1^{2$"),
    "markup": ("<b>bold</b> & <svg/> ]]>", "<b>bold</b> & <svg/>"),
    "control": ("bell\x07 escape\x1b[31m\u202eturned", "escape\\x1b[31m\\u202e"),
    "lines": ("one\n\n\ttwo\u3000three", "one two three"),
    "one long word": ("x" * 60_000, "x" * 20),
    "many words": ("word " * 12_000, "word word word"),
    "one letter": ("a", "a"),
}


def test_captions_of_every_kind_are_drawn_in_a_few_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    members = []
    for name, (caption, _) in ODD.items():
        members += [(f"{name}.png", picture(32, 32)), (f"{name}.txt", caption.encode())]
    members += [("last.png", picture(32, 32)), ("last.json", json.dumps({"caption": ["the first", "other"]}).encode())]
    dataset = open_dataset([str(write_tar(tmp_path / "a.tar", members))])
    with warnings.catch_warnings(), caplog.at_level(logging.INFO):
        warnings.simplefilter("error")
        shown = sheet_texts(dataset, tmp_path / "sheet.svg")
        drawn(list(show(dataset, range(11), 100)), [1], measure(dataset), tmp_path / "sheet.png")
    assert not caplog.records
    for begin in [*(begin for _, begin in ODD.values()), "the first"]:
        assert any(begin in text for text in shown), begin
    for part in ("苹果", "xxxx", "word word"):
        lines = [text for text in shown if part in text]
        assert len(lines) == 3 and [line.endswith("…") for line in lines] == [False, False, True]


def test_what_cannot_be_seen_is_written_out() -> None:
    assert visible("  a \t\n b\u2028c ") == "a b c"
    assert visible("\x00\x07\x7f\x9b\ufeff\u202e\udc80\U000e0001") == r"\x00\x07\x7f\x9b\ufeff\u202e\udc80\U000e0001"
    assert visible("é 苹 \u0645\u06cc\u200c\u062e \\x07") == "é 苹 \u0645\u06cc\u200c\u062e \\x07"
    assert visible("") == ""


@pytest.mark.parametrize("columns", [[1], [1, 1], [3], [1, 3, 1], [1] * 9])
@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 24, 144])
def test_samples_fit_on_the_sheet(count: int, columns: list[int]) -> None:
    layout = Layout.of(count, columns)
    assert layout.per_row * (layout.cell + 16) - 16 <= WIDTH - 2 * MARGIN
    assert layout.side >= 100 and layout.per_row <= count
    rows = -(-count // layout.per_row)
    assert rows * (layout.side + 140) + 800 < 1 << 16  # what Agg and JPEG can hold
    if columns == [1] and count == 24:
        assert layout.per_row == 6


def video(levels: list[int], size: tuple[int, int] = (64, 48)) -> bytes:
    """A video of plain grey frames."""
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=Fraction(24), options={"x264-params": "bframes=2:log-level=-1"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for level in levels:
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), level, np.uint8), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return file.getvalue()


def test_a_video_is_shown_as_its_first_middle_and_last_frame(tmp_path: Path) -> None:
    members = []
    for number, levels in enumerate(([20, *[70] * 6, 130, *[180] * 5, 240], [30, 200], [90])):
        members += [(f"{number}.mp4", video(levels)), (f"{number}.txt", b"frames")]
    wanted = Wanted(Resolution(), ("video",), clip=Clip(9))
    dataset = open_dataset([str(write_tar(tmp_path / "a.tar", members))], wanted)
    assert preview.panel_counts(dataset) == [3]
    samples = list(show(dataset, [0, 1, 2], 180))
    greys = [[float(np.mean(picture)) for picture in sample.panels[0].pictures] for sample in samples]
    assert [len(found) for found in greys] == [3, 2, 1]
    assert np.allclose(np.concatenate(greys), [20, 130, 240, 30, 200, 90], atol=6)
    assert samples[0].panels[0].stored == (64, 48, 14) and samples[0].panels[0].trained == (64, 48, 9)
    shown = texts(drawn(samples, [3], measure(dataset), tmp_path / "sheet.svg"))
    assert "64 x 48, 14 frames → 64 x 48, 9 frames" in shown


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int | str | None, str, str]:
    try:
        code: int | str | None = cli.main(["preview", *map(str, arguments)])
    except SystemExit as end:
        code = end.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_command_draws_and_prints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [("bad.png", damaged(picture(64, 64))), ("bad.txt", b"b"), ("lone.png", picture(32, 32))]
    shard = write_tar(tmp_path / "a.tar", [*sample_members(6, (96, 64)), *members])
    code, out, err = run(capsys, shard, "--out", tmp_path / "a.png", "--max-pixels", 1536)
    assert code == 0 and err == ""
    assert Image.open(tmp_path / "a.png").width == WIDTH
    assert "7 samples in 1 shard" in out and "left out 1: no_caption 1" in out
    table = {line[:20].strip(): line[20:].split() for line in out.splitlines()}
    assert table["7 samples:"] == ["min", "median", "mean", "max"]
    assert table["aspect ratio"] == ["1", "1.5", "1.43", "1.5"]
    assert table["megapixels, stored"] == ["0.0041", "0.00614", "0.00585", "0.00614"]
    assert table["megapixels, trained"] == ["0.00102", "0.00154", "0.00146", "0.00154"]
    assert table["tokens"] == ["12", "17", "16.3", "17"]  # 32 x 32 and 48 x 32 pixels, "b" and "caption 0"
    assert table["caption bytes"] == ["1", "9", "7.86", "9"]
    assert f"bad {shard}: bad: image_damaged: it cannot be decoded" in out
    assert out.splitlines()[-1] == f"{tmp_path / 'a.png'}  7 samples, 1 of them bad"


def test_the_command_shows_the_columns_that_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members = [("a.png", picture(64, 64)), ("a.edit_image.png", picture(96, 64)), ("a.txt", b"x"), ("a.cls", b"7")]
    shard = write_tar(tmp_path / "a.tar", members)
    code, out, _ = run(capsys, shard, "--out", tmp_path / "a.png", "--columns", "image, edit_image,image")
    assert code == 0 and re.search(r"aspect ratio +1 +1.25 +1.25 +1.5\n", out)
    for columns in ("image,edit", "cls", "txt"):
        code, _, err = run(capsys, shard, "--out", tmp_path / "b.png", "--columns", columns)
        assert code == 2 and repr(columns.split(",")[-1]) in err and "there are: image, edit_image" in err
    assert "did you mean" in run(capsys, shard, "--out", tmp_path / "b.png", "--columns", "edit_imag")[2]
    assert run(capsys, shard, "--out", tmp_path / "b.png", "--columns", ",")[0] == 2
    assert not (tmp_path / "b.png").exists()


REFUSED = {
    "no folder": (["{good}", "--out", "{tmp}/none/a.png"], "no folder {tmp}/none"),
    "out is a folder": (["{good}", "--out", "{tmp}/folder.png"], "{tmp}/folder.png is a folder"),
    "not writable": (["{good}", "--out", "{tmp}/locked/a.png"], "{tmp}/locked cannot be written to"),
    "no kind": (["{good}", "--out", "{tmp}/a"], "ends in .png, .jpg, .pdf, .svg"),
    "unknown kind": (["{good}", "--out", "{tmp}/a.gif"], "ends in .png, .jpg, .pdf, .svg"),
    "count 0": (["{good}", "--out", "{tmp}/a.png", "--count", "0"], "at least 1"),
    "too many": (["{good}", "--out", "{tmp}/a.png", "--count", "145"], "at most 144"),
    "no pixels": (["{good}", "--out", "{tmp}/a.png", "--max-pixels", "255"], "max_pixels = 255"),
    "frames": (["{good}", "--out", "{tmp}/a.png", "--frames", "4"], "4 k + 1"),
    "no shard": (["{tmp}/none.tar", "--out", "{tmp}/a.png"], "{tmp}/none.tar"),
    "a URL": (["s3://bucket/a.tar", "--out", "{tmp}/a.png"], "s3://bucket/a.tar"),
    "no usable sample": (["{bare}", "--out", "{tmp}/a.png"], "no sample can be used in 1 shard"),
    "no picture": (["{text}", "--out", "{tmp}/a.png"], "no_image 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_drawn_is_refused_in_one_sentence(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write_tar(tmp_path / "good.tar", sample_members(1))
    bare = write_tar(tmp_path / "bare.tar", [("a.png", picture(32, 32))])
    text = write_tar(tmp_path / "text.tar", [("a.txt", b"only a text")])
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr("os.access", lambda path, mode: not str(path).endswith("locked"))  # root may write anywhere
    names = {"tmp": tmp_path, "good": good, "bare": bare, "text": text}
    arguments, expected = REFUSED[case]
    code, out, err = run(capsys, *(argument.format(**names) for argument in arguments))
    assert code == 2 and out == ""
    assert expected.format(**names) in err and "error: " in err and "Traceback" not in err
    assert not list(tmp_path.glob("a*"))

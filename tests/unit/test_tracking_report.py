"""Derived metrics, and the pictures of a run."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

from dstrain.errors import ConfigError, DataError
from dstrain.tracking.metrics import SIGMA_BINS, Throughput, memory, peak_flops, sigma_bins
from dstrain.tracking.report import BLUE, draw_grid, draw_loss_curve, smoothed

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA RTX 6000 Ada Generation", 364),
        ("NVIDIA A10G", None),
        ("NVIDIA H1000", None),
        ("AMD EPYC 9654 96-Core Processor", None),
        ("", None),
    ],
)
def test_peak_by_device_name(monkeypatch, name, tflops):
    monkeypatch.delenv("DSTRAIN_PEAK_TFLOPS", raising=False)
    assert peak_flops(name) == (tflops and tflops * 1e12)


def test_peak_from_the_environment(monkeypatch):
    monkeypatch.setenv("DSTRAIN_PEAK_TFLOPS", "0.5")
    assert peak_flops("NVIDIA H100 80GB HBM3") == 0.5e12
    for wrong in ("fast", "-1", "0", "nan", "inf"):
        monkeypatch.setenv("DSTRAIN_PEAK_TFLOPS", wrong)
        with pytest.raises(ConfigError, match="DSTRAIN_PEAK_TFLOPS"):
            peak_flops("NVIDIA H200")


def test_throughput_of_a_published_case():
    # 8 H200, one picture of 4096 + 512 tokens each, 235 TFLOP a picture, 0.475 s: MFU 50 %
    rates = Throughput(world_size=8, peak=989e12)(0.475, samples=8, tokens=8 * 4608, train_flops=8 * 235e12)
    assert rates["mfu"] == pytest.approx(0.50, abs=0.001)
    assert rates["tflops"] == pytest.approx(494.7, abs=0.1)
    assert rates["samples_per_s"] == pytest.approx(16.84, abs=0.01)
    assert rates["tokens_per_s"] == pytest.approx(77608, abs=1)


def test_a_cpu_has_no_mfu(monkeypatch):
    monkeypatch.delenv("DSTRAIN_PEAK_TFLOPS", raising=False)
    assert set(Throughput.of(CPU, 2)(1.0, 1, 1, 1.0)) == {"samples_per_s", "tokens_per_s", "tflops"}


def test_peak_memory_sees_what_was_held_for_a_moment():
    pid = os.fork()  # a process whose peak is not that of the tests before
    if pid == 0:
        before = memory(CPU)["host_rss_gib"]
        block = bytearray(b"x") * (300 << 20)
        del block
        os._exit(0 if before + 0.2 < memory(CPU)["host_rss_gib"] < before + 0.8 else 1)
    assert os.waitpid(pid, 0)[1] == 0


def test_sigma_bins_at_the_edges():
    sigmas = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.999, 1.0])
    losses = torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0, 11.0])
    assert sigma_bins(losses, sigmas).tolist() == [[4.0, 5.0, 7.0, 20.0], [2, 1, 1, 2]]
    assert sigma_bins(losses[:1], sigmas[:1]).tolist() == [[1.0, 0, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize("n", [0, 1, 7, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sigma_bins_add_up_over_packs_and_lose_no_sample(n, dtype):
    sigmas = torch.rand(n, generator=torch.Generator().manual_seed(n))
    losses = torch.rand(n, generator=torch.Generator().manual_seed(n + 1)).to(dtype)
    whole = sigma_bins(losses, sigmas)
    parts = sigma_bins(losses[: n // 3], sigmas[: n // 3]) + sigma_bins(losses[n // 3 :], sigmas[n // 3 :])
    torch.testing.assert_close(parts, whole)
    assert whole[0].sum().item() == pytest.approx(losses.double().sum().item())
    for b in range(SIGMA_BINS):
        inside = (sigmas >= b / SIGMA_BINS) & (sigmas < (b + 1) / SIGMA_BINS)
        assert whole[1, b] == inside.sum()
        assert whole[0, b].item() == pytest.approx(losses[inside].double().sum().item())


# --- the curve


@pytest.mark.parametrize("half_width", [1, 4, 50])
def test_smoothing_keeps_constants_and_lines_and_bridges_gaps(half_width):
    values = np.full(200, 3.0)
    values[[0, 50, 51, 199]] = np.nan, np.inf, np.nan, -np.inf
    assert np.allclose(smoothed(values, half_width), 3.0)
    line = np.arange(200.0)
    inside = slice(3 * half_width, -3 * half_width)
    assert np.allclose(smoothed(line, half_width)[inside], line[inside])
    assert np.isnan(smoothed(np.full(5, np.nan), half_width)).all()


def test_smoothing_averages_noise_away():
    noise = np.random.default_rng(0).standard_normal(10_000)
    assert smoothed(noise, 50).std() < 0.15


def write_metrics(path, losses, rates=None):
    lines = [
        json.dumps({"step": i + 1, "loss": loss, "step_s": 1.5, "samples_seen": 4 * (i + 1)} | (rates or {}))
        for i, loss in enumerate(losses)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def pixels_of(image: Image.Image, colour) -> np.ndarray:
    """(y, x) of the pixels of a colour, [n, 2]."""
    rgb = tuple(bytes.fromhex(colour[1:])) if isinstance(colour, str) else colour
    return np.argwhere((np.asarray(image.convert("RGB")) == rgb).all(-1))


@pytest.mark.parametrize("source", ["file", "folder"])
def test_the_curve_falls_as_the_loss_does(tmp_path, source):
    losses = 0.2 + np.exp(-np.arange(300) / 60)
    path = write_metrics(tmp_path / "metrics.jsonl", losses.tolist(), {"lr": 1e-4})
    draw_loss_curve(path if source == "file" else tmp_path, tmp_path / "loss.png")
    image = Image.open(tmp_path / "loss.png")
    assert image.width == 1200
    curve = pixels_of(image, BLUE)
    left, right = curve[curve[:, 1] < 300], curve[(curve[:, 1] > 800) & (curve[:, 1] < 1100)]
    assert len(left) > 200
    assert len(right) > 200
    assert left[:, 0].mean() + 150 < right[:, 0].mean(), "higher at the left, in picture rows"


@pytest.mark.parametrize(
    "losses",
    [[1.0], [0.0, 0.0], [2.0] * 30, [1.0, "nan", 0.5], [1e9, *[1.0] * 400], [-1.0, -2.0], [0.5, 1e-9] * 50],
)
@pytest.mark.parametrize("rates", [None, {"lr": 0.0}, {"lr": 3e-4}])
def test_odd_runs_are_drawn_too(tmp_path, losses, rates):
    write_metrics(tmp_path / "metrics.jsonl", losses, rates)
    draw_loss_curve(tmp_path, tmp_path / "loss.png")
    image = Image.open(tmp_path / "loss.png")
    assert image.size == (1200, 540)
    assert len(pixels_of(image, BLUE)) > 20, "the curve or its last value"


@pytest.mark.parametrize("losses", [[], ["nan", "inf"]])
def test_a_run_without_a_loss_is_refused(tmp_path, losses):
    write_metrics(tmp_path / "metrics.jsonl", losses)
    with pytest.raises(DataError, match=str(tmp_path)):
        draw_loss_curve(tmp_path, tmp_path / "loss.png")
    with pytest.raises(DataError, match="nowhere"):
        draw_loss_curve(tmp_path / "nowhere", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


# --- the grid


def plain(colour: tuple[int, int, int], size=(64, 64)) -> Image.Image:
    return Image.new("RGB", size, colour)


def colours(n: int, blue: int) -> list[tuple[int, int, int]]:
    return [(20 + 10 * i, 200 - 10 * i, blue) for i in range(n)]


@pytest.mark.parametrize(("n", "columns"), [(1, 1), (5, 3), (8, 8), (16, 8), (7, 4)])
def test_every_picture_has_its_place(tmp_path, n, columns):
    pictures = colours(n, 90)
    draw_grid([plain(c) for c in pictures], [f"picture {i}" for i in range(n)], tmp_path / "g.png", columns)
    image = Image.open(tmp_path / "g.png")
    assert image.width == 1200
    centres = [pixels_of(image, c).mean(0) for c in pictures]
    cell = (1200 - 32 - 14 * (columns - 1)) // columns
    for i, centre in enumerate(centres):
        assert len(pixels_of(image, pictures[i])) == (cell - 2) ** 2, "a square inside its outline"
        row, column = divmod(i, columns)
        assert centre[0] == pytest.approx(centres[row * columns][0])
        assert centre[1] == pytest.approx(centres[column][1])
        below = np.asarray(image)[int(centre[0]) + cell // 2 + 2 :][:22, int(centre[1]) - 40 : int(centre[1]) + 40]
        assert below.min() < 80, "a caption"


def test_samples_stand_above_their_training_pictures(tmp_path):
    samples, training = colours(6, 90), colours(6, 160)
    captions = ["short"] * 6
    draw_grid([plain(c) for c in samples], captions, tmp_path / "g.png", 3, [plain(c, (40, 20)) for c in training])
    image = Image.open(tmp_path / "g.png")
    assert pixels_of(image, samples[0])[:, 1].min() > 40, "room for the names"
    for above, below in zip(samples, training):
        (y0, x0), (y1, x1) = pixels_of(image, above).mean(0), pixels_of(image, below).mean(0)
        assert x0 == pytest.approx(x1, abs=1)
        assert y0 < y1
    first_row, second_row = pixels_of(image, training[0]), pixels_of(image, samples[3])
    assert first_row[:, 0].max() < second_row[:, 0].min()


@pytest.mark.parametrize(
    "caption", ["", "word " * 200, "x" * 500, "two\nlines\tand\x00more", "表情符号 🙂 العربية", "   "]
)
def test_any_caption_stays_in_its_column(tmp_path, caption):
    draw_grid([plain((9, 99, 199))] * 4, ["a", caption, "b", "c"], tmp_path / "g.png", 4)
    image = np.asarray(Image.open(tmp_path / "g.png").convert("L"))
    cell = (1200 - 32 - 14 * 3) // 4
    edge = 16 + cell + 7
    assert image[16 + cell + 8 :, [edge, edge + cell + 14]].min() == 255, "nothing between the columns"
    assert image.shape[0] < 16 + cell + 6 + 4 * 19 + 16


def test_proportions_are_kept_and_transparency_is_white(tmp_path):
    wide, see_through = Image.new("RGB", (200, 50), (1, 2, 3)), Image.new("RGBA", (30, 60), (255, 0, 0, 0))
    draw_grid([wide, see_through], ["wide", "nothing"], tmp_path / "g.png", 2)
    image = Image.open(tmp_path / "g.png")
    height, width = np.ptp(pixels_of(image, (1, 2, 3)), axis=0) + 1
    assert width / height == pytest.approx(4, rel=0.02)
    assert not len(pixels_of(image, (255, 0, 0)))

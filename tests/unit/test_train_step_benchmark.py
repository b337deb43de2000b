"""The benchmark of a training step: what it counts, in which order it works, what it prints."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from dstrain.models.packing import PackLayout
from dstrain.models.qwen_image import QwenImageDiT

PATH = Path(__file__).parents[2] / "benchmarks/train_step.py"
TINY = "--layers 2 --heads 2 --head_dim 32 --text_dim 48 --image_tokens 15 --text_tokens 7 --samples 2".split()
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("train_step", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_step"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["train_step"]


def test_the_figures_are_consistent(benchmark, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DSTRAIN_PEAK_TFLOPS", "2")
    benchmark.main([*TINY, "--micro_steps", "3", "--repeats", "5", "--out", str(tmp_path / "figures.json")])
    figures = json.loads(capsys.readouterr().out)
    assert figures == json.loads((tmp_path / "figures.json").read_text())
    params = benchmark.model_params(benchmark.parse_args(TINY))
    layout = PackLayout.build([[(1, 3, 5)]] * 2, [7, 7])
    flops = 3 * 3 * QwenImageDiT(params).forward_flops(layout)
    assert figures["step"] == {"samples": 6, "tokens": 3 * 44, "train_flops": flops}
    step = figures["step_s"]
    assert 0 < step["min"] <= step["median"] <= step["max"]
    assert figures["samples_per_s"]["median"] == pytest.approx(6 / step["median"])
    assert figures["tokens_per_s"]["max"] == pytest.approx(132 / step["min"])
    assert figures["mfu"]["min"] == pytest.approx(flops / step["max"] / 2e12)
    assert {"forward_s", "backward_s", "optimizer_s", "host_rss_gib", "machine"} <= set(figures)
    assert figures["machine"]["torch"] == torch.__version__
    assert figures["world_size"] == 1


class Recorder:
    def __init__(self) -> None:
        self.calls: list[str] = []

    def forward(self, pack):
        self.calls.append(f"forward {pack}")
        return pack

    def backward(self, loss, *, last):
        self.calls.append(f"backward {loss}{' last' if last else ''}")

    def step(self):
        self.calls.append("step")


def test_every_step_is_whole_and_the_warm_up_is_not_timed(benchmark):
    engine = Recorder()
    seconds = benchmark.measure(engine, ["a", "b"], warmup=2, repeats=3, device=CPU)
    assert {len(values) for values in seconds.values()} == {3}
    assert engine.calls == ["forward a", "backward a", "forward b", "backward b last", "step"] * (2 + 3 + 3)


def test_the_plain_engine_learns(benchmark):
    args = benchmark.parse_args(TINY)
    params = benchmark.model_params(args)
    engine = benchmark.make_engine(args, params, CPU)
    engine.optimizer.param_groups[0]["lr"] = 1e-2
    pack = benchmark.random_pack(args, params, CPU, seed=0)
    first = engine.forward(pack).item()
    for _ in range(20):
        benchmark.whole_step(engine, [pack])
    assert engine.forward(pack).item() < 0.9 * first


@pytest.mark.parametrize("tokens", [1, 7, 60, 1024])
def test_tokens_are_counted_exactly(benchmark, tokens):
    args = benchmark.parse_args([*TINY, "--image_tokens", str(tokens)])
    pack = benchmark.random_pack(args, benchmark.model_params(args), CPU, seed=0)
    assert pack.layout.image_lens == (tokens, tokens)
    assert len(pack.latents) == len(pack.target) == 2 * tokens


@pytest.mark.parametrize(
    "wrong", ["--layers 0", "--head_dim 40", "--repeats -1", "--samples x", "--layer 2", "--bogus 1"]
)
def test_wrong_arguments_are_refused(benchmark, capsys, wrong):
    with pytest.raises(SystemExit) as stop:
        benchmark.parse_args(wrong.split())
    assert stop.value.code == 2
    assert wrong.split()[0] in capsys.readouterr().err

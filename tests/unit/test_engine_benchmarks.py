"""The benchmarks of the engine: what they count and how they sum up. Nothing here is timed."""

import importlib
import json
import mmap
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dstrain.models.packing import PackLayout
from dstrain.models.qwen_image import QwenImageDiT, QwenImageParams
from dstrain.models.weights import Weights
from dstrain.objectives.flow_match import FlowMatch

ROOT = Path(__file__).parents[2]
NAMES = ("trainer_overhead", "weight_loading")


@pytest.fixture(scope="module", autouse=True)
def modules():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield {name: importlib.import_module(name) for name in NAMES}
    sys.path.remove(str(ROOT / "benchmarks"))
    for name in NAMES:
        del sys.modules[name]


@pytest.fixture
def overhead(modules):
    return modules["trainer_overhead"]


@pytest.fixture
def loading(modules):
    return modules["weight_loading"]


@pytest.mark.parametrize("wrong", ["--pairs 1", "--warmup 0", "--layers x", "--tokens 15", "--pair 4", "--bogus 1"])
def test_wrong_arguments_of_the_overhead_are_refused(overhead, capsys, wrong):
    with pytest.raises(SystemExit) as stop:
        overhead.parse_args(wrong.split())
    assert stop.value.code == 2
    assert wrong.split()[0] in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["--rounds 0", "--heads -1", "--ways nobodys", "--round 2"])
def test_wrong_arguments_of_the_loading_are_refused(loading, capsys, wrong):
    with pytest.raises(SystemExit) as stop:
        loading.parse_args(wrong.split())
    assert stop.value.code == 2
    assert wrong.split()[0] in capsys.readouterr().err


def test_the_defaults_name_files_that_are_there(overhead, loading):
    args = overhead.parse_args([])
    assert [path.stem for path in args.ds_config] == ["zero2", "zero3_offload"]
    assert all(path.is_file() for path in args.ds_config)
    assert args.out == ROOT / "benchmarks/results/trainer_overhead.json"
    assert loading.parse_args([]).out == ROOT / "benchmarks/results/weight_loading.json"


class FakeTrainer:
    """Two packs a step for an engine, as the trainer hands them over."""

    def __init__(self) -> None:
        self.objective = FlowMatch(seed=3)  # with the bell's weights
        self.engine = SimpleNamespace(module=nn.Identity())
        self.recipe = SimpleNamespace(batch=SimpleNamespace(global_batch_size=6))
        self.losses: list[torch.Tensor] = []
        self.velocities = iter([])

    def pack(self, step, micro):
        layout = PackLayout.build([[(1, 2, 3)], [(1, 1, 1)], [(1, 4, 2)]][micro:], [4, 2, 1][micro:])
        x0 = torch.randn(sum(layout.image_lens), 8, generator=torch.Generator().manual_seed(10 * step + micro))
        return x0, layout, torch.arange(len(layout)) + 10 * step + 3 * micro

    def train_step(self, step):
        for micro in range(2):
            x0, layout, draws = self.pack(step, micro)
            losses = self.objective(lambda x, s, layout=layout: self.engine(x, "text", s, layout), x0, layout, draws)
            self.engine.backward(losses.per_sample.sum(), last=micro == 1)
            self.losses.append(losses.per_sample)
        assert self.engine.step(1.0, step) == 0


def test_recorded_packs_give_the_losses_of_the_objective(overhead):
    trainer = FakeTrainer()
    engine, objective = trainer.engine, trainer.objective
    packs = overhead.record(trainer, 2)
    assert trainer.engine is engine and trainer.objective is objective
    assert [len(step) for step in packs] == [2, 2]
    for step in range(2):
        for micro, pack in enumerate(packs[step]):
            x0, layout, draws = trainer.pack(step, micro)
            assert pack.inputs[1] == "text" and pack.inputs[3].image_lens == layout.image_lens
            velocity = torch.randn(x0.shape)
            want = objective(lambda x_t, sigmas, v=velocity: v, x0, layout, draws)
            loss = ((velocity - pack.target).square() * pack.scale).sum()
            torch.testing.assert_close(loss, want.per_sample.sum() / 6)
            x_t, sigmas = pack.inputs[0], pack.inputs[2][layout.image_sample][:, None]
            torch.testing.assert_close(x_t, x0 + sigmas * pack.target)


def row(ours, bare, losses=(1.0, 1.0)):
    parts = dict.fromkeys(("data_wait_s", "encode_s", "log_s", "read_ahead_s"), 0.125)
    return {
        "trainer": {"wall_s": ours, "cpu_s": 2 * ours, "optimizer_s": ours / 4, **parts},
        "bare": {"wall_s": bare, "cpu_s": 2 * bare, "optimizer_s": bare / 8},
        "without_engine": {"wall_s": 0.0625, "cpu_s": 0.05},
        "losses": list(losses),
        "micro_steps": 2,
        "tokens": 100,
    }


def figures(*ranks):
    return {"ranks": list(ranks), "others_cores": 0.1, "machine": {}, "parameters": 7}


def test_overhead_is_of_the_slower_rank_and_of_all_processors(overhead):
    first = [row(100, 1), row(1.1, 1.0), row(2.0, 1.0), row(1.2, 1.0)]
    second = [row(100, 1), row(1.0, 1.0), row(1.0, 2.0), row(1.0, 1.0)]
    found = overhead.summary(figures(first, second), warmup=1)
    assert found["pairs"] == 3
    assert found["overhead_wall"]["median"] == pytest.approx(0.1)  # of 1.1, 2 / 2 and 1.2
    assert found["overhead_cpu"]["median"] == pytest.approx(0.05)  # of 2.1 / 2, 3 / 3 and 2.2 / 2
    assert found["step_s"]["trainer"] == pytest.approx({"median": 1.2, "low": 1.15, "high": 1.6})
    assert found["cpu_s"]["bare"]["median"] == pytest.approx(4.0)
    assert found["step_s"]["without_engine"]["median"] == 0.0625
    assert found["cpu_s"]["without_engine"]["median"] == pytest.approx(0.1)
    assert found["added_s"]["median"] == pytest.approx(0.1)
    assert found["trainer_parts_s"]["optimizer_s"] == pytest.approx(1.1 / 4)
    assert found["bare_parts_s"] == {"optimizer_s": pytest.approx(1 / 8)}
    assert (found["micro_steps"], found["tokens"], found["parameters"]) == (2, 100, 7)
    assert "ranks" not in found
    text = overhead.describe("zero2", found)
    assert "+10.0% of wall time" in text and "+5.0% of processor time, of which 2.5% outside" in text


def test_the_spread_of_an_overhead(overhead):
    theirs = [1.0 + i % 7 for i in range(41)]
    ours = [(1 + (i - 10) / 100) * t for i, t in enumerate(theirs)]  # -10 % to +30 %
    found = overhead.overhead(ours, theirs)
    assert found["median"] == pytest.approx(0.1)
    assert (found["low"], found["high"]) == pytest.approx((0.0, 0.2))
    assert found["low"] < found["ci_low"] < found["median"] < found["ci_high"] < found["high"]
    same = overhead.overhead([1.02] * 5, [1.0] * 5)
    assert same == pytest.approx(dict.fromkeys(same, 0.02))
    with pytest.raises(ValueError, match="zip"):
        overhead.overhead([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    "losses",
    [
        [(1.0, 1.0001), (1.0, 1.0), (1.0, 1.0)],  # not the same weights
        [(1.0, 1.0), (1.0, 1.0), (1.0, 1.01)],  # the steps differ
        [(1.0, 1.0), (float("nan"), 1.0), (1.0, 1.0)],
    ],
)
def test_work_that_differs_is_no_result(overhead, losses):
    rows = [row(1, 1, pair) for pair in losses]
    with pytest.raises(RuntimeError, match="not do the same"):
        overhead.summary(figures(rows, rows), warmup=1)
    rows = [row(1, 1, (1.0, 1.0 + gap)) for gap in (5e-6, 5e-4, 0.0)]
    found = overhead.summary(figures(rows, rows), warmup=1)
    assert found["loss_gap"] == pytest.approx({"first": 5e-6, "largest": 5e-4}, rel=1e-2)


def test_the_model_is_the_demos_but_larger(overhead, tmp_path):
    demo = json.loads((ROOT / "launch/demo/model/transformer/config.json").read_text())
    args = overhead.parse_args(["--layers", "7", "--heads", "3"])
    config = overhead.make_model(args, tmp_path / "model")
    assert config == {**demo, "num_layers": 7, "num_attention_heads": 3}
    assert json.loads((tmp_path / "model/transformer/config.json").read_text()) == config
    assert json.loads((ROOT / "launch/demo/model/transformer/config.json").read_text()) == demo


def test_the_recipe_is_the_demos_with_one_rate(overhead, tmp_path):
    from dstrain.config import load_recipe

    args = overhead.parse_args(["--batch", "12", "--tokens", "99", "--pairs", "6", "--warmup", "2"])
    recipe = load_recipe(ROOT / "launch/recipes/demo.yaml", overhead.overrides(args, tmp_path))
    assert (recipe.batch.global_batch_size, recipe.batch.tokens_per_pack, recipe.train.steps) == (12, 99, 8)
    assert recipe.data.shards == ["launch/demo/shards"]
    from dstrain.engine.lr import lr_factor

    assert {lr_factor(recipe.optimizer, step, 8) for step in range(8)} == {1.0}


def test_the_checkpoint_is_what_both_models_want(loading, tmp_path):
    from diffusers import QwenImageTransformer2DModel

    size = loading.write_checkpoint(tmp_path, layers=1, heads=1)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) >= 3
    assert size == sum(path.stat().st_size for path in files)
    params = QwenImageParams.from_config(json.loads((tmp_path / "config.json").read_text()))
    with torch.device("meta"):
        model = QwenImageDiT(params)
    weights = Weights(tmp_path)
    weights.check({name: p.shape for name, p in model.named_parameters()})
    theirs = QwenImageTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert params.attention_head_dim == 128 and params.joint_attention_dim == 3584  # as published
    for name, p in theirs.named_parameters():
        mine = weights.read(name).view(p.shape)
        assert torch.equal(mine, p) and len(mine.unique()) > 10 and mine.abs().max() <= 0.05
    trained = [name for name, p in loading.only_output_trains(theirs).named_parameters() if p.requires_grad]
    assert trained == ["proj_out.weight", "proj_out.bias"]


def stage(seconds=1.0, read=0, mapped=0, peak=0, anonymous=0):
    return {
        "seconds": seconds,
        "cpu_seconds": seconds / 2,
        "read": read,
        "mapped": mapped,
        "peak": peak,
        "anonymous": anonymous,
    }


def rank(loaded, engine, error=""):
    return {"loaded": loaded, "engine": engine, "error": error}


def test_bytes_are_of_the_files_and_memory_of_a_partition(loading):
    light = rank(stage(1, 50, 0, 55, 52), stage(2, 51, 0, 60, 58))
    heavy = rank(stage(3, 0, 100, 110, 10), stage(5, 1, 100, 150, 75))
    found = loading.summary([[light, heavy], [heavy, heavy], [light, light]], file_size=100, world=2)
    assert found["loaded"]["seconds"] == {"median": 3, "min": 1, "max": 3}
    assert found["engine"]["cpu_seconds"] == {"median": 2.5, "min": 1.0, "max": 2.5}
    assert found["loaded"]["read"] == {"median": 0.5, "min": 0.0, "max": 0.5}
    assert found["loaded"]["mapped"] == {"median": 1.0, "min": 0.0, "max": 1.0}
    assert found["engine"]["peak"] == pytest.approx({"median": 3.0, "min": 1.2, "max": 3.0})
    assert found["engine"]["anonymous"] == pytest.approx({"median": 1.5, "min": 1.16, "max": 1.5})
    assert "loaded 3.00 s, of processor 1.50 s, read 0.500" in loading.describe("x", found)


def test_a_way_that_fails_has_no_figures(loading):
    fine, failed = rank(stage(), stage(2)), {"loaded": stage(), "error": "ValueError: no"}
    assert loading.summary([[fine, failed]], 100, 2) == {"error": "ValueError: no"}
    assert "ValueError: no" in loading.describe("x", {"error": "ValueError: no"})
    rounds = {
        "dstrain": [[rank(stage(), stage(2)), rank(stage(), stage(1))], [fine, fine]],
        "slow": [[rank(stage(), stage(3)), rank(stage(), stage(6))], [fine, rank(stage(), stage(8))]],
        "bad": [[fine, failed]],
    }
    assert loading.against(rounds) == {"slow": {"median": 3.5, "min": 3.0, "max": 4.0}}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_what_a_process_reads_maps_and_holds_is_counted(loading, tmp_path):
    size = 48 << 20
    (tmp_path / "a.safetensors").write_bytes(bytes(size))
    (tmp_path / "beside").mkdir()
    watch = loading.Watch()
    try:
        before = watch.figures(tmp_path)
        assert before["read"] < 1 << 20 and before["mapped"] == 0 and before["peak"] < size / 4
        with (
            mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as content,
            (tmp_path / "a.safetensors").open("rb") as file,
        ):  # new memory, not freed one
            file.readinto(content)
        read = watch.figures(tmp_path)
        assert size <= read["read"] < 1.05 * size
        assert 0.9 * size < read["peak"] < 1.5 * size  # though it is gone
        with (tmp_path / "a.safetensors").open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            assert watch.figures(tmp_path)["mapped"] == size
            assert loading.mapped(tmp_path / "beside") == 0
            touched = sum(view[::4096])
            after = watch.figures(tmp_path)
            view.close()
        assert touched == 0
        with mmap.mmap(-1, 3 * size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as held:
            held.write(b"1" * len(held))
            last = watch.figures(tmp_path)
        assert last["mapped"] == size  # at its most
        assert after["read"] < 1.05 * size  # a mapping is not read
        assert last["anonymous"] > 0.9 * 3 * size
        assert last["seconds"] >= after["seconds"] >= 0
    finally:
        watch.close()


def test_wrong_values_of_a_partition_are_counted(loading, tmp_path):
    loading.write_checkpoint(tmp_path, layers=1, heads=1)
    weights = Weights(tmp_path)

    class Partitioned(nn.Module):
        """As rank 1 of 2 holds them: the last shard is padded."""

        def named_parameters(self):
            return iter(self.held.items())

    module = Partitioned()
    module.held = {}
    for name in ("proj_out.weight", "transformer_blocks.0.attn.norm_q.weight", "img_in.bias"):
        shape = weights.entries[name].shape
        size = -(-shape.numel() // 2)
        data = torch.zeros(size, dtype=torch.bfloat16)
        mine = weights.read(name, size, 2 * size)
        data[: len(mine)] = mine
        module.held[name] = SimpleNamespace(ds_shape=shape, ds_tensor=data)
    assert loading.wrong_elements(module, tmp_path, 1) == 0
    assert loading.wrong_elements(module, tmp_path, 0) > 1000
    bias = module.held["img_in.bias"]
    bias.ds_tensor[-1] += 1
    bias.ds_tensor[0] = float("nan")
    assert loading.wrong_elements(module, tmp_path, 1) == 2
    bias.ds_shape = torch.Size([bias.ds_shape.numel() + 2])
    assert loading.wrong_elements(module, tmp_path, 1) == bias.ds_tensor.numel()

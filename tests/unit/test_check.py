"""`dstrain check`: all that is wrong at once, what would disappoint, and what is in order."""

import argparse
import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_runs import ROOT, prepare_run

from dstrain import checks
from dstrain.checks import Machine, check, of_plan, of_recipe
from dstrain.commands import check as command
from dstrain.config import Recipe
from dstrain.engine.estimate import Choice, advise, estimate, load_of
from dstrain.engine.estimate import Machine as EstimateMachine
from dstrain.knobs import build
from dstrain.models.qwen_image import QwenImageDiT, QwenImageParams

ZERO3 = {"zero_optimization": {"stage": 3}}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("good")
    prepare_run(tmp, optimizer={"lr": 1e-3, "warmup_steps": 1, "schedule": "constant"})
    return tmp


@pytest.fixture
def run(good, tmp_path, monkeypatch):
    """Returns a function that checks the good run with changes, and gives {level: [text, ...]}."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DEEPSPEED_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)

    def go(*overrides: str, ds: object = None, machine: Machine | None = None) -> dict[str, list[str]]:
        path = tmp_path / "ds.json"
        path.write_text(ds if isinstance(ds, str) else json.dumps(ZERO3 if ds is None else ds))
        findings = check(good / "recipe.yaml", list(overrides), path, machine or Machine(ranks=2, gpu=False))
        return {level: [f.text for f in findings if f.level == level] for level in checks.LEVELS}

    return go


@pytest.fixture
def model(good, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(good / "model", folder)
    return folder


def test_a_run_that_is_right(run):
    found = run()
    assert found["error"] == []
    assert found["warning"] == []
    text = "\n".join(found["ok"])
    assert "engine: ZeRO-3, " in text
    assert "stage3_prefetch_bucket_size = " in text
    assert "the next block is fetched while one computes" in text
    assert "parameters, " in text
    assert "data: 24 samples in 3 shards" in text
    assert "8 samples in " in text


def test_the_sizes_that_are_shown_are_those_that_are_filled_in(run, good, tmp_path):
    shown = [line for line in run()["ok"] if " = " in line and line.startswith("engine: ")]
    assert len(shown) == 6
    given = {"stage": 3, **{line.split()[1]: 12345 for line in shown}}
    assert not [line for line in run(ds={"zero_optimization": given})["ok"] if "12,345" in line]


def test_every_part_is_looked_at(run, model):
    """What is wrong with one hides nothing of the others."""
    file = model / "transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    ds = {"gradient_cliping": 1, "zero_optimization": {"stage": "3"}}
    errors = run(f"model.path={model}", "data.shards=[nowhere/*.tar]", ds=ds)["error"]
    assert len(errors) == 4
    for words in ("gradient_cliping", "zero_optimization.stage", "nowhere", "cut short"):
        assert sum(words in error for error in errors) == 1, words


def test_engine_data_and_weights_of_readable_files(run, model):
    (model / "transformer/diffusion_pytorch_model.safetensors").unlink()
    ds = {**ZERO3, "train_batch_size": 16}
    errors = run(f"model.path={model}", "data.shards=[nowhere/*.tar]", ds=ds)["error"]
    assert len(errors) == 3
    assert any("train_batch_size 16" in error for error in errors)
    assert any("nowhere" in error for error in errors)
    assert any("model.init: random" in error for error in errors)


def test_a_recipe_that_cannot_be_read_hides_no_ds_config(run):
    errors = run("train.stepz=3", ds='{"zero_optimization": {"stage": 3, "stage3_prefech_bucket_size": 1}}')["error"]
    assert len(errors) == 2
    assert "train.stepz" in errors[0]
    assert "stage3_prefech_bucket_size" in errors[1]


@pytest.mark.parametrize(
    ("overrides", "ds", "says"),
    [
        ([], "[1", ["not JSON"]),
        ([], {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, ["offload_param needs stage 3"]),
        ([], {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}, ["nvme_path must be a folder"]),
        ([], {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 3}}, ["does not divide the 2 ranks"]),
        ([], {"optimizer": {"type": "AdamW", "params": {"lr": 2e-3}}}, ["optimizer.lr = 0.001", "= 0.002"]),
        ([], {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 1}}}, ["warmup_type"]),
        ([], {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, ["needs an NVIDIA GPU"]),
        (["model.family=qwen_imag"], ZERO3, ["did you mean 'qwen_image'"]),
        (["batch.global_batch_size=1"], ZERO3, ["leaves some of 2 ranks"]),
        (["batch.global_batch_size=25"], ZERO3, ["24 usable samples"]),
        (["model.path=nowhere"], ZERO3, ["nowhere"]),
        (["run_dir=/dev/null/x"], ZERO3, ["cannot be written"]),
    ],
)
def test_one_error_is_one_line(run, overrides, ds, says):
    (error,) = run(*overrides, ds=ds)["error"]
    assert all(word in error for word in says), error
    assert "\n" not in error


def test_weights_of_another_size(run, model):
    file = model / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["img_in.weight"] = tensors["img_in.weight"][:, :32].contiguous()
    save_file(tensors, file)
    (error,) = run(f"model.path={model}")["error"]
    assert "misshapen   img_in.weight" in error


@pytest.mark.parametrize("gpu", [False, True])
def test_a_text_encoder_that_is_cut_short(run, model, gpu):
    (file,) = (model / "text_encoder").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    (error,) = run(f"model.path={model}", machine=Machine(ranks=2, gpu=gpu))["error"]
    assert str(file) in error
    assert "cut short" in error


def test_an_index_that_leaves_its_folder(run, model):
    index = {"weight_map": {"img_in.weight": "../vae/diffusion_pytorch_model.safetensors"}}
    (model / "transformer/x.safetensors.index.json").write_text(json.dumps(index))
    (error,) = run(f"model.path={model}")["error"]
    assert "not a file of this folder" in error


def test_a_gpu_elsewhere(run):
    found = run(ds={"bf16": {"enabled": "auto"}, **ZERO3}, machine=Machine(ranks=8, gpu=True))
    assert found["error"] == []
    assert any("bfloat16" in line for line in found["ok"])
    assert any(line.startswith("memory: about ") for line in found["ok"])
    assert not any("cannot hide" in line for line in found["warning"])  # microseconds, of a tiny model


def test_sums_in_bf16(run):
    """Where the weights are bf16, and where a step has more than one micro-step."""
    ds, gpu = {"bf16": {"enabled": "auto"}}, Machine(ranks=2, gpu=True)
    (warning,) = [text for text in run("batch.tokens_per_pack=64", ds=ds, machine=gpu)["warning"] if "bf16" in text]
    assert "zero_optimization.stage 0 adds the gradients of" in warning
    assert "use stage 1" in warning
    for given in (ds | {"zero_optimization": {"stage": 1}}, {}):
        found = run("batch.tokens_per_pack=64", ds=given, machine=gpu)
        assert found["error"] == []
        assert not any("bf16" in text for text in found["warning"])
    assert not any("bf16" in text for text in run("batch.tokens_per_pack=100000", ds=ds, machine=gpu)["warning"])


def test_a_tiny_model_needs_no_offload(run):
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    warnings = run(ds={"zero_optimization": zero}, machine=Machine(ranks=8, gpu=True))["warning"]
    assert any(warning.startswith("zero1 fits too") for warning in warnings)


def test_a_gpu_that_is_too_small(run):
    warnings = run(machine=Machine(ranks=2, gpu=True, gpu_bytes=1.001e9))["warning"]
    assert any("are needed on a GPU" in warning for warning in warnings)


@pytest.fixture(scope="module")
def qwen():
    with torch.device("meta"):
        model = QwenImageDiT(QwenImageParams())
    for name, p in model.named_parameters():
        p.requires_grad_(name not in model.unused)
    return model


@pytest.mark.parametrize(
    ("zero", "gpus", "samples", "micros", "says"),
    [
        ({"stage": 3}, 8, [(4096, 512)], 1, []),
        ({"stage": 2}, 8, [(4096, 512)], 1, ["are needed on a GPU", "zero3: "]),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, 8, [(4096, 512)], 1, ["zero3 fits too"]),
        ({"stage": 3}, 8, [(256, 64)], 16, ["cannot hide; raise batch.tokens_per_pack for fewer micro-steps than 16"]),
        ({"stage": 3}, 8, [(256, 64)], 1, ["cannot hide; raise batch.global_batch_size"]),
        ({"stage": 3, "offload_optimizer": {"device": "cpu"}}, 4, [(4096, 512)] * 4, 1, ["zero3_offload, ratio 0."]),
        ({"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.45}}, 4, [(4096, 512)] * 4, 1, []),
    ],
)
def test_twenty_billion_parameters(qwen, zero, gpus, samples, micros, says):
    where, load = EstimateMachine(gpus=gpus), load_of(qwen, samples)
    config = {"bf16": {"enabled": True}, "zero_optimization": zero}
    choice = Choice(micro_steps=micros)
    warnings = list(of_plan(estimate(config, load, where, choice), advise(load, where, choice, config)))
    assert len(warnings) == bool(says)
    assert all(word in warnings[0] for word in says), warnings


def test_a_full_disk(run, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    (warning,) = run(f"run_dir={tmp_path}/run")["warning"]
    assert "2 + 1 checkpoints" in warning
    assert "and the export" in warning
    assert f"{tmp_path}/run" in warning
    (warning,) = run(f"run_dir={tmp_path}/run", "train.export=false", "train.keep_checkpoints=5")["warning"]
    assert "5 + 1 checkpoints" in warning
    assert "export" not in warning
    old = tmp_path / "run/checkpoints/step-00000001"
    old.mkdir(parents=True)
    with (old / "rank-00000.safetensors").open("wb") as f:
        os.truncate(f.fileno(), 1 << 32)  # of this run: it makes room when it goes
    assert run(f"run_dir={tmp_path}/run")["warning"] == []


def test_a_save_that_outlasts_the_process_group(run, monkeypatch):
    slow = Machine(ranks=2, gpu=False, disk=1e3)
    (warning,) = run(machine=slow)["warning"]
    assert "give up after 10" in warning
    assert "DEEPSPEED_TIMEOUT" in warning
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "1000000")
    assert run(machine=slow)["warning"] == []
    monkeypatch.setenv("DEEPSPEED_TIMEOUT", "half an hour")
    (error,) = run()["error"]
    assert "DEEPSPEED_TIMEOUT = 'half an hour'" in error


def test_what_has_no_effect(run):
    ds = {"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 5}, "activation_checkpointing": {}}
    warnings = run(ds=ds)["warning"]
    assert len(warnings) == 2
    assert all("ds.json: " in warning for warning in warnings)


def test_the_average_is_not_on_the_nvme_drive(run, tmp_path):
    zero = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": str(tmp_path)}}
    (error,) = run("ema.decay=0.5", ds={"zero_optimization": zero})["error"]
    assert "ema does not go with zero_optimization.offload_optimizer nvme" in error


def recipe(**sections: object) -> Recipe:
    base = {
        "run_dir": "x",
        "model": {"path": "x"},
        "data": {"shards": ["x"], "workers": 1},
        "batch": {"global_batch_size": 8},
        "train": {"steps": 1000},
    }
    return build(Recipe, {**base, **sections}, "test")


def test_a_plain_recipe_has_no_warning():
    assert list(of_recipe(recipe(), Machine(ranks=4, gpu=False))) == []
    more = {"ema": {"decay": 0.9999}, "lora": {"rank": 4}, "sample": {"every": 5, "prompts": ["a cat"]}}
    assert list(of_recipe(recipe(**more), Machine(ranks=4, gpu=False))) == []


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"train": {"steps": 100, "save_every": 101}}, "train.save_every = 101 is beyond train.steps = 100"),
        ({"optimizer": {"warmup_steps": 1000}}, "optimizer.warmup_steps = 1000 is the whole run"),
        ({"optimizer": {"schedule": "wsd", "warmup_steps": 500, "decay_steps": 501}}, "more than the 500 steps"),
        ({"optimizer": {"decay_steps": 5}}, "no effect on schedule 'cosine'"),
        ({"optimizer": {"schedule": "constant", "min_lr_ratio": 0.1}}, "optimizer.min_lr_ratio has no effect"),
        ({"batch": {"global_batch_size": 9}}, "batch.global_batch_size = 9 is not a multiple of 4 ranks"),
        ({"model": {"path": "x", "activations": ["full", "offload"]}}, "model.activations: offload does nothing"),
        ({"model": {"path": "x", "encoders": "offload"}}, "model.encoders: offload does nothing"),
        ({"model": {"path": "x", "init": "random"}, "lora": {"rank": 4}}, "random frozen weights learn nothing"),
        ({"sample": {"prompts": ["a cat"]}}, "sample.prompts has no effect without sample.every"),
        ({"data": {"shards": ["x"], "workers": 256}}, "data.workers = 256 threads a rank"),
    ],
)
def test_recipes_that_disappoint(sections, says, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    (warning,) = of_recipe(recipe(**sections), Machine(ranks=4, gpu=False))
    assert says in warning


def test_with_a_gpu_offload_does_something():
    mine = recipe(model={"path": "x", "activations": ["offload"], "encoders": "offload"})
    assert list(of_recipe(mine, Machine(ranks=4, gpu=True))) == []


def dstrain_check(*arguments: object) -> int:
    parser = argparse.ArgumentParser(prog="dstrain check")
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(a) for a in arguments]))


def test_the_command_prints_a_line_each_and_says_by_its_code(good, tmp_path, capsys):
    files = ("--config", good / "recipe.yaml", "--ds_config")
    assert dstrain_check(*files, ROOT / "ds_configs/zero3.json", "--ranks", 2) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.startswith(("warning: ", "ok: ")) for line in lines)
    (tmp_path / "ds.json").write_text('{"gradient_cliping": 1}')
    assert dstrain_check(*files, tmp_path / "ds.json", "train.save_every=99") == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"error: {tmp_path}/ds.json: unknown key 'gradient_cliping'")
    assert any(line.startswith("warning: train.save_every") for line in lines)
    assert dstrain_check(*files, tmp_path / "none.json") == 2
    assert "no such ds_config" in capsys.readouterr().out


@pytest.mark.parametrize(
    "bad", [("--ranks", "0"), ("--gpu_gb", "-80"), ("--disk_gb_s", "nan"), ("--host_gb", "much"), ("--gpu_gb", "inf")]
)
def test_figures_that_cannot_be(good, bad, capsys):
    with pytest.raises(SystemExit) as end:
        dstrain_check("--config", "x", "--ds_config", "x", *bad)
    assert end.value.code == 2
    assert bad[0] in capsys.readouterr().err

"""The whole program on real ranks: train, save, resume, export, refuse."""

import json
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import launches
import pytest
import torch
from diffusers import QwenImagePipeline
from launches import losses
from safetensors.torch import load_file
from small_runs import ROOT, environment, in_fp32, metrics, prepare_run

from dstrain.engine.state import State

pytestmark = pytest.mark.dist
launch = partial(launches.launch, ds="zero3_offload")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Four steps on two ranks under ZeRO-3 with offload, never interrupted."""
    tmp = tmp_path_factory.mktemp("straight")
    recipe = prepare_run(tmp)
    output = launch(recipe, launcher="deepspeed")
    return tmp, recipe, output


def test_metrics_checkpoint_and_announcement(straight):
    tmp, _, output = straight
    rows = metrics(tmp / "run")
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    assert [r["samples_seen"] for r in rows] == [8, 16, 24, 32]
    assert all(r["grad_norm"] > 0 and r["loss"] > 0 for r in rows)
    assert {r["micro_steps"] for r in rows} != {1}  # the token budget splits some batches
    for said in ("ZeRO-3, param on cpu, optimizer on cpu", "2 ranks", "8 samples a step", "parameters", "memory"):
        assert said in output
    assert sorted(p.name for p in (tmp / "run/checkpoints").iterdir()) == ["step-00000002", "step-00000004"]


def test_resume_is_bit_exact_and_steps_appear_once(straight, tmp_path):
    tmp, recipe, _ = straight
    run = tmp_path / "run"
    launch(recipe, f"run_dir={run}", "train.steps=2")
    output = launch(recipe, f"run_dir={run}")
    assert "continuing from" in output
    assert losses(run) == losses(tmp / "run")
    assert [r["step"] for r in metrics(run)] == [0, 1, 2, 3]
    a, b = (load_file(d / "export/transformer/diffusion_pytorch_model.safetensors") for d in (run, tmp / "run"))
    assert all(torch.equal(a[k], b[k]) for k in b)


def test_a_damaged_checkpoint_is_named_and_passed_over(straight, tmp_path):
    tmp, recipe, _ = straight
    run = tmp_path / "run"
    shutil.copytree(tmp / "run", run)
    file = next((run / "checkpoints/step-00000004").glob("rank-*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 0x40
    file.write_bytes(raw)
    output = launch(recipe, f"run_dir={run}")
    assert "PASSING OVER" in output
    assert file.name in output
    assert "step 2 of 4" in output
    assert losses(run) == losses(tmp / "run")


def test_finished_run_is_not_trained_again(straight):
    tmp, recipe, _ = straight
    before = (tmp / "run/metrics.jsonl").read_bytes()
    launch(recipe)
    assert (tmp / "run/metrics.jsonl").read_bytes() == before


def test_one_rank_without_a_launcher_trains_the_same_batches(straight, tmp_path):
    tmp, recipe, _ = straight
    run = tmp_path / "run"
    launch(recipe, f"run_dir={run}", ranks=1, ds="zero2")
    for ours, two_ranks in zip(metrics(run), metrics(tmp / "run"), strict=True):
        assert ours["loss"] == pytest.approx(two_ranks["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(two_ranks["grad_norm"], rel=1e-3)
        assert ours["tokens"] == two_ranks["tokens"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_stops_with_a_checkpoint_and_the_same_command_continues(straight, tmp_path, name):
    _, recipe, _ = straight
    run, whole = tmp_path / "run", tmp_path / "whole"
    argv = [sys.executable, "launch/train.py", "--ds_config", in_fp32("zero0", tmp_path), "--config", str(recipe)]
    with subprocess.Popen([*argv, f"run_dir={run}", "train.steps=40"], cwd=ROOT, env=environment()) as process:
        for _ in range(900):
            if (run / "metrics.jsonl").is_file() and len((run / "metrics.jsonl").read_text().splitlines()) > 1:
                break
            time.sleep(0.1)
        process.send_signal(getattr(signal, name))
        assert process.wait(60) == 75
    saved = max(p.name for p in (run / "checkpoints").iterdir())
    assert int(saved.removeprefix("step-")) == len(metrics(run)) < 40
    launch(recipe, f"run_dir={run}", "train.steps=40", ranks=1, ds="zero0")
    launch(recipe, f"run_dir={whole}", "train.steps=40", ranks=1, ds="zero0")
    assert losses(run) == losses(whole)


def test_a_run_is_continued_at_another_world_size_and_stage(straight, tmp_path):
    tmp, recipe, _ = straight
    run = tmp_path / "run"
    launch(recipe, f"run_dir={run}", "train.steps=2")
    launch(recipe, f"run_dir={run}", ranks=1, ds="zero2")
    for ours, theirs in zip(metrics(run), metrics(tmp / "run"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_lora_trains_paints_averages_and_leaves_as_lora(straight, tmp_path):
    tmp, recipe, _ = straight
    run, sizes = tmp_path / "run", {"sample.height": 32, "sample.width": 48, "sample.steps": 2, "sample.every": 2}
    argv = [f"run_dir={run}", "lora.rank=4", "lora.alpha=8", "lora.dropout=0.1", "ema.decay=0.9"]
    argv += ["sample.prompts=[a red cat, a cat, two cats]", *(f"{k}={v}" for k, v in sizes.items())]
    launch(recipe, *argv, "train.steps=2", ds="zero3")
    output = launch(recipe, *argv, ds="zero3")
    assert "LoRA adapters of rank 4" in output
    whole = tmp_path / "whole"
    launch(recipe, f"run_dir={whole}", *argv[1:], ds="zero3")
    assert losses(run) == losses(whole)  # dropout too is a function of the step
    for name in ("0000.png", "0001.png", "0002.png", "grid.png"):
        assert (run / "samples/step-00000004" / name).read_bytes() == (
            whole / "samples/step-00000004" / name
        ).read_bytes()
    saved = sum(p.stat().st_size for p in (run / "checkpoints/step-00000004").glob("rank-*"))
    base = (tmp / "model/transformer/diffusion_pytorch_model.safetensors").stat().st_size
    assert saved < base / 2
    pipe = QwenImagePipeline.from_pretrained(tmp / "model")
    pipe.load_lora_weights(run / "export")
    prompt = {"negative_prompt": "", "height": 32, "width": 48, "num_inference_steps": 2, "true_cfg_scale": 2.0}
    assert pipe("a red cat", **prompt).images[0].size == (48, 32)
    averaged = load_file(run / "export/pytorch_lora_weights.safetensors")
    kinds = State(run / "checkpoints/step-00000004")
    name = next(n for n in kinds.shapes if n.endswith("lora_B.weight"))
    assert not torch.equal(kinds.read("ema", name), kinds.read("weight", name))
    torch.testing.assert_close(
        averaged[f"transformer.{name}"].float().view(-1), kinds.read("ema", name), rtol=0, atol=0
    )


def test_another_lora_is_not_continued(straight, tmp_path):
    _, recipe, _ = straight
    run = tmp_path / "run"
    launch(recipe, f"run_dir={run}", "lora.rank=4", "train.steps=1", ranks=1, ds="zero2")
    output = launch(recipe, f"run_dir={run}", "lora.rank=2", ranks=1, ds="zero2", code=2)
    assert "cannot be continued" in output
    assert "Change it back" in output


def test_torchrun_trains_the_same_bits(straight, tmp_path):
    tmp, recipe, _ = straight
    run = tmp_path / "run"
    launch(recipe, f"run_dir={run}", launcher="torchrun")
    assert losses(run) == losses(tmp / "run")


def test_diffusers_loads_the_export(straight):
    tmp, _, _ = straight
    pipe = QwenImagePipeline.from_pretrained(tmp / "run/export")
    before = load_file(tmp / "model/transformer/diffusion_pytorch_model.safetensors")
    after = pipe.transformer.state_dict()
    assert after.keys() == before.keys()
    moved = sum(not torch.equal(after[k].float(), before[k].float()) for k in before)
    assert moved > 0.8 * len(before)
    image = pipe("a red cat", negative_prompt="", height=32, width=48, num_inference_steps=2, true_cfg_scale=2.0)
    assert image.images[0].size == (48, 32)


def test_recipe_and_ds_config_are_beside_the_results(straight):
    tmp, _, _ = straight
    assert json.loads((tmp / "run/recipe.json").read_text())["seed"] == 5
    assert json.loads((tmp / "run/ds_config.json").read_text())["zero_optimization"]["stage"] == 3


def test_bf16_trains(straight, tmp_path):
    _, recipe, _ = straight
    ds = tmp_path / "bf16.json"
    ds.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 3}}))
    run = tmp_path / "run"
    launch(recipe, f"run_dir={run}", "train.steps=2", ranks=1, ds=str(ds))
    weights = load_file(run / "export/transformer/diffusion_pytorch_model.safetensors")
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert metrics(run)[0]["loss"] > 0

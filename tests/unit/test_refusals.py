"""Bad input: one clear sentence, exit code 2, before anything is built."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from small_runs import ROOT, prepare_run

from dstrain.engine import distributed

spec = importlib.util.spec_from_file_location("train_entry", ROOT / "launch/train.py")
train = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("good")
    prepare_run(tmp)
    return tmp


@pytest.fixture
def refuse(good, caplog, monkeypatch):
    """Returns a function that runs the command and gives its one error line."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def no_start():
        raise AssertionError("the process group was started: the check came too late")

    monkeypatch.setattr(distributed, "start", no_start)

    def run(*overrides: str, ds: object = None, recipe: Path | None = None) -> str:
        ds_path = ROOT / "ds_configs/zero3_offload.json" if ds is None else ds
        config = str(recipe or good / "recipe.yaml")
        caplog.clear()
        assert train.main(["--ds_config", str(ds_path), "--config", config, *overrides]) == 2
        errors = [r.getMessage() for r in caplog.records if r.levelname == "ERROR"]
        assert len(errors) == 1
        assert errors[0].startswith("dstrain: error: ")
        return errors[0]

    return run


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.stepz=3", ["train.stepz", "did you mean 'steps'"]),
        ("trian.steps=3", ["trian", "did you mean 'train'"]),
        ("optimizer.lr=fast", ["optimizer.lr", "a number", "'fast'"]),
        ("optimizer.lr=-1", ["optimizer.lr", "at least 0"]),
        ("optimizer.lr=.nan", ["optimizer.lr"]),
        ("train.steps=0", ["train.steps", "between 1 and"]),
        ("train.steps=2.5", ["train.steps", "whole number"]),
        ("model.gelu=tan", ["model.gelu", "did you mean 'tanh'"]),
        ("model.family=qwen_imag", ["qwen_imag", "did you mean 'qwen_image'"]),
        ("objective.name=flow", ["objective", "flow_match"]),
        ("model.init=yes", ["model.init", "'pretrained'"]),
        ("optimizer.betas=[0.9]", ["optimizer.betas"]),
        ("optimizer.warmup_steps=99", ["warmup_steps", "99", "4"]),
        ("train.steps", ["section.key=value"]),
        ("optimizer.betas=[0.9, .nan]", ["optimizer.betas", "finite"]),
        ("optimizer.lr=.inf", ["optimizer.lr", "finite"]),
        ("objective.terminal=0", ["objective.terminal"]),
        ("seed=99999999999999999999", ["seed", "between"]),
        ("data.shards=[]", ["data.shards", "data.sources"]),
        ("data.shards=*.tar", ["quote"]),
        ("batch.global_batch_size=25", ["24", "25"]),
        ("batch.tokens_per_pack=17", ["tokens_per_pack"]),
        ("data.shards=[nowhere/*.tar]", ["nowhere/*.tar"]),
        ("model.path=nowhere", ["nowhere"]),
        ("model.components={vea: x}", ["vea", "did you mean 'vae'"]),
    ],
)
def test_recipe(refuse, override, says):
    error = refuse(override)
    assert all(s in error for s in says), error


def test_recipe_file(refuse, good, tmp_path):
    assert "no such recipe, did you mean 'recipe.yaml'" in refuse(recipe=good / "recepe.yaml")
    path = tmp_path / "r.yaml"
    path.write_text("model: [1, 2\n")
    assert "not a readable YAML" in refuse(recipe=path)
    path.write_text("just text")
    assert "mapping" in refuse(recipe=path)
    path.write_text("train: {steps: 3}\ntrain: {steps: 9}\n")
    assert "'train' stands twice" in refuse(recipe=path)
    assert "this is none" in refuse(recipe=Path("/dev/zero"))
    tree = yaml.safe_load((good / "recipe.yaml").read_text())
    del tree["train"]["steps"]
    path.write_text(yaml.safe_dump(tree))
    assert "train.steps must be given" in refuse(recipe=path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"bf16": {"enabled": true},}', ["not JSON", "line 1"]),
        ("[]", ["JSON object"]),
        ('{"gradient_cliping": 1.0}', ["gradient_cliping", "did you mean 'gradient_clipping'"]),
        ('{"gradient_clipping": -1}', ["gradient_clipping", "-1"]),
        ('{"gradient_clipping": 1, "gradient_clipping": 2}', ["twice"]),
        ('{"fp16": {"enabled": true}}', ["fp16", "bf16"]),
        ('{"zero_optimization": {"stage": "3"}}', ["stage", "'3'"]),
        ('{"zero_optimization": {"stage": 4}}', ["stage", "4"]),
        ('{"zero_optimization": 3}', ["zero_optimization", "object"]),
        ('{"zero_optimization": {"stage": 3, "stage3_prefech_bucket_size": 1}}', ["stage3_prefetch_bucket_size"]),
        (
            '{"zero_optimization": {"stage": 3, "offload_param": {"devise": "cpu"}}}',
            ["devise", "did you mean 'device'"],
        ),
        ('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}', ["offload_param", "stage 3"]),
        ('{"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}', ["offload_optimizer"]),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "gpu"}}}', ["device", "'gpu'"]),
        ('{"train_batch_size": 16}', ["train_batch_size 16", "global_batch_size 8"]),
        ('{"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 2}', ["3", "2", "global_batch_size 8"]),
        (
            '{"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}',
            ["optimizer.params.lr = 0.5", "optimizer.lr = 0.001"],
        ),
        ('{"optimizer": {"type": "OneBitAdam"}}', ["optimizer.type", "supported: AdamW, Adam, Muon"]),
        (
            '{"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_type": "linear", "total_num_steps": 9}}}',
            ["scheduler.type 'WarmupCosineLR'", "optimizer.schedule = 'constant'"],
        ),
        ('{"scheduler": {"type": "WarmupLR"}}', ["warmup_type", "'log'", "'linear'"]),
        ('{"bf16": {"enabled": "yes"}}', ["bf16.enabled"]),
        ('{"bf16": {"enabeld": true}}', ["bf16.enabeld", "did you mean 'enabled'"]),
        ('{"data_types": {"grad_accum_dtyp": "fp32"}}', ["did you mean 'grad_accum_dtype'"]),
        ('{"zero_optimization": {"stage": 3, "offload_param": "cpu"}}', ["offload_param", '"device": "cpu"']),
        ('{"zero_optimization": {"stage": 3, "sub_group_size": "many"}}', ["sub_group_size", "'many'"]),
        ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}', ["nvme_path"]),
        ('{"gradient_allreduce_op": "sum"}', ["gradient_allreduce_op", "not supported"]),
        ('{"elasticity": {"enabled": true}}', ["elasticity", "not supported"]),
        ('{"train_micro_batch_size_per_gpu": 0}', ["train_micro_batch_size_per_gpu", "0"]),
        ('{"gradient_accumulation_steps": 3}', ["gradient_accumulation_steps 3", "global_batch_size 8"]),
        ("[" * 100_000, ["not readable"]),
        ('{"gradient_clipping": NaN}', ["not JSON", "NaN"]),
        ('{"gradient_clipping": 1e999}', ["gradient_clipping", "inf"]),
        ('{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 2}}}', ["ratio", "2"]),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}}', ["Twin-Flow"]),
        ('{"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}', ["does not divide the 1 ranks"]),
        ('{"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 8}}', ["zero_hpz_partition_size", "stage 3"]),
        (
            '{"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/nowhere"}}}',
            ["nvme_path", "'/nowhere'"],
        ),
        ('{"offload_param": {"device": "cpu"}}', ["belongs at zero_optimization.offload_param"]),
        ('{"bf16": {"enabled": "true"}}', ["bf16.enabled", "'true'"]),
        ('{"aio": {"queue_dept": 8}}', ["aio.queue_dept", "did you mean 'queue_depth'"]),
        ('{"compile": {"deepcompil": true}}', ["compile.deepcompil", "did you mean 'deepcompile'"]),
    ],
)
def test_ds_config(refuse, tmp_path, text, says):
    path = tmp_path / "ds.json"
    path.write_text(text)
    error = refuse(ds=path)
    assert str(path) in error
    assert all(s in error for s in says), error


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can")
def test_what_only_a_gpu_can(refuse, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 3, "zero_quantized_weights": true}}')
    assert "needs an NVIDIA GPU" in refuse(ds=path)


def test_missing_ds_config(refuse):
    assert "did you mean 'zero3.json'" in refuse(ds=ROOT / "ds_configs/zeroo3.json")


def test_shards(refuse, tmp_path):
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in refuse(f"data.shards=[{tmp_path / 'empty'}]")
    (tmp_path / "x.tar").write_bytes(b"not a tar at all" * 100)
    error = refuse(f"data.shards=[{tmp_path / 'x.tar'}]")
    assert "x.tar" in error
    assert "tar" in error


@pytest.fixture
def model(good, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(good / "model", folder)
    return folder


def test_model_folder_without_config(refuse, model):
    (model / "transformer/config.json").unlink()
    assert "transformer/config.json" in refuse(f"model.path={model}")
    (model / "model_index.json").unlink()
    assert "model_index.json" in refuse(f"model.path={model}")


def test_misfitting_tensors_are_a_table(refuse, model):
    file = model / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["img_in.weight"] = tensors["img_in.weight"][:, :32].contiguous()
    tensors["extra.weight"] = tensors.pop("proj_out.bias")
    save_file(tensors, file)
    error = refuse(f"model.path={model}")
    for said in ("missing     proj_out.bias", "unexpected  extra.weight", "misshapen   img_in.weight"):
        assert said in error


def test_truncated_weights(refuse, model):
    file = model / "transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "cut short" in refuse(f"model.path={model}")
    file.unlink()
    assert "model.init: random" in refuse(f"model.path={model}")


def test_index_that_leaves_the_folder(refuse, model):
    index = {"weight_map": {"img_in.weight": "../vae/diffusion_pytorch_model.safetensors"}}
    (model / "transformer/x.safetensors.index.json").write_text(json.dumps(index))
    assert "not a file of this folder" in refuse(f"model.path={model}")


@pytest.mark.parametrize(
    ("part", "key", "says"),
    [("text_encoder", "hidden_size", "joint_attention_dim 32"), ("vae", "z_dim", "in_channels 64")],
)
def test_parts_of_different_models(refuse, model, part, key, says):
    path = model / part / "config.json"
    config = json.loads(path.read_text())
    config.get("text_config", config)[key] = 20
    path.write_text(json.dumps(config))
    assert says in refuse(f"model.path={model}")


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("vae", {"latents_std": [0.0] * 16}, "latents_std"),
        ("vae", {"latents_mean": [0.0]}, "latents_mean"),
        ("vae", {"base_dim": 8}, "misshapen"),
        ("transformer", {"num_layers": 10**9}, "num_layers"),
        ("transformer", {"axes_dims_rope": "wide"}, "axes_dims_rope"),
    ],
)
def test_broken_configs(refuse, model, part, change, says):
    path = model / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert says in refuse(f"model.path={model}")


def test_a_checkpoint_that_is_none(refuse, tmp_path):
    assert "not a checkpoint" in refuse("--resume", str(tmp_path))


def test_broken_tokenizer(refuse, model):
    (model / "tokenizer/tokenizer.json").write_text("{")
    assert "tokenizer" in refuse(f"model.path={model}")


def test_model_of_another_family(refuse, model):
    path = model / "model_index.json"
    index = json.loads(path.read_text()) | {"_class_name": "FluxPipeline"}
    path.write_text(json.dumps(index))
    assert "FluxPipeline" in refuse(f"model.path={model}")


def test_run_dir_that_cannot_be_written(refuse, tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("x")
    assert "cannot be written" in refuse(f"run_dir={blocker}/run")
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "ro").mkdir(mode=0o500)
        assert "cannot be written" in refuse(f"run_dir={tmp_path}/ro/run")


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit) as done:
        train.main(["--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    for key in ("model.path = required", "optimizer.lr = 1e-05", "objective.density = uniform_grid", "data.shards"):
        assert key in text

"""Export: what leaves a checkpoint is loaded by diffusers and computes what was trained."""

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from diffusers import QwenImagePipeline, QwenImageTransformer2DModel
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model_folder, tiny_transformer
from torch import Tensor

from dstrain.commands import export as command
from dstrain.engine.export import open_checkpoint
from dstrain.errors import CheckpointError, ConfigError, DstrainError
from dstrain.models.init import initial_slice
from dstrain.models.lora_files import FILES, read_lora
from dstrain.models.qwen_image import QwenImageDiT, QwenImageParams

ROOT = Path(__file__).parents[2]
Tensors = Mapping[str, Tensor]
LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.img_mlp.net.2", "transformer_blocks.0.img_mod.1")
FAMILY = {
    "rank": 0, "alpha": 0.0, "dropout": 0.0, "rslora": False, "dora": False, "init": "kaiming", "targets": [],
    "base": "bf16", "path": "",
}  # fmt: skip


def write_checkpoint(
    folder: Path,
    kinds: Mapping[str, Tensors],
    model: Path,
    *,
    world: int = 2,
    init: str = "pretrained",
    lora: Mapping[str, object] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A checkpoint as ZeRO-3 leaves it: a slice of every parameter on each rank."""
    folder.mkdir(parents=True)
    files = {}
    for rank in range(world):
        tensors, slices = {}, {}
        for kind, values in kinds.items():
            for name, tensor in values.items():
                size = -(-tensor.numel() // world)
                start = min(rank * size, tensor.numel())
                tensors[f"{kind}:{name}"] = tensor.float().flatten()[start : start + size].clone()
                slices[name] = [start, list(tensor.shape)]
        path = folder / f"rank-{rank:05d}.safetensors"
        save_file(tensors, path, metadata={"slices": json.dumps(slices), "optimizer_step": "3"})
        files[path.name] = [path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()]
    recipe = {"model": {"path": str(model), "init": init}, "lora": FAMILY | dict(lora or {}), "seed": 5}
    manifest = {"format": 2, "step": 3, "files": files, "recipe": recipe, "dtype": str(dtype)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def dstrain_export(*arguments: object) -> None:
    """Run the command in this process."""
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([*map(str, arguments)]))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def base(model: Path) -> dict[str, Tensor]:
    return load_file(next((model / "transformer").glob("*.safetensors")))


@pytest.fixture(scope="module")
def trained(base: Tensors) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(t.shape, generator=generator) / 8 for name, t in base.items()}


def adapters(base: Tensors, rank: int, dora: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    tensors = {}
    for layer in LAYERS:
        out, wide = base[f"{layer}.weight"].shape
        tensors[f"{layer}.lora_A.weight"] = torch.randn(rank, wide, generator=generator) / 4
        tensors[f"{layer}.lora_B.weight"] = torch.randn(out, rank, generator=generator) / 4
        if dora:
            tensors[f"{layer}.lora_magnitude_vector"] = 1 + torch.rand(out, generator=generator)
    return tensors


def merged_by_hand(base: Tensors, lora: Tensors, strength: float) -> dict[str, Tensor]:
    result = dict(base)
    for layer in LAYERS:
        a, b = lora[f"{layer}.lora_A.weight"].double(), lora[f"{layer}.lora_B.weight"].double()
        weight = base[f"{layer}.weight"].double() + strength * b @ a
        if f"{layer}.lora_magnitude_vector" in lora:
            lengths = weight.pow(2).sum(1).sqrt()
            weight *= (lora[f"{layer}.lora_magnitude_vector"].double() / lengths)[:, None]
        result[f"{layer}.weight"] = weight.float()
    return result


@torch.no_grad()
def forward(transformer: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return transformer(
        hidden_states=torch.randn(1, 12, 64, generator=generator),
        encoder_hidden_states=torch.randn(1, 5, 32, generator=generator),
        encoder_hidden_states_mask=torch.ones(1, 5, dtype=torch.bool),
        timestep=torch.tensor([0.3]),
        img_shapes=[[(1, 3, 4)]],
        return_dict=False,
    )[0]


def with_weights(tensors: Tensors) -> QwenImageTransformer2DModel:
    transformer = tiny_transformer()
    transformer.load_state_dict(tensors)
    return transformer.eval()


def loaded(folder: Path) -> dict[str, Tensor]:
    """What diffusers finds in a model folder."""
    transformer, report = QwenImageTransformer2DModel.from_pretrained(
        folder, subfolder="transformer", output_loading_info=True
    )
    assert not any(report.values()), report
    return {name: p.detach() for name, p in transformer.named_parameters()}


def assert_same(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_run_on_all_weights(tmp_path, model, trained, world):
    run = tmp_path / "run"
    averages = {name: t + 1 for name, t in trained.items()}
    kinds = {"weight": trained, "ema": averages, "exp_avg": averages}
    checkpoint = write_checkpoint(run / "checkpoints" / "step-00000003", kinds, model, world=world)
    dstrain_export(checkpoint)  # what a run with averages exports itself
    assert_same(loaded(run / "export-step-00000003"), averages)
    dstrain_export(checkpoint, "--weights", "ema", "--out", tmp_path / "ema")
    assert_same(loaded(tmp_path / "ema"), averages)
    dstrain_export(checkpoint, "--weights", "trained", "--out", tmp_path / "trained")
    assert_same(loaded(tmp_path / "trained"), trained)
    dstrain_export(checkpoint, "--weights", "trained", "--dtype", "bf16", "--out", tmp_path / "bf16")
    assert_same(loaded(tmp_path / "bf16"), {n: t.bfloat16().float() for n, t in trained.items()})
    file = next((tmp_path / "bf16" / "transformer").glob("*.safetensors"))
    assert {t.dtype for t in load_file(file).values()} == {torch.bfloat16}
    assert not list(tmp_path.rglob(".*.partial"))


def test_the_folder_is_a_pipeline_and_shares_the_frozen_weights(tmp_path, model, trained):
    checkpoint = write_checkpoint(tmp_path / "checkpoints" / "step-00000003", {"weight": trained}, model)
    dstrain_export(tmp_path, "--out", tmp_path / "out")
    pipeline = QwenImagePipeline.from_pretrained(tmp_path / "out")
    assert_same(dict(pipeline.transformer.named_parameters()), trained)
    vae = Path("vae") / "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "out" / vae).samefile(model / vae)
    assert not (tmp_path / "out/vae/config.json").samefile(model / "vae/config.json")
    assert checkpoint.is_dir()


def test_what_was_not_trained_comes_from_the_base(tmp_path, model, base, trained):
    part = {name: t for name, t in trained.items() if name.startswith("transformer_blocks.1.")}
    checkpoint = write_checkpoint(tmp_path / "c", {"weight": part}, model)
    dstrain_export(checkpoint, "--out", tmp_path / "out")
    assert_same(loaded(tmp_path / "out"), {**base, **part})


def test_what_was_not_trained_of_a_random_start_is_made_from_the_seed(tmp_path, model, base, trained):
    part = {name: t for name, t in trained.items() if not name.startswith("transformer_blocks.1.")}
    checkpoint = write_checkpoint(tmp_path / "c", {"weight": part}, model, init="random")
    dstrain_export(checkpoint, "--out", tmp_path / "out")
    params = QwenImageParams.from_config(json.loads((model / "transformer" / "config.json").read_text()))
    dit = QwenImageDiT(params)
    wanted = {n: part.get(n, initial_slice(dit, n, t.shape, 5, 0, t.numel()).view(t.shape)) for n, t in base.items()}
    assert_same(loaded(tmp_path / "out"), wanted)


def test_the_newest_complete_checkpoint_of_a_run(tmp_path, model, trained):
    for step in (2, 3):
        values = {name: t + step for name, t in trained.items()}
        write_checkpoint(tmp_path / "checkpoints" / f"step-{step:08d}", {"weight": values}, model)
    (tmp_path / "checkpoints" / "step-00000009").mkdir()  # without manifest
    for i, source in enumerate((tmp_path, tmp_path / "checkpoints")):
        dstrain_export(source, "--out", tmp_path / f"out{i}")
        assert_same(loaded(tmp_path / f"out{i}"), {name: t + 3 for name, t in trained.items()})


LORAS = {
    "plain": ({"rank": 3, "alpha": 6.0}, 2.0),
    "default alpha": ({"rank": 3}, 1.0),
    "rslora": ({"rank": 4, "alpha": 2.0, "rslora": True}, 1.0),
    "dora": ({"rank": 2, "alpha": 1.0, "dora": True}, 0.5),
    "rslora and dora": ({"rank": 2, "alpha": 3.0, "rslora": True, "dora": True}, 3 / math.sqrt(2)),
}


@pytest.mark.parametrize("kind", LORAS)
def test_a_run_on_lora(tmp_path, model, base, kind):
    settings, strength = LORAS[kind]
    lora = adapters(base, settings["rank"], settings.get("dora", False))
    checkpoint = write_checkpoint(tmp_path / "c", {"weight": lora}, model, lora=settings)
    dstrain_export(checkpoint, "--out", tmp_path / "lora")
    assert {p.name for p in (tmp_path / "lora").iterdir()} == {FILES["diffusers"], FILES["comfyui"]}
    wanted = forward(with_weights(merged_by_hand(base, lora, strength)))

    pipeline = QwenImagePipeline.from_pretrained(model)
    pipeline.load_lora_weights(tmp_path / "lora")
    unmerged = forward(pipeline.transformer)
    assert_close(unmerged, wanted)
    assert not torch.allclose(unmerged, forward(with_weights(base)), rtol=1e-2)

    dstrain_export(checkpoint, "--merge", "--out", tmp_path / "merged")
    tensors = loaded(tmp_path / "merged")
    assert_close(forward(with_weights(tensors)), unmerged)
    untouched = [name for name in base if name.removesuffix(".weight") not in LAYERS]
    assert_same({n: tensors[n] for n in untouched}, {n: base[n] for n in untouched})


def test_lora_of_averaged_weights_in_all_forms_needs_no_base(tmp_path, model, base):
    lora = adapters(base, 3)
    kinds = {"weight": lora, "ema": {n: t * 2 for n, t in lora.items()}}
    checkpoint = write_checkpoint(tmp_path / "c", kinds, Path("gone"), lora={"rank": 3}, dtype=torch.bfloat16)
    dstrain_export(checkpoint, "--weights", "ema", "--format", "all", "--out", tmp_path / "lora")
    shapes = {name: t.shape for name, t in base.items()}
    for file in FILES.values():
        tensors, settings = read_lora(tmp_path / "lora" / file, shapes)
        assert_same(tensors, {n: (2 * t).bfloat16() for n, t in lora.items()})
        assert settings.rank == settings.alpha == 3
    sizes = [p.stat().st_size for p in (tmp_path / "lora").iterdir()]
    assert sum(sizes) < 3 * (2 * sum(t.numel() for t in lora.values()) + 4000)


def test_lora_files_become_each_other(tmp_path, model, base):
    lora = adapters(base, 3, dora=True)
    shapes = {name: t.shape for name, t in base.items()}
    checkpoint = write_checkpoint(tmp_path / "c", {"weight": lora}, model, lora={"rank": 3, "alpha": 1.5, "dora": True})
    dstrain_export(checkpoint, "--format", "diffusers", "--out", tmp_path / "a.safetensors")
    dstrain_export(
        tmp_path / "a.safetensors", "--format", "comfyui", "--out", tmp_path / "b.safetensors", "--model", model
    )
    assert set(load_file(tmp_path / "b.safetensors")) > {f"diffusion_model.{LAYERS[0]}.dora_scale"}
    dstrain_export(tmp_path / "b.safetensors", "--format", "peft", "--out", tmp_path / "peft", "--model", model)
    dstrain_export(tmp_path / "peft", "--format", "diffusers", "--out", tmp_path / "d.safetensors", "--model", model)
    assert (tmp_path / "d.safetensors").read_bytes() == (tmp_path / "a.safetensors").read_bytes()
    assert_same(read_lora(tmp_path / "d.safetensors", shapes)[0], lora)

    dstrain_export(tmp_path / "b.safetensors", "--merge", "--out", tmp_path / "merged", "--model", model)
    dstrain_export(checkpoint, "--merge", "--out", tmp_path / "merged too")
    assert_same(loaded(tmp_path / "merged"), loaded(tmp_path / "merged too"))


def cut(path: Path) -> None:
    with path.open("rb+") as f:
        f.truncate(path.stat().st_size - 1)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (cut, "rank-00001.safetensors is missing or has not"),
        (flip, "rank-00001.safetensors has another SHA-256"),
        (Path.unlink, "rank-00001.safetensors is missing"),
        (lambda path: (path.parent / "manifest.json").write_text("{"), "manifest.json: not a checkpoint"),
        (lambda path: (path.parent / "manifest.json").unlink(), "neither a checkpoint"),
    ],
)
def test_damage_is_named_before_anything_is_written(tmp_path, model, trained, harm, says):
    checkpoint = write_checkpoint(tmp_path / "c", {"weight": trained}, model)
    harm(checkpoint / "rank-00001.safetensors")
    with pytest.raises(CheckpointError, match=says):
        dstrain_export(checkpoint, "--out", tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"c"}


def refused(error: type[DstrainError], says: str, *arguments: object) -> None:
    with pytest.raises(error, match=says) as e:
        dstrain_export(*arguments)
    assert "\n" not in str(e.value)


def test_what_cannot_be_done_is_refused(tmp_path, model, base, trained):
    out = ("--out", tmp_path / "out")
    full = write_checkpoint(tmp_path / "full", {"weight": trained}, model)
    lora = write_checkpoint(tmp_path / "lora", {"weight": adapters(base, 2)}, model, lora={"rank": 2})
    dstrain_export(lora, "--format", "diffusers", "--out", tmp_path / "x.safetensors")
    before = set(tmp_path.iterdir())

    refused(CheckpointError, "no such file or folder", tmp_path / "none", *out)
    refused(CheckpointError, "neither a checkpoint .* nor a LoRA file", model, *out)
    refused(CheckpointError, "no averaged weights", full, "--weights", "ema", *out)
    refused(ConfigError, "--merge is for LoRA", full, "--merge", *out)
    refused(ConfigError, "--format is for LoRA", full, "--format", "comfyui", *out)
    refused(ConfigError, "give one of them", lora, "--merge", "--format", "comfyui", *out)
    refused(ConfigError, "is there already", full, "--out", tmp_path / "full")
    refused(ConfigError, "is one file: add --format", lora, "--out", tmp_path / "y.safetensors")
    refused(ConfigError, "is one file: add", lora, "--format", "peft", "--out", tmp_path / "y.safetensors")
    refused(ConfigError, "a whole model is a folder", full, "--out", tmp_path / "y.safetensors")
    refused(ConfigError, "a whole model is a folder", lora, "--merge", "--out", tmp_path / "y.safetensors")
    refused(ConfigError, "lies inside the model's", full, "--out", model / "vae" / "out")
    refused(ConfigError, "is a LoRA: give --model too", tmp_path / "x.safetensors", *out)
    refused(ConfigError, "is a LoRA: give --out too", tmp_path / "x.safetensors", "--model", model)
    refused(
        ConfigError,
        "--weights is for checkpoints",
        tmp_path / "x.safetensors",
        "--model",
        model,
        *out,
        "--weights",
        "ema",
    )
    assert set(tmp_path.iterdir()) == before
    assert not (model / "vae" / "out").exists()


def test_another_base_is_refused(tmp_path, model, base, trained):
    out = ("--out", tmp_path / "out")
    other = tmp_path / "other"
    for part in ("vae", "text_encoder", "tokenizer", "scheduler"):
        (other / part).parent.mkdir(exist_ok=True)
        (other / part).symlink_to(model / part)
    (other / "model_index.json").symlink_to(model / "model_index.json")
    tiny_transformer(num_attention_heads=1).save_pretrained(other / "transformer")
    full = write_checkpoint(tmp_path / "full", {"weight": trained}, tmp_path / "gone")
    lora = write_checkpoint(tmp_path / "lora", {"weight": adapters(base, 2)}, model, lora={"rank": 2})
    dstrain_export(lora, "--format", "diffusers", "--out", tmp_path / "x.safetensors")
    before = set(tmp_path.iterdir())

    refused(CheckpointError, "gone.*if the model has moved, say where it is: --model", full, *out)
    refused(CheckpointError, "has shape .* in .*; give the model that was trained", full, "--model", other, *out)
    refused(CheckpointError, "adapter was trained on", lora, "--merge", "--model", other, *out)
    refused(CheckpointError, "another model or size", tmp_path / "x.safetensors", "--model", other, *out)
    (other / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (other / "transformer" / "config.json").write_bytes((model / "transformer" / "config.json").read_bytes())
    refused(CheckpointError, r"no \*\.safetensors file", lora, "--merge", "--model", other, *out)
    assert set(tmp_path.iterdir()) == before
    dstrain_export(full, "--model", model, *out)
    assert_same(loaded(tmp_path / "out"), trained)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.pop("recipe"),
        lambda m: m.pop("dtype"),
        lambda m: m["recipe"].pop("lora"),
        lambda m: m["recipe"]["lora"].update(rank="four"),
        lambda m: m["recipe"]["model"].update(unknown=3),
        lambda m: m.update(recipe=[1]),
        lambda m: m.update(dtype="torch.int8"),
    ],
)
def test_manifests_of_other_versions_are_refused(tmp_path, model, trained, change: Callable[[dict], object]):
    checkpoint = write_checkpoint(tmp_path / "c", {"weight": trained}, model)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    change(manifest)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="it is of another version"):
        open_checkpoint(checkpoint)


MEASURE = """
import sys
from pathlib import Path
from dstrain.engine.export import export, open_base, open_checkpoint
from dstrain.pipelines import PIPELINES

def kib(key):
    return int(next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith(key)).split()[1])

folder = Path(sys.argv[1])
for name in ("small", "small-lora", "large", "large-lora"):  # the small ones bring in the code
    checkpoint = open_checkpoint(folder / name)
    base = open_base(PIPELINES.get("qwen_image").from_pretrained(checkpoint.model.path, load=()))
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    before = kib("VmRSS:")
    export(checkpoint, folder / "out", lambda: base, merge=name.endswith("lora"))
    print(name, (kib("VmHWM:") - before) * 1024)
"""


def large_model(folder: Path, small: Path) -> dict[str, Tensor]:
    """Make a model of 113 million parameters in bf16; returns them in fp32."""
    folder.mkdir()
    for part in ("vae", "text_encoder", "tokenizer", "scheduler", "model_index.json"):
        (folder / part).symlink_to(small / part)
    config = json.loads((small / "transformer" / "config.json").read_text())
    config |= {"num_layers": 3, "num_attention_heads": 32}
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        dit = QwenImageDiT(QwenImageParams.from_config(config))
    tensors = {name: torch.full(p.shape, 0.5) for name, p in dit.named_parameters()}
    save_file({n: t.bfloat16() for n, t in tensors.items()}, folder / "transformer" / "model.safetensors")
    return tensors


def test_never_two_tensors_in_memory(tmp_path, model, base, trained):
    try:
        tensors = large_model(tmp_path / "model", model)
        lora = {"rank": 4}
        write_checkpoint(tmp_path / "small", {"weight": trained}, model, dtype=torch.bfloat16)
        write_checkpoint(tmp_path / "small-lora", {"weight": adapters(base, 4)}, model, lora=lora)
        write_checkpoint(tmp_path / "large", {"weight": tensors}, tmp_path / "model", dtype=torch.bfloat16)
        write_checkpoint(tmp_path / "large-lora", {"weight": adapters(tensors, 4)}, tmp_path / "model", lora=lora)
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, str(tmp_path)],
            capture_output=True,
            text=True,
            cwd=ROOT,
            check=True,
            env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is given back: held is what counts
        )
        size = (tmp_path / "large" / "rank-00000.safetensors").stat().st_size
    finally:
        for part in tmp_path.iterdir():
            shutil.rmtree(part)
    largest = 4 * max(t.numel() for t in tensors.values())
    assert 2 * size > 400e6 > 10 * largest
    grown = {k: int(v) for k, v in (line.split() for line in done.stdout.splitlines() if line.startswith("large"))}
    assert largest < grown["large"] < 2 * largest, grown
    assert largest < grown["large-lora"] < 2 * largest, grown

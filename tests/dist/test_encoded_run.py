"""A training without encoders, and one whose encoders wait in host memory, have the losses of the ordinary one."""

import io
import tarfile

import pytest
import torch
from launches import launch, losses
from safetensors.torch import load
from small_runs import prepare_run

from dstrain.cli import main

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Four steps on two ranks, on pictures."""
    tmp = tmp_path_factory.mktemp("pictures")
    recipe = prepare_run(tmp)
    return tmp, recipe, launch(recipe, "train.export=false")


@pytest.fixture(scope="module")
def encoded(pictures):
    tmp, recipe, _ = pictures
    assert main(["encode", "--config", str(recipe), "--out", str(tmp / "encoded"), "model.encoder_dtype=fp32"]) == 0
    return tmp / "encoded"


def test_encoded_shards_give_the_same_losses(pictures, encoded, tmp_path):
    tmp, recipe, said = pictures
    run = tmp_path / "run"
    output = launch(recipe, f"run_dir={run}", f"data.shards=[{encoded}]", "data.encoded_cache_mb=0")
    assert losses(run) == losses(tmp / "run")
    assert "none: the samples were encoded by QwenImagePipeline (vae " in output
    assert "GiB, on the device" in said


def test_offloaded_encoders_give_the_same_losses(pictures, tmp_path):
    tmp, recipe, _ = pictures
    run = tmp_path / "run"
    output = launch(recipe, f"run_dir={run}", "model.encoders=offload", "train.export=false", "train.steps=3")
    assert losses(run) == {step: loss for step, loss in losses(tmp / "run").items() if step < 3}
    assert "in host memory" in output


def test_a_damaged_encoded_sample_is_replaced_and_one_of_other_encoders_stops_all_ranks(pictures, encoded, tmp_path):
    _, recipe, _ = pictures
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in sorted(encoded.glob("*.tar")):
        with tarfile.open(path) as old, tarfile.open(folder / path.name, "w") as new:
            for number, member in enumerate(old):
                data = old.extractfile(member).read()
                if path.name == "shard-000001.tar" and number == 2:
                    data = data[:-4] + torch.tensor([torch.nan]).numpy().tobytes()
                new.addfile(member, io.BytesIO(data))
    arguments = [f"data.shards=[{folder}]", "train.export=false", "train.steps=3", "train.save_every=1000"]
    run = tmp_path / "run"
    output = launch(recipe, f"run_dir={run}", *arguments)  # three epochs of eight: each sample comes once
    assert "encoded_damaged" in (run / "bad_samples.jsonl").read_text()
    assert len(losses(run)) == 3
    assert "Traceback" not in output
    data = (folder / "shard-000002.tar").read_bytes()
    at = data.index(b"tokenizer ") + len("tokenizer ")
    swapped = bytes([data[at] ^ 1 if chr(data[at] ^ 1) in "0123456789abcdef" else ord("0")])
    (folder / "shard-000002.tar").write_bytes(data[:at] + swapped + data[at + 1 :])
    output = launch(recipe, f"run_dir={tmp_path / 'other'}", *arguments, code=2)
    assert "shard-000002.tar was encoded by QwenImagePipeline (vae " in output
    assert "Traceback" not in output


def test_what_is_stored_are_the_units_outputs(pictures, encoded):
    with tarfile.open(encoded / "shard-000000.tar") as tar:
        member = tar.next()
        tensors = load(tar.extractfile(member).read())
    assert member.name.endswith(".encoded.safetensors")
    assert {name: t.dtype for name, t in tensors.items()} == dict.fromkeys(
        ("latents", "prompt_embeds", "null_embeds"), torch.float32
    )

"""Pickles that run a command, in the place of every file that a run reads: none is run, and the file is named."""

import functools
import io
import json
import operator
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import alone, save
from safetensors.torch import save_file
from tiny_models import tiny_model_folder

from dstrain.data.media.encoded import probe_encoded
from dstrain.data.policy import read_quarantine
from dstrain.data.shards import index
from dstrain.engine import checkpoint
from dstrain.engine.state import State, file_name
from dstrain.errors import DstrainError
from dstrain.models.lora_files import open_lora
from dstrain.models.weights import Weights
from dstrain.pipelines.components import load_qwen_image_vae, load_qwen_text_encoder, load_tokenizer
from dstrain.storage import sha256
from dstrain.tracking.jsonl import JsonlTracker, read_metrics


class Calls:
    """Pickled, it is a call."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


class RunsWhenFilled:
    """Runs a command when its state is set."""

    def __setstate__(self, state: dict[str, str]) -> None:
        os.system(state["command"])

    def __getstate__(self) -> dict[str, str]:
        return {"command": self.command}


def filled(command: str) -> RunsWhenFilled:
    made = RunsWhenFilled()
    made.command = command  # type: ignore[attr-defined]
    return made


def of_torch(value: Any, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def of_numpy(value: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([value], dtype=object), allow_pickle=True)
    return buffer.getvalue()


PAYLOADS: dict[str, Callable[[str], bytes]] = {
    "os.system": lambda c: pickle.dumps(Calls(os.system, c)),
    "oldest protocol": lambda c: pickle.dumps(Calls(os.system, c), 0),
    "eval": lambda c: pickle.dumps(Calls(eval, f"__import__('os').system({c!r})")),
    "exec": lambda c: pickle.dumps(Calls(exec, f"import os; os.system({c!r})")),
    "subprocess": lambda c: pickle.dumps(Calls(subprocess.call, ["sh", "-c", c])),
    "getattr": lambda c: pickle.dumps(Calls(operator.call, Calls(getattr, Calls(__import__, "os"), "system"), c)),
    "partial": lambda c: pickle.dumps(Calls(operator.call, functools.partial(os.system, c))),
    "nested": lambda c: pickle.dumps(
        Calls(torch.storage._load_from_bytes, of_torch(Calls(os.system, c), zipped=False))
    ),
    "setstate": lambda c: pickle.dumps(filled(c)),
    "numpy objects": lambda c: of_numpy(Calls(os.system, c)),
    "torch zip": lambda c: of_torch({"weight": torch.zeros(2), "x": Calls(os.system, c)}),
    "torch legacy": lambda c: of_torch({"weight": torch.zeros(2), "x": Calls(os.system, c)}, zipped=False),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("base")
    alone(save, tmp / "run", 2)
    tiny_model_folder(tmp / "model")
    return tmp


@pytest.fixture(params=PAYLOADS)
def payload(request, tmp_path):
    """The bytes, which leave a file `canary` when they are loaded, and must not."""
    canary = tmp_path / "canary"
    yield PAYLOADS[request.param](f"touch {canary}")
    assert not canary.exists(), "it was run"


@pytest.mark.parametrize("name", PAYLOADS)
def test_each_is_a_real_one(tmp_path, name):
    data = PAYLOADS[name](f"touch {tmp_path / 'canary'}")
    if name == "numpy objects":
        np.load(io.BytesIO(data), allow_pickle=True)
    elif name.startswith("torch"):
        torch.load(io.BytesIO(data), weights_only=False)
    else:
        pickle.loads(data)
    assert (tmp_path / "canary").exists()


def refused(read: Callable[[], Any], file: Path | str = "") -> None:
    with pytest.raises(DstrainError) as error:
        read()
    assert str(file) in str(error.value)


def test_a_checkpoint(base, payload, tmp_path):
    shutil.copytree(base / "run", tmp_path / "run")
    path = tmp_path / "run/checkpoints" / checkpoint.name(2)
    file = path / file_name(0)
    file.write_bytes(payload)
    assert str(file) in alone(checkpoint.damage, path)
    manifest = json.loads((path / checkpoint.MANIFEST).read_text())
    manifest["files"][file.name] = [file.stat().st_size, sha256(file)]
    (path / checkpoint.MANIFEST).write_text(json.dumps(checkpoint.sealed(manifest)))
    assert alone(checkpoint.damage, path) == ""
    refused(lambda: State(path), file)
    (path / checkpoint.MANIFEST).write_bytes(payload)
    refused(lambda: checkpoint.read_manifest(path), path / checkpoint.MANIFEST)
    assert "not a checkpoint" in alone(checkpoint.damage, path)


def test_weights(payload, tmp_path):
    for name in ("model.safetensors", "diffusion_pytorch_model.safetensors", "x.safetensors.index.json"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(payload)
        refused(lambda folder=folder: Weights(folder), folder / name)
    for name in ("pytorch_model.bin", "model.pt", "model.ckpt", "model.pkl", "pytorch_model.bin.index.json"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(payload)
        refused(lambda folder=folder: Weights(folder), folder)
        save_file({"w": torch.ones(2)}, folder / "model.safetensors")
        assert Weights(folder).read("w").tolist() == [1, 1], "what lies beside is not looked at"


def test_a_lora(payload, tmp_path):
    shapes = {"a.weight": torch.Size([4, 4])}
    for name in ("lora.safetensors", "lora.bin", "lora.pt"):
        (tmp_path / name).write_bytes(payload)
        refused(lambda name=name: open_lora(tmp_path / name, shapes))
    for name in ("adapter_model.bin", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        folder = tmp_path / f"folder-{name}"
        folder.mkdir()
        (folder / name).write_bytes(payload)
        refused(lambda folder=folder: open_lora(folder, shapes))


def test_frozen_components(base, payload, tmp_path):
    for part, load in (("vae", load_qwen_image_vae), ("text_encoder", load_qwen_text_encoder)):
        for name in ("diffusion_pytorch_model.bin", "model.safetensors", "config.json"):
            folder = tmp_path / f"{part}-{name}"
            folder.mkdir()
            shutil.copy(base / "model" / part / "config.json", folder)
            (folder / name).write_bytes(payload)
            refused(lambda folder=folder, load=load: load(folder, torch.float32, torch.device("cpu")))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer(base, payload, tmp_path, name):
    shutil.copytree(base / "model/tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / name).write_bytes(payload)
    refused(lambda: load_tokenizer(tmp_path / "tokenizer", torch.float32, torch.device("cpu")))


def test_encoded_samples_and_indexes(payload, tmp_path):
    refused(lambda: probe_encoded(payload))
    (tmp_path / "index").write_bytes(payload)
    assert index.load(tmp_path / "index", tmp_path / "x.tar") is None, "it is made again"


def test_lists_of_the_run(payload, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(payload + b"\n")
    refused(lambda: read_metrics(tmp_path / "metrics.jsonl"), tmp_path / "metrics.jsonl")
    JsonlTracker(tmp_path / "metrics.jsonl", first_step=3).finish()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_bad_samples(payload, tmp_path):
    (tmp_path / "bad_samples.jsonl").write_bytes(payload + b"\n")
    assert read_quarantine(tmp_path / "bad_samples.jsonl") == {}

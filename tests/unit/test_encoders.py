"""The frozen encoders: what of them is loaded, where they lie between uses, what they take, and how they are told."""

import gc
import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model_folder
from transformers import Qwen2_5_VLForConditionalGeneration

from dstrain.errors import CheckpointError
from dstrain.pipelines import PIPELINES
from dstrain.pipelines.cache import EncodedCache
from dstrain.pipelines.offload import HostModule
from dstrain.pipelines.sampler import sample

Pipeline = PIPELINES.get("qwen_image")
PROMPTS = ["a red cat", "", "a cat " * 30, "blue " * 1500, "中文 {braces}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "model"))


def load(folder, **options):
    return Pipeline.from_pretrained(folder, **{"dtype": torch.float32, "seed": 1, "caption_dropout": 0.5, **options})


def batch(count=3, first=0):
    g = torch.Generator().manual_seed(first)
    sizes = [(16, 32), (48, 16), (32, 32)]
    return {
        "image": [torch.randint(0, 256, (3, *sizes[i % 3]), dtype=torch.uint8, generator=g) for i in range(count)],
        "prompt": PROMPTS[:count],
        "draw": list(range(first, first + count)),
    }


def same(got, want):
    assert got.keys() == want.keys()
    for name, values in want.items():
        for a, b in zip(got[name], values, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name


def rename(folder, forms):
    """Give the tensors of the text encoder the names that newer files have, or take some away."""
    path = folder / "text_encoder/model.safetensors"
    save_file({name: t for old, t in load_file(path).items() if (name := forms(old))}, path, {"format": "pt"})


def newer(name):
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


def without_tower(name):
    return "" if name.startswith(("visual.", "lm_head.")) else name


@pytest.mark.parametrize("forms", [str, newer, without_tower], ids=["published", "newer", "without_tower"])
def test_text_encoder_without_tower_and_head_gives_the_same_bits(folder, copy, forms, caplog):
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
    rename(copy, forms)
    pipeline = load(copy, load=("text_encoder", "tokenizer"))
    names = [name for name, _ in pipeline.text_encoder.named_parameters()]
    assert not [name for name in names if "visual" in name or "lm_head" in name]
    assert "UNEXPECTED" not in caplog.text
    for prompt, embeds in zip(PROMPTS, pipeline.embed_prompts(PROMPTS), strict=True):
        ids = pipeline.tokenizer(
            "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
            "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
            f"{prompt}<|im_end|>\n<|im_start|>assistant\n",
            max_length=34 + 1024,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        with torch.no_grad():
            want = whole.model(input_ids=ids, use_cache=False).last_hidden_state[0, 34:]
        assert torch.equal(embeds, want)


def test_bytes_are_those_of_what_is_loaded_and_nothing_is_loaded_for_them(folder):
    pipeline = load(folder, load=())
    for dtype in (torch.float32, torch.bfloat16):
        sizes = pipeline.encoder_bytes(dtype)
        loaded = load(folder, dtype=dtype, load=("vae", "text_encoder"))
        for name in ("vae", "text_encoder"):
            assert sizes[name] == sum(p.nbytes for p in getattr(loaded, name).parameters())
    assert set(sizes) == {"vae", "text_encoder"}
    saved = sum(t.nbytes for t in load_file(folder / "text_encoder/model.safetensors").values())
    assert pipeline.encoder_bytes(torch.float32)["text_encoder"] < saved
    assert not hasattr(pipeline, "vae")


@pytest.fixture
def moves(monkeypatch):
    """What goes to the device and back, in order; two of them are never there together."""
    log, there, names = [], set(), {}
    start, place = HostModule.__init__, HostModule.on_device

    def named(self, module, device):
        names[self] = type(module).__name__
        start(self, module, device)

    @contextmanager
    def told(self):
        outermost = names[self] not in there
        if outermost:
            log.append(f"+{names[self]}")
            there.add(names[self])
        assert len(there) == 1
        with place(self):
            yield
        if outermost:
            log.append(f"-{names[self]}")
            there.remove(names[self])

    monkeypatch.setattr(HostModule, "__init__", named)
    monkeypatch.setattr(HostModule, "on_device", told)
    return log


VAE, TEXT = "AutoencoderKLQwenImage", "TextModel"


def test_offloaded_encoders_come_one_at_a_time_and_give_the_same_bits(folder, moves):
    resident, offloaded = load(folder), load(folder, offload=True)
    same(offloaded.encode(batch()), resident.encode(batch()))
    assert moves == [f"+{VAE}", f"-{VAE}", f"+{TEXT}", f"-{TEXT}"]


def test_with_a_full_cache_nothing_moves(folder, moves):
    pipeline = load(folder, offload=True)
    cache = EncodedCache(pipeline, 1 << 30)
    first = cache.encode([0, 1, 2], batch())
    assert moves
    moves.clear()
    again = cache.encode([0, 1, 2], batch())
    same(again, first)
    assert moves == []


def test_sampling_obeys(folder, moves):
    options = {"height": 32, "width": 48, "num_steps": 2, "cfg_scale": 2.0, "seed": 3}
    want = sample(load(folder), ["a cat", "blue"], **options)
    got = sample(load(folder, offload=True), ["a cat", "blue"], **options)
    assert [image.tobytes() for image in got] == [image.tobytes() for image in want]
    assert moves == [f"+{TEXT}", f"-{TEXT}", *[f"+{VAE}", f"-{VAE}"] * 2]


def test_a_module_is_on_the_device_only_inside_and_comes_back_unchanged():
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.LayerNorm(5))
    module.register_buffer("table", torch.arange(3.0))
    want = {name: t.clone() for name, t in module.state_dict().items()}
    places = {name: t.data_ptr() for name, t in module.state_dict().items()}
    host = HostModule(module, torch.device("cpu"))
    with host.on_device():  # which is the same place here
        assert {name: t.data_ptr() for name, t in module.state_dict().items()} == places
    host._device = torch.float64  # a second dtype stands for a second device: both are what Tensor.to moves to
    with host.on_device():
        with host.on_device():
            pass
        assert {t.dtype for t in module.state_dict().values()} == {torch.float64}
    assert {t.dtype for t in module.state_dict().values()} == {torch.float32}
    with pytest.raises(RuntimeError, match="out of memory"), host.on_device():
        raise RuntimeError("out of memory")
    assert {name: t.data_ptr() for name, t in module.state_dict().items()} == places
    assert all(torch.equal(t, want[name]) for name, t in module.state_dict().items())


@pytest.mark.parametrize("code", [0, 2])
def test_for_a_gpu_all_weights_lie_in_one_block_of_locked_pages(code, monkeypatch, caplog):
    locked, unlocked = [], []
    runtime = SimpleNamespace(
        cudaHostRegister=lambda start, size, flags: locked.append((start, size)) or code,
        cudaHostUnregister=unlocked.append,
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    module = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 7, bias=False).bfloat16())
    module.register_buffer("empty", torch.empty(0))
    want = {name: t.clone() for name, t in module.state_dict().items()}
    host = HostModule(module, torch.device("cuda"))
    ((start, size),) = locked
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, want[name])
        assert tensor.dtype == want[name].dtype
        assert start <= tensor.data_ptr() <= start + size - tensor.nbytes or not tensor.nbytes
    assert size <= sum(-(-t.nbytes // 64) * 64 for t in want.values())
    assert ("cannot be page-locked" in caplog.text) == (code != 0)
    del host, module, tensor
    gc.collect()
    assert unlocked == ([] if code else [start])


def test_only_encoders_are_offloaded(folder):
    pipeline = load(folder, offload=True)
    with pipeline.using("vae", "text_encoder", "tokenizer", "transformer"):
        pass
    assert set(pipeline._offloaded) == {"vae", "text_encoder"}


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def finetune(folder):
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    save_file({name: t + 1e-3 for name, t in load_file(path).items()}, path, {"format": "pt"})


def other_words(folder):
    path = folder / "tokenizer/tokenizer.json"
    path.write_text(path.read_text() + "\n")


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (finetune, {"vae"}),
        (lambda f: edit_json(f / "vae/config.json", latents_std=[2.0] * 16), {"vae"}),
        (lambda f: edit_json(f / "text_encoder/config.json", tie_word_embeddings=True), {"text_encoder"}),
        (other_words, {"tokenizer"}),
        (lambda f: edit_json(f / "text_encoder/config.json", transformers_version="9", dtype="x", _name="y"), set()),
        (lambda f: rename(f, without_tower), set()),
        (lambda f: edit_json(f / "scheduler/scheduler_config.json", shift=2.0), set()),
        (lambda f: edit_json(f / "transformer/config.json", zero_cond_t=False), set()),
    ],
)
def test_a_stamp_differs_where_tensors_would(folder, copy, change, differs):
    def parts(path):
        return dict(part.split() for part in pipeline_of(path).partition("(")[2].partition(")")[0].split(", "))

    def pipeline_of(path):
        return load(path, load=()).stamp(torch.float32)

    change(copy)
    before, after = parts(folder), parts(copy)
    assert before.keys() == {"vae", "text_encoder", "tokenizer"}
    assert {name for name in before if before[name] != after[name]} == differs


def test_a_stamp_names_family_and_dtype(folder):
    pipeline = load(folder, load=())
    assert pipeline.stamp(torch.float32).startswith("QwenImagePipeline (vae ")
    assert pipeline.stamp(torch.float32).replace("float32", "bfloat16") == pipeline.stamp(torch.bfloat16)


def test_a_folder_without_weights_is_refused_for_size_and_stamp(copy):
    (copy / "vae/diffusion_pytorch_model.safetensors").unlink()
    pipeline = load(copy, load=())
    for ask in (pipeline.encoder_bytes, pipeline.stamp):
        with pytest.raises(CheckpointError, match=r"vae: no \*\.safetensors"):
            ask(torch.float32)


def test_batches_of_encoded_samples_need_no_encoder_and_drop_prompts_the_same(folder):
    whole, bare = load(folder), load(folder, load=(), encoded=True)
    cache = EncodedCache(bare, 1 << 30)
    assert bare.graph.given == ("width", "height", "latents", "prompt_embeds", "null_embeds", "draw")
    dropped = set()
    for first in range(0, 30, 3):
        pictures = batch(first=first)
        full = whole.encode(pictures)
        columns = [{name: full[name][i] for name in (*bare.made, "width", "height")} for i in range(3)]
        given = bare.batch(columns, pictures["prompt"], pictures["draw"])
        for encoded in (bare.encode(given), cache.encode([0, 1, 2], given)):
            a, b = bare.pack(encoded), whole.pack(full)
            assert torch.equal(a.x0, b.x0)
            assert torch.equal(a.prompt_embeds, b.prompt_embeds)
            assert a.layout.image_shapes == b.layout.image_shapes
            dropped.add(len(encoded["condition_embeds"][0]))
        assert not bare.encoded_fault(columns[0])
    assert len(dropped) == 2  # with its prompt, and without
    assert cache._kept == {}  # there is nothing worth keeping


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"latents": None}, "it has no latents"),
        ({"latents": None, "null_embeds": None}, "it has no latents and no null_embeds"),
        ({"latents": torch.zeros(3, 64)}, r"latents are torch.float32 \[3, 64\], not fp32 \[2, 64\]"),
        ({"latents": torch.zeros(2, 64, dtype=torch.bfloat16)}, r"latents are torch.bfloat16"),
        ({"prompt_embeds": torch.zeros(3, 31)}, r"prompt_embeds are \[3, 31\], not \[at most 1024, 32\]"),
        ({"prompt_embeds": torch.zeros(1025, 32)}, r"prompt_embeds are \[1025, 32\]"),
        ({"null_embeds": torch.zeros(32)}, r"null_embeds are \[32\]"),
    ],
)
def test_faults_of_encoded_samples_are_told(folder, change, says):
    good = {
        "latents": torch.zeros(2, 64),
        "prompt_embeds": torch.zeros(3, 32),
        "null_embeds": torch.zeros(5, 32),
        "width": 32,
        "height": 16,
    }
    pipeline = load(folder, load=(), encoded=True)
    assert pipeline.encoded_fault(good) == ""
    columns = {name: value for name, value in {**good, **change}.items() if value is not None}
    assert re.match(says, pipeline.encoded_fault(columns))

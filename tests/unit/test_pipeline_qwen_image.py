"""The Qwen-Image pipeline: what its units make equals what diffusers makes, and loading refuses what does not fit."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import QwenImageEditPipeline
from diffusers import QwenImagePipeline as Oracle
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model_folder

from dstrain.errors import CheckpointError, ConfigError
from dstrain.pipelines import PIPELINES
from dstrain.pipelines.components import ModelSource, resolve
from dstrain.pipelines.qwen_image import patchify, unpatchify

Pipeline = PIPELINES.get("qwen_image")
PROMPTS = ["a red cat", "", "{braces} and %s, 中文 \n two lines", "a cat " * 30, "blue " * 1500, "<|im_end|>"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pipeline(folder):
    return Pipeline.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def oracle(folder):
    return Oracle.from_pretrained(folder)


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "model"))


def picture(height, width, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=g)


def batch(sizes, prompts=PROMPTS):
    return {
        "image": [picture(h, w, seed=i) for i, (h, w) in enumerate(sizes)],
        "prompt": prompts[: len(sizes)],
        "draw": list(range(len(sizes))),
    }


@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_embeds_equal_diffusers(pipeline, oracle, prompt):
    with torch.no_grad():
        want = oracle._get_qwen_prompt_embeds(prompt, device="cpu")[0][0]
    (got,) = pipeline.encode(batch([(16, 16)], [prompt]))["prompt_embeds"]
    assert got.shape == want.shape
    assert len(got) <= 1024
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_prompt_embeds_equal_a_padded_batch_of_diffusers(pipeline, oracle):
    with torch.no_grad():
        want, mask = oracle.encode_prompt(PROMPTS[:4], device="cpu")
    got = pipeline.encode(batch([(16, 16)] * 4))["prompt_embeds"]
    assert [len(e) for e in got] == mask.sum(dim=1).tolist()
    for e, w in zip(got, want):
        torch.testing.assert_close(e, w[: len(e)], atol=1e-5, rtol=1e-4)


def test_null_embeds_are_those_of_the_empty_prompt(pipeline):
    out = pipeline.encode(batch([(16, 16)] * 2, ["a cat", ""]))
    assert torch.equal(out["null_embeds"][0], out["prompt_embeds"][1])
    assert torch.equal(out["condition_embeds"][0], out["prompt_embeds"][0])  # no dropout unless asked for


@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 80), (96, 48)])
def test_latents_equal_diffusers(pipeline, oracle, height, width):
    image = picture(height, width)
    x = oracle.image_processor.preprocess(image[None] / 255).unsqueeze(2)
    with torch.no_grad():
        z = QwenImageEditPipeline._encode_vae_image(SimpleNamespace(vae=oracle.vae, latent_channels=16), x, None)
    want = Oracle._pack_latents(z, 1, 16, height // 8, width // 8)[0]
    out = pipeline.encode({"image": [image], "prompt": [""], "draw": [0]})
    assert out["image_shape"] == [(1, height // 16, width // 16)]
    assert want.std() > 0.1
    torch.testing.assert_close(out["latents"][0], want, atol=1e-5, rtol=1e-4)


def test_decode_equals_diffusers(pipeline, oracle):
    tokens = torch.randn(2 * 5, 64, generator=torch.Generator().manual_seed(1))
    z = Oracle._unpack_latents(tokens[None], 32, 80, 8)
    mean, std = (
        torch.tensor(s).view(1, 16, 1, 1, 1) for s in (oracle.vae.config.latents_mean, oracle.vae.config.latents_std)
    )
    with torch.no_grad():
        want = oracle.image_processor.postprocess(oracle.vae.decode(z * std + mean).sample[:, :, 0], output_type="pt")
        got = pipeline.decode(tokens, (1, 2, 5))
    torch.testing.assert_close(got, want[0], atol=1e-5, rtol=0)


def test_patchify_is_undone_by_unpatchify():
    z = torch.randn(16, 6, 10)
    tokens = patchify(z)
    assert tokens.shape == (15, 64)
    assert torch.equal(tokens[1 * 5 + 2].view(16, 2, 2), z[:, 2:4, 4:6])
    assert torch.equal(unpatchify(tokens, (1, 3, 5)), z)


def test_a_sample_does_not_depend_on_its_neighbours(pipeline):
    full = batch([(32, 48), (32, 48), (16, 64), (64, 16)])
    together = pipeline.encode(full)
    for i in range(4):
        alone = pipeline.encode({name: values[i : i + 1] for name, values in full.items()})
        assert torch.equal(alone["latents"][0], together["latents"][i])
        assert torch.equal(alone["prompt_embeds"][0], together["prompt_embeds"][i])


def test_pack_lays_samples_end_to_end_and_its_velocity_is_diffusers(pipeline, oracle):
    encoded = pipeline.encode(batch([(32, 48), (16, 16), (48, 32)]))
    pack = pipeline.pack(encoded)
    assert pack.layout.image_shapes == (((1, 2, 3),), ((1, 1, 1),), ((1, 3, 2),))
    assert pack.x0.dtype == torch.float32
    assert torch.equal(pack.x0, torch.cat(encoded["latents"]))
    sigmas = torch.tensor([0.9, 0.4, 0.1])
    with torch.no_grad():
        got = pipeline.velocity(pipeline.transformer, pack.x0, sigmas, pack)
        want = [
            oracle.transformer(x[None], e[None], None, s[None], [[shape]], return_dict=False)[0][0]
            for x, e, s, shape in zip(
                encoded["latents"], encoded["prompt_embeds"], sigmas, encoded["image_shape"], strict=True
            )
        ]
    torch.testing.assert_close(got, torch.cat(want), atol=1e-5, rtol=1e-4)


def test_encoding_records_no_gradients(folder):
    pipeline = Pipeline.from_pretrained(folder, dtype=torch.float32, load=("vae", "text_encoder", "tokenizer"))
    pipeline.vae.requires_grad_()
    pipeline.text_encoder.requires_grad_()
    pack = pipeline.pack(pipeline.encode(batch([(16, 16)])))
    assert not pack.x0.requires_grad
    assert not pack.prompt_embeds.requires_grad


def test_caption_dropout_reaches_the_pack(folder):
    pipeline = Pipeline.from_pretrained(
        folder, dtype=torch.float32, caption_dropout=0.5, seed=1, load=("vae", "text_encoder", "tokenizer")
    )
    pack = pipeline.pack(pipeline.encode(batch([(16, 16)] * 12, ["a red cat"] * 12)))
    cat, nothing = (len(e) for e in pipeline.embed_prompts(["a red cat", ""]))
    assert set(pack.layout.text_lens) == {cat, nothing}


def test_components_are_frozen_in_eval_mode_and_have_the_dtype(folder):
    pipeline = Pipeline.from_pretrained(folder, dtype=torch.bfloat16)
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        assert not module.training
        assert {(p.dtype, p.requires_grad) for p in module.parameters()} == {(torch.bfloat16, False)}
    pack = pipeline.pack(pipeline.encode(batch([(32, 48), (16, 16)])))
    v = pipeline.velocity(pipeline.transformer, pack.x0, torch.tensor([0.5, 0.9]), pack)
    assert (pack.x0.dtype, v.dtype) == (torch.float32, torch.float32)


def test_only_what_is_asked_for_is_loaded(folder):
    pipeline = Pipeline.from_pretrained(folder, load=("tokenizer",), gelu="sigmoid")
    assert not any(hasattr(pipeline, name) for name in ("transformer", "vae", "text_encoder", "scheduler"))
    transformer = pipeline.build_transformer()  # for an engine, which fills it from this folder
    assert pipeline.folder("transformer") == folder / "transformer"
    assert transformer.transformer_blocks[0].gelu == "sigmoid"
    assert all(p.requires_grad and not p.is_meta for p in transformer.parameters())


def other_vae(folder, tmp_path, scale):
    """A copy of the VAE whose latents_std is scaled, so that one can tell which was loaded."""
    target = shutil.copytree(folder / "vae", tmp_path / "elsewhere" / "vae")
    config = json.loads((target / "config.json").read_text())
    config["latents_std"] = [scale] * 16
    (target / "config.json").write_text(json.dumps(config))
    return tmp_path / "elsewhere"


@pytest.mark.parametrize(
    "form", ["{}", "{}/vae", "{}:vae", "{}:vae/", "{}:vae/*.safetensors", "{}:vae/diffusion*.safetensors"]
)
def test_a_component_can_come_from_elsewhere(folder, tmp_path, form):
    text = form.format(other_vae(folder, tmp_path, 3.0))
    pipeline = Pipeline.from_pretrained(folder, components={"vae": text}, load=("vae",))
    assert pipeline.latent_stats[1].unique().item() == 3.0
    alone = Pipeline.from_pretrained(None, components={"vae": ModelSource.parse(text)}, load=("vae",))
    assert alone.latent_stats[1].unique().item() == 3.0


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """A hub that has the repositories org/model and org/other, and counts what was asked for."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError
    from huggingface_hub.utils import filter_repo_objects

    repos = {"org/model": folder, "org/other": other_vae(folder, tmp_path, 5.0)}
    fetched = []

    def snapshot_download(repo_id, allow_patterns):
        if repo_id not in repos:
            raise LocalEntryNotFoundError("outgoing traffic has been disabled")
        files = [str(p.relative_to(repos[repo_id])) for p in repos[repo_id].rglob("*") if p.is_file()]
        for name in filter_repo_objects(files, allow_patterns=allow_patterns):
            target = tmp_path / "cache" / repo_id / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(repos[repo_id] / name, target)
            fetched.append(f"{repo_id}/{name}")
        return str(tmp_path / "cache" / repo_id)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fetched


def test_a_hub_id_is_fetched_component_by_component(hub):
    pipeline = Pipeline.from_pretrained("org/model", components={"vae": "org/other"}, load=("vae", "scheduler"))
    assert pipeline.latent_stats[1].unique().item() == 5.0
    assert pipeline.scheduler["max_shift"] == 0.9
    assert not [name for name in hub if name.endswith((".safetensors", ".txt")) and "/vae/" not in name]
    assert pipeline.folder("transformer").joinpath("config.json").is_file()
    assert "org/model/transformer/diffusion_pytorch_model.safetensors" in hub


def test_a_hub_pattern_fetches_its_files_and_the_config_beside_them(hub):
    Pipeline.from_pretrained(None, components={"vae": "org/other:vae/*.safetensors"}, load=("vae",))
    assert sorted(set(hub)) == ["org/other/vae/config.json", "org/other/vae/diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "org/none",
            r"org/none: no such folder, and the hub did not give it \(LocalEntry.*`hf download org/none --include",
        ),
        (
            "org/model:nothing/*.bin",
            r"org/model/nothing/\*\.bin: no such file; where there is network, run `hf download",
        ),
        ("no/such/folder", r"no/such/folder: no such folder, and not a hub id either"),
        ("/no/such/folder", r"no such folder, and not a hub id"),
        ("https://hub/org/name", r"no such folder, and not a hub id"),
    ],
)
def test_sources_that_cannot_be_had(hub, source, says):
    with pytest.raises(CheckpointError, match=says):
        resolve(ModelSource.parse(source))


def test_an_unreachable_hub_is_one_clear_error(monkeypatch, tmp_path):
    """The real client, offline, with an empty cache."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match=r"Qwen/Qwen-Image.*hf download Qwen/Qwen-Image --include"):
        Pipeline.from_pretrained("Qwen/Qwen-Image", load=())


@pytest.mark.parametrize(
    ("text", "parsed", "sub_folder", "globs"),
    [
        ("Qwen/Qwen-Image", ("Qwen/Qwen-Image", ""), "", ["*"]),
        ("org/name:vae/", ("org/name", "vae/"), "vae", ["vae/*"]),
        ("org/name:vae", ("org/name", "vae"), "vae", ["vae/*"]),
        (
            "org/name:transformer/diffusion_pytorch_model*.safetensors",
            ("org/name", "transformer/diffusion_pytorch_model*.safetensors"),
            "transformer",
            ["transformer/diffusion_pytorch_model*.safetensors", "transformer/*.json"],
        ),
        ("org/name:model.safetensors", ("org/name", "model.safetensors"), "", ["model.safetensors", "*.json"]),
        ("/models/a:b/c/*.bin", ("/models/a", "b/c/*.bin"), "b/c", ["b/c/*.bin", "b/c/*.json"]),
        ("org/name:/vae", ("org/name", "vae"), "vae", ["vae/*"]),
    ],
)
def test_sources_are_parsed(text, parsed, sub_folder, globs):
    source = ModelSource.parse(text)
    assert (source.path_or_id, source.pattern) == parsed
    assert (source.sub_folder, source.globs) == (sub_folder, globs)


def test_a_folder_with_a_colon_is_a_folder(tmp_path):
    (tmp_path / "a:b").mkdir()
    assert resolve(ModelSource.parse(str(tmp_path / "a:b"))) == tmp_path / "a:b"


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_text(folder, **changes):
    path = folder / "text_encoder/config.json"
    edit_json(path, text_config={**json.loads(path.read_text())["text_config"], **changes})


def shorten(path):
    path.write_bytes(path.read_bytes()[:-100])


def byte_tokenizer(folder):
    """A tokenizer that knows letters but no words."""
    path = folder / "tokenizer" / "tokenizer.json"
    state = json.loads(path.read_text())
    state["model"]["merges"] = []
    path.write_text(json.dumps(state))


def pickle_weights(folder):
    """Weights as a pickle, which could run code when it is read."""
    path = folder / "text_encoder/model.safetensors"
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()


def drop_tensor(folder):
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    del weights[next(n for n in weights if n.endswith("layers.1.mlp.up_proj.weight"))]
    save_file(weights, path, {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "model_index.json").unlink(), r"model_index\.json: no such file"),
        (lambda f: (f / "model_index.json").write_text("{"), r"model_index\.json: not a readable JSON file"),
        (
            lambda f: (f / "model_index.json").write_text("[1]"),
            r"model_index\.json: must hold a JSON object, not a list",
        ),
        (
            lambda f: edit_json(f / "model_index.json", _class_name="FluxPipeline"),
            r"'FluxPipeline', .*'QwenImagePipeline'",
        ),
        (lambda f: (f / "transformer/config.json").unlink(), r"transformer/config\.json: no such file"),
        (lambda f: (f / "vae/config.json").unlink(), r"vae/config\.json: no such file"),
        (lambda f: (f / "tokenizer/tokenizer_config.json").unlink(), r"tokenizer_config\.json: no such file"),
        (lambda f: (f / "scheduler/scheduler_config.json").unlink(), r"scheduler_config\.json: no such file"),
        (lambda f: shutil.rmtree(f / "text_encoder"), r"text_encoder.*no such file"),
        (lambda f: (f / "vae/diffusion_pytorch_model.safetensors").unlink(), r"vae: no \*\.safetensors"),
        (lambda f: (f / "text_encoder/model.safetensors").unlink(), r"text_encoder: not a loadable text encoder"),
        (lambda f: shorten(f / "text_encoder/model.safetensors"), r"text_encoder: not a loadable text encoder"),
        (lambda f: shorten(f / "vae/diffusion_pytorch_model.safetensors"), r"cut short"),
        (lambda f: edit_json(f / "vae/config.json", num_res_blocks=2), r"missing .*encoder\.down_blocks"),
        (lambda f: edit_json(f / "vae/config.json", base_dim="x"), r"vae/config\.json: not a usable config"),
        (lambda f: edit_json(f / "vae/config.json", latents_mean=[0.0]), r"latents_mean has 1 values for z_dim 16"),
        (lambda f: edit_json(f / "vae/config.json", _class_name="AutoencoderKL"), r"describes 'AutoencoderKL'"),
        (lambda f: (f / "text_encoder/config.json").write_text("{}"), r"text_encoder/config\.json: describes None"),
        (lambda f: edit_text(f, num_hidden_layers=3), r"not a loadable text encoder .*num_hidden_layers"),
        (lambda f: edit_text(f, intermediate_size=48), r"6 mismatched tensors in the text encoder: .*down_proj"),
        (lambda f: (f / "tokenizer/tokenizer.json").write_text("{"), r"tokenizer: not a loadable tokenizer"),
        (lambda f: edit_json(f / "transformer/config.json", num_layers=3), r"missing .*transformer_blocks\.2"),
        (lambda f: edit_json(f / "transformer/config.json", joint_attention_dim=40), r"misshapen .*txt_in"),
        (pickle_weights, r"text_encoder: not a loadable text encoder .*model\.safetensors"),
        (drop_tensor, r"1 missing tensors in the text encoder: .*layers\.1\.mlp\.up_proj"),
        (byte_tokenizer, r"tokenizer: splits .* into \d+ tokens, not 34"),
    ],
)
def test_damaged_folders_are_refused_by_name(copy, damage, says):
    damage(copy)
    with pytest.raises(CheckpointError, match=says):
        Pipeline.from_pretrained(copy, dtype=torch.float32)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"components": {"vea": "x"}}, r"no component 'vea' in QwenImagePipeline, did you mean 'vae'\?"),
        ({"load": ("text_encoders",)}, r"no component 'text_encoders'.*did you mean 'text_encoder'\?"),
    ],
)
def test_unknown_components_are_refused(folder, kwargs, says):
    with pytest.raises(ConfigError, match=says):
        Pipeline.from_pretrained(folder, **kwargs)


def test_a_component_without_any_source_is_refused(folder):
    with pytest.raises(CheckpointError, match="no source for 'tokenizer'"):
        Pipeline.from_pretrained(None, components={"vae": str(folder)}, load=("vae", "tokenizer"))


@pytest.mark.parametrize("size", [(24, 32), (32, 8), (0, 16), (-16, 16)])
def test_shapes_must_fit(pipeline, size):
    with pytest.raises(ConfigError, match="multiples of 16"):
        pipeline.shape_of(*size)

"""LoRA files: every form out and back to the bit, and read by those whose forms they are."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from peft import LoraConfig as PeftConfig
from peft import PeftModel, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import tiny_transformer

from dstrain.config import LoraConfig
from dstrain.errors import CheckpointError
from dstrain.models.lora_files import FILES, Lora, open_lora, read_lora, scale, write_lora

LAYERS = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_out.0", "transformer_blocks.1.img_mlp.net.2")
KINDS = {
    "plain": LoraConfig(rank=3, alpha=6.0),
    "alpha of the rank": LoraConfig(rank=5),
    "rslora": LoraConfig(rank=3, alpha=2.0, rslora=True),
    "dora": LoraConfig(rank=4, alpha=1.5, dora=True),
    "rslora and dora": LoraConfig(rank=2, alpha=3.0, rslora=True, dora=True),
}


@pytest.fixture(scope="module")
def model() -> QwenImageTransformer2DModel:
    torch.manual_seed(0)
    return tiny_transformer()


@pytest.fixture(scope="module")
def shapes(model: QwenImageTransformer2DModel) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters()}


def random_lora(shapes: dict[str, torch.Size], settings: LoraConfig, dtype: torch.dtype = torch.float32) -> Lora:
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in LAYERS:
        out, wide = shapes[f"{layer}.weight"]
        tensors[f"{layer}.lora_A.weight"] = (torch.randn(settings.rank, wide, generator=generator) / 4).to(dtype)
        tensors[f"{layer}.lora_B.weight"] = (torch.randn(out, settings.rank, generator=generator) / 4).to(dtype)
        if settings.dora:
            tensors[f"{layer}.lora_magnitude_vector"] = 1 + torch.rand(out, generator=generator).to(dtype)
    return of_tensors(tensors, settings)


def of_tensors(tensors: dict[str, torch.Tensor], settings: LoraConfig) -> Lora:
    return Lora(
        settings,
        {n: t.shape for n, t in tensors.items()},
        {n: t.dtype for n, t in tensors.items()},
        tensors.__getitem__,
    )


def by_hand(model: QwenImageTransformer2DModel, lora: Lora) -> QwenImageTransformer2DModel:
    """The model with the weights that the papers give."""
    merged = QwenImageTransformer2DModel.from_config(model.config)
    merged.load_state_dict(model.state_dict())
    s = lora.settings
    strength = (s.alpha or s.rank) / (math.sqrt(s.rank) if s.rslora else s.rank)
    with torch.no_grad():
        for layer in LAYERS:
            weight = merged.get_parameter(f"{layer}.weight")
            changed = weight.double() + strength * (
                lora.read(f"{layer}.lora_B.weight").double() @ lora.read(f"{layer}.lora_A.weight").double()
            )
            if s.dora:
                lengths = changed.pow(2).sum(1, keepdim=True).sqrt()
                changed = lora.read(f"{layer}.lora_magnitude_vector").double()[:, None] * changed / lengths
            weight.copy_(changed)
    return merged


@torch.no_grad()
def forward(model: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(1, 12, 64, generator=generator)
    embeds = torch.randn(1, 5, 32, generator=generator)
    return model(
        hidden_states=latents,
        encoder_hidden_states=embeds,
        encoder_hidden_states_mask=torch.ones(1, 5, dtype=torch.bool),
        timestep=torch.tensor([0.3]),
        img_shapes=[[(1, 3, 4)]],
        return_dict=False,
    )[0]


def copy_of(model: QwenImageTransformer2DModel) -> QwenImageTransformer2DModel:
    copy = QwenImageTransformer2DModel.from_config(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_out_and_back_is_exact(tmp_path, shapes, form, kind, dtype):
    lora = random_lora(shapes, KINDS[kind], dtype)
    write_lora(tmp_path, form, lora)
    for path in (tmp_path, tmp_path / FILES[form]):
        tensors, settings = read_lora(path, shapes)
        assert tensors.keys() == lora.shapes.keys()
        for name, tensor in tensors.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, lora.read(name)), name
        assert (settings.rank, settings.dora) == (lora.settings.rank, lora.settings.dora)
        assert scale(settings) == pytest.approx(scale(lora.settings), rel=1e-7)
        if form != "comfyui":
            assert (settings.alpha, settings.rslora) == (lora.settings.alpha or lora.settings.rank, "rslora" in kind)


def test_through_all_forms_and_back_is_exact(tmp_path, shapes):
    lora = first = random_lora(shapes, KINDS["rslora and dora"])
    for i, form in enumerate(["comfyui", "peft", "diffusers", "comfyui", "diffusers"]):
        (tmp_path / str(i)).mkdir()
        write_lora(tmp_path / str(i), form, lora)
        lora = open_lora(tmp_path / str(i), shapes)
    assert all(torch.equal(lora.read(name), first.read(name)) for name in first.shapes)
    assert scale(lora.settings) == pytest.approx(scale(first.settings), rel=1e-7)


def test_only_the_lora_is_in_the_files_and_the_dtype_is_as_asked(tmp_path, shapes):
    lora = random_lora(shapes, KINDS["dora"])
    numbers = sum(s.numel() for s in lora.shapes.values())
    for form, file in FILES.items():
        write_lora(tmp_path, form, lora, torch.bfloat16)
        tensors = load_file(tmp_path / file)
        alphas = len(LAYERS) if form == "comfyui" else 0
        assert sum(t.numel() for t in tensors.values()) == numbers + alphas
        for key, tensor in tensors.items():
            assert tensor.dtype == (torch.float32 if key.endswith(".alpha") else torch.bfloat16)
    assert open_lora(tmp_path, shapes).dtypes == dict.fromkeys(lora.shapes, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_loads_it(tmp_path, model, shapes, kind):
    lora = random_lora(shapes, KINDS[kind])
    write_lora(tmp_path, "diffusers", lora)
    theirs = copy_of(model)
    theirs.load_lora_adapter(tmp_path / FILES["diffusers"], use_safetensors=True)
    assert sum("lora_A" in n for n, _ in theirs.named_parameters()) == len(LAYERS)
    assert_close(forward(theirs), forward(by_hand(model, lora)))
    assert not torch.allclose(forward(theirs), forward(model), rtol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_diffusers_saves_is_read(tmp_path, model, shapes, kind):
    lora = random_lora(shapes, KINDS[kind])
    write_lora(tmp_path, "diffusers", lora)
    theirs = copy_of(model)
    theirs.load_lora_adapter(tmp_path / FILES["diffusers"], adapter_name="theirs", use_safetensors=True)
    theirs.save_lora_adapter(tmp_path / "saved", adapter_name="theirs")
    tensors, settings = read_lora(tmp_path / "saved", shapes)
    assert all(torch.equal(tensors[name], lora.read(name)) for name in lora.shapes)
    assert len(tensors) == len(lora.shapes)
    assert scale(settings) == scale(lora.settings)
    assert (settings.rslora, settings.dora) == (lora.settings.rslora, lora.settings.dora)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_it_and_what_it_saves_is_read(tmp_path, model, shapes, kind):
    lora = random_lora(shapes, KINDS[kind])
    write_lora(tmp_path, "peft", lora)
    wrapped = PeftModel.from_pretrained(copy_of(model), tmp_path)
    assert_close(forward(wrapped), forward(by_hand(model, lora)))
    wrapped.save_pretrained(tmp_path / "saved")
    tensors, settings = read_lora(tmp_path / "saved", shapes)
    assert all(torch.equal(tensors[name], lora.read(name)) for name in lora.shapes)
    assert scale(settings) == scale(lora.settings)

    config = PeftConfig(**json.loads((tmp_path / "adapter_config.json").read_text()))
    injected = inject_adapter_in_model(config, copy_of(model))
    plain = {k.removeprefix("base_model.model."): v for k, v in load_file(tmp_path / FILES["peft"]).items()}
    loaded = set_peft_model_state_dict(injected, plain)
    assert not loaded.unexpected_keys
    assert_close(forward(injected), forward(by_hand(model, lora)))


def comfyui_weight(file: dict[str, torch.Tensor], key: str, weight: torch.Tensor) -> torch.Tensor:
    """What ComfyUI makes of a weight, from its key map and LoRAAdapter.calculate_weight, norms as in LyCORIS."""
    up, down = file[f"{key}.lora_B.weight"], file[f"{key}.lora_A.weight"]
    changed = weight + file[f"{key}.alpha"].item() / down.shape[0] * (up @ down)
    if f"{key}.dora_scale" in file:
        changed = changed * (file[f"{key}.dora_scale"] / changed.norm(dim=1, keepdim=True))
    return changed


@pytest.mark.parametrize("kind", KINDS)
def test_comfyui_computes_the_same(tmp_path, model, shapes, kind):
    lora = random_lora(shapes, KINDS[kind])
    write_lora(tmp_path, "comfyui", lora)
    file = load_file(tmp_path / FILES["comfyui"])
    merged = by_hand(model, lora)
    for layer in LAYERS:
        weight = model.get_parameter(f"{layer}.weight").detach()
        theirs = comfyui_weight(file, f"diffusion_model.{layer}", weight)
        assert_close(theirs, merged.get_parameter(f"{layer}.weight").detach())
    with safe_open(tmp_path / FILES["comfyui"], "pt") as f:
        assert "lora_adapter_metadata" not in (f.metadata() or {})  # diffusers would apply the alpha twice


def test_diffusers_reads_our_comfyui_form(tmp_path, model, shapes):
    from diffusers.loaders import QwenImageLoraLoaderMixin

    lora = random_lora(shapes, KINDS["rslora"])
    write_lora(tmp_path, "comfyui", lora)
    state, metadata = QwenImageLoraLoaderMixin.lora_state_dict(tmp_path, return_lora_metadata=True)
    theirs = copy_of(model)
    theirs.load_lora_adapter(state, metadata=metadata)
    assert_close(forward(theirs), forward(by_hand(model, lora)))


def kohya(lora: Lora) -> dict[str, torch.Tensor]:
    """The same in the names of kohya's scripts."""
    file = {}
    for name in lora.shapes:
        layer, _, part = name.partition(".lora_")
        key = "lora_unet_" + layer.replace(".", "_")
        file[key + {"A.weight": ".lora_down.weight", "B.weight": ".lora_up.weight"}[part]] = lora.read(name)
        file[key + ".alpha"] = torch.tensor(lora.settings.alpha)
    return file


def spelt(lora: Lora, prefix: str, a: str, b: str) -> dict[str, torch.Tensor]:
    return {
        prefix + name.replace(".lora_A.weight", a).replace(".lora_B.weight", b): lora.read(name) for name in lora.shapes
    }


@pytest.mark.parametrize(
    ("make", "strength"),
    [
        (kohya, 2.0),
        (lambda lora: spelt(lora, "", ".lora_A.default.weight", ".lora_B.default.weight"), 1.0),
        (lambda lora: spelt(lora, "transformer.", ".lora_A.weight", ".lora_B.weight"), 1.0),
        (lambda lora: spelt(lora, "diffusion_model.", ".lora_down.weight", ".lora_up.weight"), 1.0),
        (lambda lora: spelt(lora, "transformer.", ".lora.down.weight", ".lora.up.weight"), 1.0),
    ],
)
def test_other_spellings_are_read(tmp_path, shapes, make, strength):
    lora = random_lora(shapes, KINDS["plain"])
    save_file(make(lora), tmp_path / "x.safetensors")
    tensors, settings = read_lora(tmp_path, shapes)
    assert tensors.keys() == lora.shapes.keys()
    assert all(torch.equal(tensors[name], lora.read(name)) for name in tensors)
    assert scale(settings) == strength


def without(end: str):
    return lambda tensors: {k: v for k, v in tensors.items() if not k.endswith(end)}


def changed(key: str, value: torch.Tensor):
    return lambda tensors: tensors | {key: value}


Q = f"diffusion_model.{LAYERS[0]}"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without("to_q.lora_B.weight"), "'transformer_blocks.0.attn.to_q' lacks its lora_B; the file is incomplete"),
        (without("to_q.lora_A.weight"), "lacks its lora_A"),
        (without("to_q.dora_scale"), "lacks its lora_magnitude_vector"),
        (changed(f"{Q}.alpha", torch.tensor([1.0, 2.0])), "must be a positive number"),
        (changed(f"{Q}.alpha", torch.tensor(math.nan)), "must be a positive number, not nan"),
        (changed(f"{Q}.alpha", torch.tensor(-1.0)), "must be a positive number, not -1"),
        (changed(f"{Q}.alpha", torch.tensor(7.0)), r"different alphas \(7.0 in .*to_q.*1.5 in "),
        (changed(f"{Q}.lora_A.weight", torch.zeros(4, 63)), r"shape \[4, 63\].*\[64, 64\].*another model or size"),
        (changed(f"{Q}.lora_A.weight", torch.zeros(0, 64)), "another model or size"),
        (changed(f"{Q}.lora_A.weight", torch.zeros(())), "another model or size"),
        (changed(f"{Q}.lora_B.weight", torch.zeros(64, 5)), "another model or size"),
        (changed(f"{Q}.lora_B.weight", torch.zeros(64, 4, 1, 1)), "another model or size"),
        (changed(f"{Q}.dora_scale", torch.zeros(1, 64)), "another model or size"),
        (changed(f"{Q}.lora_up.weight", torch.zeros(64, 4)), "is the second tensor for"),
        (changed(f"{Q}.lora_mid.weight", torch.zeros(4, 4)), "other kinds of adapters are not read"),
        (changed(f"{Q}.lokr_w1", torch.zeros(4, 4)), "other kinds of adapters are not read"),
        (
            changed("diffusion_model.transformer_blocks.0.attn.to_qq.lora_A.weight", torch.zeros(4, 64)),
            "no Linear layer of this model, did you mean 'transformer_blocks.0.attn.to_q'",
        ),
        (changed("diffusion_model.transformer_blocks.0.attn.norm_q.lora_A.weight", torch.zeros(4, 1)), "no Linear"),
        (changed("lora_te_text_model_0_q.lora_down.weight", torch.zeros(4, 64)), "no Linear layer of this model"),
        (lambda tensors: {}, "no LoRA in it"),
        (
            changed(f"{Q}.lora_A.weight", torch.ones(4, 64, dtype=torch.int32)),
            "lora_A.weight' is stored in .*int32",
        ),
        (changed(f"{Q}.dora_scale", torch.ones(64, 1, dtype=torch.int64)), "dora_scale' is stored in .*int64"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, shapes, change, says):
    write_lora(tmp_path, "comfyui", random_lora(shapes, KINDS["dora"]))
    tensors = load_file(tmp_path / FILES["comfyui"])
    save_file(change(tensors), tmp_path / FILES["comfyui"])
    with pytest.raises(CheckpointError, match=says) as e:
        open_lora(tmp_path, shapes)
    assert str(tmp_path / FILES["comfyui"]) in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_numbers_that_are_not_finite_are_refused_when_read(tmp_path, shapes, dtype, value):
    lora = random_lora(shapes, KINDS["plain"], dtype)
    lora.read(name := f"{LAYERS[1]}.lora_B.weight").view(-1)[-1:] = torch.tensor([value]).to(dtype)
    write_lora(tmp_path, "diffusers", lora)
    opened = open_lora(tmp_path, shapes)
    assert opened.read(f"{LAYERS[1]}.lora_A.weight").dtype == dtype
    with pytest.raises(CheckpointError, match=f"'{name}' has numbers that are not finite") as e:
        opened.read(name)
    assert str(tmp_path / FILES["diffusers"]) in str(e.value)


def test_fp8_is_read_and_its_nan_is_refused(tmp_path, shapes):
    lora = random_lora(shapes, KINDS["plain"], torch.float8_e4m3fn)
    write_lora(tmp_path, "diffusers", lora)
    tensors, _ = read_lora(tmp_path, shapes)
    assert all(torch.equal(tensors[name].float(), lora.read(name).float()) for name in lora.shapes)
    lora.read(name := f"{LAYERS[0]}.lora_A.weight").view(torch.uint8)[0, 0] = 0x7F
    write_lora(tmp_path, "diffusers", lora)
    with pytest.raises(CheckpointError, match=f"'{name}' has numbers that are not finite"):
        read_lora(tmp_path, shapes)


def test_different_ranks_are_refused(tmp_path, shapes):
    tensors = spelt(random_lora(shapes, KINDS["plain"]), "transformer.", ".lora_A.weight", ".lora_B.weight")
    key = f"transformer.{LAYERS[2]}"
    tensors[f"{key}.lora_A.weight"] = torch.zeros(7, 256)
    tensors[f"{key}.lora_B.weight"] = torch.zeros(64, 7)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"different ranks \(.*7 in transformer_blocks.1.img_mlp.net.2"):
        open_lora(tmp_path, shapes)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"r": 4}, "rank 4 does not fit the tensors, which have rank 3"),
        ({"use_dora": True}, "rank 3 with DoRA does not fit"),
        ({"lora_alpha": None}, "'lora_alpha' must be a positive number, not None"),
        ({"lora_alpha": 0}, "must be a positive number"),
        ({"lora_alpha": int("9" * 400)}, "must be a positive number, not 9999"),
        ({"alpha_pattern": {"to_q": 5}}, "different alphas"),
        ({"alpha_pattern": [5]}, "different alphas"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, shapes, change, says):
    write_lora(tmp_path, "peft", random_lora(shapes, KINDS["plain"]))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=says) as e:
        open_lora(tmp_path, shapes)
    assert str(tmp_path) in str(e.value)


@pytest.mark.parametrize("text", ["{", "[1, 2]", "3", "null"])
def test_unreadable_settings_are_refused(tmp_path, shapes, text):
    lora = random_lora(shapes, KINDS["plain"])
    write_lora(tmp_path, "peft", lora)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(CheckpointError, match="not the settings of a LoRA"):
        open_lora(tmp_path, shapes)
    keys = spelt(lora, "transformer.", ".lora_A.weight", ".lora_B.weight")
    save_file(keys, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": text})
    with pytest.raises(CheckpointError, match="not the settings of a LoRA"):
        open_lora(tmp_path / "x.safetensors", shapes)


def test_peft_file_without_its_settings_is_refused(tmp_path, shapes):
    write_lora(tmp_path, "peft", random_lora(shapes, KINDS["plain"]))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="says how strong this LoRA is, is not beside it"):
        open_lora(tmp_path, shapes)


def test_paths_that_name_no_lora(tmp_path, shapes):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_lora(tmp_path / "none", shapes)
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors"):
        open_lora(tmp_path, shapes)
    for name in ("a", "b"):
        save_file({"x": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors, b\.safetensors; name the file"):
        open_lora(tmp_path, shapes)
    pickled = Path(tmp_path / "c.pt")
    torch.save({"x": torch.zeros(1)}, pickled)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        open_lora(pickled, shapes)

"""The whole DiT with fused kernels against the same in plain PyTorch: results, gradients, and a training."""

import importlib.util
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from kernel_cases import DEVICES
from peft import LoraConfig as PeftConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import nn
from torch.nn.functional import mse_loss

from dstrain.config import LoraConfig
from dstrain.kernels import gelu, modulation, qk_norm_rope
from dstrain.kernels.backend import compiled
from dstrain.kernels.dual_stream import Rotary, gated_mlp_in, gated_mlp_out, modulated_qkv
from dstrain.kernels.linear import Linear
from dstrain.kernels.segments import Segments
from dstrain.models.lora import add_adapters, as_linear, target_layers
from dstrain.models.packing import PackLayout
from dstrain.models.qwen_image import QwenImageDiT, QwenImageParams

ROOT = Path(__file__).parents[2]
PARAMS = QwenImageParams(
    num_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=48, axes_dims_rope=(8, 12, 12)
)
PACKS = {
    "one sample": ([[(1, 3, 5)]], [4]),
    "one token each": ([[(1, 1, 1)]], [1]),
    "two small samples": ([[(1, 1, 2)], [(1, 2, 1)]], [1, 2]),
    "three samples": ([[(1, 3, 5)], [(1, 1, 1)], [(1, 2, 4), (1, 2, 2)]], [4, 7, 1]),
}


def model(device, dtype, seed=0, layers=2):
    torch.manual_seed(seed)
    dit = QwenImageDiT(replace(PARAMS, num_layers=layers))
    for p in dit.parameters():  # no gate or bias is zero, so no branch hides
        torch.nn.init.normal_(p, std=0.1)
    return dit.to(device, dtype)


def case(pack, device, dtype, seed=1):
    shapes, texts = PACKS[pack]
    layout = PackLayout.build(shapes, texts, device)
    g = torch.Generator().manual_seed(seed)
    latents = torch.randn(sum(layout.image_lens), 64, generator=g).to(device)
    embeds = torch.randn(sum(texts), 48, generator=g).to(device, dtype)
    target = torch.randn(len(latents), 64, generator=g).to(device)
    return latents, embeds, torch.rand(len(layout), generator=g).to(device), layout, target


def step(dit, kernel, latents, embeds, sigmas, layout, target):
    """Loss, and gradients of the embeddings and of all parameters by name."""
    dit.kernel = kernel
    dit.zero_grad()
    embeds = embeds.detach().requires_grad_()
    loss = mse_loss(dit(latents, embeds, sigmas, layout).float(), target)
    loss.backward()
    grads = {name: p.grad for name, p in dit.named_parameters() if name not in dit.unused and p.requires_grad}
    return loss.detach(), {"embeds": embeds.grad, **grads}


def gap(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12)).item()


@DEVICES
@pytest.mark.parametrize("pack", PACKS)
def test_loss_and_every_gradient(pack, device):
    dit, batch = model(device, torch.float32), case(pack, device, torch.float32)
    want_loss, want = step(dit, "reference", *batch)
    loss, grads = step(dit, "triton", *batch)
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
    assert grads.keys() == want.keys()
    far = {name: round(g, 8) for name in want if (g := gap(grads[name], want[name])) > 2e-5}
    assert not far


@DEVICES
def test_bf16_is_as_near_to_fp32_as_plain_pytorch_is(device):
    dit = model(device, torch.bfloat16)
    batch = case("three samples", device, torch.bfloat16)
    exact = deepcopy(dit).float()
    latents, embeds, *rest = batch
    _, want = step(exact, "reference", latents, embeds.float(), *rest)
    _, plain = step(dit, "reference", *batch)
    _, fused = step(dit, "triton", *batch)
    for name in want:
        assert gap(fused[name], want[name]) < 2 * gap(plain[name], want[name]) + 2e-2, name


@DEVICES
@pytest.mark.parametrize(
    ("pack", "layers"), [("two small samples", 1), pytest.param("three samples", 2, marks=pytest.mark.soak)]
)
def test_fifty_steps_of_training_agree(device, pack, layers):
    """To 2e-3 of the loss: AdamW makes whole steps of gradients that are nearly zero."""
    losses = {}
    for kernel in ("reference", "triton"):
        dit, batch = model(device, torch.float32, layers=layers), case(pack, device, torch.float32)
        optimizer = torch.optim.AdamW(dit.parameters(), lr=1e-3)
        losses[kernel] = []
        for _ in range(50):
            losses[kernel].append(step(dit, kernel, *batch)[0].item())
            optimizer.step()
    assert losses["triton"] == pytest.approx(losses["reference"], rel=2e-3)
    assert losses["triton"][-1] < 0.7 * losses["triton"][0]


@DEVICES
@pytest.mark.parametrize("activations", ["full", "attention", "offload"])
def test_recomputation_changes_no_bit(activations, device):
    dit, batch = model(device, torch.float32), case("two small samples", device, torch.float32)
    want_loss, want = step(dit, "triton", *batch)
    dit.activations = (activations,)
    loss, grads = step(dit, "triton", *batch)
    assert torch.equal(loss, want_loss)
    assert all(torch.equal(grads[name], want[name]) for name in want)


def test_the_model_goes_through_torch_compile_in_one_graph():
    dit, batch = model("cpu", torch.float32), case("one sample", "cpu", torch.float32)
    want_loss, want = step(dit, "triton", *batch)
    dit.compile(backend="aot_eager", fullgraph=True)
    loss, grads = step(dit, "triton", *batch)
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
    assert not {name: g for name in want if (g := gap(grads[name], want[name])) > 2e-5}


def test_recomputation_gets_the_graphs_that_its_forward_had(monkeypatch):
    """Of compiled references several graphs fit a call, and blocks that keep attention run none."""
    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for module in (modulation, qk_norm_rope, gelu):
        monkeypatch.setattr(module, "compiled", cache(compiled.__wrapped__))
    dit = model("cpu", torch.float32)
    for pack in ("one sample", "three samples"):
        batch = case(pack, "cpu", torch.float32)
        want_loss, want = step(dit, "reference", *batch)
        dit.activations = ("full", "attention")
        loss, grads = step(dit, "compile", *batch)
        torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
        assert not {name: g for name in want if (g := gap(grads[name], want[name])) > 2e-5}


@DEVICES
@pytest.mark.parametrize("trained", ["attn.to_", "img_mlp", "norm_", "_mod.", ".bias", "net.2.weight"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(trained, device):
    dit, batch = model(device, torch.float32), case("two small samples", device, torch.float32)
    _, want = step(dit, "triton", *batch)
    for name, p in dit.named_parameters():
        p.requires_grad_(trained in name)
    dit.zero_grad(set_to_none=True)
    _, grads = step(dit, "triton", *batch)
    assert len(grads) > 2
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want[name], rtol=1e-5, atol=1e-9, msg=name)
    assert all(p.grad is None for p in dit.parameters() if not p.requires_grad)


def adapted(device, dtype, std=0.1, **settings):
    """The model with adapters, B not zero."""
    dit = model(device, torch.float32)
    torch.manual_seed(2)
    config = LoraConfig(**({"rank": 3, "alpha": 6.0} | settings))
    add_adapters(dit, config, target_layers(dit, config.targets))
    for name, p in list(dit.named_parameters()):
        if ".lora_" in name:  # they have no memory yet
            layer, _, leaf = name.rpartition(".")
            value = nn.Parameter(torch.empty(p.shape).normal_(std=std), p.requires_grad)
            setattr(dit.get_submodule(layer), leaf, value)
    return dit.to(device, dtype)


@DEVICES
@pytest.mark.parametrize("targets", [(), ("attn.to_k", "img_mlp.net.2"), ("*",)])
@pytest.mark.parametrize("pack", ["one sample", "three samples"])
def test_adapters_inside_the_pieces(pack, targets, device):
    dit, batch = adapted(device, torch.float32, targets=list(targets)), case(pack, device, torch.float32)
    want_loss, want = step(dit, "reference", *batch)
    layers = [m for m in dit.modules() if isinstance(m, PeftLinear)]
    called = []
    for layer in layers:
        layer.register_forward_hook(lambda m, *_: called.append(m))
    loss, grads = step(dit, "triton", *batch)
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
    assert all("lora_" in name for name in grads if name != "embeds")
    assert not {name: g for name in want if (g := gap(grads[name], want[name])) > 2e-5}
    inside = ("attn.", "mlp.")
    assert not [n for n, m in dit.named_modules() if m in called and any(part in n for part in inside)]


@DEVICES
def test_adapters_in_bf16_are_as_near_to_fp32_as_plain_pytorch_is(device):
    dit = adapted(device, torch.bfloat16)
    batch = case("three samples", device, torch.bfloat16)
    latents, embeds, *rest = batch
    _, want = step(deepcopy(dit).float(), "reference", latents, embeds.float(), *rest)
    _, plain = step(dit, "reference", *batch)
    _, fused = step(dit, "triton", *batch)
    for name in want:
        assert gap(fused[name], want[name]) < 2 * gap(plain[name], want[name]) + 2e-2, name


@DEVICES
@pytest.mark.parametrize("settings", [{"dora": True}, {"dropout": 0.5}, "two", "off", "fp32"])
def test_adapters_that_do_more_are_called(settings, device):
    dit = adapted(device, torch.float32, **(settings if isinstance(settings, dict) else {}))
    layer = dit.transformer_blocks[0].attn.to_q
    assert as_linear(dit.proj_out).down is None
    if settings == "two":
        layer.update_layer("other", 2, 2, config=PeftConfig(r=2))
        layer.set_adapter(["default", "other"])
    elif settings == "off":
        layer.enable_adapters(False)
    elif settings == "fp32":
        layer.base_layer.bfloat16()
    assert as_linear(layer) is None
    if settings in ("two", "fp32"):
        return
    batch = case("three samples", device, torch.float32)
    dit.eval()  # no dropout, which has a sequence of its own
    want_loss, want = step(dit, "reference", *batch)
    loss, grads = step(dit, "triton", *batch)
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
    assert not {name: g for name in want if want[name] is not None and (g := gap(grads[name], want[name])) > 2e-5}


@DEVICES
def test_layers_that_are_wrapped_are_called(device):
    """By whatever is not an adapter: then the pieces with matmuls inside step back, and the kernels between stay."""
    dit, batch = model(device, torch.float32), case("three samples", device, torch.float32)
    want_loss, want = step(dit, "reference", *batch)

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.calls = inner, 0

        def forward(self, x):
            self.calls += 1
            return self.inner(x)

    wrapped = [Wrapped(block.attn.to_q) for block in dit.transformer_blocks]
    for block, layer in zip(dit.transformer_blocks, wrapped):
        block.attn.to_q = layer
    loss, grads = step(dit, "triton", *batch)
    assert [layer.calls for layer in wrapped] == [1, 1]
    torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=0)
    for name, grad in grads.items():
        assert gap(grad, want[name.replace(".inner", "")]) < 2e-5, name


@DEVICES
def test_a_frozen_model_gives_gradients_to_its_inputs(device):
    dit, batch = model(device, torch.float32), case("one sample", device, torch.float32)
    _, want = step(dit, "triton", *batch)
    dit.requires_grad_(False)
    _, grads = step(dit, "triton", *batch)
    assert grads.keys() == {"embeds"}
    assert torch.equal(grads["embeds"], want["embeds"])


@pytest.mark.parametrize("kernel", ["reference", "triton"])
@pytest.mark.parametrize("place", range(3))
def test_rows_that_do_not_fit_the_layout_are_named(place, kernel):
    dit, batch = model("cpu", torch.float32), list(case("three samples", "cpu", torch.float32))
    dit.kernel = kernel
    name = ("latents", "prompt_embeds", "sigmas")[place]
    batch[place] = batch[place][:-1]
    with pytest.raises(ValueError, match=rf"{name} must have the \d+ rows of the layout"):
        dit(*batch[:4])


class Piece:
    """Good arguments of the three pieces, two streams of 2 and 3 rows, width 8, heads of 4."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)

        def make(*shape):
            return torch.randn(*shape, generator=g)

        pairs = {"square": (8, 8), "wide": (16, 8), "tall": (8, 16), "bias": (8,), "wide_bias": (16,), "norm": (4,)}
        of = {name: [make(*shape), make(*shape)] for name, shape in pairs.items()}

        def layers(weight, bias):
            return [Linear(*pair) for pair in zip(of[weight], of[bias])]

        square = [layer._replace(down=make(3, 8), up=make(8, 3), scale=2.0) for layer in layers("square", "bias")]
        segments, x = Segments((2, 3), "cpu", streams=2), make(5, 8)
        tables = {name: make(2, 8) for name in ("gate", "shift", "scale")}
        modulation = {name: tables[name] for name in ("shift", "scale")}
        shared = {"x": x, "segments": segments}
        self.qkv = shared | modulation | {
            "layers": [square] * 3, "norms": [of["norm"]] * 2,
            "rotary": Rotary(torch.ones(5, 2), torch.zeros(5, 2)), "eps": 1e-6,
        }  # fmt: skip
        self.mlp_in = shared | tables | {
            "heads": make(5, 8), "out": square, "mlp_in": layers("wide", "wide_bias"), "eps": 1e-6,
        }  # fmt: skip
        self.mlp_out = shared | {
            "hidden": make(5, 16), "gate": tables["gate"], "hidden_biases": of["wide_bias"],
            "mlp_out": layers("tall", "bias"), "form": "tanh",
        }  # fmt: skip


CALLS = {"qkv": modulated_qkv, "mlp_in": gated_mlp_in, "mlp_out": gated_mlp_out}
HALF = torch.float16


def changed(change):
    """All layers with other tensors."""
    return lambda groups: [[m._replace(**change(m)) for m in group] for group in groups]


@pytest.mark.parametrize(
    ("piece", "name", "change", "message"),
    [
        ("qkv", "x", lambda x: x.t().contiguous().t(), "x must be contiguous"),
        ("qkv", "x", lambda x: x.to(HALF), "x must be float32 or bfloat16, got float16"),
        ("qkv", "x", lambda x: x[1:], "x must have the 5 rows of its segments, got 4"),
        ("qkv", "shift", lambda x: x[:1], r"shift must have shape \[2, 8\], got \[1, 8\]"),
        ("qkv", "scale", lambda x: x.bfloat16(), "scale must be float32, got bfloat16"),
        ("qkv", "layers", lambda x: [x[0], x[0][:1], x[0]], "layers must be 2, one for each stream, got 1"),
        ("qkv", "layers", changed(lambda m: {"weight": m.weight[1:]}), r"weight of layers must have shape \[8, 8\]"),
        ("qkv", "layers", changed(lambda m: {"bias": None}), "layers must have biases"),
        ("qkv", "layers", changed(lambda m: {"up": None}), "layers must have both down and up of an adapter"),
        ("qkv", "layers", changed(lambda m: {"up": m.up[:, :2]}), r"up of layers must have shape \[8, 3\]"),
        ("qkv", "layers", changed(lambda m: {"down": m.down.to(HALF)}), "down of layers must be float32, got float16"),
        ("qkv", "norms", lambda x: [x[0], x[0][:1]], "norms must be 2, one for each stream, got 1"),
        ("qkv", "norms", lambda x: [[w[:3] for w in pair] for pair in x], "norms must have an even width"),
        ("qkv", "rotary", lambda x: Rotary(x.cos[:4], x.sin), r"rotary.cos must have shape \[5, 2\], got \[4, 2\]"),
        ("qkv", "rotary", lambda x: Rotary(x.cos, x.sin, torch.zeros(5)), "rotary.places must be int64"),
        ("mlp_in", "heads", lambda x: x[:, :4], r"heads must have shape \[5, 8\], got \[5, 4\]"),
        ("mlp_in", "gate", lambda x: x[:, :4], r"gate must have shape \[2, 8\]"),
        ("mlp_in", "mlp_in", lambda x: [m._replace(weight=m.weight[:, :4]) for m in x], "weight of mlp_in must have"),
        ("mlp_out", "hidden", lambda x: x[:, :9], r"hidden must have shape \[5, 16\], got \[5, 9\]"),
        ("mlp_out", "hidden_biases", lambda x: x[:1], "hidden_biases must be 2, one for each stream, got 1"),
        ("mlp_out", "mlp_out", lambda x: [m._replace(weight=m.weight.t()) for m in x], "weight of mlp_out must have"),
        ("mlp_out", "form", lambda x: "tnah", "form must be tanh or sigmoid, got 'tnah'"),
    ],
)
def test_pieces_refuse_what_does_not_fit(piece, name, change, message):
    arguments = getattr(Piece(), piece)
    with pytest.raises(ValueError, match=message):
        CALLS[piece](**(arguments | {name: change(arguments[name])}))


@pytest.mark.parametrize("piece", CALLS)
def test_pieces_take_what_fits(piece):
    results = CALLS[piece](**getattr(Piece(), piece))
    assert all(r.isfinite().all() for r in (results if isinstance(results, tuple) else (results,)))


def test_the_block_keeps_little_and_moves_little():
    """The figures of benchmarks/block_traffic.py, which are exact, on one sample and at full size."""
    spec = importlib.util.spec_from_file_location("block_traffic", ROOT / "benchmarks/block_traffic.py")
    traffic = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(traffic)
    counted = traffic.ours([(4096, 512)], "triton", 3072, 24)
    assert counted["traffic"] <= 60
    assert counted["kept"] <= 14
    assert counted["launches"] <= 30

"""Weights in 8 and 4 bits: their error, their bytes from any slice, and the layer that computes with them."""

import builtins
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dstrain.errors import ConfigError
from dstrain.models import storage
from dstrain.models.storage import BLOCK, StoredLinear, dequantise, quantise, store_linears, stored_fill

FORMATS = ("int8", "fp8", "nf4")
# largest error a block may have, as a share of its largest value: half a step of the format, and bf16's of the scale
HALF_STEP = {"int8": 0.5 / 127, "fp8": 16 / 448, "nf4": 0.1520}
NF4_CODES = torch.tensor([  # table of QLoRA (arXiv 2305.14314), appendix E
    -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0,
])  # fmt: skip


@pytest.fixture(autouse=True)
def library(request):
    if "nf4" in str(request.node.name):
        pytest.importorskip("bitsandbytes")


def layer_of(weight, bias, kind):
    """A Linear with these values, kept as `kind`."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None))
    store_linears(model, ["0"], kind)
    model.to_empty(device="cpu")
    fill = stored_fill(lambda name, shape, start, stop: weight.flatten()[start:stop], {"0.weight": weight.shape}, kind)
    with torch.no_grad():
        for name in ("weight", "weight_scale"):
            p = model[0].get_parameter(name)
            p.copy_(fill(f"0.{name}", p.shape, 0, p.numel()))
        if bias is not None:
            model[0].bias.copy_(bias)
    return model[0]


def round_trip(weight, kind, dtype=torch.float32):
    packed, scales = quantise(weight.flatten(), kind)
    return dequantise(packed, scales, kind, weight.shape, dtype)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("shape", [(64, 64), (3, 43), (1, 1), (5, 13), (128, 33)], ids=str)
def test_error_is_within_half_a_step_of_each_block(kind, shape):
    g = torch.Generator().manual_seed(3)
    weight = torch.randn(shape, generator=g) * torch.logspace(-6, 2, shape[1])
    error = F.pad((round_trip(weight, kind) - weight).flatten().abs(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    largest = F.pad(weight.flatten().abs(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK).amax(1)
    assert (error.amax(1) <= largest * (HALF_STEP[kind] + 2**-8)).all()


def test_int8_and_fp8_are_the_formats_of_their_definitions():
    weight = torch.tensor([[127.0, -127.0, 63.4, -0.6, 0.2, 1.0]])
    packed, scales = quantise(weight.flatten(), "int8")
    assert scales.tolist() == [1.0]
    assert packed.view(torch.int8).tolist() == [127, -127, 63, -1, 0, 1]
    weight = torch.tensor([[448.0, -449.0 + 1, 17.0, 0.3]])  # between 16 and 18; between 0.28125 and 0.3125
    assert round_trip(weight, "fp8").tolist() == [[448.0, -448.0, 16.0, 0.3125]]


def test_nf4_is_the_table_of_the_paper():
    weight = NF4_CODES[None]
    packed, scales = quantise(weight.flatten(), "nf4")
    assert scales.tolist() == [1.0]
    assert packed.tolist() == [16 * i + i + 1 for i in range(0, 16, 2)]  # the first of two in the high half
    torch.testing.assert_close(round_trip(weight, "nf4"), weight, rtol=0, atol=5e-5)


@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_of_zeros_and_tiny_and_broken_values(kind):
    weight = torch.zeros(1, 5 * BLOCK)
    weight[0, BLOCK : 2 * BLOCK] = 1e-42
    weight[0, 2 * BLOCK] = float("nan")
    weight[0, 3 * BLOCK] = float("inf")
    weight[0, 4 * BLOCK :] = 0.5
    back = round_trip(weight, kind)[0].split(BLOCK)
    assert (back[0] == 0).all()
    assert (back[1].abs() < 1e-40).all()
    assert not back[2][0].isfinite() and not back[3][0].isfinite()
    torch.testing.assert_close(back[4], weight[0, 4 * BLOCK :], rtol=2**-8, atol=0)


@pytest.mark.parametrize("kind", FORMATS)
def test_scales_survive_the_casts_of_an_engine(kind):
    layer = layer_of(torch.randn(24, 40), torch.zeros(24), kind)
    before = layer.whole_weight(torch.float32)
    for dtype in (torch.bfloat16, torch.float32):
        layer.to(dtype)
        assert layer.weight.dtype == torch.uint8
        assert layer.weight_scale.dtype == dtype
        assert torch.equal(layer.whole_weight(torch.float32), before)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("n", [1, 63, 64, 127, 1000, 1031])
def test_any_slicing_gives_the_same_bytes(kind, n, monkeypatch):
    monkeypatch.setattr(storage, "CHUNK", 2 * BLOCK)  # so that slices are made in several rounds
    weight, asked = torch.randn(1, n, generator=torch.Generator().manual_seed(n)), []

    def plain(name, shape, start, stop):
        assert (name, shape) == ("x.weight", weight.shape)
        assert 0 <= start < stop <= n
        asked.append(stop - start)
        return weight.flatten()[start:stop]

    fill = stored_fill(plain, {"x.weight": weight.shape, "x.bias": torch.Size([1])}, kind)
    packed, scales = quantise(weight.flatten(), kind)
    assert len(packed) == (-(-n // 2) if kind == "nf4" else n) and len(scales) == -(-n // BLOCK)
    for name, whole in (("x.weight", packed), ("x.weight_scale", scales)):
        for world in (1, 2, 3, 7, 64):
            size = -(-len(whole) // world)
            asked.clear()
            # the last ranks ask for less, or, beyond the end, for nothing
            slices = [fill(name, whole.shape, r * size, (r + 1) * size) for r in range(world)]
            assert torch.equal(torch.cat(slices), whole)
            assert {s.dtype for s in slices} == {whole.dtype}
            assert max(asked) <= storage.CHUNK
            assert sum(asked) <= n + 2 * BLOCK * world and (world > 1 or sum(asked) == n)
        for start in range(0, len(whole), max(1, len(whole) // 9)):
            assert torch.equal(fill(name, whole.shape, start, start + 5), whole[start : start + 5])


def test_what_is_not_stored_passes_through():
    calls = []

    def plain(*request):
        calls.append(request)
        return torch.zeros(2)

    shapes = {"x.weight": torch.Size([2, 2]), "x.bias": torch.Size([2]), "norm.weight": torch.Size([4])}
    fill = stored_fill(plain, shapes, "int8")
    asked = [
        ("x.weight", (2, 2)),
        ("x.bias", (2,)),
        ("norm.weight", (4,)),
        ("x.lora_A.weight", (1, 2)),
        ("a_scale", (2,)),
    ]
    for name, shape in asked:
        fill(name, torch.Size(shape), 0, 2)
    assert calls == [(name, torch.Size(shape), 0, 2) for name, shape in asked]
    with pytest.raises(AssertionError, match=r"norm\.weight"):
        fill("norm.weight", torch.Size([3]), 0, 3)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("lead", [(), (7,), (2, 3)], ids=str)
def test_layer_is_a_linear_with_the_rounded_weight(kind, bias, lead):
    g = torch.Generator().manual_seed(0)
    weight, x = torch.randn(19, 37, generator=g), torch.randn(*lead, 37, generator=g, requires_grad=True)
    b = torch.randn(19, generator=g) if bias else None
    layer = layer_of(weight, b, kind)
    if bias:
        layer.bias.requires_grad_()
    want_x = x.detach().requires_grad_()
    want_b = b.clone().requires_grad_() if bias else None
    y, want = layer(x), F.linear(want_x, round_trip(weight, kind), want_b)
    torch.testing.assert_close(y, want)
    y.square().sum().backward()
    want.square().sum().backward()
    torch.testing.assert_close(x.grad, want_x.grad)
    if bias:
        torch.testing.assert_close(layer.bias.grad, want_b.grad)
    assert layer.weight.grad is None and layer.weight_scale.grad is None


@pytest.mark.parametrize("kind", FORMATS)
def test_bf16_rounds_each_weight_once(kind):
    weight = torch.randn(64, 64)
    layer = layer_of(weight, None, kind).bfloat16()
    torch.testing.assert_close(
        layer.whole_weight(torch.bfloat16), round_trip(weight, kind).bfloat16(), rtol=2**-8, atol=0
    )
    x = torch.randn(5, 64, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    want = round_trip(weight, kind).sum(0).expand(5, -1)
    torch.testing.assert_close(x.grad.float(), want, rtol=2**-7, atol=0.1)


@pytest.mark.parametrize("kind", FORMATS)
def test_no_whole_weight_waits_for_the_backward(kind, monkeypatch):
    made, saved, original = [], [], storage.dequantise

    def watched(*args):
        weight = original(*args)
        made.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(storage, "dequantise", watched)
    layer = layer_of(torch.randn(64, 32), torch.zeros(64), kind)
    x = torch.randn(3, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = layer(x)
    assert len(made) == 1 and made[0]() is None
    assert saved == []
    y.sum().backward()
    assert len(made) == 2 and made[1]() is None


@pytest.mark.parametrize("kind", FORMATS)
def test_parameters_freed_and_brought_back_between_forward_and_backward(kind):
    """What ZeRO-3 does to a parameter's storage."""
    weight = torch.randn(16, 24)
    layer, x = layer_of(weight, None, kind), torch.randn(3, 24, requires_grad=True)
    y = layer(x)
    kept = {name: p.data for name, p in layer.named_parameters()}
    for p in layer.parameters():
        p.data = torch.empty(0, dtype=p.dtype)
    for name, p in layer.named_parameters():
        p.data = kept[name].clone()
    y.sum().backward()
    torch.testing.assert_close(x.grad, round_trip(weight, kind).sum(0).expand(3, -1))


@pytest.mark.parametrize("kind", FORMATS)
def test_recomputation(kind):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(24, 24), nn.GELU(), layer_of(torch.randn(24, 24), torch.ones(24), kind), nn.GELU())
    x = torch.randn(5, 24)
    grads = []
    for recompute in (False, True):
        net.zero_grad()
        y = checkpoint(net, x, use_reentrant=False) if recompute else net(x)
        y.square().sum().backward()
        grads.append(net[0].weight.grad.clone())
    assert torch.equal(*grads)
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize("kind", FORMATS)
def test_under_peft_it_is_a_base_layer(kind):
    import peft  # what every install has: without it this must fail

    torch.manual_seed(2)
    weight = torch.randn(20, 12)
    with torch.device("meta"):
        model = nn.ModuleDict({"q": nn.Linear(12, 20), "k": nn.Linear(12, 20)})
        store_linears(model, ["q"], kind)
        peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q"], init_lora_weights=False), model)
    assert isinstance(model["q"].base_layer, StoredLinear) and type(model["k"]) is nn.Linear
    names = [n for n, _ in model["q"].named_parameters()]
    assert sorted(names) == [
        "base_layer.bias", "base_layer.weight", "base_layer.weight_scale", "lora_A.default.weight",
        "lora_B.default.weight",
    ]  # fmt: skip
    model.to_empty(device="cpu")
    fill = stored_fill(lambda name, shape, start, stop: weight.flatten()[start:stop], {"q.weight": weight.shape}, kind)
    q = model["q"]
    with torch.no_grad():
        for name, p in q.named_parameters():
            plain = "q." + name.removeprefix("base_layer.")
            p.copy_(fill(plain, p.shape, 0, p.numel())) if plain[2:].startswith("weight") else nn.init.normal_(p)
    x = torch.randn(3, 12)
    a, b = q.lora_A["default"].weight, q.lora_B["default"].weight
    want = F.linear(x, round_trip(weight, kind) + 2 * b @ a, q.base_layer.bias)  # alpha 8 / rank 4
    torch.testing.assert_close(q(x), want)


def test_bytes_a_weight():
    """The scale of a block of 64 is two bytes."""
    for kind, most in (("int8", 1.0313), ("fp8", 1.0313), ("nf4", 0.5313)):
        if kind == "nf4":
            pytest.importorskip("bitsandbytes")
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(3072, 3072, bias=False))
        store_linears(model, ["0"], kind)
        held = sum(p.numel() * p.itemsize for p in model.parameters())
        assert most - 1e-4 < held / 3072**2 < most
        assert not any(p.requires_grad for p in model.parameters())


def test_a_missing_library_is_told_before_anything_changes(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("bitsandbytes"):
            raise ImportError("No module named 'bitsandbytes'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ConfigError, match=r"lora\.base: nf4 .* pip install -e '\.\[quant\]', or choose int8 or fp8"):
        store_linears(model, ["0"], "nf4")
    assert type(model[0]) is nn.Linear
    store_linears(model, ["0"], "int8")  # needs nothing

"""What trains, by pattern or by adapter, and what it starts from."""

import pytest
import torch

from dstrain.config import LoraConfig
from dstrain.errors import ConfigError
from dstrain.models.init import initial_slice
from dstrain.models.lora import MAGNITUDE, A, B, adapter_fill, plain_name, target_layers
from dstrain.models.qwen_image import QwenImageDiT, QwenImageParams
from dstrain.models.trained import choose_trained, start_values

PARAMS = QwenImageParams(
    num_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=48, axes_dims_rope=(8, 12, 12)
)


def model() -> QwenImageDiT:
    with torch.device("meta"):
        return QwenImageDiT(PARAMS)


def trained(patterns=("*",), **lora):
    m = model()
    choose_trained(m, patterns, LoraConfig(**lora))
    return {plain_name(n): p.shape for n, p in m.named_parameters() if p.requires_grad}


def shapes():
    return {n: p.shape for n, p in model().named_parameters()}


MODEL = model()


def base(name, shape, start, stop):
    return initial_slice(MODEL, name, shape, 7, start, stop)


def test_everything_trains_but_what_feeds_nothing():
    assert trained().keys() == shapes().keys() - model().unused
    assert len(model().unused) == 6


def test_patterns_add_and_take_out_in_turn():
    blocks = trained(["transformer_blocks.*", "!*_mod.*"])
    assert blocks and all(n.startswith("transformer_blocks.") and "_mod." not in n for n in blocks)
    assert trained(["!transformer_blocks.*"]).keys() == {n for n in shapes() if not n.startswith("transformer_blocks.")}
    assert "img_in.weight" in trained(["!img_in.*", "img_in.*"])


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (["img_inn.*"], "matches no parameter"),
        (["!nothing.*"], "matches no parameter"),
        (["img_in.weigth"], "did you mean 'img_in.weight'"),
        (["img_in.*", "!img_in.*"], "leave nothing to train"),
        (["transformer_blocks.1.txt_mlp.*"], "leave nothing to train"),
    ],
)
def test_patterns_that_leave_nothing(patterns, says):
    with pytest.raises(ConfigError, match=says):
        trained(patterns)


def test_adapters_sit_on_the_familys_layers_and_nothing_else_trains():
    found = trained(rank=4)
    layers = target_layers(model(), [])
    assert found.keys() == {layer + end for layer in layers for end in (A, B)}
    assert "transformer_blocks.1.attn.to_add_out" not in layers  # feeds nothing
    assert "transformer_blocks.0.attn.to_add_out" in layers
    assert found["transformer_blocks.0.img_mlp.net.2" + A] == (4, 256)
    assert found["transformer_blocks.0.img_mlp.net.2" + B] == (64, 4)
    assert trained(rank=4, dora=True)["transformer_blocks.0.attn.to_q" + MAGNITUDE] == (64,)


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (["attn.to_qq"], "did you mean 'attn.to_q'"),
        (["transformer_blocks.1.txt_mlp.*"], "feed nothing"),
        (["norm_q"], "matches no Linear layer"),
    ],
)
def test_targets_that_match_nothing(targets, says):
    with pytest.raises(ConfigError, match=says):
        trained(rank=4, targets=targets)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_start_values_are_a_function_of_the_place(init):
    config = LoraConfig(rank=8, dora=True, init=init)
    fill = adapter_fill(config, base, shapes(), 3, {})
    layer = "transformer_blocks.0.attn.to_q"
    for name, shape in ((layer + A, (8, 64)), (layer + MAGNITUDE, (64,)), ("img_in.weight", (64, 64))):
        shape = torch.Size(shape)
        whole = fill(name, shape, 0, shape.numel())
        for cut in (37, 64, 100):
            pieces = [fill(name, shape, i, i + cut) for i in range(0, shape.numel(), cut)]
            assert torch.equal(torch.cat(pieces), whole), (name, cut)
    a = fill(layer + A, torch.Size((8, 64)), 0, 512)
    assert a.abs().max() <= 1 / 8 if init == "kaiming" else a.std().item() == pytest.approx(1 / 8, rel=0.1)
    assert not torch.equal(a, fill("transformer_blocks.0.attn.to_k" + A, torch.Size((8, 64)), 0, 512))
    assert fill(layer + B, torch.Size((64, 8)), 0, 512).count_nonzero() == 0
    weight = base(layer + ".weight", shapes()[layer + ".weight"], 0, 64 * 64).view(64, 64)
    torch.testing.assert_close(fill(layer + MAGNITUDE, torch.Size((64,)), 0, 64), weight.norm(dim=1))


def test_given_adapters_take_the_place_of_start_values():
    name = "transformer_blocks.0.attn.to_q" + A
    given = {name: torch.randn(8, 64)}
    fill = start_values(base, shapes(), LoraConfig(rank=8), 3, given)
    assert torch.equal(fill(name, torch.Size((8, 64)), 10, 20), given[name].flatten()[10:20])

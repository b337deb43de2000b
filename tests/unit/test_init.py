"""Random start weights: a function of seed, name and place."""

import pytest
import torch

from dstrain.models import init
from dstrain.models.packing import PackLayout
from dstrain.models.qwen_image import QwenImageDiT, QwenImageParams

PARAMS = QwenImageParams(
    num_layers=2, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=48, axes_dims_rope=(8, 12, 12)
)


@pytest.fixture(scope="module")
def model():
    model = QwenImageDiT(PARAMS)
    init.initialise(model, seed=3)
    return model


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_slices_of_any_world_size_make_the_whole(model, world, monkeypatch):
    monkeypatch.setattr(init, "CHUNK", 64)  # many chunks, and edges inside counters
    for name, p in model.named_parameters():
        size = -(-p.numel() // world)
        parts = [init.initial_slice(model, name, p.shape, 3, r * size, (r + 1) * size) for r in range(world)]
        assert torch.equal(torch.cat(parts), p.detach().flatten()), name


def test_starts_as_adaln_zero_with_glorot_matrices(model):
    x, c = torch.randn(12, 64), torch.randn(5, 48)
    v = model(x, c, torch.tensor([0.5]), PackLayout.build([[(1, 3, 4)]], [5]))
    assert torch.equal(v, torch.zeros_like(v))  # the output layer starts at zero
    w = model.transformer_blocks[1].img_mlp.net[2].weight
    assert w.std().item() == pytest.approx((2 / sum(w.shape)) ** 0.5, rel=0.03)
    assert torch.equal(model.transformer_blocks[0].attn.norm_q.weight, torch.ones(32))
    assert not model.transformer_blocks[0].img_mod[1].weight.any()


def test_seeds_and_names_differ(model):
    shape = torch.Size((64, 64))
    a, b, c = (
        init.initial_slice(model, n, shape, s, 0, 4096) for n, s in (("img_in.x", 1), ("img_in.x", 2), ("img_in.y", 1))
    )
    for other in (b, c):
        assert torch.corrcoef(torch.stack([a, other]))[0, 1].abs() < 0.06

"""The DiT against diffusers, the oracle."""

from fnmatch import fnmatchcase

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dstrain.errors import ConfigError
from dstrain.models.packing import PackLayout
from dstrain.models.qwen_image import QwenImageDiT, QwenImageParams

TINY = {
    "num_layers": 3,
    "attention_head_dim": 32,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "axes_dims_rope": (8, 12, 12),
}
PUBLISHED = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}


def rel(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    oracle = QwenImageTransformer2DModel(**TINY)
    for p in oracle.parameters():  # zero-mean noise everywhere, so no branch hides behind an identity
        torch.nn.init.normal_(p, std=0.08)
    ours = QwenImageDiT(QwenImageParams.from_config(oracle.config))
    ours.load_state_dict(oracle.state_dict())
    return oracle, ours


def sample(height: int, width: int, text: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(height * width, 64, generator=g), torch.randn(text, 48, generator=g)


@pytest.mark.parametrize(("height", "width", "text"), [(4, 4, 7), (1, 1, 1), (3, 8, 19), (9, 2, 5), (7, 7, 64)])
@pytest.mark.parametrize("sigma", [1.0, 0.3217])
def test_output_and_every_gradient_equal_diffusers(pair, height, width, text, sigma):
    oracle, ours = pair
    x, c = sample(height, width, text, seed=1)
    out = torch.randn(height * width, 64, generator=torch.Generator().manual_seed(2))
    grads = []
    for model in (oracle, ours):
        model.zero_grad()
        xi, ci = x.clone().requires_grad_(), c.clone().requires_grad_()
        if model is oracle:
            v = model(xi[None], ci[None], None, torch.tensor([sigma]), [[(1, height, width)]], return_dict=False)[0][0]
        else:
            v = model(xi, ci, torch.tensor([sigma]), PackLayout.build([[(1, height, width)]], [text]))
        (v * out).sum().backward()
        grads.append((v.detach(), xi.grad, ci.grad, {n: p.grad for n, p in model.named_parameters()}))
    (v0, x0, c0, g0), (v1, x1, c1, g1) = grads
    assert rel(v1, v0) < 1e-5
    assert rel(x1, x0) < 1e-5
    assert rel(c1, c0) < 1e-5
    largest = max(g.norm() for g in g0.values() if g is not None)
    for name, grad in g0.items():
        if grad is None:
            assert g1[name] is None, name  # the last block's text branch feeds nothing
        elif grad.norm() < 1e-6 * largest:  # zero but for rounding (a key's bias, a single token's softmax)
            assert g1[name].norm() < 1e-5 * largest, name
        else:
            assert rel(g1[name], grad) < 1e-5, name


def test_pack_equals_its_samples_one_by_one(pair):
    _, ours = pair
    specs = [(4, 4, 7), (2, 9, 3), (4, 4, 7), (1, 1, 1), (6, 2, 12)]
    parts = [sample(h, w, t, seed=i) for i, (h, w, t) in enumerate(specs)]
    sigmas = torch.tensor([0.9, 0.5, 0.1, 1.0, 0.02])
    single = [
        ours(x, c, sigmas[i : i + 1], PackLayout.build([[(1, h, w)]], [t]))
        for i, ((x, c), (h, w, t)) in enumerate(zip(parts, specs))
    ]
    grads = torch.autograd.grad(sum((v**2).sum() for v in single), list(ours.parameters()), allow_unused=True)
    layout = PackLayout.build([[(1, h, w)] for h, w, _ in specs], [t for *_, t in specs])
    packed = ours(torch.cat([x for x, _ in parts]), torch.cat([c for _, c in parts]), sigmas, layout)
    assert rel(packed, torch.cat(single)) < 1e-5
    packed_grads = torch.autograd.grad((packed**2).sum(), list(ours.parameters()), allow_unused=True)
    scale = max(g.norm() for g in grads if g is not None)
    for g, pg in zip(grads, packed_grads):
        if g is not None and g.norm() > 1e-6 * scale:
            assert rel(pg, g) < 2e-5


def test_padded_batch_of_diffusers_with_mask_agrees(pair):
    oracle, ours = pair
    lens, (h, w) = [5, 12, 9], (4, 6)
    parts = [sample(h, w, t, seed=10 + i) for i, t in enumerate(lens)]
    text = torch.nn.utils.rnn.pad_sequence([c for _, c in parts], batch_first=True)
    mask = torch.arange(max(lens))[None] < torch.tensor(lens)[:, None]
    sigmas = torch.tensor([0.8, 0.4, 0.6])
    with torch.no_grad():
        want = oracle(torch.stack([x for x, _ in parts]), text, mask, sigmas, [[(1, h, w)]] * 3, return_dict=False)[0]
        layout = PackLayout.build([[(1, h, w)]] * 3, lens)
        got = ours(torch.cat([x for x, _ in parts]), torch.cat([c for _, c in parts]), sigmas, layout)
    assert rel(got, want.flatten(0, 1)) < 1e-5


def test_several_pictures_in_a_sample(pair):
    oracle, ours = pair
    shapes, text = [(1, 4, 4), (1, 6, 3), (1, 2, 5)], 6
    tokens = sum(h * w for _, h, w in shapes)
    x, c = torch.randn(tokens, 64), torch.randn(text, 48)
    with torch.no_grad():
        want = oracle(x[None], c[None], None, torch.tensor([0.7]), [shapes], return_dict=False)[0][0]
        got = ours(x, c, torch.tensor([0.7]), PackLayout.build([shapes], [text]))
    assert rel(got, want) < 1e-5


def test_published_config_has_the_published_parameters():
    with torch.device("meta"):
        ours = QwenImageDiT(QwenImageParams.from_config(PUBLISHED))
        oracle = QwenImageTransformer2DModel(**PUBLISHED)
    shapes = {n: p.shape for n, p in ours.named_parameters()}
    assert len(shapes) == 1933
    assert sum(p.numel() for p in ours.parameters()) == 20_430_401_088
    assert shapes == {n: p.shape for n, p in oracle.named_parameters()}
    assert ours.state_dict().keys() == oracle.state_dict().keys()


def test_timesteps_stay_fp32_in_a_bf16_model(pair):
    _, ours = pair
    model = QwenImageDiT(ours.params).to(torch.bfloat16)
    near = torch.tensor([0.9000, 0.9002])
    assert near[0].bfloat16() == near[1].bfloat16()
    a, b = model.time_text_embed(near, torch.bfloat16)
    assert not torch.equal(a, b)


def test_gelu_forms(pair):
    _, ours = pair
    sig = QwenImageDiT(ours.params, gelu="sigmoid")
    sig.load_state_dict(ours.state_dict())
    x, c = sample(4, 4, 5, seed=3)
    layout = PackLayout.build([[(1, 4, 4)]], [5])
    with torch.no_grad():
        a, b = (m(x, c, torch.tensor([0.5]), layout) for m in (ours, sig))
    assert 1e-5 < rel(b, a) < 0.1


def test_what_feeds_nothing_is_named_and_all_else_has_a_gradient(pair):
    oracle, ours = pair
    assert ours.unused == {
        f"transformer_blocks.2.{layer}.{kind}"
        for layer in ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
        for kind in ("weight", "bias")
    }
    specs = [(3, 4, 6), (1, 2, 9)]
    parts = [sample(h, w, t, seed=i) for i, (h, w, t) in enumerate(specs)]
    layout = PackLayout.build([[(1, h, w)] for h, w, _ in specs], [t for *_, t in specs])
    model = QwenImageDiT(ours.params)
    model.load_state_dict(oracle.state_dict())
    for name, p in model.named_parameters():
        p.requires_grad_(name not in model.unused)
    model(
        torch.cat([x for x, _ in parts]), torch.cat([c for _, c in parts]), torch.tensor([0.2, 0.6]), layout
    ).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is None} == model.unused

    v = oracle(parts[0][0][None], parts[0][1][None], None, torch.tensor([0.4]), [[(1, 3, 4)]], return_dict=False)[0]
    oracle.zero_grad()
    v.sum().backward()
    assert {n for n, p in oracle.named_parameters() if p.grad is None} == model.unused


def test_unused_weights_change_no_output(pair):
    _, ours = pair
    x, c = sample(4, 4, 5, seed=4)
    layout = PackLayout.build([[(1, 4, 4)]], [5])
    other = QwenImageDiT(ours.params)
    other.load_state_dict(
        {n: torch.full_like(w, torch.nan) if n in ours.unused else w for n, w in ours.state_dict().items()}
    )
    with torch.no_grad():
        assert torch.equal(ours(x, c, torch.tensor([0.5]), layout), other(x, c, torch.tensor([0.5]), layout))


def test_published_size_of_what_is_unused_and_of_the_lora_layers():
    with torch.device("meta"):
        model = QwenImageDiT(QwenImageParams.from_config(PUBLISHED))
    assert sum(p.numel() for n, p in model.named_parameters() if n in model.unused) == 84_953_088
    layers = [m for n, m in model.named_modules() if any(fnmatchcase(n, t) for t in model.lora_targets)]
    assert len(layers) == 12 * 60
    assert all(isinstance(m, torch.nn.Linear) for m in layers)
    assert sum(32 * (m.in_features + m.out_features) for m in layers) == 235_929_600  # DiffSynth's at rank 32


RAGGED = [
    ([(4, 4), (3, 5)], [7, 8]),
    ([(1, 1)], [1]),
    ([(2, 31), (9, 9), (9, 9), (1, 3)], [50, 3, 3, 21]),
    ([(8, 8)], [200]),
]


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize(("shapes", "texts"), RAGGED)
def test_flops_are_counted_exactly(pair, shapes, texts, backend):
    _, ours = pair
    layout = PackLayout.build([[(1, h, w)] for h, w in shapes], texts)
    inputs = torch.randn(sum(layout.image_lens), 64), torch.randn(sum(texts), 48), torch.rand(len(texts))
    # PyTorch's table of operations lacks the attention of the CPU; the formula is that of the others.
    on_cpu = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, **_: sdpa_flop_count(q, k, v)}
    with torch.no_grad(), sdpa_kernel(backend), FlopCounterMode(display=False, custom_mapping=on_cpu) as counter:
        ours(*inputs, layout)
    assert counter.get_total_flops() == ours.forward_flops(layout)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_layers": 0}, "num_layers"),
        ({"num_attention_heads": "four"}, "num_attention_heads"),
        ({"axes_dims_rope": [8, 8, 8]}, "axes_dims_rope"),
        ({"guidance_embeds": True}, "guidance_embeds"),
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel"),
    ],
)
def test_bad_config_is_named(change, says):
    with pytest.raises(ConfigError, match=says):
        QwenImageParams.from_config({**PUBLISHED, **change}, "transformer/config.json")


def test_layout_refuses_empty_samples():
    with pytest.raises(ValueError, match="empty sample"):
        PackLayout.build([[(1, 4, 4)]], [0])
    with pytest.raises(ValueError, match="one text length"):
        PackLayout.build([[(1, 4, 4)]], [])

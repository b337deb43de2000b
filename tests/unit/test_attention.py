"""Attention on packs against attention on each sample alone."""

import pytest
import torch
import torch.nn.functional as F

from dstrain.kernels.attention import packed_attention
from dstrain.models.packing import PackLayout

LENS = [
    [(4, 5)],
    [(1, 1)],
    [(4, 5), (4, 5), (4, 5)],
    [(7, 3), (1, 1), (12, 30), (7, 3), (64, 2)],
]


def layout_of(lens, device="cpu"):
    return PackLayout.build([[(1, 1, i)] for i, _ in lens], [t for _, t in lens], device)


def alone(q, k, v, layout):
    """Each sample by itself, [n, H, D] -> [H, n, D] for scaled_dot_product_attention and back."""
    parts = []
    for qs, ks, vs in zip(*(x.split(layout.joint_lens) for x in (q, k, v))):
        parts.append(F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (qs, ks, vs))).transpose(0, 1))
    return torch.cat(parts)


@pytest.mark.parametrize("lens", LENS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients(lens, dtype):
    layout = layout_of(lens)
    q, k, v, out = (torch.randn(layout.tokens, 2, 16, dtype=dtype) for _ in range(4))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    results = []
    for attention in (packed_attention, alone):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        y = attention(*inputs, layout)
        results.append([y.detach(), *torch.autograd.grad((y * out).sum(), inputs)])
    for ours, want in zip(*results):
        torch.testing.assert_close(ours, want, atol=tolerance, rtol=tolerance)


def test_samples_do_not_see_each_other():
    layout = layout_of([(4, 5), (7, 3)])
    q, k, v = (torch.randn(19, 2, 16) for _ in range(3))
    before = packed_attention(q, k, v, layout)
    k[9:], v[9:] = float("nan"), float("nan")
    after = packed_attention(q, k, v, layout)
    assert torch.equal(after[:9], before[:9])
    assert after[9:].isnan().all()


@pytest.mark.gpu
@pytest.mark.parametrize("lens", [*LENS, [(1024, 77), (4096, 512), (300, 9)]])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_flash_on_the_gpu(lens, head_dim):
    layout = layout_of(lens, "cuda")
    q, k, v, out = (torch.randn(layout.tokens, 3, head_dim, device="cuda") for _ in range(4))
    inputs = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    y = packed_attention(*inputs, layout)
    ours = [y, *torch.autograd.grad((y * out).sum(), inputs)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    y = alone(*exact, layout)
    want = [y, *torch.autograd.grad((y * out).sum(), exact)]
    for a, b in zip(ours, want):
        assert ((a.double() - b).norm() / b.norm()).item() < 1e-2

"""Attention on packs against attention on each sample alone."""

import logging

import pytest
import torch
import torch.nn.functional as F

from dstrain.kernels import attention as module
from dstrain.kernels.attention import FLASH_2, FLASH_3, SDPA, choose_attention, packed_attention
from dstrain.models.packing import PackLayout

LENS = [
    [(4, 5)],
    [(1, 1)],
    [(4, 5), (4, 5), (4, 5)],
    [(4, 5), (7, 2)],
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


def by_index(q, k, v, layout):
    """Each length by itself, its tokens fetched and put back by their places."""
    out = torch.empty_like(q)
    for places in layout.length_groups:
        out[places] = F.scaled_dot_product_attention(*(x[places].transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    return out


@pytest.mark.parametrize("lens", LENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_samples_that_lie_as_a_batch_have_the_same_bits_as_if_fetched_by_index(lens, dtype):
    layout = layout_of(lens)
    inputs = [torch.randn(layout.tokens, 2, 16, dtype=dtype, requires_grad=True) for _ in range(3)]
    ours, theirs = (f(*inputs, layout) for f in (packed_attention, by_index))
    grads = [torch.autograd.grad(y.float().square().sum(), inputs) for y in (ours, theirs)]
    assert torch.equal(ours, theirs) and all(torch.equal(a, b) for a, b in zip(*grads))


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("lens", "copies"), [([(4, 5)], False), ([(4, 5), (7, 2)], False), ([(4, 5), (4, 6)], True)])
def test_nothing_is_fetched_by_index_where_samples_have_one_length(lens, copies):
    layout = layout_of(lens)
    with Calls() as calls:
        packed_attention(*(torch.randn(layout.tokens, 2, 16) for _ in range(3)), layout)
    assert ("index" in calls.names) == copies


@pytest.fixture
def gpu(monkeypatch):
    """Say that there is a GPU of some compute capability, and whether version 3 can be activated."""
    for function in (module._choose, module._flash_3_refusal):
        function.cache_clear()

    def pretend(capability, error=None, active=None):
        activated = []

        def activate(name):
            if error:
                raise error
            activated.append(name)

        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
        monkeypatch.setattr("torch.nn.attention.activate_flash_attention_impl", activate)
        monkeypatch.setattr("torch.nn.attention.current_flash_attention_impl", lambda: active)
        return activated

    yield pretend
    for function in (module._choose, module._flash_3_refusal):
        function.cache_clear()


MISSING = ModuleNotFoundError("No module named 'flash_attn_interface'")


@pytest.mark.parametrize(
    ("capability", "error", "active", "name", "why", "activated"),
    [
        ((9, 0), None, None, FLASH_3, "Hopper", ["FA3"]),
        ((9, 0), None, "FA3", FLASH_3, "Hopper", []),
        ((9, 0), None, "FA4", FLASH_2, "FA4 was chosen before", []),
        ((9, 0), MISSING, None, FLASH_2, "No module named 'flash_attn_interface'", []),
        ((9, 0), RuntimeError(), None, FLASH_2, "RuntimeError", []),
        ((8, 9), None, None, FLASH_2, "9.x, not 8.9", []),
        ((10, 0), None, None, FLASH_2, "9.x, not 10.0", []),
        ((7, 5), None, None, SDPA, "8.0, not 7.5", []),
    ],
)
def test_the_gpu_decides_which_flash_attention(gpu, capability, error, active, name, why, activated):
    called = gpu(capability, error, active)
    for head_dim in (64, 128):
        chosen, reason = choose_attention(torch.device("cuda", 0), torch.bfloat16, head_dim)
        assert chosen == name and why in reason
    assert called == activated


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "name", "why"),
    [
        ("cpu", torch.bfloat16, 128, SDPA, "does not run on cpu"),
        ("cuda", torch.float32, 128, SDPA, "does not take float32"),
        ("cuda", torch.bfloat16, 264, SDPA, "at most 256, in steps of 8, not 264"),
        ("cuda", torch.float16, 100, SDPA, "not 100"),
        ("meta", torch.bfloat16, 128, FLASH_2, "as on a GPU"),
        ("meta", torch.float32, 128, SDPA, "does not take float32"),
    ],
)
def test_what_flash_attention_cannot_do_goes_elsewhere(gpu, device, dtype, head_dim, name, why):
    gpu((9, 0))
    chosen, reason = choose_attention(torch.device(device), dtype, head_dim)
    assert chosen == name and why in reason


def test_the_choice_is_logged_once(gpu, caplog):
    caplog.set_level(logging.INFO)
    layout = layout_of([(4, 5)])
    for _ in range(3):
        packed_attention(*(torch.randn(9, 2, 16) for _ in range(3)), layout)
    assert [r.message for r in caplog.records if r.name == module.__name__] == [
        "attention of torch.float32, heads of 16, on cpu: scaled_dot_product_attention, a call for each sample length "
        "(flash attention does not run on cpu)"
    ]


def test_on_the_meta_device_it_runs_what_a_gpu_would():
    layout = layout_of([(4, 5), (7, 3)], "meta")
    q, k, v = (torch.empty(19, 2, 16, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3))
    with Calls() as calls:
        packed_attention(q, k, v, layout).sum().backward()
    assert "_varlen_attn" in calls.names and "index" not in calls.names and q.grad.shape == q.shape


def test_torch_compile_passes_over_the_choice():
    layout = layout_of([(4, 5), (7, 2)])
    q, k, v = (torch.randn(18, 2, 16) for _ in range(3))
    compiled = torch.compile(lambda q, k, v: packed_attention(q, k, v, layout), backend="eager", fullgraph=True)
    assert torch.equal(compiled(q, k, v), packed_attention(q, k, v, layout))


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

"""Every activation policy gives the loss and gradients of plain autograd, and keeps what its name says."""

import gc
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from dstrain.models import activations
from dstrain.models.activations import ATTENTION, run_blocks
from dstrain.models.packing import PackLayout
from dstrain.models.qwen_image import QwenImageDiT, QwenImageParams

PARAMS = QwenImageParams(
    num_layers=4, attention_head_dim=32, num_attention_heads=2, joint_attention_dim=48, axes_dims_rope=(8, 12, 12)
)
LAYOUTS = [
    PackLayout.build([[(1, 4, 4)], [(1, 2, 5)], [(1, 4, 4)]], [7, 3, 7]),
    PackLayout.build([[(1, 1, 1)]], [1]),
    PackLayout.build([[(1, 3, 3), (1, 5, 2)], [(1, 9, 1)]], [5, 64]),
]
POLICIES = [
    ("attention",),
    ("full",),
    ("offload",),
    ("none", "attention", "full", "offload"),
    ("offload", "none"),
    ("full", "offload", "attention"),
]


@pytest.fixture
def every_stream_is_large(monkeypatch):
    monkeypatch.setattr(activations, "SMALLEST", 0)


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    model = QwenImageDiT(PARAMS)
    for p in model.parameters():
        nn.init.normal_(p, std=0.08)
    return model.to(dtype)


def pack(layout, seed=1):
    g = torch.Generator().manual_seed(seed)
    images, text = sum(layout.image_lens), sum(layout.text_lens)
    return (
        torch.randn(images, 64, generator=g),
        torch.randn(text, 48, generator=g),
        torch.rand(len(layout), generator=g),
    )


def loss_and_gradients(model, layout):
    model.zero_grad()
    loss = model(*pack(layout), layout).float().square().mean()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=["three", "smallest", "pictures"])
def test_loss_and_gradients_do_not_change_by_a_bit(every_stream_is_large, layout, dtype):
    model = make_model(dtype)
    want, want_grads = loss_and_gradients(model, layout)
    assert len(want_grads) == len(list(model.parameters())) - len(model.unused)
    for model.activations in POLICIES:
        loss, grads = loss_and_gradients(model, layout)
        assert torch.equal(loss, want), model.activations
        assert grads.keys() == want_grads.keys()
        assert not [n for n in grads if not torch.equal(grads[n], want_grads[n])], model.activations


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops[func] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("keep", "attentions"), [("none", 4), ("attention", 4), ("full", 8), ("offload", 8)])
def test_only_attention_is_kept_and_every_product_is_made_again(keep, attentions):
    model = make_model()
    model.activations = (keep,)
    with Count() as count:
        loss = model(*pack(LAYOUTS[1]), LAYOUTS[1]).sum()
        products = count.ops[torch.ops.aten.addmm.default]
        loss.backward()
    again = count.ops[torch.ops.aten.addmm.default] - products
    assert sum(count.ops[op] for op in ATTENTION) == attentions
    assert again == (0 if keep == "none" else 4 * 14 - 3)  # 14 linear layers a block; the last one calls 11


def test_the_kept_operations_are_those_of_attention_and_no_product():
    names = {op.overloadpacket.__name__ for op in ATTENTION}
    assert not names & {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "addbmm", "addmv", "mv"}
    assert all("attn" in n or "attention" in n for n in names)
    q = torch.empty(8, 2, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    edges = torch.empty(3, dtype=torch.int32, device="meta")
    with Count() as count:  # what packed_attention calls on a GPU
        varlen_attn(q, q, q, edges, edges, 5, 5)
    assert set(count.ops) & set(ATTENTION)


def live_bytes(run):
    """Largest sum of what the CPU allocator has given out and not got back during run()."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p:
        run()
    events = [e for e in p.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def test_bytes_that_are_kept():
    torch.manual_seed(0)
    layout = PackLayout.build([[(1, 16, 32)], [(1, 15, 32)]], [32, 64])
    inputs = torch.randn(992, 64), torch.randn(96, 3584), torch.rand(2)

    def peak(keep, layers):
        params = QwenImageParams(
            num_layers=layers, attention_head_dim=32, num_attention_heads=2, axes_dims_rope=(8, 12, 12)
        )
        model = QwenImageDiT(params)
        model.activations = (keep,)
        model(*inputs, layout).sum().backward()
        model.zero_grad(set_to_none=False)
        return live_bytes(lambda: model(*inputs, layout).sum().backward()) / (4 * layout.tokens * model.width)

    kept = {keep: (peak(keep, 6) - peak(keep, 3)) / 3 for keep in ("none", "attention", "full")}
    # In rows of the width, a token and block; beside the attention's result the sums' logarithms.
    assert kept == pytest.approx({"none": 31.16, "attention": 2 + 1 / 32, "full": 1}, rel=0.01)


class Toy(nn.Module):
    """Two streams and a shared tensor; notes whether its inputs are alive."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.dropout = nn.Dropout(dropout)
        self.inputs = []

    def forward(self, a, b, shared):
        self.inputs = [weakref.ref(a.untyped_storage()), weakref.ref(b.untyped_storage())]
        self.wanted = a.requires_grad, b.requires_grad
        return torch.tanh(self.linear(self.dropout(a)) + shared) * b.mean(), b * a.mean() + self.linear(b).sin()


def toys(count=4, dropout=0.0):
    torch.manual_seed(3)
    blocks = nn.ModuleList(Toy(dropout) for _ in range(count))
    return blocks, (torch.randn(5, 6), torch.randn(3, 6)), torch.randn(6, requires_grad=True)


def gradients(blocks, streams, shared, keep, walks=1):
    blocks.zero_grad()
    shared.grad = None
    a, b = run_blocks(blocks, (keep,), streams, (shared,))
    loss = (a.sum() + b.sum()).square()
    for walk in range(walks):
        loss.backward(retain_graph=walk < walks - 1)
    return [shared.grad, *(p.grad for p in blocks.parameters())]


def alike(first, second):
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_a_graph_may_be_walked_twice(every_stream_is_large):
    blocks, streams, shared = toys()
    want = gradients(blocks, streams, shared, "none", walks=2)
    for keep in ("full", "offload", "attention"):
        assert alike(gradients(blocks, streams, shared, keep, walks=2), want)


def test_packs_that_live_at_once_and_one_that_is_dropped(every_stream_is_large):
    blocks, streams, shared = toys()
    results = []
    for keep in ("none", "offload"):
        blocks.zero_grad()
        first = run_blocks(blocks, (keep,), streams, (shared,))
        dropped = run_blocks(blocks, (keep,), streams, (shared * 2,))
        with torch.no_grad():
            run_blocks(blocks, (keep,), streams, (shared,))
        second = run_blocks(blocks, (keep,), (streams[0] + 1, streams[1]), (shared,))
        again = run_blocks(blocks, (keep,), streams, (shared,))
        del dropped
        first[0].sum().backward()
        (second[1].sum() * again[0].sum()).backward()
        results.append([p.grad for p in blocks.parameters()])
    assert alike(*results)


def test_an_error_in_the_backward_leaves_nothing_behind(every_stream_is_large, monkeypatch):
    blocks, streams, shared = toys()
    want = [g.clone() for g in gradients(blocks, streams, shared, "offload")]
    a, b = run_blocks(blocks, ("offload",), streams, (shared,))

    def fails(*_):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as m:
        m.setattr(blocks[1], "forward", fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            (a.sum() + b.sum()).backward()
    del a, b
    assert alike(gradients(blocks, streams, shared, "offload"), want)


class Copies(list):
    """Copies in their order, as (tensor that is filled, tensor that is read)."""

    def start(self, target, source):
        target.copy_(source)
        self.append((weakref.ref(target), source.flatten()[0].item()))

    def settle(self):
        pass


@pytest.mark.parametrize("run_backward", [True, False])
def test_streams_leave_the_device_and_come_back_one_block_ahead(every_stream_is_large, monkeypatch, run_backward):
    copies = Copies()
    monkeypatch.setattr(activations, "_copies", lambda device: copies)
    blocks, streams, shared = toys(5)
    order = []
    for i, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda *_, i=i: order.append((i, len(copies))))
    a, b = run_blocks(blocks, ("offload",), streams, (shared,))
    out = [value for _, value in copies]
    assert len(out) == 8  # two streams of all blocks but the last, which is first in the backward; never what is shared
    alive = [[ref() is not None for ref in block.inputs] for block in blocks]
    assert alive == [[True, True], *[[False, False]] * 3, [True, True]]  # the first block's are the caller's
    if run_backward:
        order.clear()
        (a.sum() + b.sum()).backward()
        back = [value for _, value in copies[8:]]
        assert back == [out[i] for i in (6, 7, 4, 5, 2, 3, 0, 1)]
        # before block i is computed again, its inputs and those of block i - 1 have been asked for
        assert order == [(4, 8), (3, 12), (2, 14), (1, 16), (0, 16)]
    del a, b
    gc.collect()
    assert not [ref for ref, _ in copies if ref() is not None]


def test_small_streams_stay():
    blocks, streams, shared = toys()
    want = gradients(blocks, streams, shared, "none")
    assert all(x.nbytes < activations.SMALLEST for x in streams)
    a, _ = run_blocks(blocks, ("offload",), streams, (shared,))
    assert all(ref() is not None for block in blocks for ref in block.inputs)
    del a
    assert alike(gradients(blocks, streams, shared, "offload"), want)


@pytest.mark.parametrize("keep", ["attention", "full", "offload"])
def test_dropout_drops_the_same_again(every_stream_is_large, keep):
    blocks, streams, shared = toys(dropout=0.4)
    results = []
    for policy in ("none", keep):
        torch.manual_seed(11)
        results.append((gradients(blocks, streams, shared, policy), torch.rand(())))
    assert alike(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])  # and the stream of random numbers goes on where it would have


@pytest.mark.parametrize("keep", ["none", "attention", "full", "offload"])
def test_streams_ask_for_a_gradient_where_a_block_trains_and_not_before(every_stream_is_large, keep):
    blocks, streams, shared = toys()
    shared.requires_grad_(False)
    for block in blocks[:2]:
        block.requires_grad_(False)
    a, b = run_blocks(blocks, (keep,), streams, (shared,))
    assert [block.wanted for block in blocks] == [(False, False)] * 2 + [(True, True)] * 2
    assert not any(x.requires_grad for x in streams)
    (a.sum() + b.sum()).backward()
    assert [p.grad is not None for p in blocks.parameters()] == [False] * 4 + [True] * 4
    with torch.no_grad():
        run_blocks(blocks, (keep,), streams, (shared,))
    assert [block.wanted for block in blocks] == [(False, False)] * 4


def gpu_model(layers):
    params = QwenImageParams(num_layers=layers, num_attention_heads=8, joint_attention_dim=64)
    torch.manual_seed(0)
    model = QwenImageDiT(params).to("cuda", torch.bfloat16)
    for p in model.parameters():
        nn.init.normal_(p, std=0.02)
    layout = PackLayout.build([[(1, 64, 48)], [(1, 32, 32)]], [300, 77], "cuda")
    inputs = torch.randn(64 * 48 + 1024, 64, device="cuda"), torch.randn(377, 64, device="cuda")
    return model, (*inputs, torch.tensor([0.3, 0.8], device="cuda"), layout)


@pytest.mark.gpu
def test_gradients_on_a_gpu_do_not_change_by_a_bit(every_stream_is_large):
    model, inputs = gpu_model(6)
    results = {}
    for keep in ("none", "attention", "full", "offload"):
        model.activations = (keep,)
        for _ in range(3):  # buffers come round again
            model.zero_grad()
            model(*inputs).float().square().mean().backward()
        results[keep] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for keep, grads in results.items():
        assert alike(grads, results["none"]), keep


@pytest.mark.gpu
def test_offload_takes_less_gpu_memory_than_full():
    model, inputs = gpu_model(24)
    peaks = {}
    for keep in ("full", "offload"):
        model.activations = (keep,)
        for _ in range(2):
            model.zero_grad(set_to_none=False)
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated()
            model(*inputs).float().square().mean().backward()
            torch.cuda.synchronize()
            peaks[keep] = torch.cuda.max_memory_allocated() - start
    streams = 2 * model.width * inputs[-1].tokens  # bytes
    assert peaks["full"] - peaks["offload"] > 18 * streams  # of 24 blocks, less those on the way

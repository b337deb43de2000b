"""SwiGLU against plain PyTorch in fp64: in Triton's interpreter, or compiled if there is a GPU."""

import pytest
import torch
from kernel_cases import (
    CPU,
    DEVICES,
    DTYPES,
    HAS_GPU,
    assert_near,
    chunk_of,
    compile_for_gpu,
    in_fp64,
    leaf,
    misaligned,
    poisoned,
)
from torch.utils.checkpoint import checkpoint

from dstrain.kernels.swiglu import swiglu, swiglu_backward, swiglu_forward, swiglu_reference

MODES = pytest.mark.parametrize("mode", ["triton", "reference"])


def case(rows, width, device="cpu", dtype=torch.float32):
    torch.manual_seed(rows * width)
    gate, up = (leaf(torch.randn(rows, width) * 2, device, dtype) for _ in range(2))
    return gate, up, torch.randn(rows, width).to(device, dtype)


def exact(gate, up, dact):
    """Values and gradients in fp64, by a formula of our own."""
    gate, up = in_fp64(gate, up)
    act = gate / (1 + torch.exp(-gate)) * up
    return act, *torch.autograd.grad(act, [gate, up], dact.double())


def check(actual, wanted, names=("act", "dgate", "dup")):
    for ours, theirs, name in zip(actual, wanted, names):
        assert_near(ours, theirs, name)


@DEVICES
@DTYPES
@MODES
@pytest.mark.parametrize(("rows", "width"), [(1, 64), (1, 1), (33, 96), (7, 5), (5, 130), (3, 5120), (301, 8)])
def test_values_and_gradients(device, dtype, mode, rows, width):
    gate, up, dact = case(rows, width, device, dtype)
    with poisoned():
        act = swiglu(gate, up, mode)
        grads = torch.autograd.grad(act, [gate, up], dact)
    assert act.dtype == dtype and {g.dtype for g in grads} == {dtype}
    check([act, *grads], exact(gate, up, dact))


@DEVICES
@DTYPES
@MODES
def test_the_halves_of_one_projection(device, dtype, mode):
    gate, up, dact = case(19, 64, device, dtype)
    both = torch.cat([gate, up], dim=1).detach().requires_grad_()
    act = swiglu(*both.chunk(2, dim=1), mode)
    (dboth,) = torch.autograd.grad(act, both, dact)
    assert act.is_contiguous()
    check([act, *dboth.chunk(2, dim=1)], exact(gate, up, dact))


@DEVICES
@DTYPES
def test_memory_that_is_not_aligned_and_rows_that_lie_apart(device, dtype):
    gate, up, dact = case(9, 24, device, dtype)
    for g, u in ((misaligned(gate), misaligned(up, 3)), (chunk_of(gate, 3, 2), up), (gate, chunk_of(up, 5, 1))):
        act = swiglu(g, u, "triton")
        check([act, *torch.autograd.grad(act, [g, u], misaligned(dact, 5))], exact(gate, up, dact))


def test_the_reference_has_the_gradients_that_it_says():
    assert torch.autograd.gradcheck(swiglu_reference, in_fp64(*case(3, 4)[:2]))


@DEVICES
@MODES
def test_far_out_it_is_the_product_or_nothing(device, mode):
    far = torch.tensor([100.0, 1e6, 1e15, 1e30, 3e38], device=device)
    gate = torch.stack([far, -far]).requires_grad_()
    up = torch.full_like(gate, 0.5).requires_grad_()
    act = swiglu(gate, up, mode)
    dgate, dup = torch.autograd.grad(act.sum(), [gate, up])
    assert torch.equal(act[0], far / 2) and torch.equal(dup[0], far) and torch.equal(dgate[0], up[0])
    for tiny in (act[1], dgate[1], dup[1]):
        assert not tiny.isnan().any() and tiny.abs().max() < 1e-10


@DEVICES
def test_nan_and_inf_stay_where_they_are(device):
    gate, up, dact = case(36, 16, device)
    with torch.no_grad():
        gate[3, 2], gate[30, 5], gate[31, 6] = float("nan"), float("-inf"), float("inf")
        gate[35, 4], up[35, 4] = 1.0, float("inf")
    dact[7, 9] = float("nan")
    act = swiglu(gate, up, "triton")
    check([act, *torch.autograd.grad(act, [gate, up], dact)], exact(gate, up, dact))
    assert act.isnan().nonzero().tolist() == [[3, 2], [30, 5]]


@DEVICES
def test_an_upstream_gradient_of_any_strides(device):
    gate, up, _ = case(13, 64, device)
    for make in (lambda act: act.sum(), lambda act: (act.T.contiguous() * torch.arange(13, device=device)).sum()):
        grads = [torch.autograd.grad(make(swiglu(gate, up, mode)), [gate, up]) for mode in ("triton", "reference")]
        check(*grads, names=("dgate", "dup"))


@DEVICES
def test_the_raw_backward_makes_both_gradients_side_by_side_and_act_again(device):
    gate, up, dact = (x.detach() for x in case(13, 64, device, torch.bfloat16))
    _, dgate, dup = exact(gate, up, dact)
    both, again = swiglu_backward(dact, gate, up, True)
    assert_near(both, torch.cat([dgate, dup], dim=1))
    assert torch.equal(again, swiglu_forward(gate, up))
    bare, nothing = swiglu_backward(dact, gate, up, False)
    assert torch.equal(bare, both) and nothing.numel() == 0


@DEVICES
def test_the_same_call_gives_the_same_bits_and_so_does_checkpointing(device):
    gate, up, dact = case(300, 64, device)
    acts = [swiglu(gate, up, "triton") for _ in range(2)]
    acts.append(checkpoint(swiglu, gate, up, "triton", use_reentrant=False))
    runs = [(act, *torch.autograd.grad(act, [gate, up], dact)) for act in acts]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


def test_torch_compile_passes_over_it(monkeypatch):
    gate, up, dact = case(13, 64, "cuda" if HAS_GPU else "cpu")

    def double(gate, up):
        return 2 * swiglu(gate, up, "triton")

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(gate, up), [gate, up], dact) for f in (double, compiled))):
        assert torch.equal(a, b)


def test_on_the_meta_device_it_has_shapes():
    gate, up = (torch.empty(13, 64, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    act = swiglu(gate, up, "triton")
    grads = torch.autograd.grad(act.sum(), [gate, up])
    assert [(g.shape, g.dtype) for g in (act, *grads)] == [(gate.shape, gate.dtype)] * 3


@DEVICES
@pytest.mark.parametrize("again", [True, False])
def test_the_operators_are_what_they_register(device, again):
    gate, up, dact = (x.detach() for x in case(13, 64, device))
    tests = "test_schema", "test_faketensor"
    torch.library.opcheck(swiglu_forward, (gate, chunk_of(up)), test_utils=tests)
    torch.library.opcheck(swiglu_backward, (dact, chunk_of(gate), up, again), test_utils=tests)


BAD = {
    "mode must be one of": {"mode": "cuda"},
    "gate must have shape \\[rows, width\\], both at least 1, got \\[0, 8\\]": {"gate": torch.zeros(0, 8)},
    "gate must have shape \\[rows, width\\], both at least 1, got \\[7\\]": {"gate": torch.zeros(7)},
    "gate must be float32 or bfloat16, got float16": {"gate": torch.zeros(7, 8, dtype=torch.float16)},
    "gate must have rows without gaps, got strides \\[16, 2\\]": {"gate": torch.zeros(7, 16)[:, ::2]},
    "up must have shape \\[7, 8\\], got \\[7, 9\\]": {"up": torch.zeros(7, 9)},
    "up must be float32, got bfloat16": {"up": torch.zeros(7, 8).bfloat16()},
    "up must be on cpu, got meta": {"up": torch.zeros(7, 8, device="meta")},
    "up must have rows without gaps": {"up": torch.zeros(8, 7).T},
}


@pytest.mark.parametrize("mode", ["reference", pytest.param("triton", marks=CPU.marks)])
@pytest.mark.parametrize("message", BAD)
def test_swiglu_refuses(message, mode):
    good = {"gate": torch.zeros(7, 8), "up": torch.zeros(7, 8), "mode": mode}
    swiglu(**good)
    with pytest.raises(ValueError, match=message):
        swiglu(**(good | BAD[message]))


def test_kernels_compile_for_a_gpu_without_one():
    compile_for_gpu("""
from dstrain.kernels import swiglu as s
for kind, F, stride, vector in (("*bf16", 13824, "i32=16", "ld.global.v4.b32"), ("*fp32", 5120, "i32=16", "v4.b32"),
                                ("*bf16", 5, "i32", "")):
    R, B = s.tile(F, 2048)
    pointers = dict(gate_ptr=kind, up_ptr=kind, act_ptr=kind)
    scalars = dict(gate_stride=stride, up_stride=stride, rows="i32")
    assert vector in ptx(s._forward_kernel, pointers, scalars, F=F, R=R, B=B)
    for AGAIN in (True, False):
        assert vector in ptx(s._backward_kernel, pointers | dict(dact_ptr=kind, both_ptr=kind), scalars,
                             F=F, AGAIN=AGAIN, R=R, B=B)
""")

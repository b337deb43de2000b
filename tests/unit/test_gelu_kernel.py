"""GELU with bias against plain PyTorch in fp64: in Triton's interpreter, or compiled if there is a GPU."""

import pytest
import torch
import torch.nn.functional as nnf
from kernel_cases import (
    CPU,
    DEVICES,
    DTYPES,
    HAS_GPU,
    assert_near,
    compile_for_gpu,
    in_fp64,
    leaf,
    misaligned,
    poisoned,
)
from torch.utils.checkpoint import checkpoint

from dstrain.kernels import gelu as module
from dstrain.kernels.gelu import chunk_rows, gelu, gelu_backward, gelu_forward, gelu_reference

FORMS = pytest.mark.parametrize("form", module.FORMS)
SHAPES = pytest.mark.parametrize(
    ("stream_rows", "width"),
    [((1,), 64), ((1, 1), 5), ((33,), 64), ((7, 70), 96), ((40, 3), 130), ((3, 2), 5120), ((600, 33), 8)],
)


def case(stream_rows, width, device="cpu", dtype=torch.float32, streams=None):
    """h, dact and biases for two streams: inputs from -7 to 7, all of which matter."""
    torch.manual_seed(sum(stream_rows) * width)
    h = leaf(torch.randn(sum(stream_rows), width) * 2, device, dtype)
    biases = [leaf(torch.randn(width), device, dtype) for _ in stream_rows]
    return h, biases, torch.randn(h.shape).to(device, dtype)


def exact(h, biases, stream_rows, form, dact):
    """Values and gradients in fp64, by a formula of our own."""
    h, *biases = in_fp64(h, *biases)
    x = h
    if biases:
        x = h + torch.repeat_interleave(torch.stack(biases), torch.tensor(stream_rows, device=h.device), dim=0)
    if form == "tanh":
        act = x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    else:
        act = x / (1 + torch.exp(-1.702 * x))
    return act, *torch.autograd.grad(act, [h, *biases], dact.double())


def check(actual, wanted, names=("act", "dh", "dbias0", "dbias1")):
    for ours, theirs, name in zip(actual, wanted, names):
        assert_near(ours, theirs, name)


@DEVICES
@SHAPES
@DTYPES
@FORMS
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_values_and_gradients(device, stream_rows, width, dtype, form, mode):
    h, biases, dact = case(stream_rows, width, device, dtype)
    with poisoned():
        act = gelu(h, biases, stream_rows, form, mode)
        grads = torch.autograd.grad(act, [h, *biases], dact)
    assert act.dtype == dtype and {g.dtype for g in grads} == {dtype}
    check([act, *grads], exact(h, biases, stream_rows, form, dact))


@DEVICES
@FORMS
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_without_biases(device, form, mode):
    h, _, dact = case((37,), 96, device)
    act = gelu(h, form=form, mode=mode)
    check([act, *torch.autograd.grad(act, [h], dact)], exact(h, [], (), form, dact))


@DEVICES
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_fp32_biases_of_bf16_rows(device, mode):
    h, _, dact = case((20, 13), 64, device, torch.bfloat16)
    biases = [leaf(torch.randn(64), device) for _ in range(2)]
    act = gelu(h, biases, (20, 13), "tanh", mode)
    grads = torch.autograd.grad(act, [h, *biases], dact)
    assert [g.dtype for g in grads] == [torch.bfloat16, torch.float32, torch.float32]
    check([act, *grads], exact(h, biases, (20, 13), "tanh", dact))


def test_the_tanh_form_is_torchs_and_the_sigmoid_form_diffsynths():
    x = torch.linspace(-9, 9, 1001)[:, None]
    assert torch.equal(gelu(x), nnf.gelu(x, approximate="tanh"))
    assert torch.equal(gelu(x, form="sigmoid"), x * torch.sigmoid(1.702 * x))


@FORMS
def test_the_reference_has_the_gradients_that_it_says(form):
    h, biases, _ = case((2, 3), 4)
    h, *biases = in_fp64(h, *biases)
    assert torch.autograd.gradcheck(lambda h, *biases: gelu_reference(h, biases, (2, 3), form), (h, *biases))


@DEVICES
@FORMS
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_far_out_it_is_the_identity_or_nothing(device, form, mode):
    far = torch.tensor([20.0, 90.0, 300.0, 1e6, 1e15, 1e30, 3e38], device=device)
    far = far[far < 1e6] if form == "tanh" and mode == "reference" else far  # there torch's own cube overflows
    h = torch.stack([far, -far]).requires_grad_()
    act = gelu(h, form=form, mode=mode)
    (grad,) = torch.autograd.grad(act.sum(), h)
    assert torch.equal(act[0], far) and not act[1].isnan().any() and act[1].abs().max() < 1e-10
    assert torch.equal(grad[0], torch.ones_like(far)) and not grad[1].isnan().any() and grad[1].abs().max() < 1e-10


@DEVICES
@FORMS
def test_nan_and_inf_stay_where_they_are(device, form):
    h, biases, dact = case((36, 5), 16, device)
    with torch.no_grad():
        h[3, 2], h[35, 4], h[40, 5], h[0, 6] = float("nan"), float("inf"), float("-inf"), 0.0
    dact[7, 9] = float("nan")
    wanted = exact(h, biases, (36, 5), form, dact)
    act = gelu(h, biases, (36, 5), form, "triton")
    actual = [act, *torch.autograd.grad(act, [h, *biases], dact)]
    check(actual, wanted)
    assert actual[0].isnan().sum() == 2 and actual[1].isnan().sum() == 4  # -inf times 0; and the slope at both ends
    assert actual[2].isnan().nonzero().flatten().tolist() == [2, 4, 9]
    assert actual[3].isnan().nonzero().flatten().tolist() == [5]


@DEVICES
def test_a_bias_that_is_not_a_number_spoils_its_own_stream(device):
    h, biases, dact = case((33, 34), 16, device)
    with torch.no_grad():
        biases[1][3] = float("nan")
    act = gelu(h, biases, (33, 34), "tanh", "triton")
    dh, *dbiases = torch.autograd.grad(act, [h, *biases], dact)
    for whole in (act, dh):
        assert whole[33:, 3].isnan().all() and whole.isnan().sum() == 34
    assert not dbiases[0].isnan().any() and dbiases[1].isnan().nonzero().flatten().tolist() == [3]


@DEVICES
@DTYPES
def test_memory_that_is_not_aligned(device, dtype):
    h, biases, dact = case((9, 4), 64, device, dtype)
    moved, shifted = misaligned(h), [misaligned(bias, 3) for bias in biases]
    act = gelu(moved, shifted, (9, 4), "tanh", "triton")
    grads = torch.autograd.grad(act, [moved, *shifted], misaligned(dact, 5))
    check([act, *grads], exact(h, biases, (9, 4), "tanh", dact))


@DEVICES
def test_an_upstream_gradient_of_any_strides(device):
    h, biases, _ = case((9, 4), 64, device)
    for make in (lambda act: act.sum(), lambda act: (act.T.contiguous() * torch.arange(13, device=device)).sum()):
        results = []
        for mode in ("triton", "reference"):
            results.append(torch.autograd.grad(make(gelu(h, biases, (9, 4), "tanh", mode)), [h, *biases]))
        check(*results, names=("dh", "dbias0", "dbias1"))


@DEVICES
def test_the_raw_backward_makes_act_again_and_leaves_out_what_is_not_wanted(device):
    h, biases, dact = (x if isinstance(x, list) else x.detach() for x in case((9, 40), 64, device, torch.bfloat16))
    biases = [bias.detach() for bias in biases]
    act = gelu_forward(h, biases, 9, "tanh")
    dh, dbiases, again = gelu_backward(dact, h, biases, 9, "tanh", True)
    assert torch.equal(again, act) and dbiases.shape == (2, 64)
    bare, without, nothing = gelu_backward(dact, h, biases, 9, "tanh", False, False)
    assert torch.equal(bare, dh) and without.numel() == nothing.numel() == 0
    assert gelu_backward(dact, h, [], 49, "tanh", False)[1].numel() == 0


@DEVICES
def test_gradients_that_are_not_wanted_are_not_made(device, monkeypatch):
    h, biases, dact = case((9, 4), 64, device)
    asked, backward = [], module.gelu_backward

    def spy(*args):
        asked.append(args[-1])
        return backward(*args)

    monkeypatch.setattr(module, "gelu_backward", spy)
    frozen = [bias.detach() for bias in biases]
    act = gelu(h, frozen, (9, 4), "tanh", "triton")
    check([act, *torch.autograd.grad(act, [h], dact)], exact(h, biases, (9, 4), "tanh", dact))
    act = gelu(h.detach(), [frozen[0], biases[1]], (9, 4), "tanh", "triton")
    (only,) = torch.autograd.grad(act, [biases[1]], dact)
    assert_near(only, exact(h, biases, (9, 4), "tanh", dact)[3])
    assert asked == [False, True]


@DEVICES
def test_the_same_call_gives_the_same_bits(device):
    h, biases, dact = case((300, 41), 64, device)
    runs = []
    for _ in range(3):
        act = gelu(h, biases, (300, 41), "tanh", "triton")
        runs.append([act, *torch.autograd.grad(act, [h, *biases], dact)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@DEVICES
def test_under_activation_checkpointing(device):
    h, biases, dact = case((9, 4), 64, device)
    plain = gelu(h, biases, (9, 4), "tanh", "triton")
    again = checkpoint(gelu, h, biases, (9, 4), "tanh", "triton", use_reentrant=False)
    for a, b in zip(*(torch.autograd.grad(act, [h, *biases], dact) for act in (plain, again))):
        assert torch.equal(a, b)


def test_torch_compile_passes_over_it(monkeypatch):
    h, biases, dact = case((9, 4), 64, "cuda" if HAS_GPU else "cpu")

    def double(h, biases):
        return 2 * gelu(h, biases, (9, 4), "tanh", "triton")

    compiled = torch.compile(double, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(h, biases), [h, *biases], dact) for f in (double, compiled))):
        assert torch.equal(a, b)


def test_on_the_meta_device_it_has_shapes():
    h, biases, dact = (x.to("meta") if torch.is_tensor(x) else x for x in case((9, 4), 64, dtype=torch.bfloat16))
    h, biases = leaf(h, "meta", torch.bfloat16), [leaf(bias, "meta", torch.bfloat16) for bias in biases]
    act = gelu(h, biases, (9, 4), "tanh", "triton")
    grads = torch.autograd.grad(act, [h, *biases], dact)
    assert [(g.shape, g.dtype) for g in (act, *grads)] == [(x.shape, x.dtype) for x in (h, h, *biases)]


@DEVICES
def test_the_operators_are_what_they_register(device):
    h, biases, dact = case((9, 4), 64, device)
    h, biases = h.detach(), [bias.detach() for bias in biases]
    tests = "test_schema", "test_faketensor"
    torch.library.opcheck(gelu_forward, (h, biases, 9, "tanh"), test_utils=tests)
    for again, sums in ((True, True), (False, False)):
        torch.library.opcheck(gelu_backward, (dact, h, biases, 9, "tanh", again, sums), test_utils=tests)


def test_chunks_are_few_enough_to_add_and_many_enough_to_fill_a_gpu():
    assert [chunk_rows(n) for n in (1, 33, 512, 4608, 16384, 10**7)] == [32, 32, 32, 128, 256, 256]


BAD = {
    "form must be tanh or sigmoid, got 'erf'": {"form": "erf"},
    "mode must be one of": {"mode": "cuda"},
    "h must have shape \\[rows, width\\], both at least 1, got \\[0, 8\\]": {"h": torch.zeros(0, 8)},
    "h must have shape \\[rows, width\\], both at least 1, got \\[7\\]": {"h": torch.zeros(7)},
    "h must be float32 or bfloat16, got float16": {"h": torch.zeros(7, 8, dtype=torch.float16)},
    "h must be contiguous, got strides \\[16, 1\\]": {"h": torch.zeros(7, 16)[:, :8]},
    "stream_rows must be one or two counts that sum to 7, got \\[4, 4\\]": {"stream_rows": (4, 4)},
    "stream_rows must be one or two counts that sum to 7, got \\[7, 0\\]": {"stream_rows": (7, 0)},
    "stream_rows must be one or two counts": {"stream_rows": (4, 2, 1)},
    "biases must be one for each of 2 streams, or none, got 1": {"biases": [torch.zeros(8)]},
    "biases\\[1\\] must have shape \\[8\\], got \\[7\\]": {"biases": [torch.zeros(8), torch.zeros(7)]},
    "biases\\[0\\] must be float32 or bfloat16, got float64": {"biases": [torch.zeros(8).double()] * 2},
    "biases\\[1\\] must be float32, got bfloat16": {"biases": [torch.zeros(8), torch.zeros(8).bfloat16()]},
    "biases\\[0\\] must be on cpu, got meta": {"biases": [torch.zeros(8, device="meta")] * 2},
    "biases\\[0\\] must be contiguous": {"biases": [torch.zeros(16)[::2]] * 2},
}


@pytest.mark.parametrize("mode", ["reference", pytest.param("triton", marks=CPU.marks)])
@pytest.mark.parametrize("message", BAD)
def test_gelu_refuses(message, mode):
    good = {"h": torch.zeros(7, 8), "biases": [torch.zeros(8)] * 2, "stream_rows": (4, 3), "mode": mode}
    gelu(**good)
    with pytest.raises(ValueError, match=message):
        gelu(**(good | BAD[message]))


def test_kernels_compile_for_a_gpu_without_one():
    compile_for_gpu("""
from dstrain.kernels import gelu as g
for kind, other, F, vector in (("*bf16", "*bf16", 12288, "ld.global.v4.b32"), ("*fp32", "*fp32", 20480, "v4.b32"),
                               ("*bf16", "*fp32", 5, "")):
    data = dict(h_ptr=kind, bias0_ptr=other, bias1_ptr=other)
    rows = dict(first="i32", rows="i32")
    R, B = g.tile(F, 4096)
    for TANH, BIAS in ((True, True), (False, False)):
        text = ptx(g._forward_kernel, data | dict(act_ptr=kind), rows, F=F, BIAS=BIAS, TANH=TANH, R=R, B=B)
        assert vector in text
    R, B = g.tile(F, 2048)
    for flag in (True, False):
        text = ptx(g._backward_kernel, data | dict(dact_ptr=kind, dh_ptr=kind, act_ptr=kind, partial_ptr="*fp32"),
                   rows | dict(size="i32"), F=F, BIAS=flag, SUMS=flag, AGAIN=flag, TANH=flag, R=R, B=B)
        assert vector in text
    ptx(g._sum_kernel, dict(partial_ptr="*fp32", out_ptr=other), dict(before="i32", chunks="i32"),
        F=F, R=g.SUM_ROWS, B=min(64, B))
""")

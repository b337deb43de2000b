"""Adaptive layer norm against plain PyTorch in fp64: in Triton's interpreter, or compiled if there is a GPU."""

import pytest
import torch
from kernel_cases import (
    CPU,
    DEVICES,
    DTYPES,
    HAS_GPU,
    assert_near,
    chunk_of,
    in_fp64,
    misaligned,
    poisoned,
)
from modulation_cases import EPS, Case, assert_all_near
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dstrain.kernels import modulation, modulation_ops
from dstrain.kernels.modulation import (
    gated_norm_modulate,
    gated_norm_modulate_reference,
    gated_residual,
    norm_modulate,
    norm_modulate_reference,
)
from dstrain.kernels.segments import Segments

OPS = pytest.mark.parametrize("op", ["norm", "gated_norm", "gated"])
FACES = pytest.mark.parametrize("mode", ["triton", "reference"])
SIZES = [  # lengths, streams, biases, width
    ((1,), 1, 1, 64),
    ((33, 2, 7, 1), 2, 2, 64),
    ((20, 9), 1, 0, 64),
    ((2, 1) * 3, 2, 2, 5),
    ((3, 20), 1, 1, 200),
    ((2, 1), 2, 2, 2100),
    ((2, 1), 1, 1, 3072),
    ((2,), 1, 1, 5120),
]


@DEVICES
@DTYPES
@FACES
@OPS
@pytest.mark.parametrize(("lengths", "streams", "biases", "width"), SIZES)
def test_values_and_all_gradients(device, dtype, mode, op, lengths, streams, biases, width, monkeypatch):
    if width > 2000 and not HAS_GPU:  # fewer programs for the interpreter
        monkeypatch.setattr(modulation_ops, "SUM_ROWS", 8)
        monkeypatch.setattr(modulation_ops, "SUM_COLUMNS", 512)
    case = Case(lengths, streams, biases, width, device, dtype)
    with poisoned():
        outputs = case.run(op, mode)
        grads = case.grads(op, outputs)
    # The reference adds two gradients of `out` in bf16, where autograd joins them.
    twice = op == "gated_norm" and mode == "reference" and dtype == torch.bfloat16
    assert_all_near(case, op, outputs, grads, atol=2.0**-7 if twice else None)


@pytest.mark.parametrize(("streams", "biases"), [(1, 0), (1, 1), (2, 2)])
def test_gradcheck_of_the_references(streams, biases):
    case = Case((2, 1, 3, 1), streams, biases, 3)
    of_row, _ = case.index
    x, h, gate, shift, scale, *rest = in_fp64(*case.inputs("gated_norm"))

    def run(x, h, gate, shift, scale, *biases):
        return gated_norm_modulate_reference(x, h, biases, gate, shift, scale, of_row, streams, EPS)

    assert torch.autograd.gradcheck(run, (x, h, gate, shift, scale, *rest))
    assert torch.autograd.gradcheck(norm_modulate_reference, (x, shift, scale, of_row, EPS))


@DEVICES
@DTYPES
@OPS
def test_rows_of_tables_may_lie_apart_and_memory_may_be_misaligned(device, dtype, op):
    case = Case((9, 2, 5, 4), 2, 2, 72, device, dtype)
    outputs = case.run(op, "triton")
    grads = case.grads(op, outputs)
    tables = {name: chunk_of(getattr(case, name)) for name in ("gate", "shift", "scale")}
    for name, tensor in tables.items():
        assert not tensor.is_contiguous()
        setattr(case, name, tensor)
    case.x, case.h, case.dout, case.dy = (misaligned(t) for t in (case.x, case.h, case.dout, case.dy))
    case.biases = [misaligned(bias) for bias in case.biases]
    assert case.x.data_ptr() % 16
    other = case.run(op, "triton")
    others = (*other, *case.grads(op, other))
    # A GPU reads less at a time, and may share out the columns of a sum differently.
    for name, a, b in zip((*("out", "y")[: len(outputs)], *case.names(op)), others, (*outputs, *grads)):
        assert_near(a, b, name)


@DEVICES
@OPS
def test_gradients_that_are_expanded_or_not_there(device, op):
    case = Case((4, 3), 1, 1, 8, device)
    for which in range(len(case.upstream(op))):
        grads = {}
        for mode in ("triton", "reference"):
            total = case.run(op, mode)[which].sum()
            grads[mode] = torch.autograd.grad(total, case.inputs(op), allow_unused=True, materialize_grads=True)
        for name, actual, wanted in zip(case.names(op), grads["triton"], grads["reference"]):
            torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=2e-5, msg=name)


class Launches(TorchDispatchMode):
    """Names and arguments of the launches made meanwhile."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dstrain":
            self.made.append((func._opname, args))
        return func(*args, **(kwargs or {}))


@DEVICES
@OPS
def test_frozen_tables_cost_nothing(device, op):
    case = Case((4, 3), 1, 1, 8, device)
    moving = [case.x] if op == "norm" else [case.x, case.h]
    wanted = case.grads(op, case.run(op, "triton"))
    for frozen in case.inputs(op)[len(moving) :]:
        frozen.requires_grad_(False)
    with Launches() as launches:
        grads = case.grads(op, case.run(op, "triton"), moving)
    assert all(torch.equal(a, b) for a, b in zip(grads, wanted))
    (forward, _), (backward, args) = launches.made
    assert (forward[-7:], backward[-8:]) == ("forward", "backward") and args[-1] is False


@DEVICES
@FACES
def test_sums_over_rows_are_not_rounded_as_they_grow(device, mode):
    case = Case((300,), 1, 1, 4, device, torch.bfloat16)
    with torch.no_grad():
        case.dy.fill_(1), case.dout.fill_(1), case.gate.fill_(1), case.h.fill_(1), case.biases[0].zero_()
    _, dshift, _ = case.grads("norm", case.run("norm", mode))
    _, _, dgate, dbias = case.grads("gated", case.run("gated", mode))
    for grad in (dshift, dgate, dbias):
        assert (grad == 300).all()  # bf16 added to bf16 stays at 256


@DEVICES
def test_a_large_mean_does_not_swallow_the_variance(device):
    case = Case((6,), 1, 0, 64, device)
    case.x.data = case.x.data / 8 + 100  # E[x^2] - E[x]^2 would be nothing but rounding
    (y,) = case.run("norm", "triton")
    (wanted,), _ = case.wanted("norm", None)
    torch.testing.assert_close(y.double(), wanted, rtol=0, atol=2e-3)


@DEVICES
@OPS
def test_the_same_call_gives_the_same_bits(device, op):
    case = Case((40, 3), 2, 2, 8, device)
    runs = []
    for _ in range(3):
        outputs = case.run(op, "triton")
        runs.append((*outputs, *case.grads(op, outputs)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@DEVICES
@OPS
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_where_they_are(device, op, bad):
    case = Case((4, 3, 5, 2), 2, 2, 20, device)
    with torch.no_grad():
        case.x[1, 3] = case.h[5, 2] = case.dy[12, 0] = bad
        case.gate[2, 7] = 0.0
        case.h[8, 7] = bad  # times a gate of zero
    results = {}
    for mode in ("triton", "reference"):
        outputs = case.run(op, mode)
        results[mode] = (*outputs, *case.grads(op, outputs))
    for name, actual, wanted in zip((*("out", "y")[: len(outputs)], *case.names(op)), *results.values()):
        clean = wanted.isfinite()
        if bad == float("inf") and op != "gated":
            # torch's layer_norm gives some numbers in a row with an infinity: there NaN is as good.
            assert not actual.isfinite()[~clean].any(), name
            clean = clean.all(1) if clean.ndim == 2 else clean & actual.isfinite()
            assert actual[clean].isfinite().all(), name
        else:
            assert torch.equal(actual.isnan(), wanted.isnan()) and torch.equal(actual.isinf(), wanted.isinf()), name
        assert_near(actual[clean], wanted[clean], name)


@DEVICES
@OPS
def test_same_gradients_under_activation_checkpointing(device, op):
    case = Case((4, 3), 1, 1, 16, device, torch.bfloat16)
    wanted = case.grads(op, case.run(op, "triton"))
    outputs = checkpoint(lambda *inputs: case.run(op, "triton", inputs), *case.inputs(op), use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(case.grads(op, outputs), wanted))


@DEVICES
@OPS
def test_in_a_compiled_function(device, op, monkeypatch):
    case = Case((4, 3), 1, 1, 16, device)
    case.run(op, "triton")  # the chunks are laid out once, on the host
    torch._dynamo.reset()
    function = torch.compile(
        lambda *inputs: [2 * out for out in case.run(op, "triton", inputs)], backend="eager", fullgraph=True
    )
    outputs = [out / 2 for out in function(*case.inputs(op))]
    plain = case.run(op, "triton")
    for a, b in zip((*outputs, *case.grads(op, outputs)), (*plain, *case.grads(op, plain))):
        torch.testing.assert_close(a, b)


@OPS
def test_on_the_meta_device_results_have_their_shapes(op):
    case = Case((4, 3), 2, 2, 16, "meta", torch.bfloat16)
    outputs = case.run(op, "triton")
    for given, made in zip([case.x, case.x, *case.inputs(op)], [outputs[0], outputs[-1], *case.grads(op, outputs)]):
        assert (made.shape, made.dtype, made.device) == (given.shape, given.dtype, given.device)


@OPS
def test_the_compiled_face_is_the_reference(op, monkeypatch):
    called = []
    monkeypatch.setattr(modulation, "compiled", lambda function: called.append(function) or function)
    case = Case((4, 3), 2, 2, 16)
    assert all(torch.equal(a, b) for a, b in zip(case.run(op, "compile"), case.run(op, "reference")))
    assert called == [getattr(modulation, name) for name in dir(modulation) if name == called[0].__name__]


BAD = {
    "x must have shape \\[rows, columns\\], both at least 1, got \\[7\\]": {"x": torch.zeros(7)},
    "x must have shape \\[rows, columns\\], both at least 1, got \\[7, 0\\]": {"x": torch.zeros(7, 0)},
    "x must have the 7 rows of its segments, got 6": {"x": torch.zeros(6, 8)},
    "x must be float32 or bfloat16, got float16": {"x": torch.zeros(7, 8, dtype=torch.float16)},
    "x must be contiguous, got strides": {"x": torch.zeros(8, 7).T},
    "segments must be on cpu, like x, got meta": {"segments": Segments((4, 3), "meta", 2)},
    "h must have shape \\[7, 8\\], got \\[8, 8\\]": {"h": torch.zeros(8, 8)},
    "h must be float32, got bfloat16": {"h": torch.zeros(7, 8, dtype=torch.bfloat16)},
    "h must be on cpu, got meta": {"h": torch.zeros(7, 8, device="meta")},
    "h must be contiguous, got strides": {"h": torch.zeros(7, 16)[:, ::2]},
    "gate must have shape \\[2, 8\\], got \\[1, 8\\]": {"gate": torch.zeros(1, 8)},
    "gate must be float32, got bfloat16": {"gate": torch.zeros(2, 8, dtype=torch.bfloat16)},
    "shift must have rows without gaps, got strides": {"shift": torch.zeros(8, 2).T},
    "shift must be float32, got float64": {"shift": torch.zeros(2, 8, dtype=torch.float64)},
    "scale must have shape \\[2, 8\\], got \\[2, 9\\]": {"scale": torch.zeros(2, 9)},
    "scale must be on cpu, got meta": {"scale": torch.zeros(2, 8, device="meta")},
    "biases must be none or one for each of at most two streams, got 1 for 2": {"biases": [torch.zeros(8)]},
    "at most two streams, got 4 for 4": {"biases": [torch.zeros(8)] * 4, "segments": Segments((2, 2, 2, 1), "cpu", 4)}
    | {name: torch.zeros(4, 8) for name in ("gate", "shift", "scale")},
    "biases\\[1\\] must have shape \\[8\\], got \\[7\\]": {"biases": [torch.zeros(8), torch.zeros(7)]},
    "biases\\[0\\] must be float32": {"biases": [torch.zeros(8).bool(), torch.zeros(8)]},
    "biases\\[1\\] must be contiguous": {"biases": [torch.zeros(8), torch.zeros(16)[::2]]},
    "mode must be one of auto, reference, triton, compile, got 'cuda'": {"mode": "cuda"},
}


@pytest.mark.parametrize("mode", ["reference", pytest.param("triton", marks=CPU.marks)])
@pytest.mark.parametrize("message", BAD)
def test_refusals_name_the_tensor(message, mode):
    rows, tables = torch.zeros(7, 8), torch.zeros(2, 8)
    good = {"x": rows, "h": rows, "biases": [torch.zeros(8)] * 2, "gate": tables, "shift": tables, "scale": tables}
    bad = good | {"segments": Segments((4, 3), "cpu", 2), "mode": mode} | BAD[message]
    takers = {
        gated_norm_modulate: ("x", "h", "biases", "gate", "shift", "scale", "segments", "mode"),
        gated_residual: ("x", "h", "biases", "gate", "segments", "mode"),
        norm_modulate: ("x", "shift", "scale", "segments", "mode"),
    }
    for function, names in takers.items():
        if function is gated_norm_modulate or set(BAD[message]) <= set(names) - {"segments"}:
            with pytest.raises(ValueError, match=message):
                function(**{name: bad[name] for name in names})


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not HAS_GPU, reason="no GPU")
def test_offsets_past_two_to_the_31_elements():
    width = 4096
    case = Case((3,), 1, 1, width, "cuda", torch.bfloat16)
    rows = 2**31 // width
    big = Segments((rows, 3), "cuda")
    tables = [torch.cat([t.detach(), t.detach()]) for t in (case.gate, case.shift, case.scale)]

    def at_the_end(tensor):
        return torch.cat([tensor.new_zeros(rows, width), tensor.detach()]).requires_grad_()

    x, h = at_the_end(case.x), at_the_end(case.h)
    outputs = gated_norm_modulate(x, h, case.biases, *tables, big, EPS)
    wanted = case.run("gated_norm", "triton")
    assert all(torch.equal(a[-3:], b) for a, b in zip(outputs, wanted))
    grads = torch.autograd.grad(outputs, [x, h], [at_the_end(case.dout), at_the_end(case.dy)])
    assert all(torch.equal(a[-3:], b) for a, b in zip(grads, case.grads("gated_norm", wanted)))

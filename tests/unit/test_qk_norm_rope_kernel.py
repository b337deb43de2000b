"""RMSNorm and rotary embedding of q and k against plain PyTorch in fp64: interpreted, or compiled if there is a GPU."""

import pytest
import torch
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

from dstrain.kernels import qk_norm_rope as module
from dstrain.kernels.qk_norm_rope import (
    qk_norm_rope,
    qk_norm_rope_backward,
    qk_norm_rope_forward,
    qk_norm_rope_reference,
)
from dstrain.models.packing import PackLayout
from dstrain.models.qwen_image import rotary_table

BF16 = torch.bfloat16
CASES = pytest.mark.parametrize(
    ("stream_rows", "heads", "d", "biased", "moved"),
    [
        ((1,), 1, 64, True, False),
        ((3, 8), 3, 128, True, True),
        ((1, 1), 2, 128, True, True),
        ((6,), 5, 64, False, True),
        ((4, 3), 9, 32, True, False),
        ((2, 5), 3, 24, True, True),
        ((2, 3), 2, 6, True, True),
        ((3,), 1, 2, True, True),
        ((0, 3), 2, 8, True, True),
        ((17, 22), 1, 8, True, True),  # several chunks of each stream, the last ones short
        ((1, 1), 40, 128, True, True),  # the width of Wan-14B
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else None,
)


class Case:
    """Random q and k, their parameters, and upstream gradients."""

    def __init__(self, stream_rows, heads, d, biased=True, moved=True, device="cpu", dtype=torch.float32):
        torch.manual_seed(sum(stream_rows) * heads * d)
        self.stream_rows = tuple(stream_rows)
        rows, streams = sum(stream_rows), len(stream_rows)
        # Weights of a pair differ by at most four times, or what is left of the lesser in bf16 is too little to test.
        sizes = [(rows, heads, d)] * 2 + [(heads * d,)] * (2 * streams * biased)
        self.inputs = [leaf(torch.randn(size), device, dtype) for size in sizes]
        weights = [(0.5 + 1.5 * torch.rand(d)) * torch.randn(d).sign() for _ in range(2 * streams)]
        self.inputs += [leaf(weight, device, dtype) for weight in weights]
        angles = torch.rand(rows, d // 2) * 100
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)
        self.places = torch.randperm(rows).to(device) if moved else None
        self.upstream = [torch.randn(rows, heads, d).to(device, dtype) for _ in range(2)]

    def groups(self, inputs):
        streams = len(self.stream_rows)
        q, k, *rest = inputs
        *biases, q_weights, k_weights = (rest[i : i + streams] for i in range(0, len(rest), streams))
        return q, k, *(biases or ((), ())), q_weights, k_weights

    def __call__(self, inputs=None, mode=None, **changed):
        names = "q", "k", "q_biases", "k_biases", "q_weights", "k_weights"
        args = dict(zip(names, self.groups(self.inputs if inputs is None else inputs)))
        args |= {name: getattr(self, name) for name in ("cos", "sin", "places", "stream_rows")} | changed
        return qk_norm_rope(**args, mode=mode) if mode else qk_norm_rope_reference(**args)

    def grads(self, outputs, inputs=None):
        inputs = self.inputs if inputs is None else inputs
        return torch.autograd.grad(outputs, inputs, [u.to(outputs[0].dtype) for u in self.upstream])

    def wanted(self):
        """Outputs and gradients in fp64, from the same numbers."""
        inputs = in_fp64(*self.inputs)
        cos, sin = self.cos.double(), self.sin.double()
        outputs = self(inputs, cos=cos, sin=sin)
        return outputs, self.grads(outputs, inputs)


def check(case, outputs, grads, kept_inputs):
    wanted, wanted_grads = case.wanted()
    for name, actual, right in zip("qk", outputs, wanted):
        assert actual.dtype == case.inputs[0].dtype
        assert_near(actual, right, name)
    # From a bf16 output xhat comes back with an error of 2^-9 (the interpreter, which cuts off: 2^-8) of its pair's
    # larger channel, here of up to four times the weight; what it is multiplied with is a mean over d channels.
    noise = {torch.float32: 1e-5, BF16: 2.0**-4 / case.inputs[-1].numel() ** 0.5}[case.inputs[0].dtype]
    atol = None if kept_inputs else noise
    for i, (grad, right) in enumerate(zip(grads, wanted_grads)):
        assert grad.dtype == case.inputs[i].dtype
        assert_near(grad, right, f"gradient {i}", atol)


@DEVICES
@CASES
@DTYPES
def test_values_and_gradients(device, stream_rows, heads, d, biased, moved, dtype, monkeypatch):
    if device == "cpu" and heads * d > 1024:  # many programs are what takes the interpreter long
        monkeypatch.setattr(module, "SUM_TILE", (4, 512))
    case = Case(stream_rows, heads, d, biased, moved, device, dtype)
    with poisoned():
        outputs = case(mode="triton")
        grads = case.grads(outputs)
    check(case, outputs, grads, kept_inputs=False)


@CASES
@DTYPES
def test_the_reference(stream_rows, heads, d, biased, moved, dtype):
    case = Case(stream_rows, heads, d, biased, moved, dtype=dtype)
    outputs = case(mode="reference")
    check(case, outputs, case.grads(outputs), kept_inputs=True)


def test_gradcheck_of_the_reference():
    case = Case((2, 1), 2, 4)
    inputs = in_fp64(*case.inputs)
    cos, sin = case.cos.double(), case.sin.double()
    assert torch.autograd.gradcheck(lambda *x: case(x, cos=cos, sin=sin), inputs)


@DEVICES
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_it_is_what_the_joint_attention_of_qwen_image_reads(device, mode):
    layout = PackLayout.build([[(1, 2, 3)], [(1, 1, 2)]], [2, 1], device)
    streams = sum(layout.text_lens), sum(layout.image_lens)
    case = Case(streams, 2, 16, device=device)
    table = rotary_table(layout, (4, 6, 6))
    outputs = case(mode=mode, places=table.places, cos=table.cos, sin=table.sin)
    turn = torch.complex(table.cos, table.sin)[:, None]  # [S, 1, d / 2]
    q, k, q_biases, k_biases, q_weights, k_weights = case.groups(case.inputs)
    for actual, x, biases, weights in ((outputs[0], q, q_biases, q_weights), (outputs[1], k, k_biases, k_weights)):
        parts = zip(x.split(streams), biases, weights)
        normed = [torch.nn.functional.rms_norm(p + b.view(p.shape[1:]), (16,), w, 1e-6) for p, b, w in parts]
        pairs = torch.view_as_complex(torch.cat(normed)[table.rows].unflatten(-1, (-1, 2)))
        torch.testing.assert_close(actual, torch.view_as_real(pairs * turn).flatten(-2), rtol=1e-5, atol=1e-5)


@DEVICES
def test_eps_counts_where_the_input_is_small(device):
    case = Case((3, 2), 2, 8, biased=False, device=device)
    case.inputs[:2] = [leaf(x * 1e-3, device) for x in case.inputs[:2]]
    outputs = case(mode="triton", eps=3e-6)
    inputs = in_fp64(*case.inputs)
    wanted = case(inputs, cos=case.cos.double(), sin=case.sin.double(), eps=3e-6)
    for actual, right in zip((*outputs, *case.grads(outputs)), (*wanted, *case.grads(wanted, inputs))):
        assert_near(actual, right, atol=1e-5)
    assert not torch.allclose(outputs[0], case(mode="triton")[0], rtol=0.1)


@DEVICES
@DTYPES
def test_weights_of_zero_count_as_the_least_and_have_a_gradient(device, dtype):
    case = Case((4, 3), 2, 8, device=device, dtype=dtype)
    with torch.no_grad():
        for weight in case.inputs[-4:]:
            weight[:4] = torch.tensor([0.0, -0.0, 2.0**-30, -(2.0**-21)])
    outputs = case(mode="triton")
    # A weight of zero gives channels that are small but there, so that the backward finds them.
    for actual, right in zip(outputs, case.wanted()[0]):
        assert 0 < right[..., :4].abs().max() < 4 * 2.0**-20
        assert_near(actual[..., :4], right[..., :4], atol=2.0**-8)
    check(case, outputs, case.grads(outputs), kept_inputs=False)
    assert all(grad[:4].abs().min() > 0 for grad in case.grads(case(mode="triton"))[-4:])


@DEVICES
@DTYPES
def test_a_channel_drowned_by_its_partner_fades_and_does_not_blow_up(device, dtype):
    case = Case((40,), 2, 16, device=device, dtype=dtype)
    unit = 2.0**-9 if dtype == BF16 else 2.0**-20
    with torch.no_grad():
        for weight in case.inputs[-2:]:
            weight[1::2] = torch.tensor([1.0, 0.5, 2.0**-3, 2.0**-6, 2.0**-9, 2.0**-12, 2.0**-16, 0.0], dtype=dtype)
            weight[0::2] = 1
    outputs = case(mode="triton")
    grads = case.grads(outputs)
    _, wanted = case.wanted()
    # The channels that are there to see are right, and no other is off by more than xhat itself could make it.
    for grad, right in zip(grads[:2], wanted[:2]):
        error = (grad.double() - right).abs()
        assert error.max() < 0.5 * right.abs().max()
        assert error[..., :6].max() < (2.0**-6 if dtype == BF16 else 1e-5) * right.abs().max()
    for grad, right in zip(grads[-2:], wanted[-2:]):
        error = (grad.double() - right).abs() / right.abs().max()
        assert error.max() < 1.5 and error[:6].max() < 16 * unit + 1e-5


@DEVICES
@DTYPES
def test_misaligned_memory(device, dtype):
    case = Case((3, 4), 2, 64, device=device, dtype=dtype)
    wanted = case(mode="triton")
    wanted_grads = case.grads(wanted)
    case.inputs = [misaligned(x) for x in case.inputs]
    case.cos, case.sin, case.places = misaligned(case.cos), misaligned(case.sin, 3), misaligned(case.places)
    case.upstream = [misaligned(x) for x in case.upstream]
    outputs = case(mode="triton")
    assert all(map(torch.equal, (*outputs, *case.grads(outputs)), (*wanted, *wanted_grads)))


@DEVICES
def test_upstream_gradients_with_strides_and_of_one_output_only(device):
    case = Case((3, 4), 2, 8, device=device)
    inputs = in_fp64(*case.inputs)
    wanted = case(inputs, cos=case.cos.double(), sin=case.sin.double())
    for loss in (lambda q, k: q.sum() + k.square().sum(), lambda q, k: (q.transpose(0, 1) * 3).sum()):
        grads = torch.autograd.grad(loss(*case(mode="triton")), case.inputs)
        right = torch.autograd.grad(loss(*wanted), inputs, retain_graph=True, allow_unused=True)
        for actual, expected in zip(grads, right):
            assert_near(actual, torch.zeros_like(actual) if expected is None else expected, atol=1e-5)


@DEVICES
def test_what_is_frozen_costs_nothing(device, monkeypatch):
    launches = []

    class Counted:
        def __init__(self, name):
            self.name, self.kernel = name, getattr(module, name)

        def __getitem__(self, grid):
            launches.append(self.name)
            return self.kernel[grid]

    for name in ("forward_kernel", "backward_kernel", "sum_kernel"):
        monkeypatch.setattr(module, name, Counted(name))
    case = Case((3, 4), 2, 8, device=device)
    every = case.grads(case(mode="triton"))
    assert launches == ["forward_kernel", "backward_kernel", "sum_kernel"]
    for frozen in (slice(2, 10), slice(2, 6), slice(6, 10), slice(3, 4), slice(0, 2)):
        for i, x in enumerate(case.inputs):
            x.requires_grad_(i not in range(*frozen.indices(10)))
        launches.clear()
        alive = [i for i, x in enumerate(case.inputs) if x.requires_grad]
        grads = case.grads(case(mode="triton"), [case.inputs[i] for i in alive])
        assert all(torch.equal(grad, every[i]) for grad, i in zip(grads, alive))
        assert launches[2:] == ([] if frozen == slice(2, 10) else ["sum_kernel"])


@DEVICES
def test_only_results_and_one_number_a_head_are_kept(device):
    case = Case((3, 4), 2, 8, device=device, dtype=BF16)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        q_out, k_out = case(mode="triton")
    alive = {t.data_ptr() for t in (q_out, k_out, case.cos, case.sin, case.places, *case.inputs[-4:])}
    assert {q_out.data_ptr(), k_out.data_ptr()} <= {t.data_ptr() for t in kept}
    extra = [t for t in kept if t.data_ptr() not in alive]
    assert [(t.dtype, tuple(t.shape)) for t in extra] == [(torch.float32, (7, 2))] * 2


@DEVICES
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_the_same_call_gives_the_same_bits(device, mode):
    case = Case((17, 22), 1, 8, device=device)
    runs = []
    for _ in range(2):
        outputs = case(mode=mode)
        runs.append((*outputs, *case.grads(outputs)))
    assert all(map(torch.equal, *runs))


@DEVICES
def test_under_activation_checkpointing(device):
    case = Case((3, 4), 2, 8, device=device)
    wanted = case.grads(case(mode="triton"))
    outputs = checkpoint(lambda *x: case(x, "triton"), *case.inputs, use_reentrant=False)
    assert all(map(torch.equal, case.grads(outputs), wanted))


@DEVICES
def test_nan_and_inf_stay_in_their_head(device):
    case = Case((4, 3), 3, 8, device=device)
    with torch.no_grad():
        case.inputs[0][2, 1, 3], case.inputs[0][5, 2, 0], case.inputs[1][6, 0, 1] = (
            float("nan"),
            float("inf"),
            -torch.inf,
        )
    outputs, (wanted, wanted_grads) = case(mode="triton"), case.wanted()
    grads = case.grads(outputs)
    for actual, right in zip((*outputs, *grads[:2]), (*wanted, *wanted_grads)):
        assert_near(actual, right, atol=1e-5)
    for grad, right in zip(grads[2:], wanted_grads[2:]):
        assert grad[right.isnan()].isnan().all()
        # An infinite channel makes its partner NaN when they are turned, and turned back that one is NaN too.
        alike = ~(right.isnan() | right.isnan().view(-1, 2).flip(1).flatten())
        assert_near(grad[alike], right[alike], atol=1e-5)
    dq = grads[0].isfinite().all(-1)
    assert (~dq).nonzero().tolist() == [[2, 1], [5, 2]]
    case.upstream[1][int(case.places[0]), 2, 0] = float("nan")
    dk = case.grads(case(mode="triton"))[1].isfinite().all(-1)
    assert (~dk).nonzero().tolist() == [[0, 2], [6, 0]]


@DEVICES
def test_a_row_that_goes_nowhere_is_not_written_and_has_no_gradient(device):
    # The dispatcher refuses such places where it reads them; on a GPU it does not wait, and memory must stay whole.
    case = Case((4, 3), 3, 8, device=device)
    wanted = case(mode="triton")
    places = case.places.clone()
    places[1], places[5] = 7, -1
    lists = [list(group) for group in case.groups(case.inputs)[2:]]
    q, k = case.inputs[:2]
    q_out, k_out, *rstd = qk_norm_rope_forward(q, k, *lists, case.cos, case.sin, places, 4, 1e-6)
    there = case.places[[0, 2, 3, 4, 6]]
    assert torch.equal(q_out[there], wanted[0][there]) and torch.equal(k_out[there], wanted[1][there])
    tables = case.cos, case.sin, places, 4
    dq, dk, *_ = qk_norm_rope_backward(*case.upstream, q_out, k_out, *rstd, *lists[2:], *tables, None, False)
    for grad in (dq, dk):
        assert grad.isnan().all(2).all(1).nonzero().flatten().tolist() == [1, 5]
        assert grad[[0, 2, 3, 4, 6]].isfinite().all()


@DEVICES
def test_inside_a_compiled_function(device, monkeypatch):
    case = Case((3, 2), 2, 8, device=device)

    @torch.compile(fullgraph=True, backend="eager")
    def function(*inputs):
        return case([inputs[0] * 1, *inputs[1:]], "triton")

    outputs = function(*case.inputs)
    wanted = case(mode="triton")
    assert all(map(torch.equal, (*outputs, *case.grads(outputs)), (*wanted, *case.grads(wanted))))


def test_on_the_meta_device_and_compiled(monkeypatch):
    case = Case((3, 2), 2, 8, device="meta", dtype=BF16)
    outputs = case(mode="triton")
    for actual, like in zip((*outputs, *case.grads(outputs)), (*case.inputs[:2], *case.inputs)):
        assert actual.is_meta and actual.shape == like.shape and actual.dtype == like.dtype
    monkeypatch.setattr(module, "compiled", lambda function: lambda *args: (function, len(args)))
    assert Case((2, 1), 1, 4)(mode="compile") == (qk_norm_rope_reference, 11)


@DEVICES
def test_the_operators_keep_torchs_rules(device):
    case = Case((2, 1), 1, 4, device=device)
    q, k, *groups = case.groups([x.detach() for x in case.inputs])
    lists = [list(group) for group in groups]
    tests = "test_schema", "test_faketensor"
    tables = case.cos, case.sin, case.places, 2
    torch.library.opcheck(qk_norm_rope_forward, (q, k, *lists, *tables, 1e-6), test_utils=tests)
    outs = qk_norm_rope_forward(q, k, *lists, *tables, 1e-6)
    for flags in ((None, False), (BF16, True)):
        torch.library.opcheck(
            qk_norm_rope_backward, (*case.upstream, *outs, *lists[2:], *tables, *flags), test_utils=tests
        )


def vectors(count, size, **options):
    return [torch.zeros(size, **options) for _ in range(count)]


BAD = {
    "q must have shape \\[rows, heads, d\\]": {"q": torch.zeros(7, 16)},
    "none empty": {"q": torch.zeros(0, 2, 8)},
    "q must be float32 or bfloat16, got float16": {"q": torch.zeros(7, 2, 8, dtype=torch.float16)},
    "q must be contiguous": {"q": torch.zeros(7, 8, 2).transpose(1, 2)},
    "k must have shape \\[7, 2, 8\\], got \\[7, 1, 8\\]": {"k": torch.zeros(7, 1, 8)},
    "k must be float32, got bfloat16": {"k": torch.zeros(7, 2, 8, dtype=BF16)},
    "k must be on": {"k": torch.zeros(7, 2, 8, device="meta")},
    "q_biases must be 2, one for each stream, got 1": {"q_biases": vectors(1, 16)},
    "k_biases must be 2, one for each stream, got 0": {"k_biases": []},
    "q_biases\\[1\\] must have shape \\[16\\], got \\[8\\]": {"q_biases": [*vectors(1, 16), *vectors(1, 8)]},
    "k_biases\\[0\\] must be float32, got bfloat16": {"k_biases": vectors(2, 16, dtype=BF16)},
    "q_weights must be 2, one for each stream, got 3": {"q_weights": vectors(3, 8)},
    "k_weights\\[0\\] must be float32, got bfloat16": {"k_weights": vectors(2, 8, dtype=BF16)},
    "q_weights\\[0\\] must be contiguous": {"q_weights": [torch.zeros(16)[::2], *vectors(1, 8)]},
    "cos must have shape \\[7, 4\\], got \\[7, 1, 4\\]": {"cos": torch.zeros(7, 1, 4)},
    "cos must not require a gradient": {"cos": torch.zeros(7, 4, requires_grad=True)},
    "sin must be contiguous": {"sin": torch.zeros(4, 7).T},
    "places must be int64, got int32": {"places": torch.arange(7, dtype=torch.int32)},
    "places must be a permutation of 0 to 6, got \\[1, 1,": {"places": torch.tensor([1, 1, 2, 3, 4, 5, 6])},
    "places must be a permutation of 0 to 6, got \\[1, 2,": {"places": torch.arange(7) + 1},
    "stream_rows must be one or two counts that sum to 7, got \\[4, 4\\]": {"stream_rows": (4, 4)},
    "stream_rows must be .* got \\[8, -1\\]": {"stream_rows": (8, -1)},
    "stream_rows must be .* got \\[2, 2, 3\\]": {"stream_rows": (2, 2, 3)},
    "mode must be one of auto, reference, triton, compile, got 'cuda'": {"mode": "cuda"},
}


@pytest.mark.parametrize("mode", ["reference", pytest.param("triton", marks=CPU.marks)])
@pytest.mark.parametrize("message", BAD)
def test_refused(message, mode):
    with pytest.raises(ValueError, match=message):
        Case((4, 3), 2, 8)(**({"mode": mode} | BAD[message]))


def test_kernels_compile_for_a_gpu_without_one():
    compile_for_gpu("""
from dstrain.kernels import qk_norm_rope_kernels as f

def pointers(names, kind):
    return {f"{name}_ptr": kind for name in names.split()}

counts = dict(rows="i32", first="i32", size="i32")
fixed = pointers("cos sin q_rstd k_rstd bias_partial weight_partial", "*fp32") | pointers("places", "*i64")
weights = "q_weight0 q_weight1 k_weight0 k_weight1"
cases = ("*bf16", 24, 128, 8, True), ("*fp32", 40, 128, 8, True), ("*bf16", 3, 24, 4, False)
for kind, heads, d, tile, moved in cases:
    shape = dict(H=heads, D=d, HB=tile, DP=max(32, d), PLACES=moved)
    names = f"q k q_bias0 q_bias1 k_bias0 k_bias1 {weights} q_out k_out"
    code = ptx(f.forward_kernel, pointers(names, kind) | fixed, counts | dict(eps="fp32"), BIAS=moved, **shape)
    assert "ld.global.v4.b32" in code or d < 32
    names = f"dq_out dk_out q_out k_out {weights} dq dk"
    options = dict(BIAS=moved, WEIGHT=True, UNIT=2.0**-9)
    code = ptx(f.backward_kernel, pointers(names, kind) | fixed, counts | dict(chunks="i32"), **options, **shape)
    assert "ld.global.v4.b32" in code or d < 32
    sums = pointers("dq_bias dk_bias dq_weight dk_weight", kind) | fixed
    sizes = dict(WIDTH=heads * d, D=d, GROUPS=heads // tile, R=64, B=32)
    ptx(f.sum_kernel, sums, dict(before="i32", chunks="i32"), BIAS=moved, WEIGHT=True, **sizes)
""")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not HAS_GPU, reason="no GPU")
def test_offsets_past_two_to_the_31_elements():
    rows, last = 2**20 + 3, slice(-3, None)
    big = torch.zeros(rows, 16, 128, dtype=BF16, device="cuda")
    few = Case((3,), 16, 128, biased=False, moved=False, device="cuda", dtype=BF16)
    big[last] = few.inputs[0].detach()
    table = torch.zeros(rows, 64, device="cuda")
    cos, sin = table.clone(), table
    cos[last], sin[last] = few.cos, few.sin
    few.inputs[1] = few.inputs[0]
    wanted, _ = few(mode="triton")
    weights = [[few.inputs[2]], [few.inputs[3]]]
    places = torch.arange(rows, device="cuda")
    big.requires_grad_()
    q_out, _ = qk_norm_rope(big, big.detach(), [], [], *weights, cos, sin, places, (rows,), mode="triton")
    assert torch.equal(q_out[last], wanted)
    (grad,) = torch.autograd.grad(q_out[last], big, few.upstream[0])
    (right,) = torch.autograd.grad(wanted, few.inputs[0], few.upstream[0])
    assert torch.equal(grad[last], right)

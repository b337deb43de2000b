"""The flow-matching kernels against plain PyTorch in fp64: in Triton's interpreter, or compiled if there is a GPU."""

import subprocess
import sys

import pytest
import torch
from kernel_cases import CPU, DEVICES, HAS_GPU, compile_for_gpu, misaligned, poisoned
from torch.utils.checkpoint import checkpoint

from dstrain.kernels import backend, flow_match
from dstrain.kernels.backend import choose
from dstrain.kernels.flow_match import (
    add_noise,
    add_noise_forward,
    add_noise_reference,
    noise_reference,
    velocity_loss,
    velocity_loss_backward,
    velocity_loss_forward,
    velocity_loss_reference,
)

SHAPES = pytest.mark.parametrize(
    ("counts", "channels"),
    [
        ((1,), 64),
        ((1,), 5),
        ((33, 2, 7), 64),
        ((20, 1, 51), 16),
        ((7, 1, 9), 5),
        ((9, 4), 7),
        ((3, 2), 1),
        ((1030, 3), 4),
    ],
)
SEED = 2**40 + 3


class Pack:
    """Random latents and predictions, and the index, of samples with `counts` tokens."""

    def __init__(self, counts, channels, device="cpu", pred_dtype=torch.float32, x0_dtype=torch.float32):
        torch.manual_seed(sum(counts) * channels)
        samples = len(counts)
        self.token_counts = torch.tensor(counts, device=device)
        self.first_token = self.token_counts.cumsum(0) - self.token_counts
        self.sample_index = torch.arange(samples, device=device).repeat_interleave(
            self.token_counts, output_size=sum(counts)
        )
        self.draws = torch.tensor([2, 2**35 + 1, 77], device=device)[:samples]
        self.sigmas = torch.rand(samples).to(device)
        self.weights = (torch.rand(samples) + 0.5).to(device)
        self.upstream = torch.randn(samples).to(device)
        self.x0 = torch.randn(sum(counts), channels).to(device, x0_dtype).requires_grad_()
        self.pred = torch.randn(sum(counts), channels).to(device, pred_dtype).requires_grad_()

    def noised(self, x0, mode=None):
        args = x0, self.sigmas, self.sample_index, self.first_token, SEED, self.draws
        return add_noise(*args, mode) if mode else add_noise_reference(*args)

    def loss(self, pred, x0, mode=None):
        where = self.sample_index, self.first_token, self.token_counts
        args = pred, x0, self.weights, *where, SEED, self.draws
        return velocity_loss(*args, mode) if mode else velocity_loss_reference(*args)

    def in_fp64(self):
        return (t.detach().double().requires_grad_() for t in (self.pred, self.x0))


def tolerance(dtype, roundings=1):
    # A bf16 ulp each: a GPU rounds to the nearest, but the interpreter cuts off.
    return {"rtol": roundings * 2.0**-7, "atol": 0} if dtype == torch.bfloat16 else {"rtol": 2e-5, "atol": 2e-7}


@DEVICES
@SHAPES
@pytest.mark.parametrize("x0_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_add_noise(device, counts, channels, x0_dtype, mode):
    pack = Pack(counts, channels, device, x0_dtype=x0_dtype)
    _, x0 = pack.in_fp64()
    wanted = pack.noised(x0)
    with poisoned():
        x_t = pack.noised(pack.x0, mode)
    assert x_t.dtype == torch.float32
    torch.testing.assert_close(x_t, wanted.float(), rtol=2e-6, atol=1e-6)

    upstream = torch.randn_like(x_t)
    (wanted_grad,) = torch.autograd.grad(wanted, x0, upstream.double())
    (grad,) = torch.autograd.grad(x_t, pack.x0, upstream)
    torch.testing.assert_close(grad, wanted_grad.to(x0_dtype), **tolerance(x0_dtype))


@DEVICES
@SHAPES
@pytest.mark.parametrize("pred_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x0_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_velocity_loss(device, counts, channels, pred_dtype, x0_dtype, mode):
    pack = Pack(counts, channels, device, pred_dtype, x0_dtype)
    pred, x0 = pack.in_fp64()
    wanted = pack.loss(pred, x0)
    with poisoned():
        loss = pack.loss(pack.pred, pack.x0, mode)
        grads = torch.autograd.grad(loss, [pack.pred, pack.x0], pack.upstream)
    assert loss.dtype == torch.float32 and loss.shape == (len(counts),)
    torch.testing.assert_close(loss, wanted.float(), rtol=3e-6, atol=0)

    wanted_grads = torch.autograd.grad(wanted, [pred, x0], pack.upstream.double())
    coarsest = torch.bfloat16 if torch.bfloat16 in (pred_dtype, x0_dtype) else torch.float32
    torch.testing.assert_close(grads[0], wanted_grads[0].to(pred_dtype), **tolerance(pred_dtype, 2))
    torch.testing.assert_close(grads[1], wanted_grads[1].to(x0_dtype), **tolerance(coarsest, 3))


@DEVICES
def test_the_gradient_of_a_sum_and_of_one_sample(device):
    # What a trainer does: the upstream gradient is an expanded scalar, or zero for all but one sample.
    pack = Pack((5, 3), 8, device)
    (grad,) = torch.autograd.grad(pack.loss(pack.pred, pack.x0, "triton").sum(), pack.pred)
    (wanted,) = torch.autograd.grad(pack.loss(pack.pred, pack.x0).sum(), pack.pred)
    torch.testing.assert_close(grad, wanted)
    (grad,) = torch.autograd.grad(pack.loss(pack.pred, pack.x0, "triton")[1], pack.pred)
    assert not grad[:5].any() and torch.equal(grad[5:] != 0, wanted[5:] != 0)


@DEVICES
def test_an_upstream_gradient_that_is_a_power_of_two_costs_no_second_rounding(device):
    pack = Pack((5, 3), 8, device, torch.bfloat16)
    loss = pack.loss(pack.pred, pack.x0, "triton")
    whole, part = (torch.autograd.grad(loss.sum() / n, pack.pred, retain_graph=True)[0] for n in (1, 256))
    assert torch.equal(part * 256, whole)


@DEVICES
def test_a_backward_can_be_run_again(device):
    pack = Pack((5, 3), 8, device)
    loss = pack.loss(pack.pred, pack.x0, "triton")
    first, again = (torch.autograd.grad((3 * loss).sum(), pack.pred, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)


@DEVICES
def test_a_gradient_that_is_not_wanted_is_not_made(device, monkeypatch):
    asked, forward = [], flow_match.velocity_loss_forward

    def spy(*args):
        asked.append(args[-1])
        return forward(*args)

    monkeypatch.setattr(flow_match, "velocity_loss_forward", spy)
    pack = Pack((5, 3), 8, device)
    losses = [pack.loss(p, x, "triton") for p in (pack.pred, pack.pred.detach()) for x in (pack.x0, pack.x0.detach())]
    assert asked == [True, True, True, False] and all(torch.equal(loss, losses[0]) for loss in losses)
    assert [loss.requires_grad for loss in losses] == asked


@DEVICES
def test_memory_that_is_not_aligned(device):
    pack = Pack((5, 3), 64, device)
    pred, x0 = misaligned(pack.pred), misaligned(pack.x0, 3)
    assert torch.equal(pack.noised(x0, "triton"), pack.noised(pack.x0, "triton"))
    losses = pack.loss(pred, x0, "triton"), pack.loss(pack.pred, pack.x0, "triton")
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss.sum(), p)[0] for loss, p in zip(losses, (pred, pack.pred))))


@DEVICES
def test_under_activation_checkpointing(device):
    pack = Pack((5, 3), 8, device)
    plain = pack.loss(pack.pred, pack.x0, "triton")
    again = checkpoint(pack.loss, pack.pred, pack.x0, "triton", use_reentrant=False)
    assert torch.equal(*(torch.autograd.grad(loss.sum(), pack.pred)[0] for loss in (plain, again)))


def test_the_compiled_face_is_the_reference(monkeypatch):
    seen = []

    def compiled(reference):
        seen.append(reference.__name__)
        return torch.compile(reference, backend="eager", fullgraph=True)

    monkeypatch.setattr(flow_match, "_compiled", compiled)  # the default backend takes half a minute for each
    for counts in ((5, 3), (2, 7, 1)):
        pack = Pack(counts, 8)
        assert torch.equal(pack.noised(pack.x0, "compile"), pack.noised(pack.x0))
        assert torch.equal(pack.loss(pack.pred, pack.x0, "compile"), pack.loss(pack.pred, pack.x0))
    assert set(seen) == {"add_noise_reference", "squared_error_reference"}


def test_torch_compile_passes_over_the_operators():
    pack = Pack((5, 3), 8, "cuda" if HAS_GPU else "cpu")
    where = pack.sample_index, pack.first_token

    def both(pred, x0):
        x_t = flow_match._AddNoise.apply(x0, pack.sigmas, *where, pack.draws, 7)
        return flow_match._VelocityLoss.apply(
            pred + x_t, x0, pack.weights, *where, pack.token_counts, pack.draws, 7
        ).sum()

    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    grads = [torch.autograd.grad(f(pack.pred, pack.x0), [pack.pred, pack.x0]) for f in (both, compiled)]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_on_the_meta_device_they_have_shapes():
    pack = Pack((5, 3), 8, "meta", torch.bfloat16)
    assert pack.noised(pack.x0, "triton").dtype == torch.float32
    loss = pack.loss(pack.pred, pack.x0, "triton")
    (grad,) = torch.autograd.grad(loss.sum(), pack.pred)
    assert loss.shape == (2,) and (grad.shape, grad.dtype) == ((8, 8), torch.bfloat16)


@DEVICES
def test_the_operators_are_what_they_register(device):
    pack, tests = Pack((5, 3), 8, device, torch.bfloat16), ("test_schema", "test_faketensor")
    where = pack.sample_index, pack.first_token
    pred, x0 = pack.pred.detach(), pack.x0.detach()
    torch.library.opcheck(add_noise_forward, (x0, pack.sigmas, *where, pack.draws, -5), test_utils=tests)
    for with_grad in (True, False):
        args = pred, x0, pack.weights, *where, pack.token_counts, pack.draws, -5, with_grad
        torch.library.opcheck(velocity_loss_forward, args, test_utils=tests)
    torch.library.opcheck(velocity_loss_backward, (pack.upstream, pred, pack.sample_index), test_utils=tests)


def ulps(a, b):
    return (a.contiguous().view(torch.int32).long() - b.contiguous().view(torch.int32).long()).abs()


@DEVICES
def test_normals_agree_to_a_few_ulp(device):
    pack = Pack((400, 100, 12), 64, device)
    pack.sigmas = torch.ones(3, device=device)
    noise = pack.noised(torch.zeros_like(pack.x0), "triton")
    wanted = noise_reference(64, pack.sample_index, pack.first_token, SEED, pack.draws)
    apart = ulps(noise, wanted)  # measured in the interpreter over 2 million normals: at most 4, 98 % at most 1
    assert apart.max() <= 6
    assert (apart <= 1).double().mean() > 0.97


@DEVICES
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
def test_every_seed_of_64_bits_is_its_own(device, seed):
    pack = Pack((5, 3), 8, device)
    where, one = (pack.sample_index, pack.first_token), torch.ones(2, device=device)
    noise = add_noise(torch.zeros_like(pack.x0), one, *where, seed, pack.draws, "triton")
    assert ulps(noise, noise_reference(8, *where, seed, pack.draws)).max() <= 6


@DEVICES
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_noise_is_standard_normal(device, mode):
    pack = Pack((500, 24, 500), 16, device)
    pack.sigmas = torch.ones(3, device=device)
    noise = pack.noised(torch.zeros_like(pack.x0), mode).double()
    n = noise.numel()
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(noise.pow(power).mean() - moment) < 4 * (spread / n) ** 0.5
    a, b = noise[:500], noise[524:]  # two samples
    for left, right in ((a, b), (a[1:], a[:-1]), (a[:, 1:], a[:, :-1])):
        assert abs((left * right).mean()) < 4 / left.numel() ** 0.5


@DEVICES
@pytest.mark.parametrize("channels", [64, 5])
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_a_sample_has_the_same_noise_and_loss_alone_as_in_a_pack(device, channels, mode):
    pack = Pack((33, 2, 7), channels, device)
    x_t, loss = pack.noised(pack.x0, mode), pack.loss(pack.pred, pack.x0, mode)
    for s, (first, count) in enumerate(zip(pack.first_token.tolist(), pack.token_counts.tolist())):
        alone, rows = Pack((count,), channels, device), slice(first, first + count)
        one = slice(s, s + 1)
        alone.draws, alone.sigmas, alone.weights = pack.draws[one], pack.sigmas[one], pack.weights[one]
        x0 = pack.x0[rows].detach()
        assert torch.equal(alone.noised(x0, mode), x_t[rows])
        torch.testing.assert_close(alone.loss(pack.pred[rows].detach(), x0, mode)[0], loss[s], rtol=1e-6, atol=0)


@DEVICES
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_the_same_call_gives_the_same_bits(device, mode):
    pack = Pack((300, 41), 5, device)
    runs = []
    for _ in range(3):
        loss = pack.loss(pack.pred, pack.x0, mode)
        runs.append((loss, *torch.autograd.grad(loss.sum(), pack.pred)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@DEVICES
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_nan_and_inf_stay_what_they_are_and_where_they_are(device, mode):
    pack = Pack((4, 3, 5), 5, device)
    with torch.no_grad():
        pack.pred[5, 2], pack.pred[8, 0] = float("nan"), float("inf")
    loss = pack.loss(pack.pred, pack.x0, mode)
    assert loss.isfinite().tolist() == [True, False, False]
    assert loss[1].isnan() and loss[2].isinf()
    (grad,) = torch.autograd.grad(loss.sum(), pack.pred)
    assert grad.isnan().nonzero().tolist() == [[5, 2]]
    assert grad.isinf().nonzero().tolist() == [[8, 0]]


@DEVICES
def test_kernels_poison_rows_of_a_sample_that_does_not_exist(device):
    # The dispatcher refuses such an index where it reads it; on a GPU it does not wait, and the kernels must be safe.
    pack = Pack((4, 3), 5, device)
    pack.sample_index[1], pack.sample_index[5] = 2, -1
    where = pack.sample_index, pack.first_token
    x_t = flow_match._AddNoise.apply(pack.x0, pack.sigmas, *where, pack.draws, SEED)
    assert x_t.isnan().all(1).nonzero().flatten().tolist() == [1, 5]
    assert x_t[[0, 2, 3, 4, 6]].isfinite().all()
    args = pack.x0, pack.weights, *where, pack.token_counts, pack.draws, SEED
    loss = flow_match._VelocityLoss.apply(pack.pred, *args)
    assert loss.isnan().all()
    (grad,) = torch.autograd.grad(loss.sum(), pack.pred)
    assert grad.isnan().all(1).nonzero().flatten().tolist() == [1, 5]
    assert grad[[0, 2, 3, 4, 6]].isfinite().all()


BAD = {
    "x0 must have shape": {"x0": torch.zeros(4, 5, 1)},
    "x0 must be float32 or bfloat16, got float16": {"x0": torch.zeros(7, 5, dtype=torch.float16)},
    "x0 must be contiguous": {"x0": torch.zeros(5, 7).T},
    "pred must have shape \\[7, 5\\], got \\[7, 4\\]": {"pred": torch.zeros(7, 4)},
    "pred must be float32 or bfloat16, got float64": {"pred": torch.zeros(7, 5, dtype=torch.float64)},
    "pred must be contiguous, got strides": {"pred": torch.zeros(7, 10)[:, ::2]},
    "pred must be on": {"pred": torch.zeros(7, 5, device="meta")},
    "weights must have shape \\[2\\], got \\[1\\]": {"weights": torch.ones(1)},
    "weights must be float32, got float64": {"weights": torch.ones(2).double()},
    "weights must not require a gradient": {"weights": torch.ones(2, requires_grad=True)},
    "sample_index must have shape \\[7\\]": {"sample_index": torch.zeros(6, dtype=torch.int64)},
    "sample_index must be int64, got int32": {"sample_index": torch.zeros(7, dtype=torch.int32)},
    "sample_index must be in \\[0, 2\\), got 0 to 2": {"sample_index": torch.tensor([0, 0, 0, 0, 1, 1, 2])},
    "sample_index must be in \\[0, 2\\), got -1": {"sample_index": torch.tensor([-1, 0, 0, 0, 1, 1, 1])},
    "sample_index must rise": {"sample_index": torch.tensor([0, 0, 0, 1, 0, 1, 1])},
    "first_token must have shape \\[1\\], got \\[0\\]": {"first_token": torch.zeros(0, dtype=torch.int64)},
    "first_token must be in \\[0, 7\\), got 0 to 7": {"first_token": torch.tensor([0, 7])},
    "samples lie end to end": {"first_token": torch.tensor([0, 3])},
    "token_counts must be \\[4, 3\\] by first_token, got \\[4, 2\\]": {"token_counts": torch.tensor([4, 2])},
    "token_counts must be int64": {"token_counts": torch.tensor([4.0, 3.0])},
    "draws must have shape \\[2\\], got \\[3\\]": {"draws": torch.zeros(3, dtype=torch.int64)},
    "draws must be int64, got float32": {"draws": torch.zeros(2)},
    "seed must be in": {"seed": -1},
    "mode must be one of auto, reference, triton, compile, got 'cuda'": {"mode": "cuda"},
}


@pytest.mark.parametrize("mode", ["reference", pytest.param("triton", marks=CPU.marks)])
@pytest.mark.parametrize("message", BAD)
def test_velocity_loss_refuses(message, mode):
    pack = Pack((4, 3), 5)
    names = "pred", "x0", "weights", "sample_index", "first_token", "token_counts", "draws"
    good = {name: getattr(pack, name) for name in names} | {"seed": 0, "mode": mode}
    velocity_loss(**good)
    with pytest.raises(ValueError, match=message):
        velocity_loss(**(good | BAD[message]))


@pytest.mark.parametrize(
    ("message", "bad"),
    [
        ("sigmas must have shape \\[2\\], got \\[1\\]", {"sigmas": torch.zeros(1)}),
        ("sigmas must be float32, got bfloat16", {"sigmas": torch.zeros(2, dtype=torch.bfloat16)}),
        ("sigmas must not require a gradient", {"sigmas": torch.zeros(2, requires_grad=True)}),
        ("x0 must have shape \\[tokens, channels\\]", {"x0": torch.zeros(0, 5)}),
        ("sample_index must be in", {"sample_index": torch.full((7,), 2)}),
        ("seed must be in", {"seed": 2**64}),
    ],
)
def test_add_noise_refuses(message, bad):
    pack = Pack((4, 3), 5)
    good = {name: getattr(pack, name) for name in ("x0", "sigmas", "sample_index", "first_token", "draws")} | {
        "seed": 0
    }
    add_noise(**good)
    with pytest.raises(ValueError, match=message):
        add_noise(**(good | bad))


def test_the_dispatcher_chooses_by_device(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert choose("auto", cpu) == choose("reference", cpu) == choose("reference", cuda) == "reference"
    assert choose("auto", cuda) == choose("triton", cuda) == "triton"
    monkeypatch.setattr(backend, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"mode 'triton' cannot run on cpu.*TRITON_INTERPRET=1"):
        choose("triton", cpu)


def test_without_triton_the_reference_runs_and_triton_is_refused():
    script = """
import sys
sys.modules["triton"] = None
import torch
from dstrain.kernels.flow_match import add_noise
zero = torch.zeros(1, dtype=torch.int64)
args = torch.zeros(2, 3), torch.ones(1), torch.zeros(2, dtype=torch.int64), zero, 0, zero
assert add_noise(*args).std() > 0.1
try:
    add_noise(*args, mode="triton")
except ValueError as error:
    assert "pip install triton" in str(error), error
else:
    raise SystemExit("mode 'triton' was not refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_compile_for_a_gpu_without_one():
    compile_for_gpu("""
from dstrain.kernels import flow_match as f
index = dict(sample_ptr="*i64", first_ptr="*i64", draws_ptr="*i64")
scalars = dict(tokens="i32", samples="i32")
random = scalars | dict(seed="i64")
noised = dict(x0_ptr="*fp32", sigma_ptr="*fp32", out_ptr="*fp32")
assert "xor.b32" in ptx(f._add_noise_kernel, index | noised, random, C=5, R=128, G=2)
for pred, x0, GRAD in (("*bf16", "*fp32", True), ("*fp32", "*bf16", False)):
    tensors = dict(pred_ptr=pred, x0_ptr=x0, weight_ptr="*fp32", count_ptr="*i64", out_ptr="*fp32", grad_ptr=pred)
    assert "xor.b32" in ptx(f._row_error_kernel, index | tensors, random, GRAD=GRAD, C=64, R=16, G=16)
means = dict(row_ptr="*fp32", weight_ptr="*fp32", out_ptr="*fp32", first_ptr="*i64", count_ptr="*i64")
ptx(f._sample_mean_kernel, means, dict(tokens="i32"), C=64, R=1024)
scale = dict(grad_ptr="*bf16", upstream_ptr="*fp32", out_ptr="*bf16", sample_ptr="*i64")
ptx(f._scale_kernel, scale, scalars, C=64, R=16, W=64)
""")


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(not HAS_GPU, reason="no GPU")
def test_offsets_past_two_to_the_31_elements():
    big = Pack((2**25, 3), 1, "cuda")
    x0 = torch.zeros(2**25 + 3, 64, dtype=torch.bfloat16, device="cuda")
    x0[-3:] = torch.randn(3, 64)
    alone = Pack((3,), 64, "cuda")
    alone.draws, alone.sigmas = big.draws[1:], big.sigmas[1:]
    assert torch.equal(big.noised(x0, "triton")[-3:], alone.noised(x0[-3:].contiguous(), "triton"))

"""The timestep embedding against plain PyTorch, in fp32 and fp64: interpreted, or compiled if there is a GPU."""

import pytest
import torch
from kernel_cases import CPU, DEVICES, DTYPES, assert_near, compile_for_gpu, misaligned, poisoned

from dstrain.kernels import timestep as module
from dstrain.kernels.timestep import timestep_embedding, timestep_embedding_forward, timestep_embedding_reference
from dstrain.models.qwen_image import TimeEmbedding

EXACT = 1e-4  # an angle of 1000 in fp32 is off by 3e-5, and so is its frequency


def sigmas(count, device="cpu"):
    torch.manual_seed(count)
    return torch.cat([torch.tensor([1.0, 0.0, 0.5, 1e-4]), torch.rand(count)])[:count].to(device)


@DEVICES
@pytest.mark.parametrize("mode", ["triton", "reference"])
@pytest.mark.parametrize(
    ("count", "options"),
    [(9, {}), (1, {}), (3, {"channels": 6}), (2, {"channels": 2}), (5, {"channels": 96, "scale": 1.0, "base": 100.0})],
)
def test_against_fp64(device, mode, count, options):
    x = sigmas(count, device)
    with poisoned():
        actual = timestep_embedding(x, mode=mode, **options)
    wanted = timestep_embedding_reference(x.double(), dtype=torch.float64, **options)
    assert actual.dtype == torch.float32 and actual.shape == (count, options.get("channels", 256))
    torch.testing.assert_close(actual.double(), wanted, rtol=0, atol=EXACT * options.get("scale", 1000.0) / 1000 + 1e-7)


@DEVICES
def test_the_numbers_are_those_of_the_reference(device):
    x = sigmas(40, device)
    actual, wanted = timestep_embedding(x, mode="triton"), timestep_embedding_reference(x)
    # A frequency may differ by an ulp: in 1000 radians that is one of 2^-14.
    assert (actual - wanted).abs().max() <= 1.01 * 2.0**-14
    assert (actual != wanted).double().mean() < 0.15
    low = slice(64, 128)  # angles below 10
    assert (actual[:, low] - wanted[:, low]).abs().max() < 2e-6


@DEVICES
@DTYPES
@pytest.mark.parametrize("mode", ["triton", "reference"])
def test_the_models_embedding(device, dtype, mode):
    embedding = TimeEmbedding(8)
    embedding.timestep_embedder = torch.nn.Identity()
    x = sigmas(7, device)
    actual, wanted = timestep_embedding(x, dtype=dtype, mode=mode), embedding(x, dtype)
    assert actual.dtype == dtype
    if mode == "reference":
        assert torch.equal(actual, wanted)
    else:
        assert_near(actual, wanted, atol=EXACT)


@DEVICES
def test_neighbouring_timesteps_stay_apart(device):
    x = torch.tensor([999.0, 999.001, 999.002], device=device) / 1000
    actual = timestep_embedding(x, mode="triton")
    wanted = timestep_embedding_reference(x.double(), dtype=torch.float64)
    torch.testing.assert_close(actual.diff(dim=0).double(), wanted.diff(dim=0), rtol=0, atol=2 * EXACT)
    assert wanted.diff(dim=0).abs().max() > 8 * EXACT


@DEVICES
def test_misaligned_nan_and_the_same_bits(device):
    x = sigmas(5, device)
    x[1], x[3] = float("nan"), float("inf")
    actual = timestep_embedding(x, mode="triton")
    assert actual.isfinite().all(1).tolist() == [True, False, True, False, True] and actual[[1, 3]].isnan().all()
    assert torch.equal(timestep_embedding_reference(x).isnan(), actual.isnan())
    again = timestep_embedding(misaligned(x), mode="triton")
    assert torch.equal(again.nan_to_num(7.0), actual.nan_to_num(7.0))


@DEVICES
def test_the_operator_keeps_torchs_rules(device, monkeypatch):
    args = sigmas(3, device), 8, 1000.0, 1e4, torch.bfloat16
    torch.library.opcheck(timestep_embedding_forward, args, test_utils=("test_schema", "test_faketensor"))
    # Off the GPU the choice asks for the interpreter, which is a question to the environment: no graph has that.
    monkeypatch.setattr(module, "choose", lambda mode, device: mode)
    function = torch.compile(lambda x: timestep_embedding(x * 1, 8, mode="triton"), fullgraph=True, backend="eager")
    assert torch.equal(function(args[0]), timestep_embedding(args[0], 8, mode="triton"))


def test_on_the_meta_device_and_compiled(monkeypatch):
    out = timestep_embedding(torch.zeros(3, device="meta"), dtype=torch.bfloat16, mode="triton")
    assert out.is_meta and out.shape == (3, 256) and out.dtype == torch.bfloat16
    monkeypatch.setattr(module, "compiled", lambda function: lambda *args: (function, len(args)))
    assert timestep_embedding(sigmas(2), mode="compile") == (timestep_embedding_reference, 5)


BAD = {
    "sigmas must have shape \\[samples\\], at least 1, got \\[0\\]": {"sigmas": torch.zeros(0)},
    "sigmas must have shape \\[samples\\], at least 1, got \\[2, 1\\]": {"sigmas": torch.zeros(2, 1)},
    "sigmas must be float32, got bfloat16": {"sigmas": torch.zeros(2, dtype=torch.bfloat16)},
    "sigmas must be contiguous": {"sigmas": torch.zeros(4)[::2]},
    "channels must be an even number of at least 2, got 7": {"channels": 7},
    "channels must be an even number of at least 2, got 0": {"channels": 0},
    "base must be positive, got 0": {"base": 0.0},
    "base must be positive, got nan": {"base": float("nan")},
    "dtype must be float32 or bfloat16, got float16": {"dtype": torch.float16},
    "mode must be one of": {"mode": "cuda"},
}


@pytest.mark.parametrize("mode", ["reference", pytest.param("triton", marks=CPU.marks)])
@pytest.mark.parametrize("message", BAD)
def test_refused(message, mode):
    good = {"sigmas": torch.zeros(2), "mode": mode}
    timestep_embedding(**good)
    with pytest.raises(ValueError, match=message):
        timestep_embedding(**(good | BAD[message]))


def test_the_kernel_compiles_for_a_gpu_without_one():
    compile_for_gpu("""
from dstrain.kernels.timestep import _kernel
scalars = dict(scale="fp32", slope="fp32")
for kind, half, block in (("*bf16", 128, 128), ("*fp32", 3, 4)):
    code = ptx(_kernel, dict(sigma_ptr="*fp32", out_ptr=kind), scalars, HALF=half, B=block)
    # The GPU's own fp32 sine is off by more than an angle is.
    assert "sin.approx" not in code and "ex2.approx" not in code
""")


@DEVICES
def test_sigmas_that_require_a_gradient_have_one(device):
    sigmas = torch.tensor([0.2, 0.9], device=device, requires_grad=True)
    wanted = timestep_embedding_reference(sigmas.detach().double().requires_grad_(), 8, 1.0, 10.0, torch.float64)
    out = timestep_embedding(sigmas, 8, scale=1.0, base=10.0, mode="triton")
    torch.testing.assert_close(out, wanted.float())
    (grad,) = torch.autograd.grad(out.sum(), sigmas)
    frequencies = 10.0 ** (-torch.arange(4, device=device) / 4)
    angles = sigmas.detach()[:, None] * frequencies
    torch.testing.assert_close(grad, (frequencies * (angles.cos() - angles.sin())).sum(1))

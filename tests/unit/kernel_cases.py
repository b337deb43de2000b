"""What tests of kernels share: devices, bounds on errors, poisoned and misaligned memory, a compiler without a GPU."""

import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
CUDA = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="no GPU")])
CPU = pytest.param("cpu", marks=pytest.mark.skipif(HAS_GPU, reason="the interpreter is off where there is a GPU"))
DEVICES = pytest.mark.parametrize("device", [CPU, CUDA])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def assert_near(actual, wanted, name="", atol=None):
    """Compare with what fp64 gives: to a bf16 ulp (a GPU rounds to the nearest, the interpreter cuts off) or in fp32.

    Near zero, where terms cancel, the bound is relative to the largest element. Elsewhere it follows each element, so
    that a wrong small element is found. `atol` is a share of the largest element.
    """
    assert actual.shape == wanted.shape, f"{name}: {list(actual.shape)} instead of {list(wanted.shape)}"
    rtol, share = (2.0**-7, 2.0**-14) if actual.dtype == torch.bfloat16 else (2e-5, 2e-6)
    wanted = wanted.detach().double()
    finite = wanted[wanted.isfinite()].abs()
    scale = float(finite.max()) if len(finite) else 0.0
    torch.testing.assert_close(
        actual.detach().double(),
        wanted,
        rtol=rtol,
        atol=scale * (share if atol is None else atol),
        equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )


def leaf(tensor, device="cpu", dtype=torch.float32):
    """Return a copy to differentiate by."""
    return tensor.detach().to(device, dtype, copy=True).requires_grad_()


def in_fp64(*tensors):
    """Return fp64 copies to differentiate by."""
    return [leaf(tensor, tensor.device, torch.float64) for tensor in tensors]


def misaligned(tensor, by=1):
    """Return a copy that begins `by` elements into its memory: contiguous, but not at a multiple of 16 bytes."""
    flat = torch.empty(tensor.numel() + by, dtype=tensor.dtype, device=tensor.device)
    copy = flat[by:].view(tensor.shape)
    return copy.copy_(tensor.detach()).requires_grad_(tensor.requires_grad)


def chunk_of(tensor, chunks=3, index=1):
    """Return a copy [M, D] that is one chunk of columns of a wider matrix: its rows lie apart."""
    wide = torch.full(
        (tensor.shape[0], chunks, tensor.shape[1]), float("nan"), device=tensor.device, dtype=tensor.dtype
    )
    wide[:, index] = tensor.detach()
    return wide.flatten(1).chunk(chunks, dim=1)[index].requires_grad_(tensor.requires_grad)


@contextmanager
def poisoned():
    """Fill what torch.empty and its kin return with NaN (integers: their largest), so that a gap is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


PRELUDE = '''
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def ptx(kernel, pointers, scalars=(), num_warps=4, aligned=True, **constants):
    """Compile for an H200; `pointers` and `scalars` map names to types. "i64=16" is a multiple of 16.

    Pointers are multiples of 16 bytes if `aligned`.
    """
    types = dict(pointers) | {name: kind.split("=")[0] for name, kind in dict(scalars).items()}
    sixteen = set(pointers if aligned else ()) | {name for name, kind in dict(scalars).items() if kind.endswith("=16")}
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in sixteen}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(k),): v for k, v in constants.items()}, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps}).asm["ptx"]
'''


def compile_for_gpu(script):
    """Run Python code that calls `ptx` where Triton compiles: the interpreter takes what the compiler refuses.

    The compiler needs no device, only a target.
    """
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", PRELUDE + script], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr

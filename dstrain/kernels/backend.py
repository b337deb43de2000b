"""What every kernel file shares: the guarded Triton import, the choice of a face, and checks before a launch."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    # Kernel bodies are not run when they are defined: these names are all that a definition touches.
    triton: Any = None  # type: ignore[no-redef]
    tl: Any = SimpleNamespace(constexpr=int)  # type: ignore[no-redef]

MODES = ("auto", "reference", "triton")


def jit(kernel: Any) -> Any:
    """`triton.jit`, or the bare function where Triton is not installed, so that kernel files import anywhere."""
    return triton.jit(kernel) if triton is not None else kernel


def choose(mode: str, device: torch.device) -> str:
    """Return the face to run, "reference" or "triton", for tensors on `device`.

    "auto" is Triton on CUDA and the reference elsewhere. Raises ValueError for an unknown mode, and where Triton is
    asked for but not installed, or asked for off the GPU without its interpreter (TRITON_INTERPRET=1).
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "auto":
        return "triton" if device.type == "cuda" and triton is not None else "reference"
    if mode == "triton":
        if triton is None:
            raise ValueError("mode 'triton' needs Triton, which is not installed: pip install triton, or mode 'reference'")
        if device.type != "cuda" and not triton.knobs.runtime.interpret:
            raise ValueError(
                f"mode 'triton' cannot run on {device.type}: use mode 'reference', or set TRITON_INTERPRET=1 "
                "before Triton is imported to run the kernels in its interpreter"
            )
    return mode


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` current for a launch: Triton launches on the current GPU, whatever its arguments."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check_tensor(
    name: str, tensor: Tensor, shape: Sequence[int], dtypes: Sequence[torch.dtype], device: torch.device
) -> None:
    """Raise ValueError that names `tensor` unless it has this shape, one of the dtypes, this device, and no gaps."""
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {kinds}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}: call .contiguous() on it")

"""What every kernel file shares: the guarded Triton import, the choice of a face, and checks before a launch."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

try:
    import triton
    import triton.language as tl
except ImportError:
    # Kernel bodies are not run when they are defined: these names are all that a definition touches.
    triton: Any = None  # type: ignore[no-redef]
    tl: Any = SimpleNamespace(constexpr=lambda value: value)  # type: ignore[no-redef]

INTERPRETED = triton is not None and triton.knobs.runtime.interpret  # asked once: torch.compile cannot look into it
FLOATS = (torch.float32, torch.bfloat16)
MODES = ("auto", "reference", "triton", "compile")


# Arguments that count tokens change with every pack: a kernel is not compiled anew where one is 1 or a multiple of 16.
COUNTS = ["rows", "first", "size", "chunks", "before", "tokens", "samples", "segments", "each"]


def jit(kernel: Any) -> Any:
    """`triton.jit`, or the bare function where Triton is not installed, so that kernel files import anywhere."""
    return triton.jit(kernel, do_not_specialize=COUNTS) if triton is not None else kernel


def choose(mode: str, device: torch.device) -> str:
    """Return the face to run, "reference", "triton" or "compile", for tensors on `device`.

    "auto" is Triton on CUDA and the reference elsewhere; "compile" is torch.compile of the reference. On the
    meta device "triton" runs no kernel and gives results of the right shapes: enough to count bytes. ValueError for an
    unknown mode, and where Triton is asked for but not installed, or asked for off the GPU without its interpreter
    (TRITON_INTERPRET=1).
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "auto":
        return "triton" if device.type == "cuda" and triton is not None else "reference"
    if mode == "triton":
        if triton is None:
            raise ValueError(
                "mode 'triton' needs Triton, which is not installed: pip install triton, or mode 'reference'"
            )
        if device.type not in ("cuda", "meta") and not INTERPRETED:
            raise ValueError(
                f"mode 'triton' cannot run on {device.type}: use mode 'reference', or set TRITON_INTERPRET=1 "
                "before Triton is imported to run the kernels in its interpreter"
            )
    return mode


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile` of a reference, for any sizes; one for the process, since a compilation takes seconds.

    A forward that is recomputed for its backward must get the same graph again. So graphs are tried in the order they
    were made (pytorch/pytorch#166926); and under a dispatch mode, where nothing is compiled, no graph is taken that
    others have made: the reference runs as it is.
    """
    eval_frame = torch._C._dynamo.eval_frame
    getattr(eval_frame, "_set_lru_cache", lambda on: None)(False)  # since torch 2.10
    graph = torch.compile(function, dynamic=True)

    def run(*args: Any) -> Any:
        return (function if is_in_torch_dispatch_mode() else graph)(*args)

    return run


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` current for a launch: Triton launches on the current GPU, whatever its arguments."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    *,
    gaps: bool = False,
) -> None:
    """Raise ValueError that names `tensor` unless it has this shape, one of the dtypes, this device, and no gaps.

    With `gaps` rows of a matrix may lie apart, as those of a chunk of columns do, but not the elements of a row.
    """
    kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {kinds}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")
    if gaps and tensor.ndim == 2:
        if tensor.stride(1) != 1 and tensor.shape[1] > 1:
            raise ValueError(f"{name} must have rows without gaps, got strides {list(tensor.stride())}")
    elif not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {list(tensor.stride())}: call .contiguous() on it")


def check_pack(latents: dict[str, Tensor], sample_index: Tensor, per_sample: dict[str, Tensor], read: bool) -> None:
    """Raise ValueError, naming the tensor, unless a pack's tensors fit one another.

    `latents` are [I, C], fp32 or bf16, `sample_index` is int64 [I], `per_sample` int64 [N], among them `first_token`.
    With `read` the index itself is read, which on a GPU means waiting for it: samples must lie end to end, in order.
    """
    name, first = next(iter(latents.items()))
    if first.ndim != 2 or first.numel() == 0:
        raise ValueError(f"{name} must have shape [tokens, channels], both at least 1, got {list(first.shape)}")
    tokens, device = len(first), first.device
    for name, tensor in latents.items():
        check_tensor(name, tensor, first.shape, FLOATS, device)
    check_tensor("sample_index", sample_index, (tokens,), (torch.int64,), device)
    samples = max(1, per_sample["first_token"].numel())
    for name, tensor in per_sample.items():
        check_tensor(name, tensor, (samples,), (torch.int64,), device)
    if read:
        _check_index(sample_index, per_sample["first_token"], per_sample.get("token_counts"))


def _check_index(sample_index: Tensor, first_token: Tensor, token_counts: Tensor | None) -> None:
    tokens, samples = len(sample_index), len(first_token)
    for name, tensor, limit in (("sample_index", sample_index, samples), ("first_token", first_token, tokens)):
        if int(tensor.min()) < 0 or int(tensor.max()) >= limit:
            raise ValueError(f"{name} must be in [0, {limit}), got {int(tensor.min())} to {int(tensor.max())}")
    counts = torch.diff(first_token, append=first_token.new_tensor([tokens]))  # [N]
    rises = torch.bucketize(torch.arange(tokens, device=first_token.device), first_token, right=True) - 1  # [I]
    if int(counts.min()) < 1 or int(first_token[0]) != 0 or not torch.equal(sample_index, rises):
        raise ValueError("sample_index must rise by one at each first_token: samples lie end to end, in order")
    if token_counts is not None and not torch.equal(counts, token_counts):
        raise ValueError(f"token_counts must be {counts.tolist()} by first_token, got {token_counts.tolist()}")

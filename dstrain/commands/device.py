"""Where a command computes, and in which numbers."""

from typing import TYPE_CHECKING

from dstrain.errors import ConfigError

if TYPE_CHECKING:
    import torch


def device_of(name: str) -> "torch.device":
    """Return the device called `name`; "auto" is the GPU if there is one. ConfigError if it cannot be used."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:  # AssertionError: this PyTorch was built without CUDA
        raise ConfigError(f"--device {name}: {str(e).splitlines()[0]}") from e
    return device


def dtype_of(name: str, device: "torch.device") -> "torch.dtype":
    """Return bf16 or fp32 by name; "auto" is bf16 where the hardware multiplies it."""
    import torch

    from dstrain.engine.distributed import has_fast_bf16

    bf16 = has_fast_bf16(device) if name == "auto" else name == "bf16"
    return torch.bfloat16 if bf16 else torch.float32

"""Frozen components that lie in host memory while they are not used."""

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

_ALIGN = 64  # bytes


class HostModule:
    """A frozen module in host memory, which is on the device only inside `with host_module.on_device():`.

    For a GPU the host memory is page-locked, in one block, so that it is copied at the speed of the link; nothing is
    copied back, because nothing changes. Where the device is the CPU, both places are one and nothing is copied.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        """Take over `module`, whose weights are in host memory."""
        self._device, self._depth = device, 0
        tensors = [*module.parameters(), *module.buffers()]
        if device.type == "cuda":
            _lock_pages(module, tensors)
        self._homes = [(tensor, tensor.data) for tensor in tensors]

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Have the weights on the device meanwhile; inside another such block, that one decides when they go."""
        self._depth += 1
        try:
            if self._depth == 1:
                for tensor, home in self._homes:
                    tensor.data = home.to(self._device, non_blocking=True)
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                for tensor, home in self._homes:
                    tensor.data = home


def _lock_pages(module: nn.Module, tensors: list[Tensor]) -> None:
    """Move `tensors` one by one into a block that is page-locked.

    PyTorch's own pinned memory comes in powers of two, which would nearly double a text encoder.
    """
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.nbytes // _ALIGN) * _ALIGN
    block = torch.empty(end, dtype=torch.uint8)
    for tensor, start in zip(tensors, starts, strict=True):
        place = block[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        tensor.data = place.copy_(tensor.data)
    runtime = torch.cuda.cudart()
    if (code := int(runtime.cudaHostRegister(block.data_ptr(), end, 0))) != 0:
        log.warning("%.2f GB of encoders cannot be page-locked (CUDA error %d); moving them is slower", end / 1e9, code)
        return
    weakref.finalize(module, _unlock, block).atexit = False


def _unlock(block: Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(block.data_ptr())

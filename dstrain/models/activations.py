"""What each block of a stack keeps for its backward.

    word        kept on the device, a block           recomputed in the backward
    none        every intermediate result             nothing
    attention   its inputs, the attention's result    all but the attention
    full        its inputs                            everything
    offload     nothing: its inputs are in host RAM   everything

Recomputation: Chen et al., arXiv 1604.06174. Loss and gradients are the same in all four. "offload" copies on a stream
of its own: out while the block computes, back while the block behind it runs its backward.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import cycle
from typing import Any, Self

import torch
import torch.nn.attention.varlen  # names torch_attn._varlen_attn
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint, noop_context_fn

from dstrain.config import Activations

# Attention only. Never a matmul: under ZeRO-3, DeepSpeed's linear adds the bias in place to the product of a matrix and
# a 3-D input, so a kept product comes back with the bias already added, and gradients are wrong without an error.
ATTENTION = (
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)
SMALLEST = 1 << 20  # bytes of a stream that is worth a copy to host memory

Streams = tuple[Tensor, ...]


def run_blocks(
    blocks: nn.ModuleList, activations: Sequence[Activations], streams: Streams, shared: Sequence[Any]
) -> Streams:
    """Run `streams = block(*streams, *shared)` over all blocks and return the last streams.

    Args:
        blocks: called in order; each returns as many streams as it takes.
        activations: what block i keeps is entry i, the list repeated as often as needed.
        streams: the floating-point tensors that every block changes, any shapes.
        shared: what every block gets besides, unchanged; it stays where it is.
    """
    away = None
    for block, keep in zip(blocks, cycle(activations)):
        if not torch.is_grad_enabled() or not _any_requires_grad((*streams, *shared), block):
            streams = block(*streams, *shared)
            continue
        # ZeRO-3 releases a leaf module's weights by a hook on the gradients of its inputs, so these must have some.
        streams = tuple(x if x.requires_grad else x.detach().requires_grad_() for x in streams)
        if keep == "none":
            streams = block(*streams, *shared)
        elif keep == "attention":
            streams = _recomputed(block, streams, shared, _attention_contexts)
        elif keep == "full" or block is blocks[-1]:  # the last block's inputs would be wanted back at once
            streams = _recomputed(block, streams, shared)
        else:
            away = _Away(away)
            with saved_tensors_hooks(away.pack, away.unpack):
                streams = _recomputed(block, streams, shared)
    return streams


def _any_requires_grad(inputs: Iterable[Any], block: nn.Module) -> bool:
    return any(isinstance(x, Tensor) and x.requires_grad for x in inputs) or any(
        p.requires_grad for p in block.parameters()
    )


def _recomputed(
    block: nn.Module, streams: Streams, shared: Sequence[Any], context_fn: Callable[[], Any] = noop_context_fn
) -> Streams:
    """Run the block and keep its inputs alone. Only the streams pass through the hooks on saved tensors."""

    def run(*streams: Tensor) -> Streams:
        return block(*streams, *shared)

    drops = any(isinstance(m, nn.Dropout) and m.training and m.p > 0 for m in block.modules())
    return checkpoint(run, *streams, use_reentrant=False, preserve_rng_state=drops, context_fn=context_fn)


def _attention_contexts() -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """For the first run of a block and for its recomputation.

    Not PyTorch's `create_selective_checkpoint_contexts`: it wants the same operations in both runs, and ZeRO-3 gathers
    weights by prefetch in one of them and inside the block in the other.
    """
    results: list[Any] = []
    return _KeepAttention(results), _GiveAttention(results)


class _KeepAttention(TorchDispatchMode):
    """Notes the results of attention, in the order of the calls."""

    def __init__(self, results: list[Any]) -> None:
        super().__init__()
        self.results = results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in ATTENTION:
            self.results.append(tree_map_only(Tensor, Tensor.detach, out))
        return out


class _GiveAttention(TorchDispatchMode):
    """Gives the noted results in the same order instead of computing them."""

    def __init__(self, results: list[Any]) -> None:
        super().__init__()
        self.results = results
        self.calls = 0

    def __enter__(self) -> Self:
        self.calls = 0  # a graph may be walked twice
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in ATTENTION:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return tree_map_only(Tensor, Tensor.detach, self.results[self.calls - 1])


class _Away:
    """The inputs of one block, in host memory from its forward to its backward.

    Its host memory is freed with the autograd graph, whether a backward has run or not. The pool of pinned buffers is
    PyTorch's: it gives a freed buffer out again once the copies from and to it are done.
    """

    def __init__(self, before: "_Away | None") -> None:
        self.before = before  # the block whose inputs are wanted next in the backward
        self.host: list[tuple[Tensor, torch.device]] = []
        self.back: dict[int, Tensor] = {}  # by place in `host`: on the device again, or on the way

    def pack(self, x: Tensor) -> Tensor | int:
        """Start the copy to host memory; return what stands for `x` in the graph."""
        if x.nbytes < SMALLEST:
            return x
        if not self.host:
            _copies(x.device).settle()
        host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
        _copies(x.device).start(host, x)
        self.host.append((host, x.device))
        return len(self.host) - 1

    def unpack(self, kept: Tensor | int) -> Tensor:
        """Return the input on its device, and with the last of them call for those of the block before."""
        if isinstance(kept, Tensor):
            return kept
        if kept not in self.back:
            self.fetch()
        _copies(self.host[kept][1]).settle()
        x = self.back.pop(kept)
        if not self.back and self.before:
            self.before.fetch()
        return x

    def fetch(self) -> None:
        """Start the copies to the device; the host's stay, as a graph may be walked twice."""
        for place, (host, device) in enumerate(self.host):
            self.back[place] = torch.empty_like(host, device=device)
            _copies(device).start(self.back[place], host)


class _Copies:
    """Copies between a device and host memory, in order, beside the device's current stream.

    Both tensors of a copy are held here until the current stream has been told to wait for it. So the allocator cannot
    give their memory to somebody else in the middle of a copy, and needs no `record_stream`, which would keep it from
    reuse for as long as the host runs ahead of the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.moving: list[Tensor] = []

    def start(self, target: Tensor, source: Tensor) -> None:
        """Copy once the current stream has got here. On the CPU: now."""
        if self.stream is None:
            target.copy_(source)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        self.moving += target, source

    def settle(self) -> None:
        """Let the current stream wait for all copies so far."""
        if self.stream is not None and self.moving:
            torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)
            self.moving.clear()


_copies = cache(_Copies)  # one stream a device

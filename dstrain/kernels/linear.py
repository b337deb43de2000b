"""Matmuls of one or two streams whose rows lie in one tensor, and their gradients, for functions with own backwards.

A layer may have a low-rank adapter (Hu et al., arXiv:2106.09685): x W^T + scale (x A^T) B^T. What it adds is added up
inside the matmul with B, so no pass over [S, out] is needed for it; x A^T [S, r] is kept for the gradient of B.

Letters: S rows of all streams, r rank. `rows` are the rows of each stream.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dstrain.kernels.backend import check_tensor

Maybe = Tensor | None


class Linear(NamedTuple):
    """The tensors of a stream's layer."""

    weight: Tensor  # W [out, in]
    bias: Maybe  # [out]; where it is added elsewhere, None
    down: Any = None  # A [r, in]; without an adapter, None
    up: Any = None  # B [out, r]
    scale: float = 1.0

    @property
    def tensors(self) -> tuple[Tensor, Maybe, Any, Any]:
        """What may have gradients."""
        return self.weight, self.bias, self.down, self.up


Streams = Sequence[Linear]  # a layer for each stream
TENSORS = 4  # of a layer


def flat(groups: Sequence[Streams]) -> tuple[list[Maybe], tuple[float, ...]]:
    """The tensors of all layers, one behind the other as autograd functions take them, and the scales."""
    layers = [layer for group in groups for layer in group]
    return [t for layer in layers for t in layer.tensors], tuple(layer.scale for layer in layers)


def grouped(tensors: Sequence[Any], scales: Sequence[float], streams: int) -> list[list[Linear]]:
    """The inverse of `flat`; also of what is needed or known of each tensor."""
    parts = (tensors[i : i + TENSORS] for i in range(0, len(tensors), TENSORS))
    layers = [Linear(w, b, down, up, scale) for (w, b, down, up), scale in zip(parts, scales)]
    return [layers[i : i + streams] for i in range(0, len(layers), streams)]


def product(x: Tensor, layers: Streams, rows: Sequence[int], *, bias: bool = False) -> tuple[Tensor, list[Any]]:
    """Each stream's rows through its layer, in one tensor: [S, in] -> [S, out], and x A^T of each adapter."""
    out = x.new_empty(len(x), len(layers[0].weight))
    lows: list[Any] = []
    for layer, part, into in zip(layers, x.split(list(rows)), out.split(list(rows))):
        if bias and layer.bias is not None:
            torch.addmm(layer.bias, part, layer.weight.t(), out=into)
        else:
            torch.mm(part, layer.weight.t(), out=into)
        lows.append(None if layer.down is None else torch.mm(part, layer.down.t()))
        if layer.down is not None:
            into.addmm_(lows[-1], layer.up.t(), alpha=layer.scale)
    return out, lows


def grad_input(
    grads: Sequence[Tensor], groups: Sequence[Streams], rows: Sequence[int]
) -> tuple[Tensor, list[list[Any]]]:
    """The gradient [S, in] of what several layers share, and each gradient times B, for adapters' parameters.

    Each matmul adds to the result of the one before.
    """
    out = grads[0].new_empty(len(grads[0]), groups[0][0].weight.shape[1])
    lows: list[list[Any]] = []
    for grad, layers in zip(grads, groups):
        lows.append([])
        for layer, part, into in zip(layers, grad.split(list(rows)), out.split(list(rows))):
            if len(lows) > 1:
                into.addmm_(part, layer.weight)
            else:
                torch.mm(part, layer.weight, out=into)
            lows[-1].append(None if layer.up is None else torch.mm(part, layer.up))
            if layer.up is not None:
                into.addmm_(lows[-1][-1], layer.down, alpha=layer.scale)
    return out, lows


def grad_parameters(
    grad: Tensor,
    x: Tensor,
    layers: Streams,
    rows: Sequence[int],
    lows: Sequence[Any],
    low_grads: Sequence[Any],
    biases: Sequence[Tensor] | Tensor,
    wanted: Sequence[Any],
) -> list[Maybe]:
    """The gradients of each layer's tensors, in the order of `flat`, where they are `wanted`.

    `lows` is what `product` returned, `low_grads` what `grad_input` did, `biases` the gradients of biases. x may be
    empty where neither weights nor A have gradients, biases where they have none.
    """
    grads: list[Maybe] = []
    start = 0
    for i, (layer, want, length) in enumerate(zip(layers, wanted, rows)):
        part, y, low, low_grad = grad[start : start + length], x[start : start + length], lows[i], low_grads[i]
        start += length
        grads += [
            torch.mm(part.t(), y) if want.weight else None,
            biases[i] if want.bias else None,
            torch.addmm(layer.down, low_grad.t(), y, beta=0, alpha=layer.scale) if want.down else None,
            torch.addmm(layer.up, part.t(), low, beta=0, alpha=layer.scale) if want.up else None,
        ]
    return grads


def biases_of(layers: Streams) -> list[Tensor]:
    """Their biases, which all of them have."""
    return [layer.bias for layer in layers if layer.bias is not None]


def any_wanted(wanted: Sequence[Any]) -> tuple[bool, bool]:
    """Whether layers' gradients need their input, which those of weights and of A do, and whether biases have any."""
    return any(w.weight or w.down for w in wanted), any(w.bias for w in wanted)


def check_linears(name: str, layers: Streams, streams: int, x: Tensor, shape: tuple[int, int]) -> None:
    """Raise ValueError unless there is a layer for each stream, of weights [out, in] `shape`, like x otherwise."""
    if len(layers) != streams:
        raise ValueError(f"{name} must be {streams}, one for each stream, got {len(layers)}")
    for layer in layers:
        check_tensor(f"weight of {name}", layer.weight, shape, (x.dtype,), x.device)
        if layer.bias is None:
            raise ValueError(f"{name} must have biases")
        check_tensor(f"bias of {name}", layer.bias, shape[:1], (x.dtype,), x.device)
        if (layer.down is None) != (layer.up is None):
            raise ValueError(f"{name} must have both down and up of an adapter, or neither")
        if layer.down is not None:
            rank = len(layer.down)
            check_tensor(f"down of {name}", layer.down, (rank, shape[1]), (x.dtype,), x.device)
            check_tensor(f"up of {name}", layer.up, (shape[0], rank), (x.dtype,), x.device)

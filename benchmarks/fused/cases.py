"""What a case of the benchmark of fused operations is: inputs, the faces that run it, and what is exact."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dstrain.kernels.segments import Segments

EPS, SEED = 1e-6, 1234
Tensors = dict[str, Tensor]
Face = Callable[[Tensors], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Size:
    """Widths of a model, and rows of a pack."""

    model: str
    width: int  # D
    heads: int
    hidden: int  # F, of the perceptron
    tokens: int  # S
    samples: int  # N
    channels: int = 64  # C, of a latent token

    @property
    def length(self) -> int:
        """Rows of a sample. All have as many, so that eager code, which works on a batch, is at its best."""
        if self.tokens % (8 * self.samples):
            raise ValueError(f"{self.tokens} tokens are not {self.samples} samples with an eighth of text each")
        return self.tokens // self.samples


@dataclass
class Case:
    """An operation at a size. Inputs are what it is differentiated by."""

    rows: Tensors  # [S, ...] each
    faces: dict[str, Face]
    exact: Callable[[Tensors, int, int], tuple[Tensor, ...]]  # outputs for rows a to b; rows are cut already
    forward_bytes: int
    backward_bytes: int  # 0: there is no backward
    eager: str  # which code is compared with
    shared: Tensors = field(default_factory=dict)  # tables, weights
    order: Tensor | None = None  # row r of the inputs is row order[r] of the outputs
    cut: dict[str, int] = field(
        default_factory=dict
    )  # rows that all faces but "triton" have in two tensors, from where
    sample_rows: int = 0  # if not 0, `exact` takes rows of one sample, each of so many
    sums: bool = False  # outputs are sums over rows, and `exact` gives the part of rows a to b
    bound: float | None = None  # largest error, where it is not the one of bf16
    notes: dict[str, str] = field(default_factory=dict)  # faces that are left out, and why

    @property
    def inputs(self) -> Tensors:
        """All of them."""
        return {**self.rows, **self.shared}

    def inputs_of(self, face: str) -> Tensors:
        """Those of a face: rows that are cut are two leaves, "x 0" and "x 1", in the same memory."""
        found = self.inputs
        for key, at in self.cut.items() if face != "triton" else ():
            x = found.pop(key)
            for i, part in enumerate((x[:at], x[at:])):
                found[f"{key} {i}"] = part.detach().requires_grad_(x.requires_grad)
        return found

    def joined(self, grads: Tensors) -> Tensors:
        """Gradients by the inputs as they were before they were cut."""
        found = dict(grads)
        for key in self.cut:
            if f"{key} 0" in found:
                found[key] = torch.cat([found.pop(f"{key} 0"), found.pop(f"{key} 1")])
        return found


class Maker:
    """Random inputs on a device, the same for the same size."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        self.size, self.device, self.dtype = size, device, dtype
        self.generator = None if device.type == "meta" else torch.Generator(device).manual_seed(SEED)
        self.element = dtype.itemsize

    def normal(self, *shape: int, grad: bool = True, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        x = torch.randn(shape, generator=self.generator, device=self.device, dtype=self.dtype)
        return x.mul_(scale).add_(mean).requires_grad_(grad)

    def segments(self) -> Segments:
        return Segments([self.size.length] * self.size.samples, self.device)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.compile`, for any number of rows; a width is compiled for by itself, which gives the best code."""
    inner = torch.compile(function, dynamic=False, fullgraph=True)

    def run(*args: Any) -> Any:
        for x in args:
            if isinstance(x, Tensor) and len(x) > 64 and (x.ndim > 1 or not x.is_floating_point()):
                torch._dynamo.maybe_mark_dynamic(x, 0)
        return inner(*args)

    return run


def both(function: Callable[..., Any], args: Callable[[Tensors], tuple[Any, ...]]) -> dict[str, Face]:
    """The faces "eager" and "compile" of a function of several tensors."""
    return {
        "eager": lambda t: as_tuple(function(*args(t))),
        "compile": lambda t: as_tuple(compiled(function)(*args(t))),
    }


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def liger(module: str, name: str) -> Any:
    """An autograd function of Liger's; ImportError where the package is not there, or is of another version."""
    try:
        return getattr(__import__(f"liger_kernel.ops.{module}", fromlist=[name]), name)
    except Exception as error:  # whatever its imports raise on a machine that does not suit it
        raise ImportError(f"liger-kernel: {error}") from error


def with_liger(case: Case, make: Callable[[], Face]) -> Case:
    """Add the face "liger", or the reason why it is not there."""
    try:
        case.faces["liger"] = make()
    except ImportError as error:
        case.notes["liger"] = str(error)
    return case

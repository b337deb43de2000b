"""A Qwen-Image block, dstrain's and diffusers': a step of forward and backward, what it keeps, and what its glue takes.

Glue is all but matmuls and attention. torch.profiler tells each kernel's time and the operator that launched it, so
that the names of kernels, which differ between GPUs, do not matter: glue is the time of all kernels less that of those
launched by the operators of matmuls and attention.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from fused.timing import LOOSE, Program, Wrong
from torch import Tensor, nn

from dstrain.models.packing import PackLayout
from dstrain.models.qwen_image import QwenImageBlock, rotary_table

MATMULS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm", "aten::_addmm_activation")
ATTENTION = ("attention", "varlen", "flash", "fmha")  # parts of names of operators
FACES = ("triton", "diffusers", "diffusers compile", "reference", "compile")
NEAR = 0.01  # of a norm, and twice what diffusers' code is off by: bf16 rounds at each step


@dataclass
class Block:
    """A block of the same weights in both implementations, and inputs of both."""

    dim: int
    heads: int
    samples: int
    image: int  # tokens of each sample
    text: int
    device: torch.device
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

        d, n = self.dim // self.heads, self.samples
        generator = torch.Generator(self.device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=generator, device=self.device).mul_(scale).to(self.dtype)

        with self.device:
            self.theirs = QwenImageTransformerBlock(self.dim, self.heads, d).to(self.dtype)
            self.ours = QwenImageBlock(self.dim, self.heads, "tanh", last=False).to(self.dtype)
        for name, p in self.theirs.named_parameters():  # no gate or bias is zero, so that no branch hides
            noise = normal(*p.shape, scale=0.1 if p.ndim == 1 else p.shape[-1] ** -0.5)
            p.data.copy_(noise + 1 if "norm" in name else noise)
        self.ours.load_state_dict(self.theirs.state_dict())
        self.layout = self._layout(n)
        side = d // 8 * 3 // 2 * 2
        axes = d - 2 * side, side, side
        self.rotary = rotary_table(self.layout, axes)
        one = rotary_table(self._layout(1), axes)
        turns = torch.complex(one.cos, one.sin)
        self.their_rotary = turns[self.text :], turns[: self.text]  # image, text
        self.x = normal(self.layout.tokens, self.dim).requires_grad_()
        self.temb = normal(n, self.dim).requires_grad_()
        self.upstream = normal(self.layout.tokens, self.dim)

    def _layout(self, samples: int) -> PackLayout:
        return PackLayout.build([[(1, 1, self.image)]] * samples, [self.text] * samples, self.device)

    def program(self, face: str) -> Program:
        """A step of a face: results [S, D], gradients of inputs and of all parameters."""
        model: nn.Module = self.theirs if face.startswith("diffusers") else self.ours
        parameters = list(model.parameters())
        inputs, forward = self._theirs(face) if face.startswith("diffusers") else self._ours(face)

        def backward(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return torch.autograd.grad(outputs, [*inputs, *parameters], self._in_streams(self.upstream, len(outputs)))

        return Program(forward, backward)

    def _in_streams(self, x: Tensor, outputs: int) -> list[Tensor]:
        """Rows [S, D] as they are, or as text [N, t, D] and image [N, i, D]."""
        if outputs == 1:
            return [x]
        return [part.view(self.samples, -1, self.dim) for part in x.split(self.layout.stream_rows)]

    def _ours(self, kernel: str) -> tuple[list[Tensor], Callable[[], tuple[Tensor, ...]]]:
        def forward() -> tuple[Tensor, ...]:
            return self.ours(self.x, F.silu(self.temb), self.rotary, self.layout, kernel)

        return [self.x, self.temb], forward

    def _theirs(self, face: str) -> tuple[list[Tensor], Callable[[], tuple[Tensor, ...]]]:
        model: Callable[..., Any] = torch.compile(self.theirs) if face.endswith("compile") else self.theirs
        txt, img = (part.detach().clone().requires_grad_() for part in self._in_streams(self.x, 2))

        def forward() -> tuple[Tensor, ...]:
            return model(img, txt, None, self.temb, image_rotary_emb=self.their_rotary)

        return [txt, img, self.temb], forward

    def results(self, face: str) -> dict[str, Tensor]:
        """What a step of a face gives, by names that all faces share."""
        run = self.program(face)
        assert run.backward is not None
        outputs = run.forward()
        grads = run.backward(outputs)
        model: nn.Module = self.theirs if face.startswith("diffusers") else self.ours
        names = [name for name, _ in model.named_parameters()]
        inputs, grads = grads[: -len(names)], grads[-len(names) :]

        def rows(parts: Iterable[Tensor]) -> Tensor:
            return torch.cat([part.reshape(-1, self.dim) for part in parts])

        found = {"result": rows(outputs), "d x": rows(inputs[:-1]), "d temb": inputs[-1]}
        return {name: x.detach() for name, x in {**found, **dict(zip(names, grads))}.items()}

    def exact(self) -> dict[str, Tensor]:
        """The same in fp32, which is exact beside bf16, in plain PyTorch."""
        kept = self.x, self.temb, self.upstream
        self.x, self.temb = (x.detach().float().requires_grad_() for x in kept[:2])
        self.upstream = kept[2].float()
        self.ours.float()
        try:
            return self.results("reference")
        finally:
            self.ours.to(self.dtype)
            self.x, self.temb, self.upstream = kept

    def errors(self, face: str, exact: dict[str, Tensor]) -> dict[str, float]:
        """The error of each result and gradient of a face, as a share of its norm."""
        found, errors = self.results(face), {}
        for name, want in exact.items():
            error = ((found[name].float() - want).norm() / want.norm().clamp_min(1e-20)).item()
            errors[name] = error if math.isfinite(error) else math.inf
        return errors

    def check(self, face: str, exact: dict[str, Tensor], plain: dict[str, float]) -> dict[str, float]:
        """The errors; Wrong if one is too large beside that of `plain`, which is diffusers'."""
        errors = self.errors(face, exact)
        wrong = {n: e for n, e in errors.items() if not e <= (NEAR + 2 * plain[n] if face == "triton" else LOOSE)}
        if wrong:
            raise Wrong(", ".join(f"{name} is off by {e:.2g} of its norm" for name, e in wrong.items()))
        return errors


def memory(run: Program) -> dict[str, int]:
    """Bytes that a step needs beside weights and inputs: kept after the forward, and at most until its end."""
    assert run.backward is not None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = run.forward()
    kept = torch.cuda.memory_allocated() - before
    grads = run.backward(outputs)
    del outputs, grads
    torch.cuda.synchronize()
    return {"kept_after_forward": kept, "peak_with_gradients": torch.cuda.max_memory_allocated() - before}


def glue(run: Program, steps: int = 5) -> dict[str, float]:
    """Microseconds of a step in kernels of matmuls, of attention, and of all else. RuntimeError if it cannot tell."""
    from torch.profiler import ProfilerActivity, profile

    assert run.backward is not None
    run.backward(run.forward())
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            run.backward(run.forward())
        torch.cuda.synchronize()
    kernels, operators = [], []
    for e in profiler.key_averages():
        if e.device_type == torch.autograd.DeviceType.CPU:
            operators.append((e.key, e.self_device_time_total / steps))
        elif not getattr(e, "is_user_annotation", False):
            kernels.append((e.key, e.self_device_time_total / steps))
    return shares(kernels, operators)


def shares(kernels: Iterable[tuple[str, float]], operators: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Split the time of kernels by the operators that launched them."""
    found = {"matmuls": 0.0, "attention": 0.0}
    for name, time in operators:
        if name in MATMULS:
            found["matmuls"] += time
        elif any(part in name.lower() for part in ATTENTION) and not name.startswith("triton_"):
            # Inductor's kernels, whose names begin so, are called after all that went into them.
            found["attention"] += time
    total = sum(time for _, time in kernels)
    if min(found.values()) <= 0 or sum(found.values()) > total:
        raise RuntimeError(f"the profiler's figures do not add up: {total:.0f} us of kernels, of which {found}")
    return {**found, "glue": total - sum(found.values())}

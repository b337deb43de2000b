"""The fused operations as cases: inputs, what runs them (faces), what is exact, and the bytes that must move.

Faces of a case: "triton" is dstrain's kernels; "eager" what a user writes in bf16, as diffusers does; "compile" is
torch.compile of the latter, for any number of rows at a fixed width; "liger" is Liger's kernel where it has the same
operation. Biases that kernels can add are left out: in eager code the matmul adds them.

The least bytes of an operation are those of its rows, each read or written once: S rows of D (or F, or C) elements of
2 bytes, and what a row alone needs (angles, statistics of a head, the index of narrow rows). Tables, statistics of
whole rows and sums of chunks are left out: kernels move up to 3 % more than is counted here, and are not given credit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fused.cases import EPS, SEED, Case, Face, Maker, Tensors, both, liger, with_liger
from torch import Tensor

from dstrain.kernels import flow_match as flow
from dstrain.kernels.gelu import gelu, gelu_reference
from dstrain.kernels.modulation import (
    gated_norm_modulate,
    gated_norm_modulate_reference,
    gated_residual,
    gated_residual_reference,
    norm_modulate,
    norm_modulate_reference,
)
from dstrain.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from dstrain.kernels.swiglu import swiglu, swiglu_reference
from dstrain.kernels.timestep import timestep_embedding, timestep_embedding_reference
from dstrain.models.packing import PackLayout
from dstrain.models.qwen_image import rotary_table


def eager_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    shape, x = x.shape, x.unflatten(0, (len(scale), -1))  # [N, L, D], as a batch of diffusers'
    return (F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]).view(shape)


def eager_gated_residual(x: Tensor, h: Tensor, gate: Tensor) -> Tensor:
    n = len(gate)
    return (x.unflatten(0, (n, -1)) + gate[:, None] * h.unflatten(0, (n, -1))).view(x.shape)


def eager_gated_norm_modulate(
    x: Tensor, h: Tensor, gate: Tensor, shift: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    out = eager_gated_residual(x, h, gate)
    return out, eager_norm_modulate(out, shift, scale)


def by_row(make: Maker, a: int, b: int, *tables: Tensor) -> tuple[list[Tensor], Tensor]:
    """Tables with a row for each of the rows a to b, of one sample, and the index of these: quick to differentiate."""
    sample = a // make.size.length
    return [table[sample].expand(b - a, -1) for table in tables], torch.arange(b - a, device=make.device)


def make_norm_modulate(make: Maker) -> Case:
    s, segments = make.size, make.segments()

    def exact(t: Tensors, a: int, b: int) -> tuple[Tensor, ...]:
        tables, of_row = by_row(make, a, b, t["shift"], t["scale"])
        return (norm_modulate_reference(t["x"], *tables, of_row, EPS),)

    case = Case(
        rows={"x": make.normal(s.tokens, s.width, mean=0.5)},
        shared={name: make.normal(s.samples, s.width) for name in ("shift", "scale")},
        faces={
            "triton": lambda t: (norm_modulate(t["x"], t["shift"], t["scale"], segments, EPS, "triton"),),
            **both(eager_norm_modulate, lambda t: (t["x"], t["shift"], t["scale"])),
        },
        exact=exact,
        sample_rows=s.length,
        forward_bytes=2 * s.tokens * s.width * make.element,
        backward_bytes=3 * s.tokens * s.width * make.element,
        eager="F.layer_norm(x) * (1 + scale) + shift in bf16, on [samples, rows, width], as diffusers",
    )
    if s.samples > 1:
        case.notes["liger"] = "Liger's LayerNorm has one weight for all rows"
        return case

    def layer_norm() -> Face:
        function = liger("layer_norm", "LigerLayerNormFunction")
        return lambda t: (function.apply(t["x"], (1 + t["scale"])[0], t["shift"][0], EPS),)

    return with_liger(case, layer_norm)


def make_gated_residual(make: Maker) -> Case:
    s, segments = make.size, make.segments()

    def exact(t: Tensors, a: int, b: int) -> tuple[Tensor, ...]:
        (gate,), of_row = by_row(make, a, b, t["gate"])
        return (gated_residual_reference(t["x"], t["h"], (), gate, of_row, 1),)

    return Case(
        rows={name: make.normal(s.tokens, s.width) for name in ("x", "h")},
        shared={"gate": make.normal(s.samples, s.width)},
        faces={
            "triton": lambda t: (gated_residual(t["x"], t["h"], (), t["gate"], segments, "triton"),),
            **both(eager_gated_residual, lambda t: (t["x"], t["h"], t["gate"])),
        },
        exact=exact,
        sample_rows=s.length,
        forward_bytes=3 * s.tokens * s.width * make.element,
        backward_bytes=3 * s.tokens * s.width * make.element,  # the gradient of x is the one that comes in
        eager="x + gate * h in bf16, on [samples, rows, width], as diffusers",
        notes={"liger": "has no such operation"},
    )


def make_gated_norm_modulate(make: Maker) -> Case:
    s, segments, names = make.size, make.segments(), ("x", "h", "gate", "shift", "scale")

    def triton(t: Tensors) -> tuple[Tensor, ...]:
        return gated_norm_modulate(t["x"], t["h"], (), t["gate"], t["shift"], t["scale"], segments, EPS, "triton")

    def exact(t: Tensors, a: int, b: int) -> tuple[Tensor, ...]:
        tables, of_row = by_row(make, a, b, t["gate"], t["shift"], t["scale"])
        return gated_norm_modulate_reference(t["x"], t["h"], (), *tables, of_row, 1, EPS)

    return Case(
        rows={name: make.normal(s.tokens, s.width) for name in names[:2]},
        shared={name: make.normal(s.samples, s.width) for name in names[2:]},
        faces={"triton": triton, **both(eager_gated_norm_modulate, lambda t: tuple(t[n] for n in names))},
        exact=exact,
        sample_rows=s.length,
        forward_bytes=4 * s.tokens * s.width * make.element,
        backward_bytes=6 * s.tokens * s.width * make.element,
        eager="x + gate * h, then F.layer_norm(x) * (1 + scale) + shift, in bf16, as diffusers",
        notes={"liger": "its modulated norm is an RMSNorm, without the residual"},
    )


def eager_qk_norm_rope(
    text: tuple[Tensor, Tensor], image: tuple[Tensor, Tensor], weights: tuple[Tensor, ...], table: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    cos, sin = table  # [L, 1, d]

    def one(x: Tensor) -> Tensor:
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-imaginary, real], dim=-1).flatten(-2)
        return (x.float() * cos + turned.float() * sin).to(x.dtype).flatten(0, 1)

    norms = [F.rms_norm(x, x.shape[-1:], w, EPS) for x, w in zip((*text, *image), weights)]  # [N, t or i, H, d]
    return one(torch.cat(norms[::2], dim=1)), one(torch.cat(norms[1::2], dim=1))


def flat_qk_norm_rope(samples: int, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """The same with arguments in a row, and rows that are cut into samples first, which moves nothing."""
    parts = [x.unflatten(0, (samples, -1)) for x in tensors[:4]]
    return eager_qk_norm_rope((parts[0], parts[1]), (parts[2], parts[3]), tensors[4:8], (tensors[8], tensors[9]))


def make_qk_norm_rope(make: Maker) -> Case:
    s, weights = make.size, ("q0", "k0", "q1", "k1")  # of text, of image
    d, text, each = s.width // s.heads, s.tokens // 8, s.length // 8
    layout = PackLayout.build([[(1, 1, s.length - each)]] * s.samples, [each] * s.samples).to(make.device)
    side = d // 8 * 3 // 2 * 2
    rotary = rotary_table(layout, (d - 2 * side, side, side))
    cos, sin, rows = rotary.cos, rotary.sin, (text, s.tokens - text)
    in_row_order = (cos, sin) if rotary.places is None else (cos[rotary.places], sin[rotary.places])
    # Samples are alike, so that a batch needs the angles of one.
    wide = [table[: s.length].repeat_interleave(2, dim=1)[:, None] for table in (cos, sin)]
    names = "q 0", "k 0", "q 1", "k 1"  # text and image lie in tensors of their own where no kernel joins them

    def triton(t: Tensors) -> tuple[Tensor, ...]:
        norms = [t["q0"], t["q1"]], [t["k0"], t["k1"]]
        return qk_norm_rope(t["q"], t["k"], (), (), *norms, cos, sin, rotary.places, rows, EPS, "triton")

    def exact(t: Tensors, a: int, b: int) -> tuple[Tensor, ...]:
        first = min(max(text - a, 0), b - a)
        norms, table = ([t["q0"], t["q1"]], [t["k0"], t["k1"]]), [x[a:b].double() for x in in_row_order]
        return qk_norm_rope_reference(t["q"], t["k"], (), (), *norms, *table, None, (first, b - a - first), EPS)

    own = s.tokens * (d * 4 + 2 * s.heads * 4)  # angles, and 1 / rms of each head of q and k
    case = Case(
        rows={name: make.normal(s.tokens, s.heads, d) for name in ("q", "k")},
        shared={name: make.normal(d, scale=0.1, mean=1.0) for name in weights},
        faces={
            "triton": triton,
            **both(flat_qk_norm_rope, lambda t: (s.samples, *(t[n] for n in (*names, *weights)), *wide)),
        },
        exact=exact,
        order=rotary.places,
        cut={"q": text, "k": text},
        forward_bytes=4 * s.tokens * s.width * make.element + own,
        backward_bytes=6 * s.tokens * s.width * make.element + own,
        eager="F.rms_norm of text and of image, torch.cat, real rotary arithmetic in fp32 (diffusers' for FLUX)",
    )

    def norm_and_rope() -> Face:
        norm, rope = liger("rms_norm", "LigerRMSNormFunction"), liger("llama4_rope", "LigerLlama4RopeFunction")
        turns = torch.complex(cos, sin)[: s.length]

        def run(t: Tensors) -> tuple[Tensor, ...]:
            q0, k0, q1, k1 = (
                norm.apply(t[n], t[w], EPS, 0.0, "llama", False).unflatten(0, (s.samples, -1))
                for n, w in zip(names, weights)
            )
            q, k = rope.apply(torch.cat([q0, q1], dim=1), torch.cat([k0, k1], dim=1), turns)
            return q.flatten(0, 1), k.flatten(0, 1)

        return run

    return with_liger(case, norm_and_rope)


def eager_gelu_tanh(h: Tensor) -> Tensor:
    return F.gelu(h, approximate="tanh")


def eager_gelu_sigmoid(h: Tensor) -> Tensor:
    return h * torch.sigmoid(1.702 * h)


def make_gelu(make: Maker, form: str) -> Case:
    s, eager = make.size, eager_gelu_tanh if form == "tanh" else eager_gelu_sigmoid
    return Case(
        rows={"h": make.normal(s.tokens, s.hidden)},
        faces={
            "triton": lambda t: (gelu(t["h"], (), (), form, "triton"),),
            **both(eager, lambda t: (t["h"],)),
        },
        exact=lambda t, a, b: (gelu_reference(t["h"], form=form),),
        forward_bytes=2 * s.tokens * s.hidden * make.element,
        backward_bytes=3 * s.tokens * s.hidden * make.element,
        eager="F.gelu(h, approximate='tanh')" if form == "tanh" else "h * torch.sigmoid(1.702 * h) in bf16",
        notes={"liger": "has GELU times another input only"},
    )


def eager_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def make_swiglu(make: Maker) -> Case:
    s = make.size
    case = Case(
        rows={name: make.normal(s.tokens, s.hidden) for name in ("gate", "up")},
        faces={
            "triton": lambda t: (swiglu(t["gate"], t["up"], "triton"),),
            **both(eager_swiglu, lambda t: (t["gate"], t["up"])),
        },
        exact=lambda t, a, b: (swiglu_reference(t["gate"], t["up"]),),
        forward_bytes=3 * s.tokens * s.hidden * make.element,
        backward_bytes=5 * s.tokens * s.hidden * make.element,
        eager="F.silu(gate) * up in bf16",
    )

    def silu_mul() -> Face:
        function = liger("swiglu", "LigerSiLUMulFunction")
        return lambda t: (function.apply(t["gate"], t["up"]),)

    return with_liger(case, silu_mul)


@dataclass(frozen=True)
class Index:
    """Whose a row of latents is, and the draw number of each sample."""

    sample: Tensor
    first: Tensor
    counts: Tensor
    draws: Tensor

    @staticmethod
    def of(make: Maker) -> "Index":
        lengths = torch.tensor([make.size.length] * make.size.samples)
        sample = torch.arange(len(lengths)).repeat_interleave(lengths)
        found = sample, lengths.cumsum(0) - lengths, lengths, torch.arange(len(lengths)) + 7
        return Index(*(x.to(make.device) for x in found))

    def noise(self, channels: int, device: torch.device) -> Tensor:
        if device.type == "meta":
            return torch.empty(len(self.sample), channels, device=device)
        return flow.noise_reference(channels, self.sample, self.first, SEED, self.draws)


def eager_add_noise(x0: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    sigma, shape = sigmas[:, None, None], (len(sigmas), -1)
    return ((1 - sigma) * x0.unflatten(0, shape) + sigma * noise.unflatten(0, shape)).view(noise.shape)


def eager_draw_and_add_noise(x0: Tensor, sigmas: Tensor) -> Tensor:
    return eager_add_noise(x0, torch.randn_like(x0, dtype=torch.float32), sigmas)


def make_add_noise(make: Maker, drawn: bool = True) -> Case:
    """With `drawn` eager code draws noise of its own, as is timed; else it is given ours, so that it can be checked."""
    s, index = make.size, Index.of(make)
    sigmas = torch.linspace(0.2, 0.9, s.samples, device=make.device)
    if drawn:
        eager = both(eager_draw_and_add_noise, lambda t: (t["x0"], sigmas))
    else:
        noise = index.noise(s.channels, make.device)
        eager = both(eager_add_noise, lambda t: (t["x0"], noise, sigmas))
    at = index.first, SEED, index.draws

    def exact(t: Tensors, a: int, b: int) -> tuple[Tensor, ...]:
        rows = index.sample[a:b], index.first - a, SEED, index.draws
        return (flow.add_noise_reference(t["x0"], sigmas.double(), *rows),)

    return Case(
        rows={"x0": make.normal(s.tokens, s.channels, grad=False)},
        faces={
            "triton": lambda t: (flow.add_noise(t["x0"], sigmas, index.sample, *at, "triton"),),
            **eager,
        },
        exact=exact,
        forward_bytes=s.tokens * (s.channels * (make.element + 4) + 8),
        backward_bytes=0,
        eager="(1 - sigma) * x0 + sigma * torch.randn_like(x0): another generator, which has no key",
        notes={"liger": "has no such operation"},
        bound=2e-5,  # fp32 out
    )


def eager_velocity_loss(pred: Tensor, x0: Tensor, noise: Tensor, weights: Tensor) -> Tensor:
    error = (pred.float() - (noise - x0)).square()
    return weights * error.unflatten(0, (len(weights), -1)).mean(dim=(1, 2))


def make_velocity_loss(make: Maker) -> Case:
    s, index = make.size, Index.of(make)
    x0, noise = make.normal(s.tokens, s.channels, grad=False), index.noise(s.channels, make.device)
    weights = torch.linspace(0.5, 1.5, s.samples, device=make.device)
    at = index.sample, index.first, index.counts, SEED, index.draws

    def exact(t: Tensors, a: int, b: int) -> tuple[Tensor, ...]:
        error = flow.squared_error_reference(
            t["pred"], x0[a:b].double(), index.sample[a:b], index.first - a, SEED, index.draws
        )
        total = weights.new_zeros(s.samples, dtype=torch.float64).index_add(0, index.sample[a:b], error.sum(dim=1))
        return (weights * total / (index.counts * s.channels),)

    return Case(
        rows={"pred": make.normal(s.tokens, s.channels)},
        faces={
            "triton": lambda t: (flow.velocity_loss(t["pred"], x0, weights, *at, "triton"),),
            **both(eager_velocity_loss, lambda t: (t["pred"], x0, noise, weights)),
        },
        exact=exact,
        sums=True,
        forward_bytes=s.tokens * (3 * s.channels * make.element + 8),
        backward_bytes=s.tokens * (2 * s.channels * make.element + 8),
        eager="weights * mean((pred.float() - (noise - x0))^2) by sample, with noise kept in fp32",
        notes={"liger": "has no such operation"},
    )


def eager_timestep(sigmas: Tensor) -> Tensor:
    return timestep_embedding_reference(sigmas, dtype=torch.bfloat16)


def make_timestep_embedding(make: Maker) -> Case:
    s = make.size
    sigmas = torch.linspace(0.01, 0.99, s.samples, device=make.device)

    def exact(t: Tensors, a: int, b: int) -> tuple[Tensor, ...]:
        return (timestep_embedding_reference(t["sigmas"], dtype=torch.float64),)

    return Case(
        rows={"sigmas": sigmas},
        faces={
            "triton": lambda t: (timestep_embedding(t["sigmas"], dtype=torch.bfloat16, mode="triton"),),
            **both(eager_timestep, lambda t: (t["sigmas"],)),
        },
        exact=exact,
        forward_bytes=s.samples * (256 * 2 + 4),
        backward_bytes=0,
        eager="arange, exp, outer product, cos, sin, cat, to bf16, as diffusers",
        notes={"liger": "has no such operation"},
    )


OPERATIONS: dict[str, Callable[[Maker], Case]] = {
    "norm_modulate": make_norm_modulate,
    "gated_norm_modulate": make_gated_norm_modulate,
    "gated_residual": make_gated_residual,
    "qk_norm_rope": make_qk_norm_rope,
    "gelu_tanh": lambda make: make_gelu(make, "tanh"),
    "gelu_sigmoid": lambda make: make_gelu(make, "sigmoid"),
    "swiglu": make_swiglu,
    "add_noise": make_add_noise,
    "velocity_loss": make_velocity_loss,
    "timestep_embedding": make_timestep_embedding,
}
NARROW = ("add_noise", "velocity_loss", "timestep_embedding")  # do not depend on the width: timed at one model only

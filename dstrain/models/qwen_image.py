"""The Qwen-Image diffusion transformer on packed sequences.

Architecture: Qwen-Image technical report (arXiv 2508.02324). Parameters have the names and shapes of diffusers'
`QwenImageTransformer2DModel`, so its checkpoints load and ours load there. Letters in shape comments: N samples,
T text tokens, I image tokens, S = T + I, D width, H heads, d head width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dstrain.errors import ConfigError
from dstrain.kernels.attention import packed_attention
from dstrain.kernels.backend import choose
from dstrain.kernels.dual_stream import Rotary, gated_mlp_in, gated_mlp_out, modulated_qkv, permute_rows
from dstrain.kernels.gelu import gelu
from dstrain.kernels.linear import Linear, biases_of
from dstrain.kernels.modulation import gated_norm_modulate, gated_residual, norm_modulate
from dstrain.kernels.qk_norm_rope import qk_norm_rope
from dstrain.kernels.timestep import timestep_embedding
from dstrain.models.activations import run_blocks
from dstrain.models.base import DiT
from dstrain.models.lora import as_linear
from dstrain.models.packing import PackLayout

Gelu = Literal["tanh", "sigmoid"]
EPS = 1e-6
ROPE_BASE = 10_000.0
TIME_CHANNELS = 256
LORA_LAYERS = (
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    *("attn.to_out.0", "attn.to_add_out", "img_mlp.net.2", "txt_mlp.net.2", "img_mod.1", "txt_mod.1"),
)  # DiffSynth-Studio's choice, so that ranks and sizes compare


@dataclass(frozen=True)
class QwenImageParams:
    """Hyperparameters, named as in the `transformer/config.json` of a diffusers checkpoint."""

    patch_size: int = 2
    in_channels: int = 64
    out_channels: int = 16
    num_layers: int = 60
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 3584
    axes_dims_rope: tuple[int, int, int] = (16, 56, 56)

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str = "config.json") -> "QwenImageParams":
        """Read a diffusers config; ConfigError names a missing, wrong or unsupported key and the file `where`."""
        wanted = config.get("_class_name", "QwenImageTransformer2DModel")
        if wanted != "QwenImageTransformer2DModel":
            raise ConfigError(f"{where}: _class_name is {wanted!r}, this family needs 'QwenImageTransformer2DModel'")
        for key in ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope"):
            if config.get(key):
                raise ConfigError(f"{where}: {key} = {config[key]!r} is a variant that is not supported yet")
        values = {f.name: config.get(f.name, f.default) for f in fields(cls)}
        axes = values.pop("axes_dims_rope")
        for key, value in values.items():
            most = 1024 if key == "num_layers" else 1 << 16
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ConfigError(f"{where}: {key} must be a whole number from 1 to {most}, not {value!r}")
        if (
            not isinstance(axes, (list, tuple))
            or not all(isinstance(a, int) and a > 0 and a % 2 == 0 for a in axes)
            or len(axes) != 3
            or sum(axes) != values["attention_head_dim"]
        ):
            raise ConfigError(
                f"{where}: axes_dims_rope {axes!r} must be three even numbers that add up to"
                f" attention_head_dim {values['attention_head_dim']}"
            )
        return cls(axes_dims_rope=tuple(axes), **values)

    @property
    def width(self) -> int:
        """D, the width of the residual streams."""
        return self.num_attention_heads * self.attention_head_dim


class QwenImageDiT(DiT):
    """velocity = DiT(noisy latents, prompt embeddings, sigma), for every sample of a pack at once.

    Nothing reads the text stream behind the last attention: the last block leaves out what would follow there.
    """

    lora_targets = tuple(f"transformer_blocks.*.{layer}" for layer in LORA_LAYERS)

    def __init__(self, params: QwenImageParams, *, gelu: Gelu = "tanh") -> None:
        super().__init__()
        self.params = params
        self.width = D = params.width
        self.depth = params.num_layers
        self.time_text_embed = TimeEmbedding(D)
        self.txt_norm = nn.RMSNorm(params.joint_attention_dim, eps=EPS)
        self.img_in = nn.Linear(params.in_channels, D)
        self.txt_in = nn.Linear(params.joint_attention_dim, D)
        self.transformer_blocks = nn.ModuleList(
            QwenImageBlock(D, params.num_attention_heads, gelu, last=i == params.num_layers - 1)
            for i in range(params.num_layers)
        )
        self.norm_out = AdaLayerNormOut(D)
        self.proj_out = nn.Linear(D, params.patch_size**2 * params.out_channels)
        self.unused = frozenset(
            f"transformer_blocks.{params.num_layers - 1}.{layer}.{kind}"
            for layer in ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")
            for kind in ("weight", "bias")
        )

    def forward(self, latents: Tensor, prompt_embeds: Tensor, sigmas: Tensor, layout: PackLayout) -> Tensor:
        """Predict the velocity of every image token.

        Args:
            latents: [I, in_channels] patchified noisy latents.
            prompt_embeds: [T, joint_attention_dim] text embeddings without padding.
            sigmas: [N] noise levels in [0, 1], fp32 (the timestep is 1000 sigma).
            layout: where each sample's tokens lie.

        Returns:
            [I, patch_size**2 * out_channels] in the dtype of the weights.
        """
        given = {"prompt_embeds": prompt_embeds, "latents": latents, "sigmas": sigmas}
        for (name, tensor), count in zip(given.items(), (*layout.stream_rows, len(layout))):
            if len(tensor) != count:
                raise ValueError(f"{name} must have the {count} rows of the layout, got {len(tensor)}")
        dtype = self.img_in.weight.dtype
        img = self.img_in(latents.to(dtype))  # [I, D]
        txt = self.txt_in(self.txt_norm(prompt_embeds.to(dtype)))  # [T, D]
        cond = F.silu(self.time_text_embed(sigmas, dtype))  # [N, D]
        rotary = rotary_table(layout, self.params.axes_dims_rope)
        rows = torch.cat([txt, img])  # [S, D]
        (img,) = run_blocks(self.transformer_blocks, self.activations, (rows,), (cond, rotary, layout, self.kernel))
        return self.proj_out(self.norm_out(img, cond, layout, self.kernel))

    @property
    def attention_length(self) -> int:
        """A block's matrices take 24 D^2 FLOPs a token, its attention 4 D a token and token attended to."""
        return 6 * self.width

    def forward_flops(self, layout: PackLayout) -> int:
        """Count exactly: both streams, joint bidirectional attention, modulation once a sample."""
        p, D, L, N = self.params, self.width, self.depth, len(layout)
        image, text = sum(layout.image_lens), sum(layout.text_lens)
        linear = L * 24 * D * D * (image + text)  # 4 D^2 attention + 8 D^2 perceptron weights a token
        linear -= 18 * D * D * text  # the last block has no text perceptron and no projection in front of it
        modulation = L * 24 * D * D * N
        attention = L * 4 * D * sum(n * n for n in layout.joint_lens)
        ends = 2 * D * (image * (p.in_channels + p.patch_size**2 * p.out_channels) + text * p.joint_attention_dim)
        time = 2 * N * (TIME_CHANNELS * D + D * D + 2 * D * D)
        return linear + modulation + attention + ends + time

    def initial(self, name: str, shape: torch.Size) -> tuple[float, float]:
        """Mean and standard deviation of a tensor at the start of training from scratch.

        adaLN-Zero (Peebles and Xie, arXiv 2212.09748): modulations and the output start at zero, so every block
        starts as the identity; other matrices as Glorot and Bengio (2010).
        """
        if len(shape) == 1:
            return (1.0 if "norm" in name and name.endswith("weight") else 0.0), 0.0
        if "_mod." in name or name.startswith(("norm_out.", "proj_out.")):
            return 0.0, 0.0
        return 0.0, (2 / (shape[0] + shape[1])) ** 0.5


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep, then a two-layer perceptron."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.timestep_embedder = TimestepMLP(dim)

    def forward(self, sigmas: Tensor, dtype: torch.dtype) -> Tensor:
        """Embed sigmas [N]; the sinusoids stay fp32, since bf16 would merge neighbouring timesteps. -> [N, D]."""
        return self.timestep_embedder(timestep_embedding(sigmas.float(), TIME_CHANNELS, dtype=dtype))


class TimestepMLP(nn.Module):
    """Linear, SiLU, Linear."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(TIME_CHANNELS, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """[N, TIME_CHANNELS] -> [N, D]."""
        return self.linear_2(F.silu(self.linear_1(x)))


class QwenImageBlock(nn.Module):
    """Two streams, text and image, that meet in one attention. Their rows lie in one tensor, text in front."""

    gathered = True  # whether the block's weights are there as a whole while it runs; the engine knows

    def __init__(self, dim: int, heads: int, gelu: Gelu, *, last: bool) -> None:
        super().__init__()
        self.last = last
        self.gelu = gelu
        # The SiLU in front of each modulation is applied once for all blocks, hence the Identity in its place.
        self.img_mod = nn.Sequential(nn.Identity(), nn.Linear(dim, 6 * dim))
        self.txt_mod = nn.Sequential(nn.Identity(), nn.Linear(dim, 6 * dim))
        self.attn = JointAttention(dim, heads)
        self.img_mlp = FeedForward(dim)
        self.txt_mlp = FeedForward(dim)

    def forward(self, x: Tensor, cond: Tensor, rotary: Rotary, layout: PackLayout, kernel: str) -> tuple[Tensor]:
        """x [S, D], cond [N, D] -> (x after the block,), of the last block the image rows only."""
        tables = torch.cat([self.txt_mod(cond), self.img_mod(cond)])  # [2 N, 6 D]
        shift1, scale1, gate1, shift2, scale2, gate2 = tables.chunk(6, dim=-1)
        rows: tuple[int, ...] = layout.stream_rows
        segments, behind = layout.segments, self._behind_attention()
        # With the matmuls inside what autograd sees, less is kept.
        linears = self._linears() if choose(kernel, x.device) == "triton" else None
        if linears:
            norms = [[m.weight for m in pair] for pair in self.attn.norms]
            q, k, v, x = modulated_qkv(x, shift1, scale1, linears[:3], norms, rotary, segments, EPS)
        else:
            q, k, v = self.attn(norm_modulate(x, shift1, scale1, segments, EPS, kernel), rotary, rows, kernel)
        heads = in_stream_order(packed_attention(q, k, v, layout).flatten(1), rotary)
        if self.last:
            x, heads, rows, segments = x[rows[0] :], heads[rows[0] :], rows[1:], layout.image_segments
            gate1, shift2, scale2, gate2 = (t[len(layout) :] for t in (gate1, shift2, scale2, gate2))
        if linears:
            out, mlp_in, mlp_out = linears[3:]
            x, hidden = gated_mlp_in(x, heads, gate1, shift2, scale2, out, mlp_in, segments, EPS)
            return (gated_mlp_out(x, hidden, gate2, biases_of(mlp_in), mlp_out, segments, self.gelu),)
        x, y = gated_norm_modulate(x, each(behind[0], heads, rows), (), gate1, shift2, scale2, segments, EPS, kernel)
        hidden = gelu(each(behind[1], y, rows), (), rows, self.gelu, kernel)
        return (gated_residual(x, each(behind[2], hidden, rows), (), gate2, segments, kernel),)

    def _behind_attention(self) -> tuple[Sequence[nn.Module], ...]:
        """The projection and the perceptron's two layers, for text and image; of the last block for image only."""
        text = self.attn.to_add_out, *self.txt_mlp.layers
        image = self.attn.to_out[0], *self.img_mlp.layers
        return tuple(pair[1:] if self.last else pair for pair in zip(text, image))

    def _linears(self) -> list[list[Linear]] | None:
        """Of q, k, v, and the layers behind attention, if all weights may be used directly and are here."""
        if not self.gathered:
            return None
        groups = [[as_linear(m) for m in group] for group in (*self.attn.projections, *self._behind_attention())]
        return None if any(layer is None for group in groups for layer in group) else cast(Any, groups)


class JointAttention(nn.Module):
    """Own projections and QK norms for each stream. The block calls the attention and the output projections."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (NormWeight(dim // heads) for _ in range(4))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])  # a list because the checkpoint's key is to_out.0
        self.to_add_out = nn.Linear(dim, dim)

    @property
    def projections(self) -> tuple[tuple[nn.Module, nn.Module], ...]:
        """Of q, k and v: text's and image's."""
        return (self.add_q_proj, self.to_q), (self.add_k_proj, self.to_k), (self.add_v_proj, self.to_v)

    @property
    def norms(self) -> tuple[tuple["NormWeight", "NormWeight"], ...]:
        """Of q and k: text's and image's."""
        return (self.norm_added_q, self.norm_q), (self.norm_added_k, self.norm_k)

    def forward(self, y: Tensor, rotary: Rotary, rows: Sequence[int], kernel: str) -> tuple[Tensor, Tensor, Tensor]:
        """y [S, D], text rows in front -> q, k, v [S, H, d] in joint order, q and k normed and turned."""
        q, k, v = (each(layers, y, rows).unflatten(-1, (self.heads, -1)) for layers in self.projections)
        norm_q, norm_k = ([m() for m in pair] for pair in self.norms)
        q, k = qk_norm_rope(
            q, k, (), (), norm_q, norm_k, rotary.cos, rotary.sin, rotary.places, tuple(rows), EPS, kernel
        )
        return q, k, in_joint_order(v, rotary)


class NormWeight(nn.Module):
    """The weight of an RMSNorm that a kernel applies. Called, so that ZeRO-3 gathers it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self) -> Tensor:
        """The weight [d], in memory of its own."""
        return self.weight.clone()


class FeedForward(nn.Module):
    """Linear to 4 D, GELU, Linear back: the layers that the block calls."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.ModuleList([GeluProjection(dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    @property
    def layers(self) -> tuple[nn.Module, nn.Module]:
        """Both."""
        return cast(GeluProjection, self.net[0]).proj, self.net[2]


class GeluProjection(nn.Module):
    """The first Linear of a perceptron, for the checkpoint's key."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 4 * dim)


class AdaLayerNormOut(nn.Module):
    """The last norm, modulated; its Linear gives scale before shift, unlike the blocks."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, cond: Tensor, layout: PackLayout, kernel: str) -> Tensor:
        """x [I, D], cond [N, D] -> [I, D]."""
        scale, shift = self.linear(cond).chunk(2, dim=-1)
        return norm_modulate(x, shift, scale, layout.image_segments, EPS, kernel)


QwenImageDiT.block_class = QwenImageBlock


def each(layers: Sequence[nn.Module], x: Tensor, rows: Sequence[int]) -> Tensor:
    """Call each stream's layer on its rows: [S, in] -> [S, out]."""
    return torch.cat([layer(part) for layer, part in zip(layers, x.split(list(rows)))])


def in_joint_order(x: Tensor, rotary: Rotary) -> Tensor:
    """Rows [S, ...], text in front, in the order that attention works in."""
    return x if rotary.rows is None or rotary.places is None else permute_rows(x, rotary.rows, rotary.places)


def in_stream_order(x: Tensor, rotary: Rotary) -> Tensor:
    """Rows [S, ...] of the joint order with text in front again."""
    return x if rotary.rows is None or rotary.places is None else permute_rows(x, rotary.places, rotary.rows)


def rotary_table(layout: PackLayout, axes: tuple[int, int, int]) -> Rotary:
    """Cosines and sines of the layout's positions; each axis turns its own share of the channels."""
    angles = []
    for axis, dim in enumerate(axes):
        ramp = torch.arange(0, dim, 2, dtype=torch.float32, device=layout.positions.device) / dim
        angles.append(layout.positions[:, axis, None].float() * (1.0 / ROPE_BASE**ramp))
    table = torch.cat(angles, dim=-1)  # [S, d / 2]
    if len(layout) == 1:  # text in front of image is the joint order
        return Rotary(table.cos(), table.sin())
    return Rotary(table.cos(), table.sin(), layout.joint_inverse, layout.joint_index)

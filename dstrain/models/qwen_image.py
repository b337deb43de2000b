"""The Qwen-Image diffusion transformer on packed sequences.

Architecture: Qwen-Image technical report (arXiv 2508.02324). Parameters have the names and shapes of diffusers'
`QwenImageTransformer2DModel`, so its checkpoints load and ours load there. Letters in shape comments: N samples,
T text tokens, I image tokens, S = T + I, D width, H heads, d head width.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dstrain.errors import ConfigError
from dstrain.kernels.attention import packed_attention
from dstrain.models.activations import run_blocks
from dstrain.models.base import DiT
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
        dtype = self.img_in.weight.dtype
        img = self.img_in(latents.to(dtype))  # [I, D]
        txt = self.txt_in(self.txt_norm(prompt_embeds.to(dtype)))  # [T, D]
        cond = F.silu(self.time_text_embed(sigmas, dtype))  # [N, D]
        rotary = rotary_table(layout.positions, self.params.axes_dims_rope)
        _, img = run_blocks(self.transformer_blocks, self.activations, (txt, img), (cond, rotary, layout))
        return self.proj_out(self.norm_out(img, cond, layout.image_sample))

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
        half = TIME_CHANNELS // 2
        ramp = torch.arange(half, dtype=torch.float32, device=sigmas.device)
        frequencies = torch.exp(-math.log(ROPE_BASE) * ramp / half)
        angles = sigmas.float()[:, None] * frequencies * 1000.0  # [N, half]
        return self.timestep_embedder(torch.cat([angles.cos(), angles.sin()], dim=-1).to(dtype))


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
    """Two streams, text and image, that meet in one attention."""

    def __init__(self, dim: int, heads: int, gelu: Gelu, *, last: bool) -> None:
        super().__init__()
        self.last = last
        # The SiLU in front of each modulation is applied once for all blocks, hence the Identity in its place.
        self.img_mod = nn.Sequential(nn.Identity(), nn.Linear(dim, 6 * dim))
        self.txt_mod = nn.Sequential(nn.Identity(), nn.Linear(dim, 6 * dim))
        self.attn = JointAttention(dim, heads)
        self.img_mlp = FeedForward(dim, gelu)
        self.txt_mlp = FeedForward(dim, gelu)

    def forward(
        self, txt: Tensor, img: Tensor, cond: Tensor, rotary: tuple[Tensor, Tensor], layout: PackLayout
    ) -> tuple[Tensor, Tensor]:
        """txt [T, D], img [I, D], cond [N, D] -> the streams after the block (last: txt as it came)."""
        img_shift1, img_scale1, img_gate1, img_shift2, img_scale2, img_gate2 = self.img_mod(cond).chunk(6, dim=-1)
        txt_shift1, txt_scale1, txt_gate1, txt_shift2, txt_scale2, txt_gate2 = self.txt_mod(cond).chunk(6, dim=-1)
        of_img, of_txt = layout.image_sample, layout.text_sample

        txt_heads, img_heads = self.attn(
            modulated_norm(txt, txt_shift1, txt_scale1, of_txt),
            modulated_norm(img, img_shift1, img_scale1, of_img),
            rotary,
            layout,
        )
        img = img + img_gate1[of_img] * self.attn.to_out[0](img_heads)
        img = img + img_gate2[of_img] * self.img_mlp(modulated_norm(img, img_shift2, img_scale2, of_img))
        if self.last:
            return txt, img
        txt = txt + txt_gate1[of_txt] * self.attn.to_add_out(txt_heads)
        txt = txt + txt_gate2[of_txt] * self.txt_mlp(modulated_norm(txt, txt_shift2, txt_scale2, of_txt))
        return txt, img


class JointAttention(nn.Module):
    """Own projections and QK norms for each stream, one attention over both. The block calls the output projections."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
        self.norm_q, self.norm_k, self.norm_added_q, self.norm_added_k = (
            nn.RMSNorm(dim // heads, eps=EPS) for _ in range(4)
        )
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])  # a list because the checkpoint's key is to_out.0
        self.to_add_out = nn.Linear(dim, dim)

    def forward(
        self, txt: Tensor, img: Tensor, rotary: tuple[Tensor, Tensor], layout: PackLayout
    ) -> tuple[Tensor, Tensor]:
        """txt [T, D], img [I, D] -> the heads' results for each stream, before their output projections."""
        split = (-1, (self.heads, txt.shape[-1] // self.heads))
        order = layout.joint_index
        q = torch.cat(
            [
                self.norm_added_q(self.add_q_proj(txt).unflatten(*split)),
                self.norm_q(self.to_q(img).unflatten(*split)),
            ]
        )
        k = torch.cat(
            [
                self.norm_added_k(self.add_k_proj(txt).unflatten(*split)),
                self.norm_k(self.to_k(img).unflatten(*split)),
            ]
        )
        v = torch.cat([self.add_v_proj(txt), self.to_v(img)]).unflatten(*split)  # [S, H, d]
        out = packed_attention(rotate(q[order], rotary), rotate(k[order], rotary), v[order], layout)
        txt_heads, img_heads = out.flatten(1)[layout.joint_inverse].split([len(txt), len(img)])
        return txt_heads, img_heads


class FeedForward(nn.Module):
    """Linear to 4 D, GELU, Linear back."""

    def __init__(self, dim: int, gelu: Gelu) -> None:
        super().__init__()
        self.net = nn.ModuleList([GeluProjection(dim, gelu), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        """[n, D] -> [n, D]."""
        return self.net[2](self.net[0](x))


class GeluProjection(nn.Module):
    """The first Linear with its activation: tanh as in diffusers, or x sigmoid(1.702 x) as in DiffSynth."""

    def __init__(self, dim: int, gelu: Gelu) -> None:
        super().__init__()
        self.proj = nn.Linear(dim, 4 * dim)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        """[n, D] -> [n, 4 D]."""
        h = self.proj(x)
        return F.gelu(h, approximate="tanh") if self.gelu == "tanh" else h * torch.sigmoid(1.702 * h)


class AdaLayerNormOut(nn.Module):
    """The last norm, modulated; its Linear gives scale before shift, unlike the blocks."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, cond: Tensor, of_sample: Tensor) -> Tensor:
        """x [I, D], cond [N, D], of_sample [I] -> [I, D]."""
        scale, shift = self.linear(cond).chunk(2, dim=-1)
        return modulated_norm(x, shift, scale, of_sample)


QwenImageDiT.block_class = QwenImageBlock


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, of_sample: Tensor) -> Tensor:
    """LayerNorm without affine, then (1 + scale) x + shift with the row of each token's sample.

    x [n, D], shift and scale [N, D], of_sample [n]. Indexing (not index_select) because its backward on CUDA sorts
    instead of adding atomically: reruns stay bit-identical.
    """
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale)[of_sample] + shift[of_sample]


def rotary_table(positions: Tensor, axes: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Cosines and sines [S, 1, d / 2] fp32 for positions [S, 3]; each axis turns its own share of the channels."""
    angles = []
    for axis, dim in enumerate(axes):
        ramp = torch.arange(0, dim, 2, dtype=torch.float32, device=positions.device) / dim
        angles.append(positions[:, axis, None].float() * (1.0 / ROPE_BASE**ramp))
    table = torch.cat(angles, dim=-1)[:, None]
    return table.cos(), table.sin()


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn neighbouring channel pairs of x [S, H, d] by the angles of their token, in fp32."""
    cos, sin = rotary
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)

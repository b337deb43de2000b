"""A fast path for training `AutoencoderKLQwenImage` on single pictures.

With one frame a causal 3-D convolution only ever sees its last temporal slice (the others meet the zero
padding), so the model is the 2-D network below: same modules, same parameter names, one axis less. The
result is written back with zeros where a picture cannot reach (earlier slices, `time_conv`).
"""

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from torch import Tensor, nn


class ImageVAE(nn.Module):
    """The 2-D network inside a (CPU, fp32) Qwen-Image VAE; takes over the modules of `vae`."""

    def __init__(self, vae: AutoencoderKLQwenImage) -> None:
        super().__init__()
        for name, module in list(vae.named_modules()):
            if isinstance(module, QwenImageCausalConv3d):
                parent, _, child = name.rpartition(".")
                if child == "time_conv":
                    delattr(vae.get_submodule(parent), child)
                else:
                    setattr(vae.get_submodule(parent), child, last_slice(module))
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv
        self.post_quant_conv, self.decoder = vae.post_quant_conv, vae.decoder

    def encode(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance [B, z, H/8, W/8] of pictures [B, 3, H, W] in [-1, 1]."""
        x = self.encoder.conv_in(pictures)
        for layer in self.encoder.down_blocks:
            x = layer.resample(x) if hasattr(layer, "resample") else residual(layer, x)
        x = head(self.encoder, middle(self.encoder.mid_block, x))
        mean, logvar = self.quant_conv(x).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, latents: Tensor) -> Tensor:
        """Return pictures [B, 3, H, W], not clamped, of latents [B, z, H/8, W/8]."""
        x = middle(self.decoder.mid_block, self.decoder.conv_in(self.post_quant_conv(latents)))
        for block in self.decoder.up_blocks:
            for layer in block.resnets:
                x = residual(layer, x)
            if block.upsamplers is not None:
                convolution = block.upsamplers[0].resample[1]
                x = convolution(F.interpolate(x, scale_factor=2.0, mode="nearest-exact"))
        return head(self.decoder, x)


def last_slice(conv3d: nn.Conv3d) -> nn.Conv2d:
    """Return the 2-D convolution that `conv3d` is for a single frame."""
    out_channels, in_channels, _, size, _ = conv3d.weight.shape
    conv2d = nn.Conv2d(in_channels, out_channels, size, padding=size // 2)
    with torch.no_grad():
        conv2d.weight.copy_(conv3d.weight[:, :, -1])
        conv2d.bias.copy_(conv3d.bias)
    return conv2d


def write_back(state: dict[str, Tensor], vae: AutoencoderKLQwenImage) -> None:
    """Put the 2-D weights `state` into a plain VAE, with zeros where a picture cannot reach."""
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            parameter.zero_()
            if name in state:
                target = parameter[:, :, -1] if parameter.dim() == state[name].dim() + 1 else parameter
                target.copy_(state[name])


def rms_norm(norm: nn.Module, x: Tensor) -> Tensor:
    scale = torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-12)
    return x * scale * norm.gamma.view(-1, 1, 1)


def residual(block: nn.Module, x: Tensor) -> Tensor:
    h = block.conv1(F.silu(rms_norm(block.norm1, x)))
    h = block.conv2(F.silu(rms_norm(block.norm2, h)))
    return block.conv_shortcut(x) + h


def attention(block: nn.Module, x: Tensor) -> Tensor:
    qkv = block.to_qkv(rms_norm(block.norm, x)).flatten(2).transpose(1, 2)  # [B, HW, 3C]
    h = F.scaled_dot_product_attention(*qkv.unsqueeze(1).chunk(3, dim=-1)).squeeze(1)  # [B, HW, C]
    return x + block.proj(h.transpose(1, 2).reshape(x.shape))


def middle(block: nn.Module, x: Tensor) -> Tensor:
    x = residual(block.resnets[0], x)
    return residual(block.resnets[1], attention(block.attentions[0], x))


def head(coder: nn.Module, x: Tensor) -> Tensor:
    return coder.conv_out(F.silu(rms_norm(coder.norm_out, x)))

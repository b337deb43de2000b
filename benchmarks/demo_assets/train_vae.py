"""Train the demo's Qwen-Image VAE on emoji pictures that the demo does not contain.

    python train_vae.py PACKAGE --out launch/demo/model/vae --results results.json

One CPU thread is enough: 8,000 steps of 8 pictures take about half an hour. A usable VAE is written every
`--save-every` steps, the last one at the end, with the PSNR on held-out and demo pictures beside it.
"""

import argparse
import json
import logging
import math
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from emoji import Emoji, read_package, read_rgba, split
from image_vae import ImageVAE, write_back
from torch import Tensor

CONFIG = {"base_dim": 16, "z_dim": 16, "dim_mult": [1, 2, 3, 3], "num_res_blocks": 1}
KL_WEIGHT = 1e-6  # of the KL summed over a picture's latents: keeps their scale near one, no more
LATENT_NOISE = 0.15  # largest noise, in standard deviations of a channel, that the decoder trains on
VARIANT_WEIGHT = 0.2  # skin tones repeat one drawing up to 25 times

log = logging.getLogger("train_vae")


def load(emoji: list[Emoji]) -> Tensor:
    """Return pictures as uint8 [N, 4, H, W] (red, green, blue, alpha)."""
    return torch.from_numpy(np.stack([read_rgba(e.path) for e in emoji])).permute(0, 3, 1, 2).contiguous()


def composite(rgba: Tensor, background: Tensor) -> Tensor:
    """Lay uint8 [B, 4, H, W] over `background` (in [0, 1], broadcast to [B, 3, H, W]); return [-1, 1]."""
    rgba = rgba.float() / 255
    alpha = rgba[:, 3:]
    return (rgba[:, :3] * alpha + background * (1 - alpha)) * 2 - 1


def augment(rgba: Tensor, generator: torch.Generator) -> Tensor:
    """Flip, turn, recolour and put on other backgrounds, each for a part of the pictures; white stays commonest."""
    pictures = []
    for picture in rgba:
        chance = torch.rand(4, generator=generator)
        background = torch.ones(3, 1, 1)
        if chance[0] < 0.5:
            picture = picture.flip(2)
        if chance[1] < 0.3:
            picture = picture.rot90(int(chance[1] * 10) + 1, (1, 2))
        if chance[2] < 0.3:
            picture = picture[[*torch.randperm(3, generator=generator).tolist(), 3]]
        if chance[3] < 0.25:
            background = torch.rand(3, 1, 1, generator=generator)
        pictures.append(composite(picture[None], background))
    return torch.cat(pictures)


def objective(model: ImageVAE, pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return the loss and the reconstruction's mean squared error, per batch.

    The root of each picture's error is averaged: between the plain mean, which only hard pictures move, and
    the logarithm, which is what PSNR measures.
    """
    mean, logvar = model.encode(pictures)
    spread = mean.detach().std(dim=(0, 2, 3), keepdim=True)
    level = LATENT_NOISE * torch.rand(len(mean), 1, 1, 1, generator=generator)
    sigma = (logvar.exp() + (level * spread) ** 2).sqrt()
    latents = mean + sigma * torch.randn(mean.shape, generator=generator)
    error = (model.decode(latents) - pictures).square().mean(dim=(1, 2, 3))
    kl = 0.5 * (mean.square() + logvar.exp() - logvar - 1).sum(dim=(1, 2, 3))
    return ((error + 1e-5).sqrt() + KL_WEIGHT * kl).mean(), error.detach().mean()


@torch.no_grad()
def latents_of(model: ImageVAE, pictures: Tensor) -> Tensor:
    return torch.cat([model.encode(part)[0] for part in pictures.split(64)])


@torch.no_grad()
def psnr(model: ImageVAE, pictures: Tensor) -> Tensor:
    """Return the PSNR [N] in dB, on [0, 1] RGB, of pictures decoded from their posterior mean."""
    decoded = torch.cat([model.decode(part).clamp(-1, 1) for part in latents_of(model, pictures).split(64)])
    return -10 * ((decoded - pictures) / 2).square().mean(dim=(1, 2, 3)).log10()


def save(state: dict[str, Tensor], latents: Tensor, out: Path) -> None:
    """Write a plain diffusers VAE, half precision, with the mean and spread of `latents` in its config."""
    vae = AutoencoderKLQwenImage(
        **CONFIG,
        latents_mean=[round(v, 4) for v in latents.mean(dim=(0, 2, 3)).tolist()],
        latents_std=[round(v, 4) for v in latents.std(dim=(0, 2, 3)).tolist()],
    )
    write_back(state, vae)
    vae.half().save_pretrained(out)


def train(pictures: Tensor, weights: Tensor, args: argparse.Namespace) -> "torch.optim.swa_utils.AveragedModel":
    """Train from scratch and return the running average of the weights (`.module`)."""
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    model = ImageVAE(AutoencoderKLQwenImage(**CONFIG)).to(memory_format=torch.channels_last)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    for step in range(args.steps):
        warm, done = min(1.0, (step + 1) / 200), step / args.steps
        optimizer.param_groups[0]["lr"] = args.lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))
        chosen = torch.multinomial(weights, args.batch, generator=generator)
        batch = augment(pictures[chosen], generator).contiguous(memory_format=torch.channels_last)
        loss, error = objective(model, batch, generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(model)
        if step % 100 == 0:
            log.info("step %d loss %.4f psnr(batch) %.2f", step, loss.item(), -10 * math.log10(error.item() / 4))
        if (step + 1) % args.save_every == 0:
            yield step + 1, average.module


@torch.no_grad()
def difference_from_diffusers(model: ImageVAE, pictures: Tensor, folder: Path) -> float:
    """Return the largest difference, in [0, 1], between the trained network and the saved files in diffusers."""
    vae = AutoencoderKLQwenImage.from_pretrained(folder, torch_dtype=torch.float32)
    decoded = vae.decode(vae.encode(pictures[:, :, None]).latent_dist.mode()).sample[:, :, 0]
    return ((decoded - model.decode(model.encode(pictures)[0]).clamp(-1, 1)).abs().max() / 2).item()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="folder of the npm package emoji-datasource-twitter")
    parser.add_argument("--out", type=Path, required=True, help="folder of the VAE")
    parser.add_argument("--results", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    args = parse_args()
    demo, held_out, training = split(read_package(args.package), args.held_out, args.seed)
    pictures = load(training)
    weights = torch.tensor([VARIANT_WEIGHT if e.variant else 1.0 for e in training])
    white = torch.ones(1, 1, 1)
    plain, held_pictures, demo_pictures = (composite(p, white) for p in (pictures, load(held_out), load(demo)))
    log.info("%d training, %d held-out, %d demo pictures", len(plain), len(held_pictures), len(demo_pictures))
    began = time.monotonic()
    for step, model in train(pictures, weights, args):
        latents = latents_of(model, plain)
        save(model.state_dict(), latents, args.out)
        held, shown = psnr(model, held_pictures), psnr(model, demo_pictures)
        results = {
            "step": step,
            "minutes": round((time.monotonic() - began) / 60, 1),
            "seed": args.seed,
            "training_pictures": len(plain),
            "held_out": {"pictures": len(held), "psnr_db": round(held.mean().item(), 2), "worst_db": round(held.min().item(), 2)},
            "demo": {"pictures": len(shown), "psnr_db": round(shown.mean().item(), 2), "worst_db": round(shown.min().item(), 2)},
            "max_difference_from_diffusers": difference_from_diffusers(model, held_pictures[:16], args.out),
        }
        args.results.write_text(json.dumps({"vae": results}, indent=2) + "\n")
        log.info("%s", results)


if __name__ == "__main__":
    main()

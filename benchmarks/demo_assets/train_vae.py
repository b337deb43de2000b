"""Train the demo's Qwen-Image VAE on emoji pictures that the demo does not contain.

    python train_vae.py PACKAGE --out launch/demo/model/vae --results results.json

One CPU thread is enough: 4,800 steps of 8 pictures take 22 minutes of it (AMD EPYC, AVX2).
A usable VAE is written every `--save-every` steps, the last one at the end, with the PSNR on held-out and demo
pictures beside it.
"""

import argparse
import copy
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLQwenImage
from emoji import Emoji, read_package, read_rgba, split
from image_vae import ImageVAE, write_back
from muon import Muon
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
    for path in out.iterdir():
        path.chmod(0o644)  # safetensors writes for its owner only


def optimizers(model: ImageVAE, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the convolutions inside, Adam for the rest (gains, biases, first and last layers)."""
    inner = [p for p in model.parameters() if p.dim() == 4 and len(p) > 3 and p[0].numel() > 27]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [Muon(inner, lr), torch.optim.Adam(rest, lr / 10, betas=(0.9, 0.99))]


def train(pictures: Tensor, weights: Tensor, args: argparse.Namespace) -> Iterator[tuple[int, ImageVAE]]:
    """Train from scratch; yield (step, running average of the weights) every `save_every` steps."""
    generator = torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    model = ImageVAE(AutoencoderKLQwenImage(**CONFIG)).to(memory_format=torch.channels_last)
    average = copy.deepcopy(model)
    steppers = optimizers(model, args.lr)
    peaks = [stepper.param_groups[0]["lr"] for stepper in steppers]
    for step in range(args.steps):
        for stepper, peak in zip(steppers, peaks, strict=True):
            stepper.param_groups[0]["lr"] = peak * min(1.0, (step + 1) / 50) * (1 - step / args.steps)
        chosen = torch.multinomial(weights, args.batch, generator=generator)
        batch = augment(pictures[chosen], generator).contiguous(memory_format=torch.channels_last)
        loss, error = objective(model, batch, generator)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        with torch.no_grad():
            share = max(0.005, 10 / (step + 10))  # early weights are soon forgotten
            torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), share)
        if step % 100 == 0:
            log.info("step %d loss %.4f psnr(batch) %.2f", step, loss.item(), -10 * math.log10(error.item() / 4))
        if (step + 1) % args.save_every == 0:
            yield step + 1, average


@torch.no_grad()
def measure(folder: Path, sets: dict[str, Tensor]) -> dict[str, Any]:
    """Return the PSNR of the saved VAE on sets of pictures, and how far the fast path is from diffusers."""
    vae = AutoencoderKLQwenImage.from_pretrained(folder, dtype=torch.float32)
    few = next(iter(sets.values()))[:16]
    decoded = vae.decode(vae.encode(few[:, :, None]).latent_dist.mode()).sample[:, :, 0]
    model = ImageVAE(vae)
    fast = model.decode(latents_of(model, few)).clamp(-1, 1)
    figures: dict[str, Any] = {"max_difference_from_diffusers": ((decoded - fast).abs().max() / 2).item()}
    for name, pictures in sets.items():
        db = psnr(model, pictures)
        figures[name] = {
            "pictures": len(db),
            "psnr_db": round(db.mean().item(), 2),
            "worst_db": round(db.min().item(), 2),
        }
    return figures


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="folder of the npm package emoji-datasource-twitter")
    parser.add_argument("--out", type=Path, required=True, help="folder of the VAE")
    parser.add_argument("--results", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--steps", type=int, default=4800)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-2, help="of Muon; Adam gets a tenth")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--save-every", type=int, default=800)
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
    plain = composite(pictures, white)
    sets = {"held_out": composite(load(held_out), white), "demo": composite(load(demo), white)}
    log.info("%d training, %d held-out, %d demo pictures", len(training), len(held_out), len(demo))
    for step, model in train(pictures, weights, args):
        save(model.state_dict(), latents_of(model, plain), args.out)
        run = {"seed": args.seed, "steps": step, "training_pictures": len(training)}
        results = {**run, "cpu_minutes": round(time.process_time() / 60, 1), **measure(args.out, sets)}
        args.results.write_text(json.dumps({"vae": results}, indent=2) + "\n")
        log.info("%s", results)


if __name__ == "__main__":
    main()

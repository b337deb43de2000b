"""Flow matching: the mean squared error of the velocity, for every sample at a sigma of its own."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dstrain.errors import ConfigError, did_you_mean
from dstrain.kernels.backend import MODES
from dstrain.kernels.flow_match import add_noise, velocity_loss
from dstrain.models.packing import PackLayout
from dstrain.objectives import OBJECTIVES, Losses, schedule
from dstrain.rng import Purpose, uniform

CHOICES = {
    "density": ("uniform_grid", "uniform", "logit_normal", "mode"),
    "shift": ("constant", "resolution"),
    "weighting": ("bell", "none"),
    "kernel": MODES,
}


@OBJECTIVES.register("flow_match")
@dataclass(frozen=True, kw_only=True)
class FlowMatch:
    """Weighted velocity error with one sigma a sample; the defaults are DiffSynth-Studio's for Qwen-Image.

    Noise and sigma depend on `seed` and the sample's draw number alone, so a sample has the same loss in any pack and
    on any rank. Raises ConfigError for an unknown choice or a number out of range.
    """

    seed: int
    density: str = "uniform_grid"
    shift: str = "constant"  # by `mu`, or by the picture's tokens (schedule.resolution_mu)
    mu: float = 0.8  # constant shift of sigma's log-odds; 0 is none
    terminal: float | None = 0.02  # the smallest sigma of the grid; None leaves the grid as it is
    mean: float = 0.0  # logit_normal
    std: float = 1.0  # logit_normal
    mode_scale: float = 1.29  # mode
    weighting: str = "bell"
    kernel: str = "auto"

    def __post_init__(self) -> None:
        for key, known in CHOICES.items():
            value = getattr(self, key)
            if value not in known:
                hint = did_you_mean(str(value), known)
                raise ConfigError(f"objective.{key}: unknown {value!r}{hint} (known: {', '.join(known)})")
        if self.density == "uniform_grid" and self.shift == "resolution":
            raise ConfigError(
                "objective.shift: the density uniform_grid is one grid for all resolutions; "
                "use shift 'constant', or density 'uniform' for shift 'resolution'"
            )
        checks = {
            "seed": (0 <= self.seed < 1 << 64, "in [0, 2^64)"),
            "mu": (math.isfinite(self.mu), "finite"),
            "terminal": (self.terminal is None or 0 < self.terminal < 1, "null or between 0 and 1"),
            "mean": (math.isfinite(self.mean), "finite"),
            "std": (0 < self.std < math.inf, "greater than 0"),
            "mode_scale": (-1 <= self.mode_scale <= schedule.MODE_SCALE_MAX, "between -1 and 1.75"),
        }
        for key, (good, wanted) in checks.items():
            if not good:
                raise ConfigError(f"objective.{key} must be {wanted}, got {getattr(self, key)}")

    @cached_property
    def grid(self) -> Tensor:
        """The training grid [1000], descending: what uniform_grid draws from and the bell is normalised over."""
        return schedule.training_grid(self.mu, self.terminal)

    def sigmas(self, draws: Tensor, image_tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sigma and the loss weight of each draw, both fp32 [N] on the device of `draws`.

        `draws` and `image_tokens` are int64 [N]: draw numbers, and the tokens of each sample's picture.
        """
        u = uniform(self.seed, Purpose.TIMESTEP, draws).double()  # [N]
        if self.density == "uniform_grid":
            sigmas = schedule.grid_quantile(u, self.grid)
        else:
            if self.density == "logit_normal":
                u = schedule.logit_normal_quantile(u, self.mean, self.std)
            elif self.density == "mode":
                u = schedule.mode_quantile(u, self.mode_scale)
            mu = self.mu if self.shift == "constant" else schedule.resolution_mu(image_tokens.double())
            sigmas = schedule.shift_exponential(u, mu)
        sigmas = schedule.as_sigmas(sigmas)
        if self.weighting == "none":
            return sigmas, torch.ones_like(sigmas)
        return sigmas, schedule.bell_weights(sigmas, self.grid)

    def __call__(
        self, velocity: Callable[[Tensor, Tensor], Tensor], x0: Tensor, layout: PackLayout, draws: Tensor
    ) -> Losses:
        """Return the losses of a pack of N samples with I image tokens.

        `velocity` maps x_t [I, C] fp32 and sigmas [N] fp32 to the predicted velocity [I, C], fp32 or bf16; x0 [I, C]
        are clean latents, fp32 or bf16; draws [N] int64 are the samples' draw numbers.
        """
        draws = draws.to(x0.device)
        token_counts = torch.tensor(layout.image_lens, device=x0.device)  # [N]
        where = layout.image_sample, layout.first_image_token
        sigmas, weights = self.sigmas(draws, token_counts)
        x_t = add_noise(x0, sigmas, *where, self.seed, draws, self.kernel)
        pred = velocity(x_t, sigmas)
        losses = velocity_loss(pred, x0, weights, *where, token_counts, self.seed, draws, self.kernel)
        return Losses(losses, sigmas, weights)

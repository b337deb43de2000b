"""Sigma schedules: shifts, the grids of training and inference, densities to draw sigma from, and loss weights.

A sigma is the share of noise: x_t = (1 - sigma) x0 + sigma eps. Everything is computed in fp64 and returned in fp32.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from dstrain.errors import ConfigError

Number = TypeVar("Number", float, Tensor)

TRAIN_STEPS = 1000
SMALLEST = 2.0**-24  # drawn sigmas lie in (0, 1]
MODE_SCALE_MAX = 2 / (math.pi - 2)  # past it the mode density's quantile function is no longer monotonic


def shift_exponential(sigmas: Tensor, mu: float | Tensor) -> Tensor:
    """Push sigmas in (0, 1] towards noise by adding `mu` to their log-odds: e^mu / (e^mu + 1/sigma - 1).

    The same as a constant shift of e^mu (Esser et al., arXiv:2403.03206, section 5.3.2); 0 changes nothing.
    """
    odds = torch.exp(torch.as_tensor(mu, dtype=torch.float64, device=sigmas.device))
    return odds / (odds + (1 / sigmas - 1))  # so bracketed, 1 stays exactly 1


def shift_constant(sigmas: Tensor, shift: float) -> Tensor:
    """Push sigmas in [0, 1] towards noise: shift sigma / (1 + (shift - 1) sigma); 1 changes nothing."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def resolution_mu(
    image_tokens: Number, base_tokens: int = 256, max_tokens: int = 8192, base_mu: float = 0.5, max_mu: float = 0.9
) -> Number:
    """Return the exponential shift for a picture of so many tokens, linear in them; the defaults are Qwen-Image's."""
    return base_mu + (max_mu - base_mu) * (image_tokens - base_tokens) / (max_tokens - base_tokens)


def stretch_terminal(sigmas: Tensor, terminal: float) -> Tensor:
    """Stretch a descending schedule [n] away from 1 so that its last sigma is `terminal`; [1.0] stays as it is."""
    if sigmas[-1] == 1:
        return sigmas
    return 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])


def training_grid(mu: float = 0.8, terminal: float | None = 0.02, steps: int = TRAIN_STEPS) -> Tensor:
    """Return the descending sigmas [steps] that training draws from, by default DiffSynth-Studio's for Qwen-Image."""
    sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]  # [steps]
    sigmas = shift_exponential(sigmas, mu)
    return (sigmas if terminal is None else stretch_terminal(sigmas, terminal)).float()


def inference_sigmas(num_steps: int, image_tokens: int, scheduler_config: Mapping[str, Any]) -> Tensor:
    """Return the descending sigmas [num_steps + 1] of a sampler, fp32, the last one 0.

    `scheduler_config` is the scheduler/scheduler_config.json of a diffusers FlowMatchEulerDiscreteScheduler, whose
    schedule (as its Qwen-Image pipeline calls it) this is. Raises ConfigError for a setting that has no meaning here.
    """
    config = dict(scheduler_config)
    for key in (
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
        "invert_sigmas",
        "stochastic_sampling",
    ):
        if config.get(key):
            raise ConfigError(f"scheduler_config.json: {key} is not supported; set it to false")
    if num_steps < 1:
        raise ConfigError(f"the number of sampling steps must be at least 1, got {num_steps}")
    sigmas = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)  # [n]
    if config.get("use_dynamic_shifting", False):
        base_tokens, max_tokens = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        mu = resolution_mu(
            float(image_tokens), base_tokens, max_tokens, config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        )
        kind = config.get("time_shift_type", "exponential")
        if kind not in ("exponential", "linear"):
            raise ConfigError(f"scheduler_config.json: time_shift_type must be exponential or linear, got {kind!r}")
        sigmas = shift_exponential(sigmas, mu) if kind == "exponential" else shift_constant(sigmas, mu)
    else:
        sigmas = shift_constant(sigmas, config.get("shift", 1.0))
    if config.get("shift_terminal"):
        sigmas = stretch_terminal(sigmas, config["shift_terminal"])
    return torch.cat([sigmas, sigmas.new_zeros(1)]).float()


# Quantile functions: a uniform number u in (0, 1), fp64 [N], to sigma, fp64 [N], rising with u.


def grid_quantile(u: Tensor, grid: Tensor) -> Tensor:
    """Every sigma of a descending grid [n] is as likely."""
    place = (u.double() * len(grid)).long()
    return grid.to(u.device).double()[len(grid) - 1 - place]


def logit_normal_quantile(u: Tensor, mean: float, std: float) -> Tensor:
    """The log-odds of sigma are normal (Esser et al., arXiv:2403.03206, section 3.1)."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u.double()))


def mode_quantile(u: Tensor, scale: float) -> Tensor:
    """Heavier about the middle for scale > 0, at the ends for scale < 0 (arXiv:2403.03206, section 3.1)."""
    u = u.double()
    return u - scale * (torch.sin(math.pi / 2 * u) ** 2 - u)


def as_sigmas(sigmas: Tensor) -> Tensor:
    """Round to fp32 without reaching 0."""
    return sigmas.float().clamp(SMALLEST, 1.0)


def bell_weights(sigmas: Tensor, grid: Tensor) -> Tensor:
    """Return DiffSynth-Studio's training weights of sigmas [N], fp32: a bell about 0.5 with mean 1 over `grid`.

    y = exp(-2 (sigma - 0.5)^2), less its minimum over the grid, so that the far end of the grid weighs nothing.
    """

    def bell(s: Tensor) -> Tensor:
        return torch.exp(-2 * (s.double() - 0.5) ** 2)

    on_grid = bell(grid)
    floor, mean = float(on_grid.min()), float((on_grid - on_grid.min()).mean())
    return ((bell(sigmas) - floor) / mean).clamp(min=0).float()

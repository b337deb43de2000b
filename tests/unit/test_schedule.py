"""Sigma schedules against DiffSynth-Studio's published numbers, diffusers' scheduler, and closed forms."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dstrain.errors import ConfigError
from dstrain.objectives import schedule
from dstrain.objectives.schedule import bell_weights, inference_sigmas, resolution_mu, training_grid

QWEN_IMAGE = {  # the published Qwen/Qwen-Image scheduler_config.json
    "base_image_seq_len": 256,
    "base_shift": 0.5,
    "invert_sigmas": False,
    "max_image_seq_len": 8192,
    "max_shift": 0.9,
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "shift_terminal": 0.02,
    "stochastic_sampling": False,
    "time_shift_type": "exponential",
    "use_beta_sigmas": False,
    "use_dynamic_shifting": True,
    "use_exponential_sigmas": False,
    "use_karras_sigmas": False,
}


def test_training_grid_has_diffsynths_numbers():
    grid = training_grid()
    assert grid.shape == (1000,) and grid.dtype == torch.float32
    assert grid[0] == 1 and grid[-1].item() == pytest.approx(0.02, abs=1e-7)
    assert (grid.diff() < 0).all()
    assert grid.mean().item() == pytest.approx(0.6376, abs=5e-5)
    assert grid.median().item() == pytest.approx(0.6955, abs=5e-5)


def test_training_grid_is_the_formula():
    s = np.linspace(1, 0, 1001)[:-1]
    s = 1 / (1 + (1 / s - 1) / math.exp(0.8))
    s = 1 - (1 - s) * 0.98 / (1 - s[-1])
    np.testing.assert_allclose(training_grid().numpy(), s, rtol=0, atol=1e-7)


def test_bell_weights_have_diffsynths_numbers():
    grid = training_grid()
    weights = bell_weights(grid, grid)
    assert weights[0] == 0 and (weights[1:] > 0).all()
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)
    assert weights.max().item() == pytest.approx(1.683, abs=5e-4)
    assert grid[weights.argmax()].item() == pytest.approx(0.5, abs=1e-3)
    assert weights[-1].item() == pytest.approx(0.104, abs=5e-4)


def test_bell_weights_are_the_formula_and_never_negative():
    s = training_grid().double().numpy()
    y = np.exp(-2 * ((1000 * s - 500) / 1000) ** 2)
    w = (y - y.min()) * 1000 / (y - y.min()).sum()
    np.testing.assert_allclose(bell_weights(training_grid(), training_grid()).numpy(), w, rtol=1e-6, atol=1e-7)
    assert bell_weights(torch.tensor([1.0]), training_grid()[300:]) == 0


@pytest.mark.parametrize(
    ("mu", "terminal", "mean"), [(math.log(5), None, 0.7476), (0.0, None, 0.5005), (math.log(3), 0.1, None)]
)
def test_other_grids(mu, terminal, mean):
    grid = training_grid(mu, terminal)  # the first is Wan's
    if mean:
        assert grid.mean().item() == pytest.approx(mean, abs=5e-5)
    if terminal:
        assert grid[-1].item() == pytest.approx(terminal, abs=1e-7)


@pytest.mark.parametrize(("side", "mu"), [(512, 0.5387), (1024, 0.6935), (1328, 0.8343), (2048, 1.3129)])
def test_resolution_mu_of_qwen_image(side, mu):
    tokens = (side // 16) ** 2
    assert resolution_mu(float(tokens)) == pytest.approx(mu, abs=5e-5)
    assert resolution_mu(torch.tensor([tokens]).double()).item() == pytest.approx(mu, abs=5e-5)


def test_exponential_and_constant_shift_agree():
    s = torch.linspace(1, 0.01, 100, dtype=torch.float64)
    torch.testing.assert_close(schedule.shift_exponential(s, math.log(3)), schedule.shift_constant(s, 3))
    torch.testing.assert_close(schedule.shift_exponential(s, 0.0), s)


@pytest.mark.parametrize("steps", [2, 8, 50])
@pytest.mark.parametrize("tokens", [16, 256, 1024, 4096, 8100, 16384])
@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"shift_terminal": None},
        {"use_dynamic_shifting": False},
        {"use_dynamic_shifting": False, "shift": 3.0, "shift_terminal": None},
        {"time_shift_type": "linear"},
        {"base_shift": 0.5, "max_shift": 1.15, "max_image_seq_len": 4096, "shift_terminal": None},
    ],
)
def test_inference_sigmas_equal_diffusers(steps, tokens, changed):
    config = QWEN_IMAGE | changed
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    mu = config["base_shift"] + slope * (tokens - config["base_image_seq_len"])
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    sigmas = inference_sigmas(steps, tokens, config)
    assert sigmas.dtype == torch.float32 and sigmas.shape == (steps + 1,) and sigmas[-1] == 0
    torch.testing.assert_close(sigmas, scheduler.sigmas, rtol=0, atol=3e-7)


def test_inference_sigmas_take_diffusers_defaults_for_missing_keys():
    ours = inference_sigmas(4, 1024, {"use_dynamic_shifting": True})
    torch.testing.assert_close(
        ours, inference_sigmas(4, 1024, dict(FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True).config))
    )
    torch.testing.assert_close(inference_sigmas(4, 1024, {}), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


def test_one_step_starts_at_pure_noise():
    assert inference_sigmas(1, 1024, QWEN_IMAGE).tolist() == [1, 0]


@pytest.mark.parametrize(
    ("steps", "changed", "message"),
    [
        (0, {}, "at least 1, got 0"),
        (4, {"use_karras_sigmas": True}, "use_karras_sigmas is not supported"),
        (4, {"invert_sigmas": True}, "invert_sigmas is not supported"),
        (4, {"time_shift_type": "log"}, "time_shift_type must be exponential or linear, got 'log'"),
    ],
)
def test_inference_sigmas_refuse(steps, changed, message):
    with pytest.raises(ConfigError, match=message):
        inference_sigmas(steps, 256, QWEN_IMAGE | changed)


MIDPOINTS = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000


@pytest.mark.parametrize(
    ("quantile", "cdf"),
    [
        (lambda u: schedule.logit_normal_quantile(u, 0.0, 1.0), lambda s: torch.special.ndtr(torch.logit(s))),
        (
            lambda u: schedule.logit_normal_quantile(u, -0.5, 2.0),
            lambda s: torch.special.ndtr((torch.logit(s) + 0.5) / 2),
        ),
        (lambda u: schedule.mode_quantile(u, 0.0), lambda s: s),
    ],
)
def test_quantiles_invert_their_distribution(quantile, cdf):
    sigmas = quantile(MIDPOINTS)
    assert (sigmas.diff() > 0).all()
    torch.testing.assert_close(cdf(sigmas), MIDPOINTS, rtol=0, atol=1e-9)


@pytest.mark.parametrize("scale", [-1.0, 0.5, 1.29, schedule.MODE_SCALE_MAX])
def test_mode_density_is_symmetric_monotonic_and_heavier_in_the_middle_as_scale_grows(scale):
    sigmas = schedule.mode_quantile(MIDPOINTS, scale)
    assert (sigmas.diff() > -1e-12).all() and sigmas.min() > 0 and sigmas.max() < 1
    torch.testing.assert_close(sigmas, 1 - sigmas.flip(0))
    in_the_middle = ((sigmas - 0.5).abs() < 0.25).double().mean()
    assert (in_the_middle > 0.5) == (scale > 0)
    # The paper's form runs the other way: u = 0 is pure noise.
    paper = 1 - MIDPOINTS - scale * (torch.cos(math.pi / 2 * MIDPOINTS) ** 2 - 1 + MIDPOINTS)
    torch.testing.assert_close(sigmas, paper.flip(0))


def test_mode_density_past_its_largest_scale_would_not_be_monotonic():
    assert (schedule.mode_quantile(MIDPOINTS, schedule.MODE_SCALE_MAX + 0.05).diff() < 0).any()


def test_grid_quantile_gives_every_sigma_of_the_grid_once():
    grid = training_grid()
    u = (torch.arange(1000) + 0.5) / 1000
    assert torch.equal(schedule.grid_quantile(u, grid).float(), grid.flip(0))
    ends = schedule.grid_quantile(torch.tensor([2.0**-24, 1 - 2.0**-24]), grid)
    assert ends.float().tolist() == [grid[-1].item(), 1.0]


def test_sigmas_never_reach_zero():
    assert (schedule.as_sigmas(torch.tensor([0.0, 1e-40, 1.0], dtype=torch.float64)) > 0).all()

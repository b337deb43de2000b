"""Flow matching as an objective: its formula, packing, randomness by draw number, settings."""

from dataclasses import fields

import pytest
import torch

from dstrain.errors import ConfigError
from dstrain.kernels.flow_match import noise_reference
from dstrain.models.packing import PackLayout
from dstrain.objectives import OBJECTIVES, schedule
from dstrain.objectives.flow_match import FlowMatch
from dstrain.rng import Purpose, uniform

CHANNELS = 12
SHAPES = [[(1, 3, 5)], [(1, 1, 1)], [(1, 4, 2), (1, 2, 2)]]
DRAWS = torch.tensor([40, 7, 2**33])
KERNELS = [
    "reference",
    pytest.param("triton", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter")),
]


def latents(layout, seed=0):
    torch.manual_seed(seed)
    return torch.randn(sum(layout.image_lens), CHANNELS)


class Model(torch.nn.Module):
    """A velocity that depends on x_t, on each sample's sigma and on parameters."""

    def __init__(self, layout):
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.layout = torch.nn.Linear(CHANNELS, CHANNELS), layout

    def forward(self, x_t, sigmas):
        return self.linear(x_t) * (1 + sigmas[self.layout.image_sample][:, None])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("weighting", ["bell", "none"])
def test_losses_and_gradients_are_the_formula(kernel, weighting):
    objective = FlowMatch(seed=5, weighting=weighting, kernel=kernel)
    layout = PackLayout.build(SHAPES, [2, 1, 3])
    x0, model = latents(layout), Model(layout)
    losses = objective(model, x0, layout, DRAWS)

    noise = noise_reference(CHANNELS, layout.image_sample, layout.first_image_token, 5, DRAWS)
    sigma = losses.sigmas[layout.image_sample][:, None]
    error = (model((1 - sigma) * x0 + sigma * noise, losses.sigmas) - (noise - x0)) ** 2
    wanted = losses.weights * torch.stack([e.mean() for e in error.split(layout.image_lens)])
    torch.testing.assert_close(losses.per_sample, wanted, rtol=2e-6, atol=1e-7)

    ours = torch.autograd.grad(losses.per_sample.sum() / 3, list(model.parameters()))
    theirs = torch.autograd.grad(wanted.sum() / 3, list(model.parameters()))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("settings", [{}, {"density": "logit_normal", "shift": "resolution"}])
def test_a_pack_is_its_samples_one_by_one(kernel, settings):
    objective = FlowMatch(seed=5, kernel=kernel, **settings)
    layout = PackLayout.build(SHAPES, [2, 1, 3])
    x0 = latents(layout)
    packed = objective(Model(layout), x0, layout, DRAWS)
    for s, part in enumerate(x0.split(layout.image_lens)):
        alone_layout = PackLayout.build([SHAPES[s]], [1])
        alone = objective(Model(alone_layout), part.contiguous(), alone_layout, DRAWS[s : s + 1])
        for field in fields(packed):
            ours, theirs = getattr(alone, field.name), getattr(packed, field.name)[s : s + 1]
            torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_a_perfect_velocity_has_no_loss():
    layout = PackLayout.build(SHAPES, [2, 1, 3])
    x0 = latents(layout)
    noise = noise_reference(CHANNELS, layout.image_sample, layout.first_image_token, 5, DRAWS)
    losses = FlowMatch(seed=5)(lambda x_t, sigmas: noise - x0, x0, layout, DRAWS)
    assert not losses.per_sample.any()


def test_bf16_latents_and_predictions_give_fp32_losses():
    layout = PackLayout.build(SHAPES, [2, 1, 3])
    seen = []

    def velocity(x_t, sigmas):
        seen.append((x_t.dtype, sigmas.dtype))
        return x_t.bfloat16()

    losses = FlowMatch(seed=5)(velocity, latents(layout).bfloat16(), layout, DRAWS)
    assert seen == [(torch.float32, torch.float32)]
    assert {getattr(losses, f.name).dtype for f in fields(losses)} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_losses_on_a_gpu_are_those_on_the_cpu():
    layout = PackLayout.build(SHAPES, [2, 1, 3])
    x0, objective = latents(layout), FlowMatch(seed=5)
    cpu = objective(Model(layout), x0, layout, DRAWS)
    moved = layout.to("cuda")
    gpu = objective(Model(moved).cuda(), x0.cuda(), moved, DRAWS)
    for field in fields(cpu):
        torch.testing.assert_close(getattr(gpu, field.name).cpu(), getattr(cpu, field.name), rtol=1e-5, atol=1e-6)


def sample(settings, n=20_000, tokens=256):
    return FlowMatch(seed=0, **settings).sigmas(torch.arange(n), torch.full((n,), tokens))


DENSITIES = [
    {"density": "uniform_grid"},
    {"density": "uniform"},
    {"density": "logit_normal", "mean": 0.3, "std": 1.4},
    {"density": "mode"},
    {"density": "uniform", "shift": "resolution"},
    {"density": "mode", "shift": "resolution"},
]


@pytest.mark.parametrize("settings", DENSITIES)
def test_sigmas_are_fp32_in_range_and_depend_on_the_draw_alone(settings):
    sigmas, weights = sample(settings)
    assert sigmas.dtype == weights.dtype == torch.float32
    assert sigmas.min() > 0 and sigmas.max() <= 1 and (weights >= 0).all()
    one, _ = FlowMatch(seed=0, **settings).sigmas(torch.tensor([123]), torch.tensor([256]))
    assert one.item() == sigmas[123].item()
    other, _ = FlowMatch(seed=1, **settings).sigmas(torch.tensor([123]), torch.tensor([256]))
    assert one.item() != other.item()


def test_an_unshifted_uniform_sigma_is_the_draws_timestep_number():
    sigmas, _ = sample({"density": "uniform", "mu": 0.0})
    torch.testing.assert_close(sigmas, uniform(0, Purpose.TIMESTEP, torch.arange(len(sigmas))))


def test_the_default_draws_from_diffsynths_grid():
    sigmas, weights = sample({})
    grid = schedule.training_grid()
    assert torch.isin(sigmas, grid).all()
    assert len(sigmas.unique()) == 1000
    spread = grid.std().item() / len(sigmas) ** 0.5
    assert abs(sigmas.mean() - 0.6376) < 4 * spread
    assert weights.mean().item() == pytest.approx(1, abs=0.02)
    at_the_grid = schedule.bell_weights(grid, grid)
    assert torch.equal(weights, at_the_grid[(grid[None] == sigmas[:, None]).int().argmax(1)])


def test_a_constant_shift_adds_to_the_log_odds():
    settings = {"density": "logit_normal", "mean": 0.3, "std": 1.4, "mu": 0.8}
    odds = torch.logit(sample(settings)[0].double())
    assert odds.mean().item() == pytest.approx(1.1, abs=0.04)
    assert odds.std().item() == pytest.approx(1.4, abs=0.04)


def test_a_resolution_shift_depends_on_each_samples_tokens():
    objective = FlowMatch(seed=0, density="uniform", shift="resolution")
    tokens = torch.tensor([256, 4096, 8192])
    plain, _ = FlowMatch(seed=0, density="uniform", mu=0.0).sigmas(torch.tensor([9, 9, 9]), tokens)
    shifted, _ = objective.sigmas(torch.tensor([9, 9, 9]), tokens)
    gained = torch.logit(shifted.double()) - torch.logit(plain.double())
    torch.testing.assert_close(gained, torch.tensor([0.5, 0.6935, 0.9]).double(), rtol=0, atol=1e-4)


def test_no_weighting_is_one():
    assert (sample({"weighting": "none"})[1] == 1).all()


def test_the_registry_builds_it_by_name():
    assert isinstance(OBJECTIVES.get("flow_match")(seed=3, mu=0.5), FlowMatch)
    with pytest.raises(ConfigError, match="unknown objective 'flowmatch', did you mean 'flow_match'"):
        OBJECTIVES.get("flowmatch")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"density": "logit-normal"}, "objective.density: unknown 'logit-normal', did you mean 'logit_normal'"),
        ({"weighting": "bells"}, "objective.weighting: unknown 'bells', did you mean 'bell'"),
        ({"shift": "xyz"}, r"objective.shift: unknown 'xyz' \(known: constant, resolution\)"),
        ({"kernel": "tritn"}, "did you mean 'triton'"),
        ({"shift": "resolution"}, "uniform_grid is one grid for all resolutions"),
        ({"terminal": 1.0}, "objective.terminal must be null or between 0 and 1, got 1.0"),
        ({"std": 0.0}, "objective.std must be greater than 0"),
        ({"mu": float("nan")}, "objective.mu must be finite"),
        ({"mode_scale": 2.0}, "objective.mode_scale must be between -1 and 1.75"),
        ({"seed": -1}, "objective.seed must be in"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FlowMatch(**({"seed": 0} | settings))

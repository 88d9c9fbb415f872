"""Both plug-ins obey the laws of their families, and are what they say."""

import doctest
import math

import pytest
import torch
from lit_diffusion import (
    WEIGHTINGS,
    CosineSchedule,
    FlowSchedule,
    GaussianDenoiser,
    NormalSchedule,
    diffuse,
    load_plugins,
)
from lit_diffusion.testing import check_plugin, check_schedule, check_weighting

import lit_diffusion_flow
from lit_diffusion_flow import ModeSchedule, RectifiedFlowWeighting

TIMES = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
LEVELS = torch.linspace(-10, 10, 101, dtype=torch.float64)


@pytest.mark.parametrize("cls", [ModeSchedule, RectifiedFlowWeighting])
def test_a_plugin_keeps_its_promises(cls):
    check_plugin(cls)


@pytest.mark.parametrize("scale", [-1.0, 1.29, 1.7])
def test_the_schedule_is_a_density(scale):
    check_schedule(ModeSchedule(scale))
    check_schedule(ModeSchedule(scale, logsnr_min=-6.0, logsnr_max=7.5))


@pytest.mark.parametrize("schedule", [ModeSchedule(), FlowSchedule(), NormalSchedule(0.0, 2.0)])
def test_the_weighting_is_a_weighting(schedule):
    check_weighting(RectifiedFlowWeighting(schedule))


def test_the_package_is_offered_to_lit_diffusion():
    assert "lit_diffusion_flow" in load_plugins()
    assert isinstance(WEIGHTINGS["RectifiedFlowWeighting"]().schedule, ModeSchedule)


def test_two_scales_are_known_schedules():
    plain, cosine = FlowSchedule().logsnr(TIMES), CosineSchedule().logsnr(TIMES)
    torch.testing.assert_close(ModeSchedule(0.0).logsnr(TIMES), plain, rtol=0, atol=1e-9)
    # At −1 the flow time is sin²(πt/2), so that λ = −4 log tan(πt/2), twice the cosine's.
    twice = ModeSchedule(-1.0, logsnr_min=-40.0, logsnr_max=40.0).logsnr(TIMES)
    torch.testing.assert_close(twice, 2 * cosine, rtol=0, atol=1e-9)


def test_the_peak_has_the_height_of_the_formula():
    """At t = ½, ds/dt = 1 + scale (1 − π/2) and dλ/ds = −8."""
    for scale in (0.5, 1.29):
        peak = 1 / (8 * (1 + scale * (1 - math.pi / 2)))
        wide = ModeSchedule(scale, logsnr_min=-60.0, logsnr_max=60.0)
        assert wide.log_prob(torch.tensor([0.0])).exp().item() == pytest.approx(peak, rel=1e-9)


def test_the_tails_in_flow_time_are_heavy():
    """Far out λ falls like flow matching's: p(λ) → p_flow(λ)/(1 + scale), from ds/dt at t = 0."""
    far = torch.tensor([-18.0, 18.0])
    ratio = ModeSchedule(1.29).log_prob(far).exp() / FlowSchedule().log_prob(far).exp()
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1 / 2.29), rtol=1e-3, atol=0)


def test_a_scale_out_of_the_domain_is_refused():
    for scale in (-1.1, 1.76, math.nan):
        with pytest.raises(ValueError, match="scale must be from"):
            ModeSchedule(scale)


def test_under_uniform_flow_time_it_is_flow_matching():
    weight = RectifiedFlowWeighting(FlowSchedule())(LEVELS)
    torch.testing.assert_close(weight / weight[50], torch.exp(-LEVELS / 2), rtol=1e-9, atol=0)


def test_drawn_from_its_own_density_it_is_the_error_of_the_velocity():
    """w/p ‖ε̂ − ε‖² = ‖v̂ − v‖², v = ε − x, for a denoiser that errs."""
    schedule = ModeSchedule()
    generator = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, len(LEVELS), 5, dtype=torch.float64, generator=generator)
    guess = GaussianDenoiser(std=0.5)(diffuse(x, eps, LEVELS), LEVELS)
    velocity = ((guess.eps - guess.x) - (eps - x)).square().mean(1)
    loss = RectifiedFlowWeighting(schedule)(LEVELS) / schedule.log_prob(LEVELS).exp()
    loss = loss * (guess.eps - eps).square().mean(1)
    torch.testing.assert_close(loss, velocity, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", ["mode_schedule", "rectified_flow_weighting"])
def test_the_examples_of_the_docstrings_are_true(name):
    found = doctest.testmod(getattr(lit_diffusion_flow, name))
    assert found.attempted > 0
    assert found.failed == 0

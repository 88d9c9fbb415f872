"""TableSchedule: a chain's own levels."""

import math

import pytest
import torch

import lit_diffusion as ld


def test_it_passes_the_levels_at_equal_steps_of_time():
    levels = tuple(torch.linspace(3, -2, 11).exp().cumsum(0).neg().tolist())
    schedule = ld.TableSchedule(levels)
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    assert torch.allclose(schedule.logsnr(t), torch.tensor(levels).double(), rtol=0, atol=1e-12)
    assert torch.allclose(schedule.time(torch.tensor(levels)), t, rtol=0, atol=1e-12)
    assert schedule.ends == (levels[-1], levels[0])


def test_between_two_levels_it_is_straight():
    schedule = ld.TableSchedule((5.0, 1.0, -8.0))
    assert schedule.logsnr(torch.tensor([0.1, 0.7])).tolist() == pytest.approx([4.2, -2.6])
    density = schedule.log_prob(torch.tensor([4.9, 1.1, 0.9, -7.9])).exp()
    assert density.tolist() == pytest.approx([1 / 8, 1 / 8, 1 / 18, 1 / 18])


def test_linear_betas_are_ddpm():
    levels = ld.chain_levels(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64))
    own = ld.BetaSchedule().logsnr(torch.linspace(0, 1, 1000, dtype=torch.float64))
    assert torch.allclose(torch.tensor(levels), own.float(), rtol=0, atol=1e-5)


def test_the_default_is_improved_ddpm():
    """ᾱ_t = f(t)/f(0), f(t) = cos²((t/T + 0.008)/1.008 · π/2), but for the last step."""
    schedule = ld.TableSchedule()
    alpha, _ = ld.alpha_sigma(schedule.logsnr(torch.linspace(0, 1, 1000, dtype=torch.float64)))
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    expected = f / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert torch.allclose(alpha[:-1] ** 2, expected[:-1], rtol=1e-9)
    assert float(alpha[-1] ** 2 / alpha[-2] ** 2) == pytest.approx(1e-3)


def test_a_chain_of_the_table_visits_its_levels_only():
    levels = (4.0, 2.5, 1.0, -3.0, -4.0)
    loss = ld.DiffusionLoss(ld.TableSchedule(levels), ld.ELBOWeighting(), 4)
    terms = loss(ld.GaussianDenoiser(), torch.zeros(100, 2), generator=torch.Generator())
    drawn = terms.logsnr.unique().tolist()
    assert drawn == pytest.approx(sorted(levels[1:]))
    assert ld.AncestralSampler(5, ld.TableSchedule(levels)).levels().tolist() == pytest.approx(
        sorted(levels)
    )


@pytest.mark.parametrize(
    "levels",
    [(), (1.0,), (1.0, 1.0), (1.0, 2.0), (1.0, -math.inf), (math.nan, 0.0), (3.0, 1.0, 2.0)],
)
def test_what_is_no_table_is_refused(levels):
    with pytest.raises(ValueError, match="at least two finite levels of λ, decreasing"):
        ld.TableSchedule(levels)


@pytest.mark.parametrize("betas", [[0.0, 0.5], [0.5, 1.0], [-0.1], [math.nan]])
def test_what_are_no_betas_is_refused(betas):
    with pytest.raises(ValueError, match="betas of a chain must be above 0 and below 1"):
        ld.chain_levels(betas)


def test_a_long_table_is_shown_by_its_ends():
    assert "levels=(4.0, 3.0, 1.0)" in repr(ld.TableSchedule((4.0, 3.0, 1.0)))
    shown = repr(ld.TableSchedule(tuple(-i / 3 for i in range(1000))))
    assert "levels=(0, -0.333333, … 996 more …, -332.667, -333)" in shown

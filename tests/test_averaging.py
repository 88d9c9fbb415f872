"""Averages of the weights: what the updates really add up to, and what can be made of them."""

import math

import pytest
import torch

import lit_diffusion as ld
from lit_diffusion.averaging import WIDEST

F64 = torch.float64
STDS = (1e-4, 0.01, 0.05, 0.1, 0.2, 0.28, WIDEST)
TRACKED = (0.05, 0.1)


def shares(profile, t):
    """How much each of θ_0 … θ_t really counts, by following unit vectors."""
    average = ld.RunningAverage(profile, [torch.eye(t + 1, dtype=F64)[0]])
    for row in torch.eye(t + 1, dtype=F64)[1:]:
        average.update([row])
    assert average.updates == t
    return average.values[0]


def walks(t, dims=1000):
    """Weights that walk in steps of variance 1, (t, dims)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(t, dims, generator=generator, dtype=F64).cumsum(0)


def direct(path, snapshot):
    """The average of a path, by its shares."""
    n = torch.arange(snapshot.updates + 1, dtype=F64) / snapshot.updates
    return (n**snapshot.profile.power).diff() @ path[: snapshot.updates]


def tracked(times, stds=TRACKED):
    return [ld.Snapshot(ld.PowerProfile(sigma_rel), t) for t in times for sigma_rel in stds]


TIMES = (200, 400, 600, 800, 1000, 1200, 1400, 1600, 1800, 2000)


# Profiles -------------------------------------------------------------------------------------


def test_a_constant_decay_is_what_it_was():
    found = shares(ld.ConstantProfile(0.9), 200)
    decays = [min(0.9, (1 + n) / (10 + n)) for n in range(1, 201)]
    expected = [math.prod(decays)]
    expected += [(1 - d) * math.prod(decays[n:]) for n, d in enumerate(decays, start=1)]
    assert torch.allclose(found, torch.tensor(expected, dtype=F64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.1, 0.25, WIDEST])
def test_a_power_average_has_the_shares_of_its_formula(sigma_rel):
    profile, t = ld.PowerProfile(sigma_rel), 400
    found = shares(profile, t)
    n = torch.arange(t + 1, dtype=F64)
    assert found[0] == 0  # the initial weights never count
    expected = ((n / t) ** profile.power).diff()
    assert torch.allclose(found[1:], expected, rtol=1e-9, atol=1e-15)
    # And its window has the width that it is named for, up to the width of a step.
    mean = (n * found).sum()
    width = ((n - mean).square() * found).sum().sqrt() / t
    assert float(width) == pytest.approx(sigma_rel, rel=2e-3)


@pytest.mark.parametrize("sigma_rel", STDS)
def test_the_power_of_a_width(sigma_rel):
    p = ld.PowerProfile(sigma_rel).power
    assert p >= 1
    assert p / (p + 1) ** 2 / (p + 2) == pytest.approx(sigma_rel**2, rel=1e-12, abs=0)


def test_the_widths_of_the_paper():
    # Karras et al. 2023, section 3.1: γ = 16.97 and 6.94 for widths of 5 and 10 per cent.
    gammas = [ld.PowerProfile(sigma_rel).power - 1 for sigma_rel in TRACKED]
    assert gammas == pytest.approx([16.97, 6.94], abs=0.005)
    assert ld.PowerProfile(WIDEST).power == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("sigma_rel", [0.0, -0.1, 0.2888, 1.0, float("nan"), float("inf")])
def test_widths_that_there_are_not(sigma_rel):
    with pytest.raises(ValueError, match=r"above 0 and at most 0\.2887"):
        ld.PowerProfile(sigma_rel)


@pytest.mark.parametrize("decay", [1.0, -0.1, float("nan")])
def test_decays_that_there_are_not(decay):
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\)"):
        ld.ConstantProfile(decay)


def test_a_million_steps_lose_no_digits():
    profile = ld.PowerProfile(0.05)
    n = 10**9
    exact = profile.power / n - profile.power * (profile.power - 1) / 2 / n**2
    assert profile.step(n) == pytest.approx(exact, rel=1e-12, abs=0)


def test_narrow_weights_have_a_wide_average():
    # In bfloat16 a step of a thousandth of the way would be rounded to none.
    weights = [torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2, dtype=F64)]
    average = ld.RunningAverage(ld.ConstantProfile(0.999), weights, updates=10**6)
    assert [v.dtype for v in average.values] == [torch.float32, F64]
    for w in weights:
        w.fill_(1.0)
    assert not average.values[0].any()  # a copy
    for _ in range(1000):
        average.update(weights)
    for value in average.values:
        assert torch.allclose(value.double(), torch.tensor(1 - 0.999**1000, dtype=F64), rtol=1e-4)


# Inner products -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 10**4, 10**9])
def test_overlaps_are_the_integrals(scale):
    of = tracked((7 * scale, 50 * scale, 51 * scale), (0.02, 0.1, WIDEST))
    found = ld.overlaps(of)
    edges = torch.linspace(0, 51 * scale, 102_001, dtype=F64)  # which the times fall on
    n = (edges[1:] + edges[:-1]) / 2
    rest = torch.stack([1 - (n / s.updates).clamp(max=1) ** s.profile.power for s in of])
    expected = rest @ rest.T * (edges[1] - edges[0])
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    assert torch.allclose(found, found.T, rtol=1e-13, atol=0)


# Reconstruction -------------------------------------------------------------------------------


def misfit(found, of, target):
    """√(∫ D²/∫ S*²) by quadrature."""
    n = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000 * target.updates
    share = [(n / s.updates).clamp(max=1) ** s.profile.power for s in (*of, target)]
    off = found.weights @ torch.stack(share[:-1]) - share[-1]
    return float((off.square().mean() / share[-1].square().mean()).sqrt())


@pytest.mark.parametrize("target", [(0.1, 2000), (0.05, 2000), (0.05, 1000), (0.1, 200)])
def test_what_is_there_is_reconstructed_exactly(target):
    wanted = ld.Snapshot(ld.PowerProfile(target[0]), target[1])
    of = tracked([t for t in TIMES if t <= target[1]])
    found = ld.reconstruct(wanted, of)
    expected = torch.tensor([float(s == wanted) for s in of], dtype=F64)
    assert torch.allclose(found.weights, expected, atol=1e-5)
    assert found.misfit < 1e-7
    path = walks(2000, 50)
    mixed = sum(c * direct(path, s) for c, s in zip(found.weights, of, strict=True))
    assert torch.allclose(mixed, direct(path, wanted), atol=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.04, 0.06, 0.08, 0.13, 0.2, 0.25])
def test_the_error_on_random_walks_is_the_one_foretold(sigma_rel):
    of, wanted = tracked(TIMES), ld.Snapshot(ld.PowerProfile(sigma_rel), 2000)
    found = ld.reconstruct(wanted, of)
    assert float(found.weights.sum()) == pytest.approx(1, abs=1e-9)
    assert found.misfit == pytest.approx(misfit(found, of, wanted), rel=1e-3)
    assert found.misfit < 0.02
    path = walks(2000)
    mixed = sum(c * direct(path, s) for c, s in zip(found.weights, of, strict=True))
    exact = direct(path, wanted)
    real = (mixed - exact).norm() / (path[-1] - exact).norm()
    assert float(real) == pytest.approx(found.misfit, rel=0.1)


def test_noise_in_the_snapshots_is_foretold_and_kept_small():
    of, wanted = tracked(TIMES), ld.Snapshot(ld.PowerProfile(0.04), 2000)
    path, spread = walks(2000), 3.0
    generator = torch.Generator().manual_seed(1)
    exact = direct(path, wanted)
    noisy = torch.stack([direct(path, s) for s in of])
    noisy += spread * torch.randn(noisy.shape, generator=generator, dtype=F64)

    def real(found):
        return float((found.weights @ noisy - exact).norm() / (path[-1] - exact).norm())

    careful, careless = (ld.reconstruct(wanted, of, noise) for noise in (spread**2, 0.0))
    assert real(careful) == pytest.approx(careful.error, rel=0.1)
    assert real(careful) < 0.8 * real(careless)
    assert careful.misfit > careless.misfit


def test_no_other_mixture_is_better():
    of, wanted = tracked(TIMES), ld.Snapshot(ld.PowerProfile(0.2), 2000)
    found = ld.reconstruct(wanted, of, noise=0.1)
    whole = ld.overlaps([*of, wanted])

    def loss(weights):
        off = torch.cat([weights, -torch.ones(1, dtype=F64)])
        return float(off @ whole @ off + 0.1 * weights.square().sum())

    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        way = torch.randn(len(of), generator=generator, dtype=F64)
        assert loss(found.weights + 0.01 * (way - way.mean())) > loss(found.weights)


def test_any_units_of_time_give_the_same():
    def at(scale):
        of = tracked([t * scale for t in TIMES])
        wanted = ld.Snapshot(ld.PowerProfile(0.07), 2000 * scale)
        return ld.reconstruct(wanted, of, noise=1e-3 * scale)

    once, many = at(1), at(10**6)
    assert torch.allclose(once.weights, many.weights, atol=1e-6)
    assert once.error == pytest.approx(many.error, rel=1e-6, abs=0)

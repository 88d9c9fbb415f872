"""The adaptive schedule: the density follows the loss, and the objective stays what it is.

Published figures: Kingma & Gao 2023 (arXiv:2303.00848) on the Gaussian toy, variance ¼, D = 192.
"""

import pytest
import torch

import lit_diffusion as ld
from lit_diffusion.gaussian import alpha_sigma
from lit_diffusion.testing import check_schedule

F64 = torch.float64
DIMS, VARIANCE = 192, 0.25


def error(logsnr):
    """E mean (ε̂ − ε)² of the exact denoiser."""
    alpha, sigma = alpha_sigma(logsnr)
    return alpha**2 * VARIANCE / (alpha**2 * VARIANCE + sigma**2)


def adapted(weighting, steps=2000, batch=128, **arguments):
    """A schedule that has seen so many batches of its own draws."""
    schedule = ld.AdaptiveSchedule(**arguments)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        logsnr = schedule.sample(batch, generator)
        spread = torch.randn(batch, generator=generator, dtype=F64) * (2 / DIMS) ** 0.5
        schedule.update(logsnr, weighting(logsnr) * error(logsnr) * (1 + spread))
    return schedule


def moments(schedule, weighting, n=200_000):
    """(mean, std/mean) of the estimate of one draw, by quadrature in t."""
    logsnr, log_prob = schedule.at((torch.arange(n, dtype=F64) + 0.5) / n)
    h = weighting(logsnr) * error(logsnr) / log_prob.exp()
    mean = float(h.mean())
    return mean, float((h.square() * (1 + 2 / DIMS)).mean() / mean**2 - 1) ** 0.5


def exact(weighting):
    logsnr = torch.linspace(-20, 20, 400_001, dtype=F64)
    return float(torch.trapezoid(weighting(logsnr) * error(logsnr), logsnr))


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize(
    ("weighting", "share", "most"),
    [
        (ld.SigmoidWeighting(2.0), 0.1, 0.31),
        (ld.SigmoidWeighting(2.0), 0.0, 0.13),
        (ld.ELBOWeighting(), 0.1, 0.25),
        (ld.ExponentialWeighting(), 0.1, 0.27),
    ],
)
def test_the_published_variance_and_an_unmoved_mean(weighting, share, most, rms):
    schedule = adapted(weighting, uniform_share=share, rms=rms)
    mean, ratio = moments(schedule, weighting)
    assert ratio < most
    assert mean == pytest.approx(exact(weighting), rel=2e-3)
    assert moments(ld.CosineSchedule(), weighting)[1] > 1.9 * ratio
    check_schedule(schedule)


def test_the_loss_and_its_gradient_stay_what_they_are():
    weighting, schedule = ld.SigmoidWeighting(2.0), adapted(ld.SigmoidWeighting(2.0), steps=300)
    n = 40_000
    x = VARIANCE**0.5 * torch.randn(n, 8, dtype=F64)
    found = []
    for each in (schedule, ld.LinearSchedule()):
        scale = torch.ones((), dtype=F64, requires_grad=True)

        def denoiser(z, logsnr, scale=scale):
            return ld.Denoised(z, scale * ld.GaussianDenoiser(0.4)(z, logsnr).eps)

        t = torch.rand(n, generator=torch.Generator().manual_seed(1), dtype=F64)
        loss = ld.DiffusionLoss(each, weighting)(denoiser, x, t=t).loss
        (gradient,) = torch.autograd.grad(loss.mean(), scale, retain_graph=True)
        loss = loss.detach()
        found.append((float(loss.mean()), float(gradient), float(loss.std()) / n**0.5))
    (loss, gradient, error_one), (other, other_gradient, error_two) = found
    assert abs(loss - other) < 4 * (error_one + error_two)
    assert gradient == pytest.approx(other_gradient, rel=0.1)
    assert error_one < 0.5 * error_two


def test_a_bin_is_the_mean_of_what_it_saw():
    # v/(1 − decayⁿ): no trace of a starting value, whatever the sizes of the batches.
    schedule = ld.AdaptiveSchedule(0.0, 3.0, bins=3, decay=0.9, uniform_share=0.0)
    for values in ([1.0, 1.0], [1.0]):
        schedule.update(torch.full((len(values),), 0.5), torch.tensor(values))
    schedule.update(torch.tensor([1.5, 1.5, 1.5]), torch.tensor([2.0, 3.0, 4.0]))
    density = schedule.log_prob(torch.tensor([0.5, 1.5, 2.5])).exp()
    assert density.tolist() == pytest.approx([1 / 6, 3 / 6, 2 / 6])  # unseen: the mean of 1 and 3
    schedule.update(torch.tensor([0.5]), torch.tensor([11.0]))
    kept = 0.9 * (1 - 0.9**3) * 1 + 0.1 * 11
    assert float(schedule.first[0] / schedule.weight[0]) == pytest.approx(kept / (1 - 0.9**4))


def test_sums_of_parts_are_the_sum():
    logsnr, values = 40 * torch.rand(64, dtype=F64) - 20, torch.rand(64, dtype=F64)
    one, two = ld.AdaptiveSchedule(), ld.AdaptiveSchedule()
    one.update(logsnr, values)
    two.absorb(two.tally(logsnr[:20], values[:20]) + two.tally(logsnr[20:], values[20:]))
    assert torch.allclose(one.beyond, two.beyond, atol=1e-12)
    assert torch.allclose(one.first, two.first, atol=1e-12)


def test_not_finite_losses_are_counted_and_left_out():
    one, two = ld.AdaptiveSchedule(bins=10), ld.AdaptiveSchedule(bins=10)
    logsnr, values = torch.tensor([-15.0, 0.0, 5.0, 15.0]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    one.update(logsnr[[0, 2]], values[[0, 2]])
    values[1], values[3] = torch.nan, torch.inf
    two.update(logsnr, values)
    assert torch.equal(one.beyond, two.beyond)
    assert int(two.rejected) == 2
    assert int(one.rejected) == 0


def test_warmup_and_initial():
    initial = ld.CosineSchedule()
    schedule = ld.AdaptiveSchedule(bins=400, uniform_share=0.0, warmup=2, initial=initial)
    logsnr = torch.tensor([-3.03, 0.01, 4.07])
    for _ in range(3):
        told = schedule.log_prob(logsnr).exp()
        assert torch.allclose(told, initial.log_prob(logsnr).exp(), rtol=0.02)
        schedule.update(torch.tensor([-19.0]), torch.tensor([1.0]))
    assert torch.allclose(schedule.log_prob(logsnr).exp(), torch.full((3,), 1 / 40, dtype=F64))


def test_the_uniform_share_keeps_every_level():
    schedule = ld.AdaptiveSchedule(bins=4, uniform_share=0.2)
    schedule.update(torch.tensor([-15.0, -5.0, 5.0, 15.0]), torch.tensor([0.0, 0.0, 0.0, 1.0]))
    density = schedule.log_prob(torch.tensor([-15.0, 15.0])).exp() * 40
    assert density.tolist() == pytest.approx([0.2, 0.2 + 0.8 * 4])
    bare = ld.AdaptiveSchedule(bins=4, uniform_share=0.0)
    bare.update(torch.tensor([-15.0, -5.0, 5.0, 15.0]), torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert bool(bare.at(torch.tensor([0.999999]))[1].isfinite())  # even then a density


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("batches", [0, 1, 100])
def test_one_huge_loss_does_not_attract_all_samples(batches, rms):
    schedule = ld.AdaptiveSchedule(rms=rms)
    generator = torch.Generator().manual_seed(0)
    for _ in range(batches):
        schedule.update(schedule.sample(128, generator), torch.ones(128))
    logsnr, losses = schedule.sample(128, generator), torch.ones(128)
    losses[50] = 1e6
    schedule.update(logsnr, losses)
    mass = float(schedule.log_prob(logsnr[50:51]).exp()) * schedule.width
    assert 0.02 < mass < 0.06  # without a limit 0.9, a uniform share would be 0.01
    assert float(schedule.first.max()) > 100  # the average itself is as it was observed


def test_a_smooth_loss_is_not_limited():
    schedule = ld.AdaptiveSchedule(uniform_share=0.0)
    middle = torch.linspace(-20, 20, 101, dtype=F64)[:-1] + 0.2
    for loss in (torch.exp(-middle.abs() / 0.5), torch.exp(-middle / 2), error(middle)):
        schedule.load_state_dict(ld.AdaptiveSchedule().state_dict())
        schedule.update(middle, loss)
        expected = (loss / loss.sum()).clamp(min=1e-8)
        assert torch.allclose(schedule.log_prob(middle).exp() * 0.4, expected, rtol=1e-5)


def test_state_survives():
    schedule = adapted(ld.ELBOWeighting(), steps=20)
    again = ld.AdaptiveSchedule()
    again.load_state_dict(schedule.state_dict())
    t = torch.rand(50, dtype=F64)
    assert torch.equal(again.logsnr(t), schedule.logsnr(t))
    for each in (again, schedule):
        each.update(torch.tensor([1.0]), torch.tensor([5.0]))
    assert torch.equal(again.beyond, schedule.beyond)
    with pytest.raises(ValueError, match="set bins=100"):
        ld.AdaptiveSchedule(bins=50).load_state_dict(schedule.state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"uniform_share": 1.0},
            r"decay and uniform_share must be in \[0, 1\), got 0.999 and 1.0",
        ),
        ({"uniform_share": -0.1}, "uniform_share"),
        ({"decay": 1.0}, "decay"),
        ({"bins": 0}, "bins must be at least 1"),
        ({"warmup": -1}, "warmup"),
        ({"logsnr_min": 5.0, "logsnr_max": -5.0}, "must be below"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ld.AdaptiveSchedule(**arguments)


def test_levels_outside_are_refused():
    schedule = ld.AdaptiveSchedule(-10.0, 10.0)
    with pytest.raises(ValueError, match=r"λ = 12 is outside its range \[-10"):
        schedule.update(torch.tensor([0.0, 12.0]), torch.ones(2))
    with pytest.raises(ValueError, match="values and λ of the same shape"):
        schedule.update(torch.zeros(3), torch.ones(2))
    schedule.update(torch.tensor([10.0, -10.0]), torch.ones(2))  # the ends belong to it


def test_an_update_does_not_look_at_the_device():
    """On meta tensors there is nothing to look at: whoever asks for a value raises."""
    for arguments in ({}, {"rms": True}, {"initial": ld.CosineSchedule(), "warmup": 3}):
        schedule = ld.AdaptiveSchedule(**arguments).to("meta")
        logsnr = torch.empty(8, dtype=F64, device="meta")
        schedule.update(logsnr, torch.empty(8, device="meta"))
        assert schedule.at(torch.empty(8, device="meta"))[0].shape == (8,)

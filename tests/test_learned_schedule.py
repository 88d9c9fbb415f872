"""Schedules that learn: the right gradient for each parameter, and a schedule throughout."""

import math

import pytest
import torch
from torch import nn

import lit_diffusion as ld
from lit_diffusion.testing import check_schedule

F64 = torch.float64


class Wrong(nn.Module):
    """A denoiser with two weights, wrong in a way that depends on λ: nothing cancels."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3, dtype=F64))
        self.b = nn.Parameter(torch.tensor(0.05, dtype=F64))

    def forward(self, z, logsnr):
        eps = ld.GaussianDenoiser(0.5)(z, logsnr).eps
        level = logsnr.reshape(-1, *[1] * (z.ndim - 1))
        return ld.Denoised(z, eps * (1 + self.a * torch.sin(level / 5)) + self.b * level)


@pytest.fixture
def draws():
    """(x, t, eps), the same for every evaluation, so that differences are exact."""
    generator = torch.Generator().manual_seed(0)
    x = ld.level_values(17)[torch.randint(17, (400, 2, 3), generator=generator)]
    t = torch.rand(400, generator=generator, dtype=F64)
    return x, t, torch.randn(x.shape, generator=generator, dtype=F64)


def losses(schedule, network, draws, **arguments):
    x, t, eps = draws
    noise = torch.Generator().manual_seed(1)  # of the reconstruction
    return ld.DiffusionLoss(schedule, **arguments)(network, x, t=t, eps=eps, generator=noise).loss


def numerical(parameter, index, function, step):
    flat = parameter.data.view(-1)
    kept = flat[index].clone()
    values = []
    for sign in (1, -1):
        flat[index] = kept + sign * step
        with torch.no_grad():
            values.append(float(function()))
    flat[index] = kept
    return (values[0] - values[1]) / (2 * step)


@pytest.mark.parametrize("weighting", [ld.ELBOWeighting(), ld.SigmoidWeighting()])
def test_the_shape_follows_the_gradient_of_the_variance(draws, weighting):
    """For given draws, Var = E[L²] − E[L]² and E[L] does not depend on the shape."""
    schedule, network = ld.LearnedSchedule(-5.0, 13.3), Wrong()
    losses(schedule, network, draws, weighting=weighting).mean().backward()

    def second_moment():
        return losses(schedule, network, draws, weighting=weighting).square().mean()

    named = dict(schedule.named_parameters())
    assert set(named) == {"slope", "rate", "bias", "height"}
    for name, parameter in named.items():
        for index in (0, 300, 700) if parameter.ndim else (0,):
            found = float(parameter.grad.view(-1)[index])
            # `slope` moves all the units at once, so it is probed more gently.
            exact = numerical(parameter, index, second_moment, 0.01 if parameter.ndim else 1e-3)
            assert found == pytest.approx(exact, rel=2e-3), (name, index)


def test_the_mean_does_not_depend_on_the_shape():
    # Over all t, E[L] stays where it is when the shape is bent, and its variance does not.
    schedule, network = ld.LearnedSchedule(-5.0, 13.3), Wrong()
    n = 40_000
    t = (torch.arange(n, dtype=F64) + 0.5) / n
    x = torch.full((n, 1), 0.5, dtype=F64)
    eps = torch.ones_like(x)
    moments = []
    for _ in range(2):
        with torch.no_grad():
            loss = ld.DiffusionLoss(schedule, ld.ELBOWeighting())(network, x, t=t, eps=eps).loss
            moments.append((float(loss.mean()), float(loss.var())))
            schedule.height += 4 * torch.sin(torch.arange(1024) / 160)
    assert moments[0][0] == pytest.approx(moments[1][0], rel=1e-5)
    assert moments[0][1] != pytest.approx(moments[1][1], rel=0.05)


@pytest.mark.parametrize(
    "schedule",
    [
        ld.LearnedSchedule(-5.0, 13.3, learn="both"),
        ld.LearnedSchedule(-5.0, 13.3, learn="endpoints"),
        ld.LinearSchedule(-5.0, 13.3, learn=True),
    ],
    ids=["both", "endpoints", "scalar"],
)
def test_the_ends_and_the_network_follow_the_bound_itself(draws, schedule):
    network = Wrong()
    arguments = {"decoder": ld.SoftmaxDecoder(17)}
    losses(schedule, network, draws, **arguments).mean().backward()

    def bound():
        return losses(schedule, network, draws, **arguments).mean()

    for parameter in (schedule.logsnr_min, schedule.logsnr_max):
        exact = numerical(parameter, 0, bound, 0.01)
        assert float(parameter.grad) == pytest.approx(exact, rel=2e-3)
    for parameter in network.parameters():
        exact = numerical(parameter, 0, bound, 1e-4)
        assert float(parameter.grad) == pytest.approx(exact, rel=1e-6)
    learns = {name for name, p in schedule.named_parameters() if p.grad is not None}
    shape = {"slope", "rate", "bias", "height"}
    assert (learns & shape == shape) == schedule.learns_shape


class ExponentialSchedule(ld.NoiseSchedule):
    """A plug-in with a learned shape: u = (e^(kt) − 1)/(e^k − 1) of the way down in λ."""

    def __init__(self, logsnr_min=None, logsnr_max=None, rate=0.5):
        low, high = -5.0 if logsnr_min is None else logsnr_min, logsnr_max or 13.3
        super().__init__(low, high, support=(low, high))
        self.rate = nn.Parameter(torch.tensor(rate, dtype=F64))

    def _logsnr(self, t):
        low, high = self.ends
        return high - (high - low) * torch.expm1(self.rate * t) / torch.expm1(self.rate)

    def _time(self, logsnr):
        low, high = self.ends
        share = (high - logsnr) / (high - low)
        return torch.log1p(share * torch.expm1(self.rate)) / self.rate


class BothSchedule(ExponentialSchedule):
    """The same with learned ends, without saying what depends on the shape alone."""

    def __init__(self):
        ld.NoiseSchedule.__init__(self, -5.0, 13.3, learn_ends=True)
        self.rate = nn.Parameter(torch.tensor(0.5, dtype=F64))


def test_a_plugin_learns_its_shape(draws):
    """Through the base class alone: ∇Var = ∇E[L²], by autograd and by what the loss gives it."""
    x, t, eps = draws
    schedule, denoiser = ExponentialSchedule(), ld.GaussianDenoiser(0.5)
    assert schedule.learns_shape
    assert not isinstance(schedule, ld.LearnedSchedule)
    logsnr, log_prob = schedule.at(t)
    error = (denoiser(ld.diffuse(x, eps, logsnr), logsnr).eps - eps).square().flatten(1).mean(1)
    (0.5 * error * ld.SigmoidWeighting()(logsnr) / log_prob.exp()).square().mean().backward()
    exact, schedule.rate.grad = schedule.rate.grad, None
    losses(schedule, denoiser, draws, weighting=ld.SigmoidWeighting()).mean().backward()
    assert float(schedule.rate.grad) == pytest.approx(float(exact), rel=1e-9)
    check_schedule(schedule)


def test_a_plugin_reduces_the_variance():
    generator = torch.Generator().manual_seed(0)
    denoiser, schedule = ld.GaussianDenoiser(0.5), ExponentialSchedule(rate=-1.5)
    loss, x = ld.DiffusionLoss(schedule, ld.ELBOWeighting()), torch.full((256, 16), 0.5, dtype=F64)

    def moments():
        with torch.no_grad():
            t = torch.rand(40_000, dtype=F64, generator=torch.Generator().manual_seed(7))
            noise = torch.Generator().manual_seed(8)
            found = loss(denoiser, x[:1].expand(40_000, -1), t=t, generator=noise).loss
        return float(found.mean()), float(found.var())

    before = moments()
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.1)
    for _ in range(100):
        optimizer.zero_grad()
        t = torch.rand(256, dtype=F64, generator=generator)
        loss(denoiser, x, t=t, generator=generator).loss.mean().backward()
        optimizer.step()
    after = moments()
    assert after[1] < 0.6 * before[1], (before, after)
    error = math.sqrt((before[1] + after[1]) / 40_000)
    assert abs(after[0] - before[0]) < 4 * error


def test_a_plugin_that_learns_both_must_separate_them(draws):
    schedule = BothSchedule()
    with pytest.raises(NotImplementedError, match=r"BothSchedule.at_with_shape"):
        losses(schedule, Wrong(), draws, decoder=ld.SoftmaxDecoder(17))
    schedule.rate.requires_grad_(False)
    losses(schedule, Wrong(), draws, decoder=ld.SoftmaxDecoder(17))


def test_the_contract_finds_a_shape_that_follows_the_loss_itself():
    class Deaf(ExponentialSchedule):
        def at_with_shape(self, t):
            return *self.at(t), ()

    with pytest.raises(AssertionError, match=r"the shape follows ∇E\[L²\]"):
        check_schedule(Deaf())


def test_in_discrete_time_the_shape_follows_the_bound_too(draws):
    # There the value depends on the levels, so that is what is minimised.
    schedule, network = ld.LearnedSchedule(-5.0, 13.3), Wrong()
    losses(schedule, network, draws, num_timesteps=10).mean().backward()

    def bound():
        return losses(schedule, network, draws, num_timesteps=10).mean()

    for index in (300, 700):
        exact = numerical(schedule.bias, index, bound, 0.01)
        assert float(schedule.bias.grad[index]) == pytest.approx(exact, rel=2e-3)


def test_two_steps_do_not_share_their_losses(draws):
    # Gradients of two losses, as in gradient accumulation, add up whatever the order of backward.
    schedule, network = ld.LearnedSchedule(-5.0, 13.3), Wrong()
    halves = [tuple(part[half] for part in draws) for half in (slice(0, 100), slice(100, 400))]
    gradients = []
    for order in ((0, 1), (1, 0)):
        schedule.zero_grad()
        each = [losses(schedule, network, half).mean() for half in halves]
        for i in order:
            each[i].backward()
        gradients.append(schedule.bias.grad.clone())
    assert torch.allclose(*gradients)


def test_it_learns_and_stays_a_schedule():
    torch.manual_seed(0)
    schedule = ld.LearnedSchedule(-5.0, 10.0, learn="both")
    decoder = ld.SoftmaxDecoder(17)
    loss = ld.DiffusionLoss(schedule, decoder=decoder)
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.02)
    values, denoiser = ld.level_values(17), ld.GaussianDenoiser(0.6)
    for _ in range(60):
        x = values[torch.randint(17, (128, 4))]
        optimizer.zero_grad()
        loss(denoiser, x, t=torch.rand(128)).loss.mean().backward()
        optimizer.step()
    low, high = schedule.ends
    assert (low, high) != (-5.0, 10.0)
    assert schedule.logsnr(torch.tensor([0.0, 1.0])).tolist() == [high, low]
    straight = torch.linspace(high, low, 101, dtype=F64)
    bend = (schedule.logsnr(torch.linspace(0, 1, 101)) - straight).abs().max()
    assert float(bend.detach()) > 0.5
    check_schedule(schedule)
    again = ld.LearnedSchedule(-5.0, 10.0, learn="both")
    again.load_state_dict(schedule.state_dict())
    assert again.ends == schedule.ends
    assert repr(again) == repr(schedule)


def test_the_variance_falls_and_the_mean_stays():
    """Against the cosine between the same ends, on a fixed denoiser, by five times and more."""
    torch.manual_seed(0)
    c, dims = 0.5, 64
    denoiser = ld.GaussianDenoiser(c)
    x = c * torch.randn(1, dims, dtype=F64)
    x = c * x / x.square().mean().sqrt()

    def moments(schedule, n=40_000):
        with torch.no_grad():
            t = torch.rand(n, dtype=F64, generator=torch.Generator().manual_seed(7))
            loss = ld.DiffusionLoss(schedule, ld.ELBOWeighting())(
                denoiser, x.expand(n, -1), t=t
            ).loss
        return float(loss.mean()), float(loss.var())

    schedule = ld.LearnedSchedule(-5.0, 13.3)
    loss = ld.DiffusionLoss(schedule, ld.ELBOWeighting())
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.02)
    for _ in range(250):
        optimizer.zero_grad()
        loss(denoiser, x.expand(128, -1), t=torch.rand(128)).loss.mean().backward()
        optimizer.step()
    learned, cosine = moments(schedule), moments(ld.CosineSchedule(-5.0, 13.3))
    assert learned[1] < cosine[1] / 5, (learned, cosine)
    error = math.sqrt((learned[1] + cosine[1]) / 40_000)
    assert abs(learned[0] - cosine[0]) < 4 * error


@pytest.mark.parametrize(
    "make",
    [
        lambda: ld.LearnedSchedule(learn="endpoints"),
        lambda: ld.LearnedSchedule(learn="both"),
        lambda: ld.LinearSchedule(learn=True),
    ],
)
def test_ends_that_would_collapse_are_refused(make):
    with pytest.raises(ValueError, match=r"collapse.*Give a decoder"):
        ld.DiffusionLoss(make())
    with pytest.raises(ValueError, match=r"require the bound itself, w = 1"):
        ld.DiffusionLoss(make(), ld.SigmoidWeighting(), decoder=ld.SoftmaxDecoder())
    with pytest.raises(ValueError, match="is learned, so it learns its shift"):
        ld.ShiftedSchedule(make(), shift=1.0)
    ld.DiffusionLoss(make(), decoder=ld.SoftmaxDecoder())
    ld.DiffusionLoss(make().requires_grad_(False))  # frozen, it is a schedule like any other


def test_they_would_collapse_indeed():
    # The diffusion term alone is least when there is nothing to do.
    ends = ld.LinearSchedule(-1.0, 1.0, learn=True)
    x, t = torch.full((20_000, 2), 0.5, dtype=F64), torch.rand(20_000, dtype=F64)
    logsnr, log_prob = ends.at(t)
    eps = torch.randn_like(x)
    error = ld.GaussianDenoiser(0.5)(ld.diffuse(x, eps, logsnr), logsnr).eps - eps
    (0.5 * error.square().mean(1) / log_prob.exp()).mean().backward()
    assert float(ends.logsnr_min.grad) < 0 < float(ends.logsnr_max.grad)


@pytest.mark.parametrize("raw", [-1e4, -100.0, -34.0, 50.0])
def test_any_slope_is_a_schedule(raw):
    schedule = ld.LearnedSchedule(-5.0, 13.3)
    with torch.no_grad():
        schedule.slope.fill_(raw)
    t = torch.linspace(0, 1, 101, dtype=F64)
    logsnr, log_prob = schedule.at(t)
    assert bool((logsnr.diff() < 0).all())
    assert torch.allclose(schedule.time(logsnr.detach()), t, atol=1e-9)
    mass = torch.trapezoid(schedule.log_prob(logsnr.detach()).exp(), -logsnr.detach())
    assert float(mass) == pytest.approx(1, abs=1e-2)
    log_prob.sum().backward()
    assert all(p.grad.isfinite().all() for p in schedule.parameters())


@pytest.mark.parametrize(
    "make",
    [
        lambda: ld.LinearSchedule(-1.0, 1.0, learn=True),
        lambda: ld.LearnedSchedule(-1.0, 1.0, learn="both"),
    ],
)
@pytest.mark.parametrize("high", [-0.5, -3.0, -100.0])
def test_learned_ends_that_cross_stay_in_order(make, high):
    schedule = make()
    with torch.no_grad():
        schedule.logsnr_max.fill_(high)
    low, top = schedule.ends
    assert -1 == low < top < 0
    logsnr, log_prob = schedule.at(torch.linspace(0, 1, 5))
    assert bool(logsnr.isfinite().all() and log_prob.isfinite().all())
    log_prob.sum().backward()
    assert schedule.logsnr_max.grad.isfinite()
    assert float(schedule.logsnr_min.grad) >= 0
    t = torch.linspace(0, 1, 5, dtype=F64)
    assert torch.allclose(schedule.time(schedule.logsnr(t)), t, atol=1e-6)


def test_ends_at_a_distance_of_one_or_more_are_the_parameters():
    schedule = ld.LinearSchedule(-5.0, 13.3, learn=True)
    with torch.no_grad():
        schedule.logsnr_max.fill_(-4.0)
    assert schedule.ends == (-5.0, -4.0)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="'shape', 'endpoints' or 'both', got 'ends'"):
        ld.LearnedSchedule(learn="ends")
    with pytest.raises(ValueError, match="must be below"):
        ld.LearnedSchedule(5.0, -5.0)


@pytest.mark.parametrize("num_timesteps", [None, 10])
@pytest.mark.parametrize("decoder", [ld.SoftmaxDecoder(17), ld.DiscretizedGaussianDecoder(17)])
def test_a_training_step_does_not_look_at_the_device(decoder, num_timesteps):
    """On meta tensors there is nothing to look at: whoever asks for a value raises."""
    schedule = ld.LearnedSchedule(-5.0, 13.3, learn="both")
    loss = ld.DiffusionLoss(schedule, decoder=decoder, num_timesteps=num_timesteps).to("meta")
    x = torch.empty(4, 1, 2, 3, device="meta")
    loss(ld.GaussianDenoiser(), x).loss.mean().backward()
    assert schedule.bias.grad.shape == (1024,)

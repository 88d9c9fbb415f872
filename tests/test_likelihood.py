"""The bound, its decoders, and the probability flow, against what is known exactly.

Formulas and published figures: Ho 2020 (arXiv:2006.11239), Kingma 2021 (2107.00630), Zheng 2023
(2305.03935).
"""

import ast
import math
import warnings
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import softplus

import lit_diffusion as ld
from lit_diffusion.gaussian import alpha_sigma, broadcast_to_data, diffuse

F64 = torch.float64
LN2 = math.log(2)
VDM_GRID = tuple((2 * (torch.arange(256, dtype=F64) + 0.5) / 256 - 1).tolist())


def gaussian_data(c, n=4096, dims=32, seed=0):
    """n examples whose mean square over all is c² exactly."""
    x = torch.randn(n, dims, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return c * x / x.square().mean().sqrt()


def exact_diffusion(c, low=-15.0, high=15.0):
    shift = 2 * math.log(c)
    ends = softplus(torch.tensor([high + shift, low + shift], dtype=F64))
    return 0.5 * float(ends[0] - ends[1])


class Expected(nn.Module):
    """The exact denoiser, its error replaced by its root mean square at each λ.

    ε̂ − ε is then the same for every x and ε, and no sampling error is left in a mean over λ.
    """

    def __init__(self, c):
        super().__init__()
        self.c = c

    def forward(self, z, logsnr):
        alpha, sigma = alpha_sigma(logsnr)
        error = self.c * alpha / torch.sqrt((alpha * self.c) ** 2 + sigma**2)
        return ld.Denoised(z, broadcast_to_data(error, z).expand_as(z))


def without_noise(c, schedule, num_timesteps=None, n=20_000):
    x = torch.zeros(n, 1, dtype=F64)
    t = (torch.arange(n, dtype=F64) + 0.5) / n
    loss = ld.DiffusionLoss(schedule, ld.ELBOWeighting(), num_timesteps).requires_grad_(False)
    return float(loss(Expected(c), x, t=t, eps=torch.zeros_like(x)).loss.mean())


# Golden facts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("name", ["LinearSchedule", "CosineSchedule", "LearnedSchedule"])
def test_continuous_diffusion_term_is_exact(c, name):
    schedule = ld.SCHEDULES[name](-15.0, 15.0)
    assert without_noise(c, schedule) == pytest.approx(exact_diffusion(c), rel=1e-3)


@pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
def test_with_its_noise_too(c):
    terms = ld.variational_bound(
        ld.GaussianDenoiser(c), gaussian_data(c, n=20_000), ld.LinearSchedule(-15.0, 15.0)
    )
    assert float(terms.diffusion.mean()) == pytest.approx(exact_diffusion(c), rel=0.02)
    assert float(terms.reconstruction.abs().max()) == 0


@pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
def test_chain_falls_to_the_continuous_value(c):
    schedule = ld.LinearSchedule(-15.0, 15.0)
    chain = [without_noise(c, schedule, num_timesteps=2**k) for k in range(3, 14)]
    exact = exact_diffusion(c)
    assert all(a > b for a, b in pairwise(chain))
    assert chain[-1] > exact
    assert chain[-1] == pytest.approx(exact, rel=2e-3)


@pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
def test_the_three_terms_are_the_entropy(c):
    x = gaussian_data(c)
    schedule = ld.LinearSchedule(-15.0, 15.0)
    cleanest = torch.full((len(x),), 15.0, dtype=F64)
    eps = gaussian_data(1.0, seed=1)  # its mean square is 1, so this term has no sampling error
    reconstruction = ld.GaussianDecoder().reconstruction(ld.GaussianDenoiser(c), x, cleanest, eps)
    total = (
        float(ld.prior_kl(x, torch.full((len(x),), -15.0)).mean())
        + without_noise(c, schedule)
        + float(reconstruction.mean())
    )
    assert total == pytest.approx(0.5 * math.log(2 * math.pi * math.e * c**2), abs=1e-3)


@pytest.mark.parametrize(
    ("logsnr_max", "bits"),
    [(13.3, 0.0106), (11.8, 0.545), (10.0, 1.826), (9.21, 2.391), (8.0, 3.251)],
)
def test_reconstruction_on_vdms_grid(logsnr_max, bits):
    # The published figures are Monte Carlo estimates, ± 0.0005.
    assert ld.SoftmaxDecoder(VDM_GRID).cost(logsnr_max) == pytest.approx(bits, abs=2e-3)


@pytest.mark.parametrize(
    ("logsnr_max", "bits"),
    [(13.3, 0.0102), (11.8, 0.538), (10.0, 1.818), (9.21, 2.386), (8.0, 3.248)],
)
def test_reconstruction_on_bytes(logsnr_max, bits):
    assert ld.SoftmaxDecoder(256).cost(logsnr_max) == pytest.approx(bits, abs=2e-3)
    # The same by the term of the bound itself, on all bytes.
    x = ld.level_values(256).repeat(100)[:, None]
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=F64)
    level = torch.full((len(x),), logsnr_max, dtype=F64)
    term = ld.SoftmaxDecoder(256).reconstruction(None, x, level, eps) / LN2
    assert abs(float(term.mean()) - bits) < 4 * float(term.std()) / len(x) ** 0.5


@pytest.mark.parametrize(
    ("logsnr_min", "bits"), [(-5, 0.00122), (-6, 0.00045), (-7, 0.00016), (-10, 8e-6)]
)
def test_prior(logsnr_min, bits):
    x = torch.full((1, 4), 0.5, dtype=F64)
    prior = ld.prior_kl(x, torch.tensor([float(logsnr_min)], dtype=F64)) / LN2
    assert float(prior) == pytest.approx(bits, abs=6e-6)
    # KL(N(α x, σ²) ‖ N(0, 1)), by torch.
    alpha, sigma = alpha_sigma(torch.tensor([float(logsnr_min)], dtype=F64))
    q = torch.distributions.Normal(0.5 * alpha, sigma)
    p = torch.distributions.Normal(torch.zeros_like(alpha), torch.ones_like(alpha))
    assert float(torch.distributions.kl_divergence(q, p)) == pytest.approx(float(prior * LN2))


class Says(nn.Module):
    """ε̂ = scale·z."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale

    def forward(self, z, logsnr):
        return ld.Denoised(z, self.scale * z)


@pytest.mark.parametrize(("scale", "bits"), [(1.0, 9.99), (0.0, 13.2)])
def test_fresh_network(scale, bits):
    # ½∫ E(ε̂ − ε)² dλ over [−5, 13.3] with E x² = ¼: the mean over (x, ε) is taken exactly, by the
    # four combinations of x = ±½, ε = ±1, whose first and second moments are the true ones.
    n = 20_000
    t = ((torch.arange(n, dtype=F64) + 0.5) / n).repeat_interleave(4)
    x = torch.tensor([0.5, 0.5, -0.5, -0.5], dtype=F64).repeat(n)[:, None]
    eps = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=F64).repeat(n)[:, None]
    loss = ld.DiffusionLoss(ld.LinearSchedule(-5.0, 13.3), ld.ELBOWeighting())
    found = float(loss(Says(scale), x, t=t, eps=eps).loss.mean()) / LN2
    assert found == pytest.approx(bits, abs=0.006)


# The two forms --------------------------------------------------------------------------------


def gallery_bounds():
    """Both forms as the gallery shows them, without running the page."""
    path = Path(__file__).parents[1] / "docs/gallery/plot_bound.py"
    page = ast.parse(path.read_text(encoding="utf-8"))
    kept = (ast.FunctionDef, ast.Import, ast.ImportFrom)
    page.body = [node for node in page.body if isinstance(node, kept)]
    names = {}
    exec(compile(page, path, "exec"), names)
    return names["denoising_bound"], names["consistency_bound"]


@pytest.mark.parametrize("num_timesteps", [1, 2, 7, 50])
def test_both_forms_have_the_same_mean(num_timesteps):
    c, x = 0.5, gaussian_data(0.5, n=40_000, dims=8)
    # A wrong denoiser, so that neither form is helped by optimality.
    denoiser, schedule = ld.GaussianDenoiser(std=0.8, mean=0.1), ld.LinearSchedule(-6.0, 6.0)
    totals = []
    for bound in gallery_bounds():
        generator = torch.Generator().manual_seed(num_timesteps)
        total = bound(denoiser, x, schedule, num_timesteps, generator)
        totals.append((float(total.mean()), float(total.std()) / len(x) ** 0.5))
    (one, error_one), (other, error_other) = totals
    assert abs(one - other) < 4 * math.hypot(error_one, error_other), (totals, c)


def test_only_in_the_consistency_form_the_variance_grows_without_bound():
    x, schedule = gaussian_data(0.5, n=20_000, dims=16), ld.LinearSchedule(-15.0, 15.0)

    def std(bound, num_timesteps):
        generator = torch.Generator().manual_seed(0)
        total = bound(ld.GaussianDenoiser(0.5), x, schedule, num_timesteps, generator)
        return float(total.std())

    denoising, consistency = gallery_bounds()
    assert std(denoising, 1600) < std(denoising, 400)
    # √T ln T, the term at λ_max: 18, 30, 51, 85 at 200, 400, 800, 1600 steps.
    assert std(consistency, 1600) > 2.5 * std(consistency, 400)


def test_a_chain_of_one_step_is_written_out():
    # −ELBO = KL(q(z_1|x) ‖ N) + E KL(q(z_0|z_1, x) ‖ q(z_0|z_1, x̂)), by torch's own divergences.
    low, high = torch.tensor([-2.0, 3.0], dtype=F64)
    x, eps = gaussian_data(0.5, n=5, dims=3), gaussian_data(1.0, n=5, dims=3, seed=1)
    denoiser = ld.GaussianDenoiser(std=0.8)
    loss = ld.DiffusionLoss(ld.LinearSchedule(-2.0, 3.0), ld.ELBOWeighting(), 1)
    found = loss(denoiser, x, eps=eps).loss
    levels = low.expand(5), high.expand(5)
    z = diffuse(x, eps, levels[0])
    true, std = ld.posterior(z, x, *levels)
    ours, _ = ld.posterior(z, denoiser(z, levels[0]).x, *levels)
    normal = torch.distributions.Normal
    exact = torch.distributions.kl_divergence(normal(true, std), normal(ours, std)).mean(1)
    assert torch.allclose(found, exact)


def test_times_of_a_chain_are_stratified():
    seen = []

    def spy(z, logsnr):
        seen.append(logsnr)
        return ld.GaussianDenoiser()(z, logsnr)

    schedule = ld.LinearSchedule(-5.0, 5.0)
    ld.DiffusionLoss(schedule, ld.ELBOWeighting(), 10)(spy, torch.zeros(20, 1))
    index = (schedule.time(seen[0]) * 10).round().long()
    assert index.bincount(minlength=11).tolist() == [0] + [2] * 10


# DDPM -----------------------------------------------------------------------------------------

BETA = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
ABAR = torch.cumprod(1 - BETA, 0)


def chain_weight(weighting):
    """Our weight on ‖ε̂ − ε‖² at t = 2 … 1000 of DDPM's table, without the average over t."""
    t = torch.arange(1, 1000, dtype=F64) / 999
    schedule = ld.BetaSchedule()
    logsnr, cleaner = schedule.logsnr(t), schedule.logsnr(t - 1 / 999)
    return 0.5 * torch.expm1(cleaner - logsnr) * weighting(logsnr)


def published_weight(variance):
    """β² / (2 σ² α (1 − ᾱ)) with σ² = β̃ or β (Eq. 12), t = 2 … 1000."""
    beta, abar, before = BETA[1:], ABAR[1:], ABAR[:-1]
    posterior = (1 - before) / (1 - abar) * beta
    square = torch.exp((1 - variance) * posterior.log() + variance * beta.log())
    return beta**2 / (2 * square * (1 - beta) * (1 - abar))


@pytest.mark.parametrize("variance", [0.0, 0.3, 1.0])
def test_variational_weighting_is_ddpms(variance):
    ours = chain_weight(ld.VariationalWeighting(variance=variance))
    assert torch.allclose(ours, published_weight(variance), rtol=1e-7)


def test_elbo_weighting_is_the_bound_with_the_posteriors_variance():
    assert torch.allclose(chain_weight(ld.ELBOWeighting()), published_weight(0.0), rtol=1e-7)


def test_regression_on_the_posterior_mean():
    # The loss as published, on real vectors: ‖μ̃(x_t, x_0) − μ_θ(x_t)‖² at every t of the table.
    x, eps, out = torch.randn(3, 999, 2, 3, dtype=F64).unbind()
    beta, abar, before = BETA[1:], ABAR[1:], ABAR[:-1]
    xt = broadcast_to_data(abar.sqrt(), x) * x + broadcast_to_data((1 - abar).sqrt(), x) * eps
    mean = broadcast_to_data(before.sqrt() * beta / (1 - abar), x) * x
    mean = mean + broadcast_to_data((1 - beta).sqrt() * (1 - before) / (1 - abar), x) * xt
    model = (xt - broadcast_to_data(beta / (1 - abar).sqrt(), x) * out) / broadcast_to_data(
        (1 - beta).sqrt(), x
    )
    published = 0.5 * (mean - model).square().flatten(1).mean(1)
    ours = chain_weight(ld.PosteriorMeanWeighting()) * (out - eps).square().flatten(1).mean(1)
    assert torch.allclose(ours, published, rtol=1e-7)


@pytest.mark.parametrize("weighting", [ld.VariationalWeighting(), ld.PosteriorMeanWeighting()])
def test_both_are_monotone_on_the_table(weighting):
    weight = weighting(torch.logit(ABAR).flip(0))  # from noise to data
    assert bool((weight.diff() <= 1e-9 * weight[:-1]).all())


def test_simple_loss_on_the_table():
    schedule = ld.BetaSchedule()
    loss = ld.DiffusionLoss(
        schedule, ld.DensityWeighting(schedule, num_timesteps=999), num_timesteps=999
    )
    terms = loss(ld.GaussianDenoiser(), torch.randn(64, 1, 8, 8, dtype=F64))
    assert torch.allclose(2 * terms.loss, terms.eps_mse, rtol=1e-7)
    table = torch.logit(ABAR)
    distance = (terms.logsnr[:, None] - table[None, 1:]).abs().min(1).values
    assert float(distance.max()) < 1e-9  # every level drawn is one of t = 2 … 1000


def test_density_of_a_long_chain_is_the_density():
    schedule, logsnr = ld.CosineSchedule(-10.0, 10.0), torch.linspace(-9, 9, 19, dtype=F64)
    chain = ld.DensityWeighting(schedule, num_timesteps=1_000_000)(logsnr)
    assert torch.allclose(chain, schedule.log_prob(logsnr).exp(), rtol=1e-3)


def test_ddpms_decoder_is_the_integral_over_the_bin():
    # As the paper prints it: δ± = ±∞ at the ends, else x ± 1/255, for 256 levels on [−1, 1].
    x = ld.level_values(256)
    mean = torch.full_like(x, 0.1)
    exact = torch.distributions.Normal(0.1, 0.3)
    high = torch.where(x > 0.999, torch.inf, x + 1 / 255)
    low = torch.where(x < -0.999, -torch.inf, x - 1 / 255)
    mass = exact.cdf(high) - exact.cdf(low)

    def denoise(z, logsnr):
        return ld.Denoised(z, z)

    decoder = ld.DiscretizedGaussianDecoder(256, std=0.3)
    ours = decoder.log_prob(x[:, None], mean[:, None], torch.zeros(256, dtype=F64), denoise)
    assert torch.allclose(ours[:, 0].exp(), mass, atol=1e-12)
    far = decoder.log_prob(x[:1, None], torch.tensor([[30.0]]), torch.zeros(1), denoise)
    assert float(far) == pytest.approx(-0.5 * (31 - 1 / 255) ** 2 / 0.09, rel=0.01)  # not −∞


# Bad input ------------------------------------------------------------------------------------


def test_a_low_end_is_warned_of_with_its_price():
    x = ld.level_values(256)[torch.randint(256, (4, 3))]
    bound = ld.LinearSchedule(-5.0, 9.0)
    with pytest.warns(UserWarning, match=r"logsnr_max=9 is too low .* 2\.5\d bits per dimension"):
        ld.variational_bound(ld.GaussianDenoiser(), x, bound, ld.SoftmaxDecoder(256))
    with pytest.warns(UserWarning, match="2.39 bits"):
        ld.DiffusionLoss(ld.BetaSchedule(), decoder=ld.SoftmaxDecoder(256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ld.DiffusionLoss(ld.LinearSchedule(-5.0, 13.3), decoder=ld.SoftmaxDecoder(256))
        ld.DiffusionLoss(ld.LinearSchedule(-5.0, 9.0), decoder=ld.SoftmaxDecoder(17))
        ld.DiffusionLoss(ld.LinearSchedule(-5.0, 5.0), decoder=ld.GaussianDecoder())


@pytest.mark.parametrize("decoder", [ld.SoftmaxDecoder(17), ld.DiscretizedGaussianDecoder(17)])
def test_data_that_do_not_match(decoder):
    schedule, denoiser = ld.LinearSchedule(-5.0, 13.3), ld.GaussianDenoiser()
    bytes_ = ld.level_values(256)[torch.randint(256, (4, 300))].float()
    with pytest.raises(ValueError, match=r"do not match levels=17: .* different values"):
        ld.variational_bound(denoiser, bytes_, schedule, decoder)
    with pytest.raises(ValueError, match=r"data in \[−1, 1\], got \|x\| up to 255"):
        ld.variational_bound(denoiser, 127.5 * (bytes_ + 1), schedule, decoder)
    with pytest.raises(ValueError, match="do not match"):
        ld.DiffusionLoss(schedule, decoder=decoder)(denoiser, bytes_)
    digits = ld.level_values(17)[torch.randint(17, (4, 300))].float()
    assert ld.variational_bound(denoiser, digits, schedule, decoder).total.isfinite().all()


@pytest.mark.parametrize("levels", [1, 0, (0.5,), (0.0, 0.0), (0.5, -0.5), (0.0, 2.0)])
def test_levels_that_are_none(levels):
    with pytest.raises(ValueError, match=r"at least 2 (increasing )?levels"):
        ld.level_values(levels)


def test_digits_have_seventeen_levels():
    from lit_diffusion.training import DataModule

    data = DataModule("digits8x8", batch_size=300)
    data.setup("validate")
    batch = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)
    assert ld.level_index(batch["image"], 17).unique().tolist() == list(range(17))


def test_steps_below_one():
    x, schedule = torch.zeros(2, 3), ld.LinearSchedule(-5.0, 13.3)
    for make in (
        lambda: ld.DiffusionLoss(schedule, num_timesteps=0),
        lambda: ld.variational_bound(ld.GaussianDenoiser(), x, schedule, num_timesteps=0),
        lambda: ld.variational_bound(ld.GaussianDenoiser(), x, schedule, num_timesteps=-1),
        lambda: ld.VariationalWeighting(num_timesteps=0),
        lambda: ld.PosteriorMeanWeighting(num_timesteps=0),
        lambda: ld.DensityWeighting(num_timesteps=0),
    ):
        with pytest.raises(ValueError, match=r"at least 1"):
            make()


def test_a_bound_that_is_not_finite_names_term_and_level():
    bound = ld.variational_bound

    class Breaks(nn.Module):
        def forward(self, z, logsnr):
            bad = z / broadcast_to_data(torch.where(logsnr > 5, 0.0, 1.0), z) * 0
            return ld.Denoised(z + bad, z + bad)

    x, schedule = torch.zeros(64, 3), ld.LinearSchedule(-5.0, 13.3)
    with pytest.raises(ValueError, match=r"diffusion term of the bound is nan at λ = [5-9]"):
        bound(Breaks(), x, schedule, num_timesteps=20, t=torch.full((64,), 0.3))
    x[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"prior term of the bound is inf at λ = -5 \(1 of 64"):
        bound(ld.GaussianDenoiser(), x, schedule, num_timesteps=20)


def test_one_generator_for_each_example_needs_times():
    x, schedule = torch.zeros(2, 3), ld.LinearSchedule(-5.0, 13.3)
    noise = [torch.Generator().manual_seed(i) for i in range(2)]
    with pytest.raises(ValueError, match="pass t"):
        ld.variational_bound(ld.GaussianDenoiser(), x, schedule, generator=noise)
    whole = [
        ld.variational_bound(
            ld.GaussianDenoiser(),
            x[part],
            schedule,
            ld.GaussianDecoder(),
            generator=[torch.Generator().manual_seed(i) for i in part],
            t=torch.tensor([0.2, 0.7])[part],
        ).total
        for part in ([0, 1], [1])
    ]
    assert torch.equal(whole[0][1:], whole[1])


# The probability flow ---------------------------------------------------------------------------


class Mixture(nn.Module):
    """The exact denoiser of a mixture of correlated Gaussians: nothing about it is isotropic."""

    def __init__(self):
        super().__init__()
        self.means = torch.tensor([[0.6, -0.3, 0.1], [-0.5, 0.4, 0.0]], dtype=F64)
        root = torch.tensor([[0.4, 0.0, 0.0], [0.3, 0.2, 0.0], [0.1, 0.1, 0.5]], dtype=F64)
        self.covariance = root @ root.T

    def at(self, logsnr):
        alpha, sigma = alpha_sigma(logsnr)
        identity = torch.eye(3, dtype=F64)
        covariance = alpha[:, None, None] ** 2 * self.covariance + (
            sigma[:, None, None] ** 2 * identity
        )
        parts = torch.distributions.MultivariateNormal(
            alpha[:, None, None] * self.means, covariance[:, None]
        )
        weights = torch.distributions.Categorical(torch.tensor([0.3, 0.7], dtype=F64))
        return torch.distributions.MixtureSameFamily(
            torch.distributions.Categorical(weights.probs.expand(len(logsnr), 2)), parts
        )

    def forward(self, z, logsnr):
        with torch.enable_grad():
            z = z if z.requires_grad else z.detach().requires_grad_()
            log_prob = self.at(logsnr).log_prob(z).sum()
            (score,) = torch.autograd.grad(log_prob, z, create_graph=True)
        _, sigma = alpha_sigma(logsnr)
        return ld.Denoised(z, -broadcast_to_data(sigma, z) * score)


@pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("steps", [100, None])
def test_flow_likelihood_of_gaussian_data(c, steps):
    x = gaussian_data(c, n=8, dims=6).reshape(8, 1, 2, 3)
    exact = torch.distributions.Normal(torch.zeros((), dtype=F64), c).log_prob(x)
    found = ld.log_likelihood(ld.GaussianDenoiser(c), x, steps=steps, probes=None)
    assert float((found - exact.flatten(1).mean(1)).abs().max()) < 1e-4


@pytest.mark.parametrize(("steps", "bound"), [(100, 5e-5), (None, 1e-4)])
def test_flow_likelihood_of_a_mixture(steps, bound):
    denoiser, x = Mixture(), gaussian_data(0.6, n=6, dims=3)
    exact = denoiser.at(torch.full((6,), 60.0, dtype=F64)).log_prob(x) / 3
    arguments = {"logsnr_min": -22.0, "steps": steps, "probes": None}
    found = ld.log_likelihood(denoiser, x, **arguments)
    assert float((found - exact).abs().max()) < bound
    few = ld.log_likelihood(denoiser, x[2:3], **arguments)
    assert torch.allclose(few, found[2:3], atol=1e-10)  # whatever the batch
    with torch.inference_mode():
        again = ld.log_likelihood(denoiser, x, **arguments)
    assert torch.equal(again, found)


def test_random_probes_are_unbiased():
    denoiser, x = Mixture(), gaussian_data(0.6, n=1, dims=3)
    exact = float(ld.log_likelihood(denoiser, x, steps=20, probes=None))
    generator = torch.Generator().manual_seed(0)
    draws = ld.log_likelihood(denoiser, x.expand(400, 3), steps=20, generator=generator)
    error = float(draws.std()) / 20
    assert error > 1e-4  # they are random
    assert abs(float(draws.mean()) - exact) < 4 * error
    more = ld.log_likelihood(denoiser, x.expand(400, 3), steps=20, probes=16, generator=generator)
    assert float(more.std()) < 0.4 * float(draws.std())


def discrete_truth(x, levels, c):
    """Log of the mass a Gaussian model has in each bin."""
    low, high = ld.UniformDequantiser(levels)._bins(x)
    normal = torch.distributions.Normal(torch.zeros((), dtype=F64), c)
    return torch.log(normal.cdf(high) - normal.cdf(low)).flatten(1).mean(1)


@pytest.mark.parametrize("cls", [ld.UniformDequantiser, ld.TruncatedNormalDequantiser])
@pytest.mark.parametrize("levels", [8, (-0.9, -0.2, 0.0, 0.3, 0.8)])
def test_importance_weights_close_the_gap(cls, levels):
    values, c = ld.level_values(levels), 0.5
    # Where the process's noise fills a bin, so that it is a fair proposal.
    logsnr_max = 15.0 if cls is ld.UniformDequantiser else 5.5 if levels == 8 else 3.0
    index = torch.randint(len(values), (300, 2), generator=torch.Generator().manual_seed(0))
    x, dequantiser = values[index], cls(levels)
    truth = discrete_truth(x, levels, c)
    gaps = []
    for samples in (1, 4, 64):
        found = ld.log_likelihood(
            ld.GaussianDenoiser(c),
            x,
            logsnr_max=logsnr_max,
            dequantiser=dequantiser,
            steps=12,
            probes=None,
            samples=samples,
            generator=torch.Generator().manual_seed(1),
        )
        gaps.append(float((truth - found).mean()))
    assert gaps[0] > gaps[1] > gaps[2]
    # Without the −log K the last would lie ln(64)/2 = 2.1 nats above the truth.
    assert abs(gaps[2]) < 0.1 * gaps[0] + 0.02


def test_uniform_dequantisation_has_the_right_offset():
    x = ld.level_values(256)[torch.randint(256, (200, 4))]
    found = ld.log_likelihood(
        ld.GaussianDenoiser(0.5), x, dequantiser=ld.UniformDequantiser(256), probes=None, steps=20
    )
    truth = discrete_truth(x, 256, 0.5)
    assert float((found - truth).abs().max()) < 0.02
    assert float((found - truth).mean()) == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize("cls", [ld.UniformDequantiser, ld.TruncatedNormalDequantiser])
def test_dequantisers_stay_in_their_bin_and_know_their_density(cls):
    x = ld.level_values(17)[torch.randint(17, (40_000, 2))]
    logsnr = torch.full((len(x),), 7.0, dtype=F64)
    dequantiser = cls(17)
    z, weight = dequantiser.sample(x, logsnr, torch.Generator().manual_seed(0))
    alpha, _ = alpha_sigma(logsnr)
    low, high = dequantiser._bins(x)
    assert bool(
        (
            (z / broadcast_to_data(alpha, z) >= low) & (z / broadcast_to_data(alpha, z) <= high)
        ).all()
    )
    # E_q[1/q] is the volume of the support.
    volume = (broadcast_to_data(alpha, z) * (high - low)).mean()
    assert float(weight.exp().mean()) == pytest.approx(float(volume), rel=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 4}, "requires a dequantiser"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"probes": 0}, "probes must be at least 1"),
        ({"tolerance": 0.0}, "tolerance must be above 0"),
        ({"logsnr_min": 3.0, "logsnr_max": 2.0}, "must be below"),
        ({"dequantiser": ld.UniformDequantiser(17)}, "do not match levels=17"),
    ],
)
def test_flow_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        ld.log_likelihood(ld.GaussianDenoiser(), torch.full((2, 3), 0.123), **arguments)


def test_a_flow_that_breaks_is_an_error():
    class Breaks(nn.Module):
        def forward(self, z, logsnr):
            return ld.Denoised(
                z, z * broadcast_to_data(torch.where(logsnr < 0, torch.nan, 1.0), z)
            )

    with pytest.raises(ValueError, match="log-likelihood of example 0 is nan"):
        ld.log_likelihood(Breaks(), torch.zeros(2, 3), steps=5)
    with pytest.raises(RuntimeError, match="cannot be integrated at λ ="):
        ld.log_likelihood(Breaks(), torch.zeros(2, 3), steps=None)

"""Facts from the papers, each proved once.

Numbers and formulas: Ho 2020 (arXiv:2006.11239), Kingma 2021 (2107.00630), Kingma & Gao 2023
(2303.00848), Karras 2022 (2206.00364), and those named at each test.
"""

import math

import pytest
import torch

import lit_diffusion as ld
from lit_diffusion.gaussian import alpha_sigma, broadcast_to_data, diffuse, posterior

F64 = torch.float64
LAMBDA = torch.linspace(-15, 15, 601, dtype=F64)


# Schedules -----------------------------------------------------------------------------------


def textbook(name, logsnr):
    """Densities as printed, untruncated."""
    sech = 1 / torch.cosh(logsnr / 2)
    return {
        "CosineSchedule": sech / (2 * math.pi),
        "FlowSchedule": 1 / torch.cosh(logsnr / 4) ** 2 / 8,
        "NormalSchedule": torch.exp(-0.5 * ((logsnr - 2.4) / 2.4) ** 2)
        / (2.4 * (2 * math.pi) ** 0.5),
        "LaplaceSchedule": torch.exp(-2 * logsnr.abs()),
        "LinearSchedule": torch.full_like(logsnr, 1 / 40),
    }[name]


@pytest.mark.parametrize(
    ("name", "outside"),
    [
        ("CosineSchedule", 5.8e-5),
        ("FlowSchedule", 9.1e-5),
        ("NormalSchedule", 1.1e-13),
        ("LaplaceSchedule", 0.0),
        ("LinearSchedule", 0.0),
    ],
)
def test_density_is_the_textbook_one(name, outside):
    schedule = ld.SCHEDULES[name]()
    ratio = schedule.log_prob(LAMBDA).exp() / textbook(name, LAMBDA)
    assert torch.allclose(ratio, torch.full_like(ratio, 1 / (1 - outside)), rtol=2e-6)


@pytest.mark.parametrize("name", ["CosineSchedule", "FlowSchedule", "NormalSchedule"])
def test_float32_times_near_noise_stay_finite_and_exact(name):
    schedule = ld.SCHEDULES[name]()
    t = 1 - torch.logspace(-7, -3, 20)
    assert torch.equal(schedule.logsnr(t), schedule.logsnr(t.double()))
    assert schedule.logsnr(t).isfinite().all()
    assert schedule.at(t)[1].isfinite().all()


def test_normal_quantiles_in_the_far_tail():
    # In the naive form λ(1) is −∞: the tail below −20 holds 5e-21, which 1 − t cannot resolve.
    schedule = ld.NormalSchedule()
    near_end = schedule.logsnr(torch.tensor([1 - 1e-9], dtype=F64))
    tail = 0.5 * math.erfc((2.4 - float(near_end)) / 2.4 / math.sqrt(2))
    assert tail == pytest.approx(1e-9, rel=1e-5)


def test_edm_density_in_edms_own_words():
    # ln σ ~ N(−1.2, 1.2²), and λ = −2 ln σ.
    draws = -0.5 * ld.NormalSchedule().sample(100_000, torch.Generator().manual_seed(0))
    assert float(draws.mean()) == pytest.approx(-1.2, abs=1e-3)
    assert float(draws.std()) == pytest.approx(1.2, abs=1e-3)


def test_logit_normal_is_normal():
    # SD3: t = sigmoid(u), u ~ N(m, s²) on the flow path is λ ~ N(−2m, (2s)²).
    m, s = 0.3, 0.8
    u = m + s * torch.special.ndtri(torch.linspace(0.001, 0.999, 999, dtype=F64))
    logsnr = ld.FlowSchedule().logsnr(torch.sigmoid(u))
    quantile = ld.NormalSchedule(mean=-2 * m, std=2 * s).time(logsnr)
    assert torch.allclose(quantile, torch.linspace(0.001, 0.999, 999, dtype=F64), atol=2e-4)


def test_beta_schedule_is_ddpms_table():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
    table = torch.cumprod(1 - betas, 0)
    schedule = ld.BetaSchedule()
    logsnr = schedule.grid(999).flip(0)
    assert torch.allclose(logsnr, torch.log(table / (1 - table)), atol=1e-9)
    assert float(table[-1]) == pytest.approx(4.04e-5, abs=5e-8)
    assert schedule.logsnr_max == pytest.approx(9.21, abs=0.005)
    assert schedule.logsnr_min == pytest.approx(-10.12, abs=0.005)


def test_karras_schedule_is_edms_grid():
    n, rho, low, high = 18, 7, 0.002, 80.0
    i = torch.arange(n, dtype=F64)
    sigma = (high ** (1 / rho) + i / (n - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
    assert torch.allclose(ld.KarrasSchedule().grid(n - 1), -2 * sigma.log(), atol=1e-12)
    assert ld.KarrasSchedule().logsnr_min == pytest.approx(-8.764, abs=5e-4)
    assert ld.KarrasSchedule().logsnr_max == pytest.approx(12.429, abs=5e-4)


@pytest.mark.parametrize("name", ["CosineSchedule", "FlowSchedule"])
def test_shift_is_more_noise_for_larger_images(name):
    base, shift = ld.SCHEDULES[name](), 2 * math.log(64 / 256)
    shifted = ld.ShiftedSchedule(base, shift=shift)
    inner = LAMBDA[(LAMBDA > -12) & (LAMBDA < 12)]
    expected = base.log_prob(inner - shift)
    assert torch.allclose(shifted.log_prob(inner), expected, atol=1e-3)
    assert float(shifted.logsnr(torch.tensor(0.5))) == pytest.approx(shift, abs=2e-3)
    # SD3's resolution shift in flow time: t' = r t/(1 + (r − 1) t), λ' = λ − 2 ln r.
    if name == "FlowSchedule":
        t, r = torch.tensor([0.3], dtype=F64), 4.0
        moved = r * t / (1 + (r - 1) * t)
        assert float(2 * torch.log((1 - moved) / moved)) == pytest.approx(
            float(2 * torch.log((1 - t) / t)) + shift
        )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ld.CosineSchedule(15.0, -15.0),
            "logsnr_min must be below logsnr_max, got 15.0 and -15.0",
        ),
        (lambda: ld.LinearSchedule(3.0, 3.0), "must be below"),
        (lambda: ld.BetaSchedule(logsnr_min=-15.0), r"covers λ in \[-10.1177, 9.21024\]"),
        (lambda: ld.KarrasSchedule(logsnr_max=20.0), "covers λ"),
        (lambda: ld.CosineSchedule(logsnr_max=math.inf), "finite"),
        (lambda: ld.NormalSchedule(std=0.0), "std must be above 0"),
        (lambda: ld.LaplaceSchedule(scale=-1.0), "scale must be above 0"),
        (lambda: ld.BetaSchedule(beta_min=0.1), "beta_min"),
        (lambda: ld.KarrasSchedule(sigma_min=90.0), "sigma_min"),
        (lambda: ld.CosineSchedule().grid(0), "at least 1 step"),
    ],
)
def test_schedule_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# Objectives: each published loss is (schedule, weighting, prediction) ---------------------------


def row(target_weight, prediction, density):
    """The ε-weight of a published loss: its weight on its own target's error, times p(λ).

    The error of the target is the error of ε divided by eps_error_scale.
    """
    scale = prediction.eps_error_scale(LAMBDA)
    return target_weight / scale * density


def sech(u):
    return 1 / torch.cosh(u)


SNR = LAMBDA.exp()
EDM_SIGMA = torch.exp(-LAMBDA / 2)
EDM_LAMBDA_SD = (EDM_SIGMA**2 + 0.25) / (EDM_SIGMA * 0.5) ** 2  # EDM's weight on the error of x
ONE = torch.ones_like(LAMBDA)
COSINE, FLOW = textbook("CosineSchedule", LAMBDA), textbook("FlowSchedule", LAMBDA)
NORMAL = textbook("NormalSchedule", LAMBDA)
SD3 = torch.exp(-0.5 * (LAMBDA / 2) ** 2)
eps, x, v, o = ld.EpsPrediction(), ld.XPrediction(), ld.VPrediction(), ld.FlowPrediction()
F = ld.EDMPrediction(0.5)

PUBLISHED = {
    # name: (published ε-weight, our weighting, is it monotone)
    "ELBO": (row(ONE, eps, ONE), ld.ELBOWeighting(), True),
    "IDDPM": (row(ONE, eps, COSINE), ld.SechWeighting(), False),
    "EDM, weight on x": (row(EDM_LAMBDA_SD, x, NORMAL), ld.EDMWeighting(), False),
    "EDM, plain F": (row(ONE, F, NORMAL), ld.EDMWeighting(), False),
    "v-cosine": (row(ONE, v, COSINE), ld.ExponentialWeighting(), True),
    "flow matching": (row(ONE, o, FLOW), ld.ExponentialWeighting(), True),
    "InDI": (row(ONE, x, FLOW), ld.InDIWeighting(), True),
    "P2 1": (row(1 / (1 + SNR), eps, COSINE), ld.P2Weighting(1.0), False),
    "P2 .5": (row((1 + SNR) ** -0.5, eps, COSINE), ld.P2Weighting(0.5), False),
    "Min-SNR eps": (row((5 / SNR).clamp(max=1), eps, COSINE), ld.MinSNRWeighting(5.0), False),
    "Min-SNR x": (row(SNR.clamp(max=5), x, COSINE), ld.MinSNRWeighting(5.0), False),
    "Min-SNR v": (row(SNR.clamp(max=5) / (SNR + 1), v, COSINE), ld.MinSNRWeighting(5.0), False),
    "soft-min-SNR": (row(SNR * 4 / (SNR + 4), x, NORMAL), ld.SoftMinSNRWeighting(4.0), False),
    "SiD2": (
        row(math.exp(2) * torch.sigmoid(LAMBDA - 2), x, ONE),
        ld.SigmoidWeighting(2.0),
        True,
    ),
    "DDPM L_simple": (
        row(ONE, eps, ld.NormalSchedule(1.0).log_prob(LAMBDA).exp()),
        ld.DensityWeighting(ld.NormalSchedule(1.0)),
        False,
    ),
    "SD3 rf logit-normal": (
        row(ONE, o, SD3),
        None,
        False,
    ),
}


@pytest.mark.parametrize("name", [n for n in PUBLISHED if PUBLISHED[n][1] is not None])
def test_published_objective(name):
    published, weighting, _ = PUBLISHED[name]
    ratio = published / weighting(LAMBDA)
    assert float((ratio / ratio[300] - 1).abs().max()) < 1e-9


def test_sd3_is_flow_prediction_under_a_normal_density():
    published = PUBLISHED["SD3 rf logit-normal"][0]
    ratio = published / (SD3 * (1 + torch.exp(-LAMBDA / 2)) ** 2)
    assert float((ratio / ratio[300] - 1).abs().max()) < 1e-9


def is_monotone(weight):
    return bool((weight.diff() <= 1e-12 * weight[:-1]).all())


@pytest.mark.parametrize("name", PUBLISHED)
def test_monotone_as_the_table_says(name):
    published, weighting, monotone = PUBLISHED[name]
    assert is_monotone(published) == monotone
    if weighting is not None:
        assert is_monotone(weighting(LAMBDA)) == monotone


def test_edm_peak():
    logsnr = torch.linspace(-4, -2, 200_001, dtype=F64)
    weight = ld.EDMWeighting()(logsnr)
    top = int(weight.argmax())
    assert float(logsnr[top]) == pytest.approx(-3.308, abs=5e-4)
    assert float(weight[top]) == pytest.approx(0.27103, abs=5e-6)
    assert float(ld.EDMWeighting()(torch.tensor([-5.0]))) == pytest.approx(0.213, abs=5e-4)


@pytest.mark.parametrize("name", [n for n in ld.WEIGHTINGS if n != "MonotoneWeighting"])
def test_monotone_weighting_is_the_supremum(name):
    base = ld.WEIGHTINGS[name]()
    logsnr = torch.linspace(-19.9, 19.9, 20_011, dtype=F64)
    weight = ld.MonotoneWeighting(base)(logsnr)
    plain = base(logsnr)
    supremum = plain.flip(0).cummax(0).values.flip(0)
    assert is_monotone(weight) or float((weight.diff() / weight[:-1]).max()) < 1e-7
    assert bool((weight >= plain).all())
    assert torch.allclose(weight, supremum, rtol=1e-5)


def test_monotone_weighting_does_not_overshoot_a_jump():
    class Jumps(ld.Weighting):
        def forward(self, logsnr):
            return torch.where((logsnr > -1.005) & (logsnr < 0.505), 1.0, 0.2).to(logsnr.dtype)

    logsnr = torch.linspace(-5, 5, 20_001, dtype=F64)
    weight = ld.MonotoneWeighting(Jumps())(logsnr)
    assert float(weight.max()) == 1.0  # an eighth of the jump more, if a parabola had its way
    assert bool((weight[logsnr < 0.5] == 1).all())
    assert torch.allclose(weight[logsnr > 0.506], torch.full((), 0.2, dtype=F64))


def test_edm_monotonic_is_flat_below_the_peak():
    logsnr = torch.tensor([-15.0, -3.308, 0.0, 8.0], dtype=F64)
    weight = ld.MonotoneWeighting(ld.EDMWeighting())(logsnr)
    assert torch.allclose(weight[:2], torch.full((2,), 0.27103, dtype=F64), atol=5e-6)
    assert torch.equal(weight[2:], ld.EDMWeighting()(logsnr[2:]))


def test_ddpm_simple_loss_is_the_plain_mean_squared_error():
    schedule = ld.BetaSchedule()
    loss = ld.DiffusionLoss(schedule, ld.DensityWeighting(schedule))
    terms = loss(ld.GaussianDenoiser(), torch.randn(64, 1, 8, 8))
    assert torch.allclose(2 * terms.loss, terms.eps_mse, rtol=1e-5)


# The loss does not depend on the schedule, only its variance does -------------------------------


def gaussian_loss(schedule, weighting, n=4000, c2=0.25, dims=192):
    """One-draw losses for Gaussian data under the exact denoiser, λ iid, at random x."""
    generator = torch.Generator().manual_seed(0)
    x = c2**0.5 * torch.randn(n, dims, generator=generator, dtype=F64)
    noise = torch.randn(n, dims, generator=generator, dtype=F64)
    t = torch.rand(n, generator=generator, dtype=F64)
    loss = ld.DiffusionLoss(schedule, weighting)
    return loss(ld.GaussianDenoiser(c2**0.5), x, t=t, eps=noise).loss


def exact_loss(weighting, low=-20.0, high=20.0, c2=0.25):
    """½∫ w α²c²/(α²c² + σ²) dλ: the best error of ε on Gaussian data."""
    logsnr = torch.linspace(low, high, 400_001, dtype=F64)
    alpha, sigma = alpha_sigma(logsnr)
    error = (alpha**2 * c2) / (alpha**2 * c2 + sigma**2)
    return 0.5 * torch.trapezoid(weighting(logsnr) * error, logsnr)


@pytest.mark.parametrize("schedule", ["LinearSchedule", "CosineSchedule", "FlowSchedule"])
@pytest.mark.parametrize(
    "weighting", [ld.ELBOWeighting(), ld.SigmoidWeighting(2.0), ld.ExponentialWeighting()]
)
def test_loss_is_invariant_to_the_schedule(schedule, weighting):
    exact = float(exact_loss(weighting))
    losses = gaussian_loss(ld.SCHEDULES[schedule](), weighting)
    standard_error = float(losses.std()) / len(losses) ** 0.5
    assert abs(float(losses.mean()) - exact) < 4 * standard_error + 1e-3 * exact


@pytest.mark.parametrize(
    ("weighting", "expected"),
    [
        (ld.ELBOWeighting(), {"LinearSchedule": 1.03, "CosineSchedule": 19.8}),
        (ld.SigmoidWeighting(2.0), {"LinearSchedule": 2.39, "CosineSchedule": 0.84}),
        (ld.ExponentialWeighting(), {"LinearSchedule": 1.76, "FlowSchedule": 0.46}),
    ],
)
def test_variance_of_the_estimator_by_schedule(weighting, expected):
    for name, published in expected.items():
        # The second moment by quadrature in t: heavy tails make a plain sample too noisy.
        n = 400_000
        t = (torch.arange(n, dtype=F64) + 0.5) / n
        logsnr, log_prob = ld.SCHEDULES[name]().at(t)
        alpha, sigma = alpha_sigma(logsnr)
        error = (alpha**2 / 4) / (alpha**2 / 4 + sigma**2)
        h = weighting(logsnr) * error / log_prob.exp()
        second = (h**2 * (1 + 2 / 192)).mean()  # χ² spread of a mean over 192 dimensions
        ratio = float((second / h.mean() ** 2 - 1).sqrt())
        assert ratio == pytest.approx(published, rel=0.06), name


def test_stratified_times_are_less_noisy():
    weighting, schedule = ld.SigmoidWeighting(), ld.LinearSchedule()
    x = torch.randn(64, 32, dtype=F64)
    loss = ld.DiffusionLoss(schedule, weighting)
    denoiser = ld.GaussianDenoiser(std=1.0)
    iid = torch.stack([loss(denoiser, x, t=torch.rand(64)).loss.mean() for _ in range(200)])
    stratified = torch.stack([loss(denoiser, x).loss.mean() for _ in range(200)])
    assert float(stratified.std()) < 0.5 * float(iid.std())


# Predictions and processes --------------------------------------------------------------------


def test_edm_with_unit_data_is_minus_v():
    a, b = ld.EDMPrediction(1.0).coefficients(LAMBDA)
    va, vb = ld.VPrediction().coefficients(LAMBDA)
    assert torch.allclose(a, -va)
    assert torch.allclose(b, -vb)


def test_error_factors():
    for prediction, factor in [
        (ld.EpsPrediction(), ONE),
        (ld.XPrediction(), SNR),
        (ld.VPrediction(), 1 / (1 + 1 / SNR)),
        (ld.FlowPrediction(), (1 + torch.exp(-LAMBDA / 2)) ** -2),
        (ld.EDMPrediction(0.5), 1 / (1 + 4 / SNR)),
        (ld.ScorePrediction(), torch.sigmoid(-LAMBDA)),
    ]:
        assert torch.allclose(prediction.eps_error_scale(LAMBDA), factor, rtol=1e-12)


def test_edm_preconditioning_in_edms_own_words():
    # c_skip, c_out, c_in of table 1, in variance-exploding coordinates z/α.
    sd, s = 0.5, EDM_SIGMA
    root = torch.sqrt(s**2 + sd**2)
    c_skip, c_out, c_in = sd**2 / root**2, s * sd / root, 1 / root
    alpha, _ = alpha_sigma(LAMBDA)
    data, noise, out = torch.randn(3, len(LAMBDA), 2, 3, dtype=F64).unbind()
    z = diffuse(data, noise, LAMBDA)
    z_ve = z / broadcast_to_data(alpha, z)
    assert torch.allclose(z_ve, data + broadcast_to_data(s, z) * noise)
    prediction = ld.EDMPrediction(sd)
    theirs = broadcast_to_data(c_skip, z) * z_ve + broadcast_to_data(c_out, z) * out
    assert torch.allclose(prediction.decode(out, z, LAMBDA).x, theirs, atol=1e-9)
    ours = broadcast_to_data(prediction.input_scale(LAMBDA), z) * z
    assert torch.allclose(ours, broadcast_to_data(c_in, z) * z_ve)


class Coordinates(torch.nn.Module):
    """A denoiser for another process: undo its rescaling of z, then ask ours."""

    def __init__(self, denoiser, scale):
        super().__init__()
        self.denoiser, self.scale = denoiser, scale

    def forward(self, z, logsnr):
        return self.denoiser(z / broadcast_to_data(self.scale(logsnr), z), logsnr)


@pytest.mark.parametrize("process", ["variance exploding", "flow matching"])
def test_other_processes_are_rescalings(process):
    alpha, sigma = alpha_sigma(LAMBDA)
    data, noise = torch.randn(2, len(LAMBDA), 2, 3, dtype=F64).unbind()
    z = diffuse(data, noise, LAMBDA)
    if process == "variance exploding":
        theirs = data + broadcast_to_data(EDM_SIGMA, z) * noise

        def scale(logsnr):
            return 1 / alpha_sigma(logsnr)[0]
    else:
        t = ld.FlowSchedule()._time(LAMBDA)  # λ = 2 log((1 − t)/t), not truncated
        theirs = broadcast_to_data(1 - t, z) * data + broadcast_to_data(t, z) * noise

        def scale(logsnr):
            return 1 / sum(alpha_sigma(logsnr))

    assert torch.allclose(theirs, broadcast_to_data(scale(LAMBDA), z) * z, rtol=1e-9, atol=1e-12)
    exact = ld.GaussianDenoiser(0.7)
    ours, other = exact(z, LAMBDA), Coordinates(exact, scale)(theirs, LAMBDA)
    assert torch.allclose(ours.x, other.x)
    assert torch.allclose(ours.eps, other.eps)  # hence the same loss, whatever w and p
    # And the exact denoiser, derived in their coordinates, is the same function.
    a = broadcast_to_data(scale(LAMBDA) * alpha, z)
    b = broadcast_to_data(scale(LAMBDA) * sigma, z)
    best = a * 0.49 / (a**2 * 0.49 + b**2) * theirs
    assert torch.allclose(best, ours.x, rtol=1e-9, atol=1e-12)


# Posterior and samplers -----------------------------------------------------------------------


def test_posterior_is_ddpms():
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
    abar = torch.cumprod(1 - betas, 0)
    now, before = abar[1:], abar[:-1]
    beta = betas[1:]
    x0, xt = torch.randn(2, 999, 2, 3, dtype=F64).unbind()
    mean = broadcast_to_data(before.sqrt() * beta / (1 - now), x0) * x0
    mean = mean + broadcast_to_data((1 - beta).sqrt() * (1 - before) / (1 - now), xt) * xt
    variance = (1 - before) / (1 - now) * beta
    logit = torch.logit
    ours, std = posterior(xt, x0, logit(now), logit(before))
    assert torch.allclose(ours, mean, atol=1e-10)
    assert torch.allclose(std.flatten() ** 2, variance, rtol=1e-9)


def test_ancestral_is_ddim_with_eta_one():
    z = torch.randn(5, 2, 3, 4, dtype=F64)
    runs = [
        sampler(ld.GaussianDenoiser(0.5), z, torch.Generator().manual_seed(1))
        for sampler in (ld.AncestralSampler(steps=20), ld.DDIMSampler(steps=20, eta=1.0))
    ]
    assert torch.allclose(*runs, atol=1e-9)


def test_ddpm_chain_visits_the_table():
    seen = []

    def spy(z, logsnr):
        seen.append(float(logsnr[0]))
        return ld.GaussianDenoiser()(z, logsnr)

    ld.AncestralSampler(steps=1000, schedule=ld.BetaSchedule())(spy, torch.randn(1, 2))
    table = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64), 0)
    assert torch.allclose(torch.tensor(seen, dtype=F64), torch.logit(table).flip(0), atol=1e-9)


def test_guidance():
    class Labelled(torch.nn.Module):
        def forward(self, z, logsnr, label):
            shift = broadcast_to_data(
                label.clamp(min=0).to(z.dtype), z
            )  # −1, no label, shifts nothing
            return ld.Denoised(z + shift, z - shift)

    z, logsnr = torch.randn(4, 2, 3), torch.tensor([-3.0, -1.0, 1.0, 3.0])
    label = torch.tensor([1, 2, 3, 4])
    plain = Labelled()(z, logsnr, label=label)
    for scale in (0.0, 1.0, 3.0):
        guided = ld.GuidedDenoiser(Labelled(), scale)(z, logsnr, label=label)
        assert torch.allclose(guided.x - z, scale * (plain.x - z), atol=1e-6)
        assert torch.allclose(guided.eps - z, scale * (plain.eps - z), atol=1e-6)
    limited = ld.GuidedDenoiser(Labelled(), 3.0, interval=(-2.0, 2.0))(z, logsnr, label=label)
    factor = ((limited.x - z) / (plain.x - z))[:, 0, 0]
    assert torch.allclose(factor, torch.tensor([1.0, 3.0, 3.0, 1.0]), atol=1e-4)
    with pytest.raises(ValueError, match="low < high"):
        ld.GuidedDenoiser(Labelled(), 3.0, interval=(2.0, -2.0))


def test_clipped_denoiser_stays_consistent():
    exact = ld.GaussianDenoiser(std=3.0)
    z, logsnr = torch.randn(6, 4, 5, dtype=F64), torch.linspace(-5, 5, 6, dtype=F64)
    clipped = ld.ClippedDenoiser(exact)(z, logsnr)
    alpha, sigma = alpha_sigma(logsnr)
    assert float(clipped.x.abs().max()) <= 1
    assert torch.allclose(
        broadcast_to_data(alpha, z) * clipped.x + broadcast_to_data(sigma, z) * clipped.eps, z
    )
    untouched = exact(z, logsnr).x.abs() <= 1
    assert torch.equal(clipped.eps[untouched], exact(z, logsnr).eps[untouched])


# Precision and shapes -------------------------------------------------------------------------


def test_mixing_is_never_in_bfloat16():
    logsnr = ld.CosineSchedule().grid(999)
    data = torch.ones(1000, 1, dtype=torch.bfloat16)
    z = diffuse(data, torch.zeros_like(data), logsnr)
    assert z.dtype == torch.float32
    assert len(z[1:-1].unique()) > 900  # bfloat16 keeps 190 of 1000 levels
    with torch.autocast("cpu", torch.bfloat16):
        terms = ld.DiffusionLoss()(ld.GaussianDenoiser(), torch.randn(8, 4))
    assert terms.loss.dtype == torch.float32


def test_one_coefficient_per_example():
    for bad in (torch.ones(3), torch.ones(4, 1)):
        with pytest.raises(ValueError, match="one coefficient per example"):
            broadcast_to_data(bad, torch.zeros(4, 3, 3, 3))
    with pytest.raises(ValueError, match="floating-point"):
        ld.DiffusionLoss()(ld.GaussianDenoiser(), torch.zeros(4, 3, dtype=torch.uint8))


def test_learned_parameters_get_gradients_through_the_schedule():
    class Learns(ld.NoiseSchedule):
        def __init__(self):
            super().__init__(-5.0, 5.0, support=(-5.0, 5.0))
            self.bend = torch.nn.Parameter(torch.tensor(0.3, dtype=F64))

        def _logsnr(self, t):
            return 5 - 10 * (t + self.bend * t * (1 - t))

    schedule = Learns()
    t = torch.rand(8, dtype=F64)
    logsnr, log_prob = schedule.at(t)
    (grad,) = torch.autograd.grad(log_prob.sum(), schedule.bend, retain_graph=True)
    # log p = −log(10 (1 + bend (1 − 2t)))
    expected = -((1 - 2 * t) / (1 + 0.3 * (1 - 2 * t))).sum()
    assert torch.allclose(grad, expected.detach())
    (grad,) = torch.autograd.grad(logsnr.sum(), schedule.bend)
    assert torch.allclose(grad, (-10 * t * (1 - t)).sum())
    with torch.no_grad():
        assert not schedule.at(t)[1].requires_grad

"""
The bound and its two forms
===========================

The likelihood of a chain of T steps has a variational bound with one term for each step. The terms
can be written in two ways, which have the same mean but very different variances. In addition, the
last step, from the cleanest latent to the grey level, has its own cost. The data are Gaussian
here, so the optimal denoiser is known and the figures show the bound alone.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import softplus

from lit_diffusion import (
    CosineSchedule,
    GaussianDenoiser,
    LinearSchedule,
    SoftmaxDecoder,
    alpha_sigma,
    broadcast_to_data,
    level_values,
    noise_like,
    posterior,
    sample_times,
    variational_bound,
)

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.55"
torch.manual_seed(0)

STD = 0.5
denoiser = GaussianDenoiser(STD)
x = STD * torch.randn(20_000, 16)
schedules = {
    "LinearSchedule": (LinearSchedule(-5.0, 13.3), BLUE, "o"),
    "CosineSchedule": (CosineSchedule(-5.0, 13.3), ORANGE, "s"),
}


def nats_to_bits(value):
    return value / math.log(2)


# %%
# More steps, tighter bound
# -------------------------
#
# For data N(0, c²) the minimal error of ε̂ is sigmoid(λ + 2 ln c), so the diffusion term is
# known: a sum for each T, with the width expm1(λ_s − λ_t) of each step, and in the limit
# ½ (softplus(λ_max + 2 ln c) − softplus(λ_min + 2 ln c)), whatever the schedule. The lines show
# the sum, the dots averages of 20,000 single samples of ``variational_bound(num_timesteps=T)``.
# The sum exceeds the integral at every T, by an amount that depends on the schedule and for many
# steps decreases as 1/T.


def best_error(logsnr):
    return torch.sigmoid(logsnr + 2 * math.log(STD))


def sum_over_steps(schedule, steps):
    levels = schedule.grid(steps)
    width = torch.expm1(levels.diff())
    return nats_to_bits(float(0.5 * (width * best_error(levels[:-1])).sum()))


low, high = (torch.tensor(end + 2 * math.log(STD)) for end in (-5.0, 13.3))
limit = nats_to_bits(float(softplus(high) - softplus(low)) / 2)

lines = [round(2 ** (k / 2)) for k in range(4, 25)]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for name, (schedule, colour, marker) in schedules.items():
    sums = [sum_over_steps(schedule, steps) for steps in lines]
    axes[0].plot(lines, sums, color=colour, linewidth=1.6, label=name)
    axes[1].plot(lines, [value - limit for value in sums], color=colour, linewidth=1.6)
    for steps in (32, 128, 512, 2048):
        terms = variational_bound(denoiser, x, schedule, num_timesteps=steps)
        mean = nats_to_bits(float(terms.diffusion.mean()))
        axes[0].plot(steps, mean, marker, color=colour, markersize=5)
axes[0].axhline(limit, color=GREY, linestyle="--", linewidth=1.2, label=f"T → ∞: {limit:.3f}")
axes[0].set(
    xscale="log", xlim=(4, 4096), ylim=(7, 30), ylabel="diffusion term, bits per dimension"
)
axes[0].legend(frameon=False, fontsize=9)
guide = torch.tensor([64.0, 4096.0])
axes[1].plot(guide, 40 / guide, color=GREY, linestyle=":", linewidth=1.5)
axes[1].text(300, 0.06, "slope 1/T", color="0.35", fontsize=9, ha="right")
axes[1].set(xscale="log", yscale="log", xlim=(4, 4096), ylim=(5e-3, 1e3))
axes[1].set(ylabel="above the limit, bits per dimension")
for axis in axes:
    axis.set_xlabel("steps T of the chain")
    axis.spines[["top", "right"]].set_visible(False)

# %%
# Two forms
# ---------
#
# In the denoising form (:func:`~lit_diffusion.likelihood.variational_bound`) each term compares
# the model's step with the true posterior of that step, two Gaussians of the same variance. In the
# consistency form, below, one term for each level i compares q(z_i | z_{i−1}), the step from the
# cleaner neighbour, with the model's p(z_i | z_{i+1}), the step from the noisier one. (z_{i−1},
# z_{i+1}) are sampled jointly from q, and z_i is integrated out in closed form. These two steps
# are *different* Gaussians whatever the model does, so the terms do not vanish for a perfect model
# but must cancel [#]_.
#
# (Written as KL(q(z_i | z_{i−1}) ‖ p(z_i | z_{i+1})), as one often sees it, the term would sample
# z_i independently of z_{i+1} and would not be the bound.)
#
# .. [#] Luo (2022), Understanding Diffusion Models: A Unified Perspective, arXiv:2208.11970,
#    Eq. 37-45; Sohl-Dickstein et al. (2015), arXiv:1503.03585.


def transition(cleaner, noisier):
    """Scale and standard deviation of q(z_t | z_s): α_t/α_s and √(1 − α_t²/α_s²)."""
    log_ratio = softplus(-cleaner) - softplus(-noisier)
    return torch.exp(log_ratio / 2), torch.sqrt(-torch.expm1(log_ratio))


def noised(x, alpha, sigma, generator):
    """Sample N(α x, σ² I)."""
    eps = noise_like(x, generator)
    return broadcast_to_data(alpha, x) * x + broadcast_to_data(sigma, x) * eps


def consistency_bound(denoiser, x, schedule, num_timesteps, generator=None):
    """Prior and diffusion term in the consistency form, in nats per dimension: one level each."""
    t = sample_times(x, generator)
    i = (t * num_timesteps).floor().clamp(max=num_timesteps - 1)
    level, noisier = schedule.logsnr(i / num_timesteps), schedule.logsnr((i + 1) / num_timesteps)
    cleaner = schedule.logsnr((i - 1).clamp(min=0) / num_timesteps)
    cleaner = torch.where(i == 0, math.inf, cleaner)  # the neighbour of z_0 is x itself

    before = noised(x, *alpha_sigma(cleaner), generator)
    after = noised(before, *transition(cleaner, noisier), generator)

    # q(z_i | z_{i−1}, z_{i+1}) = N(mean, variance)
    alpha, sigma = transition(cleaner, level)  # of q(z_i | z_{i−1})
    alpha_on, sigma_on = transition(level, noisier)
    variance = 1 / (1 / sigma**2 + alpha_on**2 / sigma_on**2)
    forward = broadcast_to_data(alpha, x) * before
    mean = broadcast_to_data(variance / sigma**2, x) * forward
    mean = mean + broadcast_to_data(variance * alpha_on / sigma_on**2, x) * after

    backward, _ = posterior(after, denoiser(after, noisier).x, noisier, level)
    std = alpha_sigma(level)[1] * torch.sqrt(-torch.expm1(noisier - level))  # of p(z_i | z_{i+1})

    def second_moment(other):
        return (mean - other).square().flatten(1).mean(1) + variance

    term = torch.log(std / sigma)
    term = term + second_moment(backward) / (2 * std**2) - second_moment(forward) / (2 * sigma**2)

    # The prior: KL(q(z_T | z_{T−1}) ‖ N(0, I))
    last, noisiest = (schedule.logsnr(torch.full_like(i, 1 - k / num_timesteps)) for k in (1, 0))
    square = noised(x, *alpha_sigma(last), generator).square().flatten(1).mean(1)
    alpha, sigma = transition(last, noisiest)
    prior = 0.5 * (alpha**2 * square + sigma**2 - 1) - torch.log(sigma)
    return prior + num_timesteps * term


def denoising_bound(denoiser, x, schedule, num_timesteps, generator=None):
    """The same two terms in the denoising form."""
    terms = variational_bound(
        denoiser, x, schedule, num_timesteps=num_timesteps, generator=generator
    )
    return terms.total


# %%
# Left: the means over 20,000 samples, with two standard errors, agree. Right: the standard
# deviation of a single sample tends to a constant in the denoising form and grows without bound in
# the consistency form. The dotted line is the contribution of a single term. At the cleanest
# latent the forward step starts from the data and is wide, while the model's is one of T steps and
# narrow; the logarithm of the ratio of their widths, about ½ ln(T/18.3) nats for a range of λ of
# 18.3, is sampled once in T times and counted T times. This term alone gives a standard deviation
# that grows as √T, and the other terms add to it. Therefore this form is not used for training.

schedule = schedules["LinearSchedule"][0]
forms = {
    "denoising": (denoising_bound, BLUE, "o"),
    "consistency": (consistency_bound, ORANGE, "s"),
}
counts = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for offset, (name, (form, colour, marker)) in zip((0.96, 1.04), forms.items(), strict=True):
    totals = [nats_to_bits(form(denoiser, x, schedule, steps)) for steps in counts]
    means = [float(total.mean()) for total in totals]
    stds = [float(total.std()) for total in totals]
    style = {"color": colour, "marker": marker, "markersize": 5}
    two = [2 * std / len(x) ** 0.5 for std in stds]
    places = [offset * steps for steps in counts]
    axes[0].errorbar(places, means, two, linestyle="", capsize=2, label=name, **style)
    axes[1].plot(counts, stds, linewidth=1.6, label=f"{name} form", **style)
prior = nats_to_bits(float(variational_bound(denoiser, x, schedule, num_timesteps=1).prior.mean()))
exact = [sum_over_steps(schedule, steps) + prior for steps in lines]
axes[0].plot(lines, exact, color=GREY, linewidth=1.2, zorder=0, label="exact")
several = torch.logspace(2, 3.61, 50)
alone = nats_to_bits(several.sqrt() * torch.log(several / 18.3) / 2)
axes[1].plot(
    several, alone, color=GREY, linestyle=":", linewidth=1.8, label="its term at λ_max alone"
)
axes[0].set(xlim=(25, 6000), ylim=(4, 14), ylabel="mean of the samples, bits per dimension")
axes[1].set(yscale="log", ylabel="standard deviation of one sample")
for axis in axes:
    axis.set(xscale="log", xlabel="steps T of the chain")
    axis.legend(frameon=False, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)

# %%
# The cost of the last step
# -------------------------
#
# Given z at λ_max the decoder must still identify the grey level. The lines are averages of its
# ``reconstruction`` over all levels with equal weight; the marked numbers are its ``cost``. The
# cost vanishes once the noise is narrower than half the distance between two levels: bytes
# need a λ_max of about 13.3, seventeen grey levels only 8. A model that stops at 10 pays 1.8
# bits per byte for it.

levels = torch.linspace(0, 15, 61)
figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
for count, colour in ((256, BLUE), (17, GREEN)):
    decoder = SoftmaxDecoder(count)
    grey = level_values(count).float().repeat(51_200 // count // 16, 16)
    costs = [
        decoder.reconstruction(denoiser, grey, level.expand(len(grey)), torch.randn_like(grey))
        for level in levels
    ]
    costs = [nats_to_bits(float(cost.mean())) for cost in costs]
    axis.plot(levels, costs, color=colour, linewidth=1.8, label=f"SoftmaxDecoder({count})")
for level in (10.0, 13.3):
    cost = SoftmaxDecoder(256).cost(level)
    axis.axvline(level, color=GREY, linewidth=0.8, linestyle=":")
    axis.plot(level, cost, "o", color=BLUE, markersize=6)
    axis.annotate(f"λ = {level:g}\n{cost:.2f} bits", (level, cost), (level + 0.15, cost + 0.45))
axis.set(xlim=(0, 15), ylim=(0, 8.2), xlabel="cleanest level λ_max")
axis.set_ylabel("reconstruction, bits per dimension")
axis.legend(frameon=False)
axis.spines[["top", "right"]].set_visible(False)
plt.show()

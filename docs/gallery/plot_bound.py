"""
The bound and its two forms
===========================

A chain of T steps has a bound on its likelihood, with one term for each step. The terms can be
written in two ways, which have the same mean and very different scatter. And the last step, from
the cleanest latent to the grey level itself, has a price of its own. Data are Gaussian here, so
the perfect denoiser is known and the picture shows the bound alone.
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
    consistency_bound,
    level_values,
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
# For data N(0, c²) the best possible error of the noise is sigmoid(λ + 2 ln c), so the diffusion
# term is known: a sum for each T, with the width expm1(λ_s − λ_t) of each step, and in the limit
# ½ (softplus(λ_max + 2 ln c) − softplus(λ_min + 2 ln c)), whatever the schedule. Lines are the
# sum, dots are averages of 20,000 single draws of ``variational_bound(steps=T)``. The sum
# overestimates the integral at every T; how much depends on where the schedule puts the steps,
# and for many steps it falls like 1/T.


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
        terms = variational_bound(denoiser, x, schedule, steps=steps)
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
# the model's step with the true posterior of that step. In the consistency form
# (:func:`~lit_diffusion.likelihood.consistency_bound`) the forward step and the model's step are
# to agree on the latent between them. Left: the means over 20,000 draws, with two standard
# errors, are the same. Right: a single draw of the denoising form tends to a constant scatter,
# one of the consistency form scatters ever more. Dotted is what a single term of it does. At the
# cleanest latent the forward step comes from the data and is wide, the model's is one step of T
# and narrow; the logarithm of their widths, about ½ ln(T/18.3) nats with λ over 18.3, is met by
# one draw in T and counted T times. That makes √T times as much of scatter; the other terms add
# some more.

schedule = schedules["LinearSchedule"][0]
forms = {
    "denoising": (variational_bound, BLUE, "o"),
    "consistency": (consistency_bound, ORANGE, "s"),
}
counts = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
for offset, (name, (form, colour, marker)) in zip((0.96, 1.04), forms.items(), strict=True):
    totals = [nats_to_bits(form(denoiser, x, schedule, steps=steps).total) for steps in counts]
    means = [float(total.mean()) for total in totals]
    stds = [float(total.std()) for total in totals]
    style = {"color": colour, "marker": marker, "markersize": 5}
    two = [2 * std / len(x) ** 0.5 for std in stds]
    places = [offset * steps for steps in counts]
    axes[0].errorbar(places, means, two, linestyle="", capsize=2, label=name, **style)
    axes[1].plot(counts, stds, linewidth=1.6, label=f"{name} form", **style)
prior = nats_to_bits(float(variational_bound(denoiser, x, schedule, steps=1).prior.mean()))
exact = [sum_over_steps(schedule, steps) + prior for steps in lines]
axes[0].plot(lines, exact, color=GREY, linewidth=1.2, zorder=0, label="exact")
several = torch.logspace(2, 3.61, 50)
alone = nats_to_bits(several.sqrt() * torch.log(several / 18.3) / 2)
axes[1].plot(
    several, alone, color=GREY, linestyle=":", linewidth=1.8, label="its term at λ_max alone"
)
axes[0].set(xlim=(25, 6000), ylim=(4, 14), ylabel="mean of the draws, bits per dimension")
axes[1].set(yscale="log", ylabel="standard deviation of one draw")
for axis in axes:
    axis.set(xscale="log", xlabel="steps T of the chain")
    axis.legend(frameon=False, fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)

# %%
# What the last step costs
# ------------------------
#
# Given z at λ_max the decoder must still name the grey level. The lines are averages of its
# ``reconstruction`` over all levels alike; the marked numbers are its own ``cost``. Once the
# noise is narrower than half the distance of two levels, there is nothing left to name: the bytes
# need a λ_max of about 13.3, seventeen grey levels only 8. A model that stops at 10 pays 1.8 bits
# for each byte without knowing more about the image.

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

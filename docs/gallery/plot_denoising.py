"""
From noise to data
==================

Two samplers on one-dimensional data for which the optimal denoiser has a closed form, a
mixture of three Gaussians. The figures then show the samplers alone, without the errors of a
network.
"""

import math

import matplotlib.pyplot as plt
import torch
from torch import nn

from lit_diffusion import (
    AncestralSampler,
    DDIMSampler,
    Denoised,
    LinearSchedule,
    alpha_sigma,
    broadcast_to_data,
)

BLUE, ORANGE = "#0072B2", "#D55E00"
torch.manual_seed(1)

# %%
# The exact denoiser of a mixture
# -------------------------------
#
# With noise each Gaussian remains a Gaussian, with mean αm and variance α²s² + σ². Bayes' rule
# gives the probability of each component given z, and x̂ is the average of their posterior means.
# Any callable from (z, λ) to (x̂, ε̂) is a denoiser; this one also records its inputs and outputs.


class MixtureDenoiser(nn.Module):
    """The optimal denoiser of data from a mixture of Gaussians in one dimension."""

    share = torch.tensor([0.25, 0.45, 0.30])
    mean = torch.tensor([-1.0, 0.1, 0.8])
    std = torch.tensor([0.08, 0.16, 0.05])

    def __init__(self):
        super().__init__()
        self.record = []

    def log_density(self, z, logsnr):
        """log of share · N(z; αm, α²s² + σ²) for each component, along the last axis."""
        alpha, sigma = (broadcast_to_data(c, z).unsqueeze(-1) for c in alpha_sigma(logsnr))
        variance = (alpha * self.std) ** 2 + sigma**2
        distance = z.unsqueeze(-1) - alpha * self.mean
        log_normal = -0.5 * (distance**2 / variance + torch.log(2 * math.pi * variance))
        return torch.log(self.share) + log_normal, distance, variance

    def forward(self, z, logsnr):
        log_each, distance, variance = self.log_density(z, logsnr)
        alpha, sigma = (broadcast_to_data(c, z) for c in alpha_sigma(logsnr))
        each = self.mean + alpha.unsqueeze(-1) * self.std**2 / variance * distance
        x = (log_each.softmax(-1) * each).sum(-1)
        self.record.append((logsnr[0], z[:, 0], x[:, 0]))
        return Denoised(x=x, eps=(z - alpha * x) / sigma)


# %%
# Two samplers
# ------------
#
# Both start from the same noise and use the same 100 levels. DDIM is deterministic and its paths
# are smooth; ancestral sampling adds fresh noise at each step, so its paths fluctuate. Grey is the
# density of the noisy data at each level, which the samples of both should have. On the right are
# 20,000 final samples and the true density.

schedule = LinearSchedule(-8.0, 10.0)
samplers = {
    "DDIMSampler": DDIMSampler(steps=100, schedule=schedule),
    "AncestralSampler": AncestralSampler(steps=100, schedule=schedule),
}
noise = torch.randn(20_000, 1)
shown = noise[:, 0].argsort()[torch.linspace(300, 19_700, 9).long()]  # evenly spread

trajectories, samples = {}, {}
for name, sampler in samplers.items():
    denoiser = MixtureDenoiser()
    samples[name] = sampler(denoiser, noise)[:, 0]
    trajectories[name] = [torch.stack(column) for column in zip(*denoiser.record, strict=True)]

z_axis = torch.linspace(-2.6, 2.6, 500)
levels = torch.linspace(-8, 10, 300)
log_each = [denoiser.log_density(z_axis[:, None], level.expand(500))[0] for level in levels]
backdrop = torch.stack([each[:, 0].logsumexp(-1).exp() for each in log_each], 1)
truth = (
    denoiser.log_density(z_axis[:, None], torch.full((500,), 40.0))[0][:, 0].logsumexp(-1).exp()
)


def compare(index, label):
    """Paths of z (index 1) or x̂ (index 2) for each sampler, and where they end."""
    _, axes = plt.subplots(
        2, 2, figsize=(9, 6), width_ratios=(4, 1), sharey=True, sharex="col", layout="constrained"
    )
    for (paths, end), (name, path) in zip(axes, trajectories.items(), strict=True):
        if index == 1:
            shade = {"cmap": "Greys", "vmax": 1.6, "shading": "auto", "rasterized": True}
            paths.pcolormesh(levels, z_axis, backdrop.clamp(max=1.2), **shade)
        colours = plt.colormaps["viridis"](torch.linspace(0, 0.9, len(shown)).numpy())
        for colour, i in zip(colours, shown, strict=True):
            paths.plot(path[0], path[index][:, i], color=colour, linewidth=1.1)
        paths.set(ylabel=label, ylim=(-2.4, 2.4), xlim=(-8, 10), title=name)
        bins = {"bins": 160, "range": (-2.4, 2.4), "density": True, "orientation": "horizontal"}
        end.hist(samples[name], color=BLUE, alpha=0.55, label="samples", **bins)
        end.plot(truth, z_axis, color=ORANGE, linewidth=1.3, label="truth")
        end.spines[["top", "right"]].set_visible(False)
        end.set_xlim(0, 2.7)
    axes[0, 1].legend(frameon=False, fontsize=8, loc="lower right")
    axes[1, 0].set_xlabel("log signal-to-noise ratio λ, from noise to clean data")
    axes[1, 1].set_xlabel("density")


compare(1, "noisy data z")

# %%
# When the sample is determined
# -----------------------------
#
# The denoiser's estimate x̂ along the same paths. In strong noise it is the mean of all data;
# between λ = −3 and λ = 4 it converges to one component. From there on, an error of the denoiser
# can move a sample within its component, but hardly to another.

compare(2, "estimate x̂")
plt.show()

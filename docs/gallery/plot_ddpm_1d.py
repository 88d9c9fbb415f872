"""
The regression target of DDPM, in one dimension
===============================================

DDPM samples by predicting, at each level, the mean of the next, cleaner one. What should it be
trained on? A forward chain gives pairs of neighbours, and one could regress the cleaner one on the
noisier one. Alternatively, since the clean data are known in training, one can regress on the mean
of the cleaner neighbour *given* them. Both targets have the same conditional mean; this page
compares their variances, and the effect on a network.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

from lit_diffusion import (
    AncestralSampler,
    BetaSchedule,
    Denoised,
    Denoiser,
    DiffusionLoss,
    PosteriorMeanWeighting,
    VPrediction,
    alpha_sigma,
    broadcast_to_data,
    diffuse,
    posterior,
)

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.6"
torch.manual_seed(0)

# %%
# Forward
# -------
#
# The data are numbers in two narrow clusters. DDPM's range is divided into 100 steps instead of
# 999, so that single steps are visible. A step from level s to the noisier t scales by α_t/α_s and
# adds the variance 1 − α_t²/α_s², DDPM's β.

T = 100
schedule = BetaSchedule()
levels = schedule.grid(T)  # from noise to data
share, mean, std = torch.tensor([0.35, 0.65]), torch.tensor([-0.7, 0.6]), 0.06


def sample_data(n):
    cluster = (torch.rand(n, 1) < share[1]).long()
    return mean[cluster] + std * torch.randn(n, 1), cluster[:, 0]


def forward_step(z, logsnr, logsnr_next):
    """z_t from z_s, to the next noisier level."""
    ratio = alpha_sigma(logsnr_next)[0] / alpha_sigma(logsnr)[0]
    return broadcast_to_data(ratio, z) * z + broadcast_to_data(
        (1 - ratio**2).sqrt(), z
    ) * torch.randn_like(z)


x, cluster = sample_data(24)
z = diffuse(x, torch.randn_like(x), levels[-1].expand(len(x)))
chain = [z]
for cleaner, noisier in zip(levels[1:].flip(0), levels[:-1].flip(0), strict=True):
    z = forward_step(z, cleaner, noisier)
    chain.append(z)
chain = torch.cat(chain, 1).flip(1)

figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
for path, which in zip(chain, cluster, strict=True):
    axis.plot(levels, path, color=(BLUE, ORANGE)[which], linewidth=0.8, alpha=0.8)
axis.set(xlim=(levels[0], levels[-1]), ylim=(-3, 3), ylabel="noisy data z")
axis.set(xlabel="log signal-to-noise ratio λ, from noise to clean data; the chain runs leftwards")
axis.spines[["top", "right"]].set_visible(False)

# %%
# Two targets
# -----------
#
# Many samples of one step in the middle of the chain. Left: z_s is sampled given x, then z_t given
# z_s, and the target is the step back, z_s − z_t. Right: z_s is replaced by its mean given z_t and
# x, DDPM's μ̃ (:func:`~lit_diffusion.gaussian.posterior`). The line, the same in both panels, is
# the exact conditional mean, and the dots are the means of the samples in each column. The means
# agree, by the law of total expectation. The variances do not: on the left it includes the noise
# of the whole step, on the right only the uncertainty about x given z_t, with one line per
# cluster.


class MixtureDenoiser(nn.Module):
    """The optimal denoiser: the posterior mean over the clusters, by Bayes' rule."""

    def forward(self, z, logsnr):
        alpha, sigma = (broadcast_to_data(c, z) for c in alpha_sigma(logsnr))
        variance = (alpha * std) ** 2 + sigma**2
        distance = z - alpha * mean  # (B, 1) − (B, 2): one column per cluster
        likely = (torch.log(share) - distance**2 / (2 * variance)).softmax(-1)
        each = mean + alpha * std**2 / variance * distance
        x = (likely * each).sum(-1, keepdim=True)
        return Denoised(x=x, eps=(z - alpha * x) / sigma)


def field(denoiser, z, logsnr, logsnr_next):
    """The expected step, E[z_s − z_t | z_t], of a denoiser."""
    return posterior(z, denoiser(z, logsnr).x, logsnr, logsnr_next)[0] - z


exact = MixtureDenoiser()
n, where = 200_000, int((levels - 0.5).abs().argmin())
logsnr, logsnr_next = (levels[i].expand(n) for i in (where, where + 1))
x, _ = sample_data(n)
z_next = diffuse(x, torch.randn_like(x), logsnr_next)
z = forward_step(z_next, logsnr_next, logsnr)
targets = {
    "roll-out: z_s − z_t": z_next - z,
    "posterior mean: μ̃(z_t, x) − z_t": posterior(z, x, logsnr, logsnr_next)[0] - z,
}

axis_z = torch.linspace(-2.4, 2.4, 241)[:, None]
line = field(exact, axis_z, logsnr[:241], logsnr_next[:241])
edges = torch.linspace(-2.2, 2.2, 23)
column = torch.bucketize(z[:, 0], edges)
figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
for axis, (name, target) in zip(axes, targets.items(), strict=True):
    axis.hist2d(
        z[:, 0].numpy(),
        target[:, 0].numpy(),
        bins=(160, 160),
        range=((-2.4, 2.4), (-0.8, 0.8)),
        norm="log",
        cmap="Greys",
    )
    axis.plot(axis_z, line, color=ORANGE, linewidth=1.8, label="exact conditional mean")
    means = [float(target[column == i].mean()) for i in range(1, len(edges))]
    dots = {"color": BLUE, "markersize": 4, "linestyle": "", "marker": "o"}
    axis.plot((edges[1:] + edges[:-1]) / 2, means, label="mean of the samples", **dots)
    rest = target - field(exact, z, logsnr, logsnr_next)
    axis.set_title(f"{name}\nstd around the mean: {float(rest.std()):.3f}", fontsize=10)
    axis.set(xlabel=f"z_t at λ = {float(levels[where]):.2f}", ylim=(-0.8, 0.8))
axes[0].set_ylabel("target of the regression")
axes[1].legend(frameon=False, fontsize=8, loc="upper right")

# %%
# Training on each target
# -----------------------
#
# The same small network is trained twice from the same initial weights for 2,000 steps; only the
# target differs. The second target does not need its own loss: the squared error of the mean is
# the weighting ``PosteriorMeanWeighting`` on a chain of T steps, so ``DiffusionLoss`` is half the
# sum of ‖μ̃ − μ‖² over the steps. The other loss is written out, in the same units. It is larger by
# a constant, the variance above, which no network can reduce; its expected gradient is the same.
# The error is the distance of the learned field from the exact one, over all steps equally. In
# strong noise both networks are within a few hundredths of it, and which is closer is chance; what
# matters is the region where the clusters separate.


class Network(nn.Module):
    def __init__(self, features=96):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(2, features),
            nn.SiLU(),
            nn.Linear(features, features),
            nn.SiLU(),
            nn.Linear(features, 1),
        )

    def forward(self, z, logsnr):
        return self.layers(torch.cat([z, logsnr.to(z)[:, None] / 5], 1))


mean_regression = DiffusionLoss(
    schedule, PosteriorMeanWeighting(schedule, num_timesteps=T), num_timesteps=T
)


def posterior_mean_loss(denoiser, x):
    return mean_regression(denoiser, x).loss.mean()


def roll_out_loss(denoiser, x):
    step = torch.arange(len(x)) * T // len(x)  # every step equally often
    logsnr, logsnr_next = levels[step], levels[step + 1]
    z_next = diffuse(x, torch.randn_like(x), logsnr_next)
    z = forward_step(z_next, logsnr_next, logsnr)
    mean = posterior(z, denoiser(z, logsnr).x, logsnr, logsnr_next)[0]
    return T / 2 * (z_next - mean).square().mean()


x, _ = sample_data(200 * T)
test = levels[:-1].repeat_interleave(200), levels[1:].repeat_interleave(200)
test_z = diffuse(x, torch.randn_like(x), test[0])
truth = field(exact, test_z, *test)


@torch.no_grad()
def errors(denoiser):
    """Root mean squared error of the field at each level."""
    wrong = field(denoiser, test_z, *test) - truth
    return wrong.square().view(T, 200).mean(1).sqrt()


learned, history = {}, {}
for name, loss in {"roll-out": roll_out_loss, "posterior mean": posterior_mean_loss}.items():
    torch.manual_seed(1)
    learned[name] = Denoiser(Network(), VPrediction())
    optimizer = torch.optim.Adam(learned[name].parameters(), lr=3e-3)
    decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 1 - i / 2000)
    history[name] = []
    for step in range(2000):
        if step % 100 == 0:
            history[name].append((step, float(errors(learned[name]).square().mean().sqrt())))
        optimizer.zero_grad()
        loss(learned[name], sample_data(256)[0]).backward()
        optimizer.step()
        decay.step()
    history[name].append((2000, float(errors(learned[name]).square().mean().sqrt())))

figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
for (name, denoiser), colour in zip(learned.items(), (ORANGE, BLUE), strict=True):
    axes[0].plot(*zip(*history[name], strict=True), color=colour, linewidth=1.6, label=name)
    axes[1].plot(levels[:-1], errors(denoiser), color=colour, linewidth=1.6)
axes[1].plot(
    levels[:-1],
    truth.square().view(T, 200).mean(1).sqrt(),
    color=GREY,
    linewidth=1,
    linestyle="--",
)
axes[0].set(xlabel="training step", yscale="log", ylabel="error of the learned field")
axes[1].set(xlabel="λ, after training (dashed: size of the field itself)")
axes[0].legend(frameon=False, title="target", fontsize=9)
for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)

# %%
# The field and the samples
# -------------------------
#
# Colour shows the expected step: red is up, blue is down. The sampler
# (:class:`~lit_diffusion.AncestralSampler`) integrates it from noise, on the left, to data,
# on the right, and adds the posterior noise at each step. All three start from the
# same noise and add the same noise. The network trained on roll-outs has not learned the border
# between the clusters and leaves samples there.


class Recorder:
    """Calls a denoiser and records its inputs."""

    def __init__(self, denoiser):
        self.denoiser, self.path = denoiser, []

    def __call__(self, z, logsnr):
        self.path.append(z)
        return self.denoiser(z, logsnr)


sampler = AncestralSampler(steps=T + 1, schedule=schedule)
start = torch.linspace(-1.9, 1.9, 12)[:, None]
edges = torch.linspace(-2.6, 2.6, 202)
axis_z = (edges[1:] + edges[:-1]) / 2
z, now = (c.reshape(-1) for c in torch.meshgrid(axis_z, levels[:-1].float(), indexing="ij"))
later = levels[1:].float().repeat(len(axis_z))
figure, axes = plt.subplots(1, 3, figsize=(9, 3.8), sharey=True, layout="constrained")
for axis, (name, denoiser) in zip(axes, {"exact": exact, **learned}.items(), strict=True):
    with torch.no_grad():
        value = field(denoiser, z[:, None], now, later).view(len(axis_z), T)
        recorder = Recorder(denoiser)
        sampler(recorder, start, torch.Generator().manual_seed(2))
    shade = {"cmap": "RdBu_r", "vmin": -0.3, "vmax": 0.3, "shading": "flat"}
    mesh = axis.pcolormesh(levels, edges, value, rasterized=True, **shade)
    axis.plot(levels, torch.cat(recorder.path, 1).T, color="black", linewidth=0.7, alpha=0.8)
    axis.set(title=name, xlim=(levels[0], levels[-1]), ylim=(-2.6, 2.6))
axes[0].set_ylabel("noisy data z")
figure.supxlabel("log signal-to-noise ratio λ, from noise to clean data", fontsize=10)
figure.colorbar(mesh, ax=axes, label="E[z_s − z_t | z_t]", shrink=0.8)
plt.show()

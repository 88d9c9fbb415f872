"""
A learned noise schedule
========================

The loss is an integral over λ, and a noise schedule is the density from which λ is sampled. It
changes only the variance of the estimate, so the best schedule is the one that minimises it.
:class:`~lit_diffusion.schedules.learned.LearnedSchedule` finds it by gradient descent. Here the
denoiser is exact and fixed, and only the schedule learns.
"""

import math

import matplotlib.pyplot as plt
import torch

from lit_diffusion import (
    CosineSchedule,
    DiffusionLoss,
    ELBOWeighting,
    GaussianDenoiser,
    LearnedSchedule,
    LinearSchedule,
)

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "0.55"
torch.manual_seed(0)

STD, DIMS, LOW, HIGH = 0.5, 64, -5.0, 13.3
denoiser = GaussianDenoiser(STD)
logsnr = torch.linspace(LOW, HIGH, 1001, dtype=torch.float64)


def sample_data(n):
    return STD * torch.randn(n, DIMS)


# %%
# Training
# --------
#
# The mean of the loss does not depend on the shape, so the gradient of its variance is that of
# its mean square: for each example, the gradient of the loss times twice the loss.
# ``DiffusionLoss`` takes care of this; the training loop is an ordinary one. Times are sampled
# *independently* here, by ``torch.rand``, and not stratified over the batch as usual: the
# shape's gradient is that of the variance of a single sample, which ignores the variance that
# stratified times already remove. Its mean is the same with stratified times, so training with
# them needs no change. The ends are fixed.

schedule = LearnedSchedule(LOW, HIGH)
loss = DiffusionLoss(schedule, ELBOWeighting())
before = schedule.log_prob(logsnr).exp()
optimizer = torch.optim.Adam(schedule.parameters(), lr=3e-2)
decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, 2 - i / 300))
for _ in range(600):
    optimizer.zero_grad()
    loss(denoiser, sample_data(256), t=torch.rand(256)).loss.mean().backward()
    optimizer.step()
    decay.step()
after = schedule.log_prob(logsnr).exp()

# %%
# The learned density
# -------------------
#
# The variance of a single sample is minimal if p is proportional to the root mean square of the
# error h at each λ. For these data that is proportional to sigmoid(λ + 2 ln c) with c = 0.5: it is
# one half at λ = 1.4, and small in stronger noise. The schedule learns this from the losses alone.
# Where the density is small it learns last, since it has few samples there, and little
# depends on it. On the right is the same schedule as a function of time.

ideal = torch.sigmoid(logsnr + 2 * math.log(STD))
ideal = ideal / torch.trapezoid(ideal, logsnr)
t = torch.linspace(0, 1, 501, dtype=torch.float64)
figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
axes[0].plot(logsnr, before, color=GREY, linewidth=1.4, linestyle="--", label="before")
axes[0].plot(logsnr, after, color=BLUE, linewidth=2, label="after 600 steps")
axes[0].plot(logsnr, ideal, color=ORANGE, linewidth=1.4, label="ideal")
axes[0].set(xlim=(LOW, HIGH), ylim=(0, 0.11), ylabel="density p(λ)")
axes[0].set_xlabel("log signal-to-noise ratio λ")
axes[0].legend(frameon=False, fontsize=9, loc="lower right")
with torch.no_grad():
    axes[1].plot(t, schedule.logsnr(t), color=BLUE, linewidth=2, label="learned")
axes[1].plot(
    t, LinearSchedule(LOW, HIGH).logsnr(t), "--", color=GREY, linewidth=1.4, label="linear"
)
axes[1].set(xlim=(0, 1), ylim=(LOW, HIGH), xlabel="time t", ylabel="λ(t)")
axes[1].legend(frameon=False, fontsize=9)
for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)

# %%
# The gain
# --------
#
# 40,000 single samples of the loss under each schedule, with two standard errors of the mean. The
# means agree, as they must. The standard deviations do not: that of the learned schedule is close
# to the minimum, which is due to ε alone and which no schedule can reduce. The
# cosine, made for other weightings, rarely samples high λ, and then with a large factor.

schedules = {
    "linear": (LinearSchedule(LOW, HIGH), GREY),
    "cosine": (CosineSchedule(LOW, HIGH), GREEN),
    "learned": (schedule, BLUE),
}
figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for i, (name, (each, colour)) in enumerate(schedules.items()):
    x = sample_data(40_000)
    with torch.no_grad():
        losses = DiffusionLoss(each, ELBOWeighting())(denoiser, x, t=torch.rand(len(x))).loss
    mean, std = float(losses.mean()), float(losses.std())
    two = 2 * std / len(x) ** 0.5
    axes[0].errorbar(i, mean, two, marker="o", color=colour, capsize=4, markersize=6)
    axes[1].plot(i, std, "o", color=colour, markersize=9)
    axes[1].text(i, std * 1.25, f"{std:.2f}", ha="center", fontsize=9)
    print(f"{name:8} {mean:.3f} ± {two:.3f}, standard deviation {std:.2f}")

low, high = (math.log1p(math.exp(end + 2 * math.log(STD))) for end in (LOW, HIGH))
axes[0].axhline((high - low) / 2, color=ORANGE, linewidth=1.2, label="exact")
axes[0].legend(frameon=False, fontsize=9)
axes[0].set_ylabel("mean loss, nats per dimension")
# ‖ε̂ − ε‖² is the sum of DIMS squares of normal numbers, whatever λ: std/mean = √(2/DIMS).
least = (high - low) / 2 * math.sqrt(2 / DIMS)
axes[1].axhline(least, color=ORANGE, linewidth=1.2, label=f"minimum: {least:.2f}")
axes[1].legend(frameon=False, fontsize=9, loc="upper right")
axes[1].set(yscale="log", ylim=(0.5, 200), ylabel="standard deviation of one sample")
for axis in axes:
    axis.set(xlim=(-0.6, 2.6), xticks=range(3), xticklabels=schedules)
    axis.spines[["top", "right"]].set_visible(False)
plt.show()

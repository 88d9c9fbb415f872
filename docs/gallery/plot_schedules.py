"""
Noise schedules
===============

A noise schedule is a probability density over the log signal-to-noise ratio λ. Training samples
noise levels from it, and a sampler takes its levels from it. Here are all schedules of the library
with their default arguments.
"""

import matplotlib.pyplot as plt
import torch

import lit_diffusion

ours = {
    name: cls()
    for name, cls in lit_diffusion.SCHEDULES.items()
    if cls.__module__.startswith("lit_diffusion.")
}
BLUE, GREY = "#0072B2", "0.82"


def panels(n, columns=4):
    rows = -(-n // columns)
    size = (9, 0.5 + 1.9 * rows)
    options = {"sharex": True, "sharey": True, "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, figsize=size, **options)
    for axis in axes.flat[n:]:
        axis.remove()
    for axis in axes.flat[:n]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelbottom=True, labelsize=8)
    return figure, axes.flat[:n]


# %%
# The density p(λ)
# ----------------
#
# High λ, to the right, is clean data; low λ is noise. The other schedules are grey. None of them
# changes the objective, since the loss is divided by p(λ). They differ in the variance of the
# estimate of the loss.

logsnr = torch.linspace(-20, 20, 2001, dtype=torch.float64)
density = {name: schedule.log_prob(logsnr).exp() for name, schedule in ours.items()}
top = 0.26

figure, axes = panels(len(ours))
for axis, name in zip(axes, ours, strict=True):
    for other in density.values():
        axis.plot(logsnr, other, color=GREY, linewidth=0.8)
    axis.fill_between(logsnr, density[name], color=BLUE, alpha=0.2, linewidth=0)
    axis.plot(logsnr, density[name], color=BLUE, linewidth=1.8)
    axis.set(title=name, ylim=(0, top), xlim=(-20, 20), xticks=(-20, -10, 0, 10, 20))
    axis.title.set_fontsize(10)
    peak = float(density[name].max())
    if peak > top:
        axis.text(19, 0.93 * top, f"peak {peak:.2g}", ha="right", va="top", fontsize=8)
figure.supxlabel("log signal-to-noise ratio λ", fontsize=10)
figure.supylabel("density p(λ)", fontsize=10)

# %%
# The same as a function of time
# ------------------------------
#
# λ(t) is the quantile function: for t uniform on [0, 1], λ(t) has the density above. Where the
# curve is flat, there are many samples. The ends are exact: the formula is restricted to a part of
# its time axis, and λ is never clipped. By default :class:`~lit_diffusion.ShiftedSchedule` has no
# shift and equals the cosine.

t = torch.linspace(0, 1, 1001, dtype=torch.float64)
level = {name: schedule.logsnr(t).detach() for name, schedule in ours.items()}

figure, axes = panels(len(ours))
for axis, name in zip(axes, ours, strict=True):
    for other in level.values():
        axis.plot(t, other, color=GREY, linewidth=0.8)
    axis.plot(t, level[name], color=BLUE, linewidth=1.8)
    axis.set(title=name, xlim=(0, 1), ylim=(-21, 21), xticks=(0, 0.5, 1), yticks=(-20, 0, 20))
    axis.title.set_fontsize(10)
figure.supxlabel("time t, from clean data (0) to noise (1)", fontsize=10)
figure.supylabel("λ(t)", fontsize=10)
plt.show()

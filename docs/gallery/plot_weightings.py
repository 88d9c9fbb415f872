"""
Weightings
==========

A weighting w(λ) is the weight on the squared error of the predicted noise at each noise level. It
defines the objective; the rest of the loss determines how it is estimated. Here are all weightings
of the library with their default arguments.
"""

import matplotlib.pyplot as plt
import torch

import lit_diffusion

ours = {
    name: cls()
    for name, cls in lit_diffusion.WEIGHTINGS.items()
    if cls.__module__.startswith("lit_diffusion.")
}
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "0.85"

# %%
# Monotone or not
# ---------------
#
# With a weighting that never increases with λ, the loss is a bound on the likelihood of
# noise-augmented data (see the theory). These are blue. The range in which the others increase is
# shaded. A constant factor only scales the loss, so each curve is divided by its value at λ = 0.

logsnr = torch.linspace(-15, 15, 3001, dtype=torch.float64)
weight = {name: weighting(logsnr) for name, weighting in ours.items()}
weight = {name: w / w[len(w) // 2] for name, w in weight.items()}

columns = 4
rows = -(-len(ours) // columns)
size = (9, 0.5 + 2.0 * rows)
options = {"sharex": True, "sharey": True, "layout": "constrained"}
figure, axes = plt.subplots(rows, columns, figsize=size, **options)
for axis in axes.flat[len(ours) :]:
    axis.remove()
for axis, (name, w) in zip(axes.flat, weight.items(), strict=False):
    for other in weight.values():
        axis.plot(logsnr, other, color=GREY, linewidth=0.8)
    rises = w.diff() > 1e-9 * w[:-1]
    monotone = not rises.any()
    line = {"color": BLUE} if monotone else {"color": ORANGE, "linestyle": (0, (4, 1.5))}
    axis.plot(logsnr, w, linewidth=2, **line)
    if not monotone:
        start, end = logsnr[:-1][rises][[0, -1]].tolist()
        axis.axvspan(start, end, color=ORANGE, alpha=0.12, linewidth=0)
    axis.set(yscale="log", xlim=(-15, 15), ylim=(1e-6, 1e6), xticks=(-10, 0, 10))
    axis.set_yticks([1e-5, 1, 1e5])
    axis.minorticks_off()
    axis.set_title(name, fontsize=10)
    said = "monotone" if monotone else "not monotone"
    axis.text(0.96, 0.94, said, transform=axis.transAxes, ha="right", va="top", fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelbottom=True, labelsize=8)
figure.supxlabel("log signal-to-noise ratio λ", fontsize=10)
figure.supylabel("weight w(λ) / w(0)", fontsize=10)
plt.show()

# %%
# The density is part of the objective
# ------------------------------------
#
# Most of the weightings that are not a formula of λ alone are a factor times the density from
# which the paper samples. The same factor under another density is another objective: here P2's
# on the chain of its paper, under the cosine and under the logistic density of flow matching.

SKY = "#56B4E9"
P2 = lit_diffusion.P2Weighting
densities = {
    "DDPM's chain": (P2(schedule=lit_diffusion.BetaSchedule(), num_timesteps=999), BLUE),
    "cosine": (P2(schedule=lit_diffusion.CosineSchedule()), ORANGE),
    "flow matching": (P2(schedule=lit_diffusion.FlowSchedule()), SKY),
}
logsnr = torch.linspace(-10.1, 9.2, 1001, dtype=torch.float64)
figure, axis = plt.subplots(figsize=(6, 3.2), layout="constrained")
for style, (name, (weighting, color)) in zip(("-", "--", ":"), densities.items(), strict=True):
    axis.plot(logsnr, weighting(logsnr), color=color, linestyle=style, linewidth=2, label=name)
axis.set(xlabel="log signal-to-noise ratio λ", ylabel="weight w(λ)", yscale="log")
axis.set_title("P2 under three densities", fontsize=10)
axis.legend(frameon=False, fontsize=8)
axis.spines[["top", "right"]].set_visible(False)
plt.show()

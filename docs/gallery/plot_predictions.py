"""
Predictions
===========

A prediction defines the target of the network: target = a(λ)x + b(λ)ε. It is one row (a, b) at
each noise level, and the estimates of data and noise follow from two linear equations. Here are
all predictions of the library with their default arguments.
"""

import matplotlib.pyplot as plt
import torch

import lit_diffusion

ours = {
    name: cls()
    for name, cls in lit_diffusion.PREDICTIONS.items()
    if cls.__module__.startswith("lit_diffusion.")
}
BLUE, ORANGE = "#0072B2", "#D55E00"
logsnr = torch.linspace(-10, 10, 1001, dtype=torch.float64)

# %%
# The row
# -------
#
# Left is noise, right is clean data. Targets with bounded a and b are easy to learn for a network
# with outputs of unit scale; those of the score are unbounded.

columns = 3
rows = -(-len(ours) // columns)
size = (9, 0.9 + 2.1 * rows)
options = {"sharex": True, "sharey": True, "layout": "constrained"}
figure, axes = plt.subplots(rows, columns, figsize=size, **options)
for axis in axes.flat[len(ours) :]:
    axis.remove()
for axis, (name, prediction) in zip(axes.flat, ours.items(), strict=False):
    a, b = prediction.coefficients(logsnr)
    axis.axhline(0, color="0.8", linewidth=0.8)
    axis.plot(logsnr, a, "-", color=BLUE, linewidth=2, label="a(λ), of the data x")
    axis.plot(logsnr, b, "--", color=ORANGE, linewidth=2, label="b(λ), of the noise ε")
    axis.set(
        xlim=(-10, 10), ylim=(-2.6, 2.6), xticks=(-10, -5, 0, 5, 10), yticks=(-2, -1, 0, 1, 2)
    )
    axis.set_title(name, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelbottom=True, labelsize=8)
handles, labels = axes.flat[0].get_legend_handles_labels()
figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=9)
figure.supxlabel("log signal-to-noise ratio λ", fontsize=10)
figure.supylabel("coefficient", fontsize=10)

# %%
# The effect of an error of the output
# ------------------------------------
#
# ‖ε̂ − ε‖² = scale(λ) · ‖out − target‖². Every loss of the library is on ε, so this factor
# is always included, and changing the prediction does not change the objective. Where the scale is
# small, even an inaccurate output gives an accurate ε̂.

styles = ["-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.2, 1.2, 1.2)), "-", (0, (3, 3))]
colours = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9"]

figure, axis = plt.subplots(figsize=(9, 4))
for i, (name, prediction) in enumerate(ours.items()):
    scale = prediction.eps_error_scale(logsnr)
    style = {"color": colours[i % len(colours)], "linestyle": styles[i % len(styles)]}
    axis.plot(logsnr, scale, linewidth=2, label=name, **style)
axis.set(yscale="log", xlim=(-10, 10), ylim=(1e-4, 1e4))
axis.set(xlabel="log signal-to-noise ratio λ", ylabel="scale of the error of ε")
axis.spines[["top", "right"]].set_visible(False)
axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
figure.tight_layout()
plt.show()

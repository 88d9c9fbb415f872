"""The four charts of an objective in a page: density, weights, variance, augmentation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lit_diffusion.objective import Objective, gaussian_error
from lit_diffusion.predictions import VPrediction, XPrediction
from lit_diffusion.training.reporting.chart import Line, Shade, chart
from lit_diffusion.training.reporting.objective import DATA_STD, mixture_title

__all__ = ["AXIS", "objective_charts"]

AXIS = "λ, from noise (left) to data (right)"
DEPTH = 1e-12  # of the highest weight; the tail of a normal density reaches 1e-20


def objective_charts(found: Objective) -> list[str]:
    """The charts of an objective, as HTML.

    Intervals where w(λ) increases, so that the objective is no ELBO, are shaded in each.

    Args:
        found: The objective.
    """
    shade = Shade("w(λ) increases: no ELBO", found.increasing_intervals())
    logsnr = found.logsnr
    weights = {
        "ε": found.weight,
        "x": found.weight_on(XPrediction()),
        "v": found.weight_on(VPrediction()),
    }
    lowest = DEPTH * max(float(weight.max()) for weight in weights.values())
    error = gaussian_error(logsnr, DATA_STD)
    mean = float(torch.trapezoid(found.weight * error, logsnr))
    losses = {
        "with the optimal denoiser": found.ratio * error / mean,
        "of an error of 1, w/p": found.ratio / mean,
    }
    return [
        chart(
            "p(λ): how often a noise level is sampled",
            [Line("density", _points(logsnr, found.density))],
            AXIS,
            ends=False,
            zero=True,
            shade=shade,
        ),
        chart(
            "w(λ): the weight of an error",
            [
                Line(f"of {name}", _points(logsnr, weight, lowest), dashed=name == "v")
                for name, weight in weights.items()
            ],
            AXIS,
            ends=False,
            logarithmic=True,
            shade=shade,
        ),
        chart(
            "Loss of one example over the mean; flat is best",
            [Line(name, _points(logsnr, loss, 1e-3, 1e4)) for name, loss in losses.items()],
            AXIS,
            ends=False,
            logarithmic=True,
            shade=shade,
        ),
        _mixture(found, shade),
    ]


def _points(
    logsnr: Tensor, curve: Tensor, low: float = -math.inf, high: float = math.inf
) -> list[tuple[float, float]]:
    """The points of a curve between two heights."""
    kept = (curve >= low) & (curve <= high)
    return list(zip(logsnr[kept].tolist(), curve[kept].tolist(), strict=True))


def _mixture(found: Objective, shade: Shade) -> str:
    """−dw/dλ, the density of the noise added to the data, and the point mass at its end."""
    middle = (found.logsnr[1:] + found.logsnr[:-1]) / 2
    density, clean = found.augmentation_density(), found.mixture().clean
    lines = [Line("−dw/dλ", _points(middle, density))]
    if clean > 1e-3:
        # A point mass has no height as a density: a bar as high as its mass stands for it.
        end = float(found.logsnr[-1])
        lines.append(Line(f"clean data, a share of {clean:.2g}", [(end, 0.0), (end, clean)]))
    return chart(mixture_title(found), lines, AXIS, ends=False, zero=True, shade=shade)

"""Describe an objective in words, as a table and as a figure.

The command `objective`, the callback `Overview`, the report of a run and the model card use it.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_diffusion.decoders import Decoder
from lit_diffusion.description import build_arguments
from lit_diffusion.loss import DiffusionLoss
from lit_diffusion.models import Pretrained
from lit_diffusion.objective import Objective, gaussian_error
from lit_diffusion.predictions import Prediction, VPrediction, XPrediction
from lit_diffusion.published import PUBLISHED, nearest_published
from lit_diffusion.registry import arguments
from lit_diffusion.schedules import NoiseSchedule
from lit_diffusion.training.run.figures import (
    LINE,
    PALETTE,
    SOFT,
    figure_style,
    new_figure,
    save_figure,
)
from lit_diffusion.weightings import Weighting

__all__ = [
    "headline",
    "mixture_title",
    "objective_of",
    "objective_text",
    "paragraphs",
    "save_objective",
]

DATA_STD, DIMS = 0.5, 192  # the Gaussian data assumed in the text: like 8×8 colour images
ROWS = 9  # of the table


def _call(value: Any) -> str:
    """The call that constructs an object, on one line, with numbers to six digits."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, tuple) and len(value) > 6:  # a table of noise levels may have a thousand
        return f"({_call(value[0])}, …, {_call(value[-1])})"
    if not isinstance(value, (NoiseSchedule, Weighting, Prediction)):
        return repr(value)
    try:
        inner = ", ".join(f"{name}={_call(part)}" for name, part in arguments(value).items())
    except TypeError:  # a plug-in that does not keep its arguments
        return type(value).__name__
    return f"{type(value).__name__}({inner})"


def objective_of(model: Mapping[str, Any]) -> tuple[Objective, Decoder | None]:
    """The objective that a model's config describes, and the decoder of its loss.

    No network is built. Parts that are missing or null have the defaults of `LitDiffusion`.

    Args:
        model: The arguments of `LitDiffusion` as plain data, each class as `class_path` and
            `init_args`.

    Raises:
        ValueError: If the parts do not fit each other, or a class may not be imported.

    Example:
        >>> weighting = {"class_path": "lit_diffusion.EDMWeighting"}
        >>> found, decoder = objective_of({"weighting": weighting})
        >>> found.weighting, found.prediction, decoder
        (EDMWeighting(data_std=0.5, mean=2.4, std=2.4), VPrediction(), None)
    """
    names = ("schedule", "weighting", "prediction", "decoder")
    parts = build_arguments(Pretrained, {name: model.get(name) for name in names})
    schedule, weighting, prediction, decoder = parts.values()
    loss = DiffusionLoss(schedule, weighting, model.get("num_timesteps"), decoder)
    prediction = prediction or VPrediction()
    return Objective(loss.schedule, loss.weighting, prediction, loss.num_timesteps), decoder


def headline(found: Objective, decoder: Decoder | None = None) -> str:
    """An objective on one line: weighting, schedule, steps, prediction and decoder.

    Args:
        found: The objective.
        decoder: The decoder of the loss, if it is the whole bound.

    Example:
        >>> from lit_diffusion import CosineSchedule, ELBOWeighting, VPrediction
        >>> headline(Objective(CosineSchedule(), ELBOWeighting(), VPrediction(), num_timesteps=10))
        'ELBOWeighting(), sampled from CosineSchedule(logsnr_min=-20, logsnr_max=20) in 10 steps,
        VPrediction().'
    """
    chain = "" if found.num_timesteps is None else f" in {found.num_timesteps} steps"
    bound = "" if decoder is None else f", plus prior and reconstruction, {decoder}"
    return (
        f"{_call(found.weighting)}, sampled from {_call(found.schedule)}{chain}, "
        f"{_call(found.prediction)}{bound}."
    )


def paragraphs(found: Objective, decoder: Decoder | None = None) -> list[str]:
    """An objective in words: its parts, its meaning, its variance, the nearest published one.

    Args:
        found: The objective.
        decoder: The decoder of the loss, if it is the whole bound.
    """
    meaning = found.meaning()
    if "added. A share" in meaning:  # do not break the name of a density
        name = found.augmentation_name()
        meaning = meaning.replace(name, name.replace(" ", "\N{NO-BREAK SPACE}"))
    texts = [f"Objective: {headline(found, decoder)}", meaning]
    if decoder is not None:
        texts.append(
            "The prior and reconstruction terms are added without a weight; this description is "
            "of the remaining term."
        )
    return [*texts, _variance(found), _neighbours(found)]


def objective_text(found: Objective, decoder: Decoder | None = None) -> str:
    """An objective as text for a terminal: the paragraphs, and the curves as a table.

    Args:
        found: The objective.
        decoder: The decoder of the loss, if it is the whole bound.
    """
    texts = paragraphs(found, decoder)
    wrapped = [textwrap.fill(text, 80, break_on_hyphens=False) for text in texts]
    text = "\n\n".join([wrapped[0], _table(found), *wrapped[1:]])
    return text.replace("\N{NO-BREAK SPACE}", " ")


def _table(found: Objective) -> str:
    """The curves at a few λ, one in each column."""
    pick = torch.linspace(0, len(found.logsnr) - 1, ROWS).round().long()
    loss = found.loss_density(DATA_STD)
    below = torch.cat([loss.new_zeros(1), torch.cumulative_trapezoid(loss, found.logsnr)])
    columns = {
        "λ": found.logsnr,
        "p": found.density,
        "w on ε": found.weight,
        "on x": found.weight_on(XPrediction()),
        "on v": found.weight_on(VPrediction()),
        "on output": found.weight_on(found.prediction),
        "w/p": found.ratio,
        "loss up to λ": below,
    }
    lines = ["".join(f"{name:>{_width(name)}}" for name in columns)]
    for i in pick.tolist():
        cells = (
            f"{_cell(name, float(column[i])):>{_width(name)}}" for name, column in columns.items()
        )
        lines.append("".join(cells))
    return "\n".join(lines)


def _width(name: str) -> int:
    return {"λ": 7, "loss up to λ": 14, "on output": 11}.get(name, 9)


def _cell(name: str, value: float) -> str:
    if name == "λ":
        return f"{round(value, 2) + 0.0:.2f}".replace("-", "−")
    if name == "loss up to λ":
        return f"{value:.1%}"
    return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e+")


def _variance(found: Objective) -> str:
    relative, least = found.std_over_mean(DATA_STD, DIMS), math.sqrt(2 / DIMS)
    return (
        f"The loss of one sample has a standard deviation of {relative:.2f} times its mean, for "
        f"Gaussian data ({DIMS} dimensions of standard deviation {DATA_STD}) and the optimal "
        f"denoiser; no schedule can go below {least:.2f}."
    )


def _neighbours(found: Objective) -> str:
    (name, nearest), *others = nearest_published(found)
    if nearest.total < 1e-3:
        chain = PUBLISHED[name].num_timesteps
        other = "continuous time" if chain is None else f"{chain} steps"
        but = "" if chain == found.num_timesteps else f", except that the latter has {other}"
        return f"It is a published objective: {name}{but}."
    rest = ", ".join(f"{other} {distance.total:.2f}" for other, distance in others)
    return (
        f"Nearest published objective: {name}, distance {nearest.total:.2f} (weight "
        f"{nearest.weight:.2f}, density {nearest.density:.2f}, prediction "
        f"{nearest.prediction:.2f}). Then {rest}."
    )


# The figure ------------------------------------------------------------------------------------


def save_objective(found: Objective, path: Path) -> None:
    """Plot the curves of an objective into a file, whole or not at all.

    Args:
        found: The objective.
        path: A .png, .pdf or .svg file.
    """
    with figure_style():
        save_figure(_plot(found), path)


def _plot(found: Objective) -> Any:
    figure = new_figure(10, 7, dpi=120)
    axes = figure.subplots(2, 2, sharex=True).flatten()
    logsnr = found.logsnr
    _plot_density(axes[0], found)
    _plot_weights(axes[1], found, logsnr)
    _plot_ratio(axes[2], found, logsnr)
    _plot_mixture(axes[3], found)
    for axis in axes:
        axis.set_xlim(*found.schedule.ends)
        for i, (low, high) in enumerate(found.increasing_intervals()):
            label = "w(λ) increases: no ELBO" if i == 0 else None
            axis.axvspan(low, high, color=LINE, alpha=0.6, zorder=0, label=label)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    for axis in axes[2:]:
        axis.set_xlabel("λ, from noise (left) to data (right)")
    chain = "" if found.num_timesteps is None else f", {found.num_timesteps} steps"
    lines = [_call(found.weighting), f"{_call(found.schedule)}{chain}, {_call(found.prediction)}"]
    figure.suptitle("\n".join(textwrap.fill(line, 120) for line in lines), fontsize=9)
    return figure


def _plot_density(axis: Any, found: Objective) -> None:
    axis.fill_between(found.logsnr, found.density, color=PALETTE[0], alpha=0.15, linewidth=0)
    axis.plot(found.logsnr, found.density, color=PALETTE[0])
    axis.set_ylim(bottom=0)
    axis.set_title("p(λ): how often a noise level is sampled")


def _plot_weights(axis: Any, found: Objective, logsnr: Tensor) -> None:
    curves = {
        "ε": found.weight,
        "x": found.weight_on(XPrediction()),
        "v": found.weight_on(VPrediction()),
    }
    for letter, curve in curves.items():
        style = "--" if letter == "v" else "-"  # v is close to ε at one end, to x at the other
        axis.plot(logsnr, curve, style, label=f"of {letter}")
    axis.set_yscale("log")
    whole = torch.stack(list(curves.values()))
    highest, lowest = float(whole.max()), float(whole.min())
    # Tails of a normal density reach 1e-20, and would compress the rest of the axis.
    axis.set_ylim(bottom=max(lowest / 3, highest * 1e-12), top=highest * 3)
    axis.set_title("w(λ): the weight of an error")


def _plot_ratio(axis: Any, found: Objective, logsnr: Tensor) -> None:
    error = gaussian_error(logsnr, DATA_STD)
    ratio = found.ratio
    scale = float(torch.trapezoid(found.weight * error, logsnr))
    relative = ratio * error / scale
    axis.plot(logsnr, relative, label="with the optimal denoiser of Gaussian data")
    axis.plot(logsnr, ratio / scale, label="of an error of 1, w/p")
    axis.axhline(1, color=SOFT, linewidth=0.8, linestyle=":")
    axis.set_yscale("log")
    top = float(relative[relative.isfinite()].max())
    axis.set_ylim(1e-3, max(10.0, 3 * top))
    axis.set_title("Loss of one example over the mean; flat is best")


def _plot_mixture(axis: Any, found: Objective) -> None:
    middle = (found.logsnr[1:] + found.logsnr[:-1]) / 2
    density, clean = found.augmentation_density(), found.mixture().clean
    axis.fill_between(middle, density, color=PALETTE[0], alpha=0.15, linewidth=0)
    axis.plot(middle, density)
    axis.axhline(0, color=SOFT, linewidth=0.8)
    if clean > 1e-3:
        # A point mass has no height as a density: a bar as high as its mass stands for it.
        label = f"clean data, a share of {clean:.2g}"
        axis.vlines(found.logsnr[-1], 0, clean, color=PALETTE[1], linewidth=4, label=label)
    axis.set_title(mixture_title(found))


def mixture_title(found: Objective) -> str:
    """What the plot of −dw/dλ shows.

    Args:
        found: The objective.
    """
    if found.monotone:
        return "−dw/dλ: how much of which noise is added to the data"
    return "−dw/dλ: below 0, hence no noise that could be added"

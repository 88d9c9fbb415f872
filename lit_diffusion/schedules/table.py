"""The table schedule: the noise levels of a chain, as published.

Letters: logsnr = λ; t ∈ [0, 1] from clean data to noise; β the variance that a step of a chain
adds, ᾱ = Π(1 − β) the remaining variance of the data.

A chain of N levels is defined by N numbers, usually given as betas, and there is not always a
smooth formula through all of them. This schedule is the table itself. Time t = i/(N − 1) is level
i, and λ is interpolated linearly between levels, so p(λ) is a histogram with one bin of equal mass
between any two neighbouring levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lit_diffusion.schedules.base import NoiseSchedule

__all__ = ["TableSchedule", "chain_levels"]

_SHOWN = 6  # a longer table is abbreviated in `repr`


def chain_levels(betas: Tensor | Sequence[float]) -> tuple[float, ...]:
    """The noise levels of a chain: λ_i = log ᾱ_i/(1 − ᾱ_i), ᾱ_i = (1 − β_0) ⋯ (1 − β_i).

    Args:
        betas: Variance added by each step, in (0, 1), in the order of the steps.

    Raises:
        ValueError: If a beta is outside (0, 1): at β = 1 no signal is left, λ = −∞.

    Example:
        >>> [round(level, 4) for level in chain_levels([0.2, 0.5])]
        [1.3863, -0.4055]
    """
    betas = torch.as_tensor(betas, dtype=torch.float64)
    if not bool(((betas > 0) & (betas < 1)).all()):
        raise ValueError(
            "The betas of a chain must be above 0 and below 1, got values from "
            f"{float(betas.min()):.6g} to {float(betas.max()):.6g}."
        )
    decay = -torch.log1p(-betas).cumsum(0)  # −log ᾱ, without computing 1 − ᾱ
    return tuple((-torch.log(torch.expm1(decay))).tolist())


def _improved_ddpm() -> tuple[float, ...]:
    """The thousand levels of improved DDPM: ᾱ(t) = cos² with an offset, and β ≤ 0.999."""

    def kept(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    steps = [(i / 1000, (i + 1) / 1000) for i in range(1000)]
    return chain_levels([min(1 - kept(end) / kept(start), 0.999) for start, end in steps])


class TableSchedule(NoiseSchedule):
    """The levels of a chain, uniform in t, with linear interpolation in between.

    For a model that was trained on a chain without a formula: with `num_timesteps` = N − 1 the
    loss, the bound and the samplers use exactly its levels. (DDPM's own chain has a formula,
    `BetaSchedule`.)

    Args:
        levels: λ of each level, at least two, decreasing from clean data to noise; None means the
            thousand levels of improved DDPM, from 10.09 to −19.84. `chain_levels` computes them
            from betas.
        logsnr_min: Smallest λ; None means the last level.
        logsnr_max: Largest λ; None means the first level.

    Raises:
        ValueError: If there are fewer than two levels, or they do not decrease or are not finite.

    References:
        Nichol & Dhariwal (2021), Improved DDPM, arXiv:2102.09672, Eq. 17 and section 3.2.

    Example:
        >>> TableSchedule((4.0, 3.0, -1.0)).logsnr(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
        tensor([ 4.0000,  3.5000,  3.0000,  1.0000, -1.0000], dtype=torch.float64)
    """

    table: Tensor

    def __init__(
        self,
        levels: tuple[float, ...] | None = None,
        logsnr_min: float | None = None,
        logsnr_max: float | None = None,
    ) -> None:
        levels = None if levels is None else tuple(float(level) for level in levels)
        table = torch.tensor(_improved_ddpm() if levels is None else levels, dtype=torch.float64)
        falls = bool(table.isfinite().all() and (table.diff() < 0).all())
        if len(table) < 2 or not falls:
            raise ValueError(
                "TableSchedule: expected at least two finite levels of λ, decreasing from clean "
                f"data to noise, got {_shown(levels)}."
            )
        super().__init__(logsnr_min, logsnr_max, support=(float(table[-1]), float(table[0])))
        self.levels = levels
        self.register_buffer("table", table, persistent=False)  # given by the arguments

    def _logsnr(self, t: Tensor) -> Tensor:
        place = t * (len(self.table) - 1)
        before = place.detach().long().clamp(0, len(self.table) - 2)
        return torch.lerp(self.table[before], self.table[before + 1], place - before)

    def _time(self, logsnr: Tensor) -> Tensor:
        after = torch.searchsorted(-self.table, -logsnr.detach()).clamp(1, len(self.table) - 1)
        start, end = self.table[after - 1], self.table[after]
        return (after - 1 + (start - logsnr) / (start - end)) / (len(self.table) - 1)

    def extra_repr(self) -> str:
        """The arguments; a long table is abbreviated to its first and last levels."""
        low, high = self.ends
        return f"levels={_shown(self.levels)}, logsnr_min={low!r}, logsnr_max={high!r}"


def _shown(levels: tuple[float, ...] | None) -> str:
    if levels is None or len(levels) <= _SHOWN:
        return repr(levels)
    first, last = (", ".join(f"{level:.6g}" for level in end) for end in (levels[:2], levels[-2:]))
    return f"({first}, … {len(levels) - 4} more …, {last})"

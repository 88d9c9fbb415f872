"""Mode sampling with heavy tails, as a density over λ.

Letters: logsnr = λ; t ∈ [0, 1] from clean data to noise; s the time of the flow path
(1 − s)x + sε, on which λ = 2 log((1 − s)/s).
"""

from __future__ import annotations

import math

import torch
from lit_diffusion import NoiseSchedule
from torch import Tensor

__all__ = ["ModeSchedule"]


class ModeSchedule(NoiseSchedule):
    """Mode sampling, λ = 2 log((1 − s)/s) at the flow time s = t + scale (t − sin²(πt/2)).

    Flow matching that samples the middle of the path more often but still visits its ends: for
    scale > 0 the density of s is at least 1/(1 + scale) everywhere, while that of a logit-normal,
    `NormalSchedule`, falls to zero. At scale 0 it is `FlowSchedule`; below 0 the ends are sampled
    more often.

    Finding t from s means solving Kepler's equation, which has no solution in closed form, so
    `_time` is left to the bisection of the base class.

    Args:
        scale: From −1 (the ends) to below 2/(π − 2) = 1.75 (the middle); 1.29 is the published
            choice.
        logsnr_min: Smallest λ; None means −20.
        logsnr_max: Largest λ; None means 20.

    Raises:
        ValueError: If scale is outside its domain, where s(t) would not increase.

    References:
        Esser et al. (2024), Scaling Rectified Flow Transformers for High-Resolution Image
        Synthesis, arXiv:2403.03206, Eq. 20 (there in u = 1 − t).

    Example:
        >>> ModeSchedule().log_prob(torch.tensor([0.0, 5.0])).exp()
        tensor([0.4741, 0.0169], dtype=torch.float64)
    """

    centre = 0.0

    def __init__(
        self,
        scale: float = 1.29,
        logsnr_min: float | None = None,
        logsnr_max: float | None = None,
    ) -> None:
        super().__init__(logsnr_min, logsnr_max)
        if not -1 <= scale < 2 / (math.pi - 2):
            raise ValueError(
                f"ModeSchedule: scale must be from −1 to below 2/(π − 2) = 1.75, got {scale}."
            )
        self.scale = scale

    def _logsnr(self, t: Tensor) -> Tensor:
        s = t + self.scale * (t - torch.sin(math.pi / 2 * t) ** 2)
        return -2 * torch.logit(s)

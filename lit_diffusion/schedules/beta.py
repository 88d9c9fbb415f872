"""DDPM's schedule: a chain with linear betas in continuous time."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_diffusion.domains import check_count
from lit_diffusion.schedules.base import NoiseSchedule

__all__ = ["BetaSchedule"]


class BetaSchedule(NoiseSchedule):
    """DDPM's chain with linear betas in continuous time: α² = Π(1 − β_i), β_i linear in i.

    At t = (i − 1)/(num_levels − 1) it equals the i-th level of the published table (to 1e-11), and
    in between it interpolates −log α² = Σ −log(1 − β_i) by the Euler-Maclaurin formula.
    `grid(num_levels - 1)` is therefore DDPM's own list of levels, from the last to the first, and
    a loss on this chain has num_timesteps = num_levels − 1.

    Args:
        beta_min: First beta, in (0, beta_max).
        beta_max: Last beta, in (beta_min, 1).
        num_levels: Number of betas, and thus of noise levels, at least 2.
        logsnr_min: Smallest λ; None means the last level, −10.12 for DDPM's values.
        logsnr_max: Largest λ; None means the first level, 9.21 for DDPM's values.

    Raises:
        ValueError: If not 0 < beta_min < beta_max < 1, or num_levels is below 2.

    References:
        Ho et al. (2020), Denoising Diffusion Probabilistic Models, arXiv:2006.11239, section 4.

    Example:
        >>> BetaSchedule().logsnr(torch.tensor([0.0, 1.0]))
        tensor([  9.2102, -10.1177], dtype=torch.float64)
    """

    def __init__(
        self,
        beta_min: float = 1e-4,
        beta_max: float = 0.02,
        num_levels: int = 1000,
        logsnr_min: float | None = None,
        logsnr_max: float | None = None,
    ) -> None:
        if not 0 < beta_min < beta_max < 1:
            raise ValueError(
                "BetaSchedule: expected 0 < beta_min < beta_max < 1, "
                f"got beta_min={beta_min} and beta_max={beta_max}."
            )
        check_count(self, 2, num_levels=num_levels)
        betas = torch.linspace(beta_min, beta_max, num_levels, dtype=torch.float64)
        decay = -torch.log1p(-betas).cumsum(0)  # −log α² along the table
        ends = -torch.log(torch.expm1(decay[[-1, 0]]))
        super().__init__(logsnr_min, logsnr_max, support=(float(ends[0]), float(ends[1])))
        self.beta_min = beta_min
        self.beta_max = beta_max
        self.num_levels = num_levels

    def _decay(self, t: Tensor) -> Tensor:
        """−log α² after n = 1 + (num_levels − 1)t factors: integral plus midpoint correction."""
        step = (self.beta_max - self.beta_min) / (self.num_levels - 1)
        first = self.beta_min - step / 2
        last = first + step * (1 + (self.num_levels - 1) * t)

        def integral(beta: Tensor) -> Tensor:
            return beta + (1 - beta) * torch.log1p(-beta)

        start = torch.full_like(t, first)
        correction = step / 24 * (1 / (1 - last) - 1 / (1 - start))
        return (integral(last) - integral(start)) / step - correction

    def _logsnr(self, t: Tensor) -> Tensor:
        return -torch.log(torch.expm1(self._decay(t)))

    def _time(self, logsnr: Tensor) -> Tensor:
        # −log α² is quadratic in t up to O(β³): start from that solution, then Newton's method.
        decay = torch.nn.functional.softplus(-logsnr)
        step = (self.beta_max - self.beta_min) / (self.num_levels - 1)
        first = self.beta_min - step / 2
        last = torch.sqrt(first**2 + 2 * step * decay)
        t = ((last - first) / step - 1) / (self.num_levels - 1)
        for _ in range(6):
            beta = first + step * (1 + (self.num_levels - 1) * t)
            slope = (self.num_levels - 1) * -torch.log1p(-beta)
            t = (t - (self._decay(t) - decay) / slope).clamp(0, 1)
        return t

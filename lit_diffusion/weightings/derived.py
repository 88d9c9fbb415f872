"""Weightings made from another weighting or from a schedule.

Letters: logsnr = λ, w the weight, p the density of a schedule.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_diffusion.schedules import CosineSchedule, NoiseSchedule
from lit_diffusion.weightings.base import Weighting
from lit_diffusion.weightings.chain import chain_step
from lit_diffusion.weightings.continuous import EDMWeighting, SigmoidWeighting

__all__ = ["DensityWeighting", "MonotoneWeighting", "ShiftedWeighting"]


class MonotoneWeighting(Weighting):
    """Another weighting made monotone: w(λ) = sup of base(λ') over λ' ≥ λ.

    The smallest weighting above the base that never increases with λ, hence a likelihood
    objective. `MonotoneWeighting(EDMWeighting())` is the paper's EDM-monotonic: constant below the
    peak. The supremum is computed on a grid of spacing 0.01 on [−40, 40], with peaks refined by a
    parabola (to 1e-8).

    Args:
        base: The weighting to make monotone; None means `EDMWeighting()`.

    References:
        Kingma & Gao (2023), arXiv:2303.00848, section 5.

    Example:
        >>> MonotoneWeighting()(torch.tensor([-8.0, -3.308, 0.0]))
        tensor([0.2710, 0.2710, 0.1260])
    """

    def __init__(self, base: Weighting | None = None) -> None:
        super().__init__()
        self.base = EDMWeighting() if base is None else base

    def forward(self, logsnr: Tensor) -> Tensor:
        """Supremum of the base over λ' ≥ λ."""
        grid = torch.linspace(-40, 40, 8001, dtype=torch.float64, device=logsnr.device)
        height = self.base(grid)
        left, top, right = height[:-2], height[1:-1], height[2:]
        # Move each peak of the grid to the vertex of the parabola through it and its neighbours.
        peak = (top > left) & (top >= right)
        bend = torch.where(peak, 2 * top - left - right, torch.ones_like(top))
        away = torch.where(peak, (right - left) / (2 * bend), torch.zeros_like(top))
        grid = grid + 0.01 * torch.nn.functional.pad(away, (1, 1))
        height = height + torch.nn.functional.pad(away**2 * bend / 2, (1, 1))
        beyond = height.flip(0).cummax(0).values.flip(0)  # supremum from each grid point on
        beyond = torch.cat([beyond, beyond.new_zeros(1)])
        after = torch.searchsorted(grid, logsnr.detach().to(torch.float64).contiguous())
        return torch.maximum(self.base(logsnr), beyond[after].to(logsnr.dtype))


class DensityWeighting(Weighting):
    """The density of a schedule as weight: w(λ) = p(λ), the unweighted ε-loss under p.

    DDPM's L_simple is `DensityWeighting(BetaSchedule())`. If λ is sampled from the same schedule,
    w/p = 1 and the loss is literally half the mean squared error; under any other schedule the
    objective remains the same. With num_timesteps=T the weight is the density of the discrete
    chain, 1/(T expm1(λ_s − λ)), and the loss of a `DiffusionLoss` with the same num_timesteps is
    again half the mean squared error.

    Args:
        schedule: Schedule whose density is the weight; None means `CosineSchedule()`.
        num_timesteps: Number T of steps of the chain; None means continuous time.

    Raises:
        ValueError: If num_timesteps is below 1.

    References:
        Ho et al. (2020), Denoising Diffusion Probabilistic Models, arXiv:2006.11239, Eq. 14;
        Kingma & Gao (2023), arXiv:2303.00848, section 2.

    Example:
        >>> DensityWeighting()(torch.tensor([-2.0, 0.0, 2.0]))
        tensor([0.1031, 0.1592, 0.1031])
    """

    def __init__(
        self, schedule: NoiseSchedule | None = None, num_timesteps: int | None = None
    ) -> None:
        super().__init__()
        if num_timesteps is not None and num_timesteps < 1:
            raise ValueError(
                f"DensityWeighting: num_timesteps must be at least 1, got {num_timesteps}."
            )
        self.schedule = CosineSchedule() if schedule is None else schedule
        self.num_timesteps = num_timesteps

    def forward(self, logsnr: Tensor) -> Tensor:
        """p(λ)."""
        if self.num_timesteps is None:
            return self.schedule.log_prob(logsnr).exp().to(logsnr.dtype)
        step = chain_step(self.schedule, self.num_timesteps, logsnr)
        return (1 / (self.num_timesteps * torch.expm1(step))).to(logsnr.dtype)


class ShiftedWeighting(Weighting):
    """Another weighting shifted in λ: w(λ) = base(λ − shift).

    For images of side d, relative to 64, the shift is 2 ln(64/d), as for the schedule.

    Args:
        base: The weighting to shift; None means `SigmoidWeighting()`.
        shift: Shift towards higher λ.

    References:
        Hoogeboom et al. (2023), Simple Diffusion, arXiv:2301.11093;
        Kingma & Gao (2023), arXiv:2303.00848, section 5.

    Example:
        >>> ShiftedWeighting(SigmoidWeighting(bias=2.0), shift=-2.0)(torch.tensor([0.0]))
        tensor([0.5000])
    """

    def __init__(self, base: Weighting | None = None, shift: float = 0.0) -> None:
        super().__init__()
        self.base = SigmoidWeighting() if base is None else base
        self.shift = shift

    def forward(self, logsnr: Tensor) -> Tensor:
        """base(λ − shift)."""
        return self.base(logsnr - self.shift)

"""Weightings made from another weighting.

Letters: logsnr = λ, w the weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_diffusion.domains import check_finite
from lit_diffusion.weightings.base import Weighting
from lit_diffusion.weightings.continuous import EDMWeighting, SigmoidWeighting

__all__ = ["MonotoneWeighting", "ShiftedWeighting"]


class MonotoneWeighting(Weighting):
    """Another weighting made monotone: w(λ) = sup of base(λ') over λ' ≥ λ.

    The smallest weighting above the base that never increases with λ, hence a likelihood
    objective. `MonotoneWeighting(EDMWeighting())` is the paper's EDM-monotonic: constant below the
    peak. The supremum is that of values of the base: at λ itself, on a grid of spacing 0.01 on
    [−40, 40], and at the vertex of a parabola through each peak of the grid. It is therefore
    never too large, and at a smooth peak too small by less than 1e-8 of it; next to a jump of the
    base it may be the value up to 0.01 away.

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
        # Move each peak of the grid to the vertex of the parabola through it and its neighbours,
        # if the base is higher there: at a jump it is not, whatever the parabola says.
        peak = (top > left) & (top >= right)
        bend = torch.where(peak, 2 * top - left - right, torch.ones_like(top))
        away = torch.where(peak, (right - left) / (2 * bend), torch.zeros_like(top))
        vertex = grid + 0.01 * torch.nn.functional.pad(away, (1, 1))
        there = self.base(vertex)
        grid = torch.where(there > height, vertex, grid)
        height = torch.maximum(height, there)
        beyond = height.flip(0).cummax(0).values.flip(0)  # supremum from each grid point on
        beyond = torch.cat([beyond, beyond.new_zeros(1)])
        after = torch.searchsorted(grid, logsnr.detach().to(torch.float64).contiguous())
        return torch.maximum(self.base(logsnr), beyond[after].to(logsnr.dtype))


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
        check_finite(self, shift=shift)
        self.shift = shift

    def forward(self, logsnr: Tensor) -> Tensor:
        """base(λ − shift)."""
        return self.base(logsnr - self.shift)

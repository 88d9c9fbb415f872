"""The shifted schedule: another schedule shifted in λ, for images of another size."""

from __future__ import annotations

import math

from torch import Tensor

from lit_diffusion.domains import check_finite
from lit_diffusion.schedules.base import NoiseSchedule
from lit_diffusion.schedules.textbook import CosineSchedule

__all__ = ["ShiftedSchedule"]


class ShiftedSchedule(NoiseSchedule):
    """Another schedule shifted in λ, then truncated: λ → λ + shift.

    The same noise hides less detail in a larger image, because neighbouring pixels are similar.
    For images of side d, relative to 64, the shift is 2 ln(64/d), negative above 64.

    Args:
        base: The schedule to shift; None means `CosineSchedule()`.
        shift: Added to λ.
        logsnr_min: Smallest λ; None means that of the base, shifted if its formula ends there.
        logsnr_max: Largest λ; None means that of the base, shifted if its formula ends there.

    Raises:
        ValueError: If the base is learned.

    References:
        Hoogeboom et al. (2023), Simple Diffusion, arXiv:2301.11093, Eq. 4;
        Esser et al. (2024), arXiv:2403.03206, Eq. 23 (the same in flow time).

    Example:
        >>> ShiftedSchedule(shift=-2.0).logsnr(torch.tensor([0.5]))
        tensor([-1.9998], dtype=torch.float64)
    """

    def __init__(
        self,
        base: NoiseSchedule | None = None,
        shift: float = 0.0,
        logsnr_min: float | None = None,
        logsnr_max: float | None = None,
    ) -> None:
        base = CosineSchedule() if base is None else base
        if any(p.requires_grad for p in base.parameters()):
            raise ValueError(
                f"ShiftedSchedule: {type(base).__name__} is learned, so it learns its shift, "
                "too: give it shifted ends instead."
            )
        check_finite(self, shift=shift)
        low, high = (end + shift for end in base.support)
        if logsnr_min is None:
            logsnr_min = low if math.isfinite(low) else base.ends[0]
        if logsnr_max is None:
            logsnr_max = high if math.isfinite(high) else base.ends[1]
        super().__init__(logsnr_min, logsnr_max, support=(low, high))
        self.base = base
        self.shift = shift

    def _logsnr(self, t: Tensor) -> Tensor:
        return self.base._logsnr(t) + self.shift

    def _time(self, logsnr: Tensor) -> Tensor:
        return self.base._time(logsnr - self.shift)

    def _tail_logsnr(self, s: Tensor) -> Tensor:
        return self.base._tail_logsnr(s) + self.shift

    def _tail_time(self, logsnr: Tensor) -> Tensor:
        return self.base._tail_time(logsnr - self.shift)

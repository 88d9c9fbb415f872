"""DPM-Solver++(2M): a second-order step that reuses the previous estimate.

Letters: z noisy data (B, *), logsnr = λ, c = 1 − e^(λ − λ_s); a step goes from λ to
logsnr_next = λ_s > λ, and the letters α_s, σ_s, z_s are those at the end of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lit_diffusion.gaussian import Generators, alpha_sigma, broadcast_to_data
from lit_diffusion.samplers.base import Ask, Sampler
from lit_diffusion.samplers.heun import HeunSampler
from lit_diffusion.schedules import NoiseSchedule

__all__ = ["DPMSolverSampler"]


@dataclass(frozen=True)
class DPMSolverSampler(Sampler):
    """DDIM with x̂ followed along its last change, at no further call: DPM-Solver++(2M).

    With h = (λ_s − λ)/2 and r = h_last/h, x̂_last and h_last being those of the step before,
    z_s = (σ_s/σ) z + α_s (1 − e^(−h)) (x̂ + (x̂ − x̂_last)/2r). DDIM assumes that x̂ stands still
    during a step; here it goes on as it went, which makes the second order. The choice for few
    calls, if the levels lie evenly in λ, roughly, as those of `KarrasSchedule` and
    `LinearSchedule` do. Few cosine levels end in a step many times longer than the one before,
    over which x̂ is extrapolated too far.

    Args:
        steps: Number of network calls, at least 1.
        schedule: The levels to walk; None means `KarrasSchedule` within the trained range.

    References:
        Lu et al. (2022), DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic
        Models, arXiv:2211.01095, algorithm 2. Its λ is half of ours.

    Example:
        >>> denoiser, z, schedule = GaussianDenoiser(std=0.5), torch.ones(1, 1), KarrasSchedule()
        >>> DPMSolverSampler(steps=25, schedule=schedule)(denoiser, z)  # exact: 0.5
        tensor([[0.5149]])
        >>> DDIMSampler(steps=25, schedule=schedule)(denoiser, z)
        tensor([[0.4442]])
    """

    order: ClassVar[int] = 2
    steps: int = 20
    schedule: NoiseSchedule | None = None

    default_schedule = HeunSampler.default_schedule

    def step(
        self,
        denoiser: Ask,
        z: Tensor,
        logsnr: Tensor,
        logsnr_next: Tensor,
        memory: Any,
        generator: Generators,
    ) -> tuple[Tensor, Any]:
        """Move: z ← α_s x̂ + σ_s ε̂, DDIM's step, + α_s (1 − e^(−h)) (x̂ − x̂_last)/2r."""
        x, eps = denoiser(z, logsnr)
        alpha, sigma = alpha_sigma(logsnr_next)
        z = broadcast_to_data(alpha, z) * x + broadcast_to_data(sigma, z) * eps
        if memory is not None:
            x_last, logsnr_last = memory
            inverse_r = (logsnr_next - logsnr) / (logsnr - logsnr_last)
            share = -alpha * torch.expm1((logsnr - logsnr_next) / 2) * inverse_r / 2
            z = z + broadcast_to_data(share, z) * (x - x_last)
        return z, (x, logsnr)
